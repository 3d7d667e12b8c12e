"""Steps of vLLM that are one prefill and nothing else: they tell the daemon what computing costs.

Where steps overlap (vLLM's asynchronous scheduling) the next one is planned before this one has ended, and not of every
step without a forward is anything heard. So a step that is timed has a number, which goes with the plan to the workers
and comes back with what they have done (`Plan.timed`, `Progress.timed`); and it runs from when it was planned or the
one before it had ended, whatever was later.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any, Final, NamedTuple, Protocol

from kvclient.namespace import Namespace

PROFILED_TOKENS: Final = 64  # a prefill of fewer says little about what computing costs
UNDER_WAY: Final = 8  # steps at a time, far more than vLLM has; older ones have come to nothing

_clock = time.monotonic


class Known(Protocol):
    """What is known of a request."""

    request: Any


class Begun(NamedTuple):
    """A step with one prefill alone."""

    number: int
    planned: float
    cached: int  # tokens that its prefill finds computed
    new: int


class Steps:
    """One engine's. Scheduler's thread; never waits."""

    def __init__(self, shards: Sequence[Namespace]) -> None:
        """`shards`: the namespace of every rank."""
        self._shards = shards
        self._numbers = count(1)
        self._begun: deque[Begun] = deque(maxlen=UNDER_WAY)
        self._last_end = 0.0  # of any step

    def begin(self, scheduled: Mapping[str, int], known: Mapping[str, Known], *, loads: bool) -> int:
        """A step is planned. `scheduled`: tokens by request. Its number if it is to be timed, otherwise 0."""
        if len(scheduled) != 1 or loads:
            return 0
        ((request_id, tokens),) = scheduled.items()
        if request_id not in known or tokens < PROFILED_TOKENS:
            return 0
        begun = Begun(next(self._numbers), _clock(), int(known[request_id].request.num_computed_tokens), tokens)
        self._begun.append(begun)
        return begun.number

    def end(self, number: int) -> None:
        """A step is over; `number`: as `begin` said."""
        before, self._last_end = self._last_end, _clock()
        while number and self._begun and self._begun[0].number <= number:
            begun = self._begun.popleft()
            if begun.number == number:
                for shard in self._shards:
                    shard.report_prefill(begun.cached, begun.new, self._last_end - max(begun.planned, before))
