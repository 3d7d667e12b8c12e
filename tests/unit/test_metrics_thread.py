"""The metrics thread beside an owner that is well, slow, or wrong: one snapshot a second, however many ask."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.insight.misses import Misses
from kvstored import metrics as module
from kvstored.loop import Loop
from kvstored.metrics import Metrics
from kvstored.metrics_snapshot import Snapshot, TenantFigures, take_snapshot
from kvstored.metrics_table import METRICS, Facts
from tests.core import Core, chain
from tests.node import until
from tests.unit.test_metrics_http import read_all, status_of


class Owner:
    """A loop on a thread of its own, and what it says of a store."""

    def __init__(self) -> None:
        self.core = Core()
        self.taken = 0
        self.broken = False
        self.hit_bytes = 0
        self.loop = Loop()
        self._misses = Misses(self.core.store)
        self._thread = threading.Thread(target=self.loop.run, args=(lambda: time.monotonic_ns() + 10**9,))

    def take(self) -> Snapshot:
        self.taken += 1
        if self.broken:
            raise RuntimeError("a bug")
        snapshot = take_snapshot(self.core.store, self._misses, ["configured"], (), None, 0)
        tenant = TenantFigures("t", hit_bytes=(self.hit_bytes, 0), byte_s=(0.5, None))
        object.__setattr__(snapshot, "tenants", (*snapshot.tenants, tenant))
        return snapshot

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.loop.stop()
        self._thread.join()
        self.loop.close()


@contextmanager
def watched(owner: Owner, path: Path, *, run: bool = True) -> Iterator[Metrics]:
    serving = Metrics(path, owner.loop, owner.take, lambda: True)
    if run:
        owner.start()
    serving.start()
    try:
        yield serving
    finally:
        serving.stop()
        owner.stop()


def get(path: Path, page: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(20.0)
        asking.connect(str(path))
        asking.sendall(f"GET {page} HTTP/1.1\r\n\r\n".encode())
        return read_all(asking)


@pytest.fixture(autouse=True)
def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on fakes has no memory of a host to tell of."""
    table = tuple(one for one in METRICS if one.name != "kvstored_memory_bytes")
    monkeypatch.setattr("kvstored.metrics_render.METRICS", table)


def test_a_snapshot_is_made_once_however_many_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 1000.0)
    owner, path = Owner(), tmp_path / "s"
    with watched(owner, path):
        assert until(lambda: status_of(get(path, "/metrics")) == 200)
        answers = {get(path, "/metrics") for _ in range(50)}
        assert len(answers) == 1, "made anew each time"
        assert owner.taken == 1
        assert b'kvstored_sessions{tenant="configured"} 0.0' in answers.pop()
    assert not path.exists()


def test_an_owner_that_never_comes_is_asked_once_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    owner, path = Owner(), tmp_path / "s"
    with watched(owner, path, run=False):
        assert status_of(get(path, "/healthz")) == 200
        assert status_of(get(path, "/metrics")) == 503, "there are no figures yet"
        monkeypatch.setattr(module, "HUNG_S", 0.05)
        assert until(lambda: status_of(get(path, "/healthz")) == 503)
        assert status_of(get(path, "/readyz")) == 503
        for _ in range(20):
            get(path, "/metrics")
        assert len(owner.loop._calls) == 1, "questions pile up"
        owner.start()
        assert until(lambda: status_of(get(path, "/healthz")) == 200)
        assert until(lambda: status_of(get(path, "/metrics")) == 200)


def test_figures_that_cannot_be_taken_harm_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    owner, path = Owner(), tmp_path / "s"
    with watched(owner, path):
        assert until(lambda: status_of(get(path, "/metrics")) == 200)
        owner.broken = True
        taken = owner.taken
        assert until(lambda: owner.taken > taken + 3), "it goes on asking"
        assert status_of(get(path, "/healthz")) == 200, "the owner itself answers"
        assert status_of(get(path, "/metrics")) == 200, "what was known last"
        owner.broken = False
        owner.core.client("late")
        assert until(lambda: b'kvstored_sessions{tenant="late"} 1.0' in get(path, "/metrics"))


def test_loading_is_what_bytes_took_by_the_way_of_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.001)
    owner, path = Owner(), tmp_path / "s"
    with watched(owner, path):
        assert until(lambda: b'kvstored_load_seconds_total{tenant="t",tier="dram"} 0.0' in get(path, "/metrics"))
        owner.hit_bytes = 6
        assert until(lambda: b'kvstored_load_seconds_total{tenant="t",tier="dram"} 3.0' in get(path, "/metrics"))
        owner.hit_bytes = 8
        assert until(lambda: b'kvstored_load_seconds_total{tenant="t",tier="dram"} 4.0' in get(path, "/metrics"))


def test_a_store_without_pools_and_one_with_many_are_counted_alike() -> None:
    core = Core(arenas=8)
    misses = Misses(core.store)
    assert [one.name for one in take_snapshot(core.store, misses, ["x"], (), None, 0).tenants] == ["x"]
    sizes = {"a": 3, "b": 5}
    for name, count in sizes.items():
        client = core.client(name)
        for block_bytes in (96, 5000):
            client.put(client.open(block_bytes, model=str(block_bytes)), chain(count, name))
    core.finish_all()
    found = {one.name: one for one in take_snapshot(core.store, misses, ["a", "x"], (), None, 0).tenants}
    assert {name: one.used_bytes for name, one in found.items()} == {
        "a": (3 * (4096 + 8192), 0), "b": (5 * (4096 + 8192), 0), "x": (0, 0),
    }  # fmt: skip


def test_what_operators_evict_is_counted_apart_from_what_went_for_want_of_room() -> None:
    core = Core()
    tally = core.store.tally
    tally.evicted, tally.evicted_by_operators, tally.disk_evicted_by_operators = 5, 3, 2
    (metric,) = [one for one in METRICS if one.name == "kvstored_evicted_blocks_total"]
    snapshot = take_snapshot(core.store, Misses(core.store), (), (), None, 0)
    memory = {("dram", "room"): 5, ("dram", "operator"): 3}
    assert dict(metric.rows(Facts(snapshot, {}, True, "", 4))) == memory, "there is no disk"
    on_disk: Any = SimpleNamespace()
    object.__setattr__(snapshot, "disk", on_disk)
    assert dict(metric.rows(Facts(snapshot, {}, True, "", 4))) == memory | {("disk", "operator"): 2}
