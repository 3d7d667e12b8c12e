"""Pins: prefixes that stay for a while, whatever else is stored. Owner thread.

    PIN keys, ttl -> the lead run that is there, as far as the tenant's budget goes -> a hold on its deepest block
                  -> over by UNPIN, by its deadline (which a use may move), with its blocks, or never refreshed again

A pin is a hold like a lease's, without a client: so nothing it covers is evicted. It promises nobody memory, and
therefore gives way where a lease would not be asked: to DELETE, and to a tenant below its share, who gets the arena.

The budget is counted in slots, each once however many pins cover it. `covers` counts by row how many do; a row's
number is nobody else's as long as a pin holds what continues it.

What lies on disk is held there, and with `tier` DRAM it is brought in (`pin_fetches.py`) and held in DRAM from then
on. Where the budget is used up, pins of a class that has more than it is sure of end for one that has less
(`pin_classes.py`). A successor that starts warm goes on with all of them (`pin_book.py`, `repinning.py`).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from kvproto.limits import KEYS_PER_FRAME, PINS_PER_TENANT
from kvproto.policy_frames import Partial, Pin, Pinned, Tier
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.classes import PROGRAM, PinClass, class_of
from kvstore.hints.deadlines import Deadlines
from kvstore.pin_book import PinBook, Saved, written_owner
from kvstore.pin_classes import Classes
from kvstore.pin_fetches import PinFetches
from kvstore.pin_notes import Notes
from kvstore.pins import Held, Tally
from kvstore.ports import Clock, Randomness
from kvstore.prefetching import Prefetching
from kvstore.sessions import Namespace, Tenant
from kvstore.sweeps import Jobs
from kvstore.watch import PIN_END, Watch

# Numbers are given out in one row from somewhere below this: short enough to be typed, and not those of a former life.
FIRST_NUMBER: Final = 10**6
# A tick takes so much time, and what does not fit into it waits for the next one:
LOOK_AT: Final = 512  # pins are looked at, whether what they cover was dropped: 0.2 ms,
SHORTEN: Final = 8  # of them are cut short: 0.5 ms,
DUE: Final = 8  # end: 1 ms if each covers 1,024 blocks,
LET_GO: Final = 8192  # and so many of the blocks that they cover are let go: 0.3 ms
WEIGH_NS: Final = 10**9  # from one look at what each tenant has pinned to the next

_NOTHING: Final = (0, 0, 0, 0)


def _nobody_hears(_rows: U4) -> None:
    pass


def _each_once(rows: U4) -> U4:
    """The same array where that is so: a chain names a block twice only if its client made it so."""
    unique = np.unique(rows)
    return rows if unique.size == rows.size else unique


class Nearer(Protocol):
    """What pins want in memory of GPUs: `tier.hbms.HbmTiers`."""

    def affordable(self, namespace: Namespace, rows: U4) -> int:
        """How many of these blocks, from the first on."""

    def keep(self, number: int, namespace: Namespace, rows: U4) -> None:
        """A pin wants these there."""

    def shorten(self, number: int, namespace: Namespace, rows: U4) -> None:
        """Only these from now on."""

    def let_go(self, number: int) -> None:
        """It is over."""

    def lift(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """Copy them up."""


class Absent(Protocol):
    """Pins of a former life that were not found yet: `repinning.Repinning`."""

    @property
    def waiting(self) -> bool:
        """Has `tick` anything to do?"""

    def tick(self) -> None:
        """Go on with some of them."""

    def unpin(self, tenant: Tenant, number: int) -> bool:
        """End one, if it is this tenant's."""


