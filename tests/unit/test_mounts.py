"""A disk directory whose drive is not mounted is told from a new one, and nothing is made in it."""

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvproto.limits import PAGE_BYTES
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from kvstore.tier.format import CHUNK_SLOTS, RECORD
from kvstore.tier.orders import WHOLE, Commit, Outcome, Owe
from kvstored.check import main as check
from kvstored.cli import _hold_all
from kvstored.index import DirectoryHeldError, hold_directory
from kvstored.index_marks import FOLDER
from kvstored.mounts import FILE_BYTES, MOUNTS, OF_THE_DRIVE, Mounts, mount_point, read_points, write_points
from kvstored.units import ConfigError
from tests.core import Client, Core, chain
from tests.segments import block, facts, facts_of, make_segment, opened, path_of
from tests.unit.drive_kit import Rig, names
from tests.unit.test_disk import begin, fetch, make, put

SLOT = 2 * PAGE_BYTES


class Host:
    """What is mounted, as far as these tests say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mounted: set[Path] = {Path("/")}
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in self.mounted)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_a_path_lies_on_the_nearest_folder_where_something_is_mounted(host: Host, tmp_path: Path) -> None:
    drive = tmp_path / "mnt"
    host.mounted |= {tmp_path, drive}
    assert mount_point(drive / "kv" / "not made yet") == drive
    assert mount_point(drive) == drive
    assert mount_point(tmp_path / "mnt2") == tmp_path
    assert mount_point(Path("/proc/nothing")) == Path("/")
    drive.mkdir()
    (tmp_path / "link").symlink_to(drive)
    assert mount_point(tmp_path / "link" / "kv") == drive


def test_what_really_is_mounted_on_this_host_is_found() -> None:
    assert mount_point(Path("/proc/self")) == Path("/proc")
    assert mount_point(Path("/")) == Path("/")


class TestRemembering:
    def test_a_directory_is_absent_where_a_drive_was_mounted_and_is_not(self, host: Host, tmp_path: Path) -> None:
        note, drive, other = tmp_path / "state" / MOUNTS, tmp_path / "mnt", tmp_path / "other"
        directories = [drive / "kv", other]
        host.mounted.add(drive)
        first = Mounts(note, directories)
        assert first.absent == {}, "nothing is known yet"
        first.remember()
        assert read_points(note) == {drive / "kv": drive}, "what lies on the root file system is always there"
        assert Mounts(note, directories).absent == {}, "the control"
        host.mounted.remove(drive)
        assert Mounts(note, directories).absent == {drive / "kv": f"its drive is not mounted at {drive}"}
        assert first.why_absent(drive / "kv"), "in the life that it went in, too"
        assert not first.why_absent(other)
        assert note.stat().st_mode & 0o777 == 0o600

    def test_what_is_absent_stays_remembered_and_what_is_not_configured_does_not(
        self, host: Host, tmp_path: Path
    ) -> None:
        note, one, two = tmp_path / MOUNTS, tmp_path / "one", tmp_path / "two"
        host.mounted |= {one, two}
        Mounts(note, [one, two]).remember()
        host.mounted.remove(one)
        Mounts(note, [one, two]).remember()
        assert read_points(note) == {one: one, two: two}
        Mounts(note, [one]).remember()
        assert read_points(note) == {one: one}
        Mounts(note, []).remember()
        assert read_points(note) == {}

    def test_a_drive_that_is_mounted_elsewhere_now_is_there(self, host: Host, tmp_path: Path) -> None:
        """Further down; or the directory is a link that leads to another one; or it lies on the root file system."""
        note, link, drives = tmp_path / MOUNTS, tmp_path / "kv", [tmp_path / "one", tmp_path / "two"]
        for drive in drives:
            (drive / "sub").mkdir(parents=True)
        link.symlink_to(drives[0] / "sub")
        host.mounted |= set(drives)
        Mounts(note, [link]).remember()
        host.mounted.remove(drives[0])
        assert Mounts(note, [link]).absent, "the control"
        host.mounted.add(drives[0] / "sub")
        assert not Mounts(note, [link]).absent
        host.mounted.remove(drives[0] / "sub")
        link.unlink()
        link.symlink_to(drives[1] / "sub")
        again = Mounts(note, [link])
        assert not again.absent
        again.remember()
        assert read_points(note) == {link: drives[1]}

    def test_a_note_that_is_damaged_or_no_file_says_nothing_and_is_written_anew(
        self, host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        note, drive = tmp_path / MOUNTS, tmp_path / "mnt"
        write_points(note, {drive: drive})
        whole = note.read_bytes()
        assert Mounts(note, [drive]).absent, "the control"
        for at in range(len(whole)):
            note.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert not Mounts(note, [drive]).absent
            note.write_bytes(whole[:at])
            assert not Mounts(note, [drive]).absent
        assert "where directories lay is not known" in caplog.text
        host.mounted.add(drive)
        Mounts(note, [drive]).remember()
        assert read_points(note) == {drive: drive}
        for put_there in (lambda: os.mkfifo(note), note.mkdir, lambda: note.write_bytes(bytes(2 * FILE_BYTES))):
            note.unlink()
            put_there()
            assert read_points(note) == {}
            if note.is_dir():
                note.rmdir()
                note.touch()

    def test_is_not_written_again_while_nothing_changes(self, host: Host, tmp_path: Path) -> None:
        note, drive = tmp_path / MOUNTS, tmp_path / "mnt"
        host.mounted.add(drive)
        Mounts(note, [drive]).remember()
        before = note.stat().st_ino
        Mounts(note, [drive]).remember()
        assert note.stat().st_ino == before
        Mounts(note, [drive, tmp_path / "mnt" / "b"]).remember()
        assert note.stat().st_ino != before, "the control"


class TestDrive:
    """A directory on a drive that comes and goes."""

    def test_that_is_absent_at_start_is_gone_and_left_alone_until_it_is_mounted(
        self, host: Host, tmp_path: Path
    ) -> None:
        note, one, two = tmp_path / MOUNTS, tmp_path / "one", tmp_path / "two"
        write_points(note, {two: two})
        with Rig([one, two], mounts=Mounts(note, [one, two])) as rig:
            status = rig.drives.status()[1]
            assert (status.state, status.reason) == ("gone", f"its drive is not mounted at {two}")
            for segment in (1, 2):
                assert rig.make(segment, SLOT) is Outcome.DONE
                assert rig.drives.gone_segments() == []
                rig.look(11)
            assert rig.drives.status()[1].state == "gone"
            assert names(two) == []
            host.mounted.add(two)
            rig.drives.gone_segments()
            rig.look(11)
            assert [status.state for status in rig.drives.status()] == ["ok", "ok"]
            assert rig.make(3, SLOT) is Outcome.DONE
            assert rig.path(3, directory=1).exists(), "it is used like any other"
            with pytest.raises(DirectoryHeldError), hold_directory(two):
                pass
            two.rename(tmp_path / "away")
            host.mounted.remove(two)
            rig.look()
            assert rig.drives.status()[1].state == "gone"
            assert rig.drives.gone_segments() == [3]
            (tmp_path / "away").rename(two)
            host.mounted.add(two)
            rig.look(11)
            assert rig.drives.status()[1].state == "ok", "it is held already"
        with hold_directory(two):
            pass

    def test_takes_no_segment_before_it_was_looked_at(self, tmp_path: Path) -> None:
        note, drive = tmp_path / MOUNTS, tmp_path / "mnt"
        write_points(note, {drive: drive})
        rig = Rig([drive], mounts=Mounts(note, [drive]))
        assert rig.drives.status()[0].state == "gone"
        with rig:
            assert rig.make(1, SLOT) is Outcome.FAILED
        assert names(drive) == []

    def test_that_another_daemon_took_meanwhile_stays_gone(self, host: Host, tmp_path: Path) -> None:
        note, drive = tmp_path / MOUNTS, tmp_path / "mnt"
        write_points(note, {drive: drive})
        with Rig([drive], mounts=Mounts(note, [drive])) as rig:
            host.mounted.add(drive)
            with hold_directory(drive):
                for _ in range(2):
                    rig.drives.gone_segments()
                    rig.look(11)
                    status = rig.drives.status()[0]
                    assert (status.state, status.reason) == ("gone", f"another daemon serves {drive}")
            rig.drives.gone_segments()
            rig.look(11)
            assert rig.drives.status()[0].state == "ok"

    def test_that_is_unmounted_while_it_is_used_is_not_made_anew_beneath(self, host: Host, tmp_path: Path) -> None:
        note, drive, away = tmp_path / MOUNTS, tmp_path / "mnt", tmp_path / "away"
        drive.mkdir()
        host.mounted.add(drive)
        remembered = Mounts(note, [drive])
        remembered.remember()
        with Rig([drive], mounts=remembered) as rig:
            assert rig.make(1, SLOT) is Outcome.DONE
            drive.rename(away)
            host.mounted.remove(drive)
            drive.mkdir()
            rig.look()
            status = rig.drives.status()[0]
            assert (status.state, status.reason) == ("gone", f"its drive is not mounted at {drive}")
            assert rig.drives.gone_segments() == [1]
            rig.look(11)
            assert names(drive) == []
            assert rig.drives.gone_segments() == []
            host.mounted.add(drive)  # another drive
            rig.look(11)
            assert rig.drives.status()[0].state == "ok"
            assert names(drive) == ["segments"], "the control: without a note it would have been made before"


class TestStart:
    """A start holds its directories, but for those whose drives refuse."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int, int], None]:
        """So many system calls that open something in a directory fail, with this errno."""
        really = os.open

        def refuse(directory: Path, number: int, times: int) -> None:
            left = times

            def opened(path: Path, *arguments: int) -> int:
                nonlocal left
                if left and Path(path).parent == directory:
                    left -= 1
                    raise OSError(number, os.strerror(number), str(path))
                return really(path, *arguments)

            monkeypatch.setattr(os, "open", opened)

        return refuse

    def two(self, tmp_path: Path) -> list[Path]:
        directories = [tmp_path / "one", tmp_path / "two"]
        for directory in directories:
            with hold_directory(directory):
                pass
        return directories

    @pytest.mark.parametrize("number", sorted(OF_THE_DRIVE), ids=errno.errorcode.get)
    def test_leaves_a_drive_out_that_refuses(
        self, refuse: Callable[[Path, int, int], None], tmp_path: Path, number: int
    ) -> None:
        one, two = self.two(tmp_path)
        mounts = Mounts(tmp_path / MOUNTS, [one, two])
        refuse(two, number, 2)
        with ExitStack() as stack:
            _hold_all([one, two], mounts, stack)
            why = f"its drive cannot be used: {os.strerror(number).lower()} ({two}/lock)"
            assert mounts.absent == {two: why}
            assert not mounts.why_absent(two), "it heals as soon as it can be used"
            with pytest.raises(DirectoryHeldError), hold_directory(one):
                pass
            with hold_directory(two):
                pass

    def test_looks_twice(self, refuse: Callable[[Path, int, int], None], tmp_path: Path) -> None:
        one, two = self.two(tmp_path)
        mounts = Mounts(tmp_path / MOUNTS, [one, two])
        refuse(two, errno.EIO, 1)
        with ExitStack() as stack:
            _hold_all([one, two], mounts, stack)
            assert mounts.absent == {}
            with pytest.raises(DirectoryHeldError), hold_directory(two):
                pass

    def test_holds_nothing_without_the_first(self, refuse: Callable[[Path, int, int], None], tmp_path: Path) -> None:
        one, two = self.two(tmp_path)
        mounts = Mounts(tmp_path / MOUNTS, [one, two])
        refuse(one, errno.EROFS, 2)
        with ExitStack() as stack:
            _hold_all([one, two], mounts, stack)
            assert list(mounts.absent) == [one]
            with hold_directory(two):
                pass

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ELOOP])
    def test_is_refused_for_what_an_operator_did(
        self, refuse: Callable[[Path, int, int], None], tmp_path: Path, number: int
    ) -> None:
        one, two = self.two(tmp_path)
        refuse(two, number, 2)
        with ExitStack() as stack, pytest.raises(ConfigError):
            _hold_all([one, two], Mounts(tmp_path / MOUNTS, [one, two]), stack)

    def test_is_refused_by_a_drive_that_was_never_used(
        self, refuse: Callable[[Path, int, int], None], tmp_path: Path
    ) -> None:
        one, two = self.two(tmp_path)
        (two / "lock").unlink()
        refuse(two, errno.EROFS, 2)
        with ExitStack() as stack, pytest.raises(OSError, match="Read-only"):
            _hold_all([one, two], Mounts(tmp_path / MOUNTS, [one, two]), stack)

    def test_is_refused_by_another_daemon_a_file_and_a_place_where_none_can_be_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = self.two(tmp_path)
        mounts = Mounts(tmp_path / MOUNTS, [one, two])
        with ExitStack() as stack, hold_directory(two), pytest.raises(DirectoryHeldError):
            _hold_all([one, two], mounts, stack)
        (two / "lock").unlink()
        two.rmdir()
        two.touch()
        with ExitStack() as stack, pytest.raises(ConfigError):
            _hold_all([one, two], mounts, stack)
        two.unlink()

        def refused(_path: Path, *_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(two))

        monkeypatch.setattr(Path, "mkdir", refused)
        with ExitStack() as stack, pytest.raises(OSError, match="Read-only"):
            _hold_all([two], mounts, stack)
        assert mounts.absent == {}

    def test_keeps_what_is_remembered_of_a_drive_that_refuses(self, host: Host, tmp_path: Path) -> None:
        note = tmp_path / MOUNTS
        one, two = self.two(tmp_path)
        host.mounted |= {one, two}
        Mounts(note, [two]).remember()
        again = Mounts(note, [one, two])
        for directory in (one, two):
            again.leave_out(directory, "refuses")
        again.remember()
        assert read_points(note) == {two: two}, "where the other lies cannot be told from what answers nobody"


