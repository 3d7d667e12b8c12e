"""A process that holds descriptors while no daemon runs: `python -m kvstored.fd_keeper RUNTIME_DIR --patience 600`.

It maps nothing and imports nothing but the standard library. It detaches from whoever started it, which exits as soon
as the socket listens: 0 it does, 75 another keeper serves this directory, 1 anything else.

    RUNTIME_DIR/keep.sock: SEQPACKET, mode 0600, own uid only. One record a message, ASCII:

      daemon to keeper
        KEEP NAME  + 1 descriptor     hold it; the last one under a name replaces
        FORGET NAME
        CLEAR                         forget all
        PATIENCE SECONDS
        TAKE START                    asks for the names from number START on; nothing is given away
        QUIT                          forget all, and exit
      keeper to daemon
        HELD TOTAL START NAME...      answers TAKE, + a descriptor for each name, 253 at most (the kernel's limit)
        SERVED PID                    answers TAKE while that other daemon lives, and hangs up: two would write to one
                                      memory, whatever became of the lock of the directory
        REFUSED NAME                  no room: nothing is held under that name

      anything else: the connection is closed

    Of a process that is gone all that it said counts, in its order, and nothing is answered. One that said TAKE and
    then QUIT has lived without what is held here: nobody shall find that any more.

    A process that said one of these is a daemon until its pidfd says that it has exited. Without any:

                 a daemon speaks                    SIGTERM, QUIT, or no daemon for `patience`
      WAITING <-------------------> SERVED   ----------------------------------------------------> gone, all is closed
                 the last one exits
"""

import argparse
import array
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

SOCKET_NAME: Final = "keep.sock"
HELD_MAX: Final = 4096  # 1,024 arenas, a few tables, and room
FDS_PER_RECORD: Final = 253  # SCM_MAX_FD
RECORD_BYTES: Final = 1 << 17  # HELD with 253 names of 255 characters, and room
CONNECTIONS_MAX: Final = 16  # one daemon; whoever else shares our uid
DESCRIPTORS_APART: Final = 64  # stdio, epoll, sockets, pidfds
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,255}", re.ASCII)
EX_TEMPFAIL: Final = 75

_SO_PEERPIDFD: Final = 77  # Linux 6.5; Python has no name for it yet
_CREDENTIALS: Final = struct.Struct("iII")
_FD_BYTES: Final = array.array("i").itemsize
_PATIENCE_S_MAX: Final = 7 * 86_400.0


class BadRecordError(Exception):
    """A peer says what is not in the protocol."""


class StillServedError(Exception):
    """What a successor asks for is a living daemon's."""


class UnansweredError(Exception):
    """Who asks has hung up: it has nothing of ours, and having asked makes it no daemon."""


class AlreadyKeptError(Exception):
    """Another keeper answers under that name."""


def receive(connection: socket.socket, fds_max: int, *, wait: bool) -> tuple[bytes, list[int], bool]:
    """One record, its descriptors (the caller's now), and whether some got lost. Raises OSError, BlockingIOError."""
    flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
    record, ancillary, received_flags, _ = connection.recvmsg(
        RECORD_BYTES, socket.CMSG_SPACE(fds_max * _FD_BYTES), flags
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    return record, fds.tolist(), bool(received_flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC))


