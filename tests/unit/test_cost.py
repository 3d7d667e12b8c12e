"""Costs learned from reports: close to the truth, monotone, never NaN, whatever a few reports say."""

import math
import random
from collections.abc import Callable, Sequence
from time import thread_time
from timeit import repeat

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import (
    PREFILL_SECONDS_MAX,
    TOKENS_MAX,
    Bandwidth,
    PrefillProfile,
    Refusal,
    load_seconds,
)
from kvstore.fitting import HALF_LIFE, WINDOW, Fit, Timings, fit_costs
from kvstore.tier.format import FormatError

Truth = Callable[[float, float], float]
Report = tuple[int, int, float]
QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=20)

TOKENS = st.integers(0, TOKENS_MAX)
NEW = st.integers(1, TOKENS_MAX)
REPORTS = st.lists(st.tuples(TOKENS, NEW, st.floats(1e-6, PREFILL_SECONDS_MAX)), min_size=1, max_size=40)


def transformer(cached: float, new: float) -> float:
    """A model of 8 B parameters on one accelerator, more or less."""
    return 0.012 + 4e-5 * new + 2e-9 * new * (cached + new / 2)


def stepped(cached: float, new: float) -> float:
    """What the fit cannot say: up to 512 tokens a pass takes as long as one, as where memory is the limit."""
    return 0.02 + 4e-5 * max(new, 512.0) + 2e-9 * new * (cached + new / 2)


def prefills(count: int, seed: int, truth: Truth = transformer, noise: float = 0.03) -> list[Report]:
    chance = random.Random(seed)
    reports = []
    for _ in range(count):
        cached = chance.choice([0, 1]) * int(2 ** chance.uniform(5, 16))
        new = int(2 ** chance.uniform(4, 14))
        reports.append((cached, new, truth(cached, new) * math.exp(chance.gauss(0, noise))))
    return reports


def learned(reports: list[Report], block_tokens: int = 16) -> PrefillProfile:
    profile = PrefillProfile(block_tokens)
    for cached, new, seconds in reports:
        assert profile.report(cached, new, seconds) is None
    profile.settle()
    return profile


def answer(profile: PrefillProfile, cached: int, new: int) -> float:
    seconds = profile.seconds(cached, new)
    assert seconds is not None
    return seconds


def worst(profile: PrefillProfile, truth: Truth = transformer) -> float:
    """The largest error as a natural logarithm, where `prefills` has been."""
    places = [(cached, new) for cached in (0, 100, 700, 5000, 40_000) for new in (20, 90, 500, 1500, 7000, 15_000)]
    return max(abs(math.log(answer(profile, *place) / truth(*place))) for place in places)


# -- prefill profile ---------------------------------------------------------------------------------------------


def test_a_profile_without_reports_knows_nothing() -> None:
    profile = PrefillProfile(16)
    assert profile.seconds(0, 100) is None
    assert profile.seconds(0, 0) is None
    assert profile.recompute_seconds_of_blocks(0, 4) is None
    assert profile.costs == (0.0, 0.0, 0.0)
    profile.report(0, 100, 0.1)
    assert profile.seconds(0, 100) is not None, "one report is enough"
    assert profile.seconds(0, 0) == 0.0


def test_after_one_report_cost_grows_with_the_tokens() -> None:
    profile = learned([(0, 1000, 0.1)])
    assert answer(profile, 0, 1000) == pytest.approx(0.1, rel=1e-3)
    assert answer(profile, 0, 4000) == pytest.approx(0.4, rel=0.02)
    assert answer(profile, 0, 4000) != pytest.approx(0.1, rel=0.5)


@pytest.mark.parametrize(("truth", "error"), [(transformer, 0.03), (stepped, 0.13)])
def test_answers_are_close_to_the_truth_where_prefills_were_seen(truth: Truth, error: float) -> None:
    assert worst(learned(prefills(600, 1, truth)), truth) < error
    assert worst(learned(prefills(600, 1)), lambda cached, new: 2 * transformer(cached, new)) > 0.5, "the control"


