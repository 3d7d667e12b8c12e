"""What the bytes of a vLLM engine depend on besides tokens, for both ways into it: connector and second tier."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.v1.core import kv_cache_utils

from kvclient.client import Client, identity_of
from kvclient.codecs import Codec
from kvclient.integrations.model_files import snapshot_of, weights_mark
from kvclient.integrations.transformers_model import config_digest
from kvclient.integrations.vllm_settings import version_trouble
from kvproto.errors import UsageError
from kvproto.identity import NamespaceIdentity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def engine_trouble(config: "VllmConfig", *, any_version: bool) -> str:
    """Why no engine set up like this can use the store, or nothing."""
    if trouble := version_trouble(vllm.__version__, any_version=any_version):
        return trouble
    if config.kv_transfer_config.kv_role != "kv_both":
        return 'kv_role must be "kv_both" in the kv-transfer-config: "store": false is for engines that only load'
    algorithm = config.cache_config.prefix_caching_hash_algo
    if algorithm not in {"sha256", "sha256_cbor"}:
        return f"block hashes by {algorithm!r} can collide: use --prefix-caching-hash-algo sha256_cbor"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        if getattr(config.parallel_config, name, 1) != 1:
            return f"{name} is not supported yet"
    return _model_trouble(config)


def _model_trouble(config: "VllmConfig") -> str:
    if config.speculative_config is not None:
        return "speculative decoding is not supported yet"
    model = config.model_config
    if model.runner_type == "pooling" and not model.is_prefix_caching_supported:
        return "a model whose pooling needs every token of a prompt in one step cannot begin behind stored blocks"
    return ""


def engine_identity(
    config: "VllmConfig",
    *,
    layout: str,
    dtype: object,
    block_tokens: int,
    block_bytes: int,
    revision: str,
    tp: tuple[int, int],
    pp: tuple[int, int] = (0, 1),
) -> NamespaceIdentity:
    """What blocks of these bytes depend on. `layout`: how they lie; `dtype`: of what; `revision`: as a user named it.

    `tp` and `pp` are (rank, size). Raises UsageError where the weights cannot be told from others.
    """
    model, cache = config.model_config, config.cache_config
    revision = revision or _weights(config)
    if not revision:
        raise UsageError(f'the weights of {model.model!r} cannot be told from others: name them, with "revision"')
    hashes = f"{cache.prefix_caching_hash_algo} {kv_cache_utils.get_none_hash_seed()}"
    kinds = [dtype, cache.cache_dtype, model.dtype, model.quantization]
    if model.quantization_config is not None:  # of quantizing at the start; that of a checkpoint is in `hf_config`
        how = json.dumps(model.quantization_config, sort_keys=True, default=repr)
        kinds.append(hashlib.sha256(how.encode()).hexdigest()[:32])
    # With this kind of positions, which factors they take depends on how long a prompt may be.
    longest = f" {model.max_model_len}" if "longrope" in str(model.hf_config.to_dict()) else ""
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return identity_of(
        model=f"{' '.join(model.architectures)} {config_digest(model.hf_config)}{longest}",
        engine=f"vllm {vllm.__version__} torch {torch.__version__} {hashes}",
        layout=f"{layout} {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {tiles}",
        dtype=" ".join(map(str, kinds)).replace("torch.", ""),
        block_tokens=block_tokens,
        block_bytes=block_bytes,
        revision=revision,
        adapter="",
        tp=tp,
        pp=pp,
    )


def kernels_of(config: "VllmConfig") -> str:
    """What keeps blocks in a GPU's memory as it likes: that GPU, and the kernels of the model's attention."""
    from vllm.distributed.kv_transfer.kv_connector.utils import (  # noqa: PLC0415  # an engine on CPU never needs these
        get_current_attn_backends,
    )
    from vllm.platforms import current_platform  # noqa: PLC0415

    names = sorted(".".join(backend.full_cls_name()) for backend in get_current_attn_backends(config))
    return f"{current_platform.get_device_name()} {' '.join(names)}"


def namespace_of(client: Client, identity: NamespaceIdentity, codec: Codec | None = None) -> Any:
    """That namespace, of this client; blocks are encoded by `codec` on the way, which its identity names then.

    Raises UsageError if the daemon finds it impossible.
    """
    fields: Mapping[str, Any] = asdict(identity)
    tp, pp = (fields["tp_rank"], fields["tp_size"]), (fields["pp_rank"], fields["pp_size"])
    plain = {name: value for name, value in fields.items() if name[:3] not in {"tp_", "pp_"}}
    namespace = client.namespace(**plain, tp=tp, pp=pp)
    return namespace if codec is None else namespace.encoded_by(codec)


def _weights(config: "VllmConfig") -> str:
    """What tells the weights from others; empty if nothing does."""
    model, load_format = config.model_config, str(config.load_config.load_format)
    if load_format == "dummy":
        return f"dummy {model.seed}"
    if Path(model.model).is_dir():
        return weights_mark(Path(model.model))
    # `--download-dir` is for weights alone: configuration and code come out of the usual cache all the same.
    folder = snapshot_of(model.model, model.revision, config.load_config.download_dir)
    return weights_mark(folder, snapshot_of(model.model, model.revision)) if folder is not None else ""
