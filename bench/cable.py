"""A TCP cable between a host and what lies beyond it, which can be pulled and plugged in again.

While it is cut nothing arrives on either side, and nobody is told so: what was under way hangs, as do new connections,
like with a network that has gone away.
"""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

PIECE_BYTES = 1 << 18
BACKLOG = 64


class Cable:
    """From a port of its own, on loopback, to another one. A context manager; any thread may `cut` and `mend` it."""

    def __init__(self, port: int) -> None:
        """`port`: where it leads."""
        self._to = port
        self._flows = threading.Event()
        self._flows.set()
        self._ended = False
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="cable", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Nothing passes any more."""
        self._flows.clear()

    def mend(self) -> None:
        """It passes again, and so does what has waited."""
        self._flows.set()

    def close(self) -> None:
        """Every connection is over."""
        self._ended = True
        self._flows.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._open:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _accept(self) -> None:
        while not self._ended:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._flows.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), name="cable-flow", daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                self._flows.wait()
                target.sendall(piece)
        for one in (source, target):  # the other direction ends, too
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with self._lock:
            done = source in self._open
            self._open.discard(source)
        if done:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
