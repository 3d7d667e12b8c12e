"""What lookups did not find, so that it counts as missed, and once.

An engine that looks up first (MATCH) leases nothing but what is there, and a waiting request is looked up again and
again: so what MATCH did not find is noted here, and counts when the engine, having computed it, stores it.

    MATCH ends before what it asks for  -> ASKED     told of at once, by reason, if it was not yet
    LEASE did not get it                -> COUNTED   it has counted already; a MATCH that ends there asks nothing new
    RESERVE                             -> gone      counts as missed if it was ASKED, and is not there meanwhile

Notes lie in a table by hash of their key, and a later one takes the place of an earlier: what 2^18 others came after
may be lost, and then is not counted. Owner thread.

    a note   | hash, 46 bits | 1 ASKED, 2 COUNTED | when, in seconds, 16 bits |
"""

from typing import Final

import numpy as np

from kvproto.errors import Grant
from kvstore.blocks import U4, U8, Number, compiled

NOTES: Final = 1 << 18  # 2 MiB; none before the first lookup that misses
LATELY_S: Final = 600  # asked for again within it is the same request, still waiting
ASKED: Final = 1
COUNTED: Final = 2
_WHEN: Final = (1 << 16) - 1
_KNOWN, _PENDING = int(Grant.KNOWN), int(Grant.PENDING)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_2, _3, _16, _18, _29, _32 = (np.uint64(n) for n in (2, 3, 16, 18, 29, 32))
_PLACE = np.uint64(NOTES - 1)


@compiled
def _hash(keys: U8, k: Number, namespace: Number, factors: U8) -> Number:
    """As `tap.sample` has it: not to be steered by who cannot see the factors."""
    x = keys[k] * factors[0] + keys[k + 1] * factors[1] + keys[k + 2] * factors[2] + keys[k + 3] * factors[3]
    x += np.uint64(namespace + 1) * _SPREAD
    x = (x ^ (x >> _32)) * _SPREAD
    return x ^ (x >> _29)


@compiled
def _kind(note: Number, x: Number, now_s: Number) -> Number:
    """What a note says of a hash: ASKED, COUNTED, or 0 if it is of another one or too old."""
    if note >> _18 != x >> _18 or ((now_s - np.int64(note)) & _WHEN) > LATELY_S:
        return 0
    return np.int64((note >> _16) & _3)


@compiled
def note_run(
    keys: U8, at: Number, count: Number, namespace: Number, now_s: Number, counted: Number, factors: U8, notes: U8
) -> Number:
    """Note keys that were not found: by a LEASE, which has `counted` them, or by a MATCH.

    Returns how many of them are to be told of now, since no MATCH was.
    """
    told = 0
    kind = COUNTED if counted else ASKED
    for i in range(count):
        x = _hash(keys, at + 4 * i, namespace, factors)
        place = np.int64(x & _PLACE)
        before = _kind(notes[place], x, now_s)
        if counted:
            told += before == ASKED
        elif i == 0 and before == COUNTED:
            kind, told = COUNTED, count
        elif kind == ASKED:
            told += before != 0
        into = COUNTED if before == COUNTED else kind
        notes[place] = (x >> _18 << _18) | np.uint64(into << 16 | (now_s & _WHEN))
    return count - told


@compiled
def take_run(
    keys: U8, at: Number, count: Number, namespace: Number, now_s: Number, grants: U4, factors: U8, notes: U8
) -> tuple[Number, Number]:
    """Forget keys that are stored now. Returns the part of the run, from and to, that counts as missed.

    From the first to the last that was ASKED: what lies between them was, too.
    """
    begin = end = 0
    for i in range(count):
        x = _hash(keys, at + 4 * i, namespace, factors)
        place = np.int64(x & _PLACE)
        kind = _kind(notes[place], x, now_s)
        if kind:
            notes[place] = 0
        if kind == ASKED and grants[i] != _KNOWN and grants[i] != _PENDING:
            begin, end = (begin if end else i), i + 1
    return begin, end


class Lookups:
    """The notes of one store."""

    __slots__ = ("_factors", "_notes")

    def __init__(self, factors: U8) -> None:
        """`factors`: four odd words that no client knows."""
        self._factors = factors
        self._notes: U8 | None = None

    def matched(self, namespace: int, keys: U8, at: int, count: int, now_s: int) -> int:
        """A MATCH did not find these. How many of them nobody has asked for lately."""
        if self._notes is None:
            self._notes = np.zeros(NOTES, dtype=np.uint64)
        return int(note_run(keys, at, count, namespace, now_s, 0, self._factors, self._notes))

    def leased(self, namespace: int, keys: U8, at: int, count: int, now_s: int) -> int:
        """A LEASE did not get these, and counts them. How many of them no MATCH has asked for."""
        if self._notes is None:
            return count
        return int(note_run(keys, at, count, namespace, now_s, 1, self._factors, self._notes))

    def reserved(self, namespace: int, keys: U8, at: int, count: int, grants: U4, now_s: int) -> tuple[int, int]:
        """These are stored, or refused. Which of them, from and to, were missed by a MATCH and have not counted."""
        if self._notes is None:
            return 0, 0
        begin, end = take_run(keys, at, count, namespace, now_s, grants, self._factors, self._notes)
        return int(begin), int(end)

    @property
    def held_bytes(self) -> int:
        """Memory of the notes."""
        return self._notes.nbytes if self._notes is not None else 0
