"""What the verbs return: plain values. A refusal is one of these, never an exception."""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """Why a block was not stored. The first six are the daemon's grants by name; the rest the client finds out."""

    PENDING = "pending"  # another writer is storing it right now; final for this store
    NO_PARENT = "no_parent"  # the block before it is not there, so that this one could not be found
    FULL = "full"  # no slot can be freed
    BUSY = "busy"  # no ring space came free within `space_s`
    QUOTA = "quota"  # the tenant's own limit
    DRAINING = "draining"  # the daemon takes no new blocks
    UNREACHABLE = "unreachable"  # no daemon, or it went away meanwhile
    TIMED_OUT = "timed_out"  # no answer in time; the block may or may not turn up later
    STALE = "stale"  # copied too slowly: the ticket had lapsed
    DISCARDED = "discarded"  # its parent failed, or its key was deleted meanwhile
    DEVICE = "device"  # the GPU that it lies on could not be read
    UNFIT = "unfit"  # the namespace's codec cannot take its values (NaN, infinity, too many rare exponents)


@dataclass(frozen=True, slots=True)
class Refused:
    """One block that was not stored: its index in the `keys` of the call, and why."""

    index: int
    reason: Reason


@dataclass(frozen=True, slots=True, repr=False)
class StoreResult:
    """What became of the blocks of one `store`; `accepted + known + len(refused)` is their number."""

    accepted: int  # copied and committed; visible soon, or already if the call waited for it
    known: int  # resident before, nothing copied
    refused: tuple[Refused, ...]  # by index
    settled: bool = True  # False, of a `save`: the daemon may still be reading the pages; see `AttachedMemory.settle`

    @property
    def lead(self) -> int:
        """Length in blocks of the part from the first block on that is stored without a gap."""
        return self.refused[0].index if self.refused else self.accepted + self.known

    def __repr__(self) -> str:
        # Counted, not listed: a thousand refusals in a log line help nobody.
        counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items()) or "none"
        unsettled = "" if self.settled else ", settled=False"
        return f"StoreResult(accepted={self.accepted}, known={self.known}, refused={counted}{unsettled})"

    @property
    def reasons(self) -> Counter[Reason]:
        """How many blocks were refused for each reason."""
        return Counter(refused.reason for refused in self.refused)


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What became of a `load`: the first `blocks` pages hold what was stored; what is in the others is nobody's.

    `settled`: False where the daemon may still be writing to the pages. They are not to be used before
    `AttachedMemory.settle` has said True. `reason`: why nothing could be loaded at all; None otherwise.
    """

    blocks: int
    settled: bool = True
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class FlushResult:
    """Blocks of this namespace object since its last `flush`.

    What became of them on disk counts by session and namespace: objects of one client that name the same namespace
    share it, and who flushes first is told.
    """

    visible: int
    durable: int  # acknowledged on disk; 0 where the daemon has no disk tier
    failed: int  # not stored after all, or not written to disk
    pending: int  # still on their way when the time was over; the next flush counts them again
    evicted: int = 0  # visible, but gone from DRAM before they were written to disk


@dataclass(frozen=True, slots=True)
class Tiers:
    """A number of blocks by the tier that they lie in."""

    hbm: int = 0
    dram: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a chain is there, without taking hold of it."""

    blocks: int  # length of the lead run
    tiers: Tiers
    pending: int  # blocks right after the lead run that are on their way
    load_seconds: float | None  # None: nobody has the figures for an estimate yet
    recompute_seconds: float | None

    @property
    def load_s(self) -> float | None:
        """What loading the lead run would take, in seconds; None while nobody knows. The short name of the field."""
        return self.load_seconds

    @property
    def recompute_s(self) -> float | None:
        """What computing the lead run anew would take, in seconds; None while nobody knows."""
        return self.recompute_seconds

    @property
    def worth_loading(self) -> bool:
        """False if loading is known to be slower than computing anew; True while either is unknown."""
        load_s, recompute_s = self.load_seconds, self.recompute_seconds
        return load_s is None or recompute_s is None or load_s <= recompute_s


class Partial(StrEnum):
    """Why a pin covers less than it was asked for; empty, and so false, where it covers all.

    The first four are the daemon's (`kvproto.policy_frames.Partial`) by name; the rest the client finds out.
    """

    NOTHING = ""
    ABSENT = "absent"  # the chain ends there, or what follows is still being written
    BUDGET = "budget"  # the tenant's pins have no room for more
    TOO_MANY = "too_many"  # the tenant has as many pins as it may
    REFUSED = "refused"  # the daemon does not take pins like this
    UNREACHABLE = "unreachable"  # no daemon, or it went away meanwhile
    TIMED_OUT = "timed_out"  # no answer in time, or what was stored just before was not visible in time


class Deleted(int):
    """How many blocks a `delete` made the daemon forget, with all that continued them."""

    unanswered: int  # keys that no answer came for in time: what they name may hit again until it is deleted again

    def __new__(cls, blocks: int, unanswered: int = 0) -> Self:
        deleted = super().__new__(cls, blocks)
        deleted.unanswered = unanswered
        return deleted

    def __repr__(self) -> str:
        return f"Deleted({int(self)}, unanswered={self.unanswered})"


@dataclass(frozen=True, slots=True)
class PinResult:
    """What a `pin` covers: the first `blocks` of the chain."""

    bytes_pinned: int  # of these blocks; what other pins cover too is counted here, and charged to the tenant once
    expires: float | None  # in seconds of time.monotonic(); None: nothing is pinned
    blocks: int
    partial: Partial  # why not all
    pins: tuple[int, ...]  # numbers, for `unpin`: one for each 1,024 keys


@dataclass(frozen=True, slots=True)
class PinInfo:
    """One pin of this tenant in a namespace, whoever made it."""

    pin: int
    blocks: int
    bytes_pinned: int
    expires: float  # in seconds of time.monotonic(); a use may move it


class Choice(StrEnum):
    """What to do with the context of a request that waits for a tool."""

    PRESERVE = "preserve"
    SWAP = "swap"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True)
class Advice:
    """The choice that wastes least, and what each wastes: accelerator memory that does nothing, in byte-seconds."""

    choice: Choice
    waste_preserve: float | None  # None: nobody has measured what it depends on
    waste_swap: float | None
    waste_discard: float | None
    swap_budget_bytes: int  # what moves unnoticed during the next iteration, for all requests together


@dataclass(frozen=True, slots=True)
class Status:
    """Where a client stands. `why_not` is a sentence for a person, empty while all is well."""

    connected: bool
    why_not: str
    runtime_dir: str
    tenant: str = ""
    session: int = 0
    daemon_pid: int = 0  # where a unit owns the socket perhaps that of who served it before, or made it
    mode: str = ""  # transfer mode, and in `notes` why the daemon chose none that was rather wished
    notes: str = ""
    mode_wished: str = ""  # what `connect` was told
    ring_bytes: int = 0  # of a store, so much may be on its way at a time
    lease_ttl_s_max: float = 0.0
    hints_dropped: int = 0  # never sent, for want of a session or of room in the socket; since this client was made
    hints_refused: int = 0  # sent, and not taken; `Client.refusals` has the last of them

    @property
    def fell_back(self) -> bool:
        """Is there a session, and not in the mode that was wished? `notes` then says why."""
        return bool(self.mode) and self.mode_wished not in ("", "auto", self.mode)
