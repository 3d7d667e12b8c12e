"""What every client has done and is doing, in a shared file: a process that is killed leaves its figures behind.

A line a client. Its thread is the only one that writes there, but for `stops`, which is the crowd's.
"""

import math
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

LATE_S: Final = 0.5  # over its time: later than two busy cores explain
STEPS: Final = 16  # of latency within a factor of two: 4.4 % each
BUCKETS: Final = 28 * STEPS  # from 1 us to 268 s


class Verb(IntEnum):
    """What a client may be waiting for. NOTHING: it thinks."""

    NOTHING = 0
    CONNECT = 1
    FETCH = 2
    STORE = 3
    MATCH = 4
    FLUSH = 5
    PIN = 6
    UNPIN = 7
    PREFETCH = 8
    DELETE = 9
    RENEW = 10
    PING = 11


LINE: Final = np.dtype(
    [
        ("verb", "u8"), ("begun_ns", "u8"), ("limit_ns", "u8"), ("stops", "u8"), ("connected", "u8"),
        ("hits", "u8"), ("misses", "u8"), ("disk_hits", "u8"), ("lapsed", "u8"), ("compared_bytes", "u8"),
        ("stored", "u8"), ("known", "u8"), ("refused", "u8"), ("durable", "u8"), ("late", "u8"),
        ("worst_late_ns", "u8"), ("wrong", "u8"), ("failed", "u8"),
        ("longest_ns", "u8", (len(Verb),)), ("times", "u4", (len(Verb), BUCKETS)),
    ]
)  # fmt: skip
Line = np.void  # of LINE


@dataclass(frozen=True, slots=True)
class Latency:
    """Of one verb over all clients. Seconds; to 4 %, but for the longest."""

    count: int
    p50_s: float
    p99_s: float
    longest_s: float


class Board:
    """The file, mapped. Any process."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            self._map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self.lines: NDArray[np.void] = np.frombuffer(self._map, dtype=LINE)

    @staticmethod
    def make(path: Path, clients: int) -> "Board":
        """A new one, for so many; other users may write to it."""
        path.write_bytes(bytes(LINE.itemsize * clients))
        path.chmod(0o666)
        return Board(path)

    def total(self, name: str) -> int:
        """Of one counter, over all clients."""
        return int(self.lines[name].sum())

    def latency(self, verb: Verb) -> Latency:
        """How long it took."""
        times = self.lines["times"][:, verb].sum(axis=0, dtype=np.int64)
        return _latency(times, self.lines["longest_ns"][:, verb])

    def all_calls(self) -> Latency:
        """How long calls took, whatever they were."""
        return _latency(self.lines["times"].sum(axis=(0, 1), dtype=np.int64), self.lines["longest_ns"])

    def asked(self) -> int:
        """Calls that were answered."""
        return int(self.lines["times"].sum(dtype=np.int64))

    def forget(self) -> None:
        """All figures are 0 again; for when nobody writes."""
        self.lines[:] = 0


def _latency(times: NDArray[np.int64], longest_ns: NDArray[np.uint64]) -> Latency:
    return Latency(int(times.sum()), _percentile(times, 0.5), _percentile(times, 0.99), float(longest_ns.max()) / 1e9)


def _percentile(times: NDArray[np.int64], share: float) -> float:
    """Middle of the bucket that it falls into; 0 without any."""
    if not times.any():
        return 0.0
    bucket = int(np.searchsorted(times.cumsum(), share * times.sum()))
    return float(1e-6 * 2 ** ((bucket + 0.5) / STEPS))


def bucket_of(ns: int) -> int:
    """In which bucket a time is counted."""
    return min(BUCKETS - 1, max(0, int(STEPS * math.log2(max(ns, 1000) / 1000))))


@contextmanager
def asking(line: Line, verb: Verb, within_s: float) -> Iterator[None]:
    """A call that must be over `within_s` from now on. Not counted if this process was stopped meanwhile."""
    stops = int(line["stops"])
    begun_ns = time.monotonic_ns()
    limit_ns = begun_ns + int(within_s * 1e9)
    line["begun_ns"], line["limit_ns"] = begun_ns, limit_ns
    line["verb"] = verb
    try:
        yield
    finally:
        now_ns = time.monotonic_ns()
        line["verb"] = Verb.NOTHING
        if int(line["stops"]) == stops:
            line["times"][verb, bucket_of(now_ns - begun_ns)] += 1
            line["longest_ns"][verb] = max(int(line["longest_ns"][verb]), now_ns - begun_ns)
            if now_ns > limit_ns + int(LATE_S * 1e9):
                line["late"] += 1
                line["worst_late_ns"] = max(int(line["worst_late_ns"]), now_ns - limit_ns)
