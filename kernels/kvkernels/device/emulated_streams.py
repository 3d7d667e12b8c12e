"""Streams of the emulation: threads that do what they are asked, in order, behind who asks."""

import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from kvkernels import libc
from kvkernels.device import emulated_kernels
from kvkernels.device.port import EMULATION, WARP, Argument, Direction, Event, Move, UnfitError

if TYPE_CHECKING:
    from kvkernels.device.emulation import Emulation

THREADS_PER_BLOCK: Final = 1024
Work: TypeAlias = "queue.SimpleQueue[Callable[[], None] | EmulatedEvent | None]"
_numbers: Final = count(1)


class EmulatedEvent:
    """See `port.Event`."""

    def __init__(self, device: "Emulation") -> None:
        self._device = device
        self.passed = threading.Event()

    @property
    def done(self) -> bool:
        """See `port.Event`."""
        self._device.check_alive()
        return self.passed.is_set()

    def wait(self) -> None:
        """See `port.Event`."""
        self.passed.wait()
        self._device.check_alive()


class EmulatedStream:
    """See `port.Stream`. A thread does the work, in order; it ends with `close`."""

    def __init__(self, device: "Emulation") -> None:
        self._device = device
        self._work: Work = queue.SimpleQueue()
        self._handle = next(_numbers)
        self._thread = threading.Thread(target=_work_off, args=(device, self._work), name=EMULATION, daemon=True)
        self._thread.start()
        self._ending = weakref.finalize(self, self._work.put, None)

    @property
    def handle(self) -> int:
        """See `port.Stream`."""
        return self._handle

    def submit(self, work: Callable[[], None]) -> None:
        """Anything, in order: how a test holds a stream up. What it raises loses the device."""
        self._device.check_alive()
        self._work.put(work)

    def copy(self, direction: Direction, moves: Sequence[Move]) -> None:
        """See `port.Stream`."""
        moves = list(moves)
        self._device.check_moves(direction, moves)
        self.submit(partial(_copy, moves))

    copy_batch = copy

    def launch(self, name: str, grid: int, block: int, *arguments: Argument) -> None:
        """See `port.Stream`."""
        if grid < 1 or block < WARP or block > THREADS_PER_BLOCK or block % WARP:
            raise UnfitError(f"{name} in {grid} blocks of {block} threads")
        kernel = emulated_kernels.find(name)
        self.submit(partial(kernel, self._device.holds, grid, block, arguments))

    def record(self) -> EmulatedEvent:
        """See `port.Stream`."""
        event = EmulatedEvent(self._device)
        self._work.put(event)
        return event

    def wait(self, event: Event) -> None:
        """See `port.Stream`."""
        assert isinstance(event, EmulatedEvent), "an event of another kind of device"
        self._work.put(partial(_wait, event))

    def synchronize(self) -> None:
        """See `port.Stream`."""
        self.record().wait()

    def close(self) -> None:
        """See `port.Stream`."""
        self._ending()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._device.forget(self)


def _work_off(device: "Emulation", work: Work) -> None:
    while (step := work.get()) is not None:
        if isinstance(step, EmulatedEvent):
            step.passed.set()  # on a lost device, too: so whoever waits hears of it
        elif not device.lost:
            try:
                step()
            except Exception as error:  # noqa: BLE001  # a thread of its own: whoever waits next is told
                device.lose(str(error))


def _wait(event: EmulatedEvent) -> None:
    event.passed.wait()


def _copy(moves: Iterable[Move]) -> None:
    for target, source, length in moves:
        if length:
            np.copyto(libc.bytes_at(target, length), libc.bytes_at(source, length))
