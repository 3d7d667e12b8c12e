"""How many threads read: a cold fetch of 100 x 2 MiB through the daemon, by the number of its readers.

A daemon for each number, all running at a time. How fast a drive is depends on where on it a file lies, so each daemon
is held against bare reads of its own files, in turn.
"""

from contextlib import ExitStack
from statistics import median

from bench.disk import ALL_OF_ONE_SET, DISK, ColdFetch, client_of, daemon_at
from bench.harness import Results, home_on_drive, say
from kvclient import Namespace
from kvproto.limits import GIB

READERS = (1, 2, 4, 8, 12, 16)
DEPTH = 4  # of the bare reads


def run(*, quick: bool) -> Results:
    """All figures of `readers`. Needs 4 GiB of memory and 6 GiB of a drive."""
    with home_on_drive(6 * GIB) as home, ExitStack() as stack:
        contestants = []
        for readers in READERS:
            at = home / f"readers-{readers}"
            at.mkdir()
            disk = ("--disk", str(at / "disk"), *DISK, "--disk-readers", str(readers))
            running = stack.enter_context(daemon_at(at, *ALL_OF_ONE_SET, *disk))
            _, namespace = stack.enter_context(client_of(running))
            contestants.append((ColdFetch(at / "disk", namespace), namespace))
        ratios = _contest(contestants, 6 if quick else 40)
    return {f"readers_{readers}_over_raw_read": ratio for readers, ratio in zip(READERS, ratios, strict=True)}


def _contest(contestants: list[tuple[ColdFetch, Namespace]], rounds: int) -> list[float]:
    bare: list[list[float]] = [[] for _ in contestants]
    ours: list[list[float]] = [[] for _ in contestants]
    for number in range(2 + rounds):  # two to warm up
        for turn in range(len(contestants)):
            which = (turn + number) % len(contestants)
            cold, namespace = contestants[which]
            for is_bare in (True, False) if number % 2 else (False, True):
                seconds = cold.read_bare(DEPTH) if is_bare else cold.fetch(namespace)
                if number >= 2:
                    (bare if is_bare else ours)[which].append(seconds)
            cold.next()
        say(f"round {number + 1} of {2 + rounds}")
    return [median(limit) / median(mine) for limit, mine in zip(bare, ours, strict=True)]
