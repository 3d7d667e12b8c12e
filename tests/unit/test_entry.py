"""What the console scripts say where something is missing, and what kvctl says of a daemon that is not ready."""

import fcntl
import subprocess
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


# A process to which the package that is named first is missing. The second is the command, as `python -m` runs it, or
# as its console script does.
MODULE = (
    "import runpy, sys; sys.modules[sys.argv.pop(1)] = None; runpy.run_module(sys.argv.pop(1), None, '__main__', True)"
)
SCRIPT = "import sys; sys.modules[sys.argv.pop(1)] = None; from {}.entry import main; del sys.argv[1]; sys.exit(main())"


@pytest.mark.parametrize(
    ("program", "package", "command", "extra"),
    [
        (MODULE, "numba", "kvstored", "kvstored[daemon]"),
        (SCRIPT, "grpc", "kvstored", "kvstored[daemon]"),
        (MODULE, "typer", "kvctl", "kvstored[ctl]"),
        (SCRIPT, "grpc", "kvctl", "kvstored[ctl]"),
    ],
)
def test_what_only_a_part_needs_is_missed_in_one_line(
    tmp_path: Path, program: str, package: str, command: str, extra: str
) -> None:
    """The daemon begins without most of its packages, and needs them all the same."""
    line = [sys.executable, "-c", program.format(command), package, command, "--runtime-dir", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    said = [text for text in done.stderr.splitlines() if " INFO " not in text]
    assert said == [f"{command} needs the package {package}: pip install '{extra}'"], done.stderr
    assert done.stdout == ""


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
