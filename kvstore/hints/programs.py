"""Programs of agents and the tools they call, and what follows for the context of each. State of one tenant.

                begin                     tool_started
    (unknown) ----------> THINKING <----------------------> IN_TOOL
        ^                     |          tool_finished          |
        `---------------------+---------------------------------'
            finished, or silent for too long: LetGo

    tool_started    Keep until Continuum's tau* (gaps.py) or, with an estimate of the caller, until four times that;
                    LetGo if it is not worth it. If the pin ends before the tool probably does: Fetch for that time
    tool_finished   Keep for a minute, until the next turn has begun, and Fetch at once: a pin may have been partial
    context         what it named last is its context: the pin, if there is one, moves there

What is said here is advice to whoever owns the memory; pins have a budget there. Under pressure they give way in the
order of `drop_order`, that of the program that came last first: who waits longest has the most to lose.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TypeAlias

from kvstore.hints.chains import Chain, Chains, Mark
from kvstore.hints.deadlines import Deadlines
from kvstore.hints.gaps import Gaps, deadline_ns
from kvstore.hints.limits import EXPECTED_S_MAX, PIN_NS_MAX, PIN_NS_MIN, PROGRAM_TTL_S, PROGRAMS, TTL_S_MAX
from kvstore.hints.refusal import Refusal, Refused, duration_ns, is_name, shown


@dataclass(frozen=True, slots=True)
class Keep:
    """Pin a program's context until then, instead of whatever was pinned for it before."""

    program: str
    chain: Chain
    until_ns: int


@dataclass(frozen=True, slots=True)
class LetGo:
    """Drop what is pinned for a program."""

    program: str


@dataclass(frozen=True, slots=True)
class Fetch:
    """Have a program's context in memory by then, if there is room and time for it. "": that of a run's step."""

    program: str
    chain: Chain
    by_ns: int


Action: TypeAlias = Keep | LetGo | Fetch
Answer: TypeAlias = tuple[Action, ...] | Refused


@dataclass(frozen=True, slots=True)
class Costs:
    """What it costs to lose this context, measured: waiting in the queue (mean), and getting it back."""

    queue_ns: int
    reload_ns: int


class State(Enum):
    """What a program is doing."""

    THINKING = 0
    IN_TOOL = 1


@dataclass(frozen=True, slots=True)
class Standing:
    """How a program stands, for a report."""

    program: str
    state: State
    tool: str  # the one it waits for, or the last one
    since_ns: int  # the tool runs, or last ran
    kept_ns: int  # its context is to be pinned until then; 0: it is not
    turns: int
    blocks: int  # of its context


@dataclass(slots=True, eq=False)
class _Program:
    name: str
    ttl_ns: int
    state: State = State.THINKING
    end: Mark | None = None  # of its context
    turns: int = 0
    tool: str = ""
    since_ns: int = 0  # the tool runs
    wanted_ns: int = 0  # when its context is likely needed again
    kept_ns: int = 0  # its context is pinned until then


