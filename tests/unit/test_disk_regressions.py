"""What the simulation found in the disk tier and in restarts, each as small as it gets."""

from collections.abc import Generator

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.blocks import U4
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from kvstore.tier import commits, demotion, flushing, recovery
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.flushing import Flush, Flushing, Mask
from kvstore.tier.format import RECORD
from kvstore.tier.orders import Commit, Load, MakeSegment, Outcome, Pack, Save
from tests.core import MS, SECOND, Client, Core, Held, chain, value_of

SEGMENT_BYTES = 18 * PAGE_BYTES


def make(
    arenas: int = 1, segments: int = 8, segment_bytes: int = SEGMENT_BYTES, admission: Admission = Admission.ALL,
    slice_steps: int = 2048,
) -> tuple[Core, Client, Namespace]:  # fmt: skip
    """A store, a client and a namespace."""
    limits = DiskLimits(segments * segment_bytes, segment_bytes, admission, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=arenas, disk=limits, slice_steps=slice_steps)
    client = core.client()
    return core, client, client.open()


def put(client: Client, namespace: Namespace, keys: list[bytes], parent: bytes | None = None) -> None:
    """Store a chain, all of it, and let the disk follow."""
    assert set(client.put(namespace, keys, parent)) <= {Grant.GRANTED, Grant.KNOWN}
    client.core.work_all()


def successor(core: Core) -> Core:
    """A new daemon on the same disk, DRAM lost."""
    later = Core(
        arenas=1, disk=core.store.limits.disk, drive=core.drive.successor(), clock=core.clock,
        first_generation=int(core.store.tables.book[blocks.GENERATION]),
    )  # fmt: skip
    later.open_disk()
    return later


def warm_successor(core: Core, lease_ttl_ns_max: int = 60 * SECOND) -> Core:
    """A new daemon that is given the memory of the old one, which was killed. Its disk is not open yet."""
    limits = core.store.limits
    return Core(
        limits.dram_bytes // limits.arena_bytes, disk=limits.disk, drive=core.drive.successor(), clock=core.clock,
        memory=core.memory.successor(), lease_ttl_ns_max=lease_ttl_ns_max,
        first_generation=int(core.store.tables.book[blocks.GENERATION]),
    )  # fmt: skip


def test_segments_with_more_slots_than_arenas_do_not_confuse_who_lies_where() -> None:
    core, client, namespace = make(arenas=2, segment_bytes=42 * PAGE_BYTES, admission=Admission.NONE)
    put(client, namespace, chain(20))
    held = client.lease(namespace, chain(20))
    rows = [core.store.arenas.row_at(core.store.arenas.positions_by_id[arena], slot) for arena, slot in held.locations]
    assert rows == [core.row(namespace, key) for key in chain(20)]


def test_a_clear_finds_blocks_that_are_read_from_disk_behind_its_back() -> None:
    core, client, namespace = make(slice_steps=1)
    first, second = chain(8, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    reports: list[object] = []
    core.store.clear(ClearScope(), reports.append, dry_run=False)
    for _ in range(400):
        core.store.tick()
        held = client.ask(namespace, first, wait_ns=10 * SECOND)
        if isinstance(held, Held):
            client.release(held)
        if core.drive.waiting:
            core.work()
    core.work_all()
    assert reports
    assert client.match(namespace, first) == 0


@pytest.mark.timeout(20)
def test_a_chain_for_which_there_is_no_room_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demotion, "BATCH_BYTES", 4 * PAGE_BYTES)  # four blocks, as of 2 MiB
    core, client, namespace = make(admission=Admission.NONE)
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, MakeSegment) else None
    put(client, namespace, chain(12))
    core.store.flush(client.session, namespace, 1, SECOND)
    core.work_all()
    assert core.outbox.flushed == [(client.session, 1, (0, 12, 0, 0))]


@pytest.mark.timeout(20)
def test_a_chain_of_blocks_not_worth_reading_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demotion, "BATCH_BYTES", 4 * PAGE_BYTES)
    core, client, namespace = make()
    core.store.disk.demotion.took(1.0, 1 << 20)
    namespace.recompute_ns = 1000
    put(client, namespace, chain(12))
    assert core.drive.saves == 0


