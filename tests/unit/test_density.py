"""DENSITY: what it makes of classes of which little is known, of uses, and of whole arenas."""

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.rules import Chosen, Rule, Tier
from tests.core import SECOND, Client, Core, chain, key_of

SLOTS = 16  # of an arena of `Core`
SIXTEEN_S = 12  # the bin of ages from there on
TWICE, SEVEN_TIMES = 1, 16  # the first classes of blocks that were used so often


def of_density(arenas: int, rule: Rule = Rule.DENSITY) -> Core:
    """A core whose pools in memory go by it."""
    core = Core(arenas=arenas)
    core.store.choose_rule(Chosen(Tier.DRAM, None, rule))
    return core


def test_a_class_of_which_little_is_known_is_taken_for_its_like() -> None:
    core = of_density(1)
    pool = core.client().open().pool.number
    reuse = core.store.tables.reuse[pool]
    like, unlike = TWICE + 1, SEVEN_TIMES + 1  # used as often as those that come back, after another gap; or more often
    blocks.reindex(core.store.tables, pool)
    assert reuse["index"][like, 0] == reuse["index"][unlike, 0]
    reuse["again"][TWICE, SIXTEEN_S] = reuse["gone"][SEVEN_TIMES, SIXTEEN_S] = 500
    reuse["gone"][[like, unlike], SIXTEEN_S] = 0.01
    blocks.reindex(core.store.tables, pool)
    assert np.isfinite(reuse["index"]).all()
    assert reuse["index"][like, SIXTEEN_S] > 2 * reuse["index"][unlike, SIXTEEN_S]


def next_of_two(rule: Rule, often: int, seldom: int) -> str:
    """One block is used `often`, then another `seldom`; five minutes later one would go: which?"""
    core = of_density(1, rule)
    client = core.client()
    namespace = client.open()
    for name, uses in (("first", often), ("second", seldom)):
        assert client.put(namespace, [key_of(name)]) == [Grant.GRANTED]
        for _ in range(uses):
            core.pass_time(SECOND)
            assert client.fetch(namespace, [key_of(name)]) == 1
    core.pass_time(300 * SECOND)
    assert client.fetch(namespace, [key_of("nobody")]) == 0
    client.put(namespace, [key_of("now")])
    row = int(blocks.next_victim(core.store.tables, namespace.pool.number))
    return next(name for name in ("first", "second", "now") if core.row(namespace, key_of(name)) == row)


def test_where_nothing_else_is_known_the_block_that_was_used_less_often_goes_first() -> None:
    assert next_of_two(Rule.DENSITY, 27, 3) == "second"
    assert next_of_two(Rule.DENSITY, 3, 27) == "first"
    assert next_of_two(Rule.DENSITY, 3, 3) == "first", "of equals the one that was touched first"
    assert next_of_two(Rule.LRU, 27, 3) == "first"


def warm(core: Core, client: Client, names: list[str], block_bytes: int) -> None:
    """Use blocks, so that they are worth something."""
    for name in names:
        assert client.fetch(client.open(block_bytes), [key_of(name)]) == 1
    core.pass_time(SECOND)


@pytest.mark.parametrize(("used", "recycled"), [(SLOTS - 1, 0), (0, 1)])
def test_an_arena_changes_hands_by_what_all_of_it_is_worth_and_not_by_its_worst_block(used: int, recycled: int) -> None:
    core, large = of_density(2), 4 * PAGE_BYTES
    client = core.client(ring_pages=256)
    small = client.open().identity.block_bytes
    names = [f"small {number}" for number in range(SLOTS)]
    for name in names:
        assert client.put(client.open(small), [key_of(name)]) == [Grant.GRANTED]
    core.pass_time(3000 * SECOND)
    for name in ("a", "b", "c", "d"):
        assert client.put(client.open(large), [key_of(name)]) == [Grant.GRANTED]
    for _ in range(3):
        warm(core, client, names[:used], small)
        warm(core, client, ["a", "b", "c", "d"], large)
    client.put(client.open(large), chain(1, "more"))
    core.settle()
    assert core.store.arenas.recycled == recycled
    core.audit()
