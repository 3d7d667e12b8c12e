"""Where the remote tier is: nowhere, a bucket and what names in it begin with, or the master of a Mooncake Store."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from kvproto.sizes import quoted
from kvstored.http_address import OFF
from kvstored.units import NO_FILE, Kind

NONE: Final = "none"
BYTES: Final = 512
PREFIX_BYTES: Final = 64
S3: Final = "s3"
MOONCAKE: Final = "mooncake"
PACKAGES: Final = {S3: "obstore", MOONCAKE: "mooncake"}
_MASTER: Final = re.compile(r"[A-Za-z0-9.:\[\]-]{3,260}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX: Final = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]*)(?:/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_FORMS: Final = "off, a bucket such as s3://bucket/prefix, or a master such as mooncake://host:50051"


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """A bucket, or HOST:PORT of a master. `endpoint` and `region`: empty for what the environment says.

    `python`: the interpreter whose environment has Mooncake's package; empty for the daemon's own.
    """

    scheme: str
    bucket: str
    prefix: str
    endpoint: str = ""
    region: str = ""
    python: str = ""


def parse_remote(text: str, endpoint: str = NONE, region: str = NONE, python: str = NO_FILE) -> RemoteAddress | None:
    """None: off. Raises ValueError."""
    if text == OFF:
        return None
    parts = urlsplit(text)
    prefix = parts.path.strip("/")
    if _is_master(text):
        return RemoteAddress(MOONCAKE, parts.netloc, "", python="" if python == NO_FILE else python)
    good = parts.scheme == S3 and _BUCKET.fullmatch(parts.netloc) is not None and not parts.query and not parts.fragment
    if not good or len(prefix) > PREFIX_BYTES or (prefix and _PREFIX.fullmatch(prefix) is None):
        raise ValueError(f"{quoted(text)} is not {_FORMS}")
    return RemoteAddress(
        parts.scheme, parts.netloc, prefix, "" if endpoint == NONE else endpoint, "" if region == NONE else region
    )


def missing_package(address: RemoteAddress) -> str:
    """The package that such an address needs and that is not installed; empty if it is, or elsewhere."""
    name = PACKAGES[address.scheme]
    return "" if address.python or find_spec(name) is not None else name


def _is_master(text: str) -> bool:
    parts = urlsplit(text)
    try:
        named = bool(parts.hostname) and bool(parts.port)
    except ValueError:
        return False
    rest = (parts.path.strip("/"), parts.query, parts.fragment)
    return parts.scheme == MOONCAKE and named and not any(rest) and _MASTER.fullmatch(parts.netloc) is not None


def remote_kind() -> Kind[str]:
    """Addresses as text."""

    def parse(text: str) -> str:
        parse_remote(text)
        return text

    return Kind(parse, str, (str,), f"text: {_FORMS}", _FORMS)


def endpoint_kind() -> Kind[str]:
    """Of a server that speaks S3 and is not AWS's."""
    forms = "none, or the address of a server such as https://objects.example.com:9000"

    def parse(text: str) -> str:
        if text == NONE:
            return NONE
        try:
            parts = urlsplit(text)
            good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or "@" in text or not text.isprintable() or len(text) > BYTES:  # a password would be in `config`
            raise ValueError(f"{quoted(text)} is not {forms}")
        return text.rstrip("/")

    return Kind(parse, str, (str,), f"text: {forms}", forms)


def region_kind() -> Kind[str]:
    """Names of regions."""
    forms = "none, or a name such as eu-central-1"

    def parse(text: str) -> str:
        if re.fullmatch(r"[a-z0-9-]{1,32}", text) is None:
            raise ValueError(f"{quoted(text)} is not {forms}")
        return text

    return Kind(parse, str, (str,), f"text: {forms}", forms)
