"""What routers ask: true, without a trace, and of a tenant's own blocks alone."""

from random import Random
from typing import Final

import numpy as np
import pytest

from kvproto.limits import PAGE_BYTES
from kvstore import admission, blocks
from kvstore.admission import Estimate
from kvstore.routing import load_of, summarise
from kvstore.rules import Chosen, Rule, Tier
from kvstore.sessions import Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import BLOCK_BYTES, MS, SECOND, Core, chain, words
from tests.unit.test_pinning import SEGMENT_BYTES

SLOTS: Final = 16  # of an arena
POOLS: Final = 8  # more than there are; their tables, of a gigabyte and more, have room for thousands


def state_of(core: Core) -> tuple[object, ...]:
    """All that a question could have moved."""
    store = core.store
    assert max(store.arenas.by_number) < POOLS
    by_pool = {"pools", "reuse"}
    all_of = store.tables._asdict().items()
    tables = tuple(table[: POOLS if name in by_pool else None].tobytes() for name, table in all_of)
    curves = store.watching.curves.tap.words.tobytes(), store.watching.departures.table.tobytes()
    return (*tables, *curves, repr(store.tally), store.next_tick_ns(), sorted(store.sessions), len(store.leases))


def estimated(core: Core, namespace: Namespace, wanted_blocks: int) -> Estimate:
    setting = admission.begin(core.store, namespace)
    parts, start = [], 1
    while start:
        part, start = admission.slice_of(core.store, setting, start)
        parts.append(part)
    return admission.estimate(setting, parts, wanted_blocks)


def rows_there(core: Core) -> set[bytes]:
    table = core.store.tables.blocks[: int(core.store.tables.book[blocks.UNUSED_ROW])]
    return {row["key"].tobytes() for row in table if row["state"] == blocks.RESIDENT}


def test_a_prefix_is_summed_up_by_tier_over_all_ranks() -> None:
    limits = DiskLimits(4 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)
    core = Core(disk=limits)
    client = core.client()
    one, two = client.open(model="rank 0"), client.open(model="rank 1")
    keys = chain(6)
    client.put(one, keys)
    client.put(two, keys[:4])
    tickets = client.begin(two, keys[4:5], keys[3])
    alone, both = (summarise(core.store, spaces, words(keys)) for spaces in ([one], [one, two]))
    assert (alone.blocks, alone.dram_blocks, alone.disk_blocks, alone.pending_blocks) == (6, 6, 0, 0)
    assert (both.blocks, both.dram_blocks, both.pending_blocks) == (4, 4, 1)
    assert (alone.dram_bytes, both.dram_bytes) == (6 * BLOCK_BYTES, 8 * BLOCK_BYTES)
    assert alone.block_tokens == 16
    assert summarise(core.store, [one], words(chain(3, "nothing"))).blocks == 0
    client.store.abort(client.session, tickets)
    core.work_all()
    index = one.tenant.index
    for key in reversed(keys[3:]):
        assert blocks.retire(core.store.tables, index, core.row(one, key), 1)[0] == blocks.DONE
    lower = summarise(core.store, [one], words(keys))
    assert (lower.dram_blocks, lower.disk_blocks, lower.disk_bytes) == (3, 3, 3 * BLOCK_BYTES)
    assert lower.load_s is None or lower.load_s > 0


def test_seconds_are_told_once_somebody_has_reported_them() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(4)
    client.put(namespace, keys)
    assert summarise(core.store, [namespace], words(keys)).load_s is None
    for _ in range(3):
        core.store.costing.report_load(namespace, 1, 1 << 20, 0.01)
        core.store.costing.report_prefill(namespace, 0, 64, 0.2)
    summary = summarise(core.store, [namespace], words(keys))
    matched = client.store.match(namespace, words(keys), 0, 4)
    assert summary.load_s is not None
    assert summary.recompute_s is not None
    assert (round(summary.load_s * 1e9), round(summary.recompute_s * 1e9)) == (matched.load_ns, matched.recompute_ns)


