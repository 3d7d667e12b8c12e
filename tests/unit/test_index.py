"""The index over restarts: what was committed comes back, and what is not ours is left alone."""

import errno
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import pytest

from kvstore.tier.format import FORMAT_VERSION, HEADER_BYTES, pack_header_into, parse_header, slot_offset
from kvstored import index_file, index_reader, index_scan
from kvstored.index import DirectoryHeldError, Index, State, hold_directory
from kvstored.index_file import DATA, RESERVE_BYTES, open_index
from kvstored.index_marks import (
    DOUBTFUL,
    FOLDER,
    INDEX_VERSION,
    MAP_BYTES,
    OF,
    mark_doubtful,
    read_store,
    seal,
    write_store,
)
from kvstored.workers import less_unread
from tests.segments import (
    PATIENCE_S,
    SLOT_BYTES,
    STORE,
    Block,
    block,
    commit_of,
    facts,
    facts_of,
    flip,
    make_segment,
    opened,
    patch,
    path_of,
    put,
)


def committed(directory: Path, blocks: list[Block], *, slots: int = 120) -> None:
    """A store with one segment, number 1, with these blocks in its headers and in its index."""
    make_segment(directory, 1, slots, blocks)
    write_store(directory, STORE)
    with opened(directory) as start:
        assert start.commit(blocks)


def test_a_new_directory_gets_a_store_and_holds_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "new") as first:
        assert (first.loaded.segments, first.loaded.names, first.loaded.rebuilt) == ([], [], "")
        assert (first.loaded.next_generation, first.loaded.next_segment) == (1, 0)
        assert first.index.state is State.READY
    with opened(tmp_path / "new") as second:
        assert second.loaded.store == first.loaded.store == read_store(tmp_path / "new")
        assert second.loaded.rebuilt == ""


def test_without_lmdb_the_index_is_lost_at_once_and_no_child_dies_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvstored.index.find_spec", lambda name: None if name == "lmdb" else find_spec(name))
    began: list[object] = []
    monkeypatch.setattr("kvstored.index.Child", lambda *_, **__: began.append(1))
    changed = Event()
    index = Index([tmp_path], changed.set)
    index.start()
    try:
        assert changed.wait(PATIENCE_S)
        assert index.state is State.LOST
        assert "lmdb is not installed" in index.reason
        loaded = index.take_loaded()
        assert loaded is not None
        assert loaded.store == b"", "nothing of the disk is used"
        assert not began
    finally:
        index.stop()
    assert "Traceback" not in capfd.readouterr().err


def test_what_was_committed_comes_back(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed, model=seed % 3) for seed in range(100)]
    blocks += [block(seed, 7, seed, tenant="other") for seed in range(30)]
    directories = tmp_path / "a", tmp_path / "b"
    make_segment(directories[0], 1, 120)
    make_segment(directories[1], 7, 57, tenant="other")
    write_store(directories[0], STORE)
    with opened(*directories) as start:
        assert start.commit(blocks)
        assert start.index.reason == ""
    for _ in range(2):
        with opened(*directories) as start:
            assert start.loaded.rebuilt == ""
            assert facts(start.loaded) == facts_of(blocks)
            assert start.loaded.directories == {1: directories[0], 7: directories[1]}
            assert [(found.segment, found.slots, found.slot_bytes) for found in start.loaded.segments] == [
                (1, 120, SLOT_BYTES),
                (7, 57, SLOT_BYTES),
            ]
            assert {name.canonical for name in start.loaded.names} == {b"model-0", b"model-1", b"model-2"}
            assert start.loaded.next_generation == 101
            assert start.loaded.next_segment == 8


def test_a_commit_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    old = [block(seed, 1, seed) for seed in range(60)]
    new = [block(seed + 500, 1, seed, generation=900 + seed) for seed in range(10)]
    committed(tmp_path, old)
    with opened(tmp_path) as start:
        assert start.commit(new)
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of(new + old[56:])
        assert start.loaded.rebuilt == ""


