"""HTTP from strangers: each is answered or sent away, and none keeps the others waiting."""

import asyncio
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http import HTTPStatus
from pathlib import Path

import pytest

from kvstored import http_server
from kvstored.http_server import CONNECTIONS, HEAD_BYTES, HttpServer, Page

PATIENCE_S = 20.0
BODY = b"kvstored_serving 1\n" * 40_000  # more than sockets hold


def broken() -> Page:
    raise RuntimeError("a bug")


class Served:
    """A server on a thread, as it is in the daemon."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(128)
        self.listener.setblocking(False)
        self.server = HttpServer(
            {
                "/metrics": lambda: Page(HTTPStatus.OK, BODY),
                "/ok": lambda: Page(HTTPStatus.OK, b"ok\n"),
                "/bug": broken,
            }
        )
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        listening = await self.server.listen(self.listener)
        self._ready.set()
        await self._end.wait()
        listening.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.listener.close()

    def connect(self) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(self.path))
        connected.settimeout(PATIENCE_S)
        return connected

    def ask(self, request: bytes) -> bytes:
        """All that is answered, to the end."""
        with self.connect() as connected:
            connected.sendall(request)
            return read_all(connected)


def read_all(connected: socket.socket) -> bytes:
    """Until the other side closes, or resets the connection."""
    heard = b""
    while True:
        try:
            piece = connected.recv(1 << 16)
        except ConnectionResetError:
            return heard
        if not piece:
            return heard
        heard += piece


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in ("HEAD_S", "ANSWER_S"):
        monkeypatch.setattr(http_server, name, 10 * PATIENCE_S)  # nobody is sent away because a machine stands still
    one = Served(tmp_path / "s")
    yield one
    one.close()


def get(target: str, method: str = "GET") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


def test_a_page_comes_whole_with_its_length(served: Served) -> None:
    head, _, body = served.ask(get("/metrics")).partition(b"\r\n\r\n")
    assert body == BODY
    assert f"Content-Length: {len(BODY)}".encode() in head
    assert served.ask(get("/metrics?format=text")).endswith(BODY), "what follows the path is of no concern"
    head, _, body = served.ask(get("/metrics", "HEAD")).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(BODY)}".encode() in head
    assert body == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (get("/none"), 404),
        (get("/../etc/passwd"), 404),
        (get("/metrics", "POST"), 405),
        (get("/bug"), 500),
        (b"\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", 400),
        (b"GET /\xff\xfe HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10 * HEAD_BYTES, 431),
        (b"G" * 100 * HEAD_BYTES, 431),
    ],
)
def test_a_bad_request_is_told_so_and_harms_nobody(served: Served, request_bytes: bytes, status: int) -> None:
    with served.connect() as connected:
        try:
            connected.sendall(request_bytes)
            answer = read_all(connected)
        except (BrokenPipeError, ConnectionResetError):  # it was closed while we were still talking
            answer = b""
    assert status_of(answer) in ({status, 0} if status == 431 else {status})
    assert status_of(served.ask(get("/ok"))) == 200


def test_a_head_that_comes_drop_by_drop_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_S", 0.05)
    with served.connect() as connected:
        sent = 0
        with suppress(BrokenPipeError, ConnectionResetError):  # it was closed while we were still talking
            for letter in b"GET /ok HTTP/1.1\r\n" + b"X: y\r\n" * 100_000:
                if select.select([connected], [], [], 0.01)[0]:
                    break
                connected.sendall(bytes([letter]))
                sent += 1
            assert status_of(read_all(connected)) in {408, 0}
        assert sent < 1000, "every drop would have given it more time"


def test_connections_that_say_nothing_keep_nobody_away(served: Served) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(served.connect()) for _ in range(3 * CONNECTIONS)]
        assert status_of(served.ask(get("/ok"))) == 200
        assert served.ask(get("/metrics")).endswith(BODY)
        gone = sum(bool(select.select([one], [], [], 0)[0]) and not read_all(one) for one in idle)
        assert gone >= 2 * CONNECTIONS
        assert gone < len(idle), "only so many as had to"


def test_one_who_does_not_read_its_answer_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_S", 0.05)
    with ExitStack() as stack:
        deaf = [stack.enter_context(served.connect()) for _ in range(8)]
        for one in deaf:
            one.sendall(get("/metrics"))
        assert until(lambda: served.server.refused >= len(deaf))
        assert status_of(served.ask(get("/ok"))) == 200
        assert all(len(read_all(one)) < len(BODY) for one in deaf)


def until(condition: Callable[[], bool]) -> bool:
    event = threading.Event()
    return any(condition() or event.wait(0.01) for _ in range(int(PATIENCE_S * 100)))
