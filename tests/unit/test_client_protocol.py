"""The client's protocol without sockets, threads or a clock: frames in, frames out."""

from collections.abc import Callable, Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvclient.calls import (
    Call,
    CommitCall,
    HelloCall,
    LeaseCall,
    MatchCall,
    OpenCall,
    Opened,
    PingCall,
    ReserveCall,
)
from kvclient.ledger import Ledger, Settled
from kvclient.mapping import Mapping, Place
from kvclient.protocol import ABANDONED_CALLS, Session
from kvclient.results import Reason
from kvclient.stream import Arrival, Part
from kvproto import frames
from kvproto.errors import Code, Grant, KvError, Outcome, ProtocolError, RefusedError, UsageError
from kvproto.frames import Head, Hello, Mode, Ready, Verb, Welcome
from kvproto.limits import KEYS_PER_FRAME, PAGE_BYTES, PROTOCOL_VERSION

ARENA_BYTES = 1 << 20
NAMESPACE = Opened(number=7, slot_bytes=8192, block_bytes=5000)
KEYS = b"k" * 96
FAR_NS = 10**15


class FakeMap:
    """Stands for a mapping: the protocol only looks at its size and marks it."""

    def __init__(self, map_bytes: int, unmapped: Callable[[], None] | None, cold: Sequence[int] = ()) -> None:
        self.address = 1 << 30
        self.bytes = map_bytes
        self.gone = False
        self.cold = set(cold)
        self.unmapped = unmapped

    def __del__(self) -> None:
        if self.unmapped is not None:
            self.unmapped()


class FakeMemory:
    """Maps nothing."""

    def __init__(self) -> None:
        self.cold: Sequence[int] = ()  # steps of the next arenas that are not populated
        self.warmed: list[Place] = []

    def map_arena(self, fd: int, map_bytes: int, unmapped: Callable[[], None]) -> Mapping:
        return cast("Mapping", FakeMap(map_bytes, unmapped, self.cold))

    def map_ring(self, fd: int, map_bytes: int, unmapped: Callable[[], None] | None = None) -> Mapping:
        return cast("Mapping", FakeMap(map_bytes, unmapped))

    def warm(self, places: Sequence[Place], length: int) -> None:
        self.warmed += places

    def populate(self, mapping: Mapping, offset: int, length: int) -> None:
        raise AssertionError("nothing is cold")


def welcome(clock_ns: int = 50, **changes: int) -> Welcome:
    fields = {"version": PROTOCOL_VERSION, "ring_bytes": 64 * PAGE_BYTES, "keys_per_frame": KEYS_PER_FRAME, **changes}
    return Welcome(
        version=fields["version"], mode=Mode.COPY, session=3, clock_ns=clock_ns, ring_bytes=fields["ring_bytes"],
        lease_ttl_ns_max=60 * 10**9, ticket_ttl_ns=30 * 10**9, keys_per_frame=fields["keys_per_frame"],
        tenant="t", notes="",
    )  # fmt: skip


def welcomed() -> Session:
    session = Session(FakeMemory())
    call = HelloCall(session, Hello("test"), FAR_NS)
    head = head_of(session.submit(call, 0))
    session.receive(frames.build_welcome(head.request, welcome()), [10, 11], 100)
    assert call.done
    assert call.answered
    return session


def head_of(frame: bytes) -> Head:
    return frames.parse_head(frame, len(frame))


def leased(
    request: int, lease: int, places: Sequence[tuple[int, int]], deadline_ns: int = 500, coming: int = 0
) -> bytes:
    body = frames.LEASED_HEAD.pack(lease, deadline_ns, coming) + b"".join(
        frames.LOCATION.pack(*place) for place in places
    )
    return frames.build(Verb.LEASED, request, body, count=len(places))


def reserved(request: int, items: Sequence[tuple[int, int, int]]) -> bytes:
    body = b"".join(frames.RESERVED_ITEM.pack(*item) for item in items)
    return frames.build(Verb.RESERVED, request, body, count=len(items))


def pong(request: int) -> bytes:
    return frames.build(Verb.PONG, request, frames.CLOCK_BODY.pack(request))


