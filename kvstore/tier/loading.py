"""Reading blocks from disk into slots of DRAM that they have already. Owner thread.

a run's rows -> Load batches of neighbouring slots -> `Workers` -> loaded: counted here; `streams.py` goes on with them
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvproto.limits import KEYS_PER_FRAME, MIB
from kvstore import blocks
from kvstore.blocks import DESCRIBED, U4, Rows, Tables
from kvstore.ports import Workers
from kvstore.sessions import Namespace
from kvstore.tier.away import Away
from kvstore.tier.demotion import Demotion
from kvstore.tier.erasure import Erasure
from kvstore.tier.format import HEADER_BYTES
from kvstore.tier.orders import Load, Outcome
from kvstore.tier.segments import Segments

LOAD_BYTES = 2 * MIB  # one read of so many neighbouring slots at most; so soon, too, has the client something to do
UNREAD_MOST = 4096  # blocks that could not be read are remembered
TIMED_BYTES = 64 * MIB  # while reads never cease, they are timed so many bytes at a time


@dataclass(slots=True)
class LoadTally:
    """Totals, in blocks."""

    loaded: int = 0
    loaded_bytes: int = 0
    damaged: int = 0
    load_faults: int = 0
    gone: int = 0


class Loading:
    """The reads that run."""

    def __init__(
        self, tables: Tables, workers: Workers, segments: Segments, demotion: Demotion, erasure: Erasure, away: Away
    ) -> None:
        self.away = away
        self.tally = LoadTally()
        self.running: dict[int, Sequence[Load]] = {}  # by the identity of the first order
        self._timed_ns = 0  # since when all reads are timed together, as they run side by side;
        self._timed_bytes = 0  # so many bytes have come since
        self._timed = False  # and none has failed
        self._tables = tables
        self._workers = workers
        self._segments = segments
        self._demotion = demotion
        self._erasure = erasure
        self._reads: Counter[int] = Counter()  # that went well, by drive
        self._unread: dict[tuple[int, int, int, int], int] = {}  # blocks that could not be read, and `_reads` then
        self._described: Rows = np.zeros(KEYS_PER_FRAME, dtype=DESCRIBED)

    def load(self, namespace: Namespace, rows: U4, now_ns: int) -> None:
        """Read blocks that have their place in DRAM already, in this order."""
        batch: list[Load] = []
        for order in self._orders(namespace, rows):
            last = batch[-1] if batch else order
            if batch and (
                order.segment != last.segment
                or order.slot <= last.slot
                or (len(batch) + 1) * (order.slot_bytes - HEADER_BYTES) > LOAD_BYTES
            ):
                self._begin(batch, now_ns)
                batch = []
            batch.append(order)
        self._begin(batch, now_ns)

    def _orders(self, namespace: Namespace, rows: U4) -> Iterator[Load]:
        """What is to be read, as the table has it now."""
        shift = int(self._tables.book[blocks.SHIFT])
        mask = (1 << shift) - 1
        arenas = self._tables.arenas
        segment_at: dict[int, tuple[int, int]] = {}  # by position: its number and slot bytes
        for begin in range(0, rows.size, KEYS_PER_FRAME):
            some = rows[begin : begin + KEYS_PER_FRAME]
            described = self._described[: some.size]
            blocks.describe(self._tables, some, 0, some.size, described)
            keys = described["key"].tobytes()
            for i, one in enumerate(described.tolist()):
                _, _, generation, _, checksum, row, slot, disk, _, _, _, _ = one
                position = disk >> shift
                if position not in segment_at:
                    pool = self._tables.pools[int(arenas["pool"][position]) - 1]
                    segment_at[position] = (self._segments.number_at(position), int(pool["slot_bytes"]))
                segment, slot_bytes = segment_at[position]
                yield Load(
                    row, namespace, keys[32 * i : 32 * i + 32], generation, checksum, segment, disk & mask, slot_bytes,
                    int(arenas["id"][slot >> shift]), (slot & mask) * namespace.slot_bytes,
                )  # fmt: skip

    def _begin(self, batch: list[Load], now_ns: int) -> None:
        if not self.running:
            self._timed_ns, self._timed_bytes, self._timed = now_ns, 0, True
        self.running[id(batch[0])] = batch
        self._workers.submit(batch)

    def loaded(self, batch: Sequence[Load], now_ns: int) -> None:
        """Reads have ended: count them. Whoever asked decides what becomes of the blocks."""
        self._time(self.running.pop(id(batch[0])), now_ns)
        for order in batch:
            self.settle(order)
        for order in batch:
            if order.outcome is Outcome.DONE:
                self.tally.loaded += 1
                self.tally.loaded_bytes += order.namespace.identity.block_bytes
            elif order.outcome is Outcome.DAMAGED:
                self.tally.damaged += 1
                self._quarantine(order)
            elif order.outcome is Outcome.GONE:
                self.tally.gone += 1
            else:
                self.tally.load_faults += 1

    def settle(self, order: Load) -> None:
        """What cannot be read twice, while its drive reads others, is as good as damaged: else it would hide what
        continues it for ever, since nobody may store again what is there. A drive that reads nothing may come back.
        """
        drive = self._workers.drive_of(order.segment)
        if order.outcome is Outcome.DONE:
            self._reads[drive] += 1
        elif order.outcome is Outcome.FAILED and not self.away.has(drive):  # else it was not even tried
            seen = (order.row, order.generation, order.segment, order.slot)
            reads = self._unread.pop(seen, None)
            if reads is not None and self._reads[drive] > reads:
                order.outcome = Outcome.DAMAGED
                return
            self._unread[seen] = self._reads[drive] if reads is None else reads
            if len(self._unread) > UNREAD_MOST:
                del self._unread[next(iter(self._unread))]

    def _time(self, batch: Sequence[Load], now_ns: int) -> None:
        """What came from the time when nothing was being read until nothing is again, or until it is enough.

        One batch alone would say how long it waited for others as well.
        """
        self._timed &= all(order.outcome is Outcome.DONE for order in batch)
        self._timed_bytes += sum(order.slot_bytes for order in batch)
        if not self.running or self._timed_bytes >= TIMED_BYTES:
            if self._timed:
                self._demotion.took((now_ns - self._timed_ns) / 1e9, self._timed_bytes)
            self._timed_ns, self._timed_bytes, self._timed = now_ns, 0, True

    def _quarantine(self, order: Load) -> None:
        """A place whose content is not what it was is erased when its block is dropped, and never used again."""
        position = self._segments.position_of.get(order.segment)
        if position is not None:
            place = (position << int(self._tables.book[blocks.SHIFT])) + order.slot
            if int(self._tables.slots["block"][place]) == order.row:
                self._erasure.quarantined.add(place)

    def held_rows(self) -> list[int]:
        """Rows that a read holds, once for each."""
        return [order.row for batch in self.running.values() for order in batch]
