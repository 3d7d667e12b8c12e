"""What `kvstored` does around serving: the rest of the compiled code follows once clients are served, and not after."""

from collections.abc import Callable
from pathlib import Path

import pytest

import kvstored.daemon
import kvstored.warmup
from kvstored import cli

Story = list[str]


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Story:
    """What happens, in order, where nothing is compiled and nobody is served."""
    told: Story = []

    class Rest:
        def start(self) -> None:
            told.append("rest starts" if "serves" in capsys.readouterr().out else "rest starts before it is announced")

        def cancel(self) -> None:
            told.append("rest is cancelled")

    class Daemon:
        def __init__(self, *_: object) -> None:
            told.append("daemon is made")

        def serve(self, announce: Callable[[], None]) -> None:
            told.append("sockets are there")
            announce()
            told.append("daemon stops")

    def first_and_rest_later(*, disk: bool) -> Rest:
        told.append(f"first, {disk=}")
        return Rest()

    monkeypatch.setattr(kvstored.daemon, "Daemon", Daemon)
    monkeypatch.setattr(kvstored.warmup, "first_and_rest_later", first_and_rest_later)
    return told


def test_the_rest_starts_when_clients_are_served_and_ends_with_the_daemon(story: Story, tmp_path: Path) -> None:
    assert cli.main(["--runtime-dir", str(tmp_path), "--dram", "64MiB"]) == 0
    assert story == [
        "first, disk=False", "daemon is made", "sockets are there", "rest starts", "daemon stops", "rest is cancelled",
    ]  # fmt: skip


def test_with_a_disk_tier_what_it_needs_comes_first(story: Story, tmp_path: Path) -> None:
    disk = ["--disk", str(tmp_path / "disk"), "--disk-size", "64MiB"]
    assert cli.main(["--runtime-dir", str(tmp_path / "run"), "--dram", "64MiB", *disk]) == 0
    assert story[0] == "first, disk=True"


def test_a_timer_that_is_cancelled_does_nothing_and_one_that_is_not_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real timer, with no time to wait."""
    for cancelled in (True, False):
        done: list[bool] = []
        monkeypatch.undo()
        monkeypatch.setattr(kvstored.warmup, "LATER_S", 0.0)
        monkeypatch.setattr(kvstored.warmup, "first", lambda *, disk, done=done: lambda: done.append(disk))
        monkeypatch.setattr(Path, "exists", lambda _: True)
        timer = kvstored.warmup.first_and_rest_later(disk=True)
        assert timer.daemon, "or a daemon that stops would wait for it"
        if cancelled:
            timer.cancel()
        timer.start()
        timer.join()
        assert done == ([] if cancelled else [True])
