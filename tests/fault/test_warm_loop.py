"""Fault 6: a daemon is stopped, or killed, and started again on the memory that it left, again and again.

Whatever was published is asked for after each start, byte by byte; and new blocks go into the kept arenas before that.
It is killed while nobody asks it anything, and in the midst of work. There is no disk tier: memory alone answers.
What else a warm restart promises, and a few of them in a short time: `tests/integration/test_warm_restart.py`.
"""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest

import kvclient
from tests.figures import Recorder
from tests.node import PATIENCE_S, Node, census, chain, fetch, put_roots, roots, until, values

SEED = 20_261_122
BLOCK_BYTES = 64 << 10
PUBLISHED = 300  # blocks, of 512 that memory holds
FRESH = 30  # published in each life
AT_ONCE = 10  # of them before anything else is asked for
RESTARTS = 200
KEPT = {"stop": 1.0, "kill": 0.99}  # of what is published, at least


@dataclass
class Kept:
    """Over all restarts, in blocks."""

    published: int = 0
    served: int = 0
    stored_at_once: int = 0


def restart(end: str, restarts: int) -> Kept:
    """So many, each by this end of the life before."""
    total = Kept()
    with Node(disks=0, dram="32MiB") as node:
        node.start("--keep", "true")
        ns, published = node.namespace(BLOCK_BYTES), roots(("warm", end), PUBLISHED - FRESH)
        put_roots(ns, published, durable=False)
        for turn in range(restarts):
            (node.stop if end == "stop" else node.kill)()
            node.start("--keep", "true")
            ns = node.namespace(BLOCK_BYTES)
            fresh = roots(("fresh", end, turn), FRESH)
            put_roots(ns, fresh[:AT_ONCE], durable=False)
            found = census(ns, published)
            total.published += len(published)
            total.served += len(found.hits)
            total.stored_at_once += len(census(ns, fresh[:AT_ONCE]).hits)
            put_roots(ns, fresh[AT_ONCE:], durable=False)
            published += fresh
            gone, published = published[: len(published) - PUBLISHED], published[-PUBLISHED:]
            if gone:
                assert ns.delete(gone) >= len(found.hits & set(gone))
                assert not census(ns, gone).hits, "the control: what is deleted is not there"
        assert node.log().count("memory: warm=True") == restarts
    return total


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_200_warm_restarts(end: str, record_property: Recorder) -> None:
    total = restart(end, RESTARTS)
    record_property("restarts", RESTARTS)
    record_property("published_blocks", total.published)
    record_property("served_blocks", total.served)
    assert_kept(total, end, RESTARTS)


def assert_kept(total: Kept, end: str, restarts: int) -> None:
    """As much is served as is promised, and kept arenas take new blocks at once."""
    assert total.served >= KEPT[end] * total.published, total
    assert total.published >= (PUBLISHED - FRESH) * restarts
    assert total.stored_at_once == AT_ONCE * restarts


# -- under load ------------------------------------------------------------------------------------------------------

ENGINES = 3
CHAIN = 8  # blocks, at most
CHAINS_EACH = 18  # published at a time: 432 blocks at most of the 512 that memory holds, so that nothing is evicted
WORK = (60, 200)  # calls that are answered in a life before it ends


@dataclass
class Busy:
    """Over all lives, in blocks but for the last two."""

    published: int = 0
    served: int = 0
    deleted: int = 0  # chains, asked for once more
    interrupted: int = 0  # stores and deletes that had begun when the daemon was killed, and were never answered


