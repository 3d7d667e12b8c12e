"""An index made anew while the drive fails to read: what could not be read may be durable, and is not erased."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.tier.format import RECORD, UNREAD, slot_offset
from kvstored.index_marks import DOUBTFUL, FOLDER, write_store
from kvstored.index_rebuild import Collected, collect, padded_slots, write_index
from kvstored.index_scan import LOOKS, scan
from tests.segments import SLOT_BYTES, STORE, block, facts, facts_of, make_segment, opened, path_of

BLOCKS = [block(seed, 1 + seed // 10, seed % 10) for seed in range(20)]
CALLS = ("open", "fsync", "preadv")


def store(directory: Path) -> None:
    for number in (1, 2):
        make_segment(directory, number, 20, [one for one in BLOCKS if one.header.segment == number])
    write_store(directory, STORE)


def fail(monkeypatch: pytest.MonkeyPatch, call: str, times: int, wanted: Callable[..., bool]) -> None:
    """Have so many calls fail of those that are wanted."""
    real, failed = getattr(os, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal failed
        if failed < times and wanted(*arguments):
            failed += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)


def of_first(directory: Path) -> dict[str, Callable[..., bool]]:
    """Which calls are of the first segment, and of the header of its slot 3."""
    path = path_of(directory, 1)

    def ours(fd: int) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(fd), path.stat())
        return False

    return {
        "open": lambda opened, *_: opened == path,
        "fsync": ours,
        "preadv": lambda fd, _, at: ours(fd) and at == slot_offset(SLOT_BYTES, 3),
    }


def collected(directory: Path, monkeypatch: pytest.MonkeyPatch, call: str | None, times: int = LOOKS) -> Collected:
    """What a rebuild finds while this call fails so often."""
    found = scan([directory])
    records = {n: np.zeros(padded_slots(one.superblock.slots), RECORD) for n, one in found.segments.items()}
    if call:
        fail(monkeypatch, call, times, of_first(directory)[call])
    return collect(found.segments, records, lambda *_: None)


def blocks_in(told: Collected, segment: int) -> int:
    return int(np.count_nonzero(told.records[segment]["generation"]))


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_once_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store(tmp_path)
    told = collected(tmp_path, monkeypatch, call, LOOKS - 1)
    assert (blocks_in(told, 1), blocks_in(told, 2)) == (10, 10)
    assert not told.partial


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_segment_that_cannot_be_read_is_closed_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store(tmp_path)
    told = collected(tmp_path, monkeypatch, call)
    assert (told.closed, told.unread, told.damaged) == ([1], 0, 0)
    assert blocks_in(told, 2) == 10, "the others are read"


def test_a_header_that_cannot_be_read_is_marked_and_those_beside_it_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path)
    told = collected(tmp_path, monkeypatch, "preadv")
    assert (told.closed, told.unread, told.damaged) == ([], 1, 0)
    assert blocks_in(told, 1) == 9
    assert np.flatnonzero(told.records[1]["namespace"] == UNREAD).tolist() == [3]


@pytest.mark.parametrize("call", [None, *CALLS])
def test_the_next_start_looks_again_where_something_could_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str | None
) -> None:
    store(tmp_path)
    told = collected(tmp_path, monkeypatch, call)
    write_index(tmp_path, STORE, told, 1 << 26)
    assert (tmp_path / FOLDER / DOUBTFUL).exists() is bool(call)
    with opened(tmp_path) as start:
        assert bool(start.loaded.rebuilt) is bool(call)
        assert facts(start.loaded) == facts_of(BLOCKS)
        assert not start.loaded.closed
    assert not (tmp_path / FOLDER / DOUBTFUL).exists()
