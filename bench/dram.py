"""Moving blocks: every figure is the speed of a verb over the speed of a bare memcpy of the same bytes, in turn.

memcpy is `ctypes.memmove` block by block between two warm buffers of this process, laid out as the verb has them.
bench/METHOD.md says what each figure covers.
"""

import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

import kvclient
from bench.harness import Bytes, Results, daemon, last_level_cache_bytes, random_blocks, ratio_of_medians, say, timed
from kvclient import Namespace

MIB = 1 << 20
RING_BYTES = 64 * MIB
DIRECT_BYTES = 256 * MIB  # that a client in mode direct may have on its way; they are no memory beside the slots
RINGS = 8  # of bytes in a sustained store
Key = bytes


def run(*, quick: bool) -> Results:
    """All figures of `dram`. Needs 3 GiB of memory."""
    rounds = 5 if quick else 25
    results: Results = {}
    size = ("--dram", "1536MiB", "--lock", "false", "--ring", f"{DIRECT_BYTES >> 20}MiB")
    with trusting() as config, daemon(*size, "--config", config) as running:
        client = kvclient.connect(str(running.runtime_dir), ring_bytes=RING_BYTES)
        assert client.wait_connected(5)
        large = open_namespace(client, 2 * MIB)
        small = open_namespace(client, 64 << 10)
        results |= measure_fetch(large, 2 * MIB, 100, rounds, "fetch_2mib")
        say("fetch of 2 MiB blocks: done")
        count = 4 * last_level_cache_bytes() // (64 << 10)
        results |= measure_fetch(small, 64 << 10, count, rounds, "fetch_64kib")
        say("fetch of 64 KiB blocks: done")
        results |= measure_store(large, rounds)
        say("store: done")
        results |= measure_store_direct(running.runtime_dir, rounds)
        say("store in mode direct: done")
        results |= measure_first_fetch(running.runtime_dir, large, 3 if quick else 15)
        say("first fetch: done")
        results |= measure_two_clients(running.runtime_dir, 3 if quick else 9)
        client.close()
    return results


@contextmanager
def trusting() -> Iterator[str]:
    """A configuration by which this user's engines may write into their tenant's memory themselves."""
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-") as folder:
        file = Path(folder) / "kvstored.toml"
        file.write_text(f"[tenants.bench]\nuids = [{os.geteuid()}]\ntrusting = true\n")
        yield str(file)


def open_namespace(client: kvclient.Client, block_bytes: int) -> Namespace:
    """A namespace of one block size."""
    return client.namespace(
        model="dram", engine="bench", layout="flat", dtype="uint8", block_tokens=16, block_bytes=block_bytes
    )


def new_keys(count: int) -> list[Key]:
    """Keys that were never used."""
    return [os.urandom(32) for _ in range(count)]


def memcpy(sources: list[Bytes], targets: list[Bytes]) -> None:
    """The limit: the same blocks, moved by libc."""
    for source, target in zip(sources, targets, strict=True):
        ctypes.memmove(target.ctypes.data, source.ctypes.data, source.size)


def addresses(blocks: list[Bytes]) -> list[int]:
    """Looked up outside the clock: `ndarray.ctypes` costs more than a copy of 64 KiB."""
    return [block.ctypes.data for block in blocks]


def move(sources: list[int], targets: list[int], block_bytes: int) -> None:
    """`memcpy` on addresses."""
    memmove = ctypes.memmove
    for source, target in zip(sources, targets, strict=True):
        memmove(target, source, block_bytes)


def measure_fetch(namespace: Namespace, block_bytes: int, count: int, rounds: int, name: str) -> Results:
    """From `fetch` to the last byte in the caller's memory, block by block, against memcpy between warm buffers."""
    sources = random_blocks(count, block_bytes, seed=1)
    targets = random_blocks(count, block_bytes, seed=2)
    keys = new_keys(count)
    assert namespace.store(keys, sources, wait=True, space_s=10).accepted == count
    source_at, target_at = addresses(sources), addresses(targets)

    def fetch() -> None:
        with namespace.fetch(keys) as lease:
            assert lease.blocks == count
            assert lease.copy_to(targets)

    fetch()
    assert all(np.array_equal(source, target) for source, target in zip(sources, targets, strict=True))
    pairs = [(timed(lambda: move(source_at, target_at, block_bytes)), timed(fetch)) for _ in range(rounds)]
    namespace.delete(keys[:1])
    seconds = median(ours for _, ours in pairs)
    return {
        f"{name}_over_memcpy": ratio_of_medians(pairs),
        f"{name}_gb_per_s": count * block_bytes / seconds / 1e9,
        f"{name}_memcpy_gb_per_s": count * block_bytes / median(limit for limit, _ in pairs) / 1e9,
    }


