"""Saves of the vLLM connector beside its forwards: so much at a time as hides behind them."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from kvclient import copying
from kvclient.buffers import Scattered
from kvclient.copying import Gate, WithdrawnError
from kvclient.integrations import vllm_pace
from kvclient.integrations.vllm_jobs import SaveJob
from kvclient.integrations.vllm_pace import Pace, Saved
from kvclient.results import Reason, Refused, StoreResult
from kvclient.swap_budget import RATE_BYTES_PER_S, STALE_S
from tests.unit.client_kit import wait_until

MIB = 1 << 20
KEYS = tuple(bytes([number]) * 32 for number in range(8))
JOB = SaveJob(0, "request", KEYS, b"p" * 32, tuple(range(8)))


class Store:
    """A namespace that takes everything but what it is told to refuse; and the engine's layout, blocks of 1 MiB."""

    block_bytes = MIB
    ask_s = copy_s = 0.0

    def __init__(self, *refused: tuple[int, Reason]) -> None:
        self.now_s = [0.0]
        self.calls: list[tuple[bytes | None, int]] = []  # parent, blocks
        self._refused = dict(refused)

    def scattered(self, block_ids: Sequence[int], after: object) -> Any:
        assert after is None
        return Scattered([[number] for number in block_ids], (MIB,), None)

    def store(self, keys: Sequence[bytes], source: Any, parent: bytes | None, space_s: float) -> StoreResult:
        self.now_s[0] += self.ask_s
        with source.gate:
            self.now_s[0] += self.copy_s
            self.calls.append((parent, len(keys)))
        refused = tuple(
            Refused(index, self._refused[key[0]]) for index, key in enumerate(keys) if key[0] in self._refused
        )
        return StoreResult(len(keys) - len(refused), 0, refused)


@pytest.fixture
def now_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    for module in (vllm_pace, copying):
        monkeypatch.setattr(module, "_clock", lambda: now[0])
    return now


def save(pace: Pace, store: Store, *, urgent: bool = False, gate: Gate | None = None) -> Saved:
    saved, any_store = Saved(), store
    pace.save(any_store, any_store, JOB, gate or Gate(), saved, lambda: urgent)  # type: ignore[arg-type]
    return saved


def forward(pace: Pace, now_s: list[float], seconds: float) -> None:
    pace.begin()
    now_s[0] += seconds
    pace.end()


def test_until_a_forward_was_seen_nothing_is_held_back(now_s: list[float]) -> None:
    pace, store = Pace(), Store()
    pace.begin()
    assert save(pace, store) == Saved(8, 0, 0.0, short=False)
    assert store.calls == [(JOB.parent, 8)], "at once"


def test_so_much_is_saved_at_a_time_as_hides_behind_a_forward(now_s: list[float]) -> None:
    pace, store, saved = Pace(), Store(), Saved()
    forward(pace, now_s, 3 * MIB / RATE_BYTES_PER_S)
    pace.begin()
    args: Any = (store, store, JOB, Gate(), saved, lambda: False)
    thread = threading.Thread(target=pace.save, args=args)
    thread.start()
    wait_until(lambda: len(store.calls) == 1)
    pace.begin()
    wait_until(lambda: len(store.calls) == 2)
    assert thread.is_alive(), "it waits for the next step"
    pace.begin()
    thread.join(30)
    assert store.calls == [(JOB.parent, 3), (KEYS[2], 3), (KEYS[5], 2)]
    assert (saved.accepted, saved.short) == (8, False)


def test_who_is_waited_for_does_not_wait(now_s: list[float]) -> None:
    pace, store = Pace(), Store()
    forward(pace, now_s, 1e-9)
    pace.begin()
    assert save(pace, store, urgent=True).accepted == 8
    assert store.calls == [(JOB.parent, 8)]


def test_a_step_without_a_forward_and_an_engine_that_is_idle_hold_nothing_back(now_s: list[float]) -> None:
    pace, store = Pace(), Store()
    forward(pace, now_s, 1e-9)
    pace.begin()
    pace.idle()
    assert save(pace, store).accepted == 8
    pace.begin()
    now_s[0] += STALE_S + 0.05
    assert save(pace, store).accepted == 8
    assert len(store.calls) == 2


def test_what_is_refused_ends_a_save_and_what_another_one_stores_does_not(now_s: list[float]) -> None:
    pace, store = Pace(), Store((2, Reason.PENDING))
    pace.begin()
    assert save(pace, store) == Saved(7, 0, 0.0, short=False)
    store = Store((2, Reason.FULL))
    assert save(pace, store) == Saved(7, 0, 0.0, short=True)


def test_a_save_that_is_withdrawn_reads_nothing_more(now_s: list[float]) -> None:
    pace, store, gate = Pace(), Store(), Gate()
    gate.close()
    assert gate.closed
    with pytest.raises(WithdrawnError):
        save(pace, store, gate=gate)
    assert store.calls == []


def test_what_saves_take_is_what_the_next_steps_go_by(now_s: list[float]) -> None:
    pace, store = Pace(), Store()
    store.now_s, store.ask_s, store.copy_s = now_s, 1.0, 0.01
    forward(pace, now_s, 0.005)
    pace.idle()
    assert save(pace, store).seconds == pytest.approx(1.01)
    assert pace.budget.bandwidth.bytes_per_s == pytest.approx(8 * MIB / 0.01)
    pace.begin()
    assert pace.budget.left_bytes(now_s[0]) == pytest.approx(4 * MIB)
