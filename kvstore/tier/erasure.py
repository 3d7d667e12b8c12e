"""Overwriting the headers of dropped blocks, so that nothing brings them back. Owner thread."""

from collections.abc import Callable, Sequence

from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.ports import Workers
from kvstore.tier.orders import Erase, Outcome
from kvstore.tier.segments import Segments

BATCH = 256


class Erasure:
    """What waits to be erased, and who waits for that."""

    def __init__(self, tables: Tables, segments: Segments, workers: Workers) -> None:
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._running: dict[int, int] = {}  # batch by the identity of its first order -> its number
        self._batches: dict[int, Sequence[Erase]] = {}
        self._number = 0
        self._waiters: list[tuple[int, Callable[[], None]]] = []  # answered when no batch up to this number runs
        self.quarantined: set[int] = set()  # places that are never used again
        self.erased = 0
        self.faults = 0

    def pump(self) -> None:
        """Send all that waits on its way."""
        tables = self._tables
        if not tables.book[blocks.TO_ERASE]:
            return
        shift = int(tables.book[blocks.SHIFT])
        batch: list[Erase] = []
        while place := int(blocks.next_to_erase(tables)):
            position = place >> shift
            slot_bytes = int(tables.pools["slot_bytes"][int(tables.arenas["pool"][position]) - 1])
            order = Erase(self._segments.number_at(position), place & ((1 << shift) - 1), slot_bytes)
            if batch and (order.segment != batch[0].segment or len(batch) >= BATCH):
                self._send(batch)
                batch = []
            batch.append(order)
        self._send(batch)

    def _send(self, batch: list[Erase]) -> None:
        self._number += 1
        self._running[id(batch[0])] = self._number
        self._batches[id(batch[0])] = batch
        self._workers.submit(batch)

    def erase(self, segment: int, slot: int, slot_bytes: int, place: int) -> None:
        """Erase a place that was found damaged, and never use it again."""
        self.quarantined.add(place)
        self._send([Erase(segment, slot, slot_bytes)])

    def places(self) -> set[int]:
        """Those that are being erased."""
        shift = int(self._tables.book[blocks.SHIFT])
        orders = (order for batch in self._batches.values() for order in batch)
        return {(self._segments.position_of.get(order.segment, 0) << shift) + order.slot for order in orders}

    @property
    def idle(self) -> bool:
        """Does nothing run or wait?"""
        return not self._running and not self._tables.book[blocks.TO_ERASE]

    def when_erased(self, answer: Callable[[], None]) -> None:
        """Call when all that waits to be erased by now has been."""
        self.pump()
        if self._running:
            self._waiters.append((self._number, answer))
        else:
            answer()

    def finished(self, batch: Sequence[Erase], freed: Callable[[int], None]) -> None:
        """Erasures have ended. `freed` hears of each place: the index must forget it."""
        shift = int(self._tables.book[blocks.SHIFT])
        del self._running[id(batch[0])], self._batches[id(batch[0])]
        for order in batch:
            position = self._segments.position_of.get(order.segment)
            if position is None:
                continue
            place = (position << shift) + order.slot
            if order.outcome is Outcome.DONE:
                self.erased += 1
            else:  # the index forgets it all the same; only a rebuild from headers could find it again
                self.faults += 1
            freed(place)
            if place not in self.quarantined and int(self._tables.slots["block"][place]) == blocks.NOBODY:
                blocks.free_place(self._tables, place)
        oldest = min(self._running.values(), default=self._number + 1)
        due = [answer for number, answer in self._waiters if number < oldest]
        self._waiters = [waiter for waiter in self._waiters if waiter[0] >= oldest]
        for answer in due:
            answer()
