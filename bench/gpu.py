"""What a GPU's link gives, and how much of it copies between host memory and an engine's pages reach.

Limits first (pinned copies each way, both at once, on the device), then ours, in turn in the same run. Without a GPU
every figure is "not measured", and so it is with `--emulate`, which only shows that the code runs: how fast host memory
pretends to be a GPU is no figure.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Final, Self

import numpy as np

import kvclient
from bench import harness
from bench.codec import values_like_kv
from bench.gpu_swap import slowdown
from bench.harness import Findings, say
from kvclient import devices
from kvclient.buffers import Scattered
from kvkernels import encodings
from kvkernels.aligned import Bytes, aligned
from kvkernels.device.cuda import Cuda
from kvkernels.device.emulation import Emulation
from kvkernels.device.engines import Engines, load_or_measure
from kvkernels.device.paged import Paged
from kvkernels.device.pages import Pages
from kvkernels.device.pinning import Copier, Pins
from kvkernels.device.port import (
    EMULATION,
    Allocation,
    Device,
    Direction,
    Move,
    NoDeviceError,
    Registration,
    Stream,
    place_of,
)
from kvkernels.device.tables import Tables
from kvkernels.encodings import Encoding, encoded_bytes

NOT_MEASURED: Final = "not measured"
ROW: Final = 128
LAYERS: Final = 32  # of the engine whose pages these are
MIB: Final = 1 << 20
# What the issue names and nothing here can show yet.
LATER: Final = {
    "hbm_hit_over_d2d": "a LOAD by the daemon out of its tier on the GPU has no figure yet",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is copied."""

    total_bytes: int
    rounds: int
    arena_bytes: int


FULL: Final = Scale(1 << 30, 9, 1 << 30)
QUICK: Final = Scale(256 << 20, 3, 256 << 20)
PRETENDED: Final = Scale(8 << 20, 1, 8 << 20)


def run(*, quick: bool, emulate: bool = False) -> Findings:
    """All figures of `gpu`. Needs a GPU with 4 GiB free, and as much memory."""
    results: Findings = {}
    nothing = f"{EMULATION}: {NOT_MEASURED}" if emulate else NOT_MEASURED
    try:
        device: Device = Emulation(memory_bytes=1 << 30) if emulate else Cuda(0)
    except NoDeviceError as error:
        say(f"gpu: {error}; nothing is measured")
        results |= {"device": "none", "why": str(error)}
        return results | dict.fromkeys((*FIGURES, *LATER), NOT_MEASURED)
    results["device"] = place_of(device)
    scale = PRETENDED if emulate else QUICK if quick else FULL
    with Rig(device, scale) as rig:
        for name, figure in FIGURES.items():
            found = figure(rig)
            if emulate:
                say(f"{nothing}: {name}, whose code ran")
                results[name] = nothing
            else:
                say(f"gpu: {name} {found:.3f}")
                results[name] = found
        for direction, sizes in rig.engines.crossover.choices.items():
            for size, engine in sizes.items():
                results[f"chosen_{direction.value}_{size >> 10}_kib"] = nothing if emulate else engine.value
    for name, why in LATER.items():
        say(f"{nothing}: {name}: {why}")
        results[name] = nothing
    return results


@dataclass(slots=True)
class Host:
    """Registered memory of this process."""

    bytes: Bytes
    registration: Registration

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.registration.address


@dataclass
class Rig:
    """A device with memory on both sides, and what was measured on it."""

    device: Device
    scale: Scale
    stack: ExitStack = field(default_factory=ExitStack)
    limits: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Self:
        total = self.scale.total_bytes
        self.tables = Tables(self.device)
        self.stack.callback(self.tables.close)
        self.source, self.target = self.host(total), self.host(total)
        self.source.bytes[:] = np.resize(values_like_kv(1)[0].view(np.uint8), total)
        self.here, self.there = self.memory(total), self.memory(total)
        self.up, self.down = self.stream(), self.stream()
        say(f"{place_of(self.device)}: measuring which engine is best")
        self.engines = Engines(self.device, self.tables, load_or_measure(self.device, self.tables, None))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

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

    def pages(self, memory: Allocation, block_bytes: int) -> Pages:
        """All of it as an engine's: a region a layer, pages of one layer behind each other."""
        piece, blocks = block_bytes // LAYERS, self.scale.total_bytes // block_bytes
        bases = tuple(memory.address + layer * blocks * piece for layer in range(LAYERS))
        return Pages(bases, (piece,) * LAYERS, piece, blocks)

    def shuffled(self, blocks: int) -> list[int]:
        """Pages as an engine hands them out."""
        return [int(number) for number in np.random.default_rng(1).permutation(blocks)]


# -- limits ------------------------------------------------------------------------------------------------------------


