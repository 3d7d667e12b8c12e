"""Arenas are registered in the background: nobody who copies waits for it."""

import os
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from kvkernels import libc
from kvkernels.aligned import aligned
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulation import Emulation
from kvkernels.device.engines import Engines
from kvkernels.device.pinning import Copier, Pins, State, loads
from kvkernels.device.port import RegistrationError
from kvkernels.device.tables import Tables

ARENA = 80 << 10  # no buffer is as large


def hold(gate: threading.Event) -> None:
    assert gate.wait(30)


class Slow:
    """A driver that registers arenas when it is told to. Small buffers are no arenas."""

    def __init__(self) -> None:
        self.allow = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)

    def __call__(self, length: int) -> None:
        if length == ARENA:
            self.begun.release()
            assert self.allow.acquire(timeout=30)


class World:
    """A device with arenas of host memory."""

    def __init__(self, arenas: int) -> None:
        self.slow = Slow()
        self.device = Emulation(registering=self.slow)
        self.pins = Pins(self.device)
        self.stream: EmulatedStream = self.device.stream()
        self.tables = Tables(self.device)
        self.copier = Copier(self.device, Engines(self.device, self.tables), self.pins, slots=2, slot_bytes=12 << 10)
        self.arenas = [aligned(ARENA) for _ in range(arenas)]
        for number, arena in enumerate(self.arenas):
            arena[:] = np.random.default_rng(number).integers(0, 256, ARENA, dtype=np.uint8)
        self.target = self.device.allocate(arenas * ARENA)

    def address(self, number: int) -> int:
        return int(self.arenas[number].ctypes.data)

    def fetch(self, number: int) -> None:
        """All of an arena to the device."""
        target = self.target.address + number * ARENA
        self.copier.to_device(self.stream, [(target, self.address(number), ARENA)]).wait()
        assert np.array_equal(libc.bytes_at(target, ARENA), self.arenas[number])


@pytest.fixture
def world() -> Iterator[World]:
    made = World(3)
    yield made
    for _ in range(9):
        made.slow.allow.release()
    made.copier.close()
    made.pins.close()
    made.stream.close()
    made.tables.close()


def test_the_first_fetch_waits_for_no_registration(world: World) -> None:
    pins, copier = world.pins, world.copier
    assert [pins.want(world.address(number), ARENA) for number in range(3)] == [State.WAITING] * 3
    assert world.slow.begun.acquire(timeout=30)  # the first is being registered, and takes its time
    for number in range(3):
        world.fetch(number)
    assert (copier.direct_bytes, copier.bounced_bytes) == (0, 3 * ARENA)
    world.slow.allow.release()
    assert world.slow.begun.acquire(timeout=30)  # the second: so the first is done
    assert pins.is_ready(world.address(0), ARENA)
    assert not pins.is_ready(world.address(1), ARENA)
    for number in range(3):
        world.fetch(number)
    assert (copier.direct_bytes, copier.bounced_bytes) == (ARENA, 5 * ARENA)
    world.slow.allow.release(2)
    pins.settle()
    for number in range(3):
        world.fetch(number)
    assert (copier.direct_bytes, copier.bounced_bytes) == (4 * ARENA, 5 * ARENA)
    assert pins.want(world.address(1) + 4096, 4096) is State.READY


def test_one_that_is_forgotten_is_not_registered(world: World) -> None:
    for number in range(3):
        world.pins.want(world.address(number), ARENA)
    assert world.slow.begun.acquire(timeout=30)
    world.pins.forget(world.address(2))  # in line: at once
    world.pins.forget(1234)  # never heard of
    forgetting = threading.Thread(target=world.pins.forget, args=(world.address(0),))
    forgetting.start()  # under way: waits, since it may be unmapped afterwards
    assert forgetting.is_alive()
    world.slow.allow.release(2)
    forgetting.join()
    world.pins.settle()
    assert [world.pins.is_ready(world.address(number), ARENA) for number in range(3)] == [False, True, False]
    world.device.register(world.address(0), 4096)  # it is free again
    world.fetch(0)


def test_what_cannot_be_registered_goes_through_the_buffer_for_good(world: World) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, ARENA)
    address = libc.map_shared(fd, ARENA, writable=False)
    world.slow.allow.release()
    assert world.pins.want(address, ARENA, read_only=True) is State.REFUSED  # the device says so beforehand
    assert world.pins.want(address, ARENA) is State.WAITING  # the driver will
    world.pins.settle()
    assert world.pins.want(address, ARENA) is State.REFUSED
    world.copier.to_device(world.stream, [(world.target.address, address, ARENA)]).wait()
    assert world.copier.bounced_bytes == ARENA
    assert not libc.bytes_at(world.target.address, ARENA).any()
    libc.unmap(address, ARENA)
    os.close(fd)


def test_what_is_gone_is_let_go_of(world: World) -> None:
    gone: set[object] = set()
    world.slow.allow.release(3)
    for number in range(3):
        world.pins.want(world.address(number), ARENA, owner=number)
    world.pins.settle()
    world.pins.forget_if(gone.__contains__)
    assert world.pins.is_ready(world.address(1), ARENA)
    gone.add(1)
    world.pins.forget_if(gone.__contains__)
    assert [world.pins.is_ready(world.address(number), ARENA) for number in range(3)] == [True, False, True]


def test_both_sides_of_the_buffer_are_busy_at_once(world: World) -> None:
    """While the device is held up, as many slots are filled as there are; to the host nothing is written too early."""
    gate = threading.Event()
    world.stream.submit(partial(hold, gate))
    moves = [(world.target.address + at, world.address(0) + at, 12 << 10) for at in (0, 12 << 10)]
    event = world.copier.to_device(world.stream, moves)  # two slots: returns without the device
    assert not event.done
    gate.set()
    event.wait()
    assert np.array_equal(libc.bytes_at(world.target.address, 24 << 10), world.arenas[0][: 24 << 10])
    world.copier.to_host(world.stream, [(world.address(1), world.target.address, 24 << 10)])
    assert np.array_equal(world.arenas[1][: 24 << 10], world.arenas[0][: 24 << 10])


def test_loads_are_packed_and_cut() -> None:
    packed = list(loads([(0, 1000, 5), (50, 2000, 40), (500, 3000, 70)], 64))
    assert packed == [[(0, 1000, 5, 0), (50, 2000, 40, 16)], [(500, 3000, 64, 0)], [(564, 3064, 6, 0)]]
    assert list(loads([], 64)) == []


def test_a_buffer_that_cannot_be_made_leaves_none_behind() -> None:
    asked: list[int] = []

    def second_fails(length: int) -> None:
        asked.append(length)
        if len(asked) == 2:
            raise RegistrationError("no more")

    device = Emulation(registering=second_fails)
    with pytest.raises(RegistrationError):
        Copier(device, Engines(device, Tables(device)), Pins(device), slots=2, slot_bytes=12 << 10)
    assert len(asked) == 2
    assert not device._registrations.all()
