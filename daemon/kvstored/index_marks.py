"""Small files beside the index, and how small values are sealed. No LMDB: the daemon uses these itself.

D0/lock           held by the daemon that serves from here
D0/store          magic, version, store id, checksum
D/next            a number beyond all segments of the store; the one of the first directory is exact
D0/index/last     sequence of the last commit, checksum
D0/index/doubtful if it is there, the next start believes the headers of the segments instead
D0/index/of       the directories of which it knows all that is durable there
"""

import errno
import json
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

STORE_VERSION: Final = 1  # of the store file, and so of the folders around it: another one is left alone
INDEX_VERSION: Final = 1  # of what LMDB holds: another one is made anew from headers
STORE_BYTES: Final = 16
STORE_FILE: Final = "store"
FOLDER: Final = "index"
BUILDING: Final = "index.new"
DOUBTFUL: Final = "doubtful"
OF: Final = "of"
NEXT: Final = "next"
OWED: Final = "owed-erasures"  # in the folder of state: see owed.py
LAST: Final = "last"
MAP_BYTES: Final = 1 << 30  # address space of an index; it doubles whenever it is full

NUMBERS: Final = 1 << 31  # of segments: a stranger's file with a huge one must not use them up
UNSEEN: Final = 4096  # numbers left to segments that nobody sees in this life, beyond those that are known
FILE_BYTES: Final = 4096  # far above what is written to any of them,
OF_BYTES: Final = 1 << 20  # and to a list of directories

_NOT_A_FILE: Final = (errno.ENXIO, errno.ELOOP, errno.EISDIR)  # a pipe or socket, a link, a folder
_SUM: Final = struct.Struct("<Q")
_NAME: Final = struct.Struct("<64s32s")
_LAST: Final = struct.Struct("<8sQ")
_LAST_MAGIC: Final = b"KVLAST\0\0"
_NEXT: Final = struct.Struct("<8sQ?")
_NEXT_MAGIC: Final = b"KVNEXT\0\0"
_STORE: Final = struct.Struct("<8sI16s")
_STORE_MAGIC: Final = b"KVSTORE\0"


class DamagedError(Exception):
    """The index is not what was written."""


class VersionError(Exception):
    """Written by another version of this program: to be left alone."""


def seal(value: bytes) -> bytes:
    """A small value and its checksum."""
    return value + _SUM.pack(xxhash.xxh3_64_intdigest(value))


def unseal(value: bytes) -> bytes:
    """Undo `seal`. Raises DamagedError."""
    inner = value[: -_SUM.size]
    if len(value) < _SUM.size or _SUM.unpack_from(value, len(inner)) != (xxhash.xxh3_64_intdigest(inner),):
        raise DamagedError("a checksum differs")
    return inner


def pack_name(tenant: str, digest: bytes, canonical: bytes) -> bytes:
    """The value of one namespace."""
    return seal(_NAME.pack(tenant.encode(), digest) + canonical)


def parse_name(value: bytes) -> tuple[str, bytes, bytes]:
    """Tenant, digest and canonical form of one namespace. Raises DamagedError."""
    inner = unseal(value)
    if len(inner) < _NAME.size:
        raise DamagedError("a short name")
    tenant, digest = _NAME.unpack_from(inner)
    return tenant.rstrip(b"\0").decode(errors="replace"), digest, inner[_NAME.size :]


