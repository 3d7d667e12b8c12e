"""Where spans are sent: nowhere, or to a collector that speaks OTLP over HTTP."""

from importlib.util import find_spec
from typing import Final
from urllib.parse import urlsplit

from kvproto.sizes import quoted
from kvstored.http_address import OFF
from kvstored.units import Kind

BYTES: Final = 512
PACKAGES: Final = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_FORMS: Final = "off, or the address of a collector such as http://127.0.0.1:4318/v1/traces"


def otlp_kind() -> Kind[str]:
    """Addresses as text."""

    def parse(text: str) -> str:
        if text == OFF:
            return OFF
        try:
            parts = urlsplit(text)
            good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or "@" in text or not text.isprintable() or len(text) > BYTES:  # a password would be in `config`
            raise ValueError(f"{quoted(text)} is not {_FORMS}")
        return text

    return Kind(parse, str, (str,), f"text: {_FORMS}", _FORMS)


def missing_packages() -> str:
    """The first package that sending needs and that is not installed; empty if all are."""
    for name in PACKAGES:
        try:
            if find_spec(name) is None:
                return name
        except ModuleNotFoundError:  # of what it lies in
            return name
    return ""
