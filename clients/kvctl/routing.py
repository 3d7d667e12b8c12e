"""`kvctl load`, `match`, `admission` and `watch`: what routers ask of a host, by hand."""

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from kvctl import insight, render, scope, values
from kvctl.client import Exit, KvctlError, printable
from kvctl.program import NUMBER_MAX, Digest, Extra, Globals, Keys, Output, Owner, Tokens, command, globals_of
from kvctl.render import size
from kvproto import control_pb2 as pb
from kvproto.limits import KEYS_PER_FRAME
from kvproto.sizes import UNITS_SAID, parse_bytes


@command("load", short="How full and how busy this host's store is.")
def show_load(context: typer.Context) -> None:
    """How full and how busy this host's store is, as routers ask for it."""
    chosen = globals_of(context)
    with chosen.connect() as client:
        report = client.load()
    table = render._table("tier", ">used", ">of", ">blocks", ">read a second")  # noqa: SLF001
    for tier in report.tiers:
        speed = size(round(tier.read_bytes_per_s)) if tier.HasField("read_bytes_per_s") else "not measured"
        table.add_row(printable(tier.name), size(tier.used_bytes), size(tier.capacity_bytes), f"{tier.blocks:,}", speed)
    said = (
        f"{report.clients:,} clients, {report.tickets:,} blocks being stored, {report.leases:,} leases, "
        f"{report.waiting_leases:,} that wait; {report.queued_chains:,} chains wait for disk"
        f"{'; draining' if report.draining else ''}"
    )
    lines = [Text(said)]
    if report.HasField("remote"):
        far = report.remote
        speed = size(round(far.read_bytes_per_s)) + "/s" if far.HasField("read_bytes_per_s") else "not measured"
        stands = f"reading {printable(far.reading)} ({speed}), writing {printable(far.writing)}"
        lines.append(Text(f"remote tier: {stands}, {size(far.used_bytes)} of {size(far.capacity_bytes)} by this host"))
    chosen.show("load", render.plain(report), Group(table, *lines))


@command("match", short="How much of a prefix is here, and in which tiers.")
def show_match(
    context: typer.Context,
    key: Keys = None,
    *,
    tokens: Tokens = None,
    extra: Extra = "",
    namespace: Digest = None,
    tenant: Owner = None,
) -> None:
    """How much of a prefix is here, in which tiers, and what loading it takes. Nothing is touched by asking."""
    chosen = globals_of(context)
    chain = insight.parse(key or (), tokens, extra, tenant, namespace)
    with chosen.connect() as client:
        digest, keys = chain.named(client)
        if len(keys) > KEYS_PER_FRAME:
            raise KvctlError(Exit.USAGE, f"a match is of {KEYS_PER_FRAME:,} blocks at most, not {len(keys):,}")
        digests = [digest] if digest is not None else []
        report = client.summarise(pb.SummariseMatchRequest(tenant=tenant, namespace_digests=digests, keys=keys))
    dram = f"{report.dram_blocks:,} in memory ({size(report.dram_bytes)})"
    disk = f"{report.disk_blocks:,} on disk alone ({size(report.disk_bytes)})"
    near = f"{report.hbm_blocks:,} on a GPU ({size(report.hbm_bytes)}), " if report.hbm_blocks else ""
    lines = [f"{report.blocks:,} of {len(keys):,} blocks: {near}{dram}, {disk}"]
    if report.pending_blocks:
        lines.append(f"{report.pending_blocks:,} more are being stored")
    times = (("loading", "load_s"), ("computing", "recompute_s"))
    known = [f"{what} them takes {getattr(report, name):.3g} s" for what, name in times if report.HasField(name)]
    chosen.show("match", render.plain(report), Text("\n".join([*lines, *([", ".join(known)] if known else [])])))
    if not report.blocks:
        raise typer.Exit(Exit.NOT_FOUND)


