"""Segments that could not be read in this life are told from strangers' files, and from those that no key opens."""

from pathlib import Path

from kvstore.tier.orders import Found
from kvstored.index_loaded import Loaded
from kvstored.index_scan import SEGMENTS
from kvstored.workers import less_unread, readable_with


def found(closed: set[int], unreadable: list[str], foreign: list[Path], keys: dict[int, bytes]) -> Loaded:
    """Four segments of ours on `/disk`, and what else."""
    segments = [Found(number, 8192, 1, "t", None) for number in range(1, 5)]
    ids = {number: keys.get(number, b"") for number in range(1, 5)}
    folders = dict.fromkeys(range(1, 5), Path("/disk"))
    return Loaded(
        b"s" * 16, segments, folders, ids, [], 1, 5, foreign, unreadable, "", 0, closed=frozenset(closed)
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


def test_a_file_that_cannot_be_looked_into_is_not_called_somebody_elses() -> None:
    stranger, bad = Path("/disk/segments/x"), file(7)
    left = less_unread(found(set(), [f"{bad}: Input/output error", "/other: its drive is away"], [bad, stranger], {}))
    assert left.foreign == [stranger]
    assert left.unread == [bad]
    assert len(left.segments) == 4
