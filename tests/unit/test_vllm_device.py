"""The vLLM connector where the engine's memory is a device's: on the emulation, a real client and a scripted daemon.

The engine's stream computes what the test says, when it says so.
"""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import kvclient
from kvclient import devices
from kvclient.client import identity_of
from kvclient.codecs import codec_of
from kvclient.integrations import vllm_worker
from kvclient.integrations.vllm_device import EngineStream
from kvclient.integrations.vllm_jobs import LoadJob, Plan, Progress, SaveJob
from kvclient.integrations.vllm_layout import Layout, layout_of
from kvclient.integrations.vllm_settings import Settings
from kvclient.integrations.vllm_worker import Worker
from kvclient.namespace import Namespace
from kvkernels.device.emulated_streams import EmulatedStream
from kvkernels.device.emulated_tensor import EmulatedTensor
from kvkernels.device.emulation import Emulation
from kvkernels.device.port import DeviceError, Direction
from kvproto.errors import UsageError
from tests.peer import Peer
from tests.unit.client_kit import client_of, keys_of, namespace_of, wait_until
from tests.unit.engine_kit import vllm_connector

pytestmark = pytest.mark.timeout(60)
BLOCKS, LAYERS, HEADS, TOKENS, VALUES = 12, 3, 2, 16, 8
BLOCK_BYTES = LAYERS * HEADS * TOKENS * VALUES * 2
PATIENCE_S = 30.0
Caches = dict[str, EmulatedTensor]


@pytest.fixture
def device() -> Iterator[Emulation]:
    made = Emulation()
    yield made
    made.lost = ""
    devices.forget(made)
    made.close()


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that stands still for a while makes no load bad."""
    for name in ("AT_ONCE_S", "AT_ONCE_WAIT_S"):
        monkeypatch.setattr(vllm_worker, name, PATIENCE_S)


def caches_of(device: Emulation, *, by_blocks: bool = True) -> Caches:
    """As vLLM hands them over: [blocks, heads, tokens, keys and values]; `by_blocks`: a block of all layers in one."""
    shape = (BLOCKS, HEADS, TOKENS, VALUES)
    if not by_blocks:
        return {f"layer {number}": EmulatedTensor.zeros(device, shape, "uint16") for number in range(LAYERS)}
    whole = EmulatedTensor.zeros(device, (BLOCKS, LAYERS, HEADS, TOKENS, VALUES), "uint16")
    return {f"layer {number}": whole[:, number] for number in range(LAYERS)}


def contents(seed: int, blocks: int = BLOCKS) -> "np.ndarray[Any, Any]":
    """Of so many blocks: [blocks, layers, ...]."""
    random = np.random.default_rng(seed)
    return random.integers(1, 1 << 16, (blocks, LAYERS, HEADS, TOKENS, VALUES), dtype=np.uint16)


class Bench(NamedTuple):
    """A worker on a device, the stream that its engine computes on, and its daemon."""

    worker: Worker
    caches: Caches
    compute: EmulatedStream
    peer: Peer
    namespace: Namespace
    device: Emulation

    def write(self, blocks: Sequence[int], values: "np.ndarray[Any, Any]") -> None:
        """What a forward does."""
        for layer, tensor in enumerate(self.caches.values()):
            tensor.array[list(blocks)] = values[:, layer]

    def read(self, blocks: Sequence[int]) -> "np.ndarray[Any, Any]":
        return np.stack([tensor.array[list(blocks)] for tensor in self.caches.values()], axis=1)

    def stored(self, keys: Sequence[bytes]) -> list[bytes]:
        """What the daemon has of a chain."""
        with self.namespace.fetch(keys) as lease:
            return [bytes(view) for view in lease.views]

    def put(self, keys: Sequence[bytes], values: "np.ndarray[Any, Any]") -> None:
        """Have the daemon know a chain."""
        assert self.namespace.store(keys, [block.tobytes() for block in values], wait=True).accepted == len(keys)

    def ended(self, *jobs: SaveJob) -> Progress:
        """What became of saves."""
        heard = Progress()

        def all_did() -> bool:
            nonlocal heard
            heard = heard.joined(self.worker.take_progress() or Progress())
            return set(heard.saved) == {job.number for job in jobs}

        wait_until(all_did)
        return heard

    def received(self, *names: str) -> None:
        heard: set[str] = set()

        def all_came() -> bool:
            heard.update(self.worker.take_received())
            return heard == set(names)

        wait_until(all_came)

    def held(self, direction: Direction) -> Callable[[], None]:
        """Hold up the client's copies this way, until what is returned is called."""
        return hold(devices.copies_for(next(iter(self.caches.values())).device)._streams[direction])


