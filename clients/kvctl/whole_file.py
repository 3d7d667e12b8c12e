"""Files that appear under their name once they are whole, readable by their owner alone.

What is being written is beside it, under a name of its own: FILE.<16 digits>.part. So two commands that write the same
file do not meet, and what a killed one leaves is never taken for anything: it may be removed.
"""

import os
from contextlib import suppress
from errno import EEXIST
from pathlib import Path
from typing import BinaryIO, Final

from kvctl.client import Exit, KvctlError

STEM: Final = 40  # letters of the name that are kept, so that it stays one


def need_free(path: Path, *, force: bool) -> None:
    """Raises KvctlError with USAGE for a name that is taken: `force` lets a file go, and nothing else."""
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise KvctlError(Exit.USAGE, f"{path} is there, and is no file")
    if not force:
        raise _taken(path)


class WholeFile:
    """One of them, to write to in a `with`. Raises KvctlError where it cannot be written; nothing is left then."""

    def __init__(self, path: Path, *, force: bool) -> None:
        """`force`: a file of that name gives way; otherwise it stays, also one that appears meanwhile."""
        self._path = path
        self._force = force
        self._part = path.with_name(f"{path.name[:STEM]}.{os.urandom(8).hex()}.part")
        self._file: BinaryIO

    def __enter__(self) -> BinaryIO:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._file = os.fdopen(os.open(self._part, flags, 0o600), "wb", buffering=1 << 20)
        except OSError as error:
            raise self._failed(error) from None
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                self._appear()
        except (OSError, KvctlError) as failed:
            error = failed
        if error is None:
            return
        with suppress(OSError):
            self._part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise self._failed(error) from None
        if kind is None:
            raise error

    def _appear(self) -> None:
        """A link is refused where there is something, a rename is not. Where there are no links, looking has to do."""
        if not self._force:
            try:
                os.link(self._part, self._path, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:
                need_free(self._path, force=False)
            else:
                self._part.unlink()
                return
        self._part.replace(self._path)

    def _failed(self, error: OSError) -> KvctlError:
        if error.errno == EEXIST:
            return _taken(self._path)
        return KvctlError(Exit.REFUSED, f"{self._path} cannot be written: {error.strerror}")


def _taken(path: Path) -> KvctlError:
    return KvctlError(Exit.USAGE, f"{path} is there already; --force writes over it")
