"""The rules that two people would otherwise decide differently: writing, tickets, parents."""

import pytest
import xxhash

from kvproto.errors import Grant, LimitError, NamespaceError, Outcome, TicketError, UsageError
from kvproto.limits import LEASES_PER_SESSION, NAMESPACES_PER_SESSION, PAGE_BYTES, PARKED_PER_SESSION, TENANTS
from kvstore.sessions import Parked
from tests.core import ARENA_BYTES, BLOCK_BYTES, MS, SECOND, Core, Held, chain, words

SLOTS = ARENA_BYTES // PAGE_BYTES  # of one arena, for the smallest blocks


def test_what_was_stored_is_fetched() -> None:
    core = Core()
    writer, reader = core.client(), core.client()
    keys = chain(10)
    assert writer.put(writer.open(), keys) == [Grant.GRANTED] * 10
    assert reader.match(reader.open(), keys) == 10
    assert reader.fetch(reader.open(), keys) == 10
    assert writer.put(writer.open(), keys) == [Grant.KNOWN] * 10
    core.audit()


def test_of_two_clients_that_reserve_one_key_the_second_is_told_pending_for_good() -> None:
    core = Core()
    first, second = core.client(), core.client()
    namespace, keys = first.open(), chain(3)
    tickets = first.begin(namespace, keys)
    answers = second.reserve(second.open(), keys)
    assert [answer.grant for answer in answers] == [Grant.PENDING] * 3
    assert not any(answer.ticket for answer in answers)
    assert not second.session.tickets
    first.commit(tickets)
    core.finish_all()
    assert second.fetch(namespace, keys) == 3
    assert second.session.number not in core.outbox.outcomes
    core.audit()


def test_if_the_first_writer_fails_children_that_wait_on_its_block_are_discarded() -> None:
    core = Core()
    first, second = core.client(), core.client()
    namespace, keys = first.open(), chain(4)
    mine = first.begin(namespace, keys[:2])
    theirs = second.begin(second.open(), keys)
    assert len(theirs) == 2
    first.store.abort(first.session, mine)
    core.settle()
    assert second.match(namespace, keys) == 0
    second.commit(theirs)
    assert [second.outcome(ticket) for ticket in theirs] == [Outcome.DISCARDED] * 2
    assert second.put(namespace, keys) == [Grant.GRANTED] * 4
    core.audit()


def test_the_first_published_value_wins_within_a_tenant() -> None:
    core = Core()
    first, second = core.client(), core.client()
    namespace, keys = first.open(), chain(1)
    first.put(namespace, keys)
    assert second.reserve(second.open(), keys)[0].grant is Grant.KNOWN
    assert second.fetch(namespace, keys) == 1


def test_nothing_is_visible_before_its_copy_has_ended() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(2)
    tickets = client.begin(namespace, keys)
    assert client.match(namespace, keys) == 0
    client.commit(tickets)
    assert client.match(namespace, keys) == 0
    assert client.ask(namespace, keys) is None
    core.finish(0)
    assert client.match(namespace, keys) == 1
    core.finish(0)
    assert client.match(namespace, keys) == 2
    assert [client.outcome(ticket) for ticket in tickets] == [Outcome.PUBLISHED] * 2


def test_a_child_whose_copy_ends_first_is_not_in_the_lead_run_before_its_parent() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(2)
    client.commit(client.begin(namespace, keys))
    core.finish(1)
    assert client.store.match(namespace, words(keys), 0, 2).pending == 2
    assert client.match(namespace, keys) == 0
    core.finish(0)
    assert client.fetch(namespace, keys) == 2


def test_the_published_bytes_are_those_the_checksum_was_taken_of() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    answer = client.reserve(namespace, keys)[0]
    client.write(namespace, answer.page, b"\1" * BLOCK_BYTES)
    client.commit([answer.ticket])
    client.write(namespace, answer.page, b"\2" * BLOCK_BYTES)  # after COMMIT: a client that scribbles
    core.finish()
    client.write(namespace, answer.page, b"\3" * BLOCK_BYTES)
    held = client.lease(namespace, keys)
    assert client.read(namespace, held) == b"\2" * BLOCK_BYTES
    assert core.checksum(namespace, keys[0]) == xxhash.xxh3_64_intdigest(b"\2" * BLOCK_BYTES)


# -- tickets ----------------------------------------------------------------------------------------------------


def test_a_lapsed_ticket_frees_the_key_and_commit_answers_stale() -> None:
    core = Core(ticket_ttl_ns=SECOND)
    slow, other = core.client(), core.client()
    namespace, keys = slow.open(), chain(2)
    tickets = slow.begin(namespace, keys)
    core.pass_time(SECOND - 1)
    assert other.reserve(other.open(), keys)[0].grant is Grant.PENDING
    core.pass_time(50 * MS)
    assert other.put(namespace, keys) == [Grant.GRANTED] * 2
    assert slow.commit(tickets) == []
    assert [slow.outcome(ticket) for ticket in tickets] == [Outcome.STALE] * 2
    assert other.fetch(namespace, keys) == 2
    core.audit()


