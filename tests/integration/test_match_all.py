"""MATCH over several namespaces against a real daemon: threads, asyncio, clients of the version before."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

import kvclient
import kvclient.aio
from bench.process import DaemonProcess
from kvclient import Client, Namespace
from kvclient.connection import Connection
from kvclient.results import Match
from kvproto import frames
from kvproto.errors import Code
from kvproto.frames import Hello, Verb
from kvproto.limits import MATCHES_PER_FRAME, NAMESPACES_PER_MATCH, PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from tests.node import PATIENCE_S, chain
from tests.raw import dial, key, raw_client

BLOCK = 4096


SHAPE = {"engine": "e", "layout": "l", "dtype": "u8", "block_tokens": 4, "block_bytes": BLOCK}


def shards_of(client: Client, count: int, model: str) -> list[Namespace]:
    return [
        client.namespace(model=model, tp=(rank, count), **SHAPE)  # type: ignore[arg-type]
        for rank in range(count)
    ]


def store(shards: Sequence[Namespace], keys: Sequence[bytes], lengths: Sequence[int]) -> None:
    for rank, (shard, length) in enumerate(zip(shards, lengths, strict=True)):
        blocks = [np.full(BLOCK, rank, dtype=np.uint8)] * length
        assert shard.store(keys[:length], blocks, wait=True).lead == length


def test_every_flavour_and_version_of_a_client_hears_the_same(daemon: DaemonProcess) -> None:
    keys, lengths = chain("common", 1500), [1500, 1203, 1400, 1203]
    old = Connection(daemon.runtime_dir, Hello("old", version_high=PROTOCOL_VERSION_OLDEST), 30 * 10**9)
    old.start()
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client, Client(old) as before:
        shards = shards_of(client, 4, "flavours")
        store(shards, keys, lengths)
        found = client.match(shards, keys)
        assert (found.blocks, found.tiers.dram, found.pending) == (1203, 1203, 0)
        assert [shard.match(keys).blocks for shard in shards] == lengths, "the control: they differ"
        assert client.match(shards[:1], keys).blocks == 1500
        assert client.match(shards[:3:2], keys).blocks == 1400
        session = old.session()
        assert session is not None
        assert session.welcome is not None
        assert session.welcome.version == PROTOCOL_VERSION_OLDEST < PROTOCOL_VERSION
        assert before.match(shards_of(before, 4, "flavours"), keys) == found

    async def ask() -> Match:
        async with await kvclient.aio.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as there:
            theirs = [
                await there.namespace(model="flavours", tp=(rank, 4), **SHAPE)  # type: ignore[arg-type]
                for rank in range(4)
            ]
            return await there.match(theirs, keys)

    assert asyncio.run(ask()) == found


def test_what_one_rank_has_dropped_is_there_for_none(daemon: DaemonProcess) -> None:
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        shards, keys = shards_of(client, 8, "dropped"), chain("dropped", 20)
        store(shards, keys, [20] * 8)
        assert client.match(shards, keys).blocks == 20
        shards[5].delete(keys[7:8])
        assert client.match(shards, keys).blocks == 7
        assert client.match(shards[:5], keys).blocks == 20


def test_the_largest_frame_is_served_and_a_larger_one_ends_the_session(daemon: DaemonProcess) -> None:
    most = MATCHES_PER_FRAME // NAMESPACES_PER_MATCH
    with raw_client(daemon.runtime_dir) as client:
        number = client.open()
        client.send(frames.build_match_all(1, [number] * NAMESPACES_PER_MATCH, key(1) * most))
        head, frame, _ = client.answer(Verb.MATCHED)
        assert frames.parse_matched(frame, head) == frames.NOTHING_MATCHED
        client.send(frames.build_match_all(2, [number] * NAMESPACES_PER_MATCH, key(1) * (most + 1)))
        assert client.goodbye()[0] is Code.LIMIT


def test_a_namespace_that_another_session_opened_ends_the_session(daemon: DaemonProcess) -> None:
    with raw_client(daemon.runtime_dir) as client, raw_client(daemon.runtime_dir) as other:
        mine, theirs = client.open(model="mine"), other.open(model="theirs")
        client.send(frames.build_match_all(1, [mine, mine], key(1)))
        client.answer(Verb.MATCHED)
        client.send(frames.build_match_all(2, [mine, theirs], key(1)))
        assert client.goodbye()[0] is Code.BAD_NAMESPACE
        other.ping()


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [(1, PROTOCOL_VERSION_OLDEST, PROTOCOL_VERSION_OLDEST), (PROTOCOL_VERSION, PROTOCOL_VERSION + 5, PROTOCOL_VERSION),
     (1, PROTOCOL_VERSION_OLDEST - 1, None), (PROTOCOL_VERSION + 1, PROTOCOL_VERSION + 1, None)],
)  # fmt: skip
def test_the_highest_version_that_both_speak_is_chosen(
    daemon: DaemonProcess, low: int, high: int, chosen: int | None
) -> None:
    if chosen is not None:
        with raw_client(daemon.runtime_dir, version_low=low, version_high=high) as client:
            assert client.welcome is not None
            assert client.welcome.version == chosen
    else:
        client = dial(daemon.runtime_dir)
        client.send(frames.build_hello(1, Hello("x", version_low=low, version_high=high)))
        assert client.goodbye()[0] is Code.REFUSED
        client.close()
