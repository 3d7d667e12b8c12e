"""Copies of blocks in a GPU's memory: which there are, and who gives way. One GPU; owner thread; no device in here.

    reserve -> Copy, not whole --filled--> whole: `find` knows it, and holds it while it is read --> evicted
                               --failed--> its slot is free

A copy belongs to a row and its generation, so what becomes of the block in DRAM need not be told here: nobody finds a
copy but by a lease on the block itself, and another block in that row has another generation. It is clean: to give it
up is to forget it, unless DRAM has evicted the block meanwhile (`hbms.py`: `leaving` then takes hold of it). Memory
goes to tenants by arenas, each of one slot size at a time:

    a free arena -> an arena of the tenant furthest above what is guaranteed to it (`quotas.Shares`), the one that was
                    used longest ago -> the tenant's own copy that was used longest ago -> its own oldest arena, for
                    another slot size

What a pin wants here (`keep`) is not evicted by what its own tenant reads. It promises nobody memory: a tenant below
its guarantee takes the arena all the same, pinned copies last.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvstore.blocks import U4, U8
from kvstore.quotas import HBM, HBM_ARENA_BYTES, Capacity, Shares
from kvstore.sessions import Namespace, Tenant

LEAVE_AT_ONCE: Final = 8  # copies that are looked at for one that nobody else has an interest in
Key = tuple[int, int]  # row and generation


@dataclass(frozen=True, slots=True)
class Name:
    """What a copy is of, once its row may be another block's."""

    namespace: Namespace
    key: bytes
    parent: bytes | None  # the key of the block before it
    checksum: int
    epoch: int  # see `HbmTiers.is_alone`


@dataclass(slots=True, eq=False)
class Copy:
    """One block's bytes, at byte `offset` of the GPU's memory for this."""

    row: int
    generation: int
    arena: "HbmArena"
    slot: int
    whole: bool = False
    users: int = 0  # copies that read it right now
    since_ns: int = 0  # when it was whole
    used_ns: int = 0
    name: Name | None = None

    @property
    def key(self) -> Key:
        """Of which block it is one."""
        return self.row, self.generation

    @property
    def offset(self) -> int:
        """In the memory that the tier has."""
        return self.arena.first_byte + self.slot * self.arena.slot_bytes


@dataclass(slots=True, eq=False)
class HbmArena:
    """A part of that memory, as one tenant has it for blocks of one size."""

    first_byte: int
    tenant: Tenant | None = None
    slot_bytes: int = 0
    free: list[int] = field(default_factory=list)
    copies: dict[Copy, None] = field(default_factory=dict)
    busy: int = 0  # copies that are read or written right now
    kept: int = 0  # copies that pins want here
    used: int = 0  # turn of its last use


@dataclass(slots=True)
class _Shelf:
    """One tenant's copies of one slot size. A plain dict that loses what came first is slow to say what does."""

    idle: "OrderedDict[Copy, None]" = field(default_factory=OrderedDict)  # used longest ago first; none that is pinned
    with_room: "OrderedDict[HbmArena, None]" = field(default_factory=OrderedDict)


@dataclass(slots=True)
class HbmTally:
    """Since the start. Bytes are blocks'."""

    hits: int = 0
    hit_bytes: int = 0
    promoted: int = 0
    promoted_bytes: int = 0  # of slots
    evicted: int = 0
    evicted_after_ns: int = 0  # how long those that were evicted had been there, together
    unpinned: int = 0  # of those evicted, pinned ones


