"""How large a store is: its limits, and the tables that follow from them.

slot numbers    0 ..                      ON_DISK ..            LIMBO
positions       | arenas of DRAM, in order | segments of disk     | rows that wait for a place |
each has 1 << SHIFT numbers: as many as the arena or segment with the smallest slots, rounded up

rows            0 is nobody, then one for each slot there can be in DRAM and on disk
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kvproto.errors import UsageError
from kvproto.limits import (
    DISK_POOLS,
    DISK_SLOT_BYTES_MIN,
    KEY_BYTES,
    LEASE_TTL_NS_MAX,
    NAMESPACES,
    PAGE_BYTES,
    POOLS,
    TICKET_TTL_NS,
)
from kvstore import blocks
from kvstore.arenas import slot_shift
from kvstore.blocks import ARENA, BLOCK, GHOST, POOL, REUSE, SLOT, U8, Tables
from kvstore.policies import Rules
from kvstore.ports import Memory
from kvstore.quotas import HBM, Capacity, Quota
from kvstore.rules import Tier
from kvstore.sweeps import SLICE_STEPS
from kvstore.tier.disk import NO_DISK, DiskLimits

KEPT_ROWS = (
    blocks.BOOK_WORDS
)  # one more word of `book`: UNUSED_ROW of a former life, which `take_over` has yet to come to
GHOSTS_A_BLOCK = 6  # of those that DRAM holds: no rule looks further back than four, and sets fill unevenly

assert BLOCK["key"].itemsize == KEY_BYTES


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
    rules: Rules = field(default_factory=Rules)
    scrub_bytes_per_s: int = 0  # of DRAM, in the background; 0: only when asked for
    scrub_all: bool = False  # not only arenas that clients could write to
    curves: bool = True  # watch the stream of keys (kvstore/watching.py)
    quotas: Mapping[str, Quota] = field(default_factory=dict)  # as configured, by tenant; `check_quotas` has seen them
    hbm: Capacity = field(default_factory=lambda: Capacity(HBM, 1, 0))  # of the tier on each GPU
    tenants: tuple[str, ...] = ()  # that are configured: there is a place for each, whether it has come or not

    @property
    def positions(self) -> int:
        """How many arenas there may be at a time."""
        return self.dram_bytes // self.arena_bytes


@dataclass(frozen=True, slots=True)
class Geometry:
    """What numbers a store needs."""

    limbo: int  # the position after all others
    shift: int  # log2 of slot numbers a position
    rows: int


def capacities_of(limits: Limits) -> tuple[Capacity, Capacity]:
    """DRAM and disk, as quotas count them."""
    disk = limits.disk
    dram = Capacity(Tier.DRAM, limits.arena_bytes, limits.positions)
    return dram, Capacity(Tier.DISK, disk.segment_bytes, disk.segments)


def geometry_of(limits: Limits) -> Geometry:
    """Raises UsageError for what cannot be numbered."""
    positions, segments = limits.positions, limits.disk.segments
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
    return Geometry(limbo, shift, rows)


def lasting_tables(limits: Limits) -> dict[str, int]:
    """Bytes of the tables that a successor goes on with, by name."""
    geometry = geometry_of(limits)
    return {
        "book": 8 * (KEPT_ROWS + 1),
        "blocks": geometry.rows * BLOCK.itemsize,
        "arenas": (geometry.limbo + 1) * ARENA.itemsize,
    }


def former_rows(book: U8) -> int:
    """How many rows a former life had begun to use, as far as its book is true."""
    return max(int(book[blocks.UNUSED_ROW]), int(book[KEPT_ROWS]))


def make_tables(limits: Limits, memory: Memory) -> Tables:
    """The tables of a store in which nothing is yet. What a former life left of `blocks` stays for its successor."""
    geometry, lasting = geometry_of(limits), lasting_tables(limits)
    limbo, shift = geometry.limbo, geometry.shift
    dram_rows = limits.positions << slot_shift(limits.arena_bytes)
    ghosts = GHOSTS_A_BLOCK * blocks.GHOST_WAYS * -(-dram_rows // blocks.GHOST_WAYS)
    book = memory.table("book", lasting["book"]).view(np.uint64)
    arenas = memory.table("arenas", lasting["arenas"]).view(ARENA)
    # `take_over` puts to use what a former life left; were this life to end before, the next one must know how much is
    # there. Until then nobody may look at those rows, which may be torn. A life that begins cold is given new tables.
    begun = np.zeros_like(book)
    begun[KEPT_ROWS] = former_rows(book)
    begun[blocks.UNUSED_ROW] = 1  # row 0 is nobody
    begun[blocks.TURN] = book[blocks.TURN]
    begun[blocks.GENERATION] = max(limits.first_generation, 1, int(book[blocks.GENERATION]))
    begun[blocks.SHIFT] = shift
    begun[blocks.ON_DISK] = limits.positions
    begun[blocks.LIMBO] = limbo
    book[:] = begun
    arenas[limits.positions :] = 0
    tables = Tables(
        memory.table("blocks", lasting["blocks"]).view(BLOCK),
        memory.table("slots", ((limbo + 1) << shift) * SLOT.itemsize, lasting=False).view(SLOT),
        arenas,
        memory.table("pools", (POOLS + DISK_POOLS + 1) * POOL.itemsize, lasting=False).view(POOL),
        memory.table("census", NAMESPACES * 4, lasting=False).view(np.uint32),
        book,
        memory.table("ranks", 8 * geometry.rows, lasting=False).view(np.float64),
        memory.table("ghosts", ghosts * GHOST.itemsize).view(GHOST),
        memory.table("reuse", (POOLS + DISK_POOLS + 1) * REUSE.itemsize, lasting=False).view(REUSE),
    )
    tables.arenas[limbo]["pool"] = tables.pools.size
    return tables


def index_buckets(limits: Limits) -> int:
    """Room for two buckets a block if a single tenant holds them all; a power of two, untouched until needed."""
    slots = limits.dram_bytes // PAGE_BYTES + limits.disk.rows
    return max(16, 2 << (slots - 1).bit_length())
