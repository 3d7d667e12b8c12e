"""An agent that calls a tool keeps its prefix, whatever others store meanwhile; one that says nothing does not.

    kvstored --runtime-dir /tmp/kv --dram 64MiB &
    python clients/examples/agent.py /tmp/kv

Random bytes stand for KV. The daemon has no disk tier here, so what leaves its memory is gone; and little memory, so
that something leaves it.
"""

import sys
from collections.abc import Sequence

import numpy as np

import kvclient

BLOCK_BYTES = 1 << 20
CONNECTED_S = 3.0
OTHERS = 20  # conversations of 8 MiB each: more than twice the daemon's memory


def main(runtime_dir: str) -> bool:
    """Whether the agent's prefix is there after the tool call, and that of the one that said nothing is not."""
    random = np.random.default_rng()
    with kvclient.connect(runtime_dir, name="agent") as client:
        if not client.wait_connected(CONNECTED_S):
            print(client.status.why_not, file=sys.stderr)
            return False
        ns = client.namespace(
            model="example", engine="none", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
        )

        def prefill() -> Sequence[bytes]:
            """A prompt of 128 tokens: eight blocks are computed and stored. The model decides to call a tool."""
            keys = ns.keys(random.integers(0, 1 << 31, 128))
            ns.store(keys, random.integers(0, 256, (len(keys), BLOCK_BYTES), dtype=np.uint8), wait=True)
            return keys

        silent = prefill()  # an agent that does not say what it knows
        with client.program("agent-7") as program:
            prompt = prefill()
            program.context(ns, prompt)
            program.tool_started("search", expected_s=20.0)
            for _ in range(OTHERS):
                prefill()
            program.tool_finished()  # the next turn is near
            targets = np.empty((len(prompt), BLOCK_BYTES), dtype=np.uint8)
            with ns.fetch(prompt) as lease:
                kept = lease.expected == len(prompt) and lease.copy_to(targets)
        left = ns.match(silent).blocks
        print("with hints:   ", "the whole prefix is there" if kept else f"{lease.expected} blocks are left")
        print("without hints:", f"{left} of {len(silent)} blocks are left")
        if left == len(silent):
            print("this daemon has room for all: start it with --dram 64MiB", file=sys.stderr)
        return kept and left < len(silent)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: agent.py RUNTIME_DIR    (of a daemon that runs, such as /tmp/kv)", file=sys.stderr)
        sys.exit(2)
    sys.exit(not main(sys.argv[1]))
