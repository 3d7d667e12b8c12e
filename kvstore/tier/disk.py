"""The disk tier of one store: what is on its way up, down, out and in. Owner thread; all I/O is `Workers`'.

up    LEASE finds blocks on disk -> loading.py -> Load batches -> verified -> resident   (streams.py tells clients)
down  published, leased again, FLUSH (flushing.py) -> demotion.py -> commits.py -> durable
out   dropped blocks -> erasure.py; room for others -> segments.py
in    at start -> recovery.py
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvproto.identity import NamespaceIdentity
from kvproto.limits import DISK_ROWS_BYTES
from kvstore import blocks
from kvstore.blocks import U4, Tables
from kvstore.costing import Costing
from kvstore.policies import Policies
from kvstore.ports import Outbox, Workers
from kvstore.quotas import Shares
from kvstore.sessions import Namespace, Pool, Tenant, Ticket
from kvstore.tier.away import Away
from kvstore.tier.closed import Closed
from kvstore.tier.codec import Choice, Wish
from kvstore.tier.commits import Commits
from kvstore.tier.demotion import Admission, Demotion
from kvstore.tier.erasure import Erasure
from kvstore.tier.flushing import Flushing
from kvstore.tier.format import Codec
from kvstore.tier.loading import Loading
from kvstore.tier.orders import (
    WHOLE,
    Commit,
    DropSegment,
    Erase,
    Found,
    Load,
    MakeSegment,
    Name,
    Order,
    Outcome,
    Owe,
    Pack,
    Save,
)  # fmt: skip
from kvstore.tier.recovery import Recovered, Recovery
from kvstore.tier.scrub import Scrub
from kvstore.tier.segments import Segments

DRAIN_STEPS = 512
RECOVERY_SLICES = 1


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """Sizes and choices of one disk tier. `disk_bytes` 0: there is none."""

    disk_bytes: int = 0
    segment_bytes: int = 0
    admission: Admission = Admission.SECOND_TOUCH
    write_bytes_per_s: int = 0  # 0: as fast as it goes
    codec: Wish = Wish.AUTO
    scrub_bytes_per_s: int = 0  # in the background; 0: only when asked for
    row_bytes: int = DISK_ROWS_BYTES  # of disk, for each row of the block table

    @property
    def segments(self) -> int:
        """How many segments there may be."""
        return self.disk_bytes // self.segment_bytes if self.disk_bytes else 0

    @property
    def rows(self) -> int:
        """How many blocks can lie there."""
        return self.disk_bytes // self.row_bytes


NO_DISK = DiskLimits()


class DiskState(StrEnum):
    """Where the tier stands."""

    OPENING = "opening"  # the index is being read: disk answers miss
    ADOPTING = "adopting"
    SERVING = "serving"
    OFF = "off"  # it cannot be used in this life


@dataclass(frozen=True, slots=True)
class _AfterSaves:
    """Somebody who waits until what was dropped is erased, and before that for writes of it that run."""

    saves: set[int]  # by the identity of their first order
    answer: Callable[[], None]
    tenant: Tenant | None


Dropper = Callable[[Tenant, int], None]


class Disk:
    """All of it. The store owns one, even if it may have no segments."""

    def __init__(
        self, limits: DiskLimits, tables: Tables, workers: Workers, outbox: Outbox, pools: dict[int, Pool],
        tenants: dict[str, Tenant], namespaces: dict[int, Namespace], drop: Dropper, sweep: Dropper,
        wall_s: Callable[[], int], policies: Policies, first: int, dram_bytes: int, costing: Costing, shares: Shares,
    ) -> None:  # fmt: skip
        """`first`: the position after those of DRAM. `shares`: of disk."""
        self.limits = limits
        self.state = DiskState.OPENING
        self.recovered = Recovered()
        self._tables = tables
        self._workers = workers
        self._tenants = tenants
        self._namespaces = namespaces
        self._drop = drop
        self._sweep = sweep
        self._first_generation = int(tables.book[blocks.GENERATION])  # of this life
        self._wall_s = wall_s
        self.choice = Choice(limits.codec)
        self.segments = Segments(
            tables, workers, pools, policies, first, limits.segments, limits.segment_bytes, shares
        )  # fmt: skip
        self.erasure = Erasure(tables, self.segments, workers, self._given_up)
        self.demotion = Demotion(
            tables, self.segments, workers, tenants, namespaces,
            most_rows=limits.rows, dram_bytes=dram_bytes, bytes_per_s=limits.write_bytes_per_s, choice=self.choice,
            costing=costing, erasure=self.erasure,
        )  # fmt: skip
        self.commits = Commits(
            tables, self.segments, workers, namespaces, wall_s, lambda: bool(self.demotion.running),
            lambda: self.demotion.stuck, self._forgotten,
        )  # fmt: skip
        self.closed = Closed(workers, self.erasure, self._erase_unread)
        self.away = Away(tables, self.segments, workers)
        self.loading = Loading(tables, workers, self.segments, self.demotion, self.erasure, self.away)
        self.flushing = Flushing(tables, outbox, self.demotion, self.commits, self._works)
        self.scrub = Scrub(
            tables, self.segments, workers, namespaces, wall_s, self._scrub_found, limits.scrub_bytes_per_s,
            self.loading.settle,
        )  # fmt: skip
        self.tally = self.loading.tally
        self._recovery: Recovery | None = None
        self._drain_ns = 0
        self._after_saves: list[_AfterSaves] = []
        self._when_serving: list[Callable[[], None]] = []
        self._lost: list[int] = []  # segments whose files are gone, to be emptied

    # -- start ---------------------------------------------------------------------------------------------------

    def unknown_since(self, generation: int) -> int:
        """Which generation was the first to be stored while nobody knew what lies on disk. Given: what a former life
        said of that, if it ended before it knew; else 0.
        """
        self._first_generation = generation or self._first_generation
        return self._first_generation

    def open(
        self, found: Sequence[Found], names: Sequence[Name], foreign: Iterable[int], next_segment: int,
        tenant_of: Callable[[str], Tenant | None],
        namespace_of: Callable[[str, NamespaceIdentity], Namespace | None], now_ns: int,
    ) -> None:  # fmt: skip
        """The index has been read: take over what it knows. `foreign`: numbers of files that are not ours."""
        self.segments.taken.update(foreign)
        self.segments.next_number = max(self.segments.next_number, next_segment)

        def known(tenant: str, identity: NamespaceIdentity, number: int) -> Namespace | None:
            namespace = namespace_of(tenant, identity)
            if namespace is not None:
                self.commits.named(namespace, number)
            return namespace

        self._recovery = Recovery(
            self._tables,
            self.segments,
            found,
            names,
            tenant_of,
            known,
            self.closed,
            self.erasure.quarantined,
            self._sweep,
            self._first_generation,
            self._wall_s(),
            now_ns,
            self.limits.rows,
        )
        self.state = DiskState.ADOPTING

    def _recover(self) -> None:
        assert self._recovery is not None, "nothing to take over"
        if self._recovery.run(RECOVERY_SLICES):
            self.erasure.pump()
            self.recovered, self._recovery = self._recovery.result, None
            self.state = DiskState.SERVING
            self.demotion.enabled = True
            self._act()

    def _given_up(self, places: Sequence[int]) -> None:
        """These are nobody's. Of those that a start finds, the index mostly knows already."""
        if self._recovery is None:
            self.commits.forgot(places)

    def _erase_unread(self, place: int) -> None:
        blocks.erase_place(self._tables, place)

    def _works(self) -> bool:
        """Is there a disk tier in this life?"""
        return bool(self.limits.disk_bytes) and self.state is not DiskState.OFF

    def switch_off(self) -> None:
        """There will be no disk tier in this life, though there may be one in the next."""
        self.state = DiskState.OFF
        self.closed.know_nothing()
        self._act()

    def _act(self) -> None:
        waiting, self._when_serving = self._when_serving, []
        for act in waiting:
            act()

    @property
    def opening(self) -> bool:
        """May there be blocks on disk that nobody knows of yet?"""
        return bool(self.limits.disk_bytes) and self.state in {DiskState.OPENING, DiskState.ADOPTING}

    def when_serving(self, act: Callable[[], None]) -> bool:
        """Have something done once disk serves; False, and nothing kept, if it does already or never will."""
        if not self.limits.disk_bytes or self.state in {DiskState.SERVING, DiskState.OFF}:
            return False
        self._when_serving.append(act)
        return True

    # -- up and down ---------------------------------------------------------------------------------------------

    def codec_for(self, namespace: Namespace) -> Codec:
        """How the next blocks of a namespace are best stored, here and beyond this host."""
        return self.choice.codec_for(namespace, self._workers)

    def published(self, ticket: Ticket, now_ns: int) -> None:
        """A block became visible. It may be wanted on disk now, and FLUSH will want it."""
        row, generation = ticket.block, int(self._tables.blocks["generation"][ticket.block])
        self.demotion.published(ticket.namespace.slot_bytes, now_ns)
        if self.limits.admission is Admission.ALL:
            self.demotion.admit((row,), (generation,))
        self.flushing.remember(ticket, generation)

    def leased(self, ends: U4) -> None:
        """Blocks that are not on disk were leased: all before them were too."""
        if self.limits.admission is not Admission.NONE:
            table = self._tables.blocks
            fresh = ends[(table["disk"][ends] == 0) & (table["state"][ends] == blocks.RESIDENT)]
            self.demotion.admit(fresh.tolist(), table["generation"][fresh].tolist())

    def held_rows(self) -> list[int]:
        """Rows that a read, a write or packing holds, once for each."""
        return self.loading.held_rows() + [order.row for batch in self.demotion.running.values() for order in batch]

    def expects(self, place: int) -> bool:
        """Will a place that is nobody's be erased, or is it not to be used again?"""
        erased = place in self.erasure.places() or place in self.commits.places()
        return erased or place in self.erasure.quarantined

    def _forgotten(self, place: int) -> None:
        """A place is nobody's, neither here nor in its header nor in the index."""
        if place not in self.erasure.quarantined and int(self._tables.slots["block"][place]) == blocks.NOBODY:
            blocks.free_place(self._tables, place)
        self.demotion.stuck = False

    def _scrub_found(self, row: int, place: int, order: Load) -> None:
        """A block on disk is not what was written, and its row has not changed since it was read."""
        table = self._tables.blocks
        self.tally.damaged += 1
        state = int(table["state"][row])
        if state in {blocks.RESIDENT, blocks.KEPT} and not table["flags"][row] & blocks.VERIFYING:
            self.erasure.quarantined.add(place)
            blocks.detach(self._tables, row)
            self.demotion.admit((row,), (order.generation,))
        elif state == blocks.DISK:
            self.erasure.quarantined.add(place)
            self._drop(order.namespace.tenant, row)

    # -- orders come back ----------------------------------------------------------------------------------------

    def finished(self, batch: Sequence[Order], now_ns: int) -> None:
        """Orders of one kind have ended; not loads, which `Streams` takes."""
        first = batch[0]
        if isinstance(first, Save):
            for order in self._saved(batch):  # type: ignore[arg-type]  # a batch is of one kind
                position = self.segments.position_of[order.header.segment]
                disk = (position << int(self._tables.book[blocks.SHIFT])) + order.header.slot
                self.commits.name(self._namespaces[int(self._tables.blocks["namespace"][order.row])])
                self.commits.wrote(disk, order.row, order.header.generation, order.slot_bytes, now_ns)
        elif isinstance(first, Pack):
            self.demotion.packed(batch, now_ns)  # type: ignore[arg-type]
        elif isinstance(first, Erase):
            self._owe(batch)  # type: ignore[arg-type]
            self.erasure.finished(batch, lambda place: self.commits.erased(place, now_ns))  # type: ignore[arg-type]
        elif isinstance(first, Commit):
            if first.failed:
                self._doubt(first.failed)
            rows = self.commits.committed(first, now_ns)
            self.demotion.admit(rows, self._tables.blocks["generation"][rows].tolist())
        elif isinstance(first, Owe):
            self.closed.noted(first)
        elif isinstance(first, MakeSegment):
            self.segments.made(first, self._tenants.get(first.tenant), now_ns)
            self.demotion.stuck = False
        else:
            assert isinstance(first, DropSegment), f"an order of another tier: {first}"
            self.segments.left(first, now_ns)
            gone = self.closed.finished(batch)  # type: ignore[arg-type]
            if gone:
                self.segments.dropped += gone
                self.commits.touch(self.segments.first << int(self._tables.book[blocks.SHIFT]), now_ns)

    def _owe(self, batch: Sequence[Erase]) -> None:
        """What could not be erased may be found again: by a rebuild, or where the drive comes back as it was."""
        position, shift = self.segments.position_of[batch[0].segment], int(self._tables.book[blocks.SHIFT])
        for order in batch:
            if order.outcome is not Outcome.DONE:
                self.erasure.quarantined.add((position << shift) + order.slot)
                if order.segment not in self.segments.lost:  # that one is owed as a whole
                    self._owe_place(order.segment, order.slot)

    def _owe_place(self, segment: int, slot: int) -> None:
        pool = self.segments.pool_at(self.segments.position_of[segment])
        self.closed.owe(segment, slot, pool.tenant.name)

    def _doubt(self, segments: set[int]) -> None:
        """A sync of these has failed: so may have what was written there before that, and is not heard of yet."""
        for batch in self.demotion.running.values():
            for order in batch:
                if isinstance(order, Save) and order.header.segment in segments:
                    order.doubted = True

    def _saved(self, batch: list[Save]) -> list[Save]:
        for order in batch:
            if order.doubted:
                order.outcome = Outcome.FAILED
        good = self.demotion.saved(batch)
        for one in self._after_saves:
            one.saves.discard(id(batch[0]))
        over = [one for one in self._after_saves if not one.saves]
        self._after_saves = [one for one in self._after_saves if one.saves]
        for one in over:
            self.erasure.when_erased(one.answer, one.tenant)
        return good

    def _unsettled(self, tenant: Tenant | None) -> set[int]:
        """Writes of a tenant, None: of any, that could still decide whether something dropped is found again."""
        if not self._tables.book[blocks.DOOMED_SAVING]:
            return set()
        state = self._tables.blocks["state"]
        saves = (batch for batch in self.demotion.running.values() if isinstance(batch[0], Save))
        mine = (batch for batch in saves if tenant is None or batch[0].header.tenant == tenant.name)
        return {id(batch[0]) for batch in mine if (state[[order.row for order in batch]] == blocks.DOOMED).any()}

    def when_erased(self, answer: Callable[[], None], tenant: Tenant | None = None) -> None:
        """Call when nothing of what was dropped of a tenant by now, None: of all, can come back from disk any more."""
        whose = tenant.name if tenant else None

        def noted() -> None:  # last of all: meanwhile a drive may have gone, with headers that are not erased
            self.closed.when_noted(answer, whose)

        if not self.limits.disk_bytes:
            answer()
        else:
            self.closed.when_gone(lambda: self._when_settled(noted, tenant), whose)

    def _when_settled(self, answer: Callable[[], None], tenant: Tenant | None) -> None:
        saves = self._unsettled(tenant)
        if saves:
            self._after_saves.append(_AfterSaves(saves, answer, tenant))
        else:
            self.erasure.when_erased(answer, tenant)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Go on with whatever can go on."""
        if self.state in {DiskState.OPENING, DiskState.OFF}:
            return
        if self._recovery is not None:
            self._recover()
            return
        self.erasure.pump(now_ns)
        while self._lost and self.segments.draining is None:
            position = self.segments.position_of.get(self._lost.pop())
            if position is not None:
                self.segments.drain(position)
        if self.segments.draining is not None and now_ns >= self._drain_ns:
            self._drain(now_ns)
        self.segments.tick(now_ns)
        self.demotion.pump(now_ns)
        self.scrub.tick(now_ns)
        self.commits.pump(now_ns)

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once."""
        if self.state in {DiskState.OPENING, DiskState.OFF}:
            return None
        if self._recovery is not None or self._tables.book[blocks.TO_ERASE]:
            return 0
        rooms = (self.demotion, self.commits, self.scrub, self.flushing, self.segments)
        soonest = [due_ns for room in rooms if (due_ns := room.next_ns()) is not None]
        if self.segments.draining is not None or self._lost:
            soonest.append(self._drain_ns)
        return min(soonest, default=None)

    def _drain(self, now_ns: int) -> None:
        """Empty a segment: what lies in DRAM too loses its copy, the rest is dropped."""
        table, tables = self._tables.blocks, self._tables
        for _ in range(DRAIN_STEPS):
            row, used = self.segments.next_to_drain()
            if not row:
                break
            state, flags = int(table["state"][row]), int(table["flags"][row])
            if state == blocks.DISK:
                tenant = self._namespaces[int(table["namespace"][row])].tenant
                self._drop(tenant, row)
            elif state in {blocks.RESIDENT, blocks.KEPT} and not flags & (blocks.SAVING | blocks.VERIFYING):
                blocks.detach(tables, row)
        else:
            self._drain_ns = 0
            return
        position = self.segments.draining
        assert position is not None, "it was being drained"
        shift = int(tables.book[blocks.SHIFT])
        self.closed.erase_unread(position << shift, (position + 1) << shift)
        if self.erasure.idle_at(position):
            used -= blocks.free_nobodys(tables, position)
        if used:
            self._drain_ns = now_ns + 10**7  # reads, writes and erasures are still running there
        else:
            self.segments.drained()
            self.demotion.stuck = False
            self.erasure.quarantined = {
                place for place in self.erasure.quarantined if place >> int(tables.book[blocks.SHIFT]) != position
            }
            self.commits.touch(position << int(tables.book[blocks.SHIFT]), now_ns)

    def lost(self, segment: int, now_ns: int) -> None:
        """A segment's file is gone: forget what lay there in this life. The next one may find it again, so the index
        does not hear of that; who deletes anything of its tenant has it noted that all of it is to go. What is being
        read or written there ends by itself.
        """
        if segment in self.segments.position_of:
            self._owe_place(segment, WHOLE)
            self.segments.lost.add(segment)
        self._lost.append(segment)
        self._drain_ns = min(self._drain_ns, now_ns)
