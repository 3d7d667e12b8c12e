"""The worker's half of the vLLM connector: bytes between the engine's memory and the daemon's.

    at once    LEASE and copy in the engine's thread, before the forward: for what takes no longer than a few ms; where
               both halves share a process it begins while the step is being planned (`vllm_early`);
               if so wished LEASE alone, and copy layer by layer while the forward runs (`vllm_layerwise`)
    loads      two threads: LEASE, copy; a third one for what comes from disk: copy each chunk while the daemon reads on
    saves      one thread, in order: RESERVE, copy into the ring, COMMIT; pins and words behind the saves they need

Whatever cannot be loaded is told to the engine block by block, and computed anew. Whatever cannot be stored is not.
The engine's thread waits for these threads in one case only: when blocks that are being saved are about to be used for
something else, it withdraws them (`Gate`), and waits for the copy that runs, a few ms at most.

Where the engine's memory is a GPU's, nothing begins while the step is planned, or goes layer by layer, and the client
copies on that GPU, when the engine's stream has come to where the copy was asked for (`vllm_device`).
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from kvclient.copying import Gate, WithdrawnError
from kvclient.integrations.vllm_early import EarlyLoads
from kvclient.integrations.vllm_jobs import LoadJob, PinJob, Plan, Progress, SaveJob, WordJob
from kvclient.integrations.vllm_layerwise import Layerwise, Leased, leased
from kvclient.integrations.vllm_layout import Layout
from kvclient.integrations.vllm_pace import Pace, Saved
from kvclient.lease import Lease
from kvclient.namespace import Namespace
from kvclient.results import Partial
from kvkernels.device.port import DeviceError
from kvproto.errors import KvError

if TYPE_CHECKING:
    from kvclient.integrations.vllm_device import EngineStream

_log = logging.getLogger(__name__)

AT_ONCE_WAIT_S: Final = 0.02  # what was there a moment ago and is not now is computed anew
AT_ONCE_S: Final = 0.04  # and what is left of a step's loads after so long, as well
READ_S: Final = 30.0  # how long a lease is held for copying
CLOSE_S: Final = 2.0  # how long a finished request's blocks wait for their saves
IDLE_S: Final = 0.001  # how long a step without a forward leaves the processor to the threads here
LOAD_S: Final = 0.005  # and while something is loaded: the time of some 50 MiB, after which the next step can run it
LOADERS: Final = 2  # threads that load out of memory; what waits for disk has a thread of its own
SHARED_BYTES: Final = 8 << 20  # loads of more are shared between them: one core copies half as fast as two
PIN_S: Final = 3.0  # how long a daemon that does not answer is asked to pin what a request is to keep,
PIN_PAUSE_S: Final = 0.05  # and how often
_UNANSWERED: Final = frozenset({Partial.TIMED_OUT, Partial.UNREACHABLE})
SOURCE: Final = "vllm priority"  # of words on blocks
SAVES_WAITING: Final = 256  # jobs; past that the daemon is too slow, and the newest are dropped


AfterSaves: TypeAlias = SaveJob | PinJob | WordJob
Job = TypeVar("Job", "Loading", AfterSaves)
Moved = TypeVar("Moved", LoadJob, SaveJob)


@dataclass(frozen=True, slots=True)
class Loading:
    """A load beside the forward, or a part of one."""

    job: LoadJob
    until: float  # how long it waits for disk; those before it in the queue may have waited for the same


@dataclass(slots=True)
class Saving:
    """A save that waits or runs."""

    job: SaveJob
    gate: Gate


class Worker:
    """One rank's. Methods on the engine's thread, but for the loops."""

    def __init__(
        self, quick: Namespace, patient: Namespace, layout: Layout, *, disk_wait_s: float, layerwise: bool = False,
        stream: "EngineStream | None" = None,
    ) -> None:  # fmt: skip
        """`quick`: a namespace of a client that waits for no answer longer than a scheduler may; `patient`: any.

        `stream`: what the engine computes on, if its memory is a device's.
        """
        assert (stream is None) == (layout.place is None), "memory of a device, and of nothing else, has a stream"
        self._quick = quick
        self._patient = patient
        self._layout = layout
        self._disk_wait_s = disk_wait_s
        self._stream = stream
        self.begins_early = stream is None  # loads begun early, or layer by layer, are copies of the processor's
        if layerwise and not self.begins_early:
            _log.warning(
                'kv_connector_extra_config: "layerwise" does nothing on a GPU, and has vLLM run CUDA graphs in pieces '
                "all the same: leave it out"
            )
        self._early = EarlyLoads(quick, layout, wait_s=AT_ONCE_WAIT_S, ttl_s=READ_S)
        self._pace = Pace()
        self._lock = threading.Condition()
        self._loads: SimpleQueue[Loading | None] = SimpleQueue()
        self._disk_loads: SimpleQueue[Loading | None] = SimpleQueue()
        self._saves: SimpleQueue[AfterSaves | None] = SimpleQueue()
        self._ended = threading.Event()
        self._parts: dict[str, int] = {}  # of each request's load, how many have not ended
        self._dropped: set[str] = set()  # requests that are gone: parts of theirs that have not begun never do,
        self._leases: dict[str, list[Lease]] = {}  # and those that run wait for nothing more
        self._received: set[str] = set()  # requests whose load has ended and that the engine does not know of yet
        self._bad_blocks: set[int] = set()  # of the engine, which it does not know of yet
        self._layers = Layerwise(layout) if layerwise and self.begins_early else None
        self._saving: dict[int, Saving] = {}  # by number
        self._saved: dict[int, int] = {}
        self._refused: set[int] = set()  # of these
        self._closing: dict[str, float] = {}  # requests, and until when their blocks wait for saves
        self._timed = 0  # of the step that has ended
        self._off = False  # for good: see `leave`
        self.counts: dict[str, float] = dict.fromkeys(
            ("loaded_blocks", "beside_blocks", "loaded_bytes", "load_seconds", "failed_blocks", "dropped_blocks",
             "saved_blocks", "known_blocks", "saved_bytes", "save_seconds", "refused_blocks",
             "pinned_bytes"), 0)  # fmt: skip
        self._threads = [
            threading.Thread(target=self._run, name="kvstored-load", args=(queue, self._load_aside), daemon=True)
            for queue in (*[self._loads] * LOADERS, self._disk_loads)
        ]
        self._threads.append(
            threading.Thread(target=self._run, name="kvstored-save", args=(self._saves, self._store), daemon=True)
        )
        for thread in self._threads:
            thread.start()

    # -- the engine's thread -------------------------------------------------------------------------------------

    def ask_early(self, request: str, keys: tuple[bytes, ...]) -> None:
        """A load that `begin_early` may follow for, within this planning."""
        self._early.ask(request, keys)

    def begin_early(self, job: LoadJob, fences: Collection[int]) -> None:
        """Start a load of the step that is being planned. Nothing runs that could read or write its blocks."""
        self._withdraw(fences)
        self._early.begin(job)

    def fence(self, plan: Plan) -> None:
        """A step begins: withdraw blocks that it writes again from saves that have not copied them yet."""
        self._withdraw(plan.fences)
        if plan.forward:
            self._pace.begin()

    def _withdraw(self, fences: Collection[int]) -> None:
        for number in fences:
            with self._lock:
                saving = self._saving.get(number)
            if saving is not None:
                saving.gate.close()

    def begin(self, plan: Plan) -> None:
        """Start the loads of a step: before its forward if some are at once, else vLLM asks for it behind that."""
        if plan.dropped:
            self._drop(plan.dropped)
        self._early.give_up_asked()
        until = time.monotonic() + AT_ONCE_S
        layer_by_layer: list[Leased] = []
        for job in self._marked(plan.loads):
            if not job.at_once:
                parts = self._shared(job)
                with self._lock:
                    self._parts[job.request] = self._parts.get(job.request, 0) + len(parts)
                for part in parts:
                    queue = self._disk_loads if part.from_disk else self._loads
                    queue.put(Loading(part, time.monotonic() + self._disk_wait_s))
            elif self._early.go_on(job):
                pass  # each layer waits for its own part
            elif (early := self._early.end(job)) is not None:
                self._note(job, *early)
            elif time.monotonic() >= until:  # a daemon that hangs must not hold up the engine longer
                self._note(job, 0, 0.0)
            elif self._layers is None:
                self._load(job, self._quick, AT_ONCE_WAIT_S)
            elif (held := self._lease(job)) is not None:
                layer_by_layer.append(held)
        if self._layers is not None:
            self._layers.begin(layer_by_layer)
        if any(job.at_once for job in plan.loads):
            self._pace.loaded()

    def _marked(self, jobs: Sequence[Moved]) -> Sequence[Moved]:
        """The same; if the engine's memory is a device's, behind all that was asked of the engine's stream so far."""
        if self._stream is None or not jobs:
            return jobs
        after = self._stream.mark()
        return [replace(job, after=after) for job in jobs]

    def wait_for_layer(self, layer: str) -> None:
        """Before this layer's memory is read."""
        self._early.wait(layer)
        if self._layers is not None:
            self._layers.wait(layer)

    def end(self, plan: Plan) -> None:
        """The forward is over: hear what it was loaded with, and save what earlier ones have computed."""
        self._pace.end()
        self._timed = plan.timed
        for held in self._layers.end() if self._layers is not None else ():
            self._note(held.job, held.blocks if held.good else 0, held.seconds)
        for load, blocks, seconds in self._early.end_forward():
            self._note(load, blocks, seconds, beside=blocks)
        for job in self._marked(plan.saves):
            with self._lock:
                # What a request had that is over may have been written by this very step: then it is a fence, too.
                crowded = self._off or len(self._saving) >= SAVES_WAITING or job.number in plan.fences
                if crowded:
                    self._end_save(job, refused=True)
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
        self._pace.idle()
        with self._lock:
            if self._parts:
                self._lock.wait_for(lambda: self._received, LOAD_S)
            elif self._closing:
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
        """Saves that have ended since the last time, whether the step was one that is timed, and of other weights."""
        timed, self._timed = self._timed, 0
        with self._lock:
            saved, self._saved = self._saved, {}
            refused, self._refused = self._refused, set()
        return Progress(saved, refused, timed, self._off) if saved or timed or self._off else None

    def leave(self) -> None:
        """The engine's weights will be others: no load is right any more, and nothing new is saved. Any thread."""
        self._off = True

    @property
    def saving(self) -> int:
        """Saves that have not ended."""
        return len(self._saving)

    def take_counts(self) -> dict[str, float]:
        """Totals since the last time; empty if nothing happened."""
        with self._lock:
            counts = {name: value for name, value in self.counts.items() if value}
            self.counts = dict.fromkeys(self.counts, 0)
        return counts

    def stop(self) -> None:
        """End all threads, and read and write the engine's memory no more."""
        self._ended.set()
        with self._lock:
            savings = list(self._saving.values())
        for saving in savings:
            saving.gate.close()
        self._drop(self._parts)
        for queue in (*[self._loads] * LOADERS, self._disk_loads):
            queue.put(None)
        self._saves.put(None)
        self._early.stop()
        if self._layers is not None:
            self._layers.stop()
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
        self._note(job, good, time.monotonic() - began)

    def _note(self, job: LoadJob, good: int, seconds: float, *, beside: int = 0) -> None:
        """So many blocks from the front were filled, and are right; `beside` of them while the forward ran."""
        if self._off:
            good = 0
        if job.tried and good == len(job.keys) and seconds > 0 and not job.from_disk:
            namespace = self._quick if job.at_once else self._patient
            # Decoding says little about memory.
            with contextlib.suppress(KvError):  # such as of a client that is being closed
                if namespace.codec is None:
                    namespace.report_load("dram", good * self._layout.block_bytes, seconds)
        with self._lock:
            dropped = job.request in self._dropped  # nobody asks for these
            if not dropped:
                self._bad_blocks.update(job.block_ids[good:])
            self.counts["loaded_blocks"] += good
            self.counts["beside_blocks"] += beside
            self.counts["loaded_bytes"] += good * self._layout.block_bytes
            self.counts["dropped_blocks" if dropped else "failed_blocks"] += len(job.keys) - good
            self.counts["load_seconds"] += seconds

    def _copy(self, job: LoadJob, namespace: Namespace, wait_s: float) -> int:
        """How many blocks from the front are filled and right."""
        with namespace.fetch(job.keys, wait_s=wait_s, ttl_s=READ_S) as lease:
            if lease.expected == 0 or not self._goes_on(job, lease):
                return 0
            targets = self._layout.scattered(job.block_ids[: lease.expected], job.after)
            if lease.copy_to(targets):
                return lease.expected
            if targets.device is not None and not targets.device.finish():
                return 0  # the device has failed: nobody knows what it has filled, however good the lease is
            return _what_is_left(lease)

    def _lease(self, job: LoadJob) -> Leased | None:
        """Hold the blocks of a job, to be copied layer by layer; what is not there is bad already."""
        try:
            held = leased(job, self._quick.fetch(job.keys, wait_s=AT_ONCE_WAIT_S, ttl_s=READ_S))
        except Exception:  # noqa: BLE001 -- as above
            _log.exception("lease of %d blocks failed", len(job.keys))
            self._note(job, 0, 0.0)
            return None
        return held

    def _shared(self, job: LoadJob) -> list[LoadJob]:
        """A job in as many parts as there are threads, if it is large and lies in memory."""
        if job.from_disk or len(job.keys) * self._layout.block_bytes < SHARED_BYTES:
            return [job]
        each = -(-len(job.keys) // LOADERS)
        return [
            replace(job, keys=job.keys[at : at + each], block_ids=job.block_ids[at : at + each])
            for at in range(0, len(job.keys), each)
        ]

    def _goes_on(self, job: LoadJob, lease: Lease) -> bool:
        """Is this load still wanted? If it is beside the forward, `_drop` can end it from here on."""
        if job.at_once:
            return True
        with self._lock:
            self._leases.setdefault(job.request, []).append(lease)
            return job.request not in self._dropped

    def _drop(self, requests: Collection[str]) -> None:
        """Nobody wants these loads any more: what has not begun never does, what runs waits for no more blocks."""
        with self._lock:
            dropped = [request for request in requests if request in self._parts]
            self._dropped.update(dropped)
            leases = [lease for request in dropped for lease in self._leases.get(request, ())]
        for lease in leases:
            lease.give_up()

    def _load_aside(self, loading: Loading) -> None:
        part = loading.job
        if part.request in self._dropped:
            self._note(part, 0, 0.0)
        else:
            self._load(part, self._patient, max(0.0, loading.until - time.monotonic()))
        with self._lock:
            self._parts[part.request] -= 1
            if self._parts[part.request]:
                return
            del self._parts[part.request]
            self._leases.pop(part.request, None)
            self._dropped.discard(part.request)
            self._received.add(part.request)
            self._lock.notify_all()

    # -- saving --------------------------------------------------------------------------------------------------

    def _store(self, job: AfterSaves) -> None:
        if isinstance(job, PinJob):
            pinned_bytes = self._pin(job)
            with self._lock:
                self.counts["pinned_bytes"] += pinned_bytes
            return
        if isinstance(job, WordJob):
            self._patient.expect(job.keys, job.expectation, SOURCE)
            return
        saving, saved = self._saving[job.number], Saved()
        try:
            self._pace.save(self._patient, self._layout, job, saving.gate, saved, lambda: self._is_urgent(saving))
        except WithdrawnError:
            pass
        except DeviceError as error:
            _log.warning("a save of %d blocks failed: %s", len(job.keys), error)
        finally:
            with self._lock:
                self.counts["saved_blocks"] += saved.accepted
                self.counts["known_blocks"] += saved.known
                self.counts["refused_blocks"] += len(job.keys) - saved.accepted - saved.known
                self.counts["saved_bytes"] += saved.accepted * self._layout.block_bytes
                self.counts["save_seconds"] += saved.seconds
                self._end_save(job, refused=saved.short)
                self._lock.notify_all()

    def _pin(self, job: PinJob) -> int:
        """Pin a context, as much of it as is there; the bytes. A daemon that does not answer is asked again, unless
        something waits behind this: blocks of finished requests stay until they are saved."""
        until = time.monotonic() + PIN_S
        while True:
            pinned = self._patient.pin(job.keys, ttl_s=job.ttl_s, retention=job.retention)
            again = pinned.partial in _UNANSWERED and time.monotonic() < until and self._saves.empty()
            if not again or self._ended.wait(PIN_PAUSE_S):
                break
            self._patient.unpin(pinned)  # the next one begins anew
        if pinned.partial:
            _log.info("pinned %d of %d blocks: %s", pinned.blocks, len(job.keys), pinned.partial)
        return pinned.bytes_pinned

    def _is_urgent(self, saving: Saving) -> bool:
        """Does somebody wait for this save, or for one behind it, or is it not wanted any more?"""
        return saving.gate.closed or bool(self._closing) or len(self._saving) > SAVES_WAITING // 2

    def _end_save(self, job: SaveJob, *, refused: bool) -> None:
        self._saving.pop(job.number, None)
        self._saved[job.number] = 1
        if refused:
            self._refused.add(job.number)

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
