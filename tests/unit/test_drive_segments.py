"""Segment files are made whole or not at all, and nobody else's file is ever touched."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvproto.limits import MIB, PAGE_BYTES
from kvstore.tier.format import Superblock, pack_superblock
from kvstore.tier.orders import DropSegment, Outcome
from kvstored.drive_files import Files
from tests.unit.drive_kit import STORE, Gate, Rig, error, load_of, names, open_fds

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


@pytest.mark.parametrize("call", ["open", "fallocate", "pwrite", "fdatasync", "rename", "sync_folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.EMFILE])
def test_a_segment_that_cannot_be_made_leaves_nothing_behind(rig: Rig, call: str, number: int) -> None:
    fds = open_fds()
    rig.files.rules[call] = error(number, times=1)
    assert rig.make(1, SLOT) is FAILED
    assert names(rig.path(1).parent) == []
    assert open_fds() == fds
    state = {errno.ENOSPC: "full", errno.EDQUOT: "full", errno.EROFS: "read-only"}.get(number, "ok")
    status = rig.drives.status()[0]
    assert (status.state, status.segments, status.errors) == (state, 0, 1)
    if state != "ok":
        assert rig.make(1, SLOT) is FAILED, "not before it was looked at again"
        rig.look(9)
        assert rig.drives.status()[0].state == state
        rig.look(2)
    assert rig.make(1, SLOT) is DONE


def test_a_full_drive_is_tried_again_only_when_a_segment_fits(rig: Rig) -> None:
    rig.files.rules["fallocate"] = error(errno.ENOSPC, times=1)
    assert rig.make(1, SLOT) is FAILED
    real = Files.space
    rig.files.space = lambda path: (rig.segment_bytes - 1, real(rig.files, path)[1])  # type: ignore[method-assign]
    rig.look(11)
    assert rig.drives.status()[0].state == "full"
    del rig.files.space
    rig.look(11)
    assert rig.drives.status()[0].state == "ok"


@pytest.mark.parametrize("name", ["00000001.seg", "00000001.new"])
@pytest.mark.parametrize("kind", ["text", "other store", "link", "pipe", "folder"])
def test_somebody_elses_file_is_left_alone(rig: Rig, name: str, kind: str) -> None:
    path, elsewhere = rig.path(1).with_name(name), rig.directories[0] / "precious"
    elsewhere.write_text("precious")
    if kind == "text":
        path.write_text("precious")
    elif kind == "other store":
        path.write_bytes(pack_superblock(Superblock(1, rig.segment_bytes, SLOT, 0, b"x" * 16, "a")))
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = path.lstat().st_ino
    assert rig.make(1, SLOT) is FAILED
    assert path.lstat().st_ino == before
    assert elsewhere.read_text() == "precious"
    assert rig.drives.status()[0].state == "ok"
    assert rig.make(2, SLOT) is DONE


def test_a_file_of_ours_that_is_in_the_way_is_replaced(rig: Rig) -> None:
    path = rig.path(1)
    path.write_bytes(pack_superblock(Superblock(1, rig.segment_bytes, SLOT, 0, STORE, "a")) + b"old")
    path.with_suffix(".new").write_bytes(bytes(100))
    assert rig.make(1, SLOT) is DONE
    assert path.stat().st_size == rig.segment_bytes


def test_unfinished_segments_are_removed_at_start_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "segments"
    folder.mkdir()
    (folder / "00000001.new").write_bytes(bytes(10_000))
    kept = ["00000002.new", "notes.new", "00000003.seg"]
    for name in kept:
        (folder / name).write_text("somebody else's")
    with Rig([tmp_path]):
        assert names(folder) == sorted(kept)


def test_segments_go_where_fewest_are(pair: Rig) -> None:
    for segment in range(6):
        assert pair.make(segment, SLOT) is DONE
    assert [status.segments for status in pair.drives.status()] == [3, 3]
    pair.files.rules["fallocate"] = error(errno.ENOSPC, times=1)
    assert pair.make(6, SLOT) is FAILED
    for segment in range(7, 10):
        assert pair.make(segment, SLOT) is DONE
    assert sorted(status.segments for status in pair.drives.status()) == [3, 6]


def test_a_dropped_segment_is_gone_but_for_reads_that_run(rig: Rig) -> None:
    places, saves = rig.save_blocks(1, 2, 100)
    gate = Gate(if_=lambda fd, buffers, offset: offset > 0)
    rig.files.rules["pread"] = gate
    running = [load_of(saves[0], places[0])]
    rig.drives.submit(running)
    gate.wait_reached()
    fds = open_fds()
    assert rig.run([DropSegment(1)]) == [DONE]
    assert not rig.path(1).exists()
    assert rig.run([load_of(saves[1], places[1])]) == [GONE]
    assert rig.drives.sync([1]) == {1}
    gate.let_go()
    rig.wait(running)
    assert running[0].outcome is DONE
    rig.until(lambda: open_fds() == fds - 1)
    assert rig.make(1, SLOT) is DONE, "its number is free"


def test_a_segment_that_cannot_be_removed_can_be_dropped_again(rig: Rig) -> None:
    rig.make(1, SLOT)
    rig.files.rules["unlink"] = error(errno.EIO, times=1)
    assert rig.run([DropSegment(1)]) == [FAILED]
    assert rig.path(1).exists()
    assert rig.run([DropSegment(1)]) == [DONE]
    assert not rig.path(1).exists()


def store_other(path: Path) -> None:
    path.write_bytes(pack_superblock(Superblock(7, 4 * MIB, SLOT, 0, b"x" * 16, "a")).ljust(4 * MIB, b"\0"))


@pytest.mark.parametrize("change", [os.unlink, store_other, lambda path: path.write_bytes(bytes(4 * MIB))])
def test_an_adopted_segment_that_is_not_ours_is_gone_and_told_once(tmp_path: Path, change: object) -> None:
    with Rig([tmp_path]) as first:
        places, saves = first.save_blocks(7, 1, 100)
    change(first.path(7))  # type: ignore[operator]
    with Rig([tmp_path]) as second:
        second.drives.adopt(7, tmp_path)
        assert second.run([load_of(saves[0], places[0])]) == [GONE]
        assert second.drives.gone_segments() == [7]
        assert second.drives.gone_segments() == []
        assert second.run([load_of(saves[0], places[0])]) == [GONE]
