"""A warm restart of the core: tables and arenas of a former life, wherever it ended."""

import random

import numpy as np
import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvproto.sizes import format_bytes
from kvstore import blocks, restart
from kvstore.arenas import Arenas
from kvstore.registry import Registry
from kvstore.store import Store
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.orders import Outcome, Save
from tests.core import MS, SECOND, Core, chain
from tests.unit.test_disk import SEGMENT_BYTES, fetch


def successor(core: Core, *, memory: bool = True, **changes: int) -> Core:
    """A new daemon that is given the memory of the old one, which was killed."""
    limits = core.store.limits
    kept = core.memory.successor() if memory else None
    later = Core(
        changes.get("arenas", limits.dram_bytes // limits.arena_bytes), disk=limits.disk,
        drive=core.drive.successor(), memory=kept, clock=core.clock,
        first_generation=int(core.store.tables.book[blocks.GENERATION]) + 1, seed=changes.get("seed", 1),
    )  # fmt: skip
    if limits.disk.disk_bytes:
        later.open_disk()
    return later


def read_all(core: Core, keys: list[bytes], model: str = "m") -> int:
    """Fetch as a new client does, waiting for what is not verified."""
    client = core.client()
    return fetch(client, client.open(model=model), keys)


def test_all_published_blocks_are_served_after_a_restart() -> None:
    core = Core(arenas=3)
    client = core.client()
    namespace, other = client.open(), client.open(5000, "other")
    first, second = chain(20, "first"), chain(6, "second")
    client.put(namespace, first)
    client.put(other, second)
    later = successor(core)
    later.audit()
    assert later.store.kept.warm
    assert later.store.kept.blocks == 26
    client = later.client()
    assert fetch(client, client.open(), first) == 20
    assert fetch(client, client.open(5000, "other"), second) == 6
    assert later.store.streams.verified == 26


def test_kept_blocks_are_verified_in_the_background_too() -> None:
    core = Core(arenas=3)
    client = core.client()
    client.put(client.open(), chain(20))
    later = successor(core)
    later.work_all()
    client = later.client()
    assert client.fetch(client.open(), chain(20)) == 20, "without waiting"
    assert later.store.unverified == 0
    later.audit()


def test_a_kept_block_whose_bytes_have_changed_is_a_miss() -> None:
    core = Core(arenas=3)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(20))
    position, slot = blocks.locate(core.store.tables, core.row(namespace, chain(20)[7]))
    core.memory.arenas[int(core.store.tables.arenas["id"][position])][slot * PAGE_BYTES + 3] ^= 1
    later = successor(core)
    assert read_all(later, chain(20)) == 7
    assert later.store.streams.verify_faults == 1
    later.work_all()
    later.audit()


def test_new_blocks_go_into_kept_arenas_and_push_out_the_oldest() -> None:
    core = Core(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(16, "old"))
    core.clock.advance(SECOND)
    client.put(namespace, chain(16, "young"))
    later = successor(core)
    client = later.client()
    namespace = client.open()
    assert client.put(namespace, chain(10, "new")) == [Grant.GRANTED] * 10
    later.work_all()
    later.audit()
    assert client.fetch(namespace, chain(10, "new")) == 10
    assert client.fetch(namespace, chain(16, "young")) == 16
    assert client.fetch(namespace, chain(16, "old")) == 6


def test_what_was_not_published_does_not_come_back() -> None:
    core = Core(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(3))
    client.begin(namespace, chain(6)[3:], chain(3)[2])
    later = successor(core)
    later.audit()
    assert later.store.kept.blocks == 3
    assert read_all(later, chain(6)) == 3


def test_what_was_deleted_does_not_come_back() -> None:
    core = Core(arenas=2, slice_steps=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8))
    client.delete(namespace, chain(8)[3:4])  # its descendants are dropped in slices, and the first has only begun
    later = successor(core)
    later.audit()
    assert read_all(later, chain(8)) == 3


def test_slots_that_somebody_may_be_reading_are_withheld_until_the_deadline() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8, "leased"))
    client.put(namespace, chain(8, "free"))
    held = client.lease(namespace, chain(8, "leased"), ttl_ns=10 * SECOND)
    client.delete(namespace, chain(8, "leased")[:1])
    core.settle()
    before = [client.read(namespace, held, i) for i in range(8)]
    later = successor(core)
    later.audit()
    assert later.store.kept.withheld == 8
    newcomer = later.client()
    namespace = newcomer.open()
    grants = newcomer.put(namespace, chain(12, "new"))
    assert grants.count(Grant.GRANTED) == 8
    assert [client.read(namespace, held, i) for i in range(8)] == before
    later.pass_time(11 * SECOND)
    later.settle()
    assert newcomer.put(namespace, chain(12, "new")).count(Grant.GRANTED) == 4
    later.audit()
    assert not later.store.leases


