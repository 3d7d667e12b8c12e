"""Prefetch: what lies on disk is read before it is asked for, as long as nobody waits for the drive. Owner thread.

    PREFETCH keys, within -> queue, the most urgent first -> a piece of a run at a time, while no client waits for reads
                          -> in DRAM -> used, or wasted: evicted or left alone until some time after its deadline

Bounds: one piece on its way at a time, so that a client's read waits for little; bytes a second; and what has been
fetched for a tenant and not been used yet, or fetches would evict one another. Requests for the same chain are one,
as urgent as the most urgent of them, which is over when the last of them is.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

import numpy as np

from kvproto.limits import GIB, KEYS_PER_FRAME, MIB, PREFETCHES_PER_TENANT
from kvproto.policy_frames import Fetching, Tier
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.hints.deadlines import Deadlines
from kvstore.ports import Clock, Randomness
from kvstore.sessions import Missed, Namespace, Tenant, nobody_hears
from kvstore.streams import Streams
from kvstore.watch import FETCHED, Watch

PIECE_BYTES: Final = 8 * MIB
BYTES_PER_S: Final = 2 * GIB
BURST_S: Final = 0.1  # what was not spent may be made up for
UNUSED_SHARE: Final = 4  # of a tenant's memory, one part in so many may be fetched and not used yet
GRACE_NS: Final = 60 * 10**9  # what is not used so long after its deadline was fetched in vain
CLIENTS_FIRST_NS: Final = 2 * 10**6  # how long to wait when clients wait for reads
TRIES: Final = 2  # chains that are looked at at a time: 0.1 ms each
DUE_A_TICK: Final = 64

Key = tuple[int, bytes, bool]


@dataclass(slots=True, eq=False)
class Wanted:
    """One chain to be fetched."""

    number: int
    tenant: Tenant
    namespace: Namespace
    keys: U8
    count: int
    first_ns: int  # by when the most urgent of those who asked wants it: the queue goes by that
    by_ns: int  # by when the most patient one does: then it is late, or in vain
    key: Key
    piece: U4  # what of it is on its way
    kept: bool  # pins want it: it counts against their budget, and is not wasted if nobody uses it
    nearer: bool  # once it is in DRAM, it is to be copied to a GPU
    asked: int = 1  # so many want it, and have not taken that back


@dataclass(slots=True, eq=False)
class _Batch:
    """Blocks that were fetched together. `_batch_of` says by row which of them were not used yet."""

    number: int
    rows: U4
    generations: U8
    slot_bytes: int
    tenant: Tenant
    left: int


@dataclass(slots=True)
class Tally:
    """Totals."""

    asked: int = 0
    refused: int = 0  # too many at once
    merged: int = 0  # the same chain waited already
    cancelled: int = 0
    late: int = 0  # its time was over before it was all there
    no_room: int = 0
    fetched_bytes: int = 0
    used_bytes: int = 0
    wasted_bytes: int = 0


class Prefetching:
    """All prefetches of a store."""

    def __init__(
        self, tables: Tables, clock: Clock, randomness: Randomness, streams: Streams, watch: Watch,
        memory_of: Callable[[Tenant], int], bytes_per_s: int = BYTES_PER_S,
    ) -> None:  # fmt: skip
        """`memory_of`: bytes of DRAM that a tenant has or may have."""
        self.tally = Tally()
        self.missed: Missed = nobody_hears  # `Remote`, of each chain that goes on beyond this host,
        self.wished: Missed = nobody_hears  # and of those that somebody asks for by name
        self.nearer: Callable[[Namespace, U8, int, int], None] = nobody_hears  # `HbmTiers.lift`
        self._tables = tables
        self._clock = clock
        self._streams = streams
        self._watch = watch
        self._memory_of = memory_of
        self._bytes_per_s = bytes_per_s
        self._next = 1 + (randomness.word() >> 2)
        self._wanted: dict[int, Wanted] = {}
        self._by_key: dict[Key, Wanted] = {}
        self._count: Counter[Tenant] = Counter()
        self._running: Wanted | None = None
        self._budget = bytes_per_s * BURST_S
        self._budget_ns = 0
        self._wait_ns = 0  # nothing to do before
        self._queue: list[tuple[int, int]] = []  # by when, and number; of what is over, too
        self._batches: dict[int, _Batch] = {}
        self._next_batch = 1
        self._batch_of: U4 = np.zeros(tables.blocks.size, dtype=np.uint32)  # untouched pages cost nothing
        self._unused: Counter[Tenant] = Counter()  # bytes
        self._due: Deadlines[_Batch] = Deadlines()
        self._run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        watch.tell(FETCHED, self._used)

    # -- verbs ---------------------------------------------------------------------------------------------------

    def prefetch(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, within_ns: int, tier: Tier,
        *, kept: bool = False, wished: bool = False,
    ) -> Fetching:  # fmt: skip
        """Have the lead run of a chain in DRAM within so long, if there is time and room for it. `kept`: it is pinned;
        `wished`: by somebody who asks for just that.

        HBM counts as DRAM where there is no HBM tier; what is wanted on disk is there or cannot be had.
        """
        self.tally.asked += 1
        end, on_disk, _ = blocks.extend_run(self._tables, tenant.index, namespace.number, keys, at, count, 0, self._run)
        if end < count:
            (self.wished if wished else self.missed)(namespace, keys, at, count, end)
        if tier is Tier.HBM:
            self.nearer(namespace, keys, at, end)
        if not on_disk or tier is Tier.DISK:
            return Fetching(0, end, 0)
        by_ns = self._clock.now_ns() + within_ns
        key = (namespace.number, keys[at + 4 * (end - 1) : at + 4 * end].tobytes(), kept)
        same = self._by_key.get(key)
        if same is not None:
            same.asked += 1
            same.nearer |= tier is Tier.HBM
            same.by_ns = max(same.by_ns, by_ns)
            if by_ns < same.first_ns:
                same.first_ns = by_ns
                self._enqueue(same)
            self.tally.merged += 1
            return Fetching(same.number, end - on_disk, on_disk)
        if self._count[tenant] >= PREFETCHES_PER_TENANT:
            self.tally.refused += 1
            return Fetching(0, end - on_disk, 0)
        copied = keys[at : at + 4 * end].copy()
        wanted = Wanted(
            self._next, tenant, namespace, copied, end, by_ns, by_ns, key, self._run[:0], kept, tier is Tier.HBM
        )
        self._next += 1
        self._wanted[wanted.number] = self._by_key[key] = wanted
        self._count[tenant] += 1
        self._enqueue(wanted)
        return Fetching(wanted.number, end - on_disk, on_disk)

    def cancel(self, tenant: Tenant, numbers: Iterable[int]) -> None:
        """One request fewer wants each of these. A piece that is on its way comes all the same."""
        for number in set(numbers):
            wanted = self._wanted.get(number)
            if wanted is not None and wanted.tenant is tenant and not wanted.kept:
                self._take_back(wanted)
                self.tally.cancelled += not wanted.asked

    def let_go(self, number: int) -> None:
        """One pin fewer wants this."""
        wanted = self._wanted.get(number)
        if wanted is not None:
            self._take_back(wanted)

    def forget_namespace(self, namespace: Namespace) -> None:
        """Its number goes to another."""
        for wanted in [each for each in self._wanted.values() if each.namespace is namespace]:
            self._forget(wanted)

    def waiting(self, tenant: Tenant) -> int:
        """Prefetches of a tenant that are not done."""
        return self._count[tenant]

    def _enqueue(self, wanted: Wanted) -> None:
        """It has a turn from now on; one that it had already does no harm."""
        if len(self._queue) > 2 * len(self._wanted) + PREFETCHES_PER_TENANT:  # mostly such, or of cancelled ones
            self._queue = sorted((each.first_ns, each.number) for each in self._wanted.values() if each is not wanted)
        heappush(self._queue, (wanted.first_ns, wanted.number))

    def _take_back(self, wanted: Wanted) -> None:
        wanted.asked -= 1
        if not wanted.asked:
            self._forget(wanted)

    def _forget(self, wanted: Wanted) -> None:
        del self._wanted[wanted.number], self._by_key[wanted.key]
        self._count[wanted.tenant] -= 1
        if not self._count[wanted.tenant]:
            del self._count[wanted.tenant]

    # -- fetching ------------------------------------------------------------------------------------------------

    def go_on(self, now_ns: int) -> None:
        """Reads have ended, or time has passed: note what has come, and begin what is next."""
        self._land()
        for _ in range(TRIES):
            if not self._queue or self._running is not None or now_ns < self._wait_ns:
                return
            if self._streams.awaited:
                self._wait_ns = now_ns + CLIENTS_FIRST_NS
                return
            if not self._afford(now_ns):
                return
            wanted = self._wanted.get(heappop(self._queue)[1])
            if wanted is None:
                continue
            if wanted.by_ns <= now_ns:
                self.tally.late += 1
                self._forget(wanted)
            else:
                self._begin(wanted, now_ns)

    def _afford(self, now_ns: int) -> bool:
        passed_s = (now_ns - self._budget_ns) / 1e9 if self._budget_ns else BURST_S
        self._budget_ns = now_ns
        self._budget = min(self._bytes_per_s * BURST_S, self._budget + passed_s * self._bytes_per_s)
        if self._budget > 0:
            return True
        self._wait_ns = now_ns + 1 + int(-self._budget / self._bytes_per_s * 1e9)
        return False

    def _begin(self, wanted: Wanted, now_ns: int) -> None:
        """Send the next piece of a chain on its way; or be done with it."""
        namespace, state = wanted.namespace, self._tables.blocks["state"]
        end, _, _ = blocks.extend_run(
            self._tables, wanted.tenant.index, namespace.number, wanted.keys, 0, wanted.count, 0, self._run
        )
        run = self._run[:end].copy()
        missing = np.flatnonzero(state[run] == blocks.DISK)
        most = PIECE_BYTES
        if not wanted.kept:
            most = min(most, self._memory_of(wanted.tenant) // UNUSED_SHARE - self._unused[wanted.tenant])
        most //= namespace.slot_bytes
        if wanted.kept:
            most = max(1, most)
        if not missing.size or most <= 0:
            self.tally.no_room += bool(missing.size)
            if wanted.nearer:
                self.nearer(namespace, wanted.keys, 0, wanted.count)
            self._forget(wanted)
            return
        start = int(missing[0])
        stop = int(missing[: max(1, most)][-1]) + 1
        reached = self._streams.fetch(namespace, run, start, stop, now_ns)
        piece = run[missing[(missing >= start) & (missing < reached)]]
        self._budget -= piece.size * namespace.slot_bytes
        if not piece.size:
            self.tally.no_room += 1
            self._forget(wanted)
            return
        wanted.piece = piece
        self._running = wanted

    def _land(self) -> None:
        """Is the piece that was on its way there?"""
        wanted = self._running
        if wanted is None:
            return
        table = self._tables.blocks
        states = table["state"][wanted.piece]
        if (states == blocks.LOADING).any():
            return
        self._running = None
        if not wanted.kept:
            self._note(wanted, wanted.piece[states == blocks.RESIDENT])
        if wanted.number not in self._wanted:
            return
        if (states != blocks.RESIDENT).any():  # it cannot be read
            self._forget(wanted)
        else:
            self._enqueue(wanted)

    # -- used, or not --------------------------------------------------------------------------------------------

    def _note(self, wanted: Wanted, rows: U4) -> None:
        """These were fetched, and wait to be used."""
        if not rows.size:
            return
        rows = np.unique(rows)
        self._settle(rows[self._batch_of[rows] != 0], used=False)  # their rows were others' before
        generations = self._tables.blocks["generation"][rows]
        batch = _Batch(self._next_batch, rows, generations, wanted.namespace.slot_bytes, wanted.tenant, rows.size)
        self._next_batch = self._next_batch % 0xFFFFFFFF + 1
        self._batches[batch.number] = batch
        self._batch_of[rows] = batch.number
        self._due.set(batch, wanted.by_ns + GRACE_NS)
        self._watch.mark(rows, FETCHED)
        self._unused[wanted.tenant] += rows.size * batch.slot_bytes
        self.tally.fetched_bytes += rows.size * batch.slot_bytes

    def served(self, rows: U4) -> None:
        """What they were fetched for is done, though nobody leased them: others may be fetched in their place."""
        self._settle(rows[self._batch_of[rows] != 0], used=True)

    def _used(self, rows: U4) -> None:
        """Rows that `Watch` marks as fetched were leased."""
        self._settle(rows, used=True)

    def _settle(self, rows: U4, *, used: bool) -> None:
        """Count them, as used if they still hold what was fetched."""
        if not rows.size:
            return
        rows = np.unique(rows)
        numbers = self._batch_of[rows]
        for number in np.unique(numbers).tolist():
            batch = self._batches[number]
            mine = rows[numbers == number]
            good = 0
            if used:
                place = np.searchsorted(batch.rows, mine)
                good = int((self._tables.blocks["generation"][mine] == batch.generations[place]).sum())
            self.tally.used_bytes += good * batch.slot_bytes
            self.tally.wasted_bytes += (mine.size - good) * batch.slot_bytes
            self._unused[batch.tenant] -= mine.size * batch.slot_bytes
            if not self._unused[batch.tenant]:
                del self._unused[batch.tenant]
            batch.left -= mine.size
            if not batch.left:
                del self._batches[number]
                self._due.drop(batch)
        self._batch_of[rows] = 0
        self._watch.unmark(rows, FETCHED)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """What was not used in time was fetched in vain; what is next begins."""
        for batch in list(self._due.due(now_ns, DUE_A_TICK)):
            self._settle(batch.rows[self._batch_of[batch.rows] == batch.number], used=False)
        self.go_on(now_ns)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if only an event can help."""
        due_ns = self._due.next_ns()
        if not self._queue or self._running is not None:
            return due_ns
        return self._wait_ns if due_ns is None else min(due_ns, self._wait_ns)