def test_asking_changes_nothing() -> None:
    core = Core()
    client = core.client()
    namespace = client.open()
    for name in range(20):
        core.pass_time(10 * MS)
        client.put(namespace, chain(4, name))
    client.fetch(namespace, chain(4, 19))
    core.store.leasing.account()
    before = state_of(core)
    for _ in range(3):
        summarise(core.store, [namespace], words(chain(4, 19)))
        summarise(core.store, [namespace], words(chain(4, "absent")))
        load_of(core.store)
        estimated(core, namespace, 10)
    assert state_of(core) == before
    client.store.match(namespace, words(chain(4, 19)), 0, 4)
    assert state_of(core) != before, "the control: a MATCH is counted"


def test_load_says_what_is_going_on() -> None:
    core = Core()
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(3))
    held = client.lease(namespace, chain(3))
    client.begin(namespace, chain(2, "b"))
    load = load_of(core.store)
    assert (load.clients, load.tickets, load.leases, load.waiting_leases, load.draining) == (1, 2, 1, 0, False)
    (dram,) = load.tiers
    assert (dram.name, dram.capacity_bytes, dram.used_bytes) == ("dram", 4 * SLOTS * PAGE_BYTES, 5 * PAGE_BYTES)
    assert dram.read_bytes_per_s is None
    for _ in range(3):
        core.store.costing.report_load(namespace, 1, 1 << 20, 0.01)
    (dram,) = load_of(core.store).tiers
    assert dram.read_bytes_per_s == pytest.approx(100 * (1 << 20), rel=0.01)
    client.release(held)
    assert load_of(core.store).leases == 0


def test_no_tenant_makes_a_host_look_faster_than_it_is() -> None:
    core = Core()
    timings = {"honest": 10e9, "slow": 5e9, "liar": 1e15}
    for tenant, bytes_per_s in timings.items():
        client = core.client(tenant)
        namespace = client.open()
        for number in range(60):
            load_bytes = 1 << (20 + number % 6)
            core.store.costing.report_load(namespace, 1, load_bytes, 100e-6 + load_bytes / bytes_per_s)
    (dram,) = load_of(core.store).tiers
    assert dram.read_bytes_per_s is not None
    largest = 1 << 25
    assert dram.read_bytes_per_s == pytest.approx(largest / (100e-6 + largest / 10e9), rel=0.05), "and calls count"
    fastest = max(way.speed() or 0.0 for _, _, way in core.store.costing.ways(core.store.tenants.values()))
    assert fastest > 10 * dram.read_bytes_per_s, "the control: the liar was heard"


def test_one_slow_or_fast_load_says_nothing_and_the_daemons_own_reads_win_over_what_tenants_say() -> None:
    limits = DiskLimits(4 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)
    core = Core(disk=limits)
    namespace = core.client().open()
    for tier in (1, 2):
        core.store.costing.report_load(namespace, tier, 1 << 24, 1e-6)
    assert [tier.read_bytes_per_s for tier in load_of(core.store).tiers] == [None, None]
    for _ in range(60):
        core.store.costing.report_load(namespace, 2, 1 << 24, 1e-6)
        core.store.costing.read(1 << 24, 0.01)
    dram, disk = load_of(core.store).tiers
    assert dram.read_bytes_per_s is None
    assert disk.read_bytes_per_s == pytest.approx((1 << 24) / 0.01, rel=0.05)


