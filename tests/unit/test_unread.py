"""Segments that could not be read in this life are told from strangers' files, and from those that no key opens."""

import errno
from pathlib import Path

import pytest

from kvstore.tier.orders import Found
from kvstored import index_scan
from kvstored.index_loaded import Loaded
from kvstored.index_scan import SEGMENTS
from kvstored.workers import less_unread, readable_with
from tests.segments import make_segment


def found(closed: set[int], unread: list[Path], foreign: list[Path], keys: dict[int, bytes]) -> Loaded:
    """Four segments of ours on `/disk`, and what else."""
    segments = [Found(number, 8192, 1, "t", None) for number in range(1, 5)]
    ids = {number: keys.get(number, b"") for number in range(1, 5)}
    folders = dict.fromkeys(range(1, 5), Path("/disk"))
    return Loaded(
        b"s" * 16, segments, folders, ids, [], 1, 5, foreign, [], "", 0, closed=frozenset(closed), unread=unread
    )  # fmt: skip


def file(number: int) -> Path:
    return Path("/disk") / SEGMENTS / f"{number:08d}.seg"


def test_of_a_life_without_an_index_none_counts_as_foreign() -> None:
    left = less_unread(readable_with(None, found({1, 2, 3, 4}, [], [], {})))
    assert (left.segments, left.directories, left.foreign) == ([], {}, [])
    assert left.unread == [file(number) for number in range(1, 5)]


def test_what_no_key_opens_is_foreign_and_what_could_not_be_read_is_not() -> None:
    left = less_unread(readable_with(None, found({1, 2}, [], [], {2: b"k" * 32, 3: b"k" * 32})))
    assert [one.segment for one in left.segments] == list(left.directories) == [4]
    assert left.foreign == [file(2), file(3)]
    assert left.unread == [file(1)]
    assert left.closed == {1}, "where status lists it"


def test_a_file_that_cannot_be_looked_into_is_not_called_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called. The control is a stranger's beside it."""
    folder = tmp_path / "disk: the second"
    bad = make_segment(folder, 7, 20)
    stranger = bad.with_name("x")
    stranger.touch()
    look = index_scan._look_once

    def fails(directory: Path, path: Path) -> index_scan.SegmentFile | None:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return look(directory, path)

    monkeypatch.setattr(index_scan, "_look_once", fails)
    seen = index_scan.scan([folder])
    assert (seen.foreign, seen.unread, seen.looked) == ([stranger], [bad], [])
    left = less_unread(found({3}, seen.unread, seen.foreign, {}))
    assert (left.foreign, left.unread) == ([stranger], sorted([bad, file(3)]))
