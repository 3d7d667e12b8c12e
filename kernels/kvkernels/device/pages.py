"""Where an engine's KV pages lie: its layers' tensors, whatever their layout, as pieces at a base and a stride.

Block n of ours is page n of every tensor, one after another; of each tensor the runs of memory that the page consists
of, as the engine's own kernels keep them. Nothing inside is reordered: what the bytes mean is the namespace's to say.

    [blocks, tokens, heads, dim]       one piece a layer (NHD; HND is the same)
    [2, blocks, ...]                   two: keys, values
    [heads, blocks, tokens, dim]       one a head
    [blocks, layers, 2, ...]           one in all
    [tokens of all blocks, heads, dim] one a layer, with `page_tokens`
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd
from typing import Any, Final, TypeAlias

import numpy as np

from kvkernels.device.port import ACCESS_BYTES, Device, Move, UnfitError

Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
PIECES_MAX: Final = 1 << 16
BLOCKS_MAX: Final = 1 << 20  # of one batch: its table is 8 MiB


@dataclass(frozen=True, slots=True)
class Pages:
    """Piece j of page n is `piece_bytes` at `bases[j] + n * strides[j]`. `owner` keeps the memory alive."""

    bases: tuple[int, ...]
    strides: tuple[int, ...]
    piece_bytes: int
    blocks: int
    owner: object = None

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return self.piece_bytes * len(self.bases)

    def ids(self, blocks: Sequence[int]) -> Ids:
        """Page numbers, looked at. UnfitError for one that is not there, and for what is no number of a page."""
        given = np.asarray(blocks)
        if given.size and given.dtype.kind not in "iu":  # a mask would be the pages 0 and 1
            raise UnfitError(f"page numbers are whole numbers, not {given.dtype}")
        numbers: Ids = np.ascontiguousarray(given, dtype=np.int64).reshape(-1)
        if numbers.size > BLOCKS_MAX:
            raise UnfitError(f"{numbers.size} blocks at once, more than {BLOCKS_MAX}")
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.blocks:
            raise UnfitError(f"pages {numbers.min()} to {numbers.max()} of {self.blocks}")
        return numbers

    def moves_in(self, blocks: Sequence[int], sources: Sequence[int]) -> list[Move]:
        """What fills these pages with blocks that lie in one piece each."""
        return [(page, source, length) for page, source, length in self._pieces(blocks, sources)]

    def moves_out(self, blocks: Sequence[int], targets: Sequence[int]) -> list[Move]:
        """The way back."""
        return [(target, page, length) for page, target, length in self._pieces(blocks, targets)]

    def _pieces(self, blocks: Sequence[int], others: Sequence[int]) -> Iterator[Move]:
        for number, other in zip(self.ids(blocks).tolist(), others, strict=True):
            for piece, (base, stride) in enumerate(zip(self.bases, self.strides, strict=True)):
                yield base + number * stride, other + piece * self.piece_bytes, self.piece_bytes


def pages_of(device: Device, tensors: Sequence[Any], *, block_axis: int = 0, page_tokens: int = 0) -> Pages:
    """Of an engine's tensors on this device, in the order in which they lie in a block.

    A tensor has torch's `data_ptr`, `shape`, `stride`, `element_size`. `block_axis`: which dimension counts the blocks;
    with `page_tokens` it counts tokens, so many to a block. Raises UnfitError for what kernels cannot take,
    WrongDeviceError for memory of another device.
    """
    if not tensors:
        raise UnfitError("no tensors")
    runs: list[tuple[int, int, int]] = []  # base, stride, length
    counts: set[int] = set()
    for tensor in tensors:
        blocks, found = _runs(tensor, block_axis, page_tokens)
        counts.add(blocks)
        for base, stride, length in found:
            device.check(base, max(0, blocks - 1) * stride + length)
        runs += found
    if len(counts) != 1:
        raise UnfitError(f"tensors of {sorted(counts)} blocks")
    runs = list(_merged(runs))
    piece = gcd(*(length for _, _, length in runs))
    if piece % ACCESS_BYTES or any(base % ACCESS_BYTES or stride % ACCESS_BYTES for base, stride, _ in runs):
        raise UnfitError(f"pages whose pieces of {piece} bytes do not begin at multiples of {ACCESS_BYTES}")
    pieces = [(base + at, stride) for base, stride, length in runs for at in range(0, length, piece)]
    if len(pieces) > PIECES_MAX:
        raise UnfitError(f"pages of {len(pieces)} pieces, more than {PIECES_MAX}")
    bases, strides = zip(*pieces, strict=True)
    return Pages(bases, strides, piece, counts.pop(), tensors)


def _runs(tensor: Any, block_axis: int, page_tokens: int) -> tuple[int, list[tuple[int, int, int]]]:
    """How many blocks, and the runs of memory that each consists of."""
    size, shape, strides = int(tensor.element_size()), list(tensor.shape), list(tensor.stride())
    if not -len(shape) <= block_axis < len(shape):
        raise UnfitError(f"a tensor of shape {tuple(shape)} has no dimension {block_axis}")
    axis = block_axis % len(shape)
    if 0 in shape:
        raise UnfitError(f"an empty tensor of shape {tuple(shape)}")
    blocks, apart = int(shape.pop(axis)), int(strides.pop(axis)) * size
    if page_tokens:
        if page_tokens < 0 or blocks % page_tokens:
            raise UnfitError(f"{blocks} tokens in pages of {page_tokens}")
        shape, strides = [page_tokens, *shape], [apart // size, *strides]
        blocks, apart = blocks // page_tokens, apart * page_tokens
    length = size
    outer: list[tuple[int, int]] = []
    # What lies densely, however its dimensions are ordered, is one run; the dimensions beyond count runs.
    for stride, number in sorted(
        (int(stride) * size, int(number)) for stride, number in zip(strides, shape, strict=True)
    ):
        if number == 1:
            continue
        if stride < length:
            raise UnfitError(f"a tensor of strides {tuple(tensor.stride())} overlaps itself")
        if stride == length:
            length *= number
        else:
            outer.append((stride, number))
    if blocks > 1 and apart < length:
        raise UnfitError(f"a tensor of strides {tuple(tensor.stride())} overlaps itself")
    outer.reverse()
    if np.prod([number for _, number in outer], dtype=np.float64) > PIECES_MAX:
        raise UnfitError(f"a page of {shape} with strides {strides} consists of more than {PIECES_MAX} pieces")
    first = int(tensor.data_ptr())
    starts = (sum(steps) for steps in product(*(range(0, stride * number, stride) for stride, number in outer)))
    return blocks, [(first + start, apart, length) for start in starts]


def _merged(runs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours as one: layers whose memory is interleaved by blocks."""
    base, stride, length = runs[0]
    for next_base, next_stride, next_length in runs[1:]:
        if next_base == base + length and next_stride == stride and length + next_length <= stride:
            length += next_length
        else:
            yield base, stride, length
            base, stride, length = next_base, next_stride, next_length
    yield base, stride, length
