"""Faults 7, 8 and 19: clients that are killed, that stand still, and that never give anything back.

`tests/herd.py` forks those that are killed. Whatever they held, another client has soon, and all of memory in the end.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from bench.harness import ROOT
from bench.load.levels import levels_of
from kvproto import frames
from kvproto.errors import Grant
from kvproto.frames import Verb
from tests import herd
from tests.fault.test_memory import store
from tests.figures import Recorder
from tests.node import Node, chain, put, until
from tests.raw import RawClient, key, raw_client

KILLS, KILLS_LONG = 30, 5000
LEFT_LONG = 1000  # of the calls of fault 19, these are clients whose forked children keep the socket
STALLS, STALLS_LONG = 2, 500
CALLS, CALLS_LONG = 1000, 10**6
BATCH = 50  # clients between two looks
BLOCK_BYTES = 64 << 10
STALLED_KEYS = 8
AT_ONCE = 32  # frames that are sent before an answer is read
SEED = 7


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A daemon with 16 MiB, in mode ring; `metrics` is where it is asked what it holds."""
    with Node(disks=0, dram="16MiB") as host:
        host.start("--ring", "1MiB", "--metrics-listen", str(host.run / "metrics"))
        yield host
        host.assert_alive()


@contextmanager
def program(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """One that obeys, until the block ends."""
    line = [sys.executable, "-m", *words]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def told(process: "subprocess.Popen[str]", order: str = "") -> dict[str, Any]:
    """Its answer to an order."""
    assert process.stdin is not None
    assert process.stdout is not None
    if order:
        process.stdin.write(f"{order}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    assert line, "it died"
    answer: dict[str, Any] = json.loads(line)
    return answer


def assert_nothing_is_held(node: Node) -> None:
    """No lease, no ticket, no session but those that are there; and all of memory takes new blocks and serves them."""
    assert node.daemon is not None
    pid, metrics = node.daemon.process.pid, node.run / "metrics"

    def held() -> dict[str, float]:
        busy = levels_of(pid, metrics).busy()
        return {name: value for name, value in busy.items() if name != "kvstored_sessions"}

    node.assert_alive()
    assert until(lambda: not held()), held()
    words = ["--runtime-dir", str(node.run), "clear", "--all", "--yes"]
    subprocess.run([sys.executable, "-m", "kvctl", *words], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    ns, blocks = node.namespace(BLOCK_BYTES), (16 << 20) // BLOCK_BYTES
    keys = chain(("all of it", os.urandom(8).hex()), blocks)
    put(ns, keys, np.full((blocks, BLOCK_BYTES), 7, dtype=np.uint8), durable=False)
    assert ns.match(keys).blocks == blocks, "a slot is lost"
    assert ns.delete(keys[:1]) == blocks


# -- killed ------------------------------------------------------------------------------------------------------------


class Looker:
    """A client that lives, and has stored what all of the herd lease."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._namespace = client.open(herd.BLOCK_BYTES, model=herd.MODEL)
        self._arenas: dict[int, int] = {}  # descriptors
        assert until(self._finds_room)  # the arena may be on its way
        store(client, self._namespace, herd.SHARED, b"s")

    def _finds_room(self) -> bool:
        items = self._client.reserve(self._namespace, herd.SHARED)
        granted = [item.ticket for item in items if item.grant == Grant.GRANTED]
        if granted:
            self._client.send(frames.build_abort(0, granted))
        return len(granted) == len(items)

    def look(self, keys: list[bytes], whole: bytes = b"") -> int:
        """How many of these are there; what is, is what was committed, to the last byte."""
        leased = self._client.lease(self._namespace, keys)
        while self._client.unasked:
            head, frame, fds = self._client.unasked.pop(0)
            if head.verb == Verb.ARENA:
                named = [arena[0] for arena in frames.parse_arenas(frame, head)]
                self._arenas.update(zip(named, fds, strict=True))
        for place, one in zip(leased.locations, keys, strict=False):
            found = os.pread(self._arenas[place[0]], herd.BLOCK_BYTES, place[1] * herd.BLOCK_BYTES)
            assert found == (whole or herd.content_of(one)), "half a block is visible"
        if leased.lease:
            self._client.send(frames.build(Verb.RELEASE, 0, releases=[leased.lease]))
        return len(leased.locations)


def kill_clients(node: Node, kills: int) -> tuple[Counter[str], list[float], int]:
    """So many; what each was in the middle of, how long its keys were another's, and how many blocks came through."""
    ways, back_ms, published = Counter[str](), list[float](), 0
    with raw_client(node.run) as survivor, program("tests.herd", str(node.run)) as shepherd:
        looker = Looker(survivor)
        told(shepherd)
        for batch in range(kills // BATCH + (kills % BATCH > 0)):
            count = min(BATCH, kills - batch * BATCH)
            ended = told(shepherd, f"die {SEED + batch} {count}")
            assert not ended["visible"], f"batch {batch}"
            for number in range(count):
                looker.look(herd.keys_of(SEED + batch, number))
            ways.update(ended["ways"])
            back_ms += ended["back_ms"]
            published += ended["published"]
        assert looker.look(herd.SHARED, whole=b"s" * herd.BLOCK_BYTES) == len(herd.SHARED), "the control"
    return ways, back_ms, published


def test_what_killed_clients_held_is_free_at_once_and_never_visible(node: Node) -> None:
    ways, _, _ = kill_clients(node, KILLS)
    assert ways.keys() == set(herd.WAYS)
    assert_nothing_is_held(node)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_5000_killed_clients(node: Node, record_property: Recorder) -> None:
    ways, back_ms, published = kill_clients(node, KILLS_LONG)
    assert_nothing_is_held(node)
    assert min(ways[way] for way in herd.WAYS) >= KILLS_LONG // 10
    assert published, "no committed block came through: the others prove nothing"
    record_property("kills", ways.total())
    record_property("memory_back_p50_ms", float(np.percentile(back_ms, 50)))
    record_property("memory_back_p99_ms", float(np.percentile(back_ms, 99)))
    record_property("memory_back_max_ms", max(back_ms))


# -- stopped -----------------------------------------------------------------------------------------------------------


def stall(node: Node, stalls: int) -> int:
    """A client leases, stops, and reads what another has there by then; how many blocks had changed under it."""
    changed = 0
    with raw_client(node.run) as raw, program("tests.stalling", str(node.run), str(BLOCK_BYTES)) as client:
        told(client)
        ns = node.namespace(BLOCK_BYTES)
        raw.send(frames.build(Verb.OPEN, raw.request(), ns.identity.canonical()))
        _, opened, _ = raw.answer(Verb.OPENED)
        number: int = frames.OPENED_BODY.unpack_from(opened, frames.HEAD_BYTES)[0]
        for turn in range(stalls):
            keys = chain(("stalled", turn), STALLED_KEYS)
            put(ns, keys, np.full((STALLED_KEYS, BLOCK_BYTES), turn % 100, dtype=np.uint8), durable=False)
            places = _places(raw, number, keys)
            assert client.stdin is not None
            client.stdin.write(" ".join(one.hex() for one in keys) + "\n")
            client.stdin.flush()
            stopped = os.waitid(os.P_PID, client.pid, os.WSTOPPED | os.WEXITED)
            assert stopped is not None
            assert stopped.si_status == signal.SIGSTOP, stopped
            assert ns.delete(keys[:1]) == STALLED_KEYS
            _overwrite(node, raw, number, places)
            client.send_signal(signal.SIGCONT)
            found = told(client)
            assert found["leased"] == STALLED_KEYS, "it had what it stopped over"
            assert not found["valid"], "the clock has not told it"
            assert not found["copied"], "what it read past the deadline counts"
            assert found["changed"] == STALLED_KEYS, "nobody else has its slots: there is nothing to be told"
            changed += found["changed"]
    return changed


def _places(raw: RawClient, namespace: int, keys: list[bytes]) -> set[tuple[int, int]]:
    """Where these lie; not leased any more."""
    leased = raw.lease(namespace, keys)
    raw.send(frames.build(Verb.RELEASE, 0, releases=[leased.lease]))
    raw.ping()
    return {(place[0], place[1]) for place in leased.locations}


def _overwrite(node: Node, raw: RawClient, namespace: int, places: set[tuple[int, int]]) -> None:
    """Store until all of these slots are others'. The lease of who stands still keeps them for a while."""
    ns, blocks = node.namespace(BLOCK_BYTES), (16 << 20) // BLOCK_BYTES
    turn = 0

    def covered() -> bool:
        nonlocal turn
        turn += 1
        keys = chain(("over", turn, os.urandom(8).hex()), blocks)
        stored = ns.store(keys, np.full((blocks, BLOCK_BYTES), 200 + turn % 50, dtype=np.uint8), wait=True)
        return bool(stored.lead) and places <= _places(raw, namespace, keys[: stored.lead])

    assert until(covered), "a lease is kept for ever"


def test_who_stands_still_past_its_lease_is_told_so_by_the_clock(node: Node) -> None:
    assert stall(node, STALLS) == STALLS * STALLED_KEYS
    assert_nothing_is_held(node)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_500_stalls(node: Node, record_property: Recorder) -> None:
    record_property("changed_blocks", stall(node, STALLS_LONG))
    record_property("stalls", STALLS_LONG)
    assert_nothing_is_held(node)


# -- never giving back -------------------------------------------------------------------------------------------------


def never_give_back(node: Node, calls: int) -> Counter[str]:
    """Lookups that no fetch follows, and fetches that no release follows, by four sessions; what came of them."""
    seen = Counter[str]()
    keys = [key(1 << 90 | number) for number in range(16)]
    with raw_client(node.run) as a, raw_client(node.run) as b, raw_client(node.run) as c, raw_client(node.run) as d:
        clients = [(client, client.open(herd.BLOCK_BYTES, model="never")) for client in (a, b, c, d)]
        store(a, clients[0][1], keys, b"n")
        while seen["lookups"] + seen["fetches"] < calls:
            for client, namespace in clients:
                for number in range(AT_ONCE):
                    some = b"".join(keys[: 1 + number % len(keys)])
                    if number % 2:
                        client.send(frames.build_match(client.request(), namespace, some))
                    else:
                        client.send(frames.build_lease(client.request(), namespace, some, 10**6, 0))
            for client, _ in clients:
                for number in range(AT_ONCE):
                    head, frame, _ = client.answer(Verb.MATCHED if number % 2 else Verb.LEASED)
                    seen["lookups" if number % 2 else "fetches"] += 1
                    if not number % 2:
                        seen["leases"] += frames.parse_leased(frame, head).lease != 0
    return seen


def leave_sockets(node: Node, count: int, batch_of: int = BATCH) -> None:
    """Clients are killed whose forked children keep the socket: these are no clients, and keep nothing but that."""
    with program("tests.herd", str(node.run)) as shepherd:
        told(shepherd)
        for batch in range(count // batch_of):
            ended = told(shepherd, f"leave {1000 + batch} {batch_of}")
            assert not ended["visible"]
            told(shepherd, "go")


def test_what_is_never_given_back_comes_back(node: Node) -> None:
    seen = never_give_back(node, CALLS)
    assert seen["leases"] > CALLS // 4, "too few were granted to prove anything"
    leave_sockets(node, 10, batch_of=10)
    assert_nothing_is_held(node)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_calls_that_give_nothing_back(node: Node, record_property: Recorder) -> None:
    seen = never_give_back(node, CALLS_LONG - LEFT_LONG)
    leave_sockets(node, LEFT_LONG)
    assert_nothing_is_held(node)
    for name, count in seen.items():
        record_property(name, count)
    record_property("sockets_left_to_children", LEFT_LONG)
    assert seen["leases"] > CALLS_LONG // 10, "too few were granted to prove anything"
