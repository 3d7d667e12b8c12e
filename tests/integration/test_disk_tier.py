"""The disk tier of a real daemon, seen from its clients and its files: down, up, over a restart, within its limit."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvproto.limits import KIB, MIB
from kvstore.tier.format import HEADER_BYTES, Codec, stored_slot_bytes
from tests.integration.test_kvctl_acting import body, kvctl
from tests.integration.test_metrics import scrape
from tests.node import (
    PATIENCE_S,
    WAIT_S,
    Node,
    assert_blocks,
    bf16_values,
    census,
    chain,
    fetch,
    managed,
    put,
    put_roots,
    roots,
    until,
    value,
    values,
)
from tests.raw import raw_client

BLOCK_BYTES = 64 * KIB
COLD = ("streamed", "chunked", "shared", "abandoned")
# The daemon, on a host whose processors are busy as long as a file is there.
BUSY_OR_IDLE = """
import os, sys
from kvstored.cli import main
from kvstored.workers import HostWorkers
HostWorkers.idle_share = lambda self: 0.0 if os.path.exists(os.environ["BUSY"]) else 1.0
sys.exit(main())
"""


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as started:
        yield started


@pytest.fixture(scope="module")
def cold() -> Iterator[Node]:
    """A node in its second life, with chains of 28 blocks of 1 MiB that lie on disk alone, one for each test."""
    with Node(dram="128MiB") as started:
        started.start("--disk-admission", "none")
        for name in COLD:
            put(started.namespace(MIB), chain(name, 28), values(chain(name, 28), MIB))
        started.restart()
        for name in COLD:
            started.await_disk(started.namespace(MIB), chain(name, 28))
        yield started
        started.assert_alive()


def test_flushed_blocks_survive_a_kill_a_cold_restart_and_a_clean_stop(node: Node) -> None:
    chains = [(size, chain(size, 12), values(chain(size, 12), size)) for size in (5000, 64 * KIB, 2 * MIB)]
    node.start("--disk-admission", "none")
    for block_bytes, keys, wanted in chains:
        put(node.namespace(block_bytes), keys, wanted)
        first = fetch(node.namespace(block_bytes), keys)
        assert_blocks(first.blocks, wanted)
        assert (first.tiers.dram, first.tiers.disk) == (12, 0)
    for end in (node.kill, node.stop):
        end()
        node.start("--disk-admission", "none")
        for block_bytes, keys, wanted in chains:
            ns = node.namespace(block_bytes)
            node.await_disk(ns, keys)
            assert ns.match(keys).tiers.disk == 12
            found = fetch(ns, keys)
            assert_blocks(found.blocks, wanted)
            assert (found.tiers.dram, found.tiers.disk) == (0, 12)
            again = fetch(ns, keys)
            assert_blocks(again.blocks, wanted)
            assert (again.tiers.dram, again.tiers.disk) == (12, 0), "what was read once lies in DRAM"


def test_promotion_streams_in_prefix_order(cold: Node) -> None:
    """LEASED at once, then READY after READY; what lies in DRAM already comes with LEASED."""
    keys, ns = chain("streamed", 28), cold.namespace(MIB)
    assert_blocks(fetch(ns, keys[:2]).blocks, values(keys[:2], MIB))
    with raw_client(cold.run) as raw:
        number = raw.open(MIB, engine="node", dtype="uint8")
        leased = raw.lease(number, keys, wait_s=20.0)
        came, frames, left = len(leased.locations), 0, leased.coming
        assert came >= 2, "blocks in DRAM do not wait for those on disk"
        assert came + left == 28
        while left:
            ready = raw.ready()
            frames += 1
            assert len(ready.locations) + ready.left == left
            assert ready.disk == len(ready.locations)
            came, left = came + len(ready.locations), ready.left
        assert came == 28
        assert frames >= 2, "26 MiB in one piece are no stream"
    assert_blocks(fetch(ns, keys).blocks, values(keys, MIB))


def test_chunks_of_a_cold_lease_can_be_read_while_more_is_coming(cold: Node) -> None:
    keys = chain("chunked", 28)
    wanted = values(keys, MIB)
    with cold.namespace(MIB).fetch(keys, wait_s=WAIT_S) as lease:
        assert lease.expected == 28
        end = 0
        for chunk in lease.chunks():
            assert chunk.start == end, "in prefix order, without a gap"
            end = chunk.stop
            views = lease.views_of(chunk)
            assert_blocks(np.stack([np.frombuffer(view, np.uint8) for view in views]), wanted[chunk.start : end])
        assert end == 28
        assert lease.tiers.disk == 28
        assert lease.valid()


def test_two_clients_fetch_one_cold_chain_at_once(cold: Node) -> None:
    keys, ns = chain("shared", 28), cold.namespace(MIB)
    wanted = values(keys, MIB)
    with kvclient.connect(cold.run, timeout_s=PATIENCE_S) as other:
        same = other.namespace(model="m", engine="node", layout="flat", dtype="uint8", block_bytes=MIB)
        with ns.fetch(keys, wait_s=WAIT_S) as first, same.fetch(keys[:16], wait_s=WAIT_S) as second:
            assert second.expected == 16
            targets = np.zeros((28, MIB), np.uint8)
            assert second.copy_to(targets[:16])
            assert_blocks(targets[:16], wanted[:16])
            assert first.copy_to(targets)
            assert_blocks(targets, wanted)


def test_a_fetch_that_is_given_up_leaves_the_disk_to_others(cold: Node) -> None:
    keys, ns = chain("abandoned", 28), cold.namespace(MIB)
    for _ in range(20):
        ns.fetch(keys, wait_s=WAIT_S).release()
    assert_blocks(fetch(ns, keys).blocks, values(keys, MIB))


# -- what is written -------------------------------------------------------------------------------------------------


def test_segments_are_open_without_the_page_cache_where_status_says_so(node: Node) -> None:
    daemon = node.start("--disk-admission", "none")
    put_roots(node.namespace(), roots("bare", 4))
    (drive,) = body(kvctl(node, "status", "--output", "json"), "status")["disk"]["drives"]
    found = segments_open_in(daemon.process.pid)
    assert found
    assert {bool(flags & os.O_DIRECT) for flags in found} == {drive["direct"]}


def segments_open_in(pid: int) -> list[int]:
    """Flags of a process's descriptors of segment files."""
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed by now; a segment's stays open
            if one.readlink().suffix == ".seg":
                told = Path(f"/proc/{pid}/fdinfo/{one.name}").read_text()
                found.append(int(told.partition("flags:")[2].split()[0], 8))
    return found


