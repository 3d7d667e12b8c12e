"""The port: what the rest of the project knows of a GPU.

    Device    memory, handles of it for other processes, host memory that it may reach, streams
    Stream    work in order: copies, kernels, events to wait for
    Event     a place in a stream that has been passed, or not

Addresses are numbers, those of a device's memory unique in this process; a move is (target, source, bytes). What is
asked of a stream is done later, in its order, by nobody who waits: the memory on both sides stays as it is until an
event recorded behind it has come. Any thread may call anything; one thread at a time uses a stream.

    DeviceError
    |-- OutOfDeviceMemoryError   a pool refuses, a cache evicts
    |-- DeviceLostError          this device does nothing any more in this process: its tier goes off
    |-- NotRegisteredError       host memory that this device cannot reach
    |   `-- RegistrationError    ... and that it will not: read-only where that is not supported, or forbidden
    |-- WrongDeviceError         memory of another device, or of none
    |-- HandleError              a handle that cannot be opened: foreign, damaged, refused by a container
    |-- UnfitError               a shape, an alignment or a size that no kernel takes: a bug of the caller
    `-- NoDeviceError            there is no such device, or no driver
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final, Protocol, TypeAlias

Move: TypeAlias = tuple[int, int, int]  # target address, source address, bytes
Argument: TypeAlias = "ctypes.c_int | ctypes.c_int64 | ctypes.c_uint64 | PagesArgument"

EMULATION: Final = "emulation"
ACCESS_BYTES: Final = 16  # what kernels read and write at a time
WARP: Final = 32


class DeviceError(Exception):
    """Root of all of them."""


class OutOfDeviceMemoryError(DeviceError):
    """No room for an allocation, or none for what the driver needs for it."""


class DeviceLostError(DeviceError):
    """The device, or this process's context on it, is gone for good."""


class NotRegisteredError(DeviceError):
    """Host memory that is not registered with this device."""


class RegistrationError(NotRegisteredError):
    """Host memory that cannot be registered with this device."""


class WrongDeviceError(DeviceError):
    """An address that is not this device's memory."""


class HandleError(DeviceError):
    """Another process's memory that cannot be opened."""


class UnfitError(DeviceError, ValueError):
    """What a copy or a kernel cannot take."""


class NoDeviceError(DeviceError):
    """No driver, or no such device."""


class Direction(Enum):
    """From where to where."""

    TO_DEVICE = "to_device"
    TO_HOST = "to_host"
    ON_DEVICE = "on_device"


class Via(StrEnum):
    """How memory is handed to another process."""

    NOTHING = "nothing"  # it is not
    IPC = "ipc"  # 64 bytes; opens the whole allocation; both must see one IPC namespace
    DESCRIPTOR = "descriptor"  # a file descriptor, across containers too: virtual memory, or the emulation's memfd


@dataclass(frozen=True, slots=True)
class Properties:
    """What a device says of itself."""

    name: str  # of the emulation: "emulation", and nothing else
    emulated: bool
    number: int  # in this process
    identity: str  # the same in every process of this host: 32 hex digits
    driver: str
    memory_bytes: int
    multiprocessors: int
    read_only_registration: bool  # may memory be registered that is mapped for reading only?
    shares: tuple[Via, ...]  # ways in which an allocation of this device can be handed on, best first


@dataclass(frozen=True, slots=True)
class Handle:
    """Memory of a device, for another process: `text` travels in a message, `fd` beside it (-1 for none).

    `offset`: where the exported range begins in what is opened; `whole_bytes`: how much that is.
    The maker closes its `fd` once it is sent; the opener closes its own copy.
    """

    via: Via
    identity: str  # of the device
    length: int
    offset: int = 0
    whole_bytes: int = 0
    text: bytes = b""
    fd: int = -1


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory of a device: made here, or another process's that was opened."""

    device: int
    address: int
    length: int  # bytes
    via: Via
    opened: bool = False
    base: int = 0  # where what was opened or made begins
    whole_bytes: int = 0  # and how much that is
    key: int = 0  # the driver's own name for it


