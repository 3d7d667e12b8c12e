"""What routers ask, without a trace: how much of a prefix is here, and how busy the store is. Owner thread.

As MATCH finds it; but no counter, no curve, nobody's turn to be evicted and no fetch from elsewhere moves by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvproto.frames import UNKNOWN_NS
from kvproto.limits import KEYS_PER_FRAME
from kvproto.policy_frames import Tier as Way
from kvstore import blocks, survey
from kvstore.blocks import U4, U8
from kvstore.costing import BELIEVED
from kvstore.report import RemoteReport
from kvstore.sessions import Namespace
from kvstore.store import Store


@dataclass(frozen=True, slots=True)
class MatchSummary:
    """How much of a chain all of some namespaces have. Seconds are None where nobody has reported enough."""

    tenant: str
    blocks: int  # of the lead run
    hbm_blocks: int  # of them, those that have a copy in memory of a GPU in all namespaces
    dram_blocks: int  # of the others, those that lie in DRAM in all namespaces
    disk_blocks: int  # on disk alone, in one namespace at least
    pending_blocks: int
    hbm_bytes: int  # of payload, in all namespaces together
    dram_bytes: int
    disk_bytes: int
    load_s: float | None
    recompute_s: float | None
    block_tokens: int


@dataclass(frozen=True, slots=True)
class TierLoad:
    """How full one tier is, and how fast its blocks are read lately; None: not measured."""

    name: str
    capacity_bytes: int
    used_bytes: int
    blocks: int
    read_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How busy a store is."""

    draining: bool
    clients: int
    tickets: int
    leases: int
    waiting_leases: int
    queued_chains: int
    running_bytes: int
    tiers: tuple[TierLoad, ...]
    remote: RemoteReport | None = None  # None: no remote tier


def summarise(store: Store, namespaces: Sequence[Namespace], keys: U8) -> MatchSummary:
    """The lead run of a chain (4 words a key, at most `KEYS_PER_FRAME` keys) that all of these have.

    A MATCH of each namespace's; ranks load side by side and compute side by side, so the slowest says how long.
    """
    count = there = coming = keys.size // 4
    assert 0 < count <= KEYS_PER_FRAME, "a chain of another length"
    runs: list[tuple[Namespace, U4]] = []
    for namespace in namespaces:
        run: U4 = np.zeros(count, dtype=np.uint32)
        found, stop = _found(store, namespace, keys, run)
        pending = 0
        if stop:
            index = namespace.tenant.index
            pending = int(blocks.pending_run(store.tables, index, namespace.number, keys, 0, count, found))
        runs.append((namespace, run))
        there, coming = min(there, found), min(coming, found + pending)
    return _summed(store, runs, there, coming - there)


def _found(store: Store, namespace: Namespace, keys: U8, run: U4) -> tuple[int, int]:
    """Rows of the lead run, and the row where it stops though more is there; 0: nothing is."""
    count, index, tables = keys.size // 4, namespace.tenant.index, store.tables
    found, stop = blocks.match_run(tables.blocks, *index, namespace.number, keys, 0, count, run)
    if stop and tables.blocks["state"][stop] != blocks.WRITING:
        found, _, stop = blocks.extend_run(tables, index, namespace.number, keys, 0, count, found, run)
        reach = store.disk.away.reach(run, int(found))
        if reach < found:
            return reach, 0
    return int(found), int(stop)


def _summed(store: Store, runs: Sequence[tuple[Namespace, U4]], there: int, pending: int) -> MatchSummary:
    states, costing = store.tables.blocks["state"], store.costing
    away, above = np.zeros(there, dtype=np.bool_), np.ones(there, dtype=np.bool_)
    hbm_bytes = dram_bytes = disk_bytes = 0
    load_ns = recompute_ns = 0 if there and costing.heard else UNKNOWN_NS
    for namespace, run in runs:
        lies = np.isin(states[run[:there]], (blocks.DISK, blocks.LOADING))
        near = store.hbm.above(run[:there])
        on_disk, block_bytes = int(np.count_nonzero(lies)), namespace.identity.block_bytes
        away, above = away | lies, above & near
        hbm_bytes += int(np.count_nonzero(near)) * block_bytes
        disk_bytes += int(np.count_nonzero(lies & ~near)) * block_bytes
        dram_bytes += int(np.count_nonzero(~lies & ~near)) * block_bytes
        if there and costing.heard:
            load, recompute = costing.estimate(namespace, run, there, on_disk)
            load_ns, recompute_ns = max(load_ns, load), max(recompute_ns, recompute)
    near_blocks, far_blocks = int(np.count_nonzero(above)), int(np.count_nonzero(away & ~above))
    first = runs[0][0]
    return MatchSummary(
        first.tenant.name, there, near_blocks, there - near_blocks - far_blocks, far_blocks, pending, hbm_bytes,
        dram_bytes, disk_bytes, _seconds(load_ns), _seconds(recompute_ns), first.identity.block_tokens,
    )  # fmt: skip


def _seconds(ns: int) -> float | None:
    return None if ns == UNKNOWN_NS else ns / 1e9


def load_of(store: Store) -> LoadReport:
    """As it is now; walks no blocks."""
    sessions = [session for session in store.sessions.values() if session.attached]
    disk = store.disk
    dram = TierLoad(
        "dram", store.arenas.positions * store.limits.arena_bytes, survey.used_bytes(store), survey.dram_blocks(store),
        _read_speed(store, Way.DRAM),
    )  # fmt: skip
    tiers = [dram]
    if store.limits.disk.disk_bytes:
        report = survey.disk_tier(store)
        tiers.append(
            TierLoad("disk", report.capacity_bytes, report.used_bytes, report.blocks, _read_speed(store, Way.DISK))
        )
    tiers[:0] = [
        TierLoad("hbm", hbm.hbm_bytes, hbm.used_bytes(), hbm.blocks, _read_speed(store, Way.HBM))
        for hbm in store.hbm.tiers
    ]
    return LoadReport(
        draining=store.draining,
        clients=sum(session.heard is None for session in sessions),
        tickets=sum(len(session.tickets) for session in sessions),
        leases=len(store.leases),
        waiting_leases=sum(len(session.parked) for session in sessions),
        queued_chains=disk.demotion.waiting,
        running_bytes=disk.demotion.running_bytes,
        tiers=tuple(tiers),
    )


def _read_speed(store: Store, tier: Way) -> float | None:
    """Bytes a second of the largest loads, all in: of the daemon's own reads, else what tenants have reported.

    Of several tenants the one in the middle, the slower of two: none can make this host look faster than it is for all.
    """
    costing = store.costing
    if tier is Way.DISK and costing.disk.reports:
        return costing.disk.speed()
    ways = (costing.way(tenant, tier) for tenant in store.tenants.values())
    speeds = sorted(speed for way in ways if way.reports >= BELIEVED and (speed := way.speed()) is not None)
    return speeds[(len(speeds) - 1) // 2] if speeds else None