def lease_call(session: Session) -> LeaseCall:
    return LeaseCall(session, NAMESPACE, KEYS, ttl_ns=10, wait_ns=0, deadline_ns=FAR_NS)


def reserve_call(session: Session, commits: Sequence[int] = (), ledger: Ledger | None = None) -> ReserveCall:
    keys = [KEYS[:32]] * 3
    return ReserveCall(
        session, NAMESPACE, parent=None, keys=keys, commits=commits, ledger=ledger or Ledger(Ledger()),
        deadline_ns=FAR_NS,
    )  # fmt: skip


def with_head(data: st.DataObject) -> bytes:
    """A frame whose head is right, around a body that need not be."""
    body = data.draw(st.binary(max_size=120))
    verb = data.draw(st.sampled_from(Verb))
    return frames.HEAD.pack(
        verb, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 6)),
        0, 0, len(body),
    ) + body  # fmt: skip


# -- HELLO -----------------------------------------------------------------------------------------------------


def test_a_welcome_whose_clock_lies_within_the_round_trip_is_taken() -> None:
    session = welcomed()
    assert session.welcome is not None
    assert session.welcome.tenant == "t"
    assert session.ring is not None
    assert session.ring.bytes == 64 * PAGE_BYTES


@pytest.mark.parametrize("clock_ns", [9, 101])
def test_a_welcome_from_another_clock_is_refused(clock_ns: int) -> None:
    session = Session(FakeMemory())
    request = head_of(session.submit(HelloCall(session, Hello("test"), FAR_NS), 10)).request
    with pytest.raises(RefusedError, match="clock"):
        session.receive(frames.build_welcome(request, welcome(clock_ns)), [10, 11], 100)


@pytest.mark.parametrize(("fds", "changes"), [([10], {}), ([10, 11, 12], {}), ([10, 11], {"keys_per_frame": 8})])
def test_a_welcome_that_cannot_be_used_breaks_the_protocol(fds: list[int], changes: dict[str, int]) -> None:
    session = Session(FakeMemory())
    request = head_of(session.submit(HelloCall(session, Hello("test"), FAR_NS), 0)).request
    with pytest.raises(ProtocolError):
        session.receive(frames.build_welcome(request, welcome(**changes)), fds, 100)


def test_a_goodbye_instead_of_welcome_carries_its_reason() -> None:
    session = Session(FakeMemory())
    session.submit(HelloCall(session, Hello("test"), FAR_NS), 0)
    with pytest.raises(RefusedError, match="not you"):
        session.receive(frames.build_failure(Verb.GOAWAY, 0, Code.REFUSED, "not you"), [], 100)
    assert session.goodbye == "not you (REFUSED)"


# -- requests and answers ----------------------------------------------------------------------------------------


def test_request_numbers_wrap_past_the_end_and_past_calls_that_are_still_out() -> None:
    session = welcomed()
    first = PingCall(session, FAR_NS)
    session.submit(first, 0)
    session._request = (1 << 32) - 2
    numbers = [head_of(session.submit(PingCall(session, FAR_NS), 0)).request for _ in range(3)]
    assert first.request not in numbers
    assert numbers == [(1 << 32) - 1, 1, 3]  # 0 never, 2 is out


def test_answers_find_their_calls_in_any_order() -> None:
    session = welcomed()
    one, two = PingCall(session, FAR_NS), PingCall(session, FAR_NS)
    for call in (one, two):
        session.submit(call, 0)
    session.receive(pong(two.request), [], 200)
    assert (one.done, two.done) == (False, True)
    session.receive(pong(one.request), [], 300)
    assert (one.heard_ns, two.heard_ns) == (300, 200)


def test_a_failed_request_leaves_the_session_alive() -> None:
    session = welcomed()
    call = OpenCall(session, b"identity", 5000, FAR_NS)
    session.submit(call, 0)
    session.receive(frames.build_failure(Verb.FAILED, call.request, Code.BAD_ARGUMENT, "too large"), [], 200)
    assert isinstance(call.error, UsageError)
    assert call.done
    assert not call.answered
    assert not session.over
    ping = PingCall(session, FAR_NS)
    session.submit(ping, 0)
    session.receive(pong(ping.request), [], 300)
    assert ping.answered


