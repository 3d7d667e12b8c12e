"""What the owner thread says of the disk tier: how it stands, and what is wrong with it. Owner thread."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Final, Protocol

from kvstore import survey
from kvstore.report import DiskReport, DriveReport
from kvstore.store import Store
from kvstore.tier.codec import Wish
from kvstored.drive_health import DriveState, DriveStatus
from kvstored.index import State

FOREIGN_NAMED: Final = 8  # of files that are not ours; the rest is counted
PACKED_TRIED: Final = 256  # blocks written before anybody says that packing does not pay

_DRIVE_REMEDIES: Final = {
    DriveState.READ_ONLY: "nothing new is written there; make it writable: it is tried again every 10 s",
    DriveState.FULL: "it takes no new segments; free space there, or lower disk.size",
    DriveState.FAILING: "its blocks are misses; see the kernel's log: it is tried again every 10 s",
    DriveState.GONE: "its blocks are lost to this daemon; mount or make it again: until a restart it begins empty",
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
        foreign=tuple(map(str, foreign[:FOREIGN_NAMED])),
        admission=disk.limits.admission.value,
        codec=disk.limits.codec.value,
        queued_chains=disk.demotion.waiting,
        running_bytes=disk.demotion.running_bytes,
        counters=survey.disk_counters(store),
        drives=tuple(map(_drive_report, drives.status())) if drives else (),
        encryption=encryption,
    )


def disk_warnings(disk: DiskReport, contents: Contents | None) -> Iterator[str]:
    """Each names what is wrong and, after a semicolon, what to do. `contents`: what the index found at start."""
    for drive in disk.drives:
        yield from _drive_warnings(drive)
    if contents and not contents.store:
        remedy = "see the daemon's log, take other directories or mend these, and restart kvstored"
        yield f"the disk tier is off ({disk.index_reason}): nothing is read or written there; {remedy}"
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
        remedy = "restart kvstored when it suits: it then reads the headers of all blocks, and makes a new index"
        yield f"the index on disk is lost{reason}; {remedy}"
    elif disk.index_state == State.HUNG.value:
        remedy = "see whether the drive of the first directory hangs"
        yield f"the index on disk hangs{reason}: nothing becomes durable until it answers; {remedy}"
    elif reason:
        yield f"the index on disk is not written{reason}; see the first directory, and the daemon's log"


def _contents_warnings(disk: DiskReport, unreadable: Sequence[str]) -> Iterator[str]:
    for directory in unreadable:
        yield f"disk {directory}: what lies there was not taken over; mend it and restart kvstored"
    if disk.unknown_segments:
        remedy = (
            "if that was changed, set it back and restart kvstored; else they are of tenants for whom there is no place"
        )
        yield f"{disk.unknown_segments} segments of another size than disk.segment are not used; {remedy}"
    if disk.foreign_files:
        remedy = "the log says which; bring the key back, or look at them and remove them by hand"
        kind = "are not ours, or are encrypted with a key that is not here"
        yield f"{disk.foreign_files} files among the segments {kind}, such as {disk.foreign[0]}; {remedy}"
    counters = disk.counters
    if disk.codec == Wish.BF16_PLANES_ZSTD and counters.saved >= PACKED_TRIED and 2 * counters.packed < counters.saved:
        found = f"only {counters.packed} of {counters.saved} blocks got smaller with disk.codec {disk.codec}"
        yield f"{found}; the rest is written raw: set it to auto"
