"""Copies of blocks in a GPU's memory: which there are, and who gives way. One GPU; owner thread; no device in here.

    reserve -> Copy, not whole --filled--> whole: `find` knows it, and holds it while it is read --> evicted
                               --failed--> its slot is free

A copy belongs to a row and its generation, so what becomes of the block in DRAM need not be told here: nobody finds a
copy but by a lease on the block itself, and another block in that row has another generation. It is clean, always: to
give it up is to forget it. Memory goes to tenants by arenas, each of one slot size at a time:

    a free arena -> below its share: the arena of the tenant with most that was used longest ago
                 -> the tenant's own copy that was used longest ago -> its own oldest arena, for another slot size

A share is an equal part, for each tenant that has any; so nobody takes from one that has less than itself.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvproto.limits import MIB

ARENA_BYTES: Final = 16 * MIB


@dataclass(slots=True, eq=False)
class Copy:
    """One block's bytes, at byte `offset` of the GPU's memory for this."""

    row: int
    generation: int
    arena: "HbmArena"
    slot: int
    whole: bool = False
    users: int = 0  # copies that read it right now

    @property
    def offset(self) -> int:
        """In the memory that the tier has."""
        return self.arena.first_byte + self.slot * self.arena.slot_bytes


@dataclass(slots=True, eq=False)
class HbmArena:
    """A part of that memory, as one tenant has it for blocks of one size."""

    first_byte: int
    tenant: int = 0
    slot_bytes: int = 0
    free: list[int] = field(default_factory=list)
    copies: dict[Copy, None] = field(default_factory=dict)
    busy: int = 0  # copies that are read or written right now
    used: int = 0  # turn of its last use


@dataclass(slots=True)
class _Shelf:
    """One tenant's copies of one slot size. A plain dict that loses what came first is slow to say what does."""

    idle: "OrderedDict[Copy, None]" = field(default_factory=OrderedDict)  # used longest ago first
    with_room: "OrderedDict[HbmArena, None]" = field(default_factory=OrderedDict)


@dataclass(slots=True)
class HbmTally:
    """Since the start. Bytes are blocks'."""

    hits: int = 0
    hit_bytes: int = 0
    promoted: int = 0
    evicted: int = 0


