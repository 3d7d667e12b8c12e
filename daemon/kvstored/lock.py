"""One daemon for a runtime directory. Light: asked before anything is loaded.

The lock is a file, and somebody may remove it while a daemon serves. Memory is safe all the same: our fd-keeper gives
it to nobody while a daemon that spoke to it lives, and a second daemon then ends as if the lock were held. systemd's
descriptor store cannot be asked; it passes memory only to the next process of the same unit, after the former one.
"""

import fcntl
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO


class AlreadyRunningError(Exception):
    """Another daemon serves this runtime directory."""


def _open_lock(path: Path) -> TextIO:
    """Never truncates, follows no link and waits for no fifo: what lies under the name may be anybody's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PermissionError(f"{path} is not a regular file")
    return os.fdopen(fd, "w")


def only_one(runtime_dir: Path) -> ExitStack:
    """Hold the lock of a runtime directory, made if missing, until the stack is closed.

    Raises AlreadyRunningError, or OSError if the directory cannot be used.
    """
    runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)  # for engines of other users, and nobody else writes
    owner = runtime_dir.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise PermissionError(f"{runtime_dir} belongs to uid {owner}, who could replace the sockets in it")
    stack = ExitStack()
    lock = stack.enter_context(_open_lock(runtime_dir / "lock"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stack.close()
        raise AlreadyRunningError(f"another daemon serves {runtime_dir}") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return stack
