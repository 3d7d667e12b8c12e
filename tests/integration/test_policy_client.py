"""What a client knows of the future, said to a real daemon: pins, prefetches, programs, workflows, timings, advice."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvclient
import kvclient.aio
from bench.process import DaemonProcess
from kvclient import Choice, Partial, Step
from kvclient.results import Tiers
from kvproto.errors import Code
from kvproto.limits import KEYS_PER_FRAME
from tests.node import PATIENCE_S, Node, assert_blocks, chain, fetch, put, roots, until, value, values

BLOCK = 64 << 10
BLOCKS = 1024  # as many as 64 MiB hold
EXAMPLE = Path(__file__).parents[2] / "clients" / "examples" / "agent.py"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """64 MiB of DRAM and nothing below, so that what is evicted is gone."""
    with Node(disks=0) as node:
        node.start()
        yield node


@pytest.fixture
def ns(node: Node, request: pytest.FixtureRequest) -> kvclient.Namespace:
    """A namespace of this test."""
    return node.namespace(BLOCK, model=request.node.name)


def press(ns: kvclient.Namespace, name: object, count: int = BLOCKS + BLOCKS // 2) -> None:
    """Others store more than memory holds."""
    block = value(chain(name, 1)[0], BLOCK)
    for key in roots(f"pressure-{name}", count):
        assert ns.store([key], [block], space_s=PATIENCE_S).accepted == 1
    ns.flush(PATIENCE_S)


# -- pins ------------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_outlives_what_evicts_another(ns: kvclient.Namespace) -> None:
    pinned, plain = chain("pinned", 20), chain("plain", 20)
    put(ns, plain, values(plain, BLOCK), durable=False)
    put(ns, pinned, values(pinned, BLOCK), durable=False)
    before_s = time.monotonic()
    result = ns.pin(pinned, 600)
    assert (result.bytes_pinned, result.blocks, result.partial) == (20 * BLOCK, 20, Partial.NOTHING)
    assert result.expires is not None
    assert before_s + 600 <= result.expires <= time.monotonic() + 600
    assert [(pin.pin, pin.blocks, pin.bytes_pinned) for pin in ns.pins()] == [(*result.pins, 20, 20 * BLOCK)]
    press(ns, "pins")
    assert ns.match(plain).blocks < 20  # the control
    assert_blocks(fetch(ns, pinned).blocks, values(pinned, BLOCK))
    assert ns.unpin(result) == 1
    assert ns.unpin(result) == 0
    assert ns.pins() == []
    press(ns, "pins again", 2 * BLOCKS)
    assert ns.match(pinned).blocks < 20


def test_a_pin_covers_what_is_there_and_what_the_budget_allows(ns: kvclient.Namespace) -> None:
    keys = chain("partial", 1000)
    assert ns.pin(keys, 60) == kvclient.PinResult(0, None, 0, Partial.ABSENT, ())
    put(ns, keys[:30], values(keys[:30], BLOCK), durable=False)
    some = ns.pin(keys, 60)
    assert (some.blocks, some.partial) == (30, Partial.ABSENT)
    assert ns.unpin(some.pins) == 1
    block = value(keys[0], BLOCK)
    ns.store(keys, [block] * 1000, wait=True, space_s=PATIENCE_S)
    there = ns.match(keys).blocks
    assert there > 900
    most = ns.pin(keys, 60)
    assert most.partial is Partial.BUDGET
    assert 0 < most.blocks < there
    assert most.bytes_pinned == most.blocks * BLOCK
    assert ns.unpin(most) == 1


def test_what_was_stored_a_moment_ago_is_pinned_whole(node: Node) -> None:
    ns = node.namespace(4 << 20, model="large")  # some are still on their way from the ring when PIN comes
    for number in range(20):
        keys = chain(f"just stored {number}", 3)
        assert ns.store(keys, values(keys, ns.block_bytes), space_s=PATIENCE_S).accepted == 3
        result = ns.pin(keys, 60)
        assert (result.blocks, result.partial) == (3, Partial.NOTHING)
        assert ns.unpin(result) == 1


def test_a_pin_ends_by_itself_and_a_use_moves_its_end(ns: kvclient.Namespace) -> None:
    keys = chain("short", 4)
    put(ns, keys, values(keys, BLOCK), durable=False)

    def pinned_for_a_while() -> bool:  # where nobody stands still between the two
        assert ns.pin(keys, 0.2, refresh=False).blocks == 4
        return len(ns.pins()) == 1

    assert until(pinned_for_a_while)
    assert until(lambda: ns.pins() == [])
    assert ns.pin(keys, retention="5m").blocks == 4
    (first,) = ns.pins()
    fetch(ns, keys)
    (second,) = ns.pins()
    assert second.pin == first.pin
    assert second.expires > first.expires
    ns.unpin([second.pin])
    ns.pin(keys, retention="5m", refresh=False)
    (first,) = ns.pins()
    fetch(ns, keys)
    assert ns.pins() == [first]  # the control
    ns.unpin([first.pin])


def test_a_long_chain_is_pinned_in_frames(node: Node) -> None:
    ns, count = node.namespace(4096, model="long"), KEYS_PER_FRAME + 76
    keys = chain("long", count)
    put(ns, keys, values(keys, 4096), durable=False)
    result = ns.pin(keys, 60)
    assert (result.blocks, len(result.pins), result.partial) == (count, 2, Partial.NOTHING)
    assert sorted(pin.blocks for pin in ns.pins()) == [76, KEYS_PER_FRAME]
    assert ns.unpin(result) == 2


# -- prefetch --------------------------------------------------------------------------------------------------


def test_what_lies_on_disk_is_in_memory_after_a_prefetch() -> None:
    with Node() as node:
        node.start()
        ns = node.namespace(BLOCK)
        keys, other = chain("cold", 30), chain("stays", 30)
        put(ns, keys, values(keys, BLOCK))
        put(ns, other, values(other, BLOCK))
        press(ns, "disk", 2 * BLOCKS)
        assert ns.match(keys).tiers == ns.match(other).tiers == Tiers(disk=30)
        prefetch = ns.prefetch([*keys, *chain("nowhere", 2)], deadline_s=PATIENCE_S)
        assert (prefetch.there, prefetch.coming) == (0, 30)
        assert until(lambda: ns.match(keys).tiers == Tiers(dram=30)), ns.match(keys)
        found = fetch(ns, keys, wait_s=0)
        assert_blocks(found.blocks, values(keys, BLOCK))
        assert found.tiers == Tiers(dram=30)
        assert ns.match(other).tiers == Tiers(disk=30)  # the control
        again = ns.prefetch(keys)
        assert (again.there, again.coming) == (30, 0)
        ns.prefetch(other).cancel()
        assert node.client.refusals == []
        node.assert_alive()


# -- programs and workflows --------------------------------------------------------------------------------------


def test_the_example_keeps_its_prefix_over_a_tool_call(node: Node) -> None:
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE), str(node.run)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "the whole prefix is there" in ran.stdout
    for words in ([], ["--help"], ["a", "b"]):
        ran = subprocess.run([sys.executable, str(EXAMPLE), *words], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.startswith("usage: agent.py RUNTIME_DIR")
        assert ran.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_example_says_what_it_misses_where_it_can_show_nothing(tmp_path: Path) -> None:
    def run(runtime_dir: Path) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, str(EXAMPLE), str(runtime_dir)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    with DaemonProcess(tmp_path / "run", "--dram", "256MiB", "--lock", "false", log_file=tmp_path / "log") as daemon:
        roomy = run(daemon.runtime_dir)
    assert (roomy.returncode, "the whole prefix is there" in roomy.stdout) == (1, True)
    assert roomy.stderr == "this daemon has room for all: start it with --dram 64MiB\n"
    absent = run(tmp_path / "nowhere")
    assert (absent.returncode, absent.stdout, absent.stderr.count("\n")) == (1, "", 1)
    assert str(tmp_path / "nowhere") in absent.stderr


def test_a_program_keeps_its_context_until_it_is_finished(node: Node, ns: kvclient.Namespace) -> None:
    keys = chain("context", 16)
    put(ns, keys, values(keys, BLOCK), durable=False)
    with node.client.program("agent") as program:
        program.context(ns, keys)
        program.tool_started("browser", expected_s=30.0)
        assert until(lambda: [pin.blocks for pin in ns.pins()] == [16])
        press(ns, "program")
        program.tool_finished()
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK))
    assert until(lambda: ns.pins() == [])
    assert node.client.refusals == []


def test_a_workflow_is_understood_and_what_is_not_is_refused(node: Node, ns: kvclient.Namespace) -> None:
    client, keys = node.client, chain("steps", 8)
    put(ns, keys, values(keys, BLOCK), durable=False)
    steps = [Step("plan", ["search", "write"], "one", chances=[0.75, 0.25]), Step("search", ["plan"]), Step("write")]
    refused = len(client.refusals)
    workflow = client.workflow("review", steps)
    with workflow.run("one") as run:
        run.bind("plan", ns, keys)
        run.enter("plan")
        run.enter("search")
        client.run("one").enter("plan")  # the engine and the orchestrator share a clock, and so versions
    ns.expect(keys, "soon")
    ns.expect(keys, 30.0, source="router")
    ns.expect(keys)
    assert client.ping() is not None
    assert len(client.refusals) == refused
    client.run("one").enter("plan")  # it is over
    client.workflow("endless", [Step("a", ["b"]), Step("b", ["a"])])
    client.program("p").tool_finished()  # none has started
    assert client.ping() is not None
    assert until(lambda: len(client.refusals) == refused + 3)
    texts = [text for code, text in client.refusals[refused:] if code is Code.BAD_ARGUMENT]
    assert [word in text for word, text in zip(("no longer", "exit", "no tool"), texts, strict=True)] == [True] * 3
    node.assert_alive()


def test_a_successor_hears_of_programs_and_workflows_anew() -> None:
    with Node(disks=0) as node:
        node.start()
        ns, client = node.namespace(BLOCK), node.client
        program, run = client.program("p"), client.workflow("w", [Step("a", ["b"]), Step("b")]).run("r")
        node.restart()
        ns = node.namespace(BLOCK)
        keys = chain("after", 8)
        put(ns, keys, values(keys, BLOCK), durable=False)
        program.context(ns, keys)
        program.tool_started("t", 20.0)
        run.bind("b", ns, keys)
        run.enter("a")
        run.finished()
        assert until(lambda: [pin.blocks for pin in ns.pins()] == [8])
        assert client.ping() is not None
        assert client.refusals == []
        client.run("r").enter("a")  # the control: a word about what the daemon has not heard of
        assert until(lambda: len(client.refusals) == 1)


# -- timings and advice ----------------------------------------------------------------------------------------


def test_what_is_reported_is_what_a_match_weighs(ns: kvclient.Namespace) -> None:
    keys = chain("costs", 64)
    put(ns, keys, values(keys, BLOCK), durable=False)
    unknown = ns.match(keys)
    assert unknown.recompute_s is None
    assert unknown.worth_loading
    for cached in range(0, 4096, 256):
        ns.report_prefill(cached, 256, 0.050 + cached * 1e-6)
    assert until(lambda: ns.match(keys).recompute_s is not None)
    for _ in range(64):
        ns.report_load("dram", 64 * BLOCK, 0.001)
    assert until(lambda: ns.match(keys).load_s is not None)
    found = ns.match(keys)
    assert found.load_s is not None
    assert found.recompute_s is not None
    assert found.load_s < found.recompute_s
    assert found.worth_loading
    assert 0.05 < found.recompute_s < 1.0  # 1,024 tokens


def test_a_report_that_cannot_be_true_is_refused_and_forgotten(node: Node, ns: kvclient.Namespace) -> None:
    refused = len(node.client.refusals)
    ns.report_prefill(0, 256, 1e-300)
    assert until(lambda: len(node.client.refusals) == refused + 1)
    assert ns.match(chain("none", 1)).recompute_s is None


def test_advice_follows_from_what_was_reported(ns: kvclient.Namespace) -> None:
    first = ns.advise(4096, 100.0, 8192)
    assert first is not None
    assert first.choice is not Choice.DISCARD
    assert first.waste_discard is None  # nobody has timed a prefill here
    for cached in range(0, 4096, 256):
        ns.report_prefill(cached, 256, 0.01)
    assert until(lambda: (advice := ns.advise(4096, 100.0, 0)) is not None and advice.waste_discard is not None)
    short, long = ns.advise(4096, 0.001, 0), ns.advise(4096, 1000.0, 0)
    assert short is not None
    assert long is not None
    assert short.choice is Choice.PRESERVE
    assert long.choice is not Choice.PRESERVE
    assert short.waste_preserve is not None
    assert long.waste_preserve is not None
    assert short.waste_preserve < long.waste_preserve
    with pytest.raises(kvclient.UsageError):
        ns.advise(1 << 60, 1.0, 1)


def test_copies_of_leases_teach_the_daemon_how_fast_its_memory_is() -> None:
    with Node(disks=0) as node:
        node.start()
        ns = node.namespace(BLOCK)
        keys = chain("copied", 32)
        put(ns, keys, values(keys, BLOCK), durable=False)
        assert ns.match(keys).load_s is None
        assert until(lambda: fetch(ns, keys) and ns.match(keys).load_s is not None)
        assert node.client.status.hints_dropped == 0


# -- asyncio ---------------------------------------------------------------------------------------------------


def test_the_asyncio_flavour_says_the_same(node: Node) -> None:
    async def main() -> None:
        async with await kvclient.aio.connect(node.run, timeout_s=PATIENCE_S) as client:
            ns = await client.namespace(model="aio", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK)
            keys = chain("aio", 8)
            await ns.store(keys, values(keys, BLOCK), wait=True, space_s=PATIENCE_S)
            result = await ns.pin(keys, 60)
            assert (result.blocks, result.partial) == (8, Partial.NOTHING)
            assert len(await ns.pins()) == 1
            assert await ns.unpin(result) == 1
            prefetch = await ns.prefetch(keys)
            assert (prefetch.there, prefetch.coming) == (8, 0)
            with client.program("aio") as program:
                await program.context(ns, keys)
                program.tool_started("t", 20.0)
                while not await ns.pins():
                    await asyncio.sleep(0)
            with client.workflow("w", [Step("a")]).run() as run:
                await run.bind("a", ns, keys)
                run.enter("a")
            await ns.expect(keys, "hardly")
            ns.report_prefill(0, 128, 0.1)
            assert await ns.advise(128, 1.0, 0) is not None
            while await ns.pins():
                await asyncio.sleep(0)
            assert client.refusals == []

    asyncio.run(asyncio.wait_for(main(), 60))