def test_leased_blocks_that_are_kept_stay_until_the_deadline() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(16, "leased"))
    held = client.lease(namespace, chain(16, "leased"), ttl_ns=10 * SECOND)
    later = successor(core)
    newcomer = later.client()
    assert Grant.GRANTED not in newcomer.put(newcomer.open(), chain(4, "new"))
    assert client.read(namespace, held, 15)
    later.pass_time(11 * SECOND)
    later.work_all()
    assert newcomer.put(newcomer.open(), chain(4, "new")) == [Grant.GRANTED] * 4
    later.audit()


def test_another_size_starts_cold_and_says_so() -> None:
    core = Core(arenas=2)
    client = core.client()
    client.put(client.open(), chain(3))
    later = successor(core, arenas=3)
    assert not later.store.kept.warm
    was = format_bytes(core.store.limits.dram_bytes)
    now = format_bytes(later.store.limits.dram_bytes)
    assert later.store.kept.reason == f"dram.size was {was} and is {now} now"
    assert read_all(later, chain(3)) == 0
    later.audit()


def test_nothing_kept_is_a_cold_start() -> None:
    core = Core(arenas=2)
    later = successor(core, memory=False)
    assert later.store.kept.reason == "nothing was kept"


def test_a_lost_arena_costs_its_blocks_and_what_continues_them() -> None:
    core = Core(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(32))
    kept = core.memory.successor()
    del kept.kept[1]
    core.memory.successor = lambda: kept  # type: ignore[method-assign]
    later = successor(core)
    later.audit()
    assert later.store.kept.blocks == 0
    assert later.store.kept.lost == 16
    client = later.client()
    assert Grant.FULL not in client.put(client.open(), chain(32, "new"))


def test_copies_on_disk_are_found_again_by_kept_blocks() -> None:
    limits = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(12))
    core.work_all()
    saves = core.drive.saves
    later = successor(core)
    later.audit()
    later.work_all()
    assert later.drive.saves == 0
    client = later.client()
    namespace = client.open()
    client.put(namespace, chain(16, "others"))
    later.work_all()
    assert fetch(client, namespace, chain(12)) == 12
    assert saves == 12
    later.audit()


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 1000), marks=pytest.mark.long)], ids=str)
def test_a_torn_table_never_gives_wrong_bytes(seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        core = Core(arenas=2)
        client = core.client()
        namespace = client.open()
        client.put(namespace, chain(20, seed))
        table = core.store.tables.blocks.view(np.uint8)
        for _ in range(rng.randrange(1, 30)):
            at = rng.randrange(128, 128 * 21)
            table[at] = rng.randrange(256)
        later = successor(core)
        later.audit()
        read_all(later, chain(20, seed))
        later.work_all()
        later.pass_time(200 * SECOND)
        later.audit()


@pytest.mark.parametrize("field", ["key", "checksum", "generation", "namespace"])
def test_a_row_with_a_part_of_another_row_is_not_believed(field: str) -> None:
    """Each part is right, and so is the checksum of the content: only the seal tells that they are of two blocks."""
    core = Core(arenas=2)
    client = core.client()
    one, other = client.open(), client.open(model="other")
    client.put(one, chain(1, "a"))
    client.put(other, chain(1, "b"))
    rows, table = [core.row(one, chain(1, "a")[0]), core.row(other, chain(1, "b")[0])], core.store.tables.blocks
    assert (table[field][rows[0]] != table[field][rows[1]]).any(), "the control: they differ"
    table[field][rows] = table[field][rows[::-1]].copy()
    later = successor(core)
    later.audit()
    assert later.store.kept.blocks == 0
    assert read_all(later, chain(1, "a")) == read_all(later, chain(1, "b"), "other") == 0
    later.work_all()
    later.audit()


def test_a_successor_that_dies_on_the_way_leaves_another_one_the_same() -> None:
    core = Core(arenas=2)
    client = core.client()
    client.put(client.open(), chain(20))
    for _ in range(5):
        core = successor(core)
        assert core.store.kept.blocks == 20
        core.clock.advance(MS)
    core.audit()
    assert read_all(core, chain(20)) == 20


class KilledError(Exception):
    """Here a successor dies."""


def die(_self: object, *_: object) -> None:
    """In place of a step that is never reached."""
    raise KilledError


def killed_before(step: str, owner: type, core: Core, patch: pytest.MonkeyPatch) -> None:
    """A successor of `core` dies right before this step: what it leaves is what the next one finds."""
    core.memory = core.memory.successor()
    limits = core.store.limits
    with patch.context() as until_it_dies:
        until_it_dies.setattr(owner, step, die)
        with pytest.raises(KilledError):
            Core(limits.positions, memory=core.memory, clock=core.clock)


def killed_after(step: str, owner: type, core: Core, patch: pytest.MonkeyPatch) -> None:
    """As `killed_before`, right after this step."""
    done = getattr(owner, step)

    def die_then(*arguments: object) -> None:
        done(*arguments)
        raise KilledError

    core.memory = core.memory.successor()
    with patch.context() as until_it_dies:
        until_it_dies.setattr(owner, step, die_then)
        with pytest.raises(KilledError):
            Core(core.store.limits.positions, memory=core.memory, clock=core.clock)


def test_a_successor_that_dies_before_it_has_said_who_is_who_leaves_what_was_said_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = Core(arenas=2)
    client = core.client()
    client.put(client.open(), chain(20))
    for life in range(4):  # the journal has two halves
        killed_before("begin_journal", Registry, core, monkeypatch)
        core = successor(core)
        assert core.store.kept.warm, f"life {life}: {core.store.kept.reason}"
        assert core.store.kept.blocks == 20
    core.audit()
    assert read_all(core, chain(20)) == 20


def test_a_word_in_the_half_of_the_journal_that_is_in_use_would_cost_everything() -> None:
    """The control for the test above: such words were said before `begin`, and this is what came of them."""
    core = Core(arenas=2)
    client = core.client()
    client.put(client.open(), chain(20))
    core = successor(core)
    journal = core.store.registry._journal
    journal._end = 0
    journal._append(["tenant", "t"])
    assert "another version" in successor(core).store.kept.reason


def test_what_is_leased_from_two_lives_ago_is_not_written_over_though_the_life_between_died_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8, "leased"))
    held = client.lease(namespace, chain(8, "leased"), ttl_ns=10 * SECOND)
    before = [client.read(namespace, held, i) for i in range(8)]
    killed_before("_without_parents", restart._TakeOver, core, monkeypatch)  # it has looked over all rows by then
    later = successor(core)
    later.audit()
    newcomer = later.client()
    grants = newcomer.put(newcomer.open(), chain(16, "new"))
    assert [client.read(namespace, held, i) for i in range(8)] == before
    assert grants.count(Grant.GRANTED) == 8
    later.pass_time(11 * SECOND)
    later.work_all()
    assert newcomer.put(newcomer.open(), chain(16, "new")).count(Grant.GRANTED) == 8
    later.audit()


