"""What a warm restart leaves to be done: settling what continues blocks on disk, verifying what nobody has asked for.

    KEPT rows, the newest first --> while nobody stores, a batch at a time --> `Streams.verify` --> RESIDENT, or dropped

Whoever leases a kept block has it verified at once (`streams.py`); this is for the rest. Blocks keep their places on
the leaf lists meanwhile, so that who is evicted next stays as it was; eviction passes over them. Owner thread.
"""

from collections import deque

import numpy as np

from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.ports import Clock
from kvstore.registry import Registry
from kvstore.reserving import Reserving
from kvstore.restart import Kept, LeftOver, settle_left_over
from kvstore.streams import Streams
from kvstore.tier.demotion import CALM_NS
from kvstore.tier.disk import Disk

BATCH_ROWS, BATCH_BYTES = 256, 16 << 20  # verified at a time


class Verifying:
    """Kept blocks that nobody has looked at yet."""

    def __init__(
        self, tables: Tables, clock: Clock, registry: Registry, streams: Streams, reserving: Reserving
    ) -> None:
        self._tables = tables
        self._clock = clock
        self._registry = registry
        self._streams = streams
        self._reserving = reserving
        self._unverified: deque[int] = deque()

    @property
    def unverified(self) -> int:
        """How many there are, at most."""
        return len(self._unverified)

    def begin(self, kept: Kept, left: LeftOver, disk: Disk) -> None:
        """A former life's blocks were taken over; `left` can be settled once the disk is open, if there is one."""
        table = self._tables.blocks
        rows = np.flatnonzero(table["state"][: int(self._tables.book[blocks.UNUSED_ROW])] == blocks.KEPT)
        self._unverified.extend(rows[np.argsort(table["touched"][rows])[::-1]].tolist())
        if not disk.when_serving(lambda: self._settle(kept, left)):
            self._settle(kept, left)

    def _settle(self, kept: Kept, left: LeftOver) -> None:
        settled = settle_left_over(self._tables, self._registry, left)
        kept.blocks += settled
        kept.lost += left.rows.size - settled
        self._unverified.extend(left.rows[self._tables.blocks["state"][left.rows] == blocks.KEPT].tolist())

    def go_on(self) -> None:
        """Verify some more, if nobody stores and nothing is being verified."""
        if not self._unverified or self._clock.now_ns() < self._reserving.published_ns + CALM_NS:
            return
        while self._unverified and not self._streams.verifying:
            rows = self._next_batch()
            if rows:
                namespace = self._registry.by_number[int(self._tables.blocks["namespace"][rows[0]])]
                self._streams.verify(namespace, np.array(rows, dtype=np.uint32))

    def _next_batch(self) -> list[int]:
        """Some that still have to be verified, all of one namespace."""
        table = self._tables.blocks
        rows: list[int] = []
        most = BATCH_ROWS
        while self._unverified and len(rows) < most:
            row = self._unverified[0]
            if table["state"][row] == blocks.KEPT and not table["flags"][row] & blocks.VERIFYING:
                if rows and table["namespace"][row] != table["namespace"][rows[0]]:
                    break
                slot_bytes = self._registry.by_number[int(table["namespace"][row])].slot_bytes
                most = min(BATCH_ROWS, max(1, BATCH_BYTES // slot_bytes))
                rows.append(row)
            self._unverified.popleft()
        return rows

    def next_ns(self) -> int | None:
        """When to go on; None if nothing is left, or only an event can help."""
        return self._reserving.published_ns + CALM_NS if self._unverified and not self._streams.verifying else None
