"""A circuit breaker: whether there is any use in asking a far side that has failed. Pure; its user locks.

CLOSED --failures in a row--> OPEN --its time is over--> TRYING, one call --good--> CLOSED
                               ^-------- twice as long ----------|bad
"""

from enum import StrEnum
from typing import Final

FAILURES: Final = 3  # in a row
FIRST_NS: Final = 10**9
LONGEST_NS: Final = 30 * 10**9


class Circuit(StrEnum):
    """Where it stands."""

    CLOSED = "closed"  # calls go through
    OPEN = "open"  # none does
    TRYING = "trying"  # one does


class Breaker:
    """One kind of call."""

    def __init__(self) -> None:
        self.state = Circuit.CLOSED
        self.opened = 0  # times
        self.reason = ""  # of the last failure; empty while all is well
        self.until_ns = 0  # while it is open
        self._failures = 0
        self._wait_ns = FIRST_NS

    def would_allow(self, now_ns: int) -> bool:
        """Is there any use in making a call? Changes nothing; any thread, without a lock."""
        return self.state is Circuit.CLOSED or (self.state is Circuit.OPEN and now_ns >= self.until_ns)

    def allow(self, now_ns: int) -> bool:
        """May this call be made? After `OPEN` one is; its outcome must be told."""
        if self.state is Circuit.OPEN and now_ns >= self.until_ns:
            self.state = Circuit.TRYING
            return True
        return self.state is Circuit.CLOSED

    def good(self) -> None:
        """A call was answered as it should be."""
        self.state, self.reason = Circuit.CLOSED, ""
        self._failures, self._wait_ns = 0, FIRST_NS

    def bad(self, reason: str, now_ns: int, *, at_once: bool = False) -> None:
        """A call failed. `at_once`: the next one would, too."""
        self.reason = reason
        self._failures += 1
        if self.state is Circuit.TRYING:
            self._wait_ns = min(2 * self._wait_ns, LONGEST_NS)
        elif self._failures < FAILURES and not at_once:
            return
        if self.state is not Circuit.OPEN:
            self.opened += 1
            self.state, self.until_ns = Circuit.OPEN, now_ns + self._wait_ns
