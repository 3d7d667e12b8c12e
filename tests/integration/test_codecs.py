"""Encoded blocks against a real daemon: stored, fetched, evicted to disk and back, damaged. One daemon for all."""

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvclient import Reason, Refused, aio
from kvclient.buffers import Scattered
from kvclient.copying import Gate, WithdrawnError
from kvctl.archive_export import namespace_of
from kvctl.client import ControlClient
from kvkernels.encodings import Encoding
from kvproto import control_pb2 as pb
from kvproto.errors import UsageError
from tests.unit.client_kit import wait_until

SHAPE = (4, 2, 2, 16, 64)  # layers, keys and values, heads, tokens, head_dim
VALUES = 4 * 2 * 2 * 16 * 64
BLOCK_BYTES = 2 * VALUES
COUNT = 5
TOKENS = list(range(16 * COUNT))
Blocks = "np.ndarray[tuple[int, int], np.dtype[np.uint16]]"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With a tenant whose engines may write into its memory."""
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "toml").write_text(f"[tenants.kv]\nuids = [{os.getuid()}]\ntrusting = true\n")
    with DaemonProcess(
        folder / "run", "--config", str(folder / "toml"), "--dram", "64MiB", "--disk", str(folder / "disk"),
        "--disk-size", "128MiB", "--disk-admission", "all", log_file=folder / "log",
    ) as process:  # fmt: skip
        yield process


@pytest.fixture(params=["copy", "direct", "ring"])
def mode(request: pytest.FixtureRequest) -> str:
    named: str = request.param
    return named


def client_of(daemon: DaemonProcess, mode: str = "copy") -> kvclient.Client:
    made = kvclient.connect(daemon.runtime_dir, mode=mode, timeout_s=20.0)
    assert made.wait_connected(20.0)
    assert made.status.mode == mode
    return made


def named(codec: str, **more: Any) -> dict[str, Any]:
    """What a namespace is opened with."""
    fields: dict[str, Any] = {
        "model": "m", "engine": "codecs", "layout": "LKHTD", "dtype": "bfloat16", "block_bytes": BLOCK_BYTES,
        "codec": codec, "block_shape": SHAPE, "lossy": True,
    }  # fmt: skip
    return fields | more


def evict(daemon: DaemonProcess, ns: kvclient.Namespace) -> None:
    """Out of memory, all of this namespace; what lies on disk stays there."""
    with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
        request, left = pb.EvictRequest(namespace_digest=ns.identity.digest().hex()), COUNT

        def gone() -> bool:  # leases end with the next tick
            nonlocal left
            left -= control.evict(request).kept_blocks
            return not left

        wait_until(gone)


def bf16_blocks(seed: int = 1, count: int = COUNT) -> Any:
    floats = np.random.default_rng(seed).standard_normal((count, VALUES), dtype=np.float32)
    return (floats.view(np.uint32) >> 16).astype(np.uint16)


def floats_of(blocks: Any) -> Any:
    return (blocks.astype(np.uint32) << 16).view(np.float32)


def near(encoding: str, found: Any, wanted: Any) -> bool:
    """Within what the encoding promises of the largest of each row of 64."""
    most = {"int8": 0.5 / 127 + 2**-8, "fp8": 2**-4 + 2**-8, "int4-g64": 1 / 15 + 2**-7, "bf16-fixed": 0.0}[encoding]
    before, after = floats_of(wanted).reshape(-1, 64), floats_of(found).reshape(-1, 64)
    return bool((abs(after - before).max(axis=1) <= most * abs(before).max(axis=1)).all())


@pytest.mark.parametrize("codec", Encoding)
def test_what_was_stored_comes_back_as_near_as_the_codec_promises(daemon: DaemonProcess, codec: str, mode: str) -> None:
    blocks, target = bf16_blocks(), np.zeros((COUNT, VALUES), np.uint16)
    with client_of(daemon, mode) as writer, client_of(daemon) as reader:
        ns = writer.namespace(**named(codec, layout=mode))
        assert ns.block_bytes == BLOCK_BYTES
        assert ns.identity.block_bytes < BLOCK_BYTES * 0.8
        keys = ns.keys(TOKENS)
        assert ns.store(keys, blocks, wait=True).accepted == COUNT
        other = reader.namespace(**named(codec, layout=mode))
        with other.fetch(keys) as lease:
            assert lease.copy_to(target)
            assert [bytes(view) for view in lease.views] == [row.tobytes() for row in target]
            assert all(view.readonly for view in lease.views)
            assert not lease.sources(), "where the blocks lie they are encoded"
        assert near(codec, target, blocks)
        assert not near(codec, target, blocks[::-1])
        assert np.array_equal(target, blocks) == (codec == "bf16-fixed")


@pytest.mark.parametrize("codec", ["int8", "bf16-fixed"])
def test_encoded_blocks_come_back_from_disk(daemon: DaemonProcess, codec: str) -> None:
    target = np.zeros((COUNT, VALUES), np.uint16)
    with client_of(daemon) as client:
        ns = client.namespace(**named(codec, layout="disk"))
        keys = ns.keys(TOKENS)
        assert ns.store(keys, bf16_blocks(), wait=True).accepted == COUNT
        assert ns.flush(20.0).durable == COUNT
        with ns.fetch(keys) as lease:
            assert lease.copy_to(target)
        hot = target.copy()
        evict(daemon, ns)
        target[:] = 0
        with ns.fetch(keys, wait_s=20.0) as lease:
            assert lease.copy_to(target)
            assert lease.tiers.disk == COUNT
        assert np.array_equal(target, hot)


def test_codecs_share_nothing_and_raw_is_one_of_them(daemon: DaemonProcess) -> None:
    with client_of(daemon) as client:
        plain = named("raw", layout="apart")
        opened = {codec: client.namespace(**plain | {"codec": codec}) for codec in ("raw", *Encoding)}
        keys = opened["int8"].keys(TOKENS)
        assert opened["int8"].store(keys, bf16_blocks(), wait=True).accepted == COUNT
        assert {codec: ns.match(keys).blocks for codec, ns in opened.items()} == dict.fromkeys(opened, 0) | {"int8": 5}
        half = client.namespace(**plain | {"codec": "int8", "dtype": "float16"})
        rows = client.namespace(**plain | {"codec": "int8", "block_shape": (VALUES // 32, 32)})
        alike = client.namespace(**plain | {"codec": "int8", "block_bytes": 2 * 8704, "block_shape": (2176, 4)})
        assert alike.identity.block_bytes == opened["int8"].identity.block_bytes, (
            "for once only the codec's text differs"
        )
        assert [ns.match(keys).blocks for ns in (half, rows, alike)] == [0, 0, 0]
        with ControlClient(daemon.runtime_dir / "control.sock", 20.0) as control:
            listed = [one.codec for one in control.namespaces().namespaces if one.layout == "apart"]
        assert sorted(listed) == sorted(ns.identity.codec for ns in (*opened.values(), half, rows, alike))
        assert "" in listed


@pytest.mark.parametrize("bad", [0, 2, COUNT - 1])
def test_an_unfit_block_breaks_the_chain_there_and_is_said(daemon: DaemonProcess, bad: int, mode: str) -> None:
    blocks, target = bf16_blocks(), np.zeros((COUNT, VALUES), np.uint16)
    blocks[bad, 77] = 0x7FC0  # NaN
    with client_of(daemon, mode) as client:
        ns = client.namespace(**named("int8", layout=f"unfit {bad} {mode}"))
        keys = ns.keys(TOKENS)
        result = ns.store(keys, blocks, wait=True)
        assert (result.accepted, result.lead) == (bad, bad)
        assert result.refused[0] == Refused(bad, Reason.UNFIT)
        assert [one.reason for one in result.refused[1:]] == [Reason.NO_PARENT] * (COUNT - bad - 1)
        assert ns.match(keys).blocks == bad
        blocks[bad, 77] = 0
        wait_until(lambda: ns.store(keys, blocks, wait=True).lead == COUNT)  # tickets are given back with the next tick
        with ns.fetch(keys) as lease:
            assert lease.copy_to(target)
        assert near("int8", target, blocks)


def test_no_blocks_one_block_and_unfit_memory(daemon: DaemonProcess) -> None:
    with client_of(daemon) as client:
        ns = client.namespace(**named("fp8", layout="few"))
        keys, blocks = ns.keys(TOKENS), bf16_blocks()
        assert ns.store([], []).lead == 0
        with ns.fetch([]) as lease:
            assert lease.copy_to([])
        assert ns.store(keys[:1], blocks[:1], wait=True).accepted == 1
        odd = np.zeros(BLOCK_BYTES + 1, np.uint8)[1:]
        with ns.fetch(keys) as lease:
            assert lease.blocks == 1
            assert lease.copy_to([odd])
        assert near("fp8", odd.copy().view(np.uint16), blocks[:1])
        wide = np.zeros((1, 2 * VALUES), np.uint16)
        for unfit in ([bytes(ns.identity.block_bytes)], wide[:, ::2], [bytes(BLOCK_BYTES + 1)]):
            with pytest.raises(UsageError, match=r"exactly|contiguous"):
                ns.store(keys[:1], unfit)
        with pytest.raises(UsageError, match="lossy=True"):
            client.namespace(**named("fp8", lossy=False))


def test_blocks_in_pieces_go_in_and_out(daemon: DaemonProcess) -> None:
    layers, pieces = np.ascontiguousarray(bf16_blocks().reshape(COUNT, 4, -1).transpose(1, 0, 2)), BLOCK_BYTES // 4
    gate = Gate()

    def scattered(memory: Any) -> Scattered:
        at = [[memory[layer, block].ctypes.data for layer in range(4)] for block in range(COUNT)]
        return Scattered(at, [pieces] * 4, memory, gate)

    back = np.zeros_like(layers)
    with client_of(daemon) as client:
        ns = client.namespace(**named("bf16-fixed", layout="pieces"))
        keys = ns.keys(TOKENS)
        assert ns.store(keys, scattered(layers), wait=True).accepted == COUNT
        with ns.fetch(keys) as lease:
            for copying in lease.copyings(scattered(back), 2):
                copying()
            assert lease.valid()
        assert np.array_equal(back, layers)
        gate.close()
        with pytest.raises(WithdrawnError):
            ns.store(ns.keys(range(500, 580)), scattered(layers))


def test_threads_share_a_namespace(daemon: DaemonProcess) -> None:
    with client_of(daemon) as client, ThreadPoolExecutor(4) as pool:
        ns = client.namespace(**named("bf16-fixed", layout="threads"))

        def there_and_back(seed: int) -> bool:
            blocks, target = bf16_blocks(seed), np.zeros((COUNT, VALUES), np.uint16)
            keys = ns.keys(TOKENS, extra=bytes([seed]))
            assert ns.store(keys, blocks, wait=True, space_s=20.0).accepted == COUNT
            with ns.fetch(keys) as lease:
                return lease.copy_to(target) and np.array_equal(target, blocks)

        assert all(pool.map(there_and_back, range(12)))


def test_bytes_that_are_none_of_the_codec_are_a_miss(daemon: DaemonProcess) -> None:
    target = np.zeros((COUNT, VALUES), np.uint16)
    with client_of(daemon) as client:
        ns = client.namespace(**named("int8", layout="foreign"))
        keys = ns.keys(TOKENS)
        as_they_lie = namespace_of(client, ns.identity)  # as `kvctl export` and `import` do
        assert as_they_lie.identity == ns.identity
        assert ns.store(keys[:2], bf16_blocks()[:2], wait=True).accepted == 2
        raw = np.zeros((3, ns.identity.block_bytes), np.uint8)
        with as_they_lie.fetch(keys) as lease:
            assert lease.copy_to(raw[:2])
        assert as_they_lie.store(keys[2:], raw, parent=keys[1], wait=True).accepted == 3
        with ns.fetch(keys) as lease:
            assert lease.blocks == COUNT
            assert lease.copy_to(target[:2])
        with ns.fetch(keys) as lease:
            assert not lease.copy_to(target)
            assert not lease.valid()
        with ns.fetch(keys) as lease:
            assert lease.views_of(range(2)) != ()
            assert lease.valid()
            assert lease.views_of(range(1, COUNT)) == ()
            assert not lease.valid()


def test_the_asyncio_flavour_encodes_and_decodes(daemon: DaemonProcess) -> None:
    async def there_and_back() -> bool:
        async with await aio.connect(daemon.runtime_dir, timeout_s=20.0) as client:
            ns = await client.namespace(**named("bf16-fixed", layout="aio"))
            blocks, target, keys = bf16_blocks(), np.zeros((COUNT, VALUES), np.uint16), ns.keys(TOKENS)
            assert (await ns.store(keys, blocks, wait=True)).accepted == COUNT
            async with ns.fetch(keys) as lease:
                return await lease.copy_to(target) and np.array_equal(target, blocks)

    assert asyncio.run(there_and_back())


def test_auto_is_raw_on_a_fast_link_and_lossless_on_a_slow_one(daemon: DaemonProcess) -> None:
    with client_of(daemon) as client:
        fields = named("auto", layout="auto", lossy=False)
        fast = client.namespace(**fields, link_bytes_per_s=1e15)
        slow = client.namespace(**fields, link_bytes_per_s=1e6)
        lossy = client.namespace(**fields | {"lossy": True}, link_bytes_per_s=1e6)
        assert (fast.codec, fast.identity.codec) == (None, "")
        assert [ns.codec.encoding for ns in (slow, lossy) if ns.codec] == [Encoding.BF16_FIXED, Encoding.INT4_G64]
        by_name = client.namespace(**named("bf16-fixed", layout="auto"))
        assert slow.identity == by_name.identity, "who names it shares it"
        assert client.namespace(**fields | {"dtype": "float32"}).codec is None
        untold = client.namespace(**fields).codec
        assert untold is None or untold.encoding.is_lossless
        with pytest.raises(UsageError, match='is for codec "auto"'):
            client.namespace(**named("int8", layout="auto"), link_bytes_per_s=1e9)
        with pytest.raises(UsageError, match="above 0"):
            client.namespace(**fields, link_bytes_per_s=0)


def test_the_asyncio_flavour_chooses_as_well(daemon: DaemonProcess) -> None:
    async def chosen() -> str:
        async with await aio.connect(daemon.runtime_dir, timeout_s=20.0) as client:
            ns = await client.namespace(**named("auto", layout="aio auto", lossy=False), link_bytes_per_s=1e6)
            return ns.identity.codec

    assert asyncio.run(chosen()).startswith("bf16-fixed/")
