"""What the day happens on: a folder for all of it, two drives, engines as processes, commands of the installation."""

import json
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from kvproto import control_pb2, control_pb2_grpc
from tests.e2e.prefix import Prefix
from tests.node import until

ENGINE = Path(__file__).with_name("engine.py")
DRIVE_BYTES = 80 << 20
WAIT_S = 60.0
Answer = dict[str, Any]


class Drive:
    """A file system of its own where we may mount one, else a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DRIVE_BYTES}", "kvstored-day", str(folder)]
        self.mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0

    @contextmanager
    def full(self, daemon_pid: int) -> Iterator[tuple[str, str]]:
        """Nothing more fits, until the block ends; gives the state that the drive gets, and words of its remedy."""
        if not self.mounted:  # files of this process may not grow: on all drives, which is worse
            hard = resource.prlimit(daemon_pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(daemon_pid, resource.RLIMIT_FSIZE, (1 << 20, hard))
            yield "failing", "see the kernel's log"
            resource.prlimit(daemon_pid, resource.RLIMIT_FSIZE, (hard, hard))
            return
        filler = self.folder / "filler"
        with filler.open("wb") as file:
            while (free_bytes := shutil.disk_usage(self.folder).free) > 0:
                with suppress(OSError):  # the daemon was faster with some of it
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free_bytes)
        yield "full", "free space there"
        filler.unlink()

    def pull(self) -> None:
        """It is gone, with all that lies on it and the folder: an empty one would be taken for a new drive at once."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)
            self.mounted = False
        self.folder.rename(self.folder.with_name(f"{self.folder.name}-pulled"))

    def close(self) -> None:
        """Leave nothing mounted."""
        if self.mounted:
            self.pull()


class Engine:
    """A process of `engine.py`, of one tenant."""

    def __init__(self, prefix: Prefix, runtime_dir: Path, tenant: str, log: Path) -> None:
        self.tenant = tenant
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [str(prefix.bin / "python"), str(ENGINE), str(runtime_dir), tenant],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=prefix.environ(), cwd="/",
            )  # fmt: skip

    def begin(self) -> None:
        """Wait until it is connected."""
        self._answer()

    def ask(self, do: str, **more: object) -> Answer:
        """One order, and its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine of {self.tenant} has ended with {self.process.wait(WAIT_S)}"
        answer: Answer = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Host:
    """A context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="day-", dir="/var/tmp"))
        self.run = self.home / "run"
        self.run.mkdir()
        self.log = self.home / "log"
        self.log.touch()
        self.config = self.home / "kvstored.toml"
        self.drives: list[Drive] = []
        self.engines: list[Engine] = []
        self.prefix: Prefix

    def kvctl(self, *arguments: str) -> Answer:
        """A command of the installation; what it says in JSON."""
        command = [str(self.prefix.bin / "kvctl"), "--runtime-dir", str(self.run), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=WAIT_S, env=self.prefix.environ(), cwd="/"
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        answer: Answer = json.loads(done.stdout) if "json" in arguments else {}
        return answer

    def status(self) -> control_pb2.GetStatusResponse:
        """As the daemon says."""
        with grpc.insecure_channel(f"unix:{self.run}/control.sock") as channel:
            request = control_pb2.GetStatusRequest()
            status: control_pb2.GetStatusResponse = control_pb2_grpc.ControlStub(channel).GetStatus(
                request, timeout=WAIT_S
            )
        return status

    def warned(self, words: str) -> bool:
        """Does it warn of that, or will it soon, and does `kvctl status` show it?"""
        until(lambda: any(words in warning for warning in self.status().warnings), WAIT_S)
        return self.warns(words)

    def warns(self, words: str) -> bool:
        """Does `kvctl status` warn of that?"""
        return any(words in warning for warning in self.kvctl("status", "-o", "json")["status"]["warnings"])

    def said(self) -> str:
        """The end of what daemons and engines have said."""
        return self.log.read_text()[-6000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for engine in self.engines:
            engine.close()
        for drive in self.drives:
            drive.close()
        if error is not None:
            print(self.said())
        shutil.rmtree(self.home, ignore_errors=True)
