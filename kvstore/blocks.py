"""The block table and everything that walks it: index, prefix tree, leaf list, slots.

Compiled with numba because a LEASE of 100 keys may cost 45 us in all. One file, since numba's cache on disk notices
a changed source file only by the functions in it. All functions run on the owner thread and never raise.

    Tables
    blocks  one row of 128 bytes a block; row 0 is nobody, so that 0 can mean "none" everywhere
    slots   one row a slot: which block lies there, or the next free slot
    arenas  one row a position: a memfd that serves one pool; its free slots
    pools   one row a (tenant, slot size): its leaf list, and its arenas that have free slots
    book    [free block rows, first never used row, rows in use, log2 of slot numbers an arena]

    Index, one a tenant: linear hashing. `heads[bucket]` starts a chain of rows through `blocks.chain`; every
    insert splits at most one bucket, so that growing never stalls, and there are up to two buckets a block.
    `shape` = [buckets, split, entries, seed, seed].
    SipHash-1-3 under a secret seed keeps a client from choosing keys that share a bucket.

    Life of a block
                    reserve             publish                    evict / drop
         FREE ---------------> WRITING ----------> RESIDENT --------------------------> FREE
           ^                      | drop               | drop while held
           |                      v                    v
           +------------------- DOOMED <---------------+        out of the index, slot still in use
              last hold ends

A lease holds the deepest block of its run and no other: a resident child protects its ancestors, and a block that
is cut off while something still hangs on it keeps its parent (KEEPS) until it is freed itself. So LEASE and RELEASE
write one row, not a hundred, and what is deleted while leased stays readable from the root down.

`holds` counts leases, a ticket or running copy, a sweep, and cut-off children. A block is evictable when it is
RESIDENT, has no child and no hold: exactly then it is on its pool's leaf list, ordered by `touched`. A block's last
touch passes to its parent when it goes.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numba import njit

from kvproto.errors import Grant

F = TypeVar("F", bound=Callable[..., Any])
Number: TypeAlias = Any  # an int64 or a field's own type in compiled code, a Python number at its edge
U1 = np.ndarray[tuple[int], np.dtype[np.uint8]]
U4 = np.ndarray[tuple[int], np.dtype[np.uint32]]
U8 = np.ndarray[tuple[int], np.dtype[np.uint64]]
Rows = np.ndarray[tuple[int], np.dtype[np.void]]

FREE: Final = 0
WRITING: Final = 1
RESIDENT: Final = 2
DOOMED: Final = 3
LIVE: Final = (WRITING, RESIDENT)

# Two cache lines; LEASE walks only the first.
BLOCK = np.dtype(
    [
        ("key", "<u8", (4,)),
        ("touched", "<u8"),
        ("slot", "<u4"),
        ("chain", "<u4"),  # next row in the bucket, or next free row
        ("parent", "<u4"),
        ("first_child", "<u4"),
        ("holds", "<u4"),
        ("namespace", "<u2"),
        ("state", "u1"),
        ("flags", "u1"),  # LISTED, PARENT, KEEPS
        ("checksum", "<u8"),
        ("lease_until_ns", "<u8"),
        ("next_sibling", "<u4"),  # or, of a doomed block, the next one of its sweep
        ("prev_sibling", "<u4"),
        ("older", "<u4"),
        ("newer", "<u4"),
        ("writer", "<u4"),  # session that holds the ticket
        ("pad", "u1", (28,)),
    ]
)
LISTED: Final = np.uint8(1)  # on its pool's leaf list
PARENT: Final = np.uint8(2)  # has children
KEEPS: Final = np.uint8(4)  # doomed, and holds its parent until it is freed itself
SLOT = np.dtype([("block", "<u4"), ("next_free", "<u4")])
ARENA = np.dtype(
    [
        ("touched", "<u8"),
        ("lease_until_ns", "<u8"),  # of any block that lies here; leases may have ended before
        ("id", "<u4"),
        ("pool", "<u4"),  # pool + 1; 0: serves nobody
        ("slots", "<u4"),
        ("free", "<u4"),  # slot number + 1
        ("untouched", "<u4"),  # slots from here on were never used
        ("used", "<u4"),
        ("held", "<u4"),  # blocks with a hold
        ("next", "<u4"),  # position + 1 in the pool's list of arenas with free slots
        ("prev", "<u4"),
        ("open", "<u4"),  # on that list
        ("draining", "<u4"),  # being emptied: takes no new block
    ]
)
POOL = np.dtype(
    [
        ("slot_bytes", "<u8"),
        ("oldest", "<u4"),
        ("newest", "<u4"),
        ("open", "<u4"),
        ("blocks", "<u4"),
        ("listed", "<u4"),
        ("pad", "<u4"),
    ]
)


class Tables(NamedTuple):
    """Everything of one store that the functions below share."""

    blocks: Rows
    slots: Rows
    arenas: Rows
    pools: Rows
    census: U4  # blocks by namespace, doomed ones included
    book: U8


class Index(NamedTuple):
    """One tenant's index."""

    heads: U4
    shape: U8


