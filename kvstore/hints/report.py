"""What an operator is shown of programs and workflows: plain values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvproto.policy_frames import Pinned
from kvstore.hints.guide import Guide
from kvstore.hints.limits import PROGRAMS_LISTED, SECOND_NS, STEPS_LISTED, WORKFLOWS_LISTED
from kvstore.hints.programs import Standing, State


@dataclass(frozen=True, slots=True)
class ProgramReport:
    """One program of an agent."""

    tenant: str
    program: str
    state: str  # "thinking" or "in tool"
    tool: str  # the one it waits for, or the last one; empty: none yet
    tool_s: float  # since then the tool runs; 0 unless one does
    turns: int
    context_blocks: int
    pinned_blocks: int
    pinned_bytes: int
    pinned_s: float  # for so long yet; 0: its context is not pinned


@dataclass(frozen=True, slots=True)
class WorkflowReport:
    """One workflow."""

    tenant: str
    workflow: str
    version: int
    steps: int
    runs: int


@dataclass(frozen=True, slots=True)
class WorkflowRunReport:
    """One execution of a workflow. Steps by name, the first eight of each kind."""

    tenant: str
    run: str
    workflow: str
    running: tuple[str, ...]
    near: tuple[str, ...]  # one step away
    bound_steps: int  # of which it is known what they read


@dataclass(frozen=True, slots=True)
class HintCounters:
    """What came of hints since the daemon started, of all tenants."""

    hints: int = 0
    refused: int = 0  # of the hints
    said_blocks: int = 0  # were there when something was said of them
    pinned: int = 0  # pins for programs
    gave_way: int = 0  # programs that lost their pins to one that came before them
    fetches: int = 0


@dataclass(frozen=True, slots=True)
class GuidingReport:
    """Programs and workflows of one tenant, or of all: the latest ones, and how many there are."""

    counters: HintCounters
    programs: tuple[ProgramReport, ...]
    programs_total: int
    workflows: tuple[WorkflowReport, ...]
    runs: tuple[WorkflowRunReport, ...]
    runs_total: int


def report_of(
    told: Sequence[tuple[str, Guide, Mapping[str, Pinned]]], now_ns: int, counters: HintCounters
) -> GuidingReport:
    """Of some tenants, each with its pins by program: as much as can be listed within a millisecond or two."""
    programs: list[ProgramReport] = []
    workflows: list[WorkflowReport] = []
    runs: list[WorkflowRunReport] = []
    for tenant, guide, pins in told:
        some = guide.programs.standings(PROGRAMS_LISTED - len(programs))
        programs += [_program(tenant, each, pins.get(each.program), now_ns) for each in some]
        if len(workflows) < WORKFLOWS_LISTED:
            workflows += [
                WorkflowReport(tenant, each.workflow, each.version, each.steps, each.runs)
                for each in guide.workflows.standings()
            ]
        runs += [
            WorkflowRunReport(tenant, each.run, each.workflow, each.running, each.near, each.bound)
            for each in guide.workflows.run_standings(STEPS_LISTED // len(told))
        ]
    return GuidingReport(
        counters,
        tuple(programs),
        sum(len(guide.programs) for _, guide, _ in told),
        tuple(workflows),
        tuple(runs),
        sum(len(guide.workflows) for _, guide, _ in told),
    )


def _program(tenant: str, standing: Standing, pin: Pinned | None, now_ns: int) -> ProgramReport:
    in_tool = standing.state is State.IN_TOOL
    left_ns = 0 if pin is None else max(0, pin.expires_ns - now_ns)
    return ProgramReport(
        tenant=tenant,
        program=standing.program,
        state="in tool" if in_tool else "thinking",
        tool=standing.tool,
        tool_s=(now_ns - standing.since_ns) / SECOND_NS if in_tool else 0.0,
        turns=standing.turns,
        context_blocks=standing.blocks,
        pinned_blocks=pin.blocks if pin is not None and left_ns else 0,
        pinned_bytes=pin.bytes if pin is not None and left_ns else 0,
        pinned_s=left_ns / SECOND_NS,
    )
