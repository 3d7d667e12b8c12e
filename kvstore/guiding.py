"""What clients say of programs, tools and workflows, turned into pins, fetches and words on blocks. Owner thread.

    HINT -> hear -> the tenant's Guide (hints/guide.py) -> Keep, LetGo    pinning.py
    tick -> due, errands ---^                              Fetch          prefetching.py
                                                           Say            blocks.hint_run

Hints are advice, so nothing here promises anything. A pin for a program goes within the tenant's budget for pins; where
that is spent, programs that came later lose theirs first: who waits longest has the most to lose (hints/programs.py).

Bounded: everything is of one tenant and counted in hints/limits.py. A frame costs the owner one chain of at most 1,024
blocks, and what a run has left to do goes on in `tick`, one chain a turn. Once a tenant has had no session
for an hour, all of it is forgotten but what its tools have taught; and that, too, where it never asked for a namespace
and another tenant needs its place.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Final, Protocol

import numpy as np

from kvproto.limits import KEY_BYTES, KEYS_PER_FRAME, PREFETCH_NS_MAX
from kvproto.policy_frames import Event, Fetching, Hint, Partial, Pinned, Tier
from kvstore import blocks
from kvstore.blocks import U1, U8, Tables
from kvstore.hints.chains import Chain
from kvstore.hints.deadlines import Deadlines
from kvstore.hints.gaps import Gaps
from kvstore.hints.guide import FREE, NAMES_KEYS, Deed, Guide
from kvstore.hints.limits import (
    ABSENT_S,
    AGAIN_AT_ONCE,
    DROPS_AT_ONCE,
    DUE_AT_ONCE,
    LOOK_S,
    SECOND_NS,
)
from kvstore.hints.programs import Costs, Fetch, Keep, LetGo
from kvstore.hints.refusal import Refusal, Refused, shown
from kvstore.hints.report import GuidingReport, HintCounters, report_of
from kvstore.hints.words import Say
from kvstore.ports import Clock
from kvstore.registry import Registry
from kvstore.sessions import Namespace, Session, Tenant

FETCH_NS_MIN: Final = 5 * SECOND_NS  # what is wanted at once is still worth having so much later
AGAIN_NS: Final = (SECOND_NS // 4, 2 * SECOND_NS)  # after which a pin that ended early is tried again
_WORDS: Final = KEY_BYTES // 8

CostsOf = Callable[[Namespace, int, int], Costs]


class Pins(Protocol):
    """`pinning.Pinning`."""

    def pin(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, ttl_ns: int, tier: Tier,
        *, refresh: bool, owner: str,
    ) -> Pinned:  # fmt: skip
        """Keep the lead run of a chain for so long."""

    def unpin(self, tenant: Tenant, numbers: Iterable[int]) -> int:
        """End pins."""

    def used_bytes(self, tenant: Tenant) -> int:
        """Of the tenant's budget."""

    def adopt(self, tenant: Tenant, program: str) -> Pinned | None:
        """What a former life of the daemon had pinned for a program; None: nothing, or it was asked for already."""


class Fetches(Protocol):
    """`prefetching.Prefetching`."""

    def prefetch(
        self, tenant: Tenant, namespace: Namespace, keys: U8, at: int, count: int, within_ns: int, tier: Tier
    ) -> Fetching:  # fmt: skip
        """Have the lead run of a chain in a tier within so long."""

    def cancel(self, tenant: Tenant, numbers: Iterable[int]) -> None:
        """These are not wanted any more."""


@dataclass(slots=True)
class Tally:
    """Totals, as `HintCounters` has them."""

    hints: int = 0
    refused: int = 0
    said_blocks: int = 0
    pinned: int = 0
    gave_way: int = 0
    fetches: int = 0


@dataclass(slots=True, eq=False)
class _Told:
    """A tenant that has said something."""

    tenant: Tenant
    guide: Guide
    look_ns: int  # when to see whether it still has a session
    absent_ns: int | None = None  # it had none then
    ending: bool = False  # it has been absent for too long
    pins: dict[str, Pinned] = field(default_factory=dict)  # by program
    fetches: dict[str, int] = field(default_factory=dict)  # by program, the last one
    short: dict[str, tuple[Keep, int]] = field(default_factory=dict)  # pins to try again, and how often that was done
    again: Deadlines[str] = field(default_factory=Deadlines)  # when

    def next_ns(self) -> int:
        """When there is something to do."""
        if self.ending:
            return 0
        dues = (self.guide.next_ns(), self.again.next_ns())
        return min((ns for ns in dues if ns is not None and ns < self.look_ns), default=self.look_ns)

    def settle(self, program: str) -> None:
        """There is nothing to try again."""
        if self.short.pop(program, None) is not None:
            self.again.drop(program)


