"""Calls to the far side, each behind a circuit breaker, counted and timed. Any thread.

Reading, writing and deleting have a breaker each: a bucket that is full, or may not be written to, can still be read,
and one that deletes badly can still be written.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from kvstore.tier.remote_breaker import Breaker, Circuit
from kvstore.tier.remote_format import is_ours
from kvstored.remote_port import (
    AbsentError,
    Backend,
    Bytes,
    FullError,
    Listed,
    RefusedError,
    RemoteError,
    TooLargeError,
    UnreachableError,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

STRANGE: Final = "an answer that is no object of ours"


class NotAskedError(UnreachableError):
    """A breaker is open: nothing was even sent."""


class StrangeError(UnreachableError):
    """What was said in place of an object does not even begin like one: it may say more of the far side than of it."""


@dataclass(slots=True)
class Calls:
    """Totals."""

    reads: int = 0  # requests, listings too
    writes: int = 0  # and deletes
    read_bytes: int = 0
    written_bytes: int = 0
    unreachable: int = 0
    refused: int = 0
    full: int = 0
    not_made: int = 0  # because a breaker was open


class FarSide:
    """A back-end that is asked with care."""

    def __init__(self, backend: Backend) -> None:
        self.most_blocks = backend.most_blocks
        self.tally = Calls()
        self.reading = Breaker()
        self.writing = Breaker()
        self.deleting = Breaker()
        self._backend = backend
        self._lock = threading.Lock()

    def can_read(self) -> bool:
        """Is there any use in reading? Takes no lock."""
        return self.reading.would_allow(time.monotonic_ns())

    def can_write(self) -> bool:
        """Is there any use in writing? Takes no lock."""
        return self.writing.would_allow(time.monotonic_ns())

    def can_delete(self) -> bool:
        """Is there any use in deleting? Takes no lock."""
        return self.deleting.would_allow(time.monotonic_ns())

    def get_range(self, name: str, start: int, stop: int) -> Bytes:
        """`Backend.get_range`. Raises RemoteError, UnreachableError where it was not even tried, StrangeError."""

        def ask() -> Bytes:
            content = self._backend.get_range(name, start, stop)
            if not start and _is_strange(content):
                raise StrangeError(STRANGE)
            return content

        content = self._call(self.reading, ask)
        with self._lock:
            self.tally.read_bytes += content.size
        return content

    def get_many(self, names: Sequence[str], object_bytes: int) -> "list[Bytes | None]":
        """`Backend.get_many`. Raises RemoteError, StrangeError where none of them is an object."""

        def ask() -> "list[Bytes | None]":
            objects = self._backend.get_many(names, object_bytes)
            found = [content for content in objects if content is not None]
            if found and all(map(_is_strange, found)):
                raise StrangeError(STRANGE)
            return objects

        objects = self._call(self.reading, ask)
        with self._lock:
            self.tally.read_bytes += sum(content.size for content in objects if content is not None)
        return objects

    def listing(self, prefix: str, most: int) -> list[Listed]:
        """`Backend.listing`. Raises RemoteError."""
        listed = self._call(self.reading, lambda: self._backend.listing(prefix, most))
        return [one for one in listed[:most] if one.name.startswith(prefix)]  # some are deleted: never another's

    def exists_many(self, names: Sequence[str]) -> list[bool]:
        """`Backend.exists_many`. Raises RemoteError."""
        return self._call(self.reading, lambda: self._backend.exists_many(names))

    def put(self, name: str, parts: Sequence[Bytes]) -> bool:
        """`Backend.put`. Raises RemoteError."""
        new = self._call(self.writing, lambda: self._backend.put(name, parts))
        with self._lock:
            self.tally.written_bytes += sum(part.size for part in parts) if new else 0
        return new

    def replace(self, name: str, parts: Sequence[Bytes]) -> None:
        """`Backend.replace`. Raises RemoteError."""
        self._call(self.writing, lambda: self._backend.replace(name, parts))
        with self._lock:
            self.tally.written_bytes += sum(part.size for part in parts)

    def delete(self, names: Sequence[str]) -> None:
        """`Backend.delete`. Raises RemoteError."""
        self._call(self.deleting, lambda: self._backend.delete(names))

    def close(self) -> None:
        """No more calls."""
        self._backend.close()

    def _call(self, breaker: Breaker, call: Callable[[], T]) -> T:
        with self._lock:
            if not breaker.allow(time.monotonic_ns()):
                self.tally.not_made += 1
                raise NotAskedError(f"not asked: {breaker.reason}")
            self.tally.reads += breaker is self.reading
            self.tally.writes += breaker is not self.reading
        try:
            answer = call()
        except (AbsentError, TooLargeError):  # that is an answer, or the far side was not even asked
            self._answered(breaker)
            raise
        except RemoteError as error:
            self._failed(breaker, error)
            raise
        except BaseException as error:  # a back-end that breaks its contract must not leave the breaker trying for ever
            self._failed(breaker, UnreachableError(type(error).__name__))
            raise
        self._answered(breaker)
        return answer

    def _answered(self, breaker: Breaker) -> None:
        with self._lock:
            was = breaker.state
            breaker.good()
        if was is not Circuit.CLOSED:
            log.info("remote: %s goes on", self._what(breaker))

    def _what(self, breaker: Breaker) -> str:
        return "reading" if breaker is self.reading else "writing" if breaker is self.writing else "deleting"

    def _failed(self, breaker: Breaker, error: RemoteError) -> None:
        lasting = isinstance(error, RefusedError | FullError)
        with self._lock:
            self.tally.refused += isinstance(error, RefusedError)
            self.tally.full += isinstance(error, FullError)
            self.tally.unreachable += isinstance(error, UnreachableError)
            was = breaker.state
            breaker.bad(str(error), time.monotonic_ns(), at_once=lasting)
        if was is Circuit.CLOSED and breaker.state is Circuit.OPEN:
            log.warning("remote: %s stops for a while: %s", self._what(breaker), error)


def _is_strange(content: Bytes) -> bool:
    """Nothing at all may be an object that was cut."""
    return content.size > 0 and not is_ours(content[:16].tobytes())
