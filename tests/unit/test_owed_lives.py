"""The note of what was deleted, over lives of an index: what was hidden goes once it is seen, and nothing else does."""

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest

from kvstore.tier.orders import EVERY, Outcome, Owe
from kvstored import owed
from kvstored.index import Index
from kvstored.index_loaded import Loaded
from kvstored.index_marks import OWED, mark_doubtful, write_sealed
from kvstored.mounts import Mounts
from kvstored.owed import Sight, note_owed, read_owed
from kvstored.workers import _sight
from tests.segments import STORE, Opened, block, facts, facts_of, make_segment
from tests.unit.drive_kit import Rig

SEEN, HIDDEN = block(1, 1, 0), block(2, 2, 0)
OTHERS = block(3, 3, 0, tenant="other")


@contextmanager
def life(note: Path, *directories: Path, absent: Sequence[Path] = ()) -> Iterator[Opened]:
    """An index over these directories, some without their drive."""
    mounts, woken = Mounts(), Event()
    for directory in absent:
        mounts.leave_out(directory, "its drive is not mounted")
    index = Index(directories, woken.set, map_bytes=1 << 26, owed=note, mounts=mounts)
    index.start()
    try:
        yield Opened(index, woken)
    finally:
        index.stop()


def lost(note: Path, *directories: Path) -> tuple[Index, Loaded]:
    """The beginning of a life without an index."""
    index = Index(directories, lambda: None, owed=note)
    index._lose("no child can be started")
    loaded = index.take_loaded()
    assert loaded is not None
    index.stop()
    return index, loaded


class TwoDrives:
    """Two directories with a segment of a tenant each, whose index is lost, and who deleted something while the second
    was away. On that one is a segment of somebody else, too.
    """

    def __init__(self, folder: Path) -> None:
        self.a, self.b, self.note = folder / "a", folder / "b", folder / "state" / OWED
        with life(self.note, self.a, self.b) as first:
            self.store = first.loaded.store
            make_segment(self.a, 1, 20, [SEEN], store=self.store)
            make_segment(self.b, 2, 20, [HIDDEN], store=self.store)
            make_segment(self.b, 3, 20, [OTHERS], store=self.store, tenant="other")
            assert first.commit([SEEN, HIDDEN, OTHERS])
        shutil.rmtree(self.a / "index")
        with life(self.note, self.a, self.b, absent=[self.b]) as second:
            assert facts(second.loaded) == facts_of([SEEN])
            self.delete(second.loaded)

    def delete(self, loaded: Loaded) -> None:
        """The tenant deletes what nobody sees."""
        note_owed(self.note, self.store, {EVERY}, "acme", _sight([self.a, self.b], loaded))


@pytest.fixture
def drives(tmp_path: Path) -> TwoDrives:
    return TwoDrives(tmp_path)


def test_what_was_hidden_goes_and_the_rest_stays(drives: TwoDrives) -> None:
    with life(drives.note, drives.a, drives.b) as third:
        assert facts(third.loaded) == facts_of([SEEN, OTHERS])
    assert not read_owed(drives.note).tenants


def test_that_counts_wherever_the_drives_are_mounted_then(drives: TwoDrives, tmp_path: Path) -> None:
    drives.a.rename(tmp_path / "x")
    drives.b.rename(drives.a)
    (tmp_path / "x").rename(drives.b)
    with life(drives.note, drives.a, drives.b) as third:
        assert facts(third.loaded) == facts_of([SEEN, OTHERS])


def test_what_was_seen_stays_where_its_drive_has_moved(drives: TwoDrives, tmp_path: Path) -> None:
    drives.a.rename(tmp_path / "x")
    with life(drives.note, tmp_path / "x", drives.b) as third:
        assert facts(third.loaded) == facts_of([SEEN, OTHERS])


@pytest.mark.parametrize("back_at", ["b", "c"])
def test_an_empty_drive_in_the_place_of_the_one_that_is_away_has_nothing_forgotten(
    drives: TwoDrives, tmp_path: Path, back_at: str
) -> None:
    away, back = tmp_path / "away", tmp_path / back_at
    drives.b.rename(away)
    later = []
    with life(drives.note, drives.a, drives.b) as third:
        for at, directory in enumerate((drives.a, drives.b)):
            number = third.loaded.next_segment + at
            later.append(block(10 + at, number, 0, generation=third.loaded.next_generation))
            make_segment(directory, number, 20, [later[-1]], store=drives.store)
        assert third.commit([SEEN, *later])
    with life(drives.note, drives.a, drives.b) as fourth:
        assert facts(fourth.loaded) == facts_of([SEEN, *later]), "what is made since then is hidden from nobody"
    if back == drives.b:
        drives.b.rename(tmp_path / "taken out")
        later.pop()
    away.rename(back)
    mark_doubtful(drives.a)
    with life(drives.note, *dict.fromkeys((drives.a, drives.b, back))) as fifth:
        assert facts(fifth.loaded) == facts_of([SEEN, OTHERS, *later])


