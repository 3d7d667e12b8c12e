"""The frames of blocks that come later and of blocks that become durable: built, parsed, and cut short."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvproto import frames
from kvproto.errors import ProtocolError
from kvproto.frames import Durable, Head, Ready, Verb
from kvproto.limits import FRAME_BYTES, KEY_BYTES, KEYS_PER_FRAME

U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)


def head_of(frame: bytes) -> Head:
    return frames.parse_head(frame, len(frame))


@st.composite
def readies(draw: st.DrawFn) -> Ready:
    places = draw(st.lists(st.tuples(U32, U32), max_size=20))
    left = draw(st.integers(0, KEYS_PER_FRAME - len(places)))
    return Ready(draw(U64.filter(bool)), draw(U64), left, draw(st.integers(0, len(places))), places)


@given(readies())
def test_ready_says_what_was_built(ready: Ready) -> None:
    frame = frames.build_ready(ready)
    assert head_of(frame).request == 0
    assert frames.parse_ready(frame, head_of(frame)) == ready


@given(readies(), st.integers(1, 200))
def test_ready_is_never_parsed_from_a_part_of_itself(ready: Ready, cut: int) -> None:
    body = frames.build_ready(ready)[frames.HEAD_BYTES :][:-cut]
    frame = frames.build(Verb.READY, 0, body, count=len(ready.locations))
    with pytest.raises(ProtocolError):
        frames.parse_ready(frame, head_of(frame))


@pytest.mark.parametrize(
    ("lease", "left", "disk", "count"),
    [(0, 0, 0, 1), (1, KEYS_PER_FRAME, 0, 1), (1, 0, 2, 1), (1, (1 << 32) - 1, 0, 0), (1, 0, 0, KEYS_PER_FRAME + 1)],
)
def test_a_ready_that_contradicts_itself_breaks_the_protocol(lease: int, left: int, disk: int, count: int) -> None:
    body = frames.READY_HEAD.pack(lease, 1, left, disk) + frames.LOCATION.pack(1, 1) * count
    frame = frames.build(Verb.READY, 0, body, count=count)
    with pytest.raises(ProtocolError):
        frames.parse_ready(frame, head_of(frame))


@pytest.mark.parametrize(
    ("lease", "coming", "count", "right"),
    [
        (1, 0, 2, True), (1, 2, 0, True), (0, 0, 0, True), (1, KEYS_PER_FRAME - 1, 1, True),
        (0, 0, 1, False), (0, 1, 0, False), (1, 0, 0, False), (1, KEYS_PER_FRAME, 1, False),
        (1, (1 << 32) - 1, 1, False),
    ],
)  # fmt: skip
def test_leased_promises_blocks_if_and_only_if_there_is_a_lease(
    lease: int, coming: int, count: int, right: bool
) -> None:
    body = frames.LEASED_HEAD.pack(lease, 5, coming) + frames.LOCATION.pack(3, 4) * count
    frame = frames.build(Verb.LEASED, 1, body, count=count)
    if right:
        leased = frames.parse_leased(frame, head_of(frame))
        assert (leased.lease, leased.deadline_ns, leased.coming) == (lease, 5, coming)
        assert leased.locations == [(3, 4)] * count
    else:
        with pytest.raises(ProtocolError):
            frames.parse_leased(frame, head_of(frame))


@given(namespace=U32, wait_ns=U64, releases=st.lists(U64, max_size=3))
def test_flush_says_what_was_built(namespace: int, wait_ns: int, releases: list[int]) -> None:
    frame = frames.build_flush(7, namespace, wait_ns, releases)
    head = head_of(frame)
    assert frames.parse_flush(frame, head) == (namespace, wait_ns)
    assert frames.riders(frame, head)[0] == tuple(releases)


@given(st.tuples(U32, U32, U32, U32))
def test_durable_says_what_was_built(counts: tuple[int, int, int, int]) -> None:
    durable = Durable(*counts)
    frame = frames.build_durable(7, durable)
    assert frames.parse_durable(frame, head_of(frame)) == durable


@pytest.mark.parametrize("body_bytes", [0, 8, 15, 17, 24])
def test_flush_and_durable_have_one_length(body_bytes: int) -> None:
    for verb in (Verb.FLUSH, Verb.DURABLE):
        frame = frames.build(verb, 7, bytes(body_bytes))
        with pytest.raises(ProtocolError):
            (frames.parse_flush if verb is Verb.FLUSH else frames.parse_durable)(frame, head_of(frame))


def test_reserve_says_what_a_block_costs() -> None:
    frame = frames.build_reserve(7, 3, None, bytes(KEY_BYTES), recompute_us=frames.RECOMPUTE_US_MAX)
    namespace, recompute_us, parent = frames.RESERVE_HEAD.unpack_from(frame, head_of(frame).body)
    assert (namespace, recompute_us, parent) == (3, (1 << 32) - 1, bytes(KEY_BYTES))
    assert frames.RESERVE_HEAD.unpack_from(frames.build_reserve(7, 3, None, bytes(KEY_BYTES)), 16)[1] == 0


def test_the_largest_ready_fits_a_frame() -> None:
    ready = Ready(1, 1, 0, KEYS_PER_FRAME, [(1, 1)] * KEYS_PER_FRAME)
    assert len(frames.build_ready(ready)) <= FRAME_BYTES
