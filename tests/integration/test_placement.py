"""Where a real daemon's memory lies, and what it says when a limit of its host is in the way."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest

from bench import placement
from bench.placement import TWO_NODES
from bench.process import DaemonProcess
from kvproto import control_pb2, control_pb2_grpc
from kvproto.limits import KIB, MIB
from tests.node import Node, chain, put, until, values
from tests.raw import real_daemon


def status(daemon: DaemonProcess) -> control_pb2.GetStatusResponse:
    with grpc.insecure_channel(f"unix:{daemon.runtime_dir}/control.sock") as channel:
        request = control_pb2.GetStatusRequest()
        answer: control_pb2.GetStatusResponse = control_pb2_grpc.ControlStub(channel).GetStatus(request, timeout=30)
        return answer


def test_arenas_are_shared_by_two_nodes_and_kvctl_says_how_much_lies_on_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(TWO_NODES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with real_daemon() as daemon:
        daemon.await_memory()
        assert until(lambda: sum(node.bytes for node in status(daemon).tiers[0].nodes) == 64 * MIB)
        (dram,) = status(daemon).tiers
        assert {node.node: node.bytes for node in dram.nodes} == {0: 32 * MIB, 1: 32 * MIB}
        assert dram.numa == "0,1"
        shown = subprocess.run(
            [sys.executable, "-m", "kvctl", "--runtime-dir", str(daemon.runtime_dir), "status"],
            capture_output=True, text=True, check=True, timeout=60,
        ).stdout  # fmt: skip
        words = " ".join(shown.split())  # lines are as long as the terminal is wide
        assert "32.0 MiB on node 0, 32.0 MiB on node 1" in words


def test_the_benchmark_says_how_a_pool_is_shared_by_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "DRAM_MIB", 32)
    expected = {"simulated_nodes": 2, "simulated_mib_placed": 32, "simulated_mib_apart": 0}
    assert placement.shared_by_two_nodes() == expected
    assert "PYTHONPATH" not in os.environ or "kvstored-bench-" not in os.environ["PYTHONPATH"]


def test_on_one_node_nothing_is_asked_of_the_kernel_and_memory_without_huge_pages_has_none() -> None:
    with real_daemon("--huge-pages", "false") as daemon:
        daemon.await_memory()
        (dram,) = status(daemon).tiers
        assert (dram.numa, dram.huge_bytes) == ("off", 0)


def test_a_daemon_that_took_its_memory_over_says_how_much_of_it_lies_in_huge_pages() -> None:
    """A former one had made them; nobody told this one."""
    with Node(disks=0) as node:
        node.start("--keep", "true")
        assert node.daemon is not None
        node.daemon.await_memory()
        namespace, keys = node.namespace(64 * KIB), chain("kept", 50)
        put(namespace, keys, values(keys, 64 * KIB), durable=False)
        (before,) = status(node.daemon).tiers
        if before.huge_bytes < before.populated_bytes:
            pytest.skip("this kernel makes no huge pages for shared memory, or has none left")
        node.kill()
        node.start("--keep", "true")
        daemon = node.daemon
        assert "warm=True kept=50" in node.log()
        assert until(lambda: status(daemon).tiers[0].huge_bytes == before.huge_bytes), status(daemon).tiers[0]


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A control group of its own, of either version. Skips the test where none may be made."""
    for top, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = top / f"kvstored-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(limit_bytes))
        except OSError:
            group.rmdir()
            continue
        try:
            yield group
        finally:
            assert until(partial(_removed, group)), f"{group} is in use"
        return
    pytest.skip("no control group for memory can be made here")


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # its last process is on its way out
        return False
    return True


def test_a_pool_that_its_control_group_does_not_hold_ends_with_78_and_both_figures(tmp_path: Path) -> None:
    with memory_group(96 * MIB) as group:
        daemon = [sys.executable, "-m", "kvstored", "--runtime-dir", str(tmp_path), "--dram"]
        said = {}
        for size in ("128MiB", "97MiB", "none"):
            enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group), *daemon, size]
            done = subprocess.run(enter, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 78, done.stderr
            said[size] = done.stderr
        assert "128MiB is more than the memory limit of the control group" in said["128MiB"]
        assert str(group) in said["128MiB"]
        assert said["128MiB"].rstrip().endswith("96MiB")
        assert "control group" not in said["none"], "the control: that is another mistake"


def test_memory_that_may_not_be_locked_is_served_and_both_figures_are_named(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv")
    if setpriv is None or os.geteuid() != 0:
        pytest.skip("needs root, and setpriv to give up a capability")
    (tmp_path / "kvstored.toml").write_text("[dram]\nsize = '32MiB'\narena = '8MiB'\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (MIB, hard))
    try:
        with DaemonProcess(
            tmp_path / "run", "--config", str(tmp_path / "kvstored.toml"), log_file=tmp_path / "log",
            through=(setpriv, "--bounding-set=-ipc_lock"),
        ) as daemon:  # fmt: skip
            daemon.await_memory()
            assert until(lambda: any("not locked" in warning for warning in status(daemon).warnings))
            (warning,) = [warning for warning in status(daemon).warnings if "not locked" in warning]
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
    assert "1MiB may be (RLIMIT_MEMLOCK), and dram.size is 32MiB; raise LimitMEMLOCK=" in warning
