"""What a pin is, and what became of all of them. `pinning.py` owns them."""

from dataclasses import dataclass

from kvproto.policy_frames import Tier
from kvstore.blocks import U4
from kvstore.classes import PinClass
from kvstore.sessions import Namespace, Tenant


@dataclass(slots=True, eq=False)
class Held:
    """One pin."""

    number: int
    tenant: Tenant
    namespace: Namespace
    rows: U4  # of all blocks that it covers, in order
    paid: U4  # the same, each once
    ends: U4  # those that it holds: the deepest one, and the deepest one in DRAM
    deadline_ns: int
    ttl_ns: int
    refresh: bool
    owner: str
    kind: PinClass
    place: int  # in the book
    wanted: Tier  # where what lies on disk is wanted; DISK: there
    fetch: int = 0  # the prefetch of what it covers


@dataclass(slots=True)
class Tally:
    """Totals."""

    pinned: int = 0
    ended: int = 0  # by UNPIN or by who owns them
    expired: int = 0
    refreshed: int = 0
    dropped: int = 0  # since their blocks were
    over_budget: int = 0  # asked for, and cut short or refused for the budget
    gave_way: int = 0  # ended for a class that is sure of what they had, or for a budget that became smaller
