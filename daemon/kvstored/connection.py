"""One connected client: its socket, ring, pidfd, and the frames that wait to be sent. Owner thread."""

import array
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kvproto.errors import Code
from kvproto.frames import Verb, build_failure
from kvproto.limits import OUTBOX_FRAMES
from kvstore.sessions import Session
from kvstored.descriptors import closing
from kvstored.peer import Peer
from kvstored.regions import Region

Frame = bytes | bytearray | memoryview
FDS_PER_FRAME = 253  # the kernel's limit
_FDS_SPACE = socket.CMSG_SPACE(4 * FDS_PER_FRAME)


class SlowReaderError(Exception):
    """A client leaves its frames unread."""


class Connection:
    """What the hot server knows of one client."""

    __slots__ = (
        "socket", "peer", "session", "ring", "ring_wanted", "name", "role", "mode", "requests", "connected_ns",
        "goaway", "fds", "receives", "_outbox",
    )  # fmt: skip

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.peer = peer
        self.session: Session | None = None
        self.ring: Region | None = None
        self.ring_wanted = False
        self.name = ""
        self.role = ""
        self.mode = ""
        self.requests = 0
        self.connected_ns = time.monotonic_ns()
        self.goaway: Code | None = None
        self.fds: list[int] = []  # that came with the frame being handled; who wants them takes them
        self.receives = False  # descriptors may come with frames
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()

    @property
    def waiting(self) -> bool:
        """Are there frames that the client has not made room for?"""
        return bool(self._outbox)

    def send(self, frame: Frame, fds: Sequence[int] = ()) -> None:
        """Send now, or keep the frame until the client reads. `fds` are closed once sent.

        Raises SlowReaderError when too many wait, OSError when the client is gone.
        """
        if not self._outbox and self._try(frame, fds):
            return
        if len(self._outbox) >= OUTBOX_FRAMES:
            _close(fds)
            raise SlowReaderError
        self._outbox.append((bytes(frame), fds))

    def flush(self) -> None:
        """Send what waits, as far as the client has made room. Raises OSError when it is gone."""
        while self._outbox:
            frame, fds = self._outbox.popleft()
            if not self._try(frame, fds):
                self._outbox.appendleft((frame, fds))
                return

    def _try(self, frame: Frame, fds: Sequence[int]) -> bool:
        try:
            if fds:
                rights = array.array("i", fds)
                self.socket.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                self.socket.send(frame)
        except BlockingIOError:
            return False
        except OSError:
            _close(fds)
            raise
        _close(fds)
        return True

    def receive_with_descriptors(self, into: memoryview) -> int:
        """The next frame's length, and in `fds` what came with it. Raises OSError, BlockingIOError without a frame."""
        frame_bytes, ancillary, _, _ = self.socket.recvmsg_into(
            [into], _FDS_SPACE, socket.MSG_TRUNC | socket.MSG_CMSG_CLOEXEC
        )
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        self.fds = fds.tolist()
        return frame_bytes

    @property
    def left(self) -> bool:
        """Has the client hung up? It may have left frames that are not read yet."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close_descriptors(self) -> None:
        """Those that nobody took."""
        if self.fds:
            closing.put(self.fds)
            self.fds = []

    def say_goodbye(self, code: Code, text: str) -> None:
        """GOAWAY, if the client still listens."""
        self.goaway = code
        with suppress(OSError):  # it will see the end of file instead
            self.socket.send(build_failure(Verb.GOAWAY, 0, code, text))

    def close(self) -> None:
        """Close the socket. The pidfd and the ring outlive it."""
        for _, fds in self._outbox:
            _close(fds)
        self._outbox.clear()
        self.socket.close()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
