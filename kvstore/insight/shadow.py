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
from kvstore.insight.tap import ACCESS, FULL_RATE, threshold_of

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

    @property
    def held_bytes(self) -> int:
        """Memory that it takes."""

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
    hit_gain: Estimate  # change of the hit share from the first shadow of the same size, or the one asked for
    save_gain: Estimate  # likewise, of the saved share of cost


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

    `accesses_per_s` bounds what they cost: that many calls of each rule a second. Above it, half the keys go. It bounds
    what one `step` takes as well: so many accesses of one rule.
    """

    rules: Sequence[Callable[[], Rule]]
    capacities_bytes: Sequence[int]
    now_ns: int
    first_rate: float = 1 / 64
    accesses_per_s: int = 1000
    half_life_s: float = 2 * 3600.0
    blocks_most: int = 4096  # of one shadow; with more, fewer keys are played
    accesses: float = 0.0
    cost_s: float = 0.0
    shadows: list[Shadow] = field(init=False)
    _begun_ns: int = field(init=False)
    _threshold: int = field(init=False)
    _second_ns: int = field(init=False)
    _played: int = field(init=False, default=0)  # in this second
    _waiting: list[Rows] = field(init=False, default_factory=list)
    _batch: Rows = field(init=False)
    _turn: int = field(init=False, default=0)  # of the shadow that plays the batch next

    def __post_init__(self) -> None:
        self._threshold = threshold_of(self.first_rate)
        self._second_ns = self._begun_ns = self.now_ns
        self._batch = np.empty(0, dtype=ACCESS)
        self.shadows = [Shadow(rule(), size) for size in self.capacities_bytes for rule in self.rules]
        for shadow in self.shadows:
            shadow.scale(self.first_rate)

    @property
    def rate(self) -> float:
        """Share of the keys that are played."""
        return self._threshold / FULL_RATE

    @property
    def span_s(self) -> float:
        """For how long they have been played with as many keys as now."""
        return (self._second_ns - self._begun_ns) / SECOND_NS

    @property
    def held_bytes(self) -> int:
        """Memory of all shadows."""
        return sum(shadow.rule.held_bytes for shadow in self.shadows)

    def play(self, drained: Drained, now_ns: int) -> None:
        """Play what passed; of what was sampled, those keys that belong to the share played here."""
        self.add(drained, now_ns)
        while self.step(now_ns):
            pass

    def add(self, drained: Drained, now_ns: int) -> None:
        """Have something to play, which `step` does."""
        if self._threshold > threshold_of(drained.rate):
            self._tighten(threshold_of(drained.rate))
        self._fit(drained.accesses)
        self._fade(now_ns)
        chosen = self._chosen(drained.accesses)
        while chosen.size > self.accesses_per_s and self._threshold > LEAST_THRESHOLD:
            self._tighten(max(self._threshold // 2, LEAST_THRESHOLD))
            chosen = self._chosen(chosen)
        chosen = chosen[: self.accesses_per_s]  # a few keys asked for over and over cannot be thinned out
        self.accesses += drained.passed
        self.cost_s += drained.passed_cost_s
        self._played += chosen.size
        if chosen.size:
            self._waiting.append(chosen)
        while self._played > self.accesses_per_s:
            self._tighten(max(self._threshold // 2, LEAST_THRESHOLD))
            self._played //= 2

    def _chosen(self, accesses: Rows) -> Rows:
        return accesses[accesses["hash"] < np.uint64(self._threshold)]

    def step(self, now_ns: int) -> bool:
        """Let one shadow play what waits. True: there is more to do."""
        if self._turn == 0:
            if not self._waiting:
                return False
            self._batch = self._chosen(np.concatenate(self._waiting))
            self._waiting = []
        self.shadows[self._turn].play(self._batch, self.rate, now_ns)
        self._turn = (self._turn + 1) % len(self.shadows)
        return bool(self._turn or self._waiting)

    @property
    def waiting(self) -> int:
        """Accesses that wait to be played."""
        return sum(chosen.size for chosen in self._waiting)

    def _fit(self, accesses: Rows) -> None:
        """Play no more keys than make shadows of `blocks_most`."""
        if not accesses.size:
            return
        blocks_in_all = max(self.capacities_bytes, default=0) / (PAGE_BYTES * float(accesses["pages"].mean()))
        while blocks_in_all * self.rate > 2 * self.blocks_most and self._threshold > LEAST_THRESHOLD:
            self._tighten(max(self._threshold // 2, LEAST_THRESHOLD))

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
        if not all(shadow.rule.blocks for shadow in self.shadows):
            self._begin_anew()

    def _begin_anew(self) -> None:
        """Rules that forget everything begin empty: then all count from now on, or they could not be compared."""
        self.accesses = self.cost_s = 0.0
        self._waiting, self._turn, self._begun_ns = [], 0, self._second_ns
        for shadow in self.shadows:
            shadow.fade(0.0)

    def reports(self, rule: str = "") -> list[ShadowReport]:
        """One a shadow, in the order of sizes and rules; gains are over `rule`, or the first one where it is not."""
        return [self._report(shadow, rule) for shadow in self.shadows]

    def _report(self, shadow: Shadow, rule: str) -> ShadowReport:
        alike = [one for one in self.shadows if one.capacity_bytes == shadow.capacity_bytes]
        base = next((one for one in alike if one.rule.name == rule), alike[0])
        return ShadowReport(
            rule=shadow.rule.name,
            capacity_bytes=shadow.capacity_bytes,
            hit=_answered(shadow.missed, self.accesses),
            save=_answered(shadow.missed_cost_s, self.cost_s),
            blocks=shadow.rule.blocks,
            hit_gain=_change(base.missed, shadow.missed, self.accesses),
            save_gain=_change(base.missed_cost_s, shadow.missed_cost_s, self.cost_s),
        )

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

    @property
    def held_bytes(self) -> int:
        """About 150 bytes a key."""
        return 150 * len(self._order)

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
