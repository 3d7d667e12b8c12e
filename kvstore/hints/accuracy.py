"""How far to believe who says what will be used again. Measured by source; state of one tenant.

A source makes claims about blocks: "used within W", or "not used within W"; "used in about t" is one of these, by
whether t is near. For blocks that are sampled by their marks a claim becomes a trial, decided when the block is used or
when its time is up, so that what never comes true counts as broken.

Whether that is any good shows only beside chance. So at uses of sampled blocks the same claims, those which the source
made lately, are made about whatever block is used just then: the controls. Cases and controls see the same blocks, the
same windows and the same hours, and differ in nothing but the source's choice.

    p = kept cases / cases          b = kept controls / controls        both fade by 1/1000 with every case, so that
                                                                        they speak of the same hours
    low(p), high(b): Wilson's bounds, z = 3      (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

                      odds(low p) - odds(high b)      low p - high b
    weight = max( 0,  --------------------------  =  ------------------------------------ )
                      odds(low p) + odds(high b)      low p + high b - 2 * low p * high b

That is Yule's Q: 0 if the claims of a source come true as often as anybody's, 1 if they always do where others fail. It
does not depend on how often blocks are used at all: a source that is right four times out of five comes to weigh 0.6,
where one use in two follows and where one in twenty does. Random claims, inverted ones and one claim about everything
have p <= b, and z = 3 on both sides keeps luck out, though blocks of one request share their fate: of one source and
instant no more than four trials count. Claims that things will be used and that they will not are weighed apart.

Bounded: when trials or uses of sampled blocks become too many, half of the marks are no longer sampled, and when they
have become few, twice as many are. Which trials go has nothing to do with how they would have ended.
"""

from collections import deque
from dataclasses import dataclass
from math import sqrt
from typing import Final

from kvstore.hints.chains import Mark
from kvstore.hints.deadlines import Deadlines
from kvstore.hints.limits import HOUR_S, SAMPLED_USES, SAMPLED_USES_NS, SECOND_NS, SOURCES, TRIALS
from kvstore.hints.refusal import Refusal, Refused, is_name, shown

HORIZON_NS: Final = 600 * SECOND_NS  # of a claim without a time: 94 % of reuses come sooner (POLICIES.md, section 3)
WINDOW_NS_MIN: Final = SECOND_NS
WINDOW_NS_MAX: Final = HOUR_S * SECOND_NS
SAME_USE_NS: Final = 10**8  # what follows a claim so soon is the use that it came with
SAMPLE_SHIFT: Final = 4  # one mark in 16
SAMPLE_SHIFT_MAX: Final = 32
Z: Final = 3.0
_MIX: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1
FADE: Final = 1 - 1 / 1000
FADE_CONTROLS: Final = 1 - 1 / 4000  # with every control, lest those of a silent source grow old
TRIALS_AT_ONCE: Final = 4
SOURCES_AT_ONCE: Final = 4  # that get a control at one use
OPEN_CASES: Final = 2  # of one source about one block, so that what is repeated does not count time and again


@dataclass(frozen=True, slots=True)
class Claim:
    """What is said of a block: that it is used within so long from now, or that it is not."""

    used: bool
    within_ns: int


def reuse(used: bool, within_ns: int = HORIZON_NS) -> Claim:
    """Will it be used again, or not?"""
    return Claim(used, min(max(within_ns, WINDOW_NS_MIN), WINDOW_NS_MAX))


