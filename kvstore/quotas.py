"""What each tenant is promised of memory and disk, and the most that it may have. Owner thread.

What a tenant has of a tier is counted in whole arenas (on disk, segments): memory changes hands by these alone.

    0 .............. guaranteed ..................... maximum
      nobody else      it may have as long as nobody    is never given
      can take         asks who has less above what
                       is guaranteed to him

Who is told nothing else is guaranteed an equal share of what the others were not promised by name, and has no maximum.
A promise is kept at allocation, like all that is decided about room (`room.py`, `tier/segments.py`): until a tenant
wants what is guaranteed to it, others may use that too, and are made to give it back then.

Without numba, so that a configuration can be checked without waiting for it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from kvproto.sizes import format_bytes
from kvstore.classes import PIN_TTL_S_MAX, PIN_TTL_S_MIN, UNUSED_TTL_S_MAX, UNUSED_TTL_S_MIN, PinClass, Terms
from kvstore.rules import Tier

if TYPE_CHECKING:
    from kvstore.sessions import Tenant

PIN_SHARE: Final = 0.5
HBM: Final = "hbm"  # of each GPU; a tier without rules of its own, so `Tier` does not have it
HBM_ARENA_BYTES: Final = 16 << 20
TierName: TypeAlias = Tier | Literal["hbm"]
IN_FLIGHT_MAX: Final = 1 << 20  # of one tenant: far above what all of its sessions may have
BYTES_MAX: Final = 1 << 62  # no tier is as large
_ROUNDING: Final = 1e-9  # of sums of shares


@dataclass(frozen=True, slots=True)
class Quota:
    """One tenant's. None: nothing was said, which is an equal share, no maximum."""

    dram_guaranteed_bytes: int | None = None
    dram_max_bytes: int | None = None
    disk_guaranteed_bytes: int | None = None
    disk_max_bytes: int | None = None
    pin_share: float = PIN_SHARE  # of its memory that pins may hold, 0 to 1
    in_flight: int | None = None  # tickets, and LEASEs that wait, at a time
    pin_5m_ttl_s: float | None = None  # by class (`classes.py`): longest time, and share that it is sure of
    pin_5m_share: float | None = None
    pin_1h_ttl_s: float | None = None
    pin_1h_share: float | None = None
    pin_tool_ttl_s: float | None = None
    pin_tool_share: float | None = None
    unused_ttl_s: float | None = None  # what is not pinned is dropped once nobody has used it for so long
    hbm_guaranteed_bytes: int | None = None  # of each GPU
    hbm_max_bytes: int | None = None

    def guaranteed_bytes(self, tier: TierName) -> int | None:
        """Promised by name, before it is rounded down to whole arenas."""
        found: int | None = getattr(self, f"{tier}_guaranteed_bytes")
        return found

    def max_bytes(self, tier: TierName) -> int | None:
        """At most, before it is rounded down to whole arenas."""
        found: int | None = getattr(self, f"{tier}_max_bytes")
        return found

    def terms(self, kind: PinClass) -> Terms:
        """What is said of a class of pins."""
        if kind is PinClass.SHORT:
            return Terms(self.pin_5m_ttl_s, self.pin_5m_share)
        if kind is PinClass.LONG:
            return Terms(self.pin_1h_ttl_s, self.pin_1h_share)
        return Terms(self.pin_tool_ttl_s, self.pin_tool_share)


USUAL: Final = Quota()
# What was chosen at run time, by field of `Quota`; of a field that is not in it the configuration speaks.
Choice: TypeAlias = Mapping[str, int | float | None]


class QuotaError(ValueError):
    """A quota that cannot be. `tenant` and `field` (of `Quota`) name the value to blame; the text says why."""

    def __init__(self, tenant: str, field: str, reason: str) -> None:
        super().__init__(reason)
        self.tenant = tenant
        self.field = field


@dataclass(frozen=True, slots=True)
class Capacity:
    """A tier: how many arenas (segments) there may be, and the bytes of each. No units: there is no such tier."""

    tier: TierName
    unit_bytes: int
    units: int

    @property
    def unit(self) -> str:
        """What a whole one is called."""
        return "segment" if self.tier is Tier.DISK else "arena"