def pinned_h2d(rig: Rig) -> float:
    """GB/s, one copy of everything."""
    move = [(rig.here.address, rig.source.address, rig.scale.total_bytes)]
    return _limit(rig, "h2d", lambda: rig.up.copy(Direction.TO_DEVICE, move))


def pinned_d2h(rig: Rig) -> float:
    """GB/s."""
    move = [(rig.target.address, rig.here.address, rig.scale.total_bytes)]
    return _limit(rig, "d2h", lambda: rig.down.copy(Direction.TO_HOST, move))


def both_at_once(rig: Rig) -> float:
    """GB/s of both directions together."""
    total = rig.scale.total_bytes

    def work() -> None:
        rig.up.copy(Direction.TO_DEVICE, [(rig.here.address, rig.source.address, total)])
        rig.down.copy(Direction.TO_HOST, [(rig.target.address, rig.there.address, total)])

    return _limit(rig, "both", work, 2)


def d2d(rig: Rig) -> float:
    """GB/s, reading and writing counted."""
    move = [(rig.there.address, rig.here.address, rig.scale.total_bytes)]
    return _limit(rig, "d2d", lambda: rig.up.copy(Direction.ON_DEVICE, move), 2)


def _limit(rig: Rig, name: str, work: Callable[[], None], times: int = 1) -> float:
    rig.limits[name] = rig.seconds(work)
    return times * rig.scale.total_bytes / rig.limits[name] / 1e9


# -- ours --------------------------------------------------------------------------------------------------------------


def _pieces(rig: Rig, block_bytes: int, *, to_device: bool, other: bool = False) -> list[Move]:
    """Between registered blocks and pages in any order."""
    pages = rig.pages(rig.there if other else rig.here, block_bytes)
    host = (rig.source if to_device else rig.target).address
    blocks = [host + number * block_bytes for number in range(pages.blocks)]
    ids = rig.shuffled(pages.blocks)
    return pages.moves_in(ids, blocks) if to_device else pages.moves_out(ids, blocks)


def paged_over_h2d(block_bytes: int) -> Callable[[Rig], float]:
    """Registered DRAM to pages, of the bare copy."""

    def figure(rig: Rig) -> float:
        moves = _pieces(rig, block_bytes, to_device=True)
        return rig.limits["h2d"] / rig.seconds(lambda: rig.engines.copy(rig.up, Direction.TO_DEVICE, moves))

    return figure


def paged_over_d2h(block_bytes: int) -> Callable[[Rig], float]:
    """Pages to registered DRAM, of the bare copy."""

    def figure(rig: Rig) -> float:
        moves = _pieces(rig, block_bytes, to_device=False)
        return rig.limits["d2h"] / rig.seconds(lambda: rig.engines.copy(rig.down, Direction.TO_HOST, moves))

    return figure


def paged_both_over_limit(rig: Rig) -> float:
    """Both ways at once, of both bare copies at once."""
    into = _pieces(rig, 2 * MIB, to_device=True)
    out = _pieces(rig, 2 * MIB, to_device=False, other=True)

    def work() -> None:
        rig.engines.copy(rig.up, Direction.TO_DEVICE, into)
        rig.engines.copy(rig.down, Direction.TO_HOST, out)

    return rig.limits["both"] / rig.seconds(work)


