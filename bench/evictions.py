"""What an eviction costs, by rule: choosing the block, taking it out of index, tree and list, and remembering it.

A tenth of a pool of a million blocks goes, one by one. A part of them was used again at gaps from milliseconds to an
hour, so that every rule has many queues in use. The limit in the same run: LRU, whose victim is the head of its only
queue; a rule's `decision` is what it takes beyond that.
"""

import time

import numpy as np

from bench.harness import Results, say
from bench.replay.lab import Cache, Setting
from bench.replay.profiles import BASE
from bench.replay.workload import Model, Request, Workload
from kvproto.limits import MIB
from kvstore.blocks import HINTS, Index, Tables, compiled, evict
from kvstore.policy import Rule

CHAIN = 16


def run(*, quick: bool) -> Results:
    """Microseconds an eviction, and beyond LRU."""
    blocks = 100_000 if quick else 1_000_000
    requests = _requests(blocks)
    seconds: dict[str, float] = {}
    for rule in Rule:
        for told in (False, True):
            name = f"{rule.value}_told" if told else rule.value
            seconds[name] = _evicting(blocks, rule, requests, told=told)
            say(f"{name}: {seconds[name] * 1e6:.2f} us a block")
    results: Results = {f"evict_{name}_us": 1e6 * took for name, took in seconds.items()}
    return results | {f"decision_{name}_us": 1e6 * (took - seconds[Rule.LRU]) for name, took in seconds.items()}


def _requests(blocks: int) -> list[Request]:
    """Enough to fill the pool, and then half as much again, with one in four asking for what was there before."""
    rng = np.random.Generator(np.random.PCG64(1))
    requests: list[Request] = []
    chains = blocks * 3 // 2 // CHAIN
    step_s = 3600.0 / chains
    for number in range(chains):
        again = number > 100 and rng.random() < 0.25
        chain = number - int(rng.pareto(0.5) + 1) % number if again else number
        keys = np.arange(chain * CHAIN + 1, (chain + 1) * CHAIN + 1, dtype=np.uint64)
        requests.append(Request(number * step_s, 0, keys, 256 * CHAIN))
    return requests


def _evicting(blocks_there: int, rule: Rule, requests: list[Request], *, told: bool) -> float:
    """Seconds an eviction, from a pool that is full and in the order of its rule. `told`: with words on all chains."""
    model = Model("bench", 256, 2 * MIB, BASE)
    cache = Cache(Workload("bench", (model,), tuple(requests)), blocks_there * model.block_bytes, Setting(rule))
    for number, request in enumerate(requests):
        cache.serve(request)
        if told:
            cache.hint(request.model, request.keys, np.full(CHAIN, number % HINTS, np.uint8))
    evict_many(*cache.pool(0), 16)  # compiled, and the index of density made
    many = blocks_there // 10
    begun = time.perf_counter()
    evicted = evict_many(*cache.pool(0), many)
    seconds = time.perf_counter() - begun
    assert evicted == many, f"{evicted} of {many} were evicted"
    return seconds / many


@compiled
def evict_many(t: Tables, ix: Index, pool: int, count: int) -> int:
    """Evict so many blocks without going back to Python in between."""
    for i in range(count):
        if not evict(t, ix, pool):
            return i
    return count
