"""Captures: KV of a model in a file, to measure codecs on. A NumPy archive (`.npz`, no pickles) with

kvstored_capture   1, the version of this format
dtype              "bfloat16" or "float16"
label              a sentence: which model, which prompt
names              of the tensors, in order
tensor_0, ...      uint16, the values' bits, [..., head_dim]: the last axis shares a scale

from bench.quality_capture import write_capture
bits = {"layer0.key": key.contiguous().view(torch.int16).numpy().view(np.uint16), ...}
write_capture(path, bits, "bfloat16", "llama-3-8b, a support chat")
"""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

VERSION: Final = 1
DTYPES: Final = ("bfloat16", "float16")
Words = NDArray[np.uint16]


class CaptureError(ValueError):
    """A file that is no capture, or tensors that cannot be in one."""


@dataclass(frozen=True, slots=True)
class Capture:
    """What a file holds."""

    dtype: str
    label: str
    tensors: Mapping[str, Words]


def write_capture(path: Path, tensors: Mapping[str, Words], dtype: str, label: str) -> None:
    """Raises CaptureError for what no reader would take."""
    _check(dtype, [*tensors], [*tensors.values()])
    arrays: dict[str, Any] = {f"tensor_{number}": tensor for number, tensor in enumerate(tensors.values())}
    arrays |= {"kvstored_capture": np.int64(VERSION), "dtype": np.str_(dtype), "label": np.str_(label)}
    arrays["names"] = np.array([*tensors], dtype=np.str_)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_capture(path: Path) -> Capture:
    """Raises CaptureError, and OSError where there is no file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if int(archive["kvstored_capture"]) != VERSION:
                raise CaptureError(f"{path}: version {archive['kvstored_capture']}, not {VERSION}")
            names = [str(name) for name in archive["names"].reshape(-1)]
            dtype, label = str(archive["dtype"]), str(archive["label"])
            tensors = [archive[f"tensor_{number}"] for number in range(len(names))]
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CaptureError(f"{path} is no capture: {error}") from error
    _check(dtype, names, tensors)
    return Capture(dtype, label, dict(zip(names, tensors, strict=True)))


def _check(dtype: str, names: list[str], tensors: list[Any]) -> None:
    if dtype not in DTYPES:
        raise CaptureError(f"values are {' or '.join(DTYPES)}, not {dtype!r:.40}")
    if not names or len(set(names)) != len(names):
        raise CaptureError(f"{len(names)} tensors, {len(set(names))} names")
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, np.ndarray) or tensor.dtype != np.uint16 or tensor.ndim < 2:
            raise CaptureError(f"{name!r:.60}: bits are uint16 of two dimensions or more, the last one a head's")
        if not tensor.size or tensor.size % 64:
            raise CaptureError(f"{name!r:.60}: {tensor.size} values, where codecs take multiples of 64")