def hold(stream: object, then: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """Have a stream do nothing until what is returned is called, and then this."""
    assert isinstance(stream, EmulatedStream)
    gate = threading.Event()

    def wait() -> None:
        assert gate.wait(PATIENCE_S)
        then()

    stream.submit(wait)
    return gate.set


@contextmanager
def bench(
    folder: Path, device: Emulation, *, by_blocks: bool = True, namespace: Callable[[kvclient.Client], Namespace] | None
    = None,
) -> Iterator[Bench]:  # fmt: skip
    caches, compute = caches_of(device, by_blocks=by_blocks), device.stream()
    with Peer(folder) as peer, client_of(peer) as client:
        made = namespace(client) if namespace else namespace_of(client, BLOCK_BYTES)
        stream = EngineStream(next(iter(caches.values())).device, lambda: compute)
        worker = Worker(made, made, layout_of(caches, BLOCKS), disk_wait_s=PATIENCE_S, stream=stream)
        try:
            yield Bench(worker, caches, compute, peer, made, device)
        finally:
            worker.stop()
            device.lost = ""
            compute.close()


def load_of(name: str, keys: Sequence[bytes], blocks: Sequence[int], *, at_once: bool) -> LoadJob:
    return LoadJob(name, tuple(keys), tuple(blocks), at_once)


def save_of(keys: Sequence[bytes], blocks: Sequence[int], number: int = 0) -> SaveJob:
    return SaveJob(number, f"request {number}", tuple(keys), None, tuple(blocks))


class InThread:
    """The engine's thread, while the test's looks on."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._over = threading.Event()
        self._trouble: list[Exception] = []
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 -- the test's thread is told
            self._trouble.append(error)
        finally:
            self._over.set()

    def over(self, within_s: float) -> bool:
        over = self._over.wait(within_s)
        assert not self._trouble, self._trouble
        return over


# -- where blocks lie --------------------------------------------------------------------------------------------------


def test_a_block_of_all_layers_is_one_piece_where_the_engine_keeps_it_so(device: Emulation) -> None:
    together, apart = (layout_of(caches_of(device, by_blocks=each), BLOCKS) for each in (True, False))
    assert together.lengths == together.strides == (BLOCK_BYTES,)
    assert apart.lengths == apart.strides == (BLOCK_BYTES // LAYERS,) * LAYERS
    assert together.words == apart.words, "the same bytes in the same order"
    host = layout_of(
        {f"layer {number}": torch.zeros((BLOCKS, HEADS, TOKENS, VALUES), dtype=torch.uint16) for number in range(3)},
        BLOCKS,
    )
    assert host.block_bytes == apart.block_bytes
    assert (host.place, apart.place) == (None, caches_of(device)["layer 0"].device)
    assert apart.words.endswith(" emulation"), "other kernels may keep something else in memory of the same shape"
    assert "emulation" not in host.words


def test_memory_that_no_one_device_reaches_is_refused(device: Emulation) -> None:
    other, ours = Emulation(1), caches_of(device, by_blocks=False)
    theirs = EmulatedTensor.zeros(other, (BLOCKS, HEADS, TOKENS, VALUES), "uint16")
    freed = EmulatedTensor.zeros(device, (BLOCKS, HEADS, TOKENS, VALUES), "uint16")
    device.free(freed._owner)  # type: ignore[arg-type]
    host = torch.zeros((BLOCKS, HEADS, TOKENS, VALUES), dtype=torch.uint16)
    for wrong, why in (
        ({**ours, "odd": theirs}, "odd is on emulation:1, and layer 0 on emulation:0"),
        ({**ours, "odd": host}, "odd is on cpu, and layer 0 on emulation:0"),
        ({"host": host, **ours}, "layer 0 is on emulation:0, and host on cpu"),
        ({**ours, "odd": freed}, "odd is on emulation:0: .* not memory of this device"),
        ({"odd": host.to("meta")}, "odd is on meta: .* only memory of the CPU and of CUDA devices"),
    ):
        with pytest.raises(UsageError, match=why):
            layout_of(wrong, BLOCKS)
    layout_of(ours, BLOCKS)
    devices.forget(other)
    other.close()


# -- in order with the engine's stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("by_blocks", [True, False])
def test_blocks_go_to_the_daemon_and_come_back_into_others(
    tmp_path: Path, device: Emulation, *, by_blocks: bool, at_once: bool
) -> None:
    with bench(tmp_path, device, by_blocks=by_blocks) as one:
        keys, values, from_, to = keys_of(4), contents(1, 4), (7, 2, 3, 9), (0, 11, 4, 5)
        one.write(from_, values)
        job = save_of(keys, from_)
        one.worker.end(Plan(saves=[job]))
        assert one.ended(job) == Progress({0: 1})
        assert one.stored(keys) == [block.tobytes() for block in values]
        assert not one.read(to).any(), "the control"
        one.worker.begin(Plan(loads=[load_of("a", keys, to, at_once=at_once)]))
        if not at_once:
            one.received("a")
        assert np.array_equal(one.read(to), values)
        assert not np.array_equal(one.read(to[::-1]), values), "the control"
        assert not one.read((1, 6, 8, 10)).any(), "and no other block was written"
        assert one.worker.take_bad_blocks() == set()
        counts = one.worker.take_counts()
        assert (counts["saved_blocks"], counts["loaded_blocks"]) == (4, 4)


def test_a_save_comes_behind_the_forward_of_its_step_and_before_what_is_asked_for_later(
    tmp_path: Path, device: Emulation
) -> None:
    with bench(tmp_path, device) as one:
        keys, values = keys_of(2), contents(1, 2)
        compute_now = hold(one.compute, lambda: one.write((3, 4), values))
        job = save_of(keys, (3, 4))
        one.worker.end(Plan(saves=[job]))
        go_on = hold(one.compute)  # the next forward
        committed = InThread(lambda: one.peer.wait_for(lambda: bool(one.peer.committed)))
        assert not committed.over(0.1), "what that forward has not written yet"
        assert one.stored(keys) == []
        compute_now()
        assert one.ended(job) == Progress({0: 1}), "although the engine's stream is busy again"
        go_on()
        assert one.stored(keys) == [block.tobytes() for block in values]
        assert one.stored(keys) != [bytes(BLOCK_BYTES)] * 2, "the control: what was there before that forward"


def test_a_load_comes_behind_who_had_its_blocks(tmp_path: Path, device: Emulation) -> None:
    with bench(tmp_path, device) as one:
        keys, values = keys_of(2), contents(1, 2)
        one.put(keys, values)
        written: list[bool] = []

        def finish_with_them() -> None:
            written.append(bool(one.read((3, 4)).any()))
            one.write((3, 4), contents(2, 2))

        compute_now = hold(one.compute, finish_with_them)
        one.worker.begin(Plan(loads=[load_of("a", keys, (3, 4), at_once=False)], forward=True))
        go_on = hold(one.compute)
        one.worker.idle()
        assert one.worker.take_received() == set()
        compute_now()
        one.received("a")
        assert written == [False]
        assert np.array_equal(one.read((3, 4)), values)
        assert not np.array_equal(one.read((3, 4)), contents(2, 2)), "the control"
        go_on()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_load_is_over_when_its_last_byte_is_there_and_its_lease_is_held_so_long(
    tmp_path: Path, device: Emulation, *, at_once: bool
) -> None:
    with bench(tmp_path, device) as one:
        keys, values = keys_of(2), contents(1, 2)
        one.put(keys, values)
        go_on = one.held(Direction.TO_DEVICE)
        seen: list[bool] = []

        def step() -> None:
            one.worker.begin(Plan(loads=[load_of("a", keys, (3, 4), at_once=at_once)], forward=True))
            if not at_once:
                one.received("a")
            one.compute.submit(lambda: seen.append(np.array_equal(one.read((3, 4)), values)))  # the forward

        engine = InThread(step)
        wait_until(lambda: one.peer.leases)
        assert not engine.over(0.1)
        assert one.namespace.match(keys).blocks == 2, "a RELEASE would ride on this"
        assert one.peer.released == []
        assert not one.read((3, 4)).any()
        go_on()
        assert engine.over(PATIENCE_S)
        one.compute.synchronize()
        assert seen == [True]
        assert one.namespace.match(keys).blocks == 2
        one.peer.wait_for(lambda: len(one.peer.released) == 1)


def test_blocks_are_not_used_again_while_a_copy_out_of_them_is_under_way(tmp_path: Path, device: Emulation) -> None:
    with bench(tmp_path, device) as one:
        first = save_of(keys_of(1, seed=2), (0,), 0)
        one.worker.end(Plan(saves=[first]))
        one.ended(first)
        devices.copies_for(one.caches["layer 0"].device).pins.settle()  # from here on no buffer stands in between
        keys, values = keys_of(2), contents(1, 2)
        one.write((3, 4), values)
        go_on = one.held(Direction.TO_HOST)
        job = save_of(keys, (3, 4), 1)
        one.worker.end(Plan(saves=[job]))
        wait_until(lambda: one.worker._saving[1].gate.read_s is not None)

        def next_step() -> None:
            one.worker.fence(Plan(fences={1}))
            one.compute.submit(lambda: one.write((3, 4), contents(2, 2)))

        engine = InThread(next_step)
        assert not engine.over(0.1), "the daemon would get what is written next"
        go_on()
        assert engine.over(PATIENCE_S)
        assert one.ended(job) == Progress({1: 1})
        one.compute.synchronize()
        assert one.stored(keys) == [block.tobytes() for block in values]
        assert one.stored(keys) != [block.tobytes() for block in one.read((3, 4))], "the control"


def test_a_save_that_waits_for_a_forward_is_withdrawn_at_once(tmp_path: Path, device: Emulation) -> None:
    with bench(tmp_path, device) as one:
        keys = keys_of(4)
        compute_now = hold(one.compute)
        jobs = [save_of(keys[:2], (3, 4), 0), save_of(keys[2:], (5, 6), 1)]
        one.worker.end(Plan(saves=jobs))
        assert InThread(lambda: one.worker.fence(Plan(fences={0}))).over(PATIENCE_S), "no step waits for a forward here"
        compute_now()
        assert one.ended(*jobs) == Progress({0: 1, 1: 1}, {0})
        assert one.stored(keys[:2]) == []
        assert len(one.stored(keys[2:])) == 2, "the control"


# -- a device that fails -----------------------------------------------------------------------------------------------


def test_a_lost_device_is_a_miss_and_refuses_saves(tmp_path: Path, device: Emulation) -> None:
    with bench(tmp_path, device) as one:
        keys, values = keys_of(6), contents(1, 4)
        one.put(keys[:4], values)
        one.worker.begin(Plan(loads=[load_of("a", keys[:2], (0, 1), at_once=True)]))
        assert one.worker.take_bad_blocks() == set(), "the control"
        device.lose("it fell off the bus")
        one.worker.fence(Plan(forward=True))
        one.worker.begin(
            Plan([load_of("b", keys[:2], (2, 3), at_once=True), load_of("c", keys[:4], (4, 5, 6, 7), at_once=False)])
        )
        one.received("c")
        job = save_of(keys[4:], (0, 1))
        one.worker.end(Plan(saves=[job]))
        assert one.ended(job) == Progress({0: 1}, {0})
        assert one.worker.take_bad_blocks() == {2, 3, 4, 5, 6, 7}
        counts = one.worker.take_counts()
        assert (counts["loaded_blocks"], counts["failed_blocks"], counts["refused_blocks"]) == (2, 6, 2)
        assert one.namespace.match(keys).blocks == 4, "something was stored that never left the device"


@pytest.mark.parametrize("at_once", [True, False])
def test_of_a_copy_that_fails_half_way_nothing_counts_however_good_its_lease(
    tmp_path: Path, device: Emulation, monkeypatch: pytest.MonkeyPatch, *, at_once: bool
) -> None:
    real, fails = devices.Copies.copy, [True]

    def half(copies: devices.Copies, direction: Direction, moves: Sequence[Any], *more: Any) -> Any:
        if not fails[0]:
            return real(copies, direction, moves, *more)
        real(copies, direction, moves[: len(moves) // 2], *more)
        raise DeviceError("the rest of it is not")

    with bench(tmp_path, device) as one:
        keys, values = keys_of(4), contents(1, 4)
        one.put(keys, values)
        monkeypatch.setattr(devices.Copies, "copy", half)
        for each in (True, False):
            fails[0] = each
            one.worker.begin(Plan(loads=[load_of("a", keys, (4, 5, 6, 7), at_once=at_once)]))
            if not at_once:
                one.received("a")
            assert one.worker.take_bad_blocks() == ({4, 5, 6, 7} if each else set())
            assert np.array_equal(one.read((4, 5)), values[:2]), "some of it is there"
            assert np.array_equal(one.read((6, 7)), values[2:]) is not each


def test_a_stream_that_cannot_be_waited_for_ends_no_step(tmp_path: Path, device: Emulation) -> None:
    with bench(tmp_path, device) as one:
        keys = keys_of(4)
        one.put(keys[:2], contents(1, 2))
        stream = one.worker._stream
        assert stream is not None
        stream._current = lambda: 99_999
        job = save_of(keys[2:], (0, 1))
        one.worker.begin(Plan(loads=[load_of("a", keys[:2], (4, 5), at_once=True)]))
        one.worker.end(Plan(saves=[job]))
        assert one.ended(job) == Progress({0: 1}, {0})
        assert one.worker.take_bad_blocks() == {4, 5}
        stream._current = lambda: one.compute
        one.worker.begin(Plan(loads=[load_of("a", keys[:2], (4, 5), at_once=True)]))
        assert one.worker.take_bad_blocks() == set(), "the control"


# -- encoded -----------------------------------------------------------------------------------------------------------


def test_blocks_are_encoded_and_decoded_on_the_device_behind_the_engines_work(
    tmp_path: Path, device: Emulation
) -> None:
    codec = codec_of("bf16-fixed", dtype="bfloat16", block_bytes=BLOCK_BYTES)
    assert codec is not None

    def namespace(client: kvclient.Client) -> Namespace:
        named: Namespace = client.namespace(
            model="m", engine="e", layout="l", dtype="bfloat16", block_bytes=codec.stored_bytes, codec=codec.text
        )
        return named.encoded_by(codec)

    with bench(tmp_path, device, namespace=namespace) as one:
        keys = keys_of(3)
        drawn = np.random.default_rng(5).standard_normal((3, LAYERS, HEADS, TOKENS, VALUES), dtype=np.float32)
        values = (drawn.view(np.uint32) >> 16).astype(np.uint16)
        compute_now = hold(one.compute, lambda: one.write((1, 2, 3), values))
        job = save_of(keys, (1, 2, 3))
        one.worker.end(Plan(saves=[job]))
        compute_now()
        assert one.ended(job) == Progress({0: 1})
        one.peer.wait_for(lambda: len(one.peer.blocks) == 3)
        one.worker.begin(Plan(loads=[load_of("a", keys, (9, 8, 7), at_once=True)]))
        assert one.worker.take_bad_blocks() == set()
        assert np.array_equal(one.read((9, 8, 7)), values)
        assert not np.array_equal(one.read((7, 8, 9)), values), "the control"
        assert codec.stored_bytes < BLOCK_BYTES
        device.lose("it fell off the bus")
        one.worker.begin(Plan(loads=[load_of("a", keys, (4, 5, 6), at_once=True)]))
        assert one.worker.take_bad_blocks() == {4, 5, 6}


# -- what the connector makes of it ------------------------------------------------------------------------------------


@pytest.fixture
def module() -> Any:
    """Of the connector, beside as much of vLLM as that needs."""
    return vllm_connector()


def test_a_gpus_memory_is_wished_for_by_blocks_and_a_processors_as_it_comes(module: Any) -> None:
    wished = module.KvstoredConnector.get_required_kvcache_layout
    for kind, layout in (("cuda", "BLHNC"), ("cpu", None)):
        assert wished(SimpleNamespace(device_config=SimpleNamespace(device_type=kind))) == layout


def registered(
    module: Any, monkeypatch: pytest.MonkeyPatch, client: kvclient.Client, caches: dict[str, Any], **settings: Any
) -> Any:
    """A connector's worker half, and what it tells the scheduler's."""
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(), cache_config=SimpleNamespace(block_size=TOKENS),
        parallel_config=SimpleNamespace(),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=settings),
    )  # fmt: skip
    memory = SimpleNamespace(
        num_blocks=BLOCKS, needs_kv_cache_zeroing=False,
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(head_size=VALUES))],
    )  # fmt: skip

    def identity(_config: Any, layout: Layout, *_: Any) -> Any:
        return identity_of(
            model="m", engine="e", layout=layout.words, dtype="d", block_tokens=TOKENS, block_bytes=layout.block_bytes,
            revision="r", adapter="", tp=(0, 1), pp=(0, 1),
        )  # fmt: skip

    monkeypatch.setattr(module, "_trouble", lambda *_: "")
    monkeypatch.setattr(module, "_identity", identity)
    monkeypatch.setattr(module.KvstoredConnector, "_client", lambda *_, **__: client)
    connector = module.KvstoredConnector(config, 1, memory)
    connector.register_kv_caches(caches)
    return connector


def test_a_gpus_kernels_are_in_the_name_of_what_it_stores(
    device: Emulation, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "engine_identity", lambda _config, *, layout, **_: layout)
    monkeypatch.setattr(module, "kernels_of", lambda _: "a GPU and its kernels")
    monkeypatch.setattr(module, "_rank", lambda _: 0)
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    host = {"layer": torch.zeros((BLOCKS, HEADS, TOKENS, VALUES), dtype=torch.uint16)}
    for caches, more in ((caches_of(device), " a GPU and its kernels"), (host, "")):
        layout = layout_of(caches, BLOCKS)
        assert module._identity(config, layout, caches, Settings(), TOKENS) == layout.words + more


def test_an_engine_on_a_processor_loads_nothing_of_devices() -> None:
    code = (
        "import sys, torch, kvclient.integrations.vllm_worker, kvclient.integrations.vllm_scheduler\n"
        "from kvclient.integrations.vllm_layout import layout_of\n"
        "layout_of({'layer': torch.zeros((4, 2))}, 4).scattered([1])\n"
        "ours = ('kvkernels.device.', 'kvclient.devices', 'kvclient.integrations.vllm_device')\n"
        "print([name for name in sys.modules if name.startswith(ours)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['kvkernels.device.port']"


def test_the_connector_copies_behind_the_stream_that_torch_computes_on(
    tmp_path: Path, device: Emulation, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, caches, asked = device.stream(), caches_of(device), []

    def current(place: object) -> object:
        asked.append(place)
        return SimpleNamespace(cuda_stream=compute.handle)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    with Peer(tmp_path) as peer, client_of(peer) as client:
        connector = registered(module, monkeypatch, client, caches)
        values, keys = contents(1, 2), keys_of(2)

        def forward() -> None:
            for layer, tensor in enumerate(caches.values()):
                tensor.array[[1, 2]] = values[:, layer]

        compute_now = hold(compute, forward)
        meta = module._Meta(Plan(saves=[save_of(keys, (1, 2))], forward=True))
        connector.handle_preemptions(meta)
        connector.bind_connector_metadata(meta)
        connector.start_load_kv(None)
        connector.wait_for_save()
        compute_now()
        wait_until(lambda: connector.saving == 0)
        peer.wait_for(lambda: len(peer.blocks) == 2)
        meta = module._Meta(Plan(loads=[load_of("a", keys, (5, 6), at_once=True)], forward=True))
        connector.bind_connector_metadata(meta)
        connector.start_load_kv(None)
        for layer, tensor in enumerate(caches.values()):
            assert np.array_equal(tensor.array[[5, 6]], values[:, layer])
            assert not np.array_equal(tensor.array[[6, 5]], values[:, layer]), "the control"
        assert asked == [caches["layer 0"].device] * 2
        connector.shutdown()
    compute.close()


def test_what_only_a_processor_does_is_left_out_on_a_device(
    tmp_path: Path, device: Emulation, module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = {"layer": torch.zeros((BLOCKS, HEADS, TOKENS, VALUES), dtype=torch.uint16)}
    with Peer(tmp_path) as peer, client_of(peer) as client, caplog.at_level(logging.WARNING, vllm_worker.__name__):
        for caches, on_host in ((caches_of(device), False), (host, True)):
            connector = registered(module, monkeypatch, client, caches)
            hellos = [connector.get_handshake_metadata()]
            assert (connector._near(hellos) is connector._worker) is on_host
            assert (connector._near(hellos) is None) is not on_host
            connector.shutdown()
            assert not caplog.records
            connector = registered(module, monkeypatch, client, caches, layerwise=True)
            assert (connector._worker._layers is not None) is on_host
            connector.shutdown()
            assert ["layerwise" in record.message for record in caplog.records] == [True] * (not on_host)
            caplog.clear()


def test_a_codec_that_no_kernel_takes_is_refused_when_the_engine_starts(module: Any, device: Emulation) -> None:
    layout = layout_of(caches_of(device), BLOCKS)
    for row, why in ((VALUES, ""), (3, "rows of 3")):
        shape = (BLOCK_BYTES // 2 // row, row)
        codec = codec_of("int8", dtype="bfloat16", block_bytes=BLOCK_BYTES, block_shape=shape, lossy=True)
        if not why:
            assert module._stream_of(layout, codec) is not None
            continue
        with pytest.raises(UsageError, match=why):
            module._stream_of(layout, codec)
