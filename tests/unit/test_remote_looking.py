"""What is damaged or gone over there is said before anybody relies on it, left alone for a while, and written anew."""

from collections.abc import Callable, Iterator

import pytest

from kvstore import handing_over
from kvstore.handing_over import HandOverReport
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import HEADER_BYTES, fits, name_of
from kvstore.tier.remote_index import BAD, BAD_MOST_NS, BAD_NS, STRANGE_NS, Known
from kvstore.tier.remote_looking import LOOKS
from kvstore.tier.remote_writing import place_of
from kvstored.remote_calls import STRANGE
from tests.core import SECOND, chain, words
from tests.s3 import S3Server
from tests.unit import remote_kit
from tests.unit.remote_host import Host, host
from tests.unit.remote_kit import PLACE, kit

PAGE = b"<html>down for maintenance</html>"


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def asked(one: Host, ns: Namespace, keys: list[bytes], *, dry_run: bool = True, ago_s: int = 1) -> HandOverReport:
    return handing_over.report(one.core.store, ns, words(keys), SECOND, ago_s * SECOND, dry_run=dry_run)


def written(one: Host, ns: Namespace, keys: list[bytes]) -> None:
    """Hand a chain over, to the end."""
    for _ in range(3):
        asked(one, ns, keys, dry_run=False)
        one.core.pass_time(SECOND)
        one.work()


def cut(s3: S3Server, name: str) -> None:
    s3.objects[name] = s3.objects[name][:-1]


def flip(s3: S3Server, name: str) -> None:
    s3.flip(name, len(s3.objects[name]) - 7)


HARMS: dict[str, Callable[[S3Server, str], object]] = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda s3, name: s3.objects.__setitem__(name, b""),
    "another": lambda s3, name: s3.objects.__setitem__(name, bytes(len(s3.objects[name]))),
    "gone": lambda s3, name: s3.objects.pop(name),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_there_whole_is_found_out_and_written_anew(s3: S3Server, harm: str) -> None:
    keys = chain(100)
    with host(s3) as one:
        ns = one.client.open()
        for at in range(0, 100, 64):
            one.client.put(ns, keys[at : at + 64], parent=keys[at - 1] if at else None)
        written(one, ns, keys)
        assert (len(s3.objects), asked(one, ns, keys).there) == (2, 100)
        one.work()
        assert asked(one, ns, keys).looked == 100, "the control"
        one.core.pass_time(2 * SECOND)
        (name,) = [name for name in s3.objects if name == f"k/{name_of(place_of(ns), keys[64:])}"]
        HARMS[harm](s3, name)
        assert asked(one, ns, keys).looked == 0, "that was too long ago"
        one.work()
        report = asked(one, ns, keys)
        assert (report.there, report.looked) == (64, 64)
        written(one, ns, keys)
        one.work()
        assert asked(one, ns, keys).looked in {64, 100}, "what lay there too early is read again"
        one.work()
        assert (asked(one, ns, keys).there, asked(one, ns, keys).looked) == (100, 100)
        one.core.audit()
    with host(s3) as other:
        ns = other.client.open()
        assert other.ask(ns, keys) == 100
        assert {other.read(ns, key) for key in keys} == {0}


def test_a_far_side_that_does_not_answer_says_nothing_of_what_is_there(s3: S3Server) -> None:
    keys = chain(5)
    with host(s3) as one:
        ns = one.client.open()
        one.client.put(ns, keys)
        written(one, ns, keys)
        s3.broken = True
        asked(one, ns, keys)
        one.work()
        report = asked(one, ns, keys)
        assert (report.there, report.looked) == (5, 0), "it may all be there"
        assert "500" in report.why
        s3.broken = False
        one.kit.far.reading.good()
        one.work()
        asked(one, ns, keys)
        one.work()
        assert asked(one, ns, keys).looked == 5


def test_looks_are_bounded_and_one_reads_nothing_twice(s3: S3Server) -> None:
    with host(s3) as one:
        ns = one.client.open()
        for number in range(LOOKS + 2):
            one.client.put(ns, chain(3, str(number)))
            written(one, ns, chain(3, str(number)))
        one.core.pass_time(5 * SECOND)
        for number in [0, 0, *range(LOOKS + 2)]:
            assert asked(one, ns, chain(3, str(number))).looked == 0
        assert len(one.looks) == one.core.store.remote.looking.running == LOOKS
        one.work()
        assert [asked(one, ns, chain(3, str(number))).looked for number in range(LOOKS + 2)] == [3] * LOOKS + [0, 0]
        one.work()
        assert asked(one, ns, chain(3, str(LOOKS))).looked == 3


def test_a_part_of_a_chain_that_begins_within_an_object_is_found(s3: S3Server) -> None:
    keys = chain(40)
    with host(s3) as one:
        ns = one.client.open()
        one.client.put(ns, keys)
        written(one, ns, keys)
        asked(one, ns, keys[30:])
        one.work()
        assert asked(one, ns, keys[30:]).looked == 10
        one.core.pass_time(5 * SECOND)
        s3.flip(next(iter(s3.objects)), 100)  # in the header, which this host remembers, and others do not
        asked(one, ns, keys[30:])
        one.work()
        assert asked(one, ns, keys[30:]).looked == 0


