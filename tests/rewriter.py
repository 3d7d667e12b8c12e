"""A writer that never stops: chains are deleted and stored anew, in their next version, while others read them.

`python -m tests.rewriter RUNTIME_DIR CHAINS BLOCKS BLOCK_BYTES SEED`, until it is killed. A block begins with its
version, and the rest of it follows from key and version; so whoever reads one can tell what it should be.
"""

import sys
from pathlib import Path
from random import Random

import numpy as np

import kvclient
from tests.node import Bytes, chain, value

FIELDS = {"model": "m", "engine": "rewritten", "layout": "flat", "dtype": "uint8"}
VERSION_BYTES = 8


def keys_of(name: int, blocks: int) -> list[bytes]:
    """Of one chain."""
    return chain(("rewritten", name), blocks)


def content_of(key: bytes, block_bytes: int, version: int) -> Bytes:
    """Of one block."""
    content = value(key, block_bytes, version).copy()
    content[:VERSION_BYTES] = np.frombuffer(version.to_bytes(VERSION_BYTES, "little"), dtype=np.uint8)
    return content


def version_of(block: Bytes) -> int:
    """What it says itself."""
    return int.from_bytes(block[:VERSION_BYTES].tobytes(), "little")


def main() -> None:
    """Write."""
    chains, blocks, block_bytes, seed = map(int, sys.argv[2:])
    random, versions = Random(seed), dict.fromkeys(range(chains), 0)
    with kvclient.connect(Path(sys.argv[1]), timeout_s=30.0) as client:
        ns = client.namespace(block_bytes=block_bytes, **FIELDS)  # type: ignore[arg-type]
        while True:
            name = random.randrange(chains)
            keys = keys_of(name, blocks)
            ns.delete(keys[:1])
            versions[name] += 1
            ns.store(keys, [content_of(key, block_bytes, versions[name]) for key in keys], wait=random.random() < 0.5)


if __name__ == "__main__":
    main()
