"""The second half of warming up: a short life with a disk, a crash, and the lives after it."""

from collections.abc import Sequence

import numpy as np

from kvproto.errors import Grant
from kvproto.identity import NamespaceIdentity
from kvproto.limits import MIB, PAGE_BYTES
from kvstore import blocks
from kvstore.blocks import U8
from kvstore.sessions import Lease, Namespace, Session
from kvstore.store import ITEM, Limits, Store
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits, DiskState
from kvstore.tier.format import UNREAD
from kvstore.tier.orders import Found, Name
from kvstored.warmup_world import Clock, Memory, Outbox, Randomness, Workers

SLOT_BYTES = MIB // 4
SEGMENT_BYTES = 4 * (SLOT_BYTES + PAGE_BYTES) + PAGE_BYTES
LIMITS = DiskLimits(6 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL)
SECOND_NS = 10**9


class _Life:
    """A store with a disk, and one client."""

    def __init__(self, former: Memory | None, workers: Workers, found: Sequence[Found], names: Sequence[Name]) -> None:
        self.clock, self.memory, self.workers = Clock(), Memory(former), workers
        limits = Limits(2 * MIB, MIB, disk=LIMITS)
        self.store = Store(limits, self.clock, Randomness(), self.memory, Outbox(), workers, self.memory)
        self.store.open_disk(found, names)
        while self.store.disk.state is not DiskState.SERVING:
            self.store.tick()
        self.session: Session = self.store.attach("warm-up", 2 * MIB)
        self.namespace: Namespace = self.store.open(
            self.session, NamespaceIdentity("warm-up", "-", "-", "-", 1, SLOT_BYTES)
        )

    def settle(self) -> None:
        """All orders are carried out."""
        for _ in range(50):
            self.clock.ns += 400 * 10**6
            self.store.tick()
            while self.workers.waiting:
                self.store.finished(self.workers.carry_out())

    def put(self, keys: U8) -> None:
        """Store a chain of four."""
        items = np.zeros(4, dtype=ITEM)
        self.store.reserve(self.session, self.namespace, keys, 0, 4, None, items)
        tickets = items["ticket"][items["grant"] == Grant.GRANTED].tolist()
        for copy in self.store.commit(self.session, tickets):
            self.store.copied(copy.ticket, 1)
        self.store.flush_outcomes(self.session)
        self.settle()

    def fetch(self, keys: U8) -> Lease:
        """Lease a chain of four, waiting for what is on disk; not released."""
        locations = np.zeros(8, dtype=np.uint32)
        lease = self.store.lease(self.session, self.namespace, 1, keys, 0, 4, 30 * SECOND_NS, SECOND_NS, locations, 0)
        assert isinstance(lease, Lease), "nothing is left of what was stored"
        self.settle()
        return lease


def _chain(first: int) -> U8:
    return np.arange(4 * first + 1, 4 * first + 17, dtype=np.uint64)


def live_with_disk() -> None:
    """Run every verb that the disk tier and a restart add. Raises AssertionError if one does not work here."""
    workers = Workers()
    life = _Life(None, workers, (), ())
    store = life.store
    for first in (0, 8, 16):
        life.put(_chain(first))
    assert store.match(life.namespace, _chain(0), 0, 4).disk == 4, "demotion does not work"
    lease = life.fetch(_chain(0))
    assert lease.count == 4, "promotion does not work"
    store.release(life.session, [lease.number])
    _fail_to_read(life)
    _scrub(life)
    _drop(life)
    _fill(life)
    life.put(_chain(200))
    life.fetch(_chain(200))  # and dies with it
    _recover(workers)
    warm = _Life(life.memory, Workers(), (), ())
    assert warm.store.kept.blocks, "a warm restart does not work"
    assert warm.store.kept.withheld, "what is leased is not withheld"
    warm.settle()


def _recover(workers: Workers) -> None:
    """A start that cannot read the last header."""
    found = workers.found(SEGMENT_BYTES)
    last = found[-1].records
    assert isinstance(last, np.ndarray), "records of a segment are an array"
    last["generation"][-1], last["namespace"][-1] = 0, UNREAD
    life = _Life(None, workers, found, workers.names)
    assert life.store.disk.recovered.blocks, "recovery does not work"
    life.store.delete(life.namespace, _chain(300), 0, 1, lambda _: None)
    life.settle()
    assert life.store.disk.erasure.erased, "what could not be read outlives a deletion"


def _fail_to_read(life: _Life) -> None:
    """The third block of a chain is damaged: the first two come."""
    store = life.store
    life.put(_chain(24))
    life.put(_chain(32))
    life.workers.damages.add(_chain(0)[8:12].tobytes())
    lease = life.fetch(_chain(0))
    assert lease.count == 2, "a damaged block is not a miss"
    store.release(life.session, [lease.number])
    life.workers.damages.clear()


def _scrub(life: _Life) -> None:
    """One block that is in DRAM too is damaged on disk: it is written anew."""
    life.workers.damages.add(_chain(32)[12:16].tobytes())
    life.store.disk.scrub.begin(0)
    life.settle()
    assert life.store.disk.scrub.report().damaged == 1, "a scrub does not work"
    life.workers.damages.clear()


def _drop(life: _Life) -> None:
    """Delete a chain; lose a segment; be short of places."""
    deleted: list[int] = []
    life.store.delete(life.namespace, _chain(24), 0, 1, deleted.append)
    life.settle()
    assert deleted == [4], "deletion does not reach the disk"
    life.store.disk.lost(min(life.store.disk.segments.position_of), life.clock.ns)
    life.settle()
    life.namespace.recompute_ns = 1  # dearer to read than to compute
    life.put(_chain(40))
    life.namespace.recompute_ns = 0


def _fill(life: _Life) -> None:
    """More than the disk holds: its oldest leaves go."""
    for first in range(48, 48 + 8 * 9, 8):
        life.put(_chain(first))
    book = life.store.tables.book
    assert int(book[blocks.DISK_USED]) <= 6 * 4, "eviction from disk does not work"
    disk_pool = int(life.store.tables.arenas["pool"][int(book[blocks.ON_DISK])]) - 1
    nobody = blocks.detach_oldest(life.store.tables, life.namespace.pool.number, disk_pool, np.uint64(0))
    assert not nobody, "a block is taken from disk that was touched a moment ago"
