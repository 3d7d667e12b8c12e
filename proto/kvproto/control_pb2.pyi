# Written by proto/generate.py with grpcio-tools 1.85.1; change control.proto instead.
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(_message.Message):
    __slots__ = ("name", "capacity_bytes", "assigned_bytes", "used_bytes", "blocks", "arenas", "arena_bytes", "populated_bytes", "locked_bytes", "stale_bytes", "huge_bytes", "nodes", "numa")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ARENAS_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    POPULATED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOCKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HUGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NUMA_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity_bytes: int
    assigned_bytes: int
    used_bytes: int
    blocks: int
    arenas: int
    arena_bytes: int
    populated_bytes: int
    locked_bytes: int
    stale_bytes: int
    huge_bytes: int
    nodes: _containers.RepeatedCompositeFieldContainer[NodeMemory]
    numa: str
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., assigned_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., arenas: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., populated_bytes: _Optional[int] = ..., locked_bytes: _Optional[int] = ..., stale_bytes: _Optional[int] = ..., huge_bytes: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[NodeMemory, _Mapping[str, object]]]] = ..., numa: _Optional[str] = ...) -> None: ...

class NodeMemory(_message.Message):
    __slots__ = ("node", "bytes")
    NODE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    node: int
    bytes: int
    def __init__(self, node: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("leases", "lease_hits", "lease_misses", "matches", "match_hits", "match_misses", "granted", "known", "pending", "refused_full", "refused_busy", "refused_quota", "refused_no_parent", "refused_draining", "published", "published_bytes", "stale", "discarded", "evicted", "deleted", "arenas_recycled", "leases_expired", "sessions_opened", "sessions_failed", "faults", "lease_disk_hits", "evicted_by_operators", "disk_evicted_by_operators")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASE_HITS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MISSES_FIELD_NUMBER: _ClassVar[int]
    MATCHES_FIELD_NUMBER: _ClassVar[int]
    MATCH_HITS_FIELD_NUMBER: _ClassVar[int]
    MATCH_MISSES_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FULL_FIELD_NUMBER: _ClassVar[int]
    REFUSED_BUSY_FIELD_NUMBER: _ClassVar[int]
    REFUSED_QUOTA_FIELD_NUMBER: _ClassVar[int]
    REFUSED_NO_PARENT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_DRAINING_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    DISCARDED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    DELETED_FIELD_NUMBER: _ClassVar[int]
    ARENAS_RECYCLED_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_OPENED_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FAILED_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_DISK_HITS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BY_OPERATORS_FIELD_NUMBER: _ClassVar[int]
    DISK_EVICTED_BY_OPERATORS_FIELD_NUMBER: _ClassVar[int]
    leases: int
    lease_hits: int
    lease_misses: int
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
    lease_disk_hits: int
    evicted_by_operators: int
    disk_evicted_by_operators: int
    def __init__(self, leases: _Optional[int] = ..., lease_hits: _Optional[int] = ..., lease_misses: _Optional[int] = ..., matches: _Optional[int] = ..., match_hits: _Optional[int] = ..., match_misses: _Optional[int] = ..., granted: _Optional[int] = ..., known: _Optional[int] = ..., pending: _Optional[int] = ..., refused_full: _Optional[int] = ..., refused_busy: _Optional[int] = ..., refused_quota: _Optional[int] = ..., refused_no_parent: _Optional[int] = ..., refused_draining: _Optional[int] = ..., published: _Optional[int] = ..., published_bytes: _Optional[int] = ..., stale: _Optional[int] = ..., discarded: _Optional[int] = ..., evicted: _Optional[int] = ..., deleted: _Optional[int] = ..., arenas_recycled: _Optional[int] = ..., leases_expired: _Optional[int] = ..., sessions_opened: _Optional[int] = ..., sessions_failed: _Optional[int] = ..., faults: _Optional[int] = ..., lease_disk_hits: _Optional[int] = ..., evicted_by_operators: _Optional[int] = ..., disk_evicted_by_operators: _Optional[int] = ...) -> None: ...

class DiskCounters(_message.Message):
    __slots__ = ("saved", "saved_bytes", "packed", "dropped", "not_worth", "save_faults", "loaded", "loaded_bytes", "damaged", "load_faults", "gone", "erased", "erase_faults", "commits", "commit_faults", "quarantined", "segments_recycled")
    SAVED_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    NOT_WORTH_FIELD_NUMBER: _ClassVar[int]
    SAVE_FAULTS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FAULTS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    ERASED_FIELD_NUMBER: _ClassVar[int]
    ERASE_FAULTS_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FAULTS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_RECYCLED_FIELD_NUMBER: _ClassVar[int]
    saved: int
    saved_bytes: int
    packed: int
    dropped: int
    not_worth: int
    save_faults: int
    loaded: int
    loaded_bytes: int
    damaged: int
    load_faults: int
    gone: int
    erased: int
    erase_faults: int
    commits: int
    commit_faults: int
    quarantined: int
    segments_recycled: int
    def __init__(self, saved: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., packed: _Optional[int] = ..., dropped: _Optional[int] = ..., not_worth: _Optional[int] = ..., save_faults: _Optional[int] = ..., loaded: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., damaged: _Optional[int] = ..., load_faults: _Optional[int] = ..., gone: _Optional[int] = ..., erased: _Optional[int] = ..., erase_faults: _Optional[int] = ..., commits: _Optional[int] = ..., commit_faults: _Optional[int] = ..., quarantined: _Optional[int] = ..., segments_recycled: _Optional[int] = ...) -> None: ...

class Drive(_message.Message):
    __slots__ = ("directory", "state", "reason", "direct", "segments", "free_bytes", "capacity_bytes", "read_bytes", "written_bytes", "errors", "damaged")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    directory: str
    state: str
    reason: str
    direct: bool
    segments: int
    free_bytes: int
    capacity_bytes: int
    read_bytes: int
    written_bytes: int
    errors: int
    damaged: int
    def __init__(self, directory: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., direct: _Optional[bool] = ..., segments: _Optional[int] = ..., free_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., errors: _Optional[int] = ..., damaged: _Optional[int] = ...) -> None: ...

class Disk(_message.Message):
    __slots__ = ("state", "index_state", "index_reason", "rebuild_done_slots", "rebuild_total_slots", "rebuilt", "recovered_blocks", "orphan_blocks", "recovered_segments", "surplus_segments", "unknown_segments", "useless_records", "foreign_files", "foreign", "admission", "codec", "queued_chains", "running_bytes", "counters", "drives", "encryption", "unread_segments", "unread")
    STATE_FIELD_NUMBER: _ClassVar[int]
    INDEX_STATE_FIELD_NUMBER: _ClassVar[int]
    INDEX_REASON_FIELD_NUMBER: _ClassVar[int]
    REBUILD_DONE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    REBUILD_TOTAL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ORPHAN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RECOVERED_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    SURPLUS_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    USELESS_RECORDS_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FILES_FIELD_NUMBER: _ClassVar[int]
    FOREIGN_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    QUEUED_CHAINS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DRIVES_FIELD_NUMBER: _ClassVar[int]
    ENCRYPTION_FIELD_NUMBER: _ClassVar[int]
    UNREAD_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    state: str
    index_state: str
    index_reason: str
    rebuild_done_slots: int
    rebuild_total_slots: int
    rebuilt: str
    recovered_blocks: int
    orphan_blocks: int
    recovered_segments: int
    surplus_segments: int
    unknown_segments: int
    useless_records: int
    foreign_files: int
    foreign: _containers.RepeatedScalarFieldContainer[str]
    admission: str
    codec: str
    queued_chains: int
    running_bytes: int
    counters: DiskCounters
    drives: _containers.RepeatedCompositeFieldContainer[Drive]
    encryption: str
    unread_segments: int
    unread: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, state: _Optional[str] = ..., index_state: _Optional[str] = ..., index_reason: _Optional[str] = ..., rebuild_done_slots: _Optional[int] = ..., rebuild_total_slots: _Optional[int] = ..., rebuilt: _Optional[str] = ..., recovered_blocks: _Optional[int] = ..., orphan_blocks: _Optional[int] = ..., recovered_segments: _Optional[int] = ..., surplus_segments: _Optional[int] = ..., unknown_segments: _Optional[int] = ..., useless_records: _Optional[int] = ..., foreign_files: _Optional[int] = ..., foreign: _Optional[_Iterable[str]] = ..., admission: _Optional[str] = ..., codec: _Optional[str] = ..., queued_chains: _Optional[int] = ..., running_bytes: _Optional[int] = ..., counters: _Optional[_Union[DiskCounters, _Mapping[str, object]]] = ..., drives: _Optional[_Iterable[_Union[Drive, _Mapping[str, object]]]] = ..., encryption: _Optional[str] = ..., unread_segments: _Optional[int] = ..., unread: _Optional[_Iterable[str]] = ...) -> None: ...

