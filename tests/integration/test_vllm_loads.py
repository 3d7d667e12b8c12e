"""The vLLM connector's loads and saves when something goes otherwise than planned: late, refused, aborted, shared."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch

from bench.process import DaemonProcess
from kvclient.integrations import vllm_scheduler, vllm_worker
from kvclient.integrations.vllm_jobs import LoadJob, PinJob, WordJob
from kvclient.namespace import Namespace
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from tests.integration.conftest import StartDaemon
from tests.integration.vllm_halves import TOKENS, Engine, again, load, patient, request_of
from tests.node import until

ARENA = ("--dram", "64MiB", "--arena", "4MiB")
BY_LAYER = patient(layerwise=True)
BESIDE = patient(at_once_mib=0.0)


@pytest.fixture
def daemon(empty_daemon: DaemonProcess) -> DaemonProcess:
    """One for all; some stop it for a while."""
    return empty_daemon


def plan_load(engine: Engine, request: Any, block_ids: list[int], computed: int = 0) -> bool:
    """A load of the next step; whether beside the forward."""
    engine.scheduler.on_new_request(request)
    tokens, beside = engine.scheduler.matched(request, computed)
    assert tokens
    engine.scheduler.allocated(request, block_ids, tokens)
    request.num_computed_tokens = computed + tokens
    return beside


# -- layer by layer --------------------------------------------------------------------------------------------------


def test_a_layer_is_there_while_later_ones_are_not(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, BY_LAYER)
    request = request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    caches = list(engine.workers[0].caches.values())
    worker, again_ = engine.workers[0].worker, again(request, "b")
    layers = worker._layers
    assert layers is not None
    go_on, honest = threading.Event(), layers.copy

    def copy(moves: Any) -> None:
        if layers._filled == 1:
            assert go_on.wait(30)
        honest(moves)

    layers.copy = copy  # type: ignore[method-assign]
    assert not plan_load(engine, again_, [10, 11, 12, 13])
    plan = engine.scheduler.plan({"b": 1}, {"b": [10, 11, 12, 13]}.__getitem__)
    worker.begin(plan)
    worker.wait_for_layer("layer 0")
    assert torch.equal(caches[0][10:13], caches[0][:3])
    assert not torch.equal(caches[1][10:13], caches[1][:3]), "the control: it is held up"
    go_on.set()
    worker.wait_for_layer("layer 2")
    assert torch.equal(caches[2][10:13], caches[2][:3])
    worker.end(plan)
    assert worker.take_bad_blocks() == set()
    assert worker.take_counts()["loaded_blocks"] == 3
    engine.stop()


@pytest.mark.parametrize("late", [False, True], ids=["in time", "too late"])
def test_a_lease_that_ends_before_the_last_layer_makes_all_of_it_bad(start_daemon: StartDaemon, late: bool) -> None:
    daemon = start_daemon(*ARENA, "--lease-ttl-max", "200ms" if late else "60s")
    engine = Engine(daemon.runtime_dir, BY_LAYER)
    request = request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    worker = engine.workers[0].worker
    layers = worker._layers
    assert layers is not None
    honest = layers.copy

    def copy(moves: Any) -> None:
        honest(moves)
        ends_ns = max(each.lease.deadline_ns for each in layers._under_way)
        assert not late or until(lambda: time.monotonic_ns() > ends_ns)

    layers.copy = copy  # type: ignore[method-assign]
    load(engine, again(request, "b"), [10, 11, 12, 13])
    assert worker.take_bad_blocks() == ({10, 11, 12} if late else set())
    engine.stop()


def test_what_is_gone_when_layers_are_to_be_loaded_is_bad_and_the_forward_goes_on(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, BY_LAYER)
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    plan_load(engine, again(request, "b"), [10, 11, 12, 13, 14])
    assert engine.workers[0].worker._patient.delete(request.block_hashes[2:]) == 2
    engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14]})
    assert engine.workers[0].worker.take_bad_blocks() == {12, 13}
    worker = engine.workers[0].worker
    assert worker._layers is not None
    worker._layers.copy = lambda _: 1 // 0  # type: ignore[method-assign, assignment]
    load(engine, again(request_of("a", 2), "c"), [20, 21, 22])
    assert worker.take_bad_blocks() == {20, 21}
    engine.stop()


# -- beside the forward ----------------------------------------------------------------------------------------------


def test_loads_run_side_by_side_and_one_that_nobody_wants_any_more_does_not_run(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(daemon.runtime_dir, BESIDE)
    chains = {name: request_of(name, 2) for name in "abcd"}
    for name, request in chains.items():
        engine.save(request, [0, 1, 2] if name == "a" else [3, 4, 5])
    worker = engine.workers[0].worker
    before = {name: cache.clone() for name, cache in engine.workers[0].caches.items()}
    running, go_on, honest = threading.Barrier(3), threading.Event(), worker._copy

    def copy(job: LoadJob, namespace: Namespace, wait_s: float) -> int:
        if job.request in {"a2", "b2"}:
            running.wait(30)
            assert go_on.wait(30)
        return honest(job, namespace, wait_s)

    monkeypatch.setattr(worker, "_copy", copy)
    requests = {name: again(request, f"{name}2") for name, request in chains.items()}
    for number, request in enumerate(requests.values()):
        assert plan_load(engine, request, [10 + 3 * number, 11 + 3 * number, 12 + 3 * number])
    engine.step({}, {})
    running.wait(30)  # both of the first two
    assert not engine.scheduler.finished(requests["c"], [16, 17, 18])
    engine.step({}, {})
    go_on.set()
    received: list[str] = []

    def all_came() -> bool:
        received.extend(engine.listen())
        return len(received) == 4

    assert until(all_came), "the engine must hear of every one"
    assert worker.take_bad_blocks() == set()
    assert worker.take_counts()["dropped_blocks"] == 2
    for name, cache in engine.workers[0].caches.items():
        assert torch.equal(cache[[16, 17]], before[name][[16, 17]]), "an aborted one"
        assert torch.equal(cache[[19, 20]], cache[[3, 4]]), "the control: one behind it"
        assert not torch.equal(cache[[19, 20]], before[name][[19, 20]])
    engine.stop()


def test_a_large_load_is_shared_and_told_when_its_last_part_has_ended(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "SHARED_BYTES", 1)
    engine = Engine(daemon.runtime_dir, BESIDE)
    request = request_of("a", 5)
    engine.save(request, [0, 1, 2, 3, 4, 5])
    worker = engine.workers[0].worker
    go_on, honest, parts = threading.Event(), worker._copy, []

    def copy(job: LoadJob, namespace: Namespace, wait_s: float) -> int:
        parts.append(job.block_ids)
        if 10 not in job.block_ids:
            assert go_on.wait(30)
            return honest(job, namespace, wait_s) - 1  # the last one of all is bad
        return honest(job, namespace, wait_s)

    monkeypatch.setattr(worker, "_copy", copy)
    assert plan_load(engine, again(request, "b"), [10, 11, 12, 13, 14, 15])
    engine.step({}, {})
    caches = list(engine.workers[0].caches.values())
    assert until(lambda: torch.equal(caches[-1][10:13], caches[-1][:3]))
    assert engine.listen() == set(), "the other part has not ended"
    go_on.set()
    assert until(lambda: "b" in engine.listen())
    assert sorted(parts) == [(10, 11, 12), (13, 14)]
    assert worker.take_bad_blocks() == {14}
    assert all(torch.equal(cache[10:15], cache[:5]) for cache in caches)
    assert not torch.equal(caches[0][10:15], caches[0][1:6]), "the control"
    engine.stop()


# -- saves -----------------------------------------------------------------------------------------------------------


def test_what_was_refused_is_saved_again(start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_scheduler, "REFUSED_S", 600.0)
    daemon = start_daemon(*ARENA)
    engine = Engine(daemon.runtime_dir)
    request = request_of("a", 4)
    blocks = {"a": [0, 1, 2, 3, 4]}
    engine.scheduler.on_new_request(request)
    engine.step({"a": request.num_tokens}, blocks)
    request.num_computed_tokens = 2 * TOKENS
    daemon.kill()
    assert len(engine.step({"a": 1}, blocks).saves) == 1
    assert until(lambda: engine.listen() is not None and not engine.scheduler._saves)
    assert not engine.step({"a": 1}, blocks).saves, "not at once"
    start_daemon(*ARENA)
    monkeypatch.setattr(vllm_scheduler, "_clock", lambda: time.monotonic() + 1000)
    worker = engine.workers[0].worker
    clients = (engine.lookups, *engine.workers[0].clients)  # each connects again by itself
    assert until(lambda: all(client.ping() is not None for client in clients))
    request.num_computed_tokens = request.num_tokens
    (job,) = engine.step({"a": 1}, blocks).saves
    assert job.keys == tuple(request.block_hashes), "all of it: what came before may be gone too"
    assert until(lambda: engine.listen() is not None and not engine.scheduler._saves)
    worker._patient.flush(30.0)
    assert worker._patient.match(request.block_hashes).blocks == 4
    assert not engine.step({"a": 1}, blocks).saves
    engine.stop()


@pytest.mark.parametrize(
    ("caches_prefixes", "free", "stays"), [(True, 32, False), (True, 4, True), (False, 32, True)]
)  # fmt: skip
def test_a_finished_request_gives_its_blocks_back_where_nobody_writes_them_soon(
    daemon: DaemonProcess, caches_prefixes: bool, free: int, stays: bool
) -> None:
    engine = Engine(daemon.runtime_dir, caches_prefixes=caches_prefixes)
    engine.free = free
    request, other = request_of("a", 4), request_of("b", 2)
    for each in (request, other):
        engine.scheduler.on_new_request(each)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    engine.step({"a": request.num_tokens}, {"a": [0, 1, 2, 3, 4]})
    request.num_computed_tokens = request.num_tokens
    assert engine.scheduler.finished(request, [0, 1, 2, 3, 4]) is stays
    (job,) = engine.step({}, {}).saves
    plan = engine.step({"b": other.num_tokens}, {"b": [7, 3, 8]})
    assert plan.fences == {job.number}, "whoever writes one of them withdraws the save"
    os.kill(daemon.process.pid, signal.SIGCONT)
    assert until(lambda: engine.listen() is not None and not engine.scheduler._saves)
    assert set(engine.scheduler._known) == {"b"}
    engine.stop()


@pytest.mark.parametrize("block_ids", [[7, 3, 8], [7, 9, 8]], ids=["the same memory", "other memory"])
def test_what_the_next_step_writes_is_not_saved_for_who_had_it(daemon: DaemonProcess, block_ids: list[int]) -> None:
    engine = Engine(daemon.runtime_dir, caches_prefixes=True)
    request, other = request_of("a", 4), request_of("b", 2)
    for each in (request, other):
        engine.scheduler.on_new_request(each)
    engine.step({"a": request.num_tokens}, {"a": [0, 1, 2, 3, 4]})
    request.num_computed_tokens = request.num_tokens
    assert not engine.scheduler.finished(request, [0, 1, 2, 3, 4])
    plan = engine.scheduler.plan({"b": other.num_tokens}, {"b": block_ids}.__getitem__)
    worker = engine.workers[0].worker
    worker.fence(plan)
    worker.begin(plan)
    for cache in engine.workers[0].caches.values():
        cache[block_ids] = 7.0  # what "b" computes
    worker.end(plan)
    assert until(lambda: engine.listen() is not None and not engine.scheduler._saves)
    worker._patient.flush(30.0)
    assert worker._patient.match(request.block_hashes).blocks == (0 if 3 in block_ids else 4)
    engine.stop()


@pytest.mark.parametrize(("seconds", "share"), [(60.0, 1), (0.0, 0)], ids=["asked again", "asked once"])
def test_a_daemon_that_stands_still_for_a_while_is_asked_again_for_a_pin(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, seconds: float, share: int
) -> None:
    monkeypatch.setattr(vllm_worker, "PIN_S", seconds)
    engine = Engine(daemon.runtime_dir, name=f"pinned {seconds}")
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    worker = engine.workers[0].worker
    worker.take_counts()
    worker._patient._timeout_ns = 500 * 10**6
    os.kill(daemon.process.pid, signal.SIGSTOP)
    worker._saves.put(PinJob(tuple(request.block_hashes), 60.0, None))
    assert until(lambda: "in time" in engine.workers[0].clients[1].status.why_not), "it has waited in vain once"
    os.kill(daemon.process.pid, signal.SIGCONT)
    found: dict[str, float] = {}

    def told() -> bool:
        found.update(worker.take_counts())
        return not share or "pinned_bytes" in found

    assert until(told)
    engine.stop()
    found.update(worker.take_counts())
    assert found.get("pinned_bytes", 0) == share * 4 * worker._layout.block_bytes


def test_a_pin_that_nobody_answers_holds_up_nothing_behind_it(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "PIN_S", 3600.0)
    engine = Engine(daemon.runtime_dir, name="held up")
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    worker = engine.workers[0].worker
    worker._patient._timeout_ns = 500 * 10**6
    keys = tuple(request.block_hashes)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    for _ in range(10):
        worker._saves.put(PinJob(keys, 60.0, None))
        worker._saves.put(WordJob(keys, "soon"))
    assert until(worker._saves.empty), "the daemon still stands still"
    os.kill(daemon.process.pid, signal.SIGCONT)
    engine.stop()


def test_words_of_priority_reach_the_daemon_behind_the_saves(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir)
    for number, priority in enumerate(("high", "low", None)):
        params = {"kvstored": {"priority": priority}} if priority else None
        engine.save(request_of(f"request {number}", 3, params=params), [0, 1, 2, 3])
    words = [job for plan in engine.plans for job in plan.pins if isinstance(job, WordJob)]
    assert [(len(job.keys), job.expectation) for job in words] == [(3, "soon"), (3, "hardly")]
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as operator:
        assert until(lambda: operator.programs(pb.ListProgramsRequest()).counters.said_blocks == 6)
    engine.stop()


def test_a_load_beside_the_forward_that_failed_is_not_tried_again(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(daemon.runtime_dir, BESIDE)
    engine.save(request_of("a", 4), [0, 1, 2, 3, 4])
    worker, scheduler, honest = engine.workers[0].worker, engine.scheduler, engine.workers[0].worker._copy
    for name, fails in (("good", False), ("bad", True)):
        request = again(request_of("a", 4), name)
        assert plan_load(engine, request, [10, 11, 12, 13, 14])
        monkeypatch.setattr(worker, "_copy", (lambda *_: 0) if fails else honest)
        plan = scheduler.plan({}, lambda _: [])
        worker.begin(plan)
        worker.end(plan)
        assert until(lambda: worker._received)
        bad_blocks = worker.take_bad_blocks()
        assert bad_blocks == ({10, 11, 12, 13} if fails else set())
        scheduler.heard(worker.take_progress(), worker.take_received(), bad_blocks)
        # As vLLM asks where all of a load has failed: what fails for ever would never run.
        assert scheduler.matched(request, 0) == ((0, False) if fails else (4 * TOKENS, True))
    other = again(request, "c")
    scheduler.on_new_request(other)
    assert scheduler.matched(other, 0) == (4 * TOKENS, True), "the control: others may"
    engine.stop()


# -- vLLM's own cache ------------------------------------------------------------------------------------------------


def test_a_request_waits_for_what_another_one_loads_in_the_same_step(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, caches_prefixes=True)
    request, stranger = request_of("a", 4), request_of("s", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    engine.save(stranger, [0, 1, 2, 3, 4])
    assert not plan_load(engine, again(request, "b"), [10, 11, 12, 13, 14])
    other, third = again(request, "c"), again(stranger, "d")
    for each in (other, third):
        engine.scheduler.on_new_request(each)
    assert engine.scheduler.matched(other, 4 * TOKENS) == (None, False), "vLLM's cache has them, or will"
    assert engine.scheduler.matched(other, 0) == (4 * TOKENS, False), "its own load is its own"
    assert engine.scheduler.matched(third, 2 * TOKENS) == (2 * TOKENS, False), "the control: another chain"
    engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14]})
    assert engine.scheduler.matched(other, 4 * TOKENS) == (0, False), "it is known to be there"
    engine.stop()


def test_bad_blocks_and_what_was_computed_on_them_are_forgotten(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, caches_prefixes=True)
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    other = again(request, "b")
    other.block_hashes = request.block_hashes + request_of("tail", 2).block_hashes
    other.num_tokens = 6 * TOKENS + 1
    assert not plan_load(engine, other, [10, 11, 12, 13, 14, 15, 16])
    engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14, 15, 16]})
    engine.scheduler.heard(None, (), {12, 99})
    assert engine.forgotten == [{12, 13, 14, 15, 16}]
    other.num_computed_tokens = 4 * TOKENS  # computed anew
    (job,) = engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14, 15, 16]}).saves
    assert job.keys == tuple(other.block_hashes[:4])
    engine.scheduler.heard(None, (), {12})
    assert len(engine.forgotten) == 1, "no load in that step"
    engine.stop()