def test_blocks_of_a_segment_whose_sync_failed_do_not_enter_the_index(tmp_path: Path) -> None:
    good, lost = [block(seed, 1, seed) for seed in range(5)], [block(seed, 2, seed) for seed in range(10, 15)]
    for number in (1, 2):
        make_segment(tmp_path, number, 120)
    write_store(tmp_path, STORE)
    with opened(tmp_path) as start:
        order = commit_of(good + lost)
        order.failed = {2}
        assert start.index.commit(order)
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of(good)
        assert start.loaded.rebuilt == ""
        assert start.loaded.next_generation > max(each.header.generation for each in lost), "they may be there yet"


def test_generations_are_not_given_again_after_their_block_is_gone(tmp_path: Path) -> None:
    committed(tmp_path, [block(1, 1, 0, generation=5000)])
    with opened(tmp_path) as start:
        assert start.commit([block(2, 1, 0, generation=7)])
    with opened(tmp_path) as start:
        assert start.loaded.next_generation == 5001


def test_a_dropped_segment_leaves_no_entries(tmp_path: Path) -> None:
    committed(tmp_path, [block(seed, 1, seed) for seed in range(100)])
    make_segment(tmp_path, 2, 10)
    path_of(tmp_path, 1).unlink()
    with opened(tmp_path) as start:
        assert start.commit([block(200, 2, 3)], dropped=[1])
    make_segment(tmp_path, 1, 120)
    with opened(tmp_path) as start:
        assert start.loaded.rebuilt == ""
        assert facts(start.loaded) == facts_of([block(200, 2, 3)])


def test_entries_of_a_file_that_is_gone_are_forgotten_and_its_number_is_not_given_again(tmp_path: Path) -> None:
    committed(tmp_path, [block(seed, 1, seed) for seed in range(100)])
    path_of(tmp_path, 1).unlink()
    with opened(tmp_path) as start:
        assert (start.loaded.segments, start.loaded.dropped, start.loaded.next_segment) == ([], 100, 2)
        assert start.loaded.rebuilt == ""
    make_segment(tmp_path, 1, 120)
    with opened(tmp_path) as start:
        assert (facts(start.loaded), start.loaded.dropped, start.loaded.rebuilt) == (set(), 0, "")


def test_the_map_grows_when_it_is_full(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed) for seed in range(2000)]
    make_segment(tmp_path, 1, 2000)
    write_store(tmp_path, STORE)
    with opened(tmp_path, map_bytes=1 << 16) as start:
        assert start.commit(blocks)
    with opened(tmp_path, map_bytes=1 << 16) as start:
        assert facts(start.loaded) == facts_of(blocks)
        assert start.loaded.rebuilt == ""


def test_room_for_what_comes_is_set_aside(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed) for seed in range(100)]
    file = tmp_path / FOLDER / DATA
    committed(tmp_path, blocks)
    written_bytes = len(file.read_bytes().rstrip(b"\0"))
    assert file.stat().st_blocks * 512 >= written_bytes + RESERVE_BYTES // 2
    before = file.stat().st_size
    with opened(tmp_path) as start:
        assert start.commit([block(200, 1, 110)])
    assert file.stat().st_size == before, "it does not grow as long as there is room"
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of([*blocks[:56], block(200, 1, 110)]), "a chunk is written whole"
        assert start.loaded.rebuilt == ""


