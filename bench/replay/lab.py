"""Drives a workload through the block table that the daemon runs: the same rules, leaves, ghosts and arenas.

No bytes and no clock: an event's own time is now. A request finds its lead run, uses it, and stores the rest at once,
what it decodes included. With one model the capacity is exact to the block; models of several block sizes share arenas,
which change hands as they do in the daemon.
"""

# ruff: noqa: ARG002  what a port passes, nobody here needs

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from bench.replay.oracle import Hints
from bench.replay.score import Score, score
from bench.replay.workload import Keys, Model, Request, Workload
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.arenas import Arenas, slot_shift
from kvstore.blocks import ARENA, BLOCK, GHOST, POOL, REUSE, SLOT, Index, Tables
from kvstore.policies import Policies, Rules
from kvstore.policy import TOUCH_BONUS_S, Rule, set_rule
from kvstore.ports import Outbox
from kvstore.quotas import Capacity, Shares
from kvstore.room import Room, make_room
from kvstore.rules import Tier
from kvstore.sessions import Pool, Session, Tenant
from kvstore.sweeps import Jobs

START_NS = 10**12  # long before the first event: nothing was touched at time 0
GHOSTS_A_BLOCK = 6  # as in the daemon
BLOCKS_AN_ARENA = 8  # of the largest model, where several share the capacity


@dataclass(frozen=True, slots=True)
class Setting:
    """A rule and its knobs."""

    rule: Rule
    bonus_s: float = TOUCH_BONUS_S


def replay(workload: Workload, capacity_bytes: int, setting: Setting, hints: Sequence[Hints] = ()) -> Score:
    """What a cache of so many bytes is worth that evicts by that rule. `hints`: for each request, what is said then of
    the next use of each of its blocks."""
    cache = Cache(workload, capacity_bytes, setting)
    hits: list[int] = []
    for number, request in enumerate(workload.requests):
        hits.append(cache.serve(request))
        if hints:
            cache.hint(request.model, request.keys, hints[number])
    return score(workload, hits)


class NoBytes:
    """Memory of which nobody reads a byte (kvstore/ports.py)."""

    def table(self, name: str, table_bytes: int, *, lasting: bool = True) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Zeros."""
        return np.zeros(table_bytes, np.uint8)

    def new_arena(self, arena: int, arena_bytes: int) -> bool:
        """Always."""
        return True

    def punch_arena(self, arena: int) -> None:
        """One tenant's arenas are handed on as they are."""
        raise AssertionError("nothing is ever punched")

    def held_bytes(self, arena: int) -> int:
        """Nobody maps it."""
        return 0

    def close_arena(self, arena: int) -> None:
        """See `punch_arena`."""


class Nobody:
    """Nobody is told anything."""

    def arena_gone(self, session: Session, arena: int) -> None:
        """Nobody maps an arena."""


