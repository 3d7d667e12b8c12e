"""A drive that does not answer: a real daemon whose system calls on segment files block, in the kernel's place, for as
long as a pipe is empty. Whoever waits gets a miss at the deadline, DRAM goes on, and what comes late is right."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    with Node(dram="32MiB", segment="8MiB") as node, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HANG", str(node.home / "hang"))
        arguments = ("--disk-admission", "none", "--stop-within", "500ms")
        with managed(node, *arguments, command=("-c", HANGING)) as manager:
            manager.fds_max = 0  # nothing outlives a kill but the disk
            manager.start()
            manager.wait_ready()
            yield Hanging(node, manager)


def test_a_hung_read_is_a_miss_at_the_deadline_and_dram_goes_on(hanging: Hanging, record_property: Recorder) -> None:
    check_hung_reads(hanging, 40, record_property)


@pytest.mark.long
def test_a_thousand_reads_of_a_hung_drive_are_misses_at_their_deadlines(
    hanging: Hanging, record_property: Recorder
) -> None:
    check_hung_reads(hanging, 1000, record_property, measured=True)


def check_hung_reads(hanging: Hanging, count: int, record_property: Recorder, *, measured: bool = False) -> None:
    """Ask a hung drive so many times, and note by how much the answers were over their deadlines; `measured`: and by
    how much as many sleeps of that length are, which is what the machine adds to anything that waits."""
    cold, warm = chain(f"cold-{count}", 30), chain(f"warm-{count}", 30)
    node, wait_s, over, overslept = hanging.node, 0.02, list[float](), list[float]()
    assert LATE_S < PATIENCE_S, "a client that gives up first would hide a daemon that hangs"
    put(node.namespace(BLOCK_BYTES), cold, values(cold, BLOCK_BYTES))
    hanging.restart()
    ns = node.namespace(BLOCK_BYTES)
    node.await_disk(ns, cold)
    put(ns, warm, values(warm, BLOCK_BYTES), durable=False)
    with hanging.hangs("pread"):
        for _ in range(count):
            begun_s = time.monotonic()
            found = fetch(ns, cold, wait_s)
            over.append(time.monotonic() - begun_s - wait_s)
            assert over[-1] < LATE_S, "over the deadline"
            assert not len(found.blocks), "nothing can have been read"
            begun_s = time.monotonic()
            found = fetch(ns, warm)
            assert time.monotonic() - begun_s < LATE_S, "what lies in DRAM waits for the drive"
            assert_blocks(found.blocks, values(warm, BLOCK_BYTES))
        for _ in range(count if measured else 0):
            begun_s = time.monotonic()
            time.sleep(wait_s)
            overslept.append(time.monotonic() - begun_s - wait_s)
        for share, name in ((0.5, "p50"), (0.999, "p999")):
            record_property(f"over_the_deadline_{name}_ms", float(np.quantile(over, share) * 1e3))
            record_property(f"over_a_sleep_{name}_ms", float(np.quantile(overslept or [0], share) * 1e3))
        new = roots(f"meanwhile-{count}", 20)
        for key in new:
            put(ns, [key], values([key], BLOCK_BYTES), durable=False)
            assert np.array_equal(fetch(ns, [key]).blocks[0], value(key, BLOCK_BYTES))
    assert until(lambda: len(fetch(ns, cold, 0.5).blocks) == 30), "a drive that answers again serves again"
    assert_blocks(fetch(ns, cold).blocks, values(cold, BLOCK_BYTES))
    assert until(lambda: written(ns)), "a drive that answers again is written again"


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
