"""The LRU stack of one stream's sampled keys: how many bytes were used since a key was used last.

    Stack
    rows     sampled keys by position, in order of last use; a key that is used moves to the next position
    places   hash table over them: open addressing, the position of a key or 0
    tree     Fenwick tree of pages over positions: what was used since position p is all pages less those up to p
    words    threshold, last position taken, live keys, their pages, most keys, oldest second of use to remember
    hits     accesses by group and by distance, 16 bins an octave of pages; last bin: no earlier use known
    saved    their cost, likewise

An access counts for 1/rate accesses, and pages above it for 1/rate pages, with the rate at that time: what the paper
on SHARDS reaches by rescaling the histogram when the threshold falls. When the keys are as many as there is room for,
those used too long ago are forgotten; if that does not help, the threshold falls by a quarter and the keys above it go.

All accesses of a run happen at once: their distances are taken before any of them moves. Then they move last first,
so that of one chain the beginning lies on top: a cache that evicts leaves first keeps it longest.

A key belongs to one of `GROUPS` groups for good; how much the groups differ says how far chance may have misled us.
"""

from math import log2
from typing import Final, NamedTuple

import numpy as np

from kvstore.blocks import U4, U8, Number, Rows, compiled
from kvstore.insight.tap import F8

GROUPS: Final = 16
BINS_PER_OCTAVE: Final = 16
BINS: Final = 34 * BINS_PER_OCTAVE  # up to 2**34 pages, 64 TiB
COLD: Final = BINS

_KEY = np.dtype([("hash", "<u8"), ("pages", "<u4"), ("used_s", "<u4")])  # pages 0: nobody is here any more
THRESHOLD, TOP, LIVE, PAGES, MOST, OLDEST_S, WORDS = range(7)
_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)
_1, _2, _32 = np.uint64(1), np.uint64(2), np.uint64(32)


class Stack(NamedTuple):
    """One stream's sampled keys and what is counted of them."""

    rows: Rows
    places: U4
    tree: U8
    words: U8
    hits: F8
    saved: F8


def new_stack(keys: int, threshold: int) -> Stack:
    """Room for so many keys, a power of two. 56 bytes a key, and 136 KiB."""
    assert keys & (keys - 1) == 0, "keys must be a power of two"
    words = np.zeros(WORDS, dtype=np.uint64)
    words[THRESHOLD], words[MOST] = threshold, keys
    return Stack(
        rows=np.zeros(2 * keys + 1, dtype=_KEY),
        places=np.zeros(2 * keys, dtype=np.uint32),
        tree=np.zeros(2 * keys + 1, dtype=np.uint64),
        words=words,
        hits=np.zeros((GROUPS, BINS + 1)),
        saved=np.zeros((GROUPS, BINS + 1)),
    )


@compiled
def _place(rows: Rows, places: U4, key: Number) -> Number:
    """Where a key's position is written, or would be."""
    mask = places.size - 1
    place = np.int64((key * _FIBONACCI) >> _32) & mask
    while places[place] and rows[places[place]]["hash"] != key:
        place = (place + 1) & mask
    return place


@compiled
def _add(tree: U8, position: Number, pages: Number) -> None:
    """Add pages at a position; those to be taken away come as their complement."""
    while position < tree.size:
        tree[position] += pages
        position += position & -position


@compiled
def _up_to(tree: U8, position: Number) -> Number:
    """Pages at positions up to this one."""
    pages: Number = np.uint64(0)
    while position:
        pages += tree[position]
        position &= position - 1
    return pages


@compiled
def tighten(s: Stack, threshold: Number) -> None:
    """Number positions anew from 1, without keys at or above `threshold` and those last used before `OLDEST_S`."""
    oldest_s = s.words[OLDEST_S]
    live, pages = 0, np.uint64(0)
    for position in range(1, np.int64(s.words[TOP]) + 1):
        row = s.rows[position]
        if row["pages"] and row["hash"] < threshold and row["used_s"] >= oldest_s:
            live += 1
            kept = s.rows[live]
            kept["hash"], kept["pages"], kept["used_s"] = row["hash"], row["pages"], row["used_s"]
            pages += np.uint64(row["pages"])
    s.words[THRESHOLD] = threshold
    s.words[TOP] = s.words[LIVE] = np.uint64(live)
    s.words[PAGES] = pages
    s.places[:] = 0
    s.tree[:] = 0
    for position in range(1, live + 1):
        s.places[_place(s.rows, s.places, s.rows[position]["hash"])] = position
        s.tree[position] = np.uint64(s.rows[position]["pages"])
    for position in range(1, s.tree.size):
        above = position + (position & -position)
        if above < s.tree.size:
            s.tree[above] += s.tree[position]


@compiled
def _make_room(s: Stack) -> None:
    """A free position, and room for one key more."""
    most = s.words[MOST]
    full = s.words[LIVE] == most
    if full or np.int64(s.words[TOP]) == s.tree.size - 1:
        tighten(s, s.words[THRESHOLD])
        while full and s.words[LIVE] > most - (most >> _2):
            tighten(s, s.words[THRESHOLD] - (s.words[THRESHOLD] >> _2))


@compiled
def _count(s: Stack, access: Number) -> None:
    """Put one access into the histograms: by its distance, itself included."""
    key = access["hash"]
    scale = 2.0**64 / np.float64(s.words[THRESHOLD])
    used = s.places[_place(s.rows, s.places, key)]
    into = COLD
    if used:
        above = s.words[PAGES] - _up_to(s.tree, np.int64(used))
        distance = np.float64(above) * scale + np.float64(access["pages"])
        into = min(int(log2(distance) * BINS_PER_OCTAVE), BINS - 1)
    group = np.int64(key) & (GROUPS - 1)
    s.hits[group, into] += scale
    s.saved[group, into] += scale * access["cost_s"]


@compiled
def _use(s: Stack, access: Number, now_s: Number) -> None:
    """Move a key to the top, or put it there."""
    _make_room(s)
    key, pages = access["hash"], access["pages"]
    if key >= s.words[THRESHOLD]:
        return
    place = _place(s.rows, s.places, key)
    position = np.int64(s.words[TOP]) + 1
    used = np.int64(s.places[place])
    if used:
        old_pages = np.uint64(s.rows[used]["pages"])
        _add(s.tree, used, ~old_pages + _1)
        s.words[PAGES] -= old_pages
        s.rows[used]["pages"] = 0
    else:
        s.words[LIVE] += _1
    row = s.rows[position]
    row["hash"], row["pages"], row["used_s"] = key, pages, now_s
    s.places[place] = position
    _add(s.tree, position, np.uint64(pages))
    s.words[PAGES] += np.uint64(pages)
    s.words[TOP] = np.uint64(position)


@compiled
def absorb(s: Stack, accesses: Rows, stream: Number, now_s: Number) -> Number:
    """Count and move the accesses of a stream (0: all) in whole runs. Returns how many those were."""
    absorbed, begin = 0, 0
    while begin < accesses.size:
        end, run = begin + 1, accesses[begin]["run"]
        while end < accesses.size and accesses[end]["run"] == run:
            end += 1
        if not stream or accesses[begin]["stream"] == stream:
            for i in range(begin, end):
                if accesses[i]["hash"] < s.words[THRESHOLD] and not accesses[i]["stored"]:
                    _count(s, accesses[i])
            for i in range(end - 1, begin - 1, -1):
                if accesses[i]["hash"] < s.words[THRESHOLD]:
                    _use(s, accesses[i], now_s)
                    absorbed += 1
        begin = end
    return absorbed
