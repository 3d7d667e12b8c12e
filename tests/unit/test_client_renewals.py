"""A fetch in several parts: those that do not stream are renewed while another one does; what was renewed counts."""

from pathlib import Path

import numpy as np
import pytest

from kvclient.aio import AsyncNamespace
from kvclient.calls import LeaseCall
from kvclient.protocol import Session
from kvclient.stream import AHEAD_NS, Part, Renewals
from kvproto import frames
from kvproto.frames import Verb
from kvproto.limits import KEYS_PER_FRAME
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, client_of, fill, keys_of, namespace_of, wait_until
from tests.unit.test_client_protocol import FAR_NS, KEYS, NAMESPACE, head_of, leased, ready, session_with_arenas
from tests.unit.test_client_stream_aio import KEYS as FIVE
from tests.unit.test_client_stream_aio import with_blocks_on_disk

TTL_NS = 300


def part_of(session: Session, lease: int, coming: int) -> Part:
    """A part of three blocks, leased at 200 until 500, of which so many are still to come."""
    call = LeaseCall(session, NAMESPACE, KEYS, ttl_ns=TTL_NS, wait_ns=100_000, deadline_ns=FAR_NS)
    session.submit(call, 150)
    session.receive(leased(call.request, lease, [(4, 0)] * (3 - coming), 200 + TTL_NS, coming), [], 200)
    assert call.part is not None
    return call.part


def renewed(session: Session, now_ns: int, deadline_ns: int = 0) -> list[int]:
    """Leases that are renewed now; the daemon grants each as much as it asks for, or until `deadline_ns`."""
    numbers = []
    for frame in list(session.renewals(now_ns)):
        head = head_of(frame)
        assert head.verb == Verb.RENEW
        lease, ttl_ns = frames.RENEW_BODY.unpack_from(frame, head.body)
        assert ttl_ns == TTL_NS
        numbers.append(lease)
        body = frames.CLOCK_BODY.pack(deadline_ns or now_ns + ttl_ns)
        session.receive(frames.build(Verb.RENEWED, head.request, body), [], now_ns)
    return numbers


def three(session: Session) -> tuple[list[Part], Renewals]:
    """Of three parts the second one streams."""
    parts = [part_of(session, 8, 0), part_of(session, 9, 2), part_of(session, 10, 0)]
    renewals = Renewals(parts, 200)
    session.keep(renewals)
    return parts, renewals


def test_parts_are_renewed_in_time_until_all_has_come_and_once_more() -> None:
    session = session_with_arenas(4)
    (first, second, last), renewals = three(session)
    asked, now_ns = 0, 200
    while asked < 20:
        now_ns += 10
        numbers = renewed(session, now_ns)
        assert numbers in ([], [8, 10])
        asked += bool(numbers)
        assert min(first.deadline_ns, last.deadline_ns) >= now_ns + TTL_NS // 2
        assert second.deadline_ns == 500, "the daemon renews that one, unasked"
        assert session.has_chores
    assert 15 * TTL_NS // 3 < now_ns < 25 * TTL_NS // 3, "and not with every tick"
    now_ns += 80
    assert renewed(session, now_ns) == []
    session.receive(ready(9, 0, [(4, 1), (4, 2)], deadline_ns=now_ns + TTL_NS), [], now_ns)
    assert renewed(session, now_ns) == [8, 10]
    assert {part.deadline_ns for part in (first, second, last)} == {now_ns + TTL_NS}, "the caller has all it asked for"
    assert renewals.over
    assert not session.has_chores
    assert renewed(session, now_ns + 200) == []


def test_what_ended_its_own_stream_is_renewed_from_then_on() -> None:
    session = session_with_arenas(4)
    parts = [part_of(session, 8, 2), part_of(session, 9, 2)]
    renewals = Renewals(parts, 200)
    session.keep(renewals)
    assert renewed(session, 450) == []
    session.receive(ready(8, 0, [(4, 1), (4, 2)], deadline_ns=460 + TTL_NS), [], 460)
    assert renewed(session, 600) == [8]
    assert parts[0].deadline_ns == 600 + TTL_NS


def test_what_is_gone_or_given_back_is_left_alone() -> None:
    session = session_with_arenas(4)
    (first, _, _), renewals = three(session)
    assert renewed(session, 400, deadline_ns=1) == [8, 10]
    first.deadline_ns = 0
    assert renewed(session, 600) == [10]
    del renewals
    assert renewed(session, 800) == []
    assert not session.has_chores


def test_a_renewal_that_nobody_answers_is_no_silence() -> None:
    session = session_with_arenas(4)
    _parts, _renewals = three(session)
    assert len(list(session.renewals(400))) == 2
    assert not session.silent


def test_a_session_that_is_over_renews_nothing() -> None:
    session = session_with_arenas(4)
    _parts, _renewals = three(session)
    session.end()
    assert list(session.renewals(400)) == []


# -- over sockets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_renews_what_a_fetch_in_parts_has(tmp_path: Path, streams: bool) -> None:
    keys = keys_of(KEYS_PER_FRAME + 3)
    with Peer(tmp_path, arena_bytes=16 << 20) as peer, client_of(peer) as client:
        ns = namespace_of(client, 4096)

        def put() -> None:
            for key in keys:
                peer.put(key, bytes(4096))
            peer.on_disk = set(keys[-2:]) if streams else set()

        peer.do(put)
        with ns.fetch(keys, wait_s=PATIENCE_S, ttl_s=0.6) as lease:
            assert lease.expected == len(keys)
            assert [part.ttl_ns for part in lease._parts] == [AHEAD_NS, AHEAD_NS], "nobody could renew less in time"
            told_ns = lease._parts[0].deadline_ns
            if not streams:
                assert not client._connection.session().has_chores  # type: ignore[union-attr]
                return
            wait_until(lambda: lease._parts[0].deadline_ns > told_ns)
            assert Verb.RENEW in peer.seen
            renewals = lease._renewals
            peer.ready(2, 2)
            wait_until(lambda: renewals is not None and renewals.over)
            assert lease.blocks == len(keys)
            assert lease.valid()
        assert lease._renewals is None


def test_a_single_frame_is_leased_for_as_long_as_the_caller_says(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        fill(peer, FIVE, np.zeros((5, BLOCK_BYTES), np.uint8), 2)
        with ns.fetch(FIVE, wait_s=PATIENCE_S, ttl_s=0.6) as lease:
            assert [part.ttl_ns for part in lease._parts] == [6 * 10**8]
            assert lease._renewals is None


def test_what_has_been_renewed_and_not_been_read_yet_is_valid(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        async with ns.fetch(FIVE, wait_s=PATIENCE_S) as lease:
            (part,) = lease._parts
            part.deadline_ns = 1  # as if the caller had computed for long
            assert not lease.valid()
            peer.ready(1, 0)  # it is in the socket now, and the loop has not turned since
            assert lease.valid()
            part.deadline_ns = 1
            assert not lease.valid(), "once"

    with_blocks_on_disk(tmp_path, body)
