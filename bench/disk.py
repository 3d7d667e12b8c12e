"""The disk tier: every figure is the speed of a verb over what the bare drive does with the same bytes, in turn.

One home on a drive for each measurement; the drive's own figures come from `bench.raw`, in this process. The best of
its depths counts. bench/METHOD.md says what each figure covers.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

import kvclient
from bench import raw
from bench.dram import must_accept, new_keys, open_namespace
from bench.harness import Bytes, Results, home_on_drive, memory_of, random_blocks, say
from bench.process import DaemonProcess
from kvclient import Client, Namespace
from kvproto.limits import GIB, MIB

BLOCK_BYTES = 2 * MIB
SET = 100  # blocks of a fetch
PATIENCE_S = 60.0
DISK = ("--disk-size", "8GiB", "--disk-codec", "raw")
ALL_OF_ONE_SET = ("--dram", f"{SET * BLOCK_BYTES // MIB}MiB", "--arena", "8MiB", "--disk-admission", "none")
EVERYTHING = ("--disk-admission", "all")
Seconds = dict[str, list[float]]  # of every round, by contestant


def run(*, quick: bool) -> Results:
    """All figures of `disk`. Needs 11 GiB of memory and 12 GiB of a drive."""
    results: Results = {}
    with home_on_drive(12 * GIB) as home:
        results |= measure_cold_fetch(home, 6 if quick else 40, 2 if quick else 10)
        say("cold fetch: done")
        source = random_blocks((1 if quick else 4) * GIB // BLOCK_BYTES, BLOCK_BYTES, seed=3)
        results |= measure_write_behind(home, source[: GIB // BLOCK_BYTES], 2 if quick else 15)
        say("write behind: done")
        results |= measure_store(home, source, 2 if quick else 21)
        results |= measure_stream(home, source, 2 if quick else 11)
    return results


@contextmanager
def daemon_at(home: Path, *arguments: str) -> Iterator[DaemonProcess]:
    """A daemon and the disk directory that it gets, if it is told of one; both are gone afterwards."""
    log = home / "log"
    try:
        with DaemonProcess(
            home / "run", "--log-level", "warning", "--lock", "false", *arguments, log_file=log
        ) as process:
            yield process
    finally:
        shutil.rmtree(home / "disk", ignore_errors=True)


@contextmanager
def client_of(running: DaemonProcess) -> Iterator[tuple[Client, Namespace]]:
    """A client that has its namespace open, as in any engine that runs."""
    with kvclient.connect(str(running.runtime_dir), timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(5)
        namespace = open_namespace(client, BLOCK_BYTES)
        yield client, namespace


def best(seconds: Seconds) -> float:
    """Median of the rounds of the contestant that is fastest by it."""
    return min(median(rounds) for rounds in seconds.values())


def gigabytes_per_s(total_bytes: int, seconds: Seconds, name: str) -> Results:
    """Of every contestant, and the best of them."""
    rates = {f"{name}_{each}_gb_per_s": total_bytes / median(rounds) / 1e9 for each, rounds in seconds.items()}
    return {f"{name}_gb_per_s": total_bytes / best(seconds) / 1e9} | rates


# -- up ----------------------------------------------------------------------------------------------------------


class ColdFetch:
    """Two sets of blocks that both lie on disk, and DRAM that holds exactly one of them: a fetch evicts the other."""

    def __init__(self, disk: Path, namespace: Namespace) -> None:
        self.targets = raw.aligned(SET, BLOCK_BYTES)
        self._contents: list[list[Bytes]] = []
        self._keys: list[list[bytes]] = []
        for seed in (1, 2):
            self._contents.append(random_blocks(SET, BLOCK_BYTES, seed=seed))
            self._keys.append(new_keys(SET))
            result = namespace.store(self._keys[-1], self._contents[-1], wait=True, space_s=PATIENCE_S)
            assert result.accepted == SET, result
            assert namespace.flush(PATIENCE_S).durable == SET
        self._places = [raw.places_of(disk, keys) for keys in self._keys]
        self.turn = 0  # whose set is not in DRAM

    def read_bare(self, depth: int) -> float:
        """Seconds of the drive for the set that is fetched in this turn."""
        return self._checked(raw.read(self._places[self.turn], self.targets, depth))

    def fetch(self, namespace: Namespace) -> float:
        """Seconds from `fetch` to the last byte in `targets`. Every block comes from disk."""
        begun = time.perf_counter()
        with namespace.fetch(self._keys[self.turn], wait_s=PATIENCE_S, ttl_s=PATIENCE_S) as lease:
            assert lease.copy_to(self.targets)
            seconds = time.perf_counter() - begun
            assert lease.tiers.disk == lease.blocks == SET, f"{lease.tiers}: not all came from disk"
        return self._checked(seconds)

    def first_chunk(self, namespace: Namespace) -> float:
        """Share of the time until all blocks can be used after which the first of them can."""
        begun = time.perf_counter()
        with namespace.fetch(self._keys[self.turn], wait_s=PATIENCE_S, ttl_s=PATIENCE_S) as lease:
            came = [(chunk, time.perf_counter() - begun) for chunk in lease.chunks()]
            assert lease.tiers.disk == lease.blocks == SET, f"{lease.tiers}: not all came from disk"
            for target, view in zip(self.targets, lease.views, strict=True):
                target[:] = np.frombuffer(view, dtype=np.uint8)
        return self._checked(came[0][1]) / came[-1][1]

    def next(self) -> None:
        """The other set is on disk only, once one of them was fetched."""
        self.turn = 1 - self.turn

    def _checked(self, seconds: float) -> float:
        """Outside every clock: these bytes and no others, and none left for the next look to find."""
        right, wrong = self._contents[self.turn], self._contents[1 - self.turn]
        for target, good, bad in zip(self.targets, right, wrong, strict=True):
            assert np.array_equal(target, good), "other bytes came back than were stored"
            assert not np.array_equal(target, bad), "this comparison finds nothing out"
            target[:] = 0
        return seconds


def measure_cold_fetch(home: Path, rounds: int, first_rounds: int) -> Results:
    """100 x 2 MiB from disk into this process's memory, against bare reads of the same bytes into the same memory."""
    bare: Seconds = {f"{depth}_deep": [] for depth in raw.DEPTHS}
    steady: list[float] = []
    first: list[float] = []
    fractions: list[float] = []
    disk = home / "disk"
    with daemon_at(home, *ALL_OF_ONE_SET, "--disk", str(disk), *DISK) as running:
        with client_of(running) as (_, namespace):
            cold = ColdFetch(disk, namespace)
            for _ in range(2):  # whatever came from the ring makes room, and all of DRAM is mapped here
                cold.fetch(namespace)
                cold.next()
            for number in range(rounds):
                contest(cold, namespace, number, bare, steady)
                fractions.append(cold.first_chunk(namespace))
                cold.next()
        for _ in range(first_rounds):
            with client_of(running) as (_, namespace):
                first.append(cold.fetch(namespace))
                cold.next()
    total = SET * BLOCK_BYTES
    return {
        "cold_fetch_over_raw_read": best(bare) / median(steady),
        "cold_fetch_first_over_raw_read": best(bare) / median(first),
        "first_chunk_fraction": median(fractions),
        "disk_read_gb_per_s": total / median(steady) / 1e9,
    } | gigabytes_per_s(total, bare, "raw_read")


