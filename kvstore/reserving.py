"""RESERVE, COMMIT, ABORT: how a block comes to be written, and when it is visible. Owner thread.

    RESERVE -> a row and a slot, a span of the ring, a ticket     (blocks.py; room.py where the pool is full)
    COMMIT  -> the copies that leaf threads run
    copied  -> published, or discarded if it was dropped meanwhile

In mode direct the client writes the slot itself, and leaf threads only hash it. What it may still be writing is
`writers.py`'s to say.

The life of a ticket is drawn in `sessions.py`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from kvproto.errors import Grant, Outcome, TicketError
from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES, TICKETS_PER_SESSION
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.costing import Costing
from kvstore.dropping import Dropping
from kvstore.ports import Clock
from kvstore.room import Room
from kvstore.sessions import IN_PLACE, Copy, Namespace, Session, Tenant, Ticket, TicketState
from kvstore.sweeps import Sweeper
from kvstore.tables import Limits
from kvstore.tally import Tally
from kvstore.tier.demotion import CALM_NS
from kvstore.tier.disk import Disk
from kvstore.wheel import Wheel
from kvstore.writers import Writers

DUE_A_TICK = 256  # tickets that lapse in one tick: about a millisecond
ITEM = np.dtype([("grant", "<u4"), ("page", "<u4"), ("ticket", "<u8")])  # kvproto.frames.RESERVED_ITEM

Items = np.ndarray[tuple[int], np.dtype[np.void]]
Indices = np.ndarray[tuple[int], np.dtype[np.intp]]


class Asked(Protocol):
    """Hears of RESERVEs."""

    def __call__(
        self, namespace: Namespace, keys: U8, at: int, count: int, grants: U4, first_s: float = 0.0, *, by_client: bool
    ) -> None:
        """One was for these keys, of which computing the first takes so long, and so it was answered."""


def _nobody_hears(*_: object, **__: object) -> None:
    pass


class Reserving:
    """All tickets, from RESERVE to their outcome."""

    def __init__(
        self, limits: Limits, tables: Tables, clock: Clock, tally: Tally, sweeper: Sweeper, disk: Disk,
        dropping: Dropping, costing: Costing, writers: Writers, forget: Callable[[Session], None],
    ) -> None:  # fmt: skip
        """`forget` hears of a session that a copy has ended of: it may have been the last thing it had."""
        self.lapsing: Wheel[Ticket] = Wheel()
        self.draining = False  # nothing new is taken
        self.published_ns = -CALM_NS  # when somebody stored last
        self.asked: Asked = _nobody_hears  # `Watching`, of each RESERVE
        self.abandoned: Callable[[int], None] = _nobody_hears  # `Departures`, of a row that will never be whole
        self.landed: Callable[[int], None] = _nobody_hears  # `Remote`, of the row of each block that is visible now
        self.changed: Callable[[Ticket], None] = _nobody_hears  # `Remote`: its bytes are not what they were to be
        self._limits = limits
        self._tables = tables
        self._clock = clock
        self._tally = tally
        self._sweeper = sweeper
        self._disk = disk
        self._make_room = dropping.make_room
        self._costing = costing
        self._writers = writers
        self._forget = forget
        self._answered: tuple[Namespace, U8, int, int] | None = None  # of the last RESERVE, until `account`,
        self._first_s = 0.0  # what computing its first block takes,
        self._by_client = True  # and whether a client's
        self._run = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._grants = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self.arenas: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)  # by key of the last RESERVE in mode direct

    # -- RESERVE -------------------------------------------------------------------------------------------------

    def reserve(
        self, session: Session, namespace: Namespace, keys: U8, at: int, count: int, parent_at: int | None,
        items: Items, said_ns: int = 0,
    ) -> None:  # fmt: skip
        """`answer`, and `account` for it."""
        self.answer(session, namespace, keys, at, count, parent_at, items, said_ns)
        self.account()

    def answer(
        self, session: Session, namespace: Namespace, keys: U8, at: int, count: int, parent_at: int | None,
        items: Items, said_ns: int = 0,
    ) -> None:  # fmt: skip
        """A ticket and a span for each new block of a chain. `items` receives one `ITEM` a key.

        `parent_at`: where in `keys` the parent's key lies, None for a chain from the root. `said_ns`: what the client
        says that computing one of these blocks takes; 0: nothing. In mode direct "page" is a slot, and `arenas` has
        the arena that it lies in.
        """
        index = namespace.tenant.index
        grants = self._grants
        self.arenas[:count] = 0
        items["page"][:count] = 0
        items["ticket"][:count] = 0
        previous, rooted = 0, True
        if parent_at is not None:
            previous = blocks.find_one(self._tables, index, namespace.number, keys, parent_at)
            rooted = previous != 0
        if self._disk.away.any:
            self._give_up_lost(namespace, keys, at, count)
        refusal = None  # of whatever is new; what is there already is known all the same
        if self.draining:
            refusal = Grant.DRAINING
        elif namespace.slot_bytes > session.ring.pages * PAGE_BYTES:
            refusal = Grant.QUOTA  # no span will ever be large enough
        spans = self._spans_free(session, namespace, count) if refusal is None else 0
        prices = self._costing.prices(namespace, previous, said_ns)
        self._answer_keys(session, namespace, keys, at, count, previous, rooted, spans, prices)
        if refusal is not None:
            grants[:count][grants[:count] == Grant.BUSY] = refusal
        items["grant"][:count] = grants[:count]
        granted = np.flatnonzero(grants[:count] == Grant.GRANTED)
        if granted.size:
            self._issue_tickets(session, namespace, granted, items)
        refused = self._tally.count_grants(grants[:count])
        if session.heard is None:  # the daemon asks again and again
            session.tenant.refused += refused
        self._answered, self._first_s, self._by_client = (namespace, keys, at, count), prices[0], session.heard is None

    def _give_up_lost(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """Whoever stores a block that lies on a drive which has been away for long may do so: it goes, and with it what
        continues it.
        """
        index, tables, run = namespace.tenant.index, self._tables, self._run
        found, _ = blocks.match_run(tables.blocks, *index, namespace.number, keys, at, count, run)
        found, _, _ = blocks.extend_run(tables, index, namespace.number, keys, at, count, found, run)
        reach = self._disk.away.reach_lost(run, int(found), self._clock.now_ns())
        if reach < found:
            self._sweeper.drop(namespace.tenant, int(run[reach]))

    def account(self) -> None:
        """Note what the last RESERVE was for, once its answer is on its way; before another one."""
        answered, self._answered = self._answered, None
        if answered is not None:
            self.asked(*answered, self._grants, self._first_s, by_client=self._by_client)

    def _spans_free(self, session: Session, namespace: Namespace, count: int) -> int:
        """How many blocks of a RESERVE the session's ring and tickets, and what its tenant has in flight, allow."""
        free = session.ring.spans_free(namespace.slot_bytes // PAGE_BYTES, count)
        if session.owner is not None:
            free = min(free, self._writers.room())
        return min(free, TICKETS_PER_SESSION - len(session.tickets), count - session.tenant.crowded(count))

    def _answer_keys(
        self, session: Session, namespace: Namespace, keys: U8, at: int, count: int, previous: int, rooted: bool,
        spans: int, prices: tuple[float, float],
    ) -> None:  # fmt: skip
        pool, now = namespace.pool, np.uint64(self._clock.now_ns())
        cost_s, slope_s = prices
        done, may_evict = 0, False
        while True:
            done, previous, spans, evicted = blocks.reserve_run(
                self._tables, namespace.tenant.index, pool.number, namespace.number, keys, at, count, done, previous,
                rooted, spans, may_evict, session.number, now, cost_s, slope_s, self._grants, self._run,
            )  # fmt: skip
            self._tally.evicted += evicted
            if done == count:
                return
            rooted = True
            room = self._make_room(pool, may_evict)
            if room is Room.EVICT:
                may_evict = True
            elif room is Room.BUSY:
                spans = 0  # the rest is BUSY too
            elif room in {Room.FULL, Room.QUOTA}:
                self._grants[done] = Grant.FULL if room is Room.FULL else Grant.QUOTA
                done, previous, rooted = done + 1, 0, False  # the rest has no parent

    def _issue_tickets(self, session: Session, namespace: Namespace, granted: Indices, items: Items) -> None:
        span_pages = namespace.slot_bytes // PAGE_BYTES
        pages = session.ring.take(span_pages, granted.size)
        lapses_ns = self._clock.now_ns() + self._limits.ticket_ttl_ns
        first = session.next_ticket
        session.next_ticket += granted.size
        items["page"][granted] = pages
        if session.owner is not None:
            self._let_write(session, granted, items)
        items["ticket"][granted] = np.arange(first, first + granted.size, dtype=np.uint64)
        rows = self._run[granted].tolist()
        for number, block, page in zip(range(first, first + granted.size), rows, pages, strict=True):
            ticket = Ticket(number, session, namespace, block, page, lapses_ns)
            session.tickets[number] = ticket
            self.lapsing.add(ticket, lapses_ns)
        session.tenant.in_flight += granted.size

    def _let_write(self, session: Session, granted: Indices, items: Items) -> None:
        """Mode direct: the client is told of slots, and that it may be writing there is noted first."""
        assert session.owner is not None, "only of a session in mode direct"
        self.arenas[granted], items["page"][granted] = self._writers.begin(session.owner, self._run[granted])

    # -- COMMIT --------------------------------------------------------------------------------------------------

    def commit(self, session: Session, numbers: Sequence[int]) -> list[Copy]:
        """These spans are filled. Returns the copies to run.

        Raises TicketError for a foreign or reused ticket, before anything is changed: a copy that is begun must run.
        """
        tickets = [self._ticket(session, number) for number in numbers]
        if len(set(numbers)) != len(numbers):
            raise TicketError("a ticket is committed twice in one frame")
        alive: list[Ticket] = []
        states = self._tables.blocks["state"][[ticket.block for ticket in tickets]].tolist()
        for ticket, state in zip(tickets, states, strict=True):
            if ticket.state is TicketState.LAPSED:
                self._let_go(ticket)
                self._close(ticket, Outcome.STALE)
                continue
            self.lapsing.remove(ticket, ticket.lapses_ns)
            if session.owner is not None:
                self._writers.end([ticket.block])
            if state == blocks.DOOMED:
                blocks.end_hold(self._tables, ticket.block)
                self._close(ticket, Outcome.DISCARDED)
                continue
            ticket.state = TicketState.COPYING
            alive.append(ticket)
        session.copies += len(alive)
        return self._copies(session, alive)

    def _copies(self, session: Session, tickets: list[Ticket]) -> list[Copy]:
        tables, shift = self._tables, int(self._tables.book[blocks.SHIFT])
        slots = tables.blocks["slot"][[ticket.block for ticket in tickets]]
        arenas = tables.arenas["id"][slots >> np.uint32(shift)].tolist()
        within = (slots & np.uint32((1 << shift) - 1)).tolist()
        return [
            Copy(
                ticket,
                ticket.page * PAGE_BYTES if session.owner is None else IN_PLACE,
                arena,
                slot * ticket.namespace.slot_bytes,
                ticket.namespace.identity.block_bytes,
            )
            for ticket, arena, slot in zip(tickets, arenas, within, strict=True)
        ]

    def _ticket(self, session: Session, number: int) -> Ticket:
        ticket = session.tickets.get(number)
        if ticket is None or ticket.state is TicketState.COPYING:
            raise TicketError(f"ticket {number} is not this session's, or was used before")
        return ticket

    def copied(self, ticket: Ticket, checksum: int) -> None:
        """A leaf thread has copied and hashed a block: publish it, unless it was dropped meanwhile, or is not what
        was compared before it was copied.
        """
        session = ticket.session
        session.copies -= 1
        now_ns = self._clock.now_ns()
        if not session.attached:
            self._discard(session.tenant, ticket.block)  # whoever wrote it is gone
        elif ticket.checksum not in {None, checksum}:
            self._discard(session.tenant, ticket.block)
            self.changed(ticket)
        alive = blocks.publish(self._tables, ticket.block, np.uint64(checksum), np.uint64(now_ns))
        if alive:
            self._tally.published += 1
            self._tally.published_bytes += ticket.namespace.identity.block_bytes
            self.published_ns = now_ns
            if self._limits.disk.disk_bytes:
                self._disk.published(ticket, now_ns)
            if session.heard is None:  # a client's
                self.landed(ticket.block)
        self._close(ticket, Outcome.PUBLISHED if alive else Outcome.DISCARDED)
        self._forget(session)

    def not_copied(self, ticket: Ticket) -> None:
        """A copy could not be made, or is not wanted any more: the block will never be whole."""
        self._discard(ticket.session.tenant, ticket.block)
        self.copied(ticket, 0)

    def _close(self, ticket: Ticket, outcome: Outcome) -> None:
        session = ticket.session
        session.ring.give(ticket.page, ticket.span_pages)
        del session.tickets[ticket.number]
        session.tenant.in_flight -= 1
        if outcome is Outcome.STALE:
            self._tally.stale += 1
        elif outcome is Outcome.DISCARDED:
            self._tally.discarded += 1
        if session.attached:
            session.outcomes.append((ticket.number, outcome))

    # -- tickets that come to nothing ----------------------------------------------------------------------------

    def abort(self, session: Session, numbers: Sequence[int]) -> None:
        """These spans will not be filled. Raises TicketError for a foreign or reused ticket."""
        for number in numbers:
            self._cancel(self._ticket(session, number))

    def give_up(self, ticket: Ticket) -> None:
        """End a ticket of a closed session; a running copy ends by itself, and for nothing.

        What the client may be writing itself is not free before its process is gone: threads may outlive a socket.
        """
        session = ticket.session
        if session.tickets.get(ticket.number) is not ticket:
            return
        if ticket.state is TicketState.COPYING:
            self._discard(session.tenant, ticket.block)
        elif session.owner is None or session.exited:
            self._cancel(ticket)
        else:
            if ticket.state is TicketState.OPEN:
                self.lapsing.remove(ticket, ticket.lapses_ns)
                self._discard(session.tenant, ticket.block)
                self._writers.strand(ticket.block, session)
            elif ticket.block:
                self._writers.forget_ticket(ticket)
            self._forget_ticket(ticket)

    def lapse(self, now_ns: int) -> list[Ticket]:
        """End reservations whose time is over. Returns their tickets."""
        lapsed = []
        for ticket in self.lapsing.due(now_ns, DUE_A_TICK):
            ticket.state = TicketState.LAPSED
            self._discard(ticket.session.tenant, ticket.block)
            if ticket.session.owner is None:
                blocks.end_hold(self._tables, ticket.block)
            else:
                self._writers.strand(ticket.block, ticket.session, ticket)
                if ticket.session.exited:  # between its end and `give_up`
                    self._writers.release(ticket.block)
            lapsed.append(ticket)
        return lapsed

    def _cancel(self, ticket: Ticket) -> None:
        """The client writes there no more."""
        if ticket.state is TicketState.OPEN:
            self.lapsing.remove(ticket, ticket.lapses_ns)
            if ticket.session.owner is not None:
                self._writers.end([ticket.block])
            self._discard(ticket.session.tenant, ticket.block)
            blocks.end_hold(self._tables, ticket.block)
        else:
            self._let_go(ticket)
        self._forget_ticket(ticket)

    def _let_go(self, ticket: Ticket) -> None:
        """A lapsed ticket is answered: where it was for a slot, that is free now, unless its arena was given up."""
        if ticket.session.owner is not None and ticket.block:
            self._writers.release(ticket.block)

    def _forget_ticket(self, ticket: Ticket) -> None:
        ticket.session.ring.give(ticket.page, ticket.span_pages)
        del ticket.session.tickets[ticket.number]
        ticket.session.tenant.in_flight -= 1

    def _discard(self, tenant: Tenant, block: int) -> None:
        """Drop a block that is being written, and all that waits on it."""
        if self._tables.blocks[block]["state"] != blocks.DOOMED:
            self.abandoned(block)
            self._sweeper.drop(tenant, block, whole=False)
