"""What is remembered of evicted blocks, and how they left, over a warm restart."""

import numpy as np
import pytest

from kvproto.limits import POOLS
from kvstore import blocks, rules, store
from kvstore.insight.departures import LOOKS, TRACE_WORDS, Turns
from tests.core import SECOND, Core, chain, key_of, words
from tests.unit.test_explain import ask
from tests.unit.test_restart import successor

SLOTS = 16  # of an arena of `Core`


def flooded(rule: rules.Rule, count: int = 8) -> Core:
    """A store of 16 slots that has evicted as many as `count` blocks, called 0, 1 ..., one a second."""
    core = Core(arenas=1)
    core.store.choose_rule(rules.Chosen(rules.Tier.DRAM, None, rule))
    client = core.client()
    for number in range(SLOTS + count):
        core.pass_time(SECOND)
        client.put(client.open(), [key_of(number)])
    return core


@pytest.mark.parametrize("rule", [rules.Rule.SECOND_TOUCH, rules.Rule.DENSITY, rules.Rule.LFU])
def test_a_block_that_comes_back_after_a_restart_counts_its_former_uses(rule: rules.Rule) -> None:
    for ghosts in (True, False):
        core = flooded(rule)
        namespace = core.client().open()
        evicted = [number for number in range(8) if not core.row(namespace, key_of(number))]
        assert evicted
        for life in range(2):
            core = successor(core, seed=7 + life)  # its own secrets
            core.work_all()
        if not ghosts:
            core.store.tables.ghosts["print"] = 0
        client = core.client()
        client.put(client.open(), [key_of(evicted[0])])
        row = core.store.tables.blocks[core.row(client.open(), key_of(evicted[0]))]
        assert int(row["uses"]) & blocks.USES_MAX == (2 if ghosts else 1)
        assert not core.store.kept.faults
        core.audit()


def test_a_successor_that_dies_on_the_way_leaves_the_ghosts_their_age(monkeypatch: pytest.MonkeyPatch) -> None:
    core = flooded(rules.Rule.SECOND_TOUCH)
    namespace = core.client().open()
    evicted = next(number for number in range(8) if not core.row(namespace, key_of(number)))
    turn = int(core.store.tables.book[blocks.TURN])
    assert turn > 0

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    kept = core.memory.successor()
    with monkeypatch.context() as patch:
        patch.setattr(store, "take_over", die)  # all tables have been made, and nothing been taken over
        with pytest.raises(KeyboardInterrupt):
            Core(1, memory=kept, clock=core.clock, first_generation=int(core.store.tables.book[blocks.GENERATION]) + 1)
    assert kept.tables, "it had them in hand"
    core.memory = kept
    later = successor(core)
    assert later.store.kept.warm
    assert int(later.store.tables.book[blocks.TURN]) >= turn
    later.work_all()
    client = later.client()
    client.put(client.open(), [key_of(evicted)])
    assert int(later.store.tables.blocks[later.row(client.open(), key_of(evicted))]["uses"]) & blocks.USES_MAX == 2


def test_arc_knows_how_many_ghosts_it_has() -> None:
    core = flooded(rules.Rule.ARC)
    before = core.store.tables.pools["ghosts"][0].sum()
    assert before > 0
    later = successor(core)
    assert later.store.tables.pools["ghosts"][0].sum() == before


@pytest.mark.parametrize(("field", "value"), [("queue", 200), ("pool", POOLS - 1), ("pool", 65535)])
def test_ghosts_that_nobody_can_have_made_are_forgotten_and_counted(field: str, value: int) -> None:
    core = flooded(rules.Rule.DENSITY)
    ghosts = core.store.tables.ghosts
    some = np.flatnonzero(ghosts["print"])
    assert some.size > 3
    ghosts[field][some[:3]] = value
    later = successor(core)
    assert np.count_nonzero(later.store.tables.ghosts["print"]) == some.size - 3
    assert any("3 are" in fault for fault in later.store.kept.faults)
    client = later.client()
    for number in range(40):
        client.put(client.open(), [key_of(f"more{number}")])
    later.audit()


