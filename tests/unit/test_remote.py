"""The remote tier's part of the store: what it asks for, what it stores of what comes, and what it writes."""

from dataclasses import replace

import numpy as np
import pytest
import xxhash

from kvproto.ids import BlockKey, NamespaceDigest
from kvproto.policy_frames import Tier
from kvstore.report import ClearReport, ClearScope
from kvstore.routing import load_of
from kvstore.sessions import Copy
from kvstore.tier.codec import Wish
from kvstore.tier.disk import DiskLimits
from kvstore.tier.format import Codec
from kvstore.tier.remote import FORGETTING, SEEKS_EACH
from kvstore.tier.remote_format import NO_PARENT, tenant_digest
from kvstore.tier.remote_orders import Bytes, Forget, ForgetAll, Keep, Look, Piece, RemoteOrder, Seek
from kvstore.tier.remote_uses import Uses
from kvstore.tier.remote_writing import KEEPS, LATER_NS, SETTLE_NS, TRIES, RemoteAdmission
from tests.core import ARENA_BYTES, BLOCK_BYTES, SECOND, Client, Core, chain, value_of, words

DIGEST = NamespaceDigest(bytes(32))


class FarSide:
    """Threads that do what they are told when the test says so. What was written is here, by namespace and key."""

    def __init__(self, core: Core, admission: RemoteAdmission = RemoteAdmission.SECOND_TOUCH, piece: int = 3) -> None:
        self.core = core
        self.piece = piece
        self.up = True
        self.orders: list[RemoteOrder] = []
        self.copies: list[tuple[Copy, Bytes]] = []
        self.content: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}  # parent, bytes
        self.on_their_way: set[int] = set()  # pieces that still hold memory
        self.uses = Uses()
        self.changes = 0  # blocks that were not what they had been compared with
        self.late: set[int] = set()  # of the blocks that are copied: their bytes change before that
        core.store.begin_remote(self, admission)

    def submit(self, order: RemoteOrder) -> bool:
        if self.up or isinstance(order, Forget | ForgetAll):
            self.orders.append(order)
        return self.up

    def look(self, order: Look) -> bool:
        raise AssertionError("tests/unit/test_remote_looking.py has looks")

    def reading(self) -> bool:
        return self.up

    def writing(self) -> bool:
        return self.up

    def room_again(self, object_bytes: int) -> bool:
        return object_bytes > 0

    def carry(self, copies: list[tuple[Copy, Bytes]]) -> None:
        self.copies += copies

    def landed(self, piece: Piece) -> None:
        self.on_their_way.remove(id(piece))

    def changed(self) -> None:
        self.changes += 1

    def objects(self, below: ForgetAll) -> int:
        return sum(below.namespace in {None, namespace} for namespace, _ in self.content)

    def work(self) -> None:
        """Carry out all that waits, and what follows from it."""
        self.core.store.tick()
        while self.orders or self.copies:
            while self.orders:
                self.carry_out(self.orders.pop(0))
            self.copy_all()
            self.core.store.tick()

    def copy_all(self) -> None:
        for number in range(len(self.copies)):
            copy, source = self.copies.pop(0)
            if number in self.late:
                source = source ^ np.uint8(1)
            view = self.core.memory.view(copy.arena)
            view[copy.target_offset : copy.target_offset + copy.block_bytes] = source
            self.core.store.copied(copy.ticket, xxhash.xxh3_64_intdigest(source.tobytes()))
            self.core.store.flush_outcomes(copy.ticket.session)

    def carry_out(self, order: RemoteOrder) -> None:
        remote = self.core.store.remote
        if isinstance(order, Forget):
            for known in [one for one in self.content if one[0] == order.place.namespace]:
                if not order.keys or known[1] in order.keys:
                    del self.content[known]
            remote.forgot(order)
        elif isinstance(order, ForgetAll):
            for known in [one for one in self.content if order.namespace in {None, one[0]}]:  # all are one tenant's
                del self.content[known]
            remote.forgot(order)
        elif isinstance(order, Keep):
            self.write(order)
            remote.writing.copied(order)
            order.stored = len(order.keys)
            remote.kept(order)
        else:
            for piece in self.pieces(order):
                remote.land(piece)
            remote.sought(order)

    def write(self, keep: Keep) -> None:
        parent = keep.parent
        for key, checksum, (arena, offset) in zip(keep.keys, keep.checksums, keep.sources, strict=True):
            content = self.core.memory.view(arena)[offset : offset + keep.block_bytes].tobytes()
            assert xxhash.xxh3_64_intdigest(content) == checksum, "rows that are held have moved"
            self.content[keep.place.namespace, key] = (parent, content)
            parent = key

    def pieces(self, seek: Seek) -> list[Piece]:
        found = []
        for key in seek.keys[seek.start :]:
            if (seek.place.namespace, key) not in self.content:
                break
            found.append(self.content[seek.place.namespace, key])
        seek.found = len(found)
        seek.read_bytes, seek.read_s = sum(len(content) for _, content in found), 0.5
        made = []
        for at in range(0, len(found), self.piece):
            blocks = [np.frombuffer(content, dtype=np.uint8) for _, content in found[at : at + self.piece]]
            sums = [xxhash.xxh3_64_intdigest(content) for _, content in found[at : at + self.piece]]
            made.append(Piece(seek, seek.start + at, found[at][0], blocks, sums))
            self.on_their_way.add(id(made[-1]))
        self.kept_alive = made  # an id is nobody else's meanwhile
        return made


