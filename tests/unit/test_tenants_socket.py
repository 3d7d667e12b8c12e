"""The socket that everybody may connect to: no user keeps others off it, neither by calls nor by connections."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY
from kvstored import door
from kvstored.admin_access import Access
from kvstored.admin_audit import Audit
from kvstored.admin_gate import Gate
from kvstored.admin_places import CALL_S, CALLS, CALLS_OF_ONE, REQUEST_S, Places
from kvstored.control import ControlServer
from tests.core import chain
from tests.node import until
from tests.unit.control_fakes import MemoryPort, ThreadOwner
from tests.unit.test_disk import put
from tests.unit.test_routing_access import STRANGER as WATCHER
from tests.unit.test_routing_access import Served as Watched

WAIT_S = 10.0
HOG, OTHER = 4711, 4712
PING = "/kvstored.control.v1.Control/Ping"
Token = list[tuple[str, str]]


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Served:
    """A daemon's socket for everybody, in memory; many channels may lead to it."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self._stack = stack
        self.clock = Clock()
        self.access, self.audit = Access(0, None, lambda uid: (f"uid-{uid}",)), Audit(None)
        stack.callback(self.audit.stop, WAIT_S)
        self.port = MemoryPort()
        self.owner = ThreadOwner(self.port)
        stack.callback(self.owner.stop)
        gate = Gate(self.access, self.audit, open_to_all=True, places=Places(self.clock))
        self.server = ControlServer(self.owner, home, door.for_tenants(gate), self.audit)
        self.server.start()
        stack.callback(self.server.stop, 0.0)

    def channel(self) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        return self._stack.enter_context(grpc.insecure_channel(f"unix:{self.server.path}", options))

    def token(self, uid: int) -> Token:
        return [(TOKEN_KEY, self.access.issue(uid, 77, frozenset())[0])]

    def ping(self, uid: int, channel: grpc.Channel | None = None) -> grpc.StatusCode:
        stub = control_pb2_grpc.ControlStub(channel or self.channel())  # type: ignore[no-untyped-call, unused-ignore]
        try:
            stub.Ping(pb.PingRequest(), timeout=WAIT_S, metadata=self.token(uid))
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    def comes_back(self, uid: int) -> bool:
        """Has this user a place again? Asked over one connection: there are only so many of these."""
        channel = self.channel()
        return until(lambda: self.ping(uid, channel) is grpc.StatusCode.OK)

    def half_open(self, token: Token, calls: int, path: str = PING) -> "HalfOpen":
        return HalfOpen(self.channel(), token, calls, path, self._stack)


class HalfOpen:
    """Calls that say what they are and never send a request."""

    def __init__(self, channel: Any, token: Token, calls: int, path: str, stack: ExitStack) -> None:
        self._end, self._ended = threading.Event(), threading.Semaphore(0)
        stack.callback(self._end.set)
        call = channel.stream_unary(path, bytes, bytes)
        self.calls: list[Any] = [call.future(self._never(), metadata=token) for _ in range(calls)]
        for one in self.calls:
            one.add_done_callback(lambda _: self._ended.release())

    def codes(self, ended: int) -> list[grpc.StatusCode]:
        """Of those that are over, once so many are."""
        for _ in range(ended):
            assert self._ended.acquire(timeout=WAIT_S), "calls wait for ever"
        return [one.code() for one in self.calls if one.done()]

    def _never(self) -> Iterator[bytes]:
        self._end.wait()
        yield from ()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(tmp_path, stack)


@pytest.mark.parametrize("token", [[], [(TOKEN_KEY, "made up")]], ids=["none", "made up"])
@pytest.mark.parametrize("verb", ["Ping", "WatchBlocks", "Clear"])
def test_without_a_token_nothing_is_waited_for(served: Served, verb: str, token: Token) -> None:
    hog = served.half_open(token, CALLS, PING.replace("Ping", verb))
    assert set(hog.codes(CALLS)) == {grpc.StatusCode.UNAUTHENTICATED}
    assert served.ping(OTHER) is grpc.StatusCode.OK
    noted = served.audit.recent(512)
    assert {act.verb for act in noted} == ({"clear"} if verb == "Clear" else set())
    assert all(act.outcome.startswith("unauthenticated: ") for act in noted)


