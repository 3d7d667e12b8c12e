"""The device suite on cuda.py over the stub; run by tests/unit/test_device_cuda.py with the stub as libcuda.so.1."""

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Self

import pytest

from kvkernels import libc
from kvkernels.aligned import aligned
from kvkernels.device.cuda import FOLDER, Cuda
from kvkernels.device.engines import Engine, Engines
from kvkernels.device.pages import Pages
from kvkernels.device.pinning import Pins
from kvkernels.device.port import DeviceError, Direction, Move, NoDeviceError, OutOfDeviceMemoryError, UnfitError
from kvkernels.device.tables import Tables
from kvstored.device_work import DeviceThreads, Done, Filling, Region
from tests.device_suite import DeviceSuite


class TestStub(DeviceSuite):
    """Kernels are the stub's, since CuPy cannot compile for it."""

    kind = "0"

    @pytest.fixture
    def device(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
        library = ctypes.CDLL("libcuda.so.1")

        def compile_(self: Cuda, name: str) -> int:
            if not any(f"void {name}(" in path.read_text() for path in FOLDER.glob("*.cu")):
                raise UnfitError(name)
            return ctypes.cast(getattr(library, f"shim_{name}"), ctypes.c_void_p).value or 0

        monkeypatch.setattr(Cuda, "_compile", compile_)
        made = Cuda()
        assert made.properties.name == "stub"
        yield made
        made.close()


@pytest.fixture
def plain() -> Iterator[Cuda]:
    """With its own way of compiling."""
    made = Cuda()
    yield made
    made.close()


def moves_on(device: Cuda) -> tuple[list[Move], Callable[[], bool]]:
    """Small pieces from registered memory, which kernels copy unless something is measured; are they there?"""
    host, target = aligned(64 << 10), device.allocate(64 << 10)
    host[:] = 7
    first = int(host.ctypes.data)
    device.register(first, host.size)
    moves = [(target.address + at, first + at, 4096) for at in range(0, host.size, 8192)]
    return moves, lambda: all((libc.bytes_at(at, length) == host[0]).all() for at, _, length in moves)


# -- a CuPy that does not compile --------------------------------------------------------------------------------------


def broken_cupy(error: Exception) -> SimpleNamespace:
    """It is there, and raises what CuPy raises where NVRTC or a folder for compiled code is not."""

    def get_function(_name: str) -> None:
        raise error

    return SimpleNamespace(
        cuda=SimpleNamespace(Device=lambda _number: nullcontext()),
        RawModule=lambda **_: SimpleNamespace(get_function=get_function),
    )


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host without it."""
    broken = broken_cupy(RuntimeError("CuPy failed to load libnvrtc.so.12"))
    monkeypatch.setitem(sys.modules, "cupy", broken)


@pytest.mark.usefixtures("no_nvrtc")
def test_without_a_compiler_pieces_go_in_a_batch(plain: Cuda) -> None:
    moves, arrived = moves_on(plain)
    copier, stream = Engines(plain, Tables(plain)), plain.stream()
    copier.copy(stream, Direction.TO_DEVICE, moves)
    assert arrived()
    with pytest.raises(NoDeviceError, match="libnvrtc"):
        plain.kernel("move_pieces")
    with pytest.raises(UnfitError):
        plain.kernel("no_such")
    stream.close()


@pytest.mark.usefixtures("no_nvrtc")
def test_without_a_compiler_the_daemon_copies_and_keeps_its_gpu(plain: Cuda) -> None:
    moves, arrived = moves_on(plain)
    over = threading.Event()
    threads = DeviceThreads(plain, over.set)
    threads.start()
    pages = Pages((moves[0][0],), (8192,), 4096, len(moves))
    sources = [source for _, source, _ in moves]
    filling = Filling(pages, range(len(moves)), sources, [Region(sources[0], 64 << 10)], 1, [False] * len(moves))
    threads.put(filling)
    done: list[Done] = []
    while not (done and done[-1].over):
        assert over.wait(30)
        over.clear()
        done += threads.take_done()
    threads.stop()
    threads.copier.close()
    assert (filling.error, threads.lost) == (None, "")
    assert arrived()


def test_no_room_for_compiled_code_is_no_lack_of_a_compiler(plain: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory")
    monkeypatch.setitem(sys.modules, "cupy", broken_cupy(error))
    with pytest.raises(OutOfDeviceMemoryError):
        plain.kernel("move_pieces")


# -- an engine that captures a graph -----------------------------------------------------------------------------------

MODES = {"global": 0, "thread": 1, "relaxed": 2}


class Capture:
    """Of this thread, as torch makes one; `broken` afterwards if a call made it so."""

    def __init__(self, mode: str = "global") -> None:
        self._library, self._mode, self.broken = ctypes.CDLL("libcuda.so.1"), MODES[mode], False

    def __enter__(self) -> Self:
        assert self._library.cuStreamBeginCapture_v2(None, self._mode) == 0
        return self

    def __exit__(self, *_: object) -> None:
        self.broken = self._library.cuStreamEndCapture(None, ctypes.byref(ctypes.c_void_p())) != 0

    def thread_mode(self) -> int:
        """What this thread may do beside captures; it stays as it is."""
        mode = ctypes.c_int(0)
        assert self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        found = mode.value
        assert self._library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        return found


def everything(device: Cuda) -> None:
    """What background threads ask of the driver."""
    host, pins = aligned(64 << 10), Pins(device)
    stream, tables = device.stream(), Tables(device)
    made = device.allocate(64 << 10)
    pins.want(int(host.ctypes.data), host.size)
    pins.settle()
    assert pins.is_ready(int(host.ctypes.data), host.size)
    moves = [(made.address, int(host.ctypes.data), 4096)]
    Engines(device, tables).copy_by(Engine.DMA, stream, Direction.TO_DEVICE, moves)
    tables.give_back(tables.take(1 << 10), stream.record())
    assert stream.record().done
    stream.close()
    tables.close()
    pins.close()
    device.free(made)


def in_a_thread(work: Callable[[], None]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  whoever waits raises it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if raised:
        raise raised[0]


def test_other_threads_break_no_capture(plain: Cuda) -> None:
    with Capture() as capture:
        in_a_thread(lambda: everything(plain))
    assert not capture.broken


def test_the_stub_lets_a_capture_break(plain: Cuda) -> None:
    """As it would by a call of a thread that takes no care."""
    library = ctypes.CDLL("libcuda.so.1")

    def careless() -> None:
        assert library.cuCtxPushCurrent_v2(ctypes.c_void_p(plain._context)) == 0
        assert library.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(64)) == 900

    with Capture() as capture:
        in_a_thread(careless)
    assert capture.broken


def test_a_thread_that_captures_itself_is_as_safe_as_before(plain: Cuda) -> None:
    """What it asks of us is not done behind its capture's back: pages that are still to be computed are no pages."""
    with Capture() as capture, pytest.raises(DeviceError):
        plain.allocate(64)
    assert capture.broken
    with Capture("relaxed") as capture:
        plain.free(plain.allocate(64))
    assert not capture.broken


def test_a_thread_may_do_what_it_could_before(plain: Cuda) -> None:
    capture = Capture()
    library = ctypes.CDLL("libcuda.so.1")
    for mode in MODES.values():
        library.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(mode)))
        plain.free(plain.allocate(64))
        with pytest.raises(OutOfDeviceMemoryError):
            plain.allocate(1 << 40)
        assert capture.thread_mode() == mode
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(0)))
