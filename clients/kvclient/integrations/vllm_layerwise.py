"""Loads layer by layer: the forward begins while the memory of later layers is still being filled.

    engine's thread    begin: the leases of a step ... wait, before each layer's attention ... end: how many are good
    one thread         the first layer of all blocks of all leases, the second, ...

Only bytes move here. The leases are taken before, of blocks that lie in DRAM, which the daemon has verified; what can
still go wrong is that one lapses in the middle of the forward. That is known at `end`, before the engine takes what
the forward has computed: it throws it away, and nothing computed on it is ever saved (`Scheduler.plan`).
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Final

import numpy as np

from kvclient.copying import Move, copy_at_once
from kvclient.integrations.vllm_jobs import LoadJob
from kvclient.integrations.vllm_layout import LayerPiece, Layout
from kvclient.lease import Lease

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Leased:
    """Blocks of a job from the front, held by a lease while their bytes are copied."""

    job: LoadJob
    lease: Lease
    sources: Sequence[int]  # address of each block
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0  # until the last layer was filled
    good: bool = False  # all of it was copied, and while the lease was good

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self.sources)


def leased(job: LoadJob, lease: Lease) -> Leased:
    """What has come of a job; waits for it as `Lease.blocks` does."""
    try:
        return Leased(job, lease, [_address(view) for view in lease.views])
    except BaseException:
        lease.release()
        raise


class Layerwise:
    """Begins, waits and ends on the engine's thread; copies on one of its own."""

    def __init__(self, layout: Layout) -> None:
        self._order = {piece: number for number, piece in enumerate(dict.fromkeys(layout.layers.values()))}
        self._layers = layout.layers
        self._lock = threading.Condition()
        self._steps: SimpleQueue[Sequence[Leased] | None] = SimpleQueue()
        self._under_way: Sequence[Leased] = ()
        self._filled = 0  # pieces of this step
        self._over = True
        self._thread: Final = threading.Thread(target=self._run, name="kvstored-layers", daemon=True)
        self._thread.start()

    def begin(self, loads: Sequence[Leased]) -> None:
        """Fill the blocks of a step, all of them layer by layer. The step before must have ended."""
        assert self._over, "one step at a time"
        if loads:
            self._under_way, self._filled, self._over = loads, 0, False
            self._steps.put(loads)

    def wait(self, layer: str) -> None:
        """Until this layer of all blocks is filled, or never will be; for an unknown one, until all are."""
        if self._over:
            return
        piece = self._layers.get(layer)
        needed = len(self._order) if piece is None else self._order[piece] + 1
        with self._lock:
            self._lock.wait_for(lambda: self._over or self._filled >= needed)

    def end(self) -> Sequence[Leased]:
        """Wait for the last layer. What was loaded in this step, `good` or not."""
        with self._lock:
            self._lock.wait_for(lambda: self._over)
        loads, self._under_way = self._under_way, ()
        return loads

    def stop(self) -> None:
        """End the thread."""
        self._steps.put(None)
        self._thread.join(timeout=10)

    # -- its thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (loads := self._steps.get()) is not None:
            try:
                self._fill(loads)
            except Exception:  # noqa: BLE001 -- whatever it was, the engine must go on, and hear that the blocks are bad
                _log.exception("a load layer by layer failed")
            finally:
                for each in loads:
                    each.lease.release()
                with self._lock:
                    self._over = True
                    self._lock.notify_all()

    def _fill(self, loads: Sequence[Leased]) -> None:
        for piece in self._order:
            self.copy([move for each in loads for move in _moves(piece, each)])
            with self._lock:
                self._filled += 1
                self._lock.notify_all()
        for each in loads:
            each.good, each.seconds = each.lease.valid(), time.monotonic() - each.began

    def copy(self, moves: list[Move]) -> None:
        """One layer of all blocks."""
        copy_at_once(moves)


def _moves(piece: LayerPiece, load: Leased) -> Iterator[Move]:
    for block, source in zip(load.job.block_ids, load.sources, strict=False):
        yield piece.base + block * piece.stride, source + piece.start, piece.length


def _address(view: memoryview) -> int:
    interface: dict[str, Any] = np.frombuffer(view, np.uint8).__array_interface__
    return int(interface["data"][0])