def effective(encoding: Encoding) -> Callable[[Rig], float]:
    """Plain bytes a second from encoded blocks in registered DRAM into pages, of the bare copy of plain ones."""

    def figure(rig: Rig) -> float:
        block_bytes = 2 * MIB
        plain = values_like_kv(1)[0]
        row = 8 if encoding is Encoding.BF16_FIXED else ROW
        size = encoded_bytes(encoding, plain.size, row)
        stride = -(-size // 16) * 16
        pages, paged = rig.pages(rig.here, block_bytes), Paged(rig.device, rig.tables)
        one = np.zeros(size, np.uint8)
        assert encodings.encode(encoding, plain, one, row, half=False)
        blocks = rig.source.bytes[: pages.blocks * stride].reshape(pages.blocks, stride)
        kept = blocks.copy()
        blocks[:, :size] = one
        where, ids = rig.device.reach(rig.source.address, blocks.size), rig.shuffled(pages.blocks)

        def work() -> None:
            batch = paged.decode(rig.up, encoding, pages, ids, where, stride, row=row, half=False)
            assert not batch.failed()

        share = rig.limits["h2d"] / rig.seconds(work)
        blocks[:] = kept
        return share

    return figure


def bf16_fixed_over_ratio(rig: Rig) -> float:
    """Of what the bare copy would be if it moved the encoded bytes for nothing else."""
    ratio = 2 * MIB / encoded_bytes(Encoding.BF16_FIXED, MIB, 8)
    return effective(Encoding.BF16_FIXED)(rig) / ratio


def register_seconds_per_gib(rig: Rig) -> float:
    """Of an arena that is populated."""
    arena = aligned(rig.scale.arena_bytes)
    arena[:] = 1
    begun = time.perf_counter()
    registration = rig.device.register(int(arena.ctypes.data), arena.size)
    took = time.perf_counter() - begun
    rig.device.unregister(registration)
    return took * (1 << 30) / arena.size


def first_fetch_over_register(rig: Rig) -> float:
    """The first 2 MiB out of an arena that is being registered, in shares of the time that registering takes."""
    arena = aligned(rig.scale.arena_bytes)
    arena[:] = 1
    pins = Pins(rig.device)
    copier = Copier(rig.device, rig.engines, pins)
    begun = time.perf_counter()
    pins.want(int(arena.ctypes.data), arena.size)
    copier.to_device(rig.up, [(rig.here.address, int(arena.ctypes.data), 2 * MIB)]).wait()
    first = time.perf_counter() - begun
    pins.settle()
    whole = time.perf_counter() - begun
    copier.close()
    pins.close()
    return first / max(1e-9, whole)


@dataclass(frozen=True, slots=True)
class Place:
    """What `tensor.device` is."""

    port: Device
    index: int = 0
    type: str = "port"


@contextmanager
def _client(rig: Rig) -> Iterator[tuple[kvclient.Namespace, Callable[[], Scattered], int]]:
    """A real daemon, and half of what an engine has on the device, in pages of 2 MiB over all layers in any order."""
    pages = rig.pages(rig.there, 2 * MIB)
    blocks, ids, place = pages.blocks // 2, rig.shuffled(pages.blocks), Place(rig.device)
    with (
        harness.daemon("--dram", f"{2 * rig.scale.total_bytes // MIB + 256}MiB") as process,
        kvclient.connect(process.runtime_dir, timeout_s=10) as client,
    ):
        assert client.wait_connected(60)
        namespace = client.namespace(model="m", engine="gpu", layout="l", dtype="bfloat16", block_bytes=2 * MIB)
        devices.copies_for(place).engines.crossover = rig.engines.crossover
        yield namespace, partial(devices.paged_blocks, place, pages, ids[:blocks]), blocks
    devices.forget(rig.device)


def client_fetch_over_h2d(rig: Rig) -> float:
    """`fetch` and `copy_to` through a daemon, of the bare copy: the arenas are mapped for reading only here."""
    with _client(rig) as (namespace, pages, blocks):
        keys = namespace.keys(range(16 * blocks))
        assert namespace.store(keys, pages(), wait=True, space_s=30).accepted == blocks

        def work() -> None:
            with namespace.fetch(keys) as lease:
                assert lease.copy_to(pages())

        return rig.limits["h2d"] / 2 / rig.seconds(work)


def client_store_over_d2h(rig: Rig) -> float:
    """`store` until accepted, of the bare copy."""
    with _client(rig) as (namespace, pages, blocks):
        numbers = iter(range(1 << 20))

        def work() -> None:
            keys = namespace.keys(range(16 * blocks), extra=str(next(numbers)).encode())
            assert namespace.store(keys, pages(), space_s=30).accepted == blocks

        return rig.limits["d2h"] / 2 / rig.seconds(work)


FIGURES: Final[dict[str, Callable[[Rig], float]]] = {
    "pinned_h2d_gb_per_s": pinned_h2d,
    "pinned_d2h_gb_per_s": pinned_d2h,
    "both_at_once_gb_per_s": both_at_once,
    "d2d_gb_per_s": d2d,
    "paged_2_mib_over_h2d": paged_over_h2d(2 * MIB),
    "paged_64_kib_over_h2d": paged_over_h2d(64 << 10),
    "paged_2_mib_over_d2h": paged_over_d2h(2 * MIB),
    "paged_64_kib_over_d2h": paged_over_d2h(64 << 10),
    "paged_both_over_limit": paged_both_over_limit,
    "bf16_fixed_over_ratio": bf16_fixed_over_ratio,
    "int4_g64_effective_over_h2d": effective(Encoding.INT4_G64),
    "int8_effective_over_h2d": effective(Encoding.INT8),
    "fp8_effective_over_h2d": effective(Encoding.FP8),
    "register_seconds_per_gib": register_seconds_per_gib,
    "first_fetch_over_register": first_fetch_over_register,
    "client_fetch_2_mib_over_h2d": client_fetch_over_h2d,
    "client_store_2_mib_over_d2h": client_store_over_d2h,
    "slowdown_beside_a_swap": lambda rig: slowdown(rig, Place(rig.device)),
}
