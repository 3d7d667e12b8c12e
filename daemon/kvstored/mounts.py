"""Where each disk directory lay: remembered, so that one whose drive is not mounted is not made anew beneath.

    a start that can use its directories   -> their mount points are noted, in the folder of state
    a start with nothing mounted there     -> the directory is absent: nothing is made, read or written in it
    a start whose drive refuses            -> the same: it is read-only or full, fails, or its server is gone
    a start whose drive says nothing       -> the same, once it has said nothing for a minute (`drive_asking.py`)
    mounted later, or it refuses no more   -> it heals as one that was gone (`drive_health.py`)

A drive that is not mounted leaves a folder of the file system beneath: used in its place, it would fill that one, and
the index would forget what lies on the drive. What lies on the root file system is always there, and is not noted. A
note that is missing or damaged says nothing: then no directory is absent. What is no longer configured is forgotten.
"""

import errno
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from kvstored.drive_asking import ask_each, silent
from kvstored.index_marks import DamagedError, unseal, write_sealed

log = logging.getLogger(__name__)

MOUNTS: Final = "disk-mounts"  # in the folder of state
VERSION: Final = 1
FILE_BYTES: Final = 1 << 20  # far above what all directories that can be configured come to

# What a drive says of itself: that may be over one day, and the others serve meanwhile. Not of rights, nor of what
# lies under a name: whoever configured that is told at once.
OF_THE_DRIVE: Final = frozenset({
    errno.EROFS, errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EUCLEAN, errno.EBADMSG, errno.ENODEV, errno.ENXIO,
    errno.ENOMEDIUM, errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EREMOTEIO, errno.ESHUTDOWN,
})  # fmt: skip

_ROOT: Final = Path("/")


def mount_point(path: Path) -> Path:
    """What a path lies on: the nearest of it and the folders that it lies in where a file system is mounted."""
    real = Path(os.path.realpath(path))
    return next((folder for folder in (real, *real.parents) if os.path.ismount(folder)), _ROOT)


class Mounts:
    """What is remembered of the configured directories. Any thread, but for `leave_out` and `remember`: both before any
    other asks.
    """

    def __init__(self, note: Path | None = None, directories: Iterable[Path] = ()) -> None:
        """`note`: the file; without one nothing is remembered. Looks at the directories, once: a minute at most."""
        self._note = note
        self._directories = tuple(directories)
        self._points = read_points(note) if note else {}
        answers = ask_each(self._directories, self._look)
        found = ((directory, one.result() if one.done() else silent()) for directory, one in answers.items())
        self._absent = {directory: why for directory, why in found if why}  # as of this moment

    @property
    def absent(self) -> Mapping[Path, str]:
        """Directories that this life begins without, with the reason."""
        return self._absent

    def leave_out(self, directory: Path, why: str) -> None:
        """This one is absent, too: its drive refuses."""
        self._absent[directory] = why

    def _look(self, directory: Path) -> str:
        """Why it is absent; does not return while its drive hangs."""
        with suppress(OSError):  # whoever uses it is told
            directory.parent.stat()
            directory.stat()
            os.statvfs(directory)
        return self.why_absent(directory)

    def why_absent(self, directory: Path) -> str:
        """Why nothing is to be made in a directory now; empty if it lies where it lay, or nobody knows. Does not return
        while its drive hangs.
        """
        point = self._points.get(directory.absolute())
        if point is None or not Path(os.path.realpath(directory)).is_relative_to(point):
            return ""  # a link that leads elsewhere now is another directory
        return "" if mount_point(directory).is_relative_to(point) else f"its drive is not mounted at {point}"

    def remember(self) -> None:
        """Note where the directories lie that were not absent; durable when this returns. Raises OSError."""
        points: dict[Path, Path] = {}
        answers = ask_each((each for each in self._directories if each not in self.absent), mount_point)
        for directory in self._directories:
            key, answer = directory.absolute(), answers.get(directory)
            point = answer.result() if answer and answer.done() else self._points.get(key, _ROOT)
            if point != _ROOT:
                points[key] = point
        if points == self._points:
            return
        self._points = points
        if self._note is not None:
            write_points(self._note, points)


def read_points(note: Path) -> dict[Path, Path]:
    """Mount points by directory; none if there is no such file, or not what was written."""
    try:
        fd = os.open(note, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            said = json.loads(unseal(file.read(FILE_BYTES)))[f"version {VERSION}"]
        return {Path(directory): Path(point) for directory, point in said.items()}
    except FileNotFoundError:
        return {}
    except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("disk: %s cannot be used (%s): where directories lay is not known", note, error)
        return {}


def write_points(note: Path, points: Mapping[Path, Path]) -> None:
    """All of them, durable when this returns. Raises OSError."""
    note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listed = {str(directory): str(point) for directory, point in points.items()}
    write_sealed(note, json.dumps({f"version {VERSION}": listed}).encode())
