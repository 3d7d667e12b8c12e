"""The asyncio flavour: the same flows, in coroutines."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvclient.aio
from kvclient.copying import Move, copy
from kvclient.results import Reason
from kvproto import frames
from kvproto.errors import ClosedError, Code, Grant, RefusedError, UsageError
from kvproto.frames import Verb
from kvproto.limits import MIB
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, Stopwatch, blocks_of, keys_of

SHORT_S = 0.1
SLACK_S = 15.0
KEYS, BLOCKS = keys_of(4), blocks_of(4)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


async def namespace_of(client: kvclient.aio.AsyncClient) -> kvclient.aio.AsyncNamespace:
    return await client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES)


async def assert_works(client: kvclient.aio.AsyncClient, ns: kvclient.aio.AsyncNamespace) -> None:
    assert await client.wait_connected(PATIENCE_S)
    while await client.ping() is None:
        pass
    assert (await ns.store(KEYS, BLOCKS, wait=True)).refused == ()
    targets = np.zeros_like(BLOCKS)
    async with ns.fetch(KEYS) as lease:
        assert await lease.copy_to(targets)
    assert (targets == BLOCKS).all()


def test_the_verbs_do_what_they_do_in_threads(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            assert client.connected
            assert client.status.mode == "copy"
            ns = await namespace_of(client)
            result = await ns.store(KEYS, BLOCKS, wait=True)
            assert (result.accepted, result.refused) == (4, ())
            assert (await ns.match(KEYS)).blocks == 4
            async with ns.fetch([*KEYS, *keys_of(1, seed=9)]) as lease:
                assert [bytes(view) for view in lease.views] == [block.tobytes() for block in BLOCKS]
                targets = np.zeros_like(BLOCKS)
                assert await lease.copy_to(targets)
                assert (targets == BLOCKS).all()
                assert not (targets == BLOCKS[::-1]).all()
                assert await lease.renew(20)
                with pytest.raises(UsageError):
                    await lease.copy_to([bytearray(1)])
            assert not lease.valid()
            assert (await ns.flush(PATIENCE_S)).visible == 4
            by_hand = await ns.fetch(KEYS)
            by_hand.release()
            assert await ns.delete(KEYS[2:]) == 2
            assert await client.ping() is not None
            assert ns.keys(range(32)) == ns.keys(range(33))
        with pytest.raises(ClosedError):
            await client.ping()

    with Peer(tmp_path) as peer:
        run(main)
        assert len(peer.released) == 2


def test_many_tasks_get_their_own_answers(tmp_path: Path) -> None:
    async def work(ns: kvclient.aio.AsyncNamespace, number: int) -> None:
        keys, blocks = keys_of(5, seed=number), blocks_of(5, seed=number)
        for _ in range(5):
            assert (await ns.store(keys, blocks)).lead == 5
            async with ns.fetch(keys) as lease:
                targets = np.zeros_like(blocks)
                assert await lease.copy_to(targets)
                assert (targets == blocks).all()

    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            await asyncio.gather(*(work(ns, number) for number in range(10)))

    with Peer(tmp_path, arena_bytes=64 * MIB):
        run(main)


def test_without_a_daemon_everything_misses_until_one_comes_and_again_when_it_goes(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            assert not client.connected
            assert not await client.wait_connected(0)
            with Stopwatch(SLACK_S):
                async with ns.fetch(KEYS) as lease:
                    assert lease.blocks == 0
                assert (await ns.store(KEYS, BLOCKS, wait=True)).reasons == {Reason.UNREACHABLE: 4}
                assert (await ns.match(KEYS)).blocks == 0
                assert await client.ping() is None
            with Peer(tmp_path) as peer:
                await assert_works(client, ns)
                peer.publishing = False
                assert (await ns.store(keys_of(4, seed=5), BLOCKS)).accepted == 4
                peer.hang_up()
                assert (await ns.flush(PATIENCE_S)).failed == 4
                peer.publishing = True
                await assert_works(client, ns)
            with Stopwatch(SLACK_S):
                while client.connected:
                    await asyncio.sleep(0)
                assert (await ns.match(KEYS)).blocks == 0

    run(main)


def test_a_silent_daemon_costs_one_deadline_and_late_grants_are_given_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            assert (await ns.store(KEYS, BLOCKS, wait=True)).accepted == 4
            client._connection.timeout_ns = ns._timeout_ns = int(SHORT_S * 1e9)
            peer.mute(Verb.LEASE, Verb.PING)
            with Stopwatch(SLACK_S):
                async with ns.fetch(KEYS, wait_s=0) as lease:
                    assert lease.blocks == 0
                assert await client.ping() is None
            peer.answer_held()
            while not peer.released:
                await asyncio.sleep(0)
            assert peer.released == list(peer.leases)
            peer.mute(Verb.RESERVE)
            while await client.ping() is None:
                pass
            assert (await ns.store(keys_of(2, seed=3), BLOCKS[:2])).reasons == {Reason.TIMED_OUT: 2}
            peer.answer_held()
            while len(peer.aborted) < 2:
                await asyncio.sleep(0)
            client._connection.timeout_ns = ns._timeout_ns = int(PATIENCE_S * 1e9)
            await assert_works(client, ns)

    with Peer(tmp_path) as peer:
        run(main)


def test_a_daemon_that_misspeaks_is_left_and_tried_anew(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            peer.instead[Verb.MATCH] = lambda peer, *_: peer.send(b"garbage")
            with Stopwatch(SLACK_S):
                assert (await ns.match(KEYS)).blocks == 0
            del peer.instead[Verb.MATCH]
            await assert_works(client, ns)
            assert peer.hellos == 2
            peer.take_back(1)
            while peer.dropped != [1]:
                await asyncio.sleep(0)

    with Peer(tmp_path) as peer:
        run(main)


def test_busy_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            peer.grants = [Grant.BUSY] * 9
            assert (await ns.store(KEYS, BLOCKS, wait=True)).accepted == 4

    with Peer(tmp_path) as peer:
        run(main)


@pytest.mark.parametrize("answer", [Verb.GOAWAY, Verb.FAILED])
def test_a_daemon_that_will_not_have_this_client_says_why(tmp_path: Path, answer: Verb) -> None:
    async def main() -> None:
        with pytest.raises(RefusedError, match="no such tenant"):
            await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S)

    with Peer(tmp_path) as peer:
        peer.instead[Verb.HELLO] = lambda peer, head, _: peer.send(
            frames.build_failure(answer, head.request if answer is Verb.FAILED else 0, Code.REFUSED, "no such tenant")
        )
        run(main)


def test_cancelling_a_copy_waits_until_it_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def copy_slowly(moves: Iterable[Move]) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        copy(moves)
        ended.set()

    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            with monkeypatch.context() as patch:
                patch.setattr("kvclient.flows.copy", copy_slowly)
                storing = asyncio.create_task(ns.store(KEYS, BLOCKS))
                await asyncio.to_thread(begun.wait, PATIENCE_S)
                storing.cancel()
                await asyncio.sleep(0)
                storing.cancel()  # impatient
                await asyncio.sleep(0)
                assert not storing.done()
                go_on.set()
                with pytest.raises(asyncio.CancelledError):
                    await storing
                assert ended.is_set()
            while len(peer.aborted) < 4:
                await asyncio.sleep(0)
            assert not peer.committed
            await assert_works(client, ns)

    with Peer(tmp_path) as peer:
        run(main)


def test_cancelling_every_task_waits_until_a_copy_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def copy_slowly(moves: Iterable[Move]) -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)
        copy(moves)
        ended.set()

    async def main() -> None:
        client = await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S)
        ns = await namespace_of(client)
        storing = asyncio.create_task(ns.store(KEYS, BLOCKS))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        try:
            for _ in range(10):
                await asyncio.sleep(0)
            assert not storing.done()
            assert not ended.is_set()
        finally:
            go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await storing
        assert ended.is_set()
        await client.close()
        peer.wait_for(lambda: len(peer.aborted) == 4)
        assert not peer.committed

    monkeypatch.setattr("kvclient.flows.copy", copy_slowly)
    with Peer(tmp_path) as peer:
        asyncio.run(main())


def test_closing_from_another_loop_ends_the_session_of_a_loop_that_is_closed(tmp_path: Path) -> None:
    async def left_open() -> kvclient.aio.AsyncClient:
        return await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S)

    async def closed(client: kvclient.aio.AsyncClient) -> None:
        await client.close()
        await client.close()
        assert not client.connected

    with Peer(tmp_path):
        client = asyncio.run(left_open())
        asyncio.run(closed(client))


def test_closing_from_another_loop_than_one_that_still_runs_is_refused(tmp_path: Path) -> None:
    async def refused(client: kvclient.aio.AsyncClient) -> None:
        with pytest.raises(UsageError, match="the loop that connect ran in"):
            await client.close()

    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            await asyncio.to_thread(lambda: asyncio.run(refused(client)))
            assert client.connected

    with Peer(tmp_path):
        run(main)


def test_a_fetch_is_awaited_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(tmp_path, timeout_s=PATIENCE_S) as client:
            ns = await namespace_of(client)
            fetching = ns.fetch(KEYS)
            (await fetching).release()
            with pytest.raises(UsageError, match="awaited already"):
                await fetching

    with Peer(tmp_path):
        run(main)
