"""16-bit values of many shapes, for the tests of encodings."""

from functools import cache

import numpy as np

from kvkernels.encodings import Floats, Values, bits_of

COUNT = 2 * 4096 + 640  # two tiles and a bit


def as_bf16(values: Floats) -> Values:
    """Their bits as bfloat16."""
    return bits_of(values, half=False)


def as_half(values: Floats) -> Values:
    """Their bits as IEEE halves."""
    return bits_of(values, half=True)


@cache
def shapes_of_values() -> dict[str, Floats]:
    """By name; all fit a half, and all encodings."""
    random = np.random.default_rng(7)
    normal = random.standard_normal(COUNT).astype(np.float32)
    channels = np.tile(np.exp(random.standard_normal(128) / 2), COUNT // 128 + 1)[:COUNT].astype(np.float32)
    mostly_zero = np.where(random.random(COUNT) < 0.98, 0, normal).astype(np.float32)
    mostly_zero[128:256] = 0
    return {
        "normal": normal,
        "channels of many scales": normal * channels,
        "large": np.clip(normal * 8000, -32000, 32000),
        "small": normal * np.float32(2.0**-20),
        "far from zero": normal * np.float32(0.01) + np.float32(300),
        "mostly zero": mostly_zero,
        "minus zero": np.where(normal > 0, np.float32(0), np.float32(-0.0)),
        "all the same": np.full(COUNT, -3.25, np.float32),
    }
