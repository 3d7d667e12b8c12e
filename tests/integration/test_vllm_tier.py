"""vLLM with several kinds of KV memory and the store as its second tier: real engines, a real daemon.

The model looks at everything in one half of its layers and back at 256 tokens in the other. `cold` is what it says
without the store; an engine that loads must say the same, and one whose loads are spoilt, or that has one other block
to read (`misread`), must not. What is not vLLM's own here is the copying between engine and first tier:
`vllm_cpu_offload` says why.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.engines import EngineGoneError, VllmProcess
from bench.engines.model import SIZES, write_model
from tests.integration.vllm_kit import Engine, misread
from tests.node import Node, chain, put, until, values

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

BLOCK = 128
WINDOW = SIZES["hybrid"].window // BLOCK
SAME = 0.05  # of a logprob where the prefill is split otherwise (0.039 without any store); zeros for KV: 0.5 and more
TIER = "kvclient.integrations.vllm_tier"
OURS = "tests.integration.vllm_cpu_offload"
ROW = 1 << 18  # bytes of a chunk
PATIENCE_MS = 3000.0  # so that a busy host is no miss
ENGINE: dict[str, Any] = {
    "disable_hybrid_kv_cache_manager": False,
    "enable_prefix_caching": False,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 128,
}
UNLOADED: dict[str, Any] = {"kv_transfer_params": {"kvstored": {"load": False}, "max_load_tokens": 0}}  # of any tier


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
    write_model(folder, SIZES["hybrid"], seed=0)
    return folder


def start(
    python: Path, model: Path, run: Path, log: Path, *,
    lie: str = "", connector: str = "KvstoredTieringConnector", rows: int = 256, **engine: Any,
) -> Engine:  # fmt: skip
    """An engine whose first tier has so many rows; with `lie` a second tier that lies."""
    tier = {"type": "LyingTier", "module_path": OURS, "lie": lie} if lie else {"type": "KvstoredTier"}
    transfer = {
        "kv_connector": connector,
        "kv_connector_module_path": TIER if connector == "KvstoredTieringConnector" else None,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "cpu_bytes_to_use": rows * ROW,
            "spec_name": "CPUTieringSpec",
            "spec_module_path": OURS,
            "secondary_tiers": [
                {"module_path": TIER, "runtime_dir": str(run), "lookup_timeout_ms": PATIENCE_MS} | tier
            ],
        },
    }
    return Engine(run, python, ENGINE | {"model": str(model), "kv_transfer_config": transfer} | engine, log_file=log)


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


def prompt_of(name: object, tokens: int) -> list[int]:
    """Tokens that no other name has."""
    random = Random(str(name))
    return [random.randrange(2, SIZES["hybrid"].vocabulary) for _ in range(tokens)]


def ask(engine: VllmProcess, *prompts: list[int], **more: Any) -> list[dict[str, Any]]:
    """Run these together, and whatever is to be saved of them."""
    answers = engine.generate(*({"prompt": prompt, "max_tokens": 4} | more for prompt in prompts))
    assert engine.ask(do="settle", within_s=60)["settled"]
    return answers


def serves(first: VllmProcess, second: VllmProcess) -> bool:
    """Does one find what the other stores? Clients come back by themselves.

    Each time another prompt: what an engine has computed itself it finds in its own first tier.
    """
    prompt = prompt_of(f"served {first.process.pid} {time.monotonic_ns()}", 2 * BLOCK + 5)
    ask(first, prompt)
    (answer,) = ask(second, prompt)
    return bool(answer["cached_tokens"] == 2 * BLOCK)


def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest of any logprob; large where the tokens differ."""
    if one["tokens"] != two["tokens"]:
        return 10.0
    return max(abs(float(a) - float(b)) for a, b in zip(one["logprobs"], two["logprobs"], strict=True))


