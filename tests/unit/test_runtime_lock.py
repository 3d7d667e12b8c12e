"""The lock of a runtime directory: one daemon holds it, and nobody else can keep the next one from it."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvctl.client import starting
from kvproto.holders import holder
from kvstored import lock
from kvstored.lock import AlreadyRunningError, only_one

STRANGER = 4242


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o755)
    return made


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
def test_it_is_closed_to_others_whatever_lay_there_before(run: Path, before: int | None) -> None:
    file = run / "lock"
    if before is not None:
        file.write_text("1234567890\n")
        file.chmod(before)
    for _ in range(2):
        with only_one(run):
            assert file.stat().st_mode & 0o777 == 0o600
            assert file.read_text() == f"{os.getpid()}\n"


def test_who_had_it_open_while_it_could_be_read_keeps_no_daemon_from_starting(run: Path) -> None:
    (run / "lock").touch(mode=0o644)
    stranger = os.open(run / "lock", os.O_RDONLY)
    try:
        with only_one(run), pytest.raises(BlockingIOError):
            fcntl.flock(stranger, fcntl.LOCK_SH | fcntl.LOCK_NB)  # an earlier version would respect it
        fcntl.flock(stranger, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with only_one(run):
            assert starting(run)
    finally:
        os.close(stranger)


def test_who_lets_go_of_it_within_a_second_is_waited_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "lock").touch(mode=0o600)
    other = os.open(run / "lock", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    assert holder(run / "lock") == os.getpid()
    slept = []

    def sleep(duration_s: float) -> None:
        slept.append(duration_s)
        if len(slept) == 3:
            os.close(other)

    monkeypatch.setattr(time, "sleep", sleep)
    with only_one(run):
        assert len(slept) == 3


def test_a_second_daemon_is_told_which_process_holds_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    with only_one(run):
        with pytest.raises(AlreadyRunningError, match=f"another daemon serves {run}: process {os.getpid()} holds"):
            only_one(run)
        assert sum(slept) == pytest.approx(lock.WAIT_S, rel=0.1)
        assert (run / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_the_one_that_is_there(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking: two daemons would each have their own."""
    opened = lock._open_lock

    def removed_once(path: Path) -> object:
        found = opened(path)
        monkeypatch.setattr(lock, "_open_lock", opened)
        path.unlink()
        return found

    monkeypatch.setattr(lock, "_open_lock", removed_once)
    with only_one(run):
        monkeypatch.setattr(lock, "WAIT_S", 0.0)
        with pytest.raises(AlreadyRunningError):
            only_one(run)


def test_looking_whether_a_daemon_starts_locks_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_one(run):
        for name in ("flock", "lockf", "fcntl"):
            monkeypatch.setattr(fcntl, name, _never)
        assert starting(run)
        assert holder(run / "lock") == os.getpid()
    assert not starting(run)
    assert holder(run / "lock") is None
    assert holder(run / "nowhere") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another uid looks")
def test_others_see_that_one_starts_and_cannot_lock_it() -> None:
    with TemporaryDirectory() as folder, only_one(run := Path(folder) / "run"):
        Path(folder).chmod(0o755)
        assert _as_stranger(lambda: starting(run))
        assert _as_stranger(lambda: not os.access(run / "lock", os.R_OK, effective_ids=True))
        assert _as_stranger(lambda: os.access(run, os.X_OK, effective_ids=True)), "the control: it can look in"


def _never(*_: object) -> None:
    raise AssertionError("locked")


def _as_stranger(what: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            os._exit(0 if what() else 1)
        except BaseException:  # noqa: BLE001  whatever it is, the parent is told
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
