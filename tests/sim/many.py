"""Many seeds: one after the other, or by several processes at once."""

import subprocess
from collections.abc import Callable
from functools import partial

from kvstore.tier.codec import Wish
from tests.at_once import at_once
from tests.sim.actor import Habits, Seen
from tests.sim.disk import as_it_was
from tests.sim.world import World

# Blocks of several pages, of which more or less shrinks: places on disk of many sizes.
PACKING = Habits(sizes=(64, 5 * 4096 - 7, 3 * 4096), noise=0.7)


def packing(seed: int) -> World:
    """A life in which every block is packed if that pays."""
    return World(seed, PACKING, Wish.BF16_PLANES_ZSTD)


def live(seeds: range, make: Callable[[int], World] = World) -> Seen:
    """Live every seed; name the one that fails, and how to see it again."""
    seen = Seen()
    for seed in seeds:
        try:
            with as_it_was():
                seen.add(make(seed).live())
        except BaseException:
            print(f"\nseed {seed} fails at commit {commit()}: python -m tests.sim {seed}", flush=True)
            raise
    return seen


def live_at_once(seeds: range, make: Callable[[int], World] = World) -> Seen:
    """As `live`, by as many processes as there are processors."""
    seen = Seen()
    for part in at_once(partial(live, make=make), seeds):
        seen.add(part)
    return seen


def commit() -> str:
    """The commit that is being tested."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"
