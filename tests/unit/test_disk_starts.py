"""What a start does with segments and places that it does not take over: nothing deleted comes back out of them, and
nothing durable is lost or called durable for them.
"""

from dataclasses import replace

import numpy as np
import pytest

from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.sessions import Namespace
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits, DiskState
from kvstore.tier.format import UNREAD
from kvstore.tier.orders import DropSegment, Order, Outcome
from tests.core import MS, SECOND, Client, Core, chain
from tests.unit.test_disk_regressions import SEGMENT_BYTES, make, put, successor, warm_successor


def flushed(core: Core, client: Client, namespace: Namespace, number: int) -> tuple[int, int, int, int]:
    """FLUSH, and its answer."""
    said = core.store.flush(client.session, namespace, number, 10 * SECOND)
    for _ in range(200):
        if said is not None:
            return said
        core.work_all()
        core.pass_time(50 * MS)
        said = next((counts for _, request, counts in core.outbox.flushed if request == number), None)
    raise AssertionError("FLUSH is never answered")


def with_limits(core: Core, limits: DiskLimits) -> Core:
    """A new daemon on the same disk, DRAM lost, its disk not open yet."""
    return Core(
        arenas=1, disk=limits, drive=core.drive.successor(), clock=core.clock,
        first_generation=int(core.store.tables.book[blocks.GENERATION]),
    )  # fmt: skip


def filled() -> Core:
    """Four segments, the first one touched longest ago, of blocks 0/0 to 3/7."""
    core, client, namespace = make(segments=4)
    for name in range(4):
        put(client, namespace, chain(8, name))
        core.clock.advance(10 * SECOND)
    assert flushed(core, client, namespace, 1) == (32, 0, 0, 0)
    assert len(core.drive.files) == 4
    return core


def removals(core: Core) -> list[int]:
    return [batch[0].segment for batch in core.drive.waiting if isinstance(batch[0], DropSegment)]


def work_but_removals(core: Core) -> None:
    for _ in range(100):
        core.pass_time(10 * MS)
        for i, batch in enumerate(core.drive.waiting):
            if not isinstance(batch[0], DropSegment):
                core.work(i)
                break


# -- segments beyond a lowered limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [False, True])
def test_a_delete_waits_until_a_segment_beyond_a_lowered_limit_is_gone(*, removed: bool) -> None:
    core = filled()
    limits = core.store.limits.disk
    lowered = with_limits(core, replace(limits, disk_bytes=3 * SEGMENT_BYTES))
    lowered.open_disk()
    (surplus,) = removals(lowered)
    if removed:
        lowered.work_all()
    client = lowered.client()
    namespace = client.open()
    answers = client.delete(namespace, chain(1, 0))
    work_but_removals(lowered)
    assert answers == ([0] if removed else []), "what was deleted lies in a file that is there"
    lowered.work_all()
    assert answers == [0]
    assert surplus not in lowered.drive.files
    assert surplus not in {segment for segment, _ in lowered.drive.chunks}, "the index has forgotten it"
    lowered.audit()
    raised = with_limits(lowered, limits)
    raised.open_disk()
    client = raised.client()
    assert client.match(client.open(), chain(8, 0)) == 0
    assert client.match(client.open(), chain(8, 1)) == 8


def test_a_segment_beyond_a_lowered_limit_that_could_not_be_removed_is_removed_by_the_next_delete() -> None:
    lowered = with_limits(filled(), DiskLimits(3 * SEGMENT_BYTES, SEGMENT_BYTES, row_bytes=2 * PAGE_BYTES))
    lowered.open_disk()
    (surplus,) = removals(lowered)

    def refused(order: Order) -> Outcome | None:
        return Outcome.FAILED if isinstance(order, DropSegment) else None

    lowered.drive.fault = refused
    lowered.work_all()
    assert surplus in lowered.drive.files
    lowered.drive.fault = lambda _order: None
    client = lowered.client()
    assert client.delete(client.open(), chain(1, 0)) == []
    assert removals(lowered) == [surplus]
    lowered.work_all()
    assert surplus not in lowered.drive.files


