"""Miss-ratio curves, always on: what share of accesses a cache of any size would have answered, in the last hours.

The model is LRU (Mattson's stack): a cache of C bytes has what was used since less than C distinct bytes. Of other
rules it says where memory stops to help, not what they reach; `shadow` plays those. A curve knows no tiers: read it at
the DRAM's size and at that of DRAM and disk together.

    sample() in the hot path -> Tap -> Curves.drain(now) -> a Stack for all accesses and one a tenant -> Curve

The correction of SHARDS-adj: how many accesses there were is known exactly, how many were sampled depends on which
keys were; the difference goes to the smallest distance, since it comes from few keys that are used very often. So

    hit share at C = 1 - (sampled accesses beyond C, or with no earlier use, each over its rate) / all accesses

Cost: at most `accesses_per_s` sampled accesses a second, half of them for the stream of all and half for those of all
tenants, of which the one that took most samples half as many keys when they are too many. Memory: `Limits.held_bytes`.
Rates fall and never rise: a stream that was busy once keeps the lower rate until the daemon starts anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp2, hypot, log2, sqrt
from typing import Final

import numpy as np

from kvproto.limits import PAGE_BYTES
from kvstore.blocks import Rows
from kvstore.insight import stack as stacks
from kvstore.insight.stack import BINS, BINS_PER_OCTAVE, GROUPS, Stack
from kvstore.insight.tap import F8, FULL_RATE, TAKE_AT, WAITING_MOST, Tap, threshold_of

SECOND_NS: Final = 10**9
DECAY_EVERY_S: Final = 60.0
KEY_BYTES: Final = 56  # of a stack, for each key it has room for
LEAST_THRESHOLD: Final = 1 << 40  # one key in 16 million: never none
HISTOGRAM_BYTES: Final = 2 * GROUPS * (BINS + 1) * 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What the curves may take.

    With 64 tenants: 32,768 and 64 x 8,192 keys make 29.8 MiB, 65 pairs of histograms 8.6, the tap 3.1, most of that
    never touched. 10,000 sampled accesses a second, in slices at 0.4 us each, are 0.4 % of a core at most.
    """

    keys: int = 1 << 15  # in the stream of all accesses
    keys_per_tenant: int = 1 << 13
    first_rate: float = 1 / 8
    accesses_per_s: int = 10_000
    half_life_s: float = 2 * 3600.0
    memory_s: float = 24 * 3600.0  # what was not used for so long counts as never used

    def held_bytes(self, tenants: int) -> int:
        """Memory of all streams, the tap not included."""
        keys = self.keys + tenants * self.keys_per_tenant
        return KEY_BYTES * keys + (1 + tenants) * HISTOGRAM_BYTES


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share between 0 and 1, or a difference of two, and its standard error."""

    share: float
    error: float


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One stream as it was lately. Older accesses count for less: half after each half-life."""

    hits: F8  # accesses by group and distance, as in `Stack`
    saved: F8  # their cost
    accesses: float
    cost_s: float
    span_s: float  # seconds that `accesses` and `cost_s` stand for
    rate: float  # share of keys that is sampled
    keys: int  # sampled keys that are remembered
    footprint_bytes: float  # of all keys that are remembered, sampled or not

    def hit(self, capacity_bytes: float) -> Estimate:
        """Share of accesses that LRU of this size answers."""
        return self._difference(self.hits, self.accesses, 0.0, capacity_bytes)

    def save(self, capacity_bytes: float) -> Estimate:
        """Share of the cost of all accesses that LRU of this size saves."""
        return self._difference(self.saved, self.cost_s, 0.0, capacity_bytes)

    def hit_gain(self, now_bytes: float, then_bytes: float) -> Estimate:
        """Change of the hit share from one size to another; its error is that of the change."""
        return self._difference(self.hits, self.accesses, now_bytes, then_bytes)

    def save_gain(self, now_bytes: float, then_bytes: float) -> Estimate:
        """Change of the saved share of cost from one size to another."""
        return self._difference(self.saved, self.cost_s, now_bytes, then_bytes)

    @property
    def hit_ceiling(self) -> Estimate:
        """Hit share of a cache that never forgets, over the span that the curve remembers."""
        return self.hit(float("inf"))

    @property
    def save_ceiling(self) -> Estimate:
        """Saved share of cost of a cache that never forgets."""
        return self.save(float("inf"))

    @property
    def cost_s_per_s(self) -> float:
        """Seconds of prefill asked for in a second, hits included."""
        return self.cost_s / self.span_s if self.span_s else 0.0

    def points(self) -> list[tuple[int, float, float]]:
        """(capacity in bytes, hit share, saved share) wherever the curve was sampled and a little beyond."""
        reach = max(PAGE_BYTES, min(2 * self.footprint_bytes, PAGE_BYTES * exp2(BINS / BINS_PER_OCTAVE)))
        count = int(log2(reach / PAGE_BYTES) * BINS_PER_OCTAVE) + 1
        sizes = [PAGE_BYTES * exp2(i / BINS_PER_OCTAVE) for i in range(count)]
        return [(int(size), self.hit(size).share, self.save(size).share) for size in sizes]

    def _difference(self, counts: F8, total: float, low_bytes: float, high_bytes: float) -> Estimate:
        """Share at the higher size less share at the lower one; 0 bytes is no cache.

        Two errors, added as independent: which keys were sampled, from the differences among groups; and where on the
        axis of sizes a distance lies, which is measured by n sampled keys, hence known to 1/sqrt(n).
        """
        if total <= 0:
            return Estimate(0.0, 1.0)
        high, low = _shares(counts, total, high_bytes), _shares(counts, total, low_bytes)
        chance = float((high - low).std(ddof=1)) / sqrt(GROUPS)
        shifted = [
            float(_shares(counts, total, size * factor).mean())
            for size in (high_bytes, low_bytes)
            for factor in self._uncertain(size)
        ]
        shift = (shifted[1] - shifted[0] - shifted[3] + shifted[2]) / 2
        return Estimate(max(0.0, float(high.mean())) - max(0.0, float(low.mean())), hypot(chance, shift))

    def _uncertain(self, size_bytes: float) -> tuple[float, float]:
        """Factors between which a size may really lie, one standard error either way."""
        if not self.keys or not 0 < size_bytes < float("inf"):
            return 1.0, 1.0
        within = max(1.0, self.keys * min(1.0, size_bytes / self.footprint_bytes))
        relative = sqrt((1 - self.rate) / within)
        return 1 / (1 + relative), 1 + relative


