"""Blocks that nobody uses for longer than their tenant's quota says."""

from dataclasses import asdict

import pytest

from kvproto.ids import BlockKey
from kvproto.limits import PAGE_BYTES
from kvproto.policy_frames import Tier
from kvstore.ageing import SLICE, STEPS, STEPS_A_TOP
from kvstore.insight.explain import MissQuestion, explain
from kvstore.quotas import Quota
from kvstore.tier.codec import Wish
from kvstore.tier.demotion import Admission
from kvstore.tier.disk import DiskLimits
from tests.core import SECOND, Core, chain, key_of, words
from tests.unit.test_disk import SEGMENT_BYTES

MINUTE = 60 * SECOND
TTL = Quota(unused_ttl_s=600.0)
LATE = MINUTE  # that a round may be


def live(core: Core, ns: int) -> None:
    """Let time pass as a daemon does, which looks whenever something is due."""
    end_ns = core.clock.ns + ns
    while core.clock.ns < end_ns:
        due_ns = core.store.next_tick_ns()
        core.clock.ns = min(end_ns, max(core.clock.ns + 1, due_ns if due_ns is not None else end_ns))
        core.store.tick()
    core.settle()
    core.audit()


def test_what_nobody_uses_is_dropped_and_what_is_used_stays() -> None:
    core = Core(arenas=2, quotas={"t": TTL})
    client, other = core.client("t"), core.client("other")
    namespace = client.open()
    for name in ("used", "unused"):
        client.put(namespace, chain(3, name))
    other.put(other.open(), chain(3, "unused"))
    live(core, 9 * MINUTE)
    assert client.fetch(namespace, chain(3, "used")) == 3
    assert client.match(namespace, chain(3, "unused")) == 3, "not before its time"
    live(core, MINUTE + LATE)
    assert client.match(namespace, chain(3, "unused")) == 0
    assert client.match(namespace, chain(3, "used")) == 3
    assert other.match(other.open(), chain(3, "unused")) == 3, "of whom nothing is said"
    assert core.store.ageing.dropped == {client.session.tenant: 3}
    question = MissQuestion("t", namespace.digest, tuple(map(BlockKey, chain(3, "unused")[1:])))
    assert explain(core.store, question).cause == "unused"


def test_what_is_pinned_stays_and_goes_when_its_pin_has_ended() -> None:
    core = Core(arenas=2, quotas={"t": TTL})
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(4))
    core.store.pinning.pin(client.session.tenant, namespace, words(chain(2)), 0, 2, 30 * MINUTE, Tier.DRAM)
    live(core, 10 * MINUTE + LATE)
    assert client.match(namespace, chain(4)) == 2, "what continues it is not pinned"
    live(core, 15 * MINUTE)
    assert client.match(namespace, chain(4)) == 2
    live(core, 5 * MINUTE + LATE)
    assert client.match(namespace, chain(4)) == 0


def test_it_goes_from_disk_too() -> None:
    limits = DiskLimits(8 * SEGMENT_BYTES, SEGMENT_BYTES, Admission.ALL, codec=Wish.RAW)
    core = Core(arenas=1, disk=limits, quotas={"t": TTL})
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(8))
    core.work_all()
    for number in range(30):
        client.put(namespace, [key_of(number)])
        core.work_all()
    assert core.row(namespace, chain(8)[0]), "on disk"
    live(core, 10 * MINUTE + LATE)
    assert not core.row(namespace, chain(8)[0])
    core.work_all()  # once the index has forgotten it
    assert int(core.store.tables.book[8]) == 0, "nothing is left there"


def test_a_choice_begins_and_ends_it_and_many_blocks_go_in_slices() -> None:
    core = Core(arenas=3)
    client = core.client()
    namespace = client.open()
    assert core.store.ageing.next_ns() is None
    for number in range(40):
        client.put(namespace, [key_of(number)])
    live(core, 20 * MINUTE)
    assert client.match(namespace, [key_of(0)]) == 1
    core.store.choose_quota("t", asdict(TTL))
    live(core, SECOND)
    assert client.match(namespace, [key_of(0)]) == 0
    assert core.store.ageing.dropped.total() == 40
    client.put(namespace, [key_of(0)])
    core.store.choose_quota("t", {})
    assert core.store.ageing.next_ns() is None
    live(core, 20 * MINUTE)
    assert client.match(namespace, [key_of(0)]) == 1
    assert SLICE > 1000


@pytest.mark.parametrize("first", [True, False])
def test_what_others_continue_goes_with_the_last_of_them(first: bool) -> None:
    core = Core(arenas=2, quotas={"t": TTL})
    client = core.client()
    namespace = client.open()
    used, unused = [*chain(3), key_of("b")], chain(6)
    for keys in (used, unused) if first else (unused, used):
        client.put(namespace, keys)
    live(core, 8 * MINUTE)
    client.fetch(namespace, used)
    live(core, 2 * MINUTE + LATE)
    assert (client.match(namespace, unused), client.match(namespace, used)) == (3, 4)
    live(core, 8 * MINUTE + LATE)
    assert not core.store.tenants["t"].entries()


def test_a_beginning_that_is_used_stays_when_what_continues_it_goes() -> None:
    core = Core(arenas=2, quotas={"t": TTL})
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(6))
    live(core, 8 * MINUTE)
    client.fetch(namespace, chain(2))
    live(core, 2 * MINUTE + LATE)
    assert client.match(namespace, chain(6)) == 2


def test_a_chain_longer_than_a_tick_goes_in_several() -> None:
    core = Core(arenas=1, arena_bytes=1200 * PAGE_BYTES, quotas={"t": TTL})
    client = core.client(ring_pages=2048)
    namespace = client.open()
    keys = chain(1100)
    for start in range(0, 1100, 100):
        client.put(namespace, keys[start : start + 100], parent=keys[start - 1] if start else None)
    live(core, 10 * MINUTE + LATE)
    assert client.match(namespace, keys) == 0
    assert core.store.ageing.dropped.total() == 1100 > 2 * STEPS


def test_short_chains_go_a_few_a_tick_however_many_are_due() -> None:
    core = Core(arenas=8, quotas={"t": TTL})
    client = core.client(ring_pages=512)
    namespace = client.open()
    for number in range(100):
        client.put(namespace, [key_of(number)])
    core.clock.advance(11 * MINUTE)
    most = -(-STEPS // STEPS_A_TOP)
    assert most < 50, "a tick is to take half a millisecond"
    for _ in range(3):
        before = core.store.ageing.dropped.total()
        core.store.ageing.tick(core.clock.ns)
        while core.store.sweeper.jobs.queued:
            core.store.sweeper.tick(core.clock.ns)
        assert 10 < core.store.ageing.dropped.total() - before <= most
    live(core, SECOND)
    assert core.store.ageing.dropped.total() == 100


def test_a_lease_reads_what_is_dropped_under_it() -> None:
    core = Core(arenas=2, quotas={"t": TTL})
    client = core.client()
    namespace = client.open()
    client.put(namespace, chain(2))
    held = client.lease(namespace, chain(2), 60 * SECOND)
    assert client.match(namespace, chain(2)) == 2
    core.store.tables.blocks["touched"][1:3] = 1
    live(core, 40 * SECOND)
    assert client.match(namespace, chain(2)) == 0
    assert client.read(namespace, held)
    client.release(held)
    live(core, SECOND)
