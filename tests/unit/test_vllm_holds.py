"""Blocks that finished requests hold in vLLM's memory: who may hold how many, for how long, and who goes first."""

from collections import Counter
from collections.abc import Sequence

import pytest

from kvclient.integrations import vllm_holds
from kvclient.integrations.vllm_holds import Holds
from kvclient.integrations.vllm_saves import EngineMemory

BLOCKS = 40
EMPTY = 39  # a block that vLLM's cache cannot find


class Memory:
    """References as vLLM counts them: a block that has one is not free."""

    def __init__(self) -> None:
        self.references: Counter[int] = Counter()
        self.used = 0  # blocks of requests that run

    def engine(self) -> EngineMemory:
        return EngineMemory(BLOCKS, self.free, hold=self.hold, let_go=self.let_go)

    def free(self) -> int:
        return BLOCKS - self.used - len(self.held)

    @property
    def held(self) -> set[int]:
        assert all(count >= 0 for count in self.references.values())
        return {block for block, count in self.references.items() if count}

    def hold(self, block_ids: Sequence[int]) -> list[int]:
        found = [block for block in block_ids if block != EMPTY]
        self.references.update(found)
        return found

    def let_go(self, block_ids: Sequence[int]) -> None:
        self.references.subtract(block_ids)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def holds(memory: Memory) -> Holds:
    """At most ten blocks, for at most a minute."""
    return Holds(memory.engine(), share=0.25, longest_s=60.0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock."""
    now = [1000.0]
    monkeypatch.setattr(vllm_holds, "_clock", lambda: now[0])
    return now


def test_what_is_held_stays_until_its_time_is_over_and_never_longer_than_may_be(
    memory: Memory, holds: Holds, now: list[float]
) -> None:
    assert holds.add([1, 2, EMPTY], 5.0)
    assert holds.add([3, 4], 86400.0)
    assert not holds.add([], 5.0)
    assert not holds.add([5], 0.0)
    assert not holds.add([EMPTY], 5.0), "nobody would find it"
    assert memory.held == {1, 2, 3, 4}
    now[0] += 4.9
    holds.end_old()
    assert memory.held == {1, 2, 3, 4}
    now[0] += 0.2
    holds.end_old()
    assert memory.held == {3, 4}
    now[0] += 54.0
    holds.end_old()
    assert memory.held == {3, 4}
    now[0] += 1.0
    holds.end_old()
    assert memory.held == set()
    assert not holds


def test_beyond_the_budget_what_ends_first_goes_first(memory: Memory, holds: Holds) -> None:
    assert holds.add(range(4), 30.0)
    assert holds.add(range(10, 14), 20.0)
    assert holds.add(range(20, 24), 40.0)
    assert memory.held == {*range(4), *range(20, 24)}
    assert not holds.add(range(30, 33), 10.0), "it would end first itself"
    assert memory.held == {*range(4), *range(20, 24)}
    assert not holds.add(range(11), 50.0), "more than all may hold"
    assert holds.add([], 50.0) is False
    assert memory.held == {*range(4), *range(20, 24)}


def test_the_next_turn_of_a_conversation_takes_over_what_the_last_one_held(memory: Memory, holds: Holds) -> None:
    assert holds.add(range(10, 14), 10.0)
    assert holds.add(range(4), 30.0)
    assert holds.add(range(6), 30.0), "four blocks count once"
    assert memory.held == {*range(6), *range(10, 14)}
    assert holds.end_all()
    assert memory.held == set()
    assert not holds.end_all()


def test_whoever_needs_memory_gets_as_much_as_it_needs(memory: Memory, holds: Holds) -> None:
    for first, seconds in ((0, 30.0), (10, 10.0), (20, 20.0)):
        assert holds.add(range(first, first + 3), seconds)
    memory.used = 20
    holds.make_room(7)  # and a tenth of all stays free
    assert memory.held == {0, 1, 2, 10, 11, 12, 20, 21, 22}
    holds.make_room(8)
    assert memory.held == {0, 1, 2, 20, 21, 22}
    memory.used = 31
    holds.end_old()
    assert memory.held == {0, 1, 2}, "the engine is short of memory"
    holds.make_room(30)
    assert memory.held == set()
