"""Advice: numbers that follow from a curve known in advance, and sentences that say no more than the numbers."""

from dataclasses import replace

import numpy as np
import pytest

from kvproto.limits import GIB, PAGE_BYTES
from kvstore.insight.advise import Doubt, Sizes, TierName, advise, sentences
from kvstore.insight.curves import Curve
from kvstore.insight.stack import BINS, BINS_PER_OCTAVE, COLD, GROUPS

ACCESSES = 1_000_000.0


def curve_of(hits_at_bytes: dict[int, float], *, cost_s: float = 2.0, span_s: float = 3600.0) -> Curve:
    """A curve with this share of accesses, never less exact than its bins, at these distances; the rest is cold."""
    hits = np.zeros((GROUPS, BINS + 1))
    for size_bytes, share in hits_at_bytes.items():
        into = int(np.log2(size_bytes / PAGE_BYTES) * BINS_PER_OCTAVE)
        hits[:, into] += share * ACCESSES / GROUPS
    hits[:, COLD] = ACCESSES / GROUPS - hits.sum(axis=1)
    return Curve(
        hits=hits, saved=cost_s * hits, accesses=ACCESSES, cost_s=cost_s * ACCESSES, span_s=span_s,
        rate=0.01, keys=20_000, footprint_bytes=1024.0 * GIB,
    )  # fmt: skip


STEPS = {16 * GIB: 0.30, 48 * GIB: 0.004, 96 * GIB: 0.071, 600 * GIB: 0.10}
NOW = Sizes(64 * GIB)


def test_more_memory_brings_what_lies_between_the_two_sizes_and_less_costs_it() -> None:
    advice = advise(curve_of(STEPS), NOW, (64 * GIB, -32 * GIB))
    more, less = advice.changes
    assert more.hit.share == pytest.approx(0.071)
    assert less.hit.share == pytest.approx(-0.004)
    asked_s_per_min = 60 * 2.0 * ACCESSES / 3600
    assert more.prefill_s_per_min == pytest.approx(0.071 * asked_s_per_min)
    assert less.prefill_s_per_min == pytest.approx(-0.004 * asked_s_per_min)
    assert advice.hit.share == pytest.approx(0.304)
    assert advice.hit_ceiling.share == pytest.approx(0.475)
    assert advice.prefill_s_per_min + advice.saved_s_per_min == pytest.approx(asked_s_per_min)
    assert advice.savable_s_per_min == pytest.approx(0.171 * asked_s_per_min)


def test_sentences_read_as_an_operator_would_say_them() -> None:
    curve = curve_of(STEPS, cost_s=577 / 60 / (ACCESSES / 3600))
    lines = sentences(advise(curve, NOW, (64 * GIB, -32 * GIB, 1 << 30)))
    assert lines == (
        "Now, 64 GiB of DRAM: 30.4 % of blocks asked for are there; 175 s of prefill saved a minute (as LRU would do).",
        (
            "Without limit: 47.5 %, +17.1 points, 99 s of prefill a minute. "
            "No size brings more: nobody had asked for the rest before."
        ),
        "+64 GiB of DRAM: +7.1 points (±0.0), 41 s of prefill a minute.",
        "-32 GiB of DRAM: costs 0.4 points (±0.0), 2.3 s of prefill a minute.",
        "+1 GiB of DRAM: no difference.",
    )


def test_without_prices_nothing_is_said_of_prefill() -> None:
    lines = sentences(advise(curve_of(STEPS, cost_s=0.0), NOW, (64 * GIB,)))
    assert not any("prefill" in line for line in lines)
    assert lines[-1] == "+64 GiB of DRAM: +7.1 points (±0.0)."


def test_dram_above_a_disk_saves_reads_and_disk_saves_prefill() -> None:
    advice = advise(curve_of(STEPS), Sizes(64 * GIB, 256 * GIB), (64 * GIB,), (512 * GIB,))
    dram, disk = advice.changes
    assert (dram.tier, disk.tier) == (TierName.DRAM, TierName.DISK)
    assert dram.hit.share == pytest.approx(0.071), "now found on disk"
    assert dram.prefill_s_per_min == pytest.approx(0.0)
    assert disk.hit.share == pytest.approx(0.10)
    assert disk.prefill_s_per_min > 0
    lines = sentences(advice)
    assert lines[0].startswith(
        "Now, 64 GiB of DRAM and 256 GiB of disk: 37.5 % of blocks asked for are there, 30.4 % in"
    )
    assert lines[3].startswith("+512 GiB of disk: +10.0 points")


def test_a_sample_too_small_says_only_that() -> None:
    good = curve_of(STEPS)
    uneven = np.zeros((GROUPS, BINS + 1))
    uneven[0, COLD] = ACCESSES / 2
    cases = {
        Doubt.SHORT: (replace(good, span_s=120.0), "Too early to say: 2 min observed, 10 min wanted."),
        Doubt.FEW: (replace(good, keys=40), "Too early to say: 40 keys sampled, 256 wanted."),
        Doubt.VAGUE: (
            replace(good, hits=uneven),
            "Too early to say: sampled keys differ too much: 50.0 points of standard error.",
        ),
    }
    for doubt, (curve, line) in cases.items():
        advice = advise(curve, NOW, (GIB,))
        assert advice.doubt is doubt
        assert sentences(advice) == (line,)


def test_a_change_within_its_error_is_not_claimed() -> None:
    curve = curve_of(STEPS)
    chance = np.random.default_rng(1).normal(1.0, 0.5, GROUPS)
    into = int(np.log2(96 * GIB / PAGE_BYTES) * BINS_PER_OCTAVE)
    hits = curve.hits.copy()
    hits[:, into] = 0.01 * ACCESSES / GROUPS * np.where(chance > 1, 8.0, 0.0)
    (change,) = advise(replace(curve, hits=hits), NOW, (64 * GIB,)).changes
    assert not change.measurable or change.hit.share > 2 * change.hit.error
    hits[:, into] = 0.0
    hits[0, into] = 0.01 * ACCESSES
    advice = advise(replace(curve, hits=hits), NOW, (64 * GIB,))
    assert not advice.changes[0].measurable
    assert sentences(advice)[-1] == "+64 GiB of DRAM: no difference that this sample can show (below 2.0 points)."


def test_memory_cannot_shrink_below_nothing() -> None:
    with pytest.raises(AssertionError, match="less than nothing"):
        advise(curve_of(STEPS), NOW, (-65 * GIB,))
