"""Frames that no decent client sends: each ends its session with a reason, and harms nobody else."""

import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from bench.process import DaemonProcess
from kvproto import frames
from kvproto.errors import Code, Grant
from kvproto.frames import Hello, Role, Verb
from kvproto.limits import FRAME_BYTES, KEYS_PER_FRAME, PROTOCOL_VERSION
from tests.node import until
from tests.raw import RawClient, dial, identity, key, raw_client


def test_an_unknown_verb_ends_the_session(client: RawClient) -> None:
    client.send(frames.HEAD.pack(99, 0, 0, 7, 0, 0, 0))
    code, text = client.goodbye()
    assert code is Code.UNKNOWN_VERB
    assert "verb 99" in text


@pytest.mark.parametrize("frame", [b"\x01", b"\x00" * 15, os.urandom(FRAME_BYTES + 1), b"\x0b" * (FRAME_BYTES + 4096)])
def test_a_short_or_over_long_frame_ends_the_session(client: RawClient, frame: bytes) -> None:
    client.send(frame)
    assert client.goodbye()[0] is Code.BAD_FRAME


@pytest.mark.parametrize("body_bytes", [0, 7, 9, 1 << 20, 0xFFFFFFFF])
def test_a_frame_that_lies_about_its_length_ends_the_session(client: RawClient, body_bytes: int) -> None:
    client.send(frames.HEAD.pack(Verb.PING, 0, 0, 1, 0, 0, body_bytes) + bytes(8))
    assert client.goodbye()[0] is Code.BAD_FRAME


def test_a_truthful_length_is_served(client: RawClient) -> None:
    client.send(frames.HEAD.pack(Verb.PING, 0, 0, 1, 0, 0, 8) + bytes(8))
    client.answer(Verb.PONG)


def test_the_first_frame_must_be_hello(daemon: DaemonProcess) -> None:
    client = dial(daemon.runtime_dir)
    client.send(frames.build(Verb.PING, 1, bytes(8)))
    assert client.goodbye()[0] is Code.BAD_FRAME
    client.close()


def test_a_second_hello_ends_the_session(client: RawClient) -> None:
    client.send(frames.build_hello(1, Hello(name="again")))
    code, text = client.goodbye()
    assert code is Code.BAD_FRAME
    assert "second HELLO" in text


def test_an_unknown_version_is_refused(daemon: DaemonProcess) -> None:
    client = dial(daemon.runtime_dir)
    later = Hello(name="new", version_low=PROTOCOL_VERSION + 1, version_high=PROTOCOL_VERSION + 9)
    client.send(frames.build_hello(1, later))
    code, text = client.goodbye()
    assert code is Code.REFUSED
    assert f"to {PROTOCOL_VERSION}, client {PROTOCOL_VERSION + 1}" in text
    client.close()


def test_a_tenant_that_the_configuration_does_not_grant_is_refused(daemon: DaemonProcess) -> None:
    client = dial(daemon.runtime_dir)
    client.send(frames.build_hello(1, Hello(name="x", tenant="somebody-else")))
    assert client.goodbye()[0] is Code.REFUSED
    client.close()


@pytest.mark.parametrize("body", [b"", b"\x00" * 3, bytes(200), os.urandom(64)])
def test_a_malformed_hello_ends_the_session(daemon: DaemonProcess, body: bytes) -> None:
    client = dial(daemon.runtime_dir)
    client.send(frames.build(Verb.HELLO, 1, body))
    assert client.goodbye()[0] in {Code.BAD_FRAME, Code.REFUSED}
    client.close()


def test_more_keys_than_the_limit_end_the_session(client: RawClient) -> None:
    namespace = client.open()
    count = KEYS_PER_FRAME + 1
    client.send(frames.build_match(1, namespace, bytes(32 * count)))
    assert client.goodbye()[0] is Code.LIMIT


def test_as_many_keys_as_the_limit_are_served(client: RawClient) -> None:
    namespace = client.open()
    client.send(frames.build_match(1, namespace, bytes(32 * KEYS_PER_FRAME)))
    client.answer(Verb.MATCHED)


