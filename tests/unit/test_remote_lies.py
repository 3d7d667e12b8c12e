"""A server that says more than it was asked for: neither into memory nor into logs."""

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from kvproto.limits import MIB
from kvstore.tier.remote_breaker import FAILURES, Circuit
from kvstored.remote_address import RemoteAddress
from kvstored.remote_port import RemoteError, UnreachableError
from kvstored.remote_s3 import S3Backend
from tests.core import chain
from tests.node import PATIENCE_S
from tests.s3 import S3Server
from tests.unit.remote_kit import kit

CLOSE = b"Connection: close\r\nContent-Length: %d\r\n"
HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-%d/1000000000\r\n" + CLOSE
REFUSED = b"HTTP/1.1 400 Bad Request\r\n" + CLOSE + b"\r\n%b"
LISTED = b"HTTP/1.1 200 OK\r\n" + CLOSE + b"\r\n%b"
DATED = b'Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nETag: "a"\r\n\r\n'
TOKEN = b"TheTokenOfASession" * 4
DEADLINES_S = (0.2, 2.0, 10.0)  # the next one where a machine is so busy that the last one shows nothing
ENVIRON = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


@contextmanager
def saying(
    head: bytes, body_bytes: int = 0, heard: list[bytes] | None = None, environ: dict[str, str] | None = None
) -> Iterator[S3Backend]:  # fmt: skip
    """A backend of a server that answers this to whatever it is asked. `heard`: heads of the requests."""

    def answer(connection: socket.socket) -> None:
        piece = b"a" * 65536
        try:
            with connection:
                asked = b""
                while (some := connection.recv(65536)) and b"\r\n\r\n" not in (asked := asked + some):
                    continue
                if heard is not None:
                    heard.append(asked.partition(b"\r\n\r\n")[0].lower())
                connection.sendall(head)
                for at in range(0, body_bytes, len(piece)):
                    connection.sendall(piece[: body_bytes - at])
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    continue
        except OSError:
            pass  # it is not listened to any longer

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.settimeout(30)
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    server = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    address = RemoteAddress("s3", "bucket", "k", f"http://127.0.0.1:{server.getsockname()[1]}")
    try:
        yield S3Backend(address, 10.0, environ or ENVIRON)
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def test_more_bytes_than_were_asked_for_do_not_come_into_memory() -> None:
    big = 512 * MIB
    with saying(HEAD % (4095, big) + DATED, big) as backend:
        before = peak_bytes()
        with pytest.raises(UnreachableError, match="more bytes than were asked for"):
            backend.get_range("v1/x", 0, 4096)
        assert peak_bytes() - before < 64 * MIB
    with saying(HEAD % (4095, 4096) + DATED, 4096) as backend:
        got = backend.get_range("v1/x", 0, 4096)
        assert got.tobytes() == b"a" * 4096, "the control"
        assert not got.flags.writeable
    with saying(HEAD % (2 * MIB - 1, 2 * MIB) + DATED, 2 * MIB) as backend:
        assert backend.get_range("v1/x", 0, 2 * MIB).size == 2 * MIB, "in several pieces"


def test_of_what_a_server_says_only_its_code_is_told() -> None:
    for body in (
        b"<Error><Code>ExpiredToken</Code><Token-0>%b</Token-0></Error>" % TOKEN,
        b'<?xml version="1.0"?>\n<Error><Token-0>%b</Token-0><Code>ExpiredToken</Code></Error>' % TOKEN,
        b"<Error><Code>Expired Token %b</Code></Error>" % TOKEN,
        TOKEN,
    ):
        with saying(REFUSED % (len(body), body)) as backend:
            for call in (
                partial(backend.get_range, "v1/x", 0, 10),
                partial(backend.put, "v1/x", [np.zeros(4, dtype=np.uint8)]),
                partial(backend.listing, "v1/", 10),
            ):
                with pytest.raises(RemoteError) as raised:
                    call()
                said = str(raised.value)
                assert "400 Bad Request" in said
                assert ("ExpiredToken" in said) == (b"<Code>ExpiredToken</Code>" in body)
                assert TOKEN[:4].decode() not in said
    with saying(LISTED % (len(TOKEN), TOKEN)) as backend:
        with pytest.raises(RemoteError) as raised:
            backend.listing("v1/", 10)
        assert TOKEN[:4].decode() not in str(raised.value)


