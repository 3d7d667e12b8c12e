"""Leases whose blocks come from disk, in an event loop."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

import kvclient.aio
from kvclient.aio import AsyncLease, AsyncNamespace
from kvclient.results import FlushResult, Tiers
from kvproto.errors import UsageError
from kvproto.frames import Durable
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, Blocks, Stopwatch, blocks_of, fill, keys_of

SHORT_S = 0.1
SLACK_S = 15.0
KEYS, BLOCKS = keys_of(5), blocks_of(5)
Body = Callable[[Peer, AsyncNamespace], Awaitable[None]]


def with_blocks_on_disk(directory: Path, body: Body, at_once: int = 2, ready_blocks: int = 0) -> None:
    """Run `body` against a peer that has all blocks but the first few on disk."""

    async def main(peer: Peer) -> None:
        async with await kvclient.aio.connect(directory, timeout_s=PATIENCE_S) as client:
            ns = await client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES)
            fill(peer, KEYS, BLOCKS, at_once, ready_blocks)
            await asyncio.wait_for(body(peer, ns), 3 * PATIENCE_S)

    with Peer(directory) as peer:
        asyncio.run(main(peer))


async def until(condition: Callable[[], object]) -> None:
    """Until `condition` holds, while the loop goes on."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


def streams_of(ns: AsyncNamespace) -> int:
    session = ns._connection.session()
    assert session is not None
    return len(session._streams)


def filled(targets: Blocks, count: int) -> bool:
    return bool((targets[:count] == BLOCKS[:count]).all() and not targets[count:].any())


def test_properties_show_what_has_come_and_complete_waits_for_all(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
            assert (lease.expected, lease.blocks, len(lease.views)) == (5, 2, 2)
            assert lease.tiers == Tiers(dram=2)
            waiting = asyncio.create_task(lease.complete())
            peer.ready(1, 2)
            await until(lambda: lease.blocks == 4)
            assert len(lease.views) == 4
            assert not waiting.done()
            peer.ready(1, 1)
            assert await waiting == 5
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in BLOCKS]
            assert lease.tiers == Tiers(dram=2, disk=3)

    with_blocks_on_disk(tmp_path, body)


def test_every_chunk_is_copied_while_the_next_one_is_on_its_way(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        targets = np.zeros_like(BLOCKS)
        async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
            copying = asyncio.create_task(lease.copy_to(targets))
            await until(lambda: filled(targets, 2))
            peer.ready(1, 1)
            await until(lambda: filled(targets, 3))
            assert not copying.done()
            peer.ready(1, 2)
            assert await copying
            assert filled(targets, 5)
            with pytest.raises(UsageError, match="6 targets"):
                await lease.copy_to(np.zeros((6, BLOCK_BYTES), np.uint8))

    with_blocks_on_disk(tmp_path, body)


@pytest.mark.parametrize("ready_blocks", [1, 2, 5])
def test_chunks_are_an_asynchronous_iterator(tmp_path: Path, ready_blocks: int) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
            seen: list[bytes] = []
            async for chunk in lease.chunks():
                assert chunk.start == len(seen)
                seen += [bytes(view) for view in lease.views_of(chunk)]
            assert seen == [block.tobytes() for block in BLOCKS]

    with_blocks_on_disk(tmp_path, body, ready_blocks=ready_blocks)


def test_what_has_not_come_when_the_wait_is_over_is_a_miss_for_good(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        for look in ("complete", "blocks"):
            with Stopwatch(SLACK_S):
                async with ns.fetch(KEYS, wait_s=SHORT_S, ttl_s=60) as lease:
                    if look == "complete":
                        assert await lease.complete() == 2
                    else:
                        await until(lambda lease=lease: not lease._streaming or lease.blocks != 2)  # type: ignore[misc]
                    targets = np.zeros_like(BLOCKS)
                    assert not await lease.copy_to(targets)
                    assert filled(targets, 2)
                    peer.ready(len(peer.leases), 3)
                    assert (await ns.match(KEYS)).blocks == 5
                    assert (lease.blocks, lease.expected, lease.valid()) == (2, 5, True)
        assert peer.hellos == 1

    with_blocks_on_disk(tmp_path, body)


def test_an_early_end_the_end_of_the_session_and_a_release_end_the_wait(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        ends: list[Callable[[AsyncLease], None]] = [
            lambda _: peer.ready(1, 0, left=0),
            lambda lease: lease.release(),
            lambda _: peer.hang_up(),
        ]
        for end in ends:
            lease = await ns.fetch(KEYS, wait_s=60, ttl_s=60)
            targets = np.zeros_like(BLOCKS)
            copying = asyncio.create_task(lease.copy_to(targets))
            await until(lambda targets=targets: filled(targets, 2))  # type: ignore[misc]
            with Stopwatch(SLACK_S):
                end(lease)
                assert not await copying
            assert (lease.blocks, filled(targets, 2)) == (2, True)
            lease.release()

    with_blocks_on_disk(tmp_path, body)


def test_a_cancelled_copy_leaves_the_lease_as_it_is(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        targets = np.zeros_like(BLOCKS)
        async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
            copying = asyncio.create_task(lease.copy_to(targets))
            await until(lambda: filled(targets, 2))
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
            peer.ready(1, 3)
            assert await lease.copy_to(targets)
            assert filled(targets, 5)

    with_blocks_on_disk(tmp_path, body)


def test_a_lease_that_is_dropped_or_released_leaves_nothing_behind(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        lease = await ns.fetch(KEYS, wait_s=PATIENCE_S)
        assert streams_of(ns) == 1
        del lease
        assert streams_of(ns) == 0
        async with ns.fetch(KEYS, wait_s=PATIENCE_S):
            assert streams_of(ns) == 1
        assert streams_of(ns) == 0
        peer.ready(1, 3)
        peer.ready(2, 3)
        assert (await ns.match(KEYS)).blocks == 5
        assert (peer.hellos, peer.released) == (1, [2])

    with_blocks_on_disk(tmp_path, body)


def test_a_daemon_that_misspeaks_of_blocks_is_left_and_tried_anew(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        async with ns.fetch(KEYS, wait_s=60, ttl_s=60) as lease:
            peer.ready(1, 0, left=0, places=[(77, 0)])
            with Stopwatch(SLACK_S):
                assert await lease.complete() == 2
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in BLOCKS[:2]]
        await until(lambda: peer.hellos == 2)
        assert await ns._connection.wait_connected(PATIENCE_S)
        peer.do(lambda: setattr(peer, "ready_blocks", 2))
        async with ns.fetch(KEYS, wait_s=PATIENCE_S) as lease:
            assert await lease.complete() == 5

    with_blocks_on_disk(tmp_path, body)


def test_flush_and_the_cost_of_computing_travel_as_they_do_in_threads(tmp_path: Path) -> None:
    async def body(peer: Peer, ns: AsyncNamespace) -> None:
        peer.durables = [Durable(1, 2, 3, 4)]
        assert (await ns.store(keys_of(2, seed=9), BLOCKS[:2], recompute_s=0.5)).accepted == 2
        assert peer.recompute_us == [500_000]
        assert await ns.flush(PATIENCE_S) == FlushResult(visible=2, durable=1, failed=2, pending=4, evicted=3)

    with_blocks_on_disk(tmp_path, body)
