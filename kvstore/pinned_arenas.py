"""Arenas that pins alone keep from a tenant's other slot sizes. Owner thread.

One pinned block holds a whole arena. Where pins hold a block in each, and nothing of another slot size is there to give
way, blocks of that size would find no room until the pins end. A pin promises nobody memory, so a slot size of which
its tenant has no arena at all gets the one in which fewest pins end; what these cover is cut short.
"""

from typing import Final

import numpy as np

from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import Tables
from kvstore.pinning import Pinning
from kvstore.ports import Clock
from kvstore.sessions import Pool, Tenant

LOOK_NS: Final = 100 * 10**6  # how soon to look again where there was none: it takes a millisecond with 4,096 pins


class PinnedArenas:
    """Those of one store."""

    def __init__(self, tables: Tables, clock: Clock, arenas: Arenas, pinning: Pinning) -> None:
        self._tables = tables
        self._clock = clock
        self._arenas = arenas
        self._pinning = pinning
        self._again_ns: dict[Tenant, int] = {}

    def one_for(self, pool: Pool) -> int | None:
        """The position that gives way to a pool without any; None: it has one, or others are held by more than pins."""
        tenant, now_ns = pool.tenant, self._clock.now_ns()
        if pool.arenas or self._arenas.busy or self._arenas.hoards(tenant) or now_ns < self._again_ns.get(tenant, 0):
            return None
        found = self._least_pinned(pool)
        if found is None:
            self._again_ns[tenant] = now_ns + LOOK_NS
        return found

    def _least_pinned(self, pool: Pool) -> int | None:
        ends = [pin.ends for pin in self._pinning.held() if pin.tenant is pool.tenant]
        if not ends:
            return None
        rows, held = np.unique(np.concatenate(ends), return_counts=True)
        table, arenas = self._tables.blocks, self._tables.arenas[: self._arenas.positions]
        rows = rows[table["holds"][rows] == held]  # by nobody else
        positions = table["slot"][rows] >> np.uint32(self._tables.book[blocks.SHIFT])
        by_pins = np.bincount(positions[positions < arenas.size], minlength=arenas.size)
        mine = [other.number + 1 for other in self._arenas.pools if other.tenant is pool.tenant]
        wanted = np.flatnonzero((by_pins > 0) & (by_pins == arenas["held"]) & np.isin(arenas["pool"], mine))
        return int(wanted[np.argmin(by_pins[wanted])]) if wanted.size else None
