"""Segment files: what is saved is loaded again or said to be damaged, and no drive stops another or the daemon."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvproto.limits import MIB, PAGE_BYTES
from kvstore.tier.format import Codec, pack_header_into, slot_offset
from kvstore.tier.orders import Erase, Outcome, Pack, Save, Verify
from kvstored.drive_files import BUFFERS_PER_CALL, CALL_BYTES
from kvstored.drive_health import DriveState
from tests.unit.drive_kit import Place, Rig, load_of, namespace_of, save_of

DONE, DAMAGED, FAILED, GONE = Outcome.DONE, Outcome.DAMAGED, Outcome.FAILED, Outcome.GONE
SLOT = 2 * PAGE_BYTES


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig([tmp_path / "one"]) as made:
        yield made


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Rig]:
    with Rig([tmp_path / "one", tmp_path / "two"]) as made:
        yield made


def refuse_direct(_: Path, flags: int) -> None:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no O_DIRECT here")


# -- what is written is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 100, 4095, 4096, 4097, 12_345, 65_536, 1_000_001])
def test_blocks_of_any_size_come_back_as_they_were(tmp_path: Path, block_bytes: int, *, direct: bool) -> None:
    rig = Rig([tmp_path / "one"])
    if not direct:
        rig.files.rules["open"] = refuse_direct
    with rig:
        assert rig.drives.status()[0].direct is direct
        places = rig.fill(3, block_bytes)
        wanted = [rig.content(place).copy() for place in places]
        saves = [save_of(rig, 1, slot, place) for slot, place in enumerate(places)]
        assert rig.make(1, saves[0].slot_bytes) is DONE
        assert rig.run(saves) == [DONE] * 3
        assert rig.path(1).stat().st_size == rig.segment_bytes
        rig.arena[:] = 0
        assert rig.run([load_of(*pair) for pair in zip(saves, places, strict=True)]) == [DONE] * 3
        for place, content in zip(places, wanted, strict=True):
            assert np.array_equal(rig.content(place), content)


def test_neighbours_on_disk_are_one_system_call(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 10, 10_000)
    assert [call for call in rig.files.sizes if call[1] > 1] == [("pwrite", 20, 10 * 4 * PAGE_BYTES)]
    rig.files.sizes.clear()
    assert rig.run([load_of(saves[i], places[i]) for i in range(10)]) == [DONE] * 10
    assert rig.files.sizes == [("pread", 20, 10 * 4 * PAGE_BYTES)]


def test_a_gap_on_disk_is_another_call_and_stays_untouched(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 6, 100)
    rig.files.sizes.clear()
    some = [0, 1, 3, 4, 5]
    assert rig.run([load_of(saves[i], places[i]) for i in some]) == [DONE] * 5
    assert sorted(rig.files.sizes) == [("pread", 4, 2 * SLOT), ("pread", 6, 3 * SLOT)]
    assert not rig.content(places[2]).any()


def test_more_blocks_than_buffers_fit_a_call_are_several_calls(tmp_path: Path) -> None:
    with Rig([tmp_path], segment_bytes=16 * MIB) as rig:
        places, saves = rig.save_blocks(1, 1100, 1)
        rig.files.sizes.clear()
        assert rig.run([load_of(*pair) for pair in zip(saves, places, strict=True)]) == [DONE] * 1100
        assert sorted(buffers for _, buffers, _ in rig.files.sizes) == [152, BUFFERS_PER_CALL, BUFFERS_PER_CALL]


def test_a_block_larger_than_a_call_is_read_in_several(tmp_path: Path) -> None:
    block_bytes = CALL_BYTES + 5000
    with Rig([tmp_path], segment_bytes=32 * MIB, arena_bytes=32 * MIB) as rig:
        places, saves = rig.save_blocks(1, 1, block_bytes)
        rig.files.sizes.clear()
        assert rig.run([load_of(saves[0], places[0])]) == [DONE]
        assert len(rig.files.sizes) == 2
        assert max(size for _, _, size in rig.files.sizes) == CALL_BYTES
        assert xxhash.xxh3_64_intdigest(rig.content(places[0]).data) == saves[0].header.checksum


def test_slots_longer_than_their_blocks_are_read_and_written_one_by_one(rig: Rig) -> None:
    places = rig.fill(3, 100)
    saves = [replace_slot_bytes(save_of(rig, 1, slot, place), 5 * PAGE_BYTES) for slot, place in enumerate(places)]
    assert rig.make(1, 5 * PAGE_BYTES) is DONE
    assert rig.run(saves) == [DONE] * 3
    rig.arena[:] = 0
    assert rig.run([load_of(*pair) for pair in zip(saves, places, strict=True)]) == [DONE] * 3


def replace_slot_bytes(save: Save, slot_bytes: int) -> Save:
    save.slot_bytes = slot_bytes
    return save


def test_a_segment_is_found_again_by_the_next_daemon(tmp_path: Path) -> None:
    with Rig([tmp_path]) as first:
        places, saves = first.save_blocks(7, 4, 5000)
    with Rig([tmp_path]) as second:
        second.drives.adopt(7, tmp_path)
        assert second.run([load_of(saves[i], places[i]) for i in range(4)]) == [DONE] * 4
        assert second.drives.status()[0].segments == 1


def test_blocks_go_from_the_drive_into_their_slots_without_a_copy_between(rig: Rig) -> None:
    """Raw ones. The control: what was packed has to be unpacked, so it comes from somewhere else."""
    first, room = rig.arena.ctypes.data, len(rig.arena)
    read: list[bool] = []

    def note(_: int, buffers: list[memoryview], __: int) -> None:
        addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers]
        read.extend(first <= address < first + room for address in addresses)

    places, saves = rig.save_blocks(1, 4, 10_000)
    rig.files.rules["pread"] = note
    assert rig.run([load_of(*pair) for pair in zip(saves, places, strict=True)]) == [DONE] * 4
    assert read == [False, True] * 4, "a header of each, and its payload"
    del rig.files.rules["pread"]
    places, saves = packed_blocks(rig, 1, segment=2)
    read.clear()
    rig.files.rules["pread"] = note
    assert rig.run([load_of(saves[0], places[0])]) == [DONE]
    assert read
    assert not any(read)


def test_all_room_of_a_segment_is_set_aside_before_anything_is_in_it(rig: Rig) -> None:
    """Else a drive that fills up fails writes that were promised room. The control is a file that is only long."""
    assert rig.make(1, SLOT) is DONE
    made = rig.path(1).stat()
    assert 512 * made.st_blocks >= made.st_size == rig.segment_bytes
    with (rig.path(1).parent / "long").open("wb") as only_long:
        only_long.truncate(rig.segment_bytes)
        assert 512 * os.fstat(only_long.fileno()).st_blocks < rig.segment_bytes


# -- packed blocks ---------------------------------------------------------------------------------------------------


def packed_blocks(rig: Rig, count: int, block_bytes: int = 200_000, segment: int = 1) -> tuple[list[Place], list[Save]]:
    """Values that shrink, packed and saved in slots of their own size; the arena is wiped."""
    room = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
    values = np.random.default_rng(1).standard_normal(count * room // 2, dtype=np.float32).view(np.uint32) >> 16
    rig.arena[: count * room] = values.astype(np.uint16).view(np.uint8)
    places = [Place(i * room, block_bytes) for i in range(count)]
    packs = [Pack(i, segment, 0, place.offset, block_bytes, Codec.BF16_PLANES_ZSTD) for i, place in enumerate(places)]
    assert rig.run(packs) == [DONE] * count
    slot_bytes = max(save_of(rig, segment, 0, places[0], pack.packed).slot_bytes for pack in packs)
    saves = [
        replace_slot_bytes(save_of(rig, segment, slot, place, pack.packed), slot_bytes)
        for slot, (place, pack) in enumerate(zip(places, packs, strict=True))
    ]
    assert rig.make(segment, slot_bytes) is DONE
    assert rig.run(saves) == [DONE] * count
    return places, saves


@pytest.mark.parametrize("block_bytes", [200_000, 131_073])
def test_packed_blocks_come_back_as_they_were(rig: Rig, block_bytes: int) -> None:
    places, saves = packed_blocks(rig, 4, block_bytes)
    wanted = [rig.content(place).copy() for place in places]
    assert saves[0].slot_bytes < 0.85 * block_bytes
    rig.arena[:] = 0
    rig.files.sizes.clear()
    assert rig.run([load_of(*pair) for pair in zip(saves, places, strict=True)]) == [DONE] * 4
    assert len(rig.files.sizes) == 1
    for place, content in zip(places, wanted, strict=True):
        assert np.array_equal(rig.content(place), content)


def test_damaged_packed_blocks_leave_the_arena_alone(rig: Rig) -> None:
    places, saves = packed_blocks(rig, 1)
    rig.arena[:] = 0xA5
    poke(rig, 1, slot_offset(saves[0].slot_bytes, 0) + PAGE_BYTES + 1000)
    assert rig.run([load_of(saves[0], places[0])]) == [DAMAGED]
    assert (rig.arena == 0xA5).all()


@pytest.mark.parametrize("changed", [{"checksum": 1}, {"codec": Codec.RAW}, {"stored_bytes": 100}])
def test_packed_blocks_whose_headers_say_otherwise_are_damage(rig: Rig, changed: dict[str, Any]) -> None:
    places, saves = packed_blocks(rig, 1)
    page = memoryview(bytearray(PAGE_BYTES))
    pack_header_into(page, replace(saves[0].header, **changed))
    with rig.path(1).open("r+b") as file:
        file.seek(slot_offset(saves[0].slot_bytes, 0))
        file.write(page)
    wanted = changed.get("checksum", saves[0].header.checksum)
    assert rig.run([load_of(saves[0], places[0], checksum=wanted)]) == [DAMAGED]


def test_one_bad_sector_among_packed_blocks_costs_one_block(rig: Rig) -> None:
    places, saves = packed_blocks(rig, 5, 200_000)
    wanted = [rig.content(place).copy() for place in places]
    bad = slot_offset(saves[0].slot_bytes, 3)

    def rule(_: int, buffers: list[memoryview], offset: int) -> None:
        if offset <= bad < offset + sum(map(len, buffers)):
            raise OSError(errno.EIO, "bad sector")

    rig.files.rules["pread"] = rule
    rig.arena[:] = 0
    loads = [load_of(*pair) for pair in zip(saves, places, strict=True)]
    assert rig.run(loads) == [DONE, DONE, DONE, FAILED, DONE]
    came = [np.array_equal(rig.content(place), content) for place, content in zip(places, wanted, strict=True)]
    assert came == [True, True, True, False, True]


def test_packing_what_does_not_shrink_is_done_without_a_result(rig: Rig) -> None:
    place = rig.fill(1, 100_000)[0]
    for block_bytes in (100_000, 4096, 1):
        order = Pack(0, 1, 0, place.offset, block_bytes, Codec.BF16_PLANES_ZSTD)
        assert rig.run([order]) == [DONE]
        assert order.packed is None


# -- damage ----------------------------------------------------------------------------------------------------------


def poke(rig: Rig, segment: int, offset: int) -> None:
    """Flip a bit on disk."""
    with rig.path(segment).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_costs_one_block_and_is_counted(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 4, 5000)
    poke(rig, 1, slot_offset(saves[0].slot_bytes, 1) + 700)  # the header of one
    poke(rig, 1, slot_offset(saves[0].slot_bytes, 2) + PAGE_BYTES + 4999)  # the last byte of another
    assert rig.run([load_of(saves[i], places[i]) for i in range(4)]) == [DONE, DAMAGED, DAMAGED, DONE]
    status = rig.drives.status()[0]
    assert (status.damaged, status.errors, status.state) == (2, 0, DriveState.OK)


def test_bytes_beyond_a_block_do_not_count(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 1, 5000)
    poke(rig, 1, slot_offset(saves[0].slot_bytes, 0) + PAGE_BYTES + 5000)
    assert rig.run([load_of(saves[0], places[0])]) == [DONE]


@pytest.mark.parametrize(
    "changed",
    [
        {"key": b"k" * 32},
        {"generation": 99},
        {"checksum": 1},
        {"namespace": namespace_of(5000, tenant="b")},
        {"namespace": namespace_of(5000, digest=b"x" * 32)},
        {"namespace": namespace_of(5001)},
        {"slot_bytes": 4 * PAGE_BYTES},
        {"slot": 1},
        {"slot": 1 << 20},
    ],
)
def test_a_slot_that_holds_anything_else_is_damage(rig: Rig, changed: dict[str, object]) -> None:
    places, saves = rig.save_blocks(1, 3, 5000)
    assert rig.run([load_of(saves[0], places[0], **changed)]) == [DAMAGED]


def test_a_write_that_went_astray_is_damage_wherever_it_is_looked_for(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 3, 5000)
    content, slot_bytes = bytearray(rig.path(1).read_bytes()), saves[0].slot_bytes
    first, second = slot_offset(slot_bytes, 0), slot_offset(slot_bytes, 1)
    content[second : second + slot_bytes] = content[first : first + slot_bytes]
    with rig.path(1).open("r+b") as file:
        file.write(content)
    assert rig.run([load_of(saves[1], places[1])]) == [DAMAGED]
    assert rig.run([load_of(saves[0], places[0], slot=1)]) == [DAMAGED], "all is right but the place"


def test_a_header_of_another_codec_is_damage(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 1, 5000)
    page = memoryview(bytearray(PAGE_BYTES))
    for header in (
        replace(saves[0].header, codec=Codec.BF16_PLANES_ZSTD),
        replace(saves[0].header, stored_bytes=4999),
    ):
        pack_header_into(page, header)
        with rig.path(1).open("r+b") as file:
            file.seek(slot_offset(saves[0].slot_bytes, 0))
            file.write(page)
        assert rig.run([load_of(saves[0], places[0])]) == [DAMAGED]


def test_a_slot_that_was_never_written_is_damage(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 1, 100)
    assert rig.run([load_of(saves[0], places[0], slot=5)]) == [DAMAGED]


def test_an_erased_block_is_gone_for_good(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 4, 100)
    rig.files.calls.clear()
    assert rig.run([Erase(1, slot, SLOT) for slot in (0, 2)]) == [DONE] * 2
    assert rig.files.calls["fdatasync"] == 1
    assert rig.run([load_of(saves[i], places[i]) for i in range(4)]) == [DAMAGED, DONE, DAMAGED, DONE]


def test_verifying_tells_right_blocks_from_wrong_ones(rig: Rig) -> None:
    place = rig.fill(1, 1000)[0]
    checksum = xxhash.xxh3_64_intdigest(rig.content(place).data)
    assert rig.run([Verify(0, checksum, 0, 0, 1000), Verify(1, checksum, 0, 0, 999)]) == [DONE, DAMAGED]
