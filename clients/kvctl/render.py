"""What kvctl prints: tables for people, one JSON object for programs.

Tables fit 80 columns. Names come from clients: they are shown without markup and without control characters.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.message import Message
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvctl.amounts import counted
from kvctl.amounts import size as size  # noqa: PLC0414  pages have it from here
from kvctl.amounts import span as span  # noqa: PLC0414
from kvctl.beyond import device, remote
from kvctl.client import printable
from kvctl.fitting import Fitting
from kvproto import control_pb2 as pb

if TYPE_CHECKING:
    from kvctl.doctor import Check

JSON_VERSION: Final = 1
HASH_DIGITS: Final = 8
_HASH: Final = re.compile(r"[0-9a-f]{16,}")
DIGEST_DIGITS: Final = 12  # shown of 64; `clear --namespace` takes them

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_VERDICT_STYLE: Final = {"ok": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def console(*, stderr: bool = False) -> Console:
    """Where tables go. 80 columns wide where there is no terminal to ask."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def as_json(name: str, body: Json) -> str:
    """The one object that `-o json` prints."""
    return json.dumps({"version": JSON_VERSION, name: body}, indent=2)


def as_json_line(name: str, body: Json) -> str:
    """The same on one line, of which there may be many."""
    return json.dumps({"version": JSON_VERSION, name: body}, separators=(",", ":"))


