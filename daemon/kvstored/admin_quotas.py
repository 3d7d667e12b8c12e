"""Quotas as operators see and change them: GetQuotas, SetQuota, and what the owner thread does for them."""

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from kvproto import control_pb2 as pb
from kvstore.quotas import USUAL, Choice, QuotaError, check_numbers
from kvstore.report_quotas import CLASS_FIELDS, QuotaChange, QuotaReport

if TYPE_CHECKING:
    from kvstore.store import Store

__all__ = ["QuotaWish", "key_of", "quota_reports", "quota_warnings", "set_quota", "wish_of"]

log = logging.getLogger(__name__)

_FIELDS: Final = {  # of a SetQuotaRequest, and of `Quota`
    "dram_guaranteed_bytes": "dram_guaranteed_bytes",
    "dram_max_bytes": "dram_max_bytes",
    "disk_guaranteed_bytes": "disk_guaranteed_bytes",
    "disk_max_bytes": "disk_max_bytes",
    "pin_share": "pin_share",
    "in_flight_max": "in_flight",
    **{name: name for name in CLASS_FIELDS},
}
_SURE: Final = ("dram_guaranteed_bytes", "disk_guaranteed_bytes", "hbm_sure_bytes", "pin_budget_bytes")


@dataclass(frozen=True, slots=True)
class QuotaWish:
    """What is to become of a tenant's quota, by field of `Quota`; what is named nowhere stays as it is."""

    tenant: str
    said: Choice
    reset: bool  # first go back to what the configuration says, in all
    unsaid: frozenset[str] = frozenset()  # in these alone

    def on(self, choice: Choice) -> Choice:
        """That choice, changed."""
        stays = {} if self.reset else {name: value for name, value in choice.items() if name not in self.unsaid}
        return {**stays, **self.said}


def wish_of(request: pb.SetQuotaRequest) -> QuotaWish:
    """What a request wants. Raises ValueError for what no daemon could carry out. Any thread."""
    if not request.tenant:
        raise ValueError("a quota is one tenant's: name it")
    said: dict[str, int | float | None] = {
        _FIELDS[name]: getattr(request, name) for name in _FIELDS if request.HasField(name)
    }
    for name in (*request.usual, *request.configured):
        if name not in _FIELDS:
            raise ValueError(f"there is no {name!r} in a quota: it is one of {', '.join(_FIELDS)}")
        if _FIELDS[name] in said:
            raise ValueError(f"{name} cannot be both set and {'usual' if name in request.usual else 'as configured'}")
    said |= {_FIELDS[name]: getattr(USUAL, _FIELDS[name]) for name in request.usual}
    unsaid = frozenset(_FIELDS[name] for name in request.configured)
    if not said and not unsaid and not request.reset:
        raise ValueError("nothing is to be changed: set a field, name it in usual or configured, or reset")
    wish = QuotaWish(request.tenant, said, request.reset, unsaid)
    try:
        check_numbers(request.tenant, replace(USUAL, **wish.said))  # type: ignore[arg-type]  # types are the message's
    except QuotaError as error:
        raise ValueError(f"{key_of(error.field)}: {error}") from None
    return wish


def key_of(field: str) -> str:
    """A field of `Quota` as the configuration and kvctl call it: without its unit."""
    return field.removesuffix("_bytes").removesuffix("_s")


def quota_reports(store: "Store", configured: Collection[str], tenant: str | None) -> tuple[QuotaReport, ...]:
    """One tenant's quota, or (None) those of all that are here or configured, or for whom something was chosen.
    Raises KeyError.
    """
    if tenant is not None:
        _check_known(store, configured, tenant)
        return (_report(store, tenant),)
    chosen = (name for name, _ in store.quotas.chosen())
    return tuple(_report(store, name) for name in sorted({*store.tenants, *configured, *chosen}))


