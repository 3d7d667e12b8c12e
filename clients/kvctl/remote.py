"""A daemon of another host, by mutual TLS: `kvctl --address HOST:PORT --tls-ca FILE --tls-cert FILE --tls-key FILE`.

Our certificate says who acts; nothing is asked of a token socket.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import grpc

from kvctl.client import ANSWER_BYTES, ControlClient, Exit, KvctlError, printable
from kvproto import control_pb2_grpc

__all__ = ["Remote", "RemoteClient", "remote_of"]

PEM_BYTES: Final = 64 * 1024  # far above any chain of certificates


@dataclass(frozen=True, slots=True)
class Remote:
    """Where, and what proves to each end who the other one is."""

    address: str
    ca: Path
    certificate: Path
    key: Path


def remote_of(address: str | None, ca: Path | None, certificate: Path | None, key: Path | None) -> Remote | None:
    """From the options; None: this host. Raises KvctlError where some are missing."""
    if address is None:
        if ca or certificate or key:
            raise KvctlError(Exit.USAGE, "--tls-ca, --tls-cert and --tls-key are for --address; name the daemon's")
        return None
    if ca is None or certificate is None or key is None:
        raise KvctlError(
            Exit.USAGE, "--address wants --tls-ca, --tls-cert and --tls-key; without them nobody is asked in"
        )
    if ":" not in address or not address.isprintable() or "/" in address:
        raise KvctlError(Exit.USAGE, "--address is HOST:PORT, as control.listen of the daemon")
    return Remote(address, ca, certificate, key)


class RemoteClient(ControlClient):
    """As its base, at an address."""

    def __init__(self, remote: Remote, timeout_s: float) -> None:
        """Raises KvctlError for files that cannot be read."""
        self.socket_path = Path(remote.address)  # in sentences
        self._timeout_s = timeout_s
        self._token = None
        credentials = grpc.ssl_channel_credentials(_pem(remote.ca), _pem(remote.key), _pem(remote.certificate))
        self._channel = grpc.secure_channel(
            f"dns:///{remote.address}",
            credentials,
            options=[("grpc.max_receive_message_length", ANSWER_BYTES), ("grpc.enable_http_proxy", 0)],
        )
        self._stub = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call, unused-ignore]

    def __enter__(self) -> Self:
        return self

    @property
    def daemon(self) -> str:
        """Its address."""
        return str(self.socket_path)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Nothing: the certificate says it."""
        return ()

    def _trouble(self, code: grpc.StatusCode, details: str) -> KvctlError:
        if code is grpc.StatusCode.UNAVAILABLE:
            text = f"{self.socket_path} cannot be reached, or one end does not take the other's certificate: {details}"
            return KvctlError(Exit.UNREACHABLE, printable(text))
        return super()._trouble(code, details)


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(PEM_BYTES + 1)
    except OSError as error:
        raise KvctlError(Exit.CONFIGURATION, f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None
    if b"-----BEGIN " not in content or len(content) > PEM_BYTES:
        raise KvctlError(Exit.CONFIGURATION, f"{path} is not a PEM file")
    return content
