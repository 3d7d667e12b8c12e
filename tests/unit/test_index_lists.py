"""Directories leave the list, are absent or fail, and return: what is durable stays, what was deleted stays deleted."""

import errno
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.tier.format import HEADER_BYTES, slot_offset
from kvstored import index_reader, index_scan
from kvstored.index import Index, State
from kvstored.index_loaded import Loaded
from kvstored.index_marks import (
    DOUBTFUL,
    FOLDER,
    NEXT,
    OF,
    UNSEEN,
    mark_doubtful,
    read_next,
    read_of,
    seal,
    write_next,
    write_store,
)
from kvstored.mounts import Mounts
from tests.segments import (
    MADE_S,
    SLOT_BYTES,
    STORE,
    Block,
    block,
    facts,
    facts_of,
    make_segment,
    opened,
    path_of,
)

ONE, TWO, THREE = block(1, 1, 0), block(2, 9, 0), block(3, 20_000, 0, generation=10**18)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two directories with a block each, in segments 1 and 9, and the index of both."""
    a, b = tmp_path / "a", tmp_path / "b"
    make_segment(a, 1, 20, [ONE])
    make_segment(b, 9, 20, [TWO])
    write_store(a, STORE)
    for _ in range(2):
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO])
    return a, b


def without(directory: Path) -> Mounts:
    """It is absent."""
    mounts = Mounts()
    mounts.leave_out(directory, "its drive is not mounted")
    return mounts


@contextmanager
def unreadable(directory: Path) -> Iterator[None]:
    """Its folder of segments cannot be read."""
    folder, aside = directory / "segments", directory / "aside"
    folder.rename(aside)
    folder.write_text("not a directory")
    yield
    folder.unlink()
    aside.rename(folder)


def lost(*directories: Path) -> Loaded:
    """A life without an index child."""
    index = Index(directories, lambda: None)
    index._lose("no child can be started")
    loaded = index.take_loaded()
    index.stop()
    assert loaded is not None
    return loaded


def start_with(monkeypatch: pytest.MonkeyPatch, what: str, instead: Callable[..., object], *directories: Path) -> int:
    """A start in a process of its own, with something else in place of what the reader calls. Its exit status."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(index_reader, what, instead)
        index_reader.load(theirs, directories, {}, "", 1 << 26, None, look=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    ours.close()
    theirs.close()
    return status


def killed(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


class TestAnIndexElsewhere:
    """The second directory was the first one since, alone: the other index knows nothing of what came then."""

    def test_counts_though_it_is_partial(self, two: tuple[Path, Path]) -> None:
        a, b = two
        with opened(b, a, mounts=without(a)) as start:
            make_segment(b, 20_000, 20, [THREE])
            assert start.commit([TWO, THREE])
        assert (b / FOLDER / DOUBTFUL).exists(), "of its own accord"
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO, THREE])

    def test_counts_though_its_child_died(self, two: tuple[Path, Path]) -> None:
        a, b = two
        with opened(b) as start:
            os.kill(start.index.child_pid, signal.SIGKILL)
            start.await_state(State.LOST)
            assert start.index.headers_will_do
            make_segment(b, 20_000, 20, [THREE])
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO, THREE])

    def test_counts_though_it_was_never_written(self, two: tuple[Path, Path]) -> None:
        a, b = two
        assert not (b / FOLDER).exists()
        lost(b)
        make_segment(b, 20_000, 20, [THREE])
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO, THREE])

    def test_is_removed_once_the_first_one_has_all_and_not_before(
        self, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = two
        with opened(b, a) as start:
            assert start.loaded.rebuilt
        assert not (a / FOLDER).exists()
        assert os.WIFSIGNALED(start_with(monkeypatch, "_conclude", killed, a, b))
        assert (b / FOLDER).exists()
        for rebuilt in (f"{b} has one, too: it was the first directory since", ""):
            with opened(a, b) as start:
                assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of([ONE, TWO]), rebuilt)
        assert not (b / FOLDER).exists()

    def test_that_could_not_be_looked_for_is_not_removed(
        self, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The stale one was believed."""
        a, b = two
        mark_doubtful(b)
        assert start_with(monkeypatch, "_doubt", lambda *_: "", a, b) == 0
        assert (b / FOLDER).exists()

    def test_beside_what_could_not_be_read_is_not_removed(self, two: tuple[Path, Path]) -> None:
        a, b = two
        mark_doubtful(b)
        with unreadable(b), opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE])
        assert (b / FOLDER).exists()
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO])
        assert not (b / FOLDER).exists()

    def test_of_another_store_is_left_alone(self, two: tuple[Path, Path]) -> None:
        a, b = two
        write_store(b, b"another store...")
        mark_doubtful(b)
        with opened(a, b) as start:
            assert start.loaded.rebuilt == ""
        assert (b / FOLDER).exists()


class TestADirectoryThatReturns:
    @pytest.mark.parametrize("how", ["absent", "unreadable"])
    def test_is_not_known_before_it_was_looked_into(self, two: tuple[Path, Path], how: str) -> None:
        a, b = two
        with opened(a) as start:
            assert facts(start.loaded) == facts_of([ONE])
        if how == "absent":
            with opened(a, b, mounts=without(b)):
                pass
        else:
            with unreadable(b), opened(a, b) as start:
                assert start.loaded.unreadable
        for rebuilt in (f"it does not know what lies in {b}, which was not on the list", ""):
            with opened(a, b) as start:
                assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of([ONE, TWO]), rebuilt)

    def test_stays_known_while_it_is_absent(self, two: tuple[Path, Path]) -> None:
        """The control: a segment that was made and never committed is no reason to believe headers."""
        a, b = two
        with opened(a, b, mounts=without(b)):
            pass
        make_segment(b, 10, 20, [block(4, 10, 0)])
        with opened(a, b) as start:
            assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of([ONE, TWO]), "")

    def test_is_known_by_what_was_written_though_the_start_that_lacked_it_was_killed(
        self, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, b = two
        mark_doubtful(a)
        assert os.WIFSIGNALED(start_with(monkeypatch, "_note", killed, a))
        said = read_of(a / FOLDER)
        assert said is not None
        assert said.directories == {str(a)}
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO])

    @pytest.mark.parametrize("what", ["write_of", "write_next"])
    def test_is_not_forgotten_by_a_start_that_cannot_say_so(
        self, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        a, b = two
        assert start_with(monkeypatch, what, full, a) == 0
        with opened(a, b) as start:
            assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of([ONE, TWO]), "")

    def test_is_not_known_to_an_index_whose_list_is_damaged(self, two: tuple[Path, Path]) -> None:
        a, b = two
        with opened(a):
            pass
        (a / FOLDER / OF).write_bytes(b"{}")
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO])

    @pytest.mark.parametrize("form", ["list", "with a number"])
    def test_is_known_by_what_former_versions_wrote(self, two: tuple[Path, Path], form: str) -> None:
        a, b = two
        with opened(a):
            pass
        said = [str(a)] if form == "list" else {"directories": [str(a)], "next": 700}
        (a / FOLDER / OF).write_bytes(seal(json.dumps(said).encode()))
        for directory in (a, b):
            (directory / NEXT).unlink()
        known = read_of(a / FOLDER)
        assert known is not None
        assert known.directories == {str(a)}
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([ONE, TWO])
            assert start.loaded.next_segment == (10 if form == "list" else 700)


class TestNumbers:
    """No number of a segment is given twice, whatever becomes of its directory."""

    def test_of_a_directory_that_left_the_list_are_known(self, two: tuple[Path, Path]) -> None:
        a, _ = two
        for doubted in (False, True, True):
            if doubted:
                mark_doubtful(a)
            with opened(a) as start:
                assert start.loaded.next_segment == 10

    def test_that_came_in_life_are_known_to_a_start_that_reads_headers(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        with opened(a, b) as start:
            make_segment(b, 9, 20, [TWO], store=start.loaded.store)
            assert start.commit([TWO])
        mark_doubtful(a)
        with opened(a) as start:
            assert start.loaded.next_segment == 10

    def test_that_were_dropped_in_life_are_known(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        with opened(a, b) as start:
            make_segment(a, 1, 20, [ONE], store=start.loaded.store)
            make_segment(b, 9, 20, [TWO], store=start.loaded.store)
            assert start.commit([ONE, TWO])
            b.rename(tmp_path / "kept")
            assert start.commit([ONE], dropped=[9])
        with opened(a) as start:
            assert start.loaded.next_segment == 10

    def test_of_a_drive_that_was_exchanged_for_one_start_are_known(
        self, two: tuple[Path, Path], tmp_path: Path
    ) -> None:
        a, b = two
        b.rename(tmp_path / "kept")
        for _ in range(3):
            with opened(a, b) as start:
                assert start.loaded.next_segment == 10

    def test_outlive_a_rebuild_that_is_killed_anywhere(
        self, two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        a, _ = two
        for step in ("remove_index", "write_store", "write_index", "_note", "_conclude"):
            mark_doubtful(a)
            assert os.WIFSIGNALED(start_with(monkeypatch, step, killed, a))
        shutil.rmtree(a / FOLDER)
        with opened(a) as start:
            assert start.loaded.next_segment == 10
        (a / NEXT).unlink()
        (a / FOLDER / OF).write_bytes(seal(json.dumps({"directories": [str(a)], "next": 700}).encode()))
        mark_doubtful(a)  # of a former version
        assert os.WIFSIGNALED(start_with(monkeypatch, "write_index", killed, a))
        with opened(a) as start:
            assert start.loaded.next_segment == 700

    def test_are_known_to_a_life_without_an_index(self, two: tuple[Path, Path]) -> None:
        a, b = two
        assert lost(a, b).next_segment == 10
        assert lost(a).next_segment == 10
        with unreadable(b):
            assert lost(a, b).next_segment == 10 + UNSEEN, "there may be more"

    def test_that_came_while_the_index_was_lost_are_known(self, two: tuple[Path, Path]) -> None:
        a, b = two
        with opened(a, b) as start:
            os.kill(start.index.child_pid, signal.SIGKILL)
            start.await_state(State.LOST)
            make_segment(b, 30, 20, [block(4, 30, 0)])
            assert not start.commit([block(4, 30, 0)])
            assert start.index.headers_will_do
        with opened(a) as start:
            assert start.loaded.next_segment == 31

    def test_of_the_first_directory_are_far_off_once_another_is_the_first(self, two: tuple[Path, Path]) -> None:
        """It may have had more since: only its own file says exactly."""
        _, b = two
        for _ in range(3):
            with opened(b) as start:
                assert start.loaded.next_segment == 10 + UNSEEN

    def test_are_exact_whatever_the_order(self, two: tuple[Path, Path]) -> None:
        a, b = two
        for order in ((b, a), (a, b), (b, a)):
            with opened(*order) as start:
                assert start.loaded.next_segment == 10

    def test_grow_by_no_start_that_makes_no_segments(self, two: tuple[Path, Path]) -> None:
        a, b = two
        for _ in range(3):
            with opened(a, b, mounts=without(b)) as start:
                assert start.loaded.next_segment == 10 + UNSEEN

    def test_are_noted_in_place_and_only_grow(self, tmp_path: Path) -> None:
        write_next(tmp_path, 7, first=True)
        before = (tmp_path / NEXT).stat()
        for number, expected in ((9, 9), (3, 9), (9, 9)):
            write_next(tmp_path, number, first=True)
            assert read_next([tmp_path]) == expected
        after = (tmp_path / NEXT).stat()
        assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)
        whole = (tmp_path / NEXT).read_bytes()
        for at in range(len(whole)):
            (tmp_path / NEXT).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert read_next([tmp_path]) == 0
        (tmp_path / NEXT).write_bytes(whole + b"more")
        write_next(tmp_path, 4, first=True)
        assert read_next([tmp_path]) == 4


def aside_of(directory: Path, number: int) -> Path:
    path = path_of(directory, number)
    return path.with_name(f"{path.name}.double")


class TestTwoFilesWithOneNumber:
    def doubles(self, tmp_path: Path) -> tuple[Path, Path, Block, Block]:
        """Two directories with segment 2 of one store; that of the second is the elder one."""
        a, b = tmp_path / "a", tmp_path / "b"
        new, old = block(1, 2, 0, generation=50), block(2, 2, 0)
        make_segment(a, 2, 20, [new], made_s=MADE_S + 1)
        make_segment(b, 2, 20, [old])
        write_store(a, STORE)
        return a, b, new, old

    def test_the_elder_is_set_aside_and_never_back_with_what_was_deleted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        a, b, new, _ = self.doubles(tmp_path)
        make_segment(b, 3, 20, [block(3, 3, 0)])
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([new, block(3, 3, 0)])
            assert (start.loaded.foreign, start.loaded.unreadable) == ([aside_of(b, 2)], [])
        assert str(aside_of(b, 2)) in caplog.text
        assert aside_of(b, 2).exists()
        with opened(b) as start:
            assert facts(start.loaded) == facts_of([block(3, 3, 0)])

    def test_a_copy_of_a_drive_does_not_bring_back_what_was_deleted_beside_it(self, tmp_path: Path) -> None:
        a, c = tmp_path / "a", tmp_path / "c"
        make_segment(a, 1, 20, [ONE])
        write_store(a, STORE)
        with opened(a):
            pass
        shutil.copytree(a, c)
        with opened(a, c) as start:
            assert facts(start.loaded) == facts_of([ONE])
            with path_of(a, 1).open("r+b") as file:  # DELETE
                file.seek(slot_offset(SLOT_BYTES, 0))
                file.write(bytes(4096))
        with opened(c) as start:
            assert facts(start.loaded) == set()

    def test_one_file_that_is_seen_twice_is_left_alone(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        path = make_segment(a, 1, 20, [ONE])
        b.mkdir()
        (b / "segments").symlink_to(a / "segments")
        for _ in range(2):
            with opened(a, b) as start:
                assert facts(start.loaded) == facts_of([ONE])
        (b / "segments").unlink()
        (b / "segments").mkdir()
        path_of(b, 1).hardlink_to(path)
        for _ in range(2):
            with opened(a, b) as start:
                assert facts(start.loaded) == facts_of([ONE])
        assert path.exists()
        assert path_of(b, 1).exists()

    def test_one_file_that_two_mounts_show_as_two_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As over layers of overlayfs, or bindfs. The control is the test before: two files are two."""
        a, b = tmp_path / "a", tmp_path / "b"
        path = make_segment(a, 1, 20, [ONE])
        write_store(a, STORE)
        b.mkdir()
        (b / "segments").symlink_to(a / "segments")
        found = index_scan.scan([a, b])
        monkeypatch.setattr(Path, "samefile", lambda *_: False)
        index_scan.set_aside_doubles(found)
        assert list((a / "segments").iterdir()) == [path]
        assert (list(found.segments), found.aside, found.unreadable) == ([1], [], [])

    @pytest.mark.parametrize("first", ["old", "new"])
    def test_of_a_drive_and_its_copy_the_one_counts_that_was_written_to_last(self, tmp_path: Path, first: str) -> None:
        """Whichever is named first: a copy of before, or the old drive after a move to a larger one."""
        old, new = tmp_path / "old", tmp_path / "new"
        make_segment(old, 1, 20, [ONE])
        write_store(old, STORE)
        shutil.copytree(old, new)
        later = block(9, 1, 9)
        path = make_segment(new, 1, 20, [ONE, later])
        os.utime(path_of(old, 1), ns=(1, path.stat().st_mtime_ns - 1))
        with opened(*((old, new) if first == "old" else (new, old))) as start:
            assert facts(start.loaded) == facts_of([ONE, later])
        assert aside_of(old, 1).exists()
        assert path.exists()

    def test_a_copy_that_was_not_finished_does_not_count(self, tmp_path: Path) -> None:
        a, c = tmp_path / "a", tmp_path / "c"
        make_segment(a, 1, 20, [ONE])
        write_store(a, STORE)
        shutil.copytree(a, c)
        os.truncate(path_of(c, 1), HEADER_BYTES)
        with opened(c, a) as start:
            assert facts(start.loaded) == facts_of([ONE])

    def test_a_copy_under_another_name_is_a_strangers(self, tmp_path: Path) -> None:
        path = make_segment(tmp_path, 1, 20, [ONE])
        write_store(tmp_path, STORE)
        copy = path.with_name("0000000001.seg")
        shutil.copy(path, copy)
        with opened(tmp_path) as start:
            assert facts(start.loaded) == facts_of([ONE])
            assert start.loaded.foreign == [copy]
        assert path.exists()
        assert copy.exists()

    def test_several_copies_are_all_kept(self, tmp_path: Path) -> None:
        a, c = tmp_path / "a", tmp_path / "c"
        make_segment(a, 1, 20, [ONE])
        write_store(a, STORE)
        for _ in range(3):
            make_segment(c, 1, 20, [ONE], made_s=MADE_S - 1)
            with opened(a, c) as start:
                assert facts(start.loaded) == facts_of([ONE])
        kept = sorted(path.name for path in (c / "segments").iterdir())
        assert kept == [f"00000001.seg.double{more}" for more in ("", "2", "3")]

    def test_neither_counts_while_the_elder_cannot_be_set_aside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All of a tenant that is hidden is noted then, and the number is among it."""
        a, b, new, _ = self.doubles(tmp_path)

        def refused(path: Path, target: Path) -> None:
            raise OSError(errno.EROFS, f"the drive refuses {path}, {target}")

        found = index_scan.scan([a, b])
        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", refused)
            index_scan.set_aside_doubles(found)
        assert (found.segments, found.looked, found.foreign, found.aside) == ({}, [], [], [])
        assert (found.next_segment, len(found.unreadable)) == (3, 2)
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([new]), "the control"

    def test_neither_counts_in_a_life_without_an_index_and_none_is_set_aside(self, tmp_path: Path) -> None:
        a, b, _, _ = self.doubles(tmp_path)
        loaded = lost(a, b)
        assert (loaded.segments, loaded.closed, loaded.looked, loaded.foreign) == ([], frozenset(), frozenset(), [])
        assert path_of(b, 2).exists()

    def test_a_look_sets_none_aside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b, _, _ = self.doubles(tmp_path)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            child = os.fork()
            if child == 0:
                index_reader.load(theirs, [a, b], {}, "", 1 << 26, None, look=True)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert path_of(b, 2).exists()
