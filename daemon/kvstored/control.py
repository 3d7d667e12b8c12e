"""The control socket: gRPC over a Unix socket, for operators, routers and other languages.

A call passes through three kinds of thread:

    operator --gRPC--> handler thread (one of 4)  --question-->  owner thread
                       checks the request                        runs it between two events of the hot path
    operator <--gRPC-- builds the answer          <--report----  (plain frozen values)

Handlers (`control_verbs.py`) hold no state and never touch the store's. What they may ask is `control_port.py`.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from os import fsencode
from pathlib import Path
from typing import Final
from urllib.parse import quote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.limits import FRAME_BYTES, MIB
from kvstored.admin_audit import Audit
from kvstored.block_events import BlockEvents
from kvstored.block_events_stream import WATCHERS as BLOCK_WATCHERS
from kvstored.block_events_stream import WatchedBlocks
from kvstored.control_port import Owner
from kvstored.control_verbs import Verbs
from kvstored.door import CONTROL, Door, held
from kvstored.events import Events
from kvstored.events_stream import WATCHERS

__all__ = ["SOCKET_NAME", "ControlServer"]

SOCKET_NAME: Final = CONTROL
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Control"].full_name

# The largest request is a Clear of 1,024 keys: 34 bytes each, 35 KiB.
REQUEST_BYTES: Final = FRAME_BYTES
# The largest answer lists 4,096 namespaces of six texts of 1 KiB and 0.3 KiB of the rest: 26 MiB.
ANSWER_BYTES: Final = 32 * MIB
SOCKET_PATH_BYTES: Final = 107  # sun_path less its NUL


class ControlServer:
    """Serves a socket in `runtime_dir`. `start` and `stop` belong to one thread; `announce` to any."""

    def __init__(
        self, owner: Owner, runtime_dir: Path, door: Door | None = None, audit: Audit | None = None,
        events: Events | None = None, block_events: BlockEvents | None = None,
    ) -> None:  # fmt: skip
        """`audit` has what was done here, and in former lives; `events` what happens; `block_events` where blocks lie,
        if somebody looks."""
        self._door = Door() if door is None else door
        self.path = runtime_dir / self._door.name
        self._owner = owner
        self._audit = audit
        self._events = events or Events()
        self._block_events = block_events
        self._health = health.HealthServicer()
        self._server: grpc.Server | None = None
        self._inode = 0
        self.serving = False  # as the health service says

    def start(self) -> None:
        """Serve. The socket appears under its name once calls are answered, and its mode is never but its door's.

        Raises OSError if the runtime directory cannot hold it, ValueError if its path is too long for a
        socket. A socket that a dead daemon left behind is replaced: that no living one serves this directory
        is for the caller to know (flock). A stopped server does not start again.
        """
        if len(fsencode(self.path)) > SOCKET_PATH_BYTES:
            raise ValueError(f"{self.path} is longer than the {SOCKET_PATH_BYTES} bytes of a Unix socket's path")
        self.announce(serving=True)
        self._server = self._new_server()
        try:
            self._appear(self._server)
        except BaseException:
            self._server.stop(None).wait()
            self._server = None
            raise

    def announce(self, *, serving: bool) -> None:
        """What the health service says from now on: SERVING or NOT_SERVING."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        self.serving = serving
        for service in (health.OVERALL_HEALTH, SERVICE):
            self._health.set(service, state)

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give running ones `grace_s` seconds, remove the socket. Idempotent.

        May be called by the owner thread, which then answers nothing more: calls that wait for it are cut off
        after `grace_s`.
        """
        server, self._server = self._server, None
        if server is None:
            return
        self._health.enter_graceful_shutdown()
        self._events.stop()
        if self._block_events is not None:
            self._block_events.end_watching()
        server.stop(grace_s).wait()
        # A successor may have put its own socket there already.
        if self.path.exists() and self.path.stat().st_ino == self._inode:
            self.path.unlink()

    def _new_server(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(self._door.threads + WATCHERS + BLOCK_WATCHERS, thread_name_prefix="control"),
            options=[
                ("grpc.max_receive_message_length", REQUEST_BYTES),
                ("grpc.max_send_message_length", ANSWER_BYTES),
                *held(self._door),
            ],
            maximum_concurrent_rpcs=self._door.calls,
            interceptors=[self._door.gate] if self._door.gate else None,
        )
        watched = WatchedBlocks(self._block_events, self._owner, self._door.watchers_of_one)
        handlers = Verbs(self._owner, self.announce, self._audit, self._events, watched)
        control_pb2_grpc.add_ControlServicer_to_server(handlers, server)
        if not self._door.health:
            return server
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return server

    def _appear(self, server: grpc.Server) -> None:
        """Bind where nobody else can look, narrow the mode, then rename into place.

        bind() gives a socket the mode that the umask leaves, and gRPC binds by itself: a chmod afterwards is
        too late for a quick peer, and a changed umask would change what other threads create meanwhile.
        """
        with tempfile.TemporaryDirectory(prefix=".", dir=self.path.parent) as private:  # mode 0700
            hidden = Path(private) / "s"
            server.add_insecure_port(f"unix:{quote(str(hidden))}")
            hidden.chmod(0o600)
            if self._door.gid is not None:
                os.chown(hidden, -1, self._door.gid)
            hidden.chmod(self._door.mode)
            server.start()
            self._inode = hidden.stat().st_ino
            hidden.rename(self.path)
