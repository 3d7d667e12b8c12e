"""Three daemons on one host, and the example router that sends requests where their prefixes are."""

import os
import runpy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
import zmq

import kvclient
from bench.process import DaemonProcess
from kvproto import control_pb2 as pb
from kvproto import control_pb2_grpc
from kvstored.block_events_address import endpoints_of
from tests.unit.test_block_events import DECODER

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "clients" / "examples" / "router.py"))
Host, choose, unheard = EXAMPLE["Host"], EXAMPLE["choose"], EXAMPLE["unheard"]
BLOCK_BYTES = 4096
PATIENCE_S = 30.0
TENANT = f"uid-{os.getuid()}"


class Trio:
    """Daemons, a client of each, and what a router knows of them."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        def start(number: int) -> DaemonProcess:
            options = ("--dram", "16MiB", "--events-listen", "ipc", "--tenant-control", "on")
            return DaemonProcess(home / f"host{number}", *options, log_file=home / f"log{number}")

        with ThreadPoolExecutor(3) as starting:
            self.daemons = [stack.enter_context(one) for one in starting.map(start, range(3))]
        self.clients = [
            stack.enter_context(kvclient.connect(one.runtime_dir, timeout_s=PATIENCE_S)) for one in self.daemons
        ]
        assert all(client.wait_connected(PATIENCE_S) for client in self.clients)
        self.spaces = [
            client.namespace(
                model="m", engine="e", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
            )
            for client in self.clients
        ]
        self.digests = [self.spaces[0].identity.digest().hex()]
        self.hosts = [Host(one.runtime_dir, TENANT) for one in self.daemons]
        for host in self.hosts:
            stack.callback(host.close)

    def keys(self, seed: int, blocks: int = 8) -> list[bytes]:
        return list(self.spaces[0].keys(np.random.default_rng(seed).integers(0, 1 << 31, 16 * blocks)))

    def store(self, number: int, keys: list[bytes]) -> None:
        content = np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8)
        self.spaces[number].store(keys, content, wait=True)
        assert self.hosts[number].wait(self.digests, keys, len(keys), PATIENCE_S)

    def stub(self, number: int, stack: ExitStack) -> control_pb2_grpc.ControlStub:
        path = self.daemons[number].runtime_dir / "control.sock"
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{path}"))
        return control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    with ExitStack() as stack:
        yield Trio(tmp_path_factory.mktemp("trio"), stack)


def test_a_request_goes_where_its_prefix_is_and_what_nobody_has_goes_round(trio: Trio) -> None:
    chains = {number: trio.keys(number) for number in range(3)}
    for number, keys in chains.items():
        trio.store(number, keys)
    for number, keys in chains.items():
        assert choose(trio.hosts, trio.digests, [*keys, *trio.keys(99)]) is trio.hosts[number]
    new = [choose(trio.hosts, trio.digests, trio.keys(100 + i)) for i in range(3)]
    assert {host.name for host in new} == {host.name for host in trio.hosts}, "the control: nobody has these"


@pytest.mark.parametrize(("sent", "is_even"), [(100, True), (1000, False)])
def test_a_short_prefix_decides_as_long_as_no_host_is_sent_much_more(trio: Trio, *, sent: int, is_even: bool) -> None:
    keys = trio.keys(5000 + sent, 16)
    trio.store(1, keys[:2])
    for number, routed in enumerate((90, sent, 90)):
        trio.hosts[number].routed = routed
    assert (choose(trio.hosts, trio.digests, keys) is trio.hosts[1]) == is_even


def test_what_is_dropped_is_not_routed_there_any_more(trio: Trio) -> None:
    keys = trio.keys(7)
    trio.store(1, keys)
    assert choose(trio.hosts, trio.digests, keys) is trio.hosts[1]
    trio.spaces[1].delete(keys[2:])
    assert trio.hosts[1].wait(trio.digests, keys, 2, PATIENCE_S)
    trio.store(2, keys[:5])
    assert choose(trio.hosts, trio.digests, keys) is trio.hosts[2]


def test_of_hosts_that_have_it_the_summary_and_the_load_decide(trio: Trio) -> None:
    keys = trio.keys(8)
    for number in (0, 2):
        trio.store(number, keys)
    for host in trio.hosts:
        host.routed = 0
    chosen = {choose(trio.hosts, trio.digests, keys).name for _ in range(2)}
    assert chosen == {trio.hosts[0].name, trio.hosts[2].name}, "as idle as each other they take turns"
    summary = trio.hosts[0].summary(trio.digests, keys)
    assert summary is not None
    assert (summary.blocks, summary.dram_blocks, summary.dram_bytes) == (8, 8, 8 * BLOCK_BYTES)


def test_a_router_that_comes_late_learns_what_is_there_and_one_that_comes_back_what_it_missed(trio: Trio) -> None:
    keys = trio.keys(9)
    trio.store(0, keys[:4])
    with ExitStack() as stack:
        stub = trio.stub(0, stack)
        there = list(stub.WatchBlocks(pb.WatchBlocksRequest(tenant=TENANT)))
        assert there[0].cleared
        assert set(keys[:4]) <= {change.key for message in there for change in message.changes}
        trio.store(0, keys)
        missed = list(stub.WatchBlocks(pb.WatchBlocksRequest(tenant=TENANT, start_from=there[-1].next)))
        assert [message.number for message in missed] == list(range(there[-1].next, missed[-1].next))
        assert [change.key for message in missed for change in message.changes] == keys[4:]
        assert [change.parent for message in missed for change in message.changes] == keys[3:-1]
        for request, code in (
            (pb.WatchBlocksRequest(), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.WatchBlocksRequest(tenant=TENANT, namespace_digest="x"), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.WatchBlocks(request))
            assert caught.value.code() is code


def test_a_daemon_tells_subscribers_of_zeromq_the_same(trio: Trio) -> None:
    keys = trio.keys(10)
    endpoint = endpoints_of("ipc", trio.daemons[2].runtime_dir, TENANT)
    trio.store(2, keys)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        socket.connect(endpoint.replay)
        socket.send_multipart((b"", bytes(8)))
        said = []
        while True:
            _, topic, number, payload = socket.recv_multipart()
            if not payload:
                break
            said.append((topic, int.from_bytes(number, "big"), DECODER.decode(payload)))
    assert [number for _, number, _ in said] == list(range(said[0][1], said[0][1] + len(said)))
    assert said[0][1] > 1 << 50, "no former life has come to it"
    assert said[-1][0].endswith(b"@m")
    hashes = {hashed for _, _, batch in said for event in batch.events for hashed in getattr(event, "block_hashes", ())}
    assert {int.from_bytes(key[-8:], "big") for key in keys} <= hashes


def test_asking_leaves_no_trace(trio: Trio) -> None:
    keys = trio.keys(11)
    trio.store(0, keys)
    with ExitStack() as stack:
        stub = trio.stub(0, stack)
        digest = stub.ListNamespaces(pb.ListNamespacesRequest()).namespaces[0].digest
        before = stub.GetStatistics(pb.GetStatisticsRequest())
        for _ in range(3):
            summary = stub.SummariseMatch(pb.SummariseMatchRequest(keys=keys, namespace_digests=[digest]))
            load = stub.GetLoad(pb.GetLoadRequest())
            cost = stub.EstimateAdmission(
                pb.EstimateAdmissionRequest(tenant=TENANT, namespace_digest=digest, bytes=16 << 20)
            )
        assert stub.GetStatistics(pb.GetStatisticsRequest()) == before
    assert summary.blocks == 8
    assert [tier.name for tier in load.tiers] == ["dram"]
    assert cost.wanted_blocks == cost.free_blocks + cost.evicted_blocks + cost.short_blocks == (16 << 20) // BLOCK_BYTES
    assert cost.evicted_blocks == load.tiers[0].blocks


def test_equal_keys_of_another_model_count_for_nothing(trio: Trio) -> None:
    keys = trio.keys(12)
    other = trio.clients[1].namespace(
        model="another", engine="e", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
    )
    other.store(keys, np.zeros((len(keys), BLOCK_BYTES), dtype=np.uint8), wait=True)
    digests = [other.identity.digest().hex()]
    assert trio.hosts[1].wait(digests, keys, len(keys), PATIENCE_S)
    trio.store(0, keys[:4])
    assert choose(trio.hosts, trio.digests, keys) is trio.hosts[0], "host 1 has them all, of another model"
    assert choose(trio.hosts, digests, keys) is trio.hosts[1], "the control"
    assert trio.hosts[1].prefix([*digests, *trio.digests], keys) == 0, "all ranks must have it"
    trio.store(1, keys)
    trio.store(0, keys)
    summary = trio.hosts[1].summary(trio.digests, keys)
    assert summary is not None, "with two namespaces it answers which one is meant"
    assert summary.blocks == len(keys)


def test_a_tenant_that_no_host_knows_is_said(trio: Trio) -> None:
    said = unheard(trio.hosts, "nobody")
    assert len(said) == len(trio.hosts)
    assert TENANT in said[0]
    assert unheard(trio.hosts, TENANT) == [], "the control"


def test_a_subscriber_of_zeromq_hears_of_a_restart_that_lost_everything_though_nobody_stores(tmp_path: Path) -> None:
    run, options = tmp_path / "run", ("--dram", "16MiB", "--lock", "false", "--keep", "off", "--events-listen", "ipc")
    with zmq.Context() as context, context.socket(zmq.SUB) as socket, ExitStack() as stack:
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        socket.subscribe(b"kv@")
        socket.connect(endpoints_of("ipc", run, TENANT).publish)

        def heard() -> tuple[int, list[str]]:
            _, number, payload = socket.recv_multipart()
            return int.from_bytes(number, "big"), [type(one).__name__ for one in DECODER.decode(payload).events]

        former = stack.enter_context(DaemonProcess(run, *options, log_file=tmp_path / "log"))
        with kvclient.connect(run, timeout_s=PATIENCE_S) as client:
            assert client.wait_connected(PATIENCE_S)
            space = client.namespace(
                model="m", engine="e", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
            )
            keys = list(space.keys(np.arange(16)))
            space.store(keys, np.zeros((1, BLOCK_BYTES), dtype=np.uint8), wait=True)
            last, _ = heard()  # what was stored, or the word that there is something to be had again
        former.kill()
        while socket.poll(0):
            last, _ = heard()
        stack.enter_context(DaemonProcess(run, *options, log_file=tmp_path / "log"))
        number, events = heard()
        assert number > last + 1, "a gap"
        assert events == ["AllBlocksCleared"]