class Cache:
    """One tenant's DRAM, with a pool for each model."""

    def __init__(self, workload: Workload, capacity_bytes: int, setting: Setting) -> None:
        self._workload = workload
        sizes = [model.block_bytes for model in workload.models]
        rows = capacity_bytes // min(sizes) + 2
        if len(sizes) == 1:  # one arena of exactly so many slots, a page each: nobody looks at them
            arena_bytes, positions, slots = capacity_bytes // sizes[0] * PAGE_BYTES, 1, [PAGE_BYTES]
        else:
            arena_bytes, slots = BLOCKS_AN_ARENA * max(sizes), sizes
            positions = capacity_bytes // arena_bytes
        self._tables = _tables(arena_bytes, positions, rows)
        heads = max(16, 2 << (rows - 1).bit_length())
        index = Index(np.zeros(heads, np.uint32), np.array([8, 0, 0, 1, 2], np.uint64))
        self._tenant = Tenant("lab", 0, index)
        self._shares = Shares(Capacity(Tier.DRAM, arena_bytes, positions), lambda one: one.arenas, [self._tenant])
        policies = Policies(self._tables, Rules())
        self._arenas = Arenas(self._tables, NoBytes(), cast("Outbox", Nobody()), arena_bytes, positions, policies)
        self._jobs = Jobs(self._tables, self._arenas)
        self._pools = [self._pool(slot, size, setting) for slot, size in zip(slots, sizes, strict=True)]
        self._costs = [_costs(model) for model in workload.models]
        most = max((request.keys.size + request.output_keys.size for request in workload.requests), default=1)
        self._words = np.zeros(4 * most, np.uint64)
        self._run = np.zeros(most, np.uint32)
        self._grants = np.zeros(most, np.uint32)

    def serve(self, request: Request) -> int:
        """One request. Returns the blocks of its lead run."""
        now_ns = START_NS + int(request.at_s * 1e9)
        keys = request.keys
        self._words[: 4 * keys.size : 4] = keys
        heads, shape = self._tenant.index
        hit, _ = blocks.match_run(
            self._tables.blocks, heads, shape, request.model, self._words, 0, keys.size, self._run
        )  # fmt: skip
        self._store(request.model, keys, now_ns)
        if request.output_keys.size:
            self._store(request.model, np.concatenate((keys, request.output_keys)), now_ns, first=False)
        return int(hit)

    def hint(self, model: int, keys: Keys, hints: Hints) -> None:
        """Somebody says what it expects of each block of a chain."""
        self._words[: 4 * keys.size : 4] = keys
        blocks.hint_run(self._tables, self._tenant.index, model, self._words, 0, keys.size, hints)

    def hold(self, model: int, keys: Keys) -> int:
        """Pin the lead run of a chain: its deepest block, and so all before it. Returns that; 0 if nothing is there."""
        self._words[: 4 * keys.size : 4] = keys
        heads, shape = self._tenant.index
        found, _ = blocks.match_run(
            self._tables.blocks, heads, shape, model, self._words, 0, keys.size, self._run
        )  # fmt: skip
        if found:
            blocks.hold_rows(self._tables, self._run, found - 1, found)
        return int(self._run[found - 1]) if found else 0

    def let_go(self, block: int) -> None:
        """End what `hold` began."""
        blocks.unhold_rows(self._tables, np.array([block], np.uint32), 0, 1)

    def _store(self, model: int, keys: Keys, now_ns: int, *, first: bool = True) -> None:
        """Use the lead run of a chain and store the rest, as far as there is room."""
        self._words[: 4 * keys.size : 4] = keys
        pool, now = self._pools[model], np.uint64(now_ns)
        may_evict = len(self._pools) == 1 and pool.arenas > 0
        while True:
            _, done = blocks.access(
                self._tables, self._tenant.index, pool.number, model, self._words, 0, keys.size, first, may_evict, now,
                *self._costs[model], self._run, self._grants,
            )  # fmt: skip
            first = False
            if done == keys.size:
                return
            room, position = make_room(
                self._arenas, self._tables, self._shares, pool, now_ns, exhausted=may_evict
            )  # fmt: skip
            if room is Room.RECYCLE:
                self._recycle(position, pool, now_ns)
            elif room is not Room.MADE and may_evict:
                return  # longer than the cache
            may_evict = may_evict or room is Room.EVICT

    def _recycle(self, position: int, pool: Pool, now_ns: int) -> None:
        self._arenas.drain(position, pool)
        while self._arenas.draining is not None:
            self._jobs.run(now_ns)

    def pool(self, model: int) -> tuple[Tables, Index, int]:
        """Where a model's blocks are."""
        return self._tables, self._tenant.index, self._pools[model].number

    def _pool(self, slot_bytes: int, block_bytes: int, setting: Setting) -> Pool:
        pool = self._arenas.add_pool(self._tenant, slot_bytes)
        self._tables.pools[pool.number]["slot_bytes"] = block_bytes
        set_rule(self._tables, pool.number, setting.rule, bonus_s=setting.bonus_s)
        return pool


def _costs(model: Model) -> tuple[float, float]:
    """What the first block of a chain takes to compute, and how much more each that follows than the one before.

    Exact for a profile that is quadratic; the start of a forward pass is no block's own.
    """
    none = model.profile.seconds(0, 0)
    first, second = (model.profile.seconds(i * model.block_tokens, model.block_tokens) - none for i in (0, 1))
    return first, second - first


def _tables(arena_bytes: int, positions: int, rows: int) -> Tables:
    """Those of a store with one tenant, nothing on disk, and no bytes."""
    shift = slot_shift(arena_bytes)
    book = np.zeros(blocks.BOOK_WORDS, np.uint64)
    book[blocks.UNUSED_ROW] = book[blocks.GENERATION] = 1
    book[blocks.SHIFT], book[blocks.ON_DISK], book[blocks.LIMBO] = shift, positions, positions
    tables = Tables(
        np.zeros(rows + 1, BLOCK), np.zeros((positions + 1) << shift, SLOT), np.zeros(positions + 1, ARENA),
        np.zeros(8, POOL), np.zeros(8, np.uint32), book, np.zeros(rows + 1),
        np.zeros(GHOSTS_A_BLOCK * blocks.GHOST_WAYS * -(-rows // blocks.GHOST_WAYS), GHOST),
        np.zeros(8, REUSE),
    )  # fmt: skip
    tables.arenas[positions]["pool"] = tables.pools.size
    return tables
