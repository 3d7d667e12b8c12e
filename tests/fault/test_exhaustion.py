"""Clients that take and do not give back: descriptors, sessions, rings, arenas. The others are served all the same."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import kvclient
from bench.process import DaemonProcess
from kvproto import frames
from kvproto.errors import Code, Grant
from kvproto.frames import Hello, Verb
from kvproto.limits import LINGERING_PER_UID, STALE_PER_TENANT
from tests.fault.test_memory import store
from tests.raw import PATIENCE_S, RawClient, dial, key, raw_client, real_daemon

BLOCK_BYTES = 600_000  # one to an arena of 1 MiB


def descriptors(daemon: DaemonProcess) -> int:
    """How many the daemon has open."""
    return sum(1 for _ in Path(f"/proc/{daemon.process.pid}/fd").iterdir())


def settled(daemon: DaemonProcess, most: int) -> None:
    """Wait until the daemon has let go of what closed connections had."""
    with raw_client(daemon.runtime_dir) as client:
        while descriptors(daemon) > most:
            client.ping()


def test_who_says_hello_and_hangs_up_at_once_leaves_no_descriptor_behind() -> None:
    with real_daemon("--ring", "1MiB") as daemon:
        before = descriptors(daemon)
        for _ in range(200):
            client = dial(daemon.runtime_dir)
            client.send(frames.build_hello(1, Hello(name="x")))
            client.close()
        settled(daemon, before + 40)  # arenas are still being made meanwhile


def test_who_leases_and_hangs_up_at_once_leaves_no_descriptor_behind() -> None:
    with real_daemon("--ring", "1MiB") as daemon, raw_client(daemon.runtime_dir) as owner:
        store(owner, owner.open(), [key(1)], b"a")
        before = descriptors(daemon)
        script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from kvproto import frames
from tests.raw import dial, key
for _ in range(100):
    client = dial(Path({str(daemon.runtime_dir)!r}))
    client.hello()
    namespace = client.open()
    client.send(frames.build_lease(9, namespace, key(1), 10**9, 0))
    client.close()
"""
        subprocess.run([sys.executable, "-c", script], check=True)  # its process ends: leases and maps with it
        settled(daemon, before + 40)  # arenas are still being made meanwhile


def test_a_process_may_connect_fetch_and_close_for_ever() -> None:
    with real_daemon("--ring", "1MiB") as daemon:
        for _ in range(LINGERING_PER_UID + 20):
            with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
                namespace = client.namespace(
                    model="m", engine="e", layout="l", dtype="d", block_tokens=4, block_bytes=4096
                )
                namespace.store([key(1)], [bytes(4096)], wait=True)
                with namespace.fetch([key(1)]) as lease:
                    assert lease.copy_to([bytearray(4096)])


def test_closed_sessions_that_keep_maps_are_limited_by_user_and_give_way_when_their_process_ends() -> None:
    with real_daemon("--ring", "1MiB") as daemon, raw_client(daemon.runtime_dir) as bystander:
        store(bystander, bystander.open(), [key(1)], b"a")
        script = f"""
import signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from kvproto.frames import Verb
from tests.raw import dial, key
while True:
    client = dial(Path({str(daemon.runtime_dir)!r}))
    try:
        client.hello()
    except (AssertionError, OSError):
        break
    client.lease(client.open(), [key(1)], ttl_s=60)
    client.close()
print("refused", flush=True)
signal.pause()
"""
        hoarder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert hoarder.stdout is not None
        assert hoarder.stdout.readline() == "refused\n"
        bystander.ping()
        late = dial(daemon.runtime_dir)
        assert late.goodbye()[0] is Code.REFUSED
        late.close()
        hoarder.send_signal(signal.SIGKILL)
        hoarder.wait()
        hoarder.stdout.close()
        while not _welcome(daemon):
            bystander.ping()


def _welcome(daemon: DaemonProcess) -> bool:
    client = dial(daemon.runtime_dir)
    try:
        client.hello()
    except (AssertionError, OSError):
        return False
    finally:
        client.close()
    return True


