"""The control server over a real Unix socket, with an owner that answers from memory in a thread of its own."""

import logging
import os
import queue
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvstore import report
from kvstored import control
from kvstored.control import ControlServer
from tests.unit.control_fakes import BLOCK_BYTES, DIGEST_A, DIGEST_B, KEYS, MemoryPort, ThreadOwner

HEX_A, HEX_B = DIGEST_A.hex(), DIGEST_B.hex()
SERVICE = "kvstored.control.v1.Control"
WAIT_S = 10.0  # for what comes at once unless something is broken
Health = health_pb2.HealthCheckResponse


@dataclass
class Served:
    """A running server, and what a caller needs."""

    server: ControlServer
    owner: ThreadOwner
    port: MemoryPort
    channel: grpc.Channel

    @property
    def stub(self) -> Any:
        return control_pb2_grpc.ControlStub(self.channel)

    def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status)

    def refusal(self, verb: str, request: object, timeout_s: float | None = WAIT_S) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            getattr(self.stub, verb)(request, timeout=timeout_s)
        return caught.value.code(), str(caught.value.details())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    port = MemoryPort()
    owner = ThreadOwner(port)
    server = ControlServer(owner, tmp_path)
    server.start()
    with grpc.insecure_channel(f"unix:{server.path}") as channel:
        yield Served(server, owner, port, channel)
    server.stop(0.0)
    owner.stop()


class TestSocket:
    def test_is_0600_before_anybody_can_find_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[tuple[int, int, bool]] = []
        rename = Path.rename

        def spy(source: Path, target: Path) -> Path:
            seen.append((mode(source.parent), mode(source), target.exists()))
            return rename(source, target)

        monkeypatch.setattr(Path, "rename", spy)
        port = MemoryPort()
        owner = ThreadOwner(port)
        server = ControlServer(owner, tmp_path)
        before = os.umask(0)
        try:
            server.start()
        finally:
            os.umask(before)
        assert seen == [(0o700, 0o600, False)]
        assert mode(server.path) == 0o600
        assert [entry.name for entry in tmp_path.iterdir()] == ["control.sock"]
        server.stop(0.0)
        owner.stop()

    def test_is_removed_by_stop_and_stop_may_be_repeated(self, served: Served) -> None:
        served.server.stop(0.0)
        assert not served.server.path.exists()
        served.server.stop(0.0)

    def test_of_a_successor_survives_stop(self, served: Served) -> None:
        served.server.path.unlink()
        served.server.path.touch()
        served.server.stop(0.0)
        assert served.server.path.exists()

    def test_left_by_a_dead_daemon_is_replaced(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "control.sock"))
        owner = ThreadOwner(MemoryPort())
        server = ControlServer(owner, tmp_path)
        server.start()
        with grpc.insecure_channel(f"unix:{server.path}") as channel:
            control_pb2_grpc.ControlStub(channel).Ping(pb.PingRequest(), timeout=WAIT_S)
        server.stop(0.0)
        owner.stop()

    def test_may_lie_in_a_directory_with_odd_letters(self, tmp_path: Path) -> None:
        odd = tmp_path / "a b%20#é"
        odd.mkdir()
        server = ControlServer(NoOwner(), odd)
        server.start()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(odd / "control.sock"))
        server.stop(0.0)

    def test_path_too_long_for_a_socket_is_a_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="longer than the 107 bytes"):
            ControlServer(NoOwner(), tmp_path / ("x" * 107)).start()

    def test_without_its_directory_is_an_error_and_leaves_nothing(self, tmp_path: Path) -> None:
        server = ControlServer(NoOwner(), tmp_path / "absent")
        with pytest.raises(FileNotFoundError):
            server.start()
        server.stop(0.0)
        assert list(tmp_path.iterdir()) == []


