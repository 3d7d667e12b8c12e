"""Where operators of other hosts reach the control socket: nowhere, or at an address, by mutual TLS.

Whatever the address, loopback too: a Unix socket has a mode and says whose process is at its other end, and an address
has neither. So there is none without a certificate, its key, and the authority whose clients may come.
"""

import ssl
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from kvproto.sizes import quoted
from kvstored.http_address import OFF, PORT_MAX
from kvstored.secret_files import SecretFileError, read_public, read_secret
from kvstored.units import Kind

_FORMS: Final = "off, or ADDRESS:PORT such as 192.0.2.7:9756 or [::]:9756"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of the server's end."""

    certificate: Path
    key: Path
    client_ca: Path  # whoever has a certificate of this authority may act

    def checked(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and authority, as they are now. Raises SecretFileError for what no server can use."""
        read = read_secret(self.key), read_public(self.certificate), read_public(self.client_ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")  # or it asks on the terminal
        except (ssl.SSLError, OSError, ValueError) as error:
            text = f"{self.certificate} and {self.key} are no certificate and its key, without a password"
            raise SecretFileError(f"{text}: {error}") from None
        try:
            context.load_verify_locations(self.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise SecretFileError(f"{self.client_ca} is no authority's certificate: {error}") from None
        return read


def control_listen_kind() -> Kind[str]:
    """Addresses as text, as gRPC wants them."""
    return Kind(_parsed, str, (str,), f"text: {_FORMS}", _FORMS)


def _parsed(text: str) -> str:
    if text == OFF:
        return text
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > PORT_MAX:
        raise ValueError(f"{quoted(text)} is not {_FORMS}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = ip_address(bare)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not {_FORMS}; names are not looked up") from None
    if found.version == 6 and bare is host:
        raise ValueError(f"{quoted(text)}: an IPv6 address stands in brackets")
    return f"[{found}]:{int(port)}" if found.version == 6 else f"{found}:{int(port)}"