def test_segments_of_another_size_leave_with_a_delete_of_their_tenant() -> None:
    core = filled()
    larger = with_limits(core, DiskLimits(8 * SEGMENT_BYTES, 2 * SEGMENT_BYTES, row_bytes=2 * PAGE_BYTES))
    larger.open_disk()
    assert larger.store.disk.recovered.unknown == 4
    other = larger.client("other")
    assert other.delete(other.open(), chain(1, 0)) == [0], "nothing of theirs lies there"
    client = larger.client()
    answers = client.delete(client.open(), chain(1, 0))
    assert answers == []
    larger.work_all()
    assert answers == [0]
    as_before = with_limits(larger, core.store.limits.disk)
    as_before.open_disk()
    client = as_before.client()
    assert client.match(client.open(), chain(8, 0)) == 0


# -- headers that could not be read ------------------------------------------------------------------------------------


def unread_at_start(core: Core, *, marked: bool) -> Core:
    """The next life, in which an index made anew lacks the last block of chain 0: its header could not be read."""
    row = core.row(core.client().open(), chain(8, 0)[-1])
    generation = int(core.store.tables.blocks["generation"][row])
    later = with_limits(core, core.store.limits.disk)
    later.drive.rebuild()
    found, names, foreign, next_segment = later.drive.found()
    for one in found:
        records = one.records
        assert isinstance(records, np.ndarray)
        slots = records["generation"] == generation
        records[slots] = np.zeros((), records.dtype)
        if marked:
            records["namespace"][slots] = UNREAD
    later.store.open_disk(found, names, foreign, next_segment)
    while later.store.disk.state is not DiskState.SERVING:
        later.store.tick()
    later.work_all()
    later.audit()
    return later


@pytest.mark.parametrize("marked", [True, False])
def test_a_header_that_could_not_be_read_is_left_alone_and_back_at_the_next_start(*, marked: bool) -> None:
    later = unread_at_start(filled(), marked=marked)
    client = later.client()
    assert client.match(client.open(), chain(8, 0)) == 7
    assert len(later.drive.headers()) == (32 if marked else 31), "what the index lacks otherwise is erased"
    for name in range(4, 8):  # and its place takes no other block
        put(client, client.open(), chain(8, name))
    later.audit()
    last = with_limits(later, later.store.limits.disk)
    last.drive.rebuild()
    last.open_disk()
    generations = {header.generation for header in last.drive.headers()}
    assert len(generations) == len(last.drive.headers())
    last.audit()


def test_a_header_that_could_not_be_read_is_erased_before_a_delete_of_its_tenant_is_answered() -> None:
    later = unread_at_start(filled(), marked=True)
    other = later.client("other")
    assert other.delete(other.open(), chain(1, 0)) == [0]
    assert len(later.drive.headers()) == 32
    client = later.client()
    answers = client.delete(client.open(), chain(8, 0)[-1:])
    assert answers == []
    later.work_all()
    assert answers == [0]
    assert len(later.drive.headers()) == 31
    later.audit()
    last = with_limits(later, later.store.limits.disk)
    last.drive.rebuild()
    last.open_disk()
    client = last.client()
    assert client.match(client.open(), chain(8, 0)) == 7


def test_a_segment_with_a_header_that_could_not_be_read_can_be_emptied() -> None:
    later = unread_at_start(filled(), marked=True)
    segments = later.store.disk.segments
    for position in list(segments.position_of.values()):
        segments.drain(position)
        later.work_all()
        later.pass_time(SECOND)
        later.work_all()
        later.audit()
    assert not later.drive.files
    client = later.client()
    assert client.delete(client.open(), chain(8, 0)) == [0]
    later.audit()


# -- what continues a block that is in DRAM alone ----------------------------------------------------------------------


