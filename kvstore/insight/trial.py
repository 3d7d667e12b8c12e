"""A shadow that is the real engine: a block table of a few thousand rows, evicting by the code that evicts for real.

The keys of a run that are sampled are a chain here as well: whoever shares a prefix shares its sampled keys. So a
shadow evicts leaves first, as its model does. All blocks are of one size, the mean one; where slots differ, the cost of
a block counts for as many as it is large, so that rules which weigh cost against bytes do so.

A cache of another size begins empty: that is rare (`Shadows`), and all shadows do so together.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES
from kvstore import blocks
from kvstore.blocks import (
    ARENA,
    BLOCK,
    GHOST,
    POOL,
    REUSE,
    SLOT,
    U1,
    U4,
    U8,
    Index,
    Number,
    Rows,
    Tables,
    access,
    compiled,
)
from kvstore.policy import set_rule
from kvstore.rules import Rule

TRIED: Final = (Rule.LRU, Rule.SECOND_TOUCH, Rule.PGDSF, Rule.DENSITY)
SHADOW_BLOCKS: Final = 4096  # of one shadow at most: 1.2 MiB
GHOSTS_A_BLOCK: Final = 4  # as the store has
MEAN_OF: Final = 1 << 14  # accesses after which half of what is known of sizes is forgotten
APART: Final = 0.25  # a cache is made anew when its size in blocks is off by so much

# numba's cache looks at this file alone, and `_play` holds code of another: so what that one says is a part of the key.
_TABLE_CODE: Final = int.from_bytes(hashlib.sha256(Path(blocks.__file__).read_bytes()).digest()[:7], "little") | 1

Play = Callable[[Tables, Index, Rows, float, U8, U4, U4, U1, int], None]


def _make_play(stamp: int) -> Play:
    @compiled
    def play(
        t: Tables, ix: Index, accesses: Rows, mean_pages: Number, words: U8, run: U4, grants: U4, hits: U1, now: Number
    ) -> None:
        """Let whole runs pass. What was asked for and is not there is stored at once."""
        begin = 0
        while stamp and begin < accesses.size:
            end = begin + 1
            while end < accesses.size and accesses[end]["run"] == accesses[begin]["run"] and end - begin < run.size:
                end += 1
            first, last, count = accesses[begin], accesses[end - 1], end - begin
            for i in range(count):
                words[4 * i] = accesses[begin + i]["hash"]
            weight = mean_pages / max(1.0, np.float64(first["pages"]))
            cost_s = np.float64(first["cost_s"]) * weight
            slope_s = (np.float64(last["cost_s"]) * weight - cost_s) / max(1, count - 1)
            found, _ = access(
                t, ix, 0, 1, words, 0, count, first["stored"] == 0, True, np.uint64(now), cost_s, slope_s, run, grants
            )
            for i in range(found):
                hits[begin + i] = 1
            begin = end

    return play


_play = _make_play(_TABLE_CODE)


class Trial:
    """One rule of the engine in one small cache (`shadow.Rule`)."""

    __slots__ = (
        "_rule", "_tables", "_index", "_slots", "_capacity_pages", "_pages", "_seen", "_words", "_run", "_grants",
    )  # fmt: skip

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._tables: Tables | None = None
        self._index: Index | None = None
        self._slots = 0
        self._capacity_pages = 0
        self._pages = self._seen = 0  # of accesses, lately
        self._words: U8 = np.zeros(4 * KEYS_PER_FRAME, dtype=np.uint64)
        self._run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._grants: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)

    @property
    def name(self) -> str:
        """As in `kvctl policy`."""
        return self._rule.value

    @property
    def blocks(self) -> int:
        """Keys it holds."""
        return int(self._tables.book[blocks.ROWS]) if self._tables else 0

    @property
    def capacity_blocks(self) -> int:
        """Blocks it has room for."""
        return self._slots

    @property
    def held_bytes(self) -> int:
        """Memory, as if every page of it were touched."""
        arrays = (*(self._tables or ()), *(self._index or ()), self._words, self._run, self._grants)
        return sum(array.nbytes for array in arrays)

    def resize(self, capacity_pages: int) -> None:
        """Hold no more than so many pages from the next access on."""
        self._capacity_pages = capacity_pages

    def forget(self, threshold: int) -> None:  # noqa: ARG002 - a cache of another size begins empty
        """Drop the keys at or above `threshold`, and all others with them."""
        self._tables = self._index = None
        self._slots = 0

    def play(self, accesses: Rows, hits: U1, now_ns: int) -> None:
        """Answer `accesses` in order, run by run."""
        if not accesses.size:
            return
        self._pages += int(accesses["pages"].sum())
        self._seen += accesses.size
        if self._seen > MEAN_OF:
            self._pages, self._seen = self._pages // 2, self._seen // 2
        mean_pages = self._pages / self._seen
        wanted = min(SHADOW_BLOCKS, max(1, int(self._capacity_pages / mean_pages)))
        if self._tables is None or abs(wanted - self._slots) > APART * self._slots:
            self._begin(wanted)
        assert self._tables is not None
        assert self._index is not None
        _play(
            self._tables, self._index, accesses, mean_pages, self._words, self._run, self._grants, hits, now_ns
        )  # fmt: skip

    def _begin(self, slots: int) -> None:
        self._slots = slots
        heads = max(16, 2 << (slots - 1).bit_length())
        self._index = Index(np.zeros(heads, np.uint32), np.array([8, 0, 0, 1, 2], np.uint64))
        self._tables = tables = _tables(slots)
        tables.pools[0]["slot_bytes"] = PAGE_BYTES
        set_rule(tables, 0, self._rule)
        blocks.assign_arena(tables, 0, np.uint32(1), np.uint32(0), np.uint32(slots), np.uint64(1))


def _tables(slots: int) -> Tables:
    """Those of a store with one pool of one arena, nothing on disk, and no bytes."""
    shift = max(1, (slots - 1).bit_length())
    book: U8 = np.zeros(blocks.BOOK_WORDS, np.uint64)
    book[blocks.UNUSED_ROW] = book[blocks.GENERATION] = book[blocks.ON_DISK] = book[blocks.LIMBO] = 1
    book[blocks.SHIFT] = shift
    tables = Tables(
        np.zeros(slots + 2, BLOCK), np.zeros(2 << shift, SLOT), np.zeros(2, ARENA), np.zeros(2, POOL),
        np.zeros(2, np.uint32), book, np.zeros(slots + 2),
        np.zeros(GHOSTS_A_BLOCK * blocks.GHOST_WAYS * -(-slots // blocks.GHOST_WAYS), GHOST), np.zeros(2, REUSE),
    )  # fmt: skip
    tables.arenas[1]["pool"] = 2
    return tables