def contest(cold: ColdFetch, namespace: Namespace, number: int, bare: Seconds, ours: list[float]) -> None:
    """Every contestant once, each round another one first: a cache below us favours whoever comes later."""
    turns = [*raw.DEPTHS, 0]
    first = number % len(turns)
    for depth in turns[first:] + turns[:first]:
        if depth:
            bare[f"{depth}_deep"].append(cold.read_bare(depth))
        else:
            ours.append(cold.fetch(namespace))
    cold.next()


# -- down --------------------------------------------------------------------------------------------------------


def measure_write_behind(home: Path, blocks: Sequence[Bytes], rounds: int) -> Results:
    """Blocks that lie in DRAM and nowhere else, from `flush` until all are durable, against a bare file's fdatasync.

    A daemon and a directory for each round, so that both write to extents that never held anything.
    """
    total = len(blocks) * BLOCK_BYTES
    bare: Seconds = {}
    again: Seconds = {}
    ours: list[float] = []
    for number in range(rounds):
        for turn in (0, 1) if number % 2 else (1, 0):
            if turn:
                for name, first, second in raw.write_table(home / "bare", blocks):
                    bare.setdefault(name, []).append(first)
                    again.setdefault(name, []).append(second)
            else:
                ours.append(flush_all(home, blocks))
    return {
        "write_behind_over_raw_write": best(bare) / median(ours),
        "write_behind_gb_per_s": total / median(ours) / 1e9,
        "raw_write_again_gb_per_s": total / best(again) / 1e9,
    } | gigabytes_per_s(total, bare, "raw_write")


