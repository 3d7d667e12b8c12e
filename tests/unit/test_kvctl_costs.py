"""`kvctl costs`, over a real control socket; what a store answers to it; and compute saved in other commands."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from kvctl import cli, costs
from kvctl.client import Exit
from kvproto import control_pb2 as pb
from kvproto.ids import NamespaceDigest
from kvproto.policy_frames import Tier
from kvstore.report import TenantReport
from kvstored.admin_costs import NAMESPACES, costs_report
from kvstored.control import ControlServer
from tests.core import Core
from tests.unit.control_fakes import DIGEST_A, DIGEST_B, MemoryPort, ThreadOwner
from tests.unit.test_costing import prefill_s, teach, time_loads

Run = Callable[..., str]


class Thrifty(MemoryPort):
    """Its tenants have saved something."""

    def tenants(self) -> tuple[TenantReport, ...]:
        first, *others = super().tenants()
        return (replace(first, prefill_reports=321, saved_dram_s=38.04, saved_disk_s=3.2), *others)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.delenv("COLUMNS", raising=False)
    folder = tmp_path / "run"
    folder.mkdir()
    owner = ThreadOwner(Thrifty())
    server = ControlServer(owner, folder)
    server.start()

    def ask(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.app(args=cli.globals_first([*arguments, "--runtime-dir", str(folder)]))
        assert int(ended.value.code or 0) == code
        said = capsys.readouterr()
        return said.out + said.err

    yield ask
    server.stop(0.0)
    owner.stop()


def test_costs_show_prefills_loads_and_what_was_saved(run: Run) -> None:
    shown = run("costs")
    for text in (
        "compute saved: 41.2 s (dram 38.0, disk 3.2), prefill profile: 321 reports",
        "12,345 blocks found, 67 of them before anybody knew what they cost",
        "a pass 12.5 ms, a token 45 us, a pair of tokens 2 ns",
        "7 more; name one",
        "1.9 GiB",
    ):
        assert text in shown
    behind = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()[:2] in {"0 ", "64"}}
    assert behind == {"0": ["35", "ms", "210", "ms"], "64k": ["102", "ms", "-"]}
    run_1k = next(line.split() for line in shown.splitlines() if line.lstrip().startswith("1k"))
    assert run_1k == ["1k", "2.5", "ms", "-", "59.1", "ms"]


def test_costs_are_of_the_namespace_and_tenant_that_are_named(run: Run) -> None:
    named = json.loads(run("-o", "json", "costs", DIGEST_B.hex()[:8]))["costs"]["namespaces"]
    assert [one["digest"] for one in named] == [DIGEST_B.hex()]
    (one,) = json.loads(run("-o", "json", "costs", DIGEST_A.hex(), "--tenant", "web"))["costs"]["namespaces"]
    assert (one["tenant"], one["saved_disk_s"], one["prefills"][0]["new_tokens"]) == ("web", 3.2, 512)
    run("costs", "fade" * 16, code=Exit.NOT_FOUND)
    run("costs", "--tenant", "nobody", code=Exit.NOT_FOUND)
    run("costs", "--tenant", "", code=Exit.USAGE)
    run("costs", "no digest", code=Exit.USAGE)


@pytest.mark.parametrize("command", ["status", "stats"])
def test_compute_saved_is_a_line_of_its_own_for_who_saved(run: Run, command: str) -> None:
    lines = [line for line in run(command).splitlines() if "compute saved" in line]
    saved = "research: compute saved: 41.2 s (dram 38.0, disk 3.2), prefill profile: 321 reports"
    assert " ".join(lines) in saved
    assert lines, "and nothing of tenant web, which has saved nothing"


def test_of_what_nobody_reported_costs_say_so() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(costs.costs(pb.GetCostsResponse()))
    shown = console.export_text()
    assert "no client has reported a prefill yet" in shown
    assert "no load was timed yet" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "-"), (2e-9, "2 ns"), (1.25e-5, "12.5 us"), (0.0351, "35.1 ms"), (41.24, "41.2 s"), (4000.0, "1 h 6 min")],
)
def test_short_times_are_shown_with_three_digits(value: float, shown: str) -> None:
    assert costs.seconds(value) == shown


# -- what the store answers -------------------------------------------------------------------------------------


def test_the_report_has_what_was_learned() -> None:
    core = Core()
    client = core.client()
    namespace, other = client.open(), client.open(model="other")
    costing = core.store.costing
    assert costs_report(core.store, None, None).namespaces == ()
    teach(costing, namespace)
    time_loads(costing, namespace, Tier.DRAM, 1e9)
    costing.read(1 << 20, 1e-3)
    answer = costs_report(core.store, None, None)
    (one,) = answer.namespaces
    assert (one.digest, one.prefill_reports, answer.more) == (namespace.digest.hex(), 30, 0)
    grid = {(prefill.cached_tokens, prefill.new_tokens): prefill.seconds for prefill in one.prefills}
    assert len(grid) == 12
    assert grid[4096, 512] == pytest.approx(prefill_s(4096, 512), rel=0.1)
    assert grid[65_536, 512] > 1.5 * grid[0, 512]
    run = one.runs[0]
    assert run.recompute_s == pytest.approx(prefill_s(0, 1024), rel=0.1)
    assert run.dram_s == pytest.approx(1e-5 + 64 * 96 / 1e9, rel=0.05)
    assert run.disk_s == pytest.approx(64 * 96 / (1 << 20) * 1e-3, rel=0.3), "one read says little of a short one"
    assert [(way.tenant, way.tier, way.reports) for way in answer.ways] == [("", "disk", 1), ("t", "dram", 14)]
    (unknown,) = costs_report(core.store, "t", other.digest).namespaces
    assert (unknown.prefill_reports, unknown.prefills, unknown.runs[0].recompute_s) == (0, (), 0.0)


def test_the_report_is_bounded_and_knows_no_strangers() -> None:
    core = Core()
    client = core.client()
    for i in range(NAMESPACES + 3):
        core.store.costing.report_prefill(client.open(model=f"m{i}"), 0, 100, 0.1)
    answer = costs_report(core.store, "t", None)
    assert [one.model for one in answer.namespaces] == [f"m{i}" for i in reversed(range(3, NAMESPACES + 3))]
    assert answer.more == 3
    with pytest.raises(KeyError, match="no tenant is called u"):
        costs_report(core.store, "u", None)
    with pytest.raises(KeyError, match="no namespace has the digest"):
        costs_report(core.store, "t", NamespaceDigest(bytes(32)))
