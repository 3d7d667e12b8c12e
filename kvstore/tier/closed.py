"""Segments of this store that the keys at hand do not open: what DELETE cannot erase in them goes with them.

Nobody can tell there which block is whose key's without reading all headers, and none of it is served in this life. So
who deletes anything of a tenant while such segments of that tenant lie there has all of them removed, and is answered
when they are gone: a key that comes back must not bring back what was deleted. Owner thread.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from kvstore.ports import Workers
from kvstore.tier.erasure import Erasure
from kvstore.tier.orders import DropSegment, Outcome

RUNNING = 16  # removals at a time: each syncs its folder


class Closed:
    """Which there are, and who waits until they are gone."""

    def __init__(self, workers: Workers, erasure: Erasure) -> None:
        """`erasure` counts what fails: DELETE is answered all the same, and the next one tries again."""
        self._workers = workers
        self._erasure = erasure
        self._staying: dict[str, list[int]] = {}  # by tenant: there may be thousands, and who deletes has few
        self._queue: deque[tuple[int, str]] = deque()
        self._running: dict[int, tuple[int, str]] = {}  # how many had been sent before each, and whose it is
        self._sent = 0
        self._waiters: list[tuple[int, Callable[[], None]]] = []  # answered when so many have been sent, and have ended
        self.removed = 0

    def found(self, tenants: Mapping[int, str]) -> None:
        """These were found at start, each with its tenant."""
        for number, whose in tenants.items():
            self._staying.setdefault(whose, []).append(number)

    def give_up(self, tenant: str | None) -> None:
        """Begin to remove those of a tenant; None: of all."""
        for whose in list(self._staying) if tenant is None else (tenant,):
            self._queue.extend((number, whose) for number in self._staying.pop(whose, ()))
        self._pump()

    def when_gone(self, answer: Callable[[], None]) -> None:
        """Call when those that leave by now have left, or could not."""
        if self._running:
            self._waiters.append((self._sent + len(self._queue), answer))
        else:
            answer()

    def finished(self, batch: Sequence[DropSegment]) -> None:
        """Files have been removed: these, or segments that were emptied."""
        mine = [(order, *self._running.pop(order.segment)) for order in batch if order.segment in self._running]
        for order, _, whose in mine:
            if order.outcome is Outcome.DONE:
                self.removed += 1
                continue
            self._erasure.faults += 1
            if order.outcome is Outcome.FAILED:  # else its directory is gone
                self._staying.setdefault(whose, []).append(order.segment)
        self._pump()
        done = min((before for before, _ in self._running.values()), default=self._sent)
        due = [answer for barrier, answer in self._waiters if barrier <= done]
        self._waiters = [waiter for waiter in self._waiters if waiter[0] > done]
        for answer in due:
            answer()

    def _pump(self) -> None:
        while self._queue and len(self._running) < RUNNING:
            number, whose = self._queue.popleft()
            self._running[number] = (self._sent, whose)
            self._sent += 1
            self._workers.submit([DropSegment(number)])
