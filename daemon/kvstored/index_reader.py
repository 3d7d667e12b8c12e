"""The start of the index child, in a process that ends with it: read the index, or make it anew.

Everything LMDB says is checked; damage that kills this process is an exit code to the one that waits for it.
"""

import json
import os
import resource
import secrets
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import lmdb
import numpy as np

from kvstore.tier.format import CHUNK_SLOTS, RECORD, FormatError, open_chunk
from kvstored import index_wire
from kvstored.index_file import IndexFile, entry_hash, open_index
from kvstored.index_marks import (
    DOUBTFUL,
    FOLDER,
    STORE_BYTES,
    UNSEEN,
    DamagedError,
    Of,
    VersionError,
    parse_name,
    read_last,
    read_next,
    read_of,
    read_store,
    write_next,
    write_of,
    write_store,
)
from kvstored.index_owed import carry_out, leave_out
from kvstored.index_rebuild import Records, collect, doubled, erase_headers, padded_slots, remove_index, write_index
from kvstored.index_scan import SEGMENTS, Scan, scan, set_aside_doubles
from kvstored.index_wire import CHUNK_KEY, NAME_KEY, Change, Kind, Message
from kvstored.owed import note_life

READ_CPU_S: Final = 60.0  # 1,000,000 records take 0.1 s: whoever needs this much walks in circles
PROGRESS_S: Final = 0.1


@dataclass(slots=True)
class Contents:
    """What goes to the daemon beside the records."""

    names: dict[int, tuple[str, bytes, bytes]]  # tenant, digest, canonical form
    highest: int  # generation
    dropped: int  # records that are no use: of a segment that is gone, or beyond the end of its file
    rebuilt: str = ""
    unwritten: str = ""  # why there is no index file in spite of all
    closed: Sequence[int] = ()  # segments that could not be read
    unseen: dict[int, str] = field(default_factory=dict)  # see `Loaded`
    seen: set[int] = field(default_factory=set)  # segments that the index knows and that are there


class Target:
    """The memfd that goes to the daemon: records of all segments, each in whole chunks, then JSON."""

    def __init__(self, found: Scan) -> None:
        """Raises OSError."""
        self.offsets: dict[int, int] = {}
        self.record_bytes = 0
        for number, segment in found.segments.items():
            self.offsets[number] = self.record_bytes
            self.record_bytes += padded_slots(segment.superblock.slots) * RECORD.itemsize
        self.fd = os.memfd_create("kvstored-index", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.record_bytes)
        self._found = found
        self.clear()

    def clear(self) -> None:
        """Back to zeros."""
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, self.record_bytes)
        path = f"/proc/self/fd/{self.fd}"
        self.all: Records = np.memmap(path, RECORD, "r+") if self.record_bytes else np.zeros(0, RECORD)
        self.records: dict[int, Records] = {}
        for number, offset in self.offsets.items():
            first = offset // RECORD.itemsize
            slots = padded_slots(self._found.segments[number].superblock.slots)
            self.records[number] = self.all[first : first + slots].view(np.ndarray)

    def finish(self, contents: Contents) -> Message:
        """LOADED."""
        assert self._found.store is not None
        head = {
            "store": self._found.store.hex(),
            "segments": [
                {
                    "segment": number,
                    "directory": str(segment.directory),
                    "slot_bytes": segment.superblock.slot_bytes,
                    "slots": segment.superblock.slots,
                    "tenant": segment.superblock.tenant,
                    "key": segment.superblock.key_id.hex(),
                    "offset": self.offsets[number],
                }
                for number, segment in self._found.segments.items()
            ],
            "names": [
                {"number": number, "tenant": tenant, "digest": digest.hex(), "canonical": canonical.hex()}
                for number, (tenant, digest, canonical) in contents.names.items()
            ],
            "highest_generation": contents.highest,
            "next_segment": self._found.next_segment,
            "foreign": [os.fsdecode(path) for path in self._found.foreign],
            "unread": [os.fsdecode(path) for path in self._found.unread],
            "unreadable": self._found.unreadable,
            "looked": [str(path) for path in self._found.looked],
            "aside": [os.fsdecode(path) for path in self._found.aside],
            "rebuilt": contents.rebuilt,
            "unwritten": contents.unwritten,
            "closed": list(contents.closed),
            "unseen": list(contents.unseen.items()),
            "dropped": contents.dropped,
        }
        packed = json.dumps(head).encode()
        os.pwrite(self.fd, packed, self.record_bytes)
        return Message(Kind.LOADED, self.record_bytes, len(packed), fd=self.fd)


