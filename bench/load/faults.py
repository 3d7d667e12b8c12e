"""What is wrong with a drive, in a page that the daemon of `victim.py` looks at before each of its calls."""

import mmap
import os
from enum import IntEnum
from pathlib import Path
from typing import Final

PAGE: Final = 4096
FAULT, AUDIT = 0, 8  # bytes of the page: a `Fault`; how many audits were asked for


class Fault(IntEnum):
    """What happens to calls on the segment files of one directory."""

    NONE = 0
    READS_FAIL = 1  # every third with EIO
    WRITES_FAIL = 2  # every third with EIO, syncs too
    FULL = 3  # ENOSPC for whatever takes space
    HANGS = 4  # nothing comes back as long as it lasts
    LIES = 5  # every third read has a bit flipped
    SHORT = 6  # every third call moves half of what it was asked for


class Page:
    """That page. Any process."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, PAGE)
            self._map = mmap.mmap(fd, PAGE)
        finally:
            os.close(fd)

    @property
    def fault(self) -> Fault:
        """What is wrong now."""
        return Fault(self._map[FAULT])

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._map[FAULT] = fault

    @property
    def audits(self) -> int:
        """How many were asked for."""
        return self._map[AUDIT]

    def ask_for_audit(self) -> None:
        """One more."""
        self._map[AUDIT] = (self._map[AUDIT] + 1) % 256
