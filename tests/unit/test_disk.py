"""The disk tier of the core on a fake drive: down, up, out, in, and what fails on the way."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.errors import Outcome as Ended
from kvproto.limits import MIB, PAGE_BYTES
from kvstore import blocks
from kvstore.report import ClearReport, ClearScope
from kvstore.sessions import Lease, Namespace
from kvstore.tier import scrub
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.orders import Commit, Erase, Load, MakeSegment, Outcome, Save
from tests.at_once import at_once
from tests.core import MS, SECOND, Client, Core, Held, chain, value_of, words
from tests.figures import Recorder

SEGMENT_BYTES = 18 * PAGE_BYTES  # eight slots of two pages, a header, and a page over
SLOTS = 8
IMAGES = 20_000  # of disks that lost power


def make(arenas: int = 1, limits: DiskLimits | None = None, **changes: Any) -> Core:
    """A store of 16 blocks an arena, and a disk of 8 a segment: of eight segments, or as `changes` say."""
    usual = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    return Core(arenas=arenas, disk=replace(limits or usual, **changes))


def begin(core: Core, model: str = "m") -> tuple[Client, Namespace]:
    """A client with a namespace."""
    client = core.client()
    return client, client.open(model=model)


def put(client: Client, namespace: Namespace, keys: Sequence[bytes], parent: bytes | None = None) -> None:
    """Store a chain, all of it, and let the disk follow."""
    grants = client.put(namespace, keys, parent)
    assert set(grants) <= {Grant.GRANTED, Grant.KNOWN}, grants
    client.core.work_all()


def fetch(client: Client, namespace: Namespace, keys: Sequence[bytes]) -> int:
    """Lease what is there, wait for what is on disk, compare every byte, release: how many came."""
    core = client.core
    held = client.ask(namespace, keys, wait_ns=10 * SECOND)
    if held is None:
        return 0
    assert isinstance(held, Held)
    core.work_all()
    locations = list(held.locations)
    for ready in core.outbox.readies:
        if ready.lease.number == held.number:
            locations += ready.locations
    core.outbox.readies.clear()
    whole = Held(held.number, held.deadline_ns, locations)
    for arena, _ in locations:
        client.maps.setdefault(arena, core.memory.map(arena))
    for i in range(whole.blocks):
        assert client.read(namespace, whole, i) == value_of(keys[i], namespace.identity.block_bytes)
    client.release(whole)
    core.audit()
    return whole.blocks


def states(core: Core) -> list[int]:
    """States of all rows in use."""
    rows = core.store.tables.blocks
    return [int(state) for state in rows["state"][1:] if state]


def test_blocks_that_leave_dram_are_read_back_from_disk() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(12, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    assert states(core).count(blocks.DISK) == 8
    core.audit()
    assert fetch(client, namespace, first) == 12
    assert core.drive.loads >= 8


def test_a_fetch_that_does_not_wait_gets_only_what_is_in_dram() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(12, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    held = client.ask(namespace, first)
    assert isinstance(held, Held)
    assert held.blocks == 4
    assert not core.drive.waiting


def test_match_tells_disk_from_dram() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(12, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    matched = core.store.match(namespace, np.frombuffer(b"".join(first), dtype=np.uint64).copy(), 0, 12)
    assert (matched.dram, matched.disk) == (4, 8)


def test_the_second_touch_admits_and_the_first_does_not() -> None:
    core = make(admission=Admission.SECOND_TOUCH)
    client, namespace = begin(core)
    once, twice = chain(4, "once"), chain(4, "twice")
    put(client, namespace, once)
    put(client, namespace, twice)
    assert core.drive.saves == 0
    assert client.fetch(namespace, twice) == 4
    core.work_all()
    assert core.drive.saves == 4
    assert client.fetch(namespace, twice) == 4
    core.work_all()
    assert core.drive.saves == 4, "a block is written once"
    core.audit()


def test_what_comes_and_goes_between_memory_and_disk_is_written_once() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(12, "second")
    put(client, namespace, first)
    put(client, namespace, second)  # eight of the first are on disk alone now
    assert core.drive.saves == 24
    for _ in range(3):  # each fetch of the one evicts the other
        assert fetch(client, namespace, first) == 12
        core.work_all()
        assert fetch(client, namespace, second) == 12
        core.work_all()
    assert core.drive.saves == 24
    assert core.drive.loads >= 6 * 8, "each of them came from disk"
    put(client, namespace, chain(1, "third"))
    assert core.drive.saves == 25, "what is new is written"
    core.audit()


def test_blocks_that_cost_less_to_compute_than_to_read_are_not_written() -> None:
    core = make()
    client, namespace = begin(core)
    core.store.disk.demotion.took(1.0, MIB)
    namespace.recompute_ns = 1000
    put(client, namespace, chain(4))
    assert core.drive.saves == 0
    namespace.recompute_ns = SECOND
    put(client, namespace, chain(4, "dear"))
    assert core.drive.saves == 4


def test_flush_overrides_admission_and_counts() -> None:
    core = make(admission=Admission.NONE)
    client, namespace = begin(core)
    keys = chain(6)
    put(client, namespace, keys)
    assert core.drive.saves == 0
    assert core.store.flush(client.session, namespace, 7, 10 * SECOND) is None
    core.work_all()
    assert core.outbox.flushed == [(client.session, 7, (6, 0, 0, 0))]
    assert len(core.drive.chunks) == 1
    assert core.store.flush(client.session, namespace, 8, SECOND) == (0, 0, 0, 0), "each block is counted once"
    core.audit()


def test_flush_says_what_could_not_be_written_and_what_was_gone() -> None:
    core = make(admission=Admission.NONE)
    client, namespace = begin(core)
    put(client, namespace, chain(16))
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Save) else None
    put(client, namespace, chain(4, "other"))  # four of the first are evicted
    core.store.flush(client.session, namespace, 7, 10 * SECOND)
    core.work_all()
    assert core.outbox.flushed == [(client.session, 7, (0, 16, 4, 0))]
    assert core.store.flush(client.session, namespace, 8, SECOND) == (0, 0, 0, 0), "each failure is told of once"
    core.audit()
    core.drive.fault = lambda _order: None
    assert client.fetch(namespace, chain(4, "other")) == 4, "what cannot be written stays in DRAM"


def test_flush_ends_with_its_time_and_the_next_speaks_of_the_rest() -> None:
    core = make(admission=Admission.NONE)
    client, namespace = begin(core)
    put(client, namespace, chain(3))
    core.store.flush(client.session, namespace, 7, 30 * MS)
    core.pass_time(200 * MS)
    assert core.outbox.flushed == [(client.session, 7, (0, 0, 0, 3))]
    assert core.store.flush(client.session, namespace, 8, 10 * SECOND) is None
    core.work_all()
    assert core.outbox.flushed[1:] == [(client.session, 8, (3, 0, 0, 0))]


def test_a_flush_of_a_store_without_disk_is_answered_at_once() -> None:
    core = Core()
    client, namespace = begin(core)
    client.put(namespace, chain(3))
    assert core.store.flush(client.session, namespace, 7, SECOND) == (0, 0, 0, 0)


def damage(core: Core, namespace: Namespace, key: bytes) -> None:
    """Flip a bit of a block's payload on disk."""
    row = core.store.tables.blocks[core.row(namespace, key)]
    shift = int(core.store.tables.book[blocks.SHIFT])
    segment = core.store.disk.segments.number_at(int(row["disk"]) >> shift)
    slot = int(row["disk"]) & ((1 << shift) - 1)
    core.drive.files[segment][PAGE_BYTES + slot * 2 * PAGE_BYTES + PAGE_BYTES + 5] ^= 1


