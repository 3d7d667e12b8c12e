"""The disk tier's hands: segment files in one or several directories, and the threads that read and write them.

    owner thread             each directory                        completions
    submit(batch) --pieces-> readers: loads --> checkers       -.
                 `---------> writers: saves, erases, segments  --+-> take_done(), a batch when its last piece is
                 `---------> packers (one room for all): verify,-'
                             then pack

A directory has threads and queues of its own, so that a hung drive stops only itself; loads never wait behind saves,
verifying never behind packing. A piece is what one thread does in one go; pieces of a batch run at the same time.

Readers hand what has come to the checkers and ask for more at once: a drive often ends many reads at the same moment,
and would stand still while those who waited for them verify.
"""

import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Final, cast

from kvkernels.aligned import Bytes
from kvstore.tier.orders import DropSegment, Erase, Load, MakeSegment, Order, Outcome, Owe, Pack, Save, Verify
from kvstore.tier.scrub import NOWHERE
from kvstored import drive_work
from kvstored.drive_files import Files
from kvstored.drive_health import Directory, DriveState, DriveStatus, NotToBeUsedError
from kvstored.drive_keys import StoreKeys
from kvstored.drive_queues import Batch, Lanes, Piece, cut_evenly, cut_loads, cut_saves
from kvstored.drive_segments import Segment, remove_unfinished
from kvstored.drive_work import Scratch
from kvstored.index import DirectoryHeldError, hold_directory
from kvstored.index_marks import DamagedError
from kvstored.metrics_timing import Timings
from kvstored.mounts import Mounts
from kvstored.niceness import be_nice
from kvstored.owed import BLIND, Sight, note_owed

log = logging.getLogger(__name__)

# Of what nobody waits for, as in leaf.py. Not of readers: with both cores busy, 4 x 2 MiB took 36 ms at 10, 6 at 0.
NICE: Final = 10
STOP_S: Final = 5.0
SYNC_S: Final = 30.0  # a drive that takes longer has not made anything durable


@dataclass(slots=True, eq=False)
class _Sync:
    """What `sync` asks of one directory."""

    segments: list[Segment]
    done: threading.Event
    sound: set[int]


def _thread(name: str, run: Callable[[], None]) -> threading.Thread:
    return threading.Thread(target=run, name=name, daemon=True)


