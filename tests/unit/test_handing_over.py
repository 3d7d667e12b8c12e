"""Handing over beyond this host: what is asked for is written first, whatever it is worth, and found at once."""

from collections.abc import Sequence

import pytest

from kvproto.policy_frames import Fetching, Tier
from kvstore import handing_over
from kvstore.prefetching import UNUSED_SHARE
from kvstore.sessions import Namespace
from kvstore.tier.remote import WISHED_AGAIN_NS
from kvstore.tier.remote_format import Place, runs_prefix
from kvstore.tier.remote_index import Known
from kvstore.tier.remote_orders import Keep, Seek
from kvstore.tier.remote_writing import LATER_NS, SETTLE_NS, WISHES_EACH, RemoteAdmission
from tests.core import SECOND, Client, Core, chain, words
from tests.unit.test_prefetching import begin, in_dram, to_disk
from tests.unit.test_remote import FarSide, elsewhere, host


def hand_over(core: Core, ns: Namespace, keys: Sequence[bytes]) -> Fetching:
    return handing_over.hand_over(core.store, ns, words(keys), 0, len(keys), SECOND)


def prefetch(client: Client, ns: Namespace, keys: Sequence[bytes]) -> None:
    store = client.core.store
    store.prefetching.prefetch(ns.tenant, ns, words(keys), 0, len(keys), SECOND, Tier.DRAM, wished=True)


def test_what_is_handed_over_is_written_though_it_was_used_once_and_is_found_by_another_host() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(10)
    client.put(ns, keys)
    far.work()
    assert not far.content, "the control: stored once is not written"
    assert hand_over(core, ns, keys) == (0, 0, 10)
    core.store.tick()
    assert hand_over(core, ns, keys) == (0, 0, 10), "under way is not there"
    far.work()
    assert hand_over(core, ns, keys) == (0, 10, 0)
    core.audit()
    _, there, client = elsewhere(far)
    ns = client.open()
    prefetch(client, ns, keys)
    there.work()
    assert client.fetch(ns, keys) == 10


def test_whether_it_is_worth_it_nobody_asks() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(4)
    ns.recompute_ns = 1000
    core.store.remote.way.took(1 << 20, 1.0)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    assert not far.content, "the control: it is slower to read than to compute"
    hand_over(core, ns, keys)
    far.work()
    assert len(far.content) == 4


def test_it_goes_before_all_that_nobody_asked_for_and_those_that_ask_take_their_turns() -> None:
    core, far, client = host(admission=RemoteAdmission.ALL)
    ns = client.open()
    for name in "abc":
        client.put(ns, chain(3, name))
    for name in "cb":
        hand_over(core, ns, chain(3, name))
    core.store.tick()
    written = [order.keys[0] for order in far.orders if isinstance(order, Keep)]
    assert written[:2] == [chain(3, "c")[0], chain(3, "b")[0]]
    core.pass_time(SETTLE_NS)
    far.work()
    assert len(far.content) == 9
    core.audit()


def test_what_is_appended_meanwhile_is_written_and_the_rest_is_not_written_twice() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(12)
    client.put(ns, keys[:5])
    hand_over(core, ns, keys)
    far.work()
    client.put(ns, keys[5:], parent=keys[4])
    assert hand_over(core, ns, keys) == (0, 5, 7)
    core.store.tick()
    (keep,) = far.orders
    assert isinstance(keep, Keep)
    assert list(keep.keys) == keys[5:]
    far.work()
    assert hand_over(core, ns, keys) == (0, 12, 0)
    assert core.store.remote.writing.tally.kept == 12


def test_a_write_that_failed_is_made_again_when_somebody_asks_again() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(4)
    client.put(ns, keys)
    hand_over(core, ns, keys)
    core.store.tick()
    (keep,) = far.orders
    far.orders.clear()
    assert isinstance(keep, Keep)
    keep.stored = 1
    core.store.remote.writing.kept(keep)
    assert hand_over(core, ns, keys) == (0, 1, 3)
    far.work()
    assert hand_over(core, ns, keys) == (0, 4, 0)
    core.audit()


@pytest.mark.parametrize("why", ["down", "reads only", "no far side"])
def test_nothing_is_to_come_where_nothing_can_be_written(why: str) -> None:
    core, far, client = host(admission=RemoteAdmission.NONE if why == "reads only" else RemoteAdmission.ALL)
    if why == "no far side":
        core = Core(4)
        client = core.client()
    far.up = why != "down"
    ns = client.open()
    client.put(ns, chain(3))
    assert hand_over(core, ns, chain(3)) == (0, 0, 0)


def test_a_tenant_that_asks_for_too_much_is_told_so_and_others_are_not() -> None:
    core, far, client = host(arenas=8)
    ns = client.open()
    for number in range(WISHES_EACH + 1):
        client.put(ns, chain(1, str(number)))
    told = [hand_over(core, ns, chain(1, str(number))).coming for number in range(WISHES_EACH + 1)]
    assert told == [1] * WISHES_EACH + [0]
    other = core.client("other")
    there = other.open()
    other.put(there, chain(1))
    assert hand_over(core, there, chain(1)).coming == 1
    far.work()
    assert hand_over(core, ns, chain(1, str(WISHES_EACH))).coming == 1


def test_who_fetches_by_name_asks_again_soon_and_who_only_missed_it_does_not() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(4)
    client.match(ns, keys)
    far.work()
    core.pass_time(WISHED_AGAIN_NS)
    client.match(ns, keys)
    assert not far.orders, "the control"
    prefetch(client, ns, keys)
    prefetch(client, ns, keys)
    (seek,) = far.orders
    assert isinstance(seek, Seek)
    assert seek.wished
    far.work()
    prefetch(client, ns, keys)
    assert not far.orders, "not at once"
    core.pass_time(WISHED_AGAIN_NS)
    prefetch(client, ns, keys)
    assert len(far.orders) == 1


def test_only_what_was_not_there_is_doubted() -> None:
    known, place = Known(), Place(bytes(16), bytes(32))
    absent, there = (runs_prefix(place, bytes([letter]) * 32) for letter in b"ab")
    known.learn(absent, [], 0)
    known.learn(there, [(f"{there}1.", 4096)], 0)
    assert known.runs(absent, 1) == ()
    known.doubt([absent, there])
    assert known.runs(absent, 1) is None
    assert known.runs(there, 1)


def test_of_a_chain_on_disk_more_is_handed_over_than_may_be_fetched_and_not_used() -> None:
    core, client, ns = begin(arenas=2, segments=16)
    far, keys = FarSide(core), chain(12)
    to_disk(client, ns, keys)
    assert core.store.limits.arena_bytes * 2 // UNUSED_SHARE < len(keys) * ns.slot_bytes, "the control"
    for _ in range(8):
        hand_over(core, ns, keys)
        core.work_all()
        core.pass_time(LATER_NS)
        far.work()
    assert hand_over(core, ns, keys) == (0, 12, 0)
    assert in_dram(client, ns, keys) > 0
    core.audit()
