"""What lossy codecs cost: errors of KV values, and how far a model's next tokens move (`python -m bench quality`).

The model has random weights with gain (`demo_engine.build_model`), under which all of the cache matters: what is found
says which codec is nearer, not what a trained model makes of it. For that, take your own:

    from bench.quality import logits_moved
    logits_moved(model, input_ids, kvclient.codecs.codec_of("int8", dtype="bfloat16", ...))  # any transformers model
    python -m bench quality --capture FILE                                # KV of any engine: quality_capture.py
"""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bench.harness import Findings, say
from bench.quality_capture import Capture, read_capture, write_capture
from kvclient.codecs import Codec, codec_of
from kvkernels.encodings import Encoding, floats_of

BLOCK_TOKENS: Final = 16
QUESTION_TOKENS: Final = 32
LABEL: Final = "random weights with gain; bfloat16"
Words = NDArray[np.uint16]


def run(*, quick: bool, capture: Path | None = None, save_capture: Path | None = None) -> Findings:
    """All figures of `quality`: of the capture, if there is one, else of the model."""
    if capture is not None:
        return of_capture(read_capture(capture))
    import torch

    from bench.demo_engine import build_model, build_prompt

    torch.set_num_threads(1)
    model = build_model(2 if quick else 6).to(torch.bfloat16)
    _, prompt = build_prompt(128 if quick else 1024)
    cache = _computed(model, prompt[:, :-QUESTION_TOKENS])
    shape, blocks = _blocks_of(cache)
    if save_capture is not None:
        write_capture(save_capture, _tensors(cache), "bfloat16", LABEL)
    results: Findings = {"values": LABEL, "gpu": "not measured"}
    exact = _logits(model, prompt, cache)
    for encoding in Encoding:
        codec = codec_of(encoding, dtype="bfloat16", block_bytes=2 * math.prod(shape), block_shape=shape, lossy=True)
        assert codec is not None
        found, unfit = through(codec, blocks)
        name = encoding.replace("-", "_")
        results[f"{name}_unfit_share"] = unfit / len(blocks)
        results |= errors(name, blocks, found, half=False, row=shape[-1])
        results |= _moved(name, exact, _logits(model, prompt, _cache_of(model, found, shape)))
        say(f"quality: {encoding}")
    assert results["bf16_fixed_logit_kl_most"] == 0.0, "what is lossless moved a logit"
    results |= _moved("control_zeros", exact, _logits(model, prompt, _cache_of(model, np.zeros_like(blocks), shape)))
    return results


def of_capture(capture: Capture) -> Findings:
    """Errors over all tensors of a capture, each taken as one block whose last axis shares a scale: of the mean the
    mean over tensors, else the worst."""
    half = capture.dtype == "float16"
    results: Findings = {"values": f"capture: {capture.label}", "tensors": len(capture.tensors), "dtype": capture.dtype}
    for encoding in Encoding:
        if half and encoding.is_lossless:
            continue
        name, found = encoding.replace("-", "_"), []
        for tensor in capture.tensors.values():
            size, row = tensor.nbytes, tensor.shape[-1]
            codec = codec_of(encoding, dtype=capture.dtype, block_bytes=size, block_shape=tensor.shape, lossy=True)
            assert codec is not None
            flat = tensor.reshape(1, -1)
            coded, unfit = through(codec, flat)
            if not unfit:
                found.append(errors(name, flat, coded, half=half, row=row))
        results[f"{name}_unfit_share"] = 1 - len(found) / len(capture.tensors)
        for key in found[0] if found else ():
            results[key] = _over_tensors(key)([one[key] for one in found])
    return results


def _over_tensors(key: str) -> Callable[[list[float]], float]:
    return min if key.endswith("_least") else fmean if key.endswith("_mean") else max


def through(codec: Codec, blocks: Words) -> tuple[Words, int]:
    """Blocks [count, values] encoded and decoded, and how many the codec could not take: those stay as they were."""
    found, stored, unfit = blocks.copy(), np.zeros(codec.stored_bytes, np.uint8), 0
    for block, into in zip(blocks, found, strict=True):
        if codec.encode(block.view(np.uint8), stored):
            assert codec.decode(stored, into.view(np.uint8))
        else:
            unfit += 1
    return found, unfit


