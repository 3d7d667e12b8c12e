"""Reading everything on disk again, before anybody needs it: slowly and for ever, or at once when asked to.

A block that is not what was written is dropped if it lies on disk alone; one that is in DRAM too loses its copy and is
written anew. Either way its place is never used again. Owner thread.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvstore import blocks
from kvstore.blocks import DESCRIBED, Rows, Tables
from kvstore.ports import Workers
from kvstore.report import ScrubReport
from kvstore.sessions import Namespace
from kvstore.tier.orders import Load, Outcome
from kvstore.tier.segments import Segments

RUNNING = 4  # reads at a time
LOOK_SLOTS = 4096  # looked at a tick for blocks
PAUSE_NS = 3600 * 10**9  # between two passes in the background, and before the first
NOWHERE = (1 << 32) - 1  # in `Load.arena`: read and verify, and keep nothing

Damaged = Callable[[int, int, Load], None]


class Scrub:
    """One pass at a time, over all segments there are when it gets to them."""

    def __init__(
        self, tables: Tables, segments: Segments, workers: Workers, namespaces: dict[int, Namespace],
        wall_s: Callable[[], int], damaged: Damaged, background_bytes_per_s: int, settle: Callable[[Load], None],
    ) -> None:  # fmt: skip
        """`damaged(row, place, order)` is told of blocks that are still what they were when they were read. `settle`
        looks at each order first (`Loading.settle`).
        """
        self._settle = settle
        self._tables = tables
        self._segments = segments
        self._workers = workers
        self._namespaces = namespaces
        self._wall_s = wall_s
        self._tell = damaged
        self._background = background_bytes_per_s
        self._position = 0
        self._slot = 0
        self._running: dict[int, Load] = {}
        self._rate = 0
        self._budget = 0.0
        self._budget_ns = 0
        self._report = ScrubReport()
        self._next_pass_ns = 0
        self._described: Rows = np.zeros(1, dtype=DESCRIBED)
        self.active = False

    def begin(self, rate_bytes_per_s: int) -> None:
        """Start a pass from the first segment. 0: as fast as it goes."""
        self.active = True
        self._running = {}
        self._position, self._slot = self._segments.first, 0
        self._rate, self._budget, self._budget_ns = rate_bytes_per_s, 0.0, 0
        total = int(self._tables.book[blocks.DISK_USED])
        self._report = ScrubReport(True, 0, total, 0, 0, rate_bytes_per_s, self._wall_s(), 0.0)

    def report(self) -> ScrubReport:
        """The pass that runs, or the last one."""
        return self._report

    def tick(self, now_ns: int) -> None:
        """Go on, as far as rate and reads allow."""
        if not self.active:
            self._next_pass_ns = self._next_pass_ns or now_ns + PAUSE_NS
            if self._background and now_ns >= self._next_pass_ns:
                self.begin(self._background)
            return
        looked = 0
        while len(self._running) < RUNNING and looked < LOOK_SLOTS and self._afford(now_ns):
            order, steps = self._next()
            looked += steps
            if order is None:
                if self._at_end and not self._running:
                    self._end(now_ns)
                return
            self._running[id(order)] = order
            self._budget -= order.slot_bytes
            self._workers.submit([order])

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once; None if only an event can help."""
        if not self.active:
            return self._next_pass_ns if self._background else None
        if len(self._running) >= RUNNING or self._at_end:
            return None if self._running else 0
        if self._rate and self._budget <= 0:
            return self._budget_ns + int(-self._budget / self._rate * 1e9) + 10**6
        return 0

    @property
    def _at_end(self) -> bool:
        return self._position >= self._segments.first + self._segments.positions

    def _afford(self, now_ns: int) -> bool:
        if not self._rate:
            return True
        passed_s = (now_ns - self._budget_ns) / 1e9 if self._budget_ns else 0.0
        self._budget_ns = now_ns
        self._budget = min(self._rate / 4, self._budget + passed_s * self._rate)
        return self._budget > 0 or not self._report.done_blocks

    def _next(self) -> tuple[Load | None, int]:
        """The next block that lies on disk for certain, and how far it was to there."""
        tables, end = self._tables, self._segments.first + self._segments.positions
        steps = 0
        while self._position < end and steps < LOOK_SLOTS:
            slot, row = -1, 0
            if tables.arenas["pool"][self._position]:
                slot, row = blocks.next_on_segment(tables, self._position, self._slot)
            if slot < 0:
                self._position, self._slot = self._position + 1, 0
                steps += 1
                continue
            steps += slot - self._slot + 1
            self._slot = slot + 1
            one = tables.blocks[row]
            if not one["flags"] & blocks.SAVING and one["state"] != blocks.DOOMED and one["disk"]:
                return self._order(int(row), slot), steps
        return None, steps

    def _order(self, row: int, slot: int) -> Load:
        tables = self._tables
        blocks.describe(tables, np.array([row], dtype=np.uint32), 0, 1, self._described)
        one = self._described[0]
        pool = tables.pools[int(tables.arenas["pool"][self._position]) - 1]
        return Load(
            row, self._namespaces[int(one["namespace"])], one["key"].tobytes(), int(one["generation"]),
            int(one["checksum"]), self._segments.number_at(self._position), slot, int(pool["slot_bytes"]), NOWHERE, 0,
        )  # fmt: skip

    def finished(self, batch: Sequence[Load]) -> None:
        """A read has ended."""
        (order,) = batch
        if self._running.pop(id(order), None) is None:
            return  # of a pass that was begun anew
        self._settle(order)
        table = self._tables.blocks
        position = self._segments.position_of.get(order.segment)
        damaged = 0
        if position is not None and order.outcome is Outcome.DAMAGED:
            place = (position << int(self._tables.book[blocks.SHIFT])) + order.slot
            same = int(table["generation"][order.row]) == order.generation and int(table["disk"][order.row]) == place
            if same and not table["flags"][order.row] & blocks.SAVING:
                damaged = 1
                self._tell(order.row, place, order)
        old = self._report
        self._report = ScrubReport(
            old.running, old.done_blocks + 1, max(old.total_blocks, old.done_blocks + 1),
            old.done_bytes + order.slot_bytes, old.damaged + damaged, old.rate_bytes_per_s, old.started_unix_s, 0.0,
        )  # fmt: skip

    def _end(self, now_ns: int) -> None:
        self.active = False
        self._next_pass_ns = now_ns + PAUSE_NS
        old = self._report
        self._report = ScrubReport(
            False, old.done_blocks, old.done_blocks, old.done_bytes, old.damaged, old.rate_bytes_per_s,
            old.started_unix_s, self._wall_s(),
        )  # fmt: skip
