"""SGLang: KV pages that were computed once come out of the daemon's memory, for every engine of this host.

    python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-hierarchical-cache
      --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvstored",
      "module_path": "kvclient.integrations.sglang", "class_name": "KvstoredHiCache", "interface_v1": 1,
      "hicache_storage_pass_prefix_keys": true}'

The extra config also takes what `sglang_settings.Settings` lists. A daemon that is absent, or goes away, is a miss: the
engine computes.

    SGLang's threads                   here
    ------------------------------     ------------------------------------------------------------
    prefetch   batch_exists            sglang_store.py  MATCH
    load       batch_get_v1            sglang_pages.py  where the pages lie; LEASE, copy
    back-up    batch_set_v1            RESERVE, copy, COMMIT
    (`get`, `set` and their batches do the same with one tensor a page, where interface_v1 is not set)

Keys are SGLang's page hashes: tokens, and the salt or extra key of a request. The namespace says the rest: model,
weights, version, layout and type of the memory, rank. With prefix keys each page is stored behind the one before it,
so that what continues it is evicted first; without them, as far as SGLang has looked them up together.

SGLang does not tell a backend that the weights were changed in a running engine, and answers from it what the old ones
computed, unless the change names a new `weight_version`: then the store is used no more. Of a change in several buckets
the first one has to name it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import sglang.version
import torch
from sglang.srt import runtime_context
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolName,
)

from kvclient.client import Client, connect, identity_of
from kvclient.codecs import Codec
from kvclient.integrations.codec_choice import codec_for, encoded
from kvclient.integrations.model_files import snapshot_of, weights_mark
from kvclient.integrations.sglang_pages import Pages, pages_of
from kvclient.integrations.sglang_settings import Settings, version_trouble
from kvclient.integrations.sglang_store import PageStore
from kvproto.errors import UsageError
from kvproto.frames import Role
from kvproto.identity import NamespaceIdentity

_log = logging.getLogger(__name__)
_R = TypeVar("_R")

KEY_DIGITS: Final = 64
# What changes the bytes of KV besides the weights, by the name of SGLang's argument.
COMPUTING: Final = (
    "dtype", "kv_cache_dtype", "quantization", "quantization_param_path", "json_model_override_args", "model_impl",
    "model_loader_extra_config", "modelopt_quant", "modelopt_checkpoint_restore_path", "quantize_and_serve",
    "rl_quant_profile", "custom_weight_loader", "load_format", "is_embedding",
)  # fmt: skip
SCALES: Final = "quantization_param_path"  # of these the one that names a file
# Ways of loading by which the weights are what lies in the model's folder, and nothing else.
FROM_FILES: Final = frozenset({
    "auto", "pt", "safetensors", "instanttensor", "npcache", "sharded_state", "bitsandbytes", "mistral", "layered",
    "fastsafetensors",
})  # fmt: skip


class KvstoredHiCache(HiCacheStorage):
    """See the module. SGLang makes one a rank. Any thread.

    Raises UsageError at start for what it cannot do right, RefusedError where the daemon will not have it.
    Later it raises nothing.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, _kwargs: Mapping[str, Any] | None = None) -> None:
        self._config = storage_config
        self._settings = Settings.parse(storage_config.extra_config)
        version = sglang.version.__version__
        trouble = version_trouble(version, any_version=self._settings.any_version)
        if trouble := trouble or _trouble(storage_config, self._settings):
            raise UsageError(trouble)
        self._weights = _weight_version()
        self._pages: Pages | None = None
        self.store: PageStore | None = None  # and in which namespace:
        self.identity: NamespaceIdentity | None = None
        self._clients: list[Client] = []
        self._said: set[str] = set()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The engine's host memory is there."""
        super().register_mem_pool_host(mem_pool_host)
        pages, settings = pages_of(mem_pool_host), self._settings
        codec = codec_for(
            settings.codec, lossy=settings.lossy, dtype=pages.dtype, block_bytes=pages.page_bytes, row=pages.row,
            accelerate=settings.accelerate,
        )  # fmt: skip
        identity = encoded(_identity(self._config, pages, settings, self._weights), codec)
        lookups = self._client("lookups", settings.lookup_timeout_ms, Role.TOOL)
        transfers = self._client("transfers", settings.transfer_timeout_ms, Role.ENGINE)
        self.store = PageStore(
            _namespace(lookups, identity), _namespace(transfers, identity, codec), pages.page_bytes,
            disk_wait_s=settings.disk_wait_s,
        )  # fmt: skip
        self._pages, self.identity = pages, identity
        _log.info(
            "kvstored: pages of %d tokens and %d bytes, codec %s",
            pages.tokens, pages.page_bytes, codec.text if codec else "raw",
        )  # fmt: skip

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool of a hybrid model, of which there may be one only. Raises UsageError for a second one."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV:
            raise UsageError(f"models with host memory beside KV ({host_pool_name}) are not supported yet")

    # -- runs of pages, in place ---------------------------------------------------------------------------------

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many of these pages, from the first one on, are there."""
        return self._use(lambda store, _: store.match(_keys(keys), _before(extra_info)), 0)

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill pages of host memory; which were filled. Those behind the first that was not are not asked for."""
        filled = self._use(lambda store, pages: store.load(_keys(keys), pages.scattered(host_indices, len(keys))), 0)
        return [number < filled for number in range(len(keys))]

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store pages of host memory; which are stored."""
        return self._save(
            keys,
            lambda store, pages: store.save(
                _keys(keys), pages.scattered(host_indices, len(keys)), _before(extra_info, said=self._say)
            ),
        )

    # -- one tensor a page ---------------------------------------------------------------------------------------

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        """A flat page, in `target_location` if that is given; None for a miss."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        """Flat pages; None for those that are not there, and for all behind the first of them."""
        found: list[torch.Tensor | None] = [None] * len(keys)

        def fill(store: PageStore, pages: Pages) -> int:
            targets = [pages.flat() for _ in keys] if target_locations is None else list(target_locations)
            filled = store.load(_keys(keys), pages.of_tensors(targets, len(keys)))
            found[:filled] = targets[:filled]
            return filled

        self._use(fill, 0)
        return found

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a flat page; whether it is stored."""
        page = target_location if value is None else value
        return self.batch_set([key], [page])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store flat pages that follow each other; whether all are stored."""
        given = target_locations if values is None else values

        def save(store: PageStore, pages: Pages) -> list[bool]:
            return store.save(_keys(keys), pages.of_tensors([page.contiguous() for page in given], len(keys)))

        return all(self._save(keys, save))

    def exists(self, key: str) -> bool:
        """Is this page there?"""
        return self.batch_exists([key]) == 1

    # -- the rest ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Not for an engine to do: other engines use these pages too. Raises UsageError."""
        raise UsageError("what all engines of this host share is not cleared by one of them: `kvctl clear` does it")

    def get_stats(self) -> Any:
        """Pages loaded and stored since the last time, and how fast, for SGLang's metrics."""
        # Only a server with metrics asks, and has what they need.
        from sglang.srt.observability.metrics_collector import StorageMetrics  # noqa: PLC0415

        stats = StorageMetrics()
        if self.store is not None:
            stats.prefetch_pgs, stats.prefetch_bandwidth = self.store.loads.take()
            stats.backup_pgs, stats.backup_bandwidth = self.store.saves.take()
        return stats

    def close(self) -> None:
        """SGLang has done with it; whatever is asked later is a miss."""
        self.store = None
        for client in self._clients:
            client.close()
        self._clients.clear()

    def _client(self, name: str, timeout_ms: float, role: Role) -> Client:
        settings = self._settings
        client = connect(
            settings.runtime_dir, name=f"sglang {name}", tenant=settings.tenant, timeout_s=timeout_ms / 1000, role=role
        )
        self._clients.append(client)
        return client

    def _save(self, keys: list[str], save: Callable[[PageStore, Pages], list[bool]]) -> list[bool]:
        if not self._settings.store or not self._config.is_storage_writer:
            return [True] * len(keys)  # not its task
        return self._use(save, [False] * len(keys))

    def _use(self, verb: Callable[[PageStore, Pages], _R], miss: _R) -> _R:
        """Do it; a miss where there is nothing to do it with, and where it goes wrong."""
        store, pages = self.store, self._pages
        if store is None or pages is None:
            return miss
        if _weight_version() != self._weights:
            self._say("the weights were changed: what is stored belongs to the old ones, and is used no more")
            return miss
        try:
            return verb(store, pages)
        except Exception as error:  # noqa: BLE001 -- whatever it was, the engine goes on, and computes
            self._say(f"pages were neither loaded nor stored: {type(error).__name__}: {error}")
            return miss

    def _say(self, sentence: str) -> None:
        if sentence not in self._said and len(self._said) < 64:
            self._said.add(sentence)
            _log.warning("kvstored: %s", sentence)


