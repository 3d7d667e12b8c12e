"""What a swap that keeps to its budget costs a pass beside it, for `bench gpu`: a prefill's, and a decode's."""

from itertools import count
from statistics import median
from typing import Final

import kvclient
from bench.gpu_passes import Kind, Pass, products
from bench.gpu_rig import BLOCK_BYTES, BLOCK_TOKENS, TIMEOUT_S, Rig, namespace_of
from bench.harness import timed
from kvclient import devices
from kvclient.swapping import Swapper
from kvclient.swaps import Swap

PASSES: Final = 10  # a round, alone and then beside a swap
PASSES_MOST: Final = 1000  # if nothing has moved by then, nothing will
ROUNDS_MOST: Final = 10_000  # of all weights in a pass


def slowdown(rig: Rig, kind: Kind) -> float:
    """Time of a pass while contexts come and go, one each way at any time, over that of a pass alone, less 1.

    The two are timed in turn, round by round. Raises RuntimeError where nothing moved: that would slow nothing down.
    """
    one_pass = _as_long_as(rig.scale.pass_s, rig, kind)
    alone, beside, moved_bytes = [], [], 0
    with rig.client("copy") as (_, client):
        pages, namespace = rig.pages(rig.there, BLOCK_BYTES), namespace_of(client)
        going = _Swaps(namespace, client.swapper(namespace, pages, rig.place), pages.blocks)
        rig.copies.pins.settle()
        for _ in range(rig.scale.rounds):
            alone += [timed(one_pass) for _ in range(PASSES)]
            for number in range(PASSES_MOST):
                client.tick(median(alone))
                going.keep_up()
                beside.append(timed(one_pass))
                if number + 1 >= PASSES and going.moved_bytes:
                    break
            moved_bytes += going.stop()
    devices.forget(rig.device)
    if not moved_bytes:
        raise RuntimeError("nothing was swapped beside the passes")
    rig.found[f"swapped beside a {kind.name}"] = moved_bytes / sum(beside) / 1e9
    return median(beside) / median(alone) - 1


def swapped_beside(rig: Rig, kind: Kind) -> float:
    """GB/s that moved meanwhile, both ways together."""
    return rig.found[f"swapped beside a {kind.name}"]


def _as_long_as(seconds: float, rig: Rig, kind: Kind) -> Pass:
    """A pass that takes about so long."""
    of, rounds = products(rig, kind), 1
    of(1)()  # the first one compiles, and allocates
    while timed(of(rounds)) < seconds and rounds < ROUNDS_MOST:
        rounds *= 2
    return of(rounds)


class _Swaps:
    """The first half of the pages is stored again and again, each time as something new; the second filled."""

    def __init__(self, namespace: kvclient.Namespace, swapper: Swapper, pages: int) -> None:
        self._namespace, self._swapper, self._pages = namespace, swapper, pages
        self._half = pages // 2
        self._numbers = count()
        self._keys = self._fresh()
        self._going: dict[str, Swap] = {}
        self._moved_bytes = 0
        stored = swapper.swap_out(self._keys, range(self._half)).result(TIMEOUT_S)
        if stored.accepted != self._half:
            raise RuntimeError(f"{stored.accepted} of {self._half} blocks stored: {stored.reasons}")

    def _fresh(self) -> list[bytes]:
        tokens = range(BLOCK_TOKENS * self._half)
        return list(self._namespace.keys(tokens, extra=str(next(self._numbers)).encode()))

    @property
    def moved_bytes(self) -> int:
        """Since it was stopped last."""
        return self._moved_bytes + sum(swap.moved_bytes for swap in self._going.values())

    def keep_up(self) -> None:
        """Begin anew with what is over."""
        if self._over("out"):
            self._going["out"] = self._swapper.swap_out(self._fresh(), range(self._half))
        if self._over("in"):
            self._going["in"] = self._swapper.swap_in(self._keys, range(self._pages - self._half, self._pages))

    def _over(self, which: str) -> bool:
        if which in self._going and not self._going[which].done:
            return False
        swap = self._going.pop(which, None)
        self._moved_bytes += 0 if swap is None else swap.moved_bytes
        return True

    def stop(self) -> int:
        """Nothing is under way any more; bytes that moved since the last time."""
        if not self._swapper.before_reuse(range(self._pages), TIMEOUT_S, keep=False):
            raise RuntimeError("a swap hangs")
        moved, self._moved_bytes = self.moved_bytes, 0
        self._going.clear()
        return moved
