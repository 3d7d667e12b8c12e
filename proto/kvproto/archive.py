"""Archives of blocks: `Writer` and `Reader` of the form that ARCHIVE.md draws. Streams; neither ever seeks.

The reader believes nothing that it has not compared with a checksum, and gives no block that differs from what was
written. What is damaged is named and passed over, as far as it can be told where the next record begins.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final, Self, TypeAlias

import xxhash

from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity
from kvproto.limits import KEY_BYTES, MIB, NAME_BYTES, NAMESPACES

__all__ = [
    "VERSION", "ArchiveError", "Block", "Damage", "Done", "Events", "Name", "Reader", "Totals", "Writer",
]  # fmt: skip

MAGIC: Final = b"kvstored archive"
VERSION: Final = 1
ROOT: Final = bytes(KEY_BYTES)  # the parent of what begins a chain
_HEAD: Final = struct.Struct("<16sIIQQ")  # magic, version, 0, blocks and bytes that are to come
_SUM: Final = struct.Struct("<Q")
_RECORD: Final = struct.Struct("<4sIQ32s32s16sQ")  # kind, namespace, body bytes, key, parent, sum of the body, number
_NAME: Final = struct.Struct("<QH")  # blocks that are to come; bytes of the tenant's name
_DONE: Final = struct.Struct("<QQQ16s")  # namespaces, blocks, their bytes, sum of all bodies' sums
HEAD_BYTES: Final = _HEAD.size + _SUM.size
RECORD_BYTES: Final = _RECORD.size + _SUM.size
NAME_BODY_BYTES: Final = 16 * 1024  # six texts of 1 KiB, with room
PIECE_BYTES: Final = 16 * MIB  # read at a time: memory is used as bytes come, whatever a head says
NAMED, BLOCK, DONE = b"NAME", b"BLOK", b"DONE"


class ArchiveError(Exception):
    """This is no archive, or none that this version reads. Nothing of it was used."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Of a whole archive."""

    namespaces: int
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Name:
    """A namespace begins; what follows is of it."""

    tenant: str
    identity: NamespaceIdentity
    planned_blocks: int  # as the writer counted before it began


@dataclass(frozen=True, slots=True)
class Block:
    """One block, as it was written. `parent`: None where it begins a chain."""

    key: bytes
    parent: bytes | None
    body: bytearray  # empty for a reader that keeps none


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is not what was written, and was passed over. `key`: of the block, where that can be told."""

    at: int  # bytes from the beginning
    why: str
    key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The end. `whole`: the writer came to its own, and all that it wrote was met again."""

    totals: Totals  # of what was given
    whole: bool


Events: TypeAlias = Name | Block | Damage | Done


class Writer:
    """Writes one archive. Call `finish` at the end: without it the archive counts as cut short."""

    def __init__(self, file: BinaryIO, planned_blocks: int = 0, planned_bytes: int = 0) -> None:
        self._file = file
        self._number = 0
        self._namespaces = self._blocks = self._bytes = 0
        self._sums = xxhash.xxh3_128()
        head = _HEAD.pack(MAGIC, VERSION, 0, planned_blocks, planned_bytes)
        file.write(head + _SUM.pack(xxhash.xxh3_64_intdigest(head)))

    def name(self, tenant: str, identity: NamespaceIdentity, planned_blocks: int = 0) -> None:
        """Begin a namespace."""
        named = tenant.encode()
        assert len(named) <= NAME_BYTES, "a tenant's name has a bound"
        self._namespaces += 1
        body = _NAME.pack(planned_blocks, len(named)) + named + identity.canonical()
        self._record(NAMED, identity.digest(), ROOT, body)

    def block(self, key: bytes, parent: bytes | None, body: "bytes | bytearray | memoryview") -> None:
        """Add a block to the namespace that was begun last; its parent before it."""
        assert self._namespaces, "a block belongs to a namespace"
        self._blocks += 1
        self._bytes += len(body)
        self._record(BLOCK, key, ROOT if parent is None else parent, body)

    def finish(self) -> Totals:
        """The trailer."""
        body = _DONE.pack(self._namespaces, self._blocks, self._bytes, self._sums.digest())
        self._record(DONE, ROOT, ROOT, body)
        return Totals(self._namespaces, self._blocks, self._bytes)

    def _record(self, kind: bytes, key: bytes, parent: bytes, body: "bytes | bytearray | memoryview") -> None:
        body_sum = xxhash.xxh3_128_digest(body)
        number, namespace = self._number, max(0, self._namespaces - 1)
        head = _RECORD.pack(kind, namespace, len(body), key, parent, body_sum, number)
        self._file.write(head + _SUM.pack(xxhash.xxh3_64_intdigest(head)))
        self._file.write(body)
        self._sums.update(body_sum)
        self._number += 1