def _keys(hashes: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(text) if len(text) == KEY_DIGITS else hashlib.sha256(text.encode()).digest()
            for text in hashes]  # fmt: skip


def _before(extra_info: HiCacheStorageExtraInfo | None, said: Callable[[str], None] | None = None) -> bytes | None:
    """The page before a run, as far as SGLang says."""
    before = extra_info.prefix_keys if extra_info is not None else None
    if before is None and said is not None:
        said('with "hicache_storage_pass_prefix_keys": true in the extra config, pages would be evicted in order')
    return _keys(before[-1:])[0] if before else None


def _namespace(client: Client, identity: NamespaceIdentity, codec: Codec | None = None) -> Any:
    fields: Mapping[str, Any] = asdict(identity)
    tp, pp = (fields["tp_rank"], fields["tp_size"]), (fields["pp_rank"], fields["pp_size"])
    plain = {name: value for name, value in fields.items() if name[:3] not in {"tp_", "pp_"}}
    namespace = client.namespace(**plain, tp=tp, pp=pp)
    return namespace if codec is None else namespace.encoded_by(codec)


def _trouble(config: HiCacheStorageConfig, settings: Settings) -> str:
    """Why an engine like this cannot use the store, or nothing."""
    if config.dcp_size != 1:
        return "decode context parallelism is not supported yet"
    if not settings.images and _takes_images():
        return (
            "images and the like are known by names that requests may bring along (`mm_hashes`), and another one may "
            'have had the same: "images": true in the extra config says that nobody gives wrong ones'
        )
    return ""


