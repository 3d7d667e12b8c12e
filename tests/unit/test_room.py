"""Who gives way: leaf-first LRU, recycling between slot sizes and tenants, fair shares, stale arenas."""

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.quotas import Quota
from kvstore.report import ClearScope
from tests.core import ARENA_BYTES, BLOCK_BYTES, MS, SECOND, Client, Core, Held, chain, value_of
from tests.fakes import FakeMemory

SLOTS = ARENA_BYTES // PAGE_BYTES


def present(client: Client, keys: list[bytes]) -> list[bool]:
    """Which keys are resident, each asked on its own."""
    namespace = client.open()
    return [client.match(namespace, [key]) == 1 for key in keys]


def put_apart(core: Core, client: Client, count: int, name: str) -> list[bytes]:
    """Single blocks without parents, each a millisecond older than the next."""
    keys = chain(count, name)
    for key in keys:
        core.clock.advance(MS)
        assert client.put(client.open(), [key]) == [Grant.GRANTED]
    return keys


# -- eviction ---------------------------------------------------------------------------------------------------


def test_the_least_recently_used_block_gives_way() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    keys = put_apart(core, client, SLOTS, "old")
    core.clock.advance(MS)
    client.release(client.lease(namespace, keys[0:1]))  # used: no longer the oldest
    core.clock.advance(MS)
    assert client.put(namespace, keys[1:2]) == [Grant.KNOWN]  # so is this
    assert client.match(namespace, keys[2:3]) == 1  # a MATCH is no use
    put_apart(core, client, 2, "new")
    assert present(client, keys) == [True, True, False, False] + [True] * (SLOTS - 4)
    core.audit()


def test_a_chain_gives_way_from_its_end_and_a_parent_is_protected_by_its_resident_child() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(SLOTS)
    client.put(namespace, keys)
    for new in range(1, 4):
        core.clock.advance(MS)
        client.put(namespace, chain(1, f"new {new}"))
        assert present(client, keys) == [True] * (SLOTS - new) + [False] * new
    core.audit()


def test_of_two_leaves_the_older_gives_way_even_if_its_parent_is_the_newest() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(2)
    client.put(namespace, keys)
    put_apart(core, client, SLOTS - 2, "filler")
    core.clock.advance(MS)
    client.release(client.lease(namespace, keys[:1]))
    client.put(namespace, chain(1, "new"))
    assert present(client, keys) == [True, False]
    core.audit()


def test_nothing_gives_way_that_is_leased_or_in_flight() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    leased, flying = chain(6, "leased"), chain(6, "flying")
    client.put(namespace, leased)
    held = client.lease(namespace, leased)
    client.commit(client.begin(namespace, flying[:3]))
    client.begin(namespace, flying[3:])
    grants = client.put(namespace, chain(SLOTS, "new"))
    assert grants == [Grant.GRANTED] * (SLOTS - 12) + [Grant.FULL] + [Grant.NO_PARENT] * 11
    assert [client.read(namespace, held, i) for i in range(6)] == [value_of(key, BLOCK_BYTES) for key in leased]
    assert client.fetch(namespace, flying[:3]) == 3
    core.audit()


def test_a_request_larger_than_the_tier_stores_the_lead_part_that_fits_and_says_so() -> None:
    core = Core(arenas=2)
    client = core.client(ring_pages=256)
    client.put(client.open(), chain(SLOTS, "old"))
    keys = chain(3 * SLOTS)
    grants = client.put(client.open(), keys)
    assert grants == [Grant.GRANTED] * 2 * SLOTS + [Grant.FULL] + [Grant.NO_PARENT] * (SLOTS - 1)
    assert client.fetch(client.open(), keys) == 2 * SLOTS
    core.audit()


