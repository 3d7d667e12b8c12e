"""Where a block of vLLM's paged memory lies, and what its bytes depend on.

vLLM gives one tensor a layer, its first dimension the engine's blocks (`register_kv_caches`). A block of ours is that
block of all layers, one after another, as the engine's kernels keep it: nothing inside is looked at or moved about.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvclient.buffers import Scattered
from kvkernels.device.port import DeviceError
from kvproto.errors import UsageError

if TYPE_CHECKING:
    from kvclient.integrations.vllm_device import Mark


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
    place: Any = None  # the device whose memory it is, as its tensors name it; None: the host's

    @property
    def block_bytes(self) -> int:
        """Of one block of all layers."""
        return sum(self.lengths)

    def scattered(self, block_ids: Sequence[int], after: "Mark | None" = None) -> Scattered:
        """These blocks of the engine, for one copy. Raises UsageError for one that it does not have.

        `after`: of a device's memory alone, what comes before that copy; waits for it. Raises DeviceError.
        """
        assert (after is None) == (self.place is None), "memory of a device, and of nothing else, is copied in order"
        pieces = list(zip(self.bases, self.strides, strict=True))
        addresses = [[base + block * stride for base, stride in pieces] for block in self.checked(block_ids)]
        return Scattered(addresses, self.lengths, self.owner, device=None if after is None else after.side())

    def checked(self, block_ids: Sequence[int]) -> Sequence[int]:
        """The same. Raises UsageError for one that the engine does not have."""
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.blocks:
            raise UsageError(f"blocks {min(block_ids)} to {max(block_ids)} of an engine that has {self.blocks}")
        return block_ids


def layout_of(caches: Mapping[str, Any], blocks: int) -> Layout:
    """Of the tensors by the names of their layers, all on one device. Raises UsageError for what cannot be copied."""
    if not caches:
        raise UsageError("the engine has no KV memory")
    pieces: list[tuple[int, int, int]] = []
    said: list[str] = []
    seen: dict[int, LayerPiece] = {}  # by address
    layers: dict[str, LayerPiece] = {}
    start = 0  # of the next layer in a block of ours
    first = next(iter(caches))
    place: Any = getattr(caches[first], "device", None)
    for name, tensor in caches.items():
        if not hasattr(tensor, "data_ptr"):
            raise UsageError(f"{name}: {type(tensor).__name__} is no tensor; such models are not supported yet")
        if tensor.device != place:
            raise UsageError(f"{name} is on {tensor.device}, and {first} on {place}")
        if tensor.shape[0] != blocks:
            raise UsageError(f"{name} has shape {tuple(tensor.shape)}, which does not begin with the {blocks} blocks")
        if not _is_dense(tensor.shape[1:], tensor.stride()[1:]):
            raise UsageError(f"{name}: a block of shape {tuple(tensor.shape[1:])} does not lie in one piece")
        address, size = int(tensor.data_ptr()), int(tensor.element_size())
        said.append(f"{name} {tuple(tensor.shape[1:])} {tuple(tensor.stride()[1:])} {tensor.dtype}")
        if address not in seen:  # else it shares another's memory
            stride, length = int(tensor.stride(0)) * size, math.prod(tensor.shape[1:]) * size
            if place.type != "cpu":
                _check_reach(name, place, address, (blocks - 1) * stride + length)
            seen[address] = LayerPiece(address, stride, length, start)
            pieces.append((address, stride, length))
            start += length
        layers[name] = seen[address]
    merged = list(_merged(pieces))
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:32]
    bases, strides, lengths = zip(*merged, strict=True)
    words = f"{len(seen)} layers, whole blocks as the kernels keep them {digest}"
    if place.type == "cpu":
        return Layout(blocks, bases, strides, lengths, words, caches, layers)
    # Other kernels than those of processors may keep something else in memory of the same shape.
    return Layout(blocks, bases, strides, lengths, f"{words} {place.type}", caches, layers, place)


def _check_reach(name: str, place: Any, address: int, length: int) -> None:
    """Raises UsageError for memory that no port reaches."""
    from kvclient.devices import port_of  # noqa: PLC0415  # an engine on CPU never needs it

    try:
        port_of(place).check(address, length)
    except (DeviceError, UsageError) as error:
        raise UsageError(f"{name} is on {place}: {error}") from error


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
