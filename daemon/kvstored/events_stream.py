"""WatchEvents: what happened, and what happens, as a stream. Handler threads, a few of which it may keep for long."""

import threading
from collections.abc import Iterator
from typing import Final

import grpc

from kvproto import control_pb2 as pb
from kvstored.events import Event, Events, Kind
from kvstored.requests import named

WATCHERS: Final = 8  # at once; each has a thread
LOOK_UP_S: Final = 0.5  # how often to see whether somebody still listens


class Watched:
    """The events of one control socket."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._places = threading.BoundedSemaphore(WATCHERS)

    def stream(self, request: pb.WatchEventsRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        """See control.proto."""
        unknown = [kind for kind in request.kinds if kind not in list(Kind)]
        if unknown:
            text = f"no kind of event is called {unknown[0]!r}: it is one of {', '.join(Kind)}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        if not self._places.acquire(blocking=False):
            text = f"{WATCHERS} watch already; end one of them, or leave out --follow"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        try:
            yield from self._told(request, context)
        finally:
            self._places.release()

    def _told(self, request: pb.WatchEventsRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        kinds = frozenset(request.kinds or map(str, Kind))
        reader = _Reader(request.after, kinds)
        first = reader.take(self._events.after(request.after))
        yield from first[-request.last :] if request.last else first
        while request.follow and self._events.wait(reader.seen, LOOK_UP_S) and context.is_active():
            yield from reader.take(self._events.after(reader.seen))


class _Reader:
    """How far somebody has come, and how much they missed."""

    def __init__(self, seen: int, kinds: frozenset[str]) -> None:
        self.seen = seen
        self._kinds = kinds
        self._lost = 0

    def take(self, events: list[Event]) -> list[pb.Event]:
        taken = []
        for event in events:
            self._lost += event.number - self.seen - 1
            self.seen = event.number
            if event.kind in self._kinds:
                taken.append(pb.Event(**named(event), lost=self._lost))
                self._lost = 0
        return taken
