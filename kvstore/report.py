"""What the store says of itself: plain values, safe to hand to another thread."""

from dataclasses import dataclass

from kvproto.ids import BlockKey, NamespaceDigest


@dataclass(frozen=True, slots=True)
class NodeReport:
    """Memory of a tier on one NUMA node, from looking at one page in each 2 MiB."""

    node: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TierReport:
    """One tier. `assigned` counts whole arenas given to tenants, `used` the slots that hold blocks.

    The arenas of disk are its segments; nothing there is populated, locked or stale.
    """

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
    huge_bytes: int = 0  # of what this daemon populated, what the kernel gave it huge pages for
    nodes: tuple[NodeReport, ...] = ()  # where it lies
    numa: str = ""  # where it is wanted: "off", or numbers of nodes


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
    evicted: int  # from memory, for want of room
    deleted: int
    arenas_recycled: int
    leases_expired: int
    sessions_opened: int
    sessions_failed: int
    faults: int
    evicted_by_operators: int = 0  # from memory, beyond `evicted`
    disk_evicted_by_operators: int = 0  # from disk


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
    prefill_reports: int = 0  # that its profile is made of
    saved_dram_s: float = 0.0  # compute saved, by tier
    saved_disk_s: float = 0.0
    codec: str = ""  # how clients encode the blocks; empty: raw


@dataclass(frozen=True, slots=True)
class TenantReport:
    """One tenant's share of DRAM and disk; `assigned_bytes` to `stale_bytes` are of DRAM."""

    name: str
    uids: tuple[int, ...]
    assigned_bytes: int
    used_bytes: int
    stale_bytes: int
    blocks: int
    sessions: int
    prefill_reports: int = 0  # that its profiles are made of
    saved_dram_s: float = 0.0  # compute saved, by tier
    saved_disk_s: float = 0.0
    dram_guaranteed_bytes: int = 0
    dram_max_bytes: int | None = None  # None: no maximum
    disk_assigned_bytes: int = 0
    disk_guaranteed_bytes: int = 0
    disk_max_bytes: int | None = None
    pinned_bytes: int = 0
    in_flight: int = 0  # tickets, and LEASEs that wait
    refused: int = 0  # blocks for which there was no room, and LEASEs that were not let wait, since the start
    pinned_5m_bytes: int = 0  # of `pinned_bytes`, by class; what pins of several classes cover is in each of these
    pinned_1h_bytes: int = 0
    pinned_tool_bytes: int = 0
    unused_dropped: int = 0  # blocks dropped since nobody had used them for longer than its quota says
    hit_dram_bytes: int = 0  # of blocks that were leased since the start, by where they were
    hit_disk_bytes: int = 0
    hit_hbm_bytes: int = 0  # of blocks that were loaded out of memory of GPUs
    hbm_assigned_bytes: int = 0  # of arenas there, of all GPUs
    hbm_used_bytes: int = 0
    hbm_pinned_bytes: int = 0
    hbm_guaranteed_bytes: int = 0  # of each GPU
    hbm_max_bytes: int | None = None


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
    remote_objects: int | None = None  # of this host, still over there; what else is there goes as well. None: no such


@dataclass(frozen=True, slots=True)
class DiskCounters:
    """Totals of the disk tier since the daemon started. Blocks unless the name says otherwise."""

    saved: int = 0
    saved_bytes: int = 0  # headers and padding included
    packed: int = 0  # smaller than they are in DRAM
    dropped: int = 0  # admitted, and given up for lack of room
    not_worth: int = 0  # slower to read than to compute
    save_faults: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    damaged: int = 0  # were not what was written
    load_faults: int = 0
    gone: int = 0  # their segment was no more
    erased: int = 0  # dropped, and overwritten so that nothing brings them back
    erase_faults: int = 0
    commits: int = 0  # transactions of the index
    commit_faults: int = 0  # transactions
    quarantined: int = 0  # slots that are not used again, as of now
    segments_recycled: int = 0  # segments


@dataclass(frozen=True, slots=True)
class DriveReport:
    """One directory of the disk tier."""

    directory: str
    state: str  # "ok", "read-only", "full", "failing" or "gone"
    reason: str  # empty if all is well
    direct: bool  # past the page cache (O_DIRECT)
    segments: int
    free_bytes: int  # of the file system
    capacity_bytes: int  # of the file system
    read_bytes: int  # since the daemon started, headers included
    written_bytes: int
    errors: int  # system calls that failed or stopped short
    damaged: int  # blocks that were not what was written


@dataclass(frozen=True, slots=True)
class DiskReport:
    """The disk tier, beyond what a `TierReport` says."""

    state: str  # "opening", "adopting", "serving" or "off": unless it serves, disk answers miss
    index_state: str  # "starting", "rebuilding", "ready", "hung", "lost" or "stopped"; "none": it has none
    index_reason: str  # empty if nothing is wrong
    rebuild_done_slots: int  # while the index is rebuilt, else 0
    rebuild_total_slots: int
    rebuilt: str  # why the index was made anew at this start; empty if it was not
    recovered_blocks: int  # found at this start
    orphan_blocks: int  # found, and dropped: what they continue is gone
    recovered_segments: int
    surplus_segments: int  # beyond disk.size, removed
    unknown_segments: int  # of tenants or of a shape that cannot be, left alone
    useless_records: int  # of the index, or headers, that were of no use
    foreign_files: int  # in `segments` folders and not ours: left alone
    foreign: tuple[str, ...]  # paths of some of them
    admission: str
    codec: str
    queued_chains: int  # wait to be written
    running_bytes: int  # being packed or written
    counters: DiskCounters
    drives: tuple[DriveReport, ...]
    encryption: str = ""  # how payloads are written, such as "aes-256-gcm"; empty: in the clear
    unread_segments: int = 0  # files that could not be read in this life, and may be read in the next: left alone
    unread: tuple[str, ...] = ()  # paths of some of them


