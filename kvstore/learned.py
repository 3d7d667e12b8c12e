"""What a store has learned, for its successor: a table of its own that survives with the others (`restart.py`).

    [half 0] [half 1]         half: head, then records
    head     sequence u8, length u8, XXH3-64 of sequence, length and records u8
    record   length of name u2, is it packed? u1, length of content u4, name, content (packed: zlib)

Everything in it may be lost: it only makes the next life as clever as this one. A round writes all that is known into
the half that is not in use, a thing a tick, and ends with its head, so that whoever dies in between leaves the other.
What has not changed is copied from there, and nothing is packed while there is room: that would take the longest, a
millisecond for 60 KB. Rounds begin when time passes anyway; they wake nobody.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import xxhash

from kvstore.ports import Bytes

LEARNED_BYTES: Final = 64 << 20  # untouched until needed: a tenant's gaps shrink to a few KiB, a pool's counts to less
ROUND_NS: Final = 60 * 10**9
CONTENT_BYTES_MAX: Final = 4 << 20  # of one thing, before it is packed


class Thing(NamedTuple):
    """Its name, what changes when it does, and its content when its turn comes; nothing: not worth a record."""

    name: str
    version: object
    content_of: Callable[[], bytes]


class _Place(NamedTuple):
    """Where the record of a version lies in the half in use."""

    version: object
    begin: int
    end: int


_HEAD: Final = struct.Struct("<QQQ")
_RECORD: Final = struct.Struct("<HBI")


class Learned:
    """One store's. Owner thread."""

    def __init__(self, table: Bytes, things: Callable[[], Iterable[Thing]]) -> None:
        """`things` names all that is worth keeping."""
        self._table = table
        self._things = things
        self._half_bytes = table.size // 2
        self._sequence = max(_sequence_of(self._half(half)) for half in (0, 1))
        self._round: Iterator[Thing] | None = None
        self._end = 0
        self._places: dict[str, _Place] = {}  # of the last round
        self._written: dict[str, _Place] = {}  # of this one
        self._next_ns = 0

    def _half(self, number: int) -> Bytes:
        return self._table[number * self._half_bytes : (number + 1) * self._half_bytes]

    def read(self) -> dict[str, bytes]:
        """What the former life left, by name. Nothing of a table that is not whole."""
        return _read(self._half(self._sequence & 1)) if self._sequence else {}

    def tick(self, now_ns: int) -> None:
        """One thing more of a round; a new round once the last is old."""
        if self._round is None:
            if now_ns < self._next_ns:
                return
            if not self._next_ns:  # nothing can have been learned yet
                self._next_ns = now_ns + ROUND_NS
                return
            self._begin()
        if not self._go_on():
            self._next_ns = now_ns + ROUND_NS

    def save(self) -> None:
        """All of it, now: this life ends."""
        self._begin()
        while self._go_on():
            pass

    def _begin(self) -> None:
        self._round = iter(list(self._things()))
        self._end = _HEAD.size
        self._written = {}
        self._write(0, bytes(_HEAD.size))  # whatever lies there is no longer whole

    def _go_on(self) -> bool:
        assert self._round is not None, "a round was begun"
        thing = next(self._round, None)
        if thing is None:
            self._seal()
            self._round = None
            return False
        former = self._places.get(thing.name)
        if former is not None and former.version == thing.version:
            record = self._half(self._sequence & 1)[former.begin : former.end].tobytes()
        else:
            record = _record(thing.name, thing.content_of(), pack=2 * self._end > self._half_bytes)
        begin, end = self._end, self._end + len(record)
        if record and end <= self._half_bytes:
            self._write(begin, record)
            self._written[thing.name] = _Place(thing.version, begin, end)
            self._end = end
        return True

    def _seal(self) -> None:
        """The half that was written is the one in use from now on."""
        sequence, length = self._sequence + 1, self._end - _HEAD.size
        checksum = _checksum(sequence, length, self._half(sequence & 1))
        self._write(0, _HEAD.pack(sequence, length, checksum))
        self._sequence = sequence
        self._places = self._written

    def _write(self, at: int, content: bytes) -> None:
        """Into the half that is not in use."""
        half = self._half((self._sequence + 1) & 1)
        memoryview(half)[at : at + len(content)] = content  # type: ignore[arg-type]


def _record(name: str, content: bytes, *, pack: bool) -> bytes:
    """Nothing for what is not worth one, or too large."""
    if not content or len(content) > CONTENT_BYTES_MAX:
        return b""
    title, written = name.encode(), zlib.compress(content, 1) if pack else content
    return _RECORD.pack(len(title), pack, len(written)) + title + written


def _checksum(sequence: int, length: int, half: Bytes) -> int:
    digest = xxhash.xxh3_64(_HEAD.pack(sequence, length, 0))
    digest.update(half[_HEAD.size : _HEAD.size + length].data)
    return digest.intdigest()


def _sequence_of(half: Bytes) -> int:
    """0 of a half that is not whole."""
    sequence, length, checksum = _HEAD.unpack(half[: _HEAD.size].tobytes())
    if not sequence or length > half.size - _HEAD.size:
        return 0
    return sequence if _checksum(sequence, length, half) == checksum else 0


def _read(half: Bytes) -> dict[str, bytes]:
    """Records of a half whose checksum is right; what cannot be unpacked is left out."""
    _, length, _ = _HEAD.unpack(half[: _HEAD.size].tobytes())
    at, end = _HEAD.size, _HEAD.size + length
    found: dict[str, bytes] = {}
    while at + _RECORD.size <= end:
        title_bytes, packed, written_bytes = _RECORD.unpack(half[at : at + _RECORD.size].tobytes())
        begin = at + _RECORD.size + title_bytes
        at = begin + written_bytes
        if at > end:
            break
        content = half[begin:at].tobytes()
        try:
            name = half[begin - title_bytes : begin].tobytes().decode()
            if packed:
                unpacker = zlib.decompressobj()
                content = unpacker.decompress(content, CONTENT_BYTES_MAX)
                if not unpacker.eof:
                    continue
        except (zlib.error, UnicodeDecodeError):
            continue
        found[name] = content
    return found