def _shares(counts: F8, total: float, size_bytes: float) -> F8:
    """Hit share at a size by each group alone, below 0 where it was unlucky; a bin is even on the logarithmic axis."""
    if size_bytes < PAGE_BYTES:
        return np.zeros((GROUPS, 1))
    at = min(log2(size_bytes / PAGE_BYTES) * BINS_PER_OCTAVE, float(BINS)) if size_bytes < float("inf") else float(BINS)
    whole = int(at)
    beyond = counts[:, whole:].sum(axis=1, keepdims=True)
    if whole < BINS:
        beyond = beyond - (at - whole) * counts[:, whole : whole + 1]
    shares: F8 = 1.0 - GROUPS * beyond / total
    return shares


@dataclass(frozen=True, slots=True, eq=False)
class Drained:
    """What passed since the drain before, for shadows to play."""

    accesses: Rows  # sampled ones of all streams, `tap.ACCESS`
    rate: float  # any key that belongs to so small a share was sampled
    passed: float  # accesses, sampled or not
    passed_cost_s: float


@dataclass(slots=True)
class _Stream:
    """One stream in the making."""

    stack: Stack
    begun_ns: int | None = None  # of the first access
    accesses: float = 0.0
    cost_s: float = 0.0
    span_s: float = 0.0
    absorbed: int = 0  # in this second


