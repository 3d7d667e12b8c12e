"""InferCept's advice: each waste as its formula says, the least is chosen, and no number from a client breaks it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import TOKENS_MAX, Bandwidth, PrefillProfile, Refusal
from kvstore.hints.intercept import Advice, Choice, Interception, advise

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=60)
TOKEN_BYTES = 131_072.0  # 32 layers, 8 heads of 128 in 16 bits, keys and values


def prefill() -> PrefillProfile:
    profile = PrefillProfile(16)
    for cached in (0, 256, 1024, 4096, 16_384):
        for new in (1, 16, 64, 256, 1024, 4096, 16_384):
            profile.report(cached, new, 0.01 + 4e-5 * new + 2e-9 * new * (cached + new / 2))
    profile.settle()
    return profile


def link(bytes_per_s: float = 2e10) -> Bandwidth:
    way = Bandwidth()
    for exponent in range(12, 32):
        way.took(1 << exponent, 2e-5 + (1 << exponent) / bytes_per_s)
    way.settle()
    return way


PROFILE, LINK = prefill(), link()
ASKED = Interception(context_tokens=8000, token_bytes=TOKEN_BYTES, running_tokens=50_000, elapsed_seconds=2.0)


def advised(asked: Interception, profile: PrefillProfile = PROFILE, swap: Bandwidth = LINK) -> Advice:
    advice = advise(asked, profile, swap)
    assert isinstance(advice, Advice), advice
    return advice


def known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds


# -- the formulas ------------------------------------------------------------------------------------------------


def test_keeping_wastes_the_context_for_as_long_as_the_call_may_still_take() -> None:
    assert advised(ASKED).waste_preserve == 2.0 * 8000 * TOKEN_BYTES
    assert advised(replace(ASKED, elapsed_seconds=3.0)).waste_preserve == 3.0 * 8000 * TOKEN_BYTES
    sooner = replace(ASKED, expected_seconds=2.5)
    assert advised(sooner).waste_preserve == 0.5 * 8000 * TOKEN_BYTES, "what is left of the estimate"
    overdue = replace(ASKED, expected_seconds=1.5)
    assert advised(overdue).waste_preserve == advised(ASKED).waste_preserve, "an estimate that has passed was wrong"


def test_swapping_stops_the_whole_batch_twice_for_what_does_not_hide() -> None:
    way = known(LINK.load_seconds(8000 * TOKEN_BYTES))
    bare = advised(ASKED)
    assert bare.swap_budget_bytes == 0
    assert bare.waste_swap == pytest.approx(2 * way * 58_000 * TOKEN_BYTES)
    hidden = advised(replace(ASKED, forward_seconds=0.02))
    exposed = known(LINK.load_seconds(8000 * TOKEN_BYTES - hidden.swap_budget_bytes))
    assert hidden.waste_swap == pytest.approx(2 * exposed * 58_000 * TOKEN_BYTES)
    assert known(hidden.waste_swap) < known(bare.waste_swap)
    assert advised(replace(ASKED, forward_seconds=10.0)).waste_swap == 0.0


def test_the_swap_budget_is_what_moves_during_one_forward_pass() -> None:
    budget = advised(replace(ASKED, forward_seconds=0.03)).swap_budget_bytes
    assert known(LINK.load_seconds(budget)) == pytest.approx(0.03)
    assert known(LINK.load_seconds(budget)) != pytest.approx(0.04)
    by_profile = advised(replace(ASKED, batch_tokens=512)).swap_budget_bytes
    assert known(LINK.load_seconds(by_profile)) == pytest.approx(known(PROFILE.seconds(0, 512)))
    assert by_profile != budget


def test_dropping_wastes_the_context_while_it_fills_and_the_others_while_they_wait() -> None:
    whole = known(PROFILE.seconds(0, 8000))
    assert advised(ASKED).waste_discard == pytest.approx(whole * (8000 + 50_000) * TOKEN_BYTES)
    assert advised(replace(ASKED, running_tokens=0)).waste_discard == pytest.approx(whole * 8000 * TOKEN_BYTES)


def test_dropping_in_pieces_holds_half_of_it_and_each_piece_costs_what_the_middle_one_does() -> None:
    whole = known(PROFILE.seconds(0, 8000))
    pieces = advised(replace(ASKED, chunk_tokens=1000))
    middle = known(PROFILE.seconds(3500, 1000))
    assert pieces.waste_discard == pytest.approx((whole * 4000 + 8 * middle * 50_000) * TOKEN_BYTES)
    assert middle != pytest.approx(known(PROFILE.seconds(0, 1000)), rel=0.05), "position matters"
    each = sum(known(PROFILE.seconds(1000 * piece, 1000)) for piece in range(8))
    assert 8 * middle == pytest.approx(each, rel=0.05), "and the middle stands for all"
    one_piece = replace(ASKED, chunk_tokens=8000)
    assert advised(one_piece).waste_discard == advised(ASKED).waste_discard
    assert pieces.waste_discard != pytest.approx(known(advised(ASKED).waste_discard))


# -- the choice --------------------------------------------------------------------------------------------------


def test_a_short_call_is_waited_for_and_a_long_one_is_not() -> None:
    short = advised(replace(ASKED, elapsed_seconds=0.0))
    assert (short.choice, short.waste_preserve) == (Choice.PRESERVE, 0.0)
    long = advised(replace(ASKED, elapsed_seconds=600.0))
    assert long.choice is not Choice.PRESERVE


def test_a_swap_that_hides_is_chosen_over_everything_but_a_call_that_is_over() -> None:
    hides = replace(ASKED, forward_seconds=1.0)
    assert advised(hides).choice is Choice.SWAP
    assert advised(replace(hides, elapsed_seconds=0.0)).choice is Choice.PRESERVE


def test_over_a_slow_link_it_is_dropped_instead() -> None:
    waits = replace(ASKED, elapsed_seconds=600.0)
    assert advised(waits, swap=link(2e11)).choice is Choice.SWAP
    assert advised(waits, swap=link(2e7)).choice is Choice.DISCARD


def test_what_nobody_has_measured_is_not_advised() -> None:
    waits = replace(ASKED, elapsed_seconds=600.0)
    nothing = advised(waits, PrefillProfile(16), Bandwidth())
    assert (nothing.choice, nothing.waste_swap, nothing.waste_discard) == (Choice.PRESERVE, None, None)
    assert nothing.swap_budget_bytes == 0
    assert advised(waits, PROFILE, Bandwidth()).choice is Choice.DISCARD
    assert advised(waits, PrefillProfile(16), LINK).choice is Choice.SWAP


SITUATIONS = st.builds(
    Interception,
    context_tokens=st.integers(0, TOKENS_MAX),
    token_bytes=st.floats(0, 1 << 26),
    running_tokens=st.integers(0, 1 << 32),
    elapsed_seconds=st.floats(0, 86_400),
    expected_seconds=st.none() | st.floats(0, 86_400),
    forward_seconds=st.none() | st.floats(0, 3600),
    batch_tokens=st.integers(0, TOKENS_MAX),
    chunk_tokens=st.integers(0, TOKENS_MAX),
)


@QUICK
@given(asked=SITUATIONS)
def test_the_choice_is_always_the_one_that_wastes_least(asked: Interception) -> None:
    advice = advised(asked)
    wastes = {
        Choice.PRESERVE: advice.waste_preserve,
        Choice.SWAP: known(advice.waste_swap),
        Choice.DISCARD: known(advice.waste_discard),
    }
    assert all(0.0 <= waste < math.inf for waste in wastes.values())
    assert wastes[advice.choice] == min(wastes.values())
    assert advice.swap_budget_bytes >= 0


@QUICK
@given(asked=SITUATIONS, later_seconds=st.floats(0.001, 86_400))
def test_without_an_estimate_what_is_let_go_is_not_kept_later(asked: Interception, later_seconds: float) -> None:
    asked = replace(asked, expected_seconds=None)
    later = replace(asked, elapsed_seconds=asked.elapsed_seconds + later_seconds)
    if advised(asked).choice is not Choice.PRESERVE:
        assert advised(later).choice is advised(asked).choice


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "refusal"),
    [
        (replace(ASKED, elapsed_seconds=math.nan), Refusal.NOT_A_NUMBER),
        (replace(ASKED, expected_seconds=math.inf), Refusal.NOT_A_NUMBER),
        (replace(ASKED, context_tokens=-1), Refusal.NEGATIVE),
        (replace(ASKED, running_tokens=-1), Refusal.NEGATIVE),
        (replace(ASKED, chunk_tokens=-1), Refusal.NEGATIVE),
        (replace(ASKED, forward_seconds=-0.1), Refusal.NEGATIVE),
        (replace(ASKED, context_tokens=TOKENS_MAX + 1), Refusal.ABSURD),
        (replace(ASKED, token_bytes=1e12), Refusal.ABSURD),
        (replace(ASKED, elapsed_seconds=1e9), Refusal.ABSURD),
        (replace(ASKED, batch_tokens=1 << 70), Refusal.ABSURD),
    ],
)
def test_what_cannot_be_true_is_refused(asked: Interception, refusal: Refusal) -> None:
    assert advise(asked, PROFILE, LINK) is refusal
    assert isinstance(advise(ASKED, PROFILE, LINK), Advice)
