"""`kvctl service install` more than once: folders of the disk tier stay until somebody says otherwise."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvctl import service
from kvctl.client import Exit, KvctlError
from tests.kvctl_line import Run
from tests.unit.test_kvctl import bare_environment, kvctl  # noqa: F401  fixtures
from tests.unit.test_systemd_units import unit_of

A, B, ODD = Path("/mnt/a/kv"), Path("/mnt/b"), Path("/mnt/100% odd\\drive/kv")
DAEMON = Path("/usr/bin/kvstored")


def install(root: Path, disks: Sequence[Path] = (), no_disks: Sequence[Path] = (), *, dry_run: bool = False) -> None:
    service.install(root=root, daemon=DAEMON, disks=disks, no_disks=no_disks, start=False, dry_run=dry_run)


def writable(root: Path) -> list[str]:
    """What the drop-in opens, without its quotes."""
    text = (root / "usr/lib/systemd/system/kvstored.service.d/disk.conf").read_text()
    return [path.strip('"') for path in unit_of(text).get("Service", {}).get("ReadWritePaths", [])]


def made(root: Path) -> list[str]:
    """Folders that are made at each boot, beside those of every host."""
    lines = (root / "usr/lib/tmpfiles.d/kvstored.conf").read_text().splitlines()
    return [line.split('"')[1] for line in lines if line.startswith('d "')]


def test_folders_that_were_named_before_are_kept_by_an_upgrade_and_by_one_more(tmp_path: Path) -> None:
    install(tmp_path, [A])
    assert writable(tmp_path) == made(tmp_path) == [str(A)]
    install(tmp_path)
    assert writable(tmp_path) == made(tmp_path) == [str(A)]
    install(tmp_path, [B])
    assert writable(tmp_path) == made(tmp_path) == [str(A), str(B)]
    install(tmp_path, [A])
    assert writable(tmp_path) == made(tmp_path) == [str(A), str(B)]


def test_a_folder_goes_when_it_is_named_and_the_last_one_too(tmp_path: Path) -> None:
    install(tmp_path, [A, B])
    install(tmp_path, no_disks=[A], dry_run=True)
    assert writable(tmp_path) == [str(A), str(B)]
    install(tmp_path, no_disks=[A])
    assert writable(tmp_path) == made(tmp_path) == [str(B)]
    install(tmp_path, no_disks=[B])
    assert writable(tmp_path) == made(tmp_path) == []
    install(tmp_path)
    assert writable(tmp_path) == made(tmp_path) == []


def test_a_folder_that_is_not_there_cannot_be_taken_away(tmp_path: Path) -> None:
    install(tmp_path, [A])
    with pytest.raises(KvctlError, match=f"{B} is none of its folders of disk; they are: {A}") as caught:
        install(tmp_path, no_disks=[B])
    assert caught.value.code is Exit.USAGE
    assert writable(tmp_path) == [str(A)]


def test_names_with_signs_that_mean_something_to_systemd_come_back_as_they_were(tmp_path: Path) -> None:
    install(tmp_path, [ODD])
    before = writable(tmp_path), made(tmp_path)
    install(tmp_path)
    assert (writable(tmp_path), made(tmp_path)) == before
    install(tmp_path, no_disks=[ODD])
    assert writable(tmp_path) == []


@pytest.mark.parametrize("written", ["-/mnt/a/kv", "%S/kv", "kv", '"/mnt/a'])
def test_what_somebody_else_wrote_there_is_not_overwritten(tmp_path: Path, written: str) -> None:
    install(tmp_path, [A])
    drop_in = tmp_path / "usr/lib/systemd/system/kvstored.service.d/disk.conf"
    drop_in.write_text(f"[Service]\nReadWritePaths={written}\n")
    with pytest.raises(KvctlError, match="move that line to a drop-in of another name"):
        install(tmp_path, [B])
    assert written in drop_in.read_text()


def test_beside_a_package_they_are_kept_and_taken_away_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = tmp_path / "packaged.service"
    unit.touch()
    monkeypatch.setattr(service, "PACKAGED_UNIT", unit)
    monkeypatch.setattr(service, "_check_reach", lambda _wish: None)
    monkeypatch.setattr(service, "_folders_there", lambda _path: [A, B])
    for gone, left in ((), [A, B]), ((A,), [B]), ((A, B), []):
        placed, _ = service.install(
            root=None, daemon=DAEMON, disks=[], no_disks=gone, start=False, dry_run=True
        )  # fmt: skip
        texts = {one.piece.path.name: one.piece.text for one in placed}
        assert set(texts) == {"disk.conf", "kvstored.conf"}
        for text in texts.values():
            assert [path for path in (A, B) if str(path) in text] == left


def test_the_commands_words_for_it(kvctl: Run, tmp_path: Path) -> None:  # noqa: F811
    words = ("service", "install", "--root", str(tmp_path), "--daemon", str(DAEMON))
    assert kvctl(*words, "--disk", str(A), "--disk", str(B)).code == 0
    assert kvctl(*words, "--no-disk", str(A)).code == 0
    assert writable(tmp_path) == [str(B)]
    assert kvctl(*words, "--no-disk", os.devnull).code == Exit.USAGE
