"""One seeded life of a store: tenants, clients, faults; then a phase in which everything must come to rest and work."""

import random
from collections import deque
from dataclasses import replace

from kvproto.errors import Grant, TicketError
from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.policies import Chosen, Tier
from kvstore.policy import Rule
from kvstore.report import ClearReport, ClearScope
from kvstore.sessions import IN_PLACE, Namespace, Session
from kvstore.tier.codec import Wish
from kvstore.tier.disk import DiskLimits, DiskState
from tests.core import ARENA_BYTES, MS, SECOND, Core, chain, words
from tests.drive import FakeDrive
from tests.fakes import FakeClock, FakeMemory, FakeProcesses
from tests.sim.actor import Actor, Habits, Seen
from tests.sim.disk import DiskEvents, SimOutbox, choose_limits, cut_finely
from tests.sim.model import Model
from tests.sim.quotas import QuotaEvents

STEPS = 600
AUDIT_EVERY = 60
TENANTS = ("red", "green", "blue")
SLOTS = ARENA_BYTES // PAGE_BYTES
UNTOLD = 0.003  # of the copies that end are the last that this life ends
UNREAD = 0.04  # of the steps in which something is read from disk are the last of a life


class Died(BaseException):
    """A daemon is gone, in the middle of what it did."""


def reader(rng: random.Random, habits: Habits) -> Habits:
    """Clients that come back for what they stored, and wait for it."""
    return replace(
        habits, sizes=tuple(rng.sample(habits.sizes, rng.choice((1, 1, 2)))), rings=(24, 40), memory=40, copies=16,
        prompt=0.7, waits_ns=(0, 100 * MS, 2 * SECOND, 2 * SECOND),
    )  # fmt: skip


