"""The prefixes of a namespace as a tree of runs, added up from a copy of its rows.

    owner thread    `slice_of`    8,192 rows at a time, 0.2 ms each: what of them belongs to the namespace is copied
    any thread      `grow`        the tree of what was copied; compiled, and without the interpreter's lock
                    `choose`      which of its runs are worth listing

A run is a stretch of blocks each of which continues the one before it and has no other continuation. Slices are of
different moments, so what moved meanwhile may not fit: a block whose parent is not in the copy is left out, with all
that continues it, and counted as changed. Nothing is held, and nothing of the store is written.

A million blocks take 18 MB as a copy, 35 MB for a moment, and 60 bytes more a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from numba import njit

from kvstore import blocks
from kvstore.blocks import U1, U4
from kvstore.pinning import Pinning

SLICE_ROWS: Final = 8192
BLOCKS_MOST: Final = 1 << 22  # of one tree: 75 MB as a copy
IN_DRAM, ON_DISK, PINNED, HELD = (np.uint8(1 << bit) for bit in range(4))
TICK_NS: Final = 10**7  # of ages; 32 bits of them are 497 days

I4: TypeAlias = npt.NDArray[np.int32]
I8: TypeAlias = npt.NDArray[np.int64]
Number: TypeAlias = Any
F = TypeVar("F", bound=Callable[..., Any])

LIVE_STATES: Final = np.isin(np.arange(256), blocks.LIVE)
_THERE: Final = np.isin(np.arange(256), (blocks.RESIDENT, blocks.KEPT))
_SAVING: Final = int(blocks.SAVING)


# -- the copy ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """What of a slice of rows belongs to a namespace, in the order of rows."""

    rows: U4
    parents: U4  # rows; 0: it begins a chain
    tags: U4  # of keys: whoever looks at a row again sees by it whether it is still the same block's
    ages: U4  # since the last use, in ticks
    hits: U1  # uses after the first, as far as a row remembers them
    flags: U1


def slice_of(tables: blocks.Tables, pinning: Pinning, number: int, start: int, now_ns: int) -> tuple[Part, int]:
    """Copy what belongs to namespace `number` of the rows from `start` on, and where to go on; 0: that was all.

    Owner thread.
    """
    unused = int(tables.book[blocks.UNUSED_ROW])
    stop = min(start + SLICE_ROWS, unused)
    table = tables.blocks[start:stop]
    at = np.flatnonzero((table["namespace"] == number) & LIVE_STATES[table["state"]])
    # As rows of words: to take structures apart one by one costs five times as much.
    found = np.take(table.view(np.uint64).reshape(table.size, table.itemsize // 8), at, axis=0).view(blocks.BLOCK)[:, 0]
    rows = (at + start).astype(np.uint32)
    ages = np.maximum(now_ns - found["touched"].astype(np.int64), 0) // TICK_NS
    on_disk = (found["disk"] != 0) & (found["flags"] & _SAVING == 0)
    flags = _THERE[found["state"]] * IN_DRAM | on_disk * ON_DISK
    flags |= pinning.covered(rows) * PINNED | (found["holds"] != 0) * HELD
    part = Part(
        rows,
        found["parent"].copy(),
        tags_of(found["key"]),
        np.minimum(ages, (1 << 32) - 1).astype(np.uint32),
        (np.maximum(found["uses"] & np.uint8(blocks.USES_MAX), 1) - 1).astype(np.uint8),
        flags.astype(np.uint8),
    )
    return part, (stop if stop < unused else 0)


def tags_of(keys: npt.NDArray[np.uint64]) -> U4:
    """Of keys, four words each."""
    return (keys[:, 0] & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def joined(parts: list[Part]) -> Part:
    """One copy of all."""
    return Part(*(np.concatenate(column) for column in zip(*parts, strict=True)))


# -- the tree ---------------------------------------------------------------------------------------------------


class Runs(NamedTuple):
    """All runs, each behind the one that it continues. Numbers of blocks are positions in the copy."""

    parent: I4  # -1: it begins a chain
    level: I4
    first: I4
    last: I4
    before: I8  # blocks of its chain above it
    length: I8
    blocks: I8  # with all below it, as what follows
    dram: I8
    disk: I8
    pinned: I8
    held: I8
    hits: I8
    age: I8  # ticks, of what was used last
    longest: I8  # blocks of the longest chain through it
    branches: I8


@dataclass(frozen=True, slots=True)
class Forest:
    """What grew."""

    runs: Runs
    changed: int  # blocks that did not fit

    @property
    def roots(self) -> I8:
        """Those that begin it."""
        return np.flatnonzero(self.runs.parent < 0)


def grow(copy: Part, start_row: int = 0) -> Forest:
    """The tree of all, or of `start_row` and what continues it. Raises KeyError if that is not there."""
    start = int(np.searchsorted(copy.rows, start_row)) if start_row else -1
    if start_row and (start == copy.rows.size or copy.rows[start] != start_row):
        raise KeyError("the block that it should begin with went away meanwhile")
    columns, changed = _grow(copy.rows, copy.parents, copy.ages, copy.hits, copy.flags, start)
    narrow, wide = columns
    return Forest(Runs(*narrow, *wide), int(changed))


def _compiled(function: F) -> F:
    """As `blocks.compiled`, and runs without the interpreter's lock."""
    jitted: F = njit(cache=True, nogil=True)(function)
    return jitted


