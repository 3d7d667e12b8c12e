"""Which LOADs and SAVEs say how fast the link is: what they wait for has no part in it."""

from dataclasses import dataclass
from typing import Any, cast

import pytest

from kvclient import moving, swap_attached
from kvclient.attached import AttachedPages
from kvclient.copying import Gate, WithdrawnError
from kvclient.moving import Loading
from kvclient.results import Reason, StoreResult
from kvclient.swap_attached import WAIT_S, _timed
from kvproto.device_frames import Fate

BLOCK = 4096


@dataclass
class Heard:
    """A LOAD that is over."""

    blocks: int | None
    heard_s: tuple[float, float]


def timed(
    monkeypatch: pytest.MonkeyPatch,
    *,
    named_s: float,
    ended_s: float,
    now_s: float,
    blocks: int = 8,
    asked_s: float = 0.0,
) -> int:
    """Blocks whose time it tells, of one that was asked for at 0."""
    monkeypatch.setattr(swap_attached, "_clock", lambda: now_s)
    return _timed(cast(Loading, Heard(blocks, (named_s, ended_s))), BLOCK, 0.0) // BLOCK


def test_a_load_that_waited_for_the_disk_says_nothing_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    answered_s = WAIT_S / 2
    assert timed(monkeypatch, named_s=answered_s, ended_s=0.002, now_s=0.002) == 8
    assert timed(monkeypatch, named_s=-answered_s, ended_s=0.002, now_s=0.002) == 8, "heard before its MOVING was"
    assert timed(monkeypatch, named_s=0.5, ended_s=0.501, now_s=0.501) == 0
    assert timed(monkeypatch, named_s=0.004, ended_s=0.1, now_s=0.1) == 8, "a long one: that was not much of it"


def test_one_that_was_over_long_before_somebody_looked_says_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, named_s=0.0, ended_s=0.001, now_s=0.001 + WAIT_S / 2) == 8
    assert timed(monkeypatch, named_s=0.0, ended_s=0.001, now_s=0.5) == 0, "a chunk before it waited for the disk"


def test_what_is_not_there_took_no_time_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, named_s=0.0, ended_s=0.001, now_s=0.001, blocks=3) == 3
    assert timed(monkeypatch, named_s=0.0, ended_s=0.001, now_s=0.001, blocks=0) == 0


class Connection:
    """Naps, and says when."""

    timeout_ns = 10**9

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.naps = 0
        self.withdraw = False

    def check(self) -> None:
        pass

    def run(self, flow: Any) -> None:
        assert not self.gate._lock.locked(), "the gate is open while it naps"
        flow.close()
        self.naps += 1
        if self.withdraw:
            self.gate.close()


def saved(monkeypatch: pytest.MonkeyPatch, answers: list[list[Fate]], *, withdraw: bool = False) -> StoreResult:
    """What becomes of three blocks where the daemon answers so."""
    gate = Gate()
    connection = Connection(gate)
    connection.withdraw = withdraw

    def answer(*_: object) -> tuple[list[Fate], Reason | None, bool]:
        assert gate._lock.locked(), "it is read"
        return answers.pop(0), None, True

    memory = type("Memory", (), {"connection": connection})()
    pages = cast(Any, AttachedPages.__new__(AttachedPages))
    pages.ids, pages.memory, pages.gate = (0, 1, 2), memory, gate
    monkeypatch.setattr(moving, "_save_some", answer)
    result = moving.save(
        cast(Any, connection), cast(Any, None), [bytes(32)] * 3, pages,
        parent=None, timeout_s=60.0, space_s=60.0, recompute_s=None, stream=None,
    )  # fmt: skip
    assert not answers
    assert connection.naps == 1
    return result


def test_a_save_is_not_at_its_gate_while_it_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [Fate.SAVED, Fate.BUSY, Fate.NO_PARENT]
    assert saved(monkeypatch, [full, [Fate.SAVED] * 2]) == StoreResult(3, 0, ())


def test_one_that_is_withdrawn_meanwhile_says_what_it_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    result = saved(monkeypatch, [[Fate.SAVED, Fate.BUSY, Fate.NO_PARENT]], withdraw=True)
    assert (result.accepted, result.reasons) == (1, {Reason.TIMED_OUT: 2})
    with pytest.raises(WithdrawnError):
        saved(monkeypatch, [[Fate.BUSY, Fate.NO_PARENT, Fate.NO_PARENT]], withdraw=True)
