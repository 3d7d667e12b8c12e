"""Compute saved: T(0, n) - T(cached, n - cached), and the prices of blocks that add up to it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore import blocks
from kvstore.cost import TOKENS_MAX, PrefillProfile
from kvstore.savings import PRICE_SECONDS_MAX, prices_of, root_seconds, seconds_of_code, seconds_of_codes, seconds_saved

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=30)
REPORTS = st.lists(
    st.tuples(st.integers(0, TOKENS_MAX), st.integers(1, TOKENS_MAX), st.floats(1e-6, 3600)), min_size=1, max_size=9
)
TOKEN_S, PAIR_S = 4e-5, 2e-9


def prefill(scale: float = 1.0) -> PrefillProfile:
    profile = PrefillProfile(16)
    for cached in (0, 256, 1024, 4096, 16_384):
        for new in (16, 64, 256, 1024, 4096, 16_384):
            profile.report(cached, new, scale * (0.01 + TOKEN_S * new + PAIR_S * new * (cached + new / 2)))
    profile.settle()
    return profile


PROFILE = prefill()


def known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds


def test_what_is_saved_is_the_whole_prefill_less_the_rest() -> None:
    whole, rest = known(PROFILE.seconds(0, 8000)), known(PROFILE.seconds(6000, 2000))
    assert seconds_saved(PROFILE, 6000, 8000) == whole - rest
    assert seconds_saved(PROFILE, 6000, 8000) == pytest.approx(6000 * TOKEN_S + PAIR_S * 6000**2 / 2, rel=0.1)
    assert seconds_saved(PROFILE, 8000, 8000) == whole
    assert seconds_saved(PROFILE, 0, 8000) == 0.0
    assert seconds_saved(prefill(2.0), 6000, 8000) == pytest.approx(2 * (whole - rest), rel=0.01)


def test_nothing_is_priced_before_anybody_has_reported() -> None:
    assert seconds_saved(PrefillProfile(16), 10, 20) is None
    assert prices_of(PrefillProfile(16), 0) == (0.0, 0.0)


def test_prices_of_blocks_add_up_to_what_is_saved_however_long_the_prompt_is() -> None:
    prices = prices_of(PROFILE, 0)
    one_by_one = [prices.first_seconds + i * prices.slope_seconds for i in range(375)]
    assert root_seconds(PROFILE, 375) == pytest.approx(sum(one_by_one))
    assert root_seconds(PROFILE, 375) == pytest.approx(6000 * TOKEN_S + PAIR_S * 6000**2 / 2, rel=0.02)
    for prompt in (6000, 8000, 16_000):
        assert root_seconds(PROFILE, 375) == pytest.approx(known(seconds_saved(PROFILE, 6000, prompt)), rel=0.1)
    assert root_seconds(PROFILE, 374) < 0.999 * root_seconds(PROFILE, 375), "the control: a block more is a block more"


def test_behind_a_block_prices_go_on_where_it_stopped() -> None:
    prices = prices_of(PROFILE, 0)
    parent = blocks.cost_of_seconds(prices.first_seconds + 999 * prices.slope_seconds)
    behind = prices_of(PROFILE, int(parent))
    assert behind.first_seconds == pytest.approx(prices.first_seconds + 1000 * prices.slope_seconds, rel=2e-3)
    assert behind.slope_seconds == prices.slope_seconds
    assert behind.first_seconds > 1.4 * prices.first_seconds
    assert prices_of(PROFILE, 1).first_seconds == prices.first_seconds, "no block costs less than the first"


def test_codes_of_rows_mean_here_what_they_mean_in_the_table() -> None:
    for seconds in (1e-9, 3e-4, 1.0, 7.5, 9e5):
        code = int(blocks.cost_of_seconds(seconds))
        assert seconds_of_code(code) == pytest.approx(float(blocks.seconds_of_cost(code)), rel=1e-12)
        assert seconds_of_code(code) == pytest.approx(seconds, rel=1e-3)
        assert seconds_of_codes(np.array([code, 0], dtype=np.uint16)).tolist() == [seconds_of_code(code), 0.0]


@QUICK
@given(reports=REPORTS, prompt=st.integers(0, TOKENS_MAX), share=st.floats(0, 1), parent=st.integers(0, 65535))
def test_whatever_was_reported_no_hit_costs_anything_and_no_price_is_absurd(
    reports: list[tuple[int, int, float]], prompt: int, share: float, parent: int
) -> None:
    profile = PrefillProfile(16)
    for report in reports:
        profile.report(*report)
    saved = known(seconds_saved(profile, int(share * prompt), prompt))
    assert 0.0 <= saved <= known(profile.seconds(0, prompt))
    first, slope = prices_of(profile, parent)
    assert 0.0 <= first <= PRICE_SECONDS_MAX
    assert 0.0 <= slope <= PRICE_SECONDS_MAX
    assert 0 <= int(blocks.cost_of_seconds(first + 1023 * slope)) <= 65535
