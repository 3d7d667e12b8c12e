"""One directory of the disk tier: what state it is in, found out from how its orders end and from looking at it.

                  EROFS                        ENOSPC, EDQUOT
    READ-ONLY <---------- OK ------------------------------------> FULL
         |                | ^ \\                                    |
         |     8 x EIO or | |  `-- folder not there, or another --> GONE
         |     5 s of I/O v |                                       |
         |             FAILING                                      |
         `----------- probe every 10 s: back to OK <----------------'

READ-ONLY and FULL take no new segments. FAILING takes nothing but erasing and dropping, and what waits in its queues
fails at once. GONE: its segments are no more in this life; a folder that is there later begins empty. Nothing is made
where no drive is mounted though one was (`mounts.py`): a directory that is so at start is GONE from the beginning.
What is deleted meanwhile is noted elsewhere (`owed.py`), since the next life may find them again.
"""

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from kvkernels.aligned import aligned
from kvproto.limits import PAGE_BYTES
from kvstored.drive_files import Files, transfer
from kvstored.mounts import Mounts

log = logging.getLogger(__name__)

FAILING_AFTER: Final = 8
HUNG_NS: Final = 5 * 10**9  # an I/O or a look that takes longer: the drive is hung until it comes back
PROBE_NS: Final = 10 * 10**9
PROBE_NAME: Final = ".kvstored-probe"
PROBE_PAGE: Final = b"kvstored probe".ljust(PAGE_BYTES, b".")

_NO_SPACE: Final = {errno.ENOSPC, errno.EDQUOT}
_NOT_THE_DRIVES: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EEXIST, errno.ELOOP}


class DriveState(StrEnum):
    """See above."""

    OK = "ok"
    READ_ONLY = "read-only"
    FULL = "full"
    FAILING = "failing"
    GONE = "gone"


class NotToBeUsedError(Exception):
    """Nothing is to be made in a directory now; says why."""


@dataclass(frozen=True, slots=True)
class DriveStatus:
    """What an operator sees of a directory."""

    directory: Path
    state: DriveState
    reason: str  # empty if all is well
    direct: bool  # O_DIRECT; otherwise through the page cache
    segments: int
    free_bytes: int  # of the file system
    capacity_bytes: int
    read_bytes: int  # since start, headers included
    written_bytes: int
    errors: int  # system calls that failed or stopped short
    damaged: int  # blocks that were not what was written


