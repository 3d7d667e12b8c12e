"""Moving bytes between addresses, without the GIL.

Two ways, since neither is good everywhere (measured on AMD Zen 3, blocks of 64 KiB, GB/s):

    target - source, modulo 32       0      8     16
    memmove                         12.1   3.3    7.3     glibc uses `rep movsb`, which hates unequal alignment
    NumPy's vector loop (x | x)     13.1  12.8   12.7     and costs 0.4 us more a call

Slots and spans begin at pages, NumPy's large arrays 16 bytes after one, torch's 64 bytes after one.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import numpy as np

from kvkernels import libc
from kvproto.limits import MIB

Move: TypeAlias = tuple[int, int, int]  # target address, source address, bytes

SMALL_MANY: Final = 4  # moves from which on `copy_at_once` does not copy one by one

BOUNCE_BYTES: Final = 2 * MIB

_BASE: Final = 4096  # nothing is ever mapped below
_clock = time.monotonic


class _AddressSpace:
    """Every address of this process as one array, so that a slice of it is memory at an address: 0.1 us each."""

    __array_interface__: Final[dict[str, Any]] = {
        "data": (_BASE, False),
        "shape": ((1 << 48) - _BASE,),
        "typestr": "|u1",
        "version": 3,
    }


_bytes_at: Final = np.asarray(_AddressSpace())


def bytes_at(address: int, length: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Memory at an address as an array. The caller vouches for it, and keeps it alive."""
    start = address - _BASE
    return _bytes_at[start : start + length]


def moves_of(targets: Iterable[int], sources: Iterable[int], block_bytes: int) -> list[Move]:
    """The moves for blocks of one size; blocks that lie next to each other on both sides become one move."""
    moves: list[Move] = []
    first_target = first_source = 0
    next_target = next_source = -1
    for target, source in zip(targets, sources, strict=False):
        if target != next_target or source != next_source:
            if next_target >= 0:
                moves.append((first_target, first_source, next_target - first_target))
            first_target, first_source = target, source
            next_target, next_source = target, source
        next_target += block_bytes
        next_source += block_bytes
    if next_target >= 0:
        moves.append((first_target, first_source, next_target - first_target))
    return moves


def copy(moves: Iterable[Move]) -> None:
    """Do it. The caller vouches for the addresses. Other threads run meanwhile."""
    memmove, bitwise_or, bytes_at = ctypes.memmove, np.bitwise_or, _bytes_at
    for target, source, length in moves:
        if (target - source) & 31:
            start = source - _BASE
            read = bytes_at[start : start + length]
            start = target - _BASE
            bitwise_or(read, read, bytes_at[start : start + length])
        else:
            memmove(target, source, length)


def copy_at_once(moves: list[Move]) -> None:
    """The same in few calls, for many small moves while other threads are busy in Python.

    After each of its moves `copy` asks for the GIL again, and waits up to 5 ms for it while another thread computes.
    Where the kernel does not allow this, or stops half-way, it is `copy`.
    """
    if len(moves) < SMALL_MANY or not libc.copy_pieces(moves):
        copy(moves)


class Bounce:
    """A buffer that copies pass through (mode ring): on a GPU it would be pinned, and DMA end or begin there.

    One copy at a time; the others wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffer: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None

    def copy(self, moves: Iterable[Move]) -> None:
        """As `copy`, by way of the buffer."""
        with self._lock:
            if self._buffer is None:
                self._buffer = np.zeros(BOUNCE_BYTES, dtype=np.uint8)
            between = self._buffer.ctypes.data
            for target, source, length in moves:
                for start in range(0, length, BOUNCE_BYTES):
                    step = min(BOUNCE_BYTES, length - start)
                    copy([(between, source + start, step), (target + start, between, step)])


class WithdrawnError(Exception):
    """The memory that was to be copied is for something else now."""


class Gate:
    """Whether memory may still be read. A context manager for whoever reads; any thread may close it, once for all.

    `close` returns when nobody reads any more: at most a batch's copy later. Raises WithdrawnError for who comes after.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self.read_s: float | None = None  # when reading began, in seconds of CLOCK_MONOTONIC,
        self.until_s = 0.0  # and when it ended the last time
        self.seconds = 0.0  # of reading, in all
        self._entered_s = 0.0

    def close(self) -> None:
        """Nobody reads from here on."""
        with self._lock:
            self._closed = True

    @property
    def closed(self) -> bool:
        """Will nobody read any more? Never waits."""
        return self._closed

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._closed:
            self._lock.release()
            raise WithdrawnError("the memory was withdrawn before it was copied")
        self._entered_s = _clock()
        self.read_s = self._entered_s if self.read_s is None else self.read_s

    def __exit__(self, *_: object) -> None:
        self.until_s = _clock()
        self.seconds += self.until_s - self._entered_s
        self._lock.release()


class Stopwatch:
    """How long the copies of one lease took, without the waiting in between."""

    ns = 0
    spoilt = False  # something else was measured too

    def measure(self, copying: Callable[[], None]) -> None:
        """Do one of them."""
        began_ns = time.monotonic_ns()
        copying()
        self.ns += time.monotonic_ns() - began_ns
