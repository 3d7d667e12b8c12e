"""The Containerfile is built, and the daemon's and an engine's side meet in namespaces of their own.

They share the folder of the sockets and nothing else: not /dev/shm, which has a container's usual 64 MiB, no System V
memory, no process ids. Needs root, buildah, and the image that the Containerfile begins with in local storage:
registries are nobody's to ask in a test. `TEST_CONTAINER_BUILD` has more options of `buildah build`.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.harness import ROOT
from tests.node import until

FILE = ROOT / "systemd/container/Containerfile"
BASE = "docker.io/library/python:3.12-slim"
DAEMON, CLIENT = "64100", "65533"  # uids of the images
START_S = 600.0  # the first start compiles

# Arguments: the root, the uid, how the folder of sockets is mounted, it, the folder of compiled code, the command.
INSIDE = """
root=$1 user=$2 how=$3 sockets=$4 code=$5; shift 5
mount --make-rprivate /
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev"
for device in null zero urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o size=64m tmpfs "$root/dev/shm"
mkdir -p "$root/run/kvstored" "$root/var/cache/kvstored"
mount --bind "$sockets" "$root/run/kvstored"
mount -o "remount,bind,$how" "$root/run/kvstored"
mount --bind "$code" "$root/var/cache/kvstored"
exec env -i PATH=/usr/local/bin:/usr/bin:/bin KVSTORED_RUNTIME_DIR=/run/kvstored CACHE_DIRECTORY=/var/cache/kvstored \
    KVSTORED_DRAM=512MiB "$(command -v chroot)" --userspec="$user:$user" "$root" "$@"
"""

# Arguments: what to begin the chain with, what to do, how many blocks are wanted.
ENGINE = """
import os, sys
import numpy as np
import kvclient

first, what, wanted = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
client = kvclient.connect("/run/kvstored")
assert client.wait_connected(30.0), client.status
ns = client.namespace(model="m", engine="e", layout="L", dtype="bfloat16", block_tokens=16, block_bytes=2 << 20)
keys = ns.keys(range(first, first + 1600))
blocks = [np.full(2 << 20, number, np.uint8) for number in range(len(keys))]
if what == "store":
    assert ns.store(keys, blocks, wait=True).accepted == len(keys)
targets = [bytearray(2 << 20) for _ in keys]
with ns.fetch(keys) as lease:
    assert lease.blocks == wanted, lease.blocks
    assert not wanted or lease.copy_to(targets)
    assert all(bytes(target) == block.tobytes() for target, block in zip(targets[:wanted], blocks))
    print(os.getpid(), os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize >> 20, flush=True)
    if what == "hold":
        sys.stdin.read()
"""


def buildah(*words: str | Path) -> str:
    """What it says; it must succeed."""
    done = subprocess.run(["buildah", *map(str, words)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout.strip()


@contextmanager
def image(target: str, source: Path) -> Iterator[Path]:
    """The root of a container made of one stage of the file."""
    options = shlex.split(os.environ.get("TEST_CONTAINER_BUILD", ""))
    name = f"kvstored-test-{target}"
    buildah("build", "--pull-never", *options, "-f", FILE, "--target", target, "-t", name, source)
    container = buildah("from", "--pull-never", name)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)
        buildah("rmi", name)


def kill(process: "subprocess.Popen[str]") -> None:
    """What runs in the namespaces: with another uid than `unshare` began with, `--kill-child` does not reach it."""
    inside = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in map(int, inside):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


class Host:
    """One folder of sockets, and what runs beside it in namespaces of its own."""

    def __init__(self, folder: Path) -> None:
        self.sockets, self.code = folder / "sockets", folder / "code"
        for made in (self.sockets, self.code):
            made.mkdir()
            os.chown(made, int(DAEMON), int(DAEMON))
        self.log = folder / "log"

    def words(self, root: Path, user: str, how: str, *command: str) -> list[str]:
        """A command in a container."""
        folders = (str(self.sockets), str(self.code))
        namespaces = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork")
        return [*namespaces, "sh", "-e", "-c", INSIDE, "sh", str(root), user, how, *folders, *command]

    @contextmanager
    def daemon(self, root: Path) -> Iterator[None]:
        """It serves."""
        with self.log.open("w") as log:
            process = subprocess.Popen(self.words(root, DAEMON, "rw", "kvstored"), stdout=log, stderr=log, text=True)
        try:
            latest = time.monotonic() + START_S
            while " serves " not in self.log.read_text():
                assert process.poll() is None, self.log.read_text()
                assert time.monotonic() < latest, self.log.read_text()
                time.sleep(0.2)
            yield
        finally:
            kill(process)

    def engine(self, root: Path, first: int, what: str, wanted: int) -> "subprocess.Popen[str]":
        """A process in an engine's container, whose sockets cannot be replaced from there."""
        command = self.words(root, CLIENT, "ro", "python", "-c", ENGINE, str(first), what, str(wanted))
        pipe = subprocess.PIPE
        return subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe)

    def clients(self, root: Path) -> str:
        """What `kvctl clients` says in the daemon's container."""
        command = self.words(root, DAEMON, "rw", "kvctl", "clients")
        told = subprocess.run(command, check=False, capture_output=True, text=True)
        assert told.returncode == 0, (told.stdout, told.stderr)
        return told.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What of the checkout an image may be made of."""
    if shutil.which("buildah") is None or os.geteuid():
        pytest.skip("buildah: not here, or not as root")
    if subprocess.run(["buildah", "inspect", "--type=image", BASE], check=False, capture_output=True).returncode:
        pytest.skip(f"{BASE}: not in local storage")
    source = tmp_path / "source"
    hidden = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "dist")
    shutil.copytree(ROOT, source, ignore=hidden)
    return source


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_images_meet_over_the_folder_of_sockets_alone(source: Path, tmp_path: Path) -> None:
    host = Host(tmp_path)
    with image("daemon", source) as theirs, image("client", source) as ours, host.daemon(theirs):
        for first, what, wanted in ((0, "store", 100), (0, "read", 100), (1, "read", 0)):  # the last is the control
            engine = host.engine(ours, first, what, wanted)
            out, errors = engine.communicate()
            assert (engine.returncode, out.split()) == (0, ["1", "64"]), errors
        held = host.engine(ours, 0, "hold", 100)
        assert held.stdout is not None
        assert held.stdout.readline(), "it holds no lease"
        assert "no client is connected" not in host.clients(theirs)
        kill(held)
        assert until(lambda: "no client is connected" in host.clients(theirs)), "the killed one is still a client"
