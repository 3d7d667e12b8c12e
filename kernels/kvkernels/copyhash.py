"""Copy a block and hash what arrived, in one pass over the cache.

The hash is taken of the destination: the source is memory that a client can still change, and a checksum of bytes
that are not stored is worth nothing. In steps of 512 KiB the second read comes out of the cache; smaller steps ask
for the GIL more often and gain nothing.
"""

from typing import Final

import numpy as np
import xxhash

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

STEP_BYTES: Final = 512 << 10


def copy_and_hash(source: Bytes, target: Bytes) -> int:
    """Copy `source` to `target` (both contiguous, of equal length) and return XXH3-64 of `target`."""
    if target.size <= STEP_BYTES:
        target[:] = source
        return xxhash.xxh3_64_intdigest(target)  # type: ignore[arg-type]  # ndarray has the buffer protocol
    digest = xxhash.xxh3_64()
    for start in range(0, target.size, STEP_BYTES):
        step = target[start : start + STEP_BYTES]
        step[:] = source[start : start + STEP_BYTES]
        digest.update(step)  # type: ignore[arg-type]
    return digest.intdigest()


def copy_and_hash_reference(source: bytes) -> tuple[bytes, int]:
    """What `copy_and_hash` must leave in the target, and return."""
    return bytes(source), xxhash.xxh3_64_intdigest(bytes(source))
