"""A damaged index file, and a child killed at any moment: the daemon lives, and no record is made up.

The headers have a block more than the index, so that it can be told which of the two was believed.
"""

import os
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pytest

from kvstore.tier.format import CHUNK_SLOTS
from kvstored.index import State
from kvstored.index_marks import DOUBTFUL, FOLDER, LAST, write_store
from tests.figures import Recorder
from tests.segments import STORE, Block, Fact, block, facts, facts_of, flip, make_segment, opened, put

SEED = 20_260_801
META_TXNID = 16 + 24 + 2 * 48 + 8  # in each of the first two pages: page head, meta head, two roots, last page

INDEXED = [block(seed, segment, seed, model=seed % 2) for segment in (1, 2) for seed in range(segment, 240, 2)]
LATE = block(999, 1, 241)
OF_INDEX, OF_HEADERS = facts_of(INDEXED), facts_of([*INDEXED, LATE])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two segments, and an index of several commits."""
    directory = tmp_path_factory.mktemp("store")
    for segment in (1, 2):
        blocks = [each for each in INDEXED if each.header.segment == segment]
        path = make_segment(directory, segment, 250, blocks)
        if segment == 1:
            put(path, LATE)
    write_store(directory, STORE)
    with opened(directory) as start:
        assert start.commit(INDEXED)
    (directory / FOLDER).rename(directory / "of headers")
    # An index of its own, built by commits alone: pages that were freed and used again, stale snapshots.
    make_empty_index(directory)
    with opened(directory) as start:
        assert start.loaded.rebuilt == ""
        assert start.commit([moved_generation(each) for each in INDEXED])
        for count in (30, 100, len(INDEXED)):
            assert start.commit(INDEXED[:count])
        assert start.commit(INDEXED)
        assert start.commit(INDEXED)
    shutil.copytree(directory / FOLDER, directory / "good")
    shutil.rmtree(directory / "of headers")
    return directory


def make_empty_index(directory: Path) -> None:
    segments = directory / "segments"
    segments.rename(directory / "hidden")
    with opened(directory) as start:
        assert start.loaded.segments == []
    segments.rmdir()
    (directory / "hidden").rename(segments)


def moved_generation(each: Block) -> Block:
    return block(1, each.header.segment, each.header.slot, generation=1)


def outcome(directory: Path, damage: Callable[[Path], None]) -> str:
    """Why the index was made anew after this damage, empty if it was not; asserts that nothing is made up."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
    shutil.copytree(directory / "good", directory / FOLDER)
    damage(directory / FOLDER)
    with opened(directory) as start:
        assert start.index.state is State.READY, start.index.reason
        wanted: set[Fact] = OF_HEADERS if start.loaded.rebuilt else OF_INDEX
        assert facts(start.loaded) == wanted, start.loaded.rebuilt
        return start.loaded.rebuilt


def flips(directory: Path, bits: Iterable[int]) -> list[str]:
    return [outcome(directory, lambda folder, bit=bit: flip(folder / "data.mdb", bit)) for bit in bits]  # type: ignore[misc]


def cuts(directory: Path, lengths: Iterable[int]) -> list[str]:
    return [
        outcome(directory, lambda folder, length=length: os.truncate(folder / "data.mdb", length))  # type: ignore[misc]
        for length in lengths
    ]


def index_bytes(directory: Path) -> int:
    """Of what is written; what lies behind is set aside, and nothing is in it yet."""
    return len((directory / "good" / "data.mdb").read_bytes().rstrip(b"\0"))


def test_the_undamaged_index_is_believed(store: Path) -> None:
    assert outcome(store, lambda _folder: None) == ""


def test_a_flipped_bit_gives_the_true_records_or_those_of_the_headers(store: Path) -> None:
    random = Random(SEED)
    reasons = flips(store, [random.randrange(8 * index_bytes(store)) for _ in range(8)])
    assert any(reasons), f"seed {SEED}"


