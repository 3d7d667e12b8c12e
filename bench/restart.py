"""Restarts: how soon a daemon serves again what lies on disk, what it keeps of memory, and what that memory costs.

A run kills the daemon with -9 (or stops it with SIGTERM), starts the next one, and dials until a block comes back with
the bytes that were stored; the clock starts at exec. bench/METHOD.md says what each figure covers.
"""

import os
import random
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.dram import memcpy, must_lease, new_keys, stamp
from bench.harness import Results, home_on_drive, memory_of, percentile, random_blocks, say, timed
from bench.lives import PATIENCE_S, Chains, Hit, Lives, hit_of
from kvclient import Client
from kvproto.limits import GIB, KIB, MIB

SMALL = Chains(4 * KIB, 1000)  # on disk
KEPT = (Chains(2 * MIB, 32), Chains(64 * KIB, 1024))  # in memory; a chain is 64 MiB, an arena's worth


def run(*, quick: bool) -> Results:
    """All figures of `restart`. Needs 8 GiB of memory and 10 GiB of a drive."""
    results: Results = {}
    with home_on_drive(10 * GIB) as home:
        results |= measure_disk(home, 50 if quick else 1000, 5 if quick else 100)
    with home_on_drive(GIB) as home:
        results |= measure_kept(home, (GIB if quick else 4 * GIB) // (128 * MIB), quick=quick)
    return results


# -- what lies on disk -------------------------------------------------------------------------------------------


def measure_disk(home: Path, chains: int, runs: int) -> Results:
    """A tier of many small blocks: until it serves after `kill -9`, and the memory that its blocks take."""
    arguments = ("--dram", "512MiB", "--prefault", "false", "--disk-admission", "all", "--disk-codec", "raw")
    size = ("--disk-size", "16GiB")  # a row for each 16 KiB of it: 1,048,576 blocks, on 8 GiB
    (home / "empty").mkdir()
    with Lives(home / "empty", *arguments, "--disk", str(home / "empty" / "disk"), *size) as lives:
        lives.begin()
        empty = measure_memory(lives, 0)
    with Lives(home, *arguments, "--disk", str(home / "disk"), *size) as lives:
        lives.begin()
        results = build(lives, chains)
        lives.kill()
        seconds = []
        generator = random.Random(1)
        for number in range(runs):
            is_hit = SMALL.hit(generator.randrange(chains), from_disk=True)
            lives.begin()
            took, client = lives.until(is_hit)
            seconds.append(took)
            client.close()
            lives.kill()
            if number % max(1, runs // 10) == 0:
                say(f"ready: {number + 1} of {runs}, {took:.3f} s")
        lives.begin()
        full = measure_memory(lives, chains)
        kept = count_matched(lives, chains)
    blocks = chains * SMALL.length
    return results | {
        "ready_p99_s": percentile(seconds, 0.99),
        "ready_p50_s": median(seconds),
        "ready_max_s": max(seconds),
        "ready_kept": kept / blocks,
        "disk_index_bytes_per_block": (sum(full) - sum(empty)) / blocks,
        "disk_index_anonymous_bytes_per_block": (full.anonymous - empty.anonymous) / blocks,
        "disk_index_tables_bytes_per_block": (full.tables - empty.tables) / blocks,
        "disk_index_child_bytes_per_block": (full.child - empty.child) / blocks,
        "empty_disk_daemon_mib": sum(empty) / MIB,
    }


class Memory(NamedTuple):
    """Resident bytes, arenas left out."""

    anonymous: int  # of the daemon
    tables: int  # of the daemon: memfds
    child: int  # of its index child: anonymous, and pages of the index that it has mapped


def build(lives: Lives, chains: int) -> Results:
    """Store all chains, and have them written as they come: DRAM holds an eighth of them."""
    begun = time.perf_counter()
    _, client = lives.until(lambda client: client.ping() is not None)
    namespace = SMALL.open(client)
    durable = 0
    for chain in range(chains):
        SMALL.store(namespace, chain, wait=False)
        if chain % 50 == 49:
            durable += namespace.flush(PATIENCE_S).durable
        if chain % max(1, chains // 10) == 0:
            say(f"building: {100 * chain // chains} %")
    durable += namespace.flush(PATIENCE_S).durable
    seconds = time.perf_counter() - begun
    client.close()
    blocks = chains * SMALL.length
    assert durable == blocks, f"{durable} of {blocks} blocks are durable\n{lives.log}"
    return {"build_s": seconds, "build_blocks_per_s": blocks / seconds}


def measure_memory(lives: Lives, chains: int) -> Memory:
    """Once the last chain is there, and nothing is going on any more."""
    _, client = lives.until(lambda client: not chains or bool(match_one(client, chains - 1)))
    with client:
        match_one(client, 0)
        await_quiet(lives.pid)
        (child,) = children_of(lives.pid)
        return Memory(
            memory_of(lives.pid, "RssAnon"),
            memory_of(lives.pid, "RssShmem") - mapped_bytes(lives.pid, "memfd:kvstored-arena"),
            memory_of(child, "RssAnon") + mapped_bytes(child, "data.mdb"),
        )


def match_one(client: Client, chain: int) -> int:
    """How much of a chain is there, without reading any."""
    return SMALL.open(client).match(SMALL.keys(chain)).blocks


def count_matched(lives: Lives, chains: int) -> int:
    """Blocks that are there."""
    _, client = lives.until(lambda client: client.ping() is not None)
    with client:
        return sum(match_one(client, chain) for chain in range(chains))


def await_quiet(pid: int) -> None:
    """Until a process uses less than a fiftieth of a core for a second, at most for a minute."""
    until = time.monotonic() + 60.0
    while time.monotonic() < until:
        before = processor_s(pid)
        time.sleep(1.0)
        if processor_s(pid) - before < 0.02:
            return
    say("never quiet")


def processor_s(pid: int) -> float:
    """Of all its threads, since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """Processes that it started and that live."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


def mapped_bytes(pid: int, name: str) -> int:
    """Resident bytes of its maps of files whose path has this name in it."""
    total_kib, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            counts = name in line
        elif counts and line.startswith("Rss:"):
            total_kib += int(line.split()[1])
    return total_kib << 10


# -- what is kept of memory --------------------------------------------------------------------------------------


def measure_kept(home: Path, chains: int, *, quick: bool) -> Results:
    """DRAM full of blocks of two sizes, `chains` of each, held by a keeper while no daemon lives."""
    results: Results = {}
    arguments = ("--dram", f"{chains * 128}MiB", "--arena", "64MiB", "--keep", "true", "--keep-patience", "120s")
    for name in ("clean", "kill"):
        (home / name).mkdir()
        with Lives(home / name, *arguments) as lives:
            lives.begin()
            fill(lives, chains)
            if name == "clean":
                lives.stop()
            else:
                lives.kill()  # right after the last block was published
            lives.begin()
            right, wrong = count_served(lives, chains)
            results[f"warm_{name}_kept"] = right / sum(chains * each.length for each in KEPT)
            results[f"warm_{name}_wrong_blocks"] = wrong
            say(f"warm {name}: {right} right, {wrong} wrong")
            if name == "kill":
                results |= measure_serving(lives, chains, 2 if quick else 10)
                results |= measure_store(lives, KEPT[0].hit(0), 1 if quick else 3)
    return results


def fill(lives: Lives, chains: int) -> None:
    """All of DRAM. Returns when every block is published."""
    _, client = lives.until(lambda client: client.ping() is not None)
    with client:
        for chain in range(chains):
            for each in KEPT:
                each.store(each.open(client), chain, wait=True)


def count_served(lives: Lives, chains: int) -> tuple[int, int]:
    """Blocks that come back as they were stored, and those that come back otherwise."""
    right = wrong = 0
    _, client = lives.until(lambda client: client.ping() is not None)
    with client:
        for chain in range(chains):
            for each in KEPT:
                good, bad = each.served(each.open(client), chain)
                right, wrong = right + good, wrong + bad
    return right, wrong


def measure_serving(lives: Lives, chains: int, runs: int) -> Results:
    """From exec to the first hit after `kill -9`, all of memory being kept."""
    seconds = []
    for number in range(runs):
        is_hit = KEPT[number % 2].hit(random.Random(number).randrange(chains))
        lives.kill()
        lives.begin()
        took, client = lives.until(is_hit)
        client.close()
        seconds.append(took)
    return {"warm_serving_s": max(seconds), "warm_serving_p50_s": median(seconds)}


STREAMS = 4  # stored one after the other, 512 MiB each


def measure_store(lives: Lives, is_hit: Hit, runs: int) -> Results:
    """Blocks stored as soon as the first hit has come: everything kept is in their way, and being verified."""
    stream = random_blocks(512 * MIB // KEPT[0].block_bytes, KEPT[0].block_bytes, seed=5)
    slots_like = random_blocks(len(stream), KEPT[0].block_bytes, seed=6)
    limits: list[float] = []
    ours: list[list[float]] = []
    began: list[float] = []
    for _ in range(runs):
        await_quiet(lives.pid)
        limits += [timed(lambda: memcpy(stream, slots_like)) for _ in range(5)]
        lives.kill()
        lives.begin()
        took, client = lives.until(is_hit)
        began.append(took)
        with client:
            namespace, keys, seconds = KEPT[0].open(client), new_keys(0), []
            for _ in range(STREAMS):
                stamp(stream)
                keys = new_keys(len(stream))
                begun = time.perf_counter()
                must_lease(namespace, keys, stream)
                seconds.append(time.perf_counter() - begun)
            ours.append(seconds)
            is_hit = hit_of(KEPT[0].block_bytes, keys[0], stream[0].copy())
    memcpy_s = median(limits)
    total_bytes = STREAMS * sum(block.size for block in stream)
    return {
        "warm_store_over_memcpy": STREAMS * memcpy_s / median(sum(seconds) for seconds in ours),
        "warm_store_first_over_memcpy": memcpy_s / median(seconds[0] for seconds in ours),
        "warm_store_gb_per_s": total_bytes / median(sum(seconds) for seconds in ours) / 1e9,
        "warm_store_memcpy_gb_per_s": total_bytes / STREAMS / memcpy_s / 1e9,
        "warm_store_began_s": max(began),
    }
