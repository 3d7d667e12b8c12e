"""What root made in a disk directory is given to the owner of that directory: the daemon runs as a user of its own.

That user can have any name in there lead elsewhere, so nothing is given for its name: it is opened following no link,
and is given if it is root's, and a folder, or a file that has no other name.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final

from kvstored.index_marks import BUILDING, FOLDER, NEXT, STORE_FILE
from kvstored.index_scan import SEGMENTS

_NAMES: Final = ("lock", NEXT, STORE_FILE, f"{STORE_FILE}.new", SEGMENTS)
_FOLDERS: Final = (FOLDER, BUILDING)  # with the files in them
_NOT_OURS: Final = (errno.ENOENT, errno.ELOOP, errno.ENXIO)  # nothing, a link, a socket
_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def give_back(directory: Path) -> str:
    """Why something stays root's; empty if nothing does, or somebody else asks. Any thread."""
    if os.geteuid() != 0:
        return ""
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            owner = os.fstat(top)
            if owner.st_uid != 0:
                for name in _NAMES:
                    _give(top, name, owner)
                for name in _FOLDERS:
                    _give(top, name, owner, inside=True)
        finally:
            os.close(top)
    except OSError as error:
        return f"something in {directory} stays root's: {error.strerror}"
    return ""


def _give(folder: int, name: str, owner: os.stat_result, *, inside: bool = False) -> None:
    """Raises OSError."""
    try:
        fd = os.open(name, _FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in _NOT_OURS:
            return
        raise
    try:
        found = os.fstat(fd)
        is_folder = stat.S_ISDIR(found.st_mode)
        if found.st_uid == 0 and (is_folder or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)):
            os.fchown(fd, owner.st_uid, owner.st_gid)
        if inside and is_folder:
            for each in os.listdir(fd):  # noqa: PTH208  of what was opened, whatever its name is now
                _give(fd, each, owner)
    finally:
        os.close(fd)
