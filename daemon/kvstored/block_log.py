"""What was told of one tenant's blocks, numbered in one row, and as much of it remembered as whoever is late may miss.

    publisher thread    `add`
    handlers            `after`, `wait`

Any thread.
"""

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from kvstore.announcing import Changes, Place

REMEMBERED_BYTES: Final = 64 << 20  # of one tenant, however many batches that are
REMEMBERED_BYTES_OF_ALL: Final = 256 << 20  # of all tenants together, in equal shares
BATCH_BYTES: Final = 256  # beside its changes and its payload


@dataclass(slots=True)
class EventTally:
    """Totals of all tenants in this life, and how it stands."""

    changes: int = 0  # one for a block and a look
    batches: int = 0
    overruns: int = 0  # times that a subscriber fell so far behind that it missed messages; ZeroMQ says not how many
    replays: int = 0  # requests for what was missed
    replayed: int = 0  # batches sent for them
    faults: int = 0  # times that something could not be told, or somebody not be answered
    number_faults: int = 0  # times that the number that is kept over restarts could not be read or written
    waiting: int = 0  # changes on their way from the owner to whom they are for
    subscribers: int = 0  # connections to sockets of ZeroMQ
    watchers: int = 0  # streams on control sockets


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes of one namespace; or (no place) the word that all of the tenant's blocks are gone; or no changes: a
    number, by which who has come anew sees what it missed.
    """

    number: int
    unix_s: float
    changes: Changes
    place: Place | None
    topic: bytes = b""
    payload: bytes = b""  # as ZeroMQ's subscribers get it

    @property
    def size_bytes(self) -> int:
        """Of memory, about."""
        return self.changes.nbytes + len(self.payload) + BATCH_BYTES


class BlockLog:
    """Those of one tenant, in one life of the daemon."""

    def __init__(self, tenant: str, batches: int, begin: int = 0) -> None:
        """`batches`: so many are remembered, if they fit into memory. `begin`: the number of the first one."""
        self.tenant = tenant
        self._ring: deque[Batch] = deque()
        self._most = batches
        self._most_bytes = REMEMBERED_BYTES
        self._held_bytes = 0
        self._told = False
        self._begin = self._next = begin
        self._stopped = False
        self._news = threading.Condition()

    @property
    def next(self) -> int:
        """The number of the batch to come."""
        return self._next

    @property
    def begun(self) -> bool:
        """Was there one at all?"""
        return self._next > self._begin

    @property
    def told(self) -> bool:
        """Was there ever more than that all is gone?"""
        return self._told

    @property
    def first(self) -> int:
        """The least number that is remembered; that of the next one if none is."""
        with self._news:
            return self._ring[0].number if self._ring else self._next

    def add(self, changes: Changes, place: Place | None, topic: bytes = b"", payload: bytes = b"") -> Batch:
        """Something was found. Publisher thread."""
        with self._news:
            batch = Batch(self._next, time.time(), changes, place, topic, payload)
            self._next += 1
            self._told = self._told or changes.size > 0
            self._ring.append(batch)
            self._held_bytes += batch.size_bytes
            self._trim()
            self._news.notify_all()
        return batch

    def limit(self, most_bytes: int) -> None:
        """From now on it takes no more memory than this, or one batch. Any thread."""
        with self._news:
            self._most_bytes = most_bytes
            self._trim()

    def _trim(self) -> None:
        while len(self._ring) > self._most or (self._held_bytes > self._most_bytes and len(self._ring) > 1):
            self._held_bytes -= self._ring.popleft().size_bytes

    def after(self, number: int, most: int | None = None) -> list[Batch] | None:
        """Those from `number` on, in order; None where some of them are forgotten, or there never were so many."""
        with self._news:
            first = self._ring[0].number if self._ring else self._next
            if not first <= number <= self._next:
                return None
            start = number - first
            stop = len(self._ring) if most is None else min(start + most, len(self._ring))
            return [self._ring[i] for i in range(start, stop)]

    def wait(self, number: int, timeout_s: float) -> bool:
        """Until there is one with that number, or the time is over; False once there will be none any more."""
        with self._news:
            self._news.wait_for(lambda: self._stopped or self._next > number, timeout_s)
            return not self._stopped or self._next > number

    def stop(self) -> None:
        """Whoever waits is told that there is no more to come."""
        with self._news:
            self._stopped = True
            self._news.notify_all()
