"""How much memory this process may have at all, and how much of it may be locked: the host, control groups, rlimits."""

import re
import resource
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from kvproto.limits import KIB, MIB
from kvproto.sizes import format_bytes
from kvstored.units import ConfigError

FILE_BYTES: Final = 1 << 20  # of what the kernel says
BESIDE_BYTES: Final = 512 * MIB  # what the daemon takes beside its pool, before the first client comes (OPERATING.md)
CAP_IPC_LOCK: Final = 14  # number of the capability in linux/capability.h
_UNLIMITED: Final = 1 << 62  # groups of version 1 without a limit show about this
_VERSIONS: Final = (("cgroup2", "memory.max"), ("cgroup", "memory.limit_in_bytes"))
_GROUP: Final = re.compile(r"^[0-9]+:([^:]*):(/.*)$")


@dataclass(frozen=True, slots=True)
class Limit:
    """So many bytes, and whose word that is: `the machine's memory`, or a control group by its file."""

    limit_bytes: int
    whose: str
    group: bool = False


def memory_limit(root: Path = Path("/")) -> Limit:
    """What bounds this process's memory most: the machine, or the tightest control group it is in. Raises ConfigError.

    `root`: where /proc and /sys are looked for.
    """
    machine = Limit(machine_bytes(root), "the machine's memory")
    group = group_limit(root)
    return machine if group is None or group.limit_bytes >= machine.limit_bytes else group


def machine_bytes(root: Path = Path("/")) -> int:
    """Of /proc/meminfo. Raises ConfigError."""
    meminfo = root / "proc/meminfo"
    try:
        match = re.search(r"^MemTotal: *([0-9]+) kB$", _read(meminfo), re.MULTILINE)
    except OSError as error:
        raise ConfigError(f"{meminfo}:1: cannot be read: {error}") from error
    if match is None:
        raise ConfigError(f"{meminfo}:1: does not say MemTotal")
    return int(match[1]) * KIB


def group_limit(root: Path = Path("/")) -> Limit | None:
    """The tightest limit of the control groups that this process is in, of either version; None: there is none."""
    try:
        groups, mounts = _read(root / "proc/self/cgroup"), _read(root / "proc/self/mountinfo")
    except OSError:
        return None
    found: list[Limit] = []
    for kind, file in _VERSIONS:
        group = _group(groups, kind)
        mounted = _mounted(mounts, kind)
        if group is None or mounted is None:
            continue
        top, point = mounted
        place = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()  # in a container it is the top
        folder = root / point.relative_to("/")
        for inner in (place, *place.parents):
            path = folder / inner / file
            text = _read(path).strip() if path.exists() else ""
            if text.isdecimal() and int(text) < _UNLIMITED:
                name = f"/{path.relative_to(root)}"
                found.append(Limit(int(text), f"the memory limit of the control group, {name}", group=True))
    return min(found, key=lambda limit: limit.limit_bytes, default=None)


def _group(groups: str, kind: str) -> PurePosixPath | None:
    for line in groups.splitlines():
        match = _GROUP.match(line)
        if match is not None and ("memory" in match[1].split(",") if kind == "cgroup" else not match[1]):
            return PurePosixPath(match[2])
    return None


def _mounted(mounts: str, kind: str) -> tuple[PurePosixPath, PurePosixPath] | None:
    """What of the hierarchy is mounted, and where."""
    for line in mounts.splitlines():
        words, _, source = line.partition(" - ")
        kinds = source.split(" ")
        if len(words.split(" ")) < 5 or kinds[0] != kind:
            continue
        if kind == "cgroup" and "memory" not in kinds[-1].split(","):
            continue
        top, point = words.split(" ")[3:5]
        return PurePosixPath(top), PurePosixPath(point)
    return None


def too_tight(dram_bytes: int, root: Path = Path("/")) -> str:
    """What to warn of where a control group holds the pool, and hardly what comes beside it; empty if all is well."""
    limit = group_limit(root)
    if limit is None or limit.limit_bytes - dram_bytes >= BESIDE_BYTES:
        return ""
    return (
        f"dram.size {format_bytes(dram_bytes)} leaves less than {format_bytes(BESIDE_BYTES)} of {limit.whose}, "
        f"{format_bytes(limit.limit_bytes)}: the kernel may kill the daemon; take less, or raise the limit"
    )


def why_not_locked(wanted_bytes: int, error: OSError, status: Path = Path("/proc/self/status")) -> str:
    """A sentence on memory that could not be locked, with both figures where the limit is what was in the way."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    remedy = "raise LimitMEMLOCK= or `ulimit -l`, or set dram.lock = false"
    if soft in {resource.RLIM_INFINITY, -1} or soft >= wanted_bytes or may_lock(status):
        return f"memory is not locked ({error}): {remedy}"
    allowed, wanted = format_bytes(soft), format_bytes(wanted_bytes)
    return f"memory is not locked ({error}): {allowed} may be (RLIMIT_MEMLOCK), and dram.size is {wanted}; {remedy}"


def may_lock(status: Path = Path("/proc/self/status")) -> bool:
    """Does no limit hold for this process?"""
    try:
        effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(status), re.MULTILINE)
    except OSError:
        return False
    return effective is not None and bool(int(effective[1], 16) >> CAP_IPC_LOCK & 1)


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(FILE_BYTES).decode("utf-8", "replace")
