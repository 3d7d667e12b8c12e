"""Timings on their way through a real daemon: reported on the hot socket, answered there and on the control socket."""

from collections.abc import Iterator
from math import isnan, nan

import pytest

from bench.process import DaemonProcess
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from kvproto import frames, policy_frames
from kvproto.errors import Code, Grant
from kvproto.frames import UNKNOWN_NS, Matched, Verb
from kvproto.policy_frames import Advised, Choice, Kind, Question, Report, Tier
from tests.raw import RawClient, identity, key, raw_client, real_daemon

BLOCK_BYTES = 4096
TOKENS = 16
KEYS = [key(number) for number in range(1, 41)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with real_daemon() as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RawClient]:
    with raw_client(daemon.runtime_dir) as connected:
        yield connected


def prefill_s(cached: int, new: int) -> float:
    return 0.01 + 4e-5 * new + 2e-8 * new * (cached + new / 2)


def report(client: RawClient, number: int, kind: Kind, first: int, amount: int, seconds: float) -> None:
    client.send(policy_frames.build_report(Report(number, kind, first, amount, seconds)))


def teach(client: RawClient, number: int) -> None:
    for cached in (0, 256, 1024, 4096):
        for new in (16, 64, 256, 1024, 4096):
            for _ in range(2):
                report(client, number, Kind.PREFILL, cached, new, prefill_s(cached, new))
    for exponent in range(12, 20):
        report(client, number, Kind.LOAD, Tier.DRAM, 1 << exponent, 1e-5 + (1 << exponent) / 1e9)


def store(client: RawClient, number: int, keys: list[bytes]) -> None:
    reserved = client.reserve(number, keys)
    assert [one.grant for one in reserved] == [Grant.GRANTED] * len(keys)
    assert client.commit([one.ticket for one in reserved]) == 0
    lease = client.lease(number, keys, wait_s=15.0)  # it waits for what this session writes
    assert len(lease.locations) == len(keys)
    client.send(frames.build(Verb.RELEASE, 0, releases=[lease.lease]))


def match(client: RawClient, number: int, keys: list[bytes]) -> Matched:
    client.send(frames.build_match(client.request(), number, b"".join(keys)))
    head, frame, _ = client.answer(Verb.MATCHED)
    return frames.parse_matched(frame, head)


def advise(client: RawClient, question: Question) -> Advised:
    client.send(policy_frames.build_advise(client.request(), question))
    head, frame, _ = client.answer(Verb.ADVISED)
    return policy_frames.parse_advised(frame, head)


def costs(daemon: DaemonProcess, digest: str) -> pb.NamespaceCosts:
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
        (one,) = control.costs(pb.GetCostsRequest(namespace_digest=digest)).namespaces
        return one


def test_what_was_reported_is_answered_by_match_advise_and_the_control_socket(
    daemon: DaemonProcess, client: RawClient
) -> None:
    number, digest = client.open(BLOCK_BYTES, model="a"), identity(BLOCK_BYTES, model="a").digest().hex()
    question = Question(number, 4096.0, nan, 0.0, 1.0, nan, nan, 16.0, nan)
    before = advise(client, question)
    assert (before.choice, isnan(before.swap), isnan(before.discard)) == (Choice.PRESERVE, True, True)
    assert before.preserve == 4096 * BLOCK_BYTES / TOKENS
    store(client, number, KEYS[:10])
    assert match(client, number, KEYS[:10]) == Matched(0, 10, 0, 0, UNKNOWN_NS, UNKNOWN_NS)
    assert costs(daemon, digest).unpriced_blocks == 10

    teach(client, number)
    found = match(client, number, KEYS[:10])
    assert found.dram == 10
    assert found.load_ns == pytest.approx(1e4 + 10 * BLOCK_BYTES, rel=0.1)
    assert found.recompute_ns == pytest.approx(1e9 * prefill_s(0, 160), rel=0.1)
    after = advise(client, question)
    assert not isnan(after.swap)
    assert not isnan(after.discard)
    assert after.forward_s == pytest.approx(prefill_s(0, 16), rel=0.1)

    client.lease(number, KEYS[:10])
    wanted = 160 * 4e-5 + 2e-8 * 160**2 / 2
    one = costs(daemon, digest)
    assert (one.prefill_reports, one.hit_blocks, one.unpriced_blocks) == (40, 20, 10)
    assert one.saved_dram_s == pytest.approx(wanted, rel=0.1)
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
        (tenant,) = control.tenants().tenants
    assert (tenant.saved_dram_s, tenant.saved_disk_s) == (one.saved_dram_s, 0.0)
    assert Verb.REFUSED not in {head.verb for head, _, _ in client.unasked}


def test_a_timing_that_cannot_be_is_refused_and_the_session_goes_on(client: RawClient) -> None:
    number = client.open(BLOCK_BYTES, model="b")
    for kind, first, amount, seconds in (
        (Kind.PREFILL, 0, 100, nan),
        (Kind.PREFILL, 0, 100, -1.0),
        (Kind.PREFILL, (1 << 64) - 1, 100, 1.0),
        (Kind.LOAD, Tier.DISK, 0, 1.0),
    ):
        report(client, number, kind, first, amount, seconds)
        head, frame, _ = client.answer(Verb.REFUSED)
        assert head.request == 0
        assert frames.parse_failure(frame, head)[0] is Code.BAD_ARGUMENT
    client.send(policy_frames.build_advise(client.request(), Question(number, nan, *[0.0] * 7)))
    head, frame, _ = client.answer(Verb.FAILED)
    assert frames.parse_failure(frame, head)[0] is Code.BAD_ARGUMENT
    report(client, number, Kind.PREFILL, 0, 100, 1.0)
    client.ping()
    assert Verb.REFUSED not in {head.verb for head, _, _ in client.unasked}


def test_reads_of_the_daemons_disk_are_timed(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("disk")
    disk = ("--disk", str(folder), "--disk-size", "64MiB", "--disk-segment", "16MiB", "--disk-admission", "all")
    with real_daemon(*disk, "--dram", "16MiB") as daemon, raw_client(daemon.runtime_dir) as client:
        big = 1 << 20
        number = client.open(big, model="c")
        for chain in range(5):
            keys = [key(1000 * chain + i) for i in range(1, 9)]
            store(client, number, keys)
            assert client.flush(number, 10.0).durable == 8
        first = [key(i) for i in range(1, 9)]
        before = match(client, number, first)
        assert (before.disk, before.load_ns) == (8, UNKNOWN_NS)
        leased = client.lease(number, first, wait_s=10.0)
        coming = leased.coming
        while coming:
            coming = client.ready().left
        with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
            (way,) = control.costs(pb.GetCostsRequest()).ways
        assert (way.tenant, way.tier) == ("", "disk")
        assert 1e6 < way.bytes_per_s < 1e12
        found = match(client, number, [key(i) for i in range(1001, 1009)])
        assert found.disk
        assert 0 < found.load_ns < UNKNOWN_NS or found.dram
