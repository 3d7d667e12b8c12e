"""A disk tier with a key file, in real daemons: what is on disk without the key, and what with another one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvproto.limits import KIB
from kvstore.tier.orders import Found
from kvstored.check import check
from kvstored.cli import main
from kvstored.index_loaded import Loaded
from kvstored.key_file import KeyRing, key_id
from kvstored.workers import readable_with
from tests.node import Node, assert_blocks, chain, fetch, put, values

BLOCK_BYTES = 64 * KIB
COUNT = 8
SAMPLE_BYTES = 32
SAMPLES = 2 * COUNT


@pytest.fixture
def node() -> Iterator[Node]:
    with Node(dram="16MiB", size="32MiB", segment="8MiB") as made:
        yield made


def key_file(node: Node, *keys: int) -> tuple[str, str]:
    path = node.home / "key"
    path.write_text("".join(f"{key:064x}\n" for key in keys))
    path.chmod(0o600)
    return "--disk-key-file", str(path)


def samples_found(node: Node, name: str) -> int:
    """Of the blocks of a chain, samples that are somewhere on the disk as they are in memory."""
    keys = chain(name, COUNT)
    samples = [block[at : at + SAMPLE_BYTES].tobytes() for block in values(keys, BLOCK_BYTES) for at in (0, 32768)]
    files = [path.read_bytes() for path in node.disks[0].rglob("*") if path.is_file()]
    return sum(any(sample in content for content in files) for sample in samples)


@pytest.mark.slow
def test_what_is_on_disk_is_worth_nothing_without_the_key_and_comes_back_with_it(node: Node) -> None:
    first, second = chain("first", COUNT), chain("second", COUNT)
    node.start(*key_file(node, 1))
    put(node.namespace(BLOCK_BYTES), first, values(first, BLOCK_BYTES))
    assert samples_found(node, "first") == 0

    node.restart(*key_file(node, 2))  # a wrong key: a miss, and said
    ns = node.namespace(BLOCK_BYTES)
    put(ns, second, values(second, BLOCK_BYTES))
    assert fetch(ns, first).blocks.size == 0
    assert "are encrypted with the key" in node.log()
    said = json.loads(kvctl(node, "-o", "json", "status").stdout)
    assert "files among the segments are not ours" in " ".join(said["status"]["warnings"])
    assert said["status"]["disk"]["encryption"] == "aes-256-gcm"
    assert ", encrypted (aes-256-gcm)" in " ".join(kvctl(node, "status").stdout.split())

    node.restart(*key_file(node, 2, 1))  # both are read
    ns = node.namespace(BLOCK_BYTES)
    for keys in (first, second):
        node.await_disk(ns, keys)
        found = fetch(ns, keys)
        assert found.tiers.disk == COUNT
        assert_blocks(found.blocks, values(keys, BLOCK_BYTES))
    assert samples_found(node, "first") == samples_found(node, "second") == 0
    node.stop()
    report = check(node.disks, lambda _: None, repair=False)
    assert report.clean
    assert report.unread == report.good == 2 * COUNT, "checked as far as that goes without a key"


def test_what_is_deleted_while_its_key_is_not_there_does_not_come_back_with_the_key(node: Node) -> None:
    """Its segments are removed, all of them; the test above is the control, where nothing is deleted."""
    first, second = chain("first", COUNT), chain("second", COUNT)
    node.start(*key_file(node, 1))
    put(node.namespace(BLOCK_BYTES), first, values(first, BLOCK_BYTES))
    closed = set(node.segments())

    node.restart(*key_file(node, 2))
    ns = node.namespace(BLOCK_BYTES)
    put(ns, second, values(second, BLOCK_BYTES))
    assert closed < set(node.segments()), "nobody has deleted anything yet"
    assert json.loads(kvctl(node, "-o", "json", "status").stdout)["status"]["disk"]["foreign_files"] == len(closed)
    assert ns.delete(first[:1]) == 0, "no such block is known in this life"
    assert not closed & set(node.segments())
    status = json.loads(kvctl(node, "-o", "json", "status").stdout)["status"]
    assert status["disk"]["foreign_files"] == 0
    assert not any("encrypted with a key" in warning for warning in status["warnings"])

    node.restart(*key_file(node, 2, 1))
    ns = node.namespace(BLOCK_BYTES)
    node.await_disk(ns, second)
    assert_blocks(fetch(ns, second).blocks, values(second, BLOCK_BYTES))
    assert fetch(ns, first).blocks.size == 0


def test_segments_that_the_keys_at_hand_do_not_open_are_foreign() -> None:
    files = {1: b"", 2: key_id(b"a" * 32), 3: key_id(b"b" * 32)}
    found = [Found(number, 8192, 1, "t", None) for number in files]
    folders = dict.fromkeys(files, Path("/disk"))
    loaded = Loaded(b"s" * 16, found, folders, files, [], 1, 4, [Path("/disk/segments/x")], [], "", 0)
    for keys, readable in ((None, [1]), ((b"a" * 32,), [2]), ((b"b" * 32, b"a" * 32), [2, 3]), ((b"c" * 32,), [])):
        left = readable_with(KeyRing(keys) if keys else None, loaded)
        assert [one.segment for one in left.segments] == list(left.directories) == readable
        others = [f"{number:08d}.seg" for number in files if number not in readable]
        assert [path.name for path in left.foreign] == [*others, "x"]


def kvctl(node: Node, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("11" * 32, 0o644, "open to others"),
        ("11" * 32, 0o620, "open to others"),
        ("11" * 31, 0o600, "64 random hex digits"),
        ("zz" * 32, 0o600, "64 random hex digits"),
        ("00" * 32, 0o600, "64 random hex digits"),
        ("", 0o600, "0 keys"),
        ("11" * 32 + "\n" + "11" * 32, 0o600, "twice"),
        ("#" * 70_000, 0o600, "larger than"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_key_file_that_is_no_good_stops_the_start_and_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, mode: int, said: str
) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_text(content)
        key.chmod(mode)
    file = tmp_path / "kvstored.toml"
    file.write_text(f'[disk]\ndirectories = ["{tmp_path / "disk"}"]\nsize = "1GiB"\nkey_file = "{key}"\n')
    assert main(["config", "check", str(file)]) == 78
    heard = capsys.readouterr()
    assert f"{file}:4: disk.key_file: {key}" in heard.err
    assert said in heard.err
    assert "1111" not in heard.err + heard.out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_key_may_be_the_daemons_or_roots_and_nobody_elses(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("11" * 32)
    script = "import cryptography, os, sys; from kvstored.key_file import read_keys; from pathlib import Path; "
    script += "os.setuid({}); print(read_keys(Path(sys.argv[1])))"  # only now: sources need not be readable to others
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    for owner, mode, reader, good in (
        (4242, 0o600, 0, True), (4242, 0o600, 4242, True), (4243, 0o640, 4242, False), (0, 0o640, 0, True),
        (4242, 0o640, 4242, False), (0, 0o644, 4242, False),
    ):  # fmt: skip
        os.chown(key, owner, 0)
        key.chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", script.format(reader), str(key)], capture_output=True, text=True, check=False
        )
        assert (done.returncode == 0) == good, (owner, mode, reader, done.stderr)
        assert "1111" not in done.stdout + done.stderr


def test_a_key_without_a_disk_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text('[disk]\nkey_file = "/nonexistent"\n')
    assert main(["config", "check", str(file)]) == 78
    assert "no disk.directories" in capsys.readouterr().err


def test_what_delete_leaves_on_disk(node: Node) -> None:
    """The payload, until its place is used again; what is encrypted loses its nonce, and can be read by nobody."""
    keys = chain("erased", COUNT)
    for arguments, found in (((), SAMPLES), (key_file(node, 1), 0)):
        node.start("--disk-admission", "none", *arguments)
        ns = node.namespace(BLOCK_BYTES)
        put(ns, keys, values(keys, BLOCK_BYTES))
        headers = [slot.header for slot in node.slots().values()]
        assert len(headers) == COUNT
        assert len({header.nonce for header in headers}) == (COUNT if arguments else 1)
        nonces = [header.nonce for header in headers if header.nonce]
        assert all(anywhere(node, nonce) for nonce in nonces), "the search finds what is there"
        assert ns.delete(keys) == COUNT
        assert node.slots() == {}, "no header is left"
        assert not any(anywhere(node, nonce) for nonce in nonces)
        assert samples_found(node, "erased") == found
        node.stop()
        for path in node.segments():
            path.unlink()
        node.drop_index()


def anywhere(node: Node, sample: bytes) -> bool:
    return any(sample in path.read_bytes() for path in node.disks[0].rglob("*") if path.is_file())


def test_nobody_else_may_read_what_is_at_rest_whatever_the_umask(node: Node) -> None:
    keys = chain("modes", COUNT)
    before = os.umask(0)
    try:
        node.start("--keep", "true", "--state-dir", str(node.home / "state"), *key_file(node, 1))
        put(node.namespace(BLOCK_BYTES), keys, values(keys, BLOCK_BYTES))
        kvctl(node, "drain", "--yes")
        (node.home / "control").touch()
    finally:
        os.umask(before)
    assert (node.home / "control").stat().st_mode & 0o777 == 0o666, "the control: others could have read it"
    assert node.run.stat().st_mode & 0o777 == 0o755
    at_rest = [path for folder in (*node.disks, node.home / "state") for path in (folder, *folder.rglob("*"))]
    assert len(at_rest) > 8
    assert [str(path) for path in at_rest if path.stat().st_mode & 0o077] == []
    open_to_all = {path.name for path in node.run.iterdir() if path.stat().st_mode & 0o002}
    assert open_to_all == {"hot.sock", "token.sock"}, "whoever connects there is asked who they are"
    assert {path.name for path in node.run.iterdir() if path.stat().st_mode & 0o004} == open_to_all
