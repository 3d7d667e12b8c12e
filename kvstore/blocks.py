"""The block table and everything that walks it: index, prefix tree, leaf list, slots.

Compiled with numba because a LEASE of 100 keys may cost 45 us in all. One file, since numba's cache on disk notices
a changed source file only by the functions in it. All functions run on the owner thread and never raise.

    Tables
    blocks  one row of 128 bytes a block; row 0 is nobody, so that 0 can mean "none" everywhere
    slots   one row a slot: which block lies there, or the next free slot
    arenas  one row a position: a memfd in DRAM, or a segment on disk, that serves one pool; its free slots
    pools   one row a (tenant, slot size) of either tier: its leaf lists, its rule, and its arenas with free slots
    ranks   what a leaf list is ordered by, one a block
    ghosts  what is remembered of blocks that were evicted, in sets of eight
    book    free block rows, first never used row, rows in use, log2 of slot numbers an arena, next generation, places
            on disk that wait to be erased, first position on disk, position of limbo, places in use on disk, dropped
            blocks whose write is running, evictions so far, time of the last touch

    Places
    A slot number is `position << book[SHIFT]` plus the slot in its arena; positions of DRAM come first, those of disk
    from book[ON_DISK] on, so one number says where a block lies and every function below serves both tiers. A row has
    two: `slot`, where the block is read from, and `disk`, its place on disk or 0. Of a block that lies on disk alone
    both are the same. The last position, limbo, is where dropped blocks lie whose place on disk was taken from them.

    Index, one a tenant: linear hashing. `heads[bucket]` starts a chain of rows through `blocks.chain`; every
    insert splits at most one bucket, so that growing never stalls, and there are up to two buckets a block.
    `shape` = [buckets, split, entries, seed, seed].
    SipHash-1-3 under a secret seed keeps a client from choosing keys that share a bucket.

    Life of a block
                    reserve             publish                    evict / drop
         FREE ---------------> WRITING ----------> RESIDENT --------------------------> FREE
           ^                      | drop               | drop while held    (all states)
           |                      v                    v
           +------------------- DOOMED <---------------+        out of the index, slot still in use
              last hold ends
                       evict, with a place on disk                  lease                    read, verified
           RESIDENT -------------------------------> DISK -----------------------> LOADING -----------------> RESIDENT
           restart with kept memory: KEPT, in DRAM and not verified yet -- lease or in the background ------> RESIDENT

A lease holds the deepest block of its run and no other: a resident child protects its ancestors, and a block that
is cut off while something still hangs on it keeps its parent (KEEPS) until it is freed itself. So LEASE and RELEASE
hold one row, not a hundred, and what is deleted while leased stays readable from the root down.

`holds` counts leases, a ticket or running copy, a read or write of disk, a sweep, and cut-off children. A block is
evictable when it has no hold and, in DRAM, no child there and no child at all unless it lies on disk too; on disk, no
child. Exactly then it is on a leaf list of its pool; but one that is being verified keeps its place there, and is
passed over: all of a former life are verified, and in a long list they would not find their places again. A block's
last touch and its uses pass to its parent when it goes. Eviction from DRAM leaves a block that has a place on disk
there; eviction from disk frees it.

Who is evicted is for the pool's rule to say. A pool has 128 leaf lists, its queues. A rule puts a block in one of them
and gives it a rank there, mostly the time of its last touch; the leaf with the least `rank + bonus of its queue` goes
first. So a rule is a few lines, and choosing a victim looks at the heads of the queues that hold something, however
many blocks there are. S3-FIFO, ARC and DENSITY choose between the heads by what else they know.

`seal` binds a row's key, parent, place and checksum together, so that a successor that finds this table after a crash
knows a row that is whole.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numba import njit

from kvproto.errors import Grant
from kvproto.limits import POOLS
from kvstore.tier.format import UNREAD

F = TypeVar("F", bound=Callable[..., Any])
Number: TypeAlias = Any  # an int64 or a field's own type in compiled code, a Python number at its edge
U1 = np.ndarray[tuple[int], np.dtype[np.uint8]]
U4 = np.ndarray[tuple[int], np.dtype[np.uint32]]
U8 = np.ndarray[tuple[int], np.dtype[np.uint64]]
F8 = np.ndarray[tuple[int], np.dtype[np.float64]]
Rows = np.ndarray[tuple[int], np.dtype[np.void]]

FREE: Final = 0
WRITING: Final = 1
RESIDENT: Final = 2
DOOMED: Final = 3
DISK: Final = 4  # on disk alone
LOADING: Final = 5  # on disk, and on its way to a slot in DRAM
KEPT: Final = 6  # in DRAM since before a restart, and not verified yet
ADOPTING: Final = 7  # found at start; neither in an index nor on a list yet
LIVE: Final = (WRITING, RESIDENT, DISK, LOADING, KEPT)

# Two cache lines; LEASE walks only the first.
BLOCK = np.dtype(
    [
        ("key", "<u8", (4,)),
        ("touched", "<u8"),
        ("slot", "<u4"),
        ("chain", "<u4"),  # next row in the bucket, or next free row
        ("parent", "<u4"),
        ("cost", "<u2"),  # of computing it, see `seconds_of_cost`; 0: nobody knows
        ("uses", "u1"),  # requests that it served, the one that stored it included; HINT_BITS: what is said of its next
        ("queue", "u1"),  # of its pool; NO_QUEUE: in none
        ("holds", "<u4"),
        ("namespace", "<u2"),
        ("state", "u1"),
        ("flags", "u1"),  # LISTED and the like
        ("checksum", "<u8"),
        ("lease_until_ns", "<u8"),
        ("next_sibling", "<u4"),  # or, of a doomed block, the next one of its sweep
        ("prev_sibling", "<u4"),
        ("older", "<u4"),
        ("newer", "<u4"),
        ("writer", "<u4"),  # session that holds the ticket
        ("disk", "<u4"),  # place on disk, 0: none
        ("dram_children", "<u4"),  # children that are, or will be, in DRAM
        ("first_child", "<u4"),
        ("generation", "<u8"),  # of its bytes; never given twice
        ("seal", "<u8"),
    ]
)
LISTED: Final = np.uint8(1)  # on its pool's leaf list
PARENT: Final = np.uint8(2)  # has children
KEEPS: Final = np.uint8(4)  # doomed, and holds its parent until it is freed itself
SAVING: Final = np.uint8(8)  # a write to its place on disk is running
QUEUED: Final = np.uint8(16)  # waits for its turn to be written
DURABLE: Final = np.uint8(32)  # synced, and in the index on disk
VERIFYING: Final = np.uint8(64)  # KEPT, and somebody is looking: held, and still listed if nobody else holds it
DONE, HELD, IN_FLIGHT, AGAIN = range(4)  # how far `retire` got
NOBODY: Final = (1 << 32) - 1  # in `slots.block`: no block, and not free: to be erased, or quarantined
# Words of `book`
(
    FREE_ROWS, UNUSED_ROW, ROWS, SHIFT, GENERATION, TO_ERASE, ON_DISK, LIMBO, DISK_USED, DOOMED_SAVING, TURN,
    NOW, BOOK_WORDS,
) = range(13)  # fmt: skip
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
        ("draining", "<u4"),  # being emptied, or not to be written: takes no new block
    ]
)
QUEUES: Final = 128
USES_MAX: Final = 31
HINT_BITS: Final = 5  # a hint is in the bits of `uses` from this one on
NO_QUEUE: Final = 255
# Rules. kvstore/policy.py says what each does and where it comes from.
LRU, SECOND_TOUCH, PGDSF, S3FIFO, ARC, LFU, DENSITY = range(7)
POOL = np.dtype(
    [
        ("slot_bytes", "<u8"),
        ("open", "<u4"),
        ("blocks", "<u4"),
        ("listed", "<u4"),
        ("rule", "<u4"),
        ("filled", "<u8", (QUEUES // 64,)),  # a bit for each queue that lists something
        ("clock", "<f8"),  # PGDSF: worth of what was evicted last; ARC: how many blocks queue 0 should have
        ("ghosts", "<f8", (2,)),  # ARC: about how many of queues 0 and 1 are remembered
        ("bonus", "<f8", (QUEUES,)),  # DENSITY: mean cost of a block, in seconds
        ("limit", "<f8"),  # DENSITY: up to which worth `chosen` gives up its heads, `left` of them
        ("chosen", "<u2"),
        ("left", "<u2"),
        ("moving", "<u4"),  # blocks of it may still lie where its former rule wanted them; see kvstore/policies.py
        ("news", "<u4"),  # DENSITY: what was learned since it was last halved
        ("turns", "<u4"),  # DENSITY: evictions since conclusions were drawn
        ("oldest", "<u4", (QUEUES,)),
        ("newest", "<u4", (QUEUES,)),
        ("members", "<u4", (QUEUES,)),  # blocks in a queue, leaves or not
    ]
)
# What is remembered of an evicted block. Rules that bound it remember up to four times as many as a pool holds; sets of
# eight do not fill evenly, so there is room for six times as many.
GHOST = np.dtype(
    [("print", "<u4"), ("turn", "<u4"), ("touched", "<u4"), ("pool", "<u2"), ("uses", "u1"), ("queue", "u1")]
)
# What DENSITY knows of each queue of a pool, by age: two bins an octave, from a quarter of a second on.
AGES: Final = 40
REUSE = np.dtype(
    [
        ("again", "<f4", (QUEUES, AGES)),  # blocks that were used again at that age
        ("gone", "<f4", (QUEUES, AGES)),  # blocks that nobody asked for up to that age, when they were forgotten
        ("index", "<f4", (QUEUES, AGES)),  # uses a second that a block of that age promises
    ]
)
GHOST_WAYS: Final = 8


class Tables(NamedTuple):
    """Everything of one store that the functions below share."""

    blocks: Rows
    slots: Rows
    arenas: Rows
    pools: Rows
    census: U4  # blocks by namespace, doomed ones included
    book: U8
    ranks: F8
    ghosts: Rows
    reuse: Rows


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
    return np.int64(t.blocks[block]["slot"]) >> np.int64(t.book[SHIFT])


@compiled
def _pool(t: Tables, block: Number) -> Number:
    return np.int64(t.arenas[_position(t, block)]["pool"]) - 1


@compiled
def _unlist(t: Tables, block: Number) -> None:
    row = t.blocks[block]
    if not row["flags"] & LISTED:
        return
    number, queue = _pool(t, block), row["queue"]
    pool = t.pools[number]
    older, newer = row["older"], row["newer"]
    if older:
        t.blocks[older]["newer"] = newer
    else:
        pool["oldest"][queue] = newer
    if newer:
        t.blocks[newer]["older"] = older
    else:
        pool["newest"][queue] = older
    if not older and not newer:
        pool["filled"][queue >> 6] &= ~(np.uint64(1) << np.uint64(queue & 63))
    row["flags"] &= ~LISTED
    row["older"] = 0
    row["newer"] = 0
    pool["listed"] -= np.uint32(1)


@compiled
def _list_after(t: Tables, block: Number, older: Number) -> None:
    """Put a block on its leaf list just newer than `older` (0: as the oldest)."""
    pool = t.pools[_pool(t, block)]
    row = t.blocks[block]
    queue = row["queue"]
    newer = np.int64(t.blocks[older]["newer"]) if older else np.int64(pool["oldest"][queue])
    row["older"] = older
    row["newer"] = newer
    if older:
        t.blocks[older]["newer"] = block
    else:
        pool["oldest"][queue] = block
    if newer:
        t.blocks[newer]["older"] = block
    else:
        pool["newest"][queue] = block
    pool["filled"][queue >> 6] |= np.uint64(1) << np.uint64(queue & 63)
    row["flags"] |= LISTED
    pool["listed"] += np.uint32(1)


@compiled
def _is_leaf(t: Tables, block: Number) -> bool:
    """Could a block go, if nobody held it?"""
    row = t.blocks[block]
    if row["state"] == RESIDENT or row["state"] == KEPT:
        return row["dram_children"] == 0 and (row["disk"] != 0 or not row["flags"] & PARENT)
    return row["state"] == DISK and not row["flags"] & PARENT


@compiled
def _evictable(t: Tables, block: Number) -> bool:
    evictable: bool = t.blocks[block]["holds"] == 0 and _is_leaf(t, block)
    return evictable


@compiled
def _list(t: Tables, block: Number) -> None:
    """Put an evictable block on its leaf list."""
    if not t.blocks[block]["flags"] & LISTED and _evictable(t, block):
        _list_by_rank(t, block)


@compiled
def _list_by_rank(t: Tables, block: Number) -> None:
    """Put a block where its rank belongs. From both ends at once: most belong near one."""
    row = t.blocks[block]
    pool = t.pools[_pool(t, block)]
    rank, queue = t.ranks[block], row["queue"]
    below, above = np.int64(pool["newest"][queue]), np.int64(pool["oldest"][queue])
    for _ in range(_RELIST_STEPS):
        if not below or t.ranks[below] <= rank:
            break
        if t.ranks[above] > rank:
            below = np.int64(t.blocks[above]["older"])
            break
        below = np.int64(t.blocks[below]["older"])
        above = np.int64(t.blocks[above]["newer"])
    _list_after(t, block, below)


# -- rules ------------------------------------------------------------------------------------------------------

_COST_ONE: Final = 40 * 1024  # the code of one second
PGDSF_LEAST: Final = 2.0**-34  # uses x seconds a byte: what is worth less is in queue 0
PGDSF_CLASSES_AN_OCTAVE: Final = 2.0
_SMALL: Final = 10  # S3-FIFO: one of so many blocks is in the small queue
HINTS: Final = 8  # levels of what is said, "nothing" (0) included
_CLASSES: Final = 32  # of DENSITY where nothing is said,
_HINTED_CLASSES: Final = 10  # and for each thing that is
_USUAL_GAP_NS: Final = 30 * 10**9
BY_USES: Final = 0.2
BY_COST: Final = 0.5
_ARENA_SAMPLES: Final = 64  # slots of an arena
_SAMPLES: Final = 4096  # of the blocks there are, and of those that are remembered
_GROUPS: Final = 16  # of classes
_PRIOR: Final = 20.0  # blocks whose fate is taken as known beforehand, of a group;
_CLASS_PRIOR: Final = 400.0  # of a class: a conversation's blocks have one fate, so these are few conversations
_PRIOR_CHANCE: Final = 0.02  # the same in every bin: then the oldest goes first;
_PRIOR_FIRST: Final = 0.06  # but the first bin is twice as long as the next one
_IN_A_ROW: Final = 16  # evictions from one queue before all are looked at again, at most,
_A_ROW_SHIFT: Final = 12  # and one for each 4,096 blocks of the pool: to a small one a few evictions are a long time
_REINDEX: Final = 2048  # evictions between two looks at what was learned; fewer where a pool turns over sooner, but
_REINDEX_LEAST: Final = 256  # a look takes 0.2 ms
_MEMORY: Final = 1 << 17  # blocks after whose fate what was learned before counts half
_GHOST_TICK: Final = np.uint64(26)  # of a ghost's time: 67 ms
_ROWS_A_STEP: Final = 8  # to look at one is so much cheaper than to have it go by another rule,
_STEPS_A_LEAF: Final = 4  # and to list one so much dearer
_ROTATIONS: Final = 64  # how many blocks may be given another turn for one that goes
# Where another rule than DENSITY holds, blocks of which something is said are in queues above it, one for each level;
# 0 of these stands for all others. How much sooner such a block is taken to be used, until more is known,
SAID: Final = QUEUES - HINTS
_SAID_PRIOR: Final = (1.0, 8.0, 8.0, 8.0, 4.0, 2.0, 1.0, 0.125)
_SAID_CASES: Final = 50.0  # uses to be expected of others after which it is half known
_SAID_MOST: Final = 16.0  # and how much at most
_SAID_USES_NS: Final = 6.0 * 10**9  # for each doubling of its uses it counts as said so much later


@compiled
def cost_of_seconds(seconds: Number) -> Number:
    """The code of a cost: 1024 steps an octave, which is 0.07 % a step, from 1e-12 s to 4 months."""
    if not seconds > 1e-12:
        return 0
    return min(65535, max(1, int(np.log2(seconds) * 1024.0) + _COST_ONE))


@compiled
def seconds_of_cost(cost: Number) -> Number:
    """`cost_of_seconds` backwards."""
    return 2.0 ** ((np.float64(cost) - _COST_ONE) / 1024.0)


@compiled
def _queue_for(t: Tables, block: Number, pool: Number) -> Number:
    """Where the pool's rule wants a block that was used so often and costs so much."""
    said = np.int64(t.blocks[block]["uses"]) >> HINT_BITS
    return SAID + said if said and t.pools[pool]["rule"] != DENSITY else _queue_of_rule(t, block, pool)