def test_a_damaged_block_is_a_miss_and_its_place_is_never_used_again() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    damage(core, namespace, first[5])
    assert fetch(client, namespace, first) == 5
    assert core.store.disk.tally.damaged == 1
    assert len(core.store.disk.erasure.quarantined) == 1
    core.audit()
    put(client, namespace, first)
    put(client, namespace, second)
    assert fetch(client, namespace, first) == 12, "stored again, it is good again"


def test_what_cannot_be_read_now_can_be_read_later() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    failing = [True]
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) and failing[0] else None
    assert fetch(client, namespace, first) == 0
    failing[0] = False
    assert fetch(client, namespace, first) == 12


def test_two_leases_of_one_block_share_its_read() -> None:
    core = make()
    client, namespace = begin(core)
    other, same = begin(core)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    one = client.ask(namespace, first, wait_ns=SECOND)
    two = other.ask(same, first, wait_ns=SECOND)
    assert isinstance(one, Held)
    assert isinstance(two, Held)
    core.work_all()
    assert core.drive.loads == 8
    assert sorted(len(ready.locations) for ready in core.outbox.readies) == [8, 8]
    assert all(ready.left == 0 for ready in core.outbox.readies)
    core.audit()


def test_a_lease_for_the_rest_of_which_there_is_no_room_is_not_longer_for_its_wait() -> None:
    """Nothing is coming: nobody, a successor neither, need keep what is there for longer than it was asked for."""
    core = make()
    client, namespace = begin(core)
    first, second = chain(8, "first"), chain(12, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    held = client.ask(namespace, second, ttl_ns=30 * SECOND)
    assert isinstance(held, Held)
    assert held.blocks == 12
    some = client.ask(namespace, first, ttl_ns=SECOND, wait_ns=50 * SECOND)
    assert isinstance(some, Held)
    assert some.blocks == 4
    assert core.store.leases[some.number].stream is None
    assert some.deadline_ns == core.clock.ns + SECOND
    row = core.store.tables.blocks[core.row(namespace, first[3])]
    assert row["lease_until_ns"] == some.deadline_ns
    core.audit()


def test_what_has_not_come_in_time_is_a_miss_and_comes_all_the_same() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    held = client.ask(namespace, first, wait_ns=100 * MS)
    assert isinstance(held, Held)
    core.pass_time(300 * MS)
    assert [(ready.locations, ready.left) for ready in core.outbox.readies] == [([], 0)]
    client.release(held)
    core.work_all()
    assert client.fetch(namespace, first) == 8
    core.audit()


def test_a_lease_released_while_its_blocks_are_read_leaves_nothing_behind() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    held = client.ask(namespace, first, wait_ns=SECOND)
    assert isinstance(held, Held)
    client.release(held)
    core.audit()
    core.work_all()
    core.audit()
    assert core.outbox.readies == []
    assert not core.store.streams._waiting


@pytest.mark.parametrize("deleted", [True, False])
def test_a_lease_that_ends_while_its_blocks_are_read_is_told_of(deleted: bool) -> None:
    """Else a LOAD would wait for READY for ever: a block that was deleted keeps a lease from being prolonged."""
    core = make()
    client, namespace = begin(core)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    heard: list[Lease] = []
    core.store.leasing.cut = heard.append
    held = client.ask(namespace, first, ttl_ns=SECOND, wait_ns=50 * SECOND)
    assert isinstance(held, Held)
    if deleted:
        client.store.delete(namespace, words(first), 0, 8, lambda _: None)
    core.pass_time(10 * SECOND)
    assert [lease.number for lease in heard] == ([held.number] if deleted else [])
    assert core.outbox.readies == [] or not deleted
    core.work_all()
    core.audit()


def test_a_delete_reaches_the_disk_before_it_is_answered() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(8)
    put(client, namespace, keys)
    answers = client.delete(namespace, keys[2:3])
    core.store.tick()
    assert answers == []
    assert any(isinstance(batch[0], Erase) for batch in core.drive.waiting)
    core.work_all()
    assert answers == [6]
    assert fetch(client, namespace, keys) == 2
    core.drive.rebuild()
    later = successor(core)
    client, namespace = begin(later)
    assert fetch(client, namespace, keys) == 2, "nor does a rebuild bring it back"


@pytest.mark.parametrize("gives_way", ["deleted", "evicted"])
def test_what_was_deleted_does_not_come_back_from_a_place_that_the_index_gave_to_another(gives_way: str) -> None:
    """A place is written again, and that life ends after any step, before or behind the commit that says so."""
    written = [_comes_to_life_again(gives_way == "evicted", steps) for steps in range(24)]
    assert not written[0]
    assert written[-1], "the control: the place was written again"


def _comes_to_life_again(is_full: bool, steps: int) -> bool:
    """Whether the header was there when the first life ended."""
    core = make(disk_bytes=SEGMENT_BYTES)
    client, namespace = begin(core)
    before = [chain(1, f"before {number}") for number in range(20 if is_full else SLOTS)]
    keys = chain(1, "keys")
    for one in before:
        put(client, namespace, one)
    if not is_full:
        client.delete(namespace, before[0])
    client.put(namespace, keys)
    for _ in range(steps):
        if core.drive.waiting:
            core.work()
        core.pass_time(10 * MS)
    written = keys[0] in [header.key for header in core.drive.headers()]
    later = successor(core, disk_bytes=2 * SEGMENT_BYTES)  # so that it takes another place
    client, namespace = begin(later)
    put(client, namespace, keys)
    answers = client.delete(namespace, keys)
    later.work_all()
    assert answers == [1]
    later.drive.rebuild()
    last = successor(later)
    client, namespace = begin(last)
    assert fetch(client, namespace, keys) == 0
    assert fetch(client, namespace, before[-1]) == 1, "the control: what was not deleted is there"
    return written


def test_a_delete_of_what_is_being_written_waits_for_the_write() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(4)
    client.put(namespace, keys)
    core.store.tick()
    while not any(isinstance(batch[0], Save) for batch in core.drive.waiting):
        core.work()
        core.store.tick()
    answers = client.delete(namespace, keys[:1])
    core.audit()
    assert answers == []
    core.work_all()
    assert answers == [4]
    core.drive.rebuild()
    assert not core.drive.chunks


def test_a_clear_reaches_blocks_that_lie_on_disk_alone() -> None:
    core = make()
    client, namespace = begin(core)
    put(client, namespace, chain(12, "first"))
    put(client, namespace, chain(12, "second"))
    reports: list[ClearReport] = []
    core.store.clear(ClearScope(), reports.append, dry_run=True)
    core.store.clear(ClearScope(), reports.append, dry_run=False)
    core.work_all()
    assert [report.blocks for report in reports] == [24, 24]
    assert core.store.tables.book[blocks.ROWS] == 0
    assert core.store.tables.book[blocks.DISK_USED] == 0
    core.audit()


def successor(core: Core, **changes: Any) -> Core:
    """A new daemon on the same disk, DRAM lost."""
    limits = replace(core.store.limits.disk, **changes)
    generation = int(core.store.tables.book[blocks.GENERATION])
    later = Core(arenas=1, disk=limits, drive=core.drive.successor(), first_generation=generation, clock=core.clock)
    later.open_disk()
    later.audit()
    return later


def test_a_restart_brings_back_all_that_was_durable() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(10, "first"), chain(14, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    later = successor(core)
    assert later.store.disk.recovered.blocks == 24
    client, namespace = begin(later)
    assert fetch(client, namespace, second) == 14
    assert fetch(client, namespace, first) == 10
    put(client, namespace, chain(4, "third"), None)
    assert fetch(client, namespace, first) == 10


def test_a_restart_with_an_index_rebuilt_from_headers_brings_back_the_same() -> None:
    core = make()
    client, namespace = begin(core)
    first = chain(10, "first")
    put(client, namespace, first)
    core.drive.names.clear()
    core.drive.rebuild()
    later = successor(core)
    client, namespace = begin(later)
    assert fetch(client, namespace, first) == 10


@pytest.mark.parametrize("open_at", range(0, 12, 2), ids=lambda n: f"opened after {n} ms")
@pytest.mark.parametrize("rebuilt", [False, True], ids=["index", "headers"])
@pytest.mark.parametrize("whole", [False, True], ids=["begun", "stored"])
def test_what_is_durable_stays_so_though_it_is_stored_again_before_the_disk_is_open(
    open_at: int, rebuilt: bool, whole: bool
) -> None:
    """Whoever stores it cannot know. That life may end at any moment; what continues it was not stored again."""
    for steps in range(0, 80, 4):
        core = make()
        client, namespace = begin(core)
        keys = chain(6)
        put(client, namespace, keys)
        generation = int(core.store.tables.book[blocks.GENERATION])
        limits = core.store.limits.disk
        later = Core(arenas=1, disk=limits, drive=core.drive.successor(), first_generation=generation, clock=core.clock)
        client, namespace = begin(later)
        for at in range(open_at + steps):
            if at == open_at:
                later.store.open_disk(*later.drive.found())
            if at == 4:
                (client.put if whole else client.reserve)(namespace, keys[:3])
            later.pass_time(MS)
            if later.drive.waiting:
                later.work()
        if rebuilt:
            later.drive.rebuild()
        last = successor(later)
        client, namespace = begin(last)
        assert fetch(client, namespace, keys) == 6, f"it ended after {steps} steps"


def test_whoever_stores_again_what_disk_turns_out_to_have_is_told_so_and_everybody_finds_it() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(6)
    put(client, namespace, keys)
    later = Core(arenas=1, disk=core.store.limits.disk, drive=core.drive.successor(), clock=core.clock)
    client, namespace = begin(later)
    tickets = client.begin(namespace, keys[:3])
    later.store.open_disk(*later.drive.found())
    later.settle()
    assert fetch(client, namespace, keys) == 6
    client.commit(tickets)
    later.settle()
    assert [client.outcome(ticket) for ticket in tickets] == [Ended.DISCARDED] * 3
    assert fetch(client, namespace, keys) == 6
    later.audit()


def test_a_namespace_of_a_later_life_has_a_number_of_its_own_in_the_index() -> None:
    core = make()
    client, before = begin(core, "before")
    put(client, before, chain(3))
    later = successor(core)
    client, after = begin(later, "after")
    put(client, after, chain(3))
    last = successor(later)
    for model in ("before", "after"):
        client, namespace = begin(last, model)
        assert fetch(client, namespace, chain(3)) == 3, model


def test_blocks_whose_parent_is_lost_are_dropped_at_start() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(8)
    put(client, namespace, keys)
    (place,) = core.drive.chunks
    records = bytearray(core.drive.chunks[place])
    row = core.store.tables.blocks[core.row(namespace, keys[3])]
    slot = int(row["disk"]) & ((1 << int(core.store.tables.book[blocks.SHIFT])) - 1)
    records[slot * 72 : slot * 72 + 72] = bytes(72)
    core.drive.chunks[place] = bytes(records)
    later = successor(core)
    assert (later.store.disk.recovered.blocks, later.store.disk.recovered.orphans) == (3, 4)
    client, namespace = begin(later)
    assert fetch(client, namespace, keys) == 3


def test_a_smaller_limit_is_kept_before_the_first_write() -> None:
    core = make(disk_bytes=8 * SEGMENT_BYTES)
    client, namespace = begin(core)
    for name in "ab":
        put(client, namespace, chain(16, name))
    assert len(core.drive.files) == 4
    later = successor(core, disk_bytes=2 * SEGMENT_BYTES)
    assert later.store.disk.recovered.surplus == 2
    later.work_all()
    assert len(later.drive.files) == 2
    client, namespace = begin(later)
    put(client, namespace, chain(16, "d"))
    assert len(later.drive.files) == 2
    later.audit()


def test_a_full_disk_gives_up_its_oldest_leaves() -> None:
    core = make(disk_bytes=3 * SEGMENT_BYTES)
    client, namespace = begin(core)
    for i in range(8):
        put(client, namespace, chain(6, i))
        core.clock.advance(SECOND)
    core.audit()
    assert len(core.drive.files) == 3
    assert fetch(client, namespace, chain(6, 7)) == 6
    assert fetch(client, namespace, chain(6, 6)) == 6
    assert fetch(client, namespace, chain(6, 0)) == 0


def test_a_disk_that_takes_no_more_segments_costs_copies_and_no_stores() -> None:
    core = make()
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, MakeSegment) else None
    client, namespace = begin(core)
    put(client, namespace, chain(16))
    assert client.fetch(namespace, chain(16)) == 16
    assert core.store.disk.demotion.tally.dropped > 0
    core.drive.fault = lambda _order: None
    core.pass_time(11 * SECOND)
    put(client, namespace, chain(4, "later"))
    assert core.drive.saves >= 4, "it heals"
    core.audit()


def test_a_failed_commit_is_tried_again() -> None:
    core = make()
    failing = [True]
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Commit) and failing[0] else None
    client, namespace = begin(core)
    put(client, namespace, chain(4))
    assert not core.drive.chunks
    failing[0] = False
    core.pass_time(2 * SECOND)
    core.work_all()
    assert core.drive.chunks
    assert successor(core).store.disk.recovered.blocks == 4