@pytest.mark.parametrize(
    "frame",
    [
        pong(99),  # nobody asked
        b"",
        b"short",
        frames.build(Verb.OPENED, 2, frames.OPENED_BODY.pack(1, 4096)),  # an answer to another verb
        frames.build(Verb.PONG, 2, b"short"),
        frames.build(Verb.PONG, 2, frames.CLOCK_BODY.pack(77)),  # not what PING said
        frames.build(Verb.HELLO, 0),  # a client's verb
        frames.HEAD.pack(200, 0, 0, 0, 0, 0, 0),  # no verb at all
        frames.build_published([(5, 0)]),  # a ticket that was never committed
        frames.build_arena_gone(4),
        frames.build_arenas([(1, 4096)]),  # without a descriptor
        frames.build(Verb.GOAWAY, 0),  # without a code
    ],
    ids=lambda frame: frame[:1].hex(),
)
def test_what_no_daemon_says_breaks_the_protocol(frame: bytes) -> None:
    session = welcomed()
    call = PingCall(session, FAR_NS)
    session.submit(call, 0)
    assert call.request == 2
    with pytest.raises(ProtocolError):
        session.receive(frame, [], 200)
    session.receive(pong(2), [], 300)  # the control: the right frame is taken
    assert call.answered


def test_more_matched_blocks_than_keys_break_the_protocol() -> None:
    session = welcomed()
    call = MatchCall(session, 7, KEYS, FAR_NS)
    session.submit(call, 0)
    with pytest.raises(ProtocolError):
        session.receive(frames.build(Verb.MATCHED, call.request, frames.MATCHED_BODY.pack(1, 2, 0, 1, 0, 0)), [], 200)
    session.receive(frames.build(Verb.MATCHED, call.request, frames.MATCHED_BODY.pack(0, 2, 0, 1, 0, 0)), [], 200)
    assert call.matched is not None
    assert call.matched.dram == 2


@given(frame=st.one_of(st.binary(max_size=200), st.builds(with_head, st.data())), fds=st.lists(st.just(10), max_size=2))
def test_whatever_comes_either_is_taken_or_breaks_the_protocol(frame: bytes, fds: list[int]) -> None:
    session = session_with_arenas(4)
    session.commit([1, 2, 3], Ledger(Ledger()))
    for call in (lease_call(session), reserve_call(session), MatchCall(session, 7, KEYS, FAR_NS)):
        session.submit(call, 0)
    part = streaming_part(session, coming=2)
    try:
        session.receive(frame, fds, 200)
        assert part.blocks + part.coming <= part.promised
    except KvError:
        session.end()


# -- leases and arenas -------------------------------------------------------------------------------------------


def session_with_arenas(*arenas: int, cold: Sequence[int] = ()) -> Session:
    session = welcomed()
    cast("FakeMemory", session.memory).cold = cold
    session.receive(frames.build_arenas([(arena, ARENA_BYTES) for arena in arenas]), list(arenas), 150)
    return session


def test_a_lease_finds_its_places() -> None:
    session = session_with_arenas(4, 5)
    call = lease_call(session)
    session.submit(call, 0)
    session.receive(leased(call.request, 9, [(5, 0), (4, 3)]), [], 200)
    assert call.part is not None
    assert call.part.deadline_ns == 500
    assert call.part.places() == [(session.arenas[5], 0), (session.arenas[4], 3 * 8192)]


def test_no_blocks_are_no_lease() -> None:
    session = welcomed()
    call = lease_call(session)
    session.submit(call, 0)
    session.receive(leased(call.request, 0, [], 0), [], 200)
    assert call.answered
    assert call.part is None


@pytest.mark.parametrize(
    ("lease", "places"),
    [(0, [(4, 0)]), (9, []), (9, [(4, 0)] * 4)],
    ids=["blocks without a lease", "a lease without blocks", "more blocks than keys"],
)
def test_a_lease_that_contradicts_itself_breaks_the_protocol(lease: int, places: list[tuple[int, int]]) -> None:
    session = session_with_arenas(4)
    call = lease_call(session)
    session.submit(call, 0)
    with pytest.raises(ProtocolError):
        session.receive(leased(call.request, lease, places), [], 200)


