"""Dropping many blocks without stalling anybody: jobs that run in slices on the owner thread.

A block is cut off index and tree at once, so that it never hits again; what hangs below is freed slice by slice.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

import numpy as np

from kvproto.limits import NAMESPACES
from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import U4, Tables
from kvstore.ports import Clock
from kvstore.sessions import Tenant

SLICE_STEPS = 2048  # about 0.2 ms
SLOTS_A_STEP = 8  # looking at a slot is so much cheaper than dropping a block
DRAIN_LOOK_NS = 10 * 10**6  # how often to look whether the last lease on a drained arena has ended

Done = Callable[[int], None]
Counted = Callable[[int, int, int, int], None]


STEPS_A_THING = 8  # ending a ticket costs about as much as eight steps of a sweep
T = TypeVar("T")


class Job(Protocol):
    """Something that is done in slices."""

    def run(self, steps: int) -> tuple[int, bool]:
        """Work for up to `steps` steps. Returns the steps left and whether the job is over."""


class Sweep:
    """Frees subtrees whose tops are cut already; then says how many blocks there were."""

    __slots__ = ("_tables", "tenant", "_tops", "_top", "_dropped", "_done")

    def __init__(self, tables: Tables, tenant: Tenant, tops: Iterable[int], done: Done | None = None) -> None:
        self._tables = tables
        self.tenant = tenant
        self._tops = deque(tops)
        self._top = 0
        self._dropped = 0
        self._done = done

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job."""
        while steps and (self._top or self._tops):
            if not self._top:
                self._top = self._tops.popleft()
            self._top, steps, dropped = blocks.sweep(self._tables, self.tenant.index, self._top, steps)
            self._dropped += dropped
        if self._top or self._tops:
            return 0, False
        if self._done:
            self._done(self._dropped)
        return steps, True


class Answer:
    """Answers when nothing of a tenant (None: of nobody) waits to be swept any more.

    What continued a block that was dropped may have been cut off it by somebody else, and then is in another sweep.
    """

    __slots__ = ("_jobs", "_tenant", "_answer")

    def __init__(self, jobs: "Jobs", tenant: Tenant | None, answer: Callable[[], None]) -> None:
        self._jobs = jobs
        self._tenant = tenant
        self._answer = answer

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job."""
        if self._jobs.sweeping(self._tenant):
            self._jobs.queue(self)
        else:
            self._answer()
        return steps - 1, True


class Each(Generic[T]):
    """Does one thing to each of many, a slice at a time, and one more at the end."""

    __slots__ = ("_things", "_work", "_done")

    def __init__(self, things: Iterable[T], work: Callable[[T], None], done: Callable[[], None]) -> None:
        self._things = deque(things)
        self._work = work
        self._done = done

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job."""
        while self._things and steps > 0:
            steps -= STEPS_A_THING
            self._work(self._things.popleft())
        if self._things:
            return 0, False
        self._done()
        return max(0, steps), True