@dataclass(frozen=True, slots=True)
class Registration:
    """Host memory that a device reaches by itself. `device_address`: as kernels see it."""

    address: int
    length: int
    device_address: int


class PagesArgument(ctypes.Structure):
    """`struct Pages` of cuda/pages.cuh."""

    _fields_ = (
        ("bases", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("ids", ctypes.c_void_p),
        ("piece_bytes", ctypes.c_int64), ("pieces", ctypes.c_int),
    )  # fmt: skip


class Event(Protocol):
    """A place in a stream."""

    @property
    def done(self) -> bool:
        """Has the stream passed it? Never waits. Raises DeviceLostError, as `wait` does."""

    def wait(self) -> None:
        """Until it has; other threads run meanwhile. Raises what went wrong in the stream before it."""


class Stream(Protocol):
    """A queue of work on one device."""

    @property
    def handle(self) -> int:
        """The driver's name for it; 0 is the device's default stream."""

    def copy(self, direction: Direction, moves: Sequence[Move]) -> None:
        """Copy by the device's copy engine, a call a move. Host memory must be registered (NotRegisteredError)."""

    def copy_batch(self, direction: Direction, moves: Sequence[Move]) -> None:
        """The same moves in one call, in any order among themselves; as `copy` where the driver has no such call."""

    def launch(self, name: str, grid: int, block: int, *arguments: Argument) -> None:
        """Run a kernel of cuda/*.cu. What its arguments point to must be reachable for this device. UnfitError."""

    def record(self) -> Event:
        """An event here."""

    def wait(self, event: Event) -> None:
        """What is asked from here on happens after this event, which may be of another stream of this device."""

    def synchronize(self) -> None:
        """Until all of it is done. Raises what went wrong."""

    def close(self) -> None:
        """Wait for all of it, and give the stream up. One that was adopted stays its owner's."""


class Device(Protocol):
    """A GPU, or the emulation of one, in this process."""

    @property
    def properties(self) -> Properties:
        """They never change."""

    def free_bytes(self) -> int:
        """Memory that is left, of all processes together."""

    def allocate(self, length: int, share: Via = Via.NOTHING) -> Allocation:
        """At least so much memory, undefined. OutOfDeviceMemoryError; UnfitError where it cannot be shared that way."""

    def free(self, allocation: Allocation) -> None:
        """Give it back, or close what was opened. No work that uses it may be left in any stream."""

    def export(self, address: int, length: int) -> Handle:
        """For other processes: a range of an allocation made to be shared, here or by a framework. HandleError."""

    def open(self, handle: Handle) -> Allocation:
        """The range that another process exported; the handle's `fd` is not closed. HandleError, WrongDeviceError."""

    def check(self, address: int, length: int) -> None:
        """Is all of it one allocation of this device, whoever made it? WrongDeviceError."""

    def register(self, address: int, length: int, *, read_only: bool = False) -> Registration:
        """Let the device reach mapped host memory. Takes long (0.1 to 0.3 s a GiB). RegistrationError."""

    def reach(self, address: int, length: int) -> int:
        """Registered host memory as kernels see it. NotRegisteredError."""

    def unregister(self, registration: Registration) -> None:
        """No more. No work that uses it may be left in any stream."""

    def stream(self) -> Stream:
        """A new one, which waits for no other and for which no other waits."""

    def adopt(self, handle: int) -> Stream:
        """A stream of somebody else's in this process, by the driver's name for it."""

    def close(self) -> None:
        """Give up everything. Nothing may be in use."""


def place_of(device: Device) -> str:
    """What to call it in a line of a log: never mistaken for hardware."""
    properties = device.properties
    return EMULATION if properties.emulated else f"{properties.name} (GPU {properties.number})"
