"""`kvstore.ports.Workers` of a real daemon: which thread carries out which order.

Verify             leaf threads (there with or without a disk)
Commit             the commit thread: fdatasync of segments, then the index, one after the other
everything else    the drives' threads; Owe where there are none: the commit thread
"""

import logging
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from kvstore.store import Store
from kvstore.tier.orders import Commit, DropSegment, Name, Order, Outcome, Owe, Verify
from kvstored.config import Config
from kvstored.drive import Drives, Observe
from kvstored.drive_keys import keys_of_store
from kvstored.drive_segments import said_of
from kvstored.index import Index
from kvstored.index_loaded import Loaded
from kvstored.index_marks import OWED, DamagedError
from kvstored.index_scan import SEGMENTS, segment_number
from kvstored.key_file import KeyRing
from kvstored.leaf import Check, LeafThreads
from kvstored.memory import HostMemory
from kvstored.metrics_timing import Timings
from kvstored.owed import Sight, note_owed, runs_of
from kvstored.secret_files import SecretFileError

log = logging.getLogger(__name__)

STOP_S = 40.0  # a commit that has begun: a sync and a transaction


class HostWorkers:
    """Owner thread, but for what says otherwise."""

    def __init__(
        self, config: Config, memory: HostMemory, leaf: LeafThreads, index: Index | None, wake: Callable[[], None]
    ) -> None:
        """`index` is running already. `wake` is called on any thread."""
        self._config = config
        self._memory = memory
        self._leaf = leaf
        self._wake = wake
        self._commits: SimpleQueue[Commit | Owe | None] = SimpleQueue()
        self._committed: deque[Commit | Owe] = deque()
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)
        self._ticks = _processor_ticks()
        self._idle = 1.0
        self.index = index
        self.timings: Timings | None = None  # of reads and writes, once the disk is open
        self.observe: Observe | None = None  # of reads, if anybody is to be told of each; before the disk is open
        self.drives: Drives | None = None
        self.loaded: Loaded | None = None
        self._closed: dict[int, Path] = {}  # segments of which nobody knows what lies there, and their directories
        self._leaving: dict[int, Path] = {}  # those of them that are being removed
        self._said_closed = False

    # -- kvstore.ports.Workers -----------------------------------------------------------------------------------

    def submit(self, batch: Sequence[Order]) -> None:
        """See the port."""
        first = batch[0]
        if isinstance(first, Verify):
            checks = []
            for order in batch:
                assert isinstance(order, Verify), "a batch is of one kind"
                whole = self._memory.view(order.arena)
                checks.append(Check(order, whole[order.arena_offset : order.arena_offset + order.block_bytes]))
            self._leaf.check(checks)
        elif isinstance(first, Commit) or (isinstance(first, Owe) and self.drives is None):
            self._commits.put(first)
        else:
            assert self.drives is not None, "nothing is asked of a disk before it is open"
            if isinstance(first, DropSegment) and first.segment in self._closed:
                self._leaving[first.segment] = directory = self._closed.pop(first.segment)
                self.drives.adopt(first.segment, directory)
                log.log(
                    logging.DEBUG if self._said_closed else logging.WARNING,
                    "disk: segment=%d is removed: it could not be read, and blocks of its tenant are deleted",
                    first.segment,
                )  # fmt: skip
                self._said_closed = True  # there may be thousands
            self.drives.submit(batch)

    def idle_share(self) -> float:
        """See the port."""
        return self._idle

    def drive_of(self, segment: int) -> int:
        """See the port."""
        return -1 if self.drives is None else self.drives.drive_of(segment)

    # -- for the daemon ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the commit thread."""
        self._thread.start()

    def stop(self) -> None:
        """End what was begun; the drives last, since commits sync them."""
        self._commits.put(None)
        if self._thread.ident is not None:
            self._thread.join(STOP_S)
        if self.drives is not None:
            self.drives.stop()
        if self.index is not None:
            self.index.stop()

    def finish(self, store: Store) -> None:
        """Hand back to the store what has been carried out, and what the index has found."""
        for checks in self._leaf.take_checked():
            store.finished(checks)
        while self._committed:
            store.finished([self._committed.popleft()])
        if self.drives is not None:
            for batch in self.drives.take_done():
                if isinstance(batch[0], DropSegment):
                    self._removed(batch[0])
                store.finished(batch)
            for segment in self.drives.gone_segments():
                store.disk.lost(segment, store.now_ns())
            store.drives_away(self.drives.away())
        elif self.index is not None:
            loaded = self.index.take_loaded()
            if loaded is not None:
                self._open(loaded, store)

    def _open(self, loaded: Loaded, store: Store) -> None:
        self.loaded = replace(loaded, segments=[])  # not their records: 72 bytes a block
        if not loaded.store:  # nobody has looked whose files they are
            self.loaded = replace(self.loaded, foreign=[], unread=sorted([*loaded.foreign, *loaded.unread]))
            log.error("disk tier off: %s", self.index.reason if self.index else "")
            store.disk.switch_off()
            return
        config = self._config
        try:
            ring = config.disk_keys()
        except SecretFileError as error:  # it was good when the daemon started
            log.error("disk tier off: %s", error)  # noqa: TRY400  it says all
            store.disk.switch_off()
            return
        found, loaded = loaded, less_unread(readable_with(ring, loaded))
        self.loaded = replace(loaded, segments=[])
        if found.closed:
            log.warning("disk: segments=%d could not be read: all in them is missed in this life", len(found.closed))
        closed = {one.segment: one.tenant for one in found.segments if one.segment not in loaded.directories}
        self._closed = {segment: found.directories[segment] for segment in closed}
        self.drives = Drives(
            config.disk_directories, config.segment_bytes, loaded.store, self._memory.view, self._wake,
            readers=config.disk_readers, writers=config.disk_writers, packers=config.disk_packers,
            timings=self.timings, observe=self.observe, keys=keys_of_store(ring, loaded.store) if ring else None,
            owed=config.state_dir / OWED, sight=_sight(config.disk_directories, found),
            mounts=self.index.mounts if self.index else None,
        )  # fmt: skip
        self.drives.start()
        for segment, directory in loaded.directories.items():
            self.drives.adopt(segment, directory)
        names = [Name(name.number, name.tenant, name.canonical) for name in loaded.names]
        others = (*loaded.foreign, *loaded.unread)
        foreign = [number for path in others if (number := segment_number(path)) >= 0]
        store.raise_generation(loaded.next_generation)
        store.disk.closed.found(closed)
        store.disk.closed.found_unseen(loaded.unseen)
        if not loaded.looked.issuperset(config.disk_directories):
            store.disk.closed.know_nothing()
        store.open_disk(loaded.segments, names, foreign, loaded.next_segment)
        log.info(
            "disk open: segments=%d foreign=%d unread=%d rebuilt=%r dropped=%d",
            len(loaded.segments), len(loaded.foreign), len(loaded.unread), loaded.rebuilt, loaded.dropped,
        )  # fmt: skip

    def _removed(self, order: DropSegment) -> None:
        """Status lists files that are not used: not one that is gone. There may be thousands."""
        if order.outcome is not Outcome.DONE or order.segment not in self._leaving or self.loaded is None:
            return
        file = _file_of(self._leaving.pop(order.segment), order.segment)
        listed = self.loaded.unread if order.segment in self.loaded.closed else self.loaded.foreign
        at = bisect_left(listed, file)
        assert listed[at] == file, "what is closed is listed"
        del listed[at]

    def look_around(self) -> None:
        """Once a second."""
        if self.drives is not None:
            self.drives.look_around()
        ticks = _processor_ticks()
        passed = ticks[0] - self._ticks[0]
        if passed > 0:
            self._idle = (ticks[1] - self._ticks[1]) / passed
        self._ticks = ticks

    # -- commit thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (order := self._commits.get()) is not None:
            order.outcome = self._note(order) if isinstance(order, Owe) else self._commit(order)
            self._committed.append(order)
            self._wake()

    def _commit(self, order: Commit) -> Outcome:
        drives, index = self.drives, self.index
        assert drives is not None, "nothing is committed before the disk is open"
        assert index is not None, "nothing is committed before the disk is open"
        order.failed = drives.sync(order.segments)
        done = index.commit(order)
        return Outcome.DONE if done or index.headers_will_do else Outcome.FAILED

    def _note(self, order: Owe) -> Outcome:
        """No disk is open: all that is owed of it is everything of a tenant."""
        try:
            note_owed(
                self._config.state_dir / OWED, b"", order.places, order.tenant,
                Sight(hidden=frozenset(map(str, self._config.disk_directories))),
            )  # fmt: skip
        except (DamagedError, OSError) as error:
            log.warning("disk: what was deleted could not be noted: %s", error)
            return Outcome.FAILED
        log.warning(
            "disk: all that lies there of %s goes when it is seen again: something of it was deleted meanwhile",
            f"tenant={order.tenant}" if order.tenant else "everybody",
        )
        return Outcome.DONE


