"""vLLM's own OpenAI-compatible server with the connector: what one life of it computed, the next one loads.

Scheduler and worker live in processes of their own there. Steps do not overlap: vLLM on CPU knows no asynchronous
scheduling.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from bench.engines import transfer_config
from bench.engines.model import SIZES, write_model
from bench.engines.server import Completion, ServerError, ServerProcess
from bench.vllm import clear
from bench.vllm_steps import BLOCKS, steps_beside_transfers
from bench.vllm_talks import Traffic, talk
from kvproto import control_pb2, control_pb2_grpc
from tests.integration.vllm_kit import Engine
from tests.node import Node, until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

BLOCK = 128
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": False,
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 96,
}
TALKATIVE = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
UNLOADED = {"kv_transfer_params": {"kvstored": {"load": False, "store": False}}}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon."""
    with Node(dram="256MiB", disks=0) as node:
        node.start()
        yield node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model that all servers run."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, SIZES["tiny"], seed=0)
    return folder


def start(
    python: Path, model: Path, node: Node, name: str, *, lie: str = "", environment: dict[str, str] | None = None
) -> ServerProcess:
    """A server on its way up; with `lie` one whose loads are spoilt."""
    transfer = transfer_config(node.run)
    transfer["kv_connector_extra_config"] |= {"lookup_timeout_ms": 3000}  # this is not about a host that is busy
    if lie:
        transfer |= {"kv_connector": "LyingConnector", "kv_connector_module_path": "tests.integration.vllm_lying"}
        transfer["kv_connector_extra_config"] |= {"lie": lie}
    engine = ENGINE | {"model": model, "kv_transfer_config": transfer}
    return ServerProcess(
        python, engine, socket_file=node.home / f"{name}.sock", log_file=node.home / f"{name}.log",
        environment=environment,
    )  # fmt: skip


def logged_blocks(server: ServerProcess) -> int:
    """Loaded, in all of vLLM's log lines about its connector."""
    lines = [line for line in server.log().splitlines() if "KV Transfer metrics: " in line]
    return sum(int(count) for line in lines for count in re.findall(r"loaded blocks=(\d+)", line))


def stored_blocks(node: Node) -> int:
    """How many the daemon has."""
    with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
        listed = control_pb2_grpc.ControlStub(channel).ListNamespaces(control_pb2.ListNamespacesRequest())
    return sum(namespace.blocks for namespace in listed.namespaces)


def has_all(node: Node, blocks: int, server: ServerProcess, prompts: list[list[int]]) -> bool:
    """Has it so many blocks? If not, they are computed again: it may have stood still and refused some."""
    return stored_blocks(node) == blocks or not [server.complete(prompt, 4) for prompt in prompts]


def prompts_of(name: str, count: int) -> list[list[int]]:
    """Prompts of five blocks and some tokens, that share two blocks and nothing else."""
    random = Random(name)
    tokens = [random.randrange(2, SIZES["tiny"].vocabulary) for _ in range(2 * BLOCK)]
    return [
        tokens + [random.randrange(2, SIZES["tiny"].vocabulary) for _ in range(3 * BLOCK + 40)] for _ in range(count)
    ]


def said(completions: list[Completion]) -> list[list[int]]:
    """The tokens of each."""
    return [completion.tokens for completion in completions]


