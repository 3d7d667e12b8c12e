"""Memory as the device suites need it: of a host, registered, and of an engine, in pages."""

from typing import Any, Final

import numpy as np

from kvkernels.aligned import Bytes, aligned
from kvkernels.device.pages import Pages, pages_of
from kvkernels.device.port import Device, Direction, Move, Stream

KIB: Final = 1 << 10
_kept: list["Host"] = []


class Host:
    """Registered memory of this process; it stays for good, since a device may hold on to it."""

    def __init__(self, device: Device, length: int) -> None:
        _kept.append(self)
        self.bytes: Bytes = aligned(length)[:length]
        self.bytes[:] = 0
        self.address = int(self.bytes.ctypes.data)
        self.registration = device.register(self.address, length)


class EngineMemory:
    """KV memory as an engine has it: a tensor a layer, pages some way apart."""

    def __init__(
        self, device: Device, stream: Stream, *, layers: int, blocks: int, page_bytes: int, apart_bytes: int = 48
    ) -> None:
        self._device, self._page_bytes = device, page_bytes
        self._stride = page_bytes + apart_bytes
        self._made = [device.allocate(blocks * self._stride) for _ in range(layers)]
        self._blocks = blocks
        self._size = blocks * self._stride
        self._host = Host(device, layers * self._size)
        self._host.bytes[:] = np.random.default_rng(8).integers(0, 256, layers * self._size, dtype=np.uint8)
        stream.copy(Direction.TO_DEVICE, self._moves())
        stream.synchronize()
        self._bytes = self._host.bytes.copy()
        tensors = [_Plain(made.address, blocks, page_bytes, self._stride) for made in self._made]
        self.pages: Pages = pages_of(device, tensors)
        assert len(self.pages.bases) == layers

    def _moves(self) -> list[Move]:
        return [
            (made.address, self._host.address + layer * self._size, self._size) for layer, made in enumerate(self._made)
        ]

    def fill(self, stream: Stream, page: int, block: Bytes) -> None:
        """A block into a page of all layers."""
        layers = self._bytes.reshape(len(self._made), self._blocks, self._stride)
        layers[:, page, : self._page_bytes] = block.reshape(len(self._made), -1)
        self._host.bytes[:] = self._bytes
        stream.copy(Direction.TO_DEVICE, self._moves())
        stream.synchronize()

    def read(self, stream: Stream) -> Bytes:
        """All of it as it is now; what lies between pages has not changed."""
        stream.copy(Direction.TO_HOST, [(host, made, length) for made, host, length in self._moves()])
        stream.synchronize()
        now = self._host.bytes.copy()
        shape, width = (len(self._made), self._blocks, self._stride), self._page_bytes
        after, before = now.reshape(shape)[:, :, width:], self._bytes.reshape(shape)[:, :, width:]
        assert np.array_equal(after, before), "written outside its pages"
        return now

    def all(self) -> Bytes:
        """As it was made."""
        return self._bytes

    def block(self, page: int, memory: Bytes | None = None) -> Bytes:
        """Of all layers, in one piece."""
        whole = (self._bytes if memory is None else memory).reshape(len(self._made), self._blocks, self._stride)
        return np.ascontiguousarray(whole[:, page, : self._page_bytes]).reshape(-1)

    def close(self) -> None:
        for made in self._made:
            self._device.free(made)


class _Plain:
    """A tensor of bytes with nothing but what `pages_of` asks for."""

    def __init__(self, address: int, blocks: int, page_bytes: int, stride: int) -> None:
        self._address, self.shape, self._strides = address, (blocks, page_bytes), (stride, 1)

    def data_ptr(self) -> int:
        return self._address

    def element_size(self) -> int:
        return 1

    def stride(self) -> Any:
        return self._strides
