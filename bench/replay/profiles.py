"""Prefill profiles `T(cached, new)`: seconds to prefill `new` tokens behind `cached` ones that need no computing.

    T(cached, new) = start + token * new + pair * new * (cached + new / 2)

The linear part is matrix multiplication with the weights: 2 FLOP a parameter and token. The quadratic part is
attention: the i-th new token meets cached + i earlier ones, which sums to new * (cached + new / 2) pairs, each of
2 * (score width + value width) FLOP a head and layer. `start` is what a forward pass costs however short it is:
the weights are read once, kernels are launched, and ranks wait for each other.

Magnitudes are those of H100/H800 accelerators, 989 TFLOP/s dense in bf16 (data sheet), at the utilisation that serving
engines report: half of it in the linear part, 40 % in FlashAttention with causal masks, and 85 % of either when
several accelerators share a layer and all-reduce in between. They were fixed before any policy was tuned on them, and
what a policy sees of them is ratios: how much dearer a deep block is than a shallow one, and a large model than a
small one.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Floats)

LINEAR_FLOP_PER_S: Final = 0.50 * 989e12
ATTENTION_FLOP_PER_S: Final = 0.40 * 989e12
SHARED_LAYER_EFFICIENCY: Final = 0.85


@dataclass(frozen=True, slots=True)
class Profile:
    """What a prefill costs on one model and the accelerators that serve it."""

    name: str
    start_s: float
    token_s: float
    pair_s: float

    def seconds(self, cached: Number, new: Number) -> Number:
        """Seconds for `new` tokens behind `cached` ones, element by element where they are arrays."""
        return self.start_s + self.token_s * new + self.pair_s * new * (cached + new / 2)


def _profile(name: str, *, start_s: float, linear_flop: float, pair_flop: float, accelerators: int) -> Profile:
    """A profile from FLOP a token, FLOP a pair of tokens, and how many accelerators share them."""
    share = accelerators * (SHARED_LAYER_EFFICIENCY if accelerators > 1 else 1.0)
    return Profile(
        name,
        start_s=start_s,
        token_s=linear_flop / (LINEAR_FLOP_PER_S * share),
        pair_s=pair_flop / (ATTENTION_FLOP_PER_S * share),
    )


# Qwen2.5-1.5B: 28 layers of 12 query heads of 128. Weights of 3 GB are read in 1 ms; the rest of the start is launches.
# About 160,000 tokens/s when short; 32 Ki tokens take 0.4 s, of which attention is half.
SMALL: Final = _profile(
    "qwen2.5-1.5b", start_s=0.005, linear_flop=2 * 1.54e9, pair_flop=2 * 28 * 12 * (128 + 128), accelerators=1
)
# Llama-3.1-8B: 32 layers of 32 query heads of 128. Weights of 16 GB take 5 ms to read.
# About 31,000 tokens/s when short; 32 Ki tokens take 1.8 s, of which attention is 0.7.
BASE: Final = _profile(
    "llama-3.1-8b", start_s=0.008, linear_flop=2 * 8.0e9, pair_flop=2 * 32 * 32 * (128 + 128), accelerators=1
)
# Llama-3.1-70B over four: 80 layers of 64 query heads of 128. 35 GB a rank take 10 ms; 160 all-reduces as long again.
# About 12,000 tokens/s when short; 32 Ki tokens take 3.8 s, of which attention is 1.0.
LARGE: Final = _profile(
    "llama-3.1-70b-tp4", start_s=0.025, linear_flop=2 * 70.6e9, pair_flop=2 * 80 * 64 * (128 + 128), accelerators=4
)
# DeepSeek-V3 over eight: 37 B parameters of 671 B serve a token; 61 layers of 128 heads, scores 192 wide, values 128.
# Experts are chosen token by token, so batches a matrix are small and ranks wait for the fullest: utilisation is half
# of a dense model's. That gives 23,000 tokens/s a node of eight, where its makers report 32,000 computed (73,700 with
# cache hits) for a larger deployment that also overlaps two batches.
MLA: Final = _profile(
    "deepseek-v3-tp8", start_s=0.040, linear_flop=2 * 2 * 37e9, pair_flop=2 * 61 * 128 * (192 + 128), accelerators=8
)

PROFILES: Final = (SMALL, BASE, LARGE, MLA)


def profile_named(name: str) -> Profile:
    """The profile of that name. Raises ValueError and names those there are."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise ValueError(f"no prefill profile {name!r}: choose from {', '.join(profile.name for profile in PROFILES)}")
