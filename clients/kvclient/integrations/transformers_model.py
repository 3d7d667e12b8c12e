"""What `kvclient.integrations.transformers` has to know of a model before it may store anything for it.

Three questions, all answered on the safe side. Can its cache be kept at all (`model_trouble`, `probe`)? Can that of
this request (`request_trouble`)? And what names its bytes, so that nobody else's are taken for them (`config_digest`,
`weights_digest`, `processors`)?
Sentences that are returned say why not; an empty one means that all is well.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
import transformers
import xxhash
from transformers.cache_utils import DynamicLayer

# Entries of a configuration that do not touch what the model computes.
_VOLATILE: Final = frozenset({"transformers_version", "_name_or_path"})

# Options of `generate` that would change the batch, the cache or which tokens it holds, with the values that do not.
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "is_assistant": (None, False),
    "use_mtp": (None, False),
    "prefill_chunk_size": (None,),  # some versions of transformers then compute the cached part once more, on top
    "penalty_alpha": (None,),
    "dola_layers": (None,),
    "output_attentions": (None, False),  # of the whole prompt, which is not computed
    "output_hidden_states": (None, False),
}
# Other arguments of `generate` that leave the cache alone; whatever is neither here nor a generation option may not.
_HARMLESS: Final = frozenset({
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
    "streamer", "synced_gpus", "tokenizer", "negative_prompt_ids", "negative_prompt_attention_mask",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class KVShape:
    """The KV of one token as a model computes it: a key and a value of [heads, head_dim] in every layer."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # of each layer

    @property
    def device_types(self) -> frozenset[str]:
        """Such as "cpu"."""
        return frozenset(device.type for device in self.devices)


def model_trouble(model: Any, adapter: str) -> str:
    """Why this kind of model cannot be cached by its tokens; empty if it can."""
    config = model.config
    if config.is_encoder_decoder:
        return "an encoder-decoder model: its cache depends on the encoder's input"
    if config.get_text_config(decoder=True) is not config or getattr(model, "main_input_name", "") != "input_ids":
        return "the model takes more than tokens"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention looks ahead, so that a prefix depends on what follows"
    for kind in sorted(_rope_types(config)):
        if "dynamic" in kind or kind == "longrope":
            return f"rotary embedding of type {kind}: keys depend on the length of the whole sequence"
    if not adapter and (getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config")):
        return "the model has adapters: say with `adapter` which one is active"
    return ""


def _rope_types(config: Any) -> Iterator[str]:
    """All kinds of rotary embedding in a configuration: one of the model's, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, Mapping):
            for entry in (parameters, *parameters.values()):
                if isinstance(entry, Mapping):
                    yield str(entry.get("rope_type") or entry.get("type") or "default")


def probe(model: Any) -> KVShape | str:
    """Run one token through the model and look at the cache that comes out; or why it is none to keep."""
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            cache = model(input_ids=token, use_cache=True, return_dict=True).get("past_key_values")
    except (TypeError, ValueError, RuntimeError) as error:  # it wants more than that
        return f"one token alone does not go through the model: {error}"
    if trouble := kind_trouble(cache):
        return f"one token leaves {trouble}"
    keys = [layer.keys for layer in cache.layers]
    values = [layer.values for layer in cache.layers]
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in chain(keys, values)}
    if len(shapes) != 1:
        return f"layers, or keys and values, differ in shape or type: {sorted(map(str, shapes))}"
    (batch, heads, tokens, head_dim), dtype = shapes.pop()
    if (batch, tokens) != (1, 1):
        return f"one token leaves a cache of {tokens} (prefix tuning?)"
    return KVShape(len(keys), heads, head_dim, dtype, tuple(tensor.device for tensor in keys))


def kind_trouble(cache: Any) -> str:
    """Why this is no cache to keep: anything but a DynamicCache of plain layers that hold something."""
    if cache is None:
        return "no cache"
    if type(cache) is not transformers.DynamicCache:
        return f"a {type(cache).__name__} instead of a DynamicCache"
    odd = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if odd:
        return f"a cache with layers of type {', '.join(odd)}"
    if not cache.layers or any(layer.get_seq_length() == 0 for layer in cache.layers):
        return "a cache with empty layers"
    return ""


def cache_trouble(cache: Any, shape: KVShape) -> str:
    """Why this cache is not one that the probed model computes for a single prompt; empty if it is."""
    if trouble := kind_trouble(cache):
        return trouble
    tokens = cache.get_seq_length()
    expected = {((1, shape.heads, tokens, shape.head_dim), shape.dtype)}
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    found = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    if found != expected or len(cache.layers) != shape.layers:
        return f"{len(cache.layers)} layers of {sorted(map(str, found))}, not {shape.layers} of {expected}"
    return ""


def request_trouble(defaults: Any, input_ids: torch.Tensor, options: Mapping[str, Any]) -> str:
    """Why this call of `generate` cannot use the store; empty if it can. `defaults`: the generation config."""
    if input_ids.ndim != 2 or len(input_ids) != 1:
        return f"input_ids of shape {tuple(input_ids.shape)}; only [1, tokens] is cached"
    for name, value in options.items():
        if value is not None and name not in _HARMLESS and not hasattr(defaults, name):
            return f"generate() was given {name}"
    sources = (options, _attributes(options.get("generation_config")), _attributes(defaults))
    for name, neutral in _NEUTRAL.items():
        if (value := _effective(name, sources)) not in neutral:
            return f"generate() is to run with {name}={value!r}"
    mask = options.get("attention_mask")
    if mask is None:
        # generate() then takes pad tokens in the prompt for padding, unless they are also the end token.
        pad, end = _effective("pad_token_id", sources), _effective("eos_token_id", sources)
        pads = pad is not None and pad not in (end if isinstance(end, list) else [end])
        return "the prompt holds the pad token" if pads and bool((input_ids == pad).any()) else ""
    return "" if mask.shape == input_ids.shape and bool((mask == 1).all()) else "the attention mask hides tokens"


def _attributes(config: Any) -> Mapping[str, Any]:
    return {} if config is None else vars(config)


def _effective(name: str, sources: Sequence[Mapping[str, Any]]) -> Any:
    """The first value that is given, as generate() looks for it."""
    return next((source[name] for source in sources if source.get(name) is not None), None)


def config_digest(config: Any) -> str:
    """32 hex digits over all of a model's configuration that bears on what it computes."""
    entries = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE}
    text = json.dumps(entries, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_digest(model: Any) -> str | None:
    """64 hex digits over every parameter and buffer: name, type, shape and bytes. None if some cannot be read.

    Bytes go through xxh3-128 (memory speed; the weights are the owner's own, so accidents are what it must tell apart)
    and the results through SHA-256. A tensor that is not on the CPU is copied there, one at a time.
    """
    whole = hashlib.sha256()
    for name, tensor in _weights(model):
        if not _is_plain(tensor):
            return None
        content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(xxhash.xxh3_128_digest(content))
    return whole.hexdigest()


def _weights(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _is_plain(tensor: torch.Tensor) -> bool:
    # Subclasses (quantised, distributed) keep their bytes elsewhere; "meta" ones have none.
    is_plain_type = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_plain_type and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized


def processors(devices: Iterable[torch.device]) -> str:
    """What the layers run on, down to the instruction set: other processors round differently."""
    names = {_processor(device) for device in set(devices)}
    return ",".join(sorted(names))


def _processor(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return device.type
