"""Who is connected, and who was and may still map arenas: sockets that come and go, processes that end. Owner thread.

    connect --> limits --> watched: frames go to `hot.py` --> closed, by whomever: tickets end
                                                              --> leases and arenas end, or the process: forgotten

What a closed session still maps outlives its socket; the pidfd tells when the process is gone, and all its maps.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from kvproto import frames
from kvproto.errors import Code, RefusedError
from kvproto.frames import Verb
from kvproto.limits import LINGERING_PER_UID, SESSIONS, SESSIONS_KEPT, SESSIONS_KEPT_CONFIGURED, SESSIONS_PER_UID
from kvstore.sessions import Session
from kvstore.store import Store
from kvstored.connection import Connection
from kvstored.descriptors import let_through
from kvstored.loop import READABLE, Loop
from kvstored.memory import HostMemory
from kvstored.peer import Peer, peer_of
from kvstored.processes import identity_of
from kvstored.service import listen

log = logging.getLogger(__name__)

HELLO_NS = 5 * 10**9  # a connection that has not said HELLO by then is closed
STALE_NS = 130 * 10**9  # twice the longest lease: who still maps a given-up arena then is told to go


class Clients:
    """All connections, and the records of those that are closed."""

    def __init__(self, loop: Loop, memory: HostMemory, on_ready: Callable[[Connection, int], None]) -> None:
        """`on_ready(connection, events)` is called for each socket that has something, or room for something."""
        self._loop = loop
        self._memory = memory
        self._on_ready = on_ready
        self.store: Store  # set once by the daemon: store and server know each other
        self.uids: tuple[tuple[int, ...], ...] = ()  # of each configured tenant: there are places for them
        self.connections: dict[int, Connection] = {}  # by socket descriptor
        self.by_session: dict[Session, Connection] = {}
        self.came: Callable[[Connection], None] = _nobody_hears  # `Chronicle`, of sessions that begin and end
        self.went: Callable[[Connection, str], None] = _nobody_hears
        self.parting: Callable[[Session], None] = _nobody_hears  # `DeviceVerbs`, before a session's tickets end
        self._elders: dict[int, Connection] = {}  # by process: its closed session that stands for all of them
        self._listener: socket.socket | None = None
        self._outlives_us = False  # the listener: it is the service manager's
        self._deaf = False  # not listening until the next look around

    # -- they come -----------------------------------------------------------------------------------------------

    def listen(self, path: Path, passed: socket.socket | None = None) -> None:
        """Serve. Who may connect is up to the directory; who a client is, up to its uid.

        `passed`: a socket that listens there already, and goes on doing so for a successor.
        """
        self._listener, self._outlives_us = listen(path, passed), passed is not None
        let_through(self._listener, wanted=False)
        self._loop.watch(self._listener.fileno(), READABLE, self._on_connect)

    def _on_connect(self, _events: int) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except BlockingIOError:  # gone again
            return
        except OSError as error:
            # Out of descriptors, most likely, and the listener stays readable: look again in a second.
            log.warning("accept failed: %s", error)
            self._loop.unwatch(self._listener.fileno())
            self._deaf = True
            return
        try:
            peer = peer_of(accepted)
        except (RefusedError, OSError) as error:
            _refuse(accepted, str(error))
            return
        refusal = self._over_limits(peer)
        if refusal:
            os.close(peer.pidfd)
            _refuse(accepted, refusal)
            return
        connection = Connection(accepted, peer)
        connection.receives = not let_through(accepted, wanted=False)
        self.connections[accepted.fileno()] = connection
        self._loop.watch(accepted.fileno(), READABLE, partial(self._on_ready, connection))
        self._loop.watch(peer.pidfd, READABLE, lambda _events: self._on_exit(connection))

    def _over_limits(self, peer: Peer) -> str:
        if len(self.connections) >= SESSIONS:
            return f"{SESSIONS} sessions are open already"
        by_uid = Counter(other.peer.uid for other in self.connections.values())
        if by_uid[peer.uid] >= SESSIONS_PER_UID:
            return f"uid {peer.uid} has {SESSIONS_PER_UID} sessions open already"
        kept = self._kept_from(peer.uid, by_uid)
        if len(self.connections) + kept >= SESSIONS:
            return f"{len(self.connections)} sessions are open already, and {kept} of {SESSIONS} are kept for others"
        lingering = sum(
            not session.attached for session, other in self.by_session.items() if other.peer.uid == peer.uid
        )
        if lingering >= LINGERING_PER_UID:
            return f"{LINGERING_PER_UID} closed sessions of uid {peer.uid} still hold leases or map arenas"
        return ""

    def _kept_from(self, uid: int, by_uid: Counter[int]) -> int:
        """How many of the last places are for others: for users without any, and for configured tenants."""
        each = max(1, SESSIONS_KEPT_CONFIGURED // max(1, len(self.uids)))
        lacking = [(uids, max(0, each - sum(by_uid[one] for one in uids))) for uids in self.uids]
        of_others = sum(count for uids, count in lacking if uid not in uids)
        has_place = not by_uid[uid] or any(count for uids, count in lacking if uid in uids)
        return of_others if has_place else max(of_others, SESSIONS_KEPT)

    # -- they go -------------------------------------------------------------------------------------------------

    def close(self, code: Code, text: str) -> None:
        """Tell everybody, and hang up."""
        if self._listener is not None:
            self._loop.unwatch(self._listener.fileno())
            if not self._outlives_us:
                Path(self._listener.getsockname()).unlink(missing_ok=True)
            self._listener.close()
        for connection in list(self.connections.values()):
            connection.say_goodbye(code, text)
            self.hang_up(connection)

    def fail(self, connection: Connection, code: Code, text: str) -> None:
        self.store.tally.sessions_failed += 1
        log.warning(
            "session ended: pid=%d uid=%d name=%r code=%s reason=%s",
            connection.peer.pid, connection.peer.uid, connection.name, code.name, text,
        )  # fmt: skip
        connection.say_goodbye(code, text)
        self.hang_up(connection, text)

    def hang_up(self, connection: Connection, reason: str = "") -> None:
        """The socket is closed or must be: tickets end; leases and the record live on until the process exits.

        `reason`: why, unless the client wished it.
        """
        fd = connection.socket.fileno()
        if fd < 0:
            return
        self._loop.unwatch(fd)
        del self.connections[fd]
        connection.close()
        if connection.session is None:
            self._forget(connection)
            return
        self.went(connection, reason)
        self.parting(connection.session)
        self.store.detach(connection.session)
        self._leave_to_elder(connection)
        self.reap(connection)

    def _leave_to_elder(self, connection: Connection) -> None:
        """A process that connects and closes again and again leaves one record behind, not one for each time."""
        session = connection.session
        if session is None or session.number not in self.store.sessions:
            return
        process = identity_of(connection.peer)
        if process < 0:  # or one process would inherit what another one maps
            return
        elder = self._elders.get(process)
        # One that has exited is forgotten as soon as its tickets have ended: nobody would give back what it inherits.
        heir = elder.session if elder is not None else None
        if heir is None or heir.exited or heir.number not in self.store.sessions:
            self._elders[process] = connection
        elif elder is not connection:
            self.store.bequeath(session, heir)

    def _on_exit(self, connection: Connection) -> None:
        self.hang_up(connection)
        if connection.session is not None:
            self.store.exited(connection.session)
            self.reap(connection)

    def reap(self, connection: Connection) -> None:
        """Give back what a closed connection no longer needs."""
        session = connection.session
        assert session is not None
        if session.attached or session.copies:
            return
        if connection.ring is not None:
            self._memory.drop(connection.ring)
            connection.ring = None
        if session.number not in self.store.sessions and self.by_session.pop(session, None) is not None:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        process = identity_of(connection.peer)
        if self._elders.get(process) is connection:
            del self._elders[process]
        self._loop.unwatch(connection.peer.pidfd)
        os.close(connection.peer.pidfd)

    # -- time ----------------------------------------------------------------------------------------------------

    def look_around(self, now_ns: int) -> None:
        """Once a second: connections that never said HELLO, sessions that keep arenas they were asked to drop."""
        if self._deaf and self._listener is not None:
            self._deaf = False
            self._loop.watch(self._listener.fileno(), READABLE, self._on_connect)
        for connection in list(self.connections.values()):
            if connection.session is None and now_ns - connection.connected_ns > HELLO_NS:
                self.fail(connection, Code.BAD_FRAME, "no HELLO in time")
        for stale in list(self.store.arenas.stale.values()):
            if now_ns - stale.since_ns > STALE_NS:
                for session in list(stale.holders):
                    holder = self.by_session.get(session)
                    if session.attached and holder is not None:
                        self.fail(holder, Code.SLOW_READER, "an arena was not dropped in time")
        for connection in list(self.by_session.values()):
            self.reap(connection)


def _nobody_hears(*_: object) -> None:
    pass


def _refuse(accepted: socket.socket, text: str) -> None:
    log.warning("connection refused: %s", text)
    accepted.setblocking(False)
    with suppress(OSError):  # it sees the end of file
        accepted.send(frames.build_failure(Verb.GOAWAY, 0, Code.REFUSED, text))
    accepted.close()
