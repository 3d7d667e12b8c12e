"""What threads of the remote tier bring and write, over a real socket: found and verified, or a miss."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from kvproto.limits import GIB
from kvstore.cost import Bandwidth
from kvstore.ports import Bytes
from kvstore.report import RemoteReport
from kvstore.store import Store
from kvstore.tier.remote_breaker import FAILURES, Circuit
from kvstore.tier.remote_format import HEADER_BYTES, Place, key_digest, name_of, tenant_digest
from kvstore.tier.remote_index import Known
from kvstore.tier.remote_orders import Forget, Keep, Piece, Seek
from kvstored import remote
from kvstored.admin_remote import FAILING, GOES_ON, STOPPED, TRIES, remote_warnings, standing
from kvstored.leaf import LeafThreads
from kvstored.metrics_table import METRICS, Facts
from kvstored.remote import RemoteLimits, RemoteThreads
from kvstored.remote_address import RemoteAddress
from kvstored.remote_holdings import Seen
from kvstored.remote_ledger import DELETED, SLACK, Ledger
from kvstored.remote_port import Listed, RefusedError, RemoteError, TooLargeError
from kvstored.remote_removals import DIGESTS, EPOCHS, Removal, Removals
from kvstored.remote_s3 import S3Backend
from tests.core import chain, key_of, value_of
from tests.node import PATIENCE_S, until
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, NOBODY, PLACE, Kit, kit, read_ledger

FLIPS = 300
FLIPS_LONG = 10_000


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def one(s3: S3Server) -> Iterator[Kit]:
    with kit(s3) as jobs:
        yield jobs


def test_a_chain_comes_back_whole_in_few_objects_and_on_another_host(one: Kit, s3: S3Server) -> None:
    keys = chain(150)
    for start in range(0, 150, 64):
        keep = one.keep(keys[start : start + 64], parent=keys[start - 1] if start else bytes(32))
        assert keep.stored == len(keep.keys)
    assert len(s3.objects) == 3
    with kit(s3) as other:
        other.assert_blocks(other.seek(keys), keys)
        other.assert_blocks(other.seek(keys, 100), keys[100:])
        assert other.seek(chain(5, "b")) == []


def test_chains_that_part_share_what_comes_before(one: Kit, s3: S3Server) -> None:
    """The second host writes its own end only, and both ends are found; so is the part of a run before they part."""
    left, right = chain(20), chain(12) + chain(8, "right")
    one.keep(left)
    with kit(s3) as other:
        assert other.keep(right).stored == 20
        assert other.jobs.holdings.seen.skipped == 12
    assert len(s3.objects) == 2
    with kit(s3) as third:
        third.assert_blocks(third.seek(right), right)
        third.assert_blocks(third.seek(left, 15), left[15:])
        third.assert_blocks(third.seek(chain(12) + chain(3, "neither")), chain(12))


def test_what_is_there_is_not_written_again(one: Kit, s3: S3Server) -> None:
    one.keep(chain(8))
    puts = s3.count("PUT")
    with kit(s3) as other:
        assert other.keep(chain(8), version=1).stored == 8
        assert s3.count("PUT") == puts
        other.assert_blocks(other.seek(chain(8)), chain(8))


def flips(jobs: Kit, s3: S3Server, trials: int, seed: int) -> None:
    """One bit of an object flipped, again and again: nothing of it comes, it is counted, and left alone."""
    keys = chain(6)
    jobs.keep(keys)
    name = next(iter(s3.objects))
    whole = s3.objects[name]
    assert len(whole) == HEADER_BYTES + 6 * BLOCK_BYTES
    random, strange = Random(seed), 0
    for trial in range(trials):
        at = random.randrange(len(whole))
        content = bytearray(whole)
        content[at] ^= 1 << random.randrange(8)
        s3.objects[name] = bytes(content)
        jobs.jobs.holdings.known = Known()
        jobs.jobs.holdings.forget_header("")
        assert jobs.seek(keys) == [], f"seed {seed}, trial {trial}: byte {at} was flipped"
        assert jobs.jobs.holdings.seen.damaged + jobs.far.tally.unreachable == trial + 1
        assert (jobs.far.tally.unreachable > strange) == (at < 8), "it does not even begin like an object"
        strange = jobs.far.tally.unreachable
        jobs.far.reading.good()
    gets = s3.count("GET")
    assert jobs.seek(keys) == []
    assert s3.count("GET") == gets, "an object in quarantine was read"
    s3.objects[name] = whole
    jobs.jobs.holdings.known = Known()
    jobs.assert_blocks(jobs.seek(keys), keys)


def test_one_flipped_bit_anywhere_is_a_miss(one: Kit, s3: S3Server) -> None:
    flips(one, s3, FLIPS, 8)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_ten_thousand_flipped_bits_give_no_wrong_byte(one: Kit, s3: S3Server) -> None:
    flips(one, s3, FLIPS_LONG, 1)


@pytest.mark.parametrize("lie", ["short", "long", "empty", "zeros", "other", "swapped", "tenant"])
def test_a_far_side_that_lies_gives_misses(one: Kit, s3: S3Server, lie: str) -> None:
    keys, others = chain(6), chain(6, "b")
    one.keep(keys)
    one.keep(others)
    one.keep(keys, Place(tenant_digest("u"), PLACE.namespace), version=1)
    mine, other = (f"k/{name_of(PLACE, run)}" for run in (keys, others))
    foreign = f"k/{name_of(Place(tenant_digest('u'), PLACE.namespace), keys)}"

    def told(name: str, content: bytes) -> bytes:
        if name != mine:
            return content
        return {
            "short": content[:-100], "long": content[HEADER_BYTES:] + content, "empty": b"", "other": s3.objects[other],
            "zeros": bytes(len(content)), "tenant": s3.objects[foreign],
            "swapped": content[:HEADER_BYTES] + content[-BLOCK_BYTES:] + content[HEADER_BYTES:-BLOCK_BYTES],
        }[lie]  # fmt: skip

    s3.lies = told
    with kit(s3) as reader:
        assert reader.seek(keys) == []
        strange = lie in {"long", "zeros"}  # that may be the far side's fault, and not the object's
        assert (reader.jobs.holdings.seen.damaged, reader.far.tally.unreachable) == (not strange, strange)
        reader.assert_blocks(reader.seek(others), others)


def test_a_listing_that_lies_gives_misses(one: Kit, s3: S3Server) -> None:
    """Names that are not ours, of runs that are not there, or of other blocks than lie there."""
    keys = chain(6)
    one.keep(keys)
    (name,) = s3.objects
    folder, _, last = name.rpartition("/")
    s3.objects[f"{folder}/6.{last[2:][::-1]}"] = s3.objects[name]
    for junk in ("0.", "65.", "6.", "-1.aaa", "6.\u00e9", "1.aaa", "x", "007.aaaaaa"):
        s3.objects[f"{folder}/{junk}"] = b"junk"
    with kit(s3) as reader:
        reader.assert_blocks(reader.seek(keys), keys)
    s3.objects[name] = b""
    with kit(s3) as reader:
        reader.assert_blocks(reader.seek(keys), keys[:1])  # of the one whose name goes on with other keys
        assert reader.jobs.holdings.seen.damaged == 1, "its length tells, and nobody reads it"
        assert name[2:] not in [asked.removeprefix("k/") for verb, asked in s3.requests[-3:] if verb == "GET"]


def test_a_tenant_sees_nothing_of_another(one: Kit, s3: S3Server) -> None:
    one.keep(chain(4))
    assert one.seek(chain(4), place=Place(tenant_digest("u"), PLACE.namespace)) == []
    assert one.seek(chain(4), place=Place(PLACE.tenant, key_of("other"))) == []
    assert len(one.seek(chain(4))) == 4
    assert not any(chain(4)[0].hex() in name or "namespace" in name for name in s3.objects)


# -- room, and what was dropped ---------------------------------------------------------------------------------------


def test_the_oldest_objects_go_when_the_quota_is_used_up_and_after_a_restart_too(s3: S3Server, tmp_path: Path) -> None:
    room = 3 * (HEADER_BYTES + 2 * BLOCK_BYTES)
    with kit(s3, tmp_path, quota_bytes=room) as host:
        for name in "abc":
            assert host.keep(chain(2, name)).stored == 2
    with kit(s3, tmp_path, quota_bytes=room) as host:
        assert host.jobs.holdings.ledger.total_bytes == room
        host.keep(chain(2, "d"))
        assert sum(map(len, s3.objects.values())) == host.jobs.holdings.ledger.total_bytes == room
        assert host.seek(chain(2, "a")) == []
        host.assert_blocks(host.seek(chain(2, "b")), chain(2, "b"))


def test_who_may_not_delete_does_not_write_more_than_the_quota(s3: S3Server) -> None:
    room = 2 * (HEADER_BYTES + 2 * BLOCK_BYTES)
    with kit(s3, quota_bytes=room) as host:

        def refuse(names: Sequence[str]) -> None:
            raise RefusedError(f"may not delete {names}")

        host.far._backend.delete = refuse  # type: ignore[method-assign]
        for number in range(5):
            heal(host)
            assert host.keep(chain(2, number)).stored == (2 if number < 2 else 0)
        assert sum(map(len, s3.objects.values())) == room
        heal(host)
        assert host.keep(chain(9, "large")).stored == 0, "more than there ever is room for"
        assert sum(map(len, s3.objects.values())) == room


def test_a_damaged_ledger_is_read_as_far_as_it_goes(s3: S3Server, tmp_path: Path) -> None:
    with kit(s3, tmp_path) as host:
        host.keep(chain(2))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes() + b"\xff\xfe torn\n+ x y\n+ 5")
    with kit(s3, tmp_path) as host:
        assert len(host.jobs.holdings.ledger) == 1
        assert host.jobs.holdings.ledger.faults == 3


def test_what_was_deleted_does_not_come_back_here_nor_after_a_restart(s3: S3Server, tmp_path: Path) -> None:
    keys = chain(10)
    with kit(s3, tmp_path) as host:
        host.keep(keys[:6])
        host.keep(keys[6:], parent=keys[5])
        host.forget([keys[3]])
        assert host.seek(keys) == []
        assert len(s3.objects) == 1, "the object with that block is gone"
        assert host.keep(keys[:6]).stored == 0, "it is not written again"
    with kit(s3, tmp_path) as host:
        assert host.seek(keys, 6) == []
        host.assert_blocks(host.seek(keys[6:]), keys[6:])


def test_clearing_a_namespace_empties_it_over_there_for_everybody(one: Kit, s3: S3Server) -> None:
    other_place = Place(PLACE.tenant, key_of("other"))
    for name in range(5):
        one.keep(chain(3, name))
    with kit(s3) as other:
        other.keep(chain(3, "other host's"))
    one.keep(chain(3), other_place)
    one.forget([])
    assert len(s3.objects) == 1
    assert one.seek(chain(3, 1)) == []
    assert len(one.seek(chain(3), place=other_place)) == 3
    assert one.keep(chain(3, 1)).stored == 3, "what is stored afterwards is kept"


def test_what_is_dropped_while_it_is_written_does_not_stay(one: Kit, s3: S3Server) -> None:
    far_put = one.far.put

    def put(name: str, parts: object) -> bool:
        done = far_put(name, parts)  # type: ignore[arg-type]
        one.forget([])
        return done

    one.far.put = put  # type: ignore[method-assign]
    assert one.keep(chain(3)).stored == 0
    assert not s3.objects


# -- a far side that fails --------------------------------------------------------------------------------------------


def heal(one: Kit) -> None:
    """As if the time of all breakers were over."""
    one.far.reading.until_ns = one.far.writing.until_ns = one.far.deleting.until_ns = 0


def test_a_far_side_that_is_down_is_left_alone_and_asked_again_later(one: Kit, s3: S3Server) -> None:
    one.keep(chain(4))
    s3.broken = True
    for _ in range(5):
        assert one.seek(chain(4, "x")) == []
    assert one.far.reading.state is Circuit.OPEN
    asked = len(s3.requests)
    assert one.seek(chain(4)) == []
    assert len(s3.requests) == asked, "it was asked all the same"
    assert not one.far.can_read()
    heal(one)
    assert one.seek(chain(4)) == []  # one call, which fails: open again, for longer
    assert len(s3.requests) == asked + 1
    s3.broken = False
    heal(one)
    one.assert_blocks(one.seek(chain(4)), chain(4))
    assert one.far.reading.state.value == "closed"


def test_a_port_that_nobody_listens_on_is_a_miss(s3: S3Server) -> None:
    with kit(s3) as host:
        s3.stop()
        for _ in range(4):
            assert host.seek(chain(4)) == []
            assert host.keep(chain(4)).stored == 0
        assert host.far.reading.state is Circuit.OPEN
        assert not s3.objects


def test_who_does_not_answer_costs_a_deadline_and_no_more(s3: S3Server) -> None:
    with kit(s3) as patient:
        assert patient.keep(chain(4)).stored == 4
    with kit(s3, deadline_s=0.2) as host:
        with s3.stalling():
            for _ in range(4):
                assert host.seek(chain(4)) == []
            assert host.far.reading.state is Circuit.OPEN
        got: list[Bytes] = []

        def healed() -> bool:  # a busy machine may be late once more
            heal(host)
            got[:] = host.seek(chain(4))
            return len(got) == 4

        assert until(healed)
        host.assert_blocks(got, chain(4))


@pytest.mark.parametrize("trouble", ["key", "clock"])
def test_who_is_refused_says_so_and_does_not_insist(one: Kit, s3: S3Server, trouble: str) -> None:
    one.keep(chain(4))
    one.jobs.holdings.known = Known()
    if trouble == "key":
        s3.key_id = "another"
    else:
        s3.clock_off_s = 7200
    asked = len(s3.requests)
    for _ in range(3):
        assert one.seek(chain(4)) == []
        assert one.keep(chain(4, "b")).stored == 0
    assert len(s3.requests) == asked + 1, "one was enough"
    assert ("clock" in one.far.reading.reason) == (trouble == "clock")
    assert one.far.tally.refused == 1
    s3.key_id, s3.clock_off_s = "kvstored-test", 0.0
    heal(one)
    one.assert_blocks(one.seek(chain(4)), chain(4))


def test_a_bucket_that_is_not_there_is_no_empty_one(s3: S3Server) -> None:
    with kit(s3, bucket="another") as host:
        assert host.seek(chain(4)) == []
        assert host.far.reading.state is Circuit.OPEN
        assert host.far.reading.reason == "no such bucket"


def test_a_full_bucket_can_still_be_read(one: Kit, s3: S3Server) -> None:
    one.keep(chain(4))
    s3.room_bytes = 0
    for name in range(3):
        assert one.keep(chain(4, name)).stored == 0
    assert one.far.tally.full == 1
    assert not one.far.can_write()
    one.assert_blocks(one.seek(chain(4)), chain(4))
    s3.room_bytes = None
    heal(one)
    assert one.keep(chain(4, 0)).stored == 4


def test_an_object_that_is_gone_is_a_miss_and_not_a_fault(one: Kit, s3: S3Server) -> None:
    one.keep(chain(4))
    s3.objects.clear()
    assert one.seek(chain(4)) == []
    assert one.jobs.holdings.seen.absent == 1
    assert one.far.reading.state is Circuit.CLOSED
    assert one.seek(chain(4)) == []
    assert one.jobs.holdings.seen.absent == 1, "it is known to be gone"


def test_many_at_once_get_each_their_own(one: Kit) -> None:
    chains = [chain(6, name) for name in range(8)]
    for keys in chains:
        one.keep(keys)
    got: dict[int, bool] = {}

    def run(number: int) -> None:
        one.assert_blocks(one.seek(chains[number]), chains[number])
        got[number] = True

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8


def test_a_clear_that_did_not_get_through_goes_on_in_the_next_life(s3: S3Server, tmp_path: Path) -> None:
    keys = chain(4)
    with kit(s3, tmp_path) as host:
        host.keep(keys)
        s3.broken = True
        with pytest.raises(RemoteError):
            host.forget([])
    s3.broken = False
    with kit(s3, tmp_path) as host:
        assert host.seek(keys) == [], "nothing of it comes before it is gone"
        assert host.keep(keys).stored == 0
        (prefix,) = host.jobs.holdings.ledger.clearing()
        host.jobs.holdings.clear(prefix)
        assert not s3.objects
        assert host.keep(keys).stored == 4
    with kit(s3, tmp_path) as host:
        host.assert_blocks(host.seek(keys), keys)


def test_an_object_that_was_written_anew_with_other_bytes_is_no_damaged_one(one: Kit, s3: S3Server) -> None:
    """Whoever computes the same tokens elsewhere may get other bits; who read the first one's page knows it still."""
    keys = chain(6)
    one.keep(keys)
    with kit(s3) as reader:
        assert len(reader.seek(keys, 2)) == 4
        s3.objects.clear()
        with kit(s3) as other:
            other.keep(keys, version=1)
        got = [block.tobytes() for block in reader.seek(keys, 2)]
        assert got == [value_of(key, BLOCK_BYTES, 1) for key in keys[2:]]
        assert reader.jobs.holdings.seen == Seen()
        (name,) = s3.objects
        s3.flip(name, HEADER_BYTES + 3 * BLOCK_BYTES)
        assert reader.seek(keys, 2) == []
        assert reader.jobs.holdings.seen.damaged == 1, "a damaged one is found all the same"


