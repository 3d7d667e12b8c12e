"""The integrations' modules that import vLLM or SGLang, with as much of these as they need to be imported."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

import kvclient.integrations

VLLM_VERSION = "0.32.0"
SGLANG_VERSION = "0.5.23"


class _Connector:
    """As vLLM's base of connectors."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._metadata: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self._metadata = metadata

    def _get_connector_metadata(self) -> Any:
        return self._metadata


class _Anything:
    """A base class or a type of an argument."""

    def __init__(self, *_given: Any, **_named: Any) -> None:
        pass


_KV_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"
_VLLM: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": VLLM_VERSION},
    "vllm.v1.core": {"kv_cache_utils": SimpleNamespace(get_none_hash_seed=lambda: 7)},
    "vllm.v1.metrics.utils": {"create_metric_per_engine": None},
    "vllm.distributed": {"parallel_state": SimpleNamespace()},
    f"{_KV_CONNECTOR}.base": {
        "KVConnectorBase_V1": _Connector,
        **dict.fromkeys(
            ("KVConnectorHandshakeMetadata", "KVConnectorMetadata", "KVConnectorWorkerMetadata"), _Anything
        ),
        "KVConnectorRole": SimpleNamespace(SCHEDULER=0, WORKER=1),
    },
    f"{_KV_CONNECTOR}.metrics": {"KVConnectorPromMetrics": _Anything, "KVConnectorStats": _Anything},
}
_SGLANG: dict[str, dict[str, Any]] = {
    "sglang": {"version": SimpleNamespace(__version__=SGLANG_VERSION)},
    "sglang.version": {"__version__": SGLANG_VERSION},
    "sglang.srt": {"runtime_context": SimpleNamespace()},
    "sglang.srt.mem_cache.hicache_storage": dict.fromkeys(
        ("HiCacheStorage", "HiCacheStorageConfig", "HiCacheStorageExtraInfo", "PoolName"), _Anything
    ),
}


def vllm_identity() -> Any:
    """`kvclient.integrations.vllm_identity`, a new one each time, as are the following."""
    return _loaded(_VLLM, "vllm_identity")


def vllm_connector() -> Any:
    """`kvclient.integrations.vllm`."""
    return _loaded(_VLLM, "vllm_identity", "vllm_metrics", "vllm")


def sglang_backend() -> Any:
    """`kvclient.integrations.sglang`."""
    return _loaded(_SGLANG, "sglang")


def _loaded(engine: Mapping[str, Mapping[str, Any]], *names: str) -> Any:
    """The last of these, imported anew beside such an engine; nobody else finds either."""
    package = kvclient.integrations
    stubs = {name: _module(name, attributes) for name, attributes in engine.items()}
    ours = [f"{package.__name__}.{name}" for name in names]
    before = {name: sys.modules.get(name) for name in (*stubs, *ours)}
    for name in ours:
        sys.modules.pop(name, None)
    sys.modules.update(stubs)
    try:
        return [importlib.import_module(name) for name in ours][-1]
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name in names:
            vars(package).pop(name, None)


def _module(name: str, attributes: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module


def hub(monkeypatch: pytest.MonkeyPatch | None, cache: Path, model: str) -> Path:
    """A folder for a model's files in a cache of the Hugging Face hub; with `monkeypatch` it is the usual one."""
    folder = cache / f"models--{model.replace('/', '--')}"
    commit = "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    if monkeypatch is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return folder / "snapshots" / commit
