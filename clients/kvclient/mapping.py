"""Shared memory that the daemon hands over, mapped into this process, and warming it up.

A `Mapping` lives as long as anything looks into it: views and arrays made from it hold its base object, and only
when the last of them is gone is the memory unmapped. The descriptor is closed by the caller right after mapping
(Python's own `mmap` would keep a duplicate for each, and engines often run with 1,024 descriptors).
"""

import _thread
import ctypes
import errno
import functools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeAlias

from kvkernels import libc
from kvproto.errors import ProtocolError
from kvproto.limits import MIB

STEP_BYTES: Final = 2 * MIB  # 0.2 ms of populating


class Mapping:
    """One shared map. `address` stays good as long as this object, or any view made from `view`, is alive.

    `unmapped` is called once the memory is gone, in whichever thread let go last and possibly from within the
    garbage collector: it must not take a lock. Raises OSError where the kernel refuses, ProtocolError where the
    object behind `fd` is smaller than said (touching past its end would kill the process).
    """

    __slots__ = ("__weakref__", "address", "bytes", "cold", "gone", "queued", "view", "writable")

    def __init__(self, fd: int, map_bytes: int, *, writable: bool, unmapped: Callable[[], None] | None = None) -> None:
        if map_bytes <= 0 or os.fstat(fd).st_size < map_bytes:
            raise ProtocolError(f"shared memory of {os.fstat(fd).st_size} bytes where {map_bytes} were promised")
        address = libc.map_shared(fd, map_bytes, writable=writable)
        # A child must not keep the daemon's memory busy, nor write into a ring whose spans its parent owns.
        libc.advise(address, map_bytes, libc.MADV_DONTFORK)
        base = _array_type(map_bytes).from_address(address)
        ending = weakref.finalize(base, _unmap, os.getpid(), address, map_bytes, unmapped)
        ending.atexit = False
        self.address = address
        self.bytes = map_bytes
        self.writable = writable
        self.view = memoryview(base).cast("B") if writable else memoryview(base).cast("B").toreadonly()
        self.gone = False  # the daemon took it back: not worth warming any more
        self.cold = set(range(-(-map_bytes // STEP_BYTES)))  # steps that nobody has populated yet
        self.queued = False  # all of them are in line to be


@functools.lru_cache(maxsize=64)
def _array_type(array_bytes: int) -> Any:  # a ctypes array class cannot be spelt as a static type
    # A subclass, because plain ctypes arrays cannot be referenced weakly.
    return type("SharedBytes", (ctypes.c_ubyte * array_bytes,), {})


def _unmap(
    pid: int,
    address: int,
    map_bytes: int,
    unmapped: Callable[[], None] | None,
    *,
    unmap: Callable[[int, int], None] = libc.unmap,
    getpid: Callable[[], int] = os.getpid,
) -> None:
    # A forked child never had this map (MADV_DONTFORK), and something else may lie at its address there.
    if getpid() != pid:
        return
    unmap(address, map_bytes)
    if unmapped is not None:
        unmapped()


Place: TypeAlias = tuple[Mapping, int]  # a block's map, and its offset there in bytes


class Memory(Protocol):
    """How a session gets at what the daemon sends: a port, so that the protocol itself maps nothing."""

    def map_arena(self, fd: int, map_bytes: int, unmapped: Callable[[], None]) -> Mapping:
        """Read-only. `unmapped` as for `Mapping`."""
        ...

    def map_ring(self, fd: int, map_bytes: int, unmapped: Callable[[], None] | None = None) -> Mapping:
        """Writable: the ring, or in mode direct an arena."""
        ...

    def warm(self, places: Sequence[Place], length: int) -> None:
        """`length` bytes at each of these places are about to be used, in this order. Never blocks."""
        ...

    def populate(self, mapping: Mapping, offset: int, length: int) -> None:
        """They are used now: do here what nobody has begun to do."""
        ...


class HostMemory:
    """The real thing: libc maps, warmed up by one helper thread that ends when it has nothing to do. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._urgent: deque[tuple[Mapping, int]] = deque()
        self._later: deque[tuple[Mapping, int]] = deque()
        self._running = False
        self._supported = True

    def map_arena(self, fd: int, map_bytes: int, unmapped: Callable[[], None]) -> Mapping:
        """Read-only. `unmapped` as for `Mapping`."""
        return Mapping(fd, map_bytes, writable=False, unmapped=unmapped)

    def map_ring(self, fd: int, map_bytes: int, unmapped: Callable[[], None] | None = None) -> Mapping:
        """Writable: the ring, or in mode direct an arena."""
        return Mapping(fd, map_bytes, writable=True, unmapped=unmapped)

    def warm(self, places: Sequence[Place], length: int) -> None:
        """Populate the page tables in the background: these places first and in this order, then the rest.

        A first touch costs 0.3 us a page otherwise, a quarter of the time of a copy.
        """
        if not self._supported:
            for mapping, _ in places:
                mapping.cold.clear()
            return
        wanted = dict.fromkeys((mapping, step) for mapping, offset in places for step in _steps(offset, length))
        with self._lock:
            self._urgent.extend(wanted)
            for mapping in dict.fromkeys(mapping for mapping, _ in places):
                if not mapping.queued:
                    mapping.queued = True
                    self._later.extend((mapping, step) for step in sorted(mapping.cold))
            if self._running:
                return
            self._running = True
        try:
            # Not `threading.Thread`, whose `start` waits until the thread runs: milliseconds on a busy host.
            _thread.start_new_thread(self._populate_all, ())
        except RuntimeError:  # no more threads, or the interpreter is ending: touching will do it
            self._running = False

    def populate(self, mapping: Mapping, offset: int, length: int) -> None:
        """Populate what the helper has not begun yet. Populating takes about as long as copying: it is shared out."""
        for step in _steps(offset, length):
            if step in mapping.cold:
                self._populate_step(mapping, step)

    def _populate_all(self) -> None:
        while True:
            with self._lock:
                queue = self._urgent or self._later
                if not queue:
                    self._running = False
                    return
                mapping, step = queue.popleft()
            if step in mapping.cold and not mapping.gone:
                self._populate_step(mapping, step)

    def _populate_step(self, mapping: Mapping, step: int) -> None:
        try:
            mapping.cold.remove(step)
        except KeyError:
            return  # another thread was faster
        start = step * STEP_BYTES
        advice = libc.MADV_POPULATE_WRITE if mapping.writable else libc.MADV_POPULATE_READ
        length = min(STEP_BYTES, mapping.bytes - start)
        try:
            libc.advise(mapping.address + start, length, advice)
        except OSError as error:
            # Other failures (no memory, say) are left for the touch itself to find, or not.
            if error.errno == errno.EINVAL:  # before Linux 5.14
                self._supported = False
                mapping.cold.clear()


def _steps(offset: int, length: int) -> range:
    return range(offset // STEP_BYTES, (offset + length - 1) // STEP_BYTES + 1)
