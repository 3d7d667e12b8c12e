"""Tensors of the emulation through a real daemon: what a device stores, a processor reads, and the other way round."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import devices
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from tests.integration.conftest import StartDaemon
from tests.node import PATIENCE_S

BLOCK, COUNT = 64 << 10, 100
DIRECT = """
[dram]
size = "256MiB"
[tenants.trusting]
uids = [{uid}]
trusting = true
"""


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    devices.forget(made)
    made.close()


def namespace_of(client: kvclient.Client, model: str) -> kvclient.Namespace:
    return client.namespace(
        model=model, engine="e", layout="flat", dtype="uint8", block_tokens=4, block_bytes=BLOCK
    )  # fmt: skip


def store_and_fetch(client: kvclient.Client, device: Emulation) -> devices.Copies:
    namespace = namespace_of(client, "both")
    keys = namespace.keys(list(range(4 * COUNT)))
    source, target, compute = (
        EmulatedTensor.zeros(device, (COUNT, BLOCK)), EmulatedTensor.zeros(device, (COUNT, BLOCK)), device.stream(),
    )  # fmt: skip
    blocks = np.random.default_rng(1).integers(0, 256, (COUNT, BLOCK), dtype=np.uint8)
    compute.submit(lambda: np.copyto(source.array, blocks))
    half = COUNT // 2
    assert namespace.store(keys[:half], source[:half], wait=True, stream=compute).accepted == half
    assert namespace.store(keys[half:], list(blocks[half:]), parent=keys[half - 1], wait=True).accepted == COUNT - half
    on_host = np.zeros_like(blocks)
    with namespace.fetch(keys) as lease:
        assert lease.blocks == COUNT
        assert lease.copy_to(on_host)
        assert lease.start_copy(target, stream=compute).result(30)
    assert np.array_equal(on_host, blocks)
    assert np.array_equal(target.array, blocks)
    target.array[60, 60] ^= 1
    assert not np.array_equal(target.array, blocks)
    copies = devices.copies_for(source.device)
    copies.pins.settle()
    before = copies.copier.bounced_bytes
    keys = namespace.keys(list(range(4 * COUNT)), extra=b"again")
    assert namespace.store(keys, source, wait=True).accepted == COUNT
    assert copies.copier.bounced_bytes == before, "what is written to is registered by now"
    with namespace.fetch(keys) as lease:
        assert lease.copy_to(target)
    assert np.array_equal(target.array, blocks)
    compute.close()
    return copies


def test_a_device_and_a_processor_read_what_the_other_stored(daemon: DaemonProcess, device: Emulation) -> None:
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(30)
        copies = store_and_fetch(client, device)
    assert copies.copier.direct_bytes >= COUNT * BLOCK  # the ring
    assert copies.copier.bounced_bytes >= 2 * COUNT * BLOCK  # the arenas, which are mapped for reading only


def test_in_mode_direct_the_device_copies_from_and_to_arenas(
    start_daemon: StartDaemon, tmp_path: Path, device: Emulation
) -> None:
    (tmp_path / "kvstored.toml").write_text(DIRECT.format(uid=os.getuid()))
    daemon = start_daemon("--config", str(tmp_path / "kvstored.toml"))
    with kvclient.connect(daemon.runtime_dir, mode="direct", timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(30)
        assert client.status.mode == "direct"
        copies = store_and_fetch(client, device)
        before = copies.copier.bounced_bytes
        namespace, target = namespace_of(client, "both"), EmulatedTensor.zeros(device, (COUNT, BLOCK))
        keys = namespace.keys(list(range(4 * COUNT)))
        with namespace.fetch(keys) as lease:
            assert lease.copy_to(target)
        assert copies.copier.bounced_bytes == before, "arenas that are mapped for writing are registered by now"
        assert target.array.any()


def test_where_the_device_registers_such_maps_nothing_is_copied_twice(daemon: DaemonProcess) -> None:
    device = Emulation(read_only_registration=True)
    with kvclient.connect(daemon.runtime_dir, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(30)
        namespace = namespace_of(client, "read only")
        keys, blocks = namespace.keys(list(range(4 * COUNT))), np.full((COUNT, BLOCK), 3, np.uint8)
        namespace.store(keys, blocks, wait=True)
        target = EmulatedTensor.zeros(device, (COUNT, BLOCK))
        copies = devices.copies_for(target.device)
        for _ in range(2):
            target.array[:] = 0
            with namespace.fetch(keys) as lease:
                assert lease.copy_to(target)
            assert np.array_equal(target.array, blocks)
            copies.pins.settle()
        assert copies.copier.direct_bytes >= COUNT * BLOCK
        with namespace.fetch(keys) as lease:
            before = copies.copier.bounced_bytes
            assert lease.copy_to(target)
            assert copies.copier.bounced_bytes == before
    devices.forget(device)
    device.close()