# Relisting a block that became a leaf looks this far from either end for its place; beyond, order is approximate.
_RELIST_STEPS: Final = 256
_AHEAD: Final = 32

_GRANTED: Final = int(Grant.GRANTED)
_KNOWN: Final = int(Grant.KNOWN)
_PENDING: Final = int(Grant.PENDING)
_NO_PARENT: Final = int(Grant.NO_PARENT)
_BUSY: Final = int(Grant.BUSY)


def compiled(function: F) -> F:
    """numba's njit with its cache on disk, and with the function's type kept for mypy."""
    jitted: F = njit(cache=True)(function)
    return jitted


_V0 = np.uint64(0x736F6D6570736575)
_V1 = np.uint64(0x646F72616E646F6D)
_V2 = np.uint64(0x6C7967656E657261)
_V3 = np.uint64(0x7465646279746573)
_13, _16, _17, _21, _32 = (np.uint64(n) for n in (13, 16, 17, 21, 32))
_51, _48, _47, _43 = (np.uint64(n) for n in (51, 48, 47, 43))
_TAIL = np.uint64(40 << 56)  # SipHash ends with the message length: 32 + 8 bytes
_FINAL = np.uint64(0xFF)


# -- index ------------------------------------------------------------------------------------------------------


@compiled
def _round(a: Number, b: Number, c: Number, d: Number) -> Number:
    a += b
    b = ((b << _13) | (b >> _51)) ^ a
    a = (a << _32) | (a >> _32)
    c += d
    d = ((d << _16) | (d >> _48)) ^ c
    a += d
    d = ((d << _21) | (d >> _43)) ^ a
    c += b
    b = ((b << _17) | (b >> _47)) ^ c
    c = (c << _32) | (c >> _32)
    return a, b, c, d


@compiled
def siphash(seed0: Number, seed1: Number, w0: Number, w1: Number, w2: Number, w3: Number, w4: Number) -> Number:
    """SipHash-1-3 of five words (Aumasson and Bernstein, 2012)."""
    a, b, c, d = seed0 ^ _V0, seed1 ^ _V1, seed0 ^ _V2, seed1 ^ _V3
    for word in (w0, w1, w2, w3, w4, _TAIL):
        d ^= word
        a, b, c, d = _round(a, b, c, d)
        a ^= word
    c ^= _FINAL
    a, b, c, d = _round(a, b, c, d)
    a, b, c, d = _round(a, b, c, d)
    a, b, c, d = _round(a, b, c, d)
    return a ^ b ^ c ^ d


@compiled
def _bucket(ix: Index, namespace: Number, k0: Number, k1: Number, k2: Number, k3: Number) -> Number:
    hashed = siphash(ix.shape[3], ix.shape[4], k0, k1, k2, k3, np.uint64(namespace))
    buckets = ix.shape[0]
    bucket = hashed & (buckets - np.uint64(1))
    if bucket < ix.shape[1]:  # already split: one bit more decides
        bucket = hashed & ((buckets << np.uint64(1)) - np.uint64(1))
    return np.int64(bucket)


@compiled
def _walk(rows: Rows, block: Number, namespace: Number, keys: U8, at: Number) -> Number:
    """The row of a key along its bucket's chain, or 0."""
    k0, k1, k2, k3 = keys[at], keys[at + 1], keys[at + 2], keys[at + 3]
    block = np.int64(block)
    while block:
        row = rows[block]
        key = row["key"]
        if key[0] == k0 and key[1] == k1 and key[2] == k2 and key[3] == k3 and row["namespace"] == namespace:
            return block
        block = np.int64(row["chain"])
    return 0


