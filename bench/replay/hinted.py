"""Replays a workload with what its agents say: tools that start and end, programs that are over, steps of workflows.

The same modules hear it as in the daemon (kvstore/hints); what they expect becomes hints on blocks. Nothing here knows
the future.
"""

from collections.abc import Iterable
from functools import singledispatchmethod

import numpy as np

from bench.replay.lab import START_NS, Cache, Setting
from bench.replay.score import Score, score
from bench.replay.workload import (
    NO_KEYS,
    Event,
    Graph,
    Join,
    Keys,
    ProgramFinished,
    Request,
    StepBound,
    StepEntered,
    ToolFinished,
    ToolStarted,
    TurnFinished,
    WorkflowBegun,
    WorkflowEnded,
    Workload,
)
from kvproto.ids import BlockKey, NamespaceNumber
from kvstore.hints import graph as hints
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.expectations import Expectation, in_seconds, in_steps
from kvstore.hints.gaps import Gaps
from kvstore.hints.refusal import Refused
from kvstore.hints.workflow import Workflows

SECOND_NS = 10**9
END = "end"


def replay_hinted(workload: Workload, capacity_bytes: int, setting: Setting) -> Score:
    """What a cache is worth whose agents say what they do."""
    play = _Play(Cache(workload, capacity_bytes, setting))
    for event in workload.events:
        play.hear(event)
    return score(workload, play.hits)


class _Play:
    def __init__(self, cache: Cache) -> None:
        self.hits: list[int] = []
        self._cache = cache
        self._contexts: dict[int, tuple[int, Keys]] = {}  # by program: model, and the chain it used last
        self._tools: dict[int, tuple[str, float]] = {}  # by program: what it waits for, since when
        self._gaps = Gaps()
        self._workflows = Workflows(Chains())
        self._bound: dict[int, dict[int, Keys]] = {}  # by run and step
        self._graphs: dict[int, Graph] = {}
        self._versions = 0

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """One event of the time line."""
        raise AssertionError(f"nobody listens to {event}")

    @hear.register
    def _(self, event: Request) -> None:
        self.hits.append(self._cache.serve(event))
        if event.program >= 0:
            self._contexts[event.program] = (event.model, np.concatenate((event.keys, event.output_keys)))

    @hear.register
    def _(self, event: ToolStarted) -> None:
        self._tools[event.program] = (event.tool, event.at_s)
        likely_ns = self._gaps.likely_ns(event.tool)
        self._expect(event.program, in_seconds(event.expected_s if likely_ns is None else likely_ns / SECOND_NS))

    @hear.register
    def _(self, event: ToolFinished) -> None:
        tool, since_s = self._tools.pop(event.program)
        self._gaps.observed(tool, int((event.at_s - since_s) * SECOND_NS))
        self._expect(event.program, Expectation.SOON)

    @hear.register
    def _(self, event: TurnFinished) -> None:
        """The next turn is up to a person: nothing is known."""

    @hear.register
    def _(self, event: ProgramFinished) -> None:
        self._expect(event.program, Expectation.HARDLY)
        self._contexts.pop(event.program, None)

    @hear.register
    def _(self, event: WorkflowBegun) -> None:
        described = _described(event.graph)
        assert not isinstance(described, Refused), described
        now_ns = _ns(event.at_s)
        self._versions += 1
        self._workflows.define(event.graph.name, described, self._versions, now_ns)
        refused = self._workflows.start(f"run-{event.run}", event.graph.name, now_ns)
        assert refused is None, refused
        self._bound[event.run], self._graphs[event.run] = {}, event.graph

    @hear.register
    def _(self, event: StepBound) -> None:
        name = self._graphs[event.run].steps[event.step].name
        self._versions += 1
        chain = Chain(NamespaceNumber(0), _key_bytes(event.keys))
        refused = self._workflows.bind(f"run-{event.run}", name, chain, self._versions, _ns(event.at_s))
        self._bound[event.run][event.step] = NO_KEYS if refused else event.keys

    @hear.register
    def _(self, event: StepEntered) -> None:
        name = self._graphs[event.run].steps[event.step].name
        self._versions += 1
        self._workflows.enter(f"run-{event.run}", name, self._versions, _ns(event.at_s))
        self._hint(self._bound[event.run].values())

    @hear.register
    def _(self, event: WorkflowEnded) -> None:
        self._workflows.end(f"run-{event.run}")
        for keys in self._bound.pop(event.run).values():
            levels = [self._level(key) or Expectation.HARDLY for key in keys.tolist()]
            self._cache.hint(0, keys, np.array(levels, np.uint8))

    def _expect(self, program: int, expected: Expectation) -> None:
        model, keys = self._contexts.get(program, (0, NO_KEYS))
        self._cache.hint(model, keys, np.full(keys.size, expected, np.uint8))

    def _hint(self, chains: Iterable[Keys]) -> None:
        for keys in chains:
            self._cache.hint(0, keys, np.array([self._level(key) for key in keys.tolist()], np.uint8))

    def _level(self, key: int) -> Expectation:
        return in_steps(self._workflows.worth(NamespaceNumber(0), BlockKey(_key_bytes(np.array([key], np.uint64)))))


def _key_bytes(keys: Keys) -> bytes:
    words = np.zeros((keys.size, 4), np.uint64)
    words[:, 0] = keys
    return words.tobytes()


def _described(graph: Graph) -> "hints.Graph | Refused":
    """A step that something earlier follows closes a loop: after it the loop goes round again, or all is over."""
    following: list[list[int]] = [[] for _ in graph.steps]
    for number, step in enumerate(graph.steps):
        for before in step.after:
            following[before].append(number)
    steps = []
    for number, step in enumerate(graph.steps):
        loops = any(after <= number for after in following[number])
        steps.append(
            hints.Step(
                step.name,
                (*(graph.steps[after].name for after in following[number]), *((END,) if loops else ())),
                hints.Which.ONE if loops else hints.Which.ALL,
                hints.Which.ALL if step.join is Join.ALL else hints.Which.ANY,
            )
        )
    return hints.Graph.of([*steps, hints.Step(END)])


def _ns(at_s: float) -> int:
    return START_NS + int(at_s * SECOND_NS)
