"""Of `kvctl doctor`: memory and its limits, those of descriptors too."""

import re
from pathlib import PurePosixPath
from typing import Final

from kvctl.doctor_facts import Check, DaemonFacts, Verdict
from kvctl.host import Host
from kvctl.render import size
from kvproto.limits import ARENAS, GIB, KIB, SESSIONS

__all__ = ["check_hugepages", "check_memlock", "check_memory", "check_open_files", "check_shm"]

# What a full daemon has open: every arena; a socket, a pidfd and a ring for each session; logs, segments and the like.
OPEN_FILES: Final = ARENAS + 3 * SESSIONS + 256
# What PyTorch and NCCL want there; containers often get 64 MiB.
SHM_BYTES: Final = GIB
HUGE_SHARE: Final = 0.9  # of populated memory; the rest is what the kernel had no large pieces for
CAP_IPC_LOCK: Final = 14  # number of the capability in linux/capability.h

_LIMIT: Final = re.compile(r"^(Max open files|Max locked memory) +(\S+) +(\S+)", re.MULTILINE)
_UNLIMITED: Final = 1 << 62  # cgroups without a limit show about this


def check_memory(host: Host, daemon: DaemonFacts | None) -> Check:
    """Memory available, against what the DRAM tier has not touched yet; a cgroup's limit, against all of it."""
    name = "memory"
    meminfo = _meminfo(host)
    if "MemAvailable" not in meminfo:
        return Check(name, Verdict.SKIP, "/proc/meminfo cannot be read")
    available_bytes = meminfo["MemAvailable"]
    limit_bytes, group = _cgroup_limit(host, daemon) or (None, "")
    found = f"{size(available_bytes)} available of {size(meminfo['MemTotal'])}"
    if limit_bytes is not None:
        found += f", cgroup limit {size(limit_bytes)} ({group})"
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


def check_hugepages(host: Host, daemon: DaemonFacts | None) -> Check:
    """How much of DRAM lies in huge pages. The daemon has them made, whatever the host's setting says but `deny`."""
    name = "hugepages"
    if daemon is not None and not daemon.huge_pages:
        return Check(name, Verdict.SKIP, "the daemon is told not to use them (dram.huge_pages)")
    setting = host.text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = re.search(r"\[(\w+)\]", setting or "")
    if chosen is None:
        return Check(name, Verdict.SKIP, "this kernel has no transparent ones for shared memory")
    found = f"transparent ones for shared memory: {chosen[1]}"
    if chosen[1] == "deny":
        remedy = "for faster copies: echo never > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        return Check(name, Verdict.WARN, found, remedy)
    if daemon is None or not daemon.populated_bytes:
        return Check(name, Verdict.OK, found)
    share = daemon.huge_bytes / daemon.populated_bytes
    found = f"{share:.0%} of {size(daemon.populated_bytes)} of populated memory lies in them"
    if share < HUGE_SHARE:
        remedy = "Linux 6.1 or later, and memory in large pieces: start it soon after the host, or drop caches before"
        return Check(name, Verdict.WARN, f"{found}: drives and clients are slower", remedy)
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


def _meminfo(host: Host) -> dict[str, int]:
    """/proc/meminfo: sizes in bytes."""
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


def _cgroup_limit(host: Host, daemon: DaemonFacts | None) -> tuple[int, str] | None:
    """The tightest memory limit of the daemon's cgroups (v2 and v1) and that group, or None where there is none.

    As `kvstored.host_limits` has it: its own group, and all around it. In a container the named ones may not be
    visible; its own then is the root of what is.
    """
    groups = host.text(f"{_process(daemon)}/cgroup") or ""
    two = re.search(r"^0::(/.*)$", groups, re.MULTILINE)
    one = re.search(r"^\d+:(?:\w+,)*memory(?:,\w+)*:(/.*)$", groups, re.MULTILINE)
    found = []
    for root, group, file in (
        ("/sys/fs/cgroup", two, "memory.max"),
        ("/sys/fs/cgroup/memory", one, "memory.limit_in_bytes"),
    ):
        if group is None:
            continue
        own = PurePosixPath(group[1])
        for place in (own, *own.parents):
            limit = (host.text(f"{root}{str(place).rstrip('/')}/{file}") or "").strip()
            if limit.isdecimal() and int(limit) < _UNLIMITED:
                found.append((int(limit), str(place)))
    return min(found, default=None)
