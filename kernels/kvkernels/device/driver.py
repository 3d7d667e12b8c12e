"""libcuda, by ctypes: every call that this project makes, with its types, and its failures as errors of the port.

The driver's interface and not the runtime's, whose failed calls stay behind as an error in every later one of the same
process: it is the engine's. `tests/unit/test_device_driver.py` compares the types with cuda.h.
"""

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, Final

from kvkernels.device.port import DeviceError, DeviceLostError, NoDeviceError, OutOfDeviceMemoryError

# CUdevice_attribute
MULTIPROCESSORS: Final = 16
VIRTUAL_MEMORY: Final = 102
DESCRIPTOR_HANDLES: Final = 103
READ_ONLY_REGISTRATION: Final = 113
# CUpointer_attribute, CUmemorytype
POINTER_MEMORY_TYPE: Final = 2
POINTER_DEVICE: Final = 9
DEVICE_MEMORY: Final = 2
# CUstreamCaptureMode
CAPTURE_THREAD_LOCAL: Final = 1
# flags
STREAM_NON_BLOCKING: Final = 1
EVENT_BLOCKING_SYNC: Final = 1
EVENT_DISABLE_TIMING: Final = 2
REGISTER_PORTABLE: Final = 1
REGISTER_DEVICE_MAP: Final = 2
REGISTER_READ_ONLY: Final = 8
IPC_LAZY_PEER_ACCESS: Final = 1
PINNED: Final = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
POSIX_DESCRIPTOR: Final = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
ON_DEVICE: Final = 1  # CU_MEM_LOCATION_TYPE_DEVICE
READ_WRITE: Final = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
IN_STREAM_ORDER: Final = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
# CUresult
OUT_OF_MEMORY: Final = 2
NOT_READY: Final = 600
NO_DEVICE: Final = frozenset({100, 101})
# After these the process's context is of no use: a driver going, uncorrectable memory, a fault of a kernel, unknown.
LOST: Final = frozenset({4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class AllocationFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags."""

    _fields_ = (("bytes", ctypes.c_ubyte * 8),)


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int), ("requestedHandleTypes", c_int), ("location", Location),
        ("win32HandleMetaData", c_void_p), ("allocFlags", AllocationFlags),
    )  # fmt: skip


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (("srcAccessOrder", c_int), ("srcLocHint", Location), ("dstLocHint", Location), ("flags", c_uint))


class Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


_OUT: Final = c_void_p  # where a result goes
_POINTER: Final = c_uint64  # CUdeviceptr
_OPAQUE: Final = c_void_p  # CUcontext, CUstream, CUevent, CUfunction

SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDriverGetVersion": (_OUT,),
    "cuDeviceGet": (_OUT, c_int),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (_OUT, c_int, c_int),
    "cuDeviceGetUuid_v2": (_OUT, c_int),
    "cuDeviceTotalMem_v2": (_OUT, c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (_OPAQUE,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuThreadExchangeStreamCaptureMode": (_OUT,),
    "cuMemGetInfo_v2": (_OUT, _OUT),
    "cuMemAlloc_v2": (_OUT, c_size_t),
    "cuMemFree_v2": (_POINTER,),
    "cuMemGetAddressRange_v2": (_OUT, _OUT, _POINTER),
    "cuPointerGetAttribute": (_OUT, c_int, _POINTER),
    "cuIpcGetMemHandle": (_OUT, _POINTER),
    "cuIpcOpenMemHandle_v2": (_OUT, IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (_POINTER,),
    "cuMemGetAllocationGranularity": (_OUT, _OUT, c_int),
    "cuMemCreate": (_OUT, c_size_t, _OUT, c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemAddressReserve": (_OUT, c_size_t, c_size_t, _POINTER, c_uint64),
    "cuMemAddressFree": (_POINTER, c_size_t),
    "cuMemMap": (_POINTER, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (_POINTER, c_size_t),
    "cuMemSetAccess": (_POINTER, c_size_t, _OUT, c_size_t),
    "cuMemExportToShareableHandle": (_OUT, c_uint64, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (_OUT, c_void_p, c_int),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (_OUT, c_void_p, c_uint),
    "cuMemcpyHtoDAsync_v2": (_POINTER, c_void_p, c_size_t, _OPAQUE),
    "cuMemcpyDtoHAsync_v2": (c_void_p, _POINTER, c_size_t, _OPAQUE),
    "cuMemcpyDtoDAsync_v2": (_POINTER, _POINTER, c_size_t, _OPAQUE),
    "cuStreamCreate": (_OUT, c_uint),
    "cuStreamDestroy_v2": (_OPAQUE,),
    "cuStreamSynchronize": (_OPAQUE,),
    "cuStreamWaitEvent": (_OPAQUE, _OPAQUE, c_uint),
    "cuEventCreate": (_OUT, c_uint),
    "cuEventDestroy_v2": (_OPAQUE,),
    "cuEventRecord": (_OPAQUE, _OPAQUE),
    "cuEventQuery": (_OPAQUE,),
    "cuEventSynchronize": (_OPAQUE,),
    "cuLaunchKernel": (_OPAQUE, *(c_uint,) * 7, _OPAQUE, _OUT, _OUT),
}
BATCH: Final = "cuMemcpyBatchAsync"  # CUDA 12.8: says which copy failed; 13 has another one, which does not
BATCH_V2: Final = "cuMemcpyBatchAsync_v2"
BATCH_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    BATCH_V2: (_OUT, _OUT, _OUT, c_size_t, _OUT, _OUT, c_size_t, _OPAQUE),
    BATCH: (_OUT, _OUT, _OUT, c_size_t, _OUT, _OUT, c_size_t, _OUT, _OPAQUE),
}


class CudaError(DeviceError):
    """A call of the driver failed in a way that has no error of its own. `status`: a CUresult."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Driver:
    """The library. Any thread; the GIL is released in calls."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NoDeviceError("no CUDA driver is installed") from error
        for name, types in SIGNATURES.items():
            self._function(name).argtypes = types
        self.batch = next((name for name in BATCH_SIGNATURES if hasattr(self._library, name)), "")
        if self.batch:
            self._function(self.batch).argtypes = BATCH_SIGNATURES[self.batch]
        status = self.status("cuInit", 0)
        if status:
            raise NoDeviceError(f"the CUDA driver has no device: {self.error('cuInit', status)}")

    def __call__(self, name: str, *arguments: Any) -> None:
        """Raises DeviceError."""
        status = self._function(name)(*arguments)
        if status:
            raise self.error(name, status)

    def status(self, name: str, *arguments: Any) -> int:
        """CUresult, for calls whose failure is an answer."""
        return int(self._function(name)(*arguments))

    def error(self, name: str, status: int) -> DeviceError:
        """What a failed call is in the port's words."""
        text = c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(text))
        said = f"{name}: {(text.value or str(status).encode()).decode()}"
        if status == OUT_OF_MEMORY:
            return OutOfDeviceMemoryError(said)
        if status in NO_DEVICE:
            return NoDeviceError(said)
        return DeviceLostError(said) if status in LOST else CudaError(said, status)

    def number(self, name: str, kind: Any, *arguments: Any) -> int:
        """Of a call whose first argument takes a number of this kind."""
        value = kind()
        self(name, ctypes.byref(value), *arguments)
        return int(value.value or 0)

    def _function(self, name: str) -> Any:
        try:
            return getattr(self._library, name)
        except AttributeError:
            raise NoDeviceError(f"this CUDA driver has no {name}") from None
