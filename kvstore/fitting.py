"""Costs learned from timings that are noisy, late or false: medians of the last ones, and a fit through the medians.

A timing goes to its cell, among timings of about the same size. A cell answers with its lower median, so half of its
timings may be nonsense before it is; a sum of non-negative costs is laid through the medians, and no cell pulls it far.

    timings --(off from what is expected)--> lower median of each cell --(weighted, reweighted)--> costs
                        ^                                                                            |
                        `------------------------------ expected <-----------------------------------'

Pure; nothing here knows what is timed. Owner thread.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt

F4 = npt.NDArray[np.float32]
F8 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int64]
Timing = tuple[float, float, float]  # before, size, seconds

WINDOW: Final = 15  # timings that a cell remembers, 12 bytes each
HALF_LIFE: Final = 1024  # after so many timings elsewhere a cell counts half
_PASSES: Final = 2  # over the medians, each with
_ROUNDS: Final = 3  # of reweighting. All that is "off" is so in powers of two:
_HUBER: Final = 0.35  # a cell that is further off pulls less, in inverse proportion
_STEADY: Final = 0.3  # timings of a cell that lie so far apart count half
_WILD: Final = 2.0  # further apart than this makes no difference

# What the fit believes before it is told: costs in proportion to the size, and nothing else, with the weight of a
# hundredth of a timing. So one timing gives a straight line through the origin.
_DOUBT: Final = (1e-2, 1e-5, 1e-2)


class Timings:
    """The last timings of each cell."""

    __slots__ = ("rows", "_kept", "_counts", "_next", "_last")

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}  # of each cell that has timings
        self._kept: F4 = np.ones((8, WINDOW, 3), dtype=np.float32)
        self._counts: I8 = np.zeros(8, dtype=np.int64)
        self._next: I8 = np.zeros(8, dtype=np.int64)
        self._last: I8 = np.zeros(8, dtype=np.int64)

    def add(self, cell: int, timing: Timing, number: int) -> None:
        """One more, the `number`-th of all; the cell's oldest goes."""
        row = self.rows.get(cell)
        if row is None:
            row = self.rows[cell] = len(self.rows)
            if row == self._counts.size:
                self._kept = np.concatenate([self._kept, np.ones_like(self._kept)])
                self._counts, self._next, self._last = (
                    np.concatenate([old, np.zeros_like(old)]) for old in (self._counts, self._next, self._last)
                )
        at = int(self._next[row])
        self._kept[row, at] = timing
        self._next[row] = (at + 1) % WINDOW
        self._counts[row] = min(self._counts[row] + 1, WINDOW)
        self._last[row] = number

    def of_cell(self, cell: int) -> list[Timing]:
        """What a cell remembers, oldest first."""
        row = self.rows[cell]
        count = int(self._counts[row])
        order = (np.arange(count) + (int(self._next[row]) - count)) % WINDOW
        return [(before, size, seconds) for before, size, seconds in self._kept[row, order].tolist()]

    def packed(self, cells: list[int]) -> list[tuple[int, bytes]]:
        """Of each cell how many timings, and these as little-endian floats, oldest first."""
        rows = np.array([self.rows[cell] for cell in cells], dtype=np.int64)
        counts = self._counts[rows]
        order = (np.arange(WINDOW) + (self._next[rows] - counts)[:, None]) % WINDOW
        kept = np.take_along_axis(self._kept[rows], order[:, :, None], axis=1).astype("<f4")
        return [(count, one[:count].tobytes()) for count, one in zip(counts.tolist(), kept, strict=True)]

    def last(self, cell: int) -> int:
        """The number of its latest timing."""
        return int(self._last[self.rows[cell]])

    def table(self, cells: list[int], number: int) -> "Table":
        """These cells side by side, when there have been `number` timings."""
        rows = np.array([self.rows[cell] for cell in cells])
        kept, counts = self._kept[rows].astype(np.float64), self._counts[rows]
        weights = counts * 0.5 ** ((number - self._last[rows]) / HALF_LIFE)
        return Table(kept[:, :, 0], kept[:, :, 1], kept[:, :, 2], counts, weights)


