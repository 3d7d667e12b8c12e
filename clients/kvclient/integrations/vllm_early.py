"""Loads that must be over before a step's forward, begun while the engine still prepares that step.

    scheduler  allocated ----> LEASE; the first part to a thread of its own
    engine     metadata, input tensors: a millisecond or more of Python, in which nothing touches the new blocks
    worker     begin     ----> does from the back what the thread has not begun from the front; was the lease valid?

Only where both halves of the connector live in one process, and where the engine itself writes nothing into new
blocks before the forward. A thread that copies needs the GIL to begin and to end a part, and the engine's thread
seldom gives it away while it computes; so it waits, shortly, until the first part has begun.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from kvclient.integrations.vllm_jobs import LoadJob
from kvclient.integrations.vllm_layout import Layout
from kvclient.lease import TIMED_EACH, Lease
from kvclient.namespace import Namespace
from kvproto.errors import KvError

_log = logging.getLogger(__name__)

LEAST_BYTES: Final = 1 << 20  # what takes less than a tenth of a millisecond is not worth a thread's waking
PART_BYTES: Final = 6 << 20  # half a millisecond
BEGIN_S: Final = 0.0005  # how long the engine's thread waits for the other to begin
STOP_S: Final = 10.0


class Copy:
    """One part's copy: done once, by whoever takes it first."""

    def __init__(self, copying: Callable[[], None]) -> None:
        self._copying = copying
        self._taken = threading.Lock()
        self._good = False
        self.seconds = 0.0
        self.begun = threading.Event()
        self._ended = threading.Event()

    def run(self) -> None:
        """Do it, unless somebody has begun. Never raises."""
        if not self._taken.acquire(blocking=False):
            return
        self.begun.set()
        began = time.monotonic()
        try:
            self._copying()
            self._good, self.seconds = True, time.monotonic() - began
        except Exception:  # noqa: BLE001 -- `good` says so, and the blocks are computed
            _log.exception("a copy failed")
        finally:
            self._ended.set()

    def cancel(self) -> None:
        """Never do it, or wait until it is over."""
        if self._taken.acquire(blocking=False):
            self._ended.set()
        self._ended.wait()

    def good(self) -> bool:
        """Wait until it is over: was all copied?"""
        self._ended.wait()
        return self._good


@dataclass(slots=True)
class Begun:
    """A load that was begun early."""

    job: LoadJob
    lease: Lease
    copies: Sequence[Copy]
    since: float


class EarlyLoads:
    """Of one worker. Methods on the engine's thread."""

    def __init__(self, namespace: Namespace, layout: Layout, *, wait_s: float, ttl_s: float) -> None:
        """`wait_s`, `ttl_s`: as of `Namespace.fetch`, which is asked on the engine's thread."""
        self._namespace = namespace
        self._layout = layout
        self._wait_s = wait_s
        self._ttl_s = ttl_s
        self._begun: dict[str, Begun] = {}  # by request
        self._ended = 0
        self._copies: SimpleQueue[Copy | None] = SimpleQueue()
        self._thread: threading.Thread | None = None  # an engine whose halves are apart never needs it

    def begin(self, job: LoadJob) -> None:
        """Nothing reads or writes the blocks of this load from now on, until `end`. May do nothing."""
        load_bytes = len(job.keys) * self._layout.block_bytes
        self._cancel(job.request)  # a step that was planned and never came
        if load_bytes < LEAST_BYTES:
            return
        since = time.monotonic()
        try:
            lease = self._namespace.fetch(job.keys, wait_s=self._wait_s, ttl_s=self._ttl_s)
        except Exception:  # noqa: BLE001 -- it is tried again before the forward, and then counts
            _log.exception("early load of %d blocks failed", len(job.keys))
            return
        try:
            targets = self._layout.scattered(job.block_ids[: lease.expected])
            copyings = lease.copyings(targets, parts=-(-load_bytes // PART_BYTES))
        except BaseException:
            lease.release()
            raise
        if not copyings:  # some have yet to come from disk
            lease.release()
            return
        copies = [Copy(copying) for copying in copyings]
        self._begun[job.request] = Begun(job, lease, copies, since)
        self._start(copies)

    def end(self, job: LoadJob) -> tuple[int, float] | None:
        """Blocks from the front that are filled and right, and seconds since `begin`; None if that did nothing."""
        begun = self._begun.get(job.request)
        if begun is None or begun.job != job:
            self._cancel(job.request)
            return None
        del self._begun[job.request]
        with begun.lease as lease:
            for copy in reversed(begun.copies):
                copy.run()
            filled = [copy.good() for copy in begun.copies]  # none of them still runs
            good = all(filled) and lease.valid()
            if good:
                self._report(lease.expected, begun)
            return (lease.expected if good else 0), time.monotonic() - begun.since

    def _report(self, blocks: int, begun: Begun) -> None:
        """Tell the daemon now and then how fast its memory is read, as `Lease.copy_to` does."""
        self._ended += 1
        if self._ended % TIMED_EACH == 0:
            seconds = sum(copy.seconds for copy in begun.copies)
            with contextlib.suppress(KvError):  # such as of a client that is being closed
                self._namespace.report_load("dram", blocks * self._layout.block_bytes, seconds)

    def stop(self) -> None:
        """Copy nothing any more."""
        for request in list(self._begun):
            self._cancel(request)
        if self._thread is not None:
            self._copies.put(None)
            self._thread.join(timeout=STOP_S)

    def _cancel(self, request: str) -> None:
        begun = self._begun.pop(request, None)
        if begun is not None:
            for copy in begun.copies:
                copy.cancel()
            begun.lease.release()

    def _start(self, copies: Sequence[Copy]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvstored-early", daemon=True)
            self._thread.start()
        for copy in copies:
            self._copies.put(copy)
        copies[0].begun.wait(BEGIN_S)

    def _run(self) -> None:
        while (copy := self._copies.get()) is not None:
            copy.run()