def errors(name: str, before: Words, after: Words, *, half: bool, row: int) -> dict[str, float]:
    """Differences of values, over the root mean square of all, and the cosine of rows (one token of one head).

    Rows with a NaN or an infinity count for nothing: they have no difference, and JSON has no number for one.
    """
    most, total, cosines, least, scale, count = 0.0, 0.0, 0.0, 1.0, 0.0, 0
    for first, last in pairwise([*range(0, before.size, row * 4096), before.size]):
        one = floats_of(before.reshape(-1)[first:last], half=half).astype(np.float64).reshape(-1, row)
        other = floats_of(after.reshape(-1)[first:last], half=half).astype(np.float64).reshape(-1, row)
        finite = np.isfinite(one).all(axis=1)
        if not finite.any():
            continue
        one, other = one[finite], other[finite]
        difference = abs(one - other)
        most, total = max(most, float(difference.max())), total + float(difference.sum())
        scale += float((one**2).sum())
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        cosine = np.where(lengths > 0, (one * other).sum(axis=1) / np.where(lengths > 0, lengths, 1), 1.0)
        cosines, least, count = cosines + float(cosine.sum()), min(least, float(cosine.min())), count + len(cosine)
    values = max(1, count) * row
    rms = math.sqrt(scale / values) or 1.0
    return {
        f"{name}_error_most": most / rms,
        f"{name}_error_mean": total / values / rms,
        f"{name}_cosine_mean": cosines / count if count else 1.0,
        f"{name}_cosine_least": least,
    }


def logits_moved(model: Any, input_ids: Any, codec: Codec) -> dict[str, float]:
    """What a codec does to the last 32 tokens' logits of a transformers model, everything before them being encoded.

    `codec`: of blocks of 16 tokens, [layers, 2, heads, 16, head_dim] in the model's type.
    """
    cache = _computed(model, input_ids[:, :-QUESTION_TOKENS])
    shape, blocks = _blocks_of(cache)
    found, unfit = through(codec, blocks)
    exact = _logits(model, input_ids, cache)
    moved = _moved("codec", exact, _logits(model, input_ids, _cache_of(model, found, shape)))
    return moved | {"unfit_share": unfit / len(blocks)}


# -- the model ---------------------------------------------------------------------------------------------------------


def _computed(model: Any, tokens: Any) -> Any:
    """The cache of whole blocks."""
    import torch

    whole = tokens.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
    with torch.no_grad():
        return model(tokens[:, :whole], use_cache=True, logits_to_keep=1).past_key_values


def _tensors(cache: Any) -> dict[str, Words]:
    """As bits, [heads, tokens, head_dim], by name."""
    import torch

    found = {}
    for index, layer in enumerate(cache.layers):
        for kind, tensor in (("key", layer.keys), ("value", layer.values)):
            found[f"layer{index}.{kind}"] = tensor[0].contiguous().view(torch.int16).numpy().view(np.uint16)
    return found


def _blocks_of(cache: Any) -> tuple[tuple[int, int, int, int, int], Words]:
    """Shape of a block and all of them, as the adapter for transformers stores them: [count, values]."""
    layers = len(cache.layers)
    stacked = np.stack([*_tensors(cache).values()])  # [layers x 2, heads, tokens, head_dim]
    _, heads, tokens, head_dim = stacked.shape
    shape = (layers, 2, heads, BLOCK_TOKENS, head_dim)
    by_block = stacked.reshape(layers, 2, heads, tokens // BLOCK_TOKENS, BLOCK_TOKENS, head_dim)
    return shape, np.ascontiguousarray(np.moveaxis(by_block, 3, 0)).reshape(tokens // BLOCK_TOKENS, -1)


def _cache_of(model: Any, blocks: Words, shape: tuple[int, int, int, int, int]) -> Any:
    """A cache that holds these blocks."""
    import torch
    from transformers import DynamicCache

    layers, _, heads, block_tokens, head_dim = shape
    cache = DynamicCache(config=model.config)
    whole = np.moveaxis(blocks.reshape(-1, *shape), 0, 3).reshape(layers, 2, 1, heads, -1, head_dim)
    assert whole.shape[4] == len(blocks) * block_tokens
    tensor = torch.from_numpy(np.ascontiguousarray(whole).view(np.int16)).view(model.dtype)
    for index in range(layers):
        cache.update(tensor[index, 0], tensor[index, 1], index)
    return cache


def _logits(model: Any, prompt: Any, cache: Any) -> NDArray[np.float64]:
    """Of what comes behind the cache: float64 [tokens, vocabulary]. The cache stays as it is."""
    import copy

    import torch

    behind = cache.get_seq_length()
    with torch.no_grad():
        logits = model(prompt[:, behind:], past_key_values=copy.deepcopy(cache), use_cache=True).logits
    found: NDArray[np.float64] = logits[0].double().numpy()
    return found


def _moved(name: str, exact: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, float]:
    """Kullback and Leibler's distance of next tokens, in nats, and how often the likeliest one is the same."""
    one, other = (_log_softmax(each) for each in (exact, found))
    distances = np.maximum((np.exp(one) * (one - other)).sum(axis=1), 0)
    same = (exact.argmax(axis=1) == found.argmax(axis=1)).mean()
    return {
        f"{name}_logit_kl_mean": float(distances.mean()),
        f"{name}_logit_kl_most": float(distances.max()),
        f"{name}_same_token_share": float(same),
    }


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found
