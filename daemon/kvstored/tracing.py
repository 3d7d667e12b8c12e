"""OpenTelemetry spans of leases, for whoever asked for them: from the frame to the drive. Needs the extra `otel`.

    kvclient.fetch                      the client's, if it traces too (kvclient/tracing.py)
      kvstored.lease                    LEASE, from the frame to its answer             owner thread
        kvstored.stream                 until the last block that had to come was told of
          kvstored.disk.read            a read of neighbouring blocks                   a drive's thread
          kvstored.disk.verify          their checksums; unpacking, decrypting

Off, nothing of this is loaded and nothing asks whether it is on: `install` puts itself between the server and its
verbs. Spans have numbers and sizes, never keys, tokens or bytes. They are sent by a thread of the exporter's; what it
cannot get rid of it drops.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from kvproto.frames import Head, Verb
from kvproto.trace_ids import TraceIds, sampled, trace_ids
from kvstore.sessions import Lease, Session, Stream
from kvstore.tier.orders import Load
from kvstored.connection import Connection

if TYPE_CHECKING:
    from kvstored.hot import HotServer
    from kvstored.workers import HostWorkers

Attributes = Mapping[str, int | str | bool]
Handler = Callable[[Connection, Session, Head], None]
Emit = Callable[[str, TraceIds, int, int | None, int, int, Attributes], None]

READS: Final = 4096  # that nobody has looked at yet: those of streams that are not traced come and go here
COMING: Final = 64  # leases, until those that are over are looked for
FLUSH_MS: Final = 2000
CLOCK_NS: Final = 60 * 10**9
_SPANS_MAX: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Read:
    """One read of neighbouring blocks. CLOCK_MONOTONIC ns."""

    rows: frozenset[int]
    begun_ns: int
    read_ns: int  # all bytes had come
    ended_ns: int


@dataclass(slots=True)
class Traced:
    """A lease whose blocks are still coming."""

    ids: TraceIds
    stream: int  # id of the span
    rows: frozenset[int]
    begun_ns: int
    spans: int = 0  # below it


@dataclass(slots=True)
class Tracing:
    """Owner thread, but for what says otherwise. `emit` hands a span on; one lease in `one_in` is traced."""

    emit: Emit
    one_in: int
    close: Callable[[], None]
    _coming: dict[Lease, Traced] = field(default_factory=dict)
    _reads: deque[Read] = field(default_factory=lambda: deque(maxlen=READS))

    def install(self, hot: "HotServer", workers: "HostWorkers") -> None:
        """Between the server and what it does, for good."""
        ready = hot.ready

        def traced_lease(plain: Handler) -> Handler:
            def lease(connection: Connection, session: Session, head: Head) -> None:
                before, begun_ns = session.next_lease, time.monotonic_ns()
                plain(connection, session, head)
                if session.next_lease != before:
                    self._leased(connection, session, session.leases.get(before), head.count, begun_ns)

            return lease

        def traced_ready(stream: Stream, first: int, stop: int, left: int) -> None:
            ready(stream, first, stop, left)
            self._told(left)

        hot.wrap(Verb.LEASE, traced_lease)
        hot.ready = traced_ready  # type: ignore[method-assign]
        workers.observe = self.read

    def read(self, orders: Sequence[Load], begun_ns: int, read_ns: int, ended_ns: int) -> None:
        """A drive has read these. Any thread, before the owner hears of it."""
        self._reads.append(Read(frozenset(order.row for order in orders), begun_ns, read_ns, ended_ns))

    def _leased(self, connection: Connection, session: Session, lease: Lease | None, asked: int, begun_ns: int) -> None:
        if lease is None:
            return
        ids = trace_ids(session.number, connection.connected_ns, lease.number)
        if not sampled(ids, self.one_in):
            return
        whole = lease.count if lease.stream is None else int(lease.stream.rows.size)
        told: Attributes = {
            "kvstored.tenant": session.tenant.name, "kvstored.session": session.number, "kvstored.lease": lease.number,
            "kvstored.blocks.asked": asked, "kvstored.blocks.there": lease.count,
            "kvstored.blocks.coming": whole - lease.count,
        }  # fmt: skip
        self.emit("kvstored.lease", ids, ids.lease, ids.client, begun_ns, time.monotonic_ns(), told)
        if lease.stream is not None:
            if len(self._coming) >= COMING:
                self._forget()
            rows = frozenset(map(int, lease.stream.rows[lease.count :]))
            self._coming[lease] = Traced(ids, _below(ids.lease, 1), rows, begun_ns)

    def _forget(self) -> None:
        """Leases that were given back before their blocks had come."""
        for lease in [one for one in self._coming if one.session.leases.get(one.number) is not one]:
            del self._coming[lease]

    def _told(self, left: int) -> None:
        """READY was sent, or would have been."""
        self._look_at_reads()
        for lease in [lease for lease in self._coming if lease.stream is None]:  # this one too, once all has come
            traced = self._coming.pop(lease)
            told: Attributes = {"kvstored.blocks": lease.count, "kvstored.blocks.left": left}
            parent = traced.ids.lease
            self.emit("kvstored.stream", traced.ids, traced.stream, parent, traced.begun_ns, time.monotonic_ns(), told)

    def _look_at_reads(self) -> None:
        while self._reads:
            read = self._reads.popleft()
            for traced in self._coming.values():
                blocks = len(read.rows & traced.rows)
                if blocks:
                    self._spans_of(traced, read, blocks)

    def _spans_of(self, traced: Traced, read: Read, blocks: int) -> None:
        told: Attributes = {"kvstored.blocks": len(read.rows), "kvstored.blocks.of_this_lease": blocks}
        for name, begun_ns, ended_ns in (
            ("kvstored.disk.read", read.begun_ns, read.read_ns), ("kvstored.disk.verify", read.read_ns, read.ended_ns),
        ):  # fmt: skip
            traced.spans += 1
            span = _below(traced.stream, traced.spans)
            self.emit(name, traced.ids, span, traced.stream, begun_ns, ended_ns, told)


class _Clock:
    """What CLOCK_MONOTONIC lacks to be the time since the epoch; looked up now and then, so that spans touch."""

    def __init__(self) -> None:
        self._until_ns = self._beside_ns = 0

    def beside_ns(self) -> int:
        """As of this minute."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._until_ns:
            self._until_ns, self._beside_ns = now_ns + CLOCK_NS, time.time_ns() - now_ns
        return self._beside_ns