@pytest.mark.parametrize("answer", ["commit", "abort", "detach"])
def test_the_span_of_a_lapsed_ticket_is_out_of_use_until_it_is_answered(answer: str) -> None:
    core = Core(ticket_ttl_ns=SECOND)
    client = core.client(ring_pages=2)
    namespace = client.open()
    tickets = client.begin(namespace, chain(2))
    core.pass_time(2 * SECOND)
    assert client.reserve(namespace, chain(1, "b"))[0].grant is Grant.BUSY
    assert client.session.ring.free_pages == 0
    if answer == "commit":
        client.commit(tickets)
    elif answer == "abort":
        client.store.abort(client.session, tickets)
    else:
        client.store.detach(client.session)
    assert client.session.ring.free_pages == 2
    assert not client.session.tickets
    core.audit()


def test_busy_when_the_ring_is_full_and_the_rest_of_the_chain_with_it() -> None:
    core = Core()
    client = core.client(ring_pages=3)
    namespace, keys = client.open(), chain(5)
    answers = client.reserve(namespace, keys)
    assert [answer.grant for answer in answers] == [Grant.GRANTED] * 3 + [Grant.BUSY] * 2
    client.commit([answer.ticket for answer in answers[:3]])
    core.finish_all()
    assert client.put(namespace, keys) == [Grant.KNOWN] * 3 + [Grant.GRANTED] * 2
    core.audit()


def test_spans_of_one_ring_do_not_overlap() -> None:
    core = Core()
    client = core.client(ring_pages=32)
    small, large = client.open(), client.open(3 * PAGE_BYTES - 5)
    pages = [(answer.page, 1) for answer in client.reserve(small, chain(5))]
    pages += [(answer.page, 3) for answer in client.reserve(large, chain(5))]
    used = [page + i for page, count in pages for i in range(count)]
    assert len(set(used)) == len(used) == 20
    core.audit()


def test_a_block_larger_than_the_ring_is_refused_as_quota() -> None:
    core = Core()
    client = core.client(ring_pages=1)
    assert client.reserve(client.open(2 * PAGE_BYTES), chain(1))[0].grant is Grant.QUOTA
    tool = core.client(ring_pages=0)
    assert tool.reserve(tool.open(), chain(1))[0].grant is Grant.QUOTA
    core.audit()


def test_tickets_of_another_session_invented_or_used_twice_are_refused() -> None:
    core = Core()
    client, other = core.client(), core.client()
    namespace = client.open()
    tickets = client.begin(namespace, chain(2))
    for forged in (tickets[0], 0, 1, 1 << 63):
        with pytest.raises(TicketError):
            other.commit([forged])
        with pytest.raises(TicketError):
            other.store.abort(other.session, [forged])
    client.commit(tickets[:1])
    with pytest.raises(TicketError):
        client.commit(tickets[:1])
    with pytest.raises(TicketError):
        client.store.abort(client.session, tickets[:1])
    core.finish_all()
    with pytest.raises(TicketError):
        client.commit(tickets[:1])
    client.commit(tickets[1:])
    core.finish_all()
    assert client.fetch(namespace, chain(2)) == 2


@pytest.mark.parametrize("bad", ["foreign", "twice"])
def test_a_commit_with_one_bad_ticket_changes_nothing_so_that_nothing_leaks(bad: str) -> None:
    core = Core()
    client = core.client()
    tickets = client.begin(client.open(), chain(3))
    with pytest.raises(TicketError):
        client.commit([*tickets, 12345 if bad == "foreign" else tickets[0]])
    core.audit()
    client.store.exited(client.session)  # what the hot server does with such a client
    core.settle()
    core.audit()
    assert core.store.tables.book[2] == 0, "blocks are lost for good"
    assert not core.store.sessions


def test_copies_of_a_dead_client_are_discarded_and_its_blocks_never_visible() -> None:
    core = Core()
    dying, other = core.client(), core.client()
    namespace, keys = dying.open(), chain(4)
    tickets = dying.begin(namespace, keys)
    dying.commit(tickets[:2])
    dying.store.detach(dying.session)
    assert dying.session.number in core.store.sessions, "its ring is in use while copies run"
    core.settle()
    assert other.match(other.open(), keys) == 0
    core.finish_all()
    assert other.match(namespace, keys) == 0
    assert core.store.tally.discarded == 2
    assert core.store.tables.book[2] == 0
    assert dying.session.number not in core.store.sessions
    core.audit()


