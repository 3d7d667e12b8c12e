"""The hot frames: fixed little-endian structures in SEQPACKET messages. WIRE.md draws every byte.

Building and parsing only; no sockets. Everything that comes from a peer goes through `parse_*`, which check
each length before anything is allocated and raise ProtocolError. Any thread.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from kvproto.errors import Code, LimitError, ProtocolError, UnknownVerbError
from kvproto.limits import (
    FIELD_BYTES,
    FRAME_BYTES,
    KEY_BYTES,
    KEYS_PER_FRAME,
    MATCHES_PER_FRAME,
    NAME_BYTES,
    NAMESPACES_PER_MATCH,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_OLDEST,
    RIDERS_PER_FRAME,
)

HEAD: Final = struct.Struct("<BBHIHHI")  # verb, flags, count, request, releases, commits, body bytes
HEAD_BYTES: Final = HEAD.size  # 16: bodies stay aligned to 8
RIDER_BYTES: Final = 8

HELLO_HEAD: Final = struct.Struct("<HHBBHQ")  # version low, high, role, modes, pad, ring bytes wished
WELCOME_HEAD: Final = struct.Struct(
    "<HBBIQQQQQ"
)  # version, mode, pad, keys a frame, session, clock, ring, ttl max, ticket ttl
KEYS_HEAD: Final = struct.Struct("<I4x")  # namespace (MATCH, DELETE)
MATCH_ALL_HEAD: Final = struct.Struct("<I4x")  # how many namespaces; then these (u32, filled up to 8 bytes), then keys
MATCH_FRAME: Final = struct.Struct("<BBHIHHII4x")  # HEAD and KEYS_HEAD in one
LEASE_HEAD: Final = struct.Struct("<I4xQQ")  # namespace, lease ttl ns, wait ns
RESERVE_HEAD: Final = struct.Struct("<II32s")  # namespace, recompute us a block (0: unknown), parent key
RENEW_BODY: Final = struct.Struct("<QQ")  # lease, ttl ns
CLOCK_BODY: Final = struct.Struct("<Q")
OPENED_BODY: Final = struct.Struct("<I4xQ")  # namespace, slot bytes
MATCHED_BODY: Final = struct.Struct("<IIIIQQ")  # hbm, dram, disk, pending, load ns, recompute ns
LEASED_HEAD: Final = struct.Struct("<QQI4x")  # lease, deadline ns, blocks that will come by READY
READY_HEAD: Final = struct.Struct("<QQII")  # lease, deadline ns, blocks still to come, how many of these lay on disk
LOCATION: Final = struct.Struct("<II")  # arena, slot
RESERVED_ITEM: Final = struct.Struct("<IIQ")  # grant, page in the ring, ticket
PUBLISHED_ITEM: Final = struct.Struct("<QQ")  # ticket, outcome
ARENA_ITEM: Final = struct.Struct("<I4xQ")  # arena, bytes; one fd each
FLUSH_BODY: Final = struct.Struct("<IIQ")  # namespace, pad, wait ns
DURABLE_BODY: Final = struct.Struct("<IIII")  # durable, failed, evicted, pending
NUMBER_BODY: Final = struct.Struct("<I4x")  # an arena, a count
CODE_HEAD: Final = struct.Struct("<H")  # code, then text
TEXT_LENGTH: Final = struct.Struct("<H")

RECOMPUTE_US_MAX: Final = (1 << 32) - 1  # what RESERVE has room for: 71 minutes a block
UNKNOWN_NS: Final = (1 << 64) - 1  # an estimate that nobody has the figures for yet


class Verb(IntEnum):
    """What a frame says. Numbers are never reused; 128 and above come from the daemon."""

    HELLO = 1
    OPEN = 2
    MATCH = 3
    LEASE = 4
    RELEASE = 5
    RENEW = 6
    RESERVE = 7
    COMMIT = 8
    ABORT = 9
    DELETE = 10
    PING = 11
    ARENA_DROPPED = 12
    FLUSH = 13
    PIN = 14
    UNPIN = 15
    PINS = 16
    PREFETCH = 17
    CANCEL = 18
    HINT = 19
    REPORT = 20
    ADVISE = 21
    MATCH_ALL = 22
    ATTACH = 23  # this and what follows: mode daemon alone (device_frames.py)
    DETACH = 24
    LOAD = 25
    SAVE = 26
    CANCEL_TRANSFER = 27

    WELCOME = 128
    OPENED = 129
    MATCHED = 130
    LEASED = 131
    RENEWED = 132
    RESERVED = 133
    COMMITTED = 134
    DELETED = 135
    PONG = 136
    FAILED = 137
    DURABLE = 138
    PINNED = 139
    UNPINNED = 140
    PIN_LIST = 141
    FETCHING = 142
    ADVISED = 143
    PUBLISHED = 144
    ARENA = 145
    ARENA_GONE = 146
    GOAWAY = 147
    READY = 148
    REFUSED = 149
    ATTACHED = 150
    DETACHED = 151
    MOVING = 152
    LOADED = 153
    SAVED = 154
    CANCELLED = 155


class Flag(IntEnum):
    """Bits of the head's flags."""

    HAS_PARENT = 1  # RESERVE: the parent field counts
    WANTS_ANSWER = 2  # COMMIT: answer COMMITTED
    REFRESH = 4  # PIN: a use of the last block moves the deadline
    WRITABLE = 8  # ARENA: to be mapped writable, for the slots of RESERVED in mode direct


