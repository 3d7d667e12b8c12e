"""Swaps of an engine with its memory on a device, for tests: what holds them up, and what watches them.

Held up they are on the emulation alone.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import devices
from kvclient.attached import AttachedMemory
from kvclient.copying import Gate
from kvclient.results import StoreResult
from kvclient.swap_attached import AttachedWay
from kvclient.swap_ways import Way
from kvclient.swapping import Priority, Swapper
from kvclient.swaps import SwapOut
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.port import Direction
from tests.attached_kit import BLOCK_BYTES, LAYERS, PAGES, PIECE, Engine, Values, connected, engine, namespace_of, where
from tests.unit.client_kit import wait_until

HALF = PAGES // 2
FIRST, SECOND = list(range(HALF)), list(range(PAGES - 1, HALF - 1, -1))
CHUNK = 4 * BLOCK_BYTES


@dataclass
class Rig:
    """An engine and its swapper."""

    kv: Engine
    client: kvclient.Client
    namespace: kvclient.Namespace
    swapper: Swapper

    @property
    def memory(self) -> AttachedMemory:
        way = self.swapper._way
        assert isinstance(way, AttachedWay)
        return way.memory

    def keys(self, count: int = HALF, extra: bytes = b"") -> list[bytes]:
        return list(self.namespace.keys(list(range(4 * count)), extra=extra))

    def stored(self, keys: Sequence[bytes]) -> Values:
        """What the store has of these: (layers, blocks, bytes)."""
        found = np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8)
        with self.namespace.fetch(keys, wait_s=10.0) as lease:
            assert lease.copy_to(found[: lease.expected])
            assert lease.expected == len(keys)
        return found.reshape(len(keys), LAYERS, PIECE).transpose(1, 0, 2)

    def stream(self, direction: Direction) -> EmulatedStream:
        """The swapper's."""
        stream = devices.copies_for(self.kv.layers[0].device)._streams[direction]
        assert isinstance(stream, EmulatedStream)
        return stream


@contextmanager
def rig(daemon: DaemonProcess, way: str, model: str = "", **options: int) -> Iterator[Rig]:
    """One, whose chunks are of four blocks."""
    if way == "host" and not where.emulated:
        pytest.skip("pages of the host are no GPU's")
    mode = "daemon" if way == "daemon" else "copy"
    with engine() as kv, connected(daemon, mode=mode, **options) as client:
        namespace = namespace_of(client, f"{way} {model}")
        if way == "daemon":
            swapper = client.swapper(namespace, kv.attach(client), chunk_bytes=CHUNK)
        else:
            place = kv.layers[0].device if way == "device" else None
            swapper = client.swapper(namespace, kv.pages, place, chunk_bytes=CHUNK)
        yield Rig(kv, client, namespace, swapper)


class Held:
    """Holds a stream up until the end of the block, or `open`."""

    def __init__(self, stream: EmulatedStream) -> None:
        self._gate = threading.Event()
        stream.submit(self._wait)

    def _wait(self) -> None:
        assert self._gate.wait(60)

    def open(self) -> None:
        self._gate.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()


class Watched:
    """A way that notes the chunks it stores, and holds them up while it is told to."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self.chunks: list[tuple[bytes, ...]] = []
        self.goes = threading.Event()
        self.goes.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self._way, name)

    def save(self, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate) -> StoreResult:
        self.chunks.append(tuple(keys))
        assert self.goes.wait(60)
        return self._way.save(keys, ids, parent, gate)


def watched(swapper: Swapper) -> Watched:
    made = Watched(swapper._shared.way)
    swapper._shared.way = made  # type: ignore[assignment]  # it has the rest from the real one
    return made


def out_and_over(one: Rig, keys: Sequence[bytes], pages: Sequence[int]) -> SwapOut:
    swap = one.swapper.swap_out(keys, pages, priority=Priority.URGENT)
    assert swap.result(30.0).lead == len(keys)
    return swap


def reused_too_early(one: Rig, reuse: Callable[[], None], meanwhile: Callable[[], None] = lambda: None) -> bool:
    """A swap out is held up in the device's stream, and its pages are used again: is what was stored wrong?"""
    keys = one.keys()
    with Held(one.stream(Direction.TO_HOST)) as held:
        out = one.swapper.swap_out(keys, FIRST)
        wait_until(lambda: out.chunks)
        thread = threading.Thread(target=reuse)
        thread.start()
        wait_until(lambda: out.priority is Priority.URGENT or not thread.is_alive())
        meanwhile()
        held.open()
        thread.join(60)
        assert out.result(30.0).accepted == HALF
    return not np.array_equal(one.stored(keys), one.kv.values[:, :HALF])


def overwrite(one: Rig) -> Callable[[], None]:
    def reuse() -> None:
        assert one.swapper.before_reuse(FIRST, timeout_s=30.0)
        one.kv.put(FIRST, np.zeros((LAYERS, HALF, PIECE), np.uint8))

    return reuse


def fill(one: Rig, keys: Sequence[bytes]) -> Callable[[], None]:
    def reuse() -> None:
        swap = one.swapper.swap_in(keys, FIRST, priority=Priority.URGENT, wait_s=10.0)
        assert swap.result(30.0).blocks == HALF

    return reuse


def after_others(one: Rig, keys: Sequence[bytes]) -> Callable[[], None]:
    """One that is less urgent has come in: what is more urgent and may begin has begun, and is over."""

    def wait() -> None:
        swap = one.swapper.swap_in(keys[:1], SECOND[:1], priority=Priority.LATER, wait_s=10.0)
        assert swap.result(30.0).blocks == 1

    return wait
