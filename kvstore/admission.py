"""Who would be given up, were so much more stored now: an estimate that changes nothing.

    owner thread    `begin`       what there is room for without giving up anything, and by which rule a pool goes
                    `slice_of`    8,192 rows at a time: what of them the pool holds in DRAM is copied
    any thread      `estimate`    those of the copy that its rule would give up, one after the other

The order is that of ranks and queues, and for DENSITY of what each class promises at its age now. What a rule decides
by more than that is left out: how full the queues of S3-FIFO and ARC are, and what DENSITY would learn meanwhile. So is
what the tenant's blocks of other sizes would give.
Slices are of different moments. A leaf that goes makes a leaf of what it continued, which takes over its last use.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore import blocks
from kvstore.blocks import F8, U1, U4
from kvstore.insight.forest import SLICE_ROWS
from kvstore.savings import seconds_of_codes
from kvstore.sessions import Namespace
from kvstore.store import Store

ROWS_MOST: Final = 1 << 22  # of a copy: 180 MB
LOOK_BLOCKS: Final = 4096  # between two looks at whether anybody still waits: 40 ms
_QUEUED: Final = (blocks.S3FIFO, blocks.ARC)  # who goes is a matter of queues first
_IN_DRAM: Final = (blocks.RESIDENT, blocks.KEPT)


class Held(NamedTuple):
    """What of some rows a pool holds."""

    rows: U4
    parents: U4
    ranks: F8
    queues: U1
    costs: npt.NDArray[np.uint16]
    uses: U1
    children: U4  # in DRAM
    held: npt.NDArray[np.bool_]  # somebody holds it, or what continues it lies on disk alone and it does not
    kept: npt.NDArray[np.bool_]  # stays on disk


@dataclass(frozen=True, slots=True)
class Setting:
    """What an estimate goes by, as of one moment."""

    pool: int
    slot_bytes: int
    free_slots: int
    from_others: bool
    rule: int
    bonus: F8
    usual_cost: float
    now: float
    index: npt.NDArray[np.float32]
    other_sizes_bytes: int  # of arenas that hold the tenant's blocks of other sizes: they may make way, too


@dataclass(frozen=True, slots=True)
class Estimate:
    """What would be given up. Counts are of blocks."""

    wanted_blocks: int
    free_blocks: int
    evicted_blocks: int
    evicted_bytes: int
    kept_blocks: int
    lost_s: float
    unpriced_blocks: int
    short_blocks: int
    from_others: bool
    other_sizes_bytes: int


def begin(store: Store, namespace: Namespace) -> Setting:
    """Owner thread."""
    arenas, tables, pool = store.arenas, store.tables, namespace.pool
    row = tables.pools[pool.number]
    each = arenas.arena_bytes // pool.slot_bytes
    shares, tenant = store.quotas.dram, pool.tenant
    more = len(arenas.free)
    if shares.has_maximum(tenant):
        more = min(more, max(0, shares.most(tenant) - arenas.charged(tenant)))
    others = sum(other.arenas for other in arenas.pools if other.tenant is tenant and other is not pool)
    free = pool.arenas * each - int(row["blocks"]) + more * each
    return Setting(
        pool.number, pool.slot_bytes, max(0, free), shares.giving_way(tenant, arenas.charged) is not None,
        int(row["rule"]), row["bonus"].copy(), float(row["clock"]), float(tables.book[blocks.NOW]),
        tables.reuse[pool.number]["index"].copy(), others * arenas.arena_bytes,
    )  # fmt: skip


def slice_of(store: Store, setting: Setting, start: int) -> tuple[Held, int]:
    """What the pool holds of the rows from `start` (at least 1) on, and where to go on; 0: all done. Owner thread."""
    tables = store.tables
    unused = int(tables.book[blocks.UNUSED_ROW])
    stop = min(start + SLICE_ROWS, unused)
    table = tables.blocks[start:stop]
    there = np.flatnonzero(np.isin(table["state"], _IN_DRAM))
    positions = table["slot"][there] >> np.uint32(tables.book[blocks.SHIFT])
    there = there[tables.arenas["pool"][positions] == setting.pool + 1]
    words = table.view(np.uint64).reshape(table.size, table.itemsize // 8)
    found = np.take(words, there, axis=0).view(blocks.BLOCK)[:, 0]
    rows = (there + start).astype(np.uint32)
    on_disk, flags = found["disk"] != 0, found["flags"]
    childless_only = ~on_disk & (flags & blocks.PARENT != 0) & (found["dram_children"] == 0)
    held = Held(
        rows, found["parent"].copy(), tables.ranks[rows], found["queue"].copy(), found["cost"].copy(),
        found["uses"] & np.uint8(blocks.USES_MAX), found["dram_children"].copy(),
        (found["holds"] != 0) | childless_only, on_disk,
    )  # fmt: skip
    return held, (stop if stop < unused else 0)


def estimate(
    setting: Setting, parts: Sequence[Held], wanted_blocks: int, waits: Callable[[], bool] = lambda: True
) -> Estimate:
    """Any thread. `waits`: whether anybody still does, asked every 4,096 blocks. Raises TimeoutError if nobody does."""
    free = min(wanted_blocks, setting.free_slots)
    if not parts:  # there is room: nobody was looked at
        short = wanted_blocks - free
        return Estimate(
            wanted_blocks, free, 0, 0, 0, 0.0, 0, short, setting.from_others, setting.other_sizes_bytes
        )  # fmt: skip
    # Arrays, not lists: to make one of a million numbers holds the GIL for 50 ms, and the owner thread would wait.
    all_of = Held(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    children, ranks, held, kept = all_of.children, all_of.ranks, all_of.held, all_of.kept
    leaves = _Leaves(setting, all_of)
    evicted: list[int] = []
    while len(evicted) < wanted_blocks - free:
        if len(evicted) % LOOK_BLOCKS == 0 and not waits():
            raise TimeoutError
        next_one = leaves.next()
        if next_one is None:
            break
        at = next_one
        evicted.append(at)
        above = _index_of(all_of.rows, all_of.parents[at])
        if above is None:
            continue
        last_child = children[above] == 1
        children[above] -= children[above] > 0  # slices are of different moments
        ranks[above] = max(ranks[above], ranks[at])
        stays_below = kept[at] and not kept[above]  # what lies on disk needs what it continues
        held[above] = held[above] or stays_below
        if last_child and not held[above]:
            leaves.add(above)
    return _summed(setting, all_of, evicted, wanted_blocks, free)


def _summed(setting: Setting, all_of: Held, evicted: Sequence[int], wanted: int, free: int) -> Estimate:
    chosen = np.array(evicted, dtype=np.int64)
    kept = all_of.kept[chosen]
    costs = all_of.costs[chosen][~kept]
    return Estimate(
        wanted, free, len(evicted), len(evicted) * setting.slot_bytes, int(np.count_nonzero(kept)),
        float(seconds_of_codes(costs[costs != 0]).sum()), int(np.count_nonzero(costs == 0)),
        wanted - free - len(evicted), setting.from_others, setting.other_sizes_bytes,
    )  # fmt: skip


def _index_of(rows: U4, row: np.uint32) -> int | None:
    """Where a row is in what was copied, which is in the order of rows; None: it is not."""
    at = int(np.searchsorted(rows, row))
    return at if at < rows.size and rows[at] == row else None


@dataclass(slots=True)
class _Sorted:
    """Leaves, the one to go first in front."""

    leaves: npt.NDArray[np.int64]
    next: int = 0

    def head(self) -> int | None:
        """None: there are no more."""
        return int(self.leaves[self.next]) if self.next < self.leaves.size else None


class _Leaves:
    """Leaf lists as a pool has them, by queue: the heads are compared, and the one that is worth least goes."""

    def __init__(self, setting: Setting, all_of: Held) -> None:
        self._setting = setting
        self._all = all_of
        self._bonus = setting.bonus.tolist()
        first = np.flatnonzero((all_of.children == 0) & ~all_of.held)
        self._there: dict[int, _Sorted] = {}  # those that were leaves from the beginning
        for queue in np.unique(all_of.queues[first]).tolist():
            mine = first[all_of.queues[first] == queue]
            self._there[queue] = _Sorted(mine[np.argsort(all_of.ranks[mine], kind="stable")])
        self._lists: dict[int, list[tuple[float, int]]] = {}  # those that have become leaves

    def add(self, at: int) -> None:
        """One more."""
        queue = int(self._all.queues[at])
        heappush(self._lists.setdefault(queue, []), (float(self._all.ranks[at]), at))

    def next(self) -> int | None:
        """The one that goes, which is a leaf no more; None: there is none."""
        best: tuple[tuple[float, float], int] | None = None
        for queue in {*self._there, *self._lists}:
            head = self._head(queue)
            if head is not None and (best is None or (self._worth(queue, *head), queue) < best):
                best = self._worth(queue, *head), queue
        return self._take(best[1]) if best is not None else None

    def _head(self, queue: int) -> tuple[float, int] | None:
        there, later = self._there.get(queue), self._lists.get(queue)
        at = there.head() if there is not None else None
        first = (float(self._all.ranks[at]), at) if at is not None else None
        if later and (first is None or later[0] < first):
            return later[0]
        return first

    def _take(self, queue: int) -> int:
        head = self._head(queue)
        assert head is not None, "somebody has looked"
        later = self._lists.get(queue)
        if later and later[0] == head:
            return heappop(later)[1]
        self._there[queue].next += 1
        return head[1]

    def _worth(self, queue: int, rank: float, at: int) -> tuple[float, float]:
        """And what decides among equals."""
        setting = self._setting
        if queue >= blocks.QUEUES:
            return 0.0, rank
        if setting.rule == blocks.DENSITY:
            uses, usual = max(1, int(self._all.uses[at])), setting.usual_cost
            code = usual + blocks.BY_COST * ((float(self._all.costs[at]) or usual) - usual)
            promised = float(setting.index[queue, _age_bin(setting.now - rank)])
            return promised * uses**blocks.BY_USES * 2.0 ** ((code - 40 * 1024) / 1024.0), rank  # as `blocks._worth`
        if setting.rule in _QUEUED:
            return float(queue), rank
        return rank + self._bonus[queue], rank


def _age_bin(age_ns: float) -> int:
    """As `blocks._age_bin`."""
    age = age_ns * 4e-9
    return min(blocks.AGES - 1, int(2.0 * np.log2(age))) if age > 1.0 else 0
