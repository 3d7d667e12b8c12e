"""Metrics and health of a real daemon: all that is documented is there, at zero, and moves when it should."""

import http.client
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

import kvclient
from kvproto import control_pb2, control_pb2_grpc
from kvproto.control_token import token_metadata
from kvstore.insight.misses import REASONS
from kvstored.http_server import CONNECTIONS
from tests.node import Node, chain, fetch, managed, put, until, values
from tests.s3 import S3Server
from tests.segments import flip
from tests.unit.test_metrics_files import documented

BLOCK_BYTES = 64 << 10
PATIENCE_S = 30.0
Scrape = dict[str, float]  # by name and labels, as in the text
NEVER = "kvstored_miss_blocks_total{reason=never}{tier=none}"
# The owner thread hangs when an operator drains, and health looks at it sooner; all other threads go on.
HANGS = """
import sys, threading, kvstored.admin, kvstored.metrics
kvstored.metrics.HUNG_S = 0.2
def drain(self, *, on):
    print("the owner hangs", file=sys.stderr, flush=True)
    threading.Event().wait()
kvstored.admin.Admin.drain = drain
from kvstored.cli import main
sys.exit(main())
"""


class ToSocket(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=PATIENCE_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(str(self.path))


def get(path: Path, page: str) -> tuple[int, str]:
    """Status and body."""
    connection = ToSocket(path)
    try:
        connection.request("GET", page)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def scrape(path: Path) -> Scrape:
    """All samples; the first figures are there soon after the start."""
    answers: list[str] = []

    def answered() -> bool:
        status, text = get(path, "/metrics")
        answers.append(text)
        return status == 200

    assert until(answered)
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answers[-1])
        for sample in family.samples
    }


def moved(path: Path, before: Mapping[str, float], names: set[str]) -> None:
    """All of these rise above what they were; a scrape is up to a second old."""
    latest: Scrape = {}

    def risen() -> bool:
        latest.update(scrape(path))
        return all(latest[name] > before.get(name, 0.0) for name in names)

    assert until(risen, pause_s=0.1), {
        name: (before.get(name), latest[name]) for name in names if latest[name] <= before.get(name, 0)
    }


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as one:
        yield one


def start(node: Node, *arguments: str) -> Path:
    """A new life; where it serves its figures."""
    path = node.home / "metrics.sock"
    node.start("--metrics-listen", str(path), *arguments)
    return path


def asked(path: Path, ns: kvclient.Namespace) -> Scrape:
    """What there is once the daemon looks into misses, which it does not in its first seconds."""
    probes = [0]

    def said() -> bool:
        with ns.fetch(chain(f"probe {probes[0]}", 1), wait_s=0) as lease:
            assert not lease.blocks
        probes[0] += 1
        return scrape(path)[NEVER] > 0

    assert until(said, pause_s=0.1)  # figures are up to a second old
    found: Scrape = {}

    def whole() -> bool:
        found.clear()
        found.update(scrape(path))
        return missed(found) == probes[0]

    assert until(whole, pause_s=0.1)
    return found


def missed(found: Scrape) -> float:
    """Blocks, for whatever reason."""
    return sum(value for name, value in found.items() if name.startswith("kvstored_miss_blocks_total"))


@contextmanager
def control(run: Path) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{run}/control.sock") as channel:
        yield channel


