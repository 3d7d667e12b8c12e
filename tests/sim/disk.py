"""The disk of a simulated store: threads end orders, drives fail, bits flip, files vanish, power goes."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from kvproto.limits import MIB, PAGE_BYTES
from kvstore import blocks
from kvstore.sessions import Session
from kvstore.tier import away, commits, demotion, disk, erasure, loading, recovery, segments
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits, DiskState
from kvstore.tier.orders import Commit, Erase, Load, MakeSegment, Order, Outcome, Pack, Save, Verify
from tests.core import Core
from tests.drive import FakeDrive
from tests.fakes import FakeOutbox
from tests.sim.actor import Seen
from tests.sim.model import Generation, Model

SEGMENT_PAGES = (9, 18, 42)
SEGMENTS = (2, 3, 6, 16)
FAULTS = ((Save,), (Load,), (Erase,), (Commit,), (MakeSegment,), (Save, Load), (Save, Load, Erase, Commit, MakeSegment))
MOST_FAULTY_NS = 3 * 10**9
MOST_HUNG_NS = 12 * 10**9
NOTICED = 0.3  # of these times the store hears which drives hang
BACK = 0.5  # of what vanished, at the end of a life
HANGS = 0.05  # of the times at which threads end something, in one life of eight, a drive begins to hang


CUTS: tuple[tuple[ModuleType, str, tuple[int, ...]], ...] = (
    (recovery, "SLICE", (1, 5, 8192)),
    (loading, "LOAD_BYTES", (PAGE_BYTES, 8 * PAGE_BYTES, 8 * MIB)),
    (disk, "DRAIN_STEPS", (1, 512)),
    (demotion, "BATCH_BYTES", (PAGE_BYTES, 8 * PAGE_BYTES, 8 * MIB)),
    (demotion, "RUNNING_BYTES", (8 * PAGE_BYTES, 32 * MIB)),
    (demotion, "HURRY_BYTES", (8 * PAGE_BYTES, 192 * MIB)),
    (demotion, "TURN_BLOCKS", (1, 256)),
    (commits, "CHUNKS", (1, 1024)),
    (erasure, "BATCH", (1, 256)),
)
# Drawn apart, or all lives would be others than they were.
CUTS_APART: tuple[tuple[ModuleType, str, tuple[int, ...]], ...] = (
    (demotion, "AHEAD_SHARE", (1, 16)),
    (demotion, "WAIT_NS", (1, 10**9)),
    (segments, "SLOW_NS", (1, 10**9)),
    (erasure, "LATE_NS", (10**6, 10**9)),
    (away, "LOST_NS", (0, 10**9, 60 * 10**9)),
)


def cut_finely(rng: random.Random) -> None:
    """Work in slices and batches as small as they get, or as they are."""
    apart = random.Random(str(rng.getstate()))
    for module, name, sizes in CUTS_APART:
        setattr(module, name, apart.choice(sizes))
    for module, name, sizes in CUTS:
        setattr(module, name, rng.choice(sizes))


@contextmanager
def as_it_was() -> Iterator[None]:
    """Undo `cut_finely` in the end."""
    cuts = (*CUTS, *CUTS_APART)
    before = [getattr(module, name) for module, name, _ in cuts]
    try:
        yield
    finally:
        for (module, name, _), size in zip(cuts, before, strict=True):
            setattr(module, name, size)


class SimOutbox(FakeOutbox):
    """Keeps answers to FLUSH apart, with what the store held at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.on_flushed: Callable[[Session, int, tuple[int, int, int, int]], None] = lambda *_: None

    def durable(self, session: Session, request: int, counts: tuple[int, int, int, int]) -> None:
        """See the port."""
        super().durable(session, request, counts)
        self.on_flushed(session, request, counts)


def choose_limits(rng: random.Random, codec: Wish = Wish.RAW) -> DiskLimits:
    """A disk tier, large or small."""
    segment_bytes = rng.choice(SEGMENT_PAGES) * PAGE_BYTES
    return DiskLimits(
        rng.choice(SEGMENTS) * segment_bytes,
        segment_bytes,
        rng.choice((Admission.ALL, Admission.ALL, Admission.SECOND_TOUCH, Admission.NONE)),
        write_bytes_per_s=rng.choice((0, 0, 0, 200 * PAGE_BYTES)),
        codec=codec,
        row_bytes=rng.choice((2, 2, 2, 5)) * PAGE_BYTES,
    )


