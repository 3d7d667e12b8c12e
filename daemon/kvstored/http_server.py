"""A few pages over HTTP/1.1, for programs that watch: GET and HEAD, one request a connection.

    accept -> head within 5 s and 8 KiB -> page -> answer within 10 s -> close

A connection holds at most two heads of memory and no thread. There are at most `CONNECTIONS`; one more, and the oldest
that has not been heard out goes, so that connections which say nothing keep nobody away. All of it runs on one thread's
asyncio loop.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

log = logging.getLogger(__name__)

HEAD_BYTES: Final = 8192
CONNECTIONS: Final = 64
HEAD_S: Final = 5.0  # from the first look at a connection to the end of its head, however slowly it comes
ANSWER_S: Final = 10.0
TEXT: Final = "text/plain; charset=utf-8"
_END: Final = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Page:
    """One answer."""

    status: HTTPStatus
    body: bytes
    kind: str = TEXT


Pages = Mapping[str, Callable[[], Page]]


class HttpServer:
    """Serves pages by path. One asyncio loop's."""

    def __init__(self, pages: Pages) -> None:
        """Pages are made when they are asked for, and must not wait for anything."""
        self.refused = 0  # requests that were none, or did not come in time
        self._pages = pages
        self._unheard: dict[asyncio.StreamWriter, None] = {}  # in the order in which they came
        self._open = 0

    async def listen(self, listener: socket.socket) -> asyncio.Server:
        """Serve a socket that is bound."""
        if listener.family == socket.AF_UNIX:
            return await asyncio.start_unix_server(self._connected, sock=listener, limit=HEAD_BYTES)
        return await asyncio.start_server(self._connected, sock=listener, limit=HEAD_BYTES)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS:
            self._turn_away(writer)
        self._open += 1
        self._unheard[writer] = None
        try:
            page, whole = await self._answer(reader)
            self._unheard.pop(writer, None)
            if page is not None:
                writer.write(_head(page) + (page.body if whole else b""))
                async with asyncio.timeout(ANSWER_S):
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (OSError, TimeoutError):
            self.refused += 1
        finally:
            self._unheard.pop(writer, None)
            self._open -= 1
            writer.transport.abort()

    def _turn_away(self, newest: asyncio.StreamWriter) -> None:
        """There are too many: the oldest that has not been heard out; the newest, if all have been."""
        oldest = next(iter(self._unheard), newest)
        self._unheard.pop(oldest, None)
        oldest.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Page | None, bool]:
        """A page, and whether its body is wanted; None: nobody is there any more."""
        try:
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(_END)
        except asyncio.IncompleteReadError:
            return None, False
        except asyncio.LimitOverrunError:
            page = _said(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except TimeoutError:
            page = _said(HTTPStatus.REQUEST_TIMEOUT)
        else:
            return self._asked(head)
        self.refused += 1
        return page, True

    def _asked(self, head: bytes) -> tuple[Page, bool]:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or words[2] not in (b"HTTP/1.0", b"HTTP/1.1") or not words[1].startswith(b"/"):
            self.refused += 1
            return _said(HTTPStatus.BAD_REQUEST), True
        if words[0] not in (b"GET", b"HEAD"):
            return _said(HTTPStatus.METHOD_NOT_ALLOWED), True
        make, whole = self._pages.get(words[1].split(b"?", 1)[0].decode("latin-1")), words[0] == b"GET"
        if make is None:
            return _said(HTTPStatus.NOT_FOUND), whole
        try:
            return make(), whole
        except Exception:  # one page with a bug must not take the others along
            log.exception("a page could not be made")
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR), whole


def _said(status: HTTPStatus) -> Page:
    return Page(status, f"{status.phrase}\n".encode())


def _head(page: Page) -> bytes:
    lines = [
        f"HTTP/1.1 {page.status.value} {page.status.phrase}",
        f"Content-Type: {page.kind}",
        f"Content-Length: {len(page.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(["Allow: GET, HEAD"] if page.status is HTTPStatus.METHOD_NOT_ALLOWED else []),
        "Connection: close",
    ]
    return "\r\n".join(lines).encode() + _END
