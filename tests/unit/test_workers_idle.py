"""How much of the processors is idle decides whether blocks are packed: it is counted, not guessed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvstored import workers
from kvstored.workers import HostWorkers, _processor_ticks


def made() -> HostWorkers:
    config, memory, leaf = cast("Any", (SimpleNamespace(), SimpleNamespace(), SimpleNamespace()))
    return HostWorkers(config, memory, leaf, None, lambda: None)


@pytest.mark.parametrize(
    ("before", "after", "idle"),
    [
        ("100 0 50 800 50 0 0 0 0 0", "200 0 50 1500 150 0 50 0 0 0", 800 / 950),
        ("100 0 50 800 50 0 0 0 0 0", "1100 0 50 800 50 0 0 0 0 0", 0.0),
        ("100 0 50 800 50 0 0 0 0 0", "100 0 50 1800 50 0 0 0 0 0", 1.0),
        ("100 0 50 800 50 0 0 0 0 0", "600 0 50 1300 50 0 0 0 500 0", 0.5),  # a guest is a user, counted twice
        ("100 0 50 800 50 0 0 0 0 0", "100 0 50 1300 50 0 0 500 0 0", 0.5),  # taken by another guest: not ours
        ("100 0 50 800 50 0 0 0 0 0", "100 0 50 800 50 0 0 0 0 0", 1.0),  # no time has passed: as before
    ],
)
def test_it_is_the_share_of_what_passed_since_the_last_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, idle: float
) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(workers, "_processor_ticks", lambda: _processor_ticks(stat))
    stat.write_text(f"cpu  {before}\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    one = made()
    assert one.idle_share() == 1.0
    stat.write_text(f"cpu  {after}\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    one.look_around()
    assert one.idle_share() == pytest.approx(idle)


def test_it_is_read_of_this_host() -> None:
    ticks, idle = _processor_ticks()
    assert ticks >= idle > 0
