"""The remote tier's port on object storage that speaks S3, by way of `obstore` (the extra `remote`).

Who we are is said as for every tool of S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, a web
identity, or what the machine's own metadata service hands out. Nothing of it is in the configuration.
"""

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Literal

import numpy as np

from kvstore.tier.remote_format import OBJECT_BLOCKS
from kvstored.remote_address import RemoteAddress
from kvstored.remote_port import (
    NAME_BYTES,
    AbsentError,
    Bytes,
    FullError,
    Listed,
    RefusedError,
    RemoteError,
    UnreachableError,
)

LISTED_AT_A_TIME: Final = 1000  # what S3 gives in one answer
LISTING_DEADLINES: Final = 1.25  # of all its pages together; the first one's own is told apart from that
REASON_LETTERS: Final = 200
STREAMED_BYTES: Final = 1 << 18  # of an answer at a time
_STATUS_403: Final = re.compile(r"status code: 40[13]\b")
_STATUS_416: Final = re.compile(r"status code: 416\b")
_STATUS_507: Final = re.compile(r"status code: 507\b")
_URL: Final = re.compile(r"(https?://[^\s/?]{1,100})\S*")
_ANSWER: Final = re.compile(r"status code: \d{3}(?: [A-Z][A-Za-z -]{1,40})?|Got invalid [\w ]{1,40} response")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
_CAUSE: Final = re.compile(r'message: "([^"\n]{1,60})"')  # what the system has said, innermost last