def set_quota(store: "Store", configured: Collection[str], wish: QuotaWish, *, dry_run: bool) -> QuotaChange:
    """Change a tenant's quota, or only say what would change. Raises KeyError, and QuotaError for what cannot be."""
    _check_known(store, configured, wish.tenant)
    quotas = store.quotas
    wanted = wish.on(quotas.chosen_of(wish.tenant))
    former = _report(store, wish.tenant)
    others = [_report(store, name) for name in _others(store, configured, wish.tenant)]
    if dry_run:
        with quotas.as_if(wish.tenant, wanted):
            return QuotaChange(_report(store, wish.tenant), former, _cut(store, others))
    store.choose_quota(wish.tenant, wanted)
    after = _report(store, wish.tenant)
    log.info(
        "quota: tenant=%s dram=%s..%s disk=%s..%s pin_share=%g in_flight=%s classes=%s chosen=%s",
        after.tenant, after.dram_guaranteed_bytes, after.dram_max_bytes, after.disk_guaranteed_bytes,
        after.disk_max_bytes, after.pin_share, after.in_flight_max,
        ",".join(f"{name}:{getattr(after, name)}" for name in CLASS_FIELDS), ",".join(after.chosen_fields) or "no",
    )  # fmt: skip
    return QuotaChange(after, former, _cut(store, others))


def quota_warnings(store: "Store") -> Iterator[str]:
    """What was chosen at run time and does not hold any more."""
    for tenant, field in store.quotas.forgotten:
        remedy = (
            f"`kvctl quota {tenant} set` chooses anew, and `kvctl quota {tenant} reset {key_of(field)}` agrees to it"
        )
        yield f"{key_of(field)} of {tenant} was chosen and is as configured: there is no room for it; {remedy}"


def _others(store: "Store", configured: Collection[str], tenant: str) -> list[str]:
    """All others who are promised something: configured ones, and those who are connected or have something."""
    here = (one.name for one in store.tenants.values() if one.sessions or one.arenas or one.segments)
    return sorted({*configured, *here} - {tenant})


def _cut(store: "Store", former: Collection[QuotaReport]) -> tuple[QuotaChange, ...]:
    """Of tenants that were promised that much, those who are promised less of anything now."""
    pairs = [QuotaChange(_report(store, one.tenant), one) for one in former]
    return tuple(
        pair for pair in pairs if any(getattr(pair.quota, sure) < getattr(pair.former, sure) for sure in _SURE)
    )


def _check_known(store: "Store", configured: Collection[str], tenant: str) -> None:
    if not store.registry.knows(tenant) and tenant not in configured:
        raise KeyError(f"no tenant is called {tenant}")


def _report(store: "Store", name: str) -> QuotaReport:
    quotas, quota, chosen = store.quotas, store.quotas.of(name), store.quotas.chosen_of(name)
    tenant = store.tenants.get(name)
    guaranteed_bytes = quotas.dram.guaranteed_bytes(name)
    budget_bytes = quotas.pin_budget_bytes(tenant) if tenant else int(quota.pin_share * guaranteed_bytes)
    return QuotaReport(
        tenant=name,
        chosen=bool(chosen),
        dram_guaranteed_bytes=guaranteed_bytes,
        dram_asked_bytes=quota.dram_guaranteed_bytes,
        dram_max_bytes=quotas.dram.max_bytes(name),
        disk_guaranteed_bytes=quotas.disk.guaranteed_bytes(name),
        disk_asked_bytes=quota.disk_guaranteed_bytes,
        disk_max_bytes=quotas.disk.max_bytes(name),
        pin_share=quota.pin_share,
        pin_budget_bytes=budget_bytes,
        in_flight_max=quota.in_flight,
        dram_max_asked_bytes=quota.dram_max_bytes,
        disk_max_asked_bytes=quota.disk_max_bytes,
        **{name: getattr(quota, name) for name in CLASS_FIELDS},
        chosen_fields=tuple(said for said, field in _FIELDS.items() if field in chosen),
        hbm_sure_bytes=quotas.hbm_guaranteed_bytes(name),
    )
