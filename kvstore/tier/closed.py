"""What of this store nobody can look into in this life: what DELETE cannot erase there goes as a whole.

Segments that the keys at hand do not open, that could not be read at start, or of a size that is not this life's:
nobody can tell there which block is whose key's without reading all headers, and none of it is served in this life. So
who deletes anything of a tenant while such segments of that tenant lie there has all of them removed, and is answered
when they are gone: a key that comes back must not bring back what was deleted. Single slots whose headers could not be
read are erased then. Segments beyond a limit that was lowered leave at once; who deletes waits for them, too.

What could not be erased, since the drive refused or is gone, may be there again with it, and with an index that knows
of no DELETE since. So who deletes waits until a note says, elsewhere, that it is to be erased when it is seen again.
The same holds for segments that the index knows and nobody sees in this life, since their drive was not there at start:
those of a tenant who deletes are noted as a whole. What nobody deletes is served again when it is back. Where nobody
knows which segments there are at all, it is noted that everything of the tenant is to go: that is where the first
directory is not there, or the index is lost while another one is not.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.ports import Workers
from kvstore.tier.erasure import Erasure
from kvstore.tier.orders import EVERY, WHOLE, DropSegment, Outcome, Owe

RUNNING = 16  # removals at a time: each syncs its folder

Waiter = tuple[set[int], Callable[[], None]]  # answered when all of these have ended


class Closed:
    """Which there are, and who waits until they are gone."""

    def __init__(self, workers: Workers, erasure: Erasure, erase: Callable[[int], None]) -> None:
        """`erasure` counts what fails: it is noted before DELETE is answered, and the next one tries again.

        `erase`: a place whose header could not be read.
        """
        self._workers = workers
        self._erasure = erasure
        self._erase = erase
        self._staying: dict[str, list[int]] = {}  # by tenant: there may be thousands, and who deletes has few
        self._unread: dict[str, set[int]] = {}  # places, by tenant
        self._unseen: dict[str, list[int]] = {}  # segments that no directory has, by tenant; empty: nobody knows whose
        self._owed: dict[str, set[tuple[int, int]]] = {}  # places that could not be erased, by tenant
        self._blind = False  # there may be segments of which nobody knows
        self._given_up: set[str] = set()  # tenants of whom it is noted that everything is to go; empty: of all
        self._notes: list[Owe] = []  # that are being written
        self._note_waiters: list[Waiter] = []
        self._queue: deque[tuple[int, str]] = deque()
        self._running: dict[int, str] = {}
        self._leaving: dict[str, set[int]] = {}  # in the queue or running, by tenant
        self._waiters: list[Waiter] = []
        self.removed = 0

    def found(self, tenants: Mapping[int, str]) -> None:
        """These were found at start, each with its tenant."""
        for number, whose in tenants.items():
            self._staying.setdefault(whose, []).append(number)

    def found_unread(self, tenant: str, places: Sequence[int]) -> None:
        """Nobody knows what lies at these places of a tenant; they are nobody's, and quarantined."""
        self._unread.setdefault(tenant, set()).update(places)

    def found_unseen(self, tenants: Mapping[int, str]) -> None:
        """These the index knows, each with its tenant, and were not found, though they may be there."""
        for number, whose in tenants.items():
            self._unseen.setdefault(whose, []).append(number)

    def know_nothing(self) -> None:
        """There may be segments that nobody sees in this life, and nobody knows which."""
        self._blind = True

    def owe(self, segment: int, slot: int, tenant: str) -> None:
        """This place, or all of a segment, could not be erased, and nothing is written there any more in this life."""
        self._owed.setdefault(tenant, set()).add((segment, slot))

    def when_noted(self, answer: Callable[[], None], tenant: str | None = None) -> None:
        """Something of a tenant, None: of all, was dropped: call when what of it is owed was noted, or cannot be."""
        for whose in list(self._owed) if tenant is None else (tenant,):
            places = self._owed.pop(whose, set())
            if places:
                order = Owe(places, whose)
                self._notes.append(order)
                self._workers.submit([order])
        mine = {id(order) for order in self._notes if tenant in (None, order.tenant)}
        if mine:
            self._note_waiters.append((mine, answer))
        else:
            answer()

    def noted(self, order: Owe) -> None:
        """It was, or could not be: then who deletes next has it tried again."""
        self._notes.remove(order)
        if order.outcome is Outcome.DONE and EVERY in order.places:
            self._given_up.add(order.tenant)
        if order.outcome is not Outcome.DONE:
            self._erasure.faults += 1
            self._owed.setdefault(order.tenant, set()).update(order.places)
        for orders, _ in self._note_waiters:
            orders.discard(id(order))
        _answer(self._note_waiters)

    def erase_unread(self, first: int, stop: int) -> None:
        """Of these places no more is to be found: their segment is to go."""
        for places in self._unread.values():
            leaving = [place for place in places if first <= place < stop]
            places.difference_update(leaving)
            self._erase_all(leaving)

    def leave(self, segment: int, tenant: str) -> None:
        """Remove this one now."""
        self._enqueue([segment], tenant)
        self._pump()

    def give_up(self, tenant: str | None) -> None:
        """Begin to remove those of a tenant; None: of all. What cannot be reached is owed."""
        for whose in list(self._staying) if tenant is None else (tenant,):
            self._enqueue(self._staying.pop(whose, []), whose)
        for whose in list(self._unread) if tenant is None else (tenant,):
            self._erase_all(self._unread.pop(whose, ()))
        for whose in list(self._unseen) if tenant is None else (tenant, ""):
            for number in self._unseen.pop(whose, ()):
                self.owe(number, WHOLE, whose if tenant is None else tenant)
        if self._blind and self._given_up.isdisjoint({tenant or "", ""}):
            self.owe(*EVERY, tenant or "")
        self._pump()

    def may_have(self, tenant: str | None) -> bool:
        """May there be anything of a tenant, None: of anybody, that nobody can look into and that has not gone yet?"""
        known = (self._staying, self._unread, self._unseen, self._owed, self._leaving)
        return self._blind or any(of if tenant is None else tenant in of or "" in of for of in known)

    def _enqueue(self, segments: Sequence[int], tenant: str) -> None:
        if segments:
            self._queue.extend((number, tenant) for number in segments)
            self._leaving.setdefault(tenant, set()).update(segments)

    def _erase_all(self, places: Iterable[int]) -> None:
        for place in sorted(places):
            self._erase(place)

    def when_gone(self, answer: Callable[[], None], tenant: str | None = None) -> None:
        """Call when those of a tenant, None: of all, that leave by now have left, or could not."""
        mine = self._leaving.values() if tenant is None else (self._leaving.get(tenant, set()),)
        segments = set().union(*mine)
        if segments:
            self._waiters.append((segments, answer))
        else:
            answer()

    def finished(self, batch: Sequence[DropSegment]) -> list[int]:
        """Files have been removed: these, or segments that were emptied. Returns which of these are gone."""
        mine = [(order, self._running.pop(order.segment)) for order in batch if order.segment in self._running]
        gone = [order.segment for order, _ in mine if order.outcome is Outcome.DONE]
        self.removed += len(gone)
        for order, whose in mine:
            self._ended(order.segment, whose)
            if order.outcome is Outcome.DONE:
                continue
            self._erasure.faults += 1
            self.owe(order.segment, WHOLE, whose)
            if order.outcome is Outcome.FAILED:  # else its directory is gone
                self._staying.setdefault(whose, []).append(order.segment)
        self._pump()
        _answer(self._waiters)
        return gone

    def _ended(self, segment: int, tenant: str) -> None:
        self._leaving[tenant].discard(segment)
        if not self._leaving[tenant]:
            del self._leaving[tenant]
        for segments, _ in self._waiters:
            segments.discard(segment)

    def _pump(self) -> None:
        while self._queue and len(self._running) < RUNNING:
            number, whose = self._queue.popleft()
            self._running[number] = whose
            self._workers.submit([DropSegment(number)])


def _answer(waiters: list[Waiter]) -> None:
    """Those that wait for nothing any more."""
    due = [answer for waited, answer in waiters if not waited]
    waiters[:] = [waiter for waiter in waiters if waiter[0]]
    for answer in due:
        answer()
