"""Tensors on a device through the client: on the emulation, against a real client and a scripted daemon."""

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvclient
import kvclient.aio
from kvclient import devices
from kvclient.mapping import Mapping
from kvclient.results import Reason
from kvkernels import libc
from kvkernels.aligned import aligned
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import pages_of
from kvkernels.device.port import DeviceError, Direction, Stream
from kvproto.errors import UsageError
from tests.peer import Peer
from tests.unit.client_kit import BLOCK_BYTES, Blocks, blocks_of, client_of, keys_of, namespace_of, pair, streaming

COUNT = 12


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    devices.forget(made)
    made.close()


def tensor_of(device: Emulation, blocks: Blocks | None = None) -> EmulatedTensor:
    made = EmulatedTensor.zeros(device, (COUNT, BLOCK_BYTES))
    if blocks is not None:
        made.array[:] = blocks
    return made


class Held:
    """Holds up a stream of the client's until told."""

    def __init__(self, device: Emulation, direction: Direction, stream: Stream | None = None) -> None:
        self._gate = threading.Event()
        place = EmulatedTensor.zeros(device, (1,)).device
        stream = stream or devices.copies_for(place)._streams[direction]
        assert isinstance(stream, EmulatedStream)
        stream.submit(self._wait)

    def _wait(self) -> None:
        assert self._gate.wait(30)

    def let_go(self) -> None:
        self._gate.set()


@pytest.mark.parametrize("one_by_one", [False, True])
def test_blocks_go_from_a_device_to_the_daemon_and_back(tmp_path: Path, device: Emulation, *, one_by_one: bool) -> None:
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        source, target = tensor_of(device, blocks), tensor_of(device)
        given = [source[number] for number in range(COUNT)] if one_by_one else source
        assert namespace.store(keys, given, wait=True).accepted == COUNT
        taken = [target[number] for number in range(COUNT)] if one_by_one else target
        with namespace.fetch(keys) as lease:
            assert bytes(lease.views[3]) == blocks[3].tobytes()
            assert lease.copy_to(taken)
        assert np.array_equal(target.array, blocks)
        target.array[7, 7] ^= 1
        assert not np.array_equal(target.array, blocks)
        with namespace.fetch(keys) as lease:
            assert lease.copy_to(taken[:5])
        copies = devices.copies_for(source.device)
        assert copies.copier.direct_bytes + copies.copier.bounced_bytes == (2 * COUNT + 5) * BLOCK_BYTES
        assert copies.copier.bounced_bytes >= (COUNT + 5) * BLOCK_BYTES  # arenas are mapped for reading only


def test_the_callers_stream_comes_first(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        source, compute, gate = tensor_of(device), device.stream(), threading.Event()

        def forward() -> None:
            assert gate.wait(30)
            source.array[:] = blocks

        compute.submit(forward)
        stored: list[kvclient.StoreResult] = []
        storing = threading.Thread(
            target=lambda: stored.append(namespace.store(keys, source, wait=True, stream=compute))
        )
        storing.start()
        gate.set()
        storing.join()
        assert stored[0].accepted == COUNT
        with namespace.fetch(keys) as lease:
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks]
            target, reading = tensor_of(device), threading.Event()
            seen: list[bool] = []

            def read() -> None:
                assert reading.wait(30)
                seen.append(bool(target.array.any()))

            compute.submit(read)  # the engine still reads these pages
            copying = lease.start_copy(target, stream=compute.handle)
            assert not copying.done
            assert not target.array.any()
            reading.set()
            assert copying.result(30)
            assert copying.done
            assert seen == [False]
        assert np.array_equal(target.array, blocks)
        compute.close()