def test_what_is_stored_again_under_a_deleted_key_is_not_even_copied(one: Kit) -> None:
    keys = chain(4)
    one.forget(keys[1:2])

    def nobody(_keep: Keep, _content: object) -> bool:
        raise AssertionError("it was copied")

    one.jobs.keeping._copy = nobody  # type: ignore[assignment, method-assign]
    assert one.keep(keys).stored == 0


def test_a_write_that_was_ordered_before_a_clear_does_not_outlive_it(one: Kit, s3: S3Server) -> None:
    """Though its thread begins with it when all of the clear is over."""
    begin_keep = one.jobs.begin_keep

    def begin(keep: Keep) -> None:
        begin_keep(keep)
        one.forget([])

    one.jobs.begin_keep = begin
    assert one.keep(chain(3)).stored == 0
    assert not s3.objects


def test_how_often_namespaces_were_dropped_is_not_remembered_for_ever(one: Kit, s3: S3Server) -> None:
    begin_keep = one.jobs.begin_keep

    def begin(keep: Keep) -> None:
        begin_keep(keep)
        for number in range(EPOCHS + 1):
            place = Place(PLACE.tenant, key_of(number))
            one.jobs.announce(Forget(keep.namespace, place, ()))

    one.jobs.begin_keep = begin
    assert one.keep(chain(3)).stored == 0, "it may have been one of them"
    assert len(one.jobs.holdings.epochs) <= EPOCHS
    assert not s3.objects
    one.jobs.begin_keep = begin_keep
    assert one.keep(chain(3)).stored == 3


