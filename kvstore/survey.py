"""What the store says of itself, as plain values. Owner thread; none of it walks blocks."""

from collections.abc import Iterable
from typing import Any

from kvstore.classes import PinClass
from kvstore.report import DiskCounters, NamespaceReport, PolicyReport, RestartReport, TenantReport, TierReport
from kvstore.rules import Tier
from kvstore.sessions import Namespace, Pool, Tenant
from kvstore.store import Store


def used_bytes(store: Store, tenant: Tenant | None = None) -> int:
    """Bytes of slots that hold blocks, of one tenant or of all."""
    return _bytes_in(store, (pool for pool in store.arenas.pools if tenant in (None, pool.tenant)))


def dram_blocks(store: Store) -> int:
    """Blocks that have a slot in DRAM. (`book` counts rows: those on disk alone have one too.)"""
    return sum(int(store.tables.pools[pool.number]["blocks"]) for pool in store.arenas.pools)


def _bytes_in(store: Store, pools: Iterable[Pool]) -> int:
    return sum(int(store.tables.pools[pool.number]["blocks"]) * pool.slot_bytes for pool in pools)


def disk_tier(store: Store) -> TierReport:
    """The tier "disk". Its arenas are segments."""
    segments = store.disk.segments
    return TierReport(
        name="disk",
        capacity_bytes=segments.positions * segments.segment_bytes,
        assigned_bytes=segments.serving() * segments.segment_bytes,
        used_bytes=_bytes_in(store, segments.pools.values()),
        blocks=sum(int(store.tables.pools[pool.number]["blocks"]) for pool in segments.pools.values()),
        arenas=segments.serving(),
        arena_bytes=segments.segment_bytes,
        populated_bytes=0,
        locked_bytes=0,
        stale_bytes=0,
    )


def disk_counters(store: Store) -> DiskCounters:
    """Totals of the disk tier, from where things happen."""
    disk = store.disk
    down, up = disk.demotion.tally, disk.tally
    return DiskCounters(
        saved=down.saved,
        saved_bytes=down.saved_bytes,
        packed=down.packed,
        dropped=down.dropped,
        not_worth=down.not_worth,
        save_faults=down.save_faults,
        loaded=up.loaded,
        loaded_bytes=up.loaded_bytes,
        damaged=up.damaged,
        load_faults=up.load_faults,
        gone=up.gone,
        erased=disk.erasure.erased,
        erase_faults=disk.erasure.faults,
        commits=disk.commits.commits,
        commit_faults=disk.commits.faults,
        quarantined=len(disk.erasure.quarantined),
        segments_recycled=disk.segments.recycled,
    )


def restart_report(store: Store, keeper: str) -> RestartReport:
    """How this life began. `keeper`: who holds memory for the next one."""
    kept = store.kept
    return RestartReport(
        began="warm" if kept.warm else "cold",
        reason=kept.reason,
        found_blocks=kept.blocks + kept.lost,
        kept_blocks=kept.blocks,
        withheld_slots=kept.withheld,
        unverified_blocks=store.unverified,
        verified_blocks=store.streams.verified,
        verify_faults=store.streams.verify_faults,
        keeper=keeper,
    )


