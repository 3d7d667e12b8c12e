"""`python -m bench.drive_depth [--json FILE]`: how many readers and writers, and how much a call, for 2 MiB blocks.

100 blocks go from an arena to a segment file and back, through `Drives`, and in the same run through bare preadv and
pwritev of 2 MiB with O_DIRECT at depths 1 to 8. Every configuration once a round, in turn; medians of rounds. Loads
verify every byte, bare reads nothing. O_DIRECT passes the page cache by; a cache below (the host's, the drive's) it
does not, for either.
"""

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import cast

import xxhash

from bench.harness import Bytes, Results, random_blocks, record, say, timed
from kvkernels import libc
from kvproto.ids import NamespaceDigest
from kvproto.limits import MIB
from kvstore.sessions import Namespace
from kvstore.tier.format import Codec, Header, stored_slot_bytes
from kvstore.tier.orders import Load, MakeSegment, Order, Outcome, Save
from kvstored import drive_files
from kvstored.drive import Drives
from kvstored.regions import make_region

BLOCKS = 100
BLOCK_BYTES = 2 * MIB
SLOT_BYTES = stored_slot_bytes(BLOCK_BYTES)
SEGMENT_BYTES = 256 * MIB
DEPTHS = (1, 2, 4, 8)
CALL_MIB = (2, 4, 8)  # of payload
_PAIRS = (
    ("fresh_save", "bare_fresh_write", "writers"),  # into a file that was set aside and never written
    ("save", "bare_write", "writers"),
    ("load", "bare_read", "readers"),
)
DIGEST = NamespaceDigest(b"d" * 32)


