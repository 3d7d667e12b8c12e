"""What a swap that keeps to its budget costs a pass beside it, for `bench gpu`.

A pass is copies on the device that take about 10 ms: they want what a decode step wants, the device's own memory.
"""

import time
from collections.abc import Callable
from itertools import count
from statistics import median
from typing import TYPE_CHECKING, Final

import kvclient
from bench import harness
from kvclient import devices
from kvclient.swapping import Swapper
from kvclient.swaps import Swap
from kvkernels.device.port import Direction

if TYPE_CHECKING:
    from bench.gpu import Rig

MIB: Final = 1 << 20
BLOCK_BYTES: Final = 2 * MIB
BLOCK_TOKENS: Final = 16
PASS_S: Final = 0.01
PASSES: Final = 10  # a round
TIMEOUT_S: Final = 10.0


def slowdown(rig: "Rig", place: object) -> float:
    """Time of a pass while contexts come and go, one each way at any time, over that of a pass alone, less 1."""
    with (
        harness.daemon("--dram", f"{2 * rig.scale.total_bytes // MIB + 256}MiB") as process,
        kvclient.connect(process.runtime_dir, timeout_s=TIMEOUT_S) as client,
    ):
        if not client.wait_connected(60):
            raise RuntimeError(client.status.why_not)
        namespace = client.namespace(
            model="m", engine="gpu", layout="l", dtype="bfloat16", block_tokens=BLOCK_TOKENS, block_bytes=BLOCK_BYTES
        )
        pages = rig.pages(rig.there, BLOCK_BYTES)
        swapper = client.swapper(namespace, pages, place)
        one_pass = _pass(rig)
        alone_s = median(one_pass() for _ in range(PASSES * rig.scale.rounds))
        keys = namespace.keys(range(BLOCK_TOKENS * (pages.blocks // 2)))
        swapper.swap_out(keys, range(len(keys))).result(60.0)
        going = _Swaps(namespace, swapper, list(keys), pages.blocks)
        beside = []
        for _ in range(PASSES * rig.scale.rounds):
            client.tick(alone_s)
            going.keep_up()
            beside.append(one_pass())
        going.stop()
    devices.forget(rig.device)
    return median(beside) / alone_s - 1


def _pass(rig: "Rig") -> Callable[[], float]:
    """Copies one half of some memory to the other, as often as it takes; seconds."""
    half = rig.scale.total_bytes // 2
    move = [(rig.here.address + half, rig.here.address, half)]
    times = max(1, round(PASS_S / (rig.limits["d2d"] / 2)))

    def work() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            rig.up.copy(Direction.ON_DEVICE, move)
        rig.up.synchronize()
        return time.perf_counter() - begun

    return work


class _Swaps:
    """The first half of the pages is stored again and again, each time as something new; the second filled."""

    def __init__(self, namespace: kvclient.Namespace, swapper: Swapper, keys: list[bytes], pages: int) -> None:
        self._namespace, self._swapper, self._keys, self._pages = namespace, swapper, keys, pages
        self._numbers = count()
        self._going: dict[str, Swap] = {}

    def keep_up(self) -> None:
        """Begin anew with what is over."""
        half = len(self._keys)
        if "out" not in self._going or self._going["out"].done:
            fresh = self._namespace.keys(range(BLOCK_TOKENS * half), extra=str(next(self._numbers)).encode())
            self._going["out"] = self._swapper.swap_out(fresh, range(half))
        if "in" not in self._going or self._going["in"].done:
            self._going["in"] = self._swapper.swap_in(self._keys, range(self._pages - half, self._pages))

    def stop(self) -> None:
        """Nothing is under way any more."""
        if not self._swapper.before_reuse(range(self._pages), TIMEOUT_S, keep=False):
            raise RuntimeError("a swap hangs")
