"""The index made anew from what lies on disk: the header of every slot of every segment.

Reading is a matter of many small reads in flight; a few threads do that while this one parses.
"""

import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import lmdb
import numpy as np

from kvproto.limits import PAGE_BYTES
from kvstore.tier.format import (
    CHUNK_SLOTS,
    HEADER_BYTES,
    RECORD,
    UNREAD,
    FormatError,
    Header,
    parse_header,
    seal_chunk,
    stored_slot_bytes,
)
from kvstored.index_file import IndexFile
from kvstored.index_marks import BUILDING, DOUBTFUL, FOLDER, LAST, pack_name, sync_folder, write_of
from kvstored.index_scan import LOOKS, SegmentFile
from kvstored.index_wire import CHUNK_KEY, NAME_KEY, Change

READERS: Final = 8
STEP_SLOTS: Final = 128
CHUNKS_PER_COMMIT: Final = 1000
WHOLE: Final = -1  # in place of a slot: all of a segment

Records = np.ndarray[tuple[int], np.dtype[np.void]]
Slots = np.ndarray[Any, np.dtype[np.intp]]
Slot = tuple[int, Header | str | OSError]  # its number, and its header, why there is none, or why nobody knows

_EMPTY: Final = bytes(HEADER_BYTES)
_RECORD: Final = struct.Struct("<32sQQQIIII")
assert _RECORD.size == RECORD.itemsize


@dataclass(slots=True)
class Collected:
    """What headers say, in the form of the index."""

    records: dict[int, Records]  # of each segment, whole chunks
    numbers: dict[tuple[str, bytes], int] = field(default_factory=dict)  # tenant, digest -> number
    canonical: dict[int, bytes] = field(default_factory=dict)
    superseded: dict[int, list[int]] = field(default_factory=dict)  # slots of each segment
    damaged: int = 0  # pages that are neither empty nor a header in its place
    closed: list[int] = field(default_factory=list)  # segments that could not be opened or synced
    unread: int = 0  # slots whose header could not be read
    unseen: bool = False  # a directory could not be looked into

    def put(self, segment: SegmentFile, header: Header) -> None:
        """Enter one block."""
        number = self.numbers.setdefault((header.tenant, header.digest), len(self.numbers) + 1)
        if not self.canonical.get(number):
            self.canonical[number] = header.identity
        _RECORD.pack_into(
            self.records[header.segment].data, header.slot * RECORD.itemsize,
            header.key, header.generation, header.parent_generation, header.checksum, header.parent_segment,
            header.parent_slot, number, min(segment.superblock.made_s, 0xFFFFFFFF),
        )  # fmt: skip

    def cannot_read(self, segment: SegmentFile, slot: int) -> None:
        """What lies there may be durable: only the next start may know."""
        if slot == WHOLE:
            self.closed.append(segment.superblock.segment)
        else:
            self.records[segment.superblock.segment]["namespace"][slot] = UNREAD
            self.unread += 1

    @property
    def partial(self) -> bool:
        """Is there more than could be read?"""
        return bool(self.closed or self.unread or self.unseen)

    def highest(self) -> int:
        """Of all generations that are mentioned."""
        return max((_highest(records) for records in self.records.values()), default=0)