def test_one_user_has_so_many_calls_and_others_go_on(served: Served) -> None:
    hog = served.half_open(served.token(HOG), CALLS - 2)
    assert set(hog.codes(CALLS - 2 - CALLS_OF_ONE)) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert served.ping(OTHER) is grpc.StatusCode.OK
    assert served.ping(HOG) is grpc.StatusCode.RESOURCE_EXHAUSTED
    for call in hog.calls:
        call.cancel()
    assert served.comes_back(HOG)


def test_a_request_that_does_not_come_is_not_waited_for_for_ever(served: Served) -> None:
    hog = served.half_open(served.token(HOG), CALLS_OF_ONE + 1)
    assert hog.codes(1) == [grpc.StatusCode.RESOURCE_EXHAUSTED], "the control: the others wait"
    served.clock.now_s += REQUEST_S
    assert served.ping(OTHER) is grpc.StatusCode.OK
    assert hog.codes(CALLS_OF_ONE).count(grpc.StatusCode.CANCELLED) == CALLS_OF_ONE
    assert served.comes_back(HOG)


def test_a_call_that_takes_too_long_is_ended_and_one_that_waits_for_the_owner_is_not(served: Served) -> None:
    stub = control_pb2_grpc.ControlStub(served.channel())  # type: ignore[no-untyped-call, unused-ignore]
    with served.owner.busy():
        call = stub.Ping.future(pb.PingRequest(), timeout=WAIT_S, metadata=served.token(HOG))
        assert served.owner.asked.wait(WAIT_S)
        served.clock.now_s += CALL_S - 0.1
        assert set(served.half_open([], 1).codes(1)) == {grpc.StatusCode.UNAUTHENTICATED}
        assert not call.done()
        served.clock.now_s += 0.2
        assert set(served.half_open([], 1).codes(1)) == {grpc.StatusCode.UNAUTHENTICATED}
        assert call.exception(WAIT_S).code() is grpc.StatusCode.CANCELLED


def test_calls_that_are_no_calls_are_told_so(served: Served) -> None:
    raw: Any = served.channel()
    for requests in ((), (b"\xff" * 9,), (b"x" * 100_000,)):
        call = raw.stream_unary(PING, bytes, bytes).future(
            iter(requests), metadata=served.token(HOG), timeout=WAIT_S
        )  # fmt: skip
        assert call.exception(WAIT_S).code() in (
            grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED,
        )  # fmt: skip
    assert served.ping(HOG) is grpc.StatusCode.OK


def test_who_connects_and_says_nothing_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HANDSHAKE_S", 0.1)
    with ExitStack() as stack:
        served = Served(tmp_path, stack)
        silent = stack.enter_context(socket.socket(socket.AF_UNIX))
        silent.settimeout(WAIT_S)
        silent.connect(str(served.server.path))
        while silent.recv(4096):
            pass


def test_a_connection_without_calls_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "IDLE_S", 0.1)
    with ExitStack() as stack:
        served = Served(tmp_path, stack)
        channel = served.channel()
        ready, idle = threading.Event(), threading.Event()

        def heard(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                ready.set()
            elif ready.is_set():
                idle.set()

        channel.subscribe(heard, try_to_connect=True)
        assert ready.wait(WAIT_S)
        assert idle.wait(WAIT_S)
        stub: Any = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        stub.Ping(pb.PingRequest(), metadata=served.token(OTHER), timeout=WAIT_S)


def test_a_connection_ends_with_age_and_what_it_follows_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "AGE_S", 0.2)
    with ExitStack() as stack:
        served = Watched(tmp_path, stack)
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{tmp_path}/tenants.sock"))
        ready, aged = threading.Event(), threading.Event()

        def heard(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                ready.set()
            elif ready.is_set():
                aged.set()

        channel.subscribe(heard)
        stub: Any = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        token = [(TOKEN_KEY, served.access.issue(WATCHER, 77, frozenset())[0])]
        stream = stub.WatchBlocks(pb.WatchBlocksRequest(follow=True), metadata=token)
        assert next(stream).cleared
        there = next(stream)
        assert there.changes
        assert aged.wait(WAIT_S), "its connection takes no more calls"
        client = served.port.core.client("web")
        put(client, client.open(model="another"), chain(1, "new of web"))
        served.look()
        assert next(stream).changes, "and the stream goes on over it"
        stub.Ping(pb.PingRequest(), metadata=token, timeout=WAIT_S)
        stream.cancel()
