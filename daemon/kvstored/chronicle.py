"""Once a second, what has changed since the last look is said as events. Owner thread.

What comes in floods (blocks stored, found, evicted) is added up over ten seconds; what went wrong is said at once.
Looking compares totals that are counted anyway, and what `kvctl status` warns of: no blocks are walked.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvproto.limits import MIB
from kvstore import blocks
from kvstore.report import DiskReport
from kvstore.store import Store
from kvstored.admin_audit import Act
from kvstored.connection import Connection
from kvstored.events import Events, Kind

LOOK_NS: Final = 10**9
SUM_NS: Final = 10 * 10**9
_NUMBERS: Final = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Totals:
    """What is compared."""

    published: int
    published_bytes: int
    asked: int
    found: int
    refused: int
    evicted: int
    forgotten: int
    deleted: int
    unused: int
    damaged: int
    save_faults: int
    load_faults: int
    commit_faults: int
    leases_expired: int
    pins_expired: int
    pins_ended: int
    pins_dropped: int
    pins_gave_way: int


def totals_of(store: Store) -> Totals:
    """Totals since the start."""
    tally, disk, pins = store.tally, store.disk, store.pinning.tally
    return Totals(
        published=tally.published,
        published_bytes=tally.published_bytes,
        asked=tally.lease_hits + tally.lease_misses,
        found=tally.lease_hits,
        refused=tally.refused_full + tally.refused_quota + tally.refused_busy,
        evicted=tally.evicted + store.streams.evicted,
        forgotten=int(store.tables.book[blocks.TURN]),
        deleted=tally.deleted,
        unused=sum(store.ageing.dropped.values()),
        damaged=disk.tally.damaged + store.streams.verify_faults,
        save_faults=disk.demotion.tally.save_faults,
        load_faults=disk.tally.load_faults,
        commit_faults=disk.commits.faults,
        leases_expired=tally.leases_expired,
        pins_expired=pins.expired,
        pins_ended=pins.ended,
        pins_dropped=pins.dropped,
        pins_gave_way=pins.gave_way,
    )


@dataclass(frozen=True, slots=True)
class _Standing:
    """States that are compared."""

    draining: bool
    disk: str
    index: str


class Chronicle:
    """What is said of one store."""

    def __init__(
        self, store: Store, events: Events, disk: Callable[[], DiskReport | None],
        warnings: Callable[[DiskReport | None], Sequence[str]],
    ) -> None:  # fmt: skip
        """`disk` and `warnings`: as `kvctl status` has them."""
        self._store = store
        self._events = events
        self._disk = disk
        self._warnings = warnings
        self._soon = self._summed = totals_of(store)
        self._sum_ns = 0
        self._stood: _Standing | None = None
        self._warned: dict[str, str] = {}  # without its numbers, which change: the warning

    def begin(self, version: str) -> None:
        """The daemon serves."""
        kept = self._store.kept
        how = f"warm, with {kept.blocks:,} blocks kept" if kept.warm else f"cold: {kept.reason}"
        self._events.say(Kind.DAEMON, f"kvstored {version} began {how}", count=kept.blocks)

    def look(self, now_ns: int) -> None:
        """See what has changed."""
        now = totals_of(self._store)
        if now != self._soon:
            self._say_faults(now)
            self._say_pins(now)
            self._soon = now
        if now_ns >= self._sum_ns:
            self._sum_ns = now_ns + SUM_NS
            if now != self._summed:
                self._say_sums(now)
                self._summed = now
        report = self._disk()
        self._say_standing(report)
        self._say_warnings(self._warnings(report))

    def came(self, connection: Connection) -> None:
        """A client has opened a session."""
        assert connection.session is not None
        peer, session = connection.peer, connection.session
        text = f"client {connection.name!r} came: session {session.number}, pid {peer.pid}, uid {peer.uid}"
        self._events.say(Kind.CLIENT, f"{text}, {connection.role}", tenant=session.tenant.name)

    def went(self, connection: Connection, reason: str) -> None:
        """A session has ended; `reason`: if that was not its client's wish."""
        if connection.session is not None:
            text = f"client {connection.name!r} went: session {connection.session.number}, pid {connection.peer.pid}"
            text += f": {reason}" if reason else ""
            self._events.say(Kind.CLIENT, text, warning=bool(reason), tenant=connection.session.tenant.name)

    def acted(self, act: Act) -> None:
        """An operator did something, or tried to. Any thread."""
        who = f"uid {act.uid}" if act.uid >= 0 else act.who or "somebody"
        words = f"{act.verb} {act.scope}".rstrip()
        text = f"{who}: kvctl {words}" + ("" if act.outcome == "done" else f": {act.outcome}")
        self._events.say(Kind.ADMIN, text, warning=act.outcome != "done", count=act.blocks, size_bytes=act.bytes)

    # -- what is compared ----------------------------------------------------------------------------------------

    def _say_faults(self, now: Totals) -> None:
        was = self._soon
        said = (
            (now.damaged - was.damaged, "blocks were not what was stored; they are misses now"),
            (now.save_faults - was.save_faults, "blocks could not be written to disk"),
            (now.load_faults - was.load_faults, "blocks could not be read from disk"),
            (now.commit_faults - was.commit_faults, "commits of the index failed"),
        )
        for count, text in said:
            if count > 0:
                self._events.say(Kind.FAULT, f"{count:,} {text}", warning=True, count=count)
        expired = now.leases_expired - was.leases_expired
        if expired > 0:
            self._events.say(Kind.CLIENT, f"{expired:,} leases ended by their deadline", count=expired)

    def _say_pins(self, now: Totals) -> None:
        was = self._soon
        said = (
            (now.pins_expired - was.pins_expired, "expired", False),
            (now.pins_ended - was.pins_ended, "were ended", False),
            (now.pins_dropped - was.pins_dropped, "ended with their blocks", True),
            (now.pins_gave_way - was.pins_gave_way, "gave way to a class that is sure of its share", True),
        )
        for count, text, warning in said:
            if count > 0:
                self._events.say(Kind.PIN, f"{count:,} pins {text}", warning=warning, count=count)

    def _say_sums(self, now: Totals) -> None:
        was = self._summed
        stored, asked = now.published - was.published, now.asked - was.asked
        size_bytes = now.published_bytes - was.published_bytes
        parts = [f"{stored:,} blocks stored ({size_bytes / MIB:,.1f} MiB)"] if stored else []
        parts += [f"{now.found - was.found:,} of {asked:,} blocks found"] if asked else []
        refused = now.refused - was.refused
        parts += [f"{refused:,} refused for want of room"] if refused else []
        if parts:
            text = ", ".join(parts)
            self._events.say(Kind.TRAFFIC, text, warning=bool(refused), count=stored, size_bytes=size_bytes)
        for count, text in (
            (now.evicted - was.evicted, "blocks evicted from DRAM"),
            (now.forgotten - was.forgotten, "blocks evicted for good"),
            (now.deleted - was.deleted, "blocks deleted"),
            (now.unused - was.unused, "blocks dropped that nobody used for too long"),
        ):
            if count > 0:
                self._events.say(Kind.EVICT, f"{count:,} {text}", count=count)

    def _say_standing(self, report: DiskReport | None) -> None:
        disk, index = (report.state, report.index_state) if report else ("", "")
        now = _Standing(self._store.draining, disk, index)
        was, self._stood = self._stood, now
        if was is None or was == now:
            return
        if now.draining != was.draining:
            text = "draining: nothing new is stored" if now.draining else "new blocks are taken again"
            self._events.say(Kind.DAEMON, text, warning=now.draining)
        for text, warning in _changes(was, now):
            self._events.say(Kind.TIER, text, warning=warning)

    def _say_warnings(self, warnings: Sequence[str]) -> None:
        now = {_NUMBERS.sub("#", text): text for text in warnings}
        for name in now.keys() - self._warned.keys():
            self._events.say(Kind.TIER, now[name], warning=True)
        for name in self._warned.keys() - now.keys():
            self._events.say(Kind.TIER, f"over: {self._warned[name].partition(';')[0]}")
        self._warned = now


def _changes(was: _Standing, now: _Standing) -> Iterator[tuple[str, bool]]:
    if now.disk != was.disk:
        yield f"the disk tier is {now.disk}, and was {was.disk}", now.disk == "off"
    if now.index != was.index:
        yield f"the index on disk is {now.index}, and was {was.index}", now.index in ("hung", "lost")
