"""A lease: the lead run of a chain, held still while this process reads it.

    expected    blocks that were promised: there, or coming from disk        never waits
    chunks()    ranges of blocks as they become usable, in order             waits for the next one
    copy_to()   copies each chunk while the daemon reads the one after it    waits for what it copies
    blocks      how many there are in the end                                waits for all, at most as `fetch` was told

What has not come when the wait of `fetch` is over is a miss: the lead run ends there, once and for all.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from kvclient import buffers, flows
from kvclient.connection import Connection
from kvclient.copying import Bounce, Move, Stopwatch, copy, copy_at_once
from kvclient.endpoint import Endpoint
from kvclient.mapping import Place
from kvclient.results import Tiers
from kvclient.stream import Part, Renewals, arrive, lead_of
from kvkernels import libc
from kvproto.errors import ProtocolError, UsageError
from kvproto.frames import Mode
from kvproto.limits import MIB
from kvproto.policy_frames import Kind, Report, Tier, build_report

if TYPE_CHECKING:
    from kvclient.codecs import Codec
    from kvclient.devices import DeviceCopy, Uses

TIMED_BYTES: Final = MIB  # a copy smaller than this says more about its overhead than about memory
TIMED_EACH: Final = 16  # one in so many is timed, and reported in a frame of its own
_log = logging.getLogger(__name__)
_clock = time.monotonic_ns


class Held:
    """What a lease is, whichever way it waits and copies. Threads may share one."""

    _disk = 0
    _undecodable = False  # a block was none of the namespace's codec
    _uses: "Uses | None" = None  # by copies to a device
    _renewals: Renewals | None = None

    def __init__(
        self, endpoint: Endpoint, parts: Sequence[Part], block_bytes: int, codec: "Codec | None" = None
    ) -> None:
        self._endpoint = endpoint
        self._parts = parts
        self._block_bytes = block_bytes  # as it lies in the store
        self._codec = codec
        self._views: tuple[memoryview, ...] = ()
        self._released = False
        self._streaming = False  # blocks may still come
        expected = 0
        for part in parts:
            expected += part.promised
            if part.until_ns:
                self._streaming = True
        self.expected = expected  # blocks that were promised: these are there, or on their way from disk
        self._blocks = expected  # length of the lead run; counts only once nothing is streaming
        if self._streaming and len(parts) > 1:
            self._renewals = Renewals(parts, _clock())
            with endpoint.guard():
                parts[0].session.keep(self._renewals)

    @property
    def tiers(self) -> Tiers:
        """Which tiers the blocks that have come were read from. Never waits."""
        with self._endpoint.guard():
            blocks, disk = lead_of(self._parts)[:2] if self._streaming else (self._blocks, self._disk)
        return Tiers(dram=blocks - disk, disk=disk)

    @property
    def deadline_ns(self) -> int:
        """When the daemon may take the first of the blocks away, in nanoseconds of CLOCK_MONOTONIC.

        It moves on as blocks come. 0 where there is nothing to take away: for a miss, and after `release`.
        """
        return min((part.deadline_ns for part in self._parts), default=0)

    def views_of(self, chunk: range) -> tuple[memoryview, ...]:
        """As `views`, for blocks that `chunks` has given. Never waits. Raises UsageError for blocks that are not there.

        `chunk`: consecutive blocks. With a codec what is given are copies, decoded anew by each call.
        """
        self._endpoint.check_fork()
        if self._released:
            raise UsageError("the views of a lease are for use inside its context")
        parts = self._parts
        if chunk and not 0 <= chunk.start < chunk.stop <= (lead_of(parts).blocks if self._streaming else self._blocks):
            raise UsageError(f"{chunk} are not blocks that have come")
        if self._codec is not None:
            return self._decoded(self._codec, self._places(chunk.start, chunk.stop))
        views, block_bytes = self._views, self._block_bytes
        if len(views) < chunk.stop:
            places = self._places(len(views), chunk.stop)
            views += tuple(mapping.view[offset : offset + block_bytes] for mapping, offset in places)
            self._views = views
        return views[chunk.start : chunk.stop]

    def valid(self) -> bool:
        """Whether everything read so far was read in time: not released, and no deadline passed."""
        return self.was_valid(_clock())

    def was_valid(self, at_ns: int) -> bool:
        """As `valid`, of what had been read by then: in nanoseconds of CLOCK_MONOTONIC."""
        self._endpoint.check_fork()
        if self._released or self._undecodable:
            return False
        if self._lapsed(at_ns):
            self._endpoint.catch_up()  # it may have been renewed, by what has just not been read
            return not self._released and not self._lapsed(at_ns)
        return True

    def _lapsed(self, at_ns: int) -> bool:
        return any(part.blocks and at_ns >= part.deadline_ns for part in self._parts)

    def give_up(self) -> None:
        """What has come is all: whoever waits for more waits no longer. Any thread, any number of times."""
        if self._streaming:
            self._end()

    def release(self) -> None:
        """Give the blocks back, those still coming too, with the next frame this client sends. Any number of times.

        Where a device still copies from them, when it does no more.
        """
        if self._released:
            return
        if self._streaming:
            self._end()
        self._released = True
        if self._uses is None:
            self._let_go()
        else:
            self._uses.after(self._let_go)

    def _let_go(self) -> None:
        parts, self._parts, self._renewals = self._parts, (), None
        for part in parts:
            part.session.releases.append(part.lease)
        for view in self._views:
            with contextlib.suppress(BufferError):  # the caller made something from it, which keeps the map
                view.release()
        self._views = ()

    # -- as blocks come -----------------------------------------------------------------------------------------

    def _after_waiting(self, first: int) -> int:
        """Length of the lead run now that `arrive` has returned. If it is not beyond `first`, it is final."""
        lead = lead_of(self._parts)
        if lead.blocks <= first and lead.coming is not None:
            self._endpoint.catch_up()  # the wait is over, but what has come by now may just not have been read
            lead = lead_of(self._parts)
        if self._streaming and lead.blocks <= first:
            self._end()
        return lead.blocks if self._streaming else self._blocks

    def _end(self) -> None:
        """What has come is all; a part behind one that fell short is of no use to a lead run."""
        with self._endpoint.guard():
            if not self._streaming:  # another thread was faster
                return
            parts = self._parts
            lead = lead_of(parts)
            self._blocks, self._disk = lead.blocks, lead.disk
            self._parts = parts[: lead.parts]
            self._streaming = False
            for part in parts:
                part.stop()
        for part in parts[lead.parts :]:
            part.session.releases.append(part.lease)

    # -- copying ------------------------------------------------------------------------------------------------

    def _writable(self, targets: object, stream: object = None) -> buffers.Memory:
        """The memory of `targets`; what a device's is for must end with `_ended`. Raises UsageError for unfit ones."""
        codec = self._codec
        block_bytes = self._block_bytes if codec is None else codec.plain_bytes
        memory = buffers.writable(targets, self.expected, block_bytes, stream)
        if memory.device is not None:
            if codec is not None:
                from kvclient.codecs_device import check_fits  # noqa: PLC0415  # an engine on CPU never needs it

                check_fits(codec)
            from kvclient.devices import Uses  # noqa: PLC0415  # an engine on CPU never needs it

            with self._endpoint.guard():
                self._uses = self._uses or Uses()
            self._uses.begin()
        return memory

    def _ended(self, memory: buffers.Memory) -> bool:
        """The last byte of a copy to a device has arrived, if any will; whether all have. Waits."""
        if memory.device is None:
            return True
        try:
            return memory.device.finish()
        finally:
            assert self._uses is not None
            self._uses.end()

    def _copying(self, memory: buffers.Memory, first: int, end: int) -> Callable[[], None]:
        """What copies blocks `first` to `end`, for any thread; it keeps alive what it needs."""
        places = self._places(first, end)
        if self._codec is not None:
            return partial(self._decode, self._codec, memory, first, places)
        if memory.device is not None:
            places = _writable_maps(places, self._parts)
        if any(part.cold for part in self._parts):
            return partial(self._copy_cold, memory, first, places)
        sources = [mapping.address + offset for mapping, offset in places]
        moves = memory.moves_in(first, sources, self._block_bytes)
        return partial(self._mover(), moves, memory, places)

    @property
    def bounce(self) -> Bounce | None:
        """What copies to the host pass through in mode ring; None in all others."""
        session = self._parts[0].session if self._parts else None
        return session.bounce if session is not None and session.mode is Mode.RING else None

    def _mover(self) -> Callable[[list[Move], buffers.Memory, list[Place]], None]:
        """In mode ring a copy goes by way of the session's own buffer."""
        bounce = self.bounce
        return _copy if bounce is None else partial(_copy_through, bounce)

    def _stopwatch(self, blocks: int) -> Stopwatch | None:
        """For a copy of so many blocks, if it is one of those that are timed."""
        if blocks * self._block_bytes < TIMED_BYTES or self._codec is not None:  # decoding says little about memory
            return None
        endpoint = self._endpoint
        endpoint.large_copies += 1
        return Stopwatch() if endpoint.large_copies % TIMED_EACH == 0 else None

    def _timed(self, watch: Stopwatch, copying: Callable[[], None]) -> Callable[[], None]:
        """The same copy, timed; a map that is still being populated would be blamed on the memory."""
        watch.spoilt |= any(part.cold for part in self._parts)
        return partial(watch.measure, copying)

    def _report(self, watch: Stopwatch, blocks: int) -> None:
        """Tell the daemon how fast its memory is read."""
        parts = self._parts
        if parts and watch.ns and not watch.spoilt:
            part = parts[0]
            report = Report(part.namespace, Kind.LOAD, Tier.DRAM, blocks * self._block_bytes, watch.ns / 1e9)
            self._endpoint.say(part.session, build_report(report))

    def _decode(self, codec: "Codec", memory: buffers.Memory, first: int, places: list[Place]) -> None:
        """Block by block; with one that is none of this codec the lease is void."""
        from kvclient.codecs_moving import decode_to  # noqa: PLC0415  # raw namespaces never need it

        self._warm(places)
        if memory.device is not None:
            good = memory.device.decode(codec, memory, first, _writable_maps(places, self._parts))
        else:
            good = decode_to(codec, memory, first, places)
        if not good:
            self._spoil(codec)

    def _decoded(self, codec: "Codec", places: list[Place]) -> tuple[memoryview, ...]:
        from kvclient.codecs_moving import decoded  # noqa: PLC0415  # as above

        self._warm(places)
        views = decoded(codec, places)
        if len(views) < len(places):
            self._spoil(codec)
        return views

    def _warm(self, places: list[Place]) -> None:
        for mapping, offset in places:
            if mapping.cold:
                self._endpoint.memory.populate(mapping, offset, self._block_bytes)

    def _spoil(self, codec: "Codec") -> None:
        """Somebody stored something else there, or the lease has lapsed and it is another's by now: a miss."""
        if not self._lapsed(_clock()):
            _log.warning("a block that is none of its namespace's codec: codec=%r", codec.text)
        self._undecodable = True

    def _copy_cold(self, memory: buffers.Memory, first: int, places: list[Place]) -> None:
        """Copy while the maps are still being populated: block by block, doing what the helper has not got to."""
        populate = self._endpoint.memory.populate
        block_bytes, move = self._block_bytes, self._mover()
        if memory.device is not None:  # which copies better in one piece
            for mapping, offset in places:
                populate(mapping, offset, block_bytes)
            sources = [mapping.address + offset for mapping, offset in places]
            move(memory.moves_in(first, sources, block_bytes), memory, places)
            return
        for index, (mapping, offset) in enumerate(places, first):
            if mapping.cold:
                populate(mapping, offset, block_bytes)
            move(memory.moves_in(index, [mapping.address + offset], block_bytes), memory, places)

    def _places(self, first: int, end: int) -> list[Place]:
        """Where blocks of the lead run lie; nowhere if the daemon named what does not exist: then the lease is void."""
        places: list[Place] = []
        for part in self._parts:
            if end <= 0:
                break
            try:
                places += part.places()[max(0, first) : end]
            except ProtocolError as error:
                part.deadline_ns = 0
                self._endpoint.distrust(part.session, str(error))
                return []
            first, end = first - part.promised, end - part.promised  # what lies behind this part needs all of it
        return places


