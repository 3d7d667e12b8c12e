"""Who may look at whose blocks, and at what happens: by real tokens on real sockets."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvproto.control_token import TOKEN_KEY
from kvstored.admin_access import Access
from kvstored.admin_audit import Audit
from kvstored.admin_gate import Gate
from kvstored.control import ControlServer
from kvstored.door import for_tenants
from tests.core import chain
from tests.unit.control_fakes import ThreadOwner
from tests.unit.store_port import SYSTEM, StorePort
from tests.unit.test_disk import put

OURS, STRANGER = 4711, 4712
WEB = chain(2, "of web")


class Served:
    """The socket for everybody over a store of two tenants, each with a namespace of one digest."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.port, audit = StorePort(), Audit(None)
        stack.callback(audit.stop, 10.0)
        client = self.port.core.client("web")
        put(client, client.open(model="meta-llama/Llama-3.1-8B-Instruct"), WEB)
        self.digest = self.port.talks.digest.hex()
        self.access = Access(0, None, lambda uid: {OURS: ("research",), STRANGER: ("web",)}[uid])
        owner = ThreadOwner(self.port)
        stack.callback(owner.stop)
        server = ControlServer(owner, home, for_tenants(Gate(self.access, audit, open_to_all=True)), audit)
        server.start()
        stack.callback(server.stop, 0.0)
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{server.path}"))
        self.stub: Any = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]

    def ask(self, uid: int, verb: str, request: object) -> Any:
        token = [(TOKEN_KEY, self.access.issue(uid, 77, frozenset())[0])]
        answer = getattr(self.stub, verb)(request, timeout=10.0, metadata=token)
        return list(answer) if verb == "WatchEvents" else answer

    def refusal(self, uid: int, verb: str, request: object) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(uid, verb, request)
        code: grpc.StatusCode = caught.value.code()
        return code


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(tmp_path, stack)


def test_everybody_sees_the_blocks_of_their_own_tenant_under_the_same_digest(served: Served) -> None:
    digest = served.digest
    for uid, keys in ((OURS, SYSTEM), (STRANGER, WEB)):
        tree = served.ask(uid, "GetTree", pb.GetTreeRequest(namespace_digest=digest))
        listed = served.ask(uid, "ListBlocks", pb.ListBlocksRequest(namespace_digest=digest))
        stat = served.ask(uid, "StatPrefix", pb.StatPrefixRequest(namespace_digest=digest, keys=keys))
        assert tree.nodes[0].first_key == keys[0]
        assert stat.found_blocks == len(keys)
        assert set(keys) <= {block.key for block in listed.blocks}
        beginnings = [key.hex()[:12] for key in (SYSTEM[0], WEB[0])]
        named = served.ask(uid, "FindKeys", pb.FindKeysRequest(namespace_digest=digest, beginnings=beginnings))
        assert [list(one.keys) for one in named.found] == [[key] if key in keys else [] for key in (SYSTEM[0], WEB[0])]
    mine = {block.key for block in listed.blocks}
    assert mine == set(WEB), "and nothing of anybody else's"
    alien = served.ask(STRANGER, "StatPrefix", pb.StatPrefixRequest(namespace_digest=digest, keys=SYSTEM))
    assert (alien.found_blocks, alien.pins_total, alien.leases_total) == (0, 0, 0)
    assert [block.state for block in alien.blocks] == ["absent"] * len(SYSTEM)


@pytest.mark.parametrize(
    ("verb", "request_type"),
    [
        ("GetTree", pb.GetTreeRequest),
        ("ListBlocks", pb.ListBlocksRequest),
        ("StatPrefix", pb.StatPrefixRequest),
        ("FindKeys", pb.FindKeysRequest),
    ],
)
def test_nobody_sees_those_of_another_tenant_by_naming_it(served: Served, verb: str, request_type: Any) -> None:
    request = request_type(tenant="research", namespace_digest=served.digest)
    assert served.refusal(STRANGER, verb, request) is grpc.StatusCode.PERMISSION_DENIED


def test_what_happens_to_all_is_for_those_who_act(served: Served) -> None:
    assert served.refusal(OURS, "WatchEvents", pb.WatchEventsRequest()) is grpc.StatusCode.PERMISSION_DENIED
