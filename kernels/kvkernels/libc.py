"""Shared memory through libc. Python's `mmap` keeps a duplicate of the descriptor and holds the GIL in `madvise`."""

import ctypes
import os
from typing import Final

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

PROT_READ: Final = 1
PROT_WRITE: Final = 2
MAP_SHARED: Final = 1
MADV_DONTFORK: Final = 10
MADV_POPULATE_READ: Final = 22  # Linux 5.14
MADV_POPULATE_WRITE: Final = 23
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
MAP_FAILED: Final = (1 << (8 * ctypes.sizeof(ctypes.c_void_p))) - 1

_libc = ctypes.CDLL(None, use_errno=True)  # calls release the GIL
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def map_shared(fd: int, map_bytes: int, *, writable: bool) -> int:
    """Map a descriptor; the address. The caller may close the descriptor. Raises OSError."""
    protection = PROT_READ | (PROT_WRITE if writable else 0)
    address = _libc.mmap(None, map_bytes, protection, MAP_SHARED, fd, 0)
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


def lock(address: int, map_bytes: int) -> None:
    """mlock: these pages are never swapped. Raises OSError where the limit does not allow it."""
    if _libc.mlock(address, map_bytes):
        raise _error("mlock")


def punch(fd: int, map_bytes: int) -> None:
    """Free all pages of a descriptor; maps of it read zeros from now on. Raises OSError."""
    if _libc.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, map_bytes):
        raise _error("fallocate")


def _error(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")
