"""What clients are promised while a drive does not answer: by a real daemon, and by its successor that kept DRAM."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from kvproto import frames
from kvproto.frames import Verb
from kvproto.limits import KEYS_PER_FRAME
from kvstore.streams import PROMISE_NS
from tests.fault.test_hung_disk import HANGING, Hanging
from tests.node import Node, assert_blocks, chain, fetch, managed, put, until, values
from tests.raw import raw_client

BLOCK_BYTES = 64 << 10
WAIT_NS = 60 * 10**9  # longer than anybody is patient here


@contextmanager
def cold(count: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[Hanging, list[bytes]]]:
    """A daemon with a chain on disk alone. Its DRAM, 512 blocks of which nothing is used, is kept when it dies."""
    with ExitStack() as stack:
        node = stack.enter_context(Node(dram="32MiB", segment="8MiB"))
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("HANG", str(node.home / "hang"))
        manager = stack.enter_context(managed(node, "--disk-admission", "none", command=("-c", HANGING)))
        fds_max, manager.fds_max = manager.fds_max, 0
        manager.start()
        manager.wait_ready()
        keys = chain("cold", count)
        put(node.namespace(block_bytes), keys, values(keys, block_bytes))
        manager.kill()  # DRAM is lost with it, and kept from now on
        manager.fds_max = fds_max
        manager.start()
        manager.wait_ready()
        node.await_disk(node.namespace(block_bytes), keys)
        yield Hanging(node, manager), keys


def test_who_waits_is_promised_more_while_nothing_comes_and_a_successor_keeps_no_more_than_that() -> None:
    with cold(500) as (hanging, keys):
        node = hanging.node
        ns = node.namespace(BLOCK_BYTES)
        with raw_client(node.run) as raw:
            raw.send(frames.build(Verb.OPEN, raw.request(), ns.identity.canonical()))
            _, opened, _ = raw.answer(Verb.OPENED)
            number: int = frames.OPENED_BODY.unpack_from(opened, frames.HEAD_BYTES)[0]
            with hanging.hangs("pread"):
                raw.send(frames.build_lease(raw.request(), number, b"".join(keys), 10**6, WAIT_NS))
                head, answer, _ = raw.answer(Verb.LEASED)
                leased = frames.parse_leased(answer, head)
                assert (len(leased.locations), leased.coming) == (0, 500), "all of DRAM, but for a rest"
                deadline_ns = leased.deadline_ns
                for _ in range(2):
                    assert deadline_ns <= time.monotonic_ns() + PROMISE_NS
                    ready = raw.ready()
                    assert (ready.lease, ready.locations, ready.left) == (leased.lease, [], 500)
                    assert ready.deadline_ns > deadline_ns
                    deadline_ns = ready.deadline_ns
                hanging.manager.kill()
        hanging.manager.start()
        hanging.manager.wait_ready()
        ns = node.namespace(BLOCK_BYTES)
        assert "warm=True" in node.log()
        new = chain("new", 60)
        assert until(lambda: ns.store(new, values(new, BLOCK_BYTES), wait=True).lead == 60)
        assert_blocks(fetch(ns, new).blocks, values(new, BLOCK_BYTES))


@pytest.mark.parametrize(
    ("there", "block_bytes"),
    [
        pytest.param(10, BLOCK_BYTES, id="one part"),
        pytest.param(KEYS_PER_FRAME + 10, 4096, id="two parts, of which one does not wait", marks=pytest.mark.long),
    ],
)
def test_a_client_reads_what_came_before_a_wait_that_was_longer_than_its_lease(there: int, block_bytes: int) -> None:
    count = there + 20
    with cold(count, block_bytes) as (hanging, keys):
        ns = hanging.node.namespace(block_bytes)
        assert len(fetch(ns, keys[:there]).blocks) == there  # these lie in DRAM now
        targets = np.zeros((count, block_bytes), dtype=np.uint8)
        with hanging.hangs("pread"):
            lease = ns.fetch(keys, wait_s=20.0, ttl_s=0.01)
            assert lease.expected == count
            told_ns = lease.deadline_ns
            assert until(lambda: lease.deadline_ns > told_ns + PROMISE_NS), "promised anew, twice at least"
            assert until(lease.valid)  # or this process or the daemon stood still
            assert [bytes(view) for view in lease.views_of(range(there))] == [
                block.tobytes() for block in values(keys[:there], block_bytes)
            ]
        with lease:
            assert lease.copy_to(targets)
        assert_blocks(targets, values(keys, block_bytes))
