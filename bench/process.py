"""A real daemon in a process of its own, for demonstrations and tests."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class DaemonProcess:
    """`kvstored` run by this interpreter. Serving once made; a context manager that kills it on the way out.

    `arguments` are those of the command, such as `"--dram", "512MiB"`; its log goes to `log_file`. Raises
    RuntimeError, with the end of the log, if it does not serve within `deadline_s`.
    """

    def __init__(self, runtime_dir: Path, *arguments: str, log_file: Path, deadline_s: float = 60.0) -> None:
        self.runtime_dir = runtime_dir
        self._log_file = log_file
        command = [sys.executable, "-m", "kvstored", "--runtime-dir", str(runtime_dir), *arguments]
        with log_file.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
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
