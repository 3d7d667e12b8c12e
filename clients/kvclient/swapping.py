"""Swapping contexts between an engine's pages and the store, chunk by chunk, beside its forward passes.

    swapper = client.swapper(namespace, memory)
    each iteration             client.tick(forward_s)                 so many bytes may hide behind the next pass
    a request pauses           out = swapper.swap_out(keys, pages)
    pages are wanted           swapper.before_reuse(pages)            nobody reads or writes them any more
    a request goes on          back = swapper.swap_in(keys, pages, priority=Priority.URGENT, groups=4)
                               back.wait(1)                           the first quarter of the layers is there
                               back.result()                          all of it is, and is good

`swap_out`, `swap_in`, `tick`, `cancel` and `urge` queue and never wait: threads (`swap_lines.py`) do the rest.
Between two chunks whoever is more urgent goes first, the budget (`swap_budget.py`) is looked at, and a cancelled swap
ends. What the store has is not copied again. A page that a swap still reads or writes goes to no other one: what
fills it waits for what still reads it, and all else is refused.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kvclient import flows
from kvclient.results import LoadResult, Reason
from kvclient.swap_budget import Budget
from kvclient.swap_events import Events
from kvclient.swap_lines import CHUNK_BYTES, InLine, OutLine, Shared
from kvclient.swap_ways import Way
from kvclient.swaps import Priority, Swap, SwapIn, SwapOut
from kvkernels.device.port import DeviceError
from kvproto.errors import ClosedError, UsageError

if TYPE_CHECKING:
    from kvclient.namespace import Namespace

__all__ = ["Swapper", "Swap", "SwapOut", "SwapIn", "Priority"]

SWAPS_MAX: Final = 1024  # that are not over; one of 1,000 blocks is 40 KiB of keys and pages


class Swapper:
    """Made by `Client.swapper`, for one memory and one namespace. Any thread; not in a forked child.

    Its verbs raise ForkError and ClosedError where the client cannot be used any more, and UsageError for arguments
    that cannot be.
    """

    def __init__(
        self, namespace: "Namespace", way: Way, budget: Budget, check: Callable[[], None],
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:  # fmt: skip
        """`check` raises where the client cannot be used any more."""
        self._way = way
        self._check = check
        self._changed = threading.Condition()
        self._shared = Shared(way, budget, max(chunk_bytes, way.pages.block_bytes), self._changed)
        self._outs = OutLine(self._shared, "out")
        self._ins = InLine(self._shared, "in", namespace, self._outs)
        self._events = Events(self._changed)
        self._numbers = 0

    def swap_out(
        self,
        keys: Sequence[bytes],
        pages: Sequence[int],
        parent: bytes | None = None,
        priority: Priority = Priority.LATER,
        stream: object = None,
    ) -> SwapOut:
        """Store the blocks of a chain out of these pages, a page a key. Never waits.

        `parent` as for `Namespace.store`. `stream`: the engine's, whose work so far the pages are the outcome of. They
        stay as they are until the swap is `done`, or `before_reuse` says so. Raises UsageError, also where a swap in
        fills one of the pages: whether what it brings is good is not known yet.
        """
        flows.join_keys(keys if parent is None else (parent, *keys))
        ids = self._checked(keys, pages)
        after = None if stream is None else self._way.stream_event(stream)
        swap = SwapOut(self._changed, keys, ids, Priority(priority), after, parent)
        with self._changed:
            self._refuse_filling(ids)
            if self._number(swap):
                self._outs.put(swap, self._way.lanes)
        return swap

    def swap_in(
        self,
        keys: Sequence[bytes],
        pages: Sequence[int],
        priority: Priority = Priority.SOON,
        groups: int = 1,
        wait_s: float = 1.0,
        stream: object = None,
    ) -> SwapIn:
        """Fill these pages with what is there of a chain, a page a key: of all blocks the first group of layers first.

        Never waits. `wait_s`: how long blocks may take that come from disk, or that this client is still storing.
        `stream`: the engine's, which may still read the pages. Where a swap out still reads some of them, it is waited
        for. What is in a page that is not filled is nobody's. Raises UsageError.
        """
        flows.join_keys(keys)
        flows.nanoseconds("wait_s", wait_s)
        ids = self._checked(keys, pages)
        most = len(self._way.pages.bases)
        if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= most:
            raise UsageError(f"groups must be 1 to {most}, not {groups!r}")
        after = None if stream is None else self._way.stream_event(stream)
        swap = SwapIn(self._changed, keys, ids, Priority(priority), after, groups, wait_s, self._way.order)
        with self._changed:
            self._refuse_filling(ids)
            if self._number(swap):
                self._ins.put(swap, 1)
            else:
                swap.outcome = LoadResult(0, reason=Reason.BUSY)
        return swap

    def conflicts(self, pages: Sequence[int]) -> list[Swap]:
        """Swaps that may read or write one of these pages, now or later. Never waits."""
        with self._changed:
            return self._touching({*pages})

    def before_reuse(self, pages: Sequence[int], timeout_s: float = 1.0, keep: bool = True) -> bool:
        """Wait until no swap reads or writes these pages any more; whether so. Only then may others write to them.

        With `keep` what is still to be stored out of them goes before everything else, and is given up after
        `timeout_s`; without it, at once, as swaps into them are in any case. The chunks under way are waited for as
        long. False: a device or a daemon hangs, and may still write there. Raises UsageError.
        """
        ids = {*pages}
        seconds = flows.nanoseconds("timeout_s", timeout_s) / 1e9
        with self._changed:
            for swap in self._touching(ids):
                if keep and isinstance(swap, SwapOut):
                    swap.priority = Priority.URGENT
                else:
                    swap.end(Reason.TIMED_OUT)
            self._changed.notify_all()
            free = self._changed.wait_for(lambda: not self._touching(ids), seconds)
            if not free:
                for swap in self._touching(ids):
                    swap.end(Reason.TIMED_OUT)
                free = self._changed.wait_for(lambda: not self._touching(ids), seconds)
        return free and ids.isdisjoint(self._way.unsettled())

    def wake(self) -> None:
        """Something of the budget may be left again. Never waits."""
        with self._changed:
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Was it? Never waits."""
        return self._shared.closing

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, and end. What hangs keeps its thread, and its pages."""
        with self._changed:
            self._shared.closing = True
            for swap in (*self._outs.swaps, *self._ins.swaps):
                swap.end(Reason.UNREACHABLE)
            self._changed.notify_all()
        self._outs.stop()
        self._ins.stop()
        self._events.stop()

    def _checked(self, keys: Sequence[bytes], pages: Sequence[int]) -> tuple[int, ...]:
        """Page numbers. Raises UsageError, ClosedError, ForkError."""
        self._check()
        try:
            ids: tuple[int, ...] = tuple(self._way.pages.ids(pages).tolist())
        except (DeviceError, TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        if len(ids) != len(keys) or not ids:
            raise UsageError(f"{len(keys)} keys and {len(ids)} pages")
        if len({*ids}) < len(ids):
            raise UsageError("a page is named twice")
        return ids

    def _number(self, swap: Swap) -> bool:
        """May it be queued? Else it is over. Locked. Raises ClosedError."""
        if self._shared.closing:
            raise ClosedError("the swapper was closed")
        swap.number, self._numbers = self._numbers, self._numbers + 1
        swap.unsettled = self._way.unsettled
        if len(self._outs.swaps) + len(self._ins.swaps) < SWAPS_MAX:
            if swap.after is not None:
                self._events.put(swap)
            return True
        swap.end(Reason.BUSY)
        swap.finish()
        return False

    def _refuse_filling(self, ids: Sequence[int]) -> None:
        mine = {*ids}
        if any(swap.touches(mine) for swap in self._ins.swaps):
            raise UsageError("a swap in may still fill some of these pages; see Swapper.before_reuse")

    def _touching(self, ids: set[int]) -> list[Swap]:
        return [swap for swap in (*self._outs.swaps, *self._ins.swaps) if swap.touches(ids)]
