"""One connected hot socket: messages with descriptors in, messages out, nothing that blocks past a deadline."""

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from kvclient.calls import HelloCall
from kvclient.paths import HOT_SOCKET
from kvclient.protocol import Session
from kvproto.frames import Hello
from kvproto.limits import FRAME_BYTES

FDS_PER_MESSAGE: Final = 253  # the kernel's limit
SLICE_NS: Final = 20 * 10**6  # how long one recvmsg may sleep in the kernel; a deadline nearer than that is polled for
POLL_NS_MAX: Final = 10**9  # poll takes 32 bits of milliseconds

_FDS_SPACE: Final = socket.CMSG_SPACE(4 * FDS_PER_MESSAGE)
_TIMEVAL: Final = struct.pack("@ll", 0, SLICE_NS // 1000)
_PEER: Final = struct.Struct("@3i")  # pid, uid, gid
_PATH_BYTES_MAX: Final = 107  # of a socket's address


class GoneError(Exception):
    """The connection is over, and why."""


class HotSocket(socket.socket):
    """Closed when its last user lets go of it and not before.

    So no thread can read from a number that has meanwhile been given to another file, and nobody has to know who is
    last. `Link.shut` is what ends the connection.
    """

    def __del__(self) -> None:
        self.close()


class Link:
    """A socket and the session on it."""

    def __init__(self, sock: HotSocket, session: Session) -> None:
        self.sock = sock
        self.session = session
        self.backlog: list[bytes] = []  # chores that found the socket full
        self.since_ns = time.monotonic_ns()

    def shut(self) -> None:
        """End the connection now: readers wake up, the daemon sees the end. Any thread."""
        with contextlib.suppress(OSError):  # the other side was first
            self.sock.shutdown(socket.SHUT_RDWR)

    def send(self, frame: bytes, deadline_ns: int, fds: Sequence[int] = ()) -> None:
        """Send one message, waiting for room until the deadline. Raises GoneError. Any thread."""
        while not self.try_send(frame, fds):
            if time.monotonic_ns() >= deadline_ns:
                raise GoneError("the daemon does not read its socket")
            self._ready(select.POLLOUT, deadline_ns)

    def try_send(self, frame: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one message if there is room for it. Raises GoneError. Any thread."""
        try:
            if fds:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                self.sock.sendmsg([frame], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                self.sock.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            raise GoneError(f"the daemon went away ({os.strerror(error.errno or 0)})") from error
        return True

    def receive(self, deadline_ns: int) -> tuple[bytes, Sequence[int]] | None:
        """The next message and its descriptors, which the caller closes; None if none came by the deadline.

        Raises GoneError. One thread at a time. May come back with nothing before the deadline.
        """
        if deadline_ns - time.monotonic_ns() < SLICE_NS and not self._ready(select.POLLIN, deadline_ns):
            return None
        return self.try_receive(0)

    def try_receive(self, flags: int = socket.MSG_DONTWAIT) -> tuple[bytes, Sequence[int]] | None:
        """As `receive`, without waiting (or, with no flags, for `SLICE_NS`)."""
        try:
            frame, ancillary, flags, _ = self.sock.recvmsg(FRAME_BYTES, _FDS_SPACE, flags | socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise GoneError(f"the daemon went away ({os.strerror(error.errno or 0)})") from error
        fds = _descriptors(ancillary) if ancillary else ()
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            close_all(fds)
            raise GoneError("a message was cut short: too long, or this process has no descriptors left")
        if not frame:
            close_all(fds)
            raise GoneError("the daemon closed the connection")
        return frame, fds

    def peer_pid(self) -> int:
        """The daemon's process id as this process sees it."""
        pid: int = _PEER.unpack(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]
        return pid

    def _ready(self, event: int, deadline_ns: int) -> bool:
        poll = select.poll()
        poll.register(self.sock, event)
        left_ns = min(deadline_ns - time.monotonic_ns(), POLL_NS_MAX)
        return left_ns > 0 and bool(poll.poll(-(-left_ns // 10**6)))


def dial(directory: Path) -> HotSocket:
    """A socket connected to the daemon's. Raises GoneError; never waits (a full backlog counts as no daemon)."""
    sock = HotSocket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        _connect(sock, directory)
        sock.setblocking(True)
        # A timeout in the kernel instead of Python's own: that would poll before every receive.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
    except OSError as error:
        sock.close()
        raise GoneError(_why_not(error, directory)) from error
    return sock


def _connect(sock: socket.socket, directory: Path) -> None:
    path = directory / HOT_SOCKET
    if len(os.fsencode(path)) <= _PATH_BYTES_MAX:
        sock.connect(str(path))
        return
    # A socket's address is short, a path need not be: go through the directory's descriptor.
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{fd}/{HOT_SOCKET}")
    finally:
        os.close(fd)


def _why_not(error: OSError, directory: Path) -> str:
    path = directory / HOT_SOCKET
    if error.errno == errno.ENOENT:
        return f"no daemon: {path} does not exist"
    if error.errno == errno.ECONNREFUSED:
        return f"no daemon: nobody listens at {path}"
    if error.errno == errno.EACCES:
        return f"no permission for {path}"
    return f"cannot connect to {path}: {error.strerror or error}"


def greet(link: Link, hello: Hello, deadline_ns: int) -> None:
    """HELLO, and wait for WELCOME. Raises GoneError or KvError. Before any other thread knows of the link."""
    session = link.session
    call = HelloCall(session, hello, deadline_ns)
    link.send(session.submit(call, time.monotonic_ns()), deadline_ns)
    while not call.done:
        message = link.receive(deadline_ns)
        if message is not None:
            take(link, *message)
        elif time.monotonic_ns() >= deadline_ns:
            raise GoneError("the daemon does not answer HELLO")
    if call.error is not None:
        raise type(call.error)(*call.error.args)  # not the same object: its traceback would hold the call, a cycle


def take(link: Link, frame: bytes, fds: Sequence[int]) -> None:
    """Hand a message to the session. Raises GoneError or KvError: the session must end. Guarded like the session."""
    try:
        if not link.session.over:
            link.session.receive(frame, fds, time.monotonic_ns())
    except OSError as error:
        raise GoneError(f"cannot map what the daemon sent: {error}") from error
    finally:
        close_all(fds)  # a map needs its descriptor no longer


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> Sequence[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that came with a message."""
    for fd in fds:
        os.close(fd)
