"""The chains of block keys that hints name, each block once, and the least value bound at or below every block.

A radix tree: a segment is a run of blocks that no chain leaves or ends in, so what an update costs depends on where
chains part, not on how long they are.

    end of chain 1: 3                 least()
    a b c d|                          a b    -> 1
        \\                             c d    -> 3
         e f|  end of chain 2: 1      e f    -> 1

Blocks are told apart by 64 bits of key and namespace. Two that agree in them share a hint, which harms nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count as count_from
from typing import Final, NewType, TypeAlias

import numpy as np

from kvproto.ids import BlockKey, NamespaceNumber
from kvproto.limits import KEY_BYTES
from kvstore.hints.limits import CHAIN_BLOCKS, CHAIN_ENDS, HINTED_BLOCKS
from kvstore.hints.refusal import Refusal, Refused

Mark = NewType("Mark", int)  # 64 bits that stand for a block
Change: TypeAlias = tuple[Mark, int | None, int | None]  # where a chain ends, its value so far, its value from now on

_MIX: Final = 0x9E3779B97F4A7C15  # odd: no two namespaces give one key the same mark
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Chain:
    """Blocks of a namespace of which each continues the one before. `keys`: 32 bytes each, the first block first."""

    namespace: NamespaceNumber
    keys: bytes

    @staticmethod
    def of(namespace: NamespaceNumber, keys: Sequence[BlockKey]) -> "Chain":
        """From keys one by one."""
        return Chain(namespace, b"".join(keys))

    @property
    def length(self) -> int:
        """Blocks."""
        return len(self.keys) // KEY_BYTES


def mark_of(namespace: NamespaceNumber, key: BlockKey) -> Mark:
    """What stands for a block."""
    return Mark(int.from_bytes(key[:8], "little") ^ (namespace * _MIX & _MASK))


def marks_of(chain: Chain) -> list[Mark]:
    """What stands for the blocks of a chain, in order."""
    words: list[Mark] = (np.frombuffer(chain.keys, "<u8")[:: KEY_BYTES // 8] ^ _salt(chain.namespace)).tolist()
    return words


def _salt(namespace: NamespaceNumber) -> np.uint64:
    return np.uint64(namespace * _MIX & _MASK)


class _Segment:
    """A run of blocks. `tally`: how often each value occurs among its ends and the least values of its branches."""

    __slots__ = ("namespace", "parent", "start", "marks", "keys", "branches", "ends", "tally", "least", "waits")

    def __init__(self, namespace: NamespaceNumber, parent: "_Segment | None", start: int) -> None:
        self.namespace = namespace
        self.parent = parent
        self.start = start  # blocks before it
        self.marks: list[Mark] = []
        self.keys = b""
        self.branches: set[_Segment] = set()
        self.ends = 0
        self.tally: dict[int, int] = {}
        self.least: int | None = None
        self.waits = False  # for its turn in an update

    def count(self, value: int | None, by: int) -> None:
        """A value comes or goes."""
        if value is not None:
            left = self.tally.get(value, 0) + by
            assert left >= 0, "a value goes that never came"
            if left:
                self.tally[value] = left
            else:
                del self.tally[value]


class Chains:
    """Those of one tenant. An end is named by the mark of the last block."""

    __slots__ = ("_segments", "_ends", "_most_blocks", "_most_ends")

    def __init__(self, most_blocks: int = HINTED_BLOCKS, most_ends: int = CHAIN_ENDS) -> None:
        self._segments: dict[Mark, _Segment] = {}
        self._ends = 0
        self._most_blocks = most_blocks
        self._most_ends = most_ends

    @property
    def blocks(self) -> int:
        """Blocks that are named, those that chains share once."""
        return len(self._segments)

    @property
    def ends(self) -> int:
        """Chains that are named."""
        return self._ends

    def add(self, chain: Chain) -> Mark | Refused:
        """Name a chain, once more if need be. It has no value yet."""
        if not chain.keys or len(chain.keys) % KEY_BYTES:
            return Refused(Refusal.FORM)
        if len(chain.keys) > CHAIN_BLOCKS * KEY_BYTES:
            return Refused(Refusal.LARGE)
        marks = marks_of(chain)
        known = next((i for i, mark in enumerate(marks) if mark not in self._segments), len(marks))
        fresh = marks[known:]
        if not self._continue(marks, known):
            return Refused(Refusal.NO_CHAIN)
        if len(self._segments) + len(fresh) > self._most_blocks or self._ends >= self._most_ends:
            return Refused(Refusal.FULL)
        segment = self._cut(marks[known - 1]) if known else None
        if fresh:
            segment = self._grow(segment, chain, known, fresh)
        assert segment is not None
        segment.ends += 1
        self._ends += 1
        return marks[-1]

    def drop(self, end: Mark) -> None:
        """Name a chain once less. Its value has to be gone already."""
        segment = self._segments[end]
        segment.ends -= 1
        self._ends -= 1
        assert segment.ends >= 0, "a chain is dropped that was not named"
        while not segment.ends and not segment.branches:
            for mark in segment.marks:
                del self._segments[mark]
            if segment.parent is None:
                return
            segment.parent.branches.discard(segment)
            segment = segment.parent
        if not segment.ends and len(segment.branches) == 1:
            self._join(segment, next(iter(segment.branches)))

    def change(self, changes: Iterable[Change]) -> None:
        """Give ends other values. Each segment above is looked at once, however many ends there are below it."""
        waiting: list[tuple[int, int, _Segment]] = []
        numbers = count_from(0)  # no two segments are compared

        def count(segment: _Segment, old: int | None, new: int | None) -> None:
            segment.count(old, -1)
            segment.count(new, 1)
            if not segment.waits:
                segment.waits = True
                heappush(waiting, (-segment.start, next(numbers), segment))

        for end, old, new in changes:
            count(self._segments[end], old, new)
        while waiting:
            segment = heappop(waiting)[2]
            segment.waits = False
            was, segment.least = segment.least, min(segment.tally, default=None)
            if segment.parent is not None and segment.least != was:
                count(segment.parent, was, segment.least)

    def least(self, mark: Mark) -> int | None:
        """The least value of all chains through this block."""
        segment = self._segments.get(mark)
        return None if segment is None else segment.least

    def leasts(self, chain: Chain) -> list[int | None]:
        """`least` of each block of a chain, whether it is still named or not."""
        find = self._segments.get
        found = map(find, marks_of(chain))
        return [None if segment is None else segment.least for segment in found]

    def chain(self, end: Mark) -> Chain:
        """The chain that ends there."""
        segment: _Segment | None = self._segments[end]
        assert segment is not None
        namespace, parts = segment.namespace, []
        while segment is not None:
            parts.append(segment.keys)
            segment = segment.parent
        return Chain(namespace, b"".join(reversed(parts)))

    def length(self, end: Mark) -> int:
        """Blocks of the chain that ends there."""
        segment = self._segments[end]
        return segment.start + len(segment.marks)

    def _continue(self, marks: list[Mark], known: int) -> bool:
        """Can this be a chain beside those that are known? Keys are a caller's word, so they may be anything."""
        fresh = marks[known:]
        if len(set(fresh)) != len(fresh) or any(mark in self._segments for mark in fresh):
            return False
        if not known:
            return True
        last = self._segments[marks[known - 1]]
        return last.start + last.marks.index(marks[known - 1]) == known - 1

    def _grow(self, parent: _Segment | None, chain: Chain, known: int, fresh: list[Mark]) -> _Segment:
        segment = _Segment(chain.namespace, parent, known)
        segment.marks, segment.keys = fresh, chain.keys[known * KEY_BYTES :]
        if parent is not None:
            parent.branches.add(segment)
        for mark in fresh:
            self._segments[mark] = segment
        return segment

    def _cut(self, mark: Mark) -> _Segment:
        """The segment of which this block is the last, cut off from its rest if need be."""
        lower = self._segments[mark]
        at = lower.marks.index(mark) + 1
        if at == len(lower.marks):
            return lower
        upper = _Segment(lower.namespace, lower.parent, lower.start)
        upper.marks, upper.keys = lower.marks[:at], lower.keys[: at * KEY_BYTES]
        upper.branches.add(lower)
        upper.count(lower.least, 1)
        upper.least = lower.least
        if lower.parent is not None:
            lower.parent.branches.remove(lower)
            lower.parent.branches.add(upper)
        lower.marks, lower.keys = lower.marks[at:], lower.keys[at * KEY_BYTES :]
        lower.start, lower.parent = lower.start + at, upper
        for each in upper.marks:
            self._segments[each] = upper
        return upper

    def _join(self, upper: _Segment, lower: _Segment) -> None:
        """Make one segment of two that no chain parts any more. The longer one takes the blocks of the shorter."""
        marks, keys = upper.marks + lower.marks, upper.keys + lower.keys
        if len(lower.marks) > len(upper.marks):
            moved, one = upper.marks, lower
            one.start, one.parent = upper.start, upper.parent
            if one.parent is not None:
                one.parent.branches.remove(upper)
                one.parent.branches.add(one)
        else:
            moved, one = lower.marks, upper
            one.branches, one.ends, one.tally, one.least = lower.branches, lower.ends, lower.tally, lower.least
            for branch in one.branches:
                branch.parent = one
        one.marks, one.keys = marks, keys
        for mark in moved:
            self._segments[mark] = one
