"""Three hosts on one machine, a router in front, an object store behind: one is killed, one cut off, both come back."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from bench.cable import Cable
from bench.cluster import BLOCK_BYTES, GROUPS, Far, Troubled, compare_routes, object_store, trouble
from bench.cluster_load import content_of, key_of, talks
from tests.node import until

pytestmark = pytest.mark.slow

LONGEST_S = 20.0  # far above what any call may take: a call that hangs is no question of a fast machine


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            patch.setenv(name, os.environ.get(name, ""))  # put back afterwards
        with object_store() as far:
            yield far


def troubled(far: Far, count: int) -> Troubled:
    found = trouble(far, talks(GROUPS, count), dram="16MiB", block_bytes=BLOCK_BYTES, threads=2, say=print)
    assert sum(seen.requests for seen in found.all) == count
    for seen in found.all:
        assert seen.wrong == 0
        assert 0 < seen.hits < seen.blocks, "some were there, and some were computed"
        assert seen.longest_s < LONGEST_S
    return found


def test_hosts_that_are_killed_and_cut_off_cost_hits_and_never_a_byte(far: Far) -> None:
    found = troubled(far, 160)
    assert found.killed.share > 0.1, "two of three hosts serve"
    assert found.mended.share > found.killed.share / 2
    assert found.brought_blocks > 0, "who began with nothing has what others wrote beyond"


@pytest.mark.long
def test_the_same_with_many_requests(far: Far) -> None:
    found = troubled(far, 4000)
    assert found.mended.share > 0.3
    assert found.brought_blocks >= 16 * GROUPS // 2


def test_a_router_that_follows_events_saves_more_than_turns_do() -> None:
    requests = talks(GROUPS, 200)
    turns, events = compare_routes(requests, dram="16MiB", block_bytes=BLOCK_BYTES, threads=1, say=print)
    assert (turns.requests, events.requests) == (200, 200)
    assert (turns.wrong, events.wrong) == (0, 0)
    assert events.hits > turns.hits > 0
    assert 1 > events.saved > turns.saved > 0, "seconds, too"
    assert len(events.by_host) == 3, "all memories are used"


def test_a_wrong_byte_would_be_seen() -> None:
    """The control of all the others: a key whose content is another one's."""
    one, other = (content_of(key_of(name), 4096) for name in "ab")
    assert not (one == other).all()
    assert (one == content_of(key_of("a"), 4096)).all()


def test_what_goes_through_a_cable_waits_while_it_is_cut() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Cable(server.getsockname()[1]) as cable:
        echo = threading.Thread(target=_echo, args=(server,), daemon=True)
        echo.start()
        with socket.create_connection(("127.0.0.1", cable.port)) as near:
            near.settimeout(30)
            near.sendall(b"one")
            assert near.recv(16) == b"one"
            cable.cut()
            near.sendall(b"two")
            near.setblocking(False)
            assert not until(lambda: _has(near), patience_s=0.05)
            near.settimeout(30)
            cable.mend()
            assert near.recv(16) == b"two"
        echo.join(30)


def _has(near: socket.socket) -> bool:
    try:
        return bool(near.recv(16, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def _echo(server: socket.socket) -> None:
    far, _ = server.accept()
    with far:
        while piece := far.recv(16):
            far.sendall(piece)
