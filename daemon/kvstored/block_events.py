"""What the owner thread finds changed about blocks, on its way to whoever wants to know.

    owner (kvstore/announcing.py) --tell--> a queue --> this thread --> `BlockLog`, one a tenant --> WatchBlocks (gRPC)
                                                              `-------> sockets of ZeroMQ, where that is wanted

The queue is bounded: the owner is told when it is full, looks at nothing more, and loses nothing by that, since what it
would have found is still in its table. Only who subscribes can miss anything, and sees it by the numbers.

Each tenant's log begins with "all cleared": what former lives of the daemon have told is over. It begins with a number
that none of them has come to (`block_events_numbers.py`), so that who goes on where a former life was is told that,
too. On ZeroMQ, which tells a subscriber nothing of what was before it (re)connected, each new one is greeted: with "all
cleared" again while nothing else was told, and then with a batch of no events, whose number shows that there was
something to miss.

What cannot be told for a fault leaves no gap: readers of a replay take one for its end. The owner is asked to say that
all of that tenant is cleared, and to tell what is there anew.
"""

import logging
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np

from kvstore.announcing import CHANGE, Changes, Place, Told
from kvstored.block_events_address import ANY_TENANT, GRPC, EventsConfig, topic_of
from kvstored.block_events_numbers import Numbers
from kvstored.block_log import REMEMBERED_BYTES, REMEMBERED_BYTES_OF_ALL, BlockLog, EventTally

log = logging.getLogger(__name__)

QUEUED_MOST: Final = 1 << 16  # changes: 5 MB
BATCH_CHANGES: Final = 128  # on ZeroMQ 15 KB mostly, 60 KB at most: what waits for whom is counted in batches
NOTHING: Final[Changes] = np.zeros(0, dtype=CHANGE)
NAMESPACE_DIGITS: Final = 16
LOOK_UP_S: Final = 0.1  # until somebody who wants replay is heard
SOON_S: Final = 0.002  # the same while somebody reads what was replayed
ANEW_S: Final = 10.0  # from one time that all of a tenant is told anew to the next one
COMPLAIN_S: Final = 60.0  # from one word about faults to the next one


