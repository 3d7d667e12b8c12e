"""vLLM's second tier: models with several kinds of KV memory (sliding windows, recurrent states) share the store too.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvstoredTieringConnector", "kv_role": "kv_both",
      "kv_connector_module_path": "kvclient.integrations.vllm_tier", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 8589934592, "secondary_tiers": [
          {"type": "KvstoredTier", "module_path": "kvclient.integrations.vllm_tier"}]}}'

vLLM's own offloading connector does the work: it copies blocks to its first tier, in memory of the CPU
(`cpu_bytes_to_use`), and hands them on from there. This file is its second tier. A tier takes the entries of
`vllm_settings.Settings` that concern it: `runtime_dir`, `tenant`, `revision`, `lookup_timeout_ms`, `disk_wait_s`,
`store`, `any_version`. Of `kv_transfer_params={"kvstored": {...}}` a request's `load` and `store` count.

    scheduler's thread            lookups' thread          loads' thread            stores' thread
    lookup: a name is noted -->   MATCH, once a step
    submit_load ---------------------------------------->  LEASE, copy into tier one
    submit_store ----------------------------------------------------------------->  RESERVE, copy out, COMMIT
    get_finished_jobs  <---------------------------------  names that are filled  <--

A chunk that did not come is reported as not loaded: vLLM drops its row and computes, and the request does not ask for
it again. Only the connector knows the engine's configuration, and with it what its bytes depend on, so a tier that
another connector makes refuses to.
"""

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import get_sliding_window_size_in_chunks
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    LookupResult,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvclient.client import Client, connect
from kvclient.integrations.vllm_identity import engine_identity, engine_trouble, namespace_of
from kvclient.integrations.vllm_settings import Settings, wishes_of
from kvclient.integrations.vllm_tier_chunks import Chunk, Chunks, Group
from kvproto.errors import UsageError
from kvproto.frames import Role

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_log = logging.getLogger(__name__)
_making = threading.local()  # `engine`: of the connector that this thread is making right now

STORES_WAITING: Final = 64  # jobs; past that the newest are given up, since each holds rows of the first tier
STOP_S: Final = 15.0  # a thread ends sooner: every call has its deadline


class KvstoredTieringConnector(OffloadingConnector):
    """vLLM's own connector, whose second tier is the daemon. Raises UsageError at start."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: Any) -> None:
        _making.engine = (vllm_config, kv_cache_config)
        try:
            super().__init__(vllm_config, role, kv_cache_config)
        finally:
            del _making.engine
        scheduler = self.connector_scheduler
        tiers = getattr(scheduler.manager, "secondary_tiers", ()) if scheduler is not None else ()
        self._tiers = [tier for tier in tiers if isinstance(tier, KvstoredTier)]
        if scheduler is not None and not self._tiers:
            raise UsageError('kv_connector_extra_config has no KvstoredTier among its "secondary_tiers"')

    def on_new_request(self, request: Any) -> None:
        """A request has come. Images and adapters are known to vLLM by names that others may have, too."""
        super().on_new_request(request)
        if getattr(request, "mm_features", None) or getattr(request, "lora_request", None):
            for tier in self._tiers:
                tier.leave_out(request.request_id)

    def reset_cache(self) -> bool | None:
        """Asked for when weights have changed: what is stored belongs to the old ones."""
        for tier in self._tiers:
            tier.leave()
        done: bool | None = super().reset_cache()
        return done


@dataclass(slots=True)
class _Request:
    load: bool
    store: bool
    keys: dict[tuple[int, int], bytes] = field(default_factory=dict)  # by group and end


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    chunks: tuple[Chunk, ...]
    is_load: bool


class _Lookups(AsyncLookupManager):
    """vLLM's bookkeeping of lookups; the asking is ours, in its thread."""

    def __init__(self, tier_type: str, present: Callable[[Any, Any], set[bytes]]) -> None:
        self._present = present
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[Any], req_context: Any) -> Iterable[bool]:
        """One for each."""
        there = self._present(keys, req_context)
        return [key in there for key in keys]