@pytest.mark.parametrize("count", [0, 2])
def test_a_key_count_that_does_not_fit_the_body_ends_the_session(client: RawClient, count: int) -> None:
    namespace = client.open()
    body = frames.KEYS_HEAD.pack(namespace) + key(1)
    client.send(frames.build(Verb.MATCH, 1, body, count=count))
    assert client.goodbye()[0] in {Code.BAD_FRAME, Code.LIMIT}


def test_a_namespace_that_was_not_opened_here_ends_the_session(client: RawClient, daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as other:
        number = other.open(model="not-opened-by-the-first")
        client.send(frames.build_match(1, number, key(1)))
        assert client.goodbye()[0] is Code.BAD_NAMESPACE
        other.send(frames.build_match(1, number, key(1)))
        other.answer(Verb.MATCHED)


@pytest.mark.parametrize("block_bytes", [0, (8 << 20) + 1])
def test_a_block_size_of_nought_or_beyond_the_arena_is_a_typed_failure(client: RawClient, block_bytes: int) -> None:
    form = identity(4096).canonical().replace(struct.pack("<Q", 4096), struct.pack("<Q", block_bytes))
    client.send(frames.build(Verb.OPEN, 5, form))
    head, frame, _ = client.answer(Verb.FAILED)
    assert frames.parse_failure(frame, head)[0] is Code.BAD_ARGUMENT
    client.ping()


@pytest.mark.parametrize("form", [b"", b"kvstored namespace 1\n", os.urandom(300), bytes(1000)])
def test_a_malformed_identity_is_a_typed_failure(client: RawClient, form: bytes) -> None:
    client.send(frames.build(Verb.OPEN, 5, form))
    head, frame, _ = client.answer(Verb.FAILED)
    assert frames.parse_failure(frame, head)[0] is Code.BAD_ARGUMENT
    client.ping()


def test_an_invented_ticket_ends_the_session(client: RawClient) -> None:
    client.send(frames.build(Verb.COMMIT, 1, commits=[12345]))
    assert client.goodbye()[0] is Code.BAD_TICKET


def test_a_foreign_ticket_ends_the_session_that_used_it_and_not_its_owner(
    client: RawClient, daemon: DaemonProcess
) -> None:
    with raw_client(daemon.runtime_dir) as owner:
        (granted,) = owner.reserve(owner.open(), [os.urandom(32)])
        assert granted.grant == Grant.GRANTED
        client.send(frames.build_abort(1, [granted.ticket]))
        assert client.goodbye()[0] is Code.BAD_TICKET
        assert owner.commit([granted.ticket]) == 0


def test_a_reused_ticket_ends_the_session(client: RawClient) -> None:
    (granted,) = client.reserve(client.open(), [os.urandom(32)])
    assert client.commit([granted.ticket]) == 0
    client.send(frames.build(Verb.COMMIT, 9, commits=[granted.ticket]))
    assert client.goodbye()[0] is Code.BAD_TICKET


def test_a_tool_has_no_ring_and_cannot_store(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir, role=Role.TOOL) as tool:
        assert tool.welcome is not None
        assert tool.welcome.ring_bytes == 0
        assert [item.grant for item in tool.reserve(tool.open(), [os.urandom(32)])] == [Grant.QUOTA]


def test_descriptors_that_a_client_sends_are_not_kept(client: RawClient, daemon: DaemonProcess) -> None:
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    before = sum(1 for _ in folder.iterdir())
    for _ in range(64):
        try:
            client.send(frames.build(Verb.PING, 3, bytes(8)), fds=[0, 1, 2])
        except PermissionError:  # a kernel that can refuse them
            client.send(frames.build(Verb.PING, 3, bytes(8)))
        client.answer(Verb.PONG)
    assert sum(1 for _ in folder.iterdir()) <= before + 8  # other sessions come and go; 192 did not stay


def test_a_client_that_reads_nothing_is_told_to_go(client: RawClient) -> None:
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        _talk_without_listening(client)


def _talk_without_listening(client: RawClient) -> None:
    client.socket.setblocking(False)
    ping = frames.build(Verb.PING, 1, bytes(8))

    def fill() -> None:
        with suppress(BlockingIOError):
            while True:
                client.send(ping)

    until(fill)