def _below(span: int, number: int) -> int:
    """An id for a span's part: as good as drawn at random, since the span's own is."""
    return (span + number * 0x9E3779B97F4A7C15) & _SPANS_MAX or 1


def make_tracing(endpoint: str, one_in: int, version: str) -> Tracing:
    """Spans go to a collector that speaks OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`.

    Raises ModuleNotFoundError without the packages of the extra `otel`.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags  # noqa: PLC0415

    processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
    resource = Resource.create({"service.name": "kvstored", "service.version": version})
    flags = TraceFlags(TraceFlags.SAMPLED)

    clock = _Clock()

    def context(trace: int, span: int, *, remote: bool) -> SpanContext:
        return SpanContext(trace, span, is_remote=remote, trace_flags=flags)

    def emit(
        name: str, ids: TraceIds, span: int, parent: int | None, begun_ns: int, ended_ns: int, told: Attributes
    ) -> None:
        beside_ns = clock.beside_ns()
        processor.on_end(
            ReadableSpan(
                name, context(ids.trace, span, remote=False),
                parent=None if parent is None else context(ids.trace, parent, remote=parent == ids.client),
                resource=resource, attributes=told, kind=SpanKind.SERVER if span == ids.lease else SpanKind.INTERNAL,
                start_time=begun_ns + beside_ns, end_time=ended_ns + beside_ns,
            )
        )  # fmt: skip

    def close() -> None:
        processor.force_flush(FLUSH_MS)
        processor.shutdown()  # type: ignore[no-untyped-call]

    return Tracing(emit, one_in, close)
