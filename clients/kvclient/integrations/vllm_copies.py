"""What early loads of the vLLM connector (`vllm_early`) are made of: copies anybody may do, and who asks for them."""

import logging
import threading
import time
from collections.abc import Callable

from kvclient.copying import copy
from kvkernels.libc import Addresses, Pieces

_log = logging.getLogger(__name__)


def copy_pieces(targets: Addresses, sources: Addresses) -> None:
    """In one call where the kernel does so."""
    if not Pieces(targets, sources).copy():
        copy(zip(targets[:, 0].tolist(), sources[:, 0].tolist(), targets[:, 1].tolist(), strict=True))


class Copy:
    """One part's copy: done once, by whoever takes it first."""

    def __init__(self, copying: Callable[[], None]) -> None:
        self._copying = copying
        self._taken = threading.Lock()
        self._good = False
        self.seconds = 0.0
        self.ended_ns = 0  # CLOCK_MONOTONIC
        self.begun = threading.Event()
        self._ended = threading.Event()

    def run(self) -> None:
        """Do it, unless somebody has begun. Never raises."""
        if not self._taken.acquire(blocking=False):
            return
        self.begun.set()
        began = time.monotonic()
        try:
            self._copying()
            self._good, self.seconds = True, time.monotonic() - began
        except Exception:  # noqa: BLE001 -- `good` says so, and the blocks are computed
            _log.exception("a copy failed")
        finally:
            self.ended_ns = time.monotonic_ns()
            self._ended.set()

    def cancel(self) -> None:
        """Never do it, or wait until it is over."""
        if self._taken.acquire(blocking=False):
            self._ended.set()
        self._ended.wait()

    def good(self) -> bool:
        """Wait until it is over: was all copied?"""
        self._ended.wait()
        return self._good

    @property
    def is_over(self) -> bool:
        """Nobody has to wait."""
        return self._ended.is_set()


class Asking:
    """Does a forward ask for each layer before it reads that layer's memory?"""

    def __init__(self, layers: int) -> None:
        self._all = layers
        self._asked: set[int] = set()
        self._is_sure: bool | None = None

    def forget(self) -> None:
        """What it asked for so far: another one begins."""
        self._asked.clear()

    def note(self, layer: int) -> None:
        """It asked for this layer; a negative number is none of them."""
        if layer >= 0:
            self._asked.add(layer)

    def end(self, *, relied_on: bool) -> bool:
        """It is over; did it ask for all? `relied_on`: something went wrong if it did not."""
        asked_all = len(self._asked) == self._all
        if asked_all and self._is_sure is None:
            self._is_sure = True
        elif relied_on and not asked_all:
            self._is_sure = False
            _log.error("a forward read %d of %d layers unasked", self._all - len(self._asked), self._all)
        self.forget()
        return asked_all

    @property
    def is_sure(self) -> bool:
        """Has one done so, and none not?"""
        return bool(self._is_sure)
