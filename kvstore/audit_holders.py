"""What must hold between tables and who uses them: holds, tickets, leases, pins, sessions. For tests (`audit.py`)."""

# ruff: noqa: SLF001  an audit looks inside

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from kvproto.limits import LEASE_MARGIN_NS, LEASES_PER_SESSION, PARKED_PER_SESSION, TICKETS_PER_SESSION
from kvstore.audit_look import Look
from kvstore.blocks import ADOPTING, DOOMED, FREE, WRITING
from kvstore.classes import PinClass
from kvstore.sessions import Tenant, Ticket, TicketState
from kvstore.sweeps import Clear, Count, Each, Job, Sweep
from kvstore.wheel import BUCKET_NS, Wheel

T = TypeVar("T")


class HolderChecks(Look):
    """Whoever holds, writes, reads or pins a block, against its row."""

    # -- holds, tickets, leases ----------------------------------------------------------------------------------

    def check_holds(self) -> None:
        """`holds` adds up leases, tickets, jobs and cut-off children; a dropped block lives as long as it is held."""
        expected: Counter[int] = Counter()
        for lease in self.store.leases.values():
            expected.update(lease.ends.tolist())
        for row in self.rows:
            if self.state[row] == DOOMED and self.parent[row]:
                expected[self.parent[row]] += 1
        expected.update(ticket.block for ticket in self.tickets if ticket.state is not TicketState.LAPSED)
        expected.update(self.store.disk.held_rows())
        expected.update(self.store.streams.held_rows())
        expected.update(self.store.remote.writing.held_rows())
        expected.update(self.store.pinning.held_rows())
        expected.update(self.store.writers.held_rows())
        expected.update(self.store.moving.held_rows())
        swept = set()
        for job in self.store.sweeper.jobs._jobs:
            held = list(self.held_by(job))
            expected.update(held)
            if not isinstance(job, Count):
                swept.update(held)
        for row in self.rows:
            assert self.holds[row] == expected[row], f"row {row} has {self.holds[row]} holds, not {expected[row]}"
            if self.state[row] == DOOMED:
                assert self.holds[row], f"row {row} was dropped, is held by nobody and is not free"
                left_over = self.column["first_child"][row] and row not in swept
                assert not left_over, f"what continues row {row} will never be dropped"
        assert all(self.state[row] != FREE for row in expected), "a free row is held"

    def held_by(self, job: Job) -> Iterator[int]:
        """The rows a job holds, once for each hold."""
        if isinstance(job, Clear):
            if job._sweep:
                yield from self.held_by(job._sweep)
        elif isinstance(job, Sweep):
            yield from job._tops
            row = job._top
            while row:
                assert self.state[row] == DOOMED, f"row {row} waits to be swept and was not dropped"
                yield int(row)
                row = self.column["next_sibling"][row]
        elif isinstance(job, Count) and job._here:
            yield abs(job._here)

    def check_tickets(self) -> None:
        """Each block being written has its ticket; open ones are on the wheel; spans of a ring do not overlap."""
        store = self.store
        writers: dict[int, Ticket] = {}
        for ticket in self.tickets:
            if ticket.state is TicketState.LAPSED:
                continue
            assert ticket.block not in writers, f"row {ticket.block} has two tickets"
            writers[ticket.block] = ticket
            assert self.state[ticket.block] in (WRITING, DOOMED), f"the ticket of row {ticket.block} is left over"
        for row in self.rows:
            if self.state[row] == WRITING:
                assert row in writers, f"row {row} is being written by nobody"
                assert self.column["writer"][row] == writers[row].session.number, f"row {row} names another writer"
        opened = {ticket: ticket.lapses_ns for ticket in self.tickets if ticket.state is TicketState.OPEN}
        _check_wheel(store.reserving.lapsing, opened, "tickets")
        for session in store.sessions.values():
            session.ring.check()
            pages = [ticket.page + i for ticket in session.tickets.values() for i in range(ticket.span_pages)]
            assert len(set(pages)) == len(pages), f"spans of session {session.number} overlap"
            assert all(0 <= page < session.ring.pages for page in pages), "a span lies outside its ring"
            assert session.ring.free_pages == session.ring.pages - len(pages), "pages of a ring are lost"
            for start, size in zip(session.ring._starts, session.ring._sizes, strict=True):
                assert not set(pages) & set(range(start, start + size)), "a span in use is free"

    def check_writers(self) -> None:
        """What clients may be writing themselves is written down for a successor, and nothing else is."""
        writers = self.store.writers
        written = {int(record["row"]): record for record in writers._records[: writers._used] if record["row"]}
        opened = {
            ticket.block
            for ticket in self.tickets
            if ticket.session.owner is not None and ticket.state is TicketState.OPEN
        }
        stranded = set(writers.held_rows())
        assert not opened & stranded, "a slot is out of use and its ticket is open"
        assert set(written) == opened | stranded == set(writers._places), "other slots are written down"
        for row, record in written.items():
            position = int(self.column["slot"][row]) >> self.shift
            said = (int(record["slot"]), int(record["arena"]))
            assert said == (self.column["slot"][row], self.serving(position)), f"row {row} is written down elsewhere"
        for row in stranded:
            assert self.state[row] == DOOMED, f"row {row} is out of use and was not dropped"
            ticket = writers._stranded[row].ticket
            assert ticket is None or ticket.block == row, f"row {row} waits for another ticket"
        taken = [*writers._places.values(), *writers._free]
        assert len(set(taken)) == len(taken) == writers._used, "places for records are lost"

    def check_leases(self) -> None:
        """Leases are known to store, session and wheel; their blocks are withheld until their deadline."""
        store = self.store
        _check_wheel(
            store.leasing.expiring,
            {lease: lease.deadline_ns + LEASE_MARGIN_NS for lease in store.leases.values()},
            "leases",
        )
        streams = [lease.stream for lease in store.leases.values() if lease.stream is not None]
        _check_wheel(store.streams._wheel, {stream: stream.due_ns for stream in streams}, "streams")
        of_sessions = [lease for session in store.sessions.values() for lease in session.leases.values()]
        assert len(of_sessions) == len(store.leases), "sessions and store disagree on leases"
        for number, lease in store.leases.items():
            assert lease.number == number, "a lease is filed under another number"
            assert store.sessions.get(lease.session.number) is lease.session, f"lease {number} has lost its session"
            assert lease.session.leases.get(number) is lease, f"lease {number} is unknown to its session"
            for row in lease.ends.tolist():
                past = number < 0 and self.state[row] == ADOPTING  # of a former life, and its beginning lies on disk
                assert past or self.state[row] not in (FREE, WRITING, ADOPTING), f"row {row} was never published"
                until_ns = self.column["lease_until_ns"][row]
                assert until_ns >= lease.deadline_ns, f"row {row} says it is leased to an earlier time"

    def check_pins(self) -> None:
        """Pins are charged for what they cover, each block once; what they cover is there, and stays."""
        pinning = self.store.pinning
        covered: Counter[int] = Counter()
        used: dict[Tenant, dict[int, int]] = {}
        for pin in pinning.held():
            rows = set(pin.rows.tolist())
            covered.update(rows)
            used.setdefault(pin.tenant, {}).update(dict.fromkeys(rows, pin.namespace.slot_bytes))
            assert set(pin.ends.tolist()) <= rows, f"pin {pin.number} holds what it does not cover"
            assert all(self.state[row] not in (FREE, WRITING) for row in rows), f"pin {pin.number} covers nothing"
            assert pinning._by_end[int(pin.rows[-1])][pin.number] is pin, f"pin {pin.number} hears of no use"
        counts = {row: int(pinning._covers[row]) for row in np.flatnonzero(pinning._covers).tolist()}
        assert counts == dict(covered), "blocks are covered by another number of pins"
        for tenant, rows_of in used.items():
            assert pinning.used_bytes(tenant) == sum(rows_of.values()), f"{tenant.name} pays for other blocks"
        assert set(pinning._used) == set(used), "a tenant without pins pays for some"
        self.check_pin_classes()

    def check_pin_classes(self) -> None:
        """By class too pins pay for what they cover, once; and the book says of each what a successor must know."""
        pinning = self.store.pinning
        used: dict[tuple[Tenant, PinClass], dict[int, int]] = {}
        for pin in pinning.held():
            rows = dict.fromkeys(pin.rows.tolist(), pin.namespace.slot_bytes)
            used.setdefault((pin.tenant, pin.kind), {}).update(rows)
        paid = {whose: sum(rows.values()) for whose, rows in used.items()}
        assert dict(pinning._classes._used) == paid, "a class pays for other blocks"
        listed = {number for pins in pinning._classes._pins.values() for number in pins}
        assert listed == set(pinning.pins), "classes have other pins"
        written = {saved.number: saved for saved in pinning._book._whole(pinning._book._used)}
        assert set(pinning.pins) <= set(written), "a pin is not written down"
        for number, pin in pinning.pins.items():
            saved, key = written[number], self.store.tables.blocks["key"][pin.rows[-1]].tobytes()
            said = (saved.place, saved.key, saved.count)
            assert said == (pin.place, key, pin.rows.size), f"pin {number} is written down otherwise"
            assert saved.deadline_ns >= pin.deadline_ns, f"pin {number} would end too early"

    def check_sessions(self) -> None:
        """Counts of sessions, their limits, and that none is kept for nothing."""
        store = self.store
        attached: Counter[Tenant] = Counter()
        flying: Counter[Tenant] = Counter()
        opened: Counter[int] = Counter()
        for number, session in store.sessions.items():
            assert session.number == number, "a session is filed under another number"
            copying = sum(ticket.state is TicketState.COPYING for ticket in session.tickets.values())
            assert session.copies == copying, f"running copies of session {number} are miscounted"
            assert len(session.leases) <= LEASES_PER_SESSION, "too many leases"
            assert len(session.tickets) <= TICKETS_PER_SESSION, "too many tickets"
            assert len(session.parked) <= PARKED_PER_SESSION, "too many waiting leases"
            flying[session.tenant] += len(session.tickets) + len(session.parked)
            flying[session.tenant] += sum(lease.stream is not None for lease in session.leases.values())
            if session.heard is not None:
                assert not session.leases, f"session {number} is the daemon's own and leases"
                continue
            if session.attached:
                assert not session.exited, f"session {number} has exited and is attached"
                attached[session.tenant] += 1
                opened.update(session.namespaces.keys())
                self.check_parked([parked.deadline_ns for parked in session.parked], number)
                continue
            ending = any(isinstance(job, Each) for job in store.sweeper.jobs._jobs)
            assert ending or len(session.tickets) == copying, f"session {number} is closed and still has tickets"
            assert not session.parked, f"session {number} is closed and something waits for it"
            mapped = session.arenas or session.writable
            waited_for = session.leases or mapped or store.writers.has(session)
            kept = ending or session.tickets or (not session.exited and waited_for)
            assert kept, f"session {number} is kept for nothing"
            if session.exited:
                assert not session.leases, f"session {number} has exited and holds leases"
                assert not mapped, f"session {number} has exited and holds arenas"
                assert not store.writers.has(session), f"session {number} has exited and keeps slots out of use"
        for tenant in store.tenants.values():
            assert tenant.sessions == attached[tenant], f"sessions of {tenant.name} are miscounted"
            assert tenant.in_flight == flying[tenant], f"what {tenant.name} has in flight is miscounted"
            assert tenant.quota == store.quotas.of(tenant.name), f"{tenant.name} goes by another quota"
        for namespace in store.namespaces.values():
            assert store.registry.by_number[namespace.number] is namespace, f"namespace {namespace.number} is lost"
            assert namespace.sessions == opened[namespace.number], "sessions of a namespace are miscounted"

    def check_parked(self, deadlines_ns: list[int], number: int) -> None:
        """Each waiting LEASE is looked at when its wait is over."""
        for deadline_ns in deadlines_ns:
            bucket = self.store.leasing.parked._buckets.get(-(-deadline_ns // BUCKET_NS), {})
            waits = any(session.number == number for session in bucket)
            assert waits, f"session {number} has a LEASE that nobody will answer"

    def check_holders(self) -> None:
        """Sessions and arenas agree on who was given which descriptor."""
        given = {
            (session.number, arena)
            for session in self.store.sessions.values()
            for arena in session.arenas.keys() | session.writable.keys()
        }
        held = {
            (session.number, arena)
            for arena, holders in [
                *self.arenas.holders.items(),
                *((arena, stale.holders) for arena, stale in self.arenas.stale.items()),
            ]
            for session in holders
        }
        assert given == held, f"sessions and arenas disagree on descriptors: {given ^ held}"
        for session in self.store.sessions.values():
            if not session.exited:
                marked = np.flatnonzero(session.given).tolist()
                mine = [
                    at
                    for at, number in enumerate(self.pool_at[: self.arenas.positions])
                    if number >= 0 and self.serving(at) in session.arenas
                ]
                assert marked == mine, f"session {session.number} is marked as having {marked}, and has {mine}"
                assert all(session.arenas[self.serving(at)] == at for at in mine), (
                    "an arena is filed at another position"
                )
        for arena, stale in self.arenas.stale.items():
            assert stale.holders or not stale.punched, f"arena {arena} is kept for nobody"


def _check_wheel(wheel: Wheel[T], expected: dict[T, int], name: str) -> None:
    found = {(thing, number) for number, bucket in wheel._buckets.items() for thing in bucket}
    wanted = {(thing, -(-deadline_ns // BUCKET_NS)) for thing, deadline_ns in expected.items()}
    assert found == wanted, f"the wheel of {name} has {len(found - wanted)} too many and {len(wanted - found)} too few"
    assert sorted(wheel._order) == sorted(wheel._buckets), f"the wheel of {name} has lost a bucket"