@compiled
def _find(t: Tables, ix: Index, namespace: Number, keys: U8, at: Number) -> Number:
    bucket = _bucket(ix, namespace, keys[at], keys[at + 1], keys[at + 2], keys[at + 3])
    return _walk(t.blocks, ix.heads[bucket], namespace, keys, at)


@compiled
def _bucket_of(t: Tables, ix: Index, block: Number) -> Number:
    key = t.blocks[block]["key"]
    return _bucket(ix, t.blocks[block]["namespace"], key[0], key[1], key[2], key[3])


@compiled
def _split(t: Tables, ix: Index) -> None:
    """Share the next bucket in turn with its twin one level up."""
    old = np.int64(ix.shape[1])
    block = np.int64(ix.heads[old])
    ix.heads[old] = 0
    ix.shape[1] += np.uint64(1)
    while block:
        following = np.int64(t.blocks[block]["chain"])
        bucket = _bucket_of(t, ix, block)
        t.blocks[block]["chain"] = ix.heads[bucket]
        ix.heads[bucket] = block
        block = following
    if ix.shape[1] == ix.shape[0]:
        ix.shape[0] <<= np.uint64(1)
        ix.shape[1] = np.uint64(0)


@compiled
def _insert(t: Tables, ix: Index, block: Number) -> None:
    ix.shape[2] += np.uint64(1)
    if 2 * ix.shape[2] > ix.shape[0] + ix.shape[1] and np.int64(ix.shape[0] + ix.shape[1]) < ix.heads.size:
        _split(t, ix)
    bucket = _bucket_of(t, ix, block)
    t.blocks[block]["chain"] = ix.heads[bucket]
    ix.heads[bucket] = block


@compiled
def _remove(t: Tables, ix: Index, block: Number) -> None:
    bucket = _bucket_of(t, ix, block)
    here = np.int64(ix.heads[bucket])
    if here == block:
        ix.heads[bucket] = t.blocks[block]["chain"]
    else:
        while np.int64(t.blocks[here]["chain"]) != block:
            here = np.int64(t.blocks[here]["chain"])
        t.blocks[here]["chain"] = t.blocks[block]["chain"]
    ix.shape[2] -= np.uint64(1)


# -- leaf list --------------------------------------------------------------------------------------------------


@compiled
def _position(t: Tables, block: Number) -> Number:
    return np.int64(t.blocks[block]["slot"]) >> np.int64(t.book[3])


@compiled
def _pool(t: Tables, block: Number) -> Number:
    return np.int64(t.arenas[_position(t, block)]["pool"]) - 1


@compiled
def _unlist(t: Tables, block: Number) -> None:
    row = t.blocks[block]
    if not row["flags"] & LISTED:
        return
    pool = t.pools[_pool(t, block)]
    older, newer = row["older"], row["newer"]
    if older:
        t.blocks[older]["newer"] = newer
    else:
        pool["oldest"] = newer
    if newer:
        t.blocks[newer]["older"] = older
    else:
        pool["newest"] = older
    row["flags"] &= ~LISTED
    row["older"] = 0
    row["newer"] = 0
    pool["listed"] -= np.uint32(1)


@compiled
def _list_after(t: Tables, block: Number, older: Number) -> None:
    """Put a block on its pool's leaf list just newer than `older` (0: as the oldest)."""
    pool = t.pools[_pool(t, block)]
    row = t.blocks[block]
    newer = np.int64(t.blocks[older]["newer"]) if older else np.int64(pool["oldest"])
    row["older"] = older
    row["newer"] = newer
    if older:
        t.blocks[older]["newer"] = block
    else:
        pool["oldest"] = block
    if newer:
        t.blocks[newer]["older"] = block
    else:
        pool["newest"] = block
    row["flags"] |= LISTED
    pool["listed"] += np.uint32(1)


