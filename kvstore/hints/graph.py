"""Step graphs of workflows: which step comes after which, and how far each is from being run.

Steps to execution as in KVFlow (Pan et al., "KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent
Workflows", arXiv 2507.07400):

    E(s) = 0                        s runs
           1 + max E(p) over all p  join "all": s waits for every step p before it
           1 + min E(p) over all p  join "any": s waits for one of them
           none                     s is not reached any more

A description comes from a caller, so everything in it is checked:

    {"steps": [{"name": "plan", "next": ["search", "write"], "split": "one", "chances": [0.8, 0.2]},
               {"name": "search", "next": ["plan"]},
               {"name": "write"}]}

"split": after the step "all" of the next ones are run (the default) or "one" of them, with "chances" if they are known.
"join": "any" (the default) or "all". A cycle is a loop; it has to have an exit, which is a step with split "one".
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from kvstore.hints.limits import GRAPH_COMMAS, GRAPH_EDGES, GRAPH_STEPS, GRAPH_TEXT_BYTES
from kvstore.hints.refusal import Refusal, Refused, is_name, shown

Edge: TypeAlias = tuple[int, int]
START: Final = -1  # stands before the steps that a run may begin with, and is enough for each of them


class Which(Enum):
    """How many of the steps before, or after."""

    ALL = "all"
    ANY = "any"
    ONE = "one"


_WORDS: Final = {which.value: which for which in Which}


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it is described. `chances`: of each in `next`, or nothing if they are not known."""

    name: str
    next: tuple[str, ...] = ()
    split: Which = Which.ALL
    join: Which = Which.ANY
    chances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A sound one. Steps are numbered as they were described."""

    names: tuple[str, ...]
    by_name: dict[str, int]
    after: tuple[tuple[int, ...], ...]
    before: tuple[tuple[int, ...], ...]
    waits: tuple[int, ...]  # how many steps before it a step waits for
    one_of: tuple[bool, ...]  # by step: is one of the next ones run, or are all?
    chances: tuple[tuple[float, ...], ...]  # of the next ones, evenly split if they are not known
    starts: tuple[int, ...]  # those that nothing stands before; if all are in cycles, the one described first

    @staticmethod
    def parse(text: bytes) -> "Graph | Refused":
        """From a description in JSON."""
        if len(text) > GRAPH_TEXT_BYTES or text.count(b",") > GRAPH_COMMAS:  # looked at before it costs to read them
            return Refused(Refusal.LARGE)
        steps = _described(text)
        return steps if isinstance(steps, Refused) else Graph.of(steps)

    @staticmethod
    def of(steps: Sequence[Step]) -> "Graph | Refused":
        """From described steps."""
        if len(steps) > GRAPH_STEPS or sum(len(step.next) for step in steps) > GRAPH_EDGES:
            return Refused(Refusal.LARGE)
        numbers = {step.name: number for number, step in enumerate(steps)}
        refused = _first_fault(steps, numbers)
        if refused is not None:
            return refused
        after = tuple(tuple(numbers[name] for name in step.next) for step in steps)
        before: list[list[int]] = [[] for _ in steps]
        for number, nexts in enumerate(after):
            for target in nexts:
                before[target].append(number)
        endless = _endless(steps, after, before)
        if endless is not None:
            return Refused(Refusal.ENDLESS, shown(steps[endless].name))
        return Graph(
            names=tuple(step.name for step in steps),
            by_name=numbers,
            after=after,
            before=tuple(map(tuple, before)),
            waits=tuple(max(len(before[n]), 1) if step.join is Which.ALL else 1 for n, step in enumerate(steps)),
            one_of=tuple(step.split is Which.ONE for step in steps),
            chances=tuple(
                step.chances or (1 / len(step.next),) * len(step.next) if step.next else () for step in steps
            ),
            starts=tuple(number for number in range(len(steps)) if not before[number]) or (0,),
        )

    def number(self, name: str) -> int | None:
        """Of the step of that name."""
        return self.by_name.get(name)

    def joins_all(self, step: int) -> bool:
        """Does it wait for every step before it?"""
        return self.waits[step] > 1

    def chance(self, step: int, target: int) -> float:
        """That `target` is run after `step`."""
        return self.chances[step][self.after[step].index(target)] if self.one_of[step] else 1.0


def steps_to_execution(graph: Graph, running: Collection[int], passed: Collection[Edge]) -> list[int | None]:
    """E of every step. `passed`: edges whose first step is over and whose second one has yet to be run.

    Level by level: a step has its number once enough of those before it have theirs, in O(steps + edges).
    """
    steps: list[int | None] = [None] * len(graph.names)
    waits = list(graph.waits)
    for step in running:
        steps[step] = 0
    ready = []
    for source, target in passed:
        waits[target] -= waits[target] if source == START else 1
        if waits[target] <= 0 and steps[target] is None:
            steps[target] = 1
            ready.append(target)
    level, distance = list(running), 1
    while level or ready:
        following, ready = ready, []
        for step in level:
            for target in graph.after[step]:
                if steps[target] is None and (step, target) not in passed:
                    waits[target] -= 1
                    if waits[target] <= 0:
                        steps[target] = distance
                        following.append(target)
        level = following
        distance += 1
    return steps


def _described(text: bytes) -> list[Step] | Refused:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        return Refused(Refusal.FORM)
    steps = described.get("steps") if isinstance(described, dict) else None
    if not isinstance(steps, list) or not steps:
        return Refused(Refusal.FORM)
    if len(steps) > GRAPH_STEPS:
        return Refused(Refusal.LARGE)
    parsed = []
    for step in steps:
        one = _step(step)
        if isinstance(one, Refused):
            return one
        parsed.append(one)
    return parsed


def _step(step: object) -> Step | Refused:
    if not isinstance(step, dict):
        return Refused(Refusal.FORM)
    name, nexts, chances = step.get("name"), step.get("next", []), step.get("chances", [])
    if not isinstance(name, str):
        return Refused(Refusal.FORM)
    split, join = step.get("split", "all"), step.get("join", "any")
    if split not in ("all", "one") or join not in ("all", "any"):
        return Refused(Refusal.FORM, shown(name))
    if not isinstance(nexts, list) or not set(map(type, nexts)) <= {str}:
        return Refused(Refusal.FORM, shown(name))
    if not isinstance(chances, list) or not set(map(type, chances)) <= {int, float}:
        return Refused(Refusal.CHANCE, shown(name))
    return Step(name, tuple(nexts), _WORDS[split], _WORDS[join], tuple(chances))


def _first_fault(steps: Sequence[Step], numbers: dict[str, int]) -> Refused | None:
    for number, step in enumerate(steps):
        refusal = _fault(step)
        if refusal is None and numbers[step.name] != number:
            refusal = Refusal.TWICE
        if refusal is not None:
            return Refused(refusal, shown(step.name))
        for target in step.next:
            if target not in numbers:
                return Refused(Refusal.UNKNOWN, shown(target))
    return None if steps else Refused(Refusal.FORM)


def _fault(step: Step) -> Refusal | None:
    if not is_name(step.name):
        return Refusal.NAME
    if len(set(step.next)) != len(step.next):
        return Refusal.TWICE
    if step.split is Which.ANY or step.join is Which.ONE:
        return Refusal.FORM
    return Refusal.CHANCE if step.chances and not _are_chances(step) else None


def _are_chances(step: Step) -> bool:
    """One a step, each above 0 (or it would be no exit), together 1 but for rounding. NaN fails every comparison."""
    return (
        step.split is Which.ONE
        and len(step.chances) == len(step.next)
        and all(0 < chance <= 1 for chance in step.chances)
        and abs(sum(step.chances) - 1) < 0.01
    )


def _endless(steps: Sequence[Step], after: Sequence[tuple[int, ...]], before: Sequence[list[int]]) -> int | None:
    """A step from which no end is reached: a cycle in which none chooses, or that every choice leads back to."""
    choosing = [step.split is Which.ONE and len(step.next) > 1 for step in steps]
    left = [0 if choosing[n] else len(after[n]) for n in range(len(steps))]
    certain = _backwards(before, left, [n for n, count in enumerate(left) if not count])
    some = [1 if after[n] else 0 for n in range(len(steps))]
    possible = _backwards(before, some, [n for n, count in enumerate(some) if not count])
    return next((n for n in range(len(steps)) if n not in certain or n not in possible), None)


def _backwards(before: Sequence[list[int]], left: list[int], ends: list[int]) -> set[int]:
    """Steps of which so many of the next ones as `left` says lead to `ends` at last."""
    reached, waiting = set(ends), list(ends)
    while waiting:
        for step in before[waiting.pop()]:
            left[step] -= 1
            if left[step] == 0 and step not in reached:
                reached.add(step)
                waiting.append(step)
    return reached