@pytest.mark.timeout(20)
def test_a_chain_longer_than_the_disk_is_not_written_again_and_again() -> None:
    core, client, namespace = make(arenas=2, segments=1, admission=Admission.NONE)
    put(client, namespace, chain(8))
    core.store.flush(client.session, namespace, 1, SECOND)
    core.work_all()
    put(client, namespace, chain(12, "b"))
    core.store.flush(client.session, namespace, 2, SECOND)
    core.work_all()
    assert core.drive.saves <= 20
    core.audit()


def test_a_flush_calls_nothing_durable_whose_parent_is_not() -> None:
    core, client, namespace = make(admission=Admission.NONE)
    keys = chain(2)
    failing = [True]
    core.drive.fault = lambda order: (
        Outcome.FAILED if isinstance(order, Save) and order.header.key == keys[0] and failing[0] else None
    )
    put(client, namespace, keys)
    core.store.flush(client.session, namespace, 1, SECOND)
    core.work_all()
    failing[0] = False
    durable = core.outbox.flushed[0][2][0]
    later = successor(core)
    there = later.client()
    assert there.match(there.open(), keys) >= durable


def test_a_rebuild_does_not_bring_back_what_was_deleted_when_the_index_did_not_know_it() -> None:
    core, client, namespace = make()
    keys = chain(2)
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Commit) else None
    put(client, namespace, keys)  # written, and the daemon dies before the index hears of it
    core.drive.fault = lambda _order: None
    later = successor(core)
    client = later.client()
    namespace = client.open()
    answers = client.delete(namespace, keys)
    later.work_all()
    assert answers == [0]
    later.drive.rebuild()
    last = successor(later)
    client = last.client()
    assert client.match(client.open(), keys) == 0


def test_what_continues_a_block_that_was_written_again_elsewhere_is_found_after_a_rebuild() -> None:
    core, client, namespace = make(admission=Admission.NONE)
    keys = chain(2)
    put(client, namespace, keys[:1])
    core.store.flush(client.session, namespace, 1, SECOND)
    core.work_all()
    put(client, namespace, chain(7, "rest"))
    core.store.flush(client.session, namespace, 2, SECOND)
    core.work_all()  # the first segment is full
    put(client, namespace, keys[1:], keys[0])
    core.store.flush(client.session, namespace, 3, SECOND)
    core.work_all()
    first = core.drive.headers()[0].segment
    del core.drive.files[first], core.drive.synced[first]
    core.store.disk.lost(first, core.clock.ns)
    core.work_all()
    core.store.disk.demotion.admit(
        [core.row(namespace, keys[0])], [int(core.store.tables.blocks["generation"][core.row(namespace, keys[0])])]
    )
    core.work_all()
    core.pass_time(SECOND)
    core.work_all()
    core.drive.rebuild()
    later = successor(core)
    there = later.client()
    assert there.match(there.open(), keys) == 2


def test_a_stream_whose_time_is_over_still_protects_what_it_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tier.loading.LOAD_BYTES", PAGE_BYTES)
    core, client, namespace = make()
    first, second = chain(6, "first"), chain(16, "second")
    put(client, namespace, first)
    put(client, namespace, second)
    held = client.ask(namespace, first, ttl_ns=30 * SECOND, wait_ns=100 * MS)
    assert isinstance(held, Held)
    loads = [batch for batch in core.drive.waiting if isinstance(batch[0], Load)]
    key_of_load = {batch[0].key: batch for batch in loads}  # type: ignore[union-attr]
    core.work(core.drive.waiting.index(key_of_load[first[0]]))  # the first comes
    core.pass_time(200 * MS)  # the time is over
    locations = [place for ready in core.outbox.readies for place in ready.locations]
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) and order.key == first[1] else None
    core.work_all()
    core.drive.fault = lambda _order: None
    put(client, namespace, chain(12, "third"))
    arena, _ = locations[0]
    client.maps.setdefault(arena, core.memory.map(arena))
    whole = Held(held.number, held.deadline_ns, locations)
    assert client.read(namespace, whole) == value_of(first[0], namespace.identity.block_bytes)


