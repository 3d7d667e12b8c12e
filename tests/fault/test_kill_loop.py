"""`kill -9` of the real daemon under load, at any moment, again and again: what it says after that is true.

One process stores, flushes, reads and deletes chains while the daemon is killed under it; a later life must have every
block that a flush has called durable and nobody has deleted since, and may have of the others what was ever stored.
Bytes follow from key and version, and a key that was deleted is stored in its next version: an older one is wrong.
"""

import threading
import time
from dataclasses import dataclass, field
from random import Random

import pytest

import kvclient
from tests.figures import Recorder
from tests.node import PATIENCE_S, Bytes, Node, end_keeper, fetch, until, value
from tests.node import chain as keys_of

SEED = 20_261_121
BLOCK_BYTES = (12_000, 100_000)
CHAINS = 60  # names of chains that a life works on
KILL_S = (0.05, 0.9)  # after the daemon serves
MOST = 12  # times as many lives, where a busy machine gets little done in each
DURABLE_BACK = 0.999
TIMEOUT_S = 10.0  # of the client: what stands still for a moment is there all the same


@dataclass
class Chain:
    """What its owner knows of one chain of blocks."""

    name: str
    keys: list[bytes]
    block_bytes: int
    version: int = 0
    durable: int = 0  # blocks from the front that must be there
    written: bool = False  # something of this version may be there
    doubtful: bool = False  # a delete was not answered: it may be there or not


@dataclass
class Totals:
    """Over all lives."""

    hits: int = 0
    expected: int = 0  # durable blocks that were looked for
    back: int = 0  # of them, found
    flushed: int = 0
    deleted: int = 0
    late: int = 0  # chains of them that were not there when they were asked for the first time
    lives: list[str] = field(default_factory=list)


class Load:
    """An engine that never stops, with one client over all lives of the daemon."""

    def __init__(self, node: Node, random: Random) -> None:
        self._random, self._node = random, node
        self._client = kvclient.connect(node.run, timeout_s=TIMEOUT_S)
        self._namespaces = [
            self._client.namespace(
                model="m", engine="loop", layout="flat", dtype="uint8", block_bytes=block_bytes
            )
            for block_bytes in BLOCK_BYTES
        ]  # fmt: skip
        self._chains: list[Chain] = []
        self.totals = Totals()

    def close(self) -> None:
        """End it."""
        self._client.close()

    def begin_life(self, number: int) -> None:
        """Connected to the new daemon, with a few chains more to work on."""
        assert self._client.wait_connected(PATIENCE_S), self._client.status
        for turn in range(10):
            block_bytes = self._random.choice(BLOCK_BYTES)
            count = self._random.randrange(1, 9)
            name = f"{number}-{turn}"
            self._chains.append(Chain(name, keys_of(f"loop-{name}", count), block_bytes))
        del self._chains[:-CHAINS]

    def work_until(self, over: threading.Event) -> None:
        """Store, flush, read and delete until the daemon is about to be gone."""
        while not over.is_set():
            chain = self._random.choice(self._chains)
            what = self._random.random()
            if what < 0.5:
                self._store(chain, flush=self._random.random() < 0.5)
            elif what < 0.85:
                self.check(chain)
            elif chain.written:
                self._delete(chain)

    def check_all(self) -> None:
        """Every chain, after the daemon has come back."""
        assert self._client.wait_connected(PATIENCE_S), self._client.status
        canaries = [chain for chain in self._chains if chain.durable and not chain.doubtful]
        until(lambda: all(self._of(chain).match(chain.keys).blocks >= chain.durable for chain in canaries))
        for chain in self._chains:
            found = self._look_for(chain)
            if not chain.doubtful:
                self.totals.expected += chain.durable
                self.totals.back += min(found, chain.durable)
            chain.durable = min(found, chain.durable)  # counted once

    def _look_for(self, chain: Chain) -> int:
        """A miss is always a correct answer, where memory is short as well: what is durable is asked for again."""
        found = self.check(chain)
        if chain.doubtful or found >= chain.durable:
            return found
        self.totals.late += 1
        until(lambda: self.check(chain) >= chain.durable)
        found = self.check(chain)
        if found < chain.durable:
            match = self._of(chain).match(chain.keys)
            print(
                f"{chain.name}: {found} of {chain.durable} blocks, {match}, {self._client.status}",
                self.totals.lives[-3:],
            )
            print(self._node.log()[-4000:])
        return found

    def check(self, chain: Chain) -> int:
        """Compare every block that is there with what must be in it."""
        found = fetch(self._of(chain), chain.keys).blocks
        for number, block in enumerate(found):
            wanted = value(chain.keys[number], chain.block_bytes, chain.version)
            old = chain.version and chain.doubtful and value(chain.keys[number], chain.block_bytes, chain.version - 1)
            assert (block == wanted).all() or (block == old).all(), self._explain(chain, number, block)
            assert not (block == value(chain.keys[number], chain.block_bytes, chain.version + 1)).all(), "no control"
        assert not len(found) or chain.written or chain.doubtful, f"chain {chain.name} was deleted and is back"
        self.totals.hits += len(found)
        return len(found)

    def _explain(self, chain: Chain, number: int, block: Bytes) -> str:
        versions = range(chain.version + 1)
        seen = [each for each in versions if (block == value(chain.keys[number], chain.block_bytes, each)).all()]
        return f"{chain.name}, block {number}: of versions {seen}, wanted {chain.version}; {self.totals.lives}"

    def _of(self, chain: Chain) -> kvclient.Namespace:
        return self._namespaces[BLOCK_BYTES.index(chain.block_bytes)]

    def _store(self, chain: Chain, *, flush: bool) -> None:
        if chain.doubtful:  # what is there could be of two versions
            self._delete(chain)
        if chain.doubtful:
            return
        chain.written = True
        ns = self._of(chain)
        blocks = [value(key, chain.block_bytes, chain.version) for key in chain.keys]
        ns.flush(0.0)  # forget what was stored before: the next one speaks of this chain alone
        stored = ns.store(chain.keys, blocks, wait=True)
        if flush and stored.accepted == len(chain.keys):
            flushed = ns.flush(TIMEOUT_S)
            if flushed.durable == len(chain.keys):
                chain.durable = len(chain.keys)
                self.totals.flushed += chain.durable

    def _delete(self, chain: Chain) -> None:
        """Counts only if it was answered: one and the same session was there before and after, and it took no time."""
        if (before := self._session()) is None:
            return
        chain.doubtful, chain.durable = True, 0
        begun_s = time.monotonic()
        self._of(chain).delete(chain.keys[:1])
        took_s = time.monotonic() - begun_s
        if self._session() == before and took_s < TIMEOUT_S / 2:
            chain.doubtful, chain.written = False, False
            chain.version += 1
            self.totals.deleted += 1

    def _session(self) -> tuple[int, int] | None:
        """Of which daemon, and which; None if that does not answer."""
        if self._client.ping() is None:
            return None
        status = self._client.status
        return status.daemon_pid, status.session


