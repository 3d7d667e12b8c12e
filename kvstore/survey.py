"""What the store says of itself, as plain values. Owner thread; none of it walks blocks."""

from kvstore.report import NamespaceReport, TenantReport
from kvstore.sessions import Namespace, Tenant
from kvstore.store import Store


def used_bytes(store: Store, tenant: Tenant | None = None) -> int:
    """Bytes of slots that hold blocks, of one tenant or of all."""
    return sum(
        int(store.tables.pools[pool.number]["blocks"]) * pool.slot_bytes
        for pool in store.arenas.pools
        if tenant in (None, pool.tenant)
    )


def tenant_reports(store: Store, uids: dict[str, tuple[int, ...]]) -> tuple[TenantReport, ...]:
    """Every tenant that was ever seen or is configured; `uids` as the configuration has them."""
    reports = []
    for name in sorted(store.tenants.keys() | uids.keys()):
        tenant = store.tenants.get(name)
        reports.append(
            TenantReport(
                name,
                uids.get(name, ()),
                tenant.arenas * store.limits.arena_bytes if tenant else 0,
                used_bytes(store, tenant) if tenant else 0,
                store.arenas.stale_bytes(tenant) if tenant else 0,
                tenant.entries() if tenant else 0,
                tenant.sessions if tenant else 0,
            )
        )
    return tuple(reports)


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
    )
