"""SGLang's hierarchical cache, driven in lines of JSON on standard input. `hicache.HicacheProcess` starts it.

The first line says what the engine is like (`Engine` lists it), or is `{}`, for none yet; its answer comes once the
storage backend is attached:

    {"sglang": "0.5.23", "page_bytes": n, "backend": "KvstoredHiCache", "identity": {...}}
        or {"refused": "UsageError: ..."}

Commands and their answers. A `prompt` is a name that tokens follow from; `first` the page to begin with, where the
engine has all before it in its own memory; the bytes of a page follow from `content` (the prompt, unless given) and
its number (`page_of`).

    {"do": "save", "prompt": p, "pages": n, "first": 0, "content": c}
        {"pages": n, "keys": [k, ...], "s": s}
        By the controller's back-up thread, from host memory. `pages`: how many it says are stored; `keys`: hashes.
    {"do": "load", "prompt": p, "pages": n, "first": 0}
        {"hit": n, "pages": n, "digests": [d, ...], "s": s}
        By its prefetch threads, into host memory that was zeroed. `digests` has all `n` pages that were asked for.
    {"do": "ask", "verb": v, "prompt": p, "pages": n, "first": 0, "content": c}   {"got": x, "digests": [...], "s": s}
        Of the backend, directly: batch_exists, exists, batch_get_v1, batch_set_v1, batch_get, get, batch_set, set.
    {"do": "settle"}      {"settled": true}     all that was saved is visible, and durable where there is a disk
    {"do": "stats"}       {"stats": {...}}      what the backend tells SGLang's metrics, since the last time
    {"do": "weights", "version": v}   {"version": v}     as after an update of the weights
    {"do": "engine", ...}             as to the first line: another engine instead of this one
    {"do": "stop"}        {"stopped": true}
"""

import bench.engines.hicache_fakes  # noqa: F401, I001 -- first
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from random import Random
from types import SimpleNamespace
from typing import Any

import sglang.version
import torch
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo, PoolName
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.base import host_memory_budget_scope
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_context, get_parallel

from bench.engines.hicache import digest_of, page_of
from kvproto.errors import KvError

WAIT_S = 60.0
VOCABULARY = 32_000
BUDGET_BYTES = 1 << 30  # of host memory; without a word SGLang wants 10 GiB to be left free besides


