"""Leases whose blocks come from disk, in threads: what is copied when, what ends a stream, what breaks it."""

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvclient.link import Link
from kvclient.results import Tiers
from kvproto import frames
from kvproto.errors import UsageError
from kvproto.frames import Head, Verb
from kvproto.limits import KEYS_PER_FRAME, MIB
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import (
    BLOCK_BYTES,
    Blocks,
    Stopwatch,
    client_of,
    fill,
    keys_of,
    namespace_of,
    streaming,
    wait_until,
)

SHORT_S = 0.1
SLACK_S = 15.0  # what a deadline may be overrun by on a machine that is busy: less than who hangs takes, PATIENCE_S


class Copier:
    """`copy_to` in a thread of its own."""

    def __init__(self, lease: kvclient.Lease, count: int) -> None:
        self.targets: Blocks = np.zeros((count, BLOCK_BYTES), np.uint8)
        self.results: list[bool] = []
        self._thread = threading.Thread(target=lambda: self.results.append(lease.copy_to(self.targets)))
        self._thread.start()

    def has(self, blocks: Blocks, count: int) -> bool:
        """The first `count` blocks have been copied and no more."""
        return bool((self.targets[:count] == blocks[:count]).all() and not self.targets[count:].any())

    def result(self) -> bool:
        """What it returned."""
        self._thread.join(PATIENCE_S)
        return self.results[0]


def streams_of(ns: kvclient.Namespace) -> int:
    session = ns._connection.session()
    assert session is not None
    return len(session._streams)


# -- a daemon that does what it promised -----------------------------------------------------------------------------


def test_a_fetch_returns_before_what_lies_on_disk_has_come(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks):
        with Stopwatch(SLACK_S), ns.fetch([*keys, *keys_of(1, seed=2)], wait_s=PATIENCE_S) as lease:
            assert lease.expected == 5
            assert lease.tiers == Tiers(dram=2)
            assert lease.valid()
            peer.ready(1, 2)
            peer.ready(1, 1)
            assert lease.blocks == 5
            assert lease.tiers == Tiers(dram=2, disk=3)
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks]
        assert lease.blocks == 5
        assert lease.tiers == Tiers(dram=2, disk=3)
        assert peer.leases == {1: 5}


def test_blocks_that_come_by_ready_out_of_memory_count_as_memory(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 4) as (peer, ns, keys, _), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        peer.do(lambda: peer.on_disk.discard(keys[2]))  # somebody else had it read meanwhile
        peer.ready(1, 3)
        assert lease.blocks == 4
        assert lease.tiers == Tiers(dram=2, disk=2)


def test_every_chunk_is_copied_while_the_next_one_is_on_its_way(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 6) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        copier = Copier(lease, 6)
        wait_until(lambda: copier.has(blocks, 2))
        peer.ready(1, 3)
        wait_until(lambda: copier.has(blocks, 5))
        assert not copier.results
        peer.ready(1, 1)
        assert copier.result()
        assert copier.has(blocks, 6)
        assert lease.valid()


@pytest.mark.parametrize("ready_blocks", [1, 3, 7])
def test_ready_may_follow_leased_at_once_in_any_steps(tmp_path: Path, ready_blocks: int) -> None:
    with streaming(tmp_path, 0, 7, ready_blocks) as (_, ns, keys, blocks):
        targets = np.zeros_like(blocks)
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            assert lease.expected == 7
            assert lease.copy_to(targets)
        assert (targets == blocks).all()
        assert not (targets == blocks[::-1]).all()
        assert lease.tiers == Tiers(disk=7)


