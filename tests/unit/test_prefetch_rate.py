"""Prefetches keep to so many bytes a second, and what was not spent is not saved up for long."""

from collections.abc import Callable

from kvproto.limits import PAGE_BYTES
from kvstore.prefetching import BURST_S, BYTES_PER_S
from tests.core import MS, SECOND, Core, chain
from tests.unit.test_prefetching import begin, in_dram, prefetch, to_disk

NAMES = range(3)  # of chains of two blocks, each fetched in one piece
SLOW = 10 * PAGE_BYTES  # a second: a burst is one block, a chain takes 200 ms


def asked(bytes_per_s: int) -> tuple[Core, Callable[[], list[int]]]:
    """A store that was asked for three chains, the first the most urgent; and how much of each is there by now."""
    core, client, namespace = begin()
    to_disk(client, namespace, *(chain(2, name) for name in NAMES))
    core.pass_time(100 * SECOND)
    core.store.prefetching._bytes_per_s = bytes_per_s
    for name in NAMES:
        prefetch(client, namespace, chain(2, name), within_ns=(100 + name) * SECOND)

    def there() -> list[int]:
        for _ in range(50):  # whatever may be read now
            core.store.tick()
            while core.drive.waiting:
                core.work()
        return [in_dram(client, namespace, chain(2, name)) for name in NAMES]

    return core, there


def test_where_the_rate_allows_it_all_come_at_once() -> None:
    _core, there = asked(BYTES_PER_S)
    assert there() == [2, 2, 2]


def test_beyond_a_burst_each_waits_until_those_before_are_paid_for() -> None:
    core, there = asked(SLOW)
    assert round(SLOW * BURST_S) == PAGE_BYTES
    assert there() == [2, 0, 0]
    due_ns = core.store.prefetching.next_ns()
    assert due_ns is not None
    assert abs(due_ns - core.clock.ns - 100 * MS) < MS, "the block above the burst"
    for wait_ms, then in ((99, [2, 0, 0]), (2, [2, 2, 0]), (197, [2, 2, 0]), (3, [2, 2, 2])):
        core.clock.advance(wait_ms * MS)
        assert there() == then, wait_ms
    core.audit()


def test_a_long_pause_is_worth_no_more_than_a_burst() -> None:
    core, there = asked(SLOW)
    core.pass_time(0)
    core.clock.advance(20 * SECOND)
    assert there() == [2, 2, 0], "the first before the pause, and one after it"
