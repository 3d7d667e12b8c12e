"""Long ranges of seeds, by as many processes as there are processors."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
PART = 250  # seeds that a process takes at a time


def at_once(act: Callable[[range], T], seeds: range) -> Iterator[T]:
    """What `act`, a function of a module or a `partial` of one, makes of each part of them, in order. The first one
    that fails raises here.
    """
    parts = [seeds[start : start + PART] for start in range(0, len(seeds), PART)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(act, parts)