class Hbm:
    """The tier on one GPU."""

    def __init__(self, hbm_bytes: int, arena_bytes: int = ARENA_BYTES) -> None:
        """So many bytes, in whole arenas."""
        self.arena_bytes = arena_bytes
        self.tally = HbmTally()
        self._arenas = [HbmArena(first) for first in range(0, hbm_bytes - arena_bytes + 1, arena_bytes)]
        self._unused = self._arenas[::-1]
        self._copies: dict[tuple[int, int], Copy] = {}
        self._shelves: dict[tuple[int, int], _Shelf] = {}  # by tenant and slot size
        self._of: dict[int, dict[HbmArena, None]] = {}  # by tenant: its arenas, if it has any
        self._turn = 0

    @property
    def hbm_bytes(self) -> int:
        """What there is."""
        return len(self._arenas) * self.arena_bytes

    @property
    def blocks(self) -> int:
        """Copies that are whole, or will be."""
        return len(self._copies)

    def used_bytes(self, tenant: int | None = None) -> int:
        """Of slots with copies; of one tenant, or of all."""
        return sum(
            len(arena.copies) * arena.slot_bytes for arena in self._arenas if tenant is None or arena.tenant == tenant
        )

    def has(self, row: int, generation: int) -> bool:
        """Is there a copy, or one on its way?"""
        return (row, generation) in self._copies

    def find(self, row: int, generation: int) -> Copy | None:
        """A whole copy, which stays until `release`."""
        found = self._copies.get((row, generation))
        if found is None or not found.whole:
            return None
        if not found.users:
            del self._shelf(found).idle[found]
            found.arena.busy += 1
        found.users += 1
        self._touch(found.arena)
        return found

    def release(self, copy: Copy) -> None:
        """It was read."""
        copy.users -= 1
        if not copy.users:
            self._rest(copy)

    def reserve(self, tenant: int, slot_bytes: int, row: int, generation: int) -> Copy | None:
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
        self._copies[row, generation] = copy
        self._touch(arena)
        return copy

    def filled(self, copy: Copy) -> None:
        """Its bytes are there."""
        copy.whole, copy.users = True, 0
        self.tally.promoted += 1
        self._rest(copy)

    def failed(self, copy: Copy) -> None:
        """They never will be."""
        copy.users = 0
        self._rest(copy)
        self._drop(copy)

    def _shelf(self, copy: Copy) -> _Shelf:
        return self._shelves[copy.arena.tenant, copy.arena.slot_bytes]

    def _touch(self, arena: HbmArena) -> None:
        self._turn += 1
        arena.used = self._turn

    def _rest(self, copy: Copy) -> None:
        """Nobody reads or writes it any more."""
        copy.arena.busy -= 1
        self._shelf(copy).idle[copy] = None

    def _drop(self, copy: Copy) -> None:
        """One that is idle."""
        shelf, arena = self._shelf(copy), copy.arena
        del self._copies[copy.row, copy.generation], arena.copies[copy], shelf.idle[copy]
        arena.free.append(copy.slot)
        shelf.with_room[arena] = None

    # -- room ----------------------------------------------------------------------------------------------------

    def _room(self, tenant: int, slot_bytes: int) -> HbmArena | None:
        """An arena of this tenant with a free slot of this size. Quick, however many copies there are."""
        shelf, mine = self._shelves.get((tenant, slot_bytes)), self._of.get(tenant, {})
        found = next(iter(shelf.with_room), None) if shelf is not None else None
        if found is None and self._unused:
            return self._give(self._unused.pop(), tenant, slot_bytes)
        if found is None and len(mine) < self._share(tenant):
            found = self._take_from_others(tenant, len(mine), slot_bytes)
        if found is None and shelf is not None and shelf.idle:
            oldest = next(iter(shelf.idle))
            self.tally.evicted += 1
            self._drop(oldest)
            found = oldest.arena
        return found or self._change_size(mine, tenant, slot_bytes)

    def _share(self, tenant: int) -> int:
        return len(self._arenas) // len({*self._of, tenant})

    def _take_from_others(self, tenant: int, has: int, slot_bytes: int) -> HbmArena | None:
        """Of who has most, and more than one more: else it would go to and fro."""
        most = max(self._of, key=lambda each: len(self._of[each]), default=0)
        if len(self._of.get(most, ())) <= has + 1:
            return None
        return self._change_size(self._of[most], tenant, slot_bytes)

    def _change_size(self, arenas: Iterable[HbmArena], tenant: int, slot_bytes: int) -> HbmArena | None:
        """The one used longest ago, of those that nobody reads, for another slot size or tenant."""
        oldest = min((arena for arena in arenas if not arena.busy), key=lambda arena: arena.used, default=None)
        if oldest is None:
            return None
        self.tally.evicted += len(oldest.copies)
        for copy in list(oldest.copies):
            self._drop(copy)
        self._take_back(oldest)
        return self._give(oldest, tenant, slot_bytes)

    def _take_back(self, arena: HbmArena) -> None:
        """It is empty."""
        mine = self._of[arena.tenant]
        del mine[arena]
        self._shelves[arena.tenant, arena.slot_bytes].with_room.pop(arena, None)
        if not any(each.slot_bytes == arena.slot_bytes for each in mine):
            del self._shelves[arena.tenant, arena.slot_bytes]
        if not mine:
            del self._of[arena.tenant]

    def _give(self, arena: HbmArena, tenant: int, slot_bytes: int) -> HbmArena:
        arena.tenant, arena.slot_bytes = tenant, slot_bytes
        arena.free = list(range(self.arena_bytes // slot_bytes))[::-1]
        self._of.setdefault(tenant, {})[arena] = None
        self._shelves.setdefault((tenant, slot_bytes), _Shelf()).with_room[arena] = None
        return arena
