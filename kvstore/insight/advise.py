"""Curves as advice: what more memory would bring, what less would cost, and whether the sample can tell.

Values first, sentences from them; nothing is said that the values do not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvproto.limits import GIB, MIB
from kvstore.insight.curves import Curve, Estimate
from kvstore.insight.shadow import BLOCKS_WANTED, ShadowReport

KEYS_WANTED: Final = 256  # sampled and remembered: sizes are then known to 6 %
ERROR_WANTED: Final = 0.03  # standard error of the hit share now
SPAN_WANTED_S: Final = 600.0  # shorter, nearly everything is new
NOTHING: Final = 0.0005  # shares below this print as 0.0 points


class Doubt(StrEnum):
    """Why a curve says nothing yet."""

    NONE = "none"
    SHORT = "short"  # observed for too short a time
    FEW = "few"  # too few keys sampled
    VAGUE = "vague"  # the sampled keys differ too much


class TierName(StrEnum):
    """The memory that an operator can buy."""

    DRAM = "DRAM"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Memory as it is. Disk holds what DRAM had no room for; 0: there is no disk tier."""

    dram_bytes: int
    disk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What another size of one tier would bring.

    Hits in DRAM, or for disk in either tier. Prefill is what neither tier has, so DRAM above a large disk saves little
    of it: it saves reads.
    """

    tier: TierName
    delta_bytes: int
    hit: Estimate
    prefill_s_per_min: float  # saved; negative: to be computed in addition
    prefill_error: float
    measurable: bool  # beyond two standard errors


@dataclass(frozen=True, slots=True)
class RuleTrial:
    """What a rule would do at the size there is, beside the one in force."""

    rule: str
    in_force: bool
    hit: Estimate
    hit_gain: Estimate  # over the rule in force, or the first that is tried
    prefill_s_per_min: float  # saved beyond it
    prefill_error: float
    measurable: bool  # beyond two standard errors, after long enough, with blocks enough
    blocks: int


@dataclass(frozen=True, slots=True)
class Advice:
    """All that a curve says of a store or of one tenant."""

    sizes: Sizes
    doubt: Doubt
    span_s: float
    keys: int
    rate: float
    dram_hit: Estimate
    hit: Estimate  # in either tier
    hit_ceiling: Estimate
    prefill_s_per_min: float  # to be computed now, by this model
    saved_s_per_min: float  # not computed, since it was kept
    savable_s_per_min: float  # that a cache without limit would save beyond that
    priced: bool  # whether any client told what prefill costs
    changes: tuple[Change, ...]


def advise(
    curve: Curve, sizes: Sizes, dram_deltas_bytes: Sequence[int] = (), disk_deltas_bytes: Sequence[int] = ()
) -> Advice:
    """Read a curve at the sizes there are and at those that there might be. None may fall below 0."""
    both_bytes = sizes.dram_bytes + sizes.disk_bytes
    saved, ceiling = curve.save(both_bytes).share, curve.save_ceiling.share
    per_min = 60.0 * curve.cost_s_per_s
    changes = [_change(curve, sizes, TierName.DRAM, delta) for delta in dram_deltas_bytes]
    changes += [_change(curve, sizes, TierName.DISK, delta) for delta in disk_deltas_bytes]
    return Advice(
        sizes=sizes,
        doubt=_doubt(curve, sizes),
        span_s=curve.span_s,
        keys=curve.keys,
        rate=curve.rate,
        dram_hit=curve.hit(sizes.dram_bytes),
        hit=curve.hit(both_bytes),
        hit_ceiling=curve.hit_ceiling,
        prefill_s_per_min=per_min * (1.0 - saved),
        saved_s_per_min=per_min * saved,
        savable_s_per_min=per_min * (ceiling - saved),
        priced=curve.cost_s > 0,
        changes=tuple(changes),
    )


def _change(curve: Curve, sizes: Sizes, tier: TierName, delta_bytes: int) -> Change:
    before_bytes = sizes.dram_bytes + (sizes.disk_bytes if tier is TierName.DISK else 0)
    both_bytes = sizes.dram_bytes + sizes.disk_bytes
    assert delta_bytes >= -(sizes.disk_bytes if tier is TierName.DISK else sizes.dram_bytes), "less than nothing"
    hit = curve.hit_gain(before_bytes, before_bytes + delta_bytes)
    saved = curve.save_gain(both_bytes, both_bytes + delta_bytes)
    per_min = 60.0 * curve.cost_s_per_s
    return Change(
        tier=tier,
        delta_bytes=delta_bytes,
        hit=hit,
        prefill_s_per_min=per_min * saved.share,
        prefill_error=per_min * saved.error,
        measurable=abs(hit.share) > 2 * hit.error,
    )


def _doubt(curve: Curve, sizes: Sizes) -> Doubt:
    if curve.span_s < SPAN_WANTED_S:
        return Doubt.SHORT
    if curve.keys < KEYS_WANTED:
        return Doubt.FEW
    if max(curve.hit(sizes.dram_bytes).error, curve.hit_ceiling.error) > ERROR_WANTED:
        return Doubt.VAGUE
    return Doubt.NONE


def try_rules(
    reports: Sequence[ShadowReport], in_force: str, span_s: float, cost_s_per_min: float
) -> tuple[RuleTrial, ...]:
    """Shadows against the rule in force. `cost_s_per_min`: prefill that is asked for, hits included."""
    return tuple(
        RuleTrial(
            rule=one.rule,
            in_force=one.rule == in_force,
            hit=one.hit,
            hit_gain=one.hit_gain,
            prefill_s_per_min=cost_s_per_min * one.save_gain.share if cost_s_per_min else 0.0,
            prefill_error=cost_s_per_min * one.save_gain.error if cost_s_per_min else 0.0,
            measurable=_is_told(one, span_s),
            blocks=one.blocks,
        )
        for one in reports
    )


def _is_told(report: ShadowReport, span_s: float) -> bool:
    gain = report.hit_gain
    long_enough = span_s >= SPAN_WANTED_S and report.blocks >= BLOCKS_WANTED
    return long_enough and abs(gain.share) > max(2 * gain.error, NOTHING)


# -- sentences --------------------------------------------------------------------------------------------------


def sentences(advice: Advice, really: float | None = None, rules: Sequence[RuleTrial] = ()) -> tuple[str, ...]:
    """Advice for people, one sentence a line. `really`: the share of blocks that were there when asked for."""
    if advice.doubt is not Doubt.NONE:
        return (_say_doubt(advice),)
    lines = [_say_now(advice, really), _say_ceiling(advice)]
    lines += [_say_change(change, priced=advice.priced) for change in advice.changes]
    lines += [_say_rule(tried, priced=advice.priced) for tried in rules if tried.measurable and not tried.in_force]
    if rules and not any(tried.measurable for tried in rules):
        lines.append("Other rules: no difference that this sample can show yet.")
    return tuple(lines)


def _say_rule(tried: RuleTrial, *, priced: bool) -> str:
    gain = tried.hit_gain
    text = f"Rule {tried.rule}: {_signed(gain.share)} points (±{_points(gain.error)}) in DRAM"
    if priced:
        sign = "saves" if tried.prefill_s_per_min >= 0 else "costs"
        text += f", {sign} {_seconds(abs(tried.prefill_s_per_min))} of prefill a minute"
    return text + "."


def _say_doubt(advice: Advice) -> str:
    match advice.doubt:
        case Doubt.SHORT:
            reason = f"{_duration(advice.span_s)} observed, {_duration(SPAN_WANTED_S)} wanted"
        case Doubt.FEW:
            reason = f"{advice.keys} keys sampled, {KEYS_WANTED} wanted"
        case _:
            error = max(advice.dram_hit.error, advice.hit_ceiling.error)
            reason = f"sampled keys differ too much: {_points(error)} points of standard error"
    return f"Too early to say: {reason}."


def _say_now(advice: Advice, really: float | None) -> str:
    sizes = f"{_size(advice.sizes.dram_bytes)} of DRAM"
    if advice.sizes.disk_bytes:
        sizes += f" and {_size(advice.sizes.disk_bytes)} of disk"
    text = f"Now, {sizes}: {_percent(advice.hit)} of blocks asked for are there"
    if advice.sizes.disk_bytes:
        text += f", {_percent(advice.dram_hit)} in DRAM"
    if advice.priced:
        text += f"; {_seconds(advice.saved_s_per_min)} of prefill saved a minute"
    text += " (as LRU would do"
    return text + (")." if really is None else f"; really {100 * really:.1f} %).")


def _say_ceiling(advice: Advice) -> str:
    beyond = advice.hit_ceiling.share - advice.hit.share
    text = f"Without limit: {_percent(advice.hit_ceiling)}, {_signed(beyond)} points"
    if advice.priced:
        text += f", {_seconds(advice.savable_s_per_min)} of prefill a minute"
    return text + ". No size brings more: nobody had asked for the rest before."


def _say_change(change: Change, *, priced: bool) -> str:
    what = f"{'-' if change.delta_bytes < 0 else '+'}{_size(abs(change.delta_bytes))} of {change.tier}"
    if abs(change.hit.share) < NOTHING and change.hit.error < NOTHING:
        return f"{what}: no difference."
    if not change.measurable:
        return f"{what}: no difference that this sample can show (below {_points(2 * change.hit.error)} points)."
    sign = "costs " if change.delta_bytes < 0 else "+"
    text = f"{what}: {sign}{_points(abs(change.hit.share))} points (±{_points(change.hit.error)})"
    if priced:
        text += f", {_seconds(abs(change.prefill_s_per_min))} of prefill a minute"
    return text + "."


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.share:.1f} %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.4g} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.4g} MiB"