def end_life(node: Node, over: threading.Event) -> None:
    """`kill -9`; who works hears of it before."""
    over.set()
    node.kill()


def run(lives: int, seed: int) -> Totals:
    """So many lives of a daemon, each ended by `kill -9`."""
    print("seed", seed)
    random = Random(seed)
    with Node(dram="12MiB", size="192MiB", segment="8MiB") as node:  # two slot sizes: arenas change hands
        node.start("--keep", "true", "--disk-admission", "all")
        load = Load(node, random)
        try:
            for number in range(MOST * lives):
                load.begin_life(number)
                over = threading.Event()
                killer = threading.Timer(random.uniform(*KILL_S), end_life, [node, over])
                killer.start()
                load.work_until(over)
                killer.join()
                kept = random.choice(["warm", "cold", "keeper-gone"])
                index = random.choice(["index", "index", "no-index"])
                load.totals.lives.append(f"{kept}/{index}")
                if kept == "keeper-gone":
                    end_keeper(node.run)
                if index == "no-index":
                    node.drop_index()
                node.start("--keep", "false" if kept == "cold" else "true", "--disk-admission", "all")
                last = number >= lives - 1
                if random.random() < 0.7 or last:
                    load.check_all()  # else work goes on before the disk is open
                if last and heavy_enough(load.totals, lives):
                    break
        finally:
            load.close()
    print(load.totals)
    return load.totals


def heavy_enough(totals: Totals, lives: int) -> bool:
    """Was enough there to be wrong?"""
    return totals.expected >= 10 * lives and totals.deleted >= lives


def assert_sound(totals: Totals, lives: int) -> None:
    """Nothing was wrong on the way; and enough was there to be wrong."""
    assert totals.back >= DURABLE_BACK * totals.expected, f"{totals.back} of {totals.expected} durable blocks are back"
    assert len(totals.lives) >= lives
    assert heavy_enough(totals, lives), "the load was too light to prove anything"


@pytest.mark.timeout(600)
def test_three_kills_under_load() -> None:
    assert_sound(run(3, SEED), 3)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_a_thousand_kills_under_load(record_property: Recorder) -> None:
    every = [run(50, SEED + 1 + turn) for turn in range(20)]
    for totals in every:
        assert_sound(totals, 50)
    record_property("kills", sum(len(totals.lives) for totals in every))
    record_property("durable_blocks_looked_for", sum(totals.expected for totals in every))
    record_property("durable_blocks_back", sum(totals.back for totals in every))
    record_property("chains_found_late", sum(totals.late for totals in every))
    record_property("hits", sum(totals.hits for totals in every))
