"""What is told of blocks that come, move and go: always the change from what was told before to what is there."""

from random import Random

import pytest

from kvproto.limits import PAGE_BYTES
from kvstore import announcing, blocks
from kvstore.announcing import REST_NS, Announcing, Told
from kvstore.evicting import evict
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import Core, chain
from tests.unit.test_pinning import SEGMENT_BYTES

IN_DRAM, ON_DISK = int(announcing.IN_DRAM), int(announcing.ON_DISK)
Where = dict[tuple[str, bytes], int]


class Listener:
    """Believes what it is told, and nothing else; notes what contradicts it."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.where: Where = {}  # by tenant and key: tiers
        self.heard: list[tuple[bytes, int, int]] = []
        self.parents: dict[bytes, bytes] = {}
        self.room = True
        self.announcing = Announcing(core.store, (1, 2), self.tell)

    def tell(self, told: Told) -> bool:
        if told.cleared:
            self.where = {name: tiers for name, tiers in self.where.items() if name[0] != told.cleared}
        for change in told.changes:
            name = told.places[int(change["namespace"])].tenant, change["key"].tobytes()
            was, now = int(change["was"]), int(change["now"])
            assert self.where.get(name, 0) == was, "told twice, or not at all"
            assert was or now, "nothing has changed"
            self.where[name] = now
            if not now:
                del self.where[name]
            self.heard.append((name[1], was, now))
            self.parents[name[1]] = change["parent"].tobytes()
        return self.room

    def look(self, passes: int = 1) -> list[tuple[bytes, int, int]]:
        """All rows, so many times; what was heard meanwhile."""
        self.heard.clear()
        until = self.announcing.passes + passes
        while self.announcing.passes < until:
            self.announcing.look(self.announcing.due_ns)
        return list(self.heard)


def truth(core: Core) -> Where:
    """As the table has it."""
    found: Where = {}
    table = core.store.tables.blocks
    for row in range(1, int(core.store.tables.book[blocks.UNUSED_ROW])):
        one = table[row]
        tiers = IN_DRAM if one["state"] in (blocks.RESIDENT, blocks.KEPT) else 0
        there = one["state"] in (blocks.RESIDENT, blocks.KEPT, blocks.DISK, blocks.LOADING)
        if there and one["disk"] and not one["flags"] & blocks.SAVING:
            tiers |= ON_DISK
        if tiers:
            tenant = core.store.registry.by_number[int(one["namespace"])].tenant.name
            found[tenant, one["key"].tobytes()] = int(tiers)
    return found


def disk(segments: int) -> DiskLimits:
    return DiskLimits(segments * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)


def test_what_is_stored_is_told_once_with_its_parent_and_what_is_deleted_too() -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    namespace, keys = client.open(), chain(3)
    assert listener.look() == []
    client.put(namespace, keys)
    assert listener.look() == [(key, 0, IN_DRAM) for key in keys]
    assert [listener.parents[key] for key in keys] == [bytes(32), *keys[:2]]
    assert listener.look() == [], "nothing has changed since"
    client.delete(namespace, keys[1:2])
    core.settle()
    assert sorted(listener.look()) == sorted((key, IN_DRAM, 0) for key in keys[1:])


def test_a_block_that_is_being_written_is_told_when_it_is_whole() -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    namespace = client.open()
    tickets = client.begin(namespace, chain(2))
    assert listener.look() == []
    client.commit(tickets)
    core.finish_all()
    assert len(listener.look()) == 2


def test_tiers_are_told_as_they_change() -> None:
    core = Core(disk=disk(4))
    listener, client = Listener(core), core.client()
    namespace, keys = client.open(), chain(2)
    client.put(namespace, keys)
    assert [now for _, _, now in listener.look()] == [IN_DRAM] * 2
    core.work_all()
    assert [(was, now) for _, was, now in listener.look()] == [(IN_DRAM, IN_DRAM | ON_DISK)] * 2
    evict(core.store, ClearScope(), Tier.DRAM, 0, lambda _: None, dry_run=False)
    core.settle()
    assert [(was, now) for _, was, now in listener.look()] == [(IN_DRAM | ON_DISK, ON_DISK)] * 2
    assert listener.where == truth(core)


@pytest.mark.parametrize("other_first", [True, False])
def test_what_comes_again_in_another_row_before_anybody_looks_is_where_it_was(*, other_first: bool) -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    namespace, (key,), others = client.open(), chain(1), chain(1, "b")
    for one in (
        ([key], others) if other_first else (others, [key])
    ):  # so that it moves to an earlier row, or a later one
        client.put(namespace, one)
    listener.look()
    before = core.row(namespace, key)
    client.delete(namespace, [key])
    client.delete(namespace, others)
    core.settle()
    for one in (others, [key]):
        client.put(namespace, one)
    if core.row(namespace, key) == before:
        client.delete(namespace, [key])
        client.delete(namespace, others)
        core.settle()
        for one in ([key], others):
            client.put(namespace, one)
    assert core.row(namespace, key) != before
    said = [(was, now) for one, was, now in listener.look() if one == key]
    assert said in ([(IN_DRAM, IN_DRAM)], [(IN_DRAM, 0), (0, IN_DRAM)])
    assert listener.where == truth(core)


def test_a_tenant_that_is_cleared_is_told_in_one_word_and_what_comes_after_anew() -> None:
    core = Core()
    listener, one, two = Listener(core), core.client("one"), core.client("two")
    mine, others = one.open(), two.open()
    keys = chain(3)
    one.put(mine, keys)
    two.put(others, keys)
    listener.look()
    core.store.clear(ClearScope("one"), lambda _: None, dry_run=False)
    swept = listener.announcing.clearing(ClearScope("one"), 0)
    two.put(others, chain(4, "b"))
    assert {key for key, _, _ in listener.look()} == set(chain(4, "b")), "others are told as ever, and nothing of it"
    core.settle()
    swept()
    assert listener.look() == [], "one word has said it"
    assert {tenant for tenant, _ in listener.where} == {"two"}
    one.put(mine, keys)
    assert [(key, was) for key, was, _ in listener.look()] == [(key, 0) for key in keys], "though it was told before"


def test_while_a_tenant_is_swept_only_what_is_dropped_is_left_out() -> None:
    """Others are told as ever, and so is what the tenant stores meanwhile; two clears do not end one another."""
    core = Core(slice_steps=1)
    listener, one, two = Listener(core), core.client("one"), core.client("two")
    mine, others = one.open(), two.open()
    for name in range(4):
        one.put(mine, chain(5, name))
        two.put(others, chain(5, name))
    listener.look()
    over = []
    for tenant in ("one", "two"):
        core.store.clear(ClearScope(tenant), lambda _: None, dry_run=False)
        over.append(listener.announcing.clearing(ClearScope(tenant), 0))
    assert {tenant for tenant, _ in truth(core)} == {"one", "two"}, "the control: it is still to be swept"
    assert not listener.where
    two.put(others, chain(2, "new"))
    assert [key for key, _, _ in listener.look()] == chain(2, "new")
    over[0]()
    listener.look()
    assert "one" in {tenant for tenant, _ in listener.where}, "it was said to be over, and there is some of it"
    assert listener.where.keys() >= {("two", key) for key in chain(2, "new")}
    assert not any(("two", key) in listener.where for name in range(4) for key in chain(5, name))
    core.settle()
    over[1]()
    listener.look(2)
    assert listener.where == truth(core)


def test_a_namespace_alone_that_is_cleared_is_told_block_by_block() -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    namespace, keys = client.open(), chain(3)
    client.put(namespace, keys)
    listener.look()
    scope = ClearScope(digest=namespace.digest)
    core.store.clear(scope, lambda _: None, dry_run=False)
    listener.announcing.clearing(scope, 0)
    core.settle()
    assert sorted(listener.look()) == sorted((key, IN_DRAM, 0) for key in keys)


def test_what_there_is_no_room_for_waits_and_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "CHANGES", 4)
    core = Core()
    listener, client = Listener(core), core.client()
    namespace, keys = client.open(), chain(10)
    client.put(namespace, keys)
    listener.room = False
    for _ in range(5):
        listener.announcing.look(listener.announcing.due_ns)
    assert len(listener.heard) == 3, "the first look finds out"
    client.delete(namespace, keys[5:])
    core.settle()
    listener.room = True
    listener.announcing.room()
    listener.look(2)
    assert listener.where == truth(core)
    assert len(listener.where) == 5


def test_what_is_there_can_be_asked_for() -> None:
    core = Core()
    listener, one, two = Listener(core), core.client("one"), core.client("two")
    mine, others = one.open(), two.open()
    one.put(mine, chain(3))
    two.put(others, chain(2, "b"))
    listener.look()
    told, then = listener.announcing.there("one", 1)
    assert {change["key"].tobytes() for change in told.changes} == set(chain(3))
    assert then == 0
    assert listener.announcing.there("nobody", 1)[0].changes.size == 0


def test_what_moves_to_a_row_that_was_read_already_is_not_lost_for_who_asks_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    namespace, (moving,) = client.open(), chain(1, "moving")
    client.put(namespace, chain(2, "a"))
    client.put(namespace, [moving])
    listener.look()
    monkeypatch.setattr(announcing, "SLICE_ROWS", 2)
    told, then = listener.announcing.there("t", 1)
    found = {change["key"].tobytes() for change in told.changes}
    assert moving not in found, "its row comes later"
    client.delete(namespace, [moving])
    client.delete(namespace, chain(2, "a"))
    core.settle()
    while core.row(namespace, moving) == 0 or core.row(namespace, moving) >= then:
        client.delete(namespace, [moving])
        core.settle()
        client.put(namespace, chain(1, f"other {core.store.tables.book[blocks.GENERATION]}"))
        client.put(namespace, [moving])
    heard = listener.look()
    while then:
        told, then = listener.announcing.there("t", then)
        found |= {change["key"].tobytes() for change in told.changes}
    found |= {key for key, _, now in heard if now}
    assert moving in found, "who was told what is there, and then what has changed, knows of it"


def test_a_namespace_that_leaves_much_untold_is_forgotten_in_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "FORGOTTEN_MOST", 1)
    core = Core()
    listener, client = Listener(core), core.client()
    gone, stays = client.open(model="gone"), client.open(model="stays")
    client.put(gone, chain(2))
    client.put(stays, chain(2, "b"))
    listener.look()
    client.delete(gone, chain(2))
    core.settle()
    listener.heard.clear()
    listener.announcing.forgotten(gone.number)
    assert not listener.heard
    assert not listener.where, "all of the tenant's"
    assert {key for key, was, _ in listener.look() if not was} == set(chain(2, "b")), "and told anew"
    assert listener.where == truth(core)


def test_after_a_pass_comes_a_rest() -> None:
    core = Core()
    listener = Listener(core)
    listener.announcing.look(0)
    assert (listener.announcing.passes, listener.announcing.due_ns) == (1, REST_NS)
    listener.announcing.look(REST_NS - 1)
    assert listener.announcing.passes == 1


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_a_listener_ends_up_with_what_is_there(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at a few rows at a time, so that blocks move behind its back."""
    print(f"seed {seed}")
    random = Random(seed)
    monkeypatch.setattr(announcing, "SLICE_ROWS", 5)
    core = Core(arenas=2, disk=disk(2) if seed % 2 else None)
    listener, clients = Listener(core), [core.client("one"), core.client("two")]
    spaces = [client.open() for client in clients]
    for _ in range(150):
        which = random.randrange(2)
        client, namespace = clients[which], spaces[which]
        keys = chain(random.randint(1, 6), random.randrange(8))
        match random.randrange(6):
            case 0 | 1 | 2:
                client.put(namespace, keys)
            case 3:
                client.delete(namespace, keys[random.randrange(len(keys)) :])
            case 4:
                evict(core.store, ClearScope(), Tier.DRAM, PAGE_BYTES, lambda _: None, dry_run=False)
            case 5:
                scope = ClearScope(random.choice(["one", "two"]))
                core.store.clear(scope, lambda _: None, dry_run=False)
                listener.announcing.clearing(scope, 0)
        if random.random() < 0.3:
            core.settle()
            if seed % 2:
                core.work_all()
        listener.announcing.look(listener.announcing.due_ns)
    core.settle()
    listener.look(2)
    assert listener.where == truth(core)
    assert listener.where, "the control: something is there"


