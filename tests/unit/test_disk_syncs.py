"""Syncs that fail: what is lost by one is not called durable, and what is not lost is."""

from collections.abc import Callable

import pytest

from kvstore import blocks
from kvstore.sessions import Namespace
from kvstore.tier.demotion import Admission
from kvstore.tier.orders import Commit, Erase, Order, Outcome, Save
from tests.core import MS, SECOND, Client, Core, chain
from tests.unit.test_disk_regressions import make, put, successor

Counts = tuple[int, int, int, int]  # durable, failed, evicted, pending


class NothingMore:
    """A loss of power that leaves what was synced, and no sector more."""

    def random(self) -> float:
        """Never less than a half."""
        return 1.0


def flush(core: Core, client: Client, namespace: Namespace, number: int, timeout_s: int = 5) -> Counts:
    """Ask, and give it its time."""
    answer = core.store.flush(client.session, namespace, number, timeout_s * SECOND)
    core.work_all()
    for _ in range(timeout_s * 20):
        if answer is not None:
            break
        core.pass_time(50 * MS)
        core.work_all()
        answer = next((one[2] for one in core.outbox.flushed if one[1] == number), None)
    assert answer is not None, "a flush is not answered in its time"
    durable, failed, evicted, pending = answer
    return durable, failed, evicted, pending


def segment_of(core: Core, namespace: Namespace, key: bytes) -> int:
    """Where a block lies."""
    disk = int(core.store.tables.blocks["disk"][core.row(namespace, key)])
    assert disk, "it does not lie on disk"
    return core.store.disk.segments.number_at(disk >> int(core.store.tables.book[blocks.SHIFT]))


def is_durable(core: Core, namespace: Namespace, key: bytes) -> bool:
    """Was it called that?"""
    return bool(core.store.tables.blocks["flags"][core.row(namespace, key)] & blocks.DURABLE)


def work_until(core: Core, found: Callable[[Order], bool]) -> int:
    """Let threads end whatever comes before an order that waits; where that is."""
    for _ in range(1000):
        for at, batch in enumerate(core.drive.waiting):
            if found(batch[0]):
                return at
        if core.drive.waiting:
            core.work(0)
        else:
            core.pass_time(10 * MS)
    raise AssertionError("there is no such order")


def is_commit(order: Order) -> bool:
    return isinstance(order, Commit)


def is_save(order: Order) -> bool:
    return isinstance(order, Save)


@pytest.mark.parametrize("heard", ["written before the sync fails", "heard of after it", "not hurt"])
def test_a_failed_sync_loses_what_its_commit_did_not_cover_as_well(heard: str) -> None:
    core, client, namespace = make(arenas=2, segments=4, admission=Admission.NONE)
    put(client, namespace, chain(1, "zero"))
    assert flush(core, client, namespace, 1) == (1, 0, 0, 0)
    segment = segment_of(core, namespace, chain(1, "zero")[0])
    covered, beside = chain(1, "covered"), chain(1, "beside")
    client.put(namespace, covered)
    core.store.flush(client.session, namespace, 2, 5 * SECOND)
    work_until(core, is_commit)
    client.put(namespace, beside)
    core.store.flush(client.session, namespace, 3, 5 * SECOND)
    core.store.tick()

    def fails_once(order: Order) -> Outcome | None:
        if isinstance(order, Commit) and segment in order.segments:
            order.failed = {segment}
            core.drive.fault = lambda _order: None
        return None

    if heard != "not hurt":
        core.drive.fault = fails_once
    saving = next(at for at, batch in enumerate(core.drive.waiting) if is_save(batch[0]))
    if heard == "heard of after it":  # its thread has written it, and nobody has looked yet
        done = core.drive.carry_out(saving)
        core.work(next(at for at, batch in enumerate(core.drive.waiting) if is_commit(batch[0])))
        core.store.finished(done)
    else:
        core.work(saving)
        core.work(next(at for at, batch in enumerate(core.drive.waiting) if is_commit(batch[0])))
    for _ in range(120):
        core.pass_time(100 * MS)
        core.work_all()
    answers = {number: tuple(counts) for _, number, counts in core.outbox.flushed}
    hurt = heard != "not hurt"
    assert answers[2] == answers[3] == ((0, 1, 0, 0) if hurt else (1, 0, 0, 0))
    core.drive.lose_power(NothingMore())  # type: ignore[arg-type]
    later = successor(core)
    again = later.client()
    assert again.match(again.open(), chain(1, "zero")) == 1
    assert again.match(again.open(), beside) == (0 if hurt else 1)


def test_a_drive_whose_syncs_fail_for_good_keeps_nothing_of_others_from_being_durable() -> None:
    core, client, namespace = make(arenas=2, admission=Admission.NONE)
    put(client, namespace, chain(8, "there"))
    assert flush(core, client, namespace, 1) == (8, 0, 0, 0)
    bad = {segment_of(core, namespace, key) for key in chain(8, "there")}
    put(client, namespace, chain(1, "elsewhere"))
    assert flush(core, client, namespace, 2) == (1, 0, 0, 0)
    assert segment_of(core, namespace, chain(1, "elsewhere")[0]) not in bad

    def fails(order: Order) -> Outcome | None:
        if isinstance(order, Commit):
            order.failed = bad & set(order.segments)
        return Outcome.FAILED if isinstance(order, Erase) and order.segment in bad else None

    core.drive.fault = fails
    client.delete(namespace, chain(8, "there")[7:])
    core.work_all()
    wanted = chain(3, "sound")
    put(client, namespace, wanted)
    assert flush(core, client, namespace, 3) == (3, 0, 0, 0)
    core.drive.lose_power(NothingMore())  # type: ignore[arg-type]
    later = successor(core)
    again = later.client()
    assert again.match(again.open(), wanted) == 3


def test_what_continues_a_block_that_lost_its_copy_is_durable_once_it_has_another() -> None:
    core, client, namespace = make(admission=Admission.NONE)
    keys = chain(5)
    put(client, namespace, keys[:1])
    assert flush(core, client, namespace, 1) == (1, 0, 0, 0)
    put(client, namespace, chain(7, "in between"))  # the segment is full
    assert flush(core, client, namespace, 2) == (7, 0, 0, 0)
    put(client, namespace, keys[1:2], keys[0])
    assert flush(core, client, namespace, 3) == (1, 0, 0, 0)
    segments = core.store.disk.segments
    segments.drain(segments.position_of[segment_of(core, namespace, keys[0])])
    core.work_all()
    core.pass_time(SECOND)
    core.work_all()
    assert not is_durable(core, namespace, keys[1]), "what it continues lies in memory alone"
    for number in range(2, 5):
        put(client, namespace, keys[number : number + 1], keys[number - 1])
        assert flush(core, client, namespace, 10 + number) == (1, 0, 0, 0)
        assert all(is_durable(core, namespace, key) for key in keys[: number + 1])
    core.drive.lose_power(NothingMore())  # type: ignore[arg-type]
    later = successor(core)
    again = later.client()
    assert again.match(again.open(), keys) == 5
