"""The worker's half of the vLLM connector, called as vLLM's model runners call it.

    handle_preemptions    before anything of a step, with a forward or without
    start_load_kv         before the forward if it needs what is loaded, otherwise behind it, whatever goes on
    wait_for_save         behind both

Its clock is the test's.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvclient.integrations import vllm_pace, vllm_worker
from kvclient.integrations.vllm_jobs import LoadJob, Plan
from tests.unit.engine_kit import vllm_connector
from tests.unit.test_vllm_worker import Bench, bench
from tests.unit.vllm_kit import TOKENS, Daemon, request_of, scheduler_of

FORWARD_S, LOAD_S = 0.02, 0.5


class Runner:
    """One of vLLM's, as far as a connector sees it."""

    def __init__(self, one: Bench, now_s: list[float]) -> None:
        self._module = vllm_connector()
        self.connector = object.__new__(self._module.KvstoredConnector)
        self.connector._worker = one.worker
        self._worker = one.worker
        self._now_s = now_s

    def step(self, plan: Plan, *, attention: object = "metadata") -> None:
        """One; `attention`: what a forward context says of it, which runners of the second version never do."""
        meta, context = self._module._Meta(plan), SimpleNamespace(attn_metadata=attention)
        self.connector.handle_preemptions(meta)
        self.connector.bind_connector_metadata(meta)
        sync = any(job.at_once for job in plan.loads)
        if sync:
            self.connector.start_load_kv(context)
        if plan.forward:
            self._now_s[0] += FORWARD_S
        if not sync:
            self.connector.start_load_kv(context, request_ids=[])
        self.connector.wait_for_save()

    @property
    def forward_s(self) -> float:
        return self._worker._pace._forward_s


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of what paces saves."""
    now = [1000.0]
    monkeypatch.setattr(vllm_pace, "_clock", lambda: now[0])
    return now


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Bench]:
    """A worker."""
    with bench(tmp_path, 2, 2) as one:
        yield one


def test_a_forward_takes_as_long_as_it_takes_wherever_loads_are_begun(
    one: Bench, now_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(one, now_s)
    runner.step(Plan(forward=True))
    assert runner.forward_s == pytest.approx(FORWARD_S)

    def load(*_: Any) -> None:
        now_s[0] += LOAD_S

    monkeypatch.setattr(one.worker, "_load", load)
    runner.step(Plan(loads=[LoadJob("a", tuple(one.keys), (0, 1), at_once=True)], forward=True))
    assert runner.forward_s == pytest.approx(FORWARD_S), "loads before it are no part of it"


def test_steps_without_a_forward_say_nothing_of_how_long_one_takes(one: Bench, now_s: list[float]) -> None:
    runner = Runner(one, now_s)
    runner.step(Plan(forward=True))
    now_s[0] += 5.0
    runner.step(Plan(), attention=None)
    assert runner.forward_s == pytest.approx(FORWARD_S)


def test_only_a_step_without_a_forward_waits_for_loads(one: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    idled: list[float] = []
    monkeypatch.setattr(one.worker, "idle", lambda: idled.append(vllm_worker.LOAD_S))
    runner = Runner(one, [0.0])
    for attention in (None, "metadata"):
        runner.step(Plan(forward=True), attention=attention)
    assert idled == []
    for attention in (None, "metadata"):
        runner.step(Plan(), attention=attention)
    assert len(idled) == 2, "the control"


def test_a_plan_says_whether_its_step_has_a_forward() -> None:
    scheduler, request = scheduler_of(Daemon()), request_of("a", 4)
    scheduler.on_new_request(request)
    assert scheduler.plan({"a": TOKENS}, lambda _: [0]).forward
    assert scheduler.plan({"stranger": 1}, lambda _: [0]).forward
    assert not scheduler.plan({}, lambda _: []).forward
