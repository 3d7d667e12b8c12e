"""Which rule each pool evicts by: one for each tier, and another for a tenant that was given one. Owner thread."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvproto.limits import POOLS
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.policy import goes_by, set_rule
from kvstore.rules import Chosen, Rule, Rules, Tier

if TYPE_CHECKING:
    from kvstore.sessions import Pool

__all__ = ["Chosen", "Policies", "Requeue", "Rule", "Rules", "Tier", "tier_of"]

_TURNS: Final = (1 << 32) - 1


class _Runs(NamedTuple):
    """Sorted runs of leaves, as `blocks.requeue_leaves` takes them."""

    at: U4
    ends: U4
    heap: U4
    last: U4


class Policies:
    """What is configured, what was chosen at run time, and the pools that go by it.

    A choice wins over the configuration, here and in successors that start warm (`registry.py` journals it). A tenant's
    own choice wins over the one for all.
    """

    def __init__(self, tables: Tables, rules: Rules) -> None:
        self._tables = tables
        self._configured = {Tier.DRAM: rules.dram, Tier.DISK: rules.disk}
        self._chosen: dict[tuple[Tier, str | None], Rule] = {}
        self._turn = 0  # of the last pool whose rule was changed

    def begin(self, pool: "Pool") -> None:
        """A pool is new."""
        set_rule(self._tables, pool.number, self.rule_of(tier_of(pool), pool.tenant.name))

    def rule_of(self, tier: Tier, tenant: str | None) -> Rule:
        """What a tenant's blocks are evicted by; None: those of all that have no rule of their own."""
        common = self._chosen.get((tier, None), self._configured[tier])
        return self._chosen.get((tier, tenant), common)

    def configured(self, tier: Tier) -> Rule:
        """What the configuration says."""
        return self._configured[tier]

    def is_own(self, tier: Tier, tenant: str | None) -> bool:
        """Was it chosen for just that?"""
        return (tier, tenant) in self._chosen

    def choose(self, chosen: Chosen, pools: Iterable["Pool"]) -> "list[Requeue]":
        """Have pools go by another rule from now on. Returns the work that puts their blocks in order."""
        self._chosen[chosen.tier, chosen.tenant] = chosen.rule
        return self._change(self.concerned(chosen.tier, chosen.tenant, pools))

    def reset(self, tier: Tier, tenant: str | None, pools: Iterable["Pool"]) -> "list[Requeue]":
        """Forget a choice: pools go by what else holds for them from now on. Work as of `choose`."""
        if self._chosen.pop((tier, tenant), None) is None:
            return []
        return self._change(self.concerned(tier, tenant, pools))

    def _change(self, pools: Iterable["Pool"]) -> "list[Requeue]":
        """Pools go by what now holds for them: those that do already are left alone."""
        work: list[Requeue] = []
        for pool in pools:
            number, rule = pool.number, self.rule_of(tier_of(pool), pool.tenant.name)
            if goes_by(self._tables, number, rule):
                continue
            set_rule(self._tables, number, rule)
            if self._tables.pools[number]["blocks"]:
                self._turn = self._turn % _TURNS + 1
                work.append(Requeue(self._tables, number, self._turn))
        return work

    def concerned(self, tier: Tier, tenant: str | None, pools: Iterable["Pool"]) -> "Iterator[Pool]":
        """The pools that a choice is for: a tenant's, or (None) those of all that have no rule of their own."""
        for pool in pools:
            name = pool.tenant.name
            if tier_of(pool) is tier and (name == tenant or (tenant is None and not self.is_own(tier, name))):
                yield pool

    def chosen(self) -> list[Chosen]:
        """All choices."""
        return [Chosen(tier, tenant, rule) for (tier, tenant), rule in self._chosen.items()]


class Requeue:
    """Puts the blocks of a pool where its new rule wants them (kvstore/sweeps.py, Job).

        rows, a slice at a time --> what is no leaf goes by the new rule at once
                                --> leaves, a sorted run a slice --> one by one, the longest untouched first

    Where leaves lie on their lists says who goes next, and in a long list a leaf only finds its place near either end.
    Moved in that order, each belongs behind the one before it.

    Meanwhile the pool is `moving`, as which turn: of its blocks some have a rank of one rule and some of the other.
    """

    __slots__ = ("_tables", "_pool", "_turn", "_row", "_stop", "_leaves", "_touched", "_ends", "_runs", "_left")

    def __init__(self, tables: Tables, pool: int, turn: int) -> None:
        self._tables = tables
        self._pool = pool
        self._turn = turn
        self._row = 1
        self._stop = int(tables.book[blocks.UNUSED_ROW])  # what comes behind it knows the new rule
        self._leaves: U4 = np.zeros(0, dtype=np.uint32)
        self._touched: U8 = np.zeros(0, dtype=np.uint64)
        self._ends = [0]  # of runs
        self._runs: _Runs | None = None
        self._left = 0  # runs
        tables.pools[pool]["moving"] = turn

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job. It is over at once if the pool's rule has changed again: then another one does it all."""
        pool = self._tables.pools[self._pool]
        if int(pool["moving"]) != self._turn:
            return steps, True
        if self._row < self._stop:
            steps = self._look(steps)
        if self._row < self._stop:
            return 0, False
        steps = self._move(steps)
        if self._left:
            return 0, False
        pool["moving"] = 0
        return max(0, steps), True

    def _look(self, steps: int) -> int:
        """At more rows. Returns the steps left."""
        if not self._leaves.size:
            self._leaves, self._touched = np.zeros(self._stop, np.uint32), np.zeros(self._stop, np.uint64)
        start = self._ends[-1]
        row, left, end = blocks.requeue_rows(
            self._tables, self._row, self._stop, self._pool, steps, self._leaves, self._touched, start
        )
        self._row = int(row)
        if end > start:
            order = np.argsort(self._touched[start:end], kind="stable")
            self._leaves[start:end] = self._leaves[start:end][order]
            self._touched[start:end] = self._touched[start:end][order]
            self._ends.append(int(end))
        return int(left)

    def _move(self, steps: int) -> int:
        """More leaves. Returns the steps left."""
        if self._runs is None:
            ends = np.array(self._ends, dtype=np.uint32)
            self._left = ends.size - 1
            heap = np.argsort(self._touched[ends[:-1]]).astype(np.uint32)
            self._runs = _Runs(ends[:-1].copy(), ends[1:].copy(), heap, np.zeros(blocks.QUEUES, dtype=np.uint32))
        left, steps = blocks.requeue_leaves(
            self._tables, self._pool, self._leaves, self._touched, *self._runs, self._left, steps
        )
        self._left = int(left)
        return int(steps)


def tier_of(pool: "Pool") -> Tier:
    """By its number."""
    return Tier.DRAM if pool.number < POOLS else Tier.DISK
