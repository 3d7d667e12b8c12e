"""Swaps in chunks through a real daemon: out of an engine's pages and back, in every way that bytes can go.

Pages of the host, and of the emulation of a GPU in modes copy and daemon. What is equal is told from what is not; the
two tests that plant a bug show that pages which are used again too early would be seen.
"""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import devices, swap_attached, swap_budget, swap_lines
from kvclient.results import Reason, StoreResult
from kvclient.swap_ways import host_pages
from kvclient.swapping import Priority
from kvclient.swaps import SwapIn, SwapOut
from kvkernels.device.port import DeviceError, Direction
from kvproto.errors import ClosedError, UsageError
from tests.attached_kit import BLOCK_BYTES, LAYERS, PAGES, PIECE, engine, gated_daemon, namespace_of, where
from tests.node import PATIENCE_S
from tests.swap_kit import (
    FIRST,
    HALF,
    SECOND,
    Held,
    after_others,
    fill,
    out_and_over,
    overwrite,
    reused_too_early,
    rig,
    watched,
)
from tests.unit.client_kit import wait_until

WAYS = ["host", "device", "daemon"]
PATIENCE_NS = 5 * 10**8  # with a daemon that hangs


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    arguments = ("--dram", "64MiB", "--arena", "8MiB", "--lock", "false", *where.arguments, "--ring", "1MiB")
    with DaemonProcess(folder / "run", *arguments, log_file=folder / "log") as process:
        yield process


@pytest.mark.parametrize("way", WAYS)
def test_a_context_goes_out_in_chunks_and_comes_back_to_other_pages(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "there and back") as one:
        keys, wanted = one.keys(), one.kv.values[:, :HALF]
        noted = watched(one.swapper)
        out = one.swapper.swap_out(keys, FIRST, stream=None if way == "host" else one.kv.device.stream())
        assert out.result(30.0) == StoreResult(HALF, 0, ())
        assert out.done
        assert out.moved_bytes == HALF * BLOCK_BYTES
        assert len(noted.chunks) >= HALF // 4
        assert list(dict.fromkeys(sum(noted.chunks, ()))) == keys  # one may have had to go twice
        assert np.array_equal(one.stored(keys), wanted)
        assert not np.array_equal(one.kv.get(SECOND), wanted), "the control"
        back = one.swapper.swap_in(keys, SECOND, groups=LAYERS, wait_s=10.0)
        assert back.result(30.0) == kvclient.LoadResult(HALF)
        assert np.array_equal(one.kv.get(SECOND), wanted)
        assert np.array_equal(one.kv.get(FIRST), wanted), "nobody touched these"
        assert back.moved_bytes == HALF * BLOCK_BYTES
        assert back.wait(LAYERS)
        assert back.incoming is None, "it would keep maps of the daemon's memory"
        assert one.swapper.conflicts(range(PAGES)) == []


