"""Which rows' blocks are over there, as far as this life of the daemon knows. Owner thread.

Names of objects have 18 bits of each key (`remote_format.py`), so when an object goes, what had such bits is not taken
for being there any more: of other blocks one in 4,096 for each object of 64. Whoever is wrongly not taken for it is
looked up, and not written again. That it is gone may be heard before that it came there, so whoever brings the latter
says since when it may be so (`moment`). Of the block that an object begins with more is in its name, so that an object
of these rows has gone is known but for one in 2 million (`removed`).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.blocks import U4, U8, Tables
from kvstore.tier.remote_format import MARKS, Place, key_digest, mark_numbers, mark_of, marks_of
from kvstore.tier.remote_uses import PLACES, place_in, place_of_digest


class There:
    """24 bytes a row of the table, 18 MiB beside."""

    def __init__(self, tables: Tables) -> None:
        self.moment = 1  # grows with what goes
        self._table = tables.blocks
        self._generations: U8 = tables.blocks["generation"]
        self._generation: U8 = np.zeros(tables.blocks.size, dtype=np.uint64)
        self._mark: U4 = np.zeros(tables.blocks.size, dtype=np.uint32)
        self._since: U8 = np.zeros(tables.blocks.size, dtype=np.uint64)
        self._gone: U8 = np.zeros(MARKS, dtype=np.uint64)  # by mark: the moment at which one went
        self._place: U4 = np.zeros(tables.blocks.size, dtype=np.uint32)  # in `Uses`
        self._first_gone: U8 = np.zeros(PLACES, dtype=np.uint64)  # when an object went that began with a block of these

    def came(self, rows: U4, place: Place, moment: int) -> None:
        """Blocks are there since this moment. 2 us each."""
        self._generation[rows] = self._table["generation"][rows]
        keys = self._table["key"][rows]
        digests = [key_digest(place, key.tobytes()) for key in keys]
        self._mark[rows] = mark_numbers([mark_of(digest) for digest in digests])
        self._place[rows] = [place_of_digest(digest) for digest in digests]
        self._since[rows] = moment

    def gone(self, names: Sequence[str]) -> None:
        """These objects are there no more."""
        for name in names:
            marks = marks_of(name)
            self._gone[mark_numbers(marks)] = self.moment
            if marks:
                self._first_gone[place_in(name)] = self.moment
            self.moment += 1

    def failed(self, row: int, generation: int) -> None:
        """It has not come there."""
        if self.was(row, generation):
            self._generation[row] = 0

    def left_out(self, row: int, generation: int) -> None:
        """It had gone, and was not written again: it is still gone."""
        if self.was(row, generation):
            self._since[row] = 0

    def was(self, row: int, generation: int) -> bool:
        """Has it come there in this life?"""
        return self._generation.item(row) == generation

    def were(self, rows: U4) -> npt.NDArray[np.bool_]:
        """Which have come there in this life."""
        same: npt.NDArray[np.bool_] = self._generation[rows] == self._table["generation"][rows]
        return same

    def are(self, rows: U4) -> npt.NDArray[np.bool_]:
        """Which of them have not gone since."""
        return self.were(rows) & (self._gone[self._mark[rows]] < self._since[rows])

    def removed(self, rows: U4) -> npt.NDArray[np.bool_]:
        """With which of them an object began that has gone since."""
        return self.were(rows) & (self._first_gone[self._place[rows]] >= self._since[rows])

    def places(self, rows: U4) -> tuple[U4, bool]:
        """Where the bits of those are that have come there; and is any of them `removed`?"""
        there = rows[self._generation[rows] == self._generations[rows]]
        places = self._place[there]
        return places, bool((self._first_gone[places] >= self._since[there]).any())
