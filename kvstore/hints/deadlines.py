"""Deadlines that move with every word of a client: memory for those that are set, however often and far they move.

A wheel (kvstore/wheel.py) keeps a bucket for every 50 ms that anything was ever set for, which is little for leases of
a minute and 1,728,000 buckets for programs of a day.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class Deadlines(Generic[T]):
    """One a thing. To move it to later costs a dict operation; the queue learns of it once the old one is past."""

    __slots__ = ("_due_ns", "_queued_ns", "_queue", "_numbers")

    def __init__(self) -> None:
        self._due_ns: dict[T, int] = {}
        self._queued_ns: dict[T, int] = {}  # by thing: which entry of the queue stands for it
        self._queue: list[tuple[int, int, T]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._due_ns)

    def set(self, thing: T, deadline_ns: int) -> None:
        """Set a deadline, or move it."""
        self._due_ns[thing] = deadline_ns
        queued_ns = self._queued_ns.get(thing)
        if queued_ns is None or deadline_ns < queued_ns:
            self._enqueue(thing, deadline_ns)

    def drop(self, thing: T) -> None:
        """Unset it, if it is set."""
        self._due_ns.pop(thing, None)

    def due(self, now_ns: int, most: int = 1 << 62) -> Iterator[T]:
        """Take out up to `most` things whose deadline has passed; the rest stays due."""
        while most > 0:
            next_ns = self.next_ns()
            if next_ns is None or next_ns > now_ns:
                return
            thing = heappop(self._queue)[2]
            del self._due_ns[thing], self._queued_ns[thing]
            most -= 1
            yield thing

    def next_ns(self) -> int | None:
        """The first deadline; None if nothing is set."""
        while self._queue:
            queued_ns, _, thing = self._queue[0]
            due_ns = self._due_ns.get(thing)
            if due_ns == queued_ns == self._queued_ns.get(thing):
                return queued_ns
            heappop(self._queue)
            if self._queued_ns.get(thing) == queued_ns:  # and not one that was overtaken by an earlier deadline
                del self._queued_ns[thing]
                if due_ns is not None:
                    self._enqueue(thing, due_ns)
        return None

    def _enqueue(self, thing: T, deadline_ns: int) -> None:
        self._queued_ns[thing] = deadline_ns
        heappush(self._queue, (deadline_ns, next(self._numbers), thing))
        if len(self._queue) > 2 * len(self._due_ns) + 64:
            self._queued_ns = dict(self._due_ns)
            self._queue = [(ns, next(self._numbers), thing) for thing, ns in self._due_ns.items()]
            heapify(self._queue)
