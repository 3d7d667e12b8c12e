"""The frames by which clients say what they know: pins, prefetches, hints, timings, advice. WIRE.md draws every byte.

As in `frames`: building and parsing only, and `parse_*` raise ProtocolError or LimitError for what breaks the rules.
What is well formed and still makes no sense (an unknown step, a deadline of a year) is for the store to refuse.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from kvproto.errors import LimitError, ProtocolError
from kvproto.frames import Flag, Head, Verb, build, pack_text, require_body, require_keys, take_text
from kvproto.limits import HINT_NAME_BYTES, HINT_TEXT_BYTES, KEY_BYTES, KEYS_PER_FRAME

PIN_HEAD: Final = struct.Struct("<IB3xQ")  # namespace, tier, ttl ns
PINNED_BODY: Final = struct.Struct("<QQQII")  # pin, bytes, expires ns, blocks, why not all
PIN_ITEM: Final = struct.Struct("<QQQII")  # pin, bytes, expires ns, blocks, namespace
PIN_NUMBERS_MAX: Final = KEYS_PER_FRAME
PREFETCH_HEAD: Final = struct.Struct("<IB3xQ")  # namespace, tier, within ns
FETCHING_BODY: Final = struct.Struct("<QII")  # prefetch (0: nothing to do), blocks there already, blocks to come
HINT_HEAD: Final = struct.Struct("<BB2xIQd")  # event, expectation, namespace, version, seconds; then texts, then keys
REPORT_BODY: Final = struct.Struct("<IB3xQQd")  # namespace, kind, cached tokens or tier, new tokens or bytes, seconds
ADVISE_BODY: Final = struct.Struct("<I4x8d")  # namespace, then Question's fields
ADVISED_BODY: Final = struct.Struct("<B7xddddQ")  # choice, wastes of each choice, T_fwd s, swap budget bytes

UNKNOWN: Final = float("nan")  # a time or a waste that nobody knows


class Tier(IntEnum):
    """Where a block lies. The order is that of speed."""

    HBM = 0
    DRAM = 1
    DISK = 2


REMOTE: Final = 3  # in PREFETCH alone, from version 5 on: in the tier beyond this host, and at once


class Partial(IntEnum):
    """Why a pin covers less than it was asked for."""

    NOTHING = 0  # it covers all
    ABSENT = 1  # the chain ends there, or what follows is still being written
    BUDGET = 2  # the tenant's pins have no room for more
    TOO_MANY = 3  # the tenant has as many pins as it may


class Event(IntEnum):
    """What a hint says. Programs: PROGRAM to PROGRAM_FINISHED; workflows: WORKFLOW to RUN_FINISHED."""

    PROGRAM = 1  # name; seconds: over after so long a silence
    CONTEXT = 2  # name, keys: what the program used or stored last
    TOOL_STARTED = 3  # name, other = tool; seconds: expected
    TOOL_FINISHED = 4  # name
    TURN_FINISHED = 5  # name
    PROGRAM_FINISHED = 6  # name
    WORKFLOW = 7  # name, version, text = description in JSON
    RUN = 8  # name, other = workflow, version; seconds: over after so long a silence
    BIND = 9  # name = run, other = step, version, keys
    ENTER = 10  # name = run, other = step, version
    RUN_FINISHED = 11  # name
    EXPECT = 12  # name = source, keys, expectation or seconds: when these blocks are needed next


class Kind(IntEnum):
    """What a REPORT times."""

    PREFILL = 0  # cached tokens, new tokens
    LOAD = 1  # tier, bytes
    QUEUE = 2  # 0, 0: a request whose context had to be computed anew waited so long to be scheduled


class Choice(IntEnum):
    """What to do with the context of a request that waits for a tool."""

    PRESERVE = 0
    SWAP = 1
    DISCARD = 2


class Pinned(NamedTuple):
    """What a pin covers: the first `blocks` of the chain until `expires_ns`. 0 blocks: there is no pin."""

    pin: int
    bytes: int  # of these blocks; what other pins cover too is not charged twice
    expires_ns: int  # CLOCK_MONOTONIC
    blocks: int
    partial: int  # Partial


class Pin(NamedTuple):
    """One pin of a tenant, for a list."""

    pin: int
    bytes: int
    expires_ns: int
    blocks: int
    namespace: int


class Fetching(NamedTuple):
    """What a prefetch will do."""

    prefetch: int
    there: int
    coming: int


@dataclass(frozen=True, slots=True)
class Hint:
    """One word about the future. Which fields count says `Event`."""

    event: Event
    name: str
    other: str = ""
    text: str = ""
    namespace: int = 0
    version: int = 0
    seconds: float = UNKNOWN
    expectation: int = 0  # 0 unknown, 1 soon, 2 later, 3 hardly
    keys: bytes = b""


class Report(NamedTuple):
    """A timing. `first`: cached tokens, Tier or 0; `amount`: new tokens, bytes or 0."""

    namespace: int
    kind: int
    first: int
    amount: int
    seconds: float


class Question(NamedTuple):
    """A request waits for a tool. NaN: unknown. See kvstore/hints/intercept.py."""

    namespace: int
    tokens: float
    token_bytes: float
    running_tokens: float
    elapsed_s: float
    expected_s: float
    forward_s: float
    batch_tokens: float
    chunk_tokens: float


class Advised(NamedTuple):
    """The choice that wastes least, and what each wastes in byte-seconds. NaN: nobody has measured that."""

    choice: int
    preserve: float
    swap: float
    discard: float
    forward_s: float
    swap_budget_bytes: int


# -- from the client --------------------------------------------------------------------------------------------


def build_pin(
    request: int, namespace: int, keys: bytes, tier: Tier, ttl_ns: int, *, refresh: bool, releases: Sequence[int] = ()
) -> bytes:
    """PIN: keep the lead run of this chain in a tier for a while."""
    body = PIN_HEAD.pack(namespace, tier, ttl_ns) + keys
    flags = Flag.REFRESH if refresh else 0
    return build(Verb.PIN, request, body, count=len(keys) // KEY_BYTES, flags=flags, releases=releases)


def build_unpin(request: int, pins: Sequence[int], releases: Sequence[int] = ()) -> bytes:
    """UNPIN: these pins are over."""
    return build(Verb.UNPIN, request, struct.pack(f"<{len(pins)}Q", *pins), count=len(pins), releases=releases)


def parse_numbers(frame: bytes | bytearray | memoryview, head: Head) -> tuple[int, ...]:
    """The pins of UNPIN; the prefetch of CANCEL."""
    if not 1 <= head.count <= PIN_NUMBERS_MAX:
        raise LimitError(f"{head.count} numbers in a frame that holds 1 to {PIN_NUMBERS_MAX}")
    return struct.unpack_from(f"<{head.count}Q", frame, require_body(head, 8 * head.count))


def build_pins(request: int, after: int, releases: Sequence[int] = ()) -> bytes:
    """PINS: list the tenant's pins with numbers above `after`, as many as fit."""
    return build(Verb.PINS, request, struct.pack("<Q", after), releases=releases)


