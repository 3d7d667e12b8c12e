"""A daemon that is absent, dead, silent, late or wrong: a miss within the deadline, and back again when it is."""

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvclient.copying import Move, copy
from kvclient.results import Reason
from kvproto import frames
from kvproto.errors import Code, Grant, RefusedError
from kvproto.frames import Head, Verb
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import Stopwatch, blocks_of, client_of, keys_of, namespace_of, pair, times, within

SHORT_S = 0.1
SLACK_S = 15.0  # what a deadline may be overrun by on a machine that is busy: less than who hangs takes, PATIENCE_S
KEYS, BLOCKS = keys_of(3), blocks_of(3)


def assert_misses(client: kvclient.Client, ns: kvclient.Namespace, *reasons: Reason) -> None:
    """Every verb ends soon, with nothing."""
    with Stopwatch(SLACK_S):
        with ns.fetch(KEYS, wait_s=SHORT_S) as lease:
            assert lease.blocks == 0
        match = ns.match(KEYS)
        assert (match.blocks, match.load_seconds) == (0, None)
        result = ns.store(KEYS, BLOCKS, wait=True, space_s=SHORT_S)
        assert (result.accepted, result.known) == (0, 0)
        assert set(result.reasons) <= set(reasons or [Reason.UNREACHABLE])
        assert ns.delete(KEYS) == 0
        assert ns.flush(SHORT_S).pending == 0
        assert client.ping() is None


def assert_works(client: kvclient.Client, ns: kvclient.Namespace) -> None:
    """The control: once there is a good daemon, everything goes."""
    within(PATIENCE_S, client, ns)
    assert client.wait_connected(PATIENCE_S)
    wait_until(lambda: client.ping() is not None)
    assert ns.store(KEYS, BLOCKS, wait=True).refused == ()
    with ns.fetch(KEYS) as lease:
        assert [bytes(view) for view in lease.views] == [block.tobytes() for block in BLOCKS]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "never came true"
        time.sleep(0.001)  # or the thread that is waited for waits for the GIL


# -- absent, gone, back --------------------------------------------------------------------------------------------


def test_without_a_daemon_everything_misses_at_once_and_works_when_one_comes(tmp_path: Path) -> None:
    with kvclient.connect(tmp_path, timeout_s=PATIENCE_S) as client:
        assert not client.connected
        assert "does not exist" in client.status.why_not
        assert not client.wait_connected(0)
        ns = namespace_of(client)
        assert_misses(client, ns)
        with Peer(tmp_path):
            assert_works(client, ns)


