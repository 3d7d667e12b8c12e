"""Overwriting the headers of dropped blocks, so that nothing brings them back. Owner thread."""

from collections import deque
from collections.abc import Callable, Sequence

from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.ports import Workers
from kvstore.tier.orders import Erase, Outcome
from kvstore.tier.segments import Segments

BATCH = 256
RUNNING = 4  # batches at a time: reading comes first, and each is synced


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
        self._queue: deque[int] = deque()  # places, in the order in which they came
        self._sent = 0  # places that left the queue
        self._running: dict[int, tuple[int, Sequence[Erase]]] = {}  # by the identity of the first order: what had been
        # sent before this batch
        self._waiters: list[tuple[int, Callable[[], None]]] = []  # answered when so many have been sent, and erased
        self.quarantined: set[int] = set()  # places that are never used again
        self.erased = 0
        self.faults = 0

    def pump(self) -> None:
        """Send some of what waits on its way: a start may find thousands of places that nobody knows."""
        places: list[int] = []
        while place := int(blocks.next_to_erase(self._tables)):
            places.append(place)
        if places:
            self._queue.extend(places)
            self._given(places)
        while self._queue and len(self._running) < RUNNING:
            self._send_some()

    def _send_some(self) -> None:
        tables, shift = self._tables, int(self._tables.book[blocks.SHIFT])
        position = self._queue[0] >> shift
        slot_bytes = int(tables.pools["slot_bytes"][int(tables.arenas["pool"][position]) - 1])
        number, mask = self._segments.number_at(position), (1 << shift) - 1
        batch: list[Erase] = []
        while self._queue and self._queue[0] >> shift == position and len(batch) < BATCH:
            batch.append(Erase(number, self._queue.popleft() & mask, slot_bytes))
        self._running[id(batch[0])] = (self._sent, batch)
        self._sent += len(batch)
        self._workers.submit(batch)

    def places(self) -> set[int]:
        """Those that are being erased, or wait for it."""
        shift = int(self._tables.book[blocks.SHIFT])
        orders = (order for _, batch in self._running.values() for order in batch)
        running = {(self._segments.position_of.get(order.segment, 0) << shift) + order.slot for order in orders}
        return running | set(self._queue)

    @property
    def idle(self) -> bool:
        """Does nothing run or wait?"""
        return not self._running and not self._queue and not self._tables.book[blocks.TO_ERASE]

    def when_erased(self, answer: Callable[[], None]) -> None:
        """Call when all that waits to be erased by now has been."""
        self.pump()
        if self._running:
            self._waiters.append((self._sent + len(self._queue), answer))
        else:
            answer()

    def finished(self, batch: Sequence[Erase], erased: Callable[[int], None]) -> None:
        """Erasures have ended. `erased` hears of each place: once the index has forgotten it, it may be used again."""
        shift = int(self._tables.book[blocks.SHIFT])
        del self._running[id(batch[0])]
        for order in batch:
            position = self._segments.position_of.get(order.segment)
            if position is None:
                continue
            place = (position << shift) + order.slot
            if order.outcome is Outcome.DONE:
                self.erased += 1
            else:  # the index forgets it all the same; only a rebuild from headers could find it again
                self.faults += 1
            erased(place)
        self.pump()
        done = min((sent for sent, _ in self._running.values()), default=self._sent)
        due = [answer for barrier, answer in self._waiters if barrier <= done]
        self._waiters = [waiter for waiter in self._waiters if waiter[0] > done]
        for answer in due:
            answer()
