"""How long tools take, learned, and how long a context is worth keeping for one. State of one tenant.

Continuum (Li et al., "Continuum: Efficient and Robust Multi-Turn LLM Agent Scheduling with KV Cache Time-to-Live",
arXiv 2511.02230) keeps a context for tau* after its program has called a tool:

    tau* = argmax  P(tau, tool) * (T * eta + reload) - tau       over all observed gaps tau, and 0
           tau

    P       share of the tool's gaps of at most tau; of all tools' where it has fewer than 100; 2 s where all have
    T       mean time that requests queue whose context was evicted
    eta     -corr(k, turns left after turn k) over finished programs: 1 if all have equally many turns (who waits now
            will not have to later), 0 if the end is as far at every turn. Below 0 it counts as 0, and until ten
            programs have ended it is 0, too
    reload  what it costs to get the context back

Gaps are counted in bins an eighth of an octave wide, from 1 ms to 1 h, and a bin stands for its longest gap: tau* is at
most 9 % too long. Longer gaps count in P, but nothing is kept for them. Old counts fade by halves: when those of a row
add up to 2,048 all of them are halved, so the last 1,024 to 2,048 gaps decide.

What is written down (little endian):

    "KVGP" | version u2 | bins u2 | tools u4 | turns 7 x f8 | row of all tools | tools x (name length u2, name, rank f8,
    row) | XXH3-64 of all before u8                                         row: bins x f4
"""

import struct
from bisect import bisect_left
from math import isfinite, sqrt
from typing import Final, TypeAlias

import numpy as np
import xxhash

from kvstore.hints.limits import ESTIMATE_FACTOR, NAME_CHARS, PIN_NS_MAX, PIN_NS_MIN, SECOND_NS, TOOLS
from kvstore.hints.refusal import Refusal, Refused, is_name

Counts: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float32]]
Shares: TypeAlias = np.ndarray[tuple[int], np.dtype[np.float64]]
UNKNOWN_NS: Final = 2 * SECOND_NS  # Continuum's fixed threshold where nothing is known
SAMPLES_MIN: Final = 100
SAMPLES_MAX: Final = 2048
PROGRAMS_MIN: Final = 10
TURNS_MAX: Final = 10_000  # of one program: more would outweigh all others
FADE: Final = 1 - 1 / 1000  # of what finished programs taught, at each further one
TURN_SUM_MAX: Final = 1000 * TURNS_MAX**3  # of a sum over turns: 1 / (1 - FADE) programs count at most

BINS_PER_OCTAVE: Final = 8
EDGES_NS: Final = (
    *(round(10**6 * 2 ** (i / BINS_PER_OCTAVE)) for i in range(22 * BINS_PER_OCTAVE - 1)),
    PIN_NS_MAX,
)
_EDGES = np.array(EDGES_NS, dtype=np.float64)
_BINS: Final = len(EDGES_NS) + 1  # the last one: longer than an hour
_ALL: Final = TOOLS  # the row of all tools
_HEAD = struct.Struct("<4sHHI7d")
_TOOL = struct.Struct("<H")
_RANK = struct.Struct("<d")
_SUM = struct.Struct("<Q")
_MAGIC: Final = b"KVGP"
_VERSION: Final = 1


def deadline_ns(expected_ns: int) -> int:
    """How long to keep a context whose caller says that the tool takes so long."""
    return min(max(ESTIMATE_FACTOR * expected_ns, PIN_NS_MIN), PIN_NS_MAX)


