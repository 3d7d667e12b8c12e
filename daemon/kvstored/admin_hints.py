"""What is answered of programs and workflows. `guiding_report`: owner thread; the rest: handlers'."""

from kvproto import control_pb2 as pb
from kvstore.hints.report import GuidingReport
from kvstore.store import Store
from kvstored.requests import named


def guiding_report(store: Store, tenant: str | None) -> GuidingReport:
    """Of one tenant (None: of all), within a millisecond or two. Raises KeyError(text): unknown tenant."""
    if tenant is None:
        return store.guiding.report()
    if tenant not in store.tenants:
        raise KeyError(f"no tenant is called {tenant}")
    return store.guiding.report(store.tenants[tenant])


def programs_of(report: GuidingReport) -> pb.ListProgramsResponse:
    """The programs alone, and what came of hints."""
    return pb.ListProgramsResponse(
        programs=[pb.Program(**named(one)) for one in report.programs],
        programs_total=report.programs_total,
        counters=pb.HintCounters(**named(report.counters)),
    )


def workflows_of(report: GuidingReport) -> pb.ListWorkflowsResponse:
    """The workflows alone, and their runs."""
    return pb.ListWorkflowsResponse(
        workflows=[pb.ListedWorkflow(**named(one)) for one in report.workflows],
        runs=[pb.WorkflowRun(**named(one)) for one in report.runs],
        runs_total=report.runs_total,
    )