class TestIndex:
    """What a start reads while a directory is absent."""

    def two(self, tmp_path: Path) -> tuple[Path, Path]:
        """Segment 1 in the first directory, 2 in the second, and no index yet."""
        a, b = tmp_path / "a", tmp_path / "b"
        make_segment(a, 1, 20, [block(1, 1, 0)])
        make_segment(b, 2, 20, [block(2, 2, 0, tenant="other")], tenant="other")
        return a, b

    def gone(self, tmp_path: Path, *absent: Path) -> Mounts:
        """The first two directories, these of them absent."""
        note = tmp_path / MOUNTS
        write_points(note, {directory: directory for directory in absent})
        return Mounts(note, [tmp_path / "a", tmp_path / "b"])

    def test_keeps_what_it_knows_of_the_segments_there_and_says_whose_they_are(self, tmp_path: Path) -> None:
        a, b = self.two(tmp_path)
        both = facts_of([block(1, 1, 0), block(2, 2, 0, tenant="other")])
        with opened(a, b) as start:
            assert (facts(start.loaded), start.loaded.unseen) == (both, {})
        b.rename(tmp_path / "kept")
        b.mkdir()
        for seen in ([block(1, 1, 0)], [block(1, 1, 0), block(3, 1, 1)]):
            with opened(a, b, mounts=self.gone(tmp_path, b)) as start:
                assert facts(start.loaded) == facts_of(seen)
                assert (start.loaded.unseen, start.loaded.dropped) == ({2: "other"}, 0)
                assert start.loaded.unreadable == [f"{b}: its drive is not mounted at {b}"]
                assert start.loaded.next_segment > 3, "there may be more there than it knows"
                assert start.commit([block(1, 1, 0), block(3, 1, 1)])
        assert names(b) == []
        b.rmdir()
        (tmp_path / "kept").rename(b)
        with opened(a, b) as start:
            assert facts(start.loaded) == both | facts_of([block(3, 1, 1)])
            assert (start.loaded.rebuilt, start.loaded.unseen) == ("", {})

    def test_counts_what_was_removed_by_hand_as_gone(self, tmp_path: Path) -> None:
        a, b = self.two(tmp_path)
        with opened(a, b):
            pass
        path_of(b, 2).unlink()
        with opened(a, b) as start:
            assert (start.loaded.dropped, start.loaded.unseen) == (1, {})

    def test_that_had_to_be_made_anew_meanwhile_is_made_anew_once_more(self, tmp_path: Path) -> None:
        """It lacks what lies there."""
        a, b = self.two(tmp_path)
        with opened(a, b, mounts=self.gone(tmp_path, b)) as start:
            assert (facts(start.loaded), start.loaded.unseen) == (facts_of([block(1, 1, 0)]), {})
            assert start.loaded.next_segment > 3
        with opened(a, b) as start:
            assert facts(start.loaded) == facts_of([block(1, 1, 0), block(2, 2, 0, tenant="other")])
        with opened(a, b) as start:
            assert start.loaded.rebuilt == "", "the control"

    def test_of_a_segment_without_blocks_nobody_knows_whose_it_is(self, tmp_path: Path) -> None:
        a, b = self.two(tmp_path)
        with opened(a, b) as start:
            assert start.index.commit(Commit((2,), [(2, 0, bytes(CHUNK_SLOTS * RECORD.itemsize))], [], []))
        with opened(a, b, mounts=self.gone(tmp_path, b)) as start:
            assert start.loaded.unseen == {2: ""}

    def test_without_the_first_directory_is_lost_and_nothing_is_made(self, tmp_path: Path) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        make_segment(b, 2, 20, [block(2, 2, 0)])
        before = sorted(tmp_path.rglob("*"))
        with opened(a, b, mounts=self.gone(tmp_path, a)) as start:
            assert (start.loaded.store, start.loaded.segments, start.loaded.foreign) == (b"", [], [])
            assert (start.index.state.value, start.index.reason) == ("lost", f"{a}: its drive is not mounted at {a}")
        assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / MOUNTS])

    def test_that_is_lost_later_leaves_no_mark_beneath(self, host: Host, tmp_path: Path) -> None:
        a, b = self.two(tmp_path)
        host.mounted.add(a)
        remembered = Mounts(tmp_path / MOUNTS, [a, b])
        remembered.remember()
        with opened(a, b, mounts=remembered) as start:
            a.rename(tmp_path / "kept")
            a.mkdir()
            host.mounted.remove(a)
            start.index._mark()
            assert not start.index._marked
            host.mounted.add(a)
            start.index._mark()
            assert (a / FOLDER).exists(), "the control"

    def test_a_number_of_a_segment_there_is_given_to_no_other_where_the_index_is_lost(self, tmp_path: Path) -> None:
        a, b = self.two(tmp_path)
        with opened(a, b, mounts=self.gone(tmp_path, b)) as start:
            assert start.index._nothing().next_segment > 3


