"""What was deleted is owed until it is removed over there: noted, over restarts, and a namespace of which too much is
owed is closed. The far side is healthy here; `test_remote_removing.py` has those that are not.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import xxhash

from kvstore.report import RemoteReport
from kvstore.tier.remote_format import (
    HEADER_BYTES,
    NO_PARENT,
    ObjectHeader,
    Place,
    key_digest,
    mark_of,
    name_of,
    pack_header,
    tenant_digest,
)
from kvstore.tier.remote_orders import Forget, ForgetAll
from kvstored import remote_ledger, remote_removals
from kvstored.admin_remote import remote_report, remote_warnings
from kvstored.remote import TURN, RemoteLimits, RemoteThreads
from kvstored.remote_ledger import FILE, Ledger
from kvstored.remote_port import RemoteError
from kvstored.remote_removals import holding
from tests.core import Core, chain, key_of, value_of
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, NOBODY, PLACE, Kit, kit, read_ledger

OTHER = Place(PLACE.tenant, key_of("other namespace"))
STRANGER = Place(tenant_digest("u"), key_of("namespace"))
KEYS = 100  # that a ledger remembers here


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_ledger, "DELETED", KEYS)


def another_hosts(s3: S3Server, keys: Sequence[bytes], place: Place = PLACE) -> None:
    """One-block chains that somebody else has written."""
    for key in keys:
        block = value_of(key, BLOCK_BYTES)
        header = ObjectHeader(place, NO_PARENT, (key,), (xxhash.xxh3_64_intdigest(block),), BLOCK_BYTES)
        s3.objects[f"k/{name_of(place, [key])}"] = pack_header(header).ljust(HEADER_BYTES, b"\0") + block


def drop(one: Kit, keys: Sequence[bytes], place: Place = PLACE) -> None:
    """The first half of a DELETE, or (no keys) of a clear."""
    forget = Forget(NOBODY, place, tuple(keys))
    one.jobs.announce(forget)
    one.jobs.begin_forget(forget)


def delete_all(one: Kit, keys: Sequence[bytes], place: Place = PLACE) -> None:
    for at in range(0, len(keys), 10):
        drop(one, keys[at : at + 10], place)


def remove(one: Kit, turns: int = 1000) -> None:
    """As the thread that removes, until nothing waits."""
    removals = one.jobs.holdings.removals
    while removals and turns:
        turns -= 1
        order = removals.next()
        assert order is not None
        if not one.jobs.remove(order, TURN):
            removals.goes_on(order)  # type: ignore[arg-type]
    assert not removals


def come_back(one: Kit, keys: Sequence[bytes], place: Place = PLACE) -> list[bytes]:
    one.jobs.holdings.known.forget_all("")
    return [key for key in keys if one.seek([key], place=place)]


# -- more than can be remembered --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("restart", ["never", "before it is removed", "after it is removed"])
def test_none_of_more_deleted_keys_than_can_be_remembered_comes_back(
    s3: S3Server, tmp_path: Path, restart: str
) -> None:
    keys, other = [key_of(number) for number in range(3 * KEYS)], [key_of("kept")]
    another_hosts(s3, keys)
    another_hosts(s3, other, OTHER)
    with kit(s3, tmp_path) as one:
        ledger = one.jobs.holdings.ledger
        assert come_back(one, keys[:3]) == keys[:3], "the control"
        delete_all(one, keys)
        assert ledger.closed == 1
        assert ledger.unnoted == 2 * KEYS
        assert ledger.owed == KEYS
        assert come_back(one, keys[::7]) == []
        assert come_back(one, other, OTHER) == other, "no other namespace is closed"
        if restart != "before it is removed":
            remove(one)
            assert come_back(one, keys[::7]) == []
    with kit(s3, tmp_path) as one:
        ledger = one.jobs.holdings.ledger
        if restart == "before it is removed":
            assert ledger.closed == 1
            assert come_back(one, keys[::7]) == []
            one.jobs.resume()
            remove(one)
        assert [name for name in s3.objects if PLACE.prefix in name] == []
        assert (ledger.closed, ledger.owed, ledger.clearing()) == (0, 0, [])
        assert come_back(one, other, OTHER) == other
        new = chain(3, "new")
        assert one.keep(new).stored == 3, "it is open again"
        one.assert_blocks(one.seek(new), new)
        assert read_ledger(tmp_path).closed == 0


@pytest.mark.usefixtures("small")
def test_keys_that_were_removed_over_there_are_forgotten_without_harm(s3: S3Server, tmp_path: Path) -> None:
    keys, kept = [key_of(number) for number in range(3 * KEYS)], chain(2, "kept")
    with kit(s3, tmp_path) as one:
        one.keep(kept)
        for at in range(0, len(keys), KEYS // 2):
            another_hosts(s3, some := keys[at : at + KEYS // 2])
            delete_all(one, some)
            remove(one)
        ledger = one.jobs.holdings.ledger
        assert (ledger.deleted, ledger.owed, ledger.unnoted, ledger.closed) == (KEYS, 0, 0, 0)
        one.assert_blocks(one.seek(kept), kept)
        assert len(s3.objects) == 1
        assert one.jobs.holdings.allowed(PLACE, keys[-1:]) == [], "the latest are remembered all the same"
    again = read_ledger(tmp_path)
    assert (again.deleted, again.owed, again.unnoted) == (KEYS, 0, 0)


@pytest.mark.usefixtures("small")
def test_where_nothing_is_listed_a_namespace_stays_closed_until_somebody_clears_it(
    s3: S3Server, tmp_path: Path
) -> None:
    keys = [key_of(number) for number in range(2 * KEYS)]
    with kit(s3, tmp_path) as one:
        one.far.most_blocks = 1
        mine = [key_of("mine")]
        one.keep(mine)
        delete_all(one, keys)
        remove(one)
    with kit(s3, tmp_path) as one:
        one.far.most_blocks = 1
        one.jobs.resume()
        remove(one)
        assert one.jobs.holdings.ledger.closed == 1
        assert come_back(one, mine) == []
        drop(one, [])
        remove(one)
        assert one.jobs.holdings.ledger.closed == 0
        assert one.keep(mine).stored == 1
        assert come_back(one, mine) == mine
    assert read_ledger(tmp_path).closed == 0


def test_keys_that_find_no_place_in_the_queue_close_their_namespace(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_removals, "DIGESTS", 20)
    keys, other = [key_of(number) for number in range(40)], [key_of(number) for number in range(50, 60)]
    another_hosts(s3, keys)
    another_hosts(s3, other, OTHER)
    with kit(s3) as one:
        delete_all(one, keys)
        assert one.jobs.holdings.removals.dropped == 10
        assert one.jobs.holdings.ledger.closed == 1
        delete_all(one, other, OTHER)
        assert one.jobs.holdings.ledger.closed == 1, "what all of it will be cleared for takes no place"
        assert come_back(one, keys) == []
        remove(one)
        assert not s3.objects


def test_what_says_that_too_much_was_deleted_at_a_time_closes_its_namespace(s3: S3Server, tmp_path: Path) -> None:
    keys = chain(2)
    with kit(s3, tmp_path) as one:
        one.keep(keys)
        one.jobs.begin_forget(Forget(NOBODY, PLACE, (), too_many=True))
        assert one.seek(keys) == []
        assert read_ledger(tmp_path).closed == 1
        remove(one)
        assert not s3.objects
        assert read_ledger(tmp_path).closed == 0


@pytest.mark.parametrize("most_blocks", [64, 1])
def test_a_namespace_that_was_closed_just_before_a_kill_is_cleared_in_the_next_life(
    s3: S3Server, tmp_path: Path, most_blocks: int
) -> None:
    another_hosts(s3, [key_of(1)])
    read_ledger(tmp_path).close(PLACE.prefix)
    with kit(s3, tmp_path) as one:
        one.far.most_blocks = most_blocks
        assert come_back(one, [key_of(1)]) == []
        one.jobs.resume()
        remove(one)
        assert len(s3.objects) == one.jobs.holdings.ledger.closed == (most_blocks == 1)
        one.jobs.begin_forget_all(ForgetAll(None, PLACE.namespace))
        remove(one)
        assert one.jobs.holdings.ledger.closed == 0, "by hand, though nothing is known of it but that it is closed"


def test_a_clear_does_not_open_what_was_closed_after_it_had_begun(tmp_path: Path) -> None:
    ledger = read_ledger(tmp_path)
    for prefix in (PLACE.prefix, OTHER.prefix):
        ledger.begin_clear(prefix)
        ledger.close(prefix)
        ledger.delete_keys(prefix, [b"early"])
    clear = ledger.last_clear(PLACE.prefix)
    ledger.end_clear(PLACE.prefix, clear)
    for one in (ledger, read_ledger(tmp_path)):
        assert (one.closed, one.clearing(), one.owed) == (2, [OTHER.prefix], 2)
        assert one.is_clearing(PLACE.prefix)
    ledger.begin_clear(PLACE.prefix)
    ledger.begin_clear(OTHER.prefix)
    ledger.end_clear(PLACE.prefix, ledger.last_clear(PLACE.prefix))
    for one in (ledger, read_ledger(tmp_path)):
        assert (one.closed, one.clearing(), one.owed) == (1, [OTHER.prefix], 1)
        assert not one.is_clearing(PLACE.prefix)


# -- lives ------------------------------------------------------------------------------------------------------------


def test_what_one_life_did_not_remove_the_next_one_does(s3: S3Server, tmp_path: Path) -> None:
    keys = [key_of(number) for number in range(5)]
    another_hosts(s3, keys)
    with kit(s3, tmp_path) as one:
        inside = chain(3, "inside")
        one.keep(inside)
        drop(one, keys[:3])
        drop(one, inside[1:2])
    with kit(s3, tmp_path) as one:
        assert one.jobs.holdings.ledger.owed == 4
        one.jobs.resume()
        remove(one)
        assert set(s3.objects) == {f"k/{name_of(PLACE, [key])}" for key in keys[3:]}
    listed = s3.count("LIST")
    with kit(s3, tmp_path) as one:
        one.jobs.resume()
        remove(one)
        assert s3.count("LIST") == listed, "and none does it once more"
        assert one.jobs.holdings.allowed(PLACE, keys[:1]) == []


def test_a_key_that_is_deleted_once_more_while_it_is_removed_is_still_owed(s3: S3Server) -> None:
    with kit(s3) as one:
        drop(one, [key := key_of("twice")])
        backend = one.far._backend
        listing = backend.listing

        def meanwhile(prefix: str, most: int) -> object:
            backend.listing = listing  # type: ignore[method-assign]
            drop(one, [key])
            return listing(prefix, most)

        backend.listing = meanwhile  # type: ignore[method-assign,assignment]
        order = one.jobs.holdings.removals.next()
        assert order is not None
        one.jobs.remove(order)
        assert one.jobs.holdings.ledger.owed == 1
        remove(one)
        assert one.jobs.holdings.ledger.owed == 0


@pytest.mark.parametrize("torn", [False, True])
def test_what_is_dropped_while_the_ledger_is_read_is_in_the_file_at_once(tmp_path: Path, *, torn: bool) -> None:
    """Whatever an earlier line says of it: those that come behind count, in this reading and in the next life's."""
    former = read_ledger(tmp_path)
    digest = key_digest(PLACE, key_of(1))
    for number in range(1000):
        former.wrote(name_of(PLACE, [key_of(number)]), 10)
    former.settle(PLACE.prefix, [digest], former.delete_keys(PLACE.prefix, [digest]))
    for prefix in (OTHER.prefix, "v1/"):
        former.begin_clear(prefix)
        former.end_clear(prefix, former.last_clear(prefix))
    former.wrote(name_of(PLACE, [key_of("last")]), 10)
    if torn:
        os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 5)
    ledger, told = Ledger(tmp_path), list[int]()

    def meanwhile() -> None:
        if not told:
            ledger.note_ahead(PLACE.prefix, [digest])
            ledger.note_ahead(OTHER.prefix, [])
            ledger.note_ahead(STRANGER.prefix.rsplit("/", 2)[0] + "/", [])
            killed = read_ledger(tmp_path)
            told.append(killed.owed)
            assert sorted(killed.clearing()) == sorted([OTHER.prefix, f"{STRANGER.prefix.rsplit('/', 2)[0]}/"])

    ledger.read(meanwhile)
    assert told == [1]
    for one in (ledger, read_ledger(tmp_path)):
        assert one.owed == 1
        assert len(one) == 1001 - torn
        assert one.is_clearing(OTHER.prefix)
        assert one.is_clearing(STRANGER.prefix)
        assert not one.is_clearing(PLACE.prefix)
        assert one.faults == torn


