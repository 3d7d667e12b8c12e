"""What is told of blocks beyond this host: that they came there, and that they are not there any more."""

from dataclasses import replace
from random import Random

import pytest

from kvstore import announcing, beyond
from kvstore.announcing import IN_DRAM, IN_REMOTE
from kvstore.beyond import Beyond
from kvstore.evicting import evict
from kvstore.report import ClearScope
from kvstore.rules import Tier
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import Place, name_of
from kvstore.tier.remote_orders import Keep, Piece
from kvstore.tier.remote_writing import RemoteAdmission, place_of
from tests.core import Client, Core, chain
from tests.unit.test_announcing import Listener, truth
from tests.unit.test_remote import FarSide

DRAM, REMOTE = int(IN_DRAM), int(IN_REMOTE)


def host() -> tuple[Core, FarSide, Client, Listener]:
    """One that writes all of it, and tells of all of it."""
    core = Core()
    far = FarSide(core, RemoteAdmission.ALL)
    listener = Listener(core)
    core.store.remote.beyond = listener.announcing.beyond
    core.store.forgotten = listener.announcing.forgotten
    return core, far, core.client(), listener


def write(core: Core, far: FarSide) -> None:
    """What waits to be written."""
    core.clock.advance(10**9)
    far.work()


def test_a_block_that_is_written_is_told_and_stays_told_when_it_has_left_this_host() -> None:
    core, far, client, listener = host()
    ns, keys = client.open(), chain(3)
    client.put(ns, keys)
    assert listener.look() == [(key, 0, DRAM) for key in keys]
    write(core, far)
    assert listener.look() == [(key, DRAM, DRAM | REMOTE) for key in keys]
    evict(core.store, ClearScope(), Tier.DRAM, 0, lambda _: None, dry_run=False)
    core.settle()
    assert sorted(listener.look()) == sorted((key, DRAM | REMOTE, REMOTE) for key in keys)
    assert listener.look() == [], "nothing has changed since"


def test_what_comes_from_there_is_told_to_be_there() -> None:
    core, far, client, _ = host()
    keys = chain(4)
    client.put(client.open(), keys)
    write(core, far)
    core, other, client, listener = host()
    other.content = far.content
    ns = client.open()
    client.match(ns, keys)
    other.work()
    listener.look()
    assert {key: tiers for (_, key), tiers in listener.where.items()} == dict.fromkeys(keys, DRAM | REMOTE)


def test_what_is_deleted_is_told_to_be_gone_from_there_too() -> None:
    core, far, client, listener = host()
    ns, keys = client.open(), chain(4)
    client.put(ns, keys)
    write(core, far)
    listener.look()
    client.delete(ns, keys[2:])
    far.work()
    core.settle()
    listener.look(2)
    assert {key: tiers for (_, key), tiers in listener.where.items()} == dict.fromkeys(keys[:2], DRAM | REMOTE)


def test_an_object_that_is_gone_takes_its_blocks_with_it_and_no_others() -> None:
    core, far, client, listener = host()
    ns, keys, others = client.open(), chain(4), chain(4, "b")
    client.put(ns, keys)
    client.put(ns, others)
    write(core, far)
    listener.look()
    place = place_of(ns)
    lies = ["junk", "v1/a/b/", "", f"{place.prefix}zz/1.", f"{place.prefix}/1.", f"{place.prefix}\u0660\u0660/1."]
    core.store.remote.gone([*lies, name_of(place, keys, encoded=True), name_of(place, chain(2, "c"))])
    told = listener.look()
    assert sorted(told) == sorted((key, DRAM | REMOTE, DRAM) for key in keys)
    write(core, far)
    assert listener.look() == [], "nobody writes them again, and nobody says so"


@pytest.mark.parametrize("scope", ["tenant", "namespace"])
def test_clearing_says_that_nothing_is_there_any_more(scope: str) -> None:
    core, far, client, listener = host()
    ns, keys = client.open(), chain(4)
    other = core.client("other")
    there = other.open()
    client.put(ns, keys)
    other.put(there, keys)
    write(core, far)
    listener.look()
    assert len(listener.where) == 8
    wish = ClearScope(ns.tenant.name) if scope == "tenant" else ClearScope(ns.tenant.name, ns.digest)
    core.store.clear(wish, lambda _: None, dry_run=False)
    swept = listener.announcing.clearing(wish, 0)
    core.settle()
    far.work()
    swept()
    listener.look(2)
    assert listener.where == {("other", key): DRAM | REMOTE for key in keys}


