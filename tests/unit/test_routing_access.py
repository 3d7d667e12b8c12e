"""Who may ask what routers ask: by real tokens on a real socket, over a store of two tenants."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY
from kvstore.announcing import Announcing
from kvstored.admin_access import Access
from kvstored.admin_audit import Audit
from kvstored.admin_gate import Gate
from kvstored.block_events import BlockEvents
from kvstored.block_events_address import EventsConfig
from kvstored.control import ControlServer
from kvstored.door import Door, for_tenants
from tests.core import chain
from tests.unit.control_fakes import ThreadOwner
from tests.unit.store_port import SYSTEM, StorePort
from tests.unit.test_disk import put

OURS, STRANGER, THIRD, OPERATOR = 4711, 4712, 4713, 0
TENANTS = {OURS: ("research",), STRANGER: ("web",), THIRD: ("batch",)}
PATIENCE_S = 10.0


class Served:
    """A socket for everybody, and one for operators."""

    def __init__(self, home: Path, stack: ExitStack, *, told: bool = True) -> None:
        self.port, audit = StorePort(), Audit(None)
        stack.callback(audit.stop, 10.0)
        store = self.port.core.store
        client = self.port.core.client("web")
        self.of_web = chain(2, "of web")
        put(client, client.open(model="meta-llama/Llama-3.1-8B-Instruct"), self.of_web)
        self.digest = self.port.talks.digest.hex()
        self.events = BlockEvents(EventsConfig("grpc", replay=4), None, lambda: None) if told else None
        if self.events is not None:
            stack.callback(self.events.stop)
            self.events.start()
            self.announcing = self.port.routing.announcing = Announcing(store, (1, 2), self.events.tell)
            self.look()
        self.access = Access(OPERATOR, None, lambda uid: TENANTS.get(uid, ()))
        owner = ThreadOwner(self.port)
        stack.callback(owner.stop)
        doors = (for_tenants(Gate(self.access, audit, open_to_all=True)), Door(gate=Gate(self.access, audit)))
        self.stubs: list[Any] = []
        for door in doors:
            server = ControlServer(owner, home, door, audit, block_events=self.events)
            server.start()
            stack.callback(server.stop, 0.0)
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{server.path}"))
            self.stubs.append(control_pb2_grpc.ControlStub(channel))  # type: ignore[no-untyped-call, unused-ignore]

    def look(self) -> None:
        """Whatever is there is told, and in the logs."""
        until = self.announcing.passes + 1
        while self.announcing.passes < until:
            self.announcing.look(self.announcing.due_ns)
        assert self.events is not None
        for tenant in ("research", "web"):
            assert self.events.log_of(tenant).wait(1, PATIENCE_S)

    def ask(self, uid: int, verb: str, request: object) -> Any:
        token = [(TOKEN_KEY, self.access.issue(uid, 77, frozenset())[0])]
        answer = getattr(self.stubs[uid == OPERATOR], verb)(request, timeout=PATIENCE_S, metadata=token)
        return list(answer) if verb == "WatchBlocks" else answer

    def refusal(self, uid: int, verb: str, request: object) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(uid, verb, request)
        code: grpc.StatusCode = caught.value.code()
        return code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(tmp_path_factory.mktemp("run"), stack)


def keys_in(messages: list[pb.BlockChanges]) -> set[bytes]:
    return {change.key for message in messages for change in message.changes}


def test_a_tenant_hears_of_its_own_blocks_and_of_nobody_elses(served: Served) -> None:
    mine = served.ask(STRANGER, "WatchBlocks", pb.WatchBlocksRequest())
    assert keys_in(mine) == set(served.of_web)
    assert {message.tenant for message in mine} == {"web"}
    assert served.refusal(STRANGER, "WatchBlocks", pb.WatchBlocksRequest(tenant="research")) is (
        grpc.StatusCode.PERMISSION_DENIED
    )
    ours = served.ask(OURS, "WatchBlocks", pb.WatchBlocksRequest(tenant="research", start_from=0))
    assert set(SYSTEM) <= keys_in(ours)
    assert not keys_in(ours) & set(served.of_web)
    everything = served.ask(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="web"))
    assert keys_in(everything) == set(served.of_web)


def test_a_namespace_can_be_chosen(served: Served) -> None:
    whole = served.ask(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="research"))
    talks = served.ask(
        OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="research", namespace_digest=served.digest)
    )
    assert set(SYSTEM) <= keys_in(talks) < keys_in(whole)


def test_who_was_away_for_too_long_is_told_all_anew(served: Served) -> None:
    served.look()
    assert served.events is not None
    client = served.port.core.client("late")
    log, namespace = served.events.log_of("late"), client.open()
    for name in range(6):
        put(client, namespace, chain(1, f"late {name}"))
        before = log.next
        served.look()
        assert log.wait(before, PATIENCE_S)
    assert log.wait(6, PATIENCE_S)
    anew = served.ask(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="late", start_from=0))
    assert (anew[0].cleared, anew[0].there) == (True, True)
    assert keys_in(anew) == {key for name in range(6) for key in chain(1, f"late {name}")}
    later = served.ask(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="late", start_from=log.next - 2))
    assert [message.number for message in later] == [log.next - 2, log.next - 1]
    assert not any(message.there for message in later)


def test_whoever_follows_hears_what_comes(served: Served) -> None:
    token = [(TOKEN_KEY, served.access.issue(OPERATOR, 77, frozenset())[0])]
    stream = served.stubs[1].WatchBlocks(
        pb.WatchBlocksRequest(tenant="web", start_from=1, follow=True), timeout=PATIENCE_S, metadata=token
    )
    assert keys_in([next(stream)]) == set(served.of_web)
    heard: list[set[bytes]] = []
    listener = threading.Thread(target=lambda: heard.append(keys_in([next(stream)])))
    listener.start()
    client = served.port.core.client("web")
    put(client, client.open(model="another"), chain(1, "new of web"))
    served.look()
    listener.join(PATIENCE_S)
    stream.cancel()
    assert heard == [set(chain(1, "new of web"))]


def test_a_prefix_is_summed_up_for_its_own_tenant(served: Served) -> None:
    request = pb.SummariseMatchRequest(namespace_digests=[served.digest], keys=SYSTEM)
    assert served.ask(OURS, "SummariseMatch", request).blocks == len(SYSTEM)
    assert served.ask(STRANGER, "SummariseMatch", request).blocks == 0
    assert served.refusal(OPERATOR, "SummariseMatch", request) is grpc.StatusCode.INVALID_ARGUMENT, "whose?"
    assert served.refusal(OURS, "SummariseMatch", pb.SummariseMatchRequest()) is grpc.StatusCode.INVALID_ARGUMENT
    many = pb.SummariseMatchRequest(namespace_digests=[f"{i:064x}" for i in range(65)], keys=SYSTEM)
    assert served.refusal(OURS, "SummariseMatch", many) is grpc.StatusCode.INVALID_ARGUMENT
    unknown = pb.SummariseMatchRequest(namespace_digests=["0" * 64], keys=SYSTEM)
    assert served.refusal(OURS, "SummariseMatch", unknown) is grpc.StatusCode.NOT_FOUND


def test_what_is_about_all_tenants_is_for_operators(served: Served) -> None:
    cost = pb.EstimateAdmissionRequest(tenant="research", namespace_digest=served.digest, bytes=1 << 20)
    for verb, request in (("GetLoad", pb.GetLoadRequest()), ("EstimateAdmission", cost)):
        assert served.refusal(OURS, verb, request) is grpc.StatusCode.PERMISSION_DENIED
        assert served.ask(OPERATOR, verb, request) is not None
    for wrong in (pb.EstimateAdmissionRequest(), pb.EstimateAdmissionRequest(tenant="research", bytes=1)):
        assert served.refusal(OPERATOR, "EstimateAdmission", wrong) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("ends", ["deadline", "cancelled"])
def test_an_estimate_that_takes_long_ends_with_its_caller(
    served: Served, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(setting: Any, parts: Any, wanted: int, waits: Callable[[], bool]) -> Any:
        begun.set()
        until = time.monotonic() + PATIENCE_S
        while waits():
            assert time.monotonic() < until, "it goes on for nobody"
        ended.set()
        raise TimeoutError

    monkeypatch.setattr("kvstored.admin_routing.admission.estimate", slow)
    cost = pb.EstimateAdmissionRequest(tenant="research", namespace_digest=served.digest, bytes=1 << 20)
    token = [(TOKEN_KEY, served.access.issue(OPERATOR, 77, frozenset())[0])]
    timeout_s = 1.0 if ends == "deadline" else PATIENCE_S
    call = served.stubs[1].EstimateAdmission.future(cost, timeout=timeout_s, metadata=token)
    assert begun.wait(PATIENCE_S)
    if ends == "cancelled":
        call.cancel()
    else:
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ended.wait(PATIENCE_S)


def test_where_nobody_looks_a_watcher_is_told_what_to_set(tmp_path: Path) -> None:
    with ExitStack() as stack:
        served = Served(tmp_path, stack, told=False)
        refusal = served.refusal(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant="web"))
        assert refusal is grpc.StatusCode.FAILED_PRECONDITION


def test_a_tenant_whose_watchers_stall_leaves_places_to_others(served: Served) -> None:
    def watch(uid: int) -> Any:
        token = [(TOKEN_KEY, served.access.issue(uid, 77, frozenset())[0])]
        request = pb.WatchBlocksRequest(follow=True)
        stream = served.stubs[0].WatchBlocks(request, timeout=PATIENCE_S, metadata=token)
        next(stream)
        return stream

    stalled = [watch(OURS) for _ in range(2)]
    try:
        assert served.refusal(OURS, "WatchBlocks", pb.WatchBlocksRequest()) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert keys_in(served.ask(STRANGER, "WatchBlocks", pb.WatchBlocksRequest())) >= set(served.of_web)
        stalled.append(watch(STRANGER))
        refusal = served.refusal(STRANGER, "WatchBlocks", pb.WatchBlocksRequest())
        assert refusal is grpc.StatusCode.RESOURCE_EXHAUSTED, "the last place is for who has none"
        stalled.append(watch(THIRD))
    finally:
        for stream in stalled:
            stream.cancel()


def test_a_tenant_that_there_is_not_leaves_nothing_behind(served: Served) -> None:
    assert served.events is not None
    before = set(served.events._logs)
    for name in range(20):
        (only,) = served.ask(OPERATOR, "WatchBlocks", pb.WatchBlocksRequest(tenant=f"nobody {name}"))
        assert only.cleared
    with served.events.log_for("somebody later"):
        assert set(served.events._logs) - before == {"somebody later"}, "the control: while it is watched it is there"
    assert set(served.events._logs) <= before, "those of streams that ended before this test may go meanwhile"
