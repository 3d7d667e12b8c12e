"""HELLO: who comes, as which tenant, in which mode, and with how large a ring. Owner thread."""

import logging
import os
import time
from collections.abc import Callable

from kvproto import frames
from kvproto.errors import RefusedError
from kvproto.frames import Head, Mode, Role
from kvproto.limits import (
    KEYS_PER_FRAME,
    PAGE_BYTES,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_OLDEST,
    RING_BYTES_MAX,
)
from kvstore.store import Store
from kvstored.clients import Clients
from kvstored.config_values import Config
from kvstored.connection import Connection
from kvstored.descriptors import let_through
from kvstored.device_hot import DeviceVerbs
from kvstored.modes import choose_mode
from kvstored.peer import Peer
from kvstored.regions import Region, make_region

log = logging.getLogger(__name__)


class Greeter:
    """Answers the first frame of every connection."""

    def __init__(
        self, config: Config, frame: memoryview, store: Callable[[], Store], clients: Clients, devices: DeviceVerbs
    ) -> None:
        """`frame`: where frames are received."""
        self._config = config
        self._frame = frame
        self._store = store
        self._clients = clients
        self._devices = devices

    def hello(self, connection: Connection, head: Head) -> None:
        """Begin a session, or raise why not: RefusedError, ProtocolError, LimitError, UsageError."""
        hello = frames.parse_hello(self._frame, head)
        store = self._store()
        version = min(hello.version_high, PROTOCOL_VERSION)
        if version < max(hello.version_low, PROTOCOL_VERSION_OLDEST):
            raise RefusedError(
                f"daemon speaks versions {PROTOCOL_VERSION_OLDEST} to {PROTOCOL_VERSION}, "
                f"client {hello.version_low} to {hello.version_high}"
            )
        tenant = self._tenant_for(connection.peer, hello.tenant)
        ring_bytes = self._ring_bytes_for(hello.ring_bytes) if hello.role is Role.ENGINE else 0
        chosen = choose_mode(
            hello, connection.peer, tenant, trusting=self._config.trusts(tenant), no_device=self._devices.why_not(),
            emulated=self._devices.emulated,
        )  # fmt: skip
        connection.session = store.attach(tenant, ring_bytes, chosen.owner)
        connection.name, connection.role = hello.name, hello.role.name.lower()
        connection.mode = chosen.mode.name.lower()
        if chosen.mode is Mode.DAEMON:
            let_through(connection.socket, wanted=True)
            connection.receives = True
        self._clients.by_session[connection.session] = connection
        self._clients.came(connection)
        if ring_bytes and chosen.owner is None:
            connection.ring = _new_ring(ring_bytes)
        welcome = frames.Welcome(
            version, chosen.mode, connection.session.number, time.monotonic_ns(), ring_bytes,
            store.limits.lease_ttl_ns_max, store.limits.ticket_ttl_ns, KEYS_PER_FRAME, tenant,
            chosen.notes,
        )  # fmt: skip
        connection.connected_ns = welcome.clock_ns  # both sides know it: `kvproto.trace_ids`
        connection.send(frames.build_welcome(head.request, welcome), self._welcome_fds(connection))
        log.info(
            "session opened: pid=%d uid=%d name=%r tenant=%s role=%s mode=%s",
            connection.peer.pid, connection.peer.uid, hello.name, tenant, connection.role, connection.mode,
        )  # fmt: skip

    def _welcome_fds(self, connection: Connection) -> list[int]:
        fds = [os.pidfd_open(os.getpid())]
        if connection.ring is not None:
            try:
                fds.append(os.dup(connection.ring.fd))
            except OSError:
                os.close(fds[0])
                raise
        return fds

    def _tenant_for(self, peer: Peer, wished: str) -> str:
        allowed = self._config.tenants_of(peer.uid)
        if not wished:
            return allowed[0]
        if wished not in allowed and not (peer.reads_all and self._is_tenant(wished)):
            raise RefusedError(f"uid {peer.uid} may not be tenant {wished!r}")
        return wished

    def _is_tenant(self, name: str) -> bool:
        """Was it here, or is it configured?"""
        return name in self._store().tenants or any(tenant.name == name for tenant in self._config.tenants)

    def _ring_bytes_for(self, wished: int) -> int:
        if wished > RING_BYTES_MAX:
            raise RefusedError(f"a ring of {wished} bytes is larger than {RING_BYTES_MAX}")
        ring_bytes = min(wished, self._config.ring_bytes) if wished else self._config.ring_bytes
        return max(ring_bytes // PAGE_BYTES, 1) * PAGE_BYTES


def _new_ring(ring_bytes: int) -> Region:
    """Raises RefusedError: who comes while the system has no room is told so, and who is there goes on."""
    try:
        return make_region("kvstored-ring", ring_bytes)
    except OSError as error:
        raise RefusedError(f"there is no room for a ring of {ring_bytes} bytes: {error.strerror}") from error
