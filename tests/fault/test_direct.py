"""Mode direct with real processes: slots that clients write themselves, by whom, and when they are used again."""

import errno
import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvproto.errors import Grant
from kvproto.frames import Mode, Verb
from kvproto.limits import KIB
from tests.node import PATIENCE_S, Node, assert_blocks, chain, fetch, until, values
from tests.raw import raw_client

BLOCK_BYTES = 64 * KIB
BLOCKS = (64 << 20) // BLOCK_BYTES  # that DRAM holds
TAKEN = 8  # slots of a writer
ROOT = Path(__file__).parent.parent.parent


class Writer:
    """`tests/direct_writer.py`, as a process that can be told, and killed."""

    def __init__(self, node: Node) -> None:
        command = [sys.executable, "-m", "tests.direct_writer", str(node.run), str(TAKEN), str(BLOCK_BYTES)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.hear() == "reserved"

    def hear(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, order: str) -> None:
        """And wait until it is done."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        assert self.hear() == "done"

    def kill(self) -> None:
        """`kill -9`, and it is gone."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@contextmanager
def writing(node: Node) -> Iterator[Writer]:
    """One of them, until the block ends."""
    writer = Writer(node)
    try:
        yield writer
    finally:
        writer.kill()


def configured(node: Node) -> tuple[str, ...]:
    """Two tenants of this user; the first is trusting."""
    file = node.home / "kvstored.toml"
    uid = os.geteuid()
    file.write_text(f"[tenants.trusted]\nuids = [{uid}]\ntrusting = true\n[tenants.other]\nuids = [{uid}]\n")
    return ("--config", str(file))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with 64 MiB, whose tickets lapse soon."""
    with Node(disks=0) as host:
        host.start(*configured(host), "--ticket-ttl", "100ms", "--keep", "true")
        yield host
        host.assert_alive()


def fill(node: Node, name: object) -> list[bytes]:
    """Store one chain until memory is full; its keys. What is there of other chains makes room."""
    ns = node.namespace(BLOCK_BYTES)
    keys = chain((name, os.urandom(8).hex()), BLOCKS + 1)
    result = ns.store(keys, values(keys, BLOCK_BYTES), wait=True, space_s=5.0)
    return keys[: result.accepted]


def assert_whole(node: Node, keys: list[bytes]) -> None:
    """Every one of these is there, to the last byte."""
    assert_blocks(fetch(node.namespace(BLOCK_BYTES), keys).blocks, values(keys, BLOCK_BYTES))


def empty(node: Node, keys: list[bytes]) -> None:
    """Make room again."""
    node.namespace(BLOCK_BYTES).delete(keys[:1])


def holds_all(node: Node) -> bool:
    """Is there room for all that memory holds?"""
    keys = fill(node, "all")
    empty(node, keys)
    return len(keys) == BLOCKS


class TestOutOfUse:
    def test_a_slot_whose_ticket_has_lapsed_is_not_used_before_its_writer_is_gone(self, node: Node) -> None:
        with writing(node) as writer:
            keys: list[bytes] = []

            def lapsed() -> bool:  # they are no longer counted as tickets that are open, and are not free either
                nonlocal keys
                empty(node, keys)
                keys = fill(node, "others")
                return len(keys) == BLOCKS - TAKEN

            assert until(lapsed)
            writer.tell("scribble")
            assert_whole(node, keys)
            empty(node, keys)
        assert until(lambda: holds_all(node))

    def test_a_slot_is_out_of_use_when_its_session_ends_and_its_process_does_not(self, node: Node) -> None:
        with writing(node) as writer:
            writer.tell("hang-up")
            keys = fill(node, "others")
            assert len(keys) == BLOCKS - TAKEN
            writer.tell("scribble")
            assert_whole(node, keys)
            empty(node, keys)
        assert until(lambda: holds_all(node))

    def test_an_abort_gives_slots_back_at_once(self) -> None:
        with Node(disks=0) as host:
            host.start(*configured(host))  # tickets last: one that had lapsed by then would not be given back
            with writing(host) as writer:
                writer.tell("abort")
                keys = fill(host, "others")
                assert len(keys) == BLOCKS
                writer.tell("scribble")  # it had said that it would not: this is what the others guard against
                found = fetch(host.namespace(BLOCK_BYTES), keys).blocks
                assert not np.array_equal(found, values(keys, BLOCK_BYTES))

    def test_a_slot_is_out_of_use_over_a_kill_of_the_daemon_as_long_as_its_writer_lives(self) -> None:
        with Node(disks=0) as host:
            arguments = (*configured(host), "--keep", "true")
            host.start(*arguments)
            ns = host.namespace(BLOCK_BYTES)
            kept = chain("kept", 20)
            assert ns.store(kept, values(kept, BLOCK_BYTES), wait=True).accepted == 20
            with writing(host) as writer:
                host.restart(*arguments)
                writer.tell("scribble")
                assert_whole(host, kept)
                empty(host, kept)
                keys = fill(host, "others")
                assert len(keys) == BLOCKS - TAKEN
                writer.tell("scribble")
                assert_whole(host, keys)
                empty(host, keys)
            assert until(lambda: holds_all(host))
            host.assert_alive()


class TestStoring:
    def connect(self, node: Node, mode: str, tenant: str = "trusted") -> kvclient.Client:
        client = kvclient.connect(node.run, mode=mode, tenant=tenant, timeout_s=PATIENCE_S)
        assert client.wait_connected(10)
        return client

    def test_what_was_stored_in_place_is_what_everybody_fetches(self, node: Node) -> None:
        with self.connect(node, "direct") as client:
            assert (client.status.mode, client.status.fell_back) == ("direct", False)
            ns = client.namespace(model="d", engine="e", layout="l", dtype="u8", block_bytes=BLOCK_BYTES - 5)
            keys = chain("direct", 40)
            blocks = values(keys, BLOCK_BYTES - 5)
            assert ns.store(keys, blocks, wait=True).accepted == 40
            assert ns.store(keys, blocks).known == 40
            for mode in ("direct", "copy", "ring"):
                with self.connect(node, mode) as reader:
                    assert reader.status.mode == mode
                    theirs = reader.namespace(
                        model="d", engine="e", layout="l", dtype="u8", block_bytes=BLOCK_BYTES - 5
                    )
                    targets = np.zeros_like(blocks)
                    with theirs.fetch(keys) as lease:
                        assert lease.copy_to(targets)
                    assert_blocks(targets, blocks)
            ns.delete(keys[:1])

    @pytest.mark.parametrize("mode", ["direct", "auto"])
    def test_a_tenant_that_is_not_trusting_is_served_by_copies_and_told_why(self, node: Node, mode: str) -> None:
        with self.connect(node, mode, "other") as client:
            status = client.status
            assert (status.mode, status.fell_back) == ("copy", mode == "direct")
            assert status.notes == "direct: tenant other is not marked as trusting (tenants.other.trusting)"
            ns = client.namespace(model="d", engine="e", layout="l", dtype="u8", block_bytes=BLOCK_BYTES)
            keys = chain("copied", 3)
            assert ns.store(keys, values(keys, BLOCK_BYTES), wait=True).accepted == 3
            ns.delete(keys[:1])

    def test_says_its_mode_to_operators(self, node: Node) -> None:
        with self.connect(node, "direct"):
            told = subprocess.run(
                [sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), "-o", "json", "clients"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            assert '"direct"' in told

    def test_an_old_client_that_names_no_such_mode_has_its_ring(self, node: Node) -> None:
        with raw_client(node.run, modes=(Mode.COPY,), version_high=3) as old:
            assert old.welcome is not None
            assert (old.welcome.version, old.welcome.mode, len(old.fds)) == (3, Mode.COPY, 2)


class TestMaps:
    def test_a_slot_can_be_written_and_its_arena_neither_resized_nor_resealed(self, node: Node) -> None:
        with raw_client(node.run, modes=(Mode.DIRECT,)) as client:
            (item,) = client.reserve(client.open(BLOCK_BYTES), [os.urandom(32)])
            assert item.grant == Grant.GRANTED
            fd = client.writable()[item.arena]
            size = os.fstat(fd).st_size
            with mmap.mmap(fd, 0) as arena:
                arena[item.page * BLOCK_BYTES] = 1
            for wrong in (0, size - 4096, size + 4096):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, wrong)
            with pytest.raises(PermissionError):
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)

    def test_other_sessions_of_the_tenant_and_other_tenants_get_nothing_that_can_be_written(self, node: Node) -> None:
        for fields in ({"modes": (Mode.COPY,)}, {"modes": (Mode.DIRECT,), "tenant": "other"}):
            with raw_client(node.run, **fields) as client:
                namespace, keys = client.open(BLOCK_BYTES), [os.urandom(32)]
                (item,) = client.reserve(namespace, keys)
                client.commit([item.ticket])
                assert not client.writable()
                client.lease(namespace, keys, wait_s=15.0)
                assert any(head.verb == Verb.ARENA for head, _, _ in client.unasked)
                with pytest.raises(PermissionError) as refused:
                    mmap.mmap(client.fds[-1], 0)
                assert refused.value.errno == errno.EACCES

    def test_what_is_only_read_comes_read_only_in_mode_direct_too(self, node: Node) -> None:
        with raw_client(node.run, modes=(Mode.COPY,)) as other:
            namespace, keys = other.open(BLOCK_BYTES), [os.urandom(32)]
            (item,) = other.reserve(namespace, keys)
            other.commit([item.ticket])
            other.lease(namespace, keys, wait_s=15.0)
            with raw_client(node.run, modes=(Mode.DIRECT,)) as client:
                client.lease(client.open(BLOCK_BYTES), keys)
                assert not client.writable()
                with pytest.raises(PermissionError):
                    mmap.mmap(client.fds[-1], 0)


class TestScrub:
    def test_a_block_that_was_changed_after_it_was_published_becomes_a_miss_and_is_told_of(self, node: Node) -> None:
        with raw_client(node.run, modes=(Mode.DIRECT,)) as client:
            namespace = client.open(BLOCK_BYTES)
            keys = [os.urandom(32) for _ in range(4)]
            items = client.reserve(namespace, keys)
            memory = {arena: mmap.mmap(fd, 0) for arena, fd in client.writable().items()}
            for item in items:
                memory[item.arena][item.page * BLOCK_BYTES] = 7
            client.commit([item.ticket for item in items])
            client.lease(namespace, keys, wait_s=15.0)  # all are published
            before = self.scrub(node)
            memory[items[2].arena][items[2].page * BLOCK_BYTES + 99] = 1
            after = self.scrub(node)
            assert "1 damaged" in after, after
            assert "none damaged" in before, before
            assert len(client.lease(namespace, keys).locations) == 2
            assert "were changed after they were published" in self.ask(node, "status")
            for arena in memory.values():
                arena.close()

    def ask(self, node: Node, *arguments: str) -> str:
        command = [sys.executable, "-m", "kvctl", "--runtime-dir", str(node.run), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    def scrub(self, node: Node) -> str:
        return self.ask(node, "scrub", "--tier", "dram", "--wait", "--rate", "0")
