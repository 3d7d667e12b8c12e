"""Prefetch: what lies on disk is read before it is asked for, as long as nobody waits for the drive. Owner thread.

    PREFETCH keys, within -> its tenant's queue, the most urgent first -> a piece of a run at a time, tenants in turn,
                             while no client waits for reads
                          -> in DRAM -> used, or wasted (fetched.py)

Bounds: one piece on its way at a time, so that a client's read waits for little; bytes a second; and what has been
fetched for a tenant and not been used yet, or fetches would evict one another. Requests for the same chain are one,
as urgent as the most urgent of them, which is over when the last of them is. Each has a number of its own: whoever
takes one back twice takes back nobody else's.

What pins want is wanted as long as they last, so it is as urgent as what is wanted within seconds, never too late, and
tried again where there is no room for it now; where it is refused or cannot be read, `pin_fetches.py` asks again later.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final

import numpy as np

from kvproto.limits import GIB, KEYS_PER_FRAME, MIB, PREFETCHES_PER_TENANT
from kvproto.policy_frames import Fetching, Tier
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.fetched import Bytes, Fetched
from kvstore.hints.deadlines import Deadlines
from kvstore.ports import Clock, Randomness
from kvstore.sessions import Missed, Namespace, Tenant, nobody_hears
from kvstore.streams import Streams
from kvstore.watch import Watch

PIECE_BYTES: Final = 8 * MIB
BYTES_PER_S: Final = 2 * GIB
BURST_S: Final = 0.1  # what was not spent may be made up for
UNUSED_SHARE: Final = 4  # of a tenant's memory, one part in so many may be fetched and not used yet
PINNED_NS: Final = 5 * 10**9  # by when pins want what they keep: before prefetches for later than that, whoever comes
AGAIN_NS: Final = 10**9  # where there was no room for it, after this, and twice as long each time that there is none,
AGAIN_NS_MAX: Final = 64 * 10**9  # up to this: 0.1 ms each
CLIENTS_FIRST_NS: Final = 2 * 10**6  # how long to wait when clients wait for reads
ASKED: Final = 64  # numbers that one chain has; who asks for it beyond that cannot take that back
TRIES: Final = 2  # chains that are looked at at a time: 0.1 ms each
DUE_A_TICK: Final = 64  # of those whose turn comes again

Key = tuple[int, bytes, bool]


@dataclass(slots=True, eq=False)
class Wanted:
    """One chain to be fetched."""

    number: int  # in queues
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
    asked: set[int] = field(default_factory=set)  # numbers of those who want it, and have not taken that back
    lasts: bool = False  # some who want it have none
    looked: int = 0  # at so many batches, whether they are still there, since it had no room
    again_ns: int = AGAIN_NS  # how long to wait if there is no room


@dataclass(slots=True)
class Tally(Bytes):
    """Totals."""

    asked: int = 0
    refused: int = 0  # too many at once
    merged: int = 0  # the same chain waited already
    cancelled: int = 0
    late: int = 0  # its time was over before it was all there
    no_room: int = 0


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
        self.unreadable: Callable[[Iterable[int]], None] = nobody_hears  # `PinFetches`, of what pins want
        self._tables = tables
        self._clock = clock
        self._streams = streams
        self._memory_of = memory_of
        self._bytes_per_s = bytes_per_s
        self._next = 1 + (randomness.word() >> 2)
        self._wanted: dict[int, Wanted] = {}
        self._asked: dict[int, Wanted] = {}  # by the number of each request
        self._by_key: dict[Key, Wanted] = {}
        self._count: Counter[tuple[Tenant, bool]] = Counter()  # what pins want counts apart: 8 MiB more
        self._running: Wanted | None = None
        self._budget = bytes_per_s * BURST_S
        self._budget_ns = 0
        self._wait_ns = 0  # nothing to do before
        # By tenant, who is next first: by when, and number; of what is over, too.
        self._queues: OrderedDict[Tenant, list[tuple[int, int]]] = OrderedDict()
        self._again: Deadlines[Wanted] = Deadlines()  # there was no room for it
        self._fetched = Fetched(tables, watch, self.tally)
        self._run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)

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
        first_ns = by_ns - within_ns + min(within_ns, PINNED_NS) if kept else by_ns
        key = (namespace.number, keys[at + 4 * (end - 1) : at + 4 * end].tobytes(), kept)
        same = self._by_key.get(key)
        if same is not None:
            same.nearer |= tier is Tier.HBM
            same.by_ns = max(same.by_ns, by_ns)
            if first_ns < same.first_ns:
                same.first_ns = first_ns
                self._enqueue(same)
            self.tally.merged += 1
            return Fetching(self._ask(same), end - on_disk, on_disk)
        if self._count[tenant, kept] >= PREFETCHES_PER_TENANT:
            self.tally.refused += 1
            return Fetching(0, end - on_disk, 0)
        copied = keys[at : at + 4 * end].copy()
        wanted = Wanted(
            self._next, tenant, namespace, copied, end, first_ns, by_ns, key, self._run[:0], kept, tier is Tier.HBM
        )
        self._next += 1
        self._wanted[wanted.number] = self._by_key[key] = wanted
        self._count[tenant, kept] += 1
        self._enqueue(wanted)
        return Fetching(self._ask(wanted), end - on_disk, on_disk)

    def cancel(self, tenant: Tenant, numbers: Iterable[int]) -> None:
        """One request fewer wants each of these. A piece that is on its way comes all the same."""
        for number in set(numbers):
            wanted = self._asked.get(number)
            if wanted is not None and wanted.tenant is tenant and not wanted.kept:
                self._take_back(wanted, number)
                self.tally.cancelled += wanted.number not in self._wanted

    def let_go(self, number: int) -> None:
        """One pin fewer wants this."""
        wanted = self._asked.get(number)
        if wanted is not None:
            self._take_back(wanted, number)

    def forget_namespace(self, namespace: Namespace) -> None:
        """Its number goes to another."""
        for wanted in [each for each in self._wanted.values() if each.namespace is namespace]:
            self._forget(wanted)

    def waiting(self, tenant: Tenant) -> int:
        """Prefetches of a tenant that are not done."""
        return self._count[tenant, False] + self._count[tenant, True]

    def full(self, tenant: Tenant) -> bool:
        """Would one thing more that pins of a tenant want be refused?"""
        return self._count[tenant, True] >= PREFETCHES_PER_TENANT

    def served(self, rows: U4) -> None:
        """What they were fetched for is done, though nobody leased them: others may be fetched in their place."""
        self._fetched.served(rows)

    def _enqueue(self, wanted: Wanted) -> None:
        """It has a turn from now on; one that it had already does no harm."""
        queue = self._queues.setdefault(wanted.tenant, [])
        if len(queue) > 2 * self.waiting(wanted.tenant) + PREFETCHES_PER_TENANT:  # mostly such, or of cancelled ones
            numbers = {number for _, number in queue} - {wanted.number}
            waiting = [self._wanted[number] for number in numbers if number in self._wanted]
            queue[:] = sorted((each.first_ns, each.number) for each in waiting)
        heappush(queue, (wanted.first_ns, wanted.number))

    def _ask(self, wanted: Wanted) -> int:
        """One request more for this: its number; 0 if there are too many to tell them apart."""
        if len(wanted.asked) >= ASKED and not wanted.kept:  # there are only so many pins
            wanted.lasts = True
            return 0
        number, self._next = self._next, self._next + 1
        wanted.asked.add(number)
        self._asked[number] = wanted
        return number

    def _take_back(self, wanted: Wanted, number: int) -> None:
        wanted.asked.remove(number)
        del self._asked[number]
        if not wanted.asked and not wanted.lasts:
            self._forget(wanted)

    def _forget(self, wanted: Wanted) -> None:
        del self._wanted[wanted.number], self._by_key[wanted.key]
        for number in wanted.asked:
            del self._asked[number]
        self._again.drop(wanted)
        count = wanted.tenant, wanted.kept
        self._count[count] -= 1
        if not self._count[count]:
            del self._count[count]

    # -- fetching ------------------------------------------------------------------------------------------------

    def go_on(self, now_ns: int) -> None:
        """Reads have ended, or time has passed: note what has come, and begin what is next."""
        self._land()
        for _ in range(TRIES):
            if not self._queues or self._running is not None or now_ns < self._wait_ns:
                return
            if self._streams.awaited:
                self._wait_ns = now_ns + CLIENTS_FIRST_NS
                return
            if not self._afford(now_ns):
                return
            wanted = self._next_wanted()
            if wanted is None:
                continue
            if wanted.by_ns <= now_ns and not wanted.kept:  # what pins want is over when they are
                self.tally.late += 1
                self._forget(wanted)
            else:
                self._begin(wanted, now_ns)

    def _next_wanted(self) -> Wanted | None:
        """What is most urgent to the tenant whose turn it is; None: that is over."""
        tenant, queue = next(iter(self._queues.items()))
        wanted = self._wanted.get(heappop(queue)[1])
        if queue:
            self._queues.move_to_end(tenant)
        else:
            del self._queues[tenant]
        return wanted

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
            most = min(most, self._memory_of(wanted.tenant) // UNUSED_SHARE - self._fetched.unused_bytes(wanted.tenant))
        most //= namespace.slot_bytes
        if wanted.kept:
            most = max(1, most)
        if not missing.size:
            self._give_up(wanted)
            return
        if most <= 0:
            if not self._may_find_room(wanted):
                self.tally.no_room += 1
                self._give_up(wanted)
            return
        start = int(missing[0])
        stop = int(missing[: max(1, most)][-1]) + 1
        reached = self._streams.fetch(namespace, run, start, stop, now_ns)
        piece = run[missing[(missing >= start) & (missing < reached)]]
        self._budget -= piece.size * namespace.slot_bytes
        if not piece.size:
            self.tally.no_room += 1
            if wanted.kept:
                self._try_again(wanted, now_ns)
            else:
                self._forget(wanted)
            return
        wanted.piece, wanted.looked, wanted.again_ns = piece, 0, AGAIN_NS
        self._running = wanted

    def _may_find_room(self, wanted: Wanted) -> bool:
        """Some of what was fetched may have been evicted since: it is looked at, some at each turn, until all was."""
        if wanted.looked >= self._fetched.batches(wanted.tenant):
            return False
        wanted.looked += self._fetched.look(wanted.tenant)
        self._enqueue(wanted)
        return True

    def _try_again(self, wanted: Wanted, now_ns: int) -> None:
        self._again.set(wanted, now_ns + wanted.again_ns)
        wanted.again_ns = min(2 * wanted.again_ns, AGAIN_NS_MAX)

    def _give_up(self, wanted: Wanted) -> None:
        """All that can be there is there."""
        if wanted.nearer:
            self.nearer(wanted.namespace, wanted.keys, 0, wanted.count)
        self._forget(wanted)

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
            there = wanted.piece[states == blocks.RESIDENT]
            self._fetched.note(wanted.tenant, wanted.namespace.slot_bytes, there, wanted.by_ns)
        if wanted.number not in self._wanted:
            return
        if (states != blocks.RESIDENT).any():  # it cannot be read
            self._forget(wanted)
            if wanted.kept:
                self.unreadable(wanted.asked)
        else:
            self._enqueue(wanted)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """What was not used in time was fetched in vain; what is next begins."""
        self._fetched.tick(now_ns)
        for wanted in self._again.due(now_ns, DUE_A_TICK):
            self._enqueue(wanted)
        self.go_on(now_ns)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if only an event can help."""
        dues = [self._fetched.next_ns(), self._again.next_ns()]
        if self._queues and self._running is None:
            dues.append(self._wait_ns)
        return min((ns for ns in dues if ns is not None), default=None)
