"""Making what was written durable: many writes, one sync, one transaction of the index. Owner thread.

    Save done -> dirty chunk -> Commit (fdatasync of its segments, then the index) -> DURABLE -> FLUSH is answered

One commit runs at a time; what is written meanwhile goes with the next one.
"""

from collections.abc import Callable

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
COMMIT_BYTES = 256 * MIB  # or so much of it
RETRY_NS = 10**9
CHUNKS = 1024  # a commit takes as many at most: 4 MiB for the index


class Commits:
    """Dirty chunks and the commit that runs."""

    def __init__(
        self, tables: Tables, segments: Segments, workers: Workers, namespaces: dict[int, Namespace],
        wall_s: Callable[[], int],
    ) -> None:  # fmt: skip
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._namespaces = namespaces
        self._wall_s = wall_s
        self._names: U4 = np.zeros(tables.census.size, dtype=np.uint32)  # the index's number by ours
        self._next_name = 1
        self._new_names: list[Name] = []
        self._dirty: dict[tuple[int, int], None] = {}  # position, chunk
        self._rows: list[int] = []  # written, and not durable yet
        self._generations: list[int] = []
        self._bytes = 0
        self._since_ns = 0  # when the oldest of them was written; 0: there is none
        self._running: Commit | None = None
        self._covered: tuple[list[int], list[int]] = ([], [])
        self._taken: list[tuple[int, int]] = []
        self.urgent = False  # somebody waits for it
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
        self._rows.append(row)
        self._generations.append(generation)
        self._bytes += slot_bytes
        self.touch(disk, now_ns)

    def touch(self, disk: int, now_ns: int) -> None:
        """What the index says of a place is no longer so."""
        shift = int(self._tables.book[blocks.SHIFT])
        self._dirty[disk >> shift, (disk & ((1 << shift) - 1)) // CHUNK_SLOTS] = None
        self._since_ns = self._since_ns or now_ns

    @property
    def clean(self) -> bool:
        """Is everything that was written durable?"""
        return self._running is None and not self._rows

    def next_ns(self) -> int | None:
        """When `pump` has something to do; None if only an event can help."""
        if self._running is not None or not self._since_ns:
            return None
        return self._since_ns if self.urgent or self._bytes >= COMMIT_BYTES else self._since_ns + COMMIT_NS

    def pump(self, now_ns: int, *, now: bool = False) -> None:
        """Begin a commit if one is due."""
        due_ns = self.next_ns()
        if due_ns is None or (due_ns > now_ns and not now):
            return
        self._taken = list(self._dirty)[:CHUNKS]
        for place in self._taken:
            del self._dirty[place]
        self._covered = (self._rows, self._generations)
        if self._dirty:  # the rest goes with the next; rows of these chunks are durable only when theirs is
            self._covered = self._split()
        else:
            self._rows, self._generations, self._bytes = [], [], 0
        self._since_ns = now_ns if self._dirty else 0
        dropped, self._segments.dropped = self._segments.dropped, []
        names, self._new_names = self._new_names, []
        serving = self._tables.arenas["pool"]
        taken = [place for place in self._taken if serving[place[0]]]
        numbers = {position: self._segments.number_at(position) for position, _ in taken}
        chunks = [(numbers[position], chunk, self._pack(position, chunk, now_ns)) for position, chunk in taken]
        self._running = Commit(tuple(numbers.values()), chunks, names, dropped)
        self._workers.submit([self._running])

    def _split(self) -> tuple[list[int], list[int]]:
        taken, shift = set(self._taken), int(self._tables.book[blocks.SHIFT])
        kept: tuple[list[int], list[int]] = ([], [])
        covered: tuple[list[int], list[int]] = ([], [])
        for row, generation in zip(self._rows, self._generations, strict=True):
            disk = int(self._tables.blocks["disk"][row])
            chunk = (disk >> shift, (disk & ((1 << shift) - 1)) // CHUNK_SLOTS)
            rows, generations = covered if chunk in taken else kept
            rows.append(row)
            generations.append(generation)
        self._rows, self._generations = kept
        return covered

    def _pack(self, position: int, chunk: int, now_ns: int) -> bytes:
        records = np.zeros(CHUNK_SLOTS, dtype=RECORD)
        start = chunk * CHUNK_SLOTS
        stop = min(start + CHUNK_SLOTS, int(self._tables.arenas["slots"][position]))
        blocks.pack_records(
            self._tables, position, start, stop, self._names, self._wall_s(), np.uint64(now_ns), records
        )
        return records.tobytes()

    def committed(self, order: Commit, now_ns: int) -> list[int]:
        """A commit has ended. Returns the segments whose sync failed: what was written there lately may be lost."""
        self._running = None
        self.commits += 1
        rows = np.array(self._covered[0], dtype=np.uint32)
        generations = np.array(self._covered[1], dtype=np.uint64)
        if order.outcome is Outcome.DONE and not order.failed:
            blocks.mark(self._tables, rows, generations, blocks.DURABLE)
            return []
        self.faults += 1
        self._since_ns = now_ns + RETRY_NS
        self._dirty = dict.fromkeys([*self._taken, *self._dirty])
        self._new_names = order.names + self._new_names
        self._segments.dropped += order.dropped
        shift = int(self._tables.book[blocks.SHIFT])
        lost = np.isin(self._tables.arenas["id"][self._tables.blocks["disk"][rows] >> shift], list(order.failed))
        same = self._tables.blocks["generation"][rows] == generations
        again = np.flatnonzero(same & ~lost)
        self._rows += rows[again].tolist()
        self._generations += generations[again].tolist()
        for row in rows[np.flatnonzero(same & lost)].tolist():
            one = self._tables.blocks[row]
            in_dram = int(one["state"]) in {blocks.RESIDENT, blocks.KEPT}
            if in_dram and one["disk"] and not one["flags"] & blocks.SAVING:
                blocks.detach(self._tables, row)
        return sorted(order.failed)
