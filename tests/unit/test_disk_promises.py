"""What the disk tier promises of places that change hands, and of its owner thread, while others are at work."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from kvstore import blocks
from kvstore.tier import commits, demotion
from kvstore.tier.demotion import Admission
from kvstore.tier.format import RECORD
from kvstore.tier.orders import Commit, Erase, MakeSegment, Order, Outcome, Save
from tests.core import MS, SECOND, Core, chain
from tests.unit.test_disk_regressions import make, put, successor


def work_through(core: Core, *kinds: type[Order]) -> None:
    """Carry out what there is of these kinds, in order, and what follows from it at once."""
    core.store.tick()
    while True:
        due = [i for i, batch in enumerate(core.drive.waiting) if isinstance(batch[0], kinds)]
        if not due:
            return
        core.work(due[0])
        core.store.tick()


def known_twice(core: Core) -> set[int]:
    """Generations that are durable, and that the index knows in two places."""
    counts = Counter(
        int(generation)
        for content in core.drive.chunks.values()
        for generation in np.frombuffer(content, dtype=RECORD)["generation"]
    )
    table = core.store.tables.blocks
    durable = table["generation"][(table["flags"] & blocks.DURABLE) != 0].tolist()
    return {generation for generation in durable if counts[generation] > 1}


@pytest.mark.parametrize("chunks", [1, 1024])
@pytest.mark.parametrize("failing", [False, True])
def test_a_block_that_was_written_again_is_called_durable_once_the_index_has_forgotten_its_old_place(
    monkeypatch: pytest.MonkeyPatch, chunks: int, *, failing: bool
) -> None:
    """Or one of two places is taken over after a crash, perhaps the one that was erased: the block would be lost."""
    monkeypatch.setattr(commits, "CHUNKS", chunks)
    core, client, namespace = make(segments=4, admission=Admission.NONE)
    keys = chain(8)
    put(client, namespace, keys)
    core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.work_all()
    client.put(namespace, chain(1, "other"))
    core.store.flush(client.session, namespace, 2, 60 * SECOND)
    work_through(core, MakeSegment, Save)  # what the index is to say of the second segment waits
    table = core.store.tables.blocks
    rows = [core.row(namespace, key) for key in keys[1:]]
    for row in reversed(rows):  # as when an operator empties the disk
        blocks.detach(core.store.tables, row)
    core.store.disk.demotion.admit(rows, table["generation"][rows].tolist())
    work_through(core, Save)
    assert all(int(table["disk"][row]) for row in rows)
    if failing:
        core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Commit) else None
    core.pass_time(60 * MS)
    work_through(core, Erase)  # after the commit was begun
    for _ in range(40):
        core.pass_time(60 * MS)
        work_through(core, Commit)
        assert not known_twice(core)
        core.drive.fault = lambda _order: None
    assert all(table["flags"][row] & blocks.DURABLE for row in rows)
    core.audit()
    later = successor(core)
    client = later.client()
    namespace = client.open()
    client.ask(namespace, keys, wait_ns=SECOND)
    later.work_all()
    assert client.fetch(namespace, keys) == 8


def test_a_delete_does_not_wait_for_writes_that_were_begun_after_it() -> None:
    core, client, namespace = make(segments=1, admission=Admission.NONE)

    def write(name: str) -> None:
        client.put(namespace, chain(1, name))
        row = core.row(namespace, chain(1, name)[0])
        core.store.disk.demotion.admit([row], [int(core.store.tables.blocks["generation"][row])])
        core.store.tick()

    def saves() -> list[Sequence[Order]]:
        return [batch for batch in core.drive.waiting if isinstance(batch[0], Save)]

    write("first")
    core.work_all()  # there is a segment
    write("deleted")
    (before,) = saves()
    answers = client.delete(namespace, chain(1, "deleted"))
    write("new")
    core.work(core.drive.waiting.index(before))
    assert answers == []
    work_through(core, Erase)
    assert saves(), "what was begun after it is on its way"
    assert answers == [1]
    core.work_all()
    core.audit()


def test_a_turn_begins_no_more_writes_than_it_has_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demotion, "TURN_BLOCKS", 3)
    core, client, namespace = make(arenas=4, admission=Admission.NONE)
    put(client, namespace, chain(1, "first"))
    core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.work_all()  # there is a segment
    monkeypatch.setattr(demotion, "BATCH_BYTES", namespace.slot_bytes)  # a write each
    client.put(namespace, chain(7))
    core.store.flush(client.session, namespace, 2, 60 * SECOND)
    begun = []
    for _ in range(3):
        core.store.tick()
        begun.append(sum(len(batch) for batch in core.drive.waiting if isinstance(batch[0], Save)))
        assert core.store.next_tick_ns() is not None
    assert begun == [3, 6, 7]
    core.work_all()
    assert core.outbox.flushed[-1] == (client.session, 2, (7, 0, 0, 0))
    core.audit()


def test_a_place_is_not_written_again_before_the_index_has_forgotten_it() -> None:
    """Nor with the commit that was running when it was erased: that one had looked before."""
    core, client, namespace = make(segments=4, admission=Admission.NONE)
    put(client, namespace, chain(1, "first"))
    core.store.flush(client.session, namespace, 1, 60 * SECOND)
    core.work_all()  # there is a segment
    (key,) = chain(1, "again")
    client.put(namespace, [key])
    row, table = core.row(namespace, key), core.store.tables.blocks
    admit = core.store.disk.demotion.admit
    admit([row], [int(table["generation"][row])])
    work_through(core, Save)
    place = int(table["disk"][row])
    core.pass_time(60 * MS)
    core.store.tick()
    assert any(isinstance(batch[0], Commit) for batch in core.drive.waiting)
    blocks.detach(core.store.tables, row)
    work_through(core, Erase)
    admit([row], [int(table["generation"][row])])
    core.store.tick()
    assert int(table["disk"][row]) not in {0, place}, "it is written elsewhere"
    work_through(core, Commit)
    nobodys = core.store.tables.slots["block"]
    assert nobodys[place] == blocks.NOBODY
    assert not table["flags"][row] & blocks.DURABLE, "the commit was of where it lay"
    core.work_all()
    core.pass_time(60 * MS)
    core.work_all()
    assert table["flags"][row] & blocks.DURABLE
    assert nobodys[place] != blocks.NOBODY
    core.audit()
