"""A daemon that was forked off a prepared process is one like any other."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import kvclient
from bench.process import DaemonProcess
from tests.node import opened_by
from tests.prepared import Forked, Prepared
from tests.systemd import ServiceManager

PATIENCE_S = 30.0
# What a service finds, and an end of its own.
SAYS = """
import os, sys
own = [os.environ[name] == str(os.getpid()) for name in ("LISTEN_PID", "WATCHDOG_PID")]
opened = sorted(map(int, os.listdir("/proc/self/fd")))
print(sys.argv, own, os.environ["LISTEN_FDNAMES"], opened, os.getcwd(), __name__)
print([os.fstat(number).st_ino for number in (3, 4)], flush=True)
sys.exit(7)
"""


@pytest.fixture(scope="module")
def prepared() -> Iterator[Prepared]:
    made = Prepared()
    yield made
    made.end()


@pytest.fixture(params=["forked", "executed"])
def either(request: pytest.FixtureRequest, prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DaemonProcess, "starter", prepared if request.param == "forked" else None)


@pytest.fixture
def running(either: None, tmp_path: Path) -> Iterator[DaemonProcess]:
    arguments = ("--dram", "64MiB", "--lock", "false")
    with DaemonProcess(tmp_path / "run", *arguments, log_file=tmp_path / "log") as made:
        yield made


def test_it_serves_has_nothing_open_that_is_not_its_own_and_says_how_it_ended(running: DaemonProcess) -> None:
    process = running.process
    with kvclient.connect(running.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(PATIENCE_S)
        assert client.ping() is not None
    opened = opened_by(process.pid)
    assert sum(file.startswith("pipe:") for file in opened) == 1, "standard output"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    assert running.terminate(PATIENCE_S) == 0
    assert process.poll() == process.returncode == 0
    process.kill()  # too late, and no harm


def test_one_that_is_killed_says_by_what(running: DaemonProcess) -> None:
    running.process.send_signal(signal.SIGKILL)
    assert running.process.wait(PATIENCE_S) == -signal.SIGKILL


@pytest.mark.usefixtures("either")
def test_one_that_cannot_start_ends_with_its_own_code(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        DaemonProcess(tmp_path / "run", "--dram", "1KiB", log_file=tmp_path / "log")


def test_an_answer_that_nobody_heard_is_not_taken_for_the_next_one(prepared: Prepared, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ("--dram", "64MiB", "--lock", "false")
    with DaemonProcess(tmp_path / "first", *arguments, log_file=log) as first, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "_reply", lambda _: pytest.fail("its time is over"))
        with log.open("ab") as file, pytest.raises(pytest.fail.Exception):
            prepared.fork(["--runtime-dir", str(tmp_path / "lost"), *arguments], file.fileno())
        patch.undo()
        patch.setattr(DaemonProcess, "starter", prepared)
        with DaemonProcess(tmp_path / "second", *arguments, log_file=log) as second:
            assert f"pid {second.process.pid}" in second.serving_line
        assert first.process.poll() is None
        assert second.process.poll() == -signal.SIGKILL


def test_several_that_are_asked_for_at_once_are_not_mixed_up(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DaemonProcess, "starter", prepared)

    def start(number: int) -> DaemonProcess:
        arguments = ("--dram", "64MiB", "--lock", "false")
        return DaemonProcess(tmp_path / f"run{number}", *arguments, log_file=tmp_path / f"log{number}")

    with ThreadPoolExecutor(4) as starting:
        started = list(starting.map(start, range(4)))
    try:
        assert all(f"pid {one.process.pid}" in one.serving_line for one in started)
    finally:
        for one in started:
            one.kill()


def test_settings_of_the_interpreter_want_a_new_one(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert prepared.fork([], 2) is None


def test_a_service_finds_the_same_whether_it_is_forked_or_executed(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, starter in (("forked", prepared), ("executed", None)):
        monkeypatch.setattr(ServiceManager, "starter", starter)
        command, log = [sys.executable, "-c", SAYS, "word"], tmp_path / f"log-{name}"
        with ServiceManager(command, os.environ, tmp_path, log_file=log, watchdog_s=60.0) as manager:
            sockets = [manager.listen(tmp_path / f"{name}-{socket}", socket) for socket in ("hot", "cold")]
            manager.start()
            assert manager.process is not None
            assert isinstance(manager.process, Forked) is (name == "forked")
            assert manager.process.wait(PATIENCE_S) == 7, log.read_text()
            general, passed = log.read_text().splitlines()
            assert passed == str([os.fstat(socket.fileno()).st_ino for socket in sockets])
            found.append(general)
    assert found[0] == found[1]
    assert "[True, True] hot:cold [0, 1, 2, 3, 4, 5]" in found[0], "five, and the folder that it lists"