class BlockEvents:
    """The queue, the thread and the logs of one daemon."""

    def __init__(
        self,
        config: EventsConfig,
        gid: int | None,
        room: Callable[[], None],
        numbers: Numbers | None = None,
        anew: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Members of `gid` may connect to sockets of ZeroMQ, beside the daemon's user. `numbers`: of all logs; None:
        from 0 on. From the thread, `room` is called when a queue that was full is so no more, and `anew` with a tenant
        of whom something was not told.

        Raises OSError or ValueError where sockets of ZeroMQ are wanted and cannot be.
        """
        self._config = config
        self._room = room
        self._anew = anew
        self._numbers = numbers or Numbers(now=lambda: 0)
        self._untold: set[str] = set()  # tenants of whom something was not told
        self._anew_s: dict[str, float] = {}  # when all of them was told anew last
        self._complained_s = -COMPLAIN_S
        self._told: deque[Told] = deque()
        self._queued = 0  # changes
        self._full = False
        self._news = threading.Condition()  # for all that two threads touch; to notify does not give the GIL away
        self._logs: dict[str, BlockLog] = {}
        self._users: Counter[str] = Counter()  # of logs that might have to go
        self._host = socket.gethostname()
        self._tally = EventTally()  # of this thread, but for watchers
        self._running = self._watched = True
        self._sockets = None
        self._look_up_s = LOOK_UP_S
        if config.listen != GRPC:
            from kvstored.block_events_zmq import Sockets  # noqa: PLC0415  packages that not everybody has

            self._sockets = Sockets(config, gid, self._tally)
        self._thread = threading.Thread(target=self._run, name="block-events", daemon=True)

    def start(self) -> None:
        """Begin to pass on what is told."""
        self._thread.start()

    def stop(self) -> None:
        """Pass on what was told, and end."""
        with self._news:
            self._running = False
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join()
        self.end_watching()
        if self._sockets is not None:
            self._sockets.close()

    def end_watching(self) -> None:
        """Whoever waits for more on the control socket is told that there is none. Any thread."""
        with self._news:
            self._watched = False
            logs = list(self._logs.values())
        for one in logs:
            one.stop()

    def tell(self, told: Told) -> bool:
        """Something was found; is there room for more? Owner thread."""
        with self._news:
            self._told.append(told)
            self._queued += told.changes.size
            self._full = self._queued >= QUEUED_MOST
            self._news.notify()
            return not self._full

    def tally(self) -> EventTally:
        """A copy. Any thread."""
        with self._news:
            return replace(self._tally, waiting=self._queued, number_faults=self._numbers.faults)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Somebody watches on a control socket meanwhile. Any thread."""
        with self._news:
            self._tally.watchers += 1
        try:
            yield
        finally:
            with self._news:
                self._tally.watchers -= 1

    def log_of(self, tenant: str) -> BlockLog:
        """A tenant's log; of one that nothing was told of yet, too. Any thread."""
        with self._news:
            found = self._logs.get(tenant)
            if found is None:
                found = self._logs[tenant] = BlockLog(tenant, self._config.replay, self._numbers.begin)
                self._share()
                if not self._watched:
                    found.stop()
            return found

    @contextmanager
    def log_for(self, tenant: str) -> Iterator[BlockLog]:
        """The same while somebody uses it; after that one is forgotten if nothing was ever told in it: anybody can ask
        for a tenant that there is not. Any thread.
        """
        with self._news:
            self._users[tenant] += 1
        try:
            yield self.log_of(tenant)
        finally:
            with self._news:
                self._users[tenant] -= 1
                if not self._users[tenant]:
                    del self._users[tenant]
                    log_ = self._logs.get(tenant)
                    if log_ is not None and not log_.begun:
                        del self._logs[tenant]
                        self._share()

    def _share(self) -> None:
        for one in self._logs.values():
            one.limit(min(REMEMBERED_BYTES, REMEMBERED_BYTES_OF_ALL // len(self._logs)))

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        first = {self._config.tenant} - {ANY_TENANT}
        for tenant in first.union(self._sockets.tenants if self._sockets is not None else ()):
            self._try(partial(self._begun, tenant), {tenant})
        while self._running or self._told:
            waiting = len(self._told)  # the owner, who told it, does not wait for who wants replay
            for _ in range(max(1, waiting)):
                self._take()
            for tenant in self._due_anew():
                self._try(partial(self._anew, tenant), {tenant})
            if self._sockets is not None:
                self._try(self._answer, set())

    def _answer(self) -> None:
        assert self._sockets is not None
        self._look_up_s = LOOK_UP_S
        self._look_up_s = SOON_S if self._sockets.replay(self._logs) else LOOK_UP_S
        for tenant in self._sockets.subscribed():
            self._try(partial(self._greet, tenant), {tenant})

    def _take(self) -> None:
        """The next that was told; or nothing, if there is none within the time after which to see who wants replay."""
        with self._news:
            if self._running and not self._told:
                self._news.wait(None if self._sockets is None and not self._untold else self._look_up_s)
            if not self._told:
                return
            told = self._told.popleft()
            self._queued -= told.changes.size
            again = self._full and self._queued <= QUEUED_MOST // 2
            self._full = self._full and not again
        if again:
            self._try(self._room, set())
        tenants = {told.cleared} if told.cleared else {place.tenant for place in told.places.values()}
        self._try(partial(self._pass_on, told), tenants)

    def _try(self, act: Callable[[], object], tenants: set[str]) -> None:
        """A fault is counted, one a minute is logged, and all of these tenants is told anew: nobody knows what of it
        they have heard.
        """
        try:
            act()
        except Exception:
            self._untold |= tenants
            self._tally.faults += 1
            now_s = time.monotonic()
            if now_s - self._complained_s >= COMPLAIN_S:
                self._complained_s = now_s
                log.exception("events: something was not told (%d times since the start)", self._tally.faults)

    def _due_anew(self) -> list[str]:
        """Of whom all is to be told anew now: what fails each time is not tried all the time."""
        if not self._untold:
            return []
        now_s = time.monotonic()
        due = [tenant for tenant in self._untold if now_s - self._anew_s.get(tenant, -ANEW_S) >= ANEW_S]
        self._untold.difference_update(due)
        self._anew_s.update(dict.fromkeys(due, now_s))
        return due

    def _pass_on(self, told: Told) -> None:
        if told.cleared:
            self._add(self._begun(told.cleared), NOTHING, None)
        for changes, place in by_place(told):
            for at in range(0, changes.size, BATCH_CHANGES):
                part = changes[at : at + BATCH_CHANGES]
                # A copy where others were told at the same time: a log that remembers few would keep all of theirs.
                self._add(self._begun(place.tenant), part if part.size == told.changes.size else part.copy(), place)

    def _begun(self, tenant: str) -> BlockLog:
        with self.log_for(tenant) as found:
            if not found.begun:
                self._add(found, NOTHING, None)
        return found

    def _greet(self, tenant: str) -> None:
        """Somebody subscribed, who may have listened to a former life, or while it was not connected."""
        its = self._begun(tenant)
        self._add(its, NOTHING, Place(its.tenant, "", "", "", 0) if its.told else None)

    def _add(self, to: BlockLog, changes: Changes, place: Place | None) -> None:
        self._numbers.give(to.next)
        self._tally.batches += 1
        self._tally.changes += changes.size
        if self._sockets is None or self._config.tenant not in (ANY_TENANT, to.tenant):
            to.add(changes, place)
            return
        topic = topic_of(self._config.topic, self._values(to.tenant, place)).encode()
        payload = self._sockets.encode(changes, place)
        self._sockets.send(to.add(changes, place, topic, payload), to.tenant)

    def _values(self, tenant: str, place: Place | None) -> dict[str, str]:
        model, namespace = (place.model, place.digest[:NAMESPACE_DIGITS]) if place is not None else ("", "")
        return {"host": self._host, "tenant": tenant, "model": model, "namespace": namespace}


def by_place(told: Told) -> Iterator[tuple[Changes, Place]]:
    """Stretches of changes of one namespace, in order."""
    numbers = told.changes["namespace"]
    starts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), numbers.size]
    for start, stop in pairwise(starts):
        if stop > start:
            yield told.changes[start:stop], told.places[int(numbers[start])]
