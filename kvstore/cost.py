"""What it costs to get blocks: computing them (`PrefillProfile`) against loading them (`Bandwidth`).

A prefill profile answers T(cached, new): the seconds in which an engine computes `new` tokens behind `cached` ones.
Its clients report real prefills; nobody believes a single one.

    report -> window of its cell -> medians -> fit: a + b * new + c * new * (cached + new / 2)      non-negative costs
              (log2 new, log2 cached)      \\-> how far each median lies from the fit, spread to its neighbours
                                           = a table of seconds, made monotone; answers interpolate in it

The fit is what a transformer costs: a pass, each token, each pair of tokens that attend to one another (RAGCache,
Jin et al. 2024, and the position cost of POLICIES section 5). Where prefills were seen, the table follows them; where
not, it is the fit. Because the table is monotone in both directions, so is every answer.

Pure: no clock; a timing's age is the number of timings since. Owner thread.
"""

import struct
from enum import StrEnum
from math import exp2, isfinite, log2
from typing import Final

import numpy as np
import numpy.typing as npt
import xxhash

from kvproto.limits import BLOCK_TOKENS_MAX
from kvstore.fitting import F8, WINDOW, Fit, Timings, fit_costs
from kvstore.tier.format import FormatError

# Reports outside these bounds are refused. 4 Mi tokens is four times the longest context in use; a prefill takes a
# launch of kernels (more than 1 us) and at most an hour.
TOKENS_MAX: Final = 1 << 22
PREFILL_SECONDS_MIN: Final = 1e-6
PREFILL_SECONDS_MAX: Final = 3600.0
LOAD_BYTES_MAX: Final = 1 << 50
LOAD_SECONDS_MAX: Final = 3600.0
BYTES_WITHIN_MAX: Final = 1 << 62  # what a way moves that seems to cost nothing

# Nodes of the table: new = 1, 2, 4 ... TOKENS_MAX, and cached = 0, 256, 512 ... TOKENS_MAX. T is almost linear in
# what is cached, so there the first node can be far out. 16 x 23 cells of 204 bytes for timings (their room is doubled
# when it is full) and 17 x 24 floats of 32: 145 KiB for a profile that saw everything, 30 KiB for one of 50 cells.
_FIRST_CACHED: Final = 256
_ROWS: Final = 16
_COLUMNS: Final = 23
_CELLS: Final = _ROWS * _COLUMNS

_SPREAD: Final = 1.5  # a neighbour's word counts exp(-1.5), one two nodes away exp(-6)
_PRIOR: Final = 1.0  # timings that the fit counts for against those of a cell
_SURE: Final = 8  # a cell of fewer timings that says other than its neighbours and the fit, by more than
_ODD: Final = 1.0  # so many powers of two, is not believed yet
_DOUBTED: Final = 0.05
_OFF_MOST: Final = 2.0  # no cell is believed to be further from the fit
_LATE_MOST: Final = 32  # timings that the table may lag behind, as a share of all of them and at most
_LATE_SHARE: Final = 8
_LATE_MOST_LOADS: Final = 64  # loads come more often than prefills

_MAGIC: Final = b"KVPREFIL"
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQII")  # magic, version, tokens a block, reports, cells, nothing
_CELL: Final = struct.Struct("<HHI")  # cell, timings, age; then the timings, oldest first
_TIMING: Final = struct.Struct("<fff")  # cached, new, seconds
_SUM: Final = struct.Struct("<Q")
_WAY_MAGIC: Final = b"KVWAY  1"
_WAY_HEAD: Final = struct.Struct("<8sQI")  # magic, reports, cells
_LOAD_CELLS: Final = 51


class Refusal(StrEnum):
    """Why a number from outside is not taken."""

    NOT_A_NUMBER = "not a number"
    NEGATIVE = "negative"
    ABSURD = "absurd"  # smaller or larger than anything real