@pytest.mark.parametrize("instead", ["nothing", "file"])
def test_an_index_that_was_taken_away_is_lost_and_the_next_start_believes_the_headers(
    tmp_path: Path, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was damaged: what is durable in headers is durable, and nobody waits for an index."""
    committed(tmp_path, [block(1, 1, 1)])
    folder = tmp_path / FOLDER
    with opened(tmp_path) as start:
        folder.rename(tmp_path / "elsewhere")
        if instead == "file":
            folder.touch()
        assert not start.commit([block(1, 1, 1), block(2, 1, 2)])
        start.await_state(State.LOST)
        assert start.index.reason == "the index is damaged: its folder is gone"
        assert start.index.reason in caplog.text
    if instead == "nothing":
        with pytest.raises(OSError, match="not empty"):  # the former one cannot come back unseen
            (tmp_path / "elsewhere").rename(folder)
    put(path_of(tmp_path, 1), block(2, 1, 2))
    with opened(tmp_path) as start:
        assert start.loaded.rebuilt
        assert facts(start.loaded) == facts_of([block(1, 1, 1), block(2, 1, 2)])
        assert start.commit([block(1, 1, 1), block(2, 1, 2)])


def test_without_an_index_nothing_is_durable_before_the_next_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would believe the old one, which knows nothing of what is written now."""
    committed(tmp_path, [block(1, 1, 1)])
    refused = [OSError(errno.ENOSPC, "no space"), OSError(errno.EROFS, "read-only")]

    def mark(directory: Path) -> None:
        if refused:
            raise refused.pop()
        mark_doubtful(directory)

    monkeypatch.setattr("kvstored.index.mark_doubtful", mark)
    with opened(tmp_path) as start:
        os.kill(start.index.child_pid, signal.SIGKILL)
        start.await_state(State.LOST)
        assert not start.index.headers_will_do
        for told in (False, True):  # tried again with each commit
            assert not start.commit([block(2, 1, 2)])
            assert start.index.headers_will_do is told
    assert (tmp_path / FOLDER / DOUBTFUL).exists()


def test_a_commit_is_refused_while_the_whole_directory_is_away(tmp_path: Path) -> None:
    """It may be a disk that comes back, and nothing could be marked on it meanwhile."""
    disk = tmp_path / "disk"
    committed(disk, [])
    with opened(disk) as start:
        disk.rename(tmp_path / "elsewhere")
        for empty in (False, True):
            if empty:
                disk.mkdir()
            assert not start.commit([block(1, 1, 1)])
            assert start.index.state is State.READY
            assert start.index.reason
        disk.rmdir()
        (tmp_path / "elsewhere").rename(disk)
        assert start.commit([block(1, 1, 1)])
        assert start.index.reason == ""


def test_a_directory_that_is_away_when_its_index_is_lost_is_not_marked_before_it_is_back(tmp_path: Path) -> None:
    """It comes back with an index that knows nothing of what was written meanwhile: nothing is durable until then."""
    disk = tmp_path / "disk"
    committed(disk, [block(1, 1, 1)])
    with opened(disk) as start:
        disk.rename(tmp_path / "elsewhere")
        os.kill(start.index.child_pid, signal.SIGKILL)
        start.await_state(State.LOST)
        assert not start.commit([block(2, 1, 2)])
        assert not start.index.headers_will_do
        (tmp_path / "elsewhere").rename(disk)
        assert not start.commit([block(2, 1, 2)])
        assert start.index.headers_will_do
    assert (disk / FOLDER / DOUBTFUL).exists()


def test_without_an_index_the_headers_are_believed(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed, model=seed % 2) for seed in range(100)]
    make_segment(tmp_path, 1, 120, blocks)
    for rebuilt in ("the store file is missing or damaged", ""):
        with opened(tmp_path) as start:
            assert start.loaded.rebuilt == rebuilt
            assert start.loaded.store == STORE
            assert facts(start.loaded) == facts_of(blocks)
            assert {name.canonical for name in start.loaded.names} == {b"model-0", b"model-1"}
            assert start.loaded.next_generation == 101


def test_a_rebuild_reports_its_progress(tmp_path: Path) -> None:
    make_segment(tmp_path, 1, 300, [block(1, 1, 299)])
    told: list[tuple[int, int] | None] = []
    loaded = Event()

    def wake() -> None:
        told.append(index.progress())
        if index.state is State.READY:
            loaded.set()

    index = Index([tmp_path], wake)
    index.start()
    assert loaded.wait(PATIENCE_S)
    assert index.progress() is None
    index.stop()
    assert told[0] == (128, 300)


def test_of_two_generations_of_one_key_the_higher_stays_and_the_lower_is_erased(tmp_path: Path) -> None:
    old, new = block(1, 1, 5, generation=10), block(1, 2, 3, generation=11)
    other = block(1, 2, 4, generation=9, model=7)  # the same key in another namespace
    assert old.header.key == new.header.key == other.header.key
    make_segment(tmp_path, 1, 10, [old])
    make_segment(tmp_path, 2, 10, [new, other])
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of([new, other])
    path_of(tmp_path, 2).unlink()
    (tmp_path / "store").unlink()
    with opened(tmp_path) as start:
        assert facts(start.loaded) == set()


