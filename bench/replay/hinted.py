"""Replays a workload with what its agents say: tools that start and end, programs that are over, steps of workflows.

They say it as on the wire, and what listens is the daemon's own `Guide` (kvstore/hints/guide.py). Of what follows, the
words on blocks are carried out; a program names what it asks for, since what of an answer the template will keep shows
with its next request. Pins and fetches are not, so what is measured is what words are worth to a rule.
Nothing here knows the future.
"""

import json
from functools import singledispatchmethod
from itertools import count

import numpy as np

from bench.replay.lab import START_NS, Cache, Setting
from bench.replay.score import Score, score
from bench.replay.workload import (
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
from kvproto.limits import KEY_BYTES
from kvproto.policy_frames import UNKNOWN, Hint
from kvproto.policy_frames import Event as Said
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.guide import Guide
from kvstore.hints.limits import TTL_S_MAX
from kvstore.hints.programs import Costs
from kvstore.hints.refusal import Refused
from kvstore.hints.words import Say

SECOND_NS = 10**9
END = "end"
NO_COSTS = Costs(0, 0)
BLOCKS, ENDS = 1 << 20, 1 << 14  # a workload's own sizes: no tenant of the lab is bounded


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
        self._guide = Guide(chains=Chains(BLOCKS, ENDS))
        self._begun: set[int] = set()  # programs
        self._graphs: dict[int, Graph] = {}  # by run
        self._versions = count(1)

    @singledispatchmethod
    def hear(self, event: Event) -> None:
        """One event of the time line."""
        raise AssertionError(f"nobody listens to {event}")

    @hear.register
    def _(self, event: Request) -> None:
        self.hits.append(self._cache.serve(event))
        if event.program < 0:
            return
        name = _program(event.program)
        if event.program not in self._begun:
            self._begun.add(event.program)
            self._say(event, Hint(Said.PROGRAM, name, seconds=TTL_S_MAX))
        self._say(event, Hint(Said.CONTEXT, name, namespace=event.model, keys=_key_bytes(event.keys)))

    @hear.register
    def _(self, event: ToolStarted) -> None:
        seconds = UNKNOWN if event.expected_s is None else event.expected_s
        self._say(event, Hint(Said.TOOL_STARTED, _program(event.program), event.tool, seconds=seconds))

    @hear.register
    def _(self, event: ToolFinished) -> None:
        self._say(event, Hint(Said.TOOL_FINISHED, _program(event.program)))

    @hear.register
    def _(self, event: TurnFinished) -> None:
        self._say(event, Hint(Said.TURN_FINISHED, _program(event.program)))

    @hear.register
    def _(self, event: ProgramFinished) -> None:
        if event.program in self._begun:
            self._begun.remove(event.program)
            self._say(event, Hint(Said.PROGRAM_FINISHED, _program(event.program)))

    @hear.register
    def _(self, event: WorkflowBegun) -> None:
        name, run = event.graph.name, _run(event.run)
        self._say(event, Hint(Said.WORKFLOW, name, text=_described(event.graph), version=next(self._versions)))
        self._say(event, Hint(Said.RUN, run, name))
        self._graphs[event.run] = event.graph

    @hear.register
    def _(self, event: StepBound) -> None:
        keys = _key_bytes(event.keys)
        name, version = self._graphs[event.run].steps[event.step].name, next(self._versions)
        self._say(event, Hint(Said.BIND, _run(event.run), name, version=version, keys=keys))

    @hear.register
    def _(self, event: StepEntered) -> None:
        name, version = self._graphs[event.run].steps[event.step].name, next(self._versions)
        self._say(event, Hint(Said.ENTER, _run(event.run), name, version=version))

    @hear.register
    def _(self, event: WorkflowEnded) -> None:
        self._say(event, Hint(Said.RUN_FINISHED, _run(event.run)))
        del self._graphs[event.run]

    def _say(self, event: Event, hint: Hint) -> None:
        """All that follows does so at once: the lab has all the time in the world."""
        now_ns = _ns(event.at_s)
        heard = self._guide.hear(hint, now_ns, lambda _: NO_COSTS)
        assert not isinstance(heard, Refused), (hint.event, heard)
        for deed in heard:
            if isinstance(deed, Say):
                self._hint(deed)
        while self._guide.next_ns() == 0:
            errand = self._guide.errand(now_ns)
            if isinstance(errand, Say):
                self._hint(errand)

    def _hint(self, said: Say) -> None:
        self._cache.hint(said.chain.namespace, _keys(said.chain), np.frombuffer(said.levels, np.uint8).copy())


def _program(number: int) -> str:
    return f"program-{number}"


def _run(number: int) -> str:
    return f"run-{number}"


def _key_bytes(keys: Keys) -> bytes:
    words = np.zeros((keys.size, KEY_BYTES // 8), np.uint64)
    words[:, 0] = keys
    return words.tobytes()


def _keys(chain: Chain) -> Keys:
    return np.frombuffer(chain.keys, np.uint64)[:: KEY_BYTES // 8]


def _described(graph: Graph) -> str:
    """A step that something earlier follows closes a loop: after it the loop goes round again, or all is over."""
    following: list[list[int]] = [[] for _ in graph.steps]
    for number, step in enumerate(graph.steps):
        for before in step.after:
            following[before].append(number)
    steps: list[dict[str, object]] = []
    for number, step in enumerate(graph.steps):
        loops = any(after <= number for after in following[number])
        steps.append(
            {
                "name": step.name,
                "next": [*(graph.steps[after].name for after in following[number]), *([END] if loops else [])],
                "split": "one" if loops else "all",
                "join": "all" if step.join is Join.ALL else "any",
            }
        )
    return json.dumps({"steps": [*steps, {"name": END}]})


def _ns(at_s: float) -> int:
    return START_NS + int(at_s * SECOND_NS)
