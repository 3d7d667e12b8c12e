"""Rules over a warm restart: what was chosen at run time, and what rows say of how often they were used."""

import dataclasses

import pytest

from kvproto.errors import Grant
from kvstore import blocks
from kvstore.rules import Chosen, Rule, Rules, Tier
from kvstore.store import Store
from kvstore.tables import Limits
from tests.core import SECOND, Client, Core, key_of
from tests.fakes import FakeRandomness
from tests.unit.test_restart import successor

SLOTS = 16  # of an arena of `Core`


def rule_of(core: Core, tenant: str, block_bytes: int = 96) -> int:
    """What a tenant's pool goes by."""
    pool = core.client(tenant).open(block_bytes).pool
    return int(core.store.tables.pools[pool.number]["rule"])


def put(client: Client, *names: str) -> None:
    """Store blocks, a second apart."""
    for name in names:
        client.core.pass_time(SECOND)
        assert client.put(client.open(), [key_of(name)]) == [Grant.GRANTED]


def there(core: Core, *names: str) -> list[str]:
    """Those of some blocks that were not evicted."""
    namespace = next(iter(core.store.namespaces.values()))
    return [name for name in names if core.row(namespace, key_of(name))]


def two_kinds(rule: Rule) -> Core:
    """A full store: what was used often is older than all that was used once."""
    core = Core(arenas=1)
    core.store.choose_rule(Chosen(Tier.DRAM, None, rule))
    client = core.client()
    put(client, "often")
    for _ in range(5):
        core.pass_time(SECOND)
        assert client.fetch(client.open(), [key_of("often")]) == 1
    put(client, *(f"once{i}" for i in range(SLOTS - 1)))
    return core


def test_what_was_chosen_at_run_time_holds_in_all_successors() -> None:
    core = Core(arenas=3)
    for tenant in ("a", "b"):
        client = core.client(tenant)
        put(client, f"{tenant}0", f"{tenant}1")
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LFU))
    core.store.choose_rule(Chosen(Tier.DRAM, "a", Rule.ARC))
    core.store.choose_rule(Chosen(Tier.DRAM, "a", Rule.DENSITY))
    core.store.choose_rule(Chosen(Tier.DISK, None, Rule.PGDSF))
    for _ in range(3):  # the second reads what the first has said anew; the journal has two halves
        core = successor(core)
        assert core.store.kept.warm, core.store.kept.reason
        assert core.store.kept.blocks == 4
        core.audit()
        assert rule_of(core, "a") == rule_of(core, "a", 5000) == blocks.DENSITY
        assert rule_of(core, "b") == rule_of(core, "b", 5000) == blocks.LFU
        assert core.store.policies.rule_of(Tier.DISK, None) is Rule.PGDSF
        assert rule_of(core, "newcomer") == blocks.LFU


def test_a_rule_that_was_reset_is_the_configured_one_again_here_and_in_successors() -> None:
    core = Core(arenas=3)
    for tenant in ("a", "b"):
        put(core.client(tenant), f"{tenant}0", f"{tenant}1")
    usual = rule_of(core, "a")
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LFU))
    core.store.choose_rule(Chosen(Tier.DRAM, "a", Rule.ARC))
    assert usual not in {rule_of(core, "a"), rule_of(core, "b")}
    core.store.reset_rule(Tier.DRAM, "a")
    core.store.reset_rule(Tier.DRAM, "nobody")
    assert rule_of(core, "a") == rule_of(core, "b") == blocks.LFU, "the rule of all"
    later = successor(core)
    assert rule_of(later, "a") == blocks.LFU
    later.store.reset_rule(Tier.DRAM, None)
    later.settle()
    later.audit()
    for core in (later, successor(later)):
        assert rule_of(core, "a") == rule_of(core, "b") == usual
        assert not core.store.policies.chosen()
        assert core.store.kept.blocks == 4


def test_a_choice_outlives_a_journal_that_is_written_anew() -> None:
    core = Core(arenas=3)
    put(core.client(), "one")
    core.store.choose_rule(Chosen(Tier.DRAM, "t", Rule.ARC))
    journal = core.store.registry._journal
    journal._end = journal._half_bytes  # full
    core.store.choose_rule(Chosen(Tier.DRAM, "t", Rule.LFU))
    later = successor(core)
    assert later.store.kept.blocks == 1
    assert rule_of(later, "t") == blocks.LFU