class Role(IntEnum):
    """Who a session is. Tools get no ring and cannot store."""

    ENGINE = 0
    TOOL = 1


class Mode(IntEnum):
    """Who copies the bytes, and by which way; WIRE.md says what each means."""

    COPY = 0
    DIRECT = 1
    DAEMON = 2
    RING = 3


class Head(NamedTuple):
    """The first 16 bytes of a frame, with where its parts lie."""

    verb: int
    flags: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    request: int
    releases: int
    commits: int
    body_bytes: int

    @property
    def body(self) -> int:
        """Offset of the body in bytes."""
        return HEAD_BYTES + RIDER_BYTES * (self.releases + self.commits)


@dataclass(frozen=True, slots=True)
class Hello:
    """A client introduces itself."""

    name: str
    tenant: str = ""  # empty: the one that the daemon's configuration gives this user
    role: Role = Role.ENGINE
    modes: tuple[Mode, ...] = (Mode.COPY,)
    ring_bytes: int = 0  # 0: the daemon's default
    version_low: int = PROTOCOL_VERSION_OLDEST
    version_high: int = PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Welcome:
    """The daemon accepts a session. Clock and durations in nanoseconds of CLOCK_MONOTONIC."""

    version: int
    mode: Mode
    session: int
    clock_ns: int
    ring_bytes: int
    lease_ttl_ns_max: int
    ticket_ttl_ns: int
    keys_per_frame: int
    tenant: str
    notes: str  # why the other modes were not chosen


class Matched(NamedTuple):
    """Lead run by tier, then how many blocks after it are on their way."""

    hbm: int
    dram: int
    disk: int
    pending: int
    load_ns: int
    recompute_ns: int


NOTHING_MATCHED: Final = Matched(0, 0, 0, 0, UNKNOWN_NS, UNKNOWN_NS)
_NOTHING_MATCHED: Final = MATCHED_BODY.pack(*NOTHING_MATCHED)


class Location(NamedTuple):
    """Where a leased block lies: byte `slot * slot_bytes` of that arena."""

    arena: int
    slot: int


@dataclass(frozen=True, slots=True)
class Leased:
    """A lease on the lead run: the blocks that can be read now, then `coming` ones. No blocks: no lease."""

    lease: int
    deadline_ns: int
    coming: int
    locations: list[tuple[int, ...]]


