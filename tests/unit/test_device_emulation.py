"""What the emulation shows beside the contract: work that really is behind, devices that get lost, strictness."""

import ctypes
import fcntl
import os
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from kvkernels.aligned import aligned
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulation import Emulation
from kvkernels.device.port import (
    EMULATION,
    DeviceLostError,
    Direction,
    Handle,
    HandleError,
    OutOfDeviceMemoryError,
    PagesArgument,
    UnfitError,
    Via,
    WrongDeviceError,
    place_of,
)

PAGE = 4096


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation(memory_bytes=64 * PAGE)
    yield made
    made.close()


@pytest.fixture
def stream(device: Emulation) -> Iterator[EmulatedStream]:
    made = device.stream()
    yield made
    made.close()


def hold(gate: threading.Event) -> None:
    assert gate.wait(30)


def registered(device: Emulation, length: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.uint8]], int]:
    memory = aligned(length)
    memory[:] = 0
    device.register(address := int(memory.ctypes.data), length)
    return memory, address


def test_it_calls_itself_an_emulation(device: Emulation) -> None:
    properties = device.properties
    assert (properties.name, properties.driver, properties.emulated) == (EMULATION, EMULATION, True)
    assert place_of(device) == EMULATION
    assert properties.identity == Emulation().properties.identity != Emulation(1).properties.identity


def test_nothing_is_copied_before_its_turn(device: Emulation, stream: EmulatedStream) -> None:
    made = device.allocate(PAGE)
    host, address = registered(device, PAGE)
    gate = threading.Event()
    stream.submit(partial(hold, gate))
    host[:] = 1
    stream.copy(Direction.TO_DEVICE, [(made.address, address, PAGE)])
    event = stream.record()
    host[:] = 2  # too early: the copy has not been made
    assert not event.done
    other = device.stream()
    other.record().wait()  # another stream is not held up
    other.wait(event)
    behind = other.record()
    assert not behind.done
    gate.set()
    behind.wait()
    assert event.done
    stream.copy(Direction.TO_HOST, [(address, made.address, PAGE)])
    stream.synchronize()
    assert (host == 2).all()
    other.close()


def test_memory_is_bounded_and_comes_back(device: Emulation) -> None:
    made = [device.allocate(16 * PAGE) for _ in range(4)]
    assert device.free_bytes() == 0
    with pytest.raises(OutOfDeviceMemoryError):
        device.allocate(1)
    device.free(made.pop())
    assert device.free_bytes() == 16 * PAGE
    device.allocate(10)
    with pytest.raises(WrongDeviceError):
        device.free(Emulation(1).allocate(PAGE))


def test_a_lost_device_says_so_to_everyone_and_nobody_hangs(device: Emulation, stream: EmulatedStream) -> None:
    made = device.allocate(PAGE)
    gate = threading.Event()
    stream.submit(partial(hold, gate))
    event = stream.record()
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            event.wait()
        except DeviceLostError as error:
            waiting.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    device.lose("it fell off the bus")
    gate.set()
    waiter.join()
    assert [str(error) for error in waiting] == ["it fell off the bus"]
    address = int(aligned(PAGE).ctypes.data)
    for attempt in (
        lambda: device.allocate(PAGE),
        device.stream,
        lambda: device.register(address, PAGE),
        lambda: stream.copy(Direction.ON_DEVICE, [(made.address, made.address, 16)]),
        lambda: event.done,
        stream.synchronize,
    ):
        with pytest.raises(DeviceLostError, match="bus"):
            attempt()


