"""Hints that the daemon did not take. Nobody waits for a hint, so its refusal is only kept, and logged now and then."""

import logging
from collections import deque
from typing import Final

from kvproto.errors import Code

REFUSALS_KEPT: Final = 64
LOG_NS: Final = 60 * 10**9

_log = logging.getLogger(__name__)


class Refusals:
    """Those of one client, over all its sessions. `note` is guarded like the session; `log` is for one thread."""

    def __init__(self) -> None:
        self.count = 0
        self._last: deque[tuple[Code, str]] = deque(maxlen=REFUSALS_KEPT)
        self._logged = 0  # of `count`
        self._log_ns = 0  # when it may be logged again

    def note(self, code: Code, text: str) -> None:
        """One more."""
        self._last.append((code, text))
        self.count += 1

    def last(self) -> list[tuple[Code, str]]:
        """The last 64, the newest at the end. Guarded like the session."""
        return list(self._last)

    def log(self, now_ns: int) -> None:
        """Log one line for all that came since the last one, at most one a minute. Not under a guard."""
        count = self.count
        if count == self._logged or now_ns < self._log_ns:
            return
        code, text = self._last[-1]
        _log.warning("hints refused: new=%d total=%d last=%r code=%s", count - self._logged, count, text, code.name)
        self._logged = count
        self._log_ns = now_ns + LOG_NS
