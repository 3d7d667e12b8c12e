"""Leases whose blocks are not all in DRAM yet, or not verified: what is missing is read, and told of as it comes.

    LEASE -> run goes on outside DRAM -> places for what lies on disk -> Load and Verify batches
          -> LEASED with what is there -> READY, READY, ... in order -> the stream ends: all has come, one has failed,
             the time is over, or the lease

The lease holds the deepest block of the whole run from the start, so that nothing of it can go; what clients were not
told of may still fail. Concurrent leases of one block share its read. Owner thread.

However long a client would wait, it is promised little at a time, and that again and again: a successor must keep what
was promised, also to a client that is dead by then, and could not use that memory for so long.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvproto.limits import KEYS_PER_FRAME
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.ports import Outbox, Workers
from kvstore.room import Room
from kvstore.sessions import Lease, Namespace, Pool, Stream, Tenant
from kvstore.tier.loading import Loading
from kvstore.tier.orders import Load, Outcome, Verify
from kvstore.wheel import BUCKET_NS, Wheel

VERIFY_BYTES = 8 << 20  # hashed at a time
FIRST_BLOCKS = 8  # are asked of the drive before places for the rest are looked for, which takes 20 us each
PROMISE_NS = 2 * 10**9  # to a client that waits, however briefly it wants to read

MakeRoom = Callable[[Pool, bool], Room]
Sweeper = Callable[[Tenant, int], None]
Renew = Callable[[Lease, int], None]


def promise_ns(ttl_ns: int, wait_ns: int) -> int:
    """How far ahead a lease is promised whose blocks may be coming for `wait_ns` more."""
    return min(ttl_ns + wait_ns, max(ttl_ns, PROMISE_NS))


class Streams:
    """All streams, and the reads and verifications that they wait for."""

    def __init__(
        self, tables: Tables, outbox: Outbox, workers: Workers, loading: Loading, namespaces: dict[int, Namespace],
        make_room: MakeRoom, sweep: Sweeper, renew: Renew, relieve: Callable[[], bool], over: Callable[[Stream], None],
    ) -> None:  # fmt: skip
        """`over` hears of each stream that ends before its lease does."""
        self._tables = tables
        self._outbox = outbox
        self._workers = workers
        self._loading = loading
        self._namespaces = namespaces
        self._make_room = make_room
        self._sweep = sweep
        self._renew = renew
        self._relieve = relieve
        self._over = over
        self._waiting: dict[int, list[Stream]] = {}  # by the row that a stream needs next
        self._wheel: Wheel[Stream] = Wheel()
        self._todo: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._ends: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._verifying: dict[int, list[Verify]] = {}  # batches, by the identity of their first order
        self.evicted = 0  # to make room, since anybody looked
        self.verified = 0
        self.verify_faults = 0

    # -- a lease goes on outside DRAM ----------------------------------------------------------------------------

    def extend(
        self, namespace: Namespace, keys: U8, at: int, count: int, found: int, run: U4, patient: int, now_ns: int
    ) -> tuple[int, int]:
        """Have what continues a run of `found` resident blocks brought in. All of it is held until `settle`.

        Returns (where the run ends now, 0), or (0, row) if it goes on with a block that session `patient` is writing.
        """
        tables = self._tables
        end, _, stop = blocks.extend_run(tables, namespace.tenant.index, namespace.number, keys, at, count, found, run)
        reach = self._loading.away.reach(run, int(end))
        if reach < end:
            end, stop = reach, 0
        if stop and int(tables.blocks["writer"][stop]) == patient:
            return 0, stop
        blocks.hold_rows(tables, run, 0, end)
        reached = self._bring(namespace, run, found, end, now_ns)
        blocks.unhold_rows(tables, run, reached, end)
        return reached, 0

    def fetch(self, namespace: Namespace, run: U4, start: int, stop: int, now_ns: int) -> int:
        """Have what lies on disk of `run[start:stop]` read, for nobody in particular. How far there was room."""
        blocks.hold_rows(self._tables, run, 0, stop)
        reached = self._bring(namespace, run, start, stop, now_ns)
        blocks.unhold_rows(self._tables, run, 0, stop)
        return reached

    @property
    def awaited(self) -> bool:
        """Does a client wait for reads?"""
        return bool(self._waiting)

    def settle(self, run: U4, end: int) -> None:
        """The lease holds what it needs."""
        blocks.unhold_rows(self._tables, run, 0, end)

    def _bring(self, namespace: Namespace, run: U4, start: int, stop: int, now_ns: int) -> int:
        """Begin to read and verify blocks of a run. Returns how far there was room."""
        pool, may_evict, now = namespace.pool, False, np.uint64(now_ns)
        reached, most = start, FIRST_BLOCKS
        while reached < stop:
            until = min(stop, reached + most)
            reached, count, evicted = blocks.begin_loads(
                self._tables, namespace.tenant.index, pool.number, run, reached, until, may_evict, now, self._todo
            )
            self.evicted += evicted
            self._send(namespace, self._todo[:count], now_ns)
            if reached == until:
                most = stop
                continue
            room = self._make_room(pool, may_evict)
            if room is Room.EVICT and not may_evict:
                may_evict = True
            elif room is not Room.MADE and not self._relieve():
                break
        return reached

    def _send(self, namespace: Namespace, rows: U4, now_ns: int) -> None:
        if not rows.size:
            return
        kept = self._tables.blocks["state"][rows] == blocks.KEPT
        if kept.any():
            self._verify(namespace, rows[kept])
        if not kept.all():
            self._loading.load(namespace, rows[~kept], now_ns)

    def _verify(self, namespace: Namespace, rows: U4) -> None:
        table, arenas = self._tables.blocks, self._tables.arenas
        shift = int(self._tables.book[blocks.SHIFT])
        mask = (1 << shift) - 1
        most = max(1, VERIFY_BYTES // namespace.slot_bytes)
        slots, sums = table["slot"][rows].tolist(), table["checksum"][rows].tolist()
        orders = [
            Verify(
                row, checksum, int(arenas["id"][slot >> shift]), (slot & mask) * namespace.slot_bytes,
                namespace.identity.block_bytes,
            )
            for row, slot, checksum in zip(rows.tolist(), slots, sums, strict=True)
        ]  # fmt: skip
        for start in range(0, len(orders), most):
            batch = orders[start : start + most]
            self._verifying[id(batch[0])] = batch
            self._workers.submit(batch)

    def verify(self, namespace: Namespace, rows: U4) -> None:
        """Verify kept blocks that nobody has asked for yet; they are all of one namespace, and KEPT."""
        now = np.uint64(0)
        _, count, _ = blocks.begin_loads(
            self._tables, namespace.tenant.index, namespace.pool.number, rows, 0, rows.size, False, now, self._todo
        )
        self._verify(namespace, self._todo[:count])

    @property
    def verifying(self) -> bool:
        """Does any verification run?"""
        return bool(self._verifying)

    def held_rows(self) -> list[int]:
        """Rows that a verification holds, once for each."""
        return [order.row for batch in self._verifying.values() for order in batch]

    def begin(self, stream: Stream, now_ns: int) -> None:
        """A lease with blocks that are on their way."""
        self._look_again(stream, now_ns)
        stream.lease.session.tenant.in_flight += 1
        self._wait(stream)

    def _look_again(self, stream: Stream, now_ns: int) -> None:
        """When its time is over, or half of what is promised if that ends before."""
        promised_ns = stream.lease.deadline_ns - now_ns
        stream.due_ns = stream.until_ns
        if promised_ns < stream.until_ns - now_ns:
            stream.due_ns = min(stream.until_ns, now_ns + max(promised_ns // 2, BUCKET_NS))
        self._wheel.add(stream, stream.due_ns)

    def _wait(self, stream: Stream) -> None:
        self._waiting.setdefault(int(stream.rows[stream.announced]), []).append(stream)

    # -- what has come -------------------------------------------------------------------------------------------

    def finished(self, batch: Sequence[Load] | Sequence[Verify], now_ns: int) -> None:
        """Blocks were read or verified: they are resident, or their streams end."""
        tables, now = self._tables, np.uint64(now_ns)
        if isinstance(batch[0], Load):
            self._loading.loaded(batch, now_ns)  # type: ignore[arg-type]  # a batch is of one kind
        else:
            del self._verifying[id(batch[0])]
            good = sum(order.outcome is Outcome.DONE for order in batch)
            self.verified += good
            self.verify_faults += len(batch) - good
        moved: dict[Stream, None] = {}
        for order in batch:
            if order.outcome is not Outcome.DONE:
                self._failed(order.row, order.outcome)
        for order in batch:
            if order.outcome is Outcome.DONE:
                blocks.finish_load(tables, order.row, now)
            moved.update(dict.fromkeys(self._waiting.pop(order.row, ())))
        for stream in moved:
            self._advance(stream, now_ns)

    def _failed(self, row: int, outcome: Outcome) -> None:
        """No stream may cover this block any more; each keeps what comes before it."""
        for streams in list(self._waiting.values()):
            for stream in streams:
                place = np.flatnonzero(stream.rows == row)
                if place.size:
                    self._shorten(stream, int(place[0]))
        namespace = self._namespaces[int(self._tables.blocks["namespace"][row])]
        again = outcome is Outcome.FAILED
        if blocks.cancel_load(self._tables, namespace.tenant.index, row, not again):
            self._sweep(namespace.tenant, row)

    def leave_out_away(self, now_ns: int) -> None:
        """A drive answers nobody any more: streams end before what lies there alone."""
        reach, over = self._loading.away.reach, []
        for stream in [stream for streams in self._waiting.values() for stream in streams]:
            count = reach(stream.rows, stream.rows.size)
            if count < stream.rows.size:
                if count == stream.announced:
                    self._stop_waiting(stream)
                    over.append(stream)
                self._shorten(stream, count)
        for stream in over:
            self._advance(stream, now_ns)

    def _shorten(self, stream: Stream, count: int) -> None:
        """Only the first `count` blocks of a lease count from now on: it holds their ends and no others."""
        lease, table = stream.lease, self._tables.blocks
        held = blocks.hold_ends(self._tables, stream.rows, count, np.uint64(lease.deadline_ns), self._ends)
        alone = lease.ends[table["holds"][lease.ends] == 1]  # a successor need not withhold what nobody was told of
        table["lease_until_ns"][alone] = 0
        blocks.unhold_rows(self._tables, lease.ends, 0, lease.ends.size)
        lease.ends = self._ends[:held].copy()
        stream.rows = stream.rows[:count]

    def _advance(self, stream: Stream, now_ns: int) -> None:
        """Tell a client how far its blocks have come."""
        if stream.lease.stream is not stream:
            return  # the lease is over
        stop, may_come = blocks.ready_until(self._tables, stream.rows, stream.announced)
        first, stream.announced = stream.announced, stop
        if not may_come or now_ns >= stream.until_ns:
            self._end(stream, first)
            return
        if stop > first:
            self._renew(stream.lease, promise_ns(stream.ttl_ns, stream.until_ns - now_ns))
            self._outbox.ready(stream, first, stop, stream.rows.size - stop)
        self._wait(stream)

    def _end(self, stream: Stream, first: int) -> None:
        self._wheel.remove(stream, stream.due_ns)
        stream.lease.stream = None
        stream.lease.session.tenant.in_flight -= 1
        stream.lease.count = stream.announced
        self._over(stream)
        if stream.announced < stream.rows.size:  # what lies deeper may yet fail, and then protects nothing before it
            self._shorten(stream, stream.announced)
        self._renew(stream.lease, stream.ttl_ns)
        self._outbox.ready(stream, first, stream.announced, 0)

    def forget(self, stream: Stream) -> None:
        """The lease is over."""
        self._wheel.remove(stream, stream.due_ns)
        self._stop_waiting(stream)

    def _stop_waiting(self, stream: Stream) -> None:
        waiting = self._waiting.get(int(stream.rows[stream.announced])) if stream.announced < stream.rows.size else None
        if waiting is not None and stream in waiting:
            waiting.remove(stream)
            if not waiting:
                del self._waiting[int(stream.rows[stream.announced])]

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """What has not come in time does not come any more; who still waits for it is promised more."""
        for stream in self._wheel.due(now_ns):
            if stream.lease.stream is not stream:
                continue
            if now_ns < stream.until_ns:
                self._promise(stream, now_ns)
                continue
            self.forget(stream)
            stop, _ = blocks.ready_until(self._tables, stream.rows, stream.announced)
            first, stream.announced = stream.announced, stop
            self._end(stream, first)

    def _promise(self, stream: Stream, now_ns: int) -> None:
        """Nothing may have come, but the client can go on reading what has come before."""
        lease = stream.lease
        before_ns = lease.deadline_ns
        self._renew(lease, promise_ns(stream.ttl_ns, stream.until_ns - now_ns))
        if lease.deadline_ns > before_ns:
            self._outbox.ready(stream, stream.announced, stream.announced, stream.rows.size - stream.announced)
        self._look_again(stream, now_ns)

    def next_ns(self) -> int | None:
        """When to look again."""
        return self._wheel.next_ns()