class DiskEvents:
    """The disk of one simulated life after the other."""

    def __init__(self, rng: random.Random, seen: Seen, model: Model) -> None:
        self.rng, self.seen, self.model = rng, seen, model
        self.core: Core
        self.faulty: tuple[type, ...] = ()
        self.often = 0.5
        self.healed_ns = 0
        self.apart = random.Random(str(rng.getstate()))  # or all lives would be others than they were
        self.hanging = self.apart.random() < 0.125  # are there drives that hang?
        self.hung = 0  # drives, a bit each
        self.answers_ns = 0  # when they answer again
        self.away: dict[int, tuple[bytearray, bytes]] = {}  # segments that vanished
        self.chains: dict[int, list[int]] = {}
        self.emptied = False  # was an arena, since they were listed?
        self.served_life = 0  # the last life in which disk served
        self.crowded = False  # were there more records than a store may have blocks on disk?

    def attach(self, core: Core) -> None:
        """A store begins to use the disk."""
        self.core = core
        core.drive.fault, core.drive.doubt = self.fault, self.doubt
        core.drive.drives = self.apart.choice((2, 3)) if self.hanging else 1

    # -- faults --------------------------------------------------------------------------------------------------

    def fault(self, order: Order) -> Outcome | None:
        """How an order fails, if it does."""
        if self.core.clock.ns >= self.healed_ns:
            self.faulty = ()
        if isinstance(order, Commit):
            order.failed = {segment for segment in order.segments if self.hangs(segment)}
        if not isinstance(order, self.faulty) or self.rng.random() >= self.often:
            return None
        if isinstance(order, Erase):
            self.leave(order)
        if isinstance(order, Commit) and order.segments and self.rng.random() < 0.5:
            order.failed |= set(self.rng.sample(order.segments, self.rng.randrange(1, len(order.segments) + 1)))
            if self.rng.random() < 0.5:
                return None  # the index took the rest
        return Outcome.FAILED

    def leave(self, order: Erase) -> None:
        """A header may stay that was to be overwritten."""
        for header in self.core.drive.headers():
            if (header.segment, header.slot) == (order.segment, order.slot):
                self.model.published[header.generation].unerased = True

    def doubt(self, order: Order) -> bool:
        """Is what fails carried out all the same? A segment that could not be made is removed again."""
        return not isinstance(order, MakeSegment) and self.rng.random() < 0.3

    def fail(self) -> None:
        """Fault: for a while the drive refuses some of what it is told."""
        self.faulty, self.often = self.rng.choice(FAULTS), self.rng.choice((0.2, 0.5, 1.0))
        self.healed_ns = self.core.clock.ns + self.rng.randrange(MOST_FAULTY_NS)

    def heal(self) -> None:
        """The drive is sound again."""
        self.healed_ns = self.answers_ns = 0
        self.notice_hung()

    def notice_hung(self) -> None:
        """Fault: drives that do not answer are suspended. The store hears of it some time, and that they are back."""
        silent = self.core.clock.ns < self.answers_ns
        self.core.store.drives_away([drive for drive in range(3) if silent and self.hung >> drive & 1])

    def hangs(self, segment: int) -> bool:
        """Does the drive of a segment not answer?"""
        return bool(self.core.clock.ns < self.answers_ns and self.hung >> self.core.drive.drive_of(segment) & 1)

    def answered(self) -> list[int]:
        """Batches that threads may end. Commits wait for nobody: what a hung drive has not synced is left out."""
        firsts = [batch[0] for batch in self.core.drive.waiting]
        segments = [one.header.segment if isinstance(one, Save) else getattr(one, "segment", None) for one in firsts]
        return [i for i, segment in enumerate(segments) if segment is None or not self.hangs(segment)]

    def work(self) -> None:
        """Threads end a few batches, in any order. Fault: now and then a drive hangs for a while."""
        if self.hanging and self.apart.random() < HANGS:
            self.hung = self.apart.randrange(1, 8)
            self.answers_ns = self.core.clock.ns + self.apart.randrange(MOST_HUNG_NS)
            self.seen.hung += 1
        if self.hanging and self.apart.random() < NOTICED:
            self.notice_hung()
        for _ in range(self.rng.randrange(1, 4)):
            answered = self.answered()
            if answered:
                self.core.work(answered[self.rng.randrange(len(answered))])

    def damage(self) -> None:
        """Fault: a bit flips in a block."""
        headers = self.core.drive.headers()
        if not headers:
            return
        header = self.rng.choice(headers)
        drive, slot_bytes = self.core.drive, self.core.drive.slot_bytes(header.segment)
        drive.flip(self.rng, header.segment, header.slot, slot_bytes)
        if header.segment in drive.synced and self.rng.random() < 0.5:
            drive.synced[header.segment] = bytes(drive.files[header.segment])
        self.model.published[header.generation].harmed = True

    def vanish(self) -> None:
        """Fault: a segment's file is gone."""
        drive = self.core.drive
        position_of = self.core.store.disk.segments.position_of
        if not position_of:
            return
        segment = self.rng.choice(sorted(position_of))
        self.lose([header.generation for header in drive.headers() if header.segment == segment])
        file, synced = drive.files.pop(segment, None), drive.synced.pop(segment, None)
        if file is not None and synced is not None:
            self.away[segment] = (file, synced)
        self.core.store.disk.lost(segment, self.core.clock.ns)
        self.seen.vanished += 1

    def bring_back(self, drive: FakeDrive) -> None:
        """What vanished is there again, now and then, as it was."""
        for segment in [segment for segment in self.away if self.apart.random() < BACK]:
            file, synced = self.away.pop(segment)
            if segment not in drive.files:  # else its number was given again
                drive.files[segment], drive.synced[segment] = file, synced
                self.seen.back += 1

    def lose(self, numbers: Sequence[int]) -> None:
        """These copies may be missed."""
        for number in numbers:
            if number in self.model.published:
                self.model.published[number].harmed = True

    # -- the end of a life ---------------------------------------------------------------------------------------

    def reading(self) -> bool:
        """Is anything on its way from disk to memory?"""
        return any(isinstance(batch[0], Load) for batch in self.core.drive.waiting)

    def note_end(self) -> None:
        """What is under way while a life ends."""
        kinds = {type(batch[0]) for batch in self.core.drive.waiting}
        self.seen.ended_in_commit += bool(self.core.running)
        self.seen.ended_in_demotion += Save in kinds
        self.seen.ended_in_promotion += Load in kinds
        self.seen.ended_in_index_commit += Commit in kinds

    def crash(self, *, killed: bool) -> FakeDrive:
        """Power is lost, or the daemon is killed. What the next life is given."""
        self.note_end()
        if self.core.store.disk.state is DiskState.SERVING:  # what it has not looked at is as it was
            self.served_life = self.model.life
            self.chains, self.emptied = self.durable_chains(), False
            for number, generation in self.model.published.items():
                generation.durable &= number in self.chains
        self.emptied |= self.empties()
        drive = self.core.drive
        self.heal()
        if killed:
            self.die(drive)
        else:
            drive.lose_power(self.rng)
            self.tear()
        rebuilt = self.rng.random() < 0.4
        self.bring_back(drive)
        if rebuilt:
            drive.rebuild()
        drive.waiting.clear()
        self.crowded = drive.known_blocks() > self.core.store.limits.disk.rows
        return drive.successor()

    def empties(self) -> bool:
        """Has an arena been emptied for another size in this life?"""
        return bool(self.core.store.arenas.recycled) or self.core.store.arenas.draining is not None

    def tear(self) -> None:
        """What nobody had called durable may be torn under a whole header: a rebuild believes that until it is read."""
        drive, promised = self.core.drive, {number for chain in self.chains.values() for number in chain}
        for header in drive.headers():
            if header.generation not in promised and drive.content(header.segment, header.slot) is None:
                self.model.published[header.generation].harmed = True

    def die(self, drive: FakeDrive) -> None:
        """kill -9: some of what was under way is carried out, and nobody hears of it."""
        while drive.waiting:
            batch = drive.waiting.pop(self.rng.randrange(len(drive.waiting)))
            if not isinstance(batch[0], Pack | Verify) and self.rng.random() < 0.5:
                drive.waiting.insert(0, self.cut_short(batch[: self.rng.randrange(1, len(batch) + 1)]))
                drive.carry_out(0)

    def cut_short(self, batch: Sequence[Order]) -> Sequence[Order]:
        """Of a commit, perhaps no more than the sync: the index is told of all of it or of nothing."""
        first = batch[0]
        if isinstance(first, Commit) and self.rng.random() < 0.3:
            return [Commit(first.segments, [], [], [])]
        return batch

    def durable_chains(self) -> dict[int, list[int]]:
        """Generations that FLUSH has called durable and that nothing has happened to since, each with its chain."""
        table = self.core.store.tables.blocks
        chains = {}
        durable = table["flags"] & blocks.DURABLE
        for top in np.flatnonzero(durable).tolist():
            number = int(table["generation"][top])
            if table["state"][top] in {blocks.FREE, blocks.DOOMED} or not self.model.published[number].durable:
                continue
            row, chain = top, []
            while row and self.sound(row):
                chain.append(int(table["generation"][row]))
                row = int(table["parent"][row])
            if not row:
                chains[number] = chain
        return chains

    def sound(self, row: int) -> bool:
        """Is a block still on disk, and unharmed?"""
        one = self.core.store.tables.blocks[row]
        generation = self.model.published.get(int(one["generation"]))
        if generation is None or generation.harmed or generation.dead or generation.swept_above():
            return False
        return bool(one["disk"] and one["state"] in blocks.LIVE and one["flags"] & blocks.DURABLE)

    def check_returned(self) -> None:
        """All that was durable is back, to the last byte."""
        self.core.audit()
        table, drive = self.core.store.tables.blocks, self.core.drive
        shift = int(self.core.store.tables.book[blocks.SHIFT])
        live = np.flatnonzero(np.isin(table["state"], blocks.LIVE))
        row_of = {int(table["generation"][row]): row for row in live.tolist()}
        for number in self.chains:
            generation = self.model.published[number]
            chain = [self.model.published[one] for one in self.chains[number]]
            if any(one.harmed or one.ending for one in chain):
                continue
            if generation.dead or generation.swept_above() or self.given_way(generation):
                continue
            row = row_of.get(number)
            if row is None and (self.emptied or self.empties()):
                continue  # read already, leased, and dropped with its arena
            if row is None and self.crowded:
                continue  # what was dropped was not erased yet, and took its row: as good as evicted
            assert row is not None, "durable, and not back after a crash"
            place = int(table["disk"][row])
            segment, slot = self.core.store.disk.segments.number_at(place >> shift), place & ((1 << shift) - 1)
            if (segment, slot) in drive.erased and (self.emptied or self.empties()):
                continue  # dropped with its arena while disk was being opened, and the index was not told yet
            assert drive.content(segment, slot) == (number, generation.content), "durable, and changed"
            self.seen.returned += 1
        self.chains = {}

    def given_way(self, generation: Generation) -> bool:
        """Did a later block take the key, or that of something it continues, before disk was opened?"""
        at: Generation | None = generation
        while at is not None:
            if any(other.life > self.served_life for other in self.model.named[at.name]):
                return True
            at = at.parent
        return False

    def count(self) -> None:
        """Take in what a store has been through."""
        tier, seen = self.core.store.disk, self.seen
        seen.saved += tier.demotion.tally.saved
        seen.packed += tier.demotion.tally.packed
        seen.save_faults += tier.demotion.tally.save_faults
        seen.loaded += tier.tally.loaded
        seen.damaged += tier.tally.damaged
        seen.load_faults += tier.tally.load_faults
        seen.commit_faults += tier.commits.faults
        seen.erased += tier.erasure.erased
        seen.drained += tier.segments.recycled

    def at_rest(self) -> None:
        """Nothing is on its way any more."""
        store, drive = self.core.store, self.core.drive
        assert not drive.waiting, "an order is never carried out"
        assert not store.streams._waiting, "a stream waits for ever"
        assert not store.streams._verifying, "a block is verified for ever"
        assert store.streams.next_ns() is None, "a stream is never ended"
        assert not store.disk.loading.running, "a read never ends"
        assert not store.disk.demotion.running, "a write never ends"
        assert store.disk.demotion.running_bytes == 0, "bytes being written are miscounted"
        assert not store.disk.demotion.waiting, "a block waits for ever to be written"
        assert store.disk.erasure.idle, "an erasure never ends"
        assert not store.disk.erasure._waiters, "a delete is never answered"
        assert not store.disk._after_saves, "a delete is never answered"
        assert not store.tables.book[blocks.DOOMED_SAVING], "dropped blocks being written are miscounted"
        assert store.disk.commits.clean, "something is never made durable"
        assert not store.disk.flushing._waiting, "a FLUSH is never answered"
        assert store.disk.segments.draining is None, "a segment is emptied for ever"
        assert not store.disk.segments.making, "a segment is made for ever"
