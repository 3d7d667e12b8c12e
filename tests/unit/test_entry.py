"""What the console scripts say where something is missing, and what kvctl says of a daemon that is not ready."""

import fcntl
import sys
from pathlib import Path

import pytest

import kvctl.entry
import kvstored.entry
from kvctl.client import ControlClient, Exit, KvctlError, starting


@pytest.mark.parametrize(
    ("module", "main", "extra"),
    [("kvctl.cli", kvctl.entry.main, "kvstored[ctl]"), ("kvstored.cli", kvstored.entry.main, "kvstored[daemon]")],
)
def test_a_missing_package_is_named_with_what_brings_it(
    monkeypatch: pytest.MonkeyPatch, module: str, main: object, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as caught:
        main()  # type: ignore[operator]
    assert extra in str(caught.value)


def test_a_daemon_that_starts_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    said = []
    for locked in (False, True):
        with (tmp_path / "lock").open("w") as lock:
            if locked:
                fcntl.flock(lock, fcntl.LOCK_EX)
            assert starting(tmp_path) is locked
            with pytest.raises(KvctlError) as caught, ControlClient(tmp_path / "control.sock", 1.0):
                pass
        assert caught.value.code is Exit.UNREACHABLE
        said.append("is starting" in str(caught.value))
    assert said == [False, True]
    assert not starting(tmp_path / "nowhere")
