"""Arenas that were given up: what those who still map them see, what it costs, and when they are forgotten."""

import pytest

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from tests.core import ARENA_BYTES, BLOCK_BYTES, MS, Client, Core, chain, value_of
from tests.unit.test_room import fill

SLOTS = ARENA_BYTES // PAGE_BYTES


def recycled(core: Core) -> tuple[Client, Client, int]:
    """A tenant that mapped an arena which was then taken away and punched: its client, the other's, the arena."""
    rich, poor = core.client("rich", 256), core.client("poor")
    keys = fill(core, rich, core.store.arenas.positions)
    rich.release(rich.lease(rich.open(), keys))
    core.clock.advance(MS)
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.BUSY]
    ((_, arena),) = core.outbox.gone
    core.settle()
    return rich, poor, arena


def test_a_stale_map_reads_zeros_and_never_another_tenants_bytes() -> None:
    core = Core(arenas=2)
    rich, poor, arena = recycled(core)
    assert poor.put(poor.open(), chain(SLOTS, "poor")) == [Grant.GRANTED] * SLOTS
    assert not rich.maps[arena].any()
    held = poor.lease(poor.open(), chain(SLOTS, "poor"))
    assert arena not in {of for of, _ in held.locations}
    core.audit()


def test_holders_are_told_that_an_arena_is_gone_and_it_is_closed_when_all_have_answered() -> None:
    core = Core(arenas=2)
    rich, _, arena = recycled(core)
    assert [(session, gone) for session, gone in core.outbox.gone] == [(rich.session, arena)]
    assert core.memory.closed == []
    core.audit()
    rich.drop_arena(arena)
    assert core.memory.closed == [arena]
    rich.drop_arena(arena)  # twice is no news
    rich.drop_arena(999)
    core.audit()


@pytest.mark.parametrize("end", ["detach", "exit"])
def test_a_closed_session_keeps_its_stale_arenas_until_its_process_is_gone(end: str) -> None:
    core = Core(arenas=2)
    rich, _, arena = recycled(core)
    if end == "detach":
        core.store.detach(rich.session)
        assert core.memory.closed == []
        core.audit()
    core.store.exited(rich.session)
    assert core.memory.closed == [arena]
    assert rich.session.number not in core.store.sessions
    core.audit()


def test_what_a_late_reader_brings_back_is_charged_to_its_tenant() -> None:
    core = Core(arenas=2)
    rich, poor, arena = recycled(core)
    assert core.store.arenas.stale_bytes() == 0
    for page in range(SLOTS):
        core.memory.read_late(arena, page * PAGE_BYTES)
    assert core.store.arenas.stale_bytes(rich.session.tenant) == ARENA_BYTES
    assert core.store.arenas.stale_bytes(poor.session.tenant) == 0
    assert poor.put(poor.open(), chain(1, "poor")) != [Grant.GRANTED], "the memory is not there"
    rich.drop_arena(arena)
    assert poor.put(poor.open(), chain(1, "poor")) == [Grant.GRANTED]
    core.audit()


def test_dropping_an_arena_that_still_serves_is_no_news() -> None:
    core = Core()
    client = core.client()
    namespace, keys = client.open(), chain(1)
    client.put(namespace, keys)
    held = client.lease(namespace, keys)
    core.store.arena_dropped(client.session, held.locations[0][0])
    assert client.read(namespace, held) == value_of(keys[0], BLOCK_BYTES)
    core.audit()
