"""Copies in a GPU's memory: found by row and generation alone, never given away while they are read, shared fairly."""

import sys
from itertools import pairwise
from random import Random
from types import FrameType
from typing import Any

from kvstore.tier.hbm import Copy, Hbm

SLOT = 4096
ARENA = 4 * SLOT


def put(hbm: Hbm, tenant: int, row: int, generation: int = 1, slot_bytes: int = SLOT) -> Copy | None:
    copy = hbm.reserve(tenant, slot_bytes, row, generation)
    if copy is not None:
        assert hbm.find(row, generation) is None  # not whole yet
        hbm.filled(copy)
    return copy


def has(hbm: Hbm, row: int, generation: int = 1) -> bool:
    found = hbm.find(row, generation)
    if found is not None:
        hbm.release(found)
    return found is not None


def test_a_copy_is_found_by_its_row_and_generation_and_by_no_other() -> None:
    hbm = Hbm(2 * ARENA, ARENA)
    copy = put(hbm, 1, 7, 3)
    assert copy is not None
    assert has(hbm, 7, 3)
    assert not has(hbm, 7, 4)
    assert not has(hbm, 8, 3)
    assert hbm.reserve(1, SLOT, 7, 3) is None  # it is there
    failed = hbm.reserve(1, SLOT, 8, 3)
    assert failed is not None
    hbm.failed(failed)
    assert not has(hbm, 8, 3)
    assert hbm.used_bytes() == SLOT


def test_the_copy_used_longest_ago_gives_way_unless_it_is_being_read() -> None:
    hbm = Hbm(ARENA, ARENA)
    for row in range(4):
        assert put(hbm, 1, row)
    assert has(hbm, 0)
    reading = hbm.find(1, 1)
    assert reading is not None
    at = reading.offset
    assert has(hbm, 0)
    new = put(hbm, 1, 9)
    assert new is not None
    assert [has(hbm, row) for row in range(4)] == [True, True, False, True]
    assert new.offset != at
    for row in (10, 11, 12):
        put(hbm, 1, row)
    assert has(hbm, 1)  # still read
    hbm.release(reading)
    for row in range(20, 24):
        put(hbm, 1, row)
    assert not has(hbm, 1)  # the control
    assert hbm.tally.evicted == 8


def test_no_room_is_told_where_everything_is_read() -> None:
    hbm = Hbm(ARENA, ARENA)
    for row in range(4):
        put(hbm, 1, row)
    held = [hbm.find(row, 1) for row in range(4)]
    assert all(held)
    assert put(hbm, 1, 9) is None
    assert put(hbm, 2, 9) is None
    assert put(hbm, 1, 9, slot_bytes=2 * SLOT) is None
    assert put(hbm, 1, 9, slot_bytes=2 * ARENA) is None


def test_tenants_come_to_have_equal_parts_and_sizes_change() -> None:
    hbm = Hbm(6 * ARENA, ARENA)
    for row in range(24):
        put(hbm, 1, row)
    assert hbm.used_bytes(1) == 6 * ARENA
    for row in range(100, 140):
        put(hbm, 2, row)
    assert (hbm.used_bytes(1), hbm.used_bytes(2)) == (3 * ARENA, 3 * ARENA)
    assert has(hbm, 23)  # what was used last stays
    assert not has(hbm, 0)
    for row in range(200, 260):
        put(hbm, 1, row)
    assert (hbm.used_bytes(1), hbm.used_bytes(2)) == (3 * ARENA, 3 * ARENA)  # nobody takes back
    assert put(hbm, 1, 300, slot_bytes=2 * SLOT)
    assert has(hbm, 300)
    assert hbm.used_bytes(2) == 3 * ARENA


def test_no_two_copies_overlap_whatever_happens() -> None:
    random = Random(5)
    hbm = Hbm(5 * ARENA, ARENA)
    reading: list[Copy] = []
    there: dict[tuple[int, int], Copy] = {}
    for turn in range(3000):
        row, tenant, size = random.randrange(60), random.randrange(1, 4), SLOT * random.choice((1, 2))
        if random.random() < 0.6:
            copy = hbm.reserve(tenant, size, row, tenant)
            if copy is not None:
                (hbm.filled if random.random() < 0.9 else hbm.failed)(copy)
                there[row, tenant] = copy
        elif (found := hbm.find(row, random.randrange(1, 4))) is not None:
            assert there[found.row, found.generation] is found
            reading.append(found)
        if reading and random.random() < 0.5:
            hbm.release(reading.pop(random.randrange(len(reading))))
        spans = sorted((each.offset, each.offset + each.arena.slot_bytes) for each in hbm._copies.values())
        assert all(before[1] <= after[0] for before, after in pairwise(spans)), turn
        assert all(each in hbm._copies.values() for each in reading), turn
        assert not spans or spans[-1][1] <= hbm.hbm_bytes
    assert hbm.tally.evicted > 100


def lines_of(hbm: Hbm, rows: range) -> int:
    """Lines that are run to put these copies of tenant 2 where it has no room left."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for row in rows:
            assert put(hbm, 2, row)
    finally:
        sys.settrace(before)
    return count


def test_what_others_have_does_not_make_a_copy_slower() -> None:
    """The owner thread does this for each block of a LOAD."""
    lines: list[int] = []
    for arenas in (4, 400):
        hbm = Hbm(arenas * ARENA, ARENA)
        for row in range(2 * arenas):
            assert put(hbm, 1, row)
            assert put(hbm, 2, 10_000 + row)
        assert hbm.blocks == 4 * arenas
        lines.append(lines_of(hbm, range(20_000, 20_008)))
    assert lines[0] == lines[1]