class Restart(_message.Message):
    __slots__ = ("began", "reason", "found_blocks", "kept_blocks", "withheld_slots", "unverified_blocks", "verified_blocks", "verify_faults", "keeper")
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FOUND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_SLOTS_FIELD_NUMBER: _ClassVar[int]
    UNVERIFIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FAULTS_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    began: str
    reason: str
    found_blocks: int
    kept_blocks: int
    withheld_slots: int
    unverified_blocks: int
    verified_blocks: int
    verify_faults: int
    keeper: str
    def __init__(self, began: _Optional[str] = ..., reason: _Optional[str] = ..., found_blocks: _Optional[int] = ..., kept_blocks: _Optional[int] = ..., withheld_slots: _Optional[int] = ..., unverified_blocks: _Optional[int] = ..., verified_blocks: _Optional[int] = ..., verify_faults: _Optional[int] = ..., keeper: _Optional[str] = ...) -> None: ...

class Namespace(_message.Message):
    __slots__ = ("tenant", "digest", "model", "engine", "layout", "dtype", "revision", "adapter", "block_tokens", "block_bytes", "tp_rank", "tp_size", "pp_rank", "pp_size", "slot_bytes", "blocks", "bytes", "sessions", "prefill_reports", "saved_dram_s", "saved_disk_s", "codec")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_RANK_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_REPORTS_FIELD_NUMBER: _ClassVar[int]
    SAVED_DRAM_S_FIELD_NUMBER: _ClassVar[int]
    SAVED_DISK_S_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
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
    prefill_reports: int
    saved_dram_s: float
    saved_disk_s: float
    codec: str
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., layout: _Optional[str] = ..., dtype: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_rank: _Optional[int] = ..., pp_size: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., sessions: _Optional[int] = ..., prefill_reports: _Optional[int] = ..., saved_dram_s: _Optional[float] = ..., saved_disk_s: _Optional[float] = ..., codec: _Optional[str] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "uids", "assigned_bytes", "used_bytes", "stale_bytes", "blocks", "sessions", "prefill_reports", "saved_dram_s", "saved_disk_s", "dram_guaranteed_bytes", "dram_max_bytes", "disk_assigned_bytes", "disk_guaranteed_bytes", "disk_max_bytes", "pinned_bytes", "in_flight", "refused", "pinned_5m_bytes", "pinned_1h_bytes", "pinned_tool_bytes", "unused_dropped", "hit_dram_bytes", "hit_disk_bytes", "hit_hbm_bytes", "hbm_assigned_bytes", "hbm_used_bytes", "hbm_pinned_bytes", "hbm_guaranteed_bytes", "hbm_max_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UIDS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_REPORTS_FIELD_NUMBER: _ClassVar[int]
    SAVED_DRAM_S_FIELD_NUMBER: _ClassVar[int]
    SAVED_DISK_S_FIELD_NUMBER: _ClassVar[int]
    DRAM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_ASSIGNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PINNED_5M_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_1H_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_TOOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNUSED_DROPPED_FIELD_NUMBER: _ClassVar[int]
    HIT_DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_HBM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_ASSIGNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    uids: _containers.RepeatedScalarFieldContainer[int]
    assigned_bytes: int
    used_bytes: int
    stale_bytes: int
    blocks: int
    sessions: int
    prefill_reports: int
    saved_dram_s: float
    saved_disk_s: float
    dram_guaranteed_bytes: int
    dram_max_bytes: int
    disk_assigned_bytes: int
    disk_guaranteed_bytes: int
    disk_max_bytes: int
    pinned_bytes: int
    in_flight: int
    refused: int
    pinned_5m_bytes: int
    pinned_1h_bytes: int
    pinned_tool_bytes: int
    unused_dropped: int
    hit_dram_bytes: int
    hit_disk_bytes: int
    hit_hbm_bytes: int
    hbm_assigned_bytes: int
    hbm_used_bytes: int
    hbm_pinned_bytes: int
    hbm_guaranteed_bytes: int
    hbm_max_bytes: int
    def __init__(self, name: _Optional[str] = ..., uids: _Optional[_Iterable[int]] = ..., assigned_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., stale_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., sessions: _Optional[int] = ..., prefill_reports: _Optional[int] = ..., saved_dram_s: _Optional[float] = ..., saved_disk_s: _Optional[float] = ..., dram_guaranteed_bytes: _Optional[int] = ..., dram_max_bytes: _Optional[int] = ..., disk_assigned_bytes: _Optional[int] = ..., disk_guaranteed_bytes: _Optional[int] = ..., disk_max_bytes: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., in_flight: _Optional[int] = ..., refused: _Optional[int] = ..., pinned_5m_bytes: _Optional[int] = ..., pinned_1h_bytes: _Optional[int] = ..., pinned_tool_bytes: _Optional[int] = ..., unused_dropped: _Optional[int] = ..., hit_dram_bytes: _Optional[int] = ..., hit_disk_bytes: _Optional[int] = ..., hit_hbm_bytes: _Optional[int] = ..., hbm_assigned_bytes: _Optional[int] = ..., hbm_used_bytes: _Optional[int] = ..., hbm_pinned_bytes: _Optional[int] = ..., hbm_guaranteed_bytes: _Optional[int] = ..., hbm_max_bytes: _Optional[int] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("session", "name", "role", "mode", "tenant", "pid", "uid", "isolation", "connected_s", "ring_bytes", "ring_used_bytes", "tickets", "leases", "arenas_mapped", "namespaces", "requests")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_S_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    RING_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    ARENAS_MAPPED_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    session: int
    name: str
    role: str
    mode: str
    tenant: str
    pid: int
    uid: int
    isolation: str
    connected_s: float
    ring_bytes: int
    ring_used_bytes: int
    tickets: int
    leases: int
    arenas_mapped: int
    namespaces: int
    requests: int
    def __init__(self, session: _Optional[int] = ..., name: _Optional[str] = ..., role: _Optional[str] = ..., mode: _Optional[str] = ..., tenant: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., isolation: _Optional[str] = ..., connected_s: _Optional[float] = ..., ring_bytes: _Optional[int] = ..., ring_used_bytes: _Optional[int] = ..., tickets: _Optional[int] = ..., leases: _Optional[int] = ..., arenas_mapped: _Optional[int] = ..., namespaces: _Optional[int] = ..., requests: _Optional[int] = ...) -> None: ...

class ConfigValue(_message.Message):
    __slots__ = ("name", "value", "origin", "unit", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: str
    origin: str
    unit: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[str] = ..., origin: _Optional[str] = ..., unit: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Remote(_message.Message):
    __slots__ = ("url", "reading", "writing", "reason", "capacity_bytes", "used_bytes", "objects", "bytes_per_s", "sought", "sought_empty", "sought_dropped", "promoted", "promoted_bytes", "no_room", "kept", "kept_bytes", "not_worth", "not_kept", "shared", "removed", "damaged", "absent", "quarantined", "reads", "writes", "read_bytes", "written_bytes", "unreachable", "refused", "full", "queued_runs", "running", "owed", "not_noted", "not_remembered", "closed", "uncounted")
    URL_FIELD_NUMBER: _ClassVar[int]
    READING_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SOUGHT_FIELD_NUMBER: _ClassVar[int]
    SOUGHT_EMPTY_FIELD_NUMBER: _ClassVar[int]
    SOUGHT_DROPPED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    NO_ROOM_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    KEPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NOT_WORTH_FIELD_NUMBER: _ClassVar[int]
    NOT_KEPT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    QUEUED_RUNS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    OWED_FIELD_NUMBER: _ClassVar[int]
    NOT_NOTED_FIELD_NUMBER: _ClassVar[int]
    NOT_REMEMBERED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    UNCOUNTED_FIELD_NUMBER: _ClassVar[int]
    url: str
    reading: str
    writing: str
    reason: str
    capacity_bytes: int
    used_bytes: int
    objects: int
    bytes_per_s: int
    sought: int
    sought_empty: int
    sought_dropped: int
    promoted: int
    promoted_bytes: int
    no_room: int
    kept: int
    kept_bytes: int
    not_worth: int
    not_kept: int
    shared: int
    removed: int
    damaged: int
    absent: int
    quarantined: int
    reads: int
    writes: int
    read_bytes: int
    written_bytes: int
    unreachable: int
    refused: int
    full: int
    queued_runs: int
    running: int
    owed: int
    not_noted: int
    not_remembered: int
    closed: int
    uncounted: int
    def __init__(self, url: _Optional[str] = ..., reading: _Optional[str] = ..., writing: _Optional[str] = ..., reason: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., objects: _Optional[int] = ..., bytes_per_s: _Optional[int] = ..., sought: _Optional[int] = ..., sought_empty: _Optional[int] = ..., sought_dropped: _Optional[int] = ..., promoted: _Optional[int] = ..., promoted_bytes: _Optional[int] = ..., no_room: _Optional[int] = ..., kept: _Optional[int] = ..., kept_bytes: _Optional[int] = ..., not_worth: _Optional[int] = ..., not_kept: _Optional[int] = ..., shared: _Optional[int] = ..., removed: _Optional[int] = ..., damaged: _Optional[int] = ..., absent: _Optional[int] = ..., quarantined: _Optional[int] = ..., reads: _Optional[int] = ..., writes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., unreachable: _Optional[int] = ..., refused: _Optional[int] = ..., full: _Optional[int] = ..., queued_runs: _Optional[int] = ..., running: _Optional[int] = ..., owed: _Optional[int] = ..., not_noted: _Optional[int] = ..., not_remembered: _Optional[int] = ..., closed: _Optional[int] = ..., uncounted: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "emulated", "lost", "attached_bytes", "loads", "saves", "failed", "loaded_bytes", "saved_bytes", "hbm_bytes", "hbm_used_bytes", "hbm_hits", "hbm_promoted", "hbm_evicted", "hbm_blocks", "hbm_hit_bytes", "hbm_promoted_bytes", "hbm_unpinned", "hbm_evicted_after_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EMULATED_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    SAVES_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SAVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_HITS_FIELD_NUMBER: _ClassVar[int]
    HBM_PROMOTED_FIELD_NUMBER: _ClassVar[int]
    HBM_EVICTED_FIELD_NUMBER: _ClassVar[int]
    HBM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HBM_HIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_PROMOTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_UNPINNED_FIELD_NUMBER: _ClassVar[int]
    HBM_EVICTED_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    emulated: bool
    lost: bool
    attached_bytes: int
    loads: int
    saves: int
    failed: int
    loaded_bytes: int
    saved_bytes: int
    hbm_bytes: int
    hbm_used_bytes: int
    hbm_hits: int
    hbm_promoted: int
    hbm_evicted: int
    hbm_blocks: int
    hbm_hit_bytes: int
    hbm_promoted_bytes: int
    hbm_unpinned: int
    hbm_evicted_after_s: float
    def __init__(self, name: _Optional[str] = ..., emulated: _Optional[bool] = ..., lost: _Optional[bool] = ..., attached_bytes: _Optional[int] = ..., loads: _Optional[int] = ..., saves: _Optional[int] = ..., failed: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., saved_bytes: _Optional[int] = ..., hbm_bytes: _Optional[int] = ..., hbm_used_bytes: _Optional[int] = ..., hbm_hits: _Optional[int] = ..., hbm_promoted: _Optional[int] = ..., hbm_evicted: _Optional[int] = ..., hbm_blocks: _Optional[int] = ..., hbm_hit_bytes: _Optional[int] = ..., hbm_promoted_bytes: _Optional[int] = ..., hbm_unpinned: _Optional[int] = ..., hbm_evicted_after_s: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "pid", "uid", "started_unix_s", "uptime_s", "runtime_dir", "serving", "draining", "isolation", "warnings", "tiers", "tenants", "counters", "sessions", "namespaces", "disk", "restart", "remote", "devices")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_DIR_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    RESTART_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uid: int
    started_unix_s: float
    uptime_s: float
    runtime_dir: str
    serving: bool
    draining: bool
    isolation: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    tiers: _containers.RepeatedCompositeFieldContainer[Tier]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    counters: Counters
    sessions: int
    namespaces: int
    disk: Disk
    restart: Restart
    remote: Remote
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., started_unix_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., runtime_dir: _Optional[str] = ..., serving: _Optional[bool] = ..., draining: _Optional[bool] = ..., isolation: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., tiers: _Optional[_Iterable[_Union[Tier, _Mapping[str, object]]]] = ..., tenants: _Optional[_Iterable[_Union[Tenant, _Mapping[str, object]]]] = ..., counters: _Optional[_Union[Counters, _Mapping[str, object]]] = ..., sessions: _Optional[int] = ..., namespaces: _Optional[int] = ..., disk: _Optional[_Union[Disk, _Mapping[str, object]]] = ..., restart: _Optional[_Union[Restart, _Mapping[str, object]]] = ..., remote: _Optional[_Union[Remote, _Mapping[str, object]]] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping[str, object]]]] = ...) -> None: ...

class GetStatisticsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatisticsResponse(_message.Message):
    __slots__ = ("counters",)
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    counters: Counters
    def __init__(self, counters: _Optional[_Union[Counters, _Mapping[str, object]]] = ...) -> None: ...

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[Namespace]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[Namespace, _Mapping[str, object]]]] = ...) -> None: ...

class ListTenantsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTenantsResponse(_message.Message):
    __slots__ = ("tenants",)
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    tenants: _containers.RepeatedCompositeFieldContainer[Tenant]
    def __init__(self, tenants: _Optional[_Iterable[_Union[Tenant, _Mapping[str, object]]]] = ...) -> None: ...

class ListClientsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListClientsResponse(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    def __init__(self, clients: _Optional[_Iterable[_Union[Client, _Mapping[str, object]]]] = ...) -> None: ...

class GetConfigRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetConfigResponse(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: _containers.RepeatedCompositeFieldContainer[ConfigValue]
    def __init__(self, settings: _Optional[_Iterable[_Union[ConfigValue, _Mapping[str, object]]]] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("everything", "namespace_digest", "prefix", "tenant", "dry_run")
    class Everything(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    class Prefix(_message.Message):
        __slots__ = ("namespace_digest", "keys")
        NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
        KEYS_FIELD_NUMBER: _ClassVar[int]
        namespace_digest: str
        keys: _containers.RepeatedScalarFieldContainer[bytes]
        def __init__(self, namespace_digest: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    everything: ClearRequest.Everything
    namespace_digest: str
    prefix: ClearRequest.Prefix
    tenant: str
    dry_run: bool
    def __init__(self, everything: _Optional[_Union[ClearRequest.Everything, _Mapping[str, object]]] = ..., namespace_digest: _Optional[str] = ..., prefix: _Optional[_Union[ClearRequest.Prefix, _Mapping[str, object]]] = ..., tenant: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("blocks", "bytes", "leased_blocks", "pending_blocks", "dry_run", "remote_objects")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    REMOTE_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    leased_blocks: int
    pending_blocks: int
    dry_run: bool
    remote_objects: int
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., pending_blocks: _Optional[int] = ..., dry_run: _Optional[bool] = ..., remote_objects: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UndrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ScrubRequest(_message.Message):
    __slots__ = ("start", "rate_bytes_per_s", "tier")
    START_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    start: bool
    rate_bytes_per_s: int
    tier: str
    def __init__(self, start: _Optional[bool] = ..., rate_bytes_per_s: _Optional[int] = ..., tier: _Optional[str] = ...) -> None: ...

class ScrubResponse(_message.Message):
    __slots__ = ("running", "done_blocks", "total_blocks", "done_bytes", "damaged", "rate_bytes_per_s", "started_unix_s", "finished_unix_s")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    DONE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    running: bool
    done_blocks: int
    total_blocks: int
    done_bytes: int
    damaged: int
    rate_bytes_per_s: int
    started_unix_s: float
    finished_unix_s: float
    def __init__(self, running: _Optional[bool] = ..., done_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., done_bytes: _Optional[int] = ..., damaged: _Optional[int] = ..., rate_bytes_per_s: _Optional[int] = ..., started_unix_s: _Optional[float] = ..., finished_unix_s: _Optional[float] = ...) -> None: ...

class Prefill(_message.Message):
    __slots__ = ("cached_tokens", "new_tokens", "seconds")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    new_tokens: int
    seconds: float
    def __init__(self, cached_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("tokens", "dram_s", "disk_s", "recompute_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAM_S_FIELD_NUMBER: _ClassVar[int]
    DISK_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    dram_s: float
    disk_s: float
    recompute_s: float
    def __init__(self, tokens: _Optional[int] = ..., dram_s: _Optional[float] = ..., disk_s: _Optional[float] = ..., recompute_s: _Optional[float] = ...) -> None: ...

class NamespaceCosts(_message.Message):
    __slots__ = ("tenant", "digest", "model", "block_tokens", "block_bytes", "prefill_reports", "pass_s", "token_s", "pair_s", "block_s", "saved_dram_s", "saved_disk_s", "hit_blocks", "unpriced_blocks", "prefills", "runs")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_REPORTS_FIELD_NUMBER: _ClassVar[int]
    PASS_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    PAIR_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_S_FIELD_NUMBER: _ClassVar[int]
    SAVED_DRAM_S_FIELD_NUMBER: _ClassVar[int]
    SAVED_DISK_S_FIELD_NUMBER: _ClassVar[int]
    HIT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    UNPRICED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    model: str
    block_tokens: int
    block_bytes: int
    prefill_reports: int
    pass_s: float
    token_s: float
    pair_s: float
    block_s: float
    saved_dram_s: float
    saved_disk_s: float
    hit_blocks: int
    unpriced_blocks: int
    prefills: _containers.RepeatedCompositeFieldContainer[Prefill]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., model: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., prefill_reports: _Optional[int] = ..., pass_s: _Optional[float] = ..., token_s: _Optional[float] = ..., pair_s: _Optional[float] = ..., block_s: _Optional[float] = ..., saved_dram_s: _Optional[float] = ..., saved_disk_s: _Optional[float] = ..., hit_blocks: _Optional[int] = ..., unpriced_blocks: _Optional[int] = ..., prefills: _Optional[_Iterable[_Union[Prefill, _Mapping[str, object]]]] = ..., runs: _Optional[_Iterable[_Union[Run, _Mapping[str, object]]]] = ...) -> None: ...

class Way(_message.Message):
    __slots__ = ("tenant", "tier", "reports", "call_s", "bytes_per_s")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    CALL_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    tier: str
    reports: int
    call_s: float
    bytes_per_s: float
    def __init__(self, tenant: _Optional[str] = ..., tier: _Optional[str] = ..., reports: _Optional[int] = ..., call_s: _Optional[float] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class GetCostsRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ...) -> None: ...

class GetCostsResponse(_message.Message):
    __slots__ = ("namespaces", "more", "ways")
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceCosts]
    more: int
    ways: _containers.RepeatedCompositeFieldContainer[Way]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceCosts, _Mapping[str, object]]]] = ..., more: _Optional[int] = ..., ways: _Optional[_Iterable[_Union[Way, _Mapping[str, object]]]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("tier", "tenant", "rule", "chosen", "blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    tenant: str
    rule: str
    chosen: bool
    blocks: int
    def __init__(self, tier: _Optional[str] = ..., tenant: _Optional[str] = ..., rule: _Optional[str] = ..., chosen: _Optional[bool] = ..., blocks: _Optional[int] = ...) -> None: ...

class GetPolicyRequest(_message.Message):
    __slots__ = ("tier", "tenant")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tier: str
    tenant: str
    def __init__(self, tier: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class GetPolicyResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[Policy]
    def __init__(self, policies: _Optional[_Iterable[_Union[Policy, _Mapping[str, object]]]] = ...) -> None: ...

class SetPolicyRequest(_message.Message):
    __slots__ = ("tier", "tenant", "rule", "dry_run", "reset")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    tier: str
    tenant: str
    rule: str
    dry_run: bool
    reset: bool
    def __init__(self, tier: _Optional[str] = ..., tenant: _Optional[str] = ..., rule: _Optional[str] = ..., dry_run: _Optional[bool] = ..., reset: _Optional[bool] = ...) -> None: ...

class PolicyChange(_message.Message):
    __slots__ = ("policy", "former_rule")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    FORMER_RULE_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    former_rule: str
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping[str, object]]] = ..., former_rule: _Optional[str] = ...) -> None: ...

class SetPolicyResponse(_message.Message):
    __slots__ = ("changes", "dry_run")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[PolicyChange]
    dry_run: bool
    def __init__(self, changes: _Optional[_Iterable[_Union[PolicyChange, _Mapping[str, object]]]] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class Quota(_message.Message):
    __slots__ = ("tenant", "chosen", "dram_guaranteed_bytes", "dram_asked_bytes", "dram_max_bytes", "disk_guaranteed_bytes", "disk_asked_bytes", "disk_max_bytes", "pin_share", "pin_budget_bytes", "in_flight_max", "dram_max_asked_bytes", "disk_max_asked_bytes", "pin_5m_ttl_s", "pin_5m_share", "pin_1h_ttl_s", "pin_1h_share", "pin_tool_ttl_s", "pin_tool_share", "unused_ttl_s", "chosen_fields", "hbm_guaranteed_bytes", "hbm_max_bytes", "hbm_sure_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    DRAM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_ASKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_ASKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIN_SHARE_FIELD_NUMBER: _ClassVar[int]
    PIN_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_MAX_FIELD_NUMBER: _ClassVar[int]
    DRAM_MAX_ASKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_MAX_ASKED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIN_5M_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_5M_SHARE_FIELD_NUMBER: _ClassVar[int]
    PIN_1H_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_1H_SHARE_FIELD_NUMBER: _ClassVar[int]
    PIN_TOOL_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_TOOL_SHARE_FIELD_NUMBER: _ClassVar[int]
    UNUSED_TTL_S_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELDS_FIELD_NUMBER: _ClassVar[int]
    HBM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_SURE_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    chosen: bool
    dram_guaranteed_bytes: int
    dram_asked_bytes: int
    dram_max_bytes: int
    disk_guaranteed_bytes: int
    disk_asked_bytes: int
    disk_max_bytes: int
    pin_share: float
    pin_budget_bytes: int
    in_flight_max: int
    dram_max_asked_bytes: int
    disk_max_asked_bytes: int
    pin_5m_ttl_s: float
    pin_5m_share: float
    pin_1h_ttl_s: float
    pin_1h_share: float
    pin_tool_ttl_s: float
    pin_tool_share: float
    unused_ttl_s: float
    chosen_fields: _containers.RepeatedScalarFieldContainer[str]
    hbm_guaranteed_bytes: int
    hbm_max_bytes: int
    hbm_sure_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., chosen: _Optional[bool] = ..., dram_guaranteed_bytes: _Optional[int] = ..., dram_asked_bytes: _Optional[int] = ..., dram_max_bytes: _Optional[int] = ..., disk_guaranteed_bytes: _Optional[int] = ..., disk_asked_bytes: _Optional[int] = ..., disk_max_bytes: _Optional[int] = ..., pin_share: _Optional[float] = ..., pin_budget_bytes: _Optional[int] = ..., in_flight_max: _Optional[int] = ..., dram_max_asked_bytes: _Optional[int] = ..., disk_max_asked_bytes: _Optional[int] = ..., pin_5m_ttl_s: _Optional[float] = ..., pin_5m_share: _Optional[float] = ..., pin_1h_ttl_s: _Optional[float] = ..., pin_1h_share: _Optional[float] = ..., pin_tool_ttl_s: _Optional[float] = ..., pin_tool_share: _Optional[float] = ..., unused_ttl_s: _Optional[float] = ..., chosen_fields: _Optional[_Iterable[str]] = ..., hbm_guaranteed_bytes: _Optional[int] = ..., hbm_max_bytes: _Optional[int] = ..., hbm_sure_bytes: _Optional[int] = ...) -> None: ...

class GetQuotasRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class GetQuotasResponse(_message.Message):
    __slots__ = ("quotas",)
    QUOTAS_FIELD_NUMBER: _ClassVar[int]
    quotas: _containers.RepeatedCompositeFieldContainer[Quota]
    def __init__(self, quotas: _Optional[_Iterable[_Union[Quota, _Mapping[str, object]]]] = ...) -> None: ...

class SetQuotaRequest(_message.Message):
    __slots__ = ("tenant", "dram_guaranteed_bytes", "dram_max_bytes", "disk_guaranteed_bytes", "disk_max_bytes", "pin_share", "in_flight_max", "usual", "reset", "dry_run", "pin_5m_ttl_s", "pin_5m_share", "pin_1h_ttl_s", "pin_1h_share", "pin_tool_ttl_s", "pin_tool_share", "unused_ttl_s", "configured", "hbm_guaranteed_bytes", "hbm_max_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DRAM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIN_SHARE_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_MAX_FIELD_NUMBER: _ClassVar[int]
    USUAL_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    PIN_5M_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_5M_SHARE_FIELD_NUMBER: _ClassVar[int]
    PIN_1H_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_1H_SHARE_FIELD_NUMBER: _ClassVar[int]
    PIN_TOOL_TTL_S_FIELD_NUMBER: _ClassVar[int]
    PIN_TOOL_SHARE_FIELD_NUMBER: _ClassVar[int]
    UNUSED_TTL_S_FIELD_NUMBER: _ClassVar[int]
    CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    HBM_GUARANTEED_BYTES_FIELD_NUMBER: _ClassVar[int]
    HBM_MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    dram_guaranteed_bytes: int
    dram_max_bytes: int
    disk_guaranteed_bytes: int
    disk_max_bytes: int
    pin_share: float
    in_flight_max: int
    usual: _containers.RepeatedScalarFieldContainer[str]
    reset: bool
    dry_run: bool
    pin_5m_ttl_s: float
    pin_5m_share: float
    pin_1h_ttl_s: float
    pin_1h_share: float
    pin_tool_ttl_s: float
    pin_tool_share: float
    unused_ttl_s: float
    configured: _containers.RepeatedScalarFieldContainer[str]
    hbm_guaranteed_bytes: int
    hbm_max_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., dram_guaranteed_bytes: _Optional[int] = ..., dram_max_bytes: _Optional[int] = ..., disk_guaranteed_bytes: _Optional[int] = ..., disk_max_bytes: _Optional[int] = ..., pin_share: _Optional[float] = ..., in_flight_max: _Optional[int] = ..., usual: _Optional[_Iterable[str]] = ..., reset: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., pin_5m_ttl_s: _Optional[float] = ..., pin_5m_share: _Optional[float] = ..., pin_1h_ttl_s: _Optional[float] = ..., pin_1h_share: _Optional[float] = ..., pin_tool_ttl_s: _Optional[float] = ..., pin_tool_share: _Optional[float] = ..., unused_ttl_s: _Optional[float] = ..., configured: _Optional[_Iterable[str]] = ..., hbm_guaranteed_bytes: _Optional[int] = ..., hbm_max_bytes: _Optional[int] = ...) -> None: ...

class QuotaOfOther(_message.Message):
    __slots__ = ("quota", "former")
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    FORMER_FIELD_NUMBER: _ClassVar[int]
    quota: Quota
    former: Quota
    def __init__(self, quota: _Optional[_Union[Quota, _Mapping[str, object]]] = ..., former: _Optional[_Union[Quota, _Mapping[str, object]]] = ...) -> None: ...

class SetQuotaResponse(_message.Message):
    __slots__ = ("quota", "former", "dry_run", "others")
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    FORMER_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    quota: Quota
    former: Quota
    dry_run: bool
    others: _containers.RepeatedCompositeFieldContainer[QuotaOfOther]
    def __init__(self, quota: _Optional[_Union[Quota, _Mapping[str, object]]] = ..., former: _Optional[_Union[Quota, _Mapping[str, object]]] = ..., dry_run: _Optional[bool] = ..., others: _Optional[_Iterable[_Union[QuotaOfOther, _Mapping[str, object]]]] = ...) -> None: ...

class AdviseRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class Estimate(_message.Message):
    __slots__ = ("share", "error")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    share: float
    error: float
    def __init__(self, share: _Optional[float] = ..., error: _Optional[float] = ...) -> None: ...

class SizeChange(_message.Message):
    __slots__ = ("tier", "delta_bytes", "hit", "prefill_s_per_min", "prefill_error", "measurable")
    TIER_FIELD_NUMBER: _ClassVar[int]
    DELTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ERROR_FIELD_NUMBER: _ClassVar[int]
    MEASURABLE_FIELD_NUMBER: _ClassVar[int]
    tier: str
    delta_bytes: int
    hit: Estimate
    prefill_s_per_min: float
    prefill_error: float
    measurable: bool
    def __init__(self, tier: _Optional[str] = ..., delta_bytes: _Optional[int] = ..., hit: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., prefill_s_per_min: _Optional[float] = ..., prefill_error: _Optional[float] = ..., measurable: _Optional[bool] = ...) -> None: ...

class RuleTried(_message.Message):
    __slots__ = ("rule", "in_force", "hit", "hit_gain", "prefill_s_per_min", "prefill_error", "measurable", "blocks")
    RULE_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    HIT_FIELD_NUMBER: _ClassVar[int]
    HIT_GAIN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ERROR_FIELD_NUMBER: _ClassVar[int]
    MEASURABLE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    rule: str
    in_force: bool
    hit: Estimate
    hit_gain: Estimate
    prefill_s_per_min: float
    prefill_error: float
    measurable: bool
    blocks: int
    def __init__(self, rule: _Optional[str] = ..., in_force: _Optional[bool] = ..., hit: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., hit_gain: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., prefill_s_per_min: _Optional[float] = ..., prefill_error: _Optional[float] = ..., measurable: _Optional[bool] = ..., blocks: _Optional[int] = ...) -> None: ...

class CurvePoint(_message.Message):
    __slots__ = ("capacity_bytes", "hit_share", "saved_share")
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_SHARE_FIELD_NUMBER: _ClassVar[int]
    SAVED_SHARE_FIELD_NUMBER: _ClassVar[int]
    capacity_bytes: int
    hit_share: float
    saved_share: float
    def __init__(self, capacity_bytes: _Optional[int] = ..., hit_share: _Optional[float] = ..., saved_share: _Optional[float] = ...) -> None: ...

class AdviseResponse(_message.Message):
    __slots__ = ("tenant", "watched", "dram_bytes", "disk_bytes", "doubt", "span_s", "keys", "rate", "dram_hit", "hit", "hit_ceiling", "really_hit_share", "prefill_s_per_min", "saved_s_per_min", "savable_s_per_min", "priced", "changes", "rules", "points", "lost", "sentences")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WATCHED_FIELD_NUMBER: _ClassVar[int]
    DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DOUBT_FIELD_NUMBER: _ClassVar[int]
    SPAN_S_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    DRAM_HIT_FIELD_NUMBER: _ClassVar[int]
    HIT_FIELD_NUMBER: _ClassVar[int]
    HIT_CEILING_FIELD_NUMBER: _ClassVar[int]
    REALLY_HIT_SHARE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    SAVED_S_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    SAVABLE_S_PER_MIN_FIELD_NUMBER: _ClassVar[int]
    PRICED_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    POINTS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    SENTENCES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    watched: bool
    dram_bytes: int
    disk_bytes: int
    doubt: str
    span_s: float
    keys: int
    rate: float
    dram_hit: Estimate
    hit: Estimate
    hit_ceiling: Estimate
    really_hit_share: float
    prefill_s_per_min: float
    saved_s_per_min: float
    savable_s_per_min: float
    priced: bool
    changes: _containers.RepeatedCompositeFieldContainer[SizeChange]
    rules: _containers.RepeatedCompositeFieldContainer[RuleTried]
    points: _containers.RepeatedCompositeFieldContainer[CurvePoint]
    lost: int
    sentences: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant: _Optional[str] = ..., watched: _Optional[bool] = ..., dram_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., doubt: _Optional[str] = ..., span_s: _Optional[float] = ..., keys: _Optional[int] = ..., rate: _Optional[float] = ..., dram_hit: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., hit: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., hit_ceiling: _Optional[_Union[Estimate, _Mapping[str, object]]] = ..., really_hit_share: _Optional[float] = ..., prefill_s_per_min: _Optional[float] = ..., saved_s_per_min: _Optional[float] = ..., savable_s_per_min: _Optional[float] = ..., priced: _Optional[bool] = ..., changes: _Optional[_Iterable[_Union[SizeChange, _Mapping[str, object]]]] = ..., rules: _Optional[_Iterable[_Union[RuleTried, _Mapping[str, object]]]] = ..., points: _Optional[_Iterable[_Union[CurvePoint, _Mapping[str, object]]]] = ..., lost: _Optional[int] = ..., sentences: _Optional[_Iterable[str]] = ...) -> None: ...

class ExplainMissRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "keys")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Elsewhere(_message.Message):
    __slots__ = ("tenant", "digest", "differs")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIFFERS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    differs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., differs: _Optional[_Iterable[str]] = ...) -> None: ...

class ExplainMissResponse(_message.Message):
    __slots__ = ("tenant", "digest", "asked", "found", "on_disk", "state", "key", "cause", "tier", "rule", "age_s", "known_s", "elsewhere", "sentences")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    KNOWN_S_FIELD_NUMBER: _ClassVar[int]
    ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    SENTENCES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    asked: int
    found: int
    on_disk: int
    state: str
    key: str
    cause: str
    tier: str
    rule: str
    age_s: float
    known_s: float
    elsewhere: _containers.RepeatedCompositeFieldContainer[Elsewhere]
    sentences: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., asked: _Optional[int] = ..., found: _Optional[int] = ..., on_disk: _Optional[int] = ..., state: _Optional[str] = ..., key: _Optional[str] = ..., cause: _Optional[str] = ..., tier: _Optional[str] = ..., rule: _Optional[str] = ..., age_s: _Optional[float] = ..., known_s: _Optional[float] = ..., elsewhere: _Optional[_Iterable[_Union[Elsewhere, _Mapping[str, object]]]] = ..., sentences: _Optional[_Iterable[str]] = ...) -> None: ...

