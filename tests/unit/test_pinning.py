"""Pins: what they keep, what they cost, how they end."""

import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES, PINS_PER_TENANT
from kvproto.policy_frames import Partial, Pinned, Tier
from kvstore import blocks
from kvstore.pinning import LET_GO, LOOK_AT
from kvstore.report import ClearScope
from kvstore.sessions import Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import MS, SECOND, Client, Core, chain, words

SEGMENT_BYTES = 18 * PAGE_BYTES
A_WHILE = 100 * SECOND


def begin(arenas: int = 1, disk: int = 0) -> tuple[Core, Client, Namespace]:
    """A store of 16 slots an arena, a client, a namespace."""
    limits = DiskLimits(disk * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=arenas, disk=limits if disk else None)
    client = core.client()
    return core, client, client.open()


def pin(
    client: Client, namespace: Namespace, keys: list[bytes], ttl_ns: int = A_WHILE, tier: Tier = Tier.DRAM,
    *, refresh: bool = True,
) -> Pinned:  # fmt: skip
    """PIN."""
    pinning = client.store.pinning
    pinned = pinning.pin(client.session.tenant, namespace, words(keys), 0, len(keys), ttl_ns, tier, refresh=refresh)
    client.core.audit()
    return pinned


def flood(client: Client, namespace: Namespace, name: object, blocks: int = 64) -> None:
    """Store so many unrelated blocks that nothing unheld stays."""
    for number in range(blocks):
        client.put(namespace, chain(1, f"{name}/{number}"))
    client.core.audit()


def test_what_is_pinned_stays_and_what_is_not_goes() -> None:
    _core, client, namespace = begin()
    client.put(namespace, chain(4, "kept"))
    client.put(namespace, chain(4, "other"))
    pinned = pin(client, namespace, chain(4, "kept"))
    assert pinned.blocks == 4
    assert pinned.partial == Partial.NOTHING
    assert pinned.bytes == 4 * namespace.identity.block_bytes
    flood(client, namespace, "flood")
    assert client.fetch(namespace, chain(4, "kept")) == 4
    assert client.fetch(namespace, chain(4, "other")) == 0


def test_a_pin_ends_with_its_time_and_gives_everything_back() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pinned = pin(client, namespace, chain(4), ttl_ns=10 * SECOND)
    assert pinned.expires_ns == core.clock.ns + 10 * SECOND
    core.pass_time(9 * SECOND)
    flood(client, namespace, "first")
    assert client.match(namespace, chain(4)) == 4
    core.pass_time(SECOND + 100 * MS)
    assert core.store.pinning.list_pins(client.session.tenant, 0, 10) == []
    assert core.store.pinning.used_bytes(client.session.tenant) == 0
    flood(client, namespace, "second")
    assert client.match(namespace, chain(4)) == 0


@pytest.mark.parametrize("refresh", [True, False])
def test_a_use_of_the_last_block_begins_the_time_anew_if_asked(refresh: bool) -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pin(client, namespace, chain(4), ttl_ns=10 * SECOND, refresh=refresh)
    core.pass_time(9 * SECOND)
    assert client.fetch(namespace, chain(4)) == 4
    core.pass_time(9 * SECOND)
    assert bool(core.store.pinning.pins) is refresh
    core.pass_time(2 * SECOND)
    assert not core.store.pinning.pins


def test_a_use_that_does_not_reach_the_last_block_refreshes_nothing() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pin(client, namespace, chain(4), ttl_ns=10 * SECOND)
    core.pass_time(9 * SECOND)
    client.fetch(namespace, chain(3))
    core.pass_time(2 * SECOND)
    assert not core.store.pinning.pins


def test_pins_of_one_prefix_pay_for_it_once() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    first = pin(client, namespace, chain(4))
    second = pin(client, namespace, chain(3))
    tenant, pinning = client.session.tenant, core.store.pinning
    assert pinning.used_bytes(tenant) == 4 * namespace.slot_bytes
    assert pinning.unpin(tenant, [first.pin]) == 1
    core.audit()
    assert pinning.used_bytes(tenant) == 3 * namespace.slot_bytes
    flood(client, namespace, "flood")
    assert client.match(namespace, chain(4)) == 3
    assert pinning.unpin(tenant, [first.pin, second.pin, second.pin]) == 1
    assert pinning.used_bytes(tenant) == 0
    core.audit()


