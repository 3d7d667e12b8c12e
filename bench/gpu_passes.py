"""What an engine computes in a pass: products of matrices as large as those of a prefill or of a decode step.

By torch, or by CuPy where torch has no CUDA; of the emulation by NumPy, which says nothing of any GPU. A prefill's
products have thousands of rows and are bound by arithmetic; a decode's have one a sequence, and read every weight out
of the device's memory for it. The weights are more than a cache on the device holds.
"""

import importlib
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from bench.gpu_rig import Rig

WEIGHTS: Final = 8  # matrices of width x 4 width
Pass = Callable[[], None]  # returns when it is over


class Kind(Enum):
    """Rows of its products: tokens that are computed at once, by the width of a full matrix."""

    PREFILL = 2048
    DECODE = 32


def products(rig: Rig, kind: Kind) -> Callable[[int], Pass]:
    """A pass of so many rounds of all weights. Raises RuntimeError where nothing computes on this GPU."""
    if rig.device.properties.emulated:
        return _by_numpy(rig, kind)
    try:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            return _by_torch(torch, rig, kind)
    except ImportError:
        pass
    try:
        return _by_cupy(importlib.import_module("cupy"), rig, kind)
    except ImportError as error:
        raise RuntimeError("neither a torch with CUDA nor CuPy is installed, so nothing computes here") from error


def _by_torch(torch: Any, rig: Rig, kind: Kind) -> Callable[[int], Pass]:
    """In a stream of its own: the default one waits for others."""
    width, device = rig.scale.width, torch.device("cuda", rig.device.properties.number)
    options = {"device": device, "dtype": torch.float16}
    rows = torch.ones((kind.value, width), **options)
    weights = [torch.full((width, 4 * width), 1 / width, **options) for _ in range(WEIGHTS)]
    target, stream = torch.empty((kind.value, 4 * width), **options), torch.cuda.Stream(device)
    torch.cuda.synchronize(device)

    def of(rounds: int) -> Pass:
        def work() -> None:
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(rounds):
                    for weight in weights:
                        torch.matmul(rows, weight, out=target)
            stream.synchronize()

        return work

    return of


def _by_cupy(cupy: Any, rig: Rig, kind: Kind) -> Callable[[int], Pass]:
    width, number = rig.scale.width, rig.device.properties.number
    with cupy.cuda.Device(number):
        rows = cupy.ones((kind.value, width), cupy.float16)
        weights = [cupy.full((width, 4 * width), 1 / width, cupy.float16) for _ in range(WEIGHTS)]
        target, stream = cupy.empty((kind.value, 4 * width), cupy.float16), cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device(number).synchronize()

    def of(rounds: int) -> Pass:
        def work() -> None:
            with cupy.cuda.Device(number), stream:
                for _ in range(rounds):
                    for weight in weights:
                        cupy.matmul(rows, weight, out=target)
            stream.synchronize()

        return work

    return of


def _by_numpy(rig: Rig, kind: Kind) -> Callable[[int], Pass]:
    import numpy as np

    width = rig.scale.width
    rows = np.ones((kind.value, width), np.float32)
    weights = [np.full((width, 4 * width), 1 / width, np.float32) for _ in range(WEIGHTS)]
    target = np.empty((kind.value, 4 * width), np.float32)

    def of(rounds: int) -> Pass:
        def work() -> None:
            for _ in range(rounds):
                for weight in weights:
                    np.matmul(rows, weight, out=target)

        return work

    return of