def test_places_without_a_block_do_not_count_against_those_that_may_lie_on_disk() -> None:
    limits = DiskLimits(2 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=4 * PAGE_BYTES)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    namespace = client.open()
    put(client, namespace, chain(8, "old"))
    core.clock.advance(SECOND)
    put(client, namespace, chain(1, "young"))
    assert limits.rows == len(core.drive.headers()) == 9, "of 16 places"
    there = successor(core).client()
    assert there.match(there.open(), chain(1, "young")) == 1
    assert there.match(there.open(), chain(8, "old")) == 8


def test_a_row_that_waited_to_be_written_when_it_was_freed_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    core, client, namespace = make()
    other = client.open(64, "other")
    put(client, namespace, chain(1, "first"))  # so that there is a segment
    monkeypatch.setattr(demotion, "RUNNING_BYTES", 0)
    put(client, namespace, chain(2))
    client.delete(namespace, chain(1))  # both rows are free, and the second still says that it continues the first
    core.work_all()
    put(client, other, chain(1, "new"))  # takes the first
    monkeypatch.undo()
    core.work_all()
    assert [header.digest for header in core.drive.headers()] == [namespace.digest, other.digest]


def test_a_delete_of_what_is_being_packed_is_answered() -> None:
    limits = DiskLimits(SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.BF16_PLANES_ZSTD)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    namespace = client.open()
    put(client, namespace, chain(8, "first"))
    put(client, namespace, chain(8, "second"))
    put(client, namespace, chain(8, "third"))  # written over the first
    client.put(namespace, chain(1, "fourth"))
    core.store.tick()
    assert any(isinstance(batch[0], Pack) for batch in core.drive.waiting)
    answers = client.delete(namespace, chain(1, "fourth"))
    core.work_all()
    assert answers == [1]


@pytest.mark.timeout(20)
def test_an_arena_with_chains_deeper_than_a_slice_is_emptied() -> None:
    core = Core(arenas=2, slice_steps=1)
    client = core.client()
    client.put(client.open(), chain(32))
    large = client.open(5000, "large")
    client.put(large, chain(1, "large"))  # asks for an arena
    core.settle()
    assert client.put(large, chain(1, "large")) == [Grant.GRANTED]
    core.audit()


def test_blocks_under_one_that_was_being_dropped_are_withheld_too() -> None:
    core = Core(arenas=1, slice_steps=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8))
    held = client.lease(namespace, chain(8), ttl_ns=10 * SECOND)
    client.delete(namespace, chain(1))  # and the daemon dies before it has dropped what continues that
    before = [client.read(namespace, held, i) for i in range(8)]
    later = warm_successor(core)
    later.audit()
    newcomer = later.client()
    assert newcomer.put(newcomer.open(), chain(16, "new")).count(Grant.GRANTED) == 8
    assert [client.read(namespace, held, i) for i in range(8)] == before


def test_leases_of_a_former_life_that_allowed_longer_ones_run_to_their_end() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(16))
    held = client.lease(namespace, chain(16), ttl_ns=10 * SECOND)
    before = [client.read(namespace, held, i) for i in range(16)]
    later = warm_successor(core, lease_ttl_ns_max=SECOND)
    later.pass_time(9 * SECOND)
    later.work_all()  # nothing is held any more for being verified
    newcomer = later.client()
    newcomer.put(newcomer.open(), chain(16, "new"))
    assert [client.read(namespace, held, i) for i in range(16)] == before


def test_a_kept_block_is_not_taken_for_a_child_of_what_took_its_parents_row() -> None:
    core, client, namespace = make()
    keys = chain(2)
    client.begin(namespace, keys[:1])  # never committed
    client.put(namespace, keys[1:], keys[0])
    later = warm_successor(core)
    client = later.client()
    namespace = client.open()
    client.put(namespace, chain(1, "new"))  # before the disk is open
    assert later.row(namespace, chain(1, "new")[0]) == 1, "the row of the parent"
    later.open_disk()
    assert later.store.kept.lost == 1
    assert client.match(namespace, keys[1:]) == 0


