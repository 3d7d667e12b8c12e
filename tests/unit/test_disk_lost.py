"""A segment that goes with its drive while the daemon runs: the next life serves it again, if it is back by then."""

import pytest

from kvstore import blocks
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from kvstore.tier.demotion import Admission
from kvstore.tier.orders import WHOLE, DropSegment, Load, MakeSegment, Save
from tests.core import MS, SECOND, Client, Core, Held, chain
from tests.unit.test_disk import SLOTS, begin, fetch, make, put, successor

Kept = tuple[bytearray, bytes]


def segment_of(core: Core, namespace: Namespace, key: bytes) -> int:
    """Where a block lies."""
    place = int(core.store.tables.blocks["disk"][core.row(namespace, key)])
    return core.store.disk.segments.number_at(place >> int(core.store.tables.book[blocks.SHIFT]))


def lose(core: Core, segment: int) -> Kept:
    """Its drive goes. What lay there."""
    kept = core.drive.files.pop(segment), core.drive.synced.pop(segment)
    core.store.disk.lost(segment, core.clock.ns)
    return kept


def bring_back(core: Core, segment: int, kept: Kept) -> None:
    """Its drive is there again, as it was."""
    core.drive.files[segment], core.drive.synced[segment] = bytearray(kept[0]), kept[1]


def stored(core: Core) -> tuple[Client, Namespace, list[bytes], int]:
    """A segment that is full of durable blocks, and another: the client, keys in the first, and its number."""
    client, namespace = begin(core)
    keys = chain(SLOTS, "first")
    put(client, namespace, keys)
    put(client, namespace, chain(2 * SLOTS, "second"))
    return client, namespace, keys, segment_of(core, namespace, keys[0])


def test_what_nobody_deleted_is_served_again_by_the_next_life() -> None:
    core = make()
    client, namespace, keys, segment = stored(core)
    kept = lose(core, segment)
    core.work_all()
    core.audit()
    assert fetch(client, namespace, keys) == 0, "the control"
    bring_back(core, segment, kept)
    later = successor(core)
    there = later.client()
    assert fetch(there, there.open(), keys) == SLOTS
    assert fetch(there, there.open(), chain(2 * SLOTS, "second")) == 2 * SLOTS


def test_and_by_the_one_after_a_life_without_it() -> None:
    """The control: what a life that begins without it does to an index (`index_reader.py`) it does to this one."""
    core = make()
    _, _, keys, segment = stored(core)
    lose(core, segment)
    core.work_all()
    assert core.drive.chunks.keys() >= {(segment, 0)}, "the index still knows of it"
    later = successor(core)
    there = later.client()
    assert fetch(there, there.open(), keys) == 0
    assert fetch(there, there.open(), chain(2 * SLOTS, "second")) == 2 * SLOTS
    put(there, there.open(), chain(2 * SLOTS, "third"))
    assert segment not in later.drive.files, "its number is given to no other"


@pytest.mark.parametrize("when", ["before it goes", "before anybody has noticed", "while it is gone"])
def test_what_was_deleted_meanwhile_stays_deleted(when: str) -> None:
    core = make()
    client, namespace, keys, segment = stored(core)
    if when == "before it goes":
        kept = bytearray(core.drive.files[segment]), core.drive.synced[segment]
        assert client.delete(namespace, keys[-1:]) == []
        kept = lose(core, segment)
    elif when == "before anybody has noticed":
        kept = core.drive.files.pop(segment), core.drive.synced.pop(segment)
        client.delete(namespace, keys[-1:])
        core.finish_all()
        core.store.disk.lost(segment, core.clock.ns)
    else:
        kept = lose(core, segment)
        core.work_all()
        client.delete(namespace, keys[-1:])
    core.work_all()
    bring_back(core, segment, kept)
    for rebuilt in (False, True):
        if rebuilt:
            core.drive.rebuild()
        later = successor(core)
        there = later.client()
        assert later.row(there.open(), keys[-1]) == 0
        assert fetch(there, there.open(), keys[-1:]) == 0


@pytest.mark.parametrize("drop", [None, "t"])
def test_a_clear_takes_all_of_it(drop: str | None) -> None:
    core = make()
    _, _, keys, segment = stored(core)
    kept = lose(core, segment)
    core.work_all()
    core.store.clear(ClearScope(drop), lambda _: None, dry_run=False)
    core.work_all()
    assert core.drive.owed == {(segment, WHOLE)}, "not each of its places as well"
    bring_back(core, segment, kept)
    later = successor(core)
    there = later.client()
    assert fetch(there, there.open(), keys) == 0
    assert segment not in later.drive.files


def test_what_was_stored_anew_meanwhile_is_what_is_served() -> None:
    core = make()
    client, namespace, keys, segment = stored(core)
    old = int(core.store.tables.blocks["generation"][core.row(namespace, keys[0])])
    kept = lose(core, segment)
    core.work_all()
    put(client, namespace, keys[:2])
    new = int(core.store.tables.blocks["generation"][core.row(namespace, keys[0])])
    assert new > old
    bring_back(core, segment, kept)
    later = successor(core)
    there = later.client()
    space = there.open()
    assert int(later.store.tables.blocks["generation"][later.row(space, keys[0])]) == new
    assert fetch(there, space, keys[:2]) == 2
    later.work_all()
    assert (segment, 0) not in {(one.segment, one.slot) for one in later.drive.headers()}, "the old one is erased"


