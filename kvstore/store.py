"""The store: every verb of the hot socket, on plain values. One thread, no I/O; time passes through `tick`.

    verbs                                        lives in        owns
    reserve, commit, copied, abort               reserving.py    tickets
    pin, unpin                                   pinning.py      pins
    prefetch, cancel                             prefetching.py  prefetches
    hear (HINT)                                  guiding.py      what clients say of programs, tools and workflows
    match, match_all                             matching.py     nothing
    lease, renew, release                        leasing.py      leases, LEASEs that wait; by way of streams.py what is
                                                                 on its way into DRAM
    delete, clear                                dropping.py     nothing; sweeps.py has the jobs
    (what nobody uses)                           ageing.py       nothing
    (what passed, and what left)                 watching.py     curves of reuse, traces of blocks that are gone
    (LOAD, SAVE of mode daemon)                  moving.py       holds of what threads of the daemon copy
    (copies in memory of GPUs)                   tier/hbms.py    which there are, and what is wanted there
    (who writes into slots itself)               writers.py      slots that are out of use because of that
    (what was changed since)                     scrubbing.py    passes over DRAM
    open, namespace                              registry.py     tenants, pools, namespaces, their journal
    flush, and all of the disk                   tier/disk.py    what lies there, and what is on its way there
    (what lies beyond this host)                 tier/remote.py  what is on its way there and back
    report, advise                               costing.py      timings of prefills and loads, compute saved
    attach, detach, exited, tick                 here            sessions

reserve -> (client copies into its ring) -> commit -> (leaf thread copies to the slot) -> copied -> published
lease   -> (client copies out of the arena) -> release, or the deadline
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from kvproto.limits import RING_BYTES_MAX
from kvstore import blocks
from kvstore.ageing import Ageing
from kvstore.arenas import Arenas
from kvstore.blocks import U4, U8
from kvstore.costing import Costing
from kvstore.dropping import Dropping
from kvstore.guiding import Guiding
from kvstore.insight.departures import TRACE_WORDS
from kvstore.learned import LEARNED_BYTES, Learned
from kvstore.leasing import Leasing
from kvstore.lessons import Lessons
from kvstore.matching import Matching
from kvstore.moving import Moving
from kvstore.pin_book import BOOK_BYTES, PinBook
from kvstore.pin_classes import Classes
from kvstore.pinned_arenas import PinnedArenas
from kvstore.pinning import Pinning
from kvstore.policies import Chosen, Policies, Tier
from kvstore.ports import Clock, FormerMemory, Memory, Outbox, Processes, Randomness, Workers
from kvstore.prefetching import Prefetching
from kvstore.quotas import Choice, Quotas
from kvstore.registry import Registry
from kvstore.repinning import Repinning
from kvstore.report import ClearReport, ClearScope
from kvstore.reserving import ITEM, Reserving
from kvstore.restart import Kept, find_former, journal_head, take_over
from kvstore.ring import Ring
from kvstore.scrubbing import Recheck, Scrubbing
from kvstore.sessions import Missed, Namespace, Process, Session, Tenant, nobody_hears
from kvstore.sweeps import Done, Each, Sweeper
from kvstore.tables import Limits, capacities_of, make_tables
from kvstore.tally import Tally
from kvstore.tier.disk import Disk, DiskState
from kvstore.tier.flushing import Counts
from kvstore.tier.hbms import HbmTiers
from kvstore.tier.orders import Found, Load, Name, Order, Verify
from kvstore.tier.remote import Remote
from kvstore.tier.remote_orders import RemoteWorkers
from kvstore.tier.remote_writing import RemoteAdmission
from kvstore.tier.scrub import NOWHERE
from kvstore.verifying import Verifying
from kvstore.watch import Watch
from kvstore.watching import Watching
from kvstore.writers import Writers

__all__ = ["ITEM", "Limits", "Store"]


class Store:
    """All blocks of one daemon. Owner thread only."""

    def __init__(
        self, limits: Limits, clock: Clock, randomness: Randomness, memory: Memory, outbox: Outbox,
        workers: Workers | None = None, former: FormerMemory | None = None, processes: Processes | None = None,
    ) -> None:  # fmt: skip
        """Without `workers` there is no disk tier, whatever the limits say. `former`: what a predecessor left;
        `processes`: who of its clients still lives, without: nobody.
        """
        self.limits = limits
        self.tally = Tally()
        self.sessions: dict[int, Session] = {}
        self._next_session = 1
        self._clock = clock
        self._randomness = randomness
        self._outbox = outbox
        self.forgotten: Callable[[int], None] = lambda _: None  # `Announcing`, of a namespace whose number goes
        found, why_cold = find_former(limits, former)
        self._make_rooms(limits, clock, randomness, memory, outbox, workers or NoWorkers())
        self._bind_verbs()
        self.kept = Kept(reason=why_cold)
        if found is not None and former is not None:
            taken = take_over(
                self.tables, self.arenas, self.registry, self.writers, found, former, processes or NoProcesses(),
                clock.now_ns(),
            )  # fmt: skip
            self.kept = taken.kept
            self._hold_for_the_past(taken.withheld)
            self.verifying.begin(taken.kept, taken.left, self.disk)
            self.repinning.begin(taken.kept, self.disk)
            damaged = self.watching.departures.take_over()
            taken.kept.faults += [damaged] if damaged else []
            taken.kept.faults += ["all lessons: what was kept of them is damaged"] if self.learned.damaged else []
            learned = self.learned.read()
            refused = len(learned) - self.lessons.take_over(learned)
            taken.kept.faults += [f"lessons: {refused} of {len(learned)} do not fit any more"] if refused else []
        self.ageing.renew(self.quotas.of_all(), clock.now_ns())
        self.registry.note_disk(self.disk.unknown_since(self.registry.disk_unknown_since))
        self.disk.when_serving(self._disk_is_known)
        self._written = self.writers.any_writable  # may clients be writing into slots, in this life or since before?
        self.registry.begin_with(journal_head(limits, written=self._written))

    def _make_rooms(
        self, limits: Limits, clock: Clock, randomness: Randomness, memory: Memory, outbox: Outbox, workers: Workers
    ) -> None:
        """Each knows those before it."""
        self.tables = tables = make_tables(limits, memory)
        self.policies = policies = Policies(tables, limits.rules)
        self.quotas = quotas = Quotas(*capacities_of(limits), limits.quotas, limits.hbm)
        self.arenas = arenas = Arenas(tables, memory, outbox, limits.arena_bytes, limits.positions, policies)
        self.writers = writers = Writers(limits, tables, arenas, memory)
        self.registry = registry = Registry(
            limits, tables, arenas, memory, randomness, policies, quotas, journal_head(limits), self._forget_namespace
        )
        self.costing = costing = Costing(tables)
        self.sweeper = sweeper = Sweeper(tables, arenas, clock, limits.slice_steps)
        self.disk = disk = Disk(
            limits.disk, tables, workers, outbox, arenas.by_number, registry.tenants, registry.by_number, sweeper.drop,
            sweeper.sweep, clock.wall_s, policies, limits.positions, limits.dram_bytes, costing, quotas.disk,
        )  # fmt: skip
        self.dropping = dropping = Dropping(tables, clock, registry, arenas, sweeper, disk, quotas.dram)
        watch = Watch(tables.blocks.size)
        self.leasing = Leasing(
            limits, tables, clock, outbox, workers, self.tally, registry, sweeper, disk, dropping, costing, watch,
            self._forget,
        )  # fmt: skip
        self.matching = Matching(tables, self.tally, costing, self.disk.away, self.leasing.account)
        self.reserving = Reserving(
            limits, tables, clock, self.tally, sweeper, disk, dropping, costing, writers, self._forget
        )
        self.moving = Moving(limits, tables, arenas, self.leasing, self.reserving)
        self.hbm = HbmTiers(tables, clock, quotas, self.moving.hold, sweeper.jobs)
        self.scrubbing = Scrubbing(limits, tables, clock, workers, arenas, registry, writers, sweeper)
        self.streams = self.leasing.streams
        self.verifying = Verifying(tables, clock, registry, self.streams, self.reserving)
        self.prefetching = Prefetching(tables, clock, randomness, self.streams, watch, quotas.memory_bytes)
        book = PinBook(memory.table("pins", BOOK_BYTES))
        self.pinning = pinning = Pinning(
            tables, clock, randomness, watch, quotas.pin_budget_bytes, Classes(tables.blocks.size, quotas.class_bytes),
            book, self.prefetching, sweeper.jobs,
        )  # fmt: skip
        self.prefetching.nearer = self.hbm.lift
        self.pinning.nearer = self.hbm
        self.repinning = Repinning(tables, clock, registry, pinning, book)
        dropping.pinned_arena = PinnedArenas(tables, clock, arenas, pinning).one_for
        dropping.when_cut = pinning.when_cut
        dropping.has_far_side = lambda: self.remote.on
        self.ageing = Ageing(tables, sweeper, registry.namespaces.values, pinning.covered)
        self.watching = watching = Watching(
            tables, clock, randomness, limits.dram_bytes, registry.tenants, on=limits.curves,
            traces=memory.table("traces", 8 * TRACE_WORDS).view(np.uint64),
        )  # fmt: skip
        self.leasing.asked, self.reserving.asked = watching.asked, watching.reserved
        self.matching.asked, self.leasing.fell_short = watching.matched, watching.fell_short
        self.reserving.abandoned, self.scrubbing.found = watching.abandoned, watching.changed
        self.remote = Remote(tables, clock, self.registry.by_number, self.reserving, costing, self._own_session)
        self.pinning.expired, self.ageing.dropping = watching.departures.unpinned, watching.departures.unused
        self.guiding = Guiding(tables, clock, registry, self.pinning, self.prefetching, costing.costs_of)
        self.lessons = Lessons(tables, registry, arenas, costing, self.guiding, watching.departures.turns)
        self.learned = Learned(memory.table("learned", LEARNED_BYTES), self.lessons.things)

    def _disk_is_known(self) -> None:
        if self.disk.state is DiskState.SERVING:
            self.registry.note_disk(0)

    def begin_remote(self, workers: RemoteWorkers, admission: RemoteAdmission) -> None:
        """There is a far side: from now on it hears of what is missed here, and gets what is worth it."""
        remote = self.remote
        remote.begin(workers, admission)
        self.hear_misses(remote.missed, remote.wished)
        self.leasing.touched = remote.writing.leased
        self.reserving.landed, self.reserving.changed = remote.writing.published, remote.changed
        remote.writing.codec_for, remote.writing.learn = self.disk.codec_for, self.disk.choice.learn

    def hear_misses(self, missed: Missed, wished: Missed | None = None) -> None:
        """One more hears of each chain that goes on beyond what DRAM and disk have of it; `wished`: by a PREFETCH."""
        both = _one_after_another(self.leasing.missed, missed)
        self.matching.missed = self.leasing.missed = self.prefetching.missed = both
        self.prefetching.wished = _one_after_another(self.prefetching.wished, wished or missed)

    def own_session(self, tenant: Tenant) -> Session:
        """One of the daemon's own that nobody hears anything of; its ring is a count of bytes and no more."""
        session = self._add_session(tenant, Ring(RING_BYTES_MAX))
        session.heard = nobody_hears
        return session

    def choose_rule(self, chosen: Chosen) -> None:
        """Have a tier, or one tenant's part of it, evict by another rule from now on, and after a warm restart."""
        self.watching.choosing(chosen.tier, chosen.tenant, self.policies, self.arenas.by_number.values())
        for work in self.registry.choose_rule(chosen):
            self.sweeper.begin(work)

    def reset_rule(self, tier: Tier, tenant: str | None) -> None:
        """Forget what was chosen for a tier, or for one tenant's part of it: what else holds is in force again."""
        self.watching.choosing(tier, tenant, self.policies, self.arenas.by_number.values())
        for work in self.registry.reset_rule(tier, tenant):
            self.sweeper.begin(work)

    def choose_quota(self, tenant: str, choice: Choice) -> None:
        """Promise and allow a tenant something else from now on, and after a warm restart; empty: what is configured.

        It counts at the next allocation. Raises QuotaError, and changes nothing, where it cannot be.
        """
        self.registry.choose_quota(tenant, choice)
        self.ageing.renew(self.quotas.of_all(), self._clock.now_ns())
        if tenant in self.tenants:
            self.pinning.trim(self.tenants[tenant])

    def _forget_namespace(self, number: int) -> None:
        self.costing.forget(self.registry.by_number[number])
        self.prefetching.forget_namespace(self.registry.by_number[number])
        self.disk.commits.forget(number)
        self.remote.forget_namespace(self.registry.by_number[number])
        self.hbm.forget_namespace(self.registry.by_number[number])
        self.watching.departures.forget_namespace(number)
        self.forgotten(number)

    def _bind_verbs(self) -> None:
        """A verb that one room carries out alone is that room's own method: a frame pays for no call in between."""
        self.open, self.namespace = self.registry.open, self.registry.namespace
        self.match, self.match_all = self.matching.match, self.matching.match_all
        self.lease, self.renew = self.leasing.lease, self.leasing.renew
        self.release, self.release_riding = self.leasing.release, self.leasing.release_riding
        self.reserve, self.commit = self.reserving.reserve, self.reserving.commit
        self.copied, self.abort = self.reserving.copied, self.reserving.abort
        self.leases = self.leasing.leases
        self.tenants, self.namespaces = self.registry.tenants, self.registry.namespaces
        self._due: tuple[Callable[[], int | None], ...] = (
            self.leasing.expiring.next_ns, self.leasing.parked.next_ns, self.reserving.lapsing.next_ns,
            self.streams.next_ns, self.disk.next_ns, self.verifying.next_ns, self.sweeper.next_ns,
            self.pinning.next_ns, self.prefetching.next_ns, self.guiding.next_ns, self.watching.next_ns,
            self.ageing.next_ns, self.scrubbing.next_ns, self.writers.next_ns, self.remote.next_ns,
            self.hbm.next_ns,
        )  # fmt: skip

    # -- sessions ------------------------------------------------------------------------------------------------

    def attach(self, tenant_name: str, ring_bytes: int, owner: Process | None = None) -> Session:
        """Begin a session. Raises LimitError past the number of tenants.

        With an `owner` it is in mode direct: that process writes into slots itself, so many bytes at a time.
        """
        session = self._add_session(self.registry.tenant(tenant_name), Ring(ring_bytes))
        session.owner = owner
        if owner is not None and not self._written:
            self._written = True
            self.registry.begin_with(journal_head(self.limits, written=True))
        session.next_ticket = 1 + (self._randomness.word() >> 2)
        session.next_lease = 1 + (self._randomness.word() >> 2)
        session.tenant.sessions += 1
        self.tally.sessions_opened += 1
        return session

    def _add_session(self, tenant: Tenant, ring: Ring) -> Session:
        session = Session(self._next_session, tenant, ring, np.zeros(self.arenas.positions, dtype=np.uint8))
        self._next_session += 1
        self.sessions[session.number] = session
        return session

    def _own_session(self, tenant: Tenant) -> Session:
        """One of the daemon's own, for what comes from beyond this host; its ring is a count of bytes and no more."""
        session = self._add_session(tenant, Ring(RING_BYTES_MAX))
        session.heard = self.remote.landed
        return session

    def _hold_for_the_past(self, withheld: list[tuple[list[int], int]]) -> None:
        """Leases of the former life: a closed session each, with nothing but that."""
        for rows, until_ns in withheld:
            namespace = self.registry.by_number[int(self.tables.blocks["namespace"][rows[0]])]
            session = self._add_session(namespace.tenant, Ring(0))
            session.attached = False
            self.leasing.hold(session, rows, until_ns)

    def flush_outcomes(self, session: Session) -> None:
        """Tell a session what became of its tickets, and answer what waited for them."""
        if not session.attached:
            session.outcomes.clear()
            return
        if session.outcomes:
            outcomes, session.outcomes = session.outcomes, []
            if session.heard is not None:
                session.heard(session, outcomes)
                return
            self._outbox.published(session, outcomes)
        if session.parked:
            self.leasing.answer_parked(session)

    def detach(self, session: Session) -> None:
        """The socket is closed: tickets end, leases live on until released, due, or `exited`."""
        if not session.attached:
            return
        session.attached = False
        session.tenant.sessions -= 1
        session.tenant.in_flight -= len(session.parked)
        session.parked.clear()
        if session.tickets:
            self.sweeper.begin(Each(session.tickets.values(), self.reserving.give_up, lambda: self._forget(session)))
        for namespace in session.namespaces.values():
            namespace.sessions -= 1
        session.namespaces.clear()
        self._forget(session)

    def exited(self, session: Session) -> None:
        """The process is gone: nothing of it can read or write any more."""
        self.detach(session)
        session.exited = True
        self.leasing.release(session, list(session.leases))
        self.writers.gone(session)
        self.arenas.exited(session)
        self._forget(session)

    def bequeath(self, session: Session, heir: Session) -> None:
        """Two closed sessions of one living process: one record of what it may still map is enough."""
        assert not session.attached, "an open session maps for itself"
        assert not heir.attached, "an open session maps for itself"
        assert not heir.exited, "nobody gives back what is left to a process that is gone"
        self.arenas.bequeath(session, heir)
        self.writers.bequeath(session, heir)
        self._forget(session)

    def _forget(self, session: Session) -> None:
        """Drop the record of a session that can neither read nor write any more."""
        if session.attached or session.copies or session.tickets:
            return
        if session.exited or not (session.leases or session.arenas or session.writable or self.writers.has(session)):
            self.sessions.pop(session.number, None)

    # -- dropping ------------------------------------------------------------------------------------------------

    def delete(self, namespace: Namespace, keys: U8, at: int, count: int, done: Done) -> None:
        """Forget blocks and all that continues them. They never hit again; `done(blocks)` when nothing is left."""
        self.watching.departures.dropped(namespace, keys, at, count)
        self.remote.deleted(namespace, keys, at, count)
        self.dropping.delete(namespace, keys, at, count, done)

    def clear(self, scope: ClearScope, done: Callable[[ClearReport], None], *, dry_run: bool) -> None:
        """Drop or only count what a scope names; `done` hears what there was. Raises KeyError for names that nobody
        knows and of which nothing can lie where nobody looks.
        """
        heard = done
        if not dry_run:
            self.watching.cleared(scope, self.namespaces.values())
        if self.remote.on and not scope.keys:
            heard = self._with_objects(scope, done)
        if self.remote.on and not dry_run:
            heard = self._clear_remote(scope, heard)
        self.dropping.clear(scope, heard, dry_run=dry_run)

    def _with_objects(self, scope: ClearScope, done: Callable[[ClearReport], None]) -> Callable[[ClearReport], None]:
        return lambda report: done(replace(report, remote_objects=self.remote.objects(scope)))

    def _clear_remote(self, scope: ClearScope, done: Callable[[ClearReport], None]) -> Callable[[ClearReport], None]:
        """Beyond this host before anything goes here, and again behind it: meanwhile some of it may be written."""
        before = list(self.namespaces.values())
        self.remote.cleared(scope, before)

        def dropped(report: ClearReport) -> None:
            self.remote.cleared(scope, dict.fromkeys((*before, *self.namespaces.values())))
            done(report)

        return dropped

    # -- arenas --------------------------------------------------------------------------------------------------

    def fresh_arenas(self, session: Session, arenas: U4) -> list[int]:
        """Those of some arenas whose descriptors a session lacks; from now on it is taken to have them."""
        fresh = [arena for arena in np.unique(arenas).tolist() if arena not in session.arenas]
        for arena in fresh:
            self.arenas.gave(session, arena)
        return fresh

    def fresh_writable(self, session: Session, arenas: Iterable[int]) -> list[int]:
        """The same of writable descriptors, for a session in mode direct."""
        return self.writers.give(session, arenas)

    def arena_dropped(self, session: Session, arena: int) -> None:
        """A session maps nothing of an arena any more."""
        self.arenas.dropped(session, arena)
        self._forget(session)

    def arena_punched(self, arena: int) -> None:
        """`Memory.punch_arena` has finished."""
        self.arenas.punched(arena)

    # -- disk ----------------------------------------------------------------------------------------------------

    def raise_generation(self, generation: int) -> None:
        """Former lives gave all below this one away."""
        self.tables.book[blocks.GENERATION] = max(int(self.tables.book[blocks.GENERATION]), generation)

    def open_disk(
        self, found: Sequence[Found], names: Sequence[Name], foreign: Sequence[int] = (), next_segment: int = 1
    ) -> None:
        """The index on disk has been read. `foreign`: numbers that are not to be used."""
        tenant_of, namespace_of = self.registry.known_tenant, self.registry.known_namespace
        self.disk.open(found, names, foreign, next_segment, tenant_of, namespace_of, self._clock.now_ns())

    def flush(self, session: Session, namespace: Namespace, request: int, wait_ns: int) -> Counts | None:
        """Make what this session published in a namespace durable: (durable, failed, evicted, pending).

        None if that takes time: `Outbox.durable` then answers. Raises LimitError for too many at once.
        """
        return self.disk.flushing.flush(session, namespace, request, self._clock.now_ns() + wait_ns)

    def finished(self, batch: Sequence[Order]) -> None:
        """`Workers` have carried out orders of one kind."""
        now_ns = self._clock.now_ns()
        first = batch[0]
        if isinstance(first, Recheck):
            self.scrubbing.finished(batch)  # type: ignore[arg-type]  # a batch is of one kind
            return
        self.watching.finished(batch)
        if isinstance(first, Load) and first.arena == NOWHERE:
            self.disk.scrub.finished(batch)  # type: ignore[arg-type]  # a batch is of one kind
        elif isinstance(first, Load | Verify):
            self.streams.finished(batch, now_ns)  # type: ignore[arg-type]  # a batch is of one kind
            self.verifying.go_on()
            self.prefetching.go_on(now_ns)
        else:
            self.disk.finished(batch, now_ns)
        self.disk.flushing.tick(now_ns)

    def drives_away(self, drives: Collection[int]) -> None:
        """Drives that answer nobody for now, and no others."""
        now_ns = self._clock.now_ns()
        if self.disk.away.are(drives, now_ns):
            self.streams.leave_out_away(now_ns)

    # -- how it stands -------------------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Is nothing new taken?"""
        return self.reserving.draining

    @draining.setter
    def draining(self, on: bool) -> None:
        self.reserving.draining = on

    @property
    def unverified(self) -> int:
        """Kept blocks that nobody has looked at yet, at most."""
        return self.verifying.unverified

    # -- time ----------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC."""
        return self._clock.now_ns()

    def tick(self) -> None:
        """Whatever time has brought: lapsed tickets and leases, waits that are over, a slice of sweeping."""
        now_ns = self._clock.now_ns()
        self.streams.tick(now_ns)  # before leases end: those that wait are promised more
        self.leasing.expire(now_ns)
        self.pinning.tick(now_ns)
        for ticket in self.reserving.lapse(now_ns):
            self.leasing.look_again(ticket.session, now_ns)
        self.verifying.go_on()
        self.prefetching.tick(now_ns)
        self.guiding.tick(now_ns)
        self.disk.tick(now_ns)
        self.disk.flushing.tick(now_ns)
        self.leasing.answer_due(now_ns)
        self.sweeper.tick(now_ns)
        self.scrubbing.tick(now_ns)
        self.writers.tick(now_ns)
        self.ageing.tick(now_ns)
        self.remote.tick(now_ns)
        self.hbm.tick()
        self.learned.tick(now_ns)
        self.watching.tick(now_ns)

    def next_tick_ns(self) -> int | None:
        """When `tick` has something to do next, 0 for at once; None if nothing is set."""
        soonest_ns: int | None = None
        for next_ns in self._due:
            due_ns = next_ns()
            if due_ns is not None and (soonest_ns is None or due_ns < soonest_ns):
                soonest_ns = due_ns
        return soonest_ns


def _one_after_another(first: Missed, then: Missed) -> Missed:
    def both(namespace: Namespace, keys: U8, at: int, count: int, found: int) -> None:
        first(namespace, keys, at, count, found)
        then(namespace, keys, at, count, found)

    return both


class NoProcesses:
    """Nobody of a former life is there any more."""

    def watch(self, process: Process, gone: Callable[[], None]) -> bool:  # noqa: ARG002  a port's
        """See the port."""
        return False


class NoWorkers:
    """Where there is no disk tier, nobody is asked for anything."""

    def submit(self, batch: Sequence[Order]) -> None:
        """See the port."""
        raise AssertionError(f"nobody carries out {batch[0]}")

    def idle_share(self) -> float:
        """See the port."""
        return 0.0

    def drive_of(self, segment: int) -> int:  # noqa: ARG002  a port's
        """See the port."""
        return -1
