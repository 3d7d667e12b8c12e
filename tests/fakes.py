"""Fakes of the store's ports: a clock that stands still, memory that forgets on request, an outbox that remembers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvproto.limits import PAGE_BYTES
from kvstore.blocks import U4
from kvstore.ports import Bytes
from kvstore.sessions import Lease, Parked, Process, Session, Stream


class FakeClock:
    """`kvstore.ports.Clock` that moves when told to."""

    def __init__(self, now_ns: int = 10**12) -> None:
        self.ns = now_ns

    def now_ns(self) -> int:
        """See the port."""
        return self.ns

    def wall_s(self) -> int:
        """See the port."""
        return 1_700_000_000 + self.ns // 10**9

    def advance(self, ns: int) -> None:
        """Let time pass; never back."""
        assert ns >= 0
        self.ns += ns


class FakeProcesses:
    """`kvstore.ports.Processes`: whoever is in `living` lives until `end`."""

    def __init__(self) -> None:
        self.living: set[Process] = set()
        self._watched: dict[Process, list[Callable[[], None]]] = {}

    def watch(self, process: Process, gone: Callable[[], None]) -> bool:
        """See the port."""
        if process in self.living:
            self._watched.setdefault(process, []).append(gone)
        return process in self.living

    def end(self, process: Process) -> None:
        """It is gone."""
        self.living.discard(process)
        for gone in self._watched.pop(process, ()):
            gone()


class FakeRandomness:
    """`kvstore.ports.Randomness` from a seed."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)

    def word(self) -> int:
        """See the port."""
        return self._random.getrandbits(64)


