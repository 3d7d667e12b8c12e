"""A drive that neither answers nor fails keeps nobody waiting for longer than it is told to."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvproto.limits import PAGE_BYTES
from kvstore.tier.orders import DropSegment, Order, Outcome
from kvstored import cli, drive_asking
from kvstored.config import ConfigError, load
from kvstored.drive_asking import ask_each, patience_of_at_most, patience_s, silent
from kvstored.index import DirectoryHeldError, hold_directory
from kvstored.mounts import MOUNTS, Mounts, read_points, write_points
from tests.core import SECOND
from tests.node import until
from tests.unit.drive_kit import Gate, Rig, load_of, open_fds

SLOT = 2 * PAGE_BYTES
LIMIT_S = 0.3
SOON_S = 5.0  # far below what a hang takes, and above what a busy machine needs


class Hang:
    """A drive that says nothing until it is let go: any call that looks at it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *calls: str) -> None:
        self.over = threading.Event()
        self.hung: set[Path] = set()
        self.waiting = 0
        for name in calls or ("stat", "lstat", "statvfs", "open", "mkdir", "scandir", "listdir"):
            monkeypatch.setattr(os, name, self.slow(getattr(os, name)))

    def slow(self, call: Any) -> Any:
        def asked(path: Any, *words: Any, **named: Any) -> Any:
            text = path if isinstance(path, str) else os.fspath(path) if isinstance(path, os.PathLike) else ""
            if any(Path(text).is_relative_to(folder) for folder in self.hung) and not self.over.is_set():
                self.waiting += 1
                self.over.wait(60)
            return call(path, *words, **named)

        return asked


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    monkeypatch.setattr(drive_asking, "PATIENCE_S", LIMIT_S)
    with monkeypatch.context() as patched:
        hang = Hang(patched)
        yield hang
        hang.over.set()
        assert until(lambda: not drive_asking._asked)