def test_the_budget_cuts_a_pin_short_and_leaves_room_for_others() -> None:
    _core, client, namespace = begin()  # 16 slots, half of them may be pinned
    client.put(namespace, chain(12))
    pinned = pin(client, namespace, chain(12))
    assert (pinned.blocks, pinned.partial) == (8, Partial.BUDGET)
    assert pin(client, namespace, chain(12)).blocks == 8, "what is paid for already costs nothing"
    client.put(namespace, chain(1, "other"))
    none = pin(client, namespace, chain(1, "other"))
    assert (none.pin, none.blocks, none.partial) == (0, 0, Partial.BUDGET)
    flood(client, namespace, "flood")
    assert client.match(namespace, chain(12)) == 8


def test_a_pin_covers_what_is_there_and_says_so() -> None:
    _core, client, namespace = begin()
    client.put(namespace, chain(2))
    pinned = pin(client, namespace, chain(5))
    assert (pinned.blocks, pinned.partial) == (2, Partial.ABSENT)
    nothing = pin(client, namespace, chain(2, "absent"))
    assert (nothing.pin, nothing.blocks, nothing.partial) == (0, 0, Partial.ABSENT)


def test_pins_are_limited_in_number() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(1))
    pinning, tenant = core.store.pinning, client.session.tenant
    answers = [
        pinning.pin(tenant, namespace, words(chain(1)), 0, 1, A_WHILE, Tier.DRAM) for _ in range(PINS_PER_TENANT + 1)
    ]
    assert [answer.partial for answer in answers[-2:]] == [Partial.NOTHING, Partial.TOO_MANY]
    core.audit()
    assert pinning.unpin(tenant, [answer.pin for answer in answers]) == PINS_PER_TENANT
    core.audit()


def test_nobody_ends_or_sees_the_pins_of_another_tenant() -> None:
    core, client, namespace = begin(arenas=2)
    other = core.client("other")
    client.put(namespace, chain(2))
    pinned = pin(client, namespace, chain(2))
    pinning = core.store.pinning
    assert pinning.unpin(other.session.tenant, [pinned.pin]) == 0
    assert pinning.list_pins(other.session.tenant, 0, 10) == []
    (listed,) = pinning.list_pins(client.session.tenant, 0, 10)
    assert (listed.pin, listed.blocks, listed.expires_ns) == (pinned.pin, 2, pinned.expires_ns)
    assert pinning.list_pins(client.session.tenant, pinned.pin, 10) == []


def test_delete_and_clear_win_over_a_pin() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    client.put(namespace, chain(2, "other"))
    pin(client, namespace, chain(4))
    pin(client, namespace, chain(2, "other"))
    client.delete(namespace, chain(4)[2:3])
    assert client.match(namespace, chain(4)) == 2
    core.settle()
    core.pass_time(100 * MS)
    core.audit()
    assert core.store.pinning.used_bytes(client.session.tenant) == 4 * namespace.slot_bytes
    flood(client, namespace, "flood")
    assert client.match(namespace, chain(4)) == 2, "what comes before it is still pinned"
    core.store.clear(ClearScope(), lambda _report: None, dry_run=False)
    core.settle()
    core.pass_time(100 * MS)
    assert not core.store.pinning.pins
    core.audit()


def test_a_pin_outlives_its_session() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pin(client, namespace, chain(4))
    core.store.detach(client.session)
    core.store.exited(client.session)
    core.audit()
    other = core.client()
    again = other.open()
    flood(other, again, "flood")
    assert other.fetch(again, chain(4)) == 4


def test_a_tenant_that_pins_does_not_keep_another_from_its_share() -> None:
    core, client, namespace = begin(arenas=2)
    client.put(namespace, chain(30))
    pinned = pin(client, namespace, chain(30))
    assert pinned.blocks == 16
    other = core.client("other")
    theirs = other.open()
    granted = 0
    for number in range(40):
        granted += other.put(theirs, chain(1, number)) == [Grant.GRANTED]
        core.settle()
        core.pass_time(100 * MS)
    assert granted >= 16
    assert other.fetch(theirs, chain(1, 39)) == 1
    core.audit()