class Engine:
    """Stores, fetches and deletes chains as fast as it can, by one client over all lives; it knows what it was told."""

    def __init__(self, node: Node, number: int, seed: int) -> None:
        self._client = kvclient.connect(node.run, timeout_s=PATIENCE_S)
        self._ns = self._client.namespace(
            model="m", engine="warm", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES
        )
        self._name, self._random, self._stored = f"busy-{number}", Random(seed + number), 0
        self._published: deque[list[bytes]] = deque()
        self._deleted: list[list[bytes]] = []
        self._doubtful: list[list[bytes]] = []  # stored or deleted without an answer: there or not
        self.unanswered_s: list[float] = []  # when such a call began
        self.answered = 0

    def close(self) -> None:
        """End it."""
        self._client.close()

    def work_until(self, over: threading.Event) -> None:
        """Until the daemon has been killed for a moment: the last call or so is in vain."""
        assert self._client.wait_connected(PATIENCE_S), self._client.status
        while not over.is_set():
            if len(self._published) >= CHAINS_EACH:
                self._delete()
            elif self._published and self._random.random() < 0.3:
                keys = self._random.choice(self._published)
                found = fetch(self._ns, keys).blocks
                assert np.array_equal(found, values(keys, BLOCK_BYTES)[: len(found)])
                self.answered += len(found) == len(keys)
            else:
                self._store()

    def _store(self) -> None:
        self._stored += 1
        keys = chain(f"{self._name}-{self._stored}", self._random.randint(1, CHAIN))
        blocks = values(keys, BLOCK_BYTES)
        begun_s = time.monotonic()
        if self._ns.store(keys, blocks, wait=True, space_s=PATIENCE_S).accepted == len(keys):
            self._published.append(keys)
            self.answered += 1
        else:
            self._in_doubt(keys, begun_s)

    def _delete(self) -> None:
        keys = self._published.popleft()
        begun_s = time.monotonic()
        if self._ns.delete(keys[:1]).unanswered:
            self._in_doubt(keys, begun_s)
        else:
            self._deleted.append(keys)
            self.answered += 1

    def _in_doubt(self, keys: list[bytes], begun_s: float) -> None:
        self._doubtful.append(keys)
        self.unanswered_s.append(begun_s)

    def check(self, total: Busy) -> None:
        """Ask the next life for all that the last one has published. What was in doubt is deleted, to make room."""
        assert self._client.wait_connected(PATIENCE_S), self._client.status
        for keys in self._published.copy():
            found, wanted = fetch(self._ns, keys).blocks, values(keys, BLOCK_BYTES)
            assert np.array_equal(found, wanted[: len(found)]), f"wrong bytes: {keys[0].hex()}"
            assert not len(found) or not np.array_equal(found, wanted[: len(found)][:, ::-1]), "the control is equal"
            total.published += len(keys)
            total.served += len(found)
            if len(found) < len(keys):
                self._published.remove(keys)
                self._doubtful.append(keys)
        for keys in self._deleted:
            assert not len(fetch(self._ns, keys).blocks), "the control: what is deleted is not there"
        for keys in self._doubtful:
            assert not self._ns.delete(keys[:1]).unanswered
        total.deleted += len(self._deleted)
        self._deleted, self._doubtful = [], []


def kill_under_load(kills: int, seed: int) -> Busy:
    """So many lives, each killed while engines wait for answers."""
    print("seed", seed)
    total, random = Busy(), Random(seed)
    with Node(disks=0, dram="32MiB") as node, ThreadPoolExecutor(ENGINES) as threads:
        node.start("--keep", "true")
        engines = [Engine(node, number, seed) for number in range(ENGINES)]
        try:
            for _ in range(kills):
                killed_s = end_life_at_work(node, threads, engines, random.randint(*WORK))
                total.interrupted += sum(begun_s < killed_s for each in engines for begun_s in each.unanswered_s)
                node.start("--keep", "true")
                for each in engines:
                    each.unanswered_s.clear()
                    each.check(total)
        finally:
            for each in engines:
                each.close()
        assert node.log().count("memory: warm=True") == kills
    print(total)
    return total


def end_life_at_work(node: Node, threads: ThreadPoolExecutor, engines: list[Engine], calls: int) -> float:
    """`kill -9` once so many calls were answered, while engines go on. When that was."""
    over, enough = threading.Event(), sum(each.answered for each in engines) + calls
    working = [threads.submit(each.work_until, over) for each in engines]
    try:
        assert until(lambda: sum(each.answered for each in engines) >= enough or any(one.done() for one in working))
        killed_s = time.monotonic()
        node.kill()
    finally:
        over.set()
    for one in working:
        one.result(PATIENCE_S)
    return killed_s


@pytest.mark.timeout(600)
def test_three_kills_in_the_midst_of_work_keep_what_was_published() -> None:
    assert_busy(kill_under_load(3, SEED), 3)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_200_kills_in_the_midst_of_work(record_property: Recorder) -> None:
    total = kill_under_load(RESTARTS, SEED + ENGINES)
    record_property("kills", RESTARTS)
    record_property("published_blocks", total.published)
    record_property("served_blocks", total.served)
    record_property("interrupted_calls", total.interrupted)
    assert_busy(total, RESTARTS)
    assert total.interrupted >= RESTARTS / 2, "nobody was at work when the daemon was killed"


def assert_busy(total: Busy, kills: int) -> None:
    """As much as is promised is served, and there was enough that could have been lost."""
    assert total.served >= KEPT["kill"] * total.published, total
    assert total.published >= 50 * kills, total
    assert total.deleted >= kills, total
