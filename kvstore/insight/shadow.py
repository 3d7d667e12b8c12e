"""Shadow caches: what another rule or another size would have answered, played on the sampled keys.

A cache of R * C bytes that sees a share R of the keys behaves as one of C bytes that sees all of them (Waldspurger,
Saemundsson, Ahmad and Park, "Cache Modeling and Optimization using Miniature Simulations", ATC 2017). All shadows see
the same keys, so that the difference between two rules is known better than either alone.

    Curves.drain(now) -> Drained -> Shadows.play -> Rule.play, one for each rule and size -> ShadowReport

Keys are sampled one by one, not by chain: a rule sees no tree. Evicting leaves first is in the order of use: the last
key of a run is used first, as in `stack`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp2, sqrt
from typing import Final, Protocol

import numpy as np

from kvproto.limits import PAGE_BYTES
from kvstore.blocks import U1, Rows
from kvstore.insight.curves import LEAST_THRESHOLD, SECOND_NS, Drained, Estimate
from kvstore.insight.stack import GROUPS
from kvstore.insight.tap import FULL_RATE, threshold_of

BLOCKS_WANTED: Final = 100  # of a shadow: with fewer, which keys they are decides, and not the rule
Groups = np.ndarray[tuple[int], np.dtype[np.float64]]


class Rule(Protocol):
    """One rule at work in one small cache of sampled keys. Pure: no clock, no chance of its own."""

    @property
    def name(self) -> str:
        """As in `kvctl policy`."""

    @property
    def blocks(self) -> int:
        """Keys it holds."""

    def resize(self, capacity_pages: int) -> None:
        """Hold no more than so many pages from now on."""

    def play(self, accesses: Rows, hits: U1, now_ns: int) -> None:
        """Answer `accesses` (`tap.ACCESS`) in order and set `hits[i]` to 1 for each that was there.

        Accesses of one `run` happen at once: first all are looked up, then all are used, the last one first. What is
        `stored` is put there, and `hits` of it means nothing. So is a miss: the client computes and stores it.
        """

    def forget(self, threshold: int) -> None:
        """Drop the keys whose hash is at or above `threshold`, from all it remembers: they are sampled no more."""


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What one rule at one size would have done lately."""

    rule: str
    capacity_bytes: int
    hit: Estimate
    save: Estimate
    blocks: int  # in the shadow now; below `BLOCKS_WANTED` a full one says little


