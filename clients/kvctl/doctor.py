"""`kvctl doctor`: is this machine, and the daemon on it, set up well?

Each check is a function of a `Host` and of what the daemon said of itself, and gives one or more `Check`s:

    ok     nothing to do
    warn   works, but slower or less safe than it could
    fail   does not work, or will not
    skip   there was nothing to look at

Nothing here changes anything, and no check needs a daemon.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvctl.client import SOCKET_NAME
from kvctl.host import Entry, Ground, Host, Listener
from kvctl.render import size
from kvproto.limits import ARENAS, GIB, KIB, SESSIONS

__all__ = ["Check", "DaemonFacts", "Verdict", "examine"]

# What a full daemon has open: every arena; a socket, a pidfd and a ring for each session; logs, segments and the like.
OPEN_FILES: Final = ARENAS + 3 * SESSIONS + 256
# What PyTorch and NCCL want there; containers often get 64 MiB.
SHM_BYTES: Final = GIB
CAP_IPC_LOCK: Final = 14  # number of the capability in linux/capability.h
KERNEL_POPULATE: Final = (5, 14)  # MADV_POPULATE_WRITE
KERNEL_PEER_PIDFD: Final = (6, 5)  # SO_PEERPIDFD

_POOR_GROUND: Final = (
    (
        re.compile("tmpfs|ramfs"),
        "that is memory, and gone after a reboot",
        "take a folder on a drive, or give the memory to --dram",
    ),
    (
        re.compile("overlay|aufs"),
        "a container's own layer is slow, and gone with it",
        "mount a volume of the host there",
    ),
    (
        re.compile(r"nfs4?|cifs|smb3|9p|ceph|lustre|glusterfs|fuse.*|virtiofs"),
        "another machine's disk can hang, and be slower than computing",
        "take a folder on a local drive",
    ),
)

_LIMIT: Final = re.compile(r"^(Max open files|Max locked memory) +(\S+) +(\S+)", re.MULTILINE)
_UNLIMITED: Final = 1 << 62  # cgroups without a limit show about this


class Verdict(Enum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One answer: what was found, and what to do about it where there is something to do."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What a running daemon says of itself. Sizes are of its DRAM tier, but for those of disk.

    `locks` says whether DRAM should be locked, `keeper` who holds it over a restart.
    """

    version: str
    pid: int
    uid: int
    draining: bool
    capacity_bytes: int
    populated_bytes: int
    locked_bytes: int
    locks: bool = True
    warnings: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()  # directories
    disk_bytes: int = 0  # that the disk tier may take
    disk_assigned_bytes: int = 0  # that its segments take already
    keeper: str = "none"
    admin_group: str = "none"  # whose members act


def examine(
    host: Host, runtime_dir: str | None, daemon: DaemonFacts | None, trouble: str = "", disks: Sequence[str] = ()
) -> list[Check]:
    """Every check, in the order that a person reads them.

    `daemon` is None where none answered; `trouble` then says why and, after a semicolon, what to do, unless there
    simply is none. `disks` are directories to look at beside the daemon's.
    """
    return [
        *check_daemon(daemon, trouble),
        *check_sockets(host, runtime_dir, daemon),
        check_memory(host, daemon),
        check_memlock(host, daemon),
        check_keep(daemon),
        *check_disks(host, daemon, disks),
        check_shm(host),
        check_hugepages(host),
        check_open_files(host, daemon),
        check_memfd(host),
        check_versions(host, daemon),
        check_kernel(host),
        check_gpu(host),
    ]


def check_daemon(daemon: DaemonFacts | None, trouble: str) -> Iterator[Check]:
    """Whether it answers, and what it complains of."""
    name = "daemon"
    if daemon is None:
        if trouble:
            found, _, remedy = trouble.partition("; ")
            yield Check(name, Verdict.FAIL, found, remedy)
        else:
            yield Check(
                name,
                Verdict.SKIP,
                "none is running",
                "start one, or name its directory: kvctl --runtime-dir DIR doctor",
            )
        return
    who = f"kvstored {daemon.version}, pid {daemon.pid}, uid {daemon.uid}"
    if daemon.draining:
        yield Check(name, Verdict.WARN, f"{who}, draining: it takes no new blocks", "kvctl undrain")
    else:
        yield Check(name, Verdict.OK, f"{who}, serving")
    for warning in daemon.warnings:
        found, _, remedy = warning.partition("; ")
        yield Check(name, Verdict.WARN, found, remedy)