def _sight(directories: Sequence[Path], loaded: Loaded) -> Sight:
    """What this life has seen of what lay there before."""
    hidden = frozenset(str(directory) for directory in directories if directory not in loaded.looked)
    return Sight(runs_of(loaded.directories), hidden, loaded.next_segment)


def readable_with(ring: KeyRing | None, loaded: Loaded) -> Loaded:
    """What was found, less segments that the keys at hand do not open: those are left alone, as strangers' are.

    Without a key that is what is encrypted; with one, what is not, since nothing more is to be written in the clear.
    """
    known = ring.ids() if ring else frozenset({b""})
    closed = {segment: key for segment, key in loaded.key_ids.items() if key not in known}
    for key in sorted(set(closed.values())):
        count = sum(one == key for one in closed.values())
        log.warning(
            "disk: segments=%d are %s and cannot be used with disk.key_file as it is: all in them is missed; "
            "bring that key back, or remove their files: status lists them", count, said_of(key),
        )  # fmt: skip
    left = _without(loaded, closed)
    files = sorted([*loaded.foreign, *_files_of(loaded, closed)])
    return replace(left, foreign=files, closed=loaded.closed - closed.keys())


def less_unread(loaded: Loaded) -> Loaded:
    """What was found, less what could not be read in this life: nobody shall take that for strangers' files."""
    unread = sorted([*loaded.unread, *_files_of(loaded, loaded.closed)])
    return replace(_without(loaded, loaded.closed), unread=unread)


def _without(loaded: Loaded, closed: Collection[int]) -> Loaded:
    return replace(
        loaded,
        segments=[one for one in loaded.segments if one.segment not in closed],
        directories={segment: path for segment, path in loaded.directories.items() if segment not in closed},
    )


def _files_of(loaded: Loaded, segments: Collection[int]) -> list[Path]:
    return [_file_of(loaded.directories[one], one) for one in segments if one in loaded.directories]


def _file_of(directory: Path, segment: int) -> Path:
    return directory / SEGMENTS / f"{segment:08d}.seg"


def _processor_ticks(stat: Path = Path("/proc/stat")) -> tuple[int, int]:
    """All, and idle or waiting for a drive, since the host started. Guests count as users already: proc_stat(5)."""
    with stat.open(encoding="ascii") as lines:
        user, nice, system, idle, waiting, *more = map(int, lines.readline().split()[1:9])
    return user + nice + system + idle + waiting + sum(more), idle + waiting
