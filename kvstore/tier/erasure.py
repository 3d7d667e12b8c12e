"""Overwriting the headers of dropped blocks, so that nothing brings them back. Owner thread.

    dropped -> queue of the segment -> its turn on its drive -> Erase batch -> the index forgets the place

One batch of a segment at a time and a few of a drive, so that a drive that hangs holds up no other. Which block lay at
a place is known to nobody any more: so who deletes waits for all places of its tenant that were given up by then.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.ports import Workers
from kvstore.sessions import Tenant
from kvstore.tier.orders import Erase, Outcome
from kvstore.tier.segments import Segments

BATCH = 256
RUNNING = 4  # batches of a drive at a time: reading comes first, and each is synced
LATE_NS = 10**9  # a batch that takes longer: its drive may hang


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who is answered when there are no segments left to wait for."""

    answer: Callable[[], None]
    segments: int


@dataclass(slots=True, eq=False)
class _Open:
    """A segment with places to erase."""

    drive: int
    tenant: Tenant
    queue: deque[int] = field(default_factory=deque)  # places, in the order in which they came
    running: list[Erase] = field(default_factory=list)
    since_ns: int = 0  # that runs
    over: int = 0  # places that were erased, or could not be
    waiters: deque[tuple[int, _Waiter]] = field(default_factory=deque)  # each until so many are over

    @property
    def places(self) -> int:
        """Places that came so far, those that are over included."""
        return self.over + len(self.running) + len(self.queue)


class Erasure:
    """What waits to be erased, and who waits for that."""

    def __init__(
        self, tables: Tables, segments: Segments, workers: Workers, given: Callable[[Sequence[int]], None]
    ) -> None:
        """`given` hears of places that belong to nobody from now on."""
        self._given = given
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._open: dict[int, _Open] = {}  # by position
        self._turns: dict[int, deque[int]] = {}  # positions with a queue and nothing that runs, by drive
        self._running: Counter[int] = Counter()  # batches, by drive
        self._now_ns = 0
        self._waiters = 0
        self.quarantined: set[int] = set()  # places that are never used again
        self.erased = 0
        self.faults = 0

    def pump(self, now_ns: int = 0) -> None:
        """Send some of what waits on its way: a start may find thousands of places that nobody knows."""
        self._now_ns = max(self._now_ns, now_ns)
        places: list[int] = []
        while place := int(blocks.next_to_erase(self._tables)):
            places.append(place)
            self._queue(place)
        if places:
            self._given(places)
        for drive, turns in self._turns.items():
            while turns and self._running[drive] < RUNNING:
                self._send(turns.popleft())

    def _queue(self, place: int) -> None:
        position = place >> int(self._tables.book[blocks.SHIFT])
        one = self._open.get(position)
        if one is None:
            drive = self._workers.drive_of(self._segments.number_at(position))
            one = self._open[position] = _Open(drive, self._segments.pool_at(position).tenant)
        if not one.queue and not one.running:
            self._turns.setdefault(one.drive, deque()).append(position)
        one.queue.append(place)

    def _send(self, position: int) -> None:
        one, mask = self._open[position], (1 << int(self._tables.book[blocks.SHIFT])) - 1
        number, slot_bytes = self._segments.number_at(position), self._segments.pool_at(position).slot_bytes
        count = min(BATCH, len(one.queue))
        one.running = [Erase(number, one.queue.popleft() & mask, slot_bytes) for _ in range(count)]
        one.since_ns = self._now_ns
        self._running[one.drive] += 1
        self._workers.submit(one.running)

    def _places_at(self, position: int, one: _Open) -> set[int]:
        base = position << int(self._tables.book[blocks.SHIFT])
        return {base + order.slot for order in one.running}.union(one.queue)

    def places(self) -> set[int]:
        """Those that are being erased, or wait for it."""
        return set().union(*(self._places_at(position, one) for position, one in self._open.items()))

    def late(self, now_ns: int) -> set[int]:
        """Drives that take long to erase something."""
        return {one.drive for one in self._open.values() if one.running and now_ns >= one.since_ns + LATE_NS}

    def held_up(self, drives: set[int], pool: int) -> int:
        """How many places of a pool are to be erased by these drives, and may be used again then."""
        pools = self._tables.arenas["pool"]
        return sum(
            len(self._places_at(position, one) - self.quarantined)
            for position, one in self._open.items()
            if one.drive in drives and pools[position] == pool + 1
        )

    @property
    def idle(self) -> bool:
        """Does nothing run or wait?"""
        return not self._open and not self._tables.book[blocks.TO_ERASE]

    def idle_at(self, position: int) -> bool:
        """The same of one segment."""
        return position not in self._open and not self._tables.book[blocks.TO_ERASE]

    def when_erased(self, answer: Callable[[], None], tenant: Tenant | None = None) -> None:
        """Call when all that waits to be erased by now has been: places of a tenant; None: of all."""
        self.pump()
        mine = [one for one in self._open.values() if tenant is None or one.tenant is tenant]
        if mine:
            self._waiters += 1
            waiter = _Waiter(answer, len(mine))
            for one in mine:
                one.waiters.append((one.places, waiter))
        else:
            answer()

    def finished(self, batch: Sequence[Erase], erased: Callable[[int], None]) -> None:
        """Erasures have ended. `erased` hears of each place: once the index has forgotten it, it may be used again."""
        position = self._segments.position_of[batch[0].segment]
        one, base = self._open[position], position << int(self._tables.book[blocks.SHIFT])
        for order in batch:
            if order.outcome is Outcome.DONE:
                self.erased += 1
            else:  # it is noted elsewhere (`Closed.owe`), and the index forgets it
                self.faults += 1
            erased(base + order.slot)
        one.running = []
        one.over += len(batch)
        self._running[one.drive] -= 1
        if one.queue:
            self._turns[one.drive].append(position)
        else:
            del self._open[position]
        self.pump()
        self._answer(one)

    def _answer(self, one: _Open) -> None:
        while one.waiters and one.waiters[0][0] <= one.over:
            _, waiter = one.waiters.popleft()
            waiter.segments -= 1
            if not waiter.segments:
                self._waiters -= 1
                waiter.answer()
