"""The control socket at an address, for operators of other hosts: gRPC by mutual TLS.

Whoever has a certificate of `control.client_ca` acts under the name in it. Files are looked at for each connection, so
that a certificate is renewed by putting another one in its place; while what lies there is no good, the last one stays.
"""

import logging
from pathlib import Path
from typing import Any, Final, Protocol

import grpc

from kvstored.admin_audit import Audit
from kvstored.block_events import BlockEvents
from kvstored.control import ControlServer
from kvstored.control_address import TlsFiles
from kvstored.control_port import Owner
from kvstored.door import Door
from kvstored.events import Events
from kvstored.secret_files import SecretFileError

CALLS: Final = 16
CONNECTIONS: Final = 32
THREADS: Final = 2

log = logging.getLogger(__name__)


class Announce(Protocol):
    """`ControlServer.announce`."""

    def __call__(self, *, serving: bool) -> None: ...


def door_of(gate: grpc.ServerInterceptor) -> Door:  # type: ignore[type-arg, unused-ignore]
    """Threads, calls and connections of its own: what comes from other hosts never keeps out who is here."""
    return Door("control.tls", threads=THREADS, calls=CALLS, connections=CONNECTIONS, health=False, gate=gate)


class RemoteControl(ControlServer):
    """Serves `address`. As its base, but for how it appears: it has no file."""

    def __init__(
        self, owner: Owner, address: str, files: TlsFiles, door: Door, audit: Audit, events: Events,
        announce: Announce, block_events: BlockEvents | None = None,
    ) -> None:  # fmt: skip
        """`announce`: what health says of the daemon is for its own control socket to say."""
        super().__init__(owner, Path("/nonexistent"), door, audit, events, block_events)
        self._address = address
        self._files = files
        self._tell = announce
        self._seen: tuple[tuple[int, int, int], ...] = ()
        self.port = 0

    def start(self) -> None:
        """Serve. Raises OSError."""
        server = self._new_server()
        try:
            renewed: Any = self._renewed  # may answer None, whatever the stubs say
            credentials = grpc.dynamic_ssl_server_credentials(self._read(), renewed, require_client_authentication=True)
            self.port = server.add_secure_port(self._address, credentials)
        except (RuntimeError, SecretFileError) as error:
            raise OSError(f"control.listen {self._address}: {error}") from error
        server.start()
        self._server = server
        log.info("control: mutual TLS on %s, port %d", self._address, self.port)

    def announce(self, *, serving: bool) -> None:
        """See ControlServer."""
        self._tell(serving=serving)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._seen = self._states()
        key, certificate, client_ca = self._files.checked()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """For each connection: None where nothing has changed, or not for the better."""
        if self._states() == self._seen:
            return None
        try:
            return self._read()
        except SecretFileError as error:
            log.warning("control: what lies there is no good, and the certificate of before serves on: %s", error)
            return None

    def _states(self) -> tuple[tuple[int, int, int], ...]:
        found = []
        for path in (self._files.certificate, self._files.key, self._files.client_ca):
            try:
                state = path.stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        return tuple(found)