def check_sockets(host: Host, runtime_dir: str | None, daemon: DaemonFacts | None) -> Iterator[Check]:
    """The runtime directory and each socket in it: owner, mode, and whether somebody listens."""
    folder = "runtime dir"
    if runtime_dir is None:
        yield Check(folder, Verdict.SKIP, "none of the usual places has one", "name it with --runtime-dir")
        return
    entry = host.entry(runtime_dir)
    if entry is None:
        yield Check(folder, Verdict.SKIP, f"{runtime_dir} does not exist", "kvstored makes it when it starts")
        return
    yield _folder(folder, runtime_dir, entry, host.uid if daemon is None else daemon.uid)
    for name in host.names(runtime_dir):
        path = f"{runtime_dir}/{name}"
        socket = host.entry(path)
        if socket is not None and socket.kind == "socket":
            yield _socket(name, path, socket, host, daemon)


def _folder(name: str, path: str, entry: Entry, owner: int) -> Check:
    found = f"{path}, mode {entry.mode:04o}, uid {entry.uid}"
    if entry.kind != "directory":
        return Check(name, Verdict.FAIL, f"{path} is not a directory", "name another with --runtime-dir")
    if entry.mode & 0o022:
        remedy = f"chmod go-w {path}: others could put a socket of theirs in its place"
        return Check(name, Verdict.FAIL, found, remedy)
    if entry.uid not in (0, owner):
        remedy = f"chown {owner} {path}, or run as uid {entry.uid}: its owner can replace the sockets"
        return Check(name, Verdict.FAIL, found, remedy)
    return Check(name, Verdict.OK, found)


def _socket(name: str, path: str, entry: Entry, host: Host, daemon: DaemonFacts | None) -> Check:
    found = f"mode {entry.mode:04o}, uid {entry.uid}"
    listener = host.listener(path)
    if listener is Listener.STALE:
        remedy = "start kvstored: it replaces what one before it left behind"
        return Check(name, Verdict.WARN, f"{found}, stale: nobody listens", remedy)
    if listener is Listener.DENIED:
        remedy = f"run as uid {entry.uid} or as root"
        return Check(name, Verdict.FAIL, f"{found}: closed to uid {host.uid}", remedy)
    if listener is Listener.MISSING:
        return Check(name, Verdict.SKIP, "went away while looking")
    meant = 0o660 if daemon and daemon.admin_group != "none" else 0o600
    if name == SOCKET_NAME and entry.mode & 0o777 & ~meant:
        return Check(name, Verdict.FAIL, f"{found}: others may ask about every tenant", f"chmod {meant:o} {path}")
    return Check(name, Verdict.OK, f"{found}, somebody listens")


def check_memory(host: Host, daemon: DaemonFacts | None) -> Check:
    """Memory available, against what the DRAM tier has not touched yet; a cgroup's limit, against all of it."""
    name = "memory"
    meminfo = _meminfo(host)
    if "MemAvailable" not in meminfo:
        return Check(name, Verdict.SKIP, "/proc/meminfo cannot be read")
    available_bytes = meminfo["MemAvailable"]
    limit_bytes = _cgroup_limit_bytes(host, daemon)
    found = f"{size(available_bytes)} available of {size(meminfo['MemTotal'])}"
    if limit_bytes is not None:
        found += f", cgroup limit {size(limit_bytes)}"
    if daemon is None:
        return Check(name, Verdict.OK, f"{found}; no daemon to compare with")
    missing_bytes = max(0, daemon.capacity_bytes - daemon.populated_bytes)
    found += f"; DRAM tier {size(daemon.capacity_bytes)}, {size(missing_bytes)} of it not touched yet"
    if missing_bytes > available_bytes:
        return Check(name, Verdict.FAIL, found, "lower --dram (dram.size), or free memory: the kernel may kill it")
    if limit_bytes is not None and daemon.capacity_bytes > limit_bytes:
        return Check(name, Verdict.FAIL, found, "raise MemoryMax= (or the container's limit), or lower --dram")
    return Check(name, Verdict.OK, found)