def load(
    link: socket.socket, directories: Sequence[Path], absent: Mapping[Path, str], rebuild: str, map_bytes: int,
    owed: Path | None, *, look: bool,
) -> None:  # fmt: skip
    """Send LOADED, or FAILED. `absent`: directories to stay out of, with the reason; not the first. `rebuild`: why the
    index is not to be believed. `owed`: file of what is to be left out. `look`: change nothing on disk.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    there = [directory for directory in directories if directory not in absent]
    try:
        if not look:
            for directory in there:
                _make_folder(directory)
        found = scan(directories, absent)
        if not look:
            set_aside_doubles(found)
        of = read_of(directories[0] / FOLDER)
        found.next_segment = max(found.next_segment, read_next(there))
        erased, unfit = carry_out(owed, found) if owed and not look else (set(), [])
        target = Target(found)
        reason = rebuild or _doubt(there, found)
        contents = None
        if not reason:
            contents, reason = _try(directories[0], found, target, of, map_bytes)
        if contents is None and look:
            index_wire.send(link, Message(Kind.FAILED, text=reason))
            return
        _begin_store(found)
        anew = contents is None
        if contents is None:
            contents = _rebuild(link, directories[0], found, target, reason, map_bytes)
        contents.dropped += leave_out(erased, target.records)
        contents.closed = [*contents.closed, *unfit]
        if not (anew or look):
            _forget_doubled(target.records, contents.closed)
        noted = look or _note(there, directories, found, None if anew else of)
        if absent or (found.unreadable and contents.rebuilt):  # the index lacks what was never committed, or all there
            found.next_segment += UNSEEN
        if not look:
            _conclude(there[1:] if anew else [], found, owed)
    except (VersionError, DamagedError, OSError) as error:
        number = error.errno or 0 if isinstance(error, OSError) else 0
        index_wire.send(link, Message(Kind.FAILED, number, text=str(error)))
        return
    if not look and noted and contents.dropped and not contents.rebuilt and not found.unreadable:
        _forget(directories[0], found, map_bytes)
    index_wire.send(link, target.finish(contents))


def _forget_doubled(records: Mapping[int, Records], closed: Sequence[int]) -> None:
    """A block has one place. What lies in a slot without a record is erased, and then the index forgets it; what
    continues the block there finds it by its generation.
    """
    for number, slots in doubled(records, closed).items():
        records[number][slots] = np.zeros((), RECORD)


def _begin_store(found: Scan) -> None:
    """There is a store from now on. Raises OSError where one may be that nobody sees: it would be a stranger's."""
    if found.store is None:
        if found.unreadable:
            raise OSError(f"no store is begun while there may be one already: {found.unreadable[0]}")
        found.store = secrets.token_bytes(STORE_BYTES)


def _note(there: Sequence[Path], directories: Sequence[Path], found: Scan, of: Of | None) -> bool:
    """Say which directories the index is of, and numbers of segments, before it forgets any. Whether that could be.

    `of`: what the index was of, unless it has been made anew.
    """
    known = found.looked
    if of:  # it keeps what it knows of those that are not seen
        known = [each for each in directories if each in found.looked or str(each) in of.directories]
    for other in there[1:]:
        with suppress(DamagedError, OSError):
            write_next(other, found.next_segment, first=False)
    try:
        write_next(there[0], found.next_segment, first=True)
        if (there[0] / FOLDER).is_dir():  # it could be made
            write_of(there[0] / FOLDER, known)
    except (DamagedError, OSError):
        return False
    return True


def _conclude(read: Sequence[Path], found: Scan, owed: Path | None) -> None:
    """Nothing is to be done a second time by the next start. `read`: directories, but for the first one, that the index
    was made anew from: none there counts any more. Raises DamagedError, OSError.
    """
    if owed:
        note_life(owed, found.next_segment)
    for other in read:
        with suppress(OSError):  # or the next start makes its own anew, once more
            if other in found.looked and _has_index(other, found.store):
                remove_index(other)


