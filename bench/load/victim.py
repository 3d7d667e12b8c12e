"""`python -m bench.load.victim HOME ...`: the daemon, with a drive that fails as told, and audits of its tables.

HOME has the page of `faults.py`; segment files in HOME/bad are those of the drive that fails. An audit's verdict goes
to HOME/audit-N: empty if every invariant of `kvstore/audit.py` holds.
"""

import errno
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bench.load.faults import Fault, Page
from kvstored import drive_files, drive_health
from kvstored.cli import main

R = TypeVar("R")

EACH = 3  # one call in so many is hit
HUNG_S = 0.05  # how often a hung call looks whether it may go on


class BadDrive:
    """Between the daemon and the calls of `drive_files.Files`."""

    def __init__(self, page: Page, folder: Path) -> None:
        self._page = page
        self._folder = str(folder)
        self._bad: set[int] = set()  # descriptors of files in there
        self._turn = 0
        self._real = {
            name: getattr(drive_files.Files, name) for name in ("open", "close", "pread", "pwrite", "fallocate")
        }
        self._real["fdatasync"] = drive_files.Files.fdatasync

    def install(self) -> None:
        """From now on."""
        for name in self._real:
            own = getattr(self, f"_{name}")
            setattr(drive_files.Files, name, lambda files, *given, own=own: own(files, *given))

    def _open(self, files: object, path: Path, flags: int) -> int:
        fd: int = self._real["open"](files, path, flags)
        if str(path).startswith(self._folder):
            self._bad.add(fd)
        return fd

    def _close(self, files: object, fd: int) -> None:
        self._bad.discard(fd)
        self._real["close"](files, fd)

    def _pread(self, files: object, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._fault(fd)
        if fault is Fault.READS_FAIL and self._hit():
            raise OSError(errno.EIO, "planted")
        if fault is Fault.SHORT and self._hit():
            return self._half("pread", files, fd, buffers, offset)
        came: int = self._real["pread"](files, fd, buffers, offset)
        if fault is Fault.LIES and self._hit():
            longest = max(buffers, key=len)
            longest[len(longest) // 2] ^= 1
        return came

    def _pwrite(self, files: object, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self._fault(fd)
        if fault is Fault.FULL:
            raise OSError(errno.ENOSPC, "planted")
        if fault is Fault.WRITES_FAIL and self._hit():
            raise OSError(errno.EIO, "planted")
        if fault is Fault.SHORT and self._hit():
            return self._half("pwrite", files, fd, buffers, offset)
        went: int = self._real["pwrite"](files, fd, buffers, offset)
        return went

    def _half(self, name: str, files: object, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        first = buffers[0]
        moved: int = self._real[name](files, fd, [first[: len(first) // 2 // 4096 * 4096]], offset)
        return moved

    def _fallocate(self, files: object, fd: int, file_bytes: int) -> None:
        if self._fault(fd) is Fault.FULL:
            raise OSError(errno.ENOSPC, "planted")
        self._real["fallocate"](files, fd, file_bytes)

    def _fdatasync(self, files: object, fd: int) -> None:
        if self._fault(fd) is Fault.WRITES_FAIL and self._hit():
            raise OSError(errno.EIO, "planted")
        self._real["fdatasync"](files, fd)

    def _fault(self, fd: int) -> Fault:
        """What is wrong with the drive of this file, after it has hung."""
        if fd not in self._bad:
            return Fault.NONE
        while self._page.fault is Fault.HANGS:
            time.sleep(HUNG_S)
        return self._page.fault

    def _hit(self) -> bool:
        self._turn += 1
        return self._turn % EACH == 0


def audit_when_asked(page: Page, home: Path) -> None:
    """The owner thread looks at every turn of its loop."""
    from kvstore.audit import audit
    from kvstored.daemon import Daemon

    turn: Callable[[Daemon], int] = Daemon._turn  # noqa: SLF001  there is no other way in, and users want none
    done = page.audits

    def turn_and_audit(daemon: Daemon) -> int:
        nonlocal done
        if page.audits != done:
            done = page.audits
            try:
                audit(daemon._store)  # noqa: SLF001
                verdict = ""
            except AssertionError as wrong:
                verdict = f"{wrong!r}"
            (home / "audit-new").write_text(verdict)
            (home / "audit-new").rename(home / f"audit-{done}")
        return turn(daemon)

    setattr(Daemon, "_turn", turn_and_audit)  # noqa: B010  a method that is replaced


if __name__ == "__main__":
    home = Path(sys.argv[1])
    page = Page(home / "faults")
    BadDrive(page, home / "bad").install()
    drive_health.PROBE_NS = 10**9  # type: ignore[misc]  # what was given up is tried again ten times as often
    audit_when_asked(page, home)
    sys.exit(main(sys.argv[2:]))
