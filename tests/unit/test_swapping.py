"""Swaps against a scripted daemon: blocks that come from disk when told, leases that lapse, rings that are full."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvclient
from kvclient import swap_lines, swap_ways
from kvclient.results import LoadResult, Reason, StoreResult
from kvclient.swap_budget import Budget
from kvclient.swap_ways import host_pages
from kvclient.swapping import Priority, Swap, Swapper
from kvkernels.device.port import DeviceError
from kvproto.errors import Grant
from kvproto.frames import Head, Verb
from tests.peer import Peer
from tests.unit.client_kit import client_of, fill, keys_of, namespace_of, wait_until

BLOCK, COUNT, PAGES = 4096, 8, 32
CHUNK = 4 * BLOCK


class Rig:
    """A scripted daemon with eight blocks, and an engine's memory of two layers."""

    def __init__(self, peer: Peer, client: kvclient.Client, *, at_once: int = COUNT) -> None:
        self.peer, self.client = peer, client
        self.keys = keys_of(COUNT)
        self.blocks = np.random.default_rng(5).integers(0, 256, (COUNT, BLOCK), dtype=np.uint8)
        self.layers = [torch.zeros((PAGES, BLOCK // 2), dtype=torch.uint8) for _ in range(2)]
        self.swapper: Swapper = client.swapper(namespace_of(client, BLOCK), host_pages(self.layers), chunk_bytes=CHUNK)
        fill(peer, self.keys, self.blocks, at_once)

    def holds(self, pages: range, numbers: range) -> bool:
        """Do these pages hold the daemon's blocks of these numbers?"""
        held = torch.cat([layer[pages.start : pages.stop] for layer in self.layers], dim=1).numpy()
        return bool(np.array_equal(held, self.blocks[numbers.start : numbers.stop]))


@contextmanager
def rig(folder: Path, at_once: int = COUNT) -> Iterator[Rig]:
    with Peer(folder) as peer, client_of(peer) as client:
        yield Rig(peer, client, at_once=at_once)


def test_what_comes_from_disk_holds_up_no_other_swap(tmp_path: Path) -> None:
    with rig(tmp_path, at_once=4) as one:
        slow = one.swapper.swap_in(one.keys, range(COUNT), Priority.URGENT, wait_s=60.0)
        wait_until(lambda: one.peer.leases)
        quick = one.swapper.swap_in(one.keys[:4], range(8, 12), Priority.LATER)
        assert quick.result(30.0) == LoadResult(4)
        assert one.holds(range(8, 12), range(4))
        assert not slow.done
        assert not one.holds(range(4), range(4)), "the control: layers of all blocks come together"
        one.peer.ready(min(one.peer.leases), 4)
        assert slow.result(30.0) == LoadResult(COUNT)
        assert one.holds(range(COUNT), range(COUNT))


def test_what_never_comes_from_disk_is_a_miss(tmp_path: Path) -> None:
    with rig(tmp_path, at_once=4) as one:
        swap = one.swapper.swap_in(one.keys, range(COUNT), wait_s=0.05)
        assert swap.result(30.0) == LoadResult(4)
        assert one.holds(range(4), range(4))
        assert not any(layer[4:].any() for layer in one.layers)


def test_a_lease_that_lapsed_while_it_was_read_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(tmp_path) as one:
        assert one.swapper.swap_in(one.keys, range(COUNT)).result(30.0) == LoadResult(COUNT), "the control"
        real = one.peer.leased
        monkeypatch.setattr(one.peer, "leased", lambda request, _ttl_ns, *more: real(request, 1, *more))
        assert one.swapper.swap_in(one.keys, range(COUNT)).result(30.0) == LoadResult(0)


def test_a_lease_is_kept_while_its_swap_waits_for_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [time.monotonic()]  # it stands still, however long this takes
    for module in (swap_lines, swap_ways):
        monkeypatch.setattr(module, "_clock", lambda: now_s[0])
    with Peer(tmp_path) as peer, client_of(peer) as client:
        client._budget = Budget(1e-6)  # next to nothing, for ever
        one = Rig(peer, client)
        swap = one.swapper.swap_in(one.keys, range(COUNT), wait_s=1.0)
        wait_until(lambda: swap.moved_bytes)
        assert swap.moved_bytes == BLOCK
        assert Verb.RENEW not in peer.seen
        now_s[0] += 20.0
        one.swapper.wake()
        wait_until(lambda: Verb.RENEW in peer.seen)
        swap.urge()
        assert swap.result(30.0) == LoadResult(COUNT)
        assert one.holds(range(COUNT), range(COUNT))


def test_a_chunk_whose_parent_has_no_tickets_yet_goes_again(tmp_path: Path) -> None:
    with rig(tmp_path) as one:
        keys = keys_of(12, seed=9)
        one.peer.mute(Verb.COMMIT)
        one.peer.grants = [Grant.GRANTED] * 4 + [Grant.NO_PARENT] * 4
        swap = one.swapper.swap_out(keys, range(12), priority=Priority.URGENT)
        wait_until(lambda: swap.alone)
        assert swap.chunks == [range(4)], "the first one is not over"
        assert swap.next == 4
        one.peer.answer_held()
        assert swap.result(30.0) == StoreResult(12, 0, ())
        assert one.peer.seen.count(Verb.RESERVE) == 4


def test_a_chunk_waits_for_the_tickets_of_the_one_before_it_whatever_others_do(tmp_path: Path) -> None:
    with rig(tmp_path) as one:
        held: list[tuple[Head, bytes]] = []

        def reserve(peer: Peer, head: Head, frame: bytes) -> None:
            if peer.seen.count(Verb.RESERVE) == 1:
                peer.reserve(head, frame)
            else:
                held.append((head, frame))

        def answer() -> None:
            del one.peer.instead[Verb.RESERVE]
            one.peer.reserve(*held[0])

        one.peer.instead[Verb.RESERVE] = reserve
        one.peer.mute(Verb.COMMIT)
        swap = one.swapper.swap_out(keys_of(12, seed=9), range(12), priority=Priority.URGENT)
        wait_until(lambda: held)
        one.peer.answer_held()
        wait_until(lambda: swap.accepted)
        with one.swapper._changed:
            assert (swap.asking, swap.next) == (range(4, 8), 8), "the first one is over, the second one asks"
        one.peer.do(answer)
        assert swap.result(30.0) == StoreResult(12, 0, ())


def test_a_swap_out_that_a_request_waits_for_now_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_lines, "KEEP_S", 3600.0)
    with Peer(tmp_path) as peer, client_of(peer) as client:
        client._budget = Budget(1e-6)  # next to nothing, for ever
        one = Rig(peer, client)
        out = one.swapper.swap_out(keys_of(12, seed=9), range(12))
        wait_until(lambda: out.accepted)
        outs, ins = one.swapper._outs, one.swapper._ins
        pick_out, pick_in, looked = outs._pick, ins._pick, set[int]()

        def picked_out() -> Any:
            looked.update([threading.get_ident()] if ins.swaps else [])
            return pick_out()

        monkeypatch.setattr(outs, "_pick", picked_out)
        monkeypatch.setattr(ins, "_pick", lambda: pick_in() if len(looked) == 2 else (None, 0.001))  # behind both
        back = one.swapper.swap_in(one.keys, range(COUNT), Priority.URGENT)
        assert back.result(30.0) == LoadResult(COUNT)
        assert one.holds(range(COUNT), range(COUNT))
        assert out.result(30.0).accepted == 12


def test_a_chunk_whose_parent_is_not_there_ends_the_swap(tmp_path: Path) -> None:
    with rig(tmp_path) as one:
        one.peer.grants = [Grant.NO_PARENT] * 4
        swap = one.swapper.swap_out(keys_of(12, seed=9), range(12), parent=bytes(32), priority=Priority.URGENT)
        assert swap.result(30.0).reasons == {kvclient.Reason.NO_PARENT: 12}
        assert one.peer.seen.count(Verb.RESERVE) == 1


class Slow:
    """An event that a driver says nothing of until it is told to. As often as it is asked."""

    def __init__(self) -> None:
        self.asked, self.answers = threading.Event(), threading.Event()

    @property
    def done(self) -> bool:
        self.asked.set()
        assert self.answers.wait(60)
        return True

    def wait(self) -> None:
        assert self.answers.wait(60)


@pytest.mark.parametrize("way", ["out", "in"])
def test_nobody_else_waits_for_a_driver_that_is_long_in_answering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    slow = Slow()
    with rig(tmp_path) as one, ThreadPoolExecutor(1) as engine:
        monkeypatch.setattr(one.swapper._way, "stream_event", lambda _stream: slow)
        try:
            keys, pages = keys_of(4, seed=9), range(8, 12)
            if way == "out":
                waits: Swap = one.swapper.swap_out(keys, pages, stream=object())
            else:
                waits = one.swapper.swap_in(one.keys[:4], pages, wait_s=10.0, stream=object())
            assert slow.asked.wait(30)
            engine.submit(one.client.tick, 0.01).result(30.0)
            out = engine.submit(one.swapper.swap_out, keys_of(4, seed=10), range(12, 16), None, Priority.URGENT)
            assert out.result(30.0).result(30.0) == StoreResult(4, 0, ()), "nor another swap's chunks"
            back = engine.submit(one.swapper.swap_in, one.keys, range(COUNT), Priority.URGENT)
            assert back.result(30.0).result(30.0) == LoadResult(COUNT)
            assert not waits.moved_bytes
        finally:
            slow.answers.set()
        waits.urge()
        wait_until(lambda: waits.moved_bytes == 4 * BLOCK)


def test_an_event_that_cannot_be_asked_ends_its_swap_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self._error = error

        @property
        def done(self) -> bool:
            raise self._error

    with rig(tmp_path) as one:
        monkeypatch.setattr(one.swapper._way, "stream_event", Broken)
        for error, why in ((DeviceError("lost"), Reason.DEVICE), (ValueError("odd"), Reason.UNREACHABLE)):
            out = one.swapper.swap_out(keys_of(4, seed=9), range(4), stream=error)
            assert out.result(30.0).reasons == {why: 4}
            assert one.swapper.swap_out(keys_of(4, seed=9), range(4), priority=Priority.URGENT).result(30.0).lead == 4
