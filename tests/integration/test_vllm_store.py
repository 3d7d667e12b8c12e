"""vLLM with the connector: real engines, a real daemon, and what becomes of them when the other one goes away.

Every engine computes the same model. `cold` is what it says without the store; an engine that loads must say the same,
and one whose loads are spoilt (`vllm_lying`), or that has one other block to read (`misread`), must not.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engines import ENVIRONMENT, PATHS, EngineGoneError, VllmProcess
from bench.engines.model import SIZES, write_model
from kvctl.client import SOCKET_NAME, ControlClient
from kvproto.limits import MIB
from tests.integration.vllm_kit import (
    APART,
    BESIDE,
    BLOCK,
    BLOCK_BYTES,
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

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with a disk."""
    with Node(dram="256MiB", size="1GiB", segment="64MiB") as node:
        node.start("--disk-admission", "all")
        yield node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that all engines run."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


@pytest.fixture(scope="module")
def first(python: Path, model: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Computes everything first."""
    with start(python, model, node.run, tmp_path_factory.mktemp("first") / "log") as engine:
        yield engine


@pytest.fixture(scope="module")
def second(python: Path, model: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Another engine of this host, at the same time."""
    with start(python, model, node.run, tmp_path_factory.mktemp("second") / "log") as engine:
        yield engine


def all_written(node: Node) -> bool:
    """Does nothing wait for the drive?"""
    with ControlClient(node.run / SOCKET_NAME, 20.0) as operator:
        disk = operator.status().disk
    return not (disk.queued_chains or disk.running_bytes)


def while_the_forward_runs(engine: VllmProcess, prompt: list[int], cold: dict[str, Any]) -> float:
    """How far off an answer is whose blocks were loaded beside its forward: once the daemon's memory is populated."""
    answers: list[dict[str, Any]] = []
    found: dict[str, float] = {}

    def beside() -> bool:
        counts(engine)
        answers[:] = ask(engine, prompt)
        found.clear()
        found.update(counts(engine))
        return bool(found.get("beside blocks"))

    assert until(beside, 60.0), "no load goes on beside a forward"
    assert found["beside blocks"] == found["loaded blocks"] == len(prompt) // BLOCK
    return difference(answers[0], cold)


def test_what_one_engine_computed_another_loads(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("shared", 7 * BLOCK + 50)
    cold = stored(first, prompt)
    (warm,) = ask(second, prompt)
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 7 * BLOCK)
    assert difference(warm, cold) <= SAME
    assert while_the_forward_runs(second, prompt, cold) <= SAME
    suffixed = prompt[: 5 * BLOCK] + prompt_of("suffix", 300)
    (mixed,) = ask(second, suffixed)
    (alone,) = ask(first, suffixed, kv_transfer_params={"kvstored": {"load": False}})
    assert (mixed["cached_tokens"], alone["cached_tokens"]) == (5 * BLOCK, 0)
    assert difference(mixed, alone) <= SAME
    for tokens, right in ((prompt, cold), (suffixed, alone)):
        assert misread(first, tokens, right) > 10 * SAME, "the control: one other block is noticed"


def test_what_another_engine_has_stored_is_not_copied_again(
    node: Node, first: VllmProcess, second: VllmProcess
) -> None:
    prompt = prompt_of("twice", 5 * BLOCK + 20)
    unloaded = {"kv_transfer_params": {"kvstored": {"load": False}}}
    for engine, became in ((first, "saved blocks"), (second, "known blocks")):
        counts(engine)
        found: dict[str, float] = {}

        def told(engine: VllmProcess = engine, found: dict[str, float] = found, became: str = became) -> bool:
            ask(engine, prompt_of("after", 9))  # totals come with a later step
            for name, count in counts(engine).items():
                found[name] = found.get(name, 0.0) + count
            return became in found

        (answer,) = ask(engine, prompt, **unloaded)
        assert answer["cached_tokens"] == 0, "each of them has computed it"
        assert until(told), found
        assert found[became] == 5
        assert found.get("saved MiB", 0.0) == (5 * BLOCK_BYTES / MIB if engine is first else 0.0)
    assert found.get("saved blocks", 0) == 0


def test_two_engines_that_generate_at_once_say_what_each_would_alone(first: VllmProcess, second: VllmProcess) -> None:
    base = prompt_of("at once", 3 * BLOCK)
    prompts = [base + prompt_of(f"at once {number}", (number % 3) * BLOCK + 50) for number in range(6)]
    cold = [ask(first, prompt, kv_transfer_params=APART)[0] for prompt in prompts]
    engines = {first: list(range(6)), second: list(range(5, -1, -1))}  # which prompts, in which order
    for engine in engines:
        engine.ask(do="stats")
    found = dict.fromkeys(engines, 0)
    for _ in range(4):
        for engine, order in engines.items():
            engine.tell(do="generate", requests=[{"prompt": prompts[number], "max_tokens": 4} for number in order])
        for engine, order in engines.items():
            for number, answer in zip(order, engine.hear()["answers"], strict=True):
                assert difference(answer, cold[number]) <= SAME
        for engine in engines:
            assert engine.ask(do="settle")["settled"]
            found[engine] += engine.ask(do="stats")["external"]["found"]
    assert min(found.values()) >= 6 * 3 * BLOCK, "each of them has loaded, too"
    for prompt, right in zip(prompts, cold, strict=True):
        assert misread(first, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_a_prompt_of_whole_blocks_leaves_one_to_compute(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("whole", 4 * BLOCK)
    cold = stored(first, prompt)
    (warm,) = ask(second, prompt)
    assert warm["cached_tokens"] == 3 * BLOCK
    assert difference(warm, cold) <= SAME
    assert misread(first, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_what_an_engine_decodes_is_stored_too(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("decoded", BLOCK - 10)
    longer: list[int] = []
    warm: dict[str, Any] = {}

    def comes() -> bool:
        (answer,) = ask(first, prompt, max_tokens=BLOCK, kv_transfer_params={"kvstored": {"load": False}})
        longer[:] = prompt + answer["tokens"]
        warm.update(ask(second, longer, kv_transfer_params={"kvstored": {"store": False}})[0])
        return bool(warm["cached_tokens"] == BLOCK)

    assert until(comes), warm
    (cold,) = ask(first, longer, kv_transfer_params={"kvstored": {"load": False}})
    assert difference(warm, cold) <= SAME
    assert misread(first, longer, cold) > 10 * SAME, "the control: one other block is noticed"


def test_salts_and_no_store_keep_apart(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("salted", 3 * BLOCK + 9)
    stored(first, prompt, salt="mine")
    (theirs,) = ask(second, prompt, salt="theirs")
    (mine,) = ask(second, prompt, salt="mine")
    assert (theirs["cached_tokens"], mine["cached_tokens"]) == (0, 3 * BLOCK)
    secret = prompt_of("secret", 3 * BLOCK + 9)
    ask(first, secret, kv_transfer_params={"kvstored": {"store": False}})
    (unknown,) = ask(second, secret, kv_transfer_params={"kvstored": {"stor": False}})
    assert unknown["cached_tokens"] == 0
    assert "is left out" in second.log()


def test_a_request_can_pin_its_context(first: VllmProcess) -> None:
    first.ask(do="stats")
    ask(first, prompt_of("pinned", 2 * BLOCK + 9), kv_transfer_params={"kvstored": {"pin_ttl_s": 60}})
    found: dict[str, float] = {}

    def pinned() -> bool:  # behind the save, and told of with a later step
        ask(first, prompt_of("after", 9))
        for name, count in counts(first).items():
            found[name] = found.get(name, 0.0) + count
        return "pinned MiB" in found and found["pinned MiB"] > 0

    assert until(pinned), found
    assert found["saved blocks"] == 2
    assert found["pinned MiB"] == 1.0


def test_spoilt_loads_change_what_the_model_says_and_failed_ones_do_not(
    python: Path, model: Path, node: Node, first: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("spoilt", 6 * BLOCK + 20)
    cold = stored(first, prompt)
    with start(python, model, node.run, tmp_path / "zeros", lie="zeros") as liar:
        (spoilt,) = ask(liar, prompt)
        assert while_the_forward_runs(liar, prompt, cold) > 10 * SAME, "the same control"
    assert spoilt["cached_tokens"] == 6 * BLOCK
    assert difference(spoilt, cold) > 10 * SAME, "the control: zeros for KV must be noticed"
    with start(python, model, node.run, tmp_path / "aside", lie="zeros", extra=BESIDE) as liar:
        (spoilt,) = asked_beside(liar, prompt)
        assert counts(liar)["loaded blocks"] == 6
    assert difference(spoilt, cold) > 10 * SAME, "the same control"
    with start(python, model, node.run, tmp_path / "short", lie="short", extra=BESIDE) as liar:
        (short,) = asked_beside(liar, prompt)
        assert difference(short, cold) <= SAME, "what was not loaded is computed"
        assert counts(liar)["failed blocks"] == 3


def test_few_blocks_and_small_chunks_change_nothing(
    python: Path, model: Path, node: Node, first: VllmProcess, tmp_path: Path
) -> None:
    prompts = [prompt_of(f"churn {number % 6}", 6 * BLOCK) + prompt_of(f"tail {number}", 90) for number in range(18)]
    cold = [ask(first, prompt, kv_transfer_params={"kvstored": {"load": False}})[0] for prompt in prompts]
    small: dict[str, Any] = {"num_gpu_blocks_override": 30, "max_model_len": 2048, "max_num_batched_tokens": 256}
    with start(python, model, node.run, tmp_path / "small", enable_prefix_caching=True, **small) as engine:
        for turn in range(3):
            answers = engine.generate(*({"prompt": prompt, "max_tokens": 140} for prompt in prompts))
            assert engine.ask(do="settle")["settled"]
            for answer, expected in zip(answers, cold, strict=True):
                cut = answer | {"tokens": answer["tokens"][:4], "logprobs": answer["logprobs"][:4]}
                assert difference(cut, expected) <= SAME, f"turn {turn}"
            assert engine.ask(do="reset_prefix_cache")["reset"]
        stats = engine.ask(do="stats")
    assert stats["preempted"] > 0, "so many do not fit at a time"
    assert stats["external"]["found"] > 0
    for prompt, right in zip(prompts[:6], cold, strict=False):  # each of the prefixes
        assert misread(first, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_disk_alone_answers(node: Node, first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("disk", 5 * BLOCK + 30)
    cold = stored(first, prompt)
    assert until(lambda: all_written(node)), "what leaves memory before it is written is gone"
    filler = [prompt_of(f"filler {number}", 3900) for number in range(20)]
    for one in filler:  # 300 MiB through 256
        ask(first, one)
    warm: dict[str, Any] = {}

    def comes() -> bool:  # a drive that stood still is believed to be slow, and is tried again now and then
        warm.update(ask(second, prompt, kv_transfer_params={"kvstored": {"store": False}})[0])
        return bool(warm["cached_tokens"] == 5 * BLOCK)

    assert until(comes), warm
    assert difference(warm, cold) <= SAME
    assert misread(first, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_a_daemon_that_dies_is_a_miss_and_one_that_comes_back_serves(
    node: Node, first: VllmProcess, second: VllmProcess
) -> None:
    prompts = [prompt_of(f"dying {number}", 5 * BLOCK + 30) for number in range(4)]
    cold = ask(first, *prompts)
    second.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 4} for prompt in prompts * 4])
    node.kill()
    answers = second.hear()["answers"]
    for answer, expected in zip(answers, cold * 4, strict=True):
        assert difference(answer, expected) <= SAME
    assert second.ask(do="settle")["settled"]
    (absent,) = ask(second, prompts[0])
    assert absent["cached_tokens"] == 0
    assert difference(absent, cold[0]) <= SAME
    node.start("--disk-admission", "all")
    again = prompt_of("again", 2 * BLOCK + 5)
    assert until(lambda: ask(second, again)[0]["cached_tokens"] == 2 * BLOCK), "a client comes back by itself"
    for prompt, right in zip(prompts, cold, strict=True):
        assert misread(second, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_an_engine_that_starts_without_a_daemon_computes_and_uses_one_that_comes_later(
    python: Path, model: Path, first: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("alone", 3 * BLOCK + 20)
    (cold,) = ask(first, prompt, kv_transfer_params=APART)
    with Node(disks=0) as late, start(python, model, late.run, tmp_path / "log") as engine:
        (alone,) = ask(engine, prompt)
        assert (alone["cached_tokens"], difference(alone, cold) <= SAME) == (0, True)
        late.start()
        warm: dict[str, Any] = {}

        def hits() -> bool:
            warm.update(ask(engine, prompt)[0])
            assert difference(warm, cold) <= SAME
            return bool(warm["cached_tokens"] == 3 * BLOCK)

        assert until(hits), "it finds the daemon, stores, and loads"
        assert difference(warm, cold) <= SAME
    assert misread(first, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_an_engine_refuses_a_policy_that_fails_requests(python: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineGoneError, match='must be "recompute"'):
        start(python, model, tmp_path / "nowhere", tmp_path / "log", policy="fail")


def test_vllm_hears_that_layers_are_waited_for_only_where_they_are(python: Path) -> None:
    asked = "[KvstoredConnector.requires_piecewise_for_cudagraph(each) for each in ({}, {'layerwise': True})]"
    program = f"from kvclient.integrations.vllm import KvstoredConnector; print({asked})"
    path = os.pathsep.join(map(str, PATHS))
    said = subprocess.run(
        [python, "-c", program], env=os.environ | ENVIRONMENT | {"PYTHONPATH": path}, check=True, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == "[False, True]"
