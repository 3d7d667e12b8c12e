"""A small server that speaks enough of S3 for the remote tier, over a real socket, and misbehaves when told to.

PUT (If-None-Match), GET (Range), HEAD, DELETE, and ListObjectsV2 with a prefix. Who signs with another key, or an hour
off, is refused as S3 does it. Everything else is the library's own to get right.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

KEY_ID, SECRET = "kvstored-test", "not-a-secret"
SKEW = timedelta(minutes=15)


class S3Server:
    """One server with one bucket. A context manager; faults are attributes that may be set at any time."""

    bucket = "kv-test"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # method and name, or prefix
        self.room_bytes: int | None = None  # full beyond
        self.stalled = threading.Event()  # set: nobody is answered until it is cleared, or the server ends
        self.broken = False  # every request is a 500
        self.clock_off_s = 0.0
        self.listed_at_a_time = 1000
        self.endless = False  # every listing has nothing in it, and says that more is to come
        self.key_id = KEY_ID
        self.lies: Callable[[str, bytes], bytes] | None = None  # what is said in place of an object
        self._released = threading.Condition()
        self._ended = False
        self._server = _Quiet(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """Credentials that it takes."""
        return {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"}

    def count(self, method: str) -> int:
        """How many requests of a kind there were."""
        return sum(one == method for one, _ in self.requests)

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Nobody is answered meanwhile."""
        self.stalled.set()
        try:
            yield
        finally:
            self.stalled.clear()
            with self._released:
                self._released.notify_all()

    def flip(self, name: str, at: int) -> None:
        """Change one bit of an object."""
        content = bytearray(self.objects[name])
        content[at] ^= 1
        self.objects[name] = bytes(content)

    def wait(self) -> None:
        """On a handler's thread, while it is stalled."""
        with self._released:
            self._released.wait_for(lambda: self._ended or not self.stalled.is_set())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """It is down: its port is closed, and so is every connection."""
        if self._ended:
            return
        self._ended = True
        with self._released:
            self._released.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(_Handler):
            s3 = server

        return Handler


@contextmanager
def s3_for_daemons() -> Iterator[S3Server]:
    """One whose bucket every daemon that is started before the block ends may use."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environ.items():
            patch.setenv(name, value)
        yield server


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not wait any longer is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    s3: S3Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  its name there
        """Quiet."""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(30)

    def _refused(self) -> bool:
        s3 = self.s3
        if s3.stalled.is_set():
            s3.wait()
        if s3._ended:
            self.close_connection = True
            return True
        if s3.broken:
            self._fail(500, "InternalError")
            return True
        if not urlsplit(self.path).path.startswith(f"/{s3.bucket}"):
            self._fail(404, "NoSuchBucket")
            return True
        said = self.headers.get("Authorization", "")
        if f"Credential={s3.key_id}/" not in said:
            self._fail(403, "InvalidAccessKeyId")
            return True
        at = datetime.strptime(self.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        now = datetime.fromtimestamp(time.time() + s3.clock_off_s, UTC)
        if abs(now - at) > SKEW:
            self._fail(403, "RequestTimeTooSkewed")
            return True
        return False

    def _name(self) -> str:
        path = unquote(urlsplit(self.path).path)
        return path.removeprefix(f"/{self.s3.bucket}").lstrip("/")

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        name = self._name()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.s3.requests.append(("PUT", name))
        if self._refused():
            return
        used = sum(map(len, list(self.s3.objects.values())))
        if self.s3.room_bytes is not None and used + len(body) > self.s3.room_bytes:
            self._fail(507, "XMinioStorageFull")
            return
        if self.headers.get("If-None-Match") == "*" and name in self.s3.objects:
            self._fail(412, "PreconditionFailed")
            return
        self.s3.objects[name] = body
        self._answer(200, ETag=f'"{len(body)}"')

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        name = self._name()
        if not name or "list-type" in query:
            self._list(query)
            return
        self.s3.requests.append(("GET", name))
        if self._refused():
            return
        content = self.s3.objects.get(name)
        if content is None:
            self._fail(404, "NoSuchKey")
            return
        if self.s3.lies is not None:
            content = self.s3.lies(name, content)
        self._send(content)

    def _send(self, content: bytes) -> None:
        whole = len(content)
        said = self.headers.get("Range", "")
        facts = {"ETag": f'"{whole}"', "Last_Modified": "Sat, 21 Nov 2026 00:00:00 GMT"}
        if not said.startswith("bytes="):
            self._answer(200, content, **facts)
            return
        first, _, last = said.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(whole, int(last or whole - 1) + 1)
        if start >= whole:
            self._fail(416, "InvalidRange")
            return
        self._answer(206, content[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{whole}", **facts)

    def do_HEAD(self) -> None:
        name = self._name()
        self.s3.requests.append(("HEAD", name))
        if self._refused():
            return
        content = self.s3.objects.get(name)
        if content is None:
            self._answer(404)
            return
        self._answer(200, content, ETag='"0"', Last_Modified="Sat, 21 Nov 2026 00:00:00 GMT")

    def do_DELETE(self) -> None:
        name = self._name()
        self.s3.requests.append(("DELETE", name))
        if self._refused():
            return
        self.s3.objects.pop(name, None)
        self._answer(204)

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        self.s3.requests.append(("LIST", prefix))
        if self._refused():
            return
        most, after = int(query.get("max-keys", ["1000"])[0]), query.get("continuation-token", [""])[0]
        most = min(most, self.s3.listed_at_a_time)
        names = sorted(name for name in list(self.s3.objects) if name.startswith(prefix) and name > after)
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.s3.objects.get(name, b''))}</Size>"
            "<LastModified>2026-11-21T00:00:00.000Z</LastModified><ETag>&quot;0&quot;</ETag></Contents>"
            for name in names[:most]
        )
        more = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1])}</NextContinuationToken>" if more else ""
        if self.s3.endless:
            more, contents, token = True, "", f"<NextContinuationToken>{after}0</NextContinuationToken>"
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{self.s3.bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(names[:most])}</KeyCount>"
            f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}</ListBucketResult>"
        )
        self._answer(200, body.encode(), Content_Type="application/xml")
