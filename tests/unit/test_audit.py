"""The audit of leaf lists finds each way in which one can be wrong."""

from collections.abc import Callable

import pytest

from kvstore.audit import audit
from kvstore.rules import Chosen, Rule, Tier
from kvstore.store import Store
from tests.core import SECOND, Core, chain


def lists() -> tuple[Store, int, int]:
    """A store whose one pool lists four blocks in one queue: the pool's number, and the queue's."""
    core = Core()
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LRU))
    client = core.client()
    namespace = client.open()
    for name in range(4):
        core.pass_time(SECOND)
        client.put(namespace, chain(1, name))
    core.audit()
    number = namespace.pool.number
    (queue,) = core.store.tables.pools[number]["oldest"].nonzero()[0].tolist()
    return core.store, number, queue


def listed(store: Store, number: int, queue: int) -> list[int]:
    """Rows, the oldest first."""
    rows, row = [], int(store.tables.pools[number]["oldest"][queue])
    while row:
        rows.append(row)
        row = int(store.tables.blocks["newer"][row])
    return rows


def cut_off_the_newest(store: Store, number: int, queue: int) -> None:
    store.tables.pools[number]["newest"][queue] = listed(store, number, queue)[0]


def unmark(store: Store, number: int, queue: int) -> None:
    store.tables.pools[number]["filled"][queue >> 6] = 0


def mark_an_empty_one(store: Store, number: int, queue: int) -> None:
    other = (queue + 1) % 64
    store.tables.pools[number]["filled"][other >> 6] |= 1 << (other & 63)


def end_an_empty_one(store: Store, number: int, queue: int) -> None:
    store.tables.pools[number]["newest"][queue + 1] = listed(store, number, queue)[0]


def link_one_way(store: Store, number: int, queue: int) -> None:
    store.tables.blocks["older"][listed(store, number, queue)[2]] = 0


def run_in_a_circle(store: Store, number: int, queue: int) -> None:
    rows = listed(store, number, queue)
    store.tables.blocks["newer"][rows[3]] = rows[0]


def swap_ranks(store: Store, number: int, queue: int) -> None:
    rows = listed(store, number, queue)
    store.tables.ranks[rows[1]] = store.tables.ranks[rows[2]] + 1


def take_for_another_queue(store: Store, number: int, queue: int) -> None:
    store.tables.blocks["queue"][listed(store, number, queue)[1]] = queue + 1


def miscount(store: Store, number: int, _queue: int) -> None:
    store.tables.pools[number]["listed"] += 1


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut_off_the_newest, "is not the last"),
        (unmark, "is marked wrongly"),
        (mark_an_empty_one, "is marked wrongly"),
        (end_an_empty_one, "is not the last"),
        (link_one_way, "one way only"),
        (run_in_a_circle, "is listed twice"),
        (swap_ranks, "out of order"),
        (take_for_another_queue, "on another queue's list"),
        (miscount, "miscounted"),
    ],
)
def test_a_leaf_list_that_is_wrong_is_found(damage: Callable[[Store, int, int], None], told: str) -> None:
    store, number, queue = lists()
    assert len(listed(store, number, queue)) == 4
    audit(store)
    damage(store, number, queue)
    with pytest.raises(AssertionError, match=told):
        audit(store)