class Ready(NamedTuple):
    """The next blocks of a lease whose LEASED said that they would come. `left` 0 ends the stream, early or not."""

    lease: int
    deadline_ns: int  # the lease's from now on; never earlier than it was
    left: int  # blocks still to come after these
    disk: int  # how many of these lay on disk; the others are in DRAM
    locations: Sequence[tuple[int, ...]]


class Durable(NamedTuple):
    """What became of the blocks that this session stored in a namespace since its last FLUSH of it."""

    durable: int
    failed: int  # could not be written
    evicted: int  # gone from DRAM before they were written
    pending: int  # not written when the wait was over; counted again by the next FLUSH


class Reserved(NamedTuple):
    """The answer to one key: if granted, byte `page * 4096` of the ring, or in mode direct slot `page` of `arena`."""

    grant: int
    page: int
    ticket: int
    arena: int = 0


# -- frames of either side --------------------------------------------------------------------------------------


def parse_head(frame: bytes | bytearray | memoryview, frame_bytes: int) -> Head:
    """Check and take apart the head of a frame of `frame_bytes` bytes at the start of `frame`."""
    if frame_bytes < HEAD_BYTES:
        raise ProtocolError(f"frame of {frame_bytes} bytes is shorter than its head")
    if frame_bytes > FRAME_BYTES:
        raise ProtocolError(f"frame of {frame_bytes} bytes is longer than {FRAME_BYTES}")
    head = Head._make(HEAD.unpack_from(frame))
    if head.releases > RIDERS_PER_FRAME or head.commits > RIDERS_PER_FRAME:
        raise LimitError(f"more than {RIDERS_PER_FRAME} riders in a frame")
    if head.body + head.body_bytes != frame_bytes:
        raise ProtocolError(f"frame says {head.body + head.body_bytes} bytes and has {frame_bytes}")
    return head


def build(
    verb: Verb,
    request: int,
    body: bytes = b"",
    *,
    count: int = 0,
    flags: int = 0,
    releases: Sequence[int] = (),
    commits: Sequence[int] = (),
) -> bytes:
    """One frame. `commits` are committed before the verb runs; WIRE.md says when `releases` are given back."""
    head = HEAD.pack(verb, flags, count, request, len(releases), len(commits), len(body))
    if not releases and not commits:
        return head + body
    riders = struct.pack(f"<{len(releases) + len(commits)}Q", *releases, *commits)
    return head + riders + body