@pytest.mark.parametrize("rule", [Rule.LRU, Rule.LFU, Rule.PGDSF, Rule.SECOND_TOUCH, Rule.DENSITY])
@pytest.mark.parametrize("seed", range(2))
def test_what_would_be_given_up_is_what_is_given_up_then(rule: Rule, seed: int) -> None:
    print(f"seed {seed}")
    random = Random(seed)
    core = Core(arenas=2)
    client = core.client()
    core.store.choose_rule(Chosen(Tier.DRAM, None, rule))
    core.settle()
    namespace = client.open()
    for _ in range(3):
        core.store.costing.report_prefill(namespace, 0, 64, 0.2)
        core.store.costing.report_prefill(namespace, 256, 64, 0.7)
    for name in range(14):
        core.pass_time(SECOND)
        client.put(namespace, chain(random.randint(1, 5), name))
        client.fetch(namespace, chain(2, random.randrange(name + 1)))
    core.store.leasing.account()
    wanted = random.randint(6, 12)
    told = estimated(core, namespace, wanted)
    before = rows_there(core)
    costs = {
        row["key"].tobytes(): blocks.seconds_of_cost(row["cost"])
        for row in core.store.tables.blocks[: int(core.store.tables.book[blocks.UNUSED_ROW])]
        if row["cost"]
    }
    client.put(namespace, chain(wanted, "new"))
    gone = before - rows_there(core)
    assert (told.wanted_blocks, told.free_blocks + told.evicted_blocks, told.short_blocks) == (wanted, wanted, 0)
    assert told.evicted_blocks == len(gone) > 0
    assert told.evicted_bytes == len(gone) * PAGE_BYTES
    assert told.lost_s == pytest.approx(sum(costs.get(key, 0.0) for key in gone))
    assert told.lost_s > 0
    assert not told.from_others


def test_what_is_leased_is_not_counted_as_room_and_what_stays_on_disk_is_not_lost() -> None:
    limits = DiskLimits(4 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(10))
    core.work_all()
    client.put(namespace, chain(6, "b"))
    held = client.lease(namespace, chain(6, "b"))
    told = estimated(core, namespace, 16)
    assert (told.free_blocks, told.evicted_blocks, told.kept_blocks, told.short_blocks) == (0, 10, 10, 6)
    assert told.lost_s == 0.0
    client.release(held)
    assert estimated(core, namespace, 16).short_blocks == 0, "the control"


def test_a_tenant_below_what_it_is_sure_of_is_told_that_others_would_give_way() -> None:
    core = Core(arenas=4)
    rich, poor = core.client("rich"), core.client("poor")
    mine, theirs = rich.open(), poor.open()
    rich.put(mine, chain(64))
    told = estimated(core, theirs, 4)
    assert told.from_others
    assert not estimated(core, mine, 4).from_others, "the control"
    assert np.isfinite(told.lost_s)


def test_an_estimate_ends_when_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(arenas=4)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(4 * SLOTS))
    monkeypatch.setattr(admission, "LOOK_BLOCKS", 8)
    setting = admission.begin(core.store, namespace)
    part, _ = admission.slice_of(core.store, setting, 1)
    asked: list[int] = []

    def waits() -> bool:
        asked.append(len(asked))
        return len(asked) < 3

    with pytest.raises(TimeoutError):
        admission.estimate(setting, [part], 4 * SLOTS, waits)
    assert len(asked) == 3
    told = admission.estimate(setting, [admission.slice_of(core.store, setting, 1)[0]], 4 * SLOTS, lambda: True)
    assert told.evicted_blocks == 4 * SLOTS, "the control"


def test_where_there_is_room_nobody_is_looked_at_and_a_store_that_is_empty_has_rows_to_look_at_none() -> None:
    core = Core(arenas=1)
    namespace = core.client().open()
    setting = admission.begin(core.store, namespace)
    assert setting.free_slots == SLOTS
    told = admission.estimate(setting, [], SLOTS)
    assert (told.free_blocks, told.evicted_blocks, told.short_blocks) == (SLOTS, 0, 0)
    assert estimated(core, namespace, SLOTS + 1).short_blocks == 1, "the control: more than all of it"


def test_memory_of_a_tenants_other_block_sizes_is_told_beside_what_is_short() -> None:
    core = Core(arenas=2)
    client = core.client()
    small, large = client.open(), client.open(model="large", block_bytes=3 * PAGE_BYTES)
    assert estimated(core, large, 1).other_sizes_bytes == 0, "the control: it has none yet"
    client.put(small, chain(32))
    told = estimated(core, large, 4)
    assert told.short_blocks == 4, "what others of the tenant would give is not counted"
    assert told.other_sizes_bytes == core.store.arenas.arena_bytes * 2