class Program(_message.Message):
    __slots__ = ("tenant", "program", "state", "tool", "tool_s", "turns", "context_blocks", "pinned_blocks", "pinned_bytes", "pinned_s")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    TOOL_S_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_S_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    program: str
    state: str
    tool: str
    tool_s: float
    turns: int
    context_blocks: int
    pinned_blocks: int
    pinned_bytes: int
    pinned_s: float
    def __init__(self, tenant: _Optional[str] = ..., program: _Optional[str] = ..., state: _Optional[str] = ..., tool: _Optional[str] = ..., tool_s: _Optional[float] = ..., turns: _Optional[int] = ..., context_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., pinned_s: _Optional[float] = ...) -> None: ...

class HintCounters(_message.Message):
    __slots__ = ("hints", "refused", "said_blocks", "pinned", "gave_way", "fetches")
    HINTS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SAID_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    GAVE_WAY_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    hints: int
    refused: int
    said_blocks: int
    pinned: int
    gave_way: int
    fetches: int
    def __init__(self, hints: _Optional[int] = ..., refused: _Optional[int] = ..., said_blocks: _Optional[int] = ..., pinned: _Optional[int] = ..., gave_way: _Optional[int] = ..., fetches: _Optional[int] = ...) -> None: ...

class ListProgramsRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListProgramsResponse(_message.Message):
    __slots__ = ("programs", "programs_total", "counters")
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    programs: _containers.RepeatedCompositeFieldContainer[Program]
    programs_total: int
    counters: HintCounters
    def __init__(self, programs: _Optional[_Iterable[_Union[Program, _Mapping[str, object]]]] = ..., programs_total: _Optional[int] = ..., counters: _Optional[_Union[HintCounters, _Mapping[str, object]]] = ...) -> None: ...