@dataclass(slots=True)
class Curves:
    """All streams of a store. Owner thread; pure but for the arrays it holds."""

    seed: Sequence[int]
    tenants: int
    now_ns: int
    limits: Limits = field(default_factory=Limits)
    tap: Tap = field(init=False)
    _streams: dict[int, _Stream] = field(init=False, default_factory=dict)
    _second_ns: int = field(init=False)
    _decayed_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self.tap = Tap(self.seed, 1 + self.tenants)
        self._second_ns = self._decayed_ns = self.now_ns
        self._begin(0, self.limits.keys)

    def _begin(self, stream: int, keys: int) -> None:
        threshold = threshold_of(self.limits.first_rate)
        self._streams[stream] = _Stream(stacks.new_stack(keys, threshold))
        self.tap.set_threshold(stream, threshold)

    def open(self, namespace: int, stream: int, slot_bytes: int) -> None:
        """Follow a namespace, in the stream of its tenant (from 1 on) and in that of all (0)."""
        if stream not in self._streams:
            self._begin(stream, self.limits.keys_per_tenant)
        self.tap.open(namespace, stream, slot_bytes)

    def follows(self, stream: int) -> bool:
        """Was anything of a stream followed yet?"""
        return stream in self._streams

    @property
    def due(self) -> bool:
        """Whether `drain` should be called now; otherwise once a second will do."""
        return self.tap.waiting >= TAKE_AT

    def drain(self, now_ns: int, most: int = WAITING_MOST) -> Drained:
        """Take in what the tap holds, or the first `most` accesses of that."""
        self._fade(now_ns)
        accesses = self.tap.take(most)
        now_s = now_ns // SECOND_NS
        for number in (0, *np.unique(accesses["stream"]).tolist()):
            stream = self._streams[number]
            stream.stack.words[stacks.OLDEST_S] = max(0, now_s - int(self.limits.memory_s))
            before = stream.stack.words[stacks.THRESHOLD]
            stream.absorbed += stacks.absorb(stream.stack, accesses, number, now_s)
            if stream.stack.words[stacks.THRESHOLD] != before:
                self.tap.set_threshold(number, int(stream.stack.words[stacks.THRESHOLD]))
        passed, passed_cost_s = self.tap.totals[0].tolist()
        self._add_totals(now_ns)
        self._restrain(now_ns)
        rate = int(self._streams[0].stack.words[stacks.THRESHOLD]) / FULL_RATE
        return Drained(accesses, rate, passed, passed_cost_s)

    def _add_totals(self, now_ns: int) -> None:
        """Count all accesses."""
        for number, stream in self._streams.items():
            accesses, cost_s = self.tap.totals[number].tolist()
            if accesses and stream.begun_ns is None:
                stream.begun_ns = now_ns
            stream.accesses += accesses
            stream.cost_s += cost_s
        self.tap.totals[:] = 0

    def _fade(self, now_ns: int) -> None:
        """Let the past count for less, before what has just passed is added to it."""
        passed_s = (now_ns - self._decayed_ns) / SECOND_NS
        if passed_s < DECAY_EVERY_S:
            return
        kept = exp2(-passed_s / self.limits.half_life_s)
        for stream in self._streams.values():
            stream.stack.hits[:] *= kept
            stream.stack.saved[:] *= kept
            stream.accesses *= kept
            stream.cost_s *= kept
            stream.span_s = (stream.span_s + self._unfaded_s(stream, now_ns)) * kept
        self._decayed_ns = now_ns

    def _unfaded_s(self, stream: _Stream, now_ns: int) -> float:
        """Seconds of a stream since the past faded last, or since the stream began if that was later."""
        begun_ns = now_ns if stream.begun_ns is None else stream.begun_ns
        return (now_ns - max(begun_ns, self._decayed_ns)) / SECOND_NS

    def _restrain(self, now_ns: int) -> None:
        """Keep to `accesses_per_s`: half of it for all accesses, half for the tenants' streams together."""
        tenants = [number for number in self._streams if number]
        for group in ([0], tenants):
            while sum(self._streams[number].absorbed for number in group) > self.limits.accesses_per_s // 2:
                self._halve(max(group, key=lambda number: self._streams[number].absorbed))
        if now_ns - self._second_ns >= SECOND_NS:
            self._second_ns = now_ns
            for stream in self._streams.values():
                stream.absorbed = 0

    def _halve(self, number: int) -> None:
        stream = self._streams[number]
        threshold = max(int(stream.stack.words[stacks.THRESHOLD]) // 2, LEAST_THRESHOLD)
        stacks.tighten(stream.stack, np.uint64(threshold))
        self.tap.set_threshold(number, threshold)
        stream.absorbed //= 2

    def curve(self, stream: int, now_ns: int) -> Curve:
        """What is known of a tenant's stream, or of all accesses (0). Drain before."""
        one = self._streams[stream]
        rate = int(one.stack.words[stacks.THRESHOLD]) / FULL_RATE
        return Curve(
            hits=one.stack.hits.copy(),
            saved=one.stack.saved.copy(),
            accesses=one.accesses,
            cost_s=one.cost_s,
            span_s=one.span_s + self._unfaded_s(one, now_ns),
            rate=rate,
            keys=int(one.stack.words[stacks.LIVE]),
            footprint_bytes=PAGE_BYTES * int(one.stack.words[stacks.PAGES]) / rate,
        )

    @property
    def held_bytes(self) -> int:
        """Memory of all arrays, as if every page of them were touched."""
        stacks_bytes = sum(array.nbytes for stream in self._streams.values() for array in stream.stack)
        return self.tap.held_bytes + stacks_bytes
