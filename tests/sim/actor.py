"""A simulated client: does what engines do, right and wrong, and compares every byte that it is promised."""

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kvproto.errors import Grant, Outcome
from kvproto.limits import FLUSHES_PER_SESSION
from kvproto.policy_frames import Event, Hint, Tier
from kvstore import blocks
from kvstore.ports import Bytes
from kvstore.sessions import Lease, Namespace, Parked, Process
from tests.core import MS, SECOND, Client, Core, Held, key_of, value_of, words
from tests.fakes import Ready
from tests.sim.model import Generation, Model

FAMILIES = 3
DEPTH = 12
TTLS_NS = (20 * MS, 200 * MS, SECOND, 5 * SECOND)


@dataclass(slots=True, eq=False)
class Writing:
    """A ticket of this client, and the generation that it will make."""

    namespace: Namespace
    ticket: int
    span: Bytes  # where it writes: in its ring, or its slot
    arena: int  # of that slot; 0: it is in the ring
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
    keys: list[bytes]
    streams: bool = False  # more may come by READY
    coming: list[int] = field(default_factory=list)  # generations that the keys had when it was granted, if it streams


@dataclass(frozen=True, slots=True)
class Flushing:
    """A FLUSH and the blocks that it speaks of, as the store numbers them."""

    rows: list[int]
    generations: list[int]
    lost: int
    deadline_ns: int


