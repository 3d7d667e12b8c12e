"""The store: every verb of the hot socket, on plain values. One thread, no I/O; time passes through `tick`.

reserve -> (client copies into its ring) -> commit -> (leaf thread copies to the slot) -> copied -> published
lease   -> (client copies out of the arena) -> release, or the deadline
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvproto.errors import Grant, KvError, LimitError, NamespaceError, Outcome, TicketError, UsageError
from kvproto.frames import NOTHING_MATCHED, UNKNOWN_NS, Matched
from kvproto.identity import NamespaceIdentity
from kvproto.ids import NamespaceDigest
from kvproto.limits import (
    DISK_POOLS,
    DISK_SLOT_BYTES_MIN,
    FLUSHES_PER_SESSION,
    KEY_BYTES,
    KEYS_PER_FRAME,
    LEASE_MARGIN_NS,
    LEASE_TTL_NS_MAX,
    LEASES_PER_SESSION,
    NAMESPACES,
    NAMESPACES_PER_SESSION,
    NAMESPACES_PER_TENANT,
    PAGE_BYTES,
    PARKED_PER_SESSION,
    POOLS,
    POOLS_PER_TENANT,
    STORED_PER_SESSION,
    TENANTS,
    TICKET_TTL_NS,
    TICKETS_PER_SESSION,
    slot_bytes_for,
)
from kvstore import blocks
from kvstore.arenas import Arenas, slot_shift
from kvstore.blocks import ARENA, BLOCK, GHOST, POOL, SLOT, U4, U8, Index, Tables
from kvstore.journal import JOURNAL_BYTES, Journal, Record
from kvstore.ports import Clock, FormerMemory, Memory, Outbox, Randomness, Workers
from kvstore.report import ClearReport, ClearScope
from kvstore.restart import FORMAT, Former, Kept, LeftOver, find_former, settle_left_over, take_over
from kvstore.ring import Ring
from kvstore.room import Room, make_room
from kvstore.sessions import (
    Copy,
    Lease,
    Namespace,
    Parked,
    Pool,
    Session,
    Stored,
    Stream,
    Tenant,
    Ticket,
    TicketState,
)
from kvstore.streams import Streams
from kvstore.sweeps import SLICE_STEPS, Clear, Count, Done, Each, Job, Jobs, Sweep
from kvstore.tally import Tally
from kvstore.tier.demotion import CALM_NS
from kvstore.tier.disk import NO_DISK, Disk, DiskLimits, Flush
from kvstore.tier.orders import Found, Load, Name, Order, Verify
from kvstore.tier.scrub import NOWHERE
from kvstore.wheel import Wheel

DUE_A_TICK = 256  # leases or tickets that end in one tick: about a millisecond
VERIFY_ROWS, VERIFY_BYTES = 256, 16 << 20  # of kept blocks, verified at a time
GHOSTS_A_BLOCK = 4  # of those that DRAM holds; evicted longer ago, a block is not remembered
DRAIN_LOOK_NS = 10 * 10**6  # how often to look whether the last lease on a drained arena has ended

ITEM = np.dtype([("grant", "<u4"), ("page", "<u4"), ("ticket", "<u8")])  # kvproto.frames.RESERVED_ITEM
_NOBODY = -1
_BEYOND_DRAM = -2

Items = np.ndarray[tuple[int], np.dtype[np.void]]
Indices = np.ndarray[tuple[int], np.dtype[np.intp]]


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes and durations of one store."""

    dram_bytes: int
    arena_bytes: int
    ticket_ttl_ns: int = TICKET_TTL_NS
    lease_ttl_ns_max: int = LEASE_TTL_NS_MAX
    slice_steps: int = SLICE_STEPS  # of what is dropped in the background, between two events
    disk: DiskLimits = NO_DISK
    first_generation: int = 1  # larger than any that a former life gave