def _make_folder(directory: Path) -> None:
    with suppress(OSError):  # the scan says what is wrong with it
        (directory / SEGMENTS).mkdir(mode=0o700, parents=True, exist_ok=True)


def _doubt(directories: Sequence[Path], found: Scan) -> str:
    """Why not to look into the index at all; empty if there is no reason."""
    directory = directories[0]
    for other in directories[1:]:
        with suppress(OSError):  # it fails: the scan has said so, and the others go on
            if _has_index(other, found.store):
                return f"{other} has one, too: it was the first directory since"
    if os.path.lexists(directory / FOLDER / DOUBTFUL):
        return "a former daemon left the index in doubt"
    if not found.store_file:
        return "the store file is missing or damaged"
    if not (directory / FOLDER / "data.mdb").exists():
        return "there is no index"
    return ""


def _has_index(other: Path, store: bytes | None) -> bool:
    """An index of our store, or a mark of doubt alone. It is of a life in which that directory was the first one: a
    start with another first one removes it. Raises OSError.
    """
    try:
        return (other / FOLDER).is_dir() and read_store(other) in {None, store}
    except VersionError:
        return False


def _try(
    directory: Path, found: Scan, target: Target, of: Of | None, map_bytes: int
) -> tuple[Contents | None, str]:  # fmt: skip
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, READ_CPU_S)
    try:
        with open_index(directory / FOLDER, map_bytes) as index:
            contents = _read(index, directory / FOLDER, found, target)
    except (DamagedError, FormatError, lmdb.Error, OSError, ValueError, OverflowError) as error:
        target.clear()
        return None, f"the index is damaged: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    reason = _returned(found, contents.seen, of)
    if reason:
        target.clear()
        return None, reason
    return contents, ""


def _returned(found: Scan, seen: set[int], of: Of | None) -> str:
    """Why an index is not enough: segments of which it knows nothing lie where it has not looked. Empty if none do.

    Elsewhere such a segment was made after the last commit, and nothing that it holds was durable.
    """
    for number, segment in found.segments.items():
        if of is not None and number not in seen and str(segment.directory) not in of.directories:
            return f"it does not know what lies in {segment.directory}, which was not on the list"
    return ""


def _read(index: IndexFile, folder: Path, found: Scan, target: Target) -> Contents:
    """Raises DamagedError, FormatError, lmdb.Error."""
    at_least = read_last(folder)
    with index.env.begin() as plain:
        state = index.state(plain)
    if state.store != found.store:
        raise DamagedError("it belongs to another store")
    if state.sequence < at_least:
        raise DamagedError(f"it is at transaction {state.sequence} and was at {at_least}")
    names: dict[int, tuple[str, bytes, bytes]] = {}
    digest = 0
    with index.env.begin(buffers=True) as txn, txn.cursor(db=index.names) as cursor:
        for view, value in cursor:
            key = bytes(view)
            names[NAME_KEY.unpack(key)[0]] = parse_name(bytes(value))
            digest ^= entry_hash(key, value)
            if len(names) > state.names:
                raise DamagedError("too many names")
    unseen: dict[int, int] = {}
    seen: set[int] = set()
    chunks, dropped, highest_segment, chunk_digest = _read_chunks(index, state.chunks, target, unseen, seen)
    dropped = 0 if found.unreadable else dropped  # or they are of use again
    if (chunks, len(names), digest ^ chunk_digest) != (state.chunks, state.names, state.digest):
        raise DamagedError("entries are missing, or others are there")
    found.next_segment = max(found.next_segment, highest_segment + 1)
    highest = state.highest
    for number, records in target.records.items():
        segment = found.segments[number]
        beyond = records["generation"][segment.whole_slots :] != 0
        dropped += int(np.count_nonzero(beyond))
        records[segment.whole_slots :] = np.zeros((), RECORD)
        _check_names(records, names, segment.superblock.tenant)
    owners = {segment: names[number][0] if number in names else "" for segment, number in unseen.items()}
    return Contents(names, highest, dropped, unseen=owners if found.unreadable else {}, seen=seen)