class Guiding:
    """All tenants' programs and workflows."""

    def __init__(
        self, tables: Tables, clock: Clock, registry: Registry, pinning: Pins, prefetching: Fetches,
        costs_of: CostsOf,
    ) -> None:  # fmt: skip
        """`costs_of`: what it costs to lose blocks (first to last, not included) of a namespace."""
        self.tally = Tally()
        self._tables = tables
        self._clock = clock
        self._registry = registry
        self._pinning = pinning
        self._prefetching = prefetching
        self._costs_of = costs_of
        self._told: dict[Tenant, _Told] = {}
        self._turns: deque[_Told] = deque()
        self._taught: dict[Tenant, Gaps] = {}  # by tools of tenants of whom nothing else is left
        self._next_ns: int | None = None
        registry.forgotten = self._forget
        # One buffer each, since compiled code wants arrays that may be written to, and bytes may not.
        self._keys: U8 = np.zeros(_WORDS * KEYS_PER_FRAME, np.uint64)
        self._levels: U1 = np.zeros(KEYS_PER_FRAME, np.uint8)

    # -- hints ---------------------------------------------------------------------------------------------------

    def hear(self, session: Session, hint: Hint) -> Refused | None:
        """A client says something; a refusal if it is not taken. Raises NamespaceError for a namespace that this
        session did not open, where the event names blocks.
        """
        if hint.event in NAMES_KEYS:
            self._registry.namespace(session, hint.namespace)
        now_ns = self._clock.now_ns()
        self.tally.hints += 1
        told = self._told.get(session.tenant) or self._begin(session.tenant, now_ns)
        told.absent_ns, told.ending = None, False
        self._registry.heard(session.tenant)
        heard = told.guide.hear(hint, now_ns, lambda chain: self._costs(session.tenant, chain))
        refused = heard if isinstance(heard, Refused) else None
        over = hint.event is Event.PROGRAM_FINISHED
        if Event.PROGRAM <= hint.event <= Event.PROGRAM_FINISHED and (over or refused is None):
            self._adopt(told, hint.name)
        if not isinstance(heard, Refused):
            self._do(told, heard, now_ns)
        elif over:  # it began in a former life, which may have left it a pin
            self._let_go(told, LetGo(hint.name))
        self.tally.refused += refused is not None
        soonest_ns = told.next_ns()
        if self._next_ns is None or soonest_ns < self._next_ns:
            self._next_ns = soonest_ns
        return refused

    def _begin(self, tenant: Tenant, now_ns: int) -> _Told:
        guide = Guide(self._taught.pop(tenant, None))
        told = self._told[tenant] = _Told(tenant, guide, now_ns + LOOK_S * SECOND_NS)
        self._turns.append(told)
        return told

    def _adopt(self, told: _Told, program: str) -> None:
        """A program goes on that a former life knew: its pin ends as any other of its pins."""
        former = self._pinning.adopt(told.tenant, program)
        if former is not None and told.pins.setdefault(program, former) is not former:
            self._unpin(told, [former.pin])

    def _costs(self, tenant: Tenant, chain: Chain) -> Costs:
        namespace = self._namespace(tenant, chain)
        return FREE if namespace is None else self._costs_of(namespace, 0, chain.length)

    def _namespace(self, tenant: Tenant, chain: Chain) -> Namespace | None:
        """None if the tenant has none of that number. What it has may be another one than a hint of long ago meant."""
        namespace = self._registry.by_number.get(chain.namespace)
        return namespace if namespace is not None and namespace.tenant is tenant else None

    # -- what follows --------------------------------------------------------------------------------------------

    def _do(self, told: _Told, deeds: Iterable[Deed], now_ns: int) -> None:
        for deed in deeds:
            if isinstance(deed, Say):
                self._say(told, deed)
            elif isinstance(deed, Keep):
                self._keep(told, deed, now_ns)
            elif isinstance(deed, Fetch):
                self._fetch(told, deed, now_ns)
            else:
                self._let_go(told, deed)

    def _say(self, told: _Told, say: Say) -> None:
        """Whatever rule holds: each has a way with words (policy.py)."""
        namespace = self._namespace(told.tenant, say.chain)
        if namespace is None:
            return
        count = self._put_keys(say.chain)
        self._levels[:count] = np.frombuffer(say.levels, np.uint8, count)
        index = told.tenant.index
        found = blocks.hint_run(self._tables, index, namespace.number, self._keys, 0, count, self._levels[:count])
        self.tally.said_blocks += int(found)

    def _keep(self, told: _Told, keep: Keep, now_ns: int, tries: int = 0) -> None:
        """The new pin before the old one goes, so that nothing they share is let go in between.

        A context is often named while its last blocks are still being copied: a pin that ends early is tried again.
        """
        told.settle(keep.program)
        former = told.pins.pop(keep.program, None)
        pinned = self._pin(told, keep, now_ns)
        freed = former is not None and self._unpin(told, [former.pin]) > 0
        if pinned is not None and pinned.partial in (Partial.BUDGET, Partial.TOO_MANY):
            room_made = self._make_way(told, keep, pinned, now_ns)
            if freed or room_made:
                short, pinned = pinned, self._pin(told, keep, now_ns)
                self._unpin(told, [short.pin])
        if pinned is not None and pinned.partial == Partial.ABSENT and tries < len(AGAIN_NS):
            told.short[keep.program] = keep, tries + 1
            told.again.set(keep.program, now_ns + AGAIN_NS[tries])
        elif pinned is None or not pinned.blocks:
            told.guide.programs.dropped(keep.program)
        if pinned is not None and pinned.blocks:
            told.pins[keep.program] = pinned
            self.tally.pinned += 1

    def _pin(self, told: _Told, keep: Keep, now_ns: int) -> Pinned | None:
        namespace = self._namespace(told.tenant, keep.chain)
        if namespace is None or keep.until_ns <= now_ns:
            return None
        count = self._put_keys(keep.chain)
        return self._pinning.pin(
            told.tenant, namespace, self._keys, 0, count, keep.until_ns - now_ns, Tier.DRAM,
            refresh=False, owner=f"program:{keep.program}",
        )  # fmt: skip

    def _make_way(self, told: _Told, keep: Keep, short: Pinned, now_ns: int) -> bool:
        """Drop the pins of programs that came after this one, the last one first, until the rest should fit."""
        namespace = self._namespace(told.tenant, keep.chain)
        assert namespace is not None, "it was pinned in"
        missing = (keep.chain.length - short.blocks) * namespace.slot_bytes
        most = 1 if short.partial == Partial.TOO_MANY else DROPS_AT_ONCE
        before = self._pinning.used_bytes(told.tenant)
        dropped = 0
        programs = told.guide.programs
        for name in programs.drop_order(now_ns):
            freed = before - self._pinning.used_bytes(told.tenant)
            if name == keep.program or freed >= missing or dropped == most:
                break
            pin = told.pins.pop(name, None)
            programs.dropped(name)
            told.settle(name)
            if pin is not None:
                self._unpin(told, [pin.pin])
                dropped += 1
        self.tally.gave_way += dropped
        return dropped > 0

    def _let_go(self, told: _Told, deed: LetGo) -> None:
        told.settle(deed.program)
        pin = told.pins.pop(deed.program, None)
        if pin is not None:
            self._unpin(told, [pin.pin])
        fetch = told.fetches.pop(deed.program, 0)
        if fetch:
            self._prefetching.cancel(told.tenant, [fetch])

    def _unpin(self, told: _Told, numbers: Sequence[int]) -> int:
        return self._pinning.unpin(told.tenant, [number for number in numbers if number])

    def _fetch(self, told: _Told, fetch: Fetch, now_ns: int) -> None:
        namespace = self._namespace(told.tenant, fetch.chain)
        if namespace is None:
            return
        count = self._put_keys(fetch.chain)
        within_ns = min(max(fetch.by_ns - now_ns, FETCH_NS_MIN), PREFETCH_NS_MAX)
        begun = self._prefetching.prefetch(told.tenant, namespace, self._keys, 0, count, within_ns, Tier.HBM)
        self.tally.fetches += 1
        if not fetch.program or (begun.coming and not begun.prefetch):  # there are too many: the former one stays
            return
        former = told.fetches.pop(fetch.program, 0)  # it may be this one: then the program has asked for it twice
        if former:
            self._prefetching.cancel(told.tenant, [former])
        if begun.prefetch:
            told.fetches[fetch.program] = begun.prefetch

    def _put_keys(self, chain: Chain) -> int:
        """Into the buffer, as many as a frame may hold: no hint names more. Returns how many."""
        count = min(chain.length, KEYS_PER_FRAME)
        self._keys[: _WORDS * count] = np.frombuffer(chain.keys, np.uint64, _WORDS * count)
        return count

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """One tenant's turn, if anybody's time has come."""
        if self._next_ns is None or now_ns < self._next_ns:
            return
        for _ in range(len(self._turns)):
            told = self._turns[0]
            self._turns.rotate(-1)
            if told.next_ns() <= now_ns:
                self._take_turn(told, now_ns)
                break
        self._next_ns = min((told.next_ns() for told in self._turns), default=None)

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once; None if nobody has said anything."""
        return self._next_ns

    def _take_turn(self, told: _Told, now_ns: int) -> None:
        if now_ns >= told.look_ns:
            self._look(told, now_ns)
        if told.ending:
            self._end(told, now_ns)
            return
        self._do(told, told.guide.due(now_ns, DUE_AT_ONCE), now_ns)
        for program in told.again.due(now_ns, AGAIN_AT_ONCE):
            self._keep(told, told.short[program][0], now_ns, told.short[program][1])
        errand = told.guide.errand(now_ns)
        if errand is not None:
            self._do(told, (errand,), now_ns)

    def _look(self, told: _Told, now_ns: int) -> None:
        """Has it a session? It is told by looking every minute, so that no session has to tell."""
        told.look_ns = now_ns + LOOK_S * SECOND_NS
        if told.tenant.sessions:
            told.absent_ns = None
        elif told.absent_ns is None:
            told.absent_ns = now_ns
        told.ending = told.absent_ns is not None and now_ns - told.absent_ns >= ABSENT_S * SECOND_NS

    def _end(self, told: _Told, now_ns: int) -> None:
        """Forget the tenant a few programs and runs at a time; then the rest."""
        guide = told.guide
        self._do(told, guide.forget(DUE_AT_ONCE), now_ns)
        if not len(guide.programs) and not len(guide.workflows):
            self._turns.remove(told)
            del self._told[told.tenant]
            if guide.gaps.known:
                self._taught[told.tenant] = guide.gaps
            else:
                self._registry.unheard(told.tenant)

    def _forget(self, tenant: Tenant) -> None:
        """Another one takes the place of a tenant that never had a block: nothing was pinned or fetched for it."""
        self._taught.pop(tenant, None)
        told = self._told.pop(tenant, None)
        if told is not None:
            self._turns.remove(told)

    # -- what was learned ----------------------------------------------------------------------------------------

    def export(self, tenant: Tenant) -> bytes:
        """How long a tenant's tools take, as far as it was learned: up to 220 KB. See `hints/gaps.py` for the form."""
        told = self._told.get(tenant)
        gaps = self._taught.get(tenant) if told is None else told.guide.gaps
        return b"" if gaps is None else gaps.to_bytes()

    def lessons(self, tenant: Tenant) -> int:
        """How much was learned of its tools so far: as long as that stays, `export` says the same."""
        told = self._told.get(tenant)
        gaps = self._taught.get(tenant) if told is None else told.guide.gaps
        return 0 if gaps is None else gaps.lessons

    def take_over(self, name: str, written: bytes) -> Refused | None:
        """What `export` gave in a former life, for a tenant that has said nothing yet in this one; a refusal, and
        nothing is changed, if it is not that, or there is no place for the tenant.
        """
        gaps = Gaps.from_bytes(written)
        if isinstance(gaps, Refused):
            return gaps
        tenant = self._registry.heard_before(name)
        if tenant is None:
            return Refused(Refusal.UNKNOWN, shown(name))
        if tenant not in self._told:
            self._registry.heard(tenant)
            self._taught[tenant] = gaps
        return None

    # -- how it stands -------------------------------------------------------------------------------------------

    def report(self, tenant: Tenant | None = None) -> GuidingReport:
        """Of one tenant or of all: the latest programs and runs, as many as can be listed within a millisecond."""
        some = [told for told in self._told.values() if tenant in (None, told.tenant)]
        counters = HintCounters(*astuple(self.tally))
        return report_of([(told.tenant.name, told.guide, told.pins) for told in some], self._clock.now_ns(), counters)
