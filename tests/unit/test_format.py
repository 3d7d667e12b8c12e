"""Bytes on disk: what is packed is parsed again, and whatever else lies there is a FormatError."""

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from kvproto.ids import NamespaceDigest
from kvproto.limits import KIB, MIB, PAGE_BYTES
from kvstore.tier import format as tier
from kvstore.tier.format import (
    CHUNK_BYTES,
    CHUNK_SLOTS,
    HEADER,
    HEADER_BYTES,
    IDENTITY_BYTES_MAX,
    RECORD,
    SUPERBLOCK,
    Codec,
    FormatError,
    Header,
    Superblock,
    open_chunk,
    pack_header_into,
    pack_superblock,
    parse_header,
    parse_superblock,
    seal_chunk,
    slot_offset,
    stored_slot_bytes,
)

WHOLE = Header(
    key=bytes(range(32)), parent=bytes(range(32, 64)), digest=NamespaceDigest(bytes(range(64, 96))), tenant="zoë",
    generation=2**63 + 1, parent_generation=2**62, parent_segment=2**31, parent_slot=2**30, segment=2**29, slot=2**28,
    block_bytes=2**36, stored_bytes=2**32 - 1, checksum=2**64 - 1, stored_checksum=2**64 - 2,
    codec=Codec.BF16_PLANES_ZSTD, identity=b"canonical",
)  # fmt: skip
SUPER = Superblock(7, 64 * MIB, 2 * MIB + PAGE_BYTES, 1_700_000_000, b"0123456789abcdef", "zoë")


def page_of(header: Header) -> bytearray:
    page = bytearray(b"\xa5" * HEADER_BYTES)
    pack_header_into(memoryview(page), header)
    return page


def sealed(page: bytes | bytearray) -> bytes:
    """The same page with a checksum that is right."""
    body = bytes(page[:-8])
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def changed(page: bytes | bytearray, offset: int, value: bytes) -> bytes:
    return sealed(bytes(page[:offset]) + value + bytes(page[offset + len(value) :]))


def test_a_header_comes_back_as_it_was() -> None:
    assert parse_header(page_of(WHOLE)) == WHOLE


@pytest.mark.parametrize(
    "header",
    [
        replace(WHOLE, identity=b""),
        replace(WHOLE, identity=b"i" * IDENTITY_BYTES_MAX),
        replace(WHOLE, tenant="t" * 64),
        replace(WHOLE, parent=bytes(32), parent_generation=0, parent_segment=0, parent_slot=0),
        replace(WHOLE, block_bytes=1, stored_bytes=1, codec=Codec.RAW),
    ],
)
def test_a_header_comes_back_at_its_limits(header: Header) -> None:
    assert parse_header(page_of(header)) == header


def test_an_identity_that_is_too_long_is_left_out() -> None:
    header = replace(WHOLE, identity=b"i" * (IDENTITY_BYTES_MAX + 1))
    assert parse_header(page_of(header)) == replace(header, identity=b"")


def test_what_a_page_held_before_does_not_show() -> None:
    first, second = bytearray(HEADER_BYTES), page_of(replace(WHOLE, identity=b"i" * 3000))
    pack_header_into(memoryview(first), WHOLE)
    pack_header_into(memoryview(second), WHOLE)
    assert first == second


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"k" * 32}, {"parent": b"k" * 32}, {"digest": b"k" * 32}, {"tenant": "b"}, {"generation": 1},
        {"parent_generation": 1}, {"parent_segment": 1}, {"parent_slot": 1}, {"segment": 1}, {"slot": 1},
        {"block_bytes": 1}, {"stored_bytes": 1}, {"checksum": 1}, {"stored_checksum": 1}, {"codec": Codec.RAW},
        {"identity": b"other"},
    ],
)  # fmt: skip
def test_every_field_of_a_header_shows_when_it_differs(change: dict[str, object]) -> None:
    other = replace(WHOLE, **change)  # type: ignore[arg-type]
    assert page_of(other) != page_of(WHOLE)
    assert parse_header(page_of(other)) == other != WHOLE


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_of_a_header_is_guarded(flip: int) -> None:
    page = page_of(WHOLE)
    for offset in range(HEADER_BYTES):
        page[offset] ^= flip
        with pytest.raises(FormatError):
            parse_header(page)
        page[offset] ^= flip
    assert parse_header(page) == WHOLE


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_every_byte_of_a_superblock_is_guarded(flip: int) -> None:
    page = bytearray(pack_superblock(SUPER))
    for offset in range(PAGE_BYTES):
        page[offset] ^= flip
        with pytest.raises(FormatError):
            parse_superblock(page)
        page[offset] ^= flip
    assert parse_superblock(page) == SUPER


@pytest.mark.parametrize("parse", [parse_header, parse_superblock])
@pytest.mark.parametrize("page", [bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES, b"", bytes(100), bytes(PAGE_BYTES + 1)])
def test_zeros_noise_and_pages_of_another_length_are_nothing(parse: Callable[[bytes], object], page: bytes) -> None:
    with pytest.raises(FormatError):
        parse(page)