def test_the_second_touch_writes_and_the_first_does_not(node: Node) -> None:
    once, twice = chain("once", 6), chain("twice", 6)
    node.start("--disk-admission", "second_touch")
    ns = node.namespace()
    put(ns, once, values(once, BLOCK_BYTES), durable=False)
    put(ns, twice, values(twice, BLOCK_BYTES), durable=False)
    assert_blocks(fetch(ns, twice).blocks, values(twice, BLOCK_BYTES))
    assert until(lambda: set(twice) <= node.slots().keys())
    assert not set(once) & node.slots().keys(), "nobody has asked for these"


def test_with_admission_none_only_a_flush_writes(node: Node) -> None:
    quiet, asked = chain("quiet", 10), chain("asked", 10)
    node.start("--disk-admission", "none", "--disk-codec", "raw")
    with kvclient.connect(node.run, timeout_s=PATIENCE_S) as other:
        mine = other.namespace(model="m", engine="node", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES)
        put(mine, quiet, values(quiet, BLOCK_BYTES), durable=False)
        assert_blocks(fetch(mine, quiet).blocks, values(quiet, BLOCK_BYTES))
        put(node.namespace(), asked, values(asked, BLOCK_BYTES))
        slots = node.slots()
        assert slots.keys() == set(asked), "a flush is of its own session's blocks"
    for number, key in enumerate(asked):  # the bytes on disk themselves, not what the daemon makes of them
        with slots[key].path.open("rb") as file:
            file.seek(slots[key].offset + HEADER_BYTES)
            stored = np.frombuffer(file.read(BLOCK_BYTES), np.uint8)
        assert np.array_equal(stored, value(key, BLOCK_BYTES))
        assert not np.array_equal(stored, value(asked[number - 1], BLOCK_BYTES))


