"""What the store promises to an outbox: when it speaks, to whom, and that it never repeats itself."""

from collections.abc import Sequence

from kvproto.errors import Outcome
from kvproto.limits import PAGE_BYTES
from kvstore.sessions import Session
from tests.core import ARENA_BYTES, MS, SECOND, Core, chain
from tests.fakes import FakeOutbox

SLOTS = ARENA_BYTES // PAGE_BYTES


def test_each_committed_ticket_has_one_outcome_and_uncommitted_ones_none() -> None:
    core = Core(ticket_ttl_ns=SECOND)
    client = core.client()
    namespace, keys = client.open(), chain(4)
    tickets = client.begin(namespace, keys)
    client.commit(tickets[:2])
    core.finish_all()
    client.store.abort(client.session, tickets[3:])
    core.pass_time(2 * SECOND)
    client.commit(tickets[2:3])
    said = core.outbox.outcomes[client.session.number]
    assert said == {tickets[0]: Outcome.PUBLISHED, tickets[1]: Outcome.PUBLISHED, tickets[2]: Outcome.STALE}


def test_what_is_called_published_is_visible_when_it_is_said() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(3)
    seen: list[int] = []

    class Watching(FakeOutbox):
        def published(self, session: Session, outcomes: Sequence[tuple[int, int]]) -> None:
            seen.append(client.match(namespace, keys))

    core.store._outbox = Watching()
    client.commit(client.begin(namespace, keys))
    core.finish_all()
    assert seen == [1, 2, 3]


def test_a_lease_that_waited_is_answered_once() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.commit(client.begin(namespace, keys))
    client.ask(namespace, keys, wait_ns=SECOND, request=5)
    core.finish_all()
    core.pass_time(2 * SECOND)
    assert [parked.request for _, parked, _, _ in core.outbox.answers] == [5]


def test_arena_gone_is_said_to_each_holder_once_and_to_nobody_else() -> None:
    core = Core(arenas=2)
    holders, stranger, poor = [core.client("rich") for _ in range(2)], core.client("rich"), core.client("poor")
    keys = chain(SLOTS)
    for name in ("a", "b"):
        holders[0].put(holders[0].open(), chain(SLOTS, name))
    core.clock.advance(MS)
    for holder in holders:
        holder.release(holder.lease(holder.open(), chain(SLOTS, "a")))
        holder.release(holder.lease(holder.open(), chain(SLOTS, "b")))
    poor.put(poor.open(), keys)
    core.settle()
    assert [session for session, _ in core.outbox.gone] == [holder.session for holder in holders]
    assert stranger.session not in [session for session, _ in core.outbox.gone]
    assert len({arena for _, arena in core.outbox.gone}) == 1
