"""Real daemons for tests: one a module (`daemon`), or as many as a test wants (`start_daemon`)."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

import kvclient
from bench.engines import find_vllm, why_not
from bench.process import DaemonProcess
from kvproto import control_pb2, control_pb2_grpc
from kvproto.control_token import token_metadata
from tests.node import PATIENCE_S

StartDaemon = Callable[..., DaemonProcess]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A serving daemon with 256 MiB, shared by the tests of a module, killed after them."""
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(folder / "run", "--dram", "256MiB", log_file=folder / "log") as process:
        yield process


@pytest.fixture(scope="module")
def _lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("lasting")
    with DaemonProcess(folder / "run", "--dram", "64MiB", "--arena", "4MiB", log_file=folder / "log") as process:
        yield process


@pytest.fixture
def empty_daemon(_lasting: DaemonProcess) -> DaemonProcess:
    """A daemon with 64 MiB in arenas of 4, shared by the tests of a module, which may stop and not kill it.

    Nothing is left in it of what former tests have stored.
    """
    os.kill(_lasting.process.pid, signal.SIGCONT)
    with grpc.insecure_channel(f"unix:{_lasting.runtime_dir}/control.sock") as channel:
        everything = control_pb2.ClearRequest(everything=control_pb2.ClearRequest.Everything())
        token = token_metadata(_lasting.runtime_dir)
        control_pb2_grpc.ControlStub(channel).Clear(everything, timeout=30.0, metadata=token)
    return _lasting


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[StartDaemon]:
    """Call it with arguments of the command to have a daemon in `tmp_path / "run"`; all are killed after the test.

    A second call starts a successor in the same directory, once the first one is dead.
    """
    with ExitStack() as daemons:

        def start(*arguments: str) -> DaemonProcess:
            process = DaemonProcess(tmp_path / "run", *arguments, log_file=tmp_path / "log")
            return daemons.enter_context(process)

        yield start


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[kvclient.Client]:
    """A connected client of the module's daemon."""
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as connected:
        assert connected.wait_connected(10.0), connected.status
        yield connected


@pytest.fixture(scope="session")
def python() -> Path:
    """Of the environment with vLLM."""
    found = find_vllm()
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(why_not())
    if found is None:
        pytest.skip(why_not())
    return found
