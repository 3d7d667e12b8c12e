"""What the owner thread says of the disk tier: how it stands, and what is wrong with it. Owner thread."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final, Protocol

from kvstore import survey
from kvstore.report import DiskReport, DriveReport
from kvstore.store import Store
from kvstore.tier.codec import Wish
from kvstored.drive_health import DriveState, DriveStatus
from kvstored.index import State

FILES_NAMED: Final = 8  # of those that are not ours, or could not be read; the rest is counted
PACKED_TRIED: Final = 256  # blocks written before anybody says that packing does not pay
# What `owed.read_owed` says of a note that is damaged, behind the name of its file.
NOTE_DAMAGED: Final = "nobody knows what was deleted"

_DRIVE_REMEDIES: Final = {
    DriveState.READ_ONLY: "nothing new is written there; make it writable: it is tried again every 10 s",
    DriveState.FULL: "it takes no new segments; free space there, or lower disk.size",
    DriveState.FAILING: "its blocks are misses; see the kernel's log: it is tried again every 10 s",
    DriveState.GONE: "its blocks are misses in this life; mount or make it again: it begins empty, and with a restart "
    "what lies there is served again, less what was deleted meanwhile",
}


class Drives(Protocol):
    """Directories of the disk tier (`kvstored.drive.Drives`)."""

    def status(self) -> Sequence[DriveStatus]:
        """How each is."""


class Index(Protocol):
    """The index on disk (`kvstored.index.Index`)."""

    @property
    def state(self) -> State:
        """Where it stands."""

    @property
    def reason(self) -> str:
        """What is wrong; empty if nothing is."""

    def progress(self) -> tuple[int, int] | None:
        """Slots read of all while it is rebuilt."""


class Contents(Protocol):
    """What the index found at start, beside blocks (`kvstored.index_loaded.Loaded`)."""

    @property
    def store(self) -> bytes:
        """Empty if nothing on disk can be used."""

    @property
    def foreign(self) -> Sequence[Path]:
        """Files that are not ours."""

    @property
    def unread(self) -> Sequence[Path]:
        """Files that could not be read in this life."""

    @property
    def unreadable(self) -> Sequence[str]:
        """Directories, with the reason."""

    @property
    def rebuilt(self) -> str:
        """Why the index was made anew; empty if it was not."""

    @property
    def dropped(self) -> int:
        """Records or headers that were of no use."""


class Hands(Protocol):
    """What the disk tier works with (`kvstored.workers.HostWorkers`). Each part is None until it is there."""

    @property
    def drives(self) -> Drives | None:
        """Directories."""

    @property
    def index(self) -> Index | None:
        """Which blocks they hold."""

    @property
    def loaded(self) -> Contents | None:
        """What it found at start."""


def disk_report(store: Store, hands: Hands | None, encryption: str) -> DiskReport:
    """How it stands; `hands` None: nothing is there to ask yet. `encryption`: with what, empty for none."""
    disk = store.disk
    drives, index, contents = (hands.drives, hands.index, hands.loaded) if hands else (None, None, None)
    done_slots, total_slots = (index and index.progress()) or (0, 0)
    foreign = contents.foreign if contents else ()
    unread = contents.unread if contents else ()
    return DiskReport(
        state=disk.state.value,
        index_state=index.state.value if index else "none",
        index_reason=index.reason if index else "",
        rebuild_done_slots=done_slots,
        rebuild_total_slots=total_slots,
        rebuilt=contents.rebuilt if contents else "",
        recovered_blocks=disk.recovered.blocks,
        orphan_blocks=disk.recovered.orphans,
        recovered_segments=disk.recovered.segments,
        surplus_segments=disk.recovered.surplus,
        unknown_segments=disk.recovered.unknown,
        useless_records=contents.dropped if contents else 0,
        foreign_files=len(foreign),
        foreign=tuple(map(str, foreign[:FILES_NAMED])),
        admission=disk.limits.admission.value,
        codec=disk.limits.codec.value,
        queued_chains=disk.demotion.waiting,
        running_bytes=disk.demotion.running_bytes,
        counters=survey.disk_counters(store),
        drives=tuple(map(_drive_report, drives.status())) if drives else (),
        encryption=encryption,
        unread_segments=len(unread),
        unread=tuple(map(str, unread[:FILES_NAMED])),
    )


def disk_warnings(disk: DiskReport, contents: Contents | None) -> Iterator[str]:
    """Each names what is wrong and, after a semicolon, what to do. `contents`: what the index found at start."""
    for drive in disk.drives:
        yield from _drive_warnings(drive)
    if contents and not contents.store:
        mend = "see the daemon's log, take other directories or mend these, and restart kvstored"
        remedy = _remedy_of_lost(disk) if NOTE_DAMAGED in disk.index_reason else mend
        yield f"the disk tier is off ({disk.index_reason}): nothing is read or written there; {remedy}"
        disk = replace(disk, unread_segments=0)  # nobody has looked at them
    else:
        yield from _index_warnings(disk)
    yield from _contents_warnings(disk, contents.unreadable if contents else ())


def _drive_report(drive: DriveStatus) -> DriveReport:
    same = {one.name: getattr(drive, one.name) for one in fields(DriveReport)}
    return DriveReport(**same | {"directory": str(drive.directory), "state": drive.state.value})


def _drive_warnings(drive: DriveReport) -> Iterator[str]:
    state = DriveState(drive.state)
    if state is not DriveState.OK:
        reason = f" ({drive.reason})" if drive.reason else ""
        yield f"disk {drive.directory} is {state.value}{reason}; {_DRIVE_REMEDIES[state]}"
    elif not drive.direct:
        remedy = "use ext4 or xfs, or see that this memory is accounted for"
        yield f"disk {drive.directory} has no direct I/O: blocks go through the page cache and fill memory; {remedy}"


def _index_warnings(disk: DiskReport) -> Iterator[str]:
    reason = f" ({disk.index_reason})" if disk.index_reason else ""
    if disk.index_state == State.LOST.value:
        yield f"the index on disk is lost{reason}; {_remedy_of_lost(disk)}"
    elif disk.index_state == State.HUNG.value:
        remedy = "see whether the drive of the first directory hangs"
        yield f"the index on disk hangs{reason}: nothing becomes durable until it answers; {remedy}"
    elif reason:
        yield f"the index on disk is not written{reason}; see the first directory, and the daemon's log"


def _remedy_of_lost(disk: DiskReport) -> str:
    if NOTE_DAMAGED in disk.index_reason:  # until then every start ends so
        return (
            "bring that file back as it was, or remove it together with what lies in the folders of disk, and restart "
            "kvstored: a restart alone changes nothing"
        )
    again = "it then reads the headers of all blocks, and makes a new index"
    if disk.unread_segments:  # it was not to be had from the start
        return f"see to that, and restart kvstored: {again}"
    return f"restart kvstored when it suits: {again}"


def _said_of_unread(disk: DiskReport) -> str:
    count = f"{disk.unread_segments} files among the segments could not be read in this life"
    if NOTE_DAMAGED in disk.index_reason:
        remedy = "they stay as they are until that is settled"
    else:
        lost = disk.index_state == State.LOST.value
        when = "once the index is mended" if lost else "once its drive is mended and kvstored is restarted"
        remedy = (
            f"do not remove them: {when} they are read again, unless blocks of their tenants are deleted until then"
        )
    return f"{count}, such as {disk.unread[0]}: all in them is missed; {remedy}"


def _contents_warnings(disk: DiskReport, unreadable: Sequence[str]) -> Iterator[str]:
    for directory in unreadable:
        yield f"disk {directory}: what lies there was not taken over; mend it and restart kvstored"
    if disk.unknown_segments:
        remedy = (
            "if that was changed, set it back and restart kvstored; else they are of tenants for whom there is no place"
        )
        yield f"{disk.unknown_segments} segments of another size than disk.segment are not used; {remedy}"
    if disk.unread_segments:
        yield _said_of_unread(disk)
    if disk.foreign_files:
        remedy = "the log says which; bring the key back, or look at them and remove them by hand"
        kind = "are not ours, or are encrypted with a key that is not here"
        yield f"{disk.foreign_files} files among the segments {kind}, such as {disk.foreign[0]}; {remedy}"
    counters = disk.counters
    if disk.codec == Wish.BF16_PLANES_ZSTD and counters.saved >= PACKED_TRIED and 2 * counters.packed < counters.saved:
        found = f"only {counters.packed} of {counters.saved} blocks got smaller with disk.codec {disk.codec}"
        yield f"{found}; the rest is written raw: set it to auto"
