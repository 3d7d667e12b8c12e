"""The verbs of a client against a peer that behaves, or refuses as a daemon may."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvclient
from kvclient.calls import CommitCall
from kvclient.copying import Move, copy
from kvclient.ledger import Waiter
from kvclient.link import Link
from kvclient.results import FlushResult, Reason, Refused
from kvproto.errors import Grant, Outcome, UsageError
from kvproto.frames import Head, Role, Verb
from kvproto.limits import KEYS_PER_FRAME, MIB
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import (
    BLOCK_BYTES,
    Stopwatch,
    blocks_of,
    client_of,
    keys_of,
    namespace_of,
    pair,
    times,
    within,
)


def test_what_was_stored_is_fetched(tmp_path: Path) -> None:
    keys, blocks = keys_of(5), blocks_of(5)
    with pair(tmp_path) as (_, ns):
        result = ns.store(keys, blocks, wait=True)
        assert (result.accepted, result.known, result.refused, result.lead) == (5, 0, (), 5)
        assert ns.match(keys).blocks == 5
        with ns.fetch([*keys, *keys_of(1, seed=2)]) as lease:
            assert lease.blocks == 5
            assert lease.tiers.dram == 5
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks]
            assert all(view.readonly for view in lease.views)
            targets = np.zeros_like(blocks)
            assert lease.copy_to(targets)
            assert (targets == blocks).all()
            targets[3, 77] ^= 1
            assert not (targets == blocks).all()
        again = ns.store(keys, blocks)
        assert (again.accepted, again.known, again.lead) == (0, 5, 5)
        assert ns.delete(keys[3:]) == 2
        assert ns.match(keys).blocks == 3


@pytest.mark.parametrize("kind", ["rows", "array", "tensors", "tensor", "bytearrays"])
def test_targets_of_every_kind_take_the_blocks(tmp_path: Path, kind: str) -> None:
    keys, blocks = keys_of(4), blocks_of(4)
    with pair(tmp_path) as (_, ns):
        ns.store(keys, blocks, wait=True)
        whole = np.zeros_like(blocks)
        buffers = [bytearray(BLOCK_BYTES) for _ in range(4)]
        targets = {
            "rows": list(whole),
            "array": whole,
            "tensors": list(torch.from_numpy(whole)),
            "tensor": torch.from_numpy(whole),
            "bytearrays": buffers,
        }[kind]
        with ns.fetch(keys) as lease:
            assert lease.copy_to(targets)
        got = np.stack([np.frombuffer(buffer, np.uint8) for buffer in buffers]) if kind == "bytearrays" else whole
        assert (got == blocks).all()
        assert not (got == blocks[::-1]).all()


def test_fewer_targets_than_blocks_take_the_first(tmp_path: Path) -> None:
    keys, blocks = keys_of(4), blocks_of(4)
    with pair(tmp_path) as (_, ns):
        ns.store(keys, blocks, wait=True)
        targets = np.zeros_like(blocks)
        with ns.fetch(keys) as lease:
            assert lease.copy_to(targets[1:3])
        assert (targets[1:3] == blocks[:2]).all()
        assert not targets[[0, 3]].any()


def test_no_byte_moves_unless_every_target_is_fit(tmp_path: Path) -> None:
    keys, blocks = keys_of(3), blocks_of(3)
    with pair(tmp_path) as (_, ns):
        ns.store(keys, blocks, wait=True)
        good = np.zeros(BLOCK_BYTES, np.uint8)
        with ns.fetch(keys) as lease:
            for bad in (bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES - 1), np.zeros(2 * BLOCK_BYTES, np.uint8)[::2]):
                with pytest.raises(UsageError, match="block 1"):
                    lease.copy_to([good, bad])
                assert not good.any()
            with pytest.raises(UsageError, match="4 targets for 3 blocks"):
                lease.copy_to([good] * 4)
            assert lease.copy_to([good])
            assert good.any()


def test_a_miss_is_a_lease_of_no_blocks(tmp_path: Path) -> None:
    with pair(tmp_path) as (_, ns):
        with ns.fetch(keys_of(3)) as lease:
            assert (lease.blocks, lease.views, lease.deadline_ns) == (0, (), 0)
            assert lease.copy_to([])
        assert ns.match(keys_of(3)).blocks == 0
        assert ns.fetch([]).blocks == 0
        assert ns.store([], []).lead == 0


def test_outside_its_context_a_lease_is_over_and_given_back(tmp_path: Path) -> None:
    keys, blocks = keys_of(2), blocks_of(2)
    with pair(tmp_path) as (peer, ns):
        ns.store(keys, blocks, wait=True)
        with ns.fetch(keys) as lease:
            view = lease.views[0]
            kept = np.frombuffer(lease.views[1], np.uint8)
            assert lease.valid()
        with pytest.raises(ValueError, match="released"):
            view[0]
        with pytest.raises(UsageError):
            _ = lease.views
        assert not lease.valid()
        assert not lease.copy_to(np.zeros_like(blocks))
        assert not lease.renew(1)
        assert (kept == blocks[1]).all()  # the map lives as long as the array
        peer.wait_for(lambda: peer.released == list(peer.leases))
        assert Verb.RELEASE in peer.seen  # no frame followed that it could have ridden on


def test_a_release_rides_on_the_next_frame(tmp_path: Path) -> None:
    keys, blocks = keys_of(2), blocks_of(2)
    with pair(tmp_path) as (peer, ns):
        ns.store(keys, blocks, wait=True)
        for _ in range(3):
            with ns.fetch(keys) as lease:
                assert lease.blocks == 2
        assert len(peer.released) >= 1
        ns.match(keys)
        assert sorted(peer.released) == sorted(peer.leases)


def test_renewing_moves_the_deadline(tmp_path: Path) -> None:
    keys, blocks = keys_of(2), blocks_of(2)
    with pair(tmp_path) as (peer, ns):
        ns.store(keys, blocks, wait=True)
        with ns.fetch(keys, ttl_s=30) as lease:
            before_ns = lease.deadline_ns
            assert lease.renew(50)
            assert 19e9 < lease.deadline_ns - before_ns < 40e9
            assert lease.renew(1e6)  # as long as the daemon allows
            assert lease.deadline_ns - before_ns < 60e9
            peer.leases.clear()  # the daemon no longer knows it
            assert not lease.renew(50)
            assert not lease.valid()


def test_a_lapsed_lease_is_a_miss(tmp_path: Path) -> None:
    keys, blocks = keys_of(1), blocks_of(1)
    with pair(tmp_path) as (peer, ns):
        ns.store(keys, blocks, wait=True)
        target = np.zeros_like(blocks)
        with ns.fetch(keys) as lease:
            assert lease.copy_to(target)
        target[:] = 0
        arena, slot = peer.blocks[keys[0]]
        peer.instead[Verb.LEASE] = lambda peer, head, _: peer.send(
            peer.leased(head.request, ttl_ns=-1, places=[(arena.number, slot)])
        )
        with ns.fetch(keys) as lease:
            assert lease.blocks == 1
            assert not lease.valid()
            assert not lease.copy_to(target)
            assert not lease.renew(1)
        assert not target.any()


def test_a_lease_that_lapses_during_the_copy_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, blocks = keys_of(1), blocks_of(1)

    def copy_slowly(moves: Iterable[Move]) -> None:
        copy(moves)
        while lease.valid():
            pass

    with pair(tmp_path) as (_, ns):
        ns.store(keys, blocks, wait=True)
        target = np.zeros_like(blocks)
        with ns.fetch(keys, ttl_s=60) as lease:
            assert lease.copy_to(target)
        monkeypatch.setattr("kvclient.lease.copy", copy_slowly)
        with ns.fetch(keys, ttl_s=0.1) as lease:
            assert lease.valid()
            assert not lease.copy_to(target)


def test_long_chains_go_in_frames_and_come_back_as_one_lease(tmp_path: Path) -> None:
    count = 2 * KEYS_PER_FRAME + 10
    keys = keys_of(count)
    block = bytes(range(256)) * 16
    with Peer(tmp_path, arena_bytes=16 * MIB, ring_bytes=16 * MIB) as peer, client_of(peer) as client:
        ns = namespace_of(client, 4096)
        assert ns.store(keys, [block] * count, wait=True).accepted == count
        assert peer.seen.count(Verb.RESERVE) == 3
        assert ns.match(keys).blocks == count
        with ns.fetch(keys) as lease:
            assert lease.blocks == count
            assert peer.seen.count(Verb.LEASE) == 3
            targets = np.zeros((count, 4096), np.uint8)
            assert lease.copy_to(targets)
            assert (targets == np.frombuffer(block, np.uint8)).all()
            assert lease.renew(10)
        assert ns.delete([keys[KEYS_PER_FRAME + 5]]) == 1
        assert ns.match(keys).blocks == KEYS_PER_FRAME + 5
        with ns.fetch(keys) as lease:
            assert lease.blocks == KEYS_PER_FRAME + 5
        assert peer.seen.count(Verb.LEASE) == 5
        assert ns.delete(keys) == count - 1
        peer.wait_for(lambda: sorted(peer.released) == sorted(peer.leases))


def test_a_delete_says_of_how_many_keys_nobody_has_answered(tmp_path: Path) -> None:
    keys = keys_of(2 * KEYS_PER_FRAME + 10)

    def then_none(peer: Peer, head: Head, frame: bytes) -> None:
        Peer.delete(peer, head, frame)
        peer.mute(Verb.DELETE)

    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        assert ns.delete(keys).unanswered == 0, "nothing was there, and that is an answer"
        for _ in times(client, ns):
            peer.answer_held()
            peer.do(lambda: peer.put(keys[0], bytes(BLOCK_BYTES)))
            peer.instead[Verb.DELETE] = then_none
            peer.seen.clear()
            deleted = ns.delete(keys)
            if deleted.unanswered < len(keys):  # else the first answer came too late
                break
        assert (deleted, deleted.unanswered) == (1, KEYS_PER_FRAME + 10)
        assert peer.seen.count(Verb.DELETE) == 2, "whoever does not answer is asked no more"
        peer.hang_up()
        deleted = ns.delete(keys)
        assert (deleted, deleted.unanswered) == (0, len(keys))


@pytest.mark.parametrize(
    ("grant", "reason"),
    [
        (Grant.FULL, Reason.FULL),
        (Grant.QUOTA, Reason.QUOTA),
        (Grant.DRAINING, Reason.DRAINING),
        (Grant.NO_PARENT, Reason.NO_PARENT),
    ],
)
def test_a_refusal_in_the_middle_keeps_the_lead_part_and_orphans_the_rest(
    tmp_path: Path, grant: Grant, reason: Reason
) -> None:
    keys, blocks = keys_of(5), blocks_of(5)
    with pair(tmp_path) as (peer, ns):
        peer.grants = [Grant.GRANTED, Grant.GRANTED, grant, Grant.NO_PARENT, Grant.NO_PARENT]
        result = ns.store(keys, blocks, wait=True)
        assert (result.accepted, result.lead) == (2, 2)
        assert result.refused == (
            Refused(2, reason),
            Refused(3, Reason.NO_PARENT),
            Refused(4, Reason.NO_PARENT),
        )
        assert result.reasons[Reason.NO_PARENT] == (3 if reason is Reason.NO_PARENT else 2)
        assert ns.match(keys).blocks == 2


def test_a_block_that_another_is_writing_is_left_to_it(tmp_path: Path) -> None:
    keys, blocks = keys_of(3), blocks_of(3)
    with pair(tmp_path) as (peer, ns):
        peer.grants = [Grant.GRANTED, Grant.PENDING, Grant.GRANTED]
        result = ns.store(keys, blocks, wait=True)
        assert (result.accepted, result.refused) == (2, (Refused(1, Reason.PENDING),))


def test_busy_is_asked_again_until_there_is_room(tmp_path: Path) -> None:
    keys, blocks = keys_of(4), blocks_of(4)
    with pair(tmp_path) as (peer, ns):
        peer.grants = [Grant.GRANTED, *[Grant.BUSY] * 3, *[Grant.BUSY] * 3, *[Grant.BUSY] * 3]
        result = ns.store(keys, blocks, wait=True, space_s=20)
        assert (result.accepted, result.refused) == (4, ())
        assert peer.seen.count(Verb.RESERVE) == 4
        with ns.fetch(keys) as lease:
            assert [bytes(view) for view in lease.views] == [block.tobytes() for block in blocks]


@pytest.mark.parametrize("space_s", [0, 0.05])
def test_busy_for_too_long_refuses_the_rest(tmp_path: Path, space_s: float) -> None:
    keys, blocks = keys_of(4), blocks_of(4)
    with pair(tmp_path) as (peer, ns):
        peer.grants = [Grant.GRANTED, *[Grant.BUSY] * 10_000]
        with Stopwatch(10):
            result = ns.store(keys, blocks, space_s=space_s)
        assert result.accepted == 1
        assert result.refused == tuple(Refused(index, Reason.BUSY) for index in (1, 2, 3))


def test_the_outcome_of_every_ticket_is_told(tmp_path: Path) -> None:
    keys, blocks = keys_of(3), blocks_of(3)
    with pair(tmp_path) as (peer, ns):
        peer.outcomes = [Outcome.PUBLISHED, Outcome.STALE, Outcome.DISCARDED]
        result = ns.store(keys, blocks, wait=True)
        assert result.accepted == 1
        assert result.refused == (Refused(1, Reason.STALE), Refused(2, Reason.DISCARDED))
        assert ns.flush(PATIENCE_S) == FlushResult(visible=1, durable=0, failed=2, pending=0)
        assert ns.flush(PATIENCE_S) == FlushResult(visible=0, durable=0, failed=0, pending=0)


def test_what_is_not_visible_in_time_is_refused_to_who_waits_and_pending_to_who_does_not(tmp_path: Path) -> None:
    keys, blocks = keys_of(2), blocks_of(2)
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.match(keys)
        peer.publishing = False
        for timeout_s in times(client, ns):
            with Stopwatch(timeout_s + 10):
                result = ns.store(keys, blocks, wait=True, space_s=0)
            assert result.refused == (Refused(0, Reason.TIMED_OUT), Refused(1, Reason.TIMED_OUT))
            if Verb.COMMIT in peer.seen:  # else RESERVE was answered too late
                break
        within(PATIENCE_S, client, ns)
        result = ns.store(keys_of(2, seed=2), blocks)
        assert result.accepted == 2
        assert ns.flush(0) == FlushResult(visible=0, durable=0, failed=0, pending=4)


def test_tickets_of_blocks_that_could_not_be_copied_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, blocks = keys_of(3), blocks_of(3)

    def fail(moves: object) -> None:
        raise KeyboardInterrupt

    with pair(tmp_path) as (peer, ns):
        with monkeypatch.context() as patch:
            patch.setattr("kvclient.flows.copy", fail)
            with pytest.raises(KeyboardInterrupt):
                ns.store(keys, blocks)
        peer.wait_for(lambda: len(peer.aborted) == 3)
        assert ns.store(keys, blocks, wait=True).accepted == 3
        assert not set(peer.aborted) & set(peer.committed)


def test_a_store_interrupted_while_it_waits_leaves_every_ticket_to_one_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, blocks = keys_of(3), blocks_of(3)
    with pair(tmp_path) as (peer, ns):
        connection = ns._connection
        wait = connection._wait

        def interrupt(link: Link, waiter: Waiter) -> None:
            if isinstance(waiter, CommitCall):
                raise KeyboardInterrupt
            wait(link, waiter)

        with monkeypatch.context() as patch:
            patch.setattr(connection, "_wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                ns.store(keys, blocks)
        assert ns.flush(20).visible == 3
        assert not peer.aborted
        assert ns.store(keys, blocks).known == 3
        assert peer.hellos == 1


def test_a_large_store_is_committed_piece_by_piece(tmp_path: Path) -> None:
    block_bytes = 1 * MIB
    keys = keys_of(40)
    with Peer(tmp_path, arena_bytes=64 * MIB, ring_bytes=64 * MIB) as peer, client_of(peer) as client:
        ns = namespace_of(client, block_bytes)
        blocks = [np.full(block_bytes, number, np.uint8) for number in range(40)]
        assert ns.store(keys, blocks).accepted == 40
        assert peer.seen.count(Verb.COMMIT) == 3
        assert peer.committed == sorted(peer.committed)
        with ns.fetch(keys) as lease:
            assert [view[-1] for view in lease.views] == list(range(40))


@pytest.mark.parametrize(
    "keys", [[b"k" * 31], [b"k" * 33, b"k" * 31], ["k" * 32], [7], [None], 7, None, [b"k" * 32, b""]], ids=str
)
def test_a_key_is_32_bytes(tmp_path: Path, keys: object) -> None:
    with pair(tmp_path) as (_, ns):
        for verb in (ns.fetch, ns.match, ns.delete, lambda keys: ns.store(keys, blocks_of(1))):
            with pytest.raises(UsageError):
                verb(keys)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            ns.store([b"k" * 32], blocks_of(1), parent=b"short")


def test_unfit_buffers_and_durations_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    keys = keys_of(2)
    with pair(tmp_path) as (peer, ns):
        for buffers in (blocks_of(3), [bytes(BLOCK_BYTES)], [bytes(BLOCK_BYTES), bytes(1)], None):
            with pytest.raises(UsageError):
                ns.store(keys, buffers)
        for seconds in (-1, float("nan"), float("inf"), "1", None):
            with pytest.raises(UsageError):
                ns.fetch(keys, wait_s=seconds)  # type: ignore[arg-type]
            with pytest.raises(UsageError):
                ns.store(keys, blocks_of(2), space_s=seconds)  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            ns.fetch(keys, ttl_s=0)
        assert Verb.RESERVE not in peer.seen
        assert Verb.LEASE not in peer.seen


def test_a_namespace_that_the_daemon_finds_impossible_is_a_usage_error(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        with pytest.raises(UsageError, match="beyond the arena"):
            namespace_of(client, 2 * MIB)
        right: dict[str, Any] = {"model": "m", "engine": "e", "layout": "l", "dtype": "d"}
        assert client.namespace(**right, block_bytes=4096).identity.block_bytes == 4096
        for wrong in ({"block_bytes": 0}, {"model": ""}, {"tp": (1, 1)}, {"tp": 3}, {"dtype": None}):
            with pytest.raises(UsageError):
                client.namespace(**{**right, **wrong})
        assert client.ping() is not None


def test_a_tool_reads_and_does_not_store(tmp_path: Path) -> None:
    keys, blocks = keys_of(1), blocks_of(1)
    with Peer(tmp_path) as peer, kvclient.connect(tmp_path, role=Role.TOOL, timeout_s=20) as client:
        assert client.status.ring_bytes == 0
        ns = namespace_of(client, BLOCK_BYTES)
        peer.do(lambda: peer.put(keys[0], blocks[0].tobytes()))
        with ns.fetch(keys) as lease:
            assert bytes(lease.views[0]) == blocks[0].tobytes()
        with pytest.raises(UsageError, match="engines"):
            ns.store(keys, blocks)


@pytest.mark.parametrize(
    "wrong", [{"name": "n" * 65}, {"tenant": 7}, {"timeout_s": 0}, {"ring_bytes": -1}, {"ring_bytes": 1.5}], ids=str
)
def test_unfit_arguments_of_connect_are_usage_errors(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        kvclient.connect(tmp_path, **wrong)  # type: ignore[arg-type]


def test_keys_need_no_daemon(tmp_path: Path) -> None:
    with kvclient.connect(tmp_path) as client:
        ns = client.namespace(model="m", engine="e", layout="l", dtype="d", block_tokens=4)
        keys = ns.keys(range(10))
        assert [len(key) for key in keys] == [32, 32]
        assert ns.keys(range(9)) == keys
        assert ns.keys(range(10), extra=b"salt") != keys


def test_status_says_who_serves_and_ping_how_fast(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, kvclient.connect(tmp_path, tenant="blue", timeout_s=20) as client:
        status = client.status
        assert (status.connected, status.why_not, status.tenant) == (True, "", "blue")
        assert status.daemon_pid == os.getpid()
        assert status.mode == "copy"
        assert status.ring_bytes == peer.ring_bytes
        seconds = client.ping()
        assert seconds is not None
        assert 0 < seconds < 20
