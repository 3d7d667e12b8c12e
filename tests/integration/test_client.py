"""kvclient against a real daemon: what is stored comes back, and nothing else ever does."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import Client, Namespace, Reason
from kvproto.errors import ForkError, RefusedError, UsageError
from kvproto.limits import NAMESPACES_PER_SESSION
from tests.integration.conftest import StartDaemon
from tests.node import PATIENCE_S

BLOCK = 16 << 10
Blocks = list[np.ndarray[tuple[int], np.dtype[np.uint8]]]


def namespace_of(client: Client, model: str = "m", block_bytes: int = BLOCK) -> Namespace:
    """A namespace of this test."""
    return client.namespace(
        model=model, engine="test", layout="flat", dtype="uint8", block_tokens=4, block_bytes=block_bytes
    )


def random_blocks(count: int, seed: int) -> Blocks:
    """Distinct blocks."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, BLOCK, dtype=np.uint8) for _ in range(count)]


def keys_of(namespace: Namespace, count: int) -> list[bytes]:
    """A chain of keys that no other test has."""
    return list(namespace.keys(list(range(4 * count)), extra=os.urandom(8)))


def test_what_one_client_stores_another_fetches_byte_for_byte(daemon: DaemonProcess) -> None:
    with (
        kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as writer,
        kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as reader,
    ):
        source, sink = namespace_of(writer), namespace_of(reader)
        keys, blocks = keys_of(source, 30), random_blocks(30, 1)
        assert source.store(keys, blocks, wait=True).accepted == 30
        with sink.fetch(keys) as lease:
            assert lease.blocks == 30
            assert all(bytes(view) == block.tobytes() for view, block in zip(lease.views, blocks, strict=True))
            assert bytes(lease.views[0]) != blocks[1].tobytes()  # the comparison can tell
            targets = [np.zeros(BLOCK, dtype=np.uint8) for _ in keys]
            assert lease.copy_to(targets)
            assert lease.valid()
        assert all(np.array_equal(target, block) for target, block in zip(targets, blocks, strict=True))


def test_a_store_without_wait_can_be_fetched_at_once_in_the_same_session(client: Client) -> None:
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 100), random_blocks(100, 2)
    assert namespace.store(keys, blocks).accepted == 100
    with namespace.fetch(keys, wait_s=PATIENCE_S) as lease:
        assert lease.blocks == 100
        assert bytes(lease.views[99]) == blocks[99].tobytes()


def test_storing_again_moves_no_bytes_and_says_known(client: Client) -> None:
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 8), random_blocks(8, 3)
    assert namespace.store(keys, blocks, wait=True).accepted == 8
    assert namespace.store(keys, random_blocks(8, 4), wait=True).known == 8
    with namespace.fetch(keys) as lease:
        assert bytes(lease.views[7]) == blocks[7].tobytes()  # the first value wins


def test_match_counts_the_lead_run_and_takes_nothing(client: Client) -> None:
    namespace = namespace_of(client)
    keys = keys_of(namespace, 10)
    namespace.store(keys[:6], random_blocks(6, 5), wait=True)
    assert namespace.match(keys).blocks == 6
    assert namespace.match(keys[6:]).blocks == 0
    assert namespace.match(keys).load_seconds is None


def test_a_store_needs_its_parent(client: Client) -> None:
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 4), random_blocks(4, 6)
    assert namespace.store(keys[2:], blocks[2:], parent=keys[1]).reasons == {Reason.NO_PARENT: 2}
    assert namespace.store(keys[:2], blocks[:2], wait=True).accepted == 2
    assert namespace.store(keys[2:], blocks[2:], parent=keys[1], wait=True).accepted == 2
    assert namespace.match(keys).blocks == 4


def test_every_field_of_the_identity_separates(client: Client) -> None:
    base = {"model": "a", "engine": "e", "layout": "l", "dtype": "d", "block_tokens": 4, "block_bytes": BLOCK}
    other = {
        "model": "b", "engine": "f", "layout": "n", "dtype": "h", "block_tokens": 8, "revision": "r", "adapter": "x",
        "tp": (1, 2), "pp": (1, 2),
    }  # fmt: skip
    keys = [os.urandom(32)]
    client.namespace(**base).store(keys, random_blocks(1, 7), wait=True)  # type: ignore[arg-type]
    assert client.namespace(**base).match(keys).blocks == 1  # type: ignore[arg-type]
    for field, value in other.items():
        assert client.namespace(**{**base, field: value}).match(keys).blocks == 0, field  # type: ignore[arg-type]