class ListedWorkflow(_message.Message):
    __slots__ = ("tenant", "workflow", "version", "steps", "runs")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    workflow: str
    version: int
    steps: int
    runs: int
    def __init__(self, tenant: _Optional[str] = ..., workflow: _Optional[str] = ..., version: _Optional[int] = ..., steps: _Optional[int] = ..., runs: _Optional[int] = ...) -> None: ...

class WorkflowRun(_message.Message):
    __slots__ = ("tenant", "run", "workflow", "running", "near", "bound_steps")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    NEAR_FIELD_NUMBER: _ClassVar[int]
    BOUND_STEPS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    run: str
    workflow: str
    running: _containers.RepeatedScalarFieldContainer[str]
    near: _containers.RepeatedScalarFieldContainer[str]
    bound_steps: int
    def __init__(self, tenant: _Optional[str] = ..., run: _Optional[str] = ..., workflow: _Optional[str] = ..., running: _Optional[_Iterable[str]] = ..., near: _Optional[_Iterable[str]] = ..., bound_steps: _Optional[int] = ...) -> None: ...

class ListWorkflowsRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListWorkflowsResponse(_message.Message):
    __slots__ = ("workflows", "runs", "runs_total")
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    RUNS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedCompositeFieldContainer[ListedWorkflow]
    runs: _containers.RepeatedCompositeFieldContainer[WorkflowRun]
    runs_total: int
    def __init__(self, workflows: _Optional[_Iterable[_Union[ListedWorkflow, _Mapping[str, object]]]] = ..., runs: _Optional[_Iterable[_Union[WorkflowRun, _Mapping[str, object]]]] = ..., runs_total: _Optional[int] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("owner_s",)
    OWNER_S_FIELD_NUMBER: _ClassVar[int]
    owner_s: float
    def __init__(self, owner_s: _Optional[float] = ...) -> None: ...

class ListedPin(_message.Message):
    __slots__ = ("pin", "tenant", "namespace_digest", "blocks", "bytes", "left_s", "refresh", "owner")
    PIN_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    pin: int
    tenant: str
    namespace_digest: str
    blocks: int
    bytes: int
    left_s: float
    refresh: bool
    owner: str
    def __init__(self, pin: _Optional[int] = ..., tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., left_s: _Optional[float] = ..., refresh: _Optional[bool] = ..., owner: _Optional[str] = ...) -> None: ...

class PinBudget(_message.Message):
    __slots__ = ("tenant", "pins", "used_bytes", "budget_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    pins: int
    used_bytes: int
    budget_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., pins: _Optional[int] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class PinCounters(_message.Message):
    __slots__ = ("pinned", "unpinned", "expired", "refreshed", "dropped", "over_budget", "prefetches", "prefetches_refused", "prefetches_merged", "prefetches_cancelled", "prefetches_late", "prefetched_bytes", "prefetched_used_bytes", "prefetched_wasted_bytes", "gave_way")
    PINNED_FIELD_NUMBER: _ClassVar[int]
    UNPINNED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    REFRESHED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_REFUSED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_MERGED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_LATE_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_WASTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    GAVE_WAY_FIELD_NUMBER: _ClassVar[int]
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
    gave_way: int
    def __init__(self, pinned: _Optional[int] = ..., unpinned: _Optional[int] = ..., expired: _Optional[int] = ..., refreshed: _Optional[int] = ..., dropped: _Optional[int] = ..., over_budget: _Optional[int] = ..., prefetches: _Optional[int] = ..., prefetches_refused: _Optional[int] = ..., prefetches_merged: _Optional[int] = ..., prefetches_cancelled: _Optional[int] = ..., prefetches_late: _Optional[int] = ..., prefetched_bytes: _Optional[int] = ..., prefetched_used_bytes: _Optional[int] = ..., prefetched_wasted_bytes: _Optional[int] = ..., gave_way: _Optional[int] = ...) -> None: ...

class ListPinsRequest(_message.Message):
    __slots__ = ("tenant",)
    TENANT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    def __init__(self, tenant: _Optional[str] = ...) -> None: ...

class ListPinsResponse(_message.Message):
    __slots__ = ("pins", "pins_total", "budgets", "counters")
    PINS_FIELD_NUMBER: _ClassVar[int]
    PINS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    pins: _containers.RepeatedCompositeFieldContainer[ListedPin]
    pins_total: int
    budgets: _containers.RepeatedCompositeFieldContainer[PinBudget]
    counters: PinCounters
    def __init__(self, pins: _Optional[_Iterable[_Union[ListedPin, _Mapping[str, object]]]] = ..., pins_total: _Optional[int] = ..., budgets: _Optional[_Iterable[_Union[PinBudget, _Mapping[str, object]]]] = ..., counters: _Optional[_Union[PinCounters, _Mapping[str, object]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("tenant", "pins")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    pins: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tenant: _Optional[str] = ..., pins: _Optional[_Iterable[int]] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("ended", "unknown")
    ENDED_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    ended: int
    unknown: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ended: _Optional[int] = ..., unknown: _Optional[_Iterable[int]] = ...) -> None: ...

class Prefix(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "keys")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("prefix", "ttl_s", "on_disk", "refresh")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    ttl_s: float
    on_disk: bool
    refresh: bool
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, object]]] = ..., ttl_s: _Optional[float] = ..., on_disk: _Optional[bool] = ..., refresh: _Optional[bool] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pin", "blocks", "bytes", "why_not_all")
    PIN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    WHY_NOT_ALL_FIELD_NUMBER: _ClassVar[int]
    pin: int
    blocks: int
    bytes: int
    why_not_all: str
    def __init__(self, pin: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., why_not_all: _Optional[str] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("prefix", "within_s")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    within_s: float
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, object]]] = ..., within_s: _Optional[float] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("there", "coming")
    THERE_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    there: int
    coming: int
    def __init__(self, there: _Optional[int] = ..., coming: _Optional[int] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("everything", "namespace_digest", "prefix", "tenant", "dry_run", "tier", "bytes", "exactly")
    EVERYTHING_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EXACTLY_FIELD_NUMBER: _ClassVar[int]
    everything: ClearRequest.Everything
    namespace_digest: str
    prefix: ClearRequest.Prefix
    tenant: str
    dry_run: bool
    tier: str
    bytes: int
    exactly: bool
    def __init__(self, everything: _Optional[_Union[ClearRequest.Everything, _Mapping[str, object]]] = ..., namespace_digest: _Optional[str] = ..., prefix: _Optional[_Union[ClearRequest.Prefix, _Mapping[str, object]]] = ..., tenant: _Optional[str] = ..., dry_run: _Optional[bool] = ..., tier: _Optional[str] = ..., bytes: _Optional[int] = ..., exactly: _Optional[bool] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("blocks", "bytes", "kept_blocks", "held_blocks", "pinned_blocks", "dry_run")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    kept_blocks: int
    held_blocks: int
    pinned_blocks: int
    dry_run: bool
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., kept_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., pinned_blocks: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class WalkBlocksRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "after")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    after: int
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class WalkBlocksResponse(_message.Message):
    __slots__ = ("identity", "keys", "parents", "next")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    identity: bytes
    keys: bytes
    parents: bytes
    next: int
    def __init__(self, identity: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., parents: _Optional[bytes] = ..., next: _Optional[int] = ...) -> None: ...

class Act(_message.Message):
    __slots__ = ("unix_s", "uid", "pid", "who", "verb", "scope", "blocks", "bytes", "outcome")
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    unix_s: float
    uid: int
    pid: int
    who: str
    verb: str
    scope: str
    blocks: int
    bytes: int
    outcome: str
    def __init__(self, unix_s: _Optional[float] = ..., uid: _Optional[int] = ..., pid: _Optional[int] = ..., who: _Optional[str] = ..., verb: _Optional[str] = ..., scope: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., outcome: _Optional[str] = ...) -> None: ...

class ListActsRequest(_message.Message):
    __slots__ = ("most",)
    MOST_FIELD_NUMBER: _ClassVar[int]
    most: int
    def __init__(self, most: _Optional[int] = ...) -> None: ...

class ListActsResponse(_message.Message):
    __slots__ = ("acts", "path", "lost")
    ACTS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    acts: _containers.RepeatedCompositeFieldContainer[Act]
    path: str
    lost: int
    def __init__(self, acts: _Optional[_Iterable[_Union[Act, _Mapping[str, object]]]] = ..., path: _Optional[str] = ..., lost: _Optional[int] = ...) -> None: ...

class HandOverRequest(_message.Message):
    __slots__ = ("prefix", "within_s", "dry_run", "looked_within_s")
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LOOKED_WITHIN_S_FIELD_NUMBER: _ClassVar[int]
    prefix: Prefix
    within_s: float
    dry_run: bool
    looked_within_s: float
    def __init__(self, prefix: _Optional[_Union[Prefix, _Mapping[str, object]]] = ..., within_s: _Optional[float] = ..., dry_run: _Optional[bool] = ..., looked_within_s: _Optional[float] = ...) -> None: ...

class HandOverResponse(_message.Message):
    __slots__ = ("blocks", "bytes", "there", "coming", "remote", "dry_run", "looked", "why")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    THERE_FIELD_NUMBER: _ClassVar[int]
    COMING_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    LOOKED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    there: int
    coming: int
    remote: bool
    dry_run: bool
    looked: int
    why: str
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., there: _Optional[int] = ..., coming: _Optional[int] = ..., remote: _Optional[bool] = ..., dry_run: _Optional[bool] = ..., looked: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class NoteTransferRequest(_message.Message):
    __slots__ = ("verb", "tenant", "namespace_digest", "blocks", "bytes")
    VERB_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    verb: str
    tenant: str
    namespace_digest: str
    blocks: int
    bytes: int
    def __init__(self, verb: _Optional[str] = ..., tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class NoteTransferResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Block(_message.Message):
    __slots__ = ("key", "state", "in_dram", "on_disk", "slot_bytes", "age_s", "hits", "pins", "holds", "leased_s", "parent", "in_hbm")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IN_DRAM_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    LEASED_S_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    IN_HBM_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    state: str
    in_dram: bool
    on_disk: bool
    slot_bytes: int
    age_s: float
    hits: int
    pins: int
    holds: int
    leased_s: float
    parent: bytes
    in_hbm: bool
    def __init__(self, key: _Optional[bytes] = ..., state: _Optional[str] = ..., in_dram: _Optional[bool] = ..., on_disk: _Optional[bool] = ..., slot_bytes: _Optional[int] = ..., age_s: _Optional[float] = ..., hits: _Optional[int] = ..., pins: _Optional[int] = ..., holds: _Optional[int] = ..., leased_s: _Optional[float] = ..., parent: _Optional[bytes] = ..., in_hbm: _Optional[bool] = ...) -> None: ...

class ListBlocksRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "cursor", "limit")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    cursor: int
    limit: int
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., cursor: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListBlocksResponse(_message.Message):
    __slots__ = ("tenant", "digest", "blocks", "next_cursor")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_CURSOR_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    next_cursor: int
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping[str, object]]]] = ..., next_cursor: _Optional[int] = ...) -> None: ...

class GetTreeRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "key", "depth", "width", "limit", "by")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    key: bytes
    depth: int
    width: int
    limit: int
    by: str
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., key: _Optional[bytes] = ..., depth: _Optional[int] = ..., width: _Optional[int] = ..., limit: _Optional[int] = ..., by: _Optional[str] = ...) -> None: ...

class TreeNode(_message.Message):
    __slots__ = ("level", "first_key", "last_key", "before_blocks", "run_blocks", "blocks", "dram_blocks", "disk_blocks", "total_bytes", "hits", "age_s", "pinned_blocks", "held_blocks", "branches", "longest_blocks")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    FIRST_KEY_FIELD_NUMBER: _ClassVar[int]
    LAST_KEY_FIELD_NUMBER: _ClassVar[int]
    BEFORE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUN_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    PINNED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BRANCHES_FIELD_NUMBER: _ClassVar[int]
    LONGEST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    level: int
    first_key: bytes
    last_key: bytes
    before_blocks: int
    run_blocks: int
    blocks: int
    dram_blocks: int
    disk_blocks: int
    total_bytes: int
    hits: int
    age_s: float
    pinned_blocks: int
    held_blocks: int
    branches: int
    longest_blocks: int
    def __init__(self, level: _Optional[int] = ..., first_key: _Optional[bytes] = ..., last_key: _Optional[bytes] = ..., before_blocks: _Optional[int] = ..., run_blocks: _Optional[int] = ..., blocks: _Optional[int] = ..., dram_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., total_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., age_s: _Optional[float] = ..., pinned_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., branches: _Optional[int] = ..., longest_blocks: _Optional[int] = ...) -> None: ...