def flush_all(home: Path, blocks: Sequence[Bytes], *settings: str) -> float:
    """Seconds of one `flush` of them all, by a daemon of its own with these settings."""
    dram = f"{len(blocks) * BLOCK_BYTES // MIB + 256}MiB"
    arguments = ("--dram", dram, "--disk", str(home / "disk"), *DISK, "--disk-admission", "none")
    with daemon_at(home, *arguments, *settings) as running, client_of(running) as (_, namespace):
        running.await_memory()
        must_accept(namespace, new_keys(1), [blocks[0]])
        assert namespace.flush(PATIENCE_S).durable == 1  # the tier is open
        result = namespace.store(new_keys(len(blocks)), list(blocks), wait=True, space_s=PATIENCE_S)
        assert result.accepted == len(blocks), result
        begun = time.perf_counter()
        flushed = namespace.flush(PATIENCE_S)
        seconds = time.perf_counter() - begun
        assert flushed.durable == len(blocks), flushed
    return seconds


# -- in ----------------------------------------------------------------------------------------------------------

CALL_BLOCKS = 16  # a `store` call: half the ring
STREAM_DRAMS = 4  # times its memory that a stream is long


def measure_store(home: Path, blocks: Sequence[Bytes], pairs: int) -> Results:
    """Blocks that all have room in memory. A daemon lets them lie there until it is nearly full, so most of the
    writing comes after the last store: who stores pays for the rest of it alone, and `durable_share` tells how much
    it was in the end, `durable_share_at_last_store` how much of it by then.
    """
    ours, limit = _in_turn(home, blocks, len(blocks) * BLOCK_BYTES * 5 // 4, pairs)
    total = len(blocks) * BLOCK_BYTES
    return _slowdown("store_slowdown", ours, limit) | {
        "durable_share": min(ours.durable_shares),
        "durable_share_at_last_store": median(ours.early_shares),
        "store_gb_per_s": total / median(ours.seconds) / 1e9,
        "store_without_disk_gb_per_s": total / median(limit.seconds) / 1e9,
        "durable_after_last_store_s": median(ours.tails),
    }


def measure_stream(home: Path, blocks: Sequence[Bytes], pairs: int) -> Results:
    """The same blocks through a quarter of their memory: three quarters are stored while earlier ones are written, or
    evicted unwritten where the drive is slower than who stores. Without a disk they are evicted as well.
    """
    dram_bytes = len(blocks) * BLOCK_BYTES // STREAM_DRAMS
    ours, limit = _in_turn(home, blocks, dram_bytes, pairs)
    total = len(blocks) * BLOCK_BYTES
    return _slowdown("stream_slowdown", ours, limit) | {
        "stream_drams": STREAM_DRAMS,
        "stream_durable_share": min(ours.durable_shares),
        "stream_durable_share_at_last_store": median(ours.early_shares),
        "stream_gb_per_s": total / median(ours.seconds) / 1e9,
        "stream_without_disk_gb_per_s": total / median(limit.seconds) / 1e9,
    }


def _slowdown(name: str, ours: "StoreRounds", limit: "StoreRounds") -> Results:
    """What the disk tier costs those who store, as a share of what storing takes without it."""
    pairwise = [(mine - bare) / bare for mine, bare in zip(ours.seconds, limit.seconds, strict=True)]
    return {name: median(pairwise), f"{name}_worst": max(pairwise)}


def _in_turn(home: Path, blocks: Sequence[Bytes], dram_bytes: int, pairs: int) -> "tuple[StoreRounds, StoreRounds]":
    """A daemon that writes everything behind, in turn with one that has no disk.

    Both daemons run all the time, the one that waits being idle: so the two halves of a pair lie within a second of
    each other. Which memory a daemon was given tells for its whole life: whoever started first was up to 8 % slower,
    disk or no disk. So half of the pairs are taken from daemons that were started the other way round.
    """
    halves = [_store_pairs(home, blocks, dram_bytes, (pairs + 1) // 2, ours_first=first) for first in (True, False)]
    return halves[0][0].joined(halves[1][0]), halves[0][1].joined(halves[1][1])


def _store_pairs(
    home: Path, blocks: Sequence[Bytes], dram_bytes: int, pairs: int, *, ours_first: bool
) -> "tuple[StoreRounds, StoreRounds]":
    """What the daemon with a disk did, and the one without."""
    starts = [(home / "ours", ("--disk", str(home / "ours" / "disk"), *DISK, *EVERYTHING)), (home / "limit", ())]
    with ExitStack() as stack:
        started = {
            at.name: stack.enter_context(Storing.at(at, blocks, dram_bytes, *arguments))
            for at, arguments in (starts if ours_first else reversed(starts))
        }
        ours, limit = started["ours"], started["limit"]
        for number in range(pairs):
            for one in (ours, limit) if number % 2 else (limit, ours):
                one.store_all()
            say(f"store: {number + 1} of {pairs}, {'ours' if ours_first else 'the limit'} started first")
    return ours.rounds, limit.rounds


@dataclass(slots=True)
class StoreRounds:
    """What storing all blocks took, time after time."""

    seconds: list[float] = field(default_factory=list)
    early_shares: list[float] = field(default_factory=list)  # durable when the last store was accepted
    durable_shares: list[float] = field(default_factory=list)  # and after the `flush` that followed
    tails: list[float] = field(default_factory=list)  # seconds of that

    def joined(self, more: "StoreRounds") -> "StoreRounds":
        """Both, one after the other."""
        return StoreRounds(
            self.seconds + more.seconds,
            self.early_shares + more.early_shares,
            self.durable_shares + more.durable_shares,
            self.tails + more.tails,
        )


class Storing:
    """One daemon, and a client that stores into it."""

    def __init__(self, namespace: Namespace, blocks: Sequence[Bytes]) -> None:
        self._namespace = namespace
        self._blocks = blocks
        self.rounds = StoreRounds()

    @staticmethod
    @contextmanager
    def at(home: Path, blocks: Sequence[Bytes], dram_bytes: int, *arguments: str) -> "Iterator[Storing]":
        """With DRAM, ring and disk ready for use."""
        home.mkdir(exist_ok=True)
        with (
            daemon_at(home, "--dram", f"{dram_bytes >> 20}MiB", *arguments) as running,
            client_of(running) as (_, namespace),
        ):
            warm_up = new_keys(2 * CALL_BLOCKS)
            must_accept(namespace, warm_up, list(blocks[: len(warm_up)]))
            namespace.flush(PATIENCE_S)
            namespace.delete(warm_up[:1])
            await_memory(running.process.pid, dram_bytes)
            yield Storing(namespace, blocks)

    def store_all(self) -> None:
        """Into a pool that has nothing else, and away again."""
        seconds = 0.0
        first: list[bytes] = []
        for start in range(0, len(self._blocks), CALL_BLOCKS):
            some, keys = list(self._blocks[start : start + CALL_BLOCKS]), new_keys(CALL_BLOCKS)
            begun = time.perf_counter()
            must_accept(self._namespace, keys, some)
            seconds += time.perf_counter() - begun
            first.append(keys[0])
        self.rounds.seconds.append(seconds)
        tail = time.perf_counter()
        early = self._namespace.flush(0.0).durable  # as it is; what this leaves undecided the next one speaks of
        durable = early + self._namespace.flush(PATIENCE_S).durable
        self.rounds.early_shares.append(early / len(self._blocks))
        self.rounds.durable_shares.append(durable / len(self._blocks))
        self.rounds.tails.append(time.perf_counter() - tail)
        for key in first:
            self._namespace.delete([key])


def await_memory(pid: int, dram_bytes: int) -> None:
    """Until the daemon has faulted its arenas in."""
    until = time.monotonic() + 120
    while memory_of(pid, "RssShmem") < dram_bytes:
        assert time.monotonic() < until, f"{memory_of(pid, 'RssShmem')} of {dram_bytes} bytes are there"
        time.sleep(0.05)
