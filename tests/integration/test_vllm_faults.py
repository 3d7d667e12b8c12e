"""vLLM with the connector, when what it loads is bad, late, or gone: it computes, and stores nothing that is wrong."""

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from kvctl.client import ControlClient
from kvstore.tier.format import HEADER_BYTES
from tests.integration.vllm_kit import (
    APART,
    BESIDE,
    BLOCK,
    SAME,
    ask,
    asked_beside,
    counts,
    difference,
    misread,
    prompt_of,
    start,
    stored,
)
from tests.node import Node, until
from tests.segments import flip

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

NUMBERS = itertools.count()
LEASE_S = 3.0  # short, and longer than a load takes on a machine that stands still meanwhile
LEASE = ("--lease-ttl-max", f"{LEASE_S:.0f}s")
LOADS = ("loaded blocks", "failed blocks")
LOAD_ONLY = {"kv_transfer_params": {"kvstored": {"store": False}}}


def await_end_of_lease() -> None:
    """Until then the memory of a daemon that died is as it was, and what is loaded out of it is right."""
    over = time.monotonic() + LEASE_S
    assert until(lambda: time.monotonic() > over)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with a disk, and leases that are soon over."""
    with Node(dram="256MiB", size="1GiB", segment="64MiB") as node:
        node.start("--disk-admission", "all", *LEASE)
        yield node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that all engines run."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


@pytest.fixture(scope="module")
def honest(python: Path, model: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Stores, and says what is right."""
    with start(python, model, node.run, tmp_path_factory.mktemp("honest") / "log") as engine:
        yield engine


