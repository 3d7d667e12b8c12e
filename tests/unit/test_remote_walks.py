"""What a miss may cost beyond this host, and objects that are written anew while they are read."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from kvstore.tier.remote_format import NO_PARENT, key_digest, name_of, runs_prefix
from kvstore.tier.remote_index import WALK, Known, Stretch, follow
from kvstored import remote_ranges
from kvstored.remote_port import Bytes
from tests.core import chain
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, PLACE, kit


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def followed(
    known: Known, names: Sequence[str], keys: Sequence[bytes], start: int, ahead: int = 1
) -> tuple[list[Stretch], int]:
    """Where block `start` lies, and how many lookups that took."""
    digests = [key_digest(PLACE, key) for key in keys]
    lookups, asked = follow(known, PLACE, digests, start, 0, most=ahead, ahead=ahead), 0
    while True:
        try:
            prefixes = next(lookups)
        except StopIteration as stop:
            return stop.value, asked
        asked += 1
        for prefix in prefixes:
            known.learn(prefix, [(name, 0) for name in names if name.startswith(prefix)], 0)


def test_a_miss_costs_a_bounded_number_of_lookups_and_the_next_one_goes_on_from_there() -> None:
    ones = WALK + 8
    keys = chain(ones + 4)
    names = [name_of(PLACE, [key]) for key in keys[:ones]] + [name_of(PLACE, keys[ones:])]
    known = Known()
    assert followed(known, names, keys, ones + 2) == ([], 1 + WALK)
    found, asked = followed(known, names, keys, ones + 2)
    assert asked == 9
    assert [(one.at, one.skip, one.count) for one in found] == [(ones + 2, 2, 2)]
    assert followed(known, names, keys, ones + 2) == (found, 0)
    few = [*names[ones - 2 : ones], names[-1]]  # the control: a chain of few objects
    found, asked = followed(Known(), few, keys[ones - 2 :], 4)
    assert (asked, found[0].skip) == (4, 2)


def test_where_objects_hold_one_block_none_is_looked_for_that_covers_two() -> None:
    keys = chain(100)
    names = [name_of(PLACE, [key]) for key in keys[:99]]
    assert followed(Known(), names, keys, 99, ahead=64) == ([], 1)
    assert len(followed(Known(), names, keys, 90, ahead=64)[0]) == 9, "the control"


def test_a_miss_behind_many_objects_asks_a_server_a_bounded_number_of_times(s3: S3Server) -> None:
    keys = chain(61)
    with kit(s3) as one:
        for number in range(60):
            one.keep(keys[number : number + 1], parent=keys[number - 1] if number else NO_PARENT)
    with kit(s3) as one:
        s3.requests.clear()
        assert not one.seek(keys, start=60)
        assert len(s3.requests) == 1 + WALK
        assert runs_prefix(PLACE, key_digest(PLACE, keys[60])).rstrip("/") in s3.requests[0][1]


@pytest.mark.parametrize("harm", ["none", "written anew", "flipped"])
def test_an_object_that_is_written_anew_between_two_requests_is_sound(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(remote_ranges, "PIECE_BYTES", 2 * BLOCK_BYTES)
    keys = chain(6)
    with kit(s3) as one:
        one.keep(keys, version=1)
        ((name, other),) = s3.objects.items()
        s3.objects.clear()
        one.jobs.holdings.known.forget_all("")
        one.keep(keys)
    with kit(s3) as one:
        ask, first_came = one.far.get_range, threading.Event()

        def get_range(path: str, start: int, stop: int) -> Bytes:
            if start:
                assert first_came.wait(20)
                return ask(path, start, stop)
            content = ask(path, start, stop)
            if harm == "written anew" and not first_came.is_set():
                s3.objects[name] = other
            elif harm == "flipped":
                s3.flip(name, len(other) - 1)
            first_came.set()
            return content

        monkeypatch.setattr(one.far, "get_range", get_range)
        got = one.seek(keys)
        one.assert_blocks(got[:2], keys[:2])
        assert len(got) == (4 if harm == "flipped" else 6)
        assert (one.jobs.holdings.seen.damaged, one.jobs.holdings.known.was_bad(name[2:])) == (harm == "flipped",) * 2
        if harm == "written anew":
            s3.objects.clear()
            one.jobs.holdings.known.forget_all("")
            one.keep(keys, version=1)
            assert [block.tobytes() for block in got[2:]] == [block.tobytes() for block in one.seek(keys)[2:]]
