"""Where a block of vLLM's paged memory lies, and what its bytes depend on.

vLLM gives one tensor a layer, its first dimension the engine's blocks (`register_kv_caches`). A block of ours is that
block of all layers, one after another, as the engine's kernels keep it: nothing inside is looked at or moved about.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvclient.buffers import Scattered
from kvproto.errors import UsageError


class LayerPiece(NamedTuple):
    """What one layer has of every block: `length` bytes at `base + b * stride`, from `start` on in a block of ours."""

    base: int
    stride: int
    length: int
    start: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The pieces that a block consists of: piece j of block b is `lengths[j]` bytes at `bases[j] + b * strides[j]`."""

    blocks: int
    bases: tuple[int, ...]
    strides: tuple[int, ...]
    lengths: tuple[int, ...]
    words: str  # for the namespace
    owner: object  # keeps the memory alive
    layers: Mapping[str, LayerPiece]  # by name, in the order in which they lie in a block of ours

    @property
    def block_bytes(self) -> int:
        """Of one block of all layers."""
        return sum(self.lengths)

    def scattered(self, block_ids: Sequence[int]) -> Scattered:
        """These blocks of the engine. Raises UsageError for one that it does not have."""
        pieces = list(zip(self.bases, self.strides, strict=True))
        addresses = [[base + block * stride for base, stride in pieces] for block in self.checked(block_ids)]
        return Scattered(addresses, self.lengths, self.owner)

    def checked(self, block_ids: Sequence[int]) -> Sequence[int]:
        """The same. Raises UsageError for one that the engine does not have."""
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.blocks:
            raise UsageError(f"blocks {min(block_ids)} to {max(block_ids)} of an engine that has {self.blocks}")
        return block_ids


def layout_of(caches: Mapping[str, Any], blocks: int) -> Layout:
    """Of the tensors by the names of their layers. Raises UsageError for memory that cannot be copied by blocks."""
    if not caches:
        raise UsageError("the engine has no KV memory")
    pieces: list[tuple[int, int, int]] = []
    said: list[str] = []
    seen: dict[int, LayerPiece] = {}  # by address
    layers: dict[str, LayerPiece] = {}
    start = 0  # of the next layer in a block of ours
    for name, tensor in caches.items():
        if not hasattr(tensor, "data_ptr"):
            raise UsageError(f"{name}: {type(tensor).__name__} is no tensor; such models are not supported yet")
        if tensor.device.type != "cpu":
            raise UsageError(f"{name} is on {tensor.device}: only memory of the CPU is supported yet")
        if tensor.shape[0] != blocks:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}, which does not begin with the {blocks} blocks")
        if not _is_dense(tensor.shape[1:], tensor.stride()[1:]):
            raise UsageError(f"{name}: a block of shape {tuple(tensor.shape[1:])} does not lie in one piece")
        address, size = int(tensor.data_ptr()), int(tensor.element_size())
        said.append(f"{name} {tuple(tensor.shape[1:])} {tuple(tensor.stride()[1:])} {tensor.dtype}")
        if address not in seen:  # else it shares another's memory
            stride, length = int(tensor.stride(0)) * size, math.prod(tensor.shape[1:]) * size
            seen[address] = LayerPiece(address, stride, length, start)
            pieces.append((address, stride, length))
            start += length
        layers[name] = seen[address]
    merged = list(_merged(pieces))
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]
    bases, strides, lengths = zip(*merged, strict=True)
    words = f"{len(seen)} layers, whole blocks as the kernels keep them {digest}"
    return Layout(blocks, bases, strides, lengths, words, caches, layers)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Do so many elements lie in a row, in whatever order?"""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _merged(pieces: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Neighbours as one: layers whose memory is interleaved by blocks."""
    base, stride, length = pieces[0]
    for next_base, next_stride, next_length in pieces[1:]:
        if next_base == base + length and next_stride == stride and length + next_length <= stride:
            length += next_length
        else:
            yield base, stride, length
            base, stride, length = next_base, next_stride, next_length
    yield base, stride, length
