"""What the metrics are made of: plain values that the owner thread copies once a second, in some 0.1 ms.

It walks pools, tenants, sessions and drives; never blocks, namespaces, tickets or leases.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvproto.policy_frames import Tier as Place
from kvstore import blocks
from kvstore.cost import Bandwidth
from kvstore.insight.misses import Misses, Reason
from kvstore.pins import Tally as PinTally
from kvstore.prefetching import Tally as PrefetchTally
from kvstore.report import Counters, DeviceReport, DiskReport, RemoteReport, TierReport
from kvstore.restart import Kept
from kvstore.rules import Tier
from kvstore.sessions import Pool, Tenant
from kvstore.store import Store
from kvstored.block_log import EventTally


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One tenant. What is by tier has "dram" and "disk"."""

    name: str
    sessions: int = 0
    in_flight: int = 0
    refused: int = 0
    assigned_bytes: tuple[int, int] = (0, 0)
    used_bytes: tuple[int, int] = (0, 0)
    pinned_bytes: int = 0
    hit_bytes: tuple[int, int] = (0, 0)
    saved_s: tuple[float, float] = (0.0, 0.0)
    unpriced_blocks: int = 0
    byte_s: tuple[float | None, float | None] = (None, None)  # what loading a byte takes; None: nobody has measured it
    hbm_used_bytes: int = 0
    hbm_pinned_bytes: int = 0
    hbm_hit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything, as it was between two events of the owner's loop."""

    at_unix_s: float
    draining: bool
    warnings: int
    counters: Counters
    tiers: tuple[TierReport, ...]
    disk: DiskReport | None
    tenants: tuple[TenantFigures, ...]
    misses: dict[Reason, int]
    evicted: int  # gave up their place in DRAM
    forgotten: int  # evicted from wherever they were last
    pins: int
    pin_tally: PinTally
    prefetch_tally: PrefetchTally
    leases: int
    waiting_leases: int
    tickets: int
    arenas_free: int
    segments_free: int
    write_behind_lag_bytes: int
    unverified: int
    verify_faults: int
    changed: int  # blocks in memory that were not as published when they were hashed again
    scrubbed_bytes: int  # of memory
    stranded_bytes: int  # of slots that are out of use, since clients may still write there
    kept: Kept
    remote: RemoteReport | None = None
    devices: tuple[DeviceReport, ...] = ()
    events: EventTally | None = None  # None: nobody is told where blocks lie


def take_snapshot(
    store: Store, misses: Misses, configured: Iterable[str], tiers: tuple[TierReport, ...], disk: DiskReport | None,
    warnings: int,
) -> Snapshot:  # fmt: skip
    """Owner thread. `configured`: tenants that are listed before they come."""
    misses.second_passed()
    sessions = list(store.sessions.values())
    demotion = store.disk.demotion
    return Snapshot(
        at_unix_s=time.time(),
        draining=store.draining,
        warnings=warnings,
        counters=store.tally.report(store.arenas.recycled),
        tiers=tiers,
        disk=disk,
        tenants=_tenants(store, configured),
        misses=dict(misses.blocks),
        evicted=store.tally.evicted + store.streams.evicted,
        forgotten=int(store.tables.book[blocks.TURN]),
        pins=len(store.pinning.pins),
        pin_tally=replace(store.pinning.tally),
        prefetch_tally=replace(store.prefetching.tally),
        leases=len(store.leases),
        waiting_leases=sum(len(session.parked) for session in sessions),
        tickets=sum(len(session.tickets) for session in sessions),
        arenas_free=len(store.arenas.free),
        segments_free=len(store.disk.segments.free) if store.limits.disk.disk_bytes else 0,
        write_behind_lag_bytes=demotion.behind_bytes,
        unverified=store.unverified,
        verify_faults=store.streams.verify_faults,
        changed=store.scrubbing.damaged,
        scrubbed_bytes=store.scrubbing.checked_bytes,
        stranded_bytes=store.writers.stranded_bytes(),
        kept=store.kept,
    )


def _tenants(store: Store, configured: Iterable[str]) -> tuple[TenantFigures, ...]:
    used = {
        Tier.DRAM: _used(store, store.arenas.pools),
        Tier.DISK: _used(store, list(store.disk.segments.pools.values())),
    }
    way = store.costing.way
    figures = [
        TenantFigures(
            one.name,
            one.sessions,
            one.in_flight,
            one.refused,
            (one.arenas * store.limits.arena_bytes, one.segments * store.disk.segments.segment_bytes),
            (used[Tier.DRAM][one], used[Tier.DISK][one]),
            store.pinning.used_bytes(one),
            (one.saved.dram_bytes, one.saved.disk_bytes),
            (one.saved.dram_seconds, one.saved.disk_seconds),
            one.saved.unpriced_blocks,
            (_byte_s(way(one, Place.DRAM)), _byte_s(way(one, Place.DISK))),
            store.hbm.used_bytes(one),
            store.hbm.pinned_bytes(one),
            store.hbm.hit_bytes(one),
        )
        for one in store.tenants.values()
    ]
    there = store.tenants.keys()
    return (*figures, *(TenantFigures(name) for name in configured if name not in there))


def _used(store: Store, pools: Sequence[Pool]) -> Counter[Tenant]:
    """Bytes of slots that hold blocks. Looks at rows of these pools only: most of the table was never touched."""
    used: Counter[Tenant] = Counter()
    held = store.tables.pools["blocks"][[pool.number for pool in pools]].tolist()
    for pool, count in zip(pools, held, strict=True):
        used[pool.tenant] += count * pool.slot_bytes
    return used


def _byte_s(way: Bandwidth) -> float | None:
    return way.byte_seconds if way.reports else None
