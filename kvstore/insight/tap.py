"""The tap on the key stream: which accesses are sampled, and where they wait until somebody looks at them.

Spatial sampling (SHARDS: Waldspurger, Park, Garthwaite and Ahmad, FAST 2015): a key is sampled if its hash lies below a
threshold, so either every access to it is or none, and reuse among sampled keys is reuse among all, scaled. The hash
is a sum of products with secret odd factors, folded and multiplied once more: no cryptography, only even for keys of
any shape, and not to be steered by a client that cannot see what is sampled.

    Tap, one array of 8-byte words, so that compiled callers pass one argument
    0-3      factors of the hash
    4        sampled accesses that wait
    5        runs so far
    6        sampled accesses lost because nobody took those that wait
    7        unused
    then four words a namespace
             threshold (0: nothing is sampled), salt, accesses, sum of their positions in their chains
    then two words a waiting access
             hash
             bit 63      37 36     35            20 19       0
                 | run     | stored | namespace    | position |

Accesses of one call are a run: they happened at once. Owner thread.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvproto.limits import KEYS_PER_FRAME, NAMESPACES, PAGE_BYTES
from kvstore.blocks import U8, Number, Rows, compiled

F8 = np.ndarray[tuple[int, int], np.dtype[np.float64]]

SEED_WORDS: Final = 5
FULL_RATE: Final = 1 << 64  # a threshold of this would sample every key
WAITING_MOST: Final = 8 * KEYS_PER_FRAME  # 128 KiB
TAKE_AT: Final = 4 * KEYS_PER_FRAME  # take those that wait from here on: four more frames still fit
POSITIONS: Final = 1 << 20

ACCESS = np.dtype(
    [
        ("hash", "<u8"),
        ("cost_s", "<f4"),  # of computing this block again
        ("pages", "<u4"),  # of its slot
        ("run", "<u4"),
        ("stream", "<u2"),
        ("stored", "u1"),  # put there, not asked for: counts as use, never as hit or miss
        ("pad", "u1"),
    ]
)
# What the tap knows of a namespace beyond its words. A block at position p costs `cost_s + p * slope_s`.
_SOURCE = np.dtype([("pages", "<u4"), ("stream", "<u2"), ("open", "<u2"), ("cost_s", "<f4"), ("slope_s", "<f4")])

WAITING: Final = 4
RUNS: Final = 5
LOST: Final = 6
_HEAD: Final = 8
_ROW: Final = 4
_QUEUE: Final = _HEAD + _ROW * NAMESPACES
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_20, _29, _32, _36, _37 = (np.uint64(n) for n in (20, 29, 32, 36, 37))


@compiled
def sample(keys: U8, at: Number, count: Number, namespace: Number, first: Number, stored: Number, tap: U8) -> Number:
    """Let a run of `count` keys pass; `first` is the position of the first of them in its chain.

    About a nanosecond a key; what is sampled is queued. Returns how many accesses wait: take them from `TAKE_AT` on.
    """
    row = _HEAD + _ROW * np.int64(namespace)
    threshold, salt = tap[row], tap[row + 1]
    waiting = np.int64(tap[WAITING])
    if threshold == np.uint64(0):
        return waiting
    if not stored:
        tap[row + 2] += np.uint64(count)
        tap[row + 3] += np.uint64(count * first + count * (count - 1) // 2)
    f0, f1, f2, f3 = tap[0], tap[1], tap[2], tap[3]
    head = (tap[RUNS] << _37) | (np.uint64(stored) << _36) | (np.uint64(namespace) << _20)
    tap[RUNS] += np.uint64(1)
    for i in range(count):
        k = at + 4 * i
        x = keys[k] * f0 + keys[k + 1] * f1 + keys[k + 2] * f2 + keys[k + 3] * f3 + salt
        x = (x ^ (x >> _32)) * _SPREAD
        x ^= x >> _29
        if x < threshold:
            if waiting < WAITING_MOST:
                tap[_QUEUE + 2 * waiting] = x
                tap[_QUEUE + 2 * waiting + 1] = head | np.uint64(min(first + i, POSITIONS - 1))
                waiting += 1
            else:
                tap[LOST] += np.uint64(1)
    tap[WAITING] = np.uint64(waiting)
    return waiting


@compiled
def _whole_runs(tap: U8, count: Number) -> Number:
    """How many accesses wait that are of the first `count` or of the run of the last of those."""
    waiting = np.int64(tap[WAITING])
    while 0 < count < waiting and tap[_QUEUE + 2 * count + 1] >> _37 == tap[_QUEUE + 2 * count - 1] >> _37:
        count += 1
    return count


@compiled
def _decode(tap: U8, sources: Rows, out: Rows) -> None:
    """The accesses that wait, with what their namespaces say of them."""
    for i in range(out.size):
        meta = tap[_QUEUE + 2 * i + 1]
        position = np.int64(meta) & (POSITIONS - 1)
        source = sources[np.int64(meta >> _20) & 0xFFFF]
        row = out[i]
        row["hash"] = tap[_QUEUE + 2 * i]
        row["cost_s"] = source["cost_s"] + position * source["slope_s"]
        row["pages"] = source["pages"]
        row["run"] = meta >> _37
        row["stream"] = source["stream"]
        row["stored"] = (meta >> _36) & np.uint64(1)


@compiled
def _add_up(tap: U8, sources: Rows, namespaces: Number, totals: F8) -> None:
    """Add all accesses since the last call, sampled or not, and their cost to their streams' rows of `totals`."""
    for namespace in range(namespaces):
        row = _HEAD + _ROW * namespace
        if tap[row + 2]:
            source = sources[namespace]
            accesses, positions = np.float64(tap[row + 2]), np.float64(tap[row + 3])
            cost_s = accesses * source["cost_s"] + positions * source["slope_s"]
            for stream in (0, np.int64(source["stream"])):
                totals[stream, 0] += accesses
                totals[stream, 1] += cost_s
            tap[row + 2] = tap[row + 3] = np.uint64(0)


