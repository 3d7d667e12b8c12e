"""The asyncio flavour of pins, prefetches, advice, programs and workflows: the same flows, in coroutines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import kvclient.aio
from kvclient.lease import TIMED_EACH
from kvclient.policy_flows import NOTHING_PINNED
from kvclient.results import Choice, Partial, PinResult
from kvproto import frames
from kvproto.errors import ClosedError, Code, UsageError
from kvproto.frames import Verb
from kvproto.limits import KEYS_PER_FRAME, MIB
from kvproto.policy_frames import Event, Kind, Tier
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, Stopwatch, keys_of
from tests.unit.client_policy_kit import NAMESPACE, teach

SLACK_S = 15.0
KEYS = keys_of(5)
STEPS = [kvclient.Step("plan", ["write"]), kvclient.Step("write")]
Both = tuple[kvclient.aio.AsyncClient, kvclient.aio.AsyncNamespace]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))


@contextlib.asynccontextmanager
async def pair(directory: Path, timeout_s: float = PATIENCE_S, block_bytes: int = BLOCK_BYTES) -> AsyncIterator[Both]:
    async with await kvclient.aio.connect(directory, timeout_s=timeout_s) as client:
        yield client, await client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=block_bytes)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_pins_prefetches_and_advice_are_awaited(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (_, ns):
            result = await ns.pin(KEYS, retention="5m")
            assert (result.blocks, result.pins, result.partial) == (5, (1,), Partial.NOTHING)
            assert [pin.pin for pin in await ns.pins()] == [1]
            assert await ns.unpin(result) == 1
            assert await ns.pins() == []
            long = await ns.pin(keys_of(KEYS_PER_FRAME + 1), 30, tier="disk", refresh=False)
            assert long.pins == (2, 3)
            assert policies.asked[1:] == [(Tier.DISK, 30 * 10**9, False)] * 2
            prefetch = await ns.prefetch(KEYS)
            assert (prefetch.there, prefetch.coming) == (0, 5)
            prefetch.cancel()
            await until(lambda: peer.cancelled == [1])
            advice = await ns.advise(10, 0.5, 20)
            assert advice is not None
            assert advice.choice == Choice.SWAP
            for attempt in (ns.pin(KEYS), ns.prefetch(KEYS, deadline_s=0), ns.advise(-1, 0, 0), ns.expect(KEYS, "now")):
                with pytest.raises(UsageError):
                    await attempt

    with Peer(tmp_path) as peer:
        policies = teach(peer)
        run(main)


def test_hints_and_timings_are_said_and_not_awaited(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            with client.program("p") as program:
                await program.context(ns, KEYS)
                program.tool_started("t", 1.0)
                program.tool_finished()
            with client.workflow("w", STEPS).run("r") as going:
                await going.bind("write", ns, KEYS)
                going.enter("plan")
            await client.run("r").bind("write", ns, KEYS)
            await ns.expect(KEYS, "later")
            ns.report_prefill(0, 10, 0.5)
            await until(lambda: len(peer.hints) == 12 and len(peer.reports) == 1)
        with pytest.raises(ClosedError):
            program.turn_finished()

    with Peer(tmp_path) as peer:
        run(main)
        assert [hint.event for hint in peer.hints] == [
            Event.PROGRAM, Event.CONTEXT, Event.TOOL_STARTED, Event.TOOL_FINISHED, Event.PROGRAM_FINISHED,
            Event.WORKFLOW, Event.RUN, Event.BIND, Event.ENTER, Event.RUN_FINISHED, Event.BIND, Event.EXPECT,
        ]  # fmt: skip
        assert peer.hints[1].keys == b"".join(KEYS)
        assert peer.hints[11].expectation == 2


def test_a_new_session_hears_of_everything_anew_and_refusals_are_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with pair(tmp_path) as (client, ns):
            program, going = client.program("p"), client.workflow("w", STEPS).run("r")
            await until(lambda: len(peer.hints) == 3)
            peer.hang_up()
            await until(lambda: peer.hellos == 2 and client.connected)
            peer.hints.clear()
            ns.report_prefill(0, 10, 0.5)
            assert client.status.hints_dropped == 1
            program.turn_finished()
            going.enter("plan")
            await program.context(ns, KEYS)
            await until(lambda: len(peer.hints) == 6)
            refusal = frames.build_failure(Verb.REFUSED, 0, Code.BAD_ARGUMENT, "no")
            await asyncio.to_thread(peer.do, lambda: peer.send(refusal))
            await until(lambda: client.refusals)
            assert client.refusals == [(Code.BAD_ARGUMENT, "no")]
            assert client.status.hints_refused == 1
            assert client.connected

    with Peer(tmp_path) as peer:
        run(main)
        assert [hint.event for hint in peer.hints] == [
            Event.PROGRAM, Event.TURN_FINISHED, Event.WORKFLOW, Event.RUN, Event.ENTER, Event.CONTEXT,
        ]  # fmt: skip


def test_without_a_daemon_or_with_a_silent_one_nothing_is_pinned(tmp_path: Path) -> None:
    async def main() -> None:
        with Stopwatch(SLACK_S):
            async with pair(tmp_path, 0.1) as (client, ns):
                assert await ns.pin(KEYS, 30) == NOTHING_PINNED
                assert (await ns.prefetch(KEYS)).coming == 0
                assert (await ns.pins(), await ns.unpin([1]), await ns.advise(1, 1, 1)) == ([], 0, None)
                client.program("p").turn_finished()
                assert client.status.hints_dropped == 1
        with Peer(tmp_path) as peer:
            policies = teach(peer)
            async with pair(tmp_path) as (client, ns):
                assert await ns.pins() == []  # it is open
                client._connection.timeout_ns = ns._timeout_ns = 10**8
                peer.mute(Verb.PIN)
                with Stopwatch(SLACK_S):
                    assert await ns.pin(KEYS, 30) == PinResult(0, None, 0, Partial.TIMED_OUT, ())
                await asyncio.to_thread(peer.answer_held)
                await until(lambda: Verb.UNPIN in peer.seen)
                assert policies.pins == {}

    run(main)


def test_one_in_sixteen_large_copies_is_reported(tmp_path: Path) -> None:
    block = bytes(MIB)

    async def main() -> None:
        async with pair(tmp_path, block_bytes=MIB) as (client, ns):
            keys, target = keys_of(1), bytearray(MIB)
            await ns.store(keys, [block], wait=True)
            for copied in range(2 * TIMED_EACH):
                async with ns.fetch(keys) as lease:
                    if client._connection.large_copies == 0:
                        await until(lambda: not any(part.cold for part in lease._parts))
                    assert await lease.copy_to([target])
                await client.ping()
                assert len(peer.reports) == (copied + 1) // TIMED_EACH

    with Peer(tmp_path, arena_bytes=4 * MIB, ring_bytes=4 * MIB) as peer:
        run(main)
        assert [report[:4] for report in peer.reports] == [(NAMESPACE, Kind.LOAD, Tier.DRAM, MIB)] * 2
