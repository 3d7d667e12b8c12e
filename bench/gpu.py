"""What a GPU's link gives, and how much of it copies between host memory and an engine's pages reach.

Limits first (pinned copies each way, both at once, on the device), then ours, in turn in the same run. Without a GPU
every figure is "not measured", and so it is with `--emulate`, which only shows that the code runs: how fast host memory
pretends to be a GPU is no figure. A figure that fails says so, and costs none of the others.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

import kvclient
from bench.gpu_daemon import daemon_load_over_h2d, daemon_save_over_d2h, dram_load_over_hbm_load, hbm_hit_over_d2d
from bench.gpu_own_cache import own_cache_over_hbm, spared
from bench.gpu_passes import Kind
from bench.gpu_rig import FULL, MIB, PRETENDED, QUICK, Rig, captured, namespace_of
from bench.gpu_swap import slowdown, swapped_beside
from bench.harness import Findings, say
from kvclient import devices
from kvclient.buffers import Scattered
from kvkernels import encodings
from kvkernels.aligned import aligned
from kvkernels.device.cuda import Cuda
from kvkernels.device.emulation import Emulation
from kvkernels.device.paged import Paged
from kvkernels.device.pinning import Copier, Pins
from kvkernels.device.port import EMULATION, Device, Direction, Move, NoDeviceError, place_of
from kvkernels.encodings import Encoding, encoded_bytes

NOT_MEASURED: Final = "not measured"
ROW: Final = 128


def run(*, quick: bool, emulate: bool = False) -> Findings:
    """All figures of `gpu`. Needs a GPU with 6 GiB free, and as much memory."""
    results: Findings = {}
    try:
        device: Device = Emulation(memory_bytes=1 << 30) if emulate else Cuda(0)
    except NoDeviceError as error:
        say(f"gpu: {error}; nothing is measured")
        results |= {"device": "none", "why": str(error)}
        return results | dict.fromkeys(FIGURES, NOT_MEASURED)
    results["device"] = place_of(device)
    who = EMULATION if emulate else "gpu"
    with Rig(device, PRETENDED if emulate else QUICK if quick else FULL) as rig:
        for name, figure in FIGURES.items():
            found = _measured(figure, rig)
            if isinstance(found, str):
                say(f"{who}: {name}: {found}")
                results[name] = found
            elif emulate:
                say(f"{EMULATION}: {NOT_MEASURED}: {name}, whose code ran")
                results[name] = f"{EMULATION}: {NOT_MEASURED}"
            else:
                say(f"gpu: {name} {found:.3f}")
                results[name] = found
        for direction, sizes in rig.engines.crossover.choices.items():
            for size, engine in sizes.items():
                chosen = f"{EMULATION}: {NOT_MEASURED}" if emulate else engine.value
                results[f"chosen_{direction.value}_{size >> 10}_kib"] = chosen
    return results


def _measured(figure: Callable[[Rig], float], rig: Rig) -> float | str:
    """Or what went wrong. Whoever has a GPU may have it for one run only, so that the others must come about."""
    try:
        return figure(rig)
    except Exception as error:  # noqa: BLE001  whatever it is, it stands in the record
        return f"{NOT_MEASURED}, failed: {type(error).__name__}: {error}"


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
    """Plain bytes a second out of encoded blocks in registered DRAM into pages, of the bare copy: KV of a capture."""

    def figure(rig: Rig) -> float:
        block_bytes = 2 * MIB
        plain = captured()
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

        try:
            return rig.limits["h2d"] / rig.seconds(work)
        finally:
            blocks[:] = kept

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


@contextmanager
def _client(rig: Rig, mode: str) -> Iterator[tuple[kvclient.Namespace, Callable[[], Scattered], int]]:
    """A real daemon, and half of what an engine has on the device, in pages of 2 MiB over all layers in any order."""
    pages = rig.pages(rig.there, 2 * MIB)
    blocks, ids = pages.blocks // 2, rig.shuffled(pages.blocks)
    with ExitStack() as stack:
        arguments = ["--config", stack.enter_context(_trusting())] if mode == "direct" else []
        _, client = stack.enter_context(rig.client(mode, *arguments))
        stack.callback(devices.forget, rig.device)
        yield namespace_of(client), partial(devices.paged_blocks, rig.place, pages, ids[:blocks]), blocks


@contextmanager
def _trusting() -> Iterator[str]:
    """A configuration by which this user's engines write into their tenant's memory themselves."""
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-") as folder:
        file = Path(folder) / "kvstored.toml"
        file.write_text(f"[tenants.bench]\nuids = [{os.geteuid()}]\ntrusting = true\n")
        yield str(file)


def client_fetch_over_h2d(mode: str) -> Callable[[Rig], float]:
    """`fetch` and `copy_to` through a daemon, of the bare copy: in mode copy arenas are mapped for reading only."""

    def figure(rig: Rig) -> float:
        with _client(rig, mode) as (namespace, pages, blocks):
            keys = namespace.keys(range(16 * blocks))
            assert namespace.store(keys, pages(), wait=True, space_s=30).accepted == blocks

            def work() -> None:
                with namespace.fetch(keys) as lease:
                    assert lease.copy_to(pages())

            work()
            rig.copies.pins.settle()  # what can be registered is
            return rig.limits["h2d"] / 2 / rig.seconds(work)

    return figure


def client_store_over_d2h(mode: str) -> Callable[[Rig], float]:
    """`store` until accepted, of the bare copy."""

    def figure(rig: Rig) -> float:
        with _client(rig, mode) as (namespace, pages, blocks):
            numbers = iter(range(1 << 20))

            def work() -> None:
                keys = namespace.keys(range(16 * blocks), extra=str(next(numbers)).encode())
                assert namespace.store(keys, pages(), space_s=30).accepted == blocks

            work()
            rig.copies.pins.settle()
            return rig.limits["d2h"] / 2 / rig.seconds(work)

    return figure


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
    "client_fetch_2_mib_over_h2d": client_fetch_over_h2d("copy"),
    "client_store_2_mib_over_d2h": client_store_over_d2h("copy"),
    "direct_fetch_2_mib_over_h2d": client_fetch_over_h2d("direct"),
    "direct_store_2_mib_over_d2h": client_store_over_d2h("direct"),
    "daemon_load_2_mib_over_h2d": daemon_load_over_h2d,
    "daemon_save_2_mib_over_d2h": daemon_save_over_d2h,
    "hbm_hit_over_d2d": hbm_hit_over_d2d,
    "dram_load_over_hbm_load": dram_load_over_hbm_load,
    "own_cache_over_hbm_one_engine": own_cache_over_hbm(1),
    "own_cache_over_hbm_two_engines": own_cache_over_hbm(2),
    "own_cache_spared_share_one_engine": spared(1, tier=False),
    "hbm_spared_share_one_engine": spared(1, tier=True),
    "own_cache_spared_share_two_engines": spared(2, tier=False),
    "hbm_spared_share_two_engines": spared(2, tier=True),
    "slowdown_beside_a_swap_prefill": partial(slowdown, kind=Kind.PREFILL),
    "slowdown_beside_a_swap_decode": partial(slowdown, kind=Kind.DECODE),
    "swapped_beside_a_prefill_gb_per_s": partial(swapped_beside, kind=Kind.PREFILL),
    "swapped_beside_a_decode_gb_per_s": partial(swapped_beside, kind=Kind.DECODE),
}