def _open(path: Path, flags: int) -> int:
    """Only a regular file: what else lies under its name is damage, and nobody waits for a pipe.

    Raises DamagedError, OSError.
    """
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise DamagedError(f"{path.name} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedError(f"{path.name} is not a regular file")
    return fd


def _read(path: Path, most_bytes: int = FILE_BYTES) -> bytes:
    """All of a small file; of one that is larger than ours are, too little for its checksum.

    Raises DamagedError, OSError.
    """
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        return file.read(most_bytes)


def write_last(folder: Path, sequence: int) -> None:
    """Remember how far the index has come. Raises DamagedError, OSError."""
    fd = _open(folder / LAST, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, seal(_LAST.pack(_LAST_MAGIC, sequence)), 0)
    finally:
        os.close(fd)


def read_last(folder: Path) -> int:
    """How far the index has come at least. Raises DamagedError."""
    try:
        magic, sequence = _LAST.unpack(unseal(_read(folder / LAST)))
    except (OSError, struct.error) as error:
        raise DamagedError(f"the last sequence cannot be read: {error}") from error
    if magic != _LAST_MAGIC:
        raise DamagedError("the last sequence has another magic")
    return int(sequence)


def mark_doubtful(directory: Path) -> None:
    """Have the next start believe the headers: also if the index is gone now, and is put back.

    Raises OSError: FileNotFoundError where the directory is gone, which may come back with the index that it had.
    """
    folder = directory / FOLDER
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        os.close(_open(folder / DOUBTFUL, os.O_WRONLY | os.O_CREAT))
    except FileExistsError:
        return  # something else in place of the index: no index is as good as a doubtful one
    except DamagedError:
        pass  # something of that name is there, and that is enough
    sync_folder(folder)
    sync_folder(directory)


@dataclass(frozen=True, slots=True)
class Of:
    """What an index is of."""

    directories: frozenset[str]  # they were looked into: what it does not know there was never durable
    next_segment: int = 0  # former versions noted here what `NEXT` says now


def write_of(folder: Path, directories: Iterable[Path]) -> None:
    """Durable when this returns. Raises OSError."""
    looked = sorted(map(str, directories))
    known = read_of(folder)
    if known is None or known.directories != set(looked):
        write_sealed(folder / OF, json.dumps({"directories": looked}).encode())


def read_of(folder: Path) -> Of | None:
    """None if there is no such file: former versions wrote none. Of one that is damaged: no directory."""
    try:
        said = json.loads(unseal(_read(folder / OF, OF_BYTES)))
        if isinstance(said, list):  # of a former version, too
            said = {"directories": said}
        number = int(said.get("next", 0))
        return Of(frozenset(map(str, said["directories"])), number if 0 <= number < NUMBERS else 0)
    except FileNotFoundError:
        return None
    except (OSError, DamagedError, ValueError, KeyError, TypeError, AttributeError):
        return Of(frozenset())


def write_next(directory: Path, number: int, *, first: bool) -> None:
    """No segment of the store has this number or a higher one, or had. `first`: this directory is the first one, and
    hears of all that come. It only grows, and in place: a full file system takes it. Durable when this returns.

    Raises DamagedError, OSError.
    """
    fd = _open(directory / NEXT, os.O_RDWR | os.O_CREAT)
    try:
        there = os.pread(fd, FILE_BYTES, 0)
        former = _parse_next(there)
        new = seal(_NEXT.pack(_NEXT_MAGIC, max(number, former[0] if former else 0), first))
        if there == new:
            return
        os.pwrite(fd, new, 0)
        os.ftruncate(fd, len(new))
        os.fsync(fd)
    finally:
        os.close(fd)
    if not there:
        sync_folder(directory)


def read_next(directories: Sequence[Path]) -> int:
    """A number beyond all segments of the store that these directories have heard of, and those that the first ones
    may have had since, where none of them was the first. 0 if they have heard of none.
    """
    marks = []
    for directory in directories:
        with suppress(DamagedError, OSError):
            if mark := _parse_next(_read(directory / NEXT)):
                marks.append(mark)
    of = read_of(directories[0] / FOLDER)
    highest = max([number for number, _ in marks] + [of.next_segment if of else 0])
    return highest if not marks or any(first for _, first in marks) else highest + UNSEEN


def _parse_next(said: bytes) -> tuple[int, bool] | None:
    """The number, and whether it is a first directory's; None if it is not what was written."""
    try:
        magic, number, first = _NEXT.unpack(unseal(said))
    except (DamagedError, struct.error):
        return None
    return (number, first) if magic == _NEXT_MAGIC and number < NUMBERS else None


def sync_folder(folder: Path) -> None:
    """Make its entries durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_store(directory: Path) -> bytes | None:
    """The store id; None if it is missing or damaged. Raises VersionError, OSError."""
    try:
        inner = unseal(_read(directory / STORE_FILE))
        magic, version, store = _STORE.unpack(inner)
    except (FileNotFoundError, DamagedError, struct.error):
        return None
    if magic != _STORE_MAGIC:
        return None
    if version != STORE_VERSION:
        raise VersionError(f"{directory / STORE_FILE} is of version {version}, and this is version {STORE_VERSION}")
    return bytes(store)


def write_store(directory: Path, store: bytes) -> None:
    """Durable, and whole or not at all. Raises OSError."""
    assert len(store) == STORE_BYTES
    write_sealed(directory / STORE_FILE, _STORE.pack(_STORE_MAGIC, STORE_VERSION, store))


def write_sealed(path: Path, value: bytes) -> None:
    """A small value as a file, durable, and whole or not at all. Raises OSError."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # whatever it is, a pipe among others
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(seal(value))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)