def test_a_cut_file_gives_the_records_of_the_headers(store: Path) -> None:
    random = Random(SEED)
    reasons = cuts(store, [0, 1, 4096, 8192, *(random.randrange(index_bytes(store)) for _ in range(4))])
    assert all(reasons[:4])
    assert sum(map(bool, reasons)) >= 5, f"seed {SEED}"  # free pages are the second half of the file


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_2000_flipped_bits_and_500_cuts(store: Path, record_property: Recorder) -> None:
    random = Random(SEED + 1)
    flipped = flips(store, [random.randrange(8 * index_bytes(store)) for _ in range(2000)])
    cut = cuts(store, [random.randrange(index_bytes(store)) for _ in range(500)])
    for name, reasons in (("flips", flipped), ("cuts", cut)):
        record_property(name, len(reasons))
        record_property(f"{name}_that_made_the_index_anew", sum(map(bool, reasons)))


def test_lmdb_cannot_pass_the_commit_before_the_last_for_the_last(store: Path) -> None:
    random = Random(SEED)
    bits = [8 * (page * 4096 + META_TXNID) + bit for page in (0, 1) for bit in (0, 1, 2, random.randrange(3, 64))]
    reasons = flips(store, bits)
    assert any("transaction" in reason for reason in reasons), reasons

    def swap(folder: Path) -> None:
        """Take the transaction number of the newer root away, as if its page had never been written."""
        pages = bytearray((folder / "data.mdb").read_bytes())
        numbers = [struct.unpack_from("<Q", pages, page * 4096 + META_TXNID)[0] for page in (0, 1)]
        newer = numbers.index(max(numbers))
        struct.pack_into("<Q", pages, newer * 4096 + META_TXNID, max(numbers) - 2)
        (folder / "data.mdb").write_bytes(pages)

    assert "transaction" in outcome(store, swap)


@pytest.mark.parametrize("name", [LAST, "data.mdb"])
@pytest.mark.parametrize("damage", ["missing", "empty", "zeros", "noise", "folder", "pipe"])
def test_a_file_of_the_index_that_is_anything_else(store: Path, name: str, damage: str) -> None:
    def do(folder: Path) -> None:
        file = folder / name
        size = file.stat().st_size
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage == "pipe":
            os.mkfifo(file)
        elif damage != "missing":
            file.write_bytes({"empty": b"", "zeros": bytes(size), "noise": Random(SEED).randbytes(size)}[damage])

    assert outcome(store, do)


def test_a_flip_beside_the_index_is_found(store: Path) -> None:
    assert outcome(store, lambda folder: flip(folder / LAST, 70))
    assert outcome(store, lambda folder: flip(folder.parent / "store", 70))
    assert outcome(store, lambda folder: (folder / DOUBTFUL).touch())


@pytest.mark.parametrize("name", [FOLDER, f"{FOLDER}/{DOUBTFUL}", "store", "store.new"])
def test_a_pipe_beside_the_index_holds_no_start_up(store: Path, name: str) -> None:
    def do(folder: Path) -> None:
        path = folder.parent / name
        if path == folder:
            shutil.rmtree(folder)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        if name == "store.new":
            (folder.parent / "store").unlink()

    assert outcome(store, do)
    assert (store / "store").is_file()


def test_an_interrupted_rebuild_is_begun_again(store: Path) -> None:
    def interrupt(folder: Path) -> None:
        folder.rename(folder.with_name("index.new"))

    assert outcome(store, interrupt)
    assert not (store / "index.new").exists()


def chunk_of(commit: int) -> list[Block]:
    """As many blocks as fill a chunk, of one commit alone."""
    return [block(100 * commit + slot, 1, slot) for slot in range(CHUNK_SLOTS)]


def kill_during_commits(directory: Path, random: Random) -> None:
    """What was acknowledged, or the commit after it, is what LMDB has: the mark of doubt is taken away to see it."""
    shutil.rmtree(directory, ignore_errors=True)
    make_segment(directory, 1, 60)
    write_store(directory, STORE)
    acknowledged = 0
    with opened(directory) as start:
        pid = start.index.child_pid
        last = random.randrange(1, 8)
        begun = threading.Event()
        delay_s = random.random() * 0.002

        def kill() -> None:
            begun.wait()
            until = time.perf_counter() + delay_s
            while time.perf_counter() < until:
                pass
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        while True:
            if acknowledged == last:
                begun.set()
            if not start.commit(chunk_of(acknowledged + 1)):
                break
            acknowledged += 1
        killer.join()
        assert start.index.state is State.LOST
    (directory / FOLDER / DOUBTFUL).unlink()
    with opened(directory) as start:
        assert start.loaded.rebuilt == ""
        told = facts(start.loaded)
        assert told in [facts_of(chunk_of(commit)) for commit in (acknowledged, acknowledged + 1)]