@dataclass(frozen=True, slots=True)
class Table:
    """Timings by cell and place in its window; what lies beyond a cell's count says nothing."""

    before: F8
    size: F8
    seconds: F8
    counts: I8
    weights: F8


@dataclass(frozen=True, slots=True)
class Fit:
    """Costs of each column, and by cell: how far its median is off, and what it weighs."""

    costs: F8
    off: F8
    weights: F8


def fit_costs(table: Table, columns: F8, centres: F8) -> Fit:
    """Non-negative costs, such that `columns @ costs` is near the seconds of each timing.

    `columns` has a row for each timing of the table, `centres` one for the middle of each cell, all of positive
    numbers; the second column is the size.
    """
    logs = np.log2(table.seconds)
    absent = np.arange(WINDOW) >= table.counts[:, None]
    costs = np.zeros(centres.shape[1])
    rates, _ = _medians(logs - np.log2(table.size), absent, table.counts)
    costs[1] = 2.0 ** np.median(rates)
    off, wide = _medians(logs - np.log2(columns @ costs), absent, table.counts)
    weights = table.weights
    for _ in range(_PASSES):
        weights = table.weights / (1.0 + (wide / _STEADY) ** 2)
        costs = _reweighted(centres, centres @ costs, off, weights)
        off, wide = _medians(logs - np.log2(columns @ costs), absent, table.counts)
    return Fit(costs, off, weights)


def _medians(off: F8, absent: npt.NDArray[np.bool_], counts: I8) -> tuple[F8, F8]:
    """By cell: the lower median (what spoils timings makes them longer), and how far the others lie from it."""
    ordered = np.sort(np.where(absent, np.inf, off), axis=1)
    medians = ordered[np.arange(counts.size), (counts - 1) // 2]
    apart = np.minimum(np.abs(ordered - medians[:, None]), _WILD)
    return medians, np.where(absent, 0.0, apart).sum(axis=1) / counts


def _reweighted(columns: F8, expected: F8, off: F8, weights: F8) -> F8:
    """Costs of rows that were so far off what was expected. Errors count as shares of the larger of measured and
    expected, so that no row pulls with more than its weight; rows that stay far off lose weight as in Huber's
    estimate."""
    seconds = expected * 2.0**off
    scale, trust = np.maximum(seconds, expected), weights
    costs = np.zeros(columns.shape[1])
    for _ in range(_ROUNDS):
        costs = _non_negative(columns / scale[:, None], seconds / scale, trust)
        expected = columns @ costs
        trust = weights * _HUBER / np.maximum(np.abs(np.log2(seconds / expected)), _HUBER)
        scale = np.maximum(seconds, expected)
    return costs


def _non_negative(columns: F8, wanted: F8, weights: F8) -> F8:
    """Weighted least squares over all subsets of at most three columns: the best one that needs no negative cost."""
    norms = np.sqrt(weights @ (columns * columns) / weights.sum())
    scaled = columns / norms
    weighted = scaled * weights[:, None]
    count = columns.shape[1]
    products = (weighted.T @ scaled + np.diag(_DOUBT[:count])).tolist()
    against = (weighted.T @ wanted).tolist()
    best, most = [0.0] * count, 0.0
    for subset in (chosen for kept in range(count, 0, -1) for chosen in combinations(range(count), kept)):
        costs = _solve([[products[i][j] for j in subset] for i in subset], [against[i] for i in subset])
        explained = sum(cost * against[i] for cost, i in zip(costs, subset, strict=True))
        if explained > most and min(costs) >= 0.0:
            most = explained
            best = [dict(zip(subset, costs, strict=True)).get(i, 0.0) for i in range(count)]
            if len(subset) == count:
                break  # the best of all is not negative anywhere
    result: F8 = np.array(best) / norms
    return result


def _solve(rows: list[list[float]], against: list[float]) -> list[float]:
    """Elimination, which for three unknowns is five times as quick as a call of a library. `rows` is positive."""
    count = len(against)
    for i in range(count):
        for j in range(i + 1, count):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [mine - factor * other for mine, other in zip(rows[j], rows[i], strict=True)]
            against[j] -= factor * against[i]
    for i in reversed(range(count)):
        against[i] = (against[i] - sum(rows[i][j] * against[j] for j in range(i + 1, count))) / rows[i][i]
    return against