def test_a_ledger_that_is_cut_off_anywhere_clears_no_more_than_it_says(tmp_path: Path) -> None:
    ledger = read_ledger(tmp_path)
    ledger.begin_clear(PLACE.prefix)
    ledger.begin_clear(f"{STRANGER.prefix.rsplit('/', 2)[0]}/")
    ledger.end_clear(PLACE.prefix, ledger.last_clear(PLACE.prefix))
    whole = (tmp_path / FILE).read_bytes()
    for length in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:length])
        assert not read_ledger(tmp_path).is_clearing(OTHER.prefix)


# -- all of a tenant, or of everybody ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget", "gone"),
    [
        (ForgetAll(), {PLACE, OTHER, STRANGER}),
        (ForgetAll(PLACE.tenant), {PLACE, OTHER}),
        (ForgetAll(PLACE.tenant, PLACE.namespace), {PLACE}),
        (ForgetAll(None, PLACE.namespace), {PLACE, STRANGER}),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_all_of_a_tenant_or_of_everybody_is_cleared_though_nobody_has_opened_it(
    s3: S3Server, tmp_path: Path, forget: ForgetAll, gone: set[Place], *, restart: bool
) -> None:
    keys, others = chain(3), [key_of("another host's")]
    places = {PLACE, OTHER, STRANGER}
    with kit(s3, tmp_path) as one:
        for place in places:
            one.keep(keys, place)
            another_hosts(s3, others, place)
    with kit(s3, tmp_path) as one:
        one.jobs.announce(forget)
        one.jobs.begin_forget_all(forget)
        for place in places:
            assert bool(come_back(one, others, place)) == (place not in gone)
        if not restart:
            remove(one)
    with kit(s3, tmp_path) as one:
        for place in gone if restart else ():
            assert come_back(one, others, place) == []
            assert one.keep(chain(1, "new"), place).stored == 0
        one.jobs.resume()
        remove(one)
        assert {place for place in places if any(place.prefix in name for name in s3.objects)} == places - gone
        assert not one.jobs.holdings.ledger.clearing()
        for place in places:
            assert one.keep(chain(1, "new"), place).stored == 1


def test_a_clear_of_a_tenant_waits_for_what_is_being_written_of_it(s3: S3Server) -> None:
    with kit(s3) as one:
        forget = ForgetAll(PLACE.tenant)
        backend = one.far._backend
        put = backend.put

        def meanwhile(name: str, parts: Sequence[object], **more: object) -> bool:
            backend.put = put  # type: ignore[method-assign]
            one.jobs.announce(forget)
            one.jobs.begin_forget_all(forget)
            with pytest.raises(RemoteError):
                one.jobs.remove(one.jobs.holdings.removals.next())  # type: ignore[arg-type]
            return put(name, parts, **more)  # type: ignore[arg-type]

        backend.put = meanwhile  # type: ignore[method-assign]
        assert one.keep(chain(2)).stored == 0
        assert one.jobs.holdings.ledger.clearing()
        one.jobs.resume()
        remove(one)
        assert not s3.objects
        assert not one.jobs.holdings.ledger.clearing()


# -- in turn ----------------------------------------------------------------------------------------------------------


def test_a_clear_is_not_held_up_by_another_namespaces_deletes_nor_by_another_clear(s3: S3Server) -> None:
    mine, many = chain(3), [key_of(number) for number in range(3 * TURN)]
    with kit(s3) as one:
        one.keep(mine, OTHER)
        another_hosts(s3, many)
        delete_all(one, [key_of(-number) for number in range(500)], STRANGER)
        drop(one, [])
        drop(one, [], OTHER)
        for _ in range(2):
            order = one.jobs.holdings.removals.next()
            assert order is not None
            if not one.jobs.remove(order, TURN):
                one.jobs.holdings.removals.goes_on(order)  # type: ignore[arg-type]
        assert not any(OTHER.prefix in name for name in s3.objects)
        assert len(s3.objects) >= TURN, "the first clear is not over, and lets others have their turn"
        assert one.jobs.holdings.ledger.clearing() == [PLACE.prefix]
        remove(one)
        assert not s3.objects


def test_what_holds_a_key_is_found_by_name_as_by_looking_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr("kvstored.remote_removals.time.sleep", rests.append)
    random = Random(3)
    keys = [key_of(number) for number in range(3000)]
    names = [name_of(PLACE, random.sample(keys, random.randint(1, 64))) for _ in range(3000)]
    names += [f"{PLACE.prefix}{'0' * 40}/3.{odd}" for odd in ("", "a", "ab", "abcd", "__-__-_")]
    for count in (1, 5, 500):
        digests = [key_digest(PLACE, key) for key in random.sample(keys, count)]
        firsts = {digest.hex() for digest in digests}
        marks = {mark_of(digest) for digest in digests}

        def slow(name: str, marks: set[str] = marks) -> bool:
            tail = name.rpartition(".")[2]
            return any(tail[at : at + 3] in marks for at in range(0, len(tail) - 2, 3))

        sure = {name: name.split("/")[-2] in firsts for name in names}
        expected = sorted({(name, sure[name]) for name in names if sure[name] or slow(name)})
        assert holding(names, PLACE.prefix, digests) == expected
        assert len(expected) > 0
    assert len(rests) == 6, "between each two looks, others compute"
    assert holding([], PLACE.prefix, digests) == []


def test_what_many_have_deleted_takes_one_look_at_what_was_written(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit(s3) as one:
        looks, below = list[str](), one.jobs.holdings.ledger.below

        def look(prefix: str) -> list[str]:
            looks.append(prefix)
            return below(prefix)

        chains = [chain(3, number) for number in range(30)]
        for keys in chains:
            one.keep(keys)
        monkeypatch.setattr(one.jobs.holdings.ledger, "below", look)
        for keys in chains[:20]:
            drop(one, keys[1:2])
        remove(one)
        assert len(looks) == 1
        assert len(s3.objects) == 10


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_status_says_what_is_owed_and_what_nobody_knows_any_more(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_ledger, "OBJECTS", 2)
    with kit(s3) as one:
        threads = SimpleNamespace(
            jobs=one.jobs,
            far=one.far,
            ledger=one.jobs.holdings.ledger,
            limits=RemoteLimits(1 << 40, 1),
            changed_blocks=0,
        )

        def told() -> RemoteReport:
            return remote_report(Core().store, cast(RemoteThreads, threads), "s3://bucket")

        delete_all(one, [key_of(number) for number in range(10)])
        assert (told().owed, told().closed, told().not_remembered, told().uncounted) == (10, 0, 0, 0)
        assert not list(remote_warnings(told()))
        delete_all(one, [key_of(number) for number in range(KEYS + 7)])
        assert (told().owed, told().closed, told().not_remembered) == (KEYS, 1, 7)
        assert ["of 1 namespaces more was deleted" in warning for warning in remote_warnings(told())] == [True]
        remove(one)
        assert (told().owed, told().closed, told().not_remembered) == (0, 0, 7)
        assert not list(remote_warnings(told()))
        for number in range(5):
            one.keep([key_of(-number)])
        assert (told().objects, told().uncounted) == (2, 3)
        assert ["3 objects of this host" in warning for warning in remote_warnings(told())] == [True]
