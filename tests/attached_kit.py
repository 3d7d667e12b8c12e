"""An engine with its KV memory on a device, attached to a daemon; and a daemon whose copies a test can hold up.

The device is the emulation, or a GPU where `tests/gpu` runs the same tests: `where` says which.

`python -m tests.attached_kit ARGUMENTS` is the daemon. While a pipe is at `$TEST_DEVICE_GATE` its device's copies
wait in their stream, as on a device that is slow, or hangs.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import kvclient
from bench.process import DaemonProcess
from kvclient import devices
from kvclient.attached import AttachedMemory
from kvkernels.aligned import Bytes, aligned
from kvkernels.device import emulated_streams
from kvkernels.device.cuda import Cuda
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import pages_of
from kvkernels.device.port import EMULATION, Direction, Via

GATE = "TEST_DEVICE_GATE"
LAYERS, PIECE, PAGES = 4, 4096, 64
BLOCK_BYTES = LAYERS * PIECE
EMULATED = ("--gpu-devices", "emulation")
Values = np.ndarray[Any, np.dtype[np.uint8]]


class Where:
    """Which device engines of this kit are on, and what a daemon is told of it."""

    emulated = True  # tests/gpu/conftest.py changes it for its modules

    @property
    def arguments(self) -> tuple[str, str]:
        """Of a daemon."""
        return EMULATED if self.emulated else ("--gpu-devices", "cuda:0")

    def is_named(self, name: str) -> bool:
        """Does the daemon's word for a device mean this one?"""
        return name == f"{EMULATION}:0" if self.emulated else name.endswith("(GPU 0)")


where = Where()


class EmulatedLayer(EmulatedTensor):
    """Of the emulation, whose memory a processor reaches."""

    def write(self, ids: Sequence[int], content: Values) -> None:
        """Into pages."""
        self.array[list(ids)] = content

    def read(self, ids: Sequence[int]) -> Values:
        """Of pages."""
        content: Values = self.array[list(ids)]
        return content


@dataclass(frozen=True, slots=True)
class GpuPlace:
    """What `tensor.device` is."""

    port: Cuda
    index: int = 0
    type: str = "port"


class GpuLayer:
    """Of a GPU, with as much of a tensor's interface as `pages_of` wants; what it holds is copied there and back."""

    def __init__(self, device: Cuda, pages: int, share: Via) -> None:
        self.device, self.shape = GpuPlace(device), (pages, PIECE)
        shares = device.properties.shares
        self._address = device.allocate(pages * PIECE, share if share in (Via.NOTHING, *shares) else shares[0]).address

    def data_ptr(self) -> int:
        return self._address

    def element_size(self) -> int:
        return 1

    def stride(self) -> tuple[int, int]:
        return PIECE, 1

    def write(self, ids: Sequence[int], content: Values) -> None:
        """Into pages."""
        room = aligned(len(ids) * PIECE)
        room[:] = content.reshape(-1)
        self._copy(Direction.TO_DEVICE, ids, room)

    def read(self, ids: Sequence[int]) -> Values:
        """Of pages."""
        room = aligned(len(ids) * PIECE)
        self._copy(Direction.TO_HOST, ids, room)
        return room.reshape(len(ids), PIECE)

    def _copy(self, direction: Direction, ids: Sequence[int], room: Bytes) -> None:
        """All of it has happened when this returns."""
        port, first = self.device.port, int(room.ctypes.data)
        there = [self._address + page * PIECE for page in ids]
        here = [first + number * PIECE for number in range(len(ids))]
        targets, sources = (there, here) if direction is Direction.TO_DEVICE else (here, there)
        registration, stream = port.register(first, room.size), port.stream()
        try:
            stream.copy(direction, [(target, source, PIECE) for target, source in zip(targets, sources, strict=True)])
        finally:
            stream.close()
            port.unregister(registration)


class Engine:
    """Layers in device memory: page n of all of them is block n. `values[layer, page]` is what they hold at first."""

    device: Any  # the emulation, or a GPU: a test may ask one for what the other has not
    layers: list[Any]

    def __init__(self, *, number: int = 0, share: Via = Via.DESCRIPTOR, pages: int = PAGES, seed: int = 1) -> None:
        if where.emulated:
            self.device = Emulation(number)
            self.layers = [EmulatedLayer.zeros(self.device, (pages, PIECE), share=share) for _ in range(LAYERS)]
        else:
            self.device = Cuda(number)
            self.layers = [GpuLayer(self.device, pages, share) for _ in range(LAYERS)]
        self.values: Values = np.random.default_rng(seed).integers(0, 256, (LAYERS, pages, PIECE), dtype=np.uint8)
        self.pages = pages_of(self.device, self.layers)
        self.put(range(pages), self.values)

    def put(self, ids: Sequence[int], values: Values) -> None:
        """Write pages."""
        for layer, content in zip(self.layers, values, strict=True):
            layer.write(ids, content)

    def get(self, ids: Sequence[int]) -> Values:
        """What pages hold: (layers, pages, bytes)."""
        return np.stack([layer.read(ids) for layer in self.layers])

    def attach(self, client: kvclient.Client) -> AttachedMemory:
        """Hand it over."""
        return client.attach(self.layers[0].device, self.pages)

    def close(self) -> None:
        """Give it up."""
        devices.forget(self.device)
        self.device.close()


