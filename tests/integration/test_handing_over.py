"""One engine goes on with what another one has computed: on one host through the pool, across hosts beyond them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Self

import pytest

import kvclient
from kvclient.following import CHAINS, follow
from kvclient.handing_over import PIECE_BLOCKS, HandOver, hand_over, take_over
from tests.integration.handing_program import BLOCK_BYTES
from tests.integration.test_remote import host
from tests.node import PATIENCE_S, Bytes, Node, assert_blocks, chain, fetch, put, until, values
from tests.s3 import S3Server, s3_for_daemons

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_for_daemons() as server:
        yield server


@pytest.fixture(scope="module")
def source(s3: S3Server) -> Iterator[Node]:
    """A host that writes nothing beyond itself but what is handed over: nothing here is used twice."""
    with host(s3) as node:
        yield node


@pytest.fixture(scope="module")
def target(s3: S3Server) -> Iterator[Node]:
    with host(s3) as node:
        yield node


class Prefill:
    """The other engine."""

    def __init__(self, node: Node) -> None:
        program = [sys.executable, "-m", "tests.integration.handing_program", str(node.run)]
        self._process = subprocess.Popen(
            program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ, text=True
        )

    def compute(self, name: str, first: int, stop: int, model: str = "m") -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        said = {"name": name, "first": first, "stop": stop, "model": model}
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == f"{stop - first}\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def leased(lease: kvclient.Lease, blocks: int) -> Bytes:
    """Its blocks, copied while it was good."""
    with lease:
        assert lease.blocks == blocks
        found = values([bytes(32)] * blocks, BLOCK_BYTES)
        assert lease.copy_to(found)
        return found


def test_blocks_are_taken_while_another_process_still_computes_the_rest(source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("prefill", 12)
    following = follow(ns, keys, PATIENCE_S)
    assert following.blocks == 0
    taken = following.chunks()
    with Prefill(source) as prefill:
        for first, stop in ((0, 5), (5, 6), (6, 12)):
            prefill.compute("prefill", first, stop)
            came = next(taken)
            while came.stop < stop:  # a look may fall between two of them
                more = next(taken)
                assert more.start == came.stop
                came = range(came.start, more.stop)
            assert came == range(first, stop)
            assert following.over == (stop == 12)
            assert_blocks(leased(ns.fetch(keys[first:stop]), stop - first), values(keys[first:stop], BLOCK_BYTES))
    assert list(taken) == []


def test_layers_are_taken_one_group_after_the_other(source: Node) -> None:
    """A namespace for each group of layers: the first is loaded while the others are computed."""
    groups = [source.namespace(BLOCK_BYTES, model=f"m, layers {group}") for group in range(3)]
    keys = chain("layers", 4)
    followed = [follow(ns, keys, PATIENCE_S) for ns in groups]
    with Prefill(source) as prefill:
        for number, following in enumerate(followed):
            prefill.compute("layers", 0, 4, model=f"m, layers {number}")
            assert following.wait() == 4
            assert [one.blocks for one in followed] == [4] * (number + 1) + [0] * (2 - number)
            assert_blocks(leased(groups[number].fetch(keys), 4), values(keys, BLOCK_BYTES))


def test_what_does_not_come_in_time_is_not_waited_for_and_what_was_cancelled_neither(source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("never", 4)
    put(ns, keys[:1], values(keys[:1], BLOCK_BYTES), durable=False)

    def looked_in_time() -> bool:  # or nobody waits for the look
        following = follow(ns, keys, 0.05)
        came = following.wait()
        assert following.over
        assert came <= 1
        return came == 1

    assert until(looked_in_time)
    cancelled = follow(ns, keys, PATIENCE_S)
    cancelled.cancel()
    assert cancelled.wait(4) <= 1
    assert len(fetch(ns, keys).blocks) == 1
    with take_over(ns, keys, wait_s=0.01) as lease:
        assert lease.blocks == 1


def test_only_so_many_chains_are_followed_at_a_time(source: Node) -> None:
    ns = source.namespace(BLOCK_BYTES)
    followed = [follow(ns, chain(f"many {number}", 1), PATIENCE_S) for number in range(CHAINS + 1)]
    assert [one.over for one in followed] == [False] * CHAINS + [True]
    for one in followed:
        one.cancel()
    assert not follow(ns, chain("many 0", 1), PATIENCE_S).over


class Session:
    """One of a live engine: while its blocks are read it appends more, until it is paused."""

    def __init__(self, name: str, blocks: int, appends: Sequence[int]) -> None:
        self.all = chain(name, blocks + sum(appends))
        self.blocks = blocks
        self.paused = False
        self._appends = list(appends)

    def keys(self) -> list[bytes]:
        return self.all[: self.blocks]

    def read(self, first: int, stop: int) -> Bytes:
        if self._appends and not self.paused and stop == self.blocks:
            self.blocks += self._appends.pop(0)
        return values(self.all[first:stop], BLOCK_BYTES)

    @contextmanager
    def pause(self) -> Iterator[None]:
        assert not self.paused
        self.paused = True
        yield


def test_a_live_session_moves_while_it_goes_on_and_only_its_tail_while_it_stands_still(source: Node) -> None:
    ns = source.namespace(BLOCK_BYTES)
    session = Session("live", 40, (9, 3, 1))
    done = hand_over(ns, session.keys, session.read, session.pause, tail_blocks=1)
    assert [(one.blocks, one.paused) for one in done.rounds] == [(40, False), (9, False), (3, False), (1, True)]
    assert [one.bytes for one in done.rounds] == [BLOCK_BYTES * blocks for blocks in (40, 9, 3, 1)]
    assert (done.blocks, done.why) == (53, "")
    assert sum(one.seconds for one in done.rounds if one.paused) <= done.pause_s
    assert_blocks(leased(take_over(ns, session.keys()), 53), values(session.all, BLOCK_BYTES))
    assert ns.delete(session.all[:1]) == 53, "it is one chain, however many rounds it came in"


def test_a_session_that_grows_as_fast_as_it_is_copied_is_not_copied_for_ever(source: Node) -> None:
    session = Session("fast", 8, (8,) * 20)
    done = hand_over(source.namespace(BLOCK_BYTES), session.keys, session.read, session.pause)
    assert [one.blocks for one in done.rounds] == [8, 8], "what is left is as much as it was: so it is paused"
    assert done.blocks == session.blocks == 16


def test_a_pause_lasts_no_longer_than_its_time_and_one_piece_however_long_the_tail_is(source: Node) -> None:
    session = Session("long tail", 3 * PIECE_BLOCKS, ())
    moving = HandOver(source.namespace(BLOCK_BYTES), session.read)
    done = moving.finish(session.keys(), timeout_s=0)
    assert (done.blocks, done.why) == (PIECE_BLOCKS, "not all of it came in time")
    assert moving.finish(session.keys(), PATIENCE_S).blocks == 3 * PIECE_BLOCKS, "the control"


def test_what_goes_between_two_rounds_is_copied_again() -> None:
    with Node(disks=0, dram="16MiB") as node:
        node.start()
        ns, keys, read_blocks = node.namespace(BLOCK_BYTES), chain("evicted", 40), list[int]()

        def read(first: int, stop: int) -> Bytes:
            read_blocks.append(stop - first)
            return values(keys[first:stop], BLOCK_BYTES)

        moving = HandOver(ns, read)
        assert moving.copy(keys).blocks == 40
        assert moving.copy(keys).blocks == 0, "the control: all of it is there"
        assert read_blocks == [40]
        number = 0
        while ns.match(keys).blocks:
            others = chain(f"others {number}", 32)
            put(ns, others, values(others, BLOCK_BYTES), durable=False)
            number += 1
        done = moving.finish(keys, PATIENCE_S)
        assert (done.blocks, done.why, ns.match(keys).blocks) == (40, "", 40)
        assert [(one.blocks, one.bytes // BLOCK_BYTES) for one in done.rounds] == [(40, 40), (0, 0), (40, 40)]
        assert read_blocks == [40, 40]
        assert ns.delete(keys[30:]) == 10
        assert (moving.copy(keys).blocks, read_blocks) == (10, [40, 40, 10]), "from where it breaks off"


def test_what_has_gone_and_does_not_come_again_in_time_is_said(source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("gone", 2 * PIECE_BLOCKS)
    moving = HandOver(ns, lambda first, stop: values(keys[first:stop], BLOCK_BYTES))
    assert moving.copy(keys, PATIENCE_S).blocks == len(keys)
    ns.delete(keys[:1])
    done = moving.finish(keys, timeout_s=0)
    assert (done.blocks, ns.match(keys).blocks) == (PIECE_BLOCKS, PIECE_BLOCKS)
    assert "evicted or deleted" in done.why

    by_itself = HandOver(ns, None)
    assert by_itself.copy(keys[:40], PATIENCE_S).blocks == 40
    ns.delete(keys[10:])
    done = by_itself.finish(keys[:40], timeout_s=0.01)
    assert (done.blocks, done.rounds[-1].blocks, done.rounds[-1].bytes) == (10, 0, 0)
    assert "evicted or deleted" in done.why


def test_what_was_deleted_beyond_the_hosts_between_two_rounds_does_not_count(source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("far and gone", 20)
    moving = HandOver(ns, lambda first, stop: values(keys[first:stop], BLOCK_BYTES), far=True)
    assert moving.copy(keys, PATIENCE_S).blocks == 20
    assert ns.delete(keys[5:]) == 15
    done = moving.finish(keys, timeout_s=0)
    assert (done.blocks, done.rounds[-1].blocks, bool(done.why)) == (5, 0, True)
    assert ns.match(keys).blocks == 20, "here it is again"


def test_an_engine_that_stores_by_itself_only_has_to_be_waited_for(source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("itself", 6)
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    assert hand_over(ns, lambda: keys, None, nullcontext, pause_s=PATIENCE_S).blocks == 6
    late = hand_over(ns, lambda: chain("nobody stores it", 2), None, nullcontext, timeout_s=0.01, pause_s=0.01)
    assert (late.blocks, bool(late.why)) == (0, True)


def test_another_host_goes_on_with_what_was_computed_here(s3: S3Server, source: Node, target: Node) -> None:
    ns, keys = target.namespace(BLOCK_BYTES), chain("far", 70)
    looked = s3.count("LIST")
    assert ns.match(keys).blocks == 0
    assert until(lambda: s3.count("LIST") > looked), "from now on it believes that nothing is there"
    early = follow(ns, keys, PATIENCE_S)
    here = source.namespace(BLOCK_BYTES)
    put(here, keys, values(keys, BLOCK_BYTES), durable=False)
    done = hand_over(here, lambda: keys, None, nullcontext, far=True, pause_s=PATIENCE_S)
    assert (done.blocks, done.why) == (70, "")
    assert early.wait() == 70
    assert_blocks(leased(take_over(ns, keys, wait_s=PATIENCE_S), 70), values(keys, BLOCK_BYTES))


def test_a_session_moves_to_another_host_round_by_round(s3: S3Server, source: Node, target: Node) -> None:
    session = Session("far and live", 30, (6, 2))
    done = hand_over(
        source.namespace(BLOCK_BYTES), session.keys, session.read, session.pause, far=True, pause_s=PATIENCE_S
    )
    assert [(one.blocks, one.paused) for one in done.rounds] == [(30, False), (6, False), (2, True)]
    ns = target.namespace(BLOCK_BYTES)
    assert_blocks(leased(take_over(ns, session.keys(), wait_s=PATIENCE_S), 38), values(session.all, BLOCK_BYTES))
    assert s3.objects


def test_a_far_side_that_is_down_or_slow_costs_the_hand_over_and_nothing_else(s3: S3Server, source: Node) -> None:
    ns, keys = source.namespace(BLOCK_BYTES), chain("in vain", 6)
    with s3.stalling():
        moving = HandOver(ns, lambda first, stop: values(keys[first:stop], BLOCK_BYTES), far=True)
        done = moving.finish(keys, timeout_s=0.2)
        assert (done.blocks, bool(done.why)) == (0, True)
        assert_blocks(leased(ns.fetch(keys), 6), values(keys, BLOCK_BYTES))
    assert until(lambda: moving.finish(keys, timeout_s=1.0).why == ""), source.log()[-2000:]
    assert moving.blocks == 6


def test_a_host_without_a_remote_tier_says_so() -> None:
    with Node(disks=0) as node:
        node.start()
        ns, keys = node.namespace(BLOCK_BYTES), chain("alone", 3)
        moving = HandOver(ns, lambda first, stop: values(keys[first:stop], BLOCK_BYTES), far=True)
        done = moving.finish(keys, timeout_s=0.05)
        assert (done.blocks, "no remote tier" in done.why) == (0, True)
        assert_blocks(leased(ns.fetch(keys), 3), values(keys, BLOCK_BYTES))


def test_what_lies_on_disk_alone_is_handed_over_too(s3: S3Server, target: Node) -> None:
    with Node(disks=1, dram="16MiB") as node:
        remote = ("--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "1GiB")
        node.start(*remote, "--disk-admission", "all")
        ns, keys = node.namespace(BLOCK_BYTES), chain("on disk", 8)
        put(ns, keys, values(keys, BLOCK_BYTES))
        node.restart(*remote)
        node.await_disk(node.namespace(BLOCK_BYTES), keys)
        assert node.namespace(BLOCK_BYTES).match(keys).tiers.disk == 8
        moving = HandOver(node.namespace(BLOCK_BYTES), None, far=True)
        assert moving.finish(keys, timeout_s=PATIENCE_S).blocks == 8
    there = target.namespace(BLOCK_BYTES)
    assert_blocks(leased(take_over(there, keys, wait_s=PATIENCE_S), 8), values(keys, BLOCK_BYTES))
