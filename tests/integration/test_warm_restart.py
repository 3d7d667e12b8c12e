"""A restart that keeps DRAM: real daemons, by the fd-keeper and by a service manager that plays systemd's part."""

import mmap
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

import kvclient
from kvproto import control_pb2, control_pb2_grpc
from kvproto.limits import KIB, MIB
from tests.node import (
    PATIENCE_S,
    Bytes,
    Node,
    assert_blocks,
    chain,
    end_keeper,
    fetch,
    managed,
    put,
    roots,
    until,
    value,
    values,
)
from tests.raw import raw_client
from tests.systemd import ServiceManager

BLOCK_BYTES = 64 * KIB
FULL = 900  # blocks: 56 of 64 MiB
# Run by a successor of another version: rows and seals of format 2.
UPGRADE = """
import sys
import kvstore.restart
kvstore.restart.FORMAT = 1000
from kvstored.cli import main
sys.exit(main())
"""


# Leases every chain that `fill` has stored, says how many blocks that is, and holds them until it is killed.
READER = """
import signal, sys
import kvclient
from tests.node import chain
run, ttl_s, chains = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
client = kvclient.connect(run, timeout_s=30.0)
ns = client.namespace(block_bytes=64 << 10, model="m", engine="node", layout="flat", dtype="uint8")
leases = [ns.fetch(chain(f"first-{turn}", 50), ttl_s=ttl_s) for turn in range(chains)]
print(sum(lease.blocks for lease in leases), flush=True)
signal.pause()
"""
LEASES_S = (3, 12, 60)  # the next one where a machine is so busy that the last one shows nothing
ROOT = Path(__file__).parents[2]


@dataclass
class Lives:
    """Successive lives of a daemon whose memory somebody keeps: the fd-keeper, or else a service manager."""

    node: Node
    manager: ServiceManager | None

    def begin(self) -> None:
        """A life, and the client, which nobody tells, is connected to it."""
        if self.manager is None:
            self.node.start("--keep", "true")
        else:
            self.manager.start()
            self.manager.wait_ready()
        assert self.node.client.connected

    def kill(self) -> None:
        """`kill -9`."""
        (self.manager or self.node).kill()

    def stop(self) -> None:
        """SIGTERM."""
        if self.manager is None:
            self.node.stop()
        else:
            assert self.manager.stop() == 0


@contextmanager
def lives(keeper: str) -> Iterator[Lives]:
    """No disk tier: whatever is there after a restart was in DRAM."""
    with ExitStack() as stack:
        node = stack.enter_context(Node(disks=0))
        yield Lives(node, stack.enter_context(managed(node)) if keeper == "systemd" else None)


def fill(ns: kvclient.Namespace, name: str, count: int = FULL) -> dict[str, Bytes]:
    """Chains of 50 blocks."""
    filled = {}
    for turn in range(count // 50):
        keys = chain(f"{name}-{turn}", 50)
        filled[f"{name}-{turn}"] = values(keys, BLOCK_BYTES)
        put(ns, keys, filled[f"{name}-{turn}"], durable=False)
    return filled


@pytest.mark.parametrize("keeper", ["fd-keeper", "systemd"])
def test_every_published_block_is_served_after_each_kind_of_end(keeper: str) -> None:
    """And the client goes on by itself, and new blocks go into the kept arenas at once."""
    with lives(keeper) as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        filled = fill(ns, "first")
        for turn, end in enumerate((each.stop, each.kill)):
            before = each.node.client.status.daemon_pid
            end()
            assert ns.fetch(chain("first-0", 50)).blocks == 0, "no daemon, no hit, no exception"
            each.begin()
            assert each.node.client.status.daemon_pid not in {0, before}
            fresh = chain(f"fresh-{turn}", 50)
            put(ns, fresh, values(fresh, BLOCK_BYTES), durable=False)
            for name, wanted in filled.items():
                found = fetch(ns, chain(name, 50))
                assert_blocks(found.blocks, wanted)
                assert found.tiers.dram == 50
            assert_blocks(fetch(ns, fresh).blocks, values(fresh, BLOCK_BYTES))
            ns.delete(fresh)
        log = each.node.log()
        assert log.count("memory: warm=True kept=900 lost=0 withheld=0") == 2, "all leases had been released"
        for name, wanted in fill(ns, "new").items():  # the pool is full of kept blocks: the oldest give way
            assert_blocks(fetch(ns, chain(name, 50)).blocks, wanted)
        for name, wanted in filled.items():
            found = fetch(ns, chain(name, 50))
            assert np.array_equal(found.blocks, wanted[: len(found.blocks)])


def test_a_second_daemon_does_not_serve_what_a_living_one_does_though_the_lock_is_gone() -> None:
    with lives("fd-keeper") as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        keys = chain("first", 50)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        (each.node.run / "lock").unlink()
        line = [sys.executable, "-m", "kvstored", "--runtime-dir", str(each.node.run), *each.node.arguments, "--keep"]
        second = subprocess.run(line, check=False, capture_output=True, text=True, timeout=60)
        assert second.returncode == 75, second
        assert "still uses the memory" in second.stderr
        each.node.assert_alive()
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
        each.kill()
        each.begin()
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))


