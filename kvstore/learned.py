"""What a store has learned, for its successor: a table of its own that survives with the others (`restart.py`).

    [half 0] [half 1]         half: head, then records
    head     sequence u8, length u8, XXH3-64 of records, sequence and length u8
    record   length of name u2, is it packed? u1, length of content u4, name, content (packed: zlib)

Everything in it may be lost: it only makes the next life as clever as this one. A round writes all that is known into
the half that is not in use, a step a tick, and ends with its head, so that whoever dies in between leaves the other.
What has not changed is copied from there, and nothing is packed while there is room: that takes the longest. A step is
a thing, or a part of one that is packed; checksums go along. Rounds begin when time passes anyway; they wake nobody.
"""

import struct
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Final, NamedTuple

import xxhash

from kvstore.ports import Bytes

LEARNED_BYTES: Final = 64 << 20  # untouched until needed: a tenant's gaps shrink to a few KiB, a pool's counts to less
ROUND_NS: Final = 60 * 10**9
CONTENT_BYTES_MAX: Final = 4 << 20  # of one thing, before it is packed
SEQUENCE_MAX: Final = 1 << 48  # of rounds: nobody can have written more, one a minute
FULL_SHARE: Final = 16  # with less left than such a part of a half, a round is over
PACKED_BYTES: Final = 16 << 10  # of it in a step: 0.4 ms of what does not shrink


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
_OVER: Final = object()


class Learned:
    """One store's. Owner thread."""

    def __init__(self, table: Bytes, things: Callable[[], Iterable[Thing]]) -> None:
        """`things` names all that is worth keeping, one after the other while time passes."""
        self._table = table
        self._things = things
        self._half_bytes = table.size // 2
        self._sequence = max(_sequence_of(self._half(half), half) for half in (0, 1))
        self._round: Iterator[None] | None = None
        self._places: dict[str, _Place] = {}  # of the last round
        self._next_ns = 0

    def _half(self, number: int) -> Bytes:
        return self._table[number * self._half_bytes : (number + 1) * self._half_bytes]

    def read(self) -> dict[str, bytes]:
        """What the former life left, by name. Nothing of a table that is not whole."""
        return _read(self._half(self._sequence & 1)) if self._sequence else {}

    @property
    def damaged(self) -> bool:
        """Did a former life leave something, and nothing of that is whole?"""
        begun = any(_HEAD.unpack(self._half(half)[: _HEAD.size].tobytes())[0] for half in (0, 1))
        return begun and not self._sequence

    def tick(self, now_ns: int) -> None:
        """One step more of a round; a new round once the last is old."""
        if self._round is None:
            if now_ns < self._next_ns:
                return
            if not self._next_ns:  # nothing can have been learned yet
                self._next_ns = now_ns + ROUND_NS
                return
            self._round = self._steps()
        if next(self._round, _OVER) is _OVER:
            self._round = None
            self._next_ns = now_ns + ROUND_NS

    def save(self) -> None:
        """All of it, now: this life ends."""
        self._round = None
        for _ in self._steps():
            pass

    def _steps(self) -> Iterator[None]:
        """A round, in steps of less than a millisecond. It is whole once its head is written, with the last one."""
        source, target = self._half(self._sequence & 1), self._half((self._sequence + 1) & 1)
        _write(target, 0, bytes(_HEAD.size))  # whatever lies there is no longer whole
        written: dict[str, _Place] = {}
        end, digest = _HEAD.size, xxhash.xxh3_64()
        for thing in self._things():
            former = self._places.get(thing.name)
            if former is not None and former.version == thing.version:
                record = source[former.begin : former.end].tobytes()
            else:
                record = yield from _record(thing, pack=2 * end > self._half_bytes)
            begin, after = end, end + len(record)
            if record and after <= self._half_bytes:
                _write(target, begin, record)
                digest.update(record)
                written[thing.name] = _Place(thing.version, begin, after)
                end = after
            yield
            if end > self._half_bytes - self._half_bytes // FULL_SHARE:
                break  # hardly anything more would fit, and to try it all costs as much as if it did
        sequence, length = self._sequence + 1, end - _HEAD.size
        digest.update(_HEAD.pack(sequence, length, 0))
        _write(target, 0, _HEAD.pack(sequence, length, digest.intdigest()))
        self._sequence, self._places = sequence, written


def _write(half: Bytes, at: int, content: bytes) -> None:
    memoryview(half)[at : at + len(content)] = content  # type: ignore[arg-type]


def _record(thing: Thing, *, pack: bool) -> Generator[None, None, bytes]:
    """Nothing for what is not worth one, or too large."""
    content = thing.content_of()
    if not content or len(content) > CONTENT_BYTES_MAX:
        return b""
    title, written = thing.name.encode(), (yield from _packed(content)) if pack else content
    return _RECORD.pack(len(title), pack, len(written)) + title + written


def _packed(content: bytes) -> Generator[None, None, bytes]:
    packer, parts = zlib.compressobj(1), []
    for begin in range(0, len(content), PACKED_BYTES):
        yield
        parts.append(packer.compress(content[begin : begin + PACKED_BYTES]))
    yield
    return b"".join((*parts, packer.flush()))


def _sequence_of(half: Bytes, number: int) -> int:
    """0 of a half that is not whole, or that nobody can have written there."""
    sequence, length, checksum = _HEAD.unpack(half[: _HEAD.size].tobytes())
    if not 0 < sequence <= SEQUENCE_MAX or sequence & 1 != number or length > half.size - _HEAD.size:
        return 0
    digest = xxhash.xxh3_64(half[_HEAD.size : _HEAD.size + length].data)
    digest.update(_HEAD.pack(sequence, length, 0))
    return sequence if digest.intdigest() == checksum else 0


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