class TestAnswers:
    def test_status_is_the_report_field_by_field(self, served: Served) -> None:
        answer = served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)
        same(answer, served.port.status())

    def test_statistics_are_the_counters(self, served: Served) -> None:
        same(served.stub.GetStatistics(pb.GetStatisticsRequest(), timeout=WAIT_S).counters, served.port.counters())

    def test_lists_come_in_order_and_whole(self, served: Served) -> None:
        stub = served.stub
        same(stub.ListNamespaces(pb.ListNamespacesRequest(), timeout=WAIT_S).namespaces, served.port.namespaces())
        same(stub.ListTenants(pb.ListTenantsRequest(), timeout=WAIT_S).tenants, served.port.tenants())
        same(stub.ListClients(pb.ListClientsRequest(), timeout=WAIT_S).clients, served.port.clients())
        same(stub.GetConfig(pb.GetConfigRequest(), timeout=WAIT_S).settings, served.port.config())

    def test_ping_says_how_long_the_owner_took(self, served: Served) -> None:
        assert 0.0 < served.stub.Ping(pb.PingRequest(), timeout=WAIT_S).owner_s < WAIT_S

    def test_reflection_names_every_service(self, served: Served) -> None:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=WAIT_S)
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names

    @pytest.mark.parametrize(
        ("message", "value"),
        [
            (pb.Tier, report.TierReport),
            (pb.Counters, report.Counters),
            (pb.Namespace, report.NamespaceReport),
            (pb.Tenant, report.TenantReport),
            (pb.Client, report.SessionReport),
            (pb.ConfigValue, report.ConfigValue),
            (pb.GetStatusResponse, report.DaemonReport),
            (pb.ClearResponse, report.ClearReport),
        ],
    )
    def test_messages_mirror_the_reports_name_by_name(self, message: Any, value: Any) -> None:
        assert {one.name for one in message.DESCRIPTOR.fields} == {one.name for one in fields(value)}


class TestDrain:
    def test_flips_health_and_undrain_flips_it_back(self, served: Served) -> None:
        assert [served.health(), served.health(SERVICE)] == [Health.SERVING] * 2
        served.stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
        assert served.port.draining
        assert [served.health(), served.health(SERVICE)] == [Health.NOT_SERVING] * 2
        served.stub.Undrain(pb.UndrainRequest(), timeout=WAIT_S)
        assert not served.port.draining
        assert [served.health(), served.health(SERVICE)] == [Health.SERVING] * 2

    def test_is_seen_by_watchers(self, served: Served) -> None:
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.SERVING
        served.stub.Drain(pb.DrainRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.NOT_SERVING
        watch.cancel()

    def test_that_fails_leaves_health_alone(self, served: Served) -> None:
        served.port.trouble = RuntimeError("broken")
        assert served.refusal("Drain", pb.DrainRequest())[0] is grpc.StatusCode.INTERNAL
        assert served.health() == Health.SERVING

    def test_whose_caller_gave_up_after_it_began_still_flips_health(self, served: Served) -> None:
        began, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            began.set()
            go_on.wait()

        served.port.before_drain = hold
        watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == Health.SERVING
        call = served.stub.Drain.future(pb.DrainRequest(), timeout=WAIT_S)
        assert began.wait(WAIT_S)
        call.cancel()
        go_on.set()
        assert next(watch).status == Health.NOT_SERVING
        watch.cancel()


class TestClear:
    @pytest.mark.parametrize(
        ("request_", "scope", "blocks"),
        [
            (pb.ClearRequest(everything={}), report.ClearScope(), 8),
            (pb.ClearRequest(everything={}, tenant="web"), report.ClearScope("web"), 1),
            (pb.ClearRequest(namespace_digest=HEX_A), report.ClearScope(None, DIGEST_A), 6),
            (pb.ClearRequest(namespace_digest=HEX_A, tenant="web"), report.ClearScope("web", DIGEST_A), 1),
            (
                pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": KEYS[2:4]}),
                report.ClearScope(None, DIGEST_A, KEYS[2:4]),
                3,
            ),
        ],
    )
    def test_drops_what_its_scope_says(
        self, served: Served, request_: pb.ClearRequest, scope: report.ClearScope, blocks: int
    ) -> None:
        request_.dry_run = True
        counted = served.stub.Clear(request_, timeout=WAIT_S)
        assert (counted.blocks, counted.bytes, counted.dry_run) == (blocks, blocks * BLOCK_BYTES, True)
        request_.dry_run = False
        dropped = served.stub.Clear(request_, timeout=WAIT_S)
        assert (dropped.blocks, dropped.leased_blocks, dropped.dry_run) == (blocks, counted.leased_blocks, False)
        assert served.port.scopes == [scope, scope]
        assert served.port.tier().blocks == 8 - blocks

    @pytest.mark.parametrize(
        ("request_", "reason"),
        [
            (pb.ClearRequest(), "nothing to clear"),
            (pb.ClearRequest(tenant="web"), "nothing to clear"),
            (pb.ClearRequest(everything={}, tenant=""), "tenant must not be empty"),
            (pb.ClearRequest(namespace_digest="abc"), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A[:-2] + "zz"), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A[:-2] + "  "), "64 hex digits"),
            (pb.ClearRequest(namespace_digest=HEX_A + "00"), "64 hex digits"),
            (pb.ClearRequest(prefix={"keys": KEYS[:1]}), "keys mean nothing without"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A}), "1 to 1024 keys"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [b"short"]}), "32 bytes, not 5"),
            (pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [KEYS[0]] * 1025}), "not 1025"),
        ],
    )
    def test_refuses_a_malformed_scope_without_asking_the_owner(
        self, served: Served, request_: pb.ClearRequest, reason: str
    ) -> None:
        code, text = served.refusal("Clear", request_)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert reason in text
        assert not served.owner.asked.is_set()

    @pytest.mark.parametrize(
        ("request_", "text"),
        [
            (pb.ClearRequest(everything={}, tenant="nobody"), "no tenant is called nobody"),
            (pb.ClearRequest(namespace_digest="00" * 32), "no namespace has the digest 000000000000"),
            (
                pb.ClearRequest(namespace_digest=HEX_B, tenant="web"),
                "no namespace has the digest abcdef02abcd",
            ),
        ],
    )
    def test_of_what_does_not_exist_is_not_found(self, served: Served, request_: pb.ClearRequest, text: str) -> None:
        assert served.refusal("Clear", request_) == (grpc.StatusCode.NOT_FOUND, text)