def host(arenas: int = 4, admission: RemoteAdmission = RemoteAdmission.SECOND_TOUCH) -> tuple[Core, FarSide, Client]:
    core = Core(arenas)
    return core, FarSide(core, admission), core.client()


def elsewhere(far: FarSide, arenas: int = 4) -> tuple[Core, FarSide, Client]:
    """Another host with the same far side."""
    core, other, client = host(arenas)
    other.content = far.content
    return core, other, client


def test_what_was_used_twice_is_written_and_found_by_another_host() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(10)
    client.put(ns, keys)
    far.work()
    assert not far.content, "stored once is not enough"
    assert client.fetch(ns, keys) == 10
    far.work()
    assert len(far.content) == 10
    core.audit()
    core, far, client = elsewhere(far)
    ns = client.open()
    assert client.match(ns, keys) == 0, "a miss is answered at once"
    far.work()
    assert client.fetch(ns, keys) == 10
    assert not far.on_their_way, "all memory is given back"
    assert core.store.remote.tally.promoted == 10
    assert core.store.remote.way.reports == 1, "one load, in however many pieces it came"
    far.work()
    assert core.store.remote.writing.tally.kept == 0, "what came from there is not sent back"
    core.audit()


def test_what_changes_between_comparing_and_copying_is_a_miss_and_so_is_all_behind_it() -> None:
    for late, whole in ((set[int](), 10), ({9}, 9), ({4}, 4), ({0}, 0), (set(range(10)), 0)):
        core, far, client = host()
        ns, keys = client.open(), chain(10)
        client.put(ns, keys)
        client.fetch(ns, keys)
        far.work()
        core, far, client = elsewhere(far)
        far.late = late
        ns = client.open()
        client.match(ns, keys)
        far.work()
        assert client.match(ns, keys) == whole
        assert far.changes == len(late)
        assert not far.on_their_way, "all memory is given back"
        assert (core.store.remote.tally.promoted, core.store.remote.tally.changed) == (whole, len(late))
        far.late = set()
        core.pass_time(3 * SECOND)
        client.match(ns, keys)
        far.work()
        assert client.fetch(ns, keys) == 10, "it is asked for again"
        core.audit()


