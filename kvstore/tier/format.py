"""What lies on disk, byte by byte; FORMAT.md draws it. Packing and parsing only, no I/O. Any thread.

Everything read from disk goes through `parse_superblock`, `parse_header` or `open_chunk`, which believe nothing but
checksums and raise FormatError.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import xxhash

from kvproto.ids import NamespaceDigest
from kvproto.limits import KEY_BYTES, NAME_BYTES, PAGE_BYTES

FORMAT_VERSION: Final = 1
ENCRYPTED_VERSION: Final = 2  # of a segment whose payloads are encrypted, and of its headers
KEY_ID_BYTES: Final = 16
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
HEADER_BYTES: Final = PAGE_BYTES
IDENTITY_BYTES_MAX: Final = 3072

SUPERBLOCK: Final = struct.Struct("<8sIIQQQ16s64s")  # magic, version, segment, segment bytes, slot bytes, made, store
HEADER: Final = struct.Struct("<8sIIQQQQQIIIIIII32s32s32s64s")
_SUM: Final = struct.Struct("<Q")
_SUM_AT: Final = HEADER_BYTES - _SUM.size
_KEY_ID_AT: Final = SUPERBLOCK.size
_NONCE_AT: Final = _SUM_AT - 32  # and the tag behind it, in a header of version 2
_TAG_AT: Final = _NONCE_AT + NONCE_BYTES
_SEGMENT_MAGIC: Final = b"KVSEGMNT"
_BLOCK_MAGIC: Final = b"KVBLOCK\0"

# What the index keeps of a slot. All zeros (generation 0): nothing lies there.
RECORD: Final = np.dtype(
    [
        ("key", "<u8", (4,)),
        ("generation", "<u8"),
        ("parent_generation", "<u8"),  # 0: the chain begins here
        ("checksum", "<u8"),
        ("parent_segment", "<u4"),
        ("parent_slot", "<u4"),
        ("namespace", "<u4"),  # number that the index gave it for good
        ("touched_s", "<u4"),  # seconds since 1970
    ]
)
UNREAD: Final = (1 << 32) - 1  # in `namespace` with generation 0: the header there could not be read at this start
# 56 records and their checksum fill the 4,080 bytes that LMDB can use of one page of its own.
CHUNK_SLOTS: Final = 56
CHUNK_BYTES: Final = CHUNK_SLOTS * RECORD.itemsize + _SUM.size
assert CHUNK_BYTES <= 4080


class Codec(IntEnum):
    """How a payload is stored. Numbers are never reused."""

    RAW = 0
    BF16_PLANES_ZSTD = 1


class FormatError(Exception):
    """Bytes that are not what they should be: damaged, torn, somebody else's, or of another version."""


@dataclass(frozen=True, slots=True)
class Superblock:
    """The first page of a segment file."""

    segment: int
    segment_bytes: int
    slot_bytes: int  # header and payload
    made_s: int
    store: bytes  # 16 random bytes that all segments and the index of one store share
    tenant: str
    key_id: bytes = b""  # of the key that its payloads are encrypted with; empty: they are not

    @property
    def slots(self) -> int:
        """How many slots follow."""
        return (self.segment_bytes - HEADER_BYTES) // self.slot_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The first page of a slot: whose bytes follow, and how to know them again."""

    key: bytes
    parent: bytes  # zeros where the chain begins
    digest: NamespaceDigest
    tenant: str
    generation: int
    parent_generation: int
    parent_segment: int
    parent_slot: int
    segment: int  # its own place: a write that went astray is found out
    slot: int
    block_bytes: int
    stored_bytes: int
    checksum: int  # XXH3-64 of the block
    stored_checksum: int  # XXH3-64 of the stored bytes; the same for RAW
    codec: Codec
    identity: bytes = b""  # canonical form of the namespace; empty if longer than IDENTITY_BYTES_MAX
    nonce: bytes = b""  # empty: not encrypted
    tag: bytes = b""


def slot_offset(slot_bytes: int, slot: int) -> int:
    """Where a slot begins in its segment."""
    return HEADER_BYTES + slot * slot_bytes


