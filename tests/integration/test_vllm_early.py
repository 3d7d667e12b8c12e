"""Loads that begin while their step is being planned: with a real daemon and plain tensors, step by step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvclient
from bench.process import DaemonProcess
from kvclient.integrations import vllm_early
from kvclient.integrations.vllm_copies import Asking, Copy, copy_pieces
from kvclient.integrations.vllm_jobs import LoadJob, Plan
from kvctl.client import ControlClient
from tests.integration.conftest import StartDaemon
from tests.integration.vllm_halves import TOKENS, Engine, again, load, request_of
from tests.node import until

SAVED, LOADED, ELSEWHERE = [3, 1, 4, 15, 9, 2], [20, 22, 21, 25, 23, 24], [10, 11, 12, 13, 14, 16]


@pytest.fixture(params=["layers", "blocks"])
def engine(daemon: DaemonProcess, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Both halves in one process; no load is too small, and each is of several parts: of layers, or of blocks."""
    monkeypatch.setattr(vllm_early, "LEAST_BYTES", 0)
    monkeypatch.setattr(vllm_early, "PART_BYTES", 4096)
    monkeypatch.setattr(vllm_early, "FIRST_BYTES", 1)
    if request.param == "blocks":
        monkeypatch.setattr(Asking, "is_sure", False)
    engine = Engine(daemon.runtime_dir, name=request.node.name, near=True)
    yield engine
    engine.stop()


by_layers = pytest.mark.parametrize("engine", ["layers"], indirect=True)


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
    with engine.workers[0].worker._quick.fetch(request.block_hashes) as lease:  # which maps it
        assert until(lambda: len(lease.sources()) == 5)
    before = {name: cache.clone() for name, cache in engine.workers[0].caches.items()}
    for block_ids in (LOADED, ELSEWHERE):
        for name in before:
            for there, here in zip(block_ids[:5], SAVED[:5], strict=True):
                assert not torch.equal(before[name][there], before[name][here]), "the control: others until loaded"
    return request, before


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

    made = Copy
    calls = iter(range(100))
    monkeypatch.setattr(
        "kvclient.integrations.vllm_early.Copy", lambda copying: made(fail if next(calls) == 1 else copying)
    )
    second = again(saved[0], "b")
    plan_load(engine, second, LOADED)
    assert run(engine, second, LOADED) == set(LOADED[:5])