def test_a_cold_start_remembers_nothing() -> None:
    core = successor(flooded(rules.Rule.DENSITY), memory=False)
    assert not core.store.tables.ghosts["print"].any()


def test_how_a_block_left_is_told_by_a_successor_too() -> None:
    core = flooded(rules.Rule.LRU)
    client = core.client()
    namespace = client.open()
    evicted_s = core.clock.ns
    client.put(namespace, chain(3, "gone"))
    client.delete(namespace, chain(3, "gone")[:1])
    core.pass_time(60 * SECOND)
    core.store.learned.save()
    core = successor(core, seed=8)
    core.pass_time(60 * SECOND)
    namespace = core.client().open()
    for keys in (chain(3, "gone"), chain(3, "gone")[2:]):
        said = ask(core, namespace, keys)
        assert (said.cause, 110 < said.age_s < 140) == ("deleted", True)
    said = ask(core, namespace, [key_of(0)])
    assert (said.cause, said.rule) == ("evicted", "lru")
    assert abs(said.age_s - (core.clock.ns - evicted_s) / 1e9) < 20
    assert ask(core, namespace, [key_of("never")]).cause == "never"


def test_times_of_evictions_are_not_known_of_a_life_that_wrote_nothing_down() -> None:
    core = flooded(rules.Rule.LRU)
    core.pass_time(100 * SECOND)
    core = successor(core)
    core.pass_time(50 * SECOND)
    said = ask(core, core.client().open(), [key_of(0)])
    assert (said.cause, said.age_s) == ("evicted", 50.0), "before this life began"


@pytest.mark.parametrize("damage", ["name", "future", "places"])
def test_damaged_traces_are_not_believed(damage: str) -> None:
    core = flooded(rules.Rule.LRU)
    client = core.client()
    client.put(client.open(), chain(2, "gone"))
    client.delete(client.open(), chain(2, "gone"))
    traces = core.memory.tables["traces"].view(np.uint64)
    assert traces.size == TRACE_WORDS
    table = core.store.watching.departures.table
    if damage == "name":
        table[0] ^= np.uint64(1)
    elif damage == "future":
        core.store.watching.departures._dropped_ns[3] = core.clock.ns + SECOND
    else:
        used = np.flatnonzero(table[16:]) + 16
        table[used] |= np.uint64(0xE0)  # a place that is none
    later = successor(core)
    said = ask(later, later.client().open(), chain(2, "gone"))
    assert said.cause == "never"
    assert bool(later.store.kept.faults) == (damage != "places")


def test_turns_are_read_as_they_were_written() -> None:
    turns = Turns(5)
    for look in range(3 * LOOKS):
        turns.look(look // 2, 10 * look + 6)
    later = Turns(0)
    later.begin_at(turns.seen, 10**9)
    assert later.take_over(turns.to_bytes())
    for turn in (0, 7, LOOKS, turns.seen):
        assert later.time_of(turn, 2 * 10**9) == turns.time_of(turn, 10**9)
    for bad in (b"", b"x" * 24, turns.to_bytes()[:-1], np.array([[2, 1], [1, 2], [1, 2]], dtype="<i8").tobytes()):
        assert not later.take_over(bad)
    late = Turns(0)
    late.begin_at(3, 10)
    assert not late.take_over(turns.to_bytes()), "later than this life began"


def test_what_continues_a_deleted_block_is_explained_alone() -> None:
    core = Core(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(6))
    branch = [*chain(3), key_of("b0"), key_of("b1")]
    client.put(namespace, branch)
    client.put(namespace, chain(2, "stays"))
    client.delete(namespace, chain(6)[1:2])
    core.settle()
    for key in (*chain(6)[1:], *branch[3:]):
        assert ask(core, namespace, [key]).cause == "deleted"
    assert ask(core, namespace, chain(1)).state == "hit"
    assert ask(core, namespace, chain(3, "stays")[2:]).cause == "never"
    assert core.store.watching.departures.of(namespace.number, words(chain(2, "stays")[1:])).cause == 0