class Programs:
    """Those of one tenant. Every verb answers with what to do, or why the hint is not taken; none raises."""

    __slots__ = ("_gaps", "_chains", "_programs", "_over", "_fetches", "_most")

    def __init__(self, gaps: Gaps, chains: Chains, most: int = PROGRAMS) -> None:
        self._gaps = gaps
        self._chains = chains
        self._programs: dict[str, _Program] = {}  # in order of arrival
        self._over: Deadlines[_Program] = Deadlines()
        self._fetches: Deadlines[_Program] = Deadlines()
        self._most = most

    def __len__(self) -> int:
        return len(self._programs)

    def begin(self, name: str, now_ns: int, ttl_s: float = PROGRAM_TTL_S) -> Answer:
        """A program is there, or is still there. It is over once it has been silent for `ttl_s`."""
        if not is_name(name):
            return Refused(Refusal.NAME, shown(name))
        ttl_ns = duration_ns(ttl_s, TTL_S_MAX)
        if ttl_ns is None:
            return Refused(Refusal.TIME, shown(name))
        program = self._programs.get(name)
        if program is None:
            if len(self._programs) >= self._most:
                return Refused(Refusal.FULL, shown(name))
            program = self._programs[name] = _Program(name, ttl_ns)
        program.ttl_ns = ttl_ns
        self._heard(program, now_ns)
        return ()

    def context(self, name: str, chain: Chain, now_ns: int) -> Answer:
        """The program used or stored this chain: its context is that, and no longer what it was."""
        program = self._programs.get(name)
        if program is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        self._heard(program, now_ns)
        end = self._chains.add(chain)
        if isinstance(end, Refused):
            return Refused(end.refusal, shown(name))  # the old one is most likely a part of it, so it stays
        if program.end is not None:
            self._chains.drop(program.end)
        program.end = end
        return (Keep(name, chain, program.kept_ns),) if program.kept_ns > now_ns else ()

    def tool_started(self, name: str, tool: str, now_ns: int, costs: Costs, expected_s: float | None = None) -> Answer:
        """It waits for a tool from now on, for about `expected_s` if the caller can tell."""
        program = self._programs.get(name)
        if program is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        if not is_name(tool):
            return Refused(Refusal.NAME, shown(tool))
        expected_ns = None if expected_s is None else duration_ns(expected_s, EXPECTED_S_MAX)
        if expected_s is not None and expected_ns is None:
            return Refused(Refusal.TIME, shown(tool))
        self._heard(program, now_ns)
        program.state, program.tool, program.since_ns = State.IN_TOOL, tool, now_ns
        if expected_ns is None:
            likely_ns = self._gaps.likely_ns(tool)
            keep_ns = self._gaps.worth_keeping_ns(tool, costs.queue_ns, costs.reload_ns)
        else:
            likely_ns, keep_ns = expected_ns, deadline_ns(expected_ns)
            if expected_ns > PIN_NS_MAX:
                keep_ns = 0  # a pin that ends before the tool does helps nobody
        self._fetches.drop(program)
        if likely_ns is not None and keep_ns < likely_ns:
            self._fetch_later(program, now_ns, now_ns + likely_ns, costs)
        return self._keep(program, now_ns + keep_ns if keep_ns else 0)

    def tool_finished(self, name: str, now_ns: int) -> Answer:
        """The tool has answered: the next turn is near."""
        program = self._programs.get(name)
        if program is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        self._heard(program, now_ns)
        if program.state is not State.IN_TOOL:
            return Refused(Refusal.NO_TOOL, shown(name))
        self._gaps.observed(program.tool, now_ns - program.since_ns)
        self._fetches.drop(program)
        program.state = State.THINKING
        if program.end is None:
            return ()
        kept = self._keep(program, now_ns + PIN_NS_MIN)
        return (*kept, Fetch(name, self._chains.chain(program.end), now_ns))

    def turn_finished(self, name: str, now_ns: int) -> Answer:
        """The model has answered. Nothing follows: the pin of the last tool call, if any, runs out by itself."""
        program = self._programs.get(name)
        if program is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        self._heard(program, now_ns)
        program.turns += 1
        return ()

    def finished(self, name: str) -> Answer:
        """It will not come back."""
        program = self._programs.get(name)
        if program is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        return (self._end(program),)

    def due(self, now_ns: int, most: int = 1 << 62) -> Iterator[Action]:
        """What follows from the passing of time. Look again at `next_ns`."""
        for program in self._fetches.due(now_ns, most):
            if program.end is not None:
                yield Fetch(program.name, self._chains.chain(program.end), program.wanted_ns)
        for program in self._over.due(now_ns, most):
            gap_ns = now_ns - program.since_ns
            if program.state is State.IN_TOOL and gap_ns >= PIN_NS_MAX:
                self._gaps.observed(program.tool, gap_ns + 1)  # it never ended: longer than that is what is known
            yield self._end(program)

    def forget(self, most: int) -> Iterator[Action]:
        """End up to `most` of them, those that came first."""
        for program in list(islice(self._programs.values(), most)):
            yield self._end(program)

    def next_ns(self) -> int | None:
        """When `due` has something to say; None if never."""
        return min((ns for ns in (self._fetches.next_ns(), self._over.next_ns()) if ns is not None), default=None)

    def context_of(self, name: str) -> Chain | None:
        """What a program named last, if there is such a program and it named anything."""
        program = self._programs.get(name)
        return None if program is None or program.end is None else self._chains.chain(program.end)

    def standings(self, most: int) -> Iterator[Standing]:
        """How up to `most` of them stand, those that came last first."""
        for program in islice(reversed(self._programs.values()), most):
            blocks = 0 if program.end is None else self._chains.length(program.end)
            yield Standing(
                program.name, program.state, program.tool, program.since_ns, program.kept_ns, program.turns, blocks
            )

    def drop_order(self, now_ns: int) -> Iterator[str]:
        """Programs whose contexts are pinned, in the order in which to drop them under pressure. Say `dropped`
        of each that was, and nothing else in between."""
        return (name for name, program in reversed(self._programs.items()) if program.kept_ns > now_ns)

    def dropped(self, name: str) -> None:
        """Its pin is gone, for lack of room."""
        if name in self._programs:
            self._programs[name].kept_ns = 0

    def _keep(self, program: _Program, until_ns: int) -> tuple[Action, ...]:
        program.kept_ns = until_ns if program.end is not None else 0
        if program.end is None or not until_ns:
            return (LetGo(program.name),)
        return (Keep(program.name, self._chains.chain(program.end), until_ns),)

    def _fetch_later(self, program: _Program, now_ns: int, wanted_ns: int, costs: Costs) -> None:
        """In time for the tool's end: twice what it takes, as predictions are vague and transfers queue."""
        program.wanted_ns = wanted_ns
        self._fetches.set(program, max(wanted_ns - 2 * costs.reload_ns, now_ns))

    def _heard(self, program: _Program, now_ns: int) -> None:
        self._over.set(program, now_ns + program.ttl_ns)

    def _end(self, program: _Program) -> LetGo:
        """It is over, or as good as: either way it teaches how many turns programs have."""
        if program.turns:
            self._gaps.ended(program.turns)
        self._fetches.drop(program)
        self._over.drop(program)
        if program.end is not None:
            self._chains.drop(program.end)
        del self._programs[program.name]
        return LetGo(program.name)
