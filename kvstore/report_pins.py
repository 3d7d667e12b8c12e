"""What is said of pins and prefetches: plain values, safe to hand to another thread."""

from dataclasses import dataclass
from heapq import nsmallest

from kvstore.pins import Held
from kvstore.store import Store

PINS_LISTED = 512


@dataclass(frozen=True, slots=True)
class PinReport:
    """One pin."""

    pin: int
    tenant: str
    namespace_digest: str  # hex
    blocks: int
    bytes: int  # of its blocks; those that other pins cover too are paid for once
    left_s: float
    refresh: bool
    owner: str  # "program:NAME", or empty: a client's own


@dataclass(frozen=True, slots=True)
class PinBudget:
    """What a tenant's pins may cover, and do."""

    tenant: str
    pins: int
    used_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class PinCounters:
    """Totals since the daemon started."""

    pinned: int
    unpinned: int
    expired: int
    refreshed: int
    dropped: int
    over_budget: int
    prefetches: int
    prefetches_refused: int
    prefetches_merged: int
    prefetches_cancelled: int
    prefetches_late: int
    prefetched_bytes: int
    prefetched_used_bytes: int
    prefetched_wasted_bytes: int
    gave_way: int = 0  # pins that ended for a class which is sure of what they had, or for a smaller budget


@dataclass(frozen=True, slots=True)
class PinsReport:
    """All of it; the pins that end first, up to `PINS_LISTED`."""

    pins: tuple[PinReport, ...]
    pins_total: int
    budgets: tuple[PinBudget, ...]
    counters: PinCounters


def pins_report(store: Store, tenant: str | None) -> PinsReport:
    """Of one tenant, or of all (None). Owner thread. Raises KeyError(text): unknown tenant."""
    if tenant is not None and tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    now_ns, pinning = store.now_ns(), store.pinning
    chosen = [pin for pin in pinning.pins.values() if tenant in (None, pin.tenant.name)]
    first = nsmallest(PINS_LISTED, chosen, key=pinning.expires_ns)
    counts = {each: pinning.count(each) for each in store.tenants.values() if tenant in (None, each.name)}
    budgets = tuple(
        PinBudget(each.name, count, pinning.used_bytes(each), store.quotas.pin_budget_bytes(each))
        for each, count in counts.items()
        if count or tenant is not None
    )
    listed = tuple(_report(pin, pinning.expires_ns(pin) - now_ns) for pin in first)
    return PinsReport(listed, len(chosen), budgets, _counters(store))


def _report(pin: Held, left_ns: int) -> PinReport:
    namespace = pin.namespace
    return PinReport(
        pin.number, pin.tenant.name, namespace.digest.hex(), int(pin.rows.size),
        int(pin.rows.size) * namespace.identity.block_bytes, max(0.0, left_ns / 1e9), pin.refresh,
        pin.owner,
    )  # fmt: skip


def _counters(store: Store) -> PinCounters:
    pins, fetches = store.pinning.tally, store.prefetching.tally
    return PinCounters(
        pins.pinned, pins.ended, pins.expired, pins.refreshed, pins.dropped, pins.over_budget, fetches.asked,
        fetches.refused, fetches.merged, fetches.cancelled, fetches.late, fetches.fetched_bytes, fetches.used_bytes,
        fetches.wasted_bytes, pins.gave_way,
    )  # fmt: skip
