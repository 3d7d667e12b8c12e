"""`kvctl top`: what a daemon does now, from the differences between samples.

sample(client)       one look: status and clients
between(a, b)        rates of what grew from one look to the next, by the daemon's own clock
page(figures)        80 columns, for a terminal;  line(figures): one line, for a log
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from rich.console import Group, RenderableType
from rich.text import Text

from kvctl.client import ControlClient, printable
from kvctl.render import Json, _table, count, short, size, span
from kvproto import control_pb2 as pb

__all__ = ["Figures", "Sample", "between", "body", "line", "page", "sample"]

TENANTS_SHOWN: Final = 6
CLIENTS_SHOWN: Final = 8
BAR: Final = 8
WARNINGS_SHOWN: Final = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """One look."""

    status: pb.GetStatusResponse
    clients: pb.ListClientsResponse
    unix_s: float


def sample(client: ControlClient) -> Sample:
    """Look once. Raises KvctlError."""
    return Sample(client.status(), client.clients(), time.time())


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier, a GPU's memory included. In goes what clients store in DRAM, or what is written or copied there; out,
    what is leased or read there.
    """

    name: str
    used_bytes: int
    capacity_bytes: int
    blocks: int
    in_bytes_per_s: float
    out_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One tenant."""

    name: str
    used_bytes: int
    pinned_bytes: int
    blocks: int
    clients: int
    out_bytes_per_s: float
    refused_per_s: float
    saved_s_per_s: float


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """One session."""

    session: int
    name: str
    tenant: str
    pid: int
    requests_per_s: float
    leases: int
    tickets: int
    ring_used_bytes: int
    ring_bytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What `top` shows. Rates are per second of the time between two looks; None: there is nothing to say yet."""

    at_unix_s: float
    interval_s: float
    version: str
    uptime_s: float
    draining: bool
    warnings: tuple[str, ...]
    asked_per_s: float  # blocks
    hit_share: float | None  # of those; None: nothing was asked for
    hit_share_in_all: float | None  # since the daemon started
    stored_per_s: float  # blocks
    evicted_per_s: float  # blocks
    refused_per_s: float  # blocks for which there was no room
    faults_per_s: float
    saved_s_per_s: float  # compute saved
    saved_s: float  # since the daemon started
    clients_total: int
    namespaces: int
    tiers: tuple[TierFigures, ...]
    tenants: tuple[TenantFigures, ...]  # those that did most first
    clients: tuple[ClientFigures, ...]


def between(before: Sample, after: Sample) -> Figures | None:
    """Rates from one look to the next; None if another daemon answered, or no time has passed."""
    was, now = before.status, after.status
    interval_s = now.uptime_s - was.uptime_s
    if was.pid != now.pid or interval_s <= 0:
        return None
    old, new = was.counters, now.counters

    def rate(*names: str) -> float:
        return float(sum(getattr(new, name) - getattr(old, name) for name in names) / interval_s)

    found, missed = rate("lease_hits"), rate("lease_misses")
    asked_in_all = new.lease_hits + new.lease_misses
    saved_s = _saved_s(now.tenants)
    return Figures(
        at_unix_s=after.unix_s,
        interval_s=interval_s,
        version=now.version,
        uptime_s=now.uptime_s,
        draining=now.draining,
        warnings=tuple(now.warnings),
        asked_per_s=found + missed,
        hit_share=found / (found + missed) if found + missed > 0 else None,
        hit_share_in_all=new.lease_hits / asked_in_all if asked_in_all else None,
        stored_per_s=rate("published"),
        evicted_per_s=rate("evicted", "evicted_by_operators"),
        refused_per_s=rate("refused_full", "refused_busy", "refused_quota"),
        faults_per_s=rate("faults"),
        saved_s_per_s=max(0.0, saved_s - _saved_s(was.tenants)) / interval_s,
        saved_s=saved_s,
        clients_total=now.sessions,
        namespaces=now.namespaces,
        tiers=tuple(_tiers(was, now, interval_s)),
        tenants=tuple(sorted(_tenants(was, now, interval_s), key=lambda one: (-one.out_bytes_per_s, -one.used_bytes))),
        clients=tuple(sorted(_clients(before, after, interval_s), key=lambda one: (-one.requests_per_s, one.session))),
    )