class Engine:
    """What lies between an engine and its storage backend, and what the engine would do with it.

    `kind`: mha, asymmetric (V is half as wide as K) or mla; `pages`: of host memory; `tp`: rank and size; `server`:
    arguments of SGLang's; `extra`: the extra config; `hybrid`: the controller that SGLang's server has, or else the one
    that decoding servers have; `prefix_keys`: whether backends hear what comes before a run; `sidecar`: memory beside
    KV, as hybrid models have.
    """

    def __init__(
        self, *, kind: str = "mha", layout: str = "page_first", dtype: str = "bfloat16", page_tokens: int = 16,
        pages: int = 64, layers: int = 3, heads: int = 2, dim: int = 64, tp: tuple[int, int] = (0, 1),
        server: dict[str, Any] | None = None, extra: dict[str, Any] | None = None, hybrid: bool = True,
        prefix_keys: bool = True, sidecar: bool = False,
    ) -> None:  # fmt: skip
        self._page_tokens = page_tokens
        self._prefix_keys = prefix_keys
        self._arguments = get_context().override_server_args(tp_size=tp[1], **(server or {}))
        self._arguments.install()
        get_parallel().override_permanently(tp_rank=tp[0], pp_rank=0, attn_dcp_rank=0)
        device = _device_pool(kind, getattr(torch, dtype), page_tokens, layers, heads, dim)
        with host_memory_budget_scope(BUDGET_BYTES):
            self.host = _host_pool(device, page_tokens, pages, layout)
        group: Any = self.host
        if hybrid:
            entries = [
                hybrid_pool_assembler.build_pool_entry(
                    name=name, host_pool=self.host, device_pool=device, is_anchor=name == PoolName.KV,
                    layer_mapping={layer: layer for layer in range(layers)}, transfer_layer_id_max=layers,
                )
                for name in ([PoolName.KV, PoolName.INDEXER] if sidecar else [PoolName.KV])
            ]  # fmt: skip
            group = hybrid_pool_assembler.HostPoolGroup(entries)
        self._hybrid = hybrid
        self.group = group
        self.controller = (HybridCacheController if hybrid else HiCacheController)(
            SimpleNamespace(get_kvcache=lambda: device), group, page_tokens, None, threading.Event(),
            storage_backend="dynamic", model_name="model", storage_backend_extra_config=extra or {},
            prefetch_threshold=page_tokens, enable_storage_metrics=True,
        )  # fmt: skip
        self.backend = self.controller.storage_backend
        self.page_bytes = self.host.size_per_token * page_tokens
        self.ready = {
            "sglang": sglang.version.__version__, "page_bytes": self.page_bytes, "backend": type(self.backend).__name__,
            "identity": asdict(self.backend.identity),
        }  # fmt: skip

    # -- as SGLang's scheduler does ------------------------------------------------------------------------------

    def save(self, prompt: str, pages: int, first: int = 0, content: str = "") -> dict[str, Any]:
        """Back up what the engine has computed."""
        before, hashes = self._hashes(prompt, pages, first)
        indices = self._computed(content or prompt, first, pages - first)
        began = time.monotonic()
        self.controller.write_storage(indices, [], hash_value=hashes, prefix_keys=before)
        operation = self.controller.ack_backup_queue.get(timeout=WAIT_S)
        seconds = time.monotonic() - began
        self.group.free(indices)
        return {"pages": operation.completed_tokens // self._page_tokens, "keys": hashes, "s": seconds}

    def load(self, prompt: str, pages: int, first: int = 0) -> dict[str, Any]:
        """Prefetch what a request needs."""
        before, _ = self._hashes(prompt, pages, first)
        tokens = self._tokens(prompt, pages)
        last = self._all_hashes(prompt, first)[-1] if first else None
        request = SimpleNamespace(rid="request") if self._hybrid else "request"
        began = time.monotonic()
        self.controller.prefetch(request, tokens[first * self._page_tokens :], last, before)
        operation = self.controller.prefetch_hit_queue.get(timeout=WAIT_S)
        hit = operation.storage_hit_count // self._page_tokens
        indices = self._zeroed(pages - first)
        operation.host_indices = indices[: hit * self._page_tokens]
        self.controller.prefetch_buffer.put(operation)
        filled = 0
        while not (ack := self.controller.ack_prefetch_queue.get(timeout=WAIT_S)).completed_req:
            filled = ack.completed_tokens // self._page_tokens if ack.completed_tokens is not None else filled
        seconds = time.monotonic() - began
        return {"hit": hit, "pages": filled, "digests": self._digests(indices), "s": seconds}

    # -- the backend, directly -----------------------------------------------------------------------------------

    def ask(self, verb: str, prompt: str, pages: int, first: int = 0, content: str = "") -> dict[str, Any]:
        """One of its verbs; the verbs of one key with the first of them."""
        before, keys = self._hashes(prompt, pages, first)
        info = HiCacheStorageExtraInfo(prefix_keys=before)
        stores = "set" in verb
        count = pages - first
        indices = self._computed(content or prompt, first, count) if stores else self._zeroed(count)
        call = getattr(self.backend, verb)
        flat = [self.host.get_data_page(start) for start in indices[:: self._page_tokens].tolist()]
        digests = None
        began = time.monotonic()
        if verb.endswith("_v1"):
            got = call(keys, indices, info)
        elif verb == "batch_exists":
            got = call(keys, info)
        elif verb == "exists":
            got = call(keys[0])
        elif stores:
            got = call(keys, flat) if verb == "batch_set" else call(keys[0], flat[0])
        else:
            empty = [self.host.get_dummy_flat_data_page() for _ in keys]
            found = call(keys, empty) if verb == "batch_get" else [call(keys[0])]
            got = [page is not None for page in found]
            digests = [None if page is None else digest_of(_bytes(page)) for page in found]
        seconds = time.monotonic() - began
        return {"got": got, "digests": digests or self._digests(indices), "s": seconds}

    def settle(self) -> dict[str, Any]:
        """Wait for what was saved."""
        self.backend.store.flush(WAIT_S)
        return {"settled": True}

    def stats(self) -> dict[str, Any]:
        """For SGLang's metrics."""
        return {"stats": vars(self.backend.get_stats())}

    def weights(self, version: str) -> dict[str, Any]:
        """They were updated."""
        get_context().override("test", weight_version=version)
        return {"version": version}

    def stop(self) -> None:
        """As SGLang ends."""
        self.controller.detach_storage_backend()
        self._arguments.restore()

    # -- prompts and memory --------------------------------------------------------------------------------------

    def _tokens(self, prompt: str, pages: int) -> list[int]:
        random = Random(prompt)
        return [random.randrange(VOCABULARY) for _ in range(pages * self._page_tokens)]

    def _all_hashes(self, prompt: str, pages: int) -> list[str]:
        hashes: list[str] = get_storage_hash_str(self._tokens(prompt, pages), None, page_size=self._page_tokens)
        return hashes

    def _hashes(self, prompt: str, pages: int, first: int) -> tuple[list[str] | None, list[str]]:
        hashes = self._all_hashes(prompt, pages)
        return (hashes[:first] if self._prefix_keys else None), hashes[first:]

    def _zeroed(self, pages: int) -> torch.Tensor:
        """So many pages; everything that was taken before is given back."""
        self.host.clear()
        for buffer in self._buffers():
            buffer.zero_()
        indices: torch.Tensor = self.group.alloc(pages * self._page_tokens)
        return indices

    def _computed(self, content: str, first: int, pages: int) -> torch.Tensor:
        """Pages that hold what follows from `content`."""
        indices = self._zeroed(pages)
        for number, start in enumerate(indices[:: self._page_tokens].tolist(), first):
            page = torch.frombuffer(bytearray(page_of(content, number, self.page_bytes)), dtype=self.host.dtype)
            _write_page(self.host, start, page)
        return indices

    def _digests(self, indices: torch.Tensor) -> list[str]:
        return [digest_of(_bytes(_read_page(self.host, start))) for start in indices[:: self._page_tokens].tolist()]

    def _buffers(self) -> list[torch.Tensor]:
        whole = self.host.kv_buffer
        return list(whole) if isinstance(whole, tuple) else [whole]


def _device_pool(kind: str, dtype: torch.dtype, page_tokens: int, layers: int, heads: int, dim: int) -> Any:
    size = 2 * page_tokens  # nothing is ever computed there
    if kind == "mla":
        return MLATokenToKVPool(
            size, page_tokens, dtype, kv_lora_rank=dim, qk_rope_head_dim=dim // 4, layer_num=layers, device="cpu",
            enable_memory_saver=False,
        )  # fmt: skip
    v_dim = dim // 2 if kind == "asymmetric" else dim
    return MHATokenToKVPool(size, page_tokens, dtype, heads, dim, layers, "cpu", False, v_head_dim=v_dim)


def _host_pool(device: Any, page_tokens: int, pages: int, layout: str) -> Any:
    plain = {"pin_memory": False, "host_token_capacity": pages * page_tokens}
    if isinstance(device, MLATokenToKVPool):
        return MLATokenToKVPoolHost(
            device.get_device_pool_infos()[0].buffer_info, 2.0, 0, page_tokens, layout, **plain,
            device_capacity_tokens=device.size, start_layer=0, end_layer=device.layer_num,
            target_layer_num=device.layer_num,
        )  # fmt: skip
    host_class, buffer_info, more = hybrid_pool_assembler._mha_host_inputs(device)  # noqa: SLF001
    return host_class(buffer_info, 2.0, 0, page_tokens, layout, **plain, **more)


def _read_page(host: Any, start: int) -> torch.Tensor:
    if not isinstance(host.kv_buffer, tuple):
        page: torch.Tensor = host.get_data_page(start)
        return page
    return torch.cat([part.flatten() for part in _halves(host, start)])


def _write_page(host: Any, start: int, page: torch.Tensor) -> None:
    if not isinstance(host.kv_buffer, tuple):
        host.set_from_flat_data_page(start, page)
        return
    keys, values = _halves(host, start)
    keys.copy_(page[: keys.numel()].view(keys.shape))
    values.copy_(page[keys.numel() :].view(values.shape))


def _halves(host: Any, start: int) -> list[torch.Tensor]:
    """K and V of a page, which SGLang has no flat page for."""
    tokens = host.page_size
    if host.layout == "page_first_direct":
        return [buffer[start // tokens] for buffer in host.kv_buffer]
    return [buffer[start : start + tokens] for buffer in host.kv_buffer]


def _bytes(page: torch.Tensor) -> bytes:
    return page.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    """Answer until told to stop, or until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    engine: Engine | None = None
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do", "engine")
        if verb == "stop":
            break
        if verb == "engine":
            if engine is not None:
                engine.stop()
            engine, answer = _made(command)
            say(answer)
            continue
        assert verb in {"save", "load", "ask", "settle", "stats", "weights"}, verb
        say(getattr(engine, verb)(**command))
    if engine is not None:
        engine.stop()
    say({"stopped": True})


def _made(command: dict[str, Any]) -> tuple[Engine | None, dict[str, Any]]:
    if not command:
        return None, {"sglang": sglang.version.__version__}
    try:
        engine = Engine(**command)
    except (ValueError, KvError) as error:
        return None, {"refused": f"{type(error).__name__}: {error}"}
    return engine, engine.ready


if __name__ == "__main__":
    main()
