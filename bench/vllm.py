"""Time to the first token of a real vLLM: computed, out of its own prefix cache, out of the daemon.

Two engines run all the time, one as it comes and one with the connector, both with one thread of arithmetic so that a
core is left to the daemon; they take turns, each round another first. What is not measured is None, with a reason.
"""

import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any

import kvclient
from bench.engines import VllmProcess, find_vllm, why_not
from bench.engines.model import SIZES, write_model
from bench.harness import Findings, say
from bench.process import DaemonProcess
from kvclient.integrations.vllm_scheduler import Scheduler
from kvclient.integrations.vllm_settings import Settings
from kvproto.frames import Role

PROMPT = 3000
KILLED = 700  # tokens: steps of half a second, whose noise is less than what would be a stall
BLOCK = 128
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": True, "max_model_len": 4096, "max_num_batched_tokens": 4096, "max_num_seqs": 8,
    "num_gpu_blocks_override": 400,
}  # fmt: skip


def run(*, quick: bool) -> Findings:
    """All figures of `vllm`. Needs `make engines`, 4 GiB of memory."""
    python = find_vllm()
    if python is None:
        raise RuntimeError(why_not())
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-") as folder:
        home = Path(folder)
        write_model(home / "model", SIZES["bench"], seed=0)
        arguments = ("--dram", "2GiB", "--lock", "false", "--log-level", "warning")
        with DaemonProcess(home / "run", *arguments, log_file=home / "log") as daemon:
            daemon.await_memory()
            transfer = {
                "kv_connector": "KvstoredConnector", "kv_connector_module_path": "kvclient.integrations.vllm",
                "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"runtime_dir": str(home / "run")},
            }  # fmt: skip
            plain = ENGINE | {"model": str(home / "model")}
            connected = plain | {"kv_transfer_config": transfer}
            with (
                VllmProcess(python, plain, log_file=home / "plain", threads=1) as native,
                VllmProcess(python, connected, log_file=home / "ours", threads=1) as ours,
            ):
                say("both engines are ready")
                results = first_tokens(native, ours, 3 if quick else 15)
                results |= misses(native, ours, 3 if quick else 12)
                results |= lookups(home / "run", 500 if quick else 5000)
                results |= kill(native, ours, daemon)
    return results | {
        "ttft_lmcache_ms": None, "ttft_over_lmcache": None, "step_extra_over_copy_time": None,
        "not_measured": "LMCache's connector and steps beside transfers",
    }  # fmt: skip


def prompt_of(name: object, tokens: int = PROMPT) -> list[int]:
    """Tokens that no other name has."""
    random = Random(str(name))
    return [random.randrange(2, SIZES["bench"].vocabulary) for _ in range(tokens)]


def ask(engine: VllmProcess, *prompts: list[int]) -> list[dict[str, Any]]:
    """Run these together, and whatever follows from them."""
    answers = engine.generate(*({"prompt": prompt, "max_tokens": 1} for prompt in prompts))
    assert engine.ask(do="settle")["settled"]
    return answers


def first_tokens(native: VllmProcess, ours: VllmProcess, rounds: int) -> Findings:
    """One prompt a round: computed, cached by the engine, and by the daemon."""
    seconds: dict[str, list[float]] = {"recompute": [], "native": [], "kvstored": []}
    hit = (PROMPT - 1) // BLOCK * BLOCK
    for number in range(rounds + 1):
        prompt = prompt_of(f"first {number}")
        ask(ours, prompt)  # stores it
        assert ours.ask(do="reset_prefix_cache")["reset"]
        assert native.ask(do="reset_prefix_cache")["reset"]
        turns = {"recompute": native, "native": native, "kvstored": ours}
        for name in turns if number % 2 else ("kvstored", "recompute", "native"):
            (answer,) = ask(turns[name], prompt)
            assert answer["cached_tokens"] == (0 if name == "recompute" else hit), (name, answer["cached_tokens"])
            if number:  # the first one warms up
                seconds[name].append(answer["first_token_s"])
        say(f"first tokens: {number} of {rounds}")
    times = {f"ttft_{name}_ms": median(each) * 1e3 for name, each in seconds.items()}
    return {
        **times,
        "ttft_over_native": times["ttft_kvstored_ms"] / times["ttft_native_ms"],
        "ttft_over_recompute": times["ttft_kvstored_ms"] / times["ttft_recompute_ms"],
    }


def misses(native: VllmProcess, ours: VllmProcess, pairs: int) -> Findings:
    """What is never asked for again: what storing it costs the request."""
    shares = []
    for number in range(pairs):
        took: dict[str, float] = {}
        for name, engine in (("ours", ours), ("native", native))[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            ask(engine, prompt_of(f"miss {number} {name}", 1500))
            took[name] = time.perf_counter() - began
        shares.append(took["ours"] / took["native"] - 1)
        say(f"misses: {number + 1} of {pairs}")
    return {"miss_overhead_share": median(shares)}


def lookups(run_dir: Path, rounds: int) -> Findings:
    """What a lookup of the scheduler's half takes, in turn with an empty round trip of the same client."""
    with kvclient.connect(str(run_dir), role=Role.TOOL, timeout_s=0.02) as client:
        assert client.wait_connected(5)
        namespace = client.namespace(model="m", engine="e", layout="l", dtype="uint8", block_bytes=1 << 20)
        scheduler = Scheduler(client, [namespace], BLOCK, 1 << 20, Settings())
        request = SimpleNamespace(
            request_id="r",
            block_hashes=[Random(number).randbytes(32) for number in range(23)],
            num_tokens=PROMPT,
            num_computed_tokens=0,
            kv_transfer_params=None,
        )
        looked: list[float] = []
        pinged: list[float] = []
        for _ in range(rounds):
            began = time.perf_counter()
            scheduler.matched(request, 0)
            middle = time.perf_counter()
            client.ping()
            looked.append(middle - began)
            pinged.append(time.perf_counter() - middle)
    p99 = [sorted(each)[len(each) * 99 // 100] * 1e6 for each in (looked, pinged)]
    return {"lookup_p99_us": p99[0], "ping_p99_us": p99[1], "lookup_over_ping_p99_us": p99[0] - p99[1]}


def kill(native: VllmProcess, ours: VllmProcess, daemon: DaemonProcess) -> Findings:
    """Requests that are all there, one after another, and the daemon dies: the longest step against computing them."""
    prompts = [prompt_of(f"kill {number}", KILLED) for number in range(16)]
    for prompt in prompts:
        ask(ours, prompt)
        ask(native, prompt)
    for engine in (ours, native):
        assert engine.ask(do="reset_prefix_cache")["reset"]
        engine.ask(do="steps")
    expected = [ask(native, prompt)[0] for prompt in prompts]
    normal = native.ask(do="steps")
    for prompt in prompts:
        ours.tell(do="generate", requests=[{"prompt": prompt, "max_tokens": 1}])
    answers = [ours.hear()["answers"][0] for _ in range(4)]
    daemon.kill()
    answers += [ours.hear()["answers"][0] for _ in range(len(prompts) - len(answers))]
    assert answers[0]["cached_tokens"] > answers[-1]["cached_tokens"] == 0, "it died between"
    assert [answer["tokens"] for answer in answers] == [answer["tokens"] for answer in expected]
    steps = ours.ask(do="steps")
    longest = max(steps["steps"] + steps["idle"])
    return {"kill_step_max_ms": max(0.0, longest - max(normal["steps"])) * 1e3}
