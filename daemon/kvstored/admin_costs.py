"""What the owner thread answers of costs: profiles, ways, and compute saved. Less than a millisecond. Owner thread."""

from collections.abc import Iterator
from typing import Final

from kvproto.ids import NamespaceDigest
from kvproto.policy_frames import Tier
from kvstore.report_costs import CostsReport, NamespaceCosts, PrefillReport, RunReport, WayReport
from kvstore.sessions import Namespace, Tenant
from kvstore.store import Store

# 16 namespaces of 12 prefills and 4 runs take half a millisecond; whoever wants another one names it.
NAMESPACES: Final = 16
CACHED_TOKENS: Final = (0, 4096, 16_384, 65_536)
NEW_TOKENS: Final = (512, 4096, 16_384)
RUN_TOKENS: Final = (1024, 4096, 16_384, 65_536)


def costs_report(store: Store, tenant: str | None, digest: NamespaceDigest | None) -> CostsReport:
    """What is known of a tenant's namespaces (None: of everybody's), or of one namespace.

    Raises KeyError(text): unknown tenant or namespace.
    """
    if tenant is not None and tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    tenants = [one for name, one in store.tenants.items() if tenant in (None, name)]
    if digest is None:
        known = [namespace for one in tenants for namespace in store.costing.profiled(one)]
    else:
        known = [store.namespaces[one, digest] for one in tenants if (one, digest) in store.namespaces]
        if not known:
            raise KeyError(f"no namespace has the digest {digest.hex()[:12]}")
    return CostsReport(
        tuple(_namespace_costs(store, namespace) for namespace in known[:NAMESPACES]),
        max(0, len(known) - NAMESPACES),
        tuple(_ways(store, tenants)),
    )


def _namespace_costs(store: Store, namespace: Namespace) -> NamespaceCosts:
    identity, profile, saved = namespace.identity, namespace.profile, namespace.saved
    pass_s, token_s, pair_s = profile.costs if profile else (0.0, 0.0, 0.0)
    return NamespaceCosts(
        tenant=namespace.tenant.name,
        digest=namespace.digest.hex(),
        model=identity.model,
        block_tokens=identity.block_tokens,
        block_bytes=identity.block_bytes,
        prefill_reports=profile.reports if profile else 0,
        pass_s=pass_s,
        token_s=token_s,
        pair_s=pair_s,
        block_s=namespace.recompute_ns * 1e-9,
        saved_dram_s=saved.dram_seconds,
        saved_disk_s=saved.disk_seconds,
        hit_blocks=saved.blocks,
        unpriced_blocks=saved.unpriced_blocks,
        prefills=tuple(
            PrefillReport(cached, new, profile.seconds(cached, new) or 0.0)
            for cached in CACHED_TOKENS
            for new in NEW_TOKENS
        )
        if profile
        else (),
        runs=tuple(_run(store, namespace, tokens) for tokens in RUN_TOKENS),
    )


def _run(store: Store, namespace: Namespace, tokens: int) -> RunReport:
    blocks = -(-tokens // namespace.identity.block_tokens)
    load_bytes = blocks * namespace.identity.block_bytes
    dram, disk = (store.costing.way(namespace.tenant, tier) for tier in (Tier.DRAM, Tier.DISK))
    recompute_s = namespace.profile.seconds(0, tokens) if namespace.profile else None
    return RunReport(
        tokens, dram.load_seconds(load_bytes) or 0.0, disk.load_seconds(load_bytes) or 0.0, recompute_s or 0.0
    )


def _ways(store: Store, tenants: list[Tenant]) -> Iterator[WayReport]:
    """Those that anybody has measured."""
    for tenant, tier, way in store.costing.ways(tenants):
        speed = 1 / way.byte_seconds if way.byte_seconds else 0.0
        yield WayReport(tenant.name if tenant else "", tier.name.lower(), way.reports, way.call_seconds, speed)
