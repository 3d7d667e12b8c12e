"""Thousands of requests through a real vLLM and a small daemon: right answers to the end, and nothing is left behind.

Prefixes come and go: at any time a few are asked for, and the daemon's memory, its disk and the engine's own cache are
all too small for them. One request in so many is computed apart as well, by the same engine without the store.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from kvctl.client import ControlClient
from tests.integration.vllm_kit import APART, BLOCK, SAME, difference, prompt_of, start
from tests.node import Node, until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

BATCH = 10  # requests that enter together
PREFIXES = 12  # that are asked for at a time, of one to five blocks
SAMPLE = 7  # one batch in so many is computed apart, too
SETTLED = 0.5  # of the batches: from then on memory must not grow
GROWTH_BYTES = 48 << 20
# By itself vLLM keeps code for a thousand shapes of matrices, and grows for as long as it meets new ones.
FEW_SHAPES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
WISHES: list[dict[str, Any]] = [
    {}, {}, {}, {"hold_s": 0.2}, {"pin_ttl_s": 1.0}, {"priority": "high"}, {"priority": "low"}, {"store": False},
    {"program": "agent", "tool": "search"}, {"load": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon that holds a part of it: 48 blocks in memory, 128 on disk."""
    with Node(dram="24MiB", size="64MiB", segment="16MiB") as node:
        node.start("--disk-admission", "all")
        yield node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that all engines run."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


@pytest.fixture(scope="module")
def engine(python: Path, model: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Few blocks of its own, and small chunks."""
    small: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_model_len": 1024, "max_num_batched_tokens": 512}
    with start(
        python, model, node.run, tmp_path_factory.mktemp("soak") / "log",
        enable_prefix_caching=True, extra={"disk_wait_s": 1.0}, environment=FEW_SHAPES, **small,
    ) as engine:  # fmt: skip
        yield engine


@pytest.mark.parametrize(
    "requests", [150, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(5400)])]
)  # fmt: skip
def test_a_long_run_gives_right_answers_and_leaves_nothing_behind(
    node: Node, engine: VllmProcess, requests: int
) -> None:
    assert node.daemon is not None
    random = Random(f"soak {requests}")
    processes = {"engine": engine.process.pid, "daemon": node.daemon.process.pid}
    batches = requests // BATCH
    before: dict[str, int] = {}
    compared = 0
    for batch in range(batches):
        if batch == int(SETTLED * batches):
            before = {name: _resident_bytes(pid) for name, pid in processes.items()}
        asked = [_request(random, batch) for _ in range(BATCH)]
        answers = engine.generate(*asked)
        if batch % SAMPLE == 0:
            assert engine.ask(do="settle", within_s=60)["settled"]
            assert _off(engine, asked, answers) <= 2 * SAME, f"batch {batch}"
            compared += len(asked)
    assert compared >= requests // SAMPLE
    assert engine.ask(do="settle", within_s=60)["settled"]
    counts = engine.ask(do="stats")
    assert counts["external"]["found"] >= requests // 4 * BLOCK, "the store is of use, and not vLLM's cache alone"
    assert counts["connector"]["loaded blocks"] > 0
    assert counts["connector"]["saved blocks"] > requests // 4, "blocks go and come"
    for name, pid in processes.items():
        assert _resident_bytes(pid) - before[name] <= GROWTH_BYTES, name
    with ControlClient(node.run / "control.sock", 20.0) as operator:
        assert until(lambda: not any(each.tickets for each in operator.clients().clients)), "no ticket is left"
        # A lease is given back with the next frame of its client, so that the last one of each may be there still.
        assert until(lambda: all(each.leases <= 1 for each in operator.clients().clients)), "no lease is left"
    node.assert_alive()


def test_the_comparison_notices_one_batch_that_is_loaded_wrong(
    python: Path, model: Path, node: Node, engine: VllmProcess, tmp_path: Path
) -> None:
    asked = [{"prompt": prompt_of(f"lied {number}", 2 * BLOCK + 50), "max_tokens": 2} for number in range(BATCH)]
    unstored = [each | {"kv_transfer_params": {"kvstored": {"store": False}}} for each in asked]
    with start(python, model, node.run, tmp_path / "log", lie="zeros") as liar:

        def is_loaded() -> bool:
            engine.generate(*asked)
            assert engine.ask(do="settle", within_s=60)["settled"]
            answers[:] = liar.generate(*unstored)
            return any(answer["cached_tokens"] for answer in answers)

        answers: list[dict[str, Any]] = []
        assert until(is_loaded)
        assert _off(engine, asked, answers) > 2 * SAME


def _off(engine: VllmProcess, asked: list[dict[str, Any]], answers: list[dict[str, Any]]) -> float:
    """How far off these are at most: of this engine without the store, and without its own cache."""
    apart = [{"prompt": each["prompt"], "max_tokens": 2, "kv_transfer_params": APART} for each in asked]
    assert engine.ask(do="reset_prefix_cache")["reset"]
    pairs = zip(answers, engine.generate(*apart), strict=True)
    return max(difference(_cut(answer), _cut(right)) for answer, right in pairs)


def _request(random: Random, batch: int) -> dict[str, Any]:
    """One of the prefixes of these days, and a tail of its own."""
    number = batch // 4 + min(int(random.expovariate(0.4)), PREFIXES - 1)
    prefix = prompt_of(f"prefix {number}", (1 + number % 5) * BLOCK)
    wishes = random.choice(WISHES)
    return {
        "prompt": prefix + prompt_of(random.random(), random.randrange(1, 200)),
        "max_tokens": 2,
        "salt": random.choice([None, None, None, "salt"]),
        "kv_transfer_params": {"kvstored": wishes} if wishes else None,
    }


def _cut(answer: dict[str, Any]) -> dict[str, Any]:
    """The first token alone: what follows depends on it."""
    return {"tokens": answer["tokens"][:1], "logprobs": answer["logprobs"][:1]}


def _resident_bytes(pid: int) -> int:
    """Memory of a process that is its own: shared memory of the store is not counted."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")
