"""From which number on a life of the daemon counts what it tells: one that no former life has come to.

    STATE_DIR/event-numbers    magic, a number that no life has passed, checksum

Mostly the host's clock is ahead of all former lives. Where it was put back it is not, so a number is kept beside: far
ahead of what was given, and written before anything beyond it is, so that `kill -9` loses nothing. Without it, or with
one that is damaged, the clock alone is believed.
"""

import logging
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from kvstored.index_marks import DamagedError, unseal, write_sealed

log = logging.getLogger(__name__)

FILE: Final = "event-numbers"
STRIDE: Final = 1 << 20  # numbers from one writing to the next: at a hundred batches a second three hours
AGAIN: Final = 1 << 12  # numbers after which one that failed is tried again
BATCHES_BITS: Final = 12  # of numbers: no life tells of so many a millisecond; below JSON's 2**53 until 2039
MOST: Final = 1 << 62  # far above what any clock says, and below what stands for "that was all"

_KEPT: Final = struct.Struct("<8sQ")
_MAGIC: Final = b"KVEVENT\0"
_FILE_BYTES: Final = 4096  # far above what is written


def begin_now() -> int:
    """A number to begin with that no former life of this daemon has come to, if the host's clock was never ahead."""
    return time.time_ns() // 10**6 << BATCHES_BITS  # a daemon may be back within a second


class Numbers:
    """Those of one life: `begin` is the first one."""

    def __init__(self, folder: Path | None = None, now: Callable[[], int] = begin_now) -> None:
        """`folder`: of state; None: nothing is kept, and the clock alone is believed."""
        self.faults = 0  # times that what is kept could not be read or written
        self._path = folder / FILE if folder is not None else None
        self.begin = min(max(now(), self._kept()), MOST)
        self._until = self.begin  # what lies below may be given

    def give(self, number: int) -> None:
        """This one is about to be given, and no later life will begin with it. Mostly at once, now and then as long
        as a small file takes to be durable. One thread.
        """
        if number < self._until:
            return
        self._until = number + STRIDE
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_sealed(self._path, _KEPT.pack(_MAGIC, self._until))
        except OSError as error:
            self.faults += 1
            self._until = number + AGAIN
            log.warning("events: %s: %s; after a restart with a clock put back, numbers may repeat", self._path, error)

    def _kept(self) -> int:
        """0: nothing is known of former lives."""
        if self._path is None:
            return 0
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                return _parsed(file.read(_FILE_BYTES))
        except FileNotFoundError:
            return 0
        except (OSError, DamagedError) as error:
            self.faults += 1
            log.warning("events: %s cannot be read (%s): the clock alone says which numbers are new", FILE, error)
            return 0


def _parsed(content: bytes) -> int:
    """Raises DamagedError."""
    inner = unseal(content)
    if len(inner) != _KEPT.size:
        raise DamagedError("another length")
    magic, kept = _KEPT.unpack(inner)
    if magic != _MAGIC or kept > MOST:
        raise DamagedError("another form")
    return int(kept)
