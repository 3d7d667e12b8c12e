"""What is known of the remote tier, and how a chain is followed there. No I/O; one thread at a time (its user locks).

A run of a chain is found by the digest of its first block: the listing under that name tells every run that begins
so (`remote_format.py`). From where the longest of them ends the next one is looked for. What is known is only a hint:
an object may be gone, or another host may have written a new one, so it is believed for a while, absence for less.
"""

from collections import OrderedDict
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.tier.remote_format import OBJECT_BLOCKS, Place, common, fits, mark_of, marks_in, runs_prefix

RUNS: Final = 1 << 16  # remembered at most; about 500 bytes each
FRESH_NS: Final = 60 * 10**9
ABSENT_NS: Final = 5 * 10**9
BAD: Final = 4096  # names of objects that are not what they should be
BAD_NS: Final = 60 * 10**9  # one is left alone for so long, and twice as long each time it is found so again,
BAD_MOST_NS: Final = 3600 * 10**9  # up to this
STRANGE_NS: Final = 10**9  # where the answer was no object at all: it may be the far side's
WALK: Final = 32  # lookups for the run that covers a block; what they found is known the next time
AHEAD: Final = 64  # names asked for at a time where each block is an object of its own


@dataclass(frozen=True, slots=True)
class Run:
    """An object that begins with a certain block."""

    name: str
    marks: tuple[str, ...]  # of the blocks after the first
    object_bytes: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks `at..at + count` of a chain are blocks `skip..` of an object, as far as names tell."""

    name: str
    at: int
    skip: int
    count: int
    blocks: int  # in the object


@dataclass(slots=True)
class _Entry:
    runs: tuple[Run, ...]
    until_ns: int


class Known:
    """Runs by what they begin with; bounded, the least recently used go first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._runs = 0
        self._bad: OrderedDict[str, tuple[int, int]] = OrderedDict()  # until when, and how long that was

    def __len__(self) -> int:
        return self._runs

    def runs(self, prefix: str, now_ns: int) -> tuple[Run, ...] | None:
        """Those under a prefix; None: nobody knows, or not any more."""
        entry = self._entries.get(prefix)
        if entry is None:
            return None
        if entry.until_ns <= now_ns:
            self._drop(prefix)
            return None
        self._entries.move_to_end(prefix)
        return entry.runs

    def learn(
        self, prefix: str, listed: Sequence[tuple[str, int]], now_ns: int, block_bytes: int | None = None
    ) -> list[str]:
        """A listing of a prefix, as (name, bytes); what is not ours in it, or in quarantine, is left out.

        `block_bytes`: of each of their blocks, None where sizes are not listed. Returns names of those that cannot be
        whole, which are left out too.
        """
        self._drop(prefix)
        runs, cut = [], []
        for name, object_bytes in listed:
            marks = marks_in(name, prefix)
            if marks is None or self.is_bad(name, now_ns):
                continue
            if block_bytes is None or fits(name, object_bytes, block_bytes):
                runs.append(Run(name, marks, object_bytes))
            else:
                cut.append(name)
        self._put(prefix, _Entry(tuple(runs), now_ns + (FRESH_NS if runs else ABSENT_NS)))
        return cut

    def add(self, prefix: str, run: Run, now_ns: int) -> None:
        """An object that was just written."""
        entry = self._entries.get(prefix)
        others = tuple(one for one in entry.runs if one.name != run.name) if entry is not None else ()
        self._drop(prefix)
        self._put(prefix, _Entry((*others, run), now_ns + FRESH_NS))

    def forget(self, name: str) -> None:
        """An object is not there any more."""
        prefix = name[: name.rfind("/") + 1]
        entry = self._entries.get(prefix)
        if entry is None:
            return
        kept = tuple(run for run in entry.runs if run.name != name)
        until_ns = entry.until_ns
        self._drop(prefix)
        if kept:
            self._put(prefix, _Entry(kept, until_ns))

    def forget_all(self, prefix: str) -> None:
        """Whatever lies under a prefix may not be there any more."""
        for name in [one for one in self._entries if one.startswith(prefix)]:
            self._drop(name)

    def doubt(self, prefixes: Iterable[str]) -> None:
        """What is not known to be there is to be looked up anew: somebody may just have written it."""
        for prefix in prefixes:
            entry = self._entries.get(prefix)
            if entry is not None and not entry.runs:
                self._drop(prefix)

    def ask_anew(self, prefixes: Iterable[str]) -> None:
        """Nothing that is known of these is believed."""
        for prefix in prefixes:
            self._drop(prefix)

    def quarantine(self, name: str, now_ns: int, first_ns: int = BAD_NS) -> None:
        """An object is not what it should be: leave it alone for a while, longer each time."""
        self.forget(name)
        until_ns, wait_ns = self._bad.pop(name, (0, 0))
        if now_ns >= until_ns:  # and who has read it at the same time says so, too
            wait_ns = min(max(first_ns, 2 * wait_ns), BAD_MOST_NS)
            until_ns = now_ns + wait_ns
        self._bad[name] = until_ns, wait_ns
        if len(self._bad) > BAD:
            self._bad.popitem(last=False)

    def sound(self, name: str) -> None:
        """It is what it should be, or there no more: whatever was said of it before."""
        self._bad.pop(name, None)

    @property
    def bad(self) -> int:
        """How many objects were not what they should be when they were read last."""
        return len(self._bad)

    def was_bad(self, name: str) -> bool:
        """Was it not what it should be when it was read last?"""
        return name in self._bad

    def is_bad(self, name: str, now_ns: int) -> bool:
        """Is it in quarantine?"""
        return name in self._bad and now_ns < self._bad[name][0]

    def _put(self, prefix: str, entry: _Entry) -> None:
        self._entries[prefix] = entry
        self._runs += max(1, len(entry.runs))
        while self._runs > RUNS:
            self._drop(next(iter(self._entries)))

    def _drop(self, prefix: str) -> None:
        entry = self._entries.pop(prefix, None)
        if entry is not None:
            self._runs -= max(1, len(entry.runs))


