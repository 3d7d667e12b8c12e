"""Random and damaged frames: parsers refuse them with a typed error, and a real daemon outlives them."""

import os
import random
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.process import DaemonProcess
from kvkernels.device.emulation import Emulation
from kvkernels.device.port import Handle, Via
from kvproto import device_frames, frames, policy_frames
from kvproto.device_frames import Attach, Fate, Opens, Piece, SharedHandle, State
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
    PAGE_BYTES,
)
from kvproto.policy_frames import Question, Report
from tests.figures import Recorder
from tests.node import until
from tests.raw import Message, RawClient, dial, identity, key, raw_client, real_daemon

SEED = 20261120
ROUNDS = 4000
SLICE = 400_000  # of the long form: each has a daemon and a seed of its own
ROUNDS_LONG = int(os.environ.get("TEST_FRAMES", SLICE))
SMALL = ("--ring", "1MiB", "--gpu-devices", "emulation", "--gpu-hbm", "32MiB")
PAGES = 64  # of 4 KiB, that an engine attaches

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
    with real_daemon(*SMALL) as daemon:
        _bombard(daemon, SEED, ROUNDS)


@pytest.mark.long
@pytest.mark.timeout(0)
def test_a_daemon_outlives_many_more_of_them(record_property: Recorder) -> None:
    for begin in range(0, ROUNDS_LONG, SLICE):
        with real_daemon(*SMALL) as daemon:
            _bombard(daemon, SEED + begin, min(SLICE, ROUNDS_LONG - begin))
    record_property("frames", ROUNDS_LONG)


def _bombard(daemon: DaemonProcess, seed: int, rounds: int) -> None:
    generator = random.Random(seed)
    print(f"seed {seed}")
    with raw_client(daemon.runtime_dir) as bystander, closing(Emulation()) as device:
        memory = device.allocate(PAGES * PAGE_BYTES, Via.DESCRIPTOR)
        handle = device.export(memory.address, PAGES * PAGE_BYTES)
        descriptors = count_of(daemon)
        client = _newcomer(daemon, generator, handle)
        for number in range(rounds):
            try:
                client.send(*_message(generator, client, handle))
            except PermissionError:  # not in mode daemon
                pass
            except OSError:  # it was told to go
                client.close()
                client = _newcomer(daemon, generator, handle)
            _listen(client)
            if number % 256 == 0:
                bystander.ping()
                assert daemon.process.poll() is None
        client.close()
        os.close(handle.fd)
        bystander.ping()
        namespace = bystander.open(model="after")
        assert bystander.reserve(namespace, [key(1)])[0].grant == 0
        assert _moves(daemon, device, memory.address)
        # All that came was closed; what was there before may have gone, such as the session that saw it serve.
        assert until(lambda: count_of(daemon) <= descriptors), (descriptors, count_of(daemon))


KINDS = ("/memfd:kvstored-emulated-device", "/memfd:kvstored-ring", "socket:", "anon_inode:")


def count_of(daemon: DaemonProcess) -> Counter[str]:
    """Descriptors that it has of clients: their memory, rings, sockets and processes."""
    kinds: Counter[str] = Counter()
    for path in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with suppress(OSError):
            name = str(path.readlink())
            kinds.update(kind for kind in KINDS if name.startswith(kind))
    return kinds


def _moves(daemon: DaemonProcess, device: Emulation, address: int) -> bool:
    """Does mode daemon still save and load?"""
    with raw_client(daemon.runtime_dir, modes=(Mode.DAEMON,)) as engine:
        handle = device.export(address, PAGES * PAGE_BYTES)
        engine.send(device_frames.build_attach(1, _attach(handle)), [handle.fd])
        os.close(handle.fd)
        head, frame, _ = engine.answer(Verb.ATTACHED)
        number, namespace = frames.parse_number(frame, head), engine.open(PAGE_BYTES, model="after")
        engine.send(device_frames.build_save(2, namespace, number, [1], key(2), parent=None))
        head, frame, _ = engine.answer(Verb.SAVED)
        saved = device_frames.parse_saved(frame, head)[1]
        engine.send(device_frames.build_load(3, namespace, number, [2], key(2), wait_ns=0, groups=1))
        while (state := device_frames.parse_loaded(*_swapped(engine.answer(Verb.LOADED)))).state is State.MOVING:
            pass
    return saved == [Fate.SAVED] and state[1:] == (1, 1, State.DONE)


def _swapped(message: Message) -> tuple[bytes, Head]:
    head, frame, _ = message
    return frame, head