def _saved_s(tenants: Sequence[pb.Tenant]) -> float:
    return sum((one.saved_dram_s + one.saved_disk_s for one in tenants), 0.0)


def _tiers(was: pb.GetStatusResponse, now: pb.GetStatusResponse, interval_s: float) -> Iterator[TierFigures]:
    served = sum(one.hit_dram_bytes for one in now.tenants) - sum(one.hit_dram_bytes for one in was.tenants)
    moved = {
        "dram": (now.counters.published_bytes - was.counters.published_bytes, served),
        "disk": (
            now.disk.counters.saved_bytes - was.disk.counters.saved_bytes,
            now.disk.counters.loaded_bytes - was.disk.counters.loaded_bytes,
        ),
    }
    before = {one.name: one for one in was.devices}
    for one in now.devices:
        if one.hbm_bytes:
            old = before.get(one.name, pb.Device())
            yield TierFigures(
                "hbm", one.hbm_used_bytes, one.hbm_bytes, one.hbm_blocks,
                max(0, one.hbm_promoted_bytes - old.hbm_promoted_bytes) / interval_s,
                max(0, one.hbm_hit_bytes - old.hbm_hit_bytes) / interval_s,
            )  # fmt: skip
    for tier in now.tiers:
        into, out = moved.get(tier.name, (0, 0))
        yield TierFigures(
            tier.name, tier.used_bytes, tier.capacity_bytes, tier.blocks, into / interval_s, max(0, out) / interval_s
        )


def _tenants(was: pb.GetStatusResponse, now: pb.GetStatusResponse, interval_s: float) -> Iterator[TenantFigures]:
    before = {one.name: one for one in was.tenants}
    for one in now.tenants:
        old = before.get(one.name, pb.Tenant())
        out = one.hit_dram_bytes + one.hit_disk_bytes - old.hit_dram_bytes - old.hit_disk_bytes
        saved_s = one.saved_dram_s + one.saved_disk_s - old.saved_dram_s - old.saved_disk_s
        yield TenantFigures(
            one.name, one.used_bytes, one.pinned_bytes, one.blocks, one.sessions, max(0, out) / interval_s,
            max(0, one.refused - old.refused) / interval_s, max(0.0, saved_s) / interval_s,
        )  # fmt: skip


def _clients(before: Sample, after: Sample, interval_s: float) -> Iterator[ClientFigures]:
    had = {one.session: one.requests for one in before.clients.clients}
    for one in after.clients.clients:
        requests = one.requests - had.get(one.session, 0)
        yield ClientFigures(
            one.session, one.name, one.tenant, one.pid, requests / interval_s, one.leases, one.tickets,
            one.ring_used_bytes, one.ring_bytes,
        )  # fmt: skip


# -- how it looks -----------------------------------------------------------------------------------------------


def body(figures: Figures) -> Json:
    """For `-o json`."""
    said: dict[str, Json] = asdict(figures)
    return said


def page(figures: Figures) -> RenderableType:
    """A screen of 80 columns."""
    state = Text("draining", style="bold yellow") if figures.draining else Text("serving", style="green")
    head = Text.assemble(
        (f"kvstored {printable(figures.version)}", "bold"), "  ", state, f"  up {span(figures.uptime_s)}  "
        f"clients {figures.clients_total:,}  namespaces {figures.namespaces:,}",
    )  # fmt: skip
    hits = f"hits {_share(figures.hit_share)} of {count(figures.asked_per_s)} blocks/s"
    hits += f" ({_share(figures.hit_share_in_all)} since the start)"
    moving = f"stored {count(figures.stored_per_s)}/s  evicted {count(figures.evicted_per_s)}/s  "
    moving += f"refused {count(figures.refused_per_s)}/s  faults {count(figures.faults_per_s)}/s"
    saved = f"compute saved {figures.saved_s_per_s:.2f} s/s, {span(figures.saved_s)} in all"
    parts: list[RenderableType] = [head, Text(hits), Text(moving), Text(saved), Text(), _tier_table(figures.tiers)]
    if figures.tenants:
        parts += [Text(), _tenant_table(figures.tenants)]
    if figures.clients:
        parts += [Text(), _client_table(figures.clients)]
    warnings = [Text(f"warning: {printable(text)}", style="yellow") for text in figures.warnings[:WARNINGS_SHOWN]]
    more = len(figures.warnings) - WARNINGS_SHOWN
    warnings += [Text(f"and {more} more warnings: kvctl status")] if more > 0 else []
    return Group(*parts, *([Text(), *warnings] if warnings else []))