def padded_slots(slots: int) -> int:
    """Whole chunks."""
    return -(-slots // CHUNK_SLOTS) * CHUNK_SLOTS


def collect(
    segments: Mapping[int, SegmentFile], records: dict[int, Records], progress: Callable[[int, int], None]
) -> Collected:
    """Fill `records` from headers; of two blocks with one key the one of the higher generation stays."""
    collected = Collected(records)
    slots = sum(segment.whole_slots for segment in segments.values())
    for segment, read, found in read_headers(segments):
        progress(read, slots)
        for slot, header in found:
            if isinstance(header, Header):
                collected.put(segment, header)
            elif isinstance(header, OSError):
                collected.cannot_read(segment, slot)
            else:
                collected.damaged += 1
    for number, old in superseded(records).items():
        records[number][old] = np.zeros((), RECORD)
        collected.superseded[number] = old.tolist()
    return collected


def read_headers(segments: Mapping[int, SegmentFile]) -> Iterator[tuple[SegmentFile, int, list[Slot]]]:
    """Every slot that is not empty: its header, or why it has none; with how many slots have been read until then. Of a
    segment that cannot be read the error, for slot WHOLE.
    """
    read = 0
    with ThreadPoolExecutor(READERS) as pool:
        for segment in segments.values():
            try:
                fd = _open_synced(segment.path)
            except OSError as error:
                yield segment, read, [(WHOLE, error)]
                continue
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
                steps = range(0, segment.whole_slots, STEP_SLOTS)
                flying: deque[Future[list[Slot]]] = deque()
                for start in steps:
                    if len(flying) == 2 * READERS:
                        found = flying.popleft().result()
                        read += STEP_SLOTS
                        yield segment, read, found
                    flying.append(pool.submit(_read_step, fd, segment, start))
                for step in flying:
                    found = step.result()
                    read += STEP_SLOTS
                    yield segment, read, found
                read -= len(steps) * STEP_SLOTS - segment.whole_slots
            finally:
                os.close(fd)


def _open_synced(path: Path) -> int:
    """A former life may have died before it synced, and what is found here is called durable. Raises OSError."""
    for look in range(1, LOOKS + 1):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            if look == LOOKS:
                raise
            continue
        try:
            os.fsync(fd)
        except OSError:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what was lost on its way to the drive is not believed
            os.close(fd)
            if look == LOOKS:
                raise
        else:
            return fd
    raise AssertionError("the last look raises")


def _read_step(fd: int, segment: SegmentFile, start: int) -> list[Slot]:
    page = bytearray(PAGE_BYTES)
    found: list[Slot] = []
    for slot in range(start, min(start + STEP_SLOTS, segment.whole_slots)):
        try:
            if _read_page(fd, page, segment.header_offset(slot)) != PAGE_BYTES:
                found.append((slot, "it ends too early"))
            elif page != _EMPTY:
                found.append((slot, judge_header(page, segment, slot)))
        except OSError as error:
            found.append((slot, error))
    return found


def _read_page(fd: int, page: bytearray, offset: int) -> int:
    for _ in range(LOOKS - 1):
        with suppress(OSError):
            return os.preadv(fd, [page], offset)
    return os.preadv(fd, [page], offset)


def judge_header(page: bytearray, segment: SegmentFile, slot: int) -> Header | str:
    """The header of a slot if it belongs there, or why not."""
    try:
        header = parse_header(page)
    except FormatError as error:
        return str(error)
    superblock = segment.superblock
    if (header.segment, header.slot) != (superblock.segment, slot):
        return f"it belongs to slot {header.slot} of segment {header.segment}"
    if header.tenant != superblock.tenant:
        return f"it belongs to tenant {header.tenant}"
    if stored_slot_bytes(header.stored_bytes) > superblock.slot_bytes:
        return f"{header.stored_bytes} bytes do not fit its slot"
    return header


def superseded(records: Mapping[int, Records]) -> dict[int, Slots]:
    """Of each segment the slots whose key lies elsewhere in its namespace with a higher generation."""
    at = [(number, np.flatnonzero(each["generation"])) for number, each in records.items()]
    at = [(number, used) for number, used in at if len(used)]
    if not at:
        return {}
    where = np.concatenate([np.full(len(used), number, np.int64) for number, used in at])
    slots = np.concatenate([used for _, used in at])
    kept = np.concatenate([records[number][["key", "generation", "namespace"]][used] for number, used in at])
    key = kept["key"]
    order = np.lexsort((kept["generation"], key[:, 3], key[:, 2], key[:, 1], key[:, 0], kept["namespace"]))
    key, namespace = key[order], kept["namespace"][order]
    old = np.flatnonzero((key[1:] == key[:-1]).all(axis=1) & (namespace[1:] == namespace[:-1]))
    old = order[old]
    return {int(number): slots[old[where[old] == number]] for number in np.unique(where[old])}


def doubled(records: Mapping[int, Records], without: Collection[int] = ()) -> dict[int, Slots]:
    """Of each segment the slots whose very block, generation and all, lies elsewhere too, touched later than here or in
    a segment of a higher number. `without`: segments that do not count.

    Of a segment that vanished in life the index hears nothing more, so what was written again since then is known twice
    once it is back: there, and where it is touched from then on.
    """
    numbers = [number for number in records if number not in without]
    if not numbers:
        return {}
    generations = np.concatenate([records[number]["generation"] for number in numbers])
    ordered = np.sort(generations)  # a generation is given once: as a rule no two are equal, and this is all
    twice = ordered[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)]
    if not twice.size:
        return {}
    ends = np.cumsum([len(records[number]) for number in numbers])
    at = np.flatnonzero(np.isin(generations, twice))
    kept = np.concatenate([records[number][slots] for number, slots in _by_segment(at, numbers, ends).items()])
    where = np.asarray(numbers)[np.searchsorted(ends, at, side="right")]
    order = np.lexsort((where, kept["touched_s"], *kept["key"].T, kept["namespace"], kept["generation"]))
    kept = kept[order]
    same = (kept["generation"][1:] == kept["generation"][:-1]) & (kept["namespace"][1:] == kept["namespace"][:-1])
    same &= (kept["key"][1:] == kept["key"][:-1]).all(axis=1)
    return _by_segment(np.sort(at[order[:-1][same]]), numbers, ends)


