"""Who is connected and what each holds: sessions, namespaces, tickets, leases. Plain records; the rooms move them.

Life of a ticket

    RESERVE --> OPEN ----------COMMIT----------> COPYING --copied--> published, span free
                 |  \\                               |
           lapses|   ABORT, detach                  | detach: discarded when the copy ends
                 v      \\                           v
              LAPSED     `--> block and span free at once
                 |
                 COMMIT (answered STALE), ABORT or detach --> span free

In mode direct there is no ring: the span is the block's own slot, its pages only what the session may have on its way.
Where a span would be free because of a lapse or a detach, the slot stays out of use (`writers.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from kvproto.identity import NamespaceIdentity
from kvproto.ids import NamespaceDigest
from kvproto.limits import PAGE_BYTES
from kvstore.blocks import U1, U4, U8, Index
from kvstore.cost import PrefillProfile
from kvstore.quotas import USUAL, Quota
from kvstore.ring import Ring
from kvstore.savings import Saved


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this host, told from all others since boot."""

    pid: int  # as the daemon sees it
    start: int  # when it started, in clock ticks since boot; or, with bit 63, the inode of its pidfd
    space: int = 0  # in which numbers of processes mean anything: the inode of the daemon's pid namespace


class TicketState(Enum):
    """Where a ticket stands."""

    OPEN = 0
    COPYING = 1
    LAPSED = 2


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant: its index, what it has of DRAM and disk, and what it may have."""

    name: str
    number: int
    index: Index
    arenas: int = 0
    segments: int = 0
    sessions: int = 0
    saved: Saved = field(default_factory=Saved)
    quota: Quota = USUAL  # as of now; `Quotas` sets it
    in_flight: int = 0  # tickets, LEASEs that wait, streams
    refused: int = 0  # since the start: blocks of RESERVE that were not taken, LEASEs that were not let wait

    def crowded(self, more: int = 1) -> int:
        """By how many of `more` requests it would be above what it may have in flight."""
        most = self.quota.in_flight
        return 0 if most is None else min(more, max(0, self.in_flight + more - most))

    def entries(self) -> int:
        """Blocks in the index."""
        return int(self.index.shape[2])


@dataclass(slots=True, eq=False)
class Pool:
    """One slot size of one tenant."""

    number: int
    tenant: Tenant
    slot_bytes: int
    arenas: int = 0


@dataclass(slots=True, eq=False)
class Namespace:
    """A namespace that some session has opened in this life of the daemon."""

    number: int
    tenant: Tenant
    identity: NamespaceIdentity
    digest: NamespaceDigest
    slot_bytes: int
    pool: Pool
    sessions: int = 0
    recompute_ns: int = 0  # what a block costs to compute, as its clients said last; 0: unknown
    profile: PrefillProfile | None = None  # of prefills that its clients reported (costing.py)
    saved: Saved = field(default_factory=Saved)
    disk_number: int = 0  # what stands for it in the index on disk; 0: not named there yet


@dataclass(slots=True, eq=False)
class Ticket:
    """The right to fill one block."""

    number: int
    session: "Session"
    namespace: Namespace
    block: int
    page: int
    lapses_ns: int
    state: TicketState = TicketState.OPEN
    checksum: int | None = None  # of its bytes, where that is known before they are copied

    @property
    def span_pages(self) -> int:
        """Pages of its span."""
        return self.namespace.slot_bytes // PAGE_BYTES


@dataclass(slots=True, eq=False)
class Lease:
    """The right to read some blocks until a deadline of CLOCK_MONOTONIC."""

    number: int
    session: "Session"
    count: int
    ends: U4  # the blocks that hold the others (blocks.py)
    deadline_ns: int
    fresh: int  # blocks in arenas whose descriptors the session still lacks
    stream: "Stream | None" = None  # blocks that are still on their way


@dataclass(slots=True, eq=False)
class Stream:
    """The blocks of a lease that come by READY: rows and (arena, slot) pairs of the whole run, in order."""

    lease: Lease
    request: int
    namespace: Namespace
    keys: U8  # of those that were not there at once
    whole: int  # blocks of the run that was asked for; `rows` may come to be fewer
    rows: U4
    locations: U4
    on_disk: U1  # by block: was it read from disk?
    announced: int  # so many of them the client knows of
    ttl_ns: int
    until_ns: int  # what has not come by then does not come any more
    due_ns: int = 0  # when to look at it again; `Streams` sets it


@dataclass(slots=True, eq=False)
class Stored:
    """Blocks that a session has published in a namespace since its last FLUSH, as rows and generations."""

    rows: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    lost: int = 0  # beyond `STORED_PER_SESSION`: nobody remembers which they were


@dataclass(slots=True, eq=False)
class Parked:
    """A LEASE that waits for blocks this session is still writing."""

    request: int
    namespace: Namespace
    keys: U8
    count: int
    ttl_ns: int
    deadline_ns: int
    block: int  # the row that it waits for


@dataclass(slots=True, eq=False)
class Session:
    """One client, or what is left of it while its leases live on."""

    number: int
    tenant: Tenant
    ring: Ring
    given: U1  # by position: was it given the descriptor of the arena that serves there?
    attached: bool = True
    exited: bool = False
    next_ticket: int = 1
    next_lease: int = 1
    tickets: dict[int, Ticket] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    namespaces: dict[int, Namespace] = field(default_factory=dict)
    parked: list[Parked] = field(default_factory=list)
    outcomes: list[tuple[int, int]] = field(default_factory=list)
    stored: "dict[int, Stored]" = field(default_factory=dict)  # by namespace: what FLUSH is to make durable
    arenas: dict[int, int] = field(default_factory=dict)  # those whose descriptors it was given, with their positions
    copies: int = 0  # running copies out of its ring
    heard: "Callable[[Session, Sequence[tuple[int, int]]], None] | None" = None  # the daemon's own: who hears outcomes
    owner: Process | None = None  # who writes into slots itself (mode direct); None: nobody does
    writable: dict[int, int] = field(default_factory=dict)  # arenas whose writable descriptors it was given, as above


Missed = Callable[[Namespace, U8, int, int, int], None]  # of `count` keys from `at` on, the first so many are here


def nobody_hears(*_: object) -> None:
    """Where nobody wants to be told."""


IN_PLACE: Final = -1  # in `Copy.source_offset`: the client has written the slot itself


@dataclass(frozen=True, slots=True)
class Copy:
    """One block to be copied from a ring to its slot by a leaf thread, or only hashed where it is in place."""

    ticket: Ticket
    source_offset: int
    arena: int
    target_offset: int
    block_bytes: int
