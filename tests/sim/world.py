"""One seeded life of a store: tenants, clients, faults; then a phase in which everything must come to rest and work."""

import random

from kvproto.errors import Grant, TicketError
from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvstore.report import ClearReport, ClearScope
from tests.core import ARENA_BYTES, MS, SECOND, Core, chain
from tests.fakes import FakeMemory
from tests.sim.actor import Actor, Seen
from tests.sim.model import Model

STEPS = 600
AUDIT_EVERY = 60
TENANTS = ("red", "green", "blue")
SLOTS = ARENA_BYTES // PAGE_BYTES


class World:
    """Everything of one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen = Seen()
        self.refusing = False
        self.core = Core(
            arenas=self.rng.choice((2, 3, 5, 8, 12)),
            ticket_ttl_ns=self.rng.choice((50 * MS, SECOND, 10 * SECOND)),
            lease_ttl_ns_max=self.rng.choice((300 * MS, 2 * SECOND)),
            slice_steps=self.rng.choice((1, 3, 10, 2048)),
            seed=seed,
            memory=FakeMemory(refuses=self.refuses),
        )
        self.model = Model()
        self.actors: list[Actor] = []
        self.gone: list[Actor] = []  # detached, and not yet exited
        self.tenants = TENANTS[: self.rng.choice((1, 2, 3))]
        self.clears: list[list[ClearReport]] = []

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
                self.core.audit()
        self.come_to_rest()
        self.fill_up()
        tally = self.core.store.tally
        self.seen.steps += STEPS
        self.seen.evicted, self.seen.expired = tally.evicted, tally.leases_expired
        self.seen.recycled = self.core.store.arenas.recycled
        return self.seen

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One event: a client does something, a thread finishes something, time passes, an operator acts."""
        self.model.next_event()
        if not self.actors:
            self.join()
        elif self.rng.random() < 0.72:
            self.rng.choice(self.actors).act()
        else:
            events = (
                (self.finish_copy, 36), (self.finish_punch, 16), (self.pass_time, 8), (self.tick, 5), (self.join, 2),
                (self.leave, 1), (self.cheat, 1), (self.exit, 1), (self.clear, 1), (self.drain, 1),
            )  # fmt: skip
            self.rng.choices([event for event, _ in events], [weight for _, weight in events])[0]()

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

    def finish_copy(self) -> None:
        """A leaf thread ends a few copies, in any order."""
        for _ in range(self.rng.randrange(1, 6)):
            if self.core.running:
                self.finish_one(self.rng.randrange(len(self.core.running)))

    def finish_one(self, index: int) -> None:
        """The copy must find the bytes that its writer wrote last."""
        copy, ring = self.core.running[index]
        for actor in self.actors:
            writing = actor.writing.get(copy.ticket.number) if actor.session is copy.ticket.session else None
            if writing is not None:
                found = ring[copy.source_offset : copy.source_offset + copy.block_bytes].tobytes()
                assert found == writing.generation.content, "somebody else wrote into this span"
        self.core.finish(index)
        for actor in self.actors:
            actor.told()

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
            self.actors.append(Actor(self.core, self.model, self.seen, self.rng, self.rng.choice(self.tenants)))
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
        self.core.store.exited(actor.session)

    def clear(self) -> None:
        """An operator clears something, or only asks what that would drop."""
        namespaces = list(self.core.store.namespaces.values())
        if not namespaces:
            return
        chosen = self.rng.choice(namespaces)
        known = [BlockKey(key) for number, key in self.model.latest if number == chosen.number]
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
        doomed = [] if dry_run else self.model.cleared(hit, list(scope.keys) or None)
        reports: list[ClearReport] = []

        def done(report: ClearReport) -> None:
            reports.append(report)
            self.model.is_over(doomed)

        self.core.store.clear(scope, done, dry_run=dry_run)
        self.clears.append(reports)

    def drain(self) -> None:
        """An operator stops and resumes storing."""
        self.core.store.draining = not self.core.store.draining and self.rng.random() < 0.2

    # -- the liveness phase --------------------------------------------------------------------------------------

    def come_to_rest(self) -> None:
        """Every copy ends, every client answers or exits, every deadline passes: nothing may be held any more."""
        core, store = self.core, self.core.store
        self.refusing = store.draining = False
        while core.running:
            self.finish_one(self.rng.randrange(len(core.running)))
        while self.gone:
            self.exit()
        for actor in self.actors:
            actor.told()
            store.abort(actor.session, [writing.ticket for writing in actor.open_tickets()])
            for writing in actor.open_tickets():
                writing.generation.dead = True
            store.flush_outcomes(actor.session)
        for _ in range(3):
            core.pass_time(5 * SECOND)
            self.deliver()
            core.settle()
        self.deliver()
        for actor in self.actors:
            assert not actor.parked, "a LEASE was never answered"
            while actor.old_maps:
                actor.answer_gone(0)
        core.audit()
        assert all(len(reports) == 1 for reports in self.clears), "a clear was not answered once"
        assert not store.leases, "a lease outlived its deadline"
        assert not store.tables.blocks["holds"].any(), "a block is held for ever"
        assert not store.arenas.busy, "an arena is on its way for ever"
        assert not store.arenas.stale, "an arena is stale for ever"
        assert store.next_tick_ns() is None, "something is still expected"

    def fill_up(self) -> None:
        """The whole tier still works: after a clear one client stores all of it and reads all of it back."""
        core = self.core
        for actor in self.actors:
            core.store.exited(actor.session)
        assert not core.store.sessions, "a session is remembered for ever"
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