class S3Backend:
    """`kvstored.remote_port.Backend` on one bucket. Any thread."""

    most_blocks = OBJECT_BLOCKS

    def __init__(self, address: RemoteAddress, deadline_s: float, environ: dict[str, str] | None = None) -> None:
        """`deadline_s` bounds each request. `environ`: credentials for tests; None: the library looks for them.

        Raises RefusedError for an address that the library does not take.
        """
        from obstore.store import S3Store  # noqa: PLC0415  only where it is wanted

        client: dict[str, Any] = {
            "timeout": timedelta(seconds=deadline_s),
            "connect_timeout": timedelta(seconds=min(deadline_s, 2.0)),
            "allow_http": address.endpoint.startswith("http://"),
            "pool_idle_timeout": timedelta(seconds=30),
        }
        # Not every server that speaks S3 can delete many at once, and nobody waits.
        config: Any = {**(environ or {}), "disable_bulk_delete": True}
        if address.endpoint:
            config["endpoint"] = address.endpoint
        if address.region:
            config["region"] = address.region
        with _errors():
            self._store: S3Store = S3Store(
                address.bucket,
                prefix=address.prefix or None,
                config=config,
                client_options=client,  # type: ignore[arg-type]  # a dict that is put together here
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=deadline_s)},
            )
        self._listing_s = LISTING_DEADLINES * deadline_s

    def put(self, name: str, parts: Sequence[Bytes]) -> bool:
        """See the port."""
        return self._put(name, parts, "create")

    def replace(self, name: str, parts: Sequence[Bytes]) -> None:
        """See the port."""
        self._put(name, parts, "overwrite")

    def _put(self, name: str, parts: Sequence[Bytes], mode: Literal["create", "overwrite"]) -> bool:
        import obstore  # noqa: PLC0415

        with _errors(writing=True):
            try:
                content = parts[0] if len(parts) == 1 else np.concatenate(parts)
                obstore.put(self._store, name, memoryview(content), mode=mode, use_multipart=False)  # type: ignore[arg-type]
            except obstore.exceptions.AlreadyExistsError:
                return False
        return True

    def get_range(self, name: str, start: int, stop: int) -> Bytes:
        """See the port."""
        import obstore  # noqa: PLC0415

        read, read_bytes = np.empty(stop - start, dtype=np.uint8), 0
        with _errors():
            try:  # piece by piece: whoever sends more than was asked for is not listened to any longer
                for piece in obstore.get(self._store, name, options={"range": (start, stop)}).stream(STREAMED_BYTES):
                    if read_bytes + len(piece) > read.size:
                        raise UnreachableError("more bytes than were asked for")
                    read[read_bytes : read_bytes + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
                    read_bytes += len(piece)
            except obstore.exceptions.BaseError as error:
                if not _STATUS_416.search(str(error)):
                    raise  # or it ends before `start`
        read.flags.writeable = False
        return read[:read_bytes]

    def get_many(self, names: Sequence[str], object_bytes: int) -> "list[Bytes | None]":
        """See the port. One after the other: ranges of large objects are what is read here."""
        found: list[Bytes | None] = []
        for name in names:
            try:
                found.append(self.get_range(name, 0, object_bytes))
            except AbsentError:
                found.append(None)
        return found

    def exists_many(self, names: Sequence[str]) -> list[bool]:
        """See the port. One request each, one after the other: `listing` is how objects are found here."""
        return [self._exists(name) for name in names]

    def _exists(self, name: str) -> bool:
        import obstore  # noqa: PLC0415

        try:
            with _errors():
                obstore.head(self._store, name)
        except AbsentError:
            return False
        return True

    def delete(self, names: Sequence[str]) -> None:
        """See the port."""
        import obstore  # noqa: PLC0415

        for name in names:
            try:
                with _errors():
                    obstore.delete(self._store, name)
            except AbsentError:
                continue
            except TypeError:  # no path for the library: nothing can lie there
                continue

    def listing(self, prefix: str, most: int) -> list[Listed]:
        """See the port. A page is the library's: all of its bytes come into memory, however many a server sends."""
        with _errors(writing=True):  # what is not found is the bucket
            return asyncio.run(self._list(prefix, most))

    async def _list(self, prefix: str, most: int) -> list[Listed]:
        """A loop of its own: only so can the library be stopped while it follows pages in which nothing is."""
        import obstore  # noqa: PLC0415

        found: list[Listed] = []
        seen = 0
        try:
            async with asyncio.timeout(self._listing_s):
                async for chunk in obstore.list(
                    self._store, prefix.rstrip("/"), chunk_size=min(most, LISTED_AT_A_TIME)
                ):
                    seen += len(chunk)
                    found += [Listed(one["path"], one["size"]) for one in chunk if len(one["path"]) <= NAME_BYTES]
                    if seen >= most:
                        break
        except TimeoutError:
            raise UnreachableError("a listing that does not end") from None
        return found[:most]

    def close(self) -> None:
        """See the port."""


@contextmanager
def _errors(*, writing: bool = False) -> Iterator[None]:
    """What the library raises, as errors of the port."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError  # noqa: PLC0415

    try:
        yield
    except FileNotFoundError as error:
        if writing or "NoSuchBucket" in str(error):
            raise RefusedError("no such bucket") from error
        raise AbsentError(_reason(error)) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise _refused(str(error)) from error
    except BaseError as error:
        text = str(error)
        if "NoSuchBucket" in text:
            raise RefusedError("no such bucket") from error
        if _STATUS_403.search(text):  # of a listing
            raise _refused(text) from error
        if _STATUS_507.search(text) or _is_full(text):
            raise FullError("the far side says that it is full") from error
        raise UnreachableError(_reason(error)) from error
    except (OSError, ValueError) as error:
        raise UnreachableError(_reason(error)) from error


def _refused(text: str) -> RemoteError:
    if _is_full(text):
        return FullError("the far side says that it is full")
    why = "the clocks differ too much" if "RequestTimeTooSkewed" in text else "credentials or permissions"
    return RefusedError(f"refused: {why}")


def _is_full(text: str) -> bool:
    return "QuotaExceeded" in text or "StorageFull" in text


def _reason(error: Exception) -> str:
    """One line of what a library says, without what only its authors want to know."""
    said, _, inside = str(error).partition("\n\nDebug source:")
    text = _URL.sub(r"\1", " ".join(said.split()))  # names of objects are long, and what failed comes behind them
    answer = _ANSWER.search(text)
    if answer:  # some servers say there what they were sent, a session's token too
        text = ": ".join((text[: answer.end()], *_CODE.findall(text[answer.end() :])[:1]))
    cause = _CAUSE.findall(inside)
    text = f"{cause[-1]}: {text}"[:REASON_LETTERS] if cause else text[:REASON_LETTERS]
    return "".join(letter if letter.isprintable() else "?" for letter in text)  # some of it the far side has said
