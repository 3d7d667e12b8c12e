"""What threads of the remote tier bring and write, over a real socket: found and verified, or a miss."""

import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from kvstore.tier.remote_breaker import Circuit
from kvstore.tier.remote_format import HEADER_BYTES, Place, name_of, tenant_digest
from kvstore.tier.remote_index import Known
from kvstored.remote_port import RemoteError
from tests.core import chain, key_of
from tests.s3 import S3Server
from tests.unit.remote_kit import BLOCK_BYTES, PLACE, Kit, kit

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
        assert other.jobs.seen.skipped == 12
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
    """One bit of an object flipped, again and again: nothing of it comes, it is counted, and never read again."""
    keys = chain(6)
    jobs.keep(keys)
    name = next(iter(s3.objects))
    whole = s3.objects[name]
    assert len(whole) == HEADER_BYTES + 6 * BLOCK_BYTES
    random = Random(seed)
    for trial in range(trials):
        at = random.randrange(len(whole))
        content = bytearray(whole)
        content[at] ^= 1 << random.randrange(8)
        s3.objects[name] = bytes(content)
        jobs.jobs.known = Known()
        jobs.jobs._headers.clear()
        assert jobs.seek(keys) == [], f"seed {seed}, trial {trial}: byte {at} was flipped"
        assert jobs.jobs.seen.damaged == trial + 1
    gets = s3.count("GET")
    assert jobs.seek(keys) == []
    assert s3.count("GET") == gets, "an object in quarantine was read"
    s3.objects[name] = whole
    jobs.jobs.known = Known()
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
        assert reader.jobs.seen.damaged == 1
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
        assert reader.seek(keys) == []


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
        assert host.jobs.ledger.total_bytes == room
        host.keep(chain(2, "d"))
        assert sum(map(len, s3.objects.values())) == host.jobs.ledger.total_bytes == room
        assert host.seek(chain(2, "a")) == []
        host.assert_blocks(host.seek(chain(2, "b")), chain(2, "b"))


def test_a_damaged_ledger_is_read_as_far_as_it_goes(s3: S3Server, tmp_path: Path) -> None:
    with kit(s3, tmp_path) as host:
        host.keep(chain(2))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes() + b"\xff\xfe torn\n+ x y\n+ 5")
    with kit(s3, tmp_path) as host:
        assert len(host.jobs.ledger) == 1
        assert host.jobs.ledger.faults == 3


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
    far_put = one.jobs._far.put

    def put(name: str, parts: object) -> bool:
        done = far_put(name, parts)  # type: ignore[arg-type]
        one.forget([])
        return done

    one.jobs._far.put = put  # type: ignore[method-assign]
    assert one.keep(chain(3)).stored == 0
    assert not s3.objects


# -- a far side that fails --------------------------------------------------------------------------------------------


def heal(one: Kit) -> None:
    """As if the time of both breakers were over."""
    one.far.reading.until_ns = one.far.writing.until_ns = 0


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
    with kit(s3, deadline_s=0.2) as host:
        host.keep(chain(4))
        host.jobs.known = Known()
        with s3.stalling():
            for _ in range(4):
                assert host.seek(chain(4)) == []
            assert host.far.reading.state is Circuit.OPEN
        heal(host)
        host.assert_blocks(host.seek(chain(4)), chain(4))


@pytest.mark.parametrize("trouble", ["key", "clock"])
def test_who_is_refused_says_so_and_does_not_insist(one: Kit, s3: S3Server, trouble: str) -> None:
    one.keep(chain(4))
    one.jobs.known = Known()
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
    assert one.jobs.seen.absent == 1
    assert one.far.reading.state is Circuit.CLOSED
    assert one.seek(chain(4)) == []
    assert one.jobs.seen.absent == 1, "it is known to be gone"


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
        (prefix,) = host.jobs.ledger.clearing()
        host.jobs.clear(prefix)
        assert not s3.objects
        assert host.keep(keys).stored == 4
    with kit(s3, tmp_path) as host:
        host.assert_blocks(host.seek(keys), keys)
