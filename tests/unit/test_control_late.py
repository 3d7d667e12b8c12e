"""Acts whose callers' time is over: what was done is what the audit says, and what had not begun never happens."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from kvctl.client import ControlClient, Exit, KvctlError
from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY
from kvstore.evicting import EvictReport
from kvstore.report import ClearReport, ClearScope
from kvstored import control_verbs
from kvstored.admin_access import Access
from kvstored.admin_audit import FILE, Act, Audit
from kvstored.admin_evict import EvictWish
from kvstored.admin_gate import Gate
from kvstored.admin_tokens import TokenSocket
from kvstored.control import ControlServer
from kvstored.control_port import AdminPort
from kvstored.door import Door
from tests.unit.control_fakes import MemoryPort, ThreadOwner

T = TypeVar("T")

WAIT_S = 10.0
SOON_S = 0.05
REPORTS = {
    "Clear": ClearReport(1300, 5200, 3, 0, dry_run=False),
    "Evict": EvictReport(1300, 5200, 0, 0, 0, dry_run=False),
}


@dataclass
class SlowPort(MemoryPort):
    """What is begun here is over when the test says so."""

    began: threading.Event = field(default_factory=threading.Event)
    end: "Future[Any]" = field(default_factory=Future)
    held: threading.Event | None = None  # where the owner itself is held up as it begins

    def _begin(self, scope: ClearScope) -> "Future[Any]":
        self.scopes.append(scope)
        self.began.set()
        if self.held is not None:
            self.held.wait(WAIT_S)
        return self.end

    def clear(self, scope: ClearScope, *, dry_run: bool) -> "Future[ClearReport]":
        return super().clear(scope, dry_run=True) if dry_run else self._begin(scope)

    def evict(self, wish: EvictWish, *, dry_run: bool) -> "Future[EvictReport]":
        return super().evict(wish, dry_run=True) if dry_run else self._begin(wish.scope)


class OneWhoWaits(ThreadOwner):
    """Once told to, it has time run out for who asks as soon as what they asked for has begun."""

    def __init__(self, port: SlowPort) -> None:
        super().__init__(port)
        self.port = port
        self.runs_out = False

    def ask(self, question: Callable[[AdminPort], T], timeout_s: float) -> T:
        if not self.runs_out:
            return super().ask(question, timeout_s)
        self._questions.put(lambda: question(self.port))
        assert self.port.began.wait(WAIT_S)
        raise TimeoutError


@dataclass
class Served:
    """A control socket, and what is written down there."""

    home: Path
    port: SlowPort
    owner: OneWhoWaits
    audit: Audit
    access: Access
    stub: Any
    heard: threading.Event

    def refused(self, verb: str, timeout_s: float | None = None, *, dry_run: bool = False) -> tuple[Any, str]:
        request = getattr(pb, f"{verb}Request")(everything=pb.ClearRequest.Everything(), dry_run=dry_run)
        token = [(TOKEN_KEY, self.access.issue(0, 77, frozenset())[0])]
        with pytest.raises(grpc.RpcError) as caught:
            getattr(self.stub, verb)(request, timeout=timeout_s, metadata=token)
        return caught.value.code(), str(caught.value.details())

    def gone_on(self, verb: str) -> str:
        """What is said of an act that began just before its time was over."""
        self.owner.runs_out = True
        code, text = self.refused(verb)
        self.owner.runs_out = False
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        return text

    def written(self) -> Act:
        """The only act that was, once there is one."""
        assert self.heard.wait(WAIT_S)
        (act,) = self.audit.recent(9)
        return act


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(control_verbs, "OWNER_WAIT_S", SOON_S)
    port, audit, heard = SlowPort(), Audit(tmp_path), threading.Event()
    access = Access(os.geteuid(), None, lambda _: ())  # of who tests: kvctl asks for a token itself
    audit.heard = lambda _: heard.set()
    with ExitStack() as stack:
        stack.callback(audit.stop, WAIT_S)
        owner = OneWhoWaits(port)
        stack.callback(owner.stop)
        server = ControlServer(owner, tmp_path, Door(gate=Gate(access, audit)), audit)
        server.start()
        stack.callback(server.stop, 0.0)
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{server.path}"))
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        yield Served(tmp_path, port, owner, audit, access, stub, heard)


@pytest.mark.parametrize("verb", REPORTS)
@pytest.mark.parametrize("where", ["at work", "at its beginning"])
def test_what_has_begun_goes_on_and_is_written_down_when_it_is_over(served: Served, verb: str, where: str) -> None:
    served.port.held = held = threading.Event() if where == "at its beginning" else None
    text = served.gone_on(verb)
    assert "goes on" in text
    assert "kvctl audit" in text
    assert "try again" not in text
    assert served.audit.recent(9) == (), "nobody knows yet what came of it"
    if held is not None:
        held.set()
    served.port.end.set_result(REPORTS[verb])
    act = served.written()
    assert (act.verb, act.uid, act.scope.split(" --tier")[0]) == (verb.lower(), 0, "--all")
    assert (act.blocks, act.bytes, act.outcome) == (1300, 5200, "done")
    assert len(served.port.scopes) == 1


def test_a_caller_whose_own_time_is_over_is_told_before_it_is(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_verbs, "OWNER_WAIT_S", 2 * WAIT_S)
    monkeypatch.setattr(control_verbs, "TELL_SHARE", 0.9)  # so that nobody is late on a machine that stands still
    monkeypatch.setattr(control_verbs, "TELL_S", WAIT_S)
    code, text = served.refused("Clear", WAIT_S)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "goes on" in text
    served.port.end.set_result(REPORTS["Clear"])
    assert served.written().blocks == 1300


@pytest.mark.parametrize("verb", REPORTS)
def test_what_waited_for_its_turn_is_withdrawn(served: Served, verb: str) -> None:
    with served.owner.busy():
        code, text = served.refused(verb)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "nothing was done, and nothing will be" in text
    served.owner.ask(lambda _: None, WAIT_S)  # it has come to all that was asked before
    assert served.port.scopes == []
    act = served.written()
    assert (act.blocks, act.outcome.startswith("deadline_exceeded: "), text in act.outcome) == (0, True, True)


def test_what_fails_later_is_written_down_with_the_reason(served: Served) -> None:
    served.gone_on("Clear")
    served.port.end.set_exception(KeyError("no tenant is called nobody"))
    assert served.written().outcome == "failed: KeyError: no tenant is called nobody"


def test_what_is_not_over_when_the_daemon_ends_is_written_down_then(served: Served) -> None:
    served.gone_on("Clear")
    served.audit.stop(WAIT_S)
    (line,) = (served.home / FILE).read_text().splitlines()
    assert json.loads(line)["outcome"].startswith("unknown: ")
    served.port.end.set_result(REPORTS["Clear"])
    assert len(served.audit.recent(9)) == 1


def test_a_dry_run_is_not_said_to_go_on(served: Served) -> None:
    with served.owner.busy():
        code, text = served.refused("Clear", dry_run=True)
    assert (code, "audit" in text) == (grpc.StatusCode.DEADLINE_EXCEEDED, False)
    assert served.audit.recent(9) == ()


@pytest.mark.parametrize(("verb", "timeout_s"), [("clear", 1.0), ("evict", 1.0), ("clear", 0.001)])
def test_kvctl_does_not_say_try_again_of_what_may_be_done(served: Served, verb: str, timeout_s: float) -> None:
    tokens = TokenSocket(served.access, served.home)
    tokens.start()
    request = getattr(pb, f"{verb.title()}Request")(everything=pb.ClearRequest.Everything())
    with ControlClient(served.home / "control.sock", WAIT_S) as client:
        client.metadata()
        client._timeout_s = timeout_s
        with pytest.raises(KvctlError) as caught:
            getattr(client, verb)(request)
    tokens.stop()
    assert caught.value.code is Exit.TIMED_OUT
    text = str(caught.value)
    assert "try again" not in text or "nothing was done" in text
    assert "kvctl audit" in text or "nothing was done" in text
    served.port.end.set_result(REPORTS[verb.title()])
