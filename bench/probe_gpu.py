"""What the hardware at hand allows: `python3 -m bench.probe_gpu [--json FILE]`. Needs an NVIDIA driver, nothing else;
without one every question is written down as not measured, and why.

Answers what decides between the transfer modes (ARCHITECTURE.md): may memory that is only mapped for reading be
registered, may two processes register one arena, can one process open another's allocation by IPC handle and by
descriptor, what registering costs, and what it costs a daemon to have a CUDA context. It speaks with the driver by
ctypes: a failed call of the runtime API would stay behind as an error in every later one. A question whose call fails
is answered with the driver's name for the failure.
"""

import argparse
import ctypes
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MIB = 1 << 20
ARENA_MIB = 1024
COPY_MIB = 1024
TRIES = 5
ATTRIBUTES = {  # CUdevice_attribute
    "host_register_supported": 99,
    "host_register_read_only_supported": 113,
    "host_pointer_same_as_device": 91,
    "virtual_memory_supported": 102,
    "descriptor_handles_supported": 103,
    "ipc_events_supported": 125,
    "multiprocessors": 16,
    "copy_engines": 40,
    "compute_major": 75,
    "compute_minor": 76,
    "pageable_memory_access": 88,
}
PIECES = (64 << 10, 2 * MIB)
NOT_MEASURED = "not measured"
DEFAULT, PORTABLE, DEVICE_MAP, READ_ONLY = 0, 1, 2, 8  # of cuMemHostRegister
Answer = str | float | int | bool
Answers = dict[str, Answer]


class DriverError(RuntimeError):
    """A call of the driver failed; its name for that."""


class Driver:
    """libcuda, every call of which raises DriverError."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError("no CUDA driver is installed") from error
        self("cuInit", 0)
        self.device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(self.device), 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown').decode()}")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", text, len(text), self.device)
        return text.value.decode()

    def version(self) -> int:
        value = ctypes.c_int()
        self("cuDriverGetVersion", ctypes.byref(value))
        return value.value

    def enter(self) -> None:
        """The primary context, as the runtime API and every framework use it."""
        context = ctypes.c_void_p()
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self("cuCtxPushCurrent_v2", context)

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, bytes_: int) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(bytes_))
        return pointer

    def register(self, address: int, bytes_: int, flags: int) -> None:
        self("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(bytes_), flags)

    def unregister(self, address: int) -> None:
        self("cuMemHostUnregister", ctypes.c_void_p(address))

    def to_device(self, pointer: ctypes.c_uint64, address: int, bytes_: int) -> None:
        self("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(address), ctypes.c_size_t(bytes_))

    def to_host(self, address: int, pointer: ctypes.c_uint64, bytes_: int) -> None:
        self("cuMemcpyDtoH_v2", ctypes.c_void_p(address), pointer, ctypes.c_size_t(bytes_))


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", Location),
        ("metadata", ctypes.c_void_p), ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", ctypes.c_int))


PINNED, DESCRIPTOR, ON_DEVICE, READ_WRITE = 1, 1, 1, 3


class Arena:
    """Shared memory like a daemon's, mapped for reading and writing or for reading only."""

    def __init__(self, fd: int, bytes_: int, *, writable: bool, populate: bool = True) -> None:
        self.bytes = bytes_
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
        self.address = libc.mmap(None, bytes_, protection, mmap.MAP_SHARED, fd, 0)
        if populate and writable:
            ctypes.memset(self.address, 1, bytes_)


def memfd(bytes_: int) -> int:
    """Shared memory without a name."""
    fd = os.memfd_create("probe")
    os.ftruncate(fd, bytes_)
    return fd


FAILURES = (DriverError, OSError, subprocess.SubprocessError, ValueError, AttributeError)  # the last: an older driver


def asked(question: Callable[[], Answer]) -> Answer:
    """Its answer, or why there is none."""
    try:
        return question()
    except FAILURES as error:
        return f"no: {error}"


def all_asked(group: "Group", driver: Driver) -> dict[str, Answer]:
    """Every question of a group, in order: one call that fails leaves the others their chance."""
    names, ask = group
    answers: dict[str, Answer] = {}
    try:
        ask(driver, answers)
    except FAILURES as error:
        answers |= {name: f"no: {error}" for name in names if name not in answers}
    return {name: answers[name] for name in names}


def best_of(work: Callable[[], None]) -> float:
    """Seconds."""
    took = []
    for _ in range(TRIES):
        begun = time.perf_counter()
        work()
        took.append(time.perf_counter() - begun)
    return min(took)


