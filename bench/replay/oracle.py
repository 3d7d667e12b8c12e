"""Hints of a known accuracy: what a client could say of each block's next use if it knew the future, and lied so often.

A hint is one of the classes of `blocks.hint_run`. `one_bit` says only whether a block is used
again at all; `next_use` when. `truth` is the share of blocks of which the truth is told: of the others, one_bit says
the opposite, and next_use what is true of some other block.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from bench.replay.workload import Request, Workload

SOON: Final = 2
LATER: Final = 5
HARDLY: Final = 7
SOON_S: Final = 120.0
LATER_S: Final = 900.0
Hints = np.ndarray[tuple[int], np.dtype[np.uint8]]


def one_bit(workload: Workload, truth: float, seed: int) -> list[Hints]:
    """For each request, a hint for each of its keys."""
    rng = np.random.Generator(np.random.PCG64(seed))
    hints: list[Hints] = []
    for gaps in next_gaps(workload.requests):
        used = np.isfinite(gaps)
        told = np.where(rng.random(gaps.size) < truth, used, ~used)
        hints.append(np.where(told, SOON, HARDLY).astype(np.uint8))
    return hints


def next_use(workload: Workload, truth: float, seed: int) -> list[Hints]:
    """As `one_bit`, from how long it takes to the next use."""
    rng = np.random.Generator(np.random.PCG64(seed))
    gaps = next_gaps(workload.requests)
    every = np.concatenate(gaps) if gaps else np.zeros(0)
    hints: list[Hints] = []
    for mine in gaps:
        told = np.where(rng.random(mine.size) < truth, mine, rng.choice(every, mine.size))
        hints.append(np.where(told <= SOON_S, SOON, np.where(told <= LATER_S, LATER, HARDLY)).astype(np.uint8))
    return hints


def next_gaps(requests: Sequence[Request]) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Seconds from each request to the next one that asks for the same block, infinite if there is none."""
    following: dict[int, float] = {}
    gaps: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    for request in reversed(requests):
        keys = request.keys.tolist()
        gaps.append(np.array([following.get(key, np.inf) - request.at_s for key in keys]))
        following.update(dict.fromkeys(keys, request.at_s))
    return gaps[::-1]
