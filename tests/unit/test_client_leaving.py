"""Who leaves a verb at the wrong moment, cancelled or interrupted: what the daemon had granted by then goes back."""

import asyncio
import contextlib
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvclient
import kvclient.aio
from kvclient.calls import Call, LeaseCall, PingCall, ReserveCall
from kvclient.copying import Move, copy
from kvclient.ledger import Waiter
from kvclient.link import Link
from kvclient.policy_calls import PinCall, PrefetchCall
from kvclient.stream import lead_of
from kvproto import frames
from kvproto.frames import Head, Verb
from kvproto.limits import KEYS_PER_FRAME
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, blocks_of, client_of, fill, keys_of, namespace_of, streaming
from tests.unit.client_policy_kit import Policies, teach

KEYS, BLOCKS = keys_of(4), blocks_of(4)
NEW_KEYS = keys_of(4, seed=2)
LONG = keys_of(KEYS_PER_FRAME + 1, seed=3)
CALLS = {Verb.LEASE: LeaseCall, Verb.RESERVE: ReserveCall, Verb.PIN: PinCall, Verb.PREFETCH: PrefetchCall}
AsyncVerb = Callable[[kvclient.aio.AsyncNamespace], Coroutine[Any, Any, object]]
PlainVerb = Callable[[kvclient.Namespace], object]


class Granting:
    """A peer that has blocks and grants whatever it is asked for, and what it knows of it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.policies: Policies = teach(peer)
        for key, block in zip(KEYS, BLOCKS, strict=True):
            peer.put(key, block.tobytes())
        peer.blocks |= dict.fromkeys(LONG, peer.blocks[KEYS[0]])

    def held(self, verb: Verb) -> int:
        """How many of its grants have not been given back."""
        peer = self.peer
        if verb is Verb.LEASE:
            return len(peer.leases) - len(peer.released)
        if verb is Verb.RESERVE:
            return len(peer._tickets)
        if verb is Verb.PIN:
            return len(self.policies.pins)
        return len(self.policies.prefetches) - len(peer.cancelled)

    def answer_only(self, verb: Verb, most: int) -> None:
        """From now on so many requests of this verb are answered, and no more."""
        usual = self.peer.instead.get(verb, Peer.lease)
        left = [most]

        def answer(peer: Peer, head: Head, frame: bytes) -> None:
            left[0] -= 1
            if left[0] >= 0:
                usual(peer, head, frame)

        self.peer.instead[verb] = answer

    def wait_answered(self, verb: Verb, times: int = 1) -> None:
        """Until it has seen as many of them, and has done with the last."""
        self.peer.wait_for(lambda: self.peer.seen.count(verb) >= times)
        self.peer.do(lambda: None)


async def _fetch(ns: kvclient.aio.AsyncNamespace, keys: list[bytes]) -> None:
    await ns.fetch(keys)


GRANTS: list[tuple[Verb, AsyncVerb, PlainVerb]] = [
    (Verb.LEASE, lambda ns: _fetch(ns, KEYS), lambda ns: ns.fetch(KEYS)),
    (Verb.RESERVE, lambda ns: ns.store(NEW_KEYS, BLOCKS), lambda ns: ns.store(NEW_KEYS, BLOCKS)),
    (Verb.PIN, lambda ns: ns.pin(KEYS, 60), lambda ns: ns.pin(KEYS, 60)),
    (Verb.PREFETCH, lambda ns: ns.prefetch(KEYS), lambda ns: ns.prefetch(KEYS)),
]
LONG_GRANTS: list[tuple[Verb, AsyncVerb, PlainVerb]] = [
    (Verb.LEASE, lambda ns: _fetch(ns, LONG), lambda ns: ns.fetch(LONG)),
    (Verb.PIN, lambda ns: ns.pin(LONG, 60), lambda ns: ns.pin(LONG, 60)),
    (Verb.PREFETCH, lambda ns: ns.prefetch(LONG), lambda ns: ns.prefetch(LONG)),
]


def named(case: object) -> str:
    """For a test's name."""
    return case.name if isinstance(case, Verb) else str(case) if isinstance(case, int) else ""


@contextlib.asynccontextmanager
async def pair(directory: Path) -> AsyncIterator[tuple[kvclient.aio.AsyncClient, kvclient.aio.AsyncNamespace]]:
    async with await kvclient.aio.connect(directory, timeout_s=PATIENCE_S) as client:
        yield client, await client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES)


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


