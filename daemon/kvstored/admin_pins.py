"""What operators wish of pins, prefetches and hand-overs, and what is answered.

owner thread    `pin`, `prefetch`, `hand_over`, `unpin`
handler         `prefix_wish_of`, `pinned_of`, `pins_of`     requests are checked, answers written down
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.limits import PREFETCH_NS_MAX
from kvproto.policy_frames import Fetching, Partial, Pinned, Tier
from kvstore import handing_over
from kvstore.blocks import U8
from kvstore.handing_over import HandOverReport
from kvstore.report_pins import PinsReport
from kvstore.sessions import Namespace
from kvstore.store import Store
from kvstored.requests import keys_of, named, namespace_of, tenant_of


@dataclass(frozen=True, slots=True)
class PrefixWish:
    """A prefix, and for how long, or within which time."""

    tenant: str | None
    digest: NamespaceDigest | None
    keys: tuple[BlockKey, ...]
    ns: int
    tier: Tier = Tier.DRAM
    refresh: bool = False
    looked_ns: int = 0  # what is beyond this host is read back, unless that was begun so long ago or later; 0: not


def prefix_wish_of(
    prefix: pb.Prefix, seconds: float, most_ns: int, *, tier: Tier = Tier.DRAM, refresh: bool = False
) -> PrefixWish:
    """What a request wishes. Raises ValueError for what no daemon could do."""
    tenant, digest, keys = tenant_of(prefix), namespace_of(prefix), keys_of(prefix.keys)
    if not 0 < seconds <= most_ns / 1e9:
        raise ValueError(f"the time must be above 0 and at most {most_ns // 10**9} seconds")
    return PrefixWish(tenant, digest, keys, max(1, int(seconds * 1e9)), tier, refresh)


def hand_over_wish_of(request: pb.HandOverRequest) -> PrefixWish:
    """As `prefix_wish_of`."""
    wish, looked_s = prefix_wish_of(request.prefix, request.within_s, PREFETCH_NS_MAX), request.looked_within_s
    if not 0 <= looked_s <= PREFETCH_NS_MAX / 1e9:
        raise ValueError(f"looked_within_s must be 0 to {PREFETCH_NS_MAX // 10**9} seconds")
    return replace(wish, looked_ns=int(looked_s * 1e9))


def pin(store: Store, wish: PrefixWish) -> Pinned:
    """Keep it. Raises KeyError(text): no such namespace; ValueError: several could be meant."""
    namespace, keys = _found(store, wish)
    return store.pinning.pin(
        namespace.tenant, namespace, keys, 0, len(wish.keys), wish.ns, wish.tier, refresh=wish.refresh, owner="operator"
    )


def prefetch(store: Store, wish: PrefixWish) -> Fetching:
    """Have it read. Raises KeyError(text): no such namespace; ValueError: several could be meant."""
    namespace, keys = _found(store, wish)
    return store.prefetching.prefetch(
        namespace.tenant, namespace, keys, 0, len(wish.keys), wish.ns, Tier.DRAM, wished=True
    )


def hand_over(store: Store, wish: PrefixWish, *, dry_run: bool) -> HandOverReport:
    """Have it written beyond this host, or say how far it is. Raises as `pin`."""
    namespace, keys = _found(store, wish)
    return handing_over.report(store, namespace, keys, wish.ns, wish.looked_ns, dry_run=dry_run)


def _found(store: Store, wish: PrefixWish) -> tuple[Namespace, U8]:
    found = [
        namespace
        for (tenant, digest), namespace in store.namespaces.items()
        if wish.tenant in (None, tenant.name) and wish.digest in (None, digest)
    ]
    if not found:
        raise KeyError("no such namespace holds blocks or is open")
    if len(found) > 1:
        meant = f"{len(found)} namespaces could be meant; name one, and its tenant if several have it"
        raise ValueError(f"{meant}; `kvctl namespaces` lists them")
    return found[0], np.frombuffer(b"".join(wish.keys), dtype=np.uint64).copy()


def pinned_of(pinned: Pinned) -> pb.PinResponse:
    """Field by field."""
    why = "" if pinned.partial == Partial.NOTHING else Partial(pinned.partial).name.lower()
    return pb.PinResponse(pin=pinned.pin, blocks=pinned.blocks, bytes=pinned.bytes, why_not_all=why)


@dataclass(frozen=True, slots=True)
class Unpinned:
    """How many pins were ended, and which of those that were named are not the tenant's."""

    ended: int
    unknown: tuple[int, ...]


def unpin(store: Store, tenant: str, numbers: Sequence[int]) -> Unpinned:
    """End these pins of a tenant, or all of them if none is named. Raises KeyError(text): unknown tenant."""
    if tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    whose = store.tenants[tenant]
    if not numbers:
        mine = [number for number, pin in store.pinning.pins.items() if pin.tenant is whose]
        return Unpinned(store.pinning.unpin(whose, mine), ())
    unknown = tuple(number for number in dict.fromkeys(numbers) if not store.pinning.unpin(whose, [number]))
    return Unpinned(len(set(numbers)) - len(unknown), unknown)


def pins_of(report: PinsReport) -> pb.ListPinsResponse:
    """Field by field."""
    return pb.ListPinsResponse(
        pins=[pb.ListedPin(**named(one)) for one in report.pins],
        pins_total=report.pins_total,
        budgets=[pb.PinBudget(**named(one)) for one in report.budgets],
        counters=pb.PinCounters(**named(report.counters)),
    )
