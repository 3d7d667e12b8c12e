"""Host memory that a GPU reaches: arenas registered in the background, and a bounce buffer meanwhile.

Registering takes 0.1 to 0.3 s a GiB and must not stand before a fetch. So what is wanted is put in line, one thread
registers arena after arena, and what is not registered yet (or never will be: a map for reading only on most GPUs) goes
through a small buffer that is, with one more copy by the processor.

    Pins     which memory is registered, is to be, or cannot be
    Bounce   a few slots of registered memory, filled by one side while the other empties the one before
    Copier   copies between host and device, each move the best way that there is right now
"""

import ctypes
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from enum import Enum
from typing import Final

from kvkernels import libc
from kvkernels.aligned import aligned
from kvkernels.device.engines import Engines, merged
from kvkernels.device.port import Device, DeviceError, DeviceLostError, Direction, Event, Move, Registration, Stream
from kvkernels.device.ranges import Ranges

BOUNCE_SLOTS: Final = 4
BOUNCE_SLOT_BYTES: Final = 4 << 20
SMALL_MANY: Final = 4  # pieces from which on the kernel of the host copies them in one call
_log = logging.getLogger(__name__)


class State(Enum):
    """Of host memory that was wanted."""

    WAITING = "waiting"
    READY = "ready"
    REFUSED = "refused"


class _Wanted:
    def __init__(self, address: int, length: int, owner: object, *, read_only: bool) -> None:
        self.address, self.length, self.read_only = address, length, read_only
        self.owner = owner  # stays mapped as long as it is registered
        self.state = State.WAITING
        self.given_up = False
        self.registration: Registration | None = None


class Pins:
    """Registrations of one device. Any thread; none of these waits for a registration but `forget` and `settle`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._changed = threading.Condition()
        self._ranges: Ranges[_Wanted] = Ranges()
        self._line: list[_Wanted] = []
        self._busy: _Wanted | None = None
        self._running = False

    def want(self, address: int, length: int, owner: object = None, *, read_only: bool = False) -> State:
        """Have this memory registered as soon as can be; how far that is. Once said is enough."""
        found = self._ranges.find(address, length)
        if found is not None:
            return found.state
        wanted = _Wanted(address, length, owner, read_only=read_only)
        if read_only and not self._device.properties.read_only_registration:
            return State.REFUSED
        with self._changed:
            if not self._ranges.add(address, length, wanted):
                return State.REFUSED  # some of it is already something else
            self._line.append(wanted)
            if not self._running:
                self._running = True
                threading.Thread(target=self._register_all, name="device-pins", daemon=True).start()
        return wanted.state

    def is_ready(self, address: int, length: int) -> bool:
        """May the device reach all of it by itself?"""
        found = self._ranges.find(address, length)
        return found is not None and found.state is State.READY

    def forget(self, address: int) -> None:
        """Let go of what begins there, before it is unmapped. Waits if it is just being registered.

        No copy of it may be under way.
        """
        with self._changed:
            wanted = self._ranges.remove(address)
            if wanted is None:
                return
            wanted.given_up = True
            if wanted in self._line:
                self._line.remove(wanted)
            self._changed.wait_for(lambda: self._busy is not wanted)
            registration, wanted.registration = wanted.registration, None
        if registration is not None:
            with suppress(DeviceLostError):
                self._device.unregister(registration)
        wanted.owner = None

    def forget_if(self, gone: Callable[[object], bool]) -> None:
        """Let go of all whose owners are gone, except what is just being registered."""
        for wanted in self._ranges.all():
            if wanted.state is not State.WAITING and gone(wanted.owner):
                self.forget(wanted.address)

    def owners(self) -> list[object]:
        """Of all that was wanted."""
        return [wanted.owner for wanted in self._ranges.all()]

    def settle(self) -> None:
        """Wait until nothing is in line."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running)

    def close(self) -> None:
        """Let go of everything."""
        with self._changed:
            self._line.clear()
        for wanted in self._ranges.all():
            self.forget(wanted.address)

    def _register_all(self) -> None:
        while True:
            with self._changed:
                self._busy = self._line.pop(0) if self._line else None
                if self._busy is None:
                    self._running = False
                    self._changed.notify_all()
                    return
                wanted = self._busy
            try:
                registration = self._device.register(wanted.address, wanted.length, read_only=wanted.read_only)
            except DeviceError as error:
                registration = None
                _log.warning("%d bytes stay unregistered: %s", wanted.length, error)
            with self._changed:
                wanted.registration = registration
                wanted.state = State.READY if registration is not None else State.REFUSED
                self._busy = None
                self._changed.notify_all()


class _Slot:
    def __init__(self, address: int) -> None:
        self.address = address
        self.event: Event | None = None

    def free(self) -> None:
        if self.event is not None:
            self.event.wait()
            self.event = None


