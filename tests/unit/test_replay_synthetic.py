"""The generators: the same events for ever, sound as workloads, and hints that tell the truth."""

from math import log

import pytest

from bench.replay.draws import Draws, Zipf
from bench.replay.held_out import HELD_OUT_SEEDS, SMALL_MINUTES, TUNING_SEEDS, WORKLOADS, Listed
from bench.replay.profiles import BASE
from bench.replay.script import Script
from bench.replay.synthetic import GENERATORS, agents, mixed, tools
from bench.replay.workload import (
    Join,
    Model,
    ProgramFinished,
    Request,
    StepBound,
    StepEntered,
    ToolFinished,
    ToolStarted,
    WorkflowBegun,
    WorkflowEnded,
)

SHORT = [one for one in WORKLOADS if one.seed in {TUNING_SEEDS[0], HELD_OUT_SEEDS[0]}]


@pytest.mark.parametrize("one", SHORT, ids=[f"{one.name}-{one.seed}" for one in SHORT])
def test_a_generator_gives_what_is_listed_and_keeps_the_promises_of_a_workload(one: Listed) -> None:
    workload = GENERATORS[one.name](one.seed, minutes=SMALL_MINUTES)
    assert workload.digest().startswith(one.small)
    workload.check()
    assert workload.name == one.name
    assert workload.events[-1].at_s < SMALL_MINUTES * 60


def test_every_workload_is_listed_for_every_seed_and_no_seed_is_both_tuned_on_and_held_out() -> None:
    seeds = (*TUNING_SEEDS, *HELD_OUT_SEEDS)
    assert len(set(seeds)) == len(seeds)
    assert [(one.name, one.seed) for one in WORKLOADS] == [(name, seed) for name in GENERATORS for seed in seeds]
    assert len({one.full for one in WORKLOADS} | {one.small for one in WORKLOADS}) == 2 * len(WORKLOADS)


def test_load_multiplies_what_begins() -> None:
    few, many = (tools(3, minutes=10, load=load).accesses for load in (0.5, 4.0))
    assert 3 < many / few < 20


def test_models_of_a_mixed_workload_share_no_block() -> None:
    workload = mixed(3, minutes=6)
    assert {request.model for request in workload.requests} == {0, 1, 2}
    workload.check()  # among others that no key has two models


def test_a_tool_ends_after_it_started_and_the_next_request_extends_the_program() -> None:
    waiting: dict[int, float] = {}
    asked: dict[int, list[int]] = {}
    gaps: list[float] = []
    for event in tools(4, minutes=10).events:
        match event:
            case ToolStarted(at_s, program):
                waiting[program] = at_s
            case ToolFinished(at_s, program):
                gaps.append(at_s - waiting.pop(program))
            case ProgramFinished(_, program):
                assert program in asked
                assert program not in waiting
            case Request():
                assert event.program not in waiting, "asks while a tool runs"
                before = asked.get(event.program, [])
                assert event.keys.tolist()[: len(before)] == before
                asked[event.program] = event.keys.tolist()
            case _:
                raise AssertionError(event)
    assert min(gaps) < 1
    assert max(gaps) > 60


def test_a_step_that_is_entered_asks_first_for_what_was_bound() -> None:
    begun: set[int] = set()
    bound: dict[tuple[int, int], list[int]] = {}
    entered: list[list[int]] = []  # what is awaited of steps that have just been entered
    for event in agents(4, minutes=10).events:
        match event:
            case WorkflowBegun(_, run):
                begun.add(run)
            case StepBound(_, run, step, keys):
                bound[run, step] = keys.tolist()
            case StepEntered(_, run, step):
                assert run in begun
                entered.append(bound[run, step])
            case WorkflowEnded(_, run):
                begun.remove(run)
            case Request(_, _, keys):
                for awaited in [each for each in entered if keys.tolist()[: len(each)] == each][:1]:
                    entered.remove(awaited)
                assert len(entered) < 5, "a step was entered and did not ask"
            case _:
                pass
    assert len(bound) > 100


def test_graphs_have_joins_of_both_kinds_branches_and_loops() -> None:
    graphs = {event.graph.name: event.graph for event in agents(1).events if isinstance(event, WorkflowBegun)}
    steps = [(number, step) for graph in graphs.values() for number, step in enumerate(graph.steps)]
    assert any(step.join is Join.ALL and len(step.after) > 1 for _, step in steps)
    assert any(step.join is Join.ANY and len(step.after) > 1 for _, step in steps)
    assert any(max(step.after, default=-1) > number for number, step in steps), "no loop"
    assert all(0 <= each < len(graph.steps) for graph in graphs.values() for step in graph.steps for each in step.after)


def test_contexts_share_ids_exactly_as_far_as_they_share_segments(model: Model) -> None:
    script = Script((model,), 1000)
    one = script.context(0)
    one.append(7, 25)
    other = one.copy()
    one.append(8, 30)
    other.append(9, 30)
    assert one.keys().size == other.keys().size == 5
    assert one.keys()[:2].tolist() == other.keys()[:2].tolist()
    assert not set(one.keys()[2:].tolist()) & set(other.keys()[2:].tolist())
    again = script.context(0)
    again.append(7, 25)
    again.append(8, 30)
    assert again.keys().tolist() == one.keys().tolist()


def test_thoughts_are_stored_below_the_prompt_and_missing_from_the_next_one(model: Model) -> None:
    script = Script((model,), 10_000)
    context = script.context(0)
    context.append(script.segment(), 20)
    done_ms = script.ask(0, context, 20, thought_tokens=30).done_ms
    script.ask(done_ms, context, 10)
    first, second = script.workload("w").requests
    assert (first.keys.size, first.output_keys.size, second.keys.size, second.tokens) == (2, 5, 4, 40)
    assert second.keys[:2].tolist() == first.keys.tolist()
    assert not set(second.keys.tolist()) & set(first.output_keys.tolist())


def test_draws_have_the_shape_that_they_are_named_after() -> None:
    draws = Draws(1)
    many = 4000
    assert sorted(draws.lognormal(1000, 0.5, most=10**6) for _ in range(many))[many // 2] == pytest.approx(
        1000, rel=0.05
    )
    assert sum(draws.exponential(1000) for _ in range(many)) / many == pytest.approx(1000, rel=0.05)
    assert sum(draws.geometric(2.0) for _ in range(many)) / many == pytest.approx(2, rel=0.1)
    above = sum(draws.pareto(100, 1.5, most=10**9) > 400 for _ in range(many)) / many
    assert log(above) == pytest.approx(-1.5 * log(4), rel=0.1)
    ranks = Zipf(100, 1.0)
    drawn = [ranks.draw(draws) for _ in range(many)]
    assert drawn.count(0) / drawn.count(1) == pytest.approx(2, rel=0.2)
    assert (min(drawn), max(drawn) < 100) == (0, True)
    assert draws.geometric(0.0) == 0
    assert {draws.between(3, 5) for _ in range(100)} == {3, 4, 5}


def test_parts_of_a_seed_are_streams_of_their_own() -> None:
    assert len({Draws(seed, part).unit() for seed in range(3) for part in range(3)}) == 9


@pytest.fixture(name="model")
def fixture_model() -> Model:
    """Blocks of ten tokens."""
    return Model("toy", 10, 100, BASE)