def streaming_part(session: Session, coming: int, lease: int = 9) -> Part:
    call = LeaseCall(session, NAMESPACE, KEYS, ttl_ns=10, wait_ns=100, deadline_ns=FAR_NS)
    session.submit(call, 150)
    session.receive(leased(call.request, lease, [(4, 0)] * (3 - coming), coming=coming), [], 200)
    assert call.part is not None
    return call.part


def ready(
    lease: int, left: int, places: Sequence[tuple[int, int]] = (), deadline_ns: int = 600, disk: int = 0
) -> bytes:
    return frames.build_ready(Ready(lease, deadline_ns, left, disk, places))


def test_blocks_that_come_later_find_their_places_whatever_has_become_of_the_arenas_before() -> None:
    session = session_with_arenas(4)
    part = streaming_part(session, coming=2)
    assert (part.blocks, part.coming, part.promised, part.until_ns) == (1, 2, 3, 250)
    old = session.arenas[4]
    session.receive(frames.build_arena_gone(4), [], 250)
    session.receive(frames.build_arenas([(4, ARENA_BYTES)]), [12], 260)
    session.receive(ready(9, 1, [(4, 3)], disk=1), [], 270)
    session.receive(ready(9, 0, [(4, 5)]), [], 280)
    assert part.places() == [(old, 0), (session.arenas[4], 3 * 8192), (session.arenas[4], 5 * 8192)]
    assert (part.blocks, part.coming, part.disk, part.deadline_ns) == (3, 0, 1, 600)
    session.receive(ready(9, 0), [], 290)  # it has ended: not even wrong
    assert part.blocks == 3


def test_who_waits_for_blocks_is_woken_by_more_of_them_or_by_the_end_and_by_nothing_else() -> None:
    session = session_with_arenas(4)
    part = streaming_part(session, coming=2)
    one, other = Arrival(part, FAR_NS), Arrival(part, FAR_NS)
    one.watch()
    other.watch()
    session.receive(ready(9, 2), [], 210)
    assert (one.done, other.done) == (False, False)
    other.leave()
    session.receive(ready(9, 1, [(4, 1)]), [], 220)
    assert (one.done, other.done) == (True, False)
    last = Arrival(part, FAR_NS)
    last.watch()
    session.end()
    assert last.done
    assert part.coming == 0
    late = Arrival(part, FAR_NS)
    late.watch()
    assert late.done
    assert not part.watchers


def test_a_ready_for_a_lease_that_never_streamed_breaks_the_protocol() -> None:
    session = session_with_arenas(4)
    with pytest.raises(ProtocolError, match="no blocks to come"):
        session.receive(ready(9, 0, [(4, 0)]), [], 200)
    part = streaming_part(session, coming=1)
    part.stop()
    session.receive(ready(9, 0, [(4, 0)]), [], 200)
    assert part.blocks == 2
    with pytest.raises(ProtocolError, match="no blocks to come"):
        session.receive(ready(10, 0, [(4, 0)]), [], 200)


def test_a_wrong_ready_leaves_the_part_as_it_was() -> None:
    session = session_with_arenas(4)
    part = streaming_part(session, coming=2)
    for places, left in ([(4, 0)] * 3, 0), ([(4, 0)], 2), ([(4, 0), (6, 0)], 0), ([(4, 1 << 20)], 1):
        with pytest.raises(ProtocolError):
            session.receive(ready(9, left, places), [], 210)
        assert (part.blocks, part.coming, len(part.places())) == (1, 2, 1)
    session.receive(ready(9, 0, [(4, 1)] * 2), [], 220)
    assert (part.blocks, part.coming) == (3, 0)


def test_cold_arenas_are_warmed_for_blocks_that_come_later() -> None:
    session = session_with_arenas(4, cold=[0])
    streaming = streaming_part(session, coming=2)
    memory = cast("FakeMemory", session.memory)
    memory.warmed.clear()
    session.receive(ready(9, 0, [(4, 7), (4, 6)]), [], 210)
    assert [offset for _, offset in memory.warmed] == [7 * 8192, 6 * 8192]
    assert streaming.cold
    session.arenas[4].cold = set()
    assert not streaming.cold


