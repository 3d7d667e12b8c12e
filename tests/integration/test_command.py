"""The two commands as a person meets them: start, refuse, answer, stop."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvctl.cli import app, globals_first
from tests.integration.conftest import StartDaemon


def kvstored(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the daemon's command to its end."""
    return subprocess.run([sys.executable, "-m", "kvstored", *arguments], capture_output=True, text=True, check=False)


def kvctl(runtime_dir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the operator's command."""
    command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(runtime_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[dram]\nsise = "1GiB"\n', ":2:"),
        ('[dram]\nsize = "1 GigaByte"\n', ":2:"),
        ('[dram]\n\nsize = "900TiB"\n', ":3:"),
        ("[dram\n", ":1:"),
    ],
)
def test_a_bad_configuration_stops_the_start_with_file_line_and_exit_code_78(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text(text)
    for command in (["--config", str(file), "--runtime-dir", str(tmp_path / "run")], ["config", "check", str(file)]):
        done = kvstored(*command)
        assert done.returncode == 78
        assert f"{file}{said}" in done.stderr
    assert not (tmp_path / "run" / "hot.sock").exists()


def test_a_good_configuration_is_called_good(tmp_path: Path) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text('[dram]\nsize = "64MiB"\n[tenants.chat]\nuids = [1000]\n')
    done = kvstored("config", "check", str(file))
    assert done.returncode == 0, done.stderr
    assert "good" in done.stdout


def test_a_second_daemon_on_one_directory_says_so_and_leaves_the_first_alone(start_daemon: StartDaemon) -> None:
    first = start_daemon("--dram", "64MiB", "--lock", "false")
    done = kvstored("--runtime-dir", str(first.runtime_dir), "--dram", "64MiB")
    assert done.returncode == 75
    assert f"another daemon serves {first.runtime_dir}: process {first.process.pid} holds its lock" in done.stderr
    assert (first.runtime_dir / "lock").read_text() == f"{first.process.pid}\n"
    assert kvctl(first.runtime_dir, "ping").returncode == 0


def test_sigterm_ends_it_well_and_leaves_no_socket_that_answers(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    assert daemon.terminate() == 0
    assert kvctl(daemon.runtime_dir, "ping").returncode == 3
    assert [path.name for path in daemon.runtime_dir.iterdir()] == ["lock"]


def test_it_starts_where_a_killed_one_left_its_sockets(start_daemon: StartDaemon) -> None:
    start_daemon("--dram", "64MiB", "--lock", "false").kill()
    successor = start_daemon("--dram", "64MiB", "--lock", "false")
    assert kvctl(successor.runtime_dir, "ping").returncode == 0


def test_every_reading_command_answers_in_tables_and_in_json(start_daemon: StartDaemon) -> None:
    """In this process, but for one of them: what a process of its own adds is the same for all."""
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, globals_first(["--runtime-dir", str(daemon.runtime_dir), *words]))
        assert done.exit_code == 0, (words, done.output)
        return done.stdout

    for command in ("status", "stats", "namespaces", "tenants", "clients", "config", "ping", "doctor"):
        assert max(map(len, run(command).splitlines()), default=0) <= 80, command
        assert json.loads(run("-o", "json", command))["version"] == 1, command
    assert kvctl(daemon.runtime_dir, "namespaces").stdout == run("namespaces") != ""


def test_an_interrupt_ends_it_as_well(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.process.wait(timeout=20) == 0


def test_a_configuration_is_not_called_good_for_a_directory_that_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text(f'[daemon]\nruntime_dir = "{file}/below"\n')
    done = kvstored("config", "check", str(file))
    assert done.returncode == 78
    assert "not a directory" in done.stderr


def test_a_disk_directory_that_cannot_be_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text(f'[disk]\nsize = "64MiB"\ndirectories = ["{tmp_path}/kv", "{file}/below"]\n')
    done = kvstored("config", "check", str(file))
    assert done.returncode == 78
    assert done.stderr == f"kvstored: {file}:3: disk.directories: {file} is not a directory\n"


def test_a_disk_tier_that_can_be_is_called_good_and_not_made(tmp_path: Path) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text(f'[disk]\nsize = "64MiB"\ndirectories = ["{tmp_path}/a/kv", "{tmp_path}/b"]\n')
    done = kvstored("config", "check", str(file))
    assert done.returncode == 0, done.stderr
    assert f"disk.directories = {tmp_path}/a/kv:{tmp_path}/b  # file {file}:3" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["kvstored.toml"]


def test_a_daemon_with_disk_shows_its_tier_and_its_drives(start_daemon: StartDaemon, tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    disk = ("--disk", ":".join(map(str, folders)), "--disk-size", "64MiB")
    daemon = start_daemon("--dram", "64MiB", "--lock", "false", *disk)
    for _ in range(100):  # each look takes some tenths of a second: disk opens meanwhile
        status = json.loads(kvctl(daemon.runtime_dir, "-o", "json", "status").stdout)["status"]
        if status["disk"]["state"] == "serving":
            break
    assert [(tier["name"], tier["capacity_bytes"]) for tier in status["tiers"]] == [
        ("dram", 64 << 20),
        ("disk", 64 << 20),
    ]
    assert [drive["directory"] for drive in status["disk"]["drives"]] == list(map(str, folders))
    assert (status["disk"]["admission"], status["disk"]["codec"]) == ("second_touch", "auto")
    assert "disk: serving, index ready" in kvctl(daemon.runtime_dir, "status").stdout
    assert "none damaged" in kvctl(daemon.runtime_dir, "scrub", "--wait", "--rate", "0").stdout
    doctor = json.loads(kvctl(daemon.runtime_dir, "-o", "json", "doctor").stdout)["doctor"]
    assert {"disk 1", "disk 2", "disk space", "keep"} <= {check["name"] for check in doctor["checks"]}


def test_a_scrub_without_a_disk_tier_is_refused_with_a_remedy(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    done = kvctl(daemon.runtime_dir, "scrub")
    assert done.returncode == 1
    assert done.stderr == "kvctl: there is no disk tier to scrub; give kvstored --disk and --disk-size\n"
