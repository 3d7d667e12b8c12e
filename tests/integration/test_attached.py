"""Mode daemon through a real daemon: it copies between its memory and an engine's, on the emulation of a GPU.

What is equal is told from what is not: pages that were not named keep what they held.
"""

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient.results import Reason
from kvkernels.device.port import Via
from kvproto import control_pb2, control_pb2_grpc
from kvproto.errors import AttachError, LimitError, UsageError
from tests.attached_kit import (
    BLOCK_BYTES,
    LAYERS,
    PAGES,
    PIECE,
    Engine,
    connected,
    engine,
    maps_of,
    namespace_of,
    where,
)
from tests.node import PATIENCE_S, until
from tests.raw import real_daemon

HALF = PAGES // 2
FIRST, SECOND = list(range(HALF)), list(range(PAGES - 1, HALF - 1, -1))  # pages; the second half backwards


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    disk = ("--disk", str(folder / "disk"), "--disk-size", "64MiB", "--disk-segment", "8MiB")
    arguments = ("--dram", "64MiB", "--arena", "8MiB", *disk, *where.arguments, "--ring", "1MiB")
    with DaemonProcess(folder / "run", *arguments, log_file=folder / "log") as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[kvclient.Client]:
    with connected(daemon) as made:
        yield made


@pytest.fixture
def kv() -> Iterator[Engine]:
    with engine() as made:
        yield made


def keys_of(namespace: kvclient.Namespace, count: int, extra: bytes = b"") -> list[bytes]:
    return list(namespace.keys(list(range(4 * count)), extra=extra))


def test_what_pages_held_is_stored_and_comes_back_to_other_pages(client: kvclient.Client, kv: Engine) -> None:
    namespace = namespace_of(client, "there-and-back")
    keys = keys_of(namespace, HALF)
    memory = kv.attach(client)
    assert memory.attached
    assert ("emulation" in client.status.notes) == where.emulated
    saved = namespace.save(keys, memory[FIRST], stream=kv.device.stream())
    assert (saved.accepted, saved.known, saved.refused) == (HALF, 0, ())  # 512 KiB through a ring's room of 1 MiB
    on_host = np.zeros((HALF, BLOCK_BYTES), dtype=np.uint8)
    with namespace.fetch(keys) as lease:
        assert lease.copy_to(on_host)
    wanted = kv.values[:, :HALF]
    assert np.array_equal(on_host.reshape(HALF, LAYERS, PIECE).transpose(1, 0, 2), wanted)
    assert not np.array_equal(kv.get(SECOND), wanted)
    assert namespace.load(keys, memory[SECOND]) == kvclient.LoadResult(HALF)
    assert np.array_equal(kv.get(SECOND), wanted)
    assert np.array_equal(kv.get(FIRST), wanted)  # untouched
    assert namespace.save(keys, memory[FIRST]).known == HALF
    assert memory.unsettled() == []
    assert memory.detach()
    assert not memory.attached
    assert namespace.load(keys, memory[SECOND]).reason is Reason.UNREACHABLE


def test_what_the_host_stored_is_loaded_as_far_as_it_goes(client: kvclient.Client, kv: Engine) -> None:
    namespace = namespace_of(client, "part")
    keys = keys_of(namespace, HALF)
    blocks = kv.values[:, :HALF].transpose(1, 0, 2).reshape(HALF, BLOCK_BYTES).copy()
    assert namespace.store(keys[:5], blocks[:5], wait=True).accepted == 5
    memory = kv.attach(client)
    before = kv.get(SECOND)
    assert namespace.load(keys, memory[SECOND]) == kvclient.LoadResult(5)
    assert np.array_equal(kv.get(SECOND[:5]), kv.values[:, :5])
    assert np.array_equal(kv.get(SECOND[5:]), before[:, 5:])
    assert namespace.load(keys_of(namespace, 3, b"other"), memory[FIRST[:3]]) == kvclient.LoadResult(0)
    assert np.array_equal(kv.get(FIRST), kv.values[:, :HALF])


def test_a_save_larger_than_the_ring_goes_slice_by_slice(daemon: DaemonProcess) -> None:
    with connected(daemon, ring_bytes=4 * BLOCK_BYTES) as client, engine() as kv:
        namespace = namespace_of(client, "slices")
        keys = keys_of(namespace, PAGES)
        memory = kv.attach(client)
        assert namespace.save(keys, memory[range(PAGES)]).accepted == PAGES
        assert namespace.save(keys[-1:], memory[[0]], parent=bytes(32)).known == 1
        assert namespace.save([b"k" * 32], memory[[0]], parent=bytes(32)).reasons == {Reason.NO_PARENT: 1}
        kv.put(range(PAGES), np.zeros_like(kv.values))
        assert namespace.load(keys, memory[range(PAGES)]).blocks == PAGES
        assert np.array_equal(kv.get(range(PAGES)), kv.values)


