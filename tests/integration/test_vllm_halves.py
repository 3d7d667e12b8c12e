"""Both halves of the vLLM connector with a real daemon and plain tensors: what an engine would see, step by step."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvclient
from bench.process import DaemonProcess
from kvclient.integrations import vllm_scheduler
from kvclient.integrations.vllm_settings import Settings
from tests.integration.conftest import StartDaemon
from tests.integration.vllm_halves import BLOCKS, TOKENS, Engine, again, load, patient, request_of
from tests.node import PATIENCE_S, Node, until


@pytest.fixture
def daemon(empty_daemon: DaemonProcess) -> DaemonProcess:
    """One for all; some stop it for a while."""
    return empty_daemon


@pytest.fixture
def engine(daemon: DaemonProcess) -> Iterator[Engine]:
    """One rank."""
    engine = Engine(daemon.runtime_dir)
    yield engine
    engine.stop()


@pytest.mark.parametrize(
    "settings", [patient(), patient(at_once_mib=0.0), patient(layerwise=True)],
    ids=["before the forward", "beside it", "layer by layer"],
)  # fmt: skip
def test_what_is_saved_from_some_blocks_is_loaded_into_others(daemon: DaemonProcess, settings: Settings) -> None:
    engine = Engine(daemon.runtime_dir, settings)
    request = request_of("a", 5)
    engine.save(request, [3, 1, 4, 15, 9, 2])
    caches = engine.workers[0].caches
    before = {name: cache.clone() for name, cache in caches.items()}
    assert load(engine, again(request, "b"), [20, 22, 21, 25, 23, 24]) == 5
    for name, cache in caches.items():
        assert torch.equal(cache[[20, 22, 21, 25, 23]], before[name][[3, 1, 4, 15, 9]])
        assert not torch.equal(cache[20], before[name][20]), "the control: it was another one before"
        untouched = [block for block in range(BLOCKS) if block not in {20, 22, 21, 25, 23}]
        assert torch.equal(cache[untouched], before[name][untouched])
    assert engine.workers[0].worker.take_bad_blocks() == set()
    engine.stop()


def test_a_save_whose_blocks_are_written_again_is_never_stored(daemon: DaemonProcess, engine: Engine) -> None:
    request, other = request_of("a", 4), request_of("b", 4)
    engine.scheduler._known.clear()
    for each in (request, other):  # looked up now, or that would wait in vain
        engine.scheduler.on_new_request(each)
    os.kill(daemon.process.pid, signal.SIGSTOP)  # so that the save waits for its first answer
    engine.step({"a": request.num_tokens}, {"a": [0, 1, 2, 3, 4]})
    request.num_computed_tokens = request.num_tokens
    assert len(engine.step({"a": 1}, {"a": [0, 1, 2, 3, 4]}).saves) == 1
    plan = engine.step({"b": other.num_tokens}, {"b": [3, 2, 1, 0, 5]})
    assert plan.fences == {0}
    other.num_computed_tokens = other.num_tokens
    engine.scheduler.finished(other, [3, 2, 1, 0, 5])
    engine.step({}, {})
    for cache in engine.workers[0].caches.values():
        cache[:4] = 7.0  # what "b" computes there
    os.kill(daemon.process.pid, signal.SIGCONT)
    assert until(lambda: engine.listen() is not None and engine.saved == 2)
    time_is_up = time.monotonic() + 5
    while engine.lookups.ping() is None and time.monotonic() < time_is_up:
        continue
    found = engine.workers[0].worker._patient.match(request.block_hashes)
    assert found.blocks == 0, "its memory was withdrawn"
    counts = engine.workers[0].worker.take_counts()
    assert counts["refused_blocks"] >= 4


def test_blocks_of_a_finished_request_stay_until_they_are_saved(daemon: DaemonProcess, engine: Engine) -> None:
    request = request_of("a", 4)
    engine.scheduler.on_new_request(request)
    os.kill(daemon.process.pid, signal.SIGSTOP)
    engine.step({"a": request.num_tokens}, {"a": [0, 1, 2, 3, 4]})
    request.num_computed_tokens = request.num_tokens
    assert engine.scheduler.finished(request, [0, 1, 2, 3, 4])
    worker = engine.workers[0].worker
    worker.end(engine.scheduler.plan({}, lambda _: []))
    assert worker.take_closed() == set()
    os.kill(daemon.process.pid, signal.SIGCONT)
    assert until(lambda: worker.take_closed() == {"a"})
    engine.listen()
    quick = request_of("q", 2)
    engine.save(quick, [7, 8, 9])
    assert not engine.scheduler.finished(quick, [7, 8, 9]), "one of which nothing is known holds nothing"


def test_a_block_is_there_if_every_rank_has_it(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, ranks=2)
    request = request_of("a", 6)
    engine.save(request, [0, 1, 2, 3, 4, 5, 6])
    shards = engine.scheduler._shards
    assert [shard.match(request.block_hashes).blocks for shard in shards] == [6, 6]
    assert engine.workers[1].worker._patient.delete(request.block_hashes[4:]) == 2
    assert load(engine, again(request, "b"), [10, 11, 12, 13, 14, 15, 16]) == 4
    for rank in engine.workers:
        for cache in rank.caches.values():
            assert torch.equal(cache[10:14], cache[0:4])
            assert not torch.equal(cache[14], cache[4])
    engine.stop()


def test_the_time_of_a_prefill_is_told_although_the_next_step_is_planned_before_its_end(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, ranks=2)
    request = request_of("a", 4)
    engine.scheduler.on_new_request(request)
    reported: list[tuple[int, int]] = []
    shard: Any = SimpleNamespace(report_prefill=lambda cached, new, _: reported.append((cached, new)))
    engine.scheduler._steps._shards = [shard]
    plans = []
    for tokens in (request.num_tokens, 1):
        plans.append(engine.scheduler.plan({"a": tokens}, {"a": [0, 1, 2, 3, 4, 5]}.__getitem__))
        request.num_computed_tokens += tokens
    for plan, heard in zip(plans, ([(0, request.num_tokens)], []), strict=True):
        assert not reported
        for rank in engine.workers:
            rank.worker.begin(plan)
            rank.worker.end(plan)
        engine.listen()
        assert reported == heard
        reported.clear()
    engine.stop()


def test_a_daemon_that_does_not_answer_is_not_asked_again_for_a_while(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_scheduler, "SILENCE_S", 600.0)
    engine = Engine(daemon.runtime_dir, Settings(lookup_timeout_ms=100.0))
    request = request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    os.kill(daemon.process.pid, signal.SIGSTOP)
    engine.scheduler.take_counts()
    for number in range(20):
        one = again(request, f"{number}")
        engine.scheduler.on_new_request(one)
        assert engine.scheduler.matched(one, 0) == (0, False)
    assert engine.scheduler.take_counts()["lookups"] == 1
    os.kill(daemon.process.pid, signal.SIGCONT)
    engine.stop()


def test_a_second_request_waits_for_the_load_of_the_first(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, patient(at_once_mib=0.0))
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    one, two = again(request, "one"), again(request, "two")
    for each in (one, two):
        engine.scheduler.on_new_request(each)
    tokens, beside = engine.scheduler.matched(one, 0)
    assert (tokens, beside) == (4 * TOKENS, True)
    engine.scheduler.allocated(one, [10, 11, 12, 13, 14], 4 * TOKENS)
    assert engine.scheduler.matched(two, 0) == (None, False)
    engine.step({}, {})
    assert until(lambda: "one" in engine.listen())
    assert engine.scheduler.matched(two, 0) == (4 * TOKENS, True), "of an engine without a prefix cache of its own"
    engine.stop()


def test_a_load_of_what_is_gone_says_which_blocks_are_bad(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--arena", "4MiB")
    engine = Engine(daemon.runtime_dir)
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    other = again(request, "b")
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.matched(other, 0) == (4 * TOKENS, False)
    engine.scheduler.allocated(other, [10, 11, 12, 13, 14], 4 * TOKENS)
    daemon.kill()
    engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14]})
    assert engine.workers[0].worker.take_bad_blocks() == {10, 11, 12, 13}
    engine.stop()


@pytest.mark.parametrize("at_once_mib", [32.0, 0.0], ids=["before the forward", "beside it"])
def test_a_load_that_fails_as_nobody_foresaw_is_told_like_any_other(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, at_once_mib: float
) -> None:
    engine = Engine(daemon.runtime_dir, patient(at_once_mib=at_once_mib))
    request = request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    worker = engine.workers[0].worker
    monkeypatch.setattr(worker, "_copy", lambda *_: 1 // 0)
    assert load(engine, again(request, "b"), [10, 11, 12, 13]) == 3
    assert worker.take_bad_blocks() == {10, 11, 12}
    engine.stop()


# -- blocks on disk --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon that writes everything to disk."""
    with Node() as node:
        node.start("--disk-admission", "all")
        yield node