def test_a_cold_start_goes_by_the_configuration_again() -> None:
    core = Core(arenas=3)
    put(core.client(), "one")
    usual = rule_of(core, "t")
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.ARC))
    assert rule_of(successor(core, memory=False), "t") == usual
    assert rule_of(core, "t") == blocks.ARC


def reborn(core: Core, rules: Rules) -> Store:
    """A warm successor with another configuration."""
    memory = core.memory.successor()
    limits: Limits = dataclasses.replace(core.store.limits, rules=rules)
    store = Store(limits, core.clock, FakeRandomness(), memory, core.outbox, None, memory)
    assert store.kept.warm, store.kept.reason
    return store


@pytest.mark.parametrize("chosen", [None, Rule.LFU])
def test_the_configuration_of_a_warm_start_holds_only_where_nobody_has_chosen(chosen: Rule | None) -> None:
    core = Core(arenas=3)
    put(core.client(), "one")
    if chosen:
        core.store.choose_rule(Chosen(Tier.DRAM, None, chosen))
    policies = reborn(core, Rules(Rule.PGDSF, Rule.ARC)).policies
    assert policies.rule_of(Tier.DRAM, "t") is (chosen or Rule.PGDSF)
    assert policies.rule_of(Tier.DISK, "t") is Rule.ARC, "what the former life was configured with is over"


@pytest.mark.parametrize(
    "record",
    [["omen", 1, "two"], ["rule", "hbm", "", "lru"], ["rule", "dram", "", "oracle"], ["rule", "dram"], ["rule"], []],
)
def test_a_record_that_is_not_understood_costs_nothing_else(record: list[int | str]) -> None:
    core = Core(arenas=3)
    journal = core.store.registry._journal
    journal.add(record)
    put(core.client(), "one")
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.LFU))
    later = successor(core)
    assert later.store.kept.blocks == 1
    assert rule_of(later, "t") == blocks.LFU


NEW = [f"new{i}" for i in range(2 * SLOTS)]


@pytest.mark.parametrize(("rule", "kept"), [(Rule.SECOND_TOUCH, ["often"]), (Rule.LRU, [])])
def test_second_touch_still_knows_after_a_warm_restart_what_was_used_often(rule: Rule, kept: list[str]) -> None:
    later = successor(two_kinds(rule))
    later.work_all()  # what is being verified is not evicted
    put(later.client(), *NEW)
    assert there(later, "often") == kept
    later.audit()


@pytest.mark.parametrize("taught", [True, False])
def test_density_still_knows_after_a_warm_restart_what_was_used_often(taught: bool) -> None:
    core = successor(two_kinds(Rule.DENSITY))
    core.work_all()
    rows, (namespace,) = core.store.tables.blocks, core.store.namespaces.values()
    often, once = (core.row(namespace, key_of(name)) for name in ("often", "once0"))
    assert (rows["uses"][often], rows["uses"][once]) == (6, 1)
    queue = int(rows["queue"][often])
    assert rows["queue"][once] == 0 != queue, "it is of another class, though nobody knows the gaps of a former life"
    if taught:  # what becomes of a class is learned anew in each life
        reuse = core.store.tables.reuse[namespace.pool.number]
        reuse["again"][queue, :16] = reuse["gone"][0, :16] = 500.0
        blocks.reindex(core.store.tables, namespace.pool.number)
    put(core.client(), *NEW)
    assert there(core, "often") == ["often"] * taught
    core.audit()


def test_density_does_not_look_at_rows_that_were_not_whole() -> None:
    core = Core(arenas=2)
    core.store.choose_rule(Chosen(Tier.DRAM, None, Rule.DENSITY))
    put(core.client(), "torn", "whole")
    namespace = next(iter(core.store.namespaces.values()))
    core.store.tables.blocks["slot"][core.row(namespace, key_of("torn"))] = 0xF0000000  # far beyond all arenas
    later = successor(core)
    assert later.store.kept.blocks == 1
    blocks.reindex(later.store.tables, namespace.pool.number)
    later.store.choose_rule(Chosen(Tier.DRAM, None, Rule.DENSITY))
    later.audit()