def test_headers_that_are_not_in_their_place_are_not_believed(tmp_path: Path) -> None:
    good = block(1, 1, 0)
    path = make_segment(tmp_path, 1, 20, [good])
    put(path, block(2, 1, 3), slot=4)  # went astray in the segment
    put(path, block(3, 2, 5), slot=5)  # from another segment
    put(path, block(4, 1, 6, tenant="other"))
    too_long = block(5, 1, 7)
    put(path, replace(too_long, header=replace(too_long.header, stored_bytes=SLOT_BYTES)))
    put(path, block(6, 1, 8))
    flip(path, 8 * (slot_offset(SLOT_BYTES, 8) + 100))
    patch(path, slot_offset(SLOT_BYTES, 9), b"\x01")
    patch(path, slot_offset(SLOT_BYTES, 10) + HEADER_BYTES, b"payload without a header")
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of([good])
        assert start.loaded.dropped == 6


def test_a_long_identity_is_known_by_its_digest_alone(tmp_path: Path) -> None:
    plain = block(1, 1, 0)
    long = replace(plain, header=replace(plain.header, identity=bytes(3073)))
    make_segment(tmp_path, 1, 20, [long])
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of([long])
        assert [name.canonical for name in start.loaded.names] == [b""]


def test_foreign_files_are_reported_and_left_alone(tmp_path: Path) -> None:
    mine = block(1, 1, 0)
    make_segment(tmp_path, 1, 20, [mine])
    make_segment(tmp_path, 2, 20, [block(2, 2, 0)])
    write_store(tmp_path, STORE)
    folder = tmp_path / "segments"
    make_segment(tmp_path, 40, 20, store=bytes(16))
    make_segment(tmp_path, 3, 20, name=50)
    page = bytearray(path_of(tmp_path, 1).read_bytes()[:HEADER_BYTES])
    page[8] = FORMAT_VERSION + 1
    (folder / "00000060.seg").write_bytes(seal(bytes(page[:-8])))
    (folder / "00000061.seg").write_bytes(b"short")
    (folder / "4294967295.seg").write_bytes(b"a number that must not use the numbers up")
    (folder / "README").write_text("not a segment")
    (folder / "00000062.seg").mkdir()
    (folder / "00000063.seg").symlink_to(path_of(tmp_path, 1))
    os.mkfifo(folder / "00000064.seg")
    flip(path_of(tmp_path, 2), 8 * 20)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with opened(tmp_path) as start:
        assert [found.segment for found in start.loaded.segments] == [1]
        assert facts(start.loaded) == facts_of([mine])
        assert {path.name for path in start.loaded.foreign} == {path.name for path in folder.iterdir()} - {
            "00000001.seg"
        }
        assert start.loaded.next_segment == 65
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_of_two_files_with_one_number_the_newer_counts(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    old, new = block(1, 5, 0), block(2, 5, 1)
    make_segment(a, 5, 20, [old], made_s=100)
    make_segment(b, 5, 30, [new], made_s=101)
    with opened(a, b) as start:
        assert facts(start.loaded) == facts_of([new])
        assert start.loaded.directories == {5: b}


@pytest.mark.parametrize("damage", ["missing", "flipped", "empty"])
def test_a_lost_store_id_is_that_of_most_segments(tmp_path: Path, damage: str) -> None:
    blocks = [block(1, 1, 0), block(2, 2, 0)]
    for each in blocks:
        make_segment(tmp_path, each.header.segment, 20, [each])
    make_segment(tmp_path, 3, 20, [block(3, 3, 0)], store=bytes(16))
    write_store(tmp_path, STORE)
    store = tmp_path / "store"
    if damage == "missing":
        store.unlink()
    elif damage == "flipped":
        flip(store, 100)
    else:
        store.write_bytes(b"")
    with opened(tmp_path) as start:
        assert (start.loaded.store, read_store(tmp_path)) == (STORE, STORE)
        assert facts(start.loaded) == facts_of(blocks)
        assert start.loaded.foreign == [path_of(tmp_path, 3)]


def test_a_store_of_another_version_is_left_alone(tmp_path: Path) -> None:
    make_segment(tmp_path, 3, 20, [block(3, 3, 0)])
    strange = seal(b"KVSTORE\0" + (2).to_bytes(4, "little") + STORE)
    (tmp_path / "store").write_bytes(strange)
    with opened(tmp_path) as start:
        assert start.index.state is State.LOST
        assert "version 2" in start.index.reason
        assert (start.loaded.segments, start.loaded.next_segment, start.loaded.store) == ([], 4, b"")
        assert not start.commit([block(1, 1, 0)])
    assert (tmp_path / "store").read_bytes() == strange


@pytest.mark.parametrize("version", [0, INDEX_VERSION + 1])
def test_an_index_of_another_version_is_made_anew_from_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """Not so the store around it (see above). The control is the start before: an index of today's is believed."""
    blocks = [block(seed, 1, seed) for seed in range(40)]
    committed(tmp_path, blocks)
    for said in ("", f"it is of version {version}, and this is version {INDEX_VERSION}", ""):
        if said:
            with monkeypatch.context() as patched, open_index(tmp_path / FOLDER, MAP_BYTES) as index:
                with index.env.begin() as txn:
                    state = index.state(txn)
                patched.setattr(index_file, "INDEX_VERSION", version)
                with index.env.begin(write=True) as txn:
                    txn.put(b"state", state.pack(), db=index.meta)
        with opened(tmp_path) as start:
            assert said in start.loaded.rebuilt
            assert bool(start.loaded.rebuilt) is bool(said)
            assert facts(start.loaded) == facts_of(blocks)


def test_of_a_file_that_was_cut_the_slots_inside_it_count(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed) for seed in range(100)]
    committed(tmp_path, blocks)
    os.truncate(path_of(tmp_path, 1), slot_offset(SLOT_BYTES, 70) + HEADER_BYTES)
    with opened(tmp_path) as start:
        assert (facts(start.loaded), start.loaded.dropped) == (facts_of(blocks[:70]), 30)
        assert start.loaded.rebuilt == ""
    (tmp_path / "store").unlink()
    with opened(tmp_path) as start:
        assert facts(start.loaded) == facts_of(blocks[:70])
        assert start.loaded.rebuilt


