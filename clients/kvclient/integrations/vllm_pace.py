"""How much of what a step has computed may be saved beside the next forward of vLLM without slowing that one.

    begin    a step is about to run: so many bytes hide behind its forward, which takes what the last ones have taken
    loaded   what its forward needs was loaded, which took time of its own
    end      it has run
    save     the thread that saves: as much at a time as may be read of the engine's memory now

Saves that somebody waits for (a finished request whose blocks vLLM wants back, a long queue) do not wait here. Loads
never do: a request waits for each of them. See `kvclient.swap_budget`.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from kvclient.copying import Gate
from kvclient.integrations.vllm_jobs import SaveJob
from kvclient.integrations.vllm_layout import Layout
from kvclient.namespace import Namespace
from kvclient.results import Reason
from kvclient.swap_budget import Budget

SPACE_S: Final = 2.0  # how long a save waits for room in the ring
NEWEST: Final = 0.2  # share of the newest forward in what the next one is expected to take
LOOK_S: Final = 0.005  # how often a save that waits looks whether it has become urgent
_clock = time.monotonic


@dataclass(slots=True)
class Saved:
    """What became of a save so far, in blocks."""

    accepted: int = 0
    known: int = 0
    seconds: float = 0.0  # of copying, without those of waiting
    short: bool = True  # some of it is not in the store, or not yet


class Pace:
    """One worker's. `begin`, `loaded`, `end`, `idle` on the engine's thread, which waits for nothing."""

    def __init__(self) -> None:
        self.budget = Budget()
        self._changed = threading.Condition()
        self._forward_s = 0.0  # as a moving average; 0.0: none was seen yet, and nothing is held back
        self._began_s: float | None = None

    def begin(self) -> None:
        """A forward begins."""
        now_s = _clock()
        self.budget.tick(self._forward_s, now_s)
        self._began_s = now_s
        self._wake()

    def loaded(self) -> None:
        """It begins only now."""
        if self._began_s is not None:
            self._began_s = _clock()

    def end(self) -> None:
        """It is over."""
        began_s, self._began_s = self._began_s, None
        if began_s is not None:
            took_s = _clock() - began_s
            self._forward_s += (took_s - self._forward_s) * (NEWEST if self._forward_s else 1.0)

    def idle(self) -> None:
        """This step has no forward: nothing is in anybody's way."""
        self._began_s = None
        self.budget.tick(0.0, _clock())
        self._wake()

    def save(
        self, namespace: Namespace, layout: Layout, job: SaveJob, gate: Gate, saved: Saved,
        is_urgent: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Store a job's blocks, in as many pieces as it takes; `saved` says how far it is. Raises WithdrawnError, and
        DeviceError for memory of a device that has failed.
        """
        block_bytes, first = layout.block_bytes, 0
        short = False
        while first < len(job.keys) and not short:
            allowed_bytes = self._wait((len(job.keys) - first) * block_bytes, is_urgent)
            some = slice(first, first + max(1, allowed_bytes // block_bytes))
            source = replace(layout.scattered(job.block_ids[some], job.after), gate=gate)
            began_s, read_s, accepted = _clock(), gate.seconds, 0
            try:
                parent = job.keys[first - 1] if first else job.parent
                result = namespace.store(job.keys[some], source, parent=parent, space_s=SPACE_S)
                accepted = result.accepted
            finally:
                saved.seconds += _clock() - began_s
                self.budget.give_back(allowed_bytes - accepted * block_bytes)
                # Copying alone: asking and answering take as long for much as for little, and read nothing.
                self.budget.bandwidth.took(accepted * block_bytes, gate.seconds - read_s)
            saved.accepted += accepted
            saved.known += result.known
            short = any(one.reason is not Reason.PENDING for one in result.refused)  # that one somebody else stores
            first = some.stop
        saved.short = short

    def _wait(self, wanted_bytes: int, is_urgent: Callable[[], bool]) -> int:
        """Bytes, 1 at least and `wanted_bytes` at most, that may be read now; they count as taken."""
        with self._changed:
            while (left := self.budget.left_bytes(_clock())) <= 0 and not is_urgent():
                self._changed.wait(LOOK_S)
        allowed = wanted_bytes if left <= 0 or is_urgent() else max(1, int(min(left, wanted_bytes)))
        self.budget.take(allowed, _clock())
        return allowed

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
