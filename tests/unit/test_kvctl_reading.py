"""What `kvctl` says of settings, counters and itself: `config`, `stats`, `--help`, `completion`."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvctl import cli
from kvctl.client import Exit
from kvstore.report import ConfigValue
from tests.unit.store_port import StorePort, served


@pytest.fixture
def port(tmp_path: Path) -> Iterator[StorePort]:
    with served(tmp_path / "run") as (port, _):
        yield port


def kvctl(port: StorePort, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, cli.globals_first(["--runtime-dir", port.runtime_dir, *arguments]))


def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """As the console script: its exit code, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["kvctl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().out


def test_config_shows_only_what_was_changed_if_asked(port: StorePort, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ConfigValue("dram.numa", "auto", "default", "nodes", "where memory lies")
    values = (*port.config(), usual)
    monkeypatch.setattr(port, "config", lambda: values)
    names = [one["name"] for one in json.loads(kvctl(port, "config", "-o", "json").stdout)["config"]]
    changed = [one["name"] for one in json.loads(kvctl(port, "config", "--changed", "-o", "json").stdout)["config"]]
    assert names == [*changed, "dram.numa"]


def test_stats_have_a_hit_rate_and_those_of_disk_if_there_is_one(port: StorePort) -> None:
    out = kvctl(port, "stats").stdout
    assert ["hit", "rate", "50.0%"] in [line.split() for line in out.splitlines()]
    assert "saved bytes" in out
    port.disk = None
    assert "saved bytes" not in kvctl(port, "stats").stdout


def test_commands_are_listed_by_what_they_are_for() -> None:
    out = CliRunner().invoke(cli.app, ["--help"]).stdout
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert listed.index("status") < listed.index("top") < listed.index("tree") < listed.index("clear")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_a_shell_reads(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = main(monkeypatch, capsys, "completion", shell)
    assert code == 0
    assert "_KVCTL_COMPLETE" in out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    assert main(monkeypatch, capsys, "completion", "cmd")[0] == Exit.USAGE


@pytest.mark.parametrize(
    ("words", "expected"), [("kvctl tre", "tree"), ("kvctl tree --wid", "--width"), ("kvctl policy s", "set")]
)
def test_a_shell_that_asks_is_told_what_could_follow(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_KVCTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main(monkeypatch, capsys) == (0, f"{expected}\n")
