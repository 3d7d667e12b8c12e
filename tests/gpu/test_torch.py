"""torch's tensors on a GPU through a real daemon, ordered with torch's streams."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import devices
from kvkernels.device.cuda import Cuda
from kvkernels.device.engines import GUESS
from kvkernels.device.pages import pages_of
from tests.node import PATIENCE_S, until

BLOCK, COUNT = 64 << 10, 200


@pytest.fixture(scope="module")
def torch(gpu: Cuda) -> Any:
    """torch, if it can use the GPU."""
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("no GPU: this torch is built without CUDA")
    return module


@pytest.fixture(scope="module", params=["copy", "direct"])
def client(
    torch: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[kvclient.Client]:
    """Of a real daemon, by way of a ring and straight into its memory."""
    folder, mode = tmp_path_factory.mktemp("daemon"), str(request.param)
    (folder / "toml").write_text(f"[tenants.trusting]\nuids = [{os.getuid()}]\ntrusting = true\n")
    arguments = ("--dram", "256MiB", "--config", str(folder / "toml"))
    with (
        DaemonProcess(folder / "run", *arguments, log_file=folder / "log") as daemon,
        kvclient.connect(daemon.runtime_dir, mode=mode, timeout_s=PATIENCE_S) as client,
    ):
        assert client.wait_connected(30)
        assert client.status.mode == mode
        yield client


@pytest.fixture(scope="module")
def namespace(client: kvclient.Client) -> kvclient.Namespace:
    """Of a real daemon."""
    return client.namespace(model="m", engine="gpu", layout="flat", dtype="uint8", block_tokens=4, block_bytes=BLOCK)


def test_blocks_go_from_the_gpu_and_back(torch: Any, namespace: kvclient.Namespace) -> None:
    keys = namespace.keys(list(range(4 * COUNT)))
    source = torch.randint(0, 256, (COUNT, BLOCK), dtype=torch.uint8, device="cuda")
    assert namespace.store(keys, source, wait=True, stream=torch.cuda.current_stream()).accepted == COUNT
    for _ in range(2):  # the second time the ring is registered
        target = torch.zeros_like(source)
        with namespace.fetch(keys) as lease:
            assert lease.copy_to(target, stream=torch.cuda.current_stream())
        assert torch.equal(target, source)
        target[3, 5] ^= 1
        assert not torch.equal(target, source)


@pytest.mark.parametrize("codec", ["bf16-fixed", "int8", "fp8", "int4-g64"])
def test_encoded_blocks_are_those_that_a_processor_makes(torch: Any, client: kvclient.Client, codec: str) -> None:
    namespace = client.namespace(
        model="m", engine="gpu", layout=f"codec {codec}", dtype="bfloat16", block_tokens=4, block_bytes=BLOCK,
        codec=codec, block_shape=(BLOCK // 256, 128), lossy=True,
    )  # fmt: skip
    keys, on_host = (namespace.keys(list(range(4 * COUNT)), extra=extra) for extra in (b"gpu", b"host"))
    source = torch.randn((COUNT, BLOCK // 2), device="cuda").to(torch.bfloat16)
    assert namespace.store(keys, source, wait=True, stream=torch.cuda.current_stream()).accepted == COUNT
    assert namespace.store(on_host, source.cpu(), wait=True).accepted == COUNT
    found = []
    for chain, like in ((keys, source.cpu()), (on_host, source)):  # each side reads what the other stored
        target = torch.zeros_like(like)
        with namespace.fetch(chain) as lease:
            stream = torch.cuda.current_stream() if target.is_cuda else None  # in which its zeros are written
            assert lease.copy_to(target, stream=stream)
        found.append(target.cpu())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], source.cpu()) == (codec == "bf16-fixed")
    assert not torch.equal(found[0], source.roll(1, 0).cpu())


def test_the_callers_stream_comes_first_and_waits(torch: Any, namespace: kvclient.Namespace) -> None:
    keys = namespace.keys(list(range(4 * COUNT)), extra=b"order")
    compute = torch.cuda.Stream()
    source = torch.zeros((COUNT, BLOCK), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(compute):
        torch.cuda._sleep(200_000_000)  # 0.1 s of the GPU's time
        source += 7
    assert namespace.store(keys, source, wait=True, stream=compute).accepted == COUNT
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    with namespace.fetch(keys) as lease:
        copying = lease.start_copy(target, stream=compute)
        copying.order(compute)
        with torch.cuda.stream(compute):
            doubled = target * 2
        assert copying.result(30)
    compute.synchronize()
    assert bool((doubled == 14).all())


def test_the_daemon_copies_between_its_memory_and_torchs_tensors(torch: Any, gpu: Cuda, tmp_path: Path) -> None:
    """Mode daemon, behind torch's stream: out of DRAM, and out of the tier on the GPU."""
    arguments = ("--dram", "256MiB", "--gpu-devices", "cuda:0", "--gpu-hbm", "64MiB")
    layers = [torch.zeros((2 * COUNT, BLOCK // 4), dtype=torch.uint8, device="cuda") for _ in range(4)]
    wanted = [torch.randint(0, 256, (COUNT, BLOCK // 4), dtype=torch.uint8, device="cuda") for _ in layers]
    compute, place, first, second = torch.cuda.Stream(), layers[0].device, range(COUNT), range(COUNT, 2 * COUNT)
    torch.cuda.synchronize()
    with (
        DaemonProcess(tmp_path / "run", *arguments, log_file=tmp_path / "log") as daemon,
        kvclient.connect(daemon.runtime_dir, mode="daemon", timeout_s=PATIENCE_S) as client,
    ):
        assert client.wait_connected(30)
        memory = client.attach(place, pages_of(devices.port_of(place), layers))
        namespace = client.namespace(
            model="m", engine="gpu", layout="layers", dtype="uint8", block_tokens=4, block_bytes=BLOCK
        )
        keys = namespace.keys(list(range(4 * COUNT)))
        with torch.cuda.stream(compute):
            torch.cuda._sleep(200_000_000)  # 0.1 s of the GPU's time
            for layer, content in zip(layers, wanted, strict=True):
                layer[:COUNT] = content
        assert namespace.save(keys, memory[first], stream=compute).accepted == COUNT
        for tier in ("dram", "hbm"):
            with torch.cuda.stream(compute):
                for layer in layers:
                    layer[COUNT:] = 0
            if tier == "hbm":
                namespace.prefetch(keys, tier=tier)
                assert until(lambda: namespace.match(keys).tiers.hbm == COUNT)
            assert namespace.load(keys, memory[second], stream=compute).blocks == COUNT
            for layer, content in zip(layers, wanted, strict=True):
                assert torch.equal(layer[COUNT:], content)
                assert not torch.equal(layer[COUNT:], content.roll(1, 0)), "the control"
        assert memory.detach()


def test_a_graph_is_captured_while_ways_to_copy_are_measured(torch: Any, gpu: Cuda) -> None:
    """Allocations and registrations of other threads would break it, and fail themselves."""
    measured = torch.ones(1 << 16, device="cuda")
    torch.cuda.synchronize()
    copies = devices.Copies(gpu, calibrate=True)
    measuring = [thread for thread in threading.enumerate() if thread.name == "kvclient-calibrate"]
    captured = 0
    while not captured or any(thread.is_alive() for thread in measuring):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # in mode "global"
            total = measured
            for _ in range(500):
                total = total + measured
        captured += 1
        graph.replay()
        torch.cuda.synchronize()
        assert bool((total == 501).all())
    assert copies.engines.crossover is not GUESS
    copies.close()


def test_a_tensor_on_another_device_is_told(torch: Any, gpu: Cuda) -> None:
    side = devices.side_of(torch.device("cuda", 0), None)
    with pytest.raises(kvclient.UsageError):
        devices.address_of(side, torch.zeros(16), 64)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "stacked"])
def test_layers_of_torch_are_pages(torch: Any, gpu: Cuda, layout: str) -> None:
    shape = {"nhd": (8, 16, 4, 64), "hnd": (8, 4, 16, 64), "stacked": (2, 8, 16, 4, 64)}[layout]
    layers = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    pages = pages_of(gpu, layers, block_axis=1 if layout == "stacked" else 0)
    assert pages.blocks == 8
    assert pages.block_bytes == 3 * layers[0].numel() // 8 * 2
