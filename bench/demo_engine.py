"""The engine processes of `bench.demo`: A computes a document's KV and stores it, B fetches it and goes on; C and D
do so after a restart of the daemon, once each.

Started as `python -m bench.demo_engine ROLE RUNTIME_DIR [--quick]`. Speaks JSON lines on standard output:

    {"step": ..., "done": 1, "of": 3}     how far a long step has got
    {"ready": "kill"}                     B is generating and fetching: kill the daemon, then write a line to my stdin
    {"result": {...}}                     the last one
"""

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvclient
from kvclient.integrations.transformers import Prefix, TransformersKV

SEED: Final = 20
THREADS: Final = 1  # cold and warm then slow down alike on a busy host; two wait for each other in every small step
VOCABULARY: Final = 8192
BLOCK_TOKENS: Final = 16
QUESTION_TOKENS: Final = 32  # B's own end of the prompt; few rows would take other matrix routines than many
NEW_TOKENS: Final = 8
KILL_AT_TOKEN: Final = 3
CONTROL_SALT: Final = b"control"
OTHER_SALT: Final = b"other"  # of a short chain that C and D fetch before they time anything
OTHER_BLOCKS: Final = 4
PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to do."""

    layers: int
    document_tokens: int
    cold_runs: int  # besides the one that others are compared with
    warm_runs: int


FULL: Final = Scale(layers=6, document_tokens=3072, cold_runs=1, warm_runs=7)
QUICK: Final = Scale(layers=2, document_tokens=2048, cold_runs=1, warm_runs=5)


def main() -> None:
    """Play the role that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_engine")
    parser.add_argument("role", choices=("a", "b", "c", "d"))
    parser.add_argument("runtime_dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    scale = QUICK if options.quick else FULL
    with kvclient.connect(options.runtime_dir, name=f"demo {options.role}") as client:
        if options.role == "a":
            result = play_a(client, scale)
        elif options.role == "b":
            result = play_b(client, scale)
        else:
            result = play_later(client, scale, options.role.upper())
        tell(result=result)


def tell(**event: Any) -> None:
    """Say one thing to the process that started this one."""
    print(json.dumps(event), flush=True)


# -- the model and the prompt, the same in both processes -------------------------------------------------------


def build_model(layers: int) -> Any:
    """A small Llama with random weights and enough gain that its logits hang on every block of the cache.

    Projections with a standard deviation of 3/sqrt(inputs): attention is sharp, so what it looks at matters. With
    the usual initialisation zeros in the cache would go unnoticed.
    """
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, _deviation(name, weight.shape[1]), generator=generator)
    return model


def _deviation(name: str, inputs: int) -> float:
    if "embed_tokens" in name:
        return 1.0
    sharp = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    return (3.0 if any(part in name for part in sharp) else 0.7) / math.sqrt(inputs)


