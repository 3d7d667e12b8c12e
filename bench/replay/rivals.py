"""What the lab's policies are held against: libCacheSim's on the same stream, and the best that foresight can do.

libCacheSim (GPL-3.0) is run as it comes and never shipped: `pip install libcachesim`. It keeps blocks as objects of
their own and knows no tree: it may evict a block and keep what lies below it, where it is of no use.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from types import ModuleType
from typing import Final, Protocol, TypeAlias

import numpy as np

from bench.replay.score import Score, lead_run, score
from bench.replay.workload import NO_KEYS, Workload

Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

# The lab's name and libCacheSim's.
_CLASSES: Final = {
    "lru": "LRU",
    "s3fifo": "S3FIFO",
    "arc": "ARC",
    "lfu": "LFU",
    "twoq": "TwoQ",
    "sieve": "Sieve",
    "gdsf": "GDSF",
}
RIVALS: Final = tuple(_CLASSES)
_LEAST_BLOCKS: Final = 20  # where a queue is a tenth of the cache and holds no block, libCacheSim ends the process


class RivalsMissingError(RuntimeError):
    """libCacheSim is not installed here."""


class TooSmallError(ValueError):
    """A capacity that libCacheSim would die of."""


class _Asked(Protocol):
    """libCacheSim's request; one is used for all."""

    obj_id: int
    obj_size: int


class _Cache(Protocol):
    """A policy of libCacheSim's."""

    def get(self, req: _Asked) -> bool:
        """Whether it was there; it is now, unless the policy thinks little of it."""


@dataclass(frozen=True, slots=True)
class _Stream:
    """Every request's path, keys and then output keys, with blocks numbered from 0 and requests behind each other."""

    blocks: Numbers
    starts: tuple[int, ...]  # of each request's path, and the end of the last
    asked: tuple[int, ...]  # how many of a path the request asks for; the rest is stored
    sizes: tuple[int, ...]  # bytes, by block number


def _stream(workload: Workload) -> _Stream:
    requests = workload.requests
    paths = [np.concatenate((request.keys, request.output_keys)) for request in requests]
    ids, blocks = np.unique(np.concatenate([NO_KEYS, *paths]), return_inverse=True)
    starts = np.concatenate(([0], np.cumsum([path.size for path in paths]))).astype(np.int64)
    sizes = np.zeros(ids.size, np.int64)
    for request, begin, end in zip(requests, starts[:-1], starts[1:], strict=True):
        sizes[blocks[begin:end]] = workload.models[request.model].block_bytes
    return _Stream(
        blocks.astype(np.int64),
        tuple(starts.tolist()),
        tuple(request.keys.size for request in requests),
        tuple(sizes.tolist()),
    )


def rival(name: str, workload: Workload, capacity_bytes: int) -> Score:
    """The score of one of libCacheSim's policies. Raises RivalsMissingError without it, TooSmallError below 20 blocks.

    A path is accessed from its end to its root, as engines release one: so that of one request's blocks the deepest
    is the oldest, and goes first. In the other order every policy that goes by age would evict roots and lose whole
    paths. Blocks that an answer fills are accessed with the path, and not counted.
    """
    library = _library()
    stream = _stream(workload)
    if capacity_bytes < _LEAST_BLOCKS * max(stream.sizes, default=1):
        raise TooSmallError(f"libCacheSim wants room for at least {_LEAST_BLOCKS} blocks")
    unit = int(np.gcd.reduce(np.array(stream.sizes))) if stream.sizes else 1  # some policies count in 32 bits
    cache, asked = _cache(library, _CLASSES[name], capacity_bytes // unit)
    sizes = [size // unit for size in stream.sizes]
    runs: list[int] = []
    for number, count in enumerate(stream.asked):
        begin, end = stream.starts[number], stream.starts[number + 1]
        here: list[bool] = []
        for block in stream.blocks[begin:end][::-1].tolist():
            asked.obj_id = block + 1  # some hash tables take 0 for nothing
            asked.obj_size = sizes[block]
            here.append(cache.get(asked))
        runs.append(lead_run(here[::-1][:count]))
    return score(workload, runs)


def _library() -> ModuleType:
    """libCacheSim, or the error that says how to get it."""
    try:
        return importlib.import_module("libcachesim")
    except ImportError as trouble:
        raise RivalsMissingError("libCacheSim is not installed: pip install libcachesim") from trouble


def _cache(library: ModuleType, policy: str, capacity: int) -> tuple[_Cache, _Asked]:
    """An empty cache of that policy, and the request to ask it with."""
    make: Callable[..., _Cache] = getattr(library, policy)
    request: Callable[[], _Asked] = library.Request
    return make(cache_size=capacity, hashpower=18), request()


def belady_bound(workload: Workload, capacity_bytes: int) -> Score:
    """Belady's rule on the prefix tree: of all leaves, evict the one that is asked for last, or never again.

    No policy of leaves can hit more blocks where all blocks are of one size. Evicting only leaves costs it nothing: a
    block is never asked for without its ancestors, so the one that is asked for last of all is a leaf, if among equals
    the deepest goes first. Each request puts its whole path in and what does not fit goes afterwards, which may be
    the path itself: a block that is not asked for again never displaces one that is.

    With blocks of several sizes or models of several costs it is a strong rule and no bound.
    """
    stream = _stream(workload)
    last = len(stream.asked)
    following = _following(stream).tolist()
    blocks = stream.blocks.tolist()
    resident: dict[int, int] = {}  # block -> request that asks for it next
    order: list[tuple[int, int, int]] = []  # the latest first; entries that resident no longer agrees with are stale
    free_bytes = capacity_bytes
    runs: list[int] = []
    for number, count in enumerate(stream.asked):
        begin, end = stream.starts[number], stream.starts[number + 1]
        runs.append(lead_run([block in resident for block in blocks[begin : begin + count]]))
        for depth, place in enumerate(range(begin, end)):
            block, soonest = blocks[place], following[place]
            if block in resident:
                free_bytes += stream.sizes[block]
                del resident[block]
            if soonest < last:
                resident[block] = soonest
                free_bytes -= stream.sizes[block]
                heappush(order, (-soonest, -depth, block))
        while free_bytes < 0:
            soonest, _, block = heappop(order)
            if resident.get(block) == -soonest:
                del resident[block]
                free_bytes += stream.sizes[block]
    return score(workload, runs)


def _following(stream: _Stream) -> Numbers:
    """By place in the stream: the request that asks for the same block next, or the number of requests."""
    last = len(stream.asked)
    soonest = [last] * len(stream.sizes)
    following = np.empty(stream.blocks.size, np.int64)
    blocks = stream.blocks.tolist()
    for number in range(last - 1, -1, -1):
        begin, end = stream.starts[number], stream.starts[number + 1]
        for place in range(begin, end):
            following[place] = soonest[blocks[place]]
        for place in range(begin, begin + stream.asked[number]):
            soonest[blocks[place]] = number
    return following
