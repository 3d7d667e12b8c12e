"""Prefetches: what they bring, what they wait for, what they cost."""

import numpy as np
import pytest

from kvproto.limits import PAGE_BYTES, PREFETCHES_PER_TENANT
from kvproto.policy_frames import Fetching, Tier
from kvstore.fetched import GRACE_NS, LOOK_BATCHES
from kvstore.prefetching import ASKED, PINNED_NS
from kvstore.sessions import Lease, Namespace
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from kvstore.tier.orders import Load, Outcome
from tests.core import MS, SECOND, Client, Core, chain, words

SEGMENT_BYTES = 18 * PAGE_BYTES


def begin(arenas: int = 2, segments: int = 8) -> tuple[Core, Client, Namespace]:
    """A store of 16 slots an arena and a disk tier that takes everything."""
    limits = DiskLimits(
        segments * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW, row_bytes=2 * PAGE_BYTES
    )
    core = Core(arenas=arenas, disk=limits)
    client = core.client()
    return core, client, client.open()


def to_disk(client: Client, namespace: Namespace, *chains: list[bytes], pushes: int = 32) -> None:
    """Store chains and have them leave DRAM."""
    for keys in chains:
        client.put(namespace, keys)
        client.core.work_all()
    for number in range(pushes):
        client.put(namespace, chain(1, f"pushes {number}"))
        client.core.work_all()
    for keys in chains:
        assert in_dram(client, namespace, keys) == 0
        assert client.match(namespace, keys) == len(keys)
    client.core.audit()


def in_dram(client: Client, namespace: Namespace, keys: list[bytes]) -> int:
    """How many lie in DRAM."""
    return client.store.match(namespace, words(keys), 0, len(keys)).dram


def prefetch(
    client: Client, namespace: Namespace, keys: list[bytes], within_ns: int = 5 * SECOND, tier: Tier = Tier.DRAM
) -> Fetching:
    """PREFETCH."""
    tenant = client.session.tenant
    return client.store.prefetching.prefetch(tenant, namespace, words(keys), 0, len(keys), within_ns, tier)


def waiting_turns(core: Core) -> int:
    """How many entries all queues have."""
    return sum(len(queue) for queue in core.store.prefetching._queues.values())


def test_what_lies_on_disk_is_in_dram_afterwards() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(4), chain(4, "other"))
    fetching = prefetch(client, namespace, chain(4))
    assert (fetching.there, fetching.coming) == (0, 4)
    assert fetching.prefetch
    core.work_all()
    core.audit()
    assert in_dram(client, namespace, chain(4)) == 4
    assert in_dram(client, namespace, chain(4, "other")) == 0
    assert client.fetch(namespace, chain(4)) == 4
    tally = core.store.prefetching.tally
    assert (tally.used_bytes, tally.wasted_bytes) == (4 * PAGE_BYTES, 0)


def test_what_is_there_or_nowhere_needs_no_prefetch() -> None:
    _core, client, namespace = begin()
    client.put(namespace, chain(4))
    assert prefetch(client, namespace, chain(4)) == (0, 4, 0)
    assert prefetch(client, namespace, chain(4, "nowhere")) == (0, 0, 0)


def test_what_is_not_used_in_time_is_counted_as_wasted() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(4))
    prefetch(client, namespace, chain(4))
    core.work_all()
    client.fetch(namespace, chain(1))
    core.pass_time(5 * SECOND + GRACE_NS + SECOND)
    tally = core.store.prefetching.tally
    assert (tally.used_bytes, tally.wasted_bytes) == (PAGE_BYTES, 3 * PAGE_BYTES)
    core.pass_time(SECOND)
    assert core.store.prefetching.next_ns() is None
    core.audit()


def test_clients_that_wait_for_reads_go_first() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(4), chain(4, "real"))
    locations = np.zeros(8, dtype=np.uint32)
    lease = core.store.lease(client.session, namespace, 1, words(chain(4, "real")), 0, 4, SECOND, SECOND, locations, 0)
    assert isinstance(lease, Lease)
    prefetch(client, namespace, chain(4))
    core.store.tick()
    asked = [order.keys if hasattr(order, "keys") else order for batch in core.drive.waiting for order in batch]
    assert len(asked) == 4, "only what the client waits for is being read"
    core.work_all()
    assert in_dram(client, namespace, chain(4)) == 4


def test_the_same_chain_is_fetched_once_and_the_most_urgent_first() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3), chain(3, "urgent"))
    prefetch(client, namespace, chain(3), within_ns=9 * SECOND)
    prefetch(client, namespace, chain(3), within_ns=8 * SECOND)
    assert core.store.prefetching.waiting(client.session.tenant) == 1
    prefetch(client, namespace, chain(3, "urgent"), within_ns=SECOND)
    core.store.tick()
    core.work()
    assert in_dram(client, namespace, chain(3, "urgent")) > 0
    assert in_dram(client, namespace, chain(3)) == 0
    before = core.drive.loads if hasattr(core.drive, "loads") else None
    core.work_all()
    assert before is None or core.drive.loads - before <= 3
    assert core.store.prefetching.tally.fetched_bytes == 6 * PAGE_BYTES


