"""Segments: files on disk that serve one slot size of one tenant for life; and who gives way there.

Life of a position
             MakeSegment           drain                      empty: DropSegment
    FREE -----------------> SERVING -----------> DRAINING ----------------------------> FREE
      ^   \\ FAILED: not asked again for a while    no new block; those in DRAM too lose their copy here, the others
      '----'                                       are swept
                                    a file that could not be removed keeps a position from being used: tried again

One whose file is gone, say with its drive, is drained as well, but nothing is removed, and the index keeps what it says
of it: who finds it again, the next life does, serves what nobody has deleted meanwhile.
"""

from collections.abc import Iterable
from enum import Enum

import numpy as np

from kvproto.limits import DISK_POOLS_PER_TENANT, POOLS
from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.policies import Policies
from kvstore.ports import Workers
from kvstore.quotas import Shares
from kvstore.sessions import Pool, Tenant
from kvstore.tier.format import HEADER_BYTES
from kvstore.tier.orders import DropSegment, MakeSegment, Outcome

PROMISE_NS = 10**9  # how long a segment that was emptied for a tenant is kept for it
SLOW_NS = 10**9  # a segment that takes longer to make may be on a drive that hangs: nobody waits for it alone
SETTLED_NS = 30 * 10**9  # a segment touched since then does not give way to another size of its tenant
AGAIN_NS = 10**9  # how long until a file that could not be removed is tried again
REFUSED_NS = 10 * 10**9  # how long nobody asks for another segment after the system refused one


class Room(Enum):
    """What a pool on disk without a free slot is told."""

    SOON = 0  # a segment is on its way
    EVICT = 1  # its own oldest leaf gives way
    FULL = 2  # nothing can give way