@compiled
def _list(t: Tables, block: Number) -> None:
    """Put an evictable block where its last touch belongs. From both ends at once: most belong near one."""
    row = t.blocks[block]
    if row["flags"] or row["state"] != RESIDENT or row["holds"]:
        return
    pool = t.pools[_pool(t, block)]
    touched = row["touched"]
    below, above = np.int64(pool["newest"]), np.int64(pool["oldest"])
    for _ in range(_RELIST_STEPS):
        if not below or t.blocks[below]["touched"] <= touched:
            break
        if t.blocks[above]["touched"] > touched:
            below = np.int64(t.blocks[above]["older"])
            break
        below = np.int64(t.blocks[below]["older"])
        above = np.int64(t.blocks[above]["newer"])
    _list_after(t, block, below)


@compiled
def _touch(t: Tables, block: Number, now: Number) -> None:
    t.blocks[block]["touched"] = now
    t.arenas[_position(t, block)]["touched"] = now
    if t.blocks[block]["flags"] & LISTED:
        _unlist(t, block)
        _list(t, block)


# -- slots ------------------------------------------------------------------------------------------------------


@compiled
def _open_arena(t: Tables, position: Number) -> None:
    arena = t.arenas[position]
    if arena["open"]:
        return
    pool = t.pools[np.int64(arena["pool"]) - 1]
    arena["open"] = 1
    arena["prev"] = 0
    arena["next"] = pool["open"]
    if pool["open"]:
        t.arenas[np.int64(pool["open"]) - 1]["prev"] = position + 1
    pool["open"] = position + 1


@compiled
def close_arena(t: Tables, position: Number) -> None:
    """Take an arena off its pool's list: no new block goes there."""
    arena = t.arenas[position]
    if not arena["open"]:
        return
    pool = t.pools[np.int64(arena["pool"]) - 1]
    if arena["prev"]:
        t.arenas[np.int64(arena["prev"]) - 1]["next"] = arena["next"]
    else:
        pool["open"] = arena["next"]
    if arena["next"]:
        t.arenas[np.int64(arena["next"]) - 1]["prev"] = arena["prev"]
    arena["open"] = 0
    arena["next"] = 0
    arena["prev"] = 0


@compiled
def assign_arena(t: Tables, position: Number, arena_id: Number, pool: Number, slots: Number, now: Number) -> None:
    """Give a new, empty arena at `position` to a pool."""
    arena = t.arenas[position]
    arena["id"] = arena_id
    arena["pool"] = pool + 1
    arena["slots"] = slots
    arena["free"] = 0
    arena["untouched"] = 0
    arena["used"] = 0
    arena["held"] = 0
    arena["touched"] = now
    arena["lease_until_ns"] = 0
    arena["open"] = 0
    arena["draining"] = 0
    _open_arena(t, position)


@compiled
def _take_slot(t: Tables, pool: Number) -> Number:
    """A free slot of the pool, or -1."""
    position = np.int64(t.pools[pool]["open"]) - 1
    if position < 0:
        return -1
    arena = t.arenas[position]
    if arena["free"]:
        slot = np.int64(arena["free"]) - 1
        arena["free"] = t.slots[slot]["next_free"]
    else:
        slot = (position << np.int64(t.book[3])) + np.int64(arena["untouched"])
        arena["untouched"] += np.uint32(1)
    arena["used"] += np.uint32(1)
    if not arena["free"] and arena["untouched"] == arena["slots"]:
        close_arena(t, position)
    return slot


@compiled
def _free_block(t: Tables, block: Number) -> None:
    """Return a row and its slot. The block is out of index, tree and list."""
    row = t.blocks[block]
    slot = np.int64(row["slot"])
    position = _position(t, block)
    arena = t.arenas[position]
    t.slots[slot]["block"] = 0
    t.slots[slot]["next_free"] = arena["free"]
    arena["free"] = slot + 1
    arena["used"] -= np.uint32(1)
    t.pools[_pool(t, block)]["blocks"] -= np.uint32(1)
    t.census[row["namespace"]] -= np.uint32(1)
    row["state"] = FREE
    row["chain"] = t.book[0]
    t.book[0] = np.uint64(block)
    t.book[2] -= np.uint64(1)