class FakeMemory:
    """`kvstore.ports.Memory` in plain arrays. `map` is what a client sees, `finish_punch` what a memory thread does."""

    def __init__(self, refuses: Callable[[], bool] = lambda: False) -> None:
        """`refuses` decides whether the system refuses the next arena."""
        self._refuses = refuses
        self.tables: dict[str, Bytes] = {}
        self.arenas: dict[int, Bytes] = {}
        self.punching: list[int] = []
        self.punched: set[int] = set()
        self.touched_late: dict[int, set[int]] = {}  # pages that a late reader brought back
        self.written_late: set[int] = set()  # arenas that a client wrote to after they were punched
        self.closed: list[int] = []
        self.lasting: set[str] = set()
        self.kept_tables: dict[str, Bytes] = {}
        self.kept: dict[int, Bytes] = {}
        self.about_to_take: Callable[[], None] = lambda: None  # an arena of the former life; a successor may die here

    def table(self, name: str, table_bytes: int, *, lasting: bool = True) -> Bytes:
        """See the port."""
        assert name not in self.tables, f"table {name} is made twice"
        kept = self.kept_tables.pop(name, None) if lasting else None
        self.tables[name] = kept if kept is not None else np.zeros(table_bytes, dtype=np.uint8)
        assert self.tables[name].size == table_bytes, f"table {name} was kept with another size"
        if lasting:
            self.lasting.add(name)
        return self.tables[name]

    # -- kvstore.ports.FormerMemory ------------------------------------------------------------------------------

    def successor(self) -> "FakeMemory":
        """What the keeper gives the next life: also what this one had not taken yet."""
        later = FakeMemory(self._refuses)
        later.kept_tables = self.kept_tables | {name: self.tables[name] for name in self.lasting}
        gone = self.punched | set(self.punching)
        later.kept = {arena: content for arena, content in (self.kept | self.arenas).items() if arena not in gone}
        return later

    def kept_table(self, name: str) -> Bytes | None:
        """See the port."""
        return self.kept_tables.get(name)

    def kept_arenas(self) -> frozenset[int]:
        """See the port."""
        return frozenset(self.kept)

    def take_arena(self, arena: int) -> None:
        """See the port."""
        self.about_to_take()
        self.arenas[arena] = self.kept.pop(arena)

    def drop_kept(self) -> None:
        """See the port."""
        self.closed += self.kept
        self.kept.clear()
        self.kept_tables.clear()

    def new_arena(self, arena: int, arena_bytes: int) -> bool:
        """See the port."""
        assert arena not in self.arenas, f"arena {arena} is made twice"
        assert arena not in self.closed, f"arena id {arena} is used again"
        if self._refuses():
            return False
        self.arenas[arena] = np.zeros(arena_bytes, dtype=np.uint8)
        return True

    def punch_arena(self, arena: int) -> None:
        """See the port."""
        assert arena in self.arenas, f"arena {arena} does not exist"
        assert arena not in self.punched, f"arena {arena} is punched twice"
        self.punching.append(arena)

    def held_bytes(self, arena: int) -> int:
        """See the port."""
        assert arena in self.punched, f"arena {arena} was not punched"
        return PAGE_BYTES * len(self.touched_late.get(arena, ()))

    def close_arena(self, arena: int) -> None:
        """See the port."""
        assert arena in self.punched, f"arena {arena} is closed before it was punched"
        del self.arenas[arena]
        self.closed.append(arena)

    # -- what others do with it ----------------------------------------------------------------------------------

    def view(self, arena: int) -> Bytes:
        """The daemon's writable map."""
        given_up = arena in self.punched or arena in self.punching
        assert not given_up, f"the daemon looks into arena {arena}, which it has given up"
        return self.arenas[arena]

    def map(self, arena: int) -> Bytes:
        """A client's read-only map; it outlives the arena."""
        mapped = self.arenas[arena].view()
        mapped.flags.writeable = False
        return mapped

    def map_writable(self, arena: int) -> Bytes:
        """The map of a client in mode direct."""
        return self.arenas[arena]

    def read_late(self, arena: int, offset: int) -> None:
        """A client reads a byte of a punched arena through a map that it kept: the page comes back."""
        self.touched_late.setdefault(arena, set()).add(offset // PAGE_BYTES)

    def finish_punch(self) -> int:
        """The memory thread is done with the oldest punch: the arena, to be told to `Store.arena_punched`."""
        arena = self.punching.pop(0)
        self.arenas[arena][:] = 0
        self.punched.add(arena)
        return arena


@dataclass(frozen=True, slots=True)
class Ready:
    """One READY."""

    lease: Lease
    deadline_ns: int
    left: int
    locations: list[tuple[int, int]]


class FakeOutbox:
    """`kvstore.ports.Outbox` that keeps what was said."""

    def __init__(self) -> None:
        self.outcomes: dict[int, dict[int, int]] = {}  # session -> ticket -> Outcome
        self.answers: list[tuple[Session, Parked, Lease | None, list[tuple[int, int]]]] = []
        self.gone: list[tuple[Session, int]] = []
        self.readies: list[Ready] = []
        self.flushed: list[tuple[Session, int, tuple[int, int, int, int]]] = []

    def published(self, session: Session, outcomes: Sequence[tuple[int, int]]) -> None:
        """See the port."""
        assert session.attached, "told a closed session"
        mine = self.outcomes.setdefault(session.number, {})
        for ticket, outcome in outcomes:
            assert ticket not in mine, f"ticket {ticket} has two outcomes"
            mine[ticket] = outcome

    def leased(self, session: Session, parked: Parked, lease: Lease | None, locations: U4) -> None:
        """See the port."""
        assert session.attached, "answered a closed session"
        count = lease.count if lease else 0
        pairs = locations[: 2 * count].reshape(-1, 2).tolist()
        self.answers.append((session, parked, lease, [(arena, slot) for arena, slot in pairs]))

    def ready(self, stream: Stream, first: int, stop: int, left: int) -> None:
        """See the port."""
        if stream.lease.session.attached:
            pairs = stream.locations[2 * first : 2 * stop].reshape(-1, 2).tolist()
            deadline_ns = stream.lease.deadline_ns
            self.readies.append(Ready(stream.lease, deadline_ns, left, [(arena, slot) for arena, slot in pairs]))

    def durable(self, session: Session, request: int, counts: tuple[int, int, int, int]) -> None:
        """See the port."""
        assert session.attached, "answered a closed session"
        self.flushed.append((session, request, counts))

    def arena_gone(self, session: Session, arena: int) -> None:
        """See the port."""
        self.gone.append((session, arena))