def resident_mib() -> float:
    """Of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


# -- questions -----------------------------------------------------------------------------------------------------


def identity(driver: Driver, answers: Answers) -> None:
    """What it is, and what it says that it can do."""
    answers |= {"device": asked(driver.name), "driver": asked(driver.version)}
    answers |= {name: asked(partial(driver.attribute, number)) for name, number in ATTRIBUTES.items()}


def context_cost(driver: Driver, answers: Answers) -> None:
    """What a process pays that has a context and nothing else."""
    before, begun = resident_mib(), time.perf_counter()
    driver.enter()
    seconds = time.perf_counter() - begun
    resident, free_bytes = resident_mib() - before, driver.free_bytes()
    answers |= {"context_seconds": seconds, "context_resident_mib": resident}
    child = Child("hold")
    answers["context_device_mib"] = (free_bytes - driver.free_bytes()) / MIB if child.answer is True else child.answer
    child.end()


def registration(driver: Driver, answers: Answers) -> None:
    """Registering an arena in every way that there is."""
    fd, bytes_ = memfd(ARENA_MIB * MIB), ARENA_MIB * MIB
    arena = Arena(fd, bytes_, writable=True)
    seconds = []

    def time_it(flags: int, target: Arena) -> Callable[[], Answer]:
        def question() -> Answer:
            begun = time.perf_counter()
            driver.register(target.address, target.bytes, flags)
            seconds.append(time.perf_counter() - begun)
            driver.unregister(target.address)
            return True

        return question

    answers["register_writable"] = asked(time_it(PORTABLE, arena))
    answers["register_seconds_per_gib"] = seconds[0] * 1024 / ARENA_MIB if seconds else "no: see register_writable"
    reading = Arena(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), bytes_, writable=False)
    answers["register_read_only_map_default_flags"] = asked(time_it(PORTABLE, reading))
    answers["register_read_only_map_read_only_flag"] = asked(time_it(PORTABLE | READ_ONLY, reading))

    def both() -> Answer:
        driver.register(arena.address, bytes_, PORTABLE)
        child = Child("register", fd=fd)
        child.end()
        driver.unregister(arena.address)
        return child.answer

    answers["register_in_two_processes"] = asked(both)


def sharing(driver: Driver, answers: Answers) -> None:
    """Memory of the device in another process."""
    answers["open_by_ipc_handle"] = asked(lambda: opened_by_handle(driver))
    answers["open_by_descriptor"] = asked(lambda: opened_by_descriptor(driver))


def links(driver: Driver, answers: Answers) -> None:
    """Bytes a second over the link: registered memory, one way each, in one piece and in pieces."""
    bytes_ = COPY_MIB * MIB
    arena = Arena(memfd(bytes_), bytes_, writable=True)
    pointer = driver.allocate(bytes_)
    rate = bytes_ / 1e9
    answers["to_device_not_registered_gb_per_s"] = rate / best_of(
        lambda: driver.to_device(pointer, arena.address, bytes_)
    )
    begun = time.perf_counter()
    driver.register(arena.address, bytes_, PORTABLE)
    answers["register_first_seconds_per_gib"] = (time.perf_counter() - begun) * 1024 / COPY_MIB
    answers["to_device_gb_per_s"] = rate / best_of(lambda: driver.to_device(pointer, arena.address, bytes_))
    answers["to_host_gb_per_s"] = rate / best_of(lambda: driver.to_host(arena.address, pointer, bytes_))
    stream = ctypes.c_void_p()
    driver("cuStreamCreate", ctypes.byref(stream), 1)
    for piece in PIECES:

        def pieces(piece: int = piece) -> None:
            for at in range(0, bytes_, piece):
                driver(
                    "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(pointer.value + at), ctypes.c_void_p(arena.address + at),
                    ctypes.c_size_t(piece), stream,
                )  # fmt: skip
            driver("cuStreamSynchronize", stream)

        answers[f"to_device_{piece >> 10}_kib_pieces_gb_per_s"] = rate / best_of(pieces)
    driver.unregister(arena.address)
    driver("cuMemFree_v2", pointer)


def opened_by_handle(driver: Driver) -> Answer:
    """Another process's allocation by IPC handle: does it see what we wrote?"""
    pointer = driver.allocate(2 * MIB)
    driver("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0x5A), ctypes.c_size_t(2 * MIB))
    handle = IpcHandle()
    driver("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
    child = Child("open", text=bytes(handle).hex())
    child.end()
    driver("cuMemFree_v2", pointer)
    return child.answer


def opened_by_descriptor(driver: Driver) -> Answer:
    """Another process's virtual-memory allocation by descriptor."""
    wanted = Properties(PINNED, DESCRIPTOR, Location(ON_DEVICE, driver.device.value))
    grain = ctypes.c_size_t()
    driver("cuMemGetAllocationGranularity", ctypes.byref(grain), ctypes.byref(wanted), 0)
    handle = ctypes.c_uint64()
    driver("cuMemCreate", ctypes.byref(handle), grain, ctypes.byref(wanted), ctypes.c_uint64(0))
    pointer = mapped(driver, handle, grain)
    driver("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0x5A), grain)
    fd = ctypes.c_int()
    driver("cuMemExportToShareableHandle", ctypes.byref(fd), handle, DESCRIPTOR, ctypes.c_uint64(0))
    child = Child("import", fd=fd.value, text=str(grain.value))
    child.end()
    return child.answer


def mapped(driver: Driver, handle: ctypes.c_uint64, grain: ctypes.c_size_t) -> ctypes.c_uint64:
    """A virtual-memory allocation, given an address."""
    pointer = ctypes.c_uint64()
    driver(
        "cuMemAddressReserve", ctypes.byref(pointer), grain, ctypes.c_size_t(0), ctypes.c_uint64(0), ctypes.c_uint64(0)
    )
    driver("cuMemMap", pointer, grain, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
    access = Access(Location(ON_DEVICE, driver.device.value), READ_WRITE)
    driver("cuMemSetAccess", pointer, grain, ctypes.byref(access), ctypes.c_size_t(1))
    return pointer


# -- the other process ---------------------------------------------------------------------------------------------


class Child:
    """Another process with a context of its own, and what it found. It goes when it is told to."""

    def __init__(self, what: str, *, fd: int = -1, text: str = "") -> None:
        self._line, theirs = socket.socketpair()
        passed = [theirs.fileno()] + ([fd] if fd >= 0 else [])
        command = [sys.executable, "-m", "bench.probe_gpu", "--child", what, str(theirs.fileno()), str(fd), text]
        self._process = subprocess.Popen(command, pass_fds=passed, cwd=Path(__file__).parent.parent)
        theirs.close()
        self._line.settimeout(60)
        found = self._line.recv(4096).decode()
        self.answer: Answer = True if found == "yes" else found or "no: it ended"

    def end(self) -> None:
        """Let it go."""
        self._line.close()
        self._process.wait(60)


def be_child(what: str, out: int, fd: int, text: str) -> None:
    """Find out one thing, say it, and wait until told to go."""
    line = socket.socket(fileno=out)

    def find() -> Answer:
        driver = Driver()
        driver.enter()
        if what == "hold":
            return True
        if what == "register":
            arena = Arena(fd, os.fstat(fd).st_size, writable=True, populate=False)
            driver.register(arena.address, arena.bytes, PORTABLE)
            return True
        pointer = ctypes.c_uint64()
        if what == "open":
            handle = IpcHandle.from_buffer_copy(bytes.fromhex(text))
            driver("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), handle, 1)
        else:
            imported = ctypes.c_uint64()
            driver("cuMemImportFromShareableHandle", ctypes.byref(imported), ctypes.c_void_p(fd), DESCRIPTOR)
            pointer = mapped(driver, imported, ctypes.c_size_t(int(text)))
        seen = ctypes.create_string_buffer(4096)
        driver.to_host(ctypes.addressof(seen), pointer, len(seen))
        return seen.raw == b"\x5a" * 4096 or "no: other bytes are there"

    answer = asked(find)
    line.send(b"yes" if answer is True else str(answer).encode())
    line.recv(1)  # until the other end closes


Group = tuple[tuple[str, ...], Callable[[Driver, Answers], None]]
GROUPS: tuple[Group, ...] = (
    (("device", "driver", *ATTRIBUTES), identity),
    (("context_seconds", "context_resident_mib", "context_device_mib"), context_cost),
    (
        (
            "register_writable", "register_seconds_per_gib", "register_read_only_map_default_flags",
            "register_read_only_map_read_only_flag", "register_in_two_processes",
        ), registration,
    ),
    (("open_by_ipc_handle", "open_by_descriptor"), sharing),
    (
        (
            "to_device_not_registered_gb_per_s", "register_first_seconds_per_gib", "to_device_gb_per_s",
            "to_host_gb_per_s", *(f"to_device_{piece >> 10}_kib_pieces_gb_per_s" for piece in PIECES),
        ), links,
    ),
)  # fmt: skip
QUESTIONS = tuple(name for names, _ in GROUPS for name in names)


def run() -> dict[str, Answers | str]:
    """All answers, and why there are none if that is so."""
    try:
        driver = Driver()
    except DriverError as error:
        return {"why": str(error), "answers": dict.fromkeys(QUESTIONS, NOT_MEASURED)}
    answers: Answers = {}
    for group in GROUPS:
        answers |= all_asked(group, driver)
    return {"answers": answers}


def main() -> None:
    """Ask, and print what was found."""
    if sys.argv[1:2] == ["--child"]:
        be_child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    parser = argparse.ArgumentParser(prog="python3 -m bench.probe_gpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers there, too")
    options = parser.parse_args()
    found = run()
    if "why" in found:
        print(f"nothing to probe: {found['why']}", file=sys.stderr)
    answers = found["answers"]
    assert isinstance(answers, dict)
    for name, answer in answers.items():
        print(f"{name:42} {answer}")
    if options.json:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        options.json.write_text(json.dumps({"probe": "gpu", "time": stamp} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