def test_copies_of_a_dead_client_that_end_before_its_tickets_are_ended_publish_nothing() -> None:
    core = Core(slice_steps=1)
    dying, other = core.client(), core.client()
    namespace, keys = dying.open(), chain(6)
    for key in keys:  # chains of one: what one of them loses is not lost with another
        dying.commit(dying.begin(namespace, [key]))
    dying.store.detach(dying.session)
    assert len(dying.session.tickets) == 6, "there is more to end than a slice does"
    core.finish_all()
    assert not any(other.match(other.open(), [key]) for key in keys)
    core.settle()
    assert not any(other.match(other.open(), [key]) for key in keys)
    assert core.store.tables.book[2] == 0
    core.audit()


def test_a_reused_key_is_not_published_by_the_copy_of_its_first_writer() -> None:
    core = Core()
    dying, other = core.client(), core.client()
    namespace, keys = dying.open(), chain(1)
    dying.commit(dying.begin(namespace, keys))
    dying.store.detach(dying.session)
    core.settle()
    tickets = other.begin(other.open(), keys)
    core.finish(0)  # the dead client's
    assert other.match(namespace, keys) == 0
    other.commit(tickets)
    core.finish_all()
    assert other.fetch(namespace, keys) == 1
    core.audit()


# -- parents ----------------------------------------------------------------------------------------------------


def test_a_parent_must_be_resident_pending_or_in_the_batch() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(6)
    assert client.put(namespace, keys[1:3], parent=keys[0]) == [Grant.NO_PARENT] * 2
    tickets = client.begin(namespace, keys[:2])
    pending = client.begin(namespace, keys[2:4], parent=keys[1])
    assert len(pending) == 2
    client.commit(tickets + pending)
    core.finish_all()
    assert client.put(namespace, keys[4:], parent=keys[3]) == [Grant.GRANTED] * 2
    assert client.fetch(namespace, keys) == 6
    core.audit()


def test_a_known_block_after_an_absent_parent_roots_what_follows_it() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(3)
    client.put(namespace, keys[:2])
    grants = client.put(namespace, keys[1:], parent=chain(1, "absent")[0])
    assert grants == [Grant.KNOWN, Grant.GRANTED]
    core.audit()


def test_a_key_twice_in_a_chain_is_pending_the_second_time() -> None:
    core = Core()
    client = core.client()
    namespace, (a, b, c) = client.open(), chain(3)
    assert client.put(namespace, [a, b, a, c]) == [Grant.GRANTED, Grant.GRANTED, Grant.PENDING, Grant.GRANTED]
    core.audit()
    assert client.fetch(namespace, [a, c]) == 2


# -- limits -----------------------------------------------------------------------------------------------------


def test_more_leases_than_the_limit_are_misses() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.put(namespace, keys)
    held = [client.lease(namespace, keys) for _ in range(LEASES_PER_SESSION)]
    assert client.ask(namespace, keys) is None
    assert core.store.tally.refused_quota == 1
    client.release(held[0])
    assert isinstance(client.ask(namespace, keys), Held)


def test_more_waiting_leases_than_the_limit_are_answered_at_once() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.begin(namespace, keys)
    for _ in range(PARKED_PER_SESSION):
        assert isinstance(client.ask(namespace, keys, wait_ns=SECOND), Parked)
    assert client.ask(namespace, keys, wait_ns=SECOND) is None


def test_more_tenants_or_namespaces_than_the_limit_are_refused() -> None:
    core = Core()
    client = core.client("t0")
    for number in range(1, TENANTS):
        core.client(f"t{number}")
    with pytest.raises(LimitError):
        core.client("one more")
    for number in range(NAMESPACES_PER_SESSION):
        client.open(model=f"m{number}")
    with pytest.raises(LimitError):
        client.open(model="one more")
    assert client.open(model="m0").number in client.session.namespaces
    core.audit()


def test_blocks_beyond_an_arena_are_refused() -> None:
    core = Core()
    client = core.client()
    with pytest.raises(UsageError):
        client.open(ARENA_BYTES + 1)
    assert client.open(ARENA_BYTES).slot_bytes == ARENA_BYTES


def test_a_namespace_that_this_session_did_not_open_is_refused() -> None:
    core = Core()
    client, other = core.client(), core.client()
    namespace = client.open()
    assert client.store.namespace(client.session, namespace.number) is namespace
    with pytest.raises(NamespaceError):
        other.store.namespace(other.session, namespace.number)


def test_a_draining_daemon_takes_no_new_blocks_and_still_serves() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(2)
    client.put(namespace, keys)
    core.store.draining = True
    assert client.put(namespace, chain(1, "b")) == [Grant.DRAINING]
    assert client.fetch(namespace, keys) == 2
    core.store.draining = False
    assert client.put(namespace, chain(1, "b")) == [Grant.GRANTED]
