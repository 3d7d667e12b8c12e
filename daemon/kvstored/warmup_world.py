"""What a store that only warms up lives in: memory without bytes, threads that do nothing and say that it is done."""

from collections.abc import Sequence

import numpy as np

from kvstore.blocks import U4
from kvstore.ports import Bytes
from kvstore.sessions import Lease, Parked, Session, Stream
from kvstore.tier.format import CHUNK_SLOTS, RECORD
from kvstore.tier.orders import Commit, Found, Load, MakeSegment, Name, Order, Outcome


class Memory:
    """`kvstore.ports.Memory` and `FormerMemory`."""

    def __init__(self, former: "Memory | None" = None) -> None:
        self._kept_tables = dict(former.lasting) if former else {}
        self._kept = set(former.arenas) if former else set()
        self.lasting: dict[str, Bytes] = {}
        self.arenas: set[int] = set()

    def table(self, name: str, table_bytes: int, *, lasting: bool = True) -> Bytes:
        """See the port."""
        table = self._kept_tables.pop(name, None) if lasting else None
        table = np.zeros(table_bytes, dtype=np.uint8) if table is None else table
        if lasting:
            self.lasting[name] = table
        return table

    def new_arena(self, arena: int, _arena_bytes: int) -> bool:
        """See the port."""
        self.arenas.add(arena)
        return True

    def punch_arena(self, arena: int) -> None:
        """See the port."""
        self.arenas.discard(arena)

    def held_bytes(self, _arena: int) -> int:
        """See the port."""
        return 0

    def close_arena(self, arena: int) -> None:
        """See the port."""

    def kept_table(self, name: str) -> Bytes | None:
        """See the port."""
        return self._kept_tables.get(name)

    def kept_arenas(self) -> frozenset[int]:
        """See the port."""
        return frozenset(self._kept)

    def take_arena(self, arena: int) -> None:
        """See the port."""
        self._kept.discard(arena)
        self.arenas.add(arena)

    def drop_kept(self) -> None:
        """See the port."""
        self._kept.clear()
        self._kept_tables.clear()


class Workers:
    """`kvstore.ports.Workers`."""

    def __init__(self) -> None:
        self.waiting: list[Sequence[Order]] = []
        self.chunks: dict[tuple[int, int], bytes] = {}
        self.slot_bytes: dict[int, MakeSegment] = {}
        self.names: list[Name] = []
        self.damages: set[bytes] = set()  # keys of blocks that cannot be read

    def submit(self, batch: Sequence[Order]) -> None:
        """See the port."""
        self.waiting.append(batch)

    def idle_share(self) -> float:
        """See the port."""
        return 0.0

    def drive_of(self, segment: int) -> int:  # noqa: ARG002  a port's
        """See the port."""
        return 0

    def carry_out(self) -> Sequence[Order]:
        """The oldest batch."""
        batch = self.waiting.pop(0)
        for order in batch:
            damaged = isinstance(order, Load) and order.key in self.damages
            order.outcome = Outcome.DAMAGED if damaged else Outcome.DONE
            if isinstance(order, MakeSegment):
                self.slot_bytes[order.segment] = order
            elif isinstance(order, Commit):
                self.chunks.update({(segment, chunk): records for segment, chunk, records in order.chunks})
                self.names += order.names
        return batch

    def found(self, segment_bytes: int) -> list[Found]:
        """What the index says at the next start."""
        found = []
        for segment, made in self.slot_bytes.items():
            slots = (segment_bytes - 4096) // made.slot_bytes
            records = np.zeros(CHUNK_SLOTS, dtype=RECORD)
            if (segment, 0) in self.chunks:
                records[:] = np.frombuffer(self.chunks[segment, 0], dtype=RECORD)
            found.append(Found(segment, made.slot_bytes, slots, made.tenant, records[:slots]))
        return found


class Outbox:
    """`kvstore.ports.Outbox` that nobody listens to."""

    def published(self, session: Session, outcomes: object) -> None:
        """See the port."""

    def leased(self, session: Session, parked: Parked, lease: Lease | None, locations: U4) -> None:
        """See the port."""

    def ready(self, stream: Stream, first: int, stop: int, left: int) -> None:
        """See the port."""

    def durable(self, session: Session, request: int, counts: tuple[int, int, int, int]) -> None:
        """See the port."""

    def arena_gone(self, session: Session, arena: int) -> None:
        """See the port."""


class Clock:
    """`kvstore.ports.Clock` that is moved by hand."""

    def __init__(self) -> None:
        self.ns = 10**12

    def advance(self, ns: int) -> None:
        """Let time pass."""
        self.ns += ns

    def now_ns(self) -> int:
        """See the port."""
        return self.ns

    def wall_s(self) -> int:
        """See the port."""
        return self.ns // 10**9


class Randomness:
    """`kvstore.ports.Randomness` without any."""

    def word(self) -> int:
        """See the port."""
        return 7
