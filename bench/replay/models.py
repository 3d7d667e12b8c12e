"""The models of the synthetic workloads: KV bytes from the architecture, in bf16, all ranks together."""

from typing import Final

from bench.replay import profiles
from bench.replay.workload import Model

_BF16: Final = 2
_KEY_AND_VALUE: Final = 2

# A block of 256 tokens is what engines commonly offload at once.
SMALL: Final = Model("qwen2.5-1.5b", 256, 256 * _KEY_AND_VALUE * 28 * 2 * 128 * _BF16, profiles.SMALL)  # 7 MiB
BASE: Final = Model("llama-3.1-8b", 256, 256 * _KEY_AND_VALUE * 32 * 8 * 128 * _BF16, profiles.BASE)  # 32 MiB
LARGE: Final = Model("llama-3.1-70b", 256, 256 * _KEY_AND_VALUE * 80 * 8 * 128 * _BF16, profiles.LARGE)  # 80 MiB
# One latent of 512 and a rotary key of 64 a token and layer; kernels for it page by 64 tokens.
MLA: Final = Model("deepseek-v3", 64, 64 * 61 * (512 + 64) * _BF16, profiles.MLA)  # 4.3 MiB
