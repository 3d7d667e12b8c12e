"""What leaves the far side for the quota: what was not used for the longest time; and what of that comes back."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvproto.errors import Grant
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import HEADER_BYTES, key_digest, name_of
from kvstore.tier.remote_uses import PLACES, Uses, place_in, place_of_digest
from kvstore.tier.remote_writing import TURN_BITS, place_of
from kvstored import remote_keeping, remote_ledger
from kvstored.remote_ledger import FILE, SLACK, USED_AGAIN_S, Ledger
from tests.core import chain, key_of
from tests.s3 import S3Server
from tests.unit.remote_host import Host, host
from tests.unit.remote_kit import BLOCK_BYTES, PLACE, kit, read_ledger

OBJECT_BYTES = HEADER_BYTES + 2 * BLOCK_BYTES  # of a kit
SMALL_BYTES = HEADER_BYTES + 3 * 96  # of a host


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seconds, as ledgers see them."""
    now_s = [1000]
    monkeypatch.setattr(remote_ledger, "_now_s", lambda: now_s[0])
    return now_s


def names(count: int) -> list[str]:
    return [name_of(PLACE, [key_of(number)]) for number in range(count)]


def order(ledger: Ledger) -> list[str]:
    """All that it has, the first to leave first; nothing is left then."""
    found = []
    while (name := ledger.oldest()) is not None:
        found.append(name)
        ledger._take(name)
    return found


# -- ledger ------------------------------------------------------------------------------------------------------------


def test_what_was_used_leaves_last_and_after_a_restart_too(tmp_path: Path, clock: list[int]) -> None:
    ledger, (a, b, c) = read_ledger(tmp_path), names(3)
    for number, name in enumerate((a, b, c)):
        ledger.wrote(name, 10 + number)
    clock[0] += USED_AGAIN_S
    ledger.used([b, "nobody's", a])
    assert ledger.total_bytes == 33
    assert sorted(ledger.below(PLACE.prefix)) == sorted((a, b, c))
    restarted = read_ledger(tmp_path)
    assert (restarted.total_bytes, restarted.faults, len(restarted)) == (33, 0, 3)
    assert order(ledger) == order(restarted) == [c, b, a]


def test_a_use_is_noted_once_in_ten_minutes_unless_it_is_to_be(tmp_path: Path, clock: list[int]) -> None:
    ledger, (a, b) = read_ledger(tmp_path), names(2)
    ledger.wrote(a, 10)
    ledger.wrote(b, 10)
    for _ in range(USED_AGAIN_S - 1):
        clock[0] += 1
        ledger.used([a])
    assert ledger.oldest() == a, "it was written not long ago"
    assert len((tmp_path / FILE).read_text().splitlines()) == 2
    clock[0] += 1
    for _ in range(100):
        ledger.used([a])
    assert ledger.oldest() == b
    assert len((tmp_path / FILE).read_text().splitlines()) == 3
    ledger.used([b], last=True)
    ledger.used([a], last=True)
    assert ledger.oldest() == b
    assert order(read_ledger(tmp_path)) == [b, a]


