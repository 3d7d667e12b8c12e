"""Making what was written durable: many writes, one sync, one transaction of the index. Owner thread.

    Save done -> dirty chunk -> Commit (fdatasync of its segments, then the index) -> DURABLE -> FLUSH is answered

One commit runs at a time; what is written meanwhile goes with the next one.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import TypeAlias

import numpy as np

from kvproto.limits import MIB
from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.ports import Workers
from kvstore.sessions import Namespace
from kvstore.tier.format import CHUNK_SLOTS, RECORD
from kvstore.tier.orders import Commit, Name, Outcome
from kvstore.tier.segments import Segments

COMMIT_NS = 50 * 10**6  # how long a write waits for others to be made durable with
# ... while somebody waits for more writes: a commit beside them takes as long as writing 30 MiB, and helps nobody.
PATIENT_NS = 10 * COMMIT_NS
COMMIT_BYTES = 256 * MIB  # or so much of it
PATIENT_BLOCKS = 4096  # or so many blocks while somebody waits for more: then they are marked in one go
TRIES = 4  # commits that a block waits for what it continues, once nobody writes that any more
AGAIN_NS = 5 * 10**6  # how long until a commit that only looks whether that has come
RETRY_NS = 10**9
CHUNKS = 1024  # a commit takes as many at most: 4 MiB for the index


Written: TypeAlias = tuple[int, int, int, int]  # row, generation, place, commits that it waited in vain
Erased: TypeAlias = tuple[int, int]  # place, and the segment that it is of


class Commits:
    """Dirty chunks and the commit that runs."""

    def __init__(
        self, tables: Tables, segments: Segments, workers: Workers, namespaces: dict[int, Namespace],
        wall_s: Callable[[], int], writing: Callable[[], bool], short: Callable[[], bool],
        free: Callable[[int], None],
    ) -> None:  # fmt: skip
        """`writing`: are writes on their way? `short`: do some wait for places? `free` hears of each that the index has
        forgotten.
        """
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._writing = writing
        self._short = short
        self._free = free
        self._namespaces = namespaces
        self._wall_s = wall_s
        self._names: U4 = np.zeros(tables.census.size, dtype=np.uint32)  # the index's number by ours
        self._next_name = 1
        self._new_names: list[Name] = []
        self._dirty: dict[tuple[int, int], None] = {}  # position, chunk
        self._first: dict[tuple[int, int], None] = {}  # of these, in which places became nobody's
        self._written: list[Written] = []  # and not durable yet
        self._bytes = 0
        self._since_ns = 0  # when the oldest of them was written; 0: there is none
        self._running: Commit | None = None
        self._covered: list[Written] = []
        self._taken: list[tuple[int, int]] = []
        self._taken_first: set[tuple[int, int]] = set()
        self._taken_of: dict[int, int] = {}  # their segments by position
        self._failing: set[int] = set()  # segments whose last sync failed, and in which nothing was written since
        self._unsure: dict[int, int] = {}  # rows, and their generations, whose only copy is of before a failed sync
        self._erased: list[Erased] = []  # and the index may know them yet
        self._forgetting: list[Erased] = []  # with the commit that runs
        self.urgent = False  # somebody waits for it, and for nothing else
        self.patient = False  # somebody waits for writes first
        self.commits = 0
        self.faults = 0

    # -- names ---------------------------------------------------------------------------------------------------

    def name(self, namespace: Namespace) -> None:
        """Make sure that the index will know a namespace."""
        if namespace.disk_number:
            return
        namespace.disk_number = self._next_name
        self._next_name += 1
        self._names[namespace.number] = namespace.disk_number
        self._new_names.append(Name(namespace.disk_number, namespace.tenant.name, namespace.identity.canonical()))

    def named(self, namespace: Namespace, number: int) -> None:
        """The index has a number for a namespace already."""
        namespace.disk_number = number
        self._names[namespace.number] = number
        self._next_name = max(self._next_name, number + 1)

    def forget(self, number: int) -> None:
        """A namespace's number will stand for another one."""
        self._names[number] = 0

    # -- what was written ----------------------------------------------------------------------------------------

    def wrote(self, disk: int, row: int, generation: int, slot_bytes: int, now_ns: int) -> None:
        """A block lies on disk."""
        self._failing.discard(self._segments.number_at(disk >> int(self._tables.book[blocks.SHIFT])))
        self._written.append((row, generation, disk, 0))
        self._bytes += slot_bytes
        self.touch(disk, now_ns)

    def touch(self, disk: int, now_ns: int) -> None:
        """What the index says of a place is no longer so."""
        self._dirty[self._chunk_of(disk)] = None
        self._since_ns = self._since_ns or now_ns

    def erased(self, disk: int, now_ns: int) -> None:
        """A place is nobody's, and its header is gone. Not before the index knows may it be written again: if this life
        ended in between, the next one would believe the index, look for the old block there, and know nothing of the
        header of the new one. That would outlive a DELETE, and come back when the index is made anew from headers.
        """
        self._erased.append((disk, self._segments.number_at(disk >> int(self._tables.book[blocks.SHIFT]))))
        self.touch(disk, now_ns)

    def forgot(self, disks: Sequence[int]) -> None:
        """These places are nobody's: what is written again elsewhere is durable once the index has forgotten them, or
        it would know a block in two places, one of them erased. No commit is begun for that.
        """
        chunks = dict.fromkeys(map(self._chunk_of, disks))
        self._first.update(chunks)
        self._dirty.update(chunks)

    @property
    def clean(self) -> bool:
        """Is everything that was written durable?"""
        return self._running is None and not self._written

    def next_ns(self) -> int | None:
        """When `pump` has something to do; None if only an event can help."""
        if self._running is not None or not self._since_ns:
            return None
        patient = self.patient and self._writing()
        enough = len(self._written) >= PATIENT_BLOCKS if patient else self._bytes >= COMMIT_BYTES
        if self.urgent or enough or (self._erased and self._short()):
            return self._since_ns
        return self._since_ns + (PATIENT_NS if patient else COMMIT_NS)

    def pump(self, now_ns: int) -> None:
        """Begin a commit if one is due."""
        due_ns = self.next_ns()
        if due_ns is None or due_ns > now_ns:
            return
        self._taken = list(islice(chain(self._first, (at for at in self._dirty if at not in self._first)), CHUNKS))
        self._taken_first = {place for place in self._taken if place in self._first}
        for place in self._taken:
            del self._dirty[place]
            self._first.pop(place, None)
        self._covered, self._written = self._less_lost(self._written, self._segments.lost), []
        self._forgetting, self._erased = self._erased, []
        if self._dirty:  # the rest goes with the next; blocks of these chunks are durable only when theirs is
            self._split()
        else:
            self._bytes = 0
        self._since_ns = now_ns if self._dirty else 0
        dropped, self._segments.dropped = self._segments.dropped, []
        names, self._new_names = self._new_names, []
        taken = [place for place in self._taken if self._is_told(place[0])]
        self._taken_of = numbers = {position: self._segments.number_at(position) for position, _ in taken}
        chunks = [(numbers[position], chunk, self._pack(position, chunk, now_ns)) for position, chunk in taken]
        # Of what was written before its last sync nothing is left to be synced, and what is gone can be forgotten.
        segments = tuple(number for number in numbers.values() if number not in self._failing)
        self._running = Commit(segments, chunks, names, dropped)
        self._workers.submit([self._running])

    def _is_told(self, position: int) -> bool:
        """Does the index hear of what changes here? Of a segment that is lost it knows enough: it may be back."""
        serves = bool(self._tables.arenas["pool"][position])
        return serves and self._segments.number_at(position) not in self._segments.lost

    def _split(self) -> None:
        self._written = [one for one in self._covered if self._first or self._chunk_of(one[2]) in self._dirty]
        self._covered = [one for one in self._covered if not (self._first or self._chunk_of(one[2]) in self._dirty)]
        self._erased = [one for one in self._forgetting if self._chunk_of(one[0]) in self._dirty]
        self._forgetting = [one for one in self._forgetting if self._chunk_of(one[0]) not in self._dirty]

    def _chunk_of(self, disk: int) -> tuple[int, int]:
        shift = int(self._tables.book[blocks.SHIFT])
        return disk >> shift, (disk & ((1 << shift) - 1)) // CHUNK_SLOTS

    def _pack(self, position: int, chunk: int, now_ns: int) -> bytes:
        records = np.zeros(CHUNK_SLOTS, dtype=RECORD)
        start = chunk * CHUNK_SLOTS
        stop = min(start + CHUNK_SLOTS, int(self._tables.arenas["slots"][position]))
        blocks.pack_records(
            self._tables, position, start, stop, self._names, self._wall_s(), np.uint64(now_ns), records
        )
        return records.tobytes()

    def committed(self, order: Commit, now_ns: int) -> list[int]:
        """A commit has ended. Returns rows that wait for what they continue: it is to be written, too.

        Of a segment whose sync failed the index has heard nothing, and what was written there since the sync before may
        be gone: the kernel tells of that once, so what this commit did not cover is lost as well.
        """
        self._running = None
        self.commits += 1
        forgotten, self._forgetting = self._forgetting, []
        covered, self._covered = self._covered, []
        if order.failed or order.outcome is not Outcome.DONE:
            self.faults += 1
        if order.failed:
            covered = self._less_lost(covered, order.failed)
            self._written = self._less_lost(self._written, order.failed)
            self._failing |= order.failed
        if order.outcome is not Outcome.DONE:
            self._put_back(self._taken, forgotten, now_ns + RETRY_NS)
            self._new_names = order.names + self._new_names
            self._segments.dropped += order.dropped
            self._written = covered + self._written
            return []
        self._give_back([one for one in forgotten if one[1] not in order.failed])
        unheard = [place for place in self._taken if self._taken_of.get(place[0]) in order.failed]
        if unheard:
            self._put_back(unheard, [one for one in forgotten if one[1] in order.failed], now_ns)
        if not self._taken_first.isdisjoint(unheard):  # see `forgot`
            self._written = covered + self._written
            return []
        return self._mark(covered, now_ns)

    def _put_back(self, places: list[tuple[int, int]], forgotten: "list[Erased]", due_ns: int) -> None:
        self._since_ns = due_ns
        self._erased = forgotten + self._erased
        self._first = dict.fromkeys([*places, *self._first])
        self._dirty = dict.fromkeys([*places, *self._dirty])

    def _less_lost(self, written: "list[Written]", failed: set[int]) -> "list[Written]":
        """Those that do not lie where a sync has failed, or what is gone; the others lose their copies."""
        if not failed:
            return written
        shift = int(self._tables.book[blocks.SHIFT])
        lost = {self._segments.position_of.get(number) for number in failed}
        for one in written:
            if one[2] >> shift in lost:
                self._lose(one)
        return [one for one in written if one[2] >> shift not in lost]

    def _give_back(self, forgotten: "list[Erased]") -> None:
        shift = int(self._tables.book[blocks.SHIFT])
        for disk, segment in forgotten:
            if self._segments.position_of.get(segment) == disk >> shift:  # else it is gone, and so is the place
                self._free(disk)

    def places(self) -> set[int]:
        """Those that may be written again once the index has forgotten them."""
        return {disk for disk, _ in [*self._erased, *self._forgetting]}

    def _mark(self, covered: "list[Written]", now_ns: int) -> list[int]:
        rows = np.array([one[0] for one in covered], dtype=np.uint32)
        generations = np.array([one[1] for one in covered], dtype=np.uint64)
        disks = np.array([one[2] for one in covered], dtype=np.uint32)
        left = np.zeros(rows.size, dtype=np.uint32)
        count = int(blocks.mark_durable(self._tables, rows, generations, disks, left))
        again = self._waiting([covered[i] for i in left[:count].tolist()])
        self._written += again
        if self._written:  # perhaps only what the index knew of before these, while these themselves have given up
            self._since_ns = self._since_ns or now_ns + AGAIN_NS
        return [one[0] for one in again]

    def _waiting(self, orphans: list[Written]) -> list[Written]:
        """Which of these, not durable for want of a parent, may yet be. A write can take longer than many commits."""
        table = self._tables.blocks
        self._written += self._above([one[0] for one in orphans])
        rows = [one[0] for one in orphans]
        parents = table["parent"][rows]
        written = np.isin(parents, [one[0] for one in self._written])
        comes = (table["flags"][parents] & (blocks.QUEUED | blocks.SAVING)) != 0
        verdicts: dict[int, bool] = {
            row: True for row, yes in zip(rows, (written | comes).tolist(), strict=True) if yes
        }
        parent_of = dict(zip(rows, parents.tolist(), strict=True))
        for row in rows:  # else it comes if its parent does
            path, at = [], row
            while at in parent_of and at not in verdicts:
                path.append(at)
                at = parent_of[at]
            verdicts.update(dict.fromkeys(path, verdicts.get(at, False)))
        return [
            (row, generation, disk, 0 if verdicts[row] else tries + 1)
            for row, generation, disk, tries in orphans
            if verdicts[row] or tries < TRIES
        ]

    def _above(self, rows: list[int]) -> "list[Written]":
        """What these continue and the index knows, but which is not called durable since something before it was not:
        it can be as soon as that is.
        """
        table = self._tables.blocks
        known = {*rows, *(one[0] for one in self._written)}
        found: list[Written] = []
        for row in rows:
            at = int(table["parent"][row])
            while at and at not in known and not table["flags"][at] & blocks.DURABLE:
                known.add(at)
                disk, generation = int(table["disk"][at]), int(table["generation"][at])
                if disk and not table["flags"][at] & blocks.SAVING and self._unsure.get(at) != generation:
                    found.append((at, generation, disk, 0))
                at = int(table["parent"][at])
        return found

    def _lose(self, one: "Written") -> None:
        """A sync failed: what was written there lately may not be there."""
        row, generation, disk, _ = one
        found = self._tables.blocks[row]
        in_dram = int(found["state"]) in {blocks.RESIDENT, blocks.KEPT}
        same = int(found["generation"]) == generation and int(found["disk"]) == disk
        if same and in_dram and not found["flags"] & blocks.SAVING:
            blocks.detach(self._tables, row)
        elif same:
            self._unsure[row] = generation

    def awaited(self) -> U4:
        """Rows that a commit may yet find durable."""
        return np.array([one[0] for one in [*self._covered, *self._written]], dtype=np.uint32)