@compiled
def _take_row(t: Tables) -> Number:
    block = np.int64(t.book[0])
    if block:
        t.book[0] = np.uint64(t.blocks[block]["chain"])
    elif np.int64(t.book[1]) < t.blocks.size:
        block = np.int64(t.book[1])
        t.book[1] += np.uint64(1)
    else:
        return 0
    t.book[2] += np.uint64(1)
    return block


@compiled
def _reopen(t: Tables, position: Number) -> None:
    arena = t.arenas[position]
    if not arena["draining"]:
        _open_arena(t, position)


@compiled
def _hold(t: Tables, block: Number) -> None:
    row = t.blocks[block]
    if row["holds"] == 0:
        t.arenas[_position(t, block)]["held"] += np.uint32(1)
        _unlist(t, block)
    row["holds"] += np.uint32(1)


@compiled
def _unhold(t: Tables, block: Number) -> None:
    """End one hold. A doomed block without holds is freed, and then no longer keeps its parent."""
    while block:
        row = t.blocks[block]
        row["holds"] -= np.uint32(1)
        if row["holds"]:
            return
        position = _position(t, block)
        t.arenas[position]["held"] -= np.uint32(1)
        if row["state"] != DOOMED:
            _list(t, block)
            return
        kept = np.int64(row["parent"]) if row["flags"] & KEEPS else 0
        _free_block(t, block)
        _reopen(t, position)
        block = kept


# -- prefix tree ------------------------------------------------------------------------------------------------


@compiled
def _adopt(t: Tables, parent: Number, block: Number) -> None:
    row = t.blocks[block]
    first = t.blocks[parent]["first_child"] if parent else np.uint32(0)
    row["parent"] = parent
    row["prev_sibling"] = 0
    row["next_sibling"] = first
    if first:
        t.blocks[first]["prev_sibling"] = block
    if parent:
        _unlist(t, parent)
        t.blocks[parent]["first_child"] = block
        t.blocks[parent]["flags"] |= PARENT


@compiled
def _unlink(t: Tables, block: Number) -> Number:
    """Take a block from among its parent's children, to whom its last touch passes. Returns the parent."""
    row = t.blocks[block]
    parent = np.int64(row["parent"])
    if parent:
        above = t.blocks[parent]
        if row["prev_sibling"]:
            t.blocks[row["prev_sibling"]]["next_sibling"] = row["next_sibling"]
        else:
            above["first_child"] = row["next_sibling"]
        if row["next_sibling"]:
            t.blocks[row["next_sibling"]]["prev_sibling"] = row["prev_sibling"]
        above["touched"] = max(above["touched"], row["touched"])
        if not above["first_child"]:
            above["flags"] &= ~PARENT
    row["prev_sibling"] = 0
    row["next_sibling"] = 0
    return parent


@compiled
def _cut(t: Tables, ix: Index, block: Number) -> None:
    """Take a block out of index, list and tree: it never hits again. Its children stay with it, it keeps its parent."""
    _hold(t, block)  # the sweep's
    _remove(t, ix, block)
    parent = _unlink(t, block)
    t.blocks[block]["state"] = DOOMED
    if parent:
        _hold(t, parent)
        t.blocks[block]["flags"] |= KEEPS


@compiled
def begin_sweep(t: Tables, ix: Index, block: Number) -> None:
    """Cut a block off with all that continues it; `sweep` then frees it and what hangs below."""
    _cut(t, ix, block)


@compiled
def sweep(t: Tables, ix: Index, top: Number, steps: Number) -> tuple[Number, Number, Number]:
    """Go on with a sweep for up to `steps` steps. Returns (block to go on with or 0, steps left, blocks dropped).

    Cut blocks wait on a stack through `next_sibling`, which they no longer need; so every step is short however
    deep or wide the subtree is, and others may change it in between.
    """
    dropped = 0
    while top and steps > 0:
        steps -= 1
        child = np.int64(t.blocks[top]["first_child"])
        if child:
            _cut(t, ix, child)
            t.blocks[child]["next_sibling"] = top
            top = child
        else:
            below = np.int64(t.blocks[top]["next_sibling"])
            t.blocks[top]["next_sibling"] = 0
            _unhold(t, top)
            top = below
            dropped += 1
    return top, steps, dropped


# -- verbs ------------------------------------------------------------------------------------------------------


