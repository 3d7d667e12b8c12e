"""Which rule each pool evicts by: one for each tier, and another for a tenant that was given one. Owner thread."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from kvproto.limits import POOLS
from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.policy import Rule, set_rule

if TYPE_CHECKING:
    from kvstore.sessions import Pool, Tenant

STEP_ROWS = 64  # looked at for one step of a job


class Tier(StrEnum):
    """Where a pool lies."""

    DRAM = "dram"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for tenants that were given nothing else."""

    dram: Rule = Rule.LRU
    disk: Rule = Rule.LRU


@dataclass(frozen=True, slots=True)
class Chosen:
    """A rule that somebody chose. `tenant` None: for all that have none of their own."""

    tier: Tier
    tenant: str | None
    rule: Rule


class Policies:
    """What was chosen, and the pools that go by it."""

    def __init__(self, tables: Tables, rules: Rules) -> None:
        self._tables = tables
        self._common = {Tier.DRAM: rules.dram, Tier.DISK: rules.disk}
        self._own: dict[tuple[Tier, str], Rule] = {}

    def begin(self, pool: "Pool") -> None:
        """A pool is new."""
        set_rule(self._tables, pool.number, self.rule_of(_tier_of(pool), pool.tenant))

    def rule_of(self, tier: Tier, tenant: "Tenant") -> Rule:
        """What a tenant's blocks are evicted by."""
        return self._own.get((tier, tenant.name), self._common[tier])

    def choose(self, chosen: Chosen, pools: Iterable["Pool"]) -> "list[Requeue]":
        """Have pools go by another rule from now on. Returns the work that puts their blocks in order."""
        if chosen.tenant is None:
            self._common[chosen.tier] = chosen.rule
        else:
            self._own[chosen.tier, chosen.tenant] = chosen.rule
        work: list[Requeue] = []
        for pool in pools:
            mine = _tier_of(pool) is chosen.tier and chosen.tenant in (None, pool.tenant.name)
            if mine and (chosen.tenant or (chosen.tier, pool.tenant.name) not in self._own):
                set_rule(self._tables, pool.number, chosen.rule)
                work.append(Requeue(self._tables, pool.number))
        return work

    def chosen(self) -> list[Chosen]:
        """All choices, the common ones first."""
        common = [Chosen(tier, None, rule) for tier, rule in self._common.items()]
        return common + [Chosen(tier, tenant, rule) for (tier, tenant), rule in self._own.items()]


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


def _tier_of(pool: "Pool") -> Tier:
    return Tier.DRAM if pool.number < POOLS else Tier.DISK