def _takes_images() -> bool:
    """Does the model take more than text?"""
    try:
        model = runtime_context.process_model_config()
    except Exception:  # noqa: BLE001 -- a server has read its model's configuration before, and has ended if it cannot
        return False
    return any(getattr(model, name, False) for name in ("is_multimodal", "is_audio_model"))


def _identity(config: HiCacheStorageConfig, pages: Pages, settings: Settings, weight_version: str) -> NamespaceIdentity:
    """What the bytes of this rank depend on besides tokens."""
    said = _said()
    folder = _folder(said)
    if said.get("enable_lora") and not settings.revision:
        raise UsageError(
            "adapters are known by names and paths that others may have had before: "
            'name weights and adapters together, with "revision": "..." in the extra config'
        )
    revision = settings.revision or _mark(said, folder)
    if not revision:
        raise UsageError(
            f"the weights of {said.get('model_path') or config.model_name!r} cannot be told from others: "
            'name them, with "revision": "..." in the extra config'
        )
    computing = json.dumps({name: str(said.get(name)) for name in COMPUTING} | _scales(said))
    # With this kind of positions, which factors they take depends on how long a prompt may be.
    shape = (folder / "config.json").read_text() if folder and (folder / "config.json").is_file() else ""
    longest = f" {said.get('context_length')}" if "longrope" in shape + computing else ""
    digest = hashlib.sha256(f"{shape}\n{computing}".encode()).hexdigest()[:32]
    return identity_of(
        model=f"{_architecture(shape) or config.model_name or 'unnamed'} {digest}{longest}",
        engine=f"sglang {sglang.version.__version__} torch {torch.__version__}",
        layout=f"{pages.words}, context {config.attn_cp_rank} of {config.attn_cp_size}",
        dtype=f"{pages.dtype} {said.get('kv_cache_dtype')}",
        block_tokens=pages.tokens,
        block_bytes=pages.page_bytes,
        revision=f"{revision} {weight_version}",
        adapter="",
        tp=(0, 1) if pages.latent and config.is_mla_model else (config.tp_rank, config.tp_size),
        pp=(config.pp_rank, config.pp_size),
    )


def _said() -> dict[str, Any]:
    """SGLang's own arguments; empty in a process that has none."""
    try:
        bags = [runtime_context.get_model(), runtime_context.get_lora(), runtime_context.get_device()]
    except ValueError:
        return {}
    names = (
        *COMPUTING, "checkpoint_engine_wait_weights_before_ready", "context_length", "download_dir", "enable_lora",
        "model_path", "random_seed", "revision",
    )  # fmt: skip
    return {name: getattr(bag, name) for name in names for bag in bags if hasattr(bag, name)}


def _weight_version() -> str:
    """What whoever changes weights in a running engine calls them."""
    try:
        return str(runtime_context.get_serving().weight_version)
    except ValueError:
        return ""


def _folder(said: Mapping[str, Any], cache: str | None = None) -> Path | None:
    """Where the model lies, if it comes from the hub in `cache`, by default in the usual one."""
    path = said.get("model_path")
    if not path or Path(path).is_dir():
        return Path(path) if path else None
    return snapshot_of(path, said.get("revision"), cache)


def _mark(said: Mapping[str, Any], folder: Path | None) -> str:
    """What tells the weights from others; empty if nothing does. `folder`: of the model's configuration and code."""
    if said.get("load_format") == "dummy":
        return f"dummy {said.get('random_seed')}"
    if said.get("load_format") not in FROM_FILES or said.get("checkpoint_engine_wait_weights_before_ready"):
        return ""
    weights = _folder(said, said.get("download_dir"))  # which is for weights alone
    return weights_mark(weights, folder) if weights is not None else ""


def _scales(said: Mapping[str, Any]) -> dict[str, str]:
    """What is in the file of scales that SGLang was told to take; nothing if it was not. Raises UsageError."""
    path = said.get(SCALES)
    if path is None:
        return {}
    try:
        return {SCALES: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    except OSError as error:
        raise UsageError(f"what {SCALES} names cannot be read: {error}") from None


def _architecture(shape: str) -> str:
    try:
        return " ".join(json.loads(shape).get("architectures") or [])
    except (ValueError, AttributeError):
        return ""
