"""`kvctl top`: rates between samples, a page of 80 columns, and daemons that go and come back."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kvctl import cli, top
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.top import Figures, Sample, between
from kvproto import control_pb2 as pb
from kvstored.control import ControlServer
from tests.unit.control_fakes import MemoryPort, ThreadOwner

GIB = 1 << 30


def look(uptime_s: float, **counters: int) -> Sample:
    """A sample of one daemon."""
    status = pb.GetStatusResponse(
        version="0.1.0", pid=7, uptime_s=uptime_s, serving=True, sessions=1, namespaces=2,
        tiers=[
            pb.Tier(name="dram", capacity_bytes=4 * GIB, used_bytes=3 * GIB, blocks=1000),
            pb.Tier(name="disk", capacity_bytes=9 * GIB, used_bytes=GIB, blocks=500),
        ],
        tenants=[pb.Tenant(name="research", used_bytes=GIB, blocks=400, sessions=1)],
        counters=pb.Counters(**counters), disk=pb.Disk(),
    )  # fmt: skip
    client = pb.Client(
        session=3, name="engine-0", tenant="research", pid=99, leases=4, ring_bytes=100, ring_used_bytes=25
    )
    return Sample(status, pb.ListClientsResponse(clients=[client]), 1.7e9 + uptime_s)


def busy() -> tuple[Sample, Sample]:
    """Two looks, four seconds apart."""
    before = look(
        100.0, lease_hits=1000, lease_misses=500, published=50, published_bytes=GIB, evicted=5, refused_full=1
    )
    after = look(
        104.0, lease_hits=1300, lease_misses=600, published=90, published_bytes=3 * GIB, evicted=25, refused_full=3,
        refused_quota=2,
    )  # fmt: skip
    after.status.tenants[0].hit_dram_bytes, after.status.tenants[0].saved_dram_s = 8 * GIB, 10.0
    after.status.tenants[0].refused = 4
    after.status.disk.counters.saved_bytes, after.status.disk.counters.loaded_bytes = GIB, 2 * GIB
    after.clients.clients[0].requests = 800
    return before, after


def figures() -> Figures:
    found = between(*busy())
    assert found is not None
    return found


class TestRates:
    def test_rates_are_differences_by_the_daemons_own_clock(self) -> None:
        now = figures()
        assert (now.interval_s, now.asked_per_s, now.hit_share) == (4.0, 100.0, 0.75)
        assert now.hit_share_in_all == pytest.approx(1300 / 1900)
        assert (now.stored_per_s, now.evicted_per_s, now.refused_per_s) == (10.0, 5.0, 1.0)
        assert (now.saved_s_per_s, now.saved_s) == (2.5, 10.0)
        dram, disk = now.tiers
        assert (dram.in_bytes_per_s, dram.out_bytes_per_s) == (GIB / 2, 2 * GIB)
        assert (disk.in_bytes_per_s, disk.out_bytes_per_s) == (GIB / 4, GIB / 2)
        assert (now.tenants[0].out_bytes_per_s, now.tenants[0].refused_per_s) == (2 * GIB, 1.0)
        assert now.clients[0].requests_per_s == 200.0

    def test_memory_of_a_gpu_is_a_tier(self) -> None:
        before, after = busy()
        for sample, promoted, hit in ((before, GIB, 0), (after, 5 * GIB, 2 * GIB)):
            sample.status.devices.add(
                name="cuda:0", hbm_bytes=8 * GIB, hbm_used_bytes=GIB, hbm_blocks=70, hbm_promoted_bytes=promoted,
                hbm_hit_bytes=hit,
            )  # fmt: skip
            sample.status.devices.add(name="cuda:1")  # without a tier
        found = between(before, after)
        assert found is not None
        assert [tier.name for tier in found.tiers] == ["hbm", "dram", "disk"]
        assert (found.tiers[0].in_bytes_per_s, found.tiers[0].out_bytes_per_s) == (GIB, GIB / 2)
        assert (found.tiers[0].used_bytes, found.tiers[0].blocks) == (GIB, 70)

    def test_nothing_asked_for_has_no_hit_rate(self) -> None:
        idle = between(look(1.0), look(2.0))
        assert idle is not None
        assert (idle.hit_share, idle.hit_share_in_all, idle.asked_per_s) == (None, None, 0.0)

    def test_another_daemon_begins_anew(self) -> None:
        before, after = busy()
        after.status.pid = 8
        assert between(before, after) is None
        before, after = busy()
        assert between(after, before) is None
        assert between(before, before) is None

    def test_a_client_that_came_between_counts_from_its_beginning(self) -> None:
        before, after = busy()
        del before.clients.clients[:]
        found = between(before, after)
        assert found is not None
        assert found.clients[0].requests_per_s == 200.0


class TestPage:
    def shown(self, now: Figures) -> list[str]:
        console = Console(width=80, file=io.StringIO(), markup=False, highlight=False)
        with console.capture() as drawn:
            console.print(top.page(now))
        return [line.rstrip() for line in drawn.get().splitlines()]

    def test_all_is_on_one_screen(self) -> None:
        lines = self.shown(figures())
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 24
        text = "\n".join(lines)
        for said in (
            "serving", "hits 75.0 % of 100 blocks/s", "68.4 %", "stored 10/s", "evicted 5/s", "refused 1/s",
            "compute saved 2.50 s/s", "######..  75%", "536.87 MB/s", "2.15 GB/s", "research", "engine-0", "200/s",
            "25%",
        ):  # fmt: skip
            assert said in text, said

    def test_the_largest_figures_fit_each_row_on_a_line(self) -> None:
        now = figures()
        tier = replace(
            now.tiers[0], used_bytes=1023 * GIB, capacity_bytes=1023 * GIB, blocks=999_900, in_bytes_per_s=99.99e9,
            out_bytes_per_s=99.99e9,
        )  # fmt: skip
        tenant = replace(
            now.tenants[0], name="a-tenant-with-a-long-name", used_bytes=1023 * GIB, pinned_bytes=1023 * GIB,
            blocks=999_900, clients=64, out_bytes_per_s=99.99e9,
        )  # fmt: skip
        client = replace(now.clients[0], session=123_456, name="x" * 60, tenant="y" * 40, pid=4_194_304)
        many = replace(
            now,
            tiers=(tier,) * 2,
            tenants=(tenant,) * 9,
            clients=(client,) * 40,
            warnings=("a very long one " * 20,) * 9,
        )
        lines = self.shown(many)
        assert max(map(len, lines)) <= 80
        at = lines.index(next(line for line in lines if line.startswith("tier")))
        assert [line[:4] for line in lines[at + 1 : at + 3]] == ["dram", "dram"], "a row is on one line"
        assert sum(line.startswith("a-tenant-wit~") for line in lines) == 6
        assert "and 3 more tenants" in lines
        assert "and 32 more clients: kvctl clients" in lines
        assert "and 5 more warnings: kvctl status" in lines

    def test_names_from_outside_cannot_move_the_cursor(self) -> None:
        now = figures()
        evil = replace(now, clients=(replace(now.clients[0], name="a\x1b[2Jb"),))
        assert "\x1b" not in "\n".join(self.shown(evil))

    def test_a_line_for_a_log_says_the_same(self) -> None:
        said = top.line(figures())
        assert "\n" not in said
        assert "hits 75.0 % of 100/s, dram 3.0 GiB/4.0 GiB in 536.87 MB/s out 2.15 GB/s" in said
        assert said.endswith("clients 1")


Run = Callable[..., tuple[int, str, str]]


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Iterator[Path]:
        folder = tmp_path / "run"
        folder.mkdir(mode=0o755)
        port = Growing(runtime_dir=str(folder))
        owner = ThreadOwner(port)
        server = ControlServer(owner, folder)
        server.start()
        yield folder
        server.stop(0.0)
        owner.stop()

    @pytest.fixture
    def kvctl(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> Run:  # fmt: skip
        monkeypatch.delenv("COLUMNS", raising=False)
        monkeypatch.setattr("kvctl.live.time.sleep", lambda _seconds: None)

        def run(*arguments: str) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["kvctl", "--runtime-dir", str(folder), "top", *arguments])
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                cli.main()
            said = capsys.readouterr()
            return int(ended.value.code or 0), said.out, said.err

        return run

    def test_once_is_one_page_and_without_a_terminal_each_sample_a_line(self, kvctl: Run) -> None:
        code, out, err = kvctl("--once")
        assert (code, err) == (0, "")
        assert out.startswith("kvstored 0.1.0  serving")
        code, out, _ = kvctl("-n", "3", "-i", "0.1")
        assert (code, len(out.splitlines())) == (0, 3)
        assert all("hits " in line for line in out.splitlines())

    def test_json_is_an_object_a_line(self, kvctl: Run) -> None:
        code, out, _ = kvctl("-n", "2", "-o", "json")
        lines = [json.loads(line) for line in out.splitlines()]
        assert (code, len(lines)) == (0, 2)
        assert all(line["version"] == 1 and line["top"]["interval_s"] == 1.0 for line in lines)

    def test_a_daemon_that_goes_is_waited_for(self, kvctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        looks: list[Any] = []
        really = top.sample

        def sometimes(client: ControlClient) -> Sample:
            looks.append(client)
            if len(looks) == 3:
                raise KvctlError(Exit.UNREACHABLE, "no kvstored is running")
            return really(client)

        monkeypatch.setattr(top, "sample", sometimes)
        code, out, _ = kvctl("-n", "2")
        lines = out.splitlines()
        assert (code, len(lines)) == (0, 3)
        assert lines[1] == "no kvstored is running"
        assert looks[2] is looks[1]
        assert looks[3] is not looks[2], "a new connection"

    def test_where_there_is_none_at_the_beginning_it_says_so(self, kvctl: Run, folder: Path) -> None:
        (folder / "control.sock").rename(folder / "away.sock")
        code, _, err = kvctl("--once")
        (folder / "away.sock").rename(folder / "control.sock")
        assert code == Exit.UNREACHABLE
        assert "no kvstored is running" in err


class Growing(MemoryPort):
    """A second passes from look to look."""

    looks = 0

    def status(self) -> Any:
        self.looks += 1
        return replace(super().status(), uptime_s=float(self.looks))
