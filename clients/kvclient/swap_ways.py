"""How chunks of a swap move between an engine's pages and the store. Threads of `swapping.py`.

    out    LeasedWay: `store` out of the pages, on the client's own streams    swap_attached.AttachedWay: SAVE
    in     LeasedIn: one lease, then layers of all blocks, first ones first    swap_attached.AttachedIn: LOADs

What has begun on the way in is a `Flight` until it is over, so that the next chunk is asked for meanwhile: the link has
two at a time. On the way out two threads take turns, each with a span of the ring (`swapping.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from kvclient.buffers import Scattered
from kvclient.copying import Gate, Move, copy_at_once
from kvclient.lease import Lease
from kvclient.mapping import Mapping
from kvclient.results import LoadResult, Reason, StoreResult
from kvkernels.device.pages import Pages, pages_of
from kvkernels.device.port import Device, DeviceError, Direction, Event
from kvproto.errors import UsageError

if TYPE_CHECKING:
    from kvclient.attached import AttachedMemory
    from kvclient.devices import Copies
    from kvclient.namespace import Namespace

READ_S: Final = 30.0  # how long a lease is held before it is renewed at half of it
SPACE_S: Final = 1.0  # how long a chunk waits for room in the ring
LOAD_BYTES_MAX: Final = 1 << 40  # of a chunk; an engine without a limit says infinity
_clock = time.monotonic


@dataclass(slots=True)
class Flight:
    """Bytes on their way into pages. `finish` waits, and says whether they are there: so many `groups` are whole."""

    moved_bytes: int
    finish: Callable[[], bool]
    groups: int = 0
    event: Event | None = None  # which a stream of the engine's can wait for
    timed: Callable[[], int] | None = None  # once it is over: bytes whose time that tells; None: its own


class Incoming(Protocol):
    """A swap on its way in. One thread; `cancelled` any may set, and what is under way may end sooner then."""

    cancelled: bool

    def open(self) -> None:
        """Wait for the daemon's answer."""

    @property
    def blocks(self) -> int | None:
        """How many will be there; None while that is not known."""

    @property
    def from_memory(self) -> bool:
        """Did all of it lie in the daemon's memory, so that its time says how fast that is read?"""

    def is_ready(self) -> bool:
        """May a chunk be asked for, or is there nothing to wait for? Never waits."""

    @property
    def has_more(self) -> bool:
        """Is there a chunk that was not asked for yet?"""

    def begin(self, most_bytes: float, *, urgent: bool) -> list[Flight]:
        """Ask for the next chunk, of a block's pieces at least. Raises DeviceError, KvError."""

    def keep(self) -> None:
        """It goes on for longer than was asked for at first."""

    def end(self, why: Reason | None) -> LoadResult:
        """All that was asked for is over, and there unless `why` says why not."""


