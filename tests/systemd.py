"""A service manager for one service, without systemd: readiness, watchdog, a socket unit, and the descriptor store.

Like systemd it passes the socket of `listen` to every life of the service, beside what is stored, and goes on
listening when there is none. It believes the main process only (NotifyAccess=main), keeps what was stored until the
service is removed, stores one and the same file once, adds under a name that is there already, and handles what a
process said before it died before it starts the next one.
"""

import array
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, ClassVar, Self

from bench.process import Process
from tests.prepared import Prepared

STOP_S = 10.0
# Puts the passed descriptors at 3 and on, says for which process they are, and becomes the service.
SHIM = """
import fcntl, os, sys
count, *rest = sys.argv[1:]
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 3 + int(count)) for fd in rest[:int(count)]]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number)
if fds:
    os.environ["LISTEN_PID"] = str(os.getpid())
if "WATCHDOG_USEC" in os.environ:
    os.environ["WATCHDOG_PID"] = str(os.getpid())
os.closerange(3 + int(count), 65536)
command = rest[int(count):]
os.execvp(command[0], command)
"""
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True, slots=True)
class Stored:
    """One descriptor in the store."""

    name: str
    fd: int
    polled: bool  # systemd would drop it on a hang-up


class ServiceManager:
    """Runs `command`; `start` again after it died hands over what it stored. A context manager that kills it.

    `fds_max` is FileDescriptorStoreMax=; `announce` is whether FDSTORE is set, as systemd does since 254.
    """

    starter: ClassVar[Prepared | None] = None  # of tests: a quicker start of the very same

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        runtime_dir: Path,
        *,
        fds_max: int = 4096,
        announce: bool = True,
        abstract: bool = False,
        log_file: Path | None = None,
        watchdog_s: float = 0.0,
    ) -> None:
        self.command = list(command)
        self.environ = dict(environ)
        self.fds_max = fds_max
        self.announce = announce
        self.stored: list[Stored] = []
        self.said: list[str] = []  # whatever the service said that is no matter of descriptors
        self.refused = 0  # stores beyond fds_max, and messages of strangers
        self.process: Process | None = None
        self.sockets: list[tuple[str, socket.socket | BinaryIO]] = []  # of socket units, with FileDescriptorName=
        self._watchdog_s = watchdog_s
        self._log_file = log_file
        self._changed = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        if abstract:
            self.address = f"@kvstored-test-{secrets.token_hex(8)}"
        else:
            self.address = str(runtime_dir / f"notify-{secrets.token_hex(4)}")
        self._bound = "\0" + self.address[1:] if abstract else self.address
        self._socket.bind(self._bound)
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    @property
    def fds(self) -> dict[str, int]:
        """What is stored, by name; the last one under a name."""
        with self._changed:
            return {stored.name: stored.fd for stored in self.stored}

    def listen(self, path: Path, name: str = "hot") -> socket.socket:
        """As a socket unit does, from now on: ListenSequentialPacket=, FileDescriptorName=."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.parent.mkdir(parents=True, exist_ok=True)
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(4096)
        self.sockets.append((name, listener))
        return listener

    def start(self) -> None:
        """Start the service with all that is stored, and the sockets."""
        assert self.process is None or self.process.poll() is not None
        with self._changed:
            stored = list(self.stored)
            self.said.clear()
        environ = self.environ | {"NOTIFY_SOCKET": self.address}
        if self.announce and self.fds_max:
            environ["FDSTORE"] = str(self.fds_max)
        if self._watchdog_s:
            environ["WATCHDOG_USEC"] = str(round(self._watchdog_s * 1e6))
        passed = [(name, one.fileno()) for name, one in self.sockets] + [(one.name, one.fd) for one in stored]
        if passed:
            environ |= {"LISTEN_FDS": str(len(passed)), "LISTEN_FDNAMES": ":".join(name for name, _ in passed)}
        numbers = [fd for _, fd in passed]
        # Under the lock: no message of the new process is read before its pid is known.
        with (self._log_file or Path(os.devnull)).open("ab") as log, self._changed:
            self.process = self._fork(environ, log, numbers) or self._execute(environ, log, numbers)

    def _fork(self, environ: Mapping[str, str], log: BinaryIO, passed: Sequence[int]) -> Process | None:
        if self.starter is None:
            return None
        return self.starter.fork_service(self.command, environ, log.fileno(), passed)

    def _execute(self, environ: Mapping[str, str], log: BinaryIO, passed: Sequence[int]) -> Process:
        shim = [sys.executable, "-S", "-c", SHIM, str(len(passed)), *map(str, passed), *self.command]
        return subprocess.Popen(shim, env=environ, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_ready(self, deadline_s: float = 60.0) -> None:
        """Until the service says READY=1. Raises RuntimeError if it dies or takes longer."""
        self.wait_said("READY=1", deadline_s)

    def wait_said(self, line: str, deadline_s: float = 60.0) -> None:
        """Until the service has said that line since its start."""
        assert self.process is not None
        deadline = time.monotonic() + deadline_s
        with self._changed:
            while line not in self.said:
                self._changed.wait(0.05)
                if time.monotonic() > deadline or (self.process.poll() is not None and line not in self.said):
                    log = self._log_file.read_text()[-2000:] if self._log_file else ""
                    raise RuntimeError(f"exit code {self.process.poll()}, said {self.said}\n{log}")

    def count(self, line: str) -> int:
        """How often the service has said that line since its start."""
        with self._changed:
            return self.said.count(line)

    def watch(self) -> None:
        """What WatchdogSec= does: wait until the service is silent for so long, and abort it, until it is gone."""
        assert self.process is not None
        with self._changed:
            while self._changed.wait_for(lambda: "WATCHDOG=1" in self.said, self._watchdog_s):
                self.said.remove("WATCHDOG=1")
        self.process.send_signal(signal.SIGABRT)
        self.process.wait(STOP_S)
        self._catch_up()

    def wait_count(self, line: str, count: int, deadline_s: float = 60.0) -> None:
        """Until it has said it so often. Raises RuntimeError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.said.count(line) >= count, deadline_s):
                raise RuntimeError(f"said {self.said}")

    def kill(self) -> None:
        """`kill -9`, until it is gone and all that it said is heard. Any number of times."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._catch_up()

    def stop(self) -> int:
        """Ask it to stop; its exit code. The store stays."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(STOP_S)
        self._catch_up()
        return code

    def forget(self) -> None:
        """What a stop does without FileDescriptorStorePreserve=: the store is empty."""
        with self._changed:
            _close([one.fd for one in self.stored])
            self.stored.clear()

    def restart(self) -> None:
        """What Restart=always does after a crash."""
        self.kill()
        self.start()

    def close(self) -> None:
        """Kill the service and forget its store."""
        self.kill()
        self._tell_self(b"END")
        self._thread.join(STOP_S)
        self._socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink()
        for stored in self.stored:
            os.close(stored.fd)
        self.stored.clear()
        for _, listener in self.sockets:
            listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _catch_up(self) -> None:
        """Wait until all that was sent up to now is handled."""
        token = secrets.token_hex(8)
        self._tell_self(f"TOKEN={token}".encode())
        with self._changed:
            assert self._changed.wait_for(lambda: f"TOKEN={token}" in self.said, STOP_S)
            self.said.remove(f"TOKEN={token}")

    def _tell_self(self, text: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(text, self._bound)

    # -- its thread ----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        while True:
            text, ancillary, _, _ = self._socket.recvmsg(65536, 8192, socket.MSG_CMSG_CLOEXEC)
            fds = array.array("i")
            pid = 0
            for _, kind, content in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(content)
                else:
                    pid, _, _ = _CREDENTIALS.unpack(content)
            if text == b"END":
                return
            with self._changed:
                self._handle(text.decode().splitlines(), fds.tolist(), pid)
                self._changed.notify_all()

    def _handle(self, lines: list[str], fds: list[int], pid: int) -> None:
        main = self.process.pid if self.process is not None else -1
        if pid not in {main, os.getpid()}:
            self.refused += 1
            _close(fds)
            return
        fields = dict(line.partition("=")[::2] for line in lines)
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            for fd in fds:
                self._store(Stored(name, fd, fields.get("FDPOLL") != "0"))
        elif fields.get("FDSTOREREMOVE") == "1":
            _close([one.fd for one in self.stored if one.name == name])
            self.stored = [one for one in self.stored if one.name != name]
            _close(fds)
        else:
            self.said += lines
            _close(fds)

    def _store(self, new: Stored) -> None:
        if any(os.path.sameopenfile(new.fd, one.fd) for one in self.stored):
            os.close(new.fd)
        elif len(self.stored) >= self.fds_max:
            self.refused += 1
            os.close(new.fd)
        else:
            self.stored.append(new)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
