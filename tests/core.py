"""A store on fakes, and clients that use it as engines do: through a ring, by copies, by maps of arenas."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from kvproto.errors import Grant, Outcome
from kvproto.identity import NamespaceIdentity
from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES
from kvstore import blocks
from kvstore.audit import audit
from kvstore.blocks import DOOMED, U8
from kvstore.ports import Bytes
from kvstore.quotas import Quota
from kvstore.sessions import IN_PLACE, Copy, Lease, Namespace, Parked, Process, Session
from kvstore.store import ITEM, Limits, Store
from kvstore.sweeps import SLICE_STEPS
from kvstore.tier.disk import DiskLimits, DiskState
from tests.drive import FakeDrive
from tests.fakes import FakeClock, FakeMemory, FakeOutbox, FakeProcesses, FakeRandomness

MS = 10**6
SECOND = 10**9
MARGIN_NS = 100 * MS
ARENA_BYTES = 16 * PAGE_BYTES
BLOCK_BYTES = 96  # a slot is a page all the same


def key_of(name: object) -> bytes:
    """A key of 32 bytes for anything that prints."""
    return hashlib.sha256(str(name).encode()).digest()


def chain(count: int, name: object = "a") -> list[bytes]:
    """Keys of a chain; chains of different names share nothing."""
    return [key_of(f"{name}/{i}") for i in range(count)]


def words(keys: Sequence[bytes]) -> U8:
    """Keys as the store wants them."""
    return np.frombuffer(b"".join(keys), dtype=np.uint64).copy()


def value_of(key: bytes, block_bytes: int, version: int = 0) -> bytes:
    """Bytes that belong to one key, and to one version of it."""
    unit = hashlib.sha256(key + version.to_bytes(8, "little")).digest()
    return (unit * (block_bytes // len(unit) + 1))[:block_bytes]


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer to one key."""

    grant: Grant
    page: int  # of the ring; in mode direct a slot of `arena`
    ticket: int
    arena: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as its client sees it."""

    number: int
    deadline_ns: int
    locations: list[tuple[int, int]]

    @property
    def blocks(self) -> int:
        """Length of the run."""
        return len(self.locations)


class Core:
    """One store with everything around it."""

    def __init__(
        self,
        arenas: int = 4,
        arena_bytes: int = ARENA_BYTES,
        *,
        ticket_ttl_ns: int = 30 * SECOND,
        lease_ttl_ns_max: int = 60 * SECOND,
        slice_steps: int = SLICE_STEPS,
        seed: int = 1,
        memory: FakeMemory | None = None,
        disk: DiskLimits | None = None,
        drive: FakeDrive | None = None,
        first_generation: int = 1,
        clock: FakeClock | None = None,
        outbox: FakeOutbox | None = None,
        quotas: Mapping[str, Quota] | None = None,
        processes: FakeProcesses | None = None,
        scrub_bytes_per_s: int = 0,
    ) -> None:
        """With `disk` there is a disk tier on `drive`, which opens at once if it is new."""
        self.clock = clock or FakeClock()
        self.memory = memory or FakeMemory()
        self.outbox = outbox or FakeOutbox()
        limits = Limits(
            arenas * arena_bytes, arena_bytes, ticket_ttl_ns, lease_ttl_ns_max, slice_steps, disk or DiskLimits(),
            first_generation, quotas=quotas or {}, scrub_bytes_per_s=scrub_bytes_per_s,
        )  # fmt: skip
        self.drive = drive or FakeDrive(disk.segment_bytes if disk else 0)
        self.drive.memory = self.memory
        self.processes = processes or FakeProcesses()
        self.store = Store(
            limits, self.clock, FakeRandomness(seed), self.memory, self.outbox, self.drive, self.memory, self.processes
        )
        self.running: list[tuple[Copy, Bytes]] = []
        if disk and drive is None:
            self.open_disk()

    def client(self, tenant: str = "t", ring_pages: int = 64, owner: Process | None = None) -> "Client":
        """A new session; with an `owner` in mode direct."""
        return Client(self, tenant, ring_pages, owner)

    def open_disk(self) -> None:
        """The index has been read; recovery runs to its end."""
        self.store.open_disk(*self.drive.found())
        while self.store.disk.state is not DiskState.SERVING:
            self.store.tick()

    def work(self, index: int = 0) -> None:
        """A thread ends one batch of orders."""
        self.store.finished(self.drive.carry_out(index))

    def work_all(self) -> None:
        """All orders are carried out, and those that follow from them."""
        for _ in range(10_000):
            self.finish_all()
            self.store.tick()
            due_ns = self.store.next_tick_ns()
            if self.drive.waiting:
                self.work()
            elif due_ns is not None and due_ns <= self.clock.ns + 60 * MS:
                self.clock.ns = max(self.clock.ns, due_ns)
            else:
                return
        raise AssertionError("the disk tier never comes to rest")

    def finish(self, index: int = 0) -> None:
        """A leaf thread ends one running copy."""
        copy, ring = self.running.pop(index)
        target = self.memory.view(copy.arena)[copy.target_offset : copy.target_offset + copy.block_bytes]
        if copy.source_offset != IN_PLACE:
            target[:] = ring[copy.source_offset : copy.source_offset + copy.block_bytes]
        self.store.copied(copy.ticket, xxhash.xxh3_64_intdigest(target.tobytes()))
        self.store.flush_outcomes(copy.ticket.session)

    def finish_all(self) -> None:
        """All running copies end, in order."""
        while self.running:
            self.finish()

    def pass_time(self, ns: int) -> None:
        """Let time pass and the store notice."""
        self.clock.advance(ns)
        self.store.tick()

    def settle(self) -> None:
        """Whatever is being dropped, recycled or written comes to its end, or waits for a lease."""
        for step in range(10_000):
            while self.memory.punching:
                self.store.arena_punched(self.memory.finish_punch())
            if self.drive.waiting:
                self.work()
                continue
            if step > 5_000:  # or what looks again every nanosecond would keep all else from its time
                self.clock.ns += MS // 100
            due_ns = self.store.next_tick_ns()
            if due_ns is None or due_ns > self.clock.ns + 20 * MS:
                return
            if self._waits_for_leases():
                return
            self.clock.ns = max(self.clock.ns, due_ns)
            self.store.tick()
        raise AssertionError("the store never comes to rest")

    def _waits_for_leases(self) -> bool:
        """Is there nothing to do but to wait until the last lease on the drained arena has ended?"""
        position = self.store.arenas.draining
        if position is None or self.store.sweeper.jobs.queued:
            return False
        shift = int(self.store.tables.book[blocks.SHIFT])
        rows = self.store.tables.slots["block"][position << shift : (position + 1) << shift]
        return bool(rows.any()) and bool((self.store.tables.blocks["state"][rows[rows != 0]] == DOOMED).all())

    def audit(self) -> None:
        """Check everything."""
        audit(self.store)

    def checksum(self, namespace: Namespace, key: bytes) -> int:
        """What the table says of a block's bytes."""
        return int(self.store.tables.blocks[self.row(namespace, key)]["checksum"])

    def row(self, namespace: Namespace, key: bytes) -> int:
        """The row of a live key, found the slow way; 0 if there is none."""
        rows = self.store.tables.blocks
        mine = (rows["namespace"] == namespace.number) & (rows["state"] != 0) & (rows["state"] != 3)
        for row in np.flatnonzero(mine).tolist():
            if rows[row]["key"].tobytes() == key:
                return int(row)
        return 0


