"""Many threads on one client; a client that is closed, dropped or forked."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import kvclient
from kvproto.errors import ClosedError, ForkError
from kvproto.frames import Verb
from kvproto.limits import MIB
from tests.peer import PATIENCE_S, Peer
from tests.unit.client_kit import BLOCK_BYTES, Stopwatch, blocks_of, client_of, keys_of, namespace_of, pair

KEYS, BLOCKS = keys_of(3), blocks_of(3)


def test_threads_get_their_own_answers(tmp_path: Path) -> None:
    def work(number: int) -> None:
        keys, blocks = keys_of(5, seed=number), blocks_of(5, seed=number)
        target = np.zeros_like(blocks)
        for turn in range(20):
            result = ns.store(keys, blocks, wait=turn % 2 == 0)
            assert result.lead == 5
            assert ns.match(keys).blocks == 5
            with ns.fetch(keys) as lease:
                assert lease.copy_to(target)
                assert (target == blocks).all()
                assert (target != 0).any()
            target[:] = 0
            assert client.ping() is not None
            assert ns.delete(keys[3:]) == 2

    with Peer(tmp_path, arena_bytes=64 * MIB) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, number) for number in range(8)]:
                done.result(timeout=60)
        assert peer.hellos == 1
        peer.wait_for(lambda: len(peer.released) == len(peer.leases))


def test_who_waits_hands_the_reading_on_to_who_still_waits(tmp_path: Path) -> None:
    """The leader's answer comes first; its followers must not be left asleep."""
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.match(KEYS)
        answered: list[int] = []

        def match(number: int) -> None:
            answered.append(ns.match(KEYS).blocks)

        for _ in range(10):
            answered.clear()
            peer.mute(Verb.MATCH)
            seen = peer.seen.count(Verb.MATCH)
            threads = [threading.Thread(target=match, args=(number,)) for number in range(6)]
            for count, thread in enumerate(threads, start=seen + 1):
                thread.start()
                peer.wait_for(lambda count=count: peer.seen.count(Verb.MATCH) == count)  # type: ignore[misc]
            with Stopwatch(0.75 * PATIENCE_S):
                peer.answer_held()
                for thread in threads:
                    thread.join(PATIENCE_S)
            assert len(answered) == 6


