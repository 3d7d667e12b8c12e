"""Both halves of the vLLM connector with a real daemon and plain tensors: what an engine would see, step by step."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvclient
from bench.process import DaemonProcess
from kvclient import Role
from kvclient.integrations.vllm_jobs import Plan, Progress
from kvclient.integrations.vllm_layout import Layout, layout_of
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvclient.integrations.vllm_worker import Worker
from tests.integration.conftest import StartDaemon
from tests.node import until

BLOCKS, TOKENS, LAYERS = 32, 16, 3
INNER = (2, 16, 8)  # heads, tokens, keys and values


@dataclass
class Rank:
    """One worker: its memory, its clients."""

    caches: dict[str, torch.Tensor]
    layout: Layout
    worker: Worker
    clients: list[kvclient.Client]


@dataclass
class Engine:
    """Scheduler and workers, stepped by hand."""

    run: Path
    settings: Settings = field(default_factory=Settings)
    ranks: int = 1

    def __post_init__(self) -> None:
        self.workers = [self._rank(rank) for rank in range(self.ranks)]
        self.lookups = kvclient.connect(self.run, role=Role.TOOL, timeout_s=self.settings.lookup_timeout_ms / 1000)
        assert self.lookups.wait_connected(5)
        shards = [self._namespace(self.lookups, rank, each.layout) for rank, each in enumerate(self.workers)]
        block_bytes = self.workers[0].layout.block_bytes
        self.free = BLOCKS
        self.scheduler = Scheduler(
            self.lookups, shards, TOKENS, block_bytes, self.settings,
            engine_blocks=BLOCKS, free_blocks=lambda: self.free,
        )  # fmt: skip
        self.saved = 0

    def _rank(self, rank: int) -> Rank:
        generator = torch.Generator().manual_seed(rank)
        caches = {
            f"layer {number}": torch.rand((BLOCKS, *INNER), generator=generator, dtype=torch.float32)
            for number in range(LAYERS)
        }
        layout = layout_of(caches, BLOCKS)
        quick = kvclient.connect(self.run, role=Role.TOOL, timeout_s=0.05)
        patient = kvclient.connect(self.run, timeout_s=5.0)
        assert quick.wait_connected(5)
        assert patient.wait_connected(5)
        names = (self._namespace(quick, rank, layout), self._namespace(patient, rank, layout))
        return Rank(caches, layout, Worker(*names, layout, disk_wait_s=2.0), [quick, patient])

    def _namespace(self, client: kvclient.Client, rank: int, layout: Layout) -> kvclient.Namespace:
        return client.namespace(
            model="m", engine="vllm", layout=layout.words, dtype="float32", block_tokens=TOKENS,
            block_bytes=layout.block_bytes, tp=(rank, self.ranks),
        )  # fmt: skip

    def step(self, scheduled: dict[str, int], blocks: dict[str, list[int]]) -> Plan:
        """As vLLM does: plan, fence, load, compute, save, and what became of it."""
        plan = self.scheduler.plan(scheduled, blocks.__getitem__)
        for rank in self.workers:
            rank.worker.fence(plan)
            rank.worker.begin(plan)
            rank.worker.end(plan)
        self.listen()
        return plan

    def listen(self) -> set[str]:
        """What the workers say; requests whose loads have ended."""
        progress = Progress()
        received: set[str] = set()
        for rank in self.workers:
            progress = progress.joined(rank.worker.take_progress() or Progress())
            received |= rank.worker.take_received()
        self.saved += len(progress.saved)
        self.scheduler.heard(progress, received)
        return received

    def save(self, request: Any, block_ids: list[int]) -> None:
        """Compute all of a request, save it, and let it be over."""
        self.scheduler.on_new_request(request)
        plan = self.step({request.request_id: request.num_tokens}, {request.request_id: block_ids})
        assert not plan.saves, "of a step that has not ended"
        request.num_computed_tokens = request.num_tokens
        self.scheduler.finished(request, block_ids)
        self.step({}, {})
        assert until(lambda: self.listen() is not None and not self.scheduler._saves), "it never ends"
        for rank in self.workers:
            rank.worker._patient.flush(5.0)  # visible, too

    def stop(self) -> None:
        """End it."""
        for rank in self.workers:
            rank.worker.stop()
            for client in rank.clients:
                client.close()
        self.lookups.close()


def request_of(name: str, blocks: int, *, tokens: int = 0, params: object = None) -> Any:
    """What the halves read of a request of vLLM."""
    hashes = [f"{name} {number}".encode().ljust(32, b".") for number in range(blocks)]
    tokens = tokens or blocks * TOKENS + 1
    return SimpleNamespace(
        request_id=name, block_hashes=hashes, num_tokens=tokens, num_computed_tokens=0, kv_transfer_params=params
    )


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    """One a test: some stop it."""
    return start_daemon("--dram", "64MiB", "--arena", "4MiB")


@pytest.fixture
def engine(daemon: DaemonProcess) -> Iterator[Engine]:
    """One rank."""
    engine = Engine(daemon.runtime_dir)
    yield engine
    engine.stop()


def again(request: Any, name: str) -> Any:
    """Another request with the same tokens."""
    return SimpleNamespace(**(vars(request) | {"request_id": name, "num_computed_tokens": 0}))


def load(engine: Engine, request: Any, block_ids: list[int]) -> int:
    """Look up, load, and step; blocks that were loaded."""
    engine.scheduler.on_new_request(request)
    tokens, beside = engine.scheduler.matched(request, 0)
    assert tokens is not None
    engine.scheduler.allocated(request, block_ids, tokens)
    request.num_computed_tokens = tokens
    engine.step({} if beside else {request.request_id: request.num_tokens - tokens}, {request.request_id: block_ids})
    if beside:
        assert until(lambda: request.request_id in engine.listen())
    return tokens // TOKENS


@pytest.mark.parametrize("at_once_mib", [32.0, 0.0], ids=["before the forward", "beside it"])
def test_what_is_saved_from_some_blocks_is_loaded_into_others(daemon: DaemonProcess, at_once_mib: float) -> None:
    engine = Engine(daemon.runtime_dir, Settings(at_once_mib=at_once_mib))
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
    os.kill(daemon.process.pid, signal.SIGSTOP)  # so that the save waits for its first answer
    request = request_of("a", 4)
    engine.scheduler._known.clear()
    engine.scheduler.on_new_request(request)
    engine.step({"a": request.num_tokens}, {"a": [0, 1, 2, 3, 4]})
    request.num_computed_tokens = request.num_tokens
    assert len(engine.step({"a": 1}, {"a": [0, 1, 2, 3, 4]}).saves) == 1
    other = request_of("b", 4)
    engine.scheduler.on_new_request(other)
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
    os.kill(daemon.process.pid, signal.SIGSTOP)
    request = request_of("a", 4)
    engine.scheduler.on_new_request(request)
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


def test_a_daemon_that_does_not_answer_is_not_asked_again_for_a_while(daemon: DaemonProcess, engine: Engine) -> None:
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


def test_a_second_request_waits_for_the_load_of_the_first(daemon: DaemonProcess) -> None:
    engine = Engine(daemon.runtime_dir, Settings(at_once_mib=0.0))
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


def test_a_load_of_what_is_gone_says_which_blocks_are_bad(daemon: DaemonProcess, engine: Engine) -> None:
    request = request_of("a", 4)
    engine.save(request, [0, 1, 2, 3, 4])
    other = again(request, "b")
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.matched(other, 0) == (4 * TOKENS, False)
    engine.scheduler.allocated(other, [10, 11, 12, 13, 14], 4 * TOKENS)
    daemon.kill()
    engine.step({"b": 1}, {"b": [10, 11, 12, 13, 14]})
    assert engine.workers[0].worker.take_bad_blocks() == {10, 11, 12, 13}


def finish(engine: Engine, name: str, block_ids: list[int], hold_s: float) -> bool:
    """A request is over and wishes its blocks held; whether they are."""
    request = request_of(name, len(block_ids) - 1, params={"kvstored": {"hold_s": hold_s, "store": False}})
    engine.scheduler.on_new_request(request)
    request.num_computed_tokens = request.num_tokens
    return engine.scheduler.finished(request, block_ids)


def test_a_finished_request_may_hold_its_blocks_within_a_budget(engine: Engine) -> None:
    scheduler = engine.scheduler
    assert finish(engine, "a", [0, 1, 2, 3], hold_s=3600)
    assert finish(engine, "b", [4, 5, 6, 7], hold_s=1e-9)
    assert not finish(engine, "c", [8], hold_s=3600), "8 of 32 blocks are held, a quarter"
    assert scheduler.plan({}, lambda _: []).closing == {"b"}, "its time is over"
    assert finish(engine, "c", [8], hold_s=3600)
    assert scheduler.plan({}, lambda _: []).closing == set()
    engine.free = 2
    assert scheduler.plan({}, lambda _: []).closing == {"a", "c"}, "the engine is short of memory"
    assert not scheduler._known


@pytest.mark.parametrize("at_once_mib", [32.0, 0.0], ids=["before the forward", "beside it"])
def test_a_load_that_fails_as_nobody_foresaw_is_told_like_any_other(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, at_once_mib: float
) -> None:
    engine = Engine(daemon.runtime_dir, Settings(at_once_mib=at_once_mib))
    request = request_of("a", 3)
    engine.save(request, [0, 1, 2, 3])
    worker = engine.workers[0].worker
    monkeypatch.setattr(worker, "_copy", lambda *_: 1 // 0)
    assert load(engine, again(request, "b"), [10, 11, 12, 13]) == 3
    assert worker.take_bad_blocks() == {10, 11, 12}
    engine.stop()