def test_the_table_knows_what_the_fit_cannot_say() -> None:
    profile = learned(prefills(600, 1, stepped))
    a, b, c = profile.costs
    fitted = a + b * 300 + c * 300 * 150
    assert abs(math.log(fitted / stepped(0, 300))) > 0.1
    assert abs(math.log(answer(profile, 0, 300) / stepped(0, 300))) < 0.05


def test_where_nothing_was_seen_the_fit_answers() -> None:
    short = [report for report in prefills(600, 2) if report[0] + report[1] < 20_000]
    profile = learned(short)
    a, b, c = profile.costs
    assert (a, b, c) == pytest.approx((0.012, 4e-5, 2e-9), rel=0.3)
    for cached, new in ((0, 200_000), (500_000, 1000), (100_000, 100_000)):
        assert answer(profile, cached, new) == pytest.approx(transformer(cached, new), rel=0.3)
        assert answer(profile, cached, new) != pytest.approx(transformer(0, 5000), rel=0.3)


@QUICK
@given(reports=REPORTS, places=st.lists(st.tuples(TOKENS, NEW, TOKENS, NEW), min_size=20, max_size=20))
def test_whatever_is_reported_answers_are_numbers_and_grow_with_both(
    reports: list[Report], places: list[tuple[int, int, int, int]]
) -> None:
    profile = learned(reports)
    assert all(cost >= 0 and math.isfinite(cost) for cost in profile.costs)
    for cached, new, more_cached, more_new in places:
        less = answer(profile, min(cached, more_cached), min(new, more_new))
        most = answer(profile, max(cached, more_cached), max(new, more_new))
        assert 0.0 < less <= most * (1 + 1e-12)
        assert math.isfinite(most)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_reports_hardly_matters(seed: int) -> None:
    reports = prefills(80, seed)
    shuffled = reports[:]
    random.Random(seed).shuffle(shuffled)
    one, other = learned(reports), learned(shuffled)
    twice = learned([(cached, new, 2 * seconds) for cached, new, seconds in reports])
    for cached, new in ((0, 64), (0, 3000), (2000, 100), (30_000, 9000)):
        assert answer(one, cached, new) == pytest.approx(answer(other, cached, new), rel=0.05)
        assert answer(one, cached, new) != pytest.approx(answer(twice, cached, new), rel=0.05)


def test_a_first_compile_of_every_shape_is_forgotten() -> None:
    reports = prefills(400, 3)
    seen: set[tuple[int, int]] = set()
    spoilt = []
    for cached, new, seconds in reports:
        shape = (cached.bit_length(), new.bit_length())
        spoilt.append((cached, new, seconds if shape in seen else seconds + 20.0))
        seen.add(shape)
    assert sum(bad != good for bad, good in zip(spoilt, reports, strict=True)) > 100
    assert worst(learned(spoilt)) < 0.35
    assert worst(learned(spoilt + prefills(800, 4))) < 0.1
    assert worst(learned([(cached, new, seconds + 20.0) for cached, new, seconds in reports])) > 2, "the control"


def test_one_compile_among_a_few_reports_does_not_poison_the_rest() -> None:
    honest = [(0, new, transformer(0, new)) for new in (64, 256, 600, 1500, 5000, 9000, 700, 2000)]
    for first in ((0, 1000, 30.0), (0, 64, 5.0), (0, 9000, 100.0)):
        profile = learned([first, *honest])
        for new in (64, 600, 5000, 9000):
            assert abs(math.log(answer(profile, 0, new) / transformer(0, new))) < 1.0


