"""One fetch from an engine to the disk as a trace: real spans, over HTTP, as a collector is sent them."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import kvclient
import kvclient.tracing
from kvclient import Namespace
from kvclient.namespace import Namespace as Plain
from kvproto.errors import UsageError
from kvproto.trace_ids import TraceIds, sampled, trace_ids
from tests.node import Node, assert_blocks, chain, fetch, put, values

pytest.importorskip("opentelemetry.sdk", reason="without the packages of [otel] there are no traces")

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

BLOCK_BYTES = 64 << 10
PLAIN = Plain.fetch


@dataclass(frozen=True)
class Span:
    """As it was sent. Times in ns since the epoch."""

    service: str
    name: str
    trace: bytes
    span: bytes
    parent: bytes
    begun_ns: int
    ended_ns: int
    told: dict[str, object]


@dataclass
class Collector:
    """What was sent to one address."""

    endpoint: str
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        """One request."""
        self.bodies.append(body)
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = {one.key: one.value.string_value for one in of_resource.resource.attributes}
            self.spans += [
                Span(
                    resource["service.name"], span.name, span.trace_id, span.span_id, span.parent_span_id,
                    span.start_time_unix_nano, span.end_time_unix_nano,
                    {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes},
                )
                for of_scope in of_resource.scope_spans
                for span in of_scope.spans
            ]  # fmt: skip

    def trace(self, number: bytes) -> dict[str, list[Span]]:
        """Spans of one, by name."""
        found: dict[str, list[Span]] = {}
        for span in list(self.spans):
            if span.trace == number:
                found.setdefault(span.name, []).append(span)
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """It listens."""
    made = Collector("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            made.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        made.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def traced(endpoint: str) -> Iterator[None]:
    """Fetches of this process are, until the block ends; by then all spans are sent."""
    processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
    kvclient.tracing.enable(processor)
    try:
        yield
    finally:
        kvclient.tracing.disable()
        processor.force_flush()
        processor.shutdown()  # type: ignore[no-untyped-call]


def test_a_fetch_from_disk_is_one_trace_of_engine_daemon_and_drive(collector: Collector) -> None:
    with Node(dram="32MiB", segment="8MiB") as node:
        node.start("--disk-admission", "none", "--disk-codec", "raw")
        keys, warm = chain("cold", 12), chain("warm", 3)
        put(node.namespace(BLOCK_BYTES), keys, values(keys, BLOCK_BYTES))
        node.restart(
            "--disk-admission", "none", "--disk-codec", "raw", "--trace-otlp", collector.endpoint, "--trace-one-in", "1"
        )  # fmt: skip
        ns = node.namespace(BLOCK_BYTES)
        node.await_disk(ns, keys)
        put(ns, warm, values(warm, BLOCK_BYTES), durable=False)
        with traced(collector.endpoint):
            assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
            assert_blocks(fetch(ns, warm).blocks, values(warm, BLOCK_BYTES))
            assert not len(fetch(ns, chain("never", 2)).blocks)
        node.stop()  # which sends what is left
    whole = [span for span in collector.spans if span.name == "kvclient.fetch"]
    cold, hot, never = sorted(whole, key=lambda span: span.begun_ns)
    assert len({cold.trace, hot.trace, never.trace}) == 3, "the control: each is a trace of its own"
    parts = collector.trace(cold.trace)
    assert parts.keys() == {
        "kvclient.fetch", "kvclient.copy", "kvstored.lease", "kvstored.stream", "kvstored.disk.read",
        "kvstored.disk.verify",
    }  # fmt: skip
    (lease,), (stream,) = parts["kvstored.lease"], parts["kvstored.stream"]
    assert (lease.service, cold.service) == ("kvstored", "kvclient")
    assert (cold.parent, lease.parent, stream.parent) == (b"", cold.span, lease.span)
    assert lease.told["kvstored.blocks.coming"] == cold.told["kvstored.blocks.disk"] == 12
    for read, verify in zip(parts["kvstored.disk.read"], parts["kvstored.disk.verify"], strict=True):
        assert read.parent == verify.parent == stream.span
        # Of one process: another one's clock may differ, and its last words come when the client has gone on.
        assert lease.begun_ns <= read.begun_ns < read.ended_ns == verify.begun_ns < verify.ended_ns
        assert verify.ended_ns <= stream.ended_ns
    assert sum(int(str(read.told["kvstored.blocks"])) for read in parts["kvstored.disk.read"]) == 12
    assert len({span.span for some in parts.values() for span in some}) == sum(map(len, parts.values()))
    assert collector.trace(hot.trace).keys() == {"kvclient.fetch", "kvclient.copy", "kvstored.lease"}, "no drive"
    assert collector.trace(never.trace).keys() == {"kvclient.fetch"}, "the daemon keeps nothing of a miss"
    for body in collector.bodies:
        assert not any(key in body or key.hex().encode() in body for key in (*keys, *warm))


def test_within_an_engines_own_trace_a_link_names_the_daemons() -> None:
    exporter = InMemorySpanExporter()
    processor = SimpleSpanProcessor(exporter)
    with Node(disks=0) as node:
        node.start()
        ns, keys = node.namespace(BLOCK_BYTES), chain("linked", 2)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        kvclient.tracing.enable(processor)
        try:
            with TracerProvider().get_tracer("engine").start_as_current_span("request") as around:
                first = lease_of(ns, keys)
            second = lease_of(ns, keys)
        finally:
            kvclient.tracing.disable()
        assert Namespace.fetch is PLAIN
        third = lease_of(ns, keys)
        welcome = node.client._connection.session().welcome  # type: ignore[union-attr]
    inside, alone = (span for span in exporter.get_finished_spans() if span.name == "kvclient.fetch")
    assert welcome is not None
    engines = around.get_span_context()
    assert inside.parent == engines
    assert inside.context is not None
    assert inside.context.trace_id == engines.trace_id
    one, other, _ = (trace_ids(welcome.session, welcome.clock_ns, lease) for lease in (first, second, third))
    (link,) = inside.links
    assert (link.context.trace_id, link.context.span_id) == (one.trace, one.client)
    assert not alone.links
    assert alone.parent is None
    assert alone.context is not None
    assert (alone.context.trace_id, alone.context.span_id) == (other.trace, other.client)
    assert one.trace != other.trace


def lease_of(ns: Namespace, keys: Sequence[bytes]) -> int:
    """The number of the lease of a fetch."""
    with ns.fetch(keys) as lease:
        return lease._parts[0].lease


def test_numbers_are_the_same_on_both_sides_and_one_in_so_many_is_kept() -> None:
    ids = [trace_ids(7, 123_456_789, lease) for lease in range(1, 2001)]
    assert ids == [trace_ids(7, 123_456_789, lease) for lease in range(1, 2001)]
    assert len({one.trace for one in ids}) == len({one.client for one in ids}) == 2000
    assert trace_ids(7, 123_456_790, 1) != ids[0] != trace_ids(8, 123_456_789, 1)
    assert all(0 < part < 1 << bits for one in ids for part, bits in zip(one, (128, 64, 64), strict=True))
    assert 120 < sum(sampled(one, 10) for one in ids) < 280
    assert all(sampled(one, 1) for one in ids)
    assert {one for one in ids if sampled(one, 100)} <= {one for one in ids if sampled(one, 10)}, "a part of those"
    assert not sampled(TraceIds(3, 1, 1), 2)


@pytest.mark.parametrize("one_in", [0, -1, True, 1.5, 10**7])
def test_nonsense_is_refused(one_in: int) -> None:
    with pytest.raises(UsageError, match="one_in"):
        kvclient.tracing.enable(SimpleSpanProcessor(InMemorySpanExporter()), one_in=one_in)
    assert Namespace.fetch is PLAIN


def test_off_it_loads_nothing() -> None:
    script = """
import sys
import kvclient, kvclient.tracing, kvstored.daemon
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("address", ["127.0.0.1:4318", "ftp://x/", "http://", "http://user:secret@host/", "x" * 600])
def test_an_address_that_is_none_stops_the_start(address: str) -> None:
    from kvstored.config import ConfigError, load

    with pytest.raises(ConfigError, match="is not off, or the address of a collector"):
        load(None, {"HOME": "/x"}, {"--trace-otlp": address})


def test_without_its_packages_the_start_says_which_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstored import config

    monkeypatch.setattr(config, "missing_packages", lambda: "opentelemetry.sdk")
    with pytest.raises(config.ConfigError, match=r"flag --trace-otlp: opentelemetry.sdk is missing: pip install"):
        config.load(None, {"HOME": "/x"}, {"--trace-otlp": "http://127.0.0.1:4318/v1/traces"})
    config.load(None, {"HOME": "/x"}, {})
