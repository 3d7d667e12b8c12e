"""The worker's half of the vLLM connector: bytes between the engine's memory and the daemon's.

    at once    LEASE and copy in the engine's thread, before the forward: for what takes no longer than a few ms
    loads      one thread: LEASE, copy each chunk while the daemon reads the next
    saves      one thread, in order: RESERVE, copy into the ring, COMMIT; pins behind the saves that they need

Whatever cannot be loaded is told to the engine block by block, and computed anew. Whatever cannot be stored is not.
The engine's thread waits for these threads in one case only: when blocks that are being saved are about to be used for
something else, it withdraws them (`Gate`), and waits for the copy that runs, a few ms at most.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Final, TypeVar

from kvclient.copying import Gate, WithdrawnError
from kvclient.integrations.vllm_jobs import LoadJob, PinJob, Plan, Progress, SaveJob
from kvclient.integrations.vllm_layout import Layout
from kvclient.lease import Lease
from kvclient.namespace import Namespace

_log = logging.getLogger(__name__)

AT_ONCE_WAIT_S: Final = 0.02  # what was there a moment ago and is not now is computed anew
AT_ONCE_S: Final = 0.04  # and what is left of a step's loads after so long, as well
READ_S: Final = 30.0  # how long a lease is held for copying
SPACE_S: Final = 2.0  # how long a save waits for room in the ring
CLOSE_S: Final = 2.0  # how long a finished request's blocks wait for their saves
IDLE_S: Final = 0.001  # how long a step without a forward leaves the processor to the threads here
SAVES_WAITING: Final = 256  # jobs; past that the daemon is too slow, and the newest are dropped


Job = TypeVar("Job", LoadJob, SaveJob | PinJob)


@dataclass(slots=True)
class Saving:
    """A save that waits or runs."""

    job: SaveJob
    gate: Gate


class Worker:
    """One rank's. Methods on the engine's thread, but for the two loops."""

    def __init__(self, quick: Namespace, patient: Namespace, layout: Layout, *, disk_wait_s: float) -> None:
        """`quick`: a namespace of a client that waits for no answer longer than a scheduler may; `patient`: any."""
        self._quick = quick
        self._patient = patient
        self._layout = layout
        self._disk_wait_s = disk_wait_s
        self._lock = threading.Condition()
        self._loads: SimpleQueue[LoadJob | None] = SimpleQueue()
        self._saves: SimpleQueue[SaveJob | PinJob | None] = SimpleQueue()
        self._received: set[str] = set()  # requests whose load has ended and that the engine does not know of yet
        self._bad_blocks: set[int] = set()  # of the engine, which it does not know of yet
        self._loading = 0
        self._saving: dict[int, Saving] = {}  # by number
        self._saved: dict[int, int] = {}
        self._closing: dict[str, float] = {}  # requests, and until when their blocks wait for saves
        self.counts: dict[str, float] = dict.fromkeys(
            ("loaded_blocks", "loaded_bytes", "load_seconds", "failed_blocks", "saved_blocks", "known_blocks",
             "saved_bytes", "save_seconds", "refused_blocks", "pinned_bytes"), 0)  # fmt: skip
        self._threads = [
            threading.Thread(target=self._run, name="kvstored-load", args=(self._loads, self._load_aside), daemon=True),
            threading.Thread(target=self._run, name="kvstored-save", args=(self._saves, self._store), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def fence(self, plan: Plan) -> None:
        """Withdraw blocks that are about to be written again from saves that have not copied them yet."""
        for number in plan.fences:
            with self._lock:
                saving = self._saving.get(number)
            if saving is not None:
                saving.gate.close()

    def begin(self, plan: Plan) -> None:
        """Start the loads of a step."""
        until = time.monotonic() + AT_ONCE_S
        for job in plan.loads:
            if job.at_once and time.monotonic() < until:
                self._load(job, self._quick, AT_ONCE_WAIT_S)
            elif job.at_once:  # a daemon that hangs must not hold up the engine once a request
                with self._lock:
                    self._bad_blocks.update(job.block_ids)
                    self.counts["failed_blocks"] += len(job.keys)
            else:
                with self._lock:
                    self._loading += 1
                self._loads.put(job)

    def end(self, plan: Plan) -> None:
        """The forward is over: save what it has computed."""
        for job in plan.saves:
            with self._lock:
                crowded = len(self._saving) >= SAVES_WAITING
                if crowded:
                    self._end_save(job)
                    self.counts["refused_blocks"] += len(job.keys)
                else:
                    self._saving[job.number] = Saving(job, Gate())
            if not crowded:
                self._saves.put(job)
        for pin in plan.pins:
            self._saves.put(pin)
        self._closing |= dict.fromkeys(plan.closing, time.monotonic() + CLOSE_S)

    def idle(self) -> None:
        """A step without a forward: let the threads here run, which the engine's busy loop would keep from the GIL."""
        with self._lock:
            if self._loading or self._closing:
                self._lock.wait(IDLE_S)

    def take_received(self) -> set[str]:
        """Requests whose loads have ended."""
        with self._lock:
            received, self._received = self._received, set()
        return received

    def take_bad_blocks(self) -> set[int]:
        """Blocks of the engine that were not filled."""
        with self._lock:
            bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_closed(self) -> set[str]:
        """Finished requests whose blocks the engine may free."""
        if not self._closing:
            return set()
        with self._lock:
            under_way: dict[str, list[Saving]] = {}
            for saving in self._saving.values():
                under_way.setdefault(saving.job.request, []).append(saving)
        now = time.monotonic()
        closed = {request for request, until in self._closing.items() if request not in under_way or until <= now}
        for request in closed:
            del self._closing[request]
            for saving in under_way.get(request, ()):
                saving.gate.close()
        return closed

    def take_progress(self) -> Progress | None:
        """Saves that have ended since the last time."""
        with self._lock:
            saved, self._saved = self._saved, {}
        return Progress(saved) if saved else None

    def take_counts(self) -> dict[str, float]:
        """Totals since the last time; empty if nothing happened."""
        with self._lock:
            counts = {name: value for name, value in self.counts.items() if value}
            self.counts = dict.fromkeys(self.counts, 0)
        return counts

    def stop(self) -> None:
        """End both threads, and read and write the engine's memory no more."""
        with self._lock:
            savings = list(self._saving.values())
        for saving in savings:
            saving.gate.close()
        self._loads.put(None)
        self._saves.put(None)
        for thread in self._threads:
            thread.join(timeout=10)

    # -- loading -------------------------------------------------------------------------------------------------

    def _load(self, job: LoadJob, namespace: Namespace, wait_s: float) -> None:
        """Load what is there, and say which blocks were not filled. Any thread."""
        began = time.monotonic()
        good = 0
        try:
            good = self._copy(job, namespace, wait_s)
        except Exception:  # noqa: BLE001 -- whatever it was, the engine must hear that the blocks are bad
            _log.exception("load of %d blocks failed", len(job.keys))
        with self._lock:
            self._bad_blocks.update(job.block_ids[good:])
            self.counts["loaded_blocks"] += good
            self.counts["loaded_bytes"] += good * self._layout.block_bytes
            self.counts["failed_blocks"] += len(job.keys) - good
            self.counts["load_seconds"] += time.monotonic() - began

    def _copy(self, job: LoadJob, namespace: Namespace, wait_s: float) -> int:
        """How many blocks from the front are filled and right."""
        with namespace.fetch(job.keys, wait_s=wait_s, ttl_s=READ_S) as lease:
            if lease.expected == 0:
                return 0
            if lease.copy_to(self._layout.scattered(job.block_ids[: lease.expected])):
                return lease.expected
            return _what_is_left(lease)

    def _load_aside(self, job: LoadJob) -> None:
        self._load(job, self._patient, self._disk_wait_s)
        with self._lock:
            self._loading -= 1
            self._received.add(job.request)
            self._lock.notify_all()

    # -- saving --------------------------------------------------------------------------------------------------

    def _store(self, job: SaveJob | PinJob) -> None:
        if isinstance(job, PinJob):
            pinned = self._patient.pin(job.keys, ttl_s=job.ttl_s, retention=job.retention)
            with self._lock:
                self.counts["pinned_bytes"] += pinned.bytes_pinned
            return
        began = time.monotonic()
        saving = self._saving[job.number]
        try:
            source = replace(self._layout.scattered(job.block_ids), gate=saving.gate)
            result = self._patient.store(job.keys, source, parent=job.parent, space_s=SPACE_S)
            with self._lock:
                self.counts["saved_blocks"] += result.accepted
                self.counts["known_blocks"] += result.known
                self.counts["refused_blocks"] += len(result.refused)
                self.counts["saved_bytes"] += result.accepted * self._layout.block_bytes
        except WithdrawnError:
            with self._lock:
                self.counts["refused_blocks"] += len(job.keys)
        finally:
            with self._lock:
                self.counts["save_seconds"] += time.monotonic() - began
                self._end_save(job)
                self._lock.notify_all()

    def _end_save(self, job: SaveJob) -> None:
        self._saving.pop(job.number, None)
        self._saved[job.number] = 1

    @staticmethod
    def _run(queue: "SimpleQueue[Job | None]", work: Callable[[Job], None]) -> None:
        while (job := queue.get()) is not None:
            try:
                work(job)
            except Exception:  # noqa: BLE001 -- this thread serves the engine for as long as that lives
                _log.exception("a transfer failed")


def _what_is_left(lease: Lease) -> int:
    """Blocks from the front that `copy_to` has filled although it could not fill all."""
    blocks = lease.blocks
    return blocks if lease.valid() else 0
