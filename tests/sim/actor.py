"""A simulated client: does what engines do, right and wrong, and compares every byte that it is promised."""

import random
from collections import deque
from dataclasses import dataclass

import xxhash

from kvproto.errors import Grant, Outcome
from kvstore.ports import Bytes
from kvstore.sessions import Lease, Namespace, Parked
from tests.core import MS, SECOND, Client, Core, Held, key_of, value_of, words
from tests.sim.model import Generation, Model

FAMILIES = 3
DEPTH = 12
TTLS_NS = (20 * MS, 200 * MS, SECOND, 5 * SECOND)


@dataclass(slots=True, eq=False)
class Writing:
    """A ticket of this client, and the generation that it will make."""

    namespace: Namespace
    ticket: int
    page: int
    generation: Generation
    lapses_ns: int
    committed: bool = False


@dataclass(slots=True, eq=False)
class Reading:
    """A lease, and what each of its blocks must read as until the deadline."""

    namespace: Namespace
    held: Held
    expected: list[bytes]
    deadline_ns: int


@dataclass(slots=True)
class Seen:
    """What a run has been through, so that a test can ask for enough of it."""

    steps: int = 0
    granted: int = 0
    published: int = 0
    asked_blocks: int = 0
    hit_blocks: int = 0
    read_blocks: int = 0
    scribbled: int = 0
    stale: int = 0
    discarded: int = 0
    full: int = 0
    busy: int = 0
    parked: int = 0
    deaths: int = 0
    zero_maps: int = 0
    recycled: int = 0
    evicted: int = 0
    expired: int = 0
    refused_arenas: int = 0

    def add(self, other: "Seen") -> None:
        """Sum over runs."""
        for name in Seen.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def path(rng: random.Random) -> list[bytes]:
    """A chain: the head of a family's trunk, then perhaps a branch of its own."""
    family, depth = rng.randrange(FAMILIES), rng.randrange(1, DEPTH)
    fork, branch = rng.randrange(1, DEPTH), rng.randrange(3)
    return [key_of((family, i, branch if i >= fork else 0, fork if i >= fork and branch else 0)) for i in range(depth)]


