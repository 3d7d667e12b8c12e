"""Workflows of several agents: step graphs with joins, branches and loops, many runs of them at a time."""

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

from bench.replay.draws import SECOND_MS, Draws, Zipf
from bench.replay.script import Answer, Context, Script
from bench.replay.tools import (
    BROWSE,
    BUILD,
    DELEGATE,
    MOST_TOKENS,
    PERSON,
    PYTHON,
    READ,
    SEARCH,
    SHELL,
    TESTS,
    Tool,
    call_tool,
    thought_tokens,
)
from bench.replay.workload import Graph, Join, Step, StepBound, StepEntered, WorkflowBegun, WorkflowEnded

_ALL: Final = Join.ALL
_ANY: Final = Join.ANY
_WORKER_MS: Final = 20 * SECOND_MS  # mean wait of a step that is due for one of the framework's workers
_MOST_VISITS: Final = 10  # of one step in one run: the limit that frameworks put on loops


@dataclass(frozen=True, slots=True)
class _Role:
    """One agent. `odds` are the chances of each step that follows, where only one of them does; the rest ends there."""

    name: str
    after: tuple[int, ...] = ()
    join: Join = _ALL
    tools: tuple[Tool, ...] = ()
    calls: float = 0.0  # tools a visit, in the mean
    keeps: bool = False  # goes on with its own context at the next visit; the others begin anew
    thinks: bool = False
    odds: tuple[float, ...] | None = None


_SOFTWARE: Final = (
    _Role("plan", (6,), _ANY, keeps=True, thinks=True),
    _Role("research", (0,), tools=(SEARCH, BROWSE), calls=1, thinks=True),
    _Role("read", (0,), tools=(SHELL,), calls=1),
    _Role("code", (1, 2), tools=(SHELL, TESTS), calls=1.5, keeps=True, thinks=True),
    _Role("test", (3,), tools=(TESTS, BUILD), calls=1, keeps=True),
    _Role("review", (4,), keeps=True, thinks=True),
    _Role("approve", (5,), tools=(PERSON,), calls=0.7, keeps=True, odds=(0.85,)),
)
_REPORT: Final = (
    _Role("split", (6,), _ANY, keeps=True, thinks=True),
    _Role("market", (0,), tools=(SEARCH, BROWSE), calls=1, keeps=True, thinks=True),
    _Role("press", (0,), tools=(SEARCH, BROWSE), calls=1, keeps=True, thinks=True),
    _Role("filings", (0,), tools=(PYTHON, DELEGATE), calls=1, keeps=True, thinks=True),
    _Role("merge", (1, 2, 3), keeps=True),
    _Role("criticise", (4,), keeps=True, thinks=True),
    _Role("edit", (5,), tools=(PERSON,), calls=0.7, keeps=True, odds=(0.85,)),
)
_SUPPORT: Final = (
    _Role("triage", (5,), _ANY, keeps=True, odds=(0.4, 0.35, 0.25)),
    _Role("billing", (0,), tools=(READ, PYTHON), calls=0.7, keeps=True),
    _Role("technical", (0,), tools=(SEARCH, SHELL), calls=1, keeps=True, thinks=True),
    _Role("account", (0,), tools=(READ, DELEGATE), calls=0.7, keeps=True),
    _Role("reply", (1, 2, 3), _ANY, keeps=True),
    _Role("customer", (4,), tools=(PERSON,), calls=1, keeps=True, odds=(0.85,)),
)
_DEBATE: Final = (
    _Role("moderate", (4,), _ANY, tools=(PERSON,), calls=0.4, keeps=True),
    _Role("for", (0,), tools=(SEARCH, BROWSE), calls=0.5, keeps=True, thinks=True),
    _Role("against", (0,), tools=(SEARCH, BROWSE), calls=0.5, keeps=True, thinks=True),
    _Role("sceptic", (0,), tools=(BROWSE, PYTHON), calls=0.5, keeps=True, thinks=True),
    _Role("judge", (1, 2, 3), keeps=True, thinks=True, odds=(0.85,)),
)
_PIPELINE: Final = (
    _Role("extract", tools=(READ,), calls=0.5),
    _Role("classify", (0,)),
    _Role("summarise", (1,), tools=(READ, SEARCH), calls=0.5),
    _Role("translate", (2,)),
    _Role("verify", (3,), tools=(PYTHON, PERSON), calls=0.5, thinks=True),
)
_ANALYSIS: Final = (
    _Role("ask", (3,), _ANY, keeps=True, thinks=True),
    _Role("query", (0,), tools=(PYTHON, DELEGATE), calls=1, keeps=True),
    _Role("plot", (1,), tools=(PYTHON,), calls=0.7, keeps=True),
    _Role("explain", (2,), tools=(PERSON,), calls=0.7, keeps=True, thinks=True, odds=(0.85,)),
)
_SHAPES: Final = {
    "software": _SOFTWARE,
    "report": _REPORT,
    "support": _SUPPORT,
    "debate": _DEBATE,
    "pipeline": _PIPELINE,
    "analysis": _ANALYSIS,
}
_DEPLOYED: Final = 12  # applications of a shape, each with prompts of its own