# -- asyncio -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("verb", "ask", "_"), GRANTS, ids=named)
def test_a_task_cancelled_in_the_turn_of_its_answer_gives_back_what_that_granted(
    tmp_path: Path, verb: Verb, ask: AsyncVerb, _: PlainVerb
) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            task: asyncio.Task[object] = asyncio.create_task(ask(ns))
            await asyncio.sleep(0)  # it is asked
            granting.wait_answered(verb)
            assert granting.held(verb)
            client._connection.catch_up()
            await cancelled(task)
            await until(lambda: not granting.held(verb))
            if verb is not Verb.RESERVE:  # the control: who stays, keeps
                result = await ask(ns)
                await client.ping()
                assert granting.held(verb) == 1
                del result
            assert peer.hellos == 1
            assert not peer.committed

    with Peer(tmp_path) as peer:
        granting = Granting(peer)
        asyncio.run(main())


@pytest.mark.parametrize(("verb", "ask", "_"), LONG_GRANTS, ids=named)
def test_a_task_cancelled_at_a_later_frame_gives_back_what_the_earlier_ones_granted(
    tmp_path: Path, verb: Verb, ask: AsyncVerb, _: PlainVerb
) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (_, ns):
            task: asyncio.Task[object] = asyncio.create_task(ask(ns))
            await until(lambda: peer.seen.count(verb) == 2)
            peer.do(lambda: None)
            assert granting.held(verb) == 1
            await cancelled(task)
            await until(lambda: not granting.held(verb))
            assert peer.hellos == 1

    with Peer(tmp_path) as peer:
        granting = Granting(peer)
        granting.answer_only(verb, 1)
        asyncio.run(main())


def test_a_task_cancelled_in_the_turn_in_which_its_blocks_became_visible_aborts_none_of_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            task: asyncio.Task[object] = asyncio.create_task(ns.store(NEW_KEYS, BLOCKS))
            await until(lambda: Verb.COMMIT in peer.seen)
            granting.wait_answered(Verb.COMMIT)
            client._connection.catch_up()
            await cancelled(task)
            await client.ping()
            assert (await ns.flush(PATIENCE_S)).visible == 4
            assert await client.ping() is not None
            assert (peer.aborted, len(peer.committed), peer.hellos) == ([], 4, 1)

    with Peer(tmp_path) as peer:
        granting = Granting(peer)
        asyncio.run(main())


def test_a_frame_whose_task_is_cancelled_while_it_waits_for_room_is_sent_before_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, go_on = threading.Event(), threading.Event()
    idle = frames.build(Verb.RELEASE, 0)

    def stay(*_: object) -> None:
        stuck.set()
        assert go_on.wait(PATIENCE_S)

    def copy_and_fill_the_socket(moves: Iterable[Move]) -> None:
        copy(moves)
        link = links[0]
        assert link.try_send(idle)
        assert stuck.wait(PATIENCE_S)  # the peer reads no more
        while link.try_send(idle):
            pass

    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            assert (await ns.store(KEYS, BLOCKS)).known == 4
            link = client._connection._link
            assert link is not None
            links.append(link)
            with monkeypatch.context() as patch:
                patch.setattr("kvclient.flows.copy", copy_and_fill_the_socket)
                storing = asyncio.create_task(ns.store(NEW_KEYS, BLOCKS))
                await until(lambda: link.session._tickets)  # they count as committed
                await cancelled(storing)
            link.session.silent = False
            matching = asyncio.create_task(ns.match(NEW_KEYS))
            await asyncio.sleep(0)
            assert not peer.committed
            go_on.set()
            assert (await matching).blocks == 4
            assert (await ns.flush(PATIENCE_S)).visible == 4
            assert (len(peer.committed), peer.aborted, peer.hellos) == (4, [], 1)

    links: list[Link] = []
    with Peer(tmp_path) as peer:
        Granting(peer)
        peer.instead[Verb.RELEASE] = stay
        try:
            asyncio.run(main())
        finally:
            go_on.set()


def test_a_task_cancelled_while_it_connects_leaves_no_session_behind(tmp_path: Path) -> None:
    async def main() -> None:
        connecting = asyncio.create_task(kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S))
        await until(lambda: Verb.HELLO in peer.seen)
        assert peer._sock is not None
        await cancelled(connecting)
        peer.wait_for(lambda: peer._sock is None)

    with Peer(tmp_path) as peer:
        peer.mute(Verb.HELLO)
        asyncio.run(main())


def test_a_frame_lost_to_an_interruption_shifts_no_stream_in_a_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            for lost in (False, True):
                async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
                    with monkeypatch.context() as patch:
                        come_and_interrupt(patch, peer, lease=1 + lost, lost=lost)
                        with pytest.raises(KeyboardInterrupt) if lost else contextlib.nullcontext():
                            client._connection.catch_up()
                    assert await lease.complete() == (1 if lost else 4)
                    assert [bytes(view) for view in lease.views] == [bytes(block) for block in BLOCKS[: lease.blocks]]
            assert not client.connected

    with Peer(tmp_path) as peer:
        fill(peer, KEYS, BLOCKS, at_once=1)
        asyncio.run(main())


