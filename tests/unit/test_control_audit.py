"""The audit file: it only grows, within bounds, outlives daemons, and never holds up an act."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from kvstored import admin_audit
from kvstored.admin_audit import FILE, FILE_BYTES, FILES, REMEMBERED, Act, Audit

WAIT_S = 10.0


def act(number: int = 0, scope: str = "everything") -> Act:
    return Act(1.7e9 + number, 1000, 4711, "", "clear", scope, number, 4096 * number, "done")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An act's line is there when it was noted, however busy the machine is."""
    monkeypatch.setattr(admin_audit, "WRITE_S", WAIT_S)


def test_lines_are_added_to_a_file_of_ones_own_and_the_next_life_knows_them(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = Audit(tmp_path / "state")
        first.note(act(1))
        first.stop(WAIT_S)
    finally:
        os.umask(before)
    path = tmp_path / "state" / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert json.loads(path.read_text())["blocks"] == 1
    second = Audit(tmp_path / "state")
    assert second.recent(9) == (act(1),)
    second.note(act(2))
    second.stop(WAIT_S)
    assert [json.loads(line)["blocks"] for line in path.read_text().splitlines()] == [1, 2]
    assert Audit(tmp_path / "state").recent(1) == (act(2),)


def test_it_is_bounded_and_what_is_put_aside_is_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_audit, "FILE_BYTES", 2048)
    audit = Audit(tmp_path)
    for number in range(100):
        audit.note(act(number))
    audit.stop(WAIT_S)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [FILE, *(f"{FILE}.{number}" for number in range(1, FILES))]
    assert all(path.stat().st_size <= 2048 for path in files)
    newest_last = list(reversed(files))
    numbers = [json.loads(line)["blocks"] for path in newest_last for line in path.read_text().splitlines()]
    assert numbers == list(range(100 - len(numbers), 100))
    assert FILE_BYTES * FILES < 6 << 20


def test_a_disk_that_fails_loses_the_line_and_not_the_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit(tmp_path)
    real = os.write

    def full(fd: int, text: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    audit.note(act(1))
    assert audit.lost == 1
    assert audit.recent(9) == (act(1),)
    monkeypatch.setattr(os, "write", lambda fd, text: real(fd, text[: len(text) // 2]))
    audit.note(act(2))
    monkeypatch.setattr(os, "write", real)
    audit.note(act(3))
    audit.stop(WAIT_S)
    assert audit.lost == 2
    assert audit.recent(9) == (act(1), act(2), act(3))
    assert Audit(tmp_path).recent(9) == (act(3),), "half a line is none"


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_audit, "WRITE_S", 0.01)
    monkeypatch.setattr(admin_audit, "WAITING", 4)
    audit, hanging, free, real = Audit(tmp_path), threading.Event(), threading.Event(), os.write

    def hang(fd: int, text: bytes) -> int:
        hanging.set()
        free.wait(WAIT_S)
        return real(fd, text)

    monkeypatch.setattr(os, "write", hang)
    for number in range(20):
        audit.note(act(number))
    assert hanging.wait(WAIT_S)
    assert not (tmp_path / FILE).read_text()
    assert len(audit.recent(99)) == 20
    assert audit.lost > 10
    free.set()
    audit.stop(WAIT_S)
    assert len((tmp_path / FILE).read_text().splitlines()) + audit.lost == 20


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/dev/null"), os.mkfifo])
def test_what_is_no_file_under_its_name_is_left_alone(tmp_path: Path, make: object) -> None:
    make(tmp_path / FILE)  # type: ignore[operator]
    audit = Audit(tmp_path)
    audit.note(act(1))
    audit.stop(WAIT_S)
    assert audit.lost == 1
    assert audit.recent(9) == (act(1),)


def test_lines_that_are_not_ours_are_passed_over_and_few_are_remembered(tmp_path: Path) -> None:
    lines = [b"", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"unix_s": "x"}', json.dumps({"verb": "clear"}).encode()]
    (tmp_path / FILE).write_bytes(b"\n".join(lines) + b"\n")
    audit = Audit(tmp_path)
    assert audit.recent(9) == ()
    for number in range(REMEMBERED + 5):
        audit.note(act(number))
    audit.stop(WAIT_S)
    assert [one.blocks for one in audit.recent(REMEMBERED)] == list(range(5, REMEMBERED + 5))


def test_without_a_place_acts_are_remembered(tmp_path: Path) -> None:
    nowhere = Audit(None)
    nowhere.note(act(1))
    assert (nowhere.recent(9), nowhere.lost) == ((act(1),), 0)
    nowhere.stop(WAIT_S)
    closed = Audit(tmp_path / "file" / "below") if (tmp_path / "file").write_text("") == 0 else None
    assert closed is not None
    closed.note(act(2))
    assert (closed.recent(9), closed.lost) == ((act(2),), 1)
    closed.stop(WAIT_S)