class Hbm:
    """The tier on one GPU."""

    def __init__(self, hbm_bytes: int, arena_bytes: int = HBM_ARENA_BYTES) -> None:
        """So many bytes, in whole arenas."""
        self.arena_bytes = arena_bytes
        self.tally = HbmTally()
        self.hit_bytes: Counter[Tenant] = Counter()  # since the start
        self.clock: Callable[[], int] = lambda: 0
        self.leaving: Callable[[Copy], bool] = lambda _copy: False  # who takes hold of one that would be evicted
        self.generations: U8 | None = None  # by row: of the block that a whole copy is of, 0: of none; if wanted
        self._arenas = [HbmArena(first) for first in range(0, hbm_bytes - arena_bytes + 1, arena_bytes)]
        self._unused = self._arenas[::-1]
        self._copies: dict[Key, Copy] = {}
        self._shelves: dict[tuple[Tenant, int], _Shelf] = {}  # by tenant and slot size
        self._of: dict[Tenant, dict[HbmArena, None]] = {}  # by tenant: its arenas, if it has any
        self._named: dict[Namespace, dict[bytes, Copy]] = {}  # of those with any, by key
        self._kept: Counter[Key] = Counter()  # pins that want a copy here
        self._turn = 0
        self.shares = Shares(Capacity(HBM, arena_bytes, len(self._arenas)), self.held)

    @property
    def hbm_bytes(self) -> int:
        """What there is."""
        return len(self._arenas) * self.arena_bytes

    @property
    def blocks(self) -> int:
        """Copies that are whole, or will be."""
        return len(self._copies)

    def held(self, tenant: Tenant) -> int:
        """Arenas of a tenant."""
        return len(self._of.get(tenant, ()))

    def used_bytes(self, tenant: Tenant | None = None) -> int:
        """Of slots with copies; of one tenant, or of all."""
        arenas = self._arenas if tenant is None else self._of.get(tenant, ())
        return sum(len(arena.copies) * arena.slot_bytes for arena in arenas)

    def has(self, row: int, generation: int) -> bool:
        """Is there a copy, or one on its way?"""
        return (row, generation) in self._copies

    def whole(self, rows: U4, generations: U8) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Of which of these blocks is there a whole copy? `generations`: those of the rows."""
        if self.generations is None:
            return np.zeros(rows.size, dtype=np.bool_)
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.generations[rows] == generations
        return found

    def find(self, row: int, generation: int) -> Copy | None:
        """A whole copy, which stays until `release`."""
        found = self._copies.get((row, generation))
        if found is None or not found.whole:
            return None
        if not found.users:
            self._shelf(found).idle.pop(found, None)
            found.arena.busy += 1
        found.users += 1
        found.used_ns = self.clock()
        self._touch(found.arena)
        return found

    def call(self, copy: Copy, name: Name) -> None:
        """Say what a whole copy is of; an older one of the same is not found by that any more."""
        copy.name = name
        self._named.setdefault(name.namespace, {})[name.key] = copy

    def called(self, namespace: Namespace, key: bytes) -> Copy | None:
        """A copy by its name, whoever is in its row by now."""
        mine = self._named.get(namespace)
        return None if mine is None else mine.get(key)

    @property
    def has_names(self) -> bool:
        """Is any copy known by its name?"""
        return bool(self._named)

    def forget_namespace(self, namespace: Namespace) -> None:
        """Nothing is found by its names any more; no copy is looked at for that, of which there may be millions."""
        self._named.pop(namespace, None)

    def forget(self, copy: Copy) -> None:
        """Nobody wants it any more, unless somebody reads it."""
        if not copy.users and self._copies.get(copy.key) is copy:
            self._drop(copy)

    def release(self, copy: Copy) -> None:
        """It was read."""
        copy.users -= 1
        if not copy.users:
            self._rest(copy)

    def hit(self, copies: int, block_bytes: int, tenant: Tenant) -> None:
        """So many were read to the end."""
        self.tally.hits += copies
        self.tally.hit_bytes += copies * block_bytes
        self.hit_bytes[tenant] += copies * block_bytes

    def reserve(self, tenant: Tenant, slot_bytes: int, row: int, generation: int) -> Copy | None:
        """Room for a copy; None if it is there, or on its way, or if there is none to be had right now."""
        if (row, generation) in self._copies or slot_bytes > self.arena_bytes:
            return None
        arena = self._room(tenant, slot_bytes)
        if arena is None:
            return None
        copy = Copy(row, generation, arena, arena.free.pop(), users=1)
        if not arena.free:
            del self._shelf(copy).with_room[arena]
        arena.copies[copy] = None
        arena.busy += 1
        arena.kept += copy.key in self._kept
        self._copies[copy.key] = copy
        self._touch(arena)
        return copy

    def filled(self, copy: Copy) -> None:
        """Its bytes are there."""
        copy.whole, copy.users = True, 0
        copy.since_ns = copy.used_ns = self.clock()
        if self.generations is not None:
            self.generations[copy.row] = copy.generation
        self.tally.promoted += 1
        self.tally.promoted_bytes += copy.arena.slot_bytes
        self._rest(copy)

    def failed(self, copy: Copy) -> None:
        """They never will be."""
        copy.users = 0
        self._rest(copy)
        self._drop(copy)

    # -- pins ----------------------------------------------------------------------------------------------------

    def wanted(self, key: Key) -> bool:
        """Does a pin want this block here?"""
        return key in self._kept

    def keep(self, keys: Iterable[Key]) -> None:
        """One pin more wants copies of these, there or not."""
        for key in keys:
            self._kept[key] += 1
            copy = self._copies.get(key)
            if copy is not None and self._kept[key] == 1:
                copy.arena.kept += 1
                self._shelf(copy).idle.pop(copy, None)

    def let_go(self, keys: Iterable[Key]) -> None:
        """One fewer does."""
        for key in keys:
            self._kept[key] -= 1
            if self._kept[key]:
                continue
            del self._kept[key]
            copy = self._copies.get(key)
            if copy is not None:
                copy.arena.kept -= 1
                if not copy.users:
                    self._shelf(copy).idle[copy] = None

    # -- copies that come and go ---------------------------------------------------------------------------------

    def _shelf(self, copy: Copy) -> _Shelf:
        assert copy.arena.tenant is not None, "a copy lies in somebody's arena"
        return self._shelves[copy.arena.tenant, copy.arena.slot_bytes]

    def _touch(self, arena: HbmArena) -> None:
        self._turn += 1
        arena.used = self._turn

    def _rest(self, copy: Copy) -> None:
        """Nobody reads or writes it any more."""
        copy.arena.busy -= 1
        if copy.key not in self._kept:
            self._shelf(copy).idle[copy] = None

    def _evict(self, copy: Copy) -> None:
        self.tally.evicted += 1
        self.tally.evicted_after_ns += self.clock() - copy.since_ns
        self.tally.unpinned += copy.key in self._kept
        self._drop(copy)

    def _drop(self, copy: Copy) -> None:
        """One that nobody reads or writes."""
        shelf, arena = self._shelf(copy), copy.arena
        del self._copies[copy.key], arena.copies[copy]
        shelf.idle.pop(copy, None)
        if copy.name is not None and self.called(copy.name.namespace, copy.name.key) is copy:
            mine = self._named[copy.name.namespace]
            del mine[copy.name.key]
            if not mine:
                del self._named[copy.name.namespace]
        arena.kept -= copy.key in self._kept
        if self.generations is not None and self.generations[copy.row] == copy.generation:
            self.generations[copy.row] = 0
        arena.free.append(copy.slot)
        shelf.with_room[arena] = None

    # -- room ----------------------------------------------------------------------------------------------------

    def _room(self, tenant: Tenant, slot_bytes: int) -> HbmArena | None:
        """An arena of this tenant with a free slot of this size. Quick, however many copies there are."""
        if self.held(tenant) > self.shares.most(tenant):
            self._give_back_one(tenant)
        shelf = self._shelves.get((tenant, slot_bytes))
        found = next(iter(shelf.with_room), None) if shelf is not None else None
        if found is None and self.held(tenant) < self.shares.most(tenant):
            found = self._one_more(tenant, slot_bytes)
        if found is None and shelf is not None:
            found = self._evict_oldest(shelf)
        if found is None and self.held(tenant):
            empty = self._emptied(self._of[tenant], pinned=False)
            found = self._give(empty, tenant, slot_bytes) if empty is not None else None
        return found

    def _evict_oldest(self, shelf: _Shelf) -> HbmArena | None:
        for _ in range(LEAVE_AT_ONCE):
            oldest = next(iter(shelf.idle), None)
            if oldest is None:
                return None
            if not self.leaving(oldest):
                self._evict(oldest)
                return oldest.arena
        return None

    def _one_more(self, tenant: Tenant, slot_bytes: int) -> HbmArena | None:
        """A free one, or one of who is furthest above what is guaranteed to it."""
        if self._unused:
            return self._give(self._unused.pop(), tenant, slot_bytes)
        giver = self.shares.giving_way(tenant, self.held)
        if giver is None:
            return None
        sure = self.held(tenant) < self.shares.guaranteed(tenant)
        empty = self._emptied(self._of[giver], pinned=sure)
        return self._give(empty, tenant, slot_bytes) if empty is not None else None

    def _give_back_one(self, tenant: Tenant) -> None:
        """Its maximum became smaller than what it has."""
        empty = self._emptied(self._of[tenant], pinned=True)
        if empty is not None:
            self._unused.append(empty)

    def _emptied(self, arenas: Iterable[HbmArena], *, pinned: bool) -> HbmArena | None:
        """The one used longest ago, of those that nobody reads: nobody's now. With `pinned`, pinned copies go as well,
        where there is no arena without any.
        """
        some = [arena for arena in arenas if not arena.busy and (pinned or not arena.kept)]
        oldest = min(some, key=lambda arena: (arena.kept > 0, arena.used), default=None)
        if oldest is None:
            return None
        for copy in list(oldest.copies):
            self._evict(copy)
        self._take_back(oldest)
        return oldest

    def _take_back(self, arena: HbmArena) -> None:
        """It is empty."""
        tenant = arena.tenant
        assert tenant is not None, "it is somebody's"
        mine = self._of[tenant]
        del mine[arena]
        self._shelves[tenant, arena.slot_bytes].with_room.pop(arena, None)
        if not any(each.slot_bytes == arena.slot_bytes for each in mine):
            del self._shelves[tenant, arena.slot_bytes]
        if not mine:
            del self._of[tenant]
        arena.tenant = None

    def _give(self, arena: HbmArena, tenant: Tenant, slot_bytes: int) -> HbmArena:
        arena.tenant, arena.slot_bytes = tenant, slot_bytes
        arena.free = list(range(self.arena_bytes // slot_bytes))[::-1]
        self._of.setdefault(tenant, {})[arena] = None
        self._shelves.setdefault((tenant, slot_bytes), _Shelf()).with_room[arena] = None
        return arena
