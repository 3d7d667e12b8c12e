"""Block keys: 32 bytes a block, each chained over all tokens before it.

    root   = SHA-256("kvstored block key 1" || len(extra) as u64 || extra)
    key[i] = SHA-256(key[i - 1] || tokens of block i as u32 little-endian)        key[-1] = root

`extra` is everything else the bytes depend on per request: a tenant's salt, image digests, an adapter. An engine
that has a chained block hash of its own uses that instead; the store never looks inside a key.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvproto.errors import UsageError
from kvproto.ids import BlockKey

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ROOT = b"kvstored block key 1"


def block_keys(token_ids: "ArrayLike", block_tokens: int, extra: bytes = b"") -> list[BlockKey]:
    """Keys of the full blocks of a token sequence; a last partial block has none.

    `token_ids`: one-dimensional, whole numbers from 0 to 2**32 - 1. Raises UsageError otherwise. Any thread.
    """
    tokens = _as_u32(token_ids)
    sha256 = hashlib.sha256
    key = sha256(_ROOT + len(extra).to_bytes(8, "little") + extra).digest()
    step = 4 * block_tokens
    stream = tokens.tobytes()
    keys: list[BlockKey] = []
    for start in range(0, len(stream) - step + 1, step):
        key = sha256(key + stream[start : start + step]).digest()
        keys.append(BlockKey(key))
    return keys


def _as_u32(token_ids: "ArrayLike") -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    if isinstance(token_ids, Sequence) and not len(token_ids):
        return np.empty(0, dtype="<u4")
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UsageError(f"token ids must be one-dimensional whole numbers, not {tokens.ndim}-d {tokens.dtype}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFFFFFF):
        raise UsageError("token ids must lie between 0 and 2**32 - 1")
    return tokens.astype("<u4")
