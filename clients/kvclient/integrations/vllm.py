"""vLLM: KV blocks that were computed once come out of the daemon's memory, for every engine of this host.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvstoredConnector",
      "kv_connector_module_path": "kvclient.integrations.vllm", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute"}'

`kv_connector_extra_config` takes what `vllm_settings.Settings` lists, `kv_transfer_params={"kvstored": {...}}` of a
request what `vllm_settings.Wishes` lists. A daemon that is absent, or goes away, is a miss: the engine computes.

    scheduler process                                      worker processes, one a rank
    ------------------------------------------------       ----------------------------------------------------
    vllm_scheduler.py    MATCH, PREFETCH                    vllm_worker.py   LEASE, copy; RESERVE, copy, COMMIT
    what to load and save        ---- Plan, each step ----> vllm_layout.py   where the engine's blocks lie
                                 <--- Progress, each step --
    namespaces of all ranks      <--- Shard, once -----------

Keys are vLLM's own block hashes (tokens, adapter, images, salt); the namespace says the rest: model, weights, version
of vLLM, layout and type of the memory, rank.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import parallel_state
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvclient.client import Client, connect
from kvclient.codecs import Codec
from kvclient.integrations.codec_choice import codec_for, encoded
from kvclient.integrations.vllm_identity import engine_identity, engine_trouble, kernels_of, namespace_of
from kvclient.integrations.vllm_jobs import Plan, Progress, Shard
from kvclient.integrations.vllm_layout import Layout, layout_of
from kvclient.integrations.vllm_metrics import KvstoredMetrics, KvstoredStats
from kvclient.integrations.vllm_saves import EngineMemory
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvclient.integrations.vllm_weights import watch
from kvclient.integrations.vllm_worker import Worker
from kvproto.errors import UsageError
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from kvclient.integrations.vllm_device import EngineStream

_log = logging.getLogger(__name__)


class _Meta(KVConnectorMetadata):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class _Done(KVConnectorWorkerMetadata):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, _Done)
        return _Done(self.progress.joined(other.progress))


class _Hello(KVConnectorHandshakeMetadata):
    def __init__(self, shard: Shard, worker: Worker) -> None:
        self.shard = shard
        self.worker: Worker | None = worker  # for a scheduler in the same process: it does not travel

    def __getstate__(self) -> dict[str, Any]:
        return {"shard": self.shard, "worker": None}


class KvstoredConnector(KVConnectorBase_V1):
    """See the module. vLLM makes one for its scheduler and one for each worker. Raises UsageError at start."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config, **kwargs)
        transfer = self._kv_transfer_config
        self._settings = Settings.parse(transfer.kv_connector_extra_config)
        if getattr(vllm_config.scheduler_config, "async_scheduling", False):
            self._settings = self._settings.where_steps_overlap()
        if trouble := _trouble(vllm_config, kv_cache_config, self._settings):
            raise UsageError(trouble)
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._layout: Layout | None = None
        self._shard: Shard | None = None
        self._pool: Any = None
        self._clients: list[Client] = []

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a later miss, and nothing else."""
        return False

    def _client(self, name: str, *, timeout_s: float, stores: bool) -> Client:
        client = connect(
            self._settings.runtime_dir, name=f"vllm {name}", tenant=self._settings.tenant, timeout_s=timeout_s,
            role=Role.ENGINE if stores else Role.TOOL, mode=self._settings.mode,
        )  # fmt: skip
        self._clients.append(client)
        return client

    # -- worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The engine's memory is there."""
        settings = self._settings
        layout = layout_of(kv_caches, int(self._kv_cache_config.num_blocks))
        codec = codec_for(
            settings.codec, lossy=settings.lossy, dtype=_dtypes_of(kv_caches), block_bytes=layout.block_bytes,
            row=_row_of(self._kv_cache_config), accelerate=settings.accelerate,
        )  # fmt: skip
        stream = _stream_of(layout, codec)
        identity = encoded(_identity(self._vllm_config, layout, kv_caches, settings, self._block_tokens), codec)
        self._shard = Shard(identity)
        quick = self._client("worker lookups", timeout_s=settings.lookup_timeout_ms / 1000, stores=False)
        patient = self._client("worker", timeout_s=1.0, stores=True)
        self._worker = Worker(
            namespace_of(quick, identity, codec), namespace_of(patient, identity, codec), layout,
            disk_wait_s=settings.disk_wait_s, layerwise=settings.layerwise and settings.at_once_bytes > 0,
            stream=stream,
        )  # fmt: skip
        watch(getattr(self._vllm_config.parallel_config, "worker_cls", None), self._worker)
        _log.info(
            "kvstored: blocks of %d tokens and %d bytes in %d pieces on %s, codec %s",
            self._block_tokens, layout.block_bytes, len(layout.lengths), layout.place or "the host",
            codec.text if codec else "raw",
        )  # fmt: skip

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What this rank stores, for the scheduler."""
        if self._shard is None or self._worker is None:
            return None
        return _Hello(self._shard, self._worker)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before anything of a step is written."""
        if self._worker is not None:
            self._worker.fence(_plan_of(kv_connector_metadata))

    def start_load_kv(self, _forward_context: Any, **_: Any) -> None:
        """Load what this step needs, and begin to load what later ones do."""
        if self._worker is not None:
            plan = _plan_of(self._get_connector_metadata())
            self._worker.begin(plan)
            if not plan.forward:
                self._worker.idle()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Until this layer's memory may be read: at once, unless loads are layer by layer."""
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Inside a whole CUDA graph nobody would wait for a layer."""
        return Settings.parse(extra_config).layerwise

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """On a GPU the one in which a block of all layers is one piece, which is copied best.

        A wish: vLLM takes another layout, and says so, where the kernels of its attention do not know this one.
        """
        return None if vllm_config.device_config.device_type == "cpu" else "BLHNC"

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Whole blocks of all layers are saved behind the forward."""

    def wait_for_save(self) -> None:
        """The forward is over."""
        if self._worker is not None:
            self._worker.end(_plan_of(self._get_connector_metadata()))

    def get_finished(self, _finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks may be freed, and requests whose loads have ended."""
        if self._worker is None:
            return None, None
        return self._worker.take_closed() or None, self._worker.take_received() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """To be computed anew."""
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """Saves that have ended."""
        progress = self._worker.take_progress() if self._worker is not None else None
        return _Done(progress) if progress is not None else None

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Of either half, since the last time."""
        half = self._worker or self._scheduler
        counts = half.take_counts() if half is not None else {}
        return KvstoredStats(dict(counts)) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """For vLLM's logger."""
        return KvstoredStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: "VllmConfig", metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics | None:
        """For vLLM's metrics."""
        return KvstoredMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @property
    def saving(self) -> int:
        """Saves of this worker that have not ended."""
        return self._worker.saving if self._worker is not None else 0

    def shutdown(self) -> None:
        """The engine goes away."""
        if self._worker is not None:
            self._worker.stop()
        for client in self._clients:
            client.close()
        self._clients.clear()

    # -- scheduler -----------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """All ranks have said what they store: lookups begin."""
        hellos = [hello for hello in metadata.values() if isinstance(hello, _Hello)]
        shards = [hello.shard for hello in hellos]
        client = self._client("scheduler", timeout_s=self._settings.lookup_timeout_ms / 1000, stores=False)
        namespaces = [namespace_of(client, shard.identity) for shard in shards]
        block_bytes = max(shard.identity.block_bytes for shard in shards)
        self._scheduler = Scheduler(
            client, namespaces, self._block_tokens, block_bytes, self._settings,
            memory=EngineMemory(
                int(self._kv_cache_config.num_blocks), self._free_blocks, self._forget_blocks,
                self._hold_blocks, self._let_go_of_blocks,
                reuses_oldest=bool(self._vllm_config.cache_config.enable_prefix_caching),
            ),
            near=self._near(hellos),
        )  # fmt: skip

    def _near(self, hellos: "Sequence[_Hello]") -> Worker | None:
        """The only worker, if it is in this process, begins loads early, and nothing writes into new blocks before."""
        settings = self._settings
        zeroes = bool(getattr(self._kv_cache_config, "needs_kv_cache_zeroing", True))
        if len(hellos) != 1 or settings.layerwise or not settings.at_once_bytes or zeroes:
            return None
        worker = hellos[0].worker
        return worker if worker is not None and worker.begins_early else None

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The engine's own bookkeeping of its memory."""
        self._pool, reset = gpu_block_pool, gpu_block_pool.reset_prefix_cache

        def reset_prefix_cache() -> bool:
            # vLLM resets nothing while a block is in use, and asks no connector before it looks.
            self.has_pending_block_frees()
            return bool(reset())

        gpu_block_pool.reset_prefix_cache = reset_prefix_cache

    def has_pending_block_frees(self) -> bool:
        """A running request finds no memory: free what is held, so that it has some with the next step."""
        return self._scheduler is not None and self._scheduler.holds.end_all()

    def _free_blocks(self) -> int:
        return int(self._pool.get_num_free_blocks()) if self._pool is not None else 0

    def _forget_blocks(self, block_ids: set[int]) -> None:
        if self._pool is not None:
            self._pool.evict_blocks(block_ids)  # out of vLLM's prefix cache; whoever has them keeps them

    def _hold_blocks(self, block_ids: Sequence[int]) -> list[int]:
        if self._pool is None:
            return []
        blocks = [self._pool.blocks[block] for block in block_ids]
        found = [block for block in blocks if block.block_hash is not None and not block.is_null]
        self._pool.touch(found)
        return [int(block.block_id) for block in found]

    def _let_go_of_blocks(self, block_ids: Sequence[int]) -> None:
        # As vLLM frees a request: the end of a chain is used again first.
        self._pool.free_blocks([self._pool.blocks[block] for block in reversed(block_ids)])

    def on_new_request(self, request: Any) -> None:
        """A request has come."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How much of it is in the store."""
        return (0, False) if self._scheduler is None else self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Its memory is set aside."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers do in this step."""
        if self._scheduler is None:
            return _Meta(Plan(forward=bool(scheduler_output.num_scheduled_tokens)))
        state = scheduler_output.kv_connector_block_state
        return _Meta(
            self._scheduler.plan(scheduler_output.num_scheduled_tokens, lambda request: state.get_block_ids(request)[0])
        )

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have done."""
        if self._scheduler is not None:
            done = connector_output.kv_connector_worker_meta
            progress = done.progress if isinstance(done, _Done) else None
            bad_blocks = connector_output.invalid_block_ids or ()
            self._scheduler.heard(progress, connector_output.finished_recving or (), bad_blocks)

    def reset_cache(self) -> bool | None:
        """Asked for when weights have changed: what is stored belongs to the old ones."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks must stay for now."""
        return (False if self._scheduler is None else self._scheduler.finished(request, block_ids)), None


def _plan_of(metadata: KVConnectorMetadata) -> Plan:
    assert isinstance(metadata, _Meta), f"metadata of another connector: {metadata}"
    return metadata.plan


def _trouble(config: "VllmConfig", kv_cache_config: Any, settings: Settings) -> str:
    """Why this engine cannot use the store, or nothing."""
    if trouble := engine_trouble(config, any_version=settings.any_version):
        return trouble
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        return (
            'kv_load_failure_policy must be "recompute" in the kv-transfer-config: '
            "otherwise a block that is gone when it is to be loaded fails the request instead of being computed"
        )
    return _memory_trouble([group.kv_cache_spec for group in kv_cache_config.kv_cache_groups])


def _memory_trouble(specs: Sequence[Any]) -> str:
    if len(specs) != 1:
        return f"{len(specs)} groups of KV memory (a hybrid model): kvclient.integrations.vllm_tier is for those"
    kind = type(specs[0]).__name__
    if kind not in {"FullAttentionSpec", "MLAAttentionSpec"} or getattr(specs[0], "non_causal", False):
        return f"KV memory of the kind {kind} is not supported: only causal full attention is"
    return ""


def _identity(
    config: "VllmConfig", layout: Layout, caches: Mapping[str, torch.Tensor], settings: Settings, block_tokens: int
) -> NamespaceIdentity:
    """What the bytes of this rank depend on besides tokens."""
    parallel = config.parallel_config
    return engine_identity(
        config,
        layout=layout.words if layout.place is None else f"{layout.words} {kernels_of(config)}",
        dtype=next(iter(caches.values())).dtype,
        block_tokens=block_tokens,
        block_bytes=layout.block_bytes,
        revision=settings.revision,
        tp=(_rank("tp"), int(parallel.tensor_parallel_size)),
        pp=(_rank("pp"), int(parallel.pipeline_parallel_size)),
    )


def _stream_of(layout: Layout, codec: Codec | None) -> "EngineStream | None":
    """What the engine computes on, if its memory is a GPU's. Raises UsageError for what cannot be encoded there."""
    place = layout.place
    if place is None:
        return None
    from kvclient.codecs_device import check_fits  # noqa: PLC0415  # an engine on CPU never needs these
    from kvclient.integrations.vllm_device import EngineStream  # noqa: PLC0415

    if codec is not None:
        check_fits(codec)
    return EngineStream(place, lambda: torch.cuda.current_stream(place))


def _dtypes_of(caches: Mapping[str, torch.Tensor]) -> str:
    """Of values in all layers: a name no codec takes, if they differ."""
    return " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in caches.values()}))


def _row_of(kv_cache_config: Any) -> int:
    """Values of one token and head, of keys or of values."""
    return int(getattr(kv_cache_config.kv_cache_groups[0].kv_cache_spec, "head_size", 0))


def _rank(axis: str) -> int:
    group = parallel_state.get_tp_group() if axis == "tp" else parallel_state.get_pp_group()
    return int(group.rank_in_group)
