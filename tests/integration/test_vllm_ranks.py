"""A real vLLM with two tensor parallel ranks: each stores its own part, and a hit is what both of them have."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from kvctl.client import ControlClient
from tests.integration.vllm_kit import APART, BLOCK, SAME, ask, counts, difference, prompt_of, start, stored
from tests.node import Node

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon without a disk."""
    with Node(dram="256MiB", disks=0) as node:
        node.start()
        yield node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that all engines run."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


@pytest.fixture(scope="module")
def ranks(python: Path, model: Path, node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Two ranks, a process each."""
    log = tmp_path_factory.mktemp("ranks") / "log"
    with start(python, model, node.run, log, tensor_parallel_size=2) as engine:
        yield engine


def test_two_ranks_load_what_both_have_stored(
    python: Path, model: Path, node: Node, ranks: VllmProcess, tmp_path: Path
) -> None:
    prompt = prompt_of("two ranks", 5 * BLOCK + 20)
    cold = stored(ranks, prompt)
    counts(ranks)
    (warm,) = ask(ranks, prompt)
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 5 * BLOCK)
    assert difference(warm, cold) <= SAME
    assert counts(ranks)["loaded blocks"] == 10, "five of each rank"
    with ControlClient(node.run / "control.sock", 20.0) as operator:
        assert sorted(each.blocks for each in operator.namespaces().namespaces) == [5, 5]
    with start(python, model, node.run, tmp_path / "alone") as alone:
        (other,) = ask(alone, prompt)
        assert other["cached_tokens"] == 0, "one rank alone has memory of another shape"
        assert difference(other, cold) <= 3 * SAME
    other_engine = start(python, model, node.run, tmp_path / "zeros", lie="zeros", tensor_parallel_size=2)
    with other_engine as liar:
        (right,) = ask(liar, prompt, kv_transfer_params=APART)
        (spoilt,) = ask(liar, prompt)
        assert difference(right, cold) <= SAME
        assert spoilt["cached_tokens"] == 5 * BLOCK, "of another process"
        assert difference(spoilt, cold) > 10 * SAME, "the control: zeros for KV must be noticed"
