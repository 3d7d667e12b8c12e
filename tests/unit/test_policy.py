"""Who is evicted: what each rule keeps and gives up, and how another one takes its place while blocks lie there."""

import random
from collections.abc import Iterable

import numpy as np
import pytest

from kvproto.errors import Grant
from kvstore import blocks
from kvstore.policy import set_rule
from kvstore.rules import Chosen, Rule, Tier
from tests.core import SECOND, Core, chain, key_of, words

SLOTS = 16  # of an arena of `Core`


class Shelf:
    """One pool under one rule. Blocks are chains of one, so that each is a leaf; every act takes a second."""

    def __init__(self, rule: Rule, arenas: int = 1) -> None:
        self.core = Core(arenas)
        self.core.store.choose_rule(Chosen(Tier.DRAM, None, rule))
        self.client = self.core.client()
        self.namespace = self.client.open()
        self.pool = self.core.store.tables.pools[self.namespace.pool.number]

    def put(self, *names: object, recompute_s: float = 0.0) -> None:
        """Store blocks, one after the other."""
        self.namespace.recompute_ns = int(recompute_s * SECOND)
        for name in names:
            self.core.pass_time(SECOND)
            assert self.client.put(self.namespace, [key_of(name)]) == [Grant.GRANTED], name

    def use(self, *names: object) -> None:
        """Fetch blocks that are there."""
        for name in names:
            assert self.ask(name), f"{name} is not there"

    def ask(self, name: object) -> bool:
        """Fetch a block if it is there."""
        self.core.pass_time(SECOND)
        return self.client.fetch(self.namespace, [key_of(name)]) == 1

    def hint(self, name: object, hint: int) -> None:
        """Say what is expected of its next use."""
        index, number = self.namespace.tenant.index, self.namespace.number
        hints = np.array([hint], dtype=np.uint8)
        assert blocks.hint_run(self.core.store.tables, index, number, words([key_of(name)]), 0, 1, hints) == 1

    def row(self, name: object) -> int:
        """Where it is; 0: nowhere."""
        return self.core.row(self.namespace, key_of(name))

    def there(self, names: Iterable[object]) -> list[object]:
        """Those of some blocks that were not evicted. Touches none."""
        return [name for name in names if self.row(name)]

    def next_gone(self) -> object:
        """The row that would go next."""
        return int(blocks.next_victim(self.core.store.tables, self.namespace.pool.number))

    def choose(self, rule: Rule, tenant: str | None = None) -> None:
        """Another rule from now on; the work that it brings is done."""
        self.core.store.choose_rule(Chosen(Tier.DRAM, tenant, rule))
        while self.core.store.sweeper.next_ns() is not None:
            self.core.store.tick()
        self.core.audit()


def names(letter: str, count: int) -> list[object]:
    """Some blocks."""
    return [f"{letter}{i}" for i in range(count)]


def test_lru_gives_up_what_was_not_used_longest() -> None:
    used, unused = Shelf(Rule.LRU), Shelf(Rule.LRU)
    for shelf in (used, unused):
        shelf.put(*names("a", SLOTS))
    used.use("a0")
    for shelf in (used, unused):
        shelf.put("b")
    assert used.there(["a0", "a1", "a2"]) == ["a0", "a2"]
    assert unused.there(["a0", "a1", "a2"]) == ["a1", "a2"]


def after_a_second_use(rule: Rule, pause_s: int) -> list[object]:
    """One block is used twice, then the shelf is filled once over; after a pause, once over again."""
    shelf = Shelf(rule)
    shelf.put(*names("a", SLOTS))
    shelf.use("a0")
    shelf.put(*names("b", SLOTS))
    shelf.core.pass_time(pause_s * SECOND)
    shelf.put(*names("c", SLOTS))
    shelf.core.audit()
    return shelf.there(["a0"])


