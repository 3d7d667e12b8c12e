"""Taking over what a former life left on disk: from the records of the index to rows, in slices. Owner thread.

    records of every segment -> rows, apart -> parents found by place and generation -> chains that are whole go into
    index and tree -> leaves listed, the rest freed -> the segments take new blocks

Meanwhile DRAM serves, and a block on disk is a miss until it is in the index and tree.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvproto.errors import KvError
from kvproto.identity import NamespaceIdentity
from kvproto.limits import POOLS
from kvstore import blocks
from kvstore.blocks import U4, U8, Rows, Tables
from kvstore.sessions import Namespace, Tenant
from kvstore.tier.closed import Closed
from kvstore.tier.format import UNREAD
from kvstore.tier.orders import Found, Name
from kvstore.tier.segments import Segments

SLICE = 8192  # records, or rows, a slice: a few milliseconds


@dataclass(slots=True)
class Recovered:
    """What came of it."""

    blocks: int = 0
    orphans: int = 0
    segments: int = 0
    surplus: int = 0  # segments beyond the limit, dropped
    unknown: int = 0  # segments of tenants or namespaces that cannot be


class Recovery:
    """One adoption. `run` until it says that it is over."""

    def __init__(
        self, tables: Tables, segments: Segments, found: Sequence[Found], names: Sequence[Name],
        tenant_of: Callable[[str], Tenant | None],
        namespace_of: Callable[[str, NamespaceIdentity, int], Namespace | None],
        closed: Closed, quarantined: set[int], displaced: Callable[[Tenant, int], None], first_generation: int,
        wall_s: int, now_ns: int, most_rows: int,
    ) -> None:  # fmt: skip
        """`closed` hears of what is not taken over, `quarantined` gets places that could not be read. `displaced` hears
        of blocks that are cut off for older ones: stored while nobody knew of those, the first generation given.
        """
        self._tables = tables
        self._segments = segments
        self._found = found
        self._names = names
        self._tenant_of = tenant_of
        self._namespace_of = namespace_of
        self._closed = closed
        self._quarantined = quarantined
        self._displaced = displaced
        self._first = np.uint64(first_generation)
        self._wall_s = wall_s
        self._now_ns = now_ns
        self._most = most_rows
        self._key = np.zeros(4, dtype=np.uint64)
        self.result = Recovered()
        self._steps = self._work()

    def run(self, slices: int) -> bool:
        """Do so many slices. Whether it is over."""
        return any(next(self._steps, True) is True for _ in range(slices))

    def _work(self) -> Iterator[None]:
        numbers = self._number_namespaces()
        yield
        placed = self._place_segments()
        rows_of: dict[Tenant, list[U4]] = {}
        merged: U4 = np.zeros(1 + sum(found.slots for found in self._found), dtype=np.uint32)
        new = 0
        for position, found, tenant, pool in placed:
            rows = np.zeros(found.slots, dtype=np.uint32)
            end = 0
            records = _records(found)
            for start in range(0, found.slots, SLICE):
                stop = min(start + SLICE, found.slots)
                room = self._most - new - end - int(merged[0])
                end = blocks.adopt_records(
                    self._tables, tenant.index, pool, position, start, stop, records, numbers, self._wall_s,
                    np.uint64(self._now_ns), self._key, rows, end, merged, room, self._first,
                )  # fmt: skip
                yield
            self._leave_unread(position, records, tenant)
            new += end
            rows_of.setdefault(tenant, []).append(rows[:end])
        yield from self._link(placed)
        for tenant, parts in rows_of.items():
            rows = yield from self._youngest_first(np.concatenate(parts))
            yield from self._settle(tenant, rows, merged)
        self._mark_merged(merged[1 : 1 + int(merged[0])])
        for position, _, _, _ in placed:
            self._segments.open(position)
        self.result.segments = len(placed)
        self.result.blocks = int(self._tables.pools["blocks"][POOLS:].sum())  # those that DRAM has too included

    def _number_namespaces(self) -> U4:
        numbers = np.zeros(max((name.number for name in self._names), default=0) + 1, dtype=np.uint32)
        for name in self._names:
            try:
                identity = NamespaceIdentity.from_canonical(name.canonical)
            except KvError:
                continue  # its blocks cannot be asked for
            namespace = self._namespace_of(name.tenant, identity, name.number)
            if namespace is not None:
                numbers[name.number] = namespace.number
        return numbers

    def _place_segments(self) -> list[tuple[int, Found, Tenant, int]]:
        """Give each segment a position, the last touched ones first; drop those beyond the limit."""
        placed = []
        order = sorted(self._found, key=lambda found: -int(_records(found)["touched_s"].max(initial=0)))
        for found in order:
            tenant = self._tenant_of(found.tenant)
            fits = (self._segments.segment_bytes - 4096) // found.slot_bytes == found.slots
            pool = self._segments.pool(tenant, found.slot_bytes) if tenant is not None and fits else None
            if tenant is None or pool is None:
                self.result.unknown += 1
                self._segments.taken.add(found.segment)
                self._closed.found({found.segment: found.tenant})
                continue
            position = self._segments.adopt(found.segment, pool)
            if position is None:
                self.result.surplus += 1
                self._closed.leave(found.segment, found.tenant)
                continue
            placed.append((position, found, tenant, pool.number))
        return placed

    def _leave_unread(self, position: int, records: Rows, tenant: Tenant) -> None:
        """What lies there may be durable, and may be deleted before the next start, which looks again."""
        unread = np.flatnonzero((records["generation"] == 0) & (records["namespace"] == UNREAD))
        if unread.size:
            places = (unread + (position << int(self._tables.book[blocks.SHIFT]))).tolist()
            self._quarantined.update(places)
            self._closed.found_unread(tenant.name, places)

    def _link(self, placed: list[tuple[int, Found, Tenant, int]]) -> Iterator[None]:
        positions = np.zeros(max((found.segment for _, found, _, _ in placed), default=0) + 1, dtype=np.uint32)
        for position, found, _, _ in placed:
            positions[found.segment] = position
        count, end = sum(found.slots for _, found, _, _ in placed), 0
        left: U4 = np.zeros(count, dtype=np.uint32)
        wanted: U8 = np.zeros(count, dtype=np.uint64)
        for position, found, _, _ in placed:
            for start in range(0, found.slots, SLICE):
                stop = min(start + SLICE, found.slots)
                end = blocks.link_records(
                    self._tables, position, start, stop, _records(found), positions, left, wanted, end
                )
                yield
        if end:
            yield from self._link_moved(left[:end], wanted[:end])

    def _link_moved(self, rows: U4, wanted: U8) -> Iterator[None]:
        """Parents that were written again elsewhere: a generation is given once, so it names them."""
        table, unused = self._tables.blocks, int(self._tables.book[blocks.UNUSED_ROW])
        sought, which = np.unique(wanted, return_inverse=True)
        found: U4 = np.zeros(sought.size, dtype=np.uint32)
        for start in range(1, unused, SLICE):
            generations = table["generation"][start : min(start + SLICE, unused)]
            at = np.minimum(np.searchsorted(sought, generations), sought.size - 1)
            these = np.flatnonzero(sought[at] == generations)
            these = these[~np.isin(table["state"][start + these], (blocks.FREE, blocks.DOOMED))]
            found[at[these]] = start + these
            yield
        parents = found[which]
        good = (table["generation"][parents] == wanted) & (table["namespace"][parents] == table["namespace"][rows])
        good &= (parents != 0) & (parents != rows)
        good &= ~np.isin(table["state"][parents], (blocks.FREE, blocks.DOOMED))  # it may have been dropped since then
        table["parent"][rows[good]] = parents[good]
        table["writer"][rows[good]] = blocks.UNKNOWN
        table["older"][rows[good]] = wanted[good].astype(np.uint32)  # as `link_records` promises it
        table["newer"][rows[good]] = (wanted[good] >> np.uint64(32)).astype(np.uint32)

    def _mark_merged(self, rows: U4) -> None:
        """Blocks that are in DRAM too, or continue such: durable as far as all before them is."""
        table = self._tables.blocks
        rows = rows[table["disk"][rows] != 0]  # those that were dropped since then may be others' by now
        rows = rows[np.argsort(table["generation"][rows], kind="stable")]
        left: U4 = np.zeros(rows.size, dtype=np.uint32)
        blocks.mark_durable(self._tables, rows, table["generation"][rows], table["disk"][rows], left)

    def _youngest_first(self, rows: U4) -> Generator[None, None, U4]:
        """Of two blocks of one name the index may still know the one that is gone: it is the elder, and what continues
        it is, too. Whoever is settled first has the name. 16 bits at a time, which is a radix sort.
        """
        ages: U8 = np.zeros(rows.size, dtype=np.uint64)  # to look for each in the table anew takes longer than to sort
        for start in range(0, rows.size, SLICE):
            ages[start : start + SLICE] = self._tables.blocks["generation"][rows[start : start + SLICE]]
            yield
        np.subtract(ages.max(initial=0), ages, out=ages)
        for shift in range(0, int(ages.max(initial=0)).bit_length(), 16):
            digits = (ages >> np.uint64(shift)).astype(np.uint16)
            yield
            order = np.argsort(digits, kind="stable")
            yield
            rows, ages = rows[order], ages[order]
            yield
        return rows

    def _settle(self, tenant: Tenant, rows: U4, unsure: U4) -> Iterator[None]:
        stack = np.zeros(rows.size + 1, dtype=np.uint32)
        displaced: U4 = np.zeros(rows.size + 1, dtype=np.uint32)
        blocks.make_ready(self._tables, tenant.index, rows.size)
        settled = 0
        for start in range(0, rows.size, SLICE):
            stop = min(start + SLICE, rows.size)
            displaced[0] = 0
            settled += blocks.settle(
                self._tables, tenant.index, rows, start, stop, stack, self._key, self._first, displaced, unsure
            )
            for row in displaced[1 : 1 + int(displaced[0])].tolist():
                self._displaced(tenant, row)
            yield
        touched = self._tables.blocks["touched"][rows]
        yield
        # In seconds, as the index has it, and 16 bits, which sort ten times as fast; what is older is old.
        age_s = np.minimum((np.uint64(self._now_ns) - touched) // np.uint64(10**9), np.uint64(65535)).astype(np.uint16)
        yield
        rows = rows[np.argsort(age_s, kind="stable")[::-1]]
        yield
        for start in range(0, rows.size, SLICE):
            blocks.finish_adoption(self._tables, rows, start, min(start + SLICE, rows.size))
            yield
        self.result.orphans += rows.size - settled


def _records(found: Found) -> Rows:
    records = found.records
    assert isinstance(records, np.ndarray), "records of a segment are an array"
    return records
