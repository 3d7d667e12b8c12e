"""Pins over a warm restart: none is lost, none lasts longer than it would have, and none leaks."""

import numpy as np
import pytest

from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Tier
from kvstore import blocks, rules
from kvstore.pin_book import BOOK_BYTES, PinBook, Saved
from kvstore.repinning import A_PIN, TAKE_UP
from tests.core import MS, SECOND, Client, chain, key_of, words
from tests.unit.test_pinning import begin, flood, pin
from tests.unit.test_restart import successor

A_WHILE = 100 * SECOND


def listed(client: Client) -> dict[int, tuple[int, int]]:
    """Blocks and ends of a tenant's pins, by number."""
    pins = client.store.pinning.list_pins(client.session.tenant, 0, 1000)
    return {one.pin: (one.blocks, one.expires_ns) for one in pins}


def test_what_was_pinned_stays_until_it_would_have_gone() -> None:
    core, client, namespace = begin()
    core.store.choose_rule(rules.Chosen(rules.Tier.DRAM, None, rules.Rule.LRU))
    client.put(namespace, chain(4))
    client.put(namespace, chain(4, "other"))
    pinned = pin(client, namespace, chain(4), refresh=False)
    client.fetch(namespace, chain(4))
    before = listed(client)
    for _ in range(3):
        core.clock.advance(10 * SECOND)
        core = successor(core)
        core.audit()
        client = core.client()
        assert (core.store.kept.pins, core.store.kept.pins_lost) == (1, 0)
        assert listed(client) == before
        assert core.store.pinning.used_bytes(client.session.tenant) == 4 * PAGE_BYTES
    namespace = client.open()
    flood(client, namespace, "flood")
    assert client.match(namespace, chain(4)) == 4
    assert client.match(namespace, chain(4, "other")) == 0
    core.pass_time(pinned.expires_ns - core.clock.ns + 100 * MS)
    assert listed(client) == {}
    assert core.store.pinning.used_bytes(client.session.tenant) == 0
    core.work_all()
    flood(client, namespace, "more")
    assert client.match(namespace, chain(4)) == 0


@pytest.mark.parametrize("refresh", [True, False])
def test_a_use_counts_if_it_was_to(refresh: bool) -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(6))
    pinned = pin(client, namespace, chain(4), ttl_ns=10 * SECOND, refresh=refresh)
    core.clock.advance(9 * SECOND)
    client.fetch(namespace, chain(6))
    used_ns = core.clock.ns
    core.pass_time(SECOND // 2)
    later = successor(core)
    assert listed(later.client()) == {pinned.pin: (4, used_ns + 10 * SECOND if refresh else pinned.expires_ns)}


def test_what_ended_while_nobody_ran_is_over() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pin(client, namespace, chain(4), ttl_ns=10 * SECOND)
    core.clock.advance(11 * SECOND)
    later = successor(core)
    assert listed(later.client()) == {}
    assert (later.store.kept.pins, later.store.kept.pins_lost) == (0, 0)
    assert PinBook(later.memory.tables["pins"]).read() == []
    later.audit()


def test_what_was_unpinned_or_dropped_does_not_come_back() -> None:
    core, client, namespace = begin()
    for name in ("unpinned", "deleted", "cut"):
        client.put(namespace, chain(2, name))
        pinned = pin(client, namespace, chain(2, name))
        if name == "unpinned":
            core.store.pinning.unpin(client.session.tenant, [pinned.pin])
    client.delete(namespace, chain(2, "deleted")[:1])
    client.delete(namespace, chain(2, "cut")[1:])
    core.settle()
    later = successor(core)
    assert [blocks for blocks, _ in listed(later.client()).values()] == [1]
    later.audit()


def test_numbers_are_not_given_twice_and_pins_can_be_ended_by_those_they_had() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    first = pin(client, namespace, chain(4))
    later = successor(core)
    client = later.client()
    second = pin(client, client.open(), chain(2))
    assert second.pin > first.pin
    assert later.store.pinning.unpin(client.session.tenant, [first.pin]) == 1
    assert set(listed(client)) == {second.pin}
    later.store.tick()
    later.audit()


def test_a_smaller_budget_takes_up_what_it_holds() -> None:
    core, client, namespace = begin()
    for name in ("a", "b"):
        client.put(namespace, chain(4, name))
        pin(client, namespace, chain(4, name))
    core.store.registry.choose_quota("t", {"pin_share": 0.3})  # in the journal; nobody has let go yet
    later = successor(core)
    assert [blocks for blocks, _ in listed(later.client()).values()] == [4]
    assert (later.store.kept.pins, later.store.kept.pins_lost) == (1, 1)
    later.audit()


def test_pins_of_programs_and_operators_keep_their_owners() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    tenant, pinning = client.session.tenant, core.store.pinning
    pinning.pin(tenant, namespace, words(chain(4)), 0, 4, A_WHILE, Tier.DRAM, owner="program:" + "x" * 200)
    pinning.pin(tenant, namespace, words(chain(4)), 0, 2, A_WHILE, Tier.DRAM, owner="operator")
    kinds = [pin.kind for pin in pinning.pins.values()]
    later = successor(core)
    found = list(later.store.pinning.pins.values())
    assert [pin.owner[:9] for pin in found] == ["program:x", "operator"]
    assert [pin.kind for pin in found] == kinds


def test_what_lay_on_disk_is_pinned_again_once_the_disk_serves() -> None:
    core, client, namespace = begin(disk=8)
    client.put(namespace, chain(8))
    core.work_all()
    flood(client, namespace, "first", 40)
    core.work_all()
    pinned = pin(client, namespace, chain(8), tier=Tier.DISK, ttl_ns=3600 * SECOND)
    assert pinned.blocks == 8
    core.store.learned.save()
    later = successor(core)
    later.work_all()
    client = later.client()
    assert {number: blocks for number, (blocks, _) in listed(client).items()} == {pinned.pin: 8}
    assert (later.store.kept.pins, later.store.kept.pins_lost) == (1, 0)
    later.audit()


def test_many_pins_of_what_lay_on_disk_are_taken_up_some_at_a_tick() -> None:
    core, client, namespace = begin(disk=8)
    client.put(namespace, chain(8))
    core.work_all()
    flood(client, namespace, "first", 40)
    core.work_all()
    pinning, tenant, count = core.store.pinning, client.session.tenant, 100
    numbers = [
        pinning.pin(tenant, namespace, words(chain(8)), 0, 8, 3600 * SECOND, Tier.DISK).pin for _ in range(count)
    ]
    a_tick = 1 + (TAKE_UP - 1) // (8 + A_PIN)
    assert count > 2 * a_tick
    later = successor(core)
    client, taken = later.client(), [0]
    assert listed(client) == {}, "the disk serves, and so does the daemon"
    later.store.tick()
    taken.append(len(listed(client)))
    assert taken == [0, a_tick], "not all at once"
    assert later.store.pinning.next_ns() == 0
    assert later.store.pinning.unpin(client.session.tenant, [numbers[-1]]) == 1, "it waits still"
    while later.store.repinning.waiting:
        later.store.tick()
        taken.append(len(listed(client)))
        assert taken[-1] - taken[-2] <= a_tick
    assert set(listed(client)) <= set(numbers[:-1])
    assert (later.store.kept.pins, later.store.kept.pins_lost) == (count - 1, 0)
    assert len(PinBook(later.memory.tables["pins"]).read() or []) == count - 1
    later.work_all()
    later.audit()


@pytest.mark.parametrize("anew", [0, 3])
def test_a_pin_that_comes_back_ends_before_what_is_just_being_stored_anew(anew: int) -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(8))
    rows = [core.row(namespace, key) for key in chain(8)]
    repinning = core.store.repinning
    assert repinning._rows(rows[7], 8).tolist() == rows, "the control"
    core.store.tables.blocks["state"][rows[anew]] = blocks.WRITING
    assert repinning._rows(rows[7], 8).tolist() == rows[:anew]