def _read_chunks(
    index: IndexFile, most: int, target: Target, unseen: dict[int, int], seen: set[int]
) -> tuple[int, int, int, int]:  # fmt: skip
    """Copy all chunks into the target: how many, records of unknown segments, highest segment, digest. `unseen`: takes
    these segments, each with the number of a namespace there, 0 if it has no blocks; `seen` the others.
    """
    into = target.all.view(np.uint8).data if target.record_bytes else memoryview(bytearray())
    places = {number: (offset, len(target.records[number])) for number, offset in target.offsets.items()}
    chunk_bytes = CHUNK_SLOTS * RECORD.itemsize
    chunks = dropped = digest = 0
    segment = -1
    last = b""
    with index.env.begin(buffers=True) as txn, txn.cursor(db=index.chunks) as cursor:
        for view, value in cursor:
            key = bytes(view)
            chunks += 1
            if key <= last or chunks > most:
                raise DamagedError("its keys are out of order")
            last = key
            records = open_chunk(value)
            digest ^= entry_hash(key, value)
            segment, chunk = CHUNK_KEY.unpack(key)
            offset, slots = places.get(segment, (0, 0))
            if not slots:
                lost = np.frombuffer(records, RECORD)
                used = np.flatnonzero(lost["generation"])
                dropped += used.size
                unseen[segment] = int(lost["namespace"][used[0]]) if used.size else unseen.get(segment, 0)
            elif chunk * CHUNK_SLOTS >= slots:
                raise DamagedError(f"segment {segment} has no chunk {chunk}")
            else:
                seen.add(segment)
                start = offset + chunk * chunk_bytes
                into[start : start + chunk_bytes] = records
    return chunks, dropped, segment, digest


def _check_names(records: Records, names: dict[int, tuple[str, bytes, bytes]], tenant: str) -> None:
    used = records["generation"] != 0
    for number in np.unique(records["namespace"][used]).tolist():
        if number not in names or names[number][0] != tenant:
            raise DamagedError(f"namespace {number} is not one of {tenant}")


def _rebuild(
    link: socket.socket, directory: Path, found: Scan, target: Target, reason: str, map_bytes: int
) -> Contents:
    told_s = 0.0

    def progress(read: int, slots: int) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= PROGRESS_S:
            told_s = now_s
            index_wire.send(link, Message(Kind.PROGRESS, min(read, slots), slots))

    assert found.store is not None
    fresh = not found.segments and not (directory / FOLDER).exists()
    collected = collect(found.segments, target.records, progress)
    collected.unseen = bool(found.unreadable)
    unwritten = ""
    with suppress(DamagedError, OSError):  # it is for those that are gone
        write_next(directory, found.next_segment, first=True)
    try:
        for number, slots in collected.superseded.items():  # or they would come back once the newer one is erased
            erase_headers(found.segments[number], slots)
        remove_index(directory)  # before the store file: an index never stands beside an id that it was not made for
        write_store(directory, found.store)
        write_index(directory, found.store, collected, map_bytes, found.looked)
    except (lmdb.Error, OSError) as error:
        unwritten = f"the index cannot be written: {error}"
    names = {
        number: (tenant, digest, collected.canonical[number]) for (tenant, digest), number in collected.numbers.items()
    }
    highest = collected.highest()
    if collected.partial:  # past every generation that there can be
        highest = max(highest, time.time_ns() // 1000)
    return Contents(names, highest, collected.damaged, "" if fresh else reason, unwritten, collected.closed)


def _forget(directory: Path, found: Scan, map_bytes: int) -> None:
    """Remove what the index says of segments that are gone: their numbers will be given again."""
    try:
        with open_index(directory / FOLDER, map_bytes) as index:
            with index.env.begin() as txn, txn.cursor(db=index.chunks) as cursor:
                there = {CHUNK_KEY.unpack(key)[0] for key in cursor.iternext(keys=True, values=False)}
            gone = sorted(there - found.segments.keys())
            if gone:
                index.write(Change(dropped=gone))
    except (lmdb.Error, DamagedError, OSError):
        pass  # the numbers are past them in any case, and the next start tries again
