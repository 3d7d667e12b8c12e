"""Every setting of the daemon in one table, and how its value is found.

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
    [tenants.research]              # HELLO may name it; the first tenant that lists a uid is its default
    uids = [1001, 1002]             # a uid that no tenant lists gets a tenant of its own, uid-N
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from kvproto import limits
from kvstore.report import ConfigValue
from kvstored.units import (
    ConfigError,
    Kind,
    TomlFile,
    count_kind,
    dotted,
    duration_kind,
    folder_kind,
    folders_kind,
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_seconds,
    quoted,
    size_kind,
    switch_kind,
    toml_type_name,
    word_kind,
)

__all__ = [
    "EX_CONFIG", "SETTINGS", "Config", "ConfigError", "Loaded", "Setting", "TenantConfig", "load",
    "format_bytes", "format_seconds", "parse_bytes", "parse_seconds",
]  # fmt: skip

T = TypeVar("T")

EX_CONFIG: Final = 78  # sysexits.h: something was found in an unconfigured or misconfigured state

UID_MAX: Final = 2**32 - 2  # (uid_t)-1 means "no change" to chown and setresuid
UID_UNMAPPED: Final = 65534  # what the kernel shows for a uid that this user namespace does not map
# A Unix socket path holds 107 bytes and a NUL: 90 of folder, a slash, 16 of file name.
RUNTIME_DIR_BYTES: Final = 90
SYSTEM_RUNTIME_DIR: Final = Path("/run/kvstored")
ENV_PREFIX: Final = "KVSTORED_"
# Names with our prefix that are not settings: KVSTORED_CONFIG names the file and is read by the command line.
ENV_OF_OTHERS: Final = frozenset({"KVSTORED_CONFIG"})

INTEGER_MAX: Final = 2**63 - 1  # of TOML; Python reads longer ones, and fails to show the longest
TENANTS: Final = "tenants"  # the one section whose keys are not settings

DISK_DIRECTORIES: Final = 16
DISK_PATH_BYTES: Final = 1024  # PATH_MAX is 4,096, and names come behind it; 16 of them go into one answer
SEGMENT_BYTES_MAX: Final = 64 * limits.GIB  # as an arena
DISK_BYTES_MAX: Final = limits.SEGMENTS * SEGMENT_BYTES_MAX
SEGMENTS_LEAST: Final = 2  # one is filled while another is emptied
NUMBERS: Final = 2**32 - 1  # of slots in DRAM and on disk; the last one means nobody (`kvstore/blocks.py`)
# Words of `kvstore.tier`, which this file does not import: it brings numba, and `config check` shall not wait for that.
ADMISSIONS: Final = ("all", "second_touch", "none")
CODECS: Final = ("auto", "raw", "bf16-planes+zstd")

_TENANT_NAME: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{limits.NAME_BYTES}}}")


@dataclass(frozen=True, slots=True)
class TenantConfig:
    """One [tenants.NAME] table: the uids whose processes may belong to it."""

    name: str
    uids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """What the daemon runs with. The table below says what each value means; only `load` builds one."""

    dram_bytes: int
    arena_bytes: int
    prefault: bool
    lock: bool
    ring_bytes: int
    ticket_ttl_s: float
    lease_ttl_max_s: float
    runtime_dir: Path
    leaf_threads: int
    log_level: str
    keep: bool
    keep_patience_s: float
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
    tenants: tuple[TenantConfig, ...]

    def tenants_of(self, uid: int) -> tuple[str, ...]:
        """Names that a process of `uid` may ask for in HELLO; the first is its default. Never empty."""
        return tuple(tenant.name for tenant in self.tenants if uid in tenant.uids) or (f"uid-{uid}",)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration, and where each of its values came from."""

    config: Config
    values: tuple[ConfigValue, ...]


@dataclass(frozen=True, slots=True)
class Basis:
    """What defaults are worked out from. The sizes are 0 until they are decided."""

    environ: Mapping[str, str]
    memory_bytes: int
    cpus: int
    dram_bytes: int = 0
    arena_bytes: int = 0
    disk_bytes: int = 0


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