def test_kept_blocks_of_a_life_that_ended_before_its_disk_was_open_do_not_use_up_rows() -> None:
    core, client, namespace = make()
    put(client, namespace, chain(6))
    put(client, namespace, chain(16, "others"))
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Save) else None
    client.put(namespace, chain(14))  # of which six lie on disk alone, and eight in DRAM alone
    core.drive.fault = lambda _order: None
    second = warm_successor(core)
    third = warm_successor(second)
    third.open_disk()
    third.audit()
    client = third.client()
    assert client.match(client.open(), chain(14)) == 6


def test_a_row_that_took_the_place_of_a_kept_one_during_recovery_is_not_called_durable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "SLICE", 1)
    core, client, namespace = make()
    put(client, namespace, chain(1))
    later = warm_successor(core)
    client = later.client()
    namespace = client.open()
    row = later.row(namespace, chain(1)[0])
    later.work_all()  # it is verified
    later.store.open_disk(*later.drive.found())
    while not later.store.tables.blocks["disk"][row]:
        later.store.tick()
    client.delete(namespace, chain(1))
    while later.store.tables.blocks["state"][row] != blocks.FREE:
        later.store.tick()
    client.put(namespace, chain(1, "new"))
    assert later.row(namespace, chain(1, "new")[0]) == row
    while later.store.disk.opening:
        later.store.tick()
    assert not later.store.tables.blocks["flags"][row] & blocks.DURABLE


def test_a_flush_waits_for_a_first_write_that_takes_longer_than_many_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    core, client, namespace = make(admission=Admission.NONE)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    monkeypatch.setattr(commits, "PATIENT_NS", commits.COMMIT_NS)
    client.put(namespace, chain(6))
    core.store.flush(client.session, namespace, 7, 60 * SECOND)
    while not any(isinstance(batch[0], Save) for batch in core.drive.waiting):
        core.pass_time(10 * MS)
        if isinstance(core.drive.waiting[0][0], MakeSegment):
            core.work()
    slow = core.drive.waiting[0]
    for _ in range(60):  # everything else goes on
        for index, batch in reversed(list(enumerate(core.drive.waiting))):
            if batch is not slow:
                core.work(index)
        core.pass_time(10 * MS)
    assert core.store.disk.commits.commits > commits.TRIES + 2, "many commits have passed"
    assert not core.outbox.flushed, "and nothing has failed"
    core.work_all()
    assert core.outbox.flushed == [(client.session, 7, (6, 0, 0, 0))]
    core.audit()


def test_commits_beside_writes_are_begun_for_who_waits_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    core, client, namespace = make(admission=Admission.NONE)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    client.put(namespace, chain(1))
    core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.work_all()
    client.put(namespace, chain(6, "long"))
    core.store.flush(client.session, namespace, 2, 60 * SECOND)
    begun = core.store.disk.commits.commits

    def work_all_but(slow: object) -> None:
        for _ in range(20):
            for index, batch in reversed(list(enumerate(core.drive.waiting))):
                if batch is not slow:
                    core.work(index)
            core.pass_time(10 * MS)

    core.pass_time(MS)
    slow = next(batch for batch in core.drive.waiting if isinstance(batch[0], Save))
    work_all_but(slow)
    assert core.store.disk.commits.commits == begun, "five blocks are written, and who waits wants the sixth as well"
    client.put(namespace, chain(1, "short"))
    core.store.flush(client.session, namespace, 3, 60 * SECOND)
    work_all_but(slow)
    assert core.outbox.flushed[1:] == [(client.session, 3, (1, 0, 0, 0))], "it is not made to wait for the sixth"
    core.work_all()
    assert core.outbox.flushed[2:] == [(client.session, 2, (6, 0, 0, 0))]
    core.audit()


