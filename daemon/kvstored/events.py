"""What happens, for operators who look on: numbered, in one row, and only the latest of each kind is remembered.

    owner thread, threads that act    `say`
    handler of a WatchEvents          `after`, `wait`     the numbers that are missing tell how many it did not see

Each kind has a ring of its own, so that a storm of one does not push out the others. Any thread.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from heapq import merge
from typing import Final

REMEMBERED: Final = 1024  # of each kind: 2.4 MB in all
TEXT_LETTERS: Final = 512


class Kind(StrEnum):
    """What an event is about."""

    DAEMON = "daemon"  # it begins, drains, ends
    TRAFFIC = "traffic"  # what was stored and asked for, added up
    EVICT = "evict"  # what left, added up
    FAULT = "fault"  # what was not as it should be, and became a miss
    PIN = "pin"  # pins that ended
    TIER = "tier"  # tiers, drives and the index: worse or better
    CLIENT = "client"  # sessions come and go
    ADMIN = "admin"  # what operators did


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    number: int
    unix_s: float
    kind: Kind
    warning: bool
    text: str
    tenant: str = ""
    count: int = 0
    bytes: int = 0
    of_kind: int = 0  # how many of its kind there were so far, itself included
    warnings: int = 0  # of these


class Events:
    """Those of one daemon's life."""

    def __init__(self) -> None:
        self._rings: dict[Kind, deque[Event]] = {kind: deque(maxlen=REMEMBERED) for kind in Kind}
        self._last = 0
        self._said: Counter[Kind] = Counter()
        self._warnings: Counter[Kind] = Counter()
        self._stopped = False
        self._news = threading.Condition()

    def say(
        self, kind: Kind, text: str, *, warning: bool = False, tenant: str = "", count: int = 0, size_bytes: int = 0
    ) -> None:
        """Something happened."""
        with self._news:
            self._last += 1
            self._said[kind] += 1
            self._warnings[kind] += warning
            event = Event(
                self._last, time.time(), kind, warning, text[:TEXT_LETTERS], tenant, count, size_bytes,
                self._said[kind], self._warnings[kind],
            )  # fmt: skip
            self._rings[kind].append(event)
            self._news.notify_all()

    def after(self, number: int) -> list[Event]:
        """All with larger numbers that are remembered, in order. A gap between two numbers: those were forgotten."""
        with self._news:
            if number >= self._last:
                return []
            newer = [_newer(ring, number) for ring in self._rings.values()]
        return list(merge(*newer, key=lambda event: event.number))

    def wait(self, number: int, timeout_s: float) -> bool:
        """Until there is one with a larger number, or the time is over; False once there will be none any more."""
        with self._news:
            self._news.wait_for(lambda: self._stopped or self._last > number, timeout_s)
            return not self._stopped or self._last > number

    def stop(self) -> None:
        """Whoever waits is told that there is no more to come."""
        with self._news:
            self._stopped = True
            self._news.notify_all()


def _newer(ring: Iterable[Event], number: int) -> list[Event]:
    return [event for event in ring if event.number > number]
