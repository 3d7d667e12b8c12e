"""Runs of workflows: how soon each block is needed next, by the step graphs of all runs it is bound to. One tenant's.

KVFlow's order: a block is worth as much as the nearest step that will read it, and a prefix that steps share as much as
the nearest of those. The graphs and the formula are in graph.py, the prefixes in chains.py.

    define(name)            the graph of a workflow
    start(run)              one execution of it, until `end`, or until nothing was heard of it for too long
    bind(run, step, chain)  what the step will read, as far as it is known
    enter(run, step)        the step runs now

Only beginnings are told; which steps are over follows from them (progress.py). The tree of chains follows in slices
(values.py), the first of them at once.

Updates carry a version, since an engine and an orchestrator may both tell of one run: what is not newer than what is
known of the same thing is refused as OLD. But for what only says again what is so: clients do that whenever they have
connected anew, as they cannot know whether the daemon has lived on.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from kvproto.ids import BlockKey, NamespaceNumber
from kvstore.hints.chains import Chain, Chains, Mark, mark_of
from kvstore.hints.deadlines import Deadlines
from kvstore.hints.graph import Graph
from kvstore.hints.limits import (
    RUN_TTL_S,
    RUNS,
    SECOND_NS,
    SOON_BLOCKS,
    SOON_CHAINS,
    STEPS_SHOWN,
    TTL_S_MAX,
    WORKFLOW_TTL_S,
    WORKFLOWS,
)
from kvstore.hints.progress import Progress
from kvstore.hints.refusal import Refusal, Refused, duration_ns, is_name, shown
from kvstore.hints.values import A_SLICE, AT_ONCE, Bound, Values

SOON_STEPS: Final = 1


@dataclass(frozen=True, slots=True)
class Soon:
    """What a run reads in so many steps. `chance`: that it is this step and not another one of a branch."""

    run: str
    step: str
    chain: Chain
    steps: int
    chance: float


class _Near(NamedTuple):
    """The same before anybody has looked up its keys."""

    step: int
    end: Mark
    steps: int
    chance: float


@dataclass(slots=True, eq=False)
class Run:
    """One execution, and what its steps read."""

    name: str
    workflow: str
    progress: Progress
    ttl_ns: int
    begun: int  # the version with which it was begun
    version: int = -1  # of the last `enter`
    bound: dict[int, Bound] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    named: dict[int, int] = field(default_factory=dict)  # near steps that `to_fetch` has named, and their versions

    def near(self) -> Iterator[_Near]:
        """What it reads next or reads now."""
        for step, bound in self.bound.items():
            if bound.wanted is not None and bound.wanted <= SOON_STEPS:
                yield _Near(step, bound.end, bound.wanted, self.progress.chance(step))


@dataclass(frozen=True, slots=True)
class RunStanding:
    """How far a run has come, for a report. Steps by name, up to `STEPS_SHOWN` of each kind."""

    run: str
    workflow: str
    running: tuple[str, ...]
    near: tuple[str, ...]  # one step away
    bound: int  # steps of which it is known what they read


@dataclass(frozen=True, slots=True)
class WorkflowStanding:
    """One workflow, for a report."""

    workflow: str
    version: int
    steps: int
    runs: int  # that go by its name, whatever version they began with


@dataclass(slots=True)
class _Workflow:
    graph: Graph
    version: int
    used_ns: int


class Workflows:
    """Those of one tenant, and their runs. No verb raises whatever it is told."""

    __slots__ = ("_chains", "_values", "_workflows", "_runs", "_over")

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._values = Values(chains)
        self._workflows: dict[str, _Workflow] = {}  # the longest unused first
        self._runs: dict[str, Run] = {}
        self._over: Deadlines[Run] = Deadlines()

    def __len__(self) -> int:
        return len(self._runs)

    def define(self, name: str, graph: Graph, version: int, now_ns: int) -> Refused | None:
        """A workflow has this graph from now on; runs keep the one they began with. One too many ousts the longest
        unused.
        """
        if not is_name(name):
            return Refused(Refusal.NAME, shown(name))
        known = self._workflows.get(name)
        if known is not None and version <= known.version:
            if graph != known.graph:
                return Refused(Refusal.OLD, shown(name))
            self._use(name, now_ns)
            return None
        self._workflows.pop(name, None)
        if len(self._workflows) >= WORKFLOWS:
            del self._workflows[next(iter(self._workflows))]
        self._workflows[name] = _Workflow(graph, version, now_ns)
        return None

    def start(
        self, run: str, workflow: str, version: int, now_ns: int, ttl_s: float = RUN_TTL_S
    ) -> bool | Refused:  # fmt: skip
        """Begin an execution; it is over once nothing was heard of it for `ttl_s`. An older run of that name is ended.

        False: it is the one that runs already, and goes on.
        """
        if not is_name(run):
            return Refused(Refusal.NAME, shown(run))
        known = self._workflows.get(workflow)
        if known is None:
            return Refused(Refusal.UNKNOWN, shown(workflow))
        ttl_ns = duration_ns(ttl_s, TTL_S_MAX)
        if ttl_ns is None:
            return Refused(Refusal.TIME, shown(run))
        former = self._runs.get(run)
        if former is not None and version <= former.begun:
            return self._begun_again(former, workflow, version, now_ns)
        self.end(run)
        if len(self._runs) >= RUNS:
            return Refused(Refusal.FULL, shown(run))
        self._use(workflow, now_ns)
        self._runs[run] = Run(run, workflow, Progress(known.graph), ttl_ns, version)
        self._heard(self._runs[run], now_ns)
        return True

    def _begun_again(self, run: Run, workflow: str, version: int, now_ns: int) -> bool | Refused:
        if (version, workflow) != (run.begun, run.workflow):
            return Refused(Refusal.OLD, shown(run.name))
        self._use(workflow, now_ns)
        self._heard(run, now_ns)
        return False

    def _use(self, workflow: str, now_ns: int) -> None:
        known = self._workflows[workflow] = self._workflows.pop(workflow)
        known.used_ns = now_ns

    def enter(self, run: str, step: str, version: int, now_ns: int) -> tuple[Soon, ...] | Refused:
        """A step runs now. Answers what its run reads within a step, to be fetched."""
        refused = self.advance(run, step, version, now_ns)
        return self._soon((self._runs[run],), SOON_CHAINS) if refused is None else refused

    def advance(self, run: str, step: str, version: int, now_ns: int) -> Refused | None:
        """`enter` for who asks `to_fetch` what is near, and looks up no keys."""
        found = self._find(run, step)
        if isinstance(found, Refused):
            return found
        known, number = found
        self._heard(known, now_ns)
        if version <= known.version:
            return Refused(Refusal.OLD, shown(run))
        known.version = version
        known.progress.enter(number)
        known.entered.add(number)
        for each, bound in known.bound.items():
            self._values.follow(bound, known.progress.steps[each])
        self._values.go_on(AT_ONCE, some=False)
        return None

    def bind(self, run: str, step: str, chain: Chain, version: int, now_ns: int) -> Refused | None:
        """A step reads this chain, and no longer what was bound to it before."""
        found = self._find(run, step)
        if isinstance(found, Refused):
            return found
        known, number = found
        self._heard(known, now_ns)
        former = known.bound.get(number)
        if former is not None and version <= former.version:
            return Refused(Refusal.OLD, shown(step))
        end = self._chains.add(chain)
        if isinstance(end, Refused):
            return Refused(end.refusal, shown(step))
        beginning = chain.length
        if number in known.entered:
            beginning = 0 if former is None else min(former.beginning, beginning)
        value = known.progress.steps[number]
        known.bound[number] = Bound(end, version, beginning, value)
        self._values.follow(known.bound[number], value)
        if former is not None:
            self._values.leave([former])
        self._values.go_on(AT_ONCE, some=False)
        return None

    def end(self, run: str) -> Refused | None:
        """An execution is over."""
        known = self._runs.pop(run, None)
        if known is None:
            return Refused(Refusal.UNKNOWN, shown(run))
        self._over.drop(known)
        self._values.leave(known.bound.values())
        self._values.go_on(AT_ONCE, some=False)
        return None

    def due(self, now_ns: int, most: int = 1 << 62) -> None:
        """Forget what nothing was heard of for too long. Look again at `next_ns`."""
        for run in self._over.due(now_ns, most):
            self.end(run.name)
        for name, workflow in list(self._workflows.items()):
            if workflow.used_ns + WORKFLOW_TTL_S * SECOND_NS > now_ns:
                break
            del self._workflows[name]

    def forget(self, most: int) -> None:
        """End up to `most` runs."""
        for run in list(islice(self._runs, most)):
            self.end(run)

    def next_ns(self) -> int | None:
        """When a run is over; None if there is none. Workflows that are no longer used can wait for that."""
        return self._over.next_ns()

    @property
    def unsettled(self) -> bool:
        """Is the tree of chains behind what was said?"""
        return self._values.waiting

    def settle(self) -> None:
        """Have it follow, a slice of it."""
        self._values.go_on(A_SLICE, some=True)

    def worth(self, namespace: NamespaceNumber, key: BlockKey) -> int | None:
        """In how many steps a block is needed, over all runs; None if no step is known to need it."""
        return self._chains.least(mark_of(namespace, key))

    def bound_steps(self, run: str) -> tuple[int, ...]:
        """Steps of a run of which it is known what they read, by number."""
        known = self._runs.get(run)
        return () if known is None else tuple(known.bound)

    def chain_of(self, run: str, step: int) -> Chain | None:
        """What is bound to a step of a run; None if there is no such thing any more."""
        known = self._runs.get(run)
        bound = None if known is None else known.bound.get(step)
        return None if bound is None else self._chains.chain(bound.end)

    def end_of(self, run: str, step: int) -> Mark | None:
        """The last block of what is bound to a step of a run."""
        known = self._runs.get(run)
        bound = None if known is None else known.bound.get(step)
        return None if bound is None else bound.end

    def beginning_of(self, run: str, step: int) -> int:
        """Of what is bound to a step of a run, how many blocks it was bound to before it was first entered."""
        known = self._runs.get(run)
        bound = None if known is None else known.bound.get(step)
        return 0 if bound is None else bound.beginning

    def number_of(self, run: str, step: str) -> int | None:
        """A step by its name."""
        known = self._runs.get(run)
        return None if known is None else known.progress.graph.number(step)

    def running(self, run: str) -> frozenset[int]:
        """Steps of a run that run now."""
        known = self._runs.get(run)
        return frozenset() if known is None else known.progress.running

    def was_entered(self, run: str, step: int) -> bool:
        """Has a step run, or does it now?"""
        known = self._runs.get(run)
        return known is not None and step in known.entered

    def length_of(self, run: str, step: int) -> int:
        """Blocks of what is bound to a step of a run."""
        bound = self._runs[run].bound.get(step)
        return 0 if bound is None else self._chains.length(bound.end)

    def to_fetch(self, run: str) -> tuple[int, ...]:
        """Steps of a run that are near now and were not named here since they came near, or were bound anew. The
        nearest and most likely first.
        """
        known = self._runs.get(run)
        if known is None:
            return ()
        near = sorted(known.near(), key=lambda each: (each.steps, -each.chance))
        former, known.named = known.named, {each.step: known.bound[each.step].version for each in near}
        return tuple(each.step for each in near if former.get(each.step) != known.named[each.step])

    def is_near(self, run: str, step: int) -> bool:
        """Is a step of a run still to be read within a step?"""
        known = self._runs.get(run)
        return known is not None and step in known.named

    def standings(self) -> tuple[WorkflowStanding, ...]:
        """All workflows."""
        counts = Counter(run.workflow for run in self._runs.values())
        return tuple(
            WorkflowStanding(name, each.version, len(each.graph.names), counts[name])
            for name, each in self._workflows.items()
        )

    def run_standings(self, most_steps: int) -> Iterator[RunStanding]:
        """The latest runs, as many as have no more than so many steps together."""
        for run in reversed(self._runs.values()):
            most_steps -= len(run.progress.steps)
            if most_steps < 0:
                return
            yield _standing(run)

    def soon(self, most: int = SOON_CHAINS) -> tuple[Soon, ...]:
        """What to have in memory, the nearest and most likely first."""
        return self._soon(self._runs.values(), most)

    def _find(self, run: str, step: str) -> tuple[Run, int] | Refused:
        known = self._runs.get(run)
        if known is None:
            return Refused(Refusal.UNKNOWN, shown(run))
        number = known.progress.graph.number(step)
        return Refused(Refusal.UNKNOWN, shown(step)) if number is None else (known, number)

    def _heard(self, run: Run, now_ns: int) -> None:
        self._over.set(run, now_ns + run.ttl_ns)

    def _soon(self, runs: Iterable[Run], most: int) -> tuple[Soon, ...]:
        """The nearest and most likely first, and no more than so many chains and `SOON_BLOCKS`."""
        found = [(near, run) for run in runs for near in run.near()]
        found.sort(key=lambda each: (each[0].steps, -each[0].chance))
        soon: list[Soon] = []
        blocks = 0
        for near, run in found[: max(most, 0)]:
            blocks += self._chains.length(near.end)
            if blocks > SOON_BLOCKS:
                break
            name = run.progress.graph.names[near.step]
            soon.append(Soon(run.name, name, self._chains.chain(near.end), near.steps, near.chance))
        return tuple(soon)


def _standing(run: Run) -> RunStanding:
    names, steps = run.progress.graph.names, run.progress.steps
    running, near = (
        tuple(islice((name for name, away in zip(names, steps, strict=True) if away == wanted), STEPS_SHOWN))
        for wanted in (0, SOON_STEPS)
    )
    return RunStanding(run.name, run.workflow, running, near, len(run.bound))
