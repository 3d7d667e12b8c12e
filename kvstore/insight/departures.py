"""What is remembered of blocks that are not there: how each left, when, and what may have taken it along.

    evicted                      ghosts of the block table: by which pool, and how many evictions ago (`blocks.py`)
    deleted, refused, damaged    a table of causes by key (`reasons.py`), noted where they happen
    cleared                      by namespace: when somebody dropped all of it, or any block of it
    given away                   by tenant: when another one got an arena of it

Ghosts count evictions and not time, so each second it is written down how many evictions there had been; a time of
eviction lies between two of those, of which the fewer are kept the longer ago they are: a time is known to a hundredth
of how long ago it is. Which tenant gave an arena away, and by which rule a pool went, is noted by that count. Owner
thread. Every memory here is bounded, and what it forgets it says.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from itertools import compress
from typing import Final

import numpy as np

from kvproto.errors import Grant
from kvproto.limits import NAMESPACES
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.insight import reasons
from kvstore.insight.reasons import (
    SEED_WORDS,
    Cause,
    Departure,
    Place,
    cause_word,
    note_below,
    note_chain,
    note_refused,
)
from kvstore.ports import Clock, Randomness
from kvstore.sessions import Namespace, Tenant

ENTRIES: Final = 1 << 20  # 8 MiB of which only what is noted is touched
# By namespace, when blocks were dropped last and when all of it was; then the table of causes.
TRACE_WORDS: Final = 2 * NAMESPACES + reasons.words_for(ENTRIES)
LOOK_NS: Final = 10**9  # how often evictions are counted
LOOKS: Final = 4096  # of those counts; when there are so many, some are forgotten
# Those that stay lie a second apart, and further the longer ago: this part of it. So 192 * ln(1 + age / 192 s) do,
# which is 1,800 after a month and 3,200 after a hundred years.
APART: Final = 192
BELOW: Final = 2048  # blocks that continue what one DELETE names: 0.2 ms
GHOST_TICK: Final = 26  # of a ghost's time, as `blocks.py` writes it: bits of ns that are left out
EVENTS: Final = 256  # rules chosen, arenas given away

_BY_GRANT: Final[U8] = np.zeros(max(Grant) + 1, dtype=np.uint64)
_BY_GRANT[[Grant.FULL, Grant.BUSY]] = cause_word(Cause.REFUSED)
_BY_GRANT[Grant.QUOTA] = cause_word(Cause.LIMIT)
_BY_GRANT[Grant.DRAINING] = cause_word(Cause.DRAINING)


class Turns:
    """When there had been how many evictions: a count, and the first and the last time it was found to be that."""

    __slots__ = ("_turns", "_first_ns", "_last_ns")

    def __init__(self, now_ns: int) -> None:
        self._turns, self._first_ns, self._last_ns = [0], [now_ns], [now_ns]

    @property
    def seen(self) -> int:
        """How many evictions there had been at the last look."""
        return self._turns[-1]

    def begin_at(self, turn: int, now_ns: int) -> None:
        """There have been so many in former lives, and nobody knows when."""
        self._turns, self._first_ns, self._last_ns = [turn], [now_ns], [now_ns]

    def to_bytes(self) -> bytes:
        """For a successor."""
        return np.array([self._turns, self._first_ns, self._last_ns], dtype="<i8").tobytes()

    def take_over(self, content: bytes) -> bool:
        """Go on from what a former life had written down, which `begin_at` has been told the end of."""
        if len(content) % 24 or not 24 <= len(content) <= 24 * LOOKS:
            return False
        words = np.frombuffer(content, dtype="<i8").reshape(3, -1)
        turns, first, last = words
        grows = bool((np.diff(words) >= 0).all() and (first <= last).all() and (last[:-1] <= first[1:]).all())
        if not grows or turns[0] < 0 or first[0] < 0 or turns[-1] > self._turns[0] or last[-1] > self._first_ns[0]:
            return False
        self._turns, self._first_ns, self._last_ns = (
            before + now
            for before, now in zip(words.tolist(), (self._turns, self._first_ns, self._last_ns), strict=True)
        )
        return True

    def look(self, turn: int, now_ns: int) -> int:
        """Write down a count, and say when to look again."""
        self._last_ns[-1] = now_ns if turn == self._turns[-1] else self._last_ns[-1]
        if turn != self._turns[-1]:
            self._turns.append(turn)
            self._first_ns.append(now_ns)
            self._last_ns.append(now_ns)
        if len(self._turns) > LOOKS:
            self._thin(now_ns)
        return now_ns + LOOK_NS

    def _thin(self, now_ns: int) -> None:
        """Of those that lie close together for how long ago they are, keep the last."""
        ages = np.maximum(now_ns - np.array(self._first_ns, dtype=np.int64), 0) / (APART * LOOK_NS)
        steps = (APART * np.log1p(ages)).astype(np.int64)
        keep = [True, *(steps[1:-1] != steps[2:]).tolist(), True]
        self._turns, self._first_ns, self._last_ns = (
            list(compress(one, keep)) for one in (self._turns, self._first_ns, self._last_ns)
        )

    def time_of(self, turn: int, now_ns: int) -> int:
        """About when the eviction of that number was."""
        after = bisect_left(self._turns, turn)
        before_ns = self._last_ns[max(0, after - 1)]
        return (before_ns + (self._first_ns[after] if after < len(self._turns) else now_ns)) // 2

    def latest_of(self, turn: int, now_ns: int) -> int:
        """No later than that the eviction of that number was."""
        after = bisect_left(self._turns, turn)
        return self._first_ns[after] if after < len(self._turns) else now_ns


class Departures:
    """All that is known of blocks that are not there."""

    def __init__(self, tables: Tables, clock: Clock, randomness: Randomness, traces: U8 | None = None) -> None:
        """`traces`: `TRACE_WORDS` that may outlive this life; whatever they hold, it is a new one until `take_over`."""
        self.began_ns = now_ns = clock.now_ns()
        self.turns = Turns(now_ns)
        words = np.zeros(TRACE_WORDS, dtype=np.uint64) if traces is None else traces
        self._dropped_ns, self._cleared_ns, self.table = np.split(words, [NAMESPACES, 2 * NAMESPACES])  # views
        self._tables = tables
        self._clock = clock
        self._look_ns = 0
        self._rules: deque[tuple[int, int, str]] = deque(maxlen=EVENTS)  # until which eviction, pool, its rule
        self._given: deque[tuple[int, int, int, int]] = deque(maxlen=EVENTS)  # evictions before, after, when, tenant
        self._turn = 0  # evictions at the last look
        self._arenas: dict[int, int] = {}
        self._key: U8 = np.zeros(4, dtype=np.uint64)
        self._seed = [randomness.word() for _ in range(SEED_WORDS)]
        self._foreign = bool(self.table[0]) and not reasons.usable(self.table)
        if not reasons.usable(self.table):
            self._begin()

    def _begin(self) -> None:
        self._dropped_ns[:] = self._cleared_ns[:] = 0
        reasons.begin(self.table, self._seed, self.began_ns, cold=False)

    def take_over(self) -> str:
        """Go on with the traces of a former life, of which the tables have come back. Why not; empty if so."""
        self._turn = int(self._tables.book[blocks.TURN])
        self.turns.begin_at(self._turn, self.began_ns)
        late = (self._dropped_ns > self.began_ns).any() or (self._cleared_ns > self.began_ns).any()
        if late or self._foreign or not reasons.tidy(self.table, self.began_ns):
            self._begin()
            return "traces of blocks that left: what was kept is not ours, or damaged"
        return ""

    # -- noting --------------------------------------------------------------------------------------------------

    def refused(self, namespace: Namespace, keys: U8, at: int, count: int, grants: U4) -> None:
        """A RESERVE was answered; those of its keys that were refused are noted."""
        now_ns = self._clock.now_ns()
        note_refused(self.table, keys, at, count, namespace.number, grants, _BY_GRANT, now_ns)

    def dropped(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """A client deletes these, and what continues them."""
        now_ns = self._clock.now_ns()
        self._dropped_ns[namespace.number] = now_ns
        note_chain(self.table, keys, at, count, namespace.number, cause_word(Cause.DELETED), now_ns)
        self._note_below(namespace, keys, at, count, cause_word(Cause.DELETED))

    def cleared(self, namespaces: Iterable[Namespace], keys: U8 | None = None) -> None:
        """An operator drops all of some namespaces, or some keys and what continues them."""
        now_ns = self._clock.now_ns()
        for namespace in namespaces:
            if keys is None:
                self._cleared_ns[namespace.number] = now_ns
                continue
            self._dropped_ns[namespace.number] = now_ns
            word = cause_word(Cause.CLEARED)
            note_chain(self.table, keys, 0, keys.size // 4, namespace.number, word, now_ns)
            self._note_below(namespace, keys, 0, keys.size // 4, word)

    def _note_below(self, namespace: Namespace, keys: U8, at: int, count: int, word: int) -> None:
        """What continues the lead run of these, before it is dropped; its own keys, noted already, count towards it."""
        run: U4 = np.zeros(count, dtype=np.uint32)
        index, left, now_ns = namespace.tenant.index, BELOW, self._clock.now_ns()
        found, _, _ = blocks.extend_run(self._tables, index, namespace.number, keys, at, count, 0, run)
        tops = run[:found][~np.isin(self._tables.blocks["parent"][run[:found]], run[:found])]
        for row in tops.tolist():
            left -= int(note_below(self.table, self._tables.blocks, row, word, now_ns, left))
            if left <= 0:
                return

    def forget_namespace(self, number: int) -> None:
        """It is another one's from now on, of which nothing was dropped yet."""
        self._dropped_ns[number] = self._cleared_ns[number] = 0

    def unused(self, rows: Iterable[int]) -> None:
        """These, and what continues them, are about to be dropped since nobody has used them."""
        left, now_ns = BELOW, self._clock.now_ns()
        for row in rows:
            self.row_left(row, Cause.UNUSED)
            left -= int(note_below(self.table, self._tables.blocks, row, cause_word(Cause.UNUSED), now_ns, left))

    def row_left(self, row: int, cause: Cause, place: Place = Place.DRAM) -> None:
        """The block in a row is about to be dropped."""
        found = self._tables.blocks[row]
        self._key[:] = found["key"]
        self.key_left(int(found["namespace"]), self._key, cause, place)

    def unpinned(self, rows: U4) -> None:
        """The pin of these blocks, all of one namespace, has expired: what evicts them may be that."""
        table = self._tables.blocks
        keys, namespace = table["key"][rows].reshape(-1), int(table["namespace"][rows[0]])
        word = cause_word(Cause.PIN_EXPIRED, Place.DRAM)
        note_chain(self.table, keys, 0, rows.size, namespace, word, self._clock.now_ns())

    def key_left(self, namespace: int, key: U8, cause: Cause, place: Place = Place.NONE) -> None:
        """A key (four words) is not there any more, or its pin has ended (PIN_EXPIRED)."""
        note_chain(self.table, key, 0, 1, namespace, cause_word(cause, place), self._clock.now_ns())

    def chosen(self, former: Iterable[tuple[int, str]]) -> None:
        """Pools go by another rule from now on; these are those that they had."""
        turn = int(self._tables.book[blocks.TURN])
        self._rules.extend((turn, pool, rule) for pool, rule in former)

    def look(self, tenants: Iterable[Tenant]) -> None:
        """Once in a while: how many evictions there have been, and who has fewer arenas than before. Cheap else."""
        now_ns = self._clock.now_ns()
        if now_ns < self._look_ns:
            return
        before, self._turn = self._turn, int(self._tables.book[blocks.TURN])
        self._look_ns = self.turns.look(self._turn, now_ns)
        for tenant in tenants:
            if tenant.arenas < self._arenas.get(tenant.number, 0):
                self._given.append((before, self._turn, now_ns, tenant.number))
            self._arenas[tenant.number] = tenant.arenas

    # -- looking -------------------------------------------------------------------------------------------------

    def of(self, namespace: int, key: U8) -> Departure:
        """What is noted of a key that is not there."""
        return reasons.departure(self.table, key, namespace, self._clock.now_ns())

    def ghost(self, tenant: Tenant, namespace: int, key: U8, pool: int) -> int:
        """Which eviction it was when a pool gave up a key, if that is remembered; -1 if not."""
        row = self._ghost_row(tenant, namespace, key, pool)
        return -1 if row < 0 else self._turn_of(int(self._tables.ghosts["turn"][row]))

    def used_ns(self, tenant: Tenant, namespace: int, key: U8, pool: int) -> int:
        """When what a pool gave up and remembers came or was used last, to 67 ms; -1 if it remembers nothing."""
        row = self._ghost_row(tenant, namespace, key, pool)
        if row < 0:
            return -1
        ticks = self._clock.now_ns() >> GHOST_TICK
        return ticks - ((ticks - int(self._tables.ghosts["touched"][row])) & 0xFFFFFFFF) << GHOST_TICK

    def _turn_of(self, turn: int) -> int:
        """Ghosts have the lower half of it."""
        evictions = int(self._tables.book[blocks.TURN])
        return evictions - ((evictions - turn) & 0xFFFFFFFF)

    def time_of(self, turn: int) -> int:
        """About when that eviction was."""
        return self.turns.time_of(turn, self._clock.now_ns())

    def latest_ns(self, turn: int) -> int:
        """No later than that that eviction was. An operator's leaves a ghost with the number of the one before it."""
        return self.turns.latest_of(turn, self._clock.now_ns())

    def known_ns(self, tenant: Tenant, namespace: int, key: U8, pool: int) -> int:
        """Since when an eviction of a key would be remembered.

        Whatever its set forgot is older than all that is there. Where there was about one eviction a set, none had to
        forget: with eight places, one in a million.
        """
        evictions = int(self._tables.book[blocks.TURN])
        if evictions <= self._tables.ghosts.size // blocks.GHOST_WAYS and not self._given:
            return self.began_ns
        begin, _ = self._ghost_set(tenant, namespace, key, pool)
        ways = self._tables.ghosts[begin : begin + blocks.GHOST_WAYS]
        turns = [self._turn_of(turn) for turn in ways["turn"][ways["print"] != 0].tolist()]
        return self.time_of(min(turns)) if turns else self._clock.now_ns()

    def _ghost_set(self, tenant: Tenant, namespace: int, key: U8, pool: int) -> tuple[int, int]:
        """As `blocks._ghost_set`, of a key that has no row."""
        shape = tenant.index.shape
        tweak = np.uint64(namespace | (pool + 1) << 32)
        hashed = int(blocks.siphash(shape[3], shape[4], key[0], key[1], key[2], key[3], tweak))
        sets = max(1, self._tables.ghosts.size // blocks.GHOST_WAYS)
        return hashed % sets * blocks.GHOST_WAYS, hashed >> 32 | 1

    def _ghost_row(self, tenant: Tenant, namespace: int, key: U8, pool: int) -> int:
        begin, fingerprint = self._ghost_set(tenant, namespace, key, pool)
        for row in range(begin, min(begin + blocks.GHOST_WAYS, self._tables.ghosts.size)):
            if int(self._tables.ghosts["print"][row]) == fingerprint:
                return row
        return -1

    def rule_at(self, pool: int, turn: int, now: str) -> str:
        """By which rule a pool went at that eviction; `now`: the one that it has."""
        return next((rule for until, number, rule in self._rules if number == pool and turn <= until), now)

    def gave_way_ns(self, tenant: Tenant, turn: int) -> int:
        """When an arena of a tenant went to others about then, with all that lay there; 0: it did not.

        Such blocks are remembered as given up with the last eviction before.
        """
        events = (ns for first, last, ns, number in self._given if number == tenant.number and first <= turn <= last)
        return next(events, 0)

    @property
    def held_bytes(self) -> int:
        """Memory of all arrays, as if every page of them were touched."""
        return self.table.nbytes + self._dropped_ns.nbytes + self._cleared_ns.nbytes + 120 * LOOKS

    def dropped_ns(self, namespace: int) -> int:
        """When blocks of a namespace, with what continued them, were dropped last; 0: never."""
        return int(self._dropped_ns[namespace])

    def cleared_ns(self, namespace: int) -> int:
        """When all of a namespace was dropped last; 0: never."""
        return int(self._cleared_ns[namespace])
