"""Copies in a GPU's memory: found by row and generation alone, never given away while they are read, shared fairly."""

import sys
from itertools import pairwise
from random import Random
from types import FrameType
from typing import Any

import numpy as np

from kvstore.blocks import Index
from kvstore.quotas import Quota
from kvstore.sessions import Tenant
from kvstore.tier.hbm import Copy, Hbm

SLOT = 4096
ARENA = 4 * SLOT
EMPTY = Index(np.zeros(1, np.uint32), np.zeros(5, np.uint64))


def small(arenas: int, **quotas: Quota) -> Hbm:
    """With tenants `t1` to `t3`, and what is said of some of them."""
    hbm = Hbm(arenas * ARENA, ARENA)
    hbm.shares.tenants = [Tenant(f"t{number}", number, EMPTY) for number in (1, 2, 3)]
    hbm.shares.renew(quotas)
    return hbm


def of(hbm: Hbm, tenant: int) -> Tenant:
    return hbm.shares.tenants[tenant - 1]


def put(hbm: Hbm, tenant: int, row: int, generation: int = 1, slot_bytes: int = SLOT) -> Copy | None:
    copy = hbm.reserve(of(hbm, tenant), slot_bytes, row, generation)
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
    hbm = small(2)
    copy = put(hbm, 1, 7, 3)
    assert copy is not None
    assert has(hbm, 7, 3)
    assert not has(hbm, 7, 4)
    assert not has(hbm, 8, 3)
    assert hbm.reserve(of(hbm, 1), SLOT, 7, 3) is None  # it is there
    failed = hbm.reserve(of(hbm, 1), SLOT, 8, 3)
    assert failed is not None
    hbm.failed(failed)
    assert not has(hbm, 8, 3)
    assert hbm.used_bytes() == SLOT


def test_the_copy_used_longest_ago_gives_way_unless_it_is_being_read() -> None:
    hbm = small(1)
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
    hbm = small(1)
    for row in range(4):
        put(hbm, 1, row)
    held = [hbm.find(row, 1) for row in range(4)]
    assert all(held)
    assert put(hbm, 1, 9) is None
    assert put(hbm, 2, 9) is None
    assert put(hbm, 1, 9, slot_bytes=2 * SLOT) is None
    assert put(hbm, 1, 9, slot_bytes=2 * ARENA) is None


def test_tenants_come_to_have_equal_parts_and_sizes_change() -> None:
    hbm = small(6)
    for row in range(24):
        put(hbm, 1, row)
    assert hbm.used_bytes(of(hbm, 1)) == 6 * ARENA
    for row in range(100, 140):
        put(hbm, 2, row)
    assert (hbm.used_bytes(of(hbm, 1)), hbm.used_bytes(of(hbm, 2))) == (3 * ARENA, 3 * ARENA)
    assert has(hbm, 23)  # what was used last stays
    assert not has(hbm, 0)
    for row in range(200, 260):
        put(hbm, 1, row)
    assert (hbm.used_bytes(of(hbm, 1)), hbm.used_bytes(of(hbm, 2))) == (3 * ARENA, 3 * ARENA)  # nobody takes back
    assert put(hbm, 1, 300, slot_bytes=2 * SLOT)
    assert has(hbm, 300)
    assert hbm.used_bytes(of(hbm, 2)) == 3 * ARENA


def test_no_two_copies_overlap_whatever_happens() -> None:
    random = Random(5)
    hbm = small(5)
    reading: list[Copy] = []
    there: dict[tuple[int, int], Copy] = {}
    for turn in range(3000):
        row, tenant, size = random.randrange(60), random.randrange(1, 4), SLOT * random.choice((1, 2))
        if random.random() < 0.6:
            copy = hbm.reserve(of(hbm, tenant), size, row, tenant)
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
        hbm = small(arenas)
        for row in range(2 * arenas):
            assert put(hbm, 1, row)
            assert put(hbm, 2, 10_000 + row)
        assert hbm.blocks == 4 * arenas
        lines.append(lines_of(hbm, range(20_000, 20_008)))
    assert lines[1] < 1.5 * lines[0], "a hundred times as many arenas"  # what ends meanwhile runs lines, too


def test_quotas_hold_for_it() -> None:
    hbm = small(6, t1=Quota(hbm_max_bytes=2 * ARENA), t3=Quota(hbm_guaranteed_bytes=3 * ARENA))
    for row in range(60):
        put(hbm, 1, row)
        put(hbm, 2, 100 + row)
    assert (hbm.held(of(hbm, 1)), hbm.held(of(hbm, 2))) == (2, 4)  # what is guaranteed is lent meanwhile
    for row in range(60):
        put(hbm, 3, 200 + row)
        put(hbm, 2, 100 + row)
        put(hbm, 1, row)
    assert hbm.held(of(hbm, 3)) >= 3
    assert hbm.held(of(hbm, 1)) <= 2
    hbm.shares.renew({"t1": Quota(hbm_max_bytes=0)})
    for row in range(990, 994):
        put(hbm, 1, row)
    assert hbm.held(of(hbm, 1)) == 0  # one arena went at each try
    assert put(hbm, 1, 999) is None
    assert put(hbm, 2, 999)  # the control


def test_what_pins_want_stays_but_for_who_is_below_its_guarantee() -> None:
    hbm = small(2, t2=Quota(hbm_guaranteed_bytes=ARENA))
    hbm.keep([(0, 1), (1, 1), (50, 1)])  # the last one is not there yet
    for row in range(40):
        put(hbm, 1, row)
    assert has(hbm, 0)
    assert has(hbm, 1)
    assert not has(hbm, 2)
    assert put(hbm, 1, 50)
    for row in range(60, 100):
        put(hbm, 1, row)
    assert [has(hbm, row) for row in (0, 1, 50)] == [True] * 3
    hbm.let_go([(1, 1)])
    for row in range(100, 140):
        put(hbm, 1, row)
    assert [has(hbm, row) for row in (0, 1, 50)] == [True, False, True]
    assert not hbm.tally.unpinned
    hbm.keep([(row, 1) for row in range(132, 140)])  # all that is left, in both arenas
    assert put(hbm, 2, 500)  # is guaranteed one of them
    assert hbm.tally.unpinned
    assert hbm.held(of(hbm, 2)) == 1
    kept = [row for row in (0, 50, *range(132, 140)) if has(hbm, row)]
    assert 0 < len(kept) < 10


def test_how_long_copies_last_is_counted() -> None:
    hbm, now = small(1), 0
    hbm.clock = lambda: now
    for row in range(4):
        put(hbm, 1, row)
    now = 70
    put(hbm, 1, 9)
    assert (hbm.tally.evicted, hbm.tally.evicted_after_ns) == (1, 70)


def test_rows_say_whether_there_is_a_whole_copy() -> None:
    hbm = small(1)
    hbm.generations = np.zeros(16, np.uint64)
    rows, generations = np.array([3, 4, 5], np.uint32), np.array([7, 7, 7], np.uint64)
    put(hbm, 1, 3, 7)
    put(hbm, 1, 5, 6)
    begun = hbm.reserve(of(hbm, 1), SLOT, 4, 7)
    assert hbm.whole(rows, generations).tolist() == [True, False, False]
    assert begun is not None
    hbm.filled(begun)
    assert hbm.whole(rows, generations).tolist() == [True, True, False]
    for row in range(8, 12):
        put(hbm, 1, row)
    assert not hbm.whole(rows, generations).any()