def refusal_of(value: float, least: float, most: float) -> Refusal | None:
    """Whether a number lies within bounds, and if not, why."""
    if least <= value <= most:
        return None
    if not isfinite(value):
        return Refusal.NOT_A_NUMBER
    return Refusal.NEGATIVE if value < 0 else Refusal.ABSURD


class PrefillProfile:
    """What prefills of one namespace take."""

    __slots__ = ("block_tokens", "reports", "_timings", "_costs", "_table", "_late")

    def __init__(self, block_tokens: int) -> None:
        assert 1 <= block_tokens <= BLOCK_TOKENS_MAX
        self.block_tokens = block_tokens
        self.reports = 0
        self._timings = Timings()
        self._costs = (0.0, 0.0, 0.0)
        self._table: list[list[float]] = []  # log2 of seconds by node; one row and column more than there are nodes
        self._late = 0  # reports that the table does not know of

    # -- asking --------------------------------------------------------------------------------------------------

    def seconds(self, cached: int, new: int) -> float | None:
        """T(cached, new) in seconds, growing with both; beyond TOKENS_MAX as at it. None: nobody has reported."""
        assert cached >= 0
        assert new >= 0
        if not self._table:
            return None
        if not new:
            return 0.0
        new, cached = min(new, TOKENS_MAX), min(cached, TOKENS_MAX)
        column = new.bit_length() - 1
        part = log2(new) - column
        if cached < _FIRST_CACHED:
            row, share = 0, cached / _FIRST_CACHED
        else:
            row = cached.bit_length() - _FIRST_CACHED.bit_length() + 1
            share = cached / (_FIRST_CACHED << (row - 1)) - 1.0
        low, high = self._table[row], self._table[row + 1]
        before = exp2(low[column] + part * (low[column + 1] - low[column]))
        behind = exp2(high[column] + part * (high[column + 1] - high[column]))
        return before + share * (behind - before)

    def recompute_seconds_of_blocks(self, first: int, last: int) -> float | None:
        """What computing blocks `first` to `last` (not included) takes when those before them are there."""
        assert 0 <= first <= last
        return self.seconds(first * self.block_tokens, (last - first) * self.block_tokens)

    @property
    def costs(self) -> tuple[float, float, float]:
        """Seconds a pass, a token, and a pair of tokens: a, b and c of the fit. Zeros: nobody has reported."""
        return self._costs

    # -- learning ------------------------------------------------------------------------------------------------

    def report(self, cached: int, new: int, seconds: float) -> Refusal | None:
        """A client has computed `new` tokens behind `cached` ones. Refused: it cannot be true, and nothing changes."""
        refusal = (
            refusal_of(cached, 0, TOKENS_MAX)
            or refusal_of(new, 1, TOKENS_MAX)
            or refusal_of(seconds, PREFILL_SECONDS_MIN, PREFILL_SECONDS_MAX)
        )
        if refusal is not None:
            return refusal
        self.reports += 1
        self._late += 1
        self._timings.add(_cell(cached, new), (cached, new, seconds), self.reports)
        if self._late >= min(_LATE_MOST, 1 + self.reports // _LATE_SHARE):
            self.settle()
        return None

    def settle(self) -> None:
        """Take the latest reports into account now. It costs half a millisecond, so `report` does it now and then."""
        if not self._late:
            return
        self._late = 0
        cells = sorted(self._timings.rows)  # so that the same reports give the same answers, bit by bit
        timed = self._timings.table(cells, self.reports)
        fit = fit_costs(timed, _columns(timed.before, timed.size), _CENTRES[cells])
        table = np.log2(_CENTRES @ fit.costs) + _spread(cells, fit, timed.counts < _SURE)
        table = _monotone(table.reshape(_ROWS, _COLUMNS))
        self._table = np.pad(table, ((0, 1), (0, 1)), mode="edge").tolist()
        self._costs = (float(fit.costs[0]), float(fit.costs[1]), float(fit.costs[2]))

    # -- keeping -------------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that was reported, with a checksum."""
        parts = [_HEAD.pack(_MAGIC, _VERSION, self.block_tokens, self.reports, len(self._timings.rows), 0)]
        cells = sorted(self._timings.rows)
        for cell, (count, timings) in zip(cells, self._timings.packed(cells), strict=True):
            parts.append(_CELL.pack(cell, count, min(self.reports - self._timings.last(cell), 0xFFFFFFFF)))
            parts.append(timings)
        content = b"".join(parts)
        return content + _SUM.pack(xxhash.xxh3_64_intdigest(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> "PrefillProfile":
        """What `to_bytes` gave. Raises FormatError for anything else, down to each timing."""
        body = content[: -_SUM.size]
        if len(content) < _HEAD.size + _SUM.size:
            raise FormatError(f"a prefill profile of {len(content)} bytes")
        if _SUM.unpack_from(content, len(body)) != (xxhash.xxh3_64_intdigest(body),):
            raise FormatError("a prefill profile fails its checksum")
        magic, version, block_tokens, reports, cells, nothing = _HEAD.unpack_from(body)
        if magic != _MAGIC or version != _VERSION or nothing:
            raise FormatError(f"magic {magic!r}, version {version}: no prefill profile of version {_VERSION}")
        if not 1 <= block_tokens <= BLOCK_TOKENS_MAX or cells > _CELLS or cells > reports or reports > cells << 48:
            raise FormatError(f"a prefill profile of {cells} cells, {reports} reports, {block_tokens} tokens a block")
        profile = cls(block_tokens)
        profile.reports = reports
        at = _HEAD.size
        for _ in range(cells):
            at = profile._take_cell(body, at)
        if at != len(body):
            raise FormatError("a prefill profile is longer than its cells")
        profile._late = cells
        profile.settle()
        return profile

    def _take_cell(self, body: bytes, at: int) -> int:
        """One cell from `at` on; returns where the next begins."""
        if len(body) - at < _CELL.size:
            raise FormatError("a prefill profile ends before its cells do")
        cell, count, age = _CELL.unpack_from(body, at)
        begin = at + _CELL.size
        end: int = begin + count * _TIMING.size
        if not 1 <= count <= WINDOW or age >= self.reports or end > len(body) or cell in self._timings.rows:
            raise FormatError(f"cell {cell} of a prefill profile: {count} timings, {age} old")
        for cached, new, seconds in _TIMING.iter_unpack(body[begin:end]):
            whole = float(cached).is_integer() and float(new).is_integer() and cached >= 0 and 1 <= new <= TOKENS_MAX
            if not whole or cached > TOKENS_MAX or not 0.0 < seconds <= PREFILL_SECONDS_MAX:
                raise FormatError(f"a prefill of {new} tokens behind {cached} in {seconds} s")
            if _cell(int(cached), int(new)) != cell:
                raise FormatError(f"a prefill of {new} tokens behind {cached} in cell {cell}")
            self._timings.add(cell, (cached, new, seconds), self.reports - age)
        return end


def _cell(cached: int, new: int) -> int:
    """The node that is nearest on a logarithmic scale."""
    column = round(log2(new))
    row = 0 if 2 * cached < _FIRST_CACHED else max(1, round(log2(cached / _FIRST_CACHED)) + 1)
    return row * _COLUMNS + column


def _columns(cached: F8, new: F8) -> F8:
    """What a prefill has of each cost: one pass, its tokens, and the pairs of tokens that attend to one another."""
    return np.stack([np.ones_like(new), new, new * (cached + new / 2.0)], axis=-1)


def _spread(cells: list[int], fit: Fit, few: npt.NDArray[np.bool_]) -> F8:
    """By node, how far it lies from the fit, in powers of two: by its own timings, its neighbours', and the fit."""
    off, weights = np.clip(fit.off, -_OFF_MOST, _OFF_MOST), fit.weights
    told, pulled = _heard(cells, weights), _heard(cells, weights * off)
    others = (pulled[cells] - weights * off) / (told[cells] - weights + _PRIOR)
    weights = np.where(few & (np.abs(off - others) > _ODD), _DOUBTED * weights, weights)
    result: F8 = _heard(cells, weights * off) / (_heard(cells, weights) + _PRIOR)
    return result


def _heard(cells: list[int], said: F8) -> F8:
    """By node, the sum of what it and its neighbours say, the nearer the louder."""
    grid = np.zeros(_CELLS)
    grid[cells] = said
    result: F8 = (_NEAR_ROWS @ grid.reshape(_ROWS, _COLUMNS) @ _NEAR_COLUMNS).ravel()
    return result


def _monotone(table: F8) -> F8:
    """The nearest in between: halfway from the highest value at or before a node to the lowest at or behind it."""
    highest = np.maximum.accumulate(np.maximum.accumulate(table, axis=0), axis=1)
    lowest = np.minimum.accumulate(np.minimum.accumulate(table[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    return (highest + lowest) / 2.0


def _nearness(count: int) -> F8:
    steps = np.arange(count, dtype=np.float64)
    return np.exp(-_SPREAD * (steps[:, None] - steps[None, :]) ** 2)


_NEAR_ROWS: Final = _nearness(_ROWS)
_NEAR_COLUMNS: Final = _nearness(_COLUMNS)
_CENTRES: Final = _columns(
    np.repeat(np.concatenate([[0.0], _FIRST_CACHED * 2.0 ** np.arange(_ROWS - 1)]), _COLUMNS),
    np.tile(2.0 ** np.arange(_COLUMNS), _ROWS),
)
assert (_FIRST_CACHED << (_ROWS - 2), 1 << (_COLUMNS - 1)) == (TOKENS_MAX, TOKENS_MAX)


class Bandwidth:
    """What it takes to load from one tier: fixed seconds a call, and seconds a byte.

    The last timings by power of two of their size, and a line through the medians (`fitting`): a few slow reads move
    nothing, a drive that has become slow is believed once most of the last ones say so.
    """

    __slots__ = ("call_seconds", "byte_seconds", "reports", "_timings", "_late")

    def __init__(self) -> None:
        self.call_seconds = 0.0
        self.byte_seconds = 0.0
        self.reports = 0
        self._timings = Timings()  # by log2 of bytes: at most 51 cells
        self._late = 0

    def took(self, load_bytes: int, seconds: float) -> Refusal | None:
        """A load has ended."""
        refusal = refusal_of(load_bytes, 1, LOAD_BYTES_MAX) or refusal_of(seconds, 1e-9, LOAD_SECONDS_MAX)
        if refusal is not None:
            return refusal
        self.reports += 1
        self._late += 1
        self._timings.add(round(log2(load_bytes)), (0.0, load_bytes, seconds), self.reports)
        if self._late >= min(_LATE_MOST_LOADS, 1 + self.reports // _LATE_SHARE):
            self.settle()
        return None

    def settle(self) -> None:
        """Take the latest loads into account now."""
        if not self._late:
            return
        self._late = 0
        cells = sorted(self._timings.rows)
        timed = self._timings.table(cells, self.reports)
        costs = fit_costs(timed, _loads(timed.size), _loads(2.0 ** np.array(cells))).costs
        self.call_seconds, self.byte_seconds = float(costs[0]), float(costs[1])

    def to_bytes(self) -> bytes:
        """The timings that it goes by, with a checksum."""
        cells = sorted(self._timings.rows)
        parts = [_WAY_HEAD.pack(_WAY_MAGIC, self.reports, len(cells))]
        for cell, (count, timings) in zip(cells, self._timings.packed(cells), strict=True):
            parts += (_CELL.pack(cell, count, min(self.reports - self._timings.last(cell), 0xFFFFFFFF)), timings)
        content = b"".join(parts)
        return content + _SUM.pack(xxhash.xxh3_64_intdigest(content))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Bandwidth":
        """What `to_bytes` gave. Raises FormatError for anything else, down to each timing."""
        body = content[: -_SUM.size]
        if len(content) < _WAY_HEAD.size + _SUM.size:
            raise FormatError(f"a way of {len(content)} bytes")
        if _SUM.unpack_from(content, len(body)) != (xxhash.xxh3_64_intdigest(body),):
            raise FormatError("a way fails its checksum")
        magic, reports, cells = _WAY_HEAD.unpack_from(body)
        if magic != _WAY_MAGIC or not 1 <= cells <= min(_LOAD_CELLS, reports) or reports > cells << 48:
            raise FormatError(f"magic {magic!r}, {cells} cells, {reports} reports: no way of this version")
        way, at = cls(), _WAY_HEAD.size
        way.reports = reports
        for _ in range(cells):
            at = way._take_cell(body, at)
        if at != len(body):
            raise FormatError("a way is longer than its cells")
        way._late = cells
        way.settle()
        return way

    def _take_cell(self, body: bytes, at: int) -> int:
        """One cell from `at` on; returns where the next begins."""
        if len(body) - at < _CELL.size:
            raise FormatError("a way ends before its cells do")
        cell, count, age = _CELL.unpack_from(body, at)
        begin = at + _CELL.size
        end: int = begin + count * _TIMING.size
        if not 1 <= count <= WINDOW or age >= self.reports or end > len(body) or cell in self._timings.rows:
            raise FormatError(f"cell {cell} of a way: {count} timings, {age} old")
        for nothing, load_bytes, seconds in _TIMING.iter_unpack(body[begin:end]):
            if nothing or not 1 <= load_bytes <= LOAD_BYTES_MAX or not 0.0 < seconds <= LOAD_SECONDS_MAX:
                raise FormatError(f"a load of {load_bytes} bytes in {seconds} s")
            if abs(log2(load_bytes) - cell) > 0.5 + 1e-6:  # sizes are kept in 24 bits
                raise FormatError(f"a load of {load_bytes} bytes in cell {cell}")
            self._timings.add(cell, (0.0, load_bytes, seconds), self.reports - age)
        return end

    def load_seconds(self, load_bytes: float) -> float | None:
        """Seconds for one call of so many bytes; nothing takes none. None: nothing was loaded yet."""
        assert load_bytes >= 0
        if not self.reports:
            return None
        return self.call_seconds + self.byte_seconds * load_bytes if load_bytes else 0.0

    def speed(self) -> float | None:
        """Bytes a second of the largest loads that were timed, all in; None: nothing was loaded yet."""
        if not self.reports:
            return None
        largest = 2.0 ** max(self._timings.rows)
        return largest / max(1e-9, self.call_seconds + self.byte_seconds * largest)

    def bytes_within(self, seconds: float) -> int:
        """The most bytes that one call moves in so many seconds; 0 if nobody knows."""
        left = seconds - self.call_seconds
        if not self.reports or left <= 0.0:
            return 0
        return int(min(left / self.byte_seconds, BYTES_WITHIN_MAX)) if self.byte_seconds else BYTES_WITHIN_MAX


def _loads(load_bytes: F8) -> F8:
    """What a load has of each cost: one call, and its bytes."""
    return np.stack([np.ones_like(load_bytes), load_bytes], axis=-1)


def load_seconds(dram: Bandwidth, dram_bytes: int, disk: Bandwidth, disk_bytes: int) -> float | None:
    """What a run takes that lies partly in DRAM and partly on disk. None: nobody has measured what it needs.

    Blocks from disk are copied out while the next are read, so their way out of DRAM costs nothing more.
    """
    seconds = 0.0
    for way, load_bytes in ((dram, dram_bytes), (disk, disk_bytes)):
        if load_bytes:
            if not way.reports:
                return None
            seconds += way.call_seconds + way.byte_seconds * load_bytes
    return seconds
