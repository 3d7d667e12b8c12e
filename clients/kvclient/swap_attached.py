"""Swaps of memory that an engine has handed to the daemon (mode daemon): chunks are SAVEs and LOADs.

Nothing is copied by this process, and nothing of a chunk is under way once its answer has come, or its cancel's. See
`swap_ways.py`.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kvclient.attached import AttachedMemory
from kvclient.copying import Gate
from kvclient.results import LoadResult, Reason, StoreResult
from kvclient.swap_ways import LOAD_BYTES_MAX, SPACE_S, Flight, Incoming, order_behind, recorded
from kvkernels.device.port import Event
from kvproto.errors import UsageError
from kvproto.limits import KEYS_PER_FRAME, LAYER_GROUPS

if TYPE_CHECKING:
    from kvclient.moving import Loading
    from kvclient.namespace import Namespace

CHUNK_S: Final = 30.0  # how long the daemon may take for a chunk before it is cancelled
LOOK_S: Final = 0.02  # how often it is asked whether that is wanted meanwhile
WAIT_S: Final = 0.001  # in which the daemon says what there is of a LOAD, and no disk has read it
WAIT_SHARE: Final = 0.25  # or of what the copies take, where that is more
_clock = time.monotonic


def attached_way(namespace: "Namespace", memory: object, place: Any) -> "AttachedWay":
    """Raises UsageError for what no client has attached."""
    if not isinstance(memory, AttachedMemory):
        raise UsageError(f"memory is Pages, or what `Client.attach` gave, not {type(memory).__name__}")
    if place is not None:
        raise UsageError("attached memory says itself where it lies")
    return AttachedWay(namespace, memory)


class AttachedWay:
    """The daemon copies, in chunks: SAVE and LOAD."""

    lanes = 1  # a SAVE is over when its blocks are visible, and the daemon has two threads of its own

    def __init__(self, namespace: "Namespace", memory: AttachedMemory) -> None:
        self.pages = memory.pages
        self.memory = memory
        self.namespace = namespace

    def save(self, keys: Sequence[bytes], ids: Sequence[int], parent: bytes | None, gate: Gate) -> StoreResult:
        """See `Way`."""
        pages = self.memory[ids]
        pages.gate = gate
        return self.namespace.save(keys, pages, parent=parent, timeout_s=CHUNK_S, space_s=SPACE_S)

    def load(self, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> Incoming:
        """See `Way`."""
        return AttachedIn(self, keys, ids, groups, wait_s)

    def unsettled(self) -> Sequence[int]:
        """See `Way`."""
        return self.memory.unsettled()

    def stream_event(self, stream: object) -> Event | None:
        """See `Way`."""
        return recorded(self.memory.device, stream)

    def order(self, stream: object, event: Event) -> None:
        """See `Way`."""
        order_behind(self.memory.device, stream, event)


class AttachedIn:
    """LOADs, one a chunk; one of all blocks, group of layers by group, where a request waits for them."""

    def __init__(self, way: AttachedWay, keys: Sequence[bytes], ids: Sequence[int], groups: int, wait_s: float) -> None:
        self._way = way
        self._keys = keys
        self._ids = ids
        self._groups = groups
        self.cancelled = False
        self._until = _clock() + wait_s
        self._next = 0  # block
        self._came = 0  # blocks from the front
        self._short: LoadResult | None = None  # of the first LOAD that brought less than all of its own
        self._only: Loading | None = None  # of all blocks

    def open(self) -> None:
        """See `Incoming`."""

    @property
    def blocks(self) -> int | None:
        """See `Incoming`."""
        if self._short is not None or self._came == len(self._keys):
            return self._came
        return self._only.blocks if self._only is not None else None

    @property
    def from_memory(self) -> bool:
        """See `Incoming`. Nobody says."""
        return False

    def is_ready(self) -> bool:
        """See `Incoming`."""
        return True

    @property
    def has_more(self) -> bool:
        """See `Incoming`."""
        return self._short is None and self._next < len(self._keys)

    def begin(self, most_bytes: float, *, urgent: bool) -> list[Flight]:
        """See `Incoming`."""
        block_bytes = self._way.pages.block_bytes
        if urgent:
            most_bytes = block_bytes * KEYS_PER_FRAME
        count = max(1, min(KEYS_PER_FRAME, int(min(most_bytes, LOAD_BYTES_MAX) // block_bytes)))
        some = slice(self._next, self._next + count)
        keys, ids = self._keys[some], self._ids[some]
        is_all = len(keys) == len(self._keys)
        groups = min(self._groups, LAYER_GROUPS) if is_all else 1
        self._next += len(keys)
        wait_s = max(0.0, self._until - _clock())
        loading = self._way.namespace.start_load(keys, self._way.memory[ids], wait_s=wait_s, groups=groups)
        asked_s = _clock()
        part_bytes = len(keys) * block_bytes // groups
        self._only = loading if is_all else None
        parts = [partial(self._has, loading, group) for group in range(1, groups)]
        flights = [Flight(part_bytes, part, group, timed=_untimed) for group, part in enumerate(parts, 1)]
        whole = self._groups if self._next >= len(self._keys) else 0
        last = partial(self._over, loading, groups, len(keys))
        timed = partial(_timed, loading, block_bytes, asked_s)
        return [*flights, Flight(part_bytes, last, whole, timed=timed)]

    def _has(self, loading: "Loading", group: int) -> bool:
        """Is so much of it there? Waits, no longer than anybody wants it, and somebody may still say so."""
        until = _clock() + CHUNK_S
        while not (there := loading.wait(group, LOOK_S)):
            if loading.done or loading.broken or self.cancelled or _clock() >= until:
                break
        return there

    def _over(self, loading: "Loading", groups: int, wanted: int) -> bool:
        until = _clock() + CHUNK_S
        while not (loading.done or loading.broken or self.cancelled) and _clock() < until:
            loading.wait(groups, LOOK_S)
        result = loading.cancel()  # what is not over by now
        if self._short is not None:
            return False
        self._came += result.blocks
        if result.blocks < wanted:
            self._short = result
        return result.reason is None

    def keep(self) -> None:
        """See `Incoming`. The daemon holds what it copies."""

    def end(self, why: Reason | None) -> LoadResult:
        """See `Incoming`."""
        settled = {*self._ids}.isdisjoint(self._way.unsettled())
        short = self._short
        if short is not None:
            return LoadResult(self._came, settled, why or short.reason)
        return LoadResult(0 if why is not None else self._came, settled, why)


def _untimed() -> int:
    return 0


def _timed(loading: "Loading", block_bytes: int, asked_s: float) -> int:
    """Bytes that a LOAD which is over moved in its time: none if it waited, as for a disk, or its end for who looks.

    Such a one is not timed by the daemon's words alone: who hears the first one late hears the last one with it.
    """
    named_s, ended_s = loading.heard_s
    most_s = max(WAIT_S, WAIT_SHARE * (ended_s - named_s))
    waited = max(named_s - asked_s, _clock() - ended_s) > most_s
    return 0 if waited else (loading.blocks or 0) * block_bytes
