"""Blocks that lie on drives which answer nobody for now: a miss while that lasts. Owner thread.

a drive is suspended -> runs end before what lies there alone; streams that wait for it end
it stays so          -> whoever stores such a block again is let: it is as good as lost, with what continues it
"""

from collections.abc import Collection
from typing import Final

import numpy as np

from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.ports import Workers
from kvstore.tier.segments import Segments

LOST_NS: Final = 60 * 10**9  # a drive that is away for longer is not waited for: below one block a whole tree may hang


class Away:
    """Drives that are suspended."""

    def __init__(self, tables: Tables, segments: Segments, workers: Workers) -> None:
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._since: dict[int, int] = {}  # when each was found so

    @property
    def any(self) -> bool:
        """Is any?"""
        return bool(self._since)

    def has(self, drive: int) -> bool:
        """Is this one?"""
        return drive in self._since

    def are(self, drives: Collection[int], now_ns: int) -> bool:
        """These are suspended, and no others. Whether there are new ones among them."""
        new = any(drive not in self._since for drive in drives)
        self._since = {drive: self._since.get(drive, now_ns) for drive in drives}
        return new

    def reach(self, run: U4, count: int) -> int:
        """How many of the first `count` rows of a run can be had now: all before the first that lies there alone."""
        return count if not self._since else self._before(run[:count], set(self._since))

    def reach_lost(self, run: U4, count: int, now_ns: int) -> int:
        """The same of drives that have been away for long."""
        lost = {drive for drive, since_ns in self._since.items() if now_ns >= since_ns + LOST_NS}
        return count if not lost else self._before(run[:count], lost)

    def _before(self, rows: U4, drives: set[int]) -> int:
        table, shift = self._tables.blocks, int(self._tables.book[blocks.SHIFT])
        alone = np.isin(table["state"][rows], (blocks.DISK, blocks.LOADING))
        positions = table["disk"][rows] >> shift
        there = [
            position
            for position in np.unique(positions[alone]).tolist()
            if self._workers.drive_of(self._segments.number_at(position)) in drives
        ]
        first = np.flatnonzero(alone & np.isin(positions, there))
        return int(first[0]) if first.size else rows.size