def test_what_is_computed_on_a_load_that_failed_is_neither_stored_nor_given_to_others(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path
) -> None:
    base = prompt_of("one step", 7 * BLOCK)
    prompts = [base + prompt_of(name, 40) for name in "abcd"]
    stored(honest, base[: 4 * BLOCK + 10])
    cold = [ask(honest, prompt, kv_transfer_params=APART)[0] for prompt in prompts]
    # Two requests of one step: vLLM's cache gives the second what the first is loading.
    chunks: dict[str, Any] = {"enable_prefix_caching": True, "max_num_batched_tokens": 1024}
    with start(python, model, node.run, tmp_path / "short", lie="short", **chunks) as liar:
        answers = ask(liar, *prompts[:2]) + ask(liar, prompts[2])
        assert counts(liar)["failed blocks"] >= 2
    for answer, right in zip(answers, cold, strict=False):
        assert difference(answer, right) <= SAME
    (warm,) = ask(honest, prompts[3])
    assert warm["cached_tokens"] == 7 * BLOCK, "what was computed anew is stored"
    assert difference(warm, cold[3]) <= SAME, "and nothing else"
    for prompt, right in zip(prompts, cold, strict=True):
        assert misread(honest, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_layers_are_loaded_while_the_forward_runs(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path
) -> None:
    base = prompt_of("layers", 6 * BLOCK)
    prompts = [base + prompt_of(name, 60) for name in ("one", "two", "three", "four")]
    stored(honest, [*base, 3])
    cold = [ask(honest, prompt, kv_transfer_params=APART)[0] for prompt in prompts]
    by_layer: dict[str, Any] = {"extra": {"layerwise": True}}
    with start(python, model, node.run, tmp_path / "log", **by_layer) as engine:
        for prompt, right in zip(prompts, cold, strict=True):
            (warm,) = ask(engine, prompt)
            assert warm["cached_tokens"] == 6 * BLOCK
            assert difference(warm, right) <= SAME
        assert counts(engine)["loaded blocks"] == 24

        def both_load() -> bool:
            both = ask(engine, *prompts[:2])
            assert [difference(*pair) <= SAME for pair in zip(both, cold, strict=False)] == [True, True]
            return counts(engine).get("loaded blocks") == 12

        assert until(both_load), "a step computes what it has not begun to load within 40 ms"
    with start(python, model, node.run, tmp_path / "zeros", lie="zeros", **by_layer) as liar:
        (spoilt,) = ask(liar, prompts[0], **LOAD_ONLY)
        assert difference(spoilt, cold[0]) > 10 * SAME, "the control: zeros for KV must be noticed"
    with start(python, model, node.run, tmp_path / "late", lie="late", **by_layer) as liar:
        longer = base + prompt_of("longer", 3 * BLOCK)
        (right,) = ask(honest, longer, kv_transfer_params=APART)
        (late,) = ask(liar, longer)
        assert counts(liar)["failed blocks"] == 6, "known in the middle of the forward"
        assert difference(late, right) <= SAME
    (warm,) = ask(honest, longer)
    assert warm["cached_tokens"] == 8 * BLOCK
    assert difference(warm, right) <= SAME, "nothing is stored of the forward that was thrown away"


def test_what_a_forward_read_of_a_lease_that_lapsed_meanwhile_is_thrown_away(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path
) -> None:
    base = prompt_of("beside", 6 * BLOCK)
    longer = base + prompt_of("and longer", 3 * BLOCK)
    stored(honest, [*base, 3])
    (right,) = ask(honest, longer, kv_transfer_params=APART)
    with start(python, model, node.run, tmp_path / "late", lie="late") as liar:

        def fails() -> bool:  # in a forward in which every layer asks, once the daemon's memory is populated
            ask(liar, [*base, 3], **LOAD_ONLY)
            return bool(counts(liar).get("failed blocks"))

        assert until(fails, 60.0)
        (late,) = ask(liar, longer)
        assert counts(liar)["failed blocks"] == 6, "known when the forward is over"
    assert difference(late, right) <= SAME
    (warm,) = ask(honest, longer)
    assert warm["cached_tokens"] == 8 * BLOCK
    assert difference(warm, right) <= SAME, "nothing is stored of the forward that was thrown away"
    assert misread(honest, longer, right) > 10 * SAME, "the control: one other block is noticed"


@pytest.mark.parametrize("extra", [{}, BESIDE], ids=["before the forward", "beside it"])
def test_a_lease_that_lapses_is_a_miss(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path, extra: dict[str, Any]
) -> None:
    prompt = prompt_of(f"lapses {extra}", 5 * BLOCK + 20)
    cold = stored(honest, prompt)
    (warm,) = ask(honest, prompt)
    assert warm["cached_tokens"] == 5 * BLOCK, "the control: in time it is there"
    with start(python, model, node.run, tmp_path / "log", lie="lapse", extra=extra) as liar:
        (late,) = asked_beside(liar, prompt) if extra else ask(liar, prompt)
        assert counts(liar)["failed blocks"] == 5
    assert difference(late, cold) <= SAME
    assert misread(honest, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_a_daemon_that_dies_in_the_middle_of_a_load_costs_nobody_an_answer(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("mid-load", 6 * BLOCK + 20)
    cold = stored(honest, prompt)
    assert misread(honest, prompt, cold) > 10 * SAME, "the control: one other block is noticed"
    held = tmp_path / "held"
    for dies, became in ((False, "loaded blocks"), (True, "failed blocks")):
        with start(python, model, node.run, tmp_path / "log", lie=f"held {held}", extra=BESIDE) as liar:
            liar.ask(do="steps")
            liar.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 4}])
            assert until(held.exists), "half of the blocks are copied"
            if dies:
                node.kill()
                await_end_of_lease()
            held.unlink()
            (answer,) = liar.hear()["answers"]
            assert liar.ask(do="steps")["idle"], "it waited for its blocks without a forward"
            assert difference(answer, cold) <= SAME
            assert liar.ask(do="settle")["settled"]
            loads = counts(liar)
            assert {name: loads.get(name, 0) for name in LOADS} == dict.fromkeys(LOADS, 0) | {became: 6}
    node.start("--disk-admission", "all", *LEASE)
    assert until(lambda: _serves(honest))


