"""Handing a session over to another engine: its blocks are copied while it goes on, and under its pause only the tail.

    source   HandOver.copy     what it has by now -> stored -> (`far`) written to the remote tier, and waited for
             ...               what it has appended meanwhile
             HandOver.finish   under the engine's pause: the tail
    target   take_over         a lease of what has come

On one host the pool itself is where both meet; across hosts the remote tier is, which both daemons have (`far`). Tokens
behind the last full block are the target's to compute. Whatever goes wrong, the target has fewer blocks and computes
the rest, and the source's session can go on.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvclient.following import follow
from kvclient.lease import Lease
from kvproto.errors import UsageError
from kvproto.limits import KEYS_PER_FRAME

if TYPE_CHECKING:
    from kvclient.namespace import Namespace

PIECE_BLOCKS: Final = 64  # stored at a time, so that the far side can begin with the first
LOOK_S: Final = 0.001  # between two looks at how far the far side is,
LOOK_S_MAX: Final = 0.02  # while nothing comes
FAR_WITHIN_S: Final = 60.0  # what lies on disk may take so long to be read first

Read = Callable[[int, int], object]  # blocks first..stop of the session, as `Namespace.store` takes them
_clock = time.monotonic


@dataclass(frozen=True, slots=True)
class Round:
    """What was copied at once."""

    blocks: int  # that the target can have now and could not before; those, too, that had gone meanwhile
    bytes: int
    seconds: float
    paused: bool


@dataclass(frozen=True, slots=True)
class HandedOver:
    """What came of it. `why` is empty if the target can have all full blocks, and else a sentence."""

    blocks: int  # the first so many the target can have
    rounds: tuple[Round, ...]
    pause_s: float  # how long the session stood still
    why: str = ""


class HandOver:
    """One session on its way. One thread at a time; `hand_over` is the whole of it for most engines."""

    def __init__(self, namespace: "Namespace", read: Read | None = None, *, far: bool = False) -> None:
        """`read`: None where the engine stores its blocks itself. `far`: the target is on another host."""
        self._namespace = namespace
        self._read = read
        self._far = far
        self._stored = 0  # of the first blocks, in this host's store
        self._rounds: list[Round] = []
        self._gone = False
        self._why = ""
        self.blocks = 0  # of the first ones, those that the target can have

    def copy(self, keys: Sequence[bytes], timeout_s: float = 5.0, *, paused: bool = False) -> Round:
        """Copy what the session has appended, and what has gone since. `keys`: of all its full blocks so far.

        Waits up to `timeout_s`.
        """
        began = _clock()
        until, self._why = began + timeout_s, ""
        self._look(keys)
        before = self.blocks
        self._store(keys, until)
        if self._far:
            self._await_far(keys[: self._stored], until)
        else:
            self.blocks = self._stored
        blocks = max(0, self.blocks - before)
        done = Round(blocks, blocks * self._namespace.block_bytes, _clock() - began, paused)
        self._rounds.append(done)
        return done

    def finish(self, keys: Sequence[bytes], timeout_s: float = 1.0) -> HandedOver:
        """Copy the tail. The session stands still from before this call until it has returned."""
        tail = self.copy(keys, timeout_s, paused=True)
        why = "" if self.blocks == len(keys) else self._why or (_GONE if self._gone else "not all of it came in time")
        return HandedOver(self.blocks, tuple(self._rounds), tail.seconds, why)

    def _look(self, keys: Sequence[bytes]) -> None:
        """Count no more what was evicted or deleted since, here or (`far`) over there: it is the next to be copied."""
        if not self._stored:
            return
        before = self.blocks
        self._stored = self.blocks = self._namespace.match(keys[: self._stored]).blocks
        if self._far:
            self.blocks = 0
            self._ask_far(keys[: min(self._stored, before)])  # of what it has not itself this host cannot be asked
        self._gone = self.blocks < before

    def _store(self, keys: Sequence[bytes], until: float) -> None:
        """Until all of it is in this host's store, as far as it takes it, or time is over: at least one piece."""
        if self._read is None:
            self._stored = follow(self._namespace, keys, max(0.001, until - _clock())).wait()
            return
        while self._stored < len(keys) and not self._why:
            first, stop = self._stored, min(len(keys), self._stored + PIECE_BLOCKS)
            result = self._namespace.store(
                keys[first:stop], self._read(first, stop), parent=keys[first - 1] if first else None, wait=True,
                space_s=max(0.0, until - _clock()),
            )  # fmt: skip
            self._stored += result.lead
            if result.refused:
                self._why = f"a block was not stored: {result.refused[0].reason}"
            if self._far:
                self._ask_far(keys[: self._stored])
            if _clock() >= until:
                return

    def _ask_far(self, keys: Sequence[bytes]) -> bool:
        """Have what is not over there written. Whether any of it will be."""
        while self.blocks < len(keys):
            asked = self._namespace.prefetch(
                keys[self.blocks : self.blocks + KEYS_PER_FRAME], tier="remote", deadline_s=FAR_WITHIN_S
            )
            self.blocks += asked.there
            if asked.there < KEYS_PER_FRAME:
                return bool(asked.coming)
        return True

    def _await_far(self, keys: Sequence[bytes], until: float) -> None:
        nap_s = LOOK_S
        while self.blocks < len(keys):
            before = self.blocks
            goes_on = self._ask_far(keys)
            nap_s = LOOK_S if self.blocks > before else min(2 * nap_s, LOOK_S_MAX)
            if self.blocks == len(keys):
                return
            if _clock() >= until:
                self._why = "the remote tier has not taken all of it in time" if goes_on else _NOT_TAKEN
                return
            time.sleep(nap_s)


