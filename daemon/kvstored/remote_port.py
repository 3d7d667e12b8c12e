"""What the remote tier asks of an engine for objects: few verbs, which may be as slow and as wrong as a network is.

Every verb blocks, on a thread of the remote tier's own, until it is done or its deadline is over; any thread may call,
several at a time. Nothing an engine answers is believed: names, lengths, headers and checksums are looked at by who
asked.

    most_blocks  what an object may hold. 1: names alone say what is there (`exists_many` is asked), so that an engine
                 without a listing does. More: objects are found by `listing`.
    name         ASCII letters, digits, `-`, `_`, `.` and `/`, at most `NAME_BYTES`
    object       written once and never changed: bytes under a name are always the same, whoever writes them first;
                 only one that is found damaged is written anew

    RemoteError
    +-- AbsentError       there is no such object
    +-- RefusedError      credentials, permissions or the clock are wrong: the same call will be refused again
    +-- FullError         there is no room for what is to be written
    +-- TooLargeError     no object of this engine may be so large; others go through
    `-- UnreachableError  down, cut off, slower than the deadline, or an answer that makes no sense
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

NAME_BYTES: Final = 900  # S3 takes 1,024; the rest is for a prefix in a bucket


class RemoteError(Exception):
    """Something remote did not work. Says what in a few words, never with credentials."""


class AbsentError(RemoteError):
    """There is no such object."""


class RefusedError(RemoteError):
    """Credentials, permissions or the clock are wrong."""


class FullError(RemoteError):
    """There is no room."""


class TooLargeError(RemoteError):
    """No object may be so large."""


class UnreachableError(RemoteError):
    """Down, cut off, too slow, or an answer that makes no sense."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing."""

    name: str
    object_bytes: int


class Backend(Protocol):
    """One engine for objects. Any thread; each call raises RemoteError within the deadline it was made with."""

    most_blocks: int

    def put(self, name: str, parts: Sequence[Bytes]) -> bool:
        """Write an object of these parts, one behind the other: all of it, or nothing. False: it was there already."""

    def replace(self, name: str, parts: Sequence[Bytes]) -> None:
        """As `put`, where what is there is damaged: it gives way."""

    def get_range(self, name: str, start: int, stop: int) -> Bytes:
        """Bytes `start..stop` of an object, read-only; fewer where it ends earlier. Raises AbsentError.

        Who sends more is not listened to: no more come into memory, and UnreachableError is raised.
        """

    def get_many(self, names: Sequence[str], object_bytes: int) -> "list[Bytes | None]":
        """Objects of at most so many bytes each, whole, in one request where the engine has that; None: it is gone.

        One that is larger may come as any bytes. Asked of engines with `most_blocks` 1.
        """

    def exists_many(self, names: Sequence[str]) -> list[bool]:
        """Which of these are there, in one round trip where the engine has that."""

    def delete(self, names: Sequence[str]) -> None:
        """Remove these; one that is not there is no error."""

    def listing(self, prefix: str, most: int) -> list[Listed]:
        """Objects whose names begin with `prefix` (whole, with it), in order of names, at most so many.

        An engine with `most_blocks` 1 may raise UnreachableError: what lists is not asked of it for looking up.
        """

    def close(self) -> None:
        """No further call comes; one that is running ends by itself."""
