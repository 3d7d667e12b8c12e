"""Quotas in the simulation: chosen at random, and whoever gives way or gets more is held against them.

What is guaranteed is worked out here anew, from what was chosen and nothing else.
"""

from collections.abc import Callable
from dataclasses import asdict
from random import Random

from kvproto.limits import PAGE_BYTES
from kvstore.quotas import Choice, Quota, QuotaError
from kvstore.rules import Tier
from kvstore.sessions import Pool, Tenant
from tests.core import Core
from tests.sim.actor import Seen


def shares_fit(quota: Quota) -> bool:
    """Is what classes of pins are sure of no more than may be pinned?"""
    shares = (quota.pin_5m_share, quota.pin_1h_share, quota.pin_tool_share)
    return sum(share or 0.0 for share in shares) <= quota.pin_share


class QuotaEvents:
    """What an operator does to quotas, and a watch on what memory and disk do about them."""

    def __init__(self, rng: Random, seen: Seen) -> None:
        self._rng = rng
        self._seen = seen
        self._core: Core
        self._choices: dict[str, Choice] = {}
        self._chosen: dict[str, Quota] = {}  # what they come to

    def attach(self, core: Core, *, warm: bool) -> None:
        """A store begins its life: with the choices of the one before, if it has its memory."""
        self._core = core
        if not warm:
            self._choices.clear()
            self._chosen.clear()
        assert dict(core.store.quotas.chosen()) == self._choices, "a choice of a quota is lost, or came from nowhere"
        self._watch_memory()
        self._watch_disk()

    def choose(self, tenants: tuple[str, ...]) -> None:
        """An operator changes a quota; more than there is, is refused and changes nothing."""
        rng, store = self._rng, self._core.store
        name = rng.choice(tenants)
        choice: Choice = {} if rng.random() < 0.2 else self._random()
        quota = Quota(**choice)  # type: ignore[arg-type]  # nothing is configured
        wanted = {key: value for key, value in self._chosen.items() if key != name}
        if choice:
            wanted[name] = quota
        fits = all(self._fits(tier, wanted) for tier in Tier) and shares_fit(quota)
        try:
            store.choose_quota(name, choice)
        except QuotaError:
            assert not fits, f"{choice} was refused to {name}"
        else:
            assert fits, f"{choice} of {name} cannot be, beside {self._choices}"
            self._chosen = wanted
            self._choices = {key: value for key, value in self._choices.items() if key != name}
            self._choices |= {name: choice} if choice else {}
            self._seen.quotas += 1
        assert dict(store.quotas.chosen()) == self._choices, "something else was chosen"

    def lift(self) -> None:
        """No tenant has a quota of its own any more."""
        for name in list(self._chosen):
            self._core.store.choose_quota(name, {})
        self._choices.clear()
        self._chosen.clear()

    def _random(self) -> Choice:
        limits, rng = self._core.store.limits, self._rng
        dram, disk = limits.dram_bytes, limits.disk.disk_bytes

        def some(size_bytes: int) -> int | None:
            return None if rng.random() < 0.5 else rng.randrange(size_bytes + 1)

        def share() -> float | None:
            return None if rng.random() < 0.6 else rng.random() / 2

        def seconds() -> float | None:
            return None if rng.random() < 0.6 else 1.0 + 30.0 * rng.random()

        quota = Quota(
            some(dram), some(dram), some(disk), some(disk), rng.random(), rng.choice((None, 2, 30)),
            seconds(), share(), seconds(), share(), seconds(), share(), rng.choice((None, None, 60.0)),
        )  # fmt: skip
        named = rng.random() < 0.5  # only some of it
        return {key: value for key, value in asdict(quota).items() if not named or rng.random() < 0.4}

    def _fits(self, tier: Tier, quotas: dict[str, Quota]) -> bool:
        unit_bytes, units = self._tier(tier)
        for quota in quotas.values():
            low, high = quota.guaranteed_bytes(tier), quota.max_bytes(tier)
            if units and high is not None and (0 < high < unit_bytes or (low is not None and high < low)):
                return False
            if not units and low:
                return False
        return sum(self._named(tier, quota) or 0 for quota in quotas.values()) <= units

    def _tier(self, tier: Tier) -> tuple[int, int]:
        limits = self._core.store.limits
        if tier is Tier.DRAM:
            return limits.arena_bytes, limits.positions
        return max(limits.disk.segment_bytes, PAGE_BYTES), limits.disk.segments

    def _named(self, tier: Tier, quota: Quota) -> int | None:
        size_bytes = quota.guaranteed_bytes(tier)
        return None if size_bytes is None else size_bytes // self._tier(tier)[0]

    def _guaranteed(self, tier: Tier, owner: Tenant, asking: Tenant, held: Callable[[Tenant], int]) -> int:
        """How many arenas or segments of a tenant are safe from another one."""
        named = {name: count for name, one in self._chosen.items() if (count := self._named(tier, one)) is not None}
        if owner.name in named:
            return named[owner.name]
        tenants = self._core.store.tenants.values()
        others = [one for one in tenants if one.sessions or held(one) or one is asking]
        share = (self._tier(tier)[1] - sum(named.values())) // sum(one.name not in named for one in others)
        return min(share, self._most(tier, owner))

    def _most(self, tier: Tier, tenant: Tenant) -> int:
        unit_bytes, units = self._tier(tier)
        quota = self._chosen.get(tenant.name)
        size_bytes = quota.max_bytes(tier) if quota else None
        return units if size_bytes is None else min(units, size_bytes // unit_bytes)

    def _watch_memory(self) -> None:
        arenas = self._core.store.arenas
        drain, grow = arenas.drain, arenas.grow

        def watched_drain(position: int, wanted_by: Pool | None) -> None:
            row = arenas._tables.arenas[position]
            owner = arenas.pools[int(row["pool"]) - 1].tenant
            if wanted_by is None:
                assert owner.arenas > self._most(Tier.DRAM, owner), f"{owner.name} gave an arena to nobody"
                self._seen.returned_arenas += 1
            elif wanted_by.tenant is not owner:
                most = self._most(Tier.DRAM, wanted_by.tenant)
                assert arenas.charged(wanted_by.tenant) < most, f"{wanted_by.tenant.name} gets more than it may have"
                if int(row["used"]):
                    safe = self._guaranteed(Tier.DRAM, owner, wanted_by.tenant, lambda one: one.arenas)
                    assert arenas.charged(owner) > safe, f"{owner.name} lost an arena of {safe} that are guaranteed"
            drain(position, wanted_by)

        def watched_grow(pool: Pool, now_ns: int) -> bool:
            grown = grow(pool, now_ns)
            more = grown and pool.tenant.arenas > self._most(Tier.DRAM, pool.tenant)
            assert not more, f"{pool.tenant.name} has more arenas than it may have"
            return grown

        arenas.drain, arenas.grow = watched_drain, watched_grow  # type: ignore[method-assign]

    def _watch_disk(self) -> None:
        segments = self._core.store.disk.segments
        drain, begin = segments.drain, segments._begin

        def watched_drain(position: int, wanted_by: Tenant | None = None) -> None:
            pool = int(segments._tables.arenas[position]["pool"]) - 1
            owner = self._core.store.arenas.by_number[pool].tenant
            if wanted_by is not None and wanted_by is not owner:
                safe = self._guaranteed(Tier.DISK, owner, wanted_by, lambda one: one.segments)
                assert segments._charged(owner) > safe, f"{owner.name} lost one of {safe} segments"
            drain(position, wanted_by)

        def watched_begin(pool: Pool, now_ns: int) -> bool:
            begun = begin(pool, now_ns)
            charged = segments._charged(pool.tenant)
            more = begun and charged > self._most(Tier.DISK, pool.tenant)
            assert not more, f"{pool.tenant.name} has more segments than it may have"
            return begun

        segments.drain, segments._begin = watched_drain, watched_begin  # type: ignore[method-assign]
