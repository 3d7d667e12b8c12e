"""System calls on segment files, in one small class so that a test can make any of them fail, stop short or hang."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from kvproto.limits import MIB

# Payload of a run of slots at most; 2, 4 and 8 MiB are equally fast with 4 readers (bench/drive_depth.py). A call takes
# more, so that a run and its headers, and a block of 8 MiB with its own, are still one.
RUN_BYTES: Final = 8 * MIB
CALL_BYTES: Final = 16 * MIB
BUFFERS_PER_CALL: Final = 1024  # IOV_MAX of Linux
RUN_SLOTS: Final = BUFFERS_PER_CALL // 2  # a header and a payload each

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700

Transfer = Callable[[int, Sequence[memoryview], int], int]


class Files:
    """The real thing. Any thread; every method raises OSError and releases the GIL."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor; never through a symbolic link, and never waiting for the other end of a pipe."""
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, FILE_MODE)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def pread(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill `buffers` from `offset` on; how many bytes came."""
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write `buffers` from `offset` on; how many bytes went."""
        return os.pwritev(fd, buffers, offset)

    def file_bytes(self, fd: int) -> int:
        """How long a file is now."""
        return os.fstat(fd).st_size

    def fallocate(self, fd: int, file_bytes: int) -> None:
        """Have the file system set these bytes aside."""
        os.posix_fallocate(fd, 0, file_bytes)

    def fdatasync(self, fd: int) -> None:
        """Wait until what was written is durable, with the length of the file."""
        os.fdatasync(fd)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def make_folder(self, path: Path) -> None:
        """Make a folder if there is none; what it lies in must be there."""
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)

    def names(self, path: Path) -> list[str]:
        """The names in a folder."""
        return os.listdir(path)  # noqa: PTH208  names are wanted, not paths

    def exists(self, path: Path) -> bool:
        """Is there anything of that name?"""
        try:
            path.lstat()
        except FileNotFoundError:
            return False
        return True

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name; a file that has it already is gone."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def identity(self, path: Path) -> tuple[int, int]:
        """What tells a folder from another of the same name."""
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        return found.st_dev, found.st_ino

    def space(self, path: Path) -> tuple[int, int]:
        """Free bytes and bytes in all of the file system."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def transfer(call: Transfer, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Move all of `buffers` in as few calls as may be; the bytes moved. Raises OSError, also if fewer came."""
    moved_bytes = 0
    for part in _parts(buffers):
        part_bytes = sum(map(len, part))
        came_bytes = call(fd, part, offset + moved_bytes)
        if came_bytes != part_bytes:
            raise OSError(errno.EIO, f"{came_bytes} of {part_bytes} bytes")
        moved_bytes += part_bytes
    return moved_bytes


def _parts(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    part: list[memoryview] = []
    room = CALL_BYTES
    for buffer in buffers:
        left = buffer
        while left:
            part.append(left[:room])
            room -= len(part[-1])
            left = left[len(part[-1]) :]
            if not room or len(part) == BUFFERS_PER_CALL:
                yield part
                part, room = [], CALL_BYTES
    if part:
        yield part