def test_an_unreadable_directory_takes_only_its_own_segments_away(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    blocks = [block(1, 1, 0), block(2, 2, 0)]
    make_segment(a, 1, 20, blocks[:1])
    make_segment(b, 2, 20, blocks[1:])
    with opened(a, b) as start:
        assert facts(start.loaded) == facts_of(blocks)
    (b / "segments").rename(b / "hidden")
    (b / "segments").write_text("not a directory")
    with opened(a, b) as start:
        assert facts(start.loaded) == facts_of(blocks[:1])
        assert len(start.loaded.unreadable) == 1
        assert start.loaded.next_segment == 3
    (b / "segments").unlink()
    (b / "hidden").rename(b / "segments")
    with opened(a, b) as start:
        assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of(blocks), "")


def test_numbers_of_a_directory_that_has_left_the_list_are_given_to_no_other(tmp_path: Path) -> None:
    """It may return, and of two files with one number one would be a stranger's."""
    a, b = tmp_path / "a", tmp_path / "b"
    blocks = [block(1, 1, 0), block(2, 9, 0)]
    make_segment(a, 1, 20, blocks[:1])
    make_segment(b, 9, 20, blocks[1:])
    with opened(a, b) as start:
        assert facts(start.loaded) == facts_of(blocks)
    for _ in range(3):
        with opened(a) as start:
            assert (facts(start.loaded), start.loaded.next_segment) == (facts_of(blocks[:1]), 10)
    with opened(a, b) as start:
        assert facts(start.loaded) == facts_of(blocks)
        assert start.loaded.rebuilt == f"it does not know what lies in {b}, which was not on the list"


def test_a_second_directory_that_fails_keeps_nobody_from_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    look = Path.is_dir

    def fails(path: Path) -> bool:
        if path.is_relative_to(b):
            raise OSError(errno.EIO, "the drive fails")
        return look(path)

    make_segment(a, 1, 20, [block(1, 1, 0)])
    with opened(a):
        pass
    found = index_scan.scan([a, b])
    monkeypatch.setattr(Path, "is_dir", fails)
    assert index_reader._doubt([a, b], found) == ""


