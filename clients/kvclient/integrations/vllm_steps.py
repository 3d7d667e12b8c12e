"""Steps of vLLM that are one prefill and nothing else: they tell the daemon what computing costs."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from kvclient.namespace import Namespace

PROFILED_TOKENS: Final = 64  # a prefill of fewer says little about what computing costs

_clock = time.monotonic


class Known(Protocol):
    """What is known of a request."""

    request: Any


class Steps:
    """One engine's. Scheduler's thread; never waits."""

    def __init__(self, shards: Sequence[Namespace]) -> None:
        """`shards`: the namespace of every rank."""
        self._shards = shards
        self._step: tuple[float, int, int] | None = None  # begun; tokens cached and new of its only prefill

    def begin(self, scheduled: Mapping[str, int], known: Mapping[str, Known], *, loads: bool) -> None:
        """A step is planned. `scheduled`: tokens by request."""
        self._step = None
        if len(scheduled) == 1 and not loads:
            ((request_id, tokens),) = scheduled.items()
            if request_id in known and tokens >= PROFILED_TOKENS:
                self._step = (_clock(), int(known[request_id].request.num_computed_tokens), tokens)

    def end(self) -> None:
        """It is over."""
        step, self._step = self._step, None
        if step is not None:
            began, cached, new = step
            for shard in self._shards:
                shard.report_prefill(cached, new, _clock() - began)