class Directory:
    """A directory and its health. Any thread, but for what says otherwise."""

    def __init__(
        self, path: Path, segment_bytes: int, files: Files, now_ns: Callable[[], int], opened: Callable[[Path], None],
        mounts: Mounts,
    ) -> None:  # fmt: skip
        """`now_ns` is a clock that never goes back; `opened` is called with a folder that is going to be used, and may
        raise OSError, NotToBeUsedError.
        """
        self.path = path
        self.folder = path / "segments"
        self.files = files
        self._mounts = mounts
        self._reason = mounts.absent.get(path, "")
        self.state = DriveState.GONE if self._reason else DriveState.OK
        self.direct = True
        self.ready = threading.Event()  # it was looked at once: `direct` is known
        self.lost = False  # its segments are no more, and the owner has not been told yet
        self.not_ours: deque[int] = deque()  # segments that turned out not to be, when they were opened
        self._segment_bytes = segment_bytes
        self._now_ns = now_ns
        self._opened = opened
        self._lock = threading.Lock()
        self._identity = (0, 0)
        self._free_bytes = self._capacity_bytes = self._read_bytes = self._written_bytes = 0
        self._errors = self._errors_in_a_row = self._damaged = 0
        self._said: set[tuple[str, int | None]] = set()
        self._running: dict[int, int] = {}  # since when, by thread
        self._hung = ""
        self._looks: SimpleQueue[bool | None] = SimpleQueue()
        self._looking_since_ns = 0
        self._probed_ns = 0

    # -- owner thread --------------------------------------------------------------------------------------------

    def look_around(self) -> bool:
        """Ask for a look; True if the drive has just been found hung."""
        now_ns = self._now_ns()
        hung_before = self._hung
        self._hung = self._find_hung(now_ns)
        if self._hung and not hung_before:
            log.warning("drive hung: directory=%s reason=%s", self.path, self._hung)
        if not self._looking_since_ns and not self.lost:
            well = self.state is DriveState.OK and self._identity != (0, 0)
            probe = not well and now_ns - self._probed_ns >= PROBE_NS
            self._ask(now_ns, probe=probe)
        return bool(self._hung) and not hung_before

    def begin(self) -> None:
        """Ask for the first look."""
        self._ask(self._now_ns(), probe=True)

    def end(self) -> None:
        """Let the threads of this directory go."""
        self._looks.put(None)
        self.ready.set()

    def status(self, segments: int) -> DriveStatus:
        """As of now."""
        state = DriveState.FAILING if self._hung and self.state is not DriveState.GONE else self.state
        return DriveStatus(
            self.path, state, self._hung or self._reason, self.direct, segments, self._free_bytes,
            self._capacity_bytes, self._read_bytes, self._written_bytes, self._errors, self._damaged,
        )  # fmt: skip

    def _ask(self, now_ns: int, *, probe: bool) -> None:
        if probe:
            self._probed_ns = now_ns
        self._looking_since_ns = now_ns or 1
        self._looks.put(probe)

    def _find_hung(self, now_ns: int) -> str:
        since = [since_ns for since_ns in (*self._running.copy().values(), self._looking_since_ns) if since_ns]
        waits_ns = now_ns - min(since, default=now_ns)
        return f"no answer within {HUNG_NS // 10**9} s" if waits_ns > HUNG_NS else ""

    # -- any thread ----------------------------------------------------------------------------------------------

    @property
    def suspended(self) -> bool:
        """Nothing is read or written here for the time being."""
        return bool(self._hung) or self.state in (DriveState.FAILING, DriveState.GONE)

    @property
    def takes_segments(self) -> bool:
        """Is this a place for a new segment?"""
        return self.state is DriveState.OK and not self._hung

    def enter(self) -> None:
        """This thread begins to read or write."""
        self._running[threading.get_ident()] = self._now_ns()

    def leave(self) -> None:
        """It is back."""
        self._running.pop(threading.get_ident(), None)

    def succeeded(self, *, read_bytes: int = 0, written_bytes: int = 0) -> None:
        """The drive did what it was asked for."""
        with self._lock:
            self._errors_in_a_row = 0
            self._read_bytes += read_bytes
            self._written_bytes += written_bytes

    def failed(self, what: str, error: OSError | MemoryError) -> None:
        """A system call failed: count it, say so once a kind, and change state."""
        number = error.errno if isinstance(error, OSError) else errno.ENOMEM
        with self._lock:
            self._errors += 1
            self._say(what, number, error)
            if self.state is DriveState.GONE or number in _NOT_THE_DRIVES:
                return
            if number == errno.EROFS:
                self._turn(DriveState.READ_ONLY, str(error))
            elif number in _NO_SPACE:
                self._turn(DriveState.FULL, str(error))
            else:
                self._errors_in_a_row += 1
                if self._errors_in_a_row >= FAILING_AFTER:
                    self._turn(DriveState.FAILING, f"{self._errors_in_a_row} errors in a row, the last: {error}")

    def found_damage(self, why: str, segment: int, slot: int) -> None:
        """A block is not what was written."""
        with self._lock:
            self._damaged += 1
            self._say(why, None, f"segment {segment} slot {slot}")

    def found_stranger(self, segment: int, reason: object) -> None:
        """A segment that was adopted is not there, or not ours, or of another version."""
        self.not_ours.append(segment)
        log.warning("segment not usable: directory=%s segment=%d reason=%s", self.path, segment, reason)

    def _say(self, what: str, number: int | None, reason: object) -> None:
        if (what, number) not in self._said:
            self._said.add((what, number))
            log.warning("drive fault: directory=%s what=%s reason=%s (said once)", self.path, what, reason)

    def _turn(self, state: DriveState, reason: str) -> None:
        if state is not self.state:
            log.warning("drive %s: directory=%s was=%s reason=%s", state, self.path, self.state, reason)
            self._probed_ns = self._now_ns()
        self.state, self._reason = state, reason

    # -- look thread ---------------------------------------------------------------------------------------------

    def run_looks(self, wake: Callable[[], None]) -> None:
        """Look whenever asked, until the end."""
        while (probe := self._looks.get()) is not None:
            self._look(probe=probe)
            self.ready.set()
            self._looking_since_ns = 0
            wake()

    def _look(self, *, probe: bool) -> None:
        try:
            if self._identity == (0, 0):
                if not probe:
                    return
                self._open()
            elif self.files.identity(self.folder) != self._identity:
                self._lose(self._mounts.why_absent(self.path) or f"{self.folder} is another folder now")
                return
            self._free_bytes, self._capacity_bytes = self.files.space(self.folder)
            if probe:
                self._probe()
                self._recover()
        except (FileNotFoundError, NotADirectoryError, NotToBeUsedError) as error:
            self._lose(self._mounts.why_absent(self.path) or str(error))
        except OSError as error:
            self.failed("look", error)
            if self.state is DriveState.OK and not self.ready.is_set():
                with self._lock:
                    self._turn(DriveState.FAILING, str(error))

    def _open(self) -> None:
        if why := self._mounts.why_absent(self.path):
            raise NotToBeUsedError(why)
        self.files.make_folder(self.folder)
        self._identity = self.files.identity(self.folder)
        self._opened(self.folder)

    def _lose(self, reason: str) -> None:
        with self._lock:
            self._turn(DriveState.GONE, reason)
            self._identity = (0, 0)
            self.lost = True

    def _probe(self) -> None:
        """Write a page and read it back, past the page cache if the file system lets us."""
        try:
            self._write_and_read(os.O_DIRECT)
            self.direct = True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._write_and_read(0)
            self.direct = False

    def _write_and_read(self, flag: int) -> None:
        path, page = self.folder / PROBE_NAME, aligned(PAGE_BYTES).data
        fd = self.files.open(path, os.O_RDWR | os.O_CREAT | flag)
        try:
            page[:] = PROBE_PAGE
            transfer(self.files.pwrite, fd, [page], 0)
            self.files.fdatasync(fd)
            page[:] = bytes(PAGE_BYTES)
            transfer(self.files.pread, fd, [page], 0)
        finally:
            self.files.close(fd)
        self.files.unlink(path)
        if page != PROBE_PAGE:
            raise OSError(errno.EIO, "a page came back changed")

    def _recover(self) -> None:
        with self._lock:
            if self.state is DriveState.FULL and self._free_bytes < self._segment_bytes:
                return
            self._said.clear()
            self._errors_in_a_row = 0
            if self.state is not DriveState.OK:
                log.warning("drive ok: directory=%s was=%s", self.path, self.state)
            self.state, self._reason = DriveState.OK, ""
