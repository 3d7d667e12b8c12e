"""What is said of blocks is above any rule: soft, for a time, and of the weight that it has earned."""

import random

import pytest

from kvstore import blocks
from kvstore.rules import Rule
from tests.core import SECOND
from tests.unit.test_policy import SLOTS, Shelf, names

RULES = [rule for rule in Rule if rule is not Rule.DENSITY]
SOON, FAR, HARDLY = 2, 6, 7


@pytest.mark.parametrize("rule", RULES)
def test_what_is_said_to_be_used_soon_stays_and_what_is_hardly_used_goes_first(rule: Rule) -> None:
    shelf = Shelf(rule)
    shelf.put(*names("x", SLOTS))
    shelf.hint("x0", SOON)
    shelf.hint("x9", HARDLY)
    shelf.core.pass_time(SECOND)
    shelf.put(*names("y", 4))
    assert shelf.there(names("x", SLOTS)) == [f"x{i}" for i in (0, *range(4, SLOTS)) if i != 9], "and the control"
    shelf.core.audit()


@pytest.mark.parametrize("rule", RULES)
def test_it_is_no_pin(rule: Rule) -> None:
    """Nothing else is used again either: after eight times as long as others have it goes."""
    shelf = Shelf(rule)
    shelf.put("x")
    shelf.hint("x", SOON)
    shelf.put(*names("y", 4 * SLOTS))
    assert shelf.row("x"), "the control"
    shelf.put(*names("z", 20 * SLOTS))
    assert not shelf.row("x")


@pytest.mark.parametrize("rule", RULES)
def test_a_use_ends_it(rule: Rule) -> None:
    shelf = Shelf(rule)
    shelf.put("x")
    shelf.hint("x", SOON)
    row = shelf.core.store.tables.blocks[shelf.row("x")]
    assert row["queue"] == blocks.SAID + SOON
    shelf.use("x")
    assert (row["queue"] < blocks.SAID, int(row["uses"]) >> blocks.HINT_BITS) == (True, 0)
    shelf.hint("x", SOON)
    shelf.hint("x", 0)
    assert row["queue"] < blocks.SAID, "taken back"
    shelf.core.audit()


def kept(rule: Rule, true: bool, lives: int) -> float:
    """Of two blocks one comes back when 40 others have come, and the other never does; words say which, or the
    opposite. How many of those that come back are still there, in the last half."""
    shelf, hits = Shelf(rule), 0
    for i in range(lives):
        for letter, word in (("r", SOON if true else HARDLY), ("n", HARDLY if true else SOON)):
            shelf.put(f"{letter}{i}")
            shelf.hint(f"{letter}{i}", word)
        if i >= 10:
            found = shelf.ask(f"r{i - 10}")
            hits += found and i >= lives // 2
            if not found:
                shelf.put(f"r{i - 10}")
    shelf.core.audit()
    return hits / (lives - lives // 2)


@pytest.mark.parametrize("rule", RULES)
def test_true_words_keep_what_no_rule_could(rule: Rule) -> None:
    assert kept(rule, True, 200) > 0.95


@pytest.mark.parametrize("rule", [Rule.LRU, Rule.PGDSF])
def test_words_lose_their_weight_where_they_are_wrong(rule: Rule) -> None:
    tables_worth = []
    for true in (True, False):
        shelf = Shelf(rule)
        for i in range(400):
            shelf.put(f"r{i}")
            shelf.hint(f"r{i}", SOON if true else HARDLY)
            shelf.put(f"n{i}")
            shelf.hint(f"n{i}", HARDLY if true else SOON)
            shelf.put(f"x{i}")
            for name in (f"r{i - 2}", f"x{i - 4}"):
                if i >= 4 and not shelf.ask(name):
                    shelf.put(name)  # as engines do with what they miss
        tables, number = shelf.core.store.tables, shelf.namespace.pool.number
        tables_worth.append([blocks._said_worth(tables, number, word) for word in (SOON, HARDLY)])
        shelf.core.audit()
    (soon, hardly), (wrong_soon, wrong_hardly) = tables_worth
    assert (soon > 2, hardly < 1) == (True, True)
    assert (wrong_soon < soon / 2, wrong_hardly > 1) == (True, True)


@pytest.mark.parametrize("rule", list(Rule))
def test_all_stays_whole_whatever_is_said(rule: Rule) -> None:
    rng, shelf = random.Random(5), Shelf(rule, arenas=2)
    rules = list(Rule)
    for number in range(1500):
        name = f"k{int(rng.paretovariate(0.5)) % 500}"
        if not shelf.ask(name):
            shelf.put(name)
        for _ in range(rng.randrange(3)):
            other = f"k{int(rng.paretovariate(0.5)) % 500}"
            if shelf.row(other):
                shelf.hint(other, rng.randrange(blocks.HINTS))
        if number % 100 == 0:
            shelf.choose(rng.choice(rules))
            shelf.choose(rule)
    shelf.core.audit()
