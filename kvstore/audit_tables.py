"""What must hold inside the tables: rows, slots, arenas, segments, index, tree, lists. For tests (`audit.py`)."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from kvproto.limits import PAGE_BYTES, POOLS
from kvstore import blocks
from kvstore.audit_look import Look
from kvstore.blocks import (
    ADOPTING,
    DISK,
    DOOMED,
    FREE,
    KEPT,
    LIVE,
    LOADING,
    NO_QUEUE,
    QUEUES,
    RESIDENT,
    WRITING,
)  # fmt: skip
from kvstore.sessions import Tenant

_IN_DRAM = (WRITING, RESIDENT, LOADING, KEPT)

# Up to so many listed blocks, relisting looks at all of them, and the order is exact.
EXACT_ORDER = 2 * blocks._RELIST_STEPS  # noqa: SLF001  an audit looks inside


class TableChecks(Look):
    """Tables against themselves."""

    # -- rows, slots, arenas -------------------------------------------------------------------------------------

    def check_rows(self) -> None:
        """Every row is in use or on the free list, once; row 0 is nobody."""
        free: list[int] = []
        row = int(self.tables.book[blocks.FREE_ROWS])
        while row:
            assert row < self.unused, f"free row {row} was never used"
            assert len(free) < self.unused, "free rows run in a circle"
            free.append(row)
            row = int(self.column["chain"][row])
        assert all(self.state[row] == FREE for row in free), "a row on the free list is in use"
        assert len(free) + len(self.rows) == self.unused - 1, "a row is neither in use nor on the free list"
        assert int(self.tables.book[blocks.ROWS]) == len(self.rows), "rows in use are miscounted"
        beyond = self.tables.blocks["state"][self.unused :]
        assert not beyond.any(), "a row past the first unused one has a state"
        nobody = self.tables.blocks[0]
        assert nobody["state"] == FREE, "row 0 has a state"
        assert nobody["holds"] == 0, "row 0 is held"

    def check_positions(self) -> None:
        """Positions are free or serve a pool, and what arenas, pools and tenants count agrees."""
        arenas = self.arenas
        assert len(set(arenas.free)) == len(arenas.free), "a position is free twice"
        idle = {position for position, pool in enumerate(self.pool_at[: arenas.positions]) if pool < 0}
        assert set(arenas.free) == idle, "free positions are not those without a pool"
        self.check_segments()
        by_pool = Counter(pool for pool in self.pool_at if pool >= 0)
        for pool in arenas.pools:
            assert pool.arenas == by_pool[pool.number], f"arenas of pool {pool.number} are miscounted"
            assert self.store.registry.pools[pool.tenant, pool.slot_bytes] is pool, f"pool {pool.number} is lost"
        for tenant in self.store.tenants.values():
            mine = sum(pool.arenas for pool in arenas.pools if pool.tenant is tenant)
            assert tenant.arenas == mine, f"arenas of tenant {tenant.name} are miscounted"
        ids = [self.serving(position) for position in range(arenas.positions) if position not in idle]
        assert len(set(ids)) == len(ids), "an arena serves at two positions"
        assert set(arenas.holders) == set(ids), "holders are kept of other arenas than those that serve"
        assert not set(ids) & set(arenas.stale), "an arena serves and is stale"
        assert all(number < arenas.next_id for number in [*ids, *arenas.stale]), "an arena id from the future"
        unpunched = [arena for arena, stale in arenas.stale.items() if not stale.punched]
        assert unpunched == ([] if arenas.punching is None else [arenas.punching]), "the wrong arena is being punched"
        for position, pool_number in enumerate(self.pool_at[: arenas.positions]):
            draining = bool(self.tables.arenas[position]["draining"]) and pool_number >= 0
            assert draining == (position == arenas.draining), f"position {position} drains wrongly"

    def check_segments(self) -> None:
        """Positions on disk are free, being made, or serve a pool there."""
        segments = self.store.disk.segments
        positions = range(segments.first, segments.first + segments.positions)
        idle = {position for position in positions if self.pool_at[position] < 0}
        assert set(segments.free) | set(segments.making) == idle, "free positions on disk are not those without a pool"
        assert not set(segments.free) & set(segments.making), "a position is free and being made"
        by_pool = Counter(self.pool_at[position] for position in positions)
        for (tenant, slot_bytes), pool in segments.pools.items():
            assert pool.arenas == by_pool[pool.number], f"segments of pool {pool.number} are miscounted"
            assert pool.tenant is tenant, f"pool {pool.number} on disk is filed wrongly"
            assert pool.slot_bytes == slot_bytes, f"pool {pool.number} on disk is filed wrongly"
        for tenant in self.store.tenants.values():
            mine = sum(pool.arenas for pool in segments.pools.values() if pool.tenant is tenant)
            assert tenant.segments == mine, f"segments of tenant {tenant.name} are miscounted"
        serving = {self.serving(position): position for position in positions if position not in idle}
        assert serving == segments.position_of, "segments are filed at other positions"

    def check_slots(self) -> None:
        """A slot of an arena holds one block, or is on the arena's free list once, or was never used."""
        holder = self.tables.slots["block"].tolist()
        next_free = self.tables.slots["next_free"].tolist()
        mapped: Counter[int] = Counter()
        on_disk = 0
        to_erase = self.check_to_erase(holder, next_free)
        for position in range(self.limbo):
            arena = self.tables.arenas[position]
            base, untouched = position << self.shift, int(arena["untouched"])
            span = holder[base : base + (1 << self.shift)]
            if self.pool_at[position] < 0:
                assert not any(span), f"position {position} serves nobody and holds a block"
                untouched = 0
            else:
                whole = self.arenas.arena_bytes
                if position >= self.arenas.positions:
                    whole = self.store.disk.segments.largest_slot()
                slots = whole // self.arenas.by_number[self.pool_at[position]].slot_bytes
                assert int(arena["slots"]) == slots, "slots do not fit the arena"
                assert untouched <= int(arena["slots"]), f"position {position} handed out a slot past its end"
            assert not any(span[untouched:]), f"a slot of position {position} that was never used holds a block"
            taken = {slot: row for slot, row in enumerate(span[:untouched]) if row}
            for slot, row in taken.items():
                if row == blocks.NOBODY:
                    assert position >= self.arenas.positions, f"slot {slot} in DRAM is nobody's"
                    known = base + slot in to_erase or position == self.store.disk.segments.draining
                    assert known or self.store.disk.expects(base + slot), f"slot {slot} of {position} is lost"
                    continue
                assert self.state[row] != FREE, f"slot {slot} of position {position} names the free row {row}"
                places = (self.column["slot"][row], self.column["disk"][row])
                assert base + slot in places, f"row {row} and its slot do not agree"
                mapped[row] += 1
            on_disk += len(taken) if position >= self.arenas.positions else 0
            free = list(_follow(int(arena["free"]), next_free, untouched)) if self.pool_at[position] >= 0 else []
            assert len(set(free)) == len(free), f"a slot of position {position} is free twice"
            spare = {base + slot for slot in range(untouched)} - {base + slot for slot in taken}
            assert set(free) == spare, f"free slots of position {position} are not those without a block"
            held = sum(
                1
                for slot, row in taken.items()
                if row != blocks.NOBODY and self.holds[row] and self.column["slot"][row] == base + slot
            )
            assert int(arena["used"]) == len(taken), f"used slots of position {position} are miscounted"
            assert int(arena["held"]) == held, f"held blocks of position {position} are miscounted"
        assert on_disk == int(self.tables.book[blocks.DISK_USED]), "places on disk are miscounted"
        for row in self.rows:
            lying = {self.column["slot"][row], self.column["disk"][row]} - {0}
            if self.column["slot"][row] == 0:
                lying.add(0)
            lying.discard(self.limbo << self.shift)
            assert mapped[row] == len(lying), f"row {row} lies in {mapped[row]} places, not {len(lying)}"
            on_disk_alone = self.column["slot"][row] >> self.shift >= self.arenas.positions
            if self.state[row] != DOOMED:
                assert on_disk_alone == (self.state[row] == DISK), f"row {row} is in state {self.state[row]} elsewhere"
            if self.state[row] == LOADING:
                assert self.column["disk"][row], f"row {row} is being read from nowhere"

    def check_to_erase(self, holder: list[int], next_free: list[int]) -> set[int]:
        """Places that wait to be erased are nobody's, and wait once."""
        found: set[int] = set()
        place = int(self.tables.book[blocks.TO_ERASE])
        while place:
            assert place not in found, "places to be erased run in a circle"
            assert holder[place] == blocks.NOBODY, f"place {place} is to be erased and is somebody's"
            found.add(place)
            place = next_free[place]
        return found

    def check_open_lists(self) -> None:
        """A pool's list has exactly its arenas with free slots that are not being drained."""
        arenas = self.tables.arenas
        for pool in self.arenas.by_number.values():
            listed: list[int] = []
            before, at = 0, int(self.tables.pools[pool.number]["open"])
            while at:
                row = arenas[at - 1]
                assert int(row["prev"]) == before, "open arenas are linked one way only"
                assert len(listed) < self.limbo, "open arenas run in a circle"
                listed.append(at - 1)
                before, at = at, int(row["next"])
            wanted = {
                position
                for position, number in enumerate(self.pool_at)
                if number == pool.number
                and not arenas[position]["draining"]
                and (arenas[position]["free"] or arenas[position]["untouched"] < arenas[position]["slots"])
            }
            assert set(listed) == wanted, f"pool {pool.number} does not list its arenas with room"
        for position in range(self.limbo):
            serves = self.pool_at[position] >= 0
            room = arenas[position]["free"] or arenas[position]["untouched"] < arenas[position]["slots"]
            opened = bool(serves and room and not arenas[position]["draining"])
            assert bool(arenas[position]["open"]) == opened, f"position {position} is marked open wrongly"

    def check_census(self) -> None:
        """Blocks by namespace and by pool; each lies in the pool of its namespace."""
        by_namespace = Counter(self.column["namespace"][row] for row in self.rows)
        census = {int(number): int(self.tables.census[number]) for number in np.flatnonzero(self.tables.census)}
        assert census == dict(by_namespace), "blocks by namespace are miscounted"
        by_pool = Counter(
            self.pool_at[place >> self.shift]
            for row in self.rows
            for place in {self.column["slot"][row], self.column["disk"][row] or self.column["slot"][row]}
        )
        for pool in self.arenas.by_number.values():
            counted = int(self.tables.pools[pool.number]["blocks"])
            assert counted == by_pool[pool.number], f"blocks of pool {pool.number} are miscounted"
        for row in self.rows:
            namespace = self.store.registry.by_number[self.column["namespace"][row]]
            if self.pool_of(row) < POOLS:
                assert self.pool_of(row) == namespace.pool.number, f"row {row} lies in another pool's arena"
            if self.column["disk"][row]:
                pool = self.arenas.by_number[self.pool_at[self.column["disk"][row] >> self.shift]]
                assert pool.tenant is namespace.tenant, f"row {row} lies in another tenant's segment"
                assert pool.slot_bytes <= namespace.slot_bytes + PAGE_BYTES, f"row {row} lies in too large a slot"

    # -- index, tree, leaf lists ---------------------------------------------------------------------------------

    def check_index(self, tenant: Tenant) -> None:
        """Each live block of a tenant is in its bucket, and nothing else is."""
        buckets, split, entries, seed0, seed1 = (int(word) for word in tenant.index.shape)
        heads = tenant.index.heads
        assert split < buckets, "more buckets are split than there are"
        assert not heads[buckets + split :].any(), "a bucket past the last is in use"
        found: dict[int, int] = {}
        for bucket in np.flatnonzero(heads[: buckets + split]).tolist():
            row = int(heads[bucket])
            while row:
                assert row not in found, f"row {row} is in the index twice"
                found[row] = bucket
                row = int(self.column["chain"][row])
        numbers = {pool.number for pool in self.arenas.by_number.values() if pool.tenant is tenant}
        live = {row for row in self.rows if self.state[row] in LIVE and self.pool_of(row) in numbers}
        assert set(found) == live, f"index of {tenant.name}: {set(found) ^ live} are missing or do not belong"
        assert entries == len(live), f"entries of {tenant.name} are miscounted"
        names = set()
        for row, bucket in found.items():
            key, number = self.tables.blocks[row]["key"], self.column["namespace"][row]
            k0, k1, k2, k3 = key
            hashed = int(blocks.siphash(np.uint64(seed0), np.uint64(seed1), k0, k1, k2, k3, np.uint64(number)))
            place = hashed % buckets
            place = hashed % (2 * buckets) if place < split else place
            assert bucket == place, f"row {row} is in bucket {bucket} and not in {place}"
            names.add((number, key.tobytes()))
        assert len(names) == len(found), "two live blocks have one key"

    def check_tree(self) -> None:
        """Parents and children agree, both ways; dropped blocks have no parent; nobody is its own ancestor."""
        first_child, following = self.column["first_child"], self.column["next_sibling"]
        preceding, flags = self.column["prev_sibling"], self.column["flags"]
        children: set[int] = set()
        for top in self.rows:
            before, child = 0, first_child[top]
            assert bool(flags[top] & blocks.PARENT) == bool(child), f"row {top} is marked as a parent wrongly"
            while child:
                assert child not in children, f"row {child} is a child twice"
                children.add(child)
                assert self.state[child] in LIVE, f"row {child} was dropped and still has a parent"
                assert self.parent[child] == top, f"row {child} has another parent than {top}"
                assert preceding[child] == before, f"siblings of row {child} are linked one way only"
                same = self.column["namespace"][child] == self.column["namespace"][top]
                assert same, f"row {child} continues a block of another namespace"
                before, child = child, following[child]
        for row in self.rows:
            if self.state[row] == DOOMED:
                kept = bool(flags[row] & blocks.KEEPS)
                assert kept == bool(self.parent[row]), f"row {row} was dropped and does not know what it keeps"
                assert row not in children, f"row {row} was dropped and is still a child"
            elif self.state[row] != ADOPTING:
                assert (self.parent[row] != 0) == (row in children), f"row {row} is not among its parent's children"
                assert not flags[row] & blocks.KEEPS, f"row {row} was not dropped and keeps its parent"
        for row in self.rows:
            above = self.parent[row]
            if self.state[above] in LIVE and self.state[row] in LIVE and flags[row] & blocks.DURABLE:
                assert flags[above] & blocks.DURABLE, f"row {row} is durable and what it continues is not"
        in_dram = Counter(self.parent[row] for row in self.rows if self.state[row] in _IN_DRAM)
        for row in self.rows:
            counted = self.column["dram_children"][row]
            assert counted == in_dram[row], f"row {row} counts {counted} children in DRAM and has {in_dram[row]}"
        rooted = {0}
        for row in self.rows:
            path = []
            at = row
            while at not in rooted:
                path.append(at)
                at = self.parent[at]
                assert len(path) <= len(self.rows), f"row {row} is its own ancestor"
            rooted.update(path)

    def check_leaf_lists(self) -> None:
        """The queues of a pool list exactly its evictable blocks, each by rank; and count all of its blocks."""
        everywhere: set[int] = set()
        for pool in self.arenas.by_number.values():
            listed = self.check_queues(pool.number, everywhere)
            counted = int(self.tables.pools[pool.number]["listed"])
            assert counted == listed, f"the lists of pool {pool.number} are miscounted"
        members = Counter((self.pool_of(row), self.column["queue"][row]) for row in self.rows)
        for row in self.rows:
            queued = self.column["queue"][row] != NO_QUEUE
            assert queued == (self.state[row] in LIVE), f"row {row} is in a queue wrongly"
        for pool in self.arenas.by_number.values():
            counted = self.tables.pools[pool.number]["members"].tolist()
            assert counted == [members[pool.number, queue] for queue in range(QUEUES)], f"members of {pool.number}"
        for row in self.rows:
            evictable = not self.holds[row] and self.is_leaf(row)
            passed_over = self.is_leaf(row) and self.holds[row] == 1 and self.column["flags"][row] & blocks.VERIFYING
            right = (row in everywhere) == evictable or (row in everywhere and passed_over)
            assert right, f"row {row} is evictable={evictable} and on the list otherwise"
            flagged = bool(self.column["flags"][row] & blocks.LISTED)
            assert flagged == (row in everywhere), f"row {row} is marked as listed wrongly"
        self.check_ranks()

    def check_ranks(self) -> None:
        """A pool that goes by its rule altogether has no rank of another one; one that does not yet is worked on."""
        for pool in self.arenas.by_number.values():
            head = self.tables.pools[pool.number]
            if head["moving"]:
                assert self.store.sweeper.jobs.queued, f"nobody puts pool {pool.number} in order"
            elif head["rule"] == blocks.PGDSF:
                mine = [row for row in self.rows if self.state[row] in LIVE and self.pool_of(row) == pool.number]
                by_clock = np.asarray(self.column["queue"])[mine] < blocks.SAID
                late = by_clock & (self.tables.ranks[mine] > head["clock"])
                assert not late.any(), f"rows of pool {pool.number} have ranks that its clock has not reached"

    def check_queues(self, number: int, everywhere: set[int]) -> int:
        """The leaf lists of a pool. How many they list."""
        head = self.tables.pools[number]
        oldest, newest, filled = head["oldest"].tolist(), head["newest"].tolist(), head["filled"].tolist()
        slots = sum(slots for slots, pool in zip(self.slots_at, self.pool_at, strict=True) if pool == number)
        exact, count = slots <= EXACT_ORDER and number < POOLS, 0
        for queue, row in enumerate(oldest):
            marked = bool(filled[queue >> 6] >> (queue & 63) & 1)
            assert marked == bool(row), f"queue {queue} of pool {number} is marked wrongly"
            listed = self.check_queue(number, queue, row, everywhere) if row else []
            assert newest[queue] == (listed[-1] if listed else 0), f"the newest of pool {number} is not the last"
            if exact and listed:
                ranks = self.tables.ranks[listed].tolist()
                assert ranks == sorted(ranks), f"the list of pool {number} is out of order"
            count += len(listed)
        return count

    def check_queue(self, number: int, queue: int, row: int, everywhere: set[int]) -> list[int]:
        """One leaf list of a pool, from its oldest row on. Returns it."""
        older, newer, before = self.column["older"], self.column["newer"], 0
        listed: list[int] = []
        while row:
            assert row not in everywhere, f"row {row} is listed twice"
            everywhere.add(row)
            assert older[row] == before, "the leaf list is linked one way only"
            assert self.pool_of(row) == number, f"row {row} is on another pool's list"
            assert self.column["queue"][row] == queue, f"row {row} is on another queue's list"
            listed.append(row)
            before, row = row, newer[row]
        return listed

    def is_leaf(self, row: int) -> bool:
        """Could a block go, if nobody held it?"""
        if self.state[row] in (RESIDENT, KEPT):
            alone = not self.column["first_child"][row]
            return not self.column["dram_children"][row] and bool(alone or self.column["disk"][row])
        return self.state[row] == DISK and not self.column["first_child"][row]


def _follow(at: int, following: list[int], most: int) -> Iterator[int]:
    """Slots of a free list whose links are one too high, so that 0 ends it."""
    for _ in range(most + 1):
        if not at:
            return
        yield at - 1
        at = following[at - 1]
    raise AssertionError("free slots run in a circle")
