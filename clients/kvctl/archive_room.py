"""How much an import may store without anything having to leave, and what is asked beyond that.

An import goes through memory, so it is memory that must be free, however much room there is on disk; where there is a
disk it is made durable too, and there as well. What an archive says of itself decides when somebody is asked, and
nothing else: what is really stored is counted, in slots, arenas and segments as the daemon gives them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from rich.text import Text

from kvctl.asking import ask, concerned, need_terminal
from kvctl.client import ControlClient, Exit, KvctlError
from kvctl.render import size
from kvproto import control_pb2 as pb
from kvproto.limits import MIB, PAGE_BYTES, slot_bytes_for

if TYPE_CHECKING:
    from kvproto.archive import Reader

LOOK_BYTES: Final = 256 * MIB  # stored, until it is looked again: others store, too
Pool: TypeAlias = tuple[str, int]  # a tenant's blocks of one slot size, which share arenas
Needs: TypeAlias = Mapping[Pool, int]  # blocks


@dataclass(frozen=True, slots=True)
class Free:
    """What is free of one tier, in units that change hands whole: arenas, or segments."""

    unit_bytes: int  # 0: not told, and a unit is a byte
    units: int  # nobody's, or without any block
    left: Mapping[str, int]  # of a tenant that may not have more: so many units
    slots: Mapping[Pool, int] = field(default_factory=dict)  # in units that a pool has already
    head_bytes: int = 0  # of a unit, and of each of its slots

    def has(self, needs: Needs) -> bool:
        """Room for all of these?"""
        wanted = Counter[str]()
        for pool, blocks in needs.items():
            wanted[pool[0]] += self._units(pool, blocks)
        within = all(units <= self.left.get(tenant, units) for tenant, units in wanted.items())
        return within and wanted.total() <= self.units

    def bytes(self, tenants: Collection[str]) -> int:
        """Free for these tenants together."""
        mine = [self.left.get(tenant, self.units) for tenant in set(tenants)]
        own = sum(slots * slot_bytes for (tenant, slot_bytes), slots in self.slots.items() if tenant in tenants)
        return min(self.units, sum(mine)) * (self.unit_bytes or 1) + own

    def _units(self, pool: Pool, blocks: int) -> int:
        blocks = max(0, blocks - self.slots.get(pool, 0))
        slot_bytes = pool[1] + self.head_bytes
        if not self.unit_bytes:
            return blocks * slot_bytes
        each = (self.unit_bytes - self.head_bytes) // slot_bytes
        return -(-blocks // each) if each else blocks  # larger than a unit: refused, whatever is free


@dataclass(frozen=True, slots=True)
class Room:
    """As of one moment."""

    dram: Free
    disk: Free | None

    def has(self, needs: Needs) -> bool:
        """May all of these come without anything else going?"""
        return self.dram.has(needs) and (self.disk is None or self.disk.has(needs))

    def short(self, needs: Needs, *, would: str) -> str:
        """What is free, and what becomes of what has to make way."""
        tenants = {tenant for tenant, _ in needs}
        free, lost = size(self.dram.bytes(tenants)), ""
        if self.disk is not None:
            lost = ": what of it is on disk too stays there, the rest is gone"
        text = f"{free} are free, and for the rest what is there {would} evicted{lost}"
        if self.disk is None or self.disk.has(needs):
            return text
        gone = f"on disk {size(self.disk.bytes(tenants))} are free, and for the rest what is there {would} evicted"
        return gone if self.dram.has(needs) else f"{text}; {gone}"


def room_of(client: ControlClient) -> Room:
    """As far as we are told. Raises KvctlError."""
    tenants = list(client.tenants().tenants)
    try:
        status = client.status()
    except KvctlError:  # for those who act; others know what is guaranteed to them
        left = {one.name: _promised(one) for one in tenants}
        return Room(Free(0, sum(left.values()), left), None)
    tiers = {one.name: one for one in status.tiers}
    dram = _dram(tiers["dram"], tenants, client)
    if "disk" not in tiers or status.disk.state == "off":
        return Room(dram, None)
    return Room(dram, _disk(tiers["disk"], tenants, serving=status.disk.state == "serving"))


def held(client: ControlClient, tenant: str | None) -> str:
    """Pins and leases that are there: what they hold stays. Nothing to those who may not see it."""
    try:
        return f"\n{concerned(client, tenant)}; what they hold stays"
    except KvctlError:
        return ""


def _promised(tenant: pb.Tenant) -> int:
    return max(0, tenant.dram_guaranteed_bytes - (tenant.assigned_bytes if tenant.used_bytes else 0))


def _dram(tier: pb.Tier, tenants: Collection[pb.Tenant], client: ControlClient) -> Free:
    unit = tier.arena_bytes
    units = (tier.capacity_bytes - tier.assigned_bytes - tier.stale_bytes) // unit
    sizes: dict[str, set[int]] = {}
    for namespace in client.namespaces().namespaces:
        if namespace.blocks:
            sizes.setdefault(namespace.tenant, set()).add(namespace.slot_bytes)
    left, slots = {}, {}
    for one in tenants:
        has = one.assigned_bytes // unit
        if not one.used_bytes:  # its arenas are empty, and go to whoever wants them
            units, has = units + has, 0
        if one.HasField("dram_max_bytes"):
            left[one.name] = max(0, (one.dram_max_bytes - one.stale_bytes) // unit - has)
        of_it = sizes.get(one.name, set())
        if has and len(of_it) == 1:  # of several nobody says which of its arenas are whose
            (slot_bytes,) = of_it
            slots[one.name, slot_bytes] = max(0, has * (unit // slot_bytes) - one.used_bytes // slot_bytes)
    return Free(unit, max(0, units), left, slots)


def _disk(tier: pb.Tier, tenants: Collection[pb.Tenant], *, serving: bool) -> Free:
    """In whole segments: who has free places in those that are there is not told."""
    unit, empty = tier.arena_bytes, not tier.used_bytes
    units = (tier.capacity_bytes - (0 if empty else tier.assigned_bytes)) // unit
    left = {
        one.name: max(0, one.disk_max_bytes - (0 if empty else one.disk_assigned_bytes)) // unit
        for one in tenants
        if one.HasField("disk_max_bytes")
    }
    return Free(unit, units if serving else 0, left, head_bytes=PAGE_BYTES)


class Gate:
    """Before blocks are stored: lets them pass while there is room, and asks once where there is none."""

    def __init__(
        self, client: ControlClient, room: Room, reader: "Reader", tenant: str | None, over: Callable[[], None]
    ) -> None:
        """`over`: ends a line of progress."""
        self._client = client
        self._room = room
        self._reader = reader
        self._tenant = tenant
        self._over = over
        self._begun = self._agreed = False
        self._before = Counter[Pool]()  # stored by when the room was looked at

    def __call__(self, stored: Counter[Pool], pool: Pool, blocks: int) -> None:
        """So many more of `pool`, beside what was stored. Raises KvctlError where they must not be."""
        if self._agreed:
            return
        if not self._begun:
            self._begun = True
            self._begin(pool[0])
        elif not self._passes(stored, pool, blocks):
            self._look(stored)  # something may have gone meanwhile
            if not self._passes(stored, pool, blocks):
                self._stop(stored, pool, blocks)

    def _begin(self, tenant: str) -> None:
        """By what the archive says of itself, as if all of it were the first tenant's, in blocks of one size."""
        blocks, planned_bytes = self._reader.planned_blocks, self._reader.planned_bytes
        needs = {(tenant, slot_bytes_for(max(1, -(-planned_bytes // max(1, blocks))))): blocks}
        if self._room.has(needs):
            return
        need_terminal("import more than there is room for", yes=False, dry_run=False)
        text = f"the archive has {blocks:,} blocks, {size(planned_bytes)}; "
        text += self._room.short(needs, would="is") + held(self._client, self._tenant)
        ask("Import it?", "nothing was imported; answer y, or give --yes, to import", Text(text), client=self._client)
        self._agreed = True

    def _passes(self, stored: Counter[Pool], pool: Pool, blocks: int) -> bool:
        needs = stored - self._before
        if sum(count * slot_bytes for (_, slot_bytes), count in needs.items()) >= LOOK_BYTES:
            self._look(stored)
            needs = Counter()
        needs[pool] += blocks
        return self._room.has(needs)

    def _look(self, stored: Counter[Pool]) -> None:
        self._room, self._before = room_of(self._client), stored.copy()

    def _stop(self, stored: Counter[Pool], pool: Pool, blocks: int) -> None:
        self._over()
        so_far = f"{stored.total():,} blocks are stored"
        text = f"{so_far}; for more {self._room.short({pool: blocks}, would='is')}"
        if not sys.stdin.isatty():
            raise KvctlError(Exit.REFUSED, f"{text}; there is no terminal to ask on; give --yes to go on")
        text += held(self._client, self._tenant)
        ask("Go on?", f"{so_far}, and no more; answer y, or give --yes, to go on", Text(text), client=self._client)
        self._agreed = True
