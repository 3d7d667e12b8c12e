"""A small engine: continuous batching of requests that pause for tools, KV in pages of a fixed pool.

    waiting --pages--> running --a tool is called--> paused --it has answered--> waiting
                          |                            |
                          `-- no page is free:          `-- its policy: keep the pages; swap them out, and in again
                              the latest one is             while the first layers are computed; or drop them, and
                              computed anew later           compute them anew

An iteration computes one token of every running request, or a piece of its prompt. Nothing of a swap waits for the
daemon here: swaps are queued, `tick` says how long the next pass takes, and a layer waits for its own pages alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from bench.swap_model import BLOCK_BYTES, BLOCK_TOKENS, LAYERS, TOKEN_BYTES, PagedModel
from kvclient.namespace import Namespace
from kvclient.results import Advice, Choice
from kvclient.swapping import Priority, Swapper
from kvclient.swaps import SwapIn, SwapOut

PIECE_TOKENS: Final = 128  # of prompts, in an iteration
PROFILED_TOKENS: Final = 64
ASK_S: Final = 0.01  # how often advice on a paused request is asked for
NAP_S: Final = 0.0005
PATIENCE_S: Final = 30.0
NEWEST: Final = 0.2  # share of the newest pass in what the next one is expected to take
_clock = time.perf_counter


class Policy(Enum):
    """What becomes of a context while its request waits for a tool."""

    PRESERVE = "preserve"
    SWAP = "swap"
    DISCARD = "discard"
    ADAPTIVE = "adaptive"


@dataclass(frozen=True, slots=True)
class Turn:
    """So many tokens are generated, then a tool takes `gap_s` to answer with these; the last turn has no answer."""

    generate: int
    gap_s: float = 0.0
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Script:
    """What a request will do."""

    arrival_s: float
    prompt: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(slots=True, eq=False)
class Request:
    """One that has come."""

    script: Script
    tokens: list[int]
    output: list[int] = field(default_factory=list)
    turn: int = 0
    made: int = 0  # tokens of this turn
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens from the front whose KV lies in the pages
    stored: int = 0  # blocks from the front that were swapped out, and whose pages are somebody else's
    computed: int = 0  # tokens that were computed once: what is computed of them again is waste
    paused_s: float = 0.0
    until_s: float = 0.0
    asked_s: float = 0.0
    decided: bool = False  # for this pause
    out: SwapOut | None = None
    back: SwapIn | None = None
    finished_s: float = 0.0

    @property
    def now(self) -> Turn:
        """The turn that it is at."""
        return self.script.turns[self.turn]


@dataclass(slots=True)
class Tally:
    """What a run has cost."""

    idle_byte_s: float = 0.0  # pages of requests that wait: for a tool, or for more pages
    recompute_byte_s: float = 0.0  # all pages in use, while something is computed again
    stall_byte_s: float = 0.0  # and while a layer waits for its pages
    recomputed_tokens: int = 0
    swapped_out_bytes: int = 0
    swapped_in_bytes: int = 0
    clean_blocks: int = 0  # that were swapped out, and in the store already
    swaps: int = 0
    discards: int = 0
    evictions: int = 0  # requests that were running, or preserved, and gave way
    forward_s: float = 0.0

    @property
    def waste_byte_s(self) -> float:
        """All of it: InferCept's measure."""
        return self.idle_byte_s + self.recompute_byte_s + self.stall_byte_s


