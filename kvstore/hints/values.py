"""What stands in the tree of chains (chains.py) for the steps that are bound to them: it follows runs, some at a time.

    a step begins, is bound, is over -> follow, leave -> go_on, a slice at a time -> the tree

A step that begins moves all steps of its run, and every move walks up a chain that other chains may have cut into as
many pieces as it has blocks: 1.4 us each, whoever sent how small a frame. Moves of a step that wait are one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kvstore.hints.chains import Chains, Change, Mark

AT_ONCE: Final = 256  # blocks of chains that move while a frame is answered: 0.4 ms,
A_SLICE: Final = 1024  # and in a tick: 1.5 ms; or one chain, which no frame makes longer than that
A_CHAIN: Final = 8  # what each takes however short it is, in blocks


@dataclass(slots=True, eq=False)
class Bound:
    """What a step reads."""

    end: Mark
    version: int
    beginning: int  # blocks: what the step was bound to before it was first entered
    wanted: int | None  # its value
    value: int | None = None  # that in the tree
    over: bool = False


class Values:
    """Those of one tenant."""

    __slots__ = ("_chains", "_due")

    def __init__(self, chains: Chains) -> None:
        self._chains = chains
        self._due: dict[Bound, None] = {}

    @property
    def waiting(self) -> bool:
        """Is the tree behind?"""
        return bool(self._due)

    def follow(self, bound: Bound, value: int | None) -> None:
        """It has this value from now on."""
        bound.wanted = value
        if value != bound.value:
            self._due[bound] = None

    def leave(self, bounds: Iterable[Bound]) -> None:
        """These are over: their chains are named no more."""
        for bound in bounds:
            bound.wanted, bound.over = None, True
            self._due[bound] = None

    def go_on(self, most_blocks: int, *, some: bool) -> None:
        """Have chains of so many blocks follow. `some`: one of them, however long it is."""
        changes: list[Change] = []
        over: list[Mark] = []
        while self._due:
            bound = next(iter(self._due))
            most_blocks -= self._chains.length(bound.end) + A_CHAIN
            if most_blocks < 0 and (changes or not some):
                break
            del self._due[bound]
            changes.append((bound.end, bound.value, bound.wanted))
            bound.value = bound.wanted
            if bound.over:
                over.append(bound.end)
        self._chains.change(changes)
        for end in over:
            self._chains.drop(end)
