"""Encoded blocks and tensors on a device (the emulation): encoded there, so that encoded bytes cross the link."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import Reason, Refused, codecs_device, devices
from kvclient.codecs import HEAD_BYTES
from kvctl.archive_export import namespace_of
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.pages import pages_of
from kvkernels.encodings import Encoding
from kvproto.errors import UsageError
from tests.integration.test_codecs import BLOCK_BYTES, COUNT, TOKENS, VALUES, bf16_blocks, named, near

LAYERS = 4


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    devices.forget(made)
    made.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With a tenant whose engines may write into its memory."""
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "toml").write_text(f"[tenants.kv]\nuids = [{os.getuid()}]\ntrusting = true\n")
    with DaemonProcess(
        folder / "run", "--config", str(folder / "toml"), "--dram", "64MiB", log_file=folder / "log"
    ) as process:
        yield process


@pytest.fixture(params=["copy", "direct"])
def client(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[kvclient.Client]:
    """In one mode after the other: what one has stored is there already for the next, and named apart."""
    with kvclient.connect(daemon.runtime_dir, mode=request.param, timeout_s=20.0) as made:
        assert made.wait_connected(20.0)
        assert made.status.mode == request.param
        yield made


def opened(client: kvclient.Client, codec: str, **more: Any) -> kvclient.Namespace:
    """One for each mode."""
    return client.namespace(**named(codec, **more | {"layout": f"{more['layout']} {client.status.mode}"}))


def assert_true(value: bool) -> None:
    assert value


def on_device(device: Emulation, blocks: Any) -> EmulatedTensor:
    made = EmulatedTensor.zeros(device, blocks.shape, "uint16")
    made.array[...] = blocks
    return made


def stored_bytes(client: kvclient.Client, ns: kvclient.Namespace, keys: Sequence[bytes]) -> Any:
    """As they lie."""
    raw = np.zeros((len(keys), ns.identity.block_bytes), np.uint8)
    with namespace_of(client, ns.identity).fetch(keys) as lease:
        assert lease.copy_to(raw)
    return raw


def crossed(place: Any) -> int:
    """Bytes between host and device so far."""
    copier = devices.copies_for(place).copier
    return copier.direct_bytes + copier.bounced_bytes


@pytest.mark.parametrize("codec", Encoding)
def test_a_device_and_a_processor_make_the_same_bytes_and_read_each_others(
    client: kvclient.Client, device: Emulation, codec: str
) -> None:
    blocks, target = bf16_blocks(), np.zeros((COUNT, VALUES), np.uint16)
    tensor, back = on_device(device, blocks), on_device(device, np.zeros_like(blocks))
    ns = opened(client, codec, layout=f"device {codec}")
    its, ours = ns.keys(TOKENS), ns.keys(TOKENS, extra=b"ours")
    before = crossed(tensor.device)
    assert ns.store(its, tensor, wait=True).accepted == COUNT
    assert crossed(tensor.device) - before == COUNT * (ns.identity.block_bytes - HEAD_BYTES)
    assert ns.store(ours, blocks, wait=True).accepted == COUNT
    assert np.array_equal(stored_bytes(client, ns, its), stored_bytes(client, ns, ours))
    with ns.fetch(its) as lease:
        assert lease.copy_to(target)
    before = crossed(tensor.device)
    with ns.fetch(ours) as lease:
        assert lease.copy_to(back)
    assert crossed(tensor.device) - before == COUNT * (ns.identity.block_bytes - HEAD_BYTES)
    assert np.array_equal(back.array, target)
    assert near(codec, target, blocks)
    assert not near(codec, target, blocks[::-1])
    assert np.array_equal(target, blocks) == (codec == "bf16-fixed")


@pytest.mark.parametrize("way", ["copy_to", "start_copy", "one by one", "not aligned", "few at a time"])
def test_blocks_come_back_whichever_way_they_are_asked_for(
    client: kvclient.Client, device: Emulation, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "few at a time":
        monkeypatch.setattr(codecs_device, "BATCH_BYTES", 2 * BLOCK_BYTES)
    blocks = bf16_blocks()
    if way == "not aligned":
        room = EmulatedTensor.zeros(device, (2 * COUNT, VALUES + 1), "uint16")
        tensors, backs = ([room[first + n, 1:] for n in range(COUNT)] for first in (0, COUNT))
        for tensor, block in zip(tensors, blocks, strict=True):
            tensor.array[...] = block
    else:
        whole, empty = on_device(device, blocks), on_device(device, np.zeros_like(blocks))
        tensors, backs = ([each[n] for n in range(COUNT)] for each in (whole, empty))
    ns = opened(client, "bf16-fixed", layout=f"ways {way}")
    keys = ns.keys(TOKENS)
    assert ns.store(keys, tensors if way in ("one by one", "not aligned") else whole, wait=True).accepted == COUNT
    with ns.fetch(keys) as lease:
        if way == "start_copy":
            assert lease.start_copy(empty).result(30.0)
        else:
            assert lease.copy_to(backs)
    assert all(np.array_equal(back.array, block) for back, block in zip(backs, blocks, strict=True))
    assert not np.array_equal(backs[0].array, blocks[1])


@pytest.mark.parametrize("apart", [False, True], ids=["one stride", "other strides"])
def test_pages_of_layers_are_encoded_where_they_lie(client: kvclient.Client, device: Emulation, *, apart: bool) -> None:
    """Block n is page n of all layers; with `apart` the last layer has room between its pages."""
    pages, piece = 2 * COUNT, VALUES // LAYERS
    layers = [EmulatedTensor.zeros(device, (pages, piece), "uint16") for _ in range(LAYERS)]
    if apart:
        layers[-1] = EmulatedTensor.zeros(device, (pages, 2 * piece), "uint16")[:, :piece]
    whole, blocks = pages_of(device, layers), bf16_blocks()
    for number, layer in enumerate(layers):
        layer.array[:COUNT] = blocks.reshape(COUNT, LAYERS, piece)[:, number]
    place, ids = layers[0].device, [4, 0, 2, 1, 3]
    ns = opened(client, "int8", layout=f"pages {apart}")
    keys = ns.keys(TOKENS)
    assert ns.store(keys, devices.paged_blocks(place, whole, ids), wait=True).accepted == COUNT
    target = np.zeros((COUNT, VALUES), np.uint16)
    with ns.fetch(keys) as lease:
        assert lease.copy_to(target)
        assert lease.copy_to(devices.paged_blocks(place, whole, [COUNT + n for n in range(COUNT)]))
    assert near("int8", target, blocks[ids])
    assert not near("int8", target, blocks)
    filled = np.stack([layer.array[COUNT:] for layer in layers], axis=1).reshape(COUNT, VALUES)
    assert np.array_equal(filled, target)


def test_the_callers_stream_comes_first(client: kvclient.Client, device: Emulation) -> None:
    """What a tensor holds is there, and what it held is read, when that stream has come so far."""
    blocks, gates = bf16_blocks(), [threading.Event(), threading.Event()]
    tensor, back = on_device(device, np.zeros_like(blocks)), on_device(device, np.zeros_like(blocks))
    ns = opened(client, "bf16-fixed", layout="order")
    keys, compute = ns.keys(TOKENS), device.stream()
    assert isinstance(compute, EmulatedStream)

    def computed() -> None:
        assert gates[0].wait(30)
        tensor.array[...] = blocks

    compute.submit(computed)
    with ThreadPoolExecutor(1) as pool:
        storing = pool.submit(ns.store, keys, tensor, wait=True, stream=compute)
        gates[0].set()
        assert storing.result(30).accepted == COUNT
    compute.submit(lambda: assert_true(gates[1].wait(30)))
    with ns.fetch(keys) as lease:
        copying = lease.start_copy(back, stream=compute)
        assert not back.array.any(), "somebody may still read it"
        gates[1].set()
        assert copying.result(30.0)
    assert np.array_equal(back.array, blocks)
    compute.close()


@pytest.mark.parametrize(("codec", "odd"), [("int8", 0x7FC0), ("fp8", 0x7F80), ("int4-g64", 0xFF80)])
@pytest.mark.parametrize("bad", [0, 2, COUNT - 1])
def test_an_unfit_block_on_a_device_breaks_the_chain_there(
    client: kvclient.Client, device: Emulation, codec: str, odd: int, bad: int
) -> None:
    blocks = bf16_blocks()
    blocks[bad, 77] = odd  # NaN, or an infinity
    ns = opened(client, codec, layout=f"unfit {codec} {bad}")
    keys = ns.keys(TOKENS)
    result = ns.store(keys, on_device(device, blocks), wait=True)
    assert (result.accepted, result.lead) == (bad, bad)
    assert result.refused[0] == Refused(bad, Reason.UNFIT)
    assert ns.match(keys).blocks == bad


def test_nan_and_infinity_come_back_without_loss(client: kvclient.Client, device: Emulation) -> None:
    blocks = bf16_blocks()
    blocks[1, 5:8] = (0x7FC0, 0x7F80, 0xFF80)
    tensor, back = on_device(device, blocks), on_device(device, np.zeros_like(blocks))
    ns = opened(client, "bf16-fixed", layout="odd values")
    keys = ns.keys(TOKENS)
    assert ns.store(keys, tensor, wait=True).accepted == COUNT
    with ns.fetch(keys) as lease:
        assert lease.copy_to(back)
    assert np.array_equal(back.array, blocks)


def test_no_blocks_and_one_block(client: kvclient.Client, device: Emulation) -> None:
    blocks = bf16_blocks()
    tensor, back = on_device(device, blocks[:1]), on_device(device, np.zeros_like(blocks[:1]))
    ns = opened(client, "fp8", layout="few on a device")
    keys = ns.keys(TOKENS)
    assert ns.store([], tensor[:0]).lead == 0
    assert ns.store(keys[:1], tensor, wait=True).accepted == 1
    with ns.fetch(keys) as lease:
        assert lease.copy_to(back[:0])
        assert lease.copy_to(back)
    assert near("fp8", back.array, blocks[:1])


def test_bytes_that_are_none_of_the_codec_fill_nothing(client: kvclient.Client, device: Emulation) -> None:
    ns = opened(client, "bf16-fixed", layout="foreign on a device")
    keys, back = ns.keys(TOKENS), on_device(device, np.zeros((1, VALUES), np.uint16))
    assert ns.store(keys[:1], bf16_blocks()[:1], wait=True).accepted == 1
    good = stored_bytes(client, ns, keys[:1])
    headless, torn = good.copy(), good.copy()
    headless[0, 5] ^= 1
    torn[0, -196:-192] = 0xFF  # how many escapes the last tile has
    for name, wrong in (("headless", headless), ("torn", torn), ("good", good)):
        others = ns.keys(TOKENS, extra=name.encode())[:1]
        assert namespace_of(client, ns.identity).store(others, wrong, wait=True).accepted == 1
        with ns.fetch(others) as lease:
            assert lease.blocks == 1
            assert lease.copy_to(back) == (name == "good")
            assert lease.valid() == (name == "good")


def test_a_device_that_is_full_or_lost_refuses_stores_and_fills_nothing(client: kvclient.Client) -> None:
    full, lost = Emulation(3, 1 << 20), Emulation(4)
    try:
        for device in (full, lost):
            tensor = on_device(device, bf16_blocks())
            ns = opened(client, "bf16-fixed", layout=f"device {device.properties.number}")
            keys = ns.keys(TOKENS)
            assert ns.store(keys, bf16_blocks(), wait=True).accepted == COUNT
            if device is lost:
                devices.copies_for(tensor.device)
                device.lose("it fell off its bus")
            others = ns.keys(TOKENS, extra=b"others")
            assert ns.store(others, tensor).reasons == {Reason.DEVICE: COUNT}
            assert ns.match(others).blocks == 0
            with ns.fetch(keys) as lease:
                assert not lease.copy_to(tensor)
                assert lease.valid(), "the blocks are good, and the host can have them"
    finally:
        for device in (full, lost):
            devices.forget(device)
            device.close()


def test_shapes_that_no_kernel_takes_are_told(client: kvclient.Client, device: Emulation) -> None:
    shape = (8, 63)
    ns = opened(client, "int8", layout="odd rows", block_bytes=2 * 8 * 63, block_shape=shape)
    tensor = EmulatedTensor.zeros(device, (1, 8 * 63), "uint16")
    keys = ns.keys(TOKENS)[:1]
    with pytest.raises(UsageError, match="rows of 63 on a device"):
        ns.store(keys, tensor)
    assert ns.store(keys, np.zeros((1, 8 * 63), np.uint16), wait=True).accepted == 1
    with ns.fetch(keys) as lease, pytest.raises(UsageError, match="rows of 63 on a device"):
        lease.copy_to(tensor)
