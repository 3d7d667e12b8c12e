"""Segment files: made, opened, kept open while somebody reads, and removed.

    .new:  made, set aside, superblock written and synced ---renamed, folder synced---> .seg

So a `.seg` file is whole. Files that do not bear the superblock of this store are never opened for blocks, overwritten
or removed.
"""

import errno
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from kvkernels.aligned import aligned
from kvproto.limits import PAGE_BYTES
from kvstore.tier.format import FormatError, Superblock, pack_superblock, parse_superblock
from kvstored.drive_files import Files, transfer
from kvstored.drive_health import Directory, DriveState
from kvstored.drive_keys import BlockCipher, StoreKeys

# Nothing there, a symbolic link, a folder, a pipe, a socket.
_NO_FILE: Final = {errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ESPIPE, errno.ENXIO}
OPENING_S: Final = 0.1  # whoever has a segment for longer waits for its drive
_UNFINISHED: Final = re.compile(r"[0-9]{8}\.new")


class SegmentGoneError(Exception):
    """There is no such segment (any more)."""


class Segment:
    """One segment file. `opened` and `sync` on any thread; `make` and `remove` on one at a time."""

    def __init__(
        self, number: int, directory: Directory, store: bytes, segment_bytes: int, keys: StoreKeys | None = None
    ) -> None:
        """The file is opened when it is first needed. With `keys` it must be encrypted with one of them."""
        self.number = number
        self.directory = directory
        self.slot_bytes = 0  # known when it is open
        self.slots = 0
        self.cipher: BlockCipher | None = None  # of its payloads
        self.doubtful = False  # a sync failed, and `Drives.sync` has not been told
        self._store = store
        self._segment_bytes = segment_bytes
        self._keys = keys
        self._files = directory.files
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._fd = -1
        self._read_only = False
        self._uses = 0
        self._dropped = False

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory.folder / f"{self.number:08d}.seg"

    @property
    def dropped(self) -> bool:
        """Was it dropped, or lost?"""
        return self._dropped

    def holds(self, slot: int, slot_bytes: int) -> bool:
        """Is there a slot of that number and size? Once it is open."""
        return slot_bytes == self.slot_bytes and 0 <= slot < self.slots

    @contextmanager
    def opened(self, *, writing: bool = False) -> Iterator[int]:
        """Its descriptor, which stays valid inside the block. Raises OSError, SegmentGoneError."""
        with self._lock:
            if self._dropped or self.directory.state is DriveState.GONE:
                raise SegmentGoneError
            if writing and self._read_only:
                self._reopen()
            if self._fd < 0:
                self._open()
            self._uses += 1
            fd = self._fd
        try:
            yield fd
        finally:
            with self._lock:
                self._uses -= 1
                self._close_if_idle()

    def drop(self) -> None:
        """Let no new user in, and close it when the last is out. Does not wait for a drive that hangs."""
        self._dropped = True
        if self._lock.acquire(timeout=OPENING_S):
            try:
                self._close_if_idle()
            finally:
                self._lock.release()
        # else somebody opens it, and closes it again

    def sync(self) -> bool:
        """Make durable what was written; False if that failed now or since the last time."""
        if self._fd < 0 and not self.doubtful:
            return not self._dropped  # never opened: nothing was written
        try:
            with self.opened() as fd:
                return self._sync(fd)
        except OSError as error:  # it could not be opened
            self.directory.failed("fdatasync", error)
            return False
        except SegmentGoneError:
            return False

    def _sync(self, fd: int) -> bool:
        with self._syncing:
            try:
                self._files.fdatasync(fd)
            except OSError as error:
                self.directory.failed("fdatasync", error)
                self.doubtful = True
            sound, self.doubtful = not self.doubtful, False
        return sound

    def sync_erased(self, fd: int) -> None:
        """Make durable what was erased; `sync` will know if that fails. Raises OSError."""
        with self._syncing:  # or a sync between the failure and its being noted would succeed, and know nothing
            try:
                self._files.fdatasync(fd)
            except OSError:
                self.doubtful = True
                raise

    def make(self, slot_bytes: int, tenant: str) -> None:
        """Set the file aside and give it its superblock, durably. Raises OSError, and then nothing is left of it."""
        files, unfinished = self._files, self.path.with_suffix(".new")
        for path in (self.path, unfinished):
            if self._files.exists(path):
                self._clear(path)
        cipher = self._keys.newest if self._keys else None
        superblock = Superblock(
            self.number, self._segment_bytes, slot_bytes, int(time.time()), self._store, tenant,
            cipher.id if cipher else b"",
        )  # fmt: skip
        page = aligned(PAGE_BYTES).data
        page[:] = pack_superblock(superblock)
        fd = files.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | self._direct())
        try:
            files.fallocate(fd, self._segment_bytes)
            transfer(files.pwrite, fd, [page], 0)
            files.fdatasync(fd)
            files.rename(unfinished, self.path)
            files.sync_folder(self.directory.folder)
        except OSError:
            files.close(fd)
            for path in (unfinished, self.path):
                with suppress(OSError):
                    files.unlink(path)
            raise
        with self._lock:
            self._fd, self.slot_bytes, self.slots, self.cipher = fd, slot_bytes, superblock.slots, cipher

    def remove(self) -> None:
        """Remove the file, if it is ours. Raises OSError."""
        if belongs(self._files, self.path, self._store):
            self._files.unlink(self.path)
            self._files.sync_folder(self.directory.folder)
        self.drop()

    def _clear(self, path: Path) -> None:
        if not belongs(self._files, path, self._store):
            raise FileExistsError(errno.EEXIST, "somebody else's file is in the way", str(path))
        self._files.unlink(path)

    def _direct(self) -> int:
        return os.O_DIRECT if self.directory.direct else 0

    def _open(self) -> None:
        try:
            fd, read_only = self._open_file()
        except FileNotFoundError as error:
            self.directory.found_stranger(self.number, error)
            raise SegmentGoneError from error
        try:
            superblock = self._read_superblock(fd)
            self.cipher = self._cipher_of(superblock)
        except FormatError as error:
            self._files.close(fd)
            self.directory.found_stranger(self.number, error)
            raise SegmentGoneError from error
        except OSError:
            self._files.close(fd)
            raise
        self._fd, self._read_only = fd, read_only
        self.slot_bytes, self.slots = superblock.slot_bytes, superblock.slots

    def _open_file(self) -> tuple[int, bool]:
        """A descriptor, and whether it is for reading only: on a file system that turned so, blocks can be read."""
        for access, direct in ((os.O_RDWR, self._direct()), (os.O_RDWR, 0), (os.O_RDONLY, self._direct())):
            try:
                return self._files.open(self.path, access | direct), access == os.O_RDONLY
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EROFS):
                    raise
        return self._files.open(self.path, os.O_RDONLY), True

    def _read_superblock(self, fd: int) -> Superblock:
        page = aligned(PAGE_BYTES).data
        transfer(self._files.pread, fd, [page], 0)
        superblock = parse_superblock(page)
        if (superblock.store, superblock.segment, superblock.segment_bytes) != (
            self._store, self.number, self._segment_bytes,
        ):  # fmt: skip
            raise FormatError(f"{self.path} is segment {superblock.segment} of another store or size")
        return superblock

    def _cipher_of(self, superblock: Superblock) -> BlockCipher | None:
        """Raises FormatError: nothing is read without the key, nothing is written without one that is wanted."""
        known: Mapping[bytes, BlockCipher | None] = self._keys.by_id if self._keys else {b"": None}
        if superblock.key_id not in known:
            raise FormatError(f"{self.path} is {said_of(superblock.key_id)}")
        return known[superblock.key_id]

    def _reopen(self) -> None:
        """It was opened for reading only: try again, unless somebody reads."""
        if self._uses:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))
        self._files.close(self._fd)
        self._fd = -1
        self._open()
        if self._read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))

    def _close_if_idle(self) -> None:
        if self._dropped and not self._uses and self._fd >= 0:
            self._files.close(self._fd)
            self._fd = -1


def said_of(key_id: bytes) -> str:
    """How a segment is encrypted, in words."""
    return f"encrypted with the key {key_id.hex()[:12]}" if key_id else "not encrypted"


def belongs(files: Files, path: Path, store: bytes) -> bool:
    """Is this a segment file of this store, or one that was not finished? Raises OSError if that cannot be read."""
    page = bytearray(PAGE_BYTES)
    try:
        fd = files.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise
    try:
        read_bytes = files.pread(fd, [memoryview(page)], 0)
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise
    finally:
        files.close(fd)
    if path.suffix == ".new" and not any(page):
        return True
    try:
        return read_bytes == PAGE_BYTES and parse_superblock(page).store == store
    except FormatError:
        return False


def remove_unfinished(files: Files, folder: Path, store: bytes) -> None:
    """Remove what a daemon that died while it made a segment left behind. Raises OSError."""
    for name in files.names(folder):
        if _UNFINISHED.fullmatch(name) and belongs(files, folder / name, store):
            files.unlink(folder / name)