def send(connection: socket.socket, record: bytes, fds: list[int]) -> None:
    """One record with descriptors, without waiting. Raises OSError, BlockingIOError."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([record], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def credentials(connection: socket.socket) -> tuple[int, int]:
    """Pid and uid at the other end: of who connected, or of who listens. Raises OSError."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class Holder:
    """Names, descriptors, and the daemons that are alive. One thread."""

    def __init__(self, path: Path, listener: socket.socket, patience_s: float) -> None:
        self._path = path
        self._listener = listener
        self._inode = path.stat().st_ino
        self._patience_s = patience_s
        self._held: dict[str, int] = {}
        self._held_max = min(HELD_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - DESCRIPTORS_APART)
        self._connections: dict[int, tuple[socket.socket, int]] = {}  # by descriptor, with the pid
        self._daemons: dict[int, int] = {}  # pid, pidfd
        self._deadline = time.monotonic() + patience_s
        self._over = False
        self._epoll = select.epoll()
        self._epoll.register(listener, select.EPOLLIN)

    def serve(self) -> None:
        """Until told to quit, or nobody came."""
        while not self._over:
            wait_s = -1.0 if self._daemons else max(0.0, self._deadline - time.monotonic())
            events = self._epoll.poll(wait_s)
            for fd, _ in events:
                self._turn(fd)
            if not events and not self._daemons and time.monotonic() >= self._deadline:
                self._over = True
        self._leave()

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """A signal: raised out of `serve` at once."""
        self._leave()
        os._exit(0)

    def _turn(self, fd: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._connections:
            self._hear(fd)
        else:
            self._reap()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it hung up first
            return
        pid, uid = credentials(connection)
        if uid != os.geteuid() or len(self._connections) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._connections[connection.fileno()] = connection, pid
        self._epoll.register(connection, select.EPOLLIN)

    def _hear(self, fd: int) -> bool:
        """One record of a connection; False if there is none, or it was the last one."""
        connection, pid = self._connections[fd]
        try:
            record, fds, truncated = receive(connection, 2, wait=False)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it left an answer unread; what it said before is still there
            return self._hear(fd)
        except OSError:
            self._close(fd)
            return False
        try:
            self._obey(connection, record, fds, truncated=truncated)
        except (BadRecordError, StillServedError, OSError):  # also an answer that does not fit, because nobody reads
            self._close(fd)
            return False
        except UnansweredError:
            return True  # what it said after that counts too
        self._watch(connection, pid)
        return fd in self._connections

    def _obey(self, connection: socket.socket, record: bytes, fds: list[int], *, truncated: bool) -> None:
        """Do what a record says. Takes the descriptors.

        Raises BadRecordError, StillServedError, UnansweredError, OSError.
        """
        try:
            verb, _, rest = record.decode("ascii").partition(" ")
            if verb == "KEEP" and NAME.fullmatch(rest) and len(fds) + truncated == 1:
                if fds and not stat.S_ISREG(os.fstat(fds[0]).st_mode):
                    raise BadRecordError("only memory is kept")
                self._keep(connection, rest, fds.pop() if fds else None)
                return
        except UnicodeDecodeError:
            raise BadRecordError("not ASCII") from None
        finally:
            for fd in fds:
                os.close(fd)
        if fds or truncated:
            raise BadRecordError("descriptors that nobody asked for")
        if verb == "FORGET" and NAME.fullmatch(rest):
            self._forget(rest)
        elif verb == "CLEAR" and not rest:
            self._clear()
        elif verb == "PATIENCE":
            self._patience_s = patience_s(rest)
        elif verb == "TAKE" and re.fullmatch(r"[0-9]{1,4}", rest):
            self._give(connection, int(rest))
        elif verb == "QUIT" and not rest:
            self._clear()  # now: a successor may be asking in this very moment
            self._over = True
        else:
            raise BadRecordError(f"verb {verb!r}")

    def _keep(self, connection: socket.socket, name: str, fd: int | None) -> None:
        self._forget(name)
        if fd is not None and len(self._held) < self._held_max:
            self._held[name] = fd
            return
        if fd is not None:
            os.close(fd)
        with suppress(UnansweredError):
            self._answer(connection, f"REFUSED {name}", [])

    def _forget(self, name: str) -> None:
        fd = self._held.pop(name, None)
        if fd is not None:
            os.close(fd)

    def _clear(self) -> None:
        for name in list(self._held):
            self._forget(name)

    def _give(self, connection: socket.socket, start: int) -> None:
        """Answer TAKE. What a predecessor said before it died may still lie unread: it counts first.

        A dead one is not answered, so that hearing one dead asker never leads to hearing another on the way.

        Raises StillServedError, UnansweredError, OSError.
        """
        self._reap()
        _, asking = self._connections[connection.fileno()]
        for pid in self._daemons.keys() - {asking}:
            with suppress(UnansweredError):
                self._answer(connection, f"SERVED {pid}", [])
            raise StillServedError(f"process {pid} lives")
        if _is_ready(connection.fileno(), select.POLLHUP):
            raise UnansweredError
        for fd, (other, _) in list(self._connections.items()):
            if other is not connection:
                while fd in self._connections and self._hear_dead(fd):
                    pass
        names = list(self._held)[start : start + FDS_PER_RECORD]
        record = " ".join(["HELD", str(len(self._held)), str(start), *names])
        self._answer(connection, record, [self._held[name] for name in names])

    def _answer(self, connection: socket.socket, record: str, fds: list[int]) -> None:
        """Raises UnansweredError if nobody is there any more, OSError."""
        try:
            send(connection, record.encode(), fds)
        except (BrokenPipeError, ConnectionResetError):
            raise UnansweredError from None

    def _hear_dead(self, fd: int) -> bool:
        """One more record of a connection whose other end is closed; False if there is none."""
        return _is_ready(fd, select.POLLHUP) and self._hear(fd)

    def _watch(self, connection: socket.socket, pid: int) -> None:
        """That process is a daemon: know when it exits."""
        if pid in self._daemons or connection.fileno() < 0:
            return
        try:
            number = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, _FD_BYTES)
            pidfd = int.from_bytes(number, sys.byteorder)
        except OSError:  # older kernel, or gone
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:  # gone, and only its last words were left
                return
        self._daemons[pid] = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)

    def _reap(self) -> None:
        """Daemons that have exited are none any more."""
        watched = len(self._daemons)
        for pid, pidfd in list(self._daemons.items()):
            if _is_ready(pidfd, select.POLLIN):
                del self._daemons[pid]
                os.close(pidfd)  # which takes it out of the epoll
        if watched and not self._daemons:
            self._deadline = time.monotonic() + self._patience_s

    def _close(self, fd: int) -> None:
        """Once, however often it is asked for: a keeper that fails takes all memory along."""
        connection, _ = self._connections.pop(fd, (None, 0))
        if connection is not None:
            connection.close()

    def _leave(self) -> None:
        """The name first: whoever connects from now on finds nobody, and never a keeper that is about to let go."""
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except OSError:
            pass  # gone already, with its folder
        self._listener.close()
        for connection, _ in self._connections.values():
            connection.close()
        self._clear()