@pytest.mark.parametrize("place", [(6, 0), (4, ARENA_BYTES // 8192), (4, (1 << 32) - 1)])
def test_places_that_do_not_exist_are_never_given_out(place: tuple[int, int]) -> None:
    session = session_with_arenas(4)
    call = lease_call(session)
    session.submit(call, 0)
    session.receive(leased(call.request, 9, [(4, ARENA_BYTES // 8192 - 1), place]), [], 200)
    assert call.part is not None
    with pytest.raises(ProtocolError):
        call.part.places()


def test_an_arena_that_is_taken_back_lives_until_its_last_lease_and_then_is_said_to_be_dropped() -> None:
    session = session_with_arenas(4, 5)
    call = lease_call(session)
    session.submit(call, 0)
    session.receive(leased(call.request, 9, [(4, 0)]), [], 200)
    part, call.part = call.part, None
    assert part is not None
    places = part.places()
    session.receive(frames.build_arena_gone(4), [], 250)
    session.receive(frames.build_arena_gone(5), [], 250)
    assert places[0][0].gone
    assert not session.arenas
    assert list(session.chores()) == [frames.build_arena_dropped(5)]  # nobody reads that one
    del part, places
    assert list(session.chores()) == [frames.build_arena_dropped(4)]


def test_an_arena_comes_once() -> None:
    session = session_with_arenas(4)
    with pytest.raises(ProtocolError, match="twice"):
        session.receive(frames.build_arenas([(4, ARENA_BYTES)]), [12], 200)


def test_cold_arenas_are_warmed_in_the_order_of_the_lease() -> None:
    session = session_with_arenas(4, 5, cold=[0])
    call = lease_call(session)
    session.submit(call, 0)
    session.receive(leased(call.request, 9, [(5, 1), (4, 3), (5, 0)]), [], 200)
    memory = cast("FakeMemory", session.memory)
    assert [(place[0] is session.arenas[5], place[1]) for place in memory.warmed] == [
        (True, 8192), (False, 3 * 8192), (True, 0),
    ]  # fmt: skip
    for mapping in session.arenas.values():
        mapping.cold = set()
    memory.warmed.clear()
    session.submit(again := lease_call(session), 0)
    session.receive(leased(again.request, 10, [(5, 1)]), [], 200)
    assert not memory.warmed


def test_releases_ride_on_the_next_frame_and_otherwise_are_a_chore() -> None:
    session = welcomed()
    session.releases.extend([21, 22])
    frame = session.submit(PingCall(session, FAR_NS), 0)
    assert frames.riders(frame, head_of(frame))[0] == (21, 22)
    assert not session.has_chores
    session.releases.extend(range(1, 1501))
    heads = [(head_of(frame), frame) for frame in session.chores()]
    assert [(head.verb, head.releases) for head, _ in heads] == [(Verb.RELEASE, 1024), (Verb.RELEASE, 476)]


# -- late answers ------------------------------------------------------------------------------------------------


def test_a_lease_that_comes_too_late_is_given_back() -> None:
    session = session_with_arenas(4)
    call = lease_call(session)
    session.submit(call, 160)
    session.abandon(call)
    assert call.lost is Reason.TIMED_OUT
    session.receive(leased(call.request, 9, [(4, 0)]), [], 200)
    assert list(session.releases) == [9]
    session.submit(in_time := lease_call(session), 210)  # the control
    session.receive(leased(in_time.request, 10, [(4, 0)]), [], 220)
    assert not session.releases


def test_tickets_that_come_too_late_are_aborted() -> None:
    session = welcomed()
    call = reserve_call(session)
    session.submit(call, 160)
    session.abandon(call)
    session.receive(
        reserved(call.request, [(Grant.GRANTED, 0, 31), (Grant.KNOWN, 0, 0), (Grant.GRANTED, 2, 32)]), [], 200
    )
    (frame,) = session.chores()
    assert frames.parse_tickets(frame, head_of(frame)) == (31, 32)


def test_a_daemon_that_missed_a_deadline_is_silent_until_any_frame_comes() -> None:
    session = welcomed()
    call = PingCall(session, FAR_NS)
    session.submit(call, 160)
    session.abandon(call)
    assert session.silent
    session.receive(pong(call.request), [], 200)
    assert not session.silent


def test_a_missed_deadline_of_a_daemon_that_speaks_is_no_silence() -> None:
    session = welcomed()
    slow, quick = PingCall(session, FAR_NS), PingCall(session, FAR_NS)
    for call in (slow, quick):
        session.submit(call, 160)
    session.receive(pong(quick.request), [], 200)
    session.abandon(slow)
    assert not session.silent


def test_a_daemon_that_leaves_everything_unanswered_is_hopeless_in_the_end() -> None:
    session = welcomed()
    for _ in range(ABANDONED_CALLS):
        session.probe(160)
    assert not session.hopeless
    first = session._request
    session.probe(160)
    assert session.hopeless
    session.receive(pong(first), [], 200)
    assert not session.hopeless


# -- tickets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grant", "page"), [(Grant.GRANTED, 63), (Grant.DRAINING + 1, 0)], ids=["span beyond the ring", "unknown grant"]
)
def test_grants_that_do_not_exist_break_the_protocol(grant: int, page: int) -> None:
    session = welcomed()
    call = reserve_call(session)
    session.submit(call, 0)
    with pytest.raises(ProtocolError):
        session.receive(reserved(call.request, [(0, 0, 1), (0, 2, 2), (grant, page, 3)]), [], 200)
    session.receive(reserved(call.request, [(0, 0, 1), (0, 2, 2), (0, 62, 3)]), [], 200)
    assert call.answered


def test_outcomes_reach_the_store_and_its_namespace() -> None:
    session = welcomed()
    tally = Ledger()
    ledger, other = Ledger(tally), Ledger(tally)
    session.commit([1, 2, 3], ledger)
    frame = session.submit(reserve_call(session, [4], other), 0)
    assert frames.riders(frame, head_of(frame))[1] == (4,)
    assert (ledger.out, other.out, tally.out) == (3, 1, 4)
    watcher = Settled(ledger, 1, FAR_NS)
    watcher.watch()
    session.receive(frames.build_published([(1, Outcome.PUBLISHED)]), [], 200)
    assert not watcher.done
    session.receive(frames.build_published([(2, Outcome.STALE), (4, Outcome.DISCARDED)]), [], 200)
    assert watcher.done
    assert ledger.reasons == {2: Reason.STALE}
    assert other.reasons == {4: Reason.DISCARDED}
    assert (tally.published, tally.failed, tally.out) == (1, 2, 1)
    assert session.is_out(3)
    assert not session.is_out(2)


def test_a_ticket_is_published_once() -> None:
    session = welcomed()
    session.submit(CommitCall(session, [1], Ledger(), FAR_NS), 0)
    session.receive(frames.build_published([(1, Outcome.PUBLISHED)]), [], 200)
    with pytest.raises(ProtocolError):
        session.receive(frames.build_published([(1, Outcome.PUBLISHED)]), [], 200)


def test_an_unknown_outcome_breaks_the_protocol() -> None:
    session = welcomed()
    session.commit([1], Ledger())
    with pytest.raises(ProtocolError):
        session.receive(frames.build_published([(1, 3)]), [], 200)


def test_the_end_loses_every_call_and_fails_every_ticket() -> None:
    session = session_with_arenas(4)
    ledger = Ledger(Ledger())
    session.commit([1], ledger)
    calls: list[Call] = [PingCall(session, FAR_NS), lease_call(session)]
    woken: list[int] = []
    for number, call in enumerate(calls):
        session.submit(call, 0)
        call.wake = lambda number=number: woken.append(number)
    session.end()
    assert [call.lost for call in calls] == [Reason.UNREACHABLE] * 2
    assert woken == [0, 1]
    assert ledger.reasons == {1: Reason.UNREACHABLE}
    assert session.ring is None
    assert not session.arenas
    session.end()  # any number of times
    assert woken == [0, 1]
