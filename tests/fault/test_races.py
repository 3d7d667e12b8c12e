"""Fault 21: a store races whoever writes its source, a load races whoever reads, deletes and stores anew.

What is stored of a source that changes is whatever the copy saw, and its checksum is of that: it reads the same for
ever, and a scrub of memory finds nothing. What is loaded is one whole version of a block, and never an older one again.
"""

import hashlib
import itertools
import json
import mmap
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from bench.harness import ROOT
from kvproto import frames
from kvproto.errors import Grant, Outcome
from kvproto.frames import Verb
from tests import rewriter
from tests.fault.test_memory import published
from tests.figures import Recorder
from tests.node import Node, fetch
from tests.raw import RawClient, raw_client

ROUNDS, ROUNDS_LONG = 160, 100_000  # blocks
BATCH = 32  # stored at a time
BLOCK_BYTES = 32 << 10
BETWEEN_SCRUBS = 60  # batches: all of them are in memory still
CHAINS, DEPTH = 60, 6
SEED = 21
# Writes one value after the other all over a ring, until it is killed.
SCRIBBLER = """
import mmap, sys
import numpy as np
ring = np.frombuffer(mmap.mmap(int(sys.argv[1]), 0), dtype=np.uint8)
print(flush=True)
while True:
    for number in range(1, 256):
        ring[:] = number
"""


@contextmanager
def scribbling(ring: int) -> Iterator[None]:
    """Somebody writes to this ring all the time."""
    line = [sys.executable, "-c", SCRIBBLER, str(ring)]
    with subprocess.Popen(line, pass_fds=(ring,), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield
        finally:
            process.kill()


def scrubbed(node: Node) -> int:
    """All of memory is hashed again: how many blocks are not what their checksums say."""
    words = ["--runtime-dir", str(node.run), "-o", "json", "scrub", "--tier", "dram", "--wait", "--rate", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "kvctl", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    found = json.loads(done.stdout)["scrub"]
    assert found["done_blocks"] >= BATCH, "nothing was looked at"
    damaged: int = found["damaged"]
    return damaged


class Arenas:
    """Read-only maps of a raw client's arenas."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, place: tuple[int, ...]) -> bytes:
        """A leased block."""
        while self._client.unasked:
            head, frame, fds = self._client.unasked.pop(0)
            if head.verb == Verb.ARENA:
                for arena, fd in zip(frames.parse_arenas(frame, head), fds, strict=True):
                    self._maps[arena[0]] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        return self._maps[place[0]][place[1] * BLOCK_BYTES : (place[1] + 1) * BLOCK_BYTES]


def store_scribbled(node: Node, rounds: int) -> Counter[str]:
    """Blocks out of a ring that never stands still; each is read twice, with other stores in between."""
    seen = Counter[str]()
    with raw_client(node.run) as client, scribbling(client.fds[1]):
        namespace, arenas = client.open(BLOCK_BYTES), Arenas(client)
        before: list[tuple[tuple[int, ...], bytes]] = []
        lease = 0
        for batch in itertools.count():
            keys = [hashlib.sha256(f"{batch}/{number}".encode()).digest() for number in range(BATCH)]
            items = client.reserve(namespace, keys)
            granted = [item.ticket for item in items if item.grant == Grant.GRANTED]
            if not granted:  # an arena is on its way
                client.ping()
                continue
            client.send(frames.build(Verb.COMMIT, client.request(), commits=granted))
            assert published(client, len(granted)) == [Outcome.PUBLISHED] * len(granted)
            for place, digest in before:
                assert hashlib.sha256(arenas.read(place)).digest() == digest, "a stored block has changed"
            client.send(frames.build(Verb.RELEASE, 0, releases=[lease] if lease else []))
            leased = client.lease(namespace, keys[: len(granted)], ttl_s=30.0)
            assert len(leased.locations) == len(granted)
            lease, before = leased.lease, []
            for place in leased.locations:
                block = arenas.read(place)
                before.append((place, hashlib.sha256(block).digest()))
                seen["torn"] += block.count(block[0]) < len(block)
            seen["stored"] += len(granted)
            if seen["stored"] >= rounds:
                break
            if batch % BETWEEN_SCRUBS == BETWEEN_SCRUBS - 1:
                seen["damaged"] += scrubbed(node)
        seen["damaged"] += scrubbed(node)
    return seen


def load_rewritten(node: Node, rounds: int) -> Counter[str]:
    """Fetch chains that are deleted and stored anew: each block is one version, whole, and none goes back."""
    seen, newest, random = Counter[str](), Counter[bytes](), np.random.default_rng(SEED)
    ns = node.namespace(BLOCK_BYTES, engine=rewriter.FIELDS["engine"])
    words = [str(node.run), str(CHAINS), str(DEPTH), str(BLOCK_BYTES), str(SEED)]
    with subprocess.Popen([sys.executable, "-m", "tests.rewriter", *words], cwd=ROOT) as writer:
        try:
            while seen["loaded"] < rounds or not seen["newer"]:  # until it has overtaken us once
                assert writer.poll() is None, "the writer has ended"
                keys = rewriter.keys_of(int(random.integers(CHAINS)), DEPTH)
                found = fetch(ns, keys)
                for key, block in zip(keys, found.blocks, strict=False):
                    version = rewriter.version_of(block)
                    wanted = rewriter.content_of(key, BLOCK_BYTES, version)
                    assert (block == wanted).all(), "two versions in one block"
                    assert (wanted[8:] != rewriter.content_of(key, BLOCK_BYTES, version + 1)[8:]).any(), "no control"
                    assert version >= newest[key], "what was deleted is back"
                    seen["newer"] += version > newest[key] > 0
                    newest[key] = version
                seen["loaded"] += len(found.blocks)
                seen["from disk"] += found.tiers.disk
        finally:
            writer.kill()
    return seen


def test_a_store_that_races_the_writer_of_its_source_keeps_what_its_checksum_says() -> None:
    with Node(disks=0, dram="64MiB") as node:
        node.start("--ring", "4MiB")
        seen = store_scribbled(node, ROUNDS)
    assert seen["damaged"] == 0
    assert seen["stored"] >= ROUNDS


def test_a_load_that_races_others_is_of_one_version() -> None:
    with Node(dram="8MiB", size="64MiB", segment="8MiB") as node:
        node.start("--disk-admission", "all")
        seen = load_rewritten(node, ROUNDS)
    assert seen["newer"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_100000_stores_that_race_the_writer_of_their_source(record_property: Recorder) -> None:
    with Node(disks=0, dram="64MiB") as node:
        node.start("--ring", "4MiB")
        seen = store_scribbled(node, ROUNDS_LONG)
    record_property("stored_blocks", seen["stored"])
    record_property("torn_blocks", seen["torn"])  # of two values and more: the writer was faster
    assert seen["damaged"] == 0
    assert seen["stored"] >= ROUNDS_LONG
    assert seen["torn"] >= ROUNDS_LONG // 1000, "there was no race"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_100000_loads_that_race_others(record_property: Recorder) -> None:
    with Node(dram="8MiB", size="64MiB", segment="8MiB") as node:
        node.start("--disk-admission", "all")
        seen = load_rewritten(node, ROUNDS_LONG)
    record_property("loaded_blocks", seen["loaded"])
    record_property("from_disk", seen["from disk"])
    record_property("newer_versions_seen", seen["newer"])
    assert seen["newer"] >= ROUNDS_LONG // 100
    assert seen["from disk"] >= ROUNDS_LONG // 100
