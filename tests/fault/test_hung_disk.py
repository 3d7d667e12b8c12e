"""A drive that does not answer: a real daemon whose system calls on segment files block, in the kernel's place, for as
long as a pipe is empty. Whoever waits gets a miss at the deadline, DRAM goes on, and what comes late is right."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from kvclient import Namespace
from kvstored.drive_health import HUNG_NS
from tests.figures import Recorder
from tests.node import PATIENCE_S, Node, assert_blocks, chain, fetch, managed, put, roots, until, value, values
from tests.systemd import ServiceManager

BLOCK_BYTES = 64 << 10
# An answer so late was held up by the drive, not by a busy machine. A little later the daemon finds the drive hung and
# lets go of whoever waits, which is not what is tested here.
LATE_S = 0.8 * HUNG_NS / 1e9
# So long a drive hangs at a time where it is measured who waits: then the daemon has not found that out, and whoever
# asks waits. Once it has, it answers at once, which tells nothing about deadlines.
SPELL_S = 0.4 * HUNG_NS / 1e9
WAIT_S = 0.02  # of those who wait
DRAM_BLOCKS = 512
OVER_S = 0.005  # by so much later than a sleep may an answer be, at p99.9
# The daemon, with calls that hang while a pipe is there. One that is opened for reading blocks in the kernel until
# somebody opens it for writing, without the GIL, as a hung drive does. A stop leaves its threads behind sooner.
HANGING = """
import os, sys
from kvstored import drive, drive_files
from kvstored.cli import main
drive.STOP_S = 0.5
hang = os.environ["HANG"]
def hanging(name):
    real = getattr(drive_files.Files, name)
    def call(self, *arguments):
        while os.path.exists(hang + "." + name):
            try:
                os.close(os.open(hang + "." + name, os.O_RDONLY))
            except FileNotFoundError:
                pass
        return real(self, *arguments)
    setattr(drive_files.Files, name, call)
for name in ("pread", "pwrite", "fdatasync"):
    hanging(name)