def build_prefetch(
    request: int, namespace: int, keys: bytes, tier: int, within_ns: int, releases: Sequence[int] = ()
) -> bytes:
    """PREFETCH: have the lead run of this chain in a tier within so long, if there is room and time for it."""
    body = PREFETCH_HEAD.pack(namespace, tier, within_ns) + keys
    return build(Verb.PREFETCH, request, body, count=len(keys) // KEY_BYTES, releases=releases)


def build_cancel(prefetches: Sequence[int]) -> bytes:
    """CANCEL: these prefetches are not wanted any more. One way."""
    return build(Verb.CANCEL, 0, struct.pack(f"<{len(prefetches)}Q", *prefetches), count=len(prefetches))


def build_hint(hint: Hint) -> bytes:
    """HINT: one way; a refusal comes back as REFUSED."""
    body = HINT_HEAD.pack(hint.event, hint.expectation, hint.namespace, hint.version, hint.seconds)
    body += pack_text(hint.name) + pack_text(hint.other) + pack_text(hint.text)
    return build(Verb.HINT, 0, body + hint.keys, count=len(hint.keys) // KEY_BYTES)


def parse_hint(frame: bytes | bytearray | memoryview, head: Head) -> Hint:
    """Raises ProtocolError unless the body is exactly one HINT."""
    body = bytes(frame[head.body : head.body + head.body_bytes])
    if len(body) < HINT_HEAD.size:
        raise ProtocolError("HINT is cut short")
    event, expectation, namespace, version, seconds = HINT_HEAD.unpack_from(body)
    name, offset = take_text(body, HINT_HEAD.size, HINT_NAME_BYTES)
    other, offset = take_text(body, offset, HINT_NAME_BYTES)
    text, offset = take_text(body, offset, HINT_TEXT_BYTES)
    if head.count > KEYS_PER_FRAME:
        raise LimitError(f"{head.count} keys in a frame that holds up to {KEYS_PER_FRAME}")
    if len(body) != offset + KEY_BYTES * head.count or expectation > 3:
        raise ProtocolError("HINT does not hold what it says")
    try:
        known = Event(event)
    except ValueError as error:
        raise ProtocolError(f"HINT: {error}") from error
    return Hint(known, name, other, text, namespace, version, seconds, expectation, body[offset:])


def build_report(report: Report) -> bytes:
    """REPORT: a timing; one way, a refusal comes back as REFUSED."""
    return build(Verb.REPORT, 0, REPORT_BODY.pack(*report))


def parse_report(frame: bytes | bytearray | memoryview, head: Head) -> Report:
    """A timing."""
    report = Report._make(REPORT_BODY.unpack_from(frame, require_body(head, REPORT_BODY.size)))
    if report.kind not in Kind._value2member_map_ or (report.kind == Kind.LOAD and report.first > Tier.DISK):
        raise ProtocolError(f"REPORT of kind {report.kind}, {report.first}")
    return report


def build_advise(request: int, question: Question, releases: Sequence[int] = ()) -> bytes:
    """ADVISE: what to do with this request's context?"""
    return build(Verb.ADVISE, request, ADVISE_BODY.pack(*question), releases=releases)


def parse_advise(frame: bytes | bytearray | memoryview, head: Head) -> Question:
    """The question of ADVISE."""
    return Question._make(ADVISE_BODY.unpack_from(frame, require_body(head, ADVISE_BODY.size)))


def require_tier(number: int) -> Tier:
    """Raises ProtocolError for what is no tier."""
    if number not in Tier._value2member_map_:
        raise ProtocolError(f"tier {number}")
    return Tier(number)


def pin_keys(head: Head) -> int:
    """Offset of the keys of PIN or PREFETCH."""
    return require_keys(head, PIN_HEAD.size)


# -- from the daemon --------------------------------------------------------------------------------------------


def parse_pinned(frame: bytes | memoryview, head: Head) -> Pinned:
    """The answer to PIN."""
    return Pinned._make(PINNED_BODY.unpack_from(frame, require_body(head, PINNED_BODY.size)))


def build_pin_list(request: int, pins: Sequence[Pin]) -> bytes:
    """PIN_LIST: the answer to PINS."""
    return build(Verb.PIN_LIST, request, b"".join(PIN_ITEM.pack(*pin) for pin in pins), count=len(pins))


def parse_pin_list(frame: bytes | memoryview, head: Head) -> list[Pin]:
    """The answer to PINS."""
    offset = require_body(head, PIN_ITEM.size * head.count)
    return [Pin._make(item) for item in PIN_ITEM.iter_unpack(frame[offset : offset + head.body_bytes])]


def parse_fetching(frame: bytes | memoryview, head: Head) -> Fetching:
    """The answer to PREFETCH."""
    return Fetching._make(FETCHING_BODY.unpack_from(frame, require_body(head, FETCHING_BODY.size)))


def parse_advised(frame: bytes | memoryview, head: Head) -> Advised:
    """The answer to ADVISE."""
    advised = Advised._make(ADVISED_BODY.unpack_from(frame, require_body(head, ADVISED_BODY.size)))
    if advised.choice not in Choice._value2member_map_:
        raise ProtocolError(f"ADVISED: choice {advised.choice}")
    return advised
