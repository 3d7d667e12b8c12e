"""Files that only the daemon may read: keys. Parsed once, at start."""

import os
import stat
from pathlib import Path
from typing import Final

SECRET_BYTES: Final = 64 * 1024  # far above any key, or chain of certificates


class SecretFileError(ValueError):
    """The file is missing, open to others, or not what it should be. Names the file, never what is in it."""


def read_secret(path: Path) -> bytes:
    """All of a small file that nobody but its owner may read. Raises SecretFileError.

    One of root's may be read by a group too: that is how service managers hand secrets to a service.
    """
    return _read(path, secret=True)


def read_public(path: Path) -> bytes:
    """All of a small file that anybody may read, such as a certificate. Raises SecretFileError."""
    return _read(path, secret=False)


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe of that name holds nobody up
    except OSError as error:
        raise SecretFileError(f"{path} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        state = os.fstat(fd)
        if not stat.S_ISREG(state.st_mode):
            raise SecretFileError(f"{path} is not a regular file")
        if secret and (why := _why_open(state)):
            raise SecretFileError(f"{path} {why}: chmod 600")
        try:
            content = file.read(SECRET_BYTES + 1)
        except OSError as error:
            raise SecretFileError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > SECRET_BYTES:
        raise SecretFileError(f"{path} is larger than {SECRET_BYTES} bytes")
    return content


def _why_open(state: os.stat_result) -> str:
    """Who else may read or change it; empty if nobody may."""
    if os.geteuid() and state.st_uid not in {0, os.geteuid()}:  # root looks at it for the daemon's user
        return f"belongs to uid {state.st_uid}, and is the daemon's or root's to have"
    if state.st_mode & 0o037 or (state.st_mode & 0o040 and state.st_uid != 0):
        return f"is open to others (mode {stat.S_IMODE(state.st_mode):04o})"
    return ""