@_compiled
def _grow(rows: U4, parents: U4, ages: U4, hits: U1, flags: U1, start: Number) -> Number:  # noqa: C901, PLR0912, PLR0915
    """`Runs`, as four narrow columns and eleven wide ones; and how many blocks did not fit."""
    count = rows.size
    place = np.full((np.int64(rows[count - 1]) if count else 0) + 1, -1, dtype=np.int32)  # of a row
    for i in range(count):
        place[rows[i]] = i
    above = np.empty(count, dtype=np.int32)  # -1: nobody, -2: somebody who is not there, -3: of another tree
    for i in range(count):
        parent = np.int64(parents[i])
        if parent == 0:
            above[i] = -1 if start < 0 else -3
        else:
            above[i] = place[parent] if parent < place.size and place[parent] >= 0 else -2
    before_start = 0
    if start >= 0:
        at = np.int64(above[start])
        while at >= 0 and before_start < count:
            before_start += 1
            at = np.int64(above[at])
        above[start] = -1
    children = np.zeros(count, dtype=np.int32)
    for i in range(count):
        if above[i] >= 0:
            children[above[i]] += 1
    # From the leaves up: each behind all that continue it. What is in a circle never comes.
    left = children.copy()
    order = np.empty(count, dtype=np.int32)
    filled = 0
    for i in range(count):
        if left[i] == 0:
            order[filled] = i
            filled += 1
    done = 0
    while done < filled:
        at = np.int64(above[order[done]])
        done += 1
        if at >= 0:
            left[at] -= 1
            if left[at] == 0:
                order[filled] = at
                filled += 1
    # And down again: each behind the one that it continues.
    run_of = np.full(count, -2, dtype=np.int32)
    runs = 0
    for step in range(filled - 1, -1, -1):
        block = np.int64(order[step])
        at = np.int64(above[block])
        if at == -1 or (at >= 0 and run_of[at] >= 0 and children[at] != 1):
            run_of[block] = runs
            runs += 1
        elif at >= 0:
            run_of[block] = run_of[at]
        else:
            run_of[block] = at
    narrow = np.full((4, runs), -1, dtype=np.int32)
    wide = np.zeros((11, runs), dtype=np.int64)
    parent_run, level, first, last = narrow[0], narrow[1], narrow[2], narrow[3]
    before, length, total, dram, disk = wide[0], wide[1], wide[2], wide[3], wide[4]
    pinned, held, most, age, longest, branches = wide[5], wide[6], wide[7], wide[8], wide[9], wide[10]
    age[:] = 1 << 62
    changed = count - filled
    for step in range(filled - 1, -1, -1):
        block = np.int64(order[step])
        run = np.int64(run_of[block])
        if run < 0:
            changed += run == -2
            continue
        if first[run] < 0:
            first[run] = block
            at = np.int64(above[block])
            if at >= 0:
                over = np.int64(run_of[at])
                parent_run[run] = over
                level[run] = level[over] + 1
                before[run] = before[over] + length[over]
                branches[over] += 1
            else:
                level[run] = 0
                before[run] = before_start
        last[run] = block
        length[run] += 1
        dram[run] += flags[block] & 1
        disk[run] += (flags[block] >> 1) & 1
        pinned[run] += (flags[block] >> 2) & 1
        held[run] += (flags[block] >> 3) & 1
        most[run] = max(most[run], np.int64(hits[block]))
        age[run] = min(age[run], np.int64(ages[block]))
    below = np.zeros(runs, dtype=np.int64)  # hits of what continues a run: each of them is one of the run's too
    for each in range(runs - 1, -1, -1):
        total[each] += length[each]
        most[each] = max(most[each], below[each])
        longest[each] = max(longest[each], before[each] + length[each])
        over = np.int64(parent_run[each])
        if over >= 0:
            total[over] += total[each]
            dram[over] += dram[each]
            disk[over] += disk[each]
            pinned[over] += pinned[each]
            held[over] += held[each]
            below[over] += most[each]
            age[over] = min(age[over], age[each])
            longest[over] = max(longest[over], longest[each])
    return (narrow, wide), changed


# -- what is listed ---------------------------------------------------------------------------------------------


def choose(runs: Runs, by: str, depth: int, width: int, limit: int) -> list[int]:
    """The runs to list, each before those below it: the best of all whose parents are listed, as far as they go.

    `by`: "blocks", "hits" or "recent". At most `width` of each run's branches, and of the beginnings; down to `depth`
    branchings; `limit` in all.
    """
    worth = {"blocks": runs.blocks, "hits": runs.hits, "recent": -runs.age}[by]
    order = np.lexsort((-runs.blocks, -worth, runs.parent))  # by whom they continue, the best of each first
    parents = runs.parent[order]

    def best_below(run: int) -> list[int]:
        begin, end = np.searchsorted(parents, np.array((run, run + 1), dtype=parents.dtype))  # or all of it is cast
        found: list[int] = order[begin : min(end, begin + width)].tolist()
        return found

    def ranked(found: list[int]) -> list[tuple[int, int, int]]:
        return [(-int(worth[run]), -int(runs.blocks[run]), run) for run in found]

    open_runs, listed = ranked(best_below(-1)), set[int]()
    heapify(open_runs)
    while open_runs and len(listed) < limit:
        run = heappop(open_runs)[2]
        listed.add(run)
        if runs.level[run] < depth:
            for one in ranked(best_below(run)):
                heappush(open_runs, one)
    return _in_order(best_below, listed)


def _in_order(best_below: Any, listed: set[int]) -> list[int]:
    chosen: list[int] = []
    waiting = [run for run in reversed(best_below(-1)) if run in listed]
    while waiting:
        run = waiting.pop()
        chosen.append(run)
        waiting += [one for one in reversed(best_below(run)) if one in listed]
    return chosen
