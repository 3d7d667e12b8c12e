"""`kvstored check [--repair] DIRECTORY...`: read every byte of a disk tier that no daemon uses, and compare.

A problem is a damaged block, an index that cannot be believed, or one that disagrees with the headers. After a crash
the last blocks may be without an entry, which is no loss: nobody was told that they are durable. A foreign file, an
orphaned block (its parent is not on disk) and a superseded one (its key lies elsewhere, newer) are no problems.

Without --repair nothing is changed: that is its dry run. A repair is written down where operators' acts are. It wants
all directories at once.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from kvstore.tier.format import HEADER_BYTES, RECORD, Codec, Header
from kvstored import index_wire
from kvstored.check_owner import give_back
from kvstored.index import Child, DirectoryHeldError, hold_directory
from kvstored.index_loaded import Loaded, parse_loaded
from kvstored.index_marks import FOLDER, MAP_BYTES, VersionError
from kvstored.index_rebuild import Collected, Records, erase_headers, judge_header, padded_slots, superseded
from kvstored.index_scan import Scan, SegmentFile, scan
from kvstored.index_wire import Kind
from kvstored.mounts import MOUNTS, Mounts
from kvstored.units import ConfigError

EX_TEMPFAIL: Final = 75
EX_CONFIG: Final = 78
PROGRESS_S: Final = 2.0
NAMED: Final = 20  # damaged blocks that are told one by one

_EMPTY: Final = bytes(HEADER_BYTES)
_OTHERS: Final = Path("/dev/null/others")  # stands for directories that are not named; never looked at
_NAME_ALL: Final = "name all of disk.directories"

Say = Callable[[str], None]
Slots = dict[int, list[int]]  # of each segment


class UnusableError(Exception):
    """Not a disk directory, or not of this version."""


@dataclass(slots=True)
class Report:
    """What was found."""

    good: int = 0
    good_bytes: int = 0  # as stored
    damaged: int = 0
    damaged_bytes: int = 0  # of whole slots: of their headers nothing is believed
    unread: int = 0  # packed and nothing here can unpack them, or encrypted: only their stored bytes were verified
    superseded: int = 0
    orphaned: int = 0
    without_entry: int = 0
    without_block: int = 0
    foreign: list[Path] = field(default_factory=list)
    index: str = ""  # why it cannot be believed
    refused: str = ""  # why it is not to be repaired from these directories

    @property
    def clean(self) -> bool:
        """Whether there is nothing to repair."""
        return not (self.damaged or self.without_entry or self.without_block or self.index)

    def lines(self) -> list[str]:
        """The summary."""
        return [
            f"blocks good: {self.good}",
            f"blocks damaged: {self.damaged}",
            f"bytes good: {self.good_bytes}",
            f"bytes damaged: {self.damaged_bytes}",
            *([f"blocks of which only the stored bytes were verified: {self.unread}"] if self.unread else []),
            f"blocks orphaned: {self.orphaned}",
            f"blocks superseded: {self.superseded}",
            f"blocks without index entry: {self.without_entry}",
            f"index entries without block: {self.without_block}",
            f"index: {self.index or 'good'}",
            f"foreign files: {len(self.foreign)}",
            *(f"  {path}" for path in self.foreign),
        ]


def main(arguments: Sequence[str]) -> int:
    """The command. 0 clean, 1 problems found or repaired, 75 a daemon is at work, 78 not usable."""
    parser = argparse.ArgumentParser(prog="kvstored check", description="Verify a disk tier while no daemon uses it.")
    parser.add_argument(
        "--repair", action="store_true", help="erase damaged blocks and make the index anew; else nothing is changed"
    )
    parser.add_argument(
        "--state-dir", type=Path, metavar="DIR", help="where the audit file is; else as configured for the daemon"
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY", help="as in disk.directories")
    options = parser.parse_args(arguments)
    report, code = Report(), EX_CONFIG
    try:
        _refuse_absent(options.state_dir, options.directories)
        report = check(options.directories, _say, repair=options.repair)
        outcome, code = "done", 0 if report.clean else 1
    except DirectoryHeldError as error:
        outcome, code = str(error), EX_TEMPFAIL
    except (UnusableError, VersionError, OSError) as error:
        outcome = str(error)
    if outcome == "done":
        print("\n".join(report.lines()))
        if code and not options.repair:
            would = f"erase {report.damaged} blocks and make the index anew"
            would = f"be refused: {report.refused}" if report.refused else would
            _say(f"nothing was changed; --repair would {would}")
    else:
        _say(outcome)
    if options.repair:
        from kvstored.check_audit import write_down  # noqa: PLC0415  configuration, which looking needs not

        outcome = outcome if outcome == "done" else f"failed: {outcome}"
        if why := write_down(options.state_dir, options.directories, report.damaged, report.damaged_bytes, outcome):
            _say(why)
    return code


def check(directories: Sequence[Path], say: Say, *, repair: bool) -> Report:
    """Read everything. Raises DirectoryHeldError, UnusableError, VersionError, OSError."""
    for directory in directories:
        if not directory.is_dir():
            raise UnusableError(f"{directory} is not a directory")
    with ExitStack() as held:
        for directory in directories:
            held.enter_context(hold_directory(directory))
            held.callback(_give_back, directory, say)
        found = scan(directories)
        if found.unreadable:
            raise UnusableError("; ".join(found.unreadable))
        loaded, reason = _load(directories)
        refused = _why_no_repair(directories, loaded)
        if repair and refused:
            raise UnusableError(refused)
        if not found.segments and not (directories[0] / FOLDER).exists():
            reason = ""  # never used
        report = Report(foreign=found.foreign, index=reason, refused=refused)
        damaged = _read_segments(found, report, loaded, say)
        if repair and not report.clean:
            _repair(directories, found, damaged, say)
    return report


def _refuse_absent(given: Path | None, directories: Sequence[Path]) -> None:
    """Raises UnusableError for those whose drives are not mounted, as far as a daemon's folder of state knows."""
    from kvstored.check_audit import state_dir  # noqa: PLC0415  configuration

    try:
        folder = state_dir(os.environ) if given is None else given
    except (ConfigError, OSError):
        folder = None
    absent = Mounts(folder / MOUNTS, directories).absent if folder else {}
    if absent:
        raise UnusableError("; ".join(f"{directory}: {why}" for directory, why in absent.items()))