class Segments:
    """All positions of the disk tier. Owner thread."""

    def __init__(
        self, tables: Tables, workers: Workers, pools: dict[int, Pool], policies: Policies, first: int, count: int,
        segment_bytes: int, shares: Shares,
    ) -> None:  # fmt: skip
        """`pools`: of both tiers, by number. `shares`: of disk."""
        self._shares = shares
        self._tables = tables
        self._workers = workers
        self._by_number = pools
        self._policies = policies
        self._wanted = np.zeros(tables.pools.size, dtype=np.uint32)
        self.segment_bytes = segment_bytes
        self.first = first
        self.positions = count
        self.free = list(range(first + count - 1, first - 1, -1))
        self.pools: dict[tuple[Tenant, int], Pool] = {}
        self.making: dict[int, MakeSegment] = {}  # by position
        self._begun_ns: dict[int, int] = {}  # of these
        self.position_of: dict[int, int] = {}  # by segment number
        self.draining: int | None = None  # position
        self._drain_from = 0
        self._wanted_by: Tenant | None = None  # whom the position that drains is for
        self._promised_to: Tenant | None = None  # whom the position drained last was for
        self._promised_until_ns = 0
        self.next_number = 1
        self.taken: set[int] = set()  # numbers of files that are not ours
        self.dropped: list[int] = []  # the index has yet to hear of it
        self.lost: set[int] = set()  # segments whose files are gone, and that are not drained yet
        self._going: set[int] = set()  # segments that were emptied, whose files are to be removed
        self._leaving: dict[int, int] = {}  # segments whose files could not be removed, and when to try again; 0: tried
        self._refused_until_ns = 0
        self.recycled = 0

    def largest_slot(self) -> int:
        """Bytes that the largest slot can have."""
        return self.segment_bytes - HEADER_BYTES

    def pool(self, tenant: Tenant, slot_bytes: int) -> Pool | None:
        """The pool of a slot size; None past the limits."""
        pool = self.pools.get((tenant, slot_bytes))
        if pool is None and slot_bytes <= self.largest_slot():
            if sum(owner is tenant for owner, _ in self.pools) >= DISK_POOLS_PER_TENANT:
                return None
            pool = Pool(POOLS + len(self.pools), tenant, slot_bytes)
            self._tables.pools[pool.number]["slot_bytes"] = slot_bytes
            self._policies.begin(pool)
            self.pools[tenant, slot_bytes] = self._by_number[pool.number] = pool
        return pool

    def number_at(self, position: int) -> int:
        """The segment at a position."""
        return int(self._tables.arenas[position]["id"])

    def pool_at(self, position: int) -> Pool:
        """The pool that a position serves."""
        return self._by_number[int(self._tables.arenas[position]["pool"]) - 1]

    def serving(self) -> int:
        """Positions with a segment."""
        return len(self.position_of)

    # -- making --------------------------------------------------------------------------------------------------

    def make_room(self, pool: Pool, now_ns: int) -> Room:
        """A new segment; else one of the tenant furthest above what is guaranteed to it, or of the tenant's own other
        sizes. A tenant at its maximum has nothing but its own, and above it gives one back.
        """
        mine = (order for order in self._coming(now_ns) if order.tenant == pool.tenant.name)
        if any(order.slot_bytes == pool.slot_bytes for order in mine):
            return Room.SOON
        most = self._shares.most(pool.tenant)
        capped = self._shares.has_maximum(pool.tenant) and self._charged(pool.tenant) >= most
        if not capped and self._begin(pool, now_ns):
            return Room.SOON
        oldest = int(blocks.next_victim(self._tables, pool.number))
        if self.draining is None and pool.tenant.segments > most:  # it was more once
            position = self._least_valuable((own for own in self.pools.values() if own.tenant is pool.tenant), now_ns)
            if position is not None:
                self.drain(position)
                return Room.SOON
        if self.draining is None and not self._refused(now_ns):
            position = None if capped else self._foreign(pool.tenant, now_ns)
            if position is None and not oldest:  # all that lies there is in DRAM too, or has what continues it:
                # not a segment of its own, or a chain longer than the pool would be written again and again
                others = (other for other in self.pools.values() if other.tenant is pool.tenant and other is not pool)
                position = self._least_valuable(others, now_ns)
                if position is not None and now_ns - self._touched_ns(position) < SETTLED_NS:
                    position = None  # two sizes would take it from each other for ever
            if position is not None:
                self.drain(position, pool.tenant)
                return Room.SOON
        return Room.EVICT if oldest else Room.FULL

    def make_ahead(self, pool: Pool, waiting: int, now_ns: int) -> None:
        """Begin a segment before a pool that goes on writing needs it, where that makes nobody give way: beside writes,
        making one takes as long as writing 100 to 200 MiB. With a quarter of the last one free, and long before that
        where so many chains wait that it will be needed, and it will not be missed elsewhere.
        """
        slots = self.largest_slot() // pool.slot_bytes
        left = pool.arenas * slots - int(self._tables.pools[pool.number]["blocks"])
        needed = waiting > left and 2 * len(self.free) > self.positions
        if 4 * left < (3 * slots if needed else slots) and not any(self._coming(now_ns)):
            most = self._shares.most(pool.tenant)
            if not self._shares.has_maximum(pool.tenant) or self._charged(pool.tenant) < most:
                self._begin(pool, now_ns)

    def _charged(self, tenant: Tenant) -> int:
        """Segments that a tenant has or will have at once."""
        return tenant.segments + sum(order.tenant == tenant.name for order in self._orders())

    def _touched_ns(self, position: int) -> int:
        return int(self._tables.arenas["touched"][position])

    def _orders(self) -> Iterable[MakeSegment]:
        return self.making.values()

    def _coming(self, now_ns: int) -> Iterable[MakeSegment]:
        return (order for position, order in self.making.items() if now_ns < self._begun_ns[position] + SLOW_NS)

    def _refused(self, now_ns: int) -> bool:
        return now_ns < self._refused_until_ns

    def _begin(self, pool: Pool, now_ns: int) -> bool:
        if len(self.free) - len(self._leaving) <= self._promised(pool.tenant, now_ns) or self._refused(now_ns):
            return False
        if self._promised_to is pool.tenant:
            self._promised_to = None
        position = self.free.pop()
        while self.next_number in self.taken:
            self.next_number += 1
        order = MakeSegment(self.next_number, pool.slot_bytes, pool.tenant.name)
        self.next_number += 1
        self.making[position] = order
        self._begun_ns[position] = now_ns
        self._workers.submit([order])
        return True

    def _promised(self, asking: Tenant, now_ns: int) -> int:
        """Positions kept for another tenant: or the one that had to give way, being busier, would take it back."""
        if self._promised_to in {None, asking}:
            return 0
        if not self._promised_until_ns:
            self._promised_until_ns = now_ns + PROMISE_NS
        return int(now_ns < self._promised_until_ns)

    def made(self, order: MakeSegment, tenant: Tenant | None, now_ns: int) -> None:
        """A segment is there, or is not."""
        position = next(place for place, known in self.making.items() if known is order)
        del self.making[position], self._begun_ns[position]
        if order.outcome is not Outcome.DONE or tenant is None:
            self._refused_until_ns = now_ns + REFUSED_NS
            self.free.append(position)
            return
        pool = self.pool(tenant, order.slot_bytes)
        assert pool is not None, "it was asked for on behalf of a pool"
        self._assign(position, order.segment, pool, now_ns)

    def _assign(self, position: int, number: int, pool: Pool, now_ns: int) -> None:
        slots = self.largest_slot() // pool.slot_bytes
        blocks.assign_arena(
            self._tables, position, np.uint32(number), np.uint32(pool.number), np.uint32(slots), np.uint64(now_ns)
        )
        self.position_of[number] = position
        pool.arenas += 1
        pool.tenant.segments += 1

    def adopt(self, number: int, pool: Pool) -> int | None:
        """A segment that was there at start; its slots take no block until `open`. None if there is no position."""
        if not self.free:
            return None
        position = self.free.pop()
        self._assign(position, number, pool, 0)
        blocks.close_arena(self._tables, position)
        self._tables.arenas[position]["draining"] = 1
        self.next_number = max(self.next_number, number + 1)
        return position

    def open(self, position: int) -> None:
        """An adopted segment's records are all in: blocks may be written to the rest of it."""
        self._tables.arenas[position]["draining"] = 0
        blocks.reopen_arena(self._tables, position)

    # -- giving way ----------------------------------------------------------------------------------------------

    def _foreign(self, asking: Tenant, now_ns: int) -> int | None:
        richest = self._shares.giving_way(asking, self._charged)
        if richest is None:
            return None
        return self._least_valuable((pool for pool in self.pools.values() if pool.tenant is richest), now_ns)

    def _least_valuable(self, pools: Iterable[Pool], now_ns: int) -> int | None:
        wanted: U4 = self._wanted
        wanted[:] = 0
        wanted[[pool.number for pool in pools]] = 1
        stop = self.first + self.positions
        position = int(blocks.least_valuable(self._tables, self.first, stop, wanted, np.uint64(now_ns), True))
        return None if position < 0 else position

    def least_valuable(self, now_ns: int) -> int | None:
        """Of all segments, the one touched longest ago."""
        return self._least_valuable(self.pools.values(), now_ns)

    def drain(self, position: int, wanted_by: Tenant | None = None) -> None:
        """Begin to empty a segment. One at a time. The place is kept for a tenant, if it is emptied for one."""
        assert self.draining is None, "one position at a time"
        blocks.close_arena(self._tables, position)
        self._tables.arenas[position]["draining"] = 1
        self.draining, self._wanted_by = position, wanted_by
        self._drain_from = 0

    def next_to_drain(self) -> tuple[int, int]:
        """The next block that lies on the segment being emptied: its row and 0; (0, what is still used) at its end."""
        assert self.draining is not None, "nothing is being emptied"
        slot, row = blocks.next_on_segment(self._tables, self.draining, self._drain_from)
        if slot < 0:
            self._drain_from = 0
            return 0, int(self._tables.arenas[self.draining]["used"])
        self._drain_from = slot + 1
        return int(row), 0

    def drained(self) -> int:
        """The segment being emptied holds nothing any more: remove it, unless it is lost. Returns its number."""
        assert self.draining is not None, "nothing is being emptied"
        position, self.draining = self.draining, None
        self.recycled += 1
        self._promised_to, self._wanted_by, self._promised_until_ns = self._wanted_by, None, 0
        lost = self.number_at(position) in self.lost
        number = self.release(position)
        if not lost:
            self._going.add(number)
            self._workers.submit([DropSegment(number)])
        return number

    def left(self, order: DropSegment, now_ns: int) -> None:
        """The file of one that was emptied is gone, or is not."""
        if order.segment in self._going and order.outcome is Outcome.FAILED:
            self._leaving[order.segment] = now_ns + AGAIN_NS
        else:
            self._going.discard(order.segment)
            self._leaving.pop(order.segment, None)

    def tick(self, now_ns: int) -> None:
        """Try again to remove what could not be."""
        for number, due_ns in self._leaving.items():
            if 0 < due_ns <= now_ns:
                self._leaving[number] = 0
                self._workers.submit([DropSegment(number)])

    def next_ns(self) -> int | None:
        """When `tick` has something to do."""
        return min((due_ns for due_ns in self._leaving.values() if due_ns), default=None)

    def release(self, position: int) -> int:
        """A position without blocks is free. Returns the number of the segment that was there."""
        arena = self._tables.arenas[position]
        assert not arena["used"], "a segment with blocks is released"
        blocks.close_arena(self._tables, position)
        pool = self.pool_at(position)
        pool.arenas -= 1
        pool.tenant.segments -= 1
        arena["pool"] = 0
        arena["draining"] = 0
        self.free.append(position)
        number = int(arena["id"])
        del self.position_of[number]
        if number in self.lost:
            self.lost.remove(number)
        else:
            self.dropped.append(number)
        return number
