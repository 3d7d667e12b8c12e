"""Mode direct in the store: slots that clients write themselves, and when such a slot may be used again."""

import pytest

from kvproto.errors import Grant, Outcome, TicketError
from kvproto.limits import PAGE_BYTES
from kvstore.journal import read_journal
from kvstore.restart import journal_head
from kvstore.sessions import IN_PLACE, Namespace, Process
from tests.core import ARENA_BYTES, BLOCK_BYTES, SECOND, Client, Core, Reserved, chain, value_of
from tests.fakes import FakeClock, FakeProcesses

ME, YOU = Process(100, 1), Process(100, 2)  # one number, used twice
SLOTS = ARENA_BYTES // PAGE_BYTES
JUNK = b"\xee" * BLOCK_BYTES


def begun(client: Client, namespace: Namespace, keys: list[bytes]) -> list[Reserved]:
    """RESERVE that is granted, and the first half of each block written."""
    answers = client.reserve(namespace, keys)
    assert {answer.grant for answer in answers} == {Grant.GRANTED}
    for answer in answers:
        client.fill(namespace, answer, JUNK[: BLOCK_BYTES // 2])
    return answers


def fill_dram(core: Core, name: str) -> list[bytes]:
    """Store through a ring until nothing more goes in; what went in."""
    writer = core.client(ring_pages=SLOTS)
    namespace, keys = writer.open(), chain(core.store.arenas.positions * SLOTS, name)
    stored: list[bytes] = []
    for start in range(0, len(keys), 8):
        grants = writer.put(namespace, keys[start : start + 8], keys[start - 1] if start else None)
        core.settle()
        stored += [key for key, grant in zip(keys[start : start + 8], grants, strict=True) if grant is Grant.GRANTED]
        if len(stored) < start + 8:
            break
    return stored


def all_there(core: Core, keys: list[bytes]) -> bool:
    """Is every one of these what it should be?"""
    reader = core.client()
    return reader.fetch(reader.open(), keys) == len(keys)


class TestStoring:
    def test_stores_by_writing_into_the_slot_and_hashing_it_there(self) -> None:
        core = Core()
        client = core.client(owner=ME)
        namespace, keys = client.open(), chain(3)
        answers = client.reserve(namespace, keys)
        for key, answer in zip(keys, answers, strict=True):
            client.fill(namespace, answer, value_of(key, BLOCK_BYTES))
        copies = client.commit([answer.ticket for answer in answers])
        assert [copy.source_offset for copy in copies] == [IN_PLACE] * 3
        assert client.match(namespace, keys) == 0, "visible before it was hashed"
        core.finish_all()
        assert client.fetch(namespace, keys) == 3
        core.audit()

    def test_a_block_that_is_there_already_takes_no_slot(self) -> None:
        core = Core()
        client = core.client(owner=ME)
        namespace, keys = client.open(), chain(3)
        client.put(namespace, keys)
        used = int(core.store.tables.arenas["used"][:4].sum())
        assert [answer.grant for answer in client.reserve(namespace, keys)] == [Grant.KNOWN] * 3
        other = core.client(owner=YOU)
        theirs = other.reserve(other.open(), [*keys, *chain(1, "new")])
        assert [answer.grant for answer in theirs[:3]] == [Grant.KNOWN] * 3
        assert int(core.store.tables.arenas["used"][:4].sum()) == used + 1

    def test_has_no_more_on_its_way_than_its_ring_would_hold(self) -> None:
        core = Core()
        client = core.client(ring_pages=4, owner=ME)
        answers = client.reserve(client.open(), chain(6))
        assert [answer.grant for answer in answers] == [Grant.GRANTED] * 4 + [Grant.BUSY] * 2

    def test_is_not_given_the_writable_descriptor_of_what_it_only_reads(self) -> None:
        core = Core()
        copying, client = core.client(), core.client(owner=ME)
        copying.put(copying.open(), chain(2))
        assert client.fetch(client.open(), chain(2)) == 2
        assert client.maps, "nothing was read"
        assert not client.writable

    def test_takes_a_ticket_once(self) -> None:
        core = Core()
        client = core.client(owner=ME)
        (answer,) = client.reserve(client.open(), chain(1))
        client.commit([answer.ticket])
        with pytest.raises(TicketError):
            client.commit([answer.ticket])


class TestOutOfUse:
    """Whoever may still write to a slot finds it as it left it."""

    @pytest.mark.parametrize("how", ["lapse", "detach"])
    def test_a_slot_is_out_of_use_until_its_process_is_gone(self, how: str) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND)
        client = core.client(owner=ME)
        namespace = client.open()
        answers = begun(client, namespace, chain(3))
        if how == "lapse":
            core.pass_time(2 * SECOND)
        else:
            core.store.detach(client.session)
        stored = fill_dram(core, "others")
        assert len(stored) == SLOTS - 3
        for answer in answers:
            client.fill(namespace, answer, JUNK)  # as a thread does that was stopped meanwhile
        assert all_there(core, stored)
        core.audit()
        core.store.exited(client.session)
        core.audit()
        assert core.store.writers.stranded == 0
        assert len(fill_dram(core, "more")) == SLOTS

    def test_what_was_free_too_early_would_be_noticed(self) -> None:
        core = Core(arenas=1)
        client = core.client(owner=ME)
        namespace = client.open()
        answers = begun(client, namespace, chain(3))
        core.store.abort(client.session, [answer.ticket for answer in answers])
        stored = fill_dram(core, "others")
        for answer in answers:
            client.fill(namespace, answer, JUNK)  # it had said that it would not
        with pytest.raises(AssertionError):
            all_there(core, stored)

    @pytest.mark.parametrize("lapsed", [False, True])
    def test_an_abort_frees_the_slot_at_once(self, lapsed: bool) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND)
        client = core.client(owner=ME)
        answers = begun(client, client.open(), chain(3))
        if lapsed:
            core.pass_time(2 * SECOND)
        core.store.abort(client.session, [answer.ticket for answer in answers])
        assert int(core.store.tables.arenas["used"][0]) == 0
        core.audit()

    def test_the_commit_of_a_lapsed_ticket_is_stale_and_frees_the_slot(self) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND)
        client = core.client(owner=ME)
        (answer,) = begun(client, client.open(), chain(1))
        core.pass_time(2 * SECOND)
        assert client.commit([answer.ticket]) == []
        assert client.outcome(answer.ticket) is Outcome.STALE
        assert int(core.store.tables.arenas["used"][0]) == 0
        core.audit()

    def test_an_exit_frees_the_slots_of_a_session_that_was_never_closed(self) -> None:
        core = Core(arenas=1)
        client = core.client(owner=ME)
        begun(client, client.open(), chain(3))
        core.store.exited(client.session)
        assert int(core.store.tables.arenas["used"][0]) == 0
        assert not core.store.sessions
        core.audit()

    def test_a_ticket_that_lapses_after_the_exit_keeps_nothing_out_of_use(self) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND, slice_steps=1)
        client = core.client(owner=ME)
        begun(client, client.open(), chain(6))
        core.store.exited(client.session)  # its tickets end slice by slice
        assert client.session.tickets
        core.clock.advance(2 * SECOND)
        assert core.store.reserving.lapse(core.clock.ns)
        core.audit()
        core.settle()
        assert int(core.store.tables.arenas["used"][0]) == 0
        core.audit()

    def test_a_session_leaves_its_slots_to_an_older_one_of_its_process(self) -> None:
        core = Core(arenas=1)
        elder, client = core.client(owner=ME), core.client(owner=ME)
        begun(elder, elder.open(), chain(1, "e"))
        begun(client, client.open(), chain(2, "c"))
        core.store.detach(elder.session)
        core.store.detach(client.session)
        core.store.bequeath(client.session, elder.session)
        core.audit()
        assert core.store.writers.stranded == 3
        core.store.exited(elder.session)
        assert core.store.writers.stranded == 0
        core.audit()

    def test_an_arena_with_such_slots_alone_is_replaced_for_its_own_tenant(self) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND)
        client = core.client(ring_pages=2 * SLOTS, owner=ME)
        namespace = client.open()
        answers = begun(client, namespace, chain(SLOTS))
        core.pass_time(2 * SECOND)
        (old,) = {answer.arena for answer in answers}
        writer = core.client(ring_pages=SLOTS)
        theirs, keys = writer.open(), chain(4, "others")
        assert Grant.GRANTED not in writer.put(theirs, keys), "a slot was used again"
        core.settle()
        assert (client.session, old) in core.outbox.gone
        assert writer.put(theirs, keys) == [Grant.GRANTED] * 4
        for answer in answers:
            client.fill(namespace, answer, JUNK)
        assert writer.fetch(theirs, keys) == 4
        core.audit()
        client.commit([answer.ticket for answer in answers])  # of slots that are not there any more
        core.audit()
        client.drop_arena(old)
        assert not core.store.arenas.stale
        core.audit()

    def test_an_arena_with_such_slots_goes_to_another_tenant_as_new_memory(self) -> None:
        core = Core(arenas=3, ticket_ttl_ns=SECOND)
        client = core.client(ring_pages=3 * SLOTS, owner=ME)
        namespace = client.open()
        answers = begun(client, namespace, chain(3 * SLOTS))
        core.pass_time(2 * SECOND)
        other = core.client("u", ring_pages=SLOTS)
        theirs = other.open()
        other.put(theirs, chain(2))
        core.settle()
        other.put(theirs, chain(2))
        for answer in answers:
            client.fill(namespace, answer, JUNK)
        assert other.fetch(theirs, chain(2)) == 2
        core.audit()


