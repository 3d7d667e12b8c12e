"""The rules of leases: what they wait for, what they keep in place, and what ends them."""

import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore.sessions import Parked
from tests.core import ARENA_BYTES, BLOCK_BYTES, MARGIN_NS, MS, SECOND, Core, Held, chain, value_of

SLOTS = ARENA_BYTES // PAGE_BYTES  # of one arena, for the smallest blocks


def test_a_leased_slot_is_not_reused_before_the_deadline_and_its_margin() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, old = client.open(), chain(SLOTS, "old")
    client.put(namespace, old)
    held = client.lease(namespace, old, ttl_ns=SECOND)
    content = [client.read(namespace, held, i) for i in range(SLOTS)]
    for after_ns in (0, SECOND, MARGIN_NS - 1):
        core.pass_time(after_ns)
        assert client.put(namespace, chain(1, "new")) == [Grant.FULL]
        assert [client.read(namespace, held, i) for i in range(SLOTS)] == content
    core.pass_time(51 * MS)
    assert client.put(namespace, chain(1, "new")) == [Grant.GRANTED]
    assert core.store.tally.leases_expired == 1
    core.audit()


def test_renewing_moves_the_deadline_and_never_back() -> None:
    core = Core(arenas=1, lease_ttl_ns_max=5 * SECOND)
    client = core.client()
    namespace, old = client.open(), chain(SLOTS, "old")
    client.put(namespace, old)
    held = client.lease(namespace, old, ttl_ns=2 * SECOND)
    now_ns = core.clock.now_ns()
    assert client.store.renew(client.session, held.number, SECOND) == now_ns + 2 * SECOND
    assert client.store.renew(client.session, held.number, 99 * SECOND) == now_ns + 5 * SECOND
    core.audit()
    core.pass_time(5 * SECOND + MARGIN_NS - 1)
    assert client.put(namespace, chain(1, "new")) == [Grant.FULL]
    assert client.store.renew(client.session, held.number, SECOND) == 0, "it is over"
    core.pass_time(50 * MS)
    assert client.put(namespace, chain(1, "new")) == [Grant.GRANTED]
    core.audit()


def test_a_lease_is_never_longer_than_the_limit() -> None:
    core = Core(lease_ttl_ns_max=5 * SECOND)
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.put(namespace, keys)
    assert client.lease(namespace, keys, ttl_ns=1 << 62).deadline_ns == core.clock.now_ns() + 5 * SECOND


def test_a_lease_outlives_its_socket_and_ends_with_its_process() -> None:
    core = Core(arenas=1)
    dying, other = core.client(), core.client()
    namespace, old = dying.open(), chain(SLOTS, "old")
    dying.put(namespace, old)
    dying.lease(namespace, old, ttl_ns=60 * SECOND)
    dying.store.detach(dying.session)
    core.settle()
    assert other.put(other.open(), chain(1, "new")) == [Grant.FULL]
    core.audit()
    dying.store.exited(dying.session)
    assert other.put(namespace, chain(1, "new")) == [Grant.GRANTED]
    core.audit()
    core.pass_time(61 * SECOND)  # where the lease would have been due
    core.audit()


def test_releasing_anothers_lease_or_one_twice_is_no_news() -> None:
    core = Core(arenas=1)
    client, other = core.client(), core.client()
    namespace, keys = client.open(), chain(2)
    client.put(namespace, keys)
    held = client.lease(namespace, keys)
    other.store.release(other.session, [held.number, 0, 1 << 63])
    assert other.store.renew(other.session, held.number, SECOND) == 0
    assert len(core.store.leases) == 1
    core.audit()
    client.release(held)
    client.release(held)
    core.audit()
    assert not core.store.leases


def test_a_lease_stops_at_the_first_absent_block_and_may_begin_anywhere() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(6)
    client.put(namespace, keys[:4])
    assert client.lease(namespace, keys).blocks == 4
    assert client.lease(namespace, keys[2:]).blocks == 2
    assert client.ask(namespace, keys[4:]) is None
    core.audit()


# -- waiting for one's own --------------------------------------------------------------------------------------