@compiled
def find_run(
    rows: Rows, ix: Index, namespace: Number, keys: U8, at: Number, count: Number, run: U4
) -> tuple[Number, Number]:
    """Rows of the resident lead run of a chain into `run`; then the first block after it if it is being written.

    The first key alone, since a miss mostly ends there. Then `_AHEAD` at a time: all buckets, all heads, all rows, so
    that the cache misses of each overlap.
    """
    begin, end = 0, min(1, count)
    while begin < count:
        for i in range(begin, end):
            k = at + 4 * i
            run[i] = _bucket(ix, namespace, keys[k], keys[k + 1], keys[k + 2], keys[k + 3])
        for i in range(begin, end):
            run[i] = ix.heads[run[i]]
        for i in range(begin, end):
            block = _walk(rows, run[i], namespace, keys, at + 4 * i)
            if not block or rows[block]["state"] != RESIDENT:
                return i, block
            run[i] = block
        begin, end = end, min(end + _AHEAD, count)
    return count, 0


@compiled
def find_one(t: Tables, ix: Index, namespace: Number, keys: U8, at: Number) -> Number:
    """The row of one key, resident or being written; 0 if absent."""
    return _find(t, ix, namespace, keys, at)


@compiled
def pending_run(t: Tables, ix: Index, namespace: Number, keys: U8, at: Number, count: Number, start: Number) -> Number:
    """How many blocks from `start` on are being written, or are resident behind one that is."""
    for i in range(start, count):
        if not _find(t, ix, namespace, keys, at + 4 * i):
            return i - start
    return count - start


@compiled
def lease_run(
    t: Tables, run: U4, count: Number, now: Number, until_ns: Number, out: U4, out_at: Number, given: U1, ends: U4
) -> tuple[Number, Number]:
    """Hold `count` found blocks until `until_ns` and write their (arena, slot) to `out`.

    `ends` receives the blocks that are held: the last of each stretch in which every block continues the one before.
    Returns how many those are, and how many blocks lie in arenas whose position is not marked in `given`.
    """
    shift = np.int64(t.book[3])
    mask = (1 << shift) - 1
    until = np.uint64(until_ns)
    held, fresh, last = 0, 0, np.int64(-1)
    arena_id = np.uint32(0)
    for i in range(count):
        slot = np.int64(t.blocks[run[i]]["slot"])
        position = slot >> shift
        if position != last:
            arena = t.arenas[position]
            arena["touched"] = now
            arena["lease_until_ns"] = max(arena["lease_until_ns"], until)
            arena_id = arena["id"]
            last = position
        fresh += 1 - given[position]
        out[out_at + 2 * i] = arena_id
        out[out_at + 2 * i + 1] = slot & mask
        if i == count - 1 or t.blocks[run[i + 1]]["parent"] != run[i]:
            row = t.blocks[run[i]]
            _hold(t, np.int64(run[i]))
            row["touched"] = now
            row["lease_until_ns"] = max(row["lease_until_ns"], until)
            ends[held] = run[i]
            held += 1
    return held, fresh


# The next three are the hot path's way in. They take arrays one by one: numba looks at the type of every argument of
# every call, and taking tuples apart costs it another microsecond.


@compiled
def match_run(
    rows: Rows, heads: U4, shape: U8, namespace: Number, keys: U8, at: Number, count: Number, run: U4
) -> tuple[Number, Number]:
    """`find_run` for MATCH."""
    return find_run(rows, Index(heads, shape), namespace, keys, at, count, run)


@compiled
def find_and_lease(
    rows: Rows, slots: Rows, arenas: Rows, pools: Rows, census: U4, book: U8, heads: U4, shape: U8,
    namespace: Number, keys: U8, at: Number, count: Number, patient: Number,
    now: Number, until_ns: Number, run: U4, out: U4, out_at: Number, given: U1, ends: U4,
) -> tuple[Number, Number, Number]:  # fmt: skip
    """`find_run` and `lease_run`. Returns (blocks leased, blocks held, blocks in arenas not given).

    (-1, that block, 0), and nothing leased, where the run ends at a block that session `patient` is writing.
    """
    found, stop = find_run(rows, Index(heads, shape), namespace, keys, at, count, run)
    if stop and rows[stop]["writer"] == patient:
        return -1, stop, 0
    t = Tables(rows, slots, arenas, pools, census, book)
    held, fresh = lease_run(t, run, found, now, until_ns, out, out_at, given, ends)
    return found, held, fresh


