"""`codec="auto"`: the codec with which blocks are sooner there and back again, by speeds measured in this process.

What is compared are a store and a load over a link, raw and by each codec, one after the other (`codecs.choose`): a
codec pays if its speed exceeds link x ratio / (ratio - 1). Where the link is not told it is this host's memory, which
no codec of a processor outruns; so auto is raw there, and finds something to do on slower links only: a drive, another
host. Of lossless codecs unless the caller says otherwise. Measured once a process: some tenths of a second.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Final

import numpy as np

from kvclient.codecs import DTYPES, Speed, _way, choose, codec_of, measure
from kvkernels.encodings import GROUP, Encoding
from kvproto.errors import UsageError

AUTO: Final = "auto"
MEASURED_BYTES: Final = 2 << 20  # of a block, at most
_BLOCKS: Final = 4  # as `measure` takes


def resolved(
    *, dtype: str, block_bytes: int, block_shape: Sequence[int] | None, lossy: bool, accelerate: str,
    link_bytes_per_s: float | None,
) -> str:  # fmt: skip
    """The codec that pays for such blocks, by name; "raw" if none does, or none takes them. Raises UsageError,
    also for an `accelerate` that is not here.

    `link_bytes_per_s`: of what the blocks go through; None: this host's memory, measured.
    """
    if link_bytes_per_s is not None and not link_bytes_per_s > 0:
        raise UsageError(f"link_bytes_per_s must be above 0, not {link_bytes_per_s!r}")
    _way(accelerate)  # whoever asks for speed that is not here is told, not given raw blocks
    encodings = tuple(
        encoding
        for encoding in Encoding
        if (lossy or encoding.is_lossless) and _takes(encoding, dtype, block_bytes, block_shape, accelerate)
    )
    if not encodings:
        return "raw"
    row = block_shape[-1] if block_shape else 64  # of those that need none it changes nothing
    whole = GROUP // gcd(GROUP, row)  # rows that are whole groups, too
    size = 2 * row * max(whole, min(block_bytes, MEASURED_BYTES) // 2 // row // whole * whole)
    link = memory_bytes_per_s(size) if link_bytes_per_s is None else link_bytes_per_s
    return choose(link, speeds(encodings, size, row, accelerate), lossy=lossy)


def _takes(
    encoding: Encoding, dtype: str, block_bytes: int, block_shape: Sequence[int] | None, accelerate: str
) -> bool:
    """Are such blocks this codec's? Raises UsageError for what is no block at all."""
    if dtype not in DTYPES or (encoding is Encoding.BF16_FIXED and dtype != "bfloat16"):
        return False
    if block_shape is None and encoding in (Encoding.INT8, Encoding.FP8):
        return False
    for each in (block_bytes, *(block_shape or ())):
        if isinstance(each, bool) or not isinstance(each, int) or each < 1:
            raise UsageError(f"blocks of {block_bytes!r:.60} bytes and of shape {block_shape!r:.100}")
    try:
        made = codec_of(
            encoding.value, dtype=dtype, block_bytes=block_bytes, block_shape=block_shape, lossy=True,
            accelerate=accelerate,
        )  # fmt: skip
    except UsageError:
        return False
    return made is not None


@lru_cache(maxsize=16)
def speeds(encodings: tuple[Encoding, ...], block_bytes: int, row: int, accelerate: str) -> tuple[Speed, ...]:
    """Of these codecs, measured here."""
    return tuple(measure(block_bytes, row, accelerate=accelerate, encodings=encodings))


@lru_cache(maxsize=16)
def memory_bytes_per_s(block_bytes: int) -> float:
    """What copying blocks within this host's memory does, measured as `measure` does it: one way."""
    source = np.ones((_BLOCKS, block_bytes), np.uint8)
    target = np.zeros_like(source)
    best_s = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for one, other in zip(target, source, strict=True):
            one[:] = other
        best_s = min(best_s, time.perf_counter() - began)
    return source.nbytes / max(best_s, 1e-9)