def test_a_socket_that_nobody_listens_at_is_no_daemon(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    dead.bind(str(tmp_path / "hot.sock"))
    dead.close()
    with kvclient.connect(tmp_path) as client:
        assert "nobody listens" in client.status.why_not


def test_a_daemon_that_dies_is_a_miss_until_it_is_back(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert_works(client, ns)
        peer.stop_listening()
        peer.hang_up()
        wait_until(lambda: not client.connected)
        assert_misses(client, ns)
        peer.listen_again()
        assert_works(client, ns)
        assert peer.hellos == 2


@pytest.mark.parametrize("verb", [Verb.LEASE, Verb.MATCH, Verb.RESERVE, Verb.COMMIT, Verb.DELETE, Verb.PING, Verb.OPEN])
def test_a_daemon_that_dies_instead_of_answering_is_an_immediate_miss(tmp_path: Path, verb: Verb) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        peer.instead[verb] = lambda peer, head, frame: peer._hang_up()
        with Stopwatch(SLACK_S):
            ns = namespace_of(client)
            ask: dict[Verb, Callable[[], object]] = {
                Verb.LEASE: lambda: ns.fetch(KEYS, wait_s=PATIENCE_S),
                Verb.MATCH: lambda: ns.match(KEYS),
                Verb.RESERVE: lambda: ns.store(KEYS, BLOCKS),
                Verb.COMMIT: lambda: ns.store(KEYS, BLOCKS),
                Verb.DELETE: lambda: ns.delete(KEYS),
                Verb.PING: client.ping,
                Verb.OPEN: lambda: ns.match(KEYS),
            }
            ask[verb]()
        del peer.instead[verb]
        assert_works(client, ns)


def test_blocks_whose_daemon_died_before_they_were_visible_have_failed(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        peer.publishing = False
        assert ns.store(KEYS, BLOCKS).accepted == 3
        peer.hang_up()
        flushed = ns.flush(PATIENCE_S)
        assert (flushed.visible, flushed.failed, flushed.pending) == (0, 3, 0)


def test_a_lease_outlives_its_session_until_its_deadline(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert_works(client, ns)
        with ns.fetch(KEYS, ttl_s=60) as lease:
            peer.hang_up()
            wait_until(lambda: peer.hellos == 2)
            targets = np.zeros_like(BLOCKS)
            assert lease.copy_to(targets)
            assert (targets == BLOCKS).all()
            assert not lease.renew(60)  # the new session does not know it
            assert lease.valid()
            ends_ns = lease.deadline_ns
            assert lease.was_valid(ends_ns - 1)
            assert not lease.was_valid(ends_ns)
        assert not lease.was_valid(ends_ns - 1), "it was given back"


# -- silent and late -----------------------------------------------------------------------------------------------


def test_a_silent_daemon_costs_one_deadline_and_then_nothing_until_it_speaks(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert ns.match(KEYS).blocks == 0
        within(SHORT_S, client, ns)
        peer.mute()
        began = time.monotonic()
        assert client.ping() is None
        assert time.monotonic() - began >= SHORT_S
        assert client.connected
        assert "in time" in client.status.why_not
        with Stopwatch(SLACK_S):
            for _ in range(4 * int(SLACK_S / SHORT_S)):  # each of them at once
                assert ns.match(KEYS).blocks == 0
        assert_misses(client, ns)
        peer.answer_held()
        assert_works(client, ns)
        assert peer.hellos == 1


@pytest.mark.parametrize("verb", [Verb.OPEN, Verb.RESERVE, Verb.COMMIT])
def test_a_store_without_an_answer_ends_at_its_deadline(tmp_path: Path, verb: Verb) -> None:
    with kvclient.connect(tmp_path, timeout_s=SHORT_S) as client:
        ns = namespace_of(client)  # not opened: there is no daemon yet
        with Peer(tmp_path) as peer:
            assert client.wait_connected(PATIENCE_S)
            peer.mute(verb)
            with Stopwatch(SLACK_S):
                assert ns.store(KEYS, BLOCKS, wait=True).reasons == {Reason.TIMED_OUT: 3}
            peer.answer_held()
            assert_works(client, ns)


def test_a_lease_granted_too_late_is_given_back(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.store(KEYS, BLOCKS, wait=True)
        within(SHORT_S, client, ns)
        peer.mute(Verb.LEASE)
        with Stopwatch(SLACK_S), ns.fetch(KEYS, wait_s=0) as lease:
            assert lease.blocks == 0
        assert not peer.leases
        peer.answer_held()
        peer.wait_for(lambda: len(peer.released) == 1 and peer.released == list(peer.leases))


def test_tickets_granted_too_late_are_aborted(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.match(KEYS)
        within(SHORT_S, client, ns)
        peer.mute(Verb.RESERVE)
        with Stopwatch(SLACK_S):
            assert ns.store(KEYS, BLOCKS).reasons == {Reason.TIMED_OUT: 3}
        peer.answer_held()
        peer.wait_for(lambda: len(peer.aborted) == 3)
        assert not peer.committed
        assert_works(client, ns)


def test_commits_confirmed_too_late_still_become_visible(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.match(KEYS)
        peer.mute(Verb.COMMIT)
        for _ in times(client, ns):
            assert ns.store(KEYS, BLOCKS).reasons == {Reason.TIMED_OUT: 3}
            if Verb.COMMIT in peer.seen:  # else RESERVE was answered too late
                break
        within(PATIENCE_S, client, ns)
        peer.answer_held()
        assert ns.flush(PATIENCE_S).visible == 3
        wait_until(lambda: client.ping() is not None)
        assert ns.store(KEYS, BLOCKS).known == 3


def test_a_fetch_waits_for_its_own_blocks_as_long_as_it_may(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.store(KEYS, BLOCKS, wait=True)
        within(SHORT_S, client, ns)
        peer.mute(Verb.LEASE)
        leases: list[int] = []

        def fetch() -> None:
            with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
                leases.append(lease.blocks)

        thread = threading.Thread(target=fetch)
        thread.start()
        peer.wait_for(lambda: Verb.LEASE in peer.seen)
        within(PATIENCE_S, client, ns)
        assert client.ping() is not None  # others are served meanwhile
        peer.answer_held()
        thread.join(PATIENCE_S)
        assert leases == [3]


def test_a_daemon_that_does_not_read_cannot_hold_up_a_send(tmp_path: Path) -> None:
    stuck = threading.Event()
    with Peer(tmp_path) as peer, client_of(peer, timeout_s=SHORT_S) as client:
        ns = namespace_of(client)
        keys = keys_of(1000)
        peer.instead[Verb.PING] = lambda *_: assert_set(stuck)
        try:
            with Stopwatch(SLACK_S):
                client.ping()
            link = client._connection._link
            assert link is not None
            frame = frames.build_match(1, 1, b"".join(keys))
            while link.try_send(frame):  # until the socket is full
                pass
            link.session.silent = False
            with Stopwatch(SLACK_S):
                assert ns.match(KEYS).blocks == 0
            assert not client.connected
            assert "does not read" in client.status.why_not
        finally:
            stuck.set()


def assert_set(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def test_hello_without_an_answer_ends_at_the_deadline(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        peer.mute(Verb.HELLO)
        with Stopwatch(SLACK_S), kvclient.connect(tmp_path, timeout_s=SHORT_S) as client:
            assert not client.connected
            assert "HELLO" in client.status.why_not


# -- wrong -----------------------------------------------------------------------------------------------------


def garbage(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(b"\xff" * 40)


def half_an_answer(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.HEAD.pack(Verb.LEASED, 0, 3, head.request, 0, 0, 40) + bytes(20))


def too_long(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.HEAD.pack(Verb.LEASED, 0, 3, head.request, 0, 0, 70_000) + bytes(70_000))


def an_answer_to_nobody(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.build(Verb.PONG, head.request + 1, bytes(8)))


def another_answer(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.build(Verb.PONG, head.request, bytes(8)))


def an_unknown_verb(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.HEAD.pack(250, 0, 0, 0, 0, 0, 0))


def an_arena_too_small(peer: Peer, head: Head, frame: bytes) -> None:
    fd = os.memfd_create("small")
    peer.send(frames.build_arenas([(77, 1 << 20)]), [fd])
    os.close(fd)


def descriptors_from_nowhere(peer: Peer, head: Head, frame: bytes) -> None:
    fd = os.memfd_create("extra")
    peer.send(frames.build_arenas([]), [fd, fd])
    os.close(fd)


def a_goodbye(peer: Peer, head: Head, frame: bytes) -> None:
    peer.send(frames.build_failure(Verb.GOAWAY, 0, Code.SHUTTING_DOWN, "restarting"))


@pytest.mark.parametrize(
    "wrong",
    [
        garbage, half_an_answer, too_long, an_answer_to_nobody, another_answer, an_unknown_verb,
        an_arena_too_small, descriptors_from_nowhere, a_goodbye,
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_a_daemon_that_misspeaks_is_left_and_tried_anew(
    tmp_path: Path, wrong: Callable[[Peer, Head, bytes], None]
) -> None:
    gc.collect()  # of earlier tests
    before = descriptors()
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        peer.instead[Verb.LEASE] = wrong
        with Stopwatch(SLACK_S), ns.fetch(KEYS) as lease:
            assert lease.blocks == 0
        wait_until(lambda: peer.hellos == 2)
        del peer.instead[Verb.LEASE]
        assert_works(client, ns)
    gc.collect()
    assert descriptors() == before


def test_a_lease_on_places_that_do_not_exist_is_void(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert_works(client, ns)
        session = client._connection.session()
        assert session is not None
        arena = session.arenas[1]
        wait_until(lambda: not arena.cold)  # while it is cold, places are looked up as soon as they come
        ns.fetch(KEYS).release()
        peer.instead[Verb.LEASE] = lambda peer, head, _: peer.send(
            peer.leased(head.request, 10**9, [(1, 0), (1, 10**6)])
        )
        target = np.zeros_like(BLOCKS)
        with ns.fetch(KEYS) as lease:
            assert lease.views == ()
            assert not lease.copy_to(target[:2])
            assert not lease.valid()
        assert not target.any()
        assert "broke the protocol" in client.status.why_not
        del peer.instead[Verb.LEASE]
        assert_works(client, ns)


def test_why_the_daemon_said_goodbye_is_in_the_status(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        peer.stop_listening()
        peer.do(lambda: a_goodbye(peer, Head(0, 0, 0, 0, 0, 0, 0), b""))
        wait_until(lambda: not client.connected)
        assert client.ping() is None
        peer.wait_for(lambda: peer._sock is None)
        assert "restarting" in client._connection._why_not or "no daemon" in client.status.why_not


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_daemon_with_another_clock_is_refused(tmp_path: Path, sign: int) -> None:
    with Peer(tmp_path) as peer:
        peer.clock_offset_ns = sign * int((PATIENCE_S + 1) * 1e9)  # more than passes between HELLO and its answer
        with pytest.raises(RefusedError, match="clock"):
            kvclient.connect(tmp_path, timeout_s=PATIENCE_S)
        peer.clock_offset_ns = 0
        with client_of(peer) as client:
            assert client.ping() is not None


def test_a_daemon_that_will_not_have_this_client_says_why(tmp_path: Path) -> None:
    def refuse(peer: Peer, head: Head, frame: bytes) -> None:
        peer.send(frames.build_failure(Verb.GOAWAY, 0, Code.REFUSED, "no such tenant"))

    with Peer(tmp_path) as peer:
        peer.instead[Verb.HELLO] = refuse
        with pytest.raises(RefusedError, match="no such tenant"):
            kvclient.connect(tmp_path, tenant="red", timeout_s=PATIENCE_S)


def test_a_refusal_in_the_background_is_in_the_status_and_tried_again(tmp_path: Path) -> None:
    def refuse(peer: Peer, head: Head, frame: bytes) -> None:
        peer.seen.append(Verb.GOAWAY)
        peer.send(frames.build_failure(Verb.FAILED, head.request, Code.REFUSED, "no such tenant"))

    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        peer.instead[Verb.HELLO] = refuse
        peer.hang_up()
        peer.wait_for(lambda: peer.seen.count(Verb.GOAWAY) >= 2)
        assert "no such tenant" in client.status.why_not
        del peer.instead[Verb.HELLO]
        assert_works(client, ns)


# -- arenas taken back ---------------------------------------------------------------------------------------------


def test_an_arena_taken_back_is_dropped_once_nothing_reads_it(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert_works(client, ns)
        with ns.fetch(KEYS) as lease:
            views = lease.views
            peer.take_back(1)
            assert client.ping() is not None  # it has been read
            assert bytes(views[0]) == BLOCKS[0].tobytes()
            assert not peer.dropped
            array = np.frombuffer(views[1], np.uint8)
            del views
        client.ping()
        assert not peer.dropped
        assert (array == BLOCKS[1]).all()
        del array, lease
        peer.wait_for(lambda: peer.dropped == [1])
        assert_works(client, ns)  # in another arena
        assert 2 in peer.arenas


def test_an_idle_client_drops_an_arena_by_itself(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        assert_works(client, namespace_of(client))
        peer.take_back(1)
        peer.wait_for(lambda: peer.dropped == [1])


def test_an_arena_taken_back_right_after_the_lease_is_kept_for_it(tmp_path: Path) -> None:
    def lease_and_take_back(peer: Peer, head: Head, frame: bytes) -> None:
        peer.lease(head, frame)
        peer.send(frames.build_arena_gone(1))

    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.store(KEYS, BLOCKS, wait=True)
        peer.instead[Verb.LEASE] = lease_and_take_back
        with ns.fetch(KEYS) as lease:
            assert client.ping() is not None  # ARENA_GONE has been read
            targets = np.zeros_like(BLOCKS)
            assert lease.copy_to(targets)
            assert (targets == BLOCKS).all()
            assert not peer.dropped
        del lease
        peer.wait_for(lambda: peer.dropped == [1])


def test_the_ring_is_not_unmapped_under_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)

        def copy_after_the_end(moves: Iterable[Move]) -> None:
            monkeypatch.setattr("kvclient.flows.copy", copy)
            peer.hang_up()
            wait_until(lambda: peer.hellos == 2)
            copy(moves)

        monkeypatch.setattr("kvclient.flows.copy", copy_after_the_end)
        assert ns.store(KEYS, BLOCKS).reasons == {Reason.UNREACHABLE: 3}
        assert_works(client, ns)


def test_a_grant_from_a_full_peer_does_not_loop(tmp_path: Path) -> None:
    with pair(tmp_path, timeout_s=SHORT_S) as (peer, ns):
        peer.grants = [Grant.BUSY] * 100_000
        with Stopwatch(SLACK_S):
            result = ns.store(KEYS, BLOCKS, space_s=SHORT_S)
        assert result.reasons == {Reason.BUSY: 3}
