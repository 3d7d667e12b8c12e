"""Where metrics and health are served: nowhere, on a loopback address, or on a Unix socket.

There is no password and no encryption, so an address that other hosts can reach is refused: a proxy that has both, or
an agent on this host, passes the figures on.
"""

import os
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from kvproto.sizes import quoted
from kvstored.units import Kind

OFF: Final = "off"
PORT_MAX: Final = 65_535
SOCKET_PATH_BYTES: Final = 90  # a Unix socket path holds 107, and it is made beside its place first
_FORMS: Final = "off, LOOPBACK:PORT such as 127.0.0.1:9755, or the absolute path of a Unix socket"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A loopback address. Port 0: one that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = TcpAddress | Path


def listen_kind() -> Kind[str]:
    """Addresses as text; `address_of` reads them again."""

    def parse(text: str) -> str:
        address = address_of(text)
        return OFF if address is None else str(address)

    return Kind(parse, str, (str,), f"text: {_FORMS}", _FORMS)


def address_of(text: str) -> Address | None:
    """None: off. Raises ValueError for what is no address, or one that other hosts can reach."""
    if text == OFF:
        return None
    if text.startswith("/"):
        if not text.isprintable() or len(os.fsencode(text)) > SOCKET_PATH_BYTES:
            raise ValueError(f"{quoted(text)} is not a path of at most {SOCKET_PATH_BYTES} printable bytes")
        return Path(text)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > PORT_MAX:
        raise ValueError(f"{quoted(text)} is not {_FORMS}")
    if host == "localhost":
        return TcpAddress("127.0.0.1", int(port))
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = ip_address(bare)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not {_FORMS}") from None
    if not found.is_loopback:
        raise ValueError(
            f"{quoted(text)} can be reached from other hosts, and nothing here asks who they are; "
            "listen on 127.0.0.1 and let a proxy or an agent on this host pass the figures on"
        )
    return TcpAddress(str(found), int(port))