def test_what_was_not_published_and_what_was_deleted_does_not_come_back() -> None:
    with lives("fd-keeper") as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        keys, doomed, half = chain("stays", 20), roots("doomed", 20), roots("half", 1)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        for key in doomed:
            put(ns, [key], values([key], BLOCK_BYTES), durable=False)
        with raw_client(each.node.run) as raw:
            number = raw.open(BLOCK_BYTES, engine="node", dtype="uint8")
            assert raw.reserve(number, half)[0].ticket
            assert ns.delete(doomed) == 20
            each.kill()
        each.begin()
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
        assert sum(ns.match([key]).blocks for key in (*doomed, *half)) == 0
        put(ns, half, values(half, BLOCK_BYTES), durable=False)
        assert_blocks(fetch(ns, half).blocks, values(half, BLOCK_BYTES))
        each.kill()
        end_keeper(each.node.run)
        each.begin()
        assert not ns.match(keys).blocks, "the control: without a keeper nothing is there"
        assert each.node.log().count("warm=False kept=0 lost=0 withheld=0 nothing was kept") == 2


@pytest.mark.timeout(600)
def test_slots_that_a_stopped_client_may_still_read_are_withheld_until_its_deadline() -> None:
    assert any(map(withheld_under_pressure, LEASES_S)), "the pool was never under pressure"


def withheld_under_pressure(leased_s: float) -> bool:
    """Whether the pool was, while the lease was good."""
    with lives("fd-keeper") as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        keys = chain("leased", 16)
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        with ns.fetch(keys, ttl_s=leased_s) as lease:
            before = [bytes(view) for view in lease.views]
            assert before == [value(key, BLOCK_BYTES).tobytes() for key in keys]
            assert ns.delete(keys[8:]) == 8, "a lease outlives a delete"
            each.kill()
            each.begin()
            turn = 0
            while lease.valid():
                fill(ns, f"flood-{turn}", 200)
                seen = [bytes(view) for view in lease.views]
                assert not lease.valid() or seen == before, "a slot was used again under a lease"
                turn += 1
            if 200 * turn <= FULL:
                return False

            def overwritten() -> bool:
                nonlocal turn
                turn += 1
                fill(ns, f"flood-{turn}", 900)
                return [bytes(view) for view in lease.views] != before

            assert until(overwritten), "withheld for ever"
            return True


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seen", [True, False], ids=["its daemon saw it die", "nobody saw it die"])
def test_memory_that_a_client_had_leased_is_used_again_though_it_and_the_daemon_were_killed(seen: bool) -> None:
    """At once where its end was seen; else when its leases end, since what they cover might still be read."""
    assert any(used_again(leased_s, seen=seen) for leased_s in LEASES_S), "no lease outlived the daemon"