def _why_no_repair(directories: Sequence[Path], loaded: Loaded | None) -> str:
    """The index is made anew from what these directories have, and a start erases all that it does not know: what is
    known of others, by the configuration or by the index.
    """
    from kvstored.check_audit import disk_directories  # noqa: PLC0415  configuration

    try:
        configured = {os.path.realpath(each): each for each in disk_directories(os.environ)}
    except (ConfigError, OSError):
        configured = {}
    left = configured.keys() - set(map(os.path.realpath, directories))
    if left and len(left) < len(configured):
        return f"blocks in {' and '.join(str(configured[each]) for each in sorted(left))} would be lost: {_NAME_ALL}"
    elsewhere = _segments_elsewhere(directories) if loaded and loaded.dropped else []
    if not elsewhere:
        return ""
    numbers = ", ".join(map(str, elsewhere[:NAMED])) + (", ..." if len(elsewhere) > NAMED else "")
    segments, are, their = ("segment", "is", "its") if len(elsewhere) == 1 else ("segments", "are", "their")
    return (
        f"{len(elsewhere)} {segments} of the index ({numbers}) {are} in none of these directories, and {their} blocks "
        f"would be lost: {_NAME_ALL}; the next start of a daemon forgets segments that are lost for good"
    )


def _segments_elsewhere(directories: Sequence[Path]) -> list[int]:
    """Those that the index knows and none of these has."""
    loaded, _ = _load([*directories, _OTHERS], absent={_OTHERS: "not named"})
    return sorted(loaded.unseen) if loaded else []


def _give_back(directory: Path, say: Say) -> None:
    if why := give_back(directory):
        say(why)


def _say(text: str) -> None:
    print(f"kvstored check: {text}", file=sys.stderr, flush=True)


def _load(
    directories: Sequence[Path], rebuild: str = "", absent: Mapping[Path, str] | None = None
) -> tuple[Loaded | None, str]:
    """What the index says, or why it cannot be believed. With `rebuild` it is made anew. `absent`: as for `Child`."""
    child = Child(directories, rebuild=rebuild, look=not rebuild, map_bytes=MAP_BYTES, absent=absent)
    try:
        while (message := index_wire.receive(child.link)) is not None:
            if message.kind is Kind.FAILED:
                return None, message.text
            if message.kind is Kind.LOADED:
                return parse_loaded(message)
        return None, child.why_gone()
    finally:
        child.end(5.0)