@dataclass(frozen=True, slots=True)
class RestartReport:
    """What this life took over from the one before, in memory; disk is apart (`DiskReport.recovered_blocks`)."""

    began: str  # "cold" or "warm"
    reason: str  # why cold; empty if warm
    found_blocks: int  # in the memory that was kept
    kept_blocks: int  # of them, those taken over
    withheld_slots: int  # somebody may still be reading there
    unverified_blocks: int  # taken over, and not looked at yet: as of now
    verified_blocks: int
    verify_faults: int  # were not what they should be, and became misses
    keeper: str  # who holds memory for the next life: "systemd", "fd-keeper" or "none"


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """The scrub that runs, or the last one: all that lies on disk, read and verified. All 0: there was none yet."""

    running: bool = False
    done_blocks: int = 0
    total_blocks: int = 0  # when it began
    done_bytes: int = 0
    damaged: int = 0  # blocks that were not what was written: they are misses now, and their slots not used again
    rate_bytes_per_s: int = 0  # at most; 0: as fast as it goes
    started_unix_s: float = 0.0
    finished_unix_s: float = 0.0  # 0 while it runs


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One rule of eviction, and whose blocks go by it."""

    tier: str
    tenant: str  # empty: all that have no rule of their own
    rule: str
    chosen: bool  # at run time, for just this tier and tenant; else it comes from the tier or the configuration
    blocks: int  # that go by it, as of now


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What holds now, or would, and what held before."""

    policy: PolicyReport
    former_rule: str


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """One GPU that the daemon copies for. Counts since its start; blocks, where nothing else is said."""

    name: str  # an emulation's is "emulation"
    emulated: bool
    lost: bool
    attached_bytes: int  # memory of engines
    loads: int  # requests
    saves: int
    failed: int  # requests
    loaded_bytes: int
    saved_bytes: int
    hbm_bytes: int  # 0: no tier there
    hbm_used_bytes: int
    hbm_hits: int
    hbm_promoted: int
    hbm_evicted: int
    hbm_blocks: int = 0  # copies that are there now
    hbm_hit_bytes: int = 0
    hbm_promoted_bytes: int = 0
    hbm_unpinned: int = 0  # of those evicted, pinned ones
    hbm_evicted_after_s: float = 0.0  # how long those that were evicted had been there, together


@dataclass(frozen=True, slots=True)
class RemoteReport:
    """The remote tier. Counters begin with the daemon; blocks, unless the name says otherwise."""

    url: str
    reading: str  # "goes on"; "fails": the last call did; "stopped": none is made; "tries again": one is
    writing: str  # the same
    reason: str  # of the last failure, empty if all is well
    capacity_bytes: int  # that this host may have written there
    used_bytes: int  # that it has, and that are still there as far as it knows
    objects: int
    bytes_per_s: int  # of reading from there; 0: nothing was read yet
    sought: int  # chains that were asked for
    sought_empty: int  # chains of which nothing was there
    sought_dropped: int  # chains that were not asked for after all: too many at a time
    promoted: int  # read, verified and stored here
    promoted_bytes: int
    no_room: int  # read, and memory was full
    kept: int  # written, or found to be there
    kept_bytes: int
    not_worth: int  # not written: slower to read than to compute
    not_kept: int  # not written: too much waited, they were gone, or the far side did not take them
    shared: int  # of those kept: were there already
    removed: int  # objects, for room and for what was deleted
    damaged: int  # objects that are not what was written, blocks that changed after they had been compared
    absent: int  # objects that were gone when they were to be read
    quarantined: int  # objects that were damaged when they were read last: left alone for up to an hour
    reads: int  # requests, listings too
    writes: int  # requests, deletes too
    read_bytes: int
    written_bytes: int
    unreachable: int  # requests that were not answered, or not with sense
    refused: int  # requests, for credentials, permissions or the clock
    full: int  # requests for which there was no room
    queued_runs: int
    running: int  # reads and writes under way
    owed: int = 0  # keys that were deleted, and are still to be removed there
    not_noted: int = 0  # requests to delete that came faster than they could be noted
    not_remembered: int = 0  # keys that were deleted, and forgotten for others before they were removed there
    closed: int = 0  # namespaces of which that is so, until they have been cleared: neither read nor written
    uncounted: int = 0  # objects of this host that are not in `used_bytes`: there are too many to remember


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
    disk: DiskReport | None  # None: no disk tier
    restart: RestartReport
    remote: RemoteReport | None = None  # None: no remote tier
    devices: tuple[DeviceReport, ...] = ()  # GPUs that it copies for


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