def test_a_lease_waits_for_blocks_of_its_own_session() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(3)
    tickets = client.begin(namespace, keys)
    assert isinstance(client.ask(namespace, keys, wait_ns=SECOND, request=77), Parked)
    client.commit(tickets)
    core.finish(0)
    assert not core.outbox.answers
    core.audit()
    core.finish_all()
    (session, parked, lease, locations) = core.outbox.answers.pop()
    assert (session, parked.request) == (client.session, 77)
    assert lease is not None
    held = client.held(lease, locations)
    assert [client.read(namespace, held, i) for i in range(3)] == [value_of(key, BLOCK_BYTES) for key in keys]


def test_a_lease_does_not_wait_for_blocks_of_others_nor_without_being_told_to() -> None:
    core = Core()
    writer, reader = core.client(), core.client()
    namespace, keys = writer.open(), chain(3)
    writer.put(namespace, keys[:1])
    writer.begin(namespace, keys)
    answer = reader.ask(reader.open(), keys, wait_ns=SECOND)
    assert isinstance(answer, Held)
    assert answer.blocks == 1
    mine = writer.ask(namespace, keys, wait_ns=0)
    assert isinstance(mine, Held)
    assert mine.blocks == 1


def test_a_wait_ends_at_its_deadline_with_what_is_there() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(2)
    client.put(namespace, keys[:1])
    client.begin(namespace, keys)
    client.ask(namespace, keys, wait_ns=300 * MS)
    core.pass_time(300 * MS - 1)
    assert not core.outbox.answers
    core.pass_time(51 * MS)
    ((_, _, lease, locations),) = core.outbox.answers
    assert lease is not None
    assert len(locations) == 1
    core.audit()


@pytest.mark.parametrize("end", ["abort", "lapse"])
def test_a_wait_ends_when_its_own_ticket_does(end: str) -> None:
    core = Core(ticket_ttl_ns=SECOND)
    client = core.client()
    namespace, keys = client.open(), chain(2)
    tickets = client.begin(namespace, keys)
    client.ask(namespace, keys, wait_ns=60 * SECOND)
    if end == "abort":
        client.store.abort(client.session, tickets)
        client.store.flush_outcomes(client.session)
    else:
        core.pass_time(SECOND + 50 * MS)
        core.pass_time(50 * MS)
    assert [lease for _, _, lease, _ in core.outbox.answers] == [None]
    core.audit()


def test_a_closed_session_is_not_answered() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.commit(client.begin(namespace, keys))
    client.ask(namespace, keys, wait_ns=SECOND)
    client.store.detach(client.session)
    core.finish_all()
    core.pass_time(2 * SECOND)
    assert not core.outbox.answers
    assert not core.outbox.outcomes
    core.audit()


def test_a_lease_of_blocks_that_do_not_continue_one_another_keeps_each_in_place() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(4, "apart")
    for key in keys:
        client.put(namespace, [key])
    held = client.lease(namespace, keys)
    assert client.put(namespace, chain(SLOTS, "new")).count(Grant.GRANTED) == SLOTS - 4
    assert client.delete(namespace, keys) == [4]
    assert client.put(namespace, chain(1, "more")) == [Grant.GRANTED], "others still give way"
    assert [client.read(namespace, held, i) for i in range(4)] == [value_of(key, BLOCK_BYTES) for key in keys]
    client.release(held)
    core.audit()


def test_a_leased_block_keeps_what_it_continues_though_all_of_it_is_deleted() -> None:
    core = Core(arenas=1)
    client = core.client()
    namespace, keys = client.open(), chain(SLOTS)
    client.put(namespace, keys)
    held = client.lease(namespace, keys)
    for key in reversed(keys):
        assert client.delete(namespace, [key]) == [1]
        core.audit()
    assert client.put(namespace, chain(1, "new")) == [Grant.FULL]
    assert [client.read(namespace, held, i) for i in range(SLOTS)] == [value_of(key, BLOCK_BYTES) for key in keys]
    client.release(held)
    core.audit()
    assert core.store.tables.book[2] == 0
