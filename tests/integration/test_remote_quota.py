"""A real daemon whose quota over there is smaller than what it writes: what is used stays, the rest makes room."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvproto.limits import KIB
from tests.integration.test_remote import keep
from tests.node import Node, chain, fetch, put, until, values
from tests.s3 import S3Server, s3_for_daemons

BLOCK_BYTES = 64 * KIB
BLOCKS = 16  # 1 MiB a chain: of the quota of 4 MiB three fit with their headers


@pytest.fixture
def s3() -> Iterator[S3Server]:
    with s3_for_daemons() as server:
        yield server


@contextmanager
def host(s3: S3Server) -> Iterator[Node]:
    """A host without a disk that may have 4 MiB over there."""
    with Node(disks=0) as node:
        node.start(
            "--remote", f"s3://{s3.bucket}/hosts", "--remote-endpoint", s3.endpoint, "--remote-size", "4MiB",
            "--events-listen", "grpc",
        )  # fmt: skip
        yield node


def write(node: Node, s3: S3Server, name: str) -> str:
    """Store a chain and use it once. Returns the name of its object."""
    before, ns, keys = set(s3.objects), node.namespace(BLOCK_BYTES), chain(name, BLOCKS)
    put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
    assert len(fetch(ns, keys).blocks) == BLOCKS
    assert until(lambda: set(s3.objects) - before), node.log()[-2000:]
    (object_name,) = set(s3.objects) - before
    return object_name


@pytest.mark.parametrize("used", [True, False])
def test_a_chain_that_is_used_from_memory_stays_over_there_and_another_one_goes(s3: S3Server, *, used: bool) -> None:
    with host(s3) as node:
        ns = node.namespace(BLOCK_BYTES)
        hot = keep(node, "system prompt", BLOCKS)
        (name,) = s3.objects
        cold = []
        for number in range(9):
            assert not used or len(fetch(ns, hot).blocks) == BLOCKS
            cold.append(write(node, s3, f"cold {number}"))
        assert until(lambda: len(s3.objects) == 3)
        assert (name in s3.objects) == used
        assert set(s3.objects).issuperset(cold[-2:]), "what was written last"


def test_a_chain_that_made_room_is_written_again_when_there_is_room_and_it_is_used(s3: S3Server) -> None:
    with host(s3) as node:
        ns = node.namespace(BLOCK_BYTES)
        hot = keep(node, "system prompt", BLOCKS)
        (name,) = s3.objects
        for number in range(4):
            write(node, s3, f"cold {number}")
        assert until(lambda: name not in s3.objects), "nobody has used it"
        puts = s3.count("PUT")
        for _ in range(20):
            assert len(fetch(ns, hot).blocks) == BLOCKS
        assert until(lambda: s3.count("PUT") > puts, patience_s=2) is False
        assert name not in s3.objects, "what lies there was written just now, and does not go for it"
        ns.delete(chain("cold 3", BLOCKS))
        assert until(lambda: len(fetch(ns, hot).blocks) == BLOCKS and name in s3.objects), node.log()[-2000:]
