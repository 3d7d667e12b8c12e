"""A real daemon in a process of its own, for demonstrations and tests."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Protocol, Self

import grpc

from kvproto import control_pb2, control_pb2_grpc


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    pid: int
    returncode: int | None

    @property
    def stdout(self) -> IO[bytes] | None:
        """Where its standard output is read."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""

    def send_signal(self, sig: int, /) -> None:
        """If it runs."""

    def kill(self) -> None:
        """SIGKILL."""

    def terminate(self) -> None:
        """SIGTERM."""


class Starter(Protocol):
    """A quicker start of the very same."""

    def fork(self, arguments: Sequence[str], log: int) -> Process | None:
        """A daemon whose standard error goes to `log`; None where it must be executed after all."""


class DaemonProcess:
    """`kvstored` run by this interpreter. Serving once made; a context manager that kills it on the way out.

    `arguments` are those of the command, such as `"--dram", "512MiB"`; its log goes to `log_file`. `module`: what to
    run in place of the daemon's own, with arguments that come first; `through`: a command that becomes it. Raises
    RuntimeError, with the end of the log, if it does not serve within `deadline_s`.
    """

    starter: ClassVar[Starter | None] = None  # of tests

    def __init__(
        self, runtime_dir: Path, *arguments: str, log_file: Path, deadline_s: float = 60.0,
        module: Sequence[str] = ("kvstored",), through: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.runtime_dir = runtime_dir
        self._log_file = log_file
        words = ["--runtime-dir", str(runtime_dir), *arguments]
        plain = not through and tuple(module) == ("kvstored",)
        with log_file.open("ab") as log:
            forked = self.starter.fork(words, log.fileno()) if plain and self.starter is not None else None
            self.process: Process = forked or subprocess.Popen(
                [*through, sys.executable, "-m", *module, *words], stdout=subprocess.PIPE, stderr=log
            )
        try:
            self.serving_line = self._await_line(time.monotonic() + deadline_s)
        except BaseException:
            self.kill()
            raise

    @property
    def version(self) -> str:
        """As it says itself."""
        return self.serving_line.split()[1]

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone. Any number of times."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def terminate(self, deadline_s: float = 30.0) -> int:
        """Ask it to stop; its exit code. Raises subprocess.TimeoutExpired."""
        self.process.terminate()
        return self.process.wait(timeout=deadline_s)

    def await_memory(self, deadline_s: float = 60.0) -> None:
        """Until all of DRAM is populated, as it is in a daemon that has been up for a while. Raises TimeoutError."""
        deadline = time.monotonic() + deadline_s
        with grpc.insecure_channel(f"unix:{self.runtime_dir}/control.sock") as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            while time.monotonic() < deadline:
                tiers = {tier.name: tier for tier in stub.GetStatus(control_pb2.GetStatusRequest()).tiers}
                if tiers["dram"].populated_bytes >= tiers["dram"].capacity_bytes:
                    return
                time.sleep(0.01)
        raise TimeoutError(f"memory is not populated within {deadline_s:.0f} s")

    def _await_line(self, deadline: float) -> str:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        heard = b""
        while b"\n" not in heard:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(pipe, 4096) if ready else b""
            if not piece:
                raise RuntimeError(
                    f"the daemon does not serve; it said {heard!r}\n{self._log_file.read_text()[-2000:]}"
                )
            heard += piece
        return heard.decode().splitlines()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
