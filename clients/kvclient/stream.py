"""The blocks of a lease as they come: some with LEASED, the others by READY, a part of at most a frame's worth each.

    LEASED  n blocks now, `coming` later     READY  the next ones, `left` later     left 0: the stream has ended

A part that ends with fewer blocks than it promised ends the lead run, whatever the parts after it hold. Sans-I/O;
what is said to change is guarded like the session, and read without that guard only where one number is enough.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from kvclient.ledger import Watcher
from kvproto import frames
from kvproto.errors import ProtocolError
from kvproto.frames import Ready
from kvproto.limits import KEYS_PER_FRAME

if TYPE_CHECKING:
    from kvclient.calls import LeaseCall, Opened
    from kvclient.flows import Flow
    from kvclient.mapping import Mapping, Place

AHEAD_NS: Final = 2 * 10**9  # a part is promised for so long at a time while others may still come
_LOCATIONS_AT: Final = frames.HEAD_BYTES + frames.LEASED_HEAD.size


class Part:
    """One lease of the daemon's.

    Where the blocks of LEASED lie is looked up when somebody wants to read them, which leaves a lease that is only
    counted cheap. Until then all maps of the session are kept alive, from then on those that hold the blocks. Blocks
    of READY are looked up as they come.
    """

    # For a part that streams; class attributes as defaults, since most leases are answered at once.
    coming = 0  # blocks that may still come
    disk = 0  # of those that came, how many were read from disk
    until_ns = 0  # CLOCK_MONOTONIC: how long the caller of `fetch` wants to wait for them
    watchers: "Sequence[Arrival]" = ()
    _streamed: "Sequence[Place]" = ()
    _streamed_from: "frozenset[Mapping]" = frozenset()

    def __init__(self, call: "LeaseCall", lease: int, deadline_ns: int, blocks: int, frame: bytes) -> None:
        session = call.session
        self.session = session
        self._namespace = call.namespace
        self.lease = lease
        self.ttl_ns = call.ttl_ns
        self.deadline_ns = deadline_ns  # CLOCK_MONOTONIC; 0 once it is gone
        self.blocks = self.promised = blocks  # that have come; that were promised with LEASED
        self._frame = frame
        self._arenas = session.arenas  # never changed in place
        self._places: Sequence[Place] | None = None  # of the blocks of LEASED

    @property
    def cold(self) -> bool:
        """Whether a map that this lease uses is not wholly populated yet. After `places`."""
        return any(mapping.cold for mapping in (*self._arenas.values(), *self._streamed_from))

    def places(self) -> "Sequence[Place]":
        """The map and the offset in bytes of each block. Raises ProtocolError if the daemon named what is not there."""
        if self._places is None:
            at_once = (len(self._frame) - _LOCATIONS_AT) // frames.LOCATION.size
            numbers = _locations(at_once).unpack_from(self._frame, _LOCATIONS_AT)
            self._places, self._arenas = _look_up(numbers[::2], numbers[1::2], self._arenas, self._namespace)
        return self._places if not self._streamed else [*self._places, *self._streamed]

    @property
    def namespace(self) -> int:
        """Number of the namespace in this session."""
        return self._namespace.number

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return self._namespace.block_bytes

    # -- streaming ----------------------------------------------------------------------------------------------

    def expect(self, coming: int, until_ns: int) -> None:
        """So many blocks will come by READY."""
        self.coming = coming
        self.promised = self.blocks + coming
        self.until_ns = until_ns

    def take(self, ready: Ready, arenas: "dict[int, Mapping]") -> "Sequence[Place]":
        """The next blocks have come; where they lie. Raises ProtocolError if they contradict what was promised."""
        if len(ready.locations) + ready.left > self.coming:
            raise ProtocolError(f"READY says {len(ready.locations)} blocks and {ready.left} of {self.coming} coming")
        if not ready.locations:
            places: Sequence[Place] = ()
        else:
            numbers, slots = zip(*ready.locations, strict=True)
            places, used = _look_up(numbers, slots, arenas, self._namespace)
            self._streamed = [*self._streamed, *places]
            self._streamed_from |= frozenset(used.values())
        if self.deadline_ns:  # else RENEWED has said that it is gone, for good
            self.deadline_ns = max(self.deadline_ns, ready.deadline_ns)
        # What a reader finds by these numbers is there by now, whether or not it has the guard.
        self.disk += ready.disk
        self.blocks += len(places)
        self.coming = ready.left
        self._tell()
        return places

    def stop(self) -> None:
        """No more blocks will be taken: what has not come is a miss."""
        if self.coming:
            self.coming = 0
            self.session.forget_stream(self)
            self._tell()

    def _tell(self) -> None:
        if self.watchers:
            came = [watcher for watcher in self.watchers if watcher.has_come]
            self.watchers = [watcher for watcher in self.watchers if watcher not in came]
            for watcher in came:
                watcher.finish()


def _look_up(
    numbers: Sequence[int], slots: Sequence[int], arenas: "dict[int, Mapping]", namespace: "Opened"
) -> "tuple[Sequence[Place], dict[int, Mapping]]":
    """Places of blocks, and the arenas that hold them. Raises ProtocolError if something is not there."""
    try:
        used = {arena: arenas[arena] for arena in dict.fromkeys(numbers)}
    except KeyError as error:
        raise ProtocolError(f"a lease names arena {error}, which was never sent") from error
    if not used:
        return (), used
    # Anything beyond its arena would be read beyond its map.
    _, slot_bytes, block_bytes = namespace
    if max(slots) * slot_bytes + block_bytes > min(mapping.bytes for mapping in used.values()):
        raise ProtocolError("a lease names a slot beyond its arena")
    return [(used[arena], slot * slot_bytes) for arena, slot in zip(numbers, slots, strict=True)], used


@functools.lru_cache(maxsize=KEYS_PER_FRAME + 1)
def _locations(blocks: int) -> struct.Struct:
    return struct.Struct(f"<{2 * blocks}I")


class Arrival(Watcher):
    """Waits until a part has more blocks than when this was made, or no more will come."""

    def __init__(self, part: Part, deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self._part = part
        self._blocks = part.blocks

    @property
    def has_come(self) -> bool:
        """Whether the wait is over."""
        return not self._part.coming or self._part.blocks > self._blocks

    def watch(self) -> None:
        """Start waiting."""
        if self.has_come:
            self.finish()
        else:
            self._part.watchers = [*self._part.watchers, self]

    def leave(self) -> None:
        """Stop waiting, done or not."""
        self._part.watchers = [watcher for watcher in self._part.watchers if watcher is not self]


class Lead(NamedTuple):
    """How far a lease has come."""

    blocks: int  # of the lead run that have come
    disk: int  # of them, how many were read from disk
    parts: int  # how many parts have a share in it
    coming: Part | None  # which of them has more to come; None: this is all


class Renewals:
    """Keeps the parts of one fetch while one of them streams: the daemon renews that one, and cannot tell whose the
    others are.

    A third of its time after it was promised a part is promised anew; once more when nothing is coming any more, so
    that the caller has all of them for as long as it asked. Guarded like the session.
    """

    def __init__(self, parts: Sequence[Part], now_ns: int) -> None:
        self._parts = parts
        self._due_ns = now_ns
        self.over = False

    def due(self, now_ns: int) -> "list[Part]":
        """Those to be renewed now, for their `ttl_ns` each. Nothing follows after what is due when this is `over`."""
        self.over = not any(part.coming for part in self._parts)
        if now_ns < self._due_ns and not self.over:
            return []
        self._due_ns = now_ns + min(part.ttl_ns for part in self._parts) // 3
        return [part for part in self._parts if self._wants(part, now_ns)]

    def _wants(self, part: Part, now_ns: int) -> bool:
        left_ns = part.deadline_ns - now_ns
        return bool(part.deadline_ns and not part.coming and left_ns < part.ttl_ns - part.ttl_ns // 4)


def lead_of(parts: Sequence[Part]) -> Lead:
    """The lead run over parts in order. Without the guard `blocks` may lag behind, and `disk` be out of step."""
    blocks = disk = number = 0
    for number, part in enumerate(parts, start=1):
        coming = part.coming  # before `blocks`: if this is 0, that is final
        blocks += part.blocks
        disk += part.disk
        if coming or part.blocks < part.promised:
            return Lead(blocks, disk, number, part if coming else None)
    return Lead(blocks, disk, number, None)


def arrive(parts: Sequence[Part], first: int, clock: Callable[[], int]) -> "Flow[None]":
    """Wait until more than `first` blocks have come, or no more will, or the wait of `fetch` is over."""
    while (lead := lead_of(parts)).coming is not None and lead.blocks <= first and clock() < lead.coming.until_ns:
        yield Arrival(lead.coming, lead.coming.until_ns)
