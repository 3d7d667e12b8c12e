"""Classes of pins and what outlives `kill -9`, with real daemons and kvctl."""

import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

import kvclient
from kvproto import control_pb2 as pb
from kvproto.limits import KIB
from tests.integration.conftest import StartDaemon
from tests.integration.test_quotas import control, kvctl
from tests.node import Bytes, chain, end_keeper, put, roots, until, values

BLOCK_BYTES = 64 * KIB
KEPT = chain("kept", 8)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """Eight arenas of 16 blocks, all of one tenant's, kept over restarts; an hour's pins last ten minutes."""
    file = tmp_path / "kvstored.toml"
    file.write_text(
        '[dram]\nsize = "8MiB"\narena = "1MiB"\n[daemon]\nkeep = true\n[clients]\nring = "4MiB"\n'
        f'[tenants.t]\nuids = [{os.geteuid()}]\npin_1h_ttl = "10m"\npin_1h_share = 0.25\n'
    )
    yield file
    end_keeper(tmp_path / "run")


def space(client: kvclient.Client, block_bytes: int = BLOCK_BYTES) -> kvclient.Namespace:
    """The tenant's namespace."""
    return client.namespace(model="m", engine="e", layout="l", dtype="u8", block_tokens=16, block_bytes=block_bytes)


def store(ns: kvclient.Namespace, keys: list[bytes]) -> Bytes:
    """A chain."""
    wanted = values(keys, BLOCK_BYTES)
    put(ns, keys, wanted, durable=False)
    return wanted


def left_s(pinned: kvclient.PinResult) -> float:
    """How long a pin still lasts."""
    return 0.0 if pinned.expires is None else pinned.expires - time.monotonic()


def flood(ns: kvclient.Namespace, name: str) -> None:
    """Store more than there is memory for."""
    keys = roots(name, 300)
    for key, value in zip(keys, values(keys, BLOCK_BYTES), strict=True):
        ns.store([key], [value], wait=True, space_s=20.0)


@pytest.mark.slow
def test_pins_classes_and_choices_outlive_a_daemon_that_is_killed(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    with kvclient.connect(daemon.runtime_dir, tenant="t", timeout_s=20.0) as client:
        ns = space(client)
        store(ns, KEPT)
        store(ns, chain("short", 8))
        long = ns.pin(KEPT, retention="1h", refresh=False)
        short = ns.pin(chain("short", 8), retention="5m", refresh=False)
        assert (long.blocks, short.blocks) == (8, 8)
        assert 500 < left_s(long) < 601, "the class lasts ten minutes"
        assert 200 < left_s(short) < 301
        said = kvctl(daemon, "tenants").stdout
        assert "pinned: 5m 512.0 KiB, 1h 512.0 KiB" in said
        changed = kvctl(daemon, "quota", "--yes", "t", "set", "pin_5m_share=0.125", "pin_5m_ttl=2m", "unused_ttl=1h")
        assert (changed.returncode, changed.stderr) == (0, "")
        assert "pin_5m_ttl: at most 2 min 0 s, until now as long as they ask for" in changed.stdout
        assert "pin_1h_share: sure of 25%" in changed.stdout
        too_much = kvctl(daemon, "quota", "t", "set", "pin_5m_share=0.5")
        assert (too_much.returncode, too_much.stdout) == (1, "")
        assert "pin_1h_share: is more than pin_share, 0.5, leaves" in too_much.stderr
        daemon.kill()
        later = start_daemon("--config", str(config))
        with control(later) as asked:
            assert asked.status().restart.began == "warm"
            pins = {one.pin: one for one in asked.pins(pb.ListPinsRequest(tenant="t")).pins}
            (quota,) = asked.quotas(pb.GetQuotasRequest(tenant="t")).quotas
        assert set(pins) == {*long.pins, *short.pins}
        for pinned in (long, short):
            assert abs(pins[pinned.pins[0]].left_s - left_s(pinned)) < 30, "it went on while nobody ran"
        assert (quota.pin_5m_share, quota.pin_5m_ttl_s, quota.pin_1h_ttl_s, quota.unused_ttl_s) == (
            0.125,
            120,
            600,
            3600,
        )
        shown = kvctl(later, "quota", "t").stdout
        assert "pins up to 5m: at most 2 min 0 s, sure of 12%" in shown
        assert "unused: dropped after 1 h 0 min" in shown
        assert until(lambda: client.connected)
        flood(ns, "flood")
        with ns.fetch(KEPT) as lease:
            assert lease.blocks == 8, "still pinned"
        assert ns.unpin(long) == 1, "by the number that it always had"
        assert left_s(ns.pin(chain("short", 8), retention="5m")) < 121
        more = count()

        def is_gone() -> bool:
            flood(ns, f"more {next(more)}")
            return ns.match(KEPT).blocks < 8

        assert until(is_gone), "how soon is the default rule's affair"


@pytest.mark.slow
def test_how_a_block_left_is_explained_by_a_successor(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    with kvclient.connect(daemon.runtime_dir, tenant="t", timeout_s=20.0) as client:
        ns = space(client)
        store(ns, KEPT)
        ns.delete(KEPT[:1])
        flood(ns, "flood")
        daemon.kill()
        later = start_daemon("--config", str(config))
        for key in (KEPT[0], KEPT[5]):
            said = kvctl(later, "explain-miss", key.hex())
            assert "A client deleted it" in said.stdout, said
        gone = [kvctl(later, "explain-miss", key.hex()).stdout for key in roots("flood", 300)[:3]]
        assert all("Evicted from DRAM by density" in one for one in gone), gone
        assert "A client deleted it" not in kvctl(later, "explain-miss", chain("never", 1)[0].hex()).stdout