@command("admission")
def show_admission(
    context: typer.Context,
    room: Annotated[str, typer.Argument(metavar="BYTES", help=f"So much of payload: 4GiB ({UNITS_SAID}).")],
    *,
    namespace: Annotated[
        str,
        typer.Option(metavar="DIGEST", autocompletion=values.namespaces, help="Where it would be stored."),
    ],
    tenant: Owner = None,
) -> None:
    """What would be given up if so much were stored now. Nothing is."""
    chosen = globals_of(context)
    try:
        wanted = parse_bytes(room)
    except ValueError as error:
        raise KvctlError(Exit.USAGE, f"BYTES: {error}") from None
    with chosen.connect() as client:
        digest = scope.parse(tenant, namespace, (), everything=False).resolved(client).digest
        assert digest is not None, "a namespace was named"
        owners = [one.tenant for one in client.namespaces().namespaces if one.digest == digest]
        if tenant is None and len(owners) != 1:
            raise KvctlError(Exit.USAGE, "several tenants have it; say which one is meant with --tenant")
        report = client.admission(
            pb.EstimateAdmissionRequest(tenant=tenant or owners[0], namespace_digest=digest, bytes=wanted)
        )
    lost = f"{report.evicted_blocks - report.kept_blocks:,} would be gone"
    priced = report.evicted_blocks - report.kept_blocks - report.unpriced_blocks
    if priced > 0:
        lost += f"; computing {priced:,} of them takes {report.lost_s:.3g} s"
    leave = f"{report.evicted_blocks:,} others would leave memory, {size(report.evicted_bytes)}"
    lines = [
        f"{report.wanted_blocks:,} blocks: for {report.free_blocks:,} there is room",
        f"{leave}: {report.kept_blocks:,} stay on disk, {lost}",
    ]
    if report.unpriced_blocks:
        lines.append(f"of {report.unpriced_blocks:,} of those nobody knows what computing them takes")
    if report.short_blocks and report.other_sizes_bytes:
        lines.append(
            f"for {report.short_blocks:,} more, blocks of other sizes of this tenant would have to make way: "
            f"they have {size(report.other_sizes_bytes)}, and how many would is not counted here"
        )
    elif report.short_blocks and not report.from_others:
        lines.append(f"for {report.short_blocks:,} there is no room: the rest is leased, pinned or being stored")
    elif report.short_blocks:
        lines.append(f"for {report.short_blocks:,} this tenant itself has no room")
    if report.from_others:
        lines.append("memory of another tenant would be taken instead; that is not counted here")
    chosen.show("admission", render.plain(report), Text("\n".join(lines)))


@command("watch", short="Where a tenant's blocks lie, and how that changes.")
def watch(
    context: typer.Context,
    *,
    tenant: Annotated[str, typer.Option(metavar="NAME", autocompletion=values.tenants, help="Whose blocks.")],
    namespace: Digest = None,
    start: Annotated[
        int | None,
        typer.Option(
            "--from", min=0, max=NUMBER_MAX, metavar="NUMBER", help="Only changes, those from this number on."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what changes, until Ctrl-C.")] = False,
) -> None:
    """Where a tenant's blocks lie, and how that changes: a line a block, with -o json an object a message.

    Needs events.listen.
    """
    chosen = globals_of(context)
    with chosen.connect() as client:
        client.need_tenant(tenant)  # one that is configured may still come
        digest = None
        if namespace is not None:
            digest = scope.parse(tenant, namespace, (), everything=False).resolved(client).digest
        request = pb.WatchBlocksRequest(tenant=tenant, namespace_digest=digest, start_from=start, follow=follow)
        try:
            for message in client.watch(request):
                _tell(chosen, message)
        except KeyboardInterrupt:
            return
    if follow:
        raise KvctlError(Exit.UNREACHABLE, "the daemon ended; see its log")


def _tell(chosen: Globals, message: pb.BlockChanges) -> None:
    if chosen.output is Output.JSON:
        typer.echo(render.as_json_line("changes", render.plain(message)))
        return
    if message.cleared:
        typer.echo(f"{message.number:>8} all cleared")
    for change in message.changes:
        was = _tiers(dram=change.was_dram, disk=change.was_disk, remote=change.was_remote)
        now = _tiers(dram=change.dram, disk=change.disk, remote=change.remote)
        moved = now if message.there else f"{was} -> {now}"
        typer.echo(f"{message.number:>8} {change.key.hex()} {moved}")


def _tiers(*, dram: bool, disk: bool, remote: bool) -> str:
    tiers = (("dram", dram), ("disk", disk), ("remote", remote))
    return "+".join(name for name, there in tiers if there) or "nowhere"
