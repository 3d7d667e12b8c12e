"""Hashing what lies in DRAM again: a client in mode direct can change a block after it was published.

    pass over arenas -> a few published blocks at a time -> leaf threads hash them -> as published: fine
                                                                                  -> else: dropped, a miss; its slot is
                                                                                     out of use (`writers.py`)

In the background only arenas that clients could ever write to are looked at, unless all are to be; when asked, all.
A block is not held while it is hashed: that would disturb who is evicted next. Instead its arena is not given up before
the hash is done (`Arenas.is_read`), and a block that is another one by then is nobody's damage. Owner thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from kvproto.limits import MIB
from kvstore import blocks
from kvstore.arenas import Arenas
from kvstore.blocks import U4, Tables
from kvstore.ports import Clock, Workers
from kvstore.registry import Registry
from kvstore.report import ScrubReport
from kvstore.sweeps import Sweeper
from kvstore.tables import Limits
from kvstore.tier.orders import Outcome, Verify
from kvstore.writers import Writers

BATCH_ROWS: Final = 128  # 0.2 ms of the owner thread
BATCH_BYTES: Final = 4 * MIB  # a third of a millisecond of hashing
REST_NS: Final = 5 * 10**6  # of the owner thread between two batches: small blocks cost it more than they cost memory
PAUSE_NS: Final = 60 * 10**9  # between two passes in the background
I8 = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(slots=True, eq=False)
class Recheck(Verify):
    """Hash a published block again. The order holds nothing: it says which block was meant."""

    slot: int = 0
    generation: int = 0


class Scrubbing:
    """One pass at a time, over all arenas there are when it gets to them."""

    def __init__(
        self, limits: Limits, tables: Tables, clock: Clock, workers: Workers, arenas: Arenas, registry: Registry,
        writers: Writers, sweeper: Sweeper,
    ) -> None:  # fmt: skip
        self._limits = limits
        self._tables = tables
        self._clock = clock
        self._workers = workers
        self._arenas = arenas
        self._registry = registry
        self._writers = writers
        self._sweeper = sweeper
        self._all = False
        self._position = 0
        self._slot = 0
        self._reading: list[Recheck] = []
        self._begun = self._read_for = 0  # passes so far; of which one that batch is
        self._due_ns = 0  # when the next batch may go, or the next pass
        self._report = ScrubReport()
        self.active = False
        self.passes = 0
        self.checked_bytes = 0  # in all passes
        self.damaged = 0
        self.found: Callable[[int], None] = lambda _row: None  # `Watching`, of a row that is damaged
        arenas.is_read = self._is_read

    def begin(self, rate_bytes_per_s: int, *, everything: bool) -> None:
        """Start a pass from the first arena. A rate of 0 is as fast as it goes."""
        self.active, self._all = True, everything
        self._begun += 1
        self._position = self._slot = 0
        self._due_ns = self._clock.now_ns()
        pools = self._tables.pools["blocks"]
        total = sum(int(pools[pool.number]) for pool in self._arenas.pools) if everything else self._writable_blocks()
        self._report = ScrubReport(True, 0, total, 0, 0, rate_bytes_per_s, self._clock.wall_s(), 0.0)

    def _writable_blocks(self) -> int:
        used = self._tables.arenas["used"]
        return sum(int(used[position]) for position in range(self._arenas.positions) if self._looks_at(position))

    def report(self) -> ScrubReport:
        """The pass that runs, or the last one."""
        return self._report

    # -- a pass --------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Go on, as far as the rate allows."""
        if self._reading or now_ns < self._due_ns:
            return
        if not self.active:
            if not self._wanted():
                return
            self.begin(self._limits.scrub_bytes_per_s, everything=self._limits.scrub_all)
        batch = self._next_batch()
        if batch:
            self._reading, self._read_for = batch, self._begun
            self._workers.submit(batch)
        elif self._position >= self._arenas.positions:
            self._end(now_ns)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if only an event can help."""
        return None if self._reading or not (self.active or self._wanted()) else self._due_ns

    def _wanted(self) -> bool:
        """Is there anything for the background to look at?"""
        return bool(self._limits.scrub_bytes_per_s) and (self._limits.scrub_all or self._writers.any_writable)

    def _looks_at(self, position: int) -> bool:
        if not self._tables.arenas["pool"][position]:
            return False
        return self._all or self._writers.was_writable(position)

    def _next_batch(self) -> list[Recheck]:
        """Published blocks from where the pass is, all of one arena; none: ask again, unless it is at its end."""
        tables = self._tables
        while self._position < self._arenas.positions and not self._looks_at(self._position):
            self._position, self._slot = self._position + 1, 0
        if self._position >= self._arenas.positions:
            return []
        position, shift = self._position, int(tables.book[blocks.SHIFT])
        first = (position << shift) + self._slot
        end = (position << shift) + int(tables.arenas["untouched"][position])
        slots = np.arange(first, min(first + BATCH_ROWS, end), dtype=np.int64)
        rows = tables.slots["block"][slots]
        rows[rows == blocks.NOBODY] = 0  # a row that is never resident
        there = tables.blocks["state"][rows] == blocks.RESIDENT  # on its way, or not verified yet: others look at it
        there &= tables.blocks["slot"][rows] == slots
        batch, looked = self._orders(rows[there], slots[there], position << shift)
        self._slot += slots.size if looked is None else looked - first
        if first + slots.size >= end and looked is None:
            self._position, self._slot = position + 1, 0
        return batch

    def _orders(self, rows: U4, slots: I8, base: int) -> tuple[list[Recheck], int | None]:
        """Orders for these rows, as far as a batch goes; the slot at which to go on, None for behind all of them."""
        table = self._tables.blocks
        arena = int(self._tables.arenas["id"][self._position])
        columns = (table[name][rows].tolist() for name in ("namespace", "checksum", "generation"))
        batch: list[Recheck] = []
        batch_bytes = 0
        for row, slot, number, checksum, generation in zip(rows.tolist(), slots.tolist(), *columns, strict=True):
            if batch_bytes >= BATCH_BYTES:
                return batch, slot
            namespace = self._registry.by_number[number]
            block_bytes = namespace.identity.block_bytes
            offset = (slot - base) * namespace.slot_bytes
            batch.append(Recheck(row, checksum, arena, offset, block_bytes, slot=slot, generation=generation))
            batch_bytes += block_bytes
        return batch, None

    def _is_read(self, position: int) -> bool:
        """Is a leaf thread looking there?"""
        return bool(self._reading) and self._reading[0].arena == int(self._tables.arenas["id"][position])

    # -- what was found ------------------------------------------------------------------------------------------

    def finished(self, batch: Sequence[Recheck]) -> None:
        """Blocks were hashed."""
        self._reading = []
        damaged = sum(self._drop(order) for order in batch if order.outcome is not Outcome.DONE)
        checked_bytes = sum(order.block_bytes for order in batch)
        self.checked_bytes += checked_bytes
        self.damaged += damaged
        old = self._report
        if self._read_for != self._begun:
            return  # that pass was begun anew
        self._report = replace(
            old, done_blocks=old.done_blocks + len(batch), done_bytes=old.done_bytes + checked_bytes,
            damaged=old.damaged + damaged, total_blocks=max(old.total_blocks, old.done_blocks + len(batch)),
        )  # fmt: skip
        if old.rate_bytes_per_s:
            pause_ns = max(REST_NS, checked_bytes * 10**9 // old.rate_bytes_per_s)
            self._due_ns = self._clock.now_ns() + pause_ns

    def _drop(self, order: Recheck) -> bool:
        """A block is not what was published: drop it, with what continues it. False if it is another one by now.

        An ancestor in the same batch may have taken it along.
        """
        one = self._tables.blocks[order.row]
        same = int(one["state"]) == blocks.RESIDENT and int(one["generation"]) == order.generation
        if not same or int(one["slot"]) != order.slot:
            return False
        self.found(order.row)
        self._writers.quarantine(order.row)
        self._sweeper.drop(self._registry.by_number[int(one["namespace"])].tenant, order.row)
        return True

    def _end(self, now_ns: int) -> None:
        self.active = False
        self.passes += 1
        self._due_ns = now_ns + PAUSE_NS
        old = self._report
        self._report = replace(old, running=False, total_blocks=old.done_blocks, finished_unix_s=self._clock.wall_s())