def used_again(leased_s: int, *, seen: bool) -> bool:
    """Whether the leases outlived the daemon, where nobody saw who had them die."""
    with lives("fd-keeper") as each:
        each.node.arguments += ["--lease-ttl-max", f"{leased_s}s"]
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        fill(ns, "first")
        words = [sys.executable, "-c", READER, str(each.node.run), str(leased_s), str(FULL // 50)]
        began_s = time.monotonic()
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as reader:
            try:
                assert reader.stdout is not None
                assert reader.stdout.readline() == f"{FULL}\n", "it has leased all that there is"
                if not seen:
                    each.kill()
            finally:
                reader.kill()
        assert not seen or until(lambda: leases(each.node) == 0)
        each.kill()
        each.begin()
        withheld = re.findall(r"memory: warm=True kept=900 lost=0 withheld=(\d+)", each.node.log())
        assert len(withheld) == 1, each.node.log()
        if not seen and withheld == ["0"]:
            assert time.monotonic() > began_s + leased_s, "leases that are good are not heeded"
            return False
        assert (int(withheld[0]) == 0) == seen
        ns = each.node.namespace(BLOCK_BYTES)
        fresh = {name: values(chain(name, 50), BLOCK_BYTES) for name in (f"new-{turn}" for turn in range(20))}

        def all_there() -> bool:
            for name, blocks in fresh.items():
                ns.store(chain(name, 50), list(blocks), wait=True)
            return all(ns.match(chain(name, 50)).blocks == 50 for name in fresh)

        assert until(all_there, leased_s + PATIENCE_S), "what a dead client had leased is kept for ever"
        for name, wanted in fresh.items():
            assert_blocks(fetch(ns, chain(name, 50)).blocks, wanted)
        assert until(lambda: each.node.client.ping() is not None and leases(each.node) == 0)
        return True


def leases(node: Node) -> int:
    """That are held now, by whomever."""
    with grpc.insecure_channel(f"unix:{node.run}/control.sock") as channel:
        stub = control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call, unused-ignore]
        return int(stub.GetLoad(control_pb2.GetLoadRequest(), timeout=10.0).leases)


def test_another_geometry_starts_cold_and_says_so() -> None:
    with lives("fd-keeper") as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        fill(ns, "before", 100)
        each.kill()
        each.node.start("--keep", "true", "--dram", "96MiB")
        assert each.node.client.connected
        assert ns.match(chain("before-0", 50)).blocks == 0
        assert "memory: warm=False kept=0 lost=0 withheld=0 dram.size was " in each.node.log()
        assert " and is 96MiB now" in each.node.log()
        fill(ns, "after", 100)


def test_an_upgrade_to_another_format_starts_cold_and_says_so() -> None:
    with lives("systemd") as each:
        manager = each.manager
        assert manager is not None
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        fill(ns, "before", 100)
        each.stop()
        manager.command[:3] = [sys.executable, "-c", UPGRADE]
        each.begin()
        assert ns.match(chain("before-0", 50)).blocks == 0
        assert "it was left by another version or configuration" in each.node.log()
        fill(ns, "after", 100)
        each.kill()
        each.begin()
        assert_blocks(fetch(ns, chain("after-1", 50)).blocks, values(chain("after-1", 50), BLOCK_BYTES))
        assert len(manager.fds) <= 4 + 16, "what was left by the other version is not kept for ever"


def test_a_kept_arena_that_was_damaged_gives_misses_and_no_wrong_bytes() -> None:
    """Not even the memory of a former life is believed: bits flip in it while no daemon runs."""
    with lives("systemd") as each:
        each.begin()
        ns = each.node.namespace(BLOCK_BYTES)
        keys = roots("struck", 200)
        for key in keys:
            put(ns, [key], values([key], BLOCK_BYTES), durable=False)
        each.kill()
        assert each.manager is not None
        random = np.random.default_rng(7)
        arenas = [fd for name, fd in each.manager.fds.items() if os.fstat(fd).st_size == 4 * MIB and "arena" in name]
        assert arenas, each.manager.fds
        struck = 0
        for fd in arenas[:2]:
            with mmap.mmap(fd, 4 * MIB) as memory:
                for slot in random.permutation(64)[:16].tolist():
                    at = slot * BLOCK_BYTES + int(random.integers(BLOCK_BYTES))
                    struck += any(memory[slot * BLOCK_BYTES : slot * BLOCK_BYTES + 64])
                    memory[at] ^= 1 << int(random.integers(8))
        each.begin()
        hits = 0
        for key in keys:
            found = fetch(ns, [key]).blocks
            hits += len(found)
            assert not len(found) or np.array_equal(found[0], value(key, BLOCK_BYTES))
        assert hits == 200 - struck