@pytest.mark.parametrize(("number", "strange"), [(errno.EIO, False), (errno.EACCES, False), (errno.ELOOP, True)])
def test_a_segment_that_cannot_be_read_now_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, strange: bool
) -> None:
    """What the index knows of it is kept for the next start, and what is deleted meanwhile is noted."""
    a, b = tmp_path / "a", tmp_path / "b"
    for segment, directory in ((1, a), (2, b), (3, b)):
        make_segment(directory, segment, 20, [block(segment, segment, 0)])
    look = index_scan._look_once

    def fails(directory: Path, path: Path) -> index_scan.SegmentFile | None:
        if path == path_of(b, 3):
            raise OSError(number, os.strerror(number))
        return look(directory, path)

    assert index_scan.scan([a, b]).looked == [a, b], "the control"
    monkeypatch.setattr(index_scan, "_look_once", fails)
    found = index_scan.scan([a, b])
    assert (sorted(found.segments), found.next_segment) == ([1, 2], 4)
    assert (found.foreign, found.unread) == (([path_of(b, 3)], []) if strange else ([], [path_of(b, 3)]))
    assert (found.looked, bool(found.unreadable)) == (([a, b], False) if strange else ([a], True))


def test_an_index_of_another_store_is_not_believed(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed) for seed in range(20)]
    committed(tmp_path / "a", blocks)
    with opened(tmp_path / "b"):
        pass
    (tmp_path / "a" / FOLDER).rename(tmp_path / "old")
    (tmp_path / "b" / FOLDER).rename(tmp_path / "a" / FOLDER)
    (tmp_path / "a" / FOLDER / OF).unlink()  # that says which directory it is of
    with opened(tmp_path / "a") as start:
        assert "another store" in start.loaded.rebuilt
        assert facts(start.loaded) == facts_of(blocks)


def test_a_child_that_dies_loses_the_index_until_the_next_start(tmp_path: Path) -> None:
    blocks = [block(seed, 1, seed) for seed in range(20)]
    make_segment(tmp_path, 1, 20, blocks)
    with opened(tmp_path) as start:
        os.kill(start.index.child_pid, signal.SIGKILL)
        assert not start.commit(blocks[:3])
        assert start.index.state is State.LOST
        assert "signal 9" in start.index.reason
        assert (tmp_path / FOLDER / DOUBTFUL).exists()
        assert start.index.take_loaded() is None
    with opened(tmp_path) as start:
        assert "doubt" in start.loaded.rebuilt
        assert facts(start.loaded) == facts_of(blocks)
        assert start.commit(blocks)


def test_a_child_that_hangs_does_not_hang_the_daemon(tmp_path: Path) -> None:
    committed(tmp_path, [])
    with opened(tmp_path, commit_s=0.05) as start:
        os.kill(start.index.child_pid, signal.SIGSTOP)
        start.woken.clear()
        assert not start.commit([block(1, 1, 1)])
        assert start.index.state is State.HUNG
        assert not start.commit([block(2, 1, 2)])
        os.kill(start.index.child_pid, signal.SIGCONT)
        start.await_state(State.READY)
        assert start.index.reason == ""