def test_a_chain_grows_by_evicting_others_and_never_its_own_parent() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(SLOTS)
    client.put(namespace, keys[: SLOTS // 2])
    core.clock.advance(MS)
    put_apart(core, client, SLOTS // 2, "other")
    grants = client.put(namespace, keys[SLOTS // 2 :], parent=keys[SLOTS // 2 - 1])
    assert grants == [Grant.GRANTED] * (SLOTS // 2), "the oldest leaf is the parent itself"
    assert client.fetch(namespace, keys) == SLOTS
    core.audit()


def test_full_when_everything_is_leased() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(SLOTS)
    client.put(namespace, keys)
    held = client.lease(namespace, keys)
    assert client.put(namespace, chain(2, "new")) == [Grant.FULL, Grant.NO_PARENT]
    client.release(held)
    assert client.put(namespace, chain(2, "new")) == [Grant.GRANTED] * 2


# -- recycling --------------------------------------------------------------------------------------------------


def fill(core: Core, client: Client, arenas: int, name: str = "rich") -> list[bytes]:
    """Store so much that a tenant has that many arenas."""
    keys = chain(arenas * SLOTS, name)
    assert client.put(client.open(), keys) == [Grant.GRANTED] * len(keys)
    assert client.session.tenant.arenas == arenas
    core.clock.advance(MS)
    return keys


def put_until_granted(core: Core, client: Client, keys: list[bytes], block_bytes: int = BLOCK_BYTES) -> int:
    """Store again while told BUSY: how often it was asked."""
    for asked in range(1, 10):
        grants = client.put(client.open(block_bytes), keys)
        if Grant.BUSY not in grants:
            assert set(grants) <= {Grant.GRANTED, Grant.KNOWN}, grants
            return asked
        core.settle()
    raise AssertionError("BUSY for ever")


def test_a_tenant_above_its_share_gives_way_to_one_below_it() -> None:
    core = Core(arenas=4)
    rich, poor = core.client("rich", 256), core.client("poor")
    fill(core, rich, 4)
    assert put_until_granted(core, poor, chain(SLOTS, "poor")) == 2
    assert (rich.session.tenant.arenas, poor.session.tenant.arenas) == (3, 1)
    assert put_until_granted(core, poor, chain(SLOTS, "more")) == 2
    assert (rich.session.tenant.arenas, poor.session.tenant.arenas) == (2, 2)
    assert core.store.arenas.recycled == 2
    core.audit()


def test_a_tenant_at_its_share_does_not_give_way() -> None:
    core = Core(arenas=4)
    one, two = core.client("one", 256), core.client("two", 256)
    kept = fill(core, one, 2, "one")
    fill(core, two, 2, "two")
    grants = two.put(two.open(), chain(SLOTS, "more"))
    assert grants == [Grant.GRANTED] * SLOTS, "it evicts its own"
    core.settle()
    assert one.fetch(one.open(), kept) == len(kept)
    assert core.store.arenas.recycled == 0
    held = [two.ask(two.open(), [key], 60 * SECOND) for key in chain(2 * SLOTS, "two") + chain(SLOTS, "more")]
    assert sum(isinstance(lease, Held) for lease in held) == 2 * SLOTS
    assert two.put(two.open(), chain(1, "yet more")) == [Grant.FULL], "its own share is leased"
    core.audit()


def test_the_arena_that_gives_way_is_the_least_recently_used_without_leases() -> None:
    core = Core(arenas=3)
    rich, poor = core.client("rich", 256), core.client("poor")
    keys = [chain(SLOTS, f"rich {i}") for i in range(3)]
    for some in keys:
        rich.put(rich.open(), some)
        core.clock.advance(MS)
    held = rich.lease(rich.open(), keys[0], 60 * SECOND)  # the oldest is busy
    put_until_granted(core, poor, chain(1, "poor"))
    assert [rich.match(rich.open(), some) for some in keys] == [SLOTS, 0, SLOTS]
    assert rich.read(rich.open(), held) == value_of(keys[0][0], BLOCK_BYTES)
    core.audit()


def test_what_continues_a_recycled_block_elsewhere_goes_with_it() -> None:
    core = Core(arenas=2)
    rich, poor = core.client("rich", 256), core.client("poor")
    keys = fill(core, rich, 2)
    core.clock.advance(MS)
    rich.release(rich.lease(rich.open(), keys[SLOTS:]))
    put_until_granted(core, poor, chain(1, "poor"))
    core.settle()
    assert rich.match(rich.open(), keys) == 0
    assert core.store.tables.book[blocks.ROWS] == 1
    core.audit()


def test_memory_moves_between_slot_sizes_of_one_tenant() -> None:
    core = Core(arenas=2)
    client = core.client(ring_pages=256)
    keys = fill(core, client, 2)
    large = 4 * PAGE_BYTES
    maps = dict(client.maps)
    assert put_until_granted(core, client, chain(4, "large"), large) == 1, "nothing has to be made anew"
    assert client.fetch(client.open(large), chain(4, "large")) == 4
    assert client.match(client.open(), keys) in (0, SLOTS)
    assert core.store.arenas.recycled == 1
    assert client.maps.keys() >= maps.keys(), "the map of an arena that changed its slot size is still good"
    core.audit()


def test_an_arena_is_not_handed_on_within_a_tenant_while_somebody_may_read_it() -> None:
    core = Core(arenas=1)
    client = core.client(ring_pages=256)
    keys = fill(core, client, 1)
    lease = client.lease(client.open(), keys, 60 * SECOND)
    large = 4 * PAGE_BYTES
    for _ in range(3):
        assert set(client.put(client.open(large), chain(1, "large"))) <= {Grant.BUSY, Grant.FULL}
        core.settle()
        assert client.read(client.open(), lease) == value_of(keys[0], BLOCK_BYTES)
    client.release(lease)
    core.settle()
    assert put_until_granted(core, client, chain(1, "large"), large) == 1
    core.audit()


def test_a_pool_does_not_take_a_siblings_arena_that_is_worth_more_than_its_own_oldest_leaf() -> None:
    core = Core(arenas=2)
    client = core.client(ring_pages=256)
    large = 4 * PAGE_BYTES
    client.put(client.open(large), chain(4, "large"))
    core.clock.advance(MS)
    client.put(client.open(), chain(SLOTS, "small"))
    core.clock.advance(MS)
    client.put(client.open(large), chain(4, "newer"))
    assert core.store.arenas.recycled == 0
    assert client.fetch(client.open(), chain(SLOTS, "small")) == SLOTS
    core.audit()


def test_others_are_told_busy_or_evict_their_own_while_one_arena_is_on_its_way() -> None:
    core = Core(arenas=4)
    rich, poor, third = core.client("rich", 256), core.client("poor"), core.client("third")
    fill(core, rich, 4)
    assert poor.put(poor.open(), chain(2, "poor")) == [Grant.BUSY] * 2
    assert third.put(third.open(), chain(2, "third")) == [Grant.BUSY] * 2
    assert rich.put(rich.open(), chain(2, "rich again")) == [Grant.GRANTED] * 2
    assert core.store.arenas.recycled == 1
    core.settle()
    core.audit()


def test_while_the_only_free_arena_waits_for_another_tenant_one_may_ask_again() -> None:
    nothing = Quota(dram_guaranteed_bytes=0)
    quotas = {"rich": Quota(dram_guaranteed_bytes=ARENA_BYTES), "poor": nothing, "third": nothing}
    core = Core(arenas=3, quotas=quotas)
    rich, poor, third = core.client("rich", 256), core.client("poor"), core.client("third")
    put_apart(core, rich, 3 * SLOTS, "rich")
    assert poor.put(poor.open(), chain(2, "poor")) == [Grant.BUSY] * 2
    core.settle()
    assert core.store.arenas.serving() == 2
    assert third.put(third.open(), chain(2, "third")) == [Grant.BUSY] * 2, "not FULL: whom it waits for may not come"
    core.pass_time(2 * SECOND)
    assert third.put(third.open(), chain(2, "third")) == [Grant.GRANTED] * 2
    assert poor.put(poor.open(), chain(2, "poor"))[0] in {Grant.FULL, Grant.BUSY}
    core.settle()
    core.audit()


def test_memory_that_lies_empty_goes_to_whoever_needs_it_whatever_the_shares() -> None:
    core = Core(arenas=4)
    one, two = core.client("one"), core.client("two")
    put_apart(core, one, 2 * SLOTS, "one")
    put_apart(core, two, 2 * SLOTS, "two")
    core.store.clear(ClearScope(tenant="one"), lambda _: None, dry_run=False)
    core.settle()
    for number in range(2):
        put_until_granted(core, two, chain(SLOTS, f"more {number}"))
    assert (one.session.tenant.arenas, two.session.tenant.arenas) == (0, 4)
    core.audit()


def test_an_arena_is_not_given_up_before_the_last_lease_on_it_has_ended() -> None:
    core = Core(arenas=4, slice_steps=1)
    rich, poor = core.client("rich"), core.client("poor")
    keys = put_apart(core, rich, 4 * SLOTS, "rich")
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.BUSY]
    last = keys[SLOTS - 1]  # of the arena that is being drained, block by block
    held = rich.lease(rich.open(), [last], 2 * SECOND)
    core.pass_time(SECOND)
    core.settle()
    assert core.store.arenas.draining is not None
    assert core.store.arenas.recycled == 0
    assert rich.match(rich.open(), [last]) == 0
    assert rich.read(rich.open(), held) == value_of(last, BLOCK_BYTES)
    assert core.store.renew(rich.session, held.number, 60 * SECOND) == held.deadline_ns, "it would never end"
    core.pass_time(SECOND + 200 * MS)
    core.settle()
    assert core.store.arenas.recycled == 1
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.GRANTED]
    core.audit()


def test_a_tenant_cannot_keep_what_is_above_its_share_by_never_letting_go_of_its_leases() -> None:
    core = Core(arenas=4)
    rich, poor = core.client("rich"), core.client("poor")
    keys = put_apart(core, rich, 4 * SLOTS, "rich")
    held = [rich.lease(rich.open(), [key], 2 * SECOND) for key in keys]
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.BUSY]
    core.pass_time(SECOND)
    renewed = [core.store.renew(rich.session, lease.number, 60 * SECOND) > lease.deadline_ns for lease in held]
    assert renewed.count(False) == SLOTS, "those on the arena that gives way, and no others"
    assert rich.read(rich.open(), held[0]) == value_of(keys[0], BLOCK_BYTES)
    core.pass_time(SECOND + 200 * MS)
    core.settle()
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.GRANTED]
    core.audit()


def test_a_pool_that_must_give_up_young_blocks_gets_memory_of_one_that_keeps_old_ones() -> None:
    """Every arena of the large blocks has one that is used all the time; the rest of them lie idle."""
    core = Core(arenas=4)
    client = core.client(ring_pages=256)
    large = 4 * PAGE_BYTES
    old = chain(12, "large")
    for key in old:
        assert client.put(client.open(large), [key]) == [Grant.GRANTED]
    assert client.put(client.open(), chain(1, "small")) == [Grant.GRANTED]
    for step in range(3 * SLOTS):
        core.clock.advance(SECOND)
        for key in old[::4]:
            held = client.ask(client.open(large), [key])
            if isinstance(held, Held):
                client.release(held)
        put_until_granted(core, client, chain(1, f"small {step}"))
    small = next(pool for pool in core.store.arenas.pools if pool.slot_bytes == PAGE_BYTES)
    assert small.arenas == 2, "and no more: by now both pools keep blocks about equally long"
    core.audit()


# -- faults and isolation ---------------------------------------------------------------------------------------


def test_when_the_system_refuses_memory_the_store_lives_on_what_it_has() -> None:
    refusing = False
    core = Core(arenas=4, memory=FakeMemory(refuses=lambda: refusing))
    client = core.client(ring_pages=256)
    namespace = client.open()
    refusing = True
    assert client.put(namespace, chain(2)) == [Grant.FULL, Grant.NO_PARENT]
    refusing = False
    client.put(namespace, chain(SLOTS))
    refusing = True
    assert client.put(namespace, chain(2, "new")) == [Grant.GRANTED] * 2, "it evicts"
    refusing = False
    assert client.put(namespace, chain(SLOTS, "more")) == [Grant.GRANTED] * SLOTS
    core.audit()


def test_tenants_with_one_identity_and_one_key_see_nothing_of_each_other() -> None:
    core = Core()
    one, two = core.client("one"), core.client("two")
    keys = chain(3)
    one.put(one.open(), keys)
    assert two.match(two.open(), keys) == 0
    assert two.ask(two.open(), keys) is None
    assert two.put(two.open(), chain(1, "child"), parent=keys[-1]) == [Grant.NO_PARENT]
    assert two.delete(two.open(), keys) == [0]
    assert two.put(two.open(), keys) == [Grant.GRANTED] * 3
    assert two.delete(two.open(), keys) == [3]
    assert one.fetch(one.open(), keys) == 3
    arenas = {of for of, _ in one.lease(one.open(), keys).locations}
    two.put(two.open(), keys)
    assert not arenas & {of for of, _ in two.lease(two.open(), keys).locations}
    core.audit()


def test_namespaces_of_one_tenant_see_nothing_of_each_other() -> None:
    core = Core()
    client = core.client()
    keys = chain(2)
    client.put(client.open(model="a"), keys)
    assert client.match(client.open(model="b"), keys) == 0
    assert client.put(client.open(model="b"), keys) == [Grant.GRANTED] * 2
    client.delete(client.open(model="a"), keys)
    assert client.fetch(client.open(model="b"), keys) == 2
    core.audit()


def test_a_tenant_below_its_share_gets_the_arena_that_was_recycled_for_it_though_the_richer_one_is_faster() -> None:
    core = Core(arenas=4)
    rich, poor = core.client("rich"), core.client("poor")
    put_apart(core, rich, 4 * SLOTS, "rich")
    asked = put_while_others_are_faster(core, poor, rich)
    assert asked == 2
    assert (rich.session.tenant.arenas, poor.session.tenant.arenas) == (3, 1)
    core.audit()


def test_an_arena_that_nobody_comes_back_for_serves_whoever_asks() -> None:
    core = Core(arenas=4)
    rich, poor = core.client("rich"), core.client("poor")
    put_apart(core, rich, 4 * SLOTS, "rich")
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.BUSY]
    core.settle()
    core.store.exited(poor.session)
    put_apart(core, rich, 2 * SLOTS, "more")
    assert rich.session.tenant.arenas == 4
    core.audit()


def put_while_others_are_faster(core: Core, poor: Client, rich: Client) -> int:
    """How often `poor` has to ask while `rich` stores an arena's worth between any two of its attempts."""
    for asked in range(1, 10):
        if poor.put(poor.open(), chain(1, "poor")) == [Grant.GRANTED]:
            return asked
        core.settle()
        put_apart(core, rich, SLOTS, f"again {asked}")
    raise AssertionError("the poorer tenant starves")