def test_a_header_is_no_superblock_and_the_other_way_round() -> None:
    with pytest.raises(FormatError, match="magic"):
        parse_superblock(page_of(WHOLE))
    with pytest.raises(FormatError, match="magic"):
        parse_header(pack_superblock(SUPER))


@pytest.mark.parametrize("version", [0, 3, 2**32 - 1])
def test_another_version_is_never_guessed_at(version: int) -> None:
    number = struct.pack("<I", version)
    with pytest.raises(FormatError, match=f"version {version}"):
        parse_header(changed(page_of(WHOLE), 8, number))
    with pytest.raises(FormatError, match=f"version {version}"):
        parse_superblock(changed(pack_superblock(SUPER), 8, number))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (12, struct.pack("<I", 2)),  # codec
        (16, bytes(8)),  # generation
        (48, bytes(8)),  # block bytes
        (56, bytes(4)),  # stored bytes
        (76, struct.pack("<I", IDENTITY_BYTES_MAX + 1)),
        (180, b"\xff" * 4),  # tenant: not UTF-8
    ],
)
def test_a_header_that_makes_no_sense_is_an_error_though_its_checksum_is_right(offset: int, value: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(changed(page_of(WHOLE), offset, value))


@pytest.mark.parametrize(
    ("segment_bytes", "slot_bytes"),
    [(MIB, 0), (MIB, PAGE_BYTES), (MIB, 3 * PAGE_BYTES + 1), (MIB, MIB), (0, 2 * PAGE_BYTES)],
)
def test_a_superblock_without_room_for_a_slot_is_an_error(segment_bytes: int, slot_bytes: int) -> None:
    with pytest.raises(FormatError):
        parse_superblock(pack_superblock(replace(SUPER, segment_bytes=segment_bytes, slot_bytes=slot_bytes)))


def test_the_fields_lie_where_the_drawing_says() -> None:
    page = page_of(WHOLE)
    assert (SUPERBLOCK.size, HEADER.size) == (120, 244)
    assert page[:8] == b"KVBLOCK\0"
    assert bytes(page[84:180]) == WHOLE.key + WHOLE.parent + WHOLE.digest
    assert page[180:244] == "zoë".encode().ljust(64, b"\0")
    assert page[244:253] == b"canonical"
    assert not any(page[253:-8])
    assert list(RECORD.names or ()) == [
        "key", "generation", "parent_generation", "checksum", "parent_segment", "parent_slot", "namespace", "touched_s",
    ]  # fmt: skip
    assert RECORD.itemsize == 72
    assert CHUNK_BYTES == 4040


def test_slots_follow_the_superblock_and_end_before_the_file_does() -> None:
    assert slot_offset(SUPER.slot_bytes, 0) == PAGE_BYTES
    end = slot_offset(SUPER.slot_bytes, SUPER.slots)
    assert end <= SUPER.segment_bytes < end + SUPER.slot_bytes


@pytest.mark.parametrize(
    ("stored_bytes", "slot_bytes"),
    [(1, 8 * KIB), (4096, 8 * KIB), (4097, 12 * KIB), (2 * MIB, 2 * MIB + 4 * KIB)],
)
def test_a_slot_is_whole_pages_and_one_for_the_header(stored_bytes: int, slot_bytes: int) -> None:
    assert stored_slot_bytes(stored_bytes) == slot_bytes


def test_a_chunk_comes_back_as_it_was() -> None:
    records = np.zeros(CHUNK_SLOTS, RECORD)
    records["generation"] = np.arange(CHUNK_SLOTS)
    opened = np.frombuffer(open_chunk(seal_chunk(records.tobytes())), RECORD)
    assert np.array_equal(opened, records)


def test_every_byte_of_a_chunk_is_guarded() -> None:
    value = bytearray(seal_chunk(np.ones(CHUNK_SLOTS * RECORD.itemsize, np.uint8).tobytes()))
    for offset in range(CHUNK_BYTES):
        value[offset] ^= 0x10
        with pytest.raises(FormatError):
            open_chunk(bytes(value))
        value[offset] ^= 0x10
    open_chunk(bytes(value))


@pytest.mark.parametrize("length", [0, 7, CHUNK_BYTES - 1, CHUNK_BYTES + 1])
def test_a_chunk_of_another_length_is_an_error(length: int) -> None:
    with pytest.raises(FormatError):
        open_chunk(seal_chunk(bytes(CHUNK_SLOTS * RECORD.itemsize)).ljust(length, b"\0")[:length])


def test_an_empty_record_is_all_zeros() -> None:
    records = np.frombuffer(open_chunk(seal_chunk(bytes(CHUNK_SLOTS * RECORD.itemsize))), RECORD)
    assert not records["generation"].any()


def test_numbers_of_codecs_never_change() -> None:
    assert {codec.name: codec.value for codec in tier.Codec} == {"RAW": 0, "BF16_PLANES_ZSTD": 1}
