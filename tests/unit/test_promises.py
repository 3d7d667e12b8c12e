"""What a lease is promised while its blocks are on their way: little at a time, and for as long as it waits."""

import pytest

from kvproto.errors import Grant
from kvproto.limits import LEASE_MARGIN_NS
from kvstore.sessions import Namespace
from kvstore.streams import PROMISE_NS, promise_ns
from kvstore.tier.orders import Load, Outcome
from tests.core import MS, SECOND, Client, Core, Held, chain, words
from tests.unit import test_restart
from tests.unit.test_disk import begin, make, put

TTL_NS, WAIT_NS = 100 * MS, 50 * SECOND


def half_there() -> tuple[Core, Client, Namespace, list[bytes]]:
    """A chain of eight blocks of which four lie in DRAM, and a drive that has not answered yet."""
    core = make()
    client, namespace = begin(core)
    keys = chain(8, "first")
    put(client, namespace, keys)
    put(client, namespace, chain(12, "second"))
    assert 0 < client.store.match(namespace, words(keys), 0, 8).disk < 8
    return core, client, namespace, keys


def ask(client: Client, namespace: Namespace, keys: list[bytes], ttl_ns: int = TTL_NS) -> Held:
    held = client.ask(namespace, keys, ttl_ns=ttl_ns, wait_ns=WAIT_NS)
    assert isinstance(held, Held)
    assert client.store.leases[held.number].stream is not None
    return held


def test_a_client_that_waits_is_promised_more_again_and_again() -> None:
    core, client, namespace, keys = half_there()
    held = ask(client, namespace, keys)
    there, deadline_ns, until_ns = held.blocks, held.deadline_ns, core.clock.ns + WAIT_NS
    while core.clock.ns < until_ns - SECOND:
        assert core.clock.ns < deadline_ns <= core.clock.ns + PROMISE_NS, "promised without a gap, and little at a time"
        core.pass_time(300 * MS)
        for ready in core.outbox.readies:
            assert (ready.locations, ready.left) == ([], 8 - there)
            assert ready.deadline_ns > deadline_ns
            deadline_ns = ready.deadline_ns
        assert len(core.outbox.readies) <= 1
        core.outbox.readies.clear()
        assert client.store.leases[held.number].deadline_ns == deadline_ns
        core.audit()
    core.work_all()
    assert [(len(ready.locations), ready.left) for ready in core.outbox.readies][-1][1] == 0
    assert sum(len(ready.locations) for ready in core.outbox.readies) == 8 - there
    assert core.outbox.readies[-1].deadline_ns <= core.clock.ns + PROMISE_NS


def test_who_reads_for_longer_than_it_waits_is_promised_that_once() -> None:
    core, client, namespace, keys = half_there()
    held = ask(client, namespace, keys, ttl_ns=WAIT_NS + SECOND)
    assert held.deadline_ns == core.clock.ns + WAIT_NS + SECOND
    core.pass_time(WAIT_NS - SECOND)
    assert core.outbox.readies == []
    core.pass_time(2 * SECOND)
    assert [(ready.locations, ready.left) for ready in core.outbox.readies] == [([], 0)], "the wait is over"


@pytest.mark.parametrize(
    ("ttl_ns", "wait_ns", "promised_ns"),
    [
        (TTL_NS, 0, TTL_NS), (TTL_NS, SECOND, TTL_NS + SECOND), (TTL_NS, WAIT_NS, PROMISE_NS),
        (5 * SECOND, WAIT_NS, 5 * SECOND), (5 * SECOND, SECOND, 5 * SECOND),
    ],
)  # fmt: skip
def test_a_promise_is_no_longer_than_it_needs_to_be(ttl_ns: int, wait_ns: int, promised_ns: int) -> None:
    assert promise_ns(ttl_ns, wait_ns) == promised_ns


