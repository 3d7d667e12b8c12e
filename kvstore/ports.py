"""What the store needs from the world. The daemon gives it the real thing, the simulation a fake.

`tests/contract` holds one suite for each port that both pass.
"""

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.blocks import U4
    from kvstore.sessions import Lease, Parked, Process, Session, Stream
    from kvstore.tier.orders import Order

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Clock(Protocol):
    """Nanoseconds that never go back; one clock for all processes of the host."""

    def now_ns(self) -> int:
        """CLOCK_MONOTONIC."""

    def wall_s(self) -> int:
        """Seconds since 1970: for what must mean something to the next life."""


class Randomness(Protocol):
    """Secrets: seeds of indexes, first numbers of tickets and leases."""

    def word(self) -> int:
        """64 random bits."""


class Memory(Protocol):
    """Arenas and tables. The store counts arenas; it never touches their bytes."""

    def table(self, name: str, table_bytes: int, *, lasting: bool = True) -> Bytes:
        """Zeroed memory that costs nothing until it is written. A `lasting` one is there for a successor, too."""

    def new_arena(self, arena: int, arena_bytes: int) -> bool:
        """Make an arena; False if the system refuses."""

    def punch_arena(self, arena: int) -> None:
        """Begin to give an arena's pages back; `Store.arena_punched` ends it."""

    def held_bytes(self, arena: int) -> int:
        """What a punched arena still holds because a late reader brought pages back."""

    def close_arena(self, arena: int) -> None:
        """Forget a punched arena: nobody maps it any more."""


class FormerMemory(Protocol):
    """What a predecessor left, if anything."""

    def kept_table(self, name: str) -> Bytes | None:
        """A table as it was left."""

    def kept_arenas(self) -> frozenset[int]:
        """Arenas that have not been taken."""

    def take_arena(self, arena: int) -> None:
        """This one serves again."""

    def drop_kept(self) -> None:
        """Give up whatever has not been taken."""


class Processes(Protocol):
    """Processes of this host that a former life's clients ran in."""

    def watch(self, process: "Process", gone: "Callable[[], None]") -> bool:
        """Is it there? If so `gone` is called once, on the owner thread, when it has exited with all its memory."""


class Workers(Protocol):
    """Threads that read, write, hash and pack. `Store.finished` gets every batch back."""

    def submit(self, batch: "Sequence[Order]") -> None:
        """Have orders of one kind carried out. Returns at once."""

    def idle_share(self) -> float:
        """How much of the host's processor time was left over lately, 0 to 1."""

    def drive_of(self, segment: int) -> int:
        """Which drive a segment lies on: those on one hang and fail together. -1 for a segment that nobody knows."""


class Outbox(Protocol):
    """What the store tells clients without being asked."""

    def published(self, session: "Session", outcomes: "Sequence[tuple[int, int]]") -> None:
        """These tickets are visible, or never will be."""

    def leased(self, session: "Session", parked: "Parked", lease: "Lease | None", locations: "U4") -> None:
        """The answer to a LEASE that had to wait. `locations` is (arena, slot) pairs."""

    def ready(self, stream: "Stream", first: int, stop: int, left: int) -> None:
        """Blocks `first..stop` of a stream can be read, and all of its lease for longer; `left` more will come."""

    def durable(self, session: "Session", request: int, counts: "tuple[int, int, int, int]") -> None:
        """The answer to FLUSH: durable, failed, evicted, pending."""

    def arena_gone(self, session: "Session", arena: int) -> None:
        """Unmap this arena and say so."""