def check_quotas(quotas: Mapping[str, Quota], capacities: Iterable[Capacity]) -> None:
    """Can all of this be kept at a time? Raises QuotaError at the first value that cannot."""
    for name, quota in quotas.items():
        check_numbers(name, quota)
        _check_shares(name, quota)
    for capacity in capacities:
        left = capacity.units
        for name, quota in quotas.items():
            promised = _check_bounds(name, quota, capacity)
            if promised > left:
                of_all = f"{left} of {capacity.units} {capacity.unit}s of {format_bytes(capacity.unit_bytes)}"
                reason = f"is more than the tier has left beside the guarantees of others: {of_all}"
                raise QuotaError(name, f"{capacity.tier}_guaranteed_bytes", reason)
            left -= promised


def check_numbers(name: str, quota: Quota) -> None:
    """Are these numbers that any daemon could take? Raises QuotaError."""
    if not 0.0 <= quota.pin_share <= 1.0:
        raise QuotaError(name, "pin_share", "a share is from 0 to 1")
    if quota.in_flight is not None and not 1 <= quota.in_flight <= IN_FLIGHT_MAX:
        raise QuotaError(name, "in_flight", f"must be from 1 to {IN_FLIGHT_MAX}")
    tiers: tuple[TierName, ...] = (*Tier, HBM)
    for tier in tiers:
        for which, size_bytes in (("guaranteed", quota.guaranteed_bytes(tier)), ("max", quota.max_bytes(tier))):
            if size_bytes is not None and not 0 <= size_bytes <= BYTES_MAX:
                raise QuotaError(name, f"{tier}_{which}_bytes", f"must be from 0 to {format_bytes(BYTES_MAX)}")
    for kind in PinClass:
        terms = quota.terms(kind)
        if terms.share is not None and not 0.0 <= terms.share <= 1.0:
            raise QuotaError(name, f"pin_{kind}_share", "a share is from 0 to 1")
        if terms.ttl_s is not None and not PIN_TTL_S_MIN <= terms.ttl_s <= PIN_TTL_S_MAX:
            raise QuotaError(name, f"pin_{kind}_ttl_s", f"must be from {PIN_TTL_S_MIN:g} to {PIN_TTL_S_MAX:g} seconds")
    unused_s = quota.unused_ttl_s
    if unused_s is not None and not UNUSED_TTL_S_MIN <= unused_s <= UNUSED_TTL_S_MAX:
        reason = f"must be from {UNUSED_TTL_S_MIN:g} to {UNUSED_TTL_S_MAX:g} seconds"
        raise QuotaError(name, "unused_ttl_s", reason)


def _check_shares(name: str, quota: Quota) -> None:
    """What classes of pins are sure of must be there for all of them at a time. Raises QuotaError."""
    left = quota.pin_share
    for kind in PinClass:
        share = quota.terms(kind).share or 0.0
        if share > left + _ROUNDING:
            reason = f"is more than pin_share, {quota.pin_share:g}, leaves beside the other classes"
            raise QuotaError(name, f"pin_{kind}_share", reason)
        left -= share


def _check_bounds(name: str, quota: Quota, capacity: Capacity) -> int:
    """One tenant in one tier. Returns how many units are promised to it by name. Raises QuotaError."""
    tier, unit_bytes = capacity.tier, capacity.unit_bytes
    guaranteed_bytes, max_bytes = quota.guaranteed_bytes(tier), quota.max_bytes(tier)
    if not capacity.units:
        if guaranteed_bytes:
            raise QuotaError(name, f"{tier}_guaranteed_bytes", f"there is no {tier} tier to guarantee anything of")
        return 0
    if max_bytes is not None and 0 < max_bytes < unit_bytes:
        reason = f"does not hold one {capacity.unit} of {format_bytes(unit_bytes)}; say 0 where nothing is allowed"
        raise QuotaError(name, f"{tier}_max_bytes", reason)
    if max_bytes is not None and guaranteed_bytes is not None and max_bytes < guaranteed_bytes:
        reason = f"is less than the {format_bytes(guaranteed_bytes)} that are guaranteed"
        raise QuotaError(name, f"{tier}_max_bytes", reason)
    return 0 if guaranteed_bytes is None else guaranteed_bytes // unit_bytes