class Client:
    """One session, with its ring and its maps."""

    def __init__(self, core: Core, tenant: str, ring_pages: int, owner: Process | None = None) -> None:
        self.core = core
        self.store = core.store
        self.ring: Bytes = np.zeros(0 if owner else ring_pages * PAGE_BYTES, dtype=np.uint8)
        self.session: Session = core.store.attach(tenant, ring_pages * PAGE_BYTES, owner)
        if owner:
            core.processes.living.add(owner)
        self.maps: dict[int, Bytes] = {}
        self.writable: dict[int, Bytes] = {}
        self._items = np.zeros(KEYS_PER_FRAME, dtype=ITEM)

    def open(self, block_bytes: int = BLOCK_BYTES, model: str = "m") -> Namespace:
        """A namespace."""
        return self.store.open(self.session, NamespaceIdentity(model, "e", "l", "bf16", 16, block_bytes))

    # -- writing -------------------------------------------------------------------------------------------------

    def reserve(self, namespace: Namespace, keys: Sequence[bytes], parent: bytes | None = None) -> list[Reserved]:
        """RESERVE, with the parent's key in front as on the wire."""
        sent = words([parent or bytes(32), *keys])
        parent_at = 0 if parent is not None else None
        self._items[:] = 0
        self.store.reserve(self.session, namespace, sent, 4, len(keys), parent_at, self._items)
        rows = self._items[: len(keys)].tolist()
        arenas = [0] * len(keys)
        if self.session.owner is not None:
            granted = self._items["grant"][: len(keys)] == Grant.GRANTED
            arenas = np.where(granted, self.store.reserving.arenas[: len(keys)], 0).tolist()
            named = np.array([arena for arena in arenas if arena], dtype=np.uint32)
            for arena in self.store.fresh_writable(self.session, named):
                self.writable[arena] = self.core.memory.map_writable(arena)
        return [
            Reserved(Grant(grant), page, ticket, arena)
            for (grant, page, ticket), arena in zip(rows, arenas, strict=True)
        ]

    def span(self, namespace: Namespace, reserved: Reserved) -> Bytes:
        """Where a block is to be written."""
        into, unit = (
            (self.writable[reserved.arena], namespace.slot_bytes) if reserved.arena else (self.ring, PAGE_BYTES)
        )
        return into[reserved.page * unit : reserved.page * unit + namespace.identity.block_bytes]

    def fill(self, namespace: Namespace, reserved: Reserved, content: bytes) -> None:
        """Write a block."""
        self.span(namespace, reserved)[: len(content)] = np.frombuffer(content, dtype=np.uint8)

    def write(self, namespace: Namespace, page: int, content: bytes) -> None:
        """Fill a span of the ring."""
        self.fill(namespace, Reserved(Grant.GRANTED, page, 0), content)

    def commit(self, tickets: Sequence[int]) -> list[Copy]:
        """COMMIT; the copies run from now on."""
        copies = self.store.commit(self.session, tickets)
        self.core.running += [(copy, self.ring) for copy in copies]
        if self.session.outcomes:
            self.store.flush_outcomes(self.session)
        return copies

    def begin(self, namespace: Namespace, keys: Sequence[bytes], parent: bytes | None = None) -> list[int]:
        """RESERVE and fill: the tickets that were granted."""
        answers = self.reserve(namespace, keys, parent)
        tickets = []
        for key, answer in zip(keys, answers, strict=True):
            if answer.grant is Grant.GRANTED:
                self.fill(namespace, answer, value_of(key, namespace.identity.block_bytes))
                tickets.append(answer.ticket)
        return tickets

    def put(self, namespace: Namespace, keys: Sequence[bytes], parent: bytes | None = None) -> list[Grant]:
        """Store a chain to the end: the answers of RESERVE."""
        answers = self.reserve(namespace, keys, parent)
        for key, answer in zip(keys, answers, strict=True):
            if answer.grant is Grant.GRANTED:
                self.fill(namespace, answer, value_of(key, namespace.identity.block_bytes))
        self.commit([answer.ticket for answer in answers if answer.grant is Grant.GRANTED])
        self.core.finish_all()
        return [answer.grant for answer in answers]

    def outcome(self, ticket: int) -> Outcome | None:
        """What PUBLISHED has said of a ticket so far."""
        said = self.core.outbox.outcomes.get(self.session.number, {}).get(ticket)
        return None if said is None else Outcome(said)

    # -- reading -------------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, keys: Sequence[bytes]) -> int:
        """Length of the lead run, on whatever tier."""
        matched = self.store.match(namespace, words(keys), 0, len(keys))
        self.store.matching.account()  # as the daemon does once it has answered
        return matched.dram + matched.disk

    def match_all(self, namespaces: Sequence[Namespace], keys: Sequence[bytes]) -> int:
        """Length of the run that all of these have."""
        matched = self.store.match_all(namespaces, words(keys), 0, len(keys))
        self.store.matching.account()
        return matched.dram + matched.disk

    def ask(
        self, namespace: Namespace, keys: Sequence[bytes], ttl_ns: int = SECOND, wait_ns: int = 0, request: int = 1
    ) -> Held | Parked | None:
        """LEASE, as the wire has it."""
        locations = np.zeros(2 * KEYS_PER_FRAME, dtype=np.uint32)
        lease = self.store.lease(
            self.session, namespace, request, words(keys), 0, len(keys), ttl_ns, wait_ns, locations, 0
        )
        if not isinstance(lease, Lease):
            return lease
        pairs = locations[: 2 * lease.count].reshape(-1, 2).tolist()
        return self.held(lease, [(arena, slot) for arena, slot in pairs])

    def held(self, lease: Lease, locations: list[tuple[int, int]]) -> Held:
        """Take over a lease: map the arenas that come with it."""
        if lease.fresh:
            named = np.array([arena for arena, _ in locations], dtype=np.uint32)
            for arena in self.store.fresh_arenas(lease.session, named):
                self.maps[arena] = self.core.memory.map(arena)
        assert all(arena in self.maps for arena, _ in locations), "an arena came without its descriptor"
        return Held(lease.number, lease.deadline_ns, locations)

    def lease(self, namespace: Namespace, keys: Sequence[bytes], ttl_ns: int = SECOND) -> Held:
        """A lease that must be granted."""
        held = self.ask(namespace, keys, ttl_ns)
        assert isinstance(held, Held)
        return held

    def release(self, held: Held) -> None:
        """RELEASE."""
        self.store.release(self.session, [held.number])

    def read(self, namespace: Namespace, held: Held, index: int = 0) -> bytes:
        """One block through the map."""
        arena, slot = held.locations[index]
        start = slot * namespace.slot_bytes
        return self.maps[arena][start : start + namespace.identity.block_bytes].tobytes()

    def fetch(self, namespace: Namespace, keys: Sequence[bytes]) -> int:
        """Lease, compare every byte, release: the length of the run."""
        held = self.ask(namespace, keys)
        if not isinstance(held, Held):
            return 0
        for i in range(held.blocks):
            assert self.read(namespace, held, i) == value_of(keys[i], namespace.identity.block_bytes)
        self.release(held)
        return held.blocks

    # -- dropping ------------------------------------------------------------------------------------------------

    def delete(self, namespace: Namespace, keys: Sequence[bytes]) -> list[int]:
        """DELETE: a list that holds the answer once it has come."""
        answers: list[int] = []
        self.store.delete(namespace, words(keys), 0, len(keys), answers.append)
        return answers

    def drop_arena(self, arena: int) -> None:
        """Unmap an arena and say so."""
        self.maps.pop(arena, None)
        self.writable.pop(arena, None)
        self.store.arena_dropped(self.session, arena)