def test_what_is_cancelled_is_not_fetched_and_only_by_its_tenant() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3), chain(3, "other"))
    one, two = prefetch(client, namespace, chain(3)), prefetch(client, namespace, chain(3, "other"))
    stranger = core.client("stranger")
    core.store.prefetching.cancel(stranger.session.tenant, [one.prefetch, two.prefetch])
    core.store.prefetching.cancel(client.session.tenant, [one.prefetch, 12345])
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 0
    assert in_dram(client, namespace, chain(3, "other")) == 3


def test_what_comes_too_late_is_given_up() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    prefetch(client, namespace, chain(3), within_ns=10 * MS)
    core.clock.advance(20 * MS)
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 0
    assert core.store.prefetching.tally.late == 1


def test_what_was_fetched_and_not_used_is_bounded() -> None:
    core, client, namespace = begin()  # 32 slots: 8 may be fetched and not used
    to_disk(client, namespace, *(chain(4, name) for name in range(4)))
    for name in range(4):
        prefetch(client, namespace, chain(4, name))
        core.work_all()
    there = [in_dram(client, namespace, chain(4, name)) for name in range(4)]
    assert there == [4, 4, 0, 0]
    client.fetch(namespace, chain(4, 0))
    prefetch(client, namespace, chain(4, 2))
    core.work_all()
    assert in_dram(client, namespace, chain(4, 2)) == 4
    core.audit()


def test_a_tenant_may_not_ask_for_too_much_at_once() -> None:
    core, client, namespace = begin(segments=40)
    to_disk(client, namespace, *(chain(1, f"many {name}") for name in range(PREFETCHES_PER_TENANT + 1)))
    answers = [prefetch(client, namespace, chain(1, f"many {name}")) for name in range(PREFETCHES_PER_TENANT + 1)]
    assert all(answer.coming for answer in answers[:-1])
    assert answers[-1] == (0, 0, 0)
    assert core.store.prefetching.tally.refused == 1


def test_what_cannot_be_read_ends_a_prefetch() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) else None
    prefetch(client, namespace, chain(3))
    core.work_all()
    core.audit()
    assert core.store.prefetching.waiting(client.session.tenant) == 0
    core.drive.fault = lambda _order: None
    prefetch(client, namespace, chain(3))
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3


def test_rows_that_hold_something_else_by_now_were_fetched_in_vain() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(4))
    prefetch(client, namespace, chain(4))
    core.work_all()
    client.delete(namespace, chain(4)[:1])
    core.work_all()
    for number in range(40):  # rows of the deleted ones are used again
        client.put(namespace, chain(1, f"again {number}"))
        client.fetch(namespace, chain(1, f"again {number}"))
        core.work_all()
    tally = core.store.prefetching.tally
    core.pass_time(5 * SECOND + GRACE_NS + SECOND)
    assert (tally.fetched_bytes, tally.used_bytes, tally.wasted_bytes) == (4 * PAGE_BYTES, 0, 4 * PAGE_BYTES)
    core.audit()


def test_a_namespace_that_is_forgotten_is_fetched_no_more() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    prefetch(client, namespace, chain(3))
    core.store.prefetching.forget_namespace(namespace)
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 0


def test_cancelled_ones_do_not_pile_up() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    for _ in range(5000):
        core.store.prefetching.cancel(client.session.tenant, [prefetch(client, namespace, chain(3)).prefetch])
    assert waiting_turns(core) < 1000
    prefetch(client, namespace, chain(3))
    for _ in range(5000):
        core.store.tick()
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3


def test_what_others_still_want_is_fetched_after_one_has_taken_it_back() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3), chain(3, "lonely"))
    prefetching, tenant, colleague = core.store.prefetching, client.session.tenant, core.client()
    one, two = prefetch(client, namespace, chain(3)), prefetch(colleague, colleague.open(), chain(3))
    assert prefetching.waiting(tenant) == 1, "it is fetched once"
    assert one.prefetch != two.prefetch
    lonely = prefetch(client, namespace, chain(3, "lonely"))
    for _ in range(2):  # who takes it back twice takes back nobody else's
        prefetching.cancel(tenant, [one.prefetch, one.prefetch, lonely.prefetch])
    assert (prefetching.waiting(tenant), prefetching.tally.cancelled) == (1, 1)
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3
    assert in_dram(client, namespace, chain(3, "lonely")) == 0


