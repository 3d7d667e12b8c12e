"""Workloads: what they count, how they are told apart, and how they are halved."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from bench.replay import models
from bench.replay.profiles import BASE, PROFILES, profile_named
from bench.replay.score import Score, infinite, score
from bench.replay.workload import (
    Graph,
    Join,
    Model,
    ProgramFinished,
    Request,
    Step,
    StepBound,
    StepEntered,
    ToolStarted,
    WorkflowBegun,
    Workload,
    keys_of,
)

MODEL = Model("toy", 10, 1000, BASE)
OTHER = Model("other", 10, 50, BASE)


def asked(at_s: float, *keys: int, model: int = 0, tokens: int | None = None, output: tuple[int, ...] = ()) -> Request:
    """A request for these blocks, all of them full unless said."""
    return Request(at_s, model, keys_of(keys), 10 * len(keys) if tokens is None else tokens, 7, keys_of(output))


def test_blocks_are_counted_by_access_once_each_and_in_bytes_of_their_model() -> None:
    workload = Workload("w", (MODEL, OTHER), (asked(0, 1, 2, output=(3,)), asked(1, 1, 2, 3, 4), asked(2, 9, model=1)))
    workload.check()
    assert workload.accesses == 7
    assert workload.unique_blocks == 5
    assert workload.footprint_bytes == 4 * 1000 + 50


def test_a_digest_depends_on_every_field_of_every_event() -> None:
    events = (
        asked(0, 1, 2),
        ToolStarted(1, 7, "search", None),
        StepBound(2, 0, 1, keys_of([1])),
        ProgramFinished(3, 7),
    )
    workload = Workload("w", (MODEL,), events)
    again = Workload("another name", (MODEL,), (asked(0, 1, 2), *events[1:]))
    assert workload.digest() == again.digest()
    changed = [
        (asked(0, 1, 3), *events[1:]),
        (asked(0, 1, 2, tokens=19), *events[1:]),
        (asked(0, 1, 2, output=(3,)), *events[1:]),
        (events[0], ToolStarted(1, 7, "search", 2.0), *events[2:]),
        (*events[:2], StepBound(2, 0, 1, keys_of([2])), events[3]),
        events[:3],
    ]
    digests = {replace(workload, events=each).digest() for each in changed}
    assert len(digests | {workload.digest()}) == len(changed) + 1


def test_a_digest_is_sha256_of_models_alone_when_nothing_happens() -> None:
    assert Workload("w", (MODEL,), ()).digest() == hashlib.sha256(repr((MODEL,)).encode()).hexdigest()


def test_the_second_half_knows_the_workflows_that_go_on_and_no_others() -> None:
    graph = Graph("g", (Step("only", (), Join.ALL),))
    bound = StepBound(1, 1, 0, keys_of([1]))
    events = (
        WorkflowBegun(0, 0, graph),
        WorkflowBegun(0, 1, graph),
        StepBound(0, 0, 0, keys_of([1])),
        bound,
        asked(2, 1, 2),
        asked(3, 1, 2),
        StepEntered(4, 1, 0),
    )
    first, second = Workload("w", (MODEL,), events).halves()
    assert first.events == events[:5]
    assert second.accesses == first.accesses == 2
    begun, again, *rest = second.events
    assert begun == WorkflowBegun(3, 1, graph)
    assert isinstance(again, StepBound)
    assert (again.at_s, again.run, again.keys is bound.keys) == (3, 1, True)
    assert tuple(rest) == events[5:]
    second.check()


@pytest.mark.parametrize(
    "events",
    [
        (asked(1, 1), asked(0, 1)),
        (asked(0, 1, 2), asked(1, 3, 2)),
        (asked(0, 1, 2, tokens=5),),
        (asked(0, 1), asked(1, 1, model=1)),
    ],
    ids=["out of order", "two parents", "too many keys", "two models"],
)
def test_a_workload_that_breaks_its_promises_is_found_out(events: tuple[Request, ...]) -> None:
    with pytest.raises(AssertionError):
        Workload("w", (MODEL, OTHER), events).check()


def test_a_profile_adds_up_a_start_a_linear_and_a_quadratic_part() -> None:
    # A prefill in two parts costs as much as in one, and one start more.
    for profile in PROFILES:
        whole = profile.seconds(0, 30_000)
        parts = profile.seconds(0, 10_000) + profile.seconds(10_000, 20_000)
        assert parts - whole == pytest.approx(profile.start_s)
    many = BASE.seconds(np.array([0, 10_000]), np.array([30_000, 20_000]))
    assert many.tolist() == [BASE.seconds(0, 30_000), BASE.seconds(10_000, 20_000)]


def test_a_profile_is_found_by_name_and_a_wrong_name_is_told_the_right_ones() -> None:
    assert profile_named("llama-3.1-8b") is BASE
    with pytest.raises(ValueError, match=r"'gpt'.*qwen2\.5-1\.5b, llama-3\.1-8b"):
        profile_named("gpt")


def test_prefill_rates_stay_where_engines_measure_them() -> None:
    rates = {profile.name: 4096 / profile.seconds(0, 4096) for profile in PROFILES}
    assert 80_000 < rates["qwen2.5-1.5b"] < 200_000
    assert 15_000 < rates["llama-3.1-8b"] < 35_000
    assert 7_000 < rates["llama-3.1-70b-tp4"] < 14_000
    assert 12_000 < rates["deepseek-v3-tp8"] < 32_000
    assert [model.block_bytes >> 20 for model in (models.SMALL, models.BASE, models.LARGE, models.MLA)] == [
        7,
        32,
        80,
        4,
    ]


def test_a_score_counts_lead_runs_in_blocks_tokens_and_seconds() -> None:
    workload = Workload("w", (MODEL,), (asked(0, 1, 2, tokens=15), asked(1, 1, 2, 3, 4, tokens=40)))
    got = score(workload, [0, 3])
    spent = BASE.seconds(0, 15) + BASE.seconds(30, 10)
    full = BASE.seconds(0, 15) + BASE.seconds(0, 40)
    assert (got.hit, got.token_hit) == (3 / 6, 30 / 55)
    assert got.compute_saved == pytest.approx(1 - spent / full)


def test_a_partly_filled_last_block_saves_no_more_tokens_than_there_are() -> None:
    workload = Workload("w", (MODEL,), (asked(0, 1, 2, tokens=15), asked(1, 1, 2, tokens=15)))
    assert infinite(workload).token_hit == 0.5


def test_an_infinite_cache_hits_what_was_asked_for_or_stored_before() -> None:
    workload = Workload("w", (MODEL,), (asked(0, 1, output=(2, 3)), asked(1, 1, 2, 3, 4), asked(2, 5)))
    assert infinite(workload).hit == 3 / 6
    assert infinite(Workload("w", (MODEL,), ())) == Score(0, 0, 0)
