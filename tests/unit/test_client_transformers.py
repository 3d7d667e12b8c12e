"""How the transformers adapter reads a lease: each chunk as it comes, and only what came."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvclient.integrations.transformers import _read_blocks
from kvclient.integrations.transformers_model import KVShape
from tests.peer import PATIENCE_S
from tests.unit.client_kit import BLOCK_BYTES, streaming

BLOCK_TOKENS = 5
SHAPE = KVShape(layers=5, heads=10, head_dim=5, dtype=torch.float16, devices=(torch.device("cpu"),) * 5)


@pytest.mark.parametrize(("at_once", "comes"), [(4, 0), (1, 3), (0, 4), (2, 1), (0, 0)])
def test_blocks_are_laid_out_as_the_cache_wants_them_as_far_as_they_come(
    tmp_path: Path, at_once: int, comes: int
) -> None:
    assert 5 * 2 * 10 * BLOCK_TOKENS * 5 * 2 == BLOCK_BYTES
    with streaming(tmp_path, at_once, 4) as (peer, ns, keys, blocks), ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        for left in reversed(range(comes)):
            peer.ready(1, 1, left=left)
        if not comes and at_once < 4:
            peer.ready(1, 0, left=0)
        layers = _read_blocks(lease, SHAPE, BLOCK_TOKENS)
        count = at_once + comes
        if not count:
            assert layers is None
            return
        assert layers is not None
        assert lease.valid()
        assert layers.shape == (5, 2, 1, 10, count * BLOCK_TOKENS, 5)
        by_block = blocks[:count].view(np.float16).reshape(count, 5, 2, 10, BLOCK_TOKENS, 5)
        wanted = by_block.transpose(1, 2, 3, 0, 4, 5).reshape(layers.shape)
        assert layers.numpy().tobytes() == wanted.tobytes()
