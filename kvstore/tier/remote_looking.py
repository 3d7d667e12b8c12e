"""Looking again at what this host takes for being over there, before anybody relies on it alone. Owner thread.

    asked (HandOver) -> Look -> a thread reads all of it back, asked anew (remote_looking.py of the daemon) -> looked
                                `-- what is not there whole counts as not written, and is written for who asks again

What is known otherwise is what this life has written or read: a rule of the bucket, another host or a fault may have
taken it since.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.blocks import U4, U8, Tables
from kvstore.ports import Clock
from kvstore.sessions import Namespace
from kvstore.tier.remote_orders import Look, RemoteWorkers, Seek
from kvstore.tier.remote_there import There
from kvstore.tier.remote_writing import place_of, split

LOOKS: Final = 4  # at a time


class Looking:
    """Looks that run, and what was found."""

    def __init__(
        self, tables: Tables, clock: Clock, there: There, before: Callable[[Namespace, int], tuple[bytes, ...]]
    ) -> None:
        """`before`: keys of all that a row continues, from the root on; empty: of nothing, or of too much."""
        self._table = tables.blocks
        self._clock = clock
        self._there = there
        self._before = before
        self._looks: set[Look] = set()
        self._seen_ns: U8 = np.zeros(tables.blocks.size, dtype=np.uint64)  # when the look began that found it whole
        self._generation: U8 = np.zeros(tables.blocks.size, dtype=np.uint64)
        self._failed: tuple[int, str] = 0, ""  # the row at which a look ended last, and why

    def look(self, workers: RemoteWorkers, namespace: Namespace, rows: U4, within_ns: int) -> tuple[int, str]:
        """How many of these, which are taken for being there, were found whole by looks that began within that time.

        Those behind are looked at from now on. Also what is wrong with the first of them, if anything is known.
        """
        now_ns = self._clock.now_ns()
        seen = self._seen(rows, max(1, now_ns - within_ns))
        whole = int(np.argmin(seen)) if not seen.all() else rows.size
        if whole == rows.size:
            return whole, ""
        row = int(rows[whole])
        if len(self._looks) < LOOKS and not any(row in look.rows for look in self._looks):
            look = self._made(namespace, rows, whole, now_ns)
            if workers.look(look):
                self._looks.add(look)
        return whole, self._failed[1] if self._failed[0] == row else ""

    def _seen(self, rows: U4, since_ns: int) -> npt.NDArray[np.bool_]:
        same: npt.NDArray[np.bool_] = self._generation[rows] == self._table["generation"][rows]
        return same & (self._seen_ns[rows] >= since_ns)

    def _made(self, namespace: Namespace, rows: U4, start: int, now_ns: int) -> Look:
        before = self._before(namespace, int(rows[0]))
        keys = (*before, *split(self._table["key"][rows].tobytes()))
        block_bytes = namespace.identity.block_bytes
        seek = Seek(
            namespace, place_of(namespace), keys, len(before) + start, block_bytes, now_ns, wished=True, before=()
        )
        left = rows[start:]
        return Look(seek, left.tolist(), self._table["generation"][left].tolist())

    def looked(self, look: Look) -> None:
        """A look is over."""
        self._looks.discard(look)
        table = self._table["generation"]
        for row, generation in zip(look.rows[: look.whole], look.generations, strict=False):
            if int(table[row]) == generation:
                self._seen_ns[row], self._generation[row] = look.seek.asked_ns, generation
        if look.whole == len(look.rows):
            return
        row, generation = look.rows[look.whole], look.generations[look.whole]
        self._failed = row, look.why or "it is not there whole"
        if not look.why:
            self._there.failed(row, generation)

    @property
    def running(self) -> int:
        """Looks that are under way."""
        return len(self._looks)
