"""Calls under way on a socket to which everybody may connect: so many of each user, and none for ever.

    a call comes, with a token    its user has fewer than `CALLS_OF_ONE`     it has a place until it is over
    its request                   within `REQUEST_S`
    its answer, read              within `CALL_S`; a stream that follows something has all the time it wants

Who is late is ended when the next call comes, whosever that is: places matter only then. gRPC says of a Unix socket's
peer nothing but that there is one, so who it is, is known by the token of each call. Any thread.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

CALLS: Final = 32  # at once, of everybody
CALLS_OF_ONE: Final = 8  # at once, of one uid: it takes several users to keep others out
REQUEST_S: Final = 5.0
CALL_S: Final = 30.0  # a handler waits for the owner no longer than 10 s


@dataclass(slots=True, eq=False)
class Place:
    """One call's."""

    uid: int
    context: grpc.ServicerContext
    end_s: float  # of the clock


class Places:
    """Those of one socket."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._taken: set[Place] = set()

    def take(self, uid: int, context: grpc.ServicerContext) -> Place | None:
        """One, which lasts as long as its call; None: this user has as many as one may."""
        place = Place(uid, context, self._clock() + REQUEST_S)
        with self._lock:
            if sum(one.uid == uid for one in self._taken) >= CALLS_OF_ONE:
                return None
            self._taken.add(place)
        if not context.add_callback(lambda: self._leave(place)):
            self._leave(place)  # it is over already
        return place

    def asked(self, place: Place, *, follows: bool) -> None:
        """Its request has come."""
        place.end_s = math.inf if follows else self._clock() + CALL_S

    def end_late(self) -> None:
        """End the calls whose time is over."""
        now_s = self._clock()
        with self._lock:
            late = [one for one in self._taken if one.end_s <= now_s]
        for one in late:
            one.context.cancel()  # type: ignore[no-untyped-call, unused-ignore]

    def _leave(self, place: Place) -> None:
        with self._lock:
            self._taken.discard(place)
