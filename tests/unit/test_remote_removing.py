"""What was dropped goes from over there and does not come back, whatever the far side, a crash or a bit does."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from kvstore.tier.remote_breaker import FAILURES, Circuit
from kvstore.tier.remote_format import key_digest, mark_of, name_of
from kvstore.tier.remote_orders import Forget
from kvstored import remote_holdings, remote_removals
from kvstored.admin_remote import GOES_ON, STOPPED, remote_report
from kvstored.leaf import LeafThreads
from kvstored.remote import RemoteLimits, RemoteThreads
from kvstored.remote_address import RemoteAddress
from kvstored.remote_ledger import FILE, SLACK, Ledger
from kvstored.remote_mooncake import NAMES, MooncakeAddress, MooncakeBackend
from kvstored.remote_port import Listed, RefusedError, RemoteError, UnreachableError
from kvstored.remote_removals import Doubt, Epochs, Removal, Removals
from kvstored.remote_s3 import S3Backend
from tests.core import Core, chain, key_of
from tests.node import PATIENCE_S
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, NOBODY, PLACE, Kit, kit, read_ledger

EVERYTHING = Forget(NOBODY, PLACE, ())
Put = Callable[[str, Sequence[object]], bool]


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def one(s3: S3Server) -> Iterator[Kit]:
    with kit(s3) as jobs:
        yield jobs


def drop(one: Kit, keys: Sequence[bytes]) -> Removal:
    """As the owner and the thread that notes do it: the first half of a DELETE, or (no keys) of a clear."""
    forget = Forget(NOBODY, PLACE, tuple(keys))
    one.jobs.announce(forget)
    return one.jobs.begin_forget(forget)


def remove(one: Kit, turns: int = 20) -> None:
    """What the thread that removes does with what waits, until nothing does."""
    removals = one.jobs.holdings.removals
    removals._pause_s = 0.0
    for _ in range(turns):
        if not removals and not removals._later:
            return
        order = removals.next()
        assert order is not None
        heal(one)
        try:
            one.jobs.remove(order)
        except RemoteError:
            removals.again(order)


def heal(one: Kit) -> None:
    """As if the time of all breakers were over."""
    one.far.reading.until_ns = one.far.writing.until_ns = one.far.deleting.until_ns = 0


def lands_late(one: Kit, s3: S3Server) -> Callable[[], None]:
    """The next write outlives its deadline; what this returns has it land all the same."""
    backend, late = one.far._backend, list[tuple[str, bytes]]()
    put = backend.put

    def slow(name: str, parts: Sequence[object]) -> bool:
        late.append(
            (name, b"".join(cast(np.ndarray[tuple[int], np.dtype[np.uint8]], part).tobytes() for part in parts))
        )
        backend.put = put  # type: ignore[method-assign]
        raise UnreachableError("slower than the deadline")

    def land() -> None:
        for name, content in late:
            s3.objects[f"k/{name}"] = content

    backend.put = slow  # type: ignore[method-assign]
    return land


def forgotten(one: Kit) -> None:
    """As long afterwards as what is known is believed."""
    one.jobs.holdings.known.forget_all(PLACE.prefix)


# -- writes that are under way, or in doubt ---------------------------------------------------------------------------


def test_a_slow_write_does_not_outlive_a_clear_though_deleting_it_fails(one: Kit, s3: S3Server) -> None:
    keys, backend = chain(3), one.far._backend
    put, delete = backend.put, backend.delete

    def slow(name: str, parts: object) -> bool:
        drop(one, [])
        with suppress(RemoteError):
            one.jobs.forget(EVERYTHING)  # all that is there now is gone
        new = put(name, parts)  # type: ignore[arg-type]
        backend.delete = fails  # type: ignore[method-assign]
        return new

    def fails(names: Sequence[str]) -> None:
        backend.delete = delete  # type: ignore[method-assign]
        raise UnreachableError(f"500 for {names}")

    backend.put = slow  # type: ignore[method-assign]
    assert one.keep(keys).stored == 0
    backend.put = put  # type: ignore[method-assign]
    forgotten(one)
    assert one.seek(keys) == []
    remove(one)
    assert not s3.objects
    assert not one.jobs.holdings.ledger.clearing()
    assert not one.jobs.holdings.unsettled
    assert one.keep(keys).stored == 3, "the control: what is stored afterwards stays"
    one.assert_blocks(one.seek(keys), keys)


@pytest.mark.parametrize("most_blocks", [64, 1])
def test_a_write_that_lands_after_its_deadline_does_not_outlive_a_clear(
    one: Kit, s3: S3Server, most_blocks: int
) -> None:
    keys = chain(1)
    one.far.most_blocks = most_blocks
    land = lands_late(one, s3)
    assert one.keep(keys).stored == 0
    drop(one, [])
    with suppress(RemoteError):
        one.jobs.forget(EVERYTHING)
    land()
    assert s3.objects
    forgotten(one)
    assert one.seek(keys) == [], "it may still land, so the clear is not over"
    assert read_of(one) == [PLACE.prefix]
    one.jobs.holdings.removals._later = type(one.jobs.holdings.removals._later)(
        (0.0, doubt) for _, doubt in one.jobs.holdings.removals._later
    )
    remove(one)
    assert not s3.objects
    assert read_of(one) == []
    assert one.keep(keys).stored == 1
    one.assert_blocks(one.seek(keys), keys)


def read_of(one: Kit) -> list[str]:
    return one.jobs.holdings.ledger.clearing()


def test_a_write_that_lands_after_its_deadline_does_not_outlive_a_delete_and_stays_without(s3: S3Server) -> None:
    with kit(s3) as one:
        removals = one.jobs.holdings.removals
        removals._lands_s = 0.0
        for dropped in (True, False):
            keys = chain(3, dropped)
            land = lands_late(one, s3)
            assert one.keep(keys).stored == 0
            if dropped:
                one.forget(keys[2:])
            land()
            assert len(s3.objects) == 1
            remove(one)
            assert len(s3.objects) == (0 if dropped else 1)
            assert len(one.jobs.holdings.ledger) == len(s3.objects), "what is there is noted, and nothing else"
        one.forget([])
        lands_late(one, s3)  # never
        assert one.keep(chain(3)).stored == 0
        assert one.jobs.holdings.ledger.total_bytes > 0
        remove(one)
        assert one.jobs.holdings.ledger.total_bytes == 0
        assert one.keep(chain(3)).stored == 3


def test_a_host_that_is_killed_while_it_writes_knows_in_its_next_life_what_it_wrote(
    s3: S3Server, tmp_path: Path
) -> None:
    """Where nothing is listed there is no other way to find it."""
    left = tmp_path / "left"
    left.mkdir()
    with kit(s3, tmp_path) as host:
        host.far.most_blocks = 1
        put = host.far._backend.put

        def killed(name: str, parts: object) -> bool:
            new = put(name, parts)  # type: ignore[arg-type]
            (left / FILE).write_bytes((tmp_path / FILE).read_bytes())
            return new

        host.far._backend.put = killed  # type: ignore[method-assign]
        host.keep(chain(1))
    assert len(s3.objects) == 1
    with kit(s3, left) as host:
        host.far.most_blocks = 1
        assert host.jobs.holdings.ledger.total_bytes == len(next(iter(s3.objects.values())))
        host.forget([])
        assert not s3.objects


def test_what_was_refused_or_was_there_already_is_not_noted(one: Kit, s3: S3Server, tmp_path: Path) -> None:
    with kit(s3, tmp_path) as host:
        s3.room_bytes = 0
        assert host.keep(chain(2)).stored == 0
        assert len(host.jobs.holdings.ledger) == len(read_ledger(tmp_path)) == 0
        s3.room_bytes = None
        heal(host)
        host.jobs.holdings.follow = lambda *_: []  # type: ignore[method-assign]
        assert one.keep(chain(2)).stored == 2
        assert host.keep(chain(2)).stored == 2
        assert len(host.jobs.holdings.ledger) == len(read_ledger(tmp_path)) == 0
        assert host.keep(chain(2, "own")).stored == 2
        assert len(host.jobs.holdings.ledger) == len(read_ledger(tmp_path)) == 1
        assert not host.jobs.holdings.unsettled
        assert not host.jobs.holdings.removals._later


def test_a_clear_is_not_over_before_those_that_came_meanwhile_are(one: Kit, s3: S3Server, tmp_path: Path) -> None:
    keys = chain(3)
    with kit(s3, tmp_path) as host:
        backend, ledger = host.far._backend, host.jobs.holdings.ledger
        listing, first = backend.listing, drop(host, [])
        second: list[Removal] = []

        def slow(prefix: str, most: int) -> list[Listed]:
            found = listing(prefix, most)
            if not found and not second:  # all that was there is gone; another host writes, and all is dropped again
                one.keep(keys)
                second.append(drop(host, []))
            return found

        backend.listing = slow  # type: ignore[method-assign]
        host.jobs.remove(first)
        assert ledger.clearing() == read_ledger(tmp_path).clearing() == [PLACE.prefix]
        assert host.seek(keys) == []
        host.jobs.remove(second[0])
        assert ledger.clearing() == read_ledger(tmp_path).clearing() == []
        assert not s3.objects


def test_what_is_deleted_elsewhere_in_a_namespace_costs_no_upload(one: Kit, s3: S3Server) -> None:
    backend = one.far._backend
    put, keys, other = backend.put, chain(3), list[bytes]()

    def meanwhile(name: str, parts: object) -> bool:
        new = put(name, parts)  # type: ignore[arg-type]
        one.forget(other)
        return new

    backend.put = meanwhile  # type: ignore[method-assign]
    other[:] = [key_of("other")]
    assert one.keep(keys).stored == 3
    assert len(s3.objects) == 1
    other[:] = chain(3, "dropped")[1:2]
    assert one.keep(chain(3, "dropped")).stored == 0, "the control"
    remove(one)
    assert len(s3.objects) == 1
    backend.put = put  # type: ignore[method-assign]
    one.assert_blocks(one.seek(keys), keys)


def test_what_was_dropped_is_remembered_by_keys_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_removals, "DROPPED", 100)
    epochs, mine = Epochs(), chain(4)
    epochs.dropped("a/", (mine[0],))
    before = epochs.of("a/")
    epochs.dropped("a/", (key_of("other"),))
    epochs.dropped("b/", tuple(mine))
    assert not epochs.meet("a/", before, mine)
    epochs.dropped("a/", (key_of("third"), mine[2]))
    assert epochs.meet("a/", before, mine)
    assert not epochs.meet("a/", before, mine[:2])
    before = epochs.of("a/")
    epochs.dropped("a/", ())
    assert epochs.meet("a/", before, mine[:2]), "all of it"
    before = epochs.of("a/")
    epochs.dropped("b/", tuple(chain(100, "many")))
    assert len(epochs) == 0
    assert epochs.meet("a/", before, mine), "it may have been one of them"
    assert not epochs.meet("a/", epochs.of("a/"), mine)


# -- a ledger that is damaged -----------------------------------------------------------------------------------------


def test_no_flipped_bit_of_a_ledger_costs_more_than_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, noted in, written anew, and says nothing that makes no sense."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)
    ledger = read_ledger(tmp_path)
    names = [name_of(PLACE, chain(3, number), encoded=number == 1) for number in range(3)]
    for name in names:
        ledger.wrote(name, 4096)
    ledger.removed(names[0])
    ledger.delete_keys(PLACE.prefix, [key_digest(PLACE, key) for key in chain(2)])
    ledger.begin_clear(PLACE.prefix)
    whole = (tmp_path / FILE).read_bytes()
    assert len(read_ledger(tmp_path)) == 2
    random = Random(3)
    flips = {random.randrange(8 * len(whole)) for _ in range(600)}
    for flip in flips:
        content = bytearray(whole)
        content[flip // 8] ^= 1 << flip % 8
        (tmp_path / FILE).write_bytes(content)
        damaged = read_ledger(tmp_path)
        assert damaged.faults <= 2
        assert 0 <= len(damaged) <= 3
        assert 1 <= damaged.deleted <= 2
        assert all(name.isascii() and name.isprintable() for name in damaged._objects)
        damaged._lines = 10 * SLACK
        damaged.wrote(names[0], 1)
        assert damaged.faults <= 2, f"bit {flip}: it could not be written anew"
        anew = read_ledger(tmp_path)
        assert anew.faults == 0
        assert (len(anew), anew.deleted) == (len(damaged), damaged.deleted)


def test_a_ledger_that_cannot_be_read_at_all_turns_nothing_off(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(_ledger: Ledger, _meanwhile: Callable[[], None]) -> None:
        raise ValueError("whatever it is")

    monkeypatch.setattr(Ledger, "read", breaks)
    noted = threading.Semaphore(0)
    threads = RemoteThreads(
        S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ),
        RemoteLimits(1 << 30, 2, tmp_path), lambda _arena: np.zeros(0, dtype=np.uint8), cast(LeafThreads, None),
        noted.release,
    )  # fmt: skip
    assert not threads.reading()
    threads.start()
    try:
        threads.submit(Forget(NOBODY, PLACE, tuple(chain(1))))
        assert noted.acquire(timeout=10), "what is dropped is noted all the same"
        assert threads.reading()
        assert threads.writing()
    finally:
        threads.stop()


def test_a_name_that_the_library_refuses_is_gone(one: Kit, s3: S3Server) -> None:
    one.keep(chain(2))
    (name,) = s3.objects
    one.far.delete(["v1/\x0f", "v1//a", name.removeprefix("k/")])
    assert not s3.objects
    assert one.far.deleting.reason == ""


# -- a far side that errs a little ------------------------------------------------------------------------------------


def test_a_clear_ends_on_a_far_side_that_errs_a_little(one: Kit, s3: S3Server) -> None:
    random, count = Random(7), 300
    for number in range(count):
        name = name_of(PLACE, [key_of(number)])
        s3.objects[f"k/{name}"] = b"x"
        one.jobs.holdings.ledger.wrote(name, 1)
    delete, asked = one.far._backend.delete, list[str]()

    def errs(names: Sequence[str]) -> None:
        for name in names:
            asked.append(name)
            if random.random() < 0.02:
                raise UnreachableError("503")
            delete([name])

    one.far._backend.delete = errs  # type: ignore[method-assign]
    drop(one, [])
    remove(one, turns=5)
    assert not s3.objects
    assert not one.jobs.holdings.ledger.clearing()
    assert count < len(asked) < 1.1 * count
    assert one.jobs.holdings.seen.removed == count, "each is counted once"


def test_deletes_that_fail_stop_no_writes_and_no_room_stops_them(s3: S3Server, tmp_path: Path) -> None:
    room = 3 * (4096 + BLOCK_BYTES)
    with kit(s3, quota_bytes=room) as host:
        backend, delete = host.far._backend, host.far._backend.delete

        def fails(names: Sequence[str]) -> None:
            raise UnreachableError(f"500 for {names}")

        backend.delete = fails  # type: ignore[method-assign]
        host.keep(chain(1))
        for _ in range(FAILURES + 1):
            with pytest.raises(RemoteError):
                host.forget(chain(1))
        assert host.far.deleting.state is Circuit.OPEN
        assert host.far.can_write()
        assert host.keep(chain(1, "b")).stored == 1
        assert host.keep(chain(1, "c")).stored == 1
        assert host.jobs.keeping.has_room()
        assert host.keep(chain(1, "d")).stored == 0
        assert not host.jobs.keeping.has_room(), "then nothing is even copied"
        threads = SimpleNamespace(
            jobs=host.jobs, far=host.far, ledger=host.jobs.holdings.ledger, limits=RemoteLimits(room, 1)
        )
        report = remote_report(Core().store, cast(RemoteThreads, threads), "s3://bucket")
        assert (report.reading, report.writing) == (GOES_ON, STOPPED)
        assert report.reason.startswith("500")
        backend.delete = delete  # type: ignore[method-assign]
        heal(host)
        assert host.jobs.keeping.has_room()
        assert host.keep(chain(1, "d")).stored == 1
        assert host.jobs.keeping.has_room()


def test_deletes_of_one_block_objects_go_some_at_a_time_and_each_that_is_done_is_noted(one: Kit) -> None:
    one.far.most_blocks = 1
    names = [name_of(PLACE, [key_of(number)]) for number in range(200)]
    for name in names:
        one.jobs.holdings.ledger.wrote(name, 1)
    asked: list[int] = []

    def second_fails(some: Sequence[str]) -> None:
        asked.append(len(some))
        if len(asked) == 2:
            raise UnreachableError("once")

    one.far._backend.delete = second_fails  # type: ignore[method-assign,assignment]
    with pytest.raises(RemoteError):
        one.jobs.holdings.remove(names)
    assert asked == [64, 64, 64, 8]
    assert len(one.jobs.holdings.ledger) == 64
    one.jobs.holdings.remove(one.jobs.holdings.ledger.below(PLACE.prefix))
    assert len(one.jobs.holdings.ledger) == 0


def test_each_message_to_mooncake_that_deletes_has_a_deadline_of_its_own() -> None:
    backend, untils = MooncakeBackend(MooncakeAddress("127.0.0.1:1"), 2.0), list[float]()

    class Life:
        def ask(self, until_s: float, *, do: str, names: Sequence[str]) -> list[int]:
            untils.append(until_s)
            return [0] * len(names)

    clock = iter(range(10))
    backend._alive = Life  # type: ignore[method-assign,assignment]
    backend._until_s = lambda: float(next(clock))  # type: ignore[method-assign]
    backend.delete(["a"] * (2 * NAMES + 1))
    assert untils == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("most_blocks", [64, 1])
def test_a_removal_goes_on_where_it_was(one: Kit, most_blocks: int) -> None:
    one.far.most_blocks = most_blocks
    backend, asked = one.far._backend, list[str]()
    removal = Removal(PLACE.prefix, tuple(key_digest(PLACE, key) for key in chain(100)))

    def fails_at(number: int, names: Sequence[str]) -> None:
        asked.extend(names)
        if len(asked) > number:
            raise UnreachableError("503")

    backend.listing = lambda prefix, most: fails_at(70, [prefix]) or []  # type: ignore[method-assign,func-returns-value]
    backend.delete = lambda names: fails_at(64, names)  # type: ignore[method-assign]
    with pytest.raises(RemoteError):
        one.jobs.remove(removal)
    done = removal.done
    assert done == (70 if most_blocks > 1 else 64)
    again = list[str]()
    backend.listing = lambda prefix, most: again.append(prefix) or []  # type: ignore[method-assign,func-returns-value]
    backend.delete = again.extend  # type: ignore[method-assign,assignment]
    one.jobs.remove(removal)
    assert len(again) == 100 - done
    assert again[0].startswith(f"{PLACE.prefix}{removal.digests[done].hex()}/")


def test_what_is_in_doubt_waits_for_its_time_and_others_do_not() -> None:
    removals = Removals(pause_s=0.0, lands_s=3600.0)
    late = Doubt("a/", "a/x", 1, (), (0, 0))
    removals.add_later(late)
    now = Removal("b/")
    removals.add(now)
    assert removals.next() is now
    removals._lands_s = 0.0
    removals._later.clear()
    removals.add_later(late)
    removals.add_later(Doubt("a/", "a/x", 1, (), (0, 0)))
    assert removals.next() is late
    again = removals.next()
    assert isinstance(again, Doubt), "each write has its own end"
    removals.again(again)
    assert removals.next() is again


# -- what is deleted, and what is not ---------------------------------------------------------------------------------


def alike(one: bytes) -> bytes:
    """A key that names cannot tell from this one inside a run."""
    mark = mark_of(key_digest(PLACE, one))
    return next(key for key in map(key_of, range(10_000_000)) if mark_of(key_digest(PLACE, key)) == mark)


def test_an_object_whose_name_only_looks_as_if_it_had_a_deleted_key_stays(one: Kit, s3: S3Server) -> None:
    keys, others = chain(4), chain(4, "b")
    others[2] = alike(keys[2])
    assert others[2] != keys[2]
    one.keep(keys)
    one.keep(others)
    one.forget(keys[2:3])
    assert list(s3.objects) == [f"k/{name_of(PLACE, others)}"]
    one.assert_blocks(one.seek(others), others)
    one.forget(others[2:3])
    assert not s3.objects, "the control"


def test_an_object_whose_header_cannot_be_read_is_deleted_and_who_is_down_is_asked_again(
    one: Kit, s3: S3Server
) -> None:
    keys = chain(4)
    one.keep(keys)
    (name,) = s3.objects
    s3.broken = True
    with pytest.raises(RemoteError):
        one.forget(keys[2:3])
    s3.broken = False
    heal(one)
    s3.flip(name, 100)
    one.forget(keys[2:3])
    assert not s3.objects


def test_where_names_follow_from_keys_a_delete_does_not_look_through_all_that_was_written(one: Kit) -> None:
    one.far.most_blocks = 1
    one.keep(chain(3))

    def nobody(prefix: str) -> list[str]:
        raise AssertionError(f"all below {prefix} was looked through")

    one.jobs.holdings.ledger.below = nobody  # type: ignore[method-assign]
    one.forget(chain(3)[:2])
    assert len(one.s3.objects) == 1


def test_all_runs_that_begin_with_a_deleted_key_go_however_many(
    one: Kit, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_holdings, "LISTED", 4)
    first = key_of("first")
    for number in range(11):
        s3.objects[f"k/{name_of(PLACE, [first, key_of(number)])}"] = b"another host's"
    one.far._backend.put("v1/other", [np.zeros(1, dtype=np.uint8)])
    one.forget([first])
    assert list(s3.objects) == ["k/v1/other"]
    listings = s3.count("LIST")
    one.forget([key_of("nothing")])
    assert s3.count("LIST") == listings + 1


def test_who_may_not_delete_one_object_is_not_asked_for_the_next(one: Kit, s3: S3Server) -> None:
    for number in range(5):
        one.keep(chain(1, number))
    asked: list[str] = []

    def refuse(names: Sequence[str]) -> None:
        asked.extend(names)
        raise RefusedError("may not")

    one.far._backend.delete = refuse  # type: ignore[method-assign]
    with pytest.raises(RefusedError):
        one.forget([])
    assert len(asked) == 1
    assert len(s3.objects) == 5