class Bounce:
    """Slots of registered memory. Whoever copies has them all to himself: see `Copier`."""

    def __init__(self, device: Device, slots: int = BOUNCE_SLOTS, slot_bytes: int = BOUNCE_SLOT_BYTES) -> None:
        self._device = device
        self._memory = aligned(slots * slot_bytes)
        first = int(self._memory.ctypes.data)
        self._registration = device.register(first, slots * slot_bytes)
        self.slot_bytes = slot_bytes
        self.slots = [_Slot(first + number * slot_bytes) for number in range(slots)]
        self.lock = threading.Lock()

    def close(self) -> None:
        """Wait for the copies under way, and give it up."""
        with self.lock, suppress(DeviceLostError):
            for slot in self.slots:
                slot.free()
            self._device.unregister(self._registration)


class Copier:
    """Between host memory, registered or not, and a device. Any thread, each with a stream of its own."""

    def __init__(
        self, device: Device, engines: Engines, pins: Pins, *,
        slots: int = BOUNCE_SLOTS, slot_bytes: int = BOUNCE_SLOT_BYTES,
    ) -> None:  # fmt: skip
        self._engines = engines
        self._pins = pins
        self._bounces: dict[Direction, Bounce] = {}
        with ExitStack() as undo:  # memory is not freed while it is registered
            for each in (Direction.TO_DEVICE, Direction.TO_HOST):
                self._bounces[each] = Bounce(device, slots, slot_bytes)
                undo.callback(self._bounces[each].close)
            undo.pop_all()
        self.direct_bytes = self.bounced_bytes = 0  # about: threads do not wait for each other to count

    def to_device(self, stream: Stream, moves: Sequence[Move]) -> Event:
        """Host to device; the event comes when all is there.

        Returns when everything is in the stream: at once for registered sources, which stay as they are until the
        event; of the others, when the processor has read the last of them.
        """
        direct, bounced = self._sort(moves, 1)
        self._engines.copy(stream, Direction.TO_DEVICE, direct)
        bounce = self._bounces[Direction.TO_DEVICE]
        with bounce.lock:
            for number, load in enumerate(loads(bounced, bounce.slot_bytes)):
                slot = bounce.slots[number % len(bounce.slots)]
                slot.free()
                copy_host([(slot.address + at, source, length) for _, source, length, at in load])
                moves = [(target, slot.address + at, length) for target, _, length, at in load]
                self._engines.copy(stream, Direction.TO_DEVICE, moves)
                slot.event = stream.record()
        return stream.record()

    def to_host(self, stream: Stream, moves: Sequence[Move]) -> Event:
        """Device to host; the event comes when all is there.

        Returns at once where all targets are registered; else when the processor has written the last that is not.
        """
        direct, bounced = self._sort(moves, 0)
        self._engines.copy(stream, Direction.TO_HOST, direct)
        bounce = self._bounces[Direction.TO_HOST]
        with bounce.lock:
            waiting: list[tuple[_Slot, list[Move]]] = []
            for number, load in enumerate(loads(bounced, bounce.slot_bytes)):
                if len(waiting) == len(bounce.slots):
                    _empty(*waiting.pop(0))
                slot = bounce.slots[number % len(bounce.slots)]
                moves = [(slot.address + at, source, length) for _, source, length, at in load]
                self._engines.copy(stream, Direction.TO_HOST, moves)
                slot.event = stream.record()
                waiting.append((slot, [(target, slot.address + at, length) for target, _, length, at in load]))
            for slot, rest in waiting:
                _empty(slot, rest)
        return stream.record()

    def close(self) -> None:
        """Wait for what is under way, and give the buffers up."""
        for bounce in self._bounces.values():
            bounce.close()

    def _sort(self, moves: Sequence[Move], side: int) -> tuple[list[Move], list[Move]]:
        direct: list[Move] = []
        bounced: list[Move] = []
        for move in merged(moves):
            (direct if self._pins.is_ready(move[side], move[2]) else bounced).append(move)
        self.direct_bytes += sum(move[2] for move in direct)
        self.bounced_bytes += sum(move[2] for move in bounced)
        return direct, bounced


def _empty(slot: _Slot, moves: list[Move]) -> None:
    slot.free()
    copy_host(moves)


def loads(moves: Sequence[Move], slot_bytes: int) -> Iterator[list[tuple[int, int, int, int]]]:
    """Moves cut and packed into slots: (target, source, bytes, where in the slot)."""
    load: list[tuple[int, int, int, int]] = []
    at = 0
    for target, source, length in moves:
        done = 0
        while done < length:
            if at >= slot_bytes:
                yield load
                load, at = [], 0
            some = min(length - done, slot_bytes - at)
            load.append((target + done, source + done, some, at))
            done += some
            at = -(-(at + some) // 16) * 16
    if load:
        yield load


def copy_host(moves: list[Move]) -> None:
    """By the processor, other threads running."""
    if len(moves) < SMALL_MANY or not libc.copy_pieces(moves):
        for target, source, length in moves:
            ctypes.memmove(target, source, length)