@pytest.mark.parametrize("drained", [True, False])
def test_what_continues_a_block_in_dram_alone_is_not_durable_after_a_restart(*, drained: bool) -> None:
    core, client, namespace = make(admission=Admission.NONE)
    a, b, c = chain(3)
    client.put(namespace, [a])
    flushed(core, client, namespace, 1)
    client.put(namespace, chain(7, "fill"))
    flushed(core, client, namespace, 2)  # the first segment is full
    client.put(namespace, [b], a)
    flushed(core, client, namespace, 3)
    client.lease(namespace, [a], ttl_ns=50 * SECOND)
    for i in range(16):
        client.put(namespace, chain(1, f"other {i}"))
    core.work_all()
    table = core.store.tables.blocks
    assert (table["state"][core.row(namespace, a)], table["state"][core.row(namespace, b)]) == (
        blocks.RESIDENT,
        blocks.DISK,
    )
    if drained:  # as when another tenant needs room
        place, shift = int(table["disk"][core.row(namespace, a)]), int(core.store.tables.book[blocks.SHIFT])
        core.store.disk.segments.drain(place >> shift)
        core.work_all()
        core.pass_time(SECOND)
        core.work_all()
    later = warm_successor(core)
    later.open_disk()
    later.work_all()  # what was kept is verified
    later.audit()
    client = later.client()
    namespace = client.open()
    table = later.store.tables.blocks
    assert bool(table["flags"][later.row(namespace, b)] & blocks.DURABLE) is not drained
    client.put(namespace, [b, c], a)
    assert flushed(later, client, namespace, 4) == (1, 0, 0, 0)
    later.audit()
    last = successor(later)
    client = last.client()
    assert client.match(client.open(), [a, b, c]) == 3, "what was called durable is back"


# -- what lies on disk goes before what was stored while nobody knew of it ---------------------------------------------


@pytest.mark.parametrize("kills", [1, 2, 3])
@pytest.mark.parametrize("served", [False, True])
def test_what_is_durable_goes_before_what_was_stored_by_lives_that_ended_before_the_disk_was_open(
    kills: int, *, served: bool
) -> None:
    """The index takes long, and clients store some of it anew; the daemon is killed and goes on with its memory."""
    core, client, namespace = make()
    keys = chain(6)
    put(client, namespace, keys)
    later = with_limits(core, core.store.limits.disk)
    client = later.client()
    client.put(client.open(), keys[:3])
    if served:  # the control: it knew
        later.open_disk()
    for kill in range(kills):
        later = warm_successor(later)
        client = later.client()
        client.put(client.open(), chain(1, f"after kill {kill}"))
    later.open_disk()
    later.audit()
    client = later.client()
    assert client.match(client.open(), keys) == 6
    assert later.store.disk.recovered.orphans == 0
    later.work_all()
    later.audit()
    last = successor(later)
    client = last.client()
    assert client.match(client.open(), keys) == 6, "all of it was durable"


def test_what_was_deleted_and_stored_again_goes_before_what_the_index_has_of_it_once_the_disk_was_known() -> None:
    core, client, namespace = make()
    keys = chain(6)
    put(client, namespace, keys)
    warm = warm_successor(core)  # killed before its disk was open
    warm = warm_successor(warm)
    warm.open_disk()
    warm.work_all()
    client = warm.client()
    namespace = client.open()
    answers = client.delete(namespace, keys[:1])
    warm.work_all()
    assert answers == [6]
    chunks = dict(core.drive.chunks)
    put(client, namespace, keys[:2])
    generation = int(warm.store.tables.blocks["generation"][warm.row(namespace, keys[0])])
    warm.drive.chunks = chunks
    last = warm_successor(warm)
    last.open_disk()
    last.audit()
    client = last.client()
    namespace = client.open()
    assert client.match(namespace, keys) == 2, "what was deleted stays so"
    assert int(last.store.tables.blocks["generation"][last.row(namespace, keys[0])]) == generation