def test_a_child_killed_during_a_commit_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    random = Random(SEED)
    for _ in range(3):
        kill_during_commits(tmp_path / "store", random)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_child_killed_500_times(tmp_path: Path, record_property: Recorder) -> None:
    random = Random(SEED + 2)
    for _ in range(500):
        kill_during_commits(tmp_path / "store", random)
    record_property("kills", 500)


def limit_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> None:
    """Have children fail to write beyond so many bytes of a file."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes}, {file_bytes}))\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


def test_a_commit_for_which_there_is_no_space_is_refused_and_a_later_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block(seed, 1, seed) for seed in range(30 * CHUNK_SLOTS)]
    make_segment(tmp_path / "store", 1, len(blocks), blocks)
    write_store(tmp_path / "store", STORE)
    make_empty_index(tmp_path / "store")
    with monkeypatch.context() as limited:
        limit_files(tmp_path, limited, 140_000)
        with opened(tmp_path / "store") as start:
            assert start.loaded.rebuilt == ""
            assert not start.commit(blocks)
            assert (start.index.state, bool(start.index.reason)) == (State.READY, True)
            assert start.commit(blocks[:100])
            assert start.index.reason == ""
    with opened(tmp_path / "store") as start:
        assert (facts(start.loaded), start.loaded.rebuilt) == (facts_of(blocks[:100]), "")
        assert start.commit(blocks)


def test_an_index_that_cannot_be_written_keeps_no_block_from_being_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block(seed, 1, seed) for seed in range(30 * CHUNK_SLOTS)]
    make_segment(tmp_path / "store", 1, len(blocks), blocks)
    with monkeypatch.context() as limited:
        limit_files(tmp_path, limited, 140_000)
        with opened(tmp_path / "store") as start:
            assert facts(start.loaded) == facts_of(blocks)
            assert "cannot be written" in start.index.reason
            assert not start.commit(blocks[:1])
            assert start.index.state is State.READY
    with opened(tmp_path / "store") as start:
        assert facts(start.loaded) == facts_of(blocks)
        assert start.loaded.rebuilt
        assert start.index.reason == ""


def test_damage_while_the_daemon_runs_is_refused_or_kills_the_child_only(store: Path) -> None:
    for damage in ("cut", "noise"):
        shutil.rmtree(store / FOLDER, ignore_errors=True)
        shutil.copytree(store / "good", store / FOLDER)
        with opened(store) as start:
            file = store / FOLDER / "data.mdb"
            size = file.stat().st_size
            if damage == "cut":
                os.truncate(file, 8192)
            else:
                file.write_bytes(file.read_bytes()[:8192] + Random(SEED).randbytes(size - 8192))
            assert not start.commit(INDEXED)
            assert (store / FOLDER / DOUBTFUL).exists()
        with opened(store) as start:
            assert start.loaded.rebuilt
            assert facts(start.loaded) == OF_HEADERS


@pytest.mark.parametrize("name", [LAST, "data.mdb", DOUBTFUL])
def test_a_pipe_while_the_daemon_runs_is_damage_and_hangs_nothing(store: Path, name: str) -> None:
    shutil.rmtree(store / FOLDER, ignore_errors=True)
    shutil.copytree(store / "good", store / FOLDER)
    with opened(store) as start:
        (store / FOLDER / name).unlink(missing_ok=True)
        os.mkfifo(store / FOLDER / name)
        if name == DOUBTFUL:
            os.truncate(store / FOLDER / "data.mdb", 0)
        before = time.monotonic()
        assert not start.commit(INDEXED)
        assert time.monotonic() - before < 10
    with opened(store) as start:
        assert start.loaded.rebuilt
        assert facts(start.loaded) == OF_HEADERS
