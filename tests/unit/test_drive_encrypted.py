"""Segments that are encrypted: nothing of a block is on disk as it is in memory, and no byte may change unnoticed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvkernels.planes import pack
from kvproto.limits import PAGE_BYTES, slot_bytes_for
from kvstore.tier.format import (
    ENCRYPTED_VERSION,
    FORMAT_VERSION,
    HEADER_BYTES,
    Codec,
    bound_to,
    parse_header,
    parse_superblock,
    slot_offset,
)
from kvstore.tier.orders import DropSegment, Load, Outcome, Packed, Save
from kvstored.drive_keys import PIECE_BYTES, BlockCipher, keys_of_store
from kvstored.key_file import KeyRing, key_id
from tests.segments import flip, patch
from tests.unit.drive_kit import STORE, Place, Rig, load_of, save_of

DONE, DAMAGED, GONE = Outcome.DONE, Outcome.DAMAGED, Outcome.GONE
OLD, NEW = bytes(range(32)), bytes(range(1, 33))
BLOCK_BYTES = 3 * PIECE_BYTES + 4097  # neither whole pieces nor whole pages
SAMPLE_BYTES = 64


def rig_with(home: Path, *keys: bytes, store: bytes = STORE) -> Rig:
    return Rig([home], store=store, keys=keys_of_store(KeyRing(keys), STORE) if keys else None)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with rig_with(tmp_path / "disk", NEW) as made:
        yield made


def file_of(rig: Rig) -> bytes:
    return rig.path(1).read_bytes()


def slot_at(save: Save) -> int:
    return slot_offset(save.slot_bytes, save.header.slot)


def loads(rig: Rig, places: list[Place], saves: list[Save]) -> list[Outcome]:
    rig.arena[:] = 0
    return rig.run([load_of(save, place) for save, place in zip(saves, places, strict=True)])


def adopted(rig: Rig) -> Rig:
    """As at the start of another life."""
    rig.drives.adopt(1, rig.directories[0])
    return rig


# -- what is written is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_bytes", [1, 100, 4095, 4096, 4097, PIECE_BYTES, PIECE_BYTES + 1, BLOCK_BYTES])
def test_blocks_of_any_size_come_back_as_they_were(rig: Rig, block_bytes: int) -> None:
    wanted = [rig.content(place).copy() for place in rig.fill(3, block_bytes)]
    places, saves = rig.save_blocks(1, 3, block_bytes)
    assert loads(rig, places, saves) == [DONE] * 3
    for place, content in zip(places, wanted, strict=True):
        assert np.array_equal(rig.content(place), content)
    assert block_bytes < 100 or not np.array_equal(rig.content(places[0]), wanted[1]), "the control is equal as well"


def test_a_block_that_got_smaller_is_packed_first_and_comes_back(rig: Rig) -> None:
    place = Place(0, BLOCK_BYTES)
    rig.arena[:BLOCK_BYTES] = np.arange(BLOCK_BYTES) // 4096 % 7
    wanted = rig.content(place).copy()
    done = pack(rig.content(place), BLOCK_BYTES // 2)
    assert done is not None
    content, stored_bytes = done
    packed = Packed(
        Codec.BF16_PLANES_ZSTD, stored_bytes, xxhash.xxh3_64_intdigest(content[:stored_bytes].data), content
    )
    save = save_of(rig, 1, 0, place, packed)
    assert save.slot_bytes < HEADER_BYTES + slot_bytes_for(BLOCK_BYTES)
    assert rig.make(1, save.slot_bytes) is DONE
    assert rig.run([save]) == [DONE]
    assert content[:stored_bytes].tobytes()[:SAMPLE_BYTES] not in file_of(rig), "packed in the clear"
    assert loads(rig, [place], [save]) == [DONE]
    assert np.array_equal(rig.content(place), wanted)
    flip(rig.path(1), 8 * (slot_at(save) + HEADER_BYTES + stored_bytes // 2))
    assert loads(rig, [place], [save]) == [DAMAGED]


def test_nothing_of_a_block_or_of_what_lies_behind_it_in_memory_is_in_the_file(tmp_path: Path) -> None:
    found = {}
    for name, keys in (("clear", ()), ("encrypted", (NEW,))):
        with rig_with(tmp_path / name, *keys) as rig:
            places = rig.fill(4, BLOCK_BYTES)
            samples = [rig.content(place)[at : at + SAMPLE_BYTES].tobytes() for place in places
                       for at in (0, PIECE_BYTES, BLOCK_BYTES - SAMPLE_BYTES)]  # fmt: skip
            ends = [place.offset + BLOCK_BYTES for place in places]
            behind = [rig.arena[end : end + SAMPLE_BYTES].tobytes() for end in ends]
            rig.save_blocks(1, 4, BLOCK_BYTES)
            content = file_of(rig)
            found[name] = sum(sample in content for sample in samples), sum(sample in content for sample in behind)
    assert found["clear"] == (12, 4), "the search finds what is there"
    assert found["encrypted"] == (0, 0)


def test_the_same_block_is_never_the_same_twice_on_disk(rig: Rig) -> None:
    places = rig.fill(1, BLOCK_BYTES)
    save = save_of(rig, 1, 0, places[0])
    assert rig.make(1, save.slot_bytes) is DONE
    written = []
    for _ in range(2):
        assert rig.run([save_of(rig, 1, 0, places[0])]) == [DONE]
        written.append(file_of(rig)[slot_at(save) : slot_at(save) + save.slot_bytes])
    first, second = (parse_header(slot[:HEADER_BYTES]) for slot in written)
    assert first.nonce != second.nonce
    assert written[0][HEADER_BYTES:][:64] != written[1][HEADER_BYTES:][:64]
    assert replace(first, nonce=b"", tag=b"", stored_checksum=0) == replace(
        second, nonce=b"", tag=b"", stored_checksum=0
    )


def test_pages_say_that_they_are_encrypted_and_others_are_what_they_always_were(rig: Rig, tmp_path: Path) -> None:
    _, saves = rig.save_blocks(1, 1, 100)
    content = file_of(rig)
    assert parse_superblock(content[:PAGE_BYTES]).key_id == key_id(NEW)
    assert int.from_bytes(content[8:12], "little") == ENCRYPTED_VERSION == 2
    at = slot_at(saves[0])
    assert int.from_bytes(content[at + 8 : at + 12], "little") == ENCRYPTED_VERSION
    with rig_with(tmp_path / "clear") as clear:
        clear.save_blocks(1, 1, 100)
        content = file_of(clear)
    assert parse_superblock(content[:PAGE_BYTES]).key_id == b""
    assert content[8:12] == content[at + 8 : at + 12] == FORMAT_VERSION.to_bytes(4, "little") == b"\1\0\0\0"
    assert not any(content[at + 4056 : at + 4088])


# -- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 1, BLOCK_BYTES)
    at, path = slot_at(saves[0]), rig.path(1)
    header_bits = [8 * byte + byte % 8 for byte in range(0, HEADER_BYTES, 37)]
    payload_bits = [8 * (HEADER_BYTES + byte) for byte in (0, 1, PIECE_BYTES, BLOCK_BYTES // 2, BLOCK_BYTES - 1)]
    for bit in header_bits + payload_bits:
        flip(path, 8 * at + bit)
        assert loads(rig, places, saves) == [DAMAGED], f"bit {bit}"
        flip(path, 8 * at + bit)
    assert loads(rig, places, saves) == [DONE], "the control"


def test_a_payload_under_another_blocks_header_is_found_though_all_checksums_are_right(rig: Rig) -> None:
    """What no checksum finds: header and payload are whole, and belong to two blocks that were in one place."""
    places = rig.fill(1, 4096)
    first, second = save_of(rig, 1, 0, places[0]), save_of(rig, 1, 0, places[0])
    second.header = replace(second.header, generation=999)
    assert rig.make(1, first.slot_bytes) is DONE
    at = slot_at(first) + HEADER_BYTES
    assert rig.run([first]) == [DONE]
    old = file_of(rig)[at : at + 4096]
    assert rig.run([second]) == [DONE]
    assert loads(rig, places, [second]) == [DONE]
    patch(rig.path(1), at, old)
    assert loads(rig, places, [second]) == [DAMAGED]


def test_a_tag_binds_a_payload_to_its_header() -> None:
    cipher = BlockCipher(b"i" * 16, NEW)
    plain, into, back = np.arange(256, dtype=np.uint8), np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    nonce, tag = cipher.encrypt(plain, into, b"this block")
    assert cipher.decrypt(into, back, b"this block", nonce, tag)
    assert np.array_equal(back, plain)
    assert not cipher.decrypt(into, back, b"that block", nonce, tag)
    assert not BlockCipher(b"i" * 16, OLD).decrypt(into, back, b"this block", nonce, tag)


def test_what_a_payload_is_bound_to_says_all_but_what_is_known_later(rig: Rig) -> None:
    header = save_of(rig, 1, 0, rig.fill(1, 100)[0]).header
    assert bound_to(replace(header, stored_checksum=1, nonce=b"n" * 12, tag=b"t" * 16)) == bound_to(header)
    others = {
        "key": b"k" * 32, "parent": b"p" * 32, "digest": b"x" * 32, "tenant": "b", "generation": 9,
        "parent_generation": 9, "parent_segment": 9, "parent_slot": 9, "segment": 9, "slot": 9, "block_bytes": 9,
        "stored_bytes": 9, "checksum": 9, "codec": Codec.BF16_PLANES_ZSTD, "identity": b"other",
    }  # fmt: skip
    for name, value in others.items():
        assert bound_to(replace(header, **{name: value})) != bound_to(header), name  # type: ignore[arg-type]


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(OLD,), ()], ids=["another key", "no key"])
def test_without_its_key_a_segment_is_gone_and_its_file_stays_as_it_is(tmp_path: Path, keys: tuple[bytes, ...]) -> None:
    with rig_with(tmp_path / "disk", NEW) as rig:
        places, saves = rig.save_blocks(1, 1, BLOCK_BYTES)
    before = file_of(rig)
    with adopted(rig_with(tmp_path / "disk", *keys)) as other:
        assert loads(other, places, saves) == [GONE]
        assert other.drives.gone_segments() == [1]
        assert not other.arena.any()
    assert file_of(rig) == before
    with adopted(rig_with(tmp_path / "disk", NEW)) as again:
        assert loads(again, places, saves) == [DONE]


def test_with_a_key_nothing_is_read_from_or_written_to_a_segment_in_the_clear(tmp_path: Path) -> None:
    with rig_with(tmp_path / "disk") as rig:
        places, saves = rig.save_blocks(1, 2, 100)
    before = file_of(rig)
    with adopted(rig_with(tmp_path / "disk", NEW)) as other:
        assert other.run([load_of(saves[0], places[0])]) == [GONE]
        assert other.run([save_of(other, 1, 1, other.fill(2, 100)[1])]) == [GONE]
    assert file_of(rig) == before


def test_a_new_key_writes_and_the_old_one_still_reads(tmp_path: Path) -> None:
    with rig_with(tmp_path / "disk", OLD) as rig:
        places, saves = rig.save_blocks(1, 1, BLOCK_BYTES)
    with adopted(rig_with(tmp_path / "disk", NEW, OLD)) as both:
        assert loads(both, places, saves) == [DONE]
        places, saves = both.save_blocks(2, 1, BLOCK_BYTES)
        assert parse_superblock(both.path(2).read_bytes()[:PAGE_BYTES]).key_id == key_id(NEW)
        assert loads(both, places, saves) == [DONE]
        assert both.run([DropSegment(1)]) == [DONE]


def test_two_stores_with_one_key_file_have_no_key_in_common() -> None:
    ring = KeyRing((NEW,))
    one, other = keys_of_store(ring, b"a" * 16).newest, keys_of_store(ring, b"b" * 16).newest
    plain, into = np.zeros(64, np.uint8), np.zeros(64, np.uint8)
    nonce, tag = one.encrypt(plain, into, b"")
    assert keys_of_store(ring, b"a" * 16).newest.decrypt(into, plain, b"", nonce, tag)
    assert not other.decrypt(into, plain, b"", nonce, tag)
    assert NEW.hex() not in repr(ring)


def test_a_raw_order_never_takes_an_encrypted_header(tmp_path: Path) -> None:
    """A superblock in the clear over encrypted slots: somebody has put the file together."""
    with rig_with(tmp_path / "one", NEW) as rig:
        places, saves = rig.save_blocks(1, 1, 100)
    with rig_with(tmp_path / "two") as clear:
        clear.save_blocks(1, 1, 100)
    patch(rig.path(1), 0, file_of(clear)[:PAGE_BYTES])
    with adopted(rig_with(tmp_path / "one")) as mixed:
        load: Load = load_of(saves[0], places[0])
        assert mixed.run([load]) == [DAMAGED]
