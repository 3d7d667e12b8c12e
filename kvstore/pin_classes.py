"""Classes of pins, by tenant: what each covers, which one has more than it is sure of, and whose pin goes first.

What pins of a class cover counts once in it, however many of them do; what pins of several classes cover counts in
each of these. Owner thread.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.classes import PinClass
from kvstore.pins import Held
from kvstore.sessions import Tenant


class Classes:
    """Those of one store."""

    def __init__(self, rows: int, sure_bytes: Callable[[Tenant, PinClass], int]) -> None:
        """`sure_bytes` of its memory belong to a tenant's class before all others (`Quotas.class_bytes`)."""
        self._sure_bytes = sure_bytes
        self._covers: dict[PinClass, npt.NDArray[np.uint16]] = {
            kind: np.zeros(rows, dtype=np.uint16) for kind in PinClass
        }  # by row
        self._used: Counter[tuple[Tenant, PinClass]] = Counter()  # bytes
        self._pins: dict[tuple[Tenant, PinClass], dict[int, Held]] = {}  # begun or used longest ago first

    def used_bytes(self, tenant: Tenant, kind: PinClass) -> int:
        """What a class covers, in slots."""
        return self._used[tenant, kind]

    def left_bytes(self, tenant: Tenant, kind: PinClass) -> int:
        """How much more it is sure of; below 0: how much more it has than that."""
        return self._sure_bytes(tenant, kind) - self._used[tenant, kind]

    def charge(self, pin: Held, by: int) -> None:
        """A pin covers its blocks from now on (1), or no longer does (-1)."""
        table = self._covers[pin.kind]
        covers = table[pin.paid]
        changed = int((covers == (0 if by > 0 else 1)).sum())
        table[pin.paid] = covers + np.uint16(1) if by > 0 else covers - np.uint16(1)
        whose = pin.tenant, pin.kind
        self._used[whose] += by * changed * pin.namespace.slot_bytes
        if not self._used[whose]:
            del self._used[whose]

    def begin(self, pin: Held) -> None:
        """A pin is new, or its time has begun anew: it goes after all others of its class."""
        mine = self._pins.setdefault((pin.tenant, pin.kind), {})
        mine.pop(pin.number, None)
        mine[pin.number] = pin

    def end(self, pin: Held) -> None:
        """A pin is over, though it may cover blocks for a while yet."""
        mine = self._pins[pin.tenant, pin.kind]
        del mine[pin.number]
        if not mine:
            del self._pins[pin.tenant, pin.kind]

    def first_to_go(self, tenant: Tenant) -> Held | None:
        """The first pin of the class that has most above what it is sure of; None: no class is above that."""
        most, found = 0, None
        for kind in PinClass:
            pins, above = self._pins.get((tenant, kind)), -self.left_bytes(tenant, kind)
            if pins and above > most:
                most, found = above, next(iter(pins.values()))
        return found
