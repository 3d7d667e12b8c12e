"""Daemons out of one prepared process.

A daemon's first second goes into imports and into loading compiled code, and the suite starts hundreds of daemons. So
one process does that once, and a start is a fork of it, which runs the command's own `main` or a test's script around
it: a process of its own that is killed and waited for like any other. The stand-in for systemd (systemd.py) passes
descriptors to it as it would to one that is executed. What starts in another way (through another command, with
another interpreter's settings) is executed as ever.

    test                                   prepared process                  daemon
    arguments, environment, directory  ->  fork  ------------------------->  main(arguments)
    + standard output, error, `ended`,     its pid ->
      what is passed to a service
                       exit status, down `ended` <-  waits for it  <-------  ends
"""

import fcntl
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
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO

from bench.harness import ROOT

REQUEST_BYTES = 128 << 10  # an environment, mostly
MAX_FILE = 4096  # descriptors above are nobody's
PASSED_FIRST = 3  # sd_listen_fds(3)
PASSED_MAX = 200  # to one service; the kernel takes 253 in a message
OF_THE_INTERPRETER = ("PYTHON", "NUMBA", "LD_", "OMP_", "MALLOC")  # variables that are read once, at its start


class Forked:
    """A daemon, with those of `subprocess.Popen`'s verbs that tests use."""

    stdin = None

    def __init__(self, pid: int, stdout: IO[bytes] | None, ended: int) -> None:
        """`ended`: where the exit status will come from."""
        self.pid = pid
        self.stdout = stdout
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
        output, output_end = os.pipe()
        forked = None
        try:
            forked = self._fork(_Request(list(arguments), dict(os.environ)), [output_end, log])
        finally:
            os.close(output_end)
            if forked is None:
                os.close(output)
        if forked is not None:
            forked.stdout = os.fdopen(output, "rb", buffering=0)
        return forked

    def fork_service(
        self, command: Sequence[str], environ: Mapping[str, str], log: int, passed: Sequence[int]
    ) -> Forked | None:
        """As `fork`, for a whole command line: it says all to `log`, and has what is passed at 3 and on.

        A script given by `-c` finds everything imported: what it changes must be looked up each time it is used.
        """
        plain, scripted = [sys.executable, "-m", "kvstored"], [sys.executable, "-c"]
        if of_the_interpreter(environ) != self._interpreter or len(passed) > PASSED_MAX:
            return None
        if command[:3] == plain:
            request = _Request(list(command[3:]), dict(environ))
        elif command[:2] == scripted:
            request = _Request(list(command[3:]), dict(environ), script=command[2])
        else:
            return None
        return self._fork(request, [log, log], passed)

    def _fork(self, wanted: "_Request", files: list[int], passed: Sequence[int] = ()) -> Forked | None:
        with self._asking:
            self._number += 1
            request = json.dumps([self._number, *astuple(wanted), str(Path.cwd())]).encode()
            if len(request) > REQUEST_BYTES:
                return None
            ended, ended_end = os.pipe()
            try:
                socket.send_fds(self._begin(), [request], [*files, ended_end, *passed])
                return Forked(self._reply(), None, ended)
            except BaseException:
                os.close(ended)
                raise
            finally:
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


@dataclass(frozen=True, slots=True)
class _Request:
    """What a daemon is told."""

    arguments: list[str]
    environ: dict[str, str]
    script: str = ""  # to be run in place of the command


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
    script: str
    folder: str
    files: list[int]  # standard output and error, where its exit status goes, and what is passed to it


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
                request, files, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 3 + PASSED_MAX)
                if not request:
                    sys.exit()
                number, arguments, environ, script, folder = json.loads(request)
                wanted = Wanted(number, arguments, environ, script, folder, files)
                pid = os.fork()
                if pid == 0:
                    return wanted
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, files[2]))
                for file in (*files[:2], *files[3:]):
                    os.close(file)
                channel.send(f"{wanted.number} {pid}".encode())


def _say_how_it_ended(pid: int, handle: int, ended: int) -> None:
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):  # nobody wants to know
        os.write(ended, str(os.waitstatus_to_exitcode(status)).encode())
    os.close(handle)
    os.close(ended)


def _become(wanted: Wanted) -> None:
    """A process as if it had been executed: nothing open but the standard files, and what is passed to it."""
    os.dup2(wanted.files[0], 1)
    os.dup2(wanted.files[1], 2)
    passed = wanted.files[3:]
    end = PASSED_FIRST + len(passed)
    out_of_the_way = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, end) for file in passed]
    for number, file in enumerate(out_of_the_way, PASSED_FIRST):
        os.dup2(file, number)
    os.closerange(end, MAX_FILE)
    os.environ.clear()
    os.environ.update(wanted.environ)
    if "LISTEN_FDS" in os.environ:
        os.environ["LISTEN_PID"] = str(os.getpid())
    if "WATCHDOG_USEC" in os.environ:
        os.environ["WATCHDOG_PID"] = str(os.getpid())
    os.chdir(wanted.folder)
    sys.argv = ["-c" if wanted.script else "kvstored", *wanted.arguments]
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
    if wanted.script:
        exec(compile(wanted.script, "<string>", "exec"), {"__name__": "__main__"})
        return 0
    from kvstored.entry import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
