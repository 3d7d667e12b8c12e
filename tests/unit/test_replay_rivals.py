"""Belady against every schedule of a small case, and libCacheSim where it is installed."""

from functools import cache
from importlib.util import find_spec
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.replay.profiles import BASE
from bench.replay.rivals import RIVALS, RivalsMissingError, belady_bound, rival
from bench.replay.score import infinite
from bench.replay.synthetic import chat
from bench.replay.workload import Model, Request, Workload, keys_of

MODEL = Model("toy", 10, 100, BASE)
# Paths from the root of one small tree: block -> parent.
PARENTS = {1: 0, 2: 1, 3: 2, 4: 1, 5: 0, 6: 5}


def path_to(block: int) -> tuple[int, ...]:
    """From the root down."""
    return (*path_to(PARENTS[block]), block) if block else ()


def workload_of(leaves: list[int]) -> Workload:
    """One request a leaf, one second apart."""
    requests = [Request(at, 0, keys_of(path_to(leaf)), 10 * len(path_to(leaf))) for at, leaf in enumerate(leaves)]
    return Workload("toy", (MODEL,), tuple(requests))


def most_hits(leaves: list[int], blocks: int) -> int:
    """By trying every tree that could be kept after every request."""
    paths = [path_to(leaf) for leaf in leaves]

    @cache
    def best(number: int, kept: frozenset[int]) -> int:
        if number == len(paths):
            return 0
        hits = sum(block in kept for block in paths[number])
        held = kept | set(paths[number])
        trees = [
            frozenset(tree)
            for size in range(min(blocks, len(held)) + 1)
            for tree in combinations(sorted(held), size)
            if all(PARENTS[block] in {0, *tree} for block in tree)
        ]
        return hits + max(best(number + 1, tree) for tree in trees)

    return best(0, frozenset())


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(leaves=st.lists(st.integers(1, 6), min_size=1, max_size=8), blocks=st.integers(0, 4))
def test_belady_hits_as_many_blocks_as_any_schedule_of_trees_can(leaves: list[int], blocks: int) -> None:
    workload = workload_of(leaves)
    bound = belady_bound(workload, 100 * blocks)
    assert round(bound.hit * workload.accesses) == most_hits(leaves, blocks)


def test_belady_with_room_for_everything_is_the_infinite_cache() -> None:
    workload = workload_of([3, 6, 4, 3, 2, 6])
    assert belady_bound(workload, workload.footprint_bytes) == infinite(workload)


def test_belady_keeps_what_an_answer_filled() -> None:
    first = Request(0, 0, keys_of([1]), 10, output_keys=keys_of([2, 3]))
    workload = Workload("toy", (MODEL,), (first, Request(1, 0, keys_of([1, 2, 3, 4]), 40)))
    assert belady_bound(workload, 300).hit == 3 / 5
    assert belady_bound(workload, 200).hit == 2 / 5


@pytest.mark.skipif(find_spec("libcachesim") is not None, reason="libcachesim is installed")
def test_without_libcachesim_one_is_told_how_to_get_it() -> None:
    with pytest.raises(RivalsMissingError, match="pip install libcachesim"):
        rival("lru", workload_of([1]), 100)


@pytest.mark.skipif(find_spec("libcachesim") is None, reason="libcachesim is not installed")
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_stays_below_belady_and_hits_everything_when_nothing_must_go(name: str) -> None:
    workload = chat(5, minutes=5, load=0.5)
    small = rival(name, workload, workload.footprint_bytes // 10)
    assert 0.05 < small.hit <= belady_bound(workload, workload.footprint_bytes // 10).hit
    assert rival(name, workload, 10 * workload.footprint_bytes) == infinite(workload)


@pytest.mark.skipif(find_spec("libcachesim") is None, reason="libcachesim is not installed")
def test_a_capacity_that_libcachesim_would_die_of_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 20 blocks"):
        rival("s3fifo", workload_of([1]), 1900)
