# Written by proto/generate.py with grpcio-tools 1.85.1; change control.proto instead.
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(_message.Message):
    __slots__ = ("name", "capacity_bytes", "assigned_bytes", "used_bytes", "blocks", "arenas", "arena_bytes", "populated_bytes", "locked_bytes", "stale_bytes")
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
    def __init__(self, name: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., assigned_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., arenas: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., populated_bytes: _Optional[int] = ..., locked_bytes: _Optional[int] = ..., stale_bytes: _Optional[int] = ...) -> None: ...

class Counters(_message.Message):
    __slots__ = ("leases", "lease_hits", "lease_misses", "matches", "match_hits", "match_misses", "granted", "known", "pending", "refused_full", "refused_busy", "refused_quota", "refused_no_parent", "refused_draining", "published", "published_bytes", "stale", "discarded", "evicted", "deleted", "arenas_recycled", "leases_expired", "sessions_opened", "sessions_failed", "faults", "lease_disk_hits")
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
    def __init__(self, leases: _Optional[int] = ..., lease_hits: _Optional[int] = ..., lease_misses: _Optional[int] = ..., matches: _Optional[int] = ..., match_hits: _Optional[int] = ..., match_misses: _Optional[int] = ..., granted: _Optional[int] = ..., known: _Optional[int] = ..., pending: _Optional[int] = ..., refused_full: _Optional[int] = ..., refused_busy: _Optional[int] = ..., refused_quota: _Optional[int] = ..., refused_no_parent: _Optional[int] = ..., refused_draining: _Optional[int] = ..., published: _Optional[int] = ..., published_bytes: _Optional[int] = ..., stale: _Optional[int] = ..., discarded: _Optional[int] = ..., evicted: _Optional[int] = ..., deleted: _Optional[int] = ..., arenas_recycled: _Optional[int] = ..., leases_expired: _Optional[int] = ..., sessions_opened: _Optional[int] = ..., sessions_failed: _Optional[int] = ..., faults: _Optional[int] = ..., lease_disk_hits: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("state", "index_state", "index_reason", "rebuild_done_slots", "rebuild_total_slots", "rebuilt", "recovered_blocks", "orphan_blocks", "recovered_segments", "surplus_segments", "unknown_segments", "useless_records", "foreign_files", "foreign", "admission", "codec", "queued_chains", "running_bytes", "counters", "drives")
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
    def __init__(self, state: _Optional[str] = ..., index_state: _Optional[str] = ..., index_reason: _Optional[str] = ..., rebuild_done_slots: _Optional[int] = ..., rebuild_total_slots: _Optional[int] = ..., rebuilt: _Optional[str] = ..., recovered_blocks: _Optional[int] = ..., orphan_blocks: _Optional[int] = ..., recovered_segments: _Optional[int] = ..., surplus_segments: _Optional[int] = ..., unknown_segments: _Optional[int] = ..., useless_records: _Optional[int] = ..., foreign_files: _Optional[int] = ..., foreign: _Optional[_Iterable[str]] = ..., admission: _Optional[str] = ..., codec: _Optional[str] = ..., queued_chains: _Optional[int] = ..., running_bytes: _Optional[int] = ..., counters: _Optional[_Union[DiskCounters, _Mapping[str, object]]] = ..., drives: _Optional[_Iterable[_Union[Drive, _Mapping[str, object]]]] = ...) -> None: ...

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
    __slots__ = ("tenant", "digest", "model", "engine", "layout", "dtype", "revision", "adapter", "block_tokens", "block_bytes", "tp_rank", "tp_size", "pp_rank", "pp_size", "slot_bytes", "blocks", "bytes", "sessions")
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
    def __init__(self, tenant: _Optional[str] = ..., digest: _Optional[str] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., layout: _Optional[str] = ..., dtype: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ..., block_tokens: _Optional[int] = ..., block_bytes: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_rank: _Optional[int] = ..., pp_size: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., sessions: _Optional[int] = ...) -> None: ...

class Tenant(_message.Message):
    __slots__ = ("name", "uids", "assigned_bytes", "used_bytes", "stale_bytes", "blocks", "sessions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UIDS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    uids: _containers.RepeatedScalarFieldContainer[int]
    assigned_bytes: int
    used_bytes: int
    stale_bytes: int
    blocks: int
    sessions: int
    def __init__(self, name: _Optional[str] = ..., uids: _Optional[_Iterable[int]] = ..., assigned_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., stale_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., sessions: _Optional[int] = ...) -> None: ...

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

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("version", "pid", "uid", "started_unix_s", "uptime_s", "runtime_dir", "serving", "draining", "isolation", "warnings", "tiers", "tenants", "counters", "sessions", "namespaces", "disk", "restart")
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
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uid: _Optional[int] = ..., started_unix_s: _Optional[float] = ..., uptime_s: _Optional[float] = ..., runtime_dir: _Optional[str] = ..., serving: _Optional[bool] = ..., draining: _Optional[bool] = ..., isolation: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., tiers: _Optional[_Iterable[_Union[Tier, _Mapping[str, object]]]] = ..., tenants: _Optional[_Iterable[_Union[Tenant, _Mapping[str, object]]]] = ..., counters: _Optional[_Union[Counters, _Mapping[str, object]]] = ..., sessions: _Optional[int] = ..., namespaces: _Optional[int] = ..., disk: _Optional[_Union[Disk, _Mapping[str, object]]] = ..., restart: _Optional[_Union[Restart, _Mapping[str, object]]] = ...) -> None: ...

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
    __slots__ = ("blocks", "bytes", "leased_blocks", "pending_blocks", "dry_run")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PENDING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    bytes: int
    leased_blocks: int
    pending_blocks: int
    dry_run: bool
    def __init__(self, blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., leased_blocks: _Optional[int] = ..., pending_blocks: _Optional[int] = ..., dry_run: _Optional[bool] = ...) -> None: ...

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
    __slots__ = ("start", "rate_bytes_per_s")
    START_FIELD_NUMBER: _ClassVar[int]
    RATE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    start: bool
    rate_bytes_per_s: int
    def __init__(self, start: _Optional[bool] = ..., rate_bytes_per_s: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("tier", "tenant", "rule", "dry_run")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    tier: str
    tenant: str
    rule: str
    dry_run: bool
    def __init__(self, tier: _Optional[str] = ..., tenant: _Optional[str] = ..., rule: _Optional[str] = ..., dry_run: _Optional[bool] = ...) -> None: ...

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

class PingRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PingResponse(_message.Message):
    __slots__ = ("owner_s",)
    OWNER_S_FIELD_NUMBER: _ClassVar[int]
    owner_s: float
    def __init__(self, owner_s: _Optional[float] = ...) -> None: ...