def test_the_lease_is_given_back_after_the_last_byte(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (peer, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        namespace.store(keys, list(blocks), wait=True)
        held, target = Held(device, Direction.TO_DEVICE), tensor_of(device)
        with namespace.fetch(keys) as lease:
            copying = lease.start_copy(target)
        assert namespace.match(keys).blocks == COUNT  # a RELEASE would ride on this
        assert (len(peer.leases), peer.released) == (1, [])
        assert not copying.done
        held.let_go()
        assert not copying.result(30), "released before it was over: that is a miss"
        peer.wait_for(lambda: len(peer.released) == 1)
        with namespace.fetch(keys) as lease:
            copying = lease.start_copy(target)
            assert copying.result(30)
        assert np.array_equal(target.array, blocks)


def test_an_engines_stream_waits_for_a_copy(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        namespace.store(keys, list(blocks), wait=True)
        held, target, compute = Held(device, Direction.TO_DEVICE), tensor_of(device), device.stream()
        seen: list[bool] = []
        with namespace.fetch(keys) as lease:
            copying = lease.start_copy(target)
            copying.order(compute)  # everything is in the stream, nothing has moved
            compute.submit(lambda: seen.append(np.array_equal(target.array, blocks)))
            assert not copying.done
            held.let_go()
            assert copying.result(30)
        compute.synchronize()
        assert seen == [True]
        compute.close()


def test_blocks_from_disk_go_on_as_they_come(tmp_path: Path, device: Emulation) -> None:
    with streaming(tmp_path, 3, COUNT, ready_blocks=4) as (_, namespace, keys, blocks):
        target = tensor_of(device)
        with namespace.fetch(keys, wait_s=30) as lease:
            assert lease.copy_to(target)
        assert np.array_equal(target.array, blocks)


def test_a_lost_device_is_a_miss_and_refuses_stores(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        namespace.store(keys[:4], list(blocks[:4]), wait=True)
        source, target = tensor_of(device, blocks), tensor_of(device)
        devices.copies_for(source.device)
        held = Held(device, Direction.TO_HOST)
        stored: list[kvclient.StoreResult] = []
        storing = threading.Thread(target=lambda: stored.append(namespace.store(keys, source, wait=True)))
        storing.start()
        device.lose("it fell off the bus")
        held.let_go()
        storing.join()
        assert (stored[0].known, stored[0].accepted) == (4, 0)
        assert {refused.reason for refused in stored[0].refused} == {Reason.DEVICE}
        with namespace.fetch(keys) as lease:
            assert lease.blocks == 4
            assert not lease.copy_to(target[:4])
            assert lease.copy_to([bytearray(BLOCK_BYTES) for _ in range(4)])
        assert namespace.match(keys).blocks == 4, "something was stored that never left the device"
        device.lost = ""


def test_a_copy_that_fails_half_way_is_not_over_while_a_part_of_it_is_in_the_stream(
    tmp_path: Path, device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        namespace.store(keys, list(blocks), wait=True)
        held, target, real = Held(device, Direction.TO_DEVICE), tensor_of(device), devices.Copies.copy

        def half(copies: devices.Copies, *words: Any) -> None:
            real(copies, *words)
            raise DeviceError("some of it is in the stream")

        monkeypatch.setattr(devices.Copies, "copy", half)
        with namespace.fetch(keys) as lease:
            copying = lease.start_copy(target)
            assert not copying.result(0.5)
            assert not copying.done, "the engine would use these pages for something else"
            held.let_go()
            assert not copying.result(30), "and it is a miss"
            assert copying.done
            arrived = target.array.copy()
        assert np.array_equal(arrived, blocks), "the control: there was something on its way"


@pytest.mark.parametrize("who", ["a copy", "a codec's copy", "a codec"])
def test_what_the_daemon_took_back_is_let_go_of_behind_who_copies(device: Emulation, who: str) -> None:
    """Otherwise it would stay mapped, and the daemon would wait for it."""
    copies = devices.copies_for(EmulatedTensor.zeros(device, (1,)).device)
    fd = os.memfd_create("arena")
    os.ftruncate(fd, 8192)
    seen: list[str] = []
    arena = Mapping(fd, 8192, writable=True, unmapped=lambda: seen.append("unmapped"))
    os.close(fd)
    target = device.allocate(8192)
    arena.view[:] = b"\x05" * 8192
    for _ in range(2):
        copies.copy(Direction.TO_DEVICE, [(target.address, arena.address, 8192)], [arena], None).wait()
        copies.pins.settle()
    assert copies.copier.direct_bytes >= 8192
    copies.sweep()
    arena.gone = True
    coding = copies.coding([])
    if who == "a codec":  # it has looked where its blocks lie, and nothing of it is in its stream yet
        coding._lock.acquire()
    else:
        held = Held(device, Direction.TO_DEVICE, None if who == "a copy" else coding._stream)
    address, arena = arena.address, None  # type: ignore[assignment]

    def let_go() -> None:
        seen.append("copied")
        if who == "a codec":
            coding._lock.release()
        else:
            held.let_go()

    late = threading.Timer(0.05, let_go)
    late.start()
    copies.sweep()  # a copy may still read it
    late.join()
    assert seen == ["copied", "unmapped"]
    assert not copies.pins.is_ready(address, 8192)


def test_pages_of_layers_are_stored_and_filled_where_they_lie(tmp_path: Path, device: Emulation) -> None:
    pieces, room = 4, 20
    piece_bytes = 1264  # of blocks of 5,056 bytes
    with Peer(tmp_path) as peer, client_of(peer) as client:
        namespace = namespace_of(client, pieces * piece_bytes)
        layers = [EmulatedTensor.zeros(device, (room, piece_bytes)) for _ in range(pieces)]
        pages = pages_of(device, layers)
        keys, ids = keys_of(COUNT), [int(one) for one in np.random.default_rng(3).permutation(room)[:COUNT]]
        values = np.random.default_rng(4).integers(1, 256, (pieces, room, piece_bytes), dtype=np.uint8)
        for layer, value in zip(layers, values, strict=True):
            layer.array[:] = value
        place, compute = layers[0].device, device.stream()
        stored = namespace.store(keys, devices.paged_blocks(place, pages, ids, compute), wait=True)
        assert stored.accepted == COUNT
        for layer in layers:
            layer.array[:] = 0
        others = ids[::-1]
        with namespace.fetch(keys) as lease:
            assert bytes(lease.views[2]) == values[:, ids[2]].tobytes()
            assert lease.copy_to(devices.paged_blocks(place, pages, others, compute))
        found = np.stack([layer.array for layer in layers])
        assert np.array_equal(found[:, others], values[:, ids])
        assert not np.array_equal(found[:, ids], values[:, ids])
        untouched = [page for page in range(room) if page not in ids]
        assert not found[:, untouched].any()
        with pytest.raises(UsageError, match="pages"):
            devices.paged_blocks(place, pages, [room])
        with pytest.raises(UsageError, match="stream"):
            namespace.store(keys, devices.paged_blocks(place, pages, ids), stream=compute)
        compute.close()


def test_a_session_that_has_ended_lets_go_of_its_ring(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (_, namespace):
        source = tensor_of(device, blocks_of(COUNT))
        assert namespace.store(keys_of(COUNT), source, wait=True).accepted == COUNT
        copies = devices.copies_for(source.device)
        copies.pins.settle()
        copies.sweep()
        assert len(copies.pins.owners()) == 1
    copies.sweep()
    assert copies.pins.owners() == []


def test_unfit_tensors_are_told_before_a_byte_moves(tmp_path: Path, device: Emulation) -> None:
    other = Emulation(1)
    with pair(tmp_path) as (_, namespace):
        keys, blocks = keys_of(COUNT), blocks_of(COUNT)
        good = tensor_of(device, blocks)
        wide = EmulatedTensor.zeros(device, (COUNT, BLOCK_BYTES + 8))
        elsewhere = tensor_of(other)
        for wrong, why in (
            (wide, "bytes"),
            (wide[:, 8:], "contiguous"),
            (good[:5], "12 blocks"),
            ([good[0]] * 11, "12 keys"),
            ([good[0], *(elsewhere[number] for number in range(1, COUNT))], "block 1: not on"),
            ([good[0], *blocks[1:]], "block 1: not on"),
            ([good[0][:7], *[good[1]] * 11], "block 0: 7 bytes"),
        ):
            with pytest.raises(UsageError, match=why):
                namespace.store(keys, wrong)
        with pytest.raises(UsageError, match="CUDA"):
            namespace.store(keys, torch.zeros(COUNT, BLOCK_BYTES, dtype=torch.uint8, device="meta"))
        with pytest.raises(UsageError, match="stream"):
            namespace.store(keys, list(blocks), stream=device.stream())
        for stream in ("x", True, object(), 99_999):
            with pytest.raises(UsageError, match="stream"):
                namespace.store(keys, good, stream=stream)
        with namespace.fetch(keys) as lease, pytest.raises(UsageError, match="device"):
            lease.start_copy([])
        assert namespace.store(keys, good, wait=True).accepted == COUNT
    devices.forget(other)
    other.close()


def test_a_tensor_whose_memory_was_given_back_is_told(tmp_path: Path, device: Emulation) -> None:
    with pair(tmp_path) as (_, namespace):
        tensor = tensor_of(device)
        made = tensor._owner
        device.free(made)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="not memory of this device"):
            namespace.store(keys_of(COUNT), tensor)


def test_the_asyncio_client_does_the_same(tmp_path: Path, device: Emulation) -> None:
    async def go() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=30) as client:
            namespace = await client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES)
            keys, blocks = keys_of(COUNT), blocks_of(COUNT)
            source, target, compute = tensor_of(device, blocks), tensor_of(device), device.stream()
            stored = await namespace.store(keys, source, wait=True, stream=compute)
            assert stored.accepted == COUNT
            async with namespace.fetch(keys) as lease:
                assert await lease.copy_to(target, stream=compute)
            assert np.array_equal(target.array, blocks)
            compute.close()

    with Peer(tmp_path):
        asyncio.run(go())


def test_an_engine_on_a_processor_loads_none_of_it(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, kvclient; print([n for n in sys.modules if n.startswith(('kvkernels.device.', 'cupy'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kvkernels.device.port']"
    with pair(tmp_path) as (_, namespace):
        assert namespace_of is not None
        assert namespace.store(keys_of(1), list(blocks_of(1)), wait=True).accepted == 1


def test_the_folder_of_calibrations_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = devices._folder()
    assert folder == tmp_path / "kvstored"
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert devices._folder() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user that nobody knows
    assert devices._folder() is None


@dataclass(eq=False)
class Map:
    """As much of `mapping.Mapping` as a copy looks at."""

    address: int
    bytes: int
    gone: bool = False
    writable: bool = True


def test_a_copy_out_of_a_device_that_fails_half_way_writes_nothing_afterwards(
    device: Emulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 20
    copies = devices.Copies(device)
    slot = aligned(size)  # stands for one of the daemon's, which is somebody else's once `drain` has returned
    slot[:] = 0
    mapping = Map(int(slot.ctypes.data), size)
    copies._want([mapping])  # type: ignore[list-item]
    copies.pins.settle()
    source = device.allocate(size)
    libc.bytes_at(source.address, size)[:] = 0xEE
    stream = copies._streams[Direction.TO_HOST]
    engine_computes = threading.Event()
    stream.submit(lambda: engine_computes.wait(10))  # type: ignore[attr-defined]
    record, synchronize = stream.record, stream.synchronize

    def fail() -> None:
        raise DeviceError("no event")

    def wait() -> None:
        engine_computes.set()
        monkeypatch.setattr(stream, "record", record)
        synchronize()

    monkeypatch.setattr(stream, "record", fail)
    monkeypatch.setattr(stream, "synchronize", wait)
    with pytest.raises(DeviceError):
        devices.Side(copies, None).drain([(mapping.address, source.address, size)], [mapping])  # type: ignore[list-item]
    slot[:] = 1
    engine_computes.set()
    stream.record().wait()
    assert (slot == 1).all()
    copies.close()