def test_a_namespace_that_gives_its_number_away_leaves_nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (beyond.BLOCKS, 1):
        monkeypatch.setattr(announcing, "FORGOTTEN_MOST", most)
        core, far, client, listener = host()
        gone, stays = client.open(model="gone"), client.open(model="stays")
        client.put(gone, chain(3))
        client.put(stays, chain(2, "b"))
        write(core, far)
        listener.look()
        assert len(listener.where) == 5
        evict(core.store, ClearScope(digest=gone.digest), Tier.DRAM, 0, lambda _: None, dry_run=False)
        core.settle()
        listener.announcing.forgotten(gone.number)
        listener.look(2)
        left = dict.fromkeys(chain(2, "b"), DRAM | REMOTE)  # told anew where one word took everything back
        assert {key: tiers for (_, key), tiers in listener.where.items()} == left


def test_who_asks_what_is_there_hears_of_what_is_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "CHANGES", 2)
    core, far, client, listener = host()
    ns, keys = client.open(), chain(5)
    client.put(ns, keys)
    write(core, far)
    evict(core.store, ClearScope(), Tier.DRAM, 0, lambda _: None, dry_run=False)
    core.settle()
    client.put(ns, keys[:2])
    while listener.look():
        pass
    found: dict[bytes, int] = {}
    start = 1
    while start:
        told, start = listener.announcing.there("t", start)
        found |= {change["key"].tobytes(): int(change["now"]) for change in told.changes}
    assert found == dict.fromkeys(keys[:2], DRAM | REMOTE) | dict.fromkeys(keys[2:], REMOTE)
    told, start = listener.announcing.there("nobody", 1)
    while start:
        assert not told.changes.size
        told, start = listener.announcing.there("nobody", start)
    assert not told.changes.size


# -- the table itself ------------------------------------------------------------------------------------------------


def space(core: Core, model: str = "m") -> tuple[Namespace, Place]:
    ns = core.client(model).open(model=model)
    return ns, place_of(ns)


def test_of_too_many_the_oldest_of_who_has_most_are_taken_back() -> None:
    core = Core()
    many, few = space(core, "many"), space(core, "few")
    known = Beyond(10)
    known.note(*few, chain(2, "few"))
    known.note(*many, chain(8, "many"))
    assert len(list(known.take(100))) == 10
    known.note(*many, chain(3, "more"))
    assert known.blocks == 10
    told = list(known.take(100))
    gone = [key for _, key, there in told if not there]
    assert gone == chain(8, "many")[:3]
    assert {key for _, key, there in told if there} == set(chain(3, "more"))
    assert all(known.is_told(few[0].number, key) for key in chain(2, "few"))


def test_what_nobody_takes_stays_bounded() -> None:
    core = Core()
    one, known = space(core), Beyond(10)
    known.note(*one, chain(10, "first"))
    list(known.take(100))
    for number in range(20):
        known.note(*one, chain(5, number))
    assert known.blocks <= 10
    assert len(known._changed) <= 20
    where = set(chain(10, "first"))
    for _, key, there in known.take(1000):
        assert (key in where) != there
        where = where | {key} if there else where - {key}
    assert len(where) == known.blocks


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_who_is_told_ends_up_with_what_is_known(seed: int) -> None:
    print(f"seed {seed}")
    core, random = Core(), Random(seed)
    spaces = [space(core, model) for model in ("a", "b")]
    known, where = Beyond(12), set[tuple[int, bytes]]()

    def hear(most: int) -> None:
        for number, key, there in known.take(most):
            assert ((number, key) in where) != there, "told twice, or not at all"
            (where.add if there else where.discard)((number, key))

    for _ in range(400):
        namespace, place = spaces[random.randrange(2)]
        keys = chain(random.randint(1, 5), random.randrange(6))
        match random.randrange(8):
            case 0 | 1 | 2:
                known.note(namespace, place, keys)
            case 3:
                known.withdraw(namespace.number, keys)
            case 4:
                known.gone([name_of(place, keys)])
            case 5:
                known.forget(namespace.number)
            case 6 if random.random() < 0.3:
                known.forget(namespace.number, said=True)
                where -= {one for one in where if one[0] == namespace.number}
            case 6 if random.random() < 0.5:
                known.tell_again(namespace.number)
                where -= {one for one in where if one[0] == namespace.number}
            case 7 if random.random() < 0.3:
                where -= {(namespace.number, key) for key in known.expel(namespace.number)}
                assert not {one for one in where if one[0] == namespace.number}, "some was not told"
        hear(random.randrange(4))
        assert known.told or not where
        assert all(known.is_told(*one) for one in where)
    hear(10_000)
    there, start = known.there([one.number for one, _ in spaces], 0, 7), 1
    found = list(there[0])
    while start := there[1]:
        there = known.there([one.number for one, _ in spaces], start, 7)
        found += there[0]
    assert set(found) == where
    assert len(found) == known.blocks


