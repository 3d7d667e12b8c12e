"""Quotas with real daemons: a file that says them, two tenants of one user, changes at run time, a warm restart."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvclient
from bench.process import DaemonProcess
from kvctl.client import ControlClient
from kvproto import control_pb2 as pb
from kvproto.limits import MIB
from tests.integration.conftest import StartDaemon
from tests.node import chain, end_keeper, put_roots, until, value

BLOCK_BYTES = MIB - 4096  # one to an arena of 1 MiB, so that arenas are what is counted
QUIET, FLOOD = chain("quiet", 5), chain("flood", 40)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """Eight arenas: five guaranteed to one of two tenants, at most six for the other; kept over restarts."""
    file = tmp_path / "kvstored.toml"
    uids = f"uids = [{os.geteuid()}]"
    file.write_text(
        f'[dram]\nsize = "8MiB"\narena = "1MiB"\n[daemon]\nkeep = true\n[clients]\nring = "4MiB"\n'
        f'[tenants.quiet]\n{uids}\ndram_guaranteed = "5.5MiB"\npin_share = 0.25\n'
        f'[tenants.flood]\n{uids}\ndram_max = "6MiB"\nin_flight = 64\n'
    )
    yield file
    end_keeper(tmp_path / "run")


def control(daemon: DaemonProcess) -> ControlClient:
    """To use in a `with`."""
    return ControlClient(daemon.runtime_dir / "control.sock", 20.0)


def arenas(daemon: DaemonProcess) -> dict[str, int]:
    """By tenant."""
    with control(daemon) as client:
        return {one.name: one.assigned_bytes // MIB for one in client.tenants().tenants}


def found(ns: kvclient.Namespace, keys: list[bytes]) -> int:
    """How many of some blocks are there, compared byte by byte; one that differs fails."""
    count = 0
    for key in keys:
        with ns.fetch([key]) as lease:
            target = np.zeros((1, BLOCK_BYTES), dtype=np.uint8)
            if lease.expected and lease.copy_to(target):
                assert np.array_equal(target[0], value(key, BLOCK_BYTES))
                assert not np.array_equal(target[0], value(key, BLOCK_BYTES, 1)), "the control is equal as well"
                count += 1
    return count


def open_as(daemon: DaemonProcess, tenant: str) -> tuple[kvclient.Client, kvclient.Namespace]:
    """A client of one tenant, and its namespace; the other one has the same."""
    client = kvclient.connect(daemon.runtime_dir, tenant=tenant, timeout_s=20.0)
    assert client.wait_connected(20.0), client.status
    return client, client.namespace(
        model="m", engine="e", layout="l", dtype="u8", block_tokens=16, block_bytes=BLOCK_BYTES
    )


def fill(ns: kvclient.Namespace, keys: list[bytes]) -> None:
    """Store single blocks until all of them are there: while an arena is on its way, a tenant evicts its own."""

    def stored() -> bool:
        for key in keys:
            ns.store([key], [value(key, BLOCK_BYTES)], wait=True, space_s=20.0)
        return found(ns, keys) == len(keys)

    assert until(stored)


def kvctl(daemon: DaemonProcess, *words: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    line = [sys.executable, "-m", "kvctl", "--runtime-dir", str(daemon.runtime_dir), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def test_a_flood_leaves_what_is_guaranteed_and_stays_below_its_maximum(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    (one, quiet), (two, flood) = open_as(daemon, "quiet"), open_as(daemon, "flood")
    with one, two:
        put_roots(flood, FLOOD[:10], durable=False)
        assert arenas(daemon)["flood"] == 6, "the rest lies idle, and it may not have more"
        fill(quiet, QUIET)
        put_roots(flood, FLOOD[10:], durable=False)
        assert arenas(daemon) == {"quiet": 5, "flood": 3}
        assert found(quiet, QUIET) == 5
        assert 0 < found(flood, FLOOD) <= 3


def test_a_change_at_run_time_counts_and_survives_a_warm_restart(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    (one, quiet), (two, flood) = open_as(daemon, "quiet"), open_as(daemon, "flood")
    with one, two:
        fill(quiet, QUIET)
        put_roots(flood, FLOOD[:6], durable=False)
        asked = kvctl(daemon, "quota", "quiet", "set", "dram_guaranteed=9MiB")
        assert (asked.returncode, asked.stdout) == (1, "")
        assert "more than the tier has" in asked.stderr
        changed = kvctl(daemon, "quota", "--yes", "quiet", "set", "dram_guaranteed=1MiB", "in_flight=32")
        assert (changed.returncode, changed.stderr) == (0, "")
        assert "dram_guaranteed: 1.0 MiB, until now 5.0 MiB" in changed.stdout
        fill(flood, FLOOD[6:12])
        assert arenas(daemon) == {"quiet": 2, "flood": 6}, "up to its maximum"
    daemon.kill()
    later = start_daemon("--config", str(config))
    with control(later) as client:
        assert client.status().restart.began == "warm"
        quotas = {one.tenant: one for one in client.quotas(pb.GetQuotasRequest()).quotas}
    assert quotas["quiet"].chosen
    assert (quotas["quiet"].dram_guaranteed_bytes, quotas["quiet"].pin_share) == (MIB, 0.25)
    assert quotas["quiet"].in_flight_max == 32
    assert not quotas["flood"].chosen
    assert quotas["flood"].in_flight_max == 64
    asked = kvctl(later, "quota", "quiet", "reset")
    assert (asked.returncode, asked.stdout) == (2, ""), "others would be promised less"
    back = kvctl(later, "quota", "--yes", "quiet", "reset")
    assert "dram_guaranteed: 5.0 MiB, until now 1.0 MiB" in back.stdout
    assert "dram_guaranteed is 5.0 MiB of the 5.5 MiB asked for: it is in whole arenas" in back.stdout
    assert kvctl(later, "quota", "nobody").returncode == 4


def test_a_guarantee_that_takes_from_another_tenant_is_asked_about(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    one, flood = open_as(daemon, "flood")
    with one:
        fill(flood, FLOOD[:3])
        assert flood.pin(FLOOD[:1], ttl_s=3600.0).blocks == 1
        told = kvctl(daemon, "quota", "quiet", "set", "dram_guaranteed=8MiB", "--dry-run")
        assert told.returncode == 0, told.stderr
        assert "flood, dram_guaranteed: others may take 3.0 MiB that were promised to it" in told.stdout
        assert "flood, concerned: 1 pin (" in told.stdout
        asked = kvctl(daemon, "quota", "quiet", "set", "dram_guaranteed=8MiB")
        assert (asked.returncode, asked.stdout) == (2, "")
        assert "give --yes" in asked.stderr
        assert kvctl(daemon, "quota", "quiet", "set", "dram_guaranteed=5MiB").returncode == 0, "nobody loses by that"
        told = kvctl(daemon, "quota", "quiet", "set", "in_flight=9", "--dry-run")
        assert "concerned: 0 pins" in told.stdout, "it has not come yet"


def test_a_choice_that_does_not_fit_any_more_is_warned_of(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    assert kvctl(daemon, "quota", "--yes", "flood", "set", "dram_guaranteed=3MiB", "dram_max=4MiB").returncode == 0
    one, flood = open_as(daemon, "flood")
    with one:
        fill(flood, FLOOD[:2])
    daemon.kill()
    config.write_text(config.read_text().replace("5.5MiB", "6MiB"))
    later = start_daemon("--config", str(config))
    with control(later) as client:
        status = client.status()
        (quota,) = client.quotas(pb.GetQuotasRequest(tenant="flood")).quotas
    assert status.restart.began == "warm"
    assert [said for said in status.warnings if said.startswith("dram_guaranteed of flood was chosen")]
    assert (quota.HasField("dram_asked_bytes"), quota.dram_max_bytes) == (False, 4 * MIB)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become other users")
def test_users_who_come_and_go_keep_nobody_out(start_daemon: StartDaemon, config: Path) -> None:
    daemon = start_daemon("--config", str(config))
    source = (
        "import os, sys\nimport kvclient\n"
        "for uid in range(70000, 70070):\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.setgroups([]); os.setgid(uid); os.setuid(uid)\n"
        "        client = kvclient.connect(sys.argv[1], timeout_s=20.0)\n"
        "        came = client.wait_connected(20.0)\n"
        "        client.close()\n"
        "        os._exit(0 if came else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0, uid\n"
    )
    daemon.runtime_dir.chmod(0o755)
    for folder in daemon.runtime_dir.parents:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 1:
            folder.chmod(0o711)
    for _ in range(2):
        line = [sys.executable, "-c", source, str(daemon.runtime_dir)]
        ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == 0, ended.stderr
        client, namespace = open_as(daemon, "quiet")
        with client:
            fill(namespace, QUIET)
        daemon.kill()
        daemon = start_daemon("--config", str(config))
        with control(daemon) as operator:
            assert operator.status().restart.began == "warm"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("5.5MiB", "9MiB", "kvstored.toml:10: tenants.quiet.dram_guaranteed: is more than the tier has left"),
        ('"6MiB"', '"1MB"', "kvstored.toml:14: tenants.flood.dram_max: does not hold one arena"),
        ("in_flight = 64", "in_fligth = 64", "kvstored.toml:15: unknown key tenants.flood.in_fligth; did you mean"),
    ],
)
def test_an_impossible_quota_stops_the_start(config: Path, tmp_path: Path, old: str, new: str, expected: str) -> None:
    config.write_text(config.read_text().replace(old, new))
    line = [sys.executable, "-m", "kvstored", "--runtime-dir", str(tmp_path / "run"), "--config", str(config)]
    ended = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 78
    assert expected in ended.stderr