def test_out_of_descriptors_it_serves_who_is_there_and_welcomes_others_when_it_can() -> None:
    with real_daemon("--ring", "1MiB") as daemon, raw_client(daemon.runtime_dir) as early:
        pid, limits = daemon.process.pid, resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, limits[1]))  # fewer than it has: every new one fails
        late = dial(daemon.runtime_dir)
        for _ in range(50):
            early.ping()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        late.hello()  # within the second that it takes to look again
        late.close()


def test_a_ring_that_a_client_keeps_is_empty_once_its_session_is_over() -> None:
    with real_daemon("--ring", "4MiB") as daemon, raw_client(daemon.runtime_dir) as bystander:
        client = dial(daemon.runtime_dir)
        client.hello()
        store(client, client.open(), [key(1)], b"a")
        ring = os.dup(client.fds[1])
        assert os.fstat(ring).st_blocks > 0
        client.close()
        while os.fstat(ring).st_blocks:
            bystander.ping()
        os.close(ring)


def test_a_client_that_never_drops_given_up_arenas_gets_no_new_ones_in_the_end() -> None:
    """Two arenas of one block each. Whenever it has both, the poorer tenant takes one, and gives it back again."""
    small = ("--ring", "4MiB", "--dram", "2MiB", "--arena", "1MiB")
    with (
        real_daemon(*small, tenants=("hoarder", "poor")) as daemon,
        raw_client(daemon.runtime_dir, tenant="hoarder") as hoarder,
        kvclient.connect(daemon.runtime_dir, tenant="poor", timeout_s=PATIENCE_S) as client,
    ):
        poor = client.namespace(model="m", engine="e", layout="l", dtype="d", block_tokens=4, block_bytes=BLOCK_BYTES)
        before, lease = descriptors(daemon), 0
        for turn in range(2 * STALE_PER_TENANT):
            stored = poor.store([key(turn)], [bytes(BLOCK_BYTES)], wait=True, space_s=PATIENCE_S)
            assert stored.accepted == 1, f"turn {turn}: {stored}"
            assert poor.delete([key(turn)]) == 1
            lease = _store_and_map(hoarder, turn, lease)
        assert STALE_PER_TENANT <= len(hoarder.fds) - 2 <= STALE_PER_TENANT + 1  # but for its ring
        assert descriptors(daemon) < before + STALE_PER_TENANT + 16
        hoarder.ping()


def _store_and_map(client: RawClient, turn: int, lease: int) -> int:
    """Store a block and lease it, so that its arena is mapped, which is never dropped. `lease` is that of the block
    before, which is not to be evicted meanwhile. Returns the lease that goes on.
    """
    namespace = client.open(block_bytes=BLOCK_BYTES)
    grant = Grant.BUSY
    while grant is Grant.BUSY:  # an arena is on its way
        (item,) = client.reserve(namespace, [key(turn)])
        grant = Grant(item.grant)
    if grant is Grant.FULL:
        return lease
    client.commit([item.ticket])
    leased = client.lease(namespace, [key(turn)], ttl_s=60, wait_s=15)
    client.send(frames.build(Verb.RELEASE, 0, releases=[lease] if lease else []))
    return leased.lease


def test_lease_numbers_tell_nothing_of_what_others_lease() -> None:
    with (
        real_daemon("--ring", "1MiB") as daemon,
        raw_client(daemon.runtime_dir) as watcher,
        raw_client(daemon.runtime_dir) as other,
    ):
        mine, theirs = watcher.open(), other.open()
        store(watcher, mine, [key(1)], b"a")
        first = watcher.lease(mine, [key(1)]).lease
        for _ in range(5):
            assert other.lease(theirs, [key(1)]).lease
        assert watcher.lease(mine, [key(1)]).lease == first + 1


def test_a_lock_that_is_a_link_or_a_fifo_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("link", "fifo"):
        runtime_dir = tmp_path / name
        runtime_dir.mkdir()
        if name == "link":
            (runtime_dir / "lock").symlink_to(victim)
        else:
            os.mkfifo(runtime_dir / "lock")
        command = [sys.executable, "-m", "kvstored", "--runtime-dir", str(runtime_dir), "--dram", "64MiB"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 78, done.stderr
        assert "name another one with --runtime-dir" in done.stderr
    assert victim.read_text() == "precious"
