"""The figure by which the store is judged: seconds of prefill that were not computed again.

    saved = T(0, n) - T(cached, n - cached)

for a prompt of n tokens of which the first `cached` came from the store. By the fit of a profile (cost.py: a + b * new
+ c * new * (cached + new / 2)) the pass a is paid either way, and the rest does not depend on n any more:

    saved = b * cached + c * cached^2 / 2 = the sum over its blocks of b * block + c * block * (before + block / 2)

So each block has a price of its own, which grows along the chain by the same amount from block to block; rows carry
it, and a run that is leased in several frames is counted once, piece by piece. Owner thread; pure.
"""

from dataclasses import dataclass
from math import exp2
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.cost import TOKENS_MAX, PrefillProfile

# No block is believed to cost more than 12 days; and codes of rows, as `blocks.seconds_of_cost` reads them.
PRICE_SECONDS_MAX: Final = 1e6
_STEPS: Final = 1024.0  # of a code, an octave
_ONE: Final = 40.0  # octaves below a second at which codes begin


@dataclass(slots=True, eq=False)
class Saved:
    """Totals of one namespace, or of one tenant, since the daemon started."""

    dram_seconds: float = 0.0
    disk_seconds: float = 0.0
    blocks: int = 0  # that were leased
    unpriced_blocks: int = 0  # of them: nobody has said what computing them takes
    dram_bytes: int = 0  # of blocks that were leased, by where they were; of tenants only
    disk_bytes: int = 0

    @property
    def seconds(self) -> float:
        """From whatever tier."""
        return self.dram_seconds + self.disk_seconds


class Prices(NamedTuple):
    """What blocks of a chain cost to compute: the first one, and how much more each one than that before it."""

    first_seconds: float
    slope_seconds: float


def prices_of(profile: PrefillProfile, parent_cost: int) -> Prices:
    """Prices of blocks behind one whose row has that code; 0: from the root, or nobody knows where."""
    _, token_seconds, pair_seconds = profile.costs
    tokens = profile.block_tokens
    slope = min(pair_seconds * tokens * tokens, PRICE_SECONDS_MAX)
    first = min(token_seconds * tokens + slope / 2, PRICE_SECONDS_MAX)
    if parent_cost:  # whatever its row says, it lies within a context
        deepest = min(first + slope * (TOKENS_MAX // tokens), PRICE_SECONDS_MAX)
        first = min(max(first, seconds_of_code(parent_cost) + slope), deepest)
    return Prices(first, slope)


def root_seconds(profile: PrefillProfile, count: int) -> float:
    """What the first `count` blocks of a chain cost together: `saved` of the formula above."""
    _, token_seconds, pair_seconds = profile.costs
    tokens = count * profile.block_tokens
    return min(tokens * (token_seconds + pair_seconds * tokens / 2), count * PRICE_SECONDS_MAX)


def seconds_of_code(code: int) -> float:
    """What the code of a row stands for; not for 0, which says that nobody knows."""
    return exp2(code / _STEPS - _ONE)


def seconds_of_codes(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """The same for many; 0.0 for 0."""
    seconds: npt.NDArray[np.float64] = np.where(codes, np.exp2(codes / _STEPS - _ONE), 0.0)
    return seconds


def seconds_saved(profile: PrefillProfile, cached_tokens: int, prompt_tokens: int) -> float | None:
    """By the table of the profile, for a prompt whose length is known; never negative, None while it is empty."""
    assert 0 <= cached_tokens <= prompt_tokens
    whole = profile.seconds(0, prompt_tokens)
    rest = profile.seconds(cached_tokens, prompt_tokens - cached_tokens)
    if whole is None or rest is None:
        return None
    return max(0.0, whole - rest)