@compiled
def end_lease(rows: Rows, slots: Rows, arenas: Rows, pools: Rows, census: U4, book: U8, ends: U4, now: Number) -> None:
    """`release_run`."""
    release_run(Tables(rows, slots, arenas, pools, census, book), ends, now)


@compiled
def renew_run(t: Tables, run: U4, until_ns: Number) -> None:
    """Hold leased blocks longer."""
    for i in range(run.size):
        row = t.blocks[run[i]]
        row["lease_until_ns"] = max(row["lease_until_ns"], until_ns)


@compiled
def release_run(t: Tables, run: U4, now: Number) -> None:
    """End the holds of a lease. A block counts as used until it is released."""
    for i in range(run.size - 1, -1, -1):
        block = np.int64(run[i])
        t.blocks[block]["touched"] = now
        _unhold(t, block)


@compiled
def _evict(t: Tables, ix: Index, pool: Number) -> bool:
    """Drop the pool's oldest leaf; False if it has none."""
    block = np.int64(t.pools[pool]["oldest"])
    if not block:
        return False
    _unlist(t, block)
    _remove(t, ix, block)
    parent = _unlink(t, block)
    position = _position(t, block)
    _free_block(t, block)
    _reopen(t, position)
    if parent:
        _list(t, parent)
    return True


