"""How many threads write: a flush of 1 GiB that lies in DRAM alone, through the daemon, by the number of its writers.

A daemon and a directory for each number in each round, as for `write_behind`, so that all write to extents that never
held anything; bare writes of the same bytes in the same round.
"""

from statistics import median

from bench import raw
from bench.disk import BLOCK_BYTES, Seconds, best, flush_all
from bench.harness import Results, home_on_drive, random_blocks, say
from kvproto.limits import GIB

WRITERS = (1, 2, 4, 8, 12, 16)


def run(*, quick: bool) -> Results:
    """All figures of `writers`. Needs 4 GiB of memory and 6 GiB of a drive."""
    rounds = 1 if quick else 9
    blocks = random_blocks(GIB // BLOCK_BYTES // (8 if quick else 1), BLOCK_BYTES, seed=3)
    bare: Seconds = {}
    ours: dict[int, list[float]] = {}
    with home_on_drive(6 * GIB) as home:
        for number in range(rounds):
            for name, first, _ in raw.write_table(home / "bare", blocks):
                bare.setdefault(name, []).append(first)
            for turn in range(len(WRITERS)):
                writers = WRITERS[(turn + number) % len(WRITERS)]
                seconds = flush_all(home, blocks, "--disk-writers", str(writers))
                ours.setdefault(writers, []).append(seconds)
            say(f"round {number + 1} of {rounds}")
    limit = best(bare)
    return {f"writers_{writers}_over_raw_write": limit / median(ours[writers]) for writers in WRITERS}