@dataclass(frozen=True, slots=True)
class Habits:
    """What clients store."""

    sizes: tuple[int, ...] = (64, 4096 + 32, 3 * 4096 - 7)
    rings: tuple[int, ...] = (6, 16, 40)  # pages
    waits_ns: tuple[int, ...] = (0, 0, 100 * MS, 2 * SECOND)
    prompt: float = 0.0  # how often a client commits and releases as soon as it can
    copies: int = 5  # that end at a time
    memory: int = 8  # chains that it may well ask for again
    direct: float = 0.4  # share of the clients that write into slots themselves
    noise: float = 0.0  # share of the blocks of which a part does not shrink, however it is packed

    def content(self, seed: bytes, block_bytes: int, version: int) -> bytes:
        """Bytes of one block."""
        content = value_of(seed, block_bytes, version)
        rng = random.Random(version)
        if rng.random() >= self.noise:
            return content
        noisy = rng.randrange(block_bytes + 1)
        return rng.randbytes(noisy) + content[noisy:]


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
    rules: int = 0
    quotas: int = 0
    returned_arenas: int = 0
    quota: int = 0
    evicted: int = 0
    expired: int = 0
    refused_arenas: int = 0
    lives: int = 0
    disks: int = 0
    saved: int = 0
    packed: int = 0
    loaded: int = 0
    ready_blocks: int = 0
    streams: int = 0
    flushes: int = 0
    durable: int = 0
    returned: int = 0
    damaged: int = 0
    load_faults: int = 0
    save_faults: int = 0
    commit_faults: int = 0
    erased: int = 0
    vanished: int = 0
    back: int = 0  # of these
    hung: int = 0
    drained: int = 0
    warm: int = 0
    kept: int = 0
    verified: int = 0
    haunted: int = 0
    pinned: int = 0
    prefetched: int = 0
    expected: int = 0
    direct: int = 0  # blocks granted to be written in place
    strays: int = 0  # writes into slots by clients whose tickets or sessions are over
    scrubbed: int = 0  # passes over memory
    withheld: int = 0  # slots that a successor kept out of use for them
    operations: int = 0  # of clients
    ended_in_commit: int = 0  # lives, each while this was under way: copies,
    ended_in_publish: int = 0  # a block that is there, and its writer not told
    ended_in_demotion: int = 0  # writes to disk
    ended_in_promotion: int = 0  # reads from it
    ended_in_index_commit: int = 0
    ended_in_hand_over: int = 0  # what the life before had kept was being taken over

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

    def __init__(
        self, core: Core, model: Model, seen: Seen, rng: random.Random, tenant: str, habits: Habits,
        stored: deque[tuple[int, list[bytes]]],
    ) -> None:  # fmt: skip
        self.core, self.model, self.seen, self.rng, self.habits = core, model, seen, rng, habits
        self.owner = Process(rng.getrandbits(20), 1) if rng.random() < habits.direct else None
        self.client: Client = core.client(tenant, rng.choice(habits.rings), self.owner)
        self.strays: list[Writing] = []  # of a session that is over, while this process goes on
        self.session = self.client.session
        self.namespaces = [
            self.client.open(size) for size in rng.sample(habits.sizes, rng.choice((1, 1, len(habits.sizes[:2]))))
        ]
        self.writing: dict[int, Writing] = {}
        self.reading: list[Reading] = []
        self.parked: dict[int, tuple[Namespace, list[bytes], int]] = {}
        self.old_maps: list[tuple[int, Bytes]] = []  # of arenas that are gone, kept mapped
        self.deaf = rng.random() < 0.3  # does not answer ARENA_GONE
        self.requests = 0
        self.stored = stored  # what it may well find again: size of blocks, keys
        self.flushing: dict[int, Flushing] = {}
        self.pins: dict[int, list[tuple[int, int]]] = {}  # what each covers: rows and generations

    def act(self) -> None:
        """Do one thing."""
        deeds = (
            (self.store, 8), (self.commit, 10), (self.abort, 1), (self.fetch, 10), (self.read, 6), (self.release, 4),
            (self.renew, 2), (self.match, 2), (self.match_all, 1), (self.delete, 1), (self.scribble, 2),
            (self.read_stale_map, 3), (self.flush, 2), (self.pin, 2), (self.unpin, 1), (self.prefetch, 2),
            (self.expect, 2),
        )  # fmt: skip
        self.rng.choices([deed for deed, _ in deeds], [weight for _, weight in deeds])[0]()
        self.seen.operations += 1

    # -- keeping, and fetching in advance --------------------------------------------------------------------------

    def pin(self) -> None:
        """PIN what was stored lately, or anything; what it covers keeps its rows as long as the pin is there."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        if self.stored and self.rng.random() < 0.6:
            keys = self.rng.choice(self.stored)[1]
        pinned = self.core.store.pinning.pin(
            self.session.tenant, namespace, words(keys), 0, len(keys), self.rng.choice(TTLS_NS) * 10,
            self.rng.choice(list(Tier)), refresh=self.rng.random() < 0.5,
        )  # fmt: skip
        assert (pinned.pin == 0) == (pinned.blocks == 0)
        self.seen.pinned += pinned.blocks
        if pinned.pin:
            rows = self.core.store.pinning.pins[pinned.pin].rows
            self.pins[pinned.pin] = list(
                zip(rows.tolist(), self.core.store.tables.blocks["generation"][rows].tolist(), strict=True)
            )
        self.check_pins()

    def check_pins(self) -> None:
        """No block that a pin covers has made room for another."""
        pins = self.core.store.pinning.pins
        self.pins = {number: rows for number, rows in self.pins.items() if number in pins}
        for number, covered in self.pins.items():
            kept = dict(covered)
            for row in pins[number].rows.tolist():
                generation = int(self.core.store.tables.blocks["generation"][row])
                assert generation == kept[row], f"row {row}, which pin {number} covers, is another block's"

    def unpin(self) -> None:
        """UNPIN some, and numbers that are no pins."""
        self.check_pins()
        numbers = [*self.rng.sample(list(self.pins), min(len(self.pins), 2)), self.rng.getrandbits(40)]
        ended = self.core.store.pinning.unpin(self.session.tenant, numbers)
        assert ended == len(numbers) - 1

    def prefetch(self) -> None:
        """PREFETCH, and at times CANCEL."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        prefetching = self.core.store.prefetching
        fetching = prefetching.prefetch(
            self.session.tenant, namespace, words(keys), 0, len(keys), self.rng.choice(TTLS_NS), Tier.DRAM
        )
        self.seen.prefetched += fetching.coming
        if self.rng.random() < 0.2:
            prefetching.cancel(self.session.tenant, [fetching.prefetch])

    def expect(self) -> None:
        """HINT: when some blocks are needed next, or so it is said."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        hint = Hint(
            Event.EXPECT, "sim", namespace=namespace.number, expectation=self.rng.randrange(4), keys=b"".join(keys)
        )
        assert self.core.store.guiding.hear(self.session, hint) is None
        self.seen.expected += len(keys)

    # -- writing -------------------------------------------------------------------------------------------------

    def store(self) -> None:
        """RESERVE: a chain from its root, or its end under a parent, sometimes an absent one or a key twice."""
        namespace, keys, parent = self.rng.choice(self.namespaces), path(self.rng), None
        if len(keys) > 2 and self.rng.random() < 0.3:
            cut = self.rng.randrange(1, len(keys))
            parent, keys = keys[cut - 1], keys[cut:]
        if self.rng.random() < 0.05:
            keys.append(keys[0])
        self.stored.append((namespace.identity.block_bytes, keys))
        answers = self.client.reserve(namespace, keys, parent)
        grants = [answer.grant for answer in answers]
        made = self.model.reserved(namespace, parent, keys, grants)
        lapses_ns = self.core.clock.ns + self.core.store.limits.ticket_ttl_ns
        for answer, generation in zip(answers, made, strict=True):
            if generation is not None:
                generation.content = self.habits.content(
                    generation.name[2] + namespace.digest, namespace.identity.block_bytes, self.rng.getrandbits(60)
                )
                self.client.fill(namespace, answer, generation.content)
                span = self.client.span(namespace, answer)
                self.writing[answer.ticket] = Writing(
                    namespace, answer.ticket, span, answer.arena, generation, lapses_ns
                )
                self.seen.direct += answer.arena > 0
        if self.rng.random() < self.habits.prompt:
            self.commit_all(self.open_tickets())
        self.seen.granted += grants.count(Grant.GRANTED)
        self.seen.full += grants.count(Grant.FULL)
        self.seen.busy += grants.count(Grant.BUSY)
        self.seen.quota += grants.count(Grant.QUOTA)

    def open_tickets(self) -> list[Writing]:
        """Tickets that are neither committed nor aborted."""
        return [writing for writing in self.writing.values() if not writing.committed]

    def commit(self) -> None:
        """COMMIT some, lapsed ones too."""
        some = self.open_tickets()
        if self.rng.random() < 0.5:
            some = [writing for writing in some if self.rng.random() < 0.5]
        if some:
            self.commit_all(some)

    def commit_all(self, some: list[Writing]) -> None:
        """COMMIT these."""
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
        if self.writing:
            self.write_again(self.rng.choice(list(self.writing.values())))
            self.seen.scribbled += 1

    def write_again(self, writing: Writing) -> None:
        """Other bytes, to where it may write."""
        size = writing.namespace.identity.block_bytes
        writing.generation.content = self.habits.content(b"scribble", size, self.rng.getrandbits(60))
        writing.span[:] = np.frombuffer(writing.generation.content, dtype=np.uint8)
        if writing.arena in self.core.memory.punched:
            self.core.memory.written_late.add(writing.arena)

    def stray(self) -> None:
        """A thread that nobody told that the session is over goes on writing."""
        if self.strays:
            self.write_again(self.rng.choice(self.strays))
            self.seen.strays += 1

    def told(self, *, evicted: bool = False) -> None:
        """Take in PUBLISHED. What it names is there, unless that brought about a load that had something `evicted`."""
        said = self.core.outbox.outcomes.pop(self.session.number, {})
        for ticket, number in said.items():
            writing, outcome = self.writing.pop(ticket), Outcome(number)
            assert writing.committed, "an outcome for a ticket that was never committed"
            if outcome is Outcome.PUBLISHED:
                assert not writing.generation.dead, "published after it was dropped"
                assert not writing.generation.swept_above(), "published after what it continues was dropped"
                assert writing.generation.published, "published without a copy"
                self.seen.published += 1
                there = self.client.match(writing.namespace, [writing.generation.name[2]]) == 1
                assert there or evicted, "published and not there"
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
            block_bytes, keys = self.rng.choice(self.stored)
            mine = [each for each in self.namespaces if each.identity.block_bytes == block_bytes]
            namespace = mine[0] if mine else namespace
        if self.rng.random() < 0.3:
            keys = keys[self.rng.randrange(len(keys)) :]
        wait_ns = self.rng.choice(self.habits.waits_ns)
        ttl_ns = self.rng.choice(TTLS_NS)
        self.requests += 1
        answer = self.client.ask(namespace, keys, ttl_ns, wait_ns, self.requests)
        if isinstance(answer, Parked):
            self.parked[self.requests] = (namespace, keys, self.core.clock.ns + wait_ns)
            self.seen.parked += 1
            return
        self.hold(namespace, keys, answer)
        if self.reading and not self.reading[-1].streams and self.rng.random() < self.habits.prompt:
            self.client.release(self.reading.pop().held)

    def answered(self, parked: Parked, lease: Lease | None, locations: list[tuple[int, int]]) -> None:
        """The answer to a LEASE that had to wait."""
        namespace, keys, _ = self.parked.pop(parked.request)
        if lease is not None and lease.deadline_ns < self.core.clock.ns:
            return  # read late: a miss
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
        reading = Reading(namespace, held, expected, held.deadline_ns, keys)
        for index in range(held.blocks):
            self.compare(reading, index)
        for place, content in zip(held.locations, expected, strict=True):
            self.check_row(place, content)
        lease = self.session.leases.get(held.number)
        on_its_way = any(ready.lease.number == held.number for ready in self.core.outbox.readies)
        reading.streams = on_its_way or (lease is not None and lease.stream is not None)
        if reading.streams:  # what of it is dropped meanwhile comes all the same
            reading.coming = [self.model.look(namespace, key) for key in keys]
        self.seen.streams += reading.streams
        self.reading.append(reading)

    def check_row(self, place: tuple[int, int], content: bytes) -> None:
        """What the store says of a block that it shows."""
        arenas, (arena, slot) = self.core.store.arenas, place
        row = self.core.store.tables.blocks[arenas.row_at(arenas.positions_by_id[arena], slot)]
        assert row["state"] in {blocks.RESIDENT, blocks.DOOMED}, "a block is shown that is not there"
        assert int(row["checksum"]) == xxhash.xxh3_64_intdigest(content), "the checksum is of other bytes"

    def came(self, reading: Reading, key: bytes, place: tuple[int, int], coming: int) -> Generation:
        """Which generation has come by READY, and may have."""
        arenas, (arena, slot) = self.core.store.arenas, place
        row = arenas.row_at(arenas.positions_by_id[arena], slot)
        number = int(self.core.store.tables.blocks["generation"][row])
        if number == coming:
            return self.model.leased(reading.namespace, key, number)
        return self.model.hit(reading.namespace, key)

    def ready(self, ready: Ready) -> None:
        """READY: more blocks of a lease can be read, and for longer."""
        reading = next((one for one in self.reading if one.held.number == ready.lease.number), None)
        if reading is None:
            return  # released, or it was late
        assert reading.streams, "READY after the last one"
        reading.streams = ready.left > 0
        assert ready.deadline_ns >= reading.deadline_ns, "a deadline moved back"
        reading.deadline_ns = ready.deadline_ns
        named = np.array([arena for arena, _ in ready.locations], dtype=np.uint32)
        for arena in self.core.store.fresh_arenas(self.session, named):
            self.client.maps[arena] = self.core.memory.map(arena)
        for place in ready.locations:
            index = reading.held.blocks
            content = self.came(reading, reading.keys[index], place, reading.coming[index]).content
            reading.held.locations.append(place)
            reading.expected.append(content)
            self.check_row(place, content)
        for index in range(reading.held.blocks):
            if self.core.clock.ns <= reading.deadline_ns:
                self.compare(reading, index)
        if not reading.streams and self.rng.random() < self.habits.prompt:
            self.reading.remove(reading)
            self.client.release(reading.held)
        self.seen.hit_blocks += len(ready.locations)
        self.seen.ready_blocks += len(ready.locations)

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

    def haunt(self) -> bool:
        """The daemon has died and this process lives: what it had leased must not change. Is any of it left?"""
        self.reading = [reading for reading in self.reading if self.core.clock.ns <= reading.deadline_ns]
        for reading in self.reading:
            for index in range(reading.held.blocks):
                self.compare(reading, index)
            self.seen.haunted += reading.held.blocks
        self.stray()
        return bool(self.reading or self.strays)

    def end(self) -> None:
        """The process is gone."""
        self.reading.clear()
        self.strays.clear()

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
            self.model.known(namespace, key)

    def match_all(self) -> None:
        """MATCH_ALL: what all have is what each says for itself."""
        namespaces, keys = self.rng.choices(self.namespaces, k=self.rng.randrange(1, 4)), path(self.rng)
        there = self.client.match_all(namespaces, keys)
        assert there == min(self.client.match(namespace, keys) for namespace in namespaces)
        for namespace in namespaces:
            for key in keys[:there]:
                self.model.known(namespace, key)

    # -- dropping ------------------------------------------------------------------------------------------------

    def delete(self) -> None:
        """DELETE a few keys of a chain, and with them all that continues them."""
        namespace, keys = self.rng.choice(self.namespaces), path(self.rng)
        keys = self.rng.sample(keys, self.rng.randrange(1, min(3, len(keys)) + 1))
        tops = self.model.dropped(namespace, keys, opening=self.core.store.disk.opening)
        self.core.store.delete(namespace, words(keys), 0, len(keys), lambda _: self.model.is_over(tops))

    def arena_gone(self, arena: int) -> None:
        """ARENA_GONE: the map is kept for a while; some never answer."""
        writable = self.client.writable.pop(arena, None)
        mapped = self.client.maps.pop(arena, writable)
        assert mapped is not None, "told of an arena that it never had"
        self.old_maps.append((arena, mapped))
        if not self.deaf and self.rng.random() < 0.3:
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
            late = arena in self.core.memory.written_late  # then they are this tenant's own
            assert late or not mapped.any(), "a stale map shows bytes of somebody else"
            self.core.memory.read_late(arena, self.rng.randrange(mapped.size))
            self.seen.zero_maps += 1
        elif self.rng.random() < 0.5 and not self.deaf:
            self.answer_gone(self.old_maps.index((arena, mapped)))

    # -- making durable ------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """FLUSH."""
        if len(self.flushing) >= FLUSHES_PER_SESSION:
            return
        namespace, store = self.rng.choice(self.namespaces), self.core.store
        stored = self.session.stored.get(namespace.number)
        wait_ns = self.rng.choice((30 * MS, SECOND, 10 * SECOND))
        self.requests += 1
        flushing = Flushing([], [], 0, self.core.clock.ns + wait_ns)
        if stored is not None:
            flushing = Flushing(list(stored.rows), list(stored.generations), stored.lost, self.core.clock.ns + wait_ns)
        self.flushing[self.requests] = flushing
        counts = store.flush(self.session, namespace, self.requests, wait_ns)
        self.seen.flushes += 1
        if counts is not None:
            self.flushed(self.requests, counts)

    def flushed(self, request: int, counts: tuple[int, int, int, int]) -> None:
        """The answer to FLUSH: what it calls durable lies on disk by now, with all that it continues."""
        flushing = self.flushing.pop(request)
        durable, failed, evicted, pending = counts
        assert min(counts) >= 0, "less than nothing"
        assert not pending or self.core.clock.ns >= flushing.deadline_ns, "FLUSH did not wait"
        if not self.core.store.limits.disk.disk_bytes:
            return
        assert durable + failed + evicted + pending == len(flushing.rows) + flushing.lost, "FLUSH miscounts"
        table, sure = self.core.store.tables.blocks, 0
        for row, number in zip(flushing.rows, flushing.generations, strict=True):
            one = table[row]
            alive = one["state"] not in {blocks.FREE, blocks.DOOMED} and int(one["generation"]) == number
            if alive and one["flags"] & blocks.DURABLE:
                sure += 1
                generation = self.model.published[number]
                generation.durable = self.check_durable(row)
        assert sure == durable, "FLUSH counts others as durable"
        self.seen.durable += durable

    def check_durable(self, row: int) -> bool:
        """A block and all that it continues: synced, and in the index. False if it is being dropped or was harmed."""
        table, drive = self.core.store.tables.blocks, self.core.drive
        shift = int(self.core.store.tables.book[blocks.SHIFT])
        chain = []
        while row:
            if table["state"][row] == blocks.DOOMED:
                return False
            chain.append(row)
            row = int(table["parent"][row])
        for at in chain:
            number, place = int(table["generation"][at]), int(table["disk"][at])
            generation = self.model.published[number]
            if generation.harmed or self.model.lingers(generation):
                return False
            assert place, "durable, and what it continues is not on disk"
            segment, slot = self.core.store.disk.segments.number_at(place >> shift), place & ((1 << shift) - 1)
            assert drive.recorded(segment, slot) == number, "durable, and the index does not know it"
            content = drive.content(segment, slot, synced=True)
            assert content == (number, generation.content), "durable, and not synced"
        return True

    # -- the end -------------------------------------------------------------------------------------------------

    def fail_all(self) -> None:
        """Whatever it was writing will never be published."""
        for writing in self.writing.values():
            writing.generation.dead |= not writing.generation.published  # it may be, and nobody was told
        if self.owner is not None:
            self.strays += self.open_tickets()
        self.writing.clear()
        self.parked.clear()
        self.flushing.clear()
        self.core.outbox.outcomes.pop(self.session.number, None)
