"""Pages between SGLang's host memory and the daemon: lookups, loads and saves by SGLang's page hashes.

    match   MATCH                              how many pages of a run are there
    load    LEASE, copy as they come           into the pages that SGLang has set aside
    save    RESERVE, copy into the ring, COMMIT

A daemon that is gone or hangs is a miss. SGLang calls from threads of its own: one looks up, one loads, one saves.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvclient.buffers import Scattered
from kvclient.namespace import Namespace
from kvclient.results import Reason, StoreResult

READ_S: Final = 30.0  # how long a lease is held for copying
SPACE_S: Final = 2.0  # how long a save waits for room in the ring
PARENTS: Final = 1 << 15  # of which it is remembered what comes before them: 8 MB at most
TIMED: Final = 1024  # transfers whose speed is remembered until somebody asks


class Parents:
    """Which page comes before which, as far as SGLang has said: with a save it may say nothing. Any thread."""

    def __init__(self, most: int = PARENTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._before: OrderedDict[bytes, bytes] = OrderedDict()

    def learn(self, keys: Sequence[bytes], before: bytes | None) -> None:
        """`keys` follow each other, and the first of them `before`, if that is known."""
        with self._lock:
            for key in keys:
                if before is not None:
                    self._before[key] = before
                    self._before.move_to_end(key)
                before = key
            while len(self._before) > self._most:
                self._before.popitem(last=False)

    def of(self, key: bytes) -> bytes | None:
        """What comes before this page; None: the beginning, or nobody knows."""
        with self._lock:
            return self._before.get(key)


class Timings:
    """Pages moved, and how fast, since somebody asked last. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moved: list[tuple[int, float]] = []

    def add(self, pages: int, page_bytes: int, seconds: float) -> None:
        """One transfer is over."""
        with self._lock:
            if pages and len(self._moved) < TIMED:
                self._moved.append((pages, pages * page_bytes / max(seconds, 1e-9) / 1e9))

    def take(self) -> tuple[list[int], list[float]]:
        """Pages and GB/s of each."""
        with self._lock:
            moved, self._moved = self._moved, []
        return [pages for pages, _ in moved], [speed for _, speed in moved]


class PageStore:
    """One rank's. Any thread. Raises only what a wrong argument deserves (UsageError)."""

    def __init__(self, lookups: Namespace, transfers: Namespace, page_bytes: int, *, disk_wait_s: float) -> None:
        """The same namespace twice: of a client that waits for answers as long as a lookup may, or a transfer."""
        self._lookups = lookups
        self._transfers = transfers
        self._page_bytes = page_bytes
        self._disk_wait_s = disk_wait_s
        self._parents = Parents()
        self.loads = Timings()
        self.saves = Timings()

    def match(self, keys: Sequence[bytes], before: bytes | None = None) -> int:
        """How many of these pages, from the first one on, are there."""
        self._parents.learn(keys, before)
        return self._lookups.match(keys).blocks

    def load(self, keys: Sequence[bytes], target: Scattered) -> int:
        """How many pages, from the first one on, have been filled; what the others hold now means nothing."""
        began = time.monotonic()
        filled = 0
        with self._transfers.fetch(keys, wait_s=self._disk_wait_s, ttl_s=READ_S) as lease:
            wanted = lease.expected
            if wanted and lease.copy_to(Scattered(target.addresses[:wanted], target.lengths, target.owner)):
                filled = wanted
            elif wanted:
                blocks = lease.blocks
                filled = blocks if lease.valid() else 0
        self.loads.add(filled, self._page_bytes, time.monotonic() - began)
        return filled

    def save(self, keys: Sequence[bytes], source: Scattered, before: bytes | None = None) -> list[bool]:
        """Which of these pages are stored now, or are just being stored by another engine."""
        began = time.monotonic()
        self._parents.learn(keys, before)
        parent = before or self._parents.of(keys[0]) if keys else None
        result = self._transfers.store(keys, source, parent=parent, space_s=SPACE_S)
        if parent is not None and _lacks_parent(result):
            # SGLang looks pages up from where its own memory ends: they are of use without those before them.
            result = self._transfers.store(keys, source, space_s=SPACE_S)
        stored = [True] * len(keys)
        for refused in result.refused:
            stored[refused.index] = refused.reason is Reason.PENDING
        self.saves.add(result.accepted, self._page_bytes, time.monotonic() - began)
        return stored

    def flush(self, timeout_s: float) -> None:
        """Wait until all that was saved is visible and, where there is a disk, durable; `timeout_s` at most."""
        self._transfers.flush(timeout_s)


def _lacks_parent(result: StoreResult) -> bool:
    return bool(result.refused) and result.refused[0].index == 0 and result.refused[0].reason is Reason.NO_PARENT