@dataclass(frozen=True, slots=True)
class _Record:
    kind: bytes
    namespace: int
    body_bytes: int
    key: bytes
    parent: bytes
    body_sum: bytes
    number: int

    @classmethod
    def parsed(cls, head: bytes) -> Self | None:
        """None if it is not what was written."""
        (head_sum,) = _SUM.unpack_from(head, _RECORD.size)
        if xxhash.xxh3_64_intdigest(head[: _RECORD.size]) != head_sum:
            return None
        return cls(*_RECORD.unpack_from(head))


class Reader:
    """Reads one archive: iterate once. Raises ArchiveError when made, for what is none."""

    def __init__(self, file: BinaryIO, *, keeps: bool = True) -> None:
        """`keeps`: False to verify blocks and not have their bytes, so that no size of theirs matters."""
        self._file = file
        self._keeps = keeps
        self._at = 0
        head = bytes(self._read(HEAD_BYTES))
        if not head.startswith(MAGIC):
            raise ArchiveError("this is no archive of kvstored")
        magic_and_version = head[: len(MAGIC) + 4]
        if len(magic_and_version) == len(MAGIC) + 4:
            (version,) = struct.unpack_from("<I", head, len(MAGIC))
            if version != VERSION:
                raise ArchiveError(f"an archive of version {version}; this kvctl reads version {VERSION}")
        if len(head) < HEAD_BYTES:
            raise ArchiveError("cut short within its first bytes")
        if _SUM.unpack_from(head, _HEAD.size)[0] != xxhash.xxh3_64_intdigest(head[: _HEAD.size]):
            raise ArchiveError("its first bytes are damaged")
        _, _, _, self.planned_blocks, self.planned_bytes = _HEAD.unpack_from(head)
        self._name: Name | None = None
        self._namespaces = self._blocks = self._bytes = 0
        self._number = 0
        self._sums = xxhash.xxh3_128()
        self._spotless = True

    def __iter__(self) -> Iterator[Events]:
        while True:
            began, head = self._at, bytes(self._read(RECORD_BYTES))
            if len(head) < RECORD_BYTES:
                yield self._broken(began, "cut short: there is no end")
                break
            record = _Record.parsed(head)
            if record is None:
                yield self._broken(began, "the head of a record is damaged")
                if not self._skipped():
                    yield self._broken(self._at, "where the next record begins cannot be told")
                    break
            elif record.number != self._number:
                yield self._broken(began, f"record {record.number} in the place of record {self._number}")
                break
            elif record.kind == DONE:
                yield from self._end(began, record)
                return
            elif record.kind == NAMED:
                why = self._begin(record)
                if why:
                    yield self._broken(began, why)
                    break
                assert self._name is not None, "it has just begun"
                yield self._name
            else:
                event = self._block(began, record)
                yield event
                if isinstance(event, Damage) and event.key is None:
                    break
            self._number += 1
        yield Done(self._totals(), whole=False)

    def _begin(self, record: _Record) -> str:
        """Empty, or why that is no namespace."""
        if record.body_bytes > NAME_BODY_BYTES or self._namespaces >= NAMESPACES:
            return "a namespace that cannot be"
        body = bytes(self._read(record.body_bytes))
        if xxhash.xxh3_128_digest(body) != record.body_sum or len(body) < _NAME.size:
            return "the name of a namespace is damaged, so that its blocks are nobody's"
        planned, named = _NAME.unpack_from(body)
        if not 0 < named <= NAME_BYTES:
            return "a namespace that cannot be"
        try:
            tenant = body[_NAME.size : _NAME.size + named].decode()
            identity = NamespaceIdentity.from_canonical(body[_NAME.size + named :])
        except (UsageError, UnicodeDecodeError) as error:
            return f"a namespace that this version does not know: {error}"
        if identity.digest() != record.key:
            return "a namespace whose digest is another's"
        self._sums.update(record.body_sum)
        self._name = Name(tenant, identity, planned)
        self._namespaces += 1
        return ""

    def _block(self, began: int, record: _Record) -> Block | Damage:
        """Damage without a key: nothing more can be read."""
        name = self._name
        if record.kind != BLOCK or name is None or record.namespace != self._namespaces - 1:
            return self._broken(began, "a record that does not belong here")
        if record.body_bytes != name.identity.block_bytes:
            return self._broken(began, "a block of another size than its namespace's")
        if self._blocks >= self.planned_blocks or self._bytes + record.body_bytes > self.planned_bytes:
            return self._broken(began, "more than its first bytes say")
        body, found_bytes, found_sum = bytearray(), 0, xxhash.xxh3_128()
        for piece in self._pieces(record.body_bytes):
            found_bytes += len(piece)
            found_sum.update(piece)
            if self._keeps:
                body = _joined(body, piece)
        self._sums.update(record.body_sum)
        if found_bytes < record.body_bytes:
            return self._broken(began, "cut short within a block")
        if found_sum.digest() != record.body_sum:
            return self._broken(began, "a block is damaged", record.key)
        self._blocks += 1
        self._bytes += found_bytes
        return Block(record.key, None if record.parent == ROOT else record.parent, body)

    def _skipped(self) -> bool:
        """Pass over what followed a damaged head, taking it for a block's."""
        if self._name is None:
            return False
        size = self._name.identity.block_bytes
        return sum(map(len, self._pieces(size))) == size

    def _end(self, began: int, record: _Record) -> Iterator[Events]:
        body = bytes(self._read(record.body_bytes if record.body_bytes == _DONE.size else 0))
        said = (self._namespaces, self._blocks, self._bytes, self._sums.digest())
        if len(body) != _DONE.size or xxhash.xxh3_128_digest(body) != record.body_sum:
            yield self._broken(began, "its last record is damaged")
        elif self._spotless and _DONE.unpack(body) != said:
            yield self._broken(began, "its totals are not those of what was read")
        if self._read(1):
            yield self._broken(self._at - 1, "something follows its end")
        yield Done(self._totals(), whole=self._spotless)

    def _totals(self) -> Totals:
        return Totals(self._namespaces, self._blocks, self._bytes)

    def _broken(self, at: int, why: str, key: bytes | None = None) -> Damage:
        self._spotless = False
        return Damage(at, why, key)

    def _read(self, size: int) -> bytearray:
        """So many bytes, or all that there are."""
        found = bytearray()
        for piece in self._pieces(size):
            found = _joined(found, piece)
        return found

    def _pieces(self, size: int) -> Iterator[bytearray]:
        """So many bytes, or all that there are, some at a time."""
        while size > 0:
            piece = bytearray(min(size, PIECE_BYTES))
            view, at = memoryview(piece), 0
            while at < len(piece):
                count = self._file.readinto(view[at:])  # type: ignore[attr-defined]
                if not count:
                    break
                at += count
            view.release()
            self._at += at
            size = size - at if at == len(piece) else 0
            del piece[at:]
            if piece:
                yield piece


def _joined(found: bytearray, piece: bytearray) -> bytearray:
    """Mostly there is one piece, which is not copied."""
    if not found:
        return piece
    found += piece
    return found