class GetTreeResponse(_message.Message):
    __slots__ = ("tenant", "digest", "block_tokens", "nodes", "roots", "blocks", "bytes", "runs", "changed_blocks")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ROOTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    CHANGED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    block_tokens: int
    nodes: _containers.RepeatedCompositeFieldContainer[TreeNode]
    roots: int
    blocks: int
    bytes: int
    runs: int
    changed_blocks: int
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., block_tokens: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[TreeNode, _Mapping[str, object]]]] = ..., roots: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., runs: _Optional[int] = ..., changed_blocks: _Optional[int] = ...) -> None: ...

class StatPrefixRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "keys")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class FindKeysRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "beginnings")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BEGINNINGS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    beginnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., beginnings: _Optional[_Iterable[str]] = ...) -> None: ...

class FoundKeys(_message.Message):
    __slots__ = ("keys", "more")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    more: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., more: _Optional[bool] = ...) -> None: ...

class FindKeysResponse(_message.Message):
    __slots__ = ("tenant", "digest", "found")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    found: _containers.RepeatedCompositeFieldContainer[FoundKeys]
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., found: _Optional[_Iterable[_Union[FoundKeys, _Mapping[str, object]]]] = ...) -> None: ...

class KeptBy(_message.Message):
    __slots__ = ("number", "blocks", "left_s", "owner")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEFT_S_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    number: int
    blocks: int
    left_s: float
    owner: str
    def __init__(self, number: _Optional[int] = ..., blocks: _Optional[int] = ..., left_s: _Optional[float] = ..., owner: _Optional[str] = ...) -> None: ...