def stored_slot_bytes(stored_bytes: int) -> int:
    """Size of the slot that a payload needs: whole pages, and one for the header."""
    return HEADER_BYTES + -(-stored_bytes // PAGE_BYTES) * PAGE_BYTES


def pack_superblock(superblock: Superblock) -> bytes:
    """One page."""
    assert len(superblock.key_id) in {0, KEY_ID_BYTES}
    version = ENCRYPTED_VERSION if superblock.key_id else FORMAT_VERSION
    fixed = SUPERBLOCK.pack(
        _SEGMENT_MAGIC, version, superblock.segment, superblock.segment_bytes, superblock.slot_bytes,
        superblock.made_s, superblock.store, superblock.tenant.encode(),
    )  # fmt: skip
    return _seal(fixed + superblock.key_id)


def parse_superblock(page: bytes | bytearray | memoryview) -> Superblock:
    """Raises FormatError."""
    _check_seal(page)
    magic, version, segment, segment_bytes, slot_bytes, made_s, store, tenant = SUPERBLOCK.unpack_from(page)
    _check_magic(magic, _SEGMENT_MAGIC, version)
    if slot_bytes < 2 * PAGE_BYTES or slot_bytes % PAGE_BYTES or segment_bytes < HEADER_BYTES + slot_bytes:
        raise FormatError(f"slots of {slot_bytes} bytes in a segment of {segment_bytes}")
    key_id = bytes(page[_KEY_ID_AT : _KEY_ID_AT + KEY_ID_BYTES]) if version == ENCRYPTED_VERSION else b""
    return Superblock(segment, segment_bytes, slot_bytes, made_s, store, _name(tenant), key_id)


def pack_header_into(page: memoryview, header: Header) -> None:
    """Fill one page; what it held before does not matter."""
    fixed = _fixed(header, ENCRYPTED_VERSION if header.nonce else FORMAT_VERSION, header.stored_checksum)
    page[: len(fixed)] = fixed
    page[len(fixed) : _SUM_AT] = bytes(_SUM_AT - len(fixed))
    if header.nonce:
        page[_NONCE_AT:_TAG_AT] = header.nonce
        page[_TAG_AT : _TAG_AT + TAG_BYTES] = header.tag
    _SUM.pack_into(page, _SUM_AT, xxhash.xxh3_64_intdigest(page[:_SUM_AT]))


def bound_to(header: Header) -> bytes:
    """What an encrypted payload is bound to: all that its header says, but for what is known only afterwards."""
    return _fixed(header, ENCRYPTED_VERSION, 0)


def _fixed(header: Header, version: int, stored_checksum: int) -> bytes:
    identity = header.identity if len(header.identity) <= IDENTITY_BYTES_MAX else b""
    fixed = HEADER.pack(
        _BLOCK_MAGIC, version, header.codec, header.generation, header.parent_generation,
        header.checksum, stored_checksum, header.block_bytes, header.stored_bytes, header.parent_segment,
        header.parent_slot, header.segment, header.slot, len(identity), 0, header.key, header.parent, header.digest,
        header.tenant.encode(),
    )  # fmt: skip
    return fixed + identity


def parse_header(page: bytes | bytearray | memoryview) -> Header:
    """Raises FormatError. Says nothing of whether it is the header that was looked for."""
    _check_seal(page)
    (
        magic, version, codec, generation, parent_generation, checksum, stored_checksum, block_bytes, stored_bytes,
        parent_segment, parent_slot, segment, slot, identity_bytes, _, key, parent, digest, tenant,
    ) = HEADER.unpack_from(page)  # fmt: skip
    _check_magic(magic, _BLOCK_MAGIC, version)
    if not generation or not block_bytes or not stored_bytes or identity_bytes > IDENTITY_BYTES_MAX:
        raise FormatError("a header without a block")
    try:
        known = Codec(codec)
    except ValueError as error:
        raise FormatError(str(error)) from error
    encrypted = version == ENCRYPTED_VERSION
    return Header(
        key, parent, NamespaceDigest(digest), _name(tenant), generation, parent_generation, parent_segment,
        parent_slot, segment, slot, block_bytes, stored_bytes, checksum, stored_checksum, known,
        bytes(page[HEADER.size : HEADER.size + identity_bytes]),
        bytes(page[_NONCE_AT:_TAG_AT]) if encrypted else b"",
        bytes(page[_TAG_AT : _TAG_AT + TAG_BYTES]) if encrypted else b"",
    )  # fmt: skip


def seal_chunk(records: bytes) -> bytes:
    """The value of one index chunk: `CHUNK_SLOTS` records and their checksum."""
    assert len(records) == CHUNK_SLOTS * RECORD.itemsize
    return records + _SUM.pack(xxhash.xxh3_64_intdigest(records))


def open_chunk(value: bytes | memoryview) -> bytes | memoryview:
    """The records of a chunk. Raises FormatError."""
    if len(value) != CHUNK_BYTES:
        raise FormatError(f"an index chunk of {len(value)} bytes")
    records = value[: -_SUM.size]
    if _SUM.unpack_from(value, len(records)) != (xxhash.xxh3_64_intdigest(records),):
        raise FormatError("an index chunk fails its checksum")
    return records


def _seal(fixed: bytes) -> bytes:
    page = fixed + bytes(_SUM_AT - len(fixed))
    return page + _SUM.pack(xxhash.xxh3_64_intdigest(page))


def _check_seal(page: bytes | bytearray | memoryview) -> None:
    if len(page) != HEADER_BYTES:
        raise FormatError(f"a page of {len(page)} bytes")
    if _SUM.unpack_from(page, _SUM_AT) != (xxhash.xxh3_64_intdigest(memoryview(page)[:_SUM_AT]),):
        raise FormatError("a page fails its checksum")


def _check_magic(magic: bytes, wanted: bytes, version: int) -> None:
    if magic != wanted:
        raise FormatError(f"magic {magic!r}")
    if version not in {FORMAT_VERSION, ENCRYPTED_VERSION}:
        raise FormatError(f"format version {version}, and this is version {FORMAT_VERSION}")


def _name(padded: bytes) -> str:
    try:
        return padded.rstrip(b"\0").decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"a tenant's name: {error}") from error


assert HEADER.size + IDENTITY_BYTES_MAX <= _NONCE_AT
assert NAME_BYTES == 64, "tenant names have 64 bytes in both pages"
assert KEY_BYTES == 32