def test_a_listing_that_never_ends_or_names_what_is_not_below_costs_little(one: Kit, s3: S3Server) -> None:
    one.keep(chain(3))
    other = Place(PLACE.tenant, key_of("other"))
    one.keep(chain(3), other)
    names = [name.removeprefix("k/") for name in s3.objects]
    one.far._backend.listing = lambda prefix, most: [Listed(name, 1) for name in names]  # type: ignore[method-assign]
    with pytest.raises(RemoteError, match="still there"):
        one.forget([])
    assert [name for name in s3.objects if name.startswith(f"k/{other.prefix}")]
    assert len(s3.objects) == 1


def test_many_keys_are_looked_for_in_the_ledger_in_one_pass(one: Kit, s3: S3Server) -> None:
    keys = chain(20)
    one.keep(keys[:10])
    one.keep(keys[10:], parent=keys[9])
    one.keep(chain(3, "b"))
    passes = 0
    below = one.jobs.holdings.ledger.below

    def counted(prefix: str) -> list[str]:
        nonlocal passes
        passes += 1
        return below(prefix)

    one.jobs.holdings.ledger.below = counted  # type: ignore[method-assign]
    one.forget([keys[3], keys[10], keys[15]])
    assert passes == 1
    assert len(s3.objects) == 1


