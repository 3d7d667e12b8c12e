"""Random and damaged frames: parsers refuse them with a typed error, and a real daemon outlives them."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.process import DaemonProcess
from kvproto import frames, policy_frames
from kvproto.errors import KvError, UsageError
from kvproto.frames import Head, Hello, Mode, Role, Verb
from kvproto.identity import NamespaceIdentity
from kvproto.limits import (
    FRAME_BYTES,
    HINT_NAME_BYTES,
    KEY_BYTES,
    KEYS_PER_FRAME,
    MATCHES_PER_FRAME,
    NAME_BYTES,
    NAMESPACES_PER_MATCH,
)
from kvproto.policy_frames import Question, Report
from tests.raw import RawClient, dial, identity, key, raw_client, real_daemon

SEED = 20261120
ROUNDS = 4000
ROUNDS_LONG = 400_000

derandomized = settings(derandomize=True, max_examples=300, deadline=None)
names = st.text(max_size=8)
numbers = st.integers(0, (1 << 64) - 1)


@derandomized
@given(st.binary(max_size=256))
def test_any_bytes_are_a_head_or_a_typed_error(frame: bytes) -> None:
    try:
        head = frames.parse_head(frame, len(frame))
    except KvError:
        return
    assert head.body + head.body_bytes == len(frame)


@derandomized
@given(st.binary(max_size=128))
def test_any_body_is_a_hello_or_a_typed_error(body: bytes) -> None:
    frame = frames.build(Verb.HELLO, 1, body)
    try:
        hello = frames.parse_hello(frame, frames.parse_head(frame, len(frame)))
    except KvError:
        return
    assert len(hello.name.encode()) <= NAME_BYTES


@derandomized
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_body_is_a_hint_or_a_typed_error(body: bytes, count: int) -> None:
    for damaged in (body, policy_frames.HINT_HEAD.pack(1, 0, 1, 1, 1.0) + body):
        frame = frames.build(Verb.HINT, 0, damaged, count=count)
        try:
            hint = policy_frames.parse_hint(frame, frames.parse_head(frame, len(frame)))
        except KvError:
            continue
        assert policy_frames.build_hint(hint) == frame or damaged[2:4] != bytes(2) or hint.seconds != hint.seconds
        assert len(hint.name.encode()) <= HINT_NAME_BYTES


@derandomized
@given(st.binary(max_size=200), st.integers(0, 5), st.integers(0, 70))
def test_any_body_is_a_match_all_or_a_typed_error(body: bytes, count: int, namespaces: int) -> None:
    for damaged in (body, frames.MATCH_ALL_HEAD.pack(namespaces) + body):
        frame = frames.build(Verb.MATCH_ALL, 1, damaged, count=count)
        try:
            numbers, keys_at = frames.parse_match_all(frame, frames.parse_head(frame, len(frame)))
        except KvError:
            continue
        assert 1 <= len(numbers) <= NAMESPACES_PER_MATCH
        assert keys_at % 8 == 0
        assert keys_at + count * KEY_BYTES == len(frame)


@derandomized
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=NAMESPACES_PER_MATCH), st.data())
def test_match_all_travels_unchanged(numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, min(40, MATCHES_PER_FRAME // len(numbers))))
    keys, releases = os.urandom(KEY_BYTES * count), data.draw(st.lists(st.integers(0, (1 << 64) - 1), max_size=3))
    frame = frames.build_match_all(7, numbers, keys, releases)
    head = frames.parse_head(frame, len(frame))
    parsed, keys_at = frames.parse_match_all(frame, head)
    assert (list(parsed), frame[keys_at:]) == (numbers, keys)
    assert frames.riders(frame, head)[0] == tuple(releases)


@derandomized
@given(names, names, st.sampled_from(Role), st.lists(st.sampled_from(Mode), min_size=1, max_size=4), numbers)
def test_hello_travels_unchanged(name: str, tenant: str, role: Role, modes: list[Mode], ring_bytes: int) -> None:
    hello = Hello(name, tenant, role, tuple(modes), ring_bytes)
    frame = frames.build_hello(7, hello)
    assert frames.parse_hello(frame, frames.parse_head(frame, len(frame))) == hello


@derandomized
@given(st.lists(numbers, max_size=20), st.lists(numbers, max_size=20), st.binary(max_size=64))
def test_riders_travel_unchanged(releases: list[int], commits: list[int], body: bytes) -> None:
    frame = frames.build(Verb.PING, 3, body, releases=releases, commits=commits)
    head = frames.parse_head(frame, len(frame))
    assert frames.riders(frame, head) == (tuple(releases), tuple(commits))
    assert frame[head.body :] == body


@derandomized
@given(st.binary(max_size=400))
def test_any_bytes_are_an_identity_or_a_typed_error(form: bytes) -> None:
    for damaged in (form, identity().canonical()[: len(form)] + form):
        try:
            parsed = NamespaceIdentity.from_canonical(damaged)
        except UsageError:
            continue
        assert parsed.canonical() == damaged


@derandomized
@given(st.data())
def test_a_changed_byte_never_leaves_an_identity_the_same(data: st.DataObject) -> None:
    form = bytearray(identity().canonical())
    at = data.draw(st.integers(0, len(form) - 1))
    form[at] ^= data.draw(st.integers(1, 255))
    try:
        parsed = NamespaceIdentity.from_canonical(bytes(form))
    except UsageError:
        return
    assert parsed != identity()
    assert parsed.digest() != identity().digest()


def test_a_daemon_outlives_random_and_damaged_frames() -> None:
    with real_daemon("--ring", "1MiB") as daemon:
        _bombard(daemon, ROUNDS)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_daemon_outlives_many_more_of_them() -> None:
    with real_daemon("--ring", "1MiB") as daemon:
        _bombard(daemon, ROUNDS_LONG)


def _bombard(daemon: DaemonProcess, rounds: int) -> None:
    generator = random.Random(SEED)
    print(f"seed {SEED}")
    with raw_client(daemon.runtime_dir) as bystander:
        client = _newcomer(daemon, generator)
        for number in range(rounds):
            try:
                client.send(_frame(generator))
            except OSError:  # it was told to go
                client.close()
                client = _newcomer(daemon, generator)
            _listen(client)
            if number % 256 == 0:
                bystander.ping()
                assert daemon.process.poll() is None
        client.close()
        bystander.ping()
        namespace = bystander.open(model="after")
        assert bystander.reserve(namespace, [key(1)])[0].grant == 0


def _newcomer(daemon: DaemonProcess, generator: random.Random) -> RawClient:
    client = dial(daemon.runtime_dir)
    if generator.random() < 0.9:
        client.hello()
        if generator.random() < 0.9:
            client.open()
    return client


def _listen(client: RawClient) -> None:
    """Take what is there, so that the daemon does not run into a full socket only."""
    client.socket.setblocking(False)
    try:
        while client.socket.recv(1 << 16):
            pass
    except OSError:
        pass
    client.socket.setblocking(True)


def _frame(generator: random.Random) -> bytes:
    """Mostly frames with a true length, so that they get past the first check."""
    verb = generator.choice([*Verb, generator.randrange(256)])
    count = generator.choice([0, 1, 2, 3, generator.randrange(1 << 16), KEYS_PER_FRAME])
    body = _body(generator, count)
    releases = [_number(generator) for _ in range(generator.choice([0, 0, 0, 1, 5]))]
    commits = [_number(generator) for _ in range(generator.choice([0, 0, 0, 0, 2]))]
    flags = generator.randrange(8)
    head = Head(verb, flags, count, generator.randrange(1 << 32), len(releases), len(commits), len(body))
    frame = frames.HEAD.pack(*head) + b"".join(number.to_bytes(8, "little") for number in releases + commits) + body
    if generator.random() < 0.1:
        damaged = bytearray(frame)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        frame = bytes(damaged)
    return frame[:FRAME_BYTES] if generator.random() < 0.95 else frame[: generator.randrange(len(frame) + 1)] or b"\0"


def _body(generator: random.Random, count: int) -> bytes:
    namespace = generator.choice([0, 1, 2, generator.randrange(1 << 32)]).to_bytes(4, "little") + bytes(4)
    keys = b"".join(key(generator.randrange(64)) for _ in range(min(count, KEYS_PER_FRAME)))
    times = _number(generator).to_bytes(8, "little") + _number(generator).to_bytes(8, "little")
    return generator.choice(
        [
            b"",
            bytes(8),
            times,
            namespace + keys,
            namespace + times + keys,
            _namespaces(generator) + keys,
            namespace + key(generator.randrange(64)) + keys,
            namespace[:4] + bytes([generator.randrange(4)]) + bytes(3) + times[:8] + keys,
            _words(generator, keys),
            _report(generator),
            policy_frames.ADVISE_BODY.pack(*Question(generator.randrange(3), *(_seconds(generator) for _ in range(8)))),
            times[:8] * count,
            identity(generator.choice([1, 4096, 1 << 20])).canonical(),
            os.urandom(generator.randrange(200)),
        ]
    )


def _namespaces(generator: random.Random) -> bytes:
    """Of a MATCH_ALL: mostly as many as it says, and mostly of this session."""
    count = generator.choice([0, 1, 1, 2, 3, 4, 64, 65, generator.randrange(1 << 32)])
    there = min(count, 65) + (generator.random() < 0.1)
    numbers = [generator.choice([1, 1, 1, 2, generator.randrange(1 << 32)]) for _ in range(there + there % 2)]
    return frames.MATCH_ALL_HEAD.pack(count) + b"".join(number.to_bytes(4, "little") for number in numbers)


def _words(generator: random.Random, keys: bytes) -> bytes:
    """A hint, mostly of something that there is."""
    event = generator.choice([*range(14), 255])
    text = generator.choice(["", "{", '{"steps":[{"name":"a"}]}', '{"steps":[{"name":"a","next":["a"]}]}', "x" * 5000])
    name, other = (generator.choice(["", "a", "a", "b", "\0", "n" * 600]) for _ in range(2))
    head = policy_frames.HINT_HEAD.pack(
        event, generator.randrange(5), generator.randrange(3), _number(generator), _seconds(generator)
    )
    return head + b"".join(map(frames.pack_text, (name, other, text))) + keys


def _report(generator: random.Random) -> bytes:
    numbers = generator.randrange(3), generator.randrange(3), _number(generator), _number(generator)
    return policy_frames.REPORT_BODY.pack(*Report(*numbers, _seconds(generator)))


def _seconds(generator: random.Random) -> float:
    return generator.choice([0.0, -1.0, 1e-9, 1.0, 1e300, float("nan"), float("inf"), generator.random()])


def _number(generator: random.Random) -> int:
    return generator.choice([0, 1, 10**9, (1 << 63) - 1, (1 << 64) - 1, generator.getrandbits(64)])
