"""What the figures of `bench gpu` stand on: a device with memory on both sides, and what was measured on it so far."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final, Self

import numpy as np

import kvclient
from bench import harness
from bench.harness import say
from bench.process import DaemonProcess
from bench.quality_capture import read_capture
from kvclient import devices
from kvkernels.aligned import Bytes, aligned
from kvkernels.device.engines import GUESS, Crossover, Engines, load_or_measure
from kvkernels.device.pages import Pages
from kvkernels.device.port import EMULATION, Allocation, Device, DeviceError, Registration, Stream, place_of
from kvkernels.device.tables import Tables
from kvkernels.encodings import Values

CAPTURE: Final = Path(__file__).parent / "captures" / "random_llama.npz"
LAYERS: Final = 32  # of the engine whose pages these are
MIB: Final = 1 << 20
BLOCK_BYTES: Final = 2 * MIB
BLOCK_TOKENS: Final = 16
TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is copied, and how often; of an arena how much is registered; how large a pass beside a swap is."""

    total_bytes: int
    rounds: int
    arena_bytes: int
    pass_s: float
    width: int  # of the matrices of that pass


FULL: Final = Scale(1 << 30, 9, 1 << 30, 0.02, 4096)
QUICK: Final = Scale(256 << 20, 3, 256 << 20, 0.02, 4096)
PRETENDED: Final = Scale(8 << 20, 1, 8 << 20, 0.002, 16)


@dataclass(slots=True)
class Host:
    """Registered memory of this process."""

    bytes: Bytes
    registration: Registration

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.registration.address


@dataclass(frozen=True, slots=True)
class Place:
    """What `tensor.device` is."""

    port: Device
    index: int = 0
    type: str = "port"


@dataclass
class Rig:
    """A device with memory on both sides, and what was measured on it: `limits` in seconds for all of the memory."""

    device: Device
    scale: Scale
    stack: ExitStack = field(default_factory=ExitStack)
    limits: dict[str, float] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)  # by figures, for others that are made of them
    outcomes: dict[str, tuple[float, float]] = field(default_factory=dict)  # see `gpu_own_cache.Outcome`

    def __enter__(self) -> Self:
        total = self.scale.total_bytes
        self.tables = Tables(self.device)
        self.stack.callback(self.tables.close)
        self.source, self.target = self.host(total), self.host(total)
        self.source.bytes[:] = np.resize(captured().view(np.uint8), total)
        self.here, self.there = self.memory(total), self.memory(total)
        self.up, self.down = self.stream(), self.stream()
        say(f"{place_of(self.device)}: measuring which engine is best")
        self.engines = Engines(self.device, self.tables, self._crossover())
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _crossover(self) -> Crossover:
        try:
            return load_or_measure(self.device, self.tables, None)
        except DeviceError as error:  # then figures are by the guess that clients would have, too
            say(f"{place_of(self.device)}: that failed: {error}")
            return GUESS

    @property
    def place(self) -> Place:
        """What a tensor's `device` would be."""
        return Place(self.device)

    @property
    def name(self) -> str:
        """As the daemon's settings name it."""
        properties = self.device.properties
        return EMULATION if properties.emulated else f"cuda:{properties.number}"

    @property
    def copies(self) -> devices.Copies:
        """Of the client in this process, which copies in the ways that were measured here; until `devices.forget`."""
        found = devices.copies_for(self.place)
        found.engines.crossover = self.engines.crossover
        return found

    def host(self, length: int) -> Host:
        """Registered, and touched."""
        memory = aligned(length)
        memory[:] = 0
        registration = self.device.register(int(memory.ctypes.data), length)
        self.stack.callback(self.device.unregister, registration)
        return Host(memory, registration)

    def memory(self, length: int) -> Allocation:
        """Of the device."""
        made = self.device.allocate(length)
        self.stack.callback(self.device.free, made)
        return made

    @contextmanager
    def lent(self, length: int) -> Iterator[Allocation]:
        """Memory of the device that a daemon may have handed, until the block ends."""
        made = self.device.allocate(length, self.device.properties.shares[0])
        try:
            yield made
        finally:
            devices.forget(self.device)  # nothing of the client's copies into it any more
            self.device.free(made)

    def stream(self) -> Stream:
        """One more."""
        made = self.device.stream()
        self.stack.callback(made.close)
        return made

    def seconds(self, work: Callable[[], None]) -> float:
        """Of one time, the median; after a first one that counts for nothing."""
        took = []
        for _ in range(self.scale.rounds + 1):
            begun = time.perf_counter()
            work()
            self.up.synchronize()
            self.down.synchronize()
            took.append(time.perf_counter() - begun)
        return max(1e-9, median(took[1:]))

    def pages(self, memory: Allocation, block_bytes: int, total_bytes: int = 0) -> Pages:
        """All of it as an engine's: a region a layer, pages of one layer behind each other."""
        piece, blocks = block_bytes // LAYERS, (total_bytes or self.scale.total_bytes) // block_bytes
        bases = tuple(memory.address + layer * blocks * piece for layer in range(LAYERS))
        return Pages(bases, (piece,) * LAYERS, piece, blocks)

    def shuffled(self, blocks: int) -> list[int]:
        """Pages as an engine hands them out."""
        return [int(number) for number in np.random.default_rng(1).permutation(blocks)]

    @contextmanager
    def client(self, mode: str, *arguments: str) -> Iterator[tuple[DaemonProcess, kvclient.Client]]:
        """A real daemon with twice as much memory as is copied, and its client, in this mode and no other."""
        dram = f"{2 * self.scale.total_bytes // MIB + 256}MiB"
        with harness.daemon("--dram", dram, *arguments) as process, self.connected(process, mode) as client:
            yield process, client

    @contextmanager
    def connected(self, process: DaemonProcess, mode: str) -> Iterator[kvclient.Client]:
        """One more client of it."""
        with kvclient.connect(process.runtime_dir, mode=mode, timeout_s=10.0) as client:
            if not client.wait_connected(TIMEOUT_S):
                raise RuntimeError(client.status.why_not)
            if client.status.mode != mode:
                raise RuntimeError(f"mode {client.status.mode} in place of {mode}: {client.status.notes}")
            yield client


def namespace_of(client: kvclient.Client, model: str = "m") -> kvclient.Namespace:
    """Of blocks that are pages of the rig's."""
    return client.namespace(
        model=model, engine="gpu", layout="l", dtype="bfloat16", block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES
    )


def captured() -> Values:
    """A block of KV of a model, out of the capture that is committed: of random weights, and called so."""
    values = np.concatenate([tensor.reshape(-1) for tensor in read_capture(CAPTURE).tensors.values()])
    return np.resize(values, BLOCK_BYTES // 2)
