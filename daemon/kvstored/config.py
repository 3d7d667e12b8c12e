"""How the value of every setting (`settings.py`) is found.

    defaults  <  one TOML file  <  environment (KVSTORED_*)  <  flags

Each layer is checked even where a later one overrides it: a mistake in the file stops the start today and
not on the day the flag is dropped. All trouble is a `ConfigError`, and the process ends with `EX_CONFIG`.

    [daemon]
    leaf_threads = 4
    [dram]
    size = "64GiB"
    [disk]                          # without directories there is no disk tier
    directories = ["/mnt/nvme0/kv", "/mnt/nvme1/kv"]
    size = "2TiB"
    [policy]                        # who is evicted first
    dram = "lru"
    [tenants.research]              # HELLO may name it; the first tenant that lists a uid is its default
    uids = [1001, 1002]             # a uid that no tenant lists gets a tenant of its own, uid-N
    trusting = true                 # its engines may write into its memory themselves (mode direct)
    dram_guaranteed = "16GiB"       # and other quotas: quota_keys.py
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from kvproto import limits
from kvproto.sizes import format_bytes, parse_bytes, parse_seconds
from kvstore.quotas import USUAL, Capacity, Quota
from kvstore.report import ConfigValue
from kvstore.rules import Tier
from kvstored.block_events_address import EventsConfig, check_events
from kvstored.control_address import TlsFiles
from kvstored.host_limits import Limit, memory_limit
from kvstored.http_address import OFF
from kvstored.key_file import KeyRing, read_keys
from kvstored.layers import TENANTS, Given, TenantConfig, read_layers
from kvstored.otlp_address import missing_packages
from kvstored.placement import NoSuchNodeError, Topology, plan
from kvstored.quota_keys import check_all
from kvstored.remote_address import MOONCAKE, RemoteAddress, missing_package, parse_remote
from kvstored.secret_files import SecretFileError
from kvstored.settings import (
    ADMIN_GROUP,
    ARENA,
    CONTROL_CERTIFICATE,
    CONTROL_CLIENT_CA,
    CONTROL_KEY,
    CONTROL_LISTEN,
    DISK,
    DISK_ADMISSION,
    DISK_CODEC,
    DISK_KEY_FILE,
    DISK_PACKERS,
    DISK_READERS,
    DISK_SCRUB_RATE,
    DISK_SEGMENT,
    DISK_SIZE,
    DISK_WRITE_RATE,
    DISK_WRITERS,
    DRAM,
    DRAM_SCRUB,
    DRAM_SCRUB_RATE,
    EVENTS_FORM,
    EVENTS_HASHES,
    EVENTS_HIGH_WATER,
    EVENTS_LISTEN,
    EVENTS_REPLAY,
    EVENTS_ROUTABLE,
    EVENTS_TENANT,
    EVENTS_TOPIC,
    GPU_DEVICES,
    GPU_HBM,
    HUGE_PAGES,
    INSIGHT_CURVES,
    KEEP,
    KEEP_PATIENCE,
    LEAF_THREADS,
    LEASE_TTL_MAX,
    LOCK,
    LOG_LEVEL,
    METRICS_LISTEN,
    NUMA,
    NUMBERS,
    POLICY_DISK,
    POLICY_DRAM,
    PREFAULT,
    REMOTE,
    REMOTE_ADMISSION,
    REMOTE_CONNECTIONS,
    REMOTE_DEADLINE,
    REMOTE_ENDPOINT,
    REMOTE_PYTHON,
    REMOTE_REGION,
    REMOTE_SIZE,
    RING,
    RUNTIME_DIR,
    SETTINGS,
    STATE_DIR,
    STOP_WITHIN,
    TENANT_CONTROL,
    TICKET_TTL,
    TRACE_ONE_IN,
    TRACE_OTLP,
    Basis,
    Setting,
    numbers_needed,
)
from kvstored.units import NO_FILE, ConfigError, format_seconds

__all__ = [
    "EX_CONFIG", "SETTINGS", "Config", "ConfigError", "Loaded", "Setting", "TenantConfig", "load",
    "format_bytes", "format_seconds", "parse_bytes", "parse_seconds",
]  # fmt: skip

T = TypeVar("T")

EX_CONFIG: Final = 78  # sysexits.h: something was found in an unconfigured or misconfigured state
SEGMENTS_LEAST: Final = 2  # one is filled while another is emptied


@dataclass(frozen=True, slots=True)
class Config:
    """What the daemon runs with. `settings.py` says what each value means; only `load` builds one."""

    dram_bytes: int
    arena_bytes: int
    prefault: bool
    lock: bool
    huge_pages: bool
    numa: str  # "auto", "interleave", "off" or numbers of nodes (`placement.py`)
    dram_scrub: str  # one of SCRUBS
    dram_scrub_rate: int  # bytes a second, 0: no scrub of memory in the background
    ring_bytes: int
    ticket_ttl_s: float
    lease_ttl_max_s: float
    runtime_dir: Path
    leaf_threads: int
    log_level: str
    keep: bool
    keep_patience_s: float
    stop_within_s: float
    disk_directories: tuple[Path, ...]  # empty: no disk tier
    disk_bytes: int  # in all of them; 0 without any
    segment_bytes: int
    disk_admission: str  # one of ADMISSIONS
    disk_write_rate: int  # bytes a second, 0: no limit
    disk_codec: str  # one of CODECS
    disk_readers: int  # threads of each directory
    disk_writers: int  # threads of each directory
    disk_packers: int  # threads of all
    disk_scrub_rate: int  # bytes a second, 0: no scrub in the background
    disk_key_file: str  # NO_FILE: not encrypted
    policy_dram: str  # one of RULES
    policy_disk: str  # one of RULES
    insight_curves: bool
    metrics_listen: str  # "off", a loopback address, or a path (`http_address.py`)
    state_dir: Path
    admin_group: str  # "none", or whose members act on the control socket
    tenant_control: bool  # is there a socket for everybody?
    control_listen: str  # "off", or an address (`control_address.py`)
    control_certificate: str  # this and what follows: NO_FILE, or all are there
    control_key: str
    control_client_ca: str
    gpu_devices: str  # "none", or devices (`device_names.py`)
    gpu_hbm_bytes: int  # of each of them; 0: no tier there
    trace_otlp: str  # "off", or the address of a collector (`otlp_address.py`)
    trace_one_in: int  # leases
    events_listen: str  # "off", "grpc", "ipc" or an address (`block_events_address.py`)
    events_routable: bool
    events_tenant: str  # ANY_TENANT, or a name
    events_topic: str
    events_hashes: str  # one of HASHES
    events_form: str  # one of FORMS
    events_replay: int  # batches
    events_high_water: int  # batches
    remote_url: str  # "off", or a bucket (`remote_address.py`)
    remote_endpoint: str
    remote_region: str
    remote_python: str  # "none", or the path of an interpreter
    remote_bytes: int
    remote_admission: str  # one of ADMISSIONS
    remote_deadline_s: float
    remote_connections: int
    tenants: tuple[TenantConfig, ...]

    def tenants_of(self, uid: int) -> tuple[str, ...]:
        """Names that a process of `uid` may ask for in HELLO; the first is its default. Never empty."""
        return tuple(tenant.name for tenant in self.tenants if uid in tenant.uids) or (f"uid-{uid}",)

    def disk_keys(self) -> KeyRing | None:
        """Keys of the disk tier as their file has them now; None: it is not encrypted. Raises SecretFileError."""
        return None if self.disk_key_file == NO_FILE else read_keys(Path(self.disk_key_file))

    def control_tls(self) -> TlsFiles | None:
        """Files of mutual TLS; None: no address is listened on."""
        if self.control_listen == OFF:
            return None
        return TlsFiles(Path(self.control_certificate), Path(self.control_key), Path(self.control_client_ca))

    def events(self) -> EventsConfig:
        """What is to be told of blocks, and to whom."""
        return EventsConfig(
            self.events_listen, self.events_tenant, self.events_topic, self.events_hashes, self.events_form,
            self.events_replay, self.events_high_water, self.runtime_dir,
        )  # fmt: skip

    def remote_address(self) -> RemoteAddress | None:
        """Where the remote tier is; None: there is none."""
        return parse_remote(self.remote_url, self.remote_endpoint, self.remote_region, self.remote_python)

    def trusts(self, tenant: str) -> bool:
        """May a tenant's engines write into its memory themselves?"""
        return any(one.name == tenant and one.trusting for one in self.tenants)

    def quotas(self) -> dict[str, Quota]:
        """Of tenants of which the configuration says more than that they are there."""
        return {tenant.name: tenant.quota for tenant in self.tenants if tenant.quota != USUAL}

    def capacities(self) -> tuple[Capacity, Capacity]:
        """DRAM and disk, as quotas count them."""
        segments = self.disk_bytes // self.segment_bytes if self.disk_directories else 0
        return (
            Capacity(Tier.DRAM, self.arena_bytes, self.dram_bytes // self.arena_bytes),
            Capacity(Tier.DISK, self.segment_bytes, segments),
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each of its values came from."""

    config: Config
    values: tuple[ConfigValue, ...]


def load(
    config_file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, str],
    *,
    memory_bytes: int | None = None,
) -> Loaded:
    """Find every value and its origin. Raises ConfigError at the first mistake.

    `flags` is keyed by flag name (`--dram`; the dashes may be missing and `_` stands for `-`, as argparse
    leaves them). `memory_bytes` is the machine's memory; None: what this process may have of it (`host_limits.py`).
    """
    layers = read_layers(config_file, environ, flags)
    memory = memory_limit() if memory_bytes is None else Limit(memory_bytes, "the machine's memory")
    basis = Basis(
        environ=environ,
        memory_bytes=memory.limit_bytes,
        cpus=len(os.sched_getaffinity(0)),
    )
    chooser = _Chooser(layers.given)
    dram_bytes = chooser.choose(DRAM, basis)
    basis = replace(basis, dram_bytes=dram_bytes)
    arena_bytes = chooser.choose(ARENA, basis)
    _check_dram(arena_bytes, basis, chooser, memory)
    basis = replace(basis, arena_bytes=arena_bytes)
    config = Config(
        dram_bytes=dram_bytes,
        arena_bytes=arena_bytes,
        prefault=chooser.choose(PREFAULT, basis),
        lock=chooser.choose(LOCK, basis),
        huge_pages=chooser.choose(HUGE_PAGES, basis),
        numa=_numa(chooser, basis),
        dram_scrub=chooser.choose(DRAM_SCRUB, basis),
        dram_scrub_rate=chooser.choose(DRAM_SCRUB_RATE, basis),
        ring_bytes=chooser.choose(RING, basis),
        ticket_ttl_s=chooser.choose(TICKET_TTL, basis),
        lease_ttl_max_s=chooser.choose(LEASE_TTL_MAX, basis),
        runtime_dir=(runtime_dir := chooser.choose(RUNTIME_DIR, basis)),
        leaf_threads=chooser.choose(LEAF_THREADS, basis),
        log_level=chooser.choose(LOG_LEVEL, basis),
        keep=chooser.choose(KEEP, basis),
        keep_patience_s=chooser.choose(KEEP_PATIENCE, basis),
        stop_within_s=chooser.choose(STOP_WITHIN, basis),
        disk_directories=chooser.choose(DISK, basis),
        disk_bytes=(disk_bytes := chooser.choose(DISK_SIZE, basis)),
        segment_bytes=chooser.choose(DISK_SEGMENT, replace(basis, disk_bytes=disk_bytes)),
        disk_admission=chooser.choose(DISK_ADMISSION, basis),
        disk_write_rate=chooser.choose(DISK_WRITE_RATE, basis),
        disk_codec=chooser.choose(DISK_CODEC, basis),
        disk_readers=chooser.choose(DISK_READERS, basis),
        disk_writers=chooser.choose(DISK_WRITERS, basis),
        disk_packers=chooser.choose(DISK_PACKERS, basis),
        disk_scrub_rate=chooser.choose(DISK_SCRUB_RATE, basis),
        disk_key_file=chooser.choose(DISK_KEY_FILE, basis),
        policy_dram=chooser.choose(POLICY_DRAM, basis),
        policy_disk=chooser.choose(POLICY_DISK, basis),
        insight_curves=chooser.choose(INSIGHT_CURVES, basis),
        metrics_listen=chooser.choose(METRICS_LISTEN, basis),
        state_dir=chooser.choose(STATE_DIR, replace(basis, runtime_dir=runtime_dir)),
        admin_group=chooser.choose(ADMIN_GROUP, basis),
        tenant_control=chooser.choose(TENANT_CONTROL, basis),
        control_listen=chooser.choose(CONTROL_LISTEN, basis),
        control_certificate=chooser.choose(CONTROL_CERTIFICATE, basis),
        control_key=chooser.choose(CONTROL_KEY, basis),
        control_client_ca=chooser.choose(CONTROL_CLIENT_CA, basis),
        gpu_devices=chooser.choose(GPU_DEVICES, basis),
        gpu_hbm_bytes=chooser.choose(GPU_HBM, basis),
        trace_otlp=_trace_otlp(chooser, basis),
        trace_one_in=chooser.choose(TRACE_ONE_IN, basis),
        events_listen=chooser.choose(EVENTS_LISTEN, basis),
        events_routable=chooser.choose(EVENTS_ROUTABLE, basis),
        events_tenant=chooser.choose(EVENTS_TENANT, basis),
        events_topic=chooser.choose(EVENTS_TOPIC, basis),
        events_hashes=chooser.choose(EVENTS_HASHES, basis),
        events_form=chooser.choose(EVENTS_FORM, basis),
        events_replay=chooser.choose(EVENTS_REPLAY, basis),
        events_high_water=chooser.choose(EVENTS_HIGH_WATER, basis),
        remote_url=chooser.choose(REMOTE, basis),
        remote_endpoint=chooser.choose(REMOTE_ENDPOINT, basis),
        remote_region=chooser.choose(REMOTE_REGION, basis),
        remote_python=chooser.choose(REMOTE_PYTHON, basis),
        remote_bytes=chooser.choose(REMOTE_SIZE, basis),
        remote_admission=chooser.choose(REMOTE_ADMISSION, basis),
        remote_deadline_s=chooser.choose(REMOTE_DEADLINE, basis),
        remote_connections=chooser.choose(REMOTE_CONNECTIONS, basis),
        tenants=tuple(tenant for tenant, _ in layers.tenants),
    )
    _check_directories(config, chooser)
    _check_disk(config, chooser)
    _check_keys(config, chooser)
    _check_control(config, chooser)
    _check_remote(config, chooser)
    check_events(config.events(), chooser.places[EVENTS_LISTEN.name], routable=config.events_routable)
    if not config.disk_directories:
        config = replace(config, disk_bytes=0)
    of_tenants = [value for _, values in layers.tenants for value in values]
    check_all(config.quotas(), config.capacities(), TENANTS, of_tenants)
    return Loaded(config, (*chooser.values, *of_tenants))


class _Chooser:
    """Takes the last value given for a setting, or its default, and keeps the account."""

    def __init__(self, given: Sequence[Given]) -> None:
        self.given = given
        self.values: list[ConfigValue] = []
        self.places: dict[str, str] = {}

    def choose(self, setting: Setting[T], basis: Basis) -> T:
        """The value of `setting`. Defaults are parsed too: the one of a path comes from the environment."""
        mine = [given for given in self.given if given.setting is setting]
        origin, place = "default", f"default of {setting.toml}"
        if not mine:
            value = _parsed(setting, setting.kind.show(setting.default(basis)), place)
        for given in mine:
            origin, place = given.origin, given.place
            value = _parsed(setting, given.text, place)
        self.places[setting.name] = place
        shown = setting.kind.show(value)
        self.values.append(ConfigValue(setting.toml, shown, origin, setting.unit, setting.reason))
        return value


def _parsed(setting: Setting[T], text: str, place: str) -> T:
    try:
        return setting.kind.parse(text)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_dram(arena_bytes: int, basis: Basis, chooser: _Chooser, memory: Limit) -> None:
    """Size, arena and machine against each other; blames the setting that is easier to have got wrong."""
    dram_bytes = basis.dram_bytes
    size, arena = format_bytes(dram_bytes), format_bytes(arena_bytes)
    if dram_bytes > memory.limit_bytes:
        most = format_bytes(memory.limit_bytes - memory.limit_bytes % limits.MIB)
        raise ConfigError(f"{chooser.places[DRAM.name]}: {size} is more than {memory.whose}, {most}")
    if arena_bytes > dram_bytes:
        guilty = ARENA if any(given.setting is ARENA for given in chooser.given) else DRAM
        place = chooser.places[guilty.name]
        raise ConfigError(f"{place}: a {DRAM.toml} of {size} does not hold one {ARENA.toml} of {arena}")
    if dram_bytes > arena_bytes * limits.ARENAS:
        least = format_bytes(limits.arena_bytes_for(dram_bytes))
        reason = f"{size} makes more than {limits.ARENAS} arenas of {arena}; take {least}"
        raise ConfigError(f"{chooser.places[ARENA.name]}: {reason}")


def _check_directories(config: Config, chooser: _Chooser) -> None:
    """Each must have its files to itself; links and `..` hide nothing here."""
    place = chooser.places[DISK.name]
    real = {path: Path(os.path.realpath(path)) for path in config.disk_directories}
    for number, path in enumerate(config.disk_directories):
        if real[path] == Path(os.path.realpath(config.runtime_dir)):
            raise ConfigError(f"{place}: {path} is {RUNTIME_DIR.toml}, which has files of its own; take another folder")
        for other in config.disk_directories[:number]:
            if real[path] == real[other]:
                raise ConfigError(f"{place}: {path} and {other} are one folder")
            for inner, outer in ((path, other), (other, path)):
                if real[inner].is_relative_to(real[outer]):
                    raise ConfigError(f"{place}: {inner} lies inside {outer}; take folders beside each other")


def _check_disk(config: Config, chooser: _Chooser) -> None:
    """Size, segment and what they must fit together with; blames the setting that is easier to have got wrong."""
    named = {given.setting.name for given in chooser.given}
    size_place, segment_place = chooser.places[DISK_SIZE.name], chooser.places[DISK_SEGMENT.name]
    disk_bytes, segment_bytes = config.disk_bytes, config.segment_bytes
    size, segment = format_bytes(disk_bytes), format_bytes(segment_bytes)
    if not config.disk_directories:
        if disk_bytes and DISK.name not in named:
            raise ConfigError(f"{size_place}: {size} of disk, and no {DISK.toml}: name a folder on each drive")
        return
    if not disk_bytes:
        place = size_place if DISK_SIZE.name in named else chooser.places[DISK.name]
        reason = f"needs {DISK_SIZE.toml} ({DISK_SIZE.flag}), the bytes that all directories may take together"
        raise ConfigError(f"{place}: {DISK.toml} {reason}")
    if disk_bytes < SEGMENTS_LEAST * segment_bytes:
        place = segment_place if DISK_SEGMENT.name in named else size_place
        reason = f"a {DISK_SIZE.toml} of {size} does not hold {SEGMENTS_LEAST} segments of {segment}"
        raise ConfigError(f"{place}: {reason}")
    place = segment_place if DISK_SEGMENT.name in named else size_place
    if disk_bytes // segment_bytes > limits.SEGMENTS:
        least = format_bytes(limits.segment_bytes_for(disk_bytes))
        reason = f"{size} makes more than {limits.SEGMENTS} segments of {segment}; take {least}"
        raise ConfigError(f"{place}: {reason}")
    if numbers_needed(config.dram_bytes, config.arena_bytes, disk_bytes, segment_bytes) >= NUMBERS:
        reason = f"{size} in segments of {segment} beside arenas of {format_bytes(config.arena_bytes)}"
        raise ConfigError(f"{place}: {reason} has more slots than 32 bits can number; take larger ones, or less disk")


def _check_keys(config: Config, chooser: _Chooser) -> None:
    """Trouble with a key is told before anything starts; it is read again when the disk opens."""
    place = chooser.places[DISK_KEY_FILE.name]
    if config.disk_key_file != NO_FILE and not config.disk_directories:
        raise ConfigError(f"{place}: a key, and no {DISK.toml} to encrypt")
    try:
        config.disk_keys()
    except SecretFileError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_control(config: Config, chooser: _Chooser) -> None:
    """All three files for an address, none without."""
    place = chooser.places[CONTROL_LISTEN.name]
    for setting in (CONTROL_CERTIFICATE, CONTROL_KEY, CONTROL_CLIENT_CA):
        there = getattr(config, setting.name) != NO_FILE
        if there and config.control_listen == OFF:
            raise ConfigError(f"{chooser.places[setting.name]}: is of no use without {CONTROL_LISTEN.toml}")
        if not there and config.control_listen != OFF:
            reason = f"whoever can connect to {config.control_listen} is nobody known without {setting.toml}"
            raise ConfigError(f"{place}: {reason}; only mutual TLS is spoken there")
    files = config.control_tls()
    try:
        if files is not None:
            files.checked()
    except SecretFileError as error:
        raise ConfigError(f"{place}: {error}") from None


def _check_remote(config: Config, chooser: _Chooser) -> None:
    """What it needs is no part of what a daemon needs otherwise."""
    address = config.remote_address()
    if address is None:
        for setting in (REMOTE_ENDPOINT, REMOTE_SIZE):
            if any(given.setting is setting for given in chooser.given):
                raise ConfigError(f"{chooser.places[setting.name]}: is of no use without {REMOTE.toml}")
        return
    place = chooser.places[REMOTE.name]
    if missing := missing_package(address):
        how = "its package, or remote.python" if address.scheme == MOONCAKE else "pip install 'kvstored[remote]'"
        raise ConfigError(f"{place}: {missing} is missing: {how}")
    if not config.remote_bytes:
        reason = f"needs {REMOTE_SIZE.toml} ({REMOTE_SIZE.flag}), the bytes that this host may keep there"
        raise ConfigError(f"{place}: {REMOTE.toml} {reason}")


def _trace_otlp(chooser: _Chooser, basis: Basis) -> str:
    """What it needs is no part of what a daemon needs otherwise."""
    address = chooser.choose(TRACE_OTLP, basis)
    if address != OFF and (missing := missing_packages()):
        raise ConfigError(f"{chooser.places[TRACE_OTLP.name]}: {missing} is missing: pip install 'kvstored[otel]'")
    return address


def _numa(chooser: _Chooser, basis: Basis) -> str:
    """Nodes that are named must be there; their number is what `HostMemory` spreads arenas over."""
    wish = chooser.choose(NUMA, basis)
    try:
        plan(wish, Topology.read())
    except NoSuchNodeError as error:
        raise ConfigError(f"{chooser.places[NUMA.name]}: {error}") from None
    return wish