def test_what_all_have_taken_back_is_fetched_no_more() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    prefetching, tenant = core.store.prefetching, client.session.tenant
    for asked in (prefetch(client, namespace, chain(3)), prefetch(client, namespace, chain(3))):
        prefetching.cancel(tenant, [asked.prefetch])
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 0
    assert (prefetching.waiting(tenant), prefetching.tally.cancelled) == (0, 1)


@pytest.mark.parametrize("more", [0, 1])
def test_who_asks_for_a_chain_that_has_no_number_left_is_not_forgotten(more: int) -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    prefetching, tenant = core.store.prefetching, client.session.tenant
    asked = [prefetch(client, namespace, chain(3)) for _ in range(ASKED + more)]
    assert [one.coming for one in asked] == [3] * len(asked)
    assert sum(not one.prefetch for one in asked) == more
    prefetching.cancel(tenant, [one.prefetch for one in asked])
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3 * more
    assert (prefetching.waiting(tenant), prefetching._asked) == (0, {})


def first_to_come(client: Client, namespace: Namespace, *names: str) -> str:
    """Which of some chains of 3 on disk is the first to be in DRAM."""
    client.store.tick()
    client.core.work()
    (first,) = [name for name in names if in_dram(client, namespace, chain(3, name))]
    return first


def test_an_urgent_repeat_makes_a_patient_request_urgent_and_not_the_other_way_around() -> None:
    for repeat_ns, first in ((SECOND, "patient"), (20 * SECOND, "between")):
        core, client, namespace = begin()
        to_disk(client, namespace, chain(3, "patient"), chain(3, "between"))
        prefetch(client, namespace, chain(3, "patient"), within_ns=9 * SECOND)
        prefetch(client, namespace, chain(3, "between"), within_ns=5 * SECOND)
        prefetch(client, namespace, chain(3, "patient"), within_ns=repeat_ns)
        assert first_to_come(client, namespace, "patient", "between") == first
        core.work_all()
        assert in_dram(client, namespace, chain(3, "patient")) == in_dram(client, namespace, chain(3, "between")) == 3


def test_who_asked_for_longest_says_when_it_is_too_late_and_when_it_was_in_vain() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    prefetch(client, namespace, chain(3), within_ns=9 * SECOND)
    prefetch(client, namespace, chain(3), within_ns=10 * MS)
    core.clock.advance(20 * MS)
    core.work_all()
    tally = core.store.prefetching.tally
    assert (in_dram(client, namespace, chain(3)), tally.late) == (3, 0), "one of them has time"
    core.pass_time(8 * SECOND + GRACE_NS)
    assert tally.wasted_bytes == 0
    core.pass_time(2 * SECOND)
    assert tally.wasted_bytes == 3 * PAGE_BYTES


def test_ever_more_urgent_repeats_do_not_pile_up() -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    for number in range(5000):
        prefetch(client, namespace, chain(3), within_ns=9 * SECOND - number * 1000)
    assert waiting_turns(core) < 1000
    assert core.store.prefetching.waiting(client.session.tenant) == 1
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3


def test_what_was_evicted_unused_makes_room_for_what_is_wanted_next() -> None:
    core, client, namespace = begin(segments=20)  # 32 slots: 8 may be fetched and not used
    to_disk(client, namespace, chain(8), chain(4, "next"))
    prefetch(client, namespace, chain(8), within_ns=3600 * SECOND)
    core.work_all()
    prefetch(client, namespace, chain(4, "next"))
    core.work_all()
    tally = core.store.prefetching.tally
    assert (in_dram(client, namespace, chain(4, "next")), tally.no_room, tally.wasted_bytes) == (0, 1, 0), "the control"
    for number in range(40):
        client.put(namespace, chain(1, f"evicts {number}"))
        core.work_all()
    assert in_dram(client, namespace, chain(8)) == 0
    prefetch(client, namespace, chain(4, "next"))
    core.work_all()
    assert (in_dram(client, namespace, chain(4, "next")), tally.no_room) == (4, 1)
    assert (tally.used_bytes, tally.wasted_bytes) == (0, 8 * PAGE_BYTES)
    core.audit()


def test_what_was_evicted_is_found_behind_much_that_is_still_there() -> None:
    core, client, namespace = begin(arenas=8, segments=80)  # 128 slots: 32 may be fetched and not used
    singles = [chain(1, f"single {number}") for number in range(32)]
    to_disk(client, namespace, *singles, chain(4, "next"), pushes=140)
    for number, keys in enumerate(singles):
        prefetch(client, namespace, keys, within_ns=3600 * SECOND)
        core.work_all()
        if number < LOOK_BATCHES:
            pinning, tenant = core.store.pinning, client.session.tenant
            assert pinning.pin(tenant, namespace, words(keys), 0, 1, 3600 * SECOND, Tier.DRAM).blocks == 1
    for number in range(150):
        client.put(namespace, chain(1, f"evicts {number}"))
        core.work_all()
    there = [in_dram(client, namespace, keys) for keys in singles]
    assert there == [1] * LOOK_BATCHES + [0] * (32 - LOOK_BATCHES)
    prefetch(client, namespace, chain(4, "next"))
    core.work_all()
    assert in_dram(client, namespace, chain(4, "next")) == 4
    assert core.store.prefetching.tally.wasted_bytes == (32 - LOOK_BATCHES) * PAGE_BYTES
    core.audit()