def test_layers_come_group_by_group(client: kvclient.Client, kv: Engine) -> None:
    namespace = namespace_of(client, "groups")
    keys = keys_of(namespace, HALF)
    memory = kv.attach(client)
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    loading = namespace.start_load(keys, memory[SECOND], groups=LAYERS)
    for group in range(1, LAYERS + 1):
        assert loading.wait(group, 10.0)
        assert np.array_equal(kv.get(SECOND)[:group], kv.values[:group, :HALF])
    assert loading.result() == kvclient.LoadResult(HALF)
    assert loading.done
    assert loading.blocks == HALF


def test_blocks_that_lie_on_disk_alone_are_read_first(client: kvclient.Client, kv: Engine) -> None:
    namespace, other = namespace_of(client, "disk"), namespace_of(client, "others")
    keys = keys_of(namespace, HALF)
    memory = kv.attach(client)
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    assert namespace.flush(30.0).durable == HALF
    rubbish = np.zeros((512, BLOCK_BYTES), dtype=np.uint8)
    for number in range(12):  # 96 MiB through 64
        rest = [key[:24] + number.to_bytes(8, "little") for key in keys_of(other, 512)]
        other.store(rest, rubbish, wait=True, space_s=PATIENCE_S)
        if namespace.match(keys).tiers.disk == HALF:
            break
    assert namespace.match(keys).tiers.disk == HALF
    assert namespace.load(keys, memory[SECOND], wait_s=0.0).blocks == 0
    assert namespace.load(keys, memory[SECOND], wait_s=20.0, timeout_s=30.0).blocks == HALF
    assert np.array_equal(kv.get(SECOND), kv.values[:, :HALF])


def test_what_cannot_be_is_refused_and_said(client: kvclient.Client, kv: Engine) -> None:
    namespace = namespace_of(client, "refused")
    keys = keys_of(namespace, 3)
    memory = kv.attach(client)
    with pytest.raises(UsageError, match="page"):
        memory[[0, PAGES]]
    with pytest.raises(UsageError, match="pages"):
        namespace.load(keys, memory[[0, 1]])
    with pytest.raises(UsageError, match="twice"):
        namespace.load(keys, memory[[0, 1, 0]])
    with pytest.raises(UsageError, match="groups"):
        namespace.start_load(keys, memory[[0, 1, 2]], groups=LAYERS + 1)
    with pytest.raises(UsageError, match="blocks of 8192"):
        namespace_of(client, "refused", 8192).load(keys, memory[[0, 1, 2]])
    with engine(number=1) as elsewhere, pytest.raises(AttachError, match="none of this daemon's"):
        elsewhere.attach(client)
    with engine(share=Via.IPC) as by_ipc, pytest.raises(AttachError, match="HandleError"):
        by_ipc.attach(client)  # a process and a number of it: it might name anything
    with engine(share=Via.NOTHING) as private, pytest.raises(AttachError, match="handed on"):
        private.attach(client)
    more = [kv.attach(client) for _ in range(7)]
    with pytest.raises(LimitError, match="8 memories"):
        kv.attach(client)
    assert all(each.detach() for each in more)
    assert namespace.save(keys, memory[[0, 1, 2]]).accepted == 3  # the session is none the worse for it


def test_status_says_that_it_is_no_gpu(daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(f"unix:{daemon.runtime_dir}/control.sock") as channel:
        status = control_pb2_grpc.ControlStub(channel).GetStatus(control_pb2.GetStatusRequest())
    assert any("emulation: gpu.devices" in warning for warning in status.warnings)


def test_other_modes_have_no_attached_memory(daemon: DaemonProcess, kv: Engine) -> None:
    with connected(daemon, mode="copy") as client, pytest.raises(AttachError, match="mode copy"):
        kv.attach(client)


def test_without_a_device_mode_daemon_becomes_copy_and_says_why() -> None:
    with real_daemon() as daemon, connected(daemon) as client, engine() as kv:
        assert client.status.mode == "copy"
        assert client.status.fell_back
        with pytest.raises(AttachError, match=r"gpu\.devices"):
            kv.attach(client)


def test_memory_of_a_client_that_is_gone_is_closed(daemon: DaemonProcess, kv: Engine) -> None:
    assert until(lambda: maps_of(daemon) == 0)
    with connected(daemon) as client:
        kv.attach(client)
        assert maps_of(daemon) == LAYERS
    assert until(lambda: maps_of(daemon) == 0)
