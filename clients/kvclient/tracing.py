"""OpenTelemetry spans of fetches, for engines that want them: `kvclient.tracing.enable(processor)`. Needs `otel`.

    kvclient.fetch          from the call to the release of its lease
      kvclient.copy         each `copy_to`
      kvstored.lease ...    what the daemon did for it, if it traces too: the same trace, without a word on the wire

Where the engine has a span of its own, the fetch is a part of that trace, and a link names the one that the daemon's
spans are in. Off, which is how it begins, nothing is loaded, and `fetch` is what it is.

    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    kvclient.tracing.enable(BatchSpanProcessor(OTLPSpanExporter("http://127.0.0.1:4318/v1/traces")), one_in=100)
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from kvclient.lease import Lease
from kvclient.namespace import Namespace
from kvproto.errors import UsageError
from kvproto.trace_ids import ONE_IN_MAX, TraceIds, sampled, trace_ids

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

Emit = Callable[[str, TraceIds, int, int, int, Mapping[str, int | bool]], None]

_PLAIN: Final = Namespace.fetch


def enable(processor: "SpanProcessor", *, one_in: int = 1) -> None:
    """Trace one fetch in `one_in` of all clients of this process from now on. Blocking clients only. Any thread.

    `processor` is handed spans that have ended. Those without a hit are traced apart from the daemon, which keeps
    nothing of them. Raises UsageError, and ModuleNotFoundError without the SDK.
    """
    if isinstance(one_in, bool) or not isinstance(one_in, int) or not 1 <= one_in <= ONE_IN_MAX:
        raise UsageError(f"one_in must be a whole number from 1 to {ONE_IN_MAX}, not {one_in!r}")
    emit = _emitter(processor)

    def fetch(self: Namespace, keys: Sequence[bytes], wait_s: float = 1.0, ttl_s: float = 5.0) -> Lease:
        begun_ns = time.time_ns()
        lease = _PLAIN(self, keys, wait_s, ttl_s)
        ids = _ids_of(lease)
        return _TracedLease(lease, ids, emit, begun_ns, len(keys)) if sampled(ids, one_in) else lease

    Namespace.fetch = fetch  # type: ignore[method-assign]


def disable() -> None:
    """No more; what is under way is still told of."""
    Namespace.fetch = _PLAIN  # type: ignore[method-assign]


class _TracedLease(Lease):
    """A lease that says when it was used."""

    def __init__(self, lease: Lease, ids: TraceIds, emit: Emit, begun_ns: int, asked: int) -> None:
        super().__init__(lease._connection, lease._parts, lease._block_bytes)  # noqa: SLF001  one of its own
        self._ids = ids
        self._emit = emit
        self._begun_ns = begun_ns
        self._answered_ns = time.time_ns()
        self._asked = asked
        self._copies = 0

    def copy_to(self, targets: object, stream: object = None) -> bool:
        begun_ns = time.time_ns()
        good = super().copy_to(targets, stream)
        self._copies += 1
        span = (self._ids.client + self._copies) & (2**64 - 1) or 1
        self._emit("kvclient.copy", self._ids, span, begun_ns, time.time_ns(), {"kvstored.good": good})
        return good

    def release(self) -> None:
        if not self._released:
            tiers, in_time = self.tiers, self.valid()
            super().release()
            told = {
                "kvstored.blocks.asked": self._asked, "kvstored.blocks.expected": self.expected,
                "kvstored.blocks.dram": tiers.dram, "kvstored.blocks.disk": tiers.disk, "kvstored.in_time": in_time,
                "kvstored.answered_us": (self._answered_ns - self._begun_ns) // 1000,
            }  # fmt: skip
            self._emit("kvclient.fetch", self._ids, self._ids.client, self._begun_ns, time.time_ns(), told)


def _ids_of(lease: Lease) -> TraceIds:
    """As the daemon has them; of a miss, any."""
    part = next((part for part in lease._parts if part.lease), None)  # noqa: SLF001
    welcome = part.session.welcome if part is not None else None
    if part is None or welcome is None:
        return TraceIds(random.getrandbits(128) | 1, random.getrandbits(64) | 1, 1)
    return trace_ids(welcome.session, welcome.clock_ns, part.lease)


def _emitter(processor: "SpanProcessor") -> Emit:
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
    from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags  # noqa: PLC0415

    resource = Resource.create({"service.name": "kvclient"})
    flags = TraceFlags(TraceFlags.SAMPLED)

    def context(number: int, span: int) -> SpanContext:
        return SpanContext(number, span, is_remote=False, trace_flags=flags)

    def emit(name: str, ids: TraceIds, span: int, begun_ns: int, ended_ns: int, told: Mapping[str, int | bool]) -> None:
        around: SpanContext = trace.get_current_span().get_span_context()
        whole = span == ids.client
        number = around.trace_id if around.is_valid else ids.trace
        parent = (around if around.is_valid else None) if whole else context(number, ids.client)
        links = [Link(context(ids.trace, ids.client))] if around.is_valid and whole else []
        processor.on_end(
            ReadableSpan(
                name, context(number, span), parent=parent, resource=resource, attributes=told, links=links,
                kind=SpanKind.CLIENT if whole else SpanKind.INTERNAL, start_time=begun_ns, end_time=ended_ns,
            )
        )  # fmt: skip

    return emit
