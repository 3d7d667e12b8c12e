"""One of several drives hangs, or an index refuses: others are written to, erased and answered as if nothing were."""

from collections.abc import Callable

import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.tier import demotion
from kvstore.tier.orders import Commit, DropSegment, Erase, MakeSegment, Order, Outcome, Save
from kvstore.tier.segments import Segments
from tests.core import MS, SECOND, Client, Core, chain
from tests.unit.test_disk import SEGMENT_BYTES, make

Hangs = Callable[[Order], bool]
Counts = tuple[int, int, int, int]


def go_on(core: Core, seconds: float, hangs: Hangs = lambda _order: False) -> None:
    """Let time pass, while threads carry out all that does not hang."""
    for _ in range(int(seconds * 20)):
        core.pass_time(50 * MS)
        while True:
            core.finish_all()
            core.store.tick()
            due = [i for i, batch in enumerate(core.drive.waiting) if not hangs(batch[0])]
            if not due:
                break
            core.work(due[0])


def on(drive: int, core: Core, *kinds: type[Order]) -> Hangs:
    """Orders of these kinds to one drive."""

    def hangs(order: Order) -> bool:
        segment = order.header.segment if isinstance(order, Save) else getattr(order, "segment", -1)
        return isinstance(order, kinds) and core.drive.drive_of(segment) == drive

    return hangs


def on_disk(core: Core) -> int:
    """Blocks that lie there."""
    return sum(int(core.store.tables.pools["blocks"][pool.number]) for pool in core.store.disk.segments.pools.values())


def flushed(core: Core) -> Counts:
    """The last answer to a FLUSH."""
    return core.outbox.flushed[-1][2]


@pytest.mark.parametrize("hung", [True, False])
def test_a_segment_that_is_made_for_ever_holds_up_no_other_tenant(*, hung: bool) -> None:
    core = make(arenas=4)
    one, two = core.client("one"), core.client("two")
    mine, other = one.open(), two.open()
    one.put(mine, chain(2, "x"))  # a segment with six more places
    core.work_all()
    saves = core.drive.saves
    two.put(other, chain(1, "y"))
    one.put(mine, chain(3, "z"))
    core.store.flush(one.session, mine, 1, 30 * SECOND)
    go_on(core, 10, lambda order: hung and isinstance(order, MakeSegment))
    assert flushed(core) == (5, 0, 0, 0)
    assert core.drive.saves == saves + (3 if hung else 4)
    core.work_all()  # what was made late is used
    core.audit()


def test_another_segment_is_made_if_one_takes_long() -> None:
    core = make(arenas=4)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(3))
    core.store.tick()
    (hung,) = (batch[0] for batch in core.drive.waiting)
    go_on(core, 0.9, lambda order: order is hung)
    assert core.drive.saves == 0
    go_on(core, 0.3, lambda order: order is hung)
    assert core.drive.saves == 3
    core.work_all()
    core.audit()


def full(core: Core) -> Client:
    """A client that has filled the disk with chains of one block, a segment after the other."""
    client = core.client()
    namespace = client.open()
    for number in range(core.store.limits.disk.disk_bytes // SEGMENT_BYTES * 8):
        client.put(namespace, chain(1, number))
        core.work_all()
    return client


def store_each_second(core: Core, client: Client, seconds: int, hangs: Hangs) -> int:
    """Store a block in each: how many were written."""
    saves, namespace = core.drive.saves, client.open()
    for second in range(seconds):
        client.put(namespace, chain(1, f"new {second}"))
        go_on(core, 1, hangs)
    return core.drive.saves - saves


def test_a_full_disk_is_written_though_what_gives_way_first_lies_on_a_hung_drive() -> None:
    core = make(disk_bytes=16 * SEGMENT_BYTES)
    core.drive.drives = 2
    client = full(core)
    assert on_disk(core) == 128
    assert store_each_second(core, client, 20, on(1, core, Erase)) >= 18
    assert on_disk(core) >= 128 - 2 * 40, "no more gave way than is older than what was needed"
    core.work_all()
    core.audit()


@pytest.mark.parametrize("why", ["the only drive hangs", "the index refuses"])
def test_where_no_place_comes_free_no_more_give_way_than_once(why: str) -> None:
    core = make(disk_bytes=16 * SEGMENT_BYTES)
    client = full(core)
    if why == "the index refuses":
        core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Commit) else None
        store_each_second(core, client, 30, lambda _order: False)
    else:
        store_each_second(core, client, 30, on(0, core, Erase))
    assert on_disk(core) >= 128 - 128 // 16
    assert not core.store.disk.demotion.waiting, "what finds no place is given up"
    core.drive.fault = lambda _order: None
    go_on(core, 2)
    assert store_each_second(core, client, 3, lambda _order: False) == 3
    core.audit()


