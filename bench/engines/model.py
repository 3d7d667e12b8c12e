"""Writes small Llama models: `python -m bench.engines.model FOLDER tiny|hybrid|small|bench [--seed N]`.

The weights are random, but what a model says depends on every layer's KV: its projections have gain. In a model with
the usual small weights attention is an average over nothing, and all KV set to zero gives the same answers to the
last bit, so it would show no error at all.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

HEAD_DIM = 64
MAX_TOKENS = 8192
KV_VALUE_BYTES = 2  # bfloat16
GAIN = 3.0  # of q, k, v, o and what reads the answer out; standard deviation times the root of the inputs
QUIET = 0.7  # of the rest


@dataclass(frozen=True, slots=True)
class Size:
    """A model's shape."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    window: int = 0  # tokens that every other layer looks back at; 0: all layers look at everything

    @property
    def token_bytes(self) -> int:
        """KV of a token, all layers."""
        return self.layers * 2 * self.kv_heads * HEAD_DIM * KV_VALUE_BYTES


SIZES = {
    "tiny": Size(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=4, vocabulary=512),
    "hybrid": Size(layers=4, hidden=256, intermediate=512, heads=4, kv_heads=4, vocabulary=512, window=256),
    "small": Size(layers=7, hidden=256, intermediate=512, heads=4, kv_heads=4, vocabulary=2048),
    "bench": Size(layers=8, hidden=768, intermediate=2048, heads=12, kv_heads=4, vocabulary=2048),
}


def write_model(folder: Path, size: Size, seed: int = 0) -> None:
    """A model in `folder`, as vLLM and transformers read it. The same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(size), indent=1) + "\n")
    save_file(_weights(size, seed), folder / "model.safetensors", metadata={"format": "pt"})


def _config(size: Size) -> dict[str, object]:
    sliding = {
        "sliding_window": size.window,
        "layer_types": ["full_attention", "sliding_attention"] * (size.layers // 2),
    }
    return (sliding if size.window else {}) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": HEAD_DIM,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _weights(size: Size, seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=random) * (gain / math.sqrt(columns))
        return values.to(torch.bfloat16)

    queries, kv = size.heads * HEAD_DIM, size.kv_heads * HEAD_DIM
    ones = torch.ones(size.hidden, dtype=torch.bfloat16)
    weights = {"model.embed_tokens.weight": matrix(size.vocabulary, size.hidden, math.sqrt(size.hidden))}
    for layer in range(size.layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.q_proj.weight": matrix(queries, size.hidden, GAIN),
            f"{name}.self_attn.k_proj.weight": matrix(kv, size.hidden, GAIN),
            f"{name}.self_attn.v_proj.weight": matrix(kv, size.hidden, GAIN),
            f"{name}.self_attn.o_proj.weight": matrix(size.hidden, queries, GAIN),
            f"{name}.mlp.gate_proj.weight": matrix(size.intermediate, size.hidden, QUIET),
            f"{name}.mlp.up_proj.weight": matrix(size.intermediate, size.hidden, QUIET),
            f"{name}.mlp.down_proj.weight": matrix(size.hidden, size.intermediate, QUIET),
            f"{name}.input_layernorm.weight": ones.clone(),
            f"{name}.post_attention_layernorm.weight": ones.clone(),
        }
    return weights | {
        "model.norm.weight": ones.clone(),
        "lm_head.weight": matrix(size.vocabulary, size.hidden, GAIN),
    }


def main() -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines.model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_model(options.folder, SIZES[options.size], options.seed)


if __name__ == "__main__":
    main()