@pytest.fixture
def drives(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    return folders


class TestQuestions:
    def test_all_are_asked_at_once_and_have_the_limit_together(self, hang: Hang, drives: list[Path]) -> None:
        hang.hung |= set(drives[:2])
        began_s = time.monotonic()
        answers = ask_each(drives, lambda folder: folder.stat().st_ino)
        assert LIMIT_S <= time.monotonic() - began_s < 2 * LIMIT_S + 1
        assert [answers[folder].done() for folder in drives] == [False, False, True]
        assert answers[drives[2]].result() == drives[2].stat().st_ino
        hang.over.set()
        assert until(lambda: all(answer.done() for answer in answers.values())), "who comes late is heard all the same"

    def test_who_has_not_answered_is_not_asked_again_nor_waited_for(self, hang: Hang, drives: list[Path]) -> None:
        hang.hung.add(drives[0])
        ask_each(drives, Path.stat)
        for _ in range(20):
            began_s = time.monotonic()
            assert not ask_each(drives[:1], Path.stat)[drives[0]].done()
            assert time.monotonic() - began_s < LIMIT_S
        assert hang.waiting == 1
        hang.over.set()
        assert until(lambda: not drive_asking._asked)
        assert ask_each(drives[:1], Path.stat)[drives[0]].done()

    def test_an_error_is_an_answer(self, hang: Hang, tmp_path: Path) -> None:
        answer = ask_each([tmp_path / "nothing", tmp_path / "nothing"], Path.stat)[tmp_path / "nothing"]
        assert isinstance(answer.exception(), FileNotFoundError)
        assert ask_each([], Path.stat) == {}


class Spinning(logging.Handler):
    """A drive that answers once the log has said so and so often that it does not."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left, self.up, self.asked = times, threading.Event(), 0
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        if len(self.said) == self.left:
            self.up.set()

    def stat(self, folder: Path) -> os.stat_result:
        self.asked += 1
        assert self.up.wait(60)
        return folder.stat()


@pytest.fixture
def spinning(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spinning]:
    drive = Spinning(3)
    monkeypatch.setattr(drive_asking, "SLOW_S", 0.02)
    monkeypatch.setattr(drive_asking, "REPEAT_S", 0.03)
    drive_asking.log.addHandler(drive)
    yield drive
    drive_asking.log.removeHandler(drive)
    drive.up.set()
    assert until(lambda: not drive_asking._asked)


class TestPatience:
    """Disks spin up, and RAIDs assemble."""

    def test_who_answers_after_a_while_is_not_silent_and_the_log_says_who_that_is(
        self, spinning: Spinning, drives: list[Path]
    ) -> None:
        assert ask_each(drives[:1], spinning.stat)[drives[0]].done()
        assert len(spinning.said) == 3
        assert all(line.startswith(f"directory={drives[0]} does not answer yet: 0 s of at") for line in spinning.said)

    def test_who_never_answers_is(
        self, spinning: Spinning, drives: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drive_asking, "PATIENCE_S", LIMIT_S)
        spinning.left = -1
        assert not ask_each(drives[:1], spinning.stat)[drives[0]].done()
        assert spinning.said

    def test_it_is_longer_than_disks_need_and_shorter_than_a_start_may_take(self) -> None:
        assert 45 <= patience_s() <= 120

    def test_what_is_left_of_it_is_waited_for_and_then_the_next_question_is_asked(
        self, spinning: Spinning, drives: list[Path]
    ) -> None:
        spinning.left = -1
        with patience_of_at_most(LIMIT_S):
            first = ask_each(drives[:1], spinning.stat)[drives[0]]
            assert not first.done()
        spinning.left = len(spinning.said) + 1
        second = ask_each(drives[:2], Path.stat)
        assert spinning.asked == 1
        assert first.done(), "it was waited for"
        assert second[drives[0]].result().st_ino == drives[0].stat().st_ino
        assert second[drives[1]].done()

    def test_a_start_over_a_slow_drive_begins_with_it(
        self, spinning: Spinning, drives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hang = Hang(monkeypatch)
        hang.over = spinning.up
        hang.hung.add(drives[0])
        with cli._index_of(loaded(tmp_path, drives)) as (_, index):
            assert index is not None
            assert len(spinning.said) == 3
            for drive in drives:
                with pytest.raises(DirectoryHeldError), hold_directory(drive):
                    pass

    def test_a_check_has_less(self, drives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[float] = []

        def asked(folders: Iterable[Path], question: Callable[[Path], str]) -> Any:
            seen.append(patience_s())
            return ask_each(folders, question)

        monkeypatch.setattr(cli, "ask_each", asked)
        file = tmp_path / "kvstored.toml"
        file.write_text(f'[daemon]\nruntime_dir = "{tmp_path}/run"\n[dram]\nsize = "16MiB"\narena = "4MiB"\n')
        assert cli.main(["config", "check", str(file), "--environment", "/dev/null"]) == 0
        assert set(seen) == {10}
        assert patience_s() > 10, "only then"


class TestStart:
    def test_a_directory_that_hangs_is_absent_and_none_of_the_others(self, hang: Hang, drives: list[Path]) -> None:
        hang.hung.add(drives[1])
        assert Mounts(None, drives).absent == {drives[1]: silent()}

    def test_and_so_is_one_whose_folder_hangs(self, hang: Hang, tmp_path: Path) -> None:
        inner = tmp_path / "mnt" / "kv"
        inner.mkdir(parents=True)
        hang.hung.add(tmp_path / "mnt")
        assert Mounts(None, [inner]).absent == {inner: silent()}

    def test_where_it_lies_stays_remembered(
        self, hang: Hang, drives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        note = tmp_path / MOUNTS
        mounted = {Path("/"), *drives}
        monkeypatch.setattr(os.path, "ismount", lambda path: bool(os.lstat(path)) and Path(path) in mounted)
        write_points(note, {drives[0]: drives[0], drives[1]: drives[1]})
        mounts = Mounts(note, drives)
        hang.hung.add(drives[1])  # a moment later
        mounts.remember()
        assert read_points(note) == {drive: drive for drive in drives}

    @pytest.mark.parametrize("first", [False, True])
    def test_one_that_hangs_while_it_is_being_held_is_left_out_and_let_go(
        self, hang: Hang, drives: list[Path], first: bool
    ) -> None:
        mounts = Mounts(None, drives)
        assert mounts.absent == {}, "it answered"
        slow = drives[0 if first else 1]
        hang.hung.add(slow / "lock")
        with ExitStack() as stack:
            cli._hold_all(drives, mounts, stack)
            assert mounts.absent == {slow: silent()}
            hang.over.set()
            assert until(lambda: not drive_asking._asked)
            with hold_directory(slow):
                pass  # it was held too late, and is free for who looks after it now
            others = [drive for drive in drives if drive != slow]
            for drive in [] if first else others:
                with pytest.raises(DirectoryHeldError), hold_directory(drive):
                    pass
        for drive in drives:
            with hold_directory(drive):
                pass

    def test_it_is_said_in_the_log(
        self, hang: Hang, drives: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        hang.hung.add(drives[1])
        began_s = time.monotonic()
        with caplog.at_level(logging.WARNING), cli._index_of(loaded(tmp_path, drives)) as (_, index):
            assert index is not None
            assert time.monotonic() - began_s < SOON_S
        assert f"disk: directory={drives[1]} is left out: {silent()}" in caplog.text


def loaded(tmp_path: Path, drives: list[Path], *more: str) -> Any:
    """A configuration with these directories."""
    flags = {
        "--dram": "16MiB", "--arena": "4MiB", "--disk-size": "256MiB", "--disk": ":".join(map(str, drives)),
        "--runtime-dir": str(tmp_path / "run"),
    }  # fmt: skip
    return load(None, {}, {**flags, **dict(zip(more[::2], more[1::2], strict=True))}, memory_bytes=1 << 30)


class TestConfiguration:
    def test_the_size_of_segments_is_taken_from_drives_that_answer(
        self, hang: Hang, drives: list[Path], tmp_path: Path
    ) -> None:
        usual_bytes = loaded(tmp_path, drives).config.segment_bytes
        file = drives[2] / "segments" / "00000001.seg"
        file.parent.mkdir()
        with file.open("wb") as made:
            made.truncate(2 * usual_bytes)
        hang.hung.add(drives[0])
        began_s = time.monotonic()
        assert loaded(tmp_path, drives).config.segment_bytes == 2 * usual_bytes
        assert time.monotonic() - began_s < SOON_S
        hang.hung.add(drives[2])
        assert loaded(tmp_path, drives).config.segment_bytes == usual_bytes, "the control"

    def test_a_check_names_who_does_not_answer(
        self, hang: Hang, drives: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hang.hung.add(drives[1])
        file = tmp_path / "kvstored.toml"
        listed = ", ".join(f'"{drive}"' for drive in drives)
        file.write_text(
            f'[daemon]\nruntime_dir = "{tmp_path}/run"\n[dram]\nsize = "16MiB"\narena = "4MiB"\n'
            f'[disk]\ndirectories = [{listed}]\nsize = "256MiB"\n'
        )
        assert cli.main(["config", "check", str(file), "--environment", "/dev/null"]) == 78
        assert f"disk.directories: {drives[1]}: {silent()}" in capsys.readouterr().err

    def test_two_that_are_one_are_found_all_the_same(self, hang: Hang, drives: list[Path], tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(drives[2])
        hang.hung.add(drives[0])
        with pytest.raises(ConfigError, match="are one folder"):
            loaded(tmp_path, [*drives, link])


class TestLater:
    """A drive that begins to hang while the daemon runs."""

    @pytest.mark.parametrize("call", ["open", "pread"])
    def test_who_drops_a_segment_does_not_wait_for_who_opens_it(self, tmp_path: Path, call: str) -> None:
        with Rig([tmp_path]) as first:
            places, saves = first.save_blocks(7, 1, 100)
        with Rig([tmp_path]) as rig:
            before = open_fds()
            rig.drives.adopt(7, tmp_path)
            gate = Gate(if_=lambda what, *_: call == "pread" or ".seg" in str(what))
            rig.files.rules[call] = gate
            read: list[Order] = [load_of(saves[0], places[0])]
            rig.drives.submit(read)
            gate.wait_reached()
            began_s = time.monotonic()
            drop: list[Order] = [DropSegment(7)]
            rig.drives.submit(drop)  # on the owner thread
            assert time.monotonic() - began_s < SOON_S
            gate.let_go()
            rig.wait(read, drop)
            assert drop[0].outcome is Outcome.DONE
            assert open_fds() == before, "whoever opened it has closed it"

    def test_a_directory_that_was_silent_at_start_heals_once_it_answers(self, drives: list[Path]) -> None:
        mounts = Mounts(None, drives[:2])
        mounts.leave_out(drives[1], silent())
        gate = Gate(if_=lambda path: path.is_relative_to(drives[1]))
        rig = Rig(drives[:2], mounts=mounts)
        rig.files.rules["identity"] = gate
        rig.drives.start()
        try:
            gate.wait_reached()
            assert rig.make(1, SLOT) is Outcome.DONE, "the other serves"
            rig.clock_ns += 6 * SECOND
            rig.drives.look_around()
            assert [(one.state, one.reason) for one in rig.drives.status()][1] == ("gone", "no answer within 5 s")
            gate.let_go()
            rig.until(lambda: not rig.drives._drives[1].directory._looking_since_ns)
            rig.look()
            assert rig.drives.status()[1].state == "ok"
            assert rig.make(2, SLOT) is Outcome.DONE
            assert rig.path(2, directory=1).exists()
        finally:
            gate.let_go()
            rig.drives.stop()
