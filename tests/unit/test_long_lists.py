"""Leaf lists longer than a leaf looks for its place in: what moves many leaves keeps them in their order."""

import random

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.audit_tables import EXACT_ORDER
from kvstore.rules import Chosen, Rule, Tier
from kvstore.sessions import Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import MS, SECOND, Client, Core, chain, key_of
from tests.unit.test_restart import successor

LEAVES = 2 * EXACT_ORDER
SLOTS = 16  # of an arena of `Core`
SEGMENT_BYTES = (2 * SLOTS + 2) * PAGE_BYTES
DISK = DiskLimits(
    2 * LEAVES // SLOTS * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES
)  # fmt: skip


def shelf(rule: Rule = Rule.LRU, **changes: int | DiskLimits) -> tuple[Core, Client, Namespace]:
    """A full store of single blocks, which were used in another order than they lie in."""
    core = Core(LEAVES // SLOTS, **changes)  # type: ignore[arg-type]  # as `Core` wants them
    core.store.choose_rule(Chosen(Tier.DRAM, None, rule))
    client = core.client()
    namespace = client.open()
    for i in range(LEAVES):
        core.clock.advance(SECOND)
        assert client.put(namespace, [key_of(i)]) == [Grant.GRANTED]
    used = list(range(LEAVES))
    random.Random(1).shuffle(used)
    for i in used:
        core.clock.advance(SECOND)
        assert client.fetch(namespace, [key_of(i)]) == 1
    core.store.leasing.account()
    return core, client, namespace


def listed(core: Core) -> list[int]:
    """Rows in DRAM, as they are listed: the oldest of each queue first."""
    (namespace,) = core.store.namespaces.values()
    found: list[int] = []
    for oldest in core.store.tables.pools[namespace.pool.number]["oldest"].tolist():
        row = oldest
        while row:
            found.append(row)
            row = int(core.store.tables.blocks["newer"][row])
    return found


def by_touch(core: Core, rows: list[int]) -> list[int]:
    """The same rows by their last touch."""
    return sorted(rows, key=core.store.tables.blocks["touched"].__getitem__)


def choose(core: Core, rule: Rule) -> None:
    """Another rule from now on."""
    core.store.choose_rule(Chosen(Tier.DRAM, None, rule))


def work(core: Core) -> int:
    """Jobs come to their end. How many slices that took."""
    slices = 0
    while core.store.sweeper.jobs.waiting:
        core.store.tick()
        slices += 1
    return slices


# -- another rule ------------------------------------------------------------------------------------------------


def test_another_rule_and_the_former_one_again_leave_the_order_of_last_use() -> None:
    core, _, _ = shelf()
    before = listed(core)
    assert before == by_touch(core, before) != sorted(before)
    for rule in Rule:
        choose(core, rule)
        work(core)
        assert listed(core) == before, rule  # all were used as often, and so are in one queue
        choose(core, Rule.LRU)
        work(core)
        assert listed(core) == before, rule
        core.audit()


def test_what_is_used_and_stored_while_another_rule_takes_over_is_in_its_place_too() -> None:
    core, client, namespace = shelf(slice_steps=64)
    before = listed(core)
    choose(core, Rule.SECOND_TOUCH)
    for i in range(40):
        core.pass_time(SECOND)
        client.fetch(namespace, [key_of(i)])
        core.pass_time(SECOND)
        client.put(namespace, [key_of(f"new{i}")])
        core.audit()
    assert core.store.sweeper.jobs.waiting
    work(core)
    core.audit()
    pool = core.store.tables.pools[namespace.pool.number]
    for queue in (0, 1):
        rows = [row for row in listed(core) if core.store.tables.blocks["queue"][row] == queue]
        assert rows == by_touch(core, rows)
        assert len(rows) == int(pool["members"][queue]) >= 20
    assert listed(core)[: LEAVES // 2] != before[: LEAVES // 2]


def test_the_rule_in_force_chosen_again_moves_nothing() -> None:
    core, _, _ = shelf()
    before, begun = listed(core), core.store.sweeper.jobs.begun
    choose(core, Rule.LRU)
    assert (core.store.sweeper.jobs.begun, listed(core)) == (begun, before)
    choose(core, Rule.LFU)
    assert core.store.sweeper.jobs.begun == begun + 1


def test_a_slice_of_another_rule_moves_no_more_than_its_steps() -> None:
    core, _, _ = shelf(slice_steps=64)
    choose(core, Rule.LFU)
    assert work(core) >= (1 + blocks._STEPS_A_LEAF) * LEAVES // 64 - 1
    core, _, _ = shelf(slice_steps=1 << 20)
    choose(core, Rule.LFU)
    assert work(core) == 0, "all in the first one"


def test_of_two_rules_chosen_one_after_the_other_the_last_one_holds() -> None:
    core, _, namespace = shelf(slice_steps=64)
    before = listed(core)
    for rule in (Rule.LFU, Rule.PGDSF, Rule.LFU, Rule.ARC):
        choose(core, rule)
        for _ in range(LEAVES // 64):  # so some are where one of them wants them
            core.store.tick()
        assert core.store.sweeper.jobs.waiting
        core.audit()
    work(core)
    core.audit()
    pool = core.store.tables.pools[namespace.pool.number]
    assert (int(pool["rule"]), int(pool["moving"])) == (blocks.ARC, 0)
    assert pool["members"].tolist()[:2] == [0, LEAVES], "all were used again"
    assert listed(core) == before


def test_who_is_held_while_another_rule_takes_over_goes_by_it_too() -> None:
    core, _, namespace = shelf(slice_steps=64)
    choose(core, Rule.PGDSF)
    for _ in range(LEAVES // 32):  # all were looked at, and some have been moved
        core.store.tick()
    ranks, clock = core.store.tables.ranks, core.store.tables.pools[namespace.pool.number]["clock"]
    held = np.array([row for row in listed(core) if ranks[row] > clock][:50], dtype=np.uint32)
    assert held.size == 50
    blocks.hold_rows(core.store.tables, held, 0, held.size)
    work(core)
    blocks.unhold_rows(core.store.tables, held, 0, held.size)
    assert not (ranks[held] > clock).any()
    core.audit()


# -- the clock of PGDSF ------------------------------------------------------------------------------------------


def stale_for(client: Client, namespace: Namespace) -> int:
    """How many others come, and are used once, until a block goes that was used five times and never again."""
    core = client.core
    client.put(namespace, [key_of("dear")])
    for _ in range(5):
        core.clock.advance(SECOND)
        client.fetch(namespace, [key_of("dear")])
    for i in range(1000):
        if not core.row(namespace, key_of("dear")):
            return i
        core.clock.advance(MS)
        client.put(namespace, [key_of(f"n{i}")])
        client.fetch(namespace, [key_of(f"n{i}")])
    return 1000


def test_the_clock_of_pgdsf_does_not_take_over_what_another_rule_went_by() -> None:
    core = Core(16, slice_steps=8)
    core.clock.advance(10 * 86400 * SECOND)
    choose(core, Rule.LRU)
    clients = [core.client(tenant) for tenant in ("a", "b")]
    namespaces = [client.open() for client in clients]
    for i in range(64):
        for client, namespace in zip(clients, namespaces, strict=True):
            namespace.recompute_ns = 50 * MS
            core.clock.advance(MS)
            client.put(namespace, chain(2, i))
    choose(core, Rule.PGDSF)
    pools = [core.store.tables.pools[namespace.pool.number] for namespace in namespaces]
    for i in range(20):  # evictions from both, while the one is put in order, and the other waits for it
        for client, namespace in zip(clients, namespaces, strict=True):
            assert client.put(namespace, [key_of(f"one more {i}")]) == [Grant.GRANTED]
            assert core.row(namespace, key_of("one more 0")), "what goes is what was not touched longest"
        core.audit()
        core.pass_time(MS)
    assert all(pool["moving"] for pool in pools)
    assert not any(pool["clock"] for pool in pools)
    work(core)
    core.audit()
    times = [stale_for(client, namespace) for client, namespace in zip(clients, namespaces, strict=True)]
    assert all(100 < time < 1000 for time in times), times
    assert all(0.0 < pool["clock"] < 1.0 for pool in pools), "it goes on from nothing"
    core.audit()


# -- verification, and copies on disk ----------------------------------------------------------------------------


def test_verification_in_the_background_leaves_the_order_of_last_use() -> None:
    core, _, _ = shelf()
    later = successor(core)
    before = listed(later)
    assert before == by_touch(later, before)
    later.clock.advance(SECOND)
    later.store.tick()
    assert later.store.streams.verifying
    assert listed(later) == before, "while they are verified, too"
    later.audit()
    client = later.client()
    used = before[-1]
    key = later.store.tables.blocks["key"][used].tobytes()
    assert later.store.tables.blocks["flags"][used] & blocks.VERIFYING
    assert client.ask(client.open(), [key], wait_ns=SECOND) is not None
    later.audit()
    later.work_all()
    assert later.store.streams.verified == LEAVES
    assert listed(later) == before[:-1] != before, "who is leased is not listed"
    later.audit()


def test_what_is_being_verified_does_not_go_and_is_in_its_place_again_afterwards() -> None:
    core, _, _ = shelf()
    later = successor(core)
    before = listed(later)
    later.clock.advance(SECOND)
    while later.store.unverified:  # but for those that run: the oldest
        later.store.tick()
        if later.store.unverified:
            later.work()
    running = set(later.store.streams.held_rows())
    assert running == set(before[: len(running)])
    client = later.client()
    victim = before[len(running)]
    key = later.store.tables.blocks["key"][victim].tobytes()
    assert later.row(client.open(), key) == victim
    assert client.put(client.open(), [key_of("new")]) == [Grant.GRANTED]
    assert not later.row(client.open(), key), "it is the first of those that are not being verified"
    assert before[0] not in listed(later), "they were passed over"
    later.audit()
    later.work_all()
    assert listed(later)[:-1] == [row for row in before if row != victim]
    later.audit()


@pytest.mark.parametrize("detached", [False, True])
def test_copies_on_disk_that_are_found_and_given_up_leave_the_order(detached: bool) -> None:
    core, _, _ = shelf(disk=DISK)
    core.work_all()
    later = successor(core)
    table = later.store.tables.blocks
    before = listed(later)
    assert len(before) == LEAVES
    assert (table["disk"][before] != 0).all(), "copies of all were found again"
    assert before == by_touch(later, before) != sorted(before)
    if detached:
        for row in sorted(before):
            blocks.detach(later.store.tables, row)
        assert not table["disk"][before].any()
        assert listed(later) == before
