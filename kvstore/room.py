"""Who gives way when a pool has no free slot. Decided at allocation time, never by a loop in the background."""

from enum import Enum
from typing import Final

from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import Tables
from kvstore.quotas import Shares
from kvstore.sessions import Pool

POOREST: Final = 4  # pools of a tenant, of which an arena each is looked at before one changes hands


class Room(Enum):
    """What a pool without a free slot is told."""

    MADE = 0  # it has a new arena
    EVICT = 1  # its own oldest leaf gives way
    RECYCLE = 2  # an arena gives way; ask again soon
    BUSY = 3  # an arena is on its way; ask again soon
    FULL = 4  # everything is leased, in flight, or another tenant's share
    QUOTA = 5  # its tenant has the most that it may have, and all of that is leased or in flight
    RETURN = 6  # its tenant has more than it may have: an arena of its own becomes everybody's


def make_room(
    arenas: Arenas, tables: Tables, shares: Shares, pool: Pool, now_ns: int, *, exhausted: bool
) -> tuple[Room, int]:
    """A free arena; else one that lies empty in another pool; else one of the tenant furthest above what is guaranteed
    to it; else the tenant's own least valuable memory. A tenant at its maximum has nothing but its own.

    `exhausted`: nothing in the pool can be evicted. Returns the position to recycle with `Room.RECYCLE` and `RETURN`.
    """
    most = shares.most(pool.tenant)
    capped = shares.has_maximum(pool.tenant) and arenas.charged(pool.tenant) >= most
    if not capped and arenas.grow(pool, now_ns):
        return Room.MADE, 0
    oldest = 0 if exhausted else int(blocks.next_victim(tables, pool.number))
    otherwise = Room.EVICT if oldest else Room.QUOTA if capped else Room.FULL
    if arenas.hoards(pool.tenant):
        return otherwise, 0
    if arenas.busy:
        return (Room.EVICT if oldest else Room.BUSY), 0
    position = _surplus_arena(arenas, pool, most, now_ns)
    if position is not None:
        return Room.RETURN, position
    position = arenas.empty(pool, own=capped)
    if position is None and not capped:
        position = _foreign_arena(arenas, shares, pool, now_ns)
    if position is None:
        position = _sibling_arena(arenas, tables, pool, oldest, now_ns)
    if position is None and otherwise is Room.FULL and arenas.kept_for_another(pool.tenant, now_ns):
        otherwise = Room.BUSY
    return (otherwise, 0) if position is None else (Room.RECYCLE, position)


def _surplus_arena(arenas: Arenas, pool: Pool, most: int, now_ns: int) -> int | None:
    """The least valuable arena of a tenant that may have `most`, and has more since it may have less than before."""
    if pool.tenant.arenas <= most:
        return None
    own = [other for other in arenas.pools if other.tenant is pool.tenant]
    return arenas.least_valuable(own, now_ns, or_held=True)


def _foreign_arena(arenas: Arenas, shares: Shares, asking: Pool, now_ns: int) -> int | None:
    """The least valuable arena of the tenant that is to give way (`quotas.py`).

    Even a leased one if need be: or a tenant could keep what is above its share by never letting go of its leases.
    They can no longer be renewed then, and run out.
    """
    richest = shares.giving_way(asking.tenant, arenas.charged)
    if richest is None:
        return None
    return arenas.least_valuable([pool for pool in arenas.pools if pool.tenant is richest], now_ns, or_held=True)


def _sibling_arena(arenas: Arenas, tables: Tables, pool: Pool, oldest: int, now_ns: int) -> int | None:
    """An arena of the same tenant's other slot sizes that gives way to this pool; `oldest` is its oldest leaf, or 0.

    Either one that was left alone half as long again as that leaf: an arena that changes its slot size gives up all its
    blocks at once, which is too dear for a small gain in age; or, where another pool keeps leaves twice as long as
    this one, that pool's least valuable. So pools of one tenant come to keep blocks about equally long, whatever their
    sizes: the age of what LRU gives up is what memory is worth to a pool.
    """
    siblings = [other for other in arenas.pools if other.tenant is pool.tenant and other is not pool and other.arenas]
    if not siblings:
        return None
    position = arenas.least_valuable(siblings, now_ns)
    if position is None or not oldest:
        return position
    if int(tables.pools[pool.number]["rule"]) == blocks.DENSITY:
        return _poorest_arena(arenas, tables, pool, siblings, now_ns)
    mine_ns = int(tables.blocks[oldest]["touched"])
    if 2 * (now_ns - arenas.touched_ns(position)) > 3 * (now_ns - mine_ns):
        return position
    patient = [other for other in siblings if _oldest_ns(tables, other, now_ns) < now_ns - 2 * (now_ns - mine_ns)]
    return arenas.least_valuable(patient, now_ns) if patient else None


def _poorest_arena(
    arenas: Arenas, tables: Tables, pool: Pool, siblings: list[Pool], now_ns: int
) -> int | None:  # fmt: skip
    """Of the poorest siblings' least valuable arenas the one whose blocks are worth least a byte, all of them together,
    if this pool's next victim is worth more."""
    least, poorest = float(blocks.least_worth(tables, pool.number)), None
    by_worth = sorted(siblings, key=lambda other: float(blocks.least_worth(tables, other.number)))
    for other in by_worth[:POOREST]:
        position = arenas.least_valuable([other], now_ns)
        worth = least if position is None else float(blocks.arena_worth(tables, position))
        if worth < least:
            least, poorest = worth, position
    return poorest


def _oldest_ns(tables: Tables, pool: Pool, now_ns: int) -> int:
    oldest = int(blocks.next_victim(tables, pool.number))
    return int(tables.blocks[oldest]["touched"]) if oldest else now_ns
