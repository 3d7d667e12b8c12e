"""An index that is made anew from headers, for as long as that takes: DRAM serves meanwhile, and disk serves then."""

import os
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvproto.limits import KIB
from tests.integration.test_kvctl_acting import body, kvctl
from tests.node import Node, assert_blocks, census, chain, fetch, managed, put, put_roots, roots, until, values

BLOCK_BYTES = 16 * KIB
BLOCKS = 300  # more than one look at headers takes, so that a rebuild can be held between two
OLD, NEW = roots("old", BLOCKS), chain("new", 20)
# The index child, whose reader stops itself once it has said how far a rebuild is.
HELD = """#!{python}
import os, signal, sys
from kvstored import index_child, index_rebuild
collect = index_rebuild.collect
def held(segments, records, progress):
    def tell(read, slots):
        progress(read, slots)
        if not os.path.exists({pid!r}):
            with open({pid!r} + ".part", "w") as file:
                file.write(str(os.getpid()))
            os.rename({pid!r} + ".part", {pid!r})
            os.kill(os.getpid(), signal.SIGSTOP)
    return collect(segments, records, tell)
index_rebuild.collect = held
del sys.argv[1:-1]
sys.exit(index_child.main())
"""
# The daemon, with that for an interpreter of its children.
DAEMON = """
import os, sys
from kvstored.cli import main
sys.executable = os.environ["HELD"]
sys.exit(main())
"""


@contextmanager
def second_life(*, index: bool) -> Iterator[tuple[Node, Path]]:
    """A node whose old blocks lie on disk, after a cold start; and the file that will say who holds the rebuild."""
    with Node(segment="8MiB", dram="16MiB") as node, pytest.MonkeyPatch.context() as patch:
        node.start("--disk-admission", "all", "--keep", "false")
        put_roots(node.namespace(BLOCK_BYTES), OLD)
        node.stop()
        if not index:
            node.drop_index()
        script, pid = node.home / "held", node.home / "held.pid"
        script.write_text(HELD.format(python=sys.executable, pid=str(pid)))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        patch.setenv("HELD", str(script))
        with managed(node, "--disk-admission", "all", "--keep", "false", command=("-c", DAEMON)) as manager:
            manager.start()
            manager.wait_ready()
            try:
                yield node, pid
            finally:
                if pid.exists():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid.read_text()), signal.SIGCONT)


def status(node: Node) -> Any:
    """What `kvctl status` says of the disk."""
    return body(kvctl(node, "-o", "json", "status"), "status")["disk"]


def stopped(pid: int) -> bool:
    """Is this process held by SIGSTOP?"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_dram_serves_while_the_index_is_made_anew_and_then_disk_does() -> None:
    with second_life(index=False) as (node, pid_file):
        assert until(pid_file.exists), "nothing is rebuilt"
        reader = int(pid_file.read_text())
        assert until(lambda: stopped(reader))
        ns = node.namespace(BLOCK_BYTES)
        said = status(node)
        assert (said["state"], said["index_state"]) == ("opening", "rebuilding")
        assert 0 < said["rebuild_done_slots"] < said["rebuild_total_slots"]
        assert "index rebuilding (" in kvctl(node, "status")[1]
        assert [ns.match([key]).blocks for key in OLD[::10]] == [0] * len(OLD[::10])
        assert not census(ns, OLD[:5], wait_s=0.1).hits
        put(ns, NEW, values(NEW, BLOCK_BYTES), durable=False)
        found = fetch(ns, NEW)
        assert_blocks(found.blocks, values(NEW, BLOCK_BYTES))
        assert (found.tiers.dram, found.tiers.disk) == (len(NEW), 0)
        put_roots(ns, OLD[:1], durable=False)  # what nobody knows of yet is taken, and lies twice then
        flushed = ns.flush(0.1)
        assert (flushed.durable, flushed.pending) == (0, len(NEW) + 1), "nothing is durable yet, and nothing failed"
        assert stopped(reader)
        assert status(node)["index_state"] == "rebuilding", "all that was while it was held"

        os.kill(reader, signal.SIGCONT)
        assert until(lambda: all(ns.match([key]).blocks for key in OLD))
        told = census(ns, OLD)
        assert told.hits == set(OLD)
        assert told.disk >= BLOCKS - 1
        assert_blocks(fetch(ns, NEW).blocks, values(NEW, BLOCK_BYTES))
        assert until(lambda: ns.flush(1.0).pending == 0)
        assert node.slots().keys() >= set(NEW), "what was stored meanwhile is written now"
        said = status(node)
        assert (said["state"], said["index_state"], said["rebuilt"] != "") == ("serving", "ready", True)
        assert "made anew at this start" in kvctl(node, "status")[1]


def test_an_index_that_is_there_is_believed_and_nobody_waits() -> None:
    """The control: the very same child, with nothing to rebuild."""
    with second_life(index=True) as (node, pid_file):
        ns = node.namespace(BLOCK_BYTES)
        assert until(lambda: all(ns.match([key]).blocks for key in OLD))
        assert len(census(ns, OLD[::5]).hits) == len(OLD[::5])
        said = status(node)
        assert (said["index_state"], said["rebuilt"], said["rebuild_total_slots"]) == ("ready", "", 0)
        assert not pid_file.exists()
