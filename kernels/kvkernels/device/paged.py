"""Blocks out of an engine's pages and into them, by a kernel a batch: raw, encoded on the way, or in byte planes.

`blocks` are contiguous, `stride` bytes apart, in memory that the device reaches: its own, or host memory that is
registered (then by `Device.reach`), so that only what is encoded crosses the link.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kvkernels.device.pages import Pages
from kvkernels.device.port import ACCESS_BYTES, Argument, Device, Direction, Event, PagesArgument, Stream, UnfitError
from kvkernels.device.tables import Table, Tables, bytes_for
from kvkernels.encodings import GROUP, Encoding, EncodingError, encoded_bytes

THREADS: Final = 256  # of a block; what encodes bf16-fixed wants exactly so many
LINK_BLOCKS: Final = 8  # as many threads as fill a link; the other multiprocessors stay the engine's
SPAN_BYTES: Final = 4096
_NAMES: Final = {Encoding.INT8: "int8", Encoding.FP8: "fp8", Encoding.INT4_G64: "int4", Encoding.BF16_FIXED: "fixed"}


class Batch:
    """Work under way on a batch of blocks; `table` says of each, when it is over, whether it failed."""

    def __init__(self, event: Event, blocks: int = 0, table: Table | None = None, tables: Tables | None = None) -> None:
        self.event = event
        self._blocks = blocks
        self._table = table
        self._tables = tables
        self._failed: list[int] = []

    def failed(self) -> list[int]:
        """Which blocks could not be encoded, or were none of the encoding's: their bytes are undefined. Waits."""
        self.event.wait()
        if self._table is not None:
            words = self._table.host[: 4 * self._blocks].view(np.uint32)
            self._failed = [int(number) for number in np.flatnonzero(words)]
            self._let_go()
        return self._failed

    def _let_go(self) -> None:
        table, self._table = self._table, None
        if table is not None and self._tables is not None:
            self._tables.give_back(table, self.event)

    def __del__(self) -> None:
        self._let_go()