Lookups = Generator[list[str], None, list[Stretch]]


def follow(
    known: Known, place: Place, digests: Sequence[bytes], start: int, now_ns: int, *, most: int = 1, ahead: int = 1
) -> Lookups:
    """Where the blocks of a chain from `start` on lie, without a gap: up to `most` stretches. `digests`: of its keys.

    Yields prefixes that somebody must look up and tell `known` of before it goes on. First it looks for a run that
    begins at `start`; if there is none, for the run that covers it, from the root on, as far as `WALK` lookups go.
    `ahead`: of so many blocks the runs are asked for at a time; above 1 where no run has two.
    """
    found = yield from _from(known, place, digests, start, now_ns, ahead, (len(digests), most))
    if found or not start or ahead > 1:
        return found
    before = yield from _from(known, place, digests, 0, now_ns, ahead, (start + 1, len(digests)))
    if not before or before[-1].at + before[-1].count <= start:
        return []
    last = before[-1]
    gone = start - last.at
    return [Stretch(last.name, start, last.skip + gone, last.count - gone, last.blocks)]


def _from(
    known: Known, place: Place, digests: Sequence[bytes], at: int, now_ns: int, ahead: int, until: tuple[int, int]
) -> Lookups:
    """`until`: the block, and the number of stretches, at which it is over."""
    found: list[Stretch] = []
    left = WALK
    while at < until[0] and len(found) < until[1]:
        prefix = runs_prefix(place, digests[at])
        runs = known.runs(prefix, now_ns)
        if runs is None:
            if not left:
                break
            left -= 1
            wanted = (runs_prefix(place, digest) for digest in digests[at : at + ahead])
            yield [one for one in wanted if known.runs(one, now_ns) is None]
            runs = known.runs(prefix, now_ns) or ()
        marks = [mark_of(digest) for digest in digests[at + 1 : at + OBJECT_BLOCKS]] if runs else []
        best = max(runs, key=lambda run: common(run.marks, marks), default=None)
        if best is None:
            break
        count = common(best.marks, marks)
        found.append(Stretch(best.name, at, 0, count, 1 + len(best.marks)))
        at += count
    return found
