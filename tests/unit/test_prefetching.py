"""Prefetches: what they bring, what they wait for, what they cost."""

import numpy as np

from kvproto.limits import PAGE_BYTES, PREFETCHES_PER_TENANT
from kvproto.policy_frames import Fetching, Tier
from kvstore.prefetching import GRACE_NS
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


def to_disk(client: Client, namespace: Namespace, *chains: list[bytes]) -> None:
    """Store chains and have them leave DRAM."""
    for keys in chains:
        client.put(namespace, keys)
        client.core.work_all()
    for number in range(32):
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
    first = prefetch(client, namespace, chain(3), within_ns=9 * SECOND)
    assert prefetch(client, namespace, chain(3), within_ns=8 * SECOND).prefetch == first.prefetch
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
    assert len(core.store.prefetching._queue) < 1000
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
    assert one.prefetch == two.prefetch, "it is fetched once"
    lonely = prefetch(client, namespace, chain(3, "lonely"))
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
    assert len(core.store.prefetching._queue) < 1000
    assert core.store.prefetching.waiting(client.session.tenant) == 1
    core.work_all()
    assert in_dram(client, namespace, chain(3)) == 3