def _tier_table(tiers: Sequence[TierFigures]) -> RenderableType:
    table = _table("tier", ">used", ">of", "", ">blocks", ">in", ">out", least=("blocks", "", "of"))
    for one in tiers:
        full = one.used_bytes / one.capacity_bytes if one.capacity_bytes else 0.0
        table.add_row(
            printable(one.name), size(one.used_bytes), size(one.capacity_bytes), _bar(full), count(one.blocks),
            _speed(one.in_bytes_per_s), _speed(one.out_bytes_per_s),
        )  # fmt: skip
    return table


def _tenant_table(tenants: Sequence[TenantFigures]) -> RenderableType:
    table = _table(
        "tenant", ">dram", ">pinned", ">clients", ">out", ">refused", ">saved",
        least=("clients", "pinned", "saved", "refused"),
    )  # fmt: skip
    for one in tenants[:TENANTS_SHOWN]:
        table.add_row(
            short(one.name, 13), size(one.used_bytes), size(one.pinned_bytes), f"{one.clients:,}",
            _speed(one.out_bytes_per_s), f"{count(one.refused_per_s)}/s", f"{one.saved_s_per_s:.2f} s/s",
        )  # fmt: skip
    more = len(tenants) - TENANTS_SHOWN
    return Group(table, Text(f"and {more:,} more tenants")) if more > 0 else table


def _client_table(clients: Sequence[ClientFigures]) -> RenderableType:
    table = _table(
        ">id", "client", "tenant", ">pid", ">requests", ">leases", ">tickets", ">ring",
        least=("ring", "tickets", "id", "tenant", "leases", "pid"),
    )  # fmt: skip
    for one in clients[:CLIENTS_SHOWN]:
        ring = f"{one.ring_used_bytes / one.ring_bytes:.0%}" if one.ring_bytes else "-"
        table.add_row(
            str(one.session), short(one.name, 16), short(one.tenant, 12), str(one.pid),
            f"{count(one.requests_per_s)}/s", count(one.leases), count(one.tickets), ring,
        )  # fmt: skip
    more = len(clients) - CLIENTS_SHOWN
    return Group(table, Text(f"and {more:,} more clients: kvctl clients")) if more > 0 else table


def line(figures: Figures) -> str:
    """One line, for where there is no terminal."""
    tiers = [
        f"{printable(one.name)} {size(one.used_bytes)}/{size(one.capacity_bytes)}"
        f" in {_speed(one.in_bytes_per_s)} out {_speed(one.out_bytes_per_s)}"
        for one in figures.tiers
    ]
    return ", ".join(
        [
            time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(figures.at_unix_s)),
            f"hits {_share(figures.hit_share)} of {count(figures.asked_per_s)}/s",
            *tiers,
            f"stored {count(figures.stored_per_s)}/s",
            f"evicted {count(figures.evicted_per_s)}/s",
            f"saved {figures.saved_s_per_s:.2f} s/s",
            f"clients {figures.clients_total:,}",
            *([f"{len(figures.warnings)} warnings"] if figures.warnings else []),
        ]
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _speed(bytes_per_s: float) -> str:
    for scale, unit in ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")):
        if bytes_per_s >= scale:
            return f"{bytes_per_s / scale:.2f} {unit}"
    return "-" if bytes_per_s <= 0 else f"{bytes_per_s:.0f} B/s"


def _bar(share: float) -> Text:
    filled = min(BAR, round(BAR * share))
    style = "red" if share > 0.97 else "green"
    return Text.assemble(("#" * filled, style), "." * (BAR - filled), f" {share:4.0%}")
