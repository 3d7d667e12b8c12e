"""A client that stops, as by SIGSTOP from outside, with a lease in its hands, and then looks at what it holds.

`python -m tests.stalling RUNTIME_DIR BLOCK_BYTES`: a line of keys in hex each time. When somebody has it go on, it says
in a line of JSON how many blocks it had leased, whether the lease still counts for the client library, and how many
blocks are not what they were.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

import kvclient
from tests.node import PATIENCE_S

LEASE_S = 0.02


def main() -> None:
    """Obey."""
    block_bytes = int(sys.argv[2])
    fields = {"model": "m", "engine": "node", "layout": "flat", "dtype": "uint8"}  # those of `tests/node.py`
    with kvclient.connect(Path(sys.argv[1]), timeout_s=PATIENCE_S) as client:
        ns = client.namespace(block_bytes=block_bytes, **fields)  # type: ignore[arg-type]
        print(json.dumps({}), flush=True)
        for line in sys.stdin:
            keys = [bytes.fromhex(word) for word in line.split()]
            targets = np.zeros((len(keys), block_bytes), dtype=np.uint8)
            with ns.fetch(keys, ttl_s=LEASE_S) as lease:
                views = lease.views
                before = [bytes(view) for view in views]
                os.kill(os.getpid(), signal.SIGSTOP)
                after = [bytes(view) for view in views]  # of whoever has these slots now
                print(
                    json.dumps(
                        {
                            "leased": len(before),
                            "valid": lease.valid(),
                            "copied": lease.copy_to(targets[: len(before)]),
                            "changed": sum(one != other for one, other in zip(before, after, strict=True)),
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