@pytest.mark.parametrize("waits", [True, False])
def test_many_bytes_wait_for_the_writes_that_somebody_waits_for_and_many_blocks_do_not(
    monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    core, client, namespace = make(admission=Admission.NONE if waits else Admission.ALL)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    monkeypatch.setattr(demotion, "BUSY_BYTES_PER_S", 1 << 40)
    monkeypatch.setattr(commits, "COMMIT_BYTES", 1)
    monkeypatch.setattr(commits, "PATIENT_BLOCKS", 3)
    client.put(namespace, chain(6))
    if waits:
        core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.pass_time(MS)
    begun: list[int] = []  # after each write, in no time at all

    def write_one() -> None:
        core.work(next(i for i, batch in enumerate(core.drive.waiting) if isinstance(batch[0], Save)))
        core.pass_time(1)
        begun.append(sum(isinstance(batch[0], Commit) for batch in core.drive.waiting))

    while any(isinstance(batch[0], MakeSegment) for batch in core.drive.waiting):
        core.work()
        core.pass_time(MS)
    for _ in range(3):
        write_one()
    assert begun == ([0, 0, 1] if waits else [1, 1, 1])
    core.work_all()
    core.audit()


def test_a_flush_that_waits_is_not_counted_anew_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    core, client, namespace = make(admission=Admission.NONE)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    monkeypatch.setattr(flushing, "LOOK_ROWS", 2)
    looked: list[int] = []
    alive = Flushing._alive

    def look(self: Flushing, flush: Flush, part: slice = slice(None)) -> Mask:
        found = alive(self, flush, part)
        looked.append(found.size)
        return found

    monkeypatch.setattr(Flushing, "_alive", look)
    client.put(namespace, chain(7))
    core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.pass_time(MS)
    looked.clear()
    for _ in range(10):
        core.pass_time(MS)
    assert looked, "it waits"
    assert max(looked) == 2, "two rows tell that, and seven are more than two"
    core.work_all()
    assert core.outbox.flushed == [(client.session, 1, (7, 0, 0, 0))]
    assert max(looked) == 7, "the control: they are counted for the answer"
    core.audit()


@pytest.mark.parametrize(
    ("blocks_stored", "segments", "written_when_made"),
    [
        (12, 8, [0, 3]),  # with three of eight slots taken, since more wait than are left; then none is needed
        (8, 8, [0, 7]),  # no more wait than are left
        (12, 2, [0, 7]),  # an empty one may be missed
    ],
)
def test_a_segment_is_made_before_the_last_is_full_by_who_goes_on_writing(
    monkeypatch: pytest.MonkeyPatch, blocks_stored: int, segments: int, written_when_made: list[int]
) -> None:
    core, client, namespace = make(segments=segments, admission=Admission.NONE)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    monkeypatch.setattr(demotion, "HURRY_BYTES", 1)  # one at a time
    client.put(namespace, chain(blocks_stored))
    core.store.flush(client.session, namespace, 7, 60 * SECOND)
    waited: list[bool] = []  # for a segment, when it was made
    written: list[int] = []
    while not core.outbox.flushed:
        core.pass_time(10 * MS)
        if core.drive.waiting:
            if isinstance(core.drive.waiting[0][0], MakeSegment):
                waited.append(core.store.disk.demotion.stuck)
                written.append(len(core.drive.headers()))
            core.work()
    assert waited == [True] + [False] * (len(waited) - 1), "of the first, nobody knew that it would be wanted"
    assert written == written_when_made
    core.audit()


def test_a_flush_does_not_wait_for_what_continues_a_write_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    core, client, namespace = make(admission=Admission.NONE)
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)
    client.put(namespace, chain(6))
    first = core.row(namespace, chain(1)[0])
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Save) and order.row == first else None
    core.store.flush(client.session, namespace, 7, 60 * SECOND)
    begun_ns = core.clock.ns
    core.work_all()
    assert core.outbox.flushed == [(client.session, 7, (0, 6, 0, 0))]
    assert core.clock.ns - begun_ns < SECOND
    assert core.store.disk.commits.clean
    core.audit()