@compiled
def _queue_of_rule(t: Tables, block: Number, pool: Number) -> Number:
    row = t.blocks[block]
    rule = t.pools[pool]["rule"]
    if rule == LRU:
        return 0
    uses = np.int64(row["uses"]) & USES_MAX
    if rule == LFU:
        return min(SAID - 1, uses)
    if rule == PGDSF:
        cost = seconds_of_cost(row["cost"]) if row["cost"] else 1e-3
        worth = uses * cost / np.float64(t.pools[pool]["slot_bytes"])
        return max(0, min(SAID - 1, int(PGDSF_CLASSES_AN_OCTAVE * np.log2(worth / PGDSF_LEAST))))
    if rule == S3FIFO:
        return 0 if row["queue"] >= SAID else np.int64(row["queue"])
    if rule == DENSITY:
        known = _class_in(np.int64(row["queue"])) if row["queue"] != NO_QUEUE else _class_of(uses, _USUAL_GAP_NS)
        return _hinted(known, np.int64(row["uses"]) >> HINT_BITS)
    return 1 if uses > 1 else 0


@compiled
def _class_of(uses: Number, gap_ns: Number) -> Number:
    """DENSITY's classes: used once; else by how many uses there were (2, 3, to 6, to 12, to 30, more), and by how long
    before the last of them the one before was: up to 1 s, 6 s, 37 s, 4 min, longer."""
    if uses < 2:
        return 0
    gap = np.float64(gap_ns) * 1e-9
    lately = min(4, int(np.log2(gap) / 2.6) + 1) if gap > 1.0 else 0
    often = 0 if uses < 3 else 1 if uses < 4 else 2 if uses < 7 else 3 if uses < 13 else 4 if uses < 31 else 5
    return 1 + lately + 5 * often


@compiled
def _hinted(known: Number, hint: Number) -> Number:
    """DENSITY's queue of a class of which something is said: classes of uses 1, 2, 3-6 and more, and of gaps up to
    6 s, 37 s and longer, as what is said tells more than they do."""
    if not hint:
        return known
    few = 0
    if known:
        lately, often = (known - 1) % 5, (known - 1) // 5
        few = 1 + min(2, max(0, lately - 1)) + 3 * (0 if often < 1 else 1 if often < 3 else 2)
    return _CLASSES + _HINTED_CLASSES * (hint - 1) + few


@compiled
def _class_in(queue: Number) -> Number:
    """The class of a block in a queue of DENSITY; of those that `_hinted` puts together, one in the middle."""
    if queue < _CLASSES:
        return queue
    few = (queue - _CLASSES) % _HINTED_CLASSES
    if not few:
        return 0
    lately, often = (few - 1) % 3 + 1, (few - 1) // 3
    return 1 + lately + 5 * (0 if often < 1 else 2 if often < 2 else 4)


@compiled
def _since_ns(t: Tables, block: Number) -> Number:
    """How long ago DENSITY's clock of a block began: at its last touch, or when something was said of it since."""
    return np.int64(t.book[NOW]) - np.int64(t.ranks[block])


@compiled
def _age_bin(age_ns: Number) -> Number:
    age = np.float64(age_ns) * 4e-9
    return min(AGES - 1, int(2.0 * np.log2(age))) if age > 1.0 else 0


@compiled
def _learn(t: Tables, pool: Number, queue: Number, age_ns: Number, again: bool) -> None:
    """A block of a queue was used again at that age, or nobody has asked for it so long that it is forgotten."""
    if t.pools[pool]["rule"] == DENSITY and queue < QUEUES:
        if again:
            t.reuse[pool]["again"][queue, _age_bin(age_ns)] += np.float32(1.0)
        else:
            t.reuse[pool]["gone"][queue, _age_bin(age_ns)] += np.float32(1.0)
        t.pools[pool]["news"] += np.uint32(1)


