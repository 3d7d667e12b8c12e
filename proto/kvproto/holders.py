"""Who holds the lock of a file, without touching it: a look that locks, however shortly, could end a start."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

__all__ = ["holder"]

_LOCKED: Final = re.compile(r"[0-9]+: FLOCK +ADVISORY +(?:READ|WRITE) +([0-9]+) ([0-9a-f]+):([0-9a-f]+):([0-9]+) ")
_MOUNT: Final = re.compile(r"mnt_id:\s*([0-9]+)$")
_MOUNTED: Final = re.compile(r"([0-9]+) [0-9]+ ([0-9]+):([0-9]+) ")


def holder(path: Path) -> int | None:
    """The process that has locked a file (flock); None: none that can be seen from here.

    It needs no right to read the file, only to reach it. The kernel shows locks of the asker's PID namespace and of
    those in it: from a container it shows none that a process of the host has.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        device, inode = _device(fd), os.fstat(fd).st_ino
        for match in _lines("/proc/locks", _LOCKED):
            if (int(match[2], 16), int(match[3], 16), int(match[4])) == (*device, inode):
                return int(match[1])
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _device(fd: int) -> tuple[int, int]:
    """Of the file system as /proc/locks has it; on btrfs and overlays `stat` says another one. Raises OSError."""
    mount = next(_lines(f"/proc/self/fdinfo/{fd}", _MOUNT), None)
    for match in _lines("/proc/self/mountinfo", _MOUNTED):
        if mount is not None and match[1] == mount[1]:
            return int(match[2]), int(match[3])
    said = os.fstat(fd).st_dev
    return os.major(said), os.minor(said)


def _lines(path: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        yield from filter(None, map(pattern.match, lines))