def test_whoever_answers_with_a_page_for_a_moment_is_asked_again_soon(s3: S3Server) -> None:
    keys = chain(60)
    with kit(s3) as one:
        one.keep(keys)
    with kit(s3) as one:
        s3.lies = lambda _name, _content: PAGE
        assert one.seek(keys) == []
        seen, known = one.jobs.holdings.seen, one.jobs.holdings.known
        assert (seen.damaged, one.far.tally.unreachable) == (0, 1), "it is the far side that fails"
        assert one.far.reading.reason == STRANGE
        s3.lies = None
        gets = s3.count("GET")
        assert one.seek(keys) == []
        assert s3.count("GET") == gets, "for a moment"
        later(known, STRANGE_NS)
        one.assert_blocks(one.seek(keys), keys)
        assert known.bad == 0
        assert one.far.reading.reason == ""


def later(known: Known, ns: int) -> None:
    """So much time has passed for what is in quarantine, and all that is known is old."""
    known._bad.update({name: (until_ns - ns, wait_ns) for name, (until_ns, wait_ns) in known._bad.items()})
    known.forget_all("")


def test_a_damaged_object_is_read_again_after_a_while_and_is_sound_when_it_is(s3: S3Server) -> None:
    keys = chain(5)
    with kit(s3) as one:
        one.keep(keys)
        (name,) = s3.objects
        known, seen = one.jobs.holdings.known, one.jobs.holdings.seen
        s3.flip(name, 5000)
        for turn in range(3):
            assert one.seek(keys) == []
            assert seen.damaged == turn + 1
            later(known, (BAD_NS << turn) - SECOND)
            assert one.seek(keys) == []
            assert seen.damaged == turn + 1, "left alone, twice as long each time"
            later(known, SECOND)
        s3.flip(name, 5000)
        later(known, BAD_MOST_NS)
        one.assert_blocks(one.seek(keys), keys)
        assert known.bad == 0


def test_quarantine_doubles_up_to_an_hour_is_bounded_and_ends_with_the_object() -> None:
    known, now_ns, waits = Known(), 0, []
    for _ in range(9):
        known.quarantine("a/1.", now_ns)
        known.quarantine("a/1.", now_ns + 1)  # by another reader, of the same request
        waits.append(
            next(wait for wait in range(0, 2 * BAD_MOST_NS, BAD_NS) if not known.is_bad("a/1.", now_ns + wait))
        )
        now_ns += waits[-1]
    assert waits == [min(BAD_NS << number, BAD_MOST_NS) for number in range(9)]
    assert known.was_bad("a/1.")
    known.sound("a/1.")
    assert not known.was_bad("a/1.")
    known.quarantine("a/1.", now_ns)
    assert not known.is_bad("a/1.", now_ns + BAD_NS), "from the beginning"
    for number in range(2 * BAD):
        known.quarantine(f"{number}/1.", now_ns)
    assert known.bad == BAD


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "another"])
def test_what_is_damaged_is_written_over_by_who_has_it(s3: S3Server, harm: str) -> None:
    keys = chain(6)
    with kit(s3) as one:
        one.keep(keys)
        (name,) = s3.objects
        whole = s3.objects[name]
    HARMS[harm](s3, name)
    with kit(s3) as one:
        if harm in {"flipped", "another"}:
            assert one.keep(keys).stored == 6, "its name and its length are as they should be"
            assert s3.objects[name] != whole
            assert one.seek(keys) == []
        assert one.keep(keys).stored == 6
        assert s3.objects == {name: whole}
        assert one.jobs.holdings.known.bad == 0
        one.assert_blocks(one.seek(keys), keys)
        assert name[2:] in one.jobs.holdings.ledger, "it is this host's now"


def test_a_name_tells_how_long_an_object_is() -> None:
    raw, encoded = name_of(PLACE, chain(5)), name_of(PLACE, chain(5), encoded=True)
    whole = HEADER_BYTES + 5 * remote_kit.BLOCK_BYTES
    sizes = [0, HEADER_BYTES + 4, HEADER_BYTES + 5, whole - 1, whole, whole + 1]
    assert [fits(raw, size, remote_kit.BLOCK_BYTES) for size in sizes] == [False] * 4 + [True, False]
    assert [fits(encoded, size, remote_kit.BLOCK_BYTES) for size in sizes] == [False, False, True, True, True, False]


def test_what_was_deleted_is_said_not_to_come_and_what_is_before_it_does(s3: S3Server) -> None:
    keys = chain(8)
    with host(s3) as one:
        ns = one.client.open()
        one.client.put(ns, keys)
        one.delete(ns, keys[5])
        one.client.put(ns, keys[5:], parent=keys[4])
        assert asked(one, ns, keys, dry_run=False).coming == 8, "nobody has tried yet"
        for _ in range(3):
            one.core.pass_time(SECOND)
            one.work()
            asked(one, ns, keys, dry_run=False)
        one.work()
        report = asked(one, ns, keys, dry_run=False)
        assert (report.there, report.looked, report.coming) == (5, 5, 0)
        assert "deleted" in report.why
        assert len(s3.objects) == 1
        one.core.audit()
