"""The port on CUDA: memory, streams and events by the driver, kernels compiled by CuPy.

All of it happens in the device's primary context, which torch and CuPy use too, so their streams and memory mix with
ours; the context that a thread had is put back after every call. Nothing here has run on a GPU yet: see DEVICE.md.
"""

import ctypes
import importlib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvkernels.device import driver as cu
from kvkernels.device.cuda_streams import CudaStream
from kvkernels.device.driver import Driver
from kvkernels.device.port import (
    Allocation,
    DeviceError,
    DeviceLostError,
    Direction,
    Handle,
    HandleError,
    Move,
    NoDeviceError,
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

FOLDER: Final = Path(__file__).parent.parent / "cuda"
COMPILE: Final = ("-std=c++17", "--fmad=false", f"-I{FOLDER}")
_KERNEL: Final = re.compile(r'extern "C" __global__ void (\w+)\(')


class Cuda:
    """See `port.Device`. Raises NoDeviceError without a driver or such a GPU."""

    def __init__(self, number: int = 0) -> None:
        self.driver = driver = Driver()
        if number >= driver.number("cuDeviceGetCount", c_int):
            raise NoDeviceError(f"there is no GPU {number}")
        self._device = driver.number("cuDeviceGet", c_int, number)
        self._context = driver.number("cuDevicePrimaryCtxRetain", c_void_p, self._device)
        self._properties = self._ask(number)
        self._made: Ranges[Allocation] = Ranges()
        self._registrations: Ranges[Registration] = Ranges()
        self._lock = threading.Lock()
        self._kernels: dict[str, int] = {}
        self._modules: dict[str, Any] = {}  # keep the code loaded

    @property
    def properties(self) -> Properties:
        """See `port.Device`."""
        return self._properties

    @contextmanager
    def current(self) -> Iterator[Driver]:
        """The primary context is this thread's, until the block ends, and graphs that others capture are no concern.

        While a thread captures as torch does, calls such as an allocation or a registration fail in every other one and
        break its capture, unless they say that they are none of its. In a thread that captures itself they still do.
        """
        driver, mode = self.driver, c_int(cu.CAPTURE_THREAD_LOCAL)
        driver("cuCtxPushCurrent_v2", self._context)
        exchanged = False
        try:
            driver("cuThreadExchangeStreamCaptureMode", byref(mode))  # from here on what it was before
            exchanged = True
            yield driver
        finally:
            if exchanged:
                driver.status("cuThreadExchangeStreamCaptureMode", byref(mode))
            driver.status("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _ask(self, number: int) -> Properties:
        driver, device = self.driver, self._device
        name, uuid = ctypes.create_string_buffer(256), cu.Uuid()
        driver("cuDeviceGetName", name, len(name), device)
        driver("cuDeviceGetUuid_v2", byref(uuid), device)
        virtual = self._attribute(cu.VIRTUAL_MEMORY) and self._attribute(cu.DESCRIPTOR_HANDLES)
        version = driver.number("cuDriverGetVersion", c_int)
        return Properties(
            name=name.value.decode(errors="replace"),
            emulated=False,
            number=number,
            identity=bytes(uuid.bytes).hex(),
            driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
            memory_bytes=driver.number("cuDeviceTotalMem_v2", c_size_t, device),
            multiprocessors=self._attribute(cu.MULTIPROCESSORS),
            read_only_registration=bool(self._attribute(cu.READ_ONLY_REGISTRATION)),
            shares=(Via.DESCRIPTOR, Via.IPC) if virtual else (Via.IPC,),
        )

    def _attribute(self, number: int) -> int:
        return self.driver.number("cuDeviceGetAttribute", c_int, number, self._device)

    # -- memory -------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """See `port.Device`."""
        free, total = c_size_t(), c_size_t()
        with self.current() as driver:
            driver("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, length: int, share: Via = Via.NOTHING) -> Allocation:
        """See `port.Device`."""
        if length <= 0 or (share is not Via.NOTHING and share not in self._properties.shares):
            raise UnfitError(f"an allocation of {length} bytes to be shared by {share}")
        number = self._properties.number
        with self.current() as driver:
            if share is Via.DESCRIPTOR:
                wanted = self._wanted()
                grain = driver.number("cuMemGetAllocationGranularity", c_size_t, byref(wanted), 0)
                whole = -(-length // grain) * grain
                key = driver.number("cuMemCreate", c_uint64, whole, byref(wanted), 0)
                address = self._map(key, whole)
            else:
                key, whole, address = 0, length, driver.number("cuMemAlloc_v2", c_uint64, length)
        made = Allocation(number, address, whole, share, base=address, whole_bytes=whole, key=key)
        self._made.add(address, whole, made)
        return made

    def free(self, allocation: Allocation) -> None:
        """See `port.Device`."""
        if not allocation.opened and self._made.remove(allocation.base) is None:
            raise WrongDeviceError(f"{allocation.base:#x} was not allocated here")
        with self.current() as driver:
            if allocation.key:
                driver("cuMemUnmap", allocation.base, allocation.whole_bytes)
                driver("cuMemAddressFree", allocation.base, allocation.whole_bytes)
                driver("cuMemRelease", allocation.key)
            else:
                driver("cuIpcCloseMemHandle" if allocation.opened else "cuMemFree_v2", allocation.base)

    def _wanted(self) -> cu.AllocationProperties:
        return cu.AllocationProperties(
            cu.PINNED, cu.POSIX_DESCRIPTOR, cu.Location(cu.ON_DEVICE, self._properties.number)
        )

    def _map(self, key: int, whole: int) -> int:
        """Give virtual memory an address; let go of it if that fails."""
        driver, address, mapped = self.driver, 0, False
        try:
            address = driver.number("cuMemAddressReserve", c_uint64, whole, 0, 0, 0)
            driver("cuMemMap", address, whole, 0, key, 0)
            mapped = True
            access = cu.Access(cu.Location(cu.ON_DEVICE, self._properties.number), cu.READ_WRITE)
            driver("cuMemSetAccess", address, whole, byref(access), 1)
        except DeviceError:
            if mapped:
                driver.status("cuMemUnmap", address, whole)
            if address:
                driver.status("cuMemAddressFree", address, whole)
            driver.status("cuMemRelease", key)
            raise
        return address

    def _span(self, address: int) -> tuple[int, int]:
        """Where what lies there begins, and how much that is."""
        base, size = c_uint64(), c_size_t()
        self.driver("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        return base.value, size.value

    # -- for other processes ------------------------------------------------------------------------------------

    def export(self, address: int, length: int) -> Handle:
        """See `port.Device`. Memory of torch's allocator goes by IPC, unless that maps it in expandable segments."""
        self.check(address, length)
        identity = self._properties.identity
        with self.current() as driver, _as_handle_errors():
            made = self._made.find(address, length)
            if made is not None and made.via is Via.DESCRIPTOR:
                fd = driver.number("cuMemExportToShareableHandle", c_int, made.key, cu.POSIX_DESCRIPTOR, 0)
                return Handle(Via.DESCRIPTOR, identity, length, address - made.base, made.length, fd=fd)
            base, whole = self._span(address)
            if address + length > base + whole:
                raise HandleError("memory of several allocations")
            ipc = cu.IpcHandle()
            driver("cuIpcGetMemHandle", byref(ipc), base)
            return Handle(Via.IPC, identity, length, address - base, whole, text=bytes(ipc))

    def open(self, handle: Handle) -> Allocation:
        """See `port.Device`."""
        if handle.identity != self._properties.identity:
            raise WrongDeviceError(f"a handle of device {handle.identity}, not of {self._properties.identity}")
        end = handle.offset + handle.length
        if handle.length <= 0 or handle.offset < 0 or end > handle.whole_bytes:
            raise HandleError(f"{handle.length} bytes at {handle.offset} of {handle.whole_bytes}")
        key = 0
        with self.current() as driver, _as_handle_errors():
            if handle.via is Via.DESCRIPTOR:
                key = driver.number("cuMemImportFromShareableHandle", c_uint64, handle.fd, cu.POSIX_DESCRIPTOR)
                base = self._map(key, handle.whole_bytes)
            else:
                if handle.via is not Via.IPC or len(handle.text) != ctypes.sizeof(cu.IpcHandle):
                    raise HandleError("not a handle of this kind of device")
                ipc = cu.IpcHandle.from_buffer_copy(handle.text)
                base = driver.number("cuIpcOpenMemHandle_v2", c_uint64, ipc, cu.IPC_LAZY_PEER_ACCESS)
                if end > self._span(base)[1]:
                    driver.status("cuIpcCloseMemHandle", base)
                    raise HandleError(f"{handle.length} bytes at {handle.offset} of less")
        return Allocation(
            self._properties.number, base + handle.offset, handle.length, handle.via,
            opened=True, base=base, whole_bytes=handle.whole_bytes, key=key,
        )  # fmt: skip

    def check(self, address: int, length: int) -> None:
        """See `port.Device`. Asked of the first and the last byte."""
        with self.current() as driver:
            for byte in (address, address + max(1, length) - 1):
                kind, device = c_int(), c_int(-1)
                unknown = driver.status("cuPointerGetAttribute", byref(kind), cu.POINTER_MEMORY_TYPE, byte)
                unknown |= driver.status("cuPointerGetAttribute", byref(device), cu.POINTER_DEVICE, byte)
                if unknown or kind.value != cu.DEVICE_MEMORY or device.value != self._device:
                    raise WrongDeviceError(f"{length} bytes at {address:#x} are not memory of this device")

    # -- host memory --------------------------------------------------------------------------------------------

    def register(self, address: int, length: int, *, read_only: bool = False) -> Registration:
        """See `port.Device`."""
        flags = cu.REGISTER_PORTABLE | cu.REGISTER_DEVICE_MAP | (cu.REGISTER_READ_ONLY if read_only else 0)
        with self.current() as driver:
            done = False
            try:
                driver("cuMemHostRegister_v2", address, length, flags)
                done = True
                seen = driver.number("cuMemHostGetDevicePointer_v2", c_uint64, address, 0)
            except DeviceLostError:
                raise
            except DeviceError as error:
                if done:  # else it may be somebody else's registration
                    driver.status("cuMemHostUnregister", address)
                raise RegistrationError(f"{length} bytes: {error}") from error
        made = Registration(address, length, seen)
        self._registrations.add(address, length, made)
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
        with self.current() as driver:
            driver("cuMemHostUnregister", registration.address)

    def check_host(self, direction: Direction, moves: Sequence[Move]) -> None:
        """Raise NotRegisteredError for moves whose host side was not registered: the driver would copy it twice."""
        if direction is Direction.ON_DEVICE or not moves:
            return
        table = np.array(moves, dtype=np.uint64).reshape(-1, 3)
        if not self._registrations.hold(table[:, 1 if direction is Direction.TO_DEVICE else 0], table[:, 2]):
            raise NotRegisteredError("host memory that is not registered")

    # -- work ---------------------------------------------------------------------------------------------------

    def stream(self) -> CudaStream:
        """See `port.Device`."""
        with self.current() as driver:
            handle = driver.number("cuStreamCreate", c_void_p, cu.STREAM_NON_BLOCKING)
        return CudaStream(self, handle, adopted=False)

    def adopt(self, handle: int) -> CudaStream:
        """See `port.Device`. Of torch: `torch.cuda.Stream.cuda_stream`."""
        return CudaStream(self, handle, adopted=True)

    def kernel(self, name: str) -> int:
        """A kernel as the driver takes it, compiled when first wanted. NoDeviceError without a CuPy that can."""
        with self._lock:
            if name not in self._kernels:
                self._kernels[name] = self._compile(name)
            return self._kernels[name]

    def _compile(self, name: str) -> int:
        source = next((path for path in sorted(FOLDER.glob("*.cu")) if name in _KERNEL.findall(path.read_text())), None)
        if source is None:
            raise UnfitError(f"there is no kernel {name!r}")
        try:
            cupy = importlib.import_module("cupy")  # as late as can be: an engine may never need it
        except Exception as error:  # one that is broken raises anything
            raise NoDeviceError(f"kernels want CuPy (pip install 'kvstored[cuda]'): {error}") from error
        try:
            with self.current(), cupy.cuda.Device(self._properties.number):
                module = self._modules.get(source.name)
                if module is None:
                    module = self._modules[source.name] = cupy.RawModule(code=source.read_text(), options=COMPILE)
                return int(module.get_function(name).kernel.ptr)
        except DeviceError:
            raise
        except Exception as error:  # its own tree of errors, and those of the system for its folder: none is ours
            kind = OutOfDeviceMemoryError if "out of memory" in str(error).lower() else NoDeviceError
            raise kind(f"CuPy makes no kernels: {error!r}") from error

    def close(self) -> None:
        """See `port.Device`."""
        for registration in self._registrations.all():
            self.unregister(registration)
        for allocation in self._made.all():
            self.free(allocation)
        self.driver("cuDevicePrimaryCtxRelease_v2", self._device)


@contextmanager
def _as_handle_errors() -> Iterator[None]:
    """What the driver says to a handle, unless the device is gone."""
    try:
        yield
    except (DeviceLostError, HandleError):
        raise
    except DeviceError as error:
        raise HandleError(str(error)) from error
