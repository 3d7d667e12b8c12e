"""Threads that copy between arenas and memory of engines on one device. They know no state but what they are given.

    owner thread  -- put(Opening | Filling | Saving | Closing) -->  a thread for each direction: a piece of each in turn
                  <-- take_done: what was done, in order --

A piece of work is at most `PIECE_BYTES` and `PIECE_MOVES`: after each somebody else has a turn, and a transfer that was
cancelled ends. A piece is in memory, or out of it, before it is reported: what is over writes nowhere any more.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import xxhash

from kvkernels.copyhash import Bytes
from kvkernels.device.engines import GUESS, SIZES, Crossover, Engine, Engines
from kvkernels.device.pages import Pages
from kvkernels.device.pinning import Copier, Pins
from kvkernels.device.port import Device, DeviceError, DeviceLostError, Direction, Move, Stream, place_of
from kvkernels.device.sharing import OpenedPages, SharedPages, open_pages
from kvkernels.device.tables import Tables
from kvstore.sessions import Ticket
from kvstore.tier.hbm import Copy, Hbm

PIECE_BYTES: Final = 32 << 20
PIECE_MOVES: Final = 4096
STOP_S: Final = 2.0
HUNG_S: Final = 10  # a piece takes some milliseconds
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Region:
    """An arena as a thread needs it."""

    address: int
    region_bytes: int


class Work(Protocol):
    """Something for one of the threads. `cancelled` is the owner's to set, at any time; all else is the thread's."""

    cancelled: bool
    error: DeviceError | None

    def step(self, threads: "DeviceThreads", stream: Stream) -> bool:
        """Do a piece of it; whether there is more. Raises DeviceError."""

    @property
    def direction(self) -> Direction:
        """Which thread's it is."""


@dataclass(slots=True, eq=False)
class Opening:
    """Memory that an engine has handed over. `opened` once it is over, unless there is an `error`."""

    shared: SharedPages
    opened: OpenedPages | None = None
    cancelled: bool = False
    error: DeviceError | None = None
    direction: Direction = Direction.TO_DEVICE

    def step(self, threads: "DeviceThreads", _stream: Stream) -> bool:
        """See `Work`."""
        self.opened = open_pages(threads.device, self.shared)
        return False


@dataclass(slots=True, eq=False)
class Closing:
    """Memory that nothing is copied into or out of any more."""

    opened: OpenedPages
    cancelled: bool = False
    error: DeviceError | None = None
    direction: Direction = Direction.TO_DEVICE

    def step(self, _threads: "DeviceThreads", _stream: Stream) -> bool:
        """See `Work`."""
        self.opened.close()
        return False


@dataclass(slots=True, eq=False)
class Filling:
    """A LOAD: blocks that lie at `sources` into `pages`, group of layers by group. `groups_done` is for the owner."""

    pages: Pages
    ids: Sequence[int]
    sources: Sequence[int]
    regions: Sequence[Region]  # those that the sources lie in
    groups: int
    near: Sequence[bool]  # which of the sources lie on the device
    cancelled: bool = False
    error: DeviceError | None = None
    groups_done: int = 0
    direction: Direction = Direction.TO_DEVICE
    _pieces: "Iterator[tuple[list[Move], list[Move], int]] | None" = None

    def step(self, threads: "DeviceThreads", stream: Stream) -> bool:
        """See `Work`."""
        if self._pieces is None:
            threads.want(self.regions)
            self._pieces = self._all()
        for far, near, group in self._pieces:
            threads.engines.copy(stream, Direction.ON_DEVICE, near)
            threads.copier.to_device(stream, far).wait()
            self.groups_done = group
            return True
        self.groups_done = self.groups
        return False

    def _all(self) -> "Iterator[tuple[list[Move], list[Move], int]]":
        """Moves from the host, moves on the device, and how many groups are wholly there when they are done."""
        pages, count, some, some_bytes = self.pages, len(self.pages.bases), 0, 0
        far: list[Move] = []
        near: list[Move] = []
        for group in range(self.groups):
            first, stop = group * count // self.groups, (group + 1) * count // self.groups
            for page, source, is_near in zip(self.ids, self.sources, self.near, strict=True):
                moves = near if is_near else far
                for piece in range(first, stop):
                    target = pages.bases[piece] + page * pages.strides[piece]
                    moves.append((target, source + piece * pages.piece_bytes, pages.piece_bytes))
                    some, some_bytes = some + 1, some_bytes + pages.piece_bytes
                    if some >= PIECE_MOVES or some_bytes >= PIECE_BYTES:
                        yield far, near, group
                        some = some_bytes = 0
                        far, near = [], []
                        moves = near if is_near else far
            if some:
                yield far, near, group + 1
                some = some_bytes = 0
                far, near = [], []