def test_packed_blocks_take_less_room_and_come_back_equal(node: Node) -> None:
    weights, noise, block_bytes = chain("weights", 12), chain("noise", 8), 256 * KIB
    node.start("--disk-admission", "none", "--disk-codec", "bf16-planes+zstd")
    ns = node.namespace(block_bytes, dtype="bfloat16")
    put(ns, weights, bf16_values(weights, block_bytes))
    put(ns, noise, values(noise, block_bytes))
    slots = node.slots()
    for key in weights:
        assert slots[key].header.codec is Codec.BF16_PLANES_ZSTD
        assert slots[key].header.stored_bytes < 0.8 * block_bytes
        assert slots[key].slot_bytes <= 0.85 * stored_slot_bytes(block_bytes)
    assert {(slots[key].header.codec, slots[key].slot_bytes) for key in noise} == {
        (Codec.RAW, stored_slot_bytes(block_bytes))
    }, "what does not pack is stored as it is"
    node.restart()
    ns = node.namespace(block_bytes, dtype="bfloat16")
    for keys, wanted in (
        (weights, bf16_values(weights, block_bytes)),
        (noise, values(noise, block_bytes)),
    ):
        node.await_disk(ns, keys)
        found = fetch(ns, keys)
        assert_blocks(found.blocks, wanted)
        assert found.tiers.disk == len(keys)


