"""Slots that clients write themselves (mode direct): who may write where, and what is out of use because of it.

    RESERVE -> begin --COMMIT, ABORT-----> end                    the client has said that it writes there no more
                 |
                 |  the ticket lapses, the session ends
                 v
              strand --COMMIT or ABORT of the lapsed ticket-->  release
                     --the process is gone------------------->  release
                     --the arena is given up----------------->  release (what it still writes goes to the old memory)

A stranded slot belongs to a dropped block and is held, so nothing else is ever put there. All of it is in a table that
outlives the daemon: a successor withholds the slots of processes that live, by number and start time.

    [name u8, records ever used u8] [by position: arena that was ever handed out writable u4] [record] [record] ...
    record   slot, arena, process, its pid namespace u4; its start time u8; row u8, 0 for nobody's

The same table says which arenas were ever writable for clients, also of former lives: those are scrubbed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvproto.limits import SESSIONS, TICKETS_PER_SESSION
from kvstore import blocks
from kvstore.arenas import Arenas, slot_shift
from kvstore.blocks import U4, Tables
from kvstore.ports import Memory
from kvstore.sessions import Process, Session, Ticket
from kvstore.tables import Limits

WRITERS: Final = "writers"  # the table
_NAME: Final = int.from_bytes(b"writers1", "little")
_HEAD_WORDS: Final = 2
RECORD: Final = np.dtype(
    [("slot", "<u4"), ("arena", "<u4"), ("pid", "<u4"), ("space", "<u4"), ("start", "<u8"), ("row", "<u8")]
)
LOOK_NS: Final = 100 * 10**6
NOBODY: Final = Process(0, 0)  # writes a slot in which the scrub found damage: it is out of use with its arena


@dataclass(frozen=True, slots=True)
class Written:
    """A slot of the former life that somebody may still be writing to; `place` is its record."""

    place: int
    row: int
    slot: int
    arena: int
    process: Process


@dataclass(slots=True, eq=False)
class _Stranded:
    owner: Session | Process
    position: int
    ticket: Ticket | None  # the lapsed one that COMMIT or ABORT may yet answer


def _records_max(limits: Limits) -> int:
    """One for each slot that may be on its way: all of DRAM, or all tickets there can be."""
    return min(limits.positions << slot_shift(limits.arena_bytes), SESSIONS * TICKETS_PER_SESSION)


def _marks_bytes(limits: Limits) -> int:
    return -(-4 * limits.positions // 8) * 8


def writers_bytes(limits: Limits) -> int:
    """Of the table that tells a successor who may be writing where."""
    return 8 * _HEAD_WORDS + _marks_bytes(limits) + _records_max(limits) * RECORD.itemsize


class Writers:
    """Those of one store. Owner thread."""

    def __init__(self, limits: Limits, tables: Tables, arenas: Arenas, memory: Memory) -> None:
        self._tables = tables
        self._arenas = arenas
        self._most = _records_max(limits)
        marks_bytes, head_bytes = _marks_bytes(limits), 8 * _HEAD_WORDS
        table = memory.table(WRITERS, writers_bytes(limits))  # pages that nobody has written to cost nothing
        self._head = table[:head_bytes].view(np.uint64)
        self._marks: U4 = table[head_bytes : head_bytes + 4 * limits.positions].view(np.uint32)
        self._records = table[head_bytes + marks_bytes :].view(RECORD)
        self._used = 0
        if int(self._head[0]) == _NAME:
            self._used = min(int(self._head[1]), self._most)
        else:  # a new table, or not one of ours
            self._marks[:] = 0
        self.any_writable = bool(self._marks.any())  # was any arena ever handed out writable, in this life or before?
        self._free: list[int] = []
        self._places: dict[int, int] = {}  # by row
        self._stranded: dict[int, _Stranded] = {}  # by row
        self._leased: set[int] = set()  # of these, the damaged ones that somebody may be reading
        self._look_ns = 0
        self._of: dict[Session | Process, dict[int, None]] = {}
        self._at: dict[int, dict[int, None]] = {}  # by position
        arenas.stranded_at, arenas.let_go = self.stranded_at, self.give_up

    # -- who writes ----------------------------------------------------------------------------------------------

    def room(self) -> int:
        """How many more slots may be written at a time."""
        return len(self._free) + self._most - self._used

    def begin(self, process: Process, rows: U4) -> tuple[U4, U4]:
        """These rows were reserved for a process that writes their slots itself. Before it is told.

        Returns the arena of each, and its slot there.
        """
        count, shift = rows.size, int(self._tables.book[blocks.SHIFT])
        taken = min(count, len(self._free))
        places = self._free[len(self._free) - taken :] + list(range(self._used, self._used + count - taken))
        del self._free[len(self._free) - taken :]
        self._used += count - taken
        assert self._used <= self._most, "more slots are written to than there are"
        slots = self._tables.blocks["slot"][rows]
        arenas: U4 = self._tables.arenas["id"][slots >> np.uint32(shift)]
        records = np.empty(count, dtype=RECORD)
        records["slot"], records["arena"], records["row"] = slots, arenas, rows
        records["pid"], records["space"], records["start"] = process.pid, process.space, process.start
        self._records[places] = records
        self._head[1] = self._used
        self._head[0] = _NAME
        self._places.update(zip(rows.tolist(), places, strict=True))
        return arenas, slots & np.uint32((1 << shift) - 1)

    def end(self, rows: Sequence[int]) -> None:
        """Nobody writes there any more."""
        places = [self._places.pop(row) for row in rows]
        self._records["row"][places] = 0
        self._free += places

    def give(self, session: Session, arenas: Iterable[int]) -> list[int]:
        """Those of some arenas whose writable descriptors a session lacks; from now on it is taken to have them."""
        fresh = sorted(set(arenas) - session.writable.keys())
        for arena in fresh:
            self._marks[self._arenas.positions_by_id[arena]] = arena
            self._head[0] = _NAME
            self.any_writable = True
            self._arenas.gave_writable(session, arena)
        return fresh

    def was_writable(self, position: int) -> bool:
        """Was the arena there ever handed out writable, in this life or before?"""
        return bool(self._marks[position]) and self._marks[position] == self._tables.arenas["id"][position]

    # -- what is out of use --------------------------------------------------------------------------------------

    def strand(self, row: int, owner: Session | Process, ticket: Ticket | None = None) -> None:
        """A dropped block whose slot may still be written to; its hold passes to this room.

        `ticket`: a lapsed one that may yet be answered; it hears, by its block becoming 0, if the slot is given up.
        """
        self._sever(row)
        self._strand(row, owner, ticket)

    def _strand(self, row: int, owner: Session | Process, ticket: Ticket | None) -> None:
        position = int(self._tables.blocks["slot"][row]) >> int(self._tables.book[blocks.SHIFT])
        self._stranded[row] = _Stranded(owner, position, ticket)
        self._of.setdefault(owner, {})[row] = None
        self._at.setdefault(position, {})[row] = None

    def _sever(self, row: int) -> None:
        """A dropped block that nobody reads need not keep what it continued."""
        table = self._tables.blocks
        if table["flags"][row] & blocks.KEEPS:
            parent = int(table["parent"][row])
            table["flags"][row] &= ~blocks.KEEPS
            table["parent"][row] = 0
            blocks.end_hold(self._tables, parent)

    def release(self, row: int) -> None:
        """A stranded slot is free again."""
        stranded = self._stranded.pop(row)
        if stranded.ticket is not None:
            stranded.ticket.block = 0
        of, at = self._of[stranded.owner], self._at[stranded.position]
        del of[row], at[row]
        if not of:
            del self._of[stranded.owner]
        if not at:
            del self._at[stranded.position]
        self._leased.discard(row)
        self.end([row])
        blocks.end_hold(self._tables, row)

    def forget_ticket(self, ticket: Ticket) -> None:
        """A lapsed ticket will not be answered any more: its slot waits for the process alone."""
        self._stranded[ticket.block].ticket = None

    def quarantine(self, row: int) -> None:
        """A published block is damaged, and about to be dropped: its slot is out of use as long as its arena serves.

        Of very many the last are used again: they are looked at again, too, and there must be room for those who store.
        """
        if self.room() <= self._most // 2:
            return
        blocks.hold_rows(self._tables, np.array([row], dtype=np.uint32), 0, 1)
        self.begin(NOBODY, np.array([row], dtype=np.uint32))
        self._strand(row, NOBODY, None)
        self._leased.add(row)  # perhaps: then what it continues is being read, too

    def tick(self, now_ns: int) -> None:
        """Damaged blocks that nobody reads any more."""
        if now_ns < self._look_ns:
            return
        for row in [row for row in self._leased if self._tables.blocks["holds"][row] == 1]:
            self._sever(row)
            self._leased.remove(row)
        self._look_ns = now_ns + LOOK_NS

    def next_ns(self) -> int | None:
        """When `tick` has something to do."""
        return self._look_ns if self._leased else None

    def has(self, owner: Session | Process) -> bool:
        """Does anything wait for this one to be gone?"""
        return owner in self._of

    def gone(self, owner: Session | Process) -> None:
        """The process is gone, and all that it may have been writing."""
        for row in list(self._of.get(owner, ())):
            self.release(row)

    def bequeath(self, session: Session, heir: Session) -> None:
        """Two sessions of one process: what waits for the one to be gone waits for the other."""
        for row in self._of.pop(session, {}):
            self._stranded[row].owner = heir
            self._of.setdefault(heir, {})[row] = None

    def stranded_at(self, position: int) -> int:
        """Slots of an arena that are out of use."""
        return len(self._at.get(position, ()))

    def give_up(self, position: int) -> None:
        """An arena is about to be replaced by another: what is still written to it is nobody's memory."""
        for row in list(self._at.get(position, ())):
            self.release(row)

    def held_rows(self) -> list[int]:
        """Rows of slots that are out of use, each held once."""
        return list(self._stranded)

    @property
    def stranded(self) -> int:
        """Slots that are out of use."""
        return len(self._stranded)

    def stranded_bytes(self) -> int:
        """Bytes of these."""
        pools, arenas = self._tables.pools["slot_bytes"], self._tables.arenas["pool"]
        return sum(len(rows) * int(pools[int(arenas[position]) - 1]) for position, rows in self._at.items())

    # -- a former life -------------------------------------------------------------------------------------------

    def former(self) -> Iterator[Written]:
        """What it left. To be asked once, before `begin`; what is not `keep`t is forgotten."""
        used, self._used = self._used, 0
        for place, record in enumerate(self._records[:used].copy()):
            if record["row"]:
                process = Process(int(record["pid"]), int(record["start"]), int(record["space"]))
                yield Written(place, int(record["row"]), int(record["slot"]), int(record["arena"]), process)
        self._used = used
        kept = set(self._places.values())
        self._free = [place for place in range(used - 1, -1, -1) if place not in kept]
        self._records["row"][self._free] = 0

    def keep(self, written: Written) -> None:
        """Its slot is withheld, and waits for its process to be gone."""
        self._places[written.row] = written.place
        self.strand(written.row, written.process)
