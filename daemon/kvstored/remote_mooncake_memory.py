"""Memory that the daemon and Mooncake's client share: one memfd, spans of it, and arrays that give theirs back.

A span serves one call. What was read into it is lent as an array, without a copy, while less than half of the memory is
lent; the span is free again when the last view of that array is gone.
"""

import mmap
import os
import threading
import time
from collections import deque
from typing import Any, Final

import numpy as np

from kvproto.limits import PAGE_BYTES
from kvstored.remote_port import Bytes

POLL_S: Final = 0.002  # who gives a span back may be a thread in the midst of collecting garbage, so it wakes nobody


class Region:
    """One memory. Any thread."""

    def __init__(self, region_bytes: int) -> None:
        """Its pages appear as they are written. Raises OSError."""
        self.fd = os.memfd_create("kvstored-remote", os.MFD_CLOEXEC)
        self.region_bytes = region_bytes
        try:
            os.ftruncate(self.fd, region_bytes)
            self._map = mmap.mmap(self.fd, region_bytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._free = [(0, region_bytes)]  # in order, no two of them side by side
        self._lock = threading.Lock()
        self._back: deque[tuple[int, int, bool]] = deque()
        self._lent_bytes = 0

    def take(self, wanted_bytes: int, until_s: float) -> "Span | None":
        """A span of at least so many bytes; None: there was none until then. The lowest that fits: it is warm."""
        size = max(PAGE_BYTES, -(-wanted_bytes // PAGE_BYTES) * PAGE_BYTES)
        while True:
            with self._lock:
                self._collect()
                for number, (at, room) in enumerate(self._free):
                    if room >= size:
                        self._free[number : number + 1] = [(at + size, room - size)] if room > size else []
                        return Span(self, at, size)
            if time.monotonic() >= until_s:
                return None
            time.sleep(POLL_S)

    def give(self, at: int, size: int, *, lent: bool = False) -> None:
        """A span is free. Takes no lock: called from wherever an array ends."""
        self._back.append((at, size, lent))

    def lend(self, size: int) -> bool:
        """May so many bytes be lent?"""
        with self._lock:
            self._collect()
            if self._lent_bytes + size > self.region_bytes // 2:
                return False
            self._lent_bytes += size
            return True

    @property
    def free_bytes(self) -> int:
        """Of all spans together that nobody has."""
        with self._lock:
            self._collect()
            return sum(room for _, room in self._free)

    def close(self) -> None:
        """Nobody new gets it. What is lent stays good."""
        os.close(self.fd)

    def _collect(self) -> None:
        while self._back:
            at, size, lent = self._back.popleft()
            self._lent_bytes -= size if lent else 0
            self._free.append((at, size))
            self._free.sort()
            merged: list[tuple[int, int]] = []
            for begin, room in self._free:
                if merged and sum(merged[-1]) == begin:
                    merged[-1] = (merged[-1][0], merged[-1][1] + room)
                else:
                    merged.append((begin, room))
            self._free = merged


class Span:
    """A part of a region, for one call. Whoever has it calls `free` or `lend` once, or leaves it to be lost."""

    __slots__ = ("at", "region", "size")

    def __init__(self, region: Region, at: int, size: int) -> None:
        self.region = region
        self.at = at
        self.size = size

    @property
    def bytes(self) -> Bytes:
        """All of it."""
        return self.region.bytes[self.at : self.at + self.size]

    def free(self) -> None:
        """Nobody writes there any more."""
        self.region.give(self.at, self.size)

    def lend(self, start: int, stop: int) -> Bytes:
        """These bytes of it, read-only; a copy where too much is lent. The span is not the caller's any more."""
        if self.region.lend(self.size):
            lent: Bytes = np.asarray(_Lent(self))
            return lent[start:stop]
        copy = self.bytes[start:stop].copy()
        copy.flags.writeable = False
        self.free()
        return copy


class _Lent:
    """What arrays over a span keep alive."""

    __slots__ = ("__array_interface__", "_span")

    def __init__(self, span: Span) -> None:
        self._span = span
        address = span.region.bytes.ctypes.data + span.at
        self.__array_interface__: dict[str, Any] = {
            "shape": (span.size,), "typestr": "|u1", "data": (address, True), "version": 3,
        }  # fmt: skip

    def __del__(self) -> None:
        self._span.region.give(self._span.at, self._span.size, lent=True)
