"""Who starts the daemon of the day: what a real systemd is given, and whom the day takes where."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e import supervisor
from tests.e2e.supervisor import NAME, Stand, Systemd, running_systemd, supervisor_of, units

ANALYZE = shutil.which("systemd-analyze")
SHIPPED = Path(__file__).parents[2] / "systemd"


def settings(text: str) -> dict[str, str]:
    """The last value of each directive."""
    lines = (line for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_a_real_systemd_reads_both_units_without_a_word(tmp_path: Path) -> None:
    odd = tmp_path / "a b%n"
    odd.mkdir()
    program = odd / "kvstored"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for what, broken in (("as they are", ""), ("the control", "KillMode=sometimes\n")):
        service, socket = units([str(program), "--dram", "$HOME"], {"PYTHONPATH": str(odd)}, odd, odd / "log")
        (tmp_path / f"{NAME}.service").write_text(service + broken)
        (tmp_path / f"{NAME}.socket").write_text(socket)
        done = subprocess.run(
            [str(ANALYZE), "verify", "--man=no", *(str(tmp_path / f"{NAME}.{kind}") for kind in ("service", "socket"))],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if NAME in line]
        assert bool(said) == bool(broken), f"{what}: {done.stderr}"


def test_what_makes_it_a_service_is_as_in_the_units_that_are_shipped(tmp_path: Path) -> None:
    service, socket = map(settings, units(["/bin/true"], {}, tmp_path, tmp_path / "log"))
    text = (SHIPPED / "kvstored.service").read_text()
    shipped = settings(text)
    for name in ("Type", "NotifyAccess", "WatchdogSec", "KillMode", "FileDescriptorStoreMax"):
        assert service[name] == shipped[name], name
    listening = settings((SHIPPED / "kvstored.socket").read_text())
    for name in ("FileDescriptorName", "SocketMode", "RemoveOnStop", "TriggerLimitIntervalSec"):
        assert socket[name] == listening[name], name
    assert "KVSTORED_KEEP=true" in text  # there may be several lines of the environment
    assert "KVSTORED_KEEP=true" in service["Environment"]


def test_a_stand_in_is_taken_where_no_systemd_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BOOTED", tmp_path / "nowhere")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert running_systemd() is None
    with supervisor_of(["/bin/true"], os.environ, tmp_path, tmp_path / "log") as taken:
        assert isinstance(taken, Stand)


@pytest.mark.parametrize("which", ["system", "user"])
def test_a_real_one_is_taken_where_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """With a systemctl that says yes to everything: the units are put where it looks, and taken away."""
    fake = tmp_path / "systemctl"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho 252\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    booted = tmp_path / "booted"
    if which == "system":
        booted.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(supervisor, "BOOTED", booted)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert running_systemd() == which
    folder = booted if which == "system" else tmp_path / "systemd/user"
    with supervisor_of(["/bin/true"], os.environ, tmp_path, tmp_path / "log") as taken:
        assert isinstance(taken, Systemd)
        assert {path.name for path in folder.iterdir()} == {f"{NAME}.service", f"{NAME}.socket"}
        taken.start()
        assert taken.pid == 252
    assert not list(folder.iterdir())
    asked = (tmp_path / "asked").read_text().splitlines()
    assert all(line.startswith(f"--{which} ") for line in asked if which == "system" or "show" not in line)
    assert f"--{which} start {NAME}.service" in asked
    assert f"--{which} stop {NAME}.socket {NAME}.service" in asked
