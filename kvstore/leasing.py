"""MATCH, LEASE, RENEW, RELEASE: who may read which blocks until when. Owner thread.

LEASE --> the lead run lies in DRAM ----------------------> (arena, slot) pairs at once
      |-> it goes on outside DRAM, and the client waits --> what is there at once, the rest by READY (streams.py)
      `-> it ends at a block this session still writes ---> parked: answered when that is published, or too late

a lease ends by RELEASE, by its deadline plus LEASE_MARGIN_NS, or with its process
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvproto.limits import KEYS_PER_FRAME, LEASE_MARGIN_NS, LEASES_PER_SESSION, PARKED_PER_SESSION
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.costing import Costing
from kvstore.dropping import Dropping
from kvstore.ports import Clock, Outbox, Workers
from kvstore.registry import Registry
from kvstore.sessions import Lease, Missed, Namespace, Parked, Session, Stream
from kvstore.streams import Streams, promise_ns
from kvstore.sweeps import Sweeper
from kvstore.tables import Limits
from kvstore.tally import Tally
from kvstore.tier.disk import Disk
from kvstore.watch import Watch
from kvstore.wheel import Wheel

DUE_A_TICK = 256  # leases that end in one tick: about a millisecond

_NOBODY = -1
_BEYOND_DRAM = -2

Asked = Callable[[Namespace, U8, int, int, int, float], None]


def _nobody_hears(*_: object) -> None:
    pass


class _Answered(NamedTuple):
    """The last LEASE, whose use has not been noted yet. `Leasing._run` has its rows."""

    namespace: Namespace
    keys: U8
    at: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    found: int
    lease: Lease | None
    now_ns: int
    unsaved: bool
    streams: bool  # some of it is on its way, and counts when that is over


class Leasing:
    """All leases, and every LEASE that waits."""

    def __init__(
        self, limits: Limits, tables: Tables, clock: Clock, outbox: Outbox, workers: Workers, tally: Tally,
        registry: Registry, sweeper: Sweeper, disk: Disk, dropping: Dropping, costing: Costing,
        watch: Watch, forget: Callable[[Session], None],
    ) -> None:  # fmt: skip
        """`forget` hears of a session that a lease has ended of: it may have been the last thing it had."""
        self.leases: dict[int, Lease] = {}
        self.expiring: Wheel[Lease] = Wheel()
        self.parked: Wheel[Session] = Wheel()  # those that a LEASE waits in, by when the wait is over
        self.riding: tuple[Session, Sequence[int]] | None = None  # leases to be given back behind the answer
        self.asked: Asked = _nobody_hears  # `Watching`, of each LEASE that is answered,
        self.fell_short: Callable[[Namespace, U8, int, int], None] = _nobody_hears  # and of what then did not come
        self.cut: Callable[[Lease], None] = _nobody_hears  # `DeviceVerbs`, of each that ends while blocks come for it
        self.missed: Missed = _nobody_hears  # `Remote`, of each that had less than it asked for
        self.touched: Callable[[U4, int], None] = _nobody_hears  # `Remote`, of the rows of each lease
        self._limits = limits
        self._tables = tables
        self._clock = clock
        self._outbox = outbox
        self._tally = tally
        self._disk = disk
        self._costing = costing
        self._watch = watch
        self._forget = forget
        self.streams = Streams(
            tables, outbox, workers, disk.loading, registry.by_number, dropping.make_room, sweeper.sweep, self._prolong,
            self.release_riding, self._stream_over,
        )  # fmt: skip
        self._answered: _Answered | None = None
        self._run = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._ends = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)

    # -- taking --------------------------------------------------------------------------------------------------

    def lease(
        self, session: Session, namespace: Namespace, request: int, keys: U8, at: int, count: int,
        ttl_ns: int, wait_ns: int, locations: U4, locations_at: int,
    ) -> Lease | Parked | None:  # fmt: skip
        """Hold the lead run of a chain until a deadline; (arena, slot) pairs go to `locations`.

        Returns None where nothing is there, and Parked where the run ends at a block that this session is still
        writing: `Outbox.leased` then answers. With `wait_ns`, what lies outside DRAM is brought in: `lease.stream`.
        Call `account` once the answer is sent.
        """
        self.account()
        now_ns = self._clock.now_ns()
        deadline_ns = now_ns + min(ttl_ns, self._limits.lease_ttl_ns_max)
        if wait_ns and session.tenant.crowded():
            session.tenant.refused += 1
            wait_ns = 0  # what is there at once is its answer
        patient = session.number if wait_ns and len(session.parked) < PARKED_PER_SESSION else _NOBODY
        if len(session.leases) >= LEASES_PER_SESSION:
            self._tally.refused_quota += 1
            count = 0
        found, held, fresh, unsaved = blocks.find_and_lease(
            *self._tables, *namespace.tenant.index, namespace.number, keys, at, count, patient, wait_ns, now_ns,
            deadline_ns, self._run, locations, locations_at, session.given, self._ends,
        )  # fmt: skip
        beyond = found == _BEYOND_DRAM
        if beyond:
            found, held = self.streams.extend(namespace, keys, at, count, held, self._run, patient, now_ns)
        if held and (beyond or found < 0):
            copied = keys[at : at + 4 * count].copy()
            parked = Parked(request, namespace, copied, count, ttl_ns, now_ns + wait_ns, held)
            session.parked.append(parked)
            session.tenant.in_flight += 1
            self.parked.add(session, parked.deadline_ns)
            return parked
        self._tally.leases += 1
        self._tally.lease_misses += count - found
        if not found:
            self._answered = _Answered(namespace, keys, at, count, 0, None, now_ns, False, False)
            return None
        if beyond:
            lease = self._lease_beyond(
                session, namespace, request, keys, at, found, ttl_ns, wait_ns, locations, locations_at
            )
        else:
            lease = self._add(session, found, held, deadline_ns, fresh)
        streams = lease.stream is not None
        self._tally.lease_hits += 0 if streams else found
        self._answered = _Answered(namespace, keys, at, count, found, lease, now_ns, beyond or bool(unsaved), streams)
        return lease

    def account(self) -> None:
        """Note what the last LEASE has used: for its pool's rule, for curves, costs, pins, and for the disk tier.

        It waits until the answer is on its way, since nobody waits for it; and never longer than until the next verb.
        """
        answered = self._answered
        if answered is None:
            return
        self._answered = None
        namespace, keys, at, count, found, lease, now_ns, unsaved, streams = answered
        self.asked(namespace, keys, at, count, found, self._costing.row_seconds(self._run.item(0)) if found else 0.0)
        if found < count:
            self.missed(namespace, keys, at, count, found)
        if lease is None:
            return
        blocks.use_run(*self._tables, self._run, found, lease.ends, now_ns)
        if not streams:
            self._costing.leased(namespace, self._run, found)
        if self._watch.any:
            self._watch.leased(self._run[:found])
        if unsaved and self._limits.disk.disk_bytes:
            self._disk.leased(lease.ends)
        self.touched(self._run, found)

    def _add(self, session: Session, count: int, held: int, deadline_ns: int, fresh: int) -> Lease:
        lease = Lease(session.next_lease, session, count, self._ends[:held].copy(), deadline_ns, fresh)
        session.next_lease += 1  # its own numbers: others' leases are not to be counted by them
        self.leases[lease.number] = session.leases[lease.number] = lease
        self.expiring.add(lease, deadline_ns + LEASE_MARGIN_NS)
        return lease

    def _lease_beyond(
        self, session: Session, namespace: Namespace, request: int, keys: U8, at: int, found: int, ttl_ns: int,
        wait_ns: int, locations: U4, locations_at: int,
    ) -> Lease:  # fmt: skip
        """Lease a run that `Streams.extend` holds: what is there now, and the rest as it comes."""
        tables, run, now_ns = self._tables, self._run, self._clock.now_ns()
        rows = run[:found].copy()
        there, _ = blocks.ready_until(tables, rows, 0)
        coming_ns = wait_ns if there < found else 0  # the run may end at what there was no room for
        deadline_ns = now_ns + min(promise_ns(ttl_ns, coming_ns), self._limits.lease_ttl_ns_max)
        held, fresh = blocks.lease_run(
            tables, run, found, now_ns, deadline_ns, locations, locations_at, session.given, self._ends
        )
        self.streams.settle(run, found)
        lease = self._add(session, found, held, deadline_ns, fresh)
        if there < found:
            on_disk = (tables.blocks["state"][rows] == blocks.LOADING).astype(np.uint8)
            all_locations = locations[locations_at : locations_at + 2 * found].copy()
            coming = keys[at + 4 * there : at + 4 * found].copy()
            stream = Stream(
                lease, request, namespace, coming, found, rows, all_locations, on_disk, there, ttl_ns, now_ns + wait_ns
            )
            lease.count, lease.stream = there, stream
            self.streams.begin(stream, now_ns)
        return lease

    def _stream_over(self, stream: Stream) -> None:
        """What its client was told of is a hit, from wherever it came; what has not come is a miss."""
        came, short = stream.announced, stream.whole - stream.announced
        rows, on_disk = stream.rows[:came], stream.on_disk[:came]
        self._tally.lease_hits += came
        self._tally.lease_misses += short
        self._tally.lease_disk_hits += int(on_disk.sum())
        if came:
            self._costing.leased_beyond(stream.namespace, rows, on_disk)
        if short:
            self.fell_short(stream.namespace, stream.keys, stream.keys.size - 4 * short, short)

    def hold(self, session: Session, rows: Sequence[int], until_ns: int) -> None:
        """A lease of the former life. Whoever reads these rows cannot say when it is done."""
        number = -session.number  # apart from those of living sessions
        lease = Lease(number, session, len(rows), np.array(rows, dtype=np.uint32), until_ns, 0)
        self.leases[number] = session.leases[number] = lease
        self.expiring.add(lease, until_ns + LEASE_MARGIN_NS)

    # -- keeping, and giving back --------------------------------------------------------------------------------

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
        deadline_ns = self._clock.now_ns() + min(ttl_ns, self._limits.lease_ttl_ns_max)
        dropped = self._tables.blocks["state"][lease.ends] == blocks.DOOMED
        if deadline_ns > lease.deadline_ns and not dropped.any():
            self.expiring.remove(lease, lease.deadline_ns + LEASE_MARGIN_NS)
            lease.deadline_ns = deadline_ns
            blocks.renew_run(self._tables, lease.ends, np.uint64(deadline_ns))
            self.expiring.add(lease, deadline_ns + LEASE_MARGIN_NS)

    def release(self, session: Session, numbers: Sequence[int]) -> None:
        """Give leases back. One that has lapsed or is not this session's is no news."""
        self.account()
        for number in numbers:
            lease = session.leases.get(number)
            if lease is not None:
                self.expiring.remove(lease, lease.deadline_ns + LEASE_MARGIN_NS)
                self._end(lease)

    def release_riding(self) -> bool:
        """Give back the leases that ride on the frame that is being handled; whether there were any."""
        if self.riding is None or not self.riding[1]:
            return False
        (session, numbers), self.riding = self.riding, None
        self.release(session, numbers)
        return True

    def _end(self, lease: Lease) -> None:
        coming = lease.stream is not None
        if lease.stream is not None:
            self.streams.forget(lease.stream)
            self._stream_over(lease.stream)
            lease.stream = None
            lease.session.tenant.in_flight -= 1
        del self.leases[lease.number], lease.session.leases[lease.number]
        blocks.end_lease(*self._tables, lease.ends, self._clock.now_ns())
        self._forget(lease.session)
        if coming:
            self.cut(lease)

    # -- time ----------------------------------------------------------------------------------------------------

    def expire(self, now_ns: int) -> None:
        """Deadlines have passed."""
        self.account()
        for lease in self.expiring.due(now_ns, DUE_A_TICK):
            self._tally.leases_expired += 1
            self._end(lease)

    def look_again(self, session: Session, now_ns: int) -> None:
        """What a LEASE of this session waits for may never come any more: see at the next `answer_due`."""
        if session.parked:
            self.parked.add(session, now_ns)

    def answer_due(self, now_ns: int) -> None:
        """Answer every LEASE that has waited long enough."""
        for session in self.parked.due(now_ns):
            if session.attached and session.parked:
                self.answer_parked(session)

    def answer_parked(self, session: Session) -> None:
        """Answer what waited for blocks of this session that are published now, or dropped, or did not come in time."""
        now_ns = self._clock.now_ns()
        waiting, session.parked = session.parked, []
        session.tenant.in_flight -= len(waiting)
        for parked in waiting:
            row = self._tables.blocks[parked.block]
            if now_ns < parked.deadline_ns and row["state"] == blocks.WRITING and row["writer"] == session.number:
                session.parked.append(parked)  # what it waits for is still on its way
                session.tenant.in_flight += 1
                continue
            locations = np.zeros(2 * parked.count, dtype=np.uint32)
            wait_ns = max(0, parked.deadline_ns - now_ns)
            lease = self.lease(
                session, parked.namespace, parked.request, parked.keys, 0, parked.count, parked.ttl_ns, wait_ns,
                locations, 0,
            )  # fmt: skip
            if not isinstance(lease, Parked):
                self._outbox.leased(session, parked, lease, locations)
                self.account()