def test_where_names_follow_from_keys_another_hosts_object_is_deleted_too(one: Kit, s3: S3Server) -> None:
    one.far.most_blocks = 1
    keys = chain(3)
    assert one.keep(keys).stored == 3
    with kit(s3) as other:
        other.far.most_blocks = 1
        other.forget(keys[1:2])
    assert len(s3.objects) == 2
    assert f"k/{name_of(PLACE, keys[1:2])}" not in s3.objects


def test_what_no_object_may_hold_does_not_stop_other_writes(one: Kit, s3: S3Server) -> None:
    put = one.far._backend.put

    def refuse(name: str, parts: object) -> bool:
        raise TooLargeError(f"{name}: {parts}")

    one.far._backend.put = refuse  # type: ignore[method-assign]
    for number in range(5):
        assert one.keep(chain(2, number)).stored == 0
    one.far._backend.put = put  # type: ignore[method-assign]
    assert one.keep(chain(2)).stored == 2


def test_a_ledger_that_ends_in_the_midst_of_a_line_loses_no_more_than_that(s3: S3Server, tmp_path: Path) -> None:
    keys = chain(4)
    with kit(s3, tmp_path) as host:
        host.keep(keys)
    file = next(tmp_path.iterdir())
    with file.open("a") as ledger:
        ledger.write("+ 123")
    with kit(s3, tmp_path) as host:
        host.forget(keys[:1])
    with kit(s3, tmp_path) as host:
        assert host.jobs.holdings.ledger.faults == 1
        assert host.jobs.holdings.ledger.deleted == 1
        assert host.seek(keys) == []


