"""Transfer modes in the client: what is offered, what is taken from a daemon, and what is not."""

import ctypes
import gc
import os
from collections.abc import Callable

import numpy as np
import pytest

from kvclient.calls import HelloCall, Opened, ReserveCall
from kvclient.client import hello_of
from kvclient.copying import BOUNCE_BYTES, Bounce
from kvclient.ledger import Ledger
from kvclient.mapping import HostMemory
from kvclient.protocol import Session
from kvproto import frames
from kvproto.errors import Grant, ProtocolError, UsageError
from kvproto.frames import Flag, Hello, Mode, Role, Verb, Welcome
from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES, PROTOCOL_VERSION

ARENA_BYTES = 16 * PAGE_BYTES
NAMESPACE = Opened(number=7, slot_bytes=2 * PAGE_BYTES, block_bytes=5000)
FAR_NS = 10**15


@pytest.fixture
def fd() -> Callable[[], int]:
    """Makes memory of an arena's size."""

    def make() -> int:
        number = os.memfd_create("arena")
        os.ftruncate(number, ARENA_BYTES)
        return number

    return make


def welcomed(mode: Mode, fds: list[int]) -> Session:
    """A session that was welcomed in a mode."""
    session = Session(HostMemory())
    call = HelloCall(session, Hello("test", modes=(Mode.DIRECT, Mode.RING, Mode.COPY)), FAR_NS)
    frame = session.submit(call, 0)
    head = frames.parse_head(frame, len(frame))
    welcome = Welcome(
        version=PROTOCOL_VERSION, mode=mode, session=3, clock_ns=50, ring_bytes=ARENA_BYTES,
        lease_ttl_ns_max=60 * 10**9, ticket_ttl_ns=30 * 10**9, keys_per_frame=KEYS_PER_FRAME, tenant="t", notes="",
    )  # fmt: skip
    session.receive(frames.build_welcome(head.request, welcome), fds, 100)
    return session


def reserve(session: Session, items: list[tuple[int, int, int]], arenas: list[int] | None = None) -> ReserveCall:
    """RESERVE and its answer; `arenas` as in mode direct."""
    call = ReserveCall(
        session, NAMESPACE, parent=None, keys=[bytes(32)] * len(items), commits=[], ledger=Ledger(), deadline_ns=FAR_NS
    )
    frame = session.submit(call, 0)
    body = b"".join(frames.RESERVED_ITEM.pack(*item) for item in items)
    for arena in (arenas or []) + [0] * (len(arenas or []) % 2):
        body += arena.to_bytes(4, "little")
    head = frames.parse_head(frame, len(frame))
    session.receive(frames.build(Verb.RESERVED, head.request, body, count=len(items)), (), 100)
    return call


class TestOffer:
    @pytest.mark.parametrize(
        ("mode", "offered"),
        [
            ("copy", (Mode.COPY,)),
            ("direct", (Mode.DIRECT, Mode.COPY)),
            ("ring", (Mode.RING, Mode.COPY)),
            ("auto", (Mode.DIRECT, Mode.COPY)),
        ],
    )
    def test_offers_what_was_wished_and_copy(self, mode: str, offered: tuple[Mode, ...]) -> None:
        assert hello_of("", "", 0, Role.ENGINE, mode).modes == offered
        assert hello_of("", "", 0, Role.TOOL, mode).modes == (Mode.COPY,)

    def test_refuses_a_mode_that_does_not_exist(self) -> None:
        with pytest.raises(UsageError, match="mode is one of copy, direct, ring, daemon, auto"):
            hello_of("", "", 0, Role.ENGINE, "dma")