@pytest.mark.parametrize("way", WAYS)
def test_clean_copies_are_not_written_twice(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "clean") as one:
        keys = one.keys()
        half = keys[: HALF // 2]
        assert out_and_over(one, half, FIRST[: HALF // 2]).moved_bytes == len(half) * BLOCK_BYTES
        assert one.stored(half).any()
        again = one.swapper.swap_out(keys, FIRST, priority=Priority.URGENT)
        assert again.result(30.0) == StoreResult(HALF - len(half), len(half), ())
        assert again.moved_bytes == (HALF - len(half)) * BLOCK_BYTES
        assert one.stored(keys).any()
        assert out_and_over(one, keys, FIRST).moved_bytes == 0
        other = out_and_over(one, one.keys(extra=b"other"), FIRST)
        assert other.moved_bytes == HALF * BLOCK_BYTES, "the control"


@pytest.mark.parametrize("way", WAYS)
def test_what_is_there_of_a_chain_comes_and_what_is_not_is_not_said_to(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "part") as one:
        keys, before = one.keys(), one.kv.get(SECOND)
        out_and_over(one, keys[:6], FIRST[:6])
        back = one.swapper.swap_in(keys, SECOND, wait_s=10.0)
        assert back.result(30.0).blocks == 6
        assert back.blocks == 6
        assert np.array_equal(one.kv.get(SECOND[:6]), one.kv.values[:, :6])
        assert np.array_equal(one.kv.get(SECOND[6:]), before[:, 6:])
        nothing = one.swapper.swap_in(one.keys(extra=b"absent"), SECOND, priority=Priority.URGENT, groups=2)
        assert nothing.result(30.0).blocks == 0
        assert not nothing.wait(1), "no group of layers came"


@pytest.mark.parametrize("way", ["host", "device"])
def test_a_ring_too_small_for_two_chunks_costs_time_and_no_block(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "small ring", ring_bytes=6 * BLOCK_BYTES) as one:
        keys = one.keys(PAGES)
        for turn in range(5):
            mine = one.keys(PAGES, extra=bytes([turn]))
            assert one.swapper.swap_out(mine, range(PAGES), priority=Priority.URGENT).result(60.0).accepted == PAGES
            assert np.array_equal(one.stored(mine), one.kv.values)
        assert one.namespace.match(keys).blocks == 0, "the control"


def test_who_is_urgent_goes_first_at_the_border_of_a_chunk(daemon: DaemonProcess) -> None:
    with rig(daemon, "daemon", "priorities") as one:  # where one thread stores
        noted = watched(one.swapper)

        def order(**priorities: Priority) -> str:
            """Of chunks, by the first letter of the swap that they belong to; the first one has begun already."""
            noted.chunks.clear()
            noted.goes.clear()
            chains = {name: one.keys(12, extra=f"{name} {sorted(priorities)}".encode()) for name in priorities}
            swaps = []
            for number, (name, priority) in enumerate(priorities.items()):
                pages = range(12 * number, 12 * number + 12)
                swaps.append(one.swapper.swap_out(chains[name], pages, priority=priority))
                wait_until(lambda: noted.chunks)
            noted.goes.set()
            assert all(swap.result(30.0).accepted == 12 for swap in swaps)
            return "".join(next(name[0] for name in chains if chunk[0] in chains[name]) for chunk in noted.chunks)

        assert order(later=Priority.LATER, soon=Priority.SOON, urgent=Priority.URGENT) == "luuusssll"
        assert order(first=Priority.SOON, next=Priority.SOON) == "fffnnn", "the control: equals in order"


def test_what_is_not_urgent_keeps_to_the_budget(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(swap_lines, "_clock", lambda: now_s[0])
    with rig(daemon, "host", "budget") as one:
        budget, outs = one.swapper._shared.budget, one.swapper._outs
        of_block_s = BLOCK_BYTES / (1 << 30)  # of the rate that stands for a link which nobody has measured

        def may_begin() -> bool:
            """Would a thread that looks now find something to do?"""
            with one.swapper._changed:
                return outs._pick()[0] is not None

        def has_moved(blocks: int) -> bool:
            return out.next == blocks and not out.chunks

        budget.tick(2 * of_block_s, now_s[0])
        out = one.swapper.swap_out(one.keys(12), range(12))
        wait_until(partial(has_moved, 2))
        assert not may_begin()
        for blocks in (5, 8):
            budget.tick(3 * of_block_s, now_s[0])
            one.swapper.wake()
            wait_until(partial(has_moved, blocks))
            assert not may_begin()
        hurried = one.swapper.swap_out(one.keys(12, extra=b"hurried"), range(12, 24), priority=Priority.URGENT)
        assert hurried.result(30.0).accepted == 12, "a request waits for it"
        assert out.next == 8
        assert not may_begin()
        out.urge()
        assert out.result(30.0).accepted == 12


def test_ticks_go_by_the_client_and_advice_limits_them(daemon: DaemonProcess) -> None:
    with rig(daemon, "host", "ticks") as one:
        whole = one.client.tick(0.01)
        assert whole > 0
        advice = kvclient.Advice(kvclient.Choice.SWAP, 1.0, 1.0, 1.0, swap_budget_bytes=1000)
        assert one.client.tick(0.01, advice) == 1000
        unknown = kvclient.Advice(kvclient.Choice.PRESERVE, 1.0, None, None, swap_budget_bytes=0)
        assert one.client.tick(0.01, unknown) == whole, "nobody knows, which is no limit"
        with pytest.raises(UsageError, match="forward_s"):
            one.client.tick(-1.0)


def test_the_daemon_learns_from_swaps_how_fast_its_memory_is_read(daemon: DaemonProcess) -> None:
    with rig(daemon, "host", "learning") as one:
        keys = one.keys(PAGES)
        assert one.namespace.advise(1000, 1.0, 1000, forward_s=0.01) is not None
        out_and_over(one, keys, range(PAGES))
        assert one.swapper.swap_in(keys, range(PAGES), wait_s=10.0).result(30.0).blocks == PAGES

        def budget() -> int:
            advice = one.namespace.advise(1000, 1.0, 1000, forward_s=0.01)
            return advice.swap_budget_bytes if advice is not None else 0

        wait_until(lambda: budget() > 0)


def test_what_a_swap_waits_for_is_no_time_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_budget, "TIMED_BYTES", 1)
    monkeypatch.setattr(swap_attached, "WAIT_S", 0.1)  # whatever else this machine does
    with gated_daemon() as (daemon, gate), rig(daemon, "daemon") as one, ThreadPoolExecutor(1) as other:
        keys, bandwidth, link = one.keys(4), one.client._budget.bandwidth, one.client._connection
        assert one.namespace.save(keys[:3], one.memory[FIRST[:3]], timeout_s=30.0).accepted == 3
        gate.shut()
        saving = other.submit(one.namespace.save, keys[3:], one.memory[FIRST[3:4]], keys[2], 60.0)
        try:
            wait_until(lambda: gate.holds)
            back = one.swapper.swap_in(keys, SECOND[:4], priority=Priority.URGENT, wait_s=30.0)
            wait_until(lambda: (session := link.session()) is not None and len(session.transfers) == 2)
            began_s = time.monotonic()
            wait_until(lambda: time.monotonic() - began_s > 0.2)
            assert back.blocks is None, "the daemon waits for the last block"
        finally:
            gate.open()
        assert saving.result(60).accepted == 1
        assert back.result(30.0).blocks == 4
        assert bandwidth.bytes_per_s == 0.0
        assert one.swapper.swap_in(keys, SECOND[:4], priority=Priority.URGENT).result(30.0).blocks == 4
        assert bandwidth.bytes_per_s > 0.0, "the control"


@pytest.mark.parametrize("way", ["host", "daemon"])
def test_a_cancelled_swap_ends_at_the_border_of_a_chunk(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "cancelled") as one:
        noted, keys = watched(one.swapper), one.keys()
        noted.goes.clear()
        out = one.swapper.swap_out(keys, FIRST, priority=Priority.URGENT)
        wait_until(lambda: noted.chunks)
        out.cancel()
        assert not out.done, "a chunk is under way"
        assert set(one.swapper.conflicts(FIRST)) == {out}
        assert one.swapper.conflicts(FIRST[4:]) == [], "of what has not begun nothing will be read"
        noted.goes.set()
        result = out.result(30.0)
        assert result.accepted <= 4
        assert result.reasons == {Reason.TIMED_OUT: HALF - result.accepted}
        assert one.swapper.conflicts(range(PAGES)) == []
        out_and_over(one, one.keys(extra=b"another"), FIRST)  # the control: one that is not cancelled goes on


def test_pages_that_are_still_read_are_not_given_away(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "reuse") as one:
        assert not reused_too_early(one, overwrite(one))
        assert not one.kv.get(FIRST).any()


def test_the_bytes_would_be_wrong_if_conflicts_were_not_detected(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwapOut, "touches", lambda *_: False)
    with rig(daemon, "device", "reuse, planted") as one:
        assert reused_too_early(one, overwrite(one))


def test_a_swap_in_waits_for_the_swap_out_that_still_reads_its_pages(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "in behind out") as one:
        other = one.keys(extra=b"other")
        out_and_over(one, other, SECOND)
        assert not reused_too_early(one, fill(one, other), after_others(one, other))
        assert np.array_equal(one.kv.get(FIRST), one.kv.values[:, SECOND])


def test_the_bytes_would_be_wrong_if_it_did_not_wait(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    with rig(daemon, "device", "in behind out, planted") as one:
        other = one.keys(extra=b"other")
        out_and_over(one, other, SECOND)
        monkeypatch.setattr(SwapOut, "touches", lambda *_: False)
        assert reused_too_early(one, fill(one, other))


def test_pages_that_nobody_waits_for_are_given_up_rather_than_waited_for(daemon: DaemonProcess) -> None:
    with rig(daemon, "host", "given up") as one:
        one.client.tick(1e-9)  # next to nothing may move
        keys = one.keys()
        out = one.swapper.swap_out(keys, FIRST)
        assert one.swapper.before_reuse(FIRST, timeout_s=30.0, keep=False)
        result = out.result(0.0)
        assert result.reasons[Reason.TIMED_OUT] == HALF - result.accepted > 0
        assert one.swapper.before_reuse(FIRST), "nothing is under way"


def test_a_swap_in_that_still_fills_pages_is_in_nobodys_way(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "filling") as one:
        keys = one.keys()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()
        with Held(one.stream(Direction.TO_DEVICE)) as held:
            back = one.swapper.swap_in(keys, SECOND)
            for verb in (one.swapper.swap_in, one.swapper.swap_out):
                with pytest.raises(UsageError, match="may still fill"):
                    verb(one.keys(1, extra=b"x"), SECOND[:1])
            wait_until(lambda: back.flying)
            assert one.swapper.conflicts(SECOND[-1:]) == [back]
            assert not one.swapper.before_reuse(SECOND, timeout_s=0.01), "the device may still write there"
            assert back.result(0.01).settled is False
            held.open()
            assert one.swapper.before_reuse(SECOND, timeout_s=30.0)
        assert back.result(30.0) == kvclient.LoadResult(0, reason=Reason.TIMED_OUT)


def test_layers_come_first_ones_first_and_a_stream_can_wait_for_them(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "layers") as one:
        keys = one.keys()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()
        compute, seen = one.kv.device.stream(), []
        back = one.swapper.swap_in(keys, SECOND, priority=Priority.URGENT, groups=LAYERS)
        for group in range(1, LAYERS + 1):
            assert back.order(compute, group, 30.0)
            compute.submit(lambda: seen.append(one.kv.get(SECOND)))
        compute.synchronize()
        assert back.result(30.0).blocks == HALF
        for group, pages in enumerate(seen, 1):
            assert np.array_equal(pages[:group], one.kv.values[:group, :HALF])
        compute.close()


@pytest.mark.parametrize("way", ["host", "daemon"])
def test_layers_can_be_waited_for_one_by_one(daemon: DaemonProcess, way: str) -> None:
    with rig(daemon, way, "groups") as one:
        keys = one.keys()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()
        back = one.swapper.swap_in(keys, SECOND, priority=Priority.URGENT, groups=2)
        for group in (1, 2):
            assert back.wait(group, 30.0)
            some = slice(0, group * LAYERS // 2)
            assert np.array_equal(one.kv.get(SECOND)[some], one.kv.values[some, :HALF])
        assert back.result(30.0).blocks == HALF


def test_what_the_engine_still_computes_is_not_read_before(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "computing") as one:
        keys, compute = one.keys(), one.kv.device.stream()
        values = np.full((LAYERS, HALF, PIECE), 7, np.uint8)
        with Held(compute) as held:
            compute.submit(lambda: one.kv.put(FIRST, values))
            out = one.swapper.swap_out(keys, FIRST, priority=Priority.URGENT, stream=compute)
            other = one.swapper.swap_out(one.keys(extra=b"other"), SECOND, priority=Priority.URGENT)
            assert other.result(30.0).accepted == HALF, "others do not wait for that"
            assert out.next == 0
            held.open()
            assert out.result(30.0).accepted == HALF
        assert np.array_equal(one.stored(keys), values)
        compute.close()


def test_a_copy_that_fails_half_way_writes_nothing_once_its_pages_are_free(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(daemon, "device", "half way") as one:
        keys, real, began = one.keys(), devices.Copies.copy, threading.Event()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()

        def half(copies: devices.Copies, direction: Direction, *rest: Any) -> None:
            real(copies, direction, *rest)
            began.set()
            raise DeviceError("some of it is in the stream")

        with Held(one.stream(Direction.TO_DEVICE)) as held:
            monkeypatch.setattr(devices.Copies, "copy", half)
            back = one.swapper.swap_in(keys, SECOND, priority=Priority.URGENT)
            assert began.wait(30)
            assert not one.swapper.before_reuse(SECOND, timeout_s=0.05), "the device may still write there"
            held.open()
            assert one.swapper.before_reuse(SECOND, timeout_s=30.0)
        assert back.result(30.0) == kvclient.LoadResult(0, reason=Reason.TIMED_OUT)


def test_pages_that_a_daemon_which_hangs_may_still_read_are_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_attached, "CHUNK_S", 0.1)
    with gated_daemon() as (daemon, gate), rig(daemon, "daemon") as one:
        assert one.swapper.before_reuse(SECOND), "the control"
        assert one.namespace.save(one.keys(4, extra=b"other"), one.memory[SECOND[:4]], timeout_s=30.0).accepted == 4
        one.client._connection.timeout_ns = PATIENCE_NS
        gate.shut()
        tries: list[SwapOut] = []

        def given_up_under_way() -> bool:  # a chunk that is given up before it has begun is over at once
            some = one.keys(4, extra=len(tries).to_bytes(2, "little"))
            tries.append(one.swapper.swap_out(some, FIRST[:4], priority=Priority.URGENT))
            wait_until(lambda: tries[-1].over)
            assert tries[-1].result(0.0).reasons == {Reason.TIMED_OUT: 4}
            return gate.holds

        try:
            wait_until(given_up_under_way)
            out = tries[-1]
            assert not out.done
            assert not one.swapper.before_reuse(FIRST[:4], timeout_s=0.01)
        finally:
            gate.open()
        wait_until(lambda: out.done)
        assert one.swapper.before_reuse(FIRST[:4])


@pytest.mark.parametrize("how", ["cancelled", "session lost"])
def test_a_swap_in_that_nobody_can_or_wants_to_hear_of_does_not_hold_up_others(how: str) -> None:
    with gated_daemon() as (daemon, gate), rig(daemon, "daemon") as one:
        keys = one.keys()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()
        gate.shut()
        back = one.swapper.swap_in(keys, SECOND, priority=Priority.URGENT, groups=2)
        try:
            wait_until(lambda: gate.holds and back.blocks)  # the daemon copies
            one.client._connection.timeout_ns = PATIENCE_NS
            if how == "cancelled":
                back.cancel()
            else:
                link = one.client._connection._link
                assert link is not None
                one.client._connection._drop(link, "for this test")
            wait_until(lambda: back.over)
            assert not back.result(0.0).settled
            assert not back.done
        finally:
            gate.open()
        one.client._connection.timeout_ns = 10 * 10**9
        assert one.memory.settle(30.0)
        wait_until(lambda: back.done)


def test_a_device_that_is_lost_is_a_refusal_and_a_miss(daemon: DaemonProcess) -> None:
    with rig(daemon, "device", "lost") as one:
        keys = one.keys()
        out_and_over(one, keys, FIRST)
        assert one.stored(keys).any()
        one.kv.device.lose("it fell off its bus")
        assert one.swapper.swap_in(keys, SECOND).result(30.0).reason is Reason.DEVICE
        lost = one.swapper.swap_out(one.keys(extra=b"x"), FIRST).result(30.0)
        assert (lost.accepted, lost.refused[0].reason) == (0, Reason.DEVICE)
        with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as fresh:
            assert fresh.wait_connected(30.0), "the control: the daemon is none the worse for it"


def test_without_a_daemon_nothing_is_stored_and_nothing_comes(daemon: DaemonProcess) -> None:
    with engine() as kv, kvclient.connect(f"{daemon.runtime_dir}-absent", timeout_s=0.05) as client:
        namespace = namespace_of(client, "absent")
        keys = namespace.keys(list(range(16)))
        swapper = client.swapper(namespace, kv.pages)
        assert swapper.swap_out(keys, range(4)).result(10.0).reasons == {Reason.UNREACHABLE: 4}
        assert swapper.swap_in(keys, range(4)).result(10.0).blocks == 0
    with pytest.raises(ClosedError):
        swapper.swap_out(keys, range(4))


def test_a_swapper_that_was_closed_keeps_no_memory_of_the_engines(daemon: DaemonProcess) -> None:
    with rig(daemon, "host", "closed") as one:
        other = one.client.swapper(one.namespace, one.kv.pages)
        assert one.client._swappers == [one.swapper, other], "the control"
        one.swapper.close()
        third = one.client.swapper(one.namespace, one.kv.pages)
        assert one.client._swappers == [other, third]


def test_what_an_engine_says_is_looked_at(daemon: DaemonProcess) -> None:
    with rig(daemon, "host", "said") as one:
        keys = one.keys(3)
        for pages, why in (((0, 1), "3 keys and 2"), ((0, 1, 1), "twice"), ((0, 1, PAGES), "pages")):
            with pytest.raises(UsageError, match=why):
                one.swapper.swap_out(keys, pages)
            with pytest.raises(UsageError, match=why):
                one.swapper.swap_in(keys, pages)
        with pytest.raises(UsageError, match="groups"):
            one.swapper.swap_in(keys, range(3), groups=LAYERS + 1)
        with pytest.raises(UsageError, match="32"):
            one.swapper.swap_out([b"short"], [0])
        with pytest.raises(UsageError, match="blocks of 8192"):
            one.client.swapper(namespace_of(one.client, "other", 8192), one.kv.pages)
        with pytest.raises(UsageError, match="Pages"):
            one.client.swapper(one.namespace, one.kv.layers)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="chunk_bytes"):
            one.client.swapper(one.namespace, one.kv.pages, chunk_bytes=0)


def test_tensors_of_the_host_are_pages_too(daemon: DaemonProcess) -> None:
    import torch

    random = torch.Generator().manual_seed(1)
    layers = [torch.randint(0, 256, (8, PIECE), generator=random, dtype=torch.uint8) for _ in range(2)]
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        namespace = namespace_of(client, "torch", 2 * PIECE)
        swapper = client.swapper(namespace, host_pages(layers))
        keys = namespace.keys(list(range(16)))
        wanted = [layer[:4].clone() for layer in layers]
        assert swapper.swap_out(keys, range(4)).result(30.0).accepted == 4
        assert not torch.equal(layers[0][4:], wanted[0]), "the control"
        for layer in layers:
            layer[4:] = 0
        back: SwapIn = swapper.swap_in(keys, range(4, 8), wait_s=10.0)
        assert back.result(30.0).blocks == 4
        assert all(torch.equal(layer[4:], one) for layer, one in zip(layers, wanted, strict=True))
