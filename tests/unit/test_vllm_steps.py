"""Steps of vLLM that tell what computing costs, one after the other and overlapping, by a clock that the test sets."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvclient.integrations import vllm_steps
from kvclient.integrations.vllm_jobs import Progress
from kvclient.integrations.vllm_steps import PROFILED_TOKENS, UNDER_WAY, Steps


class Bench:
    """Steps of an engine with two ranks, its only request, and what was reported of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.reported: list[tuple[int, int, float]] = []
        self.request: Any = SimpleNamespace(num_computed_tokens=0)
        ranks: list[Any] = [SimpleNamespace(report_prefill=self._note) for _ in range(2)]
        self.steps = Steps(ranks)
        monkeypatch.setattr(vllm_steps, "_clock", lambda: self.now)

    def _note(self, cached: int, new: int, seconds: float) -> None:
        self.reported.append((cached, new, seconds))

    def begin(self, tokens: int, *, loads: bool = False, others: int = 0) -> int:
        """A step of so many tokens, which vLLM then counts as computed; `others`: requests that run besides."""
        scheduled = {"a": tokens} | {f"other {number}": 1 for number in range(others)}
        known: dict[str, Any] = {name: SimpleNamespace(request=self.request) for name in scheduled}
        number = self.steps.begin(scheduled, known, loads=loads)
        self.request.num_computed_tokens += tokens
        return number

    def end(self, number: int) -> None:
        self.steps.end(number)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_chunks_one_after_the_other_have_the_time_of_their_own_step(bench: Bench) -> None:
    for tokens, seconds in ((512, 2.0), (256, 1.5), (1, 0.5)):
        number = bench.begin(tokens)
        bench.now += seconds
        bench.end(number)
        bench.now += 7.0  # nothing runs
    assert bench.reported == [(0, 512, 2.0)] * 2 + [(512, 256, 1.5)] * 2, "to the namespace of each rank"


def test_where_steps_overlap_each_chunk_has_the_time_from_the_end_of_the_one_before(bench: Bench) -> None:
    first = bench.begin(512)
    second = bench.begin(256)  # before the first one has ended
    bench.now += 2.0
    bench.end(first)
    third = bench.begin(1)
    bench.now += 1.5
    bench.end(second)
    bench.now += 0.5
    bench.end(third)
    assert bench.reported[::2] == [(0, 512, 2.0), (512, 256, 1.5)]


def test_a_prefill_alone_is_reported_although_its_next_token_is_planned_already(bench: Bench) -> None:
    prefill = bench.begin(100)
    decode = bench.begin(1)
    bench.now += 2.0
    bench.end(prefill)
    bench.end(decode)
    assert bench.reported[::2] == [(0, 100, 2.0)]


def test_steps_that_nobody_hears_of_are_forgotten(bench: Bench) -> None:
    lost = bench.begin(100)
    heard = bench.begin(200)
    bench.end(0)  # such as of a step without a forward: it is not known of which
    bench.now += 2.0
    bench.end(heard)
    bench.end(lost)
    assert bench.reported[::2] == [(100, 200, 2.0)]
    first = bench.begin(100)
    for _ in range(UNDER_WAY):
        bench.begin(100)
    bench.end(first)
    assert len(bench.reported) == 2, "too many since"


def test_what_is_not_a_prefill_alone_is_not_timed(bench: Bench) -> None:
    assert bench.begin(PROFILED_TOKENS) > 0, "the control"
    assert bench.begin(PROFILED_TOKENS - 1) == 0
    assert bench.begin(500, loads=True) == 0
    assert bench.begin(500, others=1) == 0
    assert bench.steps.begin({}, {}, loads=False) == 0
    assert bench.steps.begin({"stranger": 500}, {}, loads=False) == 0


def test_ranks_say_together_which_step_has_ended() -> None:
    one, two = Progress({1: 1}, timed=3), Progress({1: 1, 2: 1}, {2}, timed=3)
    assert one.joined(two) == Progress({1: 2, 2: 1}, {2}, timed=3)
    assert one.joined(Progress()).timed == Progress().joined(one).timed == 3
