"""A real vLLM says the same twice, and notices other weights: what the tests of our connector stand on."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

BLOCK_TOKENS = 128  # vLLM's own on CPU
NEW_TOKENS = 4
TOLERANCE = 1e-4  # of a logprob of the same prompt in another process; other weights are off by tenths and more
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": True,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 128,
}


@pytest.fixture(scope="module")
def engine(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """The one that others are compared with; every test has prompts of its own."""
    with _start(python, tmp_path_factory.mktemp("engine"), seed=0) as process:
        yield process


def test_two_processes_say_the_same_and_other_weights_do_not(python: Path, engine: VllmProcess, tmp_path: Path) -> None:
    prompt = _prompt("two processes", 1000)
    (first,) = engine.generate(_request(prompt))
    with _start(python, tmp_path / "twin", seed=0) as twin:
        (second,) = twin.generate(_request(prompt))
    with _start(python, tmp_path / "other", seed=1) as other:
        (third,) = other.generate(_request(prompt))
    assert second["tokens"] == first["tokens"]
    assert _difference(second, first) <= TOLERANCE
    assert _difference(third, first) > 100 * TOLERANCE, "the control: a comparison that takes anything shows nothing"


def test_what_a_model_says_depends_on_the_first_block_of_its_prompt(engine: VllmProcess) -> None:
    prompt = _prompt("first block", 4 * BLOCK_TOKENS)
    other = _prompt("another first block", BLOCK_TOKENS) + prompt[BLOCK_TOKENS:]
    (one,) = engine.generate(_request(prompt))
    (two,) = engine.generate(_request(other))
    assert _difference(one, two) > 100 * TOLERANCE


def test_a_prompt_known_to_the_engine_is_cached_by_whole_blocks_and_by_salt(engine: VllmProcess) -> None:
    prompt = _prompt("known", 3 * BLOCK_TOKENS + 40)
    engine.ask(do="stats")
    (cold,) = engine.generate(_request(prompt, salt="mine"))
    (warm,) = engine.generate(_request(prompt, salt="mine"))
    (apart,) = engine.generate(_request(prompt, salt="yours"))
    assert [answer["cached_tokens"] for answer in (cold, warm, apart)] == [0, 3 * BLOCK_TOKENS, 0]
    assert _difference(warm, cold) <= 0.05, "a prefill that is split otherwise rounds otherwise"
    stats = engine.ask(do="stats")
    assert stats["local"] == {"looked_up": 3 * len(prompt), "found": 3 * BLOCK_TOKENS}
    assert stats["external"] == {"looked_up": 0, "found": 0}
    assert engine.ask(do="reset_prefix_cache")["reset"]
    (forgotten,) = engine.generate(_request(prompt, salt="mine"))
    assert forgotten["cached_tokens"] == 0
    (other,) = engine.generate(_request(_prompt("not known", BLOCK_TOKENS) + prompt[BLOCK_TOKENS:]))
    assert _difference(other, cold) > 10 * 0.05, "the control: another first block is noticed"


def test_steps_are_told_once_and_requests_that_enter_together_share_them(engine: VllmProcess) -> None:
    engine.ask(do="steps")
    answers = engine.generate(*(_request(_prompt(f"together {number}", 200)) for number in range(3)))
    steps = engine.ask(do="steps")
    assert len(steps["steps"]) == NEW_TOKENS, "one prefill of all, then a token of each a step"
    assert engine.ask(do="steps")["steps"] == []
    for answer in answers:
        assert len(answer["tokens"]) == len(answer["logprobs"]) == NEW_TOKENS
        assert 0 < answer["first_token_s"] < answer["all_s"]
    assert engine.ask(do="settle") == {"settled": True}


def _start(python: Path, home: Path, *, seed: int) -> VllmProcess:
    write_model(home / "model", SIZES["tiny"], seed)
    return VllmProcess(python, ENGINE | {"model": str(home / "model")}, log_file=home / "log")


def _prompt(name: str, tokens: int) -> list[int]:
    random = Random(name)
    return [random.randrange(2, SIZES["tiny"].vocabulary) for _ in range(tokens)]


def _request(prompt: list[int], salt: str | None = None) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": NEW_TOKENS, "salt": salt}


def _difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest of any logprob."""
    return max(abs(float(a) - float(b)) for a, b in zip(one["logprobs"], two["logprobs"], strict=True))
