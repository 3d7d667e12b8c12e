"""Streams and events of CUDA, by the driver."""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from ctypes import byref, c_size_t, c_void_p
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvkernels.device import driver as cu
from kvkernels.device.port import Argument, DeviceError, Direction, Event, Move, UnfitError

if TYPE_CHECKING:
    from kvkernels.device.cuda import Cuda

_COPIES: Final = {
    Direction.TO_DEVICE: "cuMemcpyHtoDAsync_v2",
    Direction.TO_HOST: "cuMemcpyDtoHAsync_v2",
    Direction.ON_DEVICE: "cuMemcpyDtoDAsync_v2",
}


class CudaEvent:
    """See `port.Event`."""

    def __init__(self, device: "Cuda") -> None:
        self._device = device
        with device.current() as driver:
            self.pointer = driver.number("cuEventCreate", c_void_p, cu.EVENT_BLOCKING_SYNC | cu.EVENT_DISABLE_TIMING)

    @property
    def done(self) -> bool:
        """See `port.Event`."""
        with self._device.current() as driver:
            status = driver.status("cuEventQuery", self.pointer)
            if status not in (0, cu.NOT_READY):
                raise driver.error("cuEventQuery", status)
            return status == 0

    def wait(self) -> None:
        """See `port.Event`."""
        with self._device.current() as driver:
            driver("cuEventSynchronize", self.pointer)

    def __del__(self) -> None:
        # The driver keeps what is still pending. An event that was never made has no pointer.
        with suppress(DeviceError, AttributeError), self._device.current() as driver:
            driver.status("cuEventDestroy_v2", self.pointer)


class CudaStream:
    """See `port.Stream`."""

    def __init__(self, device: "Cuda", handle: int, *, adopted: bool) -> None:
        self._device = device
        self._handle = handle
        self._adopted = adopted

    @property
    def handle(self) -> int:
        """See `port.Stream`."""
        return self._handle

    def copy(self, direction: Direction, moves: Sequence[Move]) -> None:
        """See `port.Stream`."""
        self._device.check_host(direction, moves)
        name, stream = _COPIES[direction], self._handle
        with self._device.current() as driver:
            for target, source, length in moves:
                if length:
                    driver(name, target, source, length, stream)

    def copy_batch(self, direction: Direction, moves: Sequence[Move]) -> None:
        """See `port.Stream`."""
        name = self._device.driver.batch
        moves = [move for move in moves if move[2]]
        if not name or not moves or not self._handle:  # the call takes no default stream
            self.copy(direction, moves)
            return
        self._device.check_host(direction, moves)
        table = np.ascontiguousarray(np.array(moves, dtype=np.uint64).T)
        attributes, first, failed = cu.CopyAttributes(srcAccessOrder=cu.IN_STREAM_ORDER), c_size_t(0), c_size_t(0)
        arguments: list[Any] = [
            *(row.ctypes.data for row in table), len(moves), byref(attributes), byref(first), 1,
        ]  # fmt: skip
        if name == cu.BATCH:
            arguments.append(byref(failed))
        with self._device.current() as driver:
            driver(name, *arguments, self._handle)

    def launch(self, name: str, grid: int, block: int, *arguments: Argument) -> None:
        """See `port.Stream`."""
        if grid < 1 or block < 1 or block > 1024 or block % 32:
            raise UnfitError(f"{name} in {grid} blocks of {block} threads")
        function = self._device.kernel(name)
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        with self._device.current() as driver:
            driver("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, self._handle, pointers, None)

    def record(self) -> CudaEvent:
        """See `port.Stream`."""
        event = CudaEvent(self._device)
        with self._device.current() as driver:
            driver("cuEventRecord", event.pointer, self._handle)
        return event

    def wait(self, event: Event) -> None:
        """See `port.Stream`."""
        assert isinstance(event, CudaEvent), "an event of another kind of device"
        with self._device.current() as driver:
            driver("cuStreamWaitEvent", self._handle, event.pointer, 0)

    def synchronize(self) -> None:
        """See `port.Stream`."""
        with self._device.current() as driver:
            driver("cuStreamSynchronize", self._handle)

    def close(self) -> None:
        """See `port.Stream`."""
        if not self._adopted and self._handle:
            handle, self._handle = self._handle, 0
            with self._device.current() as driver:
                driver("cuStreamSynchronize", handle)
                driver("cuStreamDestroy_v2", handle)