@pytest.mark.parametrize("times", [0.001, 10.0])
def test_one_false_report_in_five_is_outvoted(times: float) -> None:
    chance = random.Random(5)
    reports = [
        (cached, new, min(seconds * times if chance.random() < 0.2 else seconds, PREFILL_SECONDS_MAX))
        for cached, new, seconds in prefills(1500, 5)
    ]
    assert worst(learned(reports)) < 0.2
    everybody = [(cached, new, max(1e-6, min(seconds * times, 3600.0))) for cached, new, seconds in prefills(1500, 5)]
    assert worst(learned(everybody)) > 2, "the control"


def test_a_changed_host_is_believed() -> None:
    profile = learned(prefills(600, 6))
    for cached, new, seconds in prefills(3000, 7, lambda cached, new: 3 * transformer(cached, new)):
        profile.report(cached, new, seconds)
    assert worst(profile, lambda cached, new: 3 * transformer(cached, new)) < 0.2
    assert worst(profile) > 0.8


@pytest.mark.parametrize(
    ("report", "refusal"),
    [
        ((0, 10, math.nan), Refusal.NOT_A_NUMBER),
        ((0, 10, math.inf), Refusal.NOT_A_NUMBER),
        ((0, 10, -math.inf), Refusal.NOT_A_NUMBER),
        ((0, 10, -1.0), Refusal.NEGATIVE),
        ((-1, 10, 1.0), Refusal.NEGATIVE),
        ((0, -10, 1.0), Refusal.NEGATIVE),
        ((0, 0, 1.0), Refusal.ABSURD),
        ((0, 10, 0.0), Refusal.ABSURD),
        ((0, 10, 3601.0), Refusal.ABSURD),
        ((TOKENS_MAX + 1, 10, 1.0), Refusal.ABSURD),
        ((0, 1 << 80, 1.0), Refusal.ABSURD),
    ],
)
def test_what_cannot_be_true_is_refused_and_changes_nothing(report: Report, refusal: Refusal) -> None:
    profile = learned(prefills(20, 8))
    before = profile.to_bytes()
    assert profile.report(*report) is refusal
    assert profile.to_bytes() == before
    assert profile.report(0, 10, 1.0) is None
    assert profile.to_bytes() != before


def test_a_question_beyond_all_bounds_is_answered_as_at_the_bound() -> None:
    profile = learned(prefills(100, 9))
    assert profile.seconds(1 << 90, 1 << 90) == profile.seconds(TOKENS_MAX, TOKENS_MAX)
    assert profile.seconds(0, TOKENS_MAX) != profile.seconds(TOKENS_MAX, TOKENS_MAX)


def test_answers_do_not_jump_from_one_cell_to_the_next() -> None:
    profile = learned(prefills(600, 10))
    for cached in (0, 255, 256, 257, 4096):
        for new in (255, 256, 1023, 1024):
            there = answer(profile, cached, new)
            assert answer(profile, cached, new + 1) == pytest.approx(there, rel=0.01)
            assert answer(profile, cached + 1, new) == pytest.approx(there, rel=0.01)
            assert answer(profile, cached, 2 * new) != pytest.approx(there, rel=0.01)


def test_blocks_cost_what_their_tokens_cost_behind_those_before_them() -> None:
    profile = learned(prefills(200, 11), block_tokens=32)
    assert profile.recompute_seconds_of_blocks(4, 10) == profile.seconds(128, 192)
    assert profile.recompute_seconds_of_blocks(4, 10) != profile.seconds(0, 192)
    assert profile.recompute_seconds_of_blocks(7, 7) == 0.0


def test_an_answer_takes_less_than_five_microseconds_and_a_report_less_than_a_hundred() -> None:
    profile = learned(prefills(600, 12))
    assert min(repeat(lambda: profile.seconds(5000, 700), timer=thread_time, number=2000, repeat=5)) / 2000 < 5e-6
    reports = prefills(200, 13)
    assert min(repeat(lambda: learned_more(profile, reports), timer=thread_time, number=1, repeat=3)) / 200 < 100e-6