def test_what_is_pinned_shrinks_with_the_share_that_it_is_a_part_of() -> None:
    """Whoever pinned half of all memory has half of a share when another comes: else his own stores found no room."""
    core, client, namespace = begin(arenas=4)
    for number in range(64):
        client.put(namespace, chain(1, number))
        pin(client, namespace, chain(1, number), 3600 * SECOND)
    tenant, pinning = client.session.tenant, core.store.pinning
    assert pinning.used_bytes(tenant) == 32 * namespace.slot_bytes, "the control: alone he may"
    other = core.client("other")
    theirs = other.open()
    for number in range(64):
        other.put(theirs, chain(1, f"theirs {number}"))
        core.settle()
        core.pass_time(100 * MS)
    core.pass_time(2 * SECOND)
    assert pinning.used_bytes(tenant) == 16 * namespace.slot_bytes
    for number in range(40):
        assert client.put(namespace, chain(1, f"new {number}")) == [Grant.GRANTED]
        core.settle()
        core.pass_time(100 * MS)
    core.audit()


def test_what_lies_on_disk_is_pinned_there_and_brought_back() -> None:
    core, client, namespace = begin(disk=4)
    client.put(namespace, chain(6))
    core.work_all()
    flood(client, namespace, "flood")
    core.work_all()
    assert client.store.match(namespace, words(chain(6)), 0, 6).disk == 6
    pinned = pin(client, namespace, chain(6))
    assert (pinned.blocks, pinned.partial) == (6, Partial.NOTHING)
    core.work_all()
    assert client.store.match(namespace, words(chain(6)), 0, 6).dram == 6
    flood(client, namespace, "again")
    core.work_all()
    assert client.store.match(namespace, words(chain(6)), 0, 6).dram == 6
    assert client.fetch(namespace, chain(6)) == 6


def test_a_pin_on_disk_stays_there_however_much_is_written() -> None:
    core, client, namespace = begin(disk=4)
    client.put(namespace, chain(6))
    core.work_all()
    flood(client, namespace, "flood", 16)
    core.work_all()
    assert pin(client, namespace, chain(6), tier=Tier.DISK).blocks == 6
    flood(client, namespace, "again", 100)
    core.work_all()
    core.audit()
    matched = client.store.match(namespace, words(chain(6)), 0, 6)
    assert (matched.dram, matched.disk) == (0, 6)
    core.store.pinning.unpin(client.session.tenant, list(core.store.pinning.pins))
    flood(client, namespace, "last", 100)
    core.work_all()
    assert client.match(namespace, chain(6)) == 0


def test_what_is_dropped_while_pins_are_looked_at_is_seen_all_the_same() -> None:
    core, client, namespace = begin(arenas=4)
    pinning, tenant = core.store.pinning, client.session.tenant
    names = [f"n{number}" for number in range(20)]
    for name in names:
        client.put(namespace, chain(1, name))
    for number in range(LOOK_AT + 200):
        pinning.pin(tenant, namespace, words(chain(1, names[number % 20])), 0, 1, A_WHILE, Tier.DRAM)
    client.delete(namespace, chain(1, names[0]))
    core.store.tick()  # the first part has been looked at
    client.delete(namespace, chain(1, names[1]))
    for _ in range(200):
        core.store.tick()
    core.audit()
    left = pinning.list_pins(tenant, 0, 10_000)
    assert len(left) == LOOK_AT + 200 - 2 * -(-(LOOK_AT + 200) // 20)
    assert not (core.store.tables.blocks["state"] == blocks.DOOMED).any()


def test_many_pins_end_in_turns_and_give_all_back() -> None:
    core = Core(arenas=1, arena_bytes=512 * PAGE_BYTES)
    client = core.client(ring_pages=600)
    namespace = client.open()
    keys = chain(200)
    client.put(namespace, keys)
    pinning, tenant = core.store.pinning, client.session.tenant
    numbers = [pinning.pin(tenant, namespace, words(keys), 0, 200, A_WHILE, Tier.DRAM).pin for _ in range(300)]
    assert pinning.unpin(tenant, numbers) == 300
    assert pinning.list_pins(tenant, 0, 10) == []
    turns = 0
    while pinning.next_ns() == 0:
        core.audit()
        core.store.tick()
        turns += 1
    assert turns >= 300 * 200 // LET_GO - 1, "nobody waits for all of them"
    assert pinning.used_bytes(tenant) == 0
    assert not core.store.tables.blocks["holds"].any()
    core.audit()


def test_unpinning_ends_the_fetch_of_what_was_pinned() -> None:
    core, client, namespace = begin(disk=4)
    for name in ("a", "b"):
        client.put(namespace, chain(3, name))
        core.work_all()
    flood(client, namespace, "flood", 16)
    core.work_all()
    tenant = client.session.tenant
    one, two, other = (pin(client, namespace, chain(3, name)) for name in ("a", "a", "b"))
    core.store.pinning.unpin(tenant, [one.pin])
    core.store.pinning.unpin(tenant, [other.pin])
    core.work_all()
    core.audit()
    there = [client.store.match(namespace, words(chain(3, name)), 0, 3).dram for name in ("a", "b")]
    assert there == [3, 0], "one pin still wants the first"
    core.store.prefetching.cancel(tenant, [core.store.pinning.pins[two.pin].fetch])
    assert core.store.prefetching.waiting(tenant) == 0


def test_a_list_says_when_a_pin_will_end_after_its_last_use() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(2))
    pin(client, namespace, chain(2), ttl_ns=10 * SECOND)
    core.pass_time(4 * SECOND)
    client.fetch(namespace, chain(2))
    core.store.leasing.account()
    (listed,) = core.store.pinning.list_pins(client.session.tenant, 0, 10)
    assert listed.expires_ns == core.clock.ns + 10 * SECOND


