"""Loads that begin while their step is being planned: with a real daemon and plain tensors, step by step."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.process import DaemonProcess
from kvclient.integrations import vllm_early
from kvclient.integrations.vllm_early import Copy
from kvclient.integrations.vllm_jobs import LoadJob
from tests.integration.vllm_halves import Engine, again, load, request_of
from tests.node import until

SAVED, LOADED = [3, 1, 4, 15, 9, 2], [20, 22, 21, 25, 23, 24]


@pytest.fixture
def engine(daemon: DaemonProcess, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Both halves in one process; no load is too small, and each is of several parts."""
    monkeypatch.setattr(vllm_early, "LEAST_BYTES", 0)
    monkeypatch.setattr(vllm_early, "PART_BYTES", 8192)
    engine = Engine(daemon.runtime_dir, name=request.node.name, near=True)
    yield engine
    engine.stop()


def plan_load(engine: Engine, request: Any, block_ids: list[int]) -> int:
    """Have it looked up and its memory set aside, and no more; tokens that are to be loaded."""
    engine.scheduler.on_new_request(request)
    tokens, beside = engine.scheduler.matched(request, 0)
    assert tokens
    assert not beside
    engine.scheduler.allocated(request, block_ids, tokens)
    request.num_computed_tokens = tokens
    return tokens


def run(engine: Engine, request: Any, block_ids: list[int]) -> set[int]:
    """The step; blocks that were not filled."""
    engine.step({request.request_id: 1}, {request.request_id: block_ids})
    return engine.workers[0].worker.take_bad_blocks()


def same(engine: Engine, before: dict[str, torch.Tensor], loaded: list[int]) -> bool:
    """Are these blocks what was saved?"""
    caches = engine.workers[0].caches
    return all(torch.equal(caches[name][loaded[:5]], before[name][SAVED[:5]]) for name in caches)


@pytest.fixture
def saved(engine: Engine) -> tuple[Any, dict[str, torch.Tensor]]:
    """A request that is in the store, and the engine's memory as it was then."""
    request = request_of("a", 5)
    engine.save(request, SAVED)
    return request, {name: cache.clone() for name, cache in engine.workers[0].caches.items()}


def test_a_load_begins_before_its_step_and_ends_within_it(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    second = again(request, "b")
    assert not same(engine, before, LOADED), "the control: other blocks until then"
    plan_load(engine, second, LOADED)
    early = engine.workers[0].worker._early
    assert len(early._begun["b"].copies) > 1
    assert until(lambda: same(engine, before, LOADED)), "without a step"
    assert run(engine, second, LOADED) == set()
    assert same(engine, before, LOADED)
    assert not early._begun
    assert engine.workers[0].worker.take_counts()["loaded_blocks"] == 5


def test_what_the_thread_has_not_begun_the_engine_does_itself(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, before = saved
    monkeypatch.setattr(vllm_early.EarlyLoads, "_start", lambda *_: None)
    assert load(engine, again(request, "b"), LOADED) == 5
    assert engine.workers[0].worker.take_bad_blocks() == set()
    assert same(engine, before, LOADED)


@pytest.mark.usefixtures("engine")
def test_a_lease_that_has_lapsed_by_then_makes_every_block_bad(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    second = again(saved[0], "b")
    plan_load(engine, second, LOADED)
    for part in engine.workers[0].worker._early._begun["b"].lease._parts:
        part.deadline_ns = 1
    assert run(engine, second, LOADED) == set(LOADED[:5])


def test_a_part_that_cannot_be_copied_makes_every_block_bad(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no")

    made = vllm_early.Copy
    calls = iter(range(100))
    monkeypatch.setattr(vllm_early, "Copy", lambda copying: made(fail if next(calls) == 1 else copying))
    second = again(saved[0], "b")
    plan_load(engine, second, LOADED)
    assert run(engine, second, LOADED) == set(LOADED[:5])


def test_a_step_that_never_came_leaves_nothing_behind(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    second = again(request, "b")
    plan_load(engine, second, [10, 11, 12, 13, 14, 16])
    engine.scheduler._plan.loads.clear()  # whatever made the engine give that step up
    engine.scheduler._at_once.clear()
    second.num_computed_tokens = 0
    plan_load(engine, second, LOADED)
    assert run(engine, second, LOADED) == set()
    assert same(engine, before, LOADED)


def test_the_blocks_of_another_plan_are_loaded_anew(engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]) -> None:
    request, before = saved
    early = engine.workers[0].worker._early
    second = again(request, "b")
    plan_load(engine, second, LOADED)
    (job,) = engine.scheduler._plan.loads
    other = type(job)(job.request, job.keys, (10, 11, 12, 13, 14), job.at_once)
    assert early.end(other) is None
    assert early.end(job) is None, "it is over, too"
    engine.scheduler._plan.loads[:] = [other]
    assert run(engine, second, LOADED) == set()
    assert same(engine, before, [10, 11, 12, 13, 14])


def test_a_save_that_reads_the_same_blocks_is_withdrawn_before(engine: Engine) -> None:
    worker = engine.workers[0].worker
    order: list[str] = []
    worker._withdraw = lambda fences: order.append(f"withdraw {sorted(fences)}")  # type: ignore[method-assign]
    worker._early.begin = lambda job: order.append(job.request)  # type: ignore[method-assign]
    job = LoadJob("b", (b"k" * 32,), (1,), True)
    worker.begin_early(job, {7})
    assert order == ["withdraw [7]", "b"]


def test_a_copy_runs_once_whoever_takes_it() -> None:
    ran: list[str] = []
    gate, begun = threading.Event(), threading.Event()

    def copying() -> None:
        begun.set()
        gate.wait(5)
        ran.append(threading.current_thread().name)

    copy = Copy(copying)
    thread = threading.Thread(target=copy.run, name="other")
    thread.start()
    assert begun.wait(5)
    copy.run()  # somebody else does it
    assert ran == []
    gate.set()
    assert copy.good()
    assert ran == ["other"]
    thread.join()
    never = Copy(copying)
    never.cancel()
    never.run()
    assert ran == ["other"]
    assert not never.good()