def test_a_ledger_that_was_written_anew_is_for_its_owner_alone(tmp_path: Path) -> None:
    ledger = read_ledger(tmp_path)
    digests = [key_digest(PLACE, key_of(number)) for number in range(SLACK + 2)]
    ledger.delete_keys(PLACE.prefix, digests[:1])
    for _ in range(SLACK // 64 + 2):
        ledger.delete_keys(PLACE.prefix, digests[:1] * 64)
    (file,) = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) < SLACK
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_ledger(tmp_path).is_deleted(PLACE.prefix, digests[0])


def test_a_tenant_that_deletes_much_does_not_have_the_deletes_of_others_forgotten(tmp_path: Path) -> None:
    ledger = read_ledger(tmp_path)
    other = Place(tenant_digest("u"), PLACE.namespace)
    ledger.delete_keys(other.prefix, [b"other"])
    for batch in range(0, DELETED + 4096, 4096):
        ledger.delete_keys(PLACE.prefix, [number.to_bytes(20, "little") for number in range(batch, batch + 4096)])
    for one in (ledger, read_ledger(tmp_path)):
        assert one.deleted == DELETED
        assert one.is_deleted(other.prefix, b"other")
        assert not one.is_deleted(PLACE.prefix, (0).to_bytes(20, "little")), "its own go"
        assert one.is_deleted(PLACE.prefix, (DELETED + 4095).to_bytes(20, "little"))