class TestDirect:
    def test_copies_straight_into_the_slots_that_are_named(self, fd: Callable[[], int]) -> None:
        session = welcomed(Mode.DIRECT, [fd()])
        assert session.ring is None
        assert session.store_bytes == ARENA_BYTES
        session.receive(frames.build_arenas([(5, ARENA_BYTES)], writable=True), [fd()], 100)
        assert session.arenas == {}
        call = reserve(session, [(Grant.GRANTED, 3, 70), (Grant.KNOWN, 0, 0), (Grant.GRANTED, 1, 71)], [5, 0, 5])
        mapping = session.writable[5]
        assert call.spans == [(mapping, 6 * PAGE_BYTES), None, (mapping, 2 * PAGE_BYTES)]

    @pytest.mark.parametrize(("slot", "arena"), [(8, 5), (7, 6), (1 << 31, 5)])
    def test_believes_no_slot_outside_of_what_it_may_write_to(
        self, fd: Callable[[], int], slot: int, arena: int
    ) -> None:
        session = welcomed(Mode.DIRECT, [fd()])
        session.receive(frames.build_arenas([(5, ARENA_BYTES)], writable=True), [fd()], 100)
        session.receive(frames.build_arenas([(6, ARENA_BYTES)]), [fd()], 100)  # to read
        with pytest.raises(ProtocolError, match="beyond the ring, or in no arena"):
            reserve(session, [(Grant.GRANTED, slot, 70)], [arena])

    def test_takes_no_writable_arena_in_another_mode(self, fd: Callable[[], int]) -> None:
        session = welcomed(Mode.COPY, [fd(), fd()])
        with pytest.raises(ProtocolError, match="for mode direct"):
            session.receive(frames.build_arenas([(5, ARENA_BYTES)], writable=True), [fd()], 100)

    def test_says_that_an_arena_is_dropped_when_both_maps_are_gone(self, fd: Callable[[], int]) -> None:
        session = welcomed(Mode.DIRECT, [fd()])
        session.receive(frames.build_arenas([(5, ARENA_BYTES)]), [fd()], 100)
        session.receive(frames.build_arenas([(5, ARENA_BYTES)], writable=True), [fd()], 100)
        reading, writing = session.arenas[5], session.writable[5]
        session.receive(frames.build_arena_gone(5), (), 100)
        assert (session.arenas, session.writable) == ({}, {})
        assert reading.gone
        assert writing.gone
        gc.collect()
        assert not session.has_chores
        del reading
        gc.collect()
        assert not session.has_chores, "it is still mapped for writing"
        del writing
        gc.collect()
        assert list(session.chores()) == [frames.build_arena_dropped(5)]

    def test_keeps_the_map_of_a_slot_for_a_copy_that_outlives_the_session(self, fd: Callable[[], int]) -> None:
        session = welcomed(Mode.DIRECT, [fd()])
        session.receive(frames.build_arenas([(5, ARENA_BYTES)], writable=True), [fd()], 100)
        (span,) = reserve(session, [(Grant.GRANTED, 1, 70)], [5]).spans
        session.end()
        gc.collect()
        assert span is not None
        ctypes.memset(span[0].address + span[1], 1, 5000)  # a map that is gone would kill this process

    def test_a_flag_of_arena_is_what_makes_it_writable(self) -> None:
        frame = frames.build_arenas([(5, ARENA_BYTES)], writable=True)
        assert frames.parse_head(frame, len(frame)).flags == Flag.WRITABLE
        frame = frames.build_arenas([(5, ARENA_BYTES)])
        assert frames.parse_head(frame, len(frame)).flags == 0


class TestRing:
    @pytest.mark.parametrize("length", [1, BOUNCE_BYTES, BOUNCE_BYTES + 1, 3 * BOUNCE_BYTES - 7])
    def test_every_byte_comes_through_the_buffer(self, length: int) -> None:
        source = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
        target = np.zeros(length + 1, dtype=np.uint8)
        Bounce().copy([(target.ctypes.data, source.ctypes.data, length)])
        assert np.array_equal(target[:length], source)
        assert target[length] == 0

    def test_has_a_ring_to_store_through(self, fd: Callable[[], int]) -> None:
        session = welcomed(Mode.RING, [fd(), fd()])
        assert session.ring is not None
        assert session.store_bytes == ARENA_BYTES
