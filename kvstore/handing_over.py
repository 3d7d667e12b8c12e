"""A chain that another host is to go on with: written beyond this host at once, and found there without delay.

    source   PREFETCH for REMOTE -> what lies on disk is read -> remote_writing.py, before all that nobody asked for
             ... again, until all of it is there, while more of it is being stored
    target   PREFETCH for DRAM -> Seek, even if it was not there a moment ago -> in DRAM

Owner thread.
"""

from dataclasses import dataclass

import numpy as np

from kvproto.limits import KEYS_PER_FRAME
from kvproto.policy_frames import Fetching, Tier
from kvstore import blocks
from kvstore.blocks import U4, U8
from kvstore.sessions import Namespace
from kvstore.store import Store


@dataclass(frozen=True, slots=True)
class HandOverReport:
    """How far a chain is. `dry_run`: nothing was begun."""

    blocks: int  # of its first ones, on this host
    bytes: int  # of payload
    there: int  # the first so many of them are over there
    coming: int  # those behind that will be
    remote: bool  # there is a remote tier that may be written, and answers
    dry_run: bool
    looked: int = 0  # the first so many were read back from over there, whole, as lately as was asked for
    why: str = ""  # the next one was not, or will never be there, if that is known


def hand_over(store: Store, namespace: Namespace, keys: U8, at: int, count: int, within_ns: int) -> Fetching:
    """Have the lead run of a chain written beyond this host, and say how far that is. `keys[at:]`: 4 words a key."""
    writing, tenant = store.remote.writing, namespace.tenant
    run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
    end, on_disk, _ = blocks.extend_run(store.tables, tenant.index, namespace.number, keys, at, count, 0, run)
    there, goes_on = writing.hand_over(tenant, run, end)
    store.prefetching.served(run[:there])
    if on_disk and goes_on:
        store.prefetching.prefetch(tenant, namespace, keys, at, end, within_ns, Tier.DRAM)
    return Fetching(0, there, end - there if goes_on else 0)


def report(
    store: Store, namespace: Namespace, keys: U8, within_ns: int, looked_ns: int = 0, *, dry_run: bool
) -> HandOverReport:
    """`hand_over` of all of `keys` (4 words a key), or only how far it is.

    `looked_ns`: what is over there is read back, unless that was begun so long ago or later; 0: it is not.
    """
    writing, tenant = store.remote.writing, namespace.tenant
    run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
    count = keys.size // 4
    end, _, _ = blocks.extend_run(store.tables, tenant.index, namespace.number, keys, 0, count, 0, run)
    there, coming = writing.over_there(run[:end].copy()), 0
    if not dry_run:
        _, there, coming = hand_over(store, namespace, keys, 0, count, within_ns)
    looked, why = store.remote.look(namespace, run[:there].copy(), looked_ns) if looked_ns and there else (0, "")
    why = writing.given_up(run[there:end]) if looked == there else why
    return HandOverReport(end, end * namespace.identity.block_bytes, there, coming, writing.takes, dry_run, looked, why)
