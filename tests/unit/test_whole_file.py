"""Files that appear whole: two that write the same one do not meet, and nothing is taken that was not given."""

import os
import stat
from pathlib import Path

import pytest

from kvctl.client import Exit, KvctlError
from kvctl.whole_file import WholeFile, need_free


def test_two_that_write_the_same_file_each_write_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "warm.kva"
    with WholeFile(path, force=True) as first:
        first.write(b"first")
        killed = WholeFile(path, force=True)
        killed.__enter__().write(b"half")
        with WholeFile(path, force=True) as third:
            third.write(b"third")
        assert path.read_bytes() == b"third"
    assert path.read_bytes() == b"first"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    left = [one.name for one in tmp_path.iterdir() if one != path]
    assert len(left) == 1, "what was killed leaves its own, and the others nothing"
    assert left[0].endswith(".part")
    killed._file.close()
    with WholeFile(path, force=True) as again:
        again.write(b"again")
    assert path.read_bytes() == b"again"
    assert [one.name for one in tmp_path.iterdir() if one != path] == left


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_stays_unless_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "warm.kva"
    with WholeFile(path, force=False) as target:
        target.write(b"mine")
    assert path.read_bytes() == b"mine", "the control"
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()

    def late() -> None:
        with WholeFile(path, force=False) as target:
            target.write(b"mine")
            path.write_bytes(b"theirs")

    with pytest.raises(KvctlError, match="is there already") as raised:
        late()
    assert raised.value.code == Exit.USAGE
    assert path.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "warm.kva"
    path.write_bytes(b"before")

    def ended() -> None:
        with WholeFile(path, force=True) as target:
            target.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended()
    with pytest.raises(KvctlError, match="cannot be written: Input/output error"), WholeFile(path, force=True):
        raise OSError(5, "Input/output error")
    with pytest.raises(KvctlError, match="cannot be written"), WholeFile(tmp_path / "no" / "x", force=True):
        pass
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_name_is_one_still(tmp_path: Path) -> None:
    path = tmp_path / ("\u00e4" * 120 + ".kva")
    with WholeFile(path, force=False) as target:
        target.write(b"x")
    assert path.read_bytes() == b"x"


def test_only_files_give_way(tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nothing")
    file.write_bytes(b"")
    need_free(tmp_path / "new", force=False)
    need_free(file, force=True)
    for path, force in ((pipe, True), (tmp_path, True), (Path(os.devnull), True), (file, False), (link, False)):
        with pytest.raises(KvctlError) as raised:
            need_free(path, force=force)
        assert raised.value.code == Exit.USAGE