def threshold_of(rate: float) -> int:
    """The threshold below which this share of all hashes lies."""
    return min(int(rate * FULL_RATE), FULL_RATE - 1)


class Tap:
    """The words that `sample` works on, and what they mean.

    Stream 0 is all accesses, the others are one tenant's each; `streams` counts stream 0, too.
    """

    __slots__ = ("words", "totals", "_sources", "_salt", "_thresholds", "_used")

    def __init__(self, seed: Sequence[int], streams: int) -> None:
        assert len(seed) == SEED_WORDS, "a tap wants five random words"
        self.words: U8 = np.zeros(_QUEUE + 2 * WAITING_MOST, dtype=np.uint64)
        self.words[:4] = [word | 1 for word in seed[:4]]
        self._salt = seed[4]
        self._sources: Rows = np.zeros(NAMESPACES, dtype=_SOURCE)
        self._thresholds: U8 = np.zeros(streams, dtype=np.uint64)
        self._used = 0  # namespaces below this may be open
        self.totals: F8 = np.zeros((streams, 2))  # accesses and their cost in seconds, by stream, until taken

    def open(self, namespace: int, stream: int, slot_bytes: int) -> None:
        """Begin to sample a namespace for a tenant's stream."""
        assert 0 < stream < self._thresholds.size, "no such stream"
        self.add_up()
        self._sources[namespace] = (-(-slot_bytes // PAGE_BYTES), stream, 1, 0.0, 0.0)
        self._used = max(self._used, namespace + 1)
        row = _HEAD + _ROW * namespace
        salt = (self._salt + (namespace + 1) * 0xD6E8FEB86659FD93) % FULL_RATE
        self.words[row] = max(self._thresholds[0], self._thresholds[stream])
        self.words[row + 1] = salt

    def close(self, namespace: int) -> None:
        """Sample a namespace no longer."""
        self._sources[namespace]["open"] = 0
        self.words[_HEAD + _ROW * namespace] = 0

    def price(self, namespace: int, cost_s: float, slope_s: float) -> None:
        """What computing a block takes: `cost_s + position * slope_s`, from the namespace's prefill profile."""
        self.add_up()  # what passed before has the old price
        self._sources[namespace]["cost_s"] = cost_s
        self._sources[namespace]["slope_s"] = slope_s

    def set_threshold(self, stream: int, threshold: int) -> None:
        """Sample a stream's keys below this; a key serves stream 0 as well as its tenant's, whichever wants more."""
        self._thresholds[stream] = threshold
        rows = self.words[_HEAD:_QUEUE].reshape(-1, _ROW)[: self._used]
        sources = self._sources[: self._used]
        rows[:, 0] = np.maximum(self._thresholds[0], self._thresholds[sources["stream"]]) * sources["open"]

    @property
    def waiting(self) -> int:
        """Sampled accesses that nobody took yet."""
        return int(self.words[WAITING])

    @property
    def lost(self) -> int:
        """Sampled accesses for which there was no room."""
        return int(self.words[LOST])

    @property
    def held_bytes(self) -> int:
        """Memory of words and sources, most of it never touched."""
        return self.words.nbytes + self._sources.nbytes

    def take(self, most: int = WAITING_MOST) -> Rows:
        """The accesses that wait, the first first (`ACCESS`), in whole runs: `most` of them, and what is left of the
        last run. Adds up `totals`."""
        waiting = self.waiting
        accesses: Rows = np.empty(_whole_runs(self.words, min(most, waiting)), dtype=ACCESS)
        _decode(self.words, self._sources, accesses)
        left = waiting - accesses.size
        self.words[_QUEUE : _QUEUE + 2 * left] = self.words[_QUEUE + 2 * accesses.size : _QUEUE + 2 * waiting]
        self.words[WAITING] = left
        self.add_up()
        return accesses

    def add_up(self) -> None:
        """Bring `totals` up to date."""
        _add_up(self.words, self._sources, self._used, self.totals)