def tenant_reports(store: Store, uids: dict[str, tuple[int, ...]]) -> tuple[TenantReport, ...]:
    """Every tenant that was ever seen or is configured; `uids` as the configuration has them."""
    reports = []
    for name in sorted(store.tenants.keys() | uids.keys()):
        tenant = store.tenants.get(name)
        dram, disk = store.quotas.dram, store.quotas.disk
        reports.append(
            TenantReport(
                name,
                uids.get(name, ()),
                tenant.arenas * store.limits.arena_bytes if tenant else 0,
                used_bytes(store, tenant) if tenant else 0,
                store.arenas.stale_bytes(tenant) if tenant else 0,
                tenant.entries() if tenant else 0,
                tenant.sessions if tenant else 0,
                prefill_reports=_prefill_reports(store, tenant) if tenant else 0,
                saved_dram_s=tenant.saved.dram_seconds if tenant else 0.0,
                saved_disk_s=tenant.saved.disk_seconds if tenant else 0.0,
                dram_guaranteed_bytes=dram.guaranteed_bytes(name),
                dram_max_bytes=dram.max_bytes(name),
                disk_assigned_bytes=tenant.segments * disk.capacity.unit_bytes if tenant else 0,
                disk_guaranteed_bytes=disk.guaranteed_bytes(name),
                disk_max_bytes=disk.max_bytes(name),
                pinned_bytes=store.pinning.used_bytes(tenant) if tenant else 0,
                in_flight=tenant.in_flight if tenant else 0,
                refused=tenant.refused if tenant else 0,
                pinned_5m_bytes=store.pinning.class_bytes(tenant, PinClass.SHORT) if tenant else 0,
                pinned_1h_bytes=store.pinning.class_bytes(tenant, PinClass.LONG) if tenant else 0,
                pinned_tool_bytes=store.pinning.class_bytes(tenant, PinClass.TOOL) if tenant else 0,
                unused_dropped=store.ageing.dropped[tenant] if tenant else 0,
                hit_dram_bytes=tenant.saved.dram_bytes if tenant else 0,
                hit_disk_bytes=tenant.saved.disk_bytes if tenant else 0,
                **_in_hbm(store, name, tenant),
            )
        )
    return tuple(reports)


def _in_hbm(store: Store, name: str, tenant: Tenant | None) -> dict[str, Any]:
    """What a tenant has in memory of GPUs, and may have of each; nothing where there is no such tier."""
    hbm = store.hbm
    bounds = [each.shares for each in hbm.tiers[:1]]
    found: dict[str, Any] = {
        "hbm_guaranteed_bytes": sum(shares.guaranteed_bytes(name) for shares in bounds),
        "hbm_max_bytes": bounds[0].max_bytes(name) if bounds else None,
    }
    if tenant is not None:
        found |= {
            "hit_hbm_bytes": hbm.hit_bytes(tenant),
            "hbm_assigned_bytes": hbm.assigned_bytes(tenant),
            "hbm_used_bytes": hbm.used_bytes(tenant),
            "hbm_pinned_bytes": hbm.pinned_bytes(tenant),
        }
    return found


def _prefill_reports(store: Store, tenant: Tenant) -> int:
    profiles = (namespace.profile for namespace in store.costing.profiled(tenant))
    return sum(profile.reports for profile in profiles if profile is not None)


def policy_report(store: Store, tier: Tier, tenant: str | None) -> PolicyReport:
    """What a tenant's blocks in a tier are evicted by; None: those of all tenants that have no rule of their own."""
    pools = store.policies.concerned(tier, tenant, store.arenas.by_number.values())
    held = sum(int(store.tables.pools[pool.number]["blocks"]) for pool in pools)
    chosen = store.policies.is_own(tier, tenant)
    return PolicyReport(tier.value, tenant or "", store.policies.rule_of(tier, tenant).value, chosen, held)


def namespace_reports(store: Store) -> tuple[NamespaceReport, ...]:
    """Namespaces that hold blocks or that a session has open."""
    return tuple(
        _namespace_report(store, namespace)
        for namespace in store.namespaces.values()
        if namespace.sessions or store.tables.census[namespace.number]
    )


def _namespace_report(store: Store, namespace: Namespace) -> NamespaceReport:
    identity, blocks = namespace.identity, int(store.tables.census[namespace.number])
    return NamespaceReport(
        tenant=namespace.tenant.name,
        digest=namespace.digest.hex(),
        model=identity.model,
        engine=identity.engine,
        layout=identity.layout,
        dtype=identity.dtype,
        revision=identity.revision,
        adapter=identity.adapter,
        block_tokens=identity.block_tokens,
        block_bytes=identity.block_bytes,
        tp_rank=identity.tp_rank,
        tp_size=identity.tp_size,
        pp_rank=identity.pp_rank,
        pp_size=identity.pp_size,
        slot_bytes=namespace.slot_bytes,
        blocks=blocks,
        bytes=blocks * namespace.slot_bytes,
        sessions=namespace.sessions,
        prefill_reports=namespace.profile.reports if namespace.profile else 0,
        saved_dram_s=namespace.saved.dram_seconds,
        saved_disk_s=namespace.saved.disk_seconds,
        codec=identity.codec,
    )
