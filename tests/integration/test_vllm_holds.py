"""`hold_s` in a real vLLM: held blocks stay while others come and go, and nobody ever waits because of them.

The daemon is there and not used: what is found again is found in vLLM's own memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from tests.integration.vllm_kit import APART, BLOCK, ask, prompt_of, start
from tests.node import Node, until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

BLOCKS = 41  # of vLLM, one of which stands for none
LONGEST_S = 3600.0


@pytest.fixture(scope="module")
def engine(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Few blocks, a quarter of which may be held."""
    home = tmp_path_factory.mktemp("engine")
    write_model(home / "model", SIZES["tiny"], seed=0)
    with Node(dram="64MiB", disks=0) as node:
        node.start()
        with start(
            python, home / "model", node.run, home / "log", enable_prefix_caching=True,
            num_gpu_blocks_override=BLOCKS, extra={"hold_longest_s": LONGEST_S},
        ) as engine:  # fmt: skip
            yield engine


def run(engine: VllmProcess, prompt: list[int], hold_s: float = 0.0) -> int:
    """Neither loaded nor stored; tokens that vLLM still had."""
    wishes = APART["kvstored"] | ({"hold_s": hold_s} if hold_s else {})
    (answer,) = ask(engine, prompt, max_tokens=1, kv_transfer_params={"kvstored": wishes})
    return int(answer["cached_tokens"])


def press(engine: VllmProcess, name: str) -> None:
    """Twice as much as vLLM's memory holds comes and goes."""
    for number in range(12):
        run(engine, prompt_of(f"{name} {number}", 7 * BLOCK))


def held(engine: VllmProcess) -> int:
    """Blocks that nobody else may have although nothing runs."""
    memory: dict[str, Any] = engine.ask(do="memory")
    assert memory["blocks"] == BLOCKS - 1
    assert not memory["busy"], "an engine that only holds has nothing to do"
    return int(memory["blocks"]) - int(memory["free"])


def test_what_is_held_outlives_others_until_its_time_is_over(engine: VllmProcess) -> None:
    kept, brief, free = (prompt_of(name, 4 * BLOCK + 9) for name in ("kept", "brief", "free"))
    run(engine, kept, hold_s=LONGEST_S)
    run(engine, brief, hold_s=0.1)
    run(engine, free)
    assert held(engine) in {4, 8}, "whole blocks; the time of the brief one may be over"
    press(engine, "others")
    assert until(lambda: run(engine, prompt_of("tiny", 5)) == 0 and held(engine) == 4), "the brief one is over"
    assert run(engine, free) == 0, "the control: nobody held these"
    assert run(engine, kept) == 4 * BLOCK
    assert held(engine) == 4
    assert engine.ask(do="reset_prefix_cache")["reset"]
    assert held(engine) == 0
    assert run(engine, kept) == 0, "forgotten when the cache was reset"


def test_a_conversation_holds_what_it_has_once(engine: VllmProcess) -> None:
    prompt = prompt_of("conversation", 8 * BLOCK + 9)
    for turn in (3, 5, 8):
        assert run(engine, prompt[: turn * BLOCK + 9], hold_s=LONGEST_S) == {3: 0, 5: 3, 8: 5}[turn] * BLOCK
        assert held(engine) == turn
    press(engine, "after")
    assert run(engine, prompt) == 8 * BLOCK
    assert engine.ask(do="reset_prefix_cache", connector=False)["reset"]
    assert held(engine) == 0


def test_who_needs_the_memory_gets_it_at_once(engine: VllmProcess) -> None:
    run(engine, prompt_of("in the way", 10 * BLOCK + 9), hold_s=LONGEST_S)
    assert held(engine) == 10, "all that may be held"
    run(engine, prompt_of("large", 32 * BLOCK - 4))
    assert held(engine) == 0
    run(engine, prompt_of("in the way", 10 * BLOCK + 9), hold_s=LONGEST_S)
    requests = [{"prompt": prompt_of(f"grows {number}", 10 * BLOCK - 4), "max_tokens": 80} for number in range(3)]
    engine.ask(do="stats")
    engine.generate(*({"kv_transfer_params": APART} | request for request in requests))
    assert engine.ask(do="stats")["preempted"] == 0
    assert engine.ask(do="settle")["settled"]
    assert held(engine) == 0


def test_an_engine_that_holds_can_be_paused_and_ends(engine: VllmProcess) -> None:
    run(engine, prompt_of("before a pause", 6 * BLOCK + 9), hold_s=LONGEST_S)
    assert held(engine) == 6
    assert engine.ask(do="pause")["paused"]
    assert held(engine) == 0
    assert run(engine, prompt_of("before a pause", 6 * BLOCK + 9), hold_s=LONGEST_S) == 0
    assert held(engine) == 6
    assert engine.stop() == 0
