"""The kernels of cuda/*.cu on a processor, one at a time: compiled by g++ when the first of them is wanted."""

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from kvkernels import libc
from kvkernels.device.port import Argument, DeviceError, NoDeviceError, PagesArgument, UnfitError

FOLDER: Final = Path(__file__).parent.parent / "cuda"
COMPILE: Final = ("-shared", "-fPIC", "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas")
Holds: TypeAlias = "Callable[[np.ndarray[tuple[int], np.dtype[np.uint64]], Sequence[int] | int], bool]"
Kernel: TypeAlias = Callable[[Holds, int, int, Sequence[Argument]], None]

_turn: Final = threading.Lock()  # threads of a kernel are coroutines around one set of globals


@cache
def library() -> ctypes.CDLL:
    """All of them. Raises NoDeviceError without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoDeviceError("the emulation's kernels want g++")
    with tempfile.TemporaryDirectory(prefix="kvkernels-") as folder:
        made = Path(folder) / "kernels.so"
        done = subprocess.run(  # noqa: S603  # our own source, by the compiler in PATH
            [compiler, *COMPILE, "-o", made, FOLDER / "emulated.cpp"], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise NoDeviceError(f"the emulation's kernels do not compile: {done.stderr[-2000:]}")
        return ctypes.CDLL(str(made))


def find(name: str) -> Kernel:
    """A kernel. Raises UnfitError for a name that there is none of."""
    try:
        function = getattr(library(), f"run_{name}")
    except AttributeError:
        raise UnfitError(f"there is no kernel {name!r}") from None
    return partial(_run, name, function)


def _run(name: str, function: object, holds: Holds, grid: int, block: int, arguments: Sequence[Argument]) -> None:
    """Raises DeviceError where the kernel would reach beyond its memory, or has begun an access where none may."""
    if isinstance(arguments[0], PagesArgument):
        _check_pages(name, holds, arguments[0], *(int(each.value) for each in arguments[1:4]))
    else:
        _check_moves(name, holds, *(int(each.value) for each in arguments))
    passed = [ctypes.byref(each) if isinstance(each, PagesArgument) else each for each in arguments]
    with _turn:
        function(ctypes.c_uint(grid), ctypes.c_uint(block), *passed)  # type: ignore[operator]
        misaligned = library().take_misaligned()
    if misaligned:
        raise DeviceError(f"{name}: {misaligned} accesses to misaligned addresses")


def _check_pages(name: str, holds: Holds, given: PagesArgument, blocks: int, stride: int, count: int) -> None:
    pieces, piece_bytes = int(given.pieces), int(given.piece_bytes)
    if not count:
        return
    bases = _numbers(name, holds, given.bases, pieces)
    strides = _numbers(name, holds, given.strides, pieces).view(np.int64)
    ids = _numbers(name, holds, given.ids, count).view(np.int64)
    for base, apart in zip(bases, strides, strict=True):
        if not holds(base + (ids * apart).view(np.uint64), piece_bytes):
            raise DeviceError(f"{name}: a page outside the memory that the device may touch")
    if not holds(np.array([blocks, blocks + (count - 1) * stride], dtype=np.uint64), 1):
        raise DeviceError(f"{name}: a block outside the memory that the device may touch")


def _check_moves(name: str, holds: Holds, targets: int, sources: int, lengths: int, _longest: int, count: int) -> None:
    if not count:
        return
    sizes = _numbers(name, holds, lengths, count).tolist()
    for table in (targets, sources):
        if not holds(_numbers(name, holds, table, count), sizes):
            raise DeviceError(f"{name}: a move outside the memory that the device may touch")


def _numbers(name: str, holds: Holds, address: int | None, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    if not address or not holds(np.array([address], dtype=np.uint64), 8 * count):
        raise DeviceError(f"{name}: a table outside the memory that the device may touch")
    return libc.bytes_at(address, 8 * count).view(np.uint64).copy()