def test_without_a_thread_more_the_engine_copies_itself(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    request, before = saved
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", none_left)
        assert load(engine, again(request, "b"), LOADED) == 5
        assert engine.workers[0].worker._early._thread is None
    assert engine.workers[0].worker.take_bad_blocks() == set()
    assert same(engine, before, LOADED)
    assert load(engine, again(request, "c"), LOADED) == 5
    assert engine.workers[0].worker._early._thread is not None, "the control: there is one again"


def test_what_cannot_be_begun_early_is_tried_again_before_the_forward(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no")

    request, before = saved
    monkeypatch.setattr(vllm_early.EarlyLoads, "_of_layers", fail)
    monkeypatch.setattr(vllm_early.EarlyLoads, "_of_blocks", fail)
    assert load(engine, again(request, "b"), LOADED) == 5
    assert engine.workers[0].worker.take_bad_blocks() == set()
    assert same(engine, before, LOADED)
    assert until(lambda: open_leases(engine) == 0)


def test_a_step_that_never_came_leaves_nothing_behind(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    second = again(request, "b")
    plan_load(engine, second, ELSEWHERE)
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
    other = type(job)(job.request, job.keys, tuple(ELSEWHERE[:5]), job.at_once)
    assert early.end(other) is None
    assert early.end(job) is None, "it is over, too"
    engine.scheduler._plan.loads[:] = [other]
    assert run(engine, second, LOADED) == set()
    assert same(engine, before, ELSEWHERE)


def test_a_save_that_reads_the_same_blocks_is_withdrawn_before(engine: Engine) -> None:
    worker = engine.workers[0].worker
    order: list[str] = []
    worker._withdraw = lambda fences: order.append(f"withdraw {sorted(fences)}")  # type: ignore[method-assign]
    worker._early.begin = lambda job: order.append(job.request)  # type: ignore[method-assign]
    job = LoadJob("b", (b"k" * 32,), (1,), True)
    worker.begin_early(job, {7})
    assert order == ["withdraw [7]", "b"]


# -- beside the forward ----------------------------------------------------------------------------------------------


def begin_step(engine: Engine, request: Any, block_ids: list[int]) -> Plan:
    """A step up to its forward."""
    plan = engine.scheduler.plan({request.request_id: 1}, {request.request_id: block_ids}.__getitem__)
    engine.workers[0].worker.begin(plan)
    return plan


@by_layers
def test_a_layer_is_there_while_later_ones_are_not(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, before = saved
    caches, worker = engine.workers[0].caches, engine.workers[0].worker
    go_on, calls, honest = threading.Event(), iter(range(100)), copy_pieces

    def held_up(*pieces: Any) -> None:
        assert next(calls) == 0 or go_on.wait(30)
        honest(*pieces)

    monkeypatch.setattr("kvclient.integrations.vllm_early.copy_pieces", held_up)
    second = again(request, "b")
    plan_load(engine, second, LOADED)
    begun = worker._early._begun["b"]
    assert until(lambda: begun.copies[0].is_over)
    plan = begin_step(engine, second, LOADED)
    worker.wait_for_layer("layer 0")
    assert torch.equal(caches["layer 0"][LOADED[:5]], before["layer 0"][SAVED[:5]])
    assert not torch.equal(caches["layer 1"][LOADED[:5]], before["layer 1"][SAVED[:5]]), "the control: it is held up"
    go_on.set()
    worker.wait_for_layer("layer 1")
    assert torch.equal(caches["layer 1"][LOADED[:5]], before["layer 1"][SAVED[:5]])
    worker.wait_for_layer("layer 2")
    worker.end(plan)
    assert worker.take_bad_blocks() == set()
    assert worker.take_counts()["loaded_blocks"] == 5
    assert same(engine, before, LOADED)


@by_layers
def test_what_the_forward_asks_for_first_it_copies_itself(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, before = saved
    caches, worker = engine.workers[0].caches, engine.workers[0].worker
    monkeypatch.setattr(vllm_early.EarlyLoads, "_start", lambda *_: None)
    second = again(request, "b")
    plan_load(engine, second, LOADED)
    plan = begin_step(engine, second, LOADED)
    assert not torch.equal(caches["layer 0"][LOADED[:5]], before["layer 0"][SAVED[:5]]), "the control"
    worker.wait_for_layer("layer 0")
    assert torch.equal(caches["layer 0"][LOADED[:5]], before["layer 0"][SAVED[:5]])
    assert not torch.equal(caches["layer 1"][LOADED[:5]], before["layer 1"][SAVED[:5]])
    worker.wait_for_layer("of another model")
    assert same(engine, before, LOADED), "who asks for what nobody knows has to have everything"
    for name in caches:
        worker.wait_for_layer(name)
    worker.end(plan)
    assert worker.take_bad_blocks() == set()


@by_layers
def test_a_lease_that_lapses_beside_the_forward_makes_every_block_bad(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    worker, second = engine.workers[0].worker, again(saved[0], "b")
    plan_load(engine, second, LOADED)
    plan = begin_step(engine, second, LOADED)
    for name in engine.workers[0].caches:
        worker.wait_for_layer(name)
    for part in worker._early._beside[0].lease._parts:
        part.deadline_ns = 1
    worker.end(plan)
    assert worker.take_bad_blocks() == set(LOADED[:5])


@by_layers
def test_of_two_loads_beside_one_forward_only_the_one_that_lapsed_is_bad(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, before = saved
    monkeypatch.setattr(vllm_early.EarlyLoads, "_start", lambda *_: None)  # each layer has to be waited for
    caches, worker = engine.workers[0].caches, engine.workers[0].worker
    plan_load(engine, again(request, "b"), LOADED)
    plan_load(engine, again(request, "c"), ELSEWHERE)
    plan = engine.scheduler.plan({"b": 1, "c": 1}, {"b": LOADED, "c": ELSEWHERE}.__getitem__)
    worker.begin(plan)
    for part in worker._early._beside[0].lease._parts:
        part.deadline_ns = 1
    for name in caches:
        assert not torch.equal(caches[name][ELSEWHERE[:5]], before[name][SAVED[:5]]), "the control: not before"
        worker.wait_for_layer(name)
        for block_ids in (LOADED, ELSEWHERE):
            assert torch.equal(caches[name][block_ids[:5]], before[name][SAVED[:5]])
    worker.end(plan)
    assert worker.take_bad_blocks() == set(LOADED[:5])
    assert until(lambda: open_leases(engine) == 0)


@by_layers
def test_a_forward_may_take_longer_than_the_lease_of_what_was_copied_in_time(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    worker, second = engine.workers[0].worker, again(request, "b")
    plan_load(engine, second, LOADED)
    plan = begin_step(engine, second, LOADED)
    for name in engine.workers[0].caches:
        worker.wait_for_layer(name)
    (begun,) = worker._early._beside
    for part in begun.lease._parts:
        part.deadline_ns = time.monotonic_ns()
    assert not begun.lease.valid(), "the control: it is over by now"
    worker.end(plan)
    assert worker.take_bad_blocks() == set()
    assert same(engine, before, LOADED)


@by_layers
def test_what_a_load_took_is_not_what_the_forward_took(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    worker, second = engine.workers[0].worker, again(saved[0], "b")
    plan_load(engine, second, LOADED)
    plan = begin_step(engine, second, LOADED)
    for name in engine.workers[0].caches:
        worker.wait_for_layer(name)
    (begun,) = worker._early._beside
    begun.since, begun.ready = begun.since - 1000, begun.ready - 1000  # the forward takes that long
    worker.end(plan)
    counted = worker.take_counts()
    assert counted["beside_blocks"] == 5, "the control"
    assert 0 < counted["load_seconds"] < 500


@by_layers
def test_a_forward_that_does_not_ask_makes_every_block_bad_and_no_load_goes_on_beside_one_again(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    worker = engine.workers[0].worker
    second, third = again(request, "b"), again(request, "c")
    plan_load(engine, second, LOADED)
    plan = begin_step(engine, second, LOADED)
    assert worker._early._beside
    worker.wait_for_layer("layer 0")
    worker.wait_for_layer("layer 2")
    worker.end(plan)
    assert worker.take_bad_blocks() == set(LOADED[:5]), "layer 1 was read whenever it was"
    assert load(engine, third, LOADED) == 5
    plan_load(engine, again(request, "d"), ELSEWHERE)
    plan = begin_step(engine, again(request, "d"), ELSEWHERE)
    assert not worker._early._beside
    assert same(engine, before, ELSEWHERE), "before the forward"
    worker.end(plan)
    assert worker.take_bad_blocks() == set()


def test_nothing_goes_on_beside_a_forward_before_one_has_asked_for_every_layer() -> None:
    asking = Asking(2)
    for asked in ((), (0,), (1, -1)):
        for layer in asked:
            asking.note(layer)
        asking.end(relied_on=False)
        assert not asking.is_sure, "a step without a forward, or with one that reads some layers unasked"
    asking.note(0)
    asking.note(1)
    assert asking.end(relied_on=False)
    assert asking.is_sure
    asking.end(relied_on=False)
    assert asking.is_sure, "a step without a forward"
    asking.note(1)
    assert not asking.end(relied_on=True)
    asking.note(0)
    asking.note(1)
    assert asking.end(relied_on=False)
    assert not asking.is_sure, "for good"


@by_layers
def test_where_the_kernel_copies_nothing_for_us_memmove_does(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, before = saved
    monkeypatch.setattr("kvclient.integrations.vllm_copies.Pieces.copy", lambda _: False)
    assert load(engine, again(request, "b"), LOADED) == 5
    assert engine.workers[0].worker.take_bad_blocks() == set()
    assert same(engine, before, LOADED)


# -- leases that are asked for early ---------------------------------------------------------------------------------


def open_leases(engine: Engine) -> int:
    """Of the whole daemon."""
    with ControlClient(engine.run / "control.sock", 20.0) as control:
        return sum(each.leases for each in control.clients().clients)


@by_layers
def test_a_lease_that_was_asked_for_and_found_no_memory_is_given_back(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    second = again(saved[0], "b")
    engine.scheduler.on_new_request(second)
    tokens, _ = engine.scheduler.matched(second, 0)
    assert tokens
    early = engine.workers[0].worker._early
    assert early._asked["b"].keys == tuple(second.block_hashes)
    assert until(lambda: open_leases(engine) == 1), "the control: it is held"
    engine.step({}, {})
    assert not early._asked
    assert until(lambda: open_leases(engine) == 0)


@by_layers
def test_a_load_of_less_than_was_asked_for_has_a_lease_of_its_own(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]]
) -> None:
    request, before = saved
    second = again(request, "b")
    engine.scheduler.on_new_request(second)
    tokens, _ = engine.scheduler.matched(second, 0)
    assert tokens == 5 * TOKENS
    engine.scheduler.allocated(second, LOADED, 3 * TOKENS)
    assert len(engine.workers[0].worker._early._begun["b"].job.keys) == 3
    assert run(engine, second, LOADED) == set()
    caches = engine.workers[0].caches
    assert all(torch.equal(caches[name][LOADED[:3]], before[name][SAVED[:3]]) for name in caches)
    assert not same(engine, before, LOADED), "the control: no more than that"
    assert until(lambda: open_leases(engine) == 0)


def test_a_daemon_that_dies_before_it_answers_is_a_lease_of_nothing(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB")
    with kvclient.connect(daemon.runtime_dir, timeout_s=30.0) as client:
        assert client.wait_connected(30)
        namespace = client.namespace(model="m", engine="e", layout="l", dtype="uint8", block_bytes=4096)
        assert namespace.store([b"k" * 32], [bytearray(4096)], wait=True).accepted == 1
        lease = namespace.start_fetch([b"k" * 32])
        assert lease().blocks == 1, "the control"
        os.kill(daemon.process.pid, signal.SIGSTOP)
        lease = namespace.start_fetch([b"k" * 32])
        daemon.kill()
        assert lease().blocks == 0
        assert namespace.start_fetch([b"k" * 32])().blocks == 0


@by_layers
def test_the_thread_that_copies_leaves_the_engine_its_processor_and_no_other_thread_moves(
    engine: Engine, saved: tuple[Any, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors = os.sched_getaffinity(0)
    threads = {each.native_id: os.sched_getaffinity(each.native_id or 0) for each in threading.enumerate()}
    for mine in sorted(processors)[:2]:
        monkeypatch.setattr(vllm_early, "current_cpu", lambda mine=mine: mine)
        assert load(engine, again(saved[0], f"on {mine}"), LOADED) == 5
        copying = engine.workers[0].worker._early._thread
        assert copying is not None
        kept = os.sched_getaffinity(copying.native_id or 0)
        assert kept == processors - {mine} or kept == processors == {mine}, "the only one is shared"
    assert os.sched_getaffinity(0) == processors
    assert {each: os.sched_getaffinity(each or 0) for each in threads} == threads


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