def test_a_salt_separates(client: Client) -> None:
    namespace = namespace_of(client)
    tokens = list(range(16))
    assert set(namespace.keys(tokens, extra=b"one")).isdisjoint(namespace.keys(tokens, extra=b"two"))
    assert namespace.keys(tokens, extra=b"one") == namespace.keys(tokens, extra=b"one")


def test_delete_forgets_what_continues_and_open_leases_stay_good(client: Client) -> None:
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 6), random_blocks(6, 8)
    namespace.store(keys, blocks, wait=True)
    with namespace.fetch(keys) as lease:
        assert namespace.delete(keys[2:3]) == 4
        assert namespace.match(keys).blocks == 2
        assert bytes(lease.views[5]) == blocks[5].tobytes()
        assert lease.valid()


def test_a_chain_longer_than_a_frame_goes_both_ways(client: Client) -> None:
    namespace = namespace_of(client, block_bytes=256)
    keys = keys_of(namespace, 3000)
    whole = np.random.default_rng(9).integers(0, 256, (3000, 256), dtype=np.uint8)
    assert namespace.store(keys, whole, wait=True, space_s=10).accepted == 3000
    back = np.zeros_like(whole)
    with namespace.fetch(keys) as lease:
        assert lease.blocks == 3000
        assert lease.copy_to(back)
    assert np.array_equal(back, whole)
    assert namespace.match(keys).blocks == 3000


@pytest.mark.parametrize(
    "buffers",
    [
        [np.zeros(BLOCK - 1, dtype=np.uint8)],
        [np.zeros(2 * BLOCK, dtype=np.uint8)[::2]],
        [b""],
        [],
        ["text"],
    ],
)
def test_buffers_that_do_not_fit_are_refused_before_anything_moves(client: Client, buffers: list[object]) -> None:
    namespace = namespace_of(client)
    with pytest.raises(UsageError):
        namespace.store(keys_of(namespace, 1), buffers)
    assert client.ping() is not None


@pytest.mark.parametrize("target", [bytes(BLOCK), np.zeros(BLOCK - 1, dtype=np.uint8), np.zeros((BLOCK, 2))[:, 0]])
def test_targets_that_do_not_fit_are_refused_before_anything_moves(client: Client, target: object) -> None:
    namespace = namespace_of(client)
    keys = keys_of(namespace, 1)
    namespace.store(keys, random_blocks(1, 10), wait=True)
    with namespace.fetch(keys) as lease, pytest.raises(UsageError):
        lease.copy_to([target])


@pytest.mark.parametrize("keys", [[b"short"], [bytes(33)], ["x" * 32], [b""]])
def test_keys_that_are_no_keys_are_refused(client: Client, keys: list[bytes]) -> None:
    namespace = namespace_of(client)
    for verb in (namespace.match, namespace.fetch, namespace.delete):
        with pytest.raises(UsageError):
            verb(keys)


def test_a_block_beyond_the_arena_is_a_usage_error(client: Client) -> None:
    with pytest.raises(UsageError, match="arena"):
        namespace_of(client, block_bytes=1 << 30).open()


