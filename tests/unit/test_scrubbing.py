"""Hashing DRAM again: what a client changed after it was published is found, dropped, and its slot out of use."""

from collections.abc import Callable

from kvproto.errors import Grant
from kvproto.limits import PAGE_BYTES
from kvstore import blocks
from kvstore.scrubbing import BATCH_BYTES, PAUSE_NS, Recheck
from kvstore.sessions import Namespace, Process
from tests.core import ARENA_BYTES, BLOCK_BYTES, MS, SECOND, Client, Core, Held, chain
from tests.fakes import FakeClock

ME = Process(100, 1)
SLOTS = ARENA_BYTES // PAGE_BYTES


def stored(core: Core, count: int, name: str = "a") -> tuple[Client, Namespace, list[bytes]]:
    """A client in mode direct that has stored a chain."""
    client = core.client(owner=ME)
    namespace, keys = client.open(), chain(count, name)
    assert set(client.put(namespace, keys)) == {Grant.GRANTED}
    return client, namespace, keys


def change(client: Client, namespace: Namespace, key: bytes) -> None:
    """Write into a published block, as no client should."""
    core = client.core
    position, slot = blocks.locate(core.store.tables, core.row(namespace, key))
    arena = int(core.store.tables.arenas["id"][position])
    client.writable[arena][slot * namespace.slot_bytes + 7] ^= 1


def scrub(core: Core, *, everything: bool = False) -> None:
    """A whole pass, at once."""
    core.store.scrubbing.begin(0, everything=everything)
    while core.store.scrubbing.active:
        core.store.tick()
        if core.drive.waiting:
            core.work()


class TestPass:
    def test_finds_what_was_changed_and_nothing_else(self) -> None:
        core = Core()
        client, namespace, keys = stored(core, 6)
        _, other, bystanders = stored(core, 4, "b")
        scrub(core)
        assert core.store.scrubbing.report().damaged == 0
        assert client.fetch(namespace, keys) == 6
        change(client, namespace, keys[3])
        scrub(core)
        core.settle()
        report = core.store.scrubbing.report()
        assert (report.done_blocks, report.damaged, report.running) == (10, 1, False)
        assert core.store.scrubbing.damaged == 1
        assert client.match(namespace, keys) == 3, "what continues a damaged block cannot be reached"
        assert client.fetch(namespace, keys[:3]) == 3
        assert client.fetch(other, bystanders) == 4
        core.audit()

    def test_the_slot_of_a_damaged_block_is_out_of_use_as_long_as_its_arena_serves(self) -> None:
        core = Core(arenas=1)
        client, namespace, keys = stored(core, 1)
        change(client, namespace, keys[0])
        scrub(core)
        core.settle()
        assert core.store.writers.stranded == 1
        assert client.put(namespace, keys) == [Grant.GRANTED], "it can be stored anew"
        assert client.fetch(namespace, keys) == 1
        assert int(core.store.tables.arenas["used"][0]) == 2
        core.audit()
        successor = Core(
            arenas=1, memory=core.memory.successor(), clock=FakeClock(core.clock.ns), first_generation=1000,
            processes=core.processes,
        )  # fmt: skip
        assert successor.store.writers.stranded == 1
        successor.audit()

    def test_who_is_reading_a_damaged_chain_reads_on(self) -> None:
        core = Core(arenas=1)
        client, namespace, keys = stored(core, 4)
        reader = core.client()
        theirs = reader.open()
        held = reader.ask(theirs, keys, 5 * SECOND)
        assert isinstance(held, Held)
        before = [reader.read(theirs, held, index) for index in range(2)]
        change(client, namespace, keys[2])
        scrub(core)
        client.delete(namespace, keys[:1])
        core.settle()
        writer = core.client(ring_pages=SLOTS)
        writer.put(writer.open(), chain(SLOTS, "others"))
        assert [reader.read(theirs, held, index) for index in range(2)] == before
        core.audit()
        core.pass_time(10 * SECOND)
        core.settle()
        core.audit()
        assert int(core.store.tables.blocks["holds"].sum()) == 1, "more than the damaged block is kept for ever"

    def test_looks_at_arenas_that_were_never_writable_only_when_asked_for_all(self) -> None:
        core = Core()
        copying = core.client("u")
        copying.put(copying.open(), chain(3))
        stored(core, 2)
        scrub(core)
        assert core.store.scrubbing.report().done_blocks == 2
        scrub(core, everything=True)
        assert core.store.scrubbing.report().done_blocks == 5

    def test_a_block_that_has_made_room_for_another_meanwhile_is_not_damaged(self) -> None:
        core = Core(arenas=1)
        client, namespace, keys = stored(core, 2)
        core.store.scrubbing.begin(0, everything=False)
        core.store.tick()
        client.delete(namespace, keys[:1])
        assert client.match(namespace, keys) == 0
        client.put(namespace, chain(2, "new"))
        core.work()
        assert core.store.scrubbing.report().damaged == 0
        assert client.fetch(namespace, chain(2, "new")) == 2
        core.audit()

    def test_an_arena_is_not_given_up_while_it_is_hashed(self) -> None:
        core = Core(arenas=3)
        client = core.client(owner=ME, ring_pages=3 * SLOTS)
        namespace = client.open()
        client.put(namespace, chain(3 * SLOTS))
        core.store.scrubbing.begin(0, everything=False)
        core.store.tick()
        (batch,) = core.drive.waiting
        order = batch[0]
        assert isinstance(order, Recheck)
        core.store.arenas.drain(core.store.arenas.positions_by_id[order.arena], None)
        for _ in range(5):
            core.pass_time(20 * MS)
        assert order.arena not in core.memory.punching
        core.work()
        core.pass_time(20 * MS)
        assert order.arena in core.memory.punching