def test_what_one_engine_computed_another_loads(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("shared", 7 * BLOCK + 50)
    (cold,) = ask(first, prompt)
    (warm,) = ask(second, prompt)
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 7 * BLOCK)
    assert difference(warm, cold) <= SAME
    read = second.ask(do="stats")["connector"]["vllm:kv_offload_tiering_read_bytes:('1:KvstoredTier',)"]
    assert read == (7 + WINDOW) * ROW, "of the layers with a window, only the window"
    assert misread(first, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_a_longer_prompt_continues_a_stored_one_and_another_branch_lacks_its_window(
    first: VllmProcess, second: VllmProcess
) -> None:
    prompt = prompt_of("turn", 5 * BLOCK + 50)
    ask(first, prompt)
    longer, branch = prompt + prompt_of("next turn", 300), prompt[: 3 * BLOCK] + prompt_of("branch", 300)
    warm = ask(second, longer, branch)
    cold = ask(first, longer, branch, **UNLOADED)
    assert [answer["cached_tokens"] for answer in cold] == [0, 0]
    assert [answer["cached_tokens"] for answer in warm] == [5 * BLOCK, 0]
    for tokens, one, other in zip((longer, branch), warm, cold, strict=True):
        assert difference(one, other) <= SAME
        assert misread(first, tokens, other) > 10 * SAME, "the control: one other block is noticed"


def test_requests_may_keep_apart(first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("secret", 3 * BLOCK + 9)
    ask(first, prompt, kv_transfer_params={"kvstored": {"store": False}})
    (unknown,) = ask(second, prompt, kv_transfer_params={"kvstored": {"store": False}})
    ask(first, prompt_of("salted", 3 * BLOCK + 9), salt="mine")
    (theirs,) = ask(second, prompt_of("salted", 3 * BLOCK + 9), salt="theirs")
    (mine,) = ask(second, prompt_of("salted", 3 * BLOCK + 9), salt="mine")
    assert [answer["cached_tokens"] for answer in (unknown, theirs, mine)] == [0, 0, 3 * BLOCK]


def test_spoilt_loads_change_what_the_model_says_and_failed_ones_do_not(
    python: Path, model: Path, node: Node, first: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("spoilt", 6 * BLOCK + 20)
    (cold,) = ask(first, prompt)
    with start(python, model, node.run, tmp_path / "zeros", lie="zeros") as liar:
        (spoilt,) = ask(liar, prompt)
    assert spoilt["cached_tokens"] == 6 * BLOCK
    assert difference(spoilt, cold) > 10 * SAME, "the control: zeros for KV must be noticed"
    with start(python, model, node.run, tmp_path / "short", lie="short") as liar:
        (short,) = ask(liar, prompt)
    assert short["cached_tokens"] < 6 * BLOCK
    assert difference(short, cold) <= SAME, "what was not loaded is computed"


def test_few_rows_and_few_blocks_change_nothing(
    python: Path, model: Path, node: Node, first: VllmProcess, tmp_path: Path
) -> None:
    prompts = [prompt_of(f"churn {number % 6}", 6 * BLOCK) + prompt_of(f"tail {number}", 90) for number in range(18)]
    cold = [ask(first, prompt, **UNLOADED)[0] for prompt in prompts]
    small: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_model_len": 2048, "max_num_batched_tokens": 256}
    with start(python, model, node.run, tmp_path / "small", rows=24, enable_prefix_caching=True, **small) as engine:
        for turn in range(3):
            answers = engine.generate(*({"prompt": prompt, "max_tokens": 140} for prompt in prompts))
            assert engine.ask(do="settle", within_s=60)["settled"]
            for answer, expected in zip(answers, cold, strict=True):
                cut = answer | {"tokens": answer["tokens"][:4], "logprobs": answer["logprobs"][:4]}
                assert difference(cut, expected) <= SAME, f"turn {turn}"
            assert engine.ask(do="reset_prefix_cache")["reset"]
        stats = engine.ask(do="stats")
    assert stats["external"]["found"] > 0
    assert stats["connector"]["vllm:kv_offload_tiering_read_bytes:('1:KvstoredTier',)"] > 0
    for prompt, right in zip(prompts[:6], cold, strict=False):  # each of the prefixes
        assert misread(first, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_disk_alone_answers(node: Node, first: VllmProcess, second: VllmProcess) -> None:
    prompt = prompt_of("disk", 5 * BLOCK + 30)
    (cold,) = ask(first, prompt)
    ns, canary = node.namespace(), chain("canary", 2)
    put(ns, canary, values(canary, ns.block_bytes))
    node.stop()
    node.start("--disk-admission", "all")
    node.await_disk(ns, canary)
    assert until(lambda: serves(first, second), 60.0)
    (warm,) = ask(second, prompt)
    assert warm["cached_tokens"] == 5 * BLOCK
    assert difference(warm, cold) <= SAME
    assert misread(first, prompt, cold) > 10 * SAME, "the control: one other block is noticed"


def test_a_daemon_that_hangs_or_dies_is_a_miss_and_one_that_comes_back_serves(
    node: Node, first: VllmProcess, second: VllmProcess
) -> None:
    prompts = [prompt_of(f"dying {number}", 5 * BLOCK + 30) for number in range(8)]
    cold = ask(first, *prompts)
    assert node.daemon is not None
    second.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 4} for prompt in prompts[:2]])
    node.daemon.process.send_signal(signal.SIGSTOP)
    hung = second.hear()["answers"]
    node.daemon.process.send_signal(signal.SIGCONT)
    second.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 4} for prompt in prompts[2:]])
    node.kill()
    answers = hung + second.hear()["answers"]
    for answer, expected in zip(answers, cold, strict=True):
        assert difference(answer, expected) <= SAME
    assert second.ask(do="settle", within_s=60)["settled"]
    (absent,) = ask(second, prompt_of("absent", 300))
    assert absent["cached_tokens"] == 0
    node.start("--disk-admission", "all")
    assert until(lambda: serves(first, second), 60.0)
    for prompt, right in zip(prompts, cold, strict=True):
        assert misread(first, prompt, right) > 10 * SAME, "the control: one other block is noticed"


def test_after_a_reset_for_other_weights_nothing_is_loaded_or_stored(
    python: Path, model: Path, node: Node, first: VllmProcess, second: VllmProcess, tmp_path: Path
) -> None:
    old, new = prompt_of("old weights", 3 * BLOCK + 9), prompt_of("new weights", 3 * BLOCK + 9)
    ask(first, old)
    with start(python, model, node.run, tmp_path / "log") as engine:
        (before,) = ask(engine, old)
        assert engine.ask(do="reset_prefix_cache", connector=True)["reset"]
        after = ask(engine, old, new)
    (unknown,) = ask(second, new)
    assert [answer["cached_tokens"] for answer in (before, *after, unknown)] == [3 * BLOCK, 0, 0, 0]


def test_an_engine_starts_without_a_daemon_and_not_with_a_connector_that_does_not_know_its_weights(
    python: Path, model: Path, tmp_path: Path
) -> None:
    with start(python, model, tmp_path / "nowhere", tmp_path / "log") as engine:
        (answer,) = ask(engine, prompt_of("alone", 300))
        assert answer["cached_tokens"] == 0
    with pytest.raises(EngineGoneError, match='needs "kv_connector": "KvstoredTieringConnector"'):
        start(python, model, tmp_path / "nowhere", tmp_path / "log2", connector="OffloadingConnector")
