"""The whole core, lived through from seeds: faults from an atlas, then a liveness phase."""

import os

import pytest

from tests.figures import Recorder
from tests.sim.actor import Seen
from tests.sim.many import live, live_at_once, packing

SEEDS = 120  # about 10 s
PACKED_SEEDS = 20
SEEDS_LONG = 23_000  # and a fifth of it packed: ten million operations of clients
OPERATIONS = 10**7
ENDS_LONG = 100  # of lives, in each of
ENDED_IN = ("commit", "publish", "demotion", "promotion", "index_commit", "hand_over")


def enough(seen: Seen, seeds: int) -> None:
    """Floors for each seed: a store that always misses, or never gets into trouble, proves nothing."""
    assert seen.hit_blocks > 0.2 * seen.asked_blocks
    floors = {
        "granted": 20, "published": 10, "hit_blocks": 20, "read_blocks": 50, "scribbled": 1, "stale": 0.1,
        "discarded": 0.1, "full": 0.5, "busy": 1, "parked": 0.5, "deaths": 0.5, "zero_maps": 0.02,
        "recycled": 0.5, "rules": 0.5,
        "quotas": 0.5, "quota": 0.03, "returned_arenas": 0.02,
        "evicted": 2, "expired": 1, "refused_arenas": 0.05, "pinned": 10, "expected": 10,
        "direct": 8, "strays": 2, "withheld": 0.15, "scrubbed": 0.5, "operations": 300,
    }  # fmt: skip
    on_disk = {
        "saved": 8, "loaded": 0.2, "ready_blocks": 0.2, "streams": 0.2, "flushes": 5, "durable": 1, "returned": 0.08,
        "damaged": 0.01, "load_faults": 0.01, "save_faults": 0.3, "commit_faults": 0.04, "erased": 4, "vanished": 0.1,
        "hung": 0.1, "drained": 0.2, "warm": 0.3, "kept": 3, "verified": 3, "haunted": 100, "prefetched": 0.15,
    }  # fmt: skip
    assert seen.lives > 1.4 * seeds
    assert seen.disks > 0.6 * seen.lives
    for name, floor in (floors | on_disk).items():
        assert getattr(seen, name) >= floor * seeds, f"{name}: {getattr(seen, name)} in {seeds} seeds"
    for name in ENDED_IN:
        assert ends(seen, name) >= 0.02 * seeds, f"hardly a life ends in {name}: {ends(seen, name)} of {seeds}"


def ends(seen: Seen, name: str) -> int:
    """How many lives have ended while this was under way."""
    number: int = getattr(seen, f"ended_in_{name}")
    return number


def test_no_seed_breaks_a_promise() -> None:
    enough(live(range(SEEDS)), SEEDS)


def test_no_seed_with_packed_blocks_breaks_a_promise() -> None:
    seen = live(range(PACKED_SEEDS), packing)
    assert seen.packed > 2 * PACKED_SEEDS
    assert seen.loaded > 0.2 * PACKED_SEEDS
    assert seen.warm > 0.3 * PACKED_SEEDS


@pytest.mark.long
@pytest.mark.timeout(0)
def test_no_seed_of_many_breaks_a_promise(record_property: Recorder) -> None:
    count = int(os.environ.get("TEST_SEEDS", str(SEEDS_LONG)))
    seen = live_at_once(range(SEEDS, SEEDS + count))
    enough(seen, count)
    seen.add(live_at_once(range(PACKED_SEEDS, PACKED_SEEDS + count // 5), packing))
    record_property("seeds", count + count // 5)
    record_property("operations", seen.operations)
    record_property("blocks_read", seen.read_blocks)
    record_property("lives", seen.lives)
    for name in ENDED_IN:
        record_property(f"ended_in_{name}", ends(seen, name))
    assert count < SEEDS_LONG or seen.operations >= OPERATIONS
    assert count < SEEDS_LONG or all(ends(seen, name) >= ENDS_LONG for name in ENDED_IN)
