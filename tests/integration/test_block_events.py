"""Events of blocks of real daemons, heard over ZeroMQ: by who keeps sets of hashes, over restarts and clocks."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import zmq

import kvclient
from kvstored.block_events_address import endpoints_of
from kvstored.block_events_numbers import FILE
from kvstored.index_marks import unseal, write_sealed
from tests.node import PATIENCE_S, Node, chain, put, until, values

BLOCK_BYTES: Final = 64 << 10
FAR: Final = 1 << 54  # beyond what any clock says in this decade
KEPT: Final = struct.Struct("<8sQ")


class Subscriber:
    """Keeps a set of hashes, as consumers do that do not count."""

    def __init__(self, sub: "zmq.Socket[bytes]", before: bytes) -> None:
        """What was there `before` it may have heard of, or not."""
        self.held: set[int] = set()
        self._before = {_hash_of(before)}
        self.twice = 0
        self.numbers: list[int] = []
        self._sub = sub

    def hears(self, *keys: bytes) -> bool:
        """Are these and no others there, as far as is known by now?"""
        while self._sub.poll(0):
            _, number, payload = self._sub.recv_multipart()
            self.numbers.append(int.from_bytes(number, "big"))
            for event in msgspec.msgpack.decode(payload)[1]:
                self._learn(event)
        return self.held - self._before == {_hash_of(key) for key in keys}

    def _learn(self, event: dict[str, Any]) -> None:
        hashes = set(event.get("block_hashes", ()))
        if event["type"] == "AllBlocksCleared":
            self.held.clear()
        elif event["type"] == "BlockStored":
            self.twice += len(self.held & hashes)
            self.held |= hashes
        else:
            self.twice += len(hashes - self.held)
            self.held -= hashes


def _hash_of(key: bytes) -> int:
    return int.from_bytes(key[-8:], "big")


@contextmanager
def subscribed(node: Node) -> Iterator[Subscriber]:
    """From when it was greeted."""
    first = chain("first", 1)
    put(node.namespace(BLOCK_BYTES, model="other"), first, values(first, BLOCK_BYTES), durable=False)
    with zmq.Context() as context, context.socket(zmq.SUB) as sub:
        sub.subscribe(b"kv@")
        sub.connect(endpoints_of("ipc", node.run, f"uid-{os.geteuid()}").publish)
        subscriber = Subscriber(sub, first[0])
        assert until(lambda: subscriber.hears() and subscriber.numbers)
        yield subscriber


def rank(node: Node, number: int) -> kvclient.Namespace:
    return node.client.namespace(
        block_bytes=BLOCK_BYTES, model="m", engine="node", layout="flat", dtype="uint8", tp=(number, 2)
    )


def test_who_keeps_a_set_has_what_all_ranks_of_an_engine_have() -> None:
    with Node(disks=0) as node:
        node.start("--events-listen", "ipc")
        ranks, keys = [rank(node, number) for number in range(2)], chain("x", 3)
        with subscribed(node) as subscriber:
            for one in ranks:
                put(one, keys, values(keys, BLOCK_BYTES), durable=False)
            assert until(lambda: subscriber.hears(*keys))
            ranks[1].delete(keys[2:])
            assert until(lambda: subscriber.hears(*keys[:2])), "one rank lacks it"
            assert ranks[0].match(keys).blocks == 3
            ranks[0].delete(keys[1:])
            assert until(lambda: subscriber.hears(*keys[:1]))
            assert subscriber.twice == 0, "who counts is told once as well"


def test_numbers_go_on_over_a_kill_though_the_clock_was_ahead() -> None:
    with Node(disks=0) as node:
        node.start("--events-listen", "ipc")
        keys = chain("x", 2)
        with subscribed(node) as subscriber:
            put(rank(node, 0), keys, values(keys, BLOCK_BYTES), durable=False)
            assert until(lambda: subscriber.hears(*keys))
            kept = node.run / FILE
            magic, until_number = KEPT.unpack(unseal(kept.read_bytes()))
            assert subscriber.numbers[-1] < until_number < FAR
            write_sealed(kept, KEPT.pack(magic, FAR))  # as a life would have whose clock was ahead
            node.kill()
            node.start("--events-listen", "ipc")
            assert until(lambda: subscriber.hears() or subscriber.numbers[-1] >= FAR, PATIENCE_S)
            assert subscriber.numbers[-1] >= FAR
            assert KEPT.unpack(unseal(kept.read_bytes()))[1] > subscriber.numbers[-1]
