"""Making room because an operator says so: blocks that nothing holds leave a tier, the longest unused first.

    rows of the scope, a slice at a time -> leaves of the tier, by their last touch -> each goes, then what it continued
    is a leaf itself -> until enough is free

DRAM is left as by eviction: what lies on disk too stays there. On disk a copy is erased; what lies in DRAM too stays
there. Nothing that a lease or a pin holds goes, nor what leads there. With `dry_run` the same is only counted. Owner
thread.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvproto.limits import NAMESPACES
from kvstore import blocks
from kvstore.insight.reasons import Cause, Place
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.sessions import Namespace
from kvstore.store import Store

LEAVES: Final = 1 << 18  # waiting for their turn at a time, 40 MiB; beyond, the order is that of parts so large
STEPS_A_BLOCK: Final = 32  # a slice of 2,048 is then 64 blocks: 1 ms
ROWS_A_LOOK: Final = 4096  # 0.1 ms
ROWS_A_STEP: Final = 8
_IN_DRAM: Final = (blocks.RESIDENT, blocks.KEPT)
_BUSY: Final = int(blocks.SAVING | blocks.VERIFYING)


@dataclass(frozen=True, slots=True)
class EvictReport:
    """What left a tier, or would (`dry_run`)."""

    blocks: int
    bytes: int  # that became free, in whole slots
    kept_blocks: int  # of `blocks`, those that stay in the other tier
    held_blocks: int  # looked at, and kept: leased, pinned, or on their way
    pinned_blocks: int  # of these, those that pins cover
    dry_run: bool


Done = Callable[[EvictReport], None]


def evict(
    store: Store, scope: ClearScope, tier: Tier, wanted_bytes: int, done: Done, *, dry_run: bool, exactly: bool = False
) -> None:
    """Have what `scope` names leave `tier` until `wanted_bytes` are free (0: all that may go).

    `exactly`: its keys themselves, and not what continues them: those that others continue stay.
    `done` hears of it when it is over, on disk too. Raises KeyError for an unknown tenant or namespace.
    """
    job = _Evict(store, scope, tier, wanted_bytes, dry_run=dry_run, exactly=exactly)

    def answer() -> None:
        if dry_run:
            done(job.report())
        else:
            store.sweeper.jobs.when_swept(None, lambda: store.disk.when_erased(lambda: done(job.report())))

    job.over = answer
    store.sweeper.begin(job)


class _Evict:
    """A `sweeps.Job`. Between slices others may change anything: a row counts only while its generation is the same."""

    def __init__(
        self, store: Store, scope: ClearScope, tier: Tier, wanted_bytes: int, *, dry_run: bool, exactly: bool
    ) -> None:
        self.over: Callable[[], None] = lambda: None
        self._store = store
        self._tables = store.tables
        self._tier = tier
        self._wanted_bytes = wanted_bytes
        self._dry_run, self._exactly = dry_run, exactly
        self._chosen = {one.number: one for one in _chosen(store, scope)}
        self._wanted = np.zeros(NAMESPACES, dtype=np.bool_)
        self._wanted[list(self._chosen)] = True
        self._tops = set(self._rows_of(scope)) if scope.keys else None
        self._below = [(row, self._generation(row)) for row in self._tops or ()]  # of a prefix, still to be looked at
        self._row = 1 if self._tops is None else int(self._tables.book[blocks.UNUSED_ROW])
        self._leaves: list[tuple[int, int, int]] = []  # last touch, row, generation; a heap
        self._planned: dict[int, int] = {}  # children of a row that would be gone, in a dry run
        self._freed_blocks = self._freed_bytes = self._kept = self._held = self._pinned = 0

    def report(self) -> EvictReport:
        return EvictReport(
            self._freed_blocks, self._freed_bytes, self._kept, self._held, self._pinned, self._dry_run
        )  # fmt: skip

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job."""
        while steps > 0:
            if self._wanted_bytes and self._freed_bytes >= self._wanted_bytes:
                break
            if len(self._leaves) < LEAVES and self._more_to_look_at():
                steps -= self._look()
            elif self._leaves:
                self._go(*heapq.heappop(self._leaves))
                steps -= STEPS_A_BLOCK
            else:
                break
        else:
            return 0, False
        self.over()
        return max(0, steps), True

    # -- which ---------------------------------------------------------------------------------------------------

    def _rows_of(self, scope: ClearScope) -> Iterator[int]:
        for namespace in self._chosen.values():
            for key in dict.fromkeys(scope.keys):
                words = np.frombuffer(key, dtype=np.uint64).copy()  # read-only arrays would be compiled for apart
                row = blocks.find_one(self._tables, namespace.tenant.index, namespace.number, words, 0)
                if row:
                    yield int(row)

    def _more_to_look_at(self) -> bool:
        return bool(self._below) or self._row < int(self._tables.book[blocks.UNUSED_ROW])

    def _look(self) -> int:
        """At a slice of rows, or of a prefix. Returns the steps it took."""
        if self._below:
            row, generation = self._below.pop()
            if self._generation(row) == generation:
                tops = self._tops or ()  # each has a look of its own
                children = [] if self._exactly else [child for child in self._children(row) if child not in tops]
                self._below += [(child, self._generation(child)) for child in children]
                self._offer(row)
                return STEPS_A_BLOCK + len(children)
            return 1
        start = self._row
        stop = self._row = min(start + ROWS_A_LOOK, int(self._tables.book[blocks.UNUSED_ROW]))
        table = self._tables.blocks
        states = _IN_DRAM if self._tier is Tier.DRAM else (*_IN_DRAM, blocks.DISK)
        there = np.isin(table["state"][start:stop], states) & self._wanted[table["namespace"][start:stop]]
        there &= self._may_be_leaf(start, stop)
        rows = start + np.flatnonzero(there)
        for row in rows.tolist():
            self._offer(row)
        return 1 + (stop - start) // ROWS_A_STEP + STEPS_A_BLOCK * rows.size // 4

    def _may_be_leaf(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        table = self._tables.blocks
        in_dram = self._tier is Tier.DRAM
        leaf: npt.NDArray[np.bool_] = (
            table["dram_children"][start:stop] == 0 if in_dram else table["disk"][start:stop] != 0
        )
        return leaf

    def _offer(self, row: int) -> None:
        if self._is_leaf(row):
            heapq.heappush(self._leaves, (int(self._tables.blocks["touched"][row]), row, self._generation(row)))

    def _is_leaf(self, row: int) -> bool:
        """Is it in the tier, and nothing that continues it?"""
        one = self._tables.blocks[row]
        state = int(one["state"])
        if self._tier is Tier.DRAM:
            return state in _IN_DRAM and int(one["dram_children"]) <= self._planned.get(row, 0)
        if not int(one["disk"]) or state not in (*_IN_DRAM, blocks.DISK):
            return False
        on_disk = sum(int(self._tables.blocks["disk"][child]) != 0 for child in self._children(row))
        return on_disk <= self._planned.get(row, 0)

    def _children(self, row: int) -> Iterator[int]:
        child = int(self._tables.blocks["first_child"][row])
        while child:
            yield child
            child = int(self._tables.blocks["next_sibling"][child])

    def _generation(self, row: int) -> int:
        return int(self._tables.blocks["generation"][row])

    # -- goes ----------------------------------------------------------------------------------------------------

    def _go(self, touched: int, row: int, generation: int) -> None:
        """One leaf, unless something holds it; what it continued may be the next one."""
        one = self._tables.blocks[row]
        if self._generation(row) != generation or not self._is_leaf(row):
            return
        if int(one["touched"]) > touched:  # used meanwhile: its turn comes later
            self._offer(row)
            return
        namespace = self._chosen[int(one["namespace"])]
        parent, kept = int(one["parent"]), self._stays_elsewhere(row)
        slot_bytes = self._slot_bytes(row, namespace)
        if int(one["holds"]) or int(one["flags"]) & _BUSY or not (self._dry_run or self._leave(row, namespace)):
            self._held += 1
            self._pinned += bool(self._store.pinning.covered(np.array([row], dtype=np.uint32))[0])
            return
        self._freed_blocks += 1
        self._freed_bytes += slot_bytes
        self._kept += kept
        if parent and (self._tops is None or row not in self._tops or parent in self._tops):
            if self._dry_run:
                self._planned[parent] = self._planned.get(parent, 0) + 1
            self._offer(parent)

    def _stays_elsewhere(self, row: int) -> bool:
        one = self._tables.blocks[row]
        return bool(one["disk"]) if self._tier is Tier.DRAM else int(one["state"]) in _IN_DRAM

    def _slot_bytes(self, row: int, namespace: Namespace) -> int:
        if self._tier is Tier.DRAM:
            return namespace.slot_bytes
        position = int(self._tables.blocks["disk"][row]) >> int(self._tables.book[blocks.SHIFT])
        return int(self._tables.pools["slot_bytes"][int(self._tables.arenas["pool"][position]) - 1])

    def _leave(self, row: int, namespace: Namespace) -> bool:
        """False: something is in the way."""
        tables, index = self._tables, namespace.tenant.index
        if self._tier is Tier.DRAM:
            if not int(tables.blocks["disk"][row]):  # noted before it goes: should something be in the way, it is there
                self._store.watching.departures.row_left(row, Cause.OPERATOR, Place.DRAM)
            outcome, _, _ = blocks.retire(tables, index, row, 1)
            self._store.tally.evicted_by_operators += bool(outcome == blocks.DONE)
            return bool(outcome == blocks.DONE)
        self._store.tally.disk_evicted_by_operators += 1
        if int(tables.blocks["state"][row]) == blocks.DISK:
            self._store.watching.departures.row_left(row, Cause.OPERATOR, Place.DISK)
            blocks.begin_sweep(tables, index, row)
            blocks.sweep(tables, index, row, 1)  # at once: until it is freed it holds what it continued
        else:
            blocks.detach(tables, row)
        return True


def _chosen(store: Store, scope: ClearScope) -> list[Namespace]:
    """Raises KeyError."""
    if scope.tenant is not None and scope.tenant not in store.tenants:
        raise KeyError(f"no tenant is called {scope.tenant}")
    chosen = [
        namespace
        for (tenant, digest), namespace in store.namespaces.items()
        if scope.tenant in (None, tenant.name) and scope.digest in (None, digest)
    ]
    if scope.digest is not None and not chosen:
        raise KeyError(f"no namespace {scope.digest.hex()}")
    return chosen
