"""Encoding out of the caller's memory and decoding into it, block by block, at addresses that `buffers` has checked."""

from collections.abc import Sequence

import numpy as np

from kvclient.buffers import Memory
from kvclient.codecs import Codec
from kvclient.copying import Gate, bytes_at, copy
from kvclient.flows import Copy
from kvclient.mapping import Mapping, Place
from kvkernels.device.port import DeviceError


class Encode(Copy):
    """Encode these blocks of `source` to `targets`, one after another, until one is unfit: `done` of them are there."""

    __slots__ = ("_codec", "_indices", "_source", "_targets", "done")

    def __init__(self, codec: Codec, source: Memory, indices: Sequence[int], targets: Sequence[int], gate: Gate | None):
        super().__init__([], gate=gate)
        self._codec = codec
        self._source = source
        self._indices = indices
        self._targets = targets
        self.done = 0

    def carry_out(self) -> None:
        """In any thread. Raises WithdrawnError: who closes the gate waits for one block at most."""
        codec, source = self._codec, self._source
        between = None if source.scattered is None else np.empty(codec.plain_bytes, np.uint8)
        for index, target in zip(self._indices, self._targets, strict=True):
            with self.gate:
                if between is None:
                    plain = bytes_at(source.addresses[index], codec.plain_bytes)
                else:
                    copy(source.moves_out([index], [between.ctypes.data], codec.plain_bytes))
                    plain = between
                if not codec.encode(plain, bytes_at(target, codec.stored_bytes)):
                    return
                self.done += 1


class EncodeOnDevice(Copy):
    """The same for blocks in a GPU's memory, on that GPU. `failed`: it could not."""

    __slots__ = ("_codec", "_indices", "_maps", "_source", "_targets", "done")

    def __init__(
        self, codec: Codec, source: Memory, indices: Sequence[int], targets: Sequence[int], gate: Gate | None,
        maps: Sequence[Mapping],
    ) -> None:  # fmt: skip
        """`maps`: what the targets lie in."""
        super().__init__([], gate=gate)
        self._codec = codec
        self._source = source
        self._indices = indices
        self._targets = targets
        self._maps = maps
        self.done = 0

    def carry_out(self) -> None:
        """In any thread. Raises WithdrawnError."""
        assert self._source.device is not None, "memory of a device"
        with self.gate:
            try:
                self.done = self._source.device.encode(
                    self._codec, self._source, self._indices, self._targets, self._maps
                )
            except DeviceError as error:
                self.failed = error


def decode_to(codec: Codec, memory: Memory, first: int, places: Sequence[Place]) -> bool:
    """Decode what lies at `places` into blocks of `memory` from `first` on; False where one is none of this codec."""
    between = None if memory.scattered is None else np.empty(codec.plain_bytes, np.uint8)
    for index, (mapping, offset) in enumerate(places, first):
        encoded = bytes_at(mapping.address + offset, codec.stored_bytes)
        if between is None:
            if not codec.decode(encoded, bytes_at(memory.addresses[index], codec.plain_bytes)):
                return False
        else:
            if not codec.decode(encoded, between):
                return False
            copy(memory.moves_in(index, [between.ctypes.data], codec.plain_bytes))
    return True


def decoded(codec: Codec, places: Sequence[Place]) -> tuple[memoryview, ...]:
    """Copies of these blocks, decoded and read-only; none if one of them is none of this codec."""
    views = []
    for mapping, offset in places:
        plain = np.empty(codec.plain_bytes, np.uint8)
        if not codec.decode(bytes_at(mapping.address + offset, codec.stored_bytes), plain):
            return ()
        plain.flags.writeable = False
        views.append(plain.data)
    return tuple(views)