class _Application:
    """A shape with the prompts of its agents: a preamble that all share, then each agent's own."""

    def __init__(self, script: Script, model: int, draws: Draws, name: str, roles: tuple[_Role, ...]) -> None:
        self.roles = roles
        self.graph = Graph(name, tuple(Step(role.name, role.after, role.join) for role in roles))
        self.next = [[step for step, role in enumerate(roles) if own in role.after] for own in range(len(roles))]
        preamble = script.context(model)
        preamble.append(script.segment(), draws.lognormal(700, 0.5, least=200, most=3_000))
        self.prompts: list[Context] = []
        for _ in roles:
            prompt = preamble.copy()
            prompt.append(script.segment(), draws.lognormal(6_000, 0.6, least=500, most=24_000))
            self.prompts.append(prompt)


def write_agents(script: Script, model: int, draws: Draws, runs_per_minute: float) -> None:
    """Runs that begin at random, one time in six several at once, of 72 applications asked for by Zipf's law (0.5).

    An agent's context is its prompt (6,700 tokens with the preamble, in the median: instructions, tools, examples),
    then the task and what the agents before it said, then its own tool calls. An agent that keeps its context goes on
    with it at its next visit, some minutes later: others work in between, and people approve.
    """
    applications = [
        _Application(script, model, draws, f"{name}-{number}", roles)
        for number in range(_DEPLOYED)
        for name, roles in _SHAPES.items()
    ]
    popularity = Zipf(len(applications), 0.5)
    for start_ms in draws.arrivals(script.until_ms, runs_per_minute):
        application = applications[popularity.draw(draws)]
        for _ in range(draws.between(2, 5) if draws.chance(1 / 6) else 1):
            _Run(script, draws, application, start_ms + draws.below(60 * SECOND_MS)).live()


class _Run:
    """One run: which steps are due, what their agents were told, and the contexts that they keep."""

    def __init__(self, script: Script, draws: Draws, application: _Application, start_ms: int) -> None:
        self._script = script
        self._draws = draws
        self._application = application
        self._run = script.run()
        self._start_ms = start_ms
        steps = range(len(application.roles))
        self._programs = [script.program() for _ in steps]
        self._visits = [0 for _ in steps]
        self._kept: list[Context | None] = [None for _ in steps]
        self._told: list[list[Answer]] = [[] for _ in steps]
        self._arrived: list[dict[int, int]] = [{} for _ in steps]  # from which step, and when
        self._due: list[tuple[int, int]] = []  # when, which step

    def live(self) -> None:
        """From the first step until none is due."""
        script, seconds = self._script, self._start_ms / 1000
        script.write(WorkflowBegun(seconds, self._run, self._application.graph))
        for step, prompt in enumerate(self._application.prompts):
            script.write(StepBound(seconds, self._run, step, prompt.keys()))
        task = Answer(script.segment(), self._draws.lognormal(1_500, 1.0, least=50, most=20_000), self._start_ms)
        self._told[0].append(task)
        heappush(self._due, (self._start_ms + self._draws.between(5, 100), 0))
        ended_ms = self._start_ms
        while self._due:
            at_ms, step = heappop(self._due)
            answer = self._visit(step, at_ms)
            self._pass_on(step, answer, task)
            ended_ms = max(ended_ms, answer.done_ms)
        for program, visits in zip(self._programs, self._visits, strict=True):
            if visits:
                script.finished(ended_ms, program)
        script.write(WorkflowEnded(ended_ms / 1000, self._run))

    def _visit(self, step: int, at_ms: int) -> Answer:
        """An agent reads what it was told, calls its tools, and answers."""
        script, draws, role = self._script, self._draws, self._application.roles[step]
        program, context = self._programs[step], self._kept[step] or self._application.prompts[step].copy()
        self._visits[step] += 1
        script.write(StepEntered(at_ms / 1000, self._run, step))
        at_ms += draws.between(1, 20)
        for message in self._told[step]:
            context.append(message.segment, message.tokens)
        self._told[step].clear()
        for _ in range(draws.geometric(role.calls)):
            if context.tokens < MOST_TOKENS:
                at_ms = call_tool(script, draws, context, draws.pick(role.tools), at_ms, program, thinks=role.thinks)
        thought = thought_tokens(draws) if role.thinks else 0
        answer = script.ask(at_ms, context, draws.lognormal(600, 0.8, least=20, most=5_000), program, thought)
        if role.keeps:
            kept = self._kept[step] = context if context.tokens < MOST_TOKENS else None  # or it begins anew
            bound = kept or self._application.prompts[step]
            script.write(StepBound(answer.done_ms / 1000, self._run, step, bound.keys()))
        return answer

    def _pass_on(self, step: int, answer: Answer, task: Answer) -> None:
        """Tell the steps that follow, and let those run that now may."""
        for follower in self._chosen(step):
            if self._visits[follower] >= _MOST_VISITS:
                continue
            role, arrived = self._application.roles[follower], self._arrived[follower]
            if not self._told[follower] and self._kept[follower] is None:
                self._told[follower].append(task)
            self._told[follower].append(answer)
            arrived[step] = answer.done_ms
            if role.join is _ANY or len(arrived) == len(role.after):
                heappush(self._due, (max(arrived.values()) + self._draws.exponential(_WORKER_MS), follower))
                arrived.clear()

    def _chosen(self, step: int) -> list[int]:
        """All followers, or the one that the odds fall on."""
        followers, odds = self._application.next[step], self._application.roles[step].odds
        if odds is None:
            return followers
        drawn = self._draws.unit()
        for follower, share in zip(followers, odds, strict=True):
            if drawn < share:
                return [follower]
            drawn -= share
        return []
