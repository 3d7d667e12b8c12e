"""The tier in a GPU's memory, through a real daemon on the emulation: what is loaded again comes from there."""

import http.client
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import kvclient
from bench.process import DaemonProcess
from kvclient.attached import AttachedMemory
from tests.attached_kit import BLOCK_BYTES, PAGES, Engine, connected, engine, namespace_of, where
from tests.node import until

HALF = PAGES // 2
FIRST, SECOND = list(range(HALF)), list(range(HALF, PAGES))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("daemon")
    arguments = ("--dram", "64MiB", "--arena", "8MiB", "--policy-dram", "lru", "--gpu-hbm", "32MiB", *where.arguments)
    with DaemonProcess(
        folder / "run", *arguments, "--metrics-listen", str(folder / "metrics"), log_file=folder / "log"
    ) as process:
        yield process


@pytest.fixture
def client(daemon: DaemonProcess) -> Iterator[kvclient.Client]:
    with connected(daemon) as made:
        yield made


@pytest.fixture
def kv() -> Iterator[Engine]:
    with engine() as made:
        yield made


def figures(daemon: DaemonProcess) -> dict[str, float]:
    """What metrics say of the device, without what all their names begin with."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(daemon.runtime_dir.parent / "metrics"))
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {
        sample.name.removeprefix("kvstored_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if where.is_named(sample.labels.get("device", ""))
    }


def moved(daemon: DaemonProcess, before: dict[str, float], name: str, by: float) -> bool:
    return until(lambda: figures(daemon)[name] - before[name] == by)


def load(namespace: kvclient.Namespace, keys: Sequence[bytes], memory: AttachedMemory, kv: Engine) -> None:
    """And see that it is right."""
    kv.put(SECOND, np.zeros_like(kv.get(SECOND)))
    assert namespace.load(keys, memory[SECOND]).blocks == HALF
    assert np.array_equal(kv.get(SECOND), kv.values[:, :HALF])


def test_what_is_loaded_twice_comes_from_there_the_third_time(
    daemon: DaemonProcess, client: kvclient.Client, kv: Engine
) -> None:
    namespace = namespace_of(client, "again")
    keys = list(namespace.keys(list(range(4 * HALF))))
    memory = kv.attach(client)
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    before = figures(daemon)
    assert before["device_emulated"] == where.emulated
    assert before["hbm_capacity_bytes"] == 32 << 20
    load(namespace, keys, memory, kv)
    load(namespace, keys, memory, kv)
    assert moved(daemon, before, "hbm_promoted_blocks_total", HALF)
    assert figures(daemon)["hbm_hit_blocks_total"] == before["hbm_hit_blocks_total"]
    load(namespace, keys, memory, kv)
    assert moved(daemon, before, "hbm_hit_blocks_total", HALF)
    assert moved(daemon, before, "device_loaded_bytes_total", 3 * HALF * BLOCK_BYTES)


def test_a_prefetch_into_it_does_not_wait_for_a_second_load(
    daemon: DaemonProcess, client: kvclient.Client, kv: Engine
) -> None:
    namespace = namespace_of(client, "wanted")
    keys = list(namespace.keys(list(range(4 * HALF))))
    memory = kv.attach(client)
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    before = figures(daemon)
    namespace.prefetch(keys[:10], tier="hbm")
    assert moved(daemon, before, "hbm_promoted_blocks_total", 10)
    load(namespace, keys, memory, kv)  # ten of them from there, the others not
    assert moved(daemon, before, "hbm_hit_blocks_total", 10)


def test_what_was_stored_anew_under_a_key_is_never_the_old_copy(
    daemon: DaemonProcess, client: kvclient.Client, kv: Engine
) -> None:
    namespace = namespace_of(client, "anew")
    keys = list(namespace.keys(list(range(4 * HALF))))
    memory = kv.attach(client)
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    before = figures(daemon)
    load(namespace, keys, memory, kv)
    load(namespace, keys, memory, kv)
    assert moved(daemon, before, "hbm_promoted_blocks_total", HALF)
    namespace.delete(keys)
    assert namespace.load(keys, memory[SECOND]).blocks == 0
    kv.values = 255 - kv.values
    kv.put(FIRST, kv.values[:, :HALF])
    assert namespace.save(keys, memory[FIRST]).accepted == HALF
    load(namespace, keys, memory, kv)
    load(namespace, keys, memory, kv)
    assert moved(daemon, before, "hbm_promoted_blocks_total", 2 * HALF)
    load(namespace, keys, memory, kv)
    assert moved(daemon, before, "hbm_hit_blocks_total", HALF)


def test_more_than_it_holds_is_still_right(daemon: DaemonProcess, client: kvclient.Client, kv: Engine) -> None:
    """96 chains of half a MiB, 48 MiB in all, each loaded three times."""
    namespace = namespace_of(client, "many")
    memory = kv.attach(client)
    before = figures(daemon)
    for number in range(96):
        keys = list(namespace.keys(list(range(4 * HALF)), extra=number.to_bytes(2, "little")))
        kv.values = np.roll(kv.values, 1, axis=2)
        kv.put(FIRST, kv.values[:, :HALF])
        assert namespace.save(keys, memory[FIRST]).accepted == HALF
        for _ in range(3):
            load(namespace, keys, memory, kv)
    assert until(lambda: figures(daemon)["hbm_evicted_blocks_total"] > before["hbm_evicted_blocks_total"])
    assert figures(daemon)["hbm_used_bytes"] <= 32 << 20


def test_a_tier_that_does_not_fit_is_said_and_the_daemon_serves(tmp_path: Path) -> None:
    arguments = ("--dram", "64MiB", "--gpu-hbm", "1TiB", *where.arguments)
    with (
        DaemonProcess(tmp_path / "run", *arguments, log_file=tmp_path / "log") as daemon,
        connected(daemon) as client, engine() as kv,
    ):  # fmt: skip
        namespace = namespace_of(client, "without")
        keys = list(namespace.keys(list(range(4))))
        memory = kv.attach(client)
        assert namespace.save(keys, memory[[0]]).accepted == 1
        assert namespace.load(keys, memory[[1]]).blocks == 1
        log = (tmp_path / "log").read_text()
        assert "see gpu.hbm" in log
        assert "see gpu.devices" not in log


def test_what_memory_has_evicted_comes_back_from_its_copy(tmp_path: Path) -> None:
    arguments = ("--dram", "16MiB", "--arena", "4MiB", "--policy-dram", "lru", "--gpu-hbm", "32MiB", *where.arguments)
    with (
        DaemonProcess(tmp_path / "run", *arguments, log_file=tmp_path / "log") as daemon,
        connected(daemon) as client, engine() as kv,
    ):  # fmt: skip
        namespace, memory = namespace_of(client, "evicted"), kv.attach(client)
        keys, control = (list(namespace.keys(list(range(4 * HALF)), extra=name)) for name in (b"kept", b"control"))
        for each in (keys, control):
            assert namespace.save(each, memory[FIRST]).accepted == HALF
        namespace.prefetch(keys, tier="hbm")
        assert until(lambda: namespace.match(keys).tiers.hbm == HALF)
        right = kv.values
        kv.put(FIRST, 255 - kv.values[:, :HALF])
        for number in range(40):  # 20 MiB
            others = namespace.keys(list(range(4 * HALF)), extra=number.to_bytes(2, "little"))
            assert namespace.save(list(others), memory[FIRST]).accepted == HALF
        assert namespace.match(keys).blocks < HALF
        assert until(lambda: namespace.match(keys).blocks == HALF)
        assert namespace.match(control).blocks == 0
        kv.values = right
        load(namespace, keys, memory, kv)
        namespace.delete(keys)
        assert namespace.match(keys).blocks == 0