def test_runs_are_written_with_the_codec_of_the_disk_and_what_that_gains_is_learned_for_both() -> None:
    core = Core(4, disk=DiskLimits(codec=Wish.BF16_PLANES_ZSTD))
    far, client = FarSide(core, RemoteAdmission.ALL), core.client()
    ns = client.open()
    client.put(ns, chain(3))
    core.clock.advance(SETTLE_NS)
    core.store.tick()
    (keep,) = [order for order in far.orders if isinstance(order, Keep)]
    assert keep.codec is Codec.BF16_PLANES_ZSTD
    assert core.store.disk.choice.ratio(ns) is None
    keep.packed = [BLOCK_BYTES // 2] * 3
    far.work()
    assert core.store.disk.choice.ratio(ns) == 0.5
    core = Core(4, disk=DiskLimits(codec=Wish.RAW))
    far, client = FarSide(core, RemoteAdmission.ALL), core.client()
    client.put(client.open(), chain(3))
    core.clock.advance(SETTLE_NS)
    core.store.tick()
    assert [order.codec for order in far.orders if isinstance(order, Keep)] == [Codec.RAW], "the control"


def test_what_is_written_once_is_not_written_again_and_only_the_rest_is() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(12)
    client.put(ns, keys[:5])
    client.fetch(ns, keys[:5])
    far.work()
    client.put(ns, keys[5:], parent=keys[4])
    client.fetch(ns, keys)
    core.store.tick()
    (keep,) = far.orders
    assert isinstance(keep, Keep)
    assert list(keep.keys) == keys[5:]
    assert keep.parent == keys[4]
    far.work()
    client.fetch(ns, keys)
    core.store.tick()
    assert not far.orders
    core.audit()


def test_the_middle_of_a_chain_is_asked_for_behind_what_is_here() -> None:
    _, far, client = host()
    ns, keys = client.open(), chain(9)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    core, far, client = elsewhere(far)
    ns = client.open()
    client.put(ns, keys[:4])
    assert client.fetch(ns, keys) == 4
    (seek,) = far.orders
    assert isinstance(seek, Seek)
    assert (seek.start, list(seek.keys)) == (4, keys)
    far.work()
    assert client.fetch(ns, keys) == 9
    core.audit()


def test_the_same_chain_is_asked_for_once_at_a_time() -> None:
    core, far, client = host()
    ns = client.open()
    for _ in range(5):
        client.match(ns, chain(4))
        client.match(ns, chain(6))
    assert len(far.orders) == 1
    far.work()
    core.pass_time(3 * SECOND)
    client.match(ns, chain(4))
    assert len(far.orders) == 1
    client.match(ns, chain(4, "b"))
    assert len(far.orders) == 2


def test_a_prefetch_and_all_ranks_of_a_match_ask_too() -> None:
    core, far, client = host()
    ranks = [client.open(model=name) for name in "ab"]
    client.put(ranks[0], chain(3))
    client.match_all(ranks, chain(3))
    assert [order.namespace for order in far.orders] == [ranks[1]]
    core.store.prefetching.prefetch(client.session.tenant, ranks[0], words(chain(5)), 0, 5, SECOND, Tier.DRAM)
    assert far.orders[-1].namespace is ranks[0]


def test_a_far_side_that_is_down_is_not_even_asked() -> None:
    core, far, client = host()
    far.up = False
    ns, keys = client.open(), chain(6)
    assert client.match(ns, keys) == 0
    client.put(ns, keys)
    assert client.fetch(ns, keys) == 6
    core.store.tick()
    assert not far.orders
    assert core.store.remote.writing.waiting == 0
    far.up = True
    client.fetch(ns, keys)
    far.work()
    assert len(far.content) == 6, "its next use brings it again"
    core.audit()


def test_a_write_that_fails_is_made_again_with_the_next_use() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(6)
    client.put(ns, keys)
    client.fetch(ns, keys)
    core.store.tick()
    (keep,) = far.orders
    far.orders.clear()
    assert isinstance(keep, Keep)
    core.audit()
    core.store.remote.writing.copied(keep)
    core.audit()
    keep.stored = 2
    core.store.remote.writing.kept(keep)
    client.fetch(ns, keys)
    core.store.tick()
    (again,) = far.orders
    assert isinstance(again, Keep)
    assert list(again.keys) == keys[2:]


def test_what_is_held_for_writing_is_bounded_and_let_go() -> None:
    core, far, client = host(8)
    ns = client.open()
    for name in range(KEEPS + 3):
        client.put(ns, chain(3, name))
        client.fetch(ns, chain(3, name))
    core.store.tick()
    core.store.tick()
    assert len(far.orders) == KEEPS
    assert core.store.next_tick_ns() != 0, "it does not spin"
    core.audit()
    far.work()
    far.work()
    assert len(far.content) == 3 * (KEEPS + 3)
    assert core.store.remote.writing.held_rows() == []
    core.audit()


def test_what_is_dropped_while_it_is_written_is_freed_when_it_was_copied() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(6)
    client.put(ns, keys)
    client.fetch(ns, keys)
    core.store.tick()
    assert client.delete(ns, keys[:1]) == [6]
    core.audit()
    far.work()
    core.audit()
    assert not any(core.row(ns, key) for key in keys)


def test_what_was_deleted_is_not_stored_by_what_was_on_its_way() -> None:
    _, far, client = host()
    ns, keys = client.open(), chain(6)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    core, far, client = elsewhere(far)
    ns = client.open()
    client.match(ns, keys)
    (seek,) = far.orders
    far.orders.clear()
    assert isinstance(seek, Seek)
    client.delete(ns, keys[:1])
    for piece in far.pieces(seek):
        core.store.remote.land(piece)
    assert not far.copies
    assert not far.on_their_way
    client.match(ns, keys)
    assert all(isinstance(order, Forget) for order in far.orders), "nothing is asked for before it is noted"
    far.work()
    core.pass_time(3 * SECOND)
    client.match(ns, keys)
    far.work()
    assert client.match(ns, keys) == 0
    core.audit()


def test_what_waits_for_room_when_it_is_deleted_is_not_stored_though_its_seek_has_ended() -> None:
    """Room is refused while a client has all that its tenant may have in flight."""
    _, far, client = host()
    ns, keys = client.open(), chain(6)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    for deleted in (False, True):
        core, other, client = elsewhere(far)
        ns = client.open()
        core.store.choose_quota("t", {"in_flight": 1})
        (busy,) = client.begin(ns, chain(1, "busy"))
        client.match(ns, keys)
        other.work()
        assert not core.store.remote.seeking
        assert other.on_their_way, "it waits for room"
        assert client.session.tenant.refused == 0, "it is not the client that was refused"
        assert load_of(core.store).clients == 1
        if deleted:
            client.delete(ns, keys[:1])
        core.store.abort(client.session, [busy])
        for _ in range(20):
            core.pass_time(5 * 10**6)
            other.work()
        assert client.match(ns, keys) == (0 if deleted else 6)
        assert not other.on_their_way
        core.audit()


def test_what_is_written_while_a_namespace_is_being_cleared_does_not_stay() -> None:
    core = Core(slice_steps=2)
    far, client = FarSide(core), core.client()
    ns, keys = client.open(), chain(6)
    client.put(ns, keys)
    cleared: list[ClearReport] = []
    core.store.clear(ClearScope(tenant="t"), cleared.append, dry_run=False)
    forget, all_of_it = far.orders
    assert isinstance(forget, Forget)
    assert isinstance(all_of_it, ForgetAll)
    for _ in range(2):
        far.carry_out(far.orders.pop())  # the far side is quick
    assert not cleared, "it is still being dropped here"
    rows = np.array([core.row(ns, key) for key in keys], dtype=np.uint32)
    core.store.remote.writing.leased(rows, len(keys))  # as of who fetches it meanwhile
    core.store.remote.tick(core.store.now_ns())
    far.carry_out(far.orders.pop())
    assert len(far.content) == 6
    core.settle()
    far.work()
    assert [report.blocks for report in cleared] == [6]
    assert not far.content
    core.audit()


def test_a_tenant_that_misses_much_leaves_room_to_others() -> None:
    core, far, client = host()
    ns = client.open()
    for number in range(SEEKS_EACH + 5):
        client.match(ns, chain(2, number))
    assert len(far.orders) == SEEKS_EACH
    other = core.client("u")
    other.match(other.open(), chain(2))
    assert len(far.orders) == SEEKS_EACH + 1


def test_a_namespace_of_which_more_is_deleted_than_can_wait_is_closed_as_often_as_that_happens() -> None:
    core, far, client = host()
    ns, other = client.open(), client.open(model="other")
    for number in range(FORGETTING // 64 + 1):
        client.delete(ns, chain(64, f"gone {number}"))
    *forgets, last = far.orders
    assert sum(len(order.keys) for order in forgets if isinstance(order, Forget)) == FORGETTING
    assert isinstance(last, Forget)
    assert (last.keys, last.too_many) == ((), True)
    assert core.store.remote.tally.not_noted == 1
    client.delete(ns, chain(64, "more"))
    assert far.orders[-1] is last, "that it has too many is said once, until it is noted"
    far.orders.clear()
    core.store.remote.forgot(last)
    assert far.orders == [last], "and once more: others were deleted since"
    core.store.remote.forgot(last)
    assert far.orders == [last]
    for order in forgets:
        assert isinstance(order, Forget)
        client.match(ns, chain(3))
        core.store.remote.forgot(order)
    far.orders.clear()
    client.match(ns, chain(3))
    assert far.orders, "from now on it is for the threads to know"
    far.orders.clear()
    client.match(other, chain(3))
    assert len(far.orders) == 1


def test_what_an_operator_clears_is_cleared_over_there_though_nobody_has_opened_it_here() -> None:
    core, far, client = host()
    ns = client.open()
    for scope, below in (
        (ClearScope(), ForgetAll()),
        (ClearScope(tenant="nobody"), ForgetAll(tenant_digest("nobody"))),
        (ClearScope(tenant="t"), ForgetAll(tenant_digest("t"))),
        (ClearScope(tenant="t", digest=DIGEST), ForgetAll(tenant_digest("t"), bytes(32))),
        (ClearScope(digest=DIGEST), ForgetAll(None, bytes(32))),
    ):
        core.pass_time(3 * SECOND)
        cleared: list[ClearReport] = []
        core.store.clear(scope, cleared.append, dry_run=False)
        assert below in far.orders
        client.match(ns, chain(3, str(scope)))
        asked = any(isinstance(order, Seek) for order in far.orders)
        assert asked == (scope.tenant == "nobody" or scope.digest is not None), "what is being cleared is not asked for"
        core.settle()
        far.work()
        assert [report.remote_objects for report in cleared] == [0]
        core.pass_time(3 * SECOND)
        client.match(ns, chain(3, str(scope)))
        assert any(isinstance(order, Seek) for order in far.orders)
        far.work()
    core.store.clear(ClearScope(tenant="nobody"), cleared.append, dry_run=True)
    assert not far.orders
    with pytest.raises(KeyError):
        core.store.clear(ClearScope("nobody", DIGEST, (BlockKey(bytes(32)),)), cleared.append, dry_run=False)
    core.audit()


def test_a_namespace_that_gets_another_number_is_not_asked_for_before_it_is_noted() -> None:
    core, far, client = host()
    ns = client.open()
    client.delete(ns, chain(2))
    again = replace(ns)
    assert again is not ns
    core.store.remote.missed(again, words(chain(3)), 0, 3, 0)
    assert not [order for order in far.orders if isinstance(order, Seek)]
    far.work()
    core.store.remote.missed(again, words(chain(3)), 0, 3, 0)
    assert [order for order in far.orders if isinstance(order, Seek)]


def test_what_finds_no_room_is_let_go_and_nothing_leaks() -> None:
    _, far, client = host(8)
    ns, keys = client.open(block_bytes=4096), chain(40)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    core, far, client = elsewhere(far, 1)
    slots = ARENA_BYTES // 4096
    ns = client.open(block_bytes=4096)
    mine = chain(slots - 4, "mine")
    client.put(ns, mine)
    held = client.lease(ns, mine, ttl_ns=30 * SECOND)
    client.match(ns, keys)
    far.work()
    for _ in range(2000):
        core.pass_time(5 * 10**6)
        far.copy_all()
    assert client.match(ns, keys) == 4
    assert not far.on_their_way
    assert core.store.remote.tally.no_room
    client.release(held)
    core.audit()


def test_blocks_stored_one_by_one_become_one_object_where_all_are_admitted() -> None:
    core, far, client = host(admission=RemoteAdmission.ALL)
    ns, keys = client.open(), chain(7)
    for number, key in enumerate(keys):
        client.put(ns, [key], parent=keys[number - 1] if number else None)
    core.store.tick()
    assert not far.orders
    core.pass_time(SETTLE_NS)
    (keep,) = far.orders
    assert isinstance(keep, Keep)
    assert list(keep.keys) == keys
    assert keep.parent == NO_PARENT
    core.audit()


def test_what_is_slower_to_read_than_to_compute_is_not_written() -> None:
    core, far, client = host()
    ns, keys = client.open(), chain(4)
    ns.recompute_ns = 1000
    core.store.remote.way.took(1 << 20, 1.0)
    client.put(ns, keys)
    client.fetch(ns, keys)
    far.work()
    assert not far.content
    assert core.store.remote.writing.tally.not_worth == 4
    ns.recompute_ns = 10 * SECOND
    client.fetch(ns, keys)
    far.work()
    assert len(far.content) == 4


def test_a_run_that_has_left_memory_is_let_go() -> None:
    core, far, client = host(1)
    ns = client.open(block_bytes=4096)
    slots = ARENA_BYTES // 4096
    for number in range(KEEPS + 1):  # so that the last one waits
        client.put(ns, chain(2, number))
        client.fetch(ns, chain(2, number))
    core.store.tick()
    core.store.tick()
    client.put(ns, chain(slots - 2 * KEEPS, "new"))
    far.orders = [order for order in far.orders if isinstance(order, Keep)]
    for _ in range(TRIES + 2):
        far.work()
        core.pass_time(LATER_NS)
    assert core.store.remote.writing.waiting == 0
    core.audit()


def test_without_a_far_side_nothing_is_heard_and_nothing_costs() -> None:
    core = Core()
    client = core.client()
    client.put(client.open(), chain(3))
    assert not core.store.remote.on
    assert core.store.matching.missed.__name__ == "nobody_hears"
    assert value_of(chain(1)[0], BLOCK_BYTES) != value_of(chain(1)[0], BLOCK_BYTES, 1)
