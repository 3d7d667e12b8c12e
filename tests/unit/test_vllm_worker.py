"""The vLLM connector's loads beside the forward, from a disk that answers when the test says so."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from kvclient.integrations import vllm_worker
from kvclient.integrations.vllm_jobs import LoadJob, Plan, SaveJob
from kvclient.integrations.vllm_layout import layout_of
from kvclient.integrations.vllm_worker import Worker
from kvclient.namespace import Namespace
from kvclient.swap_budget import Budget
from tests.peer import Peer
from tests.unit.client_kit import BLOCK_BYTES, Blocks, keys_of, streaming, wait_until

pytestmark = pytest.mark.timeout(60)
FOR_EVER_S = 600.0


class Bench(NamedTuple):
    """A worker, its memory, and a daemon that has blocks."""

    worker: Worker
    memory: torch.Tensor  # [blocks, bytes]
    peer: Peer
    keys: list[bytes]
    blocks: Blocks

    def holds(self, block: int, number: int) -> bool:
        """Does the engine's block hold the daemon's?"""
        return bool(self.memory[block].numpy().tobytes() == self.blocks[number].tobytes())

    def begin(self, *jobs: LoadJob, dropped: tuple[str, ...] = ()) -> None:
        self.worker.begin(Plan(loads=list(jobs), dropped=set(dropped)))


@contextmanager
def bench(folder: Path, at_once: int, total: int) -> Iterator[Bench]:
    """The daemon has `total` blocks, all but the first `at_once` on disk."""
    memory = torch.zeros((16, BLOCK_BYTES), dtype=torch.uint8)
    with streaming(folder, at_once, total) as (peer, namespace, keys, blocks):
        worker = Worker(namespace, namespace, layout_of({"layer": memory}, 16), disk_wait_s=FOR_EVER_S)
        try:
            yield Bench(worker, memory, peer, keys, blocks)
        finally:
            worker.stop()


def job(bench: Bench, name: str, numbers: range, *, from_disk: bool) -> LoadJob:
    """The daemon's blocks of these numbers into the engine's of the same."""
    return LoadJob(name, tuple(bench.keys[numbers.start : numbers.stop]), tuple(numbers), False, from_disk)


def received(bench: Bench, *names: str) -> None:
    """Wait until the engine would hear of these, and of no others."""
    heard: set[str] = set()

    def all_came() -> bool:
        heard.update(bench.worker.take_received())
        return heard >= set(names)

    wait_until(all_came)
    assert heard == set(names)


def test_a_step_without_a_forward_waits_for_a_load_but_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(tmp_path, 1, 4) as one:
        monkeypatch.setattr(vllm_worker, "LOAD_S", 0.001)
        one.begin(job(one, "a", range(4), from_disk=True))
        one.worker.idle()  # returns although the load goes on
        assert one.worker.take_received() == set()
        monkeypatch.setattr(vllm_worker, "LOAD_S", FOR_EVER_S)
        waiting = threading.Thread(target=one.worker.idle)
        waiting.start()
        wait_until(lambda: one.peer.coming.get(1))  # what comes before it is asked for is lost
        one.peer.ready(1, 3)
        waiting.join(30)
        assert not waiting.is_alive(), "it goes on as soon as the load has ended"
        one.worker.idle()  # at once: the engine has not heard of it yet
        received(one, "a")
        one.worker.idle()  # at once: nothing is loading
        assert all(one.holds(block, block) for block in range(4))
        assert not one.holds(0, 1), "the control"


def test_loads_from_a_slow_disk_hold_up_no_load_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_worker, "SHARED_BYTES", 2 * BLOCK_BYTES)
    with bench(tmp_path, 2, 8) as one:
        one.begin(job(one, "slow", range(2, 5), from_disk=True), job(one, "slow too", range(5, 8), from_disk=True))
        one.begin(job(one, "quick", range(2), from_disk=False))
        received(one, "quick")
        assert one.holds(0, 0)
        assert one.holds(1, 1)
        assert not one.holds(2, 2), "the control: the disk has not answered"
        parts = [one.worker._shared(job(one, "", range(2, 6), from_disk=from_disk)) for from_disk in (True, False)]
        assert list(map(len, parts)) == [1, 2], "what comes from disk comes in order"


def test_a_load_that_nobody_wants_waits_for_no_more_blocks(tmp_path: Path) -> None:
    with bench(tmp_path, 1, 4) as one:
        one.begin(job(one, "a", range(4), from_disk=True), job(one, "behind", range(1, 3), from_disk=True))
        wait_until(lambda: one.holds(0, 0))
        one.begin(dropped=("a", "behind"))
        received(one, "a", "behind")
        assert one.worker.take_bad_blocks() == set(), "nobody has these any more"
        counts = one.worker.take_counts()
        assert (counts["loaded_blocks"], counts["dropped_blocks"]) == (1, 5)
        assert "failed_blocks" not in counts
        one.begin(job(one, "a", range(1), from_disk=False))
        received(one, "a")
        assert one.worker.take_counts()["loaded_blocks"] == 1, "the control: a later one of that name is wanted"


def test_a_load_that_waited_for_others_waits_for_disk_so_much_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    waits: dict[str, float] = {}
    begun, go_on = threading.Event(), threading.Event()

    def copy(job: LoadJob, _namespace: Namespace, wait_s: float) -> int:
        waits[job.request] = wait_s
        begun.set()
        assert go_on.wait(30)
        return 0

    with bench(tmp_path, 1, 3) as one:
        monkeypatch.setattr(one.worker, "_copy", copy)
        monkeypatch.setattr(vllm_worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
        one.begin(job(one, "first", range(1, 2), from_disk=True), job(one, "second", range(2, 3), from_disk=True))
        assert begun.wait(30)
        now[0] += FOR_EVER_S - 5
        go_on.set()
        received(one, "first", "second")
        assert waits == {"first": FOR_EVER_S, "second": 5.0}


def test_blocks_that_the_engine_wants_back_do_not_wait_for_the_pace_of_saves_before_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_worker, "CLOSE_S", FOR_EVER_S)
    with bench(tmp_path, 1, 1) as one:
        one.worker._pace.budget = Budget(1e-6)  # next to nothing, for ever
        keys = tuple(keys_of(8, seed=3))
        before = SaveJob(0, "goes on", keys[:4], None, tuple(range(4)))
        wanted = SaveJob(1, "over", keys[4:], keys[3], tuple(range(4, 8)))
        one.worker.end(Plan(saves=[before]))
        one.peer.wait_for(lambda: len(one.peer.committed) == 1)
        assert one.worker.saving == 1, "the control: the rest of it waits"
        one.worker.end(Plan(saves=[wanted], closing={"over"}))
        wait_until(lambda: one.worker.take_closed() == {"over"})
        assert len(one.peer.committed) == 8
