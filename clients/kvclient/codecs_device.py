"""Blocks of a namespace with a codec, in a GPU's memory: encoded and decoded there, so that less crosses the link.

    store   pages --encode--> room on the device --copied--> span; the processor writes the head in front
    fetch   slot --copied--> room on the device --decode--> pages, once the processor has compared the head

The kernels take pages where they lie (`kvkernels.device.paged`); what they cannot take as it lies (odd addresses,
pieces that cut a row) passes through a plain copy on the device. The bytes are those that the host's codecs make, so
either side reads what the other stored. A batch of blocks at a time, one thread at a time: on a GPU none of it has been
measured.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import gcd
from typing import Final

from kvclient.buffers import Memory
from kvclient.codecs import HEAD_BYTES, Codec
from kvclient.copying import Move, bytes_at
from kvclient.mapping import Place
from kvkernels.device.engines import Engines
from kvkernels.device.paged import Paged
from kvkernels.device.pages import PIECES_MAX, Pages
from kvkernels.device.pinning import Copier
from kvkernels.device.port import ACCESS_BYTES, Allocation, Device, DeviceError, Direction, Event
from kvkernels.device.tables import Tables
from kvkernels.encodings import GROUP, Encoding
from kvproto.errors import UsageError

BATCH_BYTES: Final = 8 << 20  # of plain blocks; one block at least
ROOM_BYTES: Final = 1 << 20  # of which there is a whole number
_ANYWHERE: Final = (1 << 63) - 1  # pages by address: as many as there are bytes


def check_fits(codec: Codec) -> None:
    """Can kernels take such blocks? Raises UsageError."""
    if codec.plain_bytes % ACCESS_BYTES or _run(codec) % 2:
        what = f"blocks of {codec.plain_bytes} bytes in rows of {codec.row}"
        raise UsageError(f"codec {codec.encoding} takes no {what} on a device: multiples of {ACCESS_BYTES}, and of 2")


def _run(codec: Codec) -> int:
    """Values that must lie in one piece."""
    return {Encoding.INT4_G64: GROUP, Encoding.BF16_FIXED: ACCESS_BYTES // 2}.get(codec.encoding, codec.row)


@dataclass(slots=True)
class _Batch:
    """Some blocks, where the kernels find them: `pages` and `ids`; `plain`: by way of these moves, on the device."""

    indices: Sequence[int]
    pages: Pages
    ids: Sequence[int]
    plain: list[Move]  # page, plain copy, bytes


class Coding:
    """For one device. Any thread; one call at a time, the others wait."""

    def __init__(self, device: Device, tables: Tables, engines: Engines, copier: Copier) -> None:
        self._device = device
        self._engines = engines
        self._copier = copier
        self._paged = Paged(device, tables)
        self._stream = device.stream()
        self._lock = threading.Lock()
        self._rooms: dict[str, Allocation] = {}

    def encode(
        self, codec: Codec, memory: Memory, indices: Sequence[int], targets: Sequence[int], after: Event | None
    ) -> int:
        """Encode these blocks to `targets` on the host, one after another; how many until one was unfit.

        Nothing is written there any more once this has returned. Raises DeviceError.
        """
        with self._lock:
            try:
                return self._encode(codec, memory, indices, targets, after)
            except BaseException:
                self._settle()
                raise

    def decode(self, codec: Codec, memory: Memory, first: int, places: Sequence[Place], after: Event | None) -> bool:
        """Fill blocks from `first` on with what lies at `places`; False where one is none of this codec. All of it is
        there, or never will be, once this has returned. Raises DeviceError.
        """
        sources = [mapping.address + offset for mapping, offset in places]
        if not all(codec.has_head(bytes_at(source, HEAD_BYTES)) for source in sources):
            return False
        with self._lock:
            try:
                return self._decode(codec, memory, first, sources, after)
            except BaseException:
                self._settle()
                raise

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is under way here as long as the block lasts. Waits for what is. Raises DeviceError."""
        with self._lock:
            self._stream.synchronize()
            yield

    def close(self) -> None:
        """Nothing may be copied any more."""
        with self._lock:
            self._stream.close()
            with suppress(DeviceError):  # of one that is lost nothing can be given back
                for room in self._rooms.values():
                    self._device.free(room)
            self._rooms.clear()

    def _settle(self) -> None:
        with suppress(DeviceError):  # on one that is lost nothing moves any more
            self._stream.synchronize()

    def _encode(
        self, codec: Codec, memory: Memory, indices: Sequence[int], targets: Sequence[int], after: Event | None
    ) -> int:
        stream, payload, stride = self._stream, codec.stored_bytes - HEAD_BYTES, _stride(codec)
        if after is not None:
            stream.wait(after)
        done = 0
        for batch in self._batches(codec, memory, indices):
            count = len(batch.indices)
            room = self._room("encoded", count * stride)
            self._engines.copy(stream, Direction.ON_DEVICE, [(plain, page, size) for page, plain, size in batch.plain])
            work = self._paged.encode(
                stream, codec.encoding, batch.pages, batch.ids, room, stride, row=codec.row, half=codec.half
            )
            some = targets[done : done + count]
            moves = [(target + HEAD_BYTES, room + number * stride, payload) for number, target in enumerate(some)]
            self._copier.to_host(stream, moves).wait()
            good = min(work.failed(), default=count)
            for target in some[:good]:
                codec.write_head(bytes_at(target, HEAD_BYTES))
            done += good
            if good < count:
                break
        return done

    def _decode(self, codec: Codec, memory: Memory, first: int, sources: Sequence[int], after: Event | None) -> bool:
        stream, payload, stride = self._stream, codec.stored_bytes - HEAD_BYTES, _stride(codec)
        if after is not None:
            stream.wait(after)
        done = 0
        for batch in self._batches(codec, memory, range(first, first + len(sources))):
            count = len(batch.indices)
            room = self._room("encoded", count * stride)
            some = sources[done : done + count]
            moves = [(room + number * stride, source + HEAD_BYTES, payload) for number, source in enumerate(some)]
            self._copier.to_device(stream, moves)
            work = self._paged.decode(
                stream, codec.encoding, batch.pages, batch.ids, room, stride, row=codec.row, half=codec.half
            )
            self._engines.copy(stream, Direction.ON_DEVICE, batch.plain)
            stream.record().wait()
            if work.failed():
                return False
            done += count
        return True

    # -- where blocks lie ----------------------------------------------------------------------------------------

    def _batches(self, codec: Codec, memory: Memory, indices: Sequence[int]) -> Iterator[_Batch]:
        """As many at a time as there is room for, in the order given."""
        most = max(1, BATCH_BYTES // codec.plain_bytes)
        for at in range(0, len(indices), most):
            some = indices[at : at + most]
            pieces = _pieces(memory, some, codec.plain_bytes)
            pages = _pages(pieces, _run(codec))
            if pages is not None:
                yield _Batch(some, *pages, [])
                continue
            apart = -(-codec.plain_bytes // ACCESS_BYTES) * ACCESS_BYTES
            room = self._room("plain", len(some) * apart)
            moves = [
                (address, room + number * apart + start, length)
                for number, block in enumerate(pieces)
                for address, start, length in block
            ]
            plain = Pages((room,), (apart,), codec.plain_bytes, len(some))
            yield _Batch(some, plain, range(len(some)), moves)

    def _room(self, name: str, needed_bytes: int) -> int:
        """The address of so much memory of the device, the same each time. Raises OutOfDeviceMemoryError."""
        found = self._rooms.get(name)
        if found is None or found.length < needed_bytes:
            if found is not None:
                self._stream.synchronize()
                self._device.free(self._rooms.pop(name))
            found = self._rooms[name] = self._device.allocate(-(-needed_bytes // ROOM_BYTES) * ROOM_BYTES)
        return found.address


def _stride(codec: Codec) -> int:
    """Between encoded blocks on the device."""
    return -(-(codec.stored_bytes - HEAD_BYTES) // ACCESS_BYTES) * ACCESS_BYTES


Piece = tuple[int, int, int]  # address, where in the block it begins, bytes


def _pieces(memory: Memory, indices: Sequence[int], plain_bytes: int) -> list[list[Piece]]:
    """Of each block."""
    scattered = memory.scattered
    if scattered is None:
        return [[(memory.addresses[index], 0, plain_bytes)] for index in indices]
    starts = [0]
    for length in scattered.lengths[:-1]:
        starts.append(starts[-1] + length)
    return [list(zip(scattered.addresses[index], starts, scattered.lengths, strict=True)) for index in indices]


def _pages(blocks: Sequence[Sequence[Piece]], run: int) -> tuple[Pages, Sequence[int]] | None:
    """These blocks as pages of one memory, by address; None where kernels cannot take them as they lie."""
    lowest = min(blocks, key=lambda block: block[0][0])
    apart = [block[0][0] - lowest[0][0] for block in blocks]
    for block, distance in zip(blocks, apart, strict=True):
        if any(its[0] - mine[0] != distance for its, mine in zip(block, lowest, strict=True)):
            return None
    piece_bytes = gcd(*(length for _, _, length in lowest))
    whole = sum(length for _, _, length in lowest)
    unaligned = any(address % ACCESS_BYTES for block in blocks for address, _, _ in block)
    if unaligned or piece_bytes % (2 * run) or piece_bytes % ACCESS_BYTES or whole // piece_bytes > PIECES_MAX:
        return None
    bases = tuple(address + at for address, _, length in lowest for at in range(0, length, piece_bytes))
    return Pages(bases, (1,) * len(bases), piece_bytes, _ANYWHERE), apart
