"""Memory of a GPU given to the daemon's tier there, or to the prefix cache of the engines themselves: what is better?

Contexts come back by Zipf's law, three times as many as the bytes in question hold. Engines have a cache of their own
either way, least recently used first, and take what is not there by LOAD. The same bytes go to the caches of all
engines, in equal shares, or to one tier. A hit in a cache costs the engine nothing, since its pages are used where they
are; a hit in the tier is copied into pages on the device, and the block then lies on the GPU twice.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Final, NamedTuple

import numpy as np

import kvclient
from bench.gpu_daemon import hits
from bench.gpu_rig import BLOCK_BYTES, BLOCK_TOKENS, MIB, TIMEOUT_S, Rig, namespace_of
from bench.process import DaemonProcess
from kvclient.attached import AttachedMemory

CONTEXTS: Final = 12
HELD: Final = 4  # so many of them fit the bytes that are given to one or the other
OWN: Final = 2  # and so many what each engine has in any case
ARENA_BYTES: Final = 16 * MIB  # of the tier: it takes no less
TURNS: Final = 24  # a round
SEED: Final = 5


class OwnCache:
    """Pages of an engine by the keys of what they hold; the one used longest ago goes first."""

    def __init__(self, namespace: kvclient.Namespace, memory: AttachedMemory) -> None:
        self.namespace, self._memory = namespace, memory
        self._free = list(range(memory.pages.blocks))
        self._pages: OrderedDict[bytes, int] = OrderedDict()

    def store(self, keys: Sequence[bytes]) -> None:
        """A context that has just been computed, in pages that stay free."""
        saved = self.namespace.save(keys, self._memory[self._free[: len(keys)]], timeout_s=TIMEOUT_S, space_s=TIMEOUT_S)
        if saved.accepted != len(keys):
            raise RuntimeError(f"{saved.accepted} of {len(keys)} blocks stored: {saved.reasons}")

    def use(self, keys: Sequence[bytes]) -> int:
        """Have all of a context in pages; how many blocks of it were there already."""
        lead = next((number for number, key in enumerate(keys) if key not in self._pages), len(keys))
        self._touch(keys[:lead])
        rest = keys[lead:]
        if rest:
            pages = [self._take(key) for key in rest]
            loaded = self.namespace.load(rest, self._memory[pages], timeout_s=TIMEOUT_S)
            if loaded.blocks != len(rest):
                raise RuntimeError(f"{loaded.blocks} of {len(rest)} blocks loaded: {loaded.reason}")
            self._pages.update(zip(rest, pages, strict=True))
            self._touch(keys)
        return lead

    def _touch(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):  # the end of a context goes before its beginning, without which it is no use
            self._pages.move_to_end(key)

    def _take(self, key: bytes) -> int:
        if key in self._pages:  # behind a block that has gone
            return self._pages.pop(key)
        return self._free.pop() if self._free else self._pages.popitem(last=False)[1]


class Outcome(NamedTuple):
    """Of one way to spend the bytes."""

    seconds: float  # until all of a context can be used, the mean
    spared: float  # share of blocks that did not cross the link


def own_cache_over_hbm(engines: int) -> Callable[[Rig], float]:
    """Seconds until a context can be used, with the bytes in the engines' own caches over those with a tier."""
    return lambda rig: outcome(rig, engines, tier=False).seconds / outcome(rig, engines, tier=True).seconds


def spared(engines: int, *, tier: bool) -> Callable[[Rig], float]:
    """Hits by byte of the GPU's memory: with the same bytes, the share of blocks that did not cross the link."""
    return lambda rig: outcome(rig, engines, tier=tier).spared


def outcome(rig: Rig, engines: int, *, tier: bool) -> Outcome:
    """Of a run, which is made once for all figures."""
    name = f"{engines} engines, {'a tier' if tier else 'own caches'}"
    if name not in rig.outcomes:
        rig.outcomes[name] = _run(rig, engines, tier=tier)
    return Outcome(*rig.outcomes[name])


def _run(rig: Rig, engines: int, *, tier: bool) -> Outcome:
    """Engines take turns; the first third of the requests fills what there is, and counts for nothing."""
    blocks = max(ARENA_BYTES, rig.scale.total_bytes // 4) // HELD // BLOCK_BYTES  # of a context
    given = HELD * blocks * BLOCK_BYTES
    own = (OWN * blocks + (0 if tier else HELD * blocks // engines)) * BLOCK_BYTES
    arguments = ["--gpu-hbm", f"{given // MIB}MiB"] if tier else []
    turns = TURNS * rig.scale.rounds
    with _engines(rig, engines, own, arguments) as (process, namespace, caches):
        chains = [list(namespace.keys(range(BLOCK_TOKENS * blocks), extra=bytes([at]))) for at in range(CONTEXTS)]
        for chain in chains:
            caches[0].store(chain)
        random, weights = np.random.default_rng(SEED), 1 / np.arange(1, CONTEXTS + 1)
        drawn = random.choice(CONTEXTS, (turns, engines), p=weights / weights.sum())
        took: list[float] = []
        there = before = 0
        for turn in range(turns):
            if turn == turns // 3:
                took, there, before = [], 0, hits(process)
            for cache, number in zip(caches, drawn[turn], strict=True):
                begun = time.perf_counter()
                there += cache.use(chains[number])
                took.append(time.perf_counter() - begun)
        there += hits(process) - before
    return Outcome(fmean(took), there / (len(took) * blocks))


@contextmanager
def _engines(
    rig: Rig, engines: int, own_bytes: int, arguments: Sequence[str]
) -> Iterator[tuple[DaemonProcess, kvclient.Namespace, list[OwnCache]]]:
    """A daemon, and so many engines with caches of so many bytes; the namespace is the first one's."""
    with ExitStack() as stack:
        memories = [stack.enter_context(rig.lent(own_bytes)) for _ in range(engines)]
        process, client = stack.enter_context(rig.client("daemon", "--gpu-devices", rig.name, *arguments))
        caches = []
        for number, memory in enumerate(memories):
            if number:
                client = stack.enter_context(rig.connected(process, "daemon"))
            attached = client.attach(rig.place, rig.pages(memory, BLOCK_BYTES, own_bytes))
            stack.callback(attached.detach)
            caches.append(OwnCache(namespace_of(client), attached))
        yield process, caches[0].namespace, caches