def measure_store(namespace: Namespace, rounds: int) -> Results:
    """Bursts of half an empty ring until accepted; eight rings until the last block can be leased."""
    half = RING_BYTES // 2 // (2 * MIB)
    burst = random_blocks(half, 2 * MIB, seed=3)
    ring_like = random_blocks(half, 2 * MIB, seed=4)
    accept = []
    for _ in range(rounds):
        stamp(burst)
        keys = new_keys(half)
        limit = timed(lambda: memcpy(burst, ring_like))
        accept.append((limit, timed(partial(must_accept, namespace, keys, burst))))
        namespace.flush(10)
        namespace.delete(keys[:1])
    count = RINGS * RING_BYTES // (2 * MIB)
    stream = random_blocks(count, 2 * MIB, seed=5)
    slots_like = random_blocks(count, 2 * MIB, seed=6)
    sustained = []
    for _ in range(max(3, rounds // 3)):
        stamp(stream)
        keys = new_keys(count)
        limit = timed(lambda: memcpy(stream, slots_like))
        sustained.append((limit, timed(partial(must_lease, namespace, keys, stream))))
        namespace.delete(keys[:1])
    return {
        "store_accept_over_memcpy": ratio_of_medians(accept),
        "store_accept_gb_per_s": RING_BYTES / 2 / median(ours for _, ours in accept) / 1e9,
        "store_sustained_over_memcpy": ratio_of_medians(sustained),
        "store_sustained_gb_per_s": RINGS * RING_BYTES / median(ours for _, ours in sustained) / 1e9,
    }


def measure_store_direct(runtime_dir: Path, rounds: int) -> Results:
    """Bursts of half of what may be on its way, until accepted, by a client that copies straight into the slots."""
    with kvclient.connect(str(runtime_dir), mode="direct", ring_bytes=DIRECT_BYTES) as client:
        assert client.wait_connected(5)
        assert client.status.mode == "direct", client.status.notes
        namespace = open_namespace(client, 2 * MIB)
        half = DIRECT_BYTES // 2 // (2 * MIB)
        burst = random_blocks(half, 2 * MIB, seed=12)
        slots_like = random_blocks(half, 2 * MIB, seed=13)
        pairs = []
        for _ in range(rounds):
            stamp(burst)
            keys = new_keys(half)
            limit = timed(lambda: memcpy(burst, slots_like))
            pairs.append((limit, timed(partial(must_accept, namespace, keys, burst))))
            namespace.flush(10)
            namespace.delete(keys[:1])
    return {
        "store_direct_over_memcpy": ratio_of_medians(pairs),
        "store_direct_gb_per_s": DIRECT_BYTES / 2 / median(ours for _, ours in pairs) / 1e9,
    }


_stamps = itertools.count(1)


def stamp(blocks: list[Bytes]) -> None:
    """Make the bytes of every page differ from any stored before."""
    for block in blocks:
        block.view(np.uint64)[::512] = next(_stamps)


def must_accept(namespace: Namespace, keys: list[Key], blocks: list[Bytes]) -> None:
    """Store, until accepted."""
    result = namespace.store(keys, blocks, space_s=10)
    assert result.accepted == len(keys), result.reasons


def must_lease(namespace: Namespace, keys: list[Key], blocks: list[Bytes]) -> None:
    """Store, until the last block can be leased."""
    must_accept(namespace, keys, blocks)
    with namespace.fetch(keys[-1:], wait_s=10) as lease:
        assert lease.blocks == 1


def measure_first_fetch(runtime_dir: Path, namespace: Namespace, processes: int) -> Results:
    """100 blocks of 2 MiB by processes that never saw the arenas; each times memcpy too."""
    keys = new_keys(100)
    assert namespace.store(keys, random_blocks(100, 2 * MIB, seed=7), wait=True, space_s=10).accepted == 100
    pairs = [child("first", runtime_dir, keys) for _ in range(processes)]
    namespace.delete(keys[:1])
    return {
        "first_fetch_over_memcpy": median(limit / ours for limit, ours in pairs),
        "first_fetch_worst_over_memcpy": min(limit / ours for limit, ours in pairs),
    }


def child(kind: str, runtime_dir: Path, keys: list[Key]) -> tuple[float, float]:
    """Run this file in a fresh process; seconds of (memcpy, fetch)."""
    command = [sys.executable, "-m", "bench.dram", kind, str(runtime_dir)]
    done = subprocess.run(
        command, input=json.dumps([key.hex() for key in keys]), capture_output=True, text=True, check=True
    )
    limit, ours = json.loads(done.stdout)
    return limit, ours


def fetch_first(runtime_dir: str, keys: list[Key]) -> tuple[float, float]:
    """In a fresh process: the clock starts at LEASE, when nothing is mapped yet."""
    client = kvclient.connect(runtime_dir)
    assert client.wait_connected(5)
    namespace = open_namespace(client, 2 * MIB)
    namespace.match(keys[:1])  # the namespace is open, as in any engine that runs
    sources, targets = random_blocks(len(keys), 2 * MIB, seed=8), random_blocks(len(keys), 2 * MIB, seed=9)

    def fetch() -> None:
        with namespace.fetch(keys) as lease:
            assert lease.blocks == len(keys)
            assert lease.copy_to(targets)

    memcpy(sources, targets)
    ours = timed(fetch)
    return median(timed(lambda: memcpy(sources, targets)) for _ in range(7)), ours


def measure_two_clients(runtime_dir: Path, rounds: int) -> Results:
    """Two client processes that fetch at once against two threads that memcpy at once."""
    client = kvclient.connect(str(runtime_dir))
    assert client.wait_connected(5)
    namespace = open_namespace(client, 2 * MIB)
    keys = new_keys(64)
    assert namespace.store(keys, random_blocks(64, 2 * MIB, seed=10), wait=True, space_s=10).accepted == 64
    command = [sys.executable, "-m", "bench.dram", "pair", str(runtime_dir)]
    fetchers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for fetcher in fetchers:
        tell(fetcher, json.dumps([key.hex() for key in keys]))
    buffers = [(random_blocks(64, 2 * MIB, seed=11 + i), random_blocks(64, 2 * MIB, seed=21 + i)) for i in range(2)]
    for fetcher in fetchers:
        assert hear(fetcher) == "ready"
    pairs = []
    for _ in range(rounds):
        limit = together_memcpy(buffers)
        for fetcher in fetchers:
            tell(fetcher, "go")
        pairs.append((limit, max(float(hear(fetcher)) for fetcher in fetchers)))
    for fetcher in fetchers:
        fetcher.communicate("")
    client.close()
    return {"two_clients_over_two_memcpy": ratio_of_medians(pairs)}


REPEATS = 8  # of 128 MiB each: long enough that a late start does not count


def together_memcpy(buffers: list[tuple[list[Bytes], list[Bytes]]]) -> float:
    """Seconds until two threads have both moved their blocks."""
    gate = threading.Barrier(2)
    ends: list[float] = []

    def one(sources: list[Bytes], targets: list[Bytes]) -> None:
        gate.wait()
        begun = time.perf_counter()
        for _ in range(REPEATS):
            memcpy(sources, targets)
        ends.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=one, args=pair) for pair in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(ends)


def fetch_in_pair(runtime_dir: str, keys: list[Key]) -> None:
    """One of two fetching processes: at every line of input, fetch and print the seconds it took."""
    client = kvclient.connect(runtime_dir)
    assert client.wait_connected(5)
    namespace = open_namespace(client, 2 * MIB)
    targets = random_blocks(len(keys), 2 * MIB, seed=os.getpid())

    def fetch() -> None:
        for _ in range(REPEATS):
            with namespace.fetch(keys) as lease:
                assert lease.copy_to(targets)

    fetch()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(fetch), flush=True)


def tell(process: "subprocess.Popen[str]", line: str) -> None:
    """A line to a child."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def hear(process: "subprocess.Popen[str]") -> str:
    """A line from a child."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def main() -> None:
    """A child of a measurement."""
    kind, runtime_dir = sys.argv[1:]
    keys = [bytes.fromhex(key) for key in json.loads(sys.stdin.readline())]
    if kind == "first":
        print(json.dumps(fetch_first(runtime_dir, keys)))
    else:
        fetch_in_pair(runtime_dir, keys)


if __name__ == "__main__":
    main()
