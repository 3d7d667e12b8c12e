"""Hugging Face transformers: a prompt's KV cache comes out of the store instead of being computed again.

    kv = TransformersKV(client, model)
    answer = kv.generate(input_ids, max_new_tokens=64)       # like model.generate
    answer.sequences, answer.cached_tokens

or step by step:

    prefix = kv.load(input_ids)                               # prefix.cache: a DynamicCache of prefix.tokens tokens
    output = model.generate(input_ids, past_key_values=prefix.cache, attention_mask=torch.ones_like(input_ids),
                            return_dict_in_generate=True)
    kv.save(output.sequences, output.past_key_values)

A block is [layers, 2, heads, block tokens, head dim] in one piece, keys before values, as the model's cache holds them
(rotary embedding applied). Whatever this adapter cannot answer for is computed as if it were not there, and `why_not`
says so in a sentence: other caches than a DynamicCache of plain layers (sliding window, static, quantized, hybrid,
encoder-decoder), batches, beams, inputs besides tokens, a model that has changed, any part of it in training mode,
forward hooks. An absent daemon is a miss.

How close is the outcome? The bytes are those that some forward pass of this very model computed for these very tokens.
Logits then equal a full recomputation to the last bit as far as the machine's matrix product gives a row the same sums
whatever rows stand beside it: so with 32 tokens left to compute on every instruction set tried, while a single one
takes another routine, and blocks that decoding filled differ from a prefill's by rounding, as in any prefix cache.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import transformers

from kvclient.client import Client
from kvclient.integrations.transformers_model import (
    KVShape,
    cache_trouble,
    config_digest,
    model_trouble,
    probe,
    processors,
    request_trouble,
    weights_digest,
)
from kvclient.integrations.transformers_watch import ModelWatch
from kvclient.integrations.trials import Trials
from kvclient.lease import Lease
from kvclient.namespace import Namespace
from kvclient.results import FlushResult, Reason, Tiers
from kvproto.errors import ClosedError, ForkError, UsageError
from kvproto.ids import BlockKey
from kvproto.limits import MIB

STAGING_BYTES: Final = 32 * MIB  # what `save` gathers before it hands blocks over: half a default ring

PROFILED_TOKENS: Final = 64  # a prefill of fewer says little about what computing costs
PROFILED_BYTES: Final = MIB  # and a load of fewer little about memory
SLOWER: Final = "computing is faster than loading, as far as is known"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What `load` found. Unpacks as `cache, tokens`."""

    cache: (
        Any  # DynamicCache, empty for a miss, None for a model that is bypassed: fit for `past_key_values` in any case
    )
    tokens: int  # length of the cache, always less than the prompt
    tiers: Tiers = field(default_factory=Tiers)  # its blocks by the tier that they were read from
    why_not: str = ""  # why nothing could be looked up, or was not loaded; empty for a hit and for a plain miss

    def __iter__(self) -> Iterator[Any]:
        return iter((self.cache, self.tokens))


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of the full blocks of one `save`, in blocks."""

    accepted: int = 0  # copied; visible soon, or already if the call waited for it
    known: int = 0  # stored before
    refused: Counter[Reason] = field(default_factory=Counter)
    why_not: str = ""  # why nothing was tried


@dataclass(frozen=True, slots=True)
class Generated:
    """What `generate` made. `output` is transformers' own, with `logits`, `scores` and so on where asked for."""

    output: Any
    cached_tokens: int = 0  # of the prompt: read, not computed
    tiers: Tiers = field(default_factory=Tiers)
    saved: Saved = field(default_factory=Saved)
    why_not: str = ""  # why the store was not used

    @property
    def sequences(self) -> torch.Tensor:
        """Prompt and continuation, int64 [batch, tokens]."""
        sequences: torch.Tensor = self.output.sequences
        return sequences

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        """With `output_logits=True`: float32 [batch, vocabulary] for each new token."""
        logits: tuple[torch.Tensor, ...] | None = self.output.logits
        return logits


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where the KV of a model that can be kept goes."""

    namespace: Namespace
    shape: KVShape
    watch: ModelWatch  # says whether it still is what the namespace names


class TransformersKV:
    """The store, for one model in one process. Any thread, as far as the model allows it.

    Making one runs the model on one token, to see what its cache is, and reads all weights once (at memory speed on
    the CPU): their digest is part of the namespace, so that equal architectures with other weights never share.
    `revision` replaces the digest: a name that no other weights of this architecture have (repository and commit, say).
    `adapter` names the adapter that is active; models with adapters are bypassed without it.

    Each load and each save first looks whether the model is what it was, in 0.5 ms for 1,000 modules. Where weights
    or buffers have changed (as far as torch counts it), modules are others, adapters (PEFT's) were loaded, switched,
    scaled or merged, or attention is computed in another way, it is bypassed: make a new one. So it is, while it
    lasts, where a part is in training mode or has forward hooks or pre-hooks, for nobody knows what those do; hooks
    by which transformers itself looks on do not count, and accelerate's are none of torch's. Not seen: plain
    attributes of modules (`self_attn.scaling`, say), other entries of the configuration, a `forward` of a module's
    own that was there from the start. Who edits those gives a `revision` of its own.

    `codec`, `lossy`, `accelerate`: how blocks lie in the store, see `Client.namespace`; for models in bfloat16 or
    float16. With one that is lossy logits are near those of a full recomputation, and no more. What
    `accelerate="numba"` compiles is compiled while this is made.

    Raises UsageError for an impossible namespace, such as blocks larger than the daemon's arenas, and for an
    `accelerate` that is not installed.
    """

    def __init__(
        self, client: Client, model: Any, *,
        block_tokens: int = 16, adapter: str = "", revision: str = "", codec: str = "raw", lossy: bool = False,
        accelerate: str = "",
    ) -> None:  # fmt: skip
        self._client = client
        self._model = model
        self._adapter = adapter
        self._block_tokens = block_tokens
        self._trials = Trials()
        kept = self._examine(adapter, revision, codec, lossy=lossy, accelerate=accelerate)
        self._kept: _Kept | None = None
        self.why_not = ""  # why this model is bypassed; empty: it is not
        if isinstance(kept, str):
            self.why_not = kept
            _log.warning("bypass model=%s why=%r", type(model).__name__, kept)
        else:
            self._kept = kept

    @property
    def namespace(self) -> Namespace | None:
        """Where this model's blocks are; None for a model that is bypassed."""
        return self._kept.namespace if self._kept is not None else None

    def generate(self, input_ids: torch.Tensor, *, salt: bytes = b"", **options: Any) -> Generated:
        """`model.generate`, with the longest stored prefix loaded before and the new full blocks stored after.

        `input_ids`: int64 [1, tokens]; `options`: what `model.generate` takes; `salt`: see `load`. What this adapter
        cannot answer for runs as plain `model.generate` and says `why_not`. Raises what the model raises.
        """
        options["return_dict_in_generate"] = True
        why_not = self.why_not or request_trouble(self._model.generation_config, input_ids, options)
        if why_not:
            _log.debug("bypass request why=%r", why_not)
            output = self._model.generate(input_ids, **options)
            return Generated(output, saved=Saved(why_not=why_not), why_not=why_not)
        prefix = self.load(input_ids, salt=salt)
        options["attention_mask"] = torch.ones_like(input_ids)
        first = _FirstToken()
        options["stopping_criteria"] = transformers.StoppingCriteriaList(
            [*(options.get("stopping_criteria") or ()), first]
        )
        began = time.monotonic()
        output = self._model.generate(input_ids, past_key_values=prefix.cache, **options)
        self._report_prefill(prefix.tokens, input_ids.shape[1] - prefix.tokens, first.at - began)
        saved = self.save(output.sequences, output.past_key_values, salt=salt)
        return Generated(output, prefix.tokens, prefix.tiers, saved, prefix.why_not)

    def load(
        self, input_ids: torch.Tensor | Sequence[int], *, salt: bytes = b"", wait_s: float = 5.0, ttl_s: float = 10.0
    ) -> Prefix:
        """The longest stored prefix that leaves at least one token to compute, as a new DynamicCache.

        `input_ids`: [1, tokens] or [tokens]. `salt`: whatever the KV depends on besides the tokens (image digests), or
        a secret that keeps users apart. Blocks that this client has stored and that are not visible yet, or that
        come from disk, are waited for up to `wait_s` seconds. The bytes must be read within `ttl_s` seconds of that,
        else it is a miss. What the daemon knows to be computed faster than loaded is left to be computed (`SLOWER`).
        """
        tokens, why_not = self._tokens(input_ids)
        if tokens is None:
            return Prefix(None if self._kept is None else self._empty_cache(), 0, why_not=why_not)
        kept = self._kept
        assert kept is not None
        # A cache as long as the prompt leaves nothing to compute logits from, and generate() is wrong without a word.
        usable = max(0, len(tokens) - 1) // self._block_tokens
        keys = kept.namespace.keys(tokens[: usable * self._block_tokens], extra=salt)
        began = time.monotonic()
        found = kept.namespace.match(keys)
        if not found.blocks and time.monotonic() - began >= self._client.timeout_s:
            # A daemon that hangs costs one wait and not two: whoever asked had better compute.
            return Prefix(self._empty_cache(), 0, why_not=self._client.status.why_not)
        if not found.worth_loading and not self._trials.due():
            return Prefix(self._empty_cache(), 0, why_not=SLOWER)
        with kept.namespace.fetch(keys, wait_s=wait_s, ttl_s=ttl_s) as lease:
            began = time.monotonic()
            layers = _read_blocks(lease, kept.shape, self._block_tokens, kept.namespace.codec is not None)
            seconds = time.monotonic() - began
            if layers is None:
                return Prefix(self._empty_cache(), 0, why_not=self._client.status.why_not)
            if not lease.valid():
                return Prefix(self._empty_cache(), 0, why_not="the lease lapsed while the blocks were read")
        self._report_load(lease, seconds)
        cache = self._empty_cache()
        for index, (layer, device) in enumerate(zip(layers, kept.shape.devices, strict=True)):
            keys_of_layer, values_of_layer = layer.to(device)
            # An empty update sets the layer up; a full one would copy everything once more.
            cache.update(keys_of_layer[:, :, :0], values_of_layer[:, :, :0], index)
            cache.layers[index].keys, cache.layers[index].values = keys_of_layer, values_of_layer
        return Prefix(cache, lease.blocks * self._block_tokens, lease.tiers)

    def save(
        self,
        input_ids: torch.Tensor | Sequence[int],
        cache: Any,
        *,
        salt: bytes = b"",
        wait: bool = False,
        space_s: float = 1.0,
    ) -> Saved:
        """Store the full blocks of `cache` that are not stored yet.

        `input_ids`: the tokens that the cache was computed from, [1, tokens] or [tokens], by the model as it is now;
        the cache may hold fewer or more. Returns when the blocks have been accepted, with `wait` when they are visible;
        waits up to `space_s` seconds for room, a batch of blocks.
        """
        tokens, why_not = self._tokens(input_ids)
        if tokens is None:
            return Saved(why_not=why_not)
        kept = self._kept
        assert kept is not None
        if why_not := cache_trouble(cache, kept.shape):
            return Saved(why_not=why_not)
        keys = kept.namespace.keys(tokens[: cache.get_seq_length()], extra=salt)
        if not self._client.connected:  # so that nothing is gathered in vain
            return Saved(refused=Counter({Reason.UNREACHABLE: len(keys)}), why_not=self._client.status.why_not)
        return self._store(kept, cache, keys, wait=wait, space_s=space_s)

    def flush(self, timeout_s: float) -> FlushResult:
        """Wait until all that was accepted is visible (and durable where there is a disk tier): before exiting, say."""
        return FlushResult(0, 0, 0, 0) if self._kept is None else self._kept.namespace.flush(timeout_s)

    # -- below them ---------------------------------------------------------------------------------------------

    def _report_prefill(self, cached: int, new: int, seconds: float) -> None:
        """So that the daemon learns what computing costs here."""
        if self._kept is not None and new >= PROFILED_TOKENS and seconds > 0:
            self._kept.namespace.report_prefill(cached, new, seconds)

    def _report_load(self, lease: Lease, seconds: float) -> None:
        """And what loading does; of its own drives it knows better."""
        assert self._kept is not None
        if self._kept.namespace.codec is not None:  # decoding says little about memory
            return
        load_bytes = lease.blocks * self._kept.namespace.identity.block_bytes
        if load_bytes >= PROFILED_BYTES and seconds > 0 and lease.tiers.dram == lease.blocks:
            self._kept.namespace.report_load("dram", load_bytes, seconds)

    def _examine(self, adapter: str, revision: str, codec: str, *, lossy: bool, accelerate: str) -> _Kept | str:
        """The namespace of this model's KV, or why there is none."""
        model = self._model
        if trouble := model_trouble(model, adapter):
            return trouble
        shape = probe(model)
        if isinstance(shape, str):
            return shape
        watch = ModelWatch(model)
        revision = revision or weights_digest(model) or ""
        if not revision:
            return "some weights cannot be read: give `revision`"
        axes = (shape.layers, 2, shape.heads, self._block_tokens, shape.head_dim)
        attention = getattr(model.config, "_attn_implementation", None)
        namespace = self._client.namespace(
            model=f"{type(model).__name__} {config_digest(model.config)}",
            engine=f"transformers {transformers.__version__} torch {torch.__version__}",
            layout=f"layer,kv,head,token,dim {axes} {attention} {processors(shape.devices)}",
            dtype=str(shape.dtype).removeprefix("torch."),
            block_tokens=self._block_tokens,
            block_bytes=math.prod(axes) * shape.dtype.itemsize,
            revision=revision,
            adapter=adapter,
            codec=codec,
            block_shape=axes,
            lossy=lossy,
            accelerate=accelerate,
        )
        if namespace.codec is not None:
            namespace.codec.warm_up()
        return _Kept(namespace, shape, watch)

    def _store(self, kept: _Kept, cache: Any, keys: Sequence[BlockKey], *, wait: bool, space_s: float) -> Saved:
        """Store what is missing, as many blocks at a time as fit the staging memory."""
        namespace, shape = kept.namespace, kept.shape
        accepted, refused = 0, Counter[Reason]()
        known = missing = namespace.match(keys).blocks
        if missing == len(keys):
            return Saved(known=known)
        step = min(len(keys) - missing, max(1, STAGING_BYTES // namespace.block_bytes))
        # From NumPy, which asks for huge pages as torch does not: fresh memory fills up to five times as fast.
        staging = torch.from_numpy(np.empty(step * namespace.block_bytes, np.uint8)).view(shape.dtype)
        staging = staging.view(step, shape.layers, 2, shape.heads, self._block_tokens, shape.head_dim)
        for first in range(missing, len(keys), step):
            batch = keys[first : first + step]
            if refused.keys() - {Reason.PENDING}:  # the chain broke off
                refused[Reason.NO_PARENT] += len(keys) - first
                break
            blocks = staging[: len(batch)]
            _write_blocks(cache, blocks, first * self._block_tokens)
            parent = keys[first - 1] if first else None
            result = namespace.store(batch, blocks, parent=parent, wait=wait, space_s=space_s)
            accepted += result.accepted
            known += result.known
            refused += result.reasons
        return Saved(accepted, known, refused)

    def _empty_cache(self) -> Any:
        return transformers.DynamicCache(config=self._model.config)

    def _tokens(self, input_ids: torch.Tensor | Sequence[int]) -> tuple["np.ndarray[Any, Any] | None", str]:
        """The tokens of the one prompt; None and why not, if the store cannot be used for it."""
        if why_not := self._state_trouble():
            return None, why_not
        tokens = np.asarray(input_ids.cpu() if isinstance(input_ids, torch.Tensor) else input_ids)
        if tokens.ndim == 2:
            if len(tokens) != 1:
                return None, f"a batch of {len(tokens)} prompts; only single ones are cached"
            tokens = tokens[0]
        return tokens, ""

    def _state_trouble(self) -> str:
        """Why the model as it is right now cannot be cached; empty if it can. Raises ForkError and ClosedError."""
        kept = self._kept
        if kept is None:
            return self.why_not
        if trouble := model_trouble(self._model, self._adapter) or kept.watch.trouble():
            return trouble
        if any(torch.is_autocast_enabled(device_type) for device_type in kept.shape.device_types):
            return "autocast is on, which changes what the model computes"
        try:
            kept.namespace.open()  # a look into a table, but for the first time after a daemon came (back)
        except (ForkError, ClosedError):
            raise
        except UsageError as error:  # a daemon with smaller arenas than the one before
            return str(error)
        return ""


class _FirstToken:
    """A stopping criterion of `generate` that notes when the first token is there, and never stops it."""

    at = 0.0

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        if not self.at:
            input_ids[0, -1].item()  # an accelerator may still be computing it
            self.at = time.monotonic()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _read_blocks(lease: Lease, shape: KVShape, block_tokens: int, encoded: bool = False) -> torch.Tensor | None:
    """Blocks of the store as the cache wants them: [layers, 2, 1, heads, tokens, head_dim], each once it is there.

    None if none has come.

    By NumPy, in this thread: torch would start all its threads for each block, which on a busy host takes longer than
    the copying (measured on two cores with one of them taken: 80-800 ms instead of 15 for 64 MiB).
    """
    rows = shape.layers * 2 * shape.heads
    row_bytes = block_tokens * shape.head_dim * shape.dtype.itemsize
    target = np.empty((rows, lease.expected, row_bytes), np.uint8)
    for chunk in lease.chunks():
        # What is decoded is a copy, which is kept no longer than need be.
        parts = [range(index, index + 1) for index in chunk] if encoded else [chunk]
        for part in parts:
            for index, view in zip(part, lease.views_of(part), strict=False):  # of a void lease there are none
                target[:, index] = np.frombuffer(view, np.uint8).reshape(rows, row_bytes)
    if not lease.blocks:
        return None
    if lease.blocks < lease.expected:
        target = np.ascontiguousarray(target[:, : lease.blocks])
    tokens = lease.blocks * block_tokens
    return torch.from_numpy(target).view(shape.dtype).view(shape.layers, 2, 1, shape.heads, tokens, shape.head_dim)


def _write_blocks(cache: Any, blocks: torch.Tensor, first_token: int) -> None:
    """Fill `blocks`, [blocks, layers, 2, heads, block tokens, head_dim], from the cache, `first_token` onwards."""
    count, block_tokens = blocks.shape[0], blocks.shape[4]
    chosen = slice(first_token, first_token + count * block_tokens)
    for index, layer in enumerate(cache.layers):
        for place, tensor in enumerate((layer.keys, layer.values)):
            by_block = tensor.detach()[0, :, chosen].unflatten(1, (count, block_tokens))
            blocks[:, index, place] = by_block.transpose(0, 1)
