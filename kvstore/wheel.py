"""Deadlines in buckets of 50 ms: setting and dropping one costs a dict operation, however many there are."""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import islice
from typing import Final, Generic, TypeVar

T = TypeVar("T")
BUCKET_NS: Final = 50 * 10**6


class Wheel(Generic[T]):
    """Things that fall due. One is handed out at its deadline or up to a bucket later, never before."""

    __slots__ = ("_buckets", "_order")

    def __init__(self) -> None:
        self._buckets: dict[int, dict[T, None]] = {}  # in order of arrival, for replays
        self._order: list[int] = []

    def add(self, thing: T, deadline_ns: int) -> None:
        """Set a deadline."""
        number = -(-deadline_ns // BUCKET_NS)
        bucket = self._buckets.get(number)
        if bucket is None:
            bucket = self._buckets[number] = {}
            heappush(self._order, number)
        bucket[thing] = None

    def remove(self, thing: T, deadline_ns: int) -> None:
        """Drop a deadline that was set with the same arguments."""
        bucket = self._buckets.get(-(-deadline_ns // BUCKET_NS))
        if bucket is not None:
            bucket.pop(thing, None)

    def due(self, now_ns: int, most: int = 1 << 62) -> Iterator[T]:
        """Take out up to `most` things whose deadline has passed; the rest stays due."""
        while self._order and self._order[0] * BUCKET_NS <= now_ns and most > 0:
            bucket = self._buckets[self._order[0]]
            for thing in list(islice(bucket, most)):
                if thing in bucket:  # or it was removed while others were handed out
                    del bucket[thing]
                    most -= 1
                    yield thing
            if not bucket:
                del self._buckets[heappop(self._order)]

    def next_ns(self) -> int | None:
        """When to look again; None if nothing is set."""
        while self._order and not self._buckets[self._order[0]]:
            del self._buckets[heappop(self._order)]
        return self._order[0] * BUCKET_NS if self._order else None
