"""Which program is at which step of a run, and how often turns of such a step are followed by another one.

Nobody says which program carries out a step. But a program whose context begins with what is bound to a step that has
just been entered is most likely the one. A visit is over when its step is, or is bound to what it keeps from now on.

    ENTER   the step waits for its program        CONTEXT  the program has begun a turn, which goes on, or does not
    TOOL    the turn went on                      BIND, ENTER, RUN_FINISHED  the visit is over: the last one did not

Shares are learned by name of the step, as tools' gaps are by theirs; a step of which little is known has that of all.
Bounded: what came first goes first.
"""

from typing import Final, NamedTuple, TypeVar

from kvstore.hints.chains import Chain, Mark, marks_of
from kvstore.hints.limits import PROGRAMS, TOOLS

_PRIOR: Final = 4.0  # turns
_TURNS_MAX: Final = 1024.0  # of a name; then all of it counts half
_SELDOM: Final = 0.2

K = TypeVar("K")
V = TypeVar("V")


class Visit(NamedTuple):
    """A step of a run. `beginning`: blocks that it begins with, whoever runs it."""

    run: str
    step: int
    name: str
    beginning: int


class Visits:
    """Those of one tenant."""

    __slots__ = ("_waiting", "_visits", "_programs", "_turns", "_all")

    def __init__(self) -> None:
        self._waiting: dict[Mark, list[Visit]] = {}  # by the last block of what they read
        self._visits: dict[str, Visit] = {}  # by program
        self._programs: dict[tuple[str, int], str] = {}
        self._turns: dict[str, list[float]] = {}  # by name of the step: those that went on, and those that did not
        self._all = [1.0, 1.0]

    def entered(self, visit: Visit, end: Mark) -> None:
        """A step runs now that reads the chain that ends there."""
        waiting = self._waiting.get(end, [])
        _put(self._waiting, end, [*waiting[-7:], visit], PROGRAMS)

    def began(self, program: str, context: Chain) -> None:
        """A program is at a turn with this context: at the step that begins with the most of it, if one waits."""
        if not self._waiting:
            return
        marks = marks_of(context)
        ends = self._waiting.keys() & marks
        if not ends:
            return
        end = next(mark for mark in reversed(marks) if mark in ends)
        visit = self._waiting[end].pop(0)
        if not self._waiting[end]:
            del self._waiting[end]
        _put(self._visits, program, visit, PROGRAMS)
        _put(self._programs, visit[:2], program, PROGRAMS)

    def went_on(self, program: str) -> None:
        """Its turn ended with a call of a tool."""
        self._count(self._visits.get(program), 0)

    def left(self, run: str, step: int) -> str | None:
        """A visit is over. Returns whose."""
        program = self._programs.pop((run, step), None)
        visit = None if program is None else self._visits.get(program)
        if visit is None or visit[:2] != (run, step):  # it is over, or at another step by now
            return None
        self._count(visit, 1)
        return program

    def beginning(self, program: str, length: int) -> int:
        """How much of a program's context its step begins with; all of it, if it is at none."""
        visit = self._visits.get(program)
        return length if visit is None else min(visit.beginning, length)

    def ends_here(self, program: str) -> bool:
        """Is it at a step whose turns seldom go on?"""
        visit = self._visits.get(program)
        if visit is None:
            return False
        on, over = self._turns.get(visit.name, (0.0, 0.0))
        usual = self._all[0] / sum(self._all)
        return (on + _PRIOR * usual) / (on + over + _PRIOR) < _SELDOM

    def forget(self, program: str) -> None:
        """A program is over."""
        self._visits.pop(program, None)

    def _count(self, visit: Visit | None, which: int) -> None:
        if visit is None:
            return
        turns = self._turns.get(visit.name)
        if turns is None:
            turns = [0.0, 0.0]
            _put(self._turns, visit.name, turns, TOOLS)
        for counts in (turns, self._all):
            counts[which] += 1
            if sum(counts) > _TURNS_MAX:
                counts[:] = [count / 2 for count in counts]


def _put(table: dict[K, V], key: K, value: V, most: int) -> None:
    """The latest last, and the first out."""
    table.pop(key, None)
    if len(table) >= most:
        del table[next(iter(table))]
    table[key] = value
