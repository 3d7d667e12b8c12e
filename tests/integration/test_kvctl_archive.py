"""`kvctl import` asks before anything has to leave, whatever an archive says; `export` never spoils a file."""

import io
import os
import resource
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest
import xxhash

import kvclient
from kvctl.archive_export import namespace_of
from kvctl.client import Exit, KvctlError
from kvproto import archive
from kvproto.archive import HEAD_BYTES, Writer
from kvproto.identity import NamespaceIdentity
from kvproto.limits import GIB, MIB
from tests.integration.test_kvctl_acting import BLOCK, body
from tests.integration.test_kvctl_acting import kvctl as answered
from tests.kvctl_line import Run, command_line
from tests.node import PATIENCE_S, Node, chain, put, values

HERE: Final = 14 * MIB // BLOCK  # blocks that are there already, used once: of 16 MiB of memory 2 are left
COMING: Final = 8 * MIB // BLOCK
CONFIG: Final = f"""
[tenants.work]
uids = [{os.geteuid()}]
[tenants.chat]
uids = [54321]
dram_max = "2MiB"
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """Little memory, and a disk that has much more room."""
    with Node(dram="16MiB") as node:
        (node.home / "config.toml").write_text(CONFIG)
        node.home.chmod(0o755)
        node.start("--config", str(node.home / "config.toml"), "--arena", "1MiB")
        yield node


@pytest.fixture(scope="module")
def large(node: Node) -> Path:
    """An archive of 8 MiB, of what is gone from there."""
    put(node.namespace(BLOCK, model="coming"), keys := chain("coming", COMING), values(keys, BLOCK), durable=False)
    path = node.home / "large.kva"
    assert answered(node, "export", str(path))[0] == Exit.OK
    return path


@pytest.fixture
def here(node: Node, large: Path) -> Callable[[], int]:
    """Memory is full but for 2 MiB: how many of those blocks are there still."""
    assert answered(node, "clear", "--all", "--yes")[0] == Exit.OK
    ns, keys = node.namespace(BLOCK, model="here"), chain("here", HERE)
    put(ns, keys, values(keys, BLOCK), durable=False)
    return lambda: ns.match(keys).blocks


@pytest.fixture
def typing(node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line, with nobody at a terminal unless `typed` is given."""
    return command_line(monkeypatch, capsys, "--runtime-dir", str(node.run), "--timeout", "20")


def of(path: Path, *parts: tuple[str, str, int, int]) -> Path:
    """An archive of (tenant, model, bytes of a block, blocks)."""
    blocks, whole = sum(part[3] for part in parts), sum(part[2] * part[3] for part in parts)
    with path.open("wb") as file:
        writer = Writer(file, blocks, whole)
        for tenant, model, block_bytes, count in parts:
            writer.name(tenant, NamespaceIdentity(model, "node", "flat", "uint8", 16, block_bytes), count)
            parent = None
            for key in chain(model, count):
                writer.block(key, parent, values([key], block_bytes)[0].tobytes())
                parent = key
        writer.finish()
    return path


def test_what_the_disk_has_room_for_still_goes_through_memory_and_is_asked_about(
    large: Path, here: Callable[[], int], typing: Run
) -> None:
    dry = typing("import", str(large), "--dry-run")
    assert dry.code == Exit.OK
    assert f"would store {COMING} blocks, 8.0 MiB" in dry.out
    text = " ".join(dry.out.split())
    assert "2.0 MiB are free, and for the rest what is there would be evicted" in text
    assert "what of it is on disk too stays there" in text
    nobody = typing("import", str(large))
    assert (nobody.code, "there is no terminal to ask on" in nobody.err) == (Exit.USAGE, True)
    no = typing("import", str(large), typed="n\n")
    assert (no.code, "[y/N]" in no.err, here()) == (Exit.REFUSED, True, HERE)
    assert typing("import", str(large), typed="y\n").code == Exit.OK
    assert here() < HERE, "the control: it did push others out"


