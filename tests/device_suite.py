"""What every device behind the port must do: the emulation (tests/contract) and CUDA (tests/gpu) pass the same."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvkernels import encodings, libc
from kvkernels.aligned import aligned
from kvkernels.device.engines import SIZES, Crossover, Engine, Engines, merged
from kvkernels.device.paged import Paged
from kvkernels.device.pinning import Copier, Pins
from kvkernels.device.port import (
    Device,
    Direction,
    Handle,
    HandleError,
    Move,
    NotRegisteredError,
    OutOfDeviceMemoryError,
    RegistrationError,
    Stream,
    UnfitError,
    Via,
    WrongDeviceError,
)
from kvkernels.device.tables import Tables
from kvkernels.encodings import Encoding, EncodingError, encoded_bytes
from tests.device_kit import KIB, EngineMemory, Host
from tests.device_planes import PlanesSuite
from tests.values import as_bf16, shapes_of_values

ROW = 128
ROOT = Path(__file__).parent.parent


class DeviceSuite(PlanesSuite):
    """Subclasses give `device`, a fixture, and `kind`, for tests/device_child.py."""

    kind = ""

    @pytest.fixture
    def stream(self, device: Device) -> Iterator[Stream]:
        made = device.stream()
        yield made
        made.close()

    @pytest.fixture
    def tables(self, device: Device, stream: Stream) -> Iterator[Tables]:
        made = Tables(device)
        yield made
        made.close()

    # -- memory and copies ----------------------------------------------------------------------------------------

    def test_bytes_go_there_and_back(self, device: Device, stream: Stream) -> None:
        made, further = device.allocate(64 * KIB), device.allocate(64 * KIB)
        source, target = Host(device, 64 * KIB), Host(device, 64 * KIB)
        source.bytes[:] = np.random.default_rng(1).integers(0, 256, 64 * KIB, dtype=np.uint8)
        for copy in (stream.copy, stream.copy_batch):
            target.bytes[:] = 0
            half = 32 * KIB
            copy(
                Direction.TO_DEVICE,
                [(made.address, source.address, half), (made.address + half, source.address + half, half)],
            )
            copy(
                Direction.ON_DEVICE,
                [(further.address + half, made.address, half), (further.address, made.address + half, half)],
            )
            copy(Direction.TO_HOST, [(target.address, further.address, 64 * KIB)])
            copy(Direction.TO_HOST, [])
            stream.synchronize()
            assert np.array_equal(target.bytes, np.roll(source.bytes, half))
            assert not np.array_equal(target.bytes, source.bytes)
        device.free(made)
        device.free(further)

    def test_what_is_asked_of_another_stream_waits_for_its_event(self, device: Device, stream: Stream) -> None:
        made, host = device.allocate(KIB), Host(device, 2 * KIB)
        host.bytes[:KIB] = 7
        second = device.stream()
        stream.copy(Direction.TO_DEVICE, [(made.address, host.address, KIB)])
        second.wait(stream.record())
        second.copy(Direction.TO_HOST, [(host.address + KIB, made.address, KIB)])
        event = second.record()
        event.wait()
        assert event.done
        assert (host.bytes == 7).all()
        second.close()
        device.free(made)

    def test_a_stream_is_adopted_by_its_handle(self, device: Device, stream: Stream) -> None:
        made, host = device.allocate(KIB), Host(device, KIB)
        adopted = device.adopt(stream.handle)
        adopted.copy(Direction.TO_DEVICE, [(made.address, host.address, KIB)])
        adopted.record().wait()
        assert adopted.handle == stream.handle
        device.free(made)

    def test_host_memory_must_be_registered(self, device: Device, stream: Stream) -> None:
        made, host = device.allocate(KIB), aligned(2 * KIB)
        address = int(host.ctypes.data)
        move = [(made.address, address, KIB)]
        for copy in (stream.copy, stream.copy_batch):
            with pytest.raises(NotRegisteredError):
                copy(Direction.TO_DEVICE, move)
        registration = device.register(address, KIB)
        assert device.reach(address + 16, KIB - 16) == registration.device_address + 16
        stream.copy(Direction.TO_DEVICE, move)
        with pytest.raises(NotRegisteredError):
            stream.copy(Direction.TO_DEVICE, [(made.address, address + 16, KIB)])  # the end of it is not
        stream.synchronize()
        device.unregister(registration)
        with pytest.raises(NotRegisteredError):
            stream.copy(Direction.TO_DEVICE, move)
        with pytest.raises(NotRegisteredError):
            device.reach(address, KIB)
        with pytest.raises(NotRegisteredError):
            device.unregister(registration)
        device.free(made)

    def test_what_is_mapped_for_reading_only_is_registered_where_that_is_supported(self, device: Device) -> None:
        fd = os.memfd_create("arena")
        os.ftruncate(fd, 64 * KIB)
        address = libc.map_shared(fd, 64 * KIB, writable=False)
        with pytest.raises(RegistrationError):
            device.register(address, 64 * KIB)
        if device.properties.read_only_registration:
            device.unregister(device.register(address, 64 * KIB, read_only=True))
        else:
            with pytest.raises(RegistrationError):
                device.register(address, 64 * KIB, read_only=True)
        libc.unmap(address, 64 * KIB)
        os.close(fd)

    def test_an_allocation_that_does_not_fit_is_refused_and_the_device_lives(self, device: Device) -> None:
        free = device.free_bytes()
        with pytest.raises(OutOfDeviceMemoryError):
            device.allocate(2 * device.properties.memory_bytes)
        with pytest.raises(UnfitError):
            device.allocate(0)
        device.free(device.allocate(KIB))
        assert device.free_bytes() <= free

    def test_memory_of_another_device_is_told(self, device: Device) -> None:
        made, host = device.allocate(KIB), aligned(KIB)
        device.check(made.address, KIB)
        device.check(made.address + 16, KIB - 16)
        with pytest.raises(WrongDeviceError):
            device.check(int(host.ctypes.data), KIB)
        device.free(made)

    # -- other processes ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("via", [Via.DESCRIPTOR, Via.IPC])
    @pytest.mark.parametrize("end", ["closes", "dies"])
    def test_another_process_opens_what_is_exported(self, device: Device, stream: Stream, via: Via, end: str) -> None:
        """And may die with it."""
        if via not in device.properties.shares:
            pytest.skip(f"this device shares nothing by {via}")
        made, host = device.allocate(64 * KIB, via), Host(device, 64 * KIB)
        host.bytes[:] = np.random.default_rng(2).integers(0, 200, 64 * KIB, dtype=np.uint8)
        stream.copy(Direction.TO_DEVICE, [(made.address, host.address, 64 * KIB)])
        stream.synchronize()
        handle = device.export(made.address + 4 * KIB, 8 * KIB)
        before = host.bytes.copy()
        found = self.child(handle, end)
        assert found.stdout.split() == [str(int(before[4 * KIB : 12 * KIB].sum(dtype=np.int64)))], found.stderr
        stream.copy(Direction.TO_HOST, [(host.address, made.address, 64 * KIB)])
        stream.synchronize()
        before[4 * KIB : 12 * KIB] += 1  # as the other one did
        assert np.array_equal(host.bytes, before)
        device.free(made)

    def child(self, handle: Handle, end: str = "closes") -> "subprocess.CompletedProcess[str]":
        command = [
            sys.executable, "-m", "tests.device_child", self.kind, handle.via, str(handle.length), str(handle.offset),
            str(handle.whole_bytes), handle.text.hex(), str(handle.fd), end,
        ]  # fmt: skip
        passed = [handle.fd] if handle.fd >= 0 else []
        try:
            return subprocess.run(
                command, cwd=ROOT, pass_fds=passed, capture_output=True, text=True, check=False, timeout=60
            )
        finally:
            if handle.fd >= 0:
                os.close(handle.fd)

    def test_handles_that_cannot_be_opened_are_told(self, device: Device) -> None:
        identity, page = device.properties.identity, 4 * KIB
        damaged = Handle(Via.IPC, identity, page, 0, page, b"\xff" * 64)
        for handle in (
            damaged,
            Handle(Via.IPC, identity, page, 0, page, b"short"),
            Handle(Via.NOTHING, identity, page, 0, page),
            Handle(Via.DESCRIPTOR, identity, page, 0, page, fd=-1),
            Handle(Via.DESCRIPTOR, identity, page, 1, page, fd=0),
        ):
            with pytest.raises(HandleError):
                device.open(handle)
        with pytest.raises(WrongDeviceError):
            device.open(Handle(Via.IPC, "0" * 32, page, 0, page, damaged.text))
        with pytest.raises((HandleError, WrongDeviceError)):
            device.export(int(aligned(KIB).ctypes.data), KIB)

    # -- kernels ---------------------------------------------------------------------------------------------------

    def test_an_unknown_kernel_and_impossible_shapes_are_told(self, device: Device, stream: Stream) -> None:
        with pytest.raises(UnfitError):
            stream.launch("no_such_kernel", 1, 32)
        for grid, block in ((0, 32), (1, 0), (1, 33), (1, 2048)):
            with pytest.raises(UnfitError):
                stream.launch("move_pieces", grid, block, *(ctypes.c_uint64(0),) * 3)

    @pytest.mark.parametrize("engine", Engine)
    @pytest.mark.parametrize("direction", Direction)
    def test_every_engine_moves_the_same_bytes(
        self, device: Device, stream: Stream, tables: Tables, engine: Engine, direction: Direction
    ) -> None:
        here, there = device.allocate(256 * KIB), device.allocate(256 * KIB)
        source, target = Host(device, 256 * KIB), Host(device, 256 * KIB)
        source.bytes[:] = np.random.default_rng(3).integers(0, 256, 256 * KIB, dtype=np.uint8)
        pieces = [(0, 16), (64, 48), (4096, 4096), (20480, 70000), (131072, 12288)]  # place, length
        order = np.random.default_rng(4).permutation(len(pieces))
        wanted = np.zeros(256 * KIB, np.uint8)
        moves: list[Move] = []
        at = 0
        for number in order:
            place, length = pieces[number]
            moves.append((at, place, length))
            wanted[at : at + length] = source.bytes[place : place + length]
            at += length + 32
        stream.copy(Direction.TO_DEVICE, [(here.address, target.address, 256 * KIB)])  # zeros
        stream.copy(Direction.TO_DEVICE, [(there.address, source.address, 256 * KIB)])
        left, right = {
            Direction.TO_DEVICE: (here.address, source.address),
            Direction.TO_HOST: (target.address, there.address),
            Direction.ON_DEVICE: (here.address, there.address),
        }[direction]
        engines = Engines(device, tables)
        engines.copy_by(engine, stream, direction, [(left + to, right + of, length) for to, of, length in moves])
        if direction is not Direction.TO_HOST:
            stream.copy(Direction.TO_HOST, [(target.address, here.address, 256 * KIB)])
        stream.synchronize()
        assert np.array_equal(target.bytes, wanted)
        assert not np.array_equal(target.bytes, source.bytes)
        assert engines._kernels, "the kernel was given up"
        device.free(here)
        device.free(there)

    def test_a_kernel_is_chosen_for_what_it_can_take_only(self, device: Device, stream: Stream, tables: Tables) -> None:
        made, source, target = device.allocate(64 * KIB), Host(device, 64 * KIB), Host(device, 64 * KIB)
        source.bytes[:] = np.random.default_rng(5).integers(0, 256, 64 * KIB, dtype=np.uint8)
        always = Crossover({each: dict.fromkeys(SIZES, Engine.KERNEL) for each in Direction}, {})
        engines = Engines(device, tables, always)
        odd = [(made.address + 3, source.address + 5, 1001), (made.address + 5000, source.address + 9000, 77)]
        engines.copy(stream, Direction.TO_DEVICE, odd)
        engines.copy(stream, Direction.TO_HOST, [(target.address, made.address, 64 * KIB)])
        stream.synchronize()
        assert np.array_equal(target.bytes[3:1004], source.bytes[5:1006])
        assert np.array_equal(target.bytes[5000:5077], source.bytes[9000:9077])
        with pytest.raises((NotRegisteredError, WrongDeviceError)):
            engines.copy(stream, Direction.TO_DEVICE, [(made.address, int(aligned(KIB).ctypes.data), KIB)])
        device.free(made)

    # -- an engine's pages -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ids", [[], [5], [6, 0, 3, 1], list(range(7))])
    def test_blocks_go_out_of_pages_and_back(
        self, device: Device, stream: Stream, tables: Tables, ids: list[int]
    ) -> None:
        engine = EngineMemory(device, stream, layers=3, blocks=7, page_bytes=4112)
        room = Host(device, max(1, len(ids)) * 12352)
        paged = Paged(device, tables)
        where = device.reach(room.address, room.bytes.size)
        paged.gather(stream, engine.pages, ids, where, 12352).event.wait()
        blocks = room.bytes.reshape(-1, 12352)
        for number, page in enumerate(ids):
            assert np.array_equal(blocks[number, :12336], engine.block(page))
            assert not blocks[number, 12336:].any(), "written behind a block"
        blocks[:, :12336] ^= 0xFF
        paged.scatter(stream, engine.pages, ids, where, 12352).event.wait()
        after = engine.read(stream)
        for page in range(7):
            changed = np.uint8(0xFF if page in ids else 0)
            assert np.array_equal(engine.block(page, after), engine.block(page) ^ changed)
        engine.close()

    @pytest.mark.parametrize("encoding", Encoding)
    def test_encoded_blocks_are_those_of_the_reference(
        self, device: Device, stream: Stream, tables: Tables, encoding: Encoding
    ) -> None:
        values = as_bf16(shapes_of_values()["channels of many scales"])[: 2 * 4096]
        engine = EngineMemory(device, stream, layers=2, blocks=4, page_bytes=values.size)
        for page in range(4):
            engine.fill(stream, page, np.roll(values, 100 * page).view(np.uint8))
        size = encoded_bytes(encoding, values.size, ROW)
        stride = (size + 79) // 16 * 16
        room, paged, ids = Host(device, 3 * stride), Paged(device, tables), [2, 0, 3]
        where = device.reach(room.address, room.bytes.size)
        assert paged.encode(stream, encoding, engine.pages, ids, where, stride, row=ROW, half=False).failed() == []
        wanted, back = np.zeros(size, np.uint8), np.zeros(values.size, np.uint16)
        for number, page in enumerate(ids):
            assert encodings.encode(encoding, np.roll(values, 100 * page), wanted, ROW, half=False)
            assert np.array_equal(room.bytes[number * stride :][:size], wanted)
            assert not np.array_equal(room.bytes[(number + 1) % 3 * stride :][:size], wanted), "all blocks are alike"
        assert (
            paged.decode(stream, encoding, engine.pages, [1, 0, 2], where, stride, row=ROW, half=False).failed() == []
        )
        after = engine.read(stream)
        for number, page in enumerate([1, 0, 2]):
            encodings.decode(encoding, room.bytes[number * stride :][:size].copy(), back, ROW, half=False)
            assert np.array_equal(engine.block(page, after).view(np.uint16), back)
        engine.close()

    @pytest.mark.parametrize("odd", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "minus inf"])
    @pytest.mark.parametrize("encoding", Encoding)
    def test_what_is_not_finite_is_told_or_comes_back(
        self, device: Device, stream: Stream, tables: Tables, encoding: Encoding, odd: int
    ) -> None:
        values = as_bf16(shapes_of_values()["normal"])[:4096].copy()
        engine = EngineMemory(device, stream, layers=2, blocks=3, page_bytes=4096)
        for page in range(3):
            engine.fill(stream, page, values.view(np.uint8))
        values[777] = odd
        engine.fill(stream, 1, values.view(np.uint8))
        stride = (encoded_bytes(encoding, 4096, ROW) + 15) // 16 * 16
        room, paged = Host(device, 3 * stride), Paged(device, tables)
        where = device.reach(room.address, room.bytes.size)
        batch = paged.encode(stream, encoding, engine.pages, [0, 1, 2], where, stride, row=ROW, half=False)
        if not encoding.is_lossless:
            assert batch.failed() == [1]
            return
        assert batch.failed() == []
        assert (
            paged.decode(stream, encoding, engine.pages, [0], where + stride, stride, row=ROW, half=False).failed()
            == []
        )
        assert np.array_equal(engine.block(0, engine.read(stream)).view(np.uint16), values)
        engine.close()

    def test_damaged_blocks_are_told(self, device: Device, stream: Stream, tables: Tables) -> None:
        engine = EngineMemory(device, stream, layers=2, blocks=2, page_bytes=4096)
        size = encoded_bytes(Encoding.BF16_FIXED, 4096, 8)
        room, paged = Host(device, 2 * (size + 12)), Paged(device, tables)
        where = device.reach(room.address, room.bytes.size)
        room.bytes[size - 196 : size - 192] = 0xFF  # so many escapes
        batch = paged.decode(
            stream, Encoding.BF16_FIXED, engine.pages, [0, 1], where, size + 12, row=8, half=False
        )  # fmt: skip
        assert batch.failed() == [0]
        engine.close()

    def test_what_kernels_cannot_take_is_told(self, device: Device, stream: Stream, tables: Tables) -> None:
        engine = EngineMemory(device, stream, layers=2, blocks=3, page_bytes=4112)
        room, paged, block = Host(device, 64 * KIB), Paged(device, tables), 8224
        where = device.reach(room.address, 64 * KIB)
        for ids, address, stride in (
            ([3], where, block), ([-1], where, block), ([0], where + 8, block), ([0], where, block + 8),
            ([0], where, block - 16), ([1 << 40], where, block),
        ):  # fmt: skip
            with pytest.raises(UnfitError):
                paged.gather(stream, engine.pages, ids, address, stride)
            with pytest.raises(UnfitError):
                paged.scatter(stream, engine.pages, ids, address, stride)
        for encoding, row, half, kind in (
            (Encoding.INT8, 4112, False, UnfitError),  # a row would lie in two pieces
            (Encoding.INT8, 128, False, EncodingError),
            (Encoding.INT8, 257, False, UnfitError),
            (Encoding.FP8, 0, False, EncodingError),
            (Encoding.INT4_G64, 128, False, EncodingError),
            (Encoding.BF16_FIXED, 8, True, EncodingError),
        ):
            with pytest.raises(kind):
                paged.encode(stream, encoding, engine.pages, [0], where, 16 * KIB, row=row, half=half)
        engine.close()

    def test_a_hundred_thousand_blocks_in_one_batch(self, device: Device, stream: Stream, tables: Tables) -> None:
        count, page_bytes = 100_000, 16
        engine = EngineMemory(device, stream, layers=2, blocks=count, page_bytes=page_bytes, apart_bytes=0)
        ids = np.random.default_rng(6).permutation(count)
        room, paged = Host(device, count * 32), Paged(device, tables)
        where = device.reach(room.address, count * 32)
        paged.gather(stream, engine.pages, ids.tolist(), where, 32).event.wait()
        before = engine.all().reshape(2, count, page_bytes)
        assert np.array_equal(room.bytes.reshape(count, 2, page_bytes), before[:, ids].transpose(1, 0, 2))
        assert not np.array_equal(room.bytes.reshape(count, 2, page_bytes), before.transpose(1, 0, 2))
        others = np.roll(ids, 1)  # so that each block goes where another one came from
        paged.scatter(stream, engine.pages, others.tolist(), where, 32).event.wait()
        after = engine.read(stream).reshape(2, count, page_bytes)
        assert np.array_equal(after[:, others], before[:, ids])
        assert not np.array_equal(after, before)
        engine.close()

    # -- registered or not -------------------------------------------------------------------------------------------

    def test_unregistered_memory_goes_through_the_bounce_buffer(
        self, device: Device, stream: Stream, tables: Tables
    ) -> None:
        length = 300 * KIB
        made, pins = device.allocate(length), Pins(device)
        copier = Copier(device, Engines(device, tables), pins, slots=2, slot_bytes=16 * KIB)
        source, target = aligned(length), aligned(length)
        source[:] = np.random.default_rng(7).integers(0, 256, source.size, dtype=np.uint8)
        here, there = int(source.ctypes.data), int(target.ctypes.data)
        places = [(0, 5), (100, 70_000), (100_000, 33), (150_016, 149_984), (99_000, 900)]
        target[:] = 0
        copier.to_device(stream, [(made.address + at, here + at, size) for at, size in places]).wait()
        copier.to_host(stream, [(there + at, made.address + at, size) for at, size in places]).wait()
        wanted = np.zeros(source.size, np.uint8)
        for at, size in places:
            wanted[at : at + size] = source[at : at + size]
        assert np.array_equal(target, wanted)
        assert not np.array_equal(target, source)
        moved = 2 * sum(size for _, size in places)
        assert (copier.direct_bytes, copier.bounced_bytes) == (0, moved)
        pins.want(here, source.size)
        pins.settle()
        copier.to_device(stream, [(made.address, here, length)]).wait()
        assert (copier.direct_bytes, copier.bounced_bytes) == (length, moved)
        target[:] = 0
        copier.to_host(stream, [(there, made.address, length)]).wait()
        assert np.array_equal(target[:length], source[:length])
        copier.close()
        pins.close()
        device.free(made)


def test_neighbours_are_one_move() -> None:
    """Of the engines; needs no device."""
    assert merged([(0, 100, 5), (5, 105, 3), (8, 109, 1), (20, 30, 0), (9, 110, 2)]) == [(0, 100, 8), (8, 109, 3)]
