"""The model of `bench swap`: a small Llama of transformers whose KV lies in pages of a fixed pool.

Computed in float64: a context that is computed anew takes other matrix routines than the same one token by token, and
in float32 the difference would now and then choose another token. Tokens must be equal, whatever became of the pages.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, DynamicLayer

from bench.engines.model import GAIN, QUIET

BLOCK_TOKENS: Final = 16
LAYERS: Final = 4
HEADS: Final = 4
HEAD_DIM: Final = 64
HIDDEN: Final = 256
VOCABULARY: Final = 512
SEED: Final = 7
TOKEN_BYTES: Final = LAYERS * 2 * HEADS * HEAD_DIM * 8
BLOCK_BYTES: Final = BLOCK_TOKENS * TOKEN_BYTES


class PagedModel:
    """Weights, and a pool of pages: page n of all layers is one block. One thread."""

    def __init__(self, pages: int) -> None:
        self._model = _build()
        shape = (pages, 2, HEADS, BLOCK_TOKENS, HEAD_DIM)
        self.layers = [torch.zeros(shape, dtype=torch.float64) for _ in range(LAYERS)]

    def forward(
        self, tokens: Sequence[int], pages: Sequence[int], cached: int, wait: Callable[[int], object] | None = None
    ) -> int:
        """Compute these tokens behind `cached` ones in `pages`, where their KV is written to; the likeliest next one.

        `wait` is called with the number of each layer before that one's pages are read.
        """
        cache = DynamicCache()
        cache.layers = [_PagedLayer(layer, pages, cached, number, wait) for number, layer in enumerate(self.layers)]
        with torch.no_grad():
            output = self._model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())


class _PagedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """One layer's KV of one request: written into its pages, and gathered out of them."""

    def __init__(
        self, layer: torch.Tensor, pages: Sequence[int], cached: int, number: int,
        wait: Callable[[int], object] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._layer, self._pages, self._cached = layer, torch.tensor(pages), cached
        self._number, self._wait = number, wait

    def get_seq_length(self) -> int:
        return self._cached

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._wait is not None:
            self._wait(self._number)
        stop = self._cached + keys.shape[-2]
        at = torch.arange(self._cached, stop)
        page, offset = self._pages[at // BLOCK_TOKENS], at % BLOCK_TOKENS
        # [1, heads, tokens, dim] -> tokens first, as indexing by two dimensions apart has it
        self._layer[page, 0, :, offset] = keys[0].transpose(0, 1)
        self._layer[page, 1, :, offset] = values[0].transpose(0, 1)
        self._cached = stop
        blocks = -(-stop // BLOCK_TOKENS)
        whole = self._layer[self._pages[:blocks]].permute(1, 2, 0, 3, 4).reshape(2, 1, HEADS, -1, HEAD_DIM)
        return whole[0, :, :, :stop], whole[1, :, :, :stop]


def _build() -> Any:
    """Random weights with gain, as in `bench/engines/model.py`: what it says hangs on every block."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_DIM, vocab_size=VOCABULARY, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(SEED)
    sharp = ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                gain = GAIN if any(part in name for part in sharp) else QUIET
                weight.normal_(0.0, 1.0 if "embed" in name else gain / math.sqrt(weight.shape[1]), generator=generator)
    return model.to(torch.float64)