def _is_ready(fd: int, event: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & event for _, events in poll.poll(0))


def listen(path: Path) -> socket.socket:
    """The socket, in place of one that nobody answers any more. Raises AlreadyKeptError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
        except BlockingIOError:
            raise AlreadyKeptError(f"the keeper of {path} is busy") from None
        else:
            raise AlreadyKeptError(f"{path} is answered")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.umask(0o177)
    listener.bind(str(path))
    listener.listen(CONNECTIONS_MAX)
    listener.setblocking(False)
    return listener


def patience_s(text: str) -> float:
    """A number of seconds. Raises BadRecordError."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,9})?", text) or not 0 < float(text) <= _PATIENCE_S_MAX:
        raise BadRecordError(f"patience {text[:20]!r}")
    return float(text)


def detach(ready_fd: int) -> None:
    """Nothing of who started us is left but `ready_fd`: session, folder, stdio, descriptors."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, ready_fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.closerange(ready_fd + 1, min(soft, 1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """The process that was started: returns when the one it leaves behind listens."""
    parser = argparse.ArgumentParser(prog="python -m kvstored.fd_keeper", description="Hold descriptors for kvstored.")
    parser.add_argument("runtime_dir", type=Path)
    parser.add_argument("--patience", default="600", metavar="SECONDS")
    options = parser.parse_args()
    try:
        seconds = patience_s(options.patience)
    except BadRecordError:
        parser.error("--patience takes a number of seconds, up to a week")
    path = options.runtime_dir.absolute() / SOCKET_NAME
    heard, told = os.pipe()
    if os.fork():
        os.close(told)
        answer = os.read(heard, 1)
        return answer[0] if answer else 1
    os._exit(_hold(path, seconds, told))


def _hold(path: Path, seconds: float, told: int) -> int:
    """The process that is left behind."""
    code = 1
    try:
        detach(told)
        holder = Holder(path, listen(path), seconds)
        signal.signal(signal.SIGTERM, holder.stop)
        code = 0
    except AlreadyKeptError:
        code = EX_TEMPFAIL
    finally:
        os.write(told, bytes([code]))
        os.close(told)
    if code == 0:
        holder.serve()
    return code


if __name__ == "__main__":
    sys.exit(main())
