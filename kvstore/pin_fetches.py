"""What pins want in DRAM, and lies on disk: it is asked for until it is there, or the pin is over. Owner thread.

    a pin begins, or is taken up again -> asked for (`prefetching.py`) -> there
                ^ no place in its tenant's queue: it waits its turn, tenants in turn
                ^ it could not be read: it rests for a minute, and waits its turn then

Each pin waits, rests, is asked for, or wants nothing: there are never more of them than pins.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from kvstore.blocks import Tables
from kvstore.hints.deadlines import Deadlines
from kvstore.pins import Held
from kvstore.ports import Clock
from kvstore.prefetching import Prefetching
from kvstore.sessions import Tenant

ASK: Final = 16  # pins are asked for at a time,
ASK_BLOCKS: Final = 2048  # as long as they cover fewer blocks than that: 0.3 ms
GO_ON_NS: Final = 10 * 10**6  # until the next ones are, where there is a place for them,
LOOK_NS: Final = 100 * 10**6  # and until it is looked again whether there is one
REST_NS: Final = 64 * 10**9  # what could not be read is tried again after this

Waiting = OrderedDict[int, Held]  # by number, who is next first


class PinFetches:
    """Those of one store."""

    def __init__(self, tables: Tables, clock: Clock, prefetching: Prefetching) -> None:
        self._tables = tables
        self._clock = clock
        self._prefetching = prefetching
        self._asked: dict[int, Held] = {}  # by the number of the fetch
        self._waiting: OrderedDict[Tenant, Waiting] = OrderedDict()  # whose turn is next first
        self._resting: Deadlines[Held] = Deadlines()
        self._next_ns = 0  # nobody who waits is asked for before
        prefetching.unreadable = self._unreadable

    def begin(self, pin: Held) -> None:
        """A pin begins, and something of it lies on disk."""
        if not self._ask(pin):
            self.wait(pin)

    def wait(self, pin: Held) -> None:
        """Something of this pin may have to be brought in: it is asked for when it is its turn."""
        self._waiting.setdefault(pin.tenant, OrderedDict())[pin.number] = pin

    def end(self, pin: Held) -> None:
        """It wants nothing any more."""
        if pin.fetch:
            del self._asked[pin.fetch]
            self._prefetching.let_go(pin.fetch)
            pin.fetch = 0
        self._resting.drop(pin)
        waiting = self._waiting.get(pin.tenant)
        if waiting is not None and waiting.pop(pin.number, None) is not None and not waiting:
            del self._waiting[pin.tenant]

    def waiting(self, tenant: Tenant) -> int:
        """Pins of a tenant that wait for their turn."""
        return len(self._waiting.get(tenant, ()))

    def __len__(self) -> int:
        """Pins that have something to bring in, and nobody brings it now."""
        return sum(map(len, self._waiting.values())) + len(self._resting)

    def tick(self, now_ns: int) -> None:
        """Some of those that wait are asked for."""
        for pin in self._resting.due(now_ns, ASK):
            self.wait(pin)
        if self._waiting and now_ns >= self._next_ns:
            self._next_ns = now_ns + (GO_ON_NS if self._ask_some() else LOOK_NS)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None: nothing."""
        rested_ns = self._resting.next_ns()
        if not self._waiting:
            return rested_ns
        return self._next_ns if rested_ns is None else min(self._next_ns, rested_ns)

    def _ask_some(self) -> bool:
        """Those of the first tenant whose queue has a place. False: there is none."""
        tenant = next((each for each in self._waiting if not self._prefetching.full(each)), None)
        if tenant is None:
            return False
        waiting, left, left_blocks = self._waiting.pop(tenant), ASK, ASK_BLOCKS
        while waiting and left > 0 and left_blocks > 0 and not self._prefetching.full(tenant):
            _, pin = waiting.popitem(last=False)
            left, left_blocks = left - 1, left_blocks - pin.rows.size
            if not self._ask(pin):  # it was cut off, and the pin has not heard of that yet
                waiting[pin.number] = pin
        if waiting:
            self._waiting[tenant] = waiting  # the others' turn
        return True

    def _ask(self, pin: Held) -> bool:
        """Have all of it brought in. False: nobody does, and something is missing."""
        keys, count = self._tables.blocks["key"][pin.rows].ravel(), pin.rows.size
        within_ns = max(1, pin.deadline_ns - self._clock.now_ns())
        fetching = self._prefetching.prefetch(
            pin.tenant, pin.namespace, keys, 0, count, within_ns, pin.wanted, kept=True
        )
        if fetching.prefetch:
            pin.fetch, self._asked[fetching.prefetch] = fetching.prefetch, pin
        return bool(fetching.prefetch) or fetching.there == count

    def _unreadable(self, numbers: Iterable[int]) -> None:
        """These fetches ended before all was there."""
        again_ns = self._clock.now_ns() + REST_NS
        for pin in [self._asked.pop(number) for number in numbers]:
            pin.fetch = 0
            self._resting.set(pin, again_ns)
