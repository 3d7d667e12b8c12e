"""Fault 16: a client of another uid does what it can to every descriptor it was given, and to the daemon's files."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from bench.process import DaemonProcess
from tests.fault.test_memory import read, store
from tests.raw import key, raw_client, real_daemon

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")

ATTEMPTS = 500
ATTEMPTS_LONG = 10_000
SEED = 16
BLOCKS = 16
BECOME = "os.setgroups([]); os.setgid(4242); os.setuid(4242)"

# Says how many attempts there were, which kinds of them succeeded, and whether its own blocks are whole afterwards.
HOSTILE = """
import ctypes, errno, fcntl, json, mmap, os, random, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
from kvkernels import libc
from tests.fault.test_memory import arena_fd, read, store
from tests.raw import key, raw_client
{become}
signal.signal(signal.SIGBUS, lambda *_: os.write(1, b"SIGBUS"))
run, attempts = Path({run!r}), {attempts}
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
pidfd_getfd = lambda pidfd, number: ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, number, 0)
with raw_client(run) as client:
    namespace = client.open()
    keys = [key(1 << 90 | attempts << 32 | number) for number in range({blocks})]  # not those of another attack
    store(client, namespace, keys, b"h")
    leased = client.lease(namespace, keys, ttl_s=60)
    arena, ring, pidfd = arena_fd(client), client.fds[1], client.fds[0]
    chance = random.Random({seed})
    size = os.fstat(arena).st_size
    address = libc.map_shared(arena, 4096, writable=False)

    def writable_map():
        mmap.mmap(arena, size)
    def private_map_changes_nothing():
        with mmap.mmap(arena, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as own:
            own[chance.randrange(size)] = 1
        raise PermissionError  # allowed, and nobody else sees it
    def protect():
        if mprotect(address, 4096, 3): raise OSError(ctypes.get_errno(), "mprotect")
    def getfd():
        if pidfd_getfd(pidfd, chance.randrange(3)) < 0: raise OSError(ctypes.get_errno(), "pidfd_getfd")
    def reopen(flags):
        os.close(os.open(f"/proc/self/fd/{{arena}}", flags))
    victim = {daemon_pid}
    tries = {{
        "truncate arena": lambda: os.ftruncate(arena, chance.randrange(2 * size)),
        "truncate ring": lambda: os.ftruncate(ring, chance.randrange(1 << 24)),
        "write arena": lambda: os.pwrite(arena, b"x" * 100, chance.randrange(size)),
        "punch arena": lambda: libc.punch(arena, 4096),
        "grow arena": lambda: os.posix_fallocate(arena, size, 4096),
        "grow ring": lambda: os.posix_fallocate(ring, os.fstat(ring).st_size, 4096),
        "seal arena": lambda: fcntl.fcntl(arena, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        "seal ring": lambda: fcntl.fcntl(ring, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        "mode of arena": lambda: os.fchmod(arena, 0o777),
        "owner of arena": lambda: os.fchown(arena, 4242, 4242),
        "map arena": writable_map,
        "map privately": private_map_changes_nothing,
        "protect map": protect,
        "reopen rw": lambda: reopen(os.O_RDWR),
        "reopen w": lambda: reopen(os.O_WRONLY),
        "reopen truncating": lambda: reopen(os.O_RDWR | os.O_TRUNC),
        "kill by pidfd": lambda: signal.pidfd_send_signal(pidfd, signal.SIGKILL),
        "stop by pidfd": lambda: signal.pidfd_send_signal(pidfd, signal.SIGSTOP),
        "kill by pid": lambda: os.kill(victim, signal.SIGKILL),
        "getfd": getfd,
        "its memory": lambda: os.close(os.open(f"/proc/{{victim}}/mem", os.O_RDWR)),
        "its descriptors": lambda: os.listdir(f"/proc/{{victim}}/fd"),
        "control socket": lambda: __import__("socket").socket(1, 1).connect(str(run / "control.sock")),
        "remove socket": lambda: (run / "hot.sock").unlink(),
        "open lock": lambda: os.close(os.open(run / "lock", os.O_RDONLY)),
        "replace lock": lambda: (run / "lock").write_text("0"),
        "new file": lambda: (run / "planted").touch(),
    }}
    succeeded, names = set(), list(tries)
    for number in range(attempts):
        name = names[number] if number < len(names) else chance.choice(names)
        try:
            tries[name]()
            succeeded.add(name)
        except (OSError, ValueError):
            pass
    client.ping()
    whole = all(read(client, place) == b"h" * 4096 for place in leased.locations)
    open_fds = len(os.listdir("/proc/self/fd"))
print(json.dumps({{"attempts": attempts, "succeeded": sorted(succeeded), "whole": whole, "kinds": len(names)}}))
"""


def run_hostile(daemon: DaemonProcess, attempts: int, become: str, without: tuple[str, ...] = ()) -> str:
    """What it says in the end."""
    script = HOSTILE.format(
        path=sys.path, run=str(daemon.runtime_dir), attempts=attempts, blocks=BLOCKS, seed=SEED,
        daemon_pid=daemon.process.pid, become=become,
    )  # fmt: skip
    for name in without:
        assert f'        "{name}"' in script
        script = script.replace(f'        "{name}"', f'        # "{name}"')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "SIGBUS" not in done.stdout
    return done.stdout


def attack(daemon: DaemonProcess, attempts: int) -> None:
    with raw_client(daemon.runtime_dir) as bystander:
        namespace = bystander.open(model="bystander")
        keys = [key(1 << 91 | attempts << 32 | number) for number in range(BLOCKS)]  # not those of another attack
        store(bystander, namespace, keys, b"b")
        said = run_hostile(daemon, attempts, BECOME)
        assert f'"attempts": {attempts}, "succeeded": [], "whole": true' in said, said
        bystander.ping()
        leased = bystander.lease(namespace, keys)
        assert [read(bystander, place) for place in leased.locations] == [b"b" * 4096] * BLOCKS
        assert not (daemon.runtime_dir / "planted").exists()
    assert daemon.process.poll() is None


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """Instead of the folder's: its files are attacked."""
    with real_daemon("--ring", "1MiB") as process:
        yield process


def test_nothing_that_another_user_tries_succeeds_or_changes_a_byte(daemon: DaemonProcess) -> None:
    attack(daemon, ATTEMPTS)


@pytest.mark.long
def test_nothing_of_10_000_attempts_succeeds_or_changes_a_byte(daemon: DaemonProcess) -> None:
    attack(daemon, ATTEMPTS_LONG)


def test_the_daemons_own_user_gets_further_so_the_attempts_are_real_ones(daemon: DaemonProcess) -> None:
    said = run_hostile(daemon, 30, "", ("kill by pidfd", "stop by pidfd", "kill by pid", "remove socket"))
    for name in ("reopen rw", "control socket", "its descriptors", "getfd", "new file"):
        assert f'"{name}"' in said, said
