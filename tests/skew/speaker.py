"""A client of any version, as a program: `python speaker.py RUNTIME_DIR STEP...`, a JSON object a line for each step.

Steps are store:NAME, match:NAME, fetch:NAME, pin:NAME, forget:NAME, ranks:NAME and hint:NAME, each of one chain. What a
block holds follows from its key, so that a speaker of one version can say whether bytes that another one stored are
right. Imports nothing but `kvclient`, since it runs with the packages of its version.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import kvclient
from kvproto.limits import PROTOCOL_VERSION

COUNT = 24
BLOCK_BYTES = 64 << 10
PATIENCE_S = 20.0
Answer = dict[str, Any]


def keys_of(name: str) -> list[bytes]:
    """Of a chain."""
    return [hashlib.sha256(f"{name}/{number}".encode()).digest() for number in range(COUNT)]


def block_of(key: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """What belongs to a key."""
    return np.frombuffer(hashlib.shake_128(key).digest(BLOCK_BYTES), dtype=np.uint8)


def namespace_of(client: kvclient.Client, rank: int = 0) -> kvclient.Namespace:
    """The one that all speakers share."""
    return client.namespace(
        model="m", engine=f"skew-{rank}", layout="flat", dtype="uint8", block_tokens=16, block_bytes=BLOCK_BYTES
    )


def store(client: kvclient.Client, name: str) -> Answer:
    """All of a chain, until it is durable where there is a disk."""
    ns, keys = namespace_of(client), keys_of(name)
    result = ns.store(keys, [block_of(key) for key in keys], wait=True, space_s=PATIENCE_S)
    flushed = ns.flush(PATIENCE_S)
    return {"accepted": result.accepted, "known": result.known, "durable": flushed.durable}


def match(client: kvclient.Client, name: str) -> Answer:
    """How much of a chain is there; nothing is moved for that."""
    return {"blocks": namespace_of(client).match(keys_of(name)).blocks}


def fetch(client: kvclient.Client, name: str) -> Answer:
    """Blocks that came, how many of them are right, and how many would be if they belonged to the key after theirs."""
    ns, keys = namespace_of(client), keys_of(name)
    targets = np.zeros((COUNT, BLOCK_BYTES), dtype=np.uint8)
    with ns.fetch(keys, wait_s=PATIENCE_S) as lease:
        tiers = lease.tiers
        count = lease.expected
        if count and not lease.copy_to(targets[:count]):
            count = lease.blocks if lease.valid() else 0
        tiers = lease.tiers
    right = sum(np.array_equal(targets[number], block_of(keys[number])) for number in range(count))
    control = sum(np.array_equal(targets[number], block_of(keys[(number + 1) % COUNT])) for number in range(count))
    return {"blocks": count, "right": right, "control": control, "dram": tiers.dram, "disk": tiers.disk}


def pin(client: kvclient.Client, name: str) -> Answer:
    """A pin on a chain, and what the daemon lists of it."""
    ns, keys = namespace_of(client), keys_of(name)
    pinned = ns.pin(keys, ttl_s=3600.0)
    return {"blocks": pinned.blocks, "listed": len(ns.pins())}


def forget(client: kvclient.Client, name: str) -> Answer:
    """DELETE."""
    ns, keys = namespace_of(client), keys_of(name)
    return {"deleted": ns.delete(keys[:1]), "left": ns.match(keys).blocks}


def ranks(client: kvclient.Client, name: str) -> Answer:
    """What two ranks have in common: this namespace and another one, which has half of the chain."""
    keys, other = keys_of(name), namespace_of(client, 1)
    half = keys[: COUNT // 2]
    other.store(half, [block_of(key) for key in half], wait=True, space_s=PATIENCE_S)
    if hasattr(client, "match"):
        return {"blocks": client.match([namespace_of(client), other], keys).blocks}
    return {"blocks": min(namespace_of(client).match(keys).blocks, other.match(keys).blocks)}  # before version 4


def hint(client: kvclient.Client, name: str) -> Answer:
    """What agents say; no answer, but the session must live on."""
    with client.program(f"agent-{name}") as program:
        program.context(namespace_of(client), keys_of(name))
        program.tool_started("search", expected_s=0.1)
        program.tool_finished()
    namespace_of(client).report_prefill(64, 64, 0.01)
    return {"answers": client.ping() is not None}


STEPS: dict[str, Callable[[kvclient.Client, str], Answer]] = {
    "store": store, "match": match, "fetch": fetch, "pin": pin, "forget": forget, "ranks": ranks, "hint": hint,
}  # fmt: skip


def main() -> None:
    """Take the steps."""
    runtime_dir, *steps = sys.argv[1:]
    with kvclient.connect(runtime_dir, timeout_s=PATIENCE_S) as client:
        connected = client.wait_connected(PATIENCE_S)
        session = client.status.session
        print(json.dumps({"from": kvclient.__file__, "speaks": PROTOCOL_VERSION, "connected": connected}))
        for step in steps:
            verb, _, name = step.partition(":")
            print(json.dumps(STEPS[verb](client, name)), flush=True)
        print(json.dumps({"same_session": client.status.session == session}))


if __name__ == "__main__":
    main()
