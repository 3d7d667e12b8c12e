"""Blocks as they stand, page by page and prefix by prefix, through the handlers that ask for them slice by slice."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

from kvproto import control_pb2 as pb
from kvproto.ids import BlockKey
from kvproto.policy_frames import Tier
from kvstore import blocks
from kvstore.insight import forest, looking
from kvstore.insight.looking import Looking
from kvstore.sessions import Namespace
from kvstored import admin_look
from kvstored.admin_look import (
    Asks,
    TooManyError,
    draw_tree,
    list_blocks,
    list_wish_of,
    stat_prefix,
    stat_wish_of,
    tree_wish_of,
)
from tests.core import SECOND, Client, Core, chain, key_of, words
from tests.unit.test_disk import make, put

T = TypeVar("T")


class Owner:
    """Answers at once; between two questions the store may change (`meanwhile`)."""

    def __init__(self, core: Core) -> None:
        self.looking = Looking(core.store)
        self.questions = 0
        self.meanwhile: Callable[[], object] = bool

    def __call__(self, question: Callable[[Looking], T]) -> T:
        self.questions += 1
        answer = question(self.looking)
        self.meanwhile()
        return answer


def page(ask: Asks, namespace: Namespace, cursor: int = 0, limit: int = 0) -> pb.ListBlocksResponse:
    request = pb.ListBlocksRequest(namespace_digest=namespace.digest.hex(), cursor=cursor, limit=limit)
    return list_blocks(ask, list_wish_of(request))


def pages(ask: Asks, namespace: Namespace, limit: int) -> list[pb.Block]:
    found: list[pb.Block] = []
    cursor = 0
    while True:
        answer = page(ask, namespace, cursor, limit)
        assert len(answer.blocks) <= limit
        found += answer.blocks
        cursor = answer.next_cursor
        if not cursor:
            return found


def tree(ask: Asks, namespace: Namespace, **words: Any) -> pb.GetTreeResponse:
    request = pb.GetTreeRequest(namespace_digest=namespace.digest.hex(), **words)
    return draw_tree(ask, tree_wish_of(request), 1.0)


def stat(ask: Asks, keys: Sequence[bytes], namespace: Namespace | None = None) -> pb.StatPrefixResponse:
    digest = None if namespace is None else namespace.digest.hex()
    return stat_prefix(ask, stat_wish_of(pb.StatPrefixRequest(namespace_digest=digest, keys=keys)))


def begun(**changes: Any) -> tuple[Core, Client, Namespace, Owner]:
    core = make(arenas=4, **changes)
    client = core.client()
    return core, client, client.open(), Owner(core)


class TestList:
    def test_pages_hold_every_block_once_whatever_their_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(looking, "SLICE_ROWS", 7)
        monkeypatch.setattr(admin_look, "LISTED_A_LOOK", 3)
        _core, client, namespace, ask = begun()
        put(client, namespace, chain(25))
        put(client, client.open(model="other"), chain(5, "other"))
        for limit in (1, 4, 7, 100):
            found = pages(ask, namespace, limit)
            assert sorted(one.key for one in found) == sorted(chain(25))
        assert page(ask, namespace, 0, 0).next_cursor == 0

    def test_a_block_says_where_it_is_and_who_keeps_it(self) -> None:
        core, client, namespace, ask = begun()
        keys = chain(4)
        put(client, namespace, keys)
        held = client.lease(namespace, keys[:2], ttl_ns=20 * SECOND)
        core.store.pinning.pin(namespace.tenant, namespace, words(keys), 0, 3, 60 * SECOND, Tier.DRAM)
        core.clock.advance(5 * SECOND)
        by_key = {one.key: one for one in page(ask, namespace).blocks}
        first, second, third, last = (by_key[key] for key in keys)
        assert (first.state, first.in_dram, first.on_disk, first.parent) == ("resident", True, True, b"")
        assert (second.parent, third.parent) == (keys[0], keys[1])
        assert [one.pins for one in (first, second, third, last)] == [1, 1, 1, 0]
        assert (second.holds, third.holds, last.holds) == (1, 1, 0)
        assert second.leased_s == pytest.approx(15.0)
        assert (first.leased_s, last.leased_s) == (0.0, 0.0)
        assert second.slot_bytes == namespace.slot_bytes
        assert last.age_s >= 5.0
        client.release(held)
        assert {one.key: one.holds for one in page(ask, namespace).blocks}[keys[1]] == 0

    def test_a_written_and_a_disk_block_say_so(self) -> None:
        _core, client, namespace, ask = begun()
        for name in range(12):
            put(client, namespace, chain(8, name))
        client.begin(namespace, chain(1, "new"))
        states = {one.key: one for one in pages(ask, namespace, 1024)}
        assert states[chain(1, "new")[0]].state == "writing"
        alone = [one for one in states.values() if one.state == "on disk"]
        assert alone
        assert all(one.on_disk and not one.in_dram for one in alone)

    @pytest.mark.parametrize(
        ("state", "name", "in_dram"), [(blocks.KEPT, "unverified", True), (blocks.LOADING, "loading", False)]
    )
    def test_what_is_not_verified_or_not_there_yet_says_so(self, state: int, name: str, in_dram: bool) -> None:
        core, client, namespace, ask = begun()
        put(client, namespace, chain(1))
        core.store.tables.blocks["state"][core.row(namespace, chain(1)[0])] = state
        (block,) = page(ask, namespace).blocks
        assert (block.state, block.in_dram, block.on_disk) == (name, in_dram, True)
        assert tree(ask, namespace).nodes[0].dram_blocks == int(in_dram)

    def test_what_no_page_has_given_is_refused(self) -> None:
        _, client, namespace, ask = begun()
        put(client, namespace, chain(2))
        assert not page(ask, namespace, cursor=10**6).blocks
        for wrong in (
            {"cursor": 1 << 40}, {"limit": 1025}, {"namespace_digest": "ab"}, {"namespace_digest": ""}, {"tenant": ""}
        ):  # fmt: skip
            right = {"namespace_digest": namespace.digest.hex()}
            with pytest.raises(ValueError, match=r"cursor|limit|digest|tenant"):
                list_wish_of(pb.ListBlocksRequest(**(right | wrong)))

    def test_a_namespace_that_goes_away_between_two_looks_is_not_mixed_with_its_successor(self) -> None:
        core, client, namespace, ask = begun()
        put(client, namespace, chain(3))
        other = client.open(model="other")
        begin = ask.looking.begin(None, namespace.digest)
        core.store.registry.by_number[namespace.number] = other
        with pytest.raises(KeyError, match="went away"):
            ask.looking.page(begin, 1, 10)
        with pytest.raises(KeyError, match="went away"):
            ask.looking.slice(begin, 1)
        with pytest.raises(KeyError, match="no tenant"):
            ask.looking.begin("nobody", None)
        with pytest.raises(KeyError, match="no such namespace"):
            ask.looking.begin(None, type(namespace.digest)(bytes(32)))


class TestTree:
    def test_shared_prefixes_and_their_branches(self) -> None:
        core, client, namespace, ask = begun()
        system = chain(6, "system")
        put(client, namespace, system)
        for chat in range(3):
            put(client, namespace, [*system, *chain(2 + chat, f"chat {chat}")])
        put(client, namespace, chain(4, "alone"))
        client.lease(namespace, system)
        core.store.leasing.account()  # behind the answer
        answer = tree(ask, namespace)
        assert (answer.roots, answer.blocks, answer.runs, answer.changed_blocks) == (2, 6 + 2 + 3 + 4 + 4, 5, 0)
        assert answer.bytes == answer.blocks * namespace.slot_bytes
        assert [(node.level, node.run_blocks, node.blocks) for node in answer.nodes] == [
            (0, 6, 15), (1, 4, 4), (1, 3, 3), (1, 2, 2), (0, 4, 4)
        ]  # fmt: skip
        first = answer.nodes[0]
        assert (first.first_key, first.last_key, first.branches) == (system[0], system[-1], 3)
        assert answer.nodes[1].first_key == chain(4, "chat 2")[0]
        assert (answer.nodes[1].before_blocks, answer.nodes[1].longest_blocks) == (6, 10)
        assert first.longest_blocks == 10
        assert first.held_blocks == 1
        assert first.hits >= 1
        assert answer.nodes[4].hits == 0, "nobody has fetched it"

    def test_below_one_block(self) -> None:
        _core, client, namespace, ask = begun()
        put(client, namespace, chain(6))
        put(client, namespace, [*chain(3), *chain(2, "branch")])
        answer = tree(ask, namespace, key=chain(6)[1])
        assert answer.blocks == 6 - 1 + 2
        assert [(node.before_blocks, node.run_blocks) for node in answer.nodes] == [(1, 2), (3, 3), (3, 2)]
        with pytest.raises(KeyError, match="no block"):
            tree(ask, namespace, key=key_of("nowhere"))

    def test_keys_of_blocks_that_were_replaced_meanwhile_are_not_told(self) -> None:
        core, client, namespace, ask = begun()
        put(client, namespace, chain(3))
        put(client, namespace, chain(3, "b"))

        def replace() -> None:
            if ask.questions == 2:  # the copy is whole, and no key was read yet
                core.store.delete(namespace, words(chain(3)), 0, 1, lambda _: None)
                core.settle()
                put(client, namespace, chain(3, "c"))

        ask.meanwhile = replace
        answer = tree(ask, namespace)
        keys = {node.first_key for node in answer.nodes}
        assert keys == {b"", chain(3, "b")[0]}
        assert chain(3, "c")[0] in {node.first_key for node in tree(Owner(core), namespace).nodes}

    def test_no_question_takes_in_more_than_a_slice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _core, client, namespace, ask = begun()
        put(client, namespace, chain(40))
        tree(ask, namespace)
        few = ask.questions
        monkeypatch.setattr(forest, "SLICE_ROWS", 4)
        answer = tree(ask, namespace)
        assert answer.blocks == 40
        assert ask.questions - few >= few + 40 // 4 - 1

    def test_what_is_too_much_is_refused_and_leaves_room_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _core, client, namespace, ask = begun()
        put(client, namespace, chain(10))
        monkeypatch.setattr(admin_look, "BLOCKS_MOST", 9)
        with pytest.raises(TooManyError, match="more than 9"):
            tree(ask, namespace)
        monkeypatch.setattr(admin_look, "BLOCKS_MOST", 10)
        assert tree(ask, namespace).blocks == 10
        with admin_look._growing, pytest.raises(TooManyError, match="another"):
            draw_tree(ask, tree_wish_of(pb.GetTreeRequest(namespace_digest=namespace.digest.hex())), 0.0)

    @pytest.mark.parametrize(
        "wrong", [{"key": b"short"}, {"depth": 1025}, {"width": 1025}, {"limit": 2000}, {"by": "color"}, {"tenant": ""}]
    )
    def test_wishes_beyond_limits_are_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"key|at most|listed by|tenant"):
            tree_wish_of(pb.GetTreeRequest(namespace_digest="ab" * 32, **wrong))
        wish = tree_wish_of(pb.GetTreeRequest(namespace_digest="ab" * 32, depth=0))
        assert (wish.depth, tree_wish_of(pb.GetTreeRequest(namespace_digest="ab" * 32)).depth) == (0, 8)


class TestStat:
    def test_a_prefix_block_by_block_with_who_keeps_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(admin_look, "KEYS_A_LOOK", 3)
        monkeypatch.setattr(looking, "KEYS_A_LOOK", 3)
        monkeypatch.setattr(admin_look, "KEEPERS_A_LOOK", 1)
        monkeypatch.setattr(looking, "KEEPERS_A_LOOK", 1)
        core, client, namespace, ask = begun()
        keys = chain(8)
        put(client, namespace, keys[:6])
        put(client, namespace, chain(4, "b"))
        held = client.lease(namespace, keys[:4], ttl_ns=30 * SECOND)
        client.lease(namespace, chain(4, "b"))
        first = core.store.pinning.pin(namespace.tenant, namespace, words(keys), 0, 6, 60 * SECOND, Tier.DRAM)
        core.store.pinning.pin(namespace.tenant, namespace, words(chain(4, "b")), 0, 4, 60 * SECOND, Tier.DRAM)
        answer = stat(ask, keys)
        assert [one.state for one in answer.blocks] == ["resident"] * 6 + ["absent"] * 2
        assert [one.key for one in answer.blocks] == keys
        assert (answer.found_blocks, answer.dram_blocks, answer.disk_blocks) == (6, 6, 6)
        assert answer.bytes == 6 * namespace.slot_bytes
        assert [(one.number, one.blocks) for one in answer.pins] == [(first.pin, 6)]
        assert answer.pins[0].left_s == pytest.approx(60.0)
        assert [(one.number, one.blocks) for one in answer.leases] == [(client.session.number, 4)]
        assert answer.leases[0].left_s == pytest.approx(30.0)
        assert (answer.pins_total, answer.leases_total, answer.quality) == (1, 1, "exact")
        client.release(held)
        assert stat(ask, keys).leases_total == 0

    def test_what_is_not_there_is_no_part_of_the_run(self) -> None:
        _core, client, namespace, ask = begun()
        keys = chain(5)
        put(client, namespace, keys)
        answer = stat(ask, [keys[0], key_of("absent"), keys[1]], namespace)
        assert [one.state for one in answer.blocks] == ["resident", "absent", "resident"]
        assert answer.found_blocks == 1
        nothing = stat(ask, [key_of("absent")], namespace)
        assert (nothing.found_blocks, nothing.bytes, nothing.pins_total) == (0, 0, 0)

    def test_a_namespace_must_be_named_where_several_hold_blocks(self) -> None:
        _core, client, namespace, ask = begun()
        client.open(model="empty")
        put(client, namespace, chain(2))
        assert stat(ask, chain(2)).digest == namespace.digest.hex(), "the other one holds nothing"
        put(client, client.open(model="b"), chain(2, "b"))
        with pytest.raises(ValueError, match=r"could be meant.*`kvctl namespaces`"):
            stat(ask, chain(2))
        assert stat(ask, chain(2), namespace).found_blocks == 2
        with pytest.raises(ValueError, match="keys"):
            stat_wish_of(pb.StatPrefixRequest(keys=[]))
        with pytest.raises(ValueError, match="32 bytes"):
            stat_wish_of(pb.StatPrefixRequest(keys=[BlockKey(b"x")]))


def test_a_call_that_is_over_asks_nothing_more() -> None:
    core = Core()

    class Port:
        looking = Looking(core.store)

    class Patient:
        asked = 0

        def ask(self, question: Callable[[Any], T], timeout_s: float) -> T:
            self.asked += 1
            assert 0 < timeout_s <= 5.0
            return question(Port())

    owner = Patient()
    ask = admin_look.asker(owner, 5.0)
    assert ask(lambda looking: looking.leases()) == []
    late = admin_look.asker(owner, 0.0)
    with pytest.raises(TimeoutError):
        late(lambda looking: looking.leases())
    assert owner.asked == 1
