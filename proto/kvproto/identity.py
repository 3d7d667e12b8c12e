"""Namespace identity: everything that makes bytes interchangeable.

Two engines share blocks only if every field agrees. The digest is SHA-256 over the canonical form: a version
line, then each field as its name, a length and its bytes, so that no two different identities share a form. `codec`
is there only for blocks that are encoded (`kvclient.codecs` says how): those of before it, and raw ones, have none.
"""

import hashlib
import struct
from dataclasses import dataclass, fields
from typing import Self

from kvproto.errors import UsageError
from kvproto.ids import NamespaceDigest
from kvproto.limits import BLOCK_BYTES_MAX, BLOCK_TOKENS_MAX, FIELD_BYTES

_FORM = b"kvstored namespace 1\n"
_LENGTH = struct.Struct("<H")
_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class NamespaceIdentity:
    """What a block's bytes depend on besides its tokens. Raises UsageError for what cannot be a namespace."""

    model: str
    engine: str
    layout: str
    dtype: str
    block_tokens: int
    block_bytes: int
    revision: str = ""
    adapter: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    codec: str = ""  # how clients encode the blocks, `block_bytes` then being encoded; empty: raw

    def __post_init__(self) -> None:
        for name in ("model", "engine", "layout", "dtype", "revision", "adapter", "codec"):
            text = getattr(self, name)
            if not isinstance(text, str):
                raise UsageError(f"namespace {name} must be a string, not {type(text).__name__}")
            if len(text.encode()) > FIELD_BYTES:
                raise UsageError(f"namespace {name} is longer than {FIELD_BYTES} bytes")
        for name in ("model", "engine", "layout", "dtype"):
            if not getattr(self, name):
                raise UsageError(f"namespace {name} must not be empty")
        _require("block_tokens", self.block_tokens, 1, BLOCK_TOKENS_MAX)
        _require("block_bytes", self.block_bytes, 1, BLOCK_BYTES_MAX)
        for axis, rank, size in (("tp", self.tp_rank, self.tp_size), ("pp", self.pp_rank, self.pp_size)):
            _require(f"{axis} size", size, 1, 1 << 16)
            _require(f"{axis} rank", rank, 0, size - 1)

    def canonical(self) -> bytes:
        """The bytes that travel in OPEN and that the digest covers."""
        parts = [_FORM]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "codec" and not value:
                continue
            encoded = value.encode() if isinstance(value, str) else _NUMBER.pack(value)
            name = field.name.encode()
            parts += [_LENGTH.pack(len(name)), name, _LENGTH.pack(len(encoded)), encoded]
        return b"".join(parts)

    def digest(self) -> NamespaceDigest:
        """32 bytes that name this identity everywhere."""
        return NamespaceDigest(hashlib.sha256(self.canonical()).digest())

    @classmethod
    def from_canonical(cls, form: bytes) -> Self:
        """Parse what a peer sent. Raises UsageError unless it is exactly the canonical form of an identity."""
        if not form.startswith(_FORM):
            raise UsageError("not a namespace identity of version 1")
        values: dict[str, str | int] = {}
        offset = len(_FORM)
        for field in fields(cls):
            if field.name == "codec" and offset == len(form):
                break
            name, offset = _take(form, offset)
            if name != field.name.encode():
                raise UsageError(f"namespace field {field.name} is missing or out of order")
            encoded, offset = _take(form, offset)
            values[field.name] = _decode(field.name, encoded, is_text=field.type is str)
            if field.name == "codec" and not encoded:
                raise UsageError("a codec of nothing is left out of the namespace identity")
        if offset != len(form):
            raise UsageError("bytes left over after the namespace identity")
        return cls(**values)  # type: ignore[arg-type]  # each value has just been decoded by its field's type


def _require(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"namespace {name} must be a whole number from {low} to {high}, not {value!r}")


def _take(form: bytes, offset: int) -> tuple[bytes, int]:
    if offset + 2 > len(form):
        raise UsageError("namespace identity is cut short")
    (length,) = _LENGTH.unpack_from(form, offset)
    start, end = offset + 2, offset + 2 + length
    if end > len(form):
        raise UsageError("namespace identity is cut short")
    return form[start:end], end


def _decode(name: str, encoded: bytes, *, is_text: bool) -> str | int:
    if is_text:
        try:
            return encoded.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"namespace {name} is not UTF-8") from error
    if len(encoded) != _NUMBER.size:
        raise UsageError(f"namespace {name} is not an 8-byte number")
    number: int = _NUMBER.unpack(encoded)[0]
    return number
