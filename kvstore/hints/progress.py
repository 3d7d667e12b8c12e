"""How far one execution of a workflow has come: which steps run, and in how many steps each other one will.

Only beginnings are told; which steps are over follows from them. A step that begins ends

    those before it that run            if it waits for all of them, or came after one of them
    nothing                             if a step before it is over already and left it to be run (split "all")
    all that run and could lead to it   if neither is so: what happened between was not told
"""

from collections.abc import Iterable

from kvstore.hints.graph import START, Edge, Graph, steps_to_execution


class Progress:
    """How far one execution of a graph has come."""

    __slots__ = ("graph", "steps", "_running", "_passed")

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._running: set[int] = set()
        self._passed: set[Edge] = {(START, step) for step in graph.starts}
        self.steps = steps_to_execution(graph, self._running, self._passed)

    def enter(self, step: int) -> None:
        """A step runs from now on."""
        if step not in self._running:
            for each in self._over_by(step):
                self._finish(each, step)
            self._passed = {edge for edge in self._passed if edge[1] != step}
            self._running.add(step)
        self.steps = steps_to_execution(self.graph, self._running, self._passed)

    @property
    def running(self) -> frozenset[int]:
        """Steps that run now."""
        return frozenset(self._running)

    def chance(self, step: int) -> float:
        """That a step which is one step away will be run next."""
        if step in self._running:
            return 1.0
        before = self.graph.before[step]
        chances = [
            1.0 if (each, step) in self._passed else self.graph.chance(each, step)
            for each in before
            if each in self._running or (each, step) in self._passed
        ]
        if (START, step) in self._passed or not chances:
            return 1.0
        return min(chances) if self.graph.joins_all(step) else max(chances)

    def _over_by(self, step: int) -> set[int]:
        """Which running steps are over because this one begins."""
        before = set(self.graph.before[step])
        running = before & self._running
        told = {source for source, target in self._passed if target == step}
        if self.graph.joins_all(step):
            return running | self._skip(before - running - told)
        return set() if told else running or self._skip(before)

    def _skip(self, untold: Iterable[int]) -> set[int]:
        """What runs and leads to these steps is over, and nothing is left to be run on the way to them."""
        reached, waiting = set(untold), list(untold)
        while waiting:
            for step in self.graph.before[waiting.pop()]:
                if step not in reached:
                    reached.add(step)
                    waiting.append(step)
        self._passed = {edge for edge in self._passed if edge[1] not in reached}
        return reached & self._running

    def _finish(self, step: int, entered: int) -> None:
        """A step is over: of what follows, all the others are left to be run, or none if it chose one."""
        self._running.discard(step)
        if entered in self.graph.after[step] and not self.graph.one_of[step]:
            self._passed |= {(step, target) for target in self.graph.after[step]}
