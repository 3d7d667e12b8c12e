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
    used: int = 0  # turn of its last use


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
        self._copies: dict[tuple[int, int], Copy] = {}  # those used longest ago first
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

    def find(self, row: int, generation: int) -> Copy | None:
        """A whole copy, which stays until `release`."""
        found = self._copies.get((row, generation))
        if found is None or not found.whole:
            return None
        self._touch(found)
        found.users += 1
        return found

    def release(self, copy: Copy) -> None:
        """It was read."""
        copy.users -= 1

    def reserve(self, tenant: int, slot_bytes: int, row: int, generation: int) -> Copy | None:
        """Room for a copy; None if it is there, or on its way, or if there is none to be had right now."""
        if (row, generation) in self._copies or slot_bytes > self.arena_bytes:
            return None
        arena = self._room(tenant, slot_bytes)
        if arena is None:
            return None
        copy = Copy(row, generation, arena, arena.free.pop(), users=1)
        arena.copies[copy] = None
        self._copies[row, generation] = copy
        self._touch(copy)
        return copy

    def filled(self, copy: Copy) -> None:
        """Its bytes are there."""
        copy.whole, copy.users = True, 0
        self.tally.promoted += 1

    def failed(self, copy: Copy) -> None:
        """They never will be."""
        copy.users = 0
        self._drop(copy)

    def _touch(self, copy: Copy) -> None:
        self._turn += 1
        copy.arena.used = self._turn
        self._copies[copy.row, copy.generation] = self._copies.pop((copy.row, copy.generation))

    def _drop(self, copy: Copy) -> None:
        del self._copies[copy.row, copy.generation], copy.arena.copies[copy]
        copy.arena.free.append(copy.slot)

    # -- room ----------------------------------------------------------------------------------------------------

    def _room(self, tenant: int, slot_bytes: int) -> HbmArena | None:
        """An arena of this tenant with a free slot of this size."""
        mine = [arena for arena in self._arenas if arena.tenant == tenant]
        fitting = [arena for arena in mine if arena.slot_bytes == slot_bytes]
        found = next((arena for arena in fitting if arena.free), None)
        if found is None and self._unused:
            return self._give(self._unused.pop(), tenant, slot_bytes)
        if found is None and len(mine) < self._share(tenant):
            found = self._take_from_others(tenant, len(mine), slot_bytes)
        if found is None:
            found = self._evict(fitting)
        return found or self._change_size(mine, tenant, slot_bytes)

    def _share(self, tenant: int) -> int:
        tenants = {arena.tenant for arena in self._arenas if arena.tenant} | {tenant}
        return len(self._arenas) // len(tenants)

    def _take_from_others(self, tenant: int, has: int, slot_bytes: int) -> HbmArena | None:
        """Of who has most, and more than one more: else it would go to and fro."""
        counts: dict[int, int] = {}
        for arena in self._arenas:
            counts[arena.tenant] = counts.get(arena.tenant, 0) + 1
        most = max(counts, key=lambda each: counts[each])
        if counts[most] <= has + 1:
            return None
        return self._change_size([arena for arena in self._arenas if arena.tenant == most], tenant, slot_bytes)

    def _change_size(self, arenas: list[HbmArena], tenant: int, slot_bytes: int) -> HbmArena | None:
        """The one used longest ago, of those that nobody reads, for another slot size or tenant."""
        idle = [arena for arena in arenas if not any(copy.users for copy in arena.copies)]
        if not idle:
            return None
        oldest = min(idle, key=lambda arena: arena.used)
        self.tally.evicted += len(oldest.copies)
        for copy in list(oldest.copies):
            self._drop(copy)
        return self._give(oldest, tenant, slot_bytes)

    def _give(self, arena: HbmArena, tenant: int, slot_bytes: int) -> HbmArena:
        arena.tenant, arena.slot_bytes = tenant, slot_bytes
        arena.free = list(range(self.arena_bytes // slot_bytes))[::-1]
        return arena

    def _evict(self, arenas: list[HbmArena]) -> HbmArena | None:
        """Of these arenas, the copy used longest ago gives way."""
        of = {*arenas}
        for copy in self._copies.values():
            if copy.arena in of and not copy.users:
                self.tally.evicted += 1
                self._drop(copy)
                return copy.arena
        return None