def test_targets_that_are_filled_wait_for_nothing_more(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        targets = np.zeros_like(blocks)
        with Stopwatch(SLACK_S):
            assert lease.copy_to(targets[:2])
            assert lease.copy_to([])
        assert (targets[:2] == blocks[:2]).all()
        peer.ready(1, 1, left=2)
        assert lease.copy_to(targets[:3])
        assert (targets[:3] == blocks[:3]).all()
        with pytest.raises(UsageError, match="6 targets for 5 blocks"):
            lease.copy_to(np.zeros((6, BLOCK_BYTES), np.uint8))


def test_chunks_are_given_as_they_come_with_their_views(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        chunks = lease.chunks()
        assert next(chunks) == range(2)
        with pytest.raises(UsageError, match="have come"):
            lease.views_of(range(1, 3))
        peer.ready(1, 2)
        assert next(chunks) == range(2, 4)
        assert [bytes(view) for view in lease.views_of(range(2, 4))] == [block.tobytes() for block in blocks[2:4]]
        assert bytes(lease.views_of(range(1, 3))[0]) == blocks[1].tobytes()
        peer.ready(1, 1)
        assert list(chunks) == [range(4, 5)]
        assert list(lease.chunks()) == [range(5)]
        assert len(lease.views) == 5


def test_a_pure_memory_lease_is_one_chunk_and_a_miss_is_none(tmp_path: Path) -> None:
    with streaming(tmp_path, 3, 3) as (_, ns, keys, _):
        with ns.fetch(keys) as lease:
            assert list(lease.chunks()) == [range(3)]
            assert lease.expected == 3
        assert list(lease.chunks()) == []
        with ns.fetch(keys_of(2, seed=9)) as lease:
            assert (lease.expected, list(lease.chunks())) == (0, [])
        assert streams_of(ns) == 0


def test_without_a_wait_what_lies_on_disk_is_a_miss(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, _), ns.fetch(keys, wait_s=0) as lease:
        assert (lease.expected, lease.blocks) == (2, 2)
        assert peer.waits_ns == [0]


def test_an_arena_that_comes_for_a_ready_is_there_when_its_blocks_are(tmp_path: Path) -> None:
    with Peer(tmp_path, arena_bytes=2 * 8192) as peer, client_of(peer) as client:
        ns, keys = namespace_of(client), keys_of(6)
        blocks = np.random.default_rng(3).integers(0, 256, (6, BLOCK_BYTES), dtype=np.uint8)
        fill(peer, keys, blocks, at_once=2)
        targets = np.zeros_like(blocks)

        def lease_only_the_first(peer: Peer, head: Head, frame: bytes) -> None:
            introduce, peer._introduce = peer._introduce, lambda places: introduce(places[:2])  # type: ignore[method-assign]
            peer.lease(head, frame)
            peer._introduce = introduce  # type: ignore[method-assign]

        peer.instead[Verb.LEASE] = lease_only_the_first
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            assert len(peer.arenas) == 3
            peer.do(lambda: peer._introduce(peer.lead(keys)))
            peer.ready(1, 4)
            assert lease.copy_to(targets)
        assert (targets == blocks).all()


# -- deadlines -----------------------------------------------------------------------------------------------------


def test_what_has_not_come_when_the_wait_is_over_is_a_miss_for_good(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks):
        began = time.monotonic()
        with Stopwatch(SLACK_S), ns.fetch(keys, wait_s=SHORT_S, ttl_s=60) as lease:
            assert lease.blocks == 2
            assert time.monotonic() - began >= SHORT_S
            targets = np.zeros_like(blocks)
            assert not lease.copy_to(targets)
            assert lease.valid()
            assert (targets[:2] == blocks[:2]).all()
            assert not targets[2:].any()
            peer.ready(1, 3)  # too late
            assert ns.match(keys).blocks == 5  # the READY has been taken
            assert lease.blocks == len(lease.views) == 2
            assert lease.expected == 5
        assert ns._connection.session() is not None
        assert peer.hellos == 1


def test_what_came_by_the_end_of_the_wait_is_there_even_if_nobody_has_read_it_yet(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5, ready_blocks=3) as (peer, ns, keys, _), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        peer.do(lambda: None)  # it has sent READY by now
        (part,) = lease._parts
        part.until_ns = 1  # as if the caller had been busy with something else for long
        assert lease.blocks == 5


def test_a_later_deadline_replaces_the_first_and_an_earlier_one_does_not(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 4) as (peer, ns, keys, _), ns.fetch(keys, wait_s=PATIENCE_S, ttl_s=30) as lease:
        before_ns = lease.deadline_ns
        chunks = lease.chunks()
        next(chunks)
        peer.ready(1, 1, deadline_ns=before_ns - 10**9)
        next(chunks)
        assert lease.deadline_ns == before_ns
        peer.ready(1, 1, deadline_ns=before_ns + 10**9)
        next(chunks)
        assert lease.deadline_ns == before_ns + 10**9
        peer.ready(1, 1, deadline_ns=1)
        assert lease.blocks == 4
        assert lease.deadline_ns == before_ns + 10**9


def test_a_ready_without_blocks_keeps_what_has_come_for_longer(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 3) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=60, ttl_s=30) as lease:
        before_ns = lease.deadline_ns
        copier = Copier(lease, 3)
        wait_until(lambda: copier.has(blocks, 1))
        peer.ready(1, 0, deadline_ns=before_ns + 10**9)
        wait_until(lambda: lease.deadline_ns == before_ns + 10**9)
        assert lease.tiers == Tiers(dram=1)
        assert not copier.results, "it still waits"
        peer.ready(1, 2)
        assert copier.result()
        assert copier.has(blocks, 3)


def test_a_lease_that_lapses_between_two_chunks_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(tmp_path, 1, 3) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=600, ttl_s=60) as lease:
        copier = Copier(lease, 3)
        wait_until(lambda: copier.has(blocks, 1))
        assert lease.valid()
        monkeypatch.setattr("kvclient.lease._clock", lambda: time.monotonic_ns() + 60 * 10**9)
        assert not lease.valid()
        peer.ready(1, 2, deadline_ns=1)
        assert not copier.result()
        assert not lease.valid()
        assert copier.has(blocks, 1)


