"""An engine in a process of its own that computes a prompt piece by piece: `handing_program.py RUNTIME_DIR`.

Each line of its input is a store, as JSON: model, name of the chain, first and last block. Each line of its output is
how many blocks were accepted.
"""

import json
import sys

import kvclient
from tests.node import PATIENCE_S, chain, values

BLOCK_BYTES = 64 << 10


def main(runtime_dir: str) -> None:
    """Until the input ends."""
    with kvclient.connect(runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(PATIENCE_S)
        for line in sys.stdin:
            said = json.loads(line)
            first, stop = said["first"], said["stop"]
            ns = client.namespace(
                model=said["model"], engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES
            )
            keys = chain(said["name"], stop)
            parent = keys[first - 1] if first else None
            done = ns.store(keys[first:], values(keys[first:], BLOCK_BYTES), parent=parent, wait=True)
            print(done.accepted, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