def test_what_left_a_namespace_is_told_as_its_own_though_its_number_is_anothers_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.registry.NAMESPACES_PER_TENANT", 1)
    core = Core()
    heard: list[tuple[str, int]] = []

    def tell(told: Told) -> bool:
        heard.extend((told.places[int(one["namespace"])].model, int(one["now"])) for one in told.changes)
        return True

    announcing_ = Announcing(core.store, (1, 2), tell)
    core.store.forgotten = announcing_.forgotten
    client = core.client()
    first = client.open(model="first")
    client.put(first, chain(2))
    announcing_.look(announcing_.due_ns)
    client.delete(first, chain(2))
    core.settle()
    core.store.detach(client.session)
    later = core.client()
    second = later.open(model="second")
    assert second.number == first.number
    assert heard == [("first", IN_DRAM)] * 2 + [("first", 0)] * 2
    later.put(second, chain(1))
    announcing_.look(announcing_.due_ns)
    assert heard[4:] == [("second", IN_DRAM)]


def test_what_could_not_be_told_is_told_anew_of_its_tenant_alone() -> None:
    core = Core()
    listener, clients = Listener(core), [core.client("one"), core.client("two")]
    for client in clients:
        client.put(client.open(), chain(3))
    listener.look()
    before = dict(listener.where)
    listener.where = {name: tiers for name, tiers in before.items() if name[0] != "one"}  # who listens has lost it
    listener.announcing.tell_anew("one")
    assert listener.where == {name: tiers for name, tiers in before.items() if name[0] == "two"}
    assert sorted(key for key, _, _ in listener.look()) == sorted(chain(3))
    assert listener.where == before
    listener.announcing.tell_anew("nobody")
    assert listener.where == before