def test_what_there_is_room_for_is_stored_unasked_and_nobody_leaves(
    tmp_path: Path, node: Node, here: Callable[[], int], typing: Run
) -> None:
    path = of(tmp_path / "fits.kva", ("work", "fits", BLOCK, 2 * MIB // BLOCK))
    dry = typing("import", str(path), "--dry-run")
    assert "there is room for all of it" in " ".join(dry.out.split())
    assert body(answered(node, "import", str(path), "-o", "json"), "import")["stored_blocks"] == 2 * MIB // BLOCK
    assert here() == HERE


def test_slots_are_counted_and_not_the_bytes_in_them(tmp_path: Path, here: Callable[[], int], typing: Run) -> None:
    path = of(tmp_path / "odd.kva", ("work", "odd", 4097, 400))  # 1.6 MiB, in slots of 8 KiB
    assert typing("import", str(path)).code == Exit.USAGE
    assert "would be evicted" in " ".join(typing("import", str(path), "--dry-run").out.split())
    assert here() == HERE


def test_an_archive_that_says_less_than_it_has_is_damaged_and_stores_no_more(
    tmp_path: Path, node: Node, large: Path, here: Callable[[], int]
) -> None:
    content = bytearray(large.read_bytes())
    for blocks, size, yes in ((0, 0, ()), (COMING, 0, ("--yes",)), (0, 8 * MIB, ())):
        head = archive._HEAD.pack(archive.MAGIC, archive.VERSION, 0, blocks, size)
        content[:HEAD_BYTES] = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
        (tmp_path / "less.kva").write_bytes(content)
        for words in (yes, ("--dry-run",)):
            done = answered(node, "import", str(tmp_path / "less.kva"), *words, "-o", "json")
            said = body(done, "import", Exit.REFUSED)
            assert (said["stored_blocks"], said["blocks"], said["whole"]) == (0, 0, False)
            assert "more than its first bytes say" in said["damages"][0]
    assert here() == HERE


def test_a_tenant_that_only_the_archive_names_is_asked_about_when_its_turn_comes(
    tmp_path: Path, node: Node, typing: Run
) -> None:
    assert answered(node, "clear", "--all", "--yes")[0] == Exit.OK
    with kvclient.connect(node.run, tenant="chat", timeout_s=PATIENCE_S) as client:
        theirs = client.namespace(model="theirs", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK)
        keys = chain("theirs", MIB // BLOCK)
        put(theirs, keys, values(keys, BLOCK), durable=False)
        path = of(tmp_path / "both.kva", ("work", "first", BLOCK, 8), ("chat", "second", BLOCK, 2 * MIB // BLOCK))
        assert "would be evicted" in " ".join(typing("import", str(path), "--dry-run").out.split())
        stopped = typing("import", str(path))
        assert (stopped.code, "8 blocks are stored" in stopped.err) == (Exit.REFUSED, True), stopped.err
        no = typing("import", str(path), typed="n\n")
        assert (no.code, "[y/N]" in no.err) == (Exit.REFUSED, True)
        assert theirs.match(keys).blocks == len(keys)
        assert typing("import", str(path), typed="y\n").code == Exit.OK
        assert theirs.match(keys).blocks < len(keys), "the control: it did push others out"
    (first, *_) = body(answered(node, "audit", "-n", "2", "-o", "json"), "audit")["acts"]
    assert (first["verb"], first["blocks"]) == ("import", 8), "what was stored before it stopped is written down"


def test_what_would_have_to_leave_the_disk_is_asked_about_too(tmp_path: Path) -> None:
    path = of(tmp_path / "coming.kva", (f"uid-{os.geteuid()}", "coming", BLOCK, COMING))
    with Node(dram="64MiB", size="64MiB", segment="8MiB") as full:
        full.start("--arena", "1MiB")
        ns, keys = full.namespace(BLOCK, model="on disk"), chain("on disk", 56 * MIB // BLOCK)
        put(ns, keys, values(keys, BLOCK))
        assert answered(full, "evict", "--all", "--yes")[0] == Exit.OK
        assert ns.match(keys).blocks == len(keys)
        told = " ".join(answered(full, "import", str(path), "--dry-run")[1].split())
        assert "on disk 0 B are free, and for the rest what is there would be evicted" in told
        assert "too stays there" not in told, "memory has room"
        assert answered(full, "import", str(path))[0] == Exit.USAGE
        assert ns.match(keys).blocks == len(keys)
        said = body(answered(full, "import", str(path), "--yes", "-o", "json"), "import")
        assert said["durable_blocks"] > 0
        assert ns.match(keys).blocks < len(keys), "the control: it did push others out"


@pytest.mark.parametrize("after", [0, 4 * MIB])
def test_an_archive_that_cannot_be_read_is_said_to_be(
    node: Node, monkeypatch: pytest.MonkeyPatch, large: Path, after: int
) -> None:
    class Failing(io.BytesIO):
        def readinto(self, target: object) -> int:
            if self.tell() >= after:
                raise OSError(5, "Input/output error")
            return super().readinto(target)  # type: ignore[arg-type]

    content = large.read_bytes()
    monkeypatch.setattr(Path, "open", lambda *_, **__: Failing(content))
    for words in (["--yes"], ["--dry-run"]):
        code, _, err = answered(node, "import", str(large), *words)
        assert (code, "cannot be read: Input/output error" in err) == (Exit.REFUSED, True)


def lying(path: Path, block_bytes: int) -> Path:
    """It begins a block that it does not have."""
    with path.open("wb") as file:
        writer = Writer(file, 1, block_bytes)
        writer.name("work", NamespaceIdentity("m", "node", "flat", "uint8", 16, block_bytes), 1)
        head = archive._RECORD.pack(archive.BLOCK, 0, block_bytes, b"k" * 32, bytes(32), bytes(16), 1)
        file.write(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + b"x" * 100)
    return path


def test_a_block_that_is_larger_than_any_arena_is_not_read(tmp_path: Path, node: Node) -> None:
    path = lying(tmp_path / "huge.kva", 64 * GIB)
    words = ["import", str(path), "--yes"]
    done = bounded(node, words)
    assert (done.returncode, "more than an arena holds" in done.stderr) == (Exit.REFUSED, True), done.stderr
    dry = bounded(node, [*words[:2], "--dry-run"])
    assert (dry.returncode, "cut short within a block" in dry.stdout) == (Exit.REFUSED, True), dry.stderr


def bounded(node: Node, words: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """The command, with 4 GiB of address space."""
    return subprocess.run(
        [sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), *words],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * GIB, 4 * GIB)),
    )  # fmt: skip


def test_a_name_that_an_archive_gives_cannot_move_the_cursor(node: Node) -> None:
    with pytest.raises(KvctlError, match=r"a namespace of \?\[2Jm cannot be here"):
        namespace_of(node.client, NamespaceIdentity("\x1b[2Jm", "node", "flat", "uint8", 16, 2 * MIB))


@pytest.mark.parametrize("command", ["export", "support-bundle"])
def test_only_files_are_written_over(tmp_path: Path, node: Node, command: str) -> None:
    pipe, link = tmp_path / "pipe.tar.gz", tmp_path / "link.tar.gz"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nothing")
    for path, words in ((pipe, ["--force"]), (pipe, []), (link, [])):
        assert answered(node, command, str(path), *words)[0] == Exit.USAGE
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]
