"""Tables that kernels read, on their way to the device: pinned here, a copy there, used again when the kernel is done.

A kernel could read them over the link, but for each 4 KiB that it copies it would wait for three of their numbers.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvkernels.aligned import Bytes, aligned
from kvkernels.device.port import Allocation, Device, DeviceLostError, Direction, Event, Registration, Stream

LEAST_BYTES: Final = 64 << 10
ALIGN_BYTES: Final = 16


@dataclass(slots=True)
class Table:
    """Room for numbers, on both sides. `event`: when its last use is over."""

    host: Bytes
    registration: Registration
    device: Allocation
    event: Event | None = None

    def upload(self, stream: Stream, arrays: "list[np.ndarray[Any, Any]]") -> list[int]:
        """Send these, one after another; where each lies on the device."""
        at, places = 0, []
        for array in arrays:
            places.append(self.device.address + at)
            self.host[at : at + array.nbytes] = array.reshape(-1).view(np.uint8)
            at += -(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES
        stream.copy(Direction.TO_DEVICE, [(self.device.address, self.registration.address, at)])
        return places


class Tables:
    """All that are there of one device. Any thread."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._tables: list[Table] = []

    def take(self, needed_bytes: int) -> Table:
        """One that is free and large enough, made if there is none. Give it back."""
        with self._lock:
            for number, table in enumerate(self._tables):
                if table.host.size >= needed_bytes and (table.event is None or table.event.done):
                    return self._tables.pop(number)
        length = max(LEAST_BYTES, 1 << (needed_bytes - 1).bit_length())
        host = aligned(length)
        allocation = self._device.allocate(length)
        try:
            registration = self._device.register(int(host.ctypes.data), length)
        except BaseException:
            self._device.free(allocation)
            raise
        return Table(host, registration, allocation)

    def give_back(self, table: Table, event: Event) -> None:
        """It may be used again after this event."""
        table.event = event
        with self._lock:
            self._tables.append(table)

    def close(self) -> None:
        """Wait for all of them, and give them up."""
        with self._lock:
            tables, self._tables = self._tables, []
        for table in tables:
            with suppress(DeviceLostError):
                if table.event is not None:
                    table.event.wait()
                self._device.unregister(table.registration)
                self._device.free(table.device)


def bytes_for(arrays: "list[np.ndarray[Any, Any]]") -> int:
    """Room for all of these."""
    return sum(-(-array.nbytes // ALIGN_BYTES) * ALIGN_BYTES for array in arrays)
