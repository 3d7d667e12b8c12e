"""Replaying with what agents say: the daemon's own Guide listens."""

from bench.replay.hinted import replay_hinted
from bench.replay.lab import Setting, replay
from bench.replay.synthetic import GENERATORS
from kvstore.policy import Rule


def test_what_agents_say_changes_what_density_keeps_and_nothing_else_does() -> None:
    workload = GENERATORS["agents"](1, minutes=8)
    capacity_bytes = workload.footprint_bytes // 20
    density, lru = Setting(Rule.DENSITY), Setting(Rule.LRU)
    hinted = replay_hinted(workload, capacity_bytes, density)
    assert hinted == replay_hinted(workload, capacity_bytes, density)
    assert hinted != replay(workload, capacity_bytes, density)
    assert replay_hinted(workload, capacity_bytes, lru) == replay(workload, capacity_bytes, lru)