def _read_segments(found: Scan, report: Report, loaded: Loaded | None, say: Say) -> Slots:
    """Fill the report; the damaged slots."""
    entries = {each.segment: each.records for each in loaded.segments} if loaded else {}
    report.without_block = loaded.dropped if loaded else 0
    blocks = Collected({number: _no_records(segment) for number, segment in found.segments.items()})
    damaged: Slots = {}
    total = sum(segment.whole_slots for segment in found.segments.values())
    read = 0
    told_s = time.monotonic()
    for number, segment in found.segments.items():
        page, stored = bytearray(HEADER_BYTES), bytearray(segment.superblock.slot_bytes - HEADER_BYTES)
        fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for slot in range(segment.whole_slots):
                header = _read_slot(fd, segment, slot, page, stored, report)
                if isinstance(header, Header):
                    blocks.put(segment, header)
                elif header:
                    damaged.setdefault(number, []).append(slot)
                    if report.damaged <= NAMED:
                        say(f"{segment.path}, slot {slot}: {header}")
                read += 1
                if time.monotonic() - told_s >= PROGRESS_S:
                    told_s = time.monotonic()
                    say(f"{read} of {total} slots read, {report.damaged} damaged")
        finally:
            os.close(fd)
    _compare(blocks, {n: records for n, records in entries.items() if isinstance(records, np.ndarray)}, damaged, report)
    return damaged


def _no_records(segment: SegmentFile) -> Records:
    return np.zeros(padded_slots(segment.superblock.slots), RECORD)


def _read_slot(
    fd: int, segment: SegmentFile, slot: int, page: bytearray, stored: bytearray, report: Report
) -> Header | str:
    """A good block's header; why the slot is damaged; empty if it is empty."""
    offset = segment.header_offset(slot)
    try:
        os.preadv(fd, [page], offset)
        if page == _EMPTY:
            return ""
        header = judge_header(page, segment, slot)
        if isinstance(header, Header):
            content = memoryview(stored)[: header.stored_bytes]
            os.preadv(fd, [content], offset + HEADER_BYTES)
            fault = _payload_fault(header, content, report)
            header = fault or header
    except OSError as error:
        header = str(error)
    if isinstance(header, Header):
        report.good += 1
        report.good_bytes += header.stored_bytes
    else:
        report.damaged += 1
        report.damaged_bytes += segment.superblock.slot_bytes
    return header


def _payload_fault(header: Header, stored: memoryview, report: Report) -> str:
    if xxhash.xxh3_64_intdigest(stored) != header.stored_checksum:
        return "the payload fails its checksum"
    if header.nonce:
        report.unread += 1
        return ""
    content = np.frombuffer(stored, np.uint8)
    if header.codec is not Codec.RAW:
        try:
            from kvkernels.planes import PlanesError, unpack  # noqa: PLC0415  Numba, and only if it is needed
        except ImportError:
            report.unread += 1
            return ""
        block = np.empty(header.block_bytes, np.uint8)
        try:
            unpack(content, block)
        except PlanesError as error:
            return f"the payload cannot be unpacked: {error}"
        content = block
    if len(content) != header.block_bytes or xxhash.xxh3_64_intdigest(content.data) != header.checksum:
        return "the block fails its checksum"
    return ""


def _compare(blocks: Collected, entries: dict[int, Records], damaged: Slots, report: Report) -> None:
    old = superseded(blocks.records)
    report.superseded = sum(len(slots) for slots in old.values())
    for number, records in blocks.records.items():
        child = records[records["parent_generation"] != 0]
        report.orphaned += sum(1 for each in child if not _is_there(blocks, each))
        if report.index:
            continue
        entry = entries[number]
        there = records[: len(entry)]
        same = np.ones(len(entry), bool)
        for name in ("generation", "checksum", "parent_generation"):
            same &= there[name] == entry[name]
        same &= (there["key"] == entry["key"]).all(axis=1)
        without_block = (entry["generation"] != 0) & ~same
        without_block[damaged.get(number, [])] = False  # told already
        without_entry = (there["generation"] != 0) & ~same
        without_entry[old.get(number, [])] = False
        report.without_block += int(np.count_nonzero(without_block))
        report.without_entry += int(np.count_nonzero(without_entry))


def _is_there(blocks: Collected, child: np.void) -> bool:
    records = blocks.records.get(int(child["parent_segment"]))
    slot = int(child["parent_slot"])
    return (
        records is not None and slot < len(records) and bool(records["generation"][slot] == child["parent_generation"])
    )


def _repair(directories: Sequence[Path], found: Scan, damaged: Slots, say: Say) -> None:
    """Raises OSError, UnusableError."""
    for number, slots in damaged.items():
        erase_headers(found.segments[number], slots)
    erased = sum(len(slots) for slots in damaged.values())
    say(f"{erased} damaged blocks erased; making the index anew")
    loaded, reason = _load(directories, "repair")
    if loaded is None or reason:
        raise UnusableError(f"the index cannot be made anew: {reason}")
    say("repaired")