def test_closing_wakes_who_waits(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        peer.mute(Verb.LEASE, Verb.MATCH)
        got: list[int] = []
        threads = [
            threading.Thread(target=lambda: got.append(ns.fetch(KEYS, wait_s=PATIENCE_S).blocks)),
            threading.Thread(target=lambda: got.append(ns.match(KEYS).blocks)),
        ]
        for thread in threads:
            thread.start()
        peer.wait_for(lambda: {Verb.LEASE, Verb.MATCH} <= set(peer.seen))
        with Stopwatch(0.75 * PATIENCE_S):
            client.close()
            for thread in threads:
                thread.join(PATIENCE_S)
        assert got == [0, 0]


def test_a_closed_client_says_so_and_its_arrays_live_on(tmp_path: Path) -> None:
    with pair(tmp_path) as (peer, ns):
        ns.store(KEYS, BLOCKS, wait=True)
        lease = ns.fetch(KEYS)
        array = np.frombuffer(lease.views[0], np.uint8)
        targets = np.zeros_like(BLOCKS)
        ns._connection.close()
        ns._connection.close()
        assert lease.copy_to(targets)
        assert (targets == BLOCKS).all()
        lease.release()
        assert (array == BLOCKS[0]).all()
        calls: list[Callable[[], object]] = [
            lambda: ns.fetch(KEYS), lambda: ns.match(KEYS), lambda: ns.delete(KEYS), lambda: ns.flush(1),
            lambda: ns.store(KEYS, BLOCKS), lambda: ns._connection.wait_connected(0),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ClosedError):
                call()
        assert ns._connection.status().why_not == "closed"
        peer.wait_for(lambda: peer._sock is None)


def test_leases_released_before_closing_are_given_back(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        with client_of(peer) as client:
            ns = namespace_of(client)
            ns.store(KEYS, BLOCKS, wait=True)
            with ns.fetch(KEYS) as lease:
                assert lease.blocks == 3
        peer.wait_for(lambda: peer.released == list(peer.leases))


def test_a_client_that_is_dropped_without_closing_leaves_no_thread_and_no_socket(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        client = kvclient.connect(tmp_path, timeout_s=PATIENCE_S)
        thread = client._connection._thread
        connection = weakref.ref(client._connection)
        assert thread is not None
        assert client.ping() is not None
        del client
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        gc.collect()
        assert connection() is None
        peer.wait_for(lambda: peer._sock is None)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_must_connect_anew_and_harms_nothing(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer, client_of(peer) as client:
        ns = namespace_of(client)
        ns.store(KEYS, BLOCKS, wait=True)
        with ns.fetch(KEYS) as lease:
            inode = Path(f"/proc/self/fd/{descriptor_of(client)}").readlink()
            child = os.fork()
            if child == 0:
                os._exit(in_the_child(client, ns, lease, inode))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            targets = np.zeros_like(BLOCKS)
            assert lease.copy_to(targets)
            assert (targets == BLOCKS).all()
        assert client.ping() is not None
        assert ns.store(KEYS, BLOCKS).known == 3
        assert peer.hellos == 1


def descriptor_of(client: kvclient.Client) -> int:
    link = client._connection._link
    assert link is not None
    return link.sock.fileno()


def in_the_child(client: kvclient.Client, ns: kvclient.Namespace, lease: kvclient.Lease, inode: Path) -> int:
    """Number of the first thing that is not as it should be; 0 for none."""
    calls: list[Callable[[], object]] = [
        client.ping,
        lambda: client.connected,
        lambda: client.wait_connected(0),
        lambda: ns.fetch(KEYS),
        lambda: ns.match(KEYS),
        lambda: ns.store(KEYS, BLOCKS),
        lambda: ns.flush(0),
        lambda: ns.delete(KEYS),
        lease.valid,
        lambda: lease.views,
        lambda: lease.copy_to(np.zeros_like(BLOCKS)),
        lambda: lease.renew(1),
    ]
    for number, call in enumerate(calls, start=1):
        try:
            call()
        except ForkError:
            continue
        return number
    lease.release()
    client.close()
    open_now = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return 50 if inode in open_now else 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_that_connects_anew_is_served(tmp_path: Path) -> None:
    with Peer(tmp_path) as peer:
        with client_of(peer) as client:
            assert client.ping() is not None
            ready, go = os.pipe()
            child = os.fork()
            if child == 0:
                os.read(ready, 1)
                fresh = kvclient.connect(tmp_path, timeout_s=PATIENCE_S)
                os._exit(0 if fresh.ping() is not None else 1)
        os.write(go, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.close(ready)
        os.close(go)


def test_importing_the_client_loads_nothing_heavy() -> None:
    code = "import sys, kvclient; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "kvclient" in loaded
    assert "numpy" in loaded
    for heavy in ("torch", "numba", "grpc", "google", "lmdb", "cupy", "transformers", "asyncio", "kvstore", "kvstored"):
        assert heavy not in loaded


def test_the_runtime_directory_is_the_first_that_applies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvclient import paths

    system, home = tmp_path / "system", tmp_path / "home"
    system.mkdir()
    monkeypatch.setattr(paths, "SYSTEM_DIR", system)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("KVSTORED_RUNTIME_DIR", raising=False)
    assert paths.runtime_dir(None) == home / ".local" / "state" / "kvstored" / "run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    assert paths.runtime_dir(None) == tmp_path / "xdg" / "kvstored"
    (system / "hot.sock").touch()
    assert paths.runtime_dir(None) == system
    monkeypatch.setenv("KVSTORED_RUNTIME_DIR", str(tmp_path / "env"))
    assert paths.runtime_dir(None) == tmp_path / "env"
    assert paths.runtime_dir(tmp_path / "given") == tmp_path / "given"


def test_a_runtime_directory_may_have_a_long_name(tmp_path: Path) -> None:
    short = tmp_path / "s"
    short.mkdir()
    long = tmp_path / ("long" * 40)
    long.symlink_to(short)
    with Peer(short), kvclient.connect(long, timeout_s=PATIENCE_S) as client:
        assert client.ping() is not None
        assert client.namespace(model="m", engine="e", layout="l", dtype="d", block_bytes=BLOCK_BYTES).keys(range(32))