def test_bits_that_flip_on_disk_are_computed_anew(python: Path, model: Path, tmp_path: Path) -> None:
    spoilt, sound = prompt_of("flipped", 5 * BLOCK + 30), prompt_of("sound", 5 * BLOCK + 30)
    with Node(size="1GiB", segment="64MiB") as node:
        node.start("--disk-admission", "all")
        with start(python, model, node.run, tmp_path / "log") as engine:
            cold = stored(engine, spoilt)
            assert misread(engine, spoilt, cold) > 10 * SAME, "the control: one other block is noticed"
            assert until(lambda: len(node.slots()) == 5), "written behind"
            blocks = set(node.slots())
            stored(engine, sound)
            assert until(lambda: len(node.slots()) == 10)
            node.stop()
            node.start("--disk-admission", "all")  # what was in memory is gone
            for key in blocks:
                slot = node.slots()[key]
                flip(slot.path, 8 * (slot.offset + HEADER_BYTES + 12345) + 3)
            control = f"the control: sound ones come\n{node.log()[-2000:]}"
            assert until(lambda: ask(engine, sound, **LOAD_ONLY)[0]["cached_tokens"] == 5 * BLOCK), control

            def is_met() -> bool:  # while the drive is believed to be slower than computing, few loads are tried
                (anew,) = ask(engine, spoilt, **LOAD_ONLY)
                assert anew["cached_tokens"] == 0
                assert difference(anew, cold) <= SAME
                with ControlClient(node.run / "control.sock", 20.0) as operator:
                    return operator.status().disk.counters.damaged >= 1

            assert until(is_met), "the flip was never met"


def test_a_prefix_cache_is_reset_although_a_daemon_hangs(
    python: Path, model: Path, node: Node, honest: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("reset", 5 * BLOCK + 20)
    (cold,) = ask(honest, prompt, kv_transfer_params=APART)
    with start(python, model, node.run, tmp_path / "log", enable_prefix_caching=True) as engine:
        assert node.daemon is not None
        os.kill(node.daemon.process.pid, signal.SIGSTOP)
        (first,) = engine.generate({"prompt": prompt, "max_tokens": 4})
        assert engine.ask(do="reset_prefix_cache")["reset"], "no block waits for a save"
        os.kill(node.daemon.process.pid, signal.SIGCONT)
        assert engine.ask(do="settle")["settled"]
        (forgotten,) = ask(engine, prompt_of("other", 20))
        assert forgotten["cached_tokens"] == 0
        (second,) = ask(engine, prompt, kv_transfer_params={"kvstored": {"load": False}})
        assert second["cached_tokens"] == 0, "forgotten by vLLM"
        answers = [first, second]

        def stored() -> bool:
            assert engine.ask(do="reset_prefix_cache")["reset"]
            answers.extend(ask(engine, prompt))
            return bool(answers[-1]["cached_tokens"] == 5 * BLOCK)

        assert until(stored), "the store has not forgotten it, and is asked again soon"
    for answer in answers:
        assert difference(answer, cold) <= SAME
    assert misread(honest, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_what_the_connector_counts_is_among_vllms_metrics(
    python: Path, model: Path, node: Node, honest: VllmProcess
) -> None:
    def metrics() -> dict[tuple[str, str], float]:
        counters = honest.ask(do="metrics", prefix="vllm:kvstored_")["metrics"]
        return {
            (name[len("vllm:kvstored_") : -len("_total")], _label(labels)): value for name, labels, value in counters
        }

    before = metrics()
    prompt = prompt_of("metrics", 3 * BLOCK + 20)
    stored(honest, prompt)
    ask(honest, prompt_of("heard", 20))  # totals come with the next step
    after = metrics()
    grown = {name: after[name] - before[name] for name in before}
    assert len(grown) == 14, "all are there from the start"
    assert grown["save_blocks", "saved"] == grown["load_blocks", "loaded"] == 3
    assert grown["load_blocks", "failed"] == grown["save_blocks", "refused"] == 0
    assert grown["transfer_bytes", "load"] == grown["transfer_bytes", "save"] == 3 * BLOCK * SIZES["tiny"].token_bytes
    assert grown["hit_tokens", ""] == 3 * BLOCK
    assert min(grown["lookup_seconds", ""], grown["transfer_seconds", "save"], grown["transfer_seconds", "load"]) > 0


def _label(labels: dict[str, str]) -> str:
    return labels.get("outcome") or labels.get("direction") or ""


def _serves(engine: VllmProcess) -> bool:
    """Has this engine found its daemon again?"""
    prompt = prompt_of(f"again {next(NUMBERS)}", BLOCK + 5)
    return bool([ask(engine, prompt)[0]["cached_tokens"] for _ in range(2)][1] == BLOCK)
