"""Loads that a step needs, begun while the engine still prepares it, and over no sooner than its layers want them.

    scheduler  matched   ----> LEASE, whose answer comes meanwhile
               allocated ----> the first part to a thread of its own
    engine     metadata, input tensors: a millisecond or more of Python, in which nothing touches the new blocks
    worker     begin     ----> may the forward begin meanwhile? If not, the engine's thread does from the back what the
                               other has not begun from the front
    forward    each layer ---> its part: done by now, or waited for, or done here if nobody has begun it
    worker     end       ----> was the lease valid to the last byte, and has every layer asked? Else all of it is bad

Only where both halves of the connector live in one process (vLLM on CPU starts its worker apart, unless
VLLM_ENABLE_V1_MULTIPROCESSING is 0), and where the engine itself writes nothing into new blocks before the forward. A
thread that copies needs the GIL to begin and to end a part, and the engine's thread seldom gives it away while it
computes; so it waits, shortly, until the first part has begun.

Whether layers ask is seen, not believed (`Asking`): a forward that was captured as a whole asks for none. Loads go on
beside a forward once one has been seen in which every layer asked, and never again after one in which some did not.
Parts are then layers of all blocks, the first layers first; before that, and where maps are not populated, blocks.
"""

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Final, NamedTuple

import numpy as np

from kvclient.integrations.vllm_copies import Asking, Copy, copy_pieces
from kvclient.integrations.vllm_jobs import LoadJob
from kvclient.integrations.vllm_layout import Layout
from kvclient.lease import TIMED_EACH, Lease
from kvclient.namespace import Namespace
from kvkernels.libc import Addresses, current_cpu
from kvproto.errors import KvError

_log = logging.getLogger(__name__)

LEAST_BYTES: Final = 1 << 20  # what takes less than a tenth of a millisecond is not worth a thread's waking
PART_BYTES: Final = 6 << 20  # half a millisecond
FIRST_BYTES: Final = 2 << 20  # of the first part of layers: the time that it takes a thread to wake up
BEGIN_S: Final = 0.0005  # how long the engine's thread waits for the other to begin
NAP_S: Final = 0.00002
STOP_S: Final = 10.0


@dataclass(slots=True)
class Begun:
    """A load that was begun early."""

    job: LoadJob
    lease: Lease
    copies: Sequence[Copy]
    since: float
    part_of: Sequence[int] = ()  # by layer, in the order of the layout: its part; nothing if parts are blocks
    bad: bool = field(default=False)
    ready: float = field(default_factory=time.monotonic)  # to be copied

    def finish(self) -> bool:
        """Do what nobody has begun, from the back, and wait for the rest. Is all of it filled, and right?"""
        for each in reversed(self.copies):
            each.run()
        filled = [each.good() for each in self.copies]  # none of them still runs
        # A forward may take longer than a lease; what counts is when the last byte was read.
        return all(filled) and self.lease.was_valid(max(each.ended_ns for each in self.copies)) and not self.bad

    def seconds(self) -> float:
        """What it took, without the forward that it went on beside. Once it is finished."""
        copying = sum(each.seconds for each in self.copies)
        return min(time.monotonic() - self.since, self.ready - self.since + copying)


class Asked(NamedTuple):
    """A lease whose answer nobody has read yet."""

    keys: tuple[bytes, ...]
    lease: Callable[[], Lease]


