"""Every setting of the daemon in one table: what it is called, what it may be, what it is where nobody says, and why.

`config.py` finds their values.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from kvproto import limits
from kvproto.trace_ids import ONE_IN_MAX
from kvstore.rules import Rule
from kvstored.block_events_address import ANY_TENANT, FORMS, HASHES, events_listen_kind, events_tenant_kind, topic_kind
from kvstored.control_address import control_listen_kind
from kvstored.control_kinds import NO_GROUP, group_kind
from kvstored.device_names import NO_DEVICES, devices_kind
from kvstored.drive_asking import ask_each
from kvstored.http_address import OFF, listen_kind
from kvstored.otlp_address import otlp_kind
from kvstored.placement import AUTO, numa_kind
from kvstored.remote_address import NONE, endpoint_kind, region_kind, remote_kind
from kvstored.units import (
    NO_FILE,
    Kind,
    count_kind,
    duration_kind,
    file_kind,
    folder_kind,
    folders_kind,
    size_kind,
    switch_kind,
    word_kind,
)

T = TypeVar("T")

SEGMENTS_LEAST: Final = 2  # one is filled while another is emptied
SEGMENTS_LOOKED_AT: Final = 64  # of a directory, for the size of those that are there

# A Unix socket path holds 107 bytes and a NUL: 90 of folder, a slash, 16 of file name.
RUNTIME_DIR_BYTES: Final = 90
SYSTEM_RUNTIME_DIR: Final = Path("/run/kvstored")

DISK_DIRECTORIES: Final = 16
DISK_PATH_BYTES: Final = 1024  # PATH_MAX is 4,096, and names come behind it; 16 of them go into one answer
SEGMENT_BYTES_MAX: Final = 64 * limits.GIB  # as an arena
DISK_BYTES_MAX: Final = limits.SEGMENTS * SEGMENT_BYTES_MAX
REMOTE_BYTES_MAX: Final = 1 << 60
NUMBERS: Final = 2**32 - 1  # of slots in DRAM and on disk; the last one means nobody (`kvstore/blocks.py`)
# Words of `kvstore.tier`, which this file does not import: it brings numba, and `config check` shall not wait for that.
ADMISSIONS: Final = ("all", "second_touch", "none")
CODECS: Final = ("auto", "raw", "bf16-planes+zstd")
SCRUBS: Final = ("writable", "all")
RULES: Final = tuple(rule.value for rule in Rule)


@dataclass(frozen=True, slots=True)
class Basis:
    """What defaults are worked out from. The sizes are 0 until they are decided."""

    environ: Mapping[str, str]
    memory_bytes: int
    cpus: int
    dram_bytes: int = 0
    arena_bytes: int = 0
    disk_bytes: int = 0
    runtime_dir: Path = Path()
    disk_directories: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """One knob. `name` is the field of `Config`, `toml` the SECTION.KEY in the file; `kind` parses it."""

    name: str
    toml: str
    env: str
    flag: str
    kind: Kind[T]
    default: Callable[[Basis], T]
    unit: str
    reason: str

    @property
    def range(self) -> str:
        """What is allowed, in words."""
        return self.kind.range


def _default_runtime_dir(basis: Basis) -> Path:
    granted = basis.environ.get("RUNTIME_DIRECTORY", "").split(":")  # by systemd; the first of several is ours
    if granted[0]:
        return Path(granted[0])
    if os.access(SYSTEM_RUNTIME_DIR, os.W_OK | os.X_OK):
        return SYSTEM_RUNTIME_DIR
    session = basis.environ.get("XDG_RUNTIME_DIR")
    if session:
        return Path(session) / "kvstored"
    # Never /tmp: anyone may have put a folder of that name there first. Without HOME, `~` is refused.
    return Path(basis.environ.get("HOME") or "~") / ".local/state/kvstored/run"


def _default_state_dir(basis: Basis) -> Path:
    granted = basis.environ.get("STATE_DIRECTORY", "").split(":")  # by systemd; the first of several is ours
    return Path(granted[0]) if granted[0] else basis.runtime_dir


def _default_dram_bytes(basis: Basis) -> int:
    quarter_bytes = basis.memory_bytes // 4
    arena_bytes = limits.arena_bytes_for(quarter_bytes)
    return max(quarter_bytes - quarter_bytes % arena_bytes, arena_bytes)


def _default_segment_bytes(basis: Basis) -> int:
    """That of the segments that are there, or a tier that grows or shrinks would lose them. Else as `limits` has it,
    doubled where large arenas leave too few numbers for so many segments.
    """
    there_bytes = _segment_bytes_there(basis)
    if there_bytes:
        return there_bytes
    usual_bytes = limits.segment_bytes_for(basis.disk_bytes)
    candidates = (usual_bytes << doublings for doublings in range((SEGMENT_BYTES_MAX // usual_bytes).bit_length()))
    fitting = (
        one
        for one in candidates
        if numbers_needed(basis.dram_bytes, basis.arena_bytes, basis.disk_bytes, one) < NUMBERS
    )
    return next(fitting, usual_bytes)


def _segment_bytes_there(basis: Basis) -> int:
    """The size of most of the first segment files, if this tier can have such; else 0."""
    sizes: Counter[int] = Counter()
    for answer in ask_each(basis.disk_directories, _sizes_in).values():
        with suppress(OSError):  # it is told of when it is used
            sizes.update(answer.result() if answer.done() else ())
    fitting = [size for size, _ in sizes.most_common() if _may_be_segment(size, basis)]
    return fitting[0] if fitting else 0


def _sizes_in(directory: Path) -> list[int]:
    """Of its first segment files. Raises OSError; does not return while its drive hangs."""
    files = islice((directory / "segments").glob("[0-9]*.seg"), SEGMENTS_LOOKED_AT)
    return [file.stat().st_size for file in files]


def _may_be_segment(size: int, basis: Basis) -> bool:
    few = SEGMENTS_LEAST <= basis.disk_bytes // max(1, size) <= limits.SEGMENTS
    sized = limits.SEGMENT_BYTES_SMALL <= size <= SEGMENT_BYTES_MAX and size % limits.PAGE_BYTES == 0
    return few and sized and numbers_needed(basis.dram_bytes, basis.arena_bytes, basis.disk_bytes, size) < NUMBERS


def numbers_needed(dram_bytes: int, arena_bytes: int, disk_bytes: int, segment_bytes: int) -> int:
    """Slot numbers that arenas and segments need: as many for each as for the one with most (`kvstore/tables.py`)."""
    most = max(arena_bytes // limits.PAGE_BYTES, segment_bytes // limits.DISK_SLOT_BYTES_MIN)
    each = 1 << (most - 1).bit_length()
    return (dram_bytes // arena_bytes + disk_bytes // segment_bytes + 1) * each


# fmt: off
DRAM: Final = Setting(
    "dram_bytes", "dram.size", "KVSTORED_DRAM", "--dram",
    size_kind(limits.MIB, limits.ARENAS * limits.ARENA_BYTES_MAX), _default_dram_bytes, "bytes",
    "memory for blocks, in whole arenas: at least one, never more than the machine has")
ARENA: Final = Setting(
    "arena_bytes", "dram.arena", "KVSTORED_ARENA", "--arena",
    size_kind(limits.MIB, limits.ARENA_BYTES_MAX, multiple_bytes=limits.PAGE_BYTES),
    lambda basis: limits.arena_bytes_for(basis.dram_bytes), "bytes",
    f"memory moves between tenants by the arena; each is a descriptor, so at most {limits.ARENAS} of them")
PREFAULT: Final = Setting(
    "prefault", "dram.prefault", "KVSTORED_PREFAULT", "--prefault",
    switch_kind(), lambda _: True, "switch",
    "touch memory ahead of use, so that no copy waits for page faults")
LOCK: Final = Setting(
    "lock", "dram.lock", "KVSTORED_LOCK", "--lock",
    switch_kind(), lambda _: True, "switch",
    "keep blocks out of swap with mlock, as far as RLIMIT_MEMLOCK allows")
DRAM_SCRUB: Final = Setting(
    "dram_scrub", "dram.scrub", "KVSTORED_DRAM_SCRUB", "--dram-scrub",
    word_kind(*SCRUBS), lambda _: "writable", "which",
    "which memory is hashed again in the background: that which clients could write to themselves, or all")
DRAM_SCRUB_RATE: Final = Setting(
    "dram_scrub_rate", "dram.scrub_rate", "KVSTORED_DRAM_SCRUB_RATE", "--dram-scrub-rate",
    size_kind(0, limits.KIB * limits.GIB), lambda _: 100 * limits.MIB, "bytes per second",
    "finds blocks that were changed after they were published; about 1 % of a core; 0 for only when kvctl scrub asks")
HUGE_PAGES: Final = Setting(
    "huge_pages", "dram.huge_pages", "KVSTORED_HUGE_PAGES", "--huge-pages",
    switch_kind(), lambda _: True, "switch",
    "blocks and rings lie in huge pages where the kernel has any: drives and clients are faster, and so is the start")
NUMA: Final = Setting(
    "numa", "dram.numa", "KVSTORED_NUMA", "--numa",
    numa_kind(), lambda _: AUTO, "nodes",
    "on which NUMA nodes arenas lie, as many on each; auto: on all that have memory, where there are several")
RING: Final = Setting(
    "ring_bytes", "clients.ring", "KVSTORED_RING", "--ring",
    size_kind(limits.MIB, limits.RING_BYTES_MAX, multiple_bytes=limits.PAGE_BYTES),
    lambda _: limits.RING_BYTES, "bytes",
    "one for each engine, holds blocks on their way in; only what was written to is resident")
TICKET_TTL: Final = Setting(
    "ticket_ttl_s", "clients.ticket_ttl", "KVSTORED_TICKET_TTL", "--ticket-ttl",
    duration_kind(0.01, 600.0), lambda _: limits.TICKET_TTL_NS / 1e9, "seconds",
    "how long a client that stopped between reserve and commit may keep a key to itself")
LEASE_TTL_MAX: Final = Setting(
    "lease_ttl_max_s", "clients.lease_ttl_max", "KVSTORED_LEASE_TTL_MAX", "--lease-ttl-max",
    duration_kind(2 * limits.LEASE_MARGIN_NS / 1e9, limits.LEASE_TTL_NS_MAX / 1e9),
    lambda _: limits.LEASE_TTL_NS_MAX / 1e9, "seconds",
    "how long a lost client may keep memory from being reused; at least twice the safety margin of a lease")
RUNTIME_DIR: Final = Setting(
    "runtime_dir", "daemon.runtime_dir", "KVSTORED_RUNTIME_DIR", "--runtime-dir",
    folder_kind(RUNTIME_DIR_BYTES), _default_runtime_dir, "path",
    "where the sockets live; a Unix socket path holds 107 bytes, names included")
LEAF_THREADS: Final = Setting(
    "leaf_threads", "daemon.leaf_threads", "KVSTORED_LEAF_THREADS", "--leaf-threads",
    count_kind(1, 64), lambda basis: min(4, basis.cpus), "threads",
    "copy and hash run here; the engines on this host need the other cores")
LOG_LEVEL: Final = Setting(
    "log_level", "daemon.log_level", "KVSTORED_LOG_LEVEL", "--log-level",
    word_kind("debug", "info", "warning", "error"), lambda _: "info", "level",
    "the least severe event that is logged")
KEEP: Final = Setting(
    "keep", "daemon.keep", "KVSTORED_KEEP", "--keep",
    switch_kind(), lambda _: False, "switch",
    "hold memory over a restart in a small process of our own, where systemd's descriptor store does not already")
KEEP_PATIENCE: Final = Setting(
    "keep_patience_s", "daemon.keep_patience", "KVSTORED_KEEP_PATIENCE", "--keep-patience",
    duration_kind(1.0, 86_400.0), lambda _: 600.0, "seconds",
    "how long that process holds all of DRAM for a successor that may never come")
STOP_WITHIN: Final = Setting(
    "stop_within_s", "daemon.stop_within", "KVSTORED_STOP_WITHIN", "--stop-within",
    duration_kind(0.0, 3600.0), lambda _: 5.0, "seconds",
    "how long a stop waits for what is being stored, written and erased; new blocks are refused meanwhile")
DISK: Final = Setting(
    "disk_directories", "disk.directories", "KVSTORED_DISK", "--disk",
    folders_kind(DISK_PATH_BYTES, DISK_DIRECTORIES), lambda _: (), "paths",
    "blocks live on here when DRAM is full; one directory a drive, the first has the index; none: no disk tier")
DISK_SIZE: Final = Setting(
    "disk_bytes", "disk.size", "KVSTORED_DISK_SIZE", "--disk-size",
    size_kind(0, DISK_BYTES_MAX), lambda _: 0, "bytes",
    "in all directories together; has no default, so that no drive is filled by surprise")
DISK_SEGMENT: Final = Setting(
    "segment_bytes", "disk.segment", "KVSTORED_DISK_SEGMENT", "--disk-segment",
    size_kind(limits.SEGMENT_BYTES_SMALL, SEGMENT_BYTES_MAX, multiple_bytes=limits.PAGE_BYTES),
    _default_segment_bytes, "bytes",
    "tenants and slot sizes share the disk by the file of this size")
DISK_ADMISSION: Final = Setting(
    "disk_admission", "disk.admission", "KVSTORED_DISK_ADMISSION", "--disk-admission",
    word_kind(*ADMISSIONS), lambda _: "second_touch", "policy",
    "which blocks are written unasked: all, those that were fetched at least once, or none; a flush writes any")
DISK_WRITE_RATE: Final = Setting(
    "disk_write_rate", "disk.write_rate", "KVSTORED_DISK_WRITE_RATE", "--disk-write-rate",
    size_kind(0, limits.KIB * limits.GIB), lambda _: 0, "bytes per second",
    "spares drives that wear out: what does not fit is not written; 0 for as fast as it goes")
DISK_CODEC: Final = Setting(
    "disk_codec", "disk.codec", "KVSTORED_DISK_CODEC", "--disk-codec",
    word_kind(*CODECS), lambda _: "auto", "codec",
    "packs blocks on their way to disk, without loss; auto: where it pays and processors are idle")
DISK_READERS: Final = Setting(
    "disk_readers", "disk.readers", "KVSTORED_DISK_READERS", "--disk-readers",
    count_kind(1, 32), lambda _: 8, "threads",
    "for each directory; a drive wants several requests at a time, and other threads verify what came")
DISK_WRITERS: Final = Setting(
    "disk_writers", "disk.writers", "KVSTORED_DISK_WRITERS", "--disk-writers",
    count_kind(1, 32), lambda _: 12, "threads",
    "for each directory; they also erase, and make and remove segments")
DISK_PACKERS: Final = Setting(
    "disk_packers", "disk.packers", "KVSTORED_DISK_PACKERS", "--disk-packers",
    count_kind(1, 32), lambda _: 1, "threads",
    "for all directories; they pack blocks and verify those kept over a restart, with low priority")
DISK_SCRUB_RATE: Final = Setting(
    "disk_scrub_rate", "disk.scrub_rate", "KVSTORED_DISK_SCRUB_RATE", "--disk-scrub-rate",
    size_kind(0, limits.KIB * limits.GIB), lambda _: 10 * limits.MIB, "bytes per second",
    "reads what lies on disk in the background and finds what has decayed; 0 for only when kvctl scrub asks")
DISK_KEY_FILE: Final = Setting(
    "disk_key_file", "disk.key_file", "KVSTORED_DISK_KEY_FILE", "--disk-key-file",
    file_kind(DISK_PATH_BYTES), lambda _: NO_FILE, "path",
    "blocks on disk are encrypted with the first key in this file; those under others that it has are read")
POLICY_DRAM: Final = Setting(
    "policy_dram", "policy.dram", "KVSTORED_POLICY_DRAM", "--policy-dram",
    word_kind(*RULES), lambda _: Rule.DENSITY.value, "rule",
    "who is evicted from memory first; what `kvctl policy set` chose wins until a cold start")
POLICY_DISK: Final = Setting(
    "policy_disk", "policy.disk", "KVSTORED_POLICY_DISK", "--policy-disk",
    word_kind(*RULES), lambda _: Rule.LRU.value, "rule",
    "who is evicted from disk first; what `kvctl policy set` chose wins until a cold start")
INSIGHT_CURVES: Final = Setting(
    "insight_curves", "insight.curves", "KVSTORED_INSIGHT_CURVES", "--insight-curves",
    switch_kind(), lambda _: True, "switch",
    "watches what is asked for, so that `kvctl advise` can say what more memory would bring; under 1 % of a core")
METRICS_LISTEN: Final = Setting(
    "metrics_listen", "metrics.listen", "KVSTORED_METRICS_LISTEN", "--metrics-listen",
    listen_kind(), lambda _: OFF, "address",
    "serves /metrics, /healthz and /readyz; only to this host, since nobody is asked who they are")
STATE_DIR: Final = Setting(
    "state_dir", "daemon.state_dir", "KVSTORED_STATE_DIR", "--state-dir",
    folder_kind(DISK_PATH_BYTES), _default_state_dir, "path",
    "where the audit file lies; outlives a restart of the machine where systemd grants it")
ADMIN_GROUP: Final = Setting(
    "admin_group", "control.admin_group", "KVSTORED_ADMIN_GROUP", "--admin-group",
    group_kind(), lambda _: NO_GROUP, "group",
    "its members may act on the control socket, as root and the daemon's user may; the daemon must be one of them")
TENANT_CONTROL: Final = Setting(
    "tenant_control", "control.tenants", "KVSTORED_TENANT_CONTROL", "--tenant-control",
    switch_kind(), lambda _: False, "switch",
    "everybody may see what their own tenants have, and nothing else, through tenants.sock")
CONTROL_LISTEN: Final = Setting(
    "control_listen", "control.listen", "KVSTORED_CONTROL_LISTEN", "--control-listen",
    control_listen_kind(), lambda _: OFF, "address",
    "for operators of other hosts, by mutual TLS only: needs the three files that follow")
CONTROL_CERTIFICATE: Final = Setting(
    "control_certificate", "control.certificate", "KVSTORED_CONTROL_CERTIFICATE", "--control-certificate",
    file_kind(DISK_PATH_BYTES), lambda _: NO_FILE, "path",
    "of this daemon, PEM, with what leads to its authority; read again for each connection")
CONTROL_KEY: Final = Setting(
    "control_key", "control.key", "KVSTORED_CONTROL_KEY", "--control-key",
    file_kind(DISK_PATH_BYTES), lambda _: NO_FILE, "path",
    "of that certificate, PEM; nobody but its owner may read it")
CONTROL_CLIENT_CA: Final = Setting(
    "control_client_ca", "control.client_ca", "KVSTORED_CONTROL_CLIENT_CA", "--control-client-ca",
    file_kind(DISK_PATH_BYTES), lambda _: NO_FILE, "path",
    "whoever has a certificate of this authority, PEM, acts as an operator: an authority for that alone")
GPU_DEVICES: Final = Setting(
    "gpu_devices", "gpu.devices", "KVSTORED_GPU_DEVICES", "--gpu-devices",
    devices_kind(), lambda _: NO_DEVICES, "devices",
    "the daemon itself copies between its memory and these GPUs (mode daemon); each takes a CUDA context of ours")
GPU_HBM: Final = Setting(
    "gpu_hbm_bytes", "gpu.hbm", "KVSTORED_GPU_HBM", "--gpu-hbm",
    size_kind(0, limits.ARENA_BYTES_MAX * limits.ARENAS), lambda _: 0, "bytes",
    "of each GPU's memory, for copies of blocks that are loaded again and again; what engines lack then; 0: none")
TRACE_OTLP: Final = Setting(
    "trace_otlp", "trace.otlp", "KVSTORED_TRACE_OTLP", "--trace-otlp",
    otlp_kind(), lambda _: OFF, "address",
    "sends OpenTelemetry spans of leases to a collector: numbers and sizes, no keys; needs the packages of [otel]")
TRACE_ONE_IN: Final = Setting(
    "trace_one_in", "trace.one_in", "KVSTORED_TRACE_ONE_IN", "--trace-one-in",
    count_kind(1, ONE_IN_MAX), lambda _: 100, "leases",
    "of so many one is traced, always the same as by clients that were told the same; a span takes the owner 30 us")
EVENTS_LISTEN: Final = Setting(
    "events_listen", "events.listen", "KVSTORED_EVENTS_LISTEN", "--events-listen",
    events_listen_kind(), lambda _: OFF, "address",
    "tells routers which blocks come, move and go: on the control socket, or in vLLM's schema on ZeroMQ too")
EVENTS_ROUTABLE: Final = Setting(
    "events_routable", "events.routable", "KVSTORED_EVENTS_ROUTABLE", "--events-routable",
    switch_kind(), lambda _: False, "switch",
    "events.listen may be an address that other hosts can reach: whoever does reads which blocks are here, unasked")
EVENTS_TENANT: Final = Setting(
    "events_tenant", "events.tenant", "KVSTORED_EVENTS_TENANT", "--events-tenant",
    events_tenant_kind(), lambda _: ANY_TENANT, "name",
    "whose blocks are told of on ZeroMQ; an address is for one tenant, so that none sees another's")
EVENTS_TOPIC: Final = Setting(
    "events_topic", "events.topic", "KVSTORED_EVENTS_TOPIC", "--events-topic",
    topic_kind(), lambda _: "kv@{host}@{model}", "text",
    "what subscribers choose by; llm-d reads the name of a pod and of a model in it")
EVENTS_HASHES: Final = Setting(
    "events_hashes", "events.hashes", "KVSTORED_EVENTS_HASHES", "--events-hashes",
    word_kind(*HASHES), lambda _: HASHES[0], "form",
    "how keys are written: their last 64 bits as a number, as vLLM does unless told otherwise, or all of them")
EVENTS_FORM: Final = Setting(
    "events_form", "events.form", "KVSTORED_EVENTS_FORM", "--events-form",
    word_kind(*FORMS), lambda _: FORMS[0], "form",
    "how events are written: as maps, as vLLM does today, or as arrays, which older consumers read")
EVENTS_REPLAY: Final = Setting(
    "events_replay", "events.replay", "KVSTORED_EVENTS_REPLAY", "--events-replay",
    count_kind(1, 1_000_000), lambda _: 10_000, "batches",
    "of each tenant so many are remembered for who missed them, in 64 MiB at most, and in 256 MiB those of all tenants")
EVENTS_HIGH_WATER: Final = Setting(
    "events_high_water", "events.high_water", "KVSTORED_EVENTS_HIGH_WATER", "--events-high-water",
    count_kind(1, 1_000_000), lambda _: 1000, "batches",
    "wait for a subscriber on ZeroMQ that is slow; what comes then it misses, and can have replayed")
REMOTE: Final = Setting(
    "remote_url", "remote.url", "KVSTORED_REMOTE", "--remote",
    remote_kind(), lambda _: OFF, "address",
    "a bucket that keeps blocks for all hosts that name it; who we are is said in the environment, as AWS has it")
REMOTE_ENDPOINT: Final = Setting(
    "remote_endpoint", "remote.endpoint", "KVSTORED_REMOTE_ENDPOINT", "--remote-endpoint",
    endpoint_kind(), lambda _: NONE, "address",
    "of a server that speaks S3; none: AWS's own")
REMOTE_REGION: Final = Setting(
    "remote_region", "remote.region", "KVSTORED_REMOTE_REGION", "--remote-region",
    region_kind(), lambda _: NONE, "region",
    "where the bucket is; none: what AWS_REGION in the environment says")
REMOTE_PYTHON: Final = Setting(
    "remote_python", "remote.python", "KVSTORED_REMOTE_PYTHON", "--remote-python",
    file_kind(DISK_PATH_BYTES), lambda _: NO_FILE, "path",
    "of the interpreter whose environment has Mooncake's package, for its client; none: the daemon's own")
REMOTE_SIZE: Final = Setting(
    "remote_bytes", "remote.size", "KVSTORED_REMOTE_SIZE", "--remote-size",
    size_kind(0, REMOTE_BYTES_MAX), lambda _: 0, "bytes",
    "what this host may have written there; the oldest goes first; has no default, so that no bill is a surprise")
REMOTE_ADMISSION: Final = Setting(
    "remote_admission", "remote.admission", "KVSTORED_REMOTE_ADMISSION", "--remote-admission",
    word_kind(*ADMISSIONS), lambda _: "second_touch", "policy",
    "which blocks are written there: all, those that were fetched at least once, or none")
REMOTE_DEADLINE: Final = Setting(
    "remote_deadline_s", "remote.deadline", "KVSTORED_REMOTE_DEADLINE", "--remote-deadline",
    duration_kind(0.1, 300.0), lambda _: 10.0, "seconds",
    "how long one request may take; nobody who stores or fetches waits for it")
REMOTE_CONNECTIONS: Final = Setting(
    "remote_connections", "remote.connections", "KVSTORED_REMOTE_CONNECTIONS", "--remote-connections",
    count_kind(1, 64), lambda _: 8, "requests",
    "that read at a time, for all chains together")
# fmt: on

AnySetting: TypeAlias = (
    Setting[Path] | Setting[tuple[Path, ...]] | Setting[str] | Setting[int] | Setting[bool] | Setting[float]
)
SETTINGS: Final[tuple[AnySetting, ...]] = (
    DRAM, ARENA, PREFAULT, LOCK, HUGE_PAGES, NUMA, DRAM_SCRUB, DRAM_SCRUB_RATE, RING, TICKET_TTL, LEASE_TTL_MAX,
    RUNTIME_DIR, LEAF_THREADS, LOG_LEVEL, KEEP, KEEP_PATIENCE, STOP_WITHIN, DISK, DISK_SIZE, DISK_SEGMENT,
    DISK_ADMISSION, DISK_WRITE_RATE, DISK_CODEC, DISK_READERS, DISK_WRITERS, DISK_PACKERS, DISK_SCRUB_RATE,
    DISK_KEY_FILE, POLICY_DRAM, POLICY_DISK, INSIGHT_CURVES, METRICS_LISTEN, STATE_DIR, ADMIN_GROUP, TENANT_CONTROL,
    CONTROL_LISTEN, CONTROL_CERTIFICATE, CONTROL_KEY, CONTROL_CLIENT_CA, GPU_DEVICES, GPU_HBM, TRACE_OTLP,
    TRACE_ONE_IN, EVENTS_LISTEN, EVENTS_ROUTABLE,
    EVENTS_TENANT, EVENTS_TOPIC, EVENTS_HASHES, EVENTS_FORM, EVENTS_REPLAY, EVENTS_HIGH_WATER,
    REMOTE, REMOTE_ENDPOINT, REMOTE_REGION, REMOTE_PYTHON, REMOTE_SIZE, REMOTE_ADMISSION, REMOTE_DEADLINE,
    REMOTE_CONNECTIONS,
)  # fmt: skip
