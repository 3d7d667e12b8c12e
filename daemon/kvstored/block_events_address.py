"""Where changes of blocks are told: nowhere, on the control socket alone, or on ZeroMQ as well.

    off                       nobody looks for changes
    grpc                      WatchBlocks on the control socket
    ipc                       and sockets of ZeroMQ in RUNTIME_DIR/events: TENANT.pub and TENANT.replay
    tcp://127.0.0.1:5557      and of one tenant at an address: that port, and the next one for replay

ZeroMQ asks nobody who they are. Sockets in the directory are open to the daemon's user (and its admin group); an
address is open to whoever reaches it, so one that other hosts can reach must be allowed by name.
"""

import os
import re
import string
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from kvproto.sizes import quoted
from kvstored.http_address import OFF, PORT_MAX
from kvstored.units import ConfigError, Kind

GRPC: Final = "grpc"
IPC: Final = "ipc"
FOLDER: Final = "events"
PUBLISH, REPLAY = ".pub", ".replay"  # behind a tenant's name
ANY_TENANT: Final = "*"
PACKAGES: Final = ("zmq", "msgspec")
HASHES: Final = ("int", "bytes")
FORMS: Final = ("maps", "arrays")
TOPIC_BYTES: Final = 512
TOPIC_FIELDS: Final = ("host", "tenant", "model", "namespace")
_FORMS: Final = f"{OFF}, {GRPC}, {IPC}, or tcp://ADDRESS:PORT such as tcp://127.0.0.1:5557"
_TENANT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
SOCKET_PATH_BYTES: Final = 107


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Of one tenant, as ZeroMQ writes them."""

    publish: str
    replay: str


@dataclass(frozen=True, slots=True)
class EventsConfig:
    """What of the configuration is about this."""

    listen: str
    tenant: str = ANY_TENANT
    topic: str = "kv@{host}@{model}"
    hashes: str = "int"
    form: str = "maps"
    replay: int = 10_000  # batches
    high_water: int = 1000  # batches that wait for one subscriber
    runtime_dir: Path = Path()

    def has(self, name: str) -> bool:
        """Does what this field says tell topics apart?"""
        return any(field == name for _, field, _, _ in string.Formatter().parse(self.topic))


def events_listen_kind() -> Kind[str]:
    """Addresses as text."""
    return Kind(_parsed, str, (str,), f"text: {_FORMS}", _FORMS)


def _parsed(text: str) -> str:
    if text in (OFF, GRPC, IPC):
        return text
    host, port = _tcp(text)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _tcp(text: str) -> tuple[str, int]:
    """Raises ValueError."""
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    good = text.startswith("tcp://") and colon and port.isascii() and port.isdigit() and len(port) <= 5
    if not good or not 1 <= int(port) < PORT_MAX:
        raise ValueError(f"{quoted(text)} is not {_FORMS}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = ip_address(bare)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not {_FORMS}; names are not looked up") from None
    return str(found), int(port)


def loopback(listen: str) -> bool:
    """Can nobody on another host reach it?"""
    return not listen.startswith("tcp:") or ip_address(_tcp(listen)[0]).is_loopback


def endpoints_of(listen: str, runtime_dir: Path, tenant: str) -> Endpoints:
    """Where a tenant's changes are told. Raises ValueError for a path that no socket can have."""
    if listen != IPC:
        host, port = _tcp(listen)
        shown = f"[{host}]" if ":" in host else host
        return Endpoints(f"tcp://{shown}:{port}", f"tcp://{shown}:{port + 1}")
    folder = runtime_dir / FOLDER
    if not _TENANT.fullmatch(tenant) or len(os.fsencode(folder / f"{tenant}{REPLAY}")) > SOCKET_PATH_BYTES:
        raise ValueError(f"no socket of ZeroMQ can be called {quoted(tenant)}{REPLAY} in {folder}")
    path = f"ipc://{folder}/{tenant}"  # also of one that is called "."
    return Endpoints(path + PUBLISH, path + REPLAY)


def events_tenant_kind() -> Kind[str]:
    """One tenant's name, or `ANY_TENANT`."""

    def parse(text: str) -> str:
        if text != ANY_TENANT and not _TENANT.fullmatch(text):
            raise ValueError(f"{quoted(text)} is no tenant's name, and not {ANY_TENANT} for all of them")
        return text

    return Kind(parse, str, (str,), "a name", f"the name of a tenant, or {ANY_TENANT} for all")


def topic_kind() -> Kind[str]:
    """Templates of topics."""

    def parse(text: str) -> str:
        try:
            parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
            fields = {"" if form or turn else name for _, name, form, turn in parts}
            shown = topic_of(text, dict.fromkeys(TOPIC_FIELDS, "x"))
        except (ValueError, KeyError, IndexError, AttributeError):
            fields, shown = {""}, ""
        if fields - set(TOPIC_FIELDS) or not text.isprintable() or len(text) > TOPIC_BYTES or len(shown) > TOPIC_BYTES:
            named = ", ".join(f"{{{name}}}" for name in TOPIC_FIELDS)
            raise ValueError(f"{quoted(text)} is no text of at most {TOPIC_BYTES} letters with {named} in it")
        return text

    named = ", ".join(f"{{{name}}}" for name in TOPIC_FIELDS)
    return Kind(parse, str, (str,), f"text with {named}", f"text, in which {named} stand for what they say")


def topic_of(template: str, values: dict[str, str]) -> str:
    """A topic. Consumers part it at @, so no value has one."""
    return template.format(**{name: value.replace("@", "_") for name, value in values.items()})


def missing_packages() -> str:
    """The first package that ZeroMQ's events need and that is not installed; empty if all are."""
    return next((name for name in PACKAGES if find_spec(name) is None), "")


def check_events(config: EventsConfig, place: str, *, routable: bool) -> None:
    """Raises ConfigError for what cannot work, or must be allowed first."""
    if config.listen in (OFF, GRPC):
        return
    if missing := missing_packages():
        raise ConfigError(f"{place}: {missing} is missing: pip install 'kvstored[events]'")
    if config.listen == IPC:
        return
    if config.tenant == ANY_TENANT:
        raise ConfigError(f"{place}: an address tells of one tenant's blocks; say whose with events.tenant")
    if not routable and not loopback(config.listen):
        text = f"{config.listen} can be reached from other hosts, and ZeroMQ asks nobody who they are"
        raise ConfigError(f"{place}: {text}; if that shall be so, set events.routable")
