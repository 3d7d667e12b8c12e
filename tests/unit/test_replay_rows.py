"""What each rule keeps of a workload that never changes: who changes a rule sees here that it was changed."""

import pytest

from bench.replay.hinted import replay_hinted
from bench.replay.lab import Setting, replay
from bench.replay.synthetic import GENERATORS
from bench.replay.workload import Workload
from kvstore.policy import Rule

# In %, of 10 % of the footprint; and where agents say what they do.
HITS = {
    Rule.LRU: (26.44, 29.05),
    Rule.SECOND_TOUCH: (28.43, 30.31),
    Rule.PGDSF: (28.16, 30.71),
    Rule.LFU: (27.14, 30.40),
    Rule.S3FIFO: (28.75, 28.69),
    Rule.ARC: (28.73, 29.44),
    Rule.DENSITY: (28.33, 29.29),
}


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Eight minutes of agents."""
    return GENERATORS["agents"](1, minutes=8)


@pytest.mark.parametrize("rule", list(Rule))
def test_a_rule_keeps_what_it_always_kept(workload: Workload, rule: Rule) -> None:
    capacity_bytes = workload.footprint_bytes // 10
    hit = 100 * replay(workload, capacity_bytes, Setting(rule)).hit
    told = 100 * replay_hinted(workload, capacity_bytes, Setting(rule)).hit
    assert (hit, told) == pytest.approx(HITS[rule], abs=0.1)
