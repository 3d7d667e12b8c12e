"""PIN, PREFETCH and CANCEL on the socket of a real daemon: what cannot be, and what is not wanted any more."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.process import DaemonProcess
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from kvproto import frames, policy_frames
from kvproto.errors import Code, Grant
from kvproto.frames import Matched, Verb
from kvproto.limits import MIB, PIN_TTL_NS_MAX, PREFETCH_NS_MAX
from kvproto.policy_frames import Fetching, Tier
from tests.node import until
from tests.raw import RawClient, key, raw_client, real_daemon

SECOND = 10**9
AGES = (1 << 64) - 1  # ns


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """64 MiB of DRAM, of which 16 may be fetched and not used; everything is written to disk."""
    disk = ("--disk", str(tmp_path_factory.mktemp("disk")), "--disk-size", "256MiB", "--disk-segment", "16MiB")
    with real_daemon(*disk, "--disk-admission", "all") as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[RawClient]:
    with raw_client(daemon.runtime_dir) as connected:
        yield connected


def chain(name: int, count: int) -> list[bytes]:
    """Keys of a chain."""
    return [key(1000 * name + place) for place in range(count)]


def store(client: RawClient, number: int, keys: list[bytes]) -> None:
    """Whatever the ring holds, to DRAM and to disk."""
    for start in range(0, len(keys), 8):
        part = keys[start : start + 8]
        reserved = client.reserve(number, part, keys[start - 1] if start else None)
        assert [one.grant for one in reserved] == [Grant.GRANTED] * len(part)
        assert client.commit([one.ticket for one in reserved]) == 0
        lease = client.lease(number, part, wait_s=15.0)  # it waits for what this session writes
        client.send(frames.build(Verb.RELEASE, 0, releases=[lease.lease]))
        assert client.flush(number, 20.0).durable == len(part)


def match(client: RawClient, number: int, keys: list[bytes]) -> Matched:
    """MATCH."""
    client.send(frames.build_match(client.request(), number, b"".join(keys)))
    head, frame, _ = client.answer(Verb.MATCHED)
    return frames.parse_matched(frame, head)


def prefetch_frame(client: RawClient, number: int, keys: list[bytes], within_s: int) -> bytes:
    """PREFETCH."""
    return policy_frames.build_prefetch(client.request(), number, b"".join(keys), Tier.DRAM, within_s * SECOND)


def fetching(client: RawClient) -> Fetching:
    """The next FETCHING."""
    head, frame, _ = client.answer(Verb.FETCHING)
    return policy_frames.parse_fetching(frame, head)


def counters(runtime_dir: Path) -> pb.PinCounters:
    """As an operator sees them."""
    with ControlClient(runtime_dir / "control.sock", 20.0) as control:
        return control.pins(pb.ListPinsRequest()).counters


@pytest.mark.parametrize(
    ("verb", "answer", "most_ns"),
    [(Verb.PIN, Verb.PINNED, PIN_TTL_NS_MAX), (Verb.PREFETCH, Verb.FETCHING, PREFETCH_NS_MAX)],
)
def test_a_time_that_cannot_be_fails_and_the_session_goes_on(
    client: RawClient, verb: Verb, answer: Verb, most_ns: int
) -> None:
    number, keys = client.open(), b"".join(chain(1, 4))

    def ask(ns: int) -> int:
        if verb == Verb.PIN:
            client.send(policy_frames.build_pin(client.request(), number, keys, Tier.DRAM, ns, refresh=False))
        else:
            client.send(policy_frames.build_prefetch(client.request(), number, keys, Tier.DRAM, ns))
        return client.requests

    for ns in (0, most_ns + 1, AGES):
        request = ask(ns)
        head, frame, _ = client.answer(Verb.FAILED)
        code, text = frames.parse_failure(frame, head)
        assert (head.request, code) == (request, Code.BAD_ARGUMENT)
        assert str(most_ns) in text
        client.ping()
    for ns in (1, most_ns):
        request = ask(ns)
        assert client.answer(answer)[0].request == request
    assert client.unasked == []


def test_what_is_cancelled_before_its_turn_is_not_fetched(daemon: DaemonProcess, client: RawClient) -> None:
    number = client.open(MIB)
    first, urgent, unwanted, wanted = chain(2, 1), chain(3, 12), chain(4, 2), chain(5, 2)
    for keys in (first, urgent, unwanted, wanted):
        store(client, number, keys)
    for other in range(10, 20):  # more than there is room for
        store(client, number, chain(other, 8))
    for keys in (first, urgent, unwanted, wanted):
        assert (match(client, number, keys).dram, match(client, number, keys).disk) == (0, len(keys))
    before = counters(daemon.runtime_dir)
    client.send(prefetch_frame(client, number, first, 60))
    last = fetching(client).prefetch
    assert until(lambda: match(client, number, first).dram == 1)

    # A chain has a number, and so has each who wants it.
    # All in one go, so that the most urgent one, which comes in two pieces, is under way when the others are there.
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        client.send(prefetch_frame(client, number, urgent, 60))
        client.send(prefetch_frame(client, number, unwanted, 120))
        client.send(prefetch_frame(client, number, wanted, 180))
        client.send(policy_frames.build_cancel([last + 4, last + 1000]))
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert [fetching(client) for _ in range(3)] == [
        Fetching(last + 2, 0, 12), Fetching(last + 4, 0, 2), Fetching(last + 6, 0, 2),
    ]  # fmt: skip
    assert until(lambda: match(client, number, wanted).dram == 2)
    assert match(client, number, urgent).dram == 12
    assert match(client, number, unwanted).disk == 2, "its turn was before that of the one that has come"
    after = counters(daemon.runtime_dir)
    assert after.prefetches_cancelled - before.prefetches_cancelled == 1
    assert after.prefetched_bytes - before.prefetched_bytes == 15 * MIB
