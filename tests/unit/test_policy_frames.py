"""The frames of pins, prefetches, hints, timings and advice: built, parsed, cut short and flipped."""

import math
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto import frames, policy_frames
from kvproto.errors import KvError, LimitError, ProtocolError
from kvproto.frames import Flag, Head, Verb
from kvproto.limits import FRAME_BYTES, HINT_NAME_BYTES, HINT_TEXT_BYTES, KEY_BYTES, KEYS_PER_FRAME
from kvproto.policy_frames import Advised, Choice, Event, Fetching, Hint, Kind, Pin, Pinned, Question, Report, Tier

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
NUMBERS = st.lists(U64, min_size=1, max_size=8)
KEYS = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), max_size=5).map(b"".join)
SOME_KEYS = st.lists(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), min_size=1, max_size=5).map(b"".join)
FLOATS = st.floats(allow_nan=False)
NAMES = st.text(st.characters(codec="utf-8"), max_size=40)
HINTS = st.builds(
    Hint, st.sampled_from(Event), NAMES, NAMES, NAMES, U32, U64, FLOATS, st.integers(0, 3), KEYS
)  # fmt: skip
REPORTS = st.builds(Report, U32, st.just(Kind.PREFILL), U64, U64, FLOATS) | st.builds(
    Report, U32, st.just(Kind.LOAD), st.sampled_from(Tier), U64, FLOATS
)
Parser = Callable[[bytes, Head], object]


def head_of(frame: bytes) -> Head:
    return frames.parse_head(frame, len(frame))


def parse(parser: Parser, frame: bytes) -> object:
    return parser(frame, head_of(frame))


def shortened(frame: bytes, cut: int) -> bytes:
    """The same head, true to a body that lacks its last bytes."""
    head = head_of(frame)
    body = frame[head.body :][:-cut]
    return frames.build(Verb(head.verb), head.request, body, count=head.count, flags=head.flags)


# -- what is built is what is parsed ---------------------------------------------------------------------------


