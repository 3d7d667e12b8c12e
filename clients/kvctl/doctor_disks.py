"""Of `kvctl doctor`: the directories of the disk tier."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from kvctl.doctor_facts import Check, DaemonFacts, Verdict
from kvctl.host import Entry, Ground, Host
from kvctl.render import size

__all__ = ["check_disks"]

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
