"""What a drive does when nothing is in its way: bare O_DIRECT calls by so many threads, each waiting for its own."""

import mmap
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np

from bench.harness import Bytes, timed
from kvkernels import libc
from kvproto.limits import MIB, PAGE_BYTES
from kvstore.tier.format import FormatError, parse_header, parse_superblock, slot_offset

_FORK: Final = multiprocessing.get_context("fork")  # the blocks to write are there at once
DEPTHS = (1, 2, 4, 8)
WRITE_MIB = (2, 8)  # a call
J = TypeVar("J")


class Place(NamedTuple):
    """Where a block's bytes begin."""

    file: Path
    offset: int


def aligned(count: int, block_bytes: int) -> list[Bytes]:
    """Blocks of touched memory that begin on pages, in one piece; of huge pages, where a drive writes fastest.

    Never given back.
    """
    whole_bytes = -(-count * block_bytes // libc.HUGE_PAGE_BYTES) * libc.HUGE_PAGE_BYTES
    fd = os.memfd_create("bench")
    os.ftruncate(fd, whole_bytes)
    address = libc.map_shared(fd, whole_bytes, writable=True)
    os.close(fd)
    libc.make_huge(address, whole_bytes)
    whole = libc.bytes_at(address, whole_bytes)
    whole[:] = 1
    return [whole[i * block_bytes : (i + 1) * block_bytes] for i in range(count)]


def places_of(disk: Path, keys: Sequence[bytes]) -> list[Place]:
    """Where the payloads of these blocks lie in a daemon's segments. Raises KeyError for one that does not."""
    found: dict[bytes, Place] = {}
    page = memoryview(mmap.mmap(-1, PAGE_BYTES))
    for path in sorted((disk / "segments").glob("*.seg")):
        with _opened(path, os.O_RDONLY) as fd:
            os.preadv(fd, [page], 0)
            superblock = parse_superblock(page)
            for slot in range(superblock.slots):
                offset = slot_offset(superblock.slot_bytes, slot)
                os.preadv(fd, [page], offset)
                try:
                    found[parse_header(page).key] = Place(path, offset + PAGE_BYTES)
                except FormatError:  # nothing was written there
                    continue
    return [found[key] for key in keys]


def read(places: Sequence[Place], targets: Sequence[Bytes], depth: int) -> float:
    """Seconds to read what lies at these places, a call each."""
    fds = {file: os.open(file, os.O_RDONLY | os.O_DIRECT) for file in {place.file for place in places}}
    buffers = [target.data for target in targets]
    try:
        jobs = [(fds[place.file], buffer, place.offset) for place, buffer in zip(places, buffers, strict=True)]

        def one(job: tuple[int, memoryview, int]) -> None:
            fd, buffer, offset = job
            assert os.preadv(fd, [buffer], offset) == buffer.nbytes

        return _in_turn(one, jobs, depth)
    finally:
        for fd in fds.values():
            os.close(fd)


def write_new(path: Path, source: Bytes, total_bytes: int, call_bytes: int, depth: int) -> float:
    """Seconds to fill a new file, whose extents were set aside before, and sync it. The file is removed."""
    with _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
        try:
            os.posix_fallocate(fd, 0, total_bytes)
            os.fsync(fd)
            calls = source.size // call_bytes
            pieces = [source[i * call_bytes : (i + 1) * call_bytes].data for i in range(calls)]

            def one(number: int) -> None:
                assert os.pwritev(fd, [pieces[number % calls]], number * call_bytes) == call_bytes

            seconds = _in_turn(one, range(total_bytes // call_bytes), depth)
            return seconds + timed(lambda: os.fdatasync(fd))
        finally:
            path.unlink()


def write_table(path: Path, blocks: Sequence[Bytes]) -> Iterator[tuple[str, float, float]]:
    """Configuration; seconds of `write_new` of these blocks out of memory that is as new as that of a daemon which has
    just filled it; and of the same once more.

    Out of memory that it has read before, a drive writes faster: so each gets a process, and memory, of its own.
    """
    for depth in DEPTHS:
        for call in WRITE_MIB:
            yield (f"{depth}_deep_{call}_mib", *_in_new_memory(path, blocks, call * MIB, depth))


def _in_new_memory(path: Path, blocks: Sequence[Bytes], call_bytes: int, depth: int) -> tuple[float, float]:
    receiving, sending = _FORK.Pipe(duplex=False)

    def write_twice() -> None:
        total_bytes = len(blocks) * blocks[0].nbytes
        source = aligned(1, total_bytes)[0]
        np.concatenate(blocks, out=source)
        sending.send(tuple(write_new(path, source, total_bytes, call_bytes, depth) for _ in range(2)))

    process = _FORK.Process(target=write_twice)
    process.start()
    sending.close()
    first, again = receiving.recv()  # EOFError: it failed, and said why
    process.join()
    return first, again


def _in_turn(one: Callable[[J], None], jobs: Sequence[J], depth: int) -> float:
    """Seconds until `depth` threads have done all jobs, each taking the next one."""
    left = iter(jobs)

    def work() -> None:
        for job in left:
            one(job)

    with ThreadPoolExecutor(depth) as pool:
        return timed(lambda: [ended.result() for ended in [pool.submit(work) for _ in range(depth)]])


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_DIRECT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