def test_what_is_looked_at_once_more_for_one_that_gives_up_is_not_left_open() -> None:
    """Of four blocks in a row the first and the third have lost their copies. The second has given up on that; the
    fourth, which gives up one commit later, has it looked at again.
    """
    core, client, namespace = make(admission=Admission.NONE)
    client.put(namespace, chain(4))
    core.store.flush(client.session, namespace, 7, 60 * SECOND)
    core.work_all()
    first, second, third, fourth = (core.row(namespace, key) for key in chain(4))
    tables, disk = core.store.tables, core.store.disk
    for row in (first, third):
        blocks.detach(tables, row)
    for row in (second, fourth):
        tables.blocks["flags"][row] &= ~np.uint32(blocks.DURABLE)
    last = tables.blocks[fourth]
    disk.commits._written.append((fourth, int(last["generation"]), int(last["disk"]), commits.TRIES))
    disk.commits.touch(int(last["disk"]), core.clock.ns)
    begun = disk.commits.commits
    core.work_all()
    assert disk.commits.clean
    assert disk.commits.commits > begun + 1, "the second was looked at after the fourth"
    core.audit()


@pytest.mark.parametrize(
    ("somebody_waits", "arenas", "writes"),
    [(True, 16, 5), (False, 16, 2), (True, 1, 2)],  # of memory for 8 blocks no more than a quarter is held
)
def test_more_is_on_its_way_to_disk_while_somebody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, somebody_waits: bool, arenas: int, writes: int
) -> None:
    core, client, namespace = make(arenas, 16, admission=Admission.NONE if somebody_waits else Admission.ALL)
    put(client, namespace, chain(1, "first"))  # so that there is a segment
    core.store.flush(client.session, namespace, 6, 60 * SECOND)
    core.work_all()
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    monkeypatch.setattr(demotion, "RUNNING_BYTES", 2 * 2 * PAGE_BYTES)  # a block and its header
    monkeypatch.setattr(demotion, "HURRY_BYTES", 5 * 2 * PAGE_BYTES)
    client.put(namespace, chain(7))
    if somebody_waits:
        core.store.flush(client.session, namespace, 7, 60 * SECOND)
    core.pass_time(40 * MS)
    assert sum(isinstance(batch[0], Save) for batch in core.drive.waiting) == writes
    core.work_all()
    core.audit()


def test_a_block_that_was_stored_again_is_back_though_the_index_still_knows_the_old_one() -> None:
    """As after a loss of power between two commits: what became durable first is the name's new place."""
    core, client, namespace = make(segments=4)
    put(client, namespace, chain(8, "old"))
    core.pass_time(SECOND)
    stale = np.frombuffer(core.drive.chunks[1, 0], dtype=RECORD).copy()
    stale["touched_s"] += 100  # segments that were touched last are taken over first
    client.delete(namespace, chain(8, "old"))
    core.work_all()
    put(client, namespace, chain(8, "between"))  # takes the places
    put(client, namespace, chain(8, "old"))
    core.pass_time(SECOND)
    core.work_all()
    table = core.store.tables.blocks
    young = [int(table["generation"][core.row(namespace, key)]) for key in chain(8, "old")]
    assert {core.drive.recorded(2, slot) for slot in range(8)} == {*young}
    core.drive.chunks[1, 0] = stale.tobytes()
    later = successor(core)
    client = later.client()
    namespace = client.open()
    table = later.store.tables.blocks
    assert [int(table["generation"][later.row(namespace, key)]) for key in chain(8, "old")] == young
    assert isinstance(client.ask(namespace, chain(8, "old"), wait_ns=SECOND), Held)


@pytest.mark.parametrize("becomes_anothers", [True, False])
def test_a_parent_whose_row_becomes_anothers_while_disk_is_read_is_nobodys_parent(
    monkeypatch: pytest.MonkeyPatch, *, becomes_anothers: bool
) -> None:
    core, client, namespace = make()
    put(client, namespace, chain(3))
    core.pass_time(SECOND)
    core.work_all()
    youngest_first = recovery.Recovery._youngest_first

    def meanwhile(self: recovery.Recovery, rows: U4) -> Generator[None, None, U4]:
        generations = self._tables.blocks["generation"]
        if becomes_anothers:
            generations[rows[generations[rows].argmin()]] = 1000  # the first of the chain
        return (yield from youngest_first(self, rows))

    monkeypatch.setattr(recovery.Recovery, "_youngest_first", meanwhile)
    there = successor(core).client()
    assert there.match(there.open(), chain(3)) == (1 if becomes_anothers else 3)