class Lease(Held):
    """What `Namespace.fetch` returns: a context manager that releases on the way out."""

    def __init__(
        self, connection: Connection, parts: Sequence[Part], block_bytes: int, codec: "Codec | None" = None
    ) -> None:
        super().__init__(connection, parts, block_bytes, codec)
        self._connection = connection

    @property
    def blocks(self) -> int:
        """Length of the lead run; 0 for a miss. Waits for blocks that are coming, at most the `wait_s` of `fetch`."""
        return self._beyond(self.expected) if self._streaming else self._blocks

    @property
    def views(self) -> tuple[memoryview, ...]:
        """Read-only and zero-copy, one a block, for use inside the context. Waits as `blocks` does.

        After the last use ask `valid()`: past the deadline the bytes may be another block's. A view that outlives
        the context, or an array made from one, is safe to touch for as long as it is kept, but what it shows is
        no longer promised. With a codec they are copies, decoded anew each time. Raises UsageError outside the context.
        """
        return self.views_of(range(self.blocks))

    def chunks(self) -> Iterator[range]:
        """The blocks as they become usable, in order: ranges of indices, for `views_of`. Waits for the next one."""
        first = 0
        while (end := self._beyond(first)) > first and not self._released:
            yield range(first, end)
            first = end

    def copy_to(self, targets: object, stream: object = None) -> bool:
        """Copy the first blocks into `targets`; whether all of them were filled, and while the lease was valid.

        `targets`: one writable C-contiguous object of exactly `block_bytes` a block (ndarray, tensor, buffer), at
        most `expected` of them, or one array or tensor whose first dimension is the blocks. Raises UsageError, before
        the first byte moves, for anything else. Copies what is there while more is coming, and waits only for blocks
        that have a target. After False, `blocks` says how many there are; if the lease is still `valid()`, so many
        targets from the front are good, otherwise none is.

        Tensors may be on a GPU, all on one. Then `stream` is the one whose work so far must be over before they are
        written to; they are written when this returns. After False none of them is good: the GPU may have failed.
        """
        memory = self._writable(targets, stream)
        if memory.device is None:
            return self._fill(memory)
        return self._fill_device(memory)

    def start_copy(self, targets: object, stream: object = None) -> "DeviceCopy":
        """As `copy_to` for tensors on a GPU, without waiting: it goes on behind, and the result tells how far it is.

        The lease may be released meanwhile, which makes a miss of it; the daemon hears of that when nothing reads any
        more. `targets` are the copy's until it is `done`.
        """
        from kvclient.devices import DeviceCopy  # noqa: PLC0415  # an engine on CPU never needs it

        memory = self._writable(targets, stream)
        if memory.device is None:
            raise UsageError("start_copy is for tensors on a device: copy_to fills these")
        return DeviceCopy(memory.device, partial(self._fill_device, memory))

    def _fill_device(self, memory: buffers.Memory) -> bool:
        try:
            filled = self._fill(memory)
        finally:
            arrived = self._ended(memory)
        return arrived and filled and self.valid()

    def _fill(self, memory: buffers.Memory) -> bool:
        wanted = memory.blocks
        watch = self._stopwatch(wanted)
        first = 0
        while first < wanted:
            end = min(self._beyond(first), wanted)
            if not self.valid() or end <= first:
                return False
            copying = self._copying(memory, first, end)
            (copying if watch is None else self._timed(watch, copying))()
            first = end
        if watch is not None:
            self._report(watch, wanted)
        return self.valid()

    def sources(self) -> list[int]:
        """The address of each block, read-only until `release`; `valid()` says afterwards whether what was read counts.

        None while blocks are coming, and where they are not to be read like that: in mode ring, and from maps that are
        still being populated.
        """
        self._endpoint.check_fork()
        if self._streaming or self._released or self._codec is not None or self._mover() is not _copy:
            return []
        places = self._places(0, self._blocks)
        if any(part.cold for part in self._parts):
            return []
        return [mapping.address + offset for mapping, offset in places]

    @property
    def is_complete(self) -> bool:
        """Has all come that will come? `blocks` then waits for nothing. Never waits."""
        if not self._streaming:
            return True
        self._endpoint.catch_up()
        coming = lead_of(self._parts).coming
        return coming is None or _clock() >= coming.until_ns

    def located(self, *, by_device: bool) -> list[Place]:
        """Where each block lies: its map, mapped as long as it is kept here, and the offset of its first byte in that.

        As `sources`, for copies in pieces; `by_device`: by maps that a device may reach. None while blocks are coming.
        """
        self._endpoint.check_fork()
        if self._streaming or self._released or self._codec is not None:
            return []
        places = self._places(0, self._blocks)
        return _writable_maps(places, self._parts) if by_device else places

    def copyings(self, targets: object, parts: int = 1) -> list[Callable[[], None]]:
        """What copies the blocks into `targets`, in about so many parts for any threads; none while blocks are coming.

        `targets` as for `copy_to`. Once all have run ask `valid()`: only then what they filled is good. Raises
        UsageError for unfit ones.
        """
        memory = self._writable(targets)
        if self._streaming:
            return []
        stop = memory.blocks
        each = max(1, -(-stop // max(1, parts)))
        ranges = [(first, min(first + each, stop)) for first in range(0, stop, each)]
        plain = memory.device is None and self._codec is None and self._mover() is _copy
        plain = plain and not any(part.cold for part in self._parts)
        places = self._places(0, stop) if plain else []
        pieces = memory.pieces_in([mapping.address + offset for mapping, offset in places], each)
        if not pieces:
            return [self._copying(memory, *each_range) for each_range in ranges]
        return [
            partial(self._copy_pieces, some, memory, *each_range, places)
            for some, each_range in zip(pieces, ranges, strict=True)
        ]

    def _copy_pieces(
        self, pieces: libc.Pieces, memory: buffers.Memory, first: int, end: int, _kept_alive: list[Place]
    ) -> None:
        """Whoever calls it asks for the GIL once, and needs it for nothing before."""
        if not pieces.copy():
            self._copying(memory, first, end)()

    def renew(self, ttl_s: float) -> bool:
        """Keep the blocks for `ttl_s` seconds from now; False if they may be gone already, or no answer comes."""
        ttl_ns = flows.nanoseconds("ttl_s", ttl_s, least_ns=1)
        if not self.valid():
            return False
        deadline_ns = _clock() + self._connection.timeout_ns
        return self._connection.run(flows.renew(self._parts, ttl_ns, deadline_ns)) and self.valid()

    def _beyond(self, first: int) -> int:
        """Wait for more than `first` blocks. Length of the lead run; final if it is no more than that."""
        if not self._streaming:
            return self._blocks
        self._endpoint.check_fork()
        self._connection.run(arrive(self._parts, first, _clock))
        return self._after_waiting(first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _writable_maps(places: list[Place], parts: Sequence[Part]) -> list[Place]:
    """The same places in the maps that stores of mode direct go by, where there are some: GPUs reach those only."""
    twins = {
        id(mapping): part.session.writable.get(number)
        for part in parts
        if part.session.writable
        for number, mapping in part.session.arenas.items()
    }
    return [(twins.get(id(mapping)) or mapping, offset) for mapping, offset in places]


def _copy(moves: list[Move], memory: buffers.Memory, kept_alive: list[Place]) -> None:
    if memory.device is not None:
        memory.device.fill(moves, [mapping for mapping, _ in kept_alive])
        return
    (copy if memory.scattered is None else copy_at_once)(moves)


def _copy_through(bounce: Bounce, moves: list[Move], memory: buffers.Memory, kept_alive: list[Place]) -> None:
    if memory.device is not None:  # which has a buffer of its own, pinned
        _copy(moves, memory, kept_alive)
        return
    bounce.copy(moves)