@dataclass(slots=True, eq=False)
class Promoting:
    """Blocks of DRAM into the tier on the device: (where it is to lie, where it lies), all of one size."""

    places: Sequence[tuple[int, int]]
    block_bytes: int
    regions: Sequence[Region]
    cancelled: bool = False
    error: DeviceError | None = None
    direction: Direction = Direction.TO_DEVICE
    _next: int = 0

    def step(self, threads: "DeviceThreads", stream: Stream) -> bool:
        """See `Work`."""
        if not self._next:
            threads.want(self.regions)
        some = self.places[self._next : self._next + max(1, PIECE_BYTES // self.block_bytes)]
        moves = [(target, source, self.block_bytes) for target, source in some]
        threads.copier.to_device(stream, moves).wait()
        self._next += len(some)
        return self._next < len(self.places)


@dataclass(slots=True, eq=False)
class Block:
    """One of a SAVE: from which page into which slot. `checksum` of what lies there then; None: not copied."""

    ticket: Ticket
    page: int
    target: Bytes
    checksum: int | None = None


@dataclass(slots=True, eq=False)
class Emptying:
    """A slice of a SAVE: pages into slots of arenas, and hashed there."""

    pages: Pages
    blocks: Sequence[Block]
    regions: Sequence[Region]
    cancelled: bool = False
    error: DeviceError | None = None
    direction: Direction = Direction.TO_HOST
    _next: int = 0

    def step(self, threads: "DeviceThreads", stream: Stream) -> bool:
        """See `Work`."""
        pages = self.pages
        if not self._next:
            threads.want(self.regions)
        most = max(1, min(PIECE_BYTES // pages.block_bytes, PIECE_MOVES // len(pages.bases)))
        some = self.blocks[self._next : self._next + most]
        targets = [int(block.target.ctypes.data) for block in some]
        moves = pages.moves_out([block.page for block in some], targets)
        threads.copier.to_host(stream, moves).wait()
        for block in some:
            block.checksum = xxhash.xxh3_64_intdigest(block.target)  # type: ignore[arg-type]  # has the buffer protocol
        self._next += len(some)
        return self._next < len(self.blocks)


@dataclass(slots=True, eq=False)
class Done:
    """A piece of work was done; `over`: all of it, or all that will be."""

    work: Work
    over: bool
    groups_done: int = 0  # of a Filling, when this was said


@dataclass(slots=True)
class Tally:
    """Since the start."""

    loads: int = 0
    saves: int = 0
    failed: int = 0  # of both, because of the device
    loaded_bytes: int = 0
    saved_bytes: int = 0


class DeviceThreads:
    """One device and the two threads that copy for it. `put`, `take_done` and `stop` on the owner thread."""

    def __init__(self, device: Device, wake: Callable[[], None]) -> None:
        """Raises DeviceError. `wake` is called on a thread whenever something is done."""
        self.device = device
        number = f":{device.properties.number}" if device.properties.emulated else ""
        self.name = place_of(device) + number
        self.lost = ""  # why it does nothing any more
        self._wake = wake
        self.hbm: Hbm | None = None  # the owner's
        self.tally = Tally()  # the owner's
        self._hbm_address = 0
        self._tables = Tables(device)
        self._pins = Pins(device)
        # Nothing is measured here: it would take memory of the GPU, and a second of a link that engines are using.
        self.engines = Engines(device, self._tables, _for_emulation() if device.properties.emulated else GUESS)
        self.copier = Copier(device, self.engines, self._pins)
        self._done: deque[Done] = deque()
        self._lines = {each: _Line(self, each) for each in (Direction.TO_DEVICE, Direction.TO_HOST)}

    def make_hbm(self, hbm_bytes: int) -> None:
        """Take memory for copies of blocks, before `start`. Raises DeviceError."""
        self._hbm_address = self.device.allocate(hbm_bytes).address
        self.hbm = Hbm(hbm_bytes)

    @property
    def tier(self) -> Hbm | None:
        """The tier in its memory; None where there is none, or none any more."""
        return None if self.lost else self.hbm

    def hbm_address(self, copy: Copy) -> int:
        """Where a copy lies."""
        return self._hbm_address + copy.offset

    def start(self) -> None:
        """Start the threads. Raises DeviceError."""
        for line in self._lines.values():
            line.start(self.device.stream())

    def put(self, work: Work) -> None:
        """Have this done, beside what else there is to do in its direction."""
        self._lines[work.direction].put(work)

    def hangs(self) -> bool:
        """Has a piece of work been under way for far too long?"""
        since = [line.since_ns for line in self._lines.values()]  # a thread may set one to 0 at any time
        return any(each and time.monotonic_ns() - each > HUNG_S * 10**9 for each in since)

    def take_done(self) -> list[Done]:
        """What was done since."""
        done: list[Done] = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def unmapping(self, address: int) -> None:
        """An arena will not be there any more; nothing of it is being copied. Any thread; may wait a little."""
        with suppress(DeviceError):
            self._pins.forget(address)

    def stop(self) -> None:
        """Begin nothing new. A device that hangs keeps its thread."""
        for line in self._lines.values():
            line.stop()

    # -- on the threads --------------------------------------------------------------------------------------------

    def want(self, regions: Sequence[Region]) -> None:
        """Have these registered by the time that they are copied again."""
        for region in regions:
            self._pins.want(region.address, region.region_bytes)

    def report(self, done: Done) -> None:
        """For the owner."""
        self._done.append(done)
        self._wake()

    def check(self) -> None:
        """Raises DeviceLostError once it is lost."""
        if self.lost:
            raise DeviceLostError(self.lost)

    def lose(self, error: DeviceError) -> None:
        """It does nothing any more."""
        if not self.lost:
            self.lost = str(error) or "lost"
            log.error("device lost: %s reason=%s", self.name, error)


@dataclass(slots=True, eq=False)
class _Line:
    """What is to be done in one direction: a piece of each in turn."""

    threads: DeviceThreads
    direction: Direction
    _works: "deque[Work]" = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ending: bool = False
    _thread: threading.Thread | None = None
    since_ns: int = 0  # when the piece began that is under way; 0: none is

    def start(self, stream: Stream) -> None:
        self._thread = threading.Thread(
            target=self._run, args=(stream,), name=f"gpu-{self.direction.value}", daemon=True
        )
        self._thread.start()

    def put(self, work: Work) -> None:
        with self._changed:
            self._works.append(work)
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _run(self, stream: Stream) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works or self._ending)
                if self._ending:
                    return
                work = self._works.popleft()
            self.since_ns = time.monotonic_ns()
            more = self._do(work, stream)
            self.since_ns = 0
            done = Done(work, not more, getattr(work, "groups_done", 0))
            if more:
                with self._changed:
                    self._works.append(work)
            self.threads.report(done)
            del work, done  # what they refer to is let go of while this waits

    def _do(self, work: Work, stream: Stream) -> bool:
        """Whether there is more."""
        if work.cancelled:
            return False
        try:
            if not isinstance(work, Closing):
                self.threads.check()
            return work.step(self.threads, stream)
        except DeviceError as error:
            work.error = error
            with suppress(DeviceError):  # on one that is lost nothing moves any more
                stream.synchronize()
            if isinstance(error, DeviceLostError):
                self.threads.lose(error)
            return False
        except Exception as error:  # noqa: BLE001  a mistake of ours: nobody may wait for ever, and nothing go on
            work.error = DeviceLostError(f"a mistake in the daemon: {error!r}")
            self.threads.lose(work.error)
            return False


def _for_emulation() -> Crossover:
    """It has nothing to be measured, and its kernels would have to be compiled first."""
    return Crossover({each: dict.fromkeys(SIZES, Engine.BATCH) for each in Direction}, {})