def _attach(handle: Handle) -> Attach:
    """All of it, a page a block."""
    whole = SharedHandle(handle.whole_bytes, Opens.DESCRIPTOR)
    return Attach(bytes.fromhex(handle.identity), [whole], [Piece(0, 0, PAGE_BYTES)], PAGE_BYTES, PAGES)


def _message(generator: random.Random, client: RawClient, handle: Handle) -> tuple[bytes, list[int]]:
    """A frame, and what comes with it."""
    moves = client.welcome is not None and client.welcome.mode is Mode.DAEMON
    if generator.random() < (0.1 if moves else 0.9):
        return _frame(generator), []
    whole = _attach(handle)
    if generator.random() < 0.05:
        frame, fds = device_frames.build_attach(1, whole), [handle.fd]
    elif generator.random() < 0.05:
        frame, fds = device_frames.build_attach(1, _damaged(generator, whole)), [handle.fd] * generator.randrange(4)
    else:
        frame, fds = _transfer(generator), [handle.fd] * (generator.random() < 0.05)
    if generator.random() < 0.02:
        damaged = bytearray(frame)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        frame = bytes(damaged)
    return frame, fds


def _damaged(generator: random.Random, attach: Attach) -> Attach:
    """One thing about it is wrong, mostly."""
    odd = [0, 1, 15, 16, PAGE_BYTES, 1 << 31, (1 << 32) - 1]
    far = [*odd, 1 << 57, (1 << 64) - 16, (1 << 64) - 1, _number(generator)]
    wrong = SharedHandle(generator.choice(far), generator.choice(list(Opens)), os.urandom(generator.randrange(65)))
    piece = Piece(generator.choice(odd), generator.choice(far), generator.choice(far))
    return generator.choice(
        [
            attach._replace(identity=os.urandom(16)),
            attach._replace(handles=[wrong] * generator.randrange(1, 300)),
            attach._replace(handles=[*attach.handles] * generator.randrange(4)),
            attach._replace(pieces=[piece] * generator.randrange(4)),
            attach._replace(pieces=[*attach.pieces] * generator.randrange(1000)),
            attach._replace(piece_bytes=generator.choice(far)),
            attach._replace(blocks=generator.choice(odd)),
        ]
    )


def _transfer(generator: random.Random) -> bytes:
    """A LOAD or SAVE, mostly of what there is, or its end."""
    verb = generator.choice([Verb.LOAD, Verb.LOAD, Verb.SAVE, Verb.SAVE, Verb.CANCEL_TRANSFER, Verb.DETACH])
    number = generator.choice([1, 1, 1, 1, 1, 2, 0, (1 << 32) - 1])
    if verb is Verb.CANCEL_TRANSFER:
        return device_frames.build_transfer(verb, 1, generator.choice([generator.randrange(8), _number(generator)]))
    if verb is Verb.DETACH:
        return frames.build(verb, 1, frames.NUMBER_BODY.pack(number))
    count = generator.choice([1, 1, 2, 3, 60, PAGES])
    pages = generator.sample(range(PAGES), count)
    if generator.random() < 0.05:
        pages[0] = generator.choice([PAGES, (1 << 32) - 1, pages[-1]])
    chain = generator.randrange(3)
    keys = b"".join(key(PAGES * chain + place) for place in range(count))
    if verb is Verb.LOAD:
        groups = generator.choice([*[1] * 50, 0, 2, 256, 257, (1 << 32) - 1])
        wait_ns = generator.choice([*[0, 10**6, 10**9] * 10, _number(generator)])
        return device_frames.build_load(1, 1, number, pages, keys, wait_ns=wait_ns, groups=groups)
    parent = generator.choice([None, None, None, key(PAGES * chain), key(1000)])
    us = generator.choice([0, 1, (1 << 32) - 1])
    return device_frames.build_save(1, 1, number, pages, keys, parent=parent, recompute_us=us)


def _newcomer(daemon: DaemonProcess, generator: random.Random, handle: Handle) -> RawClient:
    client = dial(daemon.runtime_dir)
    if generator.random() < 0.9:
        client.hello(modes=generator.choice([(Mode.COPY,), (Mode.DAEMON,)]))
        if generator.random() < 0.9:
            client.open()
        if client.welcome is not None and client.welcome.mode is Mode.DAEMON and generator.random() < 0.8:
            client.send(device_frames.build_attach(1, _attach(handle)), [handle.fd])
            if generator.random() < 0.8:
                client.answer(Verb.ATTACHED)
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
