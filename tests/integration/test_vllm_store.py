"""vLLM with the connector: real engines, a real daemon, and what becomes of them when the other one goes away.

Every engine computes the same model. `cold` is what it says without the store; an engine that loads must say the same,
and one whose loads are spoilt (`vllm_lying`) must not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engines import EngineGoneError, VllmProcess
from bench.engines.model import SIZES, write_model
from kvctl.client import SOCKET_NAME, ControlClient
from tests.integration.vllm_kit import BLOCK, SAME, ask, counts, difference, prompt_of, start, stored
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


def test_a_prompt_of_whole_blocks_leaves_one_to_compute(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("whole", 4 * BLOCK)
    cold = stored(first, prompt)
    (warm,) = ask(second, prompt)
    assert warm["cached_tokens"] == 3 * BLOCK
    assert difference(warm, cold) <= SAME


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
    # With steps that overlap, as a served vLLM runs: the next one is planned before this one's loads are known.
    with start(python, model, node.run, tmp_path / "short", lie="short", async_scheduling=True) as liar:

        def fails_by_half() -> bool:
            (short,) = ask(liar, prompt)
            assert difference(short, cold) <= SAME, "what was not loaded is computed"
            return counts(liar).get("failed blocks") == 3

        assert until(fails_by_half), "a load that is late fails as a whole"


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


def test_an_engine_starts_without_a_daemon_and_refuses_a_policy_that_fails_requests(
    python: Path, model: Path, tmp_path: Path
) -> None:
    with start(python, model, tmp_path / "nowhere", tmp_path / "log") as engine:
        (answer,) = ask(engine, prompt_of("alone", 300))
        assert answer["cached_tokens"] == 0
    with pytest.raises(EngineGoneError, match='must be "recompute"'):
        start(python, model, tmp_path / "nowhere", tmp_path / "log2", policy="fail")