class Paged:
    """For one device. `blocks`: how many thread blocks at most work for it; enough for the link unless told."""

    def __init__(self, device: Device, tables: Tables, blocks: int = 0) -> None:
        self._device = device
        self._tables = tables
        self._blocks = blocks or min(LINK_BLOCKS, 4 * device.properties.multiprocessors)

    def gather(self, stream: Stream, pages: Pages, ids: Sequence[int], blocks: int, stride: int) -> Batch:
        """Pages into blocks."""
        return self._move("gather_blocks", stream, pages, ids, blocks, stride, pages.block_bytes)

    def scatter(self, stream: Stream, pages: Pages, ids: Sequence[int], blocks: int, stride: int) -> Batch:
        """Blocks into pages."""
        return self._move("scatter_blocks", stream, pages, ids, blocks, stride, pages.block_bytes)

    def split(self, stream: Stream, pages: Pages, ids: Sequence[int], planes: int, stride: int) -> Batch:
        """Pages of 16-bit values into byte planes: of each block the high bytes, at `low_plane_at` the low ones.

        A block of one piece may be of any length; the last byte of an odd one is a low one. UnfitError.
        """
        _check_planes(pages)
        return self._move("split_planes", stream, pages, ids, planes, stride, planes_bytes(pages.block_bytes))

    def join(self, stream: Stream, pages: Pages, ids: Sequence[int], planes: int, stride: int) -> Batch:
        """The way back."""
        _check_planes(pages)
        return self._move("join_planes", stream, pages, ids, planes, stride, planes_bytes(pages.block_bytes))

    def encode(
        self, stream: Stream, encoding: Encoding, pages: Pages, ids: Sequence[int], blocks: int, stride: int, *,
        row: int, half: bool,
    ) -> Batch:  # fmt: skip
        """Pages of 16-bit values into encoded blocks; `row`, `half` as in `encodings`. UnfitError, EncodingError."""
        self._check(encoding, pages, blocks, stride, row, half=half)
        before = ["make_codebooks"] if encoding is Encoding.BF16_FIXED else []
        return self._run(
            [*before, f"encode_{_NAMES[encoding]}"], encoding, stream, pages, ids, blocks, stride, row, half
        )

    def decode(
        self, stream: Stream, encoding: Encoding, pages: Pages, ids: Sequence[int], blocks: int, stride: int, *,
        row: int, half: bool,
    ) -> Batch:  # fmt: skip
        """The way back."""
        self._check(encoding, pages, blocks, stride, row, half=half)
        return self._run([f"decode_{_NAMES[encoding]}"], encoding, stream, pages, ids, blocks, stride, row, half)

    def _move(
        self, name: str, stream: Stream, pages: Pages, ids: Sequence[int], blocks: int, stride: int, room_bytes: int
    ) -> Batch:
        """`room_bytes`: what a block takes where it goes."""
        numbers = pages.ids(ids)
        _check_blocks(blocks, stride, room_bytes)
        if not numbers.size or not room_bytes:
            return Batch(stream.record())
        arrays: list[np.ndarray[Any, Any]] = [*_tables_of(pages), numbers]
        table = self._tables.take(bytes_for(arrays))
        try:
            bases, strides, where = table.upload(stream, arrays)
            argument = PagesArgument(bases, strides, where, pages.piece_bytes, len(pages.bases))
            spans = -(-pages.piece_bytes // SPAN_BYTES) * len(pages.bases) * numbers.size
            stream.launch(name, self._grid(spans), THREADS, argument, *_where(blocks, stride, numbers.size))
        finally:
            event = stream.record()
            self._tables.give_back(table, event)
        return Batch(event)

    def _run(
        self, names: list[str], encoding: Encoding, stream: Stream, pages: Pages, ids: Sequence[int], blocks: int,
        stride: int, row: int, half: bool,
    ) -> Batch:  # fmt: skip
        numbers = pages.ids(ids)
        count = int(numbers.size)
        if not count:
            return Batch(stream.record())
        words = np.zeros(count, np.uint32)
        arrays: list[np.ndarray[Any, Any]] = [words, *_tables_of(pages), numbers]
        table = self._tables.take(bytes_for(arrays))
        try:
            verdict, bases, strides, where = table.upload(stream, arrays)
            argument = PagesArgument(bases, strides, where, pages.piece_bytes, len(pages.bases))
            for name in names:
                more = _more(name, encoding, verdict, row, half=half)
                grid = self._grid(count * pages.block_bytes // SPAN_BYTES)
                stream.launch(name, grid, THREADS, argument, *_where(blocks, stride, count), *more)
            stream.copy(Direction.TO_HOST, [(table.registration.address, verdict, words.nbytes)])
        except BaseException:
            self._tables.give_back(table, stream.record())
            raise
        return Batch(stream.record(), count, table, self._tables)

    def _grid(self, spans: int) -> int:
        return max(1, min(self._blocks, -(-spans * 32 // THREADS)))

    def _check(self, encoding: Encoding, pages: Pages, blocks: int, stride: int, row: int, *, half: bool) -> None:
        if half and encoding is Encoding.BF16_FIXED:
            raise EncodingError("bf16-fixed takes bfloat16 only")
        run = {Encoding.INT4_G64: GROUP, Encoding.BF16_FIXED: ACCESS_BYTES // 2}.get(encoding, row)
        values = pages.block_bytes // 2
        _check_blocks(blocks, stride, encoded_bytes(encoding, values, row))
        if run <= 0 or run % 2 or pages.piece_bytes % (2 * run):
            raise UnfitError(f"pieces of {pages.piece_bytes} bytes where {encoding} takes runs of {run} values")


def _tables_of(pages: Pages) -> "list[np.ndarray[Any, Any]]":
    return [np.array(pages.bases, np.uint64), np.array(pages.strides, np.int64)]


def _where(blocks: int, stride: int, count: int) -> tuple[Argument, ...]:
    return ctypes.c_uint64(blocks), ctypes.c_int64(stride), ctypes.c_int64(count)


def _more(name: str, encoding: Encoding, verdict: int, row: int, *, half: bool) -> list[Argument]:
    """What this kernel takes behind the blocks: cuda/encodings.cu."""
    if name == "make_codebooks":
        return []
    shape: list[Argument] = []
    if encoding in (Encoding.INT8, Encoding.FP8):
        shape.append(ctypes.c_int(row))
    if encoding is not Encoding.BF16_FIXED:
        shape.append(ctypes.c_int(half))
    tells = name.startswith("encode") or encoding is Encoding.BF16_FIXED
    return [*shape, ctypes.c_uint64(verdict)] if tells else shape


def low_plane_at(block_bytes: int) -> int:
    """Where in the planes of a block its low bytes begin: behind the high ones, where an access may."""
    return -(-(block_bytes // 2) // ACCESS_BYTES) * ACCESS_BYTES


def planes_bytes(block_bytes: int) -> int:
    """What the planes of a block take."""
    return low_plane_at(block_bytes) + block_bytes - block_bytes // 2


def _check_planes(pages: Pages) -> None:
    """These may have been made by hand, of blocks that are no engine's."""
    if len(pages.bases) > 1 and pages.piece_bytes % ACCESS_BYTES:
        raise UnfitError(f"{len(pages.bases)} pieces of {pages.piece_bytes} bytes: multiples of {ACCESS_BYTES}")
    if any(number % ACCESS_BYTES for number in (*pages.bases, *pages.strides)):
        raise UnfitError(f"pages that do not begin at multiples of {ACCESS_BYTES}")


def _check_blocks(blocks: int, stride: int, block_bytes: int) -> None:
    if blocks % ACCESS_BYTES or stride % ACCESS_BYTES or stride < block_bytes:
        raise UnfitError(f"blocks of {block_bytes} bytes at {blocks:#x}, {stride} apart: multiples of {ACCESS_BYTES}")