def riders(frame: bytes | bytearray | memoryview, head: Head) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leases to release and tickets to commit that ride on a frame."""
    if not head.commits:
        if head.releases == 1:  # by far the most common: a lease given back with the next LEASE
            return CLOCK_BODY.unpack_from(frame, HEAD_BYTES), ()
        if not head.releases:
            return (), ()
    numbers = struct.unpack_from(f"<{head.releases + head.commits}Q", frame, HEAD_BYTES)
    return numbers[: head.releases], numbers[head.releases :]


def require_keys(head: Head, fixed_bytes: int) -> int:
    """Offset of the keys in a frame whose body is `fixed_bytes` and `head.count` keys."""
    if not 1 <= head.count <= KEYS_PER_FRAME:
        raise LimitError(f"{head.count} keys in a frame that holds 1 to {KEYS_PER_FRAME}")
    if head.body_bytes != fixed_bytes + KEY_BYTES * head.count:
        raise ProtocolError(f"body of {head.body_bytes} bytes does not hold {head.count} keys")
    return head.body + fixed_bytes


def require_body(head: Head, body_bytes: int) -> int:
    """Offset of a body that must have exactly `body_bytes` bytes."""
    if head.body_bytes != body_bytes:
        raise ProtocolError(f"body of {head.body_bytes} bytes where {body_bytes} belong")
    return head.body


# -- from the client --------------------------------------------------------------------------------------------


def build_hello(request: int, hello: Hello) -> bytes:
    """HELLO: the first frame of a session."""
    body = HELLO_HEAD.pack(hello.version_low, hello.version_high, hello.role, len(hello.modes), 0, hello.ring_bytes)
    body += bytes(hello.modes) + pack_text(hello.name) + pack_text(hello.tenant)
    return build(Verb.HELLO, request, body)


def parse_hello(frame: bytes | bytearray | memoryview, head: Head) -> Hello:
    """Raises ProtocolError unless the body is exactly one HELLO."""
    body = bytes(frame[head.body : head.body + head.body_bytes])
    if len(body) < HELLO_HEAD.size:
        raise ProtocolError("HELLO is cut short")
    low, high, role, mode_count, _, ring_bytes = HELLO_HEAD.unpack_from(body)
    offset = HELLO_HEAD.size + mode_count
    if not 1 <= mode_count <= len(Mode) or offset > len(body):
        raise ProtocolError("HELLO lists no modes, or too many")
    name, offset = take_text(body, offset, NAME_BYTES)
    tenant, offset = take_text(body, offset, NAME_BYTES)
    if offset != len(body):
        raise ProtocolError("bytes left over after HELLO")
    try:
        modes = tuple(Mode(number) for number in body[HELLO_HEAD.size : HELLO_HEAD.size + mode_count])
        return Hello(name, tenant, Role(role), modes, ring_bytes, low, high)
    except ValueError as error:
        raise ProtocolError(f"HELLO: {error}") from error


def build_match(request: int, namespace: int, keys: bytes, releases: Sequence[int] = ()) -> bytes:
    """MATCH: how much of this chain is there?"""
    count = len(keys) // KEY_BYTES
    if not releases:  # the common case, packed in one go
        return MATCH_FRAME.pack(Verb.MATCH, 0, count, request, 0, 0, KEYS_HEAD.size + len(keys), namespace) + keys
    return build(Verb.MATCH, request, KEYS_HEAD.pack(namespace) + keys, count=count, releases=releases)


def build_match_all(request: int, namespaces: Sequence[int], keys: bytes, releases: Sequence[int] = ()) -> bytes:
    """MATCH_ALL: how much of this chain is there in all of these namespaces?"""
    odd = len(namespaces) % 2
    numbers = struct.pack(f"<{len(namespaces)}I{4 * odd}x", *namespaces)
    body = MATCH_ALL_HEAD.pack(len(namespaces)) + numbers + keys
    return build(Verb.MATCH_ALL, request, body, count=len(keys) // KEY_BYTES, releases=releases)


def parse_match_all(frame: bytes | bytearray | memoryview, head: Head) -> tuple[tuple[int, ...], int]:
    """`(namespaces, offset of the keys)` of MATCH_ALL."""
    if head.body_bytes < MATCH_ALL_HEAD.size:
        raise ProtocolError("MATCH_ALL is cut short")
    (namespaces,) = MATCH_ALL_HEAD.unpack_from(frame, head.body)
    if not 1 <= namespaces <= NAMESPACES_PER_MATCH:
        raise LimitError(f"{namespaces} namespaces in a frame that holds 1 to {NAMESPACES_PER_MATCH}")
    if head.count * namespaces > MATCHES_PER_FRAME:
        raise LimitError(f"{head.count} keys in {namespaces} namespaces are more than {MATCHES_PER_FRAME} to look up")
    keys_at = require_keys(head, MATCH_ALL_HEAD.size + 4 * (namespaces + namespaces % 2))
    return struct.unpack_from(f"<{namespaces}I", frame, head.body + MATCH_ALL_HEAD.size), keys_at


def build_delete(request: int, namespace: int, keys: bytes, releases: Sequence[int] = ()) -> bytes:
    """DELETE: forget these blocks and all that continue them."""
    body = KEYS_HEAD.pack(namespace) + keys
    return build(Verb.DELETE, request, body, count=len(keys) // KEY_BYTES, releases=releases)


def build_lease(
    request: int, namespace: int, keys: bytes, ttl_ns: int, wait_ns: int, releases: Sequence[int] = ()
) -> bytes:
    """LEASE: hold the lead run of this chain still while I read it."""
    body = LEASE_HEAD.pack(namespace, ttl_ns, wait_ns) + keys
    return build(Verb.LEASE, request, body, count=len(keys) // KEY_BYTES, releases=releases)


def build_reserve(
    request: int,
    namespace: int,
    parent: bytes | None,
    keys: bytes,
    commits: Sequence[int] = (),
    releases: Sequence[int] = (),
    recompute_us: int = 0,
) -> bytes:
    """RESERVE: a ticket and a span of my ring for each new block of this chain. `recompute_us` a block; 0: unknown."""
    body = RESERVE_HEAD.pack(namespace, recompute_us, parent or bytes(KEY_BYTES)) + keys
    flags = Flag.HAS_PARENT if parent is not None else 0
    count = len(keys) // KEY_BYTES
    return build(Verb.RESERVE, request, body, count=count, flags=flags, releases=releases, commits=commits)


def build_abort(request: int, tickets: Sequence[int]) -> bytes:
    """ABORT: these tickets will not be committed."""
    return build(Verb.ABORT, request, struct.pack(f"<{len(tickets)}Q", *tickets), count=len(tickets))


def build_flush(request: int, namespace: int, wait_ns: int, releases: Sequence[int] = ()) -> bytes:
    """FLUSH: make durable what this session stored in this namespace, and say what became of it."""
    return build(Verb.FLUSH, request, FLUSH_BODY.pack(namespace, 0, wait_ns), releases=releases)


def parse_flush(frame: bytes | bytearray | memoryview, head: Head) -> tuple[int, int]:
    """`(namespace, wait ns)` of FLUSH."""
    namespace, _, wait_ns = FLUSH_BODY.unpack_from(frame, require_body(head, FLUSH_BODY.size))
    return namespace, wait_ns


def build_renew(request: int, lease: int, ttl_ns: int) -> bytes:
    """RENEW: keep a lease for `ttl_ns` from now."""
    return build(Verb.RENEW, request, RENEW_BODY.pack(lease, ttl_ns))


def parse_tickets(frame: bytes | bytearray | memoryview, head: Head) -> tuple[int, ...]:
    """The tickets of ABORT."""
    if not 1 <= head.count <= KEYS_PER_FRAME:
        raise LimitError(f"{head.count} tickets in a frame that holds 1 to {KEYS_PER_FRAME}")
    offset = require_body(head, RIDER_BYTES * head.count)
    return struct.unpack_from(f"<{head.count}Q", frame, offset)


def build_arena_dropped(arena: int) -> bytes:
    """ARENA_DROPPED: nothing of that arena is mapped here any more."""
    return build(Verb.ARENA_DROPPED, 0, NUMBER_BODY.pack(arena))


# -- from the daemon --------------------------------------------------------------------------------------------


def build_welcome(request: int, welcome: Welcome) -> bytes:
    """WELCOME; carries the daemon's pidfd and, for engines, the ring's fd."""
    body = WELCOME_HEAD.pack(
        welcome.version, welcome.mode, 0, welcome.keys_per_frame, welcome.session, welcome.clock_ns,
        welcome.ring_bytes, welcome.lease_ttl_ns_max, welcome.ticket_ttl_ns,
    )  # fmt: skip
    return build(Verb.WELCOME, request, body + pack_text(welcome.tenant) + pack_text(welcome.notes))


def parse_welcome(frame: bytes | memoryview, head: Head) -> Welcome:
    """Raises ProtocolError unless the body is exactly one WELCOME."""
    body = bytes(frame[head.body : head.body + head.body_bytes])
    if len(body) < WELCOME_HEAD.size:
        raise ProtocolError("WELCOME is cut short")
    version, mode, _, keys, session, clock_ns, ring, ttl_max, ticket_ttl = WELCOME_HEAD.unpack_from(body)
    tenant, offset = take_text(body, WELCOME_HEAD.size, NAME_BYTES)
    notes, offset = take_text(body, offset, FIELD_BYTES)
    if offset != len(body):
        raise ProtocolError("bytes left over after WELCOME")
    try:
        chosen = Mode(mode)
    except ValueError as error:
        raise ProtocolError(f"WELCOME: {error}") from error
    return Welcome(version, chosen, session, clock_ns, ring, ttl_max, ticket_ttl, keys, tenant, notes)


def parse_matched(frame: bytes | memoryview, head: Head) -> Matched:
    """The answer to MATCH."""
    if frame[head.body :] == _NOTHING_MATCHED:
        return NOTHING_MATCHED
    return Matched(*MATCHED_BODY.unpack_from(frame, require_body(head, MATCHED_BODY.size)))


def parse_leased(frame: bytes | memoryview, head: Head) -> Leased:
    """The answer to LEASE."""
    offset = require_body(head, LEASED_HEAD.size + LOCATION.size * head.count)
    lease, deadline_ns, coming = LEASED_HEAD.unpack_from(frame, offset)
    if head.count + coming > KEYS_PER_FRAME or (lease == 0) != (head.count + coming == 0):
        raise ProtocolError(f"LEASED says {head.count} blocks and {coming} more, lease {lease}")
    start = offset + LEASED_HEAD.size
    return Leased(lease, deadline_ns, coming, list(LOCATION.iter_unpack(frame[start : offset + head.body_bytes])))


def build_ready(ready: Ready) -> bytes:
    """READY: the next blocks of a lease; nobody asked for this frame."""
    count = len(ready.locations)
    assert ready.disk <= count, "more blocks from disk than blocks"
    body = READY_HEAD.pack(ready.lease, ready.deadline_ns, ready.left, ready.disk)
    places = struct.pack(f"<{2 * count}I", *(number for place in ready.locations for number in place))
    return build(Verb.READY, 0, body + places, count=count)


def parse_ready(frame: bytes | memoryview, head: Head) -> Ready:
    """The next blocks of a lease."""
    offset = require_body(head, READY_HEAD.size + LOCATION.size * head.count)
    lease, deadline_ns, left, disk = READY_HEAD.unpack_from(frame, offset)
    if head.count + left > KEYS_PER_FRAME or disk > head.count or lease == 0:
        raise ProtocolError(f"READY says {head.count} blocks, {disk} from disk, and {left} more, lease {lease}")
    start = offset + READY_HEAD.size
    places = list(LOCATION.iter_unpack(frame[start : offset + head.body_bytes]))
    return Ready(lease, deadline_ns, left, disk, places)


def build_durable(request: int, durable: Durable) -> bytes:
    """DURABLE: the answer to FLUSH."""
    return build(Verb.DURABLE, request, DURABLE_BODY.pack(*durable))


def parse_durable(frame: bytes | memoryview, head: Head) -> Durable:
    """The answer to FLUSH."""
    return Durable._make(DURABLE_BODY.unpack_from(frame, require_body(head, DURABLE_BODY.size)))


def parse_reserved(frame: bytes | memoryview, head: Head, *, direct: bool = False) -> list[Reserved]:
    """The answer to RESERVE, one item a key; of a session in mode direct, with arenas."""
    count = head.count
    items_bytes = RESERVED_ITEM.size * count
    offset = require_body(head, items_bytes + (4 * (count + count % 2) if direct else 0))
    end = offset + items_bytes
    items = RESERVED_ITEM.iter_unpack(frame[offset:end])
    if not direct:
        return [Reserved(*item) for item in items]
    arenas = struct.unpack_from(f"<{count}I", frame, end)
    return [Reserved(grant, slot, ticket, arena) for (grant, slot, ticket), arena in zip(items, arenas, strict=True)]


def build_published(outcomes: Sequence[tuple[int, int]]) -> bytes:
    """PUBLISHED: what became of these tickets, `(ticket, Outcome)` each."""
    body = b"".join(PUBLISHED_ITEM.pack(ticket, outcome) for ticket, outcome in outcomes)
    return build(Verb.PUBLISHED, 0, body, count=len(outcomes))


def parse_published(frame: bytes | memoryview, head: Head) -> list[tuple[int, ...]]:
    """`(ticket, Outcome)` pairs."""
    offset = require_body(head, PUBLISHED_ITEM.size * head.count)
    return list(PUBLISHED_ITEM.iter_unpack(frame[offset : offset + head.body_bytes]))


def build_arenas(arenas: Sequence[tuple[int, int]], *, writable: bool = False) -> bytes:
    """ARENA: `(arena, bytes)` for each descriptor passed along, in order. `writable`: all of them are."""
    body = b"".join(ARENA_ITEM.pack(*arena) for arena in arenas)
    return build(Verb.ARENA, 0, body, count=len(arenas), flags=Flag.WRITABLE if writable else 0)


def parse_arenas(frame: bytes | memoryview, head: Head) -> list[tuple[int, ...]]:
    """`(arena, bytes)` pairs."""
    offset = require_body(head, ARENA_ITEM.size * head.count)
    return list(ARENA_ITEM.iter_unpack(frame[offset : offset + head.body_bytes]))


def build_arena_gone(arena: int) -> bytes:
    """ARENA_GONE: unmap this arena and answer ARENA_DROPPED."""
    return build(Verb.ARENA_GONE, 0, NUMBER_BODY.pack(arena))


def parse_number(frame: bytes | bytearray | memoryview, head: Head) -> int:
    """The one number of ARENA_GONE, ARENA_DROPPED, COMMITTED and DELETED."""
    number: int = NUMBER_BODY.unpack_from(frame, require_body(head, NUMBER_BODY.size))[0]
    return number


def build_failure(verb: Verb, request: int, code: Code, text: str) -> bytes:
    """FAILED (this request) or GOAWAY (this session), with a code and a sentence for a person."""
    return build(verb, request, CODE_HEAD.pack(code) + text.encode()[:FIELD_BYTES])


def parse_failure(frame: bytes | memoryview, head: Head) -> tuple[Code, str]:
    """Code and text of FAILED or GOAWAY."""
    if head.body_bytes < CODE_HEAD.size:
        raise ProtocolError("failure without a code")
    (number,) = CODE_HEAD.unpack_from(frame, head.body)
    text = bytes(frame[head.body + CODE_HEAD.size : head.body + head.body_bytes]).decode(errors="replace")
    return Code(number) if number in Code._value2member_map_ else Code.BAD_FRAME, text


def verb_of(head: Head) -> Verb:
    """The verb as an enum; raises UnknownVerbError for a number this version does not know."""
    try:
        return Verb(head.verb)
    except ValueError as error:
        raise UnknownVerbError(f"unknown verb {head.verb}") from error


# -- texts ------------------------------------------------------------------------------------------------------


def pack_text(text: str) -> bytes:
    """Length, then UTF-8."""
    encoded = text.encode()
    return TEXT_LENGTH.pack(len(encoded)) + encoded


def take_text(body: bytes, offset: int, bytes_max: int) -> tuple[str, int]:
    """The text at an offset, and where the next field begins. Raises ProtocolError."""
    if offset + TEXT_LENGTH.size > len(body):
        raise ProtocolError("text is cut short")
    (length,) = TEXT_LENGTH.unpack_from(body, offset)
    start, end = offset + TEXT_LENGTH.size, offset + TEXT_LENGTH.size + length
    if length > bytes_max or end > len(body):
        raise ProtocolError("text is too long or cut short")
    try:
        return body[start:end].decode(), end
    except UnicodeDecodeError as error:
        raise ProtocolError("text is not UTF-8") from error