class EarlyLoads:
    """Of one worker. Methods on the engine's thread."""

    def __init__(self, namespace: Namespace, layout: Layout, *, wait_s: float, ttl_s: float) -> None:
        """`wait_s`, `ttl_s`: as of `Namespace.fetch`, which is asked on the engine's thread."""
        self._namespace = namespace
        self._layout = layout
        self._wait_s = wait_s
        self._ttl_s = ttl_s
        pieces = list(dict.fromkeys(layout.layers.values()))  # some layers share another's memory
        self._layer_of = {name: pieces.index(piece) for name, piece in layout.layers.items()}
        self._columns = np.array(pieces, dtype=np.uint64).T[:, :, None]  # base, stride, length and start of each layer
        self._lengths = [piece.length for piece in pieces]
        self._asking = Asking(len(pieces))
        self._asked: dict[str, Asked] = {}  # by request
        self._begun: dict[str, Begun] = {}  # the same
        self._beside: list[Begun] = []  # the forward of this step
        self._ended = 0
        self._copies: SimpleQueue[Copy | None] = SimpleQueue()
        self._thread: threading.Thread | None = None  # an engine whose halves are apart never needs it
        self._processors: set[int] = set()  # that it may have,
        self._avoided = -1  # but for this one

    # -- before the forward --------------------------------------------------------------------------------------

    def ask(self, request: str, keys: tuple[bytes, ...]) -> None:
        """A load of these is about to `begin`, if there is memory for it: ask for the lease. May do nothing."""
        self._cancel(request)
        if len(keys) * self._layout.block_bytes < LEAST_BYTES:
            return
        try:
            lease = self._namespace.start_fetch(keys, wait_s=self._wait_s, ttl_s=self._ttl_s)
        except Exception:  # noqa: BLE001 -- it is tried again before the forward, and then counts
            _log.exception("early lease of %d blocks failed", len(keys))
            return
        self._asked[request] = Asked(keys, lease)

    def begin(self, job: LoadJob) -> None:
        """Nothing reads or writes the blocks of this load from now on, until it has ended. May do nothing."""
        asked = self._asked.get(job.request)
        if asked is None or asked.keys != job.keys:
            self.ask(job.request, job.keys)  # which gives up what there was
        asked = self._asked.get(job.request)
        if asked is None:
            return
        since = time.monotonic()
        try:
            # What can be done until the answer is there.
            targets = self._targets(self._layout.checked(job.block_ids)) if self._asking.is_sure else None
            del self._asked[job.request]  # whose lease is given back from here on
            lease = asked.lease()
        except Exception:  # noqa: BLE001 -- it is tried again before the forward, and then counts
            _log.exception("early load of %d blocks failed", len(job.keys))
            return
        try:
            begun = self._of_layers(job, lease, targets, since) if targets is not None else None
            begun = begun or self._of_blocks(job, lease, since)
        except Exception:  # noqa: BLE001 -- the same
            _log.exception("early load of %d blocks failed", len(job.keys))
            lease.release()
            return
        if not begun.copies:  # some have yet to come from disk
            lease.release()
            return
        self._begun[job.request] = begun
        self._start(begun.copies)

    def _of_blocks(self, job: LoadJob, lease: Lease, since: float) -> Begun:
        targets = self._layout.scattered(job.block_ids[: lease.expected])
        parts = -(-len(job.keys) * self._layout.block_bytes // PART_BYTES)
        return Begun(job, lease, [Copy(each) for each in lease.copyings(targets, parts)], since)

    def _of_layers(self, job: LoadJob, lease: Lease, targets: Addresses, since: float) -> Begun | None:
        """In parts of layers, the first ones first; None where that is not the way."""
        sources = lease.sources()
        if not sources:
            return None
        targets = targets[:, : len(sources)]
        found = targets.copy()
        found[:, :, 0] = self._columns[3] + np.array(sources, dtype=np.uint64)
        part_of, first = self._parts(len(sources)), 0
        copies = []
        for layers in Counter(part_of).values():  # neighbours
            pieces = (each[first : first + layers].reshape(-1, 2) for each in (targets, found))
            copies.append(Copy(partial(copy_pieces, *pieces)))
            first += layers
        return Begun(job, lease, copies, since, part_of)

    def _targets(self, block_ids: Sequence[int]) -> Addresses:
        """Shape (layers, blocks, 2): address and bytes."""
        base, stride, length, _ = self._columns
        targets = np.empty((len(base), len(block_ids), 2), dtype=np.uint64)
        targets[:, :, 0] = base + stride * np.array(block_ids, dtype=np.uint64)
        targets[:, :, 1] = length
        return targets

    def _parts(self, blocks: int) -> Sequence[int]:
        """By layer: its part. Neighbours share one until that is large enough for a thread's while."""
        part_of: list[int] = []
        part, part_bytes, enough = 0, 0, FIRST_BYTES
        for length in self._lengths:
            part_of.append(part)
            part_bytes += length * blocks
            if part_bytes >= enough:
                part, part_bytes, enough = part + 1, 0, PART_BYTES
        return part_of

    def end(self, job: LoadJob) -> tuple[int, float] | None:
        """Blocks from the front that are filled and right, and seconds that it took; None if `begin` did nothing."""
        begun = self._begun.get(job.request)
        if begun is None or begun.job != job:
            self._cancel(job.request)
            return None
        del self._begun[job.request]
        return self._over(begun)

    def _over(self, begun: Begun) -> tuple[int, float]:
        with begun.lease as lease:
            good = begun.finish()
            if good:
                self._report(lease.expected, begun)
            return (lease.expected if good else 0), begun.seconds()

    # -- beside it -----------------------------------------------------------------------------------------------

    def go_on(self, job: LoadJob) -> bool:
        """May the forward begin although this load is not over? Then `wait` and `end_forward` are its ends."""
        begun = self._begun.get(job.request)
        if begun is None or begun.job != job or not begun.part_of or not self._asking.is_sure:
            return False
        if not self._beside:
            self._asking.forget()
        self._beside.append(self._begun.pop(job.request))
        return True

    def wait(self, layer: str) -> None:
        """Until this layer of all blocks is filled, or never will be; for an unknown one, until all are."""
        number = self._layer_of.get(layer, -1)
        self._asking.note(number)
        for begun in self._beside:
            part = begun.part_of[number] if number >= 0 else len(begun.copies) - 1
            first = 0 if number < 0 else part
            for each in begun.copies[first : part + 1]:
                each.run()
            if not begun.copies[part].is_over and part + 1 < len(begun.copies):
                begun.copies[part + 1].run()  # instead of waiting
            for each in begun.copies[first : part + 1]:
                each.good()

    def end_forward(self) -> Iterator[tuple[LoadJob, int, float]]:
        """The forward is over: loads that went on beside it, how many blocks are filled and right, seconds."""
        if not self._beside:
            self._asking.end(relied_on=False)
            return
        beside, self._beside = self._beside, []
        asked_all = self._asking.end(relied_on=True)
        for begun in beside:
            begun.bad |= not asked_all  # it has read what may not have been there
            yield begun.job, *self._over(begun)

    # -- below them ----------------------------------------------------------------------------------------------

    def _report(self, blocks: int, begun: Begun) -> None:
        """Tell the daemon now and then how fast its memory is read, as `Lease.copy_to` does."""
        self._ended += 1
        if self._ended % TIMED_EACH == 0 and self._namespace.codec is None:  # decoding says little about memory
            seconds = sum(each.seconds for each in begun.copies)
            with contextlib.suppress(KvError):  # such as of a client that is being closed
                self._namespace.report_load("dram", blocks * self._layout.block_bytes, seconds)

    def give_up_asked(self) -> None:
        """A step begins: what was asked for and not begun by now found no memory."""
        for request in list(self._asked):
            self._cancel(request)

    def stop(self) -> None:
        """Copy nothing any more."""
        self.give_up_asked()
        self._begun |= {begun.job.request: begun for begun in self._beside}
        self._beside = []
        for request in list(self._begun):
            self._cancel(request)
        if self._thread is not None:
            self._copies.put(None)
            self._thread.join(timeout=STOP_S)

    def _cancel(self, request: str) -> None:
        """A step that was planned and never came."""
        asked = self._asked.pop(request, None)
        if asked is not None:
            with contextlib.suppress(KvError):
                asked.lease().release()
        begun = self._begun.pop(request, None)
        if begun is not None:
            for each in begun.copies:
                each.cancel()
            begun.lease.release()

    def _start(self, copies: Sequence[Copy]) -> None:
        if self._thread is None and not self._start_thread():
            return  # the engine's thread does all of it
        self._step_aside()
        for each in copies:
            self._copies.put(each)
        # Not woken by the other thread: that would often be where that one runs, and then have to wait for its end.
        until = time.monotonic() + BEGIN_S
        while not copies[0].begun.is_set() and time.monotonic() < until:
            time.sleep(NAP_S)

    def _start_thread(self) -> bool:
        thread = threading.Thread(target=self._run, name="kvstored-early", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads for this process; perhaps next time
            _log.warning("early loads have no thread of their own: %s", error)
            return False
        self._thread = thread
        with contextlib.suppress(OSError):  # where that may not be asked it stays where it is
            self._processors = os.sched_getaffinity(thread.native_id or 0)
        return True

    def _step_aside(self) -> None:
        """Keep the other thread off this one's processor: the kernel lets a copy there go on for milliseconds."""
        assert self._thread is not None
        mine = current_cpu()
        if mine != self._avoided and (others := self._processors - {mine}):
            with contextlib.suppress(OSError):  # what processors there are has changed
                os.sched_setaffinity(self._thread.native_id or 0, others)
            self._avoided = mine

    def _run(self) -> None:
        while (each := self._copies.get()) is not None:
            each.run()
