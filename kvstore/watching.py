"""What the store knows of the stream of its own keys, always on: curves of reuse, and shadows of other rules.

    LEASE   -> asked  -> a sample waits in the tap --.
    RESERVE -> reserved -> likewise                   +-- tick, a slice of 768 at a time --> curves, one a tenant and
                  ^                                   |                                      one of all
    MATCH   -> matched: what it did not find          `-----------------------------------> shadows

What MATCH did not find counts as missed when it is stored, and once (`lookups.py`); what it found, when it is leased.

A lease pays for hashing its keys, about a microsecond, and for nothing else. A tick takes in one slice or lets one
shadow play, which is half a millisecond; the first is due once a second, or when 4,096 accesses wait, the others follow
between the events of the loop. All of it, for 64 tenants, takes at most 64 MiB, most of that never touched.

Owner thread. `observe` copies what advice is made of, so that another thread can make it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp2
from typing import TYPE_CHECKING, Final

import numpy as np

from kvproto.errors import Grant
from kvproto.limits import TENANTS
from kvstore.blocks import U4, U8, Tables
from kvstore.insight.advise import Sizes
from kvstore.insight.curves import SECOND_NS, Curve, Curves, Limits
from kvstore.insight.departures import Departures
from kvstore.insight.lookups import Lookups
from kvstore.insight.reasons import Cause, Place
from kvstore.insight.shadow import ShadowReport, Shadows
from kvstore.insight.tap import POSITIONS, SEED_WORDS, TAKE_AT, sample
from kvstore.insight.trial import SHADOW_BLOCKS, TRIED, Trial
from kvstore.policies import Policies
from kvstore.ports import Clock, Randomness
from kvstore.report import ClearScope
from kvstore.rules import Rule, Tier
from kvstore.savings import prices_of
from kvstore.sessions import Namespace, Pool, Tenant
from kvstore.tier.orders import Load, Order, Outcome, Verify

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["SHADOW_BLOCKS", "TRIED", "Observed", "Watching"]

SLICE: Final = 768  # accesses of one tick, and what is left of the last run
PLAY: Final = 128  # accesses that are worth letting shadows play
PLAYED_PER_S: Final = 256  # by each shadow
_LOST: Final = {Outcome.DAMAGED: Cause.CORRUPT, Outcome.GONE: Cause.DISK_LOST}
PRICE_NS: Final = SECOND_NS  # one namespace after the other: what its blocks cost may have changed


def _nobody_hears(*_: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Observed:
    """What was observed of one tenant, or of all (empty), as it was at one moment."""

    tenant: str
    watched: bool  # False: curves are off, nothing was asked yet, or the tenant is beyond those that are observed
    sizes: Sizes
    curve: Curve | None
    asked: float  # blocks, in the span of the curve
    found: float  # of those
    lost: int  # sampled accesses for which there was no room, of all
    rule: str  # that DRAM goes by
    shadows: tuple[ShadowReport, ...]  # of all tenants together
    shadow_span_s: float


@dataclass(slots=True)
class _Really:
    """What happened, to be held against what curves say; it fades as they do."""

    asked: float = 0.0
    found: float = 0.0


class Watching:
    """Curves and shadows of one store."""

    def __init__(
        self, tables: Tables, clock: Clock, randomness: Randomness, dram_bytes: int, known: Mapping[str, Tenant], *,
        on: bool = True, limits: Limits | None = None, tenants: int = TENANTS, traces: U8 | None = None,
    ) -> None:  # fmt: skip
        """`known`: all tenants; `tenants`: so many of them are observed, the first that came; `on` False: nobody is.

        `traces`: as `Departures` has them.
        """
        self.on = on
        self.missed: Callable[[Namespace, U8, int, int], None] = _nobody_hears  # `Misses`, of what was not there
        self.departures = Departures(tables, clock, randomness, traces)
        self.limits = limits or Limits()
        self.curves = Curves([randomness.word() for _ in range(SEED_WORDS)], tenants, clock.now_ns(), self.limits)
        self.shadows = Shadows(
            [_trial(rule) for rule in TRIED],
            (dram_bytes,),
            clock.now_ns(),
            accesses_per_s=PLAYED_PER_S,
            half_life_s=self.limits.half_life_s,
            blocks_most=SHADOW_BLOCKS,
        )
        self._clock = clock
        self._known = known
        self._tenants = tenants
        self._words: U8 = self.curves.tap.words
        self._lookups = Lookups(self._words[:4])
        self._followed: dict[int, Namespace] = {}
        self._really = [_Really() for _ in range(1 + tenants)]
        self._due_ns = 0  # when what waits is to be taken in; 0: nothing waits
        self._behind = False  # there is more to do at once:
        self._left = False  # more than a slice waited at the last tick,
        self._playing = False  # or shadows have not played all yet
        self._faded_ns = self._price_ns = clock.now_ns()
        self._pricing: Iterator[int] = iter(())
        self._prices: dict[int, tuple[float, float]] = {}

    # -- the hot path --------------------------------------------------------------------------------------------

    def asked(self, namespace: Namespace, keys: U8, at: int, count: int, found: int, first_s: float = 0.0) -> None:
        """A LEASE asked for these keys, in order, and got the first `found` of them.

        `first_s`: what computing the first takes, which tells where in its chain it lies; 0.0: nobody knows.
        """
        if found < count:
            first, missing = at + 4 * found, count - found
            untold = self._lookups.leased(namespace.number, keys, first, missing, self._clock.now_ns() // SECOND_NS)
            if untold:
                self.missed(namespace, keys, first, untold)
        if self._followed.get(namespace.number) is not namespace and not self._follow(namespace):
            return
        really = self._really[namespace.tenant.number + 1]
        really.asked += count
        really.found += found
        self._pass(namespace, keys, at, count, self._position(namespace, first_s), stored=0)

    def fell_short(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """A LEASE, which `asked` has told of, was promised these keys, and they have not come in time."""
        self._lookups.leased(namespace.number, keys, at, count, self._clock.now_ns() // SECOND_NS)
        self.missed(namespace, keys, at, count)
        if namespace.tenant.number < self._tenants:
            really = self._really[namespace.tenant.number + 1]
            really.found = max(0.0, really.found - count)

    def matched(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """A MATCH did not find these keys, and nobody is writing them."""
        now_s = self._clock.now_ns() // SECOND_NS
        untold = self._lookups.matched(namespace.number, keys, at, count, now_s)
        if untold:
            self.missed(namespace, keys, at, untold)

    def reserved(
        self, namespace: Namespace, keys: U8, at: int, count: int, grants: U4, first_s: float = 0.0, *,
        by_client: bool = True,
    ) -> None:  # fmt: skip
        """A RESERVE was for these keys, in order; so it was answered. `first_s` as above. Not `by_client`: they came
        from beyond this host.
        """
        self.departures.look(self._known.values())
        if grants[:count].max(initial=0) > Grant.NO_PARENT:
            self.departures.refused(namespace, keys, at, count, grants)
        begin = end = 0
        if by_client:
            now_s = self._clock.now_ns() // SECOND_NS
            begin, end = self._lookups.reserved(namespace.number, keys, at, count, grants, now_s)
        if self._followed.get(namespace.number) is not namespace and not self._follow(namespace):
            return
        first = self._position(namespace, first_s)
        if begin:
            self._pass(namespace, keys, at, begin, first, stored=1)
        if end > begin:
            self._really[namespace.tenant.number + 1].asked += end - begin
            self._pass(namespace, keys, at + 4 * begin, end - begin, first + begin, stored=0)
        if count > end:
            self._pass(namespace, keys, at + 4 * end, count - end, first + end, stored=1)

    def _position(self, namespace: Namespace, first_s: float) -> int:
        """Where in its chain a block lies that takes so long to compute: prices grow evenly along it."""
        cost_s, slope_s = self._prices[namespace.number]
        if slope_s <= 0.0 or first_s <= cost_s:
            return 0
        return round(min((first_s - cost_s) / slope_s, POSITIONS - 1.0))

    def _pass(self, namespace: Namespace, keys: U8, at: int, count: int, first: int, *, stored: int) -> None:
        """Let a run pass the tap, of which the first key lies at position `first` of its chain."""
        if sample(keys, at, count, namespace.number, first, stored, self._words) >= TAKE_AT:
            self._behind = True
        elif not self._due_ns:
            self._due_ns = self._clock.now_ns() + SECOND_NS

    def _follow(self, namespace: Namespace) -> bool:
        """Begin to observe a namespace; False if it is not to be. A number may have been another one's before."""
        if not self.on or namespace.tenant.number >= self._tenants:
            return False
        self._followed[namespace.number] = namespace
        self.curves.open(namespace.number, namespace.tenant.number + 1, namespace.slot_bytes)
        self._prices.pop(namespace.number, None)
        self._price(namespace)
        return True

    # -- what leaves ---------------------------------------------------------------------------------------------

    def abandoned(self, row: int) -> None:
        """A block that is being written will never be whole."""
        self.departures.row_left(row, Cause.ABANDONED)

    def changed(self, row: int) -> None:
        """A published block in memory is not what it was, and about to be dropped."""
        self.departures.row_left(row, Cause.CORRUPT)

    def finished(self, batch: Sequence[Order]) -> None:
        """Orders were carried out: note the blocks that were found damaged, or not found."""
        if isinstance(batch[0], Load | Verify):
            for order in batch:
                if order.outcome in _LOST:
                    self._lost(order, _LOST[order.outcome])

    def _lost(self, order: Order, cause: Cause) -> None:
        if isinstance(order, Load):
            key = np.frombuffer(order.key, dtype=np.uint64).copy()
            self.departures.key_left(order.namespace.number, key, cause, Place.DISK)
        elif isinstance(order, Verify):
            self.departures.row_left(order.row, cause)

    def cleared(self, scope: ClearScope, namespaces: Iterable[Namespace]) -> None:
        """An operator has cleared something."""
        chosen = [
            one
            for one in namespaces
            if scope.tenant in (None, one.tenant.name) and scope.digest in (None, one.digest)
        ]  # fmt: skip
        keys = np.frombuffer(b"".join(scope.keys), dtype=np.uint64).copy() if scope.keys else None
        self.departures.cleared(chosen, keys)

    def choosing(self, tier: Tier, tenant: str | None, policies: Policies, pools: Iterable[Pool]) -> None:
        """A rule is about to be chosen: note by which one pools went until now."""
        concerned = policies.concerned(tier, tenant, pools)
        self.departures.chosen((pool.number, policies.rule_of(tier, pool.tenant.name).value) for pool in concerned)

    # -- time ----------------------------------------------------------------------------------------------------

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once; None if nothing waits."""
        if self._behind:
            return 0
        return self._due_ns or None

    def tick(self, now_ns: int) -> None:
        """Take in a slice of what waits, if it is time."""
        if not self._behind and not (self._due_ns and now_ns >= self._due_ns):
            return
        if self._playing:  # a slice of this tick was taken in before
            self._playing = self.shadows.step(now_ns)
            self._behind = self._playing or self._left or self.curves.due
            return
        self._take_in(now_ns)
        self._fade(now_ns)
        if now_ns - self._price_ns >= PRICE_NS:
            self._price_ns = now_ns
            self._price_next()

    def _take_in(self, now_ns: int) -> None:
        """One slice."""
        self.shadows.add(self.curves.drain(now_ns, SLICE), now_ns)
        self._due_ns = 0
        self._left = self.curves.tap.waiting > 0
        self._playing = self.shadows.waiting >= PLAY or (self.shadows.waiting > 0 and not self._left)
        self._behind = self._playing or self._left

    def _fade(self, now_ns: int) -> None:
        passed_s = (now_ns - self._faded_ns) / SECOND_NS
        if passed_s < 1.0:
            return
        self._faded_ns = now_ns
        kept = exp2(-passed_s / self.limits.half_life_s)
        for really in self._really:
            really.asked *= kept
            really.found *= kept

    def _price_next(self) -> None:
        """Look what blocks of one more namespace cost now."""
        number = next(self._pricing, None)
        if number is None:
            self._pricing = iter(list(self._followed))
            number = next(self._pricing, None)
        if number is not None:
            self._price(self._followed[number])

    def _price(self, namespace: Namespace) -> None:
        prices = (namespace.recompute_ns * 1e-9, 0.0)
        if namespace.profile is not None:
            known = prices_of(namespace.profile, 0)
            prices = (known.first_seconds, known.slope_seconds)
        if prices != self._prices.get(namespace.number):
            self._prices[namespace.number] = prices
            self.curves.tap.price(namespace.number, *prices)

    # -- asking --------------------------------------------------------------------------------------------------

    def observe(self, tenant: Tenant | None, sizes: Sizes, rule: str) -> Observed:
        """What is known of a tenant, or of all; `sizes` and `rule`: those that it has now."""
        stream = 0 if tenant is None else tenant.number + 1
        now_ns = self._clock.now_ns()
        if not self._playing and self.curves.tap.waiting:
            self._take_in(now_ns)  # so that what was asked just now counts, unless it is much
        curve = self.curves.curve(stream, now_ns) if self.curves.follows(stream) else None
        mine = self._really[1:] if tenant is None else self._really[stream : stream + 1]
        return Observed(
            tenant=tenant.name if tenant else "",
            watched=self.on and curve is not None and curve.accesses > 0,
            sizes=sizes,
            curve=curve,
            asked=sum(really.asked for really in mine),
            found=sum(really.found for really in mine),
            lost=self.curves.tap.lost,
            rule=rule,
            shadows=tuple(self.shadows.reports(rule)) if tenant is None else (),
            shadow_span_s=self.shadows.span_s,
        )

    @property
    def held_bytes(self) -> int:
        """Memory of all arrays, as if every page of them were touched."""
        return self.curves.held_bytes + self.shadows.held_bytes + self.departures.held_bytes + self._lookups.held_bytes


def _trial(rule: Rule) -> Callable[[], Trial]:
    return lambda: Trial(rule)