def test_a_successor_need_not_wait_as_long_as_a_client_that_is_dead_would_have() -> None:
    for ttl_ns, blocked in ((TTL_NS, False), (30 * SECOND, True)):  # the second one is the control
        core, client, namespace, keys = half_there()
        ask(client, namespace, keys, ttl_ns)
        rest = client.ask(namespace, chain(12, "second"), ttl_ns=ttl_ns)
        assert isinstance(rest, Held)
        core.pass_time(10 * SECOND)  # what is promised anew counts
        later = test_restart.successor(core)
        later.pass_time(PROMISE_NS + LEASE_MARGIN_NS + 100 * MS)
        later.work_all()
        newcomer = later.client()
        grants = newcomer.put(newcomer.open(), chain(4, "new"))
        assert (Grant.GRANTED not in grants) == blocked
        later.audit()


def test_what_was_promised_to_a_client_that_lives_is_kept_by_a_successor() -> None:
    core, client, namespace, keys = half_there()
    held = ask(client, namespace, keys)
    core.pass_time(1500 * MS)
    deadline_ns = core.outbox.readies[-1].deadline_ns
    assert deadline_ns > held.deadline_ns
    before = [client.read(namespace, held, i) for i in range(held.blocks)]
    later = test_restart.successor(core)
    newcomer = later.client()
    while later.clock.ns + 100 * MS < deadline_ns:
        newcomer.put(newcomer.open(), chain(16, later.clock.ns))
        assert [client.read(namespace, held, i) for i in range(held.blocks)] == before
        later.pass_time(100 * MS)
    later.pass_time(SECOND)
    later.work_all()
    newcomer.put(newcomer.open(), chain(16, "others"))
    assert [client.read(namespace, held, i) for i in range(held.blocks)] != before, "the control: it can be overwritten"


def test_an_owner_that_is_late_ends_no_lease_that_still_waits() -> None:
    core, client, namespace, keys = half_there()
    held = ask(client, namespace, keys)
    core.pass_time(10 * SECOND)
    assert held.number in core.store.leases
    assert core.outbox.readies[-1].deadline_ns > core.clock.ns
    plain = client.lease(namespace, keys[:1], ttl_ns=TTL_NS)
    core.pass_time(10 * SECOND)
    assert plain.number not in core.store.leases, "the control"
    core.audit()


def test_what_was_deleted_meanwhile_is_promised_no_more() -> None:
    core, client, namespace, keys = half_there()
    held = ask(client, namespace, keys)
    core.store.delete(namespace, words(keys[:1]), 0, 1, lambda _: None)
    core.store.tick()
    core.pass_time(5 * SECOND)
    assert core.outbox.readies == []
    core.pass_time(SECOND)
    assert held.number not in core.store.leases
    core.work_all()
    core.audit()


def test_a_daemon_that_allows_short_leases_only_promises_those() -> None:
    core, client, namespace, keys = half_there()
    object.__setattr__(core.store.limits, "lease_ttl_ns_max", 200 * MS)
    held = ask(client, namespace, keys)
    assert held.deadline_ns == core.clock.ns + 200 * MS
    for _ in range(50):
        core.pass_time(50 * MS)
    assert held.number in core.store.leases
    assert 10 <= len(core.outbox.readies) <= 50


def test_a_lease_that_falls_short_withholds_nothing_beyond_it_from_a_successor() -> None:
    core, client, namespace, keys = half_there()
    last = core.row(namespace, keys[7])
    middle = ask(client, namespace, keys[6:])
    core.work_all()
    client.release(middle)
    rows = core.store.tables.blocks
    assert rows["lease_until_ns"][last] == 0, "what was given back is not withheld"
    core.drive.fault = lambda order: Outcome.FAILED if isinstance(order, Load) else None
    held = ask(client, namespace, keys, ttl_ns=30 * SECOND)
    assert rows["lease_until_ns"][last] == held.deadline_ns
    core.work_all()
    assert core.outbox.readies[-1].left == 0
    assert rows["lease_until_ns"][last] == 0, "nobody was ever told of it"
    other = client.lease(namespace, keys[6:], ttl_ns=20 * SECOND)
    ask(client, namespace, keys, ttl_ns=30 * SECOND)
    core.work_all()
    assert rows["lease_until_ns"][last] >= other.deadline_ns, "another client was told of it"
    end = core.row(namespace, keys[held.blocks - 1])
    assert rows["lease_until_ns"][end] >= held.deadline_ns, "the control: what was told of is withheld"
    core.audit()
