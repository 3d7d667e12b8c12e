"""The whole core, lived through from seeds : faults from an atlas, then a liveness phase."""

import os
import subprocess
from collections.abc import Callable

import pytest

from kvstore.tier.codec import Wish
from tests.figures import Recorder
from tests.sim.actor import Habits, Seen
from tests.sim.disk import as_it_was
from tests.sim.world import World

SEEDS = 200  # about 20 s
PACKED_SEEDS = 40

# Blocks of several pages, of which more or less shrinks: places on disk of many sizes.
PACKING = Habits(sizes=(64, 5 * 4096 - 7, 3 * 4096), noise=0.7)


def live(seeds: range, make: Callable[[int], World] = World) -> Seen:
    """Live every seed; name the one that fails, and how to see it again."""
    seen = Seen()
    for seed in seeds:
        try:
            with as_it_was():
                seen.add(make(seed).live())
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
        "discarded": 0.1, "full": 0.5, "busy": 1, "parked": 0.5, "deaths": 0.5, "zero_maps": 0.02,
        "recycled": 0.5, "rules": 0.5,
        "quotas": 0.5, "quota": 0.03, "returned_arenas": 0.02,
        "evicted": 2, "expired": 1, "refused_arenas": 0.05, "pinned": 10, "expected": 10,
        "direct": 8, "strays": 2, "withheld": 0.2, "scrubbed": 0.5,
    }  # fmt: skip
    on_disk = {
        "saved": 8, "loaded": 0.3, "ready_blocks": 0.3, "streams": 0.3, "flushes": 5, "durable": 1, "returned": 0.08,
        "damaged": 0.04, "load_faults": 0.02, "save_faults": 0.3, "commit_faults": 0.04, "erased": 4, "vanished": 0.1,
        "drained": 0.2, "warm": 0.3, "kept": 3, "verified": 3, "haunted": 100, "prefetched": 0.2,
    }  # fmt: skip
    assert seen.lives > 1.4 * seeds
    assert seen.disks > 0.6 * seen.lives
    for name, floor in (floors | on_disk).items():
        assert getattr(seen, name) >= floor * seeds, f"{name}: {getattr(seen, name)} in {seeds} seeds"


def test_no_seed_breaks_a_promise() -> None:
    enough(live(range(SEEDS)), SEEDS)


def packing(seed: int) -> World:
    """A life in which every block is packed if that pays."""
    return World(seed, PACKING, Wish.BF16_PLANES_ZSTD)


def test_no_seed_with_packed_blocks_breaks_a_promise() -> None:
    seen = live(range(PACKED_SEEDS), packing)
    assert seen.packed > 2 * PACKED_SEEDS
    assert seen.loaded > 0.2 * PACKED_SEEDS
    assert seen.warm > 0.3 * PACKED_SEEDS


@pytest.mark.long
@pytest.mark.timeout(0)
def test_no_seed_of_many_breaks_a_promise(record_property: Recorder) -> None:
    count = int(os.environ.get("KVSTORED_SEEDS", "20000"))
    enough(live(range(SEEDS, SEEDS + count)), count)
    live(range(PACKED_SEEDS, PACKED_SEEDS + count // 5), packing)
    record_property("seeds", count + count // 5)