def test_a_segment_that_vanishes_takes_its_blocks_with_it_and_no_others() -> None:
    core = make(arenas=1)
    client, namespace = begin(core)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    segment = core.store.disk.segments.number_at(
        int(core.store.tables.blocks["disk"][core.row(namespace, first[0])])
        >> int(core.store.tables.book[blocks.SHIFT])
    )
    del core.drive.files[segment]
    core.store.disk.lost(segment, core.clock.ns)
    core.work_all()
    core.audit()
    assert fetch(client, namespace, first) == 0
    assert fetch(client, namespace, second) == 16


def test_places_that_never_come_free_hold_up_writing_for_a_second_and_others_give_way() -> None:
    """As where a drive hangs that was to erase them."""
    core = make(disk_bytes=4 * SEGMENT_BYTES)  # twice as much as DRAM has
    core.drive.drives = 4  # a segment each: those that give way first lie elsewhere
    client, namespace = begin(core)
    for number in range(64):
        put(client, namespace, chain(1, f"before {number}"))
    client.delete(namespace, [*chain(1, "before 62"), *chain(1, "before 63")])
    core.finish_all()
    core.store.tick()
    hung = next(batch for batch in core.drive.waiting if isinstance(batch[0], Erase))
    core.drive.waiting.remove(hung)
    key = chain(1, "new")
    client.put(namespace, key)

    def written_within(ms: int) -> bool:
        for _ in range(ms // 10):
            core.pass_time(10 * MS)
            while core.drive.waiting:
                core.work()
        return key[0] in [header.key for header in core.drive.headers()]

    assert not written_within(900)
    assert written_within(1000)
    core.drive.waiting.append(hung)
    core.work_all()
    core.audit()


@pytest.mark.parametrize("codec", [Wish.RAW, Wish.BF16_PLANES_ZSTD], ids=["raw", "packed"])
@pytest.mark.parametrize("limited", [True, False], ids=["a limit", "none"])
def test_the_write_budget_holds_and_is_used(codec: Wish, limited: bool) -> None:
    """More is stored, for a minute. What is packed counts once, and by what it takes on disk."""
    pages_per_s, seconds = 8, 60
    core = make(
        arenas=4, disk_bytes=200 * SEGMENT_BYTES, codec=codec, write_bytes_per_s=pages_per_s * PAGE_BYTES * limited
    )
    client = core.client()
    namespace = client.open(block_bytes=3 * PAGE_BYTES)
    for second in range(seconds):
        for part in range(4):
            client.put(namespace, chain(2, f"{second}/{part}"))
            core.pass_time(250 * MS)
            while core.drive.waiting:
                core.work()
    written = core.store.disk.demotion.tally.saved_bytes // PAGE_BYTES
    budget = pages_per_s * seconds
    assert (written > 1.2 * budget) is not limited, "the control: without one it is more"
    assert written > 0.9 * budget
    core.audit()


def lose_power(seed: int) -> tuple[int, int]:
    """Store chains, flush some, lose power at any moment, and look in the next life, where every byte is compared.
    How many blocks had been flushed, all of which are back, and how many are back in all.
    """
    rng = random.Random(seed)
    core = make(admission=Admission.NONE, disk_bytes=16 * SEGMENT_BYTES)
    client, namespace = begin(core)
    durable: list[list[bytes]] = []
    for i in range(rng.randrange(2, 6)):
        keys = chain(rng.randrange(1, 8), f"{seed}/{i}")
        put(client, namespace, keys)
        core.store.flush(client.session, namespace, i, 10 * SECOND)
        if rng.random() < 0.6:
            core.work_all()
            durable.append(keys)
        else:
            for _ in range(rng.randrange(4)):
                core.store.tick()
                if core.drive.waiting:
                    core.work(rng.randrange(len(core.drive.waiting)))
            break
    core.drive.lose_power(rng)
    if rng.random() < 0.5:
        core.drive.rebuild()
    later = successor(core)
    client, namespace = begin(later)
    for keys in durable:
        assert fetch(client, namespace, keys) == len(keys), f"seed {seed}"
    flushed = sum(map(len, durable))
    return flushed, flushed if durable and keys is durable[-1] else flushed + fetch(client, namespace, keys)


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_of_power_never_gives_wrong_bytes_and_keeps_what_was_flushed(seed: int) -> None:
    lose_power(seed)


def lose_power_often(seeds: range) -> list[tuple[int, int]]:
    """Once for each seed."""
    return [lose_power(seed) for seed in seeds]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_20000_losses_of_power(record_property: Recorder) -> None:
    found = np.array([each for part in at_once(lose_power_often, range(20, 20 + IMAGES)) for each in part])
    flushed, back = found.sum(axis=0).tolist()
    record_property("images", len(found))
    record_property("flushed_blocks_back", flushed)
    record_property("other_blocks_back", back - flushed)
    assert flushed >= 3 * len(found), "too little was flushed to prove anything"
    assert back > flushed, "what was not flushed is never there: nothing is torn"


def test_a_scrub_finds_what_is_damaged_before_anybody_reads_it() -> None:
    core = make()
    client, namespace = begin(core)
    first, second = chain(12, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    damage(core, namespace, first[5])  # on disk alone
    damage(core, namespace, second[9])  # in DRAM too
    saves = core.drive.saves
    core.store.disk.scrub.begin(0)
    core.work_all()
    report = core.store.disk.scrub.report()
    assert (report.running, report.damaged) == (False, 2)
    assert 20 < report.done_blocks <= 28, "what continued a damaged block was dropped with it"
    assert report.done_bytes == report.done_blocks * 2 * PAGE_BYTES
    core.audit()
    assert core.drive.saves == saves + 1, "what is in DRAM too is written anew"
    assert fetch(client, namespace, first) == 5
    assert fetch(client, namespace, second) == 16
    core.store.disk.scrub.begin(0)
    core.work_all()
    assert core.store.disk.scrub.report().damaged == 0


@pytest.mark.parametrize("limited", [True, False], ids=["a limit", "none"])
def test_a_scrub_keeps_its_rate(limited: bool) -> None:
    blocks_per_s, seconds = 4, 10
    core = make(arenas=8, disk_bytes=20 * SEGMENT_BYTES)
    client, namespace = begin(core)
    for number in range(10):
        put(client, namespace, chain(10, str(number)))
    core.store.disk.scrub.begin(blocks_per_s * 2 * PAGE_BYTES * limited)
    for _ in range(10 * seconds):
        core.pass_time(100 * MS)
        while core.drive.waiting:
            core.work()
    done = core.store.disk.scrub.report().done_blocks
    assert done == 100 if not limited else 0.8 * blocks_per_s * seconds < done < 1.2 * blocks_per_s * seconds
    core.audit()


def test_a_scrub_begins_by_itself() -> None:
    core = make(scrub_bytes_per_s=MIB)
    client, namespace = begin(core)
    put(client, namespace, chain(16))
    core.pass_time(scrub.PAUSE_NS - SECOND)
    core.work_all()
    assert core.store.disk.scrub.report().done_blocks == 0
    for _ in range(50):
        core.pass_time(100 * MS)
        while core.drive.waiting:
            core.work()
    assert core.store.disk.scrub.report().done_blocks == 16
    core.audit()


def test_a_delete_while_the_index_is_being_read_reaches_what_it_knows() -> None:
    core = make()
    client, namespace = begin(core)
    keys = chain(8)
    put(client, namespace, keys)
    later = Core(arenas=1, disk=core.store.limits.disk, drive=core.drive.successor(), clock=core.clock)
    client, namespace = begin(later)
    client.put(namespace, chain(2, "new"))
    answers = client.delete(namespace, [*keys[:1], *chain(2, "new")[1:]])
    reports: list[ClearReport] = []
    later.settle()
    assert answers == []
    later.open_disk()
    later.work_all()
    assert answers == [9]
    assert fetch(client, namespace, keys) == 0
    assert fetch(client, namespace, chain(2, "new")) == 1
    later.store.clear(ClearScope(), reports.append, dry_run=False)
    later.work_all()
    assert [report.blocks for report in reports] == [1]