@given(U32, SOME_KEYS, st.sampled_from(Tier), U64, st.booleans(), NUMBERS)
def test_pin_says_what_was_built(
    namespace: int, keys: bytes, tier: Tier, ttl_ns: int, refresh: bool, releases: list[int]
) -> None:
    frame = policy_frames.build_pin(5, namespace, keys, tier, ttl_ns, refresh=refresh, releases=releases)
    head = head_of(frame)
    assert (head.verb, head.request, head.count) == (Verb.PIN, 5, len(keys) // KEY_BYTES)
    assert policy_frames.PIN_HEAD.unpack_from(frame, head.body) == (namespace, tier, ttl_ns)
    assert frame[policy_frames.pin_keys(head) :] == keys
    assert bool(head.flags & Flag.REFRESH) is refresh
    assert frames.riders(frame, head) == (tuple(releases), ())


@given(U32, SOME_KEYS, st.sampled_from(Tier), U64)
def test_prefetch_says_what_was_built(namespace: int, keys: bytes, tier: Tier, within_ns: int) -> None:
    frame = policy_frames.build_prefetch(5, namespace, keys, tier, within_ns)
    head = head_of(frame)
    assert policy_frames.PREFETCH_HEAD.unpack_from(frame, head.body) == (namespace, tier, within_ns)
    assert frame[policy_frames.pin_keys(head) :] == keys


@given(NUMBERS)
def test_unpin_and_cancel_say_what_was_built(numbers: list[int]) -> None:
    assert parse(policy_frames.parse_numbers, policy_frames.build_unpin(5, numbers)) == tuple(numbers)
    cancel = policy_frames.build_cancel(numbers)
    assert head_of(cancel).request == 0
    assert parse(policy_frames.parse_numbers, cancel) == tuple(numbers)
    assert parse(policy_frames.parse_numbers, cancel) != tuple(reversed([*numbers, 0]))


@given(HINTS)
def test_hint_says_what_was_built(hint: Hint) -> None:
    frame = policy_frames.build_hint(hint)
    assert head_of(frame).request == 0
    assert parse(policy_frames.parse_hint, frame) == hint


def test_a_hint_keeps_its_three_texts_apart() -> None:
    hint = Hint(Event.RUN, "ab", "c", "d", seconds=1.0)
    moved = Hint(Event.RUN, "a", "bc", "d", seconds=1.0)
    assert parse(policy_frames.parse_hint, policy_frames.build_hint(hint)) == hint != moved
    assert policy_frames.build_hint(hint) != policy_frames.build_hint(moved)


def test_a_time_that_nobody_knows_is_not_a_number() -> None:
    hint = parse(policy_frames.parse_hint, policy_frames.build_hint(Hint(Event.PROGRAM, "p")))
    assert isinstance(hint, Hint)
    assert math.isnan(hint.seconds)


@given(REPORTS)
def test_report_says_what_was_built(report: Report) -> None:
    frame = policy_frames.build_report(report)
    assert head_of(frame).request == 0
    assert parse(policy_frames.parse_report, frame) == report


@given(st.builds(Question, U32, *[FLOATS] * 8))
def test_advise_says_what_was_built(question: Question) -> None:
    assert parse(policy_frames.parse_advise, policy_frames.build_advise(5, question)) == question


@given(st.builds(Pinned, U64, U64, U64, U32, U32), st.builds(Fetching, U64, U32, U32))
def test_pinned_and_fetching_say_what_was_built(pinned: Pinned, fetching: Fetching) -> None:
    frame = frames.build(Verb.PINNED, 5, policy_frames.PINNED_BODY.pack(*pinned))
    assert parse(policy_frames.parse_pinned, frame) == pinned
    frame = frames.build(Verb.FETCHING, 5, policy_frames.FETCHING_BODY.pack(*fetching))
    assert parse(policy_frames.parse_fetching, frame) == fetching


@given(st.lists(st.builds(Pin, U64, U64, U64, U32, U32), max_size=5))
def test_a_list_of_pins_says_what_was_built(pins: list[Pin]) -> None:
    assert parse(policy_frames.parse_pin_list, policy_frames.build_pin_list(5, pins)) == pins
    assert head_of(policy_frames.build_pins(5, 77)).body_bytes == 8


@given(st.builds(Advised, st.sampled_from(Choice), FLOATS, FLOATS, FLOATS, FLOATS, U64))
def test_advised_says_what_was_built(advised: Advised) -> None:
    frame = frames.build(Verb.ADVISED, 5, policy_frames.ADVISED_BODY.pack(*advised))
    assert parse(policy_frames.parse_advised, frame) == advised


# -- damage ----------------------------------------------------------------------------------------------------

WHOLE: list[tuple[Parser, bytes]] = [
    (
        lambda _, head: policy_frames.pin_keys(head),
        policy_frames.build_pin(1, 2, bytes(64), Tier.DRAM, 3, refresh=True),
    ),
    (lambda _, head: policy_frames.pin_keys(head), policy_frames.build_prefetch(1, 2, bytes(64), Tier.DISK, 3)),
    (policy_frames.parse_numbers, policy_frames.build_unpin(1, [5, 6])),
    (policy_frames.parse_numbers, policy_frames.build_cancel([5])),
    (policy_frames.parse_hint, policy_frames.build_hint(Hint(Event.BIND, "run", "step", seconds=1.0, keys=bytes(64)))),
    (policy_frames.parse_hint, policy_frames.build_hint(Hint(Event.WORKFLOW, "w", text="{}", seconds=1.0))),
    (policy_frames.parse_report, policy_frames.build_report(Report(1, Kind.LOAD, Tier.DISK, 1 << 20, 0.5))),
    (policy_frames.parse_advise, policy_frames.build_advise(1, Question(1, 2, 3, 4, 5, 6, 7, 8, 9))),
    (policy_frames.parse_pinned, frames.build(Verb.PINNED, 1, policy_frames.PINNED_BODY.pack(1, 2, 3, 4, 0))),
    (policy_frames.parse_pin_list, policy_frames.build_pin_list(1, [Pin(1, 2, 3, 4, 5), Pin(2, 2, 3, 4, 5)])),
    (policy_frames.parse_fetching, frames.build(Verb.FETCHING, 1, policy_frames.FETCHING_BODY.pack(1, 2, 3))),
    (policy_frames.parse_advised, frames.build(Verb.ADVISED, 1, policy_frames.ADVISED_BODY.pack(1, 2, 3, 4, 5, 6))),
]
NAMED = pytest.mark.parametrize(
    ("parser", "frame"), WHOLE, ids=[f"{n}-{Verb(f[0]).name}" for n, (_, f) in enumerate(WHOLE)]
)


@NAMED
def test_nothing_is_parsed_from_a_part_of_itself_or_from_more(parser: Parser, frame: bytes) -> None:
    parse(parser, frame)  # the control
    head = head_of(frame)
    for cut in range(1, head.body_bytes + 1):
        with pytest.raises(ProtocolError):
            parse(parser, shortened(frame, cut))
    longer = frames.build(Verb(head.verb), 1, frame[head.body :] + b"\0", count=head.count)
    with pytest.raises(ProtocolError):
        parse(parser, longer)


@NAMED
def test_a_flipped_bit_is_a_typed_error_or_another_value(parser: Parser, frame: bytes) -> None:
    said = parse(parser, frame)
    refused = 0
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            head = frames.parse_head(flipped, len(flipped))
            found = parser(bytes(flipped), head)
        except KvError:
            refused += 1
            continue
        if bit // 8 >= frames.HEAD_BYTES and not isinstance(said, int):
            # Padding carries nothing, and NaN is not equal to itself; whatever else was flipped shows.
            assert found != said or is_padding(frame, bit // 8), f"bit {bit} of {frame.hex()}"
    assert refused  # the counts and lengths of the head at least


def is_padding(frame: bytes, at: int) -> bool:
    body = at - frames.HEAD_BYTES
    return {
        Verb.HINT: body in {2, 3},
        Verb.REPORT: body in {5, 6, 7},
        Verb.ADVISE: body in {4, 5, 6, 7},
        Verb.ADVISED: 1 <= body < 8,
    }.get(Verb(frame[0]), False)


@given(st.sampled_from(WHOLE), st.data())
def test_any_body_is_a_value_or_a_typed_error(whole: tuple[Parser, bytes], data: st.DataObject) -> None:
    parser, frame = whole
    head = head_of(frame)
    body = bytearray(frame[head.body :])
    for _ in range(data.draw(st.integers(0, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    damaged = frames.build(Verb(head.verb), 1, bytes(body), count=data.draw(st.integers(0, 5)))
    try:
        parse(parser, damaged)
    except ProtocolError:
        return


# -- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [Verb.UNPIN, Verb.CANCEL])
@pytest.mark.parametrize("count", [0, KEYS_PER_FRAME + 1])
def test_numbers_are_one_to_a_thousand(verb: Verb, count: int) -> None:
    with pytest.raises(LimitError):
        parse(policy_frames.parse_numbers, frames.build(verb, 1, bytes(8 * count), count=count))
    most = frames.build(verb, 1, bytes(8 * KEYS_PER_FRAME), count=KEYS_PER_FRAME)
    assert len(policy_frames.parse_numbers(most, head_of(most))) == KEYS_PER_FRAME


@pytest.mark.parametrize("verb", [Verb.PIN, Verb.PREFETCH])
@pytest.mark.parametrize("count", [0, KEYS_PER_FRAME + 1])
def test_pins_and_prefetches_hold_one_to_a_thousand_keys(verb: Verb, count: int) -> None:
    with pytest.raises(LimitError):
        policy_frames.pin_keys(head_of(frames.build(verb, 1, bytes(16 + KEY_BYTES * count), count=count)))


def test_a_hint_holds_a_thousand_keys_and_names_of_some_length() -> None:
    def parsed(hint: Hint) -> object:
        return parse(policy_frames.parse_hint, policy_frames.build_hint(hint))

    most = Hint(Event.CONTEXT, "n" * HINT_NAME_BYTES, "o" * HINT_NAME_BYTES, keys=bytes(KEY_BYTES * KEYS_PER_FRAME))
    assert parsed(most) is not None
    assert len(policy_frames.build_hint(most)) <= FRAME_BYTES
    for wrong in (
        Hint(Event.CONTEXT, "n" * (HINT_NAME_BYTES + 1)),
        Hint(Event.RUN, "r", "o" * (HINT_NAME_BYTES + 1)),
        Hint(Event.WORKFLOW, "w", text="x" * (HINT_TEXT_BYTES + 1)),
        Hint(Event.EXPECT, "e", expectation=4),
        Hint(Event.EXPECT, "e", keys=bytes(KEY_BYTES * (KEYS_PER_FRAME + 1))),
    ):
        with pytest.raises(ProtocolError):
            parsed(wrong)


@pytest.mark.parametrize("event", [0, 13, 255])
def test_an_event_that_nobody_knows_breaks_the_protocol(event: int) -> None:
    frame = bytearray(policy_frames.build_hint(Hint(Event.PROGRAM, "p")))
    frame[frames.HEAD_BYTES] = event
    with pytest.raises(ProtocolError):
        parse(policy_frames.parse_hint, bytes(frame))


def test_text_that_is_not_utf8_breaks_the_protocol() -> None:
    frame = policy_frames.build_hint(Hint(Event.PROGRAM, "pq"))
    with pytest.raises(ProtocolError):
        parse(policy_frames.parse_hint, frame.replace(b"pq", b"\xff\xfe"))


@pytest.mark.parametrize(("kind", "first"), [(3, 0), (255, 0), (Kind.LOAD, 3)])
def test_a_report_of_what_nobody_times_breaks_the_protocol(kind: int, first: int) -> None:
    with pytest.raises(ProtocolError):
        parse(policy_frames.parse_report, policy_frames.build_report(Report(1, kind, first, 1, 1.0)))


@pytest.mark.parametrize("tier", [3, 255])
def test_there_are_three_tiers(tier: int) -> None:
    assert policy_frames.require_tier(2) is Tier.DISK
    with pytest.raises(ProtocolError):
        policy_frames.require_tier(tier)


def test_there_are_three_choices() -> None:
    with pytest.raises(ProtocolError):
        parse(
            policy_frames.parse_advised,
            frames.build(Verb.ADVISED, 1, policy_frames.ADVISED_BODY.pack(3, 0, 0, 0, 0, 0)),
        )


# -- the bytes that WIRE.md draws --------------------------------------------------------------------------------


def test_the_bytes_are_those_that_the_document_draws() -> None:
    key = bytes(range(32))
    pin = policy_frames.build_pin(9, 7, key, Tier.DISK, 5, refresh=True)
    assert pin == struct.pack("<BBHIHHI", 14, 4, 1, 9, 0, 0, 48) + struct.pack("<IBxxxQ", 7, 2, 5) + key
    assert pin != struct.pack("<BBHIHHI", 14, 0, 1, 9, 0, 0, 48) + struct.pack("<IBxxxQ", 7, 2, 5) + key
    prefetch = policy_frames.build_prefetch(9, 7, key, Tier.DRAM, 5)
    assert prefetch == struct.pack("<BBHIHHI", 17, 0, 1, 9, 0, 0, 48) + struct.pack("<IBxxxQ", 7, 1, 5) + key
    hint = Hint(Event.BIND, "r", "st", "", 7, 3, 0.5, 2, key)
    texts = b"\x01\x00r" + b"\x02\x00st" + b"\x00\x00"
    assert policy_frames.build_hint(hint)[16:] == struct.pack("<BBxxIQd", 9, 2, 7, 3, 0.5) + texts + key
    report = policy_frames.build_report(Report(7, Kind.LOAD, Tier.DISK, 1 << 20, 0.5))
    assert report[16:] == struct.pack("<IBxxxQQd", 7, 1, 2, 1 << 20, 0.5)
    advise = policy_frames.build_advise(9, Question(7, 1, 2, 3, 4, 5, 6, 7, 8))
    assert advise[16:] == struct.pack("<I4x8d", 7, 1, 2, 3, 4, 5, 6, 7, 8)
    assert policy_frames.HINT_HEAD.size == 24
    assert policy_frames.PINNED_BODY.size == policy_frames.PIN_ITEM.size == 32
    assert (policy_frames.FETCHING_BODY.size, policy_frames.ADVISED_BODY.size) == (16, 48)
