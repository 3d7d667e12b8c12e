"""The life of arenas: assigned to one pool, drained, punched, replaced.

    Life of a position
                assign                recycle                  empty                punched
       FREE ---------------> SERVING ---------> DRAINING ---------------> PUNCHING ----------> FREE, with a new id
                                ^               no new block;     |       ARENA_GONE to all    the old id is stale until
                                |               blocks are swept, |       holders              every holder has answered
                                |               leases run out    |                            ARENA_DROPPED or exited
                                +---------------------------------+
                                 for another pool of the same tenant

An arena never changes its tenant, so a client's map of it never shows another tenant's bytes. Within a tenant it is
handed on as it is: a slot for another size is a slot used again, and neither pages nor maps have to be made anew. Only
one position is drained or punched at a time: who asks meanwhile and has no leaf to give is told BUSY, and nothing on
the owner thread waits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvproto.limits import PAGE_BYTES, STALE_PER_TENANT
from kvstore import blocks
from kvstore.blocks import Tables
from kvstore.policies import Policies
from kvstore.ports import Memory, Outbox
from kvstore.sessions import Pool, Session, Tenant

PROMISE_NS = 10**9  # how long a recycled position waits for the tenant it was recycled for
GIVEN_UP = 2  # in `draining` of an arena whose slots may still be written to: it serves nobody after this


@dataclass(slots=True, eq=False)
class Stale:
    """An arena that was given up and that some process may still map."""

    tenant: Tenant
    since_ns: int
    holders: dict[Session, None] = field(default_factory=dict)
    punched: bool = False


def slot_shift(arena_bytes: int) -> int:
    """log2 of how many slot numbers an arena has: as many as the smallest slots that fit, rounded up."""
    return (arena_bytes // PAGE_BYTES - 1).bit_length()


class Arenas:
    """All positions of the DRAM tier. Owner thread."""

    def __init__(
        self, tables: Tables, memory: Memory, outbox: Outbox, arena_bytes: int, positions: int, policies: Policies
    ) -> None:
        self._tables = tables
        self._policies = policies
        self._memory = memory
        self._outbox = outbox
        self.arena_bytes = arena_bytes
        self._shift = int(tables.book[blocks.SHIFT])  # of both tiers
        self.positions = positions
        self.free = list(range(self.positions - 1, -1, -1))
        self.pools: list[Pool] = []
        self.by_number: dict[int, Pool] = {}  # those on disk too
        self.holders: dict[int, dict[Session, None]] = {}
        self.positions_by_id: dict[int, int] = {}
        self.stale: dict[int, Stale] = {}
        self.draining: int | None = None
        self.punching: int | None = None  # id of the arena
        self.recycled = 0
        self._wanted_by: Pool | None = None  # who asked for the position that drains
        self._written_to = False  # somebody may still write to the one that drains
        self._promised_to: Tenant | None = None  # who asked for the position drained last
        self._promised_until_ns = 0
        self.next_id = 1
        self.stranded_at: Callable[[int], int] = lambda _position: 0  # `Writers`: slots that are out of use
        self.let_go: Callable[[int], None] = lambda _position: None  # `Writers`: these are to be free
        self.is_read: Callable[[int], bool] = lambda _position: False  # `Scrubbing`, by a leaf thread right now

    @property
    def busy(self) -> bool:
        """Is a position on its way back to FREE?"""
        return self.draining is not None or self.punching is not None

    def add_pool(self, tenant: Tenant, slot_bytes: int) -> Pool:
        """A new pool without arenas."""
        pool = Pool(len(self.pools), tenant, slot_bytes)
        self._tables.pools[pool.number]["slot_bytes"] = slot_bytes
        self._policies.begin(pool)
        self.pools.append(pool)
        self.by_number[pool.number] = pool
        return pool

    def row_at(self, position: int, slot: int) -> int:
        """The block in a slot of the arena at `position`."""
        return int(self._tables.slots[(position << self._shift) + slot]["block"])

    def serving(self) -> int:
        """Positions that belong to a pool."""
        return self.positions - len(self.free)

    def grow(self, pool: Pool, now_ns: int) -> bool:
        """Give the pool one more arena. False if none is free, or the system refuses memory."""
        if self.hoards(pool.tenant):
            return False
        if len(self.free) <= self._withheld() + self._promised(pool.tenant, now_ns):
            return False
        if not self._memory.new_arena(self.next_id, self.arena_bytes):
            return False
        position = self.free.pop()
        self.holders[self.next_id] = {}
        self.positions_by_id[self.next_id] = position
        self._assign(position, self.next_id, pool, now_ns)
        self.next_id += 1
        if self._promised_to is pool.tenant:
            self._promised_to = None
        return True

    def readopt(self, position: int, number: int, pool: Pool) -> int:
        """An arena of a former life serves its pool again; nothing is in it yet. Returns how many slots it has."""
        self.free.remove(position)
        self.holders[number] = {}
        self.positions_by_id[number] = position
        slots = self._assign(position, number, pool, 0)
        blocks.close_arena(self._tables, position)
        return slots

    def _assign(self, position: int, number: int, pool: Pool, now_ns: int) -> int:
        """An empty arena serves a pool from now on. Returns how many slots it has."""
        slots = self.arena_bytes // pool.slot_bytes
        blocks.assign_arena(
            self._tables, position, np.uint32(number), np.uint32(pool.number), np.uint32(slots), np.uint64(now_ns)
        )
        pool.arenas += 1
        pool.tenant.arenas += 1
        return slots

    def _withheld(self) -> int:
        """Positions whose worth of memory stale arenas still hold; less than one arena in all is let pass."""
        return self.stale_bytes() // self.arena_bytes

    def _promised(self, asking: Tenant, now_ns: int) -> int:
        """Positions kept for another tenant: or the one that had to give way, being busier, would take it back."""
        tenant = self._promised_to
        kept = tenant is not None and tenant is not asking and tenant.sessions and now_ns < self._promised_until_ns
        return 1 if kept else 0

    def kept_for_another(self, asking: Tenant, now_ns: int) -> bool:
        """Is there a free position that only another tenant may take, for the moment?"""
        return len(self.free) > self._withheld() and self._promised(asking, now_ns) > 0

    def charged(self, tenant: Tenant) -> int:
        """Arenas that count against a tenant's share: its own, and what it still holds of those that were given up."""
        return tenant.arenas + self.stale_bytes(tenant) // self.arena_bytes

    def hoards(self, tenant: Tenant) -> bool:
        """Does a tenant keep so many given-up arenas mapped that it gets no new ones until it lets go?"""
        return sum(stale.tenant is tenant for stale in self.stale.values()) >= STALE_PER_TENANT

    def stale_bytes(self, tenant: Tenant | None = None) -> int:
        """Bytes that clients still hold in arenas that were given up, of one tenant or of all."""
        return sum(
            self._memory.held_bytes(arena) if stale.punched else self.arena_bytes
            for arena, stale in self.stale.items()
            if tenant in (None, stale.tenant)
        )

    def least_valuable(self, pools: list[Pool], now_ns: int, *, or_held: bool = False) -> int | None:
        """The position among these pools that was touched longest ago and holds nothing leased or in flight.

        `or_held`: if all do, the one touched longest ago; draining it waits until its leases and tickets have ended.
        """
        wanted = np.zeros(self._tables.pools.size, dtype=np.uint32)
        wanted[[pool.number for pool in pools]] = 1
        position = int(blocks.least_valuable(self._tables, 0, self.positions, wanted, np.uint64(now_ns), or_held))
        return None if position < 0 else position

    def empty(self, pool: Pool, *, own: bool = False) -> int | None:
        """A position of another pool that holds no block at all, and only waits for its own to want it again.

        `own`: of the same tenant's other pools alone.
        """
        rows = self._tables.arenas[: self.positions]
        idle = np.flatnonzero((rows["pool"] != 0) & (rows["pool"] != pool.number + 1) & (rows["used"] == 0))
        for position in idle.tolist():
            if not own or self.pools[int(rows["pool"][position]) - 1].tenant is pool.tenant:
                return int(position)
        return None

    def touched_ns(self, position: int) -> int:
        """When any block of that arena was last touched."""
        return int(self._tables.arenas[position]["touched"])

    def drain(self, position: int, wanted_by: Pool | None) -> None:
        """Begin to recycle a position for a pool: no new block goes there. The caller sweeps its blocks.

        For None it becomes free for everybody: its tenant has more than it may have.
        """
        assert not self.busy, "one position at a time"
        self._wanted_by, self._written_to = wanted_by, False
        blocks.close_arena(self._tables, position)
        self._tables.arenas[position]["draining"] = 1
        self.draining = position

    def settle(self, now_ns: int) -> None:
        """If the drained position is empty, hand it on: at once within a tenant, else by way of the system.

        Where slots are out of use since somebody may still write there, the tenant gets another arena for it, too.
        """
        if self.draining is None or self.is_read(self.draining):
            return
        row, stranded = self._tables.arenas[self.draining], self.stranded_at(self.draining)
        if row["used"] > stranded:
            return
        if stranded:
            self._written_to = True
            row["draining"] = GIVEN_UP  # before who writes there is forgotten: a successor must not take it over
            self.let_go(self.draining)
            if row["used"]:  # what continued them is still on its way out
                return
        wanted_by, position = self._wanted_by, self.draining
        pool = self.pools[int(self._tables.arenas[position]["pool"]) - 1]
        self.draining = self._wanted_by = None
        self.recycled += 1
        pool.arenas -= 1
        pool.tenant.arenas -= 1
        if wanted_by is None:
            self._give_back(position, pool.tenant, now_ns)
        elif pool.tenant is wanted_by.tenant and not self._written_to:
            self._assign(position, int(self._tables.arenas[position]["id"]), wanted_by, now_ns)
        else:
            self._promised_to, self._promised_until_ns = wanted_by.tenant, now_ns + PROMISE_NS
            self._give_back(position, pool.tenant, now_ns)

    def _give_back(self, position: int, tenant: Tenant, now_ns: int) -> None:
        """Tell all holders that its arena is gone, and begin to punch it."""
        row = self._tables.arenas[position]
        arena = int(row["id"])
        row["pool"] = 0
        self.free.append(position)
        self.punching = arena
        holders = self.holders.pop(arena)
        del self.positions_by_id[arena]
        self.stale[arena] = Stale(tenant, now_ns, holders)
        for session in holders:
            if arena in session.arenas:
                session.given[session.arenas[arena]] = 0
            self._outbox.arena_gone(session, arena)
        self._memory.punch_arena(arena)

    def punched(self, arena: int) -> None:
        """The pages of an arena are back with the system."""
        assert arena == self.punching, "punched an arena that was not being punched"
        self.punching = None
        self.stale[arena].punched = True
        self._forget_if_unheld(arena)

    def gave(self, session: Session, arena: int) -> None:
        """A session was given the descriptor of an arena that serves."""
        position = self.positions_by_id[arena]
        session.arenas[arena] = position
        session.given[position] = 1
        self.holders[arena][session] = None

    def gave_writable(self, session: Session, arena: int) -> None:
        """A session was given a descriptor through which it can write."""
        session.writable[arena] = self.positions_by_id[arena]
        self.holders[arena][session] = None

    def lost_to_writers(self, tenant: Tenant) -> int | None:
        """A position of a tenant that holds nothing but slots that are out of use: a new arena would be worth more."""
        if self.busy or self.hoards(tenant):
            return None
        for position in self.positions_by_id.values():
            row, stranded = self._tables.arenas[position], self.stranded_at(position)
            if stranded and int(row["used"]) == stranded and self.pools[int(row["pool"]) - 1].tenant is tenant:
                return position
        return None

    def dropped(self, session: Session, arena: int) -> None:
        """A session says that it maps nothing of an arena any more; of one that still serves, it will be sent anew."""
        if session not in self.holders.get(arena, ()):
            stale = self.stale.get(arena)
            if stale is None or session not in stale.holders:
                return
            del stale.holders[session]
            session.arenas.pop(arena, None)
            session.writable.pop(arena, None)
            self._forget_if_unheld(arena)
            return
        del self.holders[arena][session]
        session.writable.pop(arena, None)
        if arena in session.arenas:
            session.given[session.arenas.pop(arena)] = 0

    def bequeath(self, session: Session, heir: Session) -> None:
        """What a closed session may still map, another closed session of the same process stands for from now on."""
        for arena in session.arenas.keys() | session.writable.keys():
            holders = self.stale[arena].holders if arena in self.stale else self.holders[arena]
            del holders[session]
            holders[heir] = None
        heir.arenas.update(session.arenas)
        heir.writable.update(session.writable)
        session.arenas.clear()
        session.writable.clear()

    def exited(self, session: Session) -> None:
        """A process is gone, and all its maps with it."""
        for arena in session.arenas.keys() | session.writable.keys():
            if arena in self.stale:
                self.stale[arena].holders.pop(session, None)
                self._forget_if_unheld(arena)
            else:
                self.holders[arena].pop(session, None)
        session.arenas.clear()
        session.writable.clear()

    def _forget_if_unheld(self, arena: int) -> None:
        stale = self.stale[arena]
        if stale.punched and not stale.holders:
            self._memory.close_arena(arena)
            del self.stale[arena]
