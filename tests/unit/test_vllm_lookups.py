"""Lookups of the vLLM connector's scheduler: what they may cost, and what is not asked for, by the test's own clock."""

from typing import Any

import pytest

from kvclient.integrations import vllm_scheduler
from kvclient.integrations.vllm_scheduler import AGAIN_S, APART_S, FRESH_S, QUICK_S, SILENCE_S, WINDOW_S
from tests.unit.vllm_kit import TOKENS, Daemon, request_of, scheduler_of

PATIENCE_S = 0.02  # by default


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """One with everything in memory; time goes by while it answers."""
    daemon = Daemon(blocks=100)
    monkeypatch.setattr(vllm_scheduler, "_clock", lambda: daemon.now_s)
    return daemon


def arrivals(daemon: Daemon, count: int, each_s: float) -> float:
    """Seconds that so many take together if every answer takes so long."""
    scheduler, daemon.answer_s, began_s = scheduler_of(daemon), each_s, daemon.now_s
    for number in range(count):
        scheduler.on_new_request(request_of(str(number), 4))
    return daemon.now_s - began_s


def test_answers_that_are_slow_together_are_not_waited_for_although_each_is_in_time(daemon: Daemon) -> None:
    each_s = 0.4 * PATIENCE_S
    assert arrivals(daemon, 64, each_s) <= PATIENCE_S + each_s
    assert daemon.asked == 3


def test_as_many_answers_as_come_are_taken_if_each_is_quick(daemon: Daemon) -> None:
    assert arrivals(daemon, 1000, QUICK_S) == pytest.approx(1000 * QUICK_S)
    assert daemon.asked == 1000


def test_slow_answers_now_and_then_are_taken_and_silence_ends(daemon: Daemon) -> None:
    scheduler, daemon.answer_s = scheduler_of(daemon), 0.8 * PATIENCE_S
    for number in range(20):
        scheduler.on_new_request(request_of(f"now and then {number}", 4))
        daemon.now_s += WINDOW_S
    assert daemon.asked == 20
    for number in range(20):
        scheduler.on_new_request(request_of(f"one after the other {number}", 4))
    assert daemon.asked == 22
    daemon.now_s += SILENCE_S
    scheduler.on_new_request(request_of("later", 4))
    assert daemon.asked == 23


def test_requests_that_wait_for_disk_are_not_looked_up_all_at_once(daemon: Daemon) -> None:
    scheduler, count = scheduler_of(daemon), 50
    requests = [request_of(str(number), 4) for number in range(count)]
    for request in requests:
        scheduler.on_new_request(request)
    daemon.disk = 2
    daemon.now_s += FRESH_S + 0.001
    asked = [step(daemon, scheduler, requests)]
    assert asked == [count], "the control: each is looked up first"
    for _ in range(20):
        daemon.now_s += AGAIN_S
        asked.append(step(daemon, scheduler, requests))
    assert max(asked[1:]) <= AGAIN_S / APART_S + 1
    daemon.disk = 0
    for _ in range(20):
        daemon.now_s += AGAIN_S
        requests = [each for each in requests if scheduler.matched(each, 0)[0] is None]
    assert requests == [], "none is forgotten"


def step(daemon: Daemon, scheduler: Any, requests: list[Any]) -> int:
    """How often a step asks that looks at all of these."""
    before = daemon.asked
    for request in requests:
        assert scheduler.matched(request, 0) == (None, False)
    return daemon.asked - before


def test_a_session_that_is_given_an_image_later_loads_and_saves_nothing_more(daemon: Daemon) -> None:
    scheduler = scheduler_of(daemon)
    session, plain = (request_of(name, 4, mm_features=[]) for name in ("session", "plain"))
    daemon.blocks = 2
    for request in (session, plain):
        scheduler.on_new_request(request)
        assert scheduler.matched(request, 0) == (2 * TOKENS, False)
        request.num_computed_tokens = 4 * TOKENS
    session.mm_features.append("an image")
    assert scheduler.matched(session, 0) == (0, False)
    daemon.now_s += FRESH_S + 0.001
    assert scheduler.matched(plain, 0) == (2 * TOKENS, False), "the control"
    plan = scheduler.plan({"session": 1, "plain": 1}, lambda _: range(4))
    assert [job.request for job in plan.saves] == ["plain"]
    assert not scheduler.finished(session, range(4))
    assert scheduler.plan({}, lambda _: []).saves == []
