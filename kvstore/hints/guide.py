"""All that one tenant's clients have said, and what follows from it. Pure: whoever owns the memory does it.

    hint --> hear() --> Keep, LetGo, Fetch    of programs (programs.py)
                        Say                   words on blocks (words.py)
    time --> due()  --> LetGo, Fetch
             errand() -> Say, Fetch           of runs, one chain at a time: a step that begins may concern 256 chains,
                         in the tree of chains, too

What a source claims by EXPECT is passed on as it is. Each pool learns what a word turns out to be worth, by what became
of the blocks it was said of, so whoever says "soon" of everything is believed accordingly, and a weight on top would be
learned twice. Sources of one tenant are not told apart: their words are the same, and so is who bears what they cost.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import isnan
from typing import Final, TypeAlias

from kvproto.ids import NamespaceNumber
from kvproto.policy_frames import Event, Hint
from kvstore.hints.chains import Chain, Chains
from kvstore.hints.expectations import SAID, Expectation, in_seconds
from kvstore.hints.gaps import Gaps
from kvstore.hints.graph import Graph
from kvstore.hints.limits import ENDED_BLOCKS, EXPECTED_S_MAX, PROGRAM_TTL_S, RUN_TTL_S
from kvstore.hints.programs import Action, Costs, Fetch, Programs
from kvstore.hints.refusal import Refusal, Refused, duration_ns, is_name, shown
from kvstore.hints.visits import Visit, Visits
from kvstore.hints.words import Say, by_steps, of_all, of_tool
from kvstore.hints.workflow import Workflows

Deed: TypeAlias = Action | Say
Heard: TypeAlias = tuple[Deed, ...] | Refused
CostsOf: TypeAlias = Callable[[Chain], Costs]
NAMES_KEYS: Final = frozenset({Event.CONTEXT, Event.BIND, Event.EXPECT})  # events in whose hints a namespace counts
LOOKS: Final = 64  # at errands that have become void, in one turn
FREE: Final = Costs(0, 0)


class Guide:
    """One tenant's. No verb raises, whatever it is told."""

    __slots__ = (
        "gaps",
        "programs",
        "workflows",
        "_chains",
        "_visits",
        "_verbs",
        "_unsaid",
        "_unfetched",
        "_ended",
        "_ended_blocks",
    )

    def __init__(self, gaps: Gaps | None = None, chains: Chains | None = None) -> None:
        """`gaps`: what the tenant's tools have taught before."""
        self.gaps = gaps or Gaps()
        self._chains = chains or Chains()
        self.programs = Programs(self.gaps, self._chains)
        self.workflows = Workflows(self._chains)
        self._visits = Visits()
        self._unsaid: dict[tuple[str, int], None] = {}  # steps of runs: words on what they read are due
        self._unfetched: dict[tuple[str, int], None] = {}
        self._ended: deque[tuple[Chain, int]] = deque()  # what runs and visits read that are over; see `beginning_of`
        self._ended_blocks = 0
        self._verbs: dict[Event, Callable[[Hint, int, CostsOf], Heard]] = {
            Event.PROGRAM: self._program,
            Event.CONTEXT: self._context,
            Event.TOOL_STARTED: self._tool_started,
            Event.TOOL_FINISHED: self._tool_finished,
            Event.TURN_FINISHED: self._turn_finished,
            Event.PROGRAM_FINISHED: self._program_finished,
            Event.WORKFLOW: self._workflow,
            Event.RUN: self._run,
            Event.BIND: self._bind,
            Event.ENTER: self._enter,
            Event.RUN_FINISHED: self._run_finished,
            Event.EXPECT: self._expect,
        }

    def hear(self, hint: Hint, now_ns: int, costs_of: CostsOf) -> Heard:
        """What follows from a hint at once, or why it is not taken; more may follow by `errand`."""
        return self._verbs[hint.event](hint, now_ns, costs_of)

    def due(self, now_ns: int, most: int) -> Iterator[Deed]:
        """What follows from the passing of time, for up to `most` programs and as many runs."""
        yield from self.programs.due(now_ns, most)
        self.workflows.due(now_ns, most)

    def forget(self, most: int) -> Iterator[Deed]:
        """End up to `most` programs and as many runs, and say nothing of it."""
        yield from self.programs.forget(most)
        self.workflows.forget(most)

    def errand(self, now_ns: int) -> Deed | None:
        """The next thing that runs have left to do, a chain at a time; None: nothing, or nothing for others."""
        for _ in range(LOOKS):
            if self._unfetched:
                run, step = key = next(iter(self._unfetched))
                del self._unfetched[key]
                chain = self.workflows.chain_of(run, step)
                if chain is not None and self.workflows.is_near(run, step):
                    return Fetch("", chain, now_ns)
            elif self.workflows.unsettled:  # words come from there
                self.workflows.settle()
                return None
            elif self._ended:
                over, beginning = self._ended.popleft()
                self._ended_blocks -= over.length
                return by_steps(self._chains, over, beginning, Expectation.HARDLY)
            elif self._unsaid:
                run, step = key = next(iter(self._unsaid))
                del self._unsaid[key]
                chain = self.workflows.chain_of(run, step)
                if chain is not None:
                    return by_steps(self._chains, chain, self.workflows.beginning_of(run, step), Expectation.NONE)
            else:
                return None
        return None

    def next_ns(self) -> int | None:
        """When `due` or `errand` (0: at once) has something to do; None if never."""
        if self._unfetched or self._ended or self._unsaid or self.workflows.unsettled:
            return 0
        dues = (self.programs.next_ns(), self.workflows.next_ns())
        return min((ns for ns in dues if ns is not None), default=None)

    # -- programs ------------------------------------------------------------------------------------------------

    def _program(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        return self.programs.begin(hint.name, now_ns, PROGRAM_TTL_S if isnan(hint.seconds) else hint.seconds)

    def _context(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        chain = _chain(hint)
        heard = self.programs.context(hint.name, chain, now_ns)
        if isinstance(heard, Refused):
            return heard
        self._visits.began(hint.name, chain)
        ends = self._visits.ends_here(hint.name)
        return (*heard, *self._words(hint.name, Expectation.HARDLY if ends else Expectation.THINKING))

    def _tool_started(self, hint: Hint, now_ns: int, costs_of: CostsOf) -> Heard:
        context, expected_s = self.programs.context_of(hint.name), None if isnan(hint.seconds) else hint.seconds
        costs = FREE if context is None else costs_of(context)
        expected = of_tool(self.gaps, hint.other, expected_s)
        heard = self.programs.tool_started(hint.name, hint.other, now_ns, costs, expected_s)
        if isinstance(heard, Refused):
            return heard
        self._visits.went_on(hint.name)
        return (*heard, *self._words(hint.name, expected))

    def _tool_finished(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        heard = self.programs.tool_finished(hint.name, now_ns)
        if isinstance(heard, Refused):
            return heard
        return (*heard, *self._words(hint.name, Expectation.AT_ONCE))

    def _turn_finished(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        return self.programs.turn_finished(hint.name, now_ns)

    def _program_finished(self, hint: Hint, _: int, __: CostsOf) -> Heard:
        words = self._words(hint.name, Expectation.HARDLY, Expectation.NONE)
        heard = self.programs.finished(hint.name)
        if isinstance(heard, Refused):
            return heard
        self._visits.forget(hint.name)
        return (*heard, *words)

    def _words(self, name: str, expected: Expectation, kept: Expectation | None = None) -> tuple[Say, ...]:
        """Of a program's context; but of what steps begin with what they say. `kept`: of what its step goes on from."""
        context = self.programs.context_of(name)
        if context is None:
            return ()
        beginning = self._visits.beginning(name, context.length)
        return (by_steps(self._chains, context, beginning, expected, expected if kept is None else kept),)

    # -- workflows -----------------------------------------------------------------------------------------------

    def _workflow(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        if not is_name(hint.name):
            return Refused(Refusal.NAME, shown(hint.name))
        graph = Graph.parse(hint.text.encode())
        if isinstance(graph, Refused):
            return graph
        return self.workflows.define(hint.name, graph, hint.version, now_ns) or ()

    def _run(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        former = list(self._bound(hint.name))  # a run of that name is over, unless it is this one or this is refused
        ttl_s = RUN_TTL_S if isnan(hint.seconds) else hint.seconds
        begun = self.workflows.start(hint.name, hint.other, hint.version, now_ns, ttl_s)
        if isinstance(begun, Refused):
            return begun
        if begun:
            self._over(former)
            self._forget_run(hint.name)
        return ()

    def _bind(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        refused = self.workflows.bind(hint.name, hint.other, _chain(hint), hint.version, now_ns)
        if refused is None:
            step = self.workflows.number_of(hint.name, hint.other)
            if step is not None and self.workflows.was_entered(hint.name, step):
                self._left(hint.name, step)
                self._unsaid[hint.name, step] = None
            self._unfetched |= dict.fromkeys((hint.name, step) for step in self.workflows.to_fetch(hint.name))
        return refused or ()

    def _enter(self, hint: Hint, now_ns: int, _: CostsOf) -> Heard:
        ran = self.workflows.running(hint.name)
        refused = self.workflows.advance(hint.name, hint.other, hint.version, now_ns)
        if refused is None:
            for step in ran - self.workflows.running(hint.name):
                self._left(hint.name, step)
            self._entered(hint.name, hint.other)
            self._unfetched |= dict.fromkeys((hint.name, step) for step in self.workflows.to_fetch(hint.name))
            self._unsaid |= dict.fromkeys((hint.name, step) for step in self.workflows.bound_steps(hint.name))
        return refused or ()

    def _run_finished(self, hint: Hint, _: int, __: CostsOf) -> Heard:
        bound, ran = list(self._bound(hint.name)), self.workflows.running(hint.name)
        refused = self.workflows.end(hint.name)
        if refused is None:
            for step in ran:
                self._left(hint.name, step)
            self._over(bound)
            self._forget_run(hint.name)
        return refused or ()

    def _entered(self, run: str, name: str) -> None:
        step = self.workflows.number_of(run, name)
        end = None if step is None else self.workflows.end_of(run, step)
        if step is not None and end is not None:
            self._visits.entered(Visit(run, step, name, self.workflows.beginning_of(run, step)), end)

    def _left(self, run: str, step: int) -> None:
        """A visit is over: of what its program named, only what steps go on from is of use."""
        program = self._visits.left(run, step)
        context = None if program is None else self.programs.context_of(program)
        if program is None or context is None:
            return
        if self._ended_blocks + context.length <= ENDED_BLOCKS:
            self._over([(context, self._visits.beginning(program, context.length))])
        self._visits.forget(program)

    def _bound(self, run: str) -> Iterator[tuple[Chain, int]]:
        """What a run reads, as far as there is room for it to wait until words are said of it."""
        room = ENDED_BLOCKS - self._ended_blocks
        for step in self.workflows.bound_steps(run):
            room -= self.workflows.length_of(run, step)
            chain = self.workflows.chain_of(run, step) if room >= 0 else None
            if chain is None:
                return
            yield chain, self.workflows.beginning_of(run, step)

    def _forget_run(self, run: str) -> None:
        """Nothing is left to be said or fetched for it."""
        for left in (self._unsaid, self._unfetched):
            for key in [key for key in left if key[0] == run]:
                del left[key]

    def _over(self, bound: Iterable[tuple[Chain, int]]) -> None:
        for chain, beginning in bound:
            self._ended.append((chain, beginning))
            self._ended_blocks += chain.length

    # -- what anybody says of any blocks ---------------------------------------------------------------------------

    def _expect(self, hint: Hint, _: int, __: CostsOf) -> Heard:
        """`hint.seconds` if that is a number, else `hint.expectation`: nothing (0) takes back what was said."""
        if not is_name(hint.name):
            return Refused(Refusal.NAME, shown(hint.name))
        if not hint.keys:
            return Refused(Refusal.FORM, shown(hint.name))
        if isnan(hint.seconds):
            return (of_all(_chain(hint), SAID[hint.expectation]),)
        if duration_ns(hint.seconds, EXPECTED_S_MAX) is None:
            return Refused(Refusal.TIME, shown(hint.name))
        return (of_all(_chain(hint), in_seconds(hint.seconds)),)


def _chain(hint: Hint) -> Chain:
    return Chain(NamespaceNumber(hint.namespace), hint.keys)
