"""FLUSH: what a session has published becomes durable, whatever admission says. Owner thread.

    published -> remembered in `session.stored` -> FLUSH -> queued for writing -> (durable, failed, evicted, pending)

A block is told of once. What a FLUSH whose time was over has left undecided, the next one speaks of again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from kvproto.errors import LimitError
from kvproto.limits import FLUSHES_PER_SESSION, STORED_PER_SESSION
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.ports import Outbox
from kvstore.sessions import Namespace, Session, Stored, Ticket
from kvstore.tier.commits import Commits
from kvstore.tier.demotion import Demotion

Counts: TypeAlias = tuple[int, int, int, int]  # durable, failed, evicted, pending
Mask: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.bool_]]"

LOOK_ROWS: Final = 4096  # looked at in one go, to see that a FLUSH still waits: 0.3 ms
_ALL: Final = slice(None)


@dataclass(slots=True, eq=False)
class Flush:
    """A FLUSH that waits."""

    session: Session
    namespace: Namespace
    request: int
    rows: U4
    generations: U8
    lost: int
    deadline_ns: int
    settled: int = 0  # rows before this one had nothing to wait for when they were looked at
    written: int = 0  # and those before this one no write


class Flushing:
    """Every FLUSH that waits, and what the next ones are to speak of."""

    def __init__(
        self, tables: Tables, outbox: Outbox, demotion: Demotion, commits: Commits, works: Callable[[], bool]
    ) -> None:
        """`works`: is there a disk tier in this life?"""
        self._tables = tables
        self._outbox = outbox
        self._demotion = demotion
        self._commits = commits
        self._works = works
        self._waiting: list[Flush] = []

    def remember(self, ticket: Ticket, generation: int) -> None:
        """A block became visible: the next FLUSH of its session and namespace speaks of it."""
        stored = ticket.session.stored.setdefault(ticket.namespace.number, Stored())
        if len(stored.rows) >= STORED_PER_SESSION:
            stored.lost += len(stored.rows)
            stored.rows.clear()
            stored.generations.clear()
        stored.rows.append(ticket.block)
        stored.generations.append(generation)

    def flush(self, session: Session, namespace: Namespace, request: int, deadline_ns: int) -> Counts | None:
        """Make what a session has published in a namespace durable. The answer, if there is one already.

        Raises LimitError for too many at once.
        """
        if sum(flush.session is session for flush in self._waiting) >= FLUSHES_PER_SESSION:
            raise LimitError(f"more than {FLUSHES_PER_SESSION} FLUSH at once")
        stored = session.stored.pop(namespace.number, Stored())
        if not self._works():
            return 0, 0, 0, 0
        rows, generations = np.array(stored.rows, dtype=np.uint32), np.array(stored.generations, dtype=np.uint64)
        flush = Flush(session, namespace, request, rows, generations, stored.lost, deadline_ns)
        mine = self._alive(flush) & (self._tables.blocks["disk"][rows] == 0)
        self._demotion.admit(rows[mine].tolist(), generations[mine].tolist())
        counts = self._counts(flush)
        if counts[3]:
            self._waiting.append(flush)
        self._hurry()
        return None if counts[3] else counts

    def _hurry(self) -> None:
        """Writes are to go on for who waits; a commit is to begin once one of them waits for nothing else."""
        self._demotion.hurry = bool(self._waiting)
        self._commits.patient = bool(self._waiting)
        self._commits.urgent = any(not self._wants_writes(flush) for flush in self._waiting)

    def _wants_writes(self, flush: Flush) -> bool:
        for part in _parts(flush, flush.written):
            if self._to_write(flush, part).any():
                flush.written = part.start
                return True
        flush.written = 0  # a block may have to be written again
        return False

    def _waits(self, flush: Flush) -> bool:
        """May more of it become durable? Looks no further than to what tells."""
        for part in _parts(flush, flush.settled):
            if self._to_write(flush, part).any() or self._under_way(flush, self._alive(flush, part), part).any():
                flush.settled = part.start
                return True
        flush.settled = 0
        return False

    def _to_write(self, flush: Flush, part: slice) -> Mask:
        flags = self._tables.blocks["flags"][flush.rows[part]]
        wanted: Mask = self._alive(flush, part) & ((flags & (blocks.QUEUED | blocks.SAVING)) != 0)
        return wanted

    def _alive(self, flush: Flush, part: slice = _ALL) -> Mask:
        table, rows = self._tables.blocks, flush.rows[part]
        state = table["state"][rows]
        live = (state != blocks.FREE) & (state != blocks.DOOMED)
        alive: Mask = live & (table["generation"][rows] == flush.generations[part])
        return alive

    def _counts(self, flush: Flush) -> Counts:
        table = self._tables.blocks
        alive, flags = self._alive(flush), table["flags"][flush.rows]
        durable = int((alive & ((flags & blocks.DURABLE) != 0)).sum())
        pending = int(self._under_way(flush, alive).sum())
        dead = int((~alive).sum())
        return durable, flush.rows.size - durable - pending - dead, dead + flush.lost, pending

    def _under_way(self, flush: Flush, alive: Mask, part: slice = _ALL) -> Mask:
        """Which of its blocks may still become durable."""
        flags = self._tables.blocks["flags"][flush.rows[part]]
        waits = (flags & (blocks.QUEUED | blocks.SAVING)) != 0
        waits |= np.isin(flush.rows[part], self._commits.awaited())
        under_way: Mask = alive & ((flags & blocks.DURABLE) == 0) & waits
        return under_way

    def tick(self, now_ns: int) -> None:
        """Answer those that have nothing to wait for any more, or no time."""
        if not self._waiting:
            return
        answers, waiting = [], []
        for flush in self._waiting:
            if not flush.session.attached:
                continue
            in_time = now_ns < flush.deadline_ns
            if in_time and self._waits(flush):
                waiting.append(flush)
                continue
            counts = self._counts(flush)
            if counts[3] and in_time:  # what had nothing to wait for before has now
                waiting.append(flush)
            else:
                answers.append((flush, counts))
        self._waiting = waiting
        self._hurry()
        for flush, counts in answers:
            self._keep_undecided(flush)
            self._outbox.durable(flush.session, flush.request, counts)

    def _keep_undecided(self, flush: Flush) -> None:
        """The next FLUSH is to speak of these again. Not of those that failed: this one has said so."""
        left = self._under_way(flush, self._alive(flush))
        if left.any():
            stored = flush.session.stored.setdefault(flush.namespace.number, Stored())
            stored.rows += flush.rows[left].tolist()
            stored.generations += flush.generations[left].tolist()

    def next_ns(self) -> int | None:
        """When `tick` has something to do, whatever else happens."""
        return min(flush.deadline_ns for flush in self._waiting) if self._waiting else None


def _parts(flush: Flush, first: int) -> Iterator[slice]:
    """Its rows from `first` on."""
    return (slice(start, start + LOOK_ROWS) for start in range(first, flush.rows.size, LOOK_ROWS))
