"""Daemons out of one prepared process.

A daemon's first second goes into imports and into loading compiled code, and the suite starts hundreds of daemons. So
one process does that once, and a plain start is a fork of it, which runs the command's own `main`: a process of its
own that is killed and waited for like any other. What starts in another way (under a stand-in for systemd, through
another command, with another interpreter's settings) is executed as ever.

    test                                   prepared process                  daemon
    arguments, environment, directory  ->  fork  ------------------------->  main(arguments)
    + standard output, error, `ended`      its pid ->
                       exit status, down `ended` <-  waits for it  <-------  ends
"""

import gc
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bench.harness import ROOT

REQUEST_BYTES = 128 << 10  # an environment, mostly
MAX_FILE = 4096  # descriptors above are nobody's
OF_THE_INTERPRETER = ("PYTHON", "NUMBA", "LD_", "OMP_", "MALLOC")  # variables that are read once, at its start


class Forked:
    """A daemon, with those of `subprocess.Popen`'s verbs that tests use."""

    stdin = None

    def __init__(self, pid: int, stdout: IO[bytes], ended: int) -> None:
        """`ended`: where the exit status will come from."""
        self.pid = pid
        self.stdout: IO[bytes] | None = stdout
        self.returncode: int | None = None
        self._ended = ended
        self._handle: int | None = None
        with suppress(ProcessLookupError):  # gone already
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._collect(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Until it ends. Raises subprocess.TimeoutExpired."""
        code = self._collect(timeout)
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"daemon {self.pid}", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None and self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _collect(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._ended, selectors.EVENT_READ)
                if not selector.select(timeout):
                    return None
            told = os.read(self._ended, 64)
            assert told, "the prepared process died before this daemon"
            self.returncode = int(told)
            os.close(self._ended)
            if self._handle is not None:
                os.close(self._handle)
        return self.returncode


class Prepared:
    """Starts the prepared process when the first daemon is wanted. A context manager that ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._number = 0
        self._asking = threading.Lock()  # some tests start several daemons side by side
        self._interpreter = of_the_interpreter(os.environ)

    def fork(self, arguments: Sequence[str], log: int) -> Forked | None:
        """A daemon whose standard error goes to `log`; None where it must be executed instead. Any thread."""
        if of_the_interpreter(os.environ) != self._interpreter:
            return None
        with self._asking:
            return self._fork(arguments, log)

    def _fork(self, arguments: Sequence[str], log: int) -> Forked | None:
        self._number += 1
        request = json.dumps([self._number, list(arguments), dict(os.environ), str(Path.cwd())]).encode()
        if len(request) > REQUEST_BYTES:
            return None
        output, output_end = os.pipe()
        ended, ended_end = os.pipe()
        try:
            socket.send_fds(self._begin(), [request], [output_end, log, ended_end])
            return Forked(self._reply(), os.fdopen(output, "rb", buffering=0), ended)
        except BaseException:
            os.close(output)
            os.close(ended)
            raise
        finally:
            os.close(output_end)
            os.close(ended_end)

    def _reply(self) -> int:
        """The daemon's process. One that was given up before it was heard of (a test's time was over) is ended."""
        assert self._channel is not None
        while told := self._channel.recv(64):
            number, pid = map(int, told.split())
            if number == self._number:
                return pid
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise AssertionError("the prepared process is gone")

    def end(self) -> None:
        """Daemons of it go on."""
        if self._process is not None and self._channel is not None:
            self._channel.close()
            self._process.wait()

    def _begin(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                line = [sys.executable, "-m", "tests.prepared", str(theirs.fileno())]
                self._process = subprocess.Popen(line, cwd=ROOT, pass_fds=(theirs.fileno(),))
        return self._channel


def of_the_interpreter(environ: Mapping[str, str]) -> dict[str, str]:
    """What of an environment a fork can no longer follow."""
    return {name: value for name, value in environ.items() if name.startswith(OF_THE_INTERPRETER)}


# -- the prepared process ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """A daemon that is asked for."""

    number: int
    arguments: list[str]
    environ: dict[str, str]
    folder: str
    files: list[int]  # standard output and error, and where its exit status goes


def next_daemon(channel: socket.socket) -> Wanted:
    """Fork whenever asked; returns in each fork. Ends with whoever asks."""
    with selectors.DefaultSelector() as selector:
        selector.register(channel, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not channel:
                    pid, ended = key.data
                    selector.unregister(key.fileobj)
                    _say_how_it_ended(pid, key.fd, ended)
                    continue
                request, files, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 3)
                if not request:
                    sys.exit()
                number, arguments, environ, folder = json.loads(request)
                wanted = Wanted(number, arguments, environ, folder, files)
                pid = os.fork()
                if pid == 0:
                    return wanted
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, files[2]))
                os.close(files[0])
                os.close(files[1])
                channel.send(f"{wanted.number} {pid}".encode())


def _say_how_it_ended(pid: int, handle: int, ended: int) -> None:
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):  # nobody wants to know
        os.write(ended, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(handle)
    os.close(ended)


def _become(wanted: Wanted) -> None:
    """A process as if it had been executed: nothing open but the standard files."""
    os.dup2(wanted.files[0], 1)
    os.dup2(wanted.files[1], 2)
    os.closerange(3, MAX_FILE)
    os.environ.clear()
    os.environ.update(wanted.environ)
    os.chdir(wanted.folder)
    sys.argv = ["kvstored", *wanted.arguments]
    random.seed()
    gc.unfreeze()


def _load() -> None:
    """All that a daemon imports, and the compiled code."""
    import kvstored.cli
    import kvstored.daemon
    from kvstored.warmup import warm_up

    assert kvstored.cli, kvstored.daemon
    warm_up()
    gc.collect()
    gc.freeze()  # pages that all share


def main() -> int:
    """Prepare, then be a daemon in every fork."""
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        _load()
        wanted = next_daemon(channel)
    _become(wanted)
    from kvstored.entry import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
