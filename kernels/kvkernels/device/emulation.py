"""A GPU in host memory, for tests and for machines without one. It always calls itself an emulation.

Its memory is memfds that other processes really open; its streams are threads that really run behind who asks; its
kernels are those of cuda/*.cu, compiled for a processor. It is stricter than hardware: what CUDA answers with a lost
context when it comes to it (an address outside every allocation), this finds out before a byte moves. What it cannot
show: speed, and the order in which a GPU's memory is seen.
"""

import fcntl
import hashlib
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from kvkernels import libc
from kvkernels.aligned import pages
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.port import (
    EMULATION,
    Allocation,
    DeviceLostError,
    Direction,
    Handle,
    HandleError,
    Move,
    NotRegisteredError,
    OutOfDeviceMemoryError,
    Properties,
    Registration,
    RegistrationError,
    UnfitError,
    Via,
    WrongDeviceError,
)
from kvkernels.device.ranges import Ranges

MEMORY_BYTES: Final = 256 << 20
SEALS: Final = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, _SHRINK, _GROW: nobody can pull it from under a reader
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
_IPC_TEXT: Final = re.compile(rb"([0-9]{1,10}):([0-9]{1,7})")


class Emulation:
    """See `port.Device`.

    `registering`: called before host memory is registered, with its length: how a test makes that slow.
    `opens_ipc`: False in a container that sees no other processes.
    """

    def __init__(
        self,
        number: int = 0,
        memory_bytes: int = MEMORY_BYTES,
        *,
        read_only_registration: bool = False,
        opens_ipc: bool = True,
        registering: Callable[[int], None] | None = None,
    ) -> None:
        self._properties = Properties(
            name=EMULATION,
            emulated=True,
            number=number,
            identity=_identity(number),
            driver=EMULATION,
            memory_bytes=memory_bytes,
            multiprocessors=2,
            read_only_registration=read_only_registration,
            shares=(Via.DESCRIPTOR, Via.IPC),
        )
        self._opens_ipc = opens_ipc
        self._registering = registering
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._allocations: Ranges[Allocation] = Ranges()
        self._registrations: Ranges[Registration] = Ranges()
        self._streams: weakref.WeakValueDictionary[int, EmulatedStream] = weakref.WeakValueDictionary()
        self.lost = ""

    @property
    def properties(self) -> Properties:
        """See `port.Device`."""
        return self._properties

    # -- memory ---------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """See `port.Device`. What other processes have is not known."""
        with self._lock:
            return self._properties.memory_bytes - self._used_bytes

    def allocate(self, length: int, share: Via = Via.NOTHING) -> Allocation:
        """See `port.Device`."""
        self.check_alive()
        if length <= 0:
            raise UnfitError(f"an allocation of {length} bytes")
        whole = pages(length)
        with self._lock:
            if self._used_bytes + whole > self._properties.memory_bytes:
                raise OutOfDeviceMemoryError(f"{whole} bytes of {self._properties.memory_bytes - self._used_bytes}")
            self._used_bytes += whole
        try:
            fd = os.memfd_create("kvstored-emulated-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, whole)
            fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
            address = libc.map_shared(fd, whole, writable=True)
        except OSError as error:
            self._give_back(whole)
            raise OutOfDeviceMemoryError(f"the host has no memory for the emulation: {error}") from error
        made = Allocation(self._properties.number, address, whole, share, base=address, whole_bytes=whole, key=fd)
        self._allocations.add(address, whole, made)
        return made

    def free(self, allocation: Allocation) -> None:
        """See `port.Device`."""
        if self._allocations.remove(allocation.base) is None:
            raise WrongDeviceError(f"{allocation.base:#x} was not allocated here")
        for stream in list(self._streams.values()):  # as cudaFree does
            stream.record().passed.wait()
        libc.unmap(allocation.base, allocation.whole_bytes)
        os.close(allocation.key)
        if not allocation.opened:
            self._give_back(allocation.whole_bytes)

    def export(self, address: int, length: int) -> Handle:
        """See `port.Device`."""
        found = self._allocations.find(address, length)
        if found is None or found.opened or found.via is Via.NOTHING:
            raise HandleError(f"{length} bytes at {address:#x} were not made to be shared")
        offset, whole, identity = address - found.base, _size(found.key), self._properties.identity
        if found.via is Via.IPC:
            return Handle(Via.IPC, identity, length, offset, whole, text=f"{os.getpid()}:{found.key}".encode())
        return Handle(Via.DESCRIPTOR, identity, length, offset, whole, fd=os.dup(found.key))

    def open(self, handle: Handle) -> Allocation:
        """See `port.Device`."""
        self.check_alive()
        if handle.identity != self._properties.identity:
            raise WrongDeviceError(f"a handle of device {handle.identity}, not of {self._properties.identity}")
        fd = self._descriptor_of(handle)
        try:
            whole = _fits(fd, handle)
            base = libc.map_shared(fd, whole, writable=True)
        except OSError as error:
            os.close(fd)
            raise HandleError(f"not an allocation: {error}") from error
        except HandleError:
            os.close(fd)
            raise
        opened = Allocation(
            self._properties.number, base + handle.offset, handle.length, handle.via,
            opened=True, base=base, whole_bytes=whole, key=fd,
        )  # fmt: skip
        self._allocations.add(base, whole, opened)
        return opened

    def _descriptor_of(self, handle: Handle) -> int:
        try:
            if handle.via is Via.DESCRIPTOR:
                return os.dup(handle.fd)
            named = _IPC_TEXT.fullmatch(handle.text)
            if handle.via is not Via.IPC or named is None:
                raise HandleError("not a handle of this kind of device")
            if not self._opens_ipc:
                raise HandleError("this emulation opens no memory of other processes by IPC; share it as DESCRIPTOR")
            return os.open(f"/proc/{int(named[1])}/fd/{int(named[2])}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HandleError(f"the handle's memory is not there: {error}") from error

    def check(self, address: int, length: int) -> None:
        """See `port.Device`."""
        if self._allocations.find(address, length) is None:
            raise WrongDeviceError(f"{length} bytes at {address:#x} are not memory of this device")

    # -- host memory ------------------------------------------------------------------------------------------------

    def register(self, address: int, length: int, *, read_only: bool = False) -> Registration:
        """See `port.Device`."""
        self.check_alive()
        if self._registering is not None:
            self._registering(length)
        writable = _is_writable(address, length)
        if writable is None:
            raise RegistrationError(f"{length} bytes at {address:#x} are not mapped")
        if not writable and not (read_only and self._properties.read_only_registration):
            raise RegistrationError("memory that is mapped for reading only, which this device does not register")
        made = Registration(address, length, address)
        if not self._registrations.add(address, length, made):
            raise RegistrationError(f"some of {length} bytes at {address:#x} is registered already")
        return made

    def reach(self, address: int, length: int) -> int:
        """See `port.Device`."""
        found = self._registrations.find(address, length)
        if found is None:
            raise NotRegisteredError(f"{length} bytes at {address:#x} are not registered")
        return found.device_address + address - found.address

    def unregister(self, registration: Registration) -> None:
        """See `port.Device`."""
        if self._registrations.remove(registration.address) is None:
            raise NotRegisteredError(f"{registration.address:#x} is not registered")

    # -- work -------------------------------------------------------------------------------------------------------

    def stream(self) -> EmulatedStream:
        """See `port.Device`."""
        self.check_alive()
        made = EmulatedStream(self)
        self._streams[made.handle] = made
        return made

    def adopt(self, handle: int) -> EmulatedStream:
        """See `port.Device`."""
        found = self._streams.get(handle)
        if found is None:
            raise WrongDeviceError(f"no stream {handle} of this device")
        return found

    def forget(self, stream: EmulatedStream) -> None:
        """It was closed."""
        self._streams.pop(stream.handle, None)

    def close(self) -> None:
        """See `port.Device`."""
        for stream in list(self._streams.values()):
            stream.close()
        for allocation in self._allocations.all():
            self.free(allocation)

    # -- being strict -----------------------------------------------------------------------------------------------

    def holds(self, addresses: "Iterable[int]", lengths: "Iterable[int] | int") -> bool:
        """May kernels touch all of these? Memory of the device, or registered."""
        addresses = np.asarray(addresses, dtype=np.uint64)
        return self._allocations.hold(addresses, lengths) or self._registrations.hold(addresses, lengths)

    def check_moves(self, direction: Direction, moves: Sequence[Move]) -> None:
        """Raise what a copy of these would run into."""
        self.check_alive()
        table = np.array(moves, dtype=np.uint64).reshape(-1, 3)
        for column, is_host in ((0, direction is Direction.TO_HOST), (1, direction is Direction.TO_DEVICE)):
            addresses, lengths = table[:, column], table[:, 2]
            if is_host and not self._registrations.hold(addresses, lengths):
                raise NotRegisteredError("host memory that is not registered")
            if not is_host and not self._allocations.hold(addresses, lengths):
                raise WrongDeviceError("an address outside every allocation of this device")

    def check_alive(self) -> None:
        """Raise DeviceLostError once it is lost."""
        if self.lost:
            raise DeviceLostError(self.lost)

    def lose(self, why: str) -> None:
        """As a GPU falls off its bus: from here on nothing works. The first reason stays."""
        self.lost = self.lost or why or "lost"

    def _give_back(self, whole: int) -> None:
        with self._lock:
            self._used_bytes -= whole


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def _fits(fd: int, handle: Handle) -> int:
    """Bytes of what another process handed over, if it is what it says."""
    if fcntl.fcntl(fd, F_GET_SEALS) & SEALS != SEALS:
        raise HandleError("memory that its owner could take away")
    whole = _size(fd)
    if handle.whole_bytes != whole or handle.length <= 0 or handle.offset < 0 or handle.offset + handle.length > whole:
        raise HandleError(f"{handle.length} bytes at {handle.offset} of {handle.whole_bytes}, which are {whole}")
    return whole


def _identity(number: int) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(boot + f"{EMULATION} {number}".encode()).hexdigest()[:32]


def _is_writable(address: int, length: int) -> bool | None:
    """Of mapped memory; None if some of it is not mapped."""
    at, end, writable = address, address + length, True
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split(maxsplit=2)[:2]
        first, last = (int(each, 16) for each in span.split("-"))
        if first <= at < last:
            at, writable = last, writable and "w" in permissions
        if at >= end:
            return writable
    return None
