"""vLLM, driven in lines of JSON on standard input; an answer a line on standard output. `VllmProcess` starts it.

The first line holds the arguments of `vllm.LLM`, `model` at least; its answer comes once the engine is ready and has
answered a request of two tokens, since the first one takes seconds:

    {"vllm": "0.32.0", "start_s": 17.2, "block_size": 128, "blocks": 512}

Commands and their answers:

    {"do": "generate", "requests": [{"prompt": [ids], "max_tokens": n, "salt": s, "kv_transfer_params": {...}}, ...]}
        {"answers": [{"tokens", "logprobs", "cached_tokens", "first_token_s", "all_s", "kv_transfer_params"}, ...]}
        Requests enter together, but one with `after_steps` enters once so many steps of this command are over; only
        `prompt` must be there. Greedy, and the end token does not end. Seconds are counted from the moment at which
        the request enters; of those that enter together, from that of the first one.
    {"do": "settle", "within_s": 30}  {"settled": true}
        Steps on until vLLM has nothing left to do, such as to free what a connector was saving from, and until a
        connector that says how much it is `saving` has saved it.
    {"do": "steps"}                   {"steps": [s, ...], "idle": [s, ...]}
        How long each step since the last ask took: those in which the model ran, and those in which it did not.
    {"do": "reset_prefix_cache", "connector": false}   {"reset": true}
    {"do": "reload_weights", "folder": f}              {"reloaded": true}
    {"do": "pause"}                   {"paused": true}
        As before other weights are loaded: every request ends, and all caches are cleared. It resumes at once.
    {"do": "memory"}                  {"blocks": n, "free": n, "busy": false}
        Blocks that requests may have, how many nobody has, and whether vLLM has anything to do.
    {"do": "stats"}                   {"connector": {...}, "local": {...}, "external": {...}, "preempted": n}
        Since the last ask. `connector` is what the connector's own stats reduce to; `local` and `external` count the
        tokens that were looked up and found in vLLM's prefix cache and the connector.
    {"do": "metrics", "prefix": p}    {"metrics": [[name, {label: value}, value], ...]}
        Those of vLLM's counters whose names begin so, since the start.
    {"do": "stop"}                    {"stopped": true}

An error ends the process; it is on standard error, where all that vLLM says goes as well.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

VERBS = {"generate", "settle", "steps", "reset_prefix_cache", "reload_weights", "pause", "memory", "stats", "metrics"}
YIELD_S = 0.001  # what a served vLLM sleeps when it had nothing to run, so that threads of a connector get on
DEFAULTS = {
    "disable_log_stats": False,
    "enforce_eager": True,
    "generation_config": "vllm",
    "seed": 0,
    "skip_tokenizer_init": True,
}


@dataclass(slots=True)
class Answer:
    """What a request has got so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached_tokens: int | None = None
    first_token_s: float | None = None
    all_s: float | None = None
    kv_transfer_params: dict[str, Any] | None = None

    def take(self, output: Any, passed_s: float) -> None:
        """A `RequestOutput` of only what is new."""
        (completion,) = output.outputs
        self.tokens += completion.token_ids
        chosen = zip(completion.token_ids, completion.logprobs, strict=True)
        self.logprobs += [candidates[token].logprob for token, candidates in chosen]
        if self.first_token_s is None and self.tokens:
            self.first_token_s = passed_s
        if output.num_cached_tokens is not None:
            self.cached_tokens = output.num_cached_tokens
        if output.finished:
            self.all_s = passed_s
            self.kv_transfer_params = output.kv_transfer_params

    def line(self) -> dict[str, Any]:
        """As it is sent."""
        return {name: getattr(self, name) for name in self.__slots__}


class Counts:
    """A stat logger of vLLM: adds up what the scheduler reports of a step."""

    def __init__(self, transfers: Any) -> None:
        """`transfers`: vLLM's own sum of a connector's stats."""
        self._transfers = transfers
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._transfers.reset()
        self.preempted = 0
        self.tokens = {kind: {"looked_up": 0, "found": 0} for kind in ("local", "external")}

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: object) -> None:
        """Called by vLLM once a step."""
        if iteration_stats is not None:
            self.preempted += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        if scheduler_stats.kv_connector_stats:
            self._transfers.observe(scheduler_stats.kv_connector_stats)
        for kind, stats in (
            ("local", scheduler_stats.prefix_cache_stats),
            ("external", scheduler_stats.connector_prefix_cache_stats),
        ):
            if stats is not None:
                self.tokens[kind]["looked_up"] += stats.queries
                self.tokens[kind]["found"] += stats.hits

    def log(self) -> None:
        """Called by vLLM now and then: `line` is asked for instead."""

    def line(self) -> dict[str, Any]:
        """As it is sent."""
        transfers = self._transfers.transfer_stats_accumulator
        connector = transfers.reduce() if transfers is not None and not transfers.is_empty() else {}
        return {"connector": connector, **self.tokens, "preempted": self.preempted}