sys.exit(main())
"""


class Hanging:
    """A daemon in a service manager, and its drive."""

    def __init__(self, node: Node, manager: ServiceManager) -> None:
        self.node = node
        self.manager = manager
        self._pipe = node.home / "hang"

    def path(self, call: str) -> Path:
        """The pipe on which this call waits."""
        return self._pipe.with_suffix(f".{call}")

    @contextmanager
    def hangs(self, call: str) -> Iterator[None]:
        """From now on until the end of the block."""
        path = self.path(call)
        os.mkfifo(path)
        try:
            yield
        finally:
            fd = os.open(path, os.O_RDWR)  # whoever waits goes on
            path.unlink()
            os.close(fd)

    def restart(self) -> None:
        """`kill -9` and a cold start."""
        self.manager.fds_max = 0
        self.manager.kill()
        self.manager.start()
        self.manager.wait_ready()


@pytest.fixture(scope="module")
def hanging() -> Iterator[Hanging]:
    with (
        Node(dram=f"{DRAM_BLOCKS * BLOCK_BYTES >> 20}MiB", segment="8MiB") as node,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("HANG", str(node.home / "hang"))
        arguments = ("--disk-admission", "none", "--stop-within", "500ms")
        with managed(node, *arguments, command=("-c", HANGING)) as manager:
            manager.fds_max = 0  # nothing outlives a kill but the disk
            manager.start()
            manager.wait_ready()
            yield Hanging(node, manager)


def test_a_hung_read_is_a_miss_at_the_deadline_and_dram_goes_on(hanging: Hanging) -> None:
    check_hung_reads(hanging, 40)


@pytest.mark.long
def test_a_thousand_reads_of_a_hung_drive_are_misses_at_their_deadlines(
    hanging: Hanging, record_property: Recorder
) -> None:
    waits = check_hung_reads(hanging, 1000, measured=True)
    record_property("reads_that_waited", len(waits.over))
    record_property("reads_answered_at_once", waits.at_once)
    record_property("spells", waits.spells)
    for share, name in ((0.5, "p50"), (0.999, "p999")):
        record_property(f"over_the_deadline_{name}_ms", quantile_ms(waits.over, share))
        record_property(f"over_a_sleep_{name}_ms", quantile_ms(waits.overslept, share))
    late_ms = quantile_ms(waits.over, 0.999) - quantile_ms(waits.overslept, 0.999)
    record_property("over_the_deadline_beyond_a_sleep_p999_ms", late_ms)
    assert late_ms <= OVER_S * 1e3, (sorted(waits.over)[-9:], sorted(waits.overslept)[-9:])


def quantile_ms(seconds: list[float], share: float) -> float:
    """In milliseconds."""
    return float(np.quantile(seconds, share) * 1e3)


@dataclass
class Waits:
    """Of reads that had to wait for a drive, by how many seconds they came after their deadlines."""

    over: list[float] = field(default_factory=list)
    overslept: list[float] = field(default_factory=list)  # the same of sleeps: what the machine adds to any wait
    at_once: int = 0  # more reads, of a drive that was found hung before it was healed: not counted above
    spells: int = 0  # times that the drive hung


def check_hung_reads(hanging: Hanging, count: int, *, measured: bool = False) -> Waits:
    """Ask a drive that hangs, is healed and hangs again, until so many reads have waited for it.

    `measured`: sleep as often, in turn.
    """
    waits = Waits()
    cold, warm = chain(f"cold-{count}", 30), chain(f"warm-{count}", 30)
    ns = on_disk_alone(hanging, cold)
    while len(waits.over) < count:
        with hangs_with(hanging, ns, cold, warm):
            waits.spells += 1
            begun_s = time.monotonic()
            while len(waits.over) < count and time.monotonic() < begun_s + SPELL_S:
                over_s = miss_s(ns, cold) - WAIT_S
                if over_s >= 0:
                    waits.over.append(over_s)
                    if measured:
                        waits.overslept.append(oversleep_s())
                else:
                    waits.at_once += 1
                    assert time.monotonic() - begun_s > HUNG_NS / 1e9, "nobody found the drive hung, and none waited"
                check_warm(ns, warm)
            for key in roots(f"meanwhile-{count}-{waits.spells}", 20):
                put(ns, [key], values([key], BLOCK_BYTES), durable=False)
                assert np.array_equal(fetch(ns, [key]).blocks[0], value(key, BLOCK_BYTES))
    assert until(lambda: written(ns)), "a drive that answers again is written again"
    return waits


@pytest.mark.long
def test_reads_of_a_drive_that_is_found_hung_are_misses_and_wait_no_more(hanging: Hanging) -> None:
    node, cold, warm = hanging.node, chain("found-cold", 30), chain("found-warm", 30)
    ns = on_disk_alone(hanging, cold)
    with hangs_with(hanging, ns, cold, warm):
        found = node.log().count("drive hung")
        assert until(lambda: miss_s(ns, cold) < WAIT_S and node.log().count("drive hung") > found)
        for _ in range(100):
            miss_s(ns, cold)
            check_warm(ns, warm)


def on_disk_alone(hanging: Hanging, cold: list[bytes]) -> Namespace:
    """Where this chain lies, in a daemon that has nothing of it in DRAM."""
    assert LATE_S < PATIENCE_S, "a client that gives up first would hide a daemon that hangs"
    put(hanging.node.namespace(BLOCK_BYTES), cold, values(cold, BLOCK_BYTES))
    hanging.restart()
    ns = hanging.node.namespace(BLOCK_BYTES)
    hanging.node.await_disk(ns, cold)
    return ns


@contextmanager
def hangs_with(hanging: Hanging, ns: Namespace, cold: list[bytes], warm: list[bytes]) -> Iterator[None]:
    """The drive hangs, one chain lies there alone and another in DRAM; afterwards the first is read, and evicted."""
    put(ns, warm, values(warm, BLOCK_BYTES), durable=False)
    with hanging.hangs("pread"):
        yield
    assert until(lambda: len(fetch(ns, cold, 0.5).blocks) == len(cold)), "a drive that answers again serves again"
    assert_blocks(fetch(ns, cold).blocks, values(cold, BLOCK_BYTES))
    evict_all(ns)
    hanging.node.await_disk(ns, cold)


def evict_all(ns: Namespace) -> None:
    """Of DRAM, by storing more than it holds; and that again, so that it is empty."""
    fillers = [chain(f"filler-{turn}", DRAM_BLOCKS * 3 // 5) for turn in range(2)]
    for filler in fillers:
        result = ns.store(filler, [value(filler[0], BLOCK_BYTES)] * len(filler), wait=True, space_s=PATIENCE_S)
        assert result.accepted == len(filler), result
    for filler in fillers:
        ns.delete(filler[:1])


def miss_s(ns: Namespace, cold: list[bytes]) -> float:
    """How long the answer took that nothing is there."""
    begun_s = time.monotonic()
    found = fetch(ns, cold, WAIT_S)
    took_s = time.monotonic() - begun_s
    assert took_s - WAIT_S < LATE_S, "over the deadline"
    assert not len(found.blocks), "nothing can have been read"
    return took_s


def oversleep_s() -> float:
    """By how much a sleep of that length is too long."""
    begun_s = time.monotonic()
    time.sleep(WAIT_S)
    return time.monotonic() - begun_s - WAIT_S


def check_warm(ns: Namespace, warm: list[bytes]) -> None:
    """What lies in DRAM is there, and at once."""
    begun_s = time.monotonic()
    found = fetch(ns, warm)
    assert time.monotonic() - begun_s < LATE_S, "what lies in DRAM waits for the drive"
    assert_blocks(found.blocks, values(warm, BLOCK_BYTES))


def written(ns: Namespace) -> bool:
    """Is everything durable that was stored? What a drive refuses that was found hung, the next flush tries again."""
    flushed = ns.flush(PATIENCE_S)
    return flushed.failed == flushed.pending == 0


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_flush_into_a_hung_drive_ends_with_its_time_and_is_told_no_lie(hanging: Hanging, call: str) -> None:
    node = hanging.node
    ns, first, keys = node.namespace(BLOCK_BYTES), chain(f"first-{call}", 10), chain(f"flushed-{call}", 20)
    put(ns, first, values(first, BLOCK_BYTES))
    with hanging.hangs(call):
        put(ns, keys, values(keys, BLOCK_BYTES), durable=False)
        begun_s = time.monotonic()
        flushed = ns.flush(0.3)
        assert time.monotonic() - begun_s < LATE_S
        assert flushed.durable == 0, flushed
        assert flushed.pending == 20, flushed
        assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert until(lambda: written(ns))
    again = ns.store(keys[:1], values(keys[:1], BLOCK_BYTES), wait=True)
    assert again.known == 1
    hanging.restart()
    ns = node.namespace(BLOCK_BYTES)
    node.await_disk(ns, [*keys])
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
    assert_blocks(fetch(ns, first).blocks, values(first, BLOCK_BYTES))


def test_a_daemon_with_a_hung_drive_can_be_stopped(hanging: Hanging) -> None:
    node = hanging.node
    ns, keys = node.namespace(BLOCK_BYTES), chain("stop", 10)
    put(ns, keys, values(keys, BLOCK_BYTES))
    with hanging.hangs("pwrite"):
        put(ns, chain("more", 10), values(chain("more", 10), BLOCK_BYTES), durable=False)
        ns.flush(0.1)
        process = hanging.manager.process
        assert process is not None
        process.terminate()
        process.wait(30.0)
    hanging.restart()
    ns = node.namespace(BLOCK_BYTES)
    node.await_disk(ns, keys)
    assert_blocks(fetch(ns, keys).blocks, values(keys, BLOCK_BYTES))
