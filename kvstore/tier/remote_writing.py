"""Writing behind to the far side: which runs, cut into objects how, and what is held meanwhile. Owner thread.

    leased (second touch)        \\
    handed over, at once         -+
    published (admission "all") -> queue, a run each -> [runs that continue one another joined] -> what is not over
                                   there yet -> Keep, up to 64 blocks -> copied out of DRAM -> written -> noted by row

A run that is partly not in DRAM waits a little, then it is let go: it comes again with its next use. What is slower to
read back than to compute is not written. Blocks that are packed on disk are packed over there, too, where an object
holds several.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from kvproto.limits import KEY_BYTES, MIB
from kvstore import blocks
from kvstore.blocks import DESCRIBED, U4, U8, Rows, Tables
from kvstore.cost import Bandwidth
from kvstore.costing import Costing
from kvstore.ports import Clock
from kvstore.sessions import Namespace, Tenant
from kvstore.tier.format import Codec
from kvstore.tier.remote_format import HEADER_BYTES, OBJECT_BLOCKS, Place, tenant_digest
from kvstore.tier.remote_orders import Keep, RemoteWorkers
from kvstore.tier.remote_there import There

QUEUE: Final = 2048  # runs that wait, 12 KB each at most
WISHES: Final = 256  # beyond these, runs that somebody asked for
WISHES_EACH: Final = 64  # of one tenant
OBJECT_BYTES: Final = 32 * MIB  # a block that is larger is an object of its own
HELD_BYTES: Final = 64 * MIB  # of DRAM, until they are copied out of it
KEEPS: Final = 4  # on their way at a time: each is copied to memory of its own
SETTLE_NS: Final = 50 * 10**6  # what is stored block by block becomes one run meanwhile
LATER_NS: Final = 200 * 10**6  # what is still on its way into DRAM is looked at again
TRIES: Final = 5
GIVEN_UP: Final = 1 << 16  # rows that are remembered as given up for good
RUNS_A_TICK: Final = 4  # 0.1 ms each
TURN_BITS: Final = 38  # a turn ends after so many bits of nanoseconds, 4.6 minutes, though nothing has come or gone


class RemoteAdmission(StrEnum):
    """Which blocks are written."""

    ALL = "all"
    SECOND_TOUCH = "second_touch"
    NONE = "none"


@dataclass(slots=True)
class Tally:
    """Totals, in blocks unless the name says otherwise."""

    kept: int = 0
    kept_bytes: int = 0
    not_worth: int = 0  # slower to read than to compute
    dropped: int = 0  # runs for which the queue was full, or blocks that the far side did not take
    gone: int = 0  # runs of which something had left DRAM when their turn came


@dataclass(slots=True, eq=False)
class _Run:
    """Blocks of one namespace that continue one another."""

    rows: U4
    generations: U8
    due_ns: int
    tries: int = 0
    wished: Tenant | None = None  # who asked for it: then nobody asks whether it is worth it


class Writing:
    """The queue, and the writes that run."""

    def __init__(
        self, tables: Tables, clock: Clock, by_number: dict[int, Namespace], costing: Costing, way: Bandwidth
    ) -> None:
        """`way`: what reading back takes."""
        self.tally = Tally()
        self.admission = RemoteAdmission.SECOND_TOUCH
        self.workers: RemoteWorkers | None = None
        self.codec_for: Callable[[Namespace], Codec] = lambda _: Codec.RAW  # as on disk
        self.learn: Callable[[Namespace, int, int], None] = lambda *_: None  # what packing a block has gained
        self.moment: Callable[[], int] = lambda: 0  # of what is known to lie beyond this host
        self._tables = tables
        self._clock = clock
        self._by_number = by_number
        self._costing = costing
        self._way = way
        self.there = There(tables)
        self._queue: deque[_Run] = deque()
        self._queued: dict[int, int] = {}  # last row of a run that waits -> its generation
        self._keeps: set[Keep] = set()
        self._held_bytes = 0
        self._generations: U8 = tables.blocks["generation"]
        self._parents: U4 = tables.blocks["parent"]
        self._turn: U8 = np.zeros(tables.blocks.size, dtype=np.uint64)  # by last row of a run: when that was told
        self._given_up: OrderedDict[int, tuple[int, str]] = OrderedDict()  # by row: generation, and why
        self._described: Rows = np.zeros(OBJECT_BLOCKS, dtype=DESCRIBED)

    # -- what is to be written -----------------------------------------------------------------------------------

    def leased(self, run: U4, count: int) -> None:
        """The first `count` rows of `run` were leased."""
        if self.admission is RemoteAdmission.NONE or not count:
            return
        last = run.item(count - 1)
        generation = self._generations.item(last)
        if self.there.was(last, generation):
            assert self.workers is not None, "there is a far side"
            now_ns = self._clock.now_ns()
            uses = self.workers.uses
            turn = uses.turn + self.there.moment // uses.step + (now_ns >> TURN_BITS)  # each of them grows
            if self._turn.item(last) != turn:
                self._turn[last] = turn
                self._used(run[:count], now_ns)
        elif self._queued.get(last) != generation:
            self._admit(run[:count].copy(), self._clock.now_ns())

    def _used(self, rows: U4, now_ns: int) -> None:
        """A run that has come there was leased, for the first time in this turn: whoever makes room is told."""
        assert self.workers is not None, "there is a far side"
        places, removed = self.there.places(rows)
        self.workers.uses.use(places)
        before = self._before(rows.item(0))
        if before:
            self.workers.uses.use(self.there.places(np.array(before, dtype=np.uint32))[0])
        last = rows.item(-1)
        if removed and self._queued.get(last) != self._generations.item(last):
            self._admit(rows.copy(), now_ns)

    def _before(self, row: int) -> list[int]:
        """What may be in one object with this one, and before it."""
        before: list[int] = []
        while (row := self._parents.item(row)) and len(before) < OBJECT_BLOCKS - 1:
            before.append(row)
        return before

    def published(self, row: int) -> None:
        """A client has stored a block."""
        if self.admission is RemoteAdmission.ALL:
            self._admit(np.array([row], dtype=np.uint32), self._clock.now_ns() + SETTLE_NS)

    def _admit(self, rows: U4, due_ns: int) -> None:
        assert self.workers is not None, "there is a far side"
        if len(self._queue) >= QUEUE or not self.workers.writing():
            self.tally.dropped += 1
            return
        run = _Run(rows, self._tables.blocks["generation"][rows], due_ns)
        self._queued[int(rows[-1])] = int(run.generations[-1])
        self._queue.append(run)

    def hand_over(self, tenant: Tenant, run: U4, count: int) -> tuple[int, bool]:
        """Have the first `count` rows of `run`, a chain, written next. Returns how many of them are over there, and
        whether more will be. Who asks again has those written that were not in DRAM before.
        """
        rows, table = run[:count].copy(), self._tables.blocks
        generations = table["generation"][rows]
        stored, there = self.there.are(rows), self.over_there(rows)
        if there == count or not self.takes:
            return there, False
        end = min(_lead(stored | (table["state"][rows] == blocks.RESIDENT)), self._first_given_up(rows))
        if end <= there and self.given_up(rows[there:]):
            return there, False
        if stored[there:end].all():
            return there, True
        return there, self._wish(tenant, rows[there:end], generations[there:end])

    def given_up(self, rows: U4) -> str:
        """Why the first of these will never be written; empty: it may be."""
        generation, why = self._given_up.get(int(rows[0]), (0, "")) if rows.size else (0, "")
        return why if why and generation == int(self._tables.blocks["generation"][rows[0]]) else ""

    def _first_given_up(self, rows: U4) -> int:
        known = self._given_up
        given_up = (at for at, row in enumerate(rows.tolist()) if row in known and self.given_up(rows[at : at + 1]))
        return next(given_up, rows.size) if known else rows.size

    def over_there(self, rows: U4) -> int:
        """How many of the first rows of a chain are written for sure, as far as this life of the daemon knows."""
        under_way = [row for keep in self._keeps for row in keep.rows]
        return _lead(self.there.are(rows) & ~np.isin(rows, under_way))

    @property
    def takes(self) -> bool:
        """May anything be written, and is there any use in trying?"""
        return self.workers is not None and self.admission is not RemoteAdmission.NONE and self.workers.writing()

    def _wish(self, tenant: Tenant, rows: U4, generations: U8) -> bool:
        """Before all that nobody asked for. False: too much waits."""
        last, generation = int(rows[-1]), int(generations[-1])
        wished = [one for one in self._queue if one.wished is not None]
        if any(int(one.rows[-1]) == last and int(one.generations[-1]) == generation for one in wished):
            return True
        if len(wished) >= WISHES or sum(one.wished is tenant for one in wished) >= WISHES_EACH:
            return False
        place = next((at for at, one in enumerate(self._queue) if one.wished is None), len(self._queue))
        self._queue.insert(place, _Run(rows, generations, self._clock.now_ns(), wished=tenant))
        self._queued[last] = generation
        return True

    # -- its turn ------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Begin writes for which there is room."""
        for _ in range(RUNS_A_TICK):
            if not self._queue or now_ns < self._queue[0].due_ns or not self._room():
                return
            run = self._joined(self._queue.popleft())
            left = self._left(run)
            if left is None:
                if run.tries < TRIES:
                    run.tries, run.due_ns = run.tries + 1, now_ns + LATER_NS
                    self._queue.append(run)
                    continue
                self.tally.gone += 1
            elif left.size and not self._send(left, wished=run.wished is not None):
                self._queue.appendleft(run)
                return
            self._unqueue(run)

    def _joined(self, run: _Run) -> _Run:
        """With those behind it in the queue that continue it."""
        parents = self._tables.blocks["parent"]
        parts = [run]
        count = run.rows.size
        while self._queue and count < OBJECT_BLOCKS:
            following = self._queue[0]
            if int(parents[following.rows[0]]) != int(parts[-1].rows[-1]):
                break
            self._unqueue(parts[-1])
            parts.append(self._queue.popleft())
            count += following.rows.size
        if len(parts) == 1:
            return run
        return _Run(
            np.concatenate([part.rows for part in parts]), np.concatenate([part.generations for part in parts]),
            run.due_ns, run.tries, next((part.wished for part in parts if part.wished), None),
        )  # fmt: skip

    def _left(self, run: _Run) -> U4 | None:
        """What of a run is not over there yet; None: some of that is not in DRAM, or it does not hang together.

        What is there no more is written again for who asks for that, and for who uses it where nothing that is in use
        has to leave for it: or each use of what is above the quota would be a write.
        """
        table = self._tables.blocks
        rows = run.rows
        same = table["generation"][rows] == run.generations
        if not same[-1]:
            return rows[:0]  # evicted or dropped: its next use brings it again
        if self.workers is not None:
            self.workers.uses.use(self.there.places(rows)[0])
        if run.wished is None and (again := self._again(run, same)) is not None:
            return again
        wanted = np.flatnonzero(~(self.there.were(rows) if run.wished is None else self.there.are(rows)))
        if not wanted.size:
            return rows[:0]
        first = int(wanted[0])
        left = rows[first:]
        if not same[first:].all() or (table["state"][left] != blocks.RESIDENT).any():
            return None
        before = int(table["parent"][left[0]])
        if before and not self.there.was(before, int(table["generation"][before])) and run.tries < TRIES:
            return None  # what it continues may be on its way there; later it is written all the same
        return left

    def _again(self, run: _Run, same: npt.NDArray[np.bool_]) -> U4 | None:
        """What of a run has gone, from where an object of it began up to what is there; None: it does not come back."""
        removed = np.flatnonzero(self.there.removed(run.rows))
        if not removed.size or self.workers is None:
            return None
        first = int(removed[0])
        gone = run.rows[first:]
        gone = gone[: max(1, _lead(self.there.were(gone) & ~self.there.are(gone)))]
        if not same[first : first + gone.size].all() or (self._tables.blocks["state"][gone] != blocks.RESIDENT).any():
            return None
        block_bytes = self._by_number[int(self._tables.blocks["namespace"][gone[0]])].identity.block_bytes
        return gone if self.workers.room_again(HEADER_BYTES + min(gone.size, OBJECT_BLOCKS) * block_bytes) else None

    def _unqueue(self, run: _Run) -> None:
        last = int(run.rows[-1])
        if self._queued.get(last) == int(run.generations[-1]):
            del self._queued[last]

    def _room(self) -> bool:
        return len(self._keeps) < KEEPS and self._held_bytes < HELD_BYTES

    def _send(self, rows: U4, *, wished: bool) -> bool:
        """Send a run on its way, object by object; False if there was no room for all of it."""
        workers = self.workers
        assert workers is not None, "there is a far side"
        namespace = self._by_number[int(self._tables.blocks["namespace"][rows[0]])]
        most = max(1, min(OBJECT_BLOCKS, OBJECT_BYTES // namespace.identity.block_bytes))
        for at in range(0, rows.size, most):
            if not self._room():
                return False
            some = rows[at : at + most]
            if not (wished or self._worth(namespace, some)):
                self.tally.not_worth += rows.size - at
                break
            keep = self._keep(namespace, some)
            keep.again = not wished and bool(self.there.were(some[:1])[0])
            if not workers.submit(keep):
                self.tally.dropped += rows.size - at
                break
            blocks.hold_rows(self._tables, some, 0, some.size)
            self.there.came(some, keep.place, self.there.moment)  # as good as; taken back if it fails
            self._keeps.add(keep)
            self._held_bytes += some.size * namespace.slot_bytes
        return True

    def _worth(self, namespace: Namespace, rows: U4) -> bool:
        """Are these blocks faster to read back than to compute, as far as anybody knows?"""
        computing_s = self._costing.block_seconds(namespace, rows)
        reading_s = self._way.load_seconds(rows.size * namespace.identity.block_bytes)
        return computing_s is None or reading_s is None or reading_s < computing_s * rows.size

    def _keep(self, namespace: Namespace, rows: U4) -> Keep:
        described = self._described[: rows.size]
        blocks.describe(self._tables, rows, 0, rows.size, described)
        shift = int(self._tables.book[blocks.SHIFT])
        ids, mask = self._tables.arenas["id"], (1 << shift) - 1
        slots = described["slot"].tolist()
        return Keep(
            namespace, place_of(namespace), described["parent_key"][0].tobytes(), split(described["key"].tobytes()),
            rows.tolist(), described["generation"].tolist(), described["checksum"].tolist(),
            [(int(ids[slot >> shift]), (slot & mask) * namespace.slot_bytes) for slot in slots],
            namespace.identity.block_bytes, codec=self.codec_for(namespace), moment=self.moment(),
        )  # fmt: skip

    # -- writes end ----------------------------------------------------------------------------------------------

    def copied(self, keep: Keep) -> None:
        """Its blocks were copied out of DRAM, or will not be: they may go."""
        rows = np.array(keep.rows, dtype=np.uint32)
        blocks.unhold_rows(self._tables, rows, 0, rows.size)
        self._held_bytes -= rows.size * keep.namespace.slot_bytes
        keep.copied = True

    def kept(self, keep: Keep) -> None:
        """A write has ended."""
        if not keep.copied:
            self.copied(keep)
        self._keeps.discard(keep)
        for stored_bytes in keep.packed:
            self.learn(keep.namespace, keep.block_bytes, stored_bytes)
        self.tally.kept += keep.stored
        self.tally.kept_bytes += keep.stored * keep.block_bytes
        self.tally.dropped += len(keep.rows) - keep.stored
        left = list(zip(keep.rows, keep.generations, strict=True))[keep.stored :]
        for row, generation in left:
            (self.there.left_out if keep.again else self.there.failed)(row, generation)
        for row, generation in left[max(0, keep.never - keep.stored) :] if keep.never is not None else ():
            self._given_up[row] = generation, keep.failed
            if len(self._given_up) > GIVEN_UP:
                self._given_up.popitem(last=False)

    def held_rows(self) -> list[int]:
        """Rows that a write holds, once for each."""
        return [row for keep in self._keeps if not keep.copied for row in keep.rows]

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if only an event can help."""
        return self._queue[0].due_ns if self._queue and self._room() else None

    @property
    def waiting(self) -> int:
        """Runs in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Writes that are under way."""
        return len(self._keeps)


def _lead(good: npt.NDArray[np.bool_]) -> int:
    """How many of the first are."""
    bad = np.flatnonzero(~good)
    return int(bad[0]) if bad.size else good.size


def place_of(namespace: Namespace) -> Place:
    """Where its objects lie."""
    return Place(tenant_digest(namespace.tenant.name), bytes(namespace.digest))


def split(raw: bytes) -> tuple[bytes, ...]:
    """Keys that lie one behind the other."""
    return tuple(raw[i : i + KEY_BYTES] for i in range(0, len(raw), KEY_BYTES))
