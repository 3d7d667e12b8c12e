"""Who may do what on the control sockets, and what is written down of it: real sockets, tokens and gRPC."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY, TOKEN_TTL_S, TokenRefusedError, ask_token
from kvstored.admin_access import TOKENS, TOKENS_PER_UID, Access, TooManyTokensError
from kvstored.admin_audit import Audit
from kvstored.admin_gate import Gate, acts
from kvstored.admin_tokens import TokenSocket
from kvstored.control import ControlServer
from kvstored.control_kinds import group_kind, group_of
from kvstored.door import Door, for_tenants
from tests.unit.control_fakes import DIGEST_A, KEYS, MemoryPort, ThreadOwner

WAIT_S = 10.0
OURS, STRANGER, ADMIN_GID = 4711, 4712, 4713
NOBODY: frozenset[int] = frozenset()
ME = os.geteuid()


def tenants_of(uid: int) -> tuple[str, ...]:
    return {STRANGER: ("research",), OURS: ("research", "web")}.get(uid, (f"uid-{uid}",))


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Served:
    """Both control sockets of one daemon in memory, and its tokens."""

    home: Path
    access: Access
    clock: Clock
    audit: Audit
    port: MemoryPort
    control: Any
    everybody: Any

    def token(self, uid: int, *groups: int) -> list[tuple[str, str]]:
        return [(TOKEN_KEY, self.access.issue(uid, 77, frozenset(groups))[0])]

    def refusal(self, stub: Any, verb: str, request: object, token: Any = ()) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            getattr(stub, verb)(request, timeout=WAIT_S, metadata=token)
        return caught.value.code(), str(caught.value.details())


@contextmanager
def serving(home: Path) -> Iterator[Served]:
    clock, port = Clock(), MemoryPort()
    access = Access(ME, ADMIN_GID, tenants_of, clock)
    audit, owner = Audit(home), ThreadOwner(port)
    gate, open_gate = Gate(access, audit), Gate(access, audit, open_to_all=True)
    servers = (
        ControlServer(owner, home, Door(gate=gate), audit),
        ControlServer(owner, home, for_tenants(open_gate), audit),
    )  # fmt: skip
    tokens = TokenSocket(access, home)
    with ExitStack() as stack:
        stack.callback(audit.stop, WAIT_S)
        stack.callback(owner.stop)
        tokens.start()
        stack.callback(tokens.stop)
        stubs = []
        for server in servers:
            server.start()
            stack.callback(server.stop, 0.0)
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{server.path}"))
            stubs.append(control_pb2_grpc.ControlStub(channel))
        yield Served(home, access, clock, audit, port, *stubs)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


EVERYTHING = pb.ClearRequest(everything=pb.ClearRequest.Everything())
PREFIX = pb.Prefix(tenant="research", namespace_digest=DIGEST_A.hex(), keys=KEYS[:2])
# One of each kind of call that changes something.
ACTING: dict[str, object] = {
    "Clear": EVERYTHING,
    "Evict": pb.EvictRequest(everything=pb.ClearRequest.Everything()),
    "Drain": pb.DrainRequest(),
    "Undrain": pb.UndrainRequest(),
    "Scrub": pb.ScrubRequest(start=True),
    "SetPolicy": pb.SetPolicyRequest(rule="lru"),
    "SetQuota": pb.SetQuotaRequest(tenant="research", pin_share=0.25),
    "Pin": pb.PinRequest(prefix=PREFIX, ttl_s=300),
    "Prefetch": pb.PrefetchRequest(prefix=PREFIX, within_s=1),
    "Unpin": pb.UnpinRequest(tenant="research"),
    "NoteTransfer": pb.NoteTransferRequest(verb="export", tenant="research", blocks=3, bytes=4),
    "HandOver": pb.HandOverRequest(prefix=PREFIX, within_s=1),
}
SEEING: dict[str, object] = {
    "ListPins": pb.ListPinsRequest(),
    "ListPrograms": pb.ListProgramsRequest(),
    "ListWorkflows": pb.ListWorkflowsRequest(),
    "GetCosts": pb.GetCostsRequest(),
    "GetPolicy": pb.GetPolicyRequest(),
    "GetQuotas": pb.GetQuotasRequest(),
    "Advise": pb.AdviseRequest(),
}
FILTERED: dict[str, object] = {
    "ListTenants": pb.ListTenantsRequest(),
    "ListNamespaces": pb.ListNamespacesRequest(),
    "ListClients": pb.ListClientsRequest(),
    "Ping": pb.PingRequest(),
}
# All others, of which none changes anything, whatever its request says.
LOOKING = {
    "EstimateAdmission", "ExplainMiss", "FindKeys", "GetConfig", "GetLoad", "GetStatistics", "GetStatus", "GetTree",
    "ListActs", "ListBlocks", "StatPrefix", "SummariseMatch", "WalkBlocks", "WatchBlocks", "WatchEvents",
}  # fmt: skip
ANYTHING = SimpleNamespace(dry_run=False, start=True)


class TestRule:
    @pytest.mark.parametrize(
        ("uid", "groups", "may"),
        [(0, NOBODY, True), (ME, NOBODY, True), (STRANGER, NOBODY, False), (STRANGER, {ADMIN_GID}, True),
         (STRANGER, {ADMIN_GID + 1}, False)],
    )  # fmt: skip
    def test_root_the_daemons_user_and_its_admin_group_act(self, uid: int, groups: set[int], may: bool) -> None:
        assert Access(ME, ADMIN_GID, tenants_of).may_act(uid, frozenset(groups)) is may

    def test_without_an_admin_group_no_group_acts(self) -> None:
        assert not Access(ME, None, tenants_of).may_act(STRANGER, frozenset(range(5000)))

    def test_every_verb_is_either_known_to_act_or_looks_only(self) -> None:
        """A verb that is new must be put on one side: by default it is refused to those who may not act."""
        verbs = {method.name for method in pb.DESCRIPTOR.services_by_name["Control"].methods}
        sides = (set(ACTING), set(SEEING), set(FILTERED), LOOKING)
        assert verbs == set().union(*sides)
        assert len(verbs) == sum(len(side) for side in sides), "on two sides"
        for verb in verbs:
            assert acts(verb, ACTING.get(verb, ANYTHING)) is (verb in ACTING), verb
        assert not acts("Clear", pb.ClearRequest(everything=pb.ClearRequest.Everything(), dry_run=True))
        assert not acts("Scrub", pb.ScrubRequest())


class TestTokens:
    def test_a_token_is_good_for_a_minute_and_for_nobody_else(self) -> None:
        clock = Clock()
        access = Access(ME, None, tenants_of, clock)
        token, caller = access.issue(STRANGER, 77, NOBODY)
        assert access.caller(token) == caller
        assert access.caller(token[:-1]) is None
        assert access.caller("") is None
        clock.now_s += TOKEN_TTL_S - 0.01
        assert access.caller(token) == caller
        clock.now_s += 0.02
        assert access.caller(token) is None

    def test_one_user_has_a_few_and_many_users_cannot_keep_out_who_acts(self) -> None:
        access = Access(ME, None, tenants_of, Clock())
        first, _ = access.issue(STRANGER, 1, NOBODY)
        others = [access.issue(STRANGER, 1, NOBODY)[0] for _ in range(TOKENS_PER_UID)]
        assert access.caller(first) is None
        assert all(access.caller(token) for token in others)
        for number in range(TOKENS - TOKENS_PER_UID):
            access.issue(10_000 + number, 1, NOBODY)
        with pytest.raises(TooManyTokensError):
            access.issue(9_999, 1, NOBODY)
        token, caller = access.issue(0, 1, NOBODY)
        assert caller.acts
        assert access.caller(token) == caller

    def test_the_socket_says_what_the_kernel_says_and_cleans_up(self, tmp_path: Path) -> None:
        access = Access(ME, None, tenants_of)
        tokens = TokenSocket(access, tmp_path)
        (tmp_path / "token.sock").touch()
        tokens.start()
        assert stat.S_IMODE((tmp_path / "token.sock").stat().st_mode) == 0o666
        given = [ask_token(tmp_path, WAIT_S) for _ in range(3)]
        assert len({one.token for one in given if one}) == 3
        assert given[0] is not None
        caller = access.caller(given[0].token)
        assert caller is not None
        assert (caller.uid, caller.pid, caller.acts) == (ME, os.getpid(), True)
        assert given[0].token not in repr(given[0])
        with socket.socket(socket.AF_UNIX) as rude:  # says nothing, reads nothing
            rude.connect(str(tokens.path))
        assert ask_token(tmp_path, WAIT_S) is not None
        tokens.stop()
        tokens.stop()
        assert ask_token(tmp_path, WAIT_S) is None

    @pytest.mark.parametrize(
        "said", [b"", b"\xff\n", b"[]\n", b'{"token": 5}\n', b'{"refused": "no"}\n', b"[" * 100_000, b"x" * 70_000]
    )
    def test_what_is_no_token_is_told_so(self, tmp_path: Path, said: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "token.sock"))
            listener.listen(1)
            child = os.fork()
            if not child:
                accepted, _ = listener.accept()
                accepted.sendall(said)
                os._exit(0)
            with pytest.raises((TokenRefusedError, ConnectionError)):
                ask_token(tmp_path, WAIT_S)
            os.waitpid(child, 0)


class TestActing:
    @pytest.mark.parametrize("verb", ACTING)
    def test_needs_a_token_of_who_may(self, served: Served, verb: str) -> None:
        request = ACTING[verb]
        before = served.port.namespaces()
        for stub in (served.control, served.everybody):
            code, text = served.refusal(stub, verb, request)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert "token.sock" in text
            code, text = served.refusal(stub, verb, request, [(TOKEN_KEY, "made up")])
            assert code is grpc.StatusCode.UNAUTHENTICATED
            code, text = served.refusal(stub, verb, request, served.token(STRANGER, 1, 2, 3))
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert f"uid {STRANGER}" in text
        assert served.port.namespaces() == before
        assert not served.port.draining
        for token in (served.token(0), served.token(ME), served.token(STRANGER, ADMIN_GID)):
            getattr(served.control, verb)(request, timeout=WAIT_S, metadata=token)
        outcomes = [act.outcome.split(":")[0] for act in served.audit.recent(9)]
        assert outcomes == ["unauthenticated", "unauthenticated", "permission_denied"] * 2 + ["done"] * 3

    def test_with_a_token_that_has_lapsed_is_refused(self, served: Served) -> None:
        token = served.token(0)
        served.control.Drain(pb.DrainRequest(), timeout=WAIT_S, metadata=token)
        served.clock.now_s += TOKEN_TTL_S + 1
        code, text = served.refusal(served.control, "Undrain", pb.UndrainRequest(), token)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "lapsed" in text
        assert served.port.draining


def test_those_who_may_not_act_cannot_push_what_was_done_out_of_the_audit(served: Served) -> None:
    served.control.Drain(pb.DrainRequest(), timeout=WAIT_S, metadata=served.token(0))
    stranger = served.token(STRANGER, 1, 2, 3)
    for _ in range(600):
        served.refusal(served.everybody, "Drain", pb.DrainRequest(), stranger)
    outcomes = [act.outcome for act in served.audit.recent(512)]
    assert "done" in outcomes
    assert 1 <= len(outcomes) - 1 <= 40
    assert served.audit.unheard >= 550


class TestSeeing:
    @pytest.mark.parametrize("verb", [*SEEING, *FILTERED, "GetStatus", "GetConfig", "ListActs", "ExplainMiss"])
    def test_on_the_socket_for_everybody_needs_a_token(self, served: Served, verb: str) -> None:
        request = getattr(pb, f"{verb}Request")()
        assert served.refusal(served.everybody, verb, request)[0] is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize("verb", SEEING)
    def test_is_of_ones_own_tenant(self, served: Served, verb: str) -> None:
        request: Any = SEEING[verb]
        mine, theirs = type(request)(tenant="research"), type(request)(tenant="web")
        own = getattr(served.everybody, verb)(request, timeout=WAIT_S, metadata=served.token(STRANGER))
        assert own == getattr(served.everybody, verb)(mine, timeout=WAIT_S, metadata=served.token(STRANGER))
        code, text = served.refusal(served.everybody, verb, theirs, served.token(STRANGER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "web" not in text
        unknown = served.refusal(served.everybody, verb, type(request)(tenant="nobody"), served.token(STRANGER))
        assert unknown == (code, text), "whether a tenant exists it is not told"
        code, text = served.refusal(served.everybody, verb, request, served.token(OURS))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "research, web" in text
        getattr(served.everybody, verb)(mine, timeout=WAIT_S, metadata=served.token(OURS))

    @pytest.mark.parametrize(("verb", "field", "whose"), [
        ("ListTenants", "tenants", "name"), ("ListNamespaces", "namespaces", "tenant"),
        ("ListClients", "clients", "tenant"),
    ])  # fmt: skip
    def test_of_a_list_shows_ones_own_part(self, served: Served, verb: str, field: str, whose: str) -> None:
        def names(token: Any) -> set[str]:
            answer = getattr(served.everybody, verb)(FILTERED[verb], timeout=WAIT_S, metadata=token)
            return {getattr(one, whose) for one in getattr(answer, field)}

        every = names(served.token(0))
        assert len(every) > 1 or verb == "ListClients"
        assert names(served.token(STRANGER)) == every & {"research"}
        assert names(served.token(9999)) == set()

    @pytest.mark.parametrize(
        "verb", ["GetStatus", "GetStatistics", "GetConfig", "ListActs", "ExplainMiss", "Scrub", "Clear"]
    )
    def test_what_is_about_all_is_for_those_who_act(self, served: Served, verb: str) -> None:
        request = getattr(pb, f"{verb}Request")()
        code, text = served.refusal(served.everybody, verb, request, served.token(STRANGER))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "research" in text or "may not change" in text

    def test_counts_over_all_tenants_are_left_out(self, served: Served) -> None:
        token = served.token(STRANGER)
        assert not served.everybody.ListPins(pb.ListPinsRequest(), timeout=WAIT_S, metadata=token).HasField("counters")
        assert served.everybody.ListPins(
            pb.ListPinsRequest(tenant="research"), timeout=WAIT_S, metadata=served.token(0)
        ).HasField("counters")
        costs = served.everybody.GetCosts(pb.GetCostsRequest(), timeout=WAIT_S, metadata=token)
        assert {way.tenant for way in costs.ways} <= {"research"}

    def test_on_the_control_socket_needs_no_token(self, served: Served) -> None:
        assert served.control.GetStatus(pb.GetStatusRequest(), timeout=WAIT_S).version
        assert served.refusal(served.control, "GetStatus", pb.GetStatusRequest(), [(TOKEN_KEY, "old")])[0] is (
            grpc.StatusCode.UNAUTHENTICATED
        )


class TestDoors:
    def test_modes_and_groups(self, tmp_path: Path) -> None:
        owner = ThreadOwner(MemoryPort())
        gid = os.getegid()
        server = ControlServer(owner, tmp_path, Door(mode=0o660, gid=gid))
        server.start()
        found = (tmp_path / "control.sock").stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, gid)
        server.stop(0.0)
        owner.stop()

    def test_the_one_for_everybody_takes_so_many_connections_and_the_other_goes_on(self, served: Served) -> None:
        path = served.home / "tenants.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o666
        with ExitStack() as stack:
            for _ in range(200):
                hog = stack.enter_context(socket.socket(socket.AF_UNIX))
                hog.connect(str(path))
            served.control.Drain(pb.DrainRequest(), timeout=WAIT_S, metadata=served.token(0))
        assert served.port.draining

    def test_a_group_is_a_name_that_the_host_knows(self) -> None:
        kind = group_kind()
        assert kind.parse("none") == kind.parse("") == "none"
        assert kind.parse("root") == "root"
        assert (group_of("none"), group_of("root")) == (None, 0)
        for wrong in ("no such group", "nosuchgroup", "a\nb", "x" * 99):
            with pytest.raises(ValueError, match="group"):
                kind.parse(wrong)


WHO = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from kvproto.control_token import ask_token
import grpc
from kvproto import control_pb2 as pb, control_pb2_grpc
home = Path({home!r})
token = ask_token(home, 20.0)
print(token.uid, token.acts, ",".join(token.tenants))
def ask(name, verb, request):
    with grpc.insecure_channel("unix:" + str(home / name)) as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        try:
            getattr(stub, verb)(request, timeout=20, metadata=[("kvstored-token", token.token)])
            print("answered")
        except grpc.RpcError as error:
            print(error.code().name)
ask("control.sock", "GetStatus", pb.GetStatusRequest())
ask("tenants.sock", "Drain", pb.DrainRequest())
ask("tenants.sock", "ListTenants", pb.ListTenantsRequest())
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root: there is no second uid")
class TestAnotherUser:
    @pytest.mark.parametrize(("groups", "said"), [
        ((), [f"{STRANGER} False research", "UNAVAILABLE", "PERMISSION_DENIED", "answered"]),
        ((ADMIN_GID,), [f"{STRANGER} True research", "UNAVAILABLE", "answered", "answered"]),
    ])  # fmt: skip
    def test_is_who_the_kernel_says(self, groups: tuple[int, ...], said: list[str]) -> None:
        home = Path(f"/var/tmp/kvstored-access-{os.getpid()}")
        home.mkdir(mode=0o755)
        try:
            with serving(home):
                given = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
                program = WHO.format(paths=[path for path in sys.path if path], home=str(home))
                done = subprocess.run(
                    ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", given, sys.executable, "-c", program],
                    capture_output=True, text=True, timeout=60, check=False,
                )  # fmt: skip
            assert done.stdout.split("\n")[:-1] == said, done.stderr
        finally:
            shutil.rmtree(home)


class TestAudit:
    def test_says_who_did_what_to_what_and_never_a_key(self, served: Served) -> None:
        token = served.token(0)
        prefix = pb.ClearRequest.Prefix(namespace_digest=DIGEST_A.hex(), keys=KEYS[:1])
        served.control.Clear(pb.ClearRequest(prefix=prefix, tenant="research"), timeout=WAIT_S, metadata=token)
        served.control.Clear(pb.ClearRequest(prefix=prefix, dry_run=True), timeout=WAIT_S, metadata=token)
        served.audit.stop(WAIT_S)  # an act waits half a second for its line, and no longer
        (line,) = (served.home / "audit.log").read_text().splitlines()
        said = json.loads(line)
        assert said["unix_s"] > 1.7e9
        assert {name: said[name] for name in ("uid", "pid", "verb", "outcome")} == {
            "uid": 0, "pid": 77, "verb": "clear", "outcome": "done",
        }  # fmt: skip
        assert said["scope"] == f"--tenant research --namespace {DIGEST_A.hex()[:12]} (1 key)"
        assert said["blocks"] > 0 < said["bytes"]
        assert KEYS[0].hex() not in line
        assert token[0][1] not in line
        (act,) = served.control.ListActs(pb.ListActsRequest(), timeout=WAIT_S).acts
        assert (act.uid, act.verb, act.scope, act.blocks) == (0, "clear", said["scope"], said["blocks"])

    def test_what_failed_is_there_with_the_reason(self, served: Served) -> None:
        token = served.token(0)
        request = pb.ClearRequest(everything=pb.ClearRequest.Everything(), tenant="nobody")
        served.refusal(served.control, "Clear", request, token)
        served.refusal(served.control, "Scrub", pb.ScrubRequest(start=True, rate_bytes_per_s=1 << 60), token)
        outcomes = [act.outcome for act in served.audit.recent(2)]
        assert outcomes[0].startswith("not_found: ")
        assert "nobody" in outcomes[0]
        assert outcomes[1].startswith("invalid_argument: ")

    def test_more_than_are_remembered_cannot_be_asked_for(self, served: Served) -> None:
        assert served.refusal(served.control, "ListActs", pb.ListActsRequest(most=513))[0] is (
            grpc.StatusCode.INVALID_ARGUMENT
        )
