"""What the checks of `kvctl doctor` read, behind one port: `LinuxHost` is the real thing, tests bring their own."""

import ctypes
import errno
import os
import platform
import re
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

__all__ = ["Entry", "Ground", "Host", "LinuxHost", "Listener", "Space", "file_system", "package_version"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its kind ("directory", "socket" or "other"), permission bits and owner."""

    kind: str
    mode: int
    uid: int


@dataclass(frozen=True, slots=True)
class Space:
    """A file system's size and what is free of it, in bytes. `device` tells it from others."""

    size_bytes: int
    free_bytes: int
    device: int = 0


@dataclass(frozen=True, slots=True)
class Ground:
    """What a directory offers to a file that is made in it."""

    file_system: str  # "ext4", "tmpfs" and the like; empty if it cannot be told
    trouble: str  # why this user can make none; empty if one can be made
    direct: bool  # past the page cache (O_DIRECT)


class Listener(Enum):
    """Who is behind a socket's path."""

    ALIVE = "alive"
    STALE = "stale"  # the file is there, its process is gone
    DENIED = "denied"
    MISSING = "missing"


class Host(Protocol):
    """Read-only questions about this machine. None means: no such thing here, or not for this user to see."""

    uid: int

    def text(self, path: str) -> str | None:
        """A small text file."""

    def names(self, folder: str) -> tuple[str, ...]:
        """Sorted names in a directory; none where it cannot be read."""

    def entry(self, path: str) -> Entry | None:
        """What lies at a path."""

    def space(self, path: str) -> Space | None:
        """The file system that holds a path."""

    def ground(self, folder: str) -> Ground:
        """What a directory is good for. Leaves nothing behind."""

    def listener(self, path: str) -> Listener:
        """Whether a process listens on a Unix socket."""

    def memfd_trouble(self) -> str:
        """Why no sealed memfd can be made here; empty if one can."""

    def kernel(self) -> str:
        """Release of the running kernel: `6.8.0-45-generic`."""

    def versions(self) -> Sequence[tuple[str, str]]:
        """What kvctl runs on, as (name, version)."""


class LinuxHost:
    """This machine."""

    def __init__(self) -> None:
        self.uid = os.geteuid()

    def text(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        try:
            return tuple(sorted(entry.name for entry in Path(folder).iterdir()))
        except OSError:
            return ()

    def entry(self, path: str) -> Entry | None:
        try:
            found = Path(path).stat()
        except OSError:
            return None
        kind = "directory" if stat.S_ISDIR(found.st_mode) else "socket" if stat.S_ISSOCK(found.st_mode) else "other"
        return Entry(kind, stat.S_IMODE(found.st_mode), found.st_uid)

    def space(self, path: str) -> Space | None:
        try:
            found, device = os.statvfs(path), Path(path).stat().st_dev
        except OSError:
            return None
        return Space(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, device)

    def ground(self, folder: str) -> Ground:
        kind = file_system(self.text("/proc/self/mountinfo") or "", os.path.realpath(folder))
        direct, trouble = True, _trouble_to_make_a_file(folder, os.O_DIRECT)
        if trouble:
            direct, trouble = False, _trouble_to_make_a_file(folder, 0)
        return Ground(kind, trouble, direct)

    def listener(self, path: str) -> Listener:
        # A stream socket finds out without a session: a listener of another type answers EPROTOTYPE.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
            peer.settimeout(1.0)
            try:
                peer.connect(path)
            except FileNotFoundError:
                return Listener.MISSING
            except ConnectionRefusedError:
                return Listener.STALE
            except PermissionError:
                return Listener.DENIED
            except OSError:
                return Listener.ALIVE  # of another type, or with a full queue: somebody is there
        return Listener.ALIVE

    def memfd_trouble(self) -> str:
        try:
            memfd = os.memfd_create("kvctl-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            return error.strerror or str(error)
        os.close(memfd)
        return ""

    def kernel(self) -> str:
        return platform.release()

    def versions(self) -> Sequence[tuple[str, str]]:
        names = ("grpcio", "protobuf")
        return (
            ("kvctl", package_version("kvstored")),
            ("python", platform.python_version()),
            *((name, package_version(name)) for name in names),
            ("glibc", _glibc()),
        )


def _trouble_to_make_a_file(folder: str, flag: int) -> str:
    """Why no file can be made there with that flag; empty if one can. It has no name, and is gone at once."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC | flag, 0o600)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR):  # files without a name are not to be had everywhere
            return "" if os.access(folder, os.W_OK | os.X_OK) and not flag else error.strerror or str(error)
        return error.strerror or str(error)
    os.close(fd)
    return ""


def file_system(mounts: str, path: str) -> str:
    """The kind of the file system that holds a path, from /proc/self/mountinfo; empty if it does not say."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        words, _, source = line.partition(" - ")
        point = words.split(" ")[4:5]
        if not point or not source:
            continue
        # Spaces and the like are written as octal numbers.
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point[0])
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= best:  # of two mounts on one place, the later one is seen
            best, kind = len(place), source.split(" ")[0]
    return kind


def package_version(distribution: str) -> str:
    """Version of an installed distribution, or "unknown"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _glibc() -> str:
    gnu = getattr(ctypes.CDLL(None), "gnu_get_libc_version", None)
    if gnu is None:
        return "none"
    gnu.restype = ctypes.c_char_p
    return str(gnu().decode())
