"""`kvstored check`: what it finds on a disk tier, what it repairs, and whom it keeps out."""

import os
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
