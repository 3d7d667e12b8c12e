"""Threads that let others go first."""

import os
import threading
from contextlib import suppress


def be_nice(nice: int) -> None:
    """Let this thread be so nice, or as nice as the daemon was started: only root may be less so."""
    with suppress(PermissionError):  # then it stays as it is: it must not end for that
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(nice, os.getpriority(os.PRIO_PROCESS, 0)))
