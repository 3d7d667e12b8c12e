"""Programs and workflows over the control socket, and as kvctl shows them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import RenderableType

from kvctl import hints, render
from kvctl.client import ControlClient, Exit, KvctlError
from kvproto import control_pb2 as pb
from kvstored.admin_hints import guiding_report
from kvstored.control import ControlServer
from tests.core import Core
from tests.unit.control_fakes import MIB, MemoryPort, ThreadOwner


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ControlClient]:
    """Of a server whose owner knows two programs and a workflow."""
    owner = ThreadOwner(MemoryPort(runtime_dir=str(tmp_path)))
    server = ControlServer(owner, tmp_path)
    server.start()
    with ControlClient(server.path, 10.0) as connected:
        yield connected
    server.stop(0.0)
    owner.stop()


def shown(table: RenderableType) -> str:
    """As on a wide terminal without colours."""
    console = render.console()
    console.width = 140
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_programs_come_over_the_socket_field_by_field(client: ControlClient) -> None:
    report = client.programs(pb.ListProgramsRequest())
    late, early = report.programs
    assert (early.program, early.state, early.tool, early.tool_s) == ("agent-1", "in tool", "web search", 12.5)
    assert (early.turns, early.context_blocks, early.pinned_blocks) == (3, 40, 32)
    assert (early.pinned_bytes, early.pinned_s) == (64 * MIB, 107.5)
    assert (late.program, late.pinned_s) == ("agent-2", 0.0)
    assert (report.programs_total, report.counters.hints, report.counters.refused) == (600, 1234, 5)


def test_workflows_come_over_the_socket_field_by_field(client: ControlClient) -> None:
    report = client.workflows(pb.ListWorkflowsRequest(tenant="research"))
    (workflow,), (run,) = report.workflows, report.runs
    assert (workflow.workflow, workflow.version, workflow.steps, workflow.runs) == ("report", 7, 4, 2)
    assert (run.run, list(run.running), list(run.near), run.bound_steps) == ("run-1", ["market", "press"], ["merge"], 3)
    assert report.runs_total == 2


def test_tenants_that_were_never_here_are_not_found_and_no_name_is_no_tenant(client: ControlClient) -> None:
    for tenant, code in (("nobody", Exit.NOT_FOUND), ("", Exit.USAGE)):
        with pytest.raises(KvctlError) as caught:
            client.programs(pb.ListProgramsRequest(tenant=tenant))
        assert caught.value.code is code
        with pytest.raises(KvctlError) as caught:
            client.workflows(pb.ListWorkflowsRequest(tenant=tenant))
        assert caught.value.code is code


def test_tables_say_who_waits_for_what_and_how_many_there_are_besides(client: ControlClient) -> None:
    text = shown(hints.programs(client.programs(pb.ListProgramsRequest())))
    (line,) = [line for line in text.splitlines() if line.startswith("agent-1")]
    for part in ("in tool, 12", "web search", "64.0 MiB"):
        assert part in line
    assert "and 598 more" in text
    assert "1,234 hints, 5 refused" in text
    runs = shown(hints.workflows(client.workflows(pb.ListWorkflowsRequest())))
    assert "market, press" in runs
    assert "and 1 more" in runs


def test_what_comes_from_outside_moves_no_cursor() -> None:
    evil = pb.ListProgramsResponse(programs=[pb.Program(program="a\x1b[2J", tenant="t", state="thinking")])
    assert "\x1b" not in shown(hints.programs(evil))


def test_nothing_said_is_nothing_to_show() -> None:
    assert "no program" in shown(hints.programs(pb.ListProgramsResponse()))
    assert "no workflow" in shown(hints.workflows(pb.ListWorkflowsResponse()))


def test_the_owner_answers_for_one_tenant_or_for_all() -> None:
    core = Core()
    core.client("t")
    assert guiding_report(core.store, None).programs == ()
    assert guiding_report(core.store, "t").programs_total == 0
    with pytest.raises(KeyError):
        guiding_report(core.store, "nobody")