class Pinning:
    """All pins of a store."""

    def __init__(
        self, tables: Tables, clock: Clock, randomness: Randomness, watch: Watch, budget: Callable[[Tenant], int],
        classes: Classes, book: PinBook, prefetching: Prefetching, jobs: Jobs,
    ) -> None:  # fmt: skip
        """`budget`: bytes of slots that a tenant may pin; `jobs` drop blocks."""
        self.tally = Tally()
        self.pins: dict[int, Held] = {}
        self.expired: Callable[[U4], None] = _nobody_hears  # `Departures`, of rows that are not pinned any more
        self.nearer: Nearer | None = None  # `HbmTiers`
        self.absent: Absent | None = None
        self._tables = tables
        self._clock = clock
        self._watch = watch
        self._budget = budget
        self._classes = classes
        self._book = book
        self._too_much: dict[Tenant, None] = {}  # their budgets became smaller
        self._weigh_ns = 0  # when that is looked at again
        self.fetches = PinFetches(tables, clock, prefetching)
        self._next = 1 + randomness.word() % FIRST_NUMBER
        self._of: dict[Tenant, dict[int, Held]] = {}
        self._by_end: dict[int, dict[int, Held]] = {}  # by the deepest row
        self._leased_ns: dict[int, int] = {}  # when that was leased last
        self._notes = Notes(tables, book, self.pins, self._ending_at, self.expires_ns)
        self._of_programs: dict[tuple[Tenant, str], list[int]] = {}  # resumed ones, by owner, until `adopt`
        self._ending: dict[Tenant, deque[Held]] = {}  # they are over, and what they cover is not let go yet
        self._covers = np.zeros(tables.blocks.size, dtype=np.uint16)  # untouched pages cost nothing
        self._used: Counter[Tenant] = Counter()  # bytes
        self._due: Deadlines[Held] = Deadlines()
        self._jobs = jobs
        self._jobs_seen = 0
        self._again = False  # may something have been dropped since the last look at all pins began?
        self._to_look_at: deque[Held] = deque()
        self._when_cut: list[Callable[[], None]] = []  # to be called once all pins have been looked at from now on,
        self._when_looked: list[Callable[[], None]] = []  # and those for whom that has begun
        self._run: U4 = np.zeros(KEYS_PER_FRAME, dtype=np.uint32)
        self._ends: U4 = np.zeros(KEYS_PER_FRAME + 1, dtype=np.uint32)
        watch.tell(PIN_END, self.leased)

    # -- verbs ---------------------------------------------------------------------------------------------------

    def pin(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, ttl_ns: int, tier: Tier,
        *, refresh: bool = True, owner: str = "",
    ) -> Pinned:  # fmt: skip
        """Keep the lead run of a chain for `ttl_ns`; with `refresh`, a lease of its last block begins that anew.

        HBM counts as DRAM where there is no HBM tier; else it is both, as far as either has room for pins, until a
        restart. `owner` is who will end it, "" for a client.
        """
        pins = max(len(self._of.get(tenant, ())), len(self._ending.get(tenant, ())))
        if pins >= PINS_PER_TENANT or self._book.full:
            self.tally.over_budget += 1
            return Pinned(*_NOTHING, Partial.TOO_MANY)
        kind = class_of(ttl_ns, owner)
        lasts_ns = tenant.quota.terms(kind).lasts_ns(ttl_ns)
        end, on_disk, _ = blocks.extend_run(self._tables, tenant.index, namespace.number, keys, at, count, 0, self._run)
        nearer = self.nearer if tier is Tier.HBM else None
        # First: it ends no pin for that.
        near = end if nearer is None else nearer.affordable(namespace, self._run[:end])
        covered = self._affordable(tenant, namespace, self._run[:near], kind)
        partial = Partial.NOTHING if covered == count else Partial.ABSENT if covered == end else Partial.BUDGET
        self.tally.over_budget += partial is Partial.BUDGET
        if not covered:
            return Pinned(*_NOTHING, partial)
        rows, deadline_ns, place = self._run[:covered].copy(), self._clock.now_ns() + lasts_ns, self._book.take()
        pin = Held(
            self._next, tenant, namespace, rows, _each_once(rows), self._ends[:0], deadline_ns, ttl_ns, refresh, owner,
            kind, place, tier if on_disk else Tier.DISK,
        )  # fmt: skip
        self._next += 1
        self._begin(pin)
        self.tally.pinned += 1
        if nearer is not None:
            nearer.keep(pin.number, namespace, rows)
            nearer.lift(namespace, keys, at, covered)
        if pin.wanted is not Tier.DISK:
            self.fetches.begin(pin)
        return Pinned(pin.number, covered * namespace.identity.block_bytes, pin.deadline_ns, covered, partial)

    def resume(self, saved: Saved, namespace: Namespace, rows: U4, deadline_ns: int) -> bool:
        """Go on with a pin of a former life that covers these rows, or as many of them as the budget still allows.

        False: that is none.
        """
        tenant, kind = namespace.tenant, class_of(saved.ttl_ns, saved.owner)
        full = len(self._of.get(tenant, ())) >= PINS_PER_TENANT
        covered = 0 if full else self._affordable(tenant, namespace, rows, kind)
        if not covered:
            return False
        rows = rows[:covered].copy()
        pin = Held(
            saved.number, tenant, namespace, rows, _each_once(rows), self._ends[:0], deadline_ns, saved.ttl_ns,
            saved.refresh, saved.owner, kind, saved.place, Tier.DRAM if saved.to_dram else Tier.DISK,
        )  # fmt: skip
        self._begin(pin)
        if saved.to_dram:
            self.fetches.wait(pin)
        if kind is PinClass.TOOL:
            self._of_programs.setdefault((tenant, saved.owner), []).append(saved.number)
        return True

    def adopt(self, tenant: Tenant, program: str) -> Pinned | None:
        """The pin that was resumed for a program, from now on its guide's; None: there is none, or not any more."""
        owner = written_owner(PROGRAM + program)
        numbers = [number for number in self._of_programs.pop((tenant, owner), ()) if number in self.pins]
        if not numbers:
            return None
        self.unpin(tenant, numbers[:-1])  # the former life ended while one took the place of another
        pin = self._described(self.pins[numbers[-1]])
        return Pinned(pin.pin, pin.bytes, pin.expires_ns, pin.blocks, Partial.NOTHING)

    def number_after(self, number: int) -> None:
        """New pins get numbers above this one."""
        self._next = max(self._next, number + 1)

    def unpin(self, tenant: Tenant, numbers: Iterable[int]) -> int:
        """End pins of a tenant; how many there were. Others' numbers, and those that are over, are no news."""
        mine, numbers = self._of.get(tenant, {}), dict.fromkeys(numbers)
        ended = [mine[number] for number in numbers if number in mine]
        for pin in ended:
            self._end(pin)
        absent = self.absent
        count = len(ended) + (0 if absent is None else sum(absent.unpin(tenant, number) for number in numbers))
        self.tally.ended += count
        self._let_go_some(tenant)
        return count

    def list_pins(self, tenant: Tenant, after: int, most: int) -> list[Pin]:
        """A tenant's pins with numbers above `after`, in their order, up to `most`."""
        mine = self._of.get(tenant, {})
        numbers = sorted(number for number in mine if number > after)  # resumed ones may have come after new ones
        return [self._described(mine[number]) for number in numbers[:most]]

    def count(self, tenant: Tenant) -> int:
        """Pins of a tenant."""
        return len(self._of.get(tenant, ()))

    def used_bytes(self, tenant: Tenant) -> int:
        """What a tenant's pins cover, in slots, each once."""
        return self._used[tenant]

    def class_bytes(self, tenant: Tenant, kind: PinClass) -> int:
        """What a tenant's pins of one class cover, in slots, each once."""
        return self._classes.used_bytes(tenant, kind)

    def covered(self, rows: U4) -> npt.NDArray[np.bool_]:
        """Which of these rows do pins cover?"""
        covers: npt.NDArray[np.bool_] = self._covers[rows] != 0
        return covers

    def covering(self, rows: U4) -> npt.NDArray[np.uint16]:
        """How many pins cover each of these rows?"""
        return self._covers[rows]

    def trim(self, tenant: Tenant) -> None:
        """Its quota has changed: what is pinned beyond its budget is let go of soon."""
        self._too_much[tenant] = None

    def leased(self, rows: U4) -> None:
        """Rows that `Watch` marks as ends of pins were leased. What that means for each pin is seen when it is due."""
        leased = rows.tolist()
        self._leased_ns.update(dict.fromkeys(leased, self._clock.now_ns()))
        self._notes.used(leased)

    def note_all(self) -> None:
        """This life ends: a successor is to know of all uses."""
        self._notes.finish()

    def when_cut(self, tenant: Tenant | None, answer: Callable[[], None]) -> None:
        """Blocks of a tenant (None: of all) were dropped: answer once a successor would be told that no pin covers
        them any more.
        """
        if self._of.get(tenant) if tenant else self.pins:
            self._when_cut.append(answer)
        else:
            answer()

    def expires_ns(self, pin: Held) -> int:
        """When it is over, as things are."""
        leased_ns = self._leased_ns.get(int(pin.rows[-1])) if pin.refresh else None
        if leased_ns is None:
            return pin.deadline_ns
        return max(pin.deadline_ns, leased_ns + pin.tenant.quota.terms(pin.kind).lasts_ns(pin.ttl_ns))

    def _ending_at(self, row: int) -> Iterable[Held]:
        return self._by_end.get(row, {}).values()

    def _described(self, pin: Held) -> Pin:
        """As clients are told."""
        count = pin.rows.size
        return Pin(
            pin.number, count * pin.namespace.identity.block_bytes, self.expires_ns(pin), count, pin.namespace.number
        )

    # -- holding -------------------------------------------------------------------------------------------------

    def _affordable(self, tenant: Tenant, namespace: Namespace, run: U4, kind: PinClass) -> int:
        """How many blocks of a run the tenant's budget allows."""
        fresh = self._covers[run] == 0
        budget = self._budget(tenant)
        wanted_bytes = int(fresh.sum()) * namespace.slot_bytes
        if self._used[tenant] + wanted_bytes > budget:
            if tenant in self._ending:
                self._let_go_some(tenant)
            sure_bytes = self._classes.left_bytes(tenant, kind)
            if sure_bytes > 0:
                self._make_way(tenant, min(wanted_bytes, sure_bytes))
            fresh = self._covers[run] == 0
        room = max(0, budget - self._used[tenant]) // namespace.slot_bytes
        return int(np.searchsorted(np.cumsum(fresh), room, side="right"))

    def _make_way(self, tenant: Tenant, wanted_bytes: int) -> None:
        """Pins end until there is so much room, as long as a class has more than it is sure of."""
        left, budget = LET_GO, self._budget(tenant)
        while left > 0 and budget - self._used[tenant] < wanted_bytes:
            pin = self._classes.first_to_go(tenant)
            if pin is None:
                return
            left -= pin.rows.size + 64
            self._end(pin)
            self.tally.gave_way += 1
            self._let_go_some(tenant)

    def _begin(self, pin: Held) -> None:
        self._notes.write(pin)
        self._classes.begin(pin)
        self._hold(pin)
        self.pins[pin.number] = self._of.setdefault(pin.tenant, {})[pin.number] = pin
        self._due.set(pin, pin.deadline_ns)
        self._charge(pin, 1)

    def _hold(self, pin: Held) -> None:
        """Hold the deepest block; and the deepest one in DRAM, or those before it could leave DRAM meanwhile."""
        rows, state = pin.rows, self._tables.blocks["state"]
        held = int(blocks.hold_ends(self._tables, rows, rows.size, np.uint64(0), self._ends))
        in_dram = np.flatnonzero(np.isin(state[rows], (blocks.RESIDENT, blocks.KEPT, blocks.LOADING)))
        if in_dram.size and in_dram[-1] < rows.size - 1:
            self._ends[held] = rows[in_dram[-1]]
            blocks.hold_rows(self._tables, self._ends, held, held + 1)
            held += 1
        pin.ends = self._ends[:held].copy()
        self._by_end.setdefault(int(rows[-1]), {})[pin.number] = pin
        self._watch.mark(rows[-1:], PIN_END)

    def _let_go(self, pin: Held) -> None:
        last = int(pin.rows[-1])
        others = self._by_end[last]
        del others[pin.number]
        if not others:
            del self._by_end[last]
            self._leased_ns.pop(last, None)
            self._watch.unmark(pin.rows[-1:], PIN_END)
        blocks.unhold_rows(self._tables, pin.ends, 0, pin.ends.size)

    def _charge(self, pin: Held, by: int) -> None:
        """What it covers is covered by one pin more, or fewer."""
        covers = self._covers[pin.paid]
        changed = int((covers == (0 if by > 0 else 1)).sum())
        self._covers[pin.paid] = covers + np.uint16(1) if by > 0 else covers - np.uint16(1)
        self._used[pin.tenant] += by * changed * pin.namespace.slot_bytes
        self._classes.charge(pin, by)

    def _end(self, pin: Held) -> None:
        """It is over; what it covers is let go soon."""
        self.fetches.end(pin)
        self._book.wipe(pin.place)
        self._classes.end(pin)
        self._due.drop(pin)
        if self.nearer is not None:
            self.nearer.let_go(pin.number)
        del self.pins[pin.number]
        mine = self._of[pin.tenant]
        del mine[pin.number]
        if not mine:
            del self._of[pin.tenant]
        self._ending.setdefault(pin.tenant, deque()).append(pin)

    def _let_go_some(self, tenant: Tenant) -> None:
        """As many of a tenant's as there is time for at once."""
        left, ending = LET_GO, self._ending.get(tenant)
        while ending and left > 0:
            pin = ending.popleft()
            left -= pin.rows.size + 64  # what each takes whatever it covers
            self._charge(pin, -1)
            self._let_go(pin)
            if not self._used[tenant]:
                del self._used[tenant]
        if ending:
            self._ending[tenant] = self._ending.pop(tenant)  # in `tick` it is the others' turn first
        else:
            self._ending.pop(tenant, None)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Deadlines have passed; blocks may have been dropped."""
        for pin in self._due.due(now_ns, DUE):
            expires_ns = self.expires_ns(pin)
            if expires_ns > now_ns:
                pin.deadline_ns = expires_ns
                self._notes.write(pin)
                self._classes.begin(pin)
                self._due.set(pin, expires_ns)
                self.tally.refreshed += 1
                continue
            self.expired(pin.rows)
            self._end(pin)
            self.tally.expired += 1
        self._look(now_ns)
        self._notes.tick(now_ns)
        self.fetches.tick(now_ns)
        if self.absent is not None:
            self.absent.tick()
        if self._used and now_ns >= self._weigh_ns:
            self._weigh(now_ns)
        if self._too_much:
            self._trim_some(next(iter(self._too_much)))
        if self._ending:
            self._let_go_some(next(iter(self._ending)))

    def _weigh(self, now_ns: int) -> None:
        """Budgets become smaller, too, when other tenants come, or are promised more."""
        self._weigh_ns = now_ns + WEIGH_NS
        for tenant, used_bytes in self._used.items():
            if used_bytes > self._budget(tenant):
                self.trim(tenant)

    def _trim_some(self, tenant: Tenant) -> None:
        self._make_way(tenant, 0)
        if self._used[tenant] <= self._budget(tenant) or self._classes.first_to_go(tenant) is None:
            del self._too_much[tenant]

    def _look(self, _now_ns: int) -> None:
        """Were blocks dropped that pins cover? All pins are looked at that were there when something was."""
        if self._jobs_seen != self._jobs.begun or self._jobs.waiting:
            self._jobs_seen, self._again = self._jobs.begun, True
        if (self._again or self._when_cut) and not self._to_look_at:
            self._to_look_at.extend(self.pins.values())
            self._again = False
            self._when_looked, self._when_cut = self._when_cut, []
        if self._to_look_at:
            self._leave_dropped()
        if self._when_looked and not self._to_look_at:
            looked, self._when_looked = self._when_looked, []
            for answer in looked:
                answer()

    def _leave_dropped(self) -> None:
        """Let go of what was deleted, damaged or had to give way; what comes before it stays pinned."""
        some = [self._to_look_at.popleft() for _ in range(min(LOOK_AT, len(self._to_look_at)))]
        some = [pin for pin in some if pin.number in self.pins]
        if not some:
            return
        state = self._tables.blocks["state"]
        whose = np.repeat(np.arange(len(some)), [pin.ends.size for pin in some])
        doomed = state[np.concatenate([pin.ends for pin in some])] == blocks.DOOMED
        numbers = np.unique(whose[doomed]).tolist()
        self._to_look_at.extendleft(some[number] for number in numbers[SHORTEN:])
        for number in numbers[:SHORTEN]:
            pin = some[number]
            self._shorten(pin, int(np.argmax(state[pin.rows] == blocks.DOOMED)))
            self.tally.dropped += 1

    def _shorten(self, pin: Held, count: int) -> None:
        """Only the first `count` blocks from now on."""
        if not count:
            self._end(pin)
            return
        pin.deadline_ns = self.expires_ns(pin)
        self._charge(pin, -1)
        self._let_go(pin)
        pin.rows = pin.rows[:count].copy()
        pin.paid = _each_once(pin.rows)
        self._notes.write(pin)
        self._hold(pin)
        self._charge(pin, 1)
        if self.nearer is not None:
            self.nearer.shorten(pin.number, pin.namespace, pin.rows)

    def next_ns(self) -> int | None:
        """When `tick` has something to do; None if there are no pins."""
        if self._ending or self._to_look_at or self._too_much or self._when_cut:
            return 0
        if self.absent is not None and self.absent.waiting:
            return 0
        dues = self._due.next_ns(), self._notes.next_ns(), self.fetches.next_ns()
        due_ns = min((ns for ns in dues if ns is not None), default=None)
        unseen = self._again or self._jobs_seen != self._jobs.begun
        return 0 if due_ns is not None and unseen and not self._jobs.waiting else due_ns

    def held(self) -> Iterator[Held]:
        """Pins that hold blocks, those included that are over."""
        yield from self.pins.values()
        for ending in self._ending.values():
            yield from ending

    def held_rows(self) -> Sequence[int]:
        """Rows that pins hold, once for each hold."""
        return [row for pin in self.held() for row in pin.ends.tolist()]