@compiled
def reserve_run(
    t: Tables, ix: Index, pool: Number, namespace: Number, keys: U8, at: Number, count: Number, start: Number,
    previous: Number, rooted: bool, spans: Number, may_evict: bool, writer: Number, now: Number, grants: U4, run: U4,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """Answer keys `start..count` of a chain: KNOWN, PENDING, or a new WRITING block while `spans` last.

    `previous` is the row before key `start` (0 with `rooted`: the chain begins there). Stops early where the pool
    needs room that only the caller can make. Returns (keys answered up to, row before that, spans left, evicted).
    """
    evicted = 0
    for i in range(start, count):
        block = _find(t, ix, namespace, keys, at + 4 * i)
        if block:
            grants[i] = _KNOWN if t.blocks[block]["state"] == RESIDENT else _PENDING
            _touch(t, block, now)
            previous = block
            rooted = True
            continue
        if not rooted:
            grants[i] = _NO_PARENT
            continue
        if spans == 0:
            grants[i] = _BUSY
            continue
        if previous:
            _hold(t, previous)  # or it could be the leaf that is evicted for its own child
        slot = _take_slot(t, pool)
        while slot < 0 and may_evict and _evict(t, ix, pool):
            evicted += 1
            slot = _take_slot(t, pool)
        block = _take_row(t) if slot >= 0 else 0
        if previous:
            _unhold(t, previous)
        if slot < 0:
            return i, previous, spans, evicted
        _write_row(t, block, slot, namespace, keys, at + 4 * i, writer, now)
        _insert(t, ix, block)
        _adopt(t, previous, block)
        t.pools[pool]["blocks"] += np.uint32(1)
        t.census[namespace] += np.uint32(1)
        grants[i] = _GRANTED
        run[i] = block
        previous = block
        spans -= 1
    return count, previous, spans, evicted


@compiled
def _write_row(
    t: Tables,
    block: Number,
    slot: Number,
    namespace: Number,
    keys: U8,
    at: Number,
    writer: Number,
    now: Number,
) -> None:
    row = t.blocks[block]
    for word in range(4):
        row["key"][word] = keys[at + word]
    row["lease_until_ns"] = 0
    row["touched"] = now
    row["checksum"] = 0
    row["namespace"] = namespace
    row["slot"] = slot
    row["first_child"] = 0
    row["older"] = 0
    row["newer"] = 0
    row["flags"] = 0
    row["holds"] = 0
    row["writer"] = writer
    row["state"] = WRITING
    t.slots[slot]["block"] = block
    t.arenas[_position(t, block)]["touched"] = now
    _hold(t, block)  # the ticket's, then its copy's


@compiled
def publish(t: Tables, block: Number, checksum: Number, now: Number) -> bool:
    """End a copy: the block becomes resident unless it was dropped meanwhile. State is written last."""
    row = t.blocks[block]
    alive: bool = row["state"] == WRITING
    if alive:
        row["checksum"] = checksum
        row["touched"] = now
        row["writer"] = 0
        row["state"] = RESIDENT
    _unhold(t, block)
    return alive


@compiled
def end_hold(t: Tables, block: Number) -> None:
    """End one hold of a block that was dropped."""
    _unhold(t, block)


@compiled
def locate(t: Tables, block: Number) -> tuple[Number, Number]:
    """Arena position and slot within the arena of a block."""
    shift = np.int64(t.book[3])
    slot = np.int64(t.blocks[block]["slot"])
    return slot >> shift, slot & ((1 << shift) - 1)


@compiled
def next_in_arena(t: Tables, position: Number, start: Number, stop: Number, wanted: U4) -> Number:
    """First slot in `start..stop` of an arena whose block is in the index and of a `wanted` namespace; -1 if none."""
    shift = np.int64(t.book[3])
    for i in range(start, min(stop, np.int64(t.arenas[position]["untouched"]))):
        block = np.int64(t.slots[(position << shift) + i]["block"])
        if block and t.blocks[block]["state"] != DOOMED and wanted[t.blocks[block]["namespace"]]:
            return i
    return -1


@compiled
def count_subtree(t: Tables, top: Number, here: Number, steps: Number, counts: U8) -> Number:
    """Walk a subtree depth first for up to `steps` steps; where to go on, or 0 at its end. Begin with `here` = `top`.

    Adds to `counts`: blocks, bytes, leased, pending. Where to go on is negative on the way up from a block. That block
    is held between calls, so that neither it nor what lies above it is evicted; the walk ends early at a block that was
    dropped meanwhile.
    """
    block, climbing = abs(here), here < 0
    if block != top:
        dropped = t.blocks[block]["state"] == DOOMED
        _unhold(t, block)
        if dropped:
            return 0
    while steps > 0:
        steps -= 1
        row = t.blocks[block]
        if row["state"] == DOOMED:
            return 0
        if not climbing:
            _count(t, block, counts)
        if not climbing and row["first_child"]:
            block = np.int64(row["first_child"])
        elif block == top:
            return 0
        elif row["next_sibling"]:
            block, climbing = np.int64(row["next_sibling"]), False
        else:
            block, climbing = np.int64(row["parent"]), True
            if block == top or not block:
                return 0
    _hold(t, block)
    return -block if climbing else block


@compiled
def count_arena(t: Tables, position: Number, start: Number, stop: Number, wanted: U4, counts: U8) -> None:
    """Add the blocks of `wanted` namespaces in slots `start..stop` of an arena to `counts`, as `count_subtree` does."""
    at = next_in_arena(t, position, start, stop, wanted)
    while at >= 0:
        block = np.int64(t.slots[(position << np.int64(t.book[3])) + at]["block"])
        _count(t, block, counts)
        at = next_in_arena(t, position, at + 1, stop, wanted)


@compiled
def _count(t: Tables, block: Number, counts: U8) -> None:
    row = t.blocks[block]
    counts[0] += np.uint64(1)
    counts[1] += t.pools[_pool(t, block)]["slot_bytes"]
    if row["state"] == WRITING:
        counts[3] += np.uint64(1)
    elif row["holds"]:
        counts[2] += np.uint64(1)


@compiled
def least_valuable(t: Tables, wanted: U4, now: Number, or_held: Number) -> Number:
    """The least recently touched arena among those whose pool is marked in `wanted`; or -1.

    Those that hold nothing leased or in flight go first, and among them those without a lease that could still be
    running: draining the others may have to wait. `or_held`: if there is none of these, any.
    """
    best, best_rank = -1, 3 if or_held else 2
    for position in range(t.arenas.size):
        arena = t.arenas[position]
        if not arena["pool"] or not wanted[np.int64(arena["pool"]) - 1]:
            continue
        rank = 2 if arena["held"] else 1 if arena["lease_until_ns"] >= now else 0
        if rank < best_rank or (rank == best_rank and best >= 0 and arena["touched"] < t.arenas[best]["touched"]):
            best, best_rank = position, rank
    return best
