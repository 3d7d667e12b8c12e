"""What DELETE dropped does not come back from over there behind what was stored anew, wherever a request begins."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.sessions import Namespace
from kvstore.tier import remote
from kvstore.tier.remote_orders import Seek
from kvstore.tier.remote_writing import place_of
from tests.core import chain
from tests.s3 import S3Server
from tests.unit.remote_host import Host, host

KEYS = chain(6)


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


def written_in_three(one: Host) -> Namespace:
    """Objects of two blocks each, all of version 0."""
    ns = one.client.open()
    for at in range(0, 6, 2):
        one.put(ns, KEYS[at : at + 2], 0, KEYS[at - 1] if at else None)
        one.client.fetch(ns, KEYS[: at + 2])
        one.work()
    assert len(one.kit.s3.objects) == 3
    return ns


@pytest.mark.parametrize("deleted", [0, 1])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_request_that_begins_mid_chain_does_not_bring_back_what_continued_a_deleted_block(
    s3: S3Server, deleted: int, at: int
) -> None:
    with host(s3) as one:
        ns = written_in_three(one)
        one.delete(ns, KEYS[deleted])
        assert s3.objects, "what continues it has stayed over there"
        one.put(ns, KEYS[deleted:at], 1, KEYS[deleted - 1] if deleted else None)
        for begin in (at, *range(at), at):
            assert one.ask(ns, KEYS[begin:]) == max(0, at - begin), f"from block {begin} on"
        assert one.core.store.remote.tally.promoted == 0
        one.core.audit()


def test_what_is_under_nothing_deleted_comes_back_though_other_chains_were_deleted(s3: S3Server) -> None:
    with host(s3) as one:
        ns = written_in_three(one)
        one.put(ns, chain(1, "other"), 0)
        one.delete(ns, chain(1, "other")[0])
    for begin, here in ((0, 0), (0, 1), (2, 2), (2, 3), (2, 4), (4, 4)):  # the control, wherever a request begins
        with host(s3) as one:
            ns = one.client.open()
            one.put(ns, chain(1, "other"), 0)
            one.delete(ns, chain(1, "other")[0])
            if here:
                one.put(ns, KEYS[:here], 0)
            assert one.ask(ns, KEYS[begin:]) == 6 - begin
            assert one.core.store.remote.tally.promoted == 6 - here
            assert [one.read(ns, key) for key in KEYS] == [0] * 6
            one.core.audit()


def test_a_later_life_remembers_what_continued_a_deleted_block(s3: S3Server, tmp_path: Path) -> None:
    with host(s3, folder=tmp_path) as one:
        ns = written_in_three(one)
        one.delete(ns, KEYS[1])
    for folder, comes in ((tmp_path, 0), (None, 2)):
        with host(s3, folder=folder) as one:
            ns = one.client.open()
            one.put(ns, KEYS[:4], 1)
            assert one.ask(ns, KEYS[4:]) == comes, "whoever has no ledger knows nothing of it"


def test_a_chain_that_is_too_long_to_be_looked_through_is_a_miss_where_something_was_deleted(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most, comes in ((4, 2), (3, 0)):
        monkeypatch.setattr(remote, "LINEAGE", most)
        with host(s3) as one:
            if not s3.objects:
                written_in_three(one)
        with host(s3) as one:
            ns = one.client.open()
            one.put(ns, KEYS[:4], 0)
            one.delete(ns, chain(1, "other")[0])
            assert one.ask(ns, KEYS[4:]) == comes
            assert not one.core.store.remote.seeking


def test_a_chain_that_is_asked_for_again_is_not_wanted_after_a_delete_meanwhile(s3: S3Server) -> None:
    with host(s3) as one:
        ns = written_in_three(one)
        one.delete(ns, chain(1, "other")[0])
        one.client.delete(ns, KEYS[4:5])
        one.core.settle()
        one.work()
    with host(s3) as one:
        ns = one.client.open()
        one.put(ns, KEYS[:4], 0)
        one.delete(ns, chain(1, "other")[0])
        one.core.store.remote._asked.clear()
        one.client.match(ns, KEYS[3:])
        one.core.store.tick()
        (first,) = one.orders
        assert isinstance(first, Seek)
        one.orders.clear()
        one.carry_out(first)
        (again,) = one.orders
        assert isinstance(again, Seek)
        assert again.before is not None
        assert list(again.before) == KEYS[3::-1]
        one.client.delete(ns, KEYS[:1])
        assert again.over
        one.work()
        assert one.client.match(ns, KEYS) == 0


def test_an_object_that_names_another_parent_than_its_seek_was_allowed_for_is_not_stored(s3: S3Server) -> None:
    with host(s3) as one:
        ns = written_in_three(one)
    for before, comes in (((KEYS[3], *KEYS[2::-1]), 2), ((KEYS[2],), 0), ((), 0)):
        with host(s3) as one:
            ns = one.client.open()
            one.put(ns, KEYS[:4], 0)
            seek = Seek(ns, place_of(ns), tuple(KEYS[4:]), 0, ns.identity.block_bytes, 0, before=before)
            one.core.store.remote._ask(seek)
            order = one.orders.pop()
            one.kit.jobs.seek(seek, one.core.store.remote.land)
            assert seek.continues == (KEYS[3] if before == () else b"")
            seek.continues = b""
            one.core.store.remote.sought(seek)
            one.work()
            assert order is seek
            assert one.client.match(ns, KEYS) == 4 + comes
