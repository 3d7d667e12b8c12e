"""What a real vLLM tells the daemon of computing, and that it computes where loading is said to be slower."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import kvclient
from bench.engines import VllmProcess
from bench.engines.model import SIZES, write_model
from kvclient.integrations.vllm_steps import PROFILED_TOKENS
from kvctl.client import SOCKET_NAME, ControlClient
from kvproto import control_pb2 as pb
from tests.integration.vllm_kit import BLOCK, BLOCK_BYTES, SAME, ask, difference, misread, prompt_of, start, stored
from tests.node import PATIENCE_S, Node, until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

MAGNITUDE = 6.0  # a host that others use, too, is so much slower at one time than at another
SLOW_S = 3000.0  # of a load


@pytest.fixture
def node() -> Iterator[Node]:
    """A daemon without a disk, that knows nothing of costs yet."""
    with Node(dram="256MiB", disks=0) as node:
        node.start()
        yield node


@pytest.fixture
def engine(python: Path, node: Node, tmp_path: Path) -> Iterator[VllmProcess]:
    """The only one that tells it."""
    write_model(tmp_path / "model", SIZES["tiny"], seed=0)
    with start(python, tmp_path / "model", node.run, tmp_path / "log") as engine:
        yield engine


def prefill_reports(node: Node) -> int:
    """How many prefills the daemon has heard of."""
    with ControlClient(node.run / SOCKET_NAME, PATIENCE_S) as operator:
        return sum(each.prefill_reports for each in operator.costs(pb.GetCostsRequest()).namespaces)


def namespace_of(node: Node) -> kvclient.Namespace:
    """The engine's."""
    with ControlClient(node.run / SOCKET_NAME, PATIENCE_S) as operator:
        (one,) = operator.namespaces().namespaces
    return node.client.namespace(
        model=one.model, engine=one.engine, layout=one.layout, dtype=one.dtype, block_tokens=one.block_tokens,
        block_bytes=one.block_bytes, revision=one.revision, adapter=one.adapter,
    )  # fmt: skip


def chain_of(node: Node, blocks: int) -> list[bytes]:
    """The keys of the only chain that is stored."""
    with ControlClient(node.run / SOCKET_NAME, PATIENCE_S) as operator:
        (one,) = operator.namespaces().namespaces
        listed = operator.blocks(pb.ListBlocksRequest(namespace_digest=one.digest)).blocks
    child = {each.parent: each.key for each in listed}
    keys = [child[b""]]
    while keys[-1] in child:
        keys.append(child[keys[-1]])
    assert len(keys) == len(listed) == blocks
    return keys


def test_an_engine_tells_what_computing_costs(node: Node, engine: VllmProcess) -> None:
    for number in range(3):
        ask(engine, prompt_of(f"short {number}", PROFILED_TOKENS - 1))
        ask(engine, prompt_of(f"together {number}", 20), prompt_of(f"beside {number}", 20))
    node.client.ping()
    assert prefill_reports(node) == 0, "the control: these say little"
    unstored = {"kv_transfer_params": {"kvstored": {"store": False}}}
    for number, tokens in enumerate((200, 600, 1200, 2400)):
        ask(engine, prompt_of(f"long {number}", tokens), **unstored)
    assert until(lambda: prefill_reports(node) >= 4), "one of each"
    cold = stored(engine, prompt_of("measured", 8 * BLOCK + 1))
    found = namespace_of(node).match(chain_of(node, 8))
    assert found.blocks == 8
    assert found.recompute_s is not None
    assert cold["first_token_s"] / MAGNITUDE < found.recompute_s < cold["first_token_s"] * MAGNITUDE


def test_what_is_slower_to_load_than_to_compute_is_computed(node: Node, engine: VllmProcess) -> None:
    prompt = prompt_of("declined", 6 * BLOCK + 20)
    cold = stored(engine, prompt)
    (warm,) = ask(engine, prompt)
    assert warm["cached_tokens"] == 6 * BLOCK, "the control: nobody has said that it is slow"
    namespace, keys = namespace_of(node), chain_of(node, 6)
    for tokens in range(BLOCK, 12 * BLOCK, BLOCK):
        namespace.report_prefill(0, tokens, tokens * 1e-6)

    def is_slow() -> bool:
        namespace.report_load("dram", 6 * BLOCK_BYTES, SLOW_S)
        return not namespace.match(keys).worth_loading

    assert until(is_slow)
    for _ in range(3):  # of so many in a row none is tried anyway
        (declined,) = ask(engine, prompt)
        assert declined["cached_tokens"] == 0
        assert difference(declined, cold) <= SAME
    assert misread(engine, prompt, cold) > 10 * SAME, "the control: one other block is noticed"
