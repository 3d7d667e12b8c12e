"""Threads of ours that have ended by an error: nobody does their work any more, and an operator should know.

A thread that a library runs, as gRPC's do, looks after its own errors and is not heard of here. Any thread.
"""

import logging
import threading
from typing import Final

log = logging.getLogger(__name__)

NAMES_MOST: Final = 8
LETTERS: Final = 200  # of what was wrong

_lock = threading.Lock()
_ended: dict[str, str] = {}  # by name, why


def watch() -> None:
    """From now on, in all of this process."""
    threading.excepthook = _note


def ended() -> tuple[str, ...]:
    """A warning for each."""
    with _lock:
        return tuple(
            f"the thread {name} has ended by an error ({why}), and its work is not done any more; "
            "restart kvstored, and report this with its log"
            for name, why in _ended.items()
        )


def forget() -> None:
    """What was noted so far."""
    with _lock:
        _ended.clear()


def _note(told: threading.ExceptHookArgs) -> None:
    if issubclass(told.exc_type, SystemExit):
        return
    name = "?" if told.thread is None else told.thread.name
    why = " ".join(f"{told.exc_type.__name__}: {told.exc_value}".split())[:LETTERS]  # a warning is a line
    log.error("thread %s has ended: %s", name, why, exc_info=(told.exc_type, told.exc_value, told.exc_traceback))  # type: ignore[arg-type]
    with _lock:
        if len(_ended) < NAMES_MOST:
            _ended.setdefault(name, why)