def learned_more(profile: PrefillProfile, reports: list[Report]) -> None:
    for report in reports:
        profile.report(*report)


def test_memory_stays_bounded_whatever_is_reported() -> None:
    chance = random.Random(14)
    profile = PrefillProfile(16)
    for _ in range(2500):
        profile.report(int(2 ** chance.uniform(0, 22)), int(2 ** chance.uniform(0, 22)), 2 ** chance.uniform(-10, 10))
    assert len(profile.to_bytes()) < 16 * 23 * (15 * 12 + 8) + 100
    assert len(profile.to_bytes()) > 10_000, "the control: cells were filled"


# -- keeping -----------------------------------------------------------------------------------------------------


@QUICK
@given(reports=REPORTS)
def test_a_profile_comes_back_as_it_was(reports: list[Report]) -> None:
    profile = learned(reports, block_tokens=7)
    content = profile.to_bytes()
    back = PrefillProfile.from_bytes(content)
    assert back.to_bytes() == content
    assert (back.block_tokens, back.reports, back.costs) == (7, len(reports), profile.costs)
    for cached, new, _ in reports:
        assert back.seconds(cached, new) == profile.seconds(cached, new)
    back.report(0, 1, 1.0)
    assert back.to_bytes() != content


def test_an_empty_profile_comes_back_empty() -> None:
    back = PrefillProfile.from_bytes(PrefillProfile(16).to_bytes())
    assert back.seconds(0, 10) is None
    assert back.report(0, 10, 1.0) is None
    assert back.seconds(0, 10) is not None


def test_a_profile_that_came_back_learns_on_as_if_nothing_had_happened() -> None:
    profile = learned(prefills(300, 15))
    back = PrefillProfile.from_bytes(profile.to_bytes())
    for cached, new, seconds in prefills(300, 16):
        profile.report(cached, new, seconds)
        back.report(cached, new, seconds)
    assert back.to_bytes() == profile.to_bytes()


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    content = learned(prefills(3, 17)).to_bytes()
    PrefillProfile.from_bytes(content)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            PrefillProfile.from_bytes(bytes(damaged))
    for length in range(len(content)):
        with pytest.raises(FormatError):
            PrefillProfile.from_bytes(content[:length])
    with pytest.raises(FormatError):
        PrefillProfile.from_bytes(content + bytes(1))


def sealed(body: bytes) -> bytes:
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def test_a_false_profile_with_a_right_checksum_is_refused_or_harmless() -> None:
    body = learned(prefills(3, 18)).to_bytes()[:-8]
    PrefillProfile.from_bytes(sealed(body))
    chance = random.Random(19)
    refused = 0
    for _ in range(1500):
        damaged = bytearray(body)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            profile = PrefillProfile.from_bytes(sealed(bytes(damaged)))
        except FormatError:
            refused += 1
        else:
            assert 0.0 < answer(profile, 100, 100) <= answer(profile, TOKENS_MAX, TOKENS_MAX) < math.inf
    assert refused > 500
    for longer_or_shorter in (b"", body[:-1], body[:-12], body + bytes(1), body + body[-12:]):
        with pytest.raises(FormatError):
            PrefillProfile.from_bytes(sealed(longer_or_shorter))


# -- fitting -----------------------------------------------------------------------------------------------------


def fitted(timings: Sequence[tuple[int, float, float]]) -> Fit:
    """By cell, size and seconds; costs a call, by size, and by its square."""
    held = Timings()
    for number, (cell, size, seconds) in enumerate(timings, 1):
        held.add(cell, (0.0, size, seconds), number)
    table = held.table(sorted(held.rows), len(timings))
    columns = np.stack([np.ones_like(table.size), table.size, table.size**2], axis=-1)
    return fit_costs(table, columns, columns[:, 0])