class StatPrefixResponse(_message.Message):
    __slots__ = ("tenant", "digest", "block_tokens", "blocks", "found_blocks", "dram_blocks", "disk_blocks", "bytes", "pins", "leases", "pins_total", "leases_total", "quality", "hbm_blocks")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FOUND_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PINS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LEASES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    HBM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    digest: str
    block_tokens: int
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    found_blocks: int
    dram_blocks: int
    disk_blocks: int
    bytes: int
    pins: _containers.RepeatedCompositeFieldContainer[KeptBy]
    leases: _containers.RepeatedCompositeFieldContainer[KeptBy]
    pins_total: int
    leases_total: int
    quality: str
    hbm_blocks: int
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., block_tokens: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping[str, object]]]] = ..., found_blocks: _Optional[int] = ..., dram_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., pins: _Optional[_Iterable[_Union[KeptBy, _Mapping[str, object]]]] = ..., leases: _Optional[_Iterable[_Union[KeptBy, _Mapping[str, object]]]] = ..., pins_total: _Optional[int] = ..., leases_total: _Optional[int] = ..., quality: _Optional[str] = ..., hbm_blocks: _Optional[int] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("after", "follow", "kinds", "last", "warnings")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    after: int
    follow: bool
    kinds: _containers.RepeatedScalarFieldContainer[str]
    last: int
    warnings: bool
    def __init__(self, after: _Optional[int] = ..., follow: _Optional[bool] = ..., kinds: _Optional[_Iterable[str]] = ..., last: _Optional[int] = ..., warnings: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("number", "unix_s", "kind", "warning", "text", "tenant", "count", "bytes", "lost", "lost_at_most")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    LOST_AT_MOST_FIELD_NUMBER: _ClassVar[int]
    number: int
    unix_s: float
    kind: str
    warning: bool
    text: str
    tenant: str
    count: int
    bytes: int
    lost: int
    lost_at_most: bool
    def __init__(self, number: _Optional[int] = ..., unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., warning: _Optional[bool] = ..., text: _Optional[str] = ..., tenant: _Optional[str] = ..., count: _Optional[int] = ..., bytes: _Optional[int] = ..., lost: _Optional[int] = ..., lost_at_most: _Optional[bool] = ...) -> None: ...

class WatchBlocksRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "start_from", "follow")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FROM_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    start_from: int
    follow: bool
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., start_from: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class BlockChanges(_message.Message):
    __slots__ = ("number", "next", "unix_s", "tenant", "namespace_digest", "cleared", "there", "changes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    UNIX_S_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    THERE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    number: int
    next: int
    unix_s: float
    tenant: str
    namespace_digest: str
    cleared: bool
    there: bool
    changes: _containers.RepeatedCompositeFieldContainer[BlockChange]
    def __init__(self, number: _Optional[int] = ..., next: _Optional[int] = ..., unix_s: _Optional[float] = ..., tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., cleared: _Optional[bool] = ..., there: _Optional[bool] = ..., changes: _Optional[_Iterable[_Union[BlockChange, _Mapping[str, object]]]] = ...) -> None: ...

class BlockChange(_message.Message):
    __slots__ = ("key", "parent", "dram", "disk", "was_dram", "was_disk", "remote", "was_remote")
    KEY_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DRAM_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    WAS_DRAM_FIELD_NUMBER: _ClassVar[int]
    WAS_DISK_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    WAS_REMOTE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    parent: bytes
    dram: bool
    disk: bool
    was_dram: bool
    was_disk: bool
    remote: bool
    was_remote: bool
    def __init__(self, key: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., dram: _Optional[bool] = ..., disk: _Optional[bool] = ..., was_dram: _Optional[bool] = ..., was_disk: _Optional[bool] = ..., remote: _Optional[bool] = ..., was_remote: _Optional[bool] = ...) -> None: ...

class SummariseMatchRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digests", "keys")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digests: _containers.RepeatedScalarFieldContainer[str]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, tenant: _Optional[str] = ..., namespace_digests: _Optional[_Iterable[str]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SummariseMatchResponse(_message.Message):
    __slots__ = ("tenant", "blocks", "dram_blocks", "disk_blocks", "pending_blocks", "dram_bytes", "disk_bytes", "load_s", "recompute_s", "block_tokens", "hbm_blocks", "hbm_bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DISK_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HBM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HBM_BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    blocks: int
    dram_blocks: int
    disk_blocks: int
    pending_blocks: int
    dram_bytes: int
    disk_bytes: int
    load_s: float
    recompute_s: float
    block_tokens: int
    hbm_blocks: int
    hbm_bytes: int
    def __init__(self, tenant: _Optional[str] = ..., blocks: _Optional[int] = ..., dram_blocks: _Optional[int] = ..., disk_blocks: _Optional[int] = ..., pending_blocks: _Optional[int] = ..., dram_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., recompute_s: _Optional[float] = ..., block_tokens: _Optional[int] = ..., hbm_blocks: _Optional[int] = ..., hbm_bytes: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TierLoad(_message.Message):
    __slots__ = ("name", "capacity_bytes", "used_bytes", "blocks", "read_bytes_per_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    read_bytes_per_s: float
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., read_bytes_per_s: _Optional[float] = ...) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("draining", "clients", "tickets", "leases", "waiting_leases", "queued_chains", "running_bytes", "tiers", "remote")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    TICKETS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    WAITING_LEASES_FIELD_NUMBER: _ClassVar[int]
    QUEUED_CHAINS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    clients: int
    tickets: int
    leases: int
    waiting_leases: int
    queued_chains: int
    running_bytes: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierLoad]
    remote: RemoteLoad
    def __init__(self, draining: _Optional[bool] = ..., clients: _Optional[int] = ..., tickets: _Optional[int] = ..., leases: _Optional[int] = ..., waiting_leases: _Optional[int] = ..., queued_chains: _Optional[int] = ..., running_bytes: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierLoad, _Mapping[str, object]]]] = ..., remote: _Optional[_Union[RemoteLoad, _Mapping[str, object]]] = ...) -> None: ...

class RemoteLoad(_message.Message):
    __slots__ = ("reading", "writing", "capacity_bytes", "used_bytes", "read_bytes_per_s")
    READING_FIELD_NUMBER: _ClassVar[int]
    WRITING_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    reading: str
    writing: str
    capacity_bytes: int
    used_bytes: int
    read_bytes_per_s: float
    def __init__(self, reading: _Optional[str] = ..., writing: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., read_bytes_per_s: _Optional[float] = ...) -> None: ...

class EstimateAdmissionRequest(_message.Message):
    __slots__ = ("tenant", "namespace_digest", "bytes")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    namespace_digest: str
    bytes: int
    def __init__(self, tenant: _Optional[str] = ..., namespace_digest: _Optional[str] = ..., bytes: _Optional[int] = ...) -> None: ...

class EstimateAdmissionResponse(_message.Message):
    __slots__ = ("wanted_blocks", "free_blocks", "evicted_blocks", "evicted_bytes", "kept_blocks", "lost_s", "unpriced_blocks", "short_blocks", "from_others", "other_sizes_bytes")
    WANTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEPT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LOST_S_FIELD_NUMBER: _ClassVar[int]
    UNPRICED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHORT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FROM_OTHERS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SIZES_BYTES_FIELD_NUMBER: _ClassVar[int]
    wanted_blocks: int
    free_blocks: int
    evicted_blocks: int
    evicted_bytes: int
    kept_blocks: int
    lost_s: float
    unpriced_blocks: int
    short_blocks: int
    from_others: bool
    other_sizes_bytes: int
    def __init__(self, wanted_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., evicted_blocks: _Optional[int] = ..., evicted_bytes: _Optional[int] = ..., kept_blocks: _Optional[int] = ..., lost_s: _Optional[float] = ..., unpriced_blocks: _Optional[int] = ..., short_blocks: _Optional[int] = ..., from_others: _Optional[bool] = ..., other_sizes_bytes: _Optional[int] = ...) -> None: ...