def main() -> None:
    """Run, print the table, write the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.drive_depth")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="on the drive in question")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    options = parser.parse_args()
    results = run(options.directory, options.rounds)
    for name, value in results.items():
        say(f"{name:40} {value:14.4f}")
    line = record("drive_depth", results, quick=options.rounds < 9)
    if options.json:
        options.json.write_text(json.dumps(json.loads(line), indent=1) + "\n")
    print(line)


def run(directory: Path, rounds: int) -> Results:
    """GB/s of every configuration, and each over bare calls at the best depth."""
    region = make_region("bench-arena", BLOCKS * BLOCK_BYTES)
    arena = region.view
    arena[:] = random_blocks(1, BLOCKS * BLOCK_BYTES, seed=1)[0]
    checksums = [xxhash.xxh3_64_intdigest(block.data) for block in _blocks(arena)]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="kvstored-bench-", dir=directory) as folder:
        bare = _Bare(Path(folder) / "bare", arena)
        for number in range(rounds + 1):  # the first to warm up
            for name, turn in _turns(Path(folder), arena, checksums, bare):
                took = turn()
                if number:
                    seconds.setdefault(name, []).append(took)
            say(f"round {number} of {rounds}")
    _check(arena, checksums)
    libc.unmap(region.address, region.region_bytes)
    return _summary({name: BLOCKS * BLOCK_BYTES / median(took) / 1e9 for name, took in seconds.items()})


Turn = tuple[str, Callable[[], float]]


def _turns(folder: Path, arena: Bytes, checksums: list[int], bare: "_Bare") -> Iterator[Turn]:
    for depth in DEPTHS:
        yield f"bare_fresh_write_{depth}_gbs", partial(_Bare(folder / "fresh", arena).move, os.pwritev, depth)
        yield f"bare_write_{depth}_gbs", partial(bare.move, os.pwritev, depth)
        yield f"bare_read_{depth}_gbs", partial(bare.move, os.preadv, depth)
    for threads in DEPTHS:
        for call_mib in CALL_MIB:
            with _ours(folder, arena, checksums, threads, call_mib) as ours:
                yield f"fresh_save_{threads}_writers_{call_mib}_mib_gbs", ours.save
                yield f"save_{threads}_writers_{call_mib}_mib_gbs", ours.save
                yield f"load_{threads}_readers_{call_mib}_mib_gbs", ours.load


def _summary(rates: Results) -> Results:
    say(f"{'GB/s':>21} " + "".join(f"{f'depth {depth}':>10}" for depth in DEPTHS))
    for ours, limit, who in _PAIRS:
        say(f"{limit:>21} " + "".join(f"{rates[f'{limit}_{depth}_gbs']:10.2f}" for depth in DEPTHS))
        best = max(rates[f"{limit}_{depth}_gbs"] for depth in DEPTHS)
        for call_mib in CALL_MIB:
            row = [rates[f"{ours}_{depth}_{who}_{call_mib}_mib_gbs"] for depth in DEPTHS]
            say(f"{ours} {call_mib} MiB/call".rjust(21) + " " + "".join(f"{rate:10.2f}" for rate in row))
        mine = {name: rate for name, rate in rates.items() if name.startswith(ours)}
        name = max(mine, key=lambda name: mine[name])
        say(f"  best: {name}, {mine[name] / best:.3f} of the best bare rate")
        rates |= {f"{name.removesuffix('_gbs')}_over_bare": rate / best for name, rate in mine.items()}
    return rates


class _Bare:
    """2 MiB a call, so many threads, nothing else."""

    def __init__(self, path: Path, arena: Bytes) -> None:
        path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self._fd, 0, BLOCKS * BLOCK_BYTES)
        self._buffers = [block.data for block in _blocks(arena)]

    def __del__(self) -> None:
        os.close(self._fd)

    def move(self, call: Callable[[int, list[memoryview], int], int], depth: int) -> float:
        """Seconds."""
        numbers = iter(range(BLOCKS))

        def work() -> None:
            for number in numbers:
                assert call(self._fd, [self._buffers[number]], number * BLOCK_BYTES) == BLOCK_BYTES

        with ThreadPoolExecutor(depth) as pool:
            return timed(lambda: [one.result() for one in [pool.submit(work) for _ in range(depth)]])


class _Ours:
    """The same through `Drives`."""

    def __init__(self, drives: Drives, news: threading.Semaphore, checksums: list[int]) -> None:
        self._drives = drives
        self._news = news
        self._saves = [_save(slot, checksum) for slot, checksum in enumerate(checksums)]
        self._loads = [_load(slot, checksum) for slot, checksum in enumerate(checksums)]
        self._carry_out([MakeSegment(1, SLOT_BYTES, "bench")])

    def save(self) -> float:
        """Seconds."""
        return timed(lambda: self._carry_out(self._saves))

    def load(self) -> float:
        """Seconds."""
        return timed(lambda: self._carry_out(self._loads))

    def _carry_out(self, batch: "list[MakeSegment] | list[Save] | list[Load]") -> None:
        orders: list[Order] = [*batch]
        for order in orders:
            order.outcome = Outcome.OPEN
        self._drives.submit(orders)
        while not self._drives.take_done():
            self._news.acquire()
        assert all(order.outcome is Outcome.DONE for order in orders)


@contextmanager
def _ours(folder: Path, arena: Bytes, checksums: list[int], threads: int, call_mib: int) -> Iterator[_Ours]:
    home = folder / f"ours-{threads}-{call_mib}"
    home.mkdir(exist_ok=True)
    news = threading.Semaphore(0)
    drives = Drives(
        [home], SEGMENT_BYTES, b"0123456789abcdef", lambda _: arena, news.release,
        readers=threads, writers=threads, packers=1,
    )  # fmt: skip
    # A call of so many blocks, and of no more.
    drive_files.RUN_BYTES, before = call_mib * MIB, drive_files.RUN_BYTES  # type: ignore[misc]
    drives.start()
    try:
        yield _Ours(drives, news, checksums)
    finally:
        drive_files.RUN_BYTES = before  # type: ignore[misc]
        drives.stop()


def _save(slot: int, checksum: int) -> Save:
    header = Header(
        slot.to_bytes(32, "little"), bytes(32), DIGEST, "bench", 1 + slot, 0, 0, 0, 1, slot, BLOCK_BYTES,
        BLOCK_BYTES, checksum, checksum, Codec.RAW,
    )  # fmt: skip
    return Save(slot, header, SLOT_BYTES, 0, slot * BLOCK_BYTES)


def _load(slot: int, checksum: int) -> Load:
    fields = SimpleNamespace(
        digest=DIGEST, tenant=SimpleNamespace(name="bench"), identity=SimpleNamespace(block_bytes=BLOCK_BYTES)
    )
    return Load(
        slot, cast("Namespace", fields), slot.to_bytes(32, "little"), 1 + slot, checksum, 1, slot, SLOT_BYTES, 0,
        slot * BLOCK_BYTES,
    )  # fmt: skip


def _blocks(arena: Bytes) -> list[Bytes]:
    return [arena[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(BLOCKS)]


def _check(arena: Bytes, checksums: list[int]) -> None:
    assert [xxhash.xxh3_64_intdigest(block.data) for block in _blocks(arena)] == checksums


if __name__ == "__main__":
    main()