def test_second_touch_keeps_what_was_used_twice_for_its_bonus_and_no_longer() -> None:
    assert after_a_second_use(Rule.SECOND_TOUCH, 0) == ["a0"]
    assert after_a_second_use(Rule.SECOND_TOUCH, 460) == []
    assert after_a_second_use(Rule.LRU, 0) == []


@pytest.mark.parametrize(("rule", "kept"), [(Rule.SECOND_TOUCH, ["back"]), (Rule.LRU, [])])
def test_second_touch_knows_what_comes_back_after_it_was_evicted(rule: Rule, kept: list[object]) -> None:
    shelf = Shelf(rule)
    shelf.put("back", *names("a", SLOTS))
    assert shelf.there(["back"]) == []
    shelf.put("new", "back", *names("b", SLOTS))
    assert shelf.there(["back", "new"]) == kept


@pytest.mark.parametrize(("rule", "letters"), [(Rule.PGDSF, ["d"]), (Rule.LRU, ["c", "n"])])
def test_pgdsf_prefers_what_was_dearer_to_compute_at_equal_use(rule: Rule, letters: list[str]) -> None:
    shelf = Shelf(rule)
    shelf.put(*names("d", SLOTS // 2), recompute_s=1.0)
    shelf.put(*names("c", SLOTS // 2), recompute_s=0.001)
    shelf.put(*names("n", SLOTS // 2), recompute_s=0.001)
    for letter in letters:
        assert len(shelf.there(names(letter, SLOTS // 2))) == SLOTS // 2


def test_pgdsf_prefers_what_was_used_more_often_at_equal_cost() -> None:
    shelf = Shelf(Rule.PGDSF)
    shelf.put("a0", recompute_s=0.1)
    shelf.use("a0", "a0")
    shelf.put(*names("b", SLOTS + 4), recompute_s=0.1)
    assert shelf.there(["a0"]) == ["a0"]


@pytest.mark.parametrize(("rule", "kept"), [(Rule.LFU, ["a0", "a1"]), (Rule.LRU, [])])
def test_lfu_keeps_what_was_used_most(rule: Rule, kept: list[object]) -> None:
    shelf = Shelf(rule)
    shelf.put("a0", "a1")
    shelf.use("a0", "a0", "a1")
    shelf.put(*names("b", 3 * SLOTS))
    assert shelf.there(["a0", "a1"]) == kept


def test_lfu_gives_up_the_least_used_of_those_that_were_used() -> None:
    shelf = Shelf(Rule.LFU)
    shelf.put(*names("a", SLOTS))
    shelf.use(*names("a", SLOTS))
    shelf.use(*(set(names("a", SLOTS)) - {"a7"}))
    shelf.put("b")
    assert shelf.there(["a7", "a0"]) == ["a0"]


@pytest.mark.parametrize(("rule", "kept"), [(Rule.S3FIFO, 8), (Rule.LRU, 0)])
def test_s3fifo_is_not_flushed_by_a_scan(rule: Rule, kept: int) -> None:
    shelf = Shelf(rule)
    hot = names("hot", 8)
    shelf.put(*hot)
    shelf.use(*hot, *hot, *hot)
    shelf.put(*names("scan", 4 * SLOTS))
    assert len(shelf.there(hot)) == kept
    shelf.core.audit()


def test_arc_gives_more_room_to_the_kind_that_comes_back() -> None:
    shelf = Shelf(Rule.ARC)
    often, once = names("often", 8), names("once", 8)
    shelf.put(*often)
    shelf.use(*often)
    shelf.put(*once)
    assert shelf.pool["clock"] == 0.0
    shelf.put(*names("x", 4))
    assert len(shelf.there(often)) == 8, "with nothing learned those used once go first"
    for name in once[:4]:  # they were given up too early
        shelf.put(name)
    grown = float(shelf.pool["clock"])
    assert grown > 0.0
    shelf.use(*shelf.there(names("x", 4)))
    shelf.put(*names("y", 8))
    given_up = [name for name in often if not shelf.row(name)]
    assert given_up, "now those used again give way"
    shelf.put(*given_up)  # and were given up too early themselves
    assert shelf.pool["clock"] < grown
    shelf.core.audit()


def share_of_returns(rule: Rule, returns: int, never: int, lives: int) -> float:
    """Of two blocks stored together one comes back when 24 others have come, and the other never does; hints tell them
    apart. How many of those that come back are still there, in the last quarter."""
    shelf, hits, last = Shelf(rule), 0, lives // 4
    for i in range(lives):
        for letter, hint in (("r", returns), ("n", never)):
            shelf.put(f"{letter}{i}")
            shelf.hint(f"{letter}{i}", hint)
        if i >= 12:
            hits += shelf.ask(f"r{i - 12}") and i >= lives - last
        if i % 50 == 0:
            blocks.reindex(shelf.core.store.tables, shelf.namespace.pool.number)
    shelf.core.audit()
    return hits / last


@pytest.mark.parametrize("lives", [600, pytest.param(1200, marks=pytest.mark.long)])
def test_density_learns_from_what_became_of_others_what_a_hint_means(lives: int) -> None:
    assert share_of_returns(Rule.DENSITY, 1, 3, lives) > 0.9
    assert share_of_returns(Rule.DENSITY, 3, 1, lives) > 0.9, "the words mean what they turn out to mean"
    assert share_of_returns(Rule.DENSITY, 2, 2, lives) < 0.7, "told nothing it cannot keep them all"
    assert share_of_returns(Rule.LRU, 1, 3, lives) == 0.0


def test_density_takes_no_hint_at_its_word() -> None:
    shelf = Shelf(Rule.DENSITY)
    shelf.put(*names("x", SLOTS))
    for i in range(SLOTS):
        shelf.hint(f"x{i}", 3 if i >= SLOTS // 2 else 1)
    blocks.reindex(shelf.core.store.tables, shelf.namespace.pool.number)
    shelf.put(*names("y", 4))
    left = shelf.there(names("x", 4))
    assert len(left) <= 1, "with nothing learned about the oldest go first, whatever is said of them"


def test_what_is_said_of_a_block_counts_from_when_it_was_said_first() -> None:
    shelf = Shelf(Rule.DENSITY)
    shelf.put("x")
    row = shelf.row("x")
    tables = shelf.core.store.tables
    touched = float(tables.ranks[row])
    shelf.put("y")
    shelf.hint("x", 2)
    said = float(tables.ranks[row])
    assert said > touched, "its clock begins anew"
    assert int(tables.blocks[row]["touched"]) == int(touched), "which is not its last touch"
    shelf.put("z")
    shelf.hint("x", 2)
    assert float(tables.ranks[row]) == said
    shelf.hint("x", 0)
    assert float(tables.ranks[row]) == touched, "taken back"
    shelf.core.audit()


def test_levels_never_get_sooner_along_a_chain() -> None:
    core = Core()
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.DENSITY))
    client = core.client()
    namespace = client.open()
    keys = chain(6, "a")
    client.put(namespace, keys)
    hints = np.array([1, 7, 2, 0, 5, 6], dtype=np.uint8)
    index = namespace.tenant.index
    assert blocks.hint_run(core.store.tables, index, namespace.number, words(keys), 0, 6, hints) == 6
    said = [int(core.store.tables.blocks[core.row(namespace, key)]["uses"]) >> blocks.HINT_BITS for key in keys]
    assert said == [1, 2, 2, 0, 5, 6]


def test_density_looks_elsewhere_when_the_queue_it_took_from_is_empty() -> None:
    shelf = Shelf(Rule.DENSITY)
    shelf.put(*names("x", SLOTS), "y")  # one queue holds all, and goes on to be taken from
    for name in shelf.there([*names("x", SLOTS), "y"]):
        shelf.hint(name, 3)  # now another one holds all
    shelf.put(*names("z", SLOTS))
    assert shelf.there(names("z", SLOTS)) == names("z", SLOTS)


@pytest.mark.parametrize("rule", [Rule.ARC, Rule.S3FIFO])
def test_there_is_a_victim_before_blocks_are_where_a_new_rule_wants_them(rule: Rule) -> None:
    shelf = Shelf(Rule.LFU)
    shelf.put(*names("x", SLOTS))
    for _ in range(2):
        shelf.use(*names("x", SLOTS))  # all in a queue that the new rule does not know
    set_rule(shelf.core.store.tables, shelf.namespace.pool.number, rule)
    before = shelf.pool["bonus"].copy()
    shelf.put("y")
    assert np.array_equal(shelf.pool["bonus"], before), "what is counted of ghosts went elsewhere"


def hits_of(hints: random.Random | None) -> int:
    """Hits of a workload with reuse of all kinds, with hints that mean nothing, or none."""
    rng, shelf, hits = random.Random(7), Shelf(Rule.DENSITY, arenas=4), 0
    for _ in range(6000):
        name = f"k{int(rng.paretovariate(0.6))}"
        if shelf.ask(name):
            hits += 1
        else:
            shelf.put(name)
        if hints is not None:
            shelf.hint(name, hints.randrange(blocks.HINTS))
    shelf.core.audit()
    return hits


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_hints_that_mean_nothing_cost_density_next_to_nothing(seed: int) -> None:
    without = hits_of(None)
    assert without > 1000, without
    assert abs(hits_of(random.Random(seed)) - without) < 0.04 * without


def test_another_rule_takes_over_with_blocks_there_and_all_stays_whole() -> None:
    rng = random.Random(3)
    shelf = Shelf(Rule.LRU, arenas=2)
    number = 0
    rules = list(Rule)
    for former in rules:
        for rule in rules:
            shelf.choose(former)
            for _ in range(12):
                number += 1
                shelf.put(f"k{number}")
                shelf.ask(f"k{rng.randrange(max(1, number - 40), number + 1)}")
            shelf.choose(rule)
    assert shelf.there([f"k{number}"])


def test_a_rule_that_is_chosen_takes_effect_on_what_is_there() -> None:
    shelf = Shelf(Rule.LRU)
    shelf.put("a0", "a1")
    shelf.use("a0")
    shelf.core.pass_time(SECOND)
    shelf.put(*names("b", SLOTS - 2))
    shelf.use("a1", "a1")
    assert shelf.next_gone() == shelf.row("a0")
    shelf.choose(Rule.LFU)
    assert shelf.next_gone() == shelf.row("b0")
    shelf.choose(Rule.LRU)
    assert shelf.next_gone() == shelf.row("a0")
    shelf.put("c")
    assert shelf.there(["a0", "b0"]) == ["b0"]


def test_a_tenant_goes_by_a_rule_of_its_own_and_the_others_by_that_of_the_tier() -> None:
    core = Core()
    store = core.store
    pools = [core.client(tenant).open().pool.number for tenant in ("a", "b")]
    store.choose_rule(Chosen(Tier.DRAM, "a", Rule.LFU))
    store.choose_rule(Chosen(Tier.DISK, None, Rule.ARC))
    assert [int(store.tables.pools[pool]["rule"]) for pool in pools] == [blocks.LFU, blocks.LRU]
    store.choose_rule(Chosen(Tier.DRAM, None, Rule.PGDSF))
    assert [int(store.tables.pools[pool]["rule"]) for pool in pools] == [blocks.LFU, blocks.PGDSF]
    later = [core.client(tenant).open(9000, "later").pool.number for tenant in ("a", "b")]
    assert not set(later) & set(pools)
    assert [int(store.tables.pools[pool]["rule"]) for pool in later] == [blocks.LFU, blocks.PGDSF]