def check_memlock(host: Host, daemon: DaemonFacts | None) -> Check:
    """Whether the DRAM tier can be kept out of swap."""
    name = "memlock"
    limit_bytes = _limit(host, daemon, "Max locked memory")
    if limit_bytes is None:
        return Check(name, Verdict.SKIP, "the limit cannot be read")
    remedy = "LimitMEMLOCK=infinity in its unit, or ulimit -l unlimited before it starts"
    found = "no limit" if limit_bytes >= _UNLIMITED else f"limit {size(limit_bytes)}"
    if limit_bytes < _UNLIMITED and _may_lock(host, daemon):
        limit_bytes, found = _UNLIMITED, f"{found}, lifted by CAP_IPC_LOCK"
    if daemon is None:
        verdict = Verdict.OK if limit_bytes >= GIB else Verdict.WARN
        return Check(name, verdict, f"{found}; no daemon to compare with", "" if verdict is Verdict.OK else remedy)
    if not daemon.locks:
        return Check(name, Verdict.SKIP, f"{found}; the daemon is told not to lock (dram.lock)")
    found += f"; {size(daemon.locked_bytes)} locked, DRAM tier {size(daemon.capacity_bytes)}"
    if max(limit_bytes, daemon.locked_bytes) >= daemon.capacity_bytes:
        return Check(name, Verdict.OK, found)
    return Check(name, Verdict.WARN, f"{found}: the rest can be swapped out", remedy)


def check_keep(daemon: DaemonFacts | None) -> Check:
    """Whether blocks in DRAM outlive the daemon."""
    name = "keep"
    if daemon is None:
        return Check(name, Verdict.SKIP, "no daemon to ask")
    if daemon.keeper == "none":
        remedy = "for warm restarts: --keep, or FileDescriptorStoreMax= in its unit"
        return Check(name, Verdict.SKIP, "blocks in memory do not outlive the daemon", remedy)
    return Check(name, Verdict.OK, f"blocks in memory are held by {daemon.keeper} over a restart")


def check_disks(host: Host, daemon: DaemonFacts | None, disks: Sequence[str]) -> Iterator[Check]:
    """Each directory of the disk tier, and whether all together have the room that it may take."""
    folders = list(dict.fromkeys([*(daemon.disks if daemon else ()), *disks]))
    if not folders:
        yield Check("disk", Verdict.SKIP, "no disk tier is configured")
        return
    for number, folder in enumerate(folders, start=1):
        name = "disk" if len(folders) == 1 else f"disk {number}"
        yield _disk(name, folder, host, daemon if daemon and folder in daemon.disks else None)
    if daemon is not None and daemon.disks:
        yield _disk_space(host, daemon)


def _disk(name: str, folder: str, host: Host, daemon: DaemonFacts | None) -> Check:
    """One directory; `daemon` is the one that uses it."""
    entry = host.entry(folder)
    if entry is None:
        if daemon is not None:
            return Check(name, Verdict.FAIL, f"{folder} does not exist", "mount or make it, then restart kvstored")
        return Check(name, Verdict.SKIP, f"{folder} does not exist", "kvstored makes it when it starts")
    if entry.kind != "directory":
        return Check(name, Verdict.FAIL, f"{folder} is not a directory", "name another with --disk (disk.directories)")
    ground, space = host.ground(folder), host.space(folder)
    found = f"{folder}, {ground.file_system or 'unknown file system'}"
    if space is not None:
        found += f", {size(space.free_bytes)} free of {size(space.size_bytes)}"
    owner = host.uid if daemon is None else daemon.uid
    if ground.trouble and owner == host.uid:
        remedy = f"chown {owner} {folder}, or name another with --disk (disk.directories)"
        return Check(name, Verdict.FAIL, f"{found}: no file can be made there: {ground.trouble}", remedy)
    trouble, remedy = _poor_ground(folder, entry, ground, owner)
    return Check(name, Verdict.WARN, f"{found}: {trouble}", remedy) if trouble else Check(name, Verdict.OK, found)