def test_many_threads_share_one_client(client: Client) -> None:
    namespace = namespace_of(client)
    wrong: list[str] = []

    def work(number: int) -> None:
        for turn in range(8):
            keys, blocks = keys_of(namespace, 12), random_blocks(12, 100 * number + turn)
            namespace.store(keys, blocks, space_s=10)
            with namespace.fetch(keys, wait_s=10) as lease:
                if [bytes(view) for view in lease.views] != [block.tobytes() for block in blocks]:
                    wrong.append(f"thread {number}, turn {turn}: {lease.blocks} blocks")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_asyncio_flavour_speaks_to_the_same_daemon(daemon: DaemonProcess, client: Client) -> None:
    from kvclient import aio

    blocks = random_blocks(5, 11)
    target = [np.zeros(BLOCK, dtype=np.uint8) for _ in blocks]

    async def there_and_back() -> list[bytes]:
        async with await aio.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as connected:
            namespace = await connected.namespace(
                model="m", engine="test", layout="flat", dtype="uint8", block_tokens=4, block_bytes=BLOCK
            )
            keys: list[bytes] = [*namespace.keys(list(range(20)), extra=os.urandom(8))]
            assert (await namespace.store(keys, blocks, wait=True)).accepted == 5
            async with namespace.fetch(keys) as lease:
                assert await lease.copy_to(target)
            return keys

    keys = asyncio.run(there_and_back())
    assert all(np.array_equal(one, other) for one, other in zip(target, blocks, strict=True))
    assert namespace_of(client).match(keys).blocks == 5


def test_a_client_in_a_forked_child_says_so(client: Client) -> None:
    namespace = namespace_of(client)
    keys = keys_of(namespace, 1)
    child = os.fork()
    if child == 0:
        try:
            namespace.match(keys)
        except ForkError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.ping() is not None


def test_a_client_stopped_past_its_lease_finds_a_miss(daemon: DaemonProcess) -> None:
    """The child takes a lease of 300 ms, is stopped until the lease is over and its slots hold other bytes."""
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
import kvclient, numpy as np
client = kvclient.connect({str(daemon.runtime_dir)!r}, timeout_s=30.0)
namespace = client.namespace(model="stop", engine="t", layout="l", dtype="d", block_tokens=4, block_bytes={BLOCK})
keys = [bytes([7]) * 32]
namespace.store(keys, [np.full({BLOCK}, 7, dtype=np.uint8)], wait=True)
target = np.zeros({BLOCK}, dtype=np.uint8)
lease = namespace.fetch(keys, ttl_s=0.3)
while not lease.valid():  # this process stood still of itself
    lease.release()
    lease = namespace.fetch(keys, ttl_s=0.3)
with lease:
    assert lease.blocks == 1
    print("leased", flush=True)
    sys.stdin.readline()
    print(lease.valid(), lease.copy_to([target]), flush=True)
with namespace.fetch(keys) as lease:
    print(lease.copy_to([target]) and int(target[0]))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "leased\n"
    child.send_signal(signal.SIGSTOP)
    _wait_until_no_leases(daemon)
    child.send_signal(signal.SIGCONT)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "False False\n"
    assert child.stdout.readline() == "7\n"  # a new lease is good again
    assert child.wait() == 0
    child.stdin.close()
    child.stdout.close()


def _wait_until_no_leases(daemon: DaemonProcess) -> None:
    while _kvctl_json(daemon.runtime_dir, "clients").count('"leases": 1'):
        pass


def _kvctl_json(runtime_dir: Path, *command: str) -> str:
    arguments = [sys.executable, "-m", "kvctl", "--runtime-dir", str(runtime_dir), "-o", "json", *command]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout


def test_a_daemon_killed_under_load_is_a_miss_and_its_successor_is_found(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    client = kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S)
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 50), random_blocks(50, 12)
    namespace.store(keys, blocks, wait=True)
    with namespace.fetch(keys) as lease:
        daemon.kill()
        assert bytes(lease.views[49]) == blocks[49].tobytes()  # the bytes outlive the daemon
        assert lease.valid()
    with namespace.fetch(keys) as lease:
        assert lease.blocks == 0
    assert namespace.store(keys, blocks).reasons == {Reason.UNREACHABLE: 50}
    assert namespace.match(keys).blocks == 0
    start_daemon("--dram", "64MiB", "--lock", "false")
    assert client.wait_connected(20)
    assert namespace.store(keys, blocks, wait=True).accepted == 50
    with namespace.fetch(keys) as lease:
        assert bytes(lease.views[49]) == blocks[49].tobytes()
    client.close()


