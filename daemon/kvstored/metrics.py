"""Metrics and health for programs that watch: /metrics, /healthz, /readyz. A thread of its own.

    once a second:  metrics thread --question--> owner thread: copies its counters (metrics_snapshot.py), 0.1 ms
                    folds durations  <--snapshot--            and how long the question waited is a metric, too
    at a scrape:    the latest snapshot, made into text once however many ask for it; the owner hears nothing of it

A scrape is up to a second old, and says of when it is. Where the owner stands still, scrapes go on showing what was,
and health says so.
"""

import asyncio
import errno
import logging
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvproto.limits import PROTOCOL_VERSION
from kvstored import __version__
from kvstored.http_address import Address, TcpAddress
from kvstored.http_server import HttpServer, Page
from kvstored.loop import Loop
from kvstored.metrics_snapshot import Snapshot
from kvstored.metrics_table import TIERS, Facts
from kvstored.metrics_timing import Timings

if TYPE_CHECKING:
    from kvstored.metrics_render import Exposition

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
HUNG_S: Final = 10.0  # an owner that says nothing for so long is not well
BACKLOG: Final = 16
STOP_S: Final = 5.0
SOCKET_MODE: Final = 0o660  # whoever shares the daemon's group may watch


class Metrics:
    """`start`, `look_around` and `stop` are the owner's."""

    def __init__(self, address: Address, loop: Loop, take: Callable[[], Snapshot], serving: Callable[[], bool]) -> None:
        """`take` is called on the owner thread, `serving` on any. Raises OSError if nobody can listen there."""
        self.timings = Timings()
        self._loop = loop
        self._take = take
        self._serving = serving
        self._listener, self.address = _listen(address)
        self._inode = _inode(self.address)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._began = threading.Event()
        self._complained = False  # owner thread's
        # Metrics thread's:
        self._events: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()
        self._asked_s = 0.0  # since when the owner owes an answer; 0: it owes none
        self._snapshot: Snapshot | None = None
        self._load_s: dict[tuple[str, str], float] = {}  # by tenant and tier
        self._exposition: Exposition | None = None
        self._text = b""  # what the latest snapshot says, once somebody has asked

    # -- owner thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()
        log.info("metrics: listening on %s", self.address)

    def look_around(self) -> None:
        """Once a second: durations that nobody folds do not pile up."""
        for timing in self.timings.all():
            timing.bound()

    def stop(self) -> None:
        """Answer no more."""
        if self._thread.ident is not None:
            self._began.wait(STOP_S)
            self._tell(self._ending.set)
            self._thread.join(STOP_S)
        self._listener.close()
        if isinstance(self.address, Path) and self._inode and self._inode == _inode(self.address):
            self.address.unlink()

    def _answer(self, asked_ns: int) -> None:
        """The owner has come to our question."""
        self.timings.lag.note(time.monotonic_ns() - asked_ns)
        snapshot = None
        try:
            snapshot = self._take()
        except Exception:  # the daemon serves on, whatever is wrong with its figures
            if not self._complained:
                log.exception("metrics cannot be taken (said once)")
            self._complained = True
        self._tell(lambda: self._hear(snapshot))

    def _tell(self, what: Callable[[], object]) -> None:
        """Have the metrics thread do something. Any thread."""
        events = self._events
        if events is not None:
            with suppress(RuntimeError):  # it has ended
                events.call_soon_threadsafe(what)

    # -- metrics thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self._events = None
            self._began.set()

    async def _serve(self) -> None:
        self._events = asyncio.get_running_loop()
        self._began.set()
        pages = {"/metrics": self._metrics, "/healthz": self._healthz, "/readyz": self._readyz}
        listening = await HttpServer(pages).listen(self._listener)
        ticking = asyncio.create_task(self._tick())
        try:
            await self._ending.wait()
        finally:
            ticking.cancel()
            listening.close()

    async def _tick(self) -> None:
        """Ask the owner once a second, unless it owes an answer."""
        while True:
            if not self._asked_s:
                self._asked_s = time.monotonic()
                self._loop.call(partial(self._answer, time.monotonic_ns()))
            for timing in self.timings.all():
                timing.fold()
            await asyncio.sleep(EVERY_S)

    def _hear(self, snapshot: Snapshot | None) -> None:
        """The owner's answer. None: it has none."""
        self._asked_s = 0.0
        if snapshot is None:
            return
        former = {one.name: one.hit_bytes for one in self._snapshot.tenants} if self._snapshot else {}
        for one in snapshot.tenants:
            before = former.get(one.name, (0, 0))
            for tier, now_bytes, then_bytes, byte_s in zip(TIERS, one.hit_bytes, before, one.byte_s, strict=True):
                spent_s = (now_bytes - then_bytes) * (byte_s or 0.0)
                if spent_s:  # nothing of tenants that only come and go
                    self._load_s[one.name, tier] = self._load_s.get((one.name, tier), 0.0) + spent_s
        self._snapshot, self._text = snapshot, b""

    # -- pages ---------------------------------------------------------------------------------------------------

    def _metrics(self) -> Page:
        # Here, since it takes 0.1 s that a start need not wait for.
        from kvstored.metrics_render import CONTENT_TYPE, Exposition  # noqa: PLC0415

        if self._snapshot is None:
            return _said(HTTPStatus.SERVICE_UNAVAILABLE, "no figures yet")
        if not self._text:
            facts = Facts(self._snapshot, self._load_s, self._serving(), __version__, PROTOCOL_VERSION)
            self._exposition = self._exposition or Exposition(facts, self.timings)
            self._exposition.facts = facts
            self._text = self._exposition.render()
        return Page(HTTPStatus.OK, self._text, CONTENT_TYPE)

    def _healthz(self) -> Page:
        waits_s = time.monotonic() - self._asked_s if self._asked_s else 0.0
        if waits_s > HUNG_S:
            return _said(HTTPStatus.SERVICE_UNAVAILABLE, f"the owner thread has not answered for {waits_s:.0f} s")
        return _said(HTTPStatus.OK, "ok")

    def _readyz(self) -> Page:
        health = self._healthz()
        if health.status is not HTTPStatus.OK:
            return health
        if not self._serving():
            return _said(HTTPStatus.SERVICE_UNAVAILABLE, "draining or stopping: no new blocks are taken")
        return health


def _said(status: HTTPStatus, text: str) -> Page:
    return Page(status, f"{text}\n".encode())


def _listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and where it is: port 0 has become one that was free. Raises OSError."""
    if isinstance(address, TcpAddress):
        listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    else:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if isinstance(address, TcpAddress):
            listener.bind((address.host, address.port))
            address = replace(address, port=listener.getsockname()[1])
        else:
            _appear(listener, address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"metrics cannot listen on {address}: {error.strerror}") from None
    return listener, address


def _appear(listener: socket.socket, path: Path) -> None:
    """Bind where nobody else can look, narrow the mode, then take the name; what a dead daemon left gives way."""
    if path.exists() and not path.is_socket():
        raise FileExistsError(errno.EEXIST, "it is there, and no socket", str(path))
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other,
        suppress(FileNotFoundError, ConnectionRefusedError),
    ):
        other.connect(str(path))
        raise OSError(errno.EADDRINUSE, "somebody else listens there")
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as private:  # mode 0700
        hidden = Path(private) / "s"
        listener.bind(str(hidden))
        hidden.chmod(SOCKET_MODE)
        hidden.rename(path)


def _inode(address: Address) -> int:
    return address.stat().st_ino if isinstance(address, Path) and address.exists() else 0
