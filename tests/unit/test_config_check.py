"""`kvstored config check FILE`: what it calls good is what a restart of the service would take."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvproto.control_token import TOKEN_SOCKET
from kvstored import cli, config_checks, door, fd_keeper
from kvstored.block_events_address import FOLDER
from kvstored.config import ConfigError, load
from kvstored.environment_file import read_environment
from kvstored.service import HOT_SOCKET

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "kvstored.toml"
    made.write_text(f'[daemon]\nruntime_dir = "{tmp_path}/run"\n[dram]\nsize = "64MiB"\n')
    return made


@pytest.fixture
def check(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Its exit code, and all that it says. What the unit has lies at `tmp_path`/environment, if at all."""
    monkeypatch.setattr(cli, "ENVIRONMENT_FILE", tmp_path / "environment", raising=False)
    monkeypatch.setenv("KVSTORED_DRAM", "nonsense")  # of whoever asks: not the service's

    def run(*options: str) -> tuple[int, str]:
        code = cli.main(["config", "check", *options, str(file)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_the_units_environment_wins_over_the_file_as_it_does_at_the_start(check: Check, tmp_path: Path) -> None:
    assert check()[0] == 0, "the control: there is none"
    environment = tmp_path / "environment"
    environment.write_text("# of this host\nKVSTORED_DRAM=128MiB\n")
    code, said = check()
    assert code == 0
    assert "dram.size = 128MiB  # environment KVSTORED_DRAM" in said
    assert f"good with {environment}" in said
    for wrong in ("KVSTORED_DRAM=much\n", "KVSTORED_DRAMM=64MiB\n"):
        environment.write_text(wrong)
        code, said = check()
        assert code == 78
        assert f"{environment}: environment {wrong.split('=')[0]}: " in said


def test_another_environment_can_be_named_or_none(check: Check, tmp_path: Path) -> None:
    (tmp_path / "environment").write_text("KVSTORED_DRAM=much\n")
    other = tmp_path / "other"
    other.write_text('KVSTORED_DRAM="256MiB"\n')
    code, said = check("--environment", str(other))
    assert (code, "dram.size = 256MiB" in said) == (0, True)
    code, said = check("--environment", os.devnull)
    assert (code, "dram.size = 64MiB" in said) == (0, True)
    code, said = check("--environment", str(tmp_path / "nowhere"))
    assert (code, "cannot be read" in said) == (78, True)


def test_a_file_that_the_service_would_not_read_is_not_called_good(check: Check, tmp_path: Path, file: Path) -> None:
    environment = tmp_path / "environment"
    environment.write_text(f"KVSTORED_CONFIG={tmp_path}/other.toml\n")
    code, said = check()
    assert code == 78
    assert f"KVSTORED_CONFIG is {tmp_path}/other.toml, and {file} would not be read" in said
    environment.write_text(f"KVSTORED_CONFIG={tmp_path}/../{tmp_path.name}/{file.name}\n")
    assert check()[0] == 0


def test_it_says_whose_rights_were_tried(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"the rights of uid {os.geteuid()}" in check()[1]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "runuser -u kvstored -- kvstored config check" in check()[1]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "runuser" not in check()[1]
    monkeypatch.setattr(os, "access", lambda *_: False)
    code, said = check()
    assert (code, "cannot be written to by uid 1000" in said) == (78, True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=b", {"A": "b"}),
        ("  A = b c \t\n; note\n# A=z\nB=2", {"A": "b c", "B": "2"}),
        ("A=\"b 'c' \\\" \\n\"\nB='x\\y\"'", {"A": "b 'c' \" \\n", "B": 'x\\y"'}),
        ("A=b\\\n  c\nB=x\\ y\\\\", {"A": "b  c", "B": "x y\\"}),
        ("A='b' \"c\"d\nB=", {"A": "bcd", "B": ""}),
        ("A=b'c'\n", {"A": "b'c'"}),
        ("no sign\n\nA=1\nA=2", {"A": "2"}),
        ("A=b # c", {"A": "b # c"}),
        ("A='b\nc'\nB=1\r\n", {"A": "b\nc", "B": "1"}),
    ],
)
def test_an_environment_file_is_read_as_systemd_reads_it(tmp_path: Path, text: str, found: dict[str, str]) -> None:
    (tmp_path / "file").write_bytes(text.encode())
    assert read_environment(tmp_path / "file") == found


@pytest.mark.parametrize(("raw", "why"), [(b"A=1\nB='2\n", ":2: a quote is not closed"), (b"A=\xff", "UTF-8")])
def test_one_that_cannot_be_read_says_where(tmp_path: Path, raw: bytes, why: str) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(ConfigError, match=f"{tmp_path}/file.*{why}"):
        read_environment(tmp_path / "file")


OURS = (HOT_SOCKET, door.CONTROL, door.TENANTS, TOKEN_SOCKET, fd_keeper.SOCKET_NAME, FOLDER, "lock")


def test_every_name_of_ours_is_known_to_be_taken() -> None:
    assert set(OURS) == set(config_checks.OWN_NAMES)


@pytest.mark.parametrize("name", OURS)
def test_metrics_do_not_take_the_place_of_a_socket_of_ours(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    environ = {"KVSTORED_RUNTIME_DIR": str(run)}
    for path in (run / name, tmp_path / "link" / name, tmp_path / "run/../run" / name, run / "events" / "x.pub"):
        with pytest.raises(ConfigError, match=r"environment KVSTORED_METRICS_LISTEN: .* is the daemon's own"):
            load(None, {**environ, "KVSTORED_METRICS_LISTEN": str(path)}, {})
    for path in (run / "metrics.sock", tmp_path / name):
        assert load(None, {**environ, "KVSTORED_METRICS_LISTEN": str(path)}, {}).config.metrics_listen == str(path)
