"""Classes of what a tenant keeps: how long each lasts, and what each is sure of. Pure, and without numba.

    5m        pins for up to five minutes
    1h        pins for longer
    tool      pins that the daemon makes of what programs say (`guiding.py`)
    standard  all that is not pinned

What a pin asks for says which class it is of, so nobody has to name one. A class of pins may have a longest time, and
a share of its tenant's memory that it is sure of, all within the tenant's pin share; beyond that it has whatever the
others leave. Where the pin share is used up, a class below its share takes from the one furthest above its own.
Standard is sure of what the pin share leaves, since pins are never more; its time is how long a block may lie unused.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from kvproto.limits import PIN_TTL_NS_MAX
from kvproto.retention import Retention

PIN_TTL_S_MIN: Final = 1.0
PIN_TTL_S_MAX: Final = PIN_TTL_NS_MAX / 1e9
UNUSED_TTL_S_MIN: Final = 60.0  # longer than most leases
UNUSED_TTL_S_MAX: Final = 10 * 365.25 * 86400
PROGRAM: Final = "program:"  # what owners of pins begin with that are made of what programs say
_SHORT_NS: Final = int(Retention.FIVE_MINUTES.seconds * 1e9)


class PinClass(StrEnum):
    """Those that have pins."""

    SHORT = "5m"
    LONG = "1h"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for one class of pins."""

    ttl_s: float | None = None  # None: as long as they ask for
    share: float | None = None  # of the tenant's memory; None: none that it could be sure of

    def lasts_ns(self, ttl_ns: int) -> int:
        """How long a pin lasts that asks for so long."""
        return ttl_ns if self.ttl_s is None else min(ttl_ns, int(self.ttl_s * 1e9))


def class_of(ttl_ns: int, owner: str) -> PinClass:
    """The class of a pin that asks for so long; `owner` as `pinning.Held` has it."""
    if owner.startswith(PROGRAM):
        return PinClass.TOOL
    return PinClass.SHORT if ttl_ns <= _SHORT_NS else PinClass.LONG
