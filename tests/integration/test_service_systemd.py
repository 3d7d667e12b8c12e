"""The units under a real systemd: one that is process 1 of namespaces of its own, and knows no unit but these.

Its user is root without any capability, in a group of its own, since this checkout may lie where no other one can look;
all else holds that the units say. It needs root, control groups and Debian's package `systemd`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kvctl import service
from kvctl.service import Install
from tests.contract.test_processes import NEEDS_INODES
from tests.node import until

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = "sysinit basic sockets shutdown umount final slices local-fs multi-user paths timers"
WAIT_S = 60.0
pytestmark = pytest.mark.long

# Mounts, process ids and control groups of its own; nothing of the host's /etc, /run, /var or units is touched.
BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/host/units /run/host/none /run/host/etc
mount -t tmpfs tmpfs /run/host/etc
mkdir /run/host/etc/upper /run/host/etc/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/host/etc/upper,workdir=/run/host/etc/work /etc
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/cache
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
rm -rf /etc/systemd/system /etc/systemd/user /etc/init.d /etc/rc?.d
mkdir -p /etc/systemd/system
for unit in $UNITS; do cp /lib/systemd/system/$unit.target /run/host/units/; done
sed -i '/^Wants=/d;/^Requires=/d;/^After=/d' /run/host/units/sysinit.target /run/host/units/basic.target
mount --bind /run/host/units /usr/lib/systemd/system
mount --bind /run/host/none /usr/lib/systemd/system-generators
cp -r "$INSTALLED"/etc/. /etc/
systemd-sysusers kvstored.conf
systemd-tmpfiles --create kvstored.conf
export container=other
exec /lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=no
"""
DROP_IN = f"""
[Service]
User=root
Group=kvstored
ProtectHome=no
ReadWritePaths={ROOT}
StandardOutput=append:/run/said
StandardError=append:/run/said
"""
ENGINE = """
import sys
import numpy as np
import kvclient
client = kvclient.connect("/run/kvstored", timeout_s=30)
assert client.wait_connected(60), client.status
ns = client.namespace(model="m", engine="unit", layout="flat", dtype="uint8", block_bytes=1 << 16)
keys = ns.keys(list(range(16 * 40)))
blocks = [np.random.default_rng(number).integers(0, 256, 1 << 16, dtype=np.uint8) for number in range(40)]
if sys.argv[1] == "store":
    print(ns.store(keys, blocks, wait=True, space_s=30).accepted)
else:
    targets = np.zeros((40, 1 << 16), dtype=np.uint8)
    with ns.fetch(keys, wait_s=30) as lease:
        assert lease.copy_to(targets[: lease.expected])
        print(sum(np.array_equal(target, block) for target, block in zip(targets, blocks)))
"""
ANOTHER_UID = 4243
DIRECT = f"""
import os
import kvclient
os.setgroups([])
os.setgid({ANOTHER_UID})
os.setuid({ANOTHER_UID})
client = kvclient.connect("/run/kvstored", mode="direct", timeout_s=30)
assert client.wait_connected(60), client.status
print(client.status.mode, client.status.notes)
"""


class Machine:
    """A systemd of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def first(self) -> str:
        """Its process 1, as we see it."""
        pid = self._process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()

    def run(self, *command: str, check: bool = True) -> str:
        """In its namespaces; what it says."""
        line = ["nsenter", "-t", self.first, "-m", "-p", "-C", *command]
        done = subprocess.run(line, check=False, capture_output=True, text=True, cwd="/", timeout=100)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.said()}"
        return done.stdout.strip()

    def said(self) -> str:
        """By all daemons."""
        path = Path(f"/proc/{self.first}/root/run/said")
        return path.read_text()[-3000:] if path.exists() else ""

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "--value", "-p", name, "kvstored.service")

    def engine(self, verb: str) -> int:
        """How many blocks it stored, or found to be what they were."""
        return int(self.run(sys.executable, "-c", ENGINE, verb))


def why_not() -> str:
    """Why there can be no such thing here; empty if there can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("unshare", "nsenter", "systemctl", "systemd-sysusers") if shutil.which(name) is None]
    if missing or not SYSTEMD.exists():
        return f"not installed: {', '.join(missing) or SYSTEMD}"
    return "" if control_groups() is not None else "no control groups of version 2"


