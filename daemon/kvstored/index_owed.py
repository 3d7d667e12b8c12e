"""What a start does with the note of `owed.py`: erase what is seen again, before anything is taken over."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from kvstore.tier.format import RECORD
from kvstore.tier.orders import WHOLE
from kvstored.index_marks import sync_folder
from kvstored.index_rebuild import Records, erase_headers
from kvstored.index_scan import Scan, SegmentFile
from kvstored.owed import Places, read_owed, write_owed


def carry_out(path: Path, found: Scan) -> tuple[Places, list[int]]:
    """Erase and remove what was seen again, and forget it. Returns the places, and segments that are not to be used in
    this life, since something in them could not be erased or is noted still. Raises DamagedError, OSError.

    What is hidden still gets its number by `note_life`, once all numbers of segments are known.
    """
    noted = read_owed(path)
    found.next_segment = max(found.next_segment, noted.beyond(found.store))
    whole = {number for number, segment in found.segments.items() if noted.is_whole(segment.superblock.tenant, number)}
    owed = noted.of(found.store) | {(number, WHOLE) for number in whole}
    seen = {segment: found.segments[segment] for segment, _ in owed if segment in found.segments}
    looked = _looked(found)
    # There may be a thousand tenants, of a few lives.
    less = {sight: sight.less(looked, whole) for sight in set(noted.tenants.values())}
    tenants = {name: less[sight] for name, sight in noted.tenants.items()}
    if not seen and tenants == noted.tenants:
        return set(), []
    unfit = [number for number, segment in seen.items() if not _erased(segment, owed)]
    for number in seen:
        if (number, WHOLE) in owed and number not in unfit:
            del found.segments[number]
    noted.stores[(found.store or b"").hex()] = {place for place in owed if place[0] not in seen or place[0] in unfit}
    noted.tenants = tenants  # in one with what could not be removed: all of it is forgotten, or nothing
    try:
        write_owed(path, noted)
    except OSError:
        unfit = [number for number in seen if number in found.segments]
    return owed, unfit


def _looked(found: Scan) -> dict[str, list[int]]:
    """Directories of which all could be read, with the numbers of segments there."""
    looked: dict[str, list[int]] = {str(directory): [] for directory in found.looked}
    for number, segment in found.segments.items():
        if (directory := str(segment.directory)) in looked:
            looked[directory].append(number)
    return looked


def _erased(segment: SegmentFile, owed: Places) -> bool:
    number = segment.superblock.segment
    try:
        if (number, WHOLE) in owed:
            segment.path.unlink()
            sync_folder(segment.path.parent)
        else:
            erase_headers(segment, [slot for of, slot in owed if of == number and slot < segment.whole_slots])
    except OSError:
        return False
    return True


def leave_out(places: Iterable[tuple[int, int]], records: Mapping[int, Records]) -> int:
    """What the index still says of places that were erased. Returns how many blocks that were."""
    blocks = 0
    for segment, slot in places:
        if segment in records and 0 <= slot < len(records[segment]):
            blocks += int(records[segment]["generation"][slot] != 0)
            records[segment][slot] = np.zeros((), RECORD)
    return blocks
