"""Weights of a vLLM engine that change in place: what is stored belongs to the old ones."""

from pathlib import Path
from typing import Any

import pytest

from kvclient.integrations.vllm_jobs import Plan, Progress, SaveJob
from kvclient.integrations.vllm_weights import METHODS, watch
from tests.unit.client_kit import keys_of
from tests.unit.test_vllm_worker import bench, job, received
from tests.unit.vllm_kit import TOKENS, Daemon, request_of, scheduler_of


class Watcher:
    """Counts."""

    touched = 0

    def leave(self) -> None:
        self.touched += 1


class Base:
    """A worker of vLLM; the methods of this test's are its own."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def reload_weights(self, *given: Any, **named: Any) -> str:
        self.calls.append((given, named))
        return "reloaded"


def test_whoever_watches_hears_of_new_weights_before_they_are_there() -> None:
    class EngineWorker(Base):
        def start_weight_update(self) -> None:
            self.calls.append(watcher.touched)

    watcher, other, engine = Watcher(), Watcher(), EngineWorker()
    watch(EngineWorker, watcher)
    engine.start_weight_update()
    assert engine.calls == [1], "it hears of it first"
    watch(EngineWorker, other)  # wraps nothing twice
    assert engine.reload_weights("path", is_checkpoint_format=False) == "reloaded"
    assert engine.calls[1:] == [(("path",), {"is_checkpoint_format": False})]
    assert (watcher.touched, other.touched) == (2, 1)
    Base().reload_weights()
    assert (watcher.touched, other.touched) == (2, 1), "the control: a worker of another kind"
    del other
    engine.reload_weights()
    assert watcher.touched == 3


def test_a_worker_without_such_methods_stays_as_it_is() -> None:
    class EngineWorker:
        update_weights = None

    watch(EngineWorker, Watcher())
    assert EngineWorker.update_weights is None
    assert not any(hasattr(EngineWorker, name) for name in METHODS if name != "update_weights")
    watch("no.such.module.Worker", Watcher())
    watch(None, Watcher())


@pytest.mark.parametrize("touched", [True, False], ids=["other weights", "the control"])
def test_a_worker_with_other_weights_loads_and_saves_nothing(tmp_path: Path, touched: bool) -> None:
    with bench(tmp_path, 2, 2) as one:
        if touched:
            one.worker.leave()
        one.begin(job(one, "a", range(2), from_disk=False))
        received(one, "a")
        assert one.worker.take_bad_blocks() == ({0, 1} if touched else set()), "the engine computes them"
        one.worker.end(Plan(saves=[SaveJob(0, "b", tuple(keys_of(2, seed=5)), None, (3, 4))]))
        if touched:
            progress = one.worker.take_progress()
            assert progress == Progress({0: 1}, {0}, weights_changed=True)
            assert one.peer.committed == []
        else:
            one.peer.wait_for(lambda: len(one.peer.committed) == 2)
            assert not (one.worker.take_progress() or Progress()).weights_changed


def test_a_scheduler_that_hears_of_other_weights_uses_the_store_no_more() -> None:
    daemon = Daemon()
    scheduler, request = scheduler_of(daemon), request_of("a", 4)
    daemon.blocks = 4
    scheduler.heard(Progress().joined(Progress()), ())
    assert scheduler.matched(request, 0) == (4 * TOKENS, False), "the control"
    scheduler.heard(Progress().joined(Progress(weights_changed=True)), ())
    assert scheduler.matched(request, 0) == (0, False)
