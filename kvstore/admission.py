"""Who would be given up, were so much more stored now: an estimate that changes nothing.

    owner thread    `begin`       what there is room for without giving up anything, and by which rule a pool goes
                    `slice_of`    8,192 rows at a time: what of them the pool holds in DRAM is copied
    any thread      `estimate`    those of the copy that its rule would give up, one after the other

The order is that of ranks and queues, and for DENSITY of what each class promises at its age now. What a rule decides
by more than that is left out: how full the queues of S3-FIFO and ARC are, and what DENSITY would learn meanwhile.
Slices are of different moments. A leaf that goes makes a leaf of what it continued, which takes over its last use.
"""

from collections.abc import Sequence
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
_QUEUED: Final = (blocks.S3FIFO, blocks.ARC)  # who goes is a matter of queues first
_IN_DRAM: Final = (blocks.RESIDENT, blocks.KEPT)


class Held(NamedTuple):
    """What of some rows a pool holds."""

    rows: U4
    parents: U4
    ranks: F8
    queues: U1
    costs: npt.NDArray[np.uint16]
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


def begin(store: Store, namespace: Namespace) -> Setting:
    """Owner thread."""
    arenas, tables, pool = store.arenas, store.tables, namespace.pool
    row = tables.pools[pool.number]
    each = arenas.arena_bytes // pool.slot_bytes
    shares, tenant = store.quotas.dram, pool.tenant
    more = len(arenas.free)
    if shares.has_maximum(tenant):
        more = min(more, max(0, shares.most(tenant) - arenas.charged(tenant)))
    free = pool.arenas * each - int(row["blocks"]) + more * each
    return Setting(
        pool.number, pool.slot_bytes, max(0, free), shares.giving_way(tenant, arenas.charged) is not None,
        int(row["rule"]), row["bonus"].copy(), float(row["clock"]), float(tables.book[blocks.NOW]),
        tables.reuse[pool.number]["index"].copy(),
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
    found = np.take(table.view(np.uint64).reshape(table.size, -1), there, axis=0).view(blocks.BLOCK)[:, 0]
    rows = (there + start).astype(np.uint32)
    on_disk, flags = found["disk"] != 0, found["flags"]
    childless_only = ~on_disk & (flags & blocks.PARENT != 0) & (found["dram_children"] == 0)
    held = Held(
        rows, found["parent"].copy(), tables.ranks[rows], found["queue"].copy(), found["cost"].copy(),
        found["dram_children"].copy(), (found["holds"] != 0) | childless_only, on_disk,
    )  # fmt: skip
    return held, (stop if stop < unused else 0)


def estimate(setting: Setting, parts: Sequence[Held], wanted_blocks: int) -> Estimate:
    """Any thread."""
    all_of = Held(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    free = min(wanted_blocks, setting.free_slots)
    at_of = {row: at for at, row in enumerate(all_of.rows.tolist())}
    children, ranks, held = all_of.children.tolist(), all_of.ranks.tolist(), all_of.held.tolist()
    kept, parents, queues = all_of.kept.tolist(), all_of.parents.tolist(), all_of.queues.tolist()
    leaves = _Leaves(setting, seconds_of_codes(all_of.costs).tolist())
    for at in range(len(children)):
        if not (children[at] or held[at]):
            leaves.add(at, queues[at], ranks[at])
    evicted: list[int] = []
    while len(evicted) < wanted_blocks - free:
        next_one = leaves.next()
        if next_one is None:
            break
        at = next_one
        evicted.append(at)
        above = at_of.get(parents[at])
        if above is None:
            continue
        children[above] -= 1
        ranks[above] = max(ranks[above], ranks[at])
        stays_below = kept[at] and not kept[above]  # what lies on disk needs what it continues
        held[above] = held[above] or stays_below
        if not children[above] and not held[above]:
            leaves.add(above, queues[above], ranks[above])
    return _summed(setting, all_of, evicted, wanted_blocks, free)


def _summed(setting: Setting, all_of: Held, evicted: Sequence[int], wanted: int, free: int) -> Estimate:
    chosen = np.array(evicted, dtype=np.int64)
    kept = all_of.kept[chosen]
    costs = all_of.costs[chosen][~kept]
    return Estimate(
        wanted, free, len(evicted), len(evicted) * setting.slot_bytes, int(np.count_nonzero(kept)),
        float(seconds_of_codes(costs[costs != 0]).sum()), int(np.count_nonzero(costs == 0)),
        wanted - free - len(evicted), setting.from_others,
    )  # fmt: skip


class _Leaves:
    """Leaf lists as a pool has them, by queue: the heads are compared, and the one that is worth least goes."""

    def __init__(self, setting: Setting, costs: list[float]) -> None:
        self._setting = setting
        self._costs = costs
        self._bonus = setting.bonus.tolist()
        self._usual = 2.0 ** ((setting.usual_cost - 40 * 1024) / 1024.0)
        self._lists: dict[int, list[tuple[float, int]]] = {}

    def add(self, at: int, queue: int, rank: float) -> None:
        """One more."""
        heappush(self._lists.setdefault(queue, []), (rank, at))

    def next(self) -> int | None:
        """The one that goes, which is a leaf no more; None: there is none."""
        heads = [(self._worth(queue, *leaves[0]), queue) for queue, leaves in self._lists.items() if leaves]
        return heappop(self._lists[min(heads)[1]])[1] if heads else None

    def _worth(self, queue: int, rank: float, at: int) -> tuple[float, float]:
        """And what decides among equals."""
        setting = self._setting
        if queue >= blocks.QUEUES:
            return 0.0, rank
        if setting.rule == blocks.DENSITY:
            cost = self._costs[at] or self._usual
            return float(setting.index[queue, _age_bin(setting.now - rank)]) * cost, rank
        if setting.rule in _QUEUED:
            return float(queue), rank
        return rank + self._bonus[queue], rank


def _age_bin(age_ns: float) -> int:
    """As `blocks._age_bin`."""
    age = age_ns * 4e-9
    return min(blocks.AGES - 1, int(2.0 * np.log2(age))) if age > 1.0 else 0