# -- threads ----------------------------------------------------------------------------------------------------------


def test_what_is_to_be_removed_waits_after_a_failure_in_turn_and_is_bounded() -> None:
    removals = Removals(pause_s=0.0)
    first, second = Removal("a/", (b"1",)), Removal("b/")
    removals.add(first)
    assert removals.next() is first
    removals.add(second)
    removals.add(Removal("b/"))
    removals.again(first)
    assert removals.next() == second, "clearing comes first"
    assert removals.next() is first
    assert not removals
    removals.add(Removal("a/", (b"x",) * DIGESTS))
    assert not removals.add(first)
    assert removals.dropped == 1
    removals.add(second)
    assert removals.next() == second, "clearing comes in always"
    assert removals.next() == Removal("a/", (b"x",) * DIGESTS)
    removals.close()
    assert removals.next() is None


def test_namespaces_have_what_is_deleted_of_them_removed_in_turn_and_all_that_came_meanwhile_at_once() -> None:
    removals = Removals(pause_s=0.0)
    for number in range(5):
        removals.add(Removal("a/", (bytes([number]),), when=number + 1))
    removals.add(Removal("b/", (b"1",), when=9))
    order = removals.next()
    assert isinstance(order, Removal)
    assert (order.digests, order.when) == (tuple(bytes([number]) for number in range(5)), 5)
    order.mine, order.done = deque(), 1
    removals.add(Removal("a/", (b"new",), when=10))
    removals.goes_on(order)
    assert removals.next() == Removal("b/", (b"1",))
    removals.add(Removal("b/", (b"2",), when=11))
    assert removals.next() == Removal("a/", (b"new",)), "not joined with what is under way"
    assert removals.next() == Removal("b/", (b"2",))
    assert removals.next() is order
    assert not removals
    removals.add(Removal("a/", (b"1", b"2"), when=3))
    removals.add(Removal("a/b/", (b"3",), when=4))
    removals.forget("a/", 3)
    assert removals.next() == Removal("a/b/", (b"3",)), "the others are gone with all of the namespace"
    assert not removals


