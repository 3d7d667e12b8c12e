"""Compute saved: T(0, n) - T(cached, n - cached), never negative, in a bounded number of series that lose nothing."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cost import TOKENS_MAX, PrefillProfile, Refusal
from kvstore.savings import OTHER, Saved, Savings, seconds_saved

QUICK = settings(derandomize=True, database=None, deadline=None, max_examples=30)


def prefill(scale: float = 1.0) -> PrefillProfile:
    profile = PrefillProfile(16)
    for cached in (0, 256, 1024, 4096, 16_384):
        for new in (16, 64, 256, 1024, 4096, 16_384):
            profile.report(cached, new, scale * (0.01 + 4e-5 * new + 2e-9 * new * (cached + new / 2)))
    profile.settle()
    return profile


PROFILE = prefill()


def known(seconds: float | None) -> float:
    assert seconds is not None
    return seconds


def test_what_is_saved_is_the_whole_prefill_less_the_rest() -> None:
    whole, rest = known(PROFILE.seconds(0, 8000)), known(PROFILE.seconds(6000, 2000))
    assert seconds_saved(PROFILE, 6000, 8000) == whole - rest
    assert seconds_saved(PROFILE, 6000, 8000) == pytest.approx(6000 * 4e-5 + 2e-9 * 6000**2 / 2, rel=0.1)
    assert seconds_saved(PROFILE, 8000, 8000) == whole
    assert seconds_saved(PROFILE, 0, 8000) == 0.0
    assert seconds_saved(prefill(2.0), 6000, 8000) == pytest.approx(2 * (whole - rest), rel=0.01)


def test_nothing_is_priced_before_anybody_has_reported() -> None:
    assert seconds_saved(PrefillProfile(16), 10, 20) is None
    savings = Savings()
    assert savings.count_hit("a", "one", PrefillProfile(16), cached_tokens=10, prompt_tokens=20) == 0.0
    savings.count_hit("a", "one", PROFILE, cached_tokens=100, prompt_tokens=200)
    (series,) = savings.report()
    assert (series.hits, series.cached_tokens, series.unpriced_tokens) == (2, 110, 10)
    assert series.saved_seconds == seconds_saved(PROFILE, 100, 200)


@QUICK
@given(
    reports=st.lists(
        st.tuples(st.integers(0, TOKENS_MAX), st.integers(1, TOKENS_MAX), st.floats(1e-6, 3600)), min_size=1, max_size=9
    ),
    prompt=st.integers(0, TOKENS_MAX),
    share=st.floats(0, 1),
)
def test_whatever_was_reported_no_hit_costs_anything(
    reports: list[tuple[int, int, float]], prompt: int, share: float
) -> None:
    profile = PrefillProfile(16)
    for report in reports:
        profile.report(*report)
    saved = known(seconds_saved(profile, int(share * prompt), prompt))
    assert 0.0 <= saved <= known(profile.seconds(0, prompt))


def test_totals_are_kept_by_tenant_and_namespace() -> None:
    savings = Savings()
    for tenant, namespace, cached in (("a", "one", 100), ("a", "two", 300), ("b", "one", 500), ("a", "one", 100)):
        savings.count_hit(tenant, namespace, PROFILE, cached_tokens=cached, prompt_tokens=1000)
    assert savings.count_load("b", "one", 0.25) is None
    assert savings.count_load("b", "one", 0.5) is None
    once, more = known(seconds_saved(PROFILE, 100, 1000)), known(seconds_saved(PROFILE, 500, 1000))
    series = {(one.tenant, one.namespace): one for one in savings.report()}
    assert list(series) == [("a", "one"), ("a", "two"), ("b", "one")]
    assert series["a", "one"] == Saved("a", "one", 2 * once, 0.0, 2, 0, 200, 0)
    assert series["b", "one"] == Saved("b", "one", more, 0.75, 1, 2, 500, 0)
    assert series["a", "one"] != series["a", "two"]


def test_series_are_bounded_and_nothing_is_lost() -> None:
    chance = random.Random(1)
    savings = Savings(most_series=10, most_tenants=4)
    saved = 0.0
    for _ in range(2000):
        tenant, namespace = f"tenant-{chance.randrange(20)}", f"space-{chance.randrange(30)}"
        one = savings.count_hit(tenant, namespace, PROFILE, cached_tokens=64, prompt_tokens=128)
        assert not isinstance(one, Refusal)
        saved += one
        savings.count_load(tenant, namespace, 0.5)
    series = savings.report()
    assert len(series) == 10 + 4 + 1
    assert len({(one.tenant, one.namespace) for one in series}) == len(series), "no two with the same name"
    assert [one.namespace for one in series[10:]] == [OTHER] * 5
    assert series[-1].tenant == OTHER
    assert sum(one.hits for one in series) == 2000
    assert sum(one.load_seconds for one in series) == 1000.0
    assert sum(one.saved_seconds for one in series) == pytest.approx(saved)
    assert saved > 0


@pytest.mark.parametrize(
    ("cached", "prompt", "refusal"),
    [
        (-1, 10, Refusal.NEGATIVE),
        (0, -1, Refusal.NEGATIVE),
        (11, 10, Refusal.ABSURD),
        (0, TOKENS_MAX + 1, Refusal.ABSURD),
    ],
)
def test_a_hit_that_cannot_be_is_refused_and_not_counted(cached: int, prompt: int, refusal: Refusal) -> None:
    savings = Savings()
    assert savings.count_hit("a", "one", PROFILE, cached_tokens=cached, prompt_tokens=prompt) is refusal
    assert savings.report() == ()
    assert savings.count_hit("a", "one", PROFILE, cached_tokens=10, prompt_tokens=10) != 0.0
    assert len(savings.report()) == 1


@pytest.mark.parametrize(
    ("seconds", "refusal"),
    [(math.nan, Refusal.NOT_A_NUMBER), (-0.1, Refusal.NEGATIVE), (1e9, Refusal.ABSURD), (0.1, None)],
)
def test_a_load_that_cannot_be_is_refused_and_not_counted(seconds: float, refusal: Refusal | None) -> None:
    savings = Savings()
    assert savings.count_load("a", "one", seconds) is refusal
    assert len(savings.report()) == (refusal is None)
