"""What a cache was worth: the share of blocks, of tokens, and of prefill seconds that it saved."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.replay.workload import Workload


@dataclass(frozen=True, slots=True)
class Score:
    """Shares from 0 to 1. A request's hit is its lead run of resident blocks: what lies behind a gap is of no use."""

    hit: float
    token_hit: float
    compute_saved: float


def score(workload: Workload, hit_blocks: Sequence[int]) -> Score:
    """From the lead run of each request, in their order.

    hit = hit blocks / blocks; token_hit = hit tokens / tokens;
    compute_saved = 1 - sum T(cached, new) / sum T(0, tokens), each model with its own T.
    """
    requests = workload.requests
    model = np.array([request.model for request in requests], np.int64)
    blocks = np.array([request.keys.size for request in requests], np.int64)
    tokens = np.array([request.tokens for request in requests], np.int64)
    hits = np.array(hit_blocks, np.int64)
    assert hits.size == blocks.size, "a hit count for each request"
    assert np.all((hits >= 0) & (hits <= blocks)), "more hits than blocks"
    block_tokens = np.array([one.block_tokens for one in workload.models], np.int64)
    cached = np.minimum(hits * block_tokens[model], tokens)
    spent_s, full_s = 0.0, 0.0
    for number, one in enumerate(workload.models):
        had = cached[model == number].astype(np.float64)
        whole = tokens[model == number].astype(np.float64)
        spent_s += float(np.sum(one.profile.seconds(had, whole - had)))
        full_s += float(np.sum(one.profile.seconds(np.zeros(whole.size), whole)))
    return Score(
        hit=int(hits.sum()) / max(int(blocks.sum()), 1),
        token_hit=int(cached.sum()) / max(int(tokens.sum()), 1),
        compute_saved=1 - spent_s / full_s if full_s else 0.0,
    )


def infinite(workload: Workload) -> Score:
    """The score of a cache that keeps everything: no policy can have more."""
    seen: set[int] = set()
    runs: list[int] = []
    for request in workload.requests:
        keys = request.keys.tolist()
        runs.append(lead_run([key in seen for key in keys]))
        seen.update(keys)
        seen.update(request.output_keys.tolist())
    return score(workload, runs)


def lead_run(resident: Sequence[bool]) -> int:
    """How many are resident before the first that is not."""
    for position, here in enumerate(resident):
        if not here:
            return position
    return len(resident)