class TestTrouble:
    def test_of_an_owner_that_does_not_answer_ends_at_the_callers_deadline(self, served: Served) -> None:
        with served.owner.busy():
            assert served.refusal("Drain", pb.DrainRequest(), 0.05)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        served.stub.Ping(pb.PingRequest(), timeout=WAIT_S)
        assert not served.port.draining, "a question that timed out before it began must not run"

    def test_of_an_owner_that_does_not_answer_ends_without_a_deadline_too(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(control, "OWNER_WAIT_S", 0.02)
        with served.owner.busy():
            code, text = served.refusal("GetStatus", pb.GetStatusRequest(), None)
        assert (code, text) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the owner thread did not answer in 0.02 s")

    @pytest.mark.parametrize("trouble", [ZeroDivisionError("secret"), KeyError("not a refusal here")])
    def test_nobody_foresaw_is_logged_once_and_harms_no_other_call(
        self, served: Served, caplog: pytest.LogCaptureFixture, trouble: Exception
    ) -> None:
        served.port.trouble = trouble
        with caplog.at_level(logging.DEBUG):
            code, text = served.refusal("ListTenants", pb.ListTenantsRequest())
        assert code is grpc.StatusCode.INTERNAL
        assert type(trouble).__name__ in text
        assert "secret" not in text
        assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["kvstored.control"]
        served.port.trouble = None
        served.stub.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)

    def test_of_an_oversized_request_is_its_own(self, served: Served) -> None:
        request = pb.ClearRequest(prefix={"namespace_digest": HEX_A, "keys": [b"x" * 70_000]})
        assert served.refusal("Clear", request)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        served.stub.Ping(pb.PingRequest(), timeout=WAIT_S)

    def test_of_too_many_calls_at_once_is_refused(self, served: Served) -> None:
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with served.owner.busy():
            for _ in range(control.CALLS + 8):
                served.stub.Ping.future(pb.PingRequest(), timeout=WAIT_S).add_done_callback(ended.put)
            early = {ended.get(timeout=WAIT_S).code() for _ in range(8)}
        late = {ended.get(timeout=WAIT_S).code() for _ in range(control.CALLS)}
        assert early == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert late == {grpc.StatusCode.OK}

    def test_of_a_stuck_owner_does_not_hold_up_stop(self, served: Served) -> None:
        with served.owner.busy():
            call = served.stub.Ping.future(pb.PingRequest(), timeout=WAIT_S)
            assert served.owner.asked.wait(WAIT_S)
            served.server.stop(0.01)
            assert call.exception(WAIT_S).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class NoOwner:
    def ask(self, question: Callable[..., Any], timeout_s: float) -> Any:
        raise AssertionError("nobody asks here")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def same(message: Any, value: Any) -> None:
    """A message (or a list of them) says exactly what a report says."""
    if isinstance(value, tuple):
        assert len(message) == len(value)
        for one, other in zip(message, value, strict=True):
            same(one, other)
    elif hasattr(value, "__dataclass_fields__"):
        for one in fields(value):
            same(getattr(message, one.name), getattr(value, one.name))
    else:
        assert message == value