def test_a_ledger_of_uses_does_not_grow_and_keeps_its_order(tmp_path: Path, clock: list[int]) -> None:
    ledger, known = read_ledger(tmp_path), names(50)
    for name in known:
        ledger.wrote(name, 7)
    for _ in range((3 * SLACK) // 50):
        clock[0] += USED_AGAIN_S
        ledger.used(known[::-1])
    lines = (tmp_path / FILE).read_text().splitlines()
    assert 50 <= len(lines) <= 2 * 50 + SLACK
    restarted = read_ledger(tmp_path)
    assert (restarted.total_bytes, restarted.faults) == (350, 0)
    assert order(restarted) == known[::-1]


def test_when_the_oldest_was_used_is_known_in_this_life_alone(tmp_path: Path, clock: list[int]) -> None:
    ledger, (a, b) = read_ledger(tmp_path), names(2)
    assert ledger.oldest_s == 0
    for name in (a, b):
        ledger.wrote(name, 1)
        clock[0] += USED_AGAIN_S
    assert ledger.oldest_s == 1000
    ledger.used([a])
    assert ledger.oldest_s == 1000 + USED_AGAIN_S, "that is the other's"
    ledger.removed(b)
    assert ledger.oldest_s == 1000 + 2 * USED_AGAIN_S
    assert read_ledger(tmp_path).oldest_s == 0


# -- bits --------------------------------------------------------------------------------------------------------------


def test_a_bit_is_found_by_a_key_and_by_the_name_of_an_object_and_is_taken_once() -> None:
    keys, uses = chain(5), Uses()
    name = name_of(PLACE, keys)
    place = place_of_digest(key_digest(PLACE, keys[0]))
    assert place_in(name) == place < PLACES
    assert place_in("another's") == 0
    assert len({place_of_digest(key_digest(PLACE, key_of(number))) for number in range(1000)}) > 990
    assert not uses.take(name, 1)
    assert uses.turn == 0
    for by_name in (True, False):
        if by_name:
            uses.used(name)
        else:
            uses.use(np.array([place], dtype=np.uint32))
        turn = uses.turn
        assert uses.take(name, 1)
        assert uses.turn == turn + 1
        assert not uses.take(name, 1)


def test_a_turn_is_a_sixteenth_of_all_objects() -> None:
    uses = Uses()
    for count, taken in ((1, 1), (16, 1), (47, 2), (160, 10)):
        before = uses.turn
        for _ in range(taken):
            assert uses.turn == before
            uses.used(names(1)[0])
            assert uses.take(names(1)[0], count)
        assert uses.turn == before + 1
        assert uses.step == taken


# -- reads and writes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", ["read", "found when it was to be written", "no"])
@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_read_from_over_there_stays_while_others_leave(
    s3: S3Server, tmp_path: Path, clock: list[int], *, used: str, restarted: bool
) -> None:
    room = 3 * OBJECT_BYTES
    with kit(s3, tmp_path, quota_bytes=room) as one:
        for name in "abc":
            assert one.keep(chain(2, name)).stored == 2
        clock[0] += USED_AGAIN_S
        if used == "read":
            one.assert_blocks(one.seek(chain(2, "a")), chain(2, "a"))
        elif used != "no":
            puts = s3.count("PUT")
            assert one.keep(chain(2, "a")).stored == 2
            assert s3.count("PUT") == puts
        if not restarted:
            one.keep(chain(2, "d"))
    if restarted:
        with kit(s3, tmp_path, quota_bytes=room) as one:
            one.keep(chain(2, "d"))
    gone = "b" if used != "no" else "a"
    assert set(s3.objects) == {f"k/{name_of(PLACE, chain(2, name))}" for name in set("abcd") - {gone}}


def test_an_object_that_is_written_anew_is_as_new_as_that(s3: S3Server) -> None:
    with kit(s3, quota_bytes=4 * OBJECT_BYTES) as one:
        for name in "abc":
            one.keep(chain(2, name))
        lost = name_of(PLACE, chain(2, "a"))
        del s3.objects[f"k/{lost}"]  # a rule of the bucket took it
        one.jobs.holdings.absent(lost)
        for name in "ade":
            one.keep(chain(2, name))
        assert set(s3.objects) == {f"k/{name_of(PLACE, chain(2, name))}" for name in "acde"}


def test_of_too_many_that_were_used_one_goes_all_the_same(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_keeping, "CHANCES", 2)
    with kit(s3, quota_bytes=3 * OBJECT_BYTES) as one:
        for name in "abc":
            one.keep(chain(2, name))
            one.jobs.holdings.uses.used(name_of(PLACE, chain(2, name)))
        one.keep(chain(2, "d"))
        assert set(s3.objects) == {f"k/{name_of(PLACE, chain(2, name))}" for name in "abd"}


# -- leases ------------------------------------------------------------------------------------------------------------


def store(one: Host, ns: Namespace, keys: Sequence[bytes], parent: bytes | None = None) -> None:
    """Store it and use it once, so that it is written."""
    assert one.client.put(ns, keys, parent=parent) == [Grant.GRANTED] * len(keys)
    use(one, ns, keys)


def use(one: Host, ns: Namespace, keys: Sequence[bytes]) -> None:
    assert one.client.fetch(ns, keys) == len(keys)
    one.work()


def there(s3: S3Server, ns: Namespace, keys: Sequence[bytes]) -> bool:
    return f"k/{name_of(place_of(ns), keys)}" in s3.objects


@pytest.mark.parametrize("used", ["all of it", "its first block", "its end", "no"])
def test_what_is_leased_stays_and_what_was_written_later_goes(s3: S3Server, used: str) -> None:
    with host(s3, quota_bytes=3 * SMALL_BYTES) as one:
        ns, hot = one.client.open(), chain(3, "hot")
        store(one, ns, hot)
        for number in range(8):
            if used != "no":
                use(one, ns, {"a": hot, "i": hot[:1]}[used[0]] if used != "its end" else hot[2:])
            store(one, ns, chain(3, number))
        assert there(s3, ns, hot) == (used != "no")
        assert len(s3.objects) == 3
        assert there(s3, ns, chain(3, 7))
        one.core.audit()


def test_what_is_leased_with_something_new_behind_it_stays(s3: S3Server) -> None:
    with host(s3, quota_bytes=3 * SMALL_BYTES) as one:
        ns, hot = one.client.open(), chain(3, "hot")
        store(one, ns, hot)
        for number in range(8):
            tail = [key_of(f"{number} {at}") for at in range(3)]
            assert one.client.put(ns, tail, parent=hot[-1]) == [Grant.GRANTED] * 3
            use(one, ns, [*hot, *tail])
            assert there(s3, ns, tail)
        assert there(s3, ns, hot)
        assert len(s3.objects) == 3


def test_many_that_are_used_now_and_then_stay_while_many_others_come_and_go(s3: S3Server) -> None:
    with host(s3, quota_bytes=32 * SMALL_BYTES, arenas=16) as one:
        ns = one.client.open()
        for number in range(20):
            store(one, ns, chain(3, f"hot {number}"))
        for number in range(80):
            use(one, ns, chain(3, f"hot {number % 20}"))
            use(one, ns, chain(3, f"hot {(number + 10) % 20}"))
            store(one, ns, chain(3, number))
        assert all(there(s3, ns, chain(3, f"hot {number}")) for number in range(20))
        assert len(s3.objects) == 32
        assert one.uses.step == 2
        one.core.audit()


def test_a_use_is_told_once_a_turn(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[int]()
    monkeypatch.setattr(Uses, "use", lambda _, places: told.extend({places.size} - {0}))
    with host(s3) as one:
        ns, keys = one.client.open(), chain(3)
        store(one, ns, keys)
        for _ in range(10):
            use(one, ns, keys)
        assert told == [3]
        one.uses.turn += 1
        use(one, ns, keys)
        one.core.store.remote.gone([name_of(place_of(ns), chain(3, "other"))])
        use(one, ns, keys)
        one.core.pass_time(1 << TURN_BITS)
        use(one, ns, keys)
        use(one, ns, keys)
        assert told == [3] * 4


def test_what_made_room_comes_back_when_it_is_used_and_nothing_in_use_leaves_for_it(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host(s3, quota_bytes=2 * SMALL_BYTES) as one:
        ns, hot = one.client.open(), chain(3, "hot")
        store(one, ns, hot)
        for number in range(2):
            store(one, ns, chain(3, number))
        assert not there(s3, ns, hot)
        puts = s3.count("PUT")
        for _ in range(5):
            use(one, ns, hot)
            one.core.pass_time(1 << TURN_BITS)
        assert s3.count("PUT") == puts, "what lies there was written not long ago"
        monkeypatch.setattr(remote_keeping, "IN_USE_S", 0)
        use(one, ns, chain(3, 0))
        one.core.pass_time(1 << TURN_BITS)
        use(one, ns, hot)
        assert s3.count("PUT") == puts + 1
        assert there(s3, ns, hot)
        assert there(s3, ns, chain(3, 0)), "that was used"
        one.core.audit()


def test_of_more_than_the_quota_that_is_in_use_all_the_time_nothing_is_written_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for in_use_s in (1800, 0):
        s3.objects.clear()
        monkeypatch.setattr(remote_keeping, "IN_USE_S", in_use_s)
        with host(s3, quota_bytes=3 * SMALL_BYTES) as one:
            ns = one.client.open()
            for number in range(5):
                store(one, ns, chain(3, number))
            puts, before = s3.count("PUT"), set(s3.objects)
            for _ in range(6):
                one.core.pass_time(1 << TURN_BITS)
                for number in range(5):
                    use(one, ns, chain(3, number))
            assert (s3.count("PUT") > puts) == (not in_use_s), "the control writes"
            assert not in_use_s or set(s3.objects) == before, "some of it stays for good"


def test_what_goes_on_behind_what_has_gone_is_written_where_that_does_not_come_back(s3: S3Server) -> None:
    for quota_bytes, back in ((2 * SMALL_BYTES, False), (9 * SMALL_BYTES, True)):
        s3.objects.clear()
        with host(s3, quota_bytes=quota_bytes) as one:
            ns, keys = one.client.open(), chain(6)
            store(one, ns, keys[:3])
            for number in range(2):
                store(one, ns, chain(3, number))
            if back:
                one.kit.jobs.holdings.remove([name_of(place_of(ns), keys[:3])])
            assert not there(s3, ns, keys[:3])
            assert one.client.put(ns, keys[3:], parent=keys[2]) == [Grant.GRANTED] * 3
            use(one, ns, keys)
            use(one, ns, keys)
            assert there(s3, ns, keys[3:])
            assert there(s3, ns, keys[:3]) == back
            one.core.audit()


def test_a_write_that_finds_out_late_that_all_is_in_use_leaves_it_and_is_tried_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with host(s3, quota_bytes=2 * SMALL_BYTES) as one:
        ns, hot = one.client.open(), chain(3, "hot")
        store(one, ns, hot)
        for number in range(2):
            store(one, ns, chain(3, number))
        puts = s3.count("PUT")
        monkeypatch.setattr(Host, "room_again", lambda *_: True)
        for _ in range(3):
            one.core.pass_time(1 << TURN_BITS)
            use(one, ns, hot)
        assert s3.count("PUT") == puts
        assert not there(s3, ns, hot)
        monkeypatch.setattr(remote_keeping, "IN_USE_S", 0)
        one.core.pass_time(1 << TURN_BITS)
        use(one, ns, hot)
        assert there(s3, ns, hot)
        one.core.audit()
