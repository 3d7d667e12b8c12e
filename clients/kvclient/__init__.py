"""The engine side of kvstored: keep KV blocks of token prefixes in the host's store, and read them back.

    client = kvclient.connect()
    ns = client.namespace(model="llama", engine="mine 1", layout="nhd", dtype="bfloat16", block_bytes=2 << 20)
    keys = ns.keys(token_ids)
    ns.store(keys, blocks)
    with ns.fetch(keys) as lease:
        hit = lease.copy_to(pages[: lease.expected])  # what lies on disk is copied as it comes

What it knows of the future it may say (`Namespace.pin`, `prefetch`, `expect`; `Client.program`, `workflow`): hints.py.

A daemon that is absent, dead or restarting is a miss, never an exception. `kvclient.aio` is the asyncio flavour.
The errors (drawn in `kvproto.errors`):

    KvError
    |-- UsageError        the caller passed what no daemon could accept
    |   |-- ForkError     a client used in a forked child
    |   `-- ClosedError   a client used after close()
    |-- AttachError       raised by `Client.attach`: the daemon cannot reach that memory of a GPU
    |-- ProtocolError     a peer broke the format (never raised by the verbs: the client reconnects)
    `-- RefusedError      raised by `connect`: the daemon will not serve this client
"""

from kvclient.client import Client, connect
from kvclient.hints import Program, Run, Workflow
from kvclient.lease import Lease
from kvclient.namespace import Namespace
from kvclient.policy import Prefetch
from kvclient.results import (
    Advice,
    Choice,
    Deleted,
    FlushResult,
    LoadResult,
    Match,
    Partial,
    PinInfo,
    PinResult,
    Reason,
    Refused,
    Status,
    StoreResult,
    Tiers,
)
from kvclient.steps import Step
from kvproto.errors import AttachError, ClosedError, ForkError, KvError, ProtocolError, RefusedError, UsageError
from kvproto.frames import Role
from kvproto.retention import Retention

__all__ = [
    "connect", "Client", "Namespace", "Lease", "Role",
    "StoreResult", "Refused", "Reason", "FlushResult", "Deleted", "LoadResult", "Match", "Tiers",
    "Status",
    "PinResult", "PinInfo", "Partial", "Retention", "Prefetch", "Advice", "Choice",
    "Program", "Workflow", "Step", "Run",
    "KvError", "UsageError", "ForkError", "ClosedError", "ProtocolError", "RefusedError", "AttachError",
]  # fmt: skip
