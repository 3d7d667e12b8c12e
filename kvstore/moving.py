"""LOAD and SAVE of mode daemon: what may be copied from where to where while threads of the daemon do it. Owner thread.

    load   lease -> [READY: blocks come from disk] -> take: the run is held, the lease given back -> copied -> give_back
    save   reserve a slice -> its slots are written by nobody else -> copied | not_copied, block by block -> fates

A thread that copies knows no deadline, so a LOAD does not read by its lease: it holds the run's ends until the copy has
ended, whatever becomes of the lease, the session, or its process. An arena in which something is held is not unmapped.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvproto.device_frames import Fate
from kvproto.errors import Grant, Outcome
from kvproto.limits import KEYS_PER_FRAME
from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import U4, U8, Tables
from kvstore.leasing import Leasing
from kvstore.reserving import ITEM, Reserving
from kvstore.sessions import Copy, Lease, Namespace, Parked, Session, Stream, Ticket
from kvstore.tables import Limits

_GRANTS_LAST = {Grant.BUSY, Grant.FULL, Grant.QUOTA, Grant.DRAINING, Grant.NO_PARENT}  # nothing after it is granted
_KEY_WORDS = 4


class Place(NamedTuple):
    """Where a block lies: byte `offset` of an arena. `row` and `generation` tell it from all others, ever."""

    arena: int
    offset: int
    row: int
    generation: int


@dataclass(slots=True, eq=False)
class Held:
    """Blocks that stay where they are until `Moving.give_back`."""

    ends: U4
    places: list[Place]


@dataclass(slots=True, eq=False)
class Saving:
    """One SAVE: a chain, its parent's key in front, and what has become of each block."""

    session: Session
    namespace: Namespace
    keys: U8  # a key is four words; the first is the parent's
    rooted: bool  # there is a parent
    count: int
    said_ns: int  # what computing one of these blocks takes; 0: unknown
    next: int = 0  # the first key that was not asked for yet
    fates: list[Fate] = field(default_factory=list)  # by key; CANCELLED until it is known
    index_of: dict[Ticket, int] = field(default_factory=dict)  # those on their way

    def __post_init__(self) -> None:
        self.fates = [Fate.CANCELLED] * self.count


