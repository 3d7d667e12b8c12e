"""The remote tier of real daemons over a real socket: what one host has written, another one finds, or misses."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest
from rich.console import Console

from kvctl import render
from kvproto import control_pb2, control_pb2_grpc
from kvproto.limits import GIB, KIB
from tests.node import Node, assert_blocks, chain, fetch, put, until, values
from tests.s3 import KEY_ID, S3Server, s3_for_daemons

BLOCK_BYTES = 64 * KIB


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[S3Server]:
    """One bucket for all tests of this module, which have chains of their own."""
    with s3_for_daemons() as server:
        yield server


@contextmanager
def host(s3: S3Server, *arguments: str) -> Iterator[Node]:
    """A host without a disk, whose daemon serves."""
    with Node(disks=0) as node:
        remote = ("--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "1GiB")
        node.start(*remote, "--remote-deadline", "1s", "--events-listen", "grpc", *arguments)
        yield node


@pytest.fixture(scope="module")
def writer(s3: S3Server) -> Iterator[Node]:
    """A host that stores and fetches, so that what it has is written."""
    with host(s3) as node:
        yield node


@pytest.fixture(scope="module")
def reader(s3: S3Server) -> Iterator[Node]:
    """A host that has nothing but what it finds in the bucket."""
    with host(s3) as node:
        yield node


def keep(node: Node, name: str, count: int, block_bytes: int = BLOCK_BYTES) -> list[bytes]:
    """Store a chain and use it once, until the bucket has it."""
    ns, keys = node.namespace(block_bytes), chain(name, count)
    put(ns, keys, values(keys, block_bytes), durable=False)
    assert len(fetch(ns, keys).blocks) == count
    assert until(lambda: beyond(node).issuperset(keys)), node.log()[-2000:]
    return keys


def beyond(node: Node) -> set[bytes]:
    """What routers are told is in the bucket."""
    with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
        stub = control_pb2_grpc.ControlStub(channel)
        there = stub.WatchBlocks(control_pb2.WatchBlocksRequest(tenant=f"uid-{os.geteuid()}"))
        return {change.key for message in there for change in message.changes if change.remote}


def test_what_one_host_wrote_another_one_misses_once_and_then_has(writer: Node, reader: Node, s3: S3Server) -> None:
    keys = keep(writer, "shared", 100)
    ns = reader.namespace(BLOCK_BYTES)
    assert ns.match(keys).blocks == 0, "a look-up waits for nobody"
    assert until(lambda: ns.match(keys).blocks == 100), reader.log()[-3000:]
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert ns.match(chain("never", 3)).blocks == 0


def test_what_is_over_there_is_told_to_routers_until_it_is_there_no_more(writer: Node, s3: S3Server) -> None:
    keys, other = keep(writer, "routed", 5), keep(writer, "routed, too", 3)
    assert beyond(writer) >= {*keys, *other}
    assert sum(map(len, list(s3.objects.values()))) >= 8 * BLOCK_BYTES, "what is told is so"
    writer.namespace(BLOCK_BYTES).delete(keys[3:])
    assert until(lambda: not set(keys) & beyond(writer)), "the object that had them is gone"
    assert beyond(writer).issuperset(other), "the control"


def test_a_prefetch_by_name_brings_what_the_bucket_has(writer: Node, reader: Node, s3: S3Server) -> None:
    keys = keep(writer, "by name", 12, block_bytes=5000)
    ns = reader.namespace(5000)
    ns.prefetch(keys)
    assert until(lambda: len(fetch(ns, keys).blocks) == 12)
    assert_blocks(fetch(ns, keys).blocks, values(keys, 5000))


def test_a_changed_object_is_a_miss_and_is_left_alone(writer: Node, reader: Node, s3: S3Server) -> None:
    keys = keep(writer, "changed", 4)
    there = s3.objects.copy()  # others come meanwhile
    (name,) = [name for name, content in there.items() if name.count("/4.") and len(content) > 4 * BLOCK_BYTES]
    s3.flip(name, 4096 + 2 * BLOCK_BYTES + 17)
    ns = reader.namespace(BLOCK_BYTES)
    ns.match(keys)
    assert until(lambda: "damaged object" in reader.log()), reader.log()[-2000:]
    assert len(fetch(ns, keys).blocks) == 0
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))


def test_what_was_deleted_or_cleared_is_gone_over_there(writer: Node, reader: Node, s3: S3Server) -> None:
    """The names of another namespace's objects tell that not all goes."""
    other = keep(writer, "other", 3, block_bytes=6000)
    keys = keep(writer, "deleted", 5, block_bytes=7000)
    before = set(s3.objects)
    writer.namespace(7000).delete(keys[2:3])
    assert until(lambda: len(before - set(s3.objects)) == 1)
    ns = reader.namespace(7000)
    ns.match(keys)
    assert until(lambda: len(fetch(reader.namespace(6000), other).blocks) == 3)
    assert ns.match(keys).blocks == 0


def test_a_far_side_that_is_down_disturbs_nobody_and_heals_by_itself(writer: Node, reader: Node, s3: S3Server) -> None:
    late = keep(writer, "late", 6)
    ns = reader.namespace(BLOCK_BYTES)
    refused = s3.count("LIST")
    for trouble in ("slow", "broken"):
        s3.broken = trouble == "broken"
        with s3.stalling():
            for number in range(8):
                keys = chain(f"while {trouble} {number}", 4)
                assert ns.match(keys).blocks == 0
                put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
                assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
            assert ns.match(late).blocks == 0
    assert until(lambda: s3.count("LIST") > refused + 3)
    s3.broken = False
    assert until(lambda: ns.match(late).blocks == 6), reader.log()[-2000:]
    assert_blocks(fetch(ns, late).blocks, values(late, BLOCK_BYTES))
    reader.assert_alive()


def told(node: Node) -> tuple[control_pb2.GetStatusResponse, str]:
    """What status says, and as operators see it."""
    with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
        answer = control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest())
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render.status(answer))
    return answer, console.export_text()


def test_status_and_warnings_say_how_it_stands(writer: Node, s3: S3Server) -> None:
    keep(writer, "told", 3)
    assert until(lambda: told(writer)[0].remote.writing == told(writer)[0].remote.reading == "goes on")
    answer, text = told(writer)
    assert answer.remote.kept >= 3
    assert 3 * BLOCK_BYTES < answer.remote.used_bytes <= sum(map(len, list(s3.objects.values())))
    assert answer.remote.capacity_bytes == GIB
    assert (answer.remote.reading, answer.remote.writing) == ("goes on", "goes on")
    assert "reading goes on, writing goes on" in text
    with grpc.insecure_channel(f"unix:{writer.run}/control.sock") as channel:
        load = control_pb2_grpc.ControlStub(channel).GetLoad(control_pb2.GetLoadRequest())
    later = told(writer)[0].remote.used_bytes  # what other tests stored may be on its way still
    assert load.remote.reading == "goes on"
    assert 0 < answer.remote.used_bytes <= load.remote.used_bytes <= later
    assert not load.remote.HasField("read_bytes_per_s"), "it has written, and read nothing"
    assert not any("remote" in warning for warning in answer.warnings)
    s3.key_id = "another"
    try:
        writer.namespace(BLOCK_BYTES).match(chain("refused", 3))
        assert until(lambda: told(writer)[0].remote.reading == "stopped")
        answer, text = told(writer)
        assert answer.remote.refused
        assert any("credentials" in warning for warning in answer.warnings)
        assert "reading stopped" in text
        assert "not-a-secret" not in text + writer.log()
    finally:
        s3.key_id = KEY_ID