def test_renewing_reaches_a_lease_that_still_streams(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 3) as (peer, ns, keys, _), ns.fetch(keys, wait_s=PATIENCE_S, ttl_s=5) as lease:
        assert lease.renew(50)
        renewed_ns = lease.deadline_ns
        peer.ready(1, 2, deadline_ns=renewed_ns - 10**9)
        assert lease.blocks == 3
        assert lease.deadline_ns == renewed_ns


def test_a_lease_that_is_gone_does_not_come_back_by_a_ready(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 3) as (peer, ns, keys, _), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        peer.do(peer.leases.clear)
        assert not lease.renew(5)
        peer.ready(1, 2)
        assert lease.blocks == 3
        assert not lease.valid()
        assert not lease.copy_to(np.zeros((3, BLOCK_BYTES), np.uint8))


# -- early ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_a_stream_that_ends_early_leaves_a_shorter_run(tmp_path: Path, count: int) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        peer.ready(1, count, left=0)
        targets = np.zeros_like(blocks)
        with Stopwatch(SLACK_S):
            assert not lease.copy_to(targets)
            assert lease.valid()
            assert lease.blocks == 2 + count
        assert (targets[: lease.blocks] == blocks[: lease.blocks]).all()
        assert not targets[lease.blocks :].any()
        assert lease.copy_to(targets[: lease.blocks])
        assert len(lease.views) == 2 + count
        assert lease.tiers == Tiers(dram=2, disk=count)
        assert streams_of(ns) == 0


def test_a_stream_of_which_nothing_comes_is_a_miss(tmp_path: Path) -> None:
    with streaming(tmp_path, 0, 3) as (peer, ns, keys, blocks):
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            peer.ready(1, 0, left=0)
            assert (lease.expected, lease.blocks, lease.views) == (3, 0, ())
            assert not lease.copy_to(np.zeros_like(blocks))
        peer.wait_for(lambda: peer.released == [1])


def test_the_end_of_the_session_ends_the_stream_and_what_came_stays_readable(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=60, ttl_s=60) as lease:
        copier = Copier(lease, 5)
        wait_until(lambda: copier.has(blocks, 2))
        with Stopwatch(SLACK_S):
            peer.hang_up()
            assert not copier.result()
        assert lease.blocks == 2
        assert lease.valid()
        assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks[:2]]
        assert lease.copy_to(np.zeros((2, BLOCK_BYTES), np.uint8))


