"""`kvctl doctor`: is this machine, and the daemon on it, set up well?

Each check is a function of a `Host` and of what the daemon said of itself, and gives one or more `Check`s:

    ok     nothing to do
    warn   works, but slower or less safe than it could
    fail   does not work, or will not
    skip   there was nothing to look at

Nothing here changes anything, and no check needs a daemon. `doctor_memory.py` and `doctor_disks.py` have their own.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from kvctl.client import SOCKET_NAME
from kvctl.doctor_disks import check_disks
from kvctl.doctor_facts import Check, DaemonFacts, Verdict
from kvctl.doctor_memory import check_hugepages, check_memlock, check_memory, check_open_files, check_shm
from kvctl.host import Entry, Host, Listener

__all__ = ["Check", "DaemonFacts", "Verdict", "examine"]

KERNEL_POPULATE: Final = (5, 14)  # MADV_POPULATE_WRITE
KERNEL_PEER_PIDFD: Final = (6, 5)  # SO_PEERPIDFD


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
        check_hugepages(host, daemon),
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


def check_keep(daemon: DaemonFacts | None) -> Check:
    """Whether blocks in DRAM outlive the daemon."""
    name = "keep"
    if daemon is None:
        return Check(name, Verdict.SKIP, "no daemon to ask")
    if daemon.keeper == "none":
        remedy = "for warm restarts: --keep, or FileDescriptorStoreMax= in its unit"
        return Check(name, Verdict.SKIP, "blocks in memory do not outlive the daemon", remedy)
    return Check(name, Verdict.OK, f"blocks in memory are held by {daemon.keeper} over a restart")


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
