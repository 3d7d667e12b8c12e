"""Beyond one host: what the remote tier brings, over what the far side's own client does, and what a dead one costs.

A far side that is not installed, or does not run here, has null for figures, and says why. bench/METHOD.md says what
each figure covers.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import xxhash

import kvclient
from bench.dram import new_keys, open_namespace
from bench.engines.mooncake import Mooncake, environment, find_mooncake, why_not
from bench.harness import ROOT, Bytes, Findings, Results, daemon, random_blocks, say
from bench.hot import chains_of, fill, lease_one, ping_once, seconds
from bench.hot import open_namespace as open_small
from bench.process import DaemonProcess
from kvclient import Namespace
from kvproto.limits import MIB
from kvstore.tier.remote_format import HEADER_BYTES, Place, name_of, tenant_digest
from kvstored.remote_mooncake import MooncakeAddress, MooncakeBackend
from kvstored.remote_ranges import BATCH_BYTES
from kvstored.remote_reading import BATCHES

SET = 100
BLOCK_BYTES = 2 * MIB
DRAM = ("--dram", f"{2 * SET * BLOCK_BYTES // MIB}MiB", "--arena", "16MiB", "--lock", "false")
PATIENCE_S = 60.0
LOOK_S = 0.002  # between two looks at what has come
Object = tuple[str, int]  # name and bytes
Turns = dict[str, list[float]]


def run(*, quick: bool) -> Findings:
    """All figures of `remote`. Needs 5 GiB of memory, the environment with Mooncake (`make engines`), and obstore."""
    rounds = 3 if quick else 7
    findings: Findings = {}
    for name, measure in (("mooncake", measure_mooncake), ("object", measure_objects)):
        try:
            findings |= measure(rounds)
        except (ImportError, OSError, RuntimeError, TimeoutError) as error:
            findings |= {f"{name}_fetch_over_{'client' if name == 'mooncake' else 'library'}": None}
            findings |= {f"{name}_why_not": str(error)[-400:]}
        say(f"{name}: done")
    return findings | measure_dead(300 if quick else 2000)


# -- what comes from over there --------------------------------------------------------------------------------------


def measure_mooncake(rounds: int) -> Results:
    """Reads of 100 blocks, in turn: Mooncake's own client, our back-end alone, a whole fetch by one of our clients."""
    python = find_mooncake()
    if python is None:
        raise RuntimeError(why_not())
    os.environ |= environment()
    turns: Turns = {"client": [], "backend": [], "promote": [], "fetch": []}
    with ExitStack() as stack:
        home = Path(stack.enter_context(TemporaryDirectory(prefix="kvstored-bench-")))
        store_bytes = (rounds + 3) * SET * (BLOCK_BYTES + 2 * HEADER_BYTES)
        serving = stack.enter_context(Mooncake(python, log_file=home / "log", store_bytes=store_bytes))
        remote = ("--remote", f"mooncake://{serving.address}", "--remote-python", str(python))
        writer, reader = stack.enter_context(hosts(*remote))
        peer = stack.enter_context(Peer(python, home / "peer", "mooncake", serving.address))
        backend = MooncakeBackend(MooncakeAddress(serving.address, python=str(python)), 10.0)
        stack.callback(backend.close)
        place = Place(tenant_digest(f"uid-{os.geteuid()}"), bytes(writer.identity.digest()))
        targets = random_blocks(SET, BLOCK_BYTES, seed=99)
        for number in range(rounds + 1):
            keys, blocks = new_keys(SET), random_blocks(SET, BLOCK_BYTES, seed=number)
            names = [name_of(place, [key]) for key in keys]
            store_all(writer, keys, blocks, partial(are_there, backend, names))
            objects = [(name, HEADER_BYTES + BLOCK_BYTES) for name in names]
            took = {"client": peer.read(objects), "backend": read_all(backend, objects)}
            took["promote"], took["fetch"] = fetch_all(reader, keys, blocks, targets)
            say(f"mooncake, round {number} of {rounds}: {took}")
            if number:  # memory is warm from here on
                for name, turn in turns.items():
                    turn.append(took[name])
    return ratios("mooncake", "client", turns)


def measure_objects(rounds: int) -> Results:
    """Reads of 100 blocks from a server that speaks S3, in turn: the library alone, a fetch by one of our clients."""
    from tests.s3 import S3Server

    turns: Turns = {"library": [], "promote": [], "fetch": []}
    with ExitStack() as stack:
        home = Path(stack.enter_context(TemporaryDirectory(prefix="kvstored-bench-")))
        server = stack.enter_context(S3Server())
        os.environ |= server.environ
        remote = ("--remote", f"s3://{server.bucket}", "--remote-endpoint", server.endpoint)
        writer, reader = stack.enter_context(hosts(*remote))
        peer = stack.enter_context(Peer(Path(sys.executable), home / "peer", "s3", server.endpoint, server.bucket))
        targets = random_blocks(SET, BLOCK_BYTES, seed=99)
        for number in range(rounds + 1):
            server.objects.clear()  # one set at a time
            keys, blocks = new_keys(SET), random_blocks(SET, BLOCK_BYTES, seed=number)
            store_all(writer, keys, blocks, lambda: sum(map(len, server.objects.values())) >= SET * BLOCK_BYTES)
            took = {"library": peer.read([(name, len(content)) for name, content in server.objects.items()])}
            took["promote"], took["fetch"] = fetch_all(reader, keys, blocks, targets)
            say(f"objects, round {number} of {rounds}: {took}")
            if number:
                for name, turn in turns.items():
                    turn.append(took[name])
    return ratios("object", "library", turns)


