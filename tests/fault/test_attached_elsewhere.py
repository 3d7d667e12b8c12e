"""Mode daemon where engines and daemon number processes differently: another pid namespace, as in a container.

`python -m tests.fault.test_attached_elsewhere ROLE RUN FOLDER` is an engine, which says what it sees line by line.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import cast

import pytest

from bench.process import DaemonProcess
from tests.attached_kit import EMULATED, PAGES, Gate, connected, engine, hurried, namespace_of
from tests.node import until

APART = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
COUNT = 8
TO = list(range(PAGES - COUNT, PAGES))
SMALL = ("--dram", "64MiB", "--arena", "8MiB", "--lock", "false", *EMULATED)


@pytest.fixture(scope="module", autouse=True)
def apart() -> None:
    """Can processes be told apart that have no number here, and be made?"""
    pidfd, anonymous = os.pidfd_open(os.getpid()), os.eventfd(0)
    same = os.fstat(pidfd).st_dev == os.fstat(anonymous).st_dev
    os.close(pidfd)
    os.close(anonymous)
    if same:
        pytest.skip("Linux before 6.9: pidfds have one inode for all")
    if shutil.which(APART[0]) is None or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --pid is not allowed here")


@contextmanager
def gated_daemon(through: Sequence[str] = ()) -> Iterator[tuple[DaemonProcess, Gate]]:
    with tempfile.TemporaryDirectory(prefix="kvd-") as folder:
        gate, run, log = Gate(Path(folder)), Path(folder) / "run", Path(folder) / "log"
        module = ("tests.attached_kit",)
        with DaemonProcess(run, *SMALL, log_file=log, module=module, through=through) as process:
            try:
                yield process, gate
            finally:
                gate.open()


@contextmanager
def an_engine(daemon: DaemonProcess, role: str, through: Sequence[str] = ()) -> Iterator["subprocess.Popen[str]"]:
    run = daemon.runtime_dir
    command = [*through, sys.executable, "-m", __spec__.name, role, str(run), str(run.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("through", [(), APART], ids=["in the daemon's", "in another one"])
def test_a_session_that_breaks_is_settled_by_attaching_anew(through: Sequence[str]) -> None:
    with gated_daemon() as (daemon, gate), an_engine(daemon, "breaks", through) as process:
        assert said(process) == f"not settled: {COUNT} pages"
        gate.open()
        assert said(process) == "settled: 0 pages"


def test_who_cannot_be_numbered_waits_for_nobody_elses_copies() -> None:
    with gated_daemon(APART) as (daemon, gate), an_engine(daemon, "hangs") as hangs:
        assert said(hangs) == "broken"
        with an_engine(daemon, "attaches") as other:
            assert said(other) == "attached", "it is another process"
        gate.open()
        assert said(hangs) == "attached anew", "its own copy has ended"


def _breaks(run: Path, gate: Gate) -> None:
    with engine() as kv, connected(cast(DaemonProcess, _At(run))) as client:
        namespace, memory = namespace_of(client, "breaks"), kv.attach(client)
        keys = list(namespace.keys(list(range(4 * COUNT))))
        assert namespace.save(keys, memory[range(COUNT)], timeout_s=30.0).accepted == COUNT
        gate.shut()
        loading = namespace.start_load(keys, memory[TO])
        assert until(lambda: gate.holds and not loading.wait(1, 0.01) and loading.blocks == COUNT)
        client._connection._drop(client._connection._link, "for this test")  # type: ignore[arg-type]
        assert client.wait_connected(20.0)
        with hurried(client, namespace):
            before = memory.settle(0.3)
        print("settled" if before else f"not settled: {len(memory.unsettled())} pages", flush=True)
        print("settled" if memory.settle(20.0) else "not settled", f"{len(memory.unsettled())} pages", sep=": ")


def _hangs(run: Path, gate: Gate) -> None:
    with engine() as kv, connected(cast(DaemonProcess, _At(run))) as client:
        namespace, memory = namespace_of(client, "hangs"), kv.attach(client)
        keys = list(namespace.keys(list(range(4 * COUNT))))
        gate.shut()
        saving = Thread(target=lambda: namespace.save(keys, memory[range(COUNT)], timeout_s=30.0))
        saving.start()
        assert until(lambda: gate.holds)
        client._connection._drop(client._connection._link, "for this test")  # type: ignore[arg-type]
        assert client.wait_connected(20.0)
        with hurried(client, namespace):
            assert memory.attach() is None, "the daemon may still read it"
        print("broken", flush=True)
        assert until(lambda: memory.attach() is not None)
        print("attached anew", flush=True)
        saving.join()


def _attaches(run: Path, _gate: Gate) -> None:
    with engine() as kv, connected(cast(DaemonProcess, _At(run)), timeout_s=30.0) as client:
        print("attached" if kv.attach(client).attached else "not attached", flush=True)


class _At:
    """Of a daemon's process, what a client asks for."""

    def __init__(self, runtime_dir: Path) -> None:
        self.runtime_dir = runtime_dir


if __name__ == "__main__":
    {"breaks": _breaks, "hangs": _hangs, "attaches": _attaches}[sys.argv[1]](Path(sys.argv[2]), Gate(Path(sys.argv[3])))