def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str) -> None:
    """Have children begin with some lines of shell."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n{before}\nexec {sys.executable} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_child_that_crashes_is_started_again_and_believes_the_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block(seed, 1, seed) for seed in range(20)]
    committed(tmp_path / "a", blocks)
    crashes = f"echo >> {tmp_path}/times; test $(wc -l < {tmp_path}/times) -gt 3 || kill -SEGV $$"
    interpreter(tmp_path, monkeypatch, crashes)
    with opened(tmp_path / "a") as start:
        assert start.loaded.rebuilt == "the index child was killed by signal 11"
        assert facts(start.loaded) == facts_of(blocks)


def test_after_the_third_crash_of_a_rebuild_the_daemon_starts_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path / "a", [block(1, 1, 1, generation=10**6)])
    interpreter(tmp_path, monkeypatch, f"echo >> {tmp_path}/times; exit 7")
    with opened(tmp_path / "a") as start:
        start.await_state(State.LOST)
        assert start.index.reason == "the index child ended with code 7"
        assert (facts(replace(start.loaded, segments=[])), start.loaded.next_segment) == (set(), 2)
        assert start.loaded.store == STORE
        assert start.loaded.next_generation > 10**6
        assert start.loaded.closed == {1}, "what lies there may be deleted, and would be back"
        assert [(found.segment, found.tenant) for found in start.loaded.segments] == [(1, "acme")]
        left = less_unread(start.loaded)
        assert (left.segments, left.directories, left.unread) == ([], {}, [path_of(tmp_path / "a", 1)])
        assert not start.commit([])
    assert (tmp_path / "times").read_text() == 4 * "\n"
    assert path_of(tmp_path / "a", 1).exists()


def test_a_child_that_says_nothing_is_waited_for_in_vain_and_welcome_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path / "a", [block(1, 1, 1)])
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    interpreter(tmp_path, monkeypatch, f"read line < {gate}")
    woken = Event()
    index = Index([tmp_path / "a"], woken.set, answer_s=0.02)
    index.start()
    assert woken.wait(PATIENCE_S)
    assert (index.state, index.take_loaded()) == (State.HUNG, None)
    woken.clear()
    gate.write_text("go\n")
    assert woken.wait(PATIENCE_S)
    loaded = index.take_loaded()
    assert index.state is State.READY
    assert loaded is not None
    assert facts(loaded) == facts_of([block(1, 1, 1)])
    index.stop()


def test_a_stopped_index_takes_no_commits(tmp_path: Path) -> None:
    with opened(tmp_path) as start:
        pid = start.index.child_pid
    assert not start.commit([])
    assert start.index.state is State.STOPPED
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_signals_that_stop_a_daemon_do_not_stop_its_child(tmp_path: Path) -> None:
    committed(tmp_path, [])
    with opened(tmp_path) as start:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(start.index.child_pid, number)
        assert start.commit([block(1, 1, 1)])


def test_the_child_dies_with_its_daemon(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from threading import Event; from kvstored.index import Index\n"
        "woken = Event(); index = Index([Path(sys.argv[1])], woken.set); index.start()\n"
        "while index.take_loaded() is None: woken.wait(); woken.clear()\n"
        "print(index.child_pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, check=False)
    assert ended.returncode == -signal.SIGKILL
    with opened(tmp_path) as start:  # waits for the lock of the old child
        assert start.index.state is State.READY


def test_one_at_a_time_holds_a_directory(tmp_path: Path) -> None:
    with (
        hold_directory(tmp_path / "new"),
        pytest.raises(DirectoryHeldError, match="new"),
        hold_directory(tmp_path / "new"),
    ):
        pass
    with hold_directory(tmp_path / "new"):
        pass


@pytest.mark.parametrize(
    ("module", "absent"),
    [("kvstored.index_child", ["numpy", "numba", "grpc"]), ("kvstored.index", ["lmdb", "numba", "grpc"])],
)
def test_imports_stay_light(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, text=True)
    assert ended.stdout == "[]\n"


def test_records_of_the_index_are_those_of_the_headers(tmp_path: Path) -> None:
    """Every field of a record, by way of the header."""
    plain = block(1, 1, 2, generation=40)
    child = replace(
        plain,
        header=replace(plain.header, parent=bytes([9] * 32), parent_generation=39, parent_segment=1, parent_slot=5),
    )
    make_segment(tmp_path, 1, 20, [child], made_s=123)
    page = bytearray(HEADER_BYTES)
    pack_header_into(memoryview(page), child.header)
    assert parse_header(page) == child.header
    with opened(tmp_path) as start:
        record = start.loaded.segments[0].records[2]  # type: ignore[index]
        names = {name.number: name for name in start.loaded.names}
    assert record["key"].tobytes() == child.header.key
    assert [int(record[name]) for name in ("generation", "parent_generation", "parent_segment", "parent_slot")] == [
        40, 39, 1, 5,
    ]  # fmt: skip
    assert (int(record["checksum"]), int(record["touched_s"])) == (child.header.checksum, 123)
    assert names[int(record["namespace"])].digest == child.header.digest
