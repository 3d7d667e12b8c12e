"""What the store says of itself: plain values, safe to hand to another thread."""

from dataclasses import dataclass

from kvproto.ids import BlockKey, NamespaceDigest


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier. `assigned` counts whole arenas given to tenants, `used` the slots that hold blocks."""

    name: str
    capacity_bytes: int
    assigned_bytes: int
    used_bytes: int
    blocks: int
    arenas: int
    arena_bytes: int
    populated_bytes: int
    locked_bytes: int
    stale_bytes: int  # still held by clients in arenas that were given up


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the daemon started. Blocks unless the name says otherwise."""

    leases: int
    lease_hits: int
    lease_misses: int
    lease_disk_hits: int  # of the hits, those that had to be read from disk
    matches: int
    match_hits: int
    match_misses: int
    granted: int
    known: int
    pending: int
    refused_full: int
    refused_busy: int
    refused_quota: int
    refused_no_parent: int
    refused_draining: int
    published: int
    published_bytes: int
    stale: int
    discarded: int
    evicted: int
    deleted: int
    arenas_recycled: int
    leases_expired: int
    sessions_opened: int
    sessions_failed: int
    faults: int


@dataclass(frozen=True, slots=True)
class NamespaceReport:
    """One namespace that holds blocks or that a session has open."""

    tenant: str
    digest: str  # hex
    model: str
    engine: str
    layout: str
    dtype: str
    revision: str
    adapter: str
    block_tokens: int
    block_bytes: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    slot_bytes: int
    blocks: int
    bytes: int
    sessions: int


@dataclass(frozen=True, slots=True)
class TenantReport:
    """One tenant's share of DRAM."""

    name: str
    uids: tuple[int, ...]
    assigned_bytes: int
    used_bytes: int
    stale_bytes: int
    blocks: int
    sessions: int


@dataclass(frozen=True, slots=True)
class SessionReport:
    """One client."""

    session: int
    name: str
    role: str
    mode: str
    tenant: str
    pid: int
    uid: int
    isolation: str  # "enforced" or "accident only"
    connected_s: float
    ring_bytes: int
    ring_used_bytes: int
    tickets: int
    leases: int
    arenas_mapped: int
    namespaces: int
    requests: int


@dataclass(frozen=True, slots=True)
class ClearReport:
    """What a clear dropped, or would drop (`dry_run`). Leased blocks leave the index at once, memory later.

    `leased_blocks` counts those at which running leases end; each lease also reads what leads there.
    """

    blocks: int
    bytes: int
    leased_blocks: int
    pending_blocks: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class DaemonReport:
    """Everything of `kvctl status`."""

    version: str
    pid: int
    uid: int
    started_unix_s: float
    uptime_s: float
    runtime_dir: str
    serving: bool
    draining: bool
    isolation: str
    warnings: tuple[str, ...]  # each names what is wrong and what to do
    tiers: tuple[TierReport, ...]
    tenants: tuple[TenantReport, ...]
    counters: Counters
    sessions: int
    namespaces: int


@dataclass(frozen=True, slots=True)
class ConfigValue:
    """One setting with where it came from."""

    name: str
    value: str
    origin: str  # "default", "file PATH:LINE", "environment NAME", "flag --NAME"
    unit: str
    reason: str


@dataclass(frozen=True, slots=True)
class ClearScope:
    """What a clear drops: the blocks that every given part agrees on. All parts empty: every block there is.

    `keys` needs a `digest` and means every block that continues one of them, the keys' own blocks included.
    """

    tenant: str | None = None
    digest: NamespaceDigest | None = None
    keys: tuple[BlockKey, ...] = ()