def test_what_is_dropped_is_noted_while_the_far_side_does_not_answer(s3: S3Server, tmp_path: Path) -> None:
    """And what the thread that removes cannot do is done later, though others come meanwhile, and whatever it was."""
    backend = S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ)
    asked = threading.Event()
    go_on = threading.Semaphore(0)
    listing = backend.listing
    removed: list[str] = []

    def slow(prefix: str, most: int) -> list[Listed]:
        asked.set()
        go_on.acquire()
        removed.append(prefix)
        if len(removed) == 1:
            raise ValueError("a back-end that breaks its contract")
        return listing(prefix, most)

    backend.listing = slow  # type: ignore[method-assign]
    noted = threading.Semaphore(0)
    threads = RemoteThreads(
        backend, RemoteLimits(1 << 30, 2, tmp_path), lambda _arena: np.zeros(0, dtype=np.uint8),
        cast(LeafThreads, None), noted.release,
    )  # fmt: skip
    threads._removals._pause_s = 0.0
    threads.start()
    try:
        threads.submit(Forget(NOBODY, PLACE, ()))
        assert asked.wait(10)
        threads.submit(Forget(NOBODY, PLACE, tuple(chain(2))))
        for _ in range(2):
            assert noted.acquire(timeout=10)
        assert read_ledger(tmp_path).deleted == 2
        assert read_ledger(tmp_path).clearing() == [PLACE.prefix]
        for _ in range(8):
            go_on.release()
        while threads.ledger.clearing():
            assert threads._threads[-1].is_alive()
        assert removed.count(PLACE.prefix) == 2
    finally:
        for _ in range(8):
            go_on.release()
        threads.stop()