@dataclass(slots=True)
class Shadow:
    """One rule at one size, scaled down."""

    rule: Rule
    capacity_bytes: int  # of the cache that it stands for
    missed: Groups = field(default_factory=lambda: np.zeros(GROUPS))  # accesses, each over its rate
    missed_cost_s: Groups = field(default_factory=lambda: np.zeros(GROUPS))

    def scale(self, rate: float) -> None:
        """Stand for the same cache with another share of the keys."""
        self.rule.resize(int(self.capacity_bytes * rate) // PAGE_BYTES)

    def play(self, accesses: Rows, rate: float, now_ns: int) -> None:
        """Let the rule answer, and count what it missed."""
        hits: U1 = np.zeros(accesses.size, dtype=np.uint8)
        self.rule.play(accesses, hits, now_ns)
        missed = accesses[(hits == 0) & (accesses["stored"] == 0)]
        groups = (missed["hash"] % np.uint64(GROUPS)).astype(np.int64)
        self.missed += np.bincount(groups, minlength=GROUPS) / rate
        self.missed_cost_s += np.bincount(groups, weights=missed["cost_s"], minlength=GROUPS) / rate

    def fade(self, kept: float) -> None:
        """Let the past count for less."""
        self.missed *= kept
        self.missed_cost_s *= kept


@dataclass(slots=True)
class Shadows:
    """All shadows of the stream of all accesses: the same keys for each, few enough for Python rules.

    `accesses_per_s` bounds what they cost: that many calls of each rule a second. Above it, half the keys go.
    """

    rules: Sequence[Callable[[], Rule]]
    capacities_bytes: Sequence[int]
    now_ns: int
    first_rate: float = 1 / 64
    accesses_per_s: int = 1000
    half_life_s: float = 2 * 3600.0
    accesses: float = 0.0
    cost_s: float = 0.0
    shadows: list[Shadow] = field(init=False)
    _threshold: int = field(init=False)
    _second_ns: int = field(init=False)
    _played: int = field(init=False, default=0)  # in this second

    def __post_init__(self) -> None:
        self._threshold = threshold_of(self.first_rate)
        self._second_ns = self.now_ns
        self.shadows = [Shadow(rule(), size) for size in self.capacities_bytes for rule in self.rules]
        for shadow in self.shadows:
            shadow.scale(self.first_rate)

    @property
    def rate(self) -> float:
        """Share of the keys that are played."""
        return self._threshold / FULL_RATE

    def play(self, drained: Drained, now_ns: int) -> None:
        """Play what passed; of what was sampled, those keys that belong to the share played here."""
        if self._threshold > threshold_of(drained.rate):
            self._tighten(threshold_of(drained.rate))
        self._fade(now_ns)
        self.accesses += drained.passed
        self.cost_s += drained.passed_cost_s
        chosen = drained.accesses[drained.accesses["hash"] < np.uint64(self._threshold)]
        for shadow in self.shadows:
            shadow.play(chosen, self.rate, now_ns)
        self._played += chosen.size
        while self._played > self.accesses_per_s:
            self._tighten(max(self._threshold // 2, LEAST_THRESHOLD))
            self._played //= 2

    def _fade(self, now_ns: int) -> None:
        passed_s = (now_ns - self._second_ns) / SECOND_NS
        if passed_s < 1.0:
            return
        self._second_ns, self._played = now_ns, 0
        kept = exp2(-passed_s / self.half_life_s)
        self.accesses *= kept
        self.cost_s *= kept
        for shadow in self.shadows:
            shadow.fade(kept)

    def _tighten(self, threshold: int) -> None:
        self._threshold = threshold
        for shadow in self.shadows:
            shadow.rule.forget(threshold)
            shadow.scale(self.rate)

    def reports(self) -> list[ShadowReport]:
        """One a shadow, in the order of sizes and rules."""
        return [
            ShadowReport(
                rule=shadow.rule.name,
                capacity_bytes=shadow.capacity_bytes,
                hit=_answered(shadow.missed, self.accesses),
                save=_answered(shadow.missed_cost_s, self.cost_s),
                blocks=shadow.rule.blocks,
            )
            for shadow in self.shadows
        ]

    def gain(self, now: int, then: int) -> Estimate:
        """Change of the saved share of cost from one shadow to another, by their places in `reports`."""
        return _change(self.shadows[now].missed_cost_s, self.shadows[then].missed_cost_s, self.cost_s)


def _answered(missed: Groups, total: float) -> Estimate:
    """Share that was not missed, and its standard error from the differences among groups; as in `curves`."""
    if total <= 0:
        return Estimate(0.0, 1.0)
    return Estimate(max(0.0, 1.0 - float(missed.sum()) / total), _error(missed, total))


def _change(now: Groups, then: Groups, total: float) -> Estimate:
    if total <= 0:
        return Estimate(0.0, 1.0)
    fewer = now - then
    return Estimate(float(fewer.sum()) / total, _error(fewer, total))


def _error(by_group: Groups, total: float) -> float:
    return float(by_group.std(ddof=1)) * sqrt(GROUPS) / total


class Lru:
    """Least recently used."""

    __slots__ = ("_order", "_capacity_pages", "_used_pages")

    def __init__(self) -> None:
        self._order: OrderedDict[int, int] = OrderedDict()  # pages by hash, least recently used first
        self._capacity_pages = 0
        self._used_pages = 0

    @property
    def name(self) -> str:
        """As in `kvctl policy`."""
        return "lru"

    @property
    def blocks(self) -> int:
        """Keys it holds."""
        return len(self._order)

    def resize(self, capacity_pages: int) -> None:
        """Hold no more than so many pages from now on."""
        self._capacity_pages = capacity_pages
        self._evict()

    def play(self, accesses: Rows, hits: U1, now_ns: int) -> None:  # noqa: ARG002 - its order is its only clock
        """Answer `accesses` in order, run by run."""
        hashes, pages = accesses["hash"].tolist(), accesses["pages"].tolist()
        runs = accesses["run"].tolist()
        begin = 0
        while begin < len(runs):
            end = begin + 1
            while end < len(runs) and runs[end] == runs[begin]:
                end += 1
            for i in range(begin, end):
                hits[i] = hashes[i] in self._order
            for i in range(end - 1, begin - 1, -1):
                self._used_pages += pages[i] - self._order.pop(hashes[i], 0)
                self._order[hashes[i]] = pages[i]
            self._evict()
            begin = end

    def forget(self, threshold: int) -> None:
        """Drop the keys at or above `threshold`."""
        for key in [key for key in self._order if key >= threshold]:
            self._used_pages -= self._order.pop(key)

    def _evict(self) -> None:
        while self._used_pages > self._capacity_pages:
            _, pages = self._order.popitem(last=False)
            self._used_pages -= pages
