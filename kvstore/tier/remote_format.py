"""Objects of the remote tier: names, and the page that every object begins with. Pure; any thread.

    name      v1/TENANT/NAMESPACE/FIRST/COUNT.MARKS
              TENANT, NAMESPACE  digests of the tenant's name and of the namespace's identity, 32 hex digits each
              FIRST              digest of namespace and first key, 40 hex digits
              COUNT              blocks, decimal; with a z behind it where blocks may be encoded
              MARKS              for each block after the first one, three letters of its key's digest
    content   header page (4,096 bytes), then the blocks, one behind the other, each as its codec says

So one listing of `v1/TENANT/NAMESPACE/FIRST/` tells all runs that begin with a block, how long each is, and, with a
chance of 1 in 262,144 a block of being wrong, how far it goes along with a chain. What is read is compared with whole
keys. Names have neither keys nor salts nor names of tenants in them. An earlier daemon takes a name with a z for none
of its own, and leaves it alone.

    header    "KVREMOTE", u32 version, u32 count, u32 block bytes, u32 0, namespace digest (32), tenant digest (16),
              parent's key (32; zeros: none), then for each block its key (32), XXH3-64 of its bytes as they were before
              they were encoded, u32 stored bytes, u8 codec (format.py), three zeros; the last 8 bytes are XXH3-64 of
              all before. Version 1: every block is raw; 2: its name has the z.
"""

import base64
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import xxhash

from kvproto.limits import KEY_BYTES
from kvstore.tier.format import Codec, FormatError

FORMAT_VERSION: Final = 1
ENCODED_VERSION: Final = 2  # of headers of objects whose blocks may be encoded
HEADER_BYTES: Final = 4096
OBJECT_BLOCKS: Final = 64
NO_PARENT: Final = bytes(KEY_BYTES)
ALL_PREFIX: Final = f"v{FORMAT_VERSION}/"  # what all names begin with
TENANT_DIGEST_BYTES: Final = 16

_MAGIC: Final = b"KVREMOTE"
_HEAD: Final = struct.Struct("<8sIIII32s16s32s")
_BLOCK: Final = struct.Struct("<32sQIB3x")
_SUM: Final = struct.Struct("<Q")
_FIRST_BYTES: Final = 20
_MARK: Final = 3  # letters: 18 bits
_ENCODED: Final = "z"
MARKS: Final = 1 << 6 * _MARK
_DIGEST: Final = re.compile(f"[0-9a-f]{{{2 * _FIRST_BYTES}}}")
_MARKS: Final = re.compile(r"[A-Za-z0-9_-]*")  # names are logged
assert _HEAD.size + OBJECT_BLOCKS * _BLOCK.size + _SUM.size <= HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Place:
    """Where objects of one namespace of one tenant lie."""

    tenant: bytes  # TENANT_DIGEST_BYTES
    namespace: bytes  # 32

    @property
    def prefix(self) -> str:
        """What all their names begin with."""
        return f"{tenant_prefix(self.tenant)}{self.namespace[:16].hex()}/"


