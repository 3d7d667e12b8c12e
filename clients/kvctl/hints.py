"""`kvctl programs` and `kvctl workflows`: what agents said of themselves, and what is done for them."""

from rich.console import Group, RenderableType
from rich.text import Text

from kvctl.client import printable
from kvctl.render import _table, size, span
from kvproto import control_pb2 as pb

__all__ = ["programs", "workflows"]

RUNS_SHOWN = 32


def programs(report: pb.ListProgramsResponse) -> RenderableType:
    """A line each, the last one first."""
    counts = report.counters
    taken = f"{counts.hints:,} hints, {counts.refused:,} refused; {counts.pinned:,} pins, {counts.fetches:,} fetches"
    said = f"words on {counts.said_blocks:,} blocks; {counts.gave_way:,} pins gave way to a program that came before"
    below = Text(f"since the daemon started: {taken}\n{said}")
    if not report.programs:
        return Group(Text("no program is there now"), Text(), below)
    table = _table(
        "program", "tenant", "state", "tool", ">turns", ">context", ">pinned", ">for",
        least=("turns", "tenant", "context", "tool"),
    )  # fmt: skip
    for one in report.programs:
        state = f"{one.state}, {span(one.tool_s)}" if one.state == "in tool" else one.state
        pinned, left = (size(one.pinned_bytes), span(one.pinned_s)) if one.pinned_blocks else ("-", "-")
        table.add_row(
            printable(one.program), printable(one.tenant), state, printable(one.tool), f"{one.turns:,}",
            f"{one.context_blocks:,}", pinned, left,
        )  # fmt: skip
    return Group(table, *_more(report.programs_total - len(report.programs)), Text(), below)


def workflows(report: pb.ListWorkflowsResponse) -> RenderableType:
    """A line each, then the latest runs."""
    if not report.workflows:
        return Text("no workflow was described")
    table = _table("workflow", "tenant", ">steps", ">runs", ">version")
    for one in report.workflows:
        table.add_row(
            printable(one.workflow), printable(one.tenant), f"{one.steps:,}", f"{one.runs:,}", str(one.version)
        )
    if not report.runs:
        return table
    runs = _table("run", "workflow", "running", "next", ">bound")
    for run in report.runs[:RUNS_SHOWN]:
        near = ", ".join(map(printable, run.near))
        running = ", ".join(map(printable, run.running))
        runs.add_row(printable(run.run), printable(run.workflow), running, near, f"{run.bound_steps:,}")
    return Group(table, Text(), runs, *_more(report.runs_total - min(len(report.runs), RUNS_SHOWN)))


def _more(count: int) -> list[Text]:
    return [Text(f"and {count:,} more")] if count > 0 else []
