"""Addresses of memory that the caller owns, checked before a byte moves.

Three kinds are understood, by what they can do and not by importing their makers: NumPy arrays, tensors with
`data_ptr` (torch), and anything with the buffer protocol. Tensors on a GPU go by `devices.py`, which is only imported
for them. Errors are UsageError. Any thread.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from kvclient.copying import Gate, Move, moves_of
from kvkernels import libc
from kvproto.errors import UsageError

if TYPE_CHECKING:
    from kvclient.devices import Side

_from_buffer: Final[Callable[[Any], ctypes.c_char]] = ctypes.c_char.from_buffer
_address_of: Final = ctypes.addressof


@dataclass(frozen=True, slots=True)
class Scattered:
    """Blocks of which each lies in pieces, as in an engine that has memory of its own for every layer.

    Block i is what lies at `addresses[i][0]`, `addresses[i][1]` and so on, one after another, piece j being
    `lengths[j]` bytes. Nothing can be checked of plain addresses but their number: the caller vouches for them, and
    `owner` keeps what lies there alive. `store` reads within `gate` only: WithdrawnError once that is closed.
    """

    addresses: Sequence[Sequence[int]]
    lengths: Sequence[int]
    owner: object
    gate: Gate | None = None
    device: "Side | None" = None  # whose memory it is, if not the host's; then for one call (devices.paged_blocks)

    def __len__(self) -> int:
        return len(self.addresses)


class Memory(NamedTuple):
    """Where blocks of equal size lie. `owners` keeps what lies there alive and of fixed size."""

    addresses: Sequence[int]  # of each block; empty if they are scattered
    owners: object
    scattered: Scattered | None = None
    device: "Side | None" = None  # whose memory it is, if not the host's

    @property
    def blocks(self) -> int:
        """How many blocks."""
        return len(self.addresses if self.scattered is None else self.scattered.addresses)

    def moves_in(self, first: int, sources: Sequence[int], block_bytes: int) -> list[Move]:
        """The moves that fill blocks from `first` on with what lies at `sources`."""
        scattered = self.scattered
        if scattered is None:
            return moves_of(self.addresses[first : first + len(sources)], sources, block_bytes)
        return [
            (target, source + start, length)
            for pieces, source in zip(scattered.addresses[first : first + len(sources)], sources, strict=True)
            for target, start, length in zip(pieces, _starts(scattered.lengths), scattered.lengths, strict=True)
        ]

    def pieces_in(self, sources: Sequence[int], each: int) -> list[libc.Pieces]:
        """The same for the first blocks, if they are scattered, as the kernel takes it: so many blocks at a time."""
        scattered = self.scattered
        if scattered is None or not sources:
            return []
        lengths = np.array(scattered.lengths, dtype=np.uint64)
        targets = np.empty((len(sources), lengths.size, 2), dtype=np.uint64)
        found = np.empty_like(targets)
        targets[:, :, 0] = scattered.addresses[: len(sources)]
        found[:, :, 0] = np.array(sources, dtype=np.uint64)[:, None] + (np.cumsum(lengths) - lengths)
        targets[:, :, 1] = found[:, :, 1] = lengths
        return [
            libc.Pieces(targets[first : first + each].reshape(-1, 2), found[first : first + each].reshape(-1, 2))
            for first in range(0, len(sources), each)
        ]

    def moves_out(self, indices: Sequence[int], targets: Sequence[int], block_bytes: int) -> list[Move]:
        """The moves that bring these blocks to `targets`."""
        scattered = self.scattered
        if scattered is None:
            return moves_of(targets, [self.addresses[index] for index in indices], block_bytes)
        return [
            (target + start, source, length)
            for index, target in zip(indices, targets, strict=True)
            for source, start, length in zip(
                scattered.addresses[index], _starts(scattered.lengths), scattered.lengths, strict=True
            )
        ]


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths[:-1])]


def readable(blocks: object, count: int, block_bytes: int, stream: object = None) -> Memory:
    """Where `count` blocks of `block_bytes` bytes can be read: one object a block, or one array of all of them.

    `stream`: of a device's tensors, whose work so far comes first.
    """
    return _locate(blocks, count, block_bytes, stream, writable=False)


def writable(blocks: object, most: int, block_bytes: int, stream: object = None) -> Memory:
    """Where up to `most` blocks can be written: one object a block, or one array whose first dimension they are."""
    memory = _locate(blocks, None, block_bytes, stream, writable=True)
    if memory.blocks > most:
        raise UsageError(f"{memory.blocks} targets for {most} blocks")
    return memory


def _locate(blocks: Any, count: int | None, block_bytes: int, stream: object, *, writable: bool) -> Memory:
    on_device = _first_on_device(blocks)
    if on_device is not None:
        return _on_device(blocks, on_device, count, block_bytes, stream)
    if stream is not None:
        raise UsageError("a stream is for tensors on a device, and these are not")
    if isinstance(blocks, np.ndarray) or hasattr(blocks, "data_ptr"):
        return _split(blocks, count, block_bytes, writable=writable)
    if isinstance(blocks, Scattered):
        return _scattered(blocks, count, block_bytes)
    try:
        number = len(blocks)
    except TypeError as error:
        raise UsageError(f"blocks must be a sequence or an array, not {type(blocks).__name__}") from error
    if isinstance(blocks, bytes | bytearray | memoryview | str):
        raise UsageError(f"blocks must be a sequence with one object a block, not {type(blocks).__name__}")
    if count is not None and number != count:
        raise UsageError(f"{number} buffers for {count} keys")
    owners: list[object] = []
    addresses: list[int] = []
    for block in blocks:
        try:
            address, owner = _address(block, block_bytes, writable)
        except UsageError as error:
            raise UsageError(f"block {len(owners)}: {error}") from error
        addresses.append(address)
        owners.append(owner)
    return Memory(addresses, owners)


def _scattered(blocks: Scattered, count: int | None, block_bytes: int) -> Memory:
    if count is not None and len(blocks) != count:
        raise UsageError(f"{len(blocks)} scattered blocks for {count} keys")
    if any(length <= 0 for length in blocks.lengths) or sum(blocks.lengths) != block_bytes:
        raise UsageError(f"pieces of {list(blocks.lengths)} bytes for blocks of {block_bytes}")
    if any(len(pieces) != len(blocks.lengths) for pieces in blocks.addresses):
        raise UsageError(f"a scattered block has other than {len(blocks.lengths)} pieces")
    return Memory((), blocks.owner, blocks, blocks.device)


def _first_on_device(blocks: Any) -> Any:
    """A tensor that is not the host's, if the first is."""
    if isinstance(blocks, list | tuple):
        blocks = blocks[0] if blocks else None
    if not hasattr(blocks, "data_ptr") or getattr(blocks, "is_cpu", False):
        return None
    return None if blocks.device.type == "cpu" else blocks