class KvstoredTier(SecondaryTierManager):
    """See the module. All public methods on the scheduler's thread; none but `drain_jobs` and `shutdown` waits."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        **given: Any,
    ) -> None:
        """`given`: what the user says of this tier. Raises UsageError."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._settings = Settings.parse(given)
        if self._settings.codec != "raw":
            raise UsageError('"codec" is for KvstoredConnector: what lies in a chunk of this tier is not known here')
        engine = getattr(_making, "engine", None)
        if engine is None:
            raise UsageError(f'KvstoredTier needs "kv_connector": "KvstoredTieringConnector", of the module {__name__}')
        config, kv_cache_config = engine
        if trouble := engine_trouble(config, any_version=self._settings.any_version):
            raise UsageError(trouble)
        self._off = False
        self._requests: dict[str, _Request] = {}
        self._clients: list[Client] = []
        try:
            groups = self._groups(config, kv_cache_config)
        except UsageError:
            self._close()
            raise
        self._tokens = {number: group.tokens for number, group in groups.items()}
        self._chunks = Chunks(
            groups, np.asarray(primary_kv_view), disk_wait_s=self._settings.disk_wait_s, patience_s=self._patience_s
        )
        self._lock = threading.Condition()
        self._waiting: dict[bool, deque[_Job | None]] = {True: deque(), False: deque()}  # by whether they load
        self._running = 0
        self._finished: list[JobResult] = []
        self._unfilled: list[bytes] = []  # names
        self._lookups = _Lookups(tier_type, self._present)
        self._threads = [
            threading.Thread(target=self._run, name=f"kvstored-tier-{name}", args=(is_load,), daemon=True)
            for name, is_load in (("load", True), ("store", False))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def _patience_s(self) -> float:
        return self._settings.lookup_timeout_ms / 1000

    def _groups(self, config: "VllmConfig", kv_cache_config: Any) -> dict[int, Group]:
        settings, spec = self._settings, self._offloading_spec
        for name, timeout_s, role in (("lookups", self._patience_s, Role.TOOL), ("blocks", 1.0, Role.ENGINE)):
            self._clients.append(
                connect(
                    settings.runtime_dir, name=f"vllm tier {name}", tenant=settings.tenant,
                    timeout_s=timeout_s, role=role,
                )
            )  # fmt: skip
        groups = {}
        words = _layout(spec, kv_cache_config, self.block_size_bytes)
        for group in spec.config.groups:
            kind = kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec
            tokens = group.tokens_per_block * spec.blocks_per_chunk
            identity = engine_identity(
                config,
                layout=f"tier chunk of group {group.group_id} {words}",
                dtype=getattr(kind, "dtype", ""),
                block_tokens=tokens,
                block_bytes=self.block_size_bytes,
                revision=settings.revision,
                tp=(0, int(spec.config.parallel.tp_size)),
            )
            quick, patient = (namespace_of(client, identity) for client in self._clients)
            whole = get_sliding_window_size_in_chunks(kind, tokens) is None
            groups[group.group_id] = Group(quick, patient, tokens, whole)
        return groups

    # -- requests ------------------------------------------------------------------------------------------------

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """A request has come."""
        wishes = wishes_of(req_context.kv_transfer_params)
        self._requests[req_context.req_id] = _Request(wishes.load, wishes.store and self._settings.store)
        return RequestOffloadingContext()

    def leave_out(self, request_id: str) -> None:
        """Neither load nor store for this one."""
        request = self._requests[request_id]
        request.load = request.store = False

    def leave(self) -> None:
        """The engine's weights may be others from now on, and nobody can tell: load and store nothing any more."""
        self._off = True
        _log.warning("the store is not used any more by this engine: its caches were reset, perhaps for other weights")

    def on_request_finished(self, req_context: Any) -> None:
        """No call for it follows."""
        self._requests.pop(req_context.req_id, None)
        self._lookups.cleanup(req_context.req_id)

    def lookup(self, key: Any, req_context: Any) -> LookupResult:
        """Whether a chunk is there: "ask again" the first time."""
        request = self._requests.get(req_context.req_id)
        if self._off or request is None or not request.load:
            return LookupResult.MISS
        end = req_context.get_offload_key_position(key)
        if end is not None:
            request.keys[get_offload_group_idx(key), end] = get_offload_block_hash(key)
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def _present(self, keys: Sequence[Any], req_context: Any) -> set[bytes]:
        """In the thread of lookups."""
        return self._chunks.present(_chunk(key, req_context) for key in keys)

    def on_schedule_end(self, _context: Any) -> None:
        """A step is planned: ask what was noted in it."""
        self._lookups.flush()

    # -- jobs ----------------------------------------------------------------------------------------------------

    def submit_load(self, job_metadata: Any) -> None:
        """Fill rows of the first tier."""
        self._submit(self._job(job_metadata, is_load=True))

    def submit_store(self, job_metadata: Any) -> None:
        """Store rows of the first tier; they stay as they are until the job is reported."""
        request = self._requests.get(job_metadata.req_context.req_id)
        job = self._job(job_metadata, is_load=False)
        if self._off or request is None or not request.store:
            self._finish(job, set(), 0.0, stored=0)
            return
        for chunk in job.chunks:
            request.keys[chunk.group, chunk.end] = chunk.key
        parents = (request.keys.get((chunk.group, chunk.end - self._tokens[chunk.group])) for chunk in job.chunks)
        chunks = (replace(chunk, parent=parent) for chunk, parent in zip(job.chunks, parents, strict=True))
        self._submit(replace(job, chunks=tuple(chunks)))

    def _job(self, given: Any, *, is_load: bool) -> _Job:
        rows = zip(given.keys, given.chunk_ids, strict=True)
        chunks = tuple(_chunk(key, given.req_context, int(row)) for key, row in rows)
        return _Job(given.job_id, chunks, is_load)

    def _submit(self, job: _Job) -> None:
        with self._lock:
            waiting = self._waiting[job.is_load]
            crowded = not job.is_load and len(waiting) >= STORES_WAITING
            if not crowded:
                waiting.append(job)
                self._lock.notify_all()
        if crowded:
            self._finish(job, set(), 0.0, stored=0)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Since the last time. What could not be loaded is a miss from here on, else it would be tried for ever."""
        with self._lock:
            finished, self._finished = self._finished, []
            unfilled, self._unfilled = self._unfilled, []
        self._lookups.mark_miss(unfilled)
        return finished

    def _run(self, is_load: bool) -> None:
        """One of the two threads."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: bool(self._waiting[is_load]))
                job = self._waiting[is_load].popleft()
                self._running += job is not None
            if job is None:
                return
            self._work(job)
            with self._lock:
                self._running -= 1
                self._lock.notify_all()

    def _work(self, job: _Job) -> None:
        began = time.monotonic()
        good: set[bytes] = set()
        stored = 0
        try:
            if job.is_load:
                good = self._chunks.load(job.chunks)
            else:
                stored = self._chunks.store(job.chunks)
        except Exception:  # noqa: BLE001 -- whatever it was, the engine must hear that the job is over
            _log.exception("a transfer of %d chunks failed", len(job.chunks))
        self._finish(job, good, time.monotonic() - began, stored=stored)

    def _finish(self, job: _Job, good: Collection[bytes], seconds: float, *, stored: int) -> None:
        """Any thread."""
        done = len(good) if job.is_load else stored
        result = JobResult(
            job.number,
            success=done == len(job.chunks),
            successful_keys=tuple(good) if job.is_load and good else None,
            transfer_time=seconds,
            transfer_bytes=done * self.block_size_bytes,
        )
        with self._lock:
            self._finished.append(result)
            if job.is_load:
                self._unfilled += [chunk.name for chunk in job.chunks if chunk.name not in good]

    def _cancel(self) -> list[_Job]:
        """Jobs that have not begun are over."""
        with self._lock:
            jobs = [job for waiting in self._waiting.values() for job in waiting if job is not None]
            for waiting in self._waiting.values():
                waiting.clear()
        return jobs

    def drain_jobs(self) -> None:
        """Wait until nothing touches the first tier; what has not begun is given up."""
        for job in self._cancel():
            self._finish(job, set(), 0.0, stored=0)
        with self._lock:
            self._lock.wait_for(lambda: self._running == 0)

    def shutdown(self) -> None:
        """End all threads, and let go of the first tier. Raises RuntimeError if one still uses it."""
        self._cancel()
        with self._lock:
            for waiting in self._waiting.values():
                waiting.append(None)
            self._lock.notify_all()
        self._lookups.shutdown()
        for thread in self._threads:
            thread.join(timeout=STOP_S)
        if any(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a transfer has not ended")
        self._chunks.forget_memory()
        self._close()

    def _close(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()


def _chunk(key: Any, req_context: Any, row: int = -1) -> Chunk:
    end = req_context.get_offload_key_position(key)
    return Chunk(bytes(key), get_offload_group_idx(key), get_offload_block_hash(key), end or 0, None, row)


def _layout(spec: Any, kv_cache_config: Any, row_bytes: int) -> str:
    """What tells how chunks lie in a row: 32 hex digits. The number of the engine's blocks does not matter."""
    config = spec.config
    starts = {
        name: (tensor.offset + number * tensor.layer_stride, tensor.block_stride)
        for tensor in kv_cache_config.kv_cache_tensors
        for number, name in enumerate(tensor.layers)
    }
    places = {start: number for number, start in enumerate(sorted({start for start, _ in starts.values()}))}
    layers = [(name, places[start], stride) for name, (start, stride) in starts.items()]
    groups = [(group.layer_names, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    parallel = config.parallel
    said = (
        groups, layers, row_bytes, spec.blocks_per_chunk, spec.tokens_per_hash, config.kv_cache_layout,
        config.canonical_layout, spec.replicated_layout, parallel.world_size, current_platform.device_type,
        current_platform.get_device_name(),
    )  # fmt: skip
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]
