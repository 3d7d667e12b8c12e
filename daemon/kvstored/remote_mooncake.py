"""The remote tier's port on Mooncake Store: an object a block, found by its name.

Mooncake's client lives in a process of its own (`remote_mooncake_life.py`), since it may hang for half a minute, end
whoever runs it, or write into memory after it has said that it failed. Its package is found by the interpreter that the
address names, by default the daemon's own; kvstore/tier/REMOTE.md has what was found out about it.
"""

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvproto.limits import MIB, PAGE_BYTES
from kvstored.remote_mooncake_life import CLOSED, ChildRequest, Life
from kvstored.remote_mooncake_memory import Span
from kvstored.remote_port import AbsentError, Bytes, FullError, Listed, RemoteError, TooLargeError, UnreachableError

log = logging.getLogger(__name__)

REGION_BYTES: Final = 512 * MIB  # pages appear as they are used
OBJECT_BYTES: Final = 64 * MIB  # the largest that is written or read: four of them fit in beside what is lent
NAMES: Final = 64  # at a time: a message holds 128 KiB
PAUSE_S: Final = 1.0  # between two lives

OK: Final = 0
THERE: Final = 1
NO_ROOM: Final = -200
INVALID: Final = -600  # a get: the object is larger than the room
NOT_READY: Final = -703
NOT_FOUND: Final = -704
LEASE_EXPIRED: Final = -707
RPC_FAILED: Final = -900
RPC_TIMEOUT: Final = -901
NO_QUOTA: Final = -1700
ABSENT: Final = frozenset({NOT_FOUND, NOT_READY})
FULL: Final = frozenset({NO_ROOM, NO_QUOTA})
# Said before a transfer begins, or after it is over: nothing is written into the span after these.
NOTHING_COMES: Final = ABSENT | FULL | {INVALID, LEASE_EXPIRED, RPC_FAILED, RPC_TIMEOUT}
MEANS: Final = {
    INVALID: "refused as invalid", LEASE_EXPIRED: "slower than its lease", RPC_FAILED: "its master does not answer",
    RPC_TIMEOUT: "its master is too slow", -800: "a transfer failed", -1: "its client failed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MooncakeAddress:
    """Where its master is, and how this host is reached by the others. `host` empty: as the way to the master says."""

    master: str  # HOST:PORT
    protocol: str = "tcp"  # or rdma
    devices: str = ""  # of RDMA
    metadata: str = "P2PHANDSHAKE"
    host: str = ""
    python: str = sys.executable  # whose environment has the package


class MooncakeBackend:
    """`kvstored.remote_port.Backend` on one Mooncake Store. Any thread."""

    most_blocks = 1

    def __init__(
        self, address: MooncakeAddress, deadline_s: float, *, region_bytes: int = REGION_BYTES,
        object_bytes: int = OBJECT_BYTES, pause_s: float = PAUSE_S,
    ) -> None:  # fmt: skip
        """`deadline_s` bounds each call. Nothing is started before the first one, or `begin`."""
        self._address = address
        self._deadline_s = deadline_s
        self._region_bytes = region_bytes
        self._object_bytes = object_bytes
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._life: Life | None = None
        self._closed = False
        self.lives = 0

    def begin(self) -> None:
        """Have the client set up before the first call. Never raises: that call says what is wrong."""
        try:
            self._alive()
        except RemoteError as error:
            log.warning("remote: %s", error)

    @property
    def pid(self) -> int:
        """Of the process that has Mooncake's client; 0: there is none."""
        life = self._life
        return life.pid if life is not None and not life.over else 0

    def replace(self, name: str, parts: Sequence[Bytes]) -> None:
        """See the port. Mooncake keeps what is there, so that goes first."""
        self.delete([name])
        self.put(name, parts)

    def put(self, name: str, parts: Sequence[Bytes]) -> bool:
        """See the port. Not atomic against another writer of the same name, whose bytes are the same ones."""
        size, until_s = sum(part.size for part in parts), self._until_s()
        if size > self._object_bytes:
            raise TooLargeError(f"{size} bytes are more than an object may have")
        life = self._alive()
        span = self._span(life, size, until_s)
        at = 0
        for part in parts:
            span.bytes[at : at + part.size] = part
            at += part.size
        code = self._ask(life, span, until_s, do="put", name=name, at=span.at, size=size)
        if code in FULL:
            raise FullError("Mooncake has no room")
        if code not in {OK, THERE}:
            raise UnreachableError(_meaning(code))
        return code == OK

    def get_range(self, name: str, start: int, stop: int) -> Bytes:
        """See the port. Mooncake reads objects whole, so a part of one costs as much as all of it."""
        until_s = self._until_s()
        life = self._alive()
        room = min(max(stop, 1), self._object_bytes)
        for _ in range(2):
            span = self._span(life, room, until_s)
            length = self._ask(life, span, until_s, kept=True, do="get", name=name, at=span.at, room=span.size)
            if length >= 0:
                return span.lend(min(start, length), min(stop, length))
            if length in ABSENT:
                raise AbsentError(name)
            if length != INVALID:
                raise UnreachableError(_meaning(length))
            room = life.ask(until_s, do="size", name=name)
            if room in ABSENT:
                raise AbsentError(name)
            if not span.size < room <= self._object_bytes:
                break
        raise UnreachableError(f"an object of {room} bytes cannot be read")

    def get_many(self, names: Sequence[str], object_bytes: int) -> "list[Bytes | None]":
        """See the port. A message, a batch of Mooncake's and a span for so many objects at a time."""
        room = -(-object_bytes // PAGE_BYTES) * PAGE_BYTES
        if object_bytes > self._object_bytes:
            raise TooLargeError(f"{object_bytes} bytes are more than an object may have")
        until_s, found = self._until_s(), list[Bytes | None]()
        life = self._alive()
        for at in range(0, len(names), NAMES):
            found += self._get_batch(life, list(names[at : at + NAMES]), room, until_s)
        return found

    def _get_batch(self, life: Life, names: list[str], room: int, until_s: float) -> "list[Bytes | None]":
        span = self._span(life, len(names) * room, until_s)
        try:
            lengths = life.ask(until_s, do="get_many", names=names, at=span.at, room=room)
        except RemoteError:
            if not life.over:  # nothing was begun; otherwise it is lost with its life
                span.free()
            raise
        good = isinstance(lengths, list) and len(lengths) == len(names)
        if not good or any(not isinstance(length, int) or length > room for length in lengths):
            reason = MEANS[-1] if lengths == -1 else "an answer that makes no sense"
            life.end(reason)
            raise UnreachableError(reason)
        for code in lengths:
            if code < 0 and code not in NOTHING_COMES:
                life.end(_meaning(code))
                raise UnreachableError(_meaning(code))
        for code in lengths:
            if code < 0 and code not in ABSENT | {INVALID}:
                span.free()
                raise UnreachableError(_meaning(code))
        lent = span.lend(0, len(names) * room)
        return [
            None if length in ABSENT else lent[number * room : number * room + max(0, length)]  # too large: of no bytes
            for number, length in enumerate(lengths)
        ]

    def exists_many(self, names: Sequence[str]) -> list[bool]:
        """See the port."""
        life, until_s, found = self._alive(), self._until_s(), list[int]()
        for at in range(0, len(names), NAMES):
            some = list(names[at : at + NAMES])
            found += self._codes(life.ask(until_s, do="exists", names=some), len(some))
        for code in found:
            if code < 0 and code not in ABSENT:
                raise UnreachableError(_meaning(code))
        return [code == THERE for code in found]

    def delete(self, names: Sequence[str]) -> None:
        """See the port."""
        life = self._alive()
        for at in range(0, len(names), NAMES):
            some = list(names[at : at + NAMES])
            for code in self._codes(life.ask(self._until_s(), do="delete", names=some), len(some)):
                if code != OK and code not in ABSENT:
                    raise UnreachableError(_meaning(code))

    def listing(self, prefix: str, most: int) -> list[Listed]:
        """See the port."""
        raise UnreachableError(f"Mooncake lists nothing, not the first {most} names under {prefix!r} either")

    def close(self) -> None:
        """See the port."""
        with self._lock:
            self._closed = True
            if self._life is not None:
                self._life.end(CLOSED)

    # -- below -------------------------------------------------------------------------------------------------

    def _until_s(self) -> float:
        return time.monotonic() + self._deadline_s

    def _alive(self) -> Life:
        """One that may answer. Raises UnreachableError, RefusedError."""
        with self._lock:
            life = self._life
            if self._closed:
                raise UnreachableError(CLOSED)
            if life is None or (life.over and time.monotonic() >= life.began_s + self._pause_s):
                address = self._address
                request = ChildRequest(
                    address.python, address.master, address.host, address.metadata,
                    address.protocol, address.devices, self._deadline_s, self._region_bytes, self._object_bytes,
                )  # fmt: skip
                try:
                    life = self._life = Life(request)
                except OSError as error:
                    raise UnreachableError(f"no memory for its client: {error.strerror}") from error
                self.lives += 1
            return life

    def _span(self, life: Life, size: int, until_s: float) -> Span:
        span = life.region.take(size, until_s)
        if span is None:
            raise UnreachableError("all memory for it is in use")
        return span

    def _ask(self, life: Life, span: Span, until_s: float, *, kept: bool = False, **call: str | int) -> int:
        """A call that uses a span, which is free afterwards, or lost. `kept`: good answers leave it to the caller."""
        try:
            code = life.ask(until_s, **call)
        except RemoteError:
            if not life.over:  # nothing was begun; otherwise it is lost with its life
                span.free()
            raise
        if not isinstance(code, int) or code > span.size:
            life.end("an answer that makes no sense")
            raise UnreachableError("an answer that makes no sense")
        if code < 0 and code not in NOTHING_COMES:
            life.end(_meaning(code))
        elif code < 0 or not kept:
            span.free()
        return code

    def _codes(self, answer: object, count: int) -> list[int]:
        if isinstance(answer, list) and len(answer) == count and all(isinstance(code, int) for code in answer):
            return answer
        raise UnreachableError("an answer that makes no sense" if answer != -1 else MEANS[-1])


def _meaning(code: int) -> str:
    return f"{MEANS.get(code, 'failed')} ({code})"