class Clear:
    """Drops every block of the wanted namespaces. Goes by rows: a block that moves between tiers keeps its own."""

    __slots__ = ("_tables", "_arenas", "_wanted", "_row", "_sweep", "_done")

    def __init__(self, tables: Tables, arenas: Arenas, wanted: U4, done: Callable[[], None]) -> None:
        self._tables = tables
        self._arenas = arenas
        self._wanted = wanted
        self._row = 1
        self._sweep: Sweep | None = None
        self._done = done

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job. A block stored behind the cursor meanwhile stays: it is newer than the wish to clear."""
        while steps:
            if self._sweep:
                steps, over = self._sweep.run(steps)
                if not over:
                    return 0, False
                self._sweep = None
            elif self._row < int(self._tables.book[blocks.UNUSED_ROW]):
                steps = max(0, steps - self._advance())
            else:
                self._done()
                return steps, True
        return 0, False

    def _advance(self) -> int:
        """Look at up to a slice of rows, from the cursor on. Returns the steps it took."""
        tables, start = self._tables, self._row
        stop = min(start + SLICE_STEPS, int(tables.book[blocks.UNUSED_ROW]))
        found = int(blocks.next_wanted(tables, start, stop, self._wanted))
        if not found:
            self._row = stop
            return 1 + (stop - start) // SLOTS_A_STEP
        self._row = found + 1
        position = int(tables.blocks["slot"][found]) >> int(tables.book[blocks.SHIFT])
        tenant = self._arenas.by_number[int(tables.arenas["pool"][position]) - 1].tenant
        blocks.begin_sweep(tables, tenant.index, found)
        self._sweep = Sweep(tables, tenant, [found])
        return 1 + (found - start) // SLOTS_A_STEP


class Count:
    """Counts what a clear would drop: blocks, bytes, leased, pending. Every wanted namespace, or some subtrees."""

    __slots__ = ("_tables", "_arenas", "_wanted", "_position", "_slot", "_tops", "_top", "_here", "_counts", "_done")

    def __init__(self, tables: Tables, arenas: Arenas, wanted: U4, tops: Iterable[int] | None, done: Counted) -> None:
        self._tables = tables
        self._arenas = arenas
        self._wanted = wanted
        self._position = 0 if tops is None else tables.arenas.size
        self._slot = 0
        self._tops = iter(tops or ())
        self._top = 0
        self._here = 0
        self._counts = np.zeros(4, dtype=np.uint64)
        self._done = done

    def run(self, steps: int) -> tuple[int, bool]:
        """See Job. A slice of one arena or of one subtree at a time."""
        if self._position < self._tables.arenas.size - 1:
            return max(0, steps - self._advance()), False
        if not self._here:
            self._top = self._here = next(self._tops, 0)
        if self._here:
            self._here = int(blocks.count_subtree(self._tables, self._top, self._here, steps, self._counts))
            return (0 if self._here else steps // 2), False
        self._done(*(int(number) for number in self._counts))
        return steps, True

    def _advance(self) -> int:
        """Count up to a slice of one arena, from the cursor on. Returns the steps it took."""
        serves = bool(self._tables.arenas[self._position]["pool"])
        stop = self._slot + SLICE_STEPS
        if serves:
            blocks.count_arena(self._tables, self._position, self._slot, stop, self._wanted, self._counts)
        self._position, self._slot = _after(self._tables, self._position, stop)
        return 1 + (SLICE_STEPS // SLOTS_A_STEP if serves else 0)


def _after(tables: Tables, position: int, slot: int) -> tuple[int, int]:
    """Where a cursor goes on that has looked at all slots before `slot` of an arena."""
    arena = tables.arenas[position]
    return (position, slot) if arena["pool"] and slot < int(arena["untouched"]) else (position + 1, 0)


class Jobs:
    """The jobs of one store, oldest first; then the arena that is being drained."""

    __slots__ = ("begun", "never_whole", "_jobs", "_sweeps", "_tables", "_arenas", "_slice_steps", "_retiring")

    def __init__(self, tables: Tables, arenas: Arenas, slice_steps: int = SLICE_STEPS) -> None:
        self.begun = 0  # jobs so far: as long as this stays, and none waits, nothing was dropped
        self.never_whole = 0  # of those, such as only drop what was never all there
        self._jobs: deque[Job] = deque()
        self._sweeps: Counter[Tenant] = Counter()  # of those jobs, by tenant
        self._tables = tables
        self._arenas = arenas
        self._slice_steps = slice_steps
        self._retiring = (0, 0, 0)  # of what block, how far down it got, and the generation there

    @property
    def waiting(self) -> bool:
        """Is there anything to do?"""
        return bool(self._jobs) or self._arenas.draining is not None

    @property
    def queued(self) -> bool:
        """Is there work, and not only waiting for a drained arena's last hold to end?"""
        return bool(self._jobs)

    def queue(self, job: Job) -> None:
        """Queue a job."""
        self.begun += 1
        self._jobs.append(job)
        if isinstance(job, Sweep):
            self._sweeps[job.tenant] += 1

    def sweeping(self, tenant: Tenant | None) -> bool:
        """Does any block of a tenant, or of any, wait to be swept?"""
        return bool(self._sweeps.total() if tenant is None else self._sweeps[tenant])

    def when_swept(self, tenant: Tenant | None, answer: Callable[[], None]) -> None:
        """Answer when nothing of a tenant, or of any, waits to be swept any more."""
        self.queue(Answer(self, tenant, answer))

    def run(self, now_ns: int) -> None:
        """Work for one slice."""
        steps = self._slice_steps
        while self._jobs and steps > 0:
            job = self._jobs[0]
            steps, over = job.run(steps)
            if over:
                self._jobs.popleft()
                if isinstance(job, Sweep):
                    self._sweeps[job.tenant] -= 1
        if steps > 0 and self._arenas.draining is not None:
            self._drain(self._arenas.draining, now_ns, steps)

    def _drain(self, position: int, now_ns: int, steps: int) -> None:
        """Have what lies in the arena that is being drained leave DRAM; sweep what is held, with what continues it."""
        tables = self._tables
        tenant = self._arenas.pools[int(tables.arenas[position]["pool"]) - 1].tenant
        slot = -1
        while steps > 0:
            slot = blocks.next_in_arena(tables, position, slot + 1, 1 << 62, _ANY)
            if slot < 0:
                self._retiring = (0, 0, 0)
                self._arenas.settle(now_ns)
                return
            row = self._arenas.row_at(position, slot)
            top = self._go_on(row)
            outcome, steps, reached = blocks.retire(tables, tenant.index, top, steps)
            again = outcome == blocks.AGAIN
            self._retiring = (row, reached, int(tables.blocks["generation"][reached])) if again else (0, 0, 0)
            if outcome == blocks.DONE and top != row:
                slot -= 1  # the rest of it
            if outcome != blocks.HELD:
                continue
            self.begun += 1
            blocks.begin_sweep(tables, tenant.index, row)
            sweep = Sweep(tables, tenant, [row])
            steps, over = sweep.run(steps)
            if not over:
                self.queue(sweep)
                return

    def _go_on(self, row: int) -> int:
        """Where to go on retiring a block and what continues it: that may reach deeper than a slice."""
        block, reached, generation = self._retiring
        there = self._tables.blocks[reached]
        same = block == row and int(there["generation"]) == generation
        return reached if same and int(there["state"]) in {blocks.RESIDENT, blocks.KEPT} else row