def next_use(after_ns: int) -> Claim | Refused:
    """It will be used in about so long.

    If that is near, the claim is a use within twice the time; if it is far, no use within a quarter of it. To claim a
    use of what is far would be no claim: whoever takes near for far would mostly be right.
    """
    if after_ns <= 0:
        return Refused(Refusal.TIME)
    return reuse(True, 2 * after_ns) if after_ns <= HORIZON_NS else reuse(False, after_ns // 4)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a source's claims of one kind. Rates count faded trials."""

    source: str
    used: bool
    cases: float
    kept: float
    controls: float
    chance_kept: float
    weight: float


class _Rate:
    """Trials that ended."""

    __slots__ = ("ended", "kept")

    def __init__(self) -> None:
        self.ended = 0.0
        self.kept = 0.0

    def fade(self, by: float) -> None:
        self.ended *= by
        self.kept *= by

    def note(self, kept: bool) -> None:
        self.ended += 1
        self.kept += kept

    def bound(self, z: float) -> float:
        """Wilson's, above (z > 0) or below what was measured; where nothing was, 1 or 0."""
        n = self.ended
        if not n:
            return 1.0 if z > 0 else 0.0
        p = self.kept / n
        spread = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return min(max((p + z * z / (2 * n) + spread) / (1 + z * z / n), 0.0), 1.0)


class _Record:
    """Claims of one kind of one source."""

    __slots__ = ("cases", "controls")

    def __init__(self) -> None:
        self.cases = _Rate()
        self.controls = _Rate()

    def note(self, control: bool, kept: bool) -> None:
        if control:
            self.controls.fade(FADE_CONTROLS)
            self.controls.note(kept)
        else:
            self.cases.fade(FADE)
            self.controls.fade(FADE)
            self.cases.note(kept)

    def weight(self) -> float:
        low, high = self.cases.bound(-Z), self.controls.bound(Z)
        return (low - high) / (low + high - 2 * low * high) if low > high else 0.0


class _Source:
    __slots__ = ("name", "records", "lately", "at_ns", "at_once")

    def __init__(self, name: str) -> None:
        self.name = name
        self.records = (_Record(), _Record())  # not used, used
        self.lately: deque[Claim] = deque(maxlen=64)
        self.at_ns = [-1, -1]  # of the latest case, and control
        self.at_once = [0, 0]  # so many of them

    def has_room(self, control: bool, at_ns: int) -> bool:
        """May another trial begin at this instant?"""
        if self.at_ns[control] != at_ns:
            self.at_ns[control], self.at_once[control] = at_ns, 0
        self.at_once[control] += 1
        return self.at_once[control] <= TRIALS_AT_ONCE


@dataclass(slots=True, eq=False)
class _Trial:
    source: _Source
    mark: Mark
    claim: Claim
    control: bool
    at_ns: int


class Accuracy:
    """What the claims of a tenant's sources are worth."""

    __slots__ = (
        "shift", "_sources", "_turns", "_open", "_trials", "_over", "_most", "_shift_least", "_uses", "_uses_since_ns",
    )  # fmt: skip

    def __init__(self, shift: int = SAMPLE_SHIFT, most_trials: int = TRIALS) -> None:
        self.shift = shift  # marks whose lowest so many bits are 0 are sampled
        self._shift_least = shift
        self._most = most_trials
        self._sources: dict[str, _Source] = {}  # the one longest silent first
        self._turns: list[_Source] = []
        self._open: dict[Mark, list[_Trial]] = {}
        self._trials = 0
        self._over: Deadlines[_Trial] = Deadlines()
        self._uses = 0
        self._uses_since_ns = 0

    @property
    def trials(self) -> int:
        """Open ones."""
        return self._trials

    def samples(self, mark: Mark) -> bool:
        """Is this block of any interest here? `predicted` and `used` do nothing for others."""
        return not mark & ((1 << self.shift) - 1)

    def predicted(self, source: str, mark: Mark, claim: Claim, at_ns: int) -> Refused | None:
        """A source has said something of a block."""
        if not is_name(source):
            return Refused(Refusal.NAME, shown(source))
        if self.samples(mark):
            self.expire(at_ns)
            known = self._source(source)
            known.lately.append(claim)
            open_cases = sum(trial.source is known and not trial.control for trial in self._open.get(mark, ()))
            if open_cases < OPEN_CASES and known.has_room(False, at_ns):
                self._begin(_Trial(known, mark, claim, False, at_ns))
        return None

    def used(self, mark: Mark, now_ns: int) -> None:
        """A block was asked for, whether it was there or not. Storing it is no use."""
        if not self.samples(mark):
            return
        self.expire(now_ns)
        self._uses += 1
        if self._uses > SAMPLED_USES:
            self._sample_less()
        for trial in self._open.get(mark, [])[:]:
            if trial.at_ns + SAME_USE_NS < now_ns:
                self._settle(trial, now_ns - trial.at_ns)
        if self._turns:
            self._control(mark, now_ns)

    def expire(self, now_ns: int) -> None:
        """End the trials whose time is up. If there was little to do lately, more marks are sampled again."""
        for trial in self._over.due(now_ns):
            self._settle(trial, None)
        if now_ns - self._uses_since_ns > SAMPLED_USES_NS:
            few = self._uses < SAMPLED_USES // 4 and self._trials < self._most // 4
            if few and self.shift > self._shift_least:
                self.shift -= 1
            self._uses, self._uses_since_ns = 0, now_ns

    def weight(self, source: str, used: bool = True) -> float:
        """0 to 1: what a source's claims are worth that blocks will be used, or that they will not."""
        known = self._sources.get(source)
        return known.records[used].weight() if known is not None else 0.0

    def standings(self) -> tuple[Standing, ...]:
        """All that is known, for a report."""
        return tuple(
            Standing(
                source.name,
                used == 1,
                record.cases.ended,
                record.cases.kept,
                record.controls.ended,
                record.controls.kept,
                record.weight(),
            )
            for source in self._sources.values()
            for used, record in enumerate(source.records)
            if record.cases.ended
        )

    def _control(self, mark: Mark, now_ns: int) -> None:
        """Have a few sources' latest claims stand for this block, too. Which ones is left to a hash: blocks of a
        request come in order, shared ones first, so to take turns would give each claim its own kind of block.
        """
        luck = (mark ^ now_ns) * _MIX & _MASK
        served = [trial.source for trial in self._open.get(mark, ()) if trial.control]
        for turn in range(min(SOURCES_AT_ONCE, len(self._turns))):
            source = self._turns[((luck >> 48) + turn) % len(self._turns)]
            claim = source.lately[(luck >> 32 & 0xFFFF) % len(source.lately)]
            if source not in served and source.has_room(True, now_ns):
                self._begin(_Trial(source, mark, claim, True, now_ns))

    def _source(self, name: str) -> _Source:
        known = self._sources.pop(name, None)
        if known is None:
            if len(self._sources) >= SOURCES:
                self._turns.remove(self._sources.pop(next(iter(self._sources))))
            known = _Source(name)
            self._turns.append(known)
        self._sources[name] = known
        return known

    def _begin(self, trial: _Trial) -> None:
        if self._trials >= self._most:
            self._sample_less()
        if self._trials < self._most and self.samples(trial.mark):
            self._open.setdefault(trial.mark, []).append(trial)
            self._over.set(trial, trial.at_ns + trial.claim.within_ns + 1)
            self._trials += 1

    def _sample_less(self) -> None:
        self._uses = 0
        if self.shift < SAMPLE_SHIFT_MAX:
            self.shift += 1
            for mark in [mark for mark in self._open if not self.samples(mark)]:
                for trial in self._open[mark][:]:
                    self._forget(trial)

    def _settle(self, trial: _Trial, after_ns: int | None) -> None:
        """The block was used so long after, or not in time."""
        self._forget(trial)
        used = after_ns is not None and after_ns <= trial.claim.within_ns
        trial.source.records[trial.claim.used].note(trial.control, used == trial.claim.used)

    def _forget(self, trial: _Trial) -> None:
        self._over.drop(trial)
        rest = self._open[trial.mark]
        rest.remove(trial)
        if not rest:
            del self._open[trial.mark]
        self._trials -= 1