def build_prompt(document_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the document, and of the document with a question after it: int64 [1, tokens]."""
    generator = torch.Generator().manual_seed(SEED + 1)
    prompt = torch.randint(0, VOCABULARY, (1, document_tokens + QUESTION_TOKENS), generator=generator)
    return prompt[:, :document_tokens], prompt


# -- process A --------------------------------------------------------------------------------------------------


def play_a(client: kvclient.Client, scale: Scale) -> dict[str, Any]:
    """Compute the document's KV, store it, and wait until others can see it and it lies on disk."""
    tell(step="A builds the model", done=0, of=1)
    model = build_model(scale.layers)
    kv = TransformersKV(client, model, block_tokens=BLOCK_TOKENS)
    document, _ = build_prompt(scale.document_tokens)
    step = f"A computes the KV of {document.shape[1]:,} tokens"
    tell(step=step, done=0, of=scale.layers)
    hooks = [
        layer.register_forward_hook(lambda *_, done=index + 1: tell(step=step, done=done, of=scale.layers))
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        cache = model(document, use_cache=True, logits_to_keep=1).past_key_values
    for hook in hooks:  # TransformersKV stores nothing of a model with hooks, which may change what it computes
        hook.remove()
    tell(step="A stores it", done=0, of=1)
    began = time.perf_counter()
    saved = kv.save(document, cache, wait=True)
    seconds = time.perf_counter() - began
    blocks = document.shape[1] // BLOCK_TOKENS
    if saved.accepted != blocks:
        raise RuntimeError(f"stored {saved.accepted} of {blocks} blocks: {saved}")
    tell(step="A flushes it to disk", done=0, of=1)
    flushed = kv.flush(PATIENCE_S)
    kv.save(document[:, : OTHER_BLOCKS * BLOCK_TOKENS], cache, salt=OTHER_SALT, wait=True)
    kv.flush(PATIENCE_S)
    tell(step="A flushes it to disk", done=1, of=1)
    return {
        "stored_blocks": saved.accepted,
        "durable_blocks": flushed.durable,
        "store_gb_per_s": blocks * _block_bytes(kv) / seconds / 1e9,
    }


# -- what the others have in common -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """One generation over the prompt."""

    logits: tuple[torch.Tensor, ...]
    first_token_s: float  # since it began, fetching included
    prefix: Prefix
    load_s: float = 0.0  # keys, lease, copy into a new cache


class Engine:
    """A model, and the prompt that begins with A's document."""

    def __init__(self, client: kvclient.Client, scale: Scale) -> None:
        self.model = build_model(scale.layers)
        self.kv = TransformersKV(client, self.model, block_tokens=BLOCK_TOKENS)
        self.document, self.prompt = build_prompt(scale.document_tokens)

    def options(self, new_tokens: int) -> dict[str, Any]:
        """What every generation has in common."""
        return {
            "max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
            "attention_mask": torch.ones_like(self.prompt),
        }  # fmt: skip

    def recompute(self, new_tokens: int) -> Run:
        """Without the store: one forward pass over the whole prompt."""
        watch = Stopwatch()
        output = self.model.generate(self.prompt, streamer=watch, **self.options(new_tokens))
        return Run(output.logits, watch.first_token_s, Prefix(None, 0))

    def resume(self, new_tokens: int, salt: bytes = b"") -> Run:
        """With the store: fetch, then compute what is left. A miss leaves everything."""
        watch = Stopwatch()
        prefix = self.kv.load(self.prompt, salt=salt)
        load_s = watch.elapsed_s
        options = self.options(new_tokens)
        output = self.model.generate(self.prompt, past_key_values=prefix.cache, streamer=watch, **options)
        return Run(output.logits, watch.first_token_s, prefix, load_s)

    def fetched(self, run: Run) -> dict[str, Any]:
        """What a run found in the store, and where."""
        blocks, seconds = run.prefix.tokens // BLOCK_TOKENS, run.load_s
        fetched_bytes = blocks * _block_bytes(self.kv)
        return {
            "prompt_tokens": self.prompt.shape[1],
            "question_tokens": QUESTION_TOKENS,
            "hit_tokens": run.prefix.tokens,
            "hit_blocks": blocks,
            "served_from": _tiers(run.prefix),
            "why_not": run.prefix.why_not,
            "fetch_bytes": fetched_bytes,
            "fetch_gb_per_s": fetched_bytes / seconds / 1e9,
        }


class Stopwatch:
    """A streamer that runs from when it is made, and notes when the first token is there."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._puts = 0
        self.first_token_s = math.nan

    @property
    def elapsed_s(self) -> float:
        """Until now."""
        return time.perf_counter() - self._began

    def put(self, _: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self._puts += 1
        if self._puts == 2:
            self.first_token_s = self.elapsed_s

    def end(self) -> None:
        """All tokens are there."""


def same_logits(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    """Whether two generations agree in every logit of every step, to the last bit."""
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


# -- processes C and D ------------------------------------------------------------------------------------------


def play_later(client: kvclient.Client, scale: Scale, name: str) -> dict[str, Any]:
    """Recompute, then fetch, once only: the next time it would be in DRAM. Before it another chain, or half of what is
    timed were a client's first steps: mapping memory, loading code.
    """
    tell(step=f"{name} builds the model", done=0, of=1)
    engine = Engine(client, scale)
    tell(step=f"{name} recomputes the prompt, for comparison", done=0, of=1)
    reference = engine.recompute(NEW_TOKENS)
    tell(step=f"{name} fetches and resumes", done=0, of=1)
    engine.kv.load(engine.prompt, salt=OTHER_SALT)
    resumed = engine.resume(NEW_TOKENS)
    tell(step=f"{name} fetches and resumes", done=1, of=1)
    return engine.fetched(resumed) | {
        "identical": same_logits(resumed.logits, reference.logits),
        "compared_tokens": NEW_TOKENS,
        "ttft_cold_s": reference.first_token_s,
        "ttft_warm_s": resumed.first_token_s,
        "speedup": reference.first_token_s / resumed.first_token_s,
    }


# -- process B --------------------------------------------------------------------------------------------------


def play_b(client: kvclient.Client, scale: Scale) -> dict[str, Any]:
    """Everything that is promised while one daemon lives, one after the other; then its end."""
    tell(step="B builds the model", done=0, of=1)
    engine = Engine(client, scale)
    tell(step="B recomputes the prompt, for comparison", done=0, of=1)
    reference = engine.recompute(NEW_TOKENS)
    resumed = engine.resume(NEW_TOKENS)
    result = engine.fetched(resumed) | {
        "identical": same_logits(resumed.logits, reference.logits),
        "compared_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
    }
    result |= time_first_tokens(engine, scale, reference)
    result |= corrupt_one_block(engine, reference)
    result |= lose_the_daemon(engine, reference)
    return result


def time_first_tokens(engine: Engine, scale: Scale, reference: Run) -> dict[str, Any]:
    """Time to the first token without the store and with it, in turn in one process: medians, in seconds.

    And the speed of fetching the prefix in that.
    """
    again = f"B recomputes it for its first token, {_times(scale.cold_runs)}"
    cold_runs = [reference, *_repeat(again, scale.cold_runs, lambda: engine.recompute(1))]
    fetching = f"B fetches it for its first token, {_times(scale.warm_runs)}"
    warm_runs = _repeat(fetching, scale.warm_runs, lambda: engine.resume(1))
    cold_s, warm_s = (median(run.first_token_s for run in runs) for runs in (cold_runs, warm_runs))
    return {
        "ttft_cold_s": cold_s,
        "ttft_warm_s": warm_s,
        "speedup": cold_s / warm_s,
        "warm_runs": scale.warm_runs,
        "fetch_gb_per_s": median(engine.fetched(run)["fetch_gb_per_s"] for run in warm_runs),
    }


def _times(runs: int) -> str:
    return "once more" if runs == 1 else f"{runs} times"


def _repeat(step: str, runs: int, work: Callable[[], Run]) -> list[Run]:
    done = []
    for run in range(runs):
        tell(step=step, done=run, of=runs)
        done.append(work())
    tell(step=step, done=runs, of=runs)
    return done


def corrupt_one_block(engine: Engine, reference: Run) -> dict[str, Any]:
    """The negative control: store the document again under another salt, one block of it wrong, and resume from that.

    If nobody could tell, equal logits would prove nothing.
    """
    tell(step="B resumes from a corrupted block", done=0, of=1)
    cache = engine.kv.load(engine.prompt).cache
    middle = engine.document.shape[1] // BLOCK_TOKENS // 2 * BLOCK_TOKENS
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor[:, :, middle : middle + BLOCK_TOKENS].neg_()
    engine.kv.save(engine.document, cache, salt=CONTROL_SALT, wait=True)
    resumed = engine.resume(1, salt=CONTROL_SALT)
    whole = resumed.prefix.tokens == engine.document.shape[1]
    return {"control_differs": whole and not torch.equal(resumed.logits[0], reference.logits[0])}


def lose_the_daemon(engine: Engine, reference: Run) -> dict[str, Any]:
    """Have the daemon killed while one thread generates from fetched KV and another fetches; then ask again."""
    tell(step="B goes on while the daemon is killed", done=0, of=2)
    fetching = Fetching(engine)
    fetching.start()
    during = engine.kv.generate(engine.prompt, streamer=KillSwitch(), **engine.options(NEW_TOKENS))
    fetching.join(PATIENCE_S)
    tell(step="B goes on while the daemon is killed", done=1, of=2)
    began = time.perf_counter()
    miss = engine.kv.load(engine.prompt)
    miss_s = time.perf_counter() - began
    after = engine.kv.generate(engine.prompt, **engine.options(NEW_TOKENS))
    tell(step="B goes on while the daemon is killed", done=2, of=2)
    went_on = during.cached_tokens == engine.document.shape[1] and same_logits(during.output.logits, reference.logits)
    recomputed = miss.tokens == after.cached_tokens == 0 and same_logits(after.output.logits, reference.logits)
    return {
        "survived_kill": went_on and recomputed and fetching.missed and fetching.wrong == 0 and fetching.right > 0,
        "fetches_before_kill": fetching.right,
        "miss_ms": miss_s * 1e3,
    }


class KillSwitch:
    """A streamer that has the daemon killed in the middle of a generation, and waits until it is dead."""

    def __init__(self) -> None:
        self._seen = -1  # the prompt comes first

    def put(self, _: torch.Tensor) -> None:
        """One more token."""
        self._seen += 1
        if self._seen == KILL_AT_TOKEN:
            tell(ready="kill")
            sys.stdin.readline()

    def end(self) -> None:
        """All tokens are there."""


class Fetching(threading.Thread):
    """Fetches again and again, and compares, until there is nothing to fetch."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="fetching", daemon=True)
        self._engine = engine
        self._expected = engine.kv.load(engine.prompt).cache
        self.right = 0
        self.wrong = 0
        self.missed = False

    def run(self) -> None:
        """See the class."""
        until = time.monotonic() + PATIENCE_S
        while not self.missed and time.monotonic() < until:
            prefix = self._engine.kv.load(self._engine.prompt)
            self.missed = prefix.tokens == 0
            if not self.missed:
                same = _same_cache(prefix.cache, self._expected)
                self.right += same
                self.wrong += not same


def _same_cache(one: Any, other: Any) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def _tiers(prefix: Prefix) -> str:
    """Where a prefix came from: "dram", or "dram 10, disk 182" in blocks, or "none"."""
    blocks = {"hbm": prefix.tiers.hbm, "dram": prefix.tiers.dram, "disk": prefix.tiers.disk}
    used = [tier for tier, count in blocks.items() if count]
    return used[0] if len(used) == 1 else ", ".join(f"{tier} {blocks[tier]}" for tier in used) or "none"


def _block_bytes(kv: TransformersKV) -> int:
    assert kv.namespace is not None, kv.why_not
    return kv.namespace.identity.block_bytes


if __name__ == "__main__":
    main()
