"""A real daemon and devices: what one without a GPU has of them in its process, and how tensors come and go by mode."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import devices
from kvkernels.device.emulated_kernels import COMPILE, FOLDER
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import pages_of
from tests.node import PATIENCE_S
from tests.telling import Inside, told

STUB = Path(__file__).parent.parent / "stub" / "libcuda.cpp"
COUNT = 40
OF_CUDA = ("libcuda", "cupy", "nvrtc")  # in the name of a file that is mapped
OF_A_DEVICE = ("cuda", "cuda_streams", "driver", "emulation", "emulated_kernels", "emulated_streams")
GPU_THREADS = {"gpu-to_device", "gpu-to_host"}


# -- what a daemon has in it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stub of CUDA's driver, so that it could be had."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not there")
    folder = tmp_path_factory.mktemp("driver")
    made = folder / "libcuda.so.1"
    subprocess.run(["g++", *COMPILE, f"-I{FOLDER}", "-DCUDA_12", "-o", made, STUB], check=True)
    return folder


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[tuple[DaemonProcess, Path]]:
    """A daemon with a little memory, executed and not forked; and where it tells what is in it."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    words = ("--dram", "64MiB", "--arena", "8MiB", *arguments)
    module = ("tests.telling", str(fifo))
    with DaemonProcess(folder / "run", *words, log_file=folder / "log", module=module) as daemon:
        yield daemon, fifo


def use(daemon: DaemonProcess) -> str:
    """Store, fetch, and wish that the daemon copies to a GPU; in which mode that went."""
    with kvclient.connect(daemon.runtime_dir, mode="daemon", timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(PATIENCE_S)
        namespace = client.namespace(model="m", engine="e", layout="l", dtype="d", block_tokens=1, block_bytes=4096)
        keys, blocks = namespace.keys(range(4)), np.full((4, 4096), 7, np.uint8)
        assert namespace.store(keys, blocks, wait=True).accepted == 4
        with namespace.fetch(keys) as lease:
            assert lease.copy_to(np.zeros_like(blocks))
        return client.status.mode


def mapped(daemon: DaemonProcess) -> set[str]:
    """What is mapped there, by name."""
    lines = Path(f"/proc/{daemon.process.pid}/maps").read_text().splitlines()
    return {Path(words[5]).name for line in lines if len(words := line.split(maxsplit=5)) == 6}


def of_cuda(names: set[str]) -> set[str]:
    return {name for name in names if any(part in name.lower() for part in OF_CUDA)}


def of_a_device(inside: Inside) -> set[str]:
    """Modules of the port that only a device needs."""
    wanted = {f"kvkernels.device.{name}" for name in OF_A_DEVICE}
    return {name for name in inside.modules if name in wanted or name.split(".")[0] == "cupy"}


def test_a_daemon_without_a_gpu_has_nothing_of_one(
    tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))  # it would be found
    with serving(tmp_path) as (daemon, fifo):
        assert use(daemon) == "copy"
        inside, names = told(fifo), mapped(daemon)
    assert any(name.startswith("libc.so") for name in names), "the control: libraries are among these"
    assert of_cuda(names) == set()
    assert of_a_device(inside) == set()
    assert "telling" in inside.threads
    assert not [name for name in inside.threads if name.startswith(("gpu", "emulation", "kvclient"))]