def plain(message: Message) -> dict[str, Json]:
    """A message as JSON values: every field by its name, numbers as numbers, null for a part that is not there.

    Bytes, which keys are, become hex digits.
    """
    return {
        field.name: None
        if field.has_presence and not message.HasField(field.name)
        else _plain(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _plain(value: object) -> Json:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return value.hex()
    assert isinstance(value, Iterable), f"a field of type {type(value).__name__} has no JSON form yet"
    return [_plain(one) for one in value]


def count(value: float) -> str:
    """A number in few letters: `1,234`, `12.3k`, `4.5M`."""
    for least, scale, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / scale:.1f}{unit}"
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def short(text: str, most: int) -> str:
    """Text from outside with so many letters at most, safe for a terminal."""
    shown = printable(text)
    return shown if len(shown) <= most else f"{shown[: most - 1]}~"


def status(report: pb.GetStatusResponse) -> RenderableType:
    """`kvctl status`."""
    state = "draining" if report.draining else "serving" if report.serving else "not serving"
    lines = [
        f"kvstored {printable(report.version)}, {state}, up {span(report.uptime_s)}",
        f"pid {report.pid}, uid {report.uid}, isolation {printable(report.isolation)}, {printable(report.runtime_dir)}",
        f"clients: {report.sessions:,}, namespaces: {report.namespaces:,}",
    ]
    if report.HasField("restart"):
        lines.append(_restart(report.restart))
    parts: list[RenderableType] = [Text(line) for line in lines]
    parts += [Text(f"warning: {printable(warning)}", style="yellow") for warning in report.warnings]
    parts += [Text(), _tiers(report.tiers), *map(_memory, report.tiers)]
    if report.HasField("disk"):
        parts += [Text(), _disk(report.disk), Text(), _drives(report.disk.drives)]
    if report.HasField("remote"):
        parts += [Text(), remote(report.remote)]
    parts += [part for one in report.devices for part in (Text(), device(one))]
    parts += [Text(), tenants(report.tenants), Text(), _traffic(report.counters)]
    return Group(*parts)


def _restart(report: pb.Restart) -> str:
    keeper = f"kept by {printable(report.keeper)}" if report.keeper != "none" else "not kept over a restart"
    if report.began != "warm":
        return f"began {printable(report.began)}: {printable(report.reason)}; memory is {keeper}"
    kept = f"began warm: {report.kept_blocks:,} of {report.found_blocks:,} blocks kept"
    if report.unverified_blocks:
        kept += f", {report.unverified_blocks:,} not verified yet"
    if report.withheld_slots:
        kept += f", {report.withheld_slots:,} slots withheld at first for leases of before"
    if report.verify_faults:
        kept += f", {report.verify_faults:,} found damaged"
    return f"{kept}; memory is {keeper}"


def _tiers(tiers: Iterable[pb.Tier]) -> Table:
    table = _table(
        "tier", ">capacity", ">assigned", ">used", ">blocks", ">arenas", least=("arenas", "assigned", "blocks")
    )
    for tier in tiers:
        sizes = (tier.capacity_bytes, tier.assigned_bytes, tier.used_bytes)
        arenas = f"{tier.arenas:,} x {size(tier.arena_bytes)}"
        table.add_row(printable(tier.name), *map(size, sizes), f"{tier.blocks:,}", arenas)
    return table


def _memory(tier: pb.Tier) -> Text:
    """What only tiers in memory have; nothing for disk."""
    held = {
        "populated": tier.populated_bytes,
        "in huge pages": tier.huge_bytes,
        "locked": tier.locked_bytes,
        "stale": tier.stale_bytes,
    }
    if tier.name == "disk":
        return Text(end="")
    told = [f"{size(of)} {name}" for name, of in held.items()]
    if len(tier.nodes) > 1 or tier.numa not in {"", "off"}:
        told += [f"{size(each.bytes)} on node {each.node}" for each in tier.nodes]
    return Text(f"{printable(tier.name)}: " + ", ".join(told))


def _disk(disk: pb.Disk) -> Text:
    index = f"index {printable(disk.index_state)}"
    if disk.rebuild_total_slots:
        index += f" ({disk.rebuild_done_slots / disk.rebuild_total_slots:.0%} of {disk.rebuild_total_slots:,} slots)"
    if disk.rebuilt:
        index += f", made anew at this start ({printable(disk.rebuilt)})"
    counters = disk.counters
    found = f"found at start: {disk.recovered_blocks:,} blocks in {disk.recovered_segments:,} segments"
    odd = {
        "orphans dropped": disk.orphan_blocks,
        "surplus segments removed": disk.surplus_segments,
        "segments not understood": disk.unknown_segments,
    }
    faults = counters.save_faults + counters.load_faults + counters.erase_faults + counters.commit_faults
    text = f"disk: {printable(disk.state)}, {index}, "
    text += f"admission {printable(disk.admission)}, codec {printable(disk.codec)}, "
    text += f"encrypted ({printable(disk.encryption)})\n" if disk.encryption else "not encrypted\n"
    text += ", ".join([found, *(f"{number:,} {what}" for what, number in odd.items() if number)])
    text += f"\n{counters.saved:,} blocks saved ({size(counters.saved_bytes)}), {counters.packed:,} packed, "
    text += f"{disk.queued_chains:,} chains wait, {size(disk.running_bytes)} under way"
    text += f"\n{counters.loaded:,} blocks loaded ({size(counters.loaded_bytes)}), {counters.damaged:,} damaged, "
    return Text(f"{text}{counters.gone:,} gone, {faults:,} faults")


def _drives(drives: Iterable[pb.Drive]) -> Table:
    table = _table("drive", "state", ">free", ">read", ">written", ">errors", least=("read", "written", "free"))
    for drive in drives:
        state = printable(drive.state) if drive.direct else f"{printable(drive.state)}, buffered"
        sizes = (drive.free_bytes, drive.read_bytes, drive.written_bytes)
        table.add_row(printable(drive.directory), state, *map(size, sizes), f"{drive.errors:,}")
    return table


def scrub(report: pb.ScrubResponse, tier: str = "disk") -> Text:
    """`kvctl scrub`."""
    if not report.started_unix_s:
        return Text("no scrub was run since the daemon started")
    done = f"{report.done_blocks:,} of {report.total_blocks:,} blocks ({size(report.done_bytes)})"
    rate = f"at most {size(report.rate_bytes_per_s)} a second" if report.rate_bytes_per_s else "as fast as it goes"
    if report.running:
        lines = [f"scrub runs, {rate}: {done} read"]
    else:
        took = span(report.finished_unix_s - report.started_unix_s)
        lines = [f"scrub done in {took}: {done} read"]
    if report.damaged:
        place = "on disk is" if tier == "disk" else "is"
        lines.append(f"{report.damaged:,} damaged: they are misses now, and their place {place} not used again")
    elif not report.running:
        lines.append("none damaged")
    return Text("\n".join(lines))


def _traffic(counters: pb.Counters) -> Text:
    asked = counters.lease_hits + counters.lease_misses
    hits = f", {counters.lease_hits / asked:.1%} of {asked:,} blocks found" if asked else ""
    if counters.lease_disk_hits:
        hits += f", {counters.lease_disk_hits:,} of them on disk"
    by_hand = counters.evicted_by_operators + counters.disk_evicted_by_operators
    evicted = f"{counters.evicted:,} evicted" + (f" and {by_hand:,} by operators" if by_hand else "")
    return Text(
        f"{counters.leases:,} leases{hits}\n"
        f"{counters.published:,} blocks published ({size(counters.published_bytes)}), {evicted}, "
        f"{counters.faults:,} faults"
    )


def counters(report: pb.Counters, disk: pb.DiskCounters | None = None) -> RenderableType:
    """`kvctl stats`: those of memory, and of disk where there is one."""
    table = _table("since the daemon started", ">count")
    _count_rows(table, report)
    asked = report.lease_hits + report.lease_misses
    if asked:
        table.add_row("hit rate", f"{report.lease_hits / asked:.1%}")
    if disk is None:
        return table
    below = _table("disk", ">count")
    _count_rows(below, disk)
    return Group(table, Text(), below)


def _count_rows(table: Table, report: Message) -> None:
    for field in report.DESCRIPTOR.fields:
        value = getattr(report, field.name)
        if field.name.endswith("_bytes"):
            table.add_row(field.name.removesuffix("_bytes").replace("_", " ") + " bytes", size(value))
        else:
            table.add_row(field.name.replace("_", " "), f"{value:,}")


def tenants(reports: Iterable[pb.Tenant]) -> Table:
    """What each tenant holds, as `kvctl status` has it."""
    table = _table(
        "tenant", "uids", ">assigned", ">used", ">stale", ">blocks", ">clients",
        least=("stale", "uids", "assigned", "clients"),
    )  # fmt: skip
    for one in reports:
        held = (one.assigned_bytes, one.used_bytes, one.stale_bytes)
        uids = ", ".join(map(str, one.uids))
        table.add_row(printable(one.name), uids, *map(size, held), f"{one.blocks:,}", f"{one.sessions:,}")
    return table


def namespaces(reports: Iterable[pb.Namespace]) -> Table:
    """`kvctl namespaces`: several lines each, so that a model's name has room."""
    table = _table("namespace\ntenant", "model\nengine layout dtype ranks", ">a block", ">blocks\nbytes", ">clients")
    for one in reports:
        lines = [_cut(one.model), f"{_cut(one.engine)} {_cut(one.layout)} {one.dtype} {_ranks(one)}"]
        if one.revision or one.adapter:
            lines.append(f"revision {_cut(one.revision) or '-'} adapter {_cut(one.adapter) or '-'}")
        if one.codec:
            lines.append(f"codec {one.codec}")
        table.add_row(
            f"{one.digest[:DIGEST_DIGITS]}\n{printable(one.tenant)}",
            "\n".join(map(printable, lines)),
            f"{one.block_tokens:,} tokens\n{size(one.block_bytes)}",
            f"{one.blocks:,}\n{size(one.bytes)}",
            f"{one.sessions:,}",
        )
    return table


def _cut(text: str) -> str:
    """Without most of the hashes in it, which -o json has whole."""
    return _HASH.sub(lambda found: f"{found[0][:HASH_DIGITS]}~", text)


def namespace_list(reports: Iterable[pb.Namespace]) -> RenderableType:
    """`kvctl ls`: a line each, the largest first."""
    table = _table(
        "namespace", "tenant", "model", ">blocks", ">bytes", ">clients", least=("clients", "tenant", "blocks")
    )
    largest = sorted(reports, key=lambda one: (-one.bytes, one.tenant, one.digest))
    for one in largest:
        row = (one.digest[:DIGEST_DIGITS], short(one.tenant, 12), short(one.model, 26))
        table.add_row(*row, f"{one.blocks:,}", size(one.bytes), f"{one.sessions:,}")
    return table if largest else Text("no namespace holds blocks or is open")


def _ranks(one: pb.Namespace) -> str:
    return f"tp{one.tp_rank}/{one.tp_size} pp{one.pp_rank}/{one.pp_size}"


def clients(reports: Sequence[pb.Client]) -> RenderableType:
    """`kvctl clients`."""
    if not reports:
        return Text("no client is connected")
    table = _table(
        "id", "client\nrole, mode", "tenant\nisolation", ">pid\nuid", ">ring used\nof", ">leases\ntickets", ">up"
    )
    for one in reports:
        table.add_row(
            str(one.session),
            f"{printable(one.name)}\n{printable(one.role)}, {printable(one.mode)}",
            f"{printable(one.tenant)}\n{printable(one.isolation)}",
            f"{one.pid}\n{one.uid}",
            f"{size(one.ring_used_bytes)}\n{size(one.ring_bytes)}",
            f"{one.leases:,}\n{one.tickets:,}",
            span(one.connected_s),
        )
    return table


def config(settings: Iterable[pb.ConfigValue]) -> Table:
    """`kvctl config`."""
    table = _table("setting", "value", "origin")
    for one in settings:
        table.add_row(printable(one.name), printable(one.value), printable(one.origin))
    return table


def policies(reports: Iterable[pb.Policy]) -> Table:
    """`kvctl policy`."""
    table = _table("tier", "tenant", "rule", "from", ">blocks", least=("blocks", "from"))
    for one in reports:
        origin = "kvctl policy set" if one.chosen else "configuration"
        table.add_row(one.tier, printable(one.tenant or "*"), printable(one.rule), origin, f"{one.blocks:,}")
    return table


def policy_changes(report: pb.SetPolicyResponse) -> Text:
    """What `kvctl policy set` changed, or would; a line each tier."""
    lines = []
    for change in report.changes:
        one, former = change.policy, printable(change.former_rule)
        whose = f"{one.tier}, tenant {printable(one.tenant)}" if one.tenant else one.tier
        verb = "would evict" if report.dry_run else "evicts"
        was = "as before" if former == one.rule else f"until now by {former}"
        lines.append(f"{whose}: {verb} by {printable(one.rule)}, {was} ({one.blocks:,} blocks)")
    return Text("\n".join(lines))


def clearing(report: pb.ClearResponse, what: str) -> Text:
    """What a clear dropped or would drop; `what` names its scope."""
    verb = "would drop" if report.dry_run else "dropped"
    lines = [f"{verb} {counted(report.blocks, 'block')}, {size(report.bytes)}: {printable(what)}"]
    if report.leased_blocks:
        lines.append(
            f"{counted(report.leased_blocks, 'block')} of them, with all that leads there, leased or pinned: "
            "pins end, memory is free once readers are done"
        )
    if report.pending_blocks:
        pending = counted(report.pending_blocks, "pending block")
        lines.append(f"{pending} would be discarded" if report.dry_run else f"{pending} discarded")
    if report.HasField("remote_objects"):
        objects = f"{counted(report.remote_objects, 'object')} of this host in the remote tier"
        goes = "would be removed" if report.dry_run else "still to be removed"
        lines.append(f"{objects} {goes}, with what other hosts have of it there, where that can be listed")
    return Text("\n".join(lines))


def checks(results: Iterable["Check"]) -> RenderableType:
    """`kvctl doctor`. What several checks want done is said once."""
    table = _table("check", "", "found")
    said: set[str] = set()
    for one in results:
        found = Text(printable(one.found))
        if one.remedy and one.remedy not in said:
            said.add(one.remedy)
            found.append(f"\n-> {printable(one.remedy)}", style="bold")
        table.add_row(printable(one.name), Text(one.verdict.value, style=_VERDICT_STYLE[one.verdict.value]), found)
    return table


def _table(*headings: str, least: Sequence[str] = ()) -> Table:
    """A borderless table; a heading that begins with `>` is of a column of numbers. `least`: see Fitting."""
    table = Fitting(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.least = tuple(least)
    for heading in headings:
        numbers = heading.startswith(">")
        table.add_column(
            heading.removeprefix(">"), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold"
        )
    return table