def large(*tenants: str) -> tuple[Core, list[Client], list[bytes]]:
    """A store of 512 slots an arena, two for each tenant, each of which has stored 200 blocks."""
    core = Core(arenas=2 * len(tenants), arena_bytes=512 * PAGE_BYTES)
    clients, keys = [core.client(name, ring_pages=600) for name in tenants], chain(200)
    for client in clients:
        client.put(client.open(), keys)
    return core, clients, keys


def end_many(client: Client, keys: list[bytes]) -> None:
    """More pins than a tenant may have are over and not let go yet."""
    pinning, tenant, namespace = client.store.pinning, client.session.tenant, client.open()
    for count in (PINS_PER_TENANT, 100):
        for _ in range(count):
            pinning.pin(tenant, namespace, words(keys), 0, len(keys), A_WHILE, Tier.DRAM)
        assert pinning.unpin(tenant, list(pinning._of[tenant])) == count
    refused = pinning.pin(tenant, namespace, words(keys), 0, len(keys), A_WHILE, Tier.DRAM)
    assert refused.partial is Partial.TOO_MANY


def test_who_has_ended_many_pins_leaves_others_theirs() -> None:
    core, (many, few), keys = large("many", "few")
    namespace, pinning, tenant = few.open(), core.store.pinning, few.session.tenant
    core.store.choose_quota("few", {"pin_share": 200 * PAGE_BYTES / core.store.quotas.memory_bytes(tenant)})
    first = pinning.pin(tenant, namespace, words(keys), 0, 200, A_WHILE, Tier.DRAM)
    assert (first.blocks, first.partial) == (200, Partial.NOTHING)
    end_many(many, keys)
    pinning.unpin(tenant, [first.pin])
    assert pinning.used_bytes(tenant) == 0, "what it pinned is let go at once, whoever waits"
    again = pinning.pin(tenant, namespace, words(keys), 0, 200, A_WHILE, Tier.DRAM)
    assert (again.blocks, again.partial) == (200, Partial.NOTHING)
    core.audit()


def test_tenants_take_turns_in_letting_go() -> None:
    core, (many, few), keys = large("many", "few")
    namespace, pinning = few.open(), core.store.pinning
    end_many(many, keys)
    one = pinning.pin(few.session.tenant, namespace, words(keys), 0, 200, SECOND, Tier.DRAM)
    core.pass_time(2 * SECOND)
    core.store.tick()
    assert one.pin not in pinning.pins
    assert pinning.used_bytes(few.session.tenant) == 0
    assert pinning.used_bytes(many.session.tenant) == 200 * PAGE_BYTES, "many wait still"
    core.audit()
    for _ in range(PINS_PER_TENANT * 200 // LET_GO * 2):
        core.store.tick()
    assert (pinning.used_bytes(many.session.tenant), pinning.next_ns()) == (0, None)
    core.audit()


def test_a_pin_keeps_one_number_for_each_block() -> None:
    core, (client,), keys = large("t")
    pinned = core.store.pinning.pin(client.session.tenant, client.open(), words(keys), 0, 200, A_WHILE, Tier.DRAM)
    held = core.store.pinning.pins[pinned.pin]
    assert held.rows is held.paid, "nothing is kept twice"
    assert held.rows.nbytes == 4 * 200
