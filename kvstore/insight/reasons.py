"""Why a key is not there: a small memory of how blocks left, kept for `kvctl explain-miss`.

    Table, one array of 8-byte words, so that it can lie in memory that outlives the daemon
    0        what this is: a name and a version
    1        sets
    2-6      factors of the hash, secret
    7        since when departures are noted, as a time below
    8        whether nothing was left from a life before (1), or blocks may be older than that (0)
    9        departures noted
    10-15    unused
    then sets of eight entries, one cache line each
             63          32 31      12 11    8 7    5 4    0
             | fingerprint | time     | cause | tier | rule |          0: nobody

Time is in steps of 2**33 ns (8.6 s) of the clock of the host and comes round after 104 days. A new entry takes the
place of the same key's, else a free one, else that of the oldest in its set.

How often it errs. `look` takes a key that was never there for one that left if its fingerprint is that of one of eight
others: 8 / 2**32, 1 in 500 million. It takes one that left for one that never was there if eight others of the same set
have left since; so an answer of `NEVER` tells how far back its set reaches. With as many entries as blocks, four times
over, that is after about four turns of the whole store. Owner thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np

from kvstore.blocks import U4, U8, Number, Rows, compiled

WAYS: Final = 8
HEAD_WORDS: Final = 16
SEED_WORDS: Final = 5
STEP_NS: Final = 1 << 33
STEPS: Final = 1 << 20
FALSE_CAUSE: Final = WAYS / 2**32  # chance that a key that was never there is given a cause
_NAME: Final = int.from_bytes(b"reasons1", "little")
_SETS, _SEEDS, _SINCE, _COLD, _NOTED = 1, 2, 7, 8, 9
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_1, _3, _7, _12, _29, _32, _33, _40 = (np.uint64(n) for n in (1, 3, 7, 12, 29, 32, 33, 40))
_LOW_32 = np.uint64(0xFFFFFFFF)
_STEP_MASK = np.uint64(STEPS - 1)
_CAUSE_MASK = np.uint64(0xFFF)


class Cause(IntEnum):
    """How a block left, or why it never came. At most 15."""

    NEVER = 0  # not known to have been there
    EVICTED = 1
    DELETED = 2  # by a client
    CLEARED = 3  # by an operator
    PIN_EXPIRED = 4  # evicted soon after its pin had run out
    QUOTA = 5  # its tenant was above its share, or it was not accepted for that
    CORRUPT = 6  # was not what had been written
    DISK_LOST = 7  # its drive failed
    COLD = 8  # the daemon began anew without it
    REFUSED = 9  # no room when it came
    NOT_WORTH = 10  # slower to read than to compute
    ABANDONED = 11  # its writer left before it was whole
    DRAINING = 12  # nothing new was taken when it came
    LIMIT = 13  # more than its tenant, or its client's ring, may have
    UNUSED = 14  # nobody had used it for longer than its tenant's quota says
    OPERATOR = 15  # evicted because an operator wanted room


class Place(IntEnum):
    """The tier a block left. At most 7."""

    NONE = 0
    DRAM = 1
    DISK = 2


@dataclass(frozen=True, slots=True)
class Departure:
    """What is known of a key that is not there.

    `age_s` with a cause: how long ago, give or take `STEP_NS`. With `NEVER`: for how long departures of its set have
    been noted without one of it; it may have left before that.
    """

    cause: Cause
    place: Place
    rule: int  # number of the rule that evicted it, in the order of the caller's list
    age_s: float
    whole_life: bool  # with NEVER: `age_s` reaches back to when the store was empty


def words_for(entries: int) -> int:
    """Length of a table with room for at least so many: 8 bytes each, and 128."""
    sets = max(1, -(-entries // WAYS))
    assert sets < 1 << 32, "too many for 32 bits of a hash"
    return HEAD_WORDS + WAYS * sets


def begin(table: U8, seed: Sequence[int], now_ns: int, *, cold: bool) -> None:
    """Make a table of these words, all zero or of any content. `cold`: the store is empty."""
    assert len(seed) == SEED_WORDS, "a table wants five random words"
    if table.any():  # to look at what was never written costs a tenth of writing it
        table[:] = 0
    table[0] = _NAME
    table[_SETS] = (table.size - HEAD_WORDS) // WAYS
    table[_SEEDS : _SEEDS + SEED_WORDS] = [word | 1 for word in seed]
    table[_SINCE] = now_ns // STEP_NS
    table[_COLD] = int(cold)


def usable(table: U8) -> bool:
    """Whether these words, found in memory that was kept, are a table of this form and size."""
    sets = (table.size - HEAD_WORDS) // WAYS
    return table.size > HEAD_WORDS and int(table[0]) == _NAME and int(table[_SETS]) == sets


def tidy(table: U8, now_ns: int) -> bool:
    """Forget entries of a usable table that nobody can have noted. False if it is not usable, or of another time."""
    if not usable(table) or int(table[_SINCE]) > now_ns // STEP_NS:
        return False
    if not table[_NOTED]:
        return True
    entries = table[HEAD_WORDS:]
    cause, place = (entries >> np.uint64(8)) & np.uint64(0xF), (entries >> np.uint64(5)) & np.uint64(7)
    entries[(cause == 0) | (cause > max(Cause)) | (place > max(Place))] = 0
    return True


@compiled
def _hash(table: U8, w0: Number, w1: Number, w2: Number, w3: Number, namespace: Number) -> Number:
    seed = table[_SEEDS : _SEEDS + SEED_WORDS]
    x = w0 * seed[0] + w1 * seed[1] + w2 * seed[2] + w3 * seed[3] + (np.uint64(namespace) + _1) * seed[4]
    x = (x ^ (x >> _32)) * _SPREAD
    return x ^ (x >> _29)


@compiled
def _set(table: U8, hashed: Number) -> Number:
    """Where the set of a hash begins: its lower half, scaled to the number of sets; the upper is the fingerprint."""
    return np.uint64(HEAD_WORDS) + np.uint64(WAYS) * (((hashed & _LOW_32) * table[_SETS]) >> _32)


@compiled
def note(
    table: U8, w0: Number, w1: Number, w2: Number, w3: Number, namespace: Number, cause: Number, now_ns: Number
) -> None:
    """Remember that a key left: `cause` as `cause_word` makes it. One cache line.

    Few instructions and no branches, so that the cache misses of several calls overlap. A free entry looks like one
    noted at time 0, which is older than all others until the clock comes round; then it may be left free for longer.
    """
    hashed = _hash(table, w0, w1, w2, w3, namespace)
    fingerprint = hashed >> _32
    when = ((np.uint64(now_ns) >> _33) & _STEP_MASK) << _12
    begin = _set(table, hashed)
    best = np.uint64(0)
    for i in range(WAYS):
        way = np.uint64(i)  # unsigned, or numba looks for negative places
        word = table[begin + way]
        age = ((when | _CAUSE_MASK) - word) & _LOW_32
        same = np.uint64((word >> _32) == fingerprint)
        worth = (same << _40) | (age << _3) | way
        best = best if best > worth else worth  # noqa: FURB136 - numba branches on max
    table[begin + (best & _7)] = (fingerprint << _32) | when | np.uint64(cause)
    table[_NOTED] += _1


@compiled
def note_chain(
    table: U8, keys: U8, at: Number, count: Number, namespace: Number, cause: Number, now_ns: Number
) -> None:
    """`note` for each of some keys."""
    for i in range(count):
        k = at + 4 * i
        note(table, keys[k], keys[k + 1], keys[k + 2], keys[k + 3], namespace, cause, now_ns)


@compiled
def note_below(table: U8, rows: Rows, top: Number, cause: Number, now_ns: Number, most: Number) -> Number:
    """`note` for what continues the block in row `top`, up to `most` of it, depth first. Returns how many."""
    noted, row = 0, np.int64(rows[top]["first_child"])
    while row and noted < most:
        key = rows[row]["key"]
        note(table, key[0], key[1], key[2], key[3], rows[row]["namespace"], cause, now_ns)
        noted += 1
        if rows[row]["first_child"]:
            row = np.int64(rows[row]["first_child"])
            continue
        while row != top and not rows[row]["next_sibling"]:
            row = np.int64(rows[row]["parent"])
        row = np.int64(0) if row == top else np.int64(rows[row]["next_sibling"])
    return noted


@compiled
def note_refused(
    table: U8, keys: U8, at: Number, count: Number, namespace: Number, grants: U4, causes: U8, now_ns: Number
) -> None:
    """`note` for those keys of a RESERVE whose grant has a cause in `causes`."""
    for i in range(count):
        cause = causes[grants[i]]
        if cause:
            k = at + 4 * i
            note(table, keys[k], keys[k + 1], keys[k + 2], keys[k + 3], namespace, cause, now_ns)


@compiled
def look(
    table: U8, w0: Number, w1: Number, w2: Number, w3: Number, namespace: Number, now_ns: Number
) -> tuple[Number, Number]:
    """The cause word of a key and its age in steps; (0, age of the oldest entry of a full set, or -1) if unknown."""
    hashed = _hash(table, w0, w1, w2, w3, namespace)
    fingerprint = hashed >> _32
    now = (np.uint64(now_ns) >> _33) & _STEP_MASK
    begin = _set(table, hashed)
    oldest, filled = np.int64(-1), 0
    for i in range(WAYS):
        word = table[begin + np.uint64(i)]
        if word:
            age = np.int64((now - (word >> _12)) & _STEP_MASK)
            if word >> _32 == fingerprint:
                return np.int64(word) & 0xFFF, age
            oldest = max(oldest, age)
            filled += 1
    return np.int64(0), oldest if filled == WAYS else np.int64(-1)


def cause_word(cause: Cause, place: Place = Place.NONE, rule: int = 0) -> int:
    """Twelve bits for `note`; `rule` is below 32."""
    assert 0 <= rule < 32, "five bits hold 32 rules"
    assert cause is not Cause.NEVER, "what never was cannot leave"
    return cause << 8 | place << 5 | rule


def departure(table: U8, key: U8, namespace: int, now_ns: int) -> Departure:
    """What is known of a key (four words) that is not there."""
    word, steps = look(table, key[0], key[1], key[2], key[3], namespace, now_ns)
    step_s = STEP_NS / 1e9
    if word:
        return Departure(Cause(word >> 8), Place(word >> 5 & 7), word & 31, steps * step_s, whole_life=False)
    whole = steps < 0
    age_s = (now_ns // STEP_NS - int(table[_SINCE])) * step_s if whole else steps * step_s
    return Departure(Cause.NEVER, Place.NONE, 0, age_s, whole_life=whole and bool(table[_COLD]))


def noted(table: U8) -> int:
    """Departures since `begin`."""
    return int(table[_NOTED])


_SAID: Final = {
    Cause.DELETED: "deleted by a client",
    Cause.CLEARED: "cleared by an operator",
    Cause.OPERATOR: "evicted by an operator",
    Cause.PIN_EXPIRED: "evicted after its pin had expired",
    Cause.QUOTA: "evicted or refused because its tenant was above its share",
    Cause.CORRUPT: "was not what had been written, and was dropped",
    Cause.DISK_LOST: "lost with its drive",
    Cause.COLD: "lost when the daemon began anew without its memory",
    Cause.REFUSED: "refused: there was no room",
    Cause.NOT_WORTH: "not written to disk, since computing it is faster",
    Cause.ABANDONED: "never whole: its writer left, or took too long",
    Cause.DRAINING: "refused: the daemon was draining",
    Cause.UNUSED: "dropped: nobody had used it for longer than its tenant's quota says",
    Cause.LIMIT: "refused: more than its tenant, or its client's ring, may have",
}


def sentence(found: Departure, rules: Sequence[str]) -> str:
    """A departure for people; `rules` are the names that the numbers stand for."""
    ago = _ago(found.age_s)
    if found.cause is Cause.NEVER:
        if found.whole_life:
            return f"never stored since the daemon began with an empty store, {ago} ago (sure to 1 in 500 million)"
        return f"not stored, or gone for more than {ago}: departures before that are forgotten"
    if found.cause is Cause.EVICTED:
        rule = rules[found.rule] if found.rule < len(rules) else f"rule {found.rule}"
        return f"evicted from {_tier(found.place)} by {rule}, {ago} ago"
    if found.place is Place.NONE:
        return f"{_SAID[found.cause]}, {ago} ago"
    return f"{_SAID[found.cause]} ({_tier(found.place)}), {ago} ago"


def _tier(place: Place) -> str:
    return {Place.NONE: "an unknown tier", Place.DRAM: "DRAM", Place.DISK: "disk"}[place]


def _ago(age_s: float) -> str:
    if age_s < 60:
        return f"{max(age_s, STEP_NS / 1e9):.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 7200 else f"{age_s / 3600:.1f} h"
