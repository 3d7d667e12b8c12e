"""Pins of a former life, taken up again at a warm start. Owner thread.

Deadlines are of CLOCK_MONOTONIC, which went on while no daemon ran: what is left of a pin is what would be left of it
had nobody restarted. What lies on disk is not known before its index has been read, so such pins follow then, some at
each tick, as clients are served by then; until they do, their records stay where they are.
"""

from collections import deque
from typing import Final

import numpy as np

from kvproto.limits import PIN_TTL_NS_MAX
from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.pin_book import PinBook, Saved
from kvstore.pinning import Pinning
from kvstore.ports import Clock
from kvstore.registry import Registry
from kvstore.restart import Kept
from kvstore.sessions import Namespace, Tenant
from kvstore.tier.disk import Disk

TAKE_UP: Final = 512  # blocks that pins cover at a tick: twice as many took 1.1 ms
A_PIN: Final = 128  # what each pin takes however few it covers, in blocks


class Repinning:
    """Those of one store."""

    def __init__(self, tables: Tables, clock: Clock, registry: Registry, pinning: Pinning, book: PinBook) -> None:
        self._tables = tables
        self._clock = clock
        self._registry = registry
        self._pinning = pinning
        self._book = book
        self._absent: dict[int, Saved] = {}  # by number: their blocks may be on disk, which is still being read
        self._to_take: deque[int] = deque()  # of these, for whom this is the last chance: it was read
        self._kept = Kept()
        pinning.absent = self

    def begin(self, kept: Kept, disk: Disk) -> None:
        """Go on with all that can be found; the rest once the disk serves. `kept` counts what became of them."""
        saved = self._book.read()
        if saved is None:
            kept.faults.append("pins: what was kept of them is not ours, or damaged")
            return
        self._pinning.number_after(max((one.number for one in saved), default=0))
        self._kept = kept
        self._absent = {one.number: one for one in saved if not self._take(one, kept)}
        if not disk.when_serving(self._begin_to_take):
            self._begin_to_take()
            while self.waiting:  # nobody is served yet
                self.tick()

    def unpin(self, tenant: Tenant, number: int) -> bool:
        """A pin whose blocks were not found yet is over, if it is this tenant's."""
        saved = self._absent.get(number)
        namespace = self._registry.by_number.get(saved.namespace) if saved is not None else None
        if saved is None or namespace is None or namespace.tenant is not tenant:
            return False
        del self._absent[number]
        self._book.wipe(saved.place)
        return True

    def _begin_to_take(self) -> None:
        self._to_take.extend(self._absent)

    @property
    def waiting(self) -> bool:
        """Has `tick` anything to do?"""
        return bool(self._to_take)

    def tick(self) -> None:
        """Go on with some of those whose blocks were not there before; what is not there now is lost."""
        left = TAKE_UP
        while self._to_take and left > 0:
            one = self._absent.pop(self._to_take.popleft(), None)
            if one is None:  # unpinned since
                continue
            left -= one.count + A_PIN
            if not self._take(one, self._kept):
                self._book.wipe(one.place)
                self._kept.pins_lost += 1

    def _take(self, saved: Saved, kept: Kept) -> bool:
        """Pin it again. False: its block is not there, or not yet."""
        namespace = self._registry.by_number.get(saved.namespace)
        row = self._row(namespace, saved) if namespace is not None else 0
        if not row or namespace is None:
            return False
        now_ns = self._clock.now_ns()
        deadline_ns = min(saved.deadline_ns, now_ns + PIN_TTL_NS_MAX)
        rows = self._rows(row, saved.count)
        if not rows.size:  # its root is just being stored
            return False
        if deadline_ns <= now_ns:
            self._book.wipe(saved.place)  # it would be over by now
        elif self._pinning.resume(saved, namespace, rows, deadline_ns):
            kept.pins += 1
        else:
            self._book.wipe(saved.place)
            kept.pins_lost += 1
        return True

    def _row(self, namespace: Namespace, saved: Saved) -> int:
        key = np.frombuffer(saved.key, dtype=np.uint64).copy()
        row = int(blocks.find_one(self._tables, namespace.tenant.index, namespace.number, key, 0))
        return 0 if row and int(self._tables.blocks["state"][row]) == blocks.WRITING else row

    def _rows(self, row: int, count: int) -> U4:
        """The block in `row` and those before it, `count` in all, in order; those before one that is stored anew."""
        parents, chain = self._tables.blocks["parent"], [row]
        while len(chain) < count:
            row = int(parents[row])
            if not row:
                break
            chain.append(row)
        rows = np.array(chain[::-1], dtype=np.uint32)
        undone = np.flatnonzero(np.isin(self._tables.blocks["state"][rows], (blocks.FREE, blocks.WRITING)))
        return rows[: undone[0]] if undone.size else rows