def control_groups() -> Path | None:
    """Where they are mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        kind, place = line.split()[2], Path(line.split()[1])
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return place
    return None


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """With the units installed, and nothing started."""
    if reason := why_not():
        pytest.skip(f"no systemd of our own: {reason}")
    groups = control_groups()
    assert groups is not None
    wish = Install(Path(sys.executable).parent / "kvstored", systemd=0)
    service.place(service.pieces(wish), tmp_path, dry_run=False)
    drop_in = tmp_path / "etc/systemd/system/kvstored.service.d/test.conf"
    drop_in.parent.mkdir()
    drop_in.write_text(DROP_IN)
    (tmp_path / "etc/kvstored/environment").write_text("KVSTORED_DRAM=64MiB\nKVSTORED_LOCK=false\n")
    group = groups / f"kvstored-test-{os.getpid()}"
    group.mkdir()
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc", "sh", "-c", BOOT]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group), *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            env=os.environ | {"UNITS": UNITS, "INSTALLED": str(tmp_path)},
        )  # fmt: skip
    try:
        made = Machine(process)
        up = until(lambda: process.poll() is not None or "running" in _state(made), WAIT_S)
        if not up or process.poll() is not None:
            pytest.skip(f"no systemd of our own: {(tmp_path / 'log').read_text().strip()[-300:]}")
        yield made
    finally:
        process.kill()
        process.wait()
        for folder in sorted([group, *(path for path in group.rglob("*") if path.is_dir())], reverse=True):
            assert until(partial(_removed, folder)), folder


def _state(machine: Machine) -> str:
    try:
        return machine.run("systemctl", "is-system-running", check=False)
    except (OSError, subprocess.SubprocessError):
        return ""


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # its last processes are on their way out
        return False
    return True


@pytest.mark.timeout(300)
def test_a_day_in_the_life_of_a_host_is_lived_under_it_too(machine: Machine) -> None:
    told = machine.run("sh", "-c", f"cd {ROOT} && exec {sys.executable} -m tests.e2e.day --fast")
    assert "Start: systemd starts it" in told
    assert told.endswith(" promises, 0 broken"), told
    assert machine.run("systemctl", "list-units", "--all", "--no-legend", "kvstored-day*") == "", "nothing is left"


def test_a_day_of_the_units(machine: Machine) -> None:
    machine.run("systemctl", "start", "kvstored.socket")
    assert machine.show("ActiveState") == "inactive"
    machine.run("systemctl", "start", "kvstored.service")
    assert machine.show("StatusText").startswith("serving: ")
    first = machine.show("MainPID")
    status = machine.run("cat", f"/proc/{first}/status")
    assert "Seccomp:\t2" in status
    assert "CapBnd:\t0000000000000000" in status
    assert machine.engine("store") == 40
    assert machine.engine("fetch") == 40
    machine.run("systemctl", "restart", "kvstored.service")
    assert machine.engine("fetch") == 40
    machine.run("sh", "-c", f"kill -9 {machine.show('MainPID')}")
    assert machine.engine("fetch") == 40, "the next one was started, and had it all"
    assert machine.show("NRestarts") == "1"
    assert machine.show("MainPID") not in {"0", first}
    machine.run("systemctl", "stop", "kvstored.socket")
    assert machine.show("ActiveState") == "inactive", "nobody starts it again"
    machine.run("systemctl", "start", "kvstored.socket")
    assert machine.engine("fetch") == 0, "the control: an engine that came started it, and memory was given up"
    assert machine.show("ActiveState") == "active"
    machine.run("sh", "-c", "echo KVSTORED_DRAM=much > /etc/kvstored/environment")
    machine.run("systemctl", "restart", "kvstored.service", check=False)
    assert machine.show("ExecMainStatus") == "78"
    assert machine.show("NRestarts") == "0"
    assert "KVSTORED_DRAM: 'much'" in machine.said()


@NEEDS_INODES
def test_an_engine_of_another_user_writes_in_place_though_the_unit_hides_it(machine: Machine) -> None:
    settings = f"[tenants.trusted]\\nuids = [{ANOTHER_UID}]\\ntrusting = true\\n"
    machine.run("sh", "-c", f"printf '{settings}' > /etc/kvstored/kvstored.toml")
    machine.run("systemctl", "start", "kvstored.service")
    hidden = machine.run("cat", f"/proc/{machine.show('MainPID')}/mountinfo")
    assert any(" /proc " in line and "hidepid=invisible" in line for line in hidden.splitlines()), hidden
    assert machine.run(sys.executable, "-c", DIRECT) == "direct"