def _default_dram_bytes(basis: Basis) -> int:
    quarter_bytes = basis.memory_bytes // 4
    arena_bytes = limits.arena_bytes_for(quarter_bytes)
    return max(quarter_bytes - quarter_bytes % arena_bytes, arena_bytes)


def _default_segment_bytes(basis: Basis) -> int:
    """As `limits` has it, doubled where large arenas leave too few numbers for so many segments."""
    usual_bytes = limits.segment_bytes_for(basis.disk_bytes)
    candidates = (usual_bytes << doublings for doublings in range((SEGMENT_BYTES_MAX // usual_bytes).bit_length()))
    fitting = (
        one for one in candidates if _numbers(basis.dram_bytes, basis.arena_bytes, basis.disk_bytes, one) < NUMBERS
    )
    return next(fitting, usual_bytes)


def _numbers(dram_bytes: int, arena_bytes: int, disk_bytes: int, segment_bytes: int) -> int:
    """Slot numbers that arenas and segments need: as many for each as for the one with most (`kvstore.store`)."""
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
    count_kind(1, 32), lambda _: 16, "threads",
    "for each directory; some verify while others read, and a drive wants several requests at a time")
DISK_WRITERS: Final = Setting(
    "disk_writers", "disk.writers", "KVSTORED_DISK_WRITERS", "--disk-writers",
    count_kind(1, 32), lambda _: 2, "threads",
    "for each directory; they also erase, and make and remove segments")
DISK_PACKERS: Final = Setting(
    "disk_packers", "disk.packers", "KVSTORED_DISK_PACKERS", "--disk-packers",
    count_kind(1, 32), lambda _: 1, "threads",
    "for all directories; they pack blocks and verify those kept over a restart, with low priority")
DISK_SCRUB_RATE: Final = Setting(
    "disk_scrub_rate", "disk.scrub_rate", "KVSTORED_DISK_SCRUB_RATE", "--disk-scrub-rate",
    size_kind(0, limits.KIB * limits.GIB), lambda _: 10 * limits.MIB, "bytes per second",
    "reads what lies on disk in the background and finds what has decayed; 0 for only when kvctl scrub asks")
# fmt: on

AnySetting: TypeAlias = (
    Setting[Path] | Setting[tuple[Path, ...]] | Setting[str] | Setting[int] | Setting[bool] | Setting[float]
)
SETTINGS: Final[tuple[AnySetting, ...]] = (
    DRAM, ARENA, PREFAULT, LOCK, RING, TICKET_TTL, LEASE_TTL_MAX, RUNTIME_DIR, LEAF_THREADS, LOG_LEVEL,
    KEEP, KEEP_PATIENCE, DISK, DISK_SIZE, DISK_SEGMENT, DISK_ADMISSION, DISK_WRITE_RATE, DISK_CODEC, DISK_READERS,
    DISK_WRITERS, DISK_PACKERS, DISK_SCRUB_RATE,
)  # fmt: skip
_SECTIONS: Final = {setting.toml.split(".")[0] for setting in SETTINGS}


def load(
    config_file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, str],
    *,
    memory_bytes: int | None = None,
) -> Loaded:
    """Find every value and its origin. Raises ConfigError at the first mistake.

    `flags` is keyed by flag name (`--dram`; the dashes may be missing and `_` stands for `-`, as argparse
    leaves them). `memory_bytes` is the machine's memory, read from /proc/meminfo when None.
    """
    file = TomlFile.read(config_file) if config_file is not None else None
    given = [*_from_file(file), *_from_environment(environ), *_from_flags(flags)]
    tenants = list(_tenants(file))
    basis = Basis(
        environ=environ,
        memory_bytes=_machine_memory_bytes() if memory_bytes is None else memory_bytes,
        cpus=len(os.sched_getaffinity(0)),
    )
    chooser = _Chooser(given)
    dram_bytes = chooser.choose(DRAM, basis)
    basis = replace(basis, dram_bytes=dram_bytes)
    arena_bytes = chooser.choose(ARENA, basis)
    _check_dram(arena_bytes, basis, chooser)
    basis = replace(basis, arena_bytes=arena_bytes)
    config = Config(
        dram_bytes=dram_bytes,
        arena_bytes=arena_bytes,
        prefault=chooser.choose(PREFAULT, basis),
        lock=chooser.choose(LOCK, basis),
        ring_bytes=chooser.choose(RING, basis),
        ticket_ttl_s=chooser.choose(TICKET_TTL, basis),
        lease_ttl_max_s=chooser.choose(LEASE_TTL_MAX, basis),
        runtime_dir=chooser.choose(RUNTIME_DIR, basis),
        leaf_threads=chooser.choose(LEAF_THREADS, basis),
        log_level=chooser.choose(LOG_LEVEL, basis),
        keep=chooser.choose(KEEP, basis),
        keep_patience_s=chooser.choose(KEEP_PATIENCE, basis),
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
        tenants=tuple(tenant for tenant, _ in tenants),
    )
    _check_directories(config, chooser)
    _check_disk(config, chooser)
    if not config.disk_directories:
        config = replace(config, disk_bytes=0)
    return Loaded(config, (*chooser.values, *(value for _, value in tenants)))


@dataclass(frozen=True, slots=True)
class _Given:
    """One value as one layer gave it: `origin` for `kvctl config`, `place` for an error."""

    setting: AnySetting
    text: str
    origin: str
    place: str


class _Chooser:
    """Takes the last value given for a setting, or its default, and keeps the account."""

    def __init__(self, given: Sequence[_Given]) -> None:
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


def _check_dram(arena_bytes: int, basis: Basis, chooser: _Chooser) -> None:
    """Size, arena and machine against each other; blames the setting that is easier to have got wrong."""
    dram_bytes = basis.dram_bytes
    size, arena = format_bytes(dram_bytes), format_bytes(arena_bytes)
    if dram_bytes > basis.memory_bytes:
        memory = format_bytes(basis.memory_bytes - basis.memory_bytes % limits.MIB)
        raise ConfigError(f"{chooser.places[DRAM.name]}: {size} is more than the machine's memory, {memory}")
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
    if _numbers(config.dram_bytes, config.arena_bytes, disk_bytes, segment_bytes) >= NUMBERS:
        reason = f"{size} in segments of {segment} beside arenas of {format_bytes(config.arena_bytes)}"
        raise ConfigError(f"{place}: {reason} has more slots than 32 bits can number; take larger ones, or less disk")


def _machine_memory_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    try:
        match = re.search(r"^MemTotal: *([0-9]+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{meminfo}:1: cannot be read: {error}") from error
    if match is None:
        raise ConfigError(f"{meminfo}:1: does not say MemTotal")
    return int(match[1]) * limits.KIB


def _from_environment(environ: Mapping[str, str]) -> Iterator[_Given]:
    known = {setting.env: setting for setting in SETTINGS}
    names = {env.removeprefix(ENV_PREFIX): env for env in known}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in ENV_OF_OTHERS:
            continue
        place = f"environment {name}"
        if name not in known:
            raise ConfigError(f"{place}: unknown{_nearest(name.removeprefix(ENV_PREFIX), names)}")
        yield _Given(known[name], environ[name], place, place)


def _from_flags(flags: Mapping[str, str]) -> Iterator[_Given]:
    known = {setting.flag: setting for setting in SETTINGS}
    names = {flag.lstrip("-"): flag for flag in known}
    seen: set[str] = set()
    for name, text in flags.items():
        flag = "--" + name.lstrip("-").replace("_", "-")
        place = f"flag {flag}"
        if flag not in known:
            raise ConfigError(f"{place}: unknown{_nearest(flag.lstrip('-'), names)}")
        if flag in seen:
            raise ConfigError(f"{place}: given twice")
        seen.add(flag)
        yield _Given(known[flag], text, place, place)


def _nearest(word: str, choices: Mapping[str, str]) -> str:
    """The end of an error message: what the operator may have meant, or nothing."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {choices[near[0]]}?" if near else ""


def _from_file(file: TomlFile | None) -> Iterator[_Given]:
    if file is None:
        return
    known = {setting.toml for setting in SETTINGS}
    leaves = {setting.toml.split(".")[1]: setting.toml for setting in reversed(SETTINGS)}  # of two alike, the first
    for section in file.document:
        if section == TENANTS:
            continue
        if section not in _SECTIONS:
            near = _nearest(section, {name: name for name in (*_SECTIONS, TENANTS)} | leaves)
            raise file.error((section,), f"unknown section or key {dotted(section)}{near}")
        for key, value in file.table(section).items():
            if f"{section}.{key}" not in known:
                own = {toml.split(".")[1]: toml for toml in known if toml.startswith(f"{section}.")}
                near = _nearest(key, own) or _nearest(key, leaves)
                raise file.error((section, key), f"unknown key {dotted(section, key)}{near}")
            yield _from_key(file, section, key, value)


def _from_key(file: TomlFile, section: str, key: str, value: object) -> _Given:
    toml = f"{section}.{key}"
    setting = next(setting for setting in SETTINGS if setting.toml == toml)
    place = file.place(section, key)
    if type(value) not in setting.kind.toml_types:  # not isinstance: true is an int to Python
        raise ConfigError(f"{place}: {toml}: must be {setting.kind.expects}, not {toml_type_name(value)}")
    if isinstance(value, int) and abs(value) > INTEGER_MAX:
        raise ConfigError(f"{place}: {toml}: is larger than any TOML integer")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, list):
        text = _joined(value, f"{place}: {toml}")
    return _Given(setting, text, f"file {place}", f"{place}: {toml}")


def _joined(values: list[object], place: str) -> str:
    """A list as the environment would have it."""
    texts: list[str] = []
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"{place}: a path is a string, not {toml_type_name(value)}")
        if os.pathsep in value or not value.startswith("/"):
            raise ConfigError(f"{place}: {quoted(value)} is not an absolute path without {os.pathsep!r}")
        texts.append(value)
    return os.pathsep.join(texts)


def _tenants(file: TomlFile | None) -> Iterator[tuple[TenantConfig, ConfigValue]]:
    if file is None:
        return
    for number, name in enumerate(file.table(TENANTS), start=1):
        keys = (TENANTS, name)
        if number > limits.TENANTS:
            raise file.error(keys, f"more than {limits.TENANTS} tenants")
        if _TENANT_NAME.fullmatch(name) is None:
            raise file.error(keys, f"{quoted(name)} is not a tenant name; 1 to 64 of A-Z a-z 0-9 . _ -")
        if name.startswith("uid-"):
            raise file.error(keys, f"{name}: names that start with uid- belong to uids that no tenant lists")
        table = file.table(*keys)
        for key in table:
            if key != "uids":
                near = _nearest(key, {"uids": dotted(*keys, "uids")})
                raise file.error((*keys, key), f"unknown key {dotted(*keys, key)}{near}")
        uids = _uids(file, name, table.get("uids"))
        origin = f"file {file.place(*keys, 'uids')}"
        reason = "processes of these uids may belong to this tenant"
        shown = ", ".join(map(str, uids))
        yield TenantConfig(name, uids), ConfigValue(dotted(*keys, "uids"), shown, origin, "uids", reason)


def _uids(file: TomlFile, name: str, listed: object) -> tuple[int, ...]:
    keys = (TENANTS, name, "uids")
    toml = dotted(*keys)
    if not isinstance(listed, list) or not listed:
        raise file.error(keys, f"{toml}: must be a list of at least one uid, such as [1000]")
    uids: list[int] = []
    for uid in listed:
        if type(uid) is not int:
            raise file.error(keys, f"{toml}: a uid is a whole number, not {toml_type_name(uid)}")
        if not 0 <= uid <= UID_MAX:
            raise file.error(keys, f"{toml}: a uid is from 0 to {UID_MAX}")
        if uid == UID_UNMAPPED:
            raise file.error(keys, f"{toml}: {uid} stands for every uid that is not mapped here")
        if uid in uids:
            raise file.error(keys, f"{toml}: {uid} is listed twice")
        uids.append(uid)
    return tuple(uids)
