"""A server that says more than it was asked for: neither into memory nor into logs."""

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from kvproto.limits import MIB
from kvstored.remote_address import RemoteAddress
from kvstored.remote_port import RemoteError, UnreachableError
from kvstored.remote_s3 import S3Backend
from tests.s3 import S3Server

CLOSE = b"Connection: close\r\nContent-Length: %d\r\n"
HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-%d/1000000000\r\n" + CLOSE
REFUSED = b"HTTP/1.1 400 Bad Request\r\n" + CLOSE + b"\r\n%b"
LISTED = b"HTTP/1.1 200 OK\r\n" + CLOSE + b"\r\n%b"
DATED = b'Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nETag: "a"\r\n\r\n'
TOKEN = b"TheTokenOfASession" * 4
ENVIRON = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}


@contextmanager
def saying(head: bytes, body_bytes: int = 0) -> Iterator[S3Backend]:
    """A backend of a server that answers this to whatever it is asked."""

    def answer(connection: socket.socket) -> None:
        piece = b"a" * 65536
        try:
            with connection:
                asked = b""
                while (some := connection.recv(65536)) and b"\r\n\r\n" not in (asked := asked + some):
                    continue
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
        yield S3Backend(address, 10.0, ENVIRON)
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


def test_names_that_are_too_long_to_be_ours_are_left_out_of_a_listing() -> None:
    with S3Server() as s3:
        backend = S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), 5.0, s3.environ)
        s3.objects |= {"k/v1/a": b"1", f"k/v1/{'b' * 1000}": b"2", "k/v1/c": b"3"}
        assert [one.name for one in backend.listing("v1/", 10)] == ["v1/a", "v1/c"]
