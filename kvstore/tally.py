"""Totals since the start, counted where things happen."""

from dataclasses import dataclass

import numpy as np

from kvproto.errors import Grant
from kvstore.blocks import U4
from kvstore.report import Counters


@dataclass(slots=True)
class Tally:
    """Mutable twin of `report.Counters`. Owner thread."""

    leases: int = 0
    lease_hits: int = 0
    lease_misses: int = 0
    lease_disk_hits: int = 0
    matches: int = 0
    match_hits: int = 0
    match_misses: int = 0
    granted: int = 0
    known: int = 0
    pending: int = 0
    refused_full: int = 0
    refused_busy: int = 0
    refused_quota: int = 0
    refused_no_parent: int = 0
    refused_draining: int = 0
    published: int = 0
    published_bytes: int = 0
    stale: int = 0
    discarded: int = 0
    evicted: int = 0
    deleted: int = 0
    leases_expired: int = 0
    sessions_opened: int = 0
    sessions_failed: int = 0
    faults: int = 0
    evicted_by_operators: int = 0
    disk_evicted_by_operators: int = 0

    def count_grants(self, grants: U4) -> int:
        """Add the answers of one RESERVE. Returns for how many blocks there was no room: full, busy or quota."""
        by_grant = np.bincount(grants, minlength=len(Grant)).tolist()
        self.granted += by_grant[Grant.GRANTED]
        self.known += by_grant[Grant.KNOWN]
        self.pending += by_grant[Grant.PENDING]
        self.refused_no_parent += by_grant[Grant.NO_PARENT]
        self.refused_full += by_grant[Grant.FULL]
        self.refused_busy += by_grant[Grant.BUSY]
        self.refused_quota += by_grant[Grant.QUOTA]
        self.refused_draining += by_grant[Grant.DRAINING]
        refused: int = by_grant[Grant.FULL] + by_grant[Grant.BUSY] + by_grant[Grant.QUOTA]
        return refused

    def report(self, arenas_recycled: int) -> Counters:
        """A frozen copy."""
        return Counters(
            **{name: getattr(self, name) for name in Counters.__slots__ if name != "arenas_recycled"},
            arenas_recycled=arenas_recycled,
        )