class TestDelete:
    """Segments of an absent directory are those that the index knows and nobody sees."""

    def begun(self) -> tuple[Core, Client, Namespace, str]:
        """A store with a block, which hears of three such segments: a tenant's, another's, and nobody knows whose."""
        core = make()
        client, namespace = begin(core)
        put(client, namespace, chain(1, "here"))
        tenant = client.session.tenant.name
        core.store.disk.closed.found_unseen({7: tenant, 8: "other", 9: ""})
        return core, client, namespace, tenant

    def test_notes_those_of_the_tenant_whole_before_it_is_answered(self) -> None:
        core, client, namespace, _ = self.begun()
        answers = client.delete(namespace, chain(1, "nobody has seen it"))
        core.finish_all()
        while not any(isinstance(batch[0], Owe) for batch in core.drive.waiting):
            core.work()
        assert answers == [], "not before it is noted"
        core.work_all()
        assert answers == [0]
        assert core.drive.owed == {(7, WHOLE), (9, WHOLE)}
        assert fetch(client, namespace, chain(1, "here")) == 1, "the control"

    def test_tries_again_where_that_could_not_be_noted(self) -> None:
        core, client, namespace, _ = self.begun()
        core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Owe) else None
        answers = client.delete(namespace, chain(1, "a"))
        core.finish_all()
        core.work_all()
        assert (answers, core.drive.owed) == ([0], set())
        core.drive.fault = lambda _order: None
        client.delete(namespace, chain(1, "b"))
        core.finish_all()
        core.work_all()
        assert core.drive.owed == {(7, WHOLE), (9, WHOLE)}

    @pytest.mark.parametrize("everything", [True, False])
    def test_clear_notes_those_that_it_names(self, everything: bool) -> None:
        core, _, _, tenant = self.begun()
        cleared: list[object] = []
        core.store.clear(ClearScope(None if everything else tenant), cleared.append, dry_run=True)
        core.finish_all()
        core.work_all()
        assert core.drive.owed == set(), "a dry run"
        core.store.clear(ClearScope(None if everything else tenant), cleared.append, dry_run=False)
        core.finish_all()
        core.work_all()
        assert len(cleared) == 2
        assert core.drive.owed == {(7, WHOLE), (9, WHOLE)} | ({(8, WHOLE)} if everything else set())


class TestCheck:
    def test_names_an_absent_directory_and_makes_nothing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        a, b = tmp_path / "a", tmp_path / "b"
        make_segment(a, 1, 20, [block(1, 1, 0)])
        b.mkdir()
        write_points(tmp_path / MOUNTS, {b: b})
        before = sorted(tmp_path.rglob("*"))
        assert check([str(a), str(b), "--state-dir", str(tmp_path)]) == 78
        assert capsys.readouterr().err == f"kvstored check: {b}: its drive is not mounted at {b}\n"
        assert sorted(tmp_path.rglob("*")) == before
        assert check([str(a), "--state-dir", str(tmp_path)]) == 1, "the control"
        assert path_of(a, 1).exists()
