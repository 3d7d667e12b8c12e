"""Quotas as operators see and change them: GetQuotas, SetQuota, and what the owner thread does for them."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from kvproto import control_pb2 as pb
from kvstore.quotas import USUAL, Quota, QuotaError, check_numbers
from kvstore.report_quotas import CLASS_FIELDS, QuotaChange, QuotaReport

if TYPE_CHECKING:
    from kvstore.store import Store

__all__ = ["QuotaWish", "quota_reports", "set_quota", "wish_of"]

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


@dataclass(frozen=True, slots=True)
class QuotaWish:
    """What is to become of a tenant's quota. `said` is by field of `Quota`; what is not in it stays."""

    tenant: str
    said: Mapping[str, int | float | None]
    reset: bool  # first go back to what the configuration says

    def on(self, quota: Quota) -> Quota:
        """That quota, changed."""
        return replace(quota, **self.said)  # type: ignore[arg-type]  # `wish_of` has seen to the types


def wish_of(request: pb.SetQuotaRequest) -> QuotaWish:
    """What a request wants. Raises ValueError for what no daemon could carry out. Any thread."""
    if not request.tenant:
        raise ValueError("a quota is one tenant's: name it")
    said: dict[str, int | float | None] = {
        _FIELDS[name]: getattr(request, name) for name in _FIELDS if request.HasField(name)
    }
    for name in request.usual:
        if name not in _FIELDS:
            raise ValueError(f"there is no {name!r} in a quota: it is one of {', '.join(_FIELDS)}")
        if _FIELDS[name] in said:
            raise ValueError(f"{name} cannot be both set and usual")
    said |= {_FIELDS[name]: getattr(USUAL, _FIELDS[name]) for name in request.usual}
    if not said and not request.reset:
        raise ValueError("nothing is to be changed: set a field, name it in usual, or reset")
    wish = QuotaWish(request.tenant, said, request.reset)
    try:
        check_numbers(request.tenant, wish.on(USUAL))
    except QuotaError as error:
        raise ValueError(f"{error.field}: {error}") from None
    return wish


def quota_reports(store: "Store", configured: Collection[str], tenant: str | None) -> tuple[QuotaReport, ...]:
    """One tenant's quota, or (None) those of all that were ever seen or are configured. Raises KeyError."""
    if tenant is not None:
        _check_known(store, configured, tenant)
        return (_report(store, tenant),)
    return tuple(_report(store, name) for name in sorted({*store.tenants, *configured}))


def set_quota(store: "Store", configured: Collection[str], wish: QuotaWish, *, dry_run: bool) -> QuotaChange:
    """Change a tenant's quota, or only say what would change. Raises KeyError, and QuotaError for what cannot be."""
    _check_known(store, configured, wish.tenant)
    quotas = store.quotas
    former = _report(store, wish.tenant)
    chosen = quotas.of(wish.tenant) if quotas.is_chosen(wish.tenant) else None
    wanted = wish.on(quotas.configured(wish.tenant) if wish.reset else quotas.of(wish.tenant))
    quota = None if wish.reset and not wish.said else wanted
    if dry_run:
        quotas.choose(wish.tenant, quota)  # nothing happens by that until somebody allocates
        after = _report(store, wish.tenant)
        quotas.choose(wish.tenant, chosen)
        return QuotaChange(after, former)
    store.choose_quota(wish.tenant, quota)
    after = _report(store, wish.tenant)
    log.info(
        "quota: tenant=%s dram=%s..%s disk=%s..%s pin_share=%g in_flight=%s classes=%s chosen=%s",
        after.tenant, after.dram_guaranteed_bytes, after.dram_max_bytes, after.disk_guaranteed_bytes,
        after.disk_max_bytes, after.pin_share, after.in_flight_max,
        ",".join(f"{name}:{getattr(after, name)}" for name in CLASS_FIELDS), after.chosen,
    )  # fmt: skip
    return QuotaChange(after, former)


def _check_known(store: "Store", configured: Collection[str], tenant: str) -> None:
    if tenant not in store.tenants and tenant not in configured:
        raise KeyError(f"no tenant is called {tenant}")


def _report(store: "Store", name: str) -> QuotaReport:
    quotas, quota = store.quotas, store.quotas.of(name)
    tenant = store.tenants.get(name)
    guaranteed_bytes = quotas.dram.guaranteed_bytes(name)
    budget_bytes = quotas.pin_budget_bytes(tenant) if tenant else int(quota.pin_share * guaranteed_bytes)
    return QuotaReport(
        tenant=name,
        chosen=quotas.is_chosen(name),
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
    )