@compiled
def _group_of(queue: Number) -> Number:
    """DENSITY's classes that are taken for alike until more is known: of as many uses, or of which the same is said."""
    if queue < _CLASSES:
        return (queue + 4) // 5
    return min(_GROUPS - 1, 8 + (queue - _CLASSES) // _HINTED_CLASSES)


@compiled
def _index(t: Tables, number: Number) -> None:
    """Draw conclusions from what became of blocks: what one promises, by queue and age."""
    pool, reuse = t.pools[number], t.reuse[number]
    chance, known = _chances(t, number)
    usual = np.zeros(AGES, np.float32)
    _promise(chance[QUEUES], usual)
    for queue in range(QUEUES):
        if known[queue]:
            _promise(chance[queue], reuse["index"][queue])
        else:
            reuse["index"][queue] = usual
    if pool["news"] > _MEMORY:
        for queue in range(QUEUES):
            for age in range(AGES):
                reuse["again"][queue, age] *= np.float32(0.5)
                reuse["gone"][queue, age] *= np.float32(0.5)
        pool["news"] = 0


@compiled
def _chances(t: Tables, number: Number) -> tuple[Number, Number]:
    """The chance of a use in each bin of age, for who reaches it: by queue, then of all, then by group of queues; and
    of which of them anything is known.

    It is the share that was used again in it (Kaplan and Meier's estimate: who is still waiting, here or as a ghost,
    counts as far as it got). Where little is known it is drawn towards that of the group, there towards that of all.
    """
    reuse, rows = t.reuse[number], QUEUES + 1 + _GROUPS
    hits = np.zeros((rows, AGES), np.float64)
    waits = np.zeros((rows, AGES), np.float64)
    _count_waiting(t, number, waits)
    for queue in range(QUEUES):
        group = QUEUES + 1 + _group_of(queue)
        for age in range(AGES):
            hits[queue, age] = reuse["again"][queue, age]
            waits[queue, age] += reuse["gone"][queue, age]
            for above in (QUEUES, group):
                hits[above, age] += hits[queue, age]
                waits[above, age] += waits[queue, age]
    chance = np.full((rows, AGES), _PRIOR_CHANCE)
    chance[QUEUES, 0] = _PRIOR_FIRST
    known = np.zeros(rows, np.uint8)
    for i in range(rows):
        row = (QUEUES + i) % rows  # all together first, then groups
        above = QUEUES if row >= QUEUES else QUEUES + 1 + _group_of(row)
        prior = _PRIOR if row >= QUEUES else _CLASS_PRIOR
        reached = 0.0
        for age in range(AGES - 1, -1, -1):
            reached += hits[row, age] + waits[row, age]
            known[row] |= reached > 0.0
            usual = prior * chance[above, age]
            chance[row, age] = (hits[row, age] + usual) / (reached - waits[row, age] / 2 + prior)
    return chance, known


@compiled
def _promise(chance: Number, index: Number) -> None:
    """Gittins' index of the next use, by age: the best ratio of uses to time that waiting from that age on, and giving
    up later, can have."""
    for age in range(AGES):
        left, uses, time, best = 1.0, 0.0, 0.0, 0.0
        for later in range(age, AGES):
            width = 0.25 * (2.0 ** ((later + 1) / 2) - (2.0 ** (later / 2) if later else 0.0))
            uses += left * chance[later]
            time += left * width * (1.0 - chance[later] / 2)
            best = max(best, uses / time)
            left *= 1.0 - chance[later]
        index[age] = best


@compiled
def _count_waiting(t: Tables, number: Number, waits: Number) -> None:
    """How old those are that wait for their next use, here and as ghosts; from a sample."""
    rows, ghosts = np.int64(t.book[UNUSED_ROW]), t.ghosts.size
    step: Number = max(1, rows // _SAMPLES)
    for block in range(1 + np.int64(t.book[TURN]) % step, rows, step):
        row = t.blocks[block]
        if row["state"] in LIVE and row["queue"] != NO_QUEUE and _pool(t, block) == number:
            waits[row["queue"], _age_bin(_since_ns(t, block))] += step
    step = max(1, ghosts // _SAMPLES)
    for i in range(np.int64(t.book[TURN]) % step, ghosts, step):
        ghost = t.ghosts[i]
        if ghost["print"] and ghost["pool"] == number and ghost["queue"] < QUEUES:
            waits[ghost["queue"], _age_bin(_ghost_age_ns(t, ghost))] += step


@compiled
def _victim_by_density(t: Tables, number: Number) -> tuple[Number, Number]:
    """The head whose next use promises least, and how many seconds of computing a second that is.

    Of equals the one that was touched first. Once found, its queue goes on to give up its heads while they are worth
    less than the second best was: looking at all heads costs a cache miss each.
    """
    pool = t.pools[number]
    head = np.int64(pool["oldest"][pool["chosen"]])
    if pool["left"] and head:
        worth = _worth(t, pool, number, np.int64(pool["chosen"]), head)
        if worth < pool["limit"]:
            pool["left"] -= np.uint32(1)
            return head, worth
    best, best_worth, second = np.int64(0), np.inf, np.inf
    for word in range(QUEUES // 64):
        filled, queue = pool["filled"][word], 64 * word
        while filled:
            if filled & np.uint64(1):
                head = np.int64(pool["oldest"][queue])
                worth = _worth(t, pool, number, queue, head)
                older = worth == best_worth and t.blocks[head]["touched"] < t.blocks[best]["touched"]
                if worth < best_worth or older:
                    best, best_worth, second = head, worth, best_worth
                    pool["chosen"] = queue
                elif worth < second:
                    second = worth
            filled >>= np.uint64(1)
            queue += 1
    pool["limit"] = second
    pool["left"] = min(_IN_A_ROW, np.int64(pool["blocks"]) >> _A_ROW_SHIFT)
    return best, best_worth


@compiled
def _worth(t: Tables, pool: Number, number: Number, queue: Number, head: Number) -> Number:
    """What the head of a queue promises: uses a second, for so many uses and so many seconds of computing.

    Promises are estimates, and of those taken for least many are wrong. So what is certain counts too: how often the
    block was used; and a high cost, which the depths of long contexts have, for less. The exponents are from replays.
    """
    row, usual = t.blocks[head], pool["clock"]
    uses: Number = max(1, np.int64(row["uses"]) & USES_MAX)
    cost = usual + BY_COST * ((np.float64(row["cost"]) or usual) - usual)  # all logarithms
    return t.reuse[number]["index"][queue, _age_bin(_since_ns(t, head))] * uses**BY_USES * seconds_of_cost(cost)


@compiled
def _join(t: Tables, block: Number, queue: Number) -> None:
    row = t.blocks[block]
    row["queue"] = queue
    t.pools[_pool(t, block)]["members"][queue] += np.uint32(1)


@compiled
def _part(t: Tables, block: Number) -> None:
    """Take a block out of its queue, before it leaves its pool. It is not listed."""
    row = t.blocks[block]
    if row["queue"] != NO_QUEUE:
        t.pools[_pool(t, block)]["members"][row["queue"]] -= np.uint32(1)
        row["queue"] = NO_QUEUE


@compiled
def _requeue(t: Tables, block: Number, queue: Number) -> None:
    """Put a block in another queue of its pool."""
    row = t.blocks[block]
    if row["queue"] == queue:
        return
    listed = row["flags"] & LISTED
    _unlist(t, block)
    _part(t, block)
    _join(t, block, queue)
    if listed:
        _list(t, block)


@compiled
def _come(t: Tables, block: Number) -> None:
    """A block that has a history is in this pool from now on."""
    pool = _pool(t, block)
    queue = _queue_for(t, block, pool)
    t.ranks[block] = _rank_by_history(t, block, pool, queue)
    _join(t, block, queue)


@compiled
def _rank_by_history(t: Tables, block: Number, pool: Number, queue: Number) -> Number:
    by_clock = t.pools[pool]["rule"] == PGDSF and queue < SAID
    return t.pools[pool]["clock"] if by_clock else np.float64(t.blocks[block]["touched"])


@compiled
def _refresh(t: Tables, block: Number, now: Number) -> None:
    """A block is touched. It is not listed, or is listed anew."""
    row = t.blocks[block]
    row["touched"] = now
    t.book[NOW] = now
    pool = t.pools[_pool(t, block)]
    if _is_above(pool, row["queue"]):
        pass  # its rank is when something was said of it
    elif pool["rule"] == PGDSF:
        t.ranks[block] = pool["clock"]
    elif pool["rule"] != S3FIFO:
        t.ranks[block] = np.float64(now)
    if row["flags"] & LISTED:
        _unlist(t, block)
        _list(t, block)


@compiled
def _use(t: Tables, block: Number, now: Number) -> None:
    """A request is served by a block. What was said of that use has had its time."""
    row = t.blocks[block]
    if row["queue"] == NO_QUEUE:
        return
    pool = _pool(t, block)
    gap_ns = np.int64(now) - np.int64(row["touched"])
    row["uses"] = min(USES_MAX, (np.int64(row["uses"]) & USES_MAX) + 1)
    if t.pools[pool]["rule"] == DENSITY:
        _learn(t, pool, np.int64(row["queue"]), np.int64(now) - np.int64(t.ranks[block]), True)
        _requeue(t, block, _class_of(np.int64(row["uses"]), gap_ns))
    else:
        _count_stay(t, block, pool, np.uint64(now), 1.0)
        queue = _queue_for(t, block, pool)
        if row["queue"] >= SAID:
            t.ranks[block] = _rank_by_history(t, block, pool, queue)
        _requeue(t, block, queue)
    _refresh(t, block, now)


@compiled
def _pass_up(t: Tables, block: Number, parent: Number) -> None:
    """Who used a block used the one before it: that is known of it from now on, since the block goes."""
    row, above = t.blocks[block], t.blocks[parent]
    above["touched"] = max(above["touched"], row["touched"])
    above["uses"] = max(np.int64(above["uses"]) & USES_MAX, np.int64(row["uses"]) & USES_MAX) | (
        np.int64(above["uses"]) & ~USES_MAX
    )
    if above["queue"] == NO_QUEUE or row["queue"] == NO_QUEUE:
        return
    pool = _pool(t, parent)
    if pool == _pool(t, block):
        queue = _queue_for(t, parent, pool)
        if t.pools[pool]["moving"]:  # rank and queue of the two may be of different rules
            t.ranks[parent] = _rank_by_history(t, parent, pool, queue)
        elif not _is_above(t.pools[pool], queue) and not _is_above(t.pools[pool], row["queue"]):
            if t.pools[pool]["rule"] == S3FIFO:
                queue = max(queue, np.int64(row["queue"]))
            t.ranks[parent] = max(t.ranks[parent], t.ranks[block])
        _requeue(t, parent, queue)


@compiled
def _victim(t: Tables, number: Number) -> Number:
    """The block that a pool's rule would give up first; 0 if none is evictable. What is being verified does not go: it
    is off its list until that is over."""
    block = _first_to_go(t, number)
    while t.blocks[block]["flags"] & VERIFYING:
        _unlist(t, block)
        block = _first_to_go(t, number)
    return block


@compiled
def _first_to_go(t: Tables, number: Number) -> Number:
    """The listed block that a pool's rule would give up first; 0 if none is. Until all are where that rule wants them,
    ranks are of two kinds: of the heads it is the one that was not touched longest."""
    pool = t.pools[number]
    if not pool["listed"]:
        return 0
    if pool["rule"] == DENSITY:
        return _victim_by_density(t, number)[0]
    first = _first_of_rule(t, pool)
    if pool["filled"][SAID >> 6] >> np.uint64(SAID & 63):
        return _first_of_all(t, number, first)
    return first


@compiled
def _first_of_rule(t: Tables, pool: Number) -> Number:
    """The same of those of which nothing is said."""
    # Another rule may have had it until now, and not all blocks been moved to queues 0 and 1 yet.
    if pool["rule"] == S3FIFO and (pool["oldest"][0] or pool["oldest"][1]):
        return _victim_of_s3fifo(t, pool)
    if pool["rule"] == ARC and (pool["oldest"][0] or pool["oldest"][1]):
        first = np.int64(pool["oldest"][0])
        if first and (pool["members"][0] > pool["clock"] or not pool["oldest"][1]):
            return first
        return np.int64(pool["oldest"][1])
    best, best_rank = np.int64(0), np.inf
    for word in range(QUEUES // 64):
        filled, queue = pool["filled"][word], 64 * word
        while filled and queue < SAID:
            if filled & np.uint64(1):
                head = np.int64(pool["oldest"][queue])
                rank = t.ranks[head] + pool["bonus"][queue]
                if pool["moving"]:
                    rank = np.float64(t.blocks[head]["touched"])
                if rank < best_rank:
                    best, best_rank = head, rank
            filled >>= np.uint64(1)
            queue += 1
    return best


@compiled
def _is_above(pool: Number, queue: Number) -> bool:
    """Is a queue of those of which something is said, above the pool's rule?"""
    above: bool = pool["rule"] != DENSITY and queue != NO_QUEUE and queue >= SAID
    return above


@compiled
def _first_of_all(t: Tables, number: Number, first: Number) -> Number:
    """Who goes first: the one that the rule gives up, or one of which something is said.

    By age, and time passes the more slowly for a block the more of a use what is said of it means. So it is above the
    rule, but never for good, and no higher than words have turned out to be worth.
    """
    now = np.int64(t.book[NOW])
    best, best_age = first, np.float64(now - np.int64(t.blocks[first]["touched"])) if first else -np.inf
    for level in range(1, HINTS):
        head = np.int64(t.pools[number]["oldest"][SAID + level])
        if head:
            age = np.float64(now - np.int64(t.ranks[head])) / _said_worth(t, number, level)
            if age > best_age:
                best, best_age = head, age
    return best


@compiled
def _said_worth(t: Tables, number: Number, level: Number) -> Number:
    """How many times as soon a block is used of which that is said as one of which nothing is."""
    again, stays = t.reuse[number]["again"], t.reuse[number]["gone"]
    usual = np.float64(again[SAID, 0]) / max(np.float64(stays[SAID, 0]), 1e-3)
    uses = np.float64(again[SAID + level, 0]) + _SAID_CASES * _SAID_PRIOR[level]
    return max(1.0 / _SAID_MOST, min(_SAID_MOST, uses / (usual * np.float64(stays[SAID + level, 0]) + _SAID_CASES)))


@compiled
def _count_stay(t: Tables, block: Number, pool: Number, now: Number, uses: Number) -> None:
    """A block that a rule other than DENSITY has leaves its queue, used or not: how long was it there?"""
    row = t.blocks[block]
    above = row["queue"] >= SAID
    at: Number = np.int64(row["queue"]) if above else SAID
    began = np.int64(t.ranks[block]) if above else np.int64(row["touched"])
    _count_time(t, pool, at, max(0, np.int64(now) - began), uses)


@compiled
def _count_time(t: Tables, pool: Number, at: Number, time_ns: Number, uses: Number) -> None:
    """So many uses in that time of a block of which that (`at` - SAID) was said."""
    reuse = t.reuse[pool]
    reuse["again"][at, 0] += np.float32(uses)
    reuse["gone"][at, 0] += np.float32(time_ns * 1e-9)
    t.pools[pool]["news"] += np.uint32(1)
    if t.pools[pool]["news"] > _MEMORY:
        t.pools[pool]["news"] = 0
        for queue in range(SAID, QUEUES):
            reuse["again"][queue, 0] *= np.float32(0.5)
            reuse["gone"][queue, 0] *= np.float32(0.5)


@compiled
def _victim_of_s3fifo(t: Tables, pool: Number) -> Number:
    """Small queue first while it has more than its tenth; who was used there goes to the main queue, who was used in
    the main queue goes round again (Yang et al., 2023)."""
    for _ in range(_ROTATIONS):
        small, main = np.int64(pool["oldest"][0]), np.int64(pool["oldest"][1])
        total = np.int64(pool["members"][0]) + np.int64(pool["members"][1])
        from_small = small != 0 and (main == 0 or np.int64(pool["members"][0]) * _SMALL >= total)
        head = small if from_small else main
        row = t.blocks[head]
        uses = np.int64(row["uses"]) & USES_MAX
        if from_small and uses > 2:
            row["uses"] = 1
        elif not from_small and uses > 1:
            row["uses"] = min(3, uses - 1)
        else:
            return head
        last = np.int64(pool["newest"][1])
        _unlist(t, head)
        _part(t, head)
        _join(t, head, 1)
        t.ranks[head] = max(t.ranks[head], t.ranks[last]) if last else t.ranks[head]
        _list(t, head)
    return np.int64(pool["oldest"][0]) if pool["oldest"][0] else np.int64(pool["oldest"][1])


@compiled
def _ghost_set(t: Tables, ix: Index, block: Number, pool: Number) -> tuple[Number, Number]:
    """Where a block of a pool would be remembered, and its fingerprint."""
    key = t.blocks[block]["key"]
    tweak = np.uint64(t.blocks[block]["namespace"]) | (np.uint64(pool + 1) << _32)
    hashed = siphash(ix.shape[3], ix.shape[4], key[0], key[1], key[2], key[3], tweak)
    sets = np.uint64(t.ghosts.size // GHOST_WAYS)
    fingerprint = np.uint32(hashed >> _32) | np.uint32(1)
    return np.int64(hashed % sets) * GHOST_WAYS, fingerprint


@compiled
def _remember(t: Tables, ix: Index, block: Number, pool: Number) -> None:
    """A block is evicted for good: in place of the one of its set that was evicted longest ago."""
    if not t.ghosts.size:
        return
    at, fingerprint = _ghost_set(t, ix, block, pool)
    turn = np.uint32(t.book[TURN])
    best, best_age = at, np.int64(-1)
    for i in range(at, at + GHOST_WAYS):
        ghost = t.ghosts[i]
        if ghost["print"] == fingerprint or not ghost["print"]:
            best = i
            break
        age = np.int64(np.uint32(turn - ghost["turn"]))
        if age > best_age:
            best, best_age = i, age
    row, ghost = t.blocks[block], t.ghosts[best]
    if ghost["print"] and ghost["print"] != fingerprint and ghost["pool"] < POOLS:
        _learn(t, np.int64(ghost["pool"]), np.int64(ghost["queue"]), _ghost_age_ns(t, ghost), False)
    ghost["print"] = fingerprint
    ghost["turn"] = turn
    began = np.uint64(t.ranks[block]) if t.pools[pool]["rule"] == DENSITY else row["touched"]
    ghost["touched"] = np.uint32(began >> _GHOST_TICK)
    ghost["pool"] = pool
    ghost["uses"] = np.int64(row["uses"]) & USES_MAX
    ghost["queue"] = row["queue"]
    if t.pools[pool]["rule"] == ARC:
        _count_ghost(t.pools[pool], min(1, np.int64(row["queue"])), 1.0)


@compiled
def _ghost_age_ns(t: Tables, ghost: Number) -> Number:
    """How long ago it was touched; right for nine years."""
    ticks = np.uint32(np.uint32(t.book[NOW] >> _GHOST_TICK) - ghost["touched"])
    return np.int64(ticks) << np.int64(_GHOST_TICK)


@compiled
def _count_ghost(pool: Number, queue: Number, count: Number) -> None:
    """ARC remembers as many blocks as it has: more of one queue means that fewer of both are left."""
    pool["ghosts"][queue] = max(0.0, pool["ghosts"][queue] + count)
    most = np.float64(pool["members"][0]) + np.float64(pool["members"][1])
    total = pool["ghosts"][0] + pool["ghosts"][1]
    if total > most:
        pool["ghosts"][0] *= most / total
        pool["ghosts"][1] *= most / total


@compiled
def _enter(t: Tables, ix: Index, block: Number, pool: Number, cost: Number, now: Number) -> None:
    """A block is new in its pool, or was evicted so recently that it is remembered."""
    row = t.blocks[block]
    row["uses"] = 1
    row["cost"] = cost
    row["queue"] = NO_QUEUE
    ghost = _recall(t, ix, block, pool)
    rule = t.pools[pool]["rule"]
    if ghost >= 0:
        row["uses"] = min(USES_MAX, np.int64(t.ghosts[ghost]["uses"]) + 1)
    queue = _queue_for(t, block, pool)
    if ghost >= 0 and rule == S3FIFO:
        queue = 1
        row["uses"] = 1
    elif ghost >= 0 and rule == ARC:
        _adapt(t.pools[pool], np.int64(t.ghosts[ghost]["queue"]))
        queue = 1
    if ghost >= 0 and rule != DENSITY:  # or what is given up at once would never be seen to have been wanted
        above = t.ghosts[ghost]["queue"] >= SAID
        at: Number = np.int64(t.ghosts[ghost]["queue"]) if above else SAID
        _count_time(t, pool, at, _ghost_age_ns(t, t.ghosts[ghost]), 1.0)
    elif ghost >= 0:
        gap_ns = _ghost_age_ns(t, t.ghosts[ghost])
        _learn(t, pool, np.int64(t.ghosts[ghost]["queue"]), gap_ns, True)
        queue = _class_of(np.int64(row["uses"]), gap_ns)
    if rule == DENSITY and cost:  # the usual cost, for blocks of which nobody knows it
        usual = t.pools[pool]["clock"]
        t.pools[pool]["clock"] = usual + (np.float64(cost) - usual) / 256.0 if usual else np.float64(cost)
    if ghost >= 0:
        t.ghosts[ghost]["print"] = 0
    t.ranks[block] = t.pools[pool]["clock"] if rule == PGDSF else np.float64(now)
    _join(t, block, queue)


@compiled
def _recall(t: Tables, ix: Index, block: Number, pool: Number) -> Number:
    """Where a block is remembered; -1 if it is not. By rules with a list of bounded length, not longer than that."""
    if not t.ghosts.size:
        return -1
    at, fingerprint = _ghost_set(t, ix, block, pool)
    for i in range(at, at + GHOST_WAYS):
        if t.ghosts[i]["print"] == fingerprint:
            age = np.int64(np.uint32(np.uint32(t.book[TURN]) - t.ghosts[i]["turn"]))
            rule = t.pools[pool]["rule"]
            most = np.int64(t.pools[pool]["blocks"])
            most *= 4 if rule == SECOND_TOUCH else 1
            return -1 if (rule == ARC or rule == S3FIFO or rule == SECOND_TOUCH) and age > most else i
    return -1


@compiled
def _adapt(pool: Number, queue: Number) -> None:
    """ARC: a block comes back that was given up too early (Megiddo and Modha, 2003)."""
    queue = min(1, queue)
    most = np.float64(pool["members"][0]) + np.float64(pool["members"][1])
    mine, other = max(1.0, pool["ghosts"][queue]), max(1.0, pool["ghosts"][1 - queue])
    step = max(1.0, other / mine)
    pool["clock"] = min(most, pool["clock"] + step) if queue == 0 else max(0.0, pool["clock"] - step)
    _count_ghost(pool, queue, -1.0)


@compiled
def requeue_rows(
    t: Tables, start: Number, stop: Number, pool: Number, steps: Number, leaves: U4, touched: U8, found: Number
) -> tuple[Number, Number, Number]:
    """The rule of a pool has changed: have its blocks among `start..stop` go by the new one, as far as the steps last.

    Leaves are only gathered, behind the `found` that are there, for `requeue_leaves`. Returns (the row to go on with,
    steps left, leaves found).
    """
    block = start
    while block < stop and steps > 0:
        row = t.blocks[block]
        if row["state"] in LIVE and row["queue"] != NO_QUEUE and _pool(t, block) == pool:
            steps -= 1
            if row["flags"] & LISTED:
                leaves[found] = block
                touched[found] = row["touched"]
                found += 1
            else:
                _part(t, block)
                _come(t, block)
        block += 1
        steps -= block % _ROWS_A_STEP == 0
    return block, steps, found


@compiled
def requeue_leaves(
    t: Tables, pool: Number, leaves: U4, touched: U8, at: U4, ends: U4, heap: U4, last: U4, runs: Number, steps: Number
) -> tuple[Number, Number]:
    """Have leaves of a pool go by its new rule, the longest untouched first: so each comes behind the one before it,
    and none has to look for its place.

    They lie in sorted runs: what is left of one is `leaves[at:ends]`, and `heap` holds those that are not empty, by
    their first. `last`: what each queue was given last. Returns (runs left, steps left).
    """
    while runs and steps > 0:
        steps -= _STEPS_A_LEAF
        run = heap[0]
        block, when = np.int64(leaves[at[run]]), touched[at[run]]
        at[run] += np.uint32(1)
        if at[run] == ends[run]:
            runs -= 1
            heap[0] = heap[runs]
        _sink(heap, runs, touched, at)
        row = t.blocks[block]
        if row["state"] not in LIVE or row["queue"] == NO_QUEUE or _pool(t, block) != pool:
            continue  # it is gone
        listed = row["flags"] & LISTED
        _unlist(t, block)
        _part(t, block)
        _come(t, block)
        if listed and row["touched"] == when:
            _list_behind(t, block, last)
        elif listed:
            _list_by_rank(t, block)
    return runs, steps


@compiled
def _sink(heap: U4, size: Number, touched: U8, at: U4) -> None:
    """The first run of a heap has another first leaf, or is another one."""
    here, run = 0, heap[0]
    while 2 * here + 1 < size:
        child = 2 * here + 1
        if child + 1 < size and touched[at[heap[child + 1]]] < touched[at[heap[child]]]:
            child += 1
        if touched[at[run]] <= touched[at[heap[child]]]:
            break
        heap[here] = heap[child]
        here = child
    heap[here] = run


@compiled
def _list_behind(t: Tables, block: Number, last: U4) -> None:
    """List a leaf behind the one that its queue was given last, and before those of equal rank, which came since."""
    row = t.blocks[block]
    number, queue, rank = _pool(t, block), np.int64(row["queue"]), t.ranks[block]
    below, there = np.int64(last[queue]), t.blocks[last[queue]]
    last[queue] = block
    same = there["flags"] & LISTED != 0 and there["queue"] == queue and _pool(t, below) == number
    if below and not (same and t.ranks[below] <= rank):
        _list_by_rank(t, block)
        return
    for _ in range(_RELIST_STEPS):
        above = np.int64(t.blocks[below]["newer"]) if below else np.int64(t.pools[number]["oldest"][queue])
        if not above or t.ranks[above] >= rank:
            _list_after(t, block, below)
            return
        below = above
    _list_by_rank(t, block)


@compiled
def hint_run(t: Tables, ix: Index, namespace: Number, keys: U8, at: Number, count: Number, hints: U1) -> Number:
    """Note what a client expects of the next use of each block of a chain, as far as they are there. Returns how many.

    0: nothing; 1 to 7: soon to hardly ever. It is a word and no order: what DENSITY makes of it is learned from what
    became of others of whom the same was said, and from when on it was. A use ends it. No block is used again without
    those before it, so what is noted never gets sooner along the chain: the sequence of that kind that contradicts
    fewest of the hints.
    """
    steps = np.zeros((count + 1, HINTS), np.int32)  # contradictions so far, if the last level was at most this
    for i in range(count):
        least = np.int32(1 << 30)
        for level in range(1, HINTS):
            least = min(least, steps[i, level])
            steps[i + 1, level] = least + (hints[i] != 0 and hints[i] != level)
    level = 1
    for other in range(2, HINTS):
        if steps[count, other] < steps[count, level]:
            level = other
    levels = np.zeros(count, np.uint8)
    for i in range(count - 1, -1, -1):
        levels[i] = level if hints[i] else 0
        best = level
        for other in range(1, level):
            if steps[i, other] < steps[i, best]:
                best = other
        level = best
    for i in range(count):
        block = _find(t, ix, namespace, keys, at + 4 * i)
        if not block:
            return i
        _hint(t, block, np.int64(levels[i]))
    return count


@compiled
def _hint(t: Tables, block: Number, level: Number) -> None:
    """Something is said of a block's next use. What is said again counts from when it was said first."""
    row = t.blocks[block]
    if np.int64(row["uses"]) >> HINT_BITS == level:
        return
    row["uses"] = (np.int64(row["uses"]) & USES_MAX) | (level << HINT_BITS)
    if row["queue"] == NO_QUEUE:
        return
    pool = _pool(t, block)
    listed = row["flags"] & LISTED
    _unlist(t, block)
    queue = _queue_for(t, block, pool)
    if t.pools[pool]["rule"] == DENSITY:
        _learn_of_words(t, pool, np.int64(row["queue"]), queue, _age_bin(_since_ns(t, block)))
    else:  # who is said to be wanted still, was wanted: else what mostly leads to better words would be worth nothing
        wanted = level and row["queue"] >= SAID and _said_worth(t, pool, level) > 1.0
        _count_stay(t, block, pool, t.book[NOW], 1.0 if wanted else 0.0)
    _part(t, block)
    t.ranks[block] = np.float64(t.book[NOW]) if level else _rank_by_history(t, block, pool, queue)
    if _is_above(t.pools[pool], queue):
        uses: Number = max(1, np.int64(row["uses"]) & USES_MAX)
        t.ranks[block] += _SAID_USES_NS * np.log2(np.float64(uses))
    _join(t, block, queue)
    if listed:
        _list(t, block)


@compiled
def _learn_of_words(t: Tables, pool: Number, old: Number, new: Number, age: Number) -> None:
    """Something else is said of a block than so far. Where that promises more it is a part of a use: of what a use
    brings, the share that is left when waiting for it is paid at the old rate. The rest is a block of which nobody
    knows more.

    Otherwise a class that mostly leads to better ones, as that of turns under way, would look like one that leads to
    nothing. What is said at once, in the first bin, is no fate of the class before.
    """
    index = t.reuse[pool]["index"]
    if not age or not index[new, 0] > 0:
        return
    part = max(np.float32(0.0), np.float32(1.0) - max(index[old, 0], index[old, age]) / index[new, 0])
    t.reuse[pool]["again"][old, age] += part
    t.reuse[pool]["gone"][old, age] += np.float32(1.0) - part
    t.pools[pool]["news"] += np.uint32(1)


@compiled
def reindex(t: Tables, pool: Number) -> None:
    """Have DENSITY draw its conclusions now: from nothing, before the first block came."""
    _index(t, pool)


@compiled
def least_worth(t: Tables, pool: Number) -> Number:
    """What DENSITY would lose by the next eviction from a pool, by the measure of `_worth` and a byte; infinite if
    it has nothing to give up."""
    return _victim_by_density(t, pool)[1] / np.float64(t.pools[pool]["slot_bytes"])


@compiled
def arena_worth(t: Tables, position: Number) -> Number:
    """What DENSITY would lose if all of an arena went, by the same measure; from a sample of its slots."""
    arena, total = t.arenas[position], 0.0
    number, slots = np.int64(arena["pool"]) - 1, np.int64(arena["untouched"])
    pool, start = t.pools[number], np.int64(position) << np.int64(t.book[SHIFT])
    step: Number = max(1, slots // _ARENA_SAMPLES)
    for slot in range(start, start + slots, step):
        block = np.int64(t.slots[slot]["block"])
        if block and block != NOBODY and t.blocks[block]["queue"] != NO_QUEUE:
            total += step * _worth(t, pool, number, np.int64(t.blocks[block]["queue"]), block)
    return total / (np.float64(pool["slot_bytes"]) * np.float64(arena["slots"]))


@compiled
def next_victim(t: Tables, pool: Number) -> Number:
    """The block that a pool would give up first; 0 if none is evictable."""
    return _victim(t, pool)


@compiled
def _touch(t: Tables, block: Number, now: Number) -> None:
    t.arenas[_position(t, block)]["touched"] = now
    _refresh(t, block, now)


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
def reopen_arena(t: Tables, position: Number) -> None:
    """Put an arena that has room back on its pool's list."""
    arena = t.arenas[position]
    if arena["free"] or arena["untouched"] < arena["slots"]:
        _open_arena(t, position)


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
        slot = (position << np.int64(t.book[SHIFT])) + np.int64(arena["untouched"])
        arena["untouched"] += np.uint32(1)
    arena["used"] += np.uint32(1)
    if not arena["free"] and arena["untouched"] == arena["slots"]:
        close_arena(t, position)
    return slot


@compiled
def _free_slot(t: Tables, slot: Number) -> None:
    """Return a place of either tier to its arena."""
    position = slot >> np.int64(t.book[SHIFT])
    arena = t.arenas[position]
    if t.slots[slot]["block"] != NOBODY:  # those of nobody were counted off when they became so
        _count_off(t, position)
    t.slots[slot]["block"] = 0
    t.slots[slot]["next_free"] = arena["free"]
    arena["free"] = slot + 1
    arena["used"] -= np.uint32(1)
    if position >= np.int64(t.book[ON_DISK]):
        t.book[DISK_USED] -= np.uint64(1)
    if not arena["draining"]:
        _open_arena(t, position)


@compiled
def _count_off(t: Tables, position: Number) -> None:
    t.pools[np.int64(t.arenas[position]["pool"]) - 1]["blocks"] -= np.uint32(1)


@compiled
def _free_block(t: Tables, block: Number) -> None:
    """Return a row and its places. The block is out of index, tree and list."""
    row = t.blocks[block]
    slot, disk = np.int64(row["slot"]), np.int64(row["disk"])
    _part(t, block)
    if _position(t, block) != np.int64(t.book[LIMBO]):
        _free_slot(t, slot)
    if disk and disk != slot:
        _free_slot(t, disk)
    row["disk"] = 0
    t.census[row["namespace"]] -= np.uint32(1)
    row["state"] = FREE
    row["flags"] = 0  # it waits for nothing any more: what it still says of its parent is of a former use
    row["chain"] = t.book[FREE_ROWS]
    t.book[FREE_ROWS] = np.uint64(block)
    t.book[ROWS] -= np.uint64(1)


@compiled
def _take_row(t: Tables) -> Number:
    block = np.int64(t.book[FREE_ROWS])
    if block:
        t.book[FREE_ROWS] = np.uint64(t.blocks[block]["chain"])
    elif np.int64(t.book[UNUSED_ROW]) < t.blocks.size:
        block = np.int64(t.book[UNUSED_ROW])
        t.book[UNUSED_ROW] += np.uint64(1)
    else:
        return 0
    t.book[ROWS] += np.uint64(1)
    return block


@compiled
def _hold(t: Tables, block: Number) -> None:
    _unlist(t, block)
    _hold_where_listed(t, block)


@compiled
def _hold_where_listed(t: Tables, block: Number) -> None:
    row = t.blocks[block]
    if row["holds"] == 0:
        t.arenas[_position(t, block)]["held"] += np.uint32(1)
    row["holds"] += np.uint32(1)


@compiled
def _unhold(t: Tables, block: Number) -> None:
    """End one hold. A doomed block without holds is freed, and then no longer keeps its parent."""
    while block:
        row = t.blocks[block]
        row["holds"] -= np.uint32(1)
        if row["holds"]:
            return
        t.arenas[_position(t, block)]["held"] -= np.uint32(1)
        if row["state"] != DOOMED:
            _list(t, block)
            return
        kept = np.int64(row["parent"]) if row["flags"] & KEEPS else 0
        _free_block(t, block)
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
        t.blocks[parent]["first_child"] = block
        t.blocks[parent]["flags"] |= PARENT
        if row["state"] != DISK:
            t.blocks[parent]["dram_children"] += np.uint32(1)
        if not _is_leaf(t, parent):  # else it stays where it is listed: it might not find its place again
            _unlist(t, parent)


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
        _pass_up(t, block, parent)
        if not above["first_child"]:
            above["flags"] &= ~PARENT
        if row["state"] != DISK:
            above["dram_children"] -= np.uint32(1)
    row["prev_sibling"] = 0
    row["next_sibling"] = 0
    return parent


@compiled
def _cut(t: Tables, ix: Index, block: Number) -> None:
    """Take a block out of index, list and tree: it never hits again. Its children stay with it, it keeps its parent."""
    _hold(t, block)  # the sweep's
    _remove(t, ix, block)
    parent = _unlink(t, block)
    _part(t, block)
    t.blocks[block]["state"] = DOOMED
    if not t.blocks[block]["flags"] & SAVING:
        give_to_erase(t, block)
    elif t.blocks[block]["disk"]:  # the write that is running would land after the erasure
        t.book[DOOMED_SAVING] += np.uint64(1)
    if parent:
        _hold(t, parent)
        t.blocks[block]["flags"] |= KEEPS


@compiled
def _move(t: Tables, block: Number, slot: Number) -> None:
    """A block is read from another place from now on."""
    held = t.blocks[block]["holds"] != 0
    if held:
        t.arenas[_position(t, block)]["held"] -= np.uint32(1)
    t.blocks[block]["slot"] = slot
    if held:
        t.arenas[_position(t, block)]["held"] += np.uint32(1)


@compiled
def give_to_erase(t: Tables, block: Number) -> None:
    """Take a dropped block's place on disk from it: the header there must go before anybody is told."""
    row = t.blocks[block]
    disk = np.int64(row["disk"])
    if not disk:
        return
    if np.int64(row["slot"]) == disk:
        _move(t, block, np.int64(t.book[LIMBO]) << np.int64(t.book[SHIFT]))
    row["disk"] = 0
    row["flags"] &= ~(SAVING | DURABLE)
    _push_to_erase(t, disk)


@compiled
def _push_to_erase(t: Tables, slot: Number) -> None:
    """A place on disk belongs to nobody, and is not free before its header is gone: nothing may bring it back."""
    _count_off(t, slot >> np.int64(t.book[SHIFT]))
    t.slots[slot]["block"] = NOBODY
    erase_place(t, slot)


@compiled
def erase_place(t: Tables, slot: Number) -> None:
    """Have the header at a place that is nobody's erased."""
    t.slots[slot]["next_free"] = np.uint32(t.book[TO_ERASE])
    t.book[TO_ERASE] = np.uint64(slot)


@compiled
def next_to_erase(t: Tables) -> Number:
    """Take a place that waits to be erased; 0 if none does."""
    slot = np.int64(t.book[TO_ERASE])
    if slot:
        t.book[TO_ERASE] = np.uint64(t.slots[slot]["next_free"])
    return slot


@compiled
def free_place(t: Tables, slot: Number) -> None:
    """A place on disk that belongs to nobody is free again."""
    _free_slot(t, slot)


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
    """Hold `count` found blocks until `until_ns` and write their (arena, slot) to `out`. `use_run` then counts the use.

    `ends` receives the blocks that are held: the last of each stretch in which every block continues the one before.
    Returns how many those are, and how many blocks lie in arenas whose position is not marked in `given`.
    """
    shift = np.int64(t.book[SHIFT])
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
    rows: Rows, slots: Rows, arenas: Rows, pools: Rows, census: U4, book: U8, ranks: F8, ghosts: Rows, reuse: Rows,
    heads: U4, shape: U8, namespace: Number, keys: U8, at: Number, count: Number, patient: Number, streams: Number,
    now: Number, until_ns: Number, run: U4, out: U4, out_at: Number, given: U1, ends: U4,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """`find_run` and `lease_run`. Returns (blocks leased, blocks held, blocks in arenas not given, ends not on disk).

    Nothing is leased and (-1, that block, 0, 0) returned where the run ends at a block that session `patient` is
    writing; (-2, blocks found, 0, 0) where it `streams` and the run goes on outside DRAM.
    """
    found, stop = find_run(rows, Index(heads, shape), namespace, keys, at, count, run)
    if stop:
        if rows[stop]["state"] == WRITING:
            if rows[stop]["writer"] == patient:
                return -1, stop, 0, 0
        elif streams:
            return -2, found, 0, 0
    t = Tables(rows, slots, arenas, pools, census, book, ranks, ghosts, reuse)
    held, fresh = lease_run(t, run, found, now, until_ns, out, out_at, given, ends)
    unsaved = 0
    for i in range(held):
        unsaved += rows[ends[i]]["disk"] == 0 and not rows[ends[i]]["flags"] & QUEUED
    return found, held, fresh, unsaved


@compiled
def use_run(
    rows: Rows, slots: Rows, arenas: Rows, pools: Rows, census: U4, book: U8, ranks: F8, ghosts: Rows, reuse: Rows,
    run: U4, count: Number, ends: U4, now: Number,
) -> None:  # fmt: skip
    """Blocks are leased that `lease_run` holds by `ends`: their pool's rule hears of it. By LRU, the last touch is all
    that counts, and passes from the ends to the blocks before them."""
    t = Tables(rows, slots, arenas, pools, census, book, ranks, ghosts, reuse)
    if t.pools[_pool(t, np.int64(run[0]))]["rule"] == LRU:
        for i in range(ends.size):
            _use(t, np.int64(ends[i]), now)
    else:
        for i in range(count):
            _use(t, np.int64(run[i]), now)


@compiled
def end_lease(
    rows: Rows, slots: Rows, arenas: Rows, pools: Rows, census: U4, book: U8, ranks: F8, ghosts: Rows, reuse: Rows,
    ends: U4, now: Number,
) -> None:  # fmt: skip
    """`release_run`."""
    release_run(Tables(rows, slots, arenas, pools, census, book, ranks, ghosts, reuse), ends, now)


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
        row = t.blocks[block]
        if row["queue"] != NO_QUEUE:
            _refresh(t, block, now)
        if row["holds"] == 1:  # a successor need not withhold what was given back
            row["lease_until_ns"] = 0
        _unhold(t, block)


@compiled
def _evict(t: Tables, ix: Index, number: Number) -> bool:
    """Drop the leaf that the pool's rule gives up first; False if there is none."""
    block = _victim(t, number)
    if not block:
        return False
    row, pool = t.blocks[block], t.pools[number]
    if pool["rule"] != DENSITY:
        _count_stay(t, block, number, t.book[NOW], 0.0)
    if pool["rule"] == PGDSF and not pool["moving"] and row["queue"] < SAID:
        pool["clock"] = max(pool["clock"], t.ranks[block] + pool["bonus"][row["queue"]])
    _unlist(t, block)
    pool["turns"] += np.uint32(1)
    every: Number = max(_REINDEX_LEAST, min(_REINDEX, np.int64(pool["blocks"])))
    if pool["rule"] == DENSITY and np.int64(pool["turns"]) >= every:
        pool["turns"] = 0
        _index(t, number)
    if row["disk"] and row["state"] != DISK:
        _leave_to_disk(t, ix, block)
        return True
    t.book[TURN] += np.uint64(1)
    _remember(t, ix, block, number)
    _remove(t, ix, block)
    parent = _unlink(t, block)
    if row["state"] == DISK:
        _part(t, block)
        give_to_erase(t, block)
    _free_block(t, block)
    if parent:
        _list(t, parent)
    return True


@compiled
def _leave_to_disk(t: Tables, ix: Index, block: Number) -> None:
    """Give up a block's place in DRAM; from now on it lies on disk alone."""
    row = t.blocks[block]
    slot = np.int64(row["slot"])
    parent = np.int64(row["parent"])
    _unlist(t, block)
    if parent:
        t.blocks[parent]["dram_children"] -= np.uint32(1)
        _pass_up(t, block, parent)
    if t.pools[_pool(t, block)]["rule"] == DENSITY:  # it still waits for its next use, as far as this pool is concerned
        _remember(t, ix, block, _pool(t, block))
    _part(t, block)
    _move(t, block, np.int64(row["disk"]))
    _free_slot(t, slot)
    row["state"] = DISK
    _come(t, block)
    if parent:
        _list(t, parent)
    _list(t, block)


@compiled
def retire(t: Tables, ix: Index, top: Number, steps: Number) -> tuple[Number, Number, Number]:
    """Have a block and all that continues it leave DRAM, as if evicted: what lies on disk too stays there.

    From the leaves up, since a lease holds only the deepest block of its run. Returns (DONE, HELD, IN_FLIGHT for what
    is being read or written and will soon not be, or AGAIN without steps left; steps left; the block it got to).
    """
    block = top
    while steps > 0:
        steps -= 1
        row = t.blocks[block]
        if row["dram_children"]:
            child = np.int64(row["first_child"])
            while child and t.blocks[child]["state"] == DISK:
                child = np.int64(t.blocks[child]["next_sibling"])
                steps -= 1
            if not child:
                return HELD, steps, block
            block = child
            continue
        if row["state"] == LOADING or row["flags"] & (SAVING | VERIFYING):
            return IN_FLIGHT, steps, block
        if not _evictable(t, block) or row["state"] == DISK:
            return HELD, steps, block
        parent = np.int64(row["parent"])
        _unlist(t, block)
        if row["disk"]:
            _leave_to_disk(t, ix, block)
        else:
            _remember(t, ix, block, _pool(t, block))
            _remove(t, ix, block)
            _unlink(t, block)
            _free_block(t, block)
            if parent:
                _list(t, parent)
        if block == top:
            return DONE, steps, block
        block = parent
    return AGAIN, steps, block


@compiled
def detach_oldest(t: Tables, pool: Number, disk_pool: Number, before: Number) -> bool:
    """Forget the copy on disk of the oldest leaf of a DRAM pool that has one in `disk_pool`, if nobody has touched it
    since `before`. False if none of the oldest leaves is one."""
    block = _victim(t, pool)
    for _ in range(_RELIST_STEPS):
        if not block or t.blocks[block]["touched"] >= before:
            return False
        row = t.blocks[block]
        if row["disk"] and not row["flags"] & (SAVING | PARENT | VERIFYING):
            position = np.int64(row["disk"]) >> np.int64(t.book[SHIFT])
            if np.int64(t.arenas[position]["pool"]) - 1 == disk_pool:
                detach(t, block)
                return True
        block = np.int64(row["newer"])
    return False


@compiled
def evict(t: Tables, ix: Index, pool: Number) -> bool:
    """Drop the oldest leaf of a pool on disk, whose place is to be erased; False if it has none."""
    return _evict(t, ix, pool)


@compiled
def reserve_run(
    t: Tables, ix: Index, pool: Number, namespace: Number, keys: U8, at: Number, count: Number, start: Number,
    previous: Number, rooted: bool, spans: Number, may_evict: bool, writer: Number, now: Number, cost_s: Number,
    slope_s: Number, grants: U4, run: U4,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """Answer keys `start..count` of a chain: KNOWN, PENDING, or a new WRITING block while `spans` last.

    `previous` is the row before key `start` (0 with `rooted`: the chain begins there). Stops early where the pool
    needs room that only the caller can make. Returns (keys answered up to, row before that, spans left, evicted).
    """
    evicted = 0
    for i in range(start, count):
        block = _find(t, ix, namespace, keys, at + 4 * i)
        if block:
            grants[i] = _PENDING if t.blocks[block]["state"] == WRITING else _KNOWN
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
        if slot >= 0 and not block:  # rows are as many as places; those of dropped blocks may be short for a moment
            t.slots[slot]["block"] = NOBODY
            _free_slot(t, slot)
            slot = np.int64(-1)
            spans = 0
        if previous:
            _unhold(t, previous)
        if slot < 0:
            return i, previous, spans, evicted
        _write_row(t, block, slot, namespace, keys, at + 4 * i, writer, now)
        _enter(t, ix, block, pool, cost_of_seconds(cost_s + i * slope_s), now)
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
def access(
    t: Tables, ix: Index, pool: Number, namespace: Number, keys: U8, at: Number, count: Number, first: bool,
    may_evict: bool, now: Number, cost_s: Number, slope_s: Number, run: U4, grants: U4,
) -> tuple[Number, Number]:  # fmt: skip
    """What a request does to a pool when its lookups and stores take no time: a replay's, or a shadow's.

    Its lead run of resident blocks is used, the rest is stored at once. Returns (blocks found, blocks that are there
    now): fewer than `count` where the pool needs room that only the caller can make, who then asks again, not `first`.
    """
    found, _ = find_run(t.blocks, ix, namespace, keys, at, count, run)
    end = np.int64(run[found - 1]) if found else np.int64(0)
    if end:
        _hold(t, end)
        if first:
            for i in range(found):
                _use(t, np.int64(run[i]), now)
            t.arenas[_position(t, end)]["touched"] = now
    done, _, _, _ = reserve_run(
        t, ix, pool, namespace, keys, at, count, found, end, True, count, may_evict, np.uint32(0), now, cost_s,
        slope_s, grants, run,
    )  # fmt: skip
    for i in range(done - 1, found - 1, -1):
        publish(t, np.int64(run[i]), np.uint64(0), now)
    if end:
        _unhold(t, end)
    return found, done


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
    row["seal"] = 0
    row["generation"] = 0
    row["disk"] = 0
    row["dram_children"] = 0
    row["namespace"] = namespace
    row["slot"] = slot
    row["first_child"] = 0
    row["older"] = 0
    row["newer"] = 0
    row["queue"] = NO_QUEUE
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
        _refresh(t, block, now)
        row["writer"] = 0
        row["generation"] = t.book[GENERATION]
        t.book[GENERATION] += np.uint64(1)
        row["seal"] = seal_of(t, block)
        row["state"] = RESIDENT
    _unhold(t, block)
    return alive


@compiled
def seal_of(t: Tables, block: Number) -> Number:
    """What binds a row's parts together. Its place in DRAM is one of them."""
    row, key = t.blocks[block], t.blocks[block]["key"]
    above = t.blocks[row["parent"]]["key"]  # row 0 is all zeros
    place = np.uint64(row["slot"]) | (np.uint64(row["namespace"]) << _32)
    first = siphash(row["checksum"], row["generation"], key[0], key[1], key[2], key[3], place)
    return siphash(first, _V0, above[0], above[1], above[2], above[3], row["checksum"])


@compiled
def end_hold(t: Tables, block: Number) -> None:
    """End one hold of a block that was dropped."""
    _unhold(t, block)


@compiled
def locate(t: Tables, block: Number) -> tuple[Number, Number]:
    """Arena position and slot within the arena of a block."""
    shift = np.int64(t.book[SHIFT])
    slot = np.int64(t.blocks[block]["slot"])
    return slot >> shift, slot & ((1 << shift) - 1)


@compiled
def next_in_arena(t: Tables, position: Number, start: Number, stop: Number, wanted: U4) -> Number:
    """First slot in `start..stop` of an arena whose block is in the index, of a `wanted` namespace and read from there;
    -1 if there is none."""
    shift = np.int64(t.book[SHIFT])
    for i in range(start, min(stop, np.int64(t.arenas[position]["untouched"]))):
        slot = (position << shift) + i
        block = np.int64(t.slots[slot]["block"])
        if block == 0 or block == NOBODY:
            continue
        row = t.blocks[block]
        if np.int64(row["slot"]) == slot and row["state"] in LIVE and wanted[row["namespace"]]:
            return i
    return -1


@compiled
def next_wanted(t: Tables, start: Number, stop: Number, wanted: U4) -> Number:
    """First row in `start..stop` whose block is in the index and of a `wanted` namespace; 0 if there is none."""
    for block in range(start, stop):
        row = t.blocks[block]
        if row["state"] in LIVE and wanted[row["namespace"]]:
            return block
    return 0


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
        block = np.int64(t.slots[(position << np.int64(t.book[SHIFT])) + at]["block"])
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
def least_valuable(t: Tables, start: Number, stop: Number, wanted: U4, now: Number, or_held: Number) -> Number:
    """The least recently touched arena of positions `start..stop` among those whose pool is marked in `wanted`; or -1.

    Those that hold nothing leased or in flight go first, and among them those without a lease that could still be
    running: draining the others may have to wait. `or_held`: if there is none of these, any.
    """
    best, best_rank = -1, 3 if or_held else 2
    for position in range(start, stop):
        arena = t.arenas[position]
        if not arena["pool"] or not wanted[np.int64(arena["pool"]) - 1]:
            continue
        rank = 2 if arena["held"] else 1 if arena["lease_until_ns"] >= now else 0
        if rank < best_rank or (rank == best_rank and best >= 0 and arena["touched"] < t.arenas[best]["touched"]):
            best, best_rank = position, rank
    return best


# -- disk -------------------------------------------------------------------------------------------------------

# What a header says of a block, gathered from its row and its parent's.
DESCRIBED = np.dtype(
    [
        ("key", "<u8", (4,)),
        ("parent_key", "<u8", (4,)),
        ("generation", "<u8"),
        ("parent_generation", "<u8"),
        ("checksum", "<u8"),
        ("row", "<u4"),
        ("slot", "<u4"),
        ("disk", "<u4"),
        ("parent_disk", "<u4"),
        ("namespace", "<u2"),
        ("state", "u1"),
        ("flags", "u1"),
    ]
)


@compiled
def extend_run(
    t: Tables, ix: Index, namespace: Number, keys: U8, at: Number, count: Number, start: Number, run: U4
) -> tuple[Number, Number, Number]:
    """Go on with a run over blocks that lie on disk or are not verified. Returns (its end, how many of them lie on
    disk alone, the block after it if that is being written)."""
    on_disk = 0
    for i in range(start, count):
        block = _find(t, ix, namespace, keys, at + 4 * i)
        if not block:
            return i, on_disk, 0
        state = t.blocks[block]["state"]
        if state == WRITING:
            return i, on_disk, block
        run[i] = block
        on_disk += state == DISK or state == LOADING
    return count, on_disk, 0


@compiled
def hold_rows(t: Tables, run: U4, start: Number, stop: Number) -> None:
    """Keep these blocks where they are."""
    for i in range(start, stop):
        _hold(t, np.int64(run[i]))


@compiled
def unhold_rows(t: Tables, run: U4, start: Number, stop: Number) -> None:
    """Undo `hold_rows`."""
    for i in range(stop - 1, start - 1, -1):
        _unhold(t, np.int64(run[i]))


@compiled
def begin_loads(
    t: Tables, ix: Index, pool: Number, run: U4, start: Number, stop: Number, may_evict: bool, now: Number, todo: U4
) -> tuple[Number, Number, Number]:
    """Give the blocks of `run[start:stop]` that lie on disk alone a place in DRAM. The caller holds them all.

    Returns (how far it got, rows in `todo` that must be read or verified, evicted). Stops early where the pool needs
    room that only the caller can make.
    """
    count, evicted = 0, 0
    for i in range(start, stop):
        block = np.int64(run[i])
        row = t.blocks[block]
        if row["state"] == KEPT and not row["flags"] & VERIFYING:
            row["flags"] |= VERIFYING
            _hold_where_listed(t, block)  # the look's
        elif row["state"] == DISK:
            slot = _take_slot(t, pool)
            while slot < 0 and may_evict and _evict(t, ix, pool):
                evicted += 1
                slot = _take_slot(t, pool)
            if slot < 0:
                return i, count, evicted
            _begin_load(t, ix, pool, block, slot, now)
            _hold(t, block)  # the read's
        else:
            continue
        todo[count] = block
        count += 1
    return stop, count, evicted


@compiled
def _begin_load(t: Tables, ix: Index, pool: Number, block: Number, slot: Number, now: Number) -> None:
    row = t.blocks[block]
    t.arenas[_position(t, block)]["touched"] = now
    t.slots[slot]["block"] = block
    t.pools[pool]["blocks"] += np.uint32(1)
    _unlist(t, block)
    _part(t, block)
    _move(t, block, slot)
    _come(t, block)
    if t.pools[pool]["rule"] == DENSITY:
        ghost = _recall(t, ix, block, pool)
        if ghost >= 0:
            t.ghosts[ghost]["print"] = 0
    t.arenas[_position(t, block)]["touched"] = now
    row["state"] = LOADING
    row["seal"] = 0
    parent = np.int64(row["parent"])
    if parent:
        t.blocks[parent]["dram_children"] += np.uint32(1)
        _unlist(t, parent)
        _list(t, parent)


@compiled
def finish_load(t: Tables, block: Number, now: Number) -> bool:
    """What was read or verified is good: the block is resident, unless it was dropped meanwhile."""
    row = t.blocks[block]
    row["flags"] &= ~VERIFYING
    alive: bool = row["state"] == LOADING or row["state"] == KEPT
    if alive:
        if row["state"] == LOADING:  # who is verified in the background was not touched
            _refresh(t, block, max(row["touched"], np.uint64(now)))
        row["seal"] = seal_of(t, block)
        row["state"] = RESIDENT
    _unhold(t, block)
    return alive


@compiled
def cancel_load(t: Tables, ix: Index, block: Number, damaged: bool) -> bool:
    """What was read is no good. Back to disk if the block can be read from there another time; else it is dropped,
    with what continues it, and True returned: the caller sweeps."""
    row = t.blocks[block]
    row["flags"] &= ~VERIFYING
    alive = row["state"] == LOADING or row["state"] == KEPT
    dropped = False
    if alive and row["disk"] and not (damaged and row["state"] == LOADING):
        _leave_to_disk(t, ix, block)
    elif alive:
        begin_sweep(t, ix, block)
        dropped = True
    _unhold(t, block)
    return dropped


@compiled
def hold_ends(t: Tables, run: U4, count: Number, until_ns: Number, ends: U4) -> Number:
    """Hold the last block of each stretch of `run[:count]`, as `lease_run` does. Returns how many those are."""
    held = 0
    for i in range(count):
        if i == count - 1 or t.blocks[run[i + 1]]["parent"] != run[i]:
            row = t.blocks[run[i]]
            _hold(t, np.int64(run[i]))
            row["lease_until_ns"] = max(row["lease_until_ns"], np.uint64(until_ns))
            ends[held] = run[i]
            held += 1
    return held


@compiled
def ready_until(t: Tables, run: U4, start: Number) -> tuple[Number, Number]:
    """From `start` on: first row of a run that is not resident, and whether it still may become so."""
    for i in range(start, run.size):
        state = t.blocks[run[i]]["state"]
        if state != RESIDENT:
            return i, state == LOADING or state == KEPT
    return run.size, False


@compiled
def gather_unsaved(t: Tables, block: Number, out: U4, out_at: Number) -> tuple[Number, bool]:
    """What a block's chain lacks on disk, from the root down, into `out` as far as it goes; marked as SAVING.

    Up to the first that is durable: then all before it is. Returns (where they end in `out`, whether all went in);
    (-1, False) if one of them is still being written by a client.
    """
    count, at = 0, block
    while at:
        row = t.blocks[at]
        if row["flags"] & DURABLE:
            break
        if row["state"] == WRITING:
            return -1, False
        count += _is_unsaved(t, at)
        at = np.int64(row["parent"])
    beyond, seen, at = max(0, count - (out.size - out_at)), 0, block
    while seen < count:
        if _is_unsaved(t, at):
            if seen >= beyond:
                out[out_at + count - 1 - seen] = at
            seen += 1
        at = np.int64(t.blocks[at]["parent"])
    for i in range(out_at, out_at + count - beyond):
        t.blocks[out[i]]["flags"] |= SAVING
    return out_at + count - beyond, beyond == 0


@compiled
def _is_unsaved(t: Tables, block: Number) -> bool:
    row = t.blocks[block]
    whole = row["state"] == RESIDENT or row["state"] == KEPT
    return whole and row["disk"] == 0 and not row["flags"] & SAVING


@compiled
def ungather(t: Tables, rows: U4, start: Number, stop: Number) -> None:
    """These will not be written after all."""
    for i in range(start, stop):
        t.blocks[rows[i]]["flags"] &= ~(SAVING | QUEUED)


@compiled
def take_places(t: Tables, pool: Number, rows: U4, start: Number, stop: Number, most: Number, now: Number) -> Number:
    """Give blocks that are to be written a place on disk each, of a pool there. Returns how far it got."""
    for i in range(start, stop):
        if np.int64(t.book[DISK_USED]) >= most:
            return i
        slot = _take_slot(t, pool)
        if slot < 0:
            return i
        block = np.int64(rows[i])
        row = t.blocks[block]
        t.slots[slot]["block"] = block
        t.pools[pool]["blocks"] += np.uint32(1)
        t.book[DISK_USED] += np.uint64(1)
        _hold(t, block)  # the write's
        row["disk"] = slot
        row["flags"] &= ~QUEUED
        t.arenas[slot >> np.int64(t.book[SHIFT])]["touched"] = now
    return stop


@compiled
def finish_save(t: Tables, block: Number, good: bool) -> bool:
    """A write has ended. Returns whether the block lies on disk now; if not, its place is to be erased."""
    row = t.blocks[block]
    row["flags"] &= ~SAVING
    good = good and row["state"] != DOOMED
    if row["state"] == DOOMED:
        t.book[DOOMED_SAVING] -= np.uint64(1)
        give_to_erase(t, block)
    elif not good:
        _push_to_erase(t, np.int64(row["disk"]))
        row["disk"] = 0
    _unhold(t, block)
    return good


@compiled
def detach(t: Tables, block: Number) -> None:
    """Forget the copy on disk of a block that lies in DRAM too; its place there is to be erased."""
    row = t.blocks[block]
    _push_to_erase(t, np.int64(row["disk"]))
    row["disk"] = 0
    _undurable(t, block)
    if not _is_leaf(t, block):
        _unlist(t, block)


@compiled
def mark_durable(t: Tables, rows: U4, generations: U8, disks: U4, left: U4) -> Number:
    """What these places hold is synced and in the index. A block is durable if all before it is.

    Indices of those that lie there and are not durable for want of a parent go to `left`; returns how many.
    """
    for i in range(rows.size):
        left[i] = i
    waiting, before = rows.size, rows.size + 1
    while waiting and waiting < before:  # parents mostly come first: one or two rounds
        before, waiting = waiting, 0
        for k in range(before):
            i = left[k]
            row = t.blocks[rows[i]]
            if row["generation"] != generations[i] or row["disk"] != disks[i] or row["state"] == DOOMED:
                continue
            if row["flags"] & SAVING:  # it left this place, and is being written there again
                continue
            parent = row["parent"]
            if parent == 0 or t.blocks[parent]["flags"] & DURABLE:
                row["flags"] |= DURABLE
            else:
                left[waiting] = i
                waiting += 1
    return waiting


@compiled
def _undurable(t: Tables, top: Number) -> None:
    """A block's copy on disk is gone: nothing that continues it is durable any more."""
    block, climbing = top, False
    t.blocks[top]["flags"] &= ~DURABLE
    while True:
        child = np.int64(t.blocks[block]["first_child"])
        if not climbing and child:
            block = child
        elif block == top:
            return
        elif t.blocks[block]["next_sibling"]:
            block, climbing = np.int64(t.blocks[block]["next_sibling"]), False
        else:
            block, climbing = np.int64(t.blocks[block]["parent"]), True
            continue
        climbing = not t.blocks[block]["flags"] & DURABLE  # then nothing below it is
        t.blocks[block]["flags"] &= ~DURABLE


@compiled
def describe(t: Tables, rows: U4, start: Number, stop: Number, out: Rows) -> None:
    """Gather what headers and orders say of `rows[start:stop]` in `out`."""
    for i in range(start, stop):
        row, to = t.blocks[rows[i]], out[i - start]
        above = t.blocks[row["parent"]]
        for word in range(4):
            to["key"][word] = row["key"][word]
            to["parent_key"][word] = above["key"][word]
        to["generation"] = row["generation"]
        to["parent_generation"] = above["generation"]
        to["checksum"] = row["checksum"]
        to["row"] = rows[i]
        to["slot"] = row["slot"]
        to["disk"] = row["disk"]
        to["parent_disk"] = above["disk"]
        to["namespace"] = row["namespace"]
        to["state"] = row["state"]
        to["flags"] = row["flags"]


@compiled
def pack_records(t: Tables, position: Number, start: Number, stop: Number, names: U4, wall_s: Number, now: Number,
                 out: Rows) -> None:  # fmt: skip
    """What the index is to say of slots `start..stop` of a segment; zeros where no block lies, or not safely yet."""
    shift = np.int64(t.book[SHIFT])
    mask = (1 << shift) - 1
    for i in range(start, stop):
        slot, to = (position << shift) + i, out[i - start]
        block = np.int64(t.slots[slot]["block"])
        to["generation"] = 0
        if block == 0 or block == NOBODY:
            continue
        row = t.blocks[block]
        if np.int64(row["disk"]) != slot or row["flags"] & SAVING or row["state"] == DOOMED:
            continue
        above = t.blocks[row["parent"]]
        for word in range(4):
            to["key"][word] = row["key"][word]
        to["generation"] = row["generation"]
        to["parent_generation"] = above["generation"]
        to["checksum"] = row["checksum"]
        to["parent_segment"] = t.arenas[np.int64(above["disk"]) >> shift]["id"] if above["disk"] else 0
        to["parent_slot"] = np.int64(above["disk"]) & mask if above["disk"] else 0
        to["namespace"] = names[row["namespace"]]
        to["touched_s"] = max(0, wall_s - (np.int64(now) - np.int64(row["touched"])) // 1_000_000_000)


@compiled
def next_on_segment(t: Tables, position: Number, start: Number) -> tuple[Number, Number]:
    """The first slot from `start` on that holds a block, and that block; (-1, 0) if none does."""
    shift = np.int64(t.book[SHIFT])
    for i in range(start, np.int64(t.arenas[position]["untouched"])):
        block = np.int64(t.slots[(position << shift) + i]["block"])
        if block and block != NOBODY:
            return i, block
    return -1, 0


@compiled
def free_nobodys(t: Tables, position: Number) -> Number:
    """Free the quarantined slots of a segment that is given up. Returns how many there were."""
    shift, count = np.int64(t.book[SHIFT]), 0
    for i in range(np.int64(t.arenas[position]["untouched"])):
        slot = (position << shift) + i
        if t.slots[slot]["block"] == NOBODY:
            _free_slot(t, slot)
            count += 1
    return count


# -- restart ----------------------------------------------------------------------------------------------------

_ROOTED, _WALKING = np.uint32(0), np.uint32(3)  # in `writer` of an ADOPTING row
UNKNOWN: Final = 1  # nobody knows yet whether its chain is whole
BROKEN: Final = 2
NO_GENERATION: Final = np.uint64((1 << 64) - 1)  # later than any


@compiled
def _is_new(t: Tables, block: Number, first: Number) -> bool:
    """Was it stored since generation `first`, or is it being stored? Then it has no generation yet."""
    return bool(t.blocks[block]["generation"] >= first or t.blocks[block]["state"] == WRITING)


@compiled
def adopt_records(
    t: Tables, ix: Index, pool: Number, position: Number, start: Number, stop: Number, records: Rows, numbers: U4,
    wall_s: Number, now: Number, key: U8, out: U4, out_at: Number, merged: U4, room: Number, first: Number,
) -> Number:  # fmt: skip
    """Make rows for what the index says of slots `start..stop` of a segment; `link_records` and `settle` follow.

    `numbers`: namespace by the index's number for it, 0 for none; `room`: blocks that may yet lie on disk, places to be
    erased not counted; `first`: see `settle`. Numbers of new rows go to `out`; returns where it ends. Those of rows in
    DRAM go to `merged`, behind their count. What is UNREAD stays as it is, and takes no block.
    """
    shift = np.int64(t.book[SHIFT])
    arena = t.arenas[position]
    taken = 0
    for i in range(start, stop):
        record, slot = records[i], (position << shift) + i
        arena["untouched"] = i + 1
        arena["used"] += np.uint32(1)
        t.book[DISK_USED] += np.uint64(1)
        t.slots[slot]["block"] = NOBODY
        number = np.int64(record["namespace"])
        namespace = np.int64(numbers[number]) if number < numbers.size else 0
        if not record["generation"] and number == UNREAD:
            continue
        t.pools[pool]["blocks"] += np.uint32(1)
        # A place that the index knows nothing of may hold what was written just before the former life ended.
        if not record["generation"] or not namespace or taken >= room:
            _push_to_erase(t, slot)
            continue
        for word in range(4):
            key[word] = record["key"][word]
        block = _find(t, ix, namespace, key, 0) if ix.shape[2] else np.int64(0)
        row = t.blocks[block]
        if block and _is_new(t, block, first) and row["generation"] != record["generation"]:
            block = np.int64(0)  # it gives way, when this one is settled
        if block:
            same = row["generation"] == record["generation"] and (row["state"] == RESIDENT or row["state"] == KEPT)
            if not same or row["disk"]:
                _push_to_erase(t, slot)
                continue
        else:
            block = _take_row(t)
            if not block:
                _push_to_erase(t, slot)
                continue
            row = t.blocks[block]
            for word in range(4):
                row["key"][word] = key[word]
            row["namespace"] = namespace
            row["slot"] = slot
            row["writer"] = UNKNOWN
            row["parent"] = 0
            row["first_child"] = 0
            row["next_sibling"] = 0
            row["prev_sibling"] = 0
            row["older"] = 0
            row["newer"] = 0
            row["cost"] = 0
            row["uses"] = 1
            row["queue"] = NO_QUEUE
            row["holds"] = 0
            row["flags"] = 0
            row["lease_until_ns"] = 0
            row["dram_children"] = 0
            row["seal"] = 0
            row["state"] = ADOPTING
            row["generation"] = record["generation"]
            row["checksum"] = record["checksum"]
            age_s = max(0, wall_s - np.int64(record["touched_s"]))
            row["touched"] = max(1, np.int64(now) - age_s * 1_000_000_000)
            t.census[namespace] += np.uint32(1)
            out[out_at] = block
            out_at += 1
        taken += 1
        t.slots[slot]["block"] = block
        row["disk"] = slot
        if row["state"] == ADOPTING:
            row["flags"] |= DURABLE
        else:
            merged[0] += np.uint32(1)
            merged[merged[0]] = block
        arena["touched"] = max(arena["touched"], row["touched"])
        t.book[GENERATION] = max(t.book[GENERATION], record["generation"] + np.uint64(1))
        if row["state"] != ADOPTING:
            _list(t, block)
    return out_at


@compiled
def link_records(
    t: Tables, position: Number, start: Number, stop: Number, records: Rows, positions: U4, left: U4, wanted: U8,
    left_at: Number,
) -> Number:  # fmt: skip
    """Find the parents of adopted rows where they lay when their children were written.

    `positions`: by segment number, 0 for none. Rows whose parents are not there go to `left`, with the generations they
    want to `wanted`: they may have been written again elsewhere. Returns where those end.
    """
    shift = np.int64(t.book[SHIFT])
    for i in range(start, stop):
        block = np.int64(t.slots[(position << shift) + i]["block"])
        if block == 0 or block == NOBODY or t.blocks[block]["state"] != ADOPTING:
            continue
        record, row = records[i], t.blocks[block]
        if not record["parent_generation"]:
            continue
        segment, place = np.int64(record["parent_segment"]), np.int64(0)
        if segment < positions.size and positions[segment] and np.int64(record["parent_slot"]) < (1 << shift):
            place = (np.int64(positions[segment]) << shift) + np.int64(record["parent_slot"])
        parent = np.int64(t.slots[place]["block"]) if place else 0
        good = parent != 0 and parent != NOBODY and parent != block
        if good:
            above = t.blocks[parent]
            good = above["generation"] == record["parent_generation"] and above["namespace"] == row["namespace"]
        if good:
            row["parent"] = parent
            _promise_parent(t, block, record["parent_generation"])
        else:
            row["writer"] = BROKEN
            left[left_at] = block
            wanted[left_at] = record["parent_generation"]
            left_at += 1
    return left_at


@compiled
def _promise_parent(t: Tables, block: Number, generation: Number) -> None:
    """Remember which block an adopted row's parent is: until `settle`, that row may become another's. No list has the
    adopted one yet, so the links of one are free for that.
    """
    t.blocks[block]["older"] = np.uint32(np.uint64(generation) & np.uint64(0xFFFFFFFF))
    t.blocks[block]["newer"] = np.uint32(np.uint64(generation) >> np.uint64(32))


@compiled
def _keeps_promise(t: Tables, block: Number) -> bool:
    """Is its parent still the block that it was? The promise is forgotten."""
    row = t.blocks[block]
    promised = np.uint64(row["older"]) | (np.uint64(row["newer"]) << np.uint64(32))
    row["older"] = 0
    row["newer"] = 0
    kept: bool = promised == 0 or t.blocks[np.int64(row["parent"])]["generation"] == promised
    return kept


@compiled
def make_ready(t: Tables, ix: Index, count: Number) -> None:
    """Have buckets enough for `count` more blocks, so that `settle` need not split them one by one."""
    wanted = 2 * (np.int64(ix.shape[2]) + count)
    if not ix.shape[2]:
        while np.int64(ix.shape[0]) < wanted and 2 * np.int64(ix.shape[0]) <= ix.heads.size:
            ix.shape[0] <<= np.uint64(1)
        ix.shape[1] = np.uint64(0)
        return
    while np.int64(ix.shape[0] + ix.shape[1]) < min(wanted, ix.heads.size):
        _split(t, ix)


@compiled
def _fetch_buckets(t: Tables, ix: Index, rows: U4, start: Number, stop: Number, scratch: U4) -> None:
    """Have the buckets of these rows, and what is in them, in the cache: what is asked for in a row comes side by side,
    and one after the other it is waited for a million times. `scratch`: room for as many.
    """
    for i in range(start, stop):
        row = t.blocks[np.int64(rows[i])]
        key = row["key"]
        scratch[i - start] = _bucket(ix, row["namespace"], key[0], key[1], key[2], key[3])
    for i in range(stop - start):
        scratch[i] = ix.heads[np.int64(scratch[i])]
    chains = np.uint32(0)
    for i in range(stop - start):
        chains ^= t.blocks[np.int64(scratch[i])]["chain"]
    scratch[0] = chains  # a result that nobody could need would not be looked for


@compiled
def settle(
    t: Tables, ix: Index, rows: U4, start: Number, stop: Number, stack: U4, key: U8, first: Number, displaced: U4,
    unsure: U4,
) -> Number:  # fmt: skip
    """Put adopted rows whose chain is whole in index and tree, the root first. Returns how many.

    Blocks of generation `first` or later were stored in this life, or are being so, while nobody could know that they
    lie on disk. They give way, and go to `displaced`, behind their count, to be swept: what lies on disk is durable and
    they are not. A block whose parent is not durable, which may lie in DRAM alone, is not durable either, and goes to
    `unsure`, behind their count: there is room for all rows that are DURABLE.
    """
    _fetch_buckets(t, ix, rows, start, stop, stack)
    settled = 0
    for i in range(start, stop):
        depth, at = 0, np.int64(rows[i])
        while at and t.blocks[at]["state"] == ADOPTING and t.blocks[at]["writer"] == UNKNOWN and depth < stack.size:
            t.blocks[at]["writer"] = _WALKING
            stack[depth] = at
            depth += 1
            at = np.int64(t.blocks[at]["parent"])
        whole = at == 0 or (t.blocks[at]["state"] != ADOPTING and t.blocks[at]["state"] in LIVE)
        while depth:
            depth -= 1
            block = np.int64(stack[depth])
            row = t.blocks[block]
            for word in range(4):
                key[word] = row["key"][word]
            whole = _keeps_promise(t, block) and whole
            bucket = _bucket(ix, row["namespace"], key[0], key[1], key[2], key[3])
            other = _walk(t.blocks, ix.heads[bucket], row["namespace"], key, 0) if whole else np.int64(0)
            if other and _is_new(t, other, first) and np.int64(displaced[0]) + 1 < displaced.size:
                _cut(t, ix, other)
                displaced[0] += np.uint32(1)
                displaced[displaced[0]] = other
                other = np.int64(0)
            whole = whole and not other
            row["writer"] = _ROOTED if whole else np.uint32(BROKEN)
            if not whole:
                continue
            row["state"] = KEPT if _position(t, block) < np.int64(t.book[ON_DISK]) else DISK
            _come(t, block)
            ix.shape[2] += np.uint64(1)  # `make_ready` has seen to it that there are buckets enough
            row["chain"] = ix.heads[bucket]
            ix.heads[bucket] = block
            above = np.int64(row["parent"])
            _adopt(t, above, block)
            if above and row["flags"] & DURABLE and not t.blocks[above]["flags"] & DURABLE:
                row["flags"] &= ~DURABLE
                unsure[0] += np.uint32(1)
                unsure[unsure[0]] = block
            settled += 1
    return settled


@compiled
def finish_adoption(t: Tables, rows: U4, start: Number, stop: Number) -> None:
    """List those that may be evicted, in the order given, and free those whose chain is broken."""
    for i in range(start, stop):
        block = np.int64(rows[i])
        row = t.blocks[block]
        if row["state"] != ADOPTING:
            _list(t, block)
            continue
        row["parent"] = 0
        if row["disk"]:
            give_to_erase(t, block)
        if row["holds"]:  # somebody may still be reading it
            row["state"] = DOOMED
        else:
            _free_block(t, block)


@compiled
def keep_rows(
    t: Tables, start: Number, stop: Number, pool_of: U4, slots_of: U4, arena_shift: Number, out: U4, out_at: Number
) -> Number:
    """Look over the rows of a former life: those that are whole become ADOPTING, the others FREE for now.

    `pool_of`: by namespace, pool + 1, 0 for an unknown one; `slots_of`: by position, slots of a kept arena, or 0.
    """
    for block in range(start, stop):
        row = t.blocks[block]
        good = row["state"] == RESIDENT or row["state"] == KEPT
        slot = np.int64(row["slot"])
        position = slot >> arena_shift
        good = good and position < slots_of.size and (slot & ((1 << arena_shift) - 1)) < np.int64(slots_of[position])
        good = good and row["namespace"] < pool_of.size and pool_of[row["namespace"]] != 0
        good = good and t.arenas[position]["pool"] == pool_of[row["namespace"]]
        good = good and np.int64(row["parent"]) < t.blocks.size and t.slots[slot]["block"] == 0
        good = good and row["seal"] == seal_of(t, block)
        if not good:
            row["holds"] = 0
            if row["state"] == ADOPTING:  # that life ended before it had put the row in its place
                row["state"] = DOOMED
            continue
        row["state"] = ADOPTING
        row["writer"] = 1
        _occupy(t, block)
        out[out_at] = block
        out_at += 1
    return out_at


@compiled
def _occupy(t: Tables, block: Number) -> None:
    """A row of a former life is in its slot; what else it said of others is forgotten."""
    row = t.blocks[block]
    for_whom = t.arenas[_position(t, block)]
    row["flags"] = 0
    row["holds"] = 0
    row["disk"] = 0
    row["dram_children"] = 0
    row["first_child"] = 0
    row["next_sibling"] = 0
    row["prev_sibling"] = 0
    row["older"] = 0
    row["newer"] = 0
    row["queue"] = NO_QUEUE
    row["chain"] = 0
    t.slots[row["slot"]]["block"] = block
    for_whom["used"] += np.uint32(1)
    for_whom["touched"] = max(for_whom["touched"], row["touched"])
    t.pools[np.int64(for_whom["pool"]) - 1]["blocks"] += np.uint32(1)
    t.census[row["namespace"]] += np.uint32(1)
    t.book[ROWS] += np.uint64(1)
    t.book[GENERATION] = max(t.book[GENERATION], row["generation"] + np.uint64(1))


@compiled
def withhold(t: Tables, block: Number, pool_of: U4, slots_of: U4, arena_shift: Number) -> bool:
    """Keep the slot of a row that somebody may still be reading from being used; the caller ends the hold in time.

    False if it never had a slot.
    """
    row = t.blocks[block]
    slot = np.int64(row["slot"])
    position = slot >> arena_shift
    if position >= slots_of.size or (slot & ((1 << arena_shift) - 1)) >= np.int64(slots_of[position]):
        return False
    if np.int64(t.slots[slot]["block"]) != block:
        if t.slots[slot]["block"] or row["state"] == FREE or row["state"] == ADOPTING:
            return False
        pool = t.arenas[position]["pool"]
        namespace = np.int64(row["namespace"])
        if namespace >= pool_of.size or pool_of[namespace] != pool:  # torn: any of that pool will do to count it by
            namespace = np.int64(0)
            while namespace < pool_of.size and pool_of[namespace] != pool:
                namespace += 1
            if namespace == pool_of.size:
                return False
            row["namespace"] = namespace
        row["state"] = DOOMED
        row["parent"] = 0
        _occupy(t, block)
    _hold(t, block)
    return True


@compiled
def link_free(t: Tables, unused: Number) -> None:
    """All other rows of a former life are free."""
    t.book[UNUSED_ROW] = np.uint64(unused)
    for block in range(unused - 1, 0, -1):
        row = t.blocks[block]
        if row["state"] != ADOPTING and not (row["state"] == DOOMED and row["holds"]):
            row["state"] = FREE
            row["chain"] = t.book[FREE_ROWS]
            t.book[FREE_ROWS] = np.uint64(block)


@compiled
def free_slots(t: Tables, position: Number, slots: Number) -> None:
    """Chain up the slots of a kept arena that hold no block."""
    shift = np.int64(t.book[SHIFT])
    arena = t.arenas[position]
    arena["free"] = 0
    arena["untouched"] = slots
    for i in range(slots - 1, -1, -1):
        slot = (position << shift) + i
        if not t.slots[slot]["block"]:
            t.slots[slot]["next_free"] = arena["free"]
            arena["free"] = slot + 1
    if arena["free"]:
        _open_arena(t, position)
