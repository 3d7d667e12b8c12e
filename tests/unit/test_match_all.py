"""MATCH_ALL: what several namespaces have of one chain, in the store and over the client's protocol."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

import kvclient
from kvproto import frames
from kvproto.errors import LimitError, NamespaceError, ProtocolError, UsageError
from kvproto.frames import NOTHING_MATCHED, UNKNOWN_NS, Head, Matched, Verb
from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, MATCHES_PER_FRAME, NAMESPACES_PER_MATCH
from kvproto.policy_frames import Tier
from kvstore.sessions import Namespace
from tests.core import SECOND, Client, Core, chain, words
from tests.peer import Peer
from tests.unit.client_kit import BLOCK_BYTES, client_of, keys_of
from tests.unit.test_costing import teach, time_loads
from tests.unit.test_disk import make, put

SEED = 20261121


def ranks(client: Client, count: int) -> list[Namespace]:
    return [client.open(model=f"rank {number}") for number in range(count)]


def match_all(client: Client, namespaces: Sequence[Namespace], keys: Sequence[bytes]) -> Matched:
    return client.store.match_all(namespaces, words(keys), 0, len(keys))


def match(client: Client, namespace: Namespace, keys: Sequence[bytes]) -> Matched:
    return client.store.match(namespace, words(keys), 0, len(keys))


# -- the store --------------------------------------------------------------------------------------------------


def test_a_block_is_there_if_every_namespace_has_it() -> None:
    client = Core().client()
    first, second, third = ranks(client, 3)
    keys = chain(8)
    client.put(first, keys)
    client.put(second, keys[:5])
    client.put(third, keys[:6])
    assert match_all(client, [first, second, third], keys)[:4] == (0, 5, 0, 0)
    assert match_all(client, [first, third], keys)[:4] == (0, 6, 0, 0)
    assert match_all(client, [first], keys) == match(client, first, keys)
    assert match_all(client, [first, second, *ranks(client, 4)], keys) is NOTHING_MATCHED
    client.put(second, keys[6:7], keys[5])  # behind a gap: of no use
    assert match_all(client, [first, second, third], keys)[:4] == (0, 5, 0, 0)


def test_a_block_is_pending_if_each_namespace_has_it_or_is_about_to() -> None:
    client = Core().client()
    first, second = ranks(client, 2)
    keys = chain(8)
    client.put(first, keys)
    client.put(second, keys[:2])
    client.begin(second, keys[2:6], keys[1])
    assert match_all(client, [first, second], keys)[:4] == (0, 2, 0, 4)
    assert match_all(client, [second, first], keys)[:4] == (0, 2, 0, 4)
    client.begin(third := client.open(model="third"), keys[:3])
    assert match_all(client, [first, second, third], keys)[:4] == (0, 0, 0, 3)
    assert match_all(client, [first, second], keys[:2])[:4] == (0, 2, 0, 0)


def test_a_block_lies_on_disk_if_any_namespace_has_it_there_alone() -> None:
    core = make(arenas=3)
    client = core.client()
    first, second = ranks(client, 2)
    for namespace in (first, second):
        put(client, namespace, chain(8))
    for number in range(6):  # their tails give way, but of what was used lately
        client.fetch(second, chain(8)[:5])
        put(client, first, chain(8, f"filler {number}"))
    alone = match(client, first, chain(8))
    other = match(client, second, chain(8))
    assert (alone.dram + alone.disk, other.dram + other.disk) == (8, 8)
    assert alone.disk > other.disk > 0, "the control: they differ"
    for order in ([first, second], [second, first]):
        assert match_all(client, order, chain(8))[:4] == (0, 8 - alone.disk, alone.disk, 0)
    assert match_all(client, [first, second], chain(8)[: alone.dram])[:4] == (0, alone.dram, 0, 0)


def test_the_slowest_namespace_says_how_long_it_takes_and_only_for_what_all_have() -> None:
    core = Core()
    client = core.client()
    slow, quick, silent = ranks(client, 3)
    keys = chain(30)
    client.put(slow, keys)
    client.put(quick, keys[:20])
    client.put(silent, keys[:10])
    teach(core.store.costing, slow, scale=3.0)
    teach(core.store.costing, quick)
    time_loads(core.store.costing, slow, Tier.DRAM, 1e9)
    found, there = match_all(client, [quick, slow], keys), match(client, slow, keys[:20])
    assert match_all(client, [slow, quick], keys) == found
    assert found == Matched(0, 20, 0, 0, there.load_ns, there.recompute_ns)
    assert found.recompute_ns > 2 * match(client, quick, keys).recompute_ns
    assert found.recompute_ns < match(client, slow, keys).recompute_ns, "of what all have, not of what one has"
    found = match_all(client, [quick, slow, silent], keys)
    assert (found.dram, found.recompute_ns) == (10, UNKNOWN_NS)
    assert found.load_ns != UNKNOWN_NS


def test_any_stores_have_in_common_what_each_of_them_says() -> None:
    rng = random.Random(SEED)
    core = make(arenas=6)
    client = core.client()
    namespaces = ranks(client, 5)
    keys = chain(12)
    seen = set()
    for _ in range(120):
        namespace = rng.choice(namespaces)
        if rng.random() < 0.2:
            client.delete(namespace, [rng.choice(keys)])
            core.work_all()
        elif rng.random() < 0.3:
            core.finish_all()
        else:
            tickets = client.begin(namespace, keys[: rng.randrange(1, 13)])
            if rng.random() < 0.8:
                client.commit(tickets)
        some = rng.sample(namespaces, rng.randrange(1, 6))
        asked = keys[: rng.randrange(1, 13)]
        alone = [match(client, namespace, asked) for namespace in some]
        there = min(found.dram + found.disk for found in alone)
        coming = min(found.dram + found.disk + found.pending for found in alone)
        found = match_all(client, some, asked)
        assert (found.dram + found.disk, found.pending) == (there, coming - there), SEED
        assert found.disk >= max(match(client, namespace, asked[:there]).disk if there else 0 for namespace in some)
        seen.add((there, coming))
    assert len(seen) > 10, "the control: all sorts of answers came"


def test_a_look_at_many_namespaces_counts_as_one_and_notes_the_lease_before_it() -> None:
    core = Core()
    client = core.client()
    first, second = ranks(client, 2)
    client.put(first, chain(4))
    client.put(second, chain(2))
    tally = core.store.tally
    before = tally.matches, tally.match_hits, tally.match_misses
    match_all(client, [first, second], chain(4))
    assert (tally.matches, tally.match_hits, tally.match_misses) == (before[0] + 1, before[1] + 2, before[2] + 2)
    client.ask(first, chain(4), ttl_ns=SECOND)
    assert core.store.leasing._answered is not None
    match_all(client, [first, second], chain(4))
    assert core.store.leasing._answered is None


def test_a_namespace_that_the_session_has_not_opened_is_a_typed_error() -> None:
    core = Core()
    mine, theirs = core.client("a"), core.client("b")
    own, foreign = mine.open(), theirs.open()
    for client, namespace in ((mine, own), (theirs, foreign)):
        assert core.store.namespace(client.session, namespace.number) is namespace
    with pytest.raises(NamespaceError):
        core.store.namespace(mine.session, foreign.number)


# -- the frame --------------------------------------------------------------------------------------------------


def head_of(frame: bytes) -> Head:
    return frames.parse_head(frame, len(frame))


@pytest.mark.parametrize(
    ("namespaces", "count", "right"),
    [
        (1, 1, True), (1, KEYS_PER_FRAME, True), (4, KEYS_PER_FRAME, True), (64, 64, True), (0, 1, False),
        (NAMESPACES_PER_MATCH + 1, 1, False), (5, KEYS_PER_FRAME, False), (64, 65, False), (1, 0, False),
        (1, KEYS_PER_FRAME + 1, False),
    ],
)  # fmt: skip
def test_a_frame_asks_for_no_more_than_the_limits_allow(namespaces: int, count: int, right: bool) -> None:
    numbers = list(range(1, namespaces + 1))
    frame = frames.build_match_all(7, numbers, bytes(KEY_BYTES * count))
    if right:
        parsed, keys_at = frames.parse_match_all(frame, head_of(frame))
        assert list(parsed) == numbers
        assert keys_at % 8 == 0
        assert keys_at + KEY_BYTES * count == len(frame)
        assert count * namespaces <= MATCHES_PER_FRAME
    else:
        with pytest.raises(LimitError):
            frames.parse_match_all(frame, head_of(frame))


@pytest.mark.parametrize("namespaces", [1, 2, 3])
def test_a_frame_that_is_cut_short_breaks_the_protocol(namespaces: int) -> None:
    body = frames.build_match_all(7, range(namespaces), bytes(KEY_BYTES))[frames.HEAD_BYTES :]
    for length in range(len(body)):
        frame = frames.build(Verb.MATCH_ALL, 7, body[:length], count=1)
        with pytest.raises(ProtocolError):
            frames.parse_match_all(frame, head_of(frame))


# -- the client -------------------------------------------------------------------------------------------------


def namespace_of(client: kvclient.Client, rank: int) -> kvclient.Namespace:
    return client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES, tp=(rank, 8))


def test_one_frame_asks_for_all_and_long_chains_go_in_pieces(tmp_path: Path) -> None:
    keys = keys_of(300)
    with Peer(tmp_path) as peer, client_of(peer) as client:
        shards = [namespace_of(client, rank) for rank in range(8)]
        peer.do(lambda: peer.blocks.update(dict.fromkeys(keys[:200], (None, 0))))  # type: ignore[arg-type]
        assert client.match(shards, keys).blocks == 200
        assert peer.seen.count(Verb.MATCH_ALL) == 1
        assert Verb.MATCH not in peer.seen
        many = shards * 8  # 64 keys a frame: three whole ones, and what is left of the run
        assert client.match(many, keys).blocks == 200
        assert peer.seen.count(Verb.MATCH_ALL) == 1 + 4
        assert client.match(shards[:1], keys).blocks == 200
        assert peer.seen.count(Verb.MATCH) == 1, "one namespace is the plain question"


def test_a_daemon_that_does_not_know_the_question_is_asked_one_namespace_at_a_time(tmp_path: Path) -> None:
    answers = {
        1: Matched(0, 6, 2, 1, 900, 5000), 2: Matched(0, 5, 0, 2, 1000, 6000), 3: Matched(0, 5, 1, 1, 800, 9000),
    }  # fmt: skip
    asked: list[int] = []

    def matched(peer: Peer, head: Head, frame: bytes) -> None:
        asked.append(head.count)
        body = frames.MATCHED_BODY.pack(*answers[len(asked)])
        peer.send(frames.build(Verb.MATCHED, head.request, body))

    with Peer(tmp_path) as peer:
        peer.version = 3
        peer.instead[Verb.MATCH] = matched
        with client_of(peer) as client:
            shards = [namespace_of(client, rank) for rank in range(3)]
            found = client.match(shards, keys_of(12))
            assert (found.blocks, found.pending, found.tiers.dram, found.tiers.disk) == (5, 2, 3, 2)
            assert asked == [12, 9, 7], "as far as all before it reach"
            assert (found.load_s, found.recompute_s) == (None, None), "nobody has said what five blocks take"
            assert found.worth_loading
            assert Verb.MATCH_ALL not in peer.seen
            assert client.connected
            asked.clear()
            answers.update({1: answers[2], 3: Matched(0, 5, 0, 1, 800, 9000)})
            found = client.match(shards, keys_of(12))
            assert (found.blocks, found.load_s, found.recompute_s) == (5, 1e-6, 9e-6)
            asked.clear()
            answers[2] = NOTHING_MATCHED
            assert client.match(shards, keys_of(12)).blocks == 0
            assert len(asked) == 2


def test_without_an_answer_nothing_is_there(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer, timeout_s=0.1) as client:
        shards = [namespace_of(client, rank) for rank in range(2)]
        peer.mute(Verb.MATCH_ALL)
        assert client.match(shards, keys_of(3)).blocks == 0
    with kvclient.connect(tmp_path / "nowhere", timeout_s=0.1) as client:
        assert client.match([namespace_of(client, 0), namespace_of(client, 1)], keys_of(3)).blocks == 0


def test_what_cannot_be_asked_is_an_error_at_once(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client, kvclient.connect(tmp_path, timeout_s=0.1) as other:
        mine, theirs = namespace_of(client, 0), namespace_of(other, 0)
        for namespaces in ([], [mine] * 65, [mine, theirs], [mine, None], mine):
            with pytest.raises(UsageError):
                client.match(namespaces, keys_of(1))  # type: ignore[arg-type]
        with pytest.raises(UsageError):
            client.match([mine], [b"short"])
        assert client.match([mine] * 64, []).blocks == 0
        assert Verb.MATCH_ALL not in peer.seen


def test_an_answer_of_more_blocks_than_were_asked_for_ends_the_session(tmp_path: Path) -> None:
    def lie(peer: Peer, head: Head, frame: bytes) -> None:
        body = frames.MATCHED_BODY.pack(0, 4, 0, 0, 1, 1)
        peer.send(frames.build(Verb.MATCHED, head.request, body))

    with Peer(tmp_path) as peer, client_of(peer) as client:
        shards = [namespace_of(client, rank) for rank in range(2)]
        peer.instead[Verb.MATCH_ALL] = lie
        assert client.match(shards, keys_of(3)).blocks == 0
        assert client.match(shards, keys_of(4)).blocks in (0, 4)
        peer.wait_for(lambda: peer.hellos == 2)