class Drive:
    """Reads ahead when the test says so; until then it only notes what is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []  # blocks of each
        self._waiting: list[Callable[[], object]] = []
        honest = kvclient.Namespace.prefetch

        def prefetch(namespace: kvclient.Namespace, keys: Sequence[bytes], **more: Any) -> Any:
            self.asked.append(len(keys))
            self._waiting.append(lambda: honest(namespace, keys, **more))
            return SimpleNamespace(cancel=lambda: None)

        monkeypatch.setattr(kvclient.Namespace, "prefetch", prefetch)

    def go_on(self) -> None:
        for read in self._waiting:
            read()


def on_disk_alone(node: Node, settings: Settings, name: str) -> tuple[Engine, Any]:
    """An engine, and a request whose blocks have left memory."""
    # Too short to be timed: an engine that computes nothing would be found faster than any disk.
    engine, request = Engine(node.run, settings, name=name), request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    (shard,) = engine.scheduler._shards
    control = again(request, "in memory")
    engine.scheduler.on_new_request(control)
    assert engine.scheduler.matched(control, 0)[0] == 3 * TOKENS, "the control: what is in memory is not waited for"
    node.stop()
    node.start("--disk-admission", "all")
    assert until(lambda: shard.match(request.block_hashes).tiers.disk == 3)
    engine.scheduler._silent_until = 0.0  # it may have been asked for while it was away
    return engine, request


@pytest.mark.parametrize("at_once_mib", [32.0, 0.0], ids=["before the forward", "beside it"])
def test_a_request_waits_for_blocks_that_it_has_fetched_from_disk(
    node: Node, monkeypatch: pytest.MonkeyPatch, at_once_mib: float
) -> None:
    drive = Drive(monkeypatch)
    settings = patient(at_once_mib=at_once_mib, disk_wait_s=PATIENCE_S)
    engine, request = on_disk_alone(node, settings, f"fetched {at_once_mib}")
    assert drive.asked == [], "nothing of what is in memory"
    other = again(request, "b")
    engine.scheduler.on_new_request(other)
    assert drive.asked == [3], "as early as anything is known of it"
    for _ in range(3):
        assert engine.scheduler.matched(other, 0) == (None, False)
    drive.go_on()
    answers: list[tuple[int | None, bool]] = []

    def comes() -> bool:
        answers.append(engine.scheduler.matched(other, 0))
        return answers[-1] != (None, False)

    assert until(comes)
    assert answers[-1] == (3 * TOKENS, not at_once_mib), "out of memory"
    assert drive.asked == [3], "once"
    engine.stop()


def test_a_request_waits_for_a_disk_as_long_as_it_may_and_then_loads_beside_the_forward(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive = Drive(monkeypatch)  # which never reads ahead
    engine, request = on_disk_alone(node, patient(disk_wait_s=0.2), "never fetched")
    before = {name: cache.clone() for name, cache in engine.workers[0].caches.items()}
    other = again(request, "b")
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.matched(other, 0) == (None, False)
    answers: list[tuple[int | None, bool]] = []

    def is_over() -> bool:
        answers.append(engine.scheduler.matched(other, 0))
        return answers[-1] != (None, False)

    assert until(is_over)
    assert answers[-1] == (3 * TOKENS, True)
    assert drive.asked == [3]
    for name in before:
        assert not torch.equal(before[name][10:13], before[name][:3]), "the control: others until they are loaded"
    engine.scheduler.allocated(other, [10, 11, 12, 13], 3 * TOKENS)
    (job,) = engine.step({}, {}).loads
    assert job.from_disk
    assert until(lambda: "b" in engine.listen())
    for name, cache in engine.workers[0].caches.items():
        assert torch.equal(cache[10:13], before[name][:3])
    engine.stop()
