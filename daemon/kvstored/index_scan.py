"""Which segment files are there, and whose. Reads superblocks only. Any thread."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvstore.tier.format import HEADER_BYTES, FormatError, Superblock, parse_superblock, slot_offset
from kvstored.index_marks import NUMBERS, read_store, sync_folder

SEGMENTS: Final = "segments"
ASIDE_MOST: Final = 100  # copies of one file
LOOKS: Final = 2  # at a file that cannot be read: with one call that fails, all that it holds would be forgotten
_STRANGE: Final = (errno.ELOOP, errno.ENXIO, errno.ENOENT)  # a link, a socket; or it is gone

_NAME: Final = re.compile(r"([0-9]{8,10})\.seg")


@dataclass(frozen=True, slots=True)
class SegmentFile:
    """A segment of ours, and how much of it is really there."""

    superblock: Superblock
    directory: Path
    path: Path
    file_bytes: int
    written_ns: int = 0  # when it was last written to

    @property
    def counts(self) -> tuple[int, bool, int]:
        """Of two files with one number the one counts that has more of this."""
        return self.superblock.made_s, self.whole_slots == self.superblock.slots, self.written_ns

    @property
    def whole_slots(self) -> int:
        """Slots that lie inside the file: fewer than it should have if somebody cut it."""
        inside = max(0, self.file_bytes - HEADER_BYTES) // self.superblock.slot_bytes
        return min(self.superblock.slots, inside)

    def header_offset(self, slot: int) -> int:
        """Where the header of a slot is."""
        return slot_offset(self.superblock.slot_bytes, slot)


@dataclass(slots=True)
class Scan:
    """What the directories hold."""

    store: bytes | None = None  # None: neither a file says it nor a segment
    store_file: bool = True  # False: missing or damaged
    segments: dict[int, SegmentFile] = field(default_factory=dict)
    doubles: list[SegmentFile] = field(default_factory=list)  # of our store, too: newer ones have their numbers
    aside: list[Path] = field(default_factory=list)  # where such lie now
    foreign: list[Path] = field(default_factory=list)  # and those of `doubles`, under whatever name
    unread: list[Path] = field(default_factory=list)  # files of which nobody could tell in this life
    next_segment: int = 0
    unreadable: list[str] = field(default_factory=list)  # directories and files, with the reason; and absent ones
    looked: list[Path] = field(default_factory=list)  # directories of which all could be read

    def hide(self, directory: Path, why: str) -> None:
        """Not all of a directory could be read."""
        self.unreadable.append(why)
        self.looked = [other for other in self.looked if other != directory]

    def hide_double(self, double: SegmentFile, why: str) -> None:
        """Neither of two files with one number counts: what is deleted is noted of both."""
        self.hide(double.directory, f"{double.path}: {why}")
        self.foreign.remove(double.path)
        self.unread.append(double.path)
        newer = self.segments.pop(double.superblock.segment, None)
        if newer is not None:
            self.unread.append(newer.path)
            self.hide(newer.directory, f"{newer.path}: {double.path} has its number")


def scan(directories: Sequence[Path], absent: Mapping[Path, str] | None = None) -> Scan:
    """Look at all superblocks. Where the store id is lost, most of them have it. `absent`: directories to stay out of,
    with the reason; not the first. Raises VersionError, OSError.
    """
    found = Scan(read_store(directories[0]), looked=[*directories])
    found.store_file = found.store is not None
    ours: list[SegmentFile] = []
    for directory, path in _files(directories, found, absent or {}):
        segment = _look(directory, path, found)
        if segment is not None:
            ours.append(segment)
        elif path not in found.unread[-1:]:
            found.foreign.append(path)
    if found.store is None and ours:
        found.store = Counter(segment.superblock.store for segment in ours).most_common(1)[0][0]
    _choose(found, ours)
    return found


def set_aside_doubles(found: Scan) -> None:
    """Of two files with one number rename the one that does not count: it would be back, with all that was deleted
    meanwhile, in a life without the other. What is in it stays, for who knows better. Changes what lies on disk.
    """
    for double in found.doubles:
        other = found.segments.get(double.superblock.segment)
        try:
            if other is not None and double.path.samefile(other.path):
                continue  # one file, by two ways
            aside = _free_name(double.path)
            double.path.rename(aside)
            if other is not None and not os.path.lexists(other.path):  # one file, by two mounts that hide it
                aside.rename(double.path)
                continue
            sync_folder(double.path.parent)
        except OSError as error:
            found.hide_double(double, f"another file has its number, and it cannot be renamed: {error.strerror}")
        else:
            found.aside.append(aside)
            found.foreign[found.foreign.index(double.path)] = aside


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.double{count}") for count in ("", *map(str, range(2, ASIDE_MOST))))
    return next((name for name in names if not os.path.lexists(name)), path.with_name(f"{path.name}.double"))


def scan_names(directories: Sequence[Path], absent: Mapping[Path, str] | None = None) -> Scan:
    """Look into no file: all of them are somebody else's. `absent` as for `scan`."""
    found = Scan(looked=[*directories])
    found.foreign = sorted(path for _, path in _files(directories, found, absent or {}))
    return found


def segment_number(path: Path) -> int:
    """The number in a file's name; -1 if it has none that counts."""
    match = _NAME.fullmatch(path.name)
    number = int(match[1]) if match else -1
    return number if number < NUMBERS else -1


def _files(directories: Sequence[Path], found: Scan, absent: Mapping[Path, str]) -> Iterator[tuple[Path, Path]]:
    for directory in directories:
        if directory in absent:
            found.hide(directory, f"{directory}: {absent[directory]}")
            continue
        try:
            paths = sorted((directory / SEGMENTS).iterdir())
        except FileNotFoundError:
            paths = []
        except OSError as error:
            found.hide(directory, f"{directory}: {error.strerror}")
            continue
        for path in paths:
            found.next_segment = max(found.next_segment, segment_number(path) + 1)
            yield directory, path


def _look(directory: Path, path: Path, found: Scan) -> SegmentFile | None:
    """None: not a segment of this version under its own name; or it cannot be read, and the next life may see it."""
    for turn in range(LOOKS):
        try:
            return _look_once(directory, path)
        except OSError as error:
            if turn == LOOKS - 1 and error.errno not in _STRANGE and segment_number(path) >= 0:
                found.hide(directory, f"{path}: {error.strerror}")
                found.unread.append(path)
    return None


def _look_once(directory: Path, path: Path) -> SegmentFile | None:
    """Raises OSError."""
    # A pipe or a device of that name must not hold the start up.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        superblock = parse_superblock(os.pread(fd, HEADER_BYTES, 0))
    except FormatError:
        return None
    finally:
        os.close(fd)
    if path.name != f"{superblock.segment:08d}.seg":
        return None
    return SegmentFile(superblock, directory, path, status.st_size, status.st_mtime_ns)


def _choose(found: Scan, ours: list[SegmentFile]) -> None:
    """Of two files with one number one counts (`SegmentFile.counts`), else the first; other stores' do not."""
    for segment in ours:
        number = segment.superblock.segment
        other = found.segments.get(number)
        if segment.superblock.store != found.store:
            found.foreign.append(segment.path)
        elif other is None:
            found.segments[number] = segment
        elif segment.counts > other.counts:
            found.doubles.append(other)
            found.segments[number] = segment
        else:
            found.doubles.append(segment)
    found.segments = dict(sorted(found.segments.items()))
    found.foreign = sorted([*found.foreign, *(double.path for double in found.doubles)])