def _on_device(blocks: Any, first: Any, count: int | None, block_bytes: int, stream: object) -> Memory:
    """As the others, for tensors of one device."""
    from kvclient import devices  # noqa: PLC0415  # an engine on CPU never needs it

    side = devices.side_of(first.device, stream)
    if blocks is first:
        number = first.shape[0] if first.shape else None
        if number is None or (count is not None and number != count):
            raise UsageError(f"a tensor of shape {tuple(first.shape)} for {count} blocks")
        if number == 0:
            return Memory((), first, None, side)
        address = devices.address_of(side, first, number * block_bytes)
        return Memory(range(address, address + number * block_bytes, block_bytes), first, None, side)
    if count is not None and len(blocks) != count:
        raise UsageError(f"{len(blocks)} buffers for {count} keys")
    addresses = []
    for index, block in enumerate(blocks):
        if not hasattr(block, "data_ptr") or block.device != first.device:
            raise UsageError(f"block {index}: not on {first.device}, as the first is")
        try:
            addresses.append(devices.address_of(side, block, block_bytes))
        except UsageError as error:
            raise UsageError(f"block {index}: {error}") from error
    return Memory(addresses, tuple(blocks), None, side)


def _split(blocks: Any, count: int | None, block_bytes: int, *, writable: bool) -> Memory:
    # One array of all blocks: its first dimension counts them.
    number = blocks.shape[0] if blocks.shape else None
    if number is None or (count is not None and number != count):
        raise UsageError(f"an array of shape {tuple(blocks.shape)} for {count} blocks")
    if number == 0:
        return Memory((), blocks)
    address, owner = _address(blocks, number * block_bytes, writable)
    return Memory(range(address, address + number * block_bytes, block_bytes), owner)


