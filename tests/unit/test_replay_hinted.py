"""Replaying with what agents say: the daemon's own Guide listens."""

import pytest

from bench.replay.hinted import replay_hinted
from bench.replay.lab import Setting, replay
from bench.replay.synthetic import GENERATORS
from kvstore.policy import Rule


@pytest.mark.parametrize(("rule", "by"), [(Rule.DENSITY, 1.0), (Rule.LRU, 1.05)])
def test_what_agents_say_saves_compute(rule: Rule, by: float) -> None:
    workload, setting = GENERATORS["agents"](1, minutes=8), Setting(rule)
    capacity_bytes = workload.footprint_bytes // 10
    hinted = replay_hinted(workload, capacity_bytes, setting)
    assert hinted == replay_hinted(workload, capacity_bytes, setting)
    assert hinted.compute_saved > by * replay(workload, capacity_bytes, setting).compute_saved
