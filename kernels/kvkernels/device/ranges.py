"""Ranges of addresses that do not overlap, and which of them an address lies in. Any thread."""

import threading
from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Ranges(Generic[T]):
    """What lies where: `add` a range, `find` the one that holds another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._starts: list[int] = []
        self._ranges: dict[int, tuple[int, T]] = {}

    def add(self, address: int, length: int, what: T) -> bool:
        """False if some of it is taken."""
        with self._lock:
            at = bisect_right(self._starts, address)
            if at and address < self._starts[at - 1] + self._ranges[self._starts[at - 1]][0]:
                return False
            if at < len(self._starts) and self._starts[at] < address + length:
                return False
            insort(self._starts, address)
            self._ranges[address] = (length, what)
            return True

    def remove(self, address: int) -> T | None:
        """The range that begins there, which is no more."""
        with self._lock:
            found = self._ranges.pop(address, None)
            if found is None:
                return None
            self._starts.remove(address)
            return found[1]

    def find(self, address: int, length: int) -> T | None:
        """What holds all of these bytes. Of none, what holds the place."""
        with self._lock:
            at = bisect_right(self._starts, address) - 1
            if at < 0:
                return None
            start = self._starts[at]
            size, what = self._ranges[start]
            return what if address + length <= start + size else None

    def hold(self, addresses: Iterable[int], lengths: "Iterable[int] | int") -> bool:
        """Does each of many lie in one of them?"""
        with self._lock:
            starts = np.array(self._starts, dtype=np.uint64)
            ends = np.array([start + self._ranges[start][0] for start in self._starts], dtype=np.uint64)
        first = np.asarray(addresses, dtype=np.uint64)
        if not first.size:
            return True
        if not starts.size:
            return False
        at = np.searchsorted(starts, first, side="right")
        last = first + np.asarray(lengths, dtype=np.uint64)
        return bool((at > 0).all() and (last <= ends[np.maximum(at, 1) - 1]).all())

    def all(self) -> list[T]:
        """By address."""
        with self._lock:
            return [self._ranges[start][1] for start in self._starts]