@dataclass(slots=True)
class Shares:
    """One tier, in whole units. `held` is how many a tenant has of them now."""

    capacity: Capacity
    held: "Callable[[Tenant], int]"
    tenants: "list[Tenant]" = field(default_factory=list)
    _promised: dict[str, int] = field(default_factory=dict)  # by name
    _most: dict[str, int] = field(default_factory=dict)
    _left: int = 0  # promised to nobody by name

    def renew(self, quotas: Mapping[str, Quota]) -> None:
        """These hold from now on."""
        tier, unit_bytes, units = self.capacity.tier, max(self.capacity.unit_bytes, 1), self.capacity.units
        guaranteed = {name: quota.guaranteed_bytes(tier) for name, quota in quotas.items()}
        most = {name: quota.max_bytes(tier) for name, quota in quotas.items()}
        self._promised = {name: size // unit_bytes for name, size in guaranteed.items() if size is not None}
        self._most = {name: min(size // unit_bytes, units) for name, size in most.items() if size is not None}
        self._left = max(0, units - sum(self._promised.values()))

    def most(self, tenant: "Tenant") -> int:
        """How many it may have."""
        return self._most.get(tenant.name, self.capacity.units)

    def has_maximum(self, tenant: "Tenant") -> bool:
        """Is that less than all there are?"""
        return tenant.name in self._most

    def guaranteed(self, tenant: "Tenant") -> int:
        """How many nobody can take from it. Of who was promised none by name this changes as tenants come and go."""
        return self._guaranteed(tenant, self._equal_share(self._active(tenant)))

    def guaranteed_bytes(self, name: str) -> int:
        """What is guaranteed to a tenant of that name, or would be if it came now."""
        tenant = next((one for one in self.tenants if one.name == name), None)
        if tenant is not None:
            units = self.guaranteed(tenant)
        elif name in self._promised:
            units = self._promised[name]
        else:
            active = sum(
                one.name not in self._promised and bool(one.sessions or self.held(one)) for one in self.tenants
            )
            units = min(self._left // (active + 1), self._most.get(name, self.capacity.units))
        return units * self.capacity.unit_bytes

    def max_bytes(self, name: str) -> int | None:
        """The most that a tenant of that name may have; None: no maximum."""
        most = self._most.get(name)
        return None if most is None else most * self.capacity.unit_bytes

    def giving_way(self, asking: "Tenant", charged: "Callable[[Tenant], int]") -> "Tenant | None":
        """Who is to give one of its own to a tenant that may have more; None: whoever asks must do with what it has.

        That is who is furthest above what is guaranteed to it; a tenant above its maximum comes before all others. It
        must be two further above than who asks: one unit then brings them nearer to each other, and never changes
        hands to and fro. `charged` is what counts against a tenant: at least what it has.
        """
        active = self._active(asking)
        if len(active) < 2:
            return None
        equal = self._equal_share(active)
        mine = charged(asking) - self._guaranteed(asking, equal)
        best: tuple[bool, int] = (False, max(mine + 1, 0))
        found = None
        for tenant in active:
            if tenant is asking or not self.held(tenant):
                continue
            counted = charged(tenant)
            above, excess = counted - self._guaranteed(tenant, equal), counted > self.most(tenant)
            if (excess, above) > best:
                best, found = (excess, above), tenant
        return found

    def _active(self, asking: "Tenant") -> "list[Tenant]":
        """Those who may want some of the tier."""
        return [one for one in self.tenants if one.sessions or self.held(one) or one is asking]

    def _equal_share(self, active: "list[Tenant]") -> int:
        others = sum(tenant.name not in self._promised for tenant in active)
        return self._left // max(others, 1)

    def _guaranteed(self, tenant: "Tenant", equal: int) -> int:
        return self._promised.get(tenant.name, min(equal, self.most(tenant)))


class Quotas:
    """What is configured, what was chosen at run time, and what follows from both in each tier.

    A choice is of single fields of one tenant: these stand in place of what the configuration says of them, here and in
    successors that start warm (`registry.py` journals it), and all others follow the configuration.
    """

    def __init__(
        self, dram: Capacity, disk: Capacity, configured: Mapping[str, Quota], hbm: Capacity | None = None
    ) -> None:
        """`configured` is what `check_quotas` finds nothing against. `hbm`: of each GPU; None: there is none."""
        self.tenants: list[Tenant] = []
        self.capacities = (dram, disk, hbm or Capacity(HBM, 1, 0))
        self._hbm: list[Shares] = []
        self.dram = Shares(dram, lambda tenant: tenant.arenas, self.tenants)
        self.disk = Shares(disk, lambda tenant: tenant.segments, self.tenants)
        # Of choices of a former life what does not fit any more, by tenant and field, until it is chosen anew.
        self.forgotten: tuple[tuple[str, str], ...] = ()
        self._configured = dict(configured)
        self._chosen: dict[str, dict[str, int | float | None]] = {}
        self._renew()

    def share_hbm(self, shares: Shares) -> None:
        """Quotas hold for one GPU's memory, too."""
        shares.tenants = self.tenants
        self._hbm.append(shares)
        self._renew()

    def begin(self, tenant: "Tenant") -> None:
        """A tenant is new."""
        tenant.quota = self.of(tenant.name)
        self.tenants.append(tenant)

    def end(self, tenant: "Tenant") -> None:
        """A tenant that has nothing is not known any more. What was chosen for its name stays."""
        self.tenants.remove(tenant)

    def of(self, name: str) -> Quota:
        """What holds for a tenant, by its name."""
        return self._with(name, self._chosen.get(name, {}))

    def of_all(self) -> Iterable[Quota]:
        """All that anybody said: configured and not chosen otherwise, or chosen."""
        return self._everybody(self._chosen).values()

    def configured(self, name: str) -> Quota:
        """What the configuration says of a tenant."""
        return self._configured.get(name, USUAL)

    def chosen_of(self, name: str) -> Choice:
        """What was chosen for a tenant at run time; empty: nothing."""
        return dict(self._chosen.get(name, {}))

    def chosen(self) -> list[tuple[str, Choice]]:
        """All choices."""
        return [(name, dict(choice)) for name, choice in self._chosen.items()]

    def check(self, name: str, choice: Choice) -> None:
        """Could this be chosen, beside what holds for all others? Raises QuotaError."""
        wanted = self._everybody(self._chosen)
        wanted.pop(name, None)
        check_quotas({**wanted, name: self._with(name, choice)}, self.capacities)

    def choose(self, name: str, choice: Choice) -> None:
        """From now on; empty: what the configuration says. Raises QuotaError and changes nothing."""
        self.check(name, choice)
        self.restore(name, choice)
        self.forgotten = tuple(one for one in self.forgotten if one[0] != name)
        self._renew()

    @contextmanager
    def as_if(self, name: str, choice: Choice) -> Iterator[None]:
        """Inside, a choice holds, as far as anybody looks: nothing happens by it until somebody allocates. Raises
        QuotaError.
        """
        self.check(name, choice)
        really, self._chosen = self._chosen, {**self._chosen, name: dict(choice)}
        self._renew()
        try:
            yield
        finally:
            self._chosen = really
            self._renew()

    def restore(self, name: str, choice: Choice) -> None:
        """A choice of a former life. It holds once `settle` has looked at all of them."""
        self._chosen.pop(name, None)
        if choice:
            self._chosen[name] = dict(choice)

    def _with(self, name: str, choice: Choice) -> Quota:
        return replace(self._configured.get(name, USUAL), **choice)  # type: ignore[arg-type]  # each is of its field's type

    def _everybody(self, chosen: Mapping[str, Choice]) -> dict[str, Quota]:
        return self._configured | {name: self._with(name, choice) for name, choice in chosen.items()}

    def settle(self) -> None:
        """All choices of the former life are known: they hold but for what another configuration leaves no room for.

        Of guarantees that are too much together that goes which was chosen last, until the rest fits.
        """
        while (error := self._misfit()) is not None:
            name, gone = self._to_blame(error)
            for one in gone:
                del self._chosen[name][one]
            if not self._chosen[name]:
                del self._chosen[name]
            self.forgotten += tuple((name, one) for one in gone)
        self._renew()

    def _misfit(self) -> QuotaError | None:
        """What is wrong with all that holds now."""
        try:
            check_quotas(self._everybody(self._chosen), self.capacities)
        except QuotaError as error:
            return error
        return None

    def _to_blame(self, error: QuotaError) -> tuple[str, tuple[str, ...]]:
        """Which fields of whose choice are to go. What is configured fits, so that some choice is to blame.

        A guarantee that is too much beside others: of those above what is configured the one that was chosen last. What
        does not fit the rest of one tenant's quota: its chosen guarantee, else its maximum; its chosen share, else what
        it is a share of.
        """
        promised = error.field.replace("_max_bytes", "_guaranteed_bytes")
        if error.field.endswith("_guaranteed_bytes"):
            for name, choice in reversed(self._chosen.items()):
                if (choice.get(promised) or 0) > (getattr(self.configured(name), promised) or 0):
                    return name, (promised,)
        choice = self._chosen.get(error.tenant, {})
        shares = (*(f"pin_{kind}_share" for kind in PinClass), "pin_share") if error.field.endswith("_share") else ()
        for one in (promised, error.field, *shares):
            if choice.get(one) is not None:
                return error.tenant, (one,)
        name = error.tenant if choice else next(reversed(self._chosen))
        return name, tuple(self._chosen[name])

    def hbm_guaranteed_bytes(self, name: str) -> int:
        """What is guaranteed to a tenant of that name of each GPU; 0 where there is no such tier."""
        return min((shares.guaranteed_bytes(name) for shares in self._hbm), default=0)

    def memory_bytes(self, tenant: "Tenant") -> int:
        """DRAM that a tenant can count on: what is guaranteed to it, or what it has if that is more. A few
        microseconds.
        """
        units = max(self.dram.guaranteed(tenant), min(tenant.arenas, self.dram.most(tenant)))
        return units * self.dram.capacity.unit_bytes

    def pin_budget_bytes(self, tenant: "Tenant") -> int:
        """Bytes of DRAM that a tenant's pins may hold: its pin share of `memory_bytes`.

        What is above the guarantee can be taken away at any time; from then on the budget is smaller.
        """
        return int(tenant.quota.pin_share * self.memory_bytes(tenant))

    def class_bytes(self, tenant: "Tenant", kind: PinClass) -> int:
        """Bytes of DRAM that one class of a tenant's pins is sure of: its share of `memory_bytes`."""
        share = tenant.quota.terms(kind).share
        return int(share * self.memory_bytes(tenant)) if share else 0

    def _renew(self) -> None:
        everybody = self._everybody(self._chosen)
        for shares in (self.dram, self.disk, *self._hbm):
            shares.renew(everybody)
        for tenant in self.tenants:
            tenant.quota = self.of(tenant.name)


_IN_ORDER: Final = (6, 13)  # fields that a choice had when it was of all: before there were classes, and since
_NAMES: Final = tuple(one.name for one in fields(Quota))
_WHOLE: Final = frozenset(name for name in _NAMES if name.endswith("_bytes") or name == "in_flight")


def choice_as_record(name: str, choice: Choice) -> list[int | str]:
    """What the journal says of a choice: a text `field=value` each, no value for what is as if nothing were said. A
    choice that is over has none.
    """
    return ["quota", name, *(f"{one}={'' if value is None else value}" for one, value in choice.items())]


def choice_of_record(rest: "list[int | str]") -> tuple[str, Choice]:
    """The same backwards, without the first word. Raises ValueError for what no daemon has written."""
    name, *texts = map(str, rest)
    if texts and "=" not in texts[0]:  # until 0.1.0 a choice was of all fields, in their order
        if len(texts) not in _IN_ORDER:
            raise ValueError("a quota of another version")
        texts = [f"{one}={text}" for one, text in zip(_NAMES, texts, strict=False)]
    choice: dict[str, int | float | None] = {}
    for text in texts:
        field_name, _, value = text.partition("=")
        if field_name not in _NAMES:
            raise ValueError("a quota of another version")
        usual = getattr(USUAL, field_name)
        choice[field_name] = (int(value) if field_name in _WHOLE else float(value)) if value else usual
    check_numbers(name, replace(USUAL, **choice))  # type: ignore[arg-type]  # each is of its field's type
    return name, choice
