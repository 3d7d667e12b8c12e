"""One daemon for a runtime directory. Light: asked before anything is loaded.

The lock is a file of the daemon's user alone: whoever can read a file can lock it, and keep every daemon out.

Somebody may remove it while a daemon serves. Memory is safe all the same: our fd-keeper gives it to nobody while a
daemon that spoke to it lives, and a second daemon then ends as if the lock were held. systemd's descriptor store cannot
be asked; it passes memory only to the next process of the same unit, after the former one.
"""

import fcntl
import os
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, TextIO

from kvproto.holders import holder

WAIT_S: Final = 1.0  # for one that is about to end, or only looks
AGAIN_S: Final = 0.01


class AlreadyRunningError(Exception):
    """Another daemon serves this runtime directory."""


def only_one(runtime_dir: Path) -> ExitStack:
    """Hold the lock of a runtime directory, made if missing, until the stack is closed. Waits for it up to `WAIT_S`.

    Raises AlreadyRunningError, or OSError if the directory cannot be used.
    """
    runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)  # for engines of other users, and nobody else writes
    owner = runtime_dir.stat().st_uid
    if owner not in {0, os.geteuid()}:
        raise PermissionError(f"{runtime_dir} belongs to uid {owner}, who could replace the sockets in it")
    path = runtime_dir / "lock"
    with ExitStack() as stack:
        lock = _locked(path, stack)
        if _open_to_others(lock):  # by an earlier version; who opened it then can lock it once we let go
            path.unlink()
            lock = _locked(path, stack)  # the former stays locked, too
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return stack.pop_all()


def _locked(path: Path, stack: ExitStack) -> TextIO:
    """The lock that lies at `path`, and not one that was removed between opening and locking. Raises as `only_one`."""
    while True:
        lock = stack.enter_context(_open_lock(path))
        _wait_for(lock, path)
        with suppress(FileNotFoundError):
            if os.path.samestat(path.lstat(), os.fstat(lock.fileno())):
                return lock


def _open_lock(path: Path) -> TextIO:
    """Never truncates, follows no link and waits for no fifo: what lies under the name may be anybody's."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise PermissionError(f"{path} is not a regular file")
    return os.fdopen(fd, "w")


def _wait_for(lock: TextIO, path: Path) -> None:
    """Raises AlreadyRunningError."""
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline_s:
                break
        time.sleep(AGAIN_S)
    pid = holder(path)
    who = "" if pid is None else f": process {pid} holds its lock"
    raise AlreadyRunningError(f"another daemon serves {path.parent}{who}")


def _open_to_others(lock: TextIO) -> bool:
    found = os.fstat(lock.fileno())
    return bool(found.st_mode & 0o077) or found.st_uid != os.geteuid()