def test_a_daemon_with_the_emulation_has_that_and_nothing_of_cuda(
    tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    with serving(tmp_path, "--gpu-devices", "emulation", "--gpu-hbm", "32MiB") as (daemon, fifo):
        assert use(daemon) == "daemon"
        inside, names = told(fifo), mapped(daemon)
    assert any("kvstored-emulated-device" in name for name in names), "its memory"
    assert set(inside.threads) >= GPU_THREADS | {"emulation"}
    assert "kvkernels.device.emulation" in of_a_device(inside)
    assert of_cuda(names) == set()
    assert not of_a_device(inside) & {"cupy", "kvkernels.device.cuda", "kvkernels.device.driver"}


def test_a_daemon_with_a_gpu_has_its_driver(tmp_path: Path, driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the others: what they look for is found where it is."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    with serving(tmp_path, "--gpu-devices", "cuda:0") as (daemon, fifo):
        assert use(daemon) == "daemon"
        inside, names = told(fifo), mapped(daemon)
    assert "libcuda.so.1" in of_cuda(names)
    assert set(inside.threads) >= GPU_THREADS
    assert of_a_device(inside) >= {"kvkernels.device.cuda", "kvkernels.device.driver"}


# -- tensors, by mode --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    with DaemonProcess(folder / "run", "--dram", "64MiB", "--arena", "8MiB", log_file=folder / "log") as process:
        yield process


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    devices.forget(made)
    made.close()


@contextmanager
def namespace_in(daemon: DaemonProcess, mode: str, block_bytes: int) -> Iterator[kvclient.Namespace]:
    """Of a client in this mode, which it was given."""
    with kvclient.connect(daemon.runtime_dir, mode=mode, ring_bytes=1 << 20, timeout_s=PATIENCE_S) as client:
        assert client.wait_connected(PATIENCE_S)
        assert (client.status.mode, client.status.fell_back) == (mode, False)
        yield client.namespace(
            model=mode, engine="e", layout="flat", dtype="uint8", block_tokens=1, block_bytes=block_bytes
        )


@pytest.mark.parametrize("block_bytes", [5000, 64 << 10])
@pytest.mark.parametrize("mode", ["copy", "ring"])
def test_tensors_on_a_device_come_and_go_in_every_mode_with_a_ring(
    daemon: DaemonProcess, device: Emulation, mode: str, block_bytes: int
) -> None:
    blocks = np.random.default_rng(block_bytes).integers(0, 256, (COUNT, block_bytes), dtype=np.uint8)
    source, target, compute = (
        EmulatedTensor.zeros(device, blocks.shape), EmulatedTensor.zeros(device, blocks.shape), device.stream(),
    )  # fmt: skip
    with namespace_in(daemon, mode, block_bytes) as namespace:
        keys = namespace.keys(range(COUNT))
        compute.submit(lambda: np.copyto(source.array, blocks))
        stored = namespace.store(keys, source, wait=True, stream=compute)
        assert stored.accepted == COUNT
        on_host = np.zeros_like(blocks)
        with namespace.fetch(keys) as lease:
            assert lease.blocks == COUNT
            assert (lease.bounce is not None) == (mode == "ring"), "else these modes would be one"
            assert lease.copy_to(on_host)
            assert lease.copy_to(target, stream=compute)
        assert np.array_equal(on_host, blocks)
        assert np.array_equal(target.array, blocks)
        target.array[:] = 0
        with namespace.fetch(keys) as lease:
            copying = lease.start_copy([target[number] for number in reversed(range(COUNT))], stream=compute)
            assert copying.result(PATIENCE_S)
        assert np.array_equal(target.array, blocks[::-1])
        assert not np.array_equal(target.array, blocks), "the control"
    copies = devices.copies_for(source.device)
    moved = copies.copier.direct_bytes + copies.copier.bounced_bytes
    assert moved == 3 * COUNT * block_bytes, "stored once and fetched twice by the device's own streams"
    compute.close()


@pytest.mark.parametrize("mode", ["copy", "ring"])
def test_pages_of_layers_come_and_go_in_every_mode_with_a_ring(
    daemon: DaemonProcess, device: Emulation, mode: str
) -> None:
    layers = [EmulatedTensor.zeros(device, (COUNT, 4112)) for _ in range(3)]
    values = np.random.default_rng(9).integers(1, 256, (3, COUNT, 4112), dtype=np.uint8)
    for layer, value in zip(layers, values, strict=True):
        layer.array[:] = value
    place, pages = layers[0].device, pages_of(device, layers)
    ids = [int(number) for number in np.random.default_rng(10).permutation(COUNT)[: COUNT // 2]]
    others = [number for number in range(COUNT) if number not in ids]
    with namespace_in(daemon, mode, pages.block_bytes) as namespace:
        keys = namespace.keys(range(len(ids)))
        assert namespace.store(keys, devices.paged_blocks(place, pages, ids), wait=True).accepted == len(ids)
        with namespace.fetch(keys) as lease:
            assert bytes(lease.views[3]) == values[:, ids[3]].tobytes()
            assert lease.copy_to(devices.paged_blocks(place, pages, others))
    found = np.stack([layer.array for layer in layers])
    assert np.array_equal(found[:, others], values[:, ids])
    assert np.array_equal(found[:, ids], values[:, ids]), "these were read only"
    assert not np.array_equal(found, values), "the control"
