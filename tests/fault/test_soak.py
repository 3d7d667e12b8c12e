"""Fault 20: full pools for a long time. Memory and descriptors stay as they are, and hardly anything is refused.

Chains of two block sizes come and go, far more than memory or disk hold, so that blocks are evicted, demoted, read
back, and arenas change hands all the time. Compared are means over windows: single values go up and down.
"""

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

import pytest

import kvclient
from bench.harness import memory_of
from bench.load.levels import descriptors_of
from tests.figures import Recorder
from tests.node import WAIT_S, Bytes, Node, chain, fetch, values

SEED = 20
BLOCK_BYTES = (12_000, 64 << 10)
NAMES = 400  # of chains; half of them fit, on disk and in memory
DEPTH = 12  # blocks of a chain, at most
SECONDS, SECONDS_LONG = 1.0, 240.0
LOOK_S = 0.25
WARM = 0.4  # of the time: the interpreter's heap, compiled code and threads are there from then on
GROWTH_BYTES = 4 << 20  # between the first window behind that and the last one
REFUSED = 0.02  # of the blocks, at most
MOST_S = 60.0  # more than this is asked of no machine


@dataclass
class Soaked:
    """What happened, and what the daemon used meanwhile."""

    blocks: Counter[str] = field(default_factory=Counter)
    anonymous_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def window(self, figures: list[int], start: float, stop: float) -> float:
        """The mean of a part of the time."""
        return fmean(figures[int(start * len(figures)) : int(stop * len(figures)) + 1])

    @property
    def refused(self) -> float:
        """Share of the blocks that were to be stored."""
        return self.blocks["refused"] / max(1, self.blocks["asked"])


def soak(seconds: float) -> Soaked:
    """Work for so long."""
    soaked, random = Soaked(), Random(SEED)
    content: dict[tuple[int, int], tuple[list[bytes], Bytes]] = {}
    with Node(dram="16MiB", size="64MiB", segment="8MiB") as node:
        daemon = node.start("--disk-admission", "all")
        spaces = [node.namespace(block_bytes) for block_bytes in BLOCK_BYTES]
        began_s = looked_s = time.monotonic()
        # On a busy machine a short one takes longer, until there is something to judge.
        last_s = began_s + max(seconds, MOST_S)
        while (now_s := time.monotonic()) < began_s + seconds or (now_s < last_s and not _enough(soaked, seconds)):
            which = random.randrange(2), min(int(random.expovariate(1 / 60)), NAMES - 1)
            if which not in content:
                keys = chain(("soak", which), random.randrange(1, DEPTH + 1))
                content[which] = keys, values(keys, BLOCK_BYTES[which[0]])
            _use(spaces[which[0]], *content[which], random.random(), soaked.blocks)
            if now_s >= looked_s + LOOK_S:
                looked_s = now_s
                soaked.anonymous_bytes.append(memory_of(daemon.process.pid, "RssAnon"))
                soaked.descriptors.append(sum(descriptors_of(daemon.process.pid).values()))
        node.assert_alive()
    print(soaked.blocks, f"refused {soaked.refused:.2%}", [round(each / 2**20) for each in soaked.anonymous_bytes])
    return soaked


def _use(ns: kvclient.Namespace, keys: list[bytes], blocks: Bytes, what: float, seen: Counter[str]) -> None:
    """As an engine: fetch what is there, store the rest; at times flush or delete."""
    found = fetch(ns, keys)
    there = len(found.blocks)
    assert (found.blocks == blocks[:there]).all(), "wrong bytes"
    seen["hits"] += there
    seen["from disk"] += found.tiers.disk
    seen["asked"] += len(keys) - there
    if there < len(keys):
        parent = keys[there - 1] if there else None
        stored = ns.store(keys[there:], blocks[there:], parent=parent, wait=True, space_s=WAIT_S)
        seen["stored"] += stored.accepted
        seen["refused"] += len(keys) - there - stored.accepted - stored.known
    if what < 0.02:
        ns.flush(0.05)
    elif what < 0.03:
        seen["deleted"] += ns.delete(keys[-1:])


def assert_sound(soaked: Soaked, seconds: float) -> None:
    """Enough was evicted and read back, little was refused."""
    assert soaked.refused <= REFUSED
    assert _enough(soaked, seconds), soaked.blocks


def _enough(soaked: Soaked, seconds: float) -> bool:
    return soaked.blocks["stored"] >= 100 * seconds and soaked.blocks["from disk"] >= 5 * seconds


def test_full_pools_take_what_comes_and_serve_what_is_there() -> None:
    assert_sound(soak(SECONDS), SECONDS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_long_soak_at_full_pools_leaves_memory_flat(record_property: Recorder) -> None:
    seconds = float(os.environ.get("TEST_SOAK_S", str(SECONDS_LONG)))
    soaked = soak(seconds)
    assert_sound(soaked, seconds)
    middle = (WARM + 1) / 2
    first, last = ((WARM, middle), (middle, 1.0))
    grown = soaked.window(soaked.anonymous_bytes, *last) - soaked.window(soaked.anonymous_bytes, *first)
    more = soaked.window(soaked.descriptors, *last) - soaked.window(soaked.descriptors, *first)
    record_property("seconds", seconds)
    record_property("stored_blocks", soaked.blocks["stored"])
    record_property("hit_blocks", soaked.blocks["hits"])
    record_property("refused_share", soaked.refused)
    record_property("grown_bytes", grown)
    assert grown <= GROWTH_BYTES, soaked.anonymous_bytes
    assert more <= 2, soaked.descriptors
