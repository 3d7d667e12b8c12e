"""What is taken for being over there, and is believed no more when its object goes."""

from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest

from kvproto.errors import Grant
from kvstore import handing_over
from kvstore.sessions import Namespace
from kvstore.tier.remote_format import HEADER_BYTES, mark_numbers, marks_of, name_of
from kvstore.tier.remote_writing import place_of
from kvstored.leaf import LeafThreads
from kvstored.remote import RemoteLimits, RemoteThreads
from kvstored.remote_address import RemoteAddress
from kvstored.remote_s3 import S3Backend
from tests.core import SECOND, chain, words
from tests.node import PATIENCE_S
from tests.s3 import S3Server
from tests.unit.remote_host import Host, host
from tests.unit.remote_kit import PLACE


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def told_there(one: Host, ns: Namespace, keys: list[bytes]) -> int:
    """How many of a chain's first blocks are over there, as `kvctl move` is told; the rest is to be written."""
    return handing_over.hand_over(one.core.store, ns, words(keys), 0, len(keys), SECOND)[1]


def written(one: Host, ns: Namespace, keys: list[bytes]) -> None:
    """Hand a chain over, to the end."""
    for _ in range(3):
        told_there(one, ns, keys)
        one.core.pass_time(SECOND)
        one.work()


def test_what_the_quota_has_removed_is_not_there_any_more_and_is_written_again_for_who_asks(s3: S3Server) -> None:
    first, second = chain(3, "a"), chain(3, "b")
    for quota_bytes, left in ((HEADER_BYTES + 5 * 96, 0), (1 << 20, 3)):
        s3.objects.clear()
        with host(s3, quota_bytes=quota_bytes) as one:
            ns = one.client.open()
            for keys in (first, second):
                assert one.client.put(ns, keys) == [Grant.GRANTED] * 3
                written(one, ns, keys)
            assert len(s3.objects) == 1 + bool(left)
            assert told_there(one, ns, second) == 3
            assert told_there(one, ns, first) == left
            one.core.pass_time(SECOND)
            one.work()
            assert told_there(one, ns, first) == 3
            assert told_there(one, ns, second) == left
            one.core.audit()


def test_what_the_quota_has_removed_is_not_written_again_because_it_is_used(s3: S3Server) -> None:
    with host(s3, quota_bytes=HEADER_BYTES + 5 * 96) as one:
        ns = one.client.open()
        for name in "ab":
            one.client.put(ns, chain(3, name))
            written(one, ns, chain(3, name))
        puts = s3.count("PUT")
        for name in "ababab":
            assert one.client.fetch(ns, chain(3, name)) == 3
            one.work()
        assert s3.count("PUT") == puts


def test_what_came_from_an_object_that_was_found_gone_or_damaged_is_not_there(s3: S3Server) -> None:
    keys = chain(3)
    for harm in ("none", "while it came", "later"):
        s3.objects.clear()
        with host(s3) as one:
            ns = one.client.open()
            one.client.put(ns, keys)
            written(one, ns, keys)
        with host(s3) as one:
            ns = one.client.open()
            gone = one.core.store.remote.gone
            name = name_of(place_of(ns), keys)
            one.client.match(ns, keys)
            if harm == "while it came":
                gone([name])
            one.work()
            if harm == "later":
                gone([name])
            assert one.client.match(ns, keys) == 3
            assert told_there(one, ns, keys) == (3 if harm == "none" else 0), harm
            one.core.pass_time(SECOND)
            one.work()
            assert told_there(one, ns, keys) == 3, "it was looked for, and found"
            assert len(s3.objects) == 1


def test_the_threads_of_a_daemon_say_what_is_gone_without_being_asked_to(s3: S3Server) -> None:
    keys = chain(3)
    with host(s3) as one:
        ns = one.client.open()
        one.client.put(ns, keys)
        written(one, ns, keys)
        threads = RemoteThreads(
            S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ),
            RemoteLimits(1 << 30, 2),
            lambda _arena: np.zeros(0, dtype=np.uint8), cast(LeafThreads, None), lambda: None,
        )  # fmt: skip
        threads.jobs.holdings.remove([name_of(place_of(ns), chain(3, "other"))])
        threads.finish(one.core.store)
        assert told_there(one, ns, keys) == 3, "the control"
        threads.jobs.holdings.remove([name_of(place_of(ns), keys)])
        assert told_there(one, ns, keys) == 3, "the owner has not heard of it yet"
        threads.finish(one.core.store)
        assert told_there(one, ns, keys) == 0


def test_marks_are_numbers_of_their_own_and_other_names_have_none() -> None:
    keys = chain(64)
    numbers = mark_numbers(marks_of(name_of(PLACE, keys)))
    assert len(set(numbers)) == 64
    assert numbers[5:] == mark_numbers(marks_of(name_of(PLACE, keys[5:])))
    assert mark_numbers(["AAA", "AAB", "___"]) == [0, 1, (1 << 18) - 1]
    for strange in ("", "x", "a/b/c", name_of(PLACE, keys) + "x", name_of(PLACE, keys).replace("/64.", "g/64.")):
        assert marks_of(strange) == ()
