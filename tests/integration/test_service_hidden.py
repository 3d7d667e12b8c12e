"""Mode direct where /proc shows the daemon no process of another user: under ProtectProc=invisible, as the unit has it.

The daemon is root without any capability or group, since this checkout may lie where no other user can look: to the
kernel that is a user who may not see others' processes. It needs root, and Linux 6.9.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kvclient
from bench.process import DaemonProcess
from tests.contract.test_processes import NEEDS_INODES
from tests.node import PATIENCE_S, Node, chain, until, values

ROOT = Path(__file__).parents[2]
UID = 4243
BLOCKS = 8
BLOCK_BYTES = 64 << 10
ROOM = (64 << 20) // BLOCK_BYTES  # that DRAM has
GID = 4244  # of the daemon: to the group of root nothing is hidden
HIDING = f"""
mount -t proc -o "hidepid=$0" proc /proc
exec setpriv --regid={GID} --clear-groups --bounding-set=-all --inh-caps=-all "$@"
"""
# A daemon as it was before: whom /proc does not show it cannot tell from others.
WITHOUT_INODES = """
import sys
import kvstored.processes
del sys.argv[1:4]  # how it would have been run
kvstored.processes._inode_of = lambda pidfd: None
from kvstored.cli import main
sys.exit(main())
"""
# Says its mode and why no other one, stores, and hangs up with slots that it may still write to; ends with its input.
ENGINE = f"""
import os, sys
from pathlib import Path
import numpy as np
import kvclient
from kvproto.frames import Mode
from tests.raw import dial
os.setgroups([])
os.setgid({UID})
os.setuid({UID})
with kvclient.connect(sys.argv[1], mode="direct", timeout_s=30) as client:
    assert client.wait_connected(30), client.status
    print(client.status.mode, client.status.notes, sep="|", flush=True)
    if client.status.mode != "direct":
        sys.exit()
    ns = client.namespace(model="m", engine="hidden", layout="flat", dtype="uint8", block_bytes={BLOCK_BYTES})
    keys = ns.keys(list(range(16 * {BLOCKS})))
    blocks = [np.full({BLOCK_BYTES}, number + 1, dtype=np.uint8) for number in range({BLOCKS})]
    assert ns.store(keys, blocks, wait=True).accepted == {BLOCKS}
    with ns.fetch(keys) as lease:
        targets = np.zeros(({BLOCKS}, {BLOCK_BYTES}), dtype=np.uint8)
        assert lease.copy_to(targets)
    assert np.array_equal(targets, blocks)
    assert not np.array_equal(targets, blocks[::-1]), "the control"
    ns.delete(keys[:1])
raw = dial(Path(sys.argv[1]))
raw.hello(modes=(Mode.DIRECT,))
raw.reserve(raw.open({BLOCK_BYTES}), [os.urandom(32) for _ in range({BLOCKS})])
assert raw.writable()
raw.close()
print("holds", flush=True)
sys.stdin.read()
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user"),
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("unshare", "setpriv")), reason="unshare, setpriv: not installed"
    ),
]


@pytest.fixture
def node() -> Iterator[Node]:
    """One whose only tenant is the engine's, and trusting."""
    with Node(disks=0) as host:
        host.home.chmod(0o711)
        file = host.home / "kvstored.toml"
        file.write_text(f"[tenants.trusted]\nuids = [{UID}]\ntrusting = true\n")
        host.arguments += ["--config", str(file), "--keep", "true", "--ticket-ttl", "100ms"]
        yield host


def start(node: Node, hidepid: str, *instead: str) -> None:
    """A daemon whose /proc is mounted with that; `instead`: what to run in its place."""
    through = ["unshare", "--mount", "sh", "-c", HIDING, hidepid, *instead]
    node.daemon = DaemonProcess(node.run, *node.arguments, log_file=node.log_file, through=through)


@contextmanager
def engine(node: Node) -> Iterator[tuple[list[str], "subprocess.Popen[str]"]]:
    """Its mode and why, and its process, until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(node.run)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip().split("|"), process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def room(node: Node) -> int:
    """How many blocks its tenant can store: all slots that are not out of use."""
    with kvclient.connect(node.run, tenant="trusted", mode="copy", timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(PATIENCE_S), client.status
        ns = client.namespace(model="m", engine="room", layout="flat", dtype="uint8", block_bytes=BLOCK_BYTES)
        keys = chain(os.urandom(8), ROOM + 1)
        accepted = ns.store(keys, values(keys, BLOCK_BYTES), wait=True, space_s=5.0).accepted
        ns.delete(keys[:1])
        return accepted


@NEEDS_INODES
def test_an_engine_of_another_user_writes_in_place_though_proc_hides_it(node: Node) -> None:
    start(node, "invisible")
    with engine(node) as (said, process):
        assert said == ["direct", ""]
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        assert until(lambda: room(node) == ROOM - BLOCKS), "what it may still write to is nobody else's"
        node.kill()
        start(node, "invisible")
        assert until(lambda: room(node) == ROOM - BLOCKS), "nor in the next life, which has the others back"
    assert until(lambda: room(node) == ROOM), "until it is gone"


def test_the_control_without_inodes_it_is_served_by_copies_and_told_why_unless_proc_shows_it(node: Node) -> None:
    instead = (sys.executable, "-c", WITHOUT_INODES)
    start(node, "invisible", *instead)
    with engine(node) as (said, _):
        assert said[0] == "copy"
        assert "/proc hides it" in said[1]
    node.kill()
    start(node, "off", *instead)  # as the drop-in direct.conf has it
    with engine(node) as (said, _):
        assert said == ["direct", ""]