def test_a_server_that_was_restarted_loads_what_the_one_before_has_computed(
    python: Path, model: Path, node: Node
) -> None:
    prompts = prompts_of("restarted", 6)
    with start(python, model, node, "liar", lie="zeros") as liar:
        with start(python, model, node, "first") as first:
            first.await_ready()
            cold = [first.complete(prompt, 4) for prompt in prompts]
            assert cold[0].cached_tokens == 0
            assert all(each.cached_tokens in {0, 2 * BLOCK} for each in cold), "they share no more"
            assert until(lambda: has_all(node, 2 + 6 * 3, first, prompts)), stored_blocks(node)
            with pytest.raises(ServerError, match="status 400"):
                first.complete([2] * 3000, 4)
            assert first.stop() == 0
        with start(python, model, node, "second", environment=TALKATIVE) as second:
            second.await_ready()
            warm = [second.complete(prompt, 4) for prompt in prompts]
            alone = [second.complete(prompt, 4, **UNLOADED) for prompt in prompts]
            assert {each.cached_tokens for each in warm} == {5 * BLOCK}, second.log()[-3000:]
            assert {each.cached_tokens for each in alone} == {0}
            assert said(warm) == said(alone) == said(cold)
            assert until(lambda: logged_blocks(second) == 6 * 5), "vLLM's own log line names what was loaded"

            conversations = Traffic(conversations=6, turns=3, clients=3, answer=16, pause_s=0, vocabulary=512)

            def complete(prompt: list[int], answer: int) -> Completion:
                """And have it stored before the conversation goes on: that is done behind the answer."""
                completion = second.complete(prompt, answer)
                whole = (len(prompt) - 1) // BLOCK * BLOCK
                assert until(lambda: second.complete(prompt, 1).cached_tokens == whole), second.log()[-3000:]
                return completion

            measured = talk(complete, conversations, seed=1)
            turns = sorted(measured.turns)
            found = [turn.cached_tokens for turn in turns if turn.prompt_tokens > turns[0].prompt_tokens]
            assert min(found) >= 3 * BLOCK, "later turns find the earlier ones"
            assert second.stop() == 0
        liar.await_ready()
        spoilt = [liar.complete(prompt, 4) for prompt in prompts]
        assert {each.cached_tokens for each in spoilt} == {5 * BLOCK}, liar.log()[-3000:]
        assert said(spoilt) != said(cold), "the control: zeros for KV must be noticed"


def test_steps_are_measured_while_something_is_really_stored_and_loaded(
    python: Path, model: Path, node: Node, tmp_path: Path
) -> None:
    """With one thread of arithmetic nothing else is said of the times: this host may be busy."""

    def prompt_of(name: object, tokens: int) -> list[int]:
        random = Random(str(name))
        return [random.randrange(2, SIZES["tiny"].vocabulary) for _ in range(tokens)]

    transfer = transfer_config(node.run)
    transfer["kv_connector_extra_config"] |= {"lookup_timeout_ms": 3000}
    engine = ENGINE | {"model": str(model), "max_model_len": 8192, "enable_prefix_caching": True}
    with Engine(node.run, python, engine | {"kv_transfer_config": transfer}, log_file=tmp_path / "log") as ours:
        clear(node.run)
        figures: dict[str, Any] = {}
        why_not = ""

        def measures(clears: Callable[[], int]) -> bool:
            """A load that takes longer than the steps beside it is no measurement, and is made again."""
            nonlocal why_not
            try:
                figures.update(steps_beside_transfers(ours, prompt_of, clears, BLOCK, rounds=1))
            except AssertionError as error:
                why_not = str(error)
                return "always has something to compute" not in why_not
            return True

        assert until(lambda: measures(lambda: clear(node.run)), 120.0)
        assert {name for name, value in figures.items() if isinstance(value, float)} == figures.keys()
        assert until(lambda: measures(lambda: 0), 120.0)
        assert "0 blocks were stored" in why_not
        assert clear(node.run) == BLOCKS, "the control: they were"

        ours.ask(do="steps")
        early = {"prompt": prompt_of("early", 20), "max_tokens": 6}
        late = {"prompt": prompt_of("late", 20), "max_tokens": 6}
        ours.generate(early, late)
        together = ours.ask(do="steps")["steps"]
        answers = ours.generate(early, late | {"after_steps": 4})
        apart = ours.ask(do="steps")["steps"]
    assert (len(together), len(apart)) == (6, 10)
    assert all(0 < answer["first_token_s"] < answer["all_s"] for answer in answers)
    assert answers[1]["all_s"] < sum(apart), "it counts from when it entered"
