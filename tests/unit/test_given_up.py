"""Memory to which clients of a former life may still be writing (mode direct) is never handed out."""

from typing import Any

import pytest

import kvstore.writers
from tests.core import SECOND, Core, Held, chain
from tests.fakes import FakeClock, FakeProcesses
from tests.unit.test_scrubbing import change, scrub
from tests.unit.test_scrubbing import stored as stored_blocks
from tests.unit.test_writers import JUNK, ME, SLOTS, TestRestart, all_there, begun, fill_dram


class KilledError(BaseException):
    """Nothing that comes afterwards happens."""


def write_late(client: Any, namespace: Any, answers: Any) -> None:
    """What a process that was granted these slots may still do."""
    for answer in answers:
        client.fill(namespace, answer, JUNK)


def test_an_arena_that_is_being_given_up_serves_no_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(arenas=1, ticket_ttl_ns=SECOND)
    client = core.client(ring_pages=2 * SLOTS, owner=ME)
    namespace = client.open()
    answers = begun(client, namespace, chain(SLOTS))
    core.pass_time(2 * SECOND)

    def killed(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(core.store.arenas, "_give_back", killed)
    writer = core.client(ring_pages=SLOTS)
    theirs = writer.open()

    def store() -> None:
        writer.put(theirs, chain(4, "others"))
        core.settle()

    with pytest.raises(KilledError):
        store()
    later = TestRestart().restarted(core, 1)
    stored = fill_dram(later, "more")
    assert stored
    write_late(client, namespace, answers)
    assert all_there(later, stored)


def test_nor_while_a_damaged_block_in_it_is_still_being_read() -> None:
    core = Core(arenas=1, ticket_ttl_ns=SECOND)
    client = core.client(ring_pages=2 * SLOTS, owner=ME)
    namespace = client.open()
    keys = chain(1, "published")
    client.put(namespace, keys)
    reader = core.client()
    assert isinstance(reader.ask(reader.open(), keys, 50 * SECOND), Held)
    change(client, namespace, keys[0])
    scrub(core)
    answers = begun(client, namespace, chain(SLOTS - 1, "written"))
    core.pass_time(2 * SECOND)
    writer = core.client(ring_pages=SLOTS)
    writer.put(writer.open(), chain(4, "others"))
    core.settle()
    for _ in range(5):
        core.pass_time(SECOND // 10)
    later = TestRestart().restarted(core, 1)
    stored = fill_dram(later, "more")
    write_late(client, namespace, answers)
    assert all_there(later, stored)


@pytest.mark.parametrize("left", [None, 64])
def test_without_the_table_of_writers_a_start_is_cold(left: int | None) -> None:
    core = Core(arenas=1, ticket_ttl_ns=SECOND)
    client = core.client(owner=ME)
    begun(client, client.open(), chain(3))
    memory = core.memory.successor()
    table = memory.kept_tables.pop("writers")
    if left is not None:
        memory.kept_tables["writers"] = table[:left]
    processes = FakeProcesses()
    processes.living |= core.processes.living
    later = Core(
        arenas=1, ticket_ttl_ns=SECOND, memory=memory, clock=FakeClock(core.clock.ns), first_generation=1000,
        processes=processes,
    )  # fmt: skip
    assert not later.store.kept.warm
    assert "writers" in later.store.kept.reason


def test_more_damaged_blocks_than_there_are_records_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstore.writers, "_records_max", lambda _limits: 4)
    core = Core(arenas=1)
    for number in range(6):
        client, namespace, keys = stored_blocks(core, 1, f"k{number}")
        change(client, namespace, keys[0])
    scrub(core)
    core.settle()
    core.audit()
    assert core.store.scrubbing.damaged == 6
    assert (core.store.writers.stranded, core.store.writers.room()) == (2, 2)
