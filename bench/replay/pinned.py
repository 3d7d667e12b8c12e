"""The nearest rival to hints: LRU, and whoever waits for a tool is pinned for a fixed time.

What serving systems do that know of tools and learn nothing: the context of a program stays for `TTL_S` after its tool
has begun, or until its next request. Pins may cover half of the memory; the oldest gives way to a new one.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench.replay.lab import Cache, Setting
from bench.replay.score import Score, score
from bench.replay.workload import Keys, ProgramFinished, Request, ToolStarted, Workload
from kvstore.policy import Rule

TTL_S: Final = 300.0
SHARE: Final = 0.5


@dataclass(frozen=True, slots=True)
class _Pin:
    block: int
    bytes: int  # of the whole context, as if nobody shared it
    until_s: float


def replay_pinned(workload: Workload, capacity_bytes: int) -> Score:
    """What a cache is worth that pins so."""
    play = _Play(workload, capacity_bytes)
    hits: list[int] = []
    for event in workload.events:
        play.expire(event.at_s)
        if isinstance(event, Request):
            hits.append(play.serve(event))
        elif isinstance(event, ToolStarted):
            play.pin(event.program, event.at_s)
        elif isinstance(event, ProgramFinished):
            play.unpin(event.program)
    return score(workload, hits)


class _Play:
    def __init__(self, workload: Workload, capacity_bytes: int) -> None:
        self._cache = Cache(workload, capacity_bytes, Setting(Rule.LRU))
        self._models = workload.models
        self._left_bytes = int(SHARE * capacity_bytes)
        self._contexts: dict[int, tuple[int, Keys]] = {}  # by program: model, keys
        self._pins: OrderedDict[int, _Pin] = OrderedDict()  # by program, the oldest first

    def serve(self, request: Request) -> int:
        """One request: what it is served from needs no pin any more."""
        found = self._cache.serve(request)
        if request.program >= 0:
            self.unpin(request.program)
            self._contexts[request.program] = (request.model, np.concatenate((request.keys, request.output_keys)))
        return found

    def pin(self, program: int, at_s: float) -> None:
        """A program waits for a tool."""
        self.unpin(program)
        model, keys = self._contexts.get(program, (0, np.zeros(0, np.uint64)))
        wanted_bytes = keys.size * self._models[model].block_bytes
        while self._pins and wanted_bytes > self._left_bytes:
            self.unpin(next(iter(self._pins)))
        block = self._cache.hold(model, keys) if 0 < wanted_bytes <= self._left_bytes else 0
        if block:
            self._pins[program] = _Pin(block, wanted_bytes, at_s + TTL_S)
            self._left_bytes -= wanted_bytes

    def unpin(self, program: int) -> None:
        """Its pin is over, if it has one."""
        pin = self._pins.pop(program, None)
        if pin is not None:
            self._cache.let_go(pin.block)
            self._left_bytes += pin.bytes

    def expire(self, now_s: float) -> None:
        """Fixed times end in the order in which they began."""
        while self._pins and next(iter(self._pins.values())).until_s <= now_s:
            self.unpin(next(iter(self._pins)))