def test_a_cell_remembers_its_last_timings_and_no_other_cells() -> None:
    held = Timings()
    for number in range(1, 4):
        held.add(7, (1.0, 10.0, float(number)), number)
    assert held.of_cell(7) == [(1.0, 10.0, 1.0), (1.0, 10.0, 2.0), (1.0, 10.0, 3.0)]
    for number in range(4, 4 + 3 * WINDOW):
        held.add(number % 30 + 10, (0.0, 5.0, 5.0), number)
    assert held.of_cell(7) == [(1.0, 10.0, 1.0), (1.0, 10.0, 2.0), (1.0, 10.0, 3.0)], "after room was made for others"
    for number in range(100, 102 + WINDOW):
        held.add(7, (0.0, 20.0, float(number)), number)
    assert held.of_cell(7) == [(0.0, 20.0, float(number)) for number in range(102, 102 + WINDOW)]
    assert held.last(7) == 101 + WINDOW
    assert held.last(13) != held.last(7)


def test_of_two_in_the_middle_the_quicker_is_believed() -> None:
    assert fitted([(1, 10, 1.0), (1, 10, 500.0)]).costs @ [1, 10, 100] == pytest.approx(1.0, rel=1e-3)
    assert fitted([(1, 10, 1.0), (1, 10, 500.0), (1, 10, 500.0)]).costs @ [1, 10, 100] == pytest.approx(500, rel=1e-3)


def test_costs_that_would_be_negative_are_nothing() -> None:
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0]
    bent = fitted([(int(size), size, 3 * size - 0.02 * size**2) for size in sizes for _ in range(10)]).costs
    assert bent.min() == 0.0
    assert bent[1] > 2
    straight = fitted([(int(size), size, 5 + 3 * size + 0.5 * size**2) for size in sizes for _ in range(10)]).costs
    assert straight == pytest.approx([5, 3, 0.5], rel=0.02)
    assert straight != pytest.approx(bent, rel=0.02)


def test_a_cell_whose_timings_disagree_weighs_less() -> None:
    steady, wild = fitted([(1, 10, 1.0)] * 9 + [(2, 100, 1.0)] * 4 + [(2, 100, 50.0)] * 5).weights
    assert wild < steady / 4


def test_old_timings_lose_their_weight() -> None:
    def after(reports_since: int) -> float:
        ways = Bandwidth()
        for _ in range(WINDOW):
            ways.took(1000, 9e-3)
        for _ in range(reports_since):
            ways.took(1 << 20, 1e-3)
        ways.settle()
        seconds = ways.load_seconds(1 << 20)
        assert seconds is not None
        return abs(math.log(seconds / 1e-3))

    assert after(8 * HALF_LIFE) < 0.05
    assert after(8 * HALF_LIFE) < after(3) / 4


# -- bandwidth ---------------------------------------------------------------------------------------------------


def loads(count: int, seed: int, times: float = 1.0) -> list[tuple[int, float]]:
    """A drive of 2 GB/s that takes 80 us to begin."""
    chance = random.Random(seed)
    sizes = [int(2 ** chance.uniform(12, 26)) for _ in range(count)]
    return [(size, times * (80e-6 + size / 2e9) * math.exp(chance.gauss(0, 0.05))) for size in sizes]


def measured(timings: list[tuple[int, float]]) -> Bandwidth:
    way = Bandwidth()
    for load_bytes, seconds in timings:
        assert way.took(load_bytes, seconds) is None
    way.settle()
    return way


def test_bandwidth_tells_the_call_from_the_bytes() -> None:
    way = measured(loads(500, 20))
    assert way.call_seconds == pytest.approx(80e-6, rel=0.1)
    assert way.byte_seconds == pytest.approx(1 / 2e9, rel=0.1)
    assert way.load_seconds(1 << 24) == pytest.approx(80e-6 + (1 << 24) / 2e9, rel=0.1)
    assert way.load_seconds(1 << 24) != pytest.approx(80e-6 + (1 << 23) / 2e9, rel=0.1)
    assert way.load_seconds(0) == 0.0


