"""WatchEvents: what happened, and what happens, as a stream. Handler threads, a few of which it may keep for long."""

import threading
from collections.abc import Iterator
from typing import Final

import grpc

from kvproto import control_pb2 as pb
from kvstored.events import Event, Events, Kind

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
        reader = _Reader(request.after, frozenset(request.kinds or map(str, Kind)), warnings=request.warnings)
        first = reader.take(self._events.after(0))  # those before `after` tell how much there was until then
        yield from first[-request.last :] if request.last else first
        while request.follow and self._events.wait(reader.seen, LOOK_UP_S) and context.is_active():
            yield from reader.take(self._events.after(reader.seen))


class _Reader:
    """How far somebody has come, and how much they missed."""

    def __init__(self, after: int, kinds: frozenset[str], *, warnings: bool = False) -> None:
        self.seen = self._after = after
        self._kinds = kinds
        self._warnings = warnings
        self._all = not warnings and len(kinds) == len(Kind)
        self._known: dict[str, int] = {}  # by kind: how many of those asked for there were so far
        self._lost = 0
        self._at_most = False

    def take(self, events: list[Event]) -> list[pb.Event]:
        taken = []
        for event in events:
            if event.kind in self._kinds:
                self._miss(event)
                if event.number > self._after and (event.warning or not self._warnings):
                    taken.append(_message(event, self._lost, at_most=self._at_most))
                    self._lost, self._at_most = 0, False
            self.seen = max(self.seen, event.number)
        return taken

    def _miss(self, event: Event) -> None:
        """Count what was asked for and lies between this one and the one of its kind before it."""
        if self._all:  # numbers themselves tell
            self._lost += max(0, event.number - self.seen - 1)
            return
        now = event.warnings if self._warnings else event.of_kind
        before = now - 1 if event.warning or not self._warnings else now
        if event.number > self._after:
            known = self._known.get(event.kind)
            if known is None:  # those up to `after` are forgotten, if there were any
                known = max(0, before - (event.number - self._after - 1))
                self._at_most = self._at_most or (before > known and self._after > 0)
            self._lost += before - known
        self._known[event.kind] = now


def _message(event: Event, lost: int, *, at_most: bool) -> pb.Event:
    return pb.Event(
        number=event.number, unix_s=event.unix_s, kind=event.kind, warning=event.warning, text=event.text,
        tenant=event.tenant, count=event.count, bytes=event.bytes, lost=lost, lost_at_most=at_most,
    )  # fmt: skip
