"""A drive that says nothing at all, neither an error nor an answer: the daemon starts without it, and says so."""

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.integration.test_drive_absent import PROBED_S, ROOT, keys_on, warnings
from tests.integration.test_drive_back import RAW, disk, start_and_read, stored
from tests.node import Node, census, put_roots, roots, until

PATIENCE_S = 3
SILENT = f"it did not answer within {PATIENCE_S} s"

# Python runs it at the start of each daemon: drives have less time than they may need.
LESS_PATIENCE = f"""
import sys
if sys.orig_argv[1:3] == ["-m", "kvstored"]:
    from kvstored import drive_asking
    drive_asking.PATIENCE_S = {PATIENCE_S}
"""


def hang(point: Path) -> int:
    """Mount what nobody serves there: every look at it waits. The descriptor; closing it ends that, and all fails."""
    c = ctypes.CDLL(None, use_errno=True)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    assert c.mount(b"silent", str(point).encode(), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
    return fuse


def over_a_silent_second_drive() -> None:
    """It is left out, is served again by the life after, and heals in this one."""
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        assert there
        node.kill()
        point = node.disks[1]
        fuse = hang(point)
        began_s = time.monotonic()
        ns = start_and_read(node)
        assert time.monotonic() - began_s < PATIENCE_S + 15
        assert f"disk: directory={point} is left out: {SILENT}" in node.log()
        drives = disk(node)["drives"]
        assert [drive["state"] for drive in drives] == ["ok", "gone"]
        assert drives[1]["reason"] in {SILENT, "no answer within 5 s"}
        assert f"disk {point} is gone (" in "".join(warnings(node))
        assert census(ns, sorted(keys)).hits == keys - there
        later = roots("later", 40)
        put_roots(ns, later)
        gone = min(there)
        ns.delete([gone])
        os.close(fuse)
        subprocess.run(["umount", "-l", str(point)], check=True)
        assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S), disk(node)["drives"][1]
        node.kill()
        ns = start_and_read(node)
        assert not census(ns, [gone]).hits
        assert census(ns, sorted(keys - there) + later).hits == (keys - there) | set(later)


def over_a_silent_first_drive() -> None:
    """No disk is used in that life, and all is there in the next."""
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        keys = set(stored(node))
        node.kill()
        point = node.disks[0]
        fuse = hang(point)
        node.start(*RAW)
        assert until(lambda: disk(node)["state"] == "off")
        assert disk(node)["index_reason"] == f"{point}: {SILENT}"
        later = roots("memory", 10)
        put_roots(node.namespace(), later, durable=False)
        assert census(node.namespace(), later).hits == set(later)
        os.close(fuse)
        subprocess.run(["umount", "-l", str(point)], check=True)
        node.kill()
        assert census(start_and_read(node), sorted(keys)).hits == keys


def over_a_drive_that_falls_silent_later() -> None:
    """What lies in memory and on the other drive is served meanwhile."""
    with Node(disks=2, segment="8MiB") as node:
        node.start(*RAW)
        keys = set(stored(node))
        there = keys_on(node, 1) & keys
        point = node.disks[1]
        fuse = hang(point)
        ns = node.namespace()
        turns = count()

        def found_out() -> bool:
            began_s = time.monotonic()
            later = roots(f"turn {next(turns)}", 5)
            put_roots(ns, later, durable=False)
            assert census(ns, later).hits == set(later)
            assert time.monotonic() - began_s < 3, "nobody waits for it"
            return disk(node)["drives"][1]["state"] in {"failing", "gone"}

        assert until(found_out, PROBED_S)
        assert census(ns, sorted(keys - there)).hits == keys - there
        os.close(fuse)
        subprocess.run(["umount", "-l", str(point)], check=True)
        assert until(lambda: disk(node)["drives"][1]["state"] == "ok", PROBED_S)


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, and unshare, to mount anything"
)
@pytest.mark.parametrize(
    "lives", [over_a_silent_second_drive, over_a_silent_first_drive, over_a_drive_that_falls_silent_later]
)
def test_a_drive_that_says_nothing_for_real(
    lives: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LESS_PATIENCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        pytest.skip(f"nothing can be mounted here: {tried.stderr.strip()}")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip(f"no /dev/fuse here: {os.strerror(errno.EACCES)}")
    code = f"from tests.integration.test_drive_silent import {lives.__name__} as run; run()"
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
