"""Blocks whose next lease somebody wants to hear of: ends of pins, and what was prefetched. Owner thread.

A byte a row, so that a lease looks at an array and not at Python objects; a tenant that has nothing watched does not
pay even for that.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from kvstore.blocks import U1, U4

PIN_END: Final = 1
FETCHED: Final = 2

Leased = Callable[[U4], None]


class Watch:
    """Marks on rows. A row that was freed keeps its marks until who made them takes them away."""

    __slots__ = ("_marks", "_count", "_leased")

    def __init__(self, rows: int) -> None:
        self._marks: U1 = np.zeros(rows, dtype=np.uint8)  # untouched pages cost nothing
        self._count = 0
        self._leased: dict[int, Leased] = {}

    def tell(self, mark: int, leased: Leased) -> None:
        """`leased` hears of rows with this mark."""
        self._leased[mark] = leased

    @property
    def any(self) -> bool:
        """Is anything watched?"""
        return self._count > 0

    def mark(self, rows: U4, mark: int) -> None:
        """Watch these rows, each given once."""
        self._count += int((self._marks[rows] & mark == 0).sum())
        self._marks[rows] |= np.uint8(mark)

    def unmark(self, rows: U4, mark: int) -> None:
        """Watch them no longer."""
        self._count -= int((self._marks[rows] & mark != 0).sum())
        self._marks[rows] &= np.uint8(~mark & 0xFF)

    def leased(self, rows: U4) -> None:
        """Blocks were leased."""
        marks = self._marks[rows]
        if marks.any():
            for mark, leased in self._leased.items():
                marked = rows[marks & mark != 0]
                if marked.size:
                    leased(marked)