def test_copies_outside_of_allocations_are_found_out_before_a_byte_moves(
    device: Emulation, stream: EmulatedStream
) -> None:
    made = device.allocate(PAGE)
    for move in ((made.address + 16, made.address, PAGE), (made.address, 16, 16), (made.address - 1, made.address, 16)):
        with pytest.raises(WrongDeviceError):
            stream.copy(Direction.ON_DEVICE, [move])
    stream.copy(Direction.ON_DEVICE, [(made.address + PAGE // 2, made.address, PAGE // 2)])
    stream.synchronize()


@pytest.mark.parametrize("wrong", ["page", "block", "table"])
def test_a_kernel_that_reaches_too_far_loses_the_device(wrong: str) -> None:
    device = Emulation()
    stream, made = device.stream(), device.allocate(8 * PAGE)
    tables = {"bases": made.address, "strides": 16, "ids": 3}
    where = {name: made.address + PAGE + 16 * at for at, name in enumerate(tables)}
    host, address = registered(device, PAGE)
    for name, value in tables.items():
        host[:8].view(np.int64)[0] = value if wrong != "page" or name != "ids" else 1 << 40
        stream.copy(Direction.TO_DEVICE, [(where[name], address, 8)])
        stream.synchronize()
    if wrong == "table":
        where["strides"] = 4096
    blocks = ctypes.c_uint64(made.address + 2 * PAGE if wrong != "block" else 4096)
    argument = PagesArgument(where["bases"], where["strides"], where["ids"], 16, 1)
    stream.launch("gather_blocks", 1, 32, argument, blocks, ctypes.c_int64(16), ctypes.c_int64(1))
    with pytest.raises(DeviceLostError, match=f"gather_blocks: a {wrong} outside"):
        stream.synchronize()
    device.lost = ""  # the same without a mistake
    host[:8].view(np.int64)[0] = 3
    stream.copy(Direction.TO_DEVICE, [(where["ids"], address, 8)])
    argument = PagesArgument(where["bases"], made.address + PAGE + 16, where["ids"], 16, 1)
    blocks = ctypes.c_uint64(made.address + 2 * PAGE)
    stream.launch("gather_blocks", 1, 32, argument, blocks, ctypes.c_int64(16), ctypes.c_int64(1))
    stream.synchronize()
    device.close()


def test_a_kernel_that_begins_an_access_where_none_may_loses_the_device() -> None:
    device = Emulation()
    stream, made = device.stream(), device.allocate(PAGE)
    host, address = registered(device, PAGE)
    host[:24].view(np.int64)[:] = made.address + 1024, 64, 1  # base, stride, page
    argument = PagesArgument(address, address + 8, address + 16, 64, 1)
    for at in (0, 8):
        blocks = ctypes.c_uint64(made.address + 2048 + at)
        stream.launch("gather_blocks", 1, 32, argument, blocks, ctypes.c_int64(64), ctypes.c_int64(1))
        if not at:
            stream.synchronize()
            continue
        with pytest.raises(DeviceLostError, match="gather_blocks: 4 accesses to misaligned addresses"):
            stream.synchronize()
    device.lost = ""
    device.close()


def test_a_container_without_ipc_refuses_handles_and_takes_descriptors(device: Emulation) -> None:
    inside = Emulation(opens_ipc=False)
    by_ipc, by_descriptor = device.allocate(PAGE, Via.IPC), device.allocate(PAGE, Via.DESCRIPTOR)
    with pytest.raises(HandleError, match="share it as DESCRIPTOR"):
        inside.open(device.export(by_ipc.address, PAGE))
    handle = device.export(by_descriptor.address, PAGE)
    opened = inside.open(handle)
    os.close(handle.fd)
    assert opened.length == PAGE
    assert opened.address != by_descriptor.address
    inside.close()


def test_memory_that_its_owner_could_take_away_is_not_opened(device: Emulation) -> None:
    identity = device.properties.identity
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    handle = Handle(Via.DESCRIPTOR, identity, PAGE, 0, PAGE, fd=fd)
    with pytest.raises(HandleError, match="take away"):
        device.open(handle)
    fcntl.fcntl(fd, 1033, 7)
    for wrong in ((PAGE, 1), (2 * PAGE, 0), (0, 0), (PAGE, -1)):
        with pytest.raises(HandleError):
            device.open(Handle(Via.DESCRIPTOR, identity, wrong[0], wrong[1], PAGE, fd=fd))
    with pytest.raises(HandleError):
        device.open(Handle(Via.DESCRIPTOR, identity, PAGE, 0, 2 * PAGE, fd=fd))
    device.free(device.open(handle))
    os.close(fd)


def test_only_what_was_made_to_be_shared_is_exported(device: Emulation) -> None:
    for allocation in (device.allocate(PAGE), device.allocate(PAGE, Via.DESCRIPTOR)):
        if allocation.via is Via.NOTHING:
            with pytest.raises(HandleError):
                device.export(allocation.address, PAGE)
            continue
        with pytest.raises(HandleError):
            device.export(allocation.address + 1, PAGE)
        handle = device.export(allocation.address + 1, PAGE - 1)
        assert (handle.offset, handle.length, handle.whole_bytes) == (1, PAGE - 1, PAGE)
        opened = device.open(handle)
        os.close(handle.fd)
        with pytest.raises(HandleError):  # that is its owner's to do
            device.export(opened.address, 16)


def test_the_exporter_may_go_while_the_memory_is_open(device: Emulation) -> None:
    with pytest.raises(UnfitError):
        device.allocate(-1)
    owner, host = Emulation(), registered(device, PAGE)
    made = owner.allocate(PAGE, Via.DESCRIPTOR)
    handle = owner.export(made.address, PAGE)
    opened = device.open(handle)
    os.close(handle.fd)
    owner.close()
    stream = device.stream()
    host[0][:] = 9
    stream.copy(Direction.TO_DEVICE, [(opened.address, host[1], PAGE)])
    host[0][:] = 0
    stream.synchronize()
    stream.copy(Direction.TO_HOST, [(host[1], opened.address, PAGE)])
    stream.synchronize()
    assert host[0][0] in (0, 9)
    stream.close()


def test_a_dropped_stream_ends_its_thread(device: Emulation) -> None:
    stream = device.stream()
    thread = stream._thread
    del stream
    thread.join()
