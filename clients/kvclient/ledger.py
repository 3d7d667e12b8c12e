"""Waiting, and counting committed tickets until the daemon has said what became of each. No I/O, clock or threads.

Everything here is guarded by whoever owns the session: a mutex (`connection`) or the event loop (`aio`).
"""

from collections.abc import Callable

from kvclient.results import Reason


class Waiter:
    """Something that a caller waits for until `done`. `wake`, if set, is called once when it should look again."""

    # Class attributes as defaults: requests are made on the hot path.
    done = False
    wake: Callable[[], object] | None = None

    def __init__(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns  # CLOCK_MONOTONIC

    def nudge(self) -> None:
        """Wake the caller; it may find that nothing is done yet."""
        wake, self.wake = self.wake, None
        if wake is not None:
            wake()

    def finish(self) -> None:
        """What was waited for has come."""
        self.done = True
        self.nudge()


class Watcher(Waiter):
    """Waits for something that others change: told of it between `watch` and `leave`."""

    def watch(self) -> None:
        """Start waiting."""
        raise NotImplementedError

    def leave(self) -> None:
        """Stop waiting, done or not."""
        raise NotImplementedError


class Ledger:
    """Tickets that were committed together: by one store (with `parent`), or through one namespace object."""

    __slots__ = ("failed", "out", "parent", "published", "reasons", "watchers")

    def __init__(self, parent: "Ledger | None" = None) -> None:
        self.parent = parent
        self.out = 0  # committed, fate unknown
        self.published = 0  # this and `failed` only grow
        self.failed = 0
        self.reasons: dict[int, Reason] = {}  # of failed tickets; kept for a store only, which ends
        self.watchers: list[Settled] = []

    def commit(self, count: int) -> None:
        """`count` tickets are about to be committed."""
        self.out += count
        if self.parent is not None:
            self.parent.commit(count)

    def settle(self, ticket: int, failure: Reason | None) -> None:
        """One ticket is published (`failure` None) or has failed."""
        self.out -= 1
        if failure is None:
            self.published += 1
        else:
            self.failed += 1
            if self.parent is not None:
                self.reasons[ticket] = failure
        if self.watchers:
            self._notify(ticket)
        if self.parent is not None:
            self.parent.settle(ticket, failure)

    def _notify(self, ticket: int) -> None:
        for watcher in [watcher for watcher in self.watchers if watcher.has_seen(ticket)]:
            self.watchers.remove(watcher)
            watcher.finish()


class Settled(Watcher):
    """Waits until at most `left` tickets of a ledger are out."""

    def __init__(self, ledger: Ledger, left: int, deadline_ns: int) -> None:
        super().__init__(deadline_ns)
        self.ledger = ledger
        self.left = left

    def watch(self) -> None:
        """Start waiting."""
        if self.ledger.out <= self.left:
            self.finish()
        else:
            self.ledger.watchers.append(self)

    def has_seen(self, _ticket: int) -> bool:
        """One more is settled: are these all?"""
        return self.ledger.out <= self.left

    def leave(self) -> None:
        """Stop waiting, done or not."""
        if self in self.ledger.watchers:
            self.ledger.watchers.remove(self)


class OutNow(Settled):
    """Waits for the tickets of a ledger that are out when it begins, whatever is committed meanwhile."""

    def __init__(self, ledger: Ledger, tickets: Callable[[Ledger], set[int]], deadline_ns: int) -> None:
        """`tickets`: those of a ledger that are out."""
        super().__init__(ledger, 0, deadline_ns)
        self._tickets = tickets
        self._out: set[int] = set()

    def watch(self) -> None:
        """Start waiting."""
        self._out = self._tickets(self.ledger)
        if self._out:
            self.ledger.watchers.append(self)
        else:
            self.finish()

    def has_seen(self, ticket: int) -> bool:
        """This one is settled: are these all?"""
        self._out.discard(ticket)
        return not self._out


class Pause(Waiter):
    """Waits for its deadline and nothing else, so that frames are read meanwhile."""