class Gaps:
    """What a tenant's tools and programs have taught."""

    __slots__ = ("lessons", "_rows", "_seats", "_ranks", "_floor", "_turns")

    def __init__(self) -> None:
        self.lessons = 0  # so often something was learned
        self._rows = np.zeros((TOOLS + 1, _BINS), dtype=np.float32)
        self._seats: dict[str, int] = {}
        self._ranks: dict[str, float] = {}  # uses, on top of what the tool last turned out had
        self._floor = 0.0
        self._turns = Turns()

    def observed(self, tool: str, gap_ns: int) -> None:
        """A tool took so long. A new one takes the place of the least used if there are too many."""
        self.lessons += 1
        at = bisect_left(EDGES_NS, gap_ns)
        for seat in (_ALL, self._seat(tool)):
            self._rows[seat, at] += 1
            if self._rows[seat].sum() >= SAMPLES_MAX:
                self._rows[seat] /= 2

    def ended(self, turns: int) -> None:
        """A program is over after so many turns."""
        self.lessons += 1
        self._turns.add(min(turns, TURNS_MAX))

    @property
    def known(self) -> bool:
        """Was anything learned, in this life or a former one?"""
        return bool(self._rows[_ALL].any()) or any(self._turns.sums)

    def eta(self) -> float:
        """How much of the queueing a kept context saves, 0 to 1."""
        return self._turns.eta()

    def worth_keeping_ns(self, tool: str, queue_ns: int, reload_ns: int) -> int:
        """Continuum's tau*: for how long to keep the context of a program that has just called this tool; 0: not."""
        row = self._row(tool)
        if row is None:
            return UNKNOWN_NS
        gains = _shares(row) * (queue_ns * self.eta() + reload_ns) - _EDGES
        best = int(gains.argmax())
        return EDGES_NS[best] if gains[best] > 0 else 0

    def likely_ns(self, tool: str) -> int | None:
        """The gap that half of all calls stay within; None where nothing is known or most take over an hour."""
        row = self._row(tool)
        if row is None:
            return None
        at = int(np.searchsorted(_shares(row), 0.5))
        return EDGES_NS[at] if at < len(EDGES_NS) else None

    def samples(self, tool: str) -> float:
        """How many gaps of a tool are remembered, faded ones for less."""
        seat = self._seats.get(tool)
        return 0.0 if seat is None else float(self._rows[seat].sum())

    def tools(self) -> tuple[str, ...]:
        """All tools that are remembered, in no particular order."""
        return tuple(self._seats)

    def to_bytes(self) -> bytes:
        """All of it, for the next life."""
        parts = [_HEAD.pack(_MAGIC, _VERSION, _BINS, len(self._seats), *self._turns.sums), _packed(self._rows[_ALL])]
        for tool, seat in self._seats.items():
            name = tool.encode()
            rank = _RANK.pack(self._ranks[tool] - self._floor)
            parts += [_TOOL.pack(len(name)), name, rank, _packed(self._rows[seat])]
        written = b"".join(parts)
        return written + _SUM.pack(xxhash.xxh3_64_intdigest(written))

    @staticmethod
    def from_bytes(written: bytes) -> "Gaps | Refused":
        """What `to_bytes` gave, or a refusal. Whoever is refused begins anew."""
        body = written[: -_SUM.size]
        if len(body) < _HEAD.size or _SUM.pack(xxhash.xxh3_64_intdigest(body)) != written[-_SUM.size :]:
            return Refused(Refusal.DAMAGED)
        magic, version, bins, tools, *sums = _HEAD.unpack_from(body)
        if (magic, version, bins) != (_MAGIC, _VERSION, _BINS) or tools > TOOLS:
            return Refused(Refusal.DAMAGED)
        gaps = Gaps()
        gaps._turns.sums = sums
        if not _read_rows(gaps._rows, gaps._seats, gaps._ranks, body, tools) or not gaps._is_sound():
            return Refused(Refusal.DAMAGED)
        return gaps

    def _row(self, tool: str) -> Counts | None:
        """The counts to go by: the tool's own if they are enough, or those of all."""
        seat = self._seats.get(tool)
        for each in (_ALL if seat is None else seat, _ALL):
            row: Counts = self._rows[each]
            if row.sum() >= SAMPLES_MIN:
                return row
        return None

    def _seat(self, tool: str) -> int:
        """The tool's row. Ranks are counted from the rank of whoever went last: uses of long ago do not count."""
        seat = self._seats.get(tool)
        if seat is None:
            if len(self._seats) < TOOLS:
                seat = len(self._seats)
            else:
                least = min(self._ranks, key=self._ranks.__getitem__)
                self._floor = self._ranks.pop(least)
                seat = self._seats.pop(least)
                self._rows[seat] = 0
            self._seats[tool] = seat
        self._ranks[tool] = self._floor + float(self._rows[seat].sum()) + 1
        return seat

    def _is_sound(self) -> bool:
        counted = bool((self._rows >= 0).all() and (self._rows <= SAMPLES_MAX).all())  # nor NaN
        turned = all(0 <= x <= TURN_SUM_MAX for x in self._turns.sums)
        return counted and turned and all(map(isfinite, self._ranks.values()))


class Turns:
    """The correlation of a turn's number k with the turns left l = n - k, pooled over all turns of all programs.

    `sums`: programs, and the sums over turns of 1, k, l, k*k, l*l and k*l. Those of a program are known in closed form.
    """

    __slots__ = ("sums",)

    def __init__(self) -> None:
        self.sums = [0.0] * 7

    def add(self, turns: int) -> None:
        """A program had so many."""
        n = max(turns, 0)
        k = n * (n + 1) / 2
        kk = n * (n + 1) * (2 * n + 1) / 6
        ll = n * (n - 1) * (2 * n - 1) / 6
        sums = (1, n, k, n * n - k, kk, ll, n * k - kk)
        self.sums = [old * FADE + new for old, new in zip(self.sums, sums, strict=True)]

    def eta(self) -> float:
        """-corr(k, l), held between 0 and 1."""
        programs, n, k, left, kk, ll, kl = self.sums
        spread = (n * kk - k * k) * (n * ll - left * left)
        if programs < PROGRAMS_MIN * FADE**PROGRAMS_MIN or spread <= 0:
            return 0.0
        return min(max((k * left - n * kl) / sqrt(spread), 0.0), 1.0)


def _shares(row: Counts) -> Shares:
    """P(tau) at every edge."""
    totals = np.cumsum(row, dtype=np.float64)
    shares: Shares = totals[:-1] / totals[-1]
    return shares


def _packed(row: Counts) -> bytes:
    return row.astype("<f4").tobytes()


def _read_rows(
    rows: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    seats: dict[str, int],
    ranks: dict[str, float],
    body: bytes,
    tools: int,
) -> bool:
    """Fill in what lies behind the head; False if it is not what `to_bytes` writes."""
    row_bytes = 4 * _BINS
    at = _HEAD.size + row_bytes
    if at > len(body):
        return False
    rows[_ALL] = np.frombuffer(body, "<f4", _BINS, _HEAD.size)
    for seat in range(tools):
        if at + _TOOL.size > len(body):
            return False
        (length,) = _TOOL.unpack_from(body, at)
        at += _TOOL.size
        if length > 4 * NAME_CHARS or at + length + _RANK.size + row_bytes > len(body):
            return False
        name = body[at : at + length].decode(errors="replace")
        (ranks[name],) = _RANK.unpack_from(body, at + length)
        at += length + _RANK.size
        rows[seat] = np.frombuffer(body, "<f4", _BINS, at)
        at += row_bytes
        seats[name] = seat
    return at == len(body) and len(seats) == tools and all(map(is_name, seats))