def test_a_stopped_daemon_costs_a_call_its_deadline_and_no_more(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    client = kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S)
    namespace = namespace_of(client)
    keys, blocks = keys_of(namespace, 3), random_blocks(3, 13)
    assert namespace.store(keys, blocks, wait=True).accepted == 3
    client._connection.timeout_ns = namespace._timeout_ns = 2 * 10**8
    daemon.process.send_signal(signal.SIGSTOP)
    assert namespace.match(keys).blocks == 0
    with namespace.fetch(keys, wait_s=0.1) as lease:
        assert lease.blocks == 0
    assert namespace.store(keys_of(namespace, 3), blocks, space_s=0.1).accepted == 0
    daemon.process.send_signal(signal.SIGCONT)
    while namespace.match(keys).blocks != 3:
        pass
    client.close()


def test_a_draining_daemon_serves_and_takes_nothing_new(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "64MiB", "--lock", "false")
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        namespace = namespace_of(client)
        keys, blocks = keys_of(namespace, 3), random_blocks(3, 14)
        namespace.store(keys, blocks, wait=True)
        _kvctl_json(daemon.runtime_dir, "drain", "--yes")
        refused = namespace.store(keys_of(namespace, 3), blocks).refused
        assert len(refused) == 3
        assert refused[0].reason is Reason.DRAINING
        assert namespace.store(keys, blocks).known == 3  # what is there already is not new
        with namespace.fetch(keys) as lease:
            assert lease.blocks == 3
        _kvctl_json(daemon.runtime_dir, "undrain")
        assert namespace.store(keys_of(namespace, 3), blocks).accepted == 3


def test_a_daemon_without_room_keeps_the_lead_part(start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--dram", "4MiB", "--arena", "1MiB", "--lock", "false")
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        namespace = namespace_of(client)
        keys, blocks = keys_of(namespace, 300), random_blocks(300, 15)
        result = namespace.store(keys, blocks, wait=True, space_s=PATIENCE_S)
        assert result.accepted == result.lead == 256
        assert set(result.reasons) <= {Reason.FULL, Reason.BUSY, Reason.NO_PARENT}
        with namespace.fetch(keys) as lease:
            assert lease.blocks == 256
            assert bytes(lease.views[255]) == blocks[255].tobytes()


def test_tenants_of_one_user_are_told_apart_by_name_and_see_nothing_of_each_other(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    file = tmp_path / "kvstored.toml"
    file.write_text("".join(f"[tenants.{name}]\nuids = [{os.geteuid()}]\n" for name in ("first", "second")))
    daemon = start_daemon("--dram", "64MiB", "--lock", "false", "--config", str(file))
    with (
        kvclient.connect(daemon.runtime_dir, tenant="first", timeout_s=PATIENCE_S) as first,
        kvclient.connect(daemon.runtime_dir, tenant="second", timeout_s=PATIENCE_S) as second,
        kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as unnamed,
    ):
        assert [client.status.tenant for client in (first, second, unnamed)] == ["first", "second", "first"]
        mine, theirs = namespace_of(first), namespace_of(second)
        keys, blocks, others = keys_of(mine, 4), random_blocks(4, 16), random_blocks(4, 17)
        assert mine.store(keys, blocks, wait=True).accepted == 4
        assert theirs.match(keys).blocks == 0
        assert theirs.delete(keys) == 0
        assert theirs.store(keys, others, wait=True).accepted == 4
        for namespace, expected in ((mine, blocks), (theirs, others), (namespace_of(unnamed), blocks)):
            with namespace.fetch(keys) as lease:
                assert [bytes(view) for view in lease.views] == [block.tobytes() for block in expected]
        assert blocks[0].tobytes() != others[0].tobytes()
    with pytest.raises(RefusedError, match="may not be tenant"):
        kvclient.connect(daemon.runtime_dir, tenant="third", timeout_s=PATIENCE_S)


def _open_many(client: Client, count: int) -> None:
    for number in range(count):
        namespace_of(client, f"number {number}").open()


def test_more_namespaces_than_a_session_may_have_are_an_error_and_the_others_go_on(client: Client) -> None:
    first = namespace_of(client, "number 0")
    keys = keys_of(first, 1)
    first.store(keys, random_blocks(1, 18), wait=True)
    with pytest.raises(UsageError, match="namespaces"):
        _open_many(client, NAMESPACES_PER_SESSION + 1)
    assert first.match(keys).blocks == 1