def _poor_ground(folder: str, entry: Entry, ground: Ground, owner: int) -> tuple[str, str]:
    """What makes a directory worse than it could be, and what to do."""
    if entry.mode & 0o022 or entry.uid not in (0, owner):
        trouble = f"mode {entry.mode:04o}, uid {entry.uid}: others may replace what lies there"
        return trouble, f"chown {owner} {folder} && chmod go-w {folder}"
    for kinds, trouble, remedy in _POOR_GROUND:
        if kinds.fullmatch(ground.file_system):
            return trouble, remedy
    if not ground.direct and not ground.trouble:
        return "no direct I/O, blocks fill the page cache", "ext4 or xfs on a local drive have it"
    return "", ""


def _disk_space(host: Host, daemon: DaemonFacts) -> Check:
    name = "disk space"
    spaces = {space.device: space.free_bytes for folder in daemon.disks if (space := host.space(folder)) is not None}
    missing_bytes = max(0, daemon.disk_bytes - daemon.disk_assigned_bytes)
    found = f"{size(sum(spaces.values()))} free; disk tier {size(daemon.disk_bytes)}, "
    found += f"{size(missing_bytes)} of it not taken yet"
    if missing_bytes > sum(spaces.values()):
        remedy = "lower --disk-size (disk.size), or free space: it stays smaller than it may be"
        return Check(name, Verdict.WARN, found, remedy)
    return Check(name, Verdict.OK, found)


def check_shm(host: Host) -> Check:
    """Shared memory by name, which engines want; the daemon's arenas are memfds and do not count against it."""
    name = "/dev/shm"  # noqa: S108  looked at, never written to
    space = host.space(name)
    remedy = "--shm-size=8g for a container, or mount -o remount,size=8G /dev/shm"
    if space is None:
        return Check(name, Verdict.WARN, "missing: engines that share tensors need it", remedy)
    found = f"{size(space.free_bytes)} free of {size(space.size_bytes)}"
    if space.size_bytes < SHM_BYTES:
        return Check(name, Verdict.WARN, f"{found}: little for engines that share tensors", remedy)
    return Check(name, Verdict.OK, f"{found} (arenas do not count against it)")


def check_hugepages(host: Host) -> Check:
    """Transparent hugepages for shared memory, which arenas are made of."""
    name = "hugepages"
    setting = host.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = re.search(r"\[(\w+)\]", setting or "")
    meminfo = _meminfo(host)
    explicit = f"{meminfo.get('HugePages_Total', 0):,} explicit ones"
    if chosen is None:
        return Check(name, Verdict.SKIP, f"this kernel has no transparent ones for shared memory; {explicit}")
    found = f"transparent ones for shared memory: {chosen[1]}; {explicit}"
    if chosen[1] in ("never", "deny"):
        remedy = "for faster copies: echo within_size > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        return Check(name, Verdict.WARN, found, remedy)
    return Check(name, Verdict.OK, found)


def check_open_files(host: Host, daemon: DaemonFacts | None) -> Check:
    """Descriptors: one an arena, three a session."""
    name = "open files"
    limit = _limit(host, daemon, "Max open files")
    if limit is None:
        return Check(name, Verdict.SKIP, "the limit cannot be read")
    found = f"{'no limit' if limit >= _UNLIMITED else f'limit {limit:,}'}; a full daemon has {OPEN_FILES:,} open"
    if limit < OPEN_FILES:
        remedy = f"LimitNOFILE={OPEN_FILES} in its unit, or ulimit -n {OPEN_FILES} before it starts"
        return Check(name, Verdict.WARN, found, remedy)
    return Check(name, Verdict.OK, found)


def check_memfd(host: Host) -> Check:
    """Sealed memfds, without which there are no arenas."""
    name = "memfd"
    trouble = host.memfd_trouble()
    if trouble:
        remedy = "allow memfd_create in the container's seccomp profile; sysctl vm.memfd_noexec=0"
        return Check(name, Verdict.FAIL, f"memfd_create: {trouble}", remedy)
    return Check(name, Verdict.OK, "sealed ones can be made")