@contextmanager
def engine(**options: Any) -> Iterator[Engine]:
    """One, until the block ends."""
    made = Engine(**options)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def connected(daemon: DaemonProcess, **options: Any) -> Iterator[kvclient.Client]:
    """A client in mode daemon."""
    with kvclient.connect(daemon.runtime_dir, **{"mode": "daemon", "timeout_s": 10.0, **options}) as client:
        assert client.wait_connected(30.0), client.status
        yield client


@contextmanager
def hurried(client: kvclient.Client, *namespaces: kvclient.Namespace) -> Iterator[None]:
    """Meanwhile a call without an answer ends after 0.3 s. Before and after each has its answer, however busy the
    machine is.
    """
    others: list[Any] = [client._connection, *namespaces]
    names = ["timeout_ns", *["_timeout_ns"] * len(namespaces)]
    before_ns = client._connection.timeout_ns
    for other, name in zip(others, names, strict=True):
        setattr(other, name, 3 * 10**8)
    try:
        yield
    finally:
        for other, name in zip(others, names, strict=True):
            setattr(other, name, before_ns)


def namespace_of(client: kvclient.Client, model: str, block_bytes: int = BLOCK_BYTES) -> kvclient.Namespace:
    """A page a block."""
    return client.namespace(
        model=model, engine="e", layout="layers", dtype="uint8", block_tokens=4, block_bytes=block_bytes
    )


class Gate:
    """Holds up the copies of a daemon that was started with it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"
        os.environ[GATE] = str(self._path)

    def shut(self, after: int = 0) -> None:
        """From now on none ends, but for so many."""
        self._path.with_suffix(".after").write_text(str(after))
        self._path.with_suffix(".held").unlink(missing_ok=True)
        os.mkfifo(self._path)

    @property
    def holds(self) -> bool:
        """Has a copy come to it since it was shut?"""
        return self._path.with_suffix(".held").exists()

    def lose(self) -> None:
        """The device falls off its bus with the next copy."""
        self._path.with_suffix(".lost").touch()

    def open(self) -> None:
        """All go on."""
        if not self._path.exists():
            return
        fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)  # wakes who waits
        self._path.unlink()
        os.close(fd)


@contextmanager
def gated_daemon(*arguments: str) -> Iterator[tuple[DaemonProcess, Gate]]:
    """A small daemon, and its gate, which is open."""
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder:
        gate = Gate(Path(folder))
        small = ("--dram", "64MiB", "--arena", "8MiB", "--lock", "false", *EMULATED)
        with DaemonProcess(
            Path(folder) / "run", *small, *arguments, log_file=Path(folder) / "log", module=("tests.attached_kit",)
        ) as process:
            yield process, gate


@contextmanager
def other_engine(daemon: DaemonProcess, verb: str, model: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that loads or saves; killed at the end of the block, if not before."""
    command = [sys.executable, "-m", "tests.attached_kit", "engine", str(daemon.runtime_dir), verb, model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "attached\n"
            yield process
        finally:
            process.kill()


def maps_of(daemon: DaemonProcess) -> int:
    """How many allocations of engines it has mapped."""
    maps = Path(f"/proc/{daemon.process.pid}/maps").read_text(encoding="ascii")
    return sum("kvstored-emulated-device" in line for line in maps.splitlines())


def _serve() -> None:
    from kvstored.cli import main

    path = os.environ[GATE]
    real = emulated_streams.EmulatedStream.copy_batch

    def held_up(self: Any, direction: Any, moves: Any) -> None:
        if Path(path).with_suffix(".lost").exists():
            self._device.lose("it fell off its bus")
        self.submit(lambda: _wait_at(path))
        real(self, direction, moves)

    setattr(emulated_streams.EmulatedStream, "copy_batch", held_up)  # noqa: B010  a method, for all of them
    sys.exit(main())


def _wait_at(path: str) -> None:
    after = Path(path).with_suffix(".after")
    if Path(path).exists() and (left := int(after.read_text())) > 0:
        after.write_text(str(left - 1))
        return
    while Path(path).exists():
        Path(path).with_suffix(".held").touch()
        with suppress(FileNotFoundError):
            os.close(os.open(path, os.O_RDONLY))


def _be_an_engine(run: Path, verb: str, model: str) -> None:
    """Begin to load or save a chain of eight blocks, say so, and wait."""
    with kvclient.connect(run, mode="daemon", timeout_s=10.0) as client, engine() as kv:
        namespace = namespace_of(client, model)
        keys = namespace.keys(list(range(4 * 8)))
        memory = kv.attach(client)
        sys.stdout.write("attached\n")
        sys.stdout.flush()
        if verb == "save":
            namespace.save(keys, memory[range(8)], timeout_s=60.0)
        else:
            namespace.load(keys, memory[range(8)], timeout_s=60.0)


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        _be_an_engine(Path(sys.argv[2]), *sys.argv[3:])
    _serve()
