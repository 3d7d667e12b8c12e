"""Blocks that nobody has used for longer than their tenant's quota says are dropped, from memory and disk.

Owner thread. A round looks at all rows, a slice a tick; it begins anew after a sixteenth of the shortest time, so a
block is dropped up to that much late. What is pinned stays, and what a block that stays continues. The rest goes as by
DELETE, readable for whoever leased it.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from kvproto.limits import NAMESPACES
from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.quotas import Quota
from kvstore.sessions import Namespace, Tenant
from kvstore.sweeps import Sweep, Sweeper

SLICE: Final = 8192  # rows a tick: 0.1 ms
STEPS: Final = 512  # in it, of what goes: 0.5 ms; the slice is looked at again
STEPS_A_TOP: Final = 20  # what cutting a chain off takes, however short it is; a block further up it is one
ROUND_NS_MIN: Final = 10**9
_STAYING: Final = (blocks.RESIDENT, blocks.DISK, blocks.KEPT)  # others are on their way
_ROUNDS: Final = 16  # in the shortest time


class Ageing:
    """That of one store."""

    def __init__(
        self, tables: Tables, sweeper: Sweeper, namespaces: Callable[[], Iterable[Namespace]],
        covered: Callable[[U4], npt.NDArray[np.bool_]],
    ) -> None:  # fmt: skip
        """`covered`: which of these rows do pins cover?"""
        self.dropped: Counter[Tenant] = Counter()  # blocks
        self.dropping: Callable[[list[int]], None] = lambda _rows: None  # `Departures.unused`
        self._tables = tables
        self._sweeper = sweeper
        self._namespaces = namespaces
        self._covered = covered
        self._ttl_ns: dict[int, int] = {}  # by namespace
        self._tenants: dict[int, Tenant] = {}  # by namespace
        self._row = 0  # where the round is; 0: none is under way
        self._next_ns: int | None = None

    def renew(self, quotas: Iterable[Quota], now_ns: int) -> None:
        """These hold from now on."""
        self._next_ns = now_ns if any(quota.unused_ttl_s is not None for quota in quotas) else None
        self._row = 0

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None: no tenant's blocks age."""
        return 0 if self._row else self._next_ns

    def tick(self, now_ns: int) -> None:
        """A slice of a round."""
        if self._next_ns is None or self._sweeper.jobs.queued:  # what is dropped has its own slices
            return
        if not self._row:
            if now_ns < self._next_ns:
                return
            self._begin(now_ns)
        if self._row:
            self._look(now_ns)

    def _begin(self, now_ns: int) -> None:
        """A new round, by what quotas say now."""
        self._ttl_ns, self._tenants = {}, {}
        for namespace in self._namespaces():
            ttl_s = namespace.tenant.quota.unused_ttl_s
            if ttl_s is not None:
                self._ttl_ns[namespace.number], self._tenants[namespace.number] = int(ttl_s * 1e9), namespace.tenant
        shortest_ns = min(self._ttl_ns.values(), default=60 * 10**9)
        self._next_ns = now_ns + max(ROUND_NS_MIN, shortest_ns // _ROUNDS)
        self._row = 1 if self._ttl_ns else 0

    def _look(self, now_ns: int) -> None:
        """At a slice of rows: at blocks that nothing continues. Where all use of a chain is noted at its end, as by
        LRU, it passes to the block before when that is gone.
        """
        start, unused = self._row, int(self._tables.book[blocks.UNUSED_ROW])
        stop = min(start + SLICE, unused)
        ends = start + np.flatnonzero(self._tables.blocks["first_child"][start:stop] == 0)
        ends = ends[self._is_old(ends, now_ns)]
        if ends.size:
            tops, left = [], STEPS
            for row in ends.tolist():
                top, left = self._top(row, left - STEPS_A_TOP, now_ns)
                tops.append(top)
                if left <= 0:
                    break
            self._drop(tops)
            if left <= 0:
                return  # here again at the next tick
        self._row = stop if stop < unused else 0

    def _top(self, row: int, left: int, now_ns: int) -> tuple[int, int]:
        """Up a chain from its end as long as all is old and nothing else continues it. Returns that, and steps left."""
        table = self._tables.blocks
        parents, children, siblings = table["parent"], table["first_child"], table["next_sibling"]
        touched, states = table["touched"], table["state"]
        latest_ns = now_ns - self._ttl_ns[table["namespace"].item(row)]
        while left > 0:
            left -= 1
            above = parents.item(row)
            alone = above and children.item(above) == row and not siblings.item(row)
            if not alone or touched.item(above) > latest_ns or states.item(above) not in _STAYING:
                break
            if self._covered(np.array([above], dtype=np.uint32))[0]:
                break
            row = above
        return row, left

    def _is_old(self, rows: npt.NDArray[np.int64], now_ns: int) -> npt.NDArray[np.bool_]:
        """Which of them has nobody used for too long?"""
        latest_ns = np.full(NAMESPACES, -1, dtype=np.int64)
        latest_ns[list(self._ttl_ns)] = [now_ns - ttl_ns for ttl_ns in self._ttl_ns.values()]
        table = self._tables.blocks
        old: npt.NDArray[np.bool_] = table["touched"][rows].astype(np.int64) <= latest_ns[table["namespace"][rows]]
        old &= np.isin(table["state"][rows], _STAYING)
        old[old] = ~self._covered(rows[old].astype(np.uint32))
        return old

    def _drop(self, rows: list[int]) -> None:
        numbers = self._tables.blocks["namespace"]
        tops: dict[Tenant, list[int]] = {}
        self.dropping(rows)
        for row in rows:
            tenant = self._tenants[int(numbers[row])]
            blocks.begin_sweep(self._tables, tenant.index, row)
            tops.setdefault(tenant, []).append(row)
        self._sweep(tops)

    def _sweep(self, tops: dict[Tenant, list[int]]) -> None:
        for tenant, mine in tops.items():
            self._sweeper.begin(Sweep(self._tables, tenant, mine, self._counting(tenant)))

    def _counting(self, tenant: Tenant) -> Callable[[int], None]:
        def count(dropped: int) -> None:
            self.dropped[tenant] += dropped

        return count