def test_a_listing_of_empty_pages_that_never_ends_costs_a_deadline_and_no_more() -> None:
    with S3Server() as s3:
        address = RemoteAddress("s3", s3.bucket, "k", s3.endpoint)
        backend = S3Backend(address, PATIENCE_S, s3.environ)
        s3.objects |= {f"k/v1/{number}": b"1" for number in range(7)}
        s3.listed_at_a_time = 2
        assert len(backend.listing("v1/", 100)) == 7, "the control: four pages"
        assert s3.count("LIST") == 4
        assert len(backend.listing("v1/", 3)) == 3
        s3.endless = True
        for deadline_s in DEADLINES_S:
            before, began = s3.count("LIST"), time.monotonic()
            with pytest.raises(UnreachableError) as raised:
                S3Backend(address, deadline_s, s3.environ).listing("v1/", 100)
            assert time.monotonic() - began < 10 * deadline_s + 5.0
            if "does not end" in str(raised.value) and s3.count("LIST") > before + 2:
                break
        assert "does not end" in str(raised.value)
        asked = s3.count("LIST")
        assert asked > 8, "it went on for a while"
        backend.exists_many(["v1/0"] * asked)  # takes as long as so many pages would
        assert s3.count("HEAD") == asked
        assert s3.count("LIST") <= asked + 1, "and then no longer"
        s3.endless = False
        assert len(backend.listing("v1/", 100)) == 7


def test_a_far_side_whose_listings_never_end_is_left_alone_and_heals() -> None:
    for deadline_s in DEADLINES_S:
        with S3Server() as s3, kit(s3, deadline_s=deadline_s) as one:
            s3.endless = True
            for number in range(FAILURES):
                assert one.seek(chain(2, str(number))) == []
            assert one.far.reading.opened == 1
            ended = "does not end" in one.far.reading.reason
            s3.endless = False
            one.far.reading.until_ns = 0
            if ended and one.keep(chain(3)).stored == 3:
                assert one.far.reading.state is Circuit.CLOSED
                return
    raise AssertionError(one.far.reading.reason)


def test_who_is_redirected_to_hears_names_and_a_token_but_no_key_no_signature_and_no_block() -> None:
    """What SECURITY.md says: the library follows, and has no setting that refuses it."""
    elsewhere: list[bytes] = []
    with saying(LISTED % (0, b""), heard=elsewhere) as other:
        there = other._store.config["endpoint"]
        head = (
            b"HTTP/1.1 307 Temporary Redirect\r\nLocation: %b/bucket/k/v1/x\r\n" % there.encode() + CLOSE % 0 + b"\r\n"
        )
        asked: list[bytes] = []
        with saying(head, heard=asked, environ=ENVIRON | {"AWS_SESSION_TOKEN": TOKEN.decode()}) as backend:
            with pytest.raises(RemoteError):
                backend.put("v1/x", [np.zeros(100_000, dtype=np.uint8)])
            assert not elsewhere, "a block would have gone there"
            for call in (partial(backend.get_range, "v1/x", 0, 10), partial(backend.listing, "v1/", 10)):
                with pytest.raises(RemoteError):
                    call()
            backend.delete(["v1/x"])
    assert len(elsewhere) == 3
    assert all(b"\r\nauthorization:" in request for request in asked), "the control"
    assert not any(b"authorization" in request or b"signature" in request for request in elsewhere)
    assert all(TOKEN.lower() in request for request in elsewhere), (
        "it does not go there any more: say so in SECURITY.md"
    )


def test_names_that_are_too_long_to_be_ours_are_left_out_of_a_listing() -> None:
    with S3Server() as s3:
        backend = S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ)
        s3.objects |= {"k/v1/a": b"1", f"k/v1/{'b' * 1000}": b"2", "k/v1/c": b"3"}
        assert [one.name for one in backend.listing("v1/", 10)] == ["v1/a", "v1/c"]
