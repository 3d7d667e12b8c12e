"""Which memory of a host pages lie in: the system calls that `libnuma` wraps, without it.

A policy set for a map of a memfd is the memfd's: it holds for whoever touches a page first, in any process.
"""

import ctypes
import os
import platform
from collections.abc import Sequence
from typing import Final

NODES_MAX: Final = 1024  # of the kernel: CONFIG_NODES_SHIFT is 10 at most
_MPOL_PREFERRED: Final = 1
_WORD_BITS: Final = 8 * ctypes.sizeof(ctypes.c_ulong)
_NUMBERS: Final = {"x86_64": (237, 279), "aarch64": (235, 239)}  # of mbind and move_pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def prefer(address: int, map_bytes: int, node: int) -> None:
    """Have pages of this map made on `node` from now on, elsewhere where it has none left. Raises OSError.

    Preferred and not bound: a process whose bound node is full is killed, whatever the others have.
    """
    if not 0 <= node < NODES_MAX:
        raise ValueError(f"node {node}")
    mask = (ctypes.c_ulong * (NODES_MAX // _WORD_BITS))()
    mask[node // _WORD_BITS] = 1 << (node % _WORD_BITS)
    mbind, _ = _numbers()
    _call(
        "mbind", mbind, ctypes.c_void_p(address), ctypes.c_ulong(map_bytes), ctypes.c_int(_MPOL_PREFERRED), mask,
        ctypes.c_ulong(NODES_MAX + 1), ctypes.c_uint(0),
    )  # fmt: skip


def nodes_of(addresses: Sequence[int]) -> list[int]:
    """On which node the page at each address lies; negative (an errno) for one that is not there. Raises OSError."""
    if not addresses:
        return []
    pages = (ctypes.c_void_p * len(addresses))(*addresses)
    found = (ctypes.c_int * len(addresses))()
    _, move_pages = _numbers()
    _call(
        "move_pages", move_pages, ctypes.c_int(0), ctypes.c_ulong(len(addresses)), pages, None, found, ctypes.c_int(0)
    )
    return list(found)


def _numbers() -> tuple[int, int]:
    try:
        return _NUMBERS[platform.machine()]
    except KeyError:
        raise OSError(f"nobody knows the calls for NUMA on {platform.machine()}") from None


def _call(name: str, *arguments: object) -> None:
    number, *rest = arguments
    assert isinstance(number, int)
    if _libc.syscall(ctypes.c_long(number), *rest):
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