def test_tenants_take_turns_however_urgent_one_of_them_is() -> None:
    core, client, namespace = begin(arenas=4, segments=60)
    other = core.client("other")
    theirs = other.open()
    client.put(namespace, chain(32, "half of memory"))
    to_disk(other, theirs, chain(2, "patient"), pushes=64)
    to_disk(client, namespace, *(chain(2, f"urgent {number}") for number in range(3)), pushes=64)
    for number in range(3):
        prefetch(client, namespace, chain(2, f"urgent {number}"), within_ns=(1 + number) * SECOND)
    prefetch(other, theirs, chain(2, "patient"), within_ns=3600 * SECOND)
    order: list[str] = []
    for _ in range(4):
        core.store.tick()
        core.work()
        there = [f"urgent {number}" for number in range(3) if in_dram(client, namespace, chain(2, f"urgent {number}"))]
        there += ["patient"] * bool(in_dram(other, theirs, chain(2, "patient")))
        order += [name for name in there if name not in order]
    assert order == ["urgent 0", "patient", "urgent 1", "urgent 2"]
    core.audit()


def test_what_a_long_pin_wants_is_wanted_within_seconds() -> None:
    for within_ns, first in ((PINNED_NS - SECOND, "urgent"), (PINNED_NS + SECOND, "pinned")):
        core, client, namespace = begin()
        to_disk(client, namespace, chain(3, "pinned"), chain(3, "urgent"))
        pinning, tenant = core.store.pinning, client.session.tenant
        pinned = pinning.pin(tenant, namespace, words(chain(3, "pinned")), 0, 3, 3600 * SECOND, Tier.DRAM)
        assert pinned.blocks == 3
        prefetch(client, namespace, chain(3, "urgent"), within_ns=within_ns)
        assert first_to_come(client, namespace, "pinned", "urgent") == first
        core.work_all()
        assert in_dram(client, namespace, chain(3, "pinned")) == in_dram(client, namespace, chain(3, "urgent")) == 3


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "the control"])
def test_what_a_pin_wants_is_tried_again_where_there_is_no_room(*, pinned: bool) -> None:
    core, client, namespace = begin()
    to_disk(client, namespace, chain(3))
    keys = [chain(1, f"pushes {number}") for number in range(32)]
    leases = [client.lease(namespace, each, ttl_ns=30 * SECOND) for each in keys if in_dram(client, namespace, each)]
    prefetching, tenant = core.store.prefetching, client.session.tenant
    if pinned:
        core.store.pinning.pin(tenant, namespace, words(chain(3)), 0, 3, 3600 * SECOND, Tier.DRAM)
    else:
        prefetch(client, namespace, chain(3), within_ns=60 * SECOND)
    core.store.tick()
    assert (prefetching.tally.no_room, prefetching.waiting(tenant)) == (1, pinned)
    for _ in range(100):  # it does not keep the owner busy meanwhile, and blocks no prefetch
        core.store.tick()
    assert prefetching.tally.no_room == 1
    core.pass_time(SECOND)
    assert prefetching.tally.no_room == 1 + pinned
    for lease in leases:
        client.release(lease)
    for _ in range(3):
        core.pass_time(SECOND)
        core.work_all()
    assert in_dram(client, namespace, chain(3)) == (3 if pinned else 0)
    assert prefetching.waiting(tenant) == 0
    core.audit()


def test_what_pins_want_counts_apart_from_prefetches() -> None:
    core, client, namespace = begin(segments=80)
    to_disk(client, namespace, *(chain(1, f"many {name}") for name in range(PREFETCHES_PER_TENANT + 1)))
    for name in range(PREFETCHES_PER_TENANT):
        assert prefetch(client, namespace, chain(1, f"many {name}")).prefetch
    assert not prefetch(client, namespace, chain(1, f"many {PREFETCHES_PER_TENANT}")).prefetch
    pinning, tenant = core.store.pinning, client.session.tenant
    pinned = pinning.pin(tenant, namespace, words(chain(1, "many 0")), 0, 1, 3600 * SECOND, Tier.DRAM)
    assert pinning.pins[pinned.pin].fetch
    core.store.prefetching.forget_namespace(namespace)
    assert core.store.prefetching.waiting(tenant) == 0
