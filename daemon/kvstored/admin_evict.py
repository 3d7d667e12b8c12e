"""What operators wish of evictions, and pages of keys for archives.

owner thread    `evict`, `walk`
handler         `evict_wish_of`, `evicted_of`, `walk_of`     requests are checked, answers written down
"""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvproto import control_pb2 as pb
from kvproto.ids import NamespaceDigest
from kvproto.limits import KEY_BYTES
from kvstore import blocks, evicting
from kvstore.evicting import EvictReport
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.store import Store
from kvstored.requests import digest_of, keys_of, named, tenant_of

PAGE: Final = 4096  # blocks an answer: 256 KiB of keys
ROWS: Final = 16_384  # looked over for it: under a millisecond
_THERE: Final = (blocks.RESIDENT, blocks.KEPT, blocks.DISK, blocks.LOADING)


@dataclass(frozen=True, slots=True)
class EvictWish:
    """What is to leave which tier, and how much of it (bytes; 0: all that may go)."""

    scope: ClearScope
    tier: Tier
    wanted_bytes: int
    exactly: bool = False  # what the scope's keys name, and not what continues them


@dataclass(frozen=True, slots=True)
class Walked:
    """One page of a namespace's blocks."""

    identity: bytes
    keys: bytes
    parents: bytes
    next: int


def scope_of(request: pb.ClearRequest | pb.EvictRequest) -> ClearScope:
    """Which blocks a request means. Raises ValueError for what no daemon could carry out."""
    tenant = tenant_of(request)
    kind = request.WhichOneof("scope")
    if kind == "everything":
        return ClearScope(tenant)
    if kind == "namespace_digest":
        return ClearScope(tenant, digest_of(request.namespace_digest))
    if kind == "prefix":
        prefix = request.prefix
        return ClearScope(tenant, digest_of(prefix.namespace_digest), keys_of(prefix.keys))
    what = "clear" if isinstance(request, pb.ClearRequest) else "evict"
    raise ValueError(f"nothing to {what}: set everything, namespace_digest or prefix")


def evict_wish_of(request: pb.EvictRequest) -> EvictWish:
    """What a request wishes. Raises ValueError."""
    tier = request.tier or Tier.DRAM.value
    if tier not in list(Tier):
        raise ValueError(f"no tier is called {tier!r}: it is one of {', '.join(Tier)}")
    scope = scope_of(request)
    if request.exactly and not scope.keys:
        raise ValueError("exactly is about the keys of a prefix; name some")
    return EvictWish(scope, Tier(tier), request.bytes, request.exactly)


def evict(store: Store, wish: EvictWish, *, dry_run: bool) -> "Future[EvictReport]":
    """Begin it; the answer comes when the last block is gone. Raises KeyError for an unknown tenant or namespace."""
    answer: Future[EvictReport] = Future()
    evicting.evict(
        store, wish.scope, wish.tier, wish.wanted_bytes, answer.set_result, dry_run=dry_run, exactly=wish.exactly
    )
    return answer


def evicted_of(report: EvictReport) -> pb.EvictResponse:
    """Field by field."""
    return pb.EvictResponse(**named(report))


def walk_wish_of(request: pb.WalkBlocksRequest) -> tuple[str, NamespaceDigest, int]:
    """Whose blocks, and from where on. Raises ValueError."""
    if not request.tenant:
        raise ValueError("tenant must name whose blocks are meant")
    return request.tenant, digest_of(request.namespace_digest), request.after


def walk(store: Store, tenant: str, digest: NamespaceDigest, after: int) -> Walked:
    """Blocks of a namespace in rows behind `after`. Raises KeyError for an unknown tenant or namespace."""
    if tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    namespace = store.namespaces.get((store.tenants[tenant], digest))
    if namespace is None:
        raise KeyError(f"no namespace of {tenant} has the digest {digest.hex()}")
    table, unused = store.tables.blocks, int(store.tables.book[blocks.UNUSED_ROW])
    start = min(max(1, after), unused)
    stop = min(start + ROWS, unused)
    mine = (table["namespace"][start:stop] == namespace.number) & np.isin(table["state"][start:stop], _THERE)
    rows = start + np.flatnonzero(mine)
    if rows.size > PAGE:
        rows, stop = rows[:PAGE], int(rows[PAGE])
    parents = table["parent"][rows]
    above = table["key"][parents]
    above[parents == 0] = 0
    keys = table["key"][rows]
    assert keys.nbytes == rows.size * KEY_BYTES, "a key of another size"
    return Walked(namespace.identity.canonical(), keys.tobytes(), above.tobytes(), stop if stop < unused else 0)


def walk_of(walked: Walked) -> pb.WalkBlocksResponse:
    """Field by field."""
    return pb.WalkBlocksResponse(**named(walked))
