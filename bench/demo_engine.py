"""The two engine processes of `bench.demo`: A computes a document's KV and stores it, B fetches it and goes on.

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
PATIENCE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to do."""

    layers: int
    document_tokens: int
    cold_runs: int
    warm_runs: int


FULL: Final = Scale(layers=8, document_tokens=3072, cold_runs=3, warm_runs=7)
QUICK: Final = Scale(layers=4, document_tokens=2048, cold_runs=3, warm_runs=5)


def main() -> None:
    """Play the role that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo_engine")
    parser.add_argument("role", choices=("a", "b"))
    parser.add_argument("runtime_dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    scale = QUICK if options.quick else FULL
    with kvclient.connect(options.runtime_dir, name=f"demo {options.role}") as client:
        play = play_a if options.role == "a" else play_b
        tell(result=play(client, scale))


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
    """Compute the document's KV, store it, and wait until others can see it."""
    tell(step="A builds the model", done=0, of=1)
    model = build_model(scale.layers)
    kv = TransformersKV(client, model, block_tokens=BLOCK_TOKENS)
    document, _ = build_prompt(scale.document_tokens)
    step = f"A computes the KV of {document.shape[1]:,} tokens"
    tell(step=step, done=0, of=scale.layers)
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, done=index + 1: tell(step=step, done=done, of=scale.layers))
    with torch.no_grad():
        cache = model(document, use_cache=True, logits_to_keep=1).past_key_values
    tell(step="A stores it", done=0, of=1)
    began = time.perf_counter()
    saved = kv.save(document, cache, wait=True)
    seconds = time.perf_counter() - began
    blocks = document.shape[1] // BLOCK_TOKENS
    if saved.accepted != blocks:
        raise RuntimeError(f"stored {saved.accepted} of {blocks} blocks: {saved}")
    tell(step="A stores it", done=1, of=1)
    return {"stored_blocks": saved.accepted, "store_gb_per_s": blocks * _block_bytes(kv) / seconds / 1e9}


# -- process B --------------------------------------------------------------------------------------------------


class Engine:
    """B's model with its prompt."""

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

    def recompute(self, new_tokens: int) -> Any:
        """Without the store: one forward pass over the whole prompt."""
        return self.model.generate(self.prompt, **self.options(new_tokens))

    def resume(self, new_tokens: int, salt: bytes = b"") -> tuple[Prefix, Any]:
        """With the store: fetch, then compute what is left."""
        prefix = self.kv.load(self.prompt, salt=salt)
        return prefix, self.model.generate(self.prompt, past_key_values=prefix.cache, **self.options(new_tokens))


def play_b(client: kvclient.Client, scale: Scale) -> dict[str, Any]:
    """Everything the demonstration promises, one after the other."""
    tell(step="B builds the model", done=0, of=1)
    engine = Engine(client, scale)
    tell(step="B recomputes the prompt, for comparison", done=0, of=1)
    reference = engine.recompute(NEW_TOKENS)
    prefix, resumed = engine.resume(NEW_TOKENS)
    result: dict[str, Any] = {
        "identical": same_logits(resumed, reference),
        "hit_tokens": prefix.tokens,
        "served_from": _tier(prefix),
        "prompt_tokens": engine.prompt.shape[1],
        "question_tokens": QUESTION_TOKENS,
        "compared_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
    }
    result |= time_first_tokens(engine, scale)
    result |= time_fetch(engine, scale)
    result |= corrupt_one_block(engine, reference)
    result |= lose_the_daemon(engine, reference)
    return result


def same_logits(one: Any, other: Any) -> bool:
    """Whether two generations agree in every logit of every step, to the last bit."""
    pairs = zip(one.logits, other.logits, strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def time_first_tokens(engine: Engine, scale: Scale) -> dict[str, Any]:
    """Time to the first token without the store and with it, in turn in one process: medians, in seconds."""
    cold = _repeat("B computes the first token, cold", scale.cold_runs, lambda: engine.recompute(1))
    warm = _repeat("B computes the first token, warm", scale.warm_runs, lambda: engine.resume(1))
    return {"ttft_cold_s": median(cold), "ttft_warm_s": median(warm), "speedup": median(cold) / median(warm)}


def time_fetch(engine: Engine, scale: Scale) -> dict[str, Any]:
    """Speed of getting the prefix alone: keys, lease, copy into a new cache."""
    seconds = median(_repeat("B fetches", scale.warm_runs, lambda: engine.kv.load(engine.prompt)))
    fetched_bytes = engine.document.shape[1] // BLOCK_TOKENS * _block_bytes(engine.kv)
    return {"fetch_bytes": fetched_bytes, "fetch_gb_per_s": fetched_bytes / seconds / 1e9}


def _repeat(step: str, runs: int, work: Callable[[], object]) -> list[float]:
    seconds = []
    for run in range(runs):
        tell(step=step, done=run, of=runs)
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    tell(step=step, done=runs, of=runs)
    return seconds


def corrupt_one_block(engine: Engine, reference: Any) -> dict[str, Any]:
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
    prefix, resumed = engine.resume(NEW_TOKENS, salt=CONTROL_SALT)
    whole = prefix.tokens == engine.document.shape[1]
    return {"control_differs": whole and not torch.equal(resumed.logits[0], reference.logits[0])}


def lose_the_daemon(engine: Engine, reference: Any) -> dict[str, Any]:
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
    went_on = during.cached_tokens == engine.document.shape[1] and same_logits(during.output, reference)
    recomputed = miss.tokens == after.cached_tokens == 0 and same_logits(after.output, reference)
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


def _tier(prefix: Prefix) -> str:
    """The tier that most blocks came from."""
    tiers = {"hbm": prefix.tiers.hbm, "dram": prefix.tiers.dram, "disk": prefix.tiers.disk}
    return max(tiers, key=lambda name: tiers[name]) if prefix.tokens else "none"


def _block_bytes(kv: TransformersKV) -> int:
    assert kv.namespace is not None, kv.why_not
    return kv.namespace.identity.block_bytes


if __name__ == "__main__":
    main()