def test_codec_auto_packs_what_gets_smaller_while_processors_are_idle(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How idle this host is decides nothing here: a file says it."""
    block_bytes, busy, metrics = 128 * KIB, node.home / "busy", node.home / "metrics.sock"
    monkeypatch.setenv("BUSY", str(busy))
    arguments = ("--disk-admission", "all", "--disk-codec", "auto", "--metrics-listen", str(metrics))
    weights, noise, late = chain("weights", 12), chain("noise", 12), chain("late", 6)
    with managed(node, *arguments, command=("-c", BUSY_OR_IDLE)) as manager:
        manager.fds_max = 0  # nothing outlives a kill but the disk
        manager.start()
        manager.wait_ready()
        for keys, model, blocks in (
            (weights, "weights", bf16_values(weights, block_bytes)),
            (noise, "noise", values(noise, block_bytes)),
        ):
            ns = node.namespace(block_bytes, dtype="bfloat16", model=model)
            for begin in (0, 6):  # what comes of the first ones decides on the others
                end = begin + 6
                result = ns.store(keys[begin:end], blocks[begin:end], parent=keys[begin - 1] if begin else None)
                assert result.accepted == 6
                assert ns.flush(PATIENCE_S).durable == 6
        busy.touch()
        ns = node.namespace(block_bytes, dtype="bfloat16", model="weights")
        put(ns, late, bf16_values(late, block_bytes))
        slots = node.slots()
        assert {slots[key].header.codec for key in weights} == {Codec.BF16_PLANES_ZSTD}
        assert {slots[key].header.codec for key in (*noise, *late)} == {Codec.RAW}
        assert max(slots[key].slot_bytes for key in weights) < slots[late[0]].slot_bytes
        assert "30 blocks saved" in (shown := kvctl(node, "status")[1])
        assert "12 packed" in shown
        assert until(lambda: scrape(metrics)["kvstored_disk_packed_blocks_total"] == 12, pause_s=0.1)
        manager.kill()
        manager.start()
        manager.wait_ready()
        for keys, model, wanted in (
            (weights, "weights", bf16_values(weights, block_bytes)),
            (late, "weights", bf16_values(late, block_bytes)),
            (noise, "noise", values(noise, block_bytes)),
        ):
            ns = node.namespace(block_bytes, dtype="bfloat16", model=model)
            node.await_disk(ns, keys)
            found = fetch(ns, keys)
            assert_blocks(found.blocks, wanted)
            assert found.tiers.disk == len(keys)


# -- several directories, limits -------------------------------------------------------------------------------------


def test_several_directories_share_the_segments() -> None:
    keys = roots("striped", 500)  # 31 MiB in segments of 8 MiB
    with Node(disks=3, segment="8MiB", dram="16MiB") as node:
        node.start("--disk-admission", "none")
        ns = node.namespace()
        for begin in range(0, 500, 100):
            put_roots(ns, keys[begin : begin + 100])
        told = census(ns, keys)
        assert not told.misses
        assert told.disk >= 200, "more than DRAM holds must have come from disk within this life"
        shares = [len(list((disk / "segments").glob("*.seg"))) for disk in node.disks]
        assert min(shares) >= 1
        assert max(shares) - min(shares) <= 1, shares
        assert [(disk / "index").exists() for disk in node.disks] == [True, False, False]
        node.restart()
        ns = node.namespace()
        assert until(lambda: all(ns.match([key]).blocks for key in keys))
        told = census(ns, keys)
        assert not told.misses
        assert told.disk == 500


def test_a_limit_that_was_shrunk_holds_before_the_first_write() -> None:
    keys = roots("shrunk", 900)  # 56 MiB
    with Node(segment="8MiB", dram="16MiB") as node:
        node.start("--disk-admission", "none")
        for begin in range(0, 900, 100):
            put_roots(node.namespace(), keys[begin : begin + 100])
        before = node.segment_bytes()
        assert before >= 56 * MIB
        node.kill()
        (node.disks[0] / "segments" / "notes.txt").write_text("of somebody else")
        path = node.home / "metrics.sock"
        again = ("--disk-size", "32MiB", "--disk-admission", "none", "--metrics-listen", str(path))
        node.start(*again)
        assert until(lambda: node.segment_bytes() <= 32 * MIB), "nothing was written, and it is above its limit"
        assert told_of_files(node, path) == (4, 1), "segments dropped, files of somebody else"
        ns = node.namespace()
        assert until(lambda: any(ns.match([key]).blocks for key in keys))
        told = census(ns, keys)
        assert len(told.hits) >= 32 * MIB * 0.7 // (BLOCK_BYTES + HEADER_BYTES), "what fits stays"
        for begin in range(0, 400, 50):
            put_roots(ns, roots(f"more-{begin}", 50))
            assert node.segment_bytes() <= 32 * MIB
        assert not census(ns, roots("more-350", 50)).misses
        node.restart(*again)
        assert told_of_files(node, path) == (0, 1), "a limit that stays costs nothing"


def told_of_files(node: Node, path: Path) -> tuple[float, float]:
    """Segments that the start dropped and foreign files, as the metrics say; and the status says the same."""
    assert until(lambda: scrape(path).get("kvstored_disk_serving") == 1)
    metrics = scrape(path)
    told = metrics["kvstored_disk_surplus_segments"], metrics["kvstored_disk_foreign_files"]
    status = body(kvctl(node, "-o", "json", "status"), "status")
    assert told == (status["disk"]["surplus_segments"], status["disk"]["foreign_files"])
    assert any("notes.txt" in warning for warning in status["warnings"])
    return told


def test_a_full_disk_gives_up_its_oldest_and_never_grows() -> None:
    with Node(size="24MiB", segment="8MiB", dram="16MiB") as node:
        node.start("--disk-admission", "all")
        ns = node.namespace()
        for turn in range(16):  # 64 MiB in all
            put_roots(ns, roots(f"turn-{turn}", 64), durable=False)
            assert node.segment_bytes() <= 24 * MIB
        told = [census(ns, roots(f"turn-{turn}", 64)) for turn in range(16)]
        assert len(told[15].hits) == 64
        assert sum(len(each.hits) for each in told) >= 330, "DRAM alone holds 256, and the disk 350"
        node.assert_alive()


def test_a_second_version_after_a_delete_is_the_one_that_survives(node: Node) -> None:
    keys = roots("versions", 40)
    node.start("--disk-admission", "none")
    ns = node.namespace()
    put_roots(ns, keys)
    assert ns.delete(keys) == 40
    put_roots(ns, keys, version=1)
    node.kill()
    node.drop_index()
    node.start()
    ns = node.namespace()
    assert until(lambda: all(ns.match([key]).blocks for key in keys))
    assert len(census(ns, keys, version=1).hits) == 40
    assert not np.array_equal(value(keys[0], BLOCK_BYTES, 0), value(keys[0], BLOCK_BYTES, 1))