def test_a_cold_start_knows_of_no_pin() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    pin(client, namespace, chain(4))
    later = successor(core, memory=False)
    assert listed(later.client()) == {}
    later.audit()


def test_a_successor_that_dies_on_the_way_leaves_the_pins_to_another() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(4))
    before = pin(client, namespace, chain(4), refresh=False)
    middle = successor(core)
    middle.memory.successor()  # it has read them, and changed nothing that says so
    later = successor(middle)
    assert listed(later.client()) == {before.pin: (4, before.expires_ns)}


@pytest.mark.parametrize("where", [0, 7, 8, 16, 24, 60, 90, 200])
def test_a_damaged_record_is_nobodys_and_the_others_stay(where: int) -> None:
    core, client, namespace = begin()
    for name in ("a", "b"):
        client.put(namespace, chain(3, name))
        pin(client, namespace, chain(3, name))
    core.memory.tables["pins"][16 + where] ^= 0x41  # of the first record
    later = successor(core)
    assert len(listed(later.client())) == 1
    later.audit()


def test_a_foreign_book_is_said_to_be_and_a_new_one_begun() -> None:
    core, client, namespace = begin()
    client.put(namespace, chain(3))
    pin(client, namespace, chain(3))
    core.memory.tables["pins"][:8] = 7
    later = successor(core)
    assert listed(later.client()) == {}
    assert any("pins" in fault for fault in later.store.kept.faults)
    client = later.client()
    pinned = pin(client, client.open(), chain(3))
    assert set(listed(successor(later).client())) == {pinned.pin}


def test_records_are_what_was_written_and_places_are_used_again() -> None:
    book = PinBook(np.zeros(BOOK_BYTES, dtype=np.uint8))
    assert book.read() == []
    saved = [
        Saved(book.take(), number, 5, 6, key_of(number), 7, 8, refresh=bool(number & 1), owner=f"o{number}")
        for number in range(1, 5)
    ]
    for one in saved:
        book.write(one.place, one)
    assert book.read() == saved
    book.wipe(saved[1].place)
    assert book.read() == [saved[0], *saved[2:]]
    assert book.take() == saved[1].place
    assert book.take() == 4