class Engine:
    """One run of one policy. One thread."""

    def __init__(
        self, model: PagedModel, namespace: Namespace, swapper: Swapper, tick: Callable[[float, Advice | None], object],
        policy: Policy, pool_pages: int, salt: bytes,
    ) -> None:  # fmt: skip
        """`salt`: of the keys, so that runs do not find what others stored."""
        self.tally = Tally()
        self._model = model
        self._namespace = namespace
        self._swapper = swapper
        self._tick = tick
        self._policy = policy
        self._salt = salt
        self._free = list(range(pool_pages))
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._paused: list[Request] = []
        self._pass_s = 0.0  # what the next one is expected to take
        self._advice: Advice | None = None
        self._began_s = 0.0

    def run(self, scripts: Sequence[Script]) -> list[Request]:
        """All of it, in real time; requests in the order of their scripts."""
        self._began_s = _clock()
        coming = sorted(scripts, key=lambda script: script.arrival_s)
        made: dict[int, Request] = {}
        looked_s = 0.0
        while len(made) < len(scripts) or self._waiting or self._running or self._paused:
            now_s = _clock() - self._began_s
            while coming and coming[0].arrival_s <= now_s:
                script = coming.pop(0)
                made[id(script)] = Request(script, list(script.prompt))
                self._waiting.append(made[id(script)])
            held = sum(len(request.pages) for request in (*self._paused, *self._waiting))
            self.tally.idle_byte_s += held * BLOCK_BYTES * (now_s - looked_s)
            looked_s = now_s
            self._iterate(now_s)
        return [made[id(script)] for script in scripts]

    def _iterate(self, now_s: float) -> None:
        self._take_back(now_s)
        self._look_after_paused(now_s)
        self._admit()
        self._tick(self._pass_s if self._running else 0.0, self._advice)
        if not self._running:
            time.sleep(NAP_S)
            return
        began_s = _clock()
        left = PIECE_TOKENS
        # What is on its way comes last: the others' passes hide it.
        for request in sorted(self._running, key=lambda each: each.back is not None):
            is_prompt = len(request.tokens) - request.cached > 1
            if request in self._running and (left > 0 or not is_prompt):  # else it gave way, or has its turn later
                left -= self._compute(request, max(1, left))
        self._pass_s += (_clock() - began_s - self._pass_s) * (NEWEST if self._pass_s else 1.0)

    # -- pauses ------------------------------------------------------------------------------------------------------

    def _pause(self, request: Request) -> None:
        now_s = _clock() - self._began_s
        self._running.remove(request)
        self._paused.append(request)
        request.paused_s, request.until_s = now_s, now_s + request.now.gap_s
        request.asked_s, request.decided = now_s, False
        self._decide(request, now_s)

    def _look_after_paused(self, now_s: float) -> None:
        for request in self._paused:
            if request.out is not None and request.out.done:
                self._end_out(request)
            if not request.decided and request.pages:
                self._decide(request, now_s)

    def _decide(self, request: Request, now_s: float) -> None:
        choice = self._choice(request, now_s)
        if choice is Choice.DISCARD:
            self.tally.discards += 1
            self._drop(request)
        elif choice is Choice.SWAP and request.cached >= BLOCK_TOKENS:
            self._swap_out(request)
        request.decided = choice is not Choice.PRESERVE or self._policy is Policy.PRESERVE

    def _choice(self, request: Request, now_s: float) -> Choice:
        if self._policy is not Policy.ADAPTIVE:
            return Choice(self._policy.value)
        if now_s - request.asked_s < ASK_S:
            return Choice.PRESERVE
        request.asked_s = now_s
        advice = self._namespace.advise(
            request.cached, now_s - request.paused_s, sum(each.cached for each in self._running),
            token_bytes=TOKEN_BYTES, forward_s=self._pass_s, chunk_tokens=PIECE_TOKENS,
        )  # fmt: skip
        self._advice = advice or self._advice
        return advice.choice if advice is not None else Choice.PRESERVE

    def _take_back(self, now_s: float) -> None:
        for request in [each for each in self._paused if each.until_s <= now_s]:
            self._paused.remove(request)
            if request.out is not None:  # what has not gone yet need not any more: its pages are still its own
                request.out.cancel()
                request.out.result(PATIENCE_S)
                self.tally.swapped_out_bytes += request.out.moved_bytes
                request.out = None
            request.tokens += request.now.answer
            request.turn, request.made = request.turn + 1, 0
            self._waiting.append(request)
        self._waiting.sort(key=lambda each: each.script.arrival_s)

    def _swap_out(self, request: Request) -> None:
        blocks = request.cached // BLOCK_TOKENS
        self.tally.swaps += 1
        request.out = self._swapper.swap_out(self._keys(request, blocks), request.pages[:blocks])

    def _end_out(self, request: Request) -> None:
        """All that could be stored is: its pages go to others."""
        assert request.out is not None, "it was swapped out"
        result = request.out.result()
        self.tally.swapped_out_bytes += request.out.moved_bytes
        self.tally.clean_blocks += result.known
        request.out = None
        stored = result.lead
        self._drop(request)
        request.stored = stored

    def _drop(self, request: Request) -> None:
        if request.out is not None:
            request.out.cancel()
        if request.back is not None:
            request.back.cancel()
        if not self._swapper.before_reuse(request.pages, PATIENCE_S, keep=False):
            raise RuntimeError("a swap hangs")
        self._free += reversed(request.pages)
        request.pages, request.cached, request.stored = [], 0, 0
        request.out = request.back = None

    # -- pages -------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Whoever has pages for all that it has to say now, in order of arrival."""
        while self._waiting:
            request = self._waiting[0]
            needed = _pages_for(len(request.tokens) + 1) - len(request.pages)
            if needed > len(self._free) and self._running:
                return
            if not self._grow(request, _pages_for(len(request.tokens) + 1)):
                return
            del self._waiting[0]
            self._running.append(request)
            if request.stored:
                blocks, request.stored = request.stored, 0
                request.cached = blocks * BLOCK_TOKENS
                request.back = self._swapper.swap_in(
                    self._keys(request, blocks), request.pages[:blocks], Priority.URGENT, groups=LAYERS
                )

    def _grow(self, request: Request, pages: int) -> bool:
        """So many pages in all; others give way if need be, the latest first."""
        while len(self._free) < pages - len(request.pages):
            victims = [each for each in (*self._running, *self._paused, *self._waiting) if each.pages]
            victims = [each for each in victims if each is not request]
            if not victims:
                return False
            running = [each for each in victims if each in self._running]
            victim = max(running or victims, key=lambda each: each.script.arrival_s)
            if victim in self._running:
                if victim.script.arrival_s < request.script.arrival_s:
                    return False
                self._running.remove(victim)
                self._waiting.append(victim)
                self._waiting.sort(key=lambda each: each.script.arrival_s)
            self.tally.evictions += 1
            self._drop(victim)
        while len(request.pages) < pages:
            request.pages.append(self._free.pop())
        return True

    def _keys(self, request: Request, blocks: int) -> list[bytes]:
        return list(self._namespace.keys(request.tokens[: blocks * BLOCK_TOKENS], extra=self._salt))

    # -- computing ---------------------------------------------------------------------------------------------------

    def _compute(self, request: Request, most: int) -> int:
        """A token more, or a piece of what there is to be computed before; how many tokens that took."""
        new = min(len(request.tokens) - request.cached, most)
        if not self._grow(request, _pages_for(request.cached + new)):
            self._running.remove(request)
            self._waiting.append(request)
            self._waiting.sort(key=lambda each: each.script.arrival_s)
            return 0
        stop = request.cached + new
        waited_s = [0.0]
        began_s = _clock()
        token = self._model.forward(
            request.tokens[request.cached : stop], request.pages, request.cached, _waiting(request.back, waited_s)
        )
        seconds = _clock() - began_s
        in_use = self._pages_in_use() * BLOCK_BYTES
        self.tally.forward_s += seconds
        self.tally.stall_byte_s += waited_s[0] * in_use
        if request.back is not None and not self._came(request):
            return new  # what it was computed from was not there
        again = max(0, min(stop, request.computed) - request.cached)
        self.tally.recomputed_tokens += again
        self.tally.recompute_byte_s += (seconds - waited_s[0]) * again / new * in_use
        if new >= PROFILED_TOKENS and not waited_s[0]:
            self._namespace.report_prefill(request.cached, new, seconds)
        request.cached = stop
        request.computed = max(request.computed, stop)
        if stop == len(request.tokens):
            self._say(request, token)
        return new

    def _came(self, request: Request) -> bool:
        """Is what was swapped in good? Else all of it is computed anew."""
        back, request.back = request.back, None
        assert back is not None, "it was swapped in"
        result = back.result(PATIENCE_S)
        self.tally.swapped_in_bytes += back.moved_bytes
        if result.blocks == len(back.keys):
            return True
        request.cached = 0
        return False

    def _say(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        request.output.append(token)
        request.made += 1
        if request.made < request.now.generate:
            return
        if request.turn + 1 < len(request.script.turns):
            self._pause(request)
            return
        self._running.remove(request)
        request.finished_s = _clock() - self._began_s
        self._drop(request)

    def _pages_in_use(self) -> int:
        return sum(len(each.pages) for each in (*self._running, *self._paused, *self._waiting))


def _pages_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _waiting(back: SwapIn | None, waited_s: list[float]) -> Callable[[int], None] | None:
    """What a layer does before it reads its pages."""
    if back is None:
        return None

    def wait(layer: int) -> None:
        began_s = _clock()
        back.wait(layer + 1, PATIENCE_S)
        waited_s[0] += _clock() - began_s

    return wait
