"""What was prefetched and has not been used yet: how much that is of each tenant, and what becomes of it. Owner thread.

    note -> used: leased, or `served`
         -> wasted: evicted or dropped before, or left alone until some time after its deadline

Nobody is told of evictions, which would cost each of them. They are noticed when a tenant has no room left for what it
wants next (`look`), some batches at a time.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.hints.deadlines import Deadlines
from kvstore.sessions import Tenant
from kvstore.watch import FETCHED, Watch

GRACE_NS: Final = 60 * 10**9  # what is not used so long after its deadline was fetched in vain
DUE_A_TICK: Final = 64
LOOK_BATCHES: Final = 16  # at a time: 0.1 ms,
LOOK_ROWS: Final = 2048  # unless they are long


@dataclass(slots=True)
class Bytes:
    """Totals."""

    fetched_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """Blocks that were fetched together. `_batch_of` says by row which of them were not used yet."""

    number: int
    rows: U4
    generations: U8
    slot_bytes: int
    tenant: Tenant
    left: int


class Fetched:
    """That of one store."""

    def __init__(self, tables: Tables, watch: Watch, tally: Bytes) -> None:
        self._tables = tables
        self._watch = watch
        self._tally = tally
        self._batches: dict[int, _Batch] = {}
        self._of: dict[Tenant, OrderedDict[int, _Batch]] = {}  # those that were looked at last come last
        self._next_batch = 1
        self._batch_of: U4 = np.zeros(tables.blocks.size, dtype=np.uint32)  # untouched pages cost nothing
        self._unused: Counter[Tenant] = Counter()  # bytes
        self._due: Deadlines[_Batch] = Deadlines()
        watch.tell(FETCHED, self._used)

    def unused_bytes(self, tenant: Tenant) -> int:
        """What was fetched for a tenant and counts as not used yet."""
        return self._unused[tenant]

    def batches(self, tenant: Tenant) -> int:
        """In how many pieces that was fetched."""
        return len(self._of.get(tenant, ()))

    def note(self, tenant: Tenant, slot_bytes: int, rows: U4, by_ns: int) -> None:
        """These were fetched, and wait to be used."""
        if not rows.size:
            return
        rows = np.unique(rows)
        self._settle(rows[self._batch_of[rows] != 0], used=False)  # their rows were others' before
        generations = self._tables.blocks["generation"][rows]
        batch = _Batch(self._next_batch, rows, generations, slot_bytes, tenant, rows.size)
        self._next_batch = self._next_batch % 0xFFFFFFFF + 1
        self._batches[batch.number] = batch
        self._of.setdefault(tenant, OrderedDict())[batch.number] = batch
        self._batch_of[rows] = batch.number
        self._due.set(batch, by_ns + GRACE_NS)
        self._watch.mark(rows, FETCHED)
        self._unused[tenant] += rows.size * slot_bytes
        self._tally.fetched_bytes += rows.size * slot_bytes

    def served(self, rows: U4) -> None:
        """What they were fetched for is done, though nobody leased them: others may be fetched in their place."""
        self._settle(rows[self._batch_of[rows] != 0], used=True)

    def _used(self, rows: U4) -> None:
        """Rows that `Watch` marks as fetched were leased."""
        self._settle(rows, used=True)

    def look(self, tenant: Tenant) -> int:
        """What has left DRAM of some batches of a tenant was fetched in vain. How many were looked at, 0: it has none.

        Those that nobody has looked at for longest come first.
        """
        some: list[_Batch] = []
        rows_left, of_tenant = LOOK_ROWS, self._of.get(tenant, OrderedDict())
        while rows_left > 0 and len(some) < min(LOOK_BATCHES, len(of_tenant)):
            batch = next(iter(of_tenant.values()))
            of_tenant.move_to_end(batch.number)
            some.append(batch)
            rows_left -= batch.rows.size
        if not some:
            return 0
        table = self._tables.blocks
        rows = np.concatenate([batch.rows for batch in some])
        numbers = np.repeat([batch.number for batch in some], [batch.rows.size for batch in some])
        generations = np.concatenate([batch.generations for batch in some])
        there = (table["state"][rows] == blocks.RESIDENT) & (table["generation"][rows] == generations)
        self._settle(rows[(self._batch_of[rows] == numbers) & ~there], used=False)
        return len(some)

    def _settle(self, rows: U4, *, used: bool) -> None:
        """Count them, as used if they still hold what was fetched."""
        if not rows.size:
            return
        rows = np.unique(rows)
        numbers = self._batch_of[rows]
        for number in np.unique(numbers).tolist():
            batch = self._batches[number]
            mine = rows[numbers == number]
            good = 0
            if used:
                place = np.searchsorted(batch.rows, mine)
                good = int((self._tables.blocks["generation"][mine] == batch.generations[place]).sum())
            self._tally.used_bytes += good * batch.slot_bytes
            self._tally.wasted_bytes += (mine.size - good) * batch.slot_bytes
            self._unused[batch.tenant] -= mine.size * batch.slot_bytes
            batch.left -= mine.size
            if not batch.left:
                self._forget(batch)
        self._batch_of[rows] = 0
        self._watch.unmark(rows, FETCHED)

    def _forget(self, batch: _Batch) -> None:
        of_tenant = self._of[batch.tenant]
        del self._batches[batch.number], of_tenant[batch.number]
        self._due.drop(batch)
        if not of_tenant:
            del self._of[batch.tenant], self._unused[batch.tenant]

    def tick(self, now_ns: int) -> None:
        """What was not used in time was fetched in vain."""
        for batch in list(self._due.due(now_ns, DUE_A_TICK)):
            self._settle(batch.rows[self._batch_of[batch.rows] == batch.number], used=False)

    def next_ns(self) -> int | None:
        """When `tick` has something to do."""
        return self._due.next_ns()
