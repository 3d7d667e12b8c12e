"""Segments that no key opens: they leave with the first DELETE of their tenant, and before it is answered."""

import pytest

from kvstore.report import ClearReport, ClearScope
from kvstore.tier import closed
from kvstore.tier.orders import DropSegment, Order, Outcome
from tests.core import Core, chain
from tests.unit.test_disk import begin, make, put

OURS = {1001: "t", 1002: "t", 1003: "other"}


def made() -> Core:
    core = make()
    core.store.disk.closed.found(OURS)
    for number in OURS:
        core.drive.files[number] = bytearray(b"nobody can read this")
    return core


def leaving(core: Core) -> list[int]:
    """What is being removed right now."""
    return [batch[0].segment for batch in core.drive.waiting if isinstance(batch[0], DropSegment)]


def test_a_delete_is_answered_when_closed_segments_of_its_tenant_are_gone() -> None:
    core = made()
    client, namespace = begin(core)
    put(client, namespace, chain(3))
    answers = client.delete(namespace, chain(1, "never stored here"))
    assert sorted(leaving(core)) == [1001, 1002]
    assert answers == [], "what was deleted may lie there"
    core.work_all()
    assert answers == [0]
    assert [number for number in OURS if number in core.drive.files] == [1003], "another tenant's stay"
    assert core.store.disk.closed.removed == 2
    core.audit()
    again = client.delete(namespace, chain(3))
    assert not leaving(core)
    core.work_all()
    assert again == [3]


def test_without_a_delete_they_stay() -> None:
    core = made()
    client, namespace = begin(core)
    for name in range(12):
        put(client, namespace, chain(8, name))
    core.store.clear(ClearScope(), lambda _: None, dry_run=True)
    core.work_all()
    assert set(OURS) <= set(core.drive.files)


@pytest.mark.parametrize(("tenant", "left"), [("t", [1003]), (None, [])])
def test_a_clear_removes_those_of_its_tenant_or_all(tenant: str | None, left: list[int]) -> None:
    core = made()
    client, namespace = begin(core)
    put(client, namespace, chain(3))
    reports: list[ClearReport] = []
    core.store.clear(ClearScope(tenant), reports.append, dry_run=False)
    assert reports == []
    core.work_all()
    assert [report.blocks for report in reports] == [3]
    assert [number for number in OURS if number in core.drive.files] == left


def test_what_cannot_be_removed_is_counted_and_tried_again_with_the_next_delete() -> None:
    core = made()
    client, namespace = begin(core)
    put(client, namespace, chain(3))

    def read_only(order: Order) -> Outcome | None:
        return Outcome.FAILED if isinstance(order, DropSegment) else None

    core.drive.fault = read_only
    answers = client.delete(namespace, chain(3))
    core.work_all()
    assert answers == [3], "nobody waits for a drive that refuses"
    assert core.store.disk.erasure.faults == 2
    assert {1001, 1002} <= set(core.drive.files)
    core.drive.fault = lambda _order: None
    client.delete(namespace, chain(3))
    core.work_all()
    assert not {1001, 1002} & set(core.drive.files)


def test_many_leave_a_few_at_a_time_and_whoever_asked_later_waits_for_its_own() -> None:
    core = make()
    core.store.disk.closed.found({number: "t" if number % 2 else "other" for number in range(1000, 1100)})
    client, namespace = begin(core)
    put(client, namespace, chain(1))
    other = core.client("other")
    theirs = other.open()
    first, second = client.delete(namespace, chain(1)), other.delete(theirs, chain(1))
    most = 0
    while leaving(core):
        most = max(most, len(leaving(core)))
        core.work()
        if second:
            assert first, "those that were asked for first leave first"
    assert (first, second) == ([1], [0])
    assert most == closed.RUNNING
    assert core.store.disk.closed.removed == 100


class Name(str):
    """A tenant's, that counts how often it is compared with another."""

    __slots__ = ()
    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str(self) == other


def test_a_delete_does_not_look_at_other_tenants_segments_however_many_there_are() -> None:
    core = make()
    core.store.disk.closed.found({number: Name("other") for number in range(1000, 6000)})
    client, namespace = begin(core)
    put(client, namespace, chain(1))
    Name.compared = 0
    answers = client.delete(namespace, chain(1))
    core.work_all()
    assert answers == [1]
    assert Name.compared < 10
    assert core.store.disk.closed.removed == 0


def test_what_lay_in_a_folder_that_is_gone_is_waited_for_once() -> None:
    core = made()
    client, namespace = begin(core)
    core.drive.fault = lambda order: Outcome.GONE if isinstance(order, DropSegment) else None
    assert client.delete(namespace, chain(1)) == []
    core.work_all()
    assert client.delete(namespace, chain(1)) == [0]
    assert core.store.disk.erasure.faults == 2


def test_whoever_has_nothing_there_does_not_wait_for_a_drive_that_hangs() -> None:
    core = made()
    client, namespace = begin(core)
    put(client, namespace, chain(1))
    first = client.delete(namespace, chain(1))
    stranger = core.client("third")
    assert stranger.delete(stranger.open(), chain(1)) == [0]
    assert first == []
    core.work_all()
    assert first == [1]
