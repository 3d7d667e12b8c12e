"""A warm restart: the tables and arenas of a former life, looked over and put to use again. Owner thread.

    find_former   are they all there, of this format and geometry?      else: cold, and why
    take_over     who is who (journal) -> arenas back in their places -> rows that are whole -> slots that somebody may
                  still be reading are withheld -> index, tree and lists anew

Nothing of the former life is believed but rows whose seal is right; links between rows, lists and counts are made
anew. So it does not matter where the former life ended; a successor that dies on the way may cost another one blocks,
and nothing else. What is kept is KEPT: verified before it is served, on demand or in the background.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvproto.errors import KvError
from kvproto.identity import NamespaceIdentity
from kvproto.limits import LEASE_MARGIN_NS, LEASE_TTL_NS_MAX, NAMESPACES, TENANTS
from kvproto.sizes import format_bytes
from kvstore import blocks
from kvstore.arenas import GIVEN_UP, Arenas
from kvstore.blocks import ARENA, BLOCK, U4, U8, Rows, Tables
from kvstore.ghosts import keep_ghosts
from kvstore.journal import JOURNAL_BYTES, Record, read_journal
from kvstore.ports import Bytes, FormerMemory, Processes
from kvstore.quotas import choice_of_record
from kvstore.registry import Registry
from kvstore.rules import Chosen, Rule, Tier
from kvstore.sessions import Process, Tenant
from kvstore.tables import Limits, former_rows, lasting_tables
from kvstore.writers import NOBODY, WRITERS, Writers, writers_bytes

FORMAT = 2  # of rows, seals and journal; another one starts cold
WRITTEN_FORMAT = 3  # the same, and clients may be writing into slots: who does not know of that starts cold
_UNDONE = (blocks.WRITING, blocks.DOOMED)


@dataclass(frozen=True, slots=True)
class Former:
    """What a former life left behind, copied before its tables are used again."""

    arenas: Rows
    unused: int
    generation: int
    turn: int  # evictions
    records: Sequence[Record]


@dataclass(slots=True)
class Kept:
    """How a life began, for status."""

    warm: bool = False
    reason: str = "nothing was kept"  # why it began cold
    blocks: int = 0  # kept
    lost: int = 0  # in the tables, and not whole or without what they continue
    withheld: int = 0  # slots that somebody may still be reading
    pins: int = 0  # gone on with
    pins_lost: int = 0  # their blocks are not there any more, or their tenant's budget is smaller
    faults: list[str] = field(default_factory=list)  # what of the rest is learned anew, and why


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Kept rows that could not be settled before the disk is open: `cut` of them continue the blocks of `keys`."""

    rows: U4
    cut: U4
    keys: U8  # four words each


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of it."""

    kept: Kept
    left: LeftOver
    withheld: list[tuple[list[int], int]]  # rows that leases of the former life may still cover, and until when


def journal_head(limits: Limits, *, written: bool = False) -> Record:
    """What a successor must have in common with its predecessor to go on with its tables.

    `written`: clients in mode direct may be writing into slots.
    """
    disk, kind = limits.disk, WRITTEN_FORMAT if written else FORMAT
    return ["store", kind, limits.dram_bytes, limits.arena_bytes, disk.disk_bytes, disk.segment_bytes]


def find_former(limits: Limits, memory: FormerMemory | None) -> tuple[Former | None, str]:
    """The former life, or None and why there is none to go on with: what it kept is then given up."""
    if memory is None:
        return None, "nothing was kept"
    former, why_cold = _look_over(limits, memory)
    if former is not None:
        former, why_cold = _with_places_for_all(limits, former)
    if former is None:
        memory.drop_kept()
    return former, why_cold


def _look_over(limits: Limits, memory: FormerMemory) -> tuple[Former | None, str]:
    sizes = lasting_tables(limits) | {"journal": JOURNAL_BYTES}
    tables = {name: memory.kept_table(name) for name in sizes}
    if all(table is None for table in tables.values()):
        return None, "nothing was kept"
    for name, table in tables.items():
        if table is None:
            return None, f"table {name} was not kept"
        if table.size != sizes[name]:
            return None, _what_changed(limits, tables["journal"]) or (
                f"table {name} has another size: of another version, or the configuration has changed"
            )
    journal, book, arenas = tables["journal"], tables["book"], tables["arenas"]
    assert journal is not None, "looked at above"
    assert book is not None, "looked at above"
    assert arenas is not None, "looked at above"
    records = read_journal(journal)
    if not records or records[0] not in (journal_head(limits), journal_head(limits, written=True)):
        return None, _what_changed(limits, journal) or "it was left by another version or configuration"
    if records[0] == journal_head(limits, written=True):
        writers = memory.kept_table(WRITERS)
        if writers is None or writers.size != writers_bytes(limits):
            return None, f"table {WRITERS} was not kept: who may be writing into memory is unknown"
    words = book.view(np.uint64)
    rows = sizes["blocks"] // BLOCK.itemsize
    unused = min(former_rows(words), rows)
    return Former(
        arenas.view(ARENA).copy(), unused, int(words[blocks.GENERATION]), int(words[blocks.TURN]), records[1:]
    ), ""


def _what_changed(limits: Limits, journal: Bytes | None) -> str:
    """Which setting is another one, where a journal of this format says so; else empty."""
    records = read_journal(journal) if journal is not None and journal.size == JOURNAL_BYTES else []
    now = journal_head(limits)
    if not records or len(records[0]) != len(now) or records[0][0] != now[0]:
        return ""
    if records[0][1] not in (FORMAT, WRITTEN_FORMAT):
        return ""
    settings = ("dram.size", "dram.arena", "disk.size", "disk.segment")
    changed = [
        f"{setting} was {_size(was)} and is {_size(size)} now"
        for setting, was, size in zip(settings, records[0][2:], now[2:], strict=True)
        if was != size
    ]
    return ", ".join(changed)


def _size(recorded: object) -> str:
    """As the configuration writes it."""
    size_bytes = int(str(recorded))
    return format_bytes(size_bytes) if size_bytes else "nothing"


def _with_places_for_all(limits: Limits, former: Former) -> tuple[Former | None, str]:
    """None if those who have pools and those who are configured now are too many: to leave one of the former out would
    give the pools of all others other numbers, and who is configured has a place.
    """
    names = {str(record[1]) for record in former.records if len(record) > 1 and record[0] == "pool"}
    names.update(limits.tenants, limits.quotas)
    if len(names) > TENANTS:
        return None, f"{len(names)} tenants had something or are configured now, and there are places for {TENANTS}"
    return former, ""


def take_over(
    tables: Tables, arenas: Arenas, registry: Registry, writers: Writers, former: Former, memory: FormerMemory,
    processes: Processes, now_ns: int,
) -> Taken:  # fmt: skip
    """Put what a former life left to use. Before anybody is served."""
    return _TakeOver(tables, arenas, registry, writers, former, memory, processes, now_ns).run()


class _TakeOver:
    def __init__(
        self, tables: Tables, arenas: Arenas, registry: Registry, writers: Writers, former: Former,
        memory: FormerMemory, processes: Processes, now_ns: int,
    ) -> None:  # fmt: skip
        self._tables = tables
        self._arenas = arenas
        self._registry = registry
        self._writers = writers
        self._former = former
        self._memory = memory
        self._processes = processes
        self._now_ns = now_ns
        self._key = np.zeros(4, dtype=np.uint64)
        self._kept = Kept(warm=True, reason="")

    def run(self) -> Taken:
        tables, former = self._tables, self._former
        for record in former.records:  # rules begin with a look at all rows: not at these, which may be torn
            self._know(record)
        self._registry.settle()
        tables.book[blocks.UNUSED_ROW] = former.unused
        tables.book[blocks.TURN] = former.turn
        slots_of = self._take_arenas()
        pool_of = np.zeros(NAMESPACES, dtype=np.uint32)
        for namespace in self._registry.namespaces.values():
            pool_of[namespace.number] = namespace.pool.number + 1
        shift = int(tables.book[blocks.SHIFT])
        rows: U4 = np.zeros(former.unused, dtype=np.uint32)
        end = blocks.keep_rows(tables, 1, former.unused, pool_of, slots_of, shift, rows, 0)
        rows = rows[:end]
        gone, cut, keys = self._without_parents(rows)
        withheld = self._withhold(pool_of, slots_of, shift)  # looks at parents for the last time
        self._withhold_written(pool_of, slots_of, shift)
        tables.blocks["parent"][gone] = 0
        tables.blocks["writer"][gone] = blocks.BROKEN
        blocks.link_free(tables, former.unused)
        queues = tables.blocks["queue"][: former.unused]  # of free rows, which DENSITY must not take for blocks
        queues[tables.blocks["state"][: former.unused] == blocks.FREE] = blocks.NO_QUEUE
        for position in np.flatnonzero(slots_of).tolist():
            blocks.free_slots(tables, position, int(slots_of[position]))
        damaged = keep_ghosts(tables, self._arenas.by_number.keys())
        if damaged:
            self._kept.faults.append(f"ghosts: {damaged} are of no pool, or damaged")
        left = self._settle(rows)
        self._kept.withheld = sum(len(chain) for chain, _ in withheld) + self._writers.stranded
        return Taken(self._kept, LeftOver(left, cut, keys), withheld)

    def _know(self, record: Record) -> None:
        """A tenant, pool, namespace or choice of a rule or quota, or if the disk was known, as the journal says it.
        Numbers come out as they were. Of another kind, from another version: nothing.
        """
        registry = self._registry
        try:
            kind, *rest = record
            if kind == "tenant":
                registry.restore_tenant(str(rest[0]), [int(word) for word in rest[1:]])
            elif kind == "pool":
                tenant = registry.known_tenant(str(rest[0]))
                if tenant is not None:
                    registry.pool(tenant, int(rest[1]))
            elif kind == "namespace":
                tenant = registry.known_tenant(str(rest[1]))
                identity = NamespaceIdentity.from_canonical(bytes.fromhex(str(rest[2])))
                if tenant is not None:
                    registry.restore_namespace(tenant, identity, int(rest[0]))
            elif kind == "rule":
                tier, name, rule = map(str, rest[:3])
                if rule:
                    registry.choose_rule(Chosen(Tier(tier), name or None, Rule(rule)))
                else:
                    registry.reset_rule(Tier(tier), name or None)
            elif kind == "quota":
                registry.restore_quota(*choice_of_record(rest))
            elif kind == "disk":
                registry.note_disk(int(rest[0]))
        except (KvError, ValueError, IndexError):
            return  # its blocks will not be known either

    def _take_arenas(self) -> U4:
        """Arenas that are still there serve where they did. Returns slots by position."""
        arenas = self._arenas
        there = self._memory.kept_arenas()
        slots_of = np.zeros(arenas.positions, dtype=np.uint32)
        for position in range(arenas.positions):
            row = self._former.arenas[position]
            number, pool = int(row["id"]), int(row["pool"]) - 1
            arenas.next_id = max(arenas.next_id, number + 1)
            self._tables.arenas[position] = np.zeros((), dtype=ARENA)
            if pool < 0 or pool >= len(arenas.pools) or number not in there or number in arenas.positions_by_id:
                continue
            if int(row["draining"]) == GIVEN_UP:
                continue
            self._memory.take_arena(number)
            slots_of[position] = arenas.readopt(position, number, arenas.pools[pool])
            leased_ns = int(row["lease_until_ns"])
            self._tables.arenas[position]["lease_until_ns"] = min(leased_ns, self._now_ns + 10**11)
        arenas.next_id = max([arenas.next_id, *(number + 1 for number in there)])
        self._memory.drop_kept()
        return slots_of

    def _withhold(self, pool_of: U4, slots_of: U4, shift: int) -> list[tuple[list[int], int]]:
        """Rows that leases of the former life may still cover: from where they end up to the root."""
        table = self._tables.blocks
        until = table["lease_until_ns"][: self._former.unused].astype(np.int64)
        ends = np.flatnonzero((until + LEASE_MARGIN_NS > self._now_ns) & (table["state"][: until.size] != blocks.FREE))
        most_ns = self._now_ns + LEASE_TTL_NS_MAX  # whatever the former life's configuration said
        held: list[tuple[list[int], int]] = []
        seen: set[int] = set()
        for end in ends[np.argsort(until[ends])[::-1]].tolist():  # the longest first: what they pass covers the others
            chain: list[int] = []
            row = end
            while 0 < row < self._former.unused and row not in seen:
                seen.add(row)
                parent = int(table["parent"][row])
                if blocks.withhold(self._tables, row, pool_of, slots_of, shift):
                    chain.append(row)
                row = parent
            if chain:
                until_ns = min(int(until[end]), most_ns)
                table["lease_until_ns"][chain] = np.maximum(table["lease_until_ns"][chain], np.uint64(until_ns))
                held.append((chain, until_ns))
        return held

    def _withhold_written(self, pool_of: U4, slots_of: U4, shift: int) -> None:
        """Slots that clients of the former life may still be writing to, as long as their processes live."""
        table, writers = self._tables.blocks, self._writers
        lives: dict[Process, bool] = {NOBODY: True}
        for written in writers.former():
            row, process, position = written.row, written.process, written.slot >> shift
            if row >= self._former.unused or position >= slots_of.size or int(table["slot"][row]) != written.slot:
                continue
            if int(self._tables.arenas["id"][position]) != written.arena or int(table["state"][row]) not in _UNDONE:
                continue
            if process not in lives:
                lives[process] = self._processes.watch(process, partial(writers.gone, process))
            if lives[process] and blocks.withhold(self._tables, row, pool_of, slots_of, shift):
                writers.keep(written)

    def _without_parents(self, rows: U4) -> tuple[U4, U4, U8]:
        """Rows whose parents were not kept, and must not be taken for children of what those rows hold next; of them
        those whose parents lay on disk alone, to be found again, by these keys, when the disk is open.
        """
        table = self._tables.blocks
        parents = table["parent"][rows]
        states = table["state"][parents]
        gone = (parents > 0) & (states != blocks.ADOPTING)
        on_disk = np.flatnonzero(gone & ((states == blocks.DISK) | (states == blocks.LOADING)))
        cut, keys = rows[on_disk], table["key"][parents[on_disk]].copy().reshape(-1)
        return rows[gone], cut, keys

    def _settle(self, rows: U4) -> U4:
        """Settle what is whole. Returns the rest: it may continue what lies on disk."""
        tables = self._tables
        left: list[U4] = []
        stack = np.zeros(rows.size + 1, dtype=np.uint32)
        nobody: U4 = np.zeros(1, dtype=np.uint32)  # gives way, or is durable: this life has stored nothing yet
        tenant_of: dict[int, Tenant] = {
            namespace.number: namespace.tenant for namespace in self._registry.namespaces.values()
        }
        numbers = tables.blocks["namespace"][rows]
        for tenant in self._registry.tenants.values():
            mine = [number for number, owner in tenant_of.items() if owner is tenant]
            some = rows[np.isin(numbers, mine)]
            blocks.make_ready(tables, tenant.index, some.size)
            settled = blocks.settle(
                tables, tenant.index, some, 0, some.size, stack, self._key, blocks.NO_GENERATION, nobody, nobody
            )
            some = some[np.argsort(tables.blocks["touched"][some], kind="stable")]
            whole = tables.blocks["state"][some] != blocks.ADOPTING
            listed = some[whole]
            blocks.finish_adoption(tables, listed, 0, listed.size)
            left.append(some[~whole])
            self._kept.blocks += int(settled)
        return np.concatenate(left) if left else rows[:0]


def settle_left_over(tables: Tables, registry: Registry, left: LeftOver) -> int:
    """Put the rest of what was kept in its place, or free it. Returns how many blocks found theirs."""
    table, key = tables.blocks, np.zeros(4, dtype=np.uint64)
    of_namespace = {namespace.number: namespace for namespace in registry.namespaces.values()}
    table["writer"][left.rows] = blocks.UNKNOWN
    for i, row in enumerate(left.cut.tolist()):
        namespace = of_namespace[int(table["namespace"][row])]
        parent = int(blocks.find_one(tables, namespace.tenant.index, namespace.number, left.keys, 4 * i))
        table["parent"][row] = parent
    table["writer"][left.rows[table["parent"][left.rows] == 0]] = blocks.BROKEN
    settled = 0
    stack = np.zeros(left.rows.size + 1, dtype=np.uint32)
    nobody: U4 = np.zeros(1, dtype=np.uint32)  # gives way: neither of the two is durable
    for tenant in registry.tenants.values():
        mine = [number for number, namespace in of_namespace.items() if namespace.tenant is tenant]
        some = left.rows[np.isin(table["namespace"][left.rows], mine)]
        blocks.make_ready(tables, tenant.index, some.size)
        settled += int(
            blocks.settle(tables, tenant.index, some, 0, some.size, stack, key, blocks.NO_GENERATION, nobody, nobody)
        )
        blocks.finish_adoption(tables, some, 0, some.size)
    return settled
