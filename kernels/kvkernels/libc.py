"""Shared memory through libc. Python's `mmap` keeps a duplicate of the descriptor and holds the GIL in `madvise`."""

import ctypes
import os
from collections.abc import Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvkernels.aligned import PAGE_BYTES

Addresses: TypeAlias = NDArray[np.uint64]

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_NONE: Final = 0
MAP_SHARED: Final = 1
MAP_PRIVATE: Final = 2
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MADV_DONTFORK: Final = 10
MADV_POPULATE_READ: Final = 22  # Linux 5.14
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25  # Linux 6.1
HUGE_PAGE_BYTES: Final = 2 << 20
PIECES_PER_CALL: Final = 1024  # IOV_MAX of Linux
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
MAP_FAILED: Final = (1 << (8 * ctypes.sizeof(ctypes.c_void_p))) - 1

_libc = ctypes.CDLL(None, use_errno=True)  # calls release the GIL
_sched_getcpu = getattr(ctypes.PyDLL(None), "sched_getcpu", None)  # this one does not, being shorter than that
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
)  # fmt: skip
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def map_shared(fd: int, map_bytes: int, *, writable: bool) -> int:
    """Map a descriptor; the address. The caller may close the descriptor. Raises OSError.

    What could consist of huge pages lies where they can be mapped as such.
    """
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    if map_bytes < HUGE_PAGE_BYTES:
        return _map(None, map_bytes, protection, MAP_SHARED, fd)
    room = _map(None, map_bytes + HUGE_PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1)
    address = -(-room // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end, room_end = address + -(-map_bytes // PAGE_BYTES) * PAGE_BYTES, room + map_bytes + HUGE_PAGE_BYTES
    try:
        _map(address, map_bytes, protection, MAP_SHARED | MAP_FIXED, fd)
    except OSError:
        unmap(room, map_bytes + HUGE_PAGE_BYTES)
        raise
    if address > room:
        unmap(room, address - room)
    if end < room_end:
        unmap(end, room_end - end)
    return address


def _map(where: int | None, map_bytes: int, protection: int, flags: int, fd: int) -> int:
    address = _libc.mmap(where, map_bytes, protection, flags, fd, 0)
    if address is None or address == MAP_FAILED:
        raise _error("mmap")
    return int(address)


def unmap(address: int, map_bytes: int) -> None:
    """Undo `map_shared`. Nothing may look there any more."""
    if _libc.munmap(address, map_bytes):
        raise _error("munmap")


def bytes_at(address: int, map_bytes: int) -> Bytes:
    """Mapped memory as an array. It does not keep the map alive."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * map_bytes).from_address(address))


def advise(address: int, map_bytes: int, advice: int) -> None:
    """madvise, with the GIL released. Raises OSError."""
    if _libc.madvise(address, map_bytes, advice):
        raise _error("madvise")


def make_huge(address: int, map_bytes: int) -> bool:
    """Populate shared memory with huge pages; False, and some of it not, where the kernel has none or makes none.

    `address` is a multiple of HUGE_PAGE_BYTES, `map_bytes` too. Works whatever `shmem_enabled` says (madvise(2),
    MADV_COLLAPSE, Linux 6.1), but only around a page that is there. The GIL is released. Raises OSError without memory.
    """
    for huge in range(address, address + map_bytes, HUGE_PAGE_BYTES):
        advise(huge, PAGE_BYTES, MADV_POPULATE_WRITE)
    made: int = _libc.madvise(address, map_bytes, MADV_COLLAPSE)
    return made == 0


def lock(address: int, map_bytes: int) -> None:
    """mlock: these pages are never swapped. Raises OSError where the limit does not allow it."""
    if _libc.mlock(address, map_bytes):
        raise _error("mlock")


def punch(fd: int, map_bytes: int) -> None:
    """Free all pages of a descriptor; maps of it read zeros from now on. Raises OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, map_bytes):
        raise _error("fallocate")


class Pieces:
    """What is to be copied within this process, with all set up for the kernel (process_vm_readv(2) of oneself).

    It copies at 0.8 of the speed of memmove, but takes and gives the GIL once for all pieces.
    """

    def __init__(self, targets: Addresses, sources: Addresses) -> None:
        """Shape (pieces, 2) each, C-contiguous: addresses and bytes, the same bytes in both."""
        self._targets = targets
        self._sources = sources

    def copy(self) -> bool:
        """Whether it is done. False where that is not allowed; some may have been copied then. Any thread."""
        for first in range(0, len(self._targets), PIECES_PER_CALL):
            targets = self._targets[first : first + PIECES_PER_CALL]
            sources, count = self._sources[first : first + PIECES_PER_CALL], len(targets)
            copied = _libc.process_vm_readv(os.getpid(), targets.ctypes.data, count, sources.ctypes.data, count, 0)
            if copied != int(targets[:, 1].sum()):
                return False
        return True


def copy_pieces(moves: Sequence[tuple[int, int, int]]) -> bool:
    """`Pieces` of (target address, source address, bytes), at once."""
    pieces = np.array(moves, dtype=np.uint64).reshape(-1, 3)
    targets, sources = np.ascontiguousarray(pieces[:, [0, 2]]), np.ascontiguousarray(pieces[:, [1, 2]])
    return Pieces(targets, sources).copy()


def current_cpu() -> int:
    """The processor that the calling thread runs on right now; -1 where nobody says."""
    return int(_sched_getcpu()) if _sched_getcpu is not None else -1


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