def test_slow_reads_now_and_then_move_nothing_and_a_slow_drive_is_believed() -> None:
    chance = random.Random(21)
    spoilt = [(size, seconds * (100 if chance.random() < 0.2 else 1)) for size, seconds in loads(1000, 21)]
    way = measured([(1 << 20, 5.0), *spoilt])
    assert way.load_seconds(1 << 22) == pytest.approx(80e-6 + (1 << 22) / 2e9, rel=0.2)
    for load_bytes, seconds in loads(500, 22, times=10):
        way.took(load_bytes, seconds)
    assert way.load_seconds(1 << 22) == pytest.approx(10 * (80e-6 + (1 << 22) / 2e9), rel=0.2)


def test_nothing_is_known_of_a_way_that_nobody_went() -> None:
    way = Bandwidth()
    assert way.load_seconds(100) is None
    assert way.bytes_within(1.0) == 0
    way.took(1 << 20, 1e-3)
    assert way.load_seconds(100) is not None
    assert way.bytes_within(1.0) > 0


@pytest.mark.parametrize(
    ("load_bytes", "seconds", "refusal"),
    [
        (1, math.nan, Refusal.NOT_A_NUMBER),
        (1, -1.0, Refusal.NEGATIVE),
        (-1, 1.0, Refusal.NEGATIVE),
        (0, 1.0, Refusal.ABSURD),
        (1, 0.0, Refusal.ABSURD),
        (1 << 60, 1.0, Refusal.ABSURD),
        (1, 4000.0, Refusal.ABSURD),
    ],
)
def test_a_load_that_cannot_be_is_refused(load_bytes: int, seconds: float, refusal: Refusal) -> None:
    way = Bandwidth()
    assert way.took(load_bytes, seconds) is refusal
    assert way.reports == 0
    assert way.took(1, 1.0) is None
    assert way.reports == 1


@QUICK
@given(timings=st.lists(st.tuples(st.integers(1, 1 << 50), st.floats(1e-9, 3600)), min_size=1, max_size=30))
def test_whatever_was_timed_a_load_takes_a_time_and_more_bytes_take_no_less(timings: list[tuple[int, float]]) -> None:
    way = measured(timings)
    answers = [way.load_seconds(load_bytes) for load_bytes in (1, 1000, 1 << 20, 1 << 40)]
    known = [seconds for seconds in answers if seconds is not None]
    assert len(known) == 4
    assert known == sorted(known)
    assert all(0.0 <= seconds < math.inf for seconds in known)
    for seconds in known:
        within = way.bytes_within(seconds)
        assert within >= 0
        again = way.load_seconds(within)
        assert again is not None
        assert again <= seconds * (1 + 1e-9)


# -- loads from two tiers ----------------------------------------------------------------------------------------


def test_a_run_is_loaded_from_where_its_blocks_lie() -> None:
    disk = measured(loads(300, 24))
    dram = measured([(size, 1e-6 + size / 1e10) for size, _ in loads(300, 25)])
    one, other = dram.load_seconds(4 << 20), disk.load_seconds(6 << 20)
    assert one is not None
    assert other is not None
    assert load_seconds(dram, 4 << 20, disk, 6 << 20) == one + other
    assert load_seconds(dram, 6 << 20, disk, 4 << 20) != one + other
    assert load_seconds(dram, 4 << 20, disk, 0) == one
    assert load_seconds(dram, 0, disk, 6 << 20) == other
    assert load_seconds(dram, 0, disk, 0) == 0.0


def test_what_nobody_measured_is_not_guessed() -> None:
    disk = measured(loads(50, 27))
    assert load_seconds(Bandwidth(), 9, disk, 9) is None
    assert load_seconds(disk, 9, Bandwidth(), 9) is None
    assert load_seconds(Bandwidth(), 0, disk, 9) is not None, "of DRAM nothing need be known where nothing lies there"
