"""The tiers on all GPUs, as the rest of the store knows them: what MATCH counts, what pins and hints want there.

    lift (PREFETCH and pins with tier HBM, hints)  -->  queue  -- tick, a chain a turn -->  hold --> carry --> copied up
    keep, let_go (pins)                            -->  copies that their own tenant's loads do not push out
    settle (LOAD, of a GPU)                        -->  which of several GPUs a namespace's blocks belong on
    a copy would be evicted, or its block is missed, and DRAM has evicted that block  -- tick -->  lower: stored anew

A copy outlives its block in DRAM. What is still in DRAM, or on disk, is written nowhere: the copy goes. Of what was
evicted from all of them the copy is the last there is (`is_alone`), and goes back into DRAM as an ordinary store: when
it would be evicted itself, or when somebody asks for the block, who is told of a miss, and then that it is pending.
Which blocks were evicted and which dropped nobody says here, so after a drop of anything, by anyone, copies of before
are of use only as long as their blocks are in the table: what was deleted never comes back.

Owner thread; no device in here: `HbmVerbs` carries out what is lifted and lowered. Without a GPU it does nothing. A pin
of this tier is one of DRAM as well: its blocks stay there, so that a GPU that is lost costs time and nothing else.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvproto.limits import KEY_BYTES
from kvstore import blocks
from kvstore.blocks import U4, U8, Tables
from kvstore.moving import Held
from kvstore.ports import Clock
from kvstore.quotas import Quotas
from kvstore.sessions import Namespace, Tenant
from kvstore.sweeps import Jobs
from kvstore.tier.hbm import Copy, Hbm, Key, Name

LIFTS: Final = 64  # chains that wait to be copied up, 32 KiB each at most; those beyond are not wanted enough
LIFTS_EACH: Final = 16  # of one tenant
CARRIES: Final = 2  # parts of chains that are copied up to one GPU at a time: every LOAD there takes turns with each
LIFT_BLOCKS: Final = 128  # of a chain in one tick: half a millisecond
LOWERS: Final = 256  # blocks that wait to be stored anew; those beyond are given up
_WORDS: Final = KEY_BYTES // 8
_STALE: Final = -1  # an epoch that never is
_THERE: Final = (blocks.RESIDENT, blocks.KEPT, blocks.DISK, blocks.LOADING)

Carry = Callable[[Hbm, Namespace, Held], None]
Lower = Callable[[Hbm, Sequence[Copy]], None]
Hold = Callable[[Namespace, U8, int, int], Held]


@dataclass(slots=True, eq=False)
class _Pin:
    """What one pin wants on a GPU."""

    hbm: Hbm
    tenant: Tenant
    keys: list[Key]  # each once
    slot_bytes: int


@dataclass(slots=True, eq=False)
class _Lift:
    """A chain that is wanted on a GPU, from block `next` on."""

    namespace: Namespace
    keys: U8
    next: int = 0


class HbmTiers:
    """All of them."""

    def __init__(self, tables: Tables, clock: Clock, quotas: Quotas, hold: Hold, jobs: Jobs) -> None:
        """`hold` keeps in DRAM what is there of a chain (`Moving.hold`); `jobs` drop blocks."""
        self.tiers: list[Hbm] = []
        self.carry: Carry | None = None  # copies blocks up, gives the hold back, and says `carried`
        self.lower: Lower | None = None  # stores a run of copies in DRAM, and says `lowered`
        self.not_lifted = 0  # chains, since the start
        self.lowered_blocks = 0
        self._tables = tables
        self._clock = clock
        self._quotas = quotas
        self._hold = hold
        self._jobs = jobs
        self._lowers: deque[tuple[Hbm, list[Copy]]] = deque()  # runs, their copies held
        self._lowering = 0  # copies in them, and in those under way
        self._ever: list[Hbm] = []
        self._of: dict[Namespace, Hbm] = {}
        self._lifts: deque[_Lift] = deque()
        self._carrying: Counter[Hbm] = Counter()
        self._pins: dict[int, _Pin] = {}
        self._pinned: Counter[tuple[Hbm, Tenant]] = Counter()  # bytes of slots

    def join(self, hbm: Hbm) -> None:
        """There is one more."""
        hbm.clock = self._clock.now_ns
        hbm.generations = np.zeros(self._tables.blocks.size, dtype=np.uint64)  # untouched pages cost nothing
        hbm.leaving = lambda copy: self._leaves(hbm, copy)
        self._quotas.share_hbm(hbm.shares)
        self.tiers.append(hbm)
        self._ever.append(hbm)

    def lose(self, hbm: Hbm) -> None:
        """Its GPU works no more: nothing of it is found from now on."""
        if hbm not in self.tiers:
            return
        self.tiers.remove(hbm)
        self._of = {namespace: one for namespace, one in self._of.items() if one is not hbm}
        for number in [number for number, pin in self._pins.items() if pin.hbm is hbm]:
            self.let_go(number)

    def settle(self, namespace: Namespace, hbm: Hbm) -> None:
        """Its engine has memory on that GPU."""
        if hbm in self.tiers:
            self._of[namespace] = hbm

    def of(self, namespace: Namespace) -> Hbm | None:
        """Where this namespace's blocks belong; None: there is no such tier."""
        if not self.tiers:
            return None
        return self._of.get(namespace, self.tiers[0])

    def forget_namespace(self, namespace: Namespace) -> None:
        """Its number goes to another."""
        self._of.pop(namespace, None)
        for hbm in self.tiers:
            hbm.forget_namespace(namespace)
        self._lifts = deque(lift for lift in self._lifts if lift.namespace is not namespace)

    # -- looking -------------------------------------------------------------------------------------------------

    def above(self, rows: U4) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which of these blocks have a whole copy on some GPU?"""
        found = np.zeros(rows.size, dtype=np.bool_)
        if self.tiers and rows.size:
            generations = self._tables.blocks["generation"][rows]
            for hbm in self.tiers:
                found |= hbm.whole(rows, generations)
        return found

    def used_bytes(self, tenant: Tenant) -> int:
        """Of slots with copies, on all GPUs."""
        return sum(hbm.used_bytes(tenant) for hbm in self.tiers)

    def assigned_bytes(self, tenant: Tenant) -> int:
        """Of its arenas, on all GPUs."""
        return sum(hbm.held(tenant) * hbm.arena_bytes for hbm in self.tiers)

    def pinned_bytes(self, tenant: Tenant) -> int:
        """Of slots that pins want there, each once a GPU, copied already or not."""
        return sum(self._pinned[hbm, tenant] for hbm in self.tiers)

    def hit_bytes(self, tenant: Tenant) -> int:
        """Of blocks that were loaded from there since the start."""
        return sum(hbm.hit_bytes[tenant] for hbm in self._ever)

    # -- pins ----------------------------------------------------------------------------------------------------

    def pin_budget_bytes(self, tenant: Tenant) -> int:
        """What a tenant's pins may want of each GPU: its pin share of what is guaranteed to it there."""
        if not self.tiers:
            return 0
        hbm = self.tiers[0]
        return int(tenant.quota.pin_share * hbm.shares.guaranteed(tenant) * hbm.arena_bytes)

    def affordable(self, namespace: Namespace, rows: U4) -> int:
        """How many of these blocks, from the first on, a pin may want there; all of them where there is no tier."""
        hbm = self.of(namespace)
        if hbm is None:
            return int(rows.size)
        tenant = namespace.tenant
        room = self.pin_budget_bytes(tenant) - self._pinned[hbm, tenant]
        for count, key in enumerate(self._keys(rows)):
            room -= 0 if hbm.wanted(key) else namespace.slot_bytes
            if room < 0:
                return count
        return int(rows.size)

    def keep(self, number: int, namespace: Namespace, rows: U4) -> None:
        """A pin wants these there, from now on; they are held in DRAM meanwhile, so their rows are theirs."""
        hbm = self.of(namespace)
        if hbm is None:
            return
        keys = list(dict.fromkeys(self._keys(rows)))
        paid_bytes = namespace.slot_bytes * sum(not hbm.wanted(key) for key in keys)
        self._pins[number] = _Pin(hbm, namespace.tenant, keys, namespace.slot_bytes)
        self._pinned[hbm, namespace.tenant] += paid_bytes
        hbm.keep(keys)

    def let_go(self, number: int) -> None:
        """A pin is over, if it was one of this tier."""
        pin = self._pins.pop(number, None)
        if pin is not None:
            pin.hbm.let_go(pin.keys)
            freed = sum(not pin.hbm.wanted(key) for key in pin.keys)
            self._pinned[pin.hbm, pin.tenant] -= freed * pin.slot_bytes

    def shorten(self, number: int, namespace: Namespace, rows: U4) -> None:
        """A pin covers only these from now on."""
        if number in self._pins:
            self.let_go(number)
            self.keep(number, namespace, rows)

    def _keys(self, rows: U4) -> Sequence[Key]:
        generations = self._tables.blocks["generation"][rows]
        return list(zip(rows.tolist(), generations.tolist(), strict=True))

    # -- lifting -------------------------------------------------------------------------------------------------

    def lift(self, namespace: Namespace, keys: U8, at: int, count: int) -> None:
        """Have what lies in DRAM of this chain copied up, soon."""
        if not self.tiers or self.carry is None or not count:
            return
        mine = sum(lift.namespace.tenant is namespace.tenant for lift in self._lifts)
        if len(self._lifts) >= LIFTS or mine >= LIFTS_EACH:
            self.not_lifted += 1
            return
        self._lifts.append(_Lift(namespace, keys[at : at + _WORDS * count].copy()))

    def tick(self) -> None:
        """A part of the chain that waits longest, and one run that goes back."""
        if self._lowers and self.lower is not None:
            self.lower(*self._lowers.popleft())
        lift = self._next_lift()
        if lift is None:
            return
        count = min(LIFT_BLOCKS, lift.keys.size // _WORDS - lift.next)
        hbm, at = self.of(lift.namespace), _WORDS * lift.next
        lift.next += count
        if _WORDS * lift.next >= lift.keys.size:
            self._lifts.remove(lift)
        if hbm is not None and self.carry is not None:
            self._carrying[hbm] += 1
            self.carry(hbm, lift.namespace, self._hold(lift.namespace, lift.keys, at, count))

    def _next_lift(self) -> _Lift | None:
        """The one that waits longest for a GPU that is not busy with others."""
        for lift in self._lifts:
            hbm = self.of(lift.namespace)
            if hbm is None or self._carrying[hbm] < CARRIES:
                return lift
        return None

    def carried(self, hbm: Hbm) -> None:
        """A part of a chain is there, or never will be."""
        self._carrying[hbm] -= 1

    def next_ns(self) -> int | None:
        """When `tick` has something to do, 0 for at once."""
        return 0 if self._lowers or self._next_lift() is not None else None

    # -- lowering ------------------------------------------------------------------------------------------------

    def call(self, hbm: Hbm, copies: Sequence[Copy], namespace: Namespace) -> None:
        """Copies are whole, and their blocks still held in DRAM: note what they are. Some 2 us each.

        What was dropped while it was being copied up stays without a name.
        """
        table = self._tables.blocks
        rows = np.array([copy.row for copy in copies], dtype=np.uint32)
        there = np.isin(table["state"][rows], _THERE)
        if not there.all():
            copies, rows = [copy for copy, one in zip(copies, there.tolist(), strict=True) if one], rows[there]
        parents, checksums = table["parent"][rows], table["checksum"][rows].tolist()
        keys, before = table["key"][rows].tobytes(), table["key"][parents].tobytes()
        epoch = _STALE if self._jobs.queued else self._epoch
        for number, (copy, parent) in enumerate(zip(copies, parents.tolist(), strict=True)):
            mine = slice(KEY_BYTES * number, KEY_BYTES * (number + 1))
            hbm.call(copy, Name(namespace, keys[mine], before[mine] if parent else None, checksums[number], epoch))

    @property
    def _epoch(self) -> int:
        """The same as long as nothing is dropped that was all there: of what never was there are no copies."""
        return self._jobs.begun - self._jobs.never_whole

    def is_alone(self, copy: Copy) -> bool:
        """Was its block evicted from wherever else it was, and not dropped? No is right in any doubt."""
        name, row = copy.name, self._tables.blocks[copy.row]
        if name is None or name.epoch != self._epoch or self._jobs.queued:
            return False
        if not any(hbm.called(name.namespace, name.key) is copy for hbm in self.tiers):
            return False  # there is a newer one, or the namespace's number is another's
        if int(row["generation"]) == copy.generation and int(row["state"]) in _THERE:
            return False
        unused_s = name.namespace.tenant.quota.unused_ttl_s
        return unused_s is None or self._clock.now_ns() - copy.used_ns < unused_s * 1e9

    def missed(self, namespace: Namespace, keys: U8, at: int, count: int, found: int) -> None:
        """A chain was asked for, and its first `found` blocks are here: bring back what copies are left of."""
        if not any(hbm.has_names for hbm in self.tiers):
            return
        hbm = self.of(namespace)
        for index in range(found, count) if hbm is not None else ():
            key = keys[at + _WORDS * index : at + _WORDS * (index + 1)].tobytes()
            assert hbm is not None, "or there is nothing to look at"
            copy = hbm.called(namespace, key)
            if copy is None or copy.users or not self._leaves(hbm, copy):
                return

    def _leaves(self, hbm: Hbm, copy: Copy) -> bool:
        """Take hold of the last copy of a block, which is to be stored in DRAM; whether it is that."""
        if self.lower is None or self._lowering >= LOWERS or not self.is_alone(copy):
            return False
        if hbm.find(*copy.key) is None:
            return False
        self._lowering += 1
        last = self._lowers[-1] if self._lowers else None
        if last is not None and last[0] is hbm and _follows(last[1][-1], copy):
            last[1].append(copy)
        else:
            self._lowers.append((hbm, [copy]))
        return True

    def lowered(self, hbm: Hbm, copies: Sequence[Copy], stored: int) -> None:
        """A run was stored in DRAM, so many blocks of it; the rest cannot be. Neither needs its copy any more."""
        self.lowered_blocks += stored
        self._lowering -= len(copies)
        for copy in copies:
            hbm.release(copy)
            hbm.forget(copy)


def _follows(before: Copy, copy: Copy) -> bool:
    one, two = before.name, copy.name
    return one is not None and two is not None and one.namespace is two.namespace and two.parent == one.key