def test_closing_the_client_wakes_who_waits_for_blocks(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (_, ns, keys, blocks):
        lease = ns.fetch(keys, wait_s=60, ttl_s=60)
        copier = Copier(lease, 5)
        wait_until(lambda: copier.has(blocks, 2))
        with Stopwatch(SLACK_S):
            ns._connection.close()
            assert not copier.result()
        assert lease.blocks == 2


# -- giving back -----------------------------------------------------------------------------------------------------


def test_a_ready_after_the_release_is_ignored(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, _):
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            assert streams_of(ns) == 1
        assert (lease.blocks, lease.tiers) == (2, Tiers(dram=2))
        assert streams_of(ns) == 0
        peer.ready(1, 3)
        assert ns.match(keys).blocks == 5
        assert (lease.blocks, lease.expected) == (2, 5)
        assert peer.hellos == 1
        assert peer.released == [1]


def test_releasing_wakes_a_thread_that_waits_for_blocks(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (_, ns, keys, blocks):
        lease = ns.fetch(keys, wait_s=60)
        copier = Copier(lease, 5)
        wait_until(lambda: copier.has(blocks, 2))
        with Stopwatch(SLACK_S):
            lease.release()
            assert not copier.result()


def test_a_lease_that_is_dropped_without_release_leaves_nothing_behind(tmp_path: Path) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, _):
        gc.disable()  # nothing is to wait for the collector
        try:
            lease = ns.fetch(keys, wait_s=PATIENCE_S)
            assert streams_of(ns) == 1
            del lease
            assert streams_of(ns) == 0
        finally:
            gc.enable()
        peer.ready(1, 3)
        assert ns.match(keys).blocks == 5
        assert peer.hellos == 1


def test_a_streaming_lease_granted_too_late_is_given_back_and_its_blocks_ignored(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer, timeout_s=SHORT_S) as client:
        ns, keys = namespace_of(client), keys_of(3)
        fill(peer, keys, np.ones((3, BLOCK_BYTES), np.uint8), at_once=1, ready_blocks=1)
        peer.mute(Verb.LEASE)
        with Stopwatch(SLACK_S), ns.fetch(keys, wait_s=SHORT_S) as lease:
            assert (lease.expected, lease.blocks) == (0, 0)
        peer.answer_held()
        peer.wait_for(lambda: peer.released == [1])
        assert streams_of(ns) == 0
        assert peer.hellos == 1


# -- several parts -------------------------------------------------------------------------------------------------

LONG, SMALL_BYTES = KEYS_PER_FRAME + 6, 4096


def long_chain(peer: Peer, client: kvclient.Client, at_once: int) -> tuple[kvclient.Namespace, list[bytes]]:
    """More blocks than a frame holds, each of its own number; all but the first few on disk."""
    keys = keys_of(LONG)
    numbers = np.repeat(np.arange(LONG, dtype="<u2"), SMALL_BYTES // 2).reshape(LONG, -1).view(np.uint8)
    fill(peer, keys, numbers, at_once)
    return namespace_of(client, SMALL_BYTES), keys


def numbers_in(targets: Blocks) -> list[int]:
    return [int(number) for number in targets.view("<u2")[:, -1]]


def test_parts_stream_on_their_own_and_are_read_in_order(tmp_path: Path) -> None:
    with Peer(tmp_path, arena_bytes=8 * MIB) as peer, client_of(peer) as client:
        ns, keys = long_chain(peer, client, at_once=1000)
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            assert peer.leases == {1: KEYS_PER_FRAME, 2: 6}
            assert lease.expected == LONG
            chunks = lease.chunks()
            assert next(chunks) == range(1000)
            peer.ready(2, 4)
            peer.ready(1, 10)
            assert next(chunks) == range(1000, 1010)
            peer.ready(1, 14)
            assert next(chunks) == range(1010, KEYS_PER_FRAME + 4)
            peer.ready(2, 2)
            targets = np.zeros((LONG, SMALL_BYTES), np.uint8)
            assert lease.copy_to(targets)
            assert numbers_in(targets) == list(range(LONG))
            assert list(chunks) == [range(KEYS_PER_FRAME + 4, LONG)]
            assert lease.tiers == Tiers(dram=1000, disk=30)
        peer.wait_for(lambda: sorted(peer.released) == [1, 2])


def test_a_part_that_ends_early_takes_those_behind_it_along(tmp_path: Path) -> None:
    with Peer(tmp_path, arena_bytes=8 * MIB) as peer, client_of(peer) as client:
        ns, keys = long_chain(peer, client, at_once=1000)
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            peer.ready(2, 6)
            peer.ready(1, 4, left=0)
            assert lease.blocks == 1004
            assert lease.tiers == Tiers(dram=1000, disk=4)
            peer.wait_for(lambda: peer.released == [2])
            targets = np.zeros((LONG, SMALL_BYTES), np.uint8)
            assert not lease.copy_to(targets)
            assert numbers_in(targets) == [*range(1004), *[0] * (LONG - 1004)]
            assert lease.valid()
        peer.wait_for(lambda: sorted(peer.released) == [1, 2])


def test_the_next_frame_is_sent_only_if_all_before_it_is_promised(tmp_path: Path) -> None:
    with Peer(tmp_path, arena_bytes=8 * MIB) as peer, client_of(peer) as client:
        ns, keys = long_chain(peer, client, at_once=1000)
        peer.do(lambda: peer.blocks.pop(keys[1020]) and None)
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
            assert (lease.expected, peer.seen.count(Verb.LEASE)) == (1020, 1)


# -- threads -------------------------------------------------------------------------------------------------------


def test_threads_wait_for_blocks_of_one_lease_and_for_answers_side_by_side(tmp_path: Path) -> None:
    with streaming(tmp_path, 1, 5) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        copiers = [Copier(lease, 5) for _ in range(4)]
        counted: list[int] = []
        counter = threading.Thread(target=lambda: counted.append(lease.blocks))
        counter.start()
        for copier in copiers:
            wait_until(lambda copier=copier: copier.has(blocks, 1))  # type: ignore[misc]
        for step in range(4):
            peer.ready(1, 1)
            assert ns.match(keys).blocks == 5
            for copier in copiers:
                wait_until(lambda copier=copier, step=step: copier.has(blocks, step + 2))  # type: ignore[misc]
        assert all(copier.result() for copier in copiers)
        counter.join(PATIENCE_S)
        assert counted == [5]


# -- a daemon that misspeaks -----------------------------------------------------------------------------------------


def too_many_blocks(peer: Peer) -> None:
    peer.ready(1, 0, left=0, places=[(1, 0)] * 4)


def more_left_than_promised(peer: Peer) -> None:
    peer.ready(1, 1, left=3)


def a_lease_that_never_was(peer: Peer) -> None:
    peer.ready(99, 0, places=[(1, 0)])


def a_lease_that_never_streamed(peer: Peer) -> None:
    peer.ready(2, 0, places=[(1, 0)])


def no_lease(peer: Peer) -> None:
    peer.ready(0, 0, places=[(1, 0)])


def an_arena_that_never_came(peer: Peer) -> None:
    peer.ready(1, 0, left=2, places=[(77, 0)])


def a_slot_beyond_its_arena(peer: Peer) -> None:
    peer.ready(1, 0, left=2, places=[(1, 10**6)])


def half_a_location(peer: Peer) -> None:
    peer.ready(1, 3, cut=4)


def no_locations(peer: Peer) -> None:
    peer.ready(1, 3, cut=24)


def more_from_disk_than_blocks(peer: Peer) -> None:
    body = frames.READY_HEAD.pack(1, 1 << 60, 2, 2) + frames.LOCATION.pack(1, 0)
    peer.do(lambda: peer.send(frames.build(Verb.READY, 0, body, count=1)))


def an_answer_that_is_a_ready(peer: Peer) -> None:
    body = frames.READY_HEAD.pack(1, 1 << 60, 2, 0) + frames.LOCATION.pack(1, 0)
    peer.do(lambda: peer.send(frames.build(Verb.READY, 1, body, count=1)))


@pytest.mark.parametrize(
    "wrong",
    [
        too_many_blocks, more_left_than_promised, a_lease_that_never_was, a_lease_that_never_streamed, no_lease,
        an_arena_that_never_came, a_slot_beyond_its_arena, half_a_location, no_locations,
        more_from_disk_than_blocks, an_answer_that_is_a_ready,
    ],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_a_daemon_that_misspeaks_of_blocks_is_left_and_tried_anew(
    tmp_path: Path, wrong: Callable[[Peer], None]
) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, blocks):
        with ns.fetch(keys, wait_s=60, ttl_s=60) as lease, ns.fetch(keys[:2]) as _:
            wrong(peer)
            with Stopwatch(SLACK_S):
                assert lease.blocks == 2
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks[:2]]
        peer.wait_for(lambda: peer.hellos == 2)
        assert ns._connection.wait_connected(PATIENCE_S)
        peer.do(lambda: setattr(peer, "ready_blocks", 2))
        with ns.fetch(keys, wait_s=PATIENCE_S) as lease:  # the control: the right frames are taken
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks]


@pytest.mark.parametrize("wait_s", [0, PATIENCE_S])
def test_blocks_are_promised_for_later_only_to_who_waits(tmp_path: Path, wait_s: float) -> None:
    with streaming(tmp_path, 1, 3) as (peer, ns, keys, _):
        later = [(key, (1, 0)) for key in keys[1:]]

        def promise(peer: Peer, head: Head, frame: bytes) -> None:
            peer._introduce(peer.lead(keys))
            peer.send(peer.leased(head.request, 10**10, [(1, 0)], later))

        peer.instead[Verb.LEASE] = promise
        with ns.fetch(keys, wait_s=wait_s) as lease:
            assert lease.expected == (3 if wait_s else 0)


def test_the_reason_to_leave_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming(tmp_path, 2, 5) as (peer, ns, keys, _), ns.fetch(keys, wait_s=60) as lease:
        said: list[str] = []
        drop = ns._connection._drop

        def note(link: Link, why: str) -> None:
            said.append(why)
            drop(link, why)

        monkeypatch.setattr(ns._connection, "_drop", note)
        too_many_blocks(peer)
        assert lease.blocks == 2
        assert "READY says 4 blocks" in said[0]