@pytest.mark.parametrize("hung", [True, False])
def test_writes_that_hang_keep_no_others_from_being_written(monkeypatch: pytest.MonkeyPatch, *, hung: bool) -> None:
    monkeypatch.setattr(demotion, "RUNNING_BYTES", 8 * PAGE_BYTES)
    core = make(arenas=8, disk_bytes=16 * SEGMENT_BYTES)
    core.drive.drives = 2
    client = core.client()
    namespace, hangs = client.open(), on(0, core, Save) if hung else lambda _order: False
    for number in range(40):
        client.put(namespace, chain(1, number))
        go_on(core, 0.2, hangs)
    assert core.store.disk.demotion.waiting == 0
    assert core.drive.saves == (24 if hung else 40), "three segments of five are on the other drive"
    core.work_all()
    assert core.drive.saves == 40
    core.audit()


def test_what_hangs_holds_a_part_of_dram_alone_and_stores_go_on() -> None:
    core = make(arenas=4)
    client = core.client()
    namespace, hangs = client.open(), on(0, core, Save)
    for number in range(200):
        assert client.put(namespace, chain(1, number)) == [Grant.GRANTED], number
        go_on(core, 0.2, hangs)
    assert core.drive.saves == 0
    core.work_all()
    core.audit()


@pytest.mark.parametrize("hung", [True, False])
def test_a_hung_drive_keeps_no_other_from_erasing_and_no_other_tenant_from_deleting(*, hung: bool) -> None:
    core = make(arenas=8, disk_bytes=16 * SEGMENT_BYTES)
    core.drive.drives = 2
    rich, poor = core.client("rich"), core.client("poor")
    mine, its = rich.open(), poor.open()
    for number in range(12):
        rich.put(mine, chain(8, number))
        core.work_all()
    poor.put(its, chain(8, "poor"))
    core.work_all()
    its_segments = {header.segment for header in core.drive.headers() if header.tenant == "poor"}
    drive = 1 - core.drive.drive_of(min(its_segments))
    hangs = on(drive, core, Erase) if hung else lambda _order: False
    late = rich.delete(mine, [key for number in range(12) for key in chain(1, number)])
    go_on(core, 0.1, hangs)
    assert bool(late) != hung, "answered when all of it is erased, and not before"
    left = {core.drive.drive_of(header.segment) for header in core.drive.headers() if header.tenant == "rich"}
    assert left == ({drive} if hung else set())
    answers = poor.delete(its, chain(8, "poor"))
    go_on(core, 0.1, hangs)
    assert answers == [8]
    core.work_all()
    assert late == [96]
    core.audit()


@pytest.mark.parametrize("hung", [True, False])
def test_a_delete_waits_for_no_write_of_another_tenant_that_hangs(*, hung: bool) -> None:
    core = make(arenas=4)
    core.drive.drives = 2
    one, two = core.client("one"), core.client("two")
    mine, other = one.open(), two.open()
    one.put(mine, chain(2, "x"))
    core.work_all()
    two.put(other, chain(2, "y"))
    core.work_all()
    hangs = on(1, core, Save) if hung else lambda _order: False
    one.put(mine, chain(1, "z"))
    core.store.tick()
    late = one.delete(mine, chain(1, "z"))  # while it is written
    answers = two.delete(other, chain(2, "y"))
    go_on(core, 0.1, hangs)
    assert answers == [2]
    assert bool(late) != hung
    core.work_all()
    assert late == [1]
    assert not [header for header in core.drive.headers() if header.key in chain(1, "z")]
    core.audit()


def test_a_delete_waits_for_what_its_tenant_gave_up_before() -> None:
    """It may be the same block, in a place that it gave up: where a start after a loss of power would find it."""
    core = make(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(2))
    core.work_all()
    row = core.row(namespace, chain(2)[1])
    blocks.detach(core.store.tables, row)
    hangs = on(0, core, Erase)
    go_on(core, 0.1, hangs)
    answers = client.delete(namespace, chain(2)[1:])
    go_on(core, 1, hangs)
    assert answers == []
    core.work_all()
    assert answers == [1]
    core.audit()


def drain(segments: Segments, core: Core) -> int:
    """Empty a segment, as for another tenant. Its number."""
    number = min(segments.position_of)
    segments.drain(segments.position_of[number])
    go_on(core, 0.2)
    return number


@pytest.mark.parametrize("fails", [True, False])
def test_a_segment_whose_file_could_not_be_removed_is_tried_again_and_its_place_kept(*, fails: bool) -> None:
    core = make(arenas=4, disk_bytes=3 * SEGMENT_BYTES)
    core.drive.fault = lambda order: Outcome.FAILED if fails and isinstance(order, DropSegment) else None
    client = core.client()
    namespace = client.open()
    for number in range(3):
        client.put(namespace, chain(8, number))
        core.work_all()
    number = drain(core.store.disk.segments, core)
    assert (number in core.drive.files) == fails
    client.put(namespace, chain(8, "more"))
    go_on(core, 5)
    assert len(core.drive.files) == 3, "no more than the limit allows"
    assert (number in core.drive.files) == fails
    core.drive.fault = lambda _order: None
    go_on(core, 2)
    assert number not in core.drive.files
    client.put(namespace, chain(8, "again"))
    core.work_all()
    assert len(core.drive.files) == 3
    assert sorted(core.drive.files) == sorted(core.store.disk.segments.position_of)
    core.audit()