class Engine:
    """vLLM in this process."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        started = time.monotonic()
        import vllm
        from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging

        llm = vllm.LLM(**(DEFAULTS | arguments))
        self._engine = llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        config = self._engine.vllm_config
        self._counts = Counts(KVConnectorLogging(config.kv_transfer_config))
        self._engine.logger_manager.stat_loggers.append(self._counts)
        self._names = iter(range(1 << 60))
        self._ran = False
        self._steps: dict[bool, list[float]] = {True: [], False: []}  # seconds, by whether the model ran
        self._core.step_fn = self._noting(self._core.step_fn)
        self._warm_up()
        self.ready = {
            "vllm": vllm.__version__,
            "start_s": time.monotonic() - started,
            "block_size": config.cache_config.block_size,
            "blocks": config.cache_config.num_gpu_blocks,
        }

    def generate(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        """Run requests to their ends."""
        names = [str(next(self._names)) for _ in requests]
        answers = {name: Answer() for name in names}
        coming = dict(zip(names, requests, strict=True))
        entered: dict[str, float] = {}
        for number in count():
            now = time.perf_counter()
            for name in [name for name in coming if coming[name].get("after_steps", 0) <= number]:
                request = coming.pop(name)
                entered[name] = now
                self._engine.add_request(name, _prompt(request), _sampling(request))
            if not coming and not self._engine.has_unfinished_requests():
                break
            for output in self._step():
                name = output.request_id
                answers[name].take(output, time.perf_counter() - entered[name])
        return {"answers": [answer.line() for answer in answers.values()]}

    def settle(self, within_s: float = 30.0) -> dict[str, Any]:
        """Step on until nothing is left."""
        deadline = time.monotonic() + within_s
        while (stepping := self._core.scheduler.has_requests()) or _saving():
            if time.monotonic() >= deadline:
                return {"settled": False}
            self._step() if stepping else time.sleep(YIELD_S)
        return {"settled": True}

    def steps(self) -> dict[str, Any]:
        """Durations, and forget them."""
        line = {"steps": self._steps[True], "idle": self._steps[False]}
        self._steps = {True: [], False: []}
        return line

    def reset_prefix_cache(self, connector: bool = False) -> dict[str, Any]:
        """What is not in use is forgotten."""
        return {"reset": self._engine.reset_prefix_cache(reset_connector=connector)}

    def reload_weights(self, folder: str) -> dict[str, Any]:
        """Those of another model of this shape, in place."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        return {"reloaded": True}

    def pause(self) -> dict[str, Any]:
        """And resume."""
        self._core.pause_scheduler(mode="abort", clear_cache=True)
        self._core.resume_scheduler()
        return {"paused": True}

    def memory(self) -> dict[str, Any]:
        """Of vLLM's own."""
        scheduler = self._core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        blocks = pool.num_gpu_blocks - 1  # one stands for no block
        return {"blocks": blocks, "free": pool.get_num_free_blocks(), "busy": scheduler.has_requests()}

    def stats(self) -> dict[str, Any]:
        """Counts, and forget them."""
        line = self._counts.line()
        self._counts.clear()
        return line

    def metrics(self, prefix: str) -> dict[str, Any]:
        """Totals in the registry that vLLM shows to Prometheus."""
        from prometheus_client import REGISTRY

        samples = [sample for family in REGISTRY.collect() for sample in family.samples]
        counted = [each for each in samples if each.name.startswith(prefix) and each.name.endswith("_total")]
        return {"metrics": [[each.name, each.labels, each.value] for each in counted]}

    def shutdown(self) -> None:
        """End it, and with it the connector."""
        self._engine.engine_core.shutdown()

    def _warm_up(self) -> None:
        # The first request takes seconds, any length. This one is too short for a block, so it leaves nothing behind.
        self.generate([{"prompt": [2, 3], "max_tokens": 2}])
        self.settle()
        self.steps()
        self.stats()

    def _step(self) -> list[Any]:
        started = time.perf_counter()
        outputs: list[Any] = self._engine.step()
        self._steps[self._ran].append(time.perf_counter() - started)
        if not self._ran and self._core.scheduler.has_requests():
            time.sleep(YIELD_S)
        return outputs

    def _noting(self, step: Callable[[], tuple[Any, bool]]) -> Callable[[], tuple[Any, bool]]:
        def noted() -> tuple[Any, bool]:
            outputs, self._ran = step()
            return outputs, self._ran

        return noted


def _saving() -> bool:
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return has_kv_transfer_group() and bool(getattr(get_kv_transfer_group(), "saving", 0))


def _prompt(request: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt_token_ids": request["prompt"]}
    return prompt if request.get("salt") is None else prompt | {"cache_salt": request["salt"]}


def _sampling(request: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    transfer = request.get("kv_transfer_params")
    return SamplingParams(
        temperature=0.0,
        max_tokens=request.get("max_tokens", 1),
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        output_kind=RequestOutputKind.DELTA,
        extra_args=None if transfer is None else {"kv_transfer_params": transfer},
    )


def _lines() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Answer until told to stop, or until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    lines = _lines()
    engine = Engine(next(lines))
    say(engine.ready)
    for command in lines:
        verb = command.pop("do")
        if verb == "stop":
            break
        assert verb in VERBS, verb
        say(getattr(engine, verb)(**command))
    engine.shutdown()
    say({"stopped": True})


if __name__ == "__main__":
    main()
