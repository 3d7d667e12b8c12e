"""How long things take: noted where they happen, counted into buckets elsewhere.

    any thread        note(ns)        one append to a list; of frames only every so many-th (`hot.TIMED`)
    metrics thread    fold            once a second: what was noted goes into buckets

What is noted and not folded yet is bounded: should the metrics thread stand still, the owner lets go of the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvproto.frames import Verb

WAITING: Final = 1 << 18  # durations; a quarter of a minute of all that an owner thread can do
VERBS: Final = 128  # those of clients are below

# Upper ends of buckets, in seconds. A frame takes the owner 10 us to a few milliseconds, a read of 2 MiB 0.1 ms to as
# long as a drive hangs, and a question to the owner as long as its slowest event.
REQUEST_S: Final = (
    5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 7.5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 0.05, 0.25, 1.0,
)  # fmt: skip
DISK_S: Final = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAG_S: Final = (5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Note = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Buckets:
    """How many took at most so long, the last without an end; and seconds of all together."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]  # cumulated, one more than bounds
    sum_s: float


class Timing:
    """Durations of one kind of thing. `note` on any thread, `fold` and `buckets` on one."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        """`bounds_s` rise."""
        self._waiting: list[int] = []
        self.note: Note = self._waiting.append  # nanoseconds
        self._bounds_s = tuple(bounds_s)
        self._bounds_ns = np.array([round(bound * 1e9) for bound in bounds_s], dtype=np.int64)
        self._counts: npt.NDArray[np.int64] = np.zeros(len(bounds_s) + 1, dtype=np.int64)
        self._sum_ns = 0

    def fold(self) -> None:
        """Take in what was noted. Others may go on noting: each step here is one to them."""
        count = len(self._waiting)
        if not count:
            return
        taken = np.array(self._waiting[:count], dtype=np.int64)
        del self._waiting[:count]
        self._counts += np.bincount(np.searchsorted(self._bounds_ns, taken), minlength=self._counts.size)
        self._sum_ns += int(taken.sum())

    def bound(self) -> None:
        """Nobody has folded for long: let go of what is too much. Owner thread."""
        if len(self._waiting) > WAITING:
            del self._waiting[WAITING:]

    def buckets(self) -> Buckets:
        """As of the last `fold`."""
        return Buckets(self._bounds_s, tuple(np.cumsum(self._counts).tolist()), self._sum_ns / 1e9)


@dataclass(frozen=True, slots=True)
class Timings:
    """All that is timed."""

    verbs: dict[str, Timing] = field(
        default_factory=lambda: {name: Timing(REQUEST_S) for name in ("lease", "match", "reserve", "commit", "other")}
    )
    read: Timing = field(default_factory=lambda: Timing(DISK_S))  # of neighbouring blocks, verified
    write: Timing = field(default_factory=lambda: Timing(DISK_S))
    lag: Timing = field(default_factory=lambda: Timing(LAG_S))  # from a question to when the owner takes it up

    def by_verb(self) -> list[Note]:
        """What to call with the nanoseconds of a frame, by its verb's number."""
        notes = [self.verbs["other"].note] * VERBS
        for verb, name in (
            (Verb.LEASE, "lease"), (Verb.MATCH, "match"), (Verb.MATCH_ALL, "match"), (Verb.RESERVE, "reserve"),
            (Verb.COMMIT, "commit"),
        ):  # fmt: skip
            notes[verb] = self.verbs[name].note
        return notes

    def all(self) -> tuple[Timing, ...]:
        """Each of them."""
        return (*self.verbs.values(), self.read, self.write, self.lag)