def test_what_still_lies_in_memory_is_written_elsewhere_and_kept_once() -> None:
    core = make(arenas=2)
    client, namespace = begin(core)
    keys = chain(SLOTS, "first")
    put(client, namespace, keys)
    segment = segment_of(core, namespace, keys[0])
    kept = lose(core, segment)
    core.work_all()
    held = client.ask(namespace, keys, wait_ns=SECOND)  # touched again: it is wanted on disk
    assert isinstance(held, Held)
    client.release(held)
    core.work_all()
    assert segment_of(core, namespace, keys[0]) != segment
    bring_back(core, segment, kept)
    later = successor(core)
    there = later.client()
    space = there.open()
    assert fetch(there, space, keys) == SLOTS
    assert later.store.disk.recovered.blocks == SLOTS
    answers = there.delete(space, keys)
    later.work_all()
    assert answers == [SLOTS]
    later.drive.rebuild()
    last = successor(later).client()
    assert last.match(last.open(), keys) == 0, "neither copy outlives it"


def hold_with_a_read(core: Core, client: Client, namespace: Namespace, key: bytes) -> None:
    """A drive that does not answer: the segment cannot be emptied."""
    client.ask(namespace, [key], wait_ns=SECOND)
    core.store.tick()
    assert any(isinstance(batch[0], Load) for batch in core.drive.waiting)


def work_but_reads(core: Core, ms: int) -> None:
    """All other orders end meanwhile."""
    for _ in range(ms // 10):
        while others := [at for at, batch in enumerate(core.drive.waiting) if not isinstance(batch[0], Load)]:
            core.work(others[0])
        core.pass_time(10 * MS)


def test_the_index_hears_nothing_of_it_while_it_is_being_emptied_either() -> None:
    core = make()
    client, namespace, keys, segment = stored(core)
    hold_with_a_read(core, client, namespace, keys[0])
    before = core.drive.chunks[segment, 0]
    kept = lose(core, segment)
    commits = core.store.disk.commits.commits
    work_but_reads(core, 300)
    assert core.store.disk.commits.commits > commits, "the control"
    assert core.drive.chunks[segment, 0] == before
    core.work_all()
    core.audit()
    bring_back(core, segment, kept)
    later = successor(core)
    there = later.client()
    assert fetch(there, there.open(), keys) == SLOTS


def test_nothing_is_called_durable_on_one_that_waits_to_be_emptied() -> None:
    core = make(arenas=2)
    client, namespace, keys, segment = stored(core)
    put(client, namespace, chain(2 * SLOTS, "third"))
    core.store.flush(client.session, namespace, 1, 10 * SECOND)
    core.work_all()
    core.outbox.flushed.clear()  # each block is counted once
    late = chain(4, "late")
    client.put(namespace, late)
    core.finish_all()
    core.store.tick()
    while any(isinstance(batch[0], MakeSegment | Save) for batch in core.drive.waiting):
        core.work()
        core.store.tick()
    other = segment_of(core, namespace, late[0])
    hold_with_a_read(core, client, namespace, keys[0])
    assert core.store.flush(client.session, namespace, 2, 10 * SECOND) is None
    lost = [(number, lose(core, number)) for number in (other, segment)]  # the last is emptied first
    work_but_reads(core, 200)
    assert other in core.store.disk.segments.position_of, "the control"
    flags = core.store.tables.blocks["flags"][[core.row(namespace, key) for key in late]]
    assert not (flags & blocks.DURABLE).any()
    core.work_all()
    core.audit()
    for number, kept in lost:
        bring_back(core, number, kept)
    later = successor(core).client()
    ((_, _, (durable, *_)),) = core.outbox.flushed
    assert durable == later.match(later.open(), late)


@pytest.mark.parametrize("answers", [False, True])
def test_what_is_flushed_while_its_segment_goes_is_not_called_durable_for_what_lay_there(answers: bool) -> None:
    """At whatever moment. `answers`: what is under way there ends well all the same, and the drive is back at once."""
    seen = set()
    for steps in range(40):
        core = make(admission=Admission.NONE)
        client, namespace = begin(core)
        keys = chain(4)
        client.put(namespace, keys)
        core.finish_all()
        assert core.store.flush(client.session, namespace, 1, 10 * SECOND) is None
        for _ in range(steps):
            core.work() if core.drive.waiting else core.pass_time(5 * MS)
        if not core.store.disk.segments.position_of or core.outbox.flushed:
            continue
        (segment,) = core.store.disk.segments.position_of
        if answers:
            core.store.disk.lost(segment, core.clock.ns)
            while segment in core.store.disk.segments.position_of:
                core.work() if core.drive.waiting else core.pass_time(5 * MS)
        else:
            lose(core, segment)
        core.work_all()
        core.audit()
        ((_, _, (durable, *_)),) = core.outbox.flushed
        assert durable <= successor(core).store.disk.recovered.blocks, steps
        seen.add(durable)
    assert seen == {0, 4}, "the control: what is written elsewhere is"


def test_its_file_is_not_removed() -> None:
    """It may be back before the daemon has forgotten it."""
    core = make()
    _, _, _, segment = stored(core)
    kept = lose(core, segment)
    bring_back(core, segment, kept)
    core.work_all()
    assert segment in core.drive.files
    assert not any(isinstance(batch[0], DropSegment) for batch in core.drive.waiting)
    assert core.store.disk.segments.next_ns() is None, "nor is that tried again"
