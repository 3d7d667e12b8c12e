"""Blocks that finished requests keep in the engine's own memory for a while (`hold_s`), where the next turn finds them.

A hold is one more reference on each block, taken before vLLM frees the request, which is gone for vLLM then: an engine
that has nothing else to do is idle, can be paused, and ends. Held blocks are cheap to lose and dear to wait for, so
they go as soon as anybody needs room: the hold that ends first goes first.

An engine that is idle frees held blocks with its next step, however long ago their time was over. It waits for requests
without a timeout then, and asks no connector; its pool of blocks is for its own thread only, so no timer of ours may
touch it. The one thing a connector can do (vLLM 0.32) is to say that it has work left (`has_pending_push_work`), which
keeps the engine stepping, 1,000 times a second, and keeps it from ending. Nobody loses by waiting: what could use the
memory is a request, and that makes room first. Only vLLM's own gauge of its cache shows what is held.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvclient.integrations.vllm_saves import EngineMemory

SHORT_SHARE: Final = 0.1  # of the engine's blocks: with fewer free ones nothing is held

_clock = time.monotonic


@dataclass(frozen=True, slots=True)
class _Hold:
    until: float
    block_ids: tuple[int, ...]


class Holds:
    """One engine's. Scheduler's thread."""

    def __init__(self, memory: EngineMemory, *, share: float, longest_s: float) -> None:
        """`share`: of the engine's blocks that may be held at a time; `longest_s`: how long any of them may be."""
        self._memory = memory
        self._most = int(share * memory.blocks)
        self._short = SHORT_SHARE * memory.blocks
        self._longest_s = longest_s
        self._holds: list[_Hold] = []  # that which ends first at the front

    def __len__(self) -> int:
        return len(self._holds)

    def add(self, block_ids: Sequence[int], hold_s: float) -> bool:
        """Hold these, of a request that still has them, for so long; whether any is held. Others may go for that."""
        self.end_old()
        if hold_s <= 0:
            return False
        held = tuple(self._memory.hold(block_ids))
        if not 0 < len(held) <= self._most:  # such as none that vLLM's cache could find again
            self._memory.let_go(held)
            return False
        new = _Hold(_clock() + min(hold_s, self._longest_s), held)
        mine = set(held)
        for former in [each for each in self._holds if each.until <= new.until and mine.issuperset(each.block_ids)]:
            self._end(former)  # the turn before of the same conversation
        self._holds = sorted([*self._holds, new], key=lambda each: each.until)
        while sum(len(each.block_ids) for each in self._holds) > self._most:
            self._end(self._holds[0])
        return new in self._holds

    def end_old(self) -> None:
        """Free what has been held long enough; all of it while the engine is short of memory."""
        if self._holds:
            self.make_room(0)

    def make_room(self, blocks: int) -> None:
        """Free what has been held long enough, and of the rest as much as it takes for so many blocks to be free."""
        now, wanted = _clock(), blocks + self._short
        while self._holds and (self._holds[0].until <= now or self._memory.free() < wanted):
            self._end(self._holds[0])

    def end_all(self) -> bool:
        """Free everything; whether there was anything."""
        ended = bool(self._holds)
        while self._holds:
            self._end(self._holds[0])
        return ended

    def _end(self, hold: _Hold) -> None:
        self._holds.remove(hold)
        self._memory.let_go(hold.block_ids)
