"""How many bytes may move beside an engine's forward passes without slowing them: InferCept's swap budget.

    T_swap(N) = T_fwd(batch)          N bytes hide behind one pass of the engine (Abhyankar et al. 2024, section 4.1)
    N = bandwidth * forward_s         bandwidth: a moving average of what swaps have reached

`tick` grants N for one iteration; what is not used by the next one is gone, since it would not hide any more. A chunk
that goes beyond what is left is paid for by the following iterations, so that on average no more moves than is granted.
An engine that does not tick has a rate instead, unless its last word was that it computes nothing. Times are seconds of
any one clock, given by the caller. Any thread.
"""

import math
import threading
from typing import Final

RATE_BYTES_PER_S: Final = 1 << 30  # without ticks: 2 % of a PCIe 5 link, a tenth of one core's memmove
BURST_S: Final = 0.1  # and at most so much of it at once
NEWEST: Final = 0.2  # share of the newest measurement in the average
TIMED_BYTES: Final = 1 << 20  # a copy smaller than this says more about its overhead than about the link
STALE_PASSES: Final = 8  # no tick for so many passes, and the engine ticks no more
STALE_S: Final = 0.25  # nor before so long


class Bandwidth:
    """Bytes a second, as a moving average of copies that were timed."""

    def __init__(self) -> None:
        self.bytes_per_s = 0.0  # 0.0: nothing was timed yet

    def took(self, moved_bytes: int, seconds: float) -> None:
        """One copy. What is too small, or took no time by the clock, says nothing."""
        if moved_bytes < TIMED_BYTES or seconds <= 0:
            return
        newest = moved_bytes / seconds
        self.bytes_per_s += (newest - self.bytes_per_s) * (NEWEST if self.bytes_per_s else 1.0)


class Budget:
    """One engine's, for both directions together: they share its memory, if not its link."""

    def __init__(self, rate_bytes_per_s: float = RATE_BYTES_PER_S) -> None:
        self.bandwidth = Bandwidth()
        self._rate_bytes_per_s = rate_bytes_per_s
        self._lock = threading.Lock()
        self._left_bytes = 0.0  # below 0: a debt
        self._granted_bytes = 0.0  # by the last tick
        self._filled_s: float | None = None  # until when the rate has been counted
        self._ticks_until_s = -math.inf  # the last tick counts for so long

    def tick(self, forward_s: float, now_s: float, limit_bytes: int | None = None) -> float:
        """An iteration begins whose forward pass takes about `forward_s`; bytes that may move beside it.

        0.0: nothing is computed until the next tick, however late that comes, and whatever moves disturbs nobody.
        `limit_bytes`: never more, and then the rate, also while nothing is computed.
        """
        with self._lock:
            granted = self._hidden_bytes(forward_s) if forward_s > 0 else math.inf
            if limit_bytes is not None:
                granted = min(granted, limit_bytes)
            debt = min(0.0, self._left_bytes)
            if math.isfinite(granted):
                debt = max(debt, -granted)  # what was urgent must not stop everything else for long
                self._left_bytes = granted + debt
            else:
                self._left_bytes = math.inf
            self._granted_bytes = granted
            # Who computes nothing need not say so again; but what has a limit would wait for that for ever.
            silence_s = max(STALE_S, STALE_PASSES * forward_s) if math.isfinite(granted) else math.inf
            self._ticks_until_s = now_s + silence_s
            self._filled_s = None
            return granted

    def _hidden_bytes(self, forward_s: float) -> float:
        return (self.bandwidth.bytes_per_s or self._rate_bytes_per_s) * forward_s

    def left_bytes(self, now_s: float) -> float:
        """What may begin now; nothing if not above 0."""
        with self._lock:
            self._fill(now_s)
            return self._left_bytes

    def take(self, moved_bytes: int, now_s: float) -> None:
        """So much begins to move, whatever is left."""
        with self._lock:
            self._fill(now_s)
            self._left_bytes -= moved_bytes

    def give_back(self, unmoved_bytes: int) -> None:
        """So much of it did not move after all: it was there already."""
        with self._lock:
            ticks = self._filled_s is None and self._ticks_until_s != -math.inf
            most = self._granted_bytes if ticks else self._burst_bytes
            self._left_bytes = min(self._left_bytes + unmoved_bytes, most)

    def wait_s(self, now_s: float) -> float:
        """How long until something may begin if nobody ticks."""
        with self._lock:
            self._fill(now_s)
            if self._left_bytes > 0:
                return 0.0
            until_rate_s = max(0.0, self._ticks_until_s - now_s)
            return until_rate_s + (1 - self._left_bytes) / self._rate_bytes_per_s

    @property
    def _burst_bytes(self) -> float:
        return self._rate_bytes_per_s * BURST_S

    def _fill(self, now_s: float) -> None:
        """Where nobody ticks (any more), by the rate."""
        if now_s < self._ticks_until_s:
            return
        if self._filled_s is None:
            ticked = self._ticks_until_s != -math.inf
            self._left_bytes = self._left_bytes if ticked else self._burst_bytes
            self._filled_s = self._ticks_until_s if ticked else now_s
        gained = max(0.0, now_s - self._filled_s) * self._rate_bytes_per_s
        self._left_bytes = min(self._left_bytes + gained, self._burst_bytes)
        self._filled_s = now_s