def test_while_the_ledger_is_read_nothing_comes_from_over_there_and_nobody_waits(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that a former life has deleted must not come back before that is known; deletes meanwhile are kept."""
    keys = chain(4)
    with kit(s3, tmp_path) as host:
        host.keep(keys)
        host.jobs.begin_forget(Forget(NOBODY, PLACE, tuple(keys[:1])))
    go_on, read = threading.Event(), Ledger.read

    def slow(ledger: Ledger, meanwhile: Callable[[], None]) -> None:
        go_on.wait(10)
        read(ledger, meanwhile)

    monkeypatch.setattr(Ledger, "read", slow)
    noted = threading.Semaphore(0)
    threads = RemoteThreads(
        S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ),
        RemoteLimits(1 << 30, 2, tmp_path), lambda _arena: np.zeros(0, dtype=np.uint8), cast(LeafThreads, None),
        noted.release,
    )  # fmt: skip
    threads.start()
    try:
        threads.submit(Forget(NOBODY, PLACE, tuple(chain(1, "later"))))
        assert not threads.reading()
        assert not threads.writing()
        assert not threads.submit(Seek(NOBODY, PLACE, tuple(keys), 0, BLOCK_BYTES, 0))
        go_on.set()
        assert noted.acquire(timeout=10)
        assert threads.reading()
        assert threads.writing()
        assert threads.ledger.deleted == 2
        brought: list[Piece] = []
        threads.jobs.seek(Seek(NOBODY, PLACE, tuple(keys), 0, BLOCK_BYTES, 0), brought.append)
        assert not brought
        threads.jobs.seek(Seek(NOBODY, PLACE, tuple(keys[1:]), 0, BLOCK_BYTES, 0), brought.append)
        assert not brought, "no run begins there"
    finally:
        go_on.set()
        threads.stop()


def test_the_owner_is_given_back_its_turn_however_much_has_come(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[int] = []
    threads = RemoteThreads(
        S3Backend(RemoteAddress("s3", s3.bucket, "k", s3.endpoint), PATIENCE_S, s3.environ), RemoteLimits(1 << 30, 2),
        lambda _arena: np.zeros(0, dtype=np.uint8), cast(LeafThreads, None), lambda: wakes.append(1),
    )  # fmt: skip
    done: list[int] = []
    threads._ended.extend(lambda _store, number=number: done.append(number) for number in range(3))  # type: ignore[misc]
    monkeypatch.setattr(remote, "FINISH_S", -1.0)
    for turn in range(3):
        threads.finish(cast(Store, None))
        assert done == list(range(turn + 1))
    assert len(wakes) == 2


# -- what reading takes, and how it stands ----------------------------------------------------------------------------


def test_ranges_that_are_read_side_by_side_are_timed_together(one: Kit, s3: S3Server) -> None:
    """Three objects whose requests begin and end at the same time: 150 blocks in one second, not in none."""
    keys = chain(150)
    for start in range(0, 150, 64):
        one.keep(keys[start : start + 64], parent=keys[start - 1] if start else bytes(32))
    reading, pieces = one.jobs.reading, cast(list[Piece], [])
    read = reading._read
    reading._read = lambda *ask: replace(read(*ask), began_s=5.0, ended_s=6.0)  # type: ignore[method-assign]
    seek = Seek(NOBODY, PLACE, tuple(keys), 0, BLOCK_BYTES, 0)
    one.jobs.seek(seek, pieces.append)
    assert len(pieces) == 3
    assert seek.read_bytes == 150 * BLOCK_BYTES + 3 * HEADER_BYTES
    assert seek.read_s == 1.0


def test_what_was_read_is_a_load_of_the_way_that_others_are_judged_by() -> None:
    way = Bandwidth()
    assert way.speed() is None
    for times in range(1, 9):
        way.took(times * GIB, 0.5 * times)
    speed = way.speed()
    assert speed is not None
    assert speed == pytest.approx(2 * GIB, rel=0.05)
    assert speed != pytest.approx(4 * GIB, rel=0.05)


def test_status_has_words_for_how_it_stands(one: Kit, s3: S3Server) -> None:
    """A request in vain shows at once, and not only when the third has stopped all of it."""
    assert (standing(one.far.reading), standing(one.far.writing)) == (GOES_ON, GOES_ON)
    one.keep(chain(4))
    s3.broken = True
    assert one.keep(chain(4, "lost")).stored == 0
    assert standing(one.far.reading) == FAILING
    for number in range(FAILURES):
        one.seek(chain(4, number))
    assert standing(one.far.reading) == STOPPED
    s3.broken = False
    heal(one)
    one.assert_blocks(one.seek(chain(4)), chain(4))
    assert standing(one.far.reading) == GOES_ON


def test_a_warning_says_what_does_not_work_and_why() -> None:
    calm = RemoteReport(**{field.name: 0 for field in fields(RemoteReport)} | {"reading": GOES_ON, "writing": GOES_ON})  # type: ignore[arg-type]
    assert not list(remote_warnings(calm))
    for reading, writing, said in (
        (FAILING, GOES_ON, "the last request to the remote tier failed (why)"),
        (STOPPED, STOPPED, "neither reads nor writes (why)"),
        (GOES_ON, STOPPED, "does not write (why)"),
    ):
        (text,) = remote_warnings(replace(calm, reading=reading, writing=writing, reason="why"))
        assert said in text


@pytest.mark.parametrize(("word", "value"), [(GOES_ON, 1), (FAILING, 1), (STOPPED, 0), (TRIES, 0)])
def test_metrics_know_the_words_of_status(word: str, value: int) -> None:
    facts = cast(Facts, SimpleNamespace(now=SimpleNamespace(remote=SimpleNamespace(reading=word, writing=word))))
    for name in ("kvstored_remote_reading", "kvstored_remote_writing"):
        metric = next(one for one in METRICS if one.name == name)
        assert list(metric.rows(facts)) == [((), value)]


def test_a_reason_begins_with_the_cause_and_ends_before_names_of_objects(s3: S3Server) -> None:
    with kit(s3) as host:
        s3.stop()
        with pytest.raises(RemoteError) as caught:
            host.far.listing("a" * 150 + "/" + "b" * 60, 10)
    assert str(caught.value).startswith("Connection refused")
    assert s3.endpoint in str(caught.value)
    assert "prefix=" not in str(caught.value)
