"""Real vLLM engines with the connector, for tests: how one is started, asked, and compared with another."""

from pathlib import Path
from random import Random
from typing import Any

from bench.engines import ANSWER_S, VllmProcess
from bench.engines.model import SIZES
from kvctl.client import SOCKET_NAME, ControlClient, KvctlError
from tests.node import PATIENCE_S, until

BLOCK = 128
SAME = 0.03  # of a logprob where a hit splits the prefill otherwise; spoilt blocks are off by tenths and more
BLOCK_BYTES = BLOCK * SIZES["tiny"].token_bytes
APART: dict[str, Any] = {"kvstored": {"load": False, "store": False}}  # neither loads nor stores: what is right
# Threads load, and the request waits without a forward (vLLM's WAITING_FOR_REMOTE_KVS). All loads go so where steps
# overlap, which nobody can try on CPU: vLLM 0.32 sets `async_scheduling` to False there, whatever is asked for.
BESIDE = {"at_once_mib": 0.0}
PATIENT = {"lookup_timeout_ms": 3000.0}  # a busy host may stand still for a while
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": False,
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 128,
}


class Engine(VllmProcess):
    """Settles no sooner than its daemon, too, has done with what it stores.

    Before that another engine may miss it, and whoever is killed loses it.
    """

    def __init__(self, run: Path, python: Path, engine: dict[str, Any], **more: Any) -> None:
        """`run`: the daemon's directory; `more` as of `VllmProcess`."""
        self._run = run
        super().__init__(python, engine, **more)

    def ask(self, deadline_s: float = ANSWER_S, /, **command: Any) -> dict[str, Any]:
        """As it is."""
        answer = super().ask(deadline_s, **command)
        if command.get("do") == "settle":
            assert until(lambda: stores_nothing(self._run)), "something is being stored for ever"
        return answer


def stores_nothing(run: Path) -> bool:
    """Is no block on its way into this daemon? One that is gone takes none."""
    try:
        with ControlClient(run / SOCKET_NAME, PATIENCE_S) as operator:
            return not any(each.tickets for each in operator.clients().clients)
    except KvctlError:
        return True


def start(
    python: Path,
    model: Path,
    run: Path,
    log: Path,
    *,
    lie: str = "",
    policy: str = "recompute",
    extra: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **engine: Any,
) -> Engine:
    """An engine with the connector; with `lie` the one that lies (`vllm_lying`)."""
    given = {"runtime_dir": str(run), "lie": lie} if lie else {"runtime_dir": str(run)}
    transfer = {
        "kv_connector": "LyingConnector" if lie else "KvstoredConnector",
        "kv_connector_module_path": "tests.integration.vllm_lying" if lie else "kvclient.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": PATIENT | given | (extra or {}),
    }
    arguments = ENGINE | {"model": str(model), "kv_transfer_config": transfer} | engine
    return Engine(run, python, arguments, log_file=log, environment=environment)


def prompt_of(name: object, tokens: int) -> list[int]:
    """Tokens that no other name has."""
    random = Random(str(name))
    return [random.randrange(2, SIZES["tiny"].vocabulary) for _ in range(tokens)]


def ask(engine: VllmProcess, *prompts: list[int], **more: Any) -> list[dict[str, Any]]:
    """Run these together, and whatever is to be saved of them."""
    answers = engine.generate(*({"prompt": prompt, "max_tokens": 4} | more for prompt in prompts))
    assert engine.ask(do="settle")["settled"]
    return answers


def asked_beside(engine: VllmProcess, prompt: list[int], **more: Any) -> list[dict[str, Any]]:
    """As `ask`, of an engine that has nothing else to do; its load went on beside the forward (`BESIDE`)."""
    engine.ask(do="steps")
    answers = engine.generate({"prompt": prompt, "max_tokens": 4} | more)
    assert engine.ask(do="steps")["idle"], "no step went by without a forward: nothing was waited for"
    assert engine.ask(do="settle")["settled"]
    return answers


def stored(engine: VllmProcess, prompt: list[int], **more: Any) -> dict[str, Any]:
    """As `ask`, until the store has every whole block of it: one that stood still for a second has refused some."""
    (answer,) = ask(engine, prompt, **more)
    whole = (len(prompt) - 1) // BLOCK * BLOCK
    assert until(lambda: ask(engine, prompt, **more)[0]["cached_tokens"] == whole), engine.log()[-2000:]
    return answer


def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """The largest of any logprob; large where the tokens differ."""
    if one["tokens"] != two["tokens"]:
        return 10.0
    return max(abs(float(a) - float(b)) for a, b in zip(one["logprobs"], two["logprobs"], strict=True))


def misread(engine: VllmProcess, prompt: list[int], right: dict[str, Any]) -> float:
    """The control of an equality with `right`: how far off an answer is at least that has read one other block.

    Each whole block of the prompt is another one in its turn. Without the store: it is the comparison that is tried.
    """
    other, whole = prompt_of("another block", BLOCK), (len(prompt) - 1) // BLOCK * BLOCK
    prompts = [prompt[:at] + other + prompt[at + BLOCK :] for at in range(0, whole, BLOCK)]
    answers = ask(engine, *prompts, max_tokens=len(right["tokens"]), kv_transfer_params=APART)
    return min(difference(answer, right) for answer in answers)


def counts(engine: VllmProcess) -> dict[str, float]:
    """What the connector counted since the last time."""
    taken: dict[str, float] = engine.ask(do="stats")["connector"]
    return taken