def test_every_documented_metric_is_there_from_the_start_and_no_other(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server() as s3:
        for name, value in s3.environ.items():
            monkeypatch.setenv(name, value)
        remote = ("--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "1GiB")
        check_every_metric(node, start(node, "--gpu-devices", "emulation", "--events-listen", "ipc", *remote))


def check_every_metric(node: Node, path: Path) -> None:
    """Those of a daemon that has all it could have."""
    assert until(lambda: "kvstored_drive_up" in get(path, "/metrics")[1])
    node.namespace().match(chain("somebody is a tenant", 1))
    assert until(lambda: 'kvstored_sessions{tenant="' in get(path, "/metrics")[1])
    families = {
        family.name + ("_total" if family.type == "counter" else ""): family
        for family in text_string_to_metric_families(get(path, "/metrics")[1])
    }
    listed = documented()
    assert families.keys() == listed.keys()
    for name, family in families.items():
        kind, labels = listed[name]
        assert family.type == kind, name
        assert family.samples, f"{name} has no series"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(labels), name
            if kind == "counter" and name not in _NOT_ZERO:
                assert sample.value == 0, sample
    reasons = {(one.labels["reason"], one.labels["tier"]) for one in families["kvstored_miss_blocks_total"].samples}
    assert reasons == set(REASONS)


# What starting and connecting do by themselves.
_NOT_ZERO = {
    "kvstored_sessions_opened_total", "kvstored_matches_total", "kvstored_match_blocks_total",
    "kvstored_miss_blocks_total",
    "process_cpu_seconds_total", "kvstored_remote_sought_chains_total", "kvstored_remote_requests_total",
}  # fmt: skip


def test_what_clients_do_moves_what_it_should(node: Node) -> None:
    path = start(node, "--dram", "16MiB", "--disk-admission", "all")
    ns, start_of_all = node.namespace(BLOCK_BYTES), scrape(path)
    assert not any(value for name, value in start_of_all.items() if "_blocks_total" in name)
    zero = asked(path, ns)
    tenant = f"{{tenant=uid-{os.geteuid()}}}"
    first = chain("first", 64)
    ns.report_prefill(0, 16 * 64, 1.0)
    ns.report_load("dram", 20 << 20, 0.004)
    for _ in range(8):  # one frame in seven is timed
        assert not len(fetch(ns, chain("never", 4), wait_s=0).blocks)
        ns.match(chain("never", 4))
    put(ns, first, values(first, BLOCK_BYTES))
    for _ in range(8):
        assert len(fetch(ns, first).blocks) == 64
    assert ns.pin(first[:2], ttl_s=60.0).blocks == 2
    moved(
        path, zero,
        {
            "kvstored_leases_total", NEVER, "kvstored_matches_total",
            "kvstored_match_blocks_total{result=miss}", "kvstored_hit_blocks_total{tier=dram}",
            f"kvstored_hit_bytes_total{tenant}{{tier=dram}}", "kvstored_reserve_blocks_total{result=granted}",
            "kvstored_published_blocks_total", "kvstored_published_bytes_total", "kvstored_disk_saved_blocks_total",
            "kvstored_disk_saved_bytes_total", "kvstored_disk_commits_total", "kvstored_pin_events_total{event=pinned}",
            "kvstored_pins", f"kvstored_pinned_bytes{tenant}", f"kvstored_used_bytes{tenant}{{tier=dram}}",
            f"kvstored_used_bytes{tenant}{{tier=disk}}", "kvstored_blocks{tier=dram}", "kvstored_blocks{tier=disk}",
            f"kvstored_compute_saved_seconds_total{tenant}{{tier=dram}}",
            f"kvstored_load_seconds_total{tenant}{{tier=dram}}", f"kvstored_assigned_bytes{tenant}{{tier=dram}}",
            f"kvstored_drive_written_bytes_total{{directory={node.disks[0]}}}",
            "kvstored_arenas{state=serving}{tier=dram}",
            "kvstored_request_seconds_count{verb=lease}", "kvstored_request_seconds_sum{verb=lease}",
            "kvstored_disk_seconds_count{operation=write}", "kvstored_owner_lag_seconds_count",
        },
    )  # fmt: skip
    counted = scrape(path)
    assert counted["kvstored_hit_blocks_total{tier=dram}"] == 8 * 64
    assert counted[f"kvstored_hit_bytes_total{tenant}{{tier=dram}}"] == 8 * 64 * BLOCK_BYTES
    assert counted[NEVER] - zero[NEVER] == 8 * 4
    assert counted["kvstored_published_bytes_total"] == 64 * BLOCK_BYTES
    assert counted[f"kvstored_pinned_bytes{tenant}"] == 2 * BLOCK_BYTES

    more = [chain(f"more {number}", 64) for number in range(6)]  # 24 MiB
    for keys in more:
        put(ns, keys, values(keys, BLOCK_BYTES))
    assert not len(fetch(ns, more[0], wait_s=0).blocks)
    assert fetch(ns, more[0]).tiers.disk
    assert ns.prefetch(more[1], deadline_s=60.0).coming
    assert ns.delete(first[-2:]) == 2
    moved(
        path, counted,
        {
            "kvstored_evicted_blocks_total{reason=room}{tier=dram}", "kvstored_hit_blocks_total{tier=disk}",
            "kvstored_miss_blocks_total{reason=on_disk}{tier=disk}", f"kvstored_hit_bytes_total{tenant}{{tier=disk}}",
            f"kvstored_compute_saved_seconds_total{tenant}{{tier=disk}}", "kvstored_disk_loaded_blocks_total",
            "kvstored_disk_loaded_bytes_total", f"kvstored_drive_read_bytes_total{{directory={node.disks[0]}}}",
            "kvstored_disk_seconds_count{operation=read}", "kvstored_prefetches_total{result=asked}",
            "kvstored_prefetched_bytes_total{result=fetched}", "kvstored_deleted_blocks_total",
            "kvstored_disk_erased_blocks_total",
        },
    )  # fmt: skip
    now = scrape(path)
    assert missed(now) - missed(zero) == 8 * 4 + 64
    assert now["kvstored_snapshot_timestamp_seconds"] > counted["kvstored_snapshot_timestamp_seconds"]
    assert not any(value for name, value in now.items() if name.startswith("kvstored_faults_total"))


def test_a_damaged_block_and_a_client_that_breaks_the_rules_are_counted(node: Node) -> None:
    path = start(node, "--dram", "16MiB", "--disk-codec", "raw")
    ns, keys = node.namespace(BLOCK_BYTES), chain("damaged", 1)
    put(ns, keys, values(keys, BLOCK_BYTES))
    for number in range(5):  # 20 MiB: it lies on disk alone
        others = chain(number, 64)
        put(ns, others, values(others, BLOCK_BYTES), durable=False)
    slot = node.slots()[keys[0]]
    zero = asked(path, ns)
    flip(slot.path, (slot.offset + 4096 + 100) * 8)
    assert not len(fetch(ns, keys).blocks)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(node.run / "hot.sock"))
        stranger.send(b"\xff" * 64)
        stranger.settimeout(PATIENCE_S)
        while stranger.recv(4096):
            pass
    moved(
        path, zero,
        {
            "kvstored_faults_total{kind=damaged}", f"kvstored_drive_damaged_blocks_total{{directory={node.disks[0]}}}",
            "kvstored_quarantined_slots", "kvstored_sessions_failed_total",
        },
    )  # fmt: skip
    before = scrape(path)
    assert not len(fetch(ns, keys).blocks)
    moved(path, before, {"kvstored_miss_blocks_total{reason=corrupt}{tier=disk}"})


def test_readiness_follows_a_drain_everywhere_at_once_and_health_does_not(node: Node) -> None:
    path = start(node)
    ns = node.namespace(BLOCK_BYTES)
    assert get(path, "/readyz") == (200, "ok\n")
    with control(node.run) as channel:
        stub, health = control_pb2_grpc.ControlStub(channel), health_pb2_grpc.HealthStub(channel)
        stub.Drain(control_pb2.DrainRequest(), timeout=PATIENCE_S, metadata=token_metadata(node.run))
        assert get(path, "/readyz")[0] == 503
        assert get(path, "/healthz") == (200, "ok\n")
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert until(lambda: scrape(path)["kvstored_draining"] == 1)
        assert scrape(path)["kvstored_serving"] == 0
        before = scrape(path)
        keys = chain("refused", 1)
        ns.store(keys, values(keys, BLOCK_BYTES), wait=True, space_s=0.0)
        moved(path, before, {"kvstored_reserve_blocks_total{result=draining}"})
        stub.Undrain(control_pb2.UndrainRequest(), timeout=PATIENCE_S, metadata=token_metadata(node.run))
        assert get(path, "/readyz") == (200, "ok\n")
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    node.stop()
    assert not path.exists()


def test_an_owner_that_hangs_is_told_of_and_figures_stay(node: Node) -> None:
    path = node.home / "metrics.sock"
    with ExitStack() as stack:
        manager = stack.enter_context(managed(node, "--metrics-listen", str(path), command=("-c", HANGS)))
        manager.start()
        manager.wait_ready()
        assert until(lambda: scrape(path)["kvstored_serving"] == 1)  # on a busy machine a moment is 0.2 s, too
        assert until(lambda: get(path, "/healthz")[0] == 200)
        channel = stack.enter_context(control(node.run))
        token = token_metadata(node.run)
        stub = control_pb2_grpc.ControlStub(channel)
        draining = stub.Drain.future(control_pb2.DrainRequest(), timeout=PATIENCE_S, metadata=token)
        stack.callback(draining.cancel)
        assert until(lambda: "the owner hangs" in node.log())
        assert not draining.done()
        assert until(lambda: get(path, "/healthz")[0] == 503)
        assert "owner thread" in get(path, "/readyz")[1]
        assert get(path, "/readyz")[0] == 503
        then = scrape(path)["kvstored_snapshot_timestamp_seconds"]
        assert until(lambda: get(path, "/metrics")[0] == 200)
        assert scrape(path)["kvstored_snapshot_timestamp_seconds"] == then


def test_strangers_on_the_socket_keep_neither_clients_nor_scrapes_waiting(node: Node) -> None:
    path = start(node)
    ns, keys = node.namespace(BLOCK_BYTES), chain("meanwhile", 8)
    put(ns, keys, values(keys, BLOCK_BYTES))
    with ExitStack() as stack:
        for number in range(3 * CONNECTIONS):
            stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
            stranger.connect(str(path))
            if number % 3:
                with suppress(OSError):
                    stranger.send(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * (9000 if number % 2 else 10))
        assert len(fetch(ns, keys).blocks) == 8
        assert get(path, "/readyz") == (200, "ok\n")
        assert scrape(path)["process_open_fds"] < 4 * CONNECTIONS
    node.assert_alive()


def test_the_socket_is_for_the_group_and_a_dead_one_gives_way(node: Node) -> None:
    path = start(node)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    node.kill()
    assert path.exists(), "nobody could tidy up"
    start(node)
    assert get(path, "/healthz")[0] == 200


def test_a_port_that_is_taken_stops_the_start_with_a_reason(node: Node) -> None:
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("127.0.0.1", 0))  # and does not listen: so that nobody else is given this port meanwhile
        port = ours.getsockname()[1]
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(RuntimeError, match=rf"metrics cannot listen on 127\.0\.0\.1:{port}.*in use"),
        ):
            node.start("--metrics-listen", f"127.0.0.1:{port}")
        node.start("--metrics-listen", f"127.0.0.1:{port}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", "/readyz")
    assert connection.getresponse().status == 200
    connection.close()


def test_nobody_listens_unless_asked_to(node: Node) -> None:
    node.start()
    node.assert_alive()
    assert "metrics" not in node.log()
    assert {path.name for path in node.run.iterdir() if path.is_socket()} == {"hot.sock", "control.sock", "token.sock"}
