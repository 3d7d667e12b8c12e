"""Blocks that nobody can read for now, or ever again: a miss, and not in the way of who stores them anew."""

import pytest

from kvproto.errors import Grant
from kvstore.routing import summarise
from kvstore.sessions import Namespace
from kvstore.tier import away
from kvstore.tier.orders import Load, Order, Outcome
from tests.core import SECOND, Client, Core, Held, chain, words
from tests.unit.test_disk import begin, fetch, make, put


def on_disk() -> tuple[Core, Client, Namespace, list[bytes]]:
    """A chain of 12, of which four are in DRAM, too; and another one that lies there instead."""
    core = make()
    client, namespace = begin(core)
    keys = chain(12, "first")
    put(client, namespace, keys)
    put(client, namespace, chain(12, "second"))
    return core, client, namespace, keys


def matched(core: Core, client: Client, namespace: Namespace, keys: list[bytes]) -> set[int]:
    """What MATCH and the routers' summary say, which is the same."""
    return {client.match(namespace, keys), summarise(core.store, [namespace], words(keys)).blocks}


def test_what_lies_on_a_drive_that_answers_nobody_is_a_miss_until_it_does() -> None:
    core, client, namespace, keys = on_disk()
    core.store.drives_away([0])
    assert matched(core, client, namespace, keys) == {4}, "what is in DRAM is there"
    held = client.ask(namespace, keys, wait_ns=10 * SECOND)
    assert isinstance(held, Held)
    assert held.blocks == 4, "at once, for nothing will come"
    assert not core.drive.waiting
    client.release(held)
    core.store.drives_away([])
    assert matched(core, client, namespace, keys) == {12}
    assert fetch(client, namespace, keys) == 12


def test_another_drive_takes_nothing_away() -> None:
    core, client, namespace, keys = on_disk()
    core.store.drives_away([1])
    assert matched(core, client, namespace, keys) == {12}
    assert fetch(client, namespace, keys) == 12


def test_whoever_waits_for_a_drive_that_is_suspended_waits_no_more() -> None:
    core, client, namespace, keys = on_disk()
    held = client.ask(namespace, keys, wait_ns=10 * SECOND)
    assert isinstance(held, Held)
    core.store.drives_away([0])
    (ready,) = core.outbox.readies
    assert (ready.left, len(ready.locations), held.blocks) == (0, 0, 4)
    client.release(held)
    core.work_all()  # it was hung, and goes on
    core.outbox.readies.clear()
    core.store.drives_away([])
    assert fetch(client, namespace, keys) == 12
    core.audit()


def test_only_of_a_drive_that_is_away_for_long_is_what_lies_there_stored_anew() -> None:
    core, client, namespace, keys = on_disk()
    core.store.drives_away([0])
    core.pass_time(away.LOST_NS - SECOND)
    core.store.drives_away([0])
    assert set(client.put(namespace, keys)) == {Grant.KNOWN}, "it may come back, with all that continues it"
    core.pass_time(SECOND)
    assert client.put(namespace, keys)[4:] == [Grant.GRANTED] * 8
    assert matched(core, client, namespace, keys) == {12}
    assert fetch(client, namespace, keys) == 12
    core.audit()


@pytest.mark.parametrize("others", [True, False], ids=["others come", "none comes"])
def test_a_block_that_cannot_be_read_though_others_can_does_not_hide_what_continues_it(others: bool) -> None:
    core, client, namespace, keys = on_disk()
    bad: list[bytes] = []

    def fault(order: Order) -> Outcome | None:
        if not isinstance(order, Load):
            return None
        bad.append(order.key)
        return Outcome.FAILED if order.key == bad[0] or not others else None

    core.drive.fault = fault
    for _ in range(4):
        assert fetch(client, namespace, keys) < 12
    grants = client.put(namespace, keys)
    core.drive.fault = lambda _order: None
    assert (Grant.GRANTED in grants) == others, "a drive that reads nothing may be itself again"
    assert fetch(client, namespace, keys) == 12
    core.audit()


def test_what_was_not_even_tried_counts_for_nothing() -> None:
    core, client, namespace, keys = on_disk()
    loads: list[Load] = []

    def note(order: Order) -> None:
        if isinstance(order, Load):
            loads.append(order)

    core.drive.fault = note
    assert fetch(client, namespace, keys) == 12
    one, other, loading = loads[0], loads[1], core.store.disk.loading

    def failed() -> Outcome:
        loading.settle(other)  # it came
        one.outcome = Outcome.FAILED
        loading.settle(one)
        return one.outcome

    core.store.drives_away([0])
    assert failed() is Outcome.FAILED
    core.store.drives_away([])
    assert [failed(), failed()] == [Outcome.FAILED, Outcome.DAMAGED]
