"""The whole core, lived through from seeds : faults from an atlas, then a liveness phase."""

import os
import subprocess

import pytest

from tests.sim.actor import Seen
from tests.sim.world import World

SEEDS = 1000


def live(seeds: range) -> Seen:
    """Live every seed; name the one that fails, and how to see it again."""
    seen = Seen()
    for seed in seeds:
        try:
            seen.add(World(seed).live())
        except BaseException:
            print(f"\nseed {seed} fails at commit {commit()}: python -m tests.sim {seed}")
            raise
    print(f"\nseeds {seeds.start} to {seeds.stop - 1}: {seen}")
    return seen


def commit() -> str:
    """The commit that is being tested."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def enough(seen: Seen, seeds: int) -> None:
    """Floors for each seed: a store that always misses, or never gets into trouble, proves nothing."""
    assert seen.hit_blocks > 0.2 * seen.asked_blocks
    floors = {
        "granted": 20, "published": 10, "hit_blocks": 20, "read_blocks": 50, "scribbled": 1, "stale": 0.1,
        "discarded": 0.1, "full": 0.5, "busy": 1, "parked": 0.5, "deaths": 0.5, "zero_maps": 0.02, "recycled": 0.5,
        "evicted": 2, "expired": 1, "refused_arenas": 0.05,
    }  # fmt: skip
    for name, floor in floors.items():
        assert getattr(seen, name) >= floor * seeds, f"{name}: {getattr(seen, name)} in {seeds} seeds"


def test_no_seed_breaks_a_promise() -> None:
    enough(live(range(SEEDS)), SEEDS)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_no_seed_of_many_breaks_a_promise() -> None:
    count = int(os.environ.get("KVSTORED_SEEDS", "20000"))
    enough(live(range(SEEDS, SEEDS + count)), count)