class Actor:
    """One session and its habits."""

    def __init__(self, core: Core, model: Model, seen: Seen, rng: random.Random, tenant: str) -> None:
        self.core, self.model, self.seen, self.rng = core, model, seen, rng
        self.client: Client = core.client(tenant, rng.choice((6, 16, 40)))
        self.session = self.client.session
        sizes = [64, 4096 + 32, 3 * 4096 - 7]
        self.namespaces = [self.client.open(size) for size in rng.sample(sizes, rng.choice((1, 1, 2)))]
        self.writing: dict[int, Writing] = {}
        self.reading: list[Reading] = []
        self.parked: dict[int, tuple[Namespace, list[bytes], int]] = {}
        self.old_maps: list[tuple[int, Bytes]] = []  # of arenas that are gone, kept mapped
        self.deaf = rng.random() < 0.3  # does not answer ARENA_GONE
        self.requests = 0
        self.stored: deque[tuple[Namespace, list[bytes]]] = deque(maxlen=8)  # what it may well find again

    def act(self) -> None:
        """Do one thing."""
        deeds = (
            (self.store, 8), (self.commit, 10), (self.abort, 1), (self.fetch, 10), (self.read, 6), (self.release, 4),
            (self.renew, 2), (self.match, 2), (self.delete, 1), (self.scribble, 2), (self.read_stale_map, 3),
        )  # fmt: skip
        self.rng.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])[0]()

    # -- writing -------------------------------------------------------------------------------------------------

    def store(self) -> None:
        """RESERVE: a chain from its root, or its end under a parent, sometimes an absent one or a key twice."""
        namespace, keys, parent = self.rng.choice(self.namespaces), path(self.rng), None
        if len(keys) > 2 and self.rng.random() < 0.3:
            cut = self.rng.randrange(1, len(keys))
            parent, keys = keys[cut - 1], keys[cut:]
        if self.rng.random() < 0.05:
            keys.append(keys[0])
        self.stored.append((namespace, keys))
        answers = self.client.reserve(namespace, keys, parent)
        grants = [answer.grant for answer in answers]
        made = self.model.reserved(namespace, parent, keys, grants)
        lapses_ns = self.core.clock.ns + self.core.store.limits.ticket_ttl_ns
        for answer, generation in zip(answers, made, strict=True):
            if generation is not None:
                generation.content = value_of(
                    generation.key + namespace.number.to_bytes(4, "little"),
                    namespace.identity.block_bytes,
                    version=self.rng.getrandbits(60),
                )
                self.client.write(namespace, answer.page, generation.content)
                self.writing[answer.ticket] = Writing(namespace, answer.ticket, answer.page, generation, lapses_ns)
        self.seen.granted += grants.count(Grant.GRANTED)
        self.seen.full += grants.count(Grant.FULL)
        self.seen.busy += grants.count(Grant.BUSY)

    def open_tickets(self) -> list[Writing]:
        """Tickets that are neither committed nor aborted."""
        return [writing for writing in self.writing.values() if not writing.committed]

    def commit(self) -> None:
        """COMMIT some, lapsed ones too."""
        some = self.open_tickets()
        if self.rng.random() < 0.5:
            some = [writing for writing in some if self.rng.random() < 0.5]
        if not some:
            return
        for writing in some:
            writing.committed = True
        self.client.commit([writing.ticket for writing in some])

    def abort(self) -> None:
        """ABORT one."""
        some = self.open_tickets()
        if some:
            writing = self.rng.choice(some)
            del self.writing[writing.ticket]
            self.core.store.abort(self.session, [writing.ticket])
            self.core.store.flush_outcomes(self.session)
            writing.generation.dead = True

    def scribble(self) -> None:
        """Write into a span again: after COMMIT the copy may catch it; a lapsed one must be nobody else's."""
        if not self.writing:
            return
        writing = self.rng.choice(list(self.writing.values()))
        size = writing.namespace.identity.block_bytes
        writing.generation.content = value_of(b"scribble", size, self.rng.getrandbits(60))
        self.client.write(writing.namespace, writing.page, writing.generation.content)
        self.seen.scribbled += 1

    def told(self) -> None:
        """Take in PUBLISHED."""
        said = self.core.outbox.outcomes.pop(self.session.number, {})
        for ticket, number in said.items():
            writing, outcome = self.writing.pop(ticket), Outcome(number)
            assert writing.committed, "an outcome for a ticket that was never committed"
            if outcome is Outcome.PUBLISHED:
                assert not writing.generation.dead, "published after it was dropped"
                assert not writing.generation.swept_above(), "published after what it continues was dropped"
                writing.generation.published = True
                self.seen.published += 1
                assert self.client.match(writing.namespace, [writing.generation.key]) == 1, "published and not there"
            else:
                writing.generation.dead = True
                self.seen.stale += outcome is Outcome.STALE
                self.seen.discarded += outcome is Outcome.DISCARDED
            if outcome is Outcome.STALE:
                assert writing.lapses_ns <= self.core.clock.ns, "STALE before its time"

    def lapse(self) -> None:
        """The store's clock has ticked: tickets that are due have lapsed."""
        for writing in self.open_tickets():
            ticket = self.session.tickets[writing.ticket]
            if ticket.state.name == "LAPSED":
                assert writing.lapses_ns <= self.core.clock.ns, "a ticket lapsed before its time"
                writing.generation.dead = True

    # -- reading -------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """LEASE: from the root or from the middle, waiting for its own blocks or not."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        if self.stored and self.rng.random() < 0.7:
            namespace, keys = self.rng.choice(self.stored)
        if self.rng.random() < 0.3:
            keys = keys[self.rng.randrange(len(keys)) :]
        wait_ns = self.rng.choice((0, 0, 100 * MS, 2 * SECOND))
        ttl_ns = self.rng.choice(TTLS_NS)
        self.requests += 1
        answer = self.client.ask(namespace, keys, ttl_ns, wait_ns, self.requests)
        if isinstance(answer, Parked):
            self.parked[self.requests] = (namespace, keys, self.core.clock.ns + wait_ns)
            self.seen.parked += 1
            return
        self.hold(namespace, keys, answer)

    def answered(self, parked: Parked, lease: Lease | None, locations: list[tuple[int, int]]) -> None:
        """The answer to a LEASE that had to wait."""
        namespace, keys, _ = self.parked.pop(parked.request)
        self.hold(namespace, keys, None if lease is None else self.client.held(lease, locations))

    def hold(self, namespace: Namespace, keys: list[bytes], held: Held | None) -> None:
        """Check a fresh lease to the last byte, and remember what it must read as."""
        self.seen.asked_blocks += len(keys)
        if held is None:
            return
        self.seen.hit_blocks += held.blocks
        if held.deadline_ns < self.core.clock.ns:
            return  # the answer to a LEASE that had to wait was read late: a miss
        expected = [self.model.hit(namespace, key).content for key in keys[: held.blocks]]
        reading = Reading(namespace, held, expected, held.deadline_ns)
        for index in range(held.blocks):
            self.compare(reading, index)
        arenas = self.core.store.arenas
        rows = [arenas.row_at(arenas.positions_by_id[arena], slot) for arena, slot in held.locations]
        for row, content in zip(rows, expected, strict=True):
            checksum = int(self.core.store.tables.blocks[row]["checksum"])
            assert checksum == xxhash.xxh3_64_intdigest(content), "the checksum is of other bytes"
        self.reading.append(reading)

    def compare(self, reading: Reading, index: int) -> None:
        """A block of a lease that is not over must read as it did."""
        found = self.client.read(reading.namespace, reading.held, index)
        assert found == reading.expected[index], "wrong bytes"
        self.seen.read_blocks += 1

    def read(self) -> None:
        """Read all of one lease, late or not: what the clock says afterwards decides whether it counts."""
        if self.reading:
            reading = self.rng.choice(self.reading)
            if self.core.clock.ns <= reading.deadline_ns:
                for index in range(reading.held.blocks):
                    self.compare(reading, index)

    def release(self) -> None:
        """RELEASE; of a lease that is over this is no news, and some are never released."""
        if self.reading:
            reading = self.reading.pop(self.rng.randrange(len(self.reading)))
            if self.core.clock.ns <= reading.deadline_ns or self.rng.random() < 0.5:
                self.client.release(reading.held)

    def renew(self) -> None:
        """RENEW."""
        if not self.reading:
            return
        reading = self.rng.choice(self.reading)
        deadline_ns = self.core.store.renew(self.session, reading.held.number, self.rng.choice(TTLS_NS))
        if self.core.clock.ns <= reading.deadline_ns:
            assert deadline_ns >= reading.deadline_ns, "a deadline moved back"
            reading.deadline_ns = deadline_ns
        else:
            assert deadline_ns == 0, "a lease that was over came back"

    def match(self) -> None:
        """MATCH."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        for key in keys[: self.client.match(namespace, keys)]:
            self.model.hit(namespace, key)

    # -- dropping ------------------------------------------------------------------------------------------------

    def delete(self) -> None:
        """DELETE a few keys of a chain, and with them all that continues them."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        keys = self.rng.sample(keys, self.rng.randrange(1, min(3, len(keys)) + 1))
        tops = self.model.dropped(namespace, keys)
        self.core.store.delete(namespace, words(keys), 0, len(keys), lambda _: self.model.is_over(tops))

    def arena_gone(self, arena: int) -> None:
        """ARENA_GONE: the map is kept for a while; some never answer."""
        self.old_maps.append((arena, self.client.maps.pop(arena)))
        if not self.deaf:
            self.answer_gone(self.rng.randrange(len(self.old_maps)))

    def answer_gone(self, index: int) -> None:
        """ARENA_DROPPED."""
        arena, _ = self.old_maps.pop(index)
        self.core.store.arena_dropped(self.session, arena)

    def read_stale_map(self) -> None:
        """Look at an arena that is gone: zeros once it is punched, and a page of it comes back."""
        if not self.old_maps:
            return
        arena, mapped = self.rng.choice(self.old_maps)
        if arena in self.core.memory.punched:
            assert not mapped.any(), "a stale map shows bytes of somebody else"
            self.core.memory.read_late(arena, self.rng.randrange(mapped.size))
            self.seen.zero_maps += 1
        elif self.rng.random() < 0.5 and not self.deaf:
            self.answer_gone(self.old_maps.index((arena, mapped)))

    # -- the end -------------------------------------------------------------------------------------------------

    def fail_all(self) -> None:
        """Whatever it was writing will never be published."""
        for writing in self.writing.values():
            writing.generation.dead = True
        self.writing.clear()
        self.parked.clear()
        self.core.outbox.outcomes.pop(self.session.number, None)