def test_a_store_without_a_far_side_tells_nothing_of_one() -> None:
    core = Core()
    listener, client = Listener(core), core.client()
    client.put(client.open(), chain(3))
    listener.look()
    assert listener.where == truth(core)
    assert not listener.announcing.beyond.told


def test_what_was_gone_before_it_was_heard_of_is_not_told() -> None:
    """A write ends and a piece lands on their own ways; that the object went again comes on a third one."""
    core = Core()
    (namespace, place), known = space(core), Beyond()
    keys, since = chain(4), known.moment
    known.gone([name_of(place, keys[:2])])
    known.note(namespace, place, keys, since)
    assert [key for _, key, _ in known.take(100)] == keys[2:]
    known.note(namespace, place, keys[:2], known.moment)
    assert [key for _, key, _ in known.take(100)] == keys[:2], "written again since"
    later, since = chain(2, "later"), known.moment
    known.dropped(place)
    known.note(namespace, place, later, since)
    assert not list(known.take(100)), "some of the place was deleted meanwhile: it may be this"
    known.note(namespace, place, later, known.moment)
    assert len(list(known.take(100))) == 2


def test_of_what_went_lately_little_is_remembered_and_nothing_is_told_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beyond, "MARKS", 8)
    monkeypatch.setattr(beyond, "PLACES", 2)
    core = Core()
    spaces, known = [space(core, model) for model in ("a", "b", "c", "d")], Beyond()
    since = known.moment
    for namespace, place in spaces:
        for number in range(9):
            known.gone([name_of(place, chain(3, number))])
        assert len(known._past) <= 2
        assert all(len(past.marks) <= 8 for past in known._past.values())
        known.note(namespace, place, chain(3), since)
    for namespace, place in spaces:
        known.note(namespace, place, chain(3), since)
    assert not list(known.take(100))
    known.note(*spaces[0], chain(3), known.moment)
    assert len(list(known.take(100))) == 3, "the control"


def test_a_write_whose_object_goes_before_its_end_is_heard_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    core, far, client, listener = host()
    ns, keys = client.open(), chain(3)
    client.put(ns, keys)
    kept = core.store.remote.kept

    def late(order: Keep) -> None:
        core.store.remote.gone([name_of(order.place, order.keys)])
        kept(order)

    monkeypatch.setattr(core.store.remote, "kept", late)
    write(core, far)
    listener.look()
    assert {key: tiers for (_, key), tiers in listener.where.items()} == dict.fromkeys(keys, DRAM)


def test_what_is_deleted_before_the_end_of_its_write_is_heard_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    core, far, client, listener = host()
    ns, keys = client.open(), chain(3)
    client.put(ns, keys)
    kept = core.store.remote.kept

    def late(order: Keep) -> None:
        client.delete(ns, keys[1:])
        kept(order)

    monkeypatch.setattr(core.store.remote, "kept", late)
    write(core, far)
    core.settle()
    listener.look(2)
    assert not {key for _, key in listener.where} & set(keys[1:])


def test_what_is_gone_before_it_has_come_from_there_is_not_told_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    core, far, client, _ = host()
    keys = chain(4)
    client.put(client.open(), keys)
    write(core, far)
    core, other, client, listener = host()
    other.content = far.content
    ns, land = client.open(), core.store.remote.land

    def late(piece: Piece) -> None:
        core.store.remote.gone([name_of(place_of(ns), keys)])
        land(piece)

    monkeypatch.setattr(core.store.remote, "land", late)
    client.match(ns, keys)
    other.work()
    listener.look()
    assert {key: tiers for (_, key), tiers in listener.where.items()} == dict.fromkeys(keys, DRAM)


def test_a_namespace_whose_former_number_goes_to_another_is_still_heard_of() -> None:
    core = Core()
    (former, place), (other, elsewhere) = space(core), space(core, "other")
    again, known = space(core, "again")[0], Beyond()
    known.note(former, place, chain(1))
    known.withdraw(former.number, chain(1))
    known.note(again, place, chain(2))  # the same one, opened again
    former_number_now = replace(other, number=former.number)
    known.note(former_number_now, elsewhere, chain(1, "b"))
    list(known.take(100))
    known.gone([name_of(place, chain(2))])
    assert [(number, there) for number, _, there in known.take(100)] == [(again.number, False)] * 2
