"""What mode daemon knows of sessions: memory they have attached, transfers under way. Records, and their rules."""

from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from kvkernels.device.sharing import OpenedPages
from kvproto.device_frames import NO_END, Load
from kvproto.errors import UsageError
from kvstore.moving import Held, Saving
from kvstore.sessions import Lease, Namespace, Parked, Session
from kvstore.tier.hbm import Copy
from kvstored.connection import Connection
from kvstored.device_work import DeviceThreads, Emptying, Filling, Opening


@dataclass(slots=True, eq=False)
class Memory:
    """An engine's pages in our threads. `opening` is the thread's, until the owner has heard of it; then `opened`."""

    number: int
    threads: DeviceThreads
    handles: int
    whole_bytes: int
    opening: Opening
    opened: OpenedPages | None = None
    users: int = 0  # transfers
    closing: bool = False  # no new ones
    detaching: int | None = None  # the request that waits for the end
    filling: set[int] = field(default_factory=set)  # pages that are written to
    emptying: Counter[int] = field(default_factory=Counter)  # pages that are read


@dataclass(slots=True, eq=False)
class Transfer:
    """A LOAD or a SAVE under way."""

    number: int
    of: "Mover"
    memory: Memory
    namespace: Namespace
    pages: Sequence[int]
    groups: int = 0  # of a LOAD
    saving: Saving | None = None  # of a SAVE
    waits_for: Lease | Parked | None = None
    held: Held | None = None
    copies: Sequence[Copy | None] = ()  # of a LOAD: those that it reads from the device's own tier
    work: Filling | Emptying | None = None
    told: int = 0  # groups
    until_ns: int = NO_END  # of a SAVE: what is read later may be anything
    unwanted: bool = False
    cancels: list[int] = field(default_factory=list)  # requests that wait for its end


@dataclass(slots=True, eq=False)
class Mover:
    """What one session has here."""

    connection: Connection
    session: Session
    process: int  # of `kvstored.processes.identity_of`
    memories: dict[int, Memory] = field(default_factory=dict)
    transfers: dict[int, Transfer] = field(default_factory=dict)
    next_memory: int = 1
    next_transfer: int = 1
    gone: bool = False

    @property
    def busy(self) -> bool:
        """May anything of it still be written to?"""
        return bool(self.transfers)


def check_targets(memory: Memory, load: Load) -> None:
    """May a LOAD write to these pages? Raises UsageError."""
    pieces = len(memory.opening.shared.pieces)
    if load.groups > pieces:
        raise UsageError(f"{load.groups} groups of {pieces} pieces")
    if len({*load.pages}) < len(load.pages):
        raise UsageError("a page is named twice")
    check_free(memory.filling, load.pages)
    check_free(memory.emptying.keys(), load.pages)


def check_free(used: AbstractSet[int], pages: Sequence[int]) -> None:
    """Is none of these pages in use? Raises UsageError."""
    taken = next((page for page in pages if page in used), None)
    if taken is not None:
        raise UsageError(f"page {taken} belongs to another transfer that is under way")