def test_what_a_life_without_an_index_makes_is_not_what_was_hidden_before(tmp_path: Path) -> None:
    """The note was made where nobody knew any number of a segment: by a life without its first drive."""
    a, note = tmp_path / "a", tmp_path / "state" / OWED
    with life(note, a) as first:
        store = first.loaded.store
        make_segment(a, 1, 20, [SEEN], store=store)
        assert first.commit([SEEN])
    note_owed(note, b"", {EVERY}, "acme", Sight(hidden=frozenset({str(a)})))
    _, loaded = lost(note, a)
    made = block(7, loaded.next_segment, 0, generation=loaded.next_generation)
    make_segment(a, loaded.next_segment, 20, [made], store=store)
    with life(note, a) as third:
        assert facts(third.loaded) == facts_of([made])


def test_a_life_without_an_index_that_cannot_say_so_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, note = tmp_path / "a", tmp_path / "state" / OWED
    make_segment(a, 1, 20, [SEEN])

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the folder of state is full")

    monkeypatch.setattr(owed, "write_sealed", refused)
    _, loaded = lost(note, a)
    assert loaded.store == STORE, "the control: nothing is noted"
    monkeypatch.undo()
    note_owed(note, b"", {EVERY}, "acme", Sight(hidden=frozenset({str(a)})))
    monkeypatch.setattr(owed, "write_sealed", refused)
    index, loaded = lost(note, a)
    assert (loaded.store, loaded.segments, index.headers_will_do) == (b"", [], False)


def test_a_number_below_that_of_a_note_is_given_to_no_segment(drives: TwoDrives, tmp_path: Path) -> None:
    """Nor by another store, all drives of which are new."""
    before = read_owed(drives.note).tenants["acme"].before
    assert before is not None
    new = tmp_path / "new"
    with life(drives.note, new) as third:
        assert third.loaded.store != drives.store
        assert third.loaded.next_segment >= before


@pytest.mark.parametrize("tenants", [["acme"], {"acme": {"looked": ["a"], "hidden": ["b"], "before": 3}}])
def test_a_note_of_an_older_version_is_understood(drives: TwoDrives, tenants: object) -> None:
    """Which went by tenant, or by directory: nobody knows of that what was seen, and all of the tenant goes."""
    write_sealed(drives.note, json.dumps({"version 1": {STORE.hex(): [[1, 2]]}, "tenants": tenants}).encode())
    with life(drives.note, drives.a, drives.b) as third:
        assert facts(third.loaded) == facts_of([OTHERS])
        number = third.loaded.next_segment
        made = block(7, number, 0, generation=third.loaded.next_generation)
        make_segment(drives.a, number, 20, [made], store=drives.store)
        assert third.commit([OTHERS, made])
    assert read_owed(drives.note).stores == {STORE.hex(): {(1, 2)}}
    with life(drives.note, drives.a, drives.b) as fourth:
        assert facts(fourth.loaded) == facts_of([OTHERS, made])


def test_of_more_than_there_is_room_for_all_stays_deleted_and_what_goes_with_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owed, "PLACES", 4)
    a, note = tmp_path / "a", tmp_path / "state" / OWED
    many, few, none = ([block(10 * segment + slot, segment, slot) for slot in range(5)] for segment in (1, 2, 3))
    for segment, blocks in ((1, many), (2, few), (3, none)):
        make_segment(a, segment, 20, blocks)
    with Rig([a], store=STORE) as rig:
        rig.drives._owed = note
        assert rig.run([Owe({(1, slot) for slot in range(3)}, "acme")]) == [Outcome.DONE]
        assert "are noted as a whole" not in caplog.text
        assert rig.run([Owe({(2, 0), (2, 1)}, "acme")]) == [Outcome.DONE]
        assert "segments=1 are noted as a whole" in caplog.text
    with life(note, a) as after:
        assert facts(after.loaded) == facts_of([*few[2:], *none])
    assert read_owed(note).stores == {}
