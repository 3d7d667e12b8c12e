"""Which rule each pool evicts by: one for each tier, and another for a tenant that was given one. Owner thread."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvproto.limits import POOLS
from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.policy import set_rule
from kvstore.rules import Chosen, Rule, Rules, Tier

if TYPE_CHECKING:
    from kvstore.sessions import Pool

__all__ = ["Chosen", "Policies", "Requeue", "Rule", "Rules", "Tier", "tier_of"]

STEP_ROWS = 64  # looked at for one step of a job


class Policies:
    """What is configured, what was chosen at run time, and the pools that go by it.

    A choice wins over the configuration, here and in successors that start warm (`registry.py` journals it). A tenant's
    own choice wins over the one for all.
    """

    def __init__(self, tables: Tables, rules: Rules) -> None:
        self._tables = tables
        self._configured = {Tier.DRAM: rules.dram, Tier.DISK: rules.disk}
        self._chosen: dict[tuple[Tier, str | None], Rule] = {}

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
        work: list[Requeue] = []
        for pool in self.concerned(chosen.tier, chosen.tenant, pools):
            set_rule(self._tables, pool.number, chosen.rule)
            work.append(Requeue(self._tables, pool.number))
        return work

    def reset(self, tier: Tier, tenant: str | None, pools: Iterable["Pool"]) -> "list[Requeue]":
        """Forget a choice: pools go by what else holds for them from now on. Work as of `choose`."""
        work: list[Requeue] = []
        if self._chosen.pop((tier, tenant), None) is not None:
            for pool in self.concerned(tier, tenant, pools):
                set_rule(self._tables, pool.number, self.rule_of(tier, pool.tenant.name))
                work.append(Requeue(self._tables, pool.number))
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
    """Puts the blocks of a pool where its new rule wants them (kvstore/sweeps.py, Job)."""

    __slots__ = ("_tables", "_pool", "_row")

    def __init__(self, tables: Tables, pool: int) -> None:
        self._tables = tables
        self._pool = pool
        self._row = 1

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job. Blocks that come meanwhile know the new rule."""
        unused = int(self._tables.book[blocks.UNUSED_ROW])
        stop = min(unused, self._row + steps * STEP_ROWS)
        blocks.requeue_rows(self._tables, self._row, stop, self._pool)
        steps -= -(-(stop - self._row) // STEP_ROWS)
        self._row = stop
        return steps, stop >= unused


def tier_of(pool: "Pool") -> Tier:
    """By its number."""
    return Tier.DRAM if pool.number < POOLS else Tier.DISK
