"""MATCH: how much of a chain is there? Takes nothing, touches nothing. Owner thread.

match        in one namespace
match_all    in each of several: the ranks of an engine store the same chain into one namespace each, and what one
             of them lacks is of no use to the others
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvproto.frames import NOTHING_MATCHED, UNKNOWN_NS, Matched
from kvproto.limits import KEYS_PER_FRAME, MATCHES_PER_FRAME
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.costing import Costing
from kvstore.sessions import Missed, Namespace, nobody_hears
from kvstore.tally import Tally
from kvstore.tier.away import Away

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]
Asked = Callable[[Namespace, U8, int, int], None]


class Matching:
    """Answers MATCH and MATCH_ALL. `keys[at:]` are 4 words a key."""

    def __init__(self, tables: Tables, tally: Tally, costing: Costing, away: Away, account: Callable[[], None]) -> None:
        """`account` has the last LEASE noted (`Leasing.account`): it waits no longer than until the next verb."""
        self._tables = tables
        self._tally = tally
        self._costing = costing
        self._suspended = away
        self._account_lease = account
        self.missed: Missed = nobody_hears  # `Remote`, of each run that ends before its request does
        self.asked: Asked = nobody_hears  # `Watching`, of what is neither there nor on its way, behind the answer
        self._answered: list[tuple[Namespace, U8, int, int]] = []  # what `asked` has not heard of yet
        self.above: Callable[[U4], Flags] | None = None  # `HbmTiers.above`, where there is one: which lie on a GPU
        self._run = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._runs = np.zeros(MATCHES_PER_FRAME, dtype=np.uint32)

    def match(self, namespace: Namespace, keys: U8, at: int, count: int) -> Matched:
        """How long the lead run is, and what loading and computing it take. Call `account` once the answer is sent."""
        self._account_lease()
        self.account()
        found, on_disk, pending = self._look(namespace, keys, at, count, self._run)
        self._note(count, found)
        self._note_missing(namespace, keys, at, count, found + pending)
        if found < count:
            self.missed(namespace, keys, at, count, found)
        if not found and not pending:
            return NOTHING_MATCHED
        load_ns = recompute_ns = UNKNOWN_NS
        if self._costing.heard:
            load_ns, recompute_ns = self._costing.estimate(namespace, self._run, found, on_disk)
        if self.above is None:
            return Matched(0, found - on_disk, on_disk, pending, load_ns, recompute_ns)
        above, away = self.above(self._run[:found]), self._away(self._run[:found], on_disk)
        return _matched(above, away, pending, load_ns, recompute_ns)

    def match_all(self, namespaces: Sequence[Namespace], keys: U8, at: int, count: int) -> Matched:
        """How long the run is that all of these namespaces have; at most `MATCHES_PER_FRAME` look-ups.

        A block counts as on disk if one of them has it there alone, and as pending if each has it or is about to. Ranks
        load side by side and compute side by side, so the slowest says how long either takes. `account` as above.
        """
        self._account_lease()
        self.account()
        runs: list[tuple[Namespace, U4, int]] = []
        there = coming = count
        for namespace in namespaces:
            first = len(runs) * count
            run = self._runs[first : first + count]
            found, on_disk, pending = self._look(namespace, keys, at, coming, run)
            runs.append((namespace, run, on_disk))
            self._note_missing(namespace, keys, at, count, found + pending)
            if found < count:
                self.missed(namespace, keys, at, count, found)
            there, coming = min(there, found), min(coming, found + pending)
            if not coming:
                break
        self._note(count, there)
        for namespace in namespaces[len(runs) :]:  # nobody looked there, but all of it is computed there, too
            self._note_missing(namespace, keys, at, count, 0)
        if not coming:
            return NOTHING_MATCHED
        if not there:
            return Matched(0, 0, 0, coming, UNKNOWN_NS, UNKNOWN_NS)
        above: Flags = np.full(there, self.above is not None)
        for _, run, _ in runs:
            if self.above is not None:
                above &= self.above(run[:there])
        away, load_ns, recompute_ns = self._slowest(runs, there)
        return _matched(above, away, coming - there, load_ns, recompute_ns)

    def account(self) -> None:
        """Note what the last MATCH did not find, once its answer is on its way; no later than before another one."""
        answered, self._answered = self._answered, []
        for one in answered:
            self.asked(*one)

    def _note_missing(self, namespace: Namespace, keys: U8, at: int, count: int, reached: int) -> None:
        if reached < count:
            self._answered.append((namespace, keys, at + 4 * reached, count - reached))

    def _look(self, namespace: Namespace, keys: U8, at: int, count: int, run: U4) -> tuple[int, int, int]:
        """(Blocks of the lead run, how many of them lie on disk, how many after it are on their way)."""
        index = namespace.tenant.index
        found, stop = blocks.match_run(self._tables.blocks, *index, namespace.number, keys, at, count, run)
        on_disk = 0
        if stop and self._tables.blocks["state"][stop] != blocks.WRITING:
            found, on_disk, stop = blocks.extend_run(self._tables, index, namespace.number, keys, at, count, found, run)
            reach = self._suspended.reach(run, found)
            if reach < found:
                return reach, int(np.count_nonzero(self._away(run[:reach], on_disk))), 0
        if not stop:
            return found, on_disk, 0
        pending = blocks.pending_run(self._tables, index, namespace.number, keys, at, count, found)
        return found, on_disk, pending

    def _note(self, count: int, found: int) -> None:
        tally = self._tally
        tally.matches += 1
        tally.match_hits += found
        tally.match_misses += count - found

    def _away(self, run: U4, on_disk: int) -> Flags:
        """Which of these blocks do not lie in DRAM? `on_disk`: how many of the run, at least 0."""
        if not on_disk:
            return np.zeros(run.size, dtype=np.bool_)
        state = self._tables.blocks["state"][run]
        lies: Flags = (state == blocks.DISK) | (state == blocks.LOADING)
        return lies

    def _slowest(self, runs: Sequence[tuple[Namespace, U4, int]], there: int) -> tuple[Flags, int, int]:
        """Of the first `there` blocks: which some namespace has on disk alone; the longest times of any. Where one
        is not known the longest is not either: `UNKNOWN_NS` is more than any other.
        """
        heard = self._costing.heard
        load_ns = recompute_ns = 0 if heard else UNKNOWN_NS
        away = np.zeros(there, dtype=np.bool_)
        for namespace, run, on_disk in runs:
            lies = self._away(run[:there], on_disk)
            mine = int(np.count_nonzero(lies))
            away |= lies
            if heard:
                load, recompute = self._costing.estimate(namespace, run, there, mine)
                load_ns, recompute_ns = max(load_ns, load), max(recompute_ns, recompute)
        return away, load_ns, recompute_ns


def _matched(above: Flags, away: Flags, pending: int, load_ns: int, recompute_ns: int) -> Matched:
    """Each block counts once, where it is nearest."""
    near, far = int(np.count_nonzero(above)), int(np.count_nonzero(away & ~above))
    return Matched(near, above.size - near - far, far, pending, load_ns, recompute_ns)