def _address(block: Any, block_bytes: int, writable: bool) -> tuple[int, object]:
    """Address of exactly `block_bytes` bytes, and what holds them there."""
    if isinstance(block, np.ndarray):
        return _array_address(block, block_bytes, writable)
    if hasattr(block, "data_ptr"):
        return _tensor_address(block, block_bytes), block
    return _buffer_address(block, block_bytes, writable)


def _array_address(array: "np.ndarray[Any, Any]", block_bytes: int, writable: bool) -> tuple[int, object]:
    if array.nbytes != block_bytes or not array.flags.c_contiguous:
        raise _unfit(array.nbytes, block_bytes)
    if array.dtype.hasobject:
        raise UsageError(f"an array of Python objects ({array.dtype}): its bytes are pointers")
    try:
        return _address_of(_from_buffer(array)), array  # three times as fast as `array.ctypes`
    except (TypeError, ValueError):  # read-only, or of a type that the buffer protocol cannot name (bfloat16)
        if writable and not array.flags.writeable:
            raise UsageError("read-only") from None
        return int(array.ctypes.data), array


def _tensor_address(tensor: Any, block_bytes: int) -> int:
    on_cpu = getattr(tensor, "is_cpu", None)
    if not (tensor.device.type == "cpu" if on_cpu is None else on_cpu):
        raise UsageError(f"a tensor on {tensor.device}; only memory of the CPU can be copied from or to")
    tensor_bytes = tensor.numel() * tensor.element_size()
    if tensor_bytes != block_bytes or not tensor.is_contiguous():
        raise _unfit(tensor_bytes, block_bytes)
    if tensor.is_neg() or tensor.is_conj():
        raise UsageError("a lazily negated or conjugated tensor: its bytes are not its values (resolve it first)")
    try:
        if tensor.untyped_storage().nbytes() < (tensor.storage_offset() * tensor.element_size()) + tensor_bytes:
            raise UsageError("a tensor whose memory was given back")
        return int(tensor.data_ptr())
    except (RuntimeError, NotImplementedError) as error:  # sparse, or a fake without storage
        raise UsageError(f"a tensor without memory of its own: {error}") from error


def _buffer_address(block: Any, block_bytes: int, writable: bool) -> tuple[int, object]:
    try:
        view = memoryview(block)
    except TypeError as error:
        raise UsageError(f"not a buffer, an array or a tensor: {type(block).__name__}") from error
    if view.nbytes != block_bytes or not view.c_contiguous:
        raise _unfit(view.nbytes, block_bytes)
    if writable and view.readonly:
        raise UsageError("read-only")
    if not view.readonly:
        pinned = _from_buffer(view)
        return _address_of(pinned), pinned
    array = np.frombuffer(view, np.uint8)
    return int(array.ctypes.data), array


def _unfit(size: int, block_bytes: int) -> UsageError:
    if size != block_bytes:
        return UsageError(f"{size} bytes where exactly {block_bytes} belong")
    return UsageError("not C-contiguous")