class TestBackground:
    def make(self, rate: int) -> Core:
        core = Core(scrub_bytes_per_s=rate)
        stored(core, 8)
        return core

    def passes(self, core: Core, until: Callable[[], bool], step_ns: int) -> int:
        """Steps of time until something holds."""
        for step in range(1000):
            if until():
                return step
            core.pass_time(step_ns)
            while core.drive.waiting:
                core.work()
        raise AssertionError("never")

    def test_runs_by_itself_again_and_again(self) -> None:
        core = self.make(1 << 20)
        scrubbing = core.store.scrubbing
        self.passes(core, lambda: scrubbing.passes == 1, 10 * MS)
        assert scrubbing.report().done_blocks == 8
        assert scrubbing.next_ns() is not None
        assert self.passes(core, lambda: scrubbing.passes == 2, SECOND) >= PAUSE_NS // SECOND

    def test_keeps_its_rate(self) -> None:
        core = self.make(8 * BLOCK_BYTES)  # a batch may hold all of them: the next pass pays for it
        core.store.scrubbing.begin(8 * BLOCK_BYTES, everything=True)
        core.store.tick()
        core.work()
        due_ns = core.store.scrubbing.next_ns()
        assert due_ns == core.clock.ns + SECOND
        assert BATCH_BYTES >= 8 * BLOCK_BYTES

    def test_does_nothing_where_no_client_could_write(self) -> None:
        core = Core(scrub_bytes_per_s=1 << 20)
        client = core.client()
        client.put(client.open(), chain(3))
        assert core.store.scrubbing.next_ns() is None
        core.pass_time(SECOND)
        assert not core.drive.waiting


def test_a_pass_looks_at_every_block_once_whatever_its_size() -> None:
    arena_bytes = 64 * PAGE_BYTES
    core = Core(arenas=3, arena_bytes=arena_bytes)
    client = core.client(owner=ME, ring_pages=2 * arena_bytes // PAGE_BYTES)
    for block_bytes, count in ((96, 100), (5 * PAGE_BYTES - 7, 9)):
        namespace = client.open(block_bytes, model=str(block_bytes))
        assert set(client.put(namespace, chain(count, block_bytes))) == {Grant.GRANTED}
        client.delete(namespace, chain(count, block_bytes)[count - 3 :])  # holes
    core.settle()
    seen: list[int] = []
    core.store.scrubbing.begin(0, everything=False)
    while core.store.scrubbing.active:
        core.store.tick()
        if core.drive.waiting:
            seen += [order.row for order in core.drive.waiting[0] if isinstance(order, Recheck)]
            core.work()
    assert len(seen) == len(set(seen)) == core.store.scrubbing.report().done_blocks == 97 + 6
    assert core.store.scrubbing.damaged == 0