# -- threads -----------------------------------------------------------------------------------------------------------


def interrupt_behind(patch: pytest.MonkeyPatch, namespace: kvclient.Namespace, call: type[Call], times: int) -> None:
    """^C as soon as so many answers of this kind have been waited for."""
    connection = namespace._connection
    wait = connection._wait
    left = [times]

    def interrupt(link: Link, waiter: Waiter) -> None:
        wait(link, waiter)
        left[0] -= isinstance(waiter, call)
        if not left[0]:
            raise KeyboardInterrupt

    patch.setattr(connection, "_wait", interrupt)


@pytest.mark.parametrize(
    ("verb", "ask", "times"),
    [(verb, ask, 1) for verb, _, ask in GRANTS] + [(verb, ask, 2) for verb, _, ask in LONG_GRANTS],
    ids=named,
)
def test_a_thread_interrupted_behind_an_answer_gives_back_what_was_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, ask: PlainVerb, times: int
) -> None:
    with Peer(tmp_path) as peer:
        granting = Granting(peer)
        with client_of(peer) as client:
            ns = namespace_of(client)
            ns.open()
            with monkeypatch.context() as patch:
                interrupt_behind(patch, ns, CALLS[verb], times)
                with pytest.raises(KeyboardInterrupt):
                    ask(ns)
            assert peer.seen.count(verb) == times
            peer.wait_for(lambda: not granting.held(verb))
            if verb is not Verb.RESERVE:  # the control: who stays, keeps
                kept = ask(ns)
                client.ping()
                assert granting.held(verb) == times
                del kept
            assert (peer.hellos, peer.committed) == (1, [])


def come_and_interrupt(patch: pytest.MonkeyPatch, peer: Peer, lease: int, *, lost: bool) -> None:
    """When this thread reads next, the rest of a lease comes, in two READY; ^C before it has taken the first."""
    receive, reader, calls = Link.try_receive, threading.current_thread(), list[int]()

    def interrupt(link: Link, flags: int = socket.MSG_DONTWAIT) -> tuple[bytes, Sequence[int]] | None:
        if threading.current_thread() is reader and not calls:
            calls.append(flags)
            peer.ready(lease, 1)
            peer.ready(lease, 2)
            if lost:
                receive(link, flags)
                raise KeyboardInterrupt
        return receive(link, flags)

    patch.setattr(Link, "try_receive", interrupt)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_frame_lost_to_an_interruption_shifts_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, waits: bool, lost: bool
) -> None:
    with streaming(tmp_path, 1, 4) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        with monkeypatch.context() as patch:
            come_and_interrupt(patch, peer, 1, lost=lost)
            with pytest.raises(KeyboardInterrupt) if lost else contextlib.nullcontext():
                while lead_of(lease._parts).coming is not None:  # the tick may be reading
                    if waits:
                        _ = lease.blocks
                    else:
                        ns._connection.catch_up()
        assert lease.blocks == (1 if lost else 4)
        assert lease.valid()
        assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks[: lease.blocks]]
        assert ns._connection.wait_connected(PATIENCE_S)
        assert peer.hellos == 1 + lost


def test_a_commit_interrupted_while_it_is_sent_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Link.send

    def interrupt(link: Link, frame: bytes, deadline_ns: int, fds: Sequence[int] = ()) -> None:
        if frames.parse_head(frame, len(frame)).verb == Verb.COMMIT:
            raise KeyboardInterrupt
        send(link, frame, deadline_ns, fds)

    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert ns.store(KEYS, BLOCKS).accepted == 4
        with monkeypatch.context() as patch:
            patch.setattr(Link, "send", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ns.store(NEW_KEYS, BLOCKS)
        flushed = ns.flush(0)
        assert (flushed.visible, flushed.failed, flushed.pending) == (4, 4, 0)
        assert client.wait_connected(PATIENCE_S)
        assert ns.store(NEW_KEYS, BLOCKS, wait=True).accepted == 4
        assert peer.hellos == 2


def test_nobody_learns_that_a_session_is_over_before_its_daemon_can(tmp_path: Path) -> None:
    """What was under way in it is then settled by another session, which the daemon must find to be the only one."""
    with Peer(tmp_path) as peer, client_of(peer) as client:
        link = client._connection._link
        assert link is not None
        ends = select.poll()
        ends.register(link.sock, select.POLLRDHUP)
        seen: list[tuple[bool, bool]] = []

        def look() -> None:
            seen.append((link.session.over, bool(ends.poll(0))))

        peer.mute(Verb.PING)
        call = PingCall(link.session, 0)
        with client._connection.guard():
            link.session.submit(call, 0)
        look()
        call.wake = look
        client._connection.distrust(link.session, "for this test")
        assert seen == [(False, False), (True, True)]
