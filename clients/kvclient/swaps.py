"""One swap of a context: what its caller holds, and how far it is. See `swapping.py`.

    queued --chunk--> under way --chunk--> ... --> over
       `----------------- end ----------------------^      once the chunks under way are

Everything that changes is guarded by the swapper's lock; methods that say "locked" are called under it.
"""

import threading
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final

from kvclient import flows
from kvclient.results import LoadResult, Reason, Refused, StoreResult
from kvclient.swap_ways import Incoming
from kvkernels.device.port import Event

GRACE_S: Final = 2.0  # how long who does not want it any more waits for the chunk that is under way, at least


class Priority(IntEnum):
    """Who goes first at the border of a chunk."""

    URGENT = 0  # a request waits: it counts for the budget, and does not wait for it
    SOON = 1
    LATER = 2


class Swap:
    """A swap, whichever way it goes. Any thread; `result` waits, and nothing else here does."""

    def __init__(
        self, changed: threading.Condition, keys: Sequence[bytes], ids: tuple[int, ...], priority: Priority,
        after: Event | None,
    ) -> None:  # fmt: skip
        self._changed = changed
        self.keys = tuple(keys)
        self.ids = ids
        self.priority = priority
        self.after = after  # of the engine's stream: until then the pages are still being computed, or read
        self.number = 0  # in the order in which they came
        self.why: Reason | None = None  # no chunk begins any more, and why
        self.over = False
        self.moved_bytes = 0  # that were not where they belong before
        self.unsettled: Callable[[], Sequence[int]] = tuple  # pages that a daemon which hangs may still read or write

    @property
    def done(self) -> bool:
        """Is it over, and are its pages the caller's again? Never waits."""
        return self.over and {*self.ids}.isdisjoint(self.unsettled())

    def urge(self) -> None:
        """A request waits for it from now on. Never waits."""
        with self._changed:
            self.priority = Priority.URGENT
            self._changed.notify_all()

    def cancel(self) -> None:
        """Begin with nothing more: it is over when the chunks under way are. Never waits."""
        with self._changed:
            self.end(Reason.TIMED_OUT)

    def end(self, why: Reason) -> None:
        """The same, locked."""
        self.why = self.why or why
        self._changed.notify_all()

    def finish(self) -> None:
        """It is over; locked."""
        self.over = True
        self._changed.notify_all()

    def touches(self, ids: set[int]) -> bool:
        """May it read or write one of these pages, now or later? Locked."""
        raise NotImplementedError

    def _await(self, timeout_s: float) -> None:
        seconds = flows.nanoseconds("timeout_s", timeout_s) / 1e9
        with self._changed:
            if not self._changed.wait_for(lambda: self.over, seconds):
                self.end(Reason.TIMED_OUT)
                self._changed.wait_for(lambda: self.over, GRACE_S)


class SwapOut(Swap):
    """Pages on their way into the store, made by `Swapper.swap_out`."""

    def __init__(
        self, changed: threading.Condition, keys: Sequence[bytes], ids: tuple[int, ...], priority: Priority,
        after: Event | None, parent: bytes | None,
    ) -> None:  # fmt: skip
        super().__init__(changed, keys, ids, priority, after)
        self.parent = parent
        self.next = 0  # the first block that no chunk has begun with
        self.chunks: list[range] = []  # under way
        self.asking: range | None = None  # one of them, without tickets yet: what continues it would lack a parent
        self.alone = False  # its chunks go one by one: the ring is too full for two
        self.accepted = self.known = 0
        self.refused: list[Refused] = []

    def has_tickets(self, chunk: range) -> None:
        """What continues this chunk may be asked for, unless another one is; locked."""
        if self.asking is chunk:
            self.asking = None

    def touches(self, ids: set[int]) -> bool:
        """See `Swap`."""
        later = () if self.why is not None else self.ids[self.next :]
        return not ids.isdisjoint(later) or any(
            not ids.isdisjoint(self.ids[chunk.start : chunk.stop]) for chunk in self.chunks
        )

    def result(self, timeout_s: float = 5.0) -> StoreResult:
        """What became of the blocks. What has not begun by then is cancelled; TIMED_OUT says that nobody knows.

        Raises UsageError for an impossible `timeout_s`.
        """
        self._await(timeout_s)
        with self._changed:
            late = [index for chunk in self.chunks for index in chunk]  # of a device or a daemon that hangs
            refused = [*self.refused, *(Refused(index, Reason.TIMED_OUT) for index in late)]
            why = self.why or Reason.TIMED_OUT
            refused += [Refused(index, why) for index in range(self.next, len(self.keys))]
            return StoreResult(self.accepted, self.known, tuple(sorted(refused, key=lambda one: one.index)))


class SwapIn(Swap):
    """Blocks on their way into pages, made by `Swapper.swap_in`."""

    def __init__(
        self, changed: threading.Condition, keys: Sequence[bytes], ids: tuple[int, ...], priority: Priority,
        after: Event | None, groups: int, wait_s: float, order: Callable[[object, Event], None],
    ) -> None:  # fmt: skip
        super().__init__(changed, keys, ids, priority, after)
        self.groups = groups
        self.wait_s = wait_s
        self.groups_done = 0
        self.incoming: Incoming | None = None
        self.clear = False  # no swap out reads its pages, or ever will
        self.flying = 0  # chunks under way
        self.short = False  # one of them did not come
        self.events: dict[int, Event] = {}  # behind which so many groups are there
        self.kept_s = 0.0  # when its lease was last looked after
        self.seconds = 0.0  # that its bytes took
        self.outcome = LoadResult(0, settled=False, reason=Reason.TIMED_OUT)  # as long as it is not over
        self._order = order

    @property
    def blocks(self) -> int | None:
        """How many of the blocks will be there; None while that is not known. Good to use is what `result` says."""
        incoming = self.incoming
        return self.outcome.blocks if self.over else incoming.blocks if incoming is not None else None

    def end(self, why: Reason) -> None:
        """See `Swap`."""
        if self.incoming is not None:
            self.incoming.cancelled = True
        super().end(why)

    def touches(self, ids: set[int]) -> bool:
        """See `Swap`."""
        return not self.over and not ids.isdisjoint(self.ids)

    def wait(self, groups: int, timeout_s: float = 1.0) -> bool:
        """Wait until the first `groups` groups of layers of all `blocks` are there; whether they are.

        Only `result` says that they are good: what was computed from others is to be thrown away.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has(groups), flows.nanoseconds("timeout_s", timeout_s) / 1e9)
            return self.groups_done >= groups

    def order(self, stream: object, groups: int, timeout_s: float = 1.0) -> bool:
        """Have a stream of the engine's wait for so many groups; waits itself until their copies are in theirs.

        As `wait` where the daemon copies, and for memory of the host. Raises UsageError.
        """
        seconds = flows.nanoseconds("timeout_s", timeout_s) / 1e9
        with self._changed:
            self._changed.wait_for(lambda: self._has(groups) or groups in self.events, seconds)
            event = self.events.get(groups)
            if event is None or self.groups_done >= groups:
                return self.groups_done >= groups
        self._order(stream, event)
        return True

    def result(self, timeout_s: float = 5.0) -> LoadResult:
        """How it ended. What has not begun by then is cancelled; what hangs even so is not `settled`.

        Raises UsageError for an impossible `timeout_s`.
        """
        self._await(timeout_s)
        with self._changed:
            return self.outcome

    def _has(self, groups: int) -> bool:
        return self.over or self.groups_done >= groups