class World:
    """Everything of one seed."""

    def __init__(self, seed: int, habits: Habits | None = None, codec: Wish = Wish.RAW) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.fate = random.Random(-1 - seed)  # of whom death finds in the middle of something
        self.seen = Seen()
        self.refusing = False
        self.habits = habits or Habits()
        self.limits: DiskLimits | None = None
        self.tenants = TENANTS[: self.rng.choice((1, 2, 3))]
        self.arenas = self.rng.choice((2, 3, 5, 8, 12))
        if habits or self.rng.random() < 0.67:
            self.limits = choose_limits(self.rng, codec)
            if self.rng.random() < 0.7:  # few who share memory, so that blocks leave it for the disk
                self.habits = reader(self.rng, self.habits)
                self.tenants = TENANTS[: self.rng.choice((1, 1, 2))]
                self.arenas = self.rng.choice((1, 2, 3))
        self.stored = {tenant: deque[tuple[int, list[bytes]]](maxlen=self.habits.memory) for tenant in self.tenants}
        self.model = Model()
        self.disk = DiskEvents(self.rng, self.seen, self.model)
        self.quotas = QuotaEvents(self.rng, self.seen)
        self.actors: list[Actor] = []
        self.gone: list[Actor] = []  # detached, and not yet exited
        self.ghosts: list[Actor] = []  # clients of former lives, who read what they had leased
        self.clears: list[list[ClearReport]] = []
        self.core: Core
        cut_finely(self.rng)
        self.begin(FakeClock(), None, 1)
        if self.limits:
            self.core.open_disk()

    def begin(
        self, clock: FakeClock, drive: FakeDrive | None, generation: int, memory: FakeMemory | None = None
    ) -> None:
        """A store begins its life, perhaps with the memory of the one before. Disk is opened later."""
        outbox = SimOutbox()
        drive = drive or FakeDrive(self.limits.segment_bytes if self.limits else 0)
        self.core = Core(
            arenas=self.arenas,
            ticket_ttl_ns=self.rng.choice((50 * MS, SECOND, 10 * SECOND)),
            lease_ttl_ns_max=self.rng.choice((300 * MS, 2 * SECOND)),
            slice_steps=self.rng.choice((1, 3, 10, 2048)),
            seed=self.seed,
            memory=memory or FakeMemory(refuses=self.refuses),
            disk=self.limits,
            drive=drive,
            first_generation=generation,
            clock=clock,
            outbox=outbox,
            processes=self.processes_that_live(),
        )
        self.seen.withheld += self.core.store.writers.stranded
        outbox.on_flushed = self.flushed
        self.disk.attach(self.core)
        self.quotas.attach(self.core, warm=memory is not None)
        self.core.store.disk.when_serving(self.disk.check_returned)  # before anybody else
        self.model.look = self.look
        self.seen.lives += 1
        self.seen.disks += bool(self.limits)

    def processes_that_live(self) -> FakeProcesses:
        """Those of former lives' clients that still write."""
        processes = FakeProcesses()
        processes.living |= {ghost.owner for ghost in self.ghosts if ghost.owner is not None and ghost.strays}
        return processes

    def look(self, namespace: Namespace, key: bytes) -> int:
        """The number of the published block that has a key now; 0 if there is none."""
        tables, index = self.core.store.tables, namespace.tenant.index
        row = blocks.find_one(tables, index, namespace.number, words([key]), 0)
        return int(tables.blocks["generation"][row]) if row else 0

    def refuses(self) -> bool:
        """Fault: the system has no memory for another arena."""
        refused = self.refusing and self.rng.random() < 0.5
        self.seen.refused_arenas += refused
        return refused

    def live(self) -> Seen:
        """The whole life. Raises AssertionError where a promise is broken."""
        self.refusing = self.rng.random() < 0.3
        for step in range(STEPS):
            self.step()
            self.deliver()
            if step % AUDIT_EVERY == AUDIT_EVERY - 1:
                self.audit()
        self.come_to_rest()
        self.fill_up()
        self.seen.steps += STEPS
        self.count()
        return self.seen

    def count(self) -> None:
        """Take in what a store has been through."""
        tally = self.core.store.tally
        self.seen.evicted += tally.evicted
        self.seen.expired += tally.leases_expired
        self.seen.recycled += self.core.store.arenas.recycled
        self.seen.kept += self.core.store.kept.blocks
        self.seen.verified += self.core.store.streams.verified
        scrubbing = self.core.store.scrubbing
        self.seen.scrubbed += scrubbing.passes
        assert not scrubbing.damaged, "a scrub takes something for damage that nobody has harmed"
        self.disk.count()

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One event: a client does something, a thread finishes something, time passes, an operator acts."""
        self.model.next_event()
        if self.disk.reading() and self.fate.random() < UNREAD:
            self.crash()
        self.haunt()
        if not self.actors:
            self.join()
        elif self.rng.random() < (0.6 if self.limits else 0.72):
            self.rng.choice(self.actors).act()
        else:
            events = [
                (self.finish_copy, 36), (self.finish_punch, 16), (self.pass_time, 8), (self.tick, 5), (self.join, 2),
                (self.leave, 1), (self.cheat, 1), (self.exit, 1), (self.clear, 0.5),
                (self.drain, 1), (self.scrub, 1), (self.choose_rule, 0.5), (self.choose_quota, 0.7),
                (self.crash, 1 if self.limits else 0.3), (self.disk.work, 40 if self.limits or self.seen.warm else 4),
            ]  # fmt: skip
            if self.limits:
                events += [
                    (self.tick, 20), (self.disk.fail, 2), (self.disk.heal, 2), (self.disk.damage, 2),
                    (self.vanish, 0.5), (self.open_disk, 8),
                ]  # fmt: skip
            self.rng.choices([event for event, _ in events], [weight for _, weight in events])[0]()

    def audit(self) -> None:
        """Check everything, but not in the middle of a recovery."""
        if self.core.store.disk.state is not DiskState.ADOPTING:
            self.core.audit()

    def open_disk(self) -> None:
        """The index has been read."""
        if self.core.store.disk.state is DiskState.OPENING:
            self.core.store.open_disk(*self.core.drive.found())

    def vanish(self) -> None:
        """A segment is lost; not while it is looked for."""
        if self.core.store.disk.state is DiskState.SERVING:
            self.disk.vanish()

    def crash(self) -> None:
        """The daemon dies, and another one begins on the same disk; in the same memory, if it was only killed."""
        generation, memory = int(self.core.store.tables.book[blocks.GENERATION]), None
        killed = self.rng.random() < 0.6
        drive = self.disk.crash(killed=killed)
        if killed and self.rng.random() < 0.8:
            self.break_off_copies()
            memory = self.core.memory.successor()
        self.model.crash()
        self.count()
        for actor in self.actors:
            actor.fail_all()
        self.ghosts += [actor for actor in (*self.actors, *self.gone) if actor.haunt()]
        self.actors.clear()
        self.gone.clear()
        self.clears.clear()
        self.succeed(drive, generation, memory)
        kept = self.core.store.kept
        assert kept.warm == (memory is not None), "what was kept is not used, or something is that was not"
        self.seen.warm += kept.warm
        self.core.audit()

    def succeed(self, drive: FakeDrive, generation: int, memory: FakeMemory | None) -> None:
        """Another one begins; one or two before it may die while they take over what was kept."""
        clock = self.core.clock
        for _ in range(2):
            if memory is not None and self.fate.random() < 0.2:
                self.die_after(memory, self.fate.randrange(self.arenas))
            try:
                self.begin(clock, drive, generation, memory)
            except Died:
                assert memory is not None
                self.seen.ended_in_hand_over += 1
                memory = memory.successor()
            else:
                return
        self.begin(clock, drive, generation, memory)

    def die_after(self, memory: FakeMemory, arenas: int) -> None:
        """Whoever takes over this memory dies when it has taken so many arenas, if there are more."""
        left = arenas

        def about_to_take() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Died

        memory.about_to_take = about_to_take

    def break_off_copies(self) -> None:
        """Copies that are running get no further than they are."""
        for copy, ring in self.core.running:
            if copy.source_offset == IN_PLACE:
                continue
            done = self.rng.randrange(copy.block_bytes + 1)
            target = self.core.memory.view(copy.arena)[copy.target_offset :]
            target[:done] = ring[copy.source_offset : copy.source_offset + done]

    def haunt(self) -> None:
        """Clients of former lives look at what they had leased, and go on writing; now and then one ends."""
        for ghost in self.ghosts:
            if ghost.strays and self.rng.random() < 0.01:
                self.end_process(ghost)
        self.ghosts = [ghost for ghost in self.ghosts if ghost.haunt()]
        if self.gone and self.rng.random() < 0.3:
            self.rng.choice(self.gone).stray()

    def end_process(self, actor: Actor) -> None:
        """It is gone, and cannot write any more."""
        actor.end()
        if actor.owner is not None:
            self.core.processes.end(actor.owner)

    def flushed(self, session: Session, request: int, counts: tuple[int, int, int, int]) -> None:
        """The store answers FLUSH."""
        for actor in self.actors:
            if actor.session is session:
                actor.flushed(request, counts)

    def deliver(self) -> None:
        """What the store has said reaches its clients."""
        by_session = {actor.session: actor for actor in self.actors}
        outbox = self.core.outbox
        while outbox.gone:
            session, arena = outbox.gone.pop(0)
            actor = by_session.get(session)
            if actor is not None:
                actor.arena_gone(arena)
        for actor in self.actors:
            actor.told()
        while outbox.answers:
            session, parked, lease, locations = outbox.answers.pop(0)
            by_session[session].answered(parked, lease, locations)
        while outbox.readies:
            ready = outbox.readies.pop(0)
            if ready.lease.session in by_session:
                by_session[ready.lease.session].ready(ready)

    def finish_copy(self) -> None:
        """A leaf thread ends a few copies, in any order; the daemon may die before it has said so of one."""
        for _ in range(self.rng.randrange(1, self.habits.copies + 1)):
            if self.core.running and self.fate.random() < UNTOLD:
                self.finish_one(self.rng.randrange(len(self.core.running)), told=False)
                self.seen.ended_in_publish += 1
                self.crash()
                return
            if self.core.running:
                self.finish_one(self.rng.randrange(len(self.core.running)))

    def finish_one(self, index: int, *, told: bool = True) -> None:
        """The copy must find the bytes that its writer wrote last."""
        copy, ring = self.core.running[index]
        generation = None
        for actor in self.actors:
            writing = actor.writing.get(copy.ticket.number) if actor.session is copy.ticket.session else None
            if writing is not None:
                found = (
                    self.core.memory.view(copy.arena)[copy.target_offset : copy.target_offset + copy.block_bytes]
                    if copy.source_offset == IN_PLACE
                    else ring[copy.source_offset : copy.source_offset + copy.block_bytes]
                ).tobytes()
                assert found == writing.generation.content, "somebody else wrote into this span"
                generation = writing.generation
        book = self.core.store.tables.book
        number, evicted = int(book[blocks.GENERATION]), self.core.store.streams.evicted
        self.core.finish(index)
        if int(book[blocks.GENERATION]) != number:
            assert generation is not None, "published for nobody"
            self.model.publish(generation, number)
        for actor in self.actors if told else ():
            actor.told(evicted=self.core.store.streams.evicted != evicted)

    def finish_punch(self) -> None:
        """The memory thread ends a punch."""
        if self.core.memory.punching:
            self.core.store.arena_punched(self.core.memory.finish_punch())

    def pass_time(self) -> None:
        """Time passes; the store may be late to notice."""
        self.core.clock.advance(self.rng.choice((1, MS, 30 * MS, 60 * MS, 400 * MS, 3 * SECOND)))
        if self.rng.random() < 0.7:
            self.tick()

    def tick(self) -> None:
        """The owner thread's loop turns."""
        self.core.store.tick()
        for actor in self.actors:
            actor.lapse()

    def join(self) -> None:
        """A new client, perhaps with memory to spare again."""
        if len(self.actors) < 5:
            tenant = self.rng.choice(self.tenants)
            self.actors.append(
                Actor(self.core, self.model, self.seen, self.rng, tenant, self.habits, self.stored[tenant])
            )
        self.refusing = self.rng.random() < 0.3

    def leave(self) -> None:
        """A socket closes: by close(), or because the process is dying. Its threads may still read."""
        if not self.actors:
            return
        self.part(self.rng.choice(self.actors))

    def part(self, actor: Actor) -> None:
        """A session ends; its process goes on for a while."""
        self.actors.remove(actor)
        actor.told()
        self.core.store.detach(actor.session)
        actor.fail_all()
        self.gone.append(actor)
        self.seen.deaths += 1

    def cheat(self) -> None:
        """A client commits what is its own and one ticket that is not, or one twice: its session ends for that."""
        if not self.actors:
            return
        actor = self.actors[-1]
        own = [writing.ticket for writing in actor.open_tickets()]
        forged = self.rng.choice([self.rng.getrandbits(63), *own])
        try:
            actor.client.commit([*own, forged])
        except TicketError:
            self.part(actor)
        else:
            raise AssertionError("a forged ticket was taken")

    def exit(self) -> None:
        """A process that had closed its socket is gone; until then what it had leased must not change."""
        if not self.gone:
            self.leave()
            return
        actor = self.gone.pop(self.rng.randrange(len(self.gone)))
        for _ in range(3):
            actor.read()
            actor.stray()
        self.end_process(actor)
        self.core.store.exited(actor.session)

    def clear(self) -> None:
        """An operator clears something, or only asks what that would drop."""
        namespaces = list(self.core.store.namespaces.values())
        if not namespaces:
            return
        chosen = self.rng.choice(namespaces)
        mine = (chosen.tenant.name, chosen.digest)
        known = [BlockKey(key) for tenant, digest, key in self.model.named if (tenant, digest) == mine]
        keys = tuple(self.rng.sample(known, min(len(known), 2)) * 2)  # each named twice
        scope, hit = self.rng.choice(
            (
                (ClearScope(), namespaces),
                (ClearScope(tenant=chosen.tenant.name), [each for each in namespaces if each.tenant is chosen.tenant]),
                (ClearScope(chosen.tenant.name, chosen.identity.digest()), [chosen]),
                (ClearScope(chosen.tenant.name, chosen.identity.digest(), keys), [chosen]),
            )
        )
        dry_run = self.rng.random() < 0.3
        reports: list[ClearReport] = []
        self.clears.append(reports)
        doomed = [] if dry_run else self.model.cleared(hit, list(scope.keys) or None)

        def done(report: ClearReport) -> None:
            reports.append(report)
            self.model.is_over(doomed)

        self.core.store.clear(scope, done, dry_run=dry_run)

    def scrub(self) -> None:
        """An operator has memory hashed again, or the daemon does by itself."""
        self.core.store.scrubbing.begin(self.rng.choice((0, 1 << 20)), everything=self.rng.random() < 0.7)

    def choose_rule(self) -> None:
        """An operator has a tier, or one tenant's part of it, evict by another rule."""
        tenant = self.rng.choice((None, *self.tenants))
        self.core.store.choose_rule(Chosen(self.rng.choice(list(Tier)), tenant, self.rng.choice(list(Rule))))
        self.seen.rules += 1

    def choose_quota(self) -> None:
        """An operator guarantees a tenant more or less, or allows it more or less."""
        self.quotas.choose(self.tenants)

    def drain(self) -> None:
        """An operator stops and resumes storing."""
        self.core.store.draining = not self.core.store.draining and self.rng.random() < 0.2

    # -- the liveness phase --------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        """Every copy ends, every client answers or exits, every deadline passes: nothing may be held any more."""
        core, store = self.core, self.core.store
        self.refusing = store.draining = False
        self.disk.heal()
        self.open_disk()
        while self.limits and store.disk.state is not DiskState.SERVING:
            self.tick()
        while core.running:
            self.finish_one(self.rng.randrange(len(core.running)))
        while self.gone:
            self.exit()
        for ghost in self.ghosts:
            self.end_process(ghost)
        self.ghosts.clear()
        for actor in self.actors:
            actor.told()
            store.abort(actor.session, [writing.ticket for writing in actor.open_tickets()])
            for writing in actor.open_tickets():
                writing.generation.dead = True
            store.flush_outcomes(actor.session)
        for _ in range(4):
            core.pass_time(5 * SECOND)
            self.deliver()
            core.settle()
            self.deliver()
            self.model.next_event()
        core.pass_time(200 * SECOND)  # the longest pin, and the longest prefetch with its time to be used
        core.settle()
        for _ in range(100):  # a write budget takes its time, and so does a commit
            if store.next_tick_ns() is not None:
                core.pass_time(200 * MS)
                core.settle()
        self.disk.at_rest()
        for actor in self.actors:
            assert not actor.parked, "a LEASE was never answered"
            assert not actor.flushing, "a FLUSH was never answered"
            while actor.old_maps:
                actor.answer_gone(0)
        core.audit()
        assert all(len(reports) == 1 for reports in self.clears), "a clear was not answered once"
        assert not store.leases, "a lease outlived its deadline"
        assert not store.pinning.pins, "a pin outlived its deadline"
        assert not store.tables.blocks["holds"].any(), "a block is held for ever"
        assert not store.arenas.busy, "an arena is on its way for ever"
        assert not store.arenas.stale, "an arena is stale for ever"
        due_ns = store.next_tick_ns()
        looks_ns = (None, store.guiding.next_ns(), store.ageing.next_ns())  # who is still there; what is not used
        assert due_ns in looks_ns, "something is still expected"

    def fill_up(self) -> None:
        """The whole tier still works: after a clear one client stores all of it and reads all of it back."""
        core = self.core
        for actor in self.actors:
            core.store.exited(actor.session)
        assert not core.store.sessions, "a session is remembered for ever"
        self.quotas.lift()
        core.store.clear(ClearScope(), lambda _: None, dry_run=False)
        core.settle()
        assert core.store.tables.book[2] == 0, "blocks are lost"
        client = core.client(self.rng.choice(self.tenants), ring_pages=SLOTS)
        namespace, keys = client.open(64), chain(core.store.arenas.positions * SLOTS, "full")
        for start in range(0, len(keys), SLOTS):
            for _ in range(10):
                grants = client.put(namespace, keys[start : start + SLOTS], keys[start - 1] if start else None)
                if Grant.BUSY not in grants:
                    break
                core.settle()
            assert set(grants) <= {Grant.GRANTED, Grant.KNOWN}, f"the tier is smaller than it was: {grants}"
        assert client.fetch(namespace, keys) == len(keys), "the tier does not hold what it took"
        core.audit()
