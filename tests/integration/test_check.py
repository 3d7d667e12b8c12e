"""`kvstored check`: what it finds on a disk tier, what it repairs, and whom it keeps out."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvkernels.planes import pack
from kvproto.limits import PAGE_BYTES
from kvstore.tier.format import HEADER_BYTES, Codec, slot_offset
from kvstored.check_owner import give_back
from kvstored.cli import main
from kvstored.index import hold_directory
from kvstored.index_marks import FOLDER, seal, write_store
from tests.segments import SLOT_BYTES, STORE, Block, block, facts, facts_of, flip, make_segment, opened, path_of, put

BLOCKS = [block(seed, 1, seed) for seed in range(100)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One segment with 100 blocks, and their index."""
    make_segment(tmp_path / "store", 1, 120, BLOCKS)
    write_store(tmp_path / "store", STORE)
    with opened(tmp_path / "store"):
        pass
    return tmp_path / "store"


def summary(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = [line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if not line.startswith("  ")]
    return {line[0]: line[1] for line in lines}


def assert_repairs(store: Path, blocks: list[Block]) -> None:
    """After `--repair` there is nothing left to find, and these blocks are there."""
    assert main(["check", "--repair", str(store)]) == 1
    assert main(["check", str(store)]) == 0
    with opened(store) as start:
        assert start.loaded.rebuilt == ""
        assert facts(start.loaded) == facts_of(blocks)


def packed_block(seed: int, slot: int) -> Block:
    plain = block(seed, 1, slot)
    content = np.frombuffer((plain.payload[:8] * PAGE_BYTES)[: 4 * PAGE_BYTES], np.uint8)
    packed = pack(content, PAGE_BYTES)
    assert packed is not None
    buffer, stored_bytes = packed
    stored = buffer[:stored_bytes].tobytes()
    header = replace(
        plain.header, codec=Codec.BF16_PLANES_ZSTD, block_bytes=len(content), stored_bytes=stored_bytes,
        checksum=xxhash.xxh3_64_intdigest(content.tobytes()), stored_checksum=xxhash.xxh3_64_intdigest(stored),
    )  # fmt: skip
    return Block(header, stored)


def test_the_command_finds_a_good_store_clean(store: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "kvstored", "check", str(store)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "blocks good: 100\nblocks damaged: 0\n" in ended.stdout
    assert "index: good" in ended.stdout


def test_a_directory_that_was_never_used_is_clean(tmp_path: Path) -> None:
    assert main(["check", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"lock"}


def test_a_check_changes_nothing(store: Path) -> None:
    flip(path_of(store, 1), 8 * (slot_offset(SLOT_BYTES, 3) + 50))
    flip(store / FOLDER / "data.mdb", 8 * (2 * PAGE_BYTES + 4))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert main(["check", str(store)]) == 1
    before[store / "lock"] = b""
    assert before == {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("offset", [50, HEADER_BYTES, HEADER_BYTES + 3999], ids=["header", "first byte", "last byte"])
def test_a_damaged_block_is_found_and_erased(store: Path, capsys: pytest.CaptureFixture[str], offset: int) -> None:
    flip(path_of(store, 1), 8 * (slot_offset(SLOT_BYTES, 3) + offset))
    assert main(["check", str(store)]) == 1
    out = summary(capsys)
    assert (out["blocks good"], out["blocks damaged"], out["index entries without block"]) == ("99", "1", "0")
    assert_repairs(store, BLOCKS[:3] + BLOCKS[4:])


def test_packed_blocks_are_unpacked(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, wrong_block, wrong_frame = (packed_block(seed, seed) for seed in (110, 111, 112))
    wrong_block = replace(wrong_block, header=replace(wrong_block.header, checksum=1))
    noise = os.urandom(wrong_frame.header.stored_bytes)
    wrong_frame = Block(replace(wrong_frame.header, stored_checksum=xxhash.xxh3_64_intdigest(noise)), noise)
    for each in (good, wrong_block, wrong_frame):
        put(path_of(store, 1), each)
    assert main(["check", str(store)]) == 1
    out = summary(capsys)
    assert (out["blocks good"], out["blocks damaged"], out["blocks without index entry"]) == ("101", "2", "1")
    assert_repairs(store, [*BLOCKS, good])


def test_blocks_and_entries_are_compared(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = path_of(store, 1)
    put(path, block(500, 1, 110))  # a block without entry
    put(path, block(501, 1, 0))  # another block than the entry says
    with path.open("r+b") as file:  # an entry without block
        file.seek(slot_offset(SLOT_BYTES, 1))
        file.write(bytes(HEADER_BYTES))
    orphan = block(502, 1, 111)
    put(path, replace(orphan, header=replace(orphan.header, parent_generation=9999, parent_segment=1, parent_slot=4)))
    put(path, block(5, 1, 112, generation=1))  # of a key that lies in slot 5 with a higher generation
    assert main(["check", str(store)]) == 1
    out = summary(capsys)
    assert (out["blocks without index entry"], out["index entries without block"]) == ("3", "2")
    assert (out["blocks orphaned"], out["blocks superseded"], out["blocks damaged"]) == ("1", "1", "0")
    assert main(["check", "--repair", str(store)]) == 1
    assert main(["check", str(store)]) == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "doubtful", "store"])
def test_an_index_that_cannot_be_believed_is_made_anew(
    store: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    if damage == "cut":
        os.truncate(store / FOLDER / "data.mdb", 2 * PAGE_BYTES)
    elif damage == "gone":
        (store / FOLDER).rename(store / "elsewhere")
    elif damage == "doubtful":
        (store / FOLDER / "doubtful").touch()
    else:
        (store / "store").unlink()
    assert main(["check", str(store)]) == 1
    out = summary(capsys)
    assert out["index"] != "good"
    assert out["blocks good"] == "100"
    assert_repairs(store, BLOCKS)


def test_foreign_files_are_told(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_segment(store, 9, 5, store=bytes(16))
    assert main(["check", str(store)]) == 0
    assert f"foreign files: 1\n  {path_of(store, 9)}" in capsys.readouterr().out


def test_a_directory_in_use_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_directory(store):
        assert main(["check", "--repair", str(store)]) == 75
    assert "another daemon" in capsys.readouterr().err


def test_what_is_no_store_of_this_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "missing")]) == 78
    assert "is not a directory" in capsys.readouterr().err
    (tmp_path / "store").write_bytes(seal(b"KVSTORE\0" + (2).to_bytes(4, "little") + STORE))
    assert main(["check", "--repair", str(tmp_path)]) == 78
    assert "version 2" in capsys.readouterr().err


@pytest.fixture
def both(tmp_path: Path, store: Path) -> list[Path]:
    """Two directories with 100 blocks each, and their index in the first."""
    other = tmp_path / "other"
    make_segment(other, 2, 120, [block(seed, 2, seed - 200) for seed in range(200, 300)])
    (store / FOLDER / "doubtful").touch()
    with opened(store, other):
        pass
    return [store, other]


def test_a_repair_of_one_directory_does_not_lose_what_lies_in_another(
    both: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    store, other = both
    assert main(["check", *map(str, both)]) == 0, "the control"
    capsys.readouterr()
    flip(path_of(store, 1), 8 * (slot_offset(SLOT_BYTES, 3) + 50))
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    why = "1 segment of the index (2) is in none of these directories, and its blocks would be lost: name all of "
    assert main(["check", str(store)]) == 1
    assert f"nothing was changed; --repair would be refused: {why}" in capsys.readouterr().err
    assert main(["check", "--repair", str(store)]) == 78
    said = capsys.readouterr()
    assert (f"kvstored check: {why}" in said.err, said.out) == (True, "")
    assert before == {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert main(["check", "--repair", *map(str, both)]) == 1
    with opened(store, other) as start:
        assert len(facts(start.loaded)) == 199


def test_segments_that_are_lost_for_good_are_forgotten_by_a_start_and_then_it_can_be_repaired(both: list[Path]) -> None:
    store, other = both
    path_of(other, 2).unlink()
    flip(path_of(store, 1), 8 * (slot_offset(SLOT_BYTES, 3) + 50))
    assert main(["check", "--repair", *map(str, both)]) == 78
    with opened(store, other):
        pass
    assert main(["check", "--repair", *map(str, both)]) == 1
    assert main(["check", *map(str, both)]) == 0


def test_a_repair_names_all_that_are_configured_whatever_the_index_says(
    both: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = both
    monkeypatch.setenv("KVSTORED_DISK", f"{store}:{other}")
    monkeypatch.setenv("KVSTORED_DISK_SIZE", "1GiB")
    (store / FOLDER / "doubtful").touch()
    assert main(["check", "--repair", str(store)]) == 78
    assert f"blocks in {other} would be lost: name all of disk.directories" in capsys.readouterr().err
    assert main(["check", str(store)]) == 1
    assert "--repair would be refused: blocks in" in capsys.readouterr().err
    assert main(["check", "--repair", *map(str, both)]) == 1
    monkeypatch.setenv("KVSTORED_DISK", f"{other}")
    (store / FOLDER / "doubtful").touch()
    assert main(["check", "--repair", str(store)]) == 1, "the control: of another daemon"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file to somebody")
@pytest.mark.parametrize("index", ["good", "gone"])
def test_what_root_makes_belongs_to_the_owner_of_the_directory(store: Path, index: str) -> None:
    for path in (store, *store.rglob("*")):
        os.chown(path, 65534, 65533)
    flip(path_of(store, 1), 8 * (slot_offset(SLOT_BYTES, 3) + 50))
    if index == "gone":
        shutil.rmtree(store / FOLDER)
    (store / "lock").unlink(missing_ok=True)
    assert main(["check", str(store)]) == 1
    assert (store / "lock").stat().st_uid == 65534, "a check makes that, too"
    (store / "mine").touch()
    assert main(["check", "--repair", str(store)]) == 1
    assert (store / "mine").stat().st_uid == 0, "no check made that"
    (store / "mine").unlink()
    owners = {str(path.relative_to(store)): (path.stat().st_uid, path.stat().st_gid) for path in store.rglob("*")}
    assert set(owners) >= {"lock", "store", "index", "index/data.mdb", "index/last", "segments"}
    assert set(owners.values()) == {(65534, 65533)}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file to somebody")
def test_nothing_of_roots_is_given_away_that_only_has_the_name(tmp_path: Path, store: Path) -> None:
    """Whoever owns the directory can have any name in it lead elsewhere."""
    os.chown(store, 65534, 65533)
    root = tmp_path / "root"
    root.mkdir()
    for name in ("secret", "linked"):
        (root / name).touch()
    (store / "store").unlink()
    (store / "store").symlink_to(root / "secret")
    (store / "lock").unlink(missing_ok=True)
    (store / "lock").hardlink_to(root / "linked")
    (store / FOLDER).rename(store / "kept")
    (store / FOLDER).symlink_to(root)
    os.mkfifo(store / "segments.new")
    assert give_back(store) == ""
    assert {path.stat().st_uid for path in (root, *root.iterdir())} == {0}
    assert (store / "segments").stat().st_uid == 65534, "the control"
