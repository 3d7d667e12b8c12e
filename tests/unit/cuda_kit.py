"""What the tests of kernels share: compilers, kernels on a processor, an engine's memory to run them on."""

import ctypes
import os
import shutil
from typing import TypeAlias

import numpy as np
import pytest

from kvkernels.aligned import Bytes, aligned
from kvkernels.device.emulated_kernels import library

Blocks: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint8]]"
Words: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint32]]"


def tool(name: str) -> str:
    """Where a compiler is; without one the test is skipped, but in CI, where that would go unseen."""
    found = shutil.which(name)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{name} is not there")
    return found


def on_a_processor() -> ctypes.CDLL:
    """All kernels, compiled once."""
    tool("g++")
    return library()


class PagesOf(ctypes.Structure):
    """`struct Pages`."""

    _fields_ = (
        ("bases", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("ids", ctypes.c_void_p),
        ("piece_bytes", ctypes.c_int64), ("pieces", ctypes.c_int),
    )  # fmt: skip


class Engine:
    """An engine's memory: so many pages in each of several tensors, and the blocks that lie there, in any order."""

    def __init__(self, pieces: int, piece_bytes: int, ids: list[int], *, room: int = 9, apart_bytes: int = 48) -> None:
        self.stride = piece_bytes + apart_bytes
        self.count = len(ids)
        self.memory = aligned(pieces * room * self.stride)
        self.memory[:] = 0xEE
        self._first = self.memory.__array_interface__["data"][0]
        self._tables = (
            np.array([self._first + piece * room * self.stride for piece in range(pieces)], np.uint64),
            np.full(pieces, self.stride, np.int64),
            np.array(ids, np.int64),
        )
        self.pages = PagesOf(*(table.ctypes.data for table in self._tables), piece_bytes, pieces)
        self._views = [
            [
                self.memory[at : at + piece_bytes]
                for piece in range(pieces)
                for at in [(piece * room + page) * self.stride]
            ]
            for page in ids
        ]

    def point_at(self, ids: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        """So many other pages, of which nothing else is asked."""
        self._tables = (*self._tables[:2], ids)
        self.pages.ids = ids.ctypes.data

    def put(self, blocks: Blocks) -> None:
        """Where the pages say."""
        for views, block in zip(self._views, blocks, strict=True):
            for view, piece in zip(views, block.reshape(len(views), -1), strict=True):
                view[:] = piece

    def take(self) -> Blocks:
        """The blocks, each in one."""
        return np.stack([np.concatenate(views) for views in self._views])

    @property
    def outside(self) -> Bytes:
        """Everything else."""
        left = np.ones(self.memory.size, dtype=bool)
        for view in (view for views in self._views for view in views):
            at = view.__array_interface__["data"][0] - self._first
            left[at : at + view.size] = False
        return self.memory[left]


def run(
    library: ctypes.CDLL, name: str, engine: Engine, blocks: Blocks, *more: "int | Words", block: int = 256
) -> None:
    """A kernel over all blocks."""
    arguments = [ctypes.c_int(one) if isinstance(one, int) else ctypes.c_void_p(one.ctypes.data) for one in more]
    getattr(library, f"run_{name}")(
        ctypes.c_uint(3), ctypes.c_uint(block), ctypes.byref(engine.pages), ctypes.c_void_p(blocks.ctypes.data),
        ctypes.c_int64(blocks.strides[0]), ctypes.c_int64(blocks.shape[0]), *arguments,
    )  # fmt: skip
    assert not library.take_misaligned(), "an access of 16 bytes where none may begin"