@dataclass(frozen=True, slots=True)
class ObjectHeader:
    """The first page of an object. `stored`: of each block its codec and so many bytes; empty: all of them are raw."""

    place: Place
    parent: bytes  # NO_PARENT: a chain begins here
    keys: tuple[bytes, ...]
    checksums: tuple[int, ...]  # of the blocks as they are, not as they are stored
    block_bytes: int
    stored: tuple[tuple[Codec, int], ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """Where in the object the header ends, and each of its blocks."""
        sizes = [size for _, size in self.stored] or [self.block_bytes] * len(self.keys)
        return tuple(accumulate(sizes, initial=HEADER_BYTES))


def tenant_digest(name: str) -> bytes:
    """What stands for a tenant in names: equal on all hosts that give it the same name."""
    return hashlib.blake2b(name.encode(), digest_size=TENANT_DIGEST_BYTES, person=b"kvstored tenant").digest()


def tenant_prefix(digest: bytes) -> str:
    """What names of all objects of a tenant begin with."""
    return f"{ALL_PREFIX}{digest.hex()}/"


def key_digest(place: Place, key: bytes) -> bytes:
    """What stands for a key in names."""
    return hashlib.blake2b(place.namespace + key, digest_size=_FIRST_BYTES, person=b"kvstored key").digest()


def runs_prefix(place: Place, digest: bytes) -> str:
    """What names of all runs that begin with a key of this digest begin with."""
    return f"{place.prefix}{digest.hex()}/"


def mark_of(digest: bytes) -> str:
    """The letters that stand for a key of this digest inside a run."""
    return base64.urlsafe_b64encode(digest[-3:])[:_MARK].decode()


def name_of(place: Place, keys: Sequence[bytes], *, encoded: bool = False) -> str:
    """The object that holds this run."""
    assert 0 < len(keys) <= OBJECT_BLOCKS, "an object of no or too many blocks"
    digests = [key_digest(place, key) for key in keys]
    count = f"{len(keys)}{_ENCODED if encoded else ''}"
    return f"{runs_prefix(place, digests[0])}{count}.{''.join(map(mark_of, digests[1:]))}"


def is_encoded(name: str) -> bool:
    """May the blocks of such an object be encoded? Then its header says where they lie."""
    return name[name.rfind("/") + 1 :].partition(".")[0].endswith(_ENCODED)


def fits(name: str, object_bytes: int, block_bytes: int) -> bool:
    """May an object of this name be so long? Of one that is cut short, or has more behind it, nothing is believed."""
    count = int(name[name.rfind("/") + 1 :].partition(".")[0].removesuffix(_ENCODED))
    most = HEADER_BYTES + count * block_bytes
    return HEADER_BYTES + count <= object_bytes <= most if is_encoded(name) else object_bytes == most


def marks_in(name: str, prefix: str) -> tuple[str, ...] | None:
    """The marks in a listed name; None: it is not one of ours."""
    count, dot, marks = name.removeprefix(prefix).partition(".")
    count = count.removesuffix(_ENCODED)
    if not name.startswith(prefix) or not dot or not count.isdecimal() or len(count) > 2 or count.startswith("0"):
        return None
    blocks = int(count)
    if not 0 < blocks <= OBJECT_BLOCKS or len(marks) != _MARK * (blocks - 1) or not _MARKS.fullmatch(marks):
        return None
    return tuple(marks[at : at + _MARK] for at in range(0, len(marks), _MARK))


def marks_of(name: str) -> tuple[str, ...]:
    """The marks of all blocks of an object, the first one included; none: it is no name of ours."""
    folder = name[: name.rfind("/") + 1]
    marks, first = marks_in(name, folder), folder[folder.rfind("/", 0, -1) + 1 : -1]
    if marks is None or _DIGEST.fullmatch(first) is None:  # some names the far side has said
        return ()
    return (mark_of(bytes.fromhex(first)), *marks)


def mark_numbers(marks: Sequence[str]) -> list[int]:
    """The letters as numbers below `MARKS`."""
    raw = base64.urlsafe_b64decode("".join(f"{mark}A" for mark in marks))
    return [int.from_bytes(raw[at : at + 3], "big") >> 6 for at in range(0, len(raw), 3)]


def common(marks: Sequence[str], wanted: Sequence[str]) -> int:
    """How many blocks a run that begins with the wanted one has of what is wanted, as far as marks tell."""
    same = 1
    for mark, other in zip(marks, wanted, strict=False):
        if mark != other:
            break
        same += 1
    return same


def pack_header(header: ObjectHeader) -> bytes:
    """The page."""
    page = bytearray(HEADER_BYTES)
    place = header.place
    version = ENCODED_VERSION if header.stored else FORMAT_VERSION
    _HEAD.pack_into(
        page, 0, _MAGIC, version, len(header.keys), header.block_bytes, 0, place.namespace, place.tenant, header.parent
    )
    stored = header.stored or ((Codec.RAW, header.block_bytes),) * len(header.keys)
    at = _HEAD.size
    for key, checksum, (codec, stored_bytes) in zip(header.keys, header.checksums, stored, strict=True):
        _BLOCK.pack_into(page, at, key, checksum, stored_bytes, codec)
        at += _BLOCK.size
    _SUM.pack_into(page, HEADER_BYTES - _SUM.size, xxhash.xxh3_64_intdigest(page[: -_SUM.size]))
    return bytes(page)


def is_ours(page: bytes) -> bool:
    """Does it begin as all objects do? Else it may be anything, and nobody's object at all."""
    return page.startswith(_MAGIC)


def parse_header(page: bytes) -> ObjectHeader:
    """Raises FormatError for whatever `pack_header` has not made."""
    if len(page) != HEADER_BYTES:
        raise FormatError(f"a header of {len(page)} bytes")
    if xxhash.xxh3_64_intdigest(page[: -_SUM.size]) != _SUM.unpack_from(page, HEADER_BYTES - _SUM.size)[0]:
        raise FormatError("the header's checksum is wrong")
    magic, version, count, block_bytes, _, namespace, tenant, parent = _HEAD.unpack_from(page)
    if magic != _MAGIC or version not in {FORMAT_VERSION, ENCODED_VERSION}:
        raise FormatError(f"not an object of version {FORMAT_VERSION} or {ENCODED_VERSION}")
    if not 0 < count <= OBJECT_BLOCKS or not block_bytes:
        raise FormatError(f"{count} blocks of {block_bytes} bytes")
    keys, checksums, stored = [], [], []
    for number in range(count):
        key, checksum, stored_bytes, codec = _BLOCK.unpack_from(page, _HEAD.size + number * _BLOCK.size)
        raw = codec == Codec.RAW and stored_bytes == block_bytes
        smaller = codec == Codec.BF16_PLANES_ZSTD and 0 < stored_bytes < block_bytes and version == ENCODED_VERSION
        if not raw and not smaller:
            raise FormatError(f"a block of codec {codec} in {stored_bytes} bytes")
        keys.append(key)
        checksums.append(checksum)
        stored.append((Codec(codec), stored_bytes))
    return ObjectHeader(
        Place(tenant, namespace), parent, tuple(keys), tuple(checksums), block_bytes,
        tuple(stored) if version == ENCODED_VERSION else (),
    )  # fmt: skip
