"""The remote tier of one store: what is asked of the far side, and what comes back. Owner thread; it never waits.

up     MATCH, LEASE or PREFETCH ends at what is not on this host -> Seek -> threads look for it and read it
       -> Piece, verified -> stored as clients store: RESERVE, COMMIT, leaf threads, published -> there for the next one
down   leased, or published -> remote_writing.py
out    DELETE, clear -> Forget

A miss is answered before any of this begins. All is bounded: seeks, the queue, bytes that are held or on their way.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from kvproto.errors import Grant
from kvproto.errors import Outcome as Landed
from kvproto.limits import KEYS_PER_FRAME
from kvstore import blocks
from kvstore.beyond import Beyond
from kvstore.blocks import U4, U8, Tables
from kvstore.cost import Bandwidth
from kvstore.costing import Costing
from kvstore.ports import Clock
from kvstore.report import ClearScope
from kvstore.reserving import ITEM, Reserving
from kvstore.sessions import Namespace, Session, Tenant, Ticket
from kvstore.tier.remote_format import NO_PARENT, Place, tenant_digest
from kvstore.tier.remote_looking import Looking
from kvstore.tier.remote_orders import Forget, ForgetAll, Keep, Piece, RemoteWorkers, Seek
from kvstore.tier.remote_writing import RemoteAdmission, Writing, place_of, split

SEEKS: Final = 64  # at a time
SEEKS_EACH: Final = 32  # of one tenant: who misses much leaves room to others
ASKED: Final = 4096  # first missing blocks that are remembered
AGAIN_NS: Final = 2 * 10**9  # how long nobody asks again for what begins with the same block
WISHED_AGAIN_NS: Final = 50 * 10**6  # who wants it fetched: another host may be about to write it
BUSY_NS: Final = 5 * 10**6  # until memory that changes hands is asked for again
LAND_TRIES: Final = 200
FORGETTING: Final = 1 << 16  # keys of one namespace that wait to be noted
LINEAGE: Final = 1 << 12  # blocks that a chain may continue where something was deleted: 3 ms to look up, at the worst


@dataclass(slots=True)
class Tally:
    """Totals, in blocks unless the name says otherwise."""

    sought: int = 0  # chains that were asked for
    seeks_dropped: int = 0  # too many at a time, or the far side did not answer
    seeks_empty: int = 0  # nothing of it was there
    promoted: int = 0
    promoted_bytes: int = 0
    known: int = 0  # were stored by somebody else meanwhile
    changed: int = 0  # were not what they had been compared with when they were copied
    no_room: int = 0  # DRAM was full, or the parent gone, when they came
    forgotten: int = 0  # requests to forget
    not_noted: int = 0  # of those: too many at a time, so that their namespaces were closed


_HERE: Final = frozenset({Grant.GRANTED, Grant.KNOWN, Grant.PENDING})


class Remote:
    """All of it. The store owns one, even if nobody carries out what it asks."""

    def __init__(
        self, tables: Tables, clock: Clock, by_number: dict[int, Namespace], reserving: Reserving, costing: Costing,
        session_of: Callable[[Tenant], Session],
    ) -> None:  # fmt: skip
        """`session_of` begins a session of the daemon's own, whose outcomes `landed` hears."""
        self.tally = Tally()
        self.way = Bandwidth()  # what reading from the far side takes
        self.beyond: Beyond | None = None  # who is told what lies over there, if anybody is
        self.writing = Writing(tables, clock, by_number, costing, self.way)
        self.writing.moment = self._moment
        self.looking = Looking(tables, clock, self.writing.there, self._before)
        self._workers: RemoteWorkers | None = None
        self._tables = tables
        self._clock = clock
        self._by_number = by_number
        self._reserving = reserving
        self._session_of = session_of
        self._sessions: dict[Tenant, Session] = {}
        self._asked: OrderedDict[tuple[int, bytes], int] = OrderedDict()
        self._seeks: set[Seek] = set()
        self._under_way: dict[tuple[int, bytes], Seek] = {}  # what they look for: nobody asks for it a second time
        self._pieces: dict[tuple[Tenant, int], tuple[int, Piece]] = {}  # by ticket: row, and where it came from
        self._late: deque[Piece] = deque()  # those that wait for room
        self._late_ns = 0
        self._forgetting: Counter[Place] = Counter()  # keys; a namespace may have another number by then
        self._closing: dict[Place, bool] = {}  # too much was dropped at a time: and has more been since that was said?
        self._forgetting_all: list[ForgetAll] = []
        self._run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._items = np.zeros(KEYS_PER_FRAME, dtype=ITEM)

    def begin(self, workers: RemoteWorkers, admission: RemoteAdmission) -> None:
        """From now on there is a far side."""
        self._workers = self.writing.workers = workers
        self.writing.admission = admission

    @property
    def on(self) -> bool:
        """Is there a far side at all?"""
        return self._workers is not None

    # -- up: looking ---------------------------------------------------------------------------------------------

    def missed(self, namespace: Namespace, keys: U8, at: int, count: int, found: int) -> None:
        """A request's lead run had `found` blocks here, of `count`. `keys[at:]`: 4 words a key. Returns at once."""
        self._look_for(namespace, keys, at, count, found)

    def wished(self, namespace: Namespace, keys: U8, at: int, count: int, found: int) -> None:
        """As `missed`, by somebody who wants it fetched: that it was not there a moment ago does not count."""
        self._look_for(namespace, keys, at, count, found, wished=True)

    def _look_for(
        self, namespace: Namespace, keys: U8, at: int, count: int, found: int, *, wished: bool = False
    ) -> None:
        workers = self._workers
        if workers is None or found >= count or not workers.reading() or self._is_forgetting(namespace):
            return
        now_ns = self._clock.now_ns()
        end, _, writing = blocks.extend_run(
            self._tables, namespace.tenant.index, namespace.number, keys, at, count, found, self._run
        )
        if end == count or writing:
            return
        first = (namespace.number, keys[at + 4 * end : at + 4 * end + 4].tobytes())
        asked_ns = self._asked.get(first, 0)  # in the past, or up to AGAIN_NS from now
        if first in self._under_way or now_ns < asked_ns - (wished and AGAIN_NS - WISHED_AGAIN_NS):
            return
        self._asked[first] = now_ns + AGAIN_NS
        self._asked.move_to_end(first)
        if len(self._asked) > ASKED:
            self._asked.popitem(last=False)
        tenant = namespace.tenant
        if len(self._seeks) >= SEEKS or sum(one.namespace.tenant is tenant for one in self._seeks) >= SEEKS_EACH:
            self.tally.seeks_dropped += 1
            return
        whole = split(keys[at : at + 4 * count].tobytes())
        block_bytes = namespace.identity.block_bytes
        place, moment = place_of(namespace), self._moment()
        row = blocks.find_one(self._tables, tenant.index, namespace.number, keys, at) if end else 0
        before = () if row and not self._tables.blocks["parent"][row] else None
        self.tally.sought += 1
        self._ask(Seek(namespace, place, whole, end, block_bytes, now_ns, moment, wished, before=before))

    def _ask(self, seek: Seek) -> None:
        assert self._workers is not None, "there is a far side"
        seek.since = self.writing.there.moment
        if self._workers.submit(seek):
            self._seeks.add(seek)
            self._under_way |= dict.fromkeys(((seek.namespace.number, key) for key in seek.keys[seek.start :]), seek)
        else:
            self.tally.seeks_dropped += 1

    def sought(self, seek: Seek) -> None:
        """A seek is over."""
        self._seeks.discard(seek)
        for key in seek.keys[seek.start :]:
            if self._under_way.get((seek.namespace.number, key)) is seek:
                del self._under_way[seek.namespace.number, key]
        if seek.read_bytes:  # as a whole: of one piece nobody can say what it took, others were read beside it
            self.way.took(seek.read_bytes, seek.read_s)
        if not (seek.continues and self._ask_again(seek)):
            self.tally.seeks_empty += not seek.found

    def _ask_again(self, seek: Seek) -> bool:
        """With all that a chain continues here: of this tenant something was deleted, and it may be some of that."""
        namespace = seek.namespace
        if self._by_number.get(namespace.number) is not namespace or self._is_forgetting(namespace):
            return False
        before = self._lineage(namespace, seek.continues)
        if before:
            again = replace(seek, asked_ns=self._clock.now_ns(), moment=self._moment(), before=before, continues=b"")
            again.found, again.over, again.late, again.read_bytes, again.read_s = 0, False, 0, 0, 0.0
            self._ask(again)
        return bool(before)

    def _lineage(self, namespace: Namespace, key: bytes) -> tuple[bytes, ...]:
        """A block's key and those of all before it, up to the root; empty: it is not here, or they are too many."""
        words, table = np.frombuffer(key, dtype=np.uint64).copy(), self._tables.blocks
        row = int(blocks.find_one(self._tables, namespace.tenant.index, namespace.number, words, 0))
        rows: list[int] = []
        parents = table["parent"]
        while row and len(rows) < LINEAGE:
            rows.append(row)
            row = parents.item(row)
        return split(table["key"][rows].tobytes()) if rows and not row else ()

    def _before(self, namespace: Namespace, row: int) -> tuple[bytes, ...]:
        """Keys of all that a row continues, from the root on; empty: it is a root, or they are too many."""
        parent = int(self._tables.blocks["parent"][row])
        return self._lineage(namespace, self._tables.blocks["key"][parent].tobytes())[::-1] if parent else ()

    def look(self, namespace: Namespace, rows: U4, within_ns: int) -> tuple[int, str]:
        """`Looking.look`."""
        return self.looking.look(self._workers, namespace, rows, within_ns) if self._workers is not None else (0, "")

    # -- up: landing ---------------------------------------------------------------------------------------------

    def land(self, piece: Piece) -> None:
        """Store what has come, behind what of the same chain waits for room."""
        if piece.seek.late:
            piece.seek.late += 1
            self._late.append(piece)
        else:
            self._store(piece)

    def _store(self, piece: Piece) -> None:
        namespace, seek, workers = piece.seek.namespace, piece.seek, self._workers
        assert workers is not None, "somebody has brought it"
        if self._by_number.get(namespace.number) is not namespace or seek.over or _continues_another(piece):
            seek.over = True
            self._stop(piece)
            return
        keys, parent_at, at = _keys_of(piece)
        count, items = len(piece.contents), self._items
        session = self._session(namespace.tenant)
        self._reserving.reserve(session, namespace, keys, at, count, parent_at, items)
        grants = items["grant"][:count].tolist()
        granted = [i for i in range(count) if grants[i] == Grant.GRANTED]
        tickets = {int(items["ticket"][i]): piece.contents[i] for i in granted}
        self.tally.known += sum(grant in {Grant.KNOWN, Grant.PENDING} for grant in grants)
        later = grants.index(Grant.BUSY) if Grant.BUSY in grants else count
        lost = sum(grant not in _HERE for grant in grants[:later])
        self.tally.no_room += lost
        seek.over |= bool(lost)
        for i, number in zip(granted, tickets, strict=True):
            ticket = session.tickets[number]
            ticket.checksum = piece.checksums[i]
            self._pieces[namespace.tenant, number] = ticket.block, piece
        piece.left += len(tickets)
        copies = self._reserving.commit(session, list(tickets))
        workers.carry([(copy, tickets[copy.ticket.number]) for copy in copies])
        if later < count and not lost and piece.tries < LAND_TRIES:  # memory changes hands: it takes a few milliseconds
            piece.at, piece.contents = piece.at + later, piece.contents[later:]
            piece.checksums = piece.checksums[later:]
            piece.tries += 1
            self._late.appendleft(piece)
            seek.late += 1
            self._late_ns = self._clock.now_ns() + BUSY_NS
        else:
            self.tally.no_room += count - later
            seek.over |= later < count
            piece.contents = []
        self._settle(piece)

    def changed(self, ticket: Ticket) -> None:
        """What was copied is not what was compared: the chain ends before it."""
        assert self._workers is not None, "somebody has brought it"
        _, piece = self._pieces[ticket.session.tenant, ticket.number]
        piece.seek.over = True
        self.tally.changed += 1
        self._workers.changed()

    def landed(self, session: Session, outcomes: Sequence[tuple[int, int]]) -> None:
        """Tickets of one of our sessions have ended."""
        session.stored.clear()  # nobody flushes these
        for number, outcome in outcomes:
            row, piece = self._pieces.pop((session.tenant, number))
            if outcome == Landed.PUBLISHED:
                seek = piece.seek
                self.writing.there.came(np.array([row], dtype=np.uint32), seek.place, seek.since)
                if self.beyond is not None:
                    key = self._tables.blocks["key"][row].tobytes()
                    self.beyond.note(seek.namespace, seek.place, [key], seek.moment)
                self.tally.promoted += 1
                self.tally.promoted_bytes += seek.block_bytes
            piece.left -= 1
            self._settle(piece)

    def _stop(self, piece: Piece) -> None:
        piece.contents = []
        self._settle(piece)

    def _settle(self, piece: Piece) -> None:
        """Give its memory back once nobody copies out of it, or will."""
        if self._workers is not None and not piece.left and not piece.contents:
            self._workers.landed(piece)

    def _session(self, tenant: Tenant) -> Session:
        session = self._sessions.get(tenant)
        if session is None:
            session = self._sessions[tenant] = self._session_of(tenant)
        return session

    # -- out -----------------------------------------------------------------------------------------------------

    def deleted(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """A client has deleted these, and what continues them."""
        if self._workers is not None:
            raw = keys[at : at + 4 * count].tobytes()
            self._forget(namespace, split(raw))

    def cleared(self, scope: ClearScope, namespaces: Iterable[Namespace]) -> None:
        """An operator has dropped all of what a scope names: over there, too, and what nobody has opened here."""
        if self._workers is None:
            return
        for namespace in namespaces:
            if scope.tenant in {None, namespace.tenant.name} and scope.digest in {None, namespace.digest}:
                self._forget(namespace, tuple(scope.keys))
        if not scope.keys:
            below = _all_of(scope)
            self._forgetting_all.append(below)
            self._workers.submit(below)

    def objects(self, scope: ClearScope) -> int | None:
        """How many of this host's objects over there a scope has, as far as is known; None: there is no far side."""
        return self._workers.objects(_all_of(scope)) if self._workers is not None else None

    def _forget(self, namespace: Namespace, keys: tuple[bytes, ...]) -> None:
        """What is on its way here is not wanted any more, and nothing is asked for until that has been noted.

        Of a namespace of which more is deleted than can wait to be noted, that is noted.
        """
        assert self._workers is not None, "there is a far side"
        self.tally.forgotten += 1
        self.forget_namespace(namespace)
        place = place_of(namespace)
        if self.beyond is not None:
            self.beyond.withdraw(namespace.number, keys)
            self.beyond.dropped(place)
        too_many = bool(keys) and self._forgetting[place] + len(keys) > FORGETTING
        if too_many:
            self.tally.not_noted += 1
            if place in self._closing:
                self._closing[place] = True
                return
            self._closing[place] = False
            keys = ()
        self._forgetting[place] += max(1, len(keys))
        self._workers.submit(Forget(namespace, place, keys, too_many))

    def forgot(self, order: Forget | ForgetAll) -> None:
        """It is noted: from now on nothing of it comes from over there."""
        if isinstance(order, ForgetAll):
            self._forgetting_all.remove(order)
            return
        if order.too_many and self._closing.pop(order.place):  # more, since: it is closed once more
            assert self._workers is not None, "somebody has noted it"
            self._closing[order.place] = False
            self._workers.submit(order)
            return
        self._forgetting[order.place] -= max(1, len(order.keys))
        if not self._forgetting[order.place]:
            del self._forgetting[order.place]

    def kept(self, keep: Keep) -> None:
        """A write has ended."""
        self.writing.kept(keep)
        namespace = keep.namespace
        if self.beyond is not None and keep.stored and self._by_number.get(namespace.number) is namespace:
            self.beyond.note(namespace, keep.place, keep.keys[: keep.stored], keep.moment)

    def gone(self, names: Sequence[str]) -> None:
        """These objects are over there no more, or are not what they should be."""
        self.writing.there.gone(names)
        if self.beyond is not None:
            self.beyond.gone(names)

    def _moment(self) -> int:
        return self.beyond.moment if self.beyond is not None else 0

    def _is_forgetting(self, namespace: Namespace) -> bool:
        if not (self._forgetting or self._forgetting_all):
            return False
        place = place_of(namespace)
        return place in self._forgetting or any(one.covers(place.prefix) for one in self._forgetting_all)

    def forget_namespace(self, namespace: Namespace) -> None:
        """Its number goes to another, or some of it was dropped: what is on its way is not wanted any more."""
        for seek in self._seeks:
            seek.over |= seek.namespace is namespace
        for piece in self._late:  # its seek may have ended
            piece.seek.over |= piece.seek.namespace is namespace

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Begin writes for which there is room, and store what waits for it."""
        self.writing.tick(now_ns)
        if self._late and now_ns >= self._late_ns:
            piece = self._late.popleft()
            piece.seek.late -= 1
            self._store(piece)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if only an event can help."""
        due_ns = self.writing.next_ns()
        if not self._late:
            return due_ns
        return self._late_ns if due_ns is None else min(due_ns, self._late_ns)

    @property
    def seeking(self) -> int:
        """Seeks that are under way."""
        return len(self._seeks)


def _all_of(scope: ClearScope) -> ForgetAll:
    return ForgetAll(tenant_digest(scope.tenant) if scope.tenant is not None else None, scope.digest)


def _continues_another(piece: Piece) -> bool:
    """Is this the first block of a chain that continues another one than its seek was allowed for?"""
    seek = piece.seek
    if piece.at or seek.before is None or piece.parent == (seek.before[0] if seek.before else NO_PARENT):
        return False
    if not seek.before:  # it was taken for a root
        seek.continues = piece.parent
    return True


def _keys_of(piece: Piece) -> tuple[U8, int | None, int]:
    """Keys of its blocks with the one before, where there is one: (words, where the parent is, where they begin)."""
    wanted = piece.seek.keys[piece.at : piece.at + len(piece.contents)]
    parent = piece.seek.keys[piece.at - 1] if piece.at else piece.parent
    if parent == NO_PARENT:
        return np.frombuffer(b"".join(wanted), dtype=np.uint64).copy(), None, 0
    return np.frombuffer(b"".join((parent, *wanted)), dtype=np.uint64).copy(), 0, 4