class TestRestart:
    """A successor goes on keeping out of use what its predecessor did."""

    def restarted(self, core: Core, arenas: int = 1) -> Core:
        processes = FakeProcesses()  # nobody tells a daemon that is gone
        processes.living |= core.processes.living
        return Core(
            arenas=arenas, ticket_ttl_ns=SECOND, memory=core.memory.successor(), clock=FakeClock(core.clock.ns),
            first_generation=1000, processes=processes,
        )  # fmt: skip

    @pytest.mark.parametrize("how", ["open", "lapsed", "detached"])
    @pytest.mark.parametrize("restarts", [1, 2])
    def test_a_slot_is_out_of_use_as_long_as_its_writer_lives(self, how: str, restarts: int) -> None:
        core = Core(arenas=1, ticket_ttl_ns=SECOND)
        client = core.client(owner=ME)
        namespace = client.open()
        done = chain(2, "done")
        client.put(namespace, done)
        answers = begun(client, namespace, chain(3))
        if how == "lapsed":
            core.pass_time(2 * SECOND)
        elif how == "detached":
            core.store.detach(client.session)
        for _ in range(restarts):
            core = self.restarted(core)
            core.audit()
            assert core.store.kept.blocks == 2
            assert core.store.writers.stranded == core.store.kept.withheld == 3
        core.work_all()
        assert all_there(core, done)
        stored = fill_dram(core, "others")
        assert len(stored) == SLOTS - 3
        for answer in answers:
            client.fill(namespace, answer, JUNK)
        assert all_there(core, stored)
        core.processes.end(ME)
        core.audit()
        assert core.store.writers.stranded == 0
        assert len(fill_dram(core, "more")) == SLOTS

    def test_a_slot_is_used_at_once_if_its_writer_is_gone(self) -> None:
        core = Core(arenas=1)
        client = core.client(owner=ME)
        begun(client, client.open(), chain(3))
        core.processes.end(ME)
        core.processes.living.add(YOU)  # has the same number
        core = self.restarted(core)
        assert core.store.writers.stranded == 0
        assert len(fill_dram(core, "others")) == SLOTS
        core.audit()

    def test_what_was_committed_is_not_waited_for(self) -> None:
        core = Core(arenas=1)
        client = core.client(owner=ME)
        answers = begun(client, client.open(), chain(3))
        client.commit([answer.ticket for answer in answers])
        core = self.restarted(core)
        assert core.store.writers.stranded == 0
        assert len(fill_dram(core, "others")) == SLOTS

    def test_a_daemon_that_does_not_know_of_writers_starts_cold_once_there_may_be_any(self) -> None:
        core = Core(arenas=1)
        copying = core.client()
        copying.put(copying.open(), chain(2))
        head = read_journal(core.memory.tables["journal"])[0]
        assert head == journal_head(core.store.limits), "who never had any goes on with what an older one left"
        core.client(owner=ME)
        records = read_journal(core.memory.tables["journal"])
        assert records[0] == journal_head(core.store.limits, written=True) != head
        assert len(records) > 1, "the rest is said anew"
        core = self.restarted(core)
        assert core.store.kept.blocks == 2
        assert read_journal(core.memory.tables["journal"])[0] == head, "no arena was ever handed out"

    def test_an_arena_that_was_writable_is_still_known_as_one(self) -> None:
        core = Core(arenas=2)
        client = core.client(owner=ME)
        client.put(client.open(), chain(3))
        marked = [core.store.writers.was_writable(position) for position in range(2)]
        assert sorted(marked) == [False, True]
        core = self.restarted(core, arenas=2)
        assert [core.store.writers.was_writable(position) for position in range(2)] == marked
