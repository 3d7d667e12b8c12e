"""What the daemon and the index child say to each other: small messages, and bulk in memfds that travel with them.

    child -> daemon   PROGRESS  slots read, all slots              headers are being read
                      LOADED    where the JSON begins, its bytes   + memfd: records, then JSON; ends the start
                      FAILED    errno or 0, text                   there can be no index; ends the start
                      DONE      sequence                           the commit is durable
                      REFUSED   sequence, text                     the commit is not in the index
    daemon -> child   COMMIT    sequence, bytes                    + memfd: a packed Change

One SOCK_SEQPACKET message each, so that no half of one can be sent. Imports stay light: the child lives as long as the
daemon does.
"""

import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

TEXT_BYTES_MAX: Final = 2000
EXIT_DAMAGED: Final = 3  # of a child whose last REFUSED says what is wrong with the index

_HEAD: Final = struct.Struct("<IQQ")
_CHANGE: Final = struct.Struct("<QIIII")  # highest generation, chunks, bytes of a chunk, names, dropped
_LENGTH: Final = struct.Struct("<I")
CHUNK_KEY: Final = struct.Struct(">II")  # segment, chunk: in this order LMDB sorts them
NAME_KEY: Final = struct.Struct(">I")  # number


class Kind(IntEnum):
    """What a message says."""

    PROGRESS = 1
    LOADED = 2
    FAILED = 3
    COMMIT = 4
    DONE = 5
    REFUSED = 6


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Whoever received it closes `fd`, unless it is -1."""

    kind: Kind
    first: int = 0
    second: int = 0
    text: str = ""
    fd: int = -1


def send(link: socket.socket, message: Message) -> None:
    """Raises OSError if nobody listens any more. Does not close `fd`."""
    text = message.text.encode(errors="replace")[:TEXT_BYTES_MAX]
    packed = _HEAD.pack(message.kind, message.first, message.second) + text
    socket.send_fds(link, [packed], [message.fd] if message.fd >= 0 else [])


def receive(link: socket.socket) -> Message | None:
    """Wait for a message; None if the other side is gone."""
    try:
        packed, fds, _, _ = socket.recv_fds(link, _HEAD.size + TEXT_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    if not packed:
        return None
    kind, first, second = _HEAD.unpack_from(packed)
    text = packed[_HEAD.size :].decode(errors="replace")
    return Message(Kind(kind), first, second, text, fds[0] if fds else -1)


@dataclass(slots=True)
class Change:
    """What one transaction does to the index: packed keys, and values sealed by whoever made them."""

    highest: int = 0  # generation
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    names: list[tuple[bytes, bytes]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)  # segments: they go before chunks come

    @property
    def next_segment(self) -> int:
        """A number beyond all segments of which chunks come; 0 if none do."""
        return max((CHUNK_KEY.unpack(key)[0] + 1 for key, _ in self.chunks), default=0)

    def into_memfd(self) -> tuple[int, int]:
        """A new memfd with everything in it, and its length. Raises OSError."""
        chunk_bytes = len(self.chunks[0][1]) if self.chunks else 0
        assert all(len(value) == chunk_bytes for _, value in self.chunks)
        parts = [_CHANGE.pack(self.highest, len(self.chunks), chunk_bytes, len(self.names), len(self.dropped))]
        parts += [part for entry in self.chunks for part in entry]
        parts += [part for key, value in self.names for part in (key, _LENGTH.pack(len(value)), value)]
        parts += [_LENGTH.pack(segment) for segment in self.dropped]
        packed = b"".join(parts)
        fd = os.memfd_create("kvstored-commit", os.MFD_CLOEXEC)
        try:
            written = 0
            while written < len(packed):
                written += os.write(fd, memoryview(packed)[written:])
        except OSError:
            os.close(fd)
            raise
        return fd, len(packed)

    @classmethod
    def from_memfd(cls, fd: int, packed_bytes: int) -> "Change":
        """Read it back."""
        packed = os.pread(fd, packed_bytes, 0)
        while len(packed) < packed_bytes:
            packed += os.pread(fd, packed_bytes - len(packed), len(packed))
        highest, chunks, chunk_bytes, names, dropped = _CHANGE.unpack_from(packed)
        change = cls(highest)
        at = _CHANGE.size
        for _ in range(chunks):
            middle = at + CHUNK_KEY.size
            change.chunks.append((packed[at:middle], packed[middle : middle + chunk_bytes]))
            at = middle + chunk_bytes
        for _ in range(names):
            middle = at + NAME_KEY.size
            (value_bytes,) = _LENGTH.unpack_from(packed, middle)
            value_at = middle + _LENGTH.size
            change.names.append((packed[at:middle], packed[value_at : value_at + value_bytes]))
            at = value_at + value_bytes
        change.dropped = [_LENGTH.unpack_from(packed, at + 4 * number)[0] for number in range(dropped)]
        return change