class Store:
    """All blocks of one daemon. Owner thread only."""

    def __init__(
        self, limits: Limits, clock: Clock, randomness: Randomness, memory: Memory, outbox: Outbox,
        workers: Workers | None = None, former: FormerMemory | None = None,
    ) -> None:  # fmt: skip
        """Without `workers` there is no disk tier, whatever the limits say. `former`: what a predecessor left."""
        self.limits = limits
        self.tally = Tally()
        self.draining = False
        self._clock = clock
        self._randomness = randomness
        self._memory = memory
        self._outbox = outbox
        found, why_cold = _find_former(limits, former)
        self.tables = _make_tables(limits, memory)
        positions = limits.dram_bytes // limits.arena_bytes
        self.arenas = Arenas(self.tables, memory, outbox, limits.arena_bytes, positions)
        self.tenants: dict[str, Tenant] = {}
        self.namespaces: dict[tuple[Tenant, bytes], Namespace] = {}
        self.sessions: dict[int, Session] = {}
        self.leases: dict[int, Lease] = {}
        self._pools: dict[tuple[Tenant, int], Pool] = {}
        self._by_number: dict[int, Namespace] = {}
        self._jobs = Jobs(self.tables, self.arenas, limits.slice_steps)
        workers = workers or NoWorkers()
        self.disk = Disk(
            limits.disk, self.tables, workers, self.arenas.by_number, self.tenants, self._by_number, self._sweep,
            clock.wall_s, positions, limits.dram_bytes,
        )  # fmt: skip
        self.streams = Streams(
            self.tables, outbox, workers, self.disk, self._by_number,
            lambda pool, exhausted: self._make_room(pool, exhausted=exhausted),
            lambda tenant, block: self._begin(Sweep(self.tables, tenant, [block])), self._prolong,
            self.release_riding,
        )  # fmt: skip
        self._ticket_wheel: Wheel[Ticket] = Wheel()
        self._lease_wheel: Wheel[Lease] = Wheel()
        self._parked_wheel: Wheel[Session] = Wheel()
        self._drain_look_ns = 0
        self.riding: tuple[Session, Sequence[int]] | None = None  # leases to be given back behind the answer
        self._next_session = 1
        self._unverified: deque[int] = deque()
        self._published_ns = -CALM_NS
        self._run = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._ends = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._grants = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self.journal = Journal(memory.table("journal", JOURNAL_BYTES), self._everybody)
        self.kept = Kept(reason=why_cold)
        self.left_over: LeftOver | None = None  # of what was kept, and continues what lies on disk
        if found is not None and former is not None:
            self.kept = take_over(self, found, former)
            self._begin_verifying()
            if not self.disk.when_serving(self._settle_left_over):
                self._settle_left_over()
        self.journal.begin(self._everybody())

    # -- sessions and namespaces ---------------------------------------------------------------------------------

    def attach(self, tenant_name: str, ring_bytes: int) -> Session:
        """Begin a session. Raises LimitError past the number of tenants."""
        tenant = self.tenants.get(tenant_name) or self._add_tenant(tenant_name)
        given = np.zeros(self.arenas.positions, dtype=np.uint8)
        session = Session(self._next_session, tenant, Ring(ring_bytes), given)
        session.next_ticket = 1 + (self._randomness.word() >> 2)
        session.next_lease = 1 + (self._randomness.word() >> 2)
        self._next_session += 1
        tenant.sessions += 1
        self.sessions[session.number] = session
        self.tally.sessions_opened += 1
        return session

    def _add_tenant(self, name: str) -> Tenant:
        if len(self.tenants) >= TENANTS:
            raise LimitError(f"more than {TENANTS} tenants")
        number = len(self.tenants)
        heads = self._memory.table(f"index-{number}", 4 * _index_buckets(self.limits), lasting=False).view(np.uint32)
        shape = np.array([8, 0, 0, self._randomness.word(), self._randomness.word()], dtype=np.uint64)
        tenant = Tenant(name, number, Index(heads, shape))
        self.tenants[name] = tenant
        self.journal.add(["tenant", name])
        return tenant

    def detach(self, session: Session) -> None:
        """The socket is closed: tickets end, leases live on until released, due, or `exited`."""
        if not session.attached:
            return
        session.attached = False
        session.tenant.sessions -= 1
        session.parked.clear()
        if session.tickets:
            self._begin(Each(session.tickets.values(), self._give_up, lambda: self._forget(session)))
        for namespace in session.namespaces.values():
            namespace.sessions -= 1
        session.namespaces.clear()
        self._forget(session)

    def _give_up(self, ticket: Ticket) -> None:
        """End a ticket of a closed session; a running copy ends by itself, and for nothing."""
        if ticket.session.tickets.get(ticket.number) is not ticket:
            return
        if ticket.state is TicketState.COPYING:
            self._discard(ticket.session.tenant, ticket.block)
        else:
            self._cancel(ticket)

    def exited(self, session: Session) -> None:
        """The process is gone: nothing of it can read or write any more."""
        self.detach(session)
        session.exited = True
        self.release(session, list(session.leases))
        self.arenas.exited(session)
        self._forget(session)

    def bequeath(self, session: Session, heir: Session) -> None:
        """Two closed sessions of one living process: one record of what it may still map is enough."""
        assert not session.attached, "an open session maps for itself"
        assert not heir.attached, "an open session maps for itself"
        self.arenas.bequeath(session, heir)
        self._forget(session)

    def _forget(self, session: Session) -> None:
        """Drop the record of a session that can neither read nor write any more."""
        if session.attached or session.copies or session.tickets:
            return
        if session.exited or not (session.leases or session.arenas):
            self.sessions.pop(session.number, None)

    def open(self, session: Session, identity: NamespaceIdentity) -> Namespace:
        """Open a namespace in a session. Raises UsageError for blocks beyond an arena, LimitError past the limits."""
        digest = identity.digest()
        namespace = self.namespaces.get((session.tenant, digest))
        if namespace is None:
            namespace = self._add_namespace(session.tenant, identity, digest)
        if namespace.number not in session.namespaces:
            if len(session.namespaces) >= NAMESPACES_PER_SESSION:
                raise LimitError(f"more than {NAMESPACES_PER_SESSION} namespaces in a session")
            session.namespaces[namespace.number] = namespace
            namespace.sessions += 1
        return namespace

    def _add_namespace(self, tenant: Tenant, identity: NamespaceIdentity, digest: NamespaceDigest) -> Namespace:
        slot_bytes = slot_bytes_for(identity.block_bytes)
        if slot_bytes > self.limits.arena_bytes:
            raise UsageError(
                f"block_bytes {identity.block_bytes} is more than an arena holds ({self.limits.arena_bytes})"
            )
        pool = self.pool(tenant, slot_bytes)
        return self._file_namespace(
            Namespace(self._free_namespace_number(tenant), tenant, identity, digest, slot_bytes, pool)
        )

    def _file_namespace(self, namespace: Namespace) -> Namespace:
        self.namespaces[namespace.tenant, namespace.digest] = namespace
        self._by_number[namespace.number] = namespace
        self.journal.add(_as_record(namespace))
        return namespace

    def pool(self, tenant: Tenant, slot_bytes: int) -> Pool:
        """The pool of a slot size. Raises LimitError past the limits."""
        pool = self._pools.get((tenant, slot_bytes))
        if pool is None:
            if sum(owner is tenant for owner, _ in self._pools) >= POOLS_PER_TENANT:
                raise LimitError(f"more than {POOLS_PER_TENANT} slot sizes of one tenant")
            pool = self._pools[tenant, slot_bytes] = self.arenas.add_pool(tenant, slot_bytes)
            self.journal.add(["pool", tenant.name, slot_bytes])
        return pool

    # -- restart -------------------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC."""
        return self._clock.now_ns()

    def _everybody(self) -> list[Record]:
        """Tenants, pools and namespaces in the order in which they got their numbers."""
        records: list[Record] = [_geometry(self.limits)]
        records += [["tenant", name] for name in self.tenants]
        records += [["pool", pool.tenant.name, pool.slot_bytes] for pool in self.arenas.pools]
        records += [_as_record(self._by_number[number]) for number in sorted(self._by_number)]
        return records

    def restore_namespace(self, tenant: Tenant, identity: NamespaceIdentity, number: int) -> None:
        """A namespace of the former life, with the number that its rows bear. Raises KvError."""
        digest, slot_bytes = identity.digest(), slot_bytes_for(identity.block_bytes)
        if not 1 <= number < NAMESPACES:
            raise LimitError(f"namespace {number}")
        former = self._by_number.get(number)
        if former is not None:  # its number was given to another one later
            del self.namespaces[former.tenant, former.digest]
        self._file_namespace(Namespace(number, tenant, identity, digest, slot_bytes, self.pool(tenant, slot_bytes)))

    def hold_for_the_past(self, held: list[tuple[list[int], int]]) -> None:
        """Leases of the former life: these rows are held until their deadlines. Whoever reads them cannot say so."""
        for rows, until_ns in held:
            tenant = self._by_number[int(self.tables.blocks["namespace"][rows[0]])].tenant
            session = Session(self._next_session, tenant, Ring(0), np.zeros(self.arenas.positions, dtype=np.uint8))
            session.attached = False
            self._next_session += 1
            self.sessions[session.number] = session
            lease = Lease(session.number, session, len(rows), np.array(rows, dtype=np.uint32), until_ns, 0)
            lease.number = -session.number  # apart from those of living sessions
            self.leases[lease.number] = session.leases[lease.number] = lease
            self._lease_wheel.add(lease, until_ns + LEASE_MARGIN_NS)

    def _begin_verifying(self) -> None:
        rows = np.flatnonzero(self.tables.blocks["state"][: int(self.tables.book[blocks.UNUSED_ROW])] == blocks.KEPT)
        self._unverified.extend(rows[np.argsort(self.tables.blocks["touched"][rows])[::-1]].tolist())

    def _settle_left_over(self) -> None:
        left, self.left_over = self.left_over, None
        if left is None:
            return
        settled = settle_left_over(self, left)
        self.kept.blocks += settled
        self.kept.lost += left.rows.size - settled
        kept = left.rows[self.tables.blocks["state"][left.rows] == blocks.KEPT]
        self._unverified.extend(kept.tolist())

    @property
    def unverified(self) -> int:
        """Kept blocks that nobody has looked at yet, at most."""
        return len(self._unverified)

    def _verify_some(self) -> None:
        """Go on verifying kept blocks, the newest first, one batch at a time, while nobody stores."""
        table = self.tables.blocks
        if not self._unverified or self._clock.now_ns() < self._published_ns + CALM_NS:
            return
        while self._unverified and not self.streams.verifying:
            rows: list[int] = []
            most = VERIFY_ROWS
            while self._unverified and len(rows) < most:
                row = self._unverified[0]
                if table["state"][row] == blocks.KEPT and not table["flags"][row] & blocks.VERIFYING:
                    if rows and table["namespace"][row] != table["namespace"][rows[0]]:
                        break
                    slot_bytes = self._by_number[int(table["namespace"][row])].slot_bytes
                    most = min(VERIFY_ROWS, max(1, VERIFY_BYTES // slot_bytes))
                    rows.append(row)
                self._unverified.popleft()
            if rows:
                namespace = self._by_number[int(table["namespace"][rows[0]])]
                self.streams.verify(namespace, np.array(rows, dtype=np.uint32))

    def _free_namespace_number(self, tenant: Tenant) -> int:
        """A number that no block bears; past the tenant's limit, that of a namespace nobody uses any more."""
        mine = [namespace for (owner, _), namespace in self.namespaces.items() if owner is tenant]
        if len(mine) < NAMESPACES_PER_TENANT:
            number = len(self._by_number) + 1
            while number in self._by_number:  # a former life may have left gaps
                number = number + 1 if number < NAMESPACES - 1 else 1
            return number
        for namespace in mine:
            if not namespace.sessions and not self.tables.census[namespace.number]:
                del self.namespaces[tenant, namespace.digest]
                self.disk.commits.forget(namespace.number)
                return namespace.number
        raise LimitError(f"more than {NAMESPACES_PER_TENANT} namespaces of one tenant in use")

    def namespace(self, session: Session, number: int) -> Namespace:
        """The namespace a frame names. Raises NamespaceError unless this session opened it."""
        namespace = session.namespaces.get(number)
        if namespace is None:
            raise NamespaceError(f"namespace {number} was not opened in this session")
        return namespace

    # -- reading -------------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, keys: U8, at: int, count: int) -> Matched:
        """How long the lead run is. Takes nothing, touches nothing. `keys[at:]` are 4 words a key."""
        index = namespace.tenant.index
        found, stop = blocks.match_run(self.tables.blocks, *index, namespace.number, keys, at, count, self._run)
        pending = on_disk = 0
        if stop and self.tables.blocks["state"][stop] != blocks.WRITING:
            found, on_disk, stop = blocks.extend_run(
                self.tables, index, namespace.number, keys, at, count, found, self._run
            )
        if stop:
            pending = blocks.pending_run(self.tables, index, namespace.number, keys, at, count, found)
        tally = self.tally
        tally.matches += 1
        tally.match_hits += found
        tally.match_misses += count - found
        if not found and not pending:
            return NOTHING_MATCHED
        return Matched(0, found - on_disk, on_disk, pending, UNKNOWN_NS, UNKNOWN_NS)

    def lease(
        self, session: Session, namespace: Namespace, request: int, keys: U8, at: int, count: int,
        ttl_ns: int, wait_ns: int, locations: U4, locations_at: int,
    ) -> Lease | Parked | None:  # fmt: skip
        """Hold the lead run of a chain until a deadline; (arena, slot) pairs go to `locations`.

        Returns None where nothing is there, and Parked where the run ends at a block that this session is still
        writing: `Outbox.leased` then answers. With `wait_ns`, what lies outside DRAM is brought in: `lease.stream`.
        """
        now_ns = self._clock.now_ns()
        deadline_ns = now_ns + min(ttl_ns, self.limits.lease_ttl_ns_max)
        patient = session.number if wait_ns and len(session.parked) < PARKED_PER_SESSION else _NOBODY
        if len(session.leases) >= LEASES_PER_SESSION:
            self.tally.refused_quota += 1
            count = 0
        found, held, fresh, unsaved = blocks.find_and_lease(
            *self.tables, *namespace.tenant.index, namespace.number, keys, at, count, patient, wait_ns, now_ns,
            deadline_ns, self._run, locations, locations_at, session.given, self._ends,
        )  # fmt: skip
        beyond = found == _BEYOND_DRAM
        if beyond:
            found, held = self.streams.extend(namespace, keys, at, count, held, self._run, patient, now_ns)
        if held and (beyond or found < 0):
            copied = keys[at : at + 4 * count].copy()
            parked = Parked(request, namespace, copied, count, ttl_ns, now_ns + wait_ns, held)
            session.parked.append(parked)
            self._parked_wheel.add(session, parked.deadline_ns)
            return parked
        self.tally.leases += 1
        self.tally.lease_hits += found
        self.tally.lease_misses += count - found
        if not found:
            return None
        if beyond:
            return self._lease_beyond(session, request, found, ttl_ns, wait_ns, locations, locations_at)
        lease = self._add_lease(session, found, held, deadline_ns, fresh)
        if unsaved and self.limits.disk.disk_bytes:
            self.disk.leased(lease.ends)
        return lease

    def _add_lease(self, session: Session, count: int, held: int, deadline_ns: int, fresh: int) -> Lease:
        lease = Lease(session.next_lease, session, count, self._ends[:held].copy(), deadline_ns, fresh)
        session.next_lease += 1  # its own numbers: others' leases are not to be counted by them
        self.leases[lease.number] = session.leases[lease.number] = lease
        self._lease_wheel.add(lease, deadline_ns + LEASE_MARGIN_NS)
        return lease

    def _lease_beyond(
        self, session: Session, request: int, found: int, ttl_ns: int, wait_ns: int, locations: U4, locations_at: int
    ) -> Lease:
        """Lease a run that `Streams.extend` holds: what is there now, and the rest as it comes."""
        tables, run, now_ns = self.tables, self._run, self._clock.now_ns()
        deadline_ns = now_ns + min(wait_ns + ttl_ns, self.limits.lease_ttl_ns_max)
        held, fresh = blocks.lease_run(
            tables, run, found, now_ns, deadline_ns, locations, locations_at, session.given, self._ends
        )
        self.streams.settle(run, found)
        lease = self._add_lease(session, found, held, deadline_ns, fresh)
        rows = run[:found].copy()
        there, _ = blocks.ready_until(tables, rows, 0)
        if there < found:
            on_disk = (tables.blocks["state"][rows] == blocks.LOADING).astype(np.uint8)
            all_locations = locations[locations_at : locations_at + 2 * found].copy()
            stream = Stream(lease, request, rows, all_locations, on_disk, there, ttl_ns, now_ns + wait_ns)
            lease.count, lease.stream = there, stream
            self.tally.lease_disk_hits += int(on_disk.sum())
            self.streams.begin(stream)
        if self.limits.disk.disk_bytes:
            self.disk.leased(lease.ends)
        return lease

    def release(self, session: Session, numbers: Sequence[int]) -> None:
        """Give leases back. One that has lapsed or is not this session's is no news."""
        for number in numbers:
            lease = session.leases.get(number)
            if lease is not None:
                self._lease_wheel.remove(lease, lease.deadline_ns + LEASE_MARGIN_NS)
                self._end_lease(lease)

    def release_riding(self) -> bool:
        """Give back the leases that ride on the frame that is being handled; whether there were any."""
        if self.riding is None or not self.riding[1]:
            return False
        (session, numbers), self.riding = self.riding, None
        self.release(session, numbers)
        return True

    def renew(self, session: Session, number: int, ttl_ns: int) -> int:
        """Move a lease's deadline, never to an earlier time. Returns it, or 0 if the lease is over.

        It stays where it is if a block was dropped meanwhile: nobody can keep memory that was given up by renewing.
        """
        lease = session.leases.get(number)
        now_ns = self._clock.now_ns()
        if lease is None or lease.deadline_ns < now_ns:
            return 0
        self._prolong(lease, ttl_ns)
        return lease.deadline_ns

    def _prolong(self, lease: Lease, ttl_ns: int) -> None:
        deadline_ns = self._clock.now_ns() + min(ttl_ns, self.limits.lease_ttl_ns_max)
        dropped = self.tables.blocks["state"][lease.ends] == blocks.DOOMED
        if deadline_ns > lease.deadline_ns and not dropped.any():
            self._lease_wheel.remove(lease, lease.deadline_ns + LEASE_MARGIN_NS)
            lease.deadline_ns = deadline_ns
            blocks.renew_run(self.tables, lease.ends, np.uint64(deadline_ns))
            self._lease_wheel.add(lease, deadline_ns + LEASE_MARGIN_NS)

    def _end_lease(self, lease: Lease) -> None:
        if lease.stream is not None:
            self.streams.forget(lease.stream)
            lease.stream = None
        del self.leases[lease.number], lease.session.leases[lease.number]
        blocks.end_lease(*self.tables, lease.ends, self._clock.now_ns())
        self._forget(lease.session)

    # -- writing -------------------------------------------------------------------------------------------------

    def reserve(
        self,
        session: Session,
        namespace: Namespace,
        keys: U8,
        at: int,
        count: int,
        parent_at: int | None,
        items: Items,
    ) -> None:
        """A ticket and a span for each new block of a chain. `items` receives one `ITEM` a key.

        `parent_at`: where in `keys` the parent's key lies, None for a chain from the root.
        """
        index = namespace.tenant.index
        grants = self._grants
        items["page"][:count] = 0
        items["ticket"][:count] = 0
        previous, rooted = 0, True
        if parent_at is not None:
            previous = blocks.find_one(self.tables, index, namespace.number, keys, parent_at)
            rooted = previous != 0
        refusal = None  # of whatever is new; what is there already is known all the same
        if self.draining:
            refusal = Grant.DRAINING
        elif namespace.slot_bytes > session.ring.pages * PAGE_BYTES:
            refusal = Grant.QUOTA  # no span will ever be large enough
        spans = self._spans_free(session, namespace, count) if refusal is None else 0
        self._answer_keys(session, namespace, keys, at, count, previous, rooted, spans)
        if refusal is not None:
            grants[:count][grants[:count] == Grant.BUSY] = refusal
        items["grant"][:count] = grants[:count]
        granted = np.flatnonzero(grants[:count] == Grant.GRANTED)
        if granted.size:
            self._issue_tickets(session, namespace, granted, items)
        self.tally.count_grants(grants[:count])

    def _spans_free(self, session: Session, namespace: Namespace, count: int) -> int:
        """How many blocks of a RESERVE the session's ring and tickets allow."""
        free = session.ring.spans_free(namespace.slot_bytes // PAGE_BYTES, count)
        return min(free, TICKETS_PER_SESSION - len(session.tickets))

    def _answer_keys(
        self, session: Session, namespace: Namespace, keys: U8, at: int, count: int, previous: int, rooted: bool,
        spans: int,
    ) -> None:  # fmt: skip
        pool, now = namespace.pool, np.uint64(self._clock.now_ns())
        cost = int(blocks.cost_of_seconds(namespace.recompute_ns * 1e-9))
        done, may_evict = 0, False
        while True:
            done, previous, spans, evicted = blocks.reserve_run(
                self.tables, namespace.tenant.index, pool.number, namespace.number, keys, at, count, done, previous,
                rooted, spans, may_evict, session.number, now, cost, self._grants, self._run,
            )  # fmt: skip
            self.tally.evicted += evicted
            if done == count:
                return
            rooted = True
            room = self._make_room(pool, exhausted=may_evict)
            if room is Room.EVICT:
                may_evict = True
            elif room is Room.BUSY:
                spans = 0  # the rest is BUSY too
            elif room is Room.FULL:
                self._grants[done] = Grant.FULL
                done, previous, rooted = done + 1, 0, False  # the rest has no parent

    def _issue_tickets(self, session: Session, namespace: Namespace, granted: Indices, items: Items) -> None:
        span_pages = namespace.slot_bytes // PAGE_BYTES
        pages = session.ring.take(span_pages, granted.size)
        lapses_ns = self._clock.now_ns() + self.limits.ticket_ttl_ns
        first = session.next_ticket
        session.next_ticket += granted.size
        items["page"][granted] = pages
        items["ticket"][granted] = np.arange(first, first + granted.size, dtype=np.uint64)
        rows = self._run[granted].tolist()
        for number, block, page in zip(range(first, first + granted.size), rows, pages, strict=True):
            ticket = Ticket(number, session, namespace, block, page, lapses_ns)
            session.tickets[number] = ticket
            self._ticket_wheel.add(ticket, lapses_ns)

    def _make_room(self, pool: Pool, *, exhausted: bool) -> Room:
        now_ns = self._clock.now_ns()
        room, position = make_room(self.arenas, self.tables, self.tenants.values(), pool, now_ns, exhausted=exhausted)
        if room is not Room.RECYCLE:
            return room
        self.arenas.drain(position, pool)
        others = self._jobs.queued  # may take away what the caller has in hand
        self.work()
        return Room.MADE if not others and int(self.tables.pools[pool.number]["open"]) else Room.BUSY

    def commit(self, session: Session, numbers: Sequence[int]) -> list[Copy]:
        """These spans are filled. Returns the copies to run.

        Raises TicketError for a foreign or reused ticket, before anything is changed: a copy that is begun must run.
        """
        copies: list[Copy] = []
        tables = self.tables
        tickets = [self._ticket(session, number) for number in numbers]
        if len(set(numbers)) != len(numbers):
            raise TicketError("a ticket is committed twice in one frame")
        for ticket in tickets:
            if ticket.state is TicketState.LAPSED:
                self._close_ticket(ticket, Outcome.STALE)
                continue
            self._ticket_wheel.remove(ticket, ticket.lapses_ns)
            if tables.blocks[ticket.block]["state"] == blocks.DOOMED:
                blocks.end_hold(tables, ticket.block)
                self._close_ticket(ticket, Outcome.DISCARDED)
                continue
            ticket.state = TicketState.COPYING
            session.copies += 1
            position, slot = blocks.locate(tables, ticket.block)
            copies.append(
                Copy(
                    ticket,
                    ticket.page * PAGE_BYTES,
                    int(tables.arenas[position]["id"]),
                    slot * ticket.namespace.slot_bytes,
                    ticket.namespace.identity.block_bytes,
                )
            )
        return copies

    def _ticket(self, session: Session, number: int) -> Ticket:
        ticket = session.tickets.get(number)
        if ticket is None or ticket.state is TicketState.COPYING:
            raise TicketError(f"ticket {number} is not this session's, or was used before")
        return ticket

    def copied(self, ticket: Ticket, checksum: int) -> None:
        """A leaf thread has copied and hashed a block: publish it, unless it was dropped meanwhile."""
        session = ticket.session
        session.copies -= 1
        now_ns = self._clock.now_ns()
        if not session.attached:
            self._discard(session.tenant, ticket.block)  # whoever wrote it is gone
        alive = blocks.publish(self.tables, ticket.block, np.uint64(checksum), np.uint64(now_ns))
        if alive:
            self.tally.published += 1
            self.tally.published_bytes += ticket.namespace.identity.block_bytes
            self._published_ns = now_ns
            if self.limits.disk.disk_bytes:
                self._remember(ticket)
        self._close_ticket(ticket, Outcome.PUBLISHED if alive else Outcome.DISCARDED)
        self._forget(session)

    def _remember(self, ticket: Ticket) -> None:
        """The disk tier may want this block now, and FLUSH will."""
        row, generation = ticket.block, int(self.tables.blocks["generation"][ticket.block])
        self.disk.published(row, generation, ticket.namespace.slot_bytes, self._clock.now_ns())
        stored = ticket.session.stored.setdefault(ticket.namespace.number, Stored())
        if len(stored.rows) >= STORED_PER_SESSION:
            stored.lost += len(stored.rows)
            stored.rows.clear()
            stored.generations.clear()
        stored.rows.append(row)
        stored.generations.append(generation)

    def flush(
        self, session: Session, namespace: Namespace, request: int, wait_ns: int
    ) -> tuple[int, int, int, int] | None:
        """Make what this session published in a namespace durable: (durable, failed, evicted, pending).

        None if that takes time: `Outbox.durable` then answers. Raises LimitError for too many at once.
        """
        if self.disk.flushes_of(session) >= FLUSHES_PER_SESSION:
            raise LimitError(f"more than {FLUSHES_PER_SESSION} FLUSH at once")
        stored = session.stored.pop(namespace.number, Stored())
        flush = Flush(
            session, namespace, request, np.array(stored.rows, dtype=np.uint32),
            np.array(stored.generations, dtype=np.uint64), stored.lost, self._clock.now_ns() + wait_ns,
        )  # fmt: skip
        return self.disk.flush(flush)

    def finished(self, batch: Sequence[Order]) -> None:
        """`Workers` have carried out orders of one kind."""
        now_ns = self._clock.now_ns()
        first = batch[0]
        if isinstance(first, Load) and first.arena == NOWHERE:
            self.disk.scrub.finished(batch)  # type: ignore[arg-type]  # a batch is of one kind
        elif isinstance(first, Load | Verify):
            self.streams.finished(batch, now_ns)  # type: ignore[arg-type]  # a batch is of one kind
            self._verify_some()
        else:
            self.disk.finished(batch, now_ns)
        self._answer_flushes(now_ns)

    def _answer_flushes(self, now_ns: int) -> None:
        for flush, counts in self.disk.answered_flushes(now_ns):
            left = self.disk.undecided(flush)
            if left.rows:
                stored = flush.session.stored.setdefault(flush.namespace.number, Stored())
                stored.rows += left.rows
                stored.generations += left.generations
            self._outbox.durable(flush.session, flush.request, counts)

    def raise_generation(self, generation: int) -> None:
        """Former lives gave all below this one away."""
        self.tables.book[blocks.GENERATION] = max(int(self.tables.book[blocks.GENERATION]), generation)

    def open_disk(
        self, found: Sequence[Found], names: Sequence[Name], foreign: Sequence[int] = (), next_segment: int = 1
    ) -> None:
        """The index on disk has been read. `foreign`: numbers that are not to be used."""
        self.disk.open(
            found, names, foreign, next_segment, self.known_tenant, self._known_namespace, self._clock.now_ns()
        )

    def known_tenant(self, name: str) -> Tenant | None:
        """A tenant that somebody left something of; None if there are too many."""
        try:
            return self.tenants.get(name) or self._add_tenant(name)
        except LimitError:
            return None

    def _known_namespace(self, tenant_name: str, identity: NamespaceIdentity) -> Namespace | None:
        tenant, digest = self.known_tenant(tenant_name), identity.digest()
        if tenant is None:
            return None
        try:
            return self.namespaces.get((tenant, digest)) or self._add_namespace(tenant, identity, digest)
        except KvError:
            return None

    def _close_ticket(self, ticket: Ticket, outcome: Outcome) -> None:
        session = ticket.session
        session.ring.give(ticket.page, ticket.span_pages)
        del session.tickets[ticket.number]
        if outcome is Outcome.STALE:
            self.tally.stale += 1
        elif outcome is Outcome.DISCARDED:
            self.tally.discarded += 1
        if session.attached:
            session.outcomes.append((ticket.number, outcome))

    def abort(self, session: Session, numbers: Sequence[int]) -> None:
        """These spans will not be filled. Raises TicketError for a foreign or reused ticket."""
        for number in numbers:
            self._cancel(self._ticket(session, number))

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.state is TicketState.OPEN:
            self._ticket_wheel.remove(ticket, ticket.lapses_ns)
            self._end_reservation(ticket)
        ticket.session.ring.give(ticket.page, ticket.span_pages)
        del ticket.session.tickets[ticket.number]

    def _end_reservation(self, ticket: Ticket) -> None:
        self._discard(ticket.session.tenant, ticket.block)
        blocks.end_hold(self.tables, ticket.block)

    def _discard(self, tenant: Tenant, block: int) -> None:
        """Drop a block that is being written, and all that waits on it."""
        if self.tables.blocks[block]["state"] != blocks.DOOMED:
            self._sweep(tenant, block)

    def flush_outcomes(self, session: Session) -> None:
        """Tell a session what became of its tickets, and answer what waited for them."""
        if not session.attached:
            session.outcomes.clear()
            return
        if session.outcomes:
            outcomes, session.outcomes = session.outcomes, []
            self._outbox.published(session, outcomes)
        if session.parked:
            self._retry_parked(session)

    def _retry_parked(self, session: Session) -> None:
        now_ns = self._clock.now_ns()
        waiting, session.parked = session.parked, []
        for parked in waiting:
            row = self.tables.blocks[parked.block]
            if now_ns < parked.deadline_ns and row["state"] == blocks.WRITING and row["writer"] == session.number:
                session.parked.append(parked)  # what it waits for is still on its way
                continue
            locations = np.zeros(2 * parked.count, dtype=np.uint32)
            wait_ns = max(0, parked.deadline_ns - now_ns)
            lease = self.lease(
                session, parked.namespace, parked.request, parked.keys, 0, parked.count, parked.ttl_ns, wait_ns,
                locations, 0,
            )  # fmt: skip
            if not isinstance(lease, Parked):
                self._outbox.leased(session, parked, lease, locations)

    # -- dropping ------------------------------------------------------------------------------------------------

    def delete(self, namespace: Namespace, keys: U8, at: int, count: int, done: Done) -> None:
        """Forget blocks and all that continues them. They never hit again; `done(blocks)` when nothing is left.

        While the index on disk is still being read, that is when it has been: what it knows of them goes too.
        """
        tenant, answer = namespace.tenant, done
        if self.disk.opening:
            copied = keys[at : at + 4 * count].copy()

            def answer(dropped: int) -> None:
                def again() -> None:
                    self.delete(namespace, copied, 0, count, lambda more: done(dropped + more))

                if not self.disk.when_serving(again):
                    again()

        tops = []
        for i in range(count):
            block = blocks.find_one(self.tables, tenant.index, namespace.number, keys, at + 4 * i)
            if block:
                blocks.begin_sweep(self.tables, tenant.index, block)
                tops.append(block)
        self._begin(
            Sweep(
                self.tables, tenant, tops,
                lambda dropped: self._jobs.when_swept(tenant, lambda: self.disk.when_erased(lambda: answer(dropped))),
            )
        )  # fmt: skip

    def clear(self, scope: ClearScope, done: Callable[[ClearReport], None], *, dry_run: bool) -> None:
        """Drop or only count what a scope names; `done` hears what there was. Raises KeyError for unknown names."""
        if self.disk.opening and not dry_run:
            self.disk.when_serving(lambda: self._clear_late(scope, done))
            return
        chosen = self._chosen(scope)
        wanted = np.zeros(NAMESPACES, dtype=np.uint32)
        wanted[[namespace.number for namespace in chosen]] = 1

        def drop(counted: int, counted_bytes: int, leased: int, pending: int) -> None:
            report = ClearReport(counted, counted_bytes, leased, pending, dry_run)

            def answer(_dropped: int = 0) -> None:
                self._jobs.when_swept(None, lambda: self.disk.when_erased(lambda: done(report)))

            if dry_run:
                done(report)
            elif scope.keys:
                self._drop_tops(chosen, scope.keys, answer)
            else:
                self._jobs.start(Clear(self.tables, self.arenas, wanted, answer))

        tops = (row for namespace in chosen for row in self._rows(namespace, scope.keys))
        self._begin(Count(self.tables, self.arenas, wanted, tops if scope.keys else None, drop))

    def _clear_late(self, scope: ClearScope, done: Callable[[ClearReport], None]) -> None:
        try:
            self.clear(scope, done, dry_run=False)
        except KeyError:  # nobody knows of it, neither here nor on disk
            done(ClearReport(0, 0, 0, 0, dry_run=False))

    def _chosen(self, scope: ClearScope) -> list[Namespace]:
        if scope.tenant is not None and scope.tenant not in self.tenants:
            raise KeyError(f"no tenant {scope.tenant!r}")
        chosen = [
            namespace
            for (tenant, digest), namespace in self.namespaces.items()
            if scope.tenant in (None, tenant.name) and scope.digest in (None, digest)
        ]
        if scope.digest is not None and not chosen:
            raise KeyError(f"no namespace {scope.digest.hex()}")
        return chosen

    def _rows(self, namespace: Namespace, keys: Sequence[bytes]) -> Iterator[int]:
        """Rows of those keys that are there when their turn comes: a row that was found earlier may be another's."""
        for key in dict.fromkeys(keys):
            words = np.frombuffer(key, dtype=np.uint64).copy()  # read-only arrays would be compiled for apart
            row = blocks.find_one(self.tables, namespace.tenant.index, namespace.number, words, 0)
            if row:
                yield row

    def _drop_tops(self, chosen: list[Namespace], keys: Sequence[bytes], done: Done) -> None:
        if not chosen:
            done(0)
        for namespace in chosen:
            tops = []
            for row in self._rows(namespace, keys):
                blocks.begin_sweep(self.tables, namespace.tenant.index, row)
                tops.append(row)
            self._jobs.start(Sweep(self.tables, namespace.tenant, tops, done if namespace is chosen[-1] else None))

    def _sweep(self, tenant: Tenant, block: int) -> None:
        blocks.begin_sweep(self.tables, tenant.index, block)
        self._begin(Sweep(self.tables, tenant, [block]))

    def _begin(self, job: Job) -> None:
        """Start a job; its first slice runs at once unless others wait."""
        idle = not self._jobs.waiting
        self._jobs.start(job)
        if idle:
            self.work()

    def work(self) -> None:
        """One slice of whatever is being dropped."""
        self._jobs.run(self._clock.now_ns())

    def arena_punched(self, arena: int) -> None:
        """`Memory.punch_arena` has finished."""
        self.arenas.punched(arena)

    def fresh_arenas(self, session: Session, arenas: U4) -> list[int]:
        """Those of some arenas whose descriptors a session lacks; from now on it is taken to have them."""
        fresh = [arena for arena in np.unique(arenas).tolist() if arena not in session.arenas]
        for arena in fresh:
            self.arenas.gave(session, arena)
        return fresh

    def arena_dropped(self, session: Session, arena: int) -> None:
        """A session maps nothing of an arena any more."""
        self.arenas.dropped(session, arena)
        self._forget(session)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Whatever time has brought: lapsed tickets and leases, waits that are over, a slice of sweeping."""
        now_ns = self._clock.now_ns()
        for lease in self._lease_wheel.due(now_ns, DUE_A_TICK):
            self.tally.leases_expired += 1
            self._end_lease(lease)
        for ticket in self._ticket_wheel.due(now_ns, DUE_A_TICK):
            ticket.state = TicketState.LAPSED
            self._end_reservation(ticket)
            if ticket.session.parked:
                self._parked_wheel.add(ticket.session, now_ns)
        self.streams.tick(now_ns)
        self._verify_some()
        self.disk.tick(now_ns)
        self._answer_flushes(now_ns)
        for session in self._parked_wheel.due(now_ns):
            if session.attached and session.parked:
                self._retry_parked(session)
        if self._jobs.waiting:
            self.work()
            self._drain_look_ns = now_ns + DRAIN_LOOK_NS

    def next_tick_ns(self) -> int | None:
        """When `tick` has something to do next, 0 for at once; None if nothing is set."""
        soonest = [
            wheel_ns
            for wheel_ns in (
                self._lease_wheel.next_ns(),
                self._ticket_wheel.next_ns(),
                self._parked_wheel.next_ns(),
                self.streams.next_ns(),
                self.disk.next_tick_ns(),
            )
            if wheel_ns is not None
        ]
        if self._unverified and not self.streams.verifying:
            soonest.append(self._published_ns + CALM_NS)
        if self._jobs.waiting:
            soonest.append(0 if self._jobs.queued else self._drain_look_ns)
        return min(soonest, default=None)


def _geometry(limits: Limits) -> Record:
    """What a successor must have in common with its predecessor to go on with its tables."""
    disk = limits.disk
    return ["store", FORMAT, limits.dram_bytes, limits.arena_bytes, disk.disk_bytes, disk.segment_bytes]


def _as_record(namespace: Namespace) -> Record:
    return ["namespace", namespace.number, namespace.tenant.name, namespace.identity.canonical().hex()]


def _find_former(limits: Limits, memory: FormerMemory | None) -> tuple[Former | None, str]:
    if memory is None:
        return None, "nothing was kept"
    limbo, _, rows = _dimensions(limits)
    sizes = {
        "book": 8 * blocks.BOOK_WORDS,
        "blocks": rows * BLOCK.itemsize,
        "arenas": (limbo + 1) * ARENA.itemsize,
        "journal": JOURNAL_BYTES,
    }
    found, why_cold = find_former(memory, sizes, _geometry(limits))
    if found is None:
        memory.drop_kept()
    return found, why_cold


class NoWorkers:
    """Where there is no disk tier, nobody is asked for anything."""

    def submit(self, batch: Sequence[Order]) -> None:
        """See the port."""
        raise AssertionError(f"nobody carries out {batch[0]}")

    def idle_share(self) -> float:
        """See the port."""
        return 0.0


def _dimensions(limits: Limits) -> tuple[int, int, int]:
    """Position of limbo, log2 of slot numbers a position, rows. Raises UsageError for what cannot be numbered."""
    positions, segments = limits.dram_bytes // limits.arena_bytes, limits.disk.segments
    if positions < 1:
        raise UsageError("DRAM holds not even one arena")
    shift = slot_shift(limits.arena_bytes)
    rows = (positions << shift) + limits.disk.rows + 1
    if segments:
        shift = max(shift, (limits.disk.segment_bytes // DISK_SLOT_BYTES_MIN - 1).bit_length())
    limbo = positions + segments
    if (limbo + 1) << shift >= blocks.NOBODY:
        raise UsageError(
            f"{positions} arenas and {segments} segments are more than 32 bits can number: take larger ones"
        )
    return limbo, shift, rows


def _make_tables(limits: Limits, memory: Memory) -> Tables:
    limbo, shift, rows = _dimensions(limits)
    positions, slots = limits.dram_bytes // limits.arena_bytes, (limbo + 1) << shift
    ghosts = GHOSTS_A_BLOCK * blocks.GHOST_WAYS * -(-(positions << slot_shift(limits.arena_bytes)) // blocks.GHOST_WAYS)
    book = memory.table("book", 8 * blocks.BOOK_WORDS).view(np.uint64)
    arenas = memory.table("arenas", (limbo + 1) * ARENA.itemsize).view(ARENA)
    book[:] = 0
    arenas[:] = 0
    tables = Tables(
        memory.table("blocks", rows * BLOCK.itemsize).view(BLOCK),
        memory.table("slots", slots * SLOT.itemsize, lasting=False).view(SLOT),
        arenas,
        memory.table("pools", (POOLS + DISK_POOLS + 1) * POOL.itemsize, lasting=False).view(POOL),
        memory.table("census", NAMESPACES * 4, lasting=False).view(np.uint32),
        book,
        memory.table("ranks", 8 * rows, lasting=False).view(np.float64),
        memory.table("ghosts", ghosts * GHOST.itemsize, lasting=False).view(GHOST),
    )
    book[blocks.UNUSED_ROW] = 1  # row 0 is nobody
    book[blocks.SHIFT] = shift
    book[blocks.GENERATION] = max(limits.first_generation, 1)
    book[blocks.ON_DISK] = positions
    book[blocks.LIMBO] = limbo
    tables.arenas[limbo]["pool"] = tables.pools.size
    return tables


def _index_buckets(limits: Limits) -> int:
    """Room for two buckets a block if a single tenant holds them all; a power of two, untouched until needed."""
    slots = limits.dram_bytes // PAGE_BYTES + limits.disk.rows
    return max(16, 2 << (slots - 1).bit_length())


assert BLOCK["key"].itemsize == KEY_BYTES