def check_versions(host: Host, daemon: DaemonFacts | None) -> Check:
    """kvctl and the daemon should be of one release."""
    name = "versions"
    versions = list(host.versions())
    if daemon is not None:
        versions.insert(1, ("kvstored", daemon.version))
    found = ", ".join(f"{program} {version}" for program, version in versions)
    if daemon is not None and daemon.version != versions[0][1]:
        return Check(name, Verdict.WARN, found, "install the same version on both sides, then restart kvstored")
    return Check(name, Verdict.OK, found)


def check_kernel(host: Host) -> Check:
    """What the daemon asks of the kernel."""
    name = "kernel"
    release = host.kernel()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        return Check(name, Verdict.SKIP, f"{release}: not a version that kvctl can read")
    number = (int(numbers[1]), int(numbers[2]))
    if number < KERNEL_POPULATE:
        return Check(name, Verdict.FAIL, f"{release} has no MADV_POPULATE_WRITE", "upgrade to Linux 5.14 or later")
    if number < KERNEL_PEER_PIDFD:
        found = f"{release} has no SO_PEERPIDFD: clients are known by pid, which can be reused in a race"
        return Check(name, Verdict.WARN, found, "Linux 6.5 or later closes it")
    return Check(name, Verdict.OK, release)


def check_gpu(host: Host) -> Check:
    """NVIDIA devices and their driver, by their files alone."""
    name = "GPU"
    devices = [entry for entry in host.names("/dev") if re.fullmatch(r"nvidia\d+", entry)]
    driver = host.text("/proc/driver/nvidia/version")
    if driver is None and not devices:
        return Check(name, Verdict.SKIP, "none")
    number = re.search(r"\d+\.\d+(?:\.\d+)?", driver or "")
    shown = f"driver {number[0] if number else 'of unknown version'}"
    if driver is None:
        return Check(name, Verdict.WARN, f"{', '.join(devices)}, but no driver is loaded", "modprobe nvidia")
    if not devices:
        return Check(name, Verdict.WARN, f"{shown}, but no device", "pass the GPUs into the container: --gpus all")
    return Check(name, Verdict.OK, f"{', '.join(devices)}; {shown}")


def _meminfo(host: Host) -> dict[str, int]:
    """/proc/meminfo: sizes in bytes, hugepages by number."""
    found: dict[str, int] = {}
    for name, number, unit in re.findall(r"^(\w+): +(\d+)( kB)?$", host.text("/proc/meminfo") or "", re.MULTILINE):
        found[name] = int(number) * (KIB if unit else 1)
    return found


def _process(daemon: DaemonFacts | None) -> str:
    return "/proc/self" if daemon is None else f"/proc/{daemon.pid}"


def _limit(host: Host, daemon: DaemonFacts | None, name: str) -> int | None:
    """A soft limit of the daemon, or of this process where there is none."""
    for found, soft, _ in _LIMIT.findall(host.text(f"{_process(daemon)}/limits") or ""):
        if found == name:
            return _UNLIMITED if soft == "unlimited" else int(soft)
    return None


def _may_lock(host: Host, daemon: DaemonFacts | None) -> bool:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", host.text(f"{_process(daemon)}/status") or "", re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> CAP_IPC_LOCK & 1)


def _cgroup_limit_bytes(host: Host, daemon: DaemonFacts | None) -> int | None:
    """The memory limit of the daemon's cgroup (v2, else v1), or None where there is none."""
    groups = host.text(f"{_process(daemon)}/cgroup") or ""
    two = re.search(r"^0::(.*)$", groups, re.MULTILINE)
    one = re.search(r"^\d+:(?:\w+,)*memory(?:,\w+)*:(.*)$", groups, re.MULTILINE)
    for root, group, file in (
        ("/sys/fs/cgroup", two, "memory.max"),
        ("/sys/fs/cgroup/memory", one, "memory.limit_in_bytes"),
    ):
        if group is None:
            continue
        # In a container the named group may not be visible; its own then is the root of what is.
        for place in (f"{root}{group[1].rstrip('/')}/{file}", f"{root}/{file}"):
            limit = (host.text(place) or "").strip()
            if limit.isdecimal() and int(limit) < _UNLIMITED:
                return int(limit)
    return None