_ANY = np.ones(NAMESPACES, dtype=np.uint32)


class Sweeper:
    """Begins the jobs of a store, and goes on with them as time passes."""

    __slots__ = ("jobs", "_arenas", "_clock", "_look_ns", "_tables")

    def __init__(self, tables: Tables, arenas: Arenas, clock: Clock, slice_steps: int) -> None:
        self.jobs = Jobs(tables, arenas, slice_steps)
        self._tables = tables
        self._arenas = arenas
        self._clock = clock
        self._look_ns = 0  # when to look at the drained arena again

    def drop(self, tenant: Tenant, block: int, *, whole: bool = True) -> None:
        """Cut a block off index and tree, and sweep it with all that continues it. `whole`: was it ever all there?"""
        blocks.begin_sweep(self._tables, tenant.index, block)
        self.jobs.never_whole += not whole
        self.sweep(tenant, block)

    def sweep(self, tenant: Tenant, block: int) -> None:
        """Sweep a block that is cut off already."""
        self.begin(Sweep(self._tables, tenant, [block]))

    def begin(self, job: Job) -> None:
        """Begin a job; its first slice runs at once unless others wait."""
        idle = not self.jobs.waiting
        self.jobs.queue(job)
        if idle:
            self.work()

    def work(self) -> None:
        """One slice of whatever is being dropped."""
        self.jobs.run(self._clock.now_ns())

    def tick(self, now_ns: int) -> None:
        """A slice, if there is anything to do."""
        if self.jobs.waiting:
            self.work()
            self._look_ns = now_ns + DRAIN_LOOK_NS

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once; None if nothing waits."""
        if self.jobs.queued:
            return 0
        return self._look_ns if self._arenas.draining is not None else None