@pytest.mark.parametrize(
    ("step", "owner"),
    [("_make_rooms", Store), ("add_pool", Arenas), ("settle", Registry), ("_take_arenas", restart._TakeOver),
     ("_hold_for_the_past", Store)],
)  # fmt: skip
def test_a_successor_may_die_anywhere_on_the_way_and_costs_the_next_one_nothing(
    step: str, owner: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(arenas=2)
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8, "leased"))
    client.put(namespace, chain(12))
    held = client.lease(namespace, chain(8, "leased"), ttl_ns=10 * SECOND)
    before = [client.read(namespace, held, i) for i in range(8)]
    for _ in range(2):
        if step == "_make_rooms":
            killed_after(step, owner, core, monkeypatch)
        else:
            killed_before(step, owner, core, monkeypatch)
    later = successor(core)
    later.audit()
    assert later.store.kept.warm, later.store.kept.reason
    assert (later.store.kept.blocks, later.store.kept.lost) == (20, 0)
    newcomer = later.client()
    newcomer.put(newcomer.open(), chain(32, "new"))
    assert [client.read(namespace, held, i) for i in range(8)] == before
    later.pass_time(11 * SECOND)
    later.work_all()
    later.audit()


def test_generations_go_on() -> None:
    core = Core(arenas=2)
    client = core.client()
    client.put(client.open(), chain(20))
    used = int(core.store.tables.book[blocks.GENERATION])
    assert int(successor(core).store.tables.book[blocks.GENERATION]) >= used


def half_on_disk() -> tuple[Core, list[bytes]]:
    """A chain whose first six blocks lie on disk alone, and whose other eight lie in DRAM alone."""
    limits = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES)
    core = Core(arenas=1, disk=limits)
    client = core.client()
    namespace = client.open()
    keys = chain(14)
    client.put(namespace, keys[:6])
    core.work_all()
    client.put(namespace, chain(16, "others"))
    core.work_all()
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Save) else None
    assert client.put(namespace, keys) == [Grant.KNOWN] * 6 + [Grant.GRANTED] * 8
    return core, keys


def test_kept_blocks_that_continue_what_lies_on_disk_alone_find_it_again() -> None:
    core, keys = half_on_disk()
    later = successor(core)
    later.audit()
    assert (later.store.kept.blocks, later.store.kept.lost) == (16, 0)
    later.work_all()
    assert read_all(later, keys) == 14


def test_kept_blocks_whose_beginning_was_lost_with_the_disk_are_dropped() -> None:
    core, keys = half_on_disk()
    core.drive.files.clear()
    later = successor(core)
    later.audit()
    assert later.store.kept.lost == 8
    assert read_all(later, keys) == 0