class Way(Protocol):
    """One memory of an engine, and a namespace."""

    pages: Pages
    lanes: int  # threads on the way out

    def save(self, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate) -> StoreResult:
        """A chunk on its way out; `gate` is entered once its blocks have tickets. Raises WithdrawnError, KvError."""

    def load(self, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> Incoming:
        """Begin to ask for it."""

    def unsettled(self) -> Sequence[int]:
        """Pages that somebody else may still be writing to or reading."""

    def stream_event(self, stream: object) -> Event | None:
        """What a stream of the engine's has been asked so far. Raises UsageError."""

    def order(self, stream: object, event: Event) -> None:
        """Have a stream of the engine's wait. Raises UsageError."""


def way_of(namespace: "Namespace", memory: "AttachedMemory | Pages", place: Any) -> Way:
    """For `Client.swapper`. Raises UsageError."""
    if namespace.codec is not None:
        raise UsageError("a swapper moves blocks as they are: not in a namespace with a codec")
    if isinstance(memory, Pages):
        way: Way = LeasedWay(namespace, memory, place)
    else:
        from kvclient.swap_attached import attached_way  # noqa: PLC0415  an engine on CPU loads nothing of devices

        way = attached_way(namespace, memory, place)
    if way.pages.block_bytes != namespace.block_bytes:
        raise UsageError(f"pages of {way.pages.block_bytes} bytes, and blocks of {namespace.block_bytes}")
    return way


def host_pages(tensors: Sequence[Any], *, block_axis: int = 0, page_tokens: int = 0) -> Pages:
    """`kvkernels.device.pages.pages_of` for tensors of an engine on CPU. Raises UsageError."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise UsageError("tensors that are not all on the CPU")
    try:
        return pages_of(cast("Device", _Host()), tensors, block_axis=block_axis, page_tokens=page_tokens)
    except DeviceError as error:
        raise UsageError(str(error)) from error


class _Host:
    """What `pages_of` asks of a device, of the host."""

    def check(self, address: int, length: int) -> None:
        """The caller vouches for its tensors."""


# -- by leases: modes copy, direct and ring ----------------------------------------------------------------------------


class LeasedWay:
    """This process copies: on streams of its own where the pages are a device's, else by the processor."""

    lanes = 2

    def __init__(self, namespace: "Namespace", pages: Pages, place: Any) -> None:
        """`place`: what the `device` of a tensor is; None: the host's memory. Raises UsageError."""
        self.pages = pages
        self.namespace = namespace
        self.copies: Copies | None = None
        if place is not None and getattr(place, "type", "") != "cpu":
            from kvclient.devices import copies_for  # noqa: PLC0415  an engine on CPU loads nothing of devices

            self.copies = copies_for(place)

    def save(self, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate) -> StoreResult:
        """See `Way`."""
        side = None
        if self.copies is not None:
            from kvclient.devices import Side  # noqa: PLC0415  as above

            side = Side(self.copies, None)
        pages = self.pages
        pieces = list(zip(pages.bases, pages.strides, strict=True))
        addresses = [[base + number * stride for base, stride in pieces] for number in ids]
        source = Scattered(addresses, (pages.piece_bytes,) * len(pieces), pages.owner, gate, side)
        return self.namespace.store(keys, source, parent=parent, space_s=SPACE_S)

    def load(self, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> Incoming:
        """See `Way`."""
        return LeasedIn(self, keys, ids, groups, wait_s)

    def unsettled(self) -> Sequence[int]:
        """See `Way`."""
        return ()

    def stream_event(self, stream: object) -> Event | None:
        """See `Way`."""
        return None if self.copies is None else recorded(self.copies.device, stream)

    def order(self, stream: object, event: Event) -> None:
        """See `Way`."""
        assert self.copies is not None, "nothing of the host's has events"
        order_behind(self.copies.device, stream, event)


class LeasedIn:
    """One lease of all blocks, and copies out of it: a group of layers of all blocks after the other."""

    def __init__(self, way: LeasedWay, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> None:
        self._way = way
        self._ids = ids
        self._groups = groups
        self.cancelled = False
        self._answer = way.namespace.start_fetch(keys, wait_s, READ_S)
        self._lease: Lease | None = None
        self._places: list[tuple[Mapping, int]] = []
        self._group = self._block = 0  # of the next chunk
        self._from_disk = True
        self._settled = False  # all that will come has

    def open(self) -> None:
        """See `Incoming`."""
        self._lease = self._answer()

    @property
    def blocks(self) -> int | None:
        """See `Incoming`."""
        return len(self._places) if self._settled else None

    @property
    def from_memory(self) -> bool:
        """See `Incoming`."""
        return not self._from_disk

    def is_ready(self) -> bool:
        """See `Incoming`."""
        lease = self._lease
        assert lease is not None, "opened first"
        if self._settled:
            return True
        if not lease.is_complete:
            return False
        count = lease.blocks
        self._from_disk = bool(lease.tiers.disk)
        self._places = lease.located(by_device=self._way.copies is not None)
        self._settled = True
        assert len(self._places) in (0, count), "a place a block, or the lease is void"
        return True

    @property
    def has_more(self) -> bool:
        """See `Incoming`."""
        return not self._settled or (self._group < self._groups and bool(self._places))

    def begin(self, most_bytes: float, *, urgent: bool) -> list[Flight]:  # noqa: ARG002  layers come first in any case
        """See `Incoming`."""
        pages, count = self._way.pages, len(self._places)
        if not count:
            return []
        pieces = len(pages.bases)
        first, stop = self._group * pieces // self._groups, (self._group + 1) * pieces // self._groups
        of_block = (stop - first) * pages.piece_bytes
        begin, end = self._block, min(count, self._block + max(1, int(min(most_bytes, LOAD_BYTES_MAX) // of_block)))
        moves = list(_moves(pages, self._ids[begin:end], self._places[begin:end], range(first, stop)))
        event = self._copy(moves, self._places[begin:end])
        self._block = end
        if end == count:
            self._group, self._block = self._group + 1, 0
        finish = _there if event is None else partial(self._land, event)
        return [Flight((end - begin) * of_block, finish, self._group, event)]

    def _copy(self, moves: list[Move], places: Sequence[tuple[Mapping, int]]) -> Event | None:
        copies = self._way.copies
        if copies is not None:
            with _settling(copies):
                return copies.copy(Direction.TO_DEVICE, moves, [mapping for mapping, _ in places], None)
        assert self._lease is not None
        bounce = self._lease.bounce
        if bounce is None:
            copy_at_once(moves)
        else:
            bounce.copy(moves)
        return None

    def _land(self, event: Event) -> bool:
        assert self._way.copies is not None
        with _settling(self._way.copies):
            event.wait()
        return True

    def keep(self) -> None:
        """See `Incoming`."""
        lease = self._lease
        if lease is not None and lease.deadline_ns and lease.deadline_ns / 1e9 - _clock() < READ_S / 2:
            lease.renew(READ_S)

    def end(self, why: Reason | None) -> LoadResult:
        """See `Incoming`."""
        with self._lease or self._answer() as lease:
            if why is not None:
                return LoadResult(0, reason=why)
            return LoadResult(len(self._places) if lease.valid() else 0)


def _moves(pages: Pages, ids: Sequence[int], places: Sequence[tuple[Mapping, int]], pieces: range) -> Iterator[Move]:
    piece_bytes = pages.piece_bytes
    for number, (mapping, offset) in zip(ids, places, strict=True):
        source = mapping.address + offset
        for piece in pieces:
            yield pages.bases[piece] + number * pages.strides[piece], source + piece * piece_bytes, piece_bytes


def _there() -> bool:
    return True


@contextmanager
def _settling(copies: "Copies") -> Iterator[None]:
    """Once this has failed nothing is written to the pages any more: a part may have been in the stream."""
    try:
        yield
    except BaseException:
        copies.settle(Direction.TO_DEVICE)
        raise


# -- streams of the engine ---------------------------------------------------------------------------------------------


def recorded(device: Device, stream: object) -> Event:
    """What a stream of the engine's has been asked so far. Raises UsageError."""
    from kvclient.devices import stream_of  # noqa: PLC0415  an engine on CPU loads nothing of devices

    try:
        return stream_of(device, stream).record()
    except DeviceError as error:
        raise UsageError(f"a stream that cannot be waited for: {error}") from error


def order_behind(device: Device, stream: object, event: Event) -> None:
    """Have a stream of the engine's wait for it. Raises UsageError."""
    from kvclient.devices import stream_of  # noqa: PLC0415  as above

    try:
        stream_of(device, stream).wait(event)
    except DeviceError as error:
        raise UsageError(f"a stream that cannot wait: {error}") from error