def ratios(name: str, limit: str, turns: Turns) -> Results:
    """Of everybody, over the limit; and gigabytes a second."""
    total = SET * BLOCK_BYTES / 1e9
    rates = {f"{name}_{who}_gb_per_s": total / median(turn) for who, turn in turns.items()}
    limit_s = median(turns[limit])
    return rates | {f"{name}_{who}_over_{limit}": limit_s / median(turn) for who, turn in turns.items() if who != limit}


@contextmanager
def hosts(*remote: str) -> Iterator[tuple[Namespace, Namespace]]:
    """One that writes all that it stores, and one that only reads."""
    with ExitStack() as stack:
        namespaces = []
        for admission in ("all", "none"):
            size = ("--remote-size", "100GiB", "--remote-admission", admission)
            running = stack.enter_context(daemon(*DRAM, "--policy-dram", "lru", *remote, *size))
            running.await_memory()
            client = stack.enter_context(kvclient.connect(str(running.runtime_dir), timeout_s=PATIENCE_S))
            assert client.wait_connected(5), client.status
            namespaces.append(open_namespace(client, BLOCK_BYTES))
        yield namespaces[0], namespaces[1]


def store_all(writer: Namespace, keys: list[bytes], blocks: list[Bytes], there: Callable[[], bool]) -> None:
    """Until all of it is over there. Raises TimeoutError."""
    result = writer.store(keys, blocks, wait=True, space_s=PATIENCE_S)
    assert result.accepted == SET, result
    await_all(there)


def fetch_all(reader: Namespace, keys: list[bytes], blocks: list[Bytes], targets: list[Bytes]) -> tuple[float, float]:
    """Seconds from asking for blocks that this host has not, until it has all; and until a client has their bytes."""
    begun = time.perf_counter()
    assert reader.match(keys).blocks == 0, "it was there already"
    await_all(lambda: reader.match(keys).blocks == SET)
    promoted = time.perf_counter()
    with reader.fetch(keys) as lease:
        assert lease.blocks == SET
        assert lease.copy_to(targets)
    fetched = time.perf_counter()
    assert all(np.array_equal(one, other) for one, other in zip(targets, blocks, strict=True)), "other bytes came"
    return promoted - begun, fetched - begun


def read_all(backend: MooncakeBackend, objects: list[Object]) -> float:
    """Seconds of the back-end alone, as the remote tier's threads use it, with what they look at."""

    def read(some: list[Object]) -> list[int]:
        found = backend.get_many([name for name, _ in some], some[0][1])
        sizes = []
        for content in found:
            assert content is not None
            xxhash.xxh3_64_intdigest(content[HEADER_BYTES:])  # type: ignore[arg-type]
            sizes.append(content.size)
        return sizes

    most = BATCH_BYTES // objects[0][1]
    with ThreadPoolExecutor(BATCHES) as threads:
        begun = time.perf_counter()
        parts = list(threads.map(read, [objects[at : at + most] for at in range(0, len(objects), most)]))
        took = time.perf_counter() - begun
    assert [size for sizes in parts for size in sizes] == [size for _, size in objects]
    return took


def are_there(backend: MooncakeBackend, names: list[str]) -> bool:
    """All of them?"""
    return all(backend.exists_many(names))


def await_all(there: Callable[[], bool]) -> None:
    """Raises TimeoutError."""
    until = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > until:
            raise TimeoutError("not all of it came")
        time.sleep(LOOK_S)


class Peer:
    """A far side's own client in a process of its own. A context manager that ends it."""

    def __init__(self, python: Path, log_file: Path, *arguments: str) -> None:
        self._log_file = log_file
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [python, ROOT / "bench" / "remote_peer.py", *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def read(self, objects: list[Object]) -> float:
        """Seconds of reading all of them. Raises RuntimeError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(objects) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the peer has ended: {self._log_file.read_text()[-400:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


# -- what a dead one costs -------------------------------------------------------------------------------------------


def measure_dead(rounds: int) -> Results:
    """Verbs of the hot path with a far side that is down, over those of a daemon without one, asked in turn."""
    count = 500
    with ExitStack() as stack:
        sides: list[tuple[kvclient.Client, Namespace]] = []
        dead = ("--remote", "s3://nobody", "--remote-endpoint", "http://127.0.0.1:9", "--remote-size", "1GiB")
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        chains = chains_of(count, 100)
        for remote in ((), (*dead, "--remote-admission", "all")):
            running: DaemonProcess = stack.enter_context(daemon("--dram", "448MiB", "--lock", "false", *remote))
            client = stack.enter_context(kvclient.connect(str(running.runtime_dir)))
            assert client.wait_connected(5), client.status
            sides.append((client, open_small(client, "hundreds")))
            fill(sides[-1][1], chains)
        absent = chains_of(rounds, 100, seed=1)  # new ones each time: each is something to ask the far side about
        verbs: dict[str, Callable[[int, int], None]] = {
            "lease": lambda side, _: lease_one(sides[side][1], chains),
            "ping": lambda side, _: ping_once(sides[side][0]),
            "match_absent": lambda side, number: match_absent(sides[side][1], absent[number]),
        }
        results: Results = {}
        for name, verb in verbs.items():
            pairs = [[seconds(lambda v=verb, n=n, s=s: v(s, n)) for s in (0, 1)] for n in range(rounds)]  # type: ignore[misc]
            off_s, dead_s = (median(pair[side] for pair in pairs) for side in (0, 1))
            results |= {f"hot_dead_over_off_{name}": dead_s / off_s, f"hot_off_{name}_p50_us": 1e6 * off_s}
    return results


def match_absent(namespace: Namespace, chain: list[bytes]) -> None:
    """A chain of which nothing is there."""
    assert namespace.match(chain).blocks == 0