_GONE: Final = "some of it was evicted or deleted meanwhile, and has not come again in time"
_NOT_TAKEN: Final = "there is no remote tier that this host may write to, or it does not answer"


def hand_over(
    namespace: "Namespace",
    keys: Callable[[], Sequence[bytes]],
    read: Read | None,
    pause: Callable[[], AbstractContextManager[object]],
    *,
    far: bool = False,
    tail_blocks: int = 2,
    rounds: int = 8,
    timeout_s: float = 30.0,
    pause_s: float = 1.0,
) -> HandedOver:
    """Move a live session to another engine: copy what it has while it goes on, and the tail while it stands still.

    `keys()`: those of its full blocks so far. `read(first, stop)`: these blocks, as `Namespace.store` takes them; None
    where the engine stores by itself, and its blocks are only waited for. `pause()`: a context in which the session
    appends nothing. `far`: the target is on another host with the same remote tier; blocks are written there at once,
    whatever its admission says. Rounds end when at most `tail_blocks` are left, when as much comes as is copied, after
    `rounds` of them, or after `timeout_s`. The pause lasts at most `pause_s`, a look and what the last store takes.
    What was evicted or deleted meanwhile is copied again, or not counted. The target calls `take_over`. Raises
    UsageError.
    """
    if tail_blocks < 0 or rounds < 0:
        raise UsageError("tail_blocks and rounds are 0 or more")
    moving = HandOver(namespace, read, far=far)
    until = _clock() + timeout_s
    left_before = 0
    for number in range(rounds):
        chain = keys()
        left = len(chain) - moving.blocks
        if left <= tail_blocks or _clock() >= until or (number and left >= left_before):
            break  # what is left is short, or grows as fast as it is copied
        moving.copy(chain, until - _clock())
        left_before = left
    began = _clock()
    with pause():
        done = moving.finish(keys(), pause_s)
    return HandedOver(done.blocks, done.rounds, _clock() - began, done.why)


def take_over(namespace: "Namespace", keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Lease:
    """As `Namespace.fetch`, of blocks that another engine is handing over: waits up to `wait_s` for them to come.

    What `HandedOver.blocks` says is all that is worth waiting for. Raises UsageError.
    """
    until = _clock() + wait_s
    if wait_s > 0:
        follow(namespace, keys, wait_s).wait()
    return namespace.fetch(keys, wait_s=max(0.0, until - _clock()), ttl_s=ttl_s)