class Moving:
    """What is on its way between DRAM and memory of engines."""

    def __init__(
        self, limits: Limits, tables: Tables, arenas: Arenas, leasing: Leasing, reserving: Reserving
    ) -> None:  # fmt: skip
        self._limits = limits
        self._tables = tables
        self._arenas = arenas
        self._leasing = leasing
        self._reserving = reserving
        self._held: dict[Held, None] = {}
        self._run = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._items = np.zeros(KEYS_PER_FRAME, dtype=ITEM)

    # -- LOAD ----------------------------------------------------------------------------------------------------

    def lease(
        self, session: Session, namespace: Namespace, request: int, keys: U8, at: int, count: int, wait_ns: int
    ) -> "Lease | Parked | Held":
        """What is there of a chain: held at once, or a lease that a stream comes for, or one that has to wait."""
        locations = np.zeros(2 * count, dtype=np.uint32)
        ttl_ns = self._limits.lease_ttl_ns_max
        lease = self._leasing.lease(session, namespace, request, keys, at, count, ttl_ns, wait_ns, locations, 0)
        if isinstance(lease, Parked):
            return lease
        self._leasing.account()
        if lease is None or lease.stream is None:
            return self.take(session, namespace, lease, locations)
        return lease

    def take(self, session: Session, namespace: Namespace, lease: Lease | None, locations: U4) -> Held:
        """Hold the blocks of a lease that nothing more comes for, and give the lease back."""
        held = Held(np.zeros(0, dtype=np.uint32), [])
        if lease is not None and session.leases.get(lease.number) is lease:
            held.ends = lease.ends.copy()
            blocks.hold_rows(self._tables, held.ends, 0, held.ends.size)
            held.places = self._places(locations[: 2 * lease.count], namespace.slot_bytes)
            self._leasing.release(session, [lease.number])
        self._held[held] = None
        return held

    def _places(self, pairs: U4, slot_bytes: int) -> list[Place]:
        """Of (arena, slot) pairs, one behind the other."""
        shift = int(self._tables.book[blocks.SHIFT])
        arenas, slots = pairs[::2].tolist(), pairs[1::2].tolist()
        positions = np.array([self._arenas.positions_by_id[arena] for arena in arenas], dtype=np.int64)
        rows = self._tables.slots["block"][(positions << shift) + pairs[1::2]]
        generations = self._tables.blocks["generation"][rows].tolist()
        whole = zip(arenas, slots, rows.tolist(), generations, strict=True)
        return [Place(arena, slot * slot_bytes, row, generation) for arena, slot, row, generation in whole]

    def hold(self, namespace: Namespace, keys: U8, at: int, count: int) -> Held:
        """What lies in DRAM of a chain right now, for nobody in particular: no lease, and it does not count as used."""
        run, index = self._run, namespace.tenant.index
        end, _, _ = blocks.extend_run(self._tables, index, namespace.number, keys, at, count, 0, run)
        there, _ = blocks.ready_until(self._tables, run[:end].copy(), 0)
        rows: U4 = run[:there].copy()
        blocks.hold_rows(self._tables, rows, 0, rows.size)
        shift = int(self._tables.book[blocks.SHIFT])
        slots = self._tables.blocks["slot"][rows]
        pairs: U4 = np.empty(2 * rows.size, dtype=np.uint32)
        pairs[::2] = self._tables.arenas["id"][slots >> np.uint32(shift)]
        pairs[1::2] = slots & np.uint32((1 << shift) - 1)
        held = Held(rows, self._places(pairs, namespace.slot_bytes))
        self._held[held] = None
        return held

    def come(self, stream: Stream, namespace: Namespace) -> Held:
        """All that a stream brings has come."""
        return self.take(stream.lease.session, namespace, stream.lease, stream.locations)

    def drop(self, session: Session, lease: Lease) -> None:
        """A lease that a stream comes for is not wanted any more."""
        if session.leases.get(lease.number) is lease:
            self._leasing.release(session, [lease.number])

    def give_back(self, held: Held) -> None:
        """Nothing reads there any more."""
        del self._held[held]
        blocks.unhold_rows(self._tables, held.ends, 0, held.ends.size)

    def held_rows(self) -> list[int]:
        """Rows that copies hold, once for each."""
        return [row for held in self._held for row in held.ends.tolist()]

    # -- SAVE ----------------------------------------------------------------------------------------------------

    def save(
        self, session: Session, namespace: Namespace, parent: bytes | None, keys: U8, said_ns: int = 0
    ) -> Saving:  # fmt: skip
        """Begin one; `reserve` does something."""
        front = np.frombuffer(parent or bytes(8 * _KEY_WORDS), dtype=np.uint64)
        count = keys.size // _KEY_WORDS
        return Saving(session, namespace, np.concatenate([front, keys]), parent is not None, count, said_ns)

    def reserve(self, saving: Saving) -> list[tuple[int, Copy]]:
        """As many of the next blocks as there is room for now: (index of the key, where it goes).

        Of no use while some are on their way. None: the SAVE is over, and `fates` says what became of it.
        """
        while saving.next < saving.count and not saving.index_of:
            first = saving.next
            granted = self._ask(saving)
            if granted:
                return granted
            if saving.next == first:  # what is there knows no more of it
                break
        return []

    def _ask(self, saving: Saving) -> list[tuple[int, Copy]]:
        session, first = saving.session, saving.next
        count = min(saving.count - first, KEYS_PER_FRAME)
        parent_at = _KEY_WORDS * first if first or saving.rooted else None
        keys_at = _KEY_WORDS * (first + 1)
        self._reserving.reserve(
            session, saving.namespace, saving.keys, keys_at, count, parent_at, self._items, saving.said_ns
        )
        grants, tickets = self._items["grant"][:count].tolist(), self._items["ticket"][:count].tolist()
        mine: dict[int, int] = {}  # by ticket: index
        for index, (number, ticket) in enumerate(zip(grants, tickets, strict=True), first):
            grant = Grant(number)
            if grant is Grant.GRANTED:
                mine[ticket] = index
            elif grant in _GRANTS_LAST:
                self._stop_at(saving, index, grant, tried=bool(mine))
                break
            else:
                saving.fates[index] = Fate(number)
            saving.next = index + 1
        strays = [ticket for ticket, grant in zip(tickets, grants, strict=True) if grant == Grant.GRANTED]
        self._reserving.abort(session, [ticket for ticket in strays if ticket not in mine])
        copies = self._reserving.commit(session, list(mine))
        for copy in copies:
            saving.index_of[copy.ticket] = mine[copy.ticket.number]
        return [(mine[copy.ticket.number], copy) for copy in copies]

    def _stop_at(self, saving: Saving, index: int, grant: Grant, *, tried: bool) -> None:
        """There is no more room: for now, if some blocks were granted that leave the ring when they are copied."""
        saving.next = index
        if grant is Grant.BUSY and tried:
            return
        after = Fate(grant) if grant in {Grant.BUSY, Grant.NO_PARENT} else Fate.NO_PARENT
        saving.fates[index] = Fate(grant)
        saving.fates[index + 1 :] = [after] * (saving.count - index - 1)
        saving.next = saving.count

    def copied(self, saving: Saving, ticket: Ticket, checksum: int | None, instead: Fate = Fate.CANCELLED) -> None:
        """A block lies in its slot and has this checksum; None: it never will be there, and `instead` says why."""
        session = saving.session
        if checksum is None:
            self._reserving.not_copied(ticket)
        else:
            self._reserving.copied(ticket, checksum)
        index = saving.index_of.pop(ticket)
        outcome = Outcome.DISCARDED
        if session.attached and session.outcomes and session.outcomes[-1][0] == ticket.number:
            outcome = Outcome(session.outcomes.pop()[1])  # nobody was told of this ticket
        if outcome is Outcome.PUBLISHED:
            saving.fates[index] = Fate.SAVED
        else:
            saving.fates[index] = instead if checksum is None else Fate.DISCARDED