def _by_segment(at: np.ndarray[Any, Any], numbers: Sequence[int], ends: np.ndarray[Any, Any]) -> dict[int, Slots]:
    """Of each segment the slots, where there are any. `at`: in order, counted through all segments, which end there."""
    parts = np.split(at, np.searchsorted(at, ends[:-1]))
    starts = (0, *ends[:-1].tolist())
    return {number: part - start for number, part, start in zip(numbers, parts, starts, strict=True) if part.size}


def erase_headers(segment: SegmentFile, slots: Iterable[int]) -> None:
    """Leave nothing at these slots, for good: durable at the end. Raises OSError."""
    fd = os.open(segment.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for slot in slots:
            os.pwrite(fd, _EMPTY, segment.header_offset(slot))
        os.fdatasync(fd)
    finally:
        os.close(fd)


def write_index(
    directory: Path, store: bytes, collected: Collected, map_bytes: int, looked: Iterable[Path] = ()
) -> None:  # fmt: skip
    """A new index in place of whatever was there, of all that lies in `looked`. If it lacks what could not be read, the
    next start rebuilds it. Raises OSError, lmdb.Error: then there is none.
    """
    remove_index(directory)
    folder = directory / BUILDING
    folder.mkdir(mode=0o700)
    try:
        index = IndexFile(folder, map_bytes, create=True, sync=False)
        try:
            index.start(store)
            for change in _changes(collected):
                index.write(change)
            index.env.sync(True)
        finally:
            index.close()
        with (folder / LAST).open("rb") as last:
            os.fsync(last.fileno())
        write_of(folder, looked)
        if collected.partial:
            (folder / DOUBTFUL).touch()
        sync_folder(folder)
        folder.rename(directory / FOLDER)
        sync_folder(directory)
    except (OSError, lmdb.Error):
        remove_index(directory)
        raise


def remove_index(directory: Path) -> None:
    """Also what an interrupted rebuild left. Raises OSError."""
    for folder in (directory / FOLDER, directory / BUILDING):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    sync_folder(directory)


def _changes(collected: Collected) -> Iterator[Change]:
    names = [
        (NAME_KEY.pack(number), pack_name(tenant, digest, collected.canonical[number]))
        for (tenant, digest), number in collected.numbers.items()
    ]
    change = Change(collected.highest(), names=names)
    for number, records in collected.records.items():
        used = records["generation"].reshape(-1, CHUNK_SLOTS).any(axis=1)
        for chunk in np.flatnonzero(used):
            packed = records[chunk * CHUNK_SLOTS : (chunk + 1) * CHUNK_SLOTS].tobytes()
            change.chunks.append((CHUNK_KEY.pack(number, int(chunk)), seal_chunk(packed)))
            if len(change.chunks) == CHUNKS_PER_COMMIT:
                yield change
                change = Change()
    yield change


def _highest(records: Records) -> int:
    if not len(records):
        return 0
    return int(max(records["generation"].max(), records["parent_generation"].max()))