class _Drive:
    """A directory, its queues and its threads."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.reads = Lanes()
        self.checks: SimpleQueue[tuple[Piece, Scratch] | None] = SimpleQueue()
        self.scratches: SimpleQueue[Scratch] = SimpleQueue()  # of readers and checkers
        self.writes = Lanes()
        self.syncs: SimpleQueue[_Sync | None] = SimpleQueue()
        self.syncing: _Sync | None = None


# Told of each read: its orders, when it began, when all bytes had come, when they were verified. On a drive's thread.
Observe = Callable[[Sequence[Load], int, int, int], None]


class Drives:
    """The disk port of a real daemon. Owner thread, but for what says otherwise."""

    def __init__(
        self, directories: Sequence[Path], segment_bytes: int, store: bytes, view: Callable[[int], Bytes],
        wake: Callable[[], None], *, readers: int, writers: int, packers: int, files: Files | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns, timings: Timings | None = None, keys: StoreKeys | None = None,
        observe: Observe | None = None, owed: Path | None = None, sight: Sight = BLIND, mounts: Mounts | None = None,
    ) -> None:  # fmt: skip
        """`readers` and `writers` are threads of each directory, `packers` of all. With `keys` payloads are encrypted.
        `owed`: the file for what could not be erased; without, it is not noted. `sight`: what the start has seen.
        `mounts` says which directories the caller does not hold, since they were absent: those are held from when they
        are there.

        `view` gives an arena's writable bytes and is called by `submit`. `wake` is called on a thread of these
        whenever `take_done`, `gone_segments` or `status` may have news.
        """
        self._segment_bytes = segment_bytes
        self._timings = timings
        self._observe = observe
        self._owed = owed
        self._sight = sight
        self._owing = threading.Lock()
        self._said_owed = False
        self._store = store
        self._keys = keys
        self._view = view
        self._wake = wake
        self._mounts = mounts or Mounts()
        self._unheld = set(self._mounts.absent)
        self._held = ExitStack()
        files = files or Files()
        self._drives = [_Drive(self._directory(path, files, now_ns)) for path in directories]
        self._segments: dict[int, Segment] = {}
        self._shared = Lanes()
        self._done: deque[Sequence[Order]] = deque()
        self._lock = threading.Lock()  # of what is left of batches
        self._stopping = False
        self._counts = (readers, writers, max(1, packers))
        self._checkers = min(readers, len(os.sched_getaffinity(0)))  # of each directory
        self._threads: list[threading.Thread] = []
        self._checking: list[threading.Thread] = []  # stopped last

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads. Returns at once: directories are opened by the threads."""
        readers, writers, packers = self._counts
        for number, drive in enumerate(self._drives):
            drive.directory.begin()
            self._add(f"drive-{number}-look", partial(drive.directory.run_looks, self._wake))
            self._add(f"drive-{number}-sync", partial(self._run_syncs, drive))
            for reader in range(readers):
                self._add(f"drive-{number}-read-{reader}", partial(self._run_reads, drive))
            for checker in range(self._checkers):
                self._checking.append(_thread(f"drive-{number}-check-{checker}", partial(self._run_checks, drive)))
            for _ in range(readers + self._checkers):
                drive.scratches.put(Scratch())
            for writer in range(writers):
                self._add(f"drive-{number}-write-{writer}", partial(self._run, drive.writes, drive.directory, NICE))
        for packer in range(packers):
            self._add(f"packer-{packer}", partial(self._run, self._shared, None, NICE))
        for thread in (*self._checking, *self._threads):
            thread.start()

    def stop(self) -> None:
        """Finish what runs and nothing more. A hung drive's threads are left behind. Call `sync` before."""
        self._stopping = True
        readers, writers, packers = self._counts
        for drive in self._drives:
            drive.directory.end()
            drive.syncs.put(None)
            for _ in range(readers):
                drive.reads.put(None, fast=True)
            for _ in range(writers):
                drive.writes.put(None, fast=True)
        for _ in range(packers):
            self._shared.put(None, fast=True)
        until = time.monotonic() + STOP_S
        self._join(self._threads, until)
        for drive in self._drives:  # what its readers have read is verified
            for _ in range(self._checkers):
                drive.checks.put(None)
        self._join(self._checking, until)
        for segment in self._segments.values():
            segment.drop()
        self._held.close()

    def adopt(self, segment: int, directory: Path) -> None:
        """Take over a segment that was found at start; its file is opened when it is first needed."""
        drive = next(drive for drive in self._drives if drive.directory.path == directory)
        assert segment not in self._segments
        self._segments[segment] = Segment(segment, drive.directory, self._store, self._segment_bytes, self._keys)

    # -- orders --------------------------------------------------------------------------------------------------

    def submit(self, batch: Sequence[Order]) -> None:
        """Have orders of one kind carried out, at any time and in any sequence."""
        first = batch[0]
        if isinstance(first, MakeSegment):
            self._submit_making(cast("Sequence[MakeSegment]", batch))
        elif isinstance(first, Verify | Pack):
            pieces = cut_evenly(cast("Sequence[Verify | Pack]", batch))
            self._put(batch, pieces, self._shared, None, fast=isinstance(first, Verify))
        elif isinstance(first, Owe):
            self._put(batch, [batch], self._shared, None, fast=True)
        else:
            assert isinstance(first, Load | Save | Erase | DropSegment), "somebody else's order"
            self._submit_to_segment(first, batch)

    def take_done(self) -> list[Sequence[Order]]:
        """Batches whose every order has its outcome."""
        done: list[Sequence[Order]] = []
        while self._done:
            batch = self._done.popleft()
            for order in batch:
                unmade = isinstance(order, MakeSegment) and order.outcome is not Outcome.DONE
                if unmade or (isinstance(order, DropSegment) and order.outcome is not Outcome.FAILED):
                    self._forget(cast("MakeSegment | DropSegment", order).segment)
            done.append(batch)
        return done

    def drive_of(self, segment: int) -> int:
        """Which of the directories a segment lies in; -1 for one that is not, or is no longer, in any."""
        known = self._segments.get(segment)
        return -1 if known is None else [drive.directory for drive in self._drives].index(known.directory)

    def _submit_making(self, batch: Sequence[MakeSegment]) -> None:
        assert len(batch) == 1, "a segment a batch"
        order = batch[0]
        assert order.segment not in self._segments
        counts = Counter(segment.directory for segment in self._segments.values())
        fit = [drive for drive in self._drives if drive.directory.takes_segments]
        if not fit:
            self._settle(batch, Outcome.FAILED)
            return
        drive = min(fit, key=lambda drive: counts[drive.directory])
        segment = Segment(order.segment, drive.directory, self._store, self._segment_bytes, self._keys)
        self._segments[order.segment] = segment
        # First of all: writes wait for it soon, and by then those submitted before will have ended or be under way.
        self._put(batch, [batch], drive.writes, segment, fast=True)

    def _submit_to_segment(self, first: Load | Save | Erase | DropSegment, batch: Sequence[Order]) -> None:
        segment = self._segments.get(first.header.segment if isinstance(first, Save) else first.segment)
        if segment is None or segment.directory.state is DriveState.GONE:
            self._settle(batch, Outcome.GONE)
            return
        drive = next(drive for drive in self._drives if drive.directory is segment.directory)
        if segment.directory.suspended and isinstance(first, Load | Save):
            self._settle(batch, Outcome.FAILED)
        elif isinstance(first, Load):
            self._put(batch, cut_loads(cast("Sequence[Load]", batch)), drive.reads, segment)
        elif isinstance(first, Save):
            self._put(batch, cut_saves(cast("Sequence[Save]", batch)), drive.writes, segment)
        else:
            if isinstance(first, DropSegment):
                segment.drop()
            self._put(batch, [batch], drive.writes, segment, fast=True)

    def _put(
        self, orders: Sequence[Order], pieces: Sequence[Sequence[Order]], lanes: Lanes, segment: Segment | None,
        *, fast: bool = False, verdict: Outcome = Outcome.OPEN,
    ) -> None:  # fmt: skip
        arenas = {
            arena: self._view(arena)
            for arena in {order.arena for order in orders if isinstance(order, Load | Save | Verify | Pack)} - {NOWHERE}
        } if verdict is Outcome.OPEN else {}  # fmt: skip
        batch = Batch(orders, len(pieces))
        for piece in pieces:
            lanes.put(Piece(batch, piece, segment, arenas, verdict), fast=fast)

    def _settle(self, orders: Sequence[Order], verdict: Outcome) -> None:
        self._put(orders, [orders], self._shared, None, fast=True, verdict=verdict)

    # -- health --------------------------------------------------------------------------------------------------

    def look_around(self) -> None:
        """Have every directory looked at, and let go of what waits for a hung one. About once a second."""
        for drive in self._drives:
            if drive.directory.look_around():
                for piece in (*drive.reads.drain(), *drive.writes.drain()):
                    piece.verdict = Outcome.FAILED
                    self._shared.put(piece, fast=True)

    def away(self) -> list[int]:
        """Drives that are suspended; those whose folders are gone have no segments soon."""
        return [number for number, drive in enumerate(self._drives) if drive.directory.suspended]

    def gone_segments(self) -> list[int]:
        """Segments that vanished, each told once."""
        gone: list[int] = []
        for drive in self._drives:
            directory = drive.directory
            while directory.not_ours:
                gone.append(directory.not_ours.popleft())
            if directory.lost:
                gone += [number for number, segment in self._segments.items() if segment.directory is directory]
                directory.lost = False
        return [number for number in dict.fromkeys(gone) if self._forget(number)]

    def status(self) -> tuple[DriveStatus, ...]:
        """How each directory is."""
        counts = Counter(segment.directory for segment in self._segments.values())
        return tuple(drive.directory.status(counts[drive.directory]) for drive in self._drives)

    def _forget(self, number: int) -> bool:
        segment = self._segments.pop(number, None)
        if segment:
            segment.drop()
        return segment is not None

    # -- the thread that commits ---------------------------------------------------------------------------------

    def sync(self, segments: Iterable[int]) -> set[int]:
        """Make durable what was written to these; those that may have lost something. Blocks up to `SYNC_S`."""
        wanted = set(segments)
        asked: list[_Sync] = []
        for drive in self._drives:
            known = [self._segments.get(number) for number in sorted(wanted)]
            its = [segment for segment in known if segment and segment.directory is drive.directory]
            stuck = drive.syncing is not None and not drive.syncing.done.is_set()
            if its and not stuck and not drive.directory.suspended and not self._stopping:
                drive.syncing = _Sync(its, threading.Event(), set())
                drive.syncs.put(drive.syncing)
                asked.append(drive.syncing)
        until = time.monotonic() + SYNC_S
        for one in asked:
            if one.done.wait(max(0.0, until - time.monotonic())):
                wanted -= one.sound
        return wanted

    # -- worker threads ------------------------------------------------------------------------------------------

    def _directory(self, path: Path, files: Files, now_ns: Callable[[], int]) -> Directory:
        def opened(folder: Path) -> None:
            self._hold(path)
            remove_unfinished(files, folder, self._store)

        return Directory(path, self._segment_bytes, files, now_ns, opened, self._mounts)

    def _hold(self, path: Path) -> None:
        """Raises NotToBeUsedError."""
        if path in self._unheld:
            try:
                self._held.enter_context(hold_directory(path))
            except (DirectoryHeldError, OSError) as error:
                raise NotToBeUsedError(str(error)) from None
            self._unheld.remove(path)

    def _add(self, name: str, run: Callable[[], None]) -> None:
        self._threads.append(_thread(name, run))

    def _join(self, threads: Sequence[threading.Thread], until: float) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))

    def _run_syncs(self, drive: _Drive) -> None:
        while (one := drive.syncs.get()) is not None:
            one.sound.update(segment.number for segment in one.segments if segment.sync())
            one.done.set()

    def _run(self, lanes: Lanes, directory: Directory | None, nice: int) -> None:
        if nice:
            be_nice(nice)
        scratch = Scratch()
        if directory:
            directory.ready.wait()
        while (piece := lanes.get()) is not None:
            if self._stopping:
                return
            try:
                self._carry_out(piece, scratch)
            except Exception:  # one bug must not take the tier along: a thread less each time, until it hangs
                log.exception("an order failed that should not be able to")
            self._finish(piece)
            del piece  # its views would keep an arena in use

    def _run_reads(self, drive: _Drive) -> None:
        directory = drive.directory
        directory.ready.wait()
        while (piece := drive.reads.get()) is not None:
            scratch = drive.scratches.get()
            if self._stopping:
                return
            directory.enter()
            scratch.began_ns = scratch.read_ns = time.monotonic_ns()
            try:
                assert piece.segment
                if directory.suspended:
                    piece.verdict = Outcome.FAILED
                else:
                    drive_work.load(piece.segment, cast("Sequence[Load]", piece.orders), piece.arenas, scratch)
            except Exception:
                log.exception("a read failed that should not be able to")
                scratch.came.clear()
            finally:
                directory.leave()
            drive.checks.put((piece, scratch))
            del piece, scratch

    def _run_checks(self, drive: _Drive) -> None:
        while (read := drive.checks.get()) is not None:
            piece, scratch = read
            try:
                assert piece.segment
                drive_work.check(piece.segment, piece.arenas, scratch)
                self._note_read(piece, scratch)
            except Exception:
                log.exception("a block could not be verified")
                scratch.came.clear()
            drive.scratches.put(scratch)
            self._finish(piece)
            del read, piece, scratch  # their views would keep an arena in use

    def _note_read(self, piece: Piece, scratch: Scratch) -> None:
        now_ns = time.monotonic_ns()
        if self._timings is not None:
            self._timings.read.note(now_ns - scratch.began_ns)
        if self._observe is not None:
            self._observe(cast("Sequence[Load]", piece.orders), scratch.began_ns, scratch.read_ns, now_ns)

    def _carry_out(self, piece: Piece, scratch: Scratch) -> None:
        first, segment = piece.orders[0], piece.segment
        if piece.verdict is not Outcome.OPEN:
            return
        if isinstance(first, Verify):
            drive_work.verify(cast("Sequence[Verify]", piece.orders), piece.arenas)
        elif isinstance(first, Pack):
            drive_work.make_smaller(cast("Sequence[Pack]", piece.orders), piece.arenas)
        elif isinstance(first, Owe):
            piece.verdict = self._note(first)
        elif segment:
            self._carry_out_on(segment, piece, scratch)

    def _note(self, order: Owe) -> Outcome:
        if self._owed is None:
            return Outcome.FAILED
        try:
            with self._owing:
                merged = note_owed(self._owed, self._store, order.places, order.tenant, self._sight)
        except (DamagedError, OSError) as error:
            log.warning("disk: what could not be erased could not be noted either: %s", error)
            return Outcome.FAILED
        level = logging.DEBUG if self._said_owed else logging.WARNING
        log.log(level, "disk: places=%d could not be erased, and are noted in %s", len(order.places), self._owed)
        self._said_owed = True  # each DELETE may have some
        if merged:
            log.warning(
                "disk: segments=%d are noted as a whole, with what nobody deleted there: no room for more slots",
                len(merged),
            )  # fmt: skip
        return Outcome.DONE

    def _carry_out_on(self, segment: Segment, piece: Piece, scratch: Scratch) -> None:
        first, directory = piece.orders[0], segment.directory
        directory.enter()
        began_ns = time.monotonic_ns()
        try:
            if isinstance(first, MakeSegment):
                piece.verdict = drive_work.make_segment(segment, first)
            elif isinstance(first, DropSegment):
                piece.verdict = drive_work.drop_segment(segment)
            elif isinstance(first, Erase):
                drive_work.erase(segment, cast("Sequence[Erase]", piece.orders))
            elif directory.suspended:
                piece.verdict = Outcome.FAILED
            else:
                drive_work.save(segment, cast("Sequence[Save]", piece.orders), piece.arenas, scratch)
        finally:
            directory.leave()
            if self._timings is not None and isinstance(first, Save):
                self._timings.write.note(time.monotonic_ns() - began_ns)

    def _finish(self, piece: Piece) -> None:
        verdict = Outcome.FAILED if piece.verdict is Outcome.OPEN else piece.verdict
        for order in piece.orders:
            if order.outcome is Outcome.OPEN:
                order.outcome = verdict
        with self._lock:
            piece.batch.pieces -= 1
            if piece.batch.pieces:
                return
        self._done.append(piece.batch.orders)
        self._wake()
